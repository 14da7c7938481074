"""One step of `harness eval` per metric: what it resolves before the model is loaded, what it then
measures, and the rows it leaves in the table."""

import os
import platform
from dataclasses import asdict
from functools import partial

from harness import precision
from harness.checkpoint import hashes, layouts, load
from harness.checkpoint.load import context_length
from harness.commands.eval_subject import Step, Subject, short
from harness.commands.report import row
from harness.data import corpora
from harness.errors import UserError
from harness.generation import vllm_loading
from harness.metrics import sparsity
from harness.metrics.footprint import loaded_bits_per_weight, memory_bytes, stored_size


def footprint_step(subject: Subject, loads: bool) -> Step:
    """Sizes; `loads` says that another step loads the whole model anyway, so memory is known."""
    load = subject.settings.load

    def measure():
        size = stored_size(subject.folder, subject.config)
        bits, how = size.bits_per_weight, "quantized linears with their scales and zeros"
        if bits is None:
            bits, how = size.bits_per_parameter, "not quantized"
            if layouts.of(subject.layout).HOLDS == "zeros":
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
    if subject.layout not in layouts.PRUNED:
        return None
    if not loaded:
        return sparsity.of_checkpoint(subject.folder)
    return sparsity.of_model(subject.model, subject.stored_dtype.itemsize)


def _zeros_rows(layout: str, zeros: sparsity.Sparsity, disk: int) -> list[dict]:
    if zeros.share < sparsity.WORTH_SAYING:
        return []
    other, size = sparsity.stored_otherwise(zeros, layout, disk)
    protocol = "of the blocks' linears; no engine here runs faster for them"
    return [
        row("zeros %", 100 * zeros.share, 2, protocol=protocol, main=True),
        row(f"MB as {other}", size / 1e6, 2, protocol=f"by harness convert --format {other}"),
    ]


def perplexity_step(subject: Subject, dataset: str) -> Step:
    from harness.losses.nll import perplexity_of_logits
    from harness.metrics.perplexity import model_logits

    asked = subject.settings
    windows, text = subject.windows(dataset)

    def logits(some):
        if asked.block_by_block:
            return subject.stream(subject.folder, some)
        return model_logits(subject.model, some, asked.batch_size or 1)

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
        "tokens": hashes.tokens_hash(windows), "bos": asked.bos,
    }  # fmt: skip
    plan = f"{len(windows)} windows of {subject.seqlen} tokens, {corpora.protocol(dataset)}"
    return Step(f"ppl:{dataset}", settings, plan, measure, windows.numel())


