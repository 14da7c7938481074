"""`harness eval | compare | info`, and what every command line of the house shares.

Nothing heavy is imported at module level: arguments are parsed first, so `--help` is immediate.
"""

import argparse
import errno
import sys
import traceback
from collections.abc import Callable

from harness.errors import UserError

DONE, FAULT, MENDABLE, INTERRUPTED = 0, 1, 2, 130


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that mean the same in every command of the house (design section 6).

    `--out` is a path or None; `--device` and `--dtype` are strings, "auto" by default;
    `--resume` is a bool, True by default.
    """
    group = parser.add_argument_group("shared by all commands")
    group.add_argument("--out", metavar="PATH", help="where the result is written")
    group.add_argument(
        "--device",
        default="auto",
        help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the computation (default auto: the one the checkpoint is stored in)",
    )
    group.add_argument("--seed", type=int, default=0, help="of every random choice (default 0)")
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from an interrupted run of the same command (default), or start again",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing result")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve everything, print the plan and what it needs, write nothing, exit 0",
    )


def run(body: Callable[[], int | None]) -> int:
    """Call `body` and turn its outcome into the house's exit code; nothing is raised.

    0 done (or the int that `body` returned); 2 the user can mend it (one line on stderr: a
    `UserError`, or a full disk); 130 interrupted; 1 a fault of ours (traceback on stderr).
    """
    try:
        return body() or DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left: not worth a traceback, and stdout must not be flushed.
        sys.stdout = None
        return DONE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {error.filename}" if error.filename else ""
            print(
                f"error: the disk is full{where}; free some space or choose another --out, "
                "then run the same command again",
                file=sys.stderr,
            )
            return MENDABLE
        traceback.print_exc()
        return FAULT
    except Exception:
        traceback.print_exc()
        return FAULT


def main(argv: list[str] | None = None) -> int:
    """The `harness` command; returns the exit code."""
    raise NotImplementedError
