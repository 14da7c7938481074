"""Write a checkpoint block by block: whole or not at all, and resumable after any kill.

While a run is under way ``OUT.partial/`` holds finished shards under their final names, and
``OUT.partial.json`` says what run they belong to and holds their log. At the end the folder is
renamed to ``OUT``. One shard holds what lies outside the blocks, then comes one shard per block.
Tensors that are no part of the model wait in ``OUT.side.partial/``, a file per block, and end as
one file of the result.
"""

import json
import os
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harness import (
    __version__,
    bitmask,
    distributed,
    files,
    formats,
    hashes,
    publish,
    recipe,
    side_files,
    weight_files,
)
from harness.errors import UserError

VERSIONS = ("torch", "transformers", "compressed-tensors")


def fingerprint(folder: Path, windows: torch.Tensor | None, settings: dict) -> dict:
    """What a resumed run must have in common with the interrupted one: model files, calibration
    tokens by hash, settings and library versions."""
    data = "none" if windows is None else hashes.tokens_hash(windows)
    return {
        "settings": settings,
        "model": hashes.model_files(folder),
        "calibration": data,
        "versions": {name: version(name) for name in VERSIONS} | {"harness": __version__},
    }


class Writer:
    """Shards of one output checkpoint.

    Args:
        out: the folder to make. An existing one is an error without ``overwrite``.
        blocks: how many decoder blocks there will be.
        run: :func:`fingerprint` of this one.
        resume: go on from shards of a killed run with the same fingerprint.
        lead: False on ranks that only read what rank 0 writes.
    """

    def __init__(
        self,
        out: Path,
        blocks: int,
        run: dict,
        *,
        overwrite: bool = False,
        resume: bool = True,
        lead: bool = True,
    ):
        self.out = Path(out)
        self.blocks = blocks
        self.overwrite = overwrite
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.identity_file = self.out.with_name(self.out.name + ".partial.json")
        self.side_folder = self.out.with_name(self.out.name + ".side.partial")
        self.lead = lead
        if not lead:
            return
        begin(self.out, overwrite)
        self.state = json.loads(json.dumps(run)) | {"log": [], "shards": []}
        if not resume:
            self._forget()
        if self.identity_file.is_file() and any(self.partial.glob("model-*.safetensors")):
            before = read_state(self.identity_file)
            begun = {part: v for part, v in before.items() if part not in ("log", "shards")}
            refuse_other_run(self.partial, begun, run)
            self.state = self._checked(before)
        else:
            self._forget()
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._write_state()
        self.partial.mkdir(parents=True, exist_ok=True)
        # Half-written files, under our names or the safetensors library's, and what finish() makes.
        shards = {self.shard(1 + index) for index in range(self.finished)}
        for leftover in set(self.partial.iterdir()) - shards:
            remove(leftover)

    def _checked(self, state: dict) -> dict:
        """``state`` up to the first block that is not on the disk as it was written."""
        good, log, marks = 0, state.get("log"), state.get("shards")
        if not (isinstance(log, list) and isinstance(marks, list)):
            return state | {"log": [], "shards": []}
        for _, marked in zip(log[: self.blocks], marks, strict=False):
            paths = (self.shard(1 + good), self._side_part(good))
            if marked != [mark(path) for path in paths]:
                distributed.say(f"{paths[0]} is not whole; it is made again")
                break
            good += 1
        return state | {"log": log[:good], "shards": marks[:good]}

    def _forget(self) -> None:
        self.identity_file.unlink(missing_ok=True)
        for folder in (self.partial, self.side_folder):
            if folder.is_dir():
                shutil.rmtree(folder)

    @contextmanager
    def begun(self):
        """Around the blocks: an error before the first is finished leaves nothing behind."""
        try:
            yield
        except BaseException:
            if self.lead and not self.finished:
                self._forget()
                publish.release(self.out)
            raise

    def _write_state(self) -> None:
        publish.write_text(self.identity_file, json.dumps(self.state, indent=1))

    def shard(self, index: int) -> Path:
        """File of shard ``index``: 0 is what lies outside the blocks, 1 + i is block i."""
        return self.partial / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    @property
    def finished(self) -> int:
        """How many blocks, counted from the first, are on disk; 0 where rank 0 knows."""
        return len(self.state["shards"]) if self.lead else 0

    def write_block(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        rows: list[dict],
        side: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Store block ``index``; ``rows`` are its lines of the log (deterministic values only),
        ``side`` what :meth:`finish` collects from all blocks."""
        # Not in the shard's metadata: the library writes two keys in an order of its own choice,
        # and results would differ from run to run.
        shard, part = self.shard(1 + index), self._side_part(index)
        part.unlink(missing_ok=True)
        if side:
            self.side_folder.mkdir(exist_ok=True)
            save_tensors(part, side)
        save_tensors(shard, tensors)
        # Last, because this is what makes a block count as finished.
        self.state["log"][index:] = [rows]
        self.state["shards"][index:] = [[mark(shard), mark(part)]]
        self._write_state()

    def _side_part(self, index: int) -> Path:
        return self.side_folder / f"{index + 1:05d}.safetensors"

    def read_block(self, index: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """Physical tensors and log rows of a finished block."""
        with safe_open(self.shard(1 + index), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, read_state(self.identity_file)["log"][index]

    def finish(
        self,
        outer: dict[str, torch.Tensor],
        config: dict,
        texts: dict[str, str],
        side: tuple[str, dict[str, str]] | None = None,
    ) -> Path:
        """Write the rest and rename the folder to its final name.

        Args:
            outer: tensors outside the blocks.
            config: the whole of config.json.
            texts: further files by name (model card, recipe, log).
            side: name and metadata of the file that takes the blocks' side tensors.
        """
        save_tensors(self.shard(0), outer)
        weight_map, total = {}, 0
        for index in range(self.blocks + 1):
            path = self.shard(index)
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
            total += tensor_bytes(path)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        publish.write_text(
            self.partial / "model.safetensors.index.json", json.dumps(index, indent=1)
        )
        publish.write_text(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
        for name, text in texts.items():
            publish.write_text(self.partial / name, text)
        if side:
            name, note = side
            parts = (self._side_part(index) for index in range(self.blocks))
            tensors = {n: t for part in parts if part.is_file() for n, t in load_file(part).items()}
            save_tensors(self.partial / name, tensors, note)
        replaced = put_in_place(self.partial, self.out, self.overwrite)
        self.identity_file.unlink(missing_ok=True)
        shutil.rmtree(self.side_folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        publish.release(self.out)
        return self.out


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
        return files.read_json(file)
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
    return publish.swap(made, out)


def claim(out: Path, source: Path, overwrite: bool, dry_run: bool = False) -> None:
    """:func:`begin`, before any work and on every rank, what makes the checkpoint ``out`` of
    ``source``; a dry run holds nothing.

    Raises:
        UserError: as there, ``out`` is the model or in its folder, or what the result takes over
            from ``source`` cannot be read.
    """
    publish.check_place(out)
    _check_apart(out, source)
    _side_files(source)
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
    publish.hold(out)
    try:
        check_out(out, overwrite)
    except BaseException:
        publish.release(out)
        raise


def check_out(out: Path, overwrite: bool) -> None:
    """Raise :class:`UserError` unless ``out`` may be made: not there, or ours to replace."""
    publish.check_place(out)
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


def copy_side_files(source: Path, target: Path) -> None:
    """Tokenizer, processors, templates, generation settings and licence, byte for byte."""
    for path in _side_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        publish.copy(path, copied)


def side_bytes(source: Path) -> int:
    """Of what :func:`copy_side_files` copies."""
    return sum(path.stat().st_size for path in _side_files(source))


def _side_files(source: Path) -> list[Path]:
    return [source / name for name in side_files.names(source)]


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """One safetensors file, written beside and renamed. ``metadata``: one entry, because the
    library writes two in an order of its own choice."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def make(beside: Path) -> None:
        save_file(ready, beside, metadata=metadata or {"format": "pt"})
        beside.chmod(file_mode())

    publish.write(path, make)


def file_mode() -> int:
    """What a new file gets by this process's umask; the safetensors library makes its own 0600, and
    a server under another user could not read the result."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def tensor_bytes(path: Path) -> int:
    """Bytes of tensor data in a safetensors file (its size less the header)."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def config_for(folder: Path, dtype: torch.dtype, quantization: dict | None, conv1d: bool) -> dict:
    """The source's config.json with dtype and quantization_config of the result."""
    config = files.read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization:
        config["quantization_config"] = quantization
    config.pop("harness_conv1d", None)
    if quantization and conv1d and quantization != bitmask.CONFIG:
        config["harness_conv1d"] = True
    return config


def decode_block(
    tensors: dict[str, torch.Tensor],
    layout: str,
    quantization: dict | None,
    stored: torch.dtype,
    conv1d: bool,
) -> dict[str, torch.Tensor]:
    """Logical tensors of a block of a checkpoint in ``stored``: packed linears unpacked, in it."""
    packed, plain = formats.split_names(tensors, layout)
    logical = {name: tensors[name] for name in plain}
    for name in packed:
        logical[f"{name}.weight"] = formats.matrix(
            tensors, name, layout, quantization, stored, stored, conv1d
        )
    return logical
