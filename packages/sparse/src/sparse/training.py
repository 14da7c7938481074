"""The training loop of recovery: batches, schedule, ranks, looks at the validation loss.

Nothing random is kept from step to step: data order and dropout follow from the seed and the
number of the step, so that a resumed run needs only weights, moments and `Progress`.

Legend: B examples in a micro-batch, T tokens of the longest of them, V vocabulary.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from harness import distributed
from harness.data.training_data import Example
from harness.errors import UserError
from harness.training.meter import Meter

IGNORED = -100
# Elements of one message between ranks: 64 MB of float32.
BUCKET = 2**24
CLIP = 1.0
LOOKS = 10  # at the validation loss, unless --eval_steps says otherwise

# (logits [B, T, V], ids [B, T], targets [B, T]) -> sum over the targets, float32 scalar
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Diverged(UserError):
    """A loss that is not finite: the same command would end so again."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast. A run ends after ``steps`` or ``minutes``, whichever comes first.

    The learning rate rises over ``warmup`` steps, at most a tenth of the run, and then falls
    linearly to zero at its end.
    """

    steps: int
    batch: int
    micro: int
    rate: float
    warmup: int
    minutes: float | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    patience: int = 0
    seed: int = 0

    def done(self, step: int, seconds: float) -> float:
        """The share of the run that is behind, 0 to 1."""
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def rate_at(self, step: int, done: float) -> float:
        """The learning rate of the step after ``step`` others, ``done`` of the run being behind."""
        rise = max((step + 1) / self.warmup, 10 * done) if self.warmup else 1.0
        risen = 0.1 if self.minutes else min(0.1, self.warmup / self.steps)
        fall = (1 - done) / (1 - risen)
        return self.rate * min(1.0, rise, fall)

    def looks(self, step: int, before: float, after: float) -> bool:
        if self.eval_steps:
            return step % self.eval_steps == 0
        return math.floor(LOOKS * after) > math.floor(LOOKS * before)


@dataclass
class Progress:
    """Where a run stands; JSON keeps it exactly."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    since_look: list[float] = field(default_factory=lambda: [0.0, 0])
    rows: list[dict] = field(default_factory=list)


def collate(examples: list[Example], device) -> tuple[Tensor, Tensor]:
    """ids [B, T] and targets [B, T], int64, padded on the right: the target of a position is the
    next token, or IGNORED. No attention mask is needed: what is right of a token never reaches it.
    """
    longest = max(len(ids) for ids, _ in examples)
    padded = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full_like(padded, IGNORED)
    for row, (ids, first) in enumerate(examples):
        padded[row, : len(ids)] = ids
        targets[row, first - 1 : len(ids) - 1] = ids[first:]
    return padded.to(device), targets.to(device)


def target_count(examples: list[Example]) -> int:
    return sum(len(ids) - first for ids, first in examples)


