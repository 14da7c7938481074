"""Training on DeepSpeed: its launch, its engine and its quirks, in one place.

A trainer of the house is a loop over global batches (loop.py is that loop):

    device = launch(device)
    engine = start(model, training)
    for step in range(first, training.steps):
        means = train_step(engine, training, step, micro_batches, loss_of)

Losses are sums over tokens, divided by the tokens of the whole global batch, over all ranks and
micro-batches: how a batch is cut changes nothing but rounding (measured: 1e-7 of the loss between
one rank with four micro-batches and two ranks with two, at ZeRO 0, 2 and 3). Randomness (dropout,
sampling) is seeded by step and rank, so a resumed run needs no random state. Without a launcher one
process trains as it is; `deepspeed`, `torchrun` and `accelerate launch` give the ranks.
"""

import atexit
import logging
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import cos, inf, isfinite, pi

import torch
import torch.distributed as dist

from harness import distributed, precision
from harness.errors import UserError

SCHEDULES = ("cosine", "linear", "constant")
WARMUP_SHARE = 0.1  # of a run with a time limit, at most
DIVERGED = (
    ": training diverged; lower the learning rate (with --no-resume), or use --dtype float32."
)


class Diverged(UserError):
    """A loss that is not finite: the same command would end so again."""


@dataclass(frozen=True)
class Training:
    """What the engine is told.

    Attributes:
        learning_rate: the peak. steps: optimizer steps in all; warmup: the first of them, linear.
        schedule: after the warmup "cosine" or "linear", down to ``min_rate``, or "constant".
        micro_batch: sequences per forward and rank. accumulate: forwards per optimizer step.
        batch: sequences per optimizer step over all ranks, where they do not fill every forward.
        minutes: of the run, at most: the schedule then follows the clock, too.
        weight_decay: of matrices; vectors (norms, biases) have none.
        zero: DeepSpeed's ZeRO stage, 0 to 3; 16-bit weights have 1 at least.
        offload: optimizer states, and weights at stage 3, in CPU memory.
    """

    learning_rate: float
    steps: int
    micro_batch: int = 1
    accumulate: int = 1
    warmup: int = 0
    schedule: str = "cosine"
    min_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    zero: int = 0
    offload: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    batch: int | None = None
    minutes: float | None = None

    def __post_init__(self):
        if self.learning_rate <= 0 or not isfinite(self.learning_rate):
            raise UserError(f"learning rate {self.learning_rate}: expected a number above 0.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule}: expected {' or '.join(SCHEDULES)}.")
        if self.zero not in range(4):
            raise UserError(f"ZeRO stage {self.zero}: expected 0, 1, 2 or 3.")
        for name in ("warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            if value < 0 or not isfinite(value):
                raise UserError(f"{name.replace('_', ' ')} {value}: expected 0 or more.")
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise UserError(f"{self.minutes} minutes: expected a number above 0.")
        for name in ("steps", "micro_batch", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} {getattr(self, name)}: at least 1.")


def rate(training: Training, step: int, spent: float = 0.0) -> float:
    """The learning rate at optimizer step ``step`` (from 0), as a share of the peak.

    Args:
        spent: the share of a time limit that is gone, 0 without one. The schedule stands where the
            further of the two is, steps or time; the warmup takes a tenth of the time at most.
    """
    if step < training.warmup and spent < WARMUP_SHARE:
        return max((step + 1) / training.warmup, spent / WARMUP_SHARE)
    if training.schedule == "constant":
        return 1.0
    low = training.min_rate / training.learning_rate
    first = training.steps * WARMUP_SHARE if training.minutes else training.warmup
    done = (max(step, spent * training.steps) - first) / max(1, training.steps - first)
    done = min(1.0, max(0.0, done))
    fallen = 1 - done if training.schedule == "linear" else 0.5 * (1 + cos(pi * done))
    return low + (1 - low) * fallen


def launch(device: str) -> str:
    """Join the process group, one of a single process where no launcher made more; returns this
    rank's device. To be called before the model is built."""
    cuda = device.startswith("cuda")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        # Its log would go to stdout, where results are.
        with redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise UserError(
            "training needs deepspeed: pip install 'llm-compression-harness[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not cuda:
        # Shared-memory collectives would be compiled on first use, for a minute; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        with _alone():
            backend = distributed.join(device)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


@contextmanager
def _alone():
    """Inside, the environment is what a launcher makes, of one process where there is none."""
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    given = "MASTER_PORT" in os.environ
    if not given:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    yield
    if not given:
        # A process that this one starts later must not find the port taken.
        del os.environ["MASTER_PORT"]


@contextmanager
def group():
    """What a command on DeepSpeed runs in. After a success all ranks leave together, as in
    `distributed.group`, but the process group stays until the process ends: DeepSpeed keeps hold of
    it, and a second command in the process trains on it too."""
    atexit.register(distributed.leave)
    with distributed.together():
        yield


def on_lead(run: Callable, settings):
    """``run(settings)`` inside :func:`group`: what it returns on rank 0, None on the others."""
    with group():
        result = run(settings)
        return result if distributed.rank() == 0 else None


@contextmanager
def memory_knobs():
    """Inside (or in a function so decorated), a GPU out of memory is a UserError that says what
    takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        shortage = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        raise UserError(
            f"{shortage}: fewer examples per forward (--batch-size, --micro_batch_size, "
            "--per_device_train_batch_size) with more --gradient-accumulation-steps take less "
            "memory, and so do --gradient-checkpointing, --zero 3 on several GPUs, and --offload."
        ) from error


def start(model: torch.nn.Module, training: Training):
    """DeepSpeed's engine around ``model``; its parameters that require gradients are trained.

    The forward runs in the model's dtype; bfloat16 and (on GPUs) float16 keep float32 masters.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    if dtype == torch.float16 and not torch.cuda.is_available():
        raise UserError(precision.GPU_ONLY)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate,
        betas=training.betas, eps=training.eps,
    )  # fmt: skip
    short = dtype != torch.float32
    # DeepSpeed's own optimizer for 16-bit weights without ZeRO strays from float32's way three
    # times as far as the one of stage 1 (measured), which for one process is no other thing.
    zero = {"stage": max(training.zero, int(short))}
    if training.zero == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if training.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if training.zero == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": training.accumulate,
        "gradient_clipping": training.clip, "zero_optimization": zero,
        # torch's AdamW: DeepSpeed's own are compiled on first use, for minutes.
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
    }  # fmt: skip
    if short and training.accumulate > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    with redirect_stdout(sys.stderr):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    return engine


