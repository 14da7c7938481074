"""One step of `harness eval` per metric: what it resolves before the model is loaded, what it then
measures, and the rows it leaves in the table."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from harness import paths, precision
from harness.checkpoint import formats, hashes, load, quantconfig
from harness.checkpoint.load import context_length, window_length
from harness.checkpoint.weights import Weights
from harness.commands.report import row
from harness.data import corpora
from harness.errors import UserError
from harness.generation import vllm_loading
from harness.metrics import sparsity
from harness.metrics.footprint import (
    linear_shapes,
    loaded_bits_per_weight,
    memory_bytes,
    stored_size,
)


@dataclass(frozen=True)
class Step:
    """`measure` returns (table rows, details); `settings` decide whether an old result still holds;
    `tokens` is about how many the model will read, for the plan."""

    key: str
    settings: dict
    plan: str
    measure: Callable[[], tuple[list[dict], dict]]
    tokens: int = 0


class Subject:
    """The model under evaluation; everything heavy is made when first asked for."""

    def __init__(self, args):
        self.args = args
        self.folder: Path = load.resolve(args.model)
        self.config = load.load_config(self.folder)
        self.device = load.pick_device(args.device)
        self.seqlen = window_length(self.config, args.seqlen)
        quantization = paths.read_json(self.folder / "config.json").get("quantization_config")
        # How the weights are stored, one of the formats or "other", which only vLLM measures.
        self.layout = quantconfig.layout_of(quantization)
        if self.layout == "other":
            self.stored_dtype = self.config.dtype or precision.parse("float32")
        else:
            self.stored_dtype = Weights(self.folder).dtype
        self.dtype = precision.choose(args.dtype, self.stored_dtype, self.device, args.model)
        self.numerics = {
            "dtype": precision.record(self.dtype, self.stored_dtype), "load": args.load,
        }  # fmt: skip

    @cached_property
    def tokenizer(self):
        return load.load_tokenizer(self.folder)

    @cached_property
    def model(self):
        if self.args.block_by_block:
            raise UserError("--block-by-block measures perplexity and divergence only")
        return self.load(self.folder, self.args.load)

    def load(self, folder: Path, how: str | None = None):
        return load.load_model(folder, device=self.device, dtype=self.dtype, load=how)

    @cached_property
    def macs(self) -> dict[str, int]:
        from harness.checkpoint.nonuniform import skeleton
        from harness.metrics.macs import macs_per_token

        return macs_per_token(skeleton(self.config), self.seqlen, linear_shapes(self.folder))

    def stream(self, folder: Path, windows):
        """(start, logits) of the checkpoint in `folder`, a block in memory at a time."""
        from harness.blocks.decoder import stream_logits

        return stream_logits(folder, windows, device=self.device, dtype=self.dtype, batch_size=1)

    def windows(self, dataset: str, bos: bool = False):
        """Token windows int64 [N, T] of an evaluation text, and how it was cut."""
        windows = corpora.evaluation(
            self.tokenizer, dataset, seqlen=self.seqlen, limit=self.args.limit, bos=bos
        )
        corpora.check_token(int(windows.max()), self.config)
        headed = ", BOS at the head of each" if bos else ""
        return (
            windows,
            f"{corpora.protocol(dataset)}, seqlen {self.seqlen}, non-overlapping{headed}",
        )

    def with_bos(self, dataset: str, windows, logits):
        """The same with BOS at the heads, where --bos wants it: see
        :func:`harness.blocks.calibration.choose`, which asks for ``logits`` of some windows."""
        from harness.blocks.calibration import choose

        return self.windows(dataset, choose(self.args.bos, self.tokenizer, windows, logits))


def short(dataset: str) -> str:
    """A dataset's name, or a path's last part."""
    return Path(dataset).name


def footprint_step(subject: Subject, loads: bool) -> Step:
    """Sizes; `loads` says that another step loads the whole model anyway, so memory is known."""
    load = subject.args.load

    def measure():
        size = stored_size(subject.folder, subject.config)
        bits, how = size.bits_per_weight, "quantized linears with their scales and zeros"
        if bits is None:
            bits, how = size.bits_per_parameter, "not quantized"
            if subject.layout == "bitmask":
                how = "all parameters, the zeros stored away"
        stored, where = size.disk_bytes, "weight files on disk"
        memory = memory_bytes(subject.model) if loads else None
        if load:
            bits, how = loaded_bits_per_weight(subject.model), f"linears quantized on load ({load})"
            # What is not quantized counts as it is stored, whatever it is computed in.
            wider = subject.dtype.itemsize - subject.stored_dtype.itemsize
            rest = (p for p in subject.model.parameters() if p.dtype == subject.dtype)
            stored = memory - wider * sum(p.numel() for p in rest)
            where = f"quantized on load ({load}), the rest as stored"
        rows = [
            row("parameters, M", size.parameters / 1e6, 2, protocol="dense equivalent"),
            row("bits/weight", bits, 3, protocol=how, main=True),
            row("MB", stored / 1e6, 2, protocol=where, main=True),
        ]
        if memory and not load:
            kind = f"parameters and buffers, {precision.name(subject.model.dtype)}"
            rows.append(row("MB in memory", memory / 1e6, 2, protocol=kind))
        protocol = f"multiply-accumulates; attention over {subject.seqlen} keys"
        rows.append(row("MMAC/token", subject.macs["total"] / 1e6, 2, protocol=protocol))
        details = {**size.as_dict(), "memory_bytes": memory, "macs_per_token": subject.macs}
        zeros = _zeros(subject, loads and not load)
        if zeros:
            rows += _zeros_rows(subject.layout, zeros, size.disk_bytes)
            details["sparsity"] = zeros.as_dict()
        return rows, details

    settings = {**subject.numerics, "seqlen": subject.seqlen, "memory": loads}
    return Step("footprint", settings, "sizes from the files' headers", measure)


def _zeros(subject: Subject, loaded: bool) -> sparsity.Sparsity | None:
    """Zeros in the blocks, of the loaded model where there is one; None for quantized weights, of
    which many round to zero and none is stored the cheaper for it."""
    if subject.layout not in formats.PRUNED_FORMATS:
        return None
    if not loaded:
        return sparsity.of_checkpoint(subject.folder)
    return sparsity.of_model(subject.model, subject.stored_dtype.itemsize)


def _zeros_rows(layout: str, zeros: sparsity.Sparsity, disk: int) -> list[dict]:
    if zeros.share < sparsity.WORTH_SAYING:
        return []
    saved = zeros.dense_bytes - zeros.bitmask_bytes
    other = "bitmask" if layout == "dense" else "dense"
    size = disk - saved if layout == "dense" else disk + saved
    return [
        row(
            "zeros %",
            100 * zeros.share,
            2,
            protocol="of the blocks' linears; no engine here runs faster for them",
            main=True,
        ),
        row(f"MB as {other}", size / 1e6, 2, protocol=f"by harness convert --format {other}"),
    ]


def perplexity_step(subject: Subject, dataset: str) -> Step:
    from harness.losses.nll import perplexity_of_logits
    from harness.metrics.perplexity import model_logits

    args = subject.args
    windows, text = subject.windows(dataset)

    def logits(some):
        if args.block_by_block:
            return subject.stream(subject.folder, some)
        return model_logits(subject.model, some, args.batch_size or 1)

    def measure():
        chosen, text = subject.with_bos(dataset, windows, logits)
        protocol = f"token perplexity, {text}"
        result = perplexity_of_logits(logits(chosen), chosen, f"perplexity {short(dataset)}")
        samples = f"{result.windows} windows"
        name = f"PPL {short(dataset)}"
        line = row(
            name, result.value, 3, better="lower", samples=samples, protocol=protocol, main=True
        )
        return [line], asdict(result)

    settings = {
        **subject.numerics, "protocol": f"token perplexity, {text}", "windows": len(windows),
        "tokens": hashes.tokens_hash(windows), "bos": args.bos,
    }  # fmt: skip
    plan = f"{len(windows)} windows of {subject.seqlen} tokens, {corpora.protocol(dataset)}"
    return Step(f"ppl:{dataset}", settings, plan, measure, windows.numel())


def choice_step(subject: Subject, dataset: str) -> Step:
    from harness.metrics import multiple_choice

    args = subject.args
    questions = corpora.questions(dataset)
    if args.limit and args.limit < len(questions):
        questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]

    def measure():
        batch = args.batch_size or 16
        result = multiple_choice.score(subject.model, subject.tokenizer, questions, batch)
        samples = f"{result['n']} questions, chance {100 * result['chance']:.0f} %"
        how = {"better": "higher", "samples": samples, "protocol": multiple_choice.PROTOCOL}
        rows = [
            row(f"{short(dataset)} %", 100 * result["acc"], 2, main=True, **how),
            row(f"{short(dataset)} norm %", 100 * result["acc_norm"], 2, **how),
        ]
        return rows, result

    asked = hashes.text_hash(repr(questions))
    settings = {**subject.numerics, "questions": len(questions), "content": asked}
    return Step(f"choice:{dataset}", settings, f"{len(questions)} questions", measure)


def mmlu_step(subject: Subject) -> Step:
    from harness.metrics import mmlu, mmlu_data

    args = subject.args
    source = None if args.mmlu == "hub" else args.mmlu
    subjects = mmlu_data.take(mmlu_data.read(source), args.limit)
    shots = mmlu.PROMPTS[args.mmlu_prompt] if args.shots is None else args.shots
    window = min(mmlu.WINDOW, context_length(subject.config) or mmlu.WINDOW)
    count = sum(len(s.questions) for s in subjects)

    def measure():
        result = mmlu.mmlu(
            subject.model,
            subject.tokenizer,
            subjects,
            shots=shots,
            prompt=args.mmlu_prompt,
            window=window,
            batch_size=args.batch_size or 8,
        )
        protocol = f"{shots}-shot, {args.mmlu_prompt} prompt, window {window}"
        if result["fewer_shots"]:
            protocol += f"; {result['fewer_shots']} questions with fewer shots"
        if result["cut"]:
            protocol += f", {result['cut']} of them cut"
        how = {"better": "higher", "samples": f"{result['n']} questions"}
        rows = [row("MMLU %", 100 * result["micro"], 2, protocol=protocol, main=True, **how)]
        how["samples"] = f"{len(result['subjects'])} subjects"
        rows.append(row("MMLU macro %", 100 * result["macro"], 2, **how))
        for name, part in result["categories"].items():
            how["samples"] = f"{part['n']} questions"
            rows.append(row(f"MMLU {name} %", 100 * part["acc"], 2, **how))
        return rows, result

    settings = {
        **subject.numerics,
        "questions": count,
        "content": hashes.text_hash(repr(subjects)),
        "shots": shots,
        "prompt": args.mmlu_prompt,
        "window": window,
    }
    plan = f"{count} questions of {len(subjects)} subjects, {shots} shots"
    return Step("mmlu", settings, plan, measure, count * window)


def tasks_step(subject: Subject) -> Step:
    from harness.metrics import tasks

    args = subject.args
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    tasks.check(names)

    def measure():
        batch = args.batch_size or 8
        results = tasks.zero_shot(
            subject.model, subject.tokenizer, names, limit=args.limit, batch_size=batch
        )
        rows, firsts = [], []
        for name, result in results.items():
            first = "acc_norm" if "acc_norm" in result else "acc"
            for metric in ("acc", "acc_norm"):
                if metric in result:
                    samples = f"{result['n']} questions"
                    protocol = f"lm-eval task version {result['version']}, 0-shot"
                    line = row(
                        f"{name} {metric} %",
                        100 * result[metric],
                        2,
                        better="higher",
                        samples=samples,
                        protocol=protocol,
                        main=metric == first,
                    )
                    rows.append(line)
            if first in result:
                firsts.append(result[first])
        if len(firsts) > 1:
            mean = 100 * sum(firsts) / len(firsts)
            protocol = "mean of the tasks' acc_norm, else acc"
            line = row("zero-shot %", mean, 2, better="higher", protocol=protocol, main=True)
            rows.append(line)
        return rows, results

    settings = {
        **subject.numerics, "tasks": names, "limit": args.limit, "lm_eval": tasks.version(),
    }  # fmt: skip
    return Step("tasks", settings, f"lm-eval: {', '.join(names)}", measure)


def divergence_step(subject: Subject, dataset: str) -> Step:
    from harness.metrics import distance

    args = subject.args
    dense = load.resolve(args.divergence_from)
    windows, text = subject.windows(dataset)

    def measure():
        from harness.metrics.perplexity import model_logits

        if args.block_by_block:
            asked = partial(subject.stream, dense)
            chosen, text = subject.with_bos(dataset, windows, asked)
            streams = [subject.stream(folder, chosen) for folder in (dense, subject.folder)]
            result = distance.compare_logits(*streams, windows=len(chosen))
        else:
            teacher = subject.load(dense)
            chosen, text = subject.with_bos(dataset, windows, partial(model_logits, teacher))
            result = distance.compare_models(teacher, subject.model, chosen, args.batch_size or 1)
        how = {"samples": f"{len(chosen)} windows", "protocol": f"per token, {text}"}
        name = short(args.divergence_from)
        low, high = {"better": "lower", **how}, {"better": "higher", **how}
        rows = [
            row(f"KL from {name}, nats", result.forward_kl, 5, main=True, **low),
            row(f"reverse KL from {name}, nats", result.reverse_kl, 5, **low),
            row(f"top-1 as {name} %", 100 * result.top1_agreement, 2, main=True, **high),
        ]
        return rows, asdict(result)

    settings = {**subject.numerics, "text": text, "windows": len(windows)}
    settings |= {
        "tokens": hashes.tokens_hash(windows), "bos": args.bos, "dense": hashes.of_model(dense),
    }  # fmt: skip
    plan = f"{len(windows)} windows of {subject.seqlen} tokens against {args.divergence_from}"
    return Step("divergence", settings, plan, measure, 2 * windows.numel())


def speed_step(subject: Subject) -> Step:
    import torch

    from harness.metrics import speed

    args = subject.args
    prompt, new = speed.lengths(context_length(subject.config))
    batch = args.batch_size or 1
    if args.engine == "vllm" and args.load:
        raise UserError("--load is for --engine transformers; vLLM reads the checkpoint itself")
    if args.engine == "vllm" and subject.layout == "bitmask":
        raise UserError(
            f"vLLM does not read bitmask checkpoints; make it dense first: harness convert "
            f"{args.model} --format dense --out DENSE"
        )
    if args.engine == "vllm":
        vllm_loading.check(subject.folder)

    def measure():
        sizes = {"batch_size": batch, "prompt": prompt, "new": new, "seed": args.seed}
        if args.engine == "vllm":
            dtype = args.dtype if subject.layout != "dense" else precision.name(subject.dtype)
            result = speed.measure_vllm(subject.folder, dtype=dtype, **sizes)
        else:
            result = speed.measure(subject.model, **sizes)
        protocol = f"{args.engine} on {result.device}, batch {batch}, median of {result.repeats}"
        if args.engine == "transformers" and subject.layout not in formats.PRUNED_FORMATS:
            protocol += "; weights dequantized on load, so as slow as dense"
        share = 100 * result.read_gb_s / result.copy_gb_s
        step_ms = 1e3 * batch / result.decode_tokens_s
        seconds = result.first_token_s + (new - 1) * step_ms / 1e3
        high, low = {"better": "higher"}, {"better": "lower"}
        with_new, with_prompt = {"samples": f"{new} tokens"}, {"samples": f"{prompt} tokens"}
        rows = [
            row("decode tokens/s", result.decode_tokens_s, 1, main=True, **high, **with_new),
            row("prefill tokens/s", result.prefill_tokens_s, 1, **high, **with_prompt),
            row("first token, ms", 1e3 * result.first_token_s, 2, **low, **with_prompt),
            row("decode, ms/token", step_ms, 2, **low, **with_new),
            row("generation, s", seconds, 3, samples=f"{prompt} + {new} tokens", **low),
        ]
        for line in rows:
            line["protocol"] = protocol
        if result.peak_memory_bytes:
            kind = "allocated" if "cuda" in result.device else "resident"
            rows.append(
                row("peak memory, MB", result.peak_memory_bytes / 1e6, 1, protocol=kind, **low)
            )
        bandwidth = f"{share:.0f} % of a copy's {result.copy_gb_s:.1f} GB/s on this machine"
        rows.append(row("weights read, GB/s", result.read_gb_s, 2, protocol=bandwidth, **high))
        return rows, result.as_dict() | {"decode_ms_token": step_ms, "generation_s": seconds}

    settings = {
        **subject.numerics,
        "engine": args.engine,
        "device": subject.device,
        "batch_size": batch,
        "prompt": prompt,
        "new": new,
        "seed": args.seed,
        "machine": [platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
    }
    plan = f"{args.engine}, prompt {prompt}, {new} new tokens, batch {batch}"
    return Step("speed", settings, plan, measure)
