"""Named corpora and local files as token windows, instruction sets and multiple-choice questions.

Windows of the named corpora follow GPTQ's repository (arXiv 2210.17323): calibration takes random
windows of the train split, evaluation cuts the test text into windows and drops the tail. Text is
encoded whole, with the tokenizer's own special tokens (LLaMA's BOS once, at the very start).

Shapes: N windows, T tokens per window (seqlen).
"""

import random
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.data import columns, files, hub, stdlib
from harness.data.instructions import deal, example
from harness.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDED = ("stdlib", "stdlib-doc", "stdlib-quiz")
DATASETS = (*hub.SOURCES, *EMBEDDED)
INSTRUCTIONS = ("alpaca", "dolly", "stdlib-doc")
STDLIB_SPLITS = {"train": "train", "validation": "calibration", "test": "test"}
PARAGRAPHS = "\n\n"
C4_DOCUMENTS, C4_WINDOWS = 1100, 256
DRAWS = 10_000
LONGEST = 32_000_000  # characters of one text that are encoded, which take about a gigabyte
CHARACTERS, MARGIN = 8, 256  # of a token, at first; tokens whose end of the text is not known yet


def _local(dataset: str) -> Path:
    path = Path(dataset)
    if not path.exists():
        raise UserError(
            f"dataset {dataset!r} is neither a file or folder nor one of {', '.join(DATASETS)}."
            + nearest(dataset, DATASETS)
        )
    return path


def _encode(tokenizer, text: str) -> list[int]:
    # verbose=False: a whole corpus is longer than any context, and is meant to be.
    return tokenizer(text, verbose=False)["input_ids"]


def _file_text(dataset: str, split: str, tokenizer, most: int | None) -> str:
    source = _local(dataset)
    chosen, own = files.select(source, split)
    if not own and split == "train":
        from harness import distributed  # torch, which nothing above needs

        distributed.say_once(
            f"note: {dataset} is one text for calibration and evaluation alike (a folder with "
            "train* and test* files keeps them apart)"
        )
    parts, size = [], 0
    for text in _documents(chosen, tokenizer):
        parts.append(text)
        size += len(text)
        if most is not None and size > most:
            break
    return "".join(parts)


def _documents(paths: Sequence[Path], tokenizer) -> Iterator[str]:
    """The texts of files and what stands between them, piece by piece."""
    first = True
    for path in paths:
        if files.kind(path) == ".txt":
            yield "" if first else PARAGRAPHS
            yield from files.pieces(path)
            first = False
            continue
        for row, chosen, where in read(path):
            yield "" if first else PARAGRAPHS
            yield columns.text_of(row, chosen, tokenizer, where)
            first = False


def read(path: Path) -> Iterator[tuple[dict, columns.Columns, str]]:
    """(row, the columns of its file, the name of its place) of a table, one after another."""
    stream = files.stream(path)
    head = list(islice(stream, columns.HEAD))
    if not head:
        return
    chosen = columns.choose(head, path)
    for number, row in enumerate(chain(head, stream), 1):
        yield row, chosen, Place(path, number)


class Place(str):
    """ "FILE, line 7", counted only where somebody reads it."""

    def __new__(cls, path: Path, number: int):
        self = super().__new__(cls, f"{path}, row {number}")
        self.path, self.number = path, number
        return self

    def __format__(self, how: str) -> str:
        return f"{self.path}, line {files.line_of(self.path, self.number)}"


def corpus_text(
    dataset: str, split: str, new_eval: bool = True, *, tokenizer=None, most: int | None = None
) -> str:
    """The train or test text of every dataset whose windows are cut from one joined text.

    Args:
        tokenizer: renders chats. most: of a local file no more is read than this many characters
            and the rest of the piece in which they end.
    """
    if dataset == "stdlib-quiz":
        raise UserError("stdlib-quiz is a set of questions, not a text; use 'stdlib' for windows")
    if dataset == "stdlib":
        return stdlib.text("calibration" if split == "train" else split)
    if dataset == "wikitext2":
        return PARAGRAPHS.join(hub.load(dataset, split)["text"])
    if dataset == "ptb":
        if split == "test" and not new_eval:
            return PARAGRAPHS.join(hub.load(dataset, "validation")["sentence"])
        return " ".join(hub.load(dataset, split)["sentence"])
    if dataset in INSTRUCTIONS:
        pairs = instructions(dataset, split)
        return PARAGRAPHS.join(pair["prompt"] + pair["response"] for pair in pairs)
    return _file_text(dataset, split, tokenizer, most)


def corpus_documents(dataset: str, split: str) -> Sequence[str]:
    """c4's shard, or half of pileval (it has one split: the first half is for calibration)."""
    if dataset == "c4":
        return hub.load("c4", "train" if split == "train" else "validation")["text"]
    rows = hub.load("pileval", "validation")
    half = len(rows) // 2
    chosen = range(half) if split == "train" else range(half, len(rows))
    return rows.select(chosen)["text"]


