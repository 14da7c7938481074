"""Read recipe.yaml, the steps that led to a checkpoint. Other tools have files so named."""

import hashlib
from pathlib import Path

import yaml

from harness import paths

NAME = "recipe.yaml"
FOREIGN = "another tool's recipe"
LONGEST = 2**18  # bytes: a recipe of ours has a few thousand, and YAML is slow to read
MOST, DEEPEST = 20_000, 20  # values of a recipe, and lists and objects within one another


def steps(folder: Path) -> list[dict]:
    """The steps in ``folder``'s recipe.yaml, the first one first; [] where there is none.

    A file that is not of this house (another tool's, damaged, no UTF-8) is one step with its text:
    {"method": FOREIGN, "recipe": text}.

    Raises:
        UserError: it is no regular file, or lies elsewhere.
    """
    data = _read(folder)
    if not data or not data.strip():
        return []
    ours = _ours(data)
    return [{"method": FOREIGN, "recipe": _text(data)}] if ours is None else ours


def is_ours(folder: Path) -> bool:
    """Whether ``folder`` has a recipe.yaml that this house wrote."""
    data = _read(folder)
    return data is not None and _ours(data) is not None


def _read(folder: Path) -> bytes | None:
    path = folder / NAME
    if not path.is_symlink() and not path.exists():
        return None
    with paths.regular(folder, NAME).open("rb") as file:
        return file.read(LONGEST + 1)


def _ours(data: bytes) -> list[dict] | None:
    """The steps of a recipe of this house, or None."""
    if len(data) > LONGEST:
        return None
    try:
        recipe = yaml.safe_load(data.decode())
    except Exception:  # YAML's own errors, and ValueError, RecursionError, IndexError of its values
        return None
    if not isinstance(recipe, dict) or set(recipe) != {"steps"}:
        return None
    listed = recipe["steps"]
    if not isinstance(listed, list) or not _plain(listed):
        return None
    return listed if all(_is_step(step) for step in listed) else None


def _is_step(step) -> bool:
    return (
        isinstance(step, dict)
        and isinstance(step.get("method"), str)
        and isinstance(step.get("settings", {}), dict)
        and isinstance(step.get("command", ""), str)
    )


# One case per kind of value.
def _plain(value) -> bool:  # noqa: C901
    """Whether JSON and UTF-8 hold this, in a bounded number of values: aliases in YAML stand for
    the whole of what they name, and some for themselves."""
    waiting, count = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > MOST or depth > DEEPEST:
            return False
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
            if not all(isinstance(key, str) for key in value):
                return False
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, str):
            if value.encode(errors="ignore").decode() != value:
                return False
        elif isinstance(value, int):
            if abs(value) > 2**63:
                return False
        elif not isinstance(value, float | None):
            return False
    return True


def _text(data: bytes) -> str:
    if len(data) > LONGEST:
        mark = hashlib.sha256(data).hexdigest()[:16]
        return f"(more than {LONGEST} bytes, the first of them with sha256 {mark}; left out)"
    return data.decode(errors="backslashreplace")


def nominal_ratio(settings: dict) -> float | None:
    """The share of weights that a recipe step's settings ask to remove; None if it prunes nothing.

    n:m patterns count zeros first, as the flags --prunen and --prunem do.
    """
    if settings.get("prunem"):
        return settings["prunen"] / settings["prunem"]
    return settings.get("pruning_ratio", settings.get("sparsity"))
