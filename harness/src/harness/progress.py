"""A progress bar on a terminal, a rare line off one; always on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 30.0


def time_left(seconds: float, done: int, total: int) -> str:
    """ "about 4 min left", when ``done`` of ``total`` took so many seconds."""
    left = seconds * (total - done) / max(done, 1)
    if left < 100:
        return f"about {left:.0f} s left"
    return f"about {left / 60:.0f} min left" if left < 6000 else f"about {left / 3600:.1f} h left"


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yield `items`, showing how many of `total` (default `len(items)`) are done.

    On a terminal a tqdm bar; elsewhere one line every 30 seconds and one at the end, because a
    log file is no place for a bar.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=label, total=total, leave=False)
        return
    start = last = time.perf_counter()
    done = 0
    of = f"/{total}" if total else ""
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - last > SECONDS_BETWEEN_LINES and done != total:
            last = now
            left = f", {time_left(now - start, done, total)}" if total else ""
            print(f"{label}: {done}{of}, {now - start:.0f} s{left}", file=sys.stderr)
    print(f"{label}: {done}{of}, {time.perf_counter() - start:.1f} s", file=sys.stderr)
