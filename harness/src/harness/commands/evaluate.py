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
from harness.commands.eval_settings import EvalSettings
from harness.commands.eval_steps import (
    choice_step,
    divergence_step,
    footprint_step,
    mmlu_step,
    perplexity_step,
    speed_step,
    tasks_step,
)
from harness.commands.eval_subject import Step, Subject
from harness.errors import UserError

DEFAULT_TEXT = "stdlib"
DEFAULT_QUIZ = "stdlib-quiz"


def evaluate(settings: EvalSettings) -> int:
    """Body of `harness eval`. Prints the table; returns 0."""
    _check(settings)
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    subject = Subject(settings)
    name = Path(settings.model).resolve().name + (f"-{settings.load}" if settings.load else "")
    path = results_path(settings.out, settings.model, subject.folder, name, settings.load)
    paths.check_place(path)
    if not settings.dry_run:
        runs.RunFolder(path, kind=None).hold()
    results = open_results(path, name, subject.folder, settings.overwrite)
    steps = plan(subject)
    if settings.dry_run:
        print(describe(subject, steps, path))
        return 0
    for step in steps:
        asked = json.loads(json.dumps(step.settings))
        old = results["metrics"].get(step.key)
        if old and settings.resume and old["settings"] == asked:
            print(
                f"{step.key}: measured before, kept (--overwrite measures again)", file=sys.stderr
            )
            continue
        start = time.perf_counter()
        rows, details = step.measure()
        results["metrics"][step.key] = {
            "settings": asked,
            "seconds": round(time.perf_counter() - start, 3),
            "rows": rows,
            "details": details,
            **report.provenance(card.command_line()),
        }
        report.save(results, path)
    print(f"{report.markdown(results)}\n{report.dtypes(results)}")
    if settings.mmlu and "mmlu" in results["metrics"]:
        print("\n" + report.accuracy_table(results["metrics"]["mmlu"]["details"]["subjects"]))
    if path.parent == subject.folder and report.update_card(subject.folder, results):
        print(f"\nresults: {path}, and the Evaluation section of {subject.folder / 'README.md'}")
    else:
        print(f"\nresults: {path}")
    return 0


def _check(settings: EvalSettings) -> None:
    """Refuse what cannot be before anything is read."""
    whole = {
        "--mmlu": settings.mmlu,
        "--choice": settings.choice is not None,
        "--tasks": settings.tasks,
        "--speed": settings.speed and settings.engine == "transformers",
        "--load": settings.load,
    }
    asked = [flag for flag, value in whole.items() if value]
    if settings.block_by_block and asked:
        raise UserError(
            f"--block-by-block measures perplexity and divergence only; leave out {asked[0]}"
        )


def plan(subject: Subject) -> list[Step]:
    """All steps asked for, data resolved; with no metric named, perplexity on the stdlib corpus."""
    asked = subject.settings
    named = (asked.ppl, asked.choice, asked.mmlu, asked.tasks, asked.divergence_from)
    texts = asked.ppl
    if texts == [] or (all(flag is None for flag in named) and not asked.speed):
        texts = [DEFAULT_TEXT]
    texts = texts or []
    quizzes = [DEFAULT_QUIZ] if asked.choice == [] else asked.choice or []
    steps = [perplexity_step(subject, text) for text in texts]
    steps += [choice_step(subject, quiz) for quiz in quizzes]
    if asked.mmlu:
        steps.append(mmlu_step(subject))
    if asked.tasks:
        steps.append(tasks_step(subject))
    if asked.divergence_from:
        steps.append(divergence_step(subject, texts[0] if texts else DEFAULT_TEXT))
    if asked.speed:
        steps.append(speed_step(subject))
    only_vllm = asked.speed and asked.engine == "vllm" and len(steps) == 1
    sizes = footprint_step(subject, loads=not (asked.block_by_block or only_vllm))
    # vLLM last: it takes what memory it finds.
    return [sizes, *steps]


def results_path(
    out: str | None, model: str, folder: Path, name: str, load: str | None = None
) -> Path:
    """`out`; else results.json in a checkpoint folder of ours; else results/NAME.json here.

    Args:
        model, folder: as the user names it, and where it is. load: how it is quantized on load.
    """
    if out:
        path = Path(out)
        return path / "results.json" if path.is_dir() else path
    ours = Path(model).is_dir() and recipe.is_ours(folder)
    if ours and not load and os.access(folder, os.W_OK):
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
        f"model {subject.settings.model}: {parameters / 1e6:,.1f} M parameters, "
        f"{precision.name(subject.dtype)} on {subject.device}",
        f"memory: about {size:.2f} GB of weights (one block of them with --block-by-block) + "
        f"{logits:.2f} GB of logits per window",
    ]
    for step in steps:
        work = f"; about {subject.macs['total'] * step.tokens / 1e12:,.2f} TMAC"
        lines.append(f"{step.key}: {step.plan}{work if step.tokens else ''}")
    return "\n".join([*lines, f"results would go to {path}"])
