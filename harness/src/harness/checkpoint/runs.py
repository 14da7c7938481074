"""What a resumable run leaves while it is under way: known by its identity, whole or not at all."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from harness import __version__, distributed, locks, paths
from harness.checkpoint import hashes, recipe, side_files, weight_files
from harness.errors import UserError

if TYPE_CHECKING:
    import torch


VERSIONS = ("torch", "transformers", "compressed-tensors")


def fingerprint(folder: Path, windows: "torch.Tensor | None", settings: dict) -> dict:
    """What a resumed run must have in common with the interrupted one: model files, calibration
    tokens by hash, settings and library versions."""
    data = "none" if windows is None else hashes.tokens_hash(windows)
    return {
        "settings": settings,
        "model": hashes.model_files(folder),
        "calibration": data,
        "versions": {name: version(name) for name in VERSIONS} | {"harness": __version__},
    }


def mark(path: Path) -> str | None:
    """What tells whether a finished file is still what it was; None where there is none."""
    return hashes.sample_hash(path) if path.is_file() else None


def remove(path: Path) -> None:
    """A file or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_state(file: Path) -> dict:
    """What a run that was interrupted noted in ``file``, OUT.partial.json.

    Raises:
        UserError: it is damaged.
    """
    try:
        return paths.read_json(file)
    except UserError as error:
        raise UserError(f"{error} Start afresh with --no-resume.") from error


def is_whole(shard: Path) -> bool:
    """Whether a file is there with all of its bytes: a loss of power can leave a name without."""
    try:
        return shard.is_file() and bool(weight_files.header(shard))
    except UserError:
        return False


def refuse_other_run(partial: Path, old: dict, new: dict) -> None:
    """Raise :class:`UserError` unless identity ``new`` is the one that began ``partial``, ``old``;
    the message names what differs."""
    new = json.loads(json.dumps(new))
    for part in {**new, **old}:
        before, values = old.get(part), new.get(part)
        if before == values:
            continue
        where = part
        if isinstance(values, dict) and isinstance(before, dict):
            key = next(k for k in {**before, **values} if before.get(k) != values.get(k))
            where = f"{part}, {key}: {before.get(key)} there, {values.get(key)} now"
        # With auto the same command chooses otherwise on a machine of another kind.
        again = f"add --dtype {before['dtype']}" if where.startswith("settings, dtype:") else ""
        raise UserError(
            f"{partial} was begun by another run ({where}); {again or 'repeat that command'}, "
            "choose another --out, or start afresh with --no-resume."
        )


def put_in_place(made: Path, out: Path, overwrite: bool) -> Path:
    """Rename the finished folder ``made`` to ``out``; returns where the result that it replaces, if
    any, waits to be deleted."""
    if out.exists():
        check_out(out, overwrite)
    return paths.swap(made, out)


def claim(out: Path, source: Path, overwrite: bool, dry_run: bool = False) -> None:
    """:func:`begin`, before any work and on every rank, what makes the checkpoint ``out`` of
    ``source``; a dry run holds nothing.

    Raises:
        UserError: as there, ``out`` is the model or in its folder, or what the result takes over
            from ``source`` cannot be read.
    """
    paths.check_place(out)
    _check_apart(out, source)
    side_files.paths_in(source)
    recipe.steps(source)
    if dry_run:
        check_out(out, overwrite=True)
    else:
        distributed.lead(lambda: begin(out, overwrite))


def _check_apart(out: Path, source: Path) -> None:
    """Refuse to replace the model that is read, or to write in its folder."""
    made, read = out.resolve(), source.resolve()
    if made == read:
        raise UserError(f"{out} is the model itself; choose another --out.")
    if read in made.parents:
        raise UserError(f"{out} is in the model's own folder; choose another --out.")
    if made in read.parents and made.exists():
        raise UserError(f"the model {source} is in {out}; choose another --out.")


def begin(out: Path, overwrite: bool) -> None:
    """Hold ``out`` for a run that may make it.

    Raises:
        UserError: another run holds it, or see :func:`check_out`.
    """
    locks.hold(out)
    try:
        check_out(out, overwrite)
    except BaseException:
        locks.release(out)
        raise


def check_out(out: Path, overwrite: bool) -> None:
    """Raise :class:`UserError` unless ``out`` may be made: not there, or ours to replace."""
    paths.check_place(out)
    if not out.exists():
        return
    if not overwrite:
        _sweep(out)
        raise UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")
    if out.is_symlink():
        raise UserError(f"{out} is a link to {out.resolve()}; name that as --out to replace it.")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out} is not a checkpoint folder; --overwrite will not delete it.")


def _sweep(out: Path) -> None:
    """Remove what a run leaves beside its finished result where it is killed before it has."""
    beside = [out.with_name(out.name + end) for end in (".side.partial", ".partial.replaced")]
    if not out.with_name(out.name + ".partial").exists():
        out.with_name(out.name + ".partial.json").unlink(missing_ok=True)
        for folder in beside:
            shutil.rmtree(folder, ignore_errors=True)
