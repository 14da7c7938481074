"""How results appear: held by one run at a time, on the disk before they have their names.

A run *holds* its ``--out`` from its first byte to its last rename: a file ``OUT.partial.lock`` is
locked by the process, so that the kernel gives it back after a kill, and a second run on the same
name ends in one line. Files are written beside their place, synced, renamed, and the folder synced:
after a loss of power a name stands for all of its bytes.
"""

import contextlib
import errno
import functools
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from harness.errors import UserError

LOCK = ".partial.lock"
_held: dict[Path, int] = {}


def hold(out: Path, flag: str = "--out") -> None:
    """Let no other process begin a run on ``out`` until :func:`release`, or this one's end. A
    process that holds it already may ask again.

    Raises:
        UserError: another run holds it, or no file can be made beside it.
    """
    import fcntl

    path = _lock_file(out)
    while path not in _held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise cannot_make(out, error, flag) from error
        try:
            # A record lock: unlike flock's, children that outlive this process do not keep it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"another run is writing {out}; wait for its end, or choose another {flag}."
                ) from error
            # A file system without locks.
            print(f"{path}: no locks here ({error.strerror}); start no second run", file=sys.stderr)
            return
        # The one who held it may have removed the file between our two steps.
        if _same_file(handle, path):
            _held[path] = handle
        else:
            os.close(handle)


def release(out: Path) -> None:
    """Give ``out`` back, where this process holds it."""
    path = _lock_file(out)
    handle = _held.pop(path, None)
    if handle is not None:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: whoever opened it sees that it is gone
        os.close(handle)


def releasing(function):
    """A decorator: an error of ``function`` gives back what this process holds. For what is called
    from Python; commands do so at their end."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BaseException:
            release_all()
            raise

    return wrapped


def release_all() -> None:
    """Give back all that this process holds: at the end of a command, however it ended."""
    for path in list(_held):
        release(path.with_name(path.name.removesuffix(LOCK)))


def _lock_file(out: Path) -> Path:
    place = os.path.realpath(os.path.dirname(os.path.abspath(out)))
    return Path(place) / (out.name + LOCK)


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    ours = os.fstat(handle)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


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


def swap(made: Path, out: Path) -> Path:
    """Rename the finished folder ``made`` to ``out``, with all that is in it synced: a kill leaves
    the old or the new one whole. Returns where the old one, if any, waits to be deleted."""
    for path in [*made.rglob("*"), made]:
        sync(path)
    replaced = out.with_name(out.name + ".partial.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(out, replaced)
    os.replace(made, out)
    sync(out.parent)
    return replaced


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
