"""What MiniLLM does at a step and at a look, as `harness.training.loop.train` calls it.

Legend: B rollouts or windows of a micro-batch, L tokens of the longest of them.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from harness import distributed
from harness.data import example_sets
from harness.generation import responses
from harness.losses import from_hidden
from harness.losses.divergence import reverse_kl_rows
from harness.metrics.rouge import rouge_l
from harness.progress import track
from harness.training import batching, engine
from harness.training.engine import Training
from harness.training.validation import inputs_of
from minillm import policy, rollouts, sampling

EVALUATION_SEED = 20_230_614


@dataclass
class OnPolicy:
    """Student and teacher, what they are trained on, and the phase that is being learned from.

    Attributes:
        student: the model that the engine is around. columns: logits that both models share.
        fused: whether both models' losses go from hidden states (from_hidden.fusable).
        prompts: training examples, of which the prompts are read. text: windows of plain text.
        new_tokens: the longest response. chunk: responses written at a time.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    columns: int | None
    fused: bool
    tokenizer: object
    pad: int
    prompts: example_sets.Examples
    held_out: example_sets.Examples
    text: example_sets.Examples | None
    objective: rollouts.Objective
    plan: rollouts.Plan
    training: Training
    new_tokens: int
    lm_coef: float = 1.0
    kd_ratio: float = 0.5
    chunk: int = 16
    look_chunk: int = 16
    select: str = "reverse-kl"
    phase: rollouts.Phase | None = field(default=None, init=False)
    number: int = field(default=-1, init=False)

    def batches(self, step: int) -> list[dict]:
        """This rank's micro-batches of a step: rollouts, and under "text" as many windows. Where a
        phase begins, its rollouts are written first."""
        number = step // self.plan.steps
        if number != self.number:
            self.phase, self.number = self._write(number), number
        seed, size = self.training.seed, self.training.micro_batch
        micro = rollouts.micro_batches(self.phase, self.plan.chosen(step, seed), size, self.pad)
        if self.text is None:
            return micro
        # Another order than that of the prompts.
        dealt = batching.deal(self.text.lengths, step, replace(self.training, seed=seed + 2))
        windows = batching.batch_size(self.training) * (self.text.lengths[0] - 1)
        for batch, some in zip(micro, dealt, strict=True):
            text = batching.collate([self.text[i] for i in some], self.pad)
            batch["read"] += text["read"]
            batch |= {"text_ids": text["input_ids"], "text_labels": text["labels"]}
            # The text's mean, in a sum that is to be divided by the tokens of the responses.
            batch["text_share"] = self.lm_coef * batch["step_tokens"] / windows
        return micro

    def _write(self, number: int) -> rollouts.Phase:
        seed, plan = self.training.seed, self.plan
        chosen = plan.prompts(len(self.prompts), number, seed)
        rows = (self.prompts[i] for i in chosen)
        with engine.whole_weights(self.student) as student:
            was = student.training
            student.eval()
            written = rollouts.write(
                student, self.teacher, [ids[:first] for ids, first in rows],
                sampling.uniforms(plan.rollouts, self.new_tokens, seed * 1_000_003 + number),
                self.objective, ends={self.tokenizer.eos_token_id}, pad=self.pad,
                vocabulary=self.columns, chunk=self.chunk,
            )  # fmt: skip
            student.train(was)
        return written

    def loss_of(self, running, batch: dict):
        """(sum over response tokens of MiniLLM's loss, what of it to report): the policy's part,
        the reverse KL at the rollouts' positions, their reward, the text's loss."""
        device = running.device
        labels = batch["labels"].to(device)
        names = ("logp", "advantage", "weight")
        rows = partial(
            policy.policy_rows, clip=self.objective.cliprange,
            single_step=self.objective.single_step,
        )  # fmt: skip
        extras = [labels.clamp_min(0), *(batch[name].to(device) for name in names)]
        mask = labels != batching.IGNORED
        loss, sampled, reverse = self._sums(rows, running, inputs_of(batch, device), mask, extras)
        report = {"policy": sampled, "reverse_kl": reverse, "reward": batch["reward"].sum()}
        if "text_ids" in batch:
            labels = batch["text_labels"].to(device)
            rows = partial(from_hidden.mix_rows, kd_ratio=self.kd_ratio)
            mask, extras = labels != batching.IGNORED, [labels.clamp_min(0)]
            text = {"input_ids": batch["text_ids"].to(device)}
            text_loss = self._sums(rows, running, text, mask, extras)[0] * batch["text_share"]
            loss, report["text"] = loss + text_loss, text_loss
        return loss, report

    def _sums(self, rows, student, inputs: dict, mask, extras):
        return from_hidden.over_models(
            rows, self.teacher, student, inputs, mask, extras, self.columns, self.fused
        )

    @torch.no_grad()
    def evaluate(self, running, step: int) -> dict[str, float]:
        """The student's own responses to the held-out prompts: their reverse KL to the teacher in
        nats per token (over the whole vocabulary at each of their positions), their mean length,
        and Rouge-L. The random numbers are the same at every look."""
        count = len(self.held_out)
        mine = range(distributed.rank(), count, distributed.world_size())
        draws = sampling.uniforms(count, self.new_tokens, EVALUATION_SEED)
        # Prompts of like length together, for less padding.
        mine = sorted(mine, key=lambda i: self.held_out.firsts[i])
        parts = [mine[i : i + self.look_chunk] for i in range(0, len(mine), self.look_chunk)]
        total = tokens = score = 0.0
        with engine.whole_weights(running.module) as student:
            for part in track(parts, "responses") if distributed.rank() == 0 else parts:
                rows = [self.held_out[i] for i in part]
                batch, texts = self._respond(student, rows, draws[part])
                mask = batch["labels"].to(running.device) != batching.IGNORED
                inputs = inputs_of(batch, running.device)
                total += self._sums(reverse_kl_rows, student, inputs, mask, []).item()
                tokens += batch["tokens"]
                answers = [ids[first:] for ids, first in rows]
                references = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
                score += rouge_l(texts, references) * len(part)
        total, tokens, score = (distributed.sum_number(n) for n in (total, tokens, score))
        values = {"reverse_kl": total / tokens, "rouge_l": score / count, "length": tokens / count}
        return {"value": values["rouge_l" if self.select == "rouge" else "reverse_kl"], **values}

    def _respond(self, student, rows: list, draws) -> tuple[dict, list[str]]:
        """A batch (`batching.collate`) of responses of the student alone, and their texts."""
        prompts = [ids[:first] for ids, first in rows]
        ids, mask = responses.pad_left(prompts, self.pad)
        device = next(student.parameters()).device
        sampled = sampling.sample(
            student, None, ids.to(device), mask.to(device), draws, alpha=0.0,
            ends={self.tokenizer.eos_token_id}, pad=self.pad, vocabulary=self.columns,
        )  # fmt: skip
        pairs = zip(sampled.responses.cpu(), sampled.mask.cpu(), strict=True)
        answers = [tokens[inside] for tokens, inside in pairs]
        both = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        batch = batching.collate(
            [(ids, len(p)) for ids, p in zip(both, prompts, strict=True)], self.pad
        )
        return batch, self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def without_dropout(model: torch.nn.Module) -> None:
    """Nothing of ``model`` is dropped, in train mode either: rates of modules and attributes 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
