"""Instruction sets and texts as training examples: read, and tokenized once.

An example is (ids, first): token ids, and the first position that is predicted; those before it
(the prompt) are read only. Tokens are kept in Arrow files under the cache folder of `datasets`,
named by a hash of what went in, and mapped into memory: no rank holds the set.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, takewhile
from pathlib import Path

import torch

from harness import distributed
from harness.data import columns, corpora, files, instructions
from harness.errors import UserError

EXPECTED = "expected prompt and response, or instruction (input) and output"
# Where a file of generated responses has them; `output`, the human's, is never taken from there.
GENERATED = ("response", "generated", "gen_answer")
AT_A_TIME = 1000
HELD_OUT = 500  # windows of a text at most, and a twentieth of it
CHARACTERS = 8  # of a token, at most, on average


@dataclass
class Counts:
    """What became of the rows of a set."""

    examples: int = 0
    tokens: int = 0
    empty: int = 0
    long_prompts: int = 0
    cut: int = 0
    largest: int = 0


def is_text(dataset: str) -> bool:
    """Whether ``dataset`` is for :func:`windows`, not for :func:`pairs`."""
    if dataset in corpora.DATASETS or not Path(dataset).exists():
        return dataset in corpora.DATASETS and dataset not in corpora.INSTRUCTIONS
    chosen, _ = files.select(Path(dataset), "train")
    head = next((list(islice(files.stream(path), columns.HEAD)) for path in chosen), [])
    named = any(isinstance(row.get(n), str) for row in head for n in files.TEXT_COLUMNS)
    return named and columns.choose(head, dataset).kind == "text" and not columns.pair_columns(head)


def sample(found: list, limit: int | None) -> list:
    """``limit`` of ``found``, always the same, in their order."""
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(0).sample(range(len(found)), limit))]


def pairs(
    dataset: str, split: str, generated: bool = False, *, alone: bool = False, tokenizer=None
) -> list[dict[str, str]]:
    """`[{"prompt", "response"}, ...]` of split "train" or "validation".

    dolly, alpaca, stdlib-doc, or a local table or folder: columns prompt and response, or the
    original's instruction, input and output (a list of outputs gives the first; its prompt column,
    where there is one, is taken as it stands).

    Args:
        generated: only what a model wrote counts as a response (sequence-level distillation).
        alone: nothing else is taken from there: a file, or a folder whose names tell no split, is
            not dealt into parts.
        tokenizer: renders chats (column messages), of which the last turn is the response.

    Raises:
        UserError: no such set, or a row that lacks a column, by its line.
    """
    if dataset in corpora.DATASETS or not Path(dataset).exists():
        if generated:
            raise UserError(
                f"--type seqkd trains on what a teacher generated, and {dataset} was written by "
                f"people; python -m minillm.generate TEACHER --data {dataset} makes such a file."
            )
        return corpora.instructions(dataset, split, tokenizer)
    chosen, own = files.select(Path(dataset), split)
    rows = [pair for path in chosen for pair in _pairs(path, generated, tokenizer)]
    return rows if own or alone else instructions.deal(rows, split)


def _pairs(path: Path, generated: bool, tokenizer) -> Iterator[dict[str, str]]:
    """Of one file, from columns that are chosen once."""
    rows = files.rows(path)
    head = rows[: columns.HEAD]
    chat = next((n for n in columns.CHATS if any(isinstance(r.get(n), list) for r in head)), None)
    names = columns.Columns("chat", (chat,)) if chat else columns.pair_columns(head)
    answer = next((k for k in GENERATED if any(isinstance(r.get(k), str) for r in head)), None)
    expected = EXPECTED
    if generated:
        names = answer and columns.Columns("pair", ("prompt", answer, None))
        expected = "expected prompt and response, as python -m minillm.generate writes them"
    for number, row in enumerate(rows, 1):
        place = corpora.Place(path, number)
        if names and names.kind == "chat":
            yield columns.pair_of(row, names, tokenizer, place)
            continue
        try:
            yield columns.pair_of(row, names, tokenizer, "")
        except (UserError, AttributeError) as error:
            raise UserError(f"{place}: {files.columns(row)}; {expected}.") from error


def read(
    tokenizer,
    dataset: str,
    part: str,
    *,
    length: int,
    limit: int | None = None,
    alone: bool = False,
    train_on_inputs: bool = False,
) -> "Examples":
    """Part "train" or "validation" of a text (:func:`windows`) or of instructions (:func:`pairs`,
    :func:`examples`), ``length`` tokens an example at most and ``limit`` examples.

    Args:
        alone: the data serves for this part alone. train_on_inputs: prompts are predicted too.

    Raises:
        UserError: no such data, a row without prompt and response (with its line), nothing left.
    """
    if is_text(dataset):
        return windows(tokenizer, dataset, length=length, limit=limit, part=part, alone=alone)
    rows = sample(pairs(dataset, part, alone=alone, tokenizer=tokenizer), limit)
    if not rows and not alone:
        raise UserError(f"{dataset} is too small for a part that is held out; use more data.")
    return examples(
        tokenizer, rows, max_length=length, max_prompt_length=length - 1,
        name=f"{dataset}, {part}", whole=train_on_inputs,
    )  # fmt: skip


def encode(tokenizer, prompts: list[str], responses: list[str]) -> Iterator[tuple[list, list]]:
    """(prompt ids, response ids with the end token) of each pair, together the tokens of prompt and
    response as one text, which is what a model will read.

    The response begins at the first token that is not the prompt's own: where a token spans the
    border it is predicted, since it carries the first characters of the response.

    Raises:
        UserError: the tokenizer has no end token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token; responses would never end.")
    joined = [p + r for p, r in zip(prompts, responses, strict=True)]
    for prompt, ids in zip(prompt_ids(tokenizer, prompts), _ids(tokenizer, joined), strict=True):
        both = ids if ids[-1:] == [end] else [*ids, end]
        same = (a == b for a, b in zip(prompt, both, strict=False))
        border = sum(takewhile(bool, same))
        yield both[:border], both[border:]


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"]


