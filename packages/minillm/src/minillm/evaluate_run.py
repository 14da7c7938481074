"""What the command ``minillm.evaluate`` does: respond, score, add to the model's results file.

Each seed's score is in the file as soon as it is known; a run that is repeated takes it from there.
"""

import hashlib
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

import harness.commands.evaluate
from harness import distributed, paths, precision
from harness.checkpoint import card, load, runs
from harness.checkpoint.weights import Weights
from harness.commands import report
from harness.errors import UserError
from harness.generation import responses
from harness.generation.vllm_loading import dtype_for
from harness.metrics.rouge import rouge_l
from minillm import eval_sets, generate_run

SHOWN = 3  # responses that are kept for a look
# What names a measurement, beside its data: the rest does not change it.
SETTINGS = ("dev_num", "engine", "temperature", "top_p", "top_k", "no_repeat_ngram_size")


def evaluate(args) -> tuple[dict, Path] | None:
    """Run the command with its parsed arguments, on every rank.

    Returns:
        The results, as `commands.report` has them, and the file they are in; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    device = distributed.start(load.pick_device(args.device))
    source = load.resolve(args.model)
    if args.dev_num is not None and args.dev_num < 1:
        raise UserError(f"--dev-num {args.dev_num}: at least 1.")
    args.dtype = dtype_for(args.engine, args.dtype, source, device, args.model)
    seeds = list(dict.fromkeys(args.seeds))
    names = list(dict.fromkeys(n for some in args.data for n in some.split(",") if n))
    sampling, longest = generate_run.how(args, source)
    tokenizer = load.load_tokenizer(source)
    sets = {name: eval_sets.load(name)[: args.dev_num] for name in names}
    shorter = {
        name: generate_run.short(args, name, tokenizer, [prompt for prompt, _ in pairs])
        for name, pairs in sets.items()
    }
    for name, (kept, _) in shorter.items():
        lost = generate_run.left_out(len(sets[name]) - len(kept), args)
        distributed.say(f"{name}: {len(kept)} prompts, {len(seeds)} seeds{lost}")
    named = Path(args.model).resolve().name
    where = SimpleNamespace(out=args.out, model=args.model, load=None)
    path = harness.commands.evaluate.results_path(where, source, named)
    paths.check_place(path)
    if not args.dry_run:
        distributed.lead(runs.RunFolder(path, kind=None).hold)
    results = distributed.lead(
        lambda: harness.commands.evaluate.open_results(path, named, source, args.overwrite)
    )
    if args.dry_run:
        print(f"results would go to {path}")
        return None
    ask = None
    for name, pairs in sets.items():
        kept, prompts = shorter[name]
        references = [pairs[index][1] for index in kept]
        metric = _metric(args, name, sampling, longest, prompts, references, len(pairs))
        old = results["metrics"].get(f"rouge-l {name}")
        if old and args.resume and old["settings"] == metric["settings"]:
            metric = old
        known = metric["details"]["seeds"]
        for seed in seeds:
            if str(seed) in known:
                distributed.say(f"{name}, seed {seed}: measured before, kept")
                continue
            ask = ask or responses.open_engine(args, source, device, tokenizer, sampling, longest)
            start = time.perf_counter()
            said = _responses(ask, tokenizer, prompts, seed, args.batch_size, name)
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


def _metric(args, name, sampling, longest, prompts, references, rows: int) -> dict:
    """A metric of a results file, nothing measured yet."""
    settings = {key: getattr(args, key) for key in SETTINGS}
    stored = Weights(load.resolve(args.model)).dtype
    settings["dtype"] = {"computed": args.dtype, "stored": precision.name(stored)}
    settings |= {"max_length": longest, "max_prompt_length": args.max_prompt_length}
    asked = json.dumps([prompts, references]).encode()
    settings["data"] = {"name": name, "hash": hashlib.sha256(asked).hexdigest()[:16]}
    cut = (
        f"top-p {args.top_p:g}" * (args.top_p < 1),
        f"top-k {args.top_k}" * bool(args.top_k),
        f"no {sampling.no_repeat} tokens in a row twice" * bool(sampling.no_repeat),
    )
    protocol = ", ".join(
        ["F of stemmed words, the best reference", f"temperature {args.temperature:g}"]
        + [part for part in cut if part]
        + [f"at most {sampling.new_tokens} new tokens"]
    )
    details = {
        "seeds": {}, "prompts": len(prompts), "left_out": rows - len(prompts), "protocol": protocol,
    }  # fmt: skip
    return {"settings": settings, "seconds": 0.0, "rows": [], "details": details}


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