def choice_step(subject: Subject, dataset: str) -> Step:
    from harness.metrics import multiple_choice

    asked = subject.settings
    questions = corpora.questions(dataset)
    if asked.limit and asked.limit < len(questions):
        questions = [questions[i * len(questions) // asked.limit] for i in range(asked.limit)]

    def measure():
        batch = asked.batch_size or 16
        result = multiple_choice.score(subject.model, subject.tokenizer, questions, batch)
        samples = f"{result['n']} questions, chance {100 * result['chance']:.0f} %"
        how = {"better": "higher", "samples": samples, "protocol": multiple_choice.PROTOCOL}
        rows = [
            row(f"{short(dataset)} %", 100 * result["acc"], 2, main=True, **how),
            row(f"{short(dataset)} norm %", 100 * result["acc_norm"], 2, **how),
        ]
        return rows, result

    content = hashes.text_hash(repr(questions))
    settings = {**subject.numerics, "questions": len(questions), "content": content}
    return Step(f"choice:{dataset}", settings, f"{len(questions)} questions", measure)


def mmlu_step(subject: Subject) -> Step:
    from harness.metrics import mmlu, mmlu_data

    asked = subject.settings
    source = None if asked.mmlu == "hub" else asked.mmlu
    subjects = mmlu_data.take(mmlu_data.read(source), asked.limit)
    shots = mmlu.PROMPTS[asked.mmlu_prompt] if asked.shots is None else asked.shots
    window = min(mmlu.WINDOW, context_length(subject.config) or mmlu.WINDOW)
    count = sum(len(s.questions) for s in subjects)

    def measure():
        result = mmlu.mmlu(
            subject.model, subject.tokenizer, subjects, shots=shots, prompt=asked.mmlu_prompt,
            window=window, batch_size=asked.batch_size or 8,
        )  # fmt: skip
        protocol = f"{shots}-shot, {asked.mmlu_prompt} prompt, window {window}"
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
        **subject.numerics, "questions": count, "content": hashes.text_hash(repr(subjects)),
        "shots": shots, "prompt": asked.mmlu_prompt, "window": window,
    }  # fmt: skip
    plan = f"{count} questions of {len(subjects)} subjects, {shots} shots"
    return Step("mmlu", settings, plan, measure, count * window)


def tasks_step(subject: Subject) -> Step:
    from harness.metrics import tasks

    asked = subject.settings
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    tasks.check(names)

    def measure():
        batch = asked.batch_size or 8
        results = tasks.zero_shot(
            subject.model, subject.tokenizer, names, limit=asked.limit, batch_size=batch
        )
        rows, firsts = [], []
        for name, result in results.items():
            first = "acc_norm" if "acc_norm" in result else "acc"
            how = {"better": "higher", "samples": f"{result['n']} questions"}
            how["protocol"] = f"lm-eval task version {result['version']}, 0-shot"
            rows += [
                row(f"{name} {metric} %", 100 * result[metric], 2, main=metric == first, **how)
                for metric in ("acc", "acc_norm")
                if metric in result
            ]
            if first in result:
                firsts.append(result[first])
        if len(firsts) > 1:
            mean = 100 * sum(firsts) / len(firsts)
            protocol = "mean of the tasks' acc_norm, else acc"
            line = row("zero-shot %", mean, 2, better="higher", protocol=protocol, main=True)
            rows.append(line)
        return rows, results

    settings = {
        **subject.numerics, "tasks": names, "limit": asked.limit, "lm_eval": tasks.version(),
    }  # fmt: skip
    return Step("tasks", settings, f"lm-eval: {', '.join(names)}", measure)


def divergence_step(subject: Subject, dataset: str) -> Step:
    from harness.metrics import distance

    asked = subject.settings
    dense = load.resolve(asked.divergence_from)
    windows, text = subject.windows(dataset)

    def measure():
        from harness.metrics.perplexity import model_logits

        if asked.block_by_block:
            logits = partial(subject.stream, dense)
            chosen, text = subject.with_bos(dataset, windows, logits)
            streams = [subject.stream(folder, chosen) for folder in (dense, subject.folder)]
            result = distance.compare_logits(*streams, windows=len(chosen))
        else:
            teacher = subject.load(dense)
            chosen, text = subject.with_bos(dataset, windows, partial(model_logits, teacher))
            result = distance.compare_models(teacher, subject.model, chosen, asked.batch_size or 1)
        how = {"samples": f"{len(chosen)} windows", "protocol": f"per token, {text}"}
        name = short(asked.divergence_from)
        low, high = {"better": "lower", **how}, {"better": "higher", **how}
        rows = [
            row(f"KL from {name}, nats", result.forward_kl, 5, main=True, **low),
            row(f"reverse KL from {name}, nats", result.reverse_kl, 5, **low),
            row(f"top-1 as {name} %", 100 * result.top1_agreement, 2, main=True, **high),
        ]
        return rows, asdict(result)

    settings = {**subject.numerics, "text": text, "windows": len(windows)}
    settings |= {
        "tokens": hashes.tokens_hash(windows), "bos": asked.bos, "dense": hashes.of_model(dense),
    }  # fmt: skip
    plan = f"{len(windows)} windows of {subject.seqlen} tokens against {asked.divergence_from}"
    return Step("divergence", settings, plan, measure, 2 * windows.numel())


def speed_step(subject: Subject) -> Step:
    import torch

    from harness.metrics import speed

    asked = subject.settings
    prompt, new = speed.lengths(context_length(subject.config))
    batch = asked.batch_size or 1
    if asked.engine == "vllm" and asked.load:
        raise UserError("--load is for --engine transformers; vLLM reads the checkpoint itself")
    if asked.engine == "vllm" and layouts.of(subject.layout).HOLDS == "zeros":
        raise UserError(
            f"vLLM does not read bitmask checkpoints; make it dense first: harness convert "
            f"{asked.model} --format dense --out DENSE"
        )
    if asked.engine == "vllm":
        vllm_loading.check(subject.folder)

    def measure():
        sizes = {"batch_size": batch, "prompt": prompt, "new": new, "seed": asked.seed}
        if asked.engine == "vllm":
            dtype = (
                asked.dtype if layouts.of(subject.layout).MARK else precision.name(subject.dtype)
            )
            result = speed.measure_vllm(subject.folder, dtype=dtype, **sizes)
        else:
            result = speed.measure(subject.model, **sizes)
        protocol = f"{asked.engine} on {result.device}, batch {batch}, median of {result.repeats}"
        if asked.engine == "transformers" and subject.layout not in layouts.PRUNED:
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
        **subject.numerics, "engine": asked.engine, "device": subject.device, "batch_size": batch,
        "prompt": prompt, "new": new, "seed": asked.seed,
        "machine": [platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
    }  # fmt: skip
    plan = f"{asked.engine}, prompt {prompt}, {new} new tokens, batch {batch}"
    return Step("speed", settings, plan, measure)
