"""What is read of a table is chosen once, read no further than needed, and its faults are named."""

import gzip
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

import families
from harness.checkpoint import load
from harness.data import corpora, example_sets, files
from harness.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    families.save_tokenizer(tmp_path / "tokenizer")
    found = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    found.chat_template = TEMPLATE
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_of(path, tokenizer=None):
    return corpora.corpus_text(path, "test", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"meta": "a", "text": "one"}, {"meta": "b", "text": "two"}], ["one", "two"]),
        ([{"id": 1, "content": "one"}, {"id": 2, "content": "two"}], ["one", "two"]),
        ([{"title": "x", "content": "one", "body": "b"}] * 2, ["one", "one"]),
        ([{"words": "one", "n": 1}] * 2, ["one", "one"]),
        ([{"prompt": "p", "response": "r", "content": "c"}], ["pr"]),
        ([{"text": "", "meta": "m"}, {"text": "two", "meta": "m"}], ["", "two"]),
    ],
)
def test_the_column_is_what_it_is_called(tmp_path, rows, found):
    assert text_of(write(tmp_path / "t.jsonl", rows)) == corpora.PARAGRAPHS.join(found)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "meta": "m"}, {"text": None, "meta": "m"}], "line 2: text is None"),
        ([{"text": None, "meta": "m"}, {"text": "b", "meta": "m"}], "line 1: text is None"),
        ([{"text": "a"}, {"meta": "m"}], "line 2: text is missing"),
        ([{"text": "a"}, {"text": 7}], "line 2: text is 7"),
        ([{"content": "a", "x": "b"}, {"content": None, "x": "b"}], "line 2: content is None"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a", "response": None, "output": "c"}],
         "line 2: response is None"),
        ([{"a": "x", "b": "y"}], "no text column among a, b"),
        ([{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}],
         "line 2: messages is None"),
        ([{"messages": [{"role": "user"}]}], "line 1: messages holds .*expected role and content"),
        ([{"messages": ["hi"]}], "expected role and content"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(tmp_path, tokenizer, rows, message):
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError, match=message):
        text_of(path, tokenizer)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi?"},
    {"from": "gpt", "value": "Ho."},
]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT, "id": "x"}])
def test_chats_are_rendered_by_the_template(tmp_path, tokenizer, row):
    path = write(tmp_path / "chats.jsonl", [row] * 30)
    rendered = "<s>[system]Be brief.[user]Hi?[assistant]Ho."
    assert text_of(path, tokenizer) == corpora.PARAGRAPHS.join([rendered] * 30)
    pair = {"prompt": "<s>[system]Be brief.[user]Hi?[assistant]", "response": "Ho."}
    assert corpora.instructions(path, "test", tokenizer) == [pair]
    assert example_sets.pairs(path, "train", tokenizer=tokenizer, alone=True) == [pair] * 30
    assert not example_sets.is_text(path)
    windows = corpora.calibration(tokenizer, path, nsamples=2, seqlen=16, seed=0)
    assert windows.shape == (2, 16)
    tokenizer.chat_template = None
    for read in (lambda: text_of(path, tokenizer), lambda: text_of(path)):
        with pytest.raises(UserError, match="line 1: a chat, and the tokenizer has no chat temp"):
            read()


