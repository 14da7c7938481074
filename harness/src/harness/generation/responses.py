"""Responses to prompts, sampled: in transformers or in vLLM.

Every example draws from random numbers of its own, which follow from (seed, its place in the set):
how examples are batched and dealt to ranks changes what is said only where rounding does, and a run
that goes on from a kill, with the same batches, says the same.

Legend: B prompts of a batch, L tokens so far, padded on the left, V vocabulary.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import distributed
from harness.checkpoint import load
from harness.data import corpora
from harness.errors import UserError
from harness.generation.vllm_loading import start_vllm
from harness.progress import track

# From prompts (token ids) and a seed each to the token ids of responses, without the end token.
Ask = Callable[[list[list[int]], list[int]], list[list[int]]]
SEEDS = 1_000_003  # a prime: (seed, index) -> seed * SEEDS + index


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the likeliest; top_p 1 and top_k 0 cut nothing;
    no_repeat N forbids N tokens in a row that were there before, in the prompt or since (0: none).
    """

    new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    no_repeat: int = 0

    def __post_init__(self):
        heat = 0 <= self.temperature < math.inf
        if not heat or not 0 < self.top_p <= 1 or self.top_k < 0 or self.no_repeat < 0:
            raise UserError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}, n-gram "
                f"{self.no_repeat}: expected 0 or more and finite, above 0 and at most 1, at least "
                "0, at least 0."
            )


def check_tokens(tokenizer, prompts: list[list[int]], config) -> None:
    """Refuse prompts, or an end token, that the model has no embedding of."""
    largest = max((max(ids) for ids in prompts if ids), default=0)
    corpora.check_token(max(largest, tokenizer.eos_token_id or 0), config)


def batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Indices of the prompts in batches of ``size``, the longest first: memory that suffices at the
    start suffices to the end, and there is little padding."""
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def respond(
    ask: Ask, prompts: list[list[int]], seed: int, groups: list[list[int]], label: str
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(indices, responses) of this rank's share of ``groups``, one after another."""
    mine = groups[distributed.rank() :: distributed.world_size()]
    for group in track(mine, label) if distributed.rank() == 0 else mine:
        yield group, ask([prompts[i] for i in group], [seed * SEEDS + i for i in group])


def open_engine(
    engine: str,
    folder,
    tokenizer,
    sampling: Sampling,
    longest: int,
    *,
    dtype: str,
    device: str,
    gpus: int | None = None,
) -> Ask:
    """The engine "transformers" or "vllm" with the model at ``folder`` in it; ``longest`` tokens at
    most, with the prompt; in vLLM on ``gpus`` GPUs (None: on all). ``dtype`` is resolved
    (:func:`harness.generation.vllm_loading.dtype_for`)."""
    if engine == "vllm":
        return vllm_engine(folder, tokenizer, sampling, longest, dtype, gpus)
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    model = load.load_model(folder, device=device, dtype=dtype)
    return transformers_engine(model, tokenizer, sampling)


