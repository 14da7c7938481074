"""Locks: one process at a time writes what one ``--out`` names.

A file beside it is locked, so that the kernel gives it back after a kill, and a second run on the
same name ends in one line. Which file that is, `checkpoint.runs` knows.
"""

import contextlib
import errno
import functools
import os
import sys
from pathlib import Path

from harness.errors import UserError
from harness.paths import cannot_make

_held: dict[Path, int] = {}


def hold(file: Path, out: Path, flag: str = "--out") -> None:
    """Lock ``file`` for ``out`` until :func:`release`, or the end of this process, which may ask
    again.

    Raises:
        UserError: another run holds it, or no file can be made beside it.
    """
    import fcntl

    path = _resolved(file)
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


def release(file: Path) -> None:
    """Give ``file`` back, where this process holds it."""
    path = _resolved(file)
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
        release(path)


def _resolved(file: Path) -> Path:
    return Path(os.path.realpath(os.path.dirname(os.path.abspath(file)))) / file.name


def _same_file(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    ours = os.fstat(handle)
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