def prompt_ids(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Token ids of prompts as generation starts from them: no end token after them."""
    rows = _ids(tokenizer, prompts)
    # Some tokenizers end every text.
    return [ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids for ids in rows]


class Examples(Sequence):
    """Memory-mapped examples; [i] is (ids int64 [T], first). Lists of all: `lengths`, `firsts`, and
    `sources`, the rows they were made from."""

    def __init__(self, path: Path, counts: Counts):
        from datasets import Dataset

        self.rows = Dataset.from_file(str(path)).with_format("numpy")
        self.counts = counts
        self.key = path.stem
        columns = ("length", "first", "source")
        self.lengths, self.firsts, self.sources = (self.rows[c][:].tolist() for c in columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        return torch.tensor(row["ids"], dtype=torch.long), int(row["first"])


def examples(
    tokenizer,
    found: list[dict],
    *,
    max_length: int,
    max_prompt_length: int,
    name: str,
    whole: bool = False,
) -> Examples:
    """The examples of :func:`pairs`; what is left out or cut is counted, and said on stderr.

    Left out are empty responses, and prompts of more than ``max_prompt_length`` tokens (as in the
    original); what is longer than ``max_length`` with its response is cut there.

    Args:
        whole: the prompt is predicted too.

    Raises:
        UserError: nothing is left.
    """
    if max_prompt_length >= max_length:
        raise UserError(
            f"--max-prompt-length {max_prompt_length}: expected less than --max-length "
            f"{max_length}, which holds prompt and response."
        )

    def rows(counts: Counts):
        for start in range(0, len(found), AT_A_TIME):
            some = found[start : start + AT_A_TIME]
            full = [i for i, pair in enumerate(some) if pair["response"].strip()]
            counts.empty += len(some) - len(full)
            prompts, responses = ([some[i][key] for i in full] for key in ("prompt", "response"))
            encoded = encode(tokenizer, prompts, responses) if full else ()
            for i, (prompt, answer) in zip(full, encoded, strict=True):
                if len(prompt) > max_prompt_length:
                    counts.long_prompts += 1
                    continue
                counts.cut += len(prompt) + len(answer) > max_length
                first = 1 if whole else max(1, len(prompt))
                yield (prompt + answer)[:max_length], first, start + i

    what = [json.dumps(pair, sort_keys=True) for pair in found]
    # Files of before tokens could span the border hold others.
    key = ["one text", _tokenizer_text(tokenizer), max_length, max_prompt_length, whole, *what]
    result = _cached(rows, key)
    counts = result.counts
    if not len(result):
        raise UserError(
            f"{name}: of {len(found)} rows none is left: {counts.empty} have an empty response, "
            f"{counts.long_prompts} a prompt of more than {max_prompt_length} tokens."
        )
    left_out = [
        f"{count} {what}"
        for count, what in (
            (counts.empty, "left out, their response is empty"),
            (counts.long_prompts, f"left out, their prompt has more than {max_prompt_length}"),
            (counts.cut, f"cut at {max_length}"),
        )
        if count
    ]
    said = f"; {'; '.join(left_out)}" if left_out else ""
    distributed.say(f"{name}: {counts.examples} examples, {counts.tokens} tokens{said}")
    return result


def windows(
    tokenizer,
    dataset: str,
    *,
    length: int,
    limit: int | None = None,
    part: str | None = None,
    alone: bool = False,
) -> Examples:
    """A plain text, the train split, as windows of ``length`` tokens with every token predicted but
    the first.

    Args:
        limit: windows at most: the first, or with ``part`` some drawn from all over it.
        part: "train" or "validation": two disjoint parts. Validation is a twentieth of the windows,
            1 to HELD_OUT, drawn at random; of stdlib it is drawn from the calibration split, which
            the embedded models were not trained on. None: all.
        alone: nothing else is taken from there: a local text is not dealt into parts.

    Raises:
        UserError: no such text, or less than a window of it.
    """
    if alone and dataset not in corpora.DATASETS:
        text, part = corpora.corpus_text(dataset, part, tokenizer=tokenizer), "whole"
    else:
        text = _text(dataset, part, length, limit, tokenizer)

    def rows(counts: Counts):
        ids = tokenizer(text, verbose=False)["input_ids"]
        starts = list(range(0, len(ids) - length + 1, length))
        chosen = sample(_part(starts, part, dataset), limit) if part else starts[:limit]
        for number, start in enumerate(chosen):
            yield ids[start : start + length], 1, number

    cut = _cached(rows, [_tokenizer_text(tokenizer), length, limit, part, dataset, text])
    name = f"{dataset}, {part}" if part else dataset
    if not len(cut):
        count = len(tokenizer(text, verbose=False)["input_ids"])
        least = ", and two are the least" if part in ("train", "validation") else ""
        raise UserError(
            f"{name}: its {count} tokens fill {count // length} windows of {length}{least}; use "
            "more text, or shorter windows."
        )
    distributed.say(f"{name}: {len(cut)} windows of {length} tokens")
    return cut


def _text(dataset: str, part: str | None, length: int, limit: int | None, tokenizer) -> str:
    if dataset == "stdlib":
        from harness.data import stdlib

        return stdlib.text("calibration" if part == "validation" else "train")
    if dataset not in ("c4", "pileval"):
        return corpora.corpus_text(dataset, "train", tokenizer=tokenizer)
    documents = corpora.corpus_documents(dataset, "train")
    if part is None:
        return corpora.PARAGRAPHS.join(documents[: limit or None])
    if limit is not None:
        wanted = CHARACTERS * length * (limit + HELD_OUT)
        ends = accumulate(map(len, documents))
        count = next((n for n, end in enumerate(ends, 1) if end >= wanted), None)
        documents = documents[:count]
    return corpora.PARAGRAPHS.join(documents)


def _part(starts: list[int], part: str, dataset: str) -> list[int]:
    if part == "whole":
        return starts
    held = sample(
        starts, HELD_OUT if dataset == "stdlib" else max(1, min(HELD_OUT, len(starts) // 20))
    )
    if part == "validation":
        return held
    if dataset == "stdlib":
        return starts
    return sorted({*starts} - {*held})


def _tokenizer_text(tokenizer) -> str:
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return inner.to_str() if inner else repr(sorted(tokenizer.get_vocab().items()))


def _cached(rows, key: Iterable) -> Examples:
    """Write what ``rows(counts)`` yields to the cache, unless it is there."""
    from datasets import Features, List, Value, config
    from datasets.arrow_writer import ArrowWriter

    columns = {name: Value("int32") for name in ("first", "length", "source")}
    columns["ids"] = List(Value("int32"))
    digest = hashlib.sha256()
    # What is in a file is part of its name: an older version of this code may have written others.
    for part in [*columns, *asdict(Counts()), *key]:
        digest.update(str(part).encode() + b"\0")
    folder = Path(config.HF_DATASETS_CACHE) / "llm-compression"
    path = folder / f"{digest.hexdigest()[:24]}.arrow"
    note = path.with_suffix(".json")

    def write():
        if path.is_file() and note.is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        counts = Counts()
        beside = path.with_suffix(f".{os.getpid()}.tmp")  # other runs may be making the same file
        with ArrowWriter(path=str(beside), features=Features(columns)) as writer:
            for ids, first, source in rows(counts):
                row = {"ids": ids, "first": first, "length": len(ids), "source": source}
                writer.write(row)
                counts.examples += 1
                counts.tokens += len(ids)
                counts.largest = max(counts.largest, *ids)
            writer.finalize()
        beside.replace(path)
        beside.write_text(json.dumps(asdict(counts)))
        beside.replace(note)

    distributed.lead(write)
    return Examples(path, Counts(**json.loads(note.read_text())))


def check_tokens(sets, config) -> None:
    """Refuse examples with tokens that the model has no embedding of."""
    corpora.check_token(max(s.counts.largest for s in sets), config)
