"""A run and what it makes: by one process at a time, whole or not at all, resumed as the same run.

Beside ``OUT``, from a run's first byte to its last rename:

    OUT.partial/           what is finished of the result
    OUT.partial.json       which run it is, and how far it is
    OUT.side.partial/      what becomes one file of the result at the end
    OUT.partial.replaced/  the result that it replaces, until that is deleted
    OUT.partial.lock       locked by the process: the kernel gives it back after a kill

A finished result tells which run made it by the hash of that run's identity: a folder in its log, a
file of JSON lines, which has no place for it, in an extended attribute that names its content too.
"""

import contextlib
import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness import __version__, locks, paths
from harness.checkpoint import hashes, recipe, side_files
from harness.errors import Finished, UserError

if TYPE_CHECKING:
    import torch

LOG = "compression_log.json"
VERSIONS = ("torch", "transformers", "compressed-tensors")
ATTRIBUTE = "user.harness.run"


class Kind(NamedTuple):
    """A kind of result folder: the file by which it is known, and the JSON file that names its
    run."""

    title: str
    sign: str
    log: str


CHECKPOINT = Kind("a checkpoint folder", "config.json", LOG)


class RunFolder:
    """The files of one run. Names are known everywhere; rank 0 alone calls methods that write.

    Args:
        out: the result. kind: of folder, or None for a file of JSON lines.
    """

    def __init__(self, out: Path, kind: Kind | None = CHECKPOINT):
        self.out, self.kind = Path(out), kind
        ends = (".partial", ".partial.json", ".side.partial", ".partial.replaced", ".tmp",
                ".partial.lock")  # fmt: skip
        beside = [self.out.parent / (self.out.name + end) for end in ends]
        self.partial, self.file, self.side, self._replaced, self._half, self._lock = beside
        self.identity: dict | None = None
        self.progress: dict = {}
        self._overwrite, self._done = False, ""

    def hold(self) -> None:
        """Let no other process begin a run on ``out`` until :meth:`release`, or this one's end.

        Raises:
            UserError: another run holds it, or no file can be made beside it.
        """
        locks.hold(self._lock, self.out)

    def release(self) -> None:
        locks.release(self._lock)

    def claim(self, overwrite: bool, dry_run: bool = False) -> None:
        """Hold and :meth:`check` ``out``, before any work and on every rank; a dry run holds
        nothing, and minds no result that is there.

        Raises:
            UserError: another run holds it, or :meth:`check` refuses it.
        """
        from harness import distributed  # torch, which a command that joins texts does without

        if dry_run:
            self.check(overwrite=True)
        else:
            distributed.lead(lambda: self._hold_checked(overwrite))

    def _hold_checked(self, overwrite: bool) -> None:
        self.hold()
        try:
            self.check(overwrite)
        except BaseException:
            self.release()
            raise

    def check(self, overwrite: bool) -> None:
        """Raise :class:`UserError` unless ``out`` may be made: not there, ours to replace, or the
        result of a run, which :meth:`compare` will tell from this one."""
        out, kind = self.out, self.kind
        if kind is None and out.suffix != ".jsonl":
            raise UserError(f"--out {out}: expected a name in .jsonl, by which other commands "
                            "read it.")  # fmt: skip
        paths.check_place(out)
        if not out.exists():
            return
        if not overwrite:
            self.sweep()
            if self._maker() is None:
                raise _exists(out)
        elif kind is None and out.is_dir():
            raise UserError(f"{out} is a folder; expected the name of a file.")
        elif kind and out.is_symlink():
            there = out.resolve()
            raise UserError(f"{out} is a link to {there}; name that as --out to replace it.")
        elif kind and not (out / kind.sign).is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not {kind.title}; --overwrite will not delete it.")

    def compare(self, identity: dict, *, overwrite: bool = False, resume: bool = True) -> None:
        """Hold ``out`` for the run of this ``identity``, plain JSON.

        Raises:
            Finished: ``out`` is its result.
            UserError: as :meth:`claim`, or ``out`` is another run's result.
        """
        self.identity, self._overwrite = json.loads(json.dumps(identity)), overwrite
        self._hold_checked(overwrite)
        if self.out.exists() and not overwrite:
            same = resume and self._maker() == _digest(self.identity)
            self.release()
            raise Finished(f"{self.out} is finished already.") if same else _exists(self.out)

    def open(
        self, identity: dict, done: str, *, overwrite: bool = False, resume: bool = True
    ) -> bool:
        """:meth:`compare`, then take up what the same run has left, or begin.

        Args:
            done: pattern of the files in ``partial`` from which a run goes on.

        Returns:
            Whether there are such files; ``progress`` is then what was noted last.

        Raises:
            Finished, UserError: as there, or another run was begun here.
        """
        self.compare(identity, overwrite=overwrite, resume=resume)
        self._done = done
        if resume and self.file.is_file() and self._begun():
            record = read_state(self.file)
            progress = record.pop("progress", None)
            refuse_other_run(self.partial, record, self.identity)
            self.progress = progress if isinstance(progress, dict) else {}
            return True
        self.forget()
        self.partial.mkdir(parents=True)
        self.note()
        return False

    def _begun(self) -> bool:
        return any(path.stat().st_size for path in self.partial.glob(self._done))

    def note(self, **progress) -> None:
        """Keep ``progress``, plain JSON, for the run that goes on from here."""
        self.progress |= progress
        record = self.identity | ({"progress": self.progress} if self.progress else {})
        paths.write_text(self.file, json.dumps(record, indent=1))

    @property
    def made_by(self) -> dict[str, str]:
        """What a result's log has to say of its run."""
        return {"run": _digest(self.identity)} if self.identity is not None else {}

    def _maker(self) -> str | None:
        """The hash of the run that made ``out``; None where nothing tells."""
        with contextlib.suppress(OSError, AttributeError, ValueError, UserError):
            if self.kind is None:
                maker, content = os.getxattr(self.out, ATTRIBUTE).decode().split()
                return maker if content == hashes.file_hash(self.out) else None
            return paths.read_json(self.out / self.kind.log).get("run")
        return None

    @contextlib.contextmanager
    def nothing_left(self):
        """Around the work: an error before anything is finished leaves nothing behind."""
        try:
            yield
        except BaseException:
            if self.identity is not None and not self._begun():
                self.forget()
                self.release()
            raise

    def publish(self, folder: Path | None = None) -> None:
        """Rename the finished ``folder`` (default: ``partial``) to ``out``, with all that is in it
        synced: a kill leaves the old or the new one whole. The run is then over."""
        folder = folder or self.partial
        if self.out.exists() and not self._overwrite:
            raise _exists(self.out)
        self.check(self._overwrite)
        for path in [*folder.rglob("*"), folder]:
            paths.sync(path)
        if self.out.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self.out, self._replaced)
        os.replace(folder, self.out)
        paths.sync(self.out.parent)
        self.forget()
        self.release()

    def publish_text(self, text: str) -> None:
        """The same of a file's whole content."""

        def make(beside: Path) -> None:
            beside.write_text(text, "utf-8", "backslashreplace")
            # Not on every file system; the same command is then refused like any other.
            with contextlib.suppress(OSError, AttributeError):
                maker = f"{_digest(self.identity)} {hashes.file_hash(beside)}"
                os.setxattr(beside, ATTRIBUTE, maker.encode())

        paths.write(self.out, make)
        self.forget()
        self.release()

    def forget(self) -> None:
        """Remove all that a run leaves beside ``out``; a result that was to be replaced stays until
        one has taken its place."""
        # The file first: without it nothing in the folders counts.
        half = [self._half] if self.kind is None else []
        for path in (self.file, self.file.with_name(f"{self.file.name}.tmp"), *half):
            path.unlink(missing_ok=True)
        replaced = [self._replaced] if self.out.exists() else []
        for folder in (self.partial, self.side, *replaced):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a run that was killed after its last rename has left beside its result, and
        nothing from which another run could go on."""
        if self.partial.exists() and self.file.is_file():
            try:
                begun = read_state(self.file)
            except UserError:
                return
            begun.pop("progress", None)
            if _digest(begun) != self._maker():
                return
        self.forget()


def _exists(out: Path) -> UserError:
    return UserError(f"{out} exists; choose another --out, or replace it with --overwrite.")


def _digest(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_state(file: Path) -> dict:
    """What a run that was interrupted noted in ``file``.

    Raises:
        UserError: it is damaged.
    """
    try:
        return paths.read_json(file)
    except UserError as error:
        raise UserError(f"{error} Start afresh with --no-resume.") from error


def refuse_other_run(partial: Path, old: dict, new: dict) -> None:
    """Raise :class:`UserError` unless identity ``new`` is the one that began ``partial``, ``old``;
    the message names what differs."""
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


def claim(out: Path, source: Path, overwrite: bool, dry_run: bool = False) -> None:
    """:meth:`RunFolder.claim`, before any work and on every rank, of what makes the checkpoint
    ``out`` of ``source``; a dry run holds nothing.

    Raises:
        UserError: as there, ``out`` is the model or in its folder, or what the result takes over
            from ``source`` cannot be read.
    """
    paths.check_place(out)
    _check_apart(out, source)
    side_files.paths_in(source)
    recipe.steps(source)
    RunFolder(out).claim(overwrite, dry_run)


def _check_apart(out: Path, source: Path) -> None:
    """Refuse to replace the model that is read, or to write in its folder."""
    target, read = out.resolve(), source.resolve()
    if target == read:
        raise UserError(f"{out} is the model itself; choose another --out.")
    if read in target.parents:
        raise UserError(f"{out} is in the model's own folder; choose another --out.")
    if target in read.parents and target.exists():
        raise UserError(f"the model {source} is in {out}; choose another --out.")
