"""Tokens per second, time to the first token, memory, and how near decoding is to the machine's
memory bandwidth.

Prefill is one forward over the prompt; decoding is the engine's own greedy generation with its
key/value cache, its time taken as that of `new` tokens minus that of one. Every number is the
median of several runs after one that is not counted. GB are 1e9 bytes.
"""

import contextlib
import inspect
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.checkpoint.weight_files import read_headers
from harness.errors import UserError
from harness.generation.vllm_loading import start_vllm
from harness.metrics.footprint import memory_bytes
from harness.progress import track

PROMPT, NEW, REPEATS = 512, 128, 5
COPY_BYTES = 2**28  # far beyond any cache


@dataclass(frozen=True)
class Speed:
    """Medians; tokens/s are over the whole batch, `first_token_s` in seconds.

    `weight_bytes` are read once per decoded token; `read_gb_s` is what that makes per second and
    `copy_gb_s` what a plain copy reaches here (bytes read + written). `peak_memory_bytes` is None
    for engines that reserve memory up front.
    """

    engine: str
    device: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_tokens_s: float
    decode_tokens_s: float
    first_token_s: float
    peak_memory_bytes: int | None
    weight_bytes: int
    read_gb_s: float
    copy_gb_s: float

    def as_dict(self) -> dict:
        return asdict(self)


def lengths(context: int | None) -> tuple[int, int]:
    """(prompt, new) tokens: 512 and 128, or four fifths and one fifth of a shorter context."""
    if context is None or context >= PROMPT + NEW:
        return PROMPT, NEW
    new = max(2, context // 5)
    if context - new < 1:
        raise UserError(f"a context of {context} tokens is too short to measure speed")
    return context - new, new


def copy_bandwidth(device: str, repeats: int = REPEATS) -> float:
    """GB/s of copying a 256 MB tensor on `device`, bytes read and written both counted."""
    import torch

    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * COPY_BYTES / seconds / 1e9


def measure(
    model,
    *,
    batch_size: int = 1,
    prompt: int = PROMPT,
    new: int = NEW,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Speed:
    """Speed of a loaded transformers causal LM on its own device; the prompt is random tokens."""
    import torch
    from transformers import GenerationConfig

    device = str(model.device)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (batch_size, prompt), generator=generator).to(device)
    mask = torch.ones_like(ids)

    def generate(count: int) -> None:
        # As many new tokens as asked, whatever the model says: min keeps EOS away.
        settings = GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        model.generate(ids, attention_mask=mask, generation_config=settings)

    # As generation does it: the head runs on the last position only, where the model knows how.
    last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def prefill() -> None:
        model(input_ids=ids, use_cache=True, **({"logits_to_keep": 1} if last else {}))

    _reset_peak(device)
    with torch.no_grad():
        seconds = [
            _median_seconds(run, device, repeats)
            for run in track((prefill, lambda: generate(1), lambda: generate(new)), "speed")
        ]
    peak = _peak(device)
    return _speed(
        engine="transformers",
        device=device,
        batch_size=batch_size,
        prompt=prompt,
        new=new,
        repeats=repeats,
        seconds=seconds,
        peak=peak,
        weight_bytes=decode_bytes(model),
    )


def measure_vllm(
    folder: Path,
    *,
    batch_size: int = 1,
    prompt: int = PROMPT,
    new: int = NEW,
    repeats: int = REPEATS,
    seed: int = 0,
    dtype: str = "auto",
) -> Speed:
    """Speed of the checkpoint in `folder` under vLLM, packed weights staying packed.

    The time to the first token stands for the prefill as well. Raises UserError when vLLM is not
    installed or cannot load the checkpoint.
    """
    engine = start_vllm(
        folder,
        dtype=dtype,
        max_model_len=prompt + new,
        max_num_seqs=batch_size,
        enable_prefix_caching=False,
        seed=seed,
    )
    import torch
    from vllm import SamplingParams

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = engine.get_tokenizer().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch_size, prompt), generator=generator).tolist()
    prompts = [{"prompt_token_ids": row} for row in ids]

    def generate(count: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        engine.generate(prompts, sampling, use_tqdm=False)

    first, full = (
        _median_seconds(run, device, repeats)
        for run in track((lambda: generate(1), lambda: generate(new)), "speed")
    )
    return _speed(
        engine="vllm",
        device=device,
        batch_size=batch_size,
        prompt=prompt,
        new=new,
        repeats=repeats,
        seconds=[first, first, full],
        peak=None,
        weight_bytes=stored_decode_bytes(folder),
    )


def _speed(
    *, engine, device, batch_size, prompt, new, repeats, seconds, peak, weight_bytes
) -> Speed:
    prefill, first, full = seconds
    # Timer noise must not turn a tiny model's difference negative.
    step = max(full - first, 1e-9) / (new - 1)
    return Speed(
        engine=engine,
        device=device,
        batch_size=batch_size,
        prompt_tokens=prompt,
        new_tokens=new,
        repeats=repeats,
        prefill_tokens_s=batch_size * prompt / prefill,
        decode_tokens_s=batch_size / step,
        first_token_s=first,
        peak_memory_bytes=peak,
        weight_bytes=weight_bytes,
        read_gb_s=weight_bytes / step / 1e9,
        copy_gb_s=copy_bandwidth(device),
    )


def decode_bytes(model) -> int:
    """Bytes of weights a decoding step reads: all but an embedding that is not also the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return memory_bytes(model) - (0 if tied else memory_bytes(embedding))


def stored_decode_bytes(folder: Path) -> int:
    """The same from the headers of a checkpoint's files."""
    tensors = read_headers(folder)
    total = sum(t.nbytes for t in tensors.values())
    head = any(name.endswith("lm_head.weight") for name in tensors)
    tables = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    return total - sum(t.nbytes for n, t in tensors.items() if head and n.endswith(tables))


def _median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    import torch

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where that is not Linux, or not allowed, the peak is that of the process's whole life.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    """Peak bytes since `_reset_peak`: allocated on a GPU, resident on a CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
