"""Ranks and process groups. Without a launcher everything here is the identity.

Start with ``torchrun --nproc-per-node 2 -m gptq ...`` or ``accelerate launch``: gloo on CPU, NCCL
on CUDA. Every rank sees the same files; rank 0 alone writes.
"""

import functools
import os
import sys
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist

from harness.errors import Finished, UserError

_joined = False


def join(device: str) -> str:
    """Make the process group that the environment describes; returns its backend."""
    global _joined
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend)
    _joined = True
    return backend


def leave() -> None:
    """Take down the group that :func:`join` made, if any. Others' stay: vLLM makes one too, and
    takes it down itself."""
    global _joined
    if _joined and dist.is_initialized():
        dist.destroy_process_group()
    _joined = False


def gather() -> None:
    """Wait until all ranks of that group are here."""
    if _joined and dist.is_initialized():
        dist.barrier()


def start(device: str) -> str:
    """Join the launcher's process group, if there is one; returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        join(device)
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local)
        return f"cuda:{local}"
    return device


@contextmanager
def together():
    """The ranks leave the body together, unless one fails."""
    try:
        yield
    except Finished:
        gather()
        raise
    gather()


@contextmanager
def group():
    """Leave the process group when the body ends. After a success all ranks leave together: one
    that leaves while another still talks to it can abort on its way out, with the result long
    written (seen once with gloo). After an error nobody waits. A group that was there before stays:
    it is DeepSpeed's (`engine.group`)."""
    before = dist.is_initialized()
    try:
        with together():
            yield
    finally:
        if not before:
            leave()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_in_place(tensor: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_number(value: float) -> float:
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = sum_in_place(torch.tensor(float(value), dtype=torch.float64, device=device)).item()
    return type(value)(total)


def broadcast_object(value):
    """Rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def lead(function):
    """``function()`` on rank 0, its result on every rank; a UserError there is raised on all, so
    that no rank waits for one that has left."""
    if world_size() == 1:
        return function()
    result, raised = None, None
    if rank() == 0:
        try:
            result = function()
        except UserError as error:
            raised = type(error)(str(error))  # without its traceback, which would hold the frames
    result, raised = broadcast_object((result, raised))
    if raised:
        raise raised
    return result


def say(text: str) -> None:
    """A line on stderr, from rank 0 alone."""
    if rank() == 0:
        print(text, file=sys.stderr)


@functools.cache
def say_once(text: str) -> None:
    """The same, once however often a checkpoint is opened."""
    say(text)


def shares(count: int) -> list[slice]:
    """Contiguous slices of ``range(count)``, one per rank, as even as can be."""
    ranks = world_size()
    edges = [count * r // ranks for r in range(ranks + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def gather_rows(part: torch.Tensor, rows: int) -> torch.Tensor:
    """Put together row slices [shares(rows)[r], ...] of every rank: [rows, ...] on every rank."""
    if world_size() == 1:
        return part
    whole = part.new_zeros(rows, *part.shape[1:])
    for source, share in enumerate(shares(rows)):
        piece = whole[share]
        if source == rank():
            piece.copy_(part)
        if piece.numel():
            piece = piece.contiguous()
            dist.broadcast(piece, src=source)
            whole[share] = piece
    return whole
