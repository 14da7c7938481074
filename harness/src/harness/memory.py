"""How much memory is free, and the most that was taken."""

import contextlib
import ctypes
from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free(device: torch.device) -> int:
    """Bytes that can still be taken on ``device``; in a container, of what it is allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    try:
        limit = float((CGROUP / "memory.max").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        # Pages of files count as taken, but make room when asked to.
        cache = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return limit - int((CGROUP / "memory.current").read_text()) + cache
    except (OSError, ValueError, StopIteration):  # no container, or "max": no limit
        return float("inf")


def give_back() -> None:
    """Return freed memory to the system. glibc keeps holes between tensors of unequal size, and
    without this the peak of a long pass creeps up with the number of blocks (7-16 % over 6 to 18
    blocks, measured)."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak() -> str:
    """The most that this process has taken so far, in words."""
    import resource

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
