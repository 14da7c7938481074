"""`harness eval`: resolve every metric, then measure one after another, saving after each.

The results file of a model accumulates: what was measured with the same settings is not measured
again, so an interrupted evaluation goes on where it stopped.
"""

import json
import os
import sys
import time
from pathlib import Path

from harness import distributed, paths, precision
from harness.checkpoint import card, recipe, runs
from harness.commands import report
from harness.commands.eval_steps import (
    Step,
    Subject,
    choice_step,
    divergence_step,
    footprint_step,
    mmlu_step,
    perplexity_step,
    speed_step,
    tasks_step,
)
from harness.errors import UserError

DEFAULT_TEXT = "stdlib"
DEFAULT_QUIZ = "stdlib-quiz"


def evaluate(args) -> int:
    """Body of `harness eval`; `args` as cli.py parses them. Prints the table; returns 0."""
    _check(args)
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    subject = Subject(args)
    name = Path(args.model).resolve().name + (f"-{args.load}" if args.load else "")
    path = results_path(args, subject.folder, name)
    paths.check_place(path)
    if not args.dry_run:
        runs.RunFolder(path, kind=None).hold()
    results = open_results(path, name, subject.folder, args.overwrite)
    steps = plan(subject)
    if args.dry_run:
        print(describe(subject, steps, path))
        return 0
    for step in steps:
        settings = json.loads(json.dumps(step.settings))
        old = results["metrics"].get(step.key)
        if old and args.resume and old["settings"] == settings:
            print(
                f"{step.key}: measured before, kept (--overwrite measures again)", file=sys.stderr
            )
            continue
        start = time.perf_counter()
        rows, details = step.measure()
        results["metrics"][step.key] = {
            "settings": settings,
            "seconds": round(time.perf_counter() - start, 3),
            "rows": rows,
            "details": details,
            **report.provenance(card.command_line()),
        }
        report.save(results, path)
    print(f"{report.markdown(results)}\n{report.dtypes(results)}")
    if args.mmlu and "mmlu" in results["metrics"]:
        print("\n" + report.accuracy_table(results["metrics"]["mmlu"]["details"]["subjects"]))
    if path.parent == subject.folder and report.update_card(subject.folder, results):
        print(f"\nresults: {path}, and the Evaluation section of {subject.folder / 'README.md'}")
    else:
        print(f"\nresults: {path}")
    return 0


def _check(args) -> None:
    """Refuse what cannot be before anything is read."""
    whole = {
        "--mmlu": args.mmlu,
        "--choice": args.choice is not None,
        "--tasks": args.tasks,
        "--speed": args.speed and args.engine == "transformers",
        "--load": args.load,
    }
    asked = [flag for flag, value in whole.items() if value]
    if args.block_by_block and asked:
        raise UserError(
            f"--block-by-block measures perplexity and divergence only; leave out {asked[0]}"
        )
    for flag in ("limit", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected 1 or more")
    if args.shots is not None and args.shots < 0:
        raise UserError(f"--shots {args.shots}: expected 0 or more")


def plan(subject: Subject) -> list[Step]:
    """All steps asked for, data resolved; with no metric named, perplexity on the stdlib corpus."""
    args = subject.args
    named = (args.ppl, args.choice, args.mmlu, args.tasks, args.divergence_from)
    texts = args.ppl
    if texts == [] or (all(flag is None for flag in named) and not args.speed):
        texts = [DEFAULT_TEXT]
    texts = texts or []
    quizzes = [DEFAULT_QUIZ] if args.choice == [] else args.choice or []
    steps = [perplexity_step(subject, text) for text in texts]
    steps += [choice_step(subject, quiz) for quiz in quizzes]
    if args.mmlu:
        steps.append(mmlu_step(subject))
    if args.tasks:
        steps.append(tasks_step(subject))
    if args.divergence_from:
        steps.append(divergence_step(subject, texts[0] if texts else DEFAULT_TEXT))
    if args.speed:
        steps.append(speed_step(subject))
    only_vllm = args.speed and args.engine == "vllm" and len(steps) == 1
    sizes = footprint_step(subject, loads=not (args.block_by_block or only_vllm))
    # vLLM last: it takes what memory it finds.
    return [sizes, *steps]


def results_path(args, folder: Path, name: str) -> Path:
    """--out; else results.json in a checkpoint folder of ours; else results/NAME.json here."""
    if args.out:
        path = Path(args.out)
        return path / "results.json" if path.is_dir() else path
    ours = Path(args.model).is_dir() and recipe.is_ours(folder)
    if ours and not args.load and os.access(folder, os.W_OK):
        return folder / "results.json"
    return Path("results") / f"{name}.json"


def open_results(path: Path, name: str, folder: Path, overwrite: bool) -> dict:
    """The results to add to: those in `path` when they are of the same model, else new ones.

    Raises UserError when `path` holds another model's results and `overwrite` is False.
    """
    results = report.new_results(name, folder)
    if overwrite or not path.exists():
        return results
    old = report.load(path)
    if old["schema"] < report.SCHEMA:
        distributed.say(f"{path} does not tell what its numbers were measured on: measuring anew")
        return results
    if old["model"] != results["model"]:
        raise UserError(
            f"{path} holds results of another model ({old['model']['name']}); choose another --out "
            "or replace it with --overwrite"
        )
    return {**results, "metrics": old["metrics"]}


def describe(subject: Subject, steps: list[Step], path: Path) -> str:
    """The plan of a dry run: what would be measured on what, memory, arithmetic."""
    from harness.checkpoint.nonuniform import skeleton

    parameters = sum(p.numel() for p in skeleton(subject.config).parameters())
    size = parameters * subject.dtype.itemsize / 1e9
    logits = subject.seqlen * subject.config.get_text_config().vocab_size * 4 / 1e9
    lines = [
        f"model {subject.args.model}: {parameters / 1e6:,.1f} M parameters, "
        f"{precision.name(subject.dtype)} on {subject.device}",
        f"memory: about {size:.2f} GB of weights (one block of them with --block-by-block) + "
        f"{logits:.2f} GB of logits per window",
    ]
    for step in steps:
        work = f"; about {subject.macs['total'] * step.tokens / 1e12:,.2f} TMAC"
        lines.append(f"{step.key}: {step.plan}{work if step.tokens else ''}")
    return "\n".join([*lines, f"results would go to {path}"])
