"""Files and folders: checked before they are read or made, on the disk before they have a name.

Files are written beside their place, synced, renamed, and the folder synced:
after a loss of power a name stands for all of its bytes.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError, one_line

if TYPE_CHECKING:
    import torch


def write(path: Path, make: Callable[[Path], object]) -> None:
    """Call ``make`` with a path beside ``path``, sync what it wrote, and rename it; a failure
    leaves what was there.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    try:
        make(beside)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def write_text(path: Path, text: str) -> None:
    """:func:`write` of a UTF-8 text."""
    write(path, lambda beside: beside.write_text(text, "utf-8", "backslashreplace"))


def copy(source: Path, target: Path) -> None:
    """A regular file byte for byte, synced."""
    try:
        shutil.copyfile(source, target)
        sync(target)
    except OSError as error:
        raise disk_error(target, error) from error


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def disk_error(path: Path, error: Exception) -> Exception:
    """``error``, or the line that says that the disk is full, where that is what it means."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error) or "os error 28" in str(error):
        free = shutil.disk_usage(path.parent).free / 1e6
        return UserError(
            f"the disk is full at {path.parent} ({free:.0f} MB free); free some space and repeat "
            "the command, what is finished is kept."
        )
    return error


def check_place(path: Path, flag: str = "--out") -> None:
    """Raise :class:`UserError` where ``path``, of this flag, cannot be made."""
    if path.name in ("", "..") or os.path.abspath(path) == os.getcwd():
        raise UserError(f"{flag} {path}: expected the name of something new, in some folder.")
    if len(os.fsencode(path.name)) > 200:
        raise UserError(
            f"{flag} {path.name[:40]}...: its name has {len(os.fsencode(path.name))} bytes; "
            "expected 200 at most, because files are made beside it under longer names."
        )
    try:
        os.fsencode(path).decode()
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                raise UserError(f"{flag} {part} is a link to nothing; remove it or choose another.")
        there = next(folder for folder in path.absolute().parents if folder.exists())
        is_folder, can_write = there.is_dir(), os.access(there, os.W_OK | os.X_OK)
        kind = path.stat().st_mode if path.exists() else stat.S_IFREG
    except (OSError, RuntimeError, ValueError) as error:
        raise cannot_make(path, error, flag) from error
    if not is_folder:
        raise UserError(f"{path}: {there} is a file, no folder; choose another {flag}.")
    if not can_write:
        raise UserError(f"{path}: {there} is not writable; choose another {flag}.")
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise UserError(f"{path} is no regular file or folder; choose another {flag}.")


def cannot_make(path: Path, error: Exception, flag: str) -> UserError:
    """The line about a place that cannot be used."""
    reason = getattr(error, "strerror", None) or type(error).__name__
    name = str(path).encode(errors="replace").decode()
    return UserError(f"{flag} {name[:120]}: cannot be made ({reason}); choose another.")


def regular(folder: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint ``folder``: a regular file in it. Links may lead elsewhere
    within the folder, and from a snapshot of the hub's cache to that cache's blobs.

    Raises:
        UserError: it is not there, lies outside, or is no regular file (a pipe would never end).
    """
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder} names the file {name!r:.80}; expected one within the folder.")
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is not there or cannot be followed: {one_line(error)}") from error
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        raise UserError(f"{path} is a link to {real}, outside of its folder; copy the file there.")
    if not real.is_file():
        raise UserError(f"{path} is no regular file; expected one.")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, broken, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; it is damaged, get another copy.")
    return value


def save_tensors(
    path: Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """One safetensors file, written beside and renamed. ``metadata``: one entry, because the
    library writes two in an order of its own choice."""
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def make(beside: Path) -> None:
        save_file(ready, beside, metadata=metadata or {"format": "pt"})
        beside.chmod(file_mode())

    write(path, make)


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
