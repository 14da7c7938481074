"""Phases of MiniLLM: the student writes rollouts, then several epochs of steps are made on them.

Everything is a function of the seed and the number of the step: which prompts, which random
numbers, which rollouts go into which mini-batch. Ranks write a share of the rollouts each and then
exchange them, so that mini-batches are the same however many ranks there are.

Letters: N rollouts of a phase over all ranks, T response positions, B rollouts of a micro-batch, L
tokens of the longest of them, prompt included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness import distributed
from harness.errors import UserError
from harness.generation import responses
from harness.training import batching
from minillm import policy, sampling


@dataclass(frozen=True)
class Objective:
    """MiniLLM's settings; the defaults are the original's (policy.py says what each does)."""

    alpha: float = 0.2
    gamma: float = 0.95
    reward_scaling: float = 0.5
    cliprange_reward: float = 100.0
    cliprange: float = 0.2
    length_norm: bool = True
    single_step: bool = True
    future: bool = False

    def __post_init__(self):
        if not 0 <= self.alpha < 1:
            raise UserError(f"--teacher-mixed-alpha {self.alpha}: expected 0 to less than 1.")
        if not 0 <= self.gamma <= 1:
            raise UserError(f"--gamma {self.gamma}: expected 0 to 1.")
        for name in ("reward_scaling", "cliprange_reward", "cliprange"):
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {getattr(self, name)}: expected a number above 0.")


@dataclass(frozen=True)
class Plan:
    """``rollouts`` per phase and ``batch`` of them per step, over all ranks; ``epochs`` of steps
    are made on a phase's rollouts."""

    rollouts: int
    batch: int
    epochs: int

    def __post_init__(self):
        if self.epochs < 1:
            raise UserError(f"--ppo-epochs {self.epochs}: at least 1.")
        if self.rollouts < 1 or self.rollouts % self.batch:
            raise UserError(
                f"--num-rollouts {self.rollouts}: expected a multiple of the {self.batch} of a "
                "step (batch size x accumulation x processes)."
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of a phase."""
        return self.rollouts // self.batch * self.epochs

    def starts_phase(self, step: int) -> bool:
        return step % self.steps == 0

    def prompts(self, count: int, phase: int, seed: int) -> list[int]:
        """Which of ``count`` prompts a phase is about; epochs over them follow without a gap."""
        places = range(phase * self.rollouts, (phase + 1) * self.rollouts)
        return [batching.order(count, seed, p // count)[p % count] for p in places]

    def chosen(self, step: int, seed: int) -> list[int]:
        """The rollouts of one step, by their numbers in the phase."""
        phase, within = divmod(step, self.steps)
        epoch, place = divmod(within, self.rollouts // self.batch)
        mixed = batching.order(self.rollouts, seed + 1, phase * self.epochs + epoch)
        return mixed[place * self.batch : (place + 1) * self.batch]


@dataclass
class Phase:
    """N rollouts, on the CPU, equal on all ranks. prompts: N token ids; responses: int64 [N, T];
    mask: bool [N, T]; logp (the student's when it wrote them), weight, reward, advantage: float32
    [N, T]."""

    prompts: list[Tensor]
    responses: Tensor
    mask: Tensor
    logp: Tensor
    weight: Tensor
    reward: Tensor
    advantage: Tensor


def write(
    student,
    teacher,
    prompts: list[Tensor],
    draws: Tensor,
    objective: Objective,
    *,
    ends: set[int],
    pad: int,
    vocabulary: int | None,
    chunk: int,
) -> Phase:
    """Have every rank write its share of the rollouts, exchange them and rate their tokens.

    Args:
        student, teacher: causal LMs with whole weights, without dropout.
        prompts: of all N rollouts. draws: float64 [N, T] (`sampling.uniforms`).
        chunk: rollouts at a time.
    """
    device = next(student.parameters()).device
    mine = range(len(prompts))[distributed.shares(len(prompts))[distributed.rank()]]
    parts = []
    for start in range(mine.start, mine.stop, chunk):
        some = slice(start, min(start + chunk, mine.stop))
        ids, mask = responses.pad_left(prompts[some], pad)
        made = sampling.sample(
            student, teacher, ids.to(device), mask.to(device), draws[some], alpha=objective.alpha,
            ends=ends, pad=pad, vocabulary=vocabulary,
        )  # fmt: skip
        # One tensor to exchange; float32 holds every token id.
        columns = [made.responses, made.mask, made.student_logp, made.teacher_logp, made.mixed_logp]
        part = torch.stack([column.float() for column in columns], -1)
        parts.append(part.new_zeros(len(part), draws.shape[1], len(columns)))
        parts[-1][:, : part.shape[1]] = part
    own = torch.cat(parts) if parts else torch.zeros(0, draws.shape[1], 5, device=device)
    whole = distributed.gather_rows(own, len(prompts)).cpu()
    tokens, mask, ours, theirs, mixed = whole.unbind(-1)
    mask = mask.bool()
    reward = policy.rewards(theirs, ours, objective.reward_scaling, objective.cliprange_reward)
    advantage = policy.advantages(
        reward, mask, objective.gamma, objective.length_norm, objective.future
    )
    return Phase(
        prompts, tokens.long(), mask, ours, policy.importance_weights(ours, mixed),
        reward * mask, policy.whiten(advantage, mask),
    )  # fmt: skip


def micro_batches(phase: Phase, chosen: list[int], size: int, pad: int) -> list[dict]:
    """This rank's micro-batches, of ``size``, of the rollouts of a step; those of like length come
    together. All know "step_tokens", the response tokens of the whole step."""
    lengths = phase.mask.sum(1).tolist()
    chosen = sorted(chosen, key=lambda i: (-len(phase.prompts[i]) - lengths[i], i))
    micro = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    total = sum(lengths[i] for i in chosen)
    return [
        batch_of(phase, some, pad) | {"step_tokens": total}
        for some in micro[distributed.rank() :: distributed.world_size()]
    ]


def batch_of(phase: Phase, chosen: list[int], pad: int) -> dict:
    """`batching.collate` of rollouts, and beside each label its old_logp, weight, reward and
    advantage, float32 [B, L]."""
    rows = []
    for i in chosen:
        response = phase.responses[i][phase.mask[i]]
        rows.append((torch.cat([phase.prompts[i], response]), len(phase.prompts[i])))
    batch = batching.collate(rows, pad)
    for name in ("logp", "weight", "reward", "advantage"):
        laid = torch.zeros(batch["labels"].shape)
        for row, (i, (ids, first)) in enumerate(zip(chosen, rows, strict=True)):
            laid[row, first - 1 : len(ids) - 1] = getattr(phase, name)[i][phase.mask[i]]
        batch[name] = laid
    return batch
