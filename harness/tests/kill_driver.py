"""Run passes and kill -9 them: ``python kill_driver.py SOURCE FOLDER TIMES SEED [RENAME ...]``.

FOLDER/straight and FOLDER/again are passes nobody disturbs. FOLDER/time0 ... are killed at TIMES random moments and
run again; FOLDER/rename0 ... are killed as they are about to do their so-manyth rename (every step
of the files goes through one), where -1 is just after the last. A process of its own with one
thread, so that forking it after the imports is safe; the killed children are real processes.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import families
import torch
from harness.errors import UserError
from harness.grid import Grid, nearest
from harness.hessian import Hessian

from harness import decoder, sequential, writer

GRID = Grid(3, 16)
BLOCKS = families.LAYERS


def update(matrices, hessian, where):
    size = hessian.mean().diagonal().sqrt()
    return {
        name: sequential.Update(nearest(m * (1 + size / 64), GRID, m.dtype), size.mean().item())
        for name, m in matrices.items()
    }


def run(source, out):
    decoder.TOKENS_PER_BATCH = 48
    method = sequential.Method(
        "packing", {}, update, Hessian, layout="compressed-tensors", grid=GRID
    )
    sequential.compress(
        decoder.Decoder(source), method, out, base="base", windows=families.windows(5)
    )


def child(source, out, kill_before=None) -> int:
    """The pid of a forked pass; it kills itself before rename number ``kill_before``."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if kill_before is not None:
            die_at_rename(kill_before)
        run(source, out)
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        os._exit(code)


def die_at_rename(number):
    real, count = os.replace, 0

    def replace(old, new):
        nonlocal count
        last = Path(old).is_dir()
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        real(old, new)
        if number == -1 and last:
            os.kill(os.getpid(), signal.SIGKILL)

    writer.os.replace = replace


def finish(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(source, folder, times, seed, *renames):
    source, folder = Path(source), Path(folder)
    torch.set_num_threads(1)
    run(source, folder / "straight")  # here, so that the children inherit all imports
    began = time.perf_counter()
    assert finish(child(source, folder / "again")) == 0
    whole = time.perf_counter() - began
    draw = random.Random(int(seed))
    for number in range(int(times)):
        out = folder / f"time{number}"
        pid = child(source, out)
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        first = finish(pid)
        again(source, out, first)
    for number in renames:
        out = folder / f"rename{number}"
        first = finish(child(source, out, int(number)))
        assert first == -signal.SIGKILL, first
        again(source, out, first)


def again(source, out, first):
    """The same command; refused only where the killed run had renamed its result already."""
    there = out.exists()
    code = finish(child(source, out))
    assert code == (2 if there else 0), code
    blocks = "all" if there else "some"
    print(f"{out.name}: first run ended with {first}, {blocks} blocks were there", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
