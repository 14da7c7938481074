"""Run passes and kill -9 them: ``python kill_driver.py SOURCE FOLDER TIMES SEED [RENAME ...]``.

FOLDER/straight and FOLDER/again are passes nobody disturbs; FOLDER/both is begun twice at once.
FOLDER/time0 ... are killed at TIMES random moments and run again; FOLDER/rename0 ... are killed as
they are about to do their so-manyth rename (every step of the files goes through one), where -1 is
just after the last. This is a process of its own with one thread, so that forking it after the
imports is safe; the killed children are real processes.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from harness.blocks import decoder, sequential
from harness.cli import run as exit_code
from harness.quant.grid import Grid, nearest
from harness.quant.hessian import Hessian
from harness.quant.scheme import Scheme

GRID = Grid(3, 16)
# Its own is shared with forked children: one that is killed while it holds it stops all others.
tqdm.set_lock(threading.RLock())


def drive(
    run: Callable[[Path], int],
    folder: Path,
    times: int = 0,
    seed: int = 0,
    renames: list[int] | None = None,
    suffix: str = "",
    forks_after_run: bool = True,
):
    """``run(out)`` makes a result and returns an exit code; without ``renames`` it is killed at
    every one, or at some where they are many. ``forks_after_run``: the first run is in this
    process, so that the children inherit all imports; not for runs that leave a process group."""
    torch.set_num_threads(1)
    straight = folder / f"straight{suffix}"
    code, count = counted(run, straight) if forks_after_run else (ended(child(run, straight)), 0)
    assert code == 0
    if renames is None:
        renames = [*range(count), -1] if count < 6 else [2, count - 1, -1]
    began = time.perf_counter()
    assert ended(child(run, folder / f"again{suffix}")) == 0
    whole = time.perf_counter() - began
    both = [child(run, folder / f"both{suffix}") for _ in range(2)]
    codes = sorted(ended(pid) for pid in both)
    # Where the first has ended before the second asks, both have their result.
    assert codes in ([0, 2], [0, 0]), codes
    draw = random.Random(seed)
    for number in range(times):
        out = folder / f"time{number}{suffix}"
        pid = child(run, out)
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        repeat(run, out, ended(pid))
    for number in renames:
        out = folder / f"rename{number}{suffix}"
        code = ended(child(run, out, number))
        assert code == -signal.SIGKILL, code
        repeat(run, out, code)


def repeat(run, out, first):
    """The same command: it ends well, also where the killed run had renamed its result already."""
    there = out.exists()
    code = ended(child(run, out))
    assert code == 0, code
    left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
    assert left == [out.name], left
    print(f"{out.name}: ended with {first}, result {'' if there else 'not '}there", file=sys.stderr)


def child(run, out, kill_before=None) -> int:
    """The pid of a forked pass; it kills itself before rename number ``kill_before``."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if kill_before is not None:
            die_at_rename(kill_before, out)
        code = run(out)
    finally:
        os._exit(code)


def counted(run, out) -> tuple[int, int]:
    """What ``run(out)`` returns, and how many renames ``out`` takes."""
    real, count = os.replace, 0

    def replace(old, new):
        nonlocal count
        count += str(new).startswith(str(out))
        real(old, new)

    os.replace = replace
    try:
        return run(out), count
    finally:
        os.replace = real


def die_at_rename(number, out):
    real, count = os.replace, 0

    def replace(old, new):
        nonlocal count
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        real(old, new)
        if number == -1 and Path(new) == out:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def ended(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def update(matrices, hessian, hand):
    size = hessian.mean().diagonal().sqrt()
    return {
        name: sequential.Update(
            nearest(m * (1 + size / 64), GRID, m.dtype), size.mean().item(), side={"size": m @ size}
        )
        for name, m in matrices.items()
    }


def main(source, folder, times, seed, *renames):
    import families

    decoder.TOKENS_PER_BATCH = 48
    method = sequential.Method(
        "packing", {}, [sequential.per_stage(update, Hessian)], layout="compressed-tensors",
        scheme=Scheme(GRID), side_file="sizes.safetensors", side_note={"note": "of the inputs"},
    )  # fmt: skip

    def run(out):
        def body():
            sequential.compress(
                decoder.Decoder(Path(source)), method, out, base="b", windows=families.windows(5)
            )

        return exit_code(body)

    drive(run, Path(folder), int(times), int(seed), [int(number) for number in renames])


if __name__ == "__main__":
    main(*sys.argv[1:])
