"""What the command ``minillm.evaluate`` does: respond, score, add to the model's results file.

Each seed's score is in the file as soon as it is known; a run that is repeated takes it from there.
"""

import hashlib
import json
import statistics
import time
from pathlib import Path

import torch.distributed as dist

import harness.commands.evaluate
from harness import distributed, paths, precision
from harness.checkpoint import card, load, runs
from harness.checkpoint.weights import Weights
from harness.commands import report
from harness.generation import responses
from harness.metrics.rouge import rouge_l
from minillm import eval_sets, generate_run

SHOWN = 3  # responses that are kept for a look
# What names a measurement, beside its data: the rest does not change it.
SETTINGS = ("dev_num", "engine", "temperature", "top_p", "top_k", "no_repeat_ngram_size")


def run(settings) -> tuple[dict, Path] | None:
    """What the command does with a `minillm.evaluate.Settings`, on every rank.

    Returns:
        The results, as `commands.report` has them, and the file they are in; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(load.pick_device(settings.device))
    source = load.resolve(settings.model)
    settings, sampling = generate_run.resolved(settings, source, device)
    seeds = list(dict.fromkeys(settings.seeds))
    names = list(dict.fromkeys(n for some in settings.data for n in some.split(",") if n))
    tokenizer = load.load_tokenizer(source)
    sets = {name: eval_sets.load(name)[: settings.dev_num] for name in names}
    shorter = {
        name: generate_run.shorter(settings, name, tokenizer, [prompt for prompt, _ in pairs])
        for name, pairs in sets.items()
    }
    for name, (kept, _) in shorter.items():
        lost = generate_run.left_out(len(sets[name]) - len(kept), settings)
        distributed.say(f"{name}: {len(kept)} prompts, {len(seeds)} seeds{lost}")
    named = Path(settings.model).resolve().name
    path = harness.commands.evaluate.results_path(settings.out, settings.model, source, named)
    paths.check_place(path)
    if not settings.dry_run:
        distributed.lead(runs.RunFolder(path, kind=None).hold)
    results = distributed.lead(
        lambda: harness.commands.evaluate.open_results(path, named, source, settings.overwrite)
    )
    if settings.dry_run:
        print(f"results would go to {path}")
        return None
    ask = None
    for name, pairs in sets.items():
        kept, prompts = shorter[name]
        references = [pairs[index][1] for index in kept]
        metric = _metric(settings, name, sampling, prompts, references, len(pairs))
        old = results["metrics"].get(f"rouge-l {name}")
        if old and settings.resume and old["settings"] == metric["settings"]:
            metric = old
        known = metric["details"]["seeds"]
        for seed in seeds:
            if str(seed) in known:
                distributed.say(f"{name}, seed {seed}: measured before, kept")
                continue
            ask = ask or generate_run.open_engine(settings, source, device, tokenizer, sampling)
            start = time.perf_counter()
            said = _responses(ask, tokenizer, prompts, seed, settings.batch_size, name)
            known[str(seed)] = rouge_l(said, references)
            distributed.say(f"{name}, seed {seed}: Rouge-L {known[str(seed)]:.2f}")
            metric["seconds"] = round(metric["seconds"] + time.perf_counter() - start, 3)
            metric["details"]["responses"] = [
                {"prompt": pairs[index][0], "response": text}
                for index, text in zip(kept[:SHOWN], said[:SHOWN], strict=True)
            ]
            metric["rows"] = _rows(name, metric)
            metric |= report.provenance(card.command_line())
            results["metrics"][f"rouge-l {name}"] = metric
            distributed.lead(lambda: report.save(results, path))
    if path.parent == source:
        distributed.lead(lambda: report.update_card(source, results))
    return results, path


def _metric(settings, name, sampling, prompts, references, rows: int) -> dict:
    """A metric of a results file, nothing measured yet."""
    stored = Weights(load.resolve(settings.model)).dtype
    named = {key: getattr(settings, key) for key in SETTINGS} | {
        "dtype": {"computed": settings.dtype, "stored": precision.name(stored)},
        "max_length": settings.max_length, "max_prompt_length": settings.max_prompt_length,
    }  # fmt: skip
    asked = json.dumps([prompts, references]).encode()
    named["data"] = {"name": name, "hash": hashlib.sha256(asked).hexdigest()[:16]}
    cut = (
        f"top-p {settings.top_p:g}" * (settings.top_p < 1),
        f"top-k {settings.top_k}" * bool(settings.top_k),
        f"no {sampling.no_repeat} tokens in a row twice" * bool(sampling.no_repeat),
    )
    protocol = ", ".join(
        ["F of stemmed words, the best reference", f"temperature {settings.temperature:g}"]
        + [part for part in cut if part]
        + [f"at most {sampling.new_tokens} new tokens"]
    )
    details = {
        "seeds": {}, "prompts": len(prompts), "left_out": rows - len(prompts), "protocol": protocol,
    }  # fmt: skip
    return {"settings": named, "seconds": 0.0, "rows": [], "details": details}


def _rows(name: str, metric: dict) -> list[dict]:
    details = metric["details"]
    values = list(details["seeds"].values())
    samples = f"{details['prompts']} prompts x {len(values)} seeds"
    row = report.row(
        f"Rouge-L {name}", statistics.fmean(values), 2, better="higher", samples=samples,
        protocol=details["protocol"], main=True,
    )  # fmt: skip
    if len(values) < 2:
        return [row]
    deviation = statistics.stdev(values)
    return [row, report.row(f"Rouge-L {name}, standard deviation", deviation, 2, samples=samples)]


def _responses(ask, tokenizer, prompts, seed: int, batch: int, name: str) -> list[str]:
    """Responses to all prompts, in their order, on every rank."""
    groups = responses.batches(prompts, batch)
    found = {}
    for group, said in responses.respond(ask, prompts, seed, groups, f"{name}, seed {seed}"):
        read = tokenizer.batch_decode(said, skip_special_tokens=True)
        found |= dict(zip(group, read, strict=True))
    if distributed.world_size() > 1:
        parts = [None] * distributed.world_size()
        dist.all_gather_object(parts, found)
        found = {index: text for part in parts for index, text in part.items()}
    return [found[index] for index in range(len(prompts))]