def pad_left(prompts: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """int64 [B, P] and its mask, from token ids of any lengths."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def end_ids(tokenizer, generation_config) -> list[int]:
    """What ends a response: the tokenizer's end token, and what the checkpoint names besides."""
    named = generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    ends = sorted({i for i in [tokenizer.eos_token_id, *named] if i is not None})
    if not ends:
        raise UserError("neither tokenizer nor generation_config.json name an end token.")
    return ends


def transformers_engine(model, tokenizer, sampling: Sampling) -> Ask:
    """A loaded model as an engine, which raises UserError where logits are NaN or infinite."""
    from transformers import GenerationConfig, LogitsProcessorList

    ends = end_ids(tokenizer, model.generation_config)
    # What a checkpoint's own generation_config.json asks for (penalties, cuts) is not wanted: the
    # tokens are picked below, so that transformers has to take the largest only.
    settings = GenerationConfig(
        max_new_tokens=sampling.new_tokens, do_sample=False, eos_token_id=ends,
        pad_token_id=ends[0], repetition_penalty=1.0, no_repeat_ngram_size=0, num_beams=1,
    )  # fmt: skip

    @torch.no_grad()
    def ask(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        ids, mask = pad_left([torch.tensor(prompt) for prompt in prompts], ends[0])
        drawing = _Draw(sampling, ids.shape[1], seeds)
        generated = model.generate(
            ids.to(model.device), attention_mask=mask.to(model.device),
            generation_config=settings, logits_processor=LogitsProcessorList([drawing]),
        )  # fmt: skip
        if drawing.broken:
            raise UserError(
                f"the model gives NaN or infinite logits in {model.dtype}; it is damaged, or try "
                "--dtype bfloat16 or float32."
            )
        return [until_end(row, ends) for row in generated[:, ids.shape[1] :].tolist()]

    return ask


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """``ids`` before the first of ``ends``."""
    return ids[: next((place for place, i in enumerate(ids) if i in ends), len(ids))]


class _Draw:
    """A logits processor of transformers that leaves only the token that is drawn: where the
    example's next uniform number falls in the cumulated probabilities."""

    def __init__(self, sampling: Sampling, prompt: int, seeds: list[int]):
        self.sampling, self.prompt = sampling, prompt
        self.broken = False  # where the scores are, so that no token waits for it
        draws = (torch.Generator().manual_seed(seed) for seed in seeds)
        count = sampling.new_tokens
        self.draws = torch.stack(
            [torch.rand(count, generator=g, dtype=torch.float64) for g in draws]
        )

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.broken = self.broken | ~scores.amax(-1).isfinite().all()  # -inf may be meant
        if self.sampling.no_repeat:
            scores = without_repeats(ids, scores, self.sampling.no_repeat)
        if not self.sampling.temperature:
            return scores
        heap = probabilities(scores, self.sampling).cumsum(-1)
        draw = self.draws[:, ids.shape[1] - self.prompt].to(heap.device)
        # Never beyond the last token that can be: its cumulated probability is the whole.
        drawn = torch.searchsorted(heap, draw[:, None] * heap[:, -1:], right=True)
        last = (heap < heap[:, -1:]).sum(-1, keepdim=True)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, drawn.minimum(last), 0.0)


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """float64 [B, V] from scores [B, V]: tempered, then cut to the top_k likeliest, then to the
    fewest likeliest whose sum reaches top_p."""
    shares = (scores.double() / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < scores.shape[-1]:
        least = shares.topk(sampling.top_k).values[:, -1:]
        shares = shares.masked_fill(shares < least, 0)
        shares /= shares.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, order = shares.sort(descending=True)
        ahead = ordered.cumsum(-1) - ordered
        shares = shares.scatter(1, order, ordered.masked_fill(ahead >= sampling.top_p, 0))
    return shares


def without_repeats(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """scores [B, V] with -inf for tokens that would end a run of ``size`` tokens which ids [B, L]
    hold already."""
    if ids.shape[1] < size:
        return scores
    runs = ids.unfold(1, size, 1)
    again = (runs[..., :-1] == ids[:, None, ids.shape[1] - size + 1 :]).all(-1)
    banned = torch.zeros_like(scores).scatter_reduce_(
        1, runs[..., -1], again.to(scores.dtype), "amax"
    )
    return scores.masked_fill(banned > 0, -torch.inf)


def vllm_engine(
    folder, tokenizer, sampling: Sampling, longest: int, dtype: str, gpus: int | None = None
) -> Ask:
    """The checkpoint at ``folder`` in vLLM, on so many GPUs of this machine (None: all), or the
    CPU. What was asked before changes no answer: prompts are not cached.

    Raises:
        UserError: vLLM is not installed, cannot load it, or lacks what is asked for.
    """
    if sampling.no_repeat:
        raise UserError(
            "vLLM has no rule against repeated n-grams; add --no-repeat-ngram-size 0, or use "
            "--engine transformers."
        )
    if distributed.world_size() > 1:
        raise UserError("vLLM shares a model among GPUs by itself; start it without a launcher.")
    from transformers import GenerationConfig

    try:
        own = GenerationConfig.from_pretrained(folder)
    except OSError:
        own = GenerationConfig()
    ends = end_ids(tokenizer, own)
    model = start_vllm(
        folder, dtype=dtype, max_model_len=longest, seed=0, enable_prefix_caching=False,
        tensor_parallel_size=gpus or max(1, torch.cuda.device_count()), generation_config="vllm",
    )  # fmt: skip
    from vllm import SamplingParams

    def ask(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        wanted = [
            SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_tokens=sampling.new_tokens, stop_token_ids=ends, seed=seed,
            )
            for seed in seeds
        ]  # fmt: skip
        tokens = [{"prompt_token_ids": ids} for ids in prompts]
        generated = model.generate(tokens, wanted, use_tqdm=False)
        return [until_end(list(answer.outputs[0].token_ids), ends) for answer in generated]

    return ask
