"""Zero-shot tasks through lm-evaluation-harness, an optional extra.

Its index of all tasks takes half a minute to build, so only the folders of the tasks asked for are
given to it, found by a look at the first lines of its YAML files.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError, nearest

INSTALL = "pip install 'llm-compression-harness[tasks]'"
NAMED = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def _import_lm_eval():
    try:
        import lm_eval
    except ImportError:
        raise UserError(f"--tasks needs lm-evaluation-harness: {INSTALL}") from None
    return lm_eval


def version() -> str:
    """Of lm-evaluation-harness, whose tasks name their data."""
    return _import_lm_eval().__version__


def task_folders(tasks: Sequence[str], root: Path) -> list[Path]:
    """The folders directly under lm-eval's task folder `root` that define `tasks`.

    Raises UserError for an unknown task, with the nearest known name.
    """
    folders: dict[str, Path] = {}
    for path in sorted(root.rglob("*.yaml")):
        with path.open(encoding="utf-8", errors="replace") as file:
            head = file.read(2000)
        for name in NAMED.findall(head):
            folders.setdefault(name, root / path.relative_to(root).parts[0])
    for name in tasks:
        if name not in folders:
            raise UserError(
                f"--tasks: lm-evaluation-harness has no task {name!r}.{nearest(name, folders)}"
            )
    return sorted({folders[name] for name in tasks})


def check(tasks: Sequence[str]) -> list[Path]:
    """Folders of `tasks`; raises UserError when lm-eval is not installed or a task is unknown."""
    root = Path(_import_lm_eval().__file__).parent / "tasks"
    return task_folders(tasks, root)


def zero_shot(
    model, tokenizer, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict]:
    """Results of `tasks` for a loaded transformers causal LM, 0 shots.

    `limit` caps the questions per task. Returns task -> {metric: value, "n": questions,
    "version": of the task}; metrics as lm-eval names them (acc, acc_norm and their _stderr).
    Raises UserError when lm-eval is missing, a task is unknown or its data cannot be had.
    """
    folders = check(tasks)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False, include_path=folders)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        raw = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=0,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (ConnectionError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--tasks: the data could not be had from the hub ({reason})") from error
    return {name: _plain(name, raw) for name in raw["results"]}


def _plain(name: str, raw: dict) -> dict:
    values = {
        key.removesuffix(",none"): value
        for key, value in raw["results"][name].items()
        if isinstance(value, float)
    }
    samples = raw.get("n-samples", {}).get(name, {})
    return {**values, "n": samples.get("effective"), "version": raw["versions"].get(name)}
