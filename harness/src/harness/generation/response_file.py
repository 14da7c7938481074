"""A file of responses: written by any number of ranks, and whole after a kill.

While the run (runs.RunFolder) is under way its folder holds what each rank has, a line a response.
At the end they are written in the order of the prompts, beside and renamed.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from harness import distributed, paths
from harness.checkpoint import runs
from harness.errors import UserError
from harness.generation import responses


class Said(NamedTuple):
    """A response: its text, its tokens without the end token, and whether it came to an end before
    the limit did."""

    text: str
    tokens: int
    ended: bool


def identity(source: Path, settings: dict, texts: list[str]) -> dict:
    """What a resumed run must have in common with the interrupted one: the model at ``source``,
    ``settings`` and the prompts, beside versions."""
    asked = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()[:16]
    return runs.fingerprint(source, None, settings) | {"prompts": asked}


def write(
    out: Path,
    start: Callable[[], responses.Ask],
    tokenizer,
    prompts: list[list[int]],
    groups: list[list[int]],
    limit: int,
    row: Callable[[int, Said], dict],
    *,
    run: dict,
    seed: int,
    resume: bool,
    overwrite: bool = False,
) -> list[Said]:
    """Ask for a response to every prompt and write them to ``out``, on every rank.

    Args:
        start: makes the engine; not called where nothing is left to ask.
        prompts: token ids. groups: their indices, in batches.
        limit: tokens of a response, at most.
        row: what stands in the file for a prompt's index and its response.
        run: :func:`identity`; an interrupted run goes on only as the same.

    Returns:
        All responses, in the order of the prompts.

    Raises:
        Finished: ``out`` is the result of this run.
        UserError: ``out`` was begun by another run, or the GPU's memory does not suffice.
    """
    folder = runs.RunFolder(out, kind=None)
    done = distributed.lead(lambda: _open(folder, run, overwrite, resume))
    if done:
        distributed.say(f"resuming: {len(done)} responses are there")
    rest = [group for group in groups if not done.issuperset(group)]
    if rest:
        mine = folder.partial / f"rank-{distributed.rank()}.jsonl"
        with folder.nothing_left(), mine.open("w") as lines:
            ask = start()
            try:
                for group, said in responses.respond(ask, prompts, seed, rest, "responses"):
                    asked = [prompts[index] for index in group]
                    read = continuations(tokenizer, asked, said)
                    for index, text, ids in zip(group, read, said, strict=True):
                        lines.write(json.dumps([index, text, len(ids), len(ids) < limit]) + "\n")
                    lines.flush()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of GPU memory with {max(map(len, groups))} prompts at a time; the same "
                    "command with a smaller --batch-size goes on from here."
                ) from error
        distributed.sum_number(0.0)  # every rank has written
    return distributed.lead(lambda: _finish(folder, len(prompts), row))


def continuations(tokenizer, prompts: list[list[int]], said: list[list[int]]) -> list[str]:
    """The text that each of ``said`` adds to its prompt's. A tokenizer that marks where words begin
    would drop the first space from a response that is read alone."""
    both = [prompt + ids for prompt, ids in zip(prompts, said, strict=True)]
    heads, wholes, alone = (
        tokenizer.batch_decode(some, skip_special_tokens=True) for some in (prompts, both, said)
    )
    rows = zip(heads, wholes, alone, strict=True)
    return [whole[len(h) :] if whole.startswith(h) else other for h, whole, other in rows]


def _rows(partial: Path) -> dict[int, Said]:
    """Index -> response of all that are there; a line that was cut off is not one."""
    found = {}
    for path in partial.glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            try:
                index, text, tokens, ended = json.loads(line)
            except (ValueError, TypeError):
                continue
            kinds = (int, str, int, bool)
            if all(map(isinstance, (index, text, tokens, ended), kinds)) and index >= 0:
                found[index] = Said(text, tokens, ended)
    return found


def _open(folder: runs.RunFolder, run: dict, overwrite: bool, resume: bool) -> set[int]:
    """Begin or take up the run; which responses are there."""
    folder.open(run, "*.jsonl", overwrite=overwrite, resume=resume)
    rows = _rows(folder.partial)
    # One file of what all ranks had: the next run may have other ranks.
    kept = folder.partial / "kept.jsonl"
    paths.write_text(kept, "".join(json.dumps([i, *said]) + "\n" for i, said in rows.items()))
    for path in folder.partial.glob("rank-*.jsonl"):
        path.unlink()
    return set(rows)


def _finish(folder: runs.RunFolder, count: int, row) -> list[Said]:
    found = _rows(folder.partial)
    said = [found[index] for index in range(count)]
    folder.publish_text("".join(json.dumps(row(i, s)) + "\n" for i, s in enumerate(said)))
    return said