def _drawn(tokenizer, dataset: str, documents: Sequence[str], count: int, seqlen: int, seed: int):
    """GPTQ's c4 windows: draw documents until one is longer than T, then a random window of it."""
    import torch

    draw = random.Random(seed)
    windows = []
    for _ in range(count):
        for _ in range(DRAWS):
            ids = _encode(tokenizer, documents[draw.randint(0, len(documents) - 1)])
            if len(ids) > seqlen:
                break
        else:
            raise UserError(
                f"{dataset}: {len(windows)} windows of {seqlen} tokens found, {count} asked for: "
                f"none of {DRAWS} documents drawn is that long; use a shorter --seqlen"
            )
        start = draw.randint(0, len(ids) - seqlen - 1)
        windows.append(torch.tensor(ids[start : start + seqlen], dtype=torch.long))
    return torch.stack(windows)


def _check(seqlen: int, count: int | None, flag: str) -> None:
    if seqlen < 2:
        raise UserError(f"--seqlen {seqlen}: a window needs at least 2 tokens")
    if count is not None and count < 1:
        raise UserError(f"{flag} {count}: at least 1 window is needed")


def calibration(
    tokenizer, dataset: str, *, nsamples: int, seqlen: int, seed: int, held_out: int = 0
) -> "Tensor":
    """Random windows of the train split, LongTensor [N = nsamples, T = seqlen], equal per seed.

    `stdlib` draws from its calibration split, which the embedded models were not trained on.
    Raises UserError when the text does not fill that many windows side by side; of `nsamples`,
    `held_out` are not what --nsamples asked for.
    """
    import torch

    _check(seqlen, nsamples, "--nsamples")
    if dataset in ("c4", "pileval"):
        documents = corpus_documents(dataset, "train")
        return _drawn(tokenizer, dataset, documents, nsamples, seqlen, seed)
    text = corpus_text(dataset, "train", True, tokenizer=tokenizer, most=LONGEST)
    if len(text) > LONGEST:
        from harness import distributed

        text = text[:LONGEST]
        distributed.say(f"{dataset}: windows are drawn from its first {LONGEST:,} characters")
    ids = _encode(tokenizer, text)
    have = max(0, len(ids) - 1) // seqlen
    if have < nsamples:
        raise UserError(_too_little(dataset, ids, have, seqlen, nsamples, held_out))
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    tokens = torch.tensor(ids, dtype=torch.long)
    return torch.stack([tokens[start : start + seqlen] for start in starts])


def _too_little(dataset: str, ids, have: int, seqlen: int, asked: int, held_out: int = 0) -> str:
    fewer = f"--nsamples {have - held_out}, " if have > held_out else ""
    return (
        f"{dataset}: {asked} windows of {seqlen} tokens asked for, its {len(ids)} tokens fill "
        f"{have}; use {fewer}a shorter --seqlen or more text"
    )


def evaluation(
    tokenizer,
    dataset: str,
    *,
    seqlen: int,
    limit: int | None = None,
    new_eval: bool = True,
    bos: bool = False,
) -> "Tensor":
    """Non-overlapping windows of the test text, tail dropped: LongTensor [N, T = seqlen].

    `limit` keeps the first so many. `new_eval=False` takes GPTQ's older slices of ptb and c4 (see
    `protocol`). With `bos` every window is BOS and T - 1 tokens of the text, which then begins
    without. Raises UserError when the text is shorter than one window.
    """
    import torch

    _check(seqlen, limit, "--limit")
    if bos:
        plain = evaluation(
            tokenizer, dataset, seqlen=seqlen, limit=limit and limit + 1, new_eval=new_eval
        )
        ids = plain.flatten()
        ids = ids[1:] if ids[0] == tokenizer.bos_token_id else ids
        count = len(ids) // (seqlen - 1)
        count = count if limit is None else min(limit, count)
        windows = ids[: count * (seqlen - 1)].view(count, seqlen - 1)
        return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)
    if dataset == "c4" and not new_eval:
        count = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
        return _drawn(tokenizer, dataset, corpus_documents(dataset, "test"), count, seqlen, 0)
    if dataset in ("c4", "pileval"):
        text = " ".join(corpus_documents(dataset, "test")[:C4_DOCUMENTS])
        limit = C4_WINDOWS if limit is None else min(limit, C4_WINDOWS)
        ids = _encode(tokenizer, text)
    else:
        ids = _first_ids(tokenizer, dataset, new_eval, limit, seqlen)
    count = len(ids) // seqlen
    if not count:
        raise UserError(
            f"{dataset}: its {len(ids)} tokens do not fill one window of {seqlen}; "
            "use a shorter --seqlen or more text"
        )
    count = count if limit is None else min(limit, count)
    return torch.tensor(ids[: count * seqlen], dtype=torch.long).view(count, seqlen)


