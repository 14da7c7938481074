"""The embedded corpora: fixed splits, no leak between them, a fair quiz."""

import ast
import re
from collections import Counter

import pytest

from harness.data import corpora, stdlib


def test_split_of_a_name_never_moves():
    assert [stdlib.split_of(name) for name in ("argparse", "base64", "fractions", "bisect")] == [
        "train", "test", "calibration", "test"]  # fmt: skip
    shares = Counter(stdlib.split_of(f"module{i}") for i in range(4000))
    assert 0.88 < shares["train"] / 4000 < 0.92
    assert 0.04 < shares["test"] / 4000 < 0.06


def test_documents_of_a_folder(tmp_path):
    sources = {
        "alpha/__init__.py": b"x = 1\r\n",
        "alpha/beta.py": "# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"),
        "alpha/tests/gone.py": b"x = 1\n",
        "site-packages/gone.py": b"x = 1\n",
        "encodings/cp1.py": b"x = 1\n",
        "_sysconfigdata_x.py": b"prefix = 1\n",
        "config-3/gone.py": b"x = 1\n",
        "broken.py": b"\xff\xff\n",
        "empty.py": b"\n",
    }
    for name, raw in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    found = {}
    for split in stdlib.SPLITS:
        found |= stdlib.documents(split, tmp_path)
    assert found == {
        "alpha": "x = 1\n",
        "alpha.beta": "# -*- coding: latin-1 -*-\nname = 'é'\n",
    }


def test_splits_share_no_module_and_are_large_enough():
    names = [set(stdlib.documents(split)) for split in stdlib.SPLITS]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]
    sizes = [len(stdlib.text(split)) for split in stdlib.SPLITS]
    assert sizes[0] > 5_000_000
    assert min(sizes[1:]) > 200_000
    assert list(stdlib.documents("test")) == sorted(stdlib.documents("test"))


def test_instructions_hide_the_docstring():
    pairs = corpora.instructions("stdlib-doc", "test")
    assert len(pairs) > 100
    for pair in pairs:
        source = pair["prompt"].removesuffix(stdlib.SUMMARY)
        function = ast.parse(source).body[0]
        assert ast.get_docstring(function) is None
        assert pair["response"] and "\n" not in pair["response"]


def test_quiz_is_balanced_held_out_and_fair():
    asked = corpora.questions("stdlib-quiz")
    assert len(asked) >= 400
    places = Counter(question["answer"] for question in asked)
    assert max(places.values()) - min(places.values()) <= 1 and len(places) == 4
    train = tuple(f"{seen.head}\n{seen.docstring}" for seen in stdlib.functions("train"))
    assert not any(question["question"].endswith(train) for question in asked)
    held_out = "".join(stdlib.text(split) for split in ("test", "calibration"))
    for question in asked:
        choices = question["choices"]
        assert len(set(choices)) == 4
        assert question["question"] in held_out
        assert len({re.match(r"\s*", choice).group() for choice in choices}) == 1
    longest = [max(range(4), key=lambda i: len(q["choices"][i])) == q["answer"] for q in asked]
    shortest = [min(range(4), key=lambda i: len(q["choices"][i])) == q["answer"] for q in asked]
    assert sum(longest) < 0.3 * len(asked) and sum(shortest) < 0.3 * len(asked)


@pytest.mark.parametrize("name", ["stdlib", "stdlib-doc"])
def test_embedded_corpora_fill_windows(name):
    class Bytes:
        def __call__(self, text, verbose=True):
            return {"input_ids": list(text.encode())}

    once = corpora.calibration(Bytes(), name, nsamples=4, seqlen=64, seed=0)
    assert once.equal(corpora.calibration(Bytes(), name, nsamples=4, seqlen=64, seed=0))
    assert corpora.evaluation(Bytes(), name, seqlen=64, limit=5).shape == (5, 64)