@lru_cache(maxsize=1)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batch_of(examples: list[Example], step: int, batch: int, seed: int) -> list[Example]:
    """The examples of a step, the longest first, so that neighbours need little padding."""
    epoch, index = divmod(step, -(-len(examples) // batch))
    chosen = _order(len(examples), seed, epoch)[index * batch : (index + 1) * batch]
    return sorted((examples[i] for i in chosen), key=lambda example: -len(example[0]))


def autocast(device: torch.device, dtype: torch.dtype):
    """bfloat16 matrix products over float32 weights; nothing where the dtype is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def held_out_loss(model, examples: list[Example], loss: Loss, micro: int, dtype) -> float:
    """Mean of ``loss`` over all targets of ``examples``, in nats per token, over all ranks."""
    was = model.training
    model.eval()
    total, mine = 0.0, examples[distributed.rank() :: distributed.world_size()]
    for start in range(0, len(mine), micro):
        ids, targets = collate(mine[start : start + micro], model.device)
        with autocast(model.device, dtype):
            logits = model(input_ids=ids, use_cache=False).logits
        total += loss(logits, ids, targets).item()
    model.train(was)
    return distributed.sum_number(total) / target_count(examples)


def gradients(model, examples: list[Example], loss: Loss, micro: int, dtype, seed: int) -> float:
    """Add to the gradients those of the mean loss over all targets of ``examples``, summed over
    the ranks; returns that mean. Equal for every ``micro`` and number of ranks, dropout aside."""
    count = target_count(examples)
    ranks, rank = distributed.world_size(), distributed.rank()
    total, mine = 0.0, examples[rank::ranks]
    for start in range(0, len(mine), micro):
        ids, targets = collate(mine[start : start + micro], model.device)
        torch.manual_seed((seed * ranks + rank) * 4099 + start)
        with autocast(model.device, dtype):
            logits = model(input_ids=ids, use_cache=False).logits
        value = loss(logits, ids, targets) / count
        value.backward()
        total += value.item()
    return distributed.sum_number(total)


def sum_over_ranks(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its sum over the ranks, some 64 MB at a time."""
    if distributed.world_size() == 1:
        return
    bucket: list[Tensor] = []
    for number, parameter in enumerate(parameters, 1):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(g.numel() for g in bucket) >= BUCKET or number == len(parameters):
            flat = distributed.sum_in_place(torch.cat([g.reshape(-1) for g in bucket]))
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket = []


def train(
    model, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor], data, loss: Loss,
    look: Callable[[], float], plan: Plan, dtype: torch.dtype, store,
) -> Progress:  # fmt: skip
    """Train ``parameters`` until the plan ends or ``look()`` finds no better loss any more.

    Args:
        masks: parameter name -> where its gradient is kept.
        data: training examples. look: the validation loss now.
        store: `sparse.training_state.Store`; it holds the best weights at the end.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    some = list(parameters.values())
    optimizer = torch.optim.AdamW(some, lr=plan.rate, weight_decay=0.0)
    progress = store.load(parameters, optimizer) or Progress()
    model.train()
    clock = time.perf_counter() - progress.seconds

    def behind() -> float:
        progress.seconds = time.perf_counter() - clock
        done = plan.done(progress.step, progress.seconds)
        return distributed.broadcast_object(done) if plan.minutes else done

    if not progress.rows:
        _look(progress, look, 0.0, plan, parameters, store)
        store.save(progress, parameters, optimizer)
    done = behind()
    meter = Meter("recover", plan.steps, progress.step, progress.tokens)
    while done < 1 and not (plan.patience and progress.stale >= plan.patience):
        rate = plan.rate_at(progress.step, done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch_of(data, progress.step, plan.batch, plan.seed)
        seed = plan.seed * 1_000_003 + progress.step
        value = gradients(model, batch, loss, plan.micro, dtype, seed)
        sum_over_ranks(some)
        for name, mask in masks.items():
            parameters[name].grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(some, CLIP).item()
        progress.step += 1
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise Diverged(
                f"the loss is {value:.4g} and its gradient's norm {norm:.4g} at step "
                f"{progress.step}: training diverged; use a lower --learning_rate than "
                f"{plan.rate:.2g}, or --dtype float32."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.tokens += sum(len(ids) for ids, _ in batch)
        progress.since_look = [progress.since_look[0] + value, progress.since_look[1] + 1]
        before, done = done, behind()
        meter.show(progress.step, {"loss": value}, rate, progress.tokens)
        if done == 1 or plan.looks(progress.step, before, done):
            _look(progress, look, rate, plan, parameters, store)
            progress.seconds = time.perf_counter() - clock
            store.save(progress, parameters, optimizer)
            done = behind()
        elif plan.save_steps and progress.step % plan.save_steps == 0:
            store.save(progress, parameters, optimizer)
    meter.close()
    return progress


def _look(progress: Progress, look, rate: float, plan: Plan, parameters, store) -> None:
    """One row of the log; better weights than ever are kept."""
    value = look()
    if not math.isfinite(value):
        raise Diverged(
            f"the validation loss is {value} at step {progress.step}: "
            + (
                "the model's weights are damaged."
                if progress.step == 0
                else f"training diverged; use a lower --learning_rate than {plan.rate:.2g}."
            )
        )
    total, count = progress.since_look
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "learning_rate": rate,
        "training_loss": total / count if count else None,
        "validation_loss": value,
    }
    progress.since_look = [0.0, 0]
    progress.rows.append(row)
    trained = f", training loss {total / count:.4f}" if count else ""
    distributed.say(
        f"step {progress.step}: validation loss {value:.4f}, perplexity "
        f"{math.exp(min(value, 700)):.3f}{trained}"
    )
    if value < progress.best_loss:
        progress.best_loss, progress.best_step, progress.stale = value, progress.step, 0
        store.keep_best(progress.step, parameters)
    else:
        progress.stale += 1