def train_step(
    engine,
    training: Training,
    step: int,
    batches: list[dict],
    loss_of: Callable[[dict], tuple[torch.Tensor, dict]],
    spent: float = 0.0,
) -> dict[str, float]:
    """One optimizer step over this rank's ``accumulate`` micro-batches.

    Args:
        batches: each with "tokens", the number of tokens that its loss sums over.
        loss_of: batch -> (sum of the losses of its tokens, {name: another such sum to report}).
        spent: as for :func:`rate`.

    Returns:
        "loss" and what was reported, per token over all ranks.

    Raises:
        Diverged: the loss is not finite.
    """
    seed(training, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = training.learning_rate * rate(training, step, spent)
    tokens = distributed.sum_number(float(sum(batch["tokens"] for batch in batches)))
    share = len(batches) * distributed.world_size() / max(tokens, 1.0)
    sums: dict[str, float] = {}
    for batch in batches:
        loss, report = loss_of(batch)
        # The engine divides by accumulate and averages over ranks; `share` takes that back.
        engine.backward(loss * share)
        engine.step()
        for name, value in {"loss": loss, **report}.items():
            value = value.item() if isinstance(value, torch.Tensor) else value
            sums[name] = sums.get(name, 0.0) + value
    means = {name: distributed.sum_number(value) / max(tokens, 1.0) for name, value in sums.items()}
    if not isfinite(means["loss"]):
        raise Diverged(f"the loss of step {step} is {means['loss']}{DIVERGED}")
    return means


def seed(training: Training, step: int) -> None:
    """Seed torch for one step and rank: what a resumed run draws is what the other would have."""
    torch.manual_seed((training.seed * 1_000_003 + step) * 4096 + distributed.rank())


def weights(engine) -> dict[str, torch.Tensor] | None:
    """The model's whole state dict on rank 0 (all ranks must call), whatever the ZeRO stage."""
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict() if distributed.rank() == 0 else None


@contextmanager
def rounded(engine, names: list[str], dtype: torch.dtype):
    """Inside, the parameters ``names`` of ``engine.module`` have values that ``dtype`` holds, at
    any ZeRO stage; afterwards their own again."""
    every = dict(engine.module.named_parameters())
    # At stage 3 a rank holds its part of a parameter, of small ones the whole beside it.
    held = [getattr(every[name], "ds_tensor", every[name]).data for name in names]
    held += [every[name].data for name in names if hasattr(every[name], "ds_tensor")]
    with precision.rounded(held, dtype):
        yield


@contextmanager
def whole_weights(model: torch.nn.Module):
    """Inside, every rank's ``model``, an engine's, holds its full weights, and ranks may call it as
    often as each likes: for generation. No gradients there."""
    if not any(hasattr(p, "ds_tensor") for p in model.parameters()):  # as at ZeRO-3
        with torch.no_grad():
            yield model
        return
    import deepspeed

    # ZeRO-3's hooks would give weights back after each layer, and fetch them with the other ranks.
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(m, name, getattr(m, name)) for m in model.modules() for name in hooks]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(model.parameters())):
        try:
            for module, name, _ in kept:
                setattr(module, name, OrderedDict())
            yield model
        finally:
            for module, name, value in kept:
                setattr(module, name, value)