def test_chats_without_an_answer(tmp_path, tokenizer):
    path = write(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    with pytest.raises(UserError, match="line 2: the last of 2 messages is by 'user'"):
        corpora.instructions(path, "train", tokenizer)


def sentencepiece_like():
    """A BPE without a pre-tokenizer: merges run over spaces, as LLaMA's do."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.train_from_iterator(
        [families.TEXT * 20],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "over spaces"])
def test_a_part_of_the_text_gives_the_tokens_of_the_whole(tmp_path, tokenizer, kind, monkeypatch):
    tokenizer = tokenizer if kind == "bytes" else sentencepiece_like()
    draw = torch.Generator().manual_seed(0)
    words = families.TEXT.split()
    chosen = [words[int(i)] for i in torch.randint(len(words), (40_000,), generator=draw)]
    (tmp_path / "t.txt").write_text(" ".join(chosen))
    whole = corpora.evaluation(tokenizer, str(tmp_path / "t.txt"), seqlen=32)
    for limit in (1, 7, 100):
        part = corpora.evaluation(tokenizer, str(tmp_path / "t.txt"), seqlen=32, limit=limit)
        assert torch.equal(part, whole[:limit])
    monkeypatch.setattr(corpora, "LONGEST", 50_000)
    with pytest.raises(UserError, match="evaluate its first windows with --limit"):
        corpora.evaluation(tokenizer, str(tmp_path / "t.txt"), seqlen=32)
    windows = corpora.calibration(tokenizer, str(tmp_path / "t.txt"), nsamples=3, seqlen=32, seed=0)
    assert windows.shape == (3, 32)


@pytest.mark.parametrize("name", ["line.txt", "bomb.txt.gz", "rows.jsonl.gz"])
def test_memory_is_bounded(tmp_path, name):
    """The address space may grow by 1.5 GB over what the imports take: of a line of 200 MB, or
    of what a small gzip file unpacks to, only the beginning is read."""
    path, piece = tmp_path / name, b"def add(left, right): " * 50_000
    if name.startswith("rows"):
        piece = json.dumps({"text": piece.decode()}).encode() + b"\n"
    with gzip.open(path, "wb", 1) if name.endswith("gz") else path.open("wb") as file:
        for _ in range(200):
            file.write(piece)
    families.save_tokenizer(tmp_path / "tokenizer")
    code = (
        "import resource, sys, torch\nfrom harness.data import corpora\n"
        "from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained('tokenizer')\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 1_500_000_000,) * 2)\n"
        "print(corpora.evaluation(t, sys.argv[1], seqlen=64, limit=4).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "torch.Size([4, 64])\n", done.stderr
    assert resource.RLIMIT_AS is not None


GOOD = [{"text": "one"}, {"text": "two"}]


def parquet(folder, damage):
    import pyarrow
    from pyarrow import parquet

    path = folder / "t.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"] * 99}), path)
    path.write_bytes(damage(path.read_bytes()))
    return path


BROKEN = {
    "t.jsonl": [
        b'{"text": "a"', b'{"text": ' + b"9" * 10_000 + b"}", b"[" * 100_000,
        b'{"text": "\\ud800"}',
        b'{"text": "a"}\n{', b"\xff\xfe", b"null", b"7", b'"a"\n[]', b'{"text": NaN, "b": 1}',
        b'{"text": "a"} x', b"{}", b'[["a", 1]]', b"\x00\x00\x00", b'{"text": "a", "text": 3}',
        b"\x1f\x8b" + b"\0" * 99,
    ],
    "t.json": [b"", b"{", b"[" * 100_000, b"7", b'{"a": ' + b"1" * 9_999 + b"}", b'[{"text": 1}]'],
    "t.csv": [b"text\n\x00a\n", b"a,b\n1,2,3\n", b"", b"a,b\nx,y\n", b"\xff\n"],
    "t.txt": [b"\xff\xfe\x00", b""],
    "t.txt.gz": [b"", b"plain", gzip.compress(b"a" * 9999)[:-9],
                 gzip.compress(b"abc" * 999)[:20] + b"\xff" * 40],
    "t.jsonl.gz": [gzip.compress(b'{"text": "a"}\n' * 99)[:30]],
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, "t.parquet"])
def test_damaged_files_are_one_line(tmp_path, tokenizer, name):
    damages = BROKEN.get(name) or [
        lambda b: b[:-4], lambda b: b[: len(b) // 2], lambda b: b"PAR1" + b"\0" * 99,
        lambda b: b[:20] + b"\xff" * 30 + b[50:], lambda b: b"",
    ]  # fmt: skip
    for number, damage in enumerate(damages):
        path = tmp_path / name
        if name == "t.parquet":
            path = parquet(tmp_path, damage)
        else:
            path.write_bytes(damage)
        for read in (corpora.evaluation, corpora.calibration):
            how = {"limit": 1} if read is corpora.evaluation else {"nsamples": 1, "seed": 0}
            with pytest.raises(UserError) as caught:
                read(tokenizer, str(path), seqlen=8, **how)
            assert str(path.name) in str(caught.value) and "\n" not in str(caught.value), number
    with pytest.raises(UserError):
        corpora.questions(str(path))


def test_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = write(tmp_path / "t.jsonl", [{"text": "a" * 200}])
    with pytest.raises(UserError, match="line 1: longer than"):
        text_of(path)


def test_pipes_are_not_waited_for(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=r"no \.txt, \.jsonl"):
        text_of(str(tmp_path / "t.jsonl"))


def test_tokens_beyond_the_model(tmp_path, capsys):
    """A tokenizer of another model: every command that feeds tokens says so."""
    from harness import cli

    families.save("llama", tmp_path / "model", num_hidden_layers=1, vocab_size=64)
    families.save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(families.TEXT * 40)
    for words in (["--ppl", str(tmp_path / "text.txt"), "--limit", "1"], ["--choice"]):
        out = str(tmp_path / "r.json")
        assert cli.main(["eval", str(tmp_path / "model"), *words, "--out", out]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "tokenizer and model do not belong together" in line
    assert corpora.check_token(63, load.load_config(tmp_path / "model")) is None