def _first_ids(tokenizer, dataset, new_eval, limit: int | None, seqlen: int) -> list[int]:
    """Tokens of the test text: with ``limit`` no more of it is read and encoded than it takes to be
    sure of so many windows. What follows a text changes only the tokens at its very end, of which
    MARGIN are not taken."""
    need = None if limit is None else limit * seqlen
    most = LONGEST if need is None else min(LONGEST, CHARACTERS * (need + MARGIN))
    while True:
        text = corpus_text(dataset, "test", new_eval, tokenizer=tokenizer, most=most)
        whole = len(text) <= most
        ids = _encode(tokenizer, text if whole else text[:most])
        if whole or (need is not None and len(ids) >= need + MARGIN):
            return ids if need is None else ids[:need]
        if most >= LONGEST:
            raise UserError(
                f"{dataset}: more than {LONGEST:,} characters; evaluate its first windows with "
                "--limit N"
            )
        most = min(LONGEST, 2 * most)


def protocol(dataset: str, new_eval: bool = True) -> str:
    """How `evaluation` makes its text, in words: "wikitext2 test, documents joined by ..."."""
    first = f"first {C4_DOCUMENTS} documents joined by a space, first {C4_WINDOWS} windows"
    named = {
        "wikitext2": "wikitext2 test, documents joined by two newlines",
        "ptb": "ptb test, sentences joined by a space"
        if new_eval
        else "ptb validation, sentences joined by two newlines",
        "c4": f"c4 validation shard 0, {first}"
        if new_eval
        else f"c4 validation shard 0, {C4_WINDOWS} random windows of long documents",
        "pileval": f"pileval second half, {first}",
        "stdlib": "Python {}.{} stdlib held-out modules joined by two newlines".format(
            *sys.version_info[:2]
        ),
    }
    if dataset in named:
        return named[dataset]
    if dataset in INSTRUCTIONS:
        return f"{dataset} test, prompts with responses joined by two newlines"
    return f"{dataset}, documents joined by two newlines"


def instructions(dataset: str, split: str, tokenizer=None) -> list[dict[str, str]]:
    """`[{"prompt": str, "response": str}, ...]` of split "train", "validation" or "test".

    alpaca and dolly, a single local file and a folder whose names tell no split are dealt by
    `instruct.deal`; chats are rendered by the tokenizer. Raises UserError for a dataset without
    prompts and responses.
    """
    if split not in STDLIB_SPLITS:
        raise UserError(f"split {split!r}: expected {', '.join(STDLIB_SPLITS)}")
    if dataset == "stdlib-doc":
        return stdlib.instructions(STDLIB_SPLITS[split])
    if dataset in ("alpaca", "dolly"):
        return deal([example(row) for row in hub.load(dataset, "train")], split)
    if dataset in DATASETS:
        raise UserError(f"{dataset} has no prompts and responses; use {', '.join(INSTRUCTIONS)}")
    chosen, own = files.select(_local(dataset), split)
    examples = [
        columns.pair_of(row, _pairs_of(names, row, path), tokenizer, where)
        for path in chosen
        for row, names, where in read(path)
    ]
    return examples if own else deal(examples, split)


def _pairs_of(names: columns.Columns, row: dict, path: Path) -> columns.Columns:
    """The columns of a prompt and its response, in a file that may have a text column too."""
    pair = columns.pair_columns([row]) if names.kind == "text" else names
    if pair is None:
        raise UserError(
            f"{path}: columns {', '.join(map(str, row))}; expected messages, or prompt and "
            "response, or instruction (input) and output"
        )
    return pair


def questions(dataset: str) -> list[dict]:
    """`[{"question": str, "choices": [str, ...], "answer": int}, ...]` for multiple choice.

    `stdlib-quiz`, or a local table with these columns; `answer` is an index from 0 or a letter
    from A. Raises UserError naming the file and row that are not so.
    """
    if dataset == "stdlib-quiz":
        return list(stdlib.questions())
    if dataset in DATASETS:
        raise UserError(f"{dataset} has no questions; use stdlib-quiz or a local JSONL file")
    chosen, _ = files.select(_local(dataset), "test")
    return [
        _question(row, f"{path}, row {number}")
        for path in chosen
        for number, row in enumerate(files.rows(path), 1)
    ]


def _question(row: dict, where: str) -> dict:
    text, choices, answer = (row.get(key) for key in ("question", "choices", "answer"))
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        answer = ord(answer.upper()) - ord("A")
    texts = [text, *choices] if isinstance(choices, list) else [None]
    if not all(isinstance(value, str) for value in texts):
        raise UserError(f"{where}: expected question (text), choices (list of texts) and answer")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer {row.get('answer')!r} is no index or letter of its "
            f"{len(choices)} choices"
        )
    return {"question": text, "choices": choices, "answer": answer}


def check_token(largest: int, config) -> None:
    """Refuse a token that the model has no embedding of.

    Raises:
        UserError: ``largest`` is beyond the vocabulary.
    """
    size = config.get_text_config().vocab_size
    if largest >= size:
        raise UserError(
            f"the tokenizer gives token {largest}, the model knows {size}; tokenizer and model do "
            "not belong together."
        )
