"""Locks: one run at a time writes what one ``--out`` names.

A run *holds* its ``--out`` from its first byte to its last rename: a file ``OUT.partial.lock`` is
locked by the process, so that the kernel gives it back after a kill, and a second run on the same
name ends in one line.
"""

import contextlib
import errno
import functools
import os
import sys
from pathlib import Path

from harness.errors import UserError
from harness.paths import cannot_make

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
