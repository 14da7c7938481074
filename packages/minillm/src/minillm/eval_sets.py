"""The sets that distilled models are compared on: prompts, each with one or several references.

self-inst, vicuna, s-ni and unni are the files that MiniLLM's authors (arXiv 2306.08543) put on the
hub; of the last two the part with references of 11 words and more, as published.
"""

import sys
from pathlib import Path

from harness.data import columns, corpora, files, instructions
from harness.errors import UserError, nearest, one_line

HUB = {
    "self-inst": ("MiniLLM/self-inst", "valid.jsonl"),
    "vicuna": ("MiniLLM/Vicuna", "valid.jsonl"),
    "s-ni": ("MiniLLM/sinst", "11_/valid.jsonl"),
    "unni": ("MiniLLM/uinst", "11_/valid.jsonl"),
}
NAMES = (*corpora.INSTRUCTIONS, *HUB)
EXPECTED = "expected prompt and response, or instruction (input) and output"


def load(name: str) -> list[tuple[str, list[str]]]:
    """(prompt, references) of every example of a set: the test part of dolly, alpaca, stdlib-doc or
    a local table or folder; the whole of a file whose name begins with test, val or dev, and of the
    published sets.

    Raises:
        UserError: no such set, or a row that lacks a column.
    """
    if name.lower() in HUB:
        path = _fetch(name.lower())
        examples = _examples(path)
        # How the original's files may write line ends.
        return [(prompt.replace("<n>", "\n"), some) for prompt, some in examples]
    if name in corpora.DATASETS:
        return [(pair["prompt"], [pair["response"]]) for pair in corpora.instructions(name, "test")]
    source = Path(name)
    if not source.exists():
        raise UserError(
            f"{name} is neither a file or folder nor one of {', '.join(NAMES)}."
            + nearest(name, NAMES)
        )
    chosen, own = files.select(source, "test")
    examples = [pair for path in chosen for pair in _examples(path)]
    if own or (source.is_file() and files.split_of(source, source.parent)):
        return examples
    print(
        f"note: {name}: its test part, a twentieth; a file named test* is taken whole",
        file=sys.stderr,
    )
    return instructions.deal(examples, "test")


def _examples(path: Path) -> list[tuple[str, list[str]]]:
    """(prompt, references) of a file's rows, from columns that are chosen once."""
    rows, examples = files.rows(path), []
    names = columns.pair_columns(rows[: columns.HEAD])
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        references = row.get(names.names[1]) if names else row.get("output")
        if isinstance(references, list) and not (
            references and all(isinstance(text, str) for text in references)
        ):
            raise UserError(f"{where}: output is a list, of no text; {EXPECTED}.")
        try:
            pair = columns.pair_of(row, names, None, where) if names else None
        except UserError:
            pair = None
        if pair is None:
            raise UserError(f"{where}: {', '.join(map(str, row)) or 'nothing'}; {EXPECTED}.")
        examples.append(
            (pair["prompt"], references if isinstance(references, list) else [pair["response"]])
        )
    return examples


def _fetch(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, file = HUB[name]
    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name}: the hub's {repository} could not be had ({one_line(error)}); give "
            "a local file, or the embedded stdlib-doc."
        ) from error
