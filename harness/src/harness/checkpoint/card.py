"""The two texts beside every result: recipe.yaml (the steps that led here) and the model card."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from harness import __version__
from harness.checkpoint import recipe as recipe_file

# Steps that change how a model is stored, and nothing of the model.
REPACKED = ("convert", "export")


def command_line() -> str:
    """The command that is running, as a user would type it."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    elif (
        program.suffix == ".py"
        and program.parent.name
        and (program.parent / "__init__.py").exists()
    ):
        words = ["python", "-m", f"{program.parent.name}.{program.stem}"]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def training_step(
    method: str, settings, record: dict, *, dataset: str, nsamples: int, seqlen: int
) -> dict:
    """The step that a training command is: ``record`` of its settings (model and seed among
    them), and what it was trained on."""
    return {
        "method": method, "base": settings.model, "command": command_line(), "settings": record,
        "training": {
            "dataset": dataset, "nsamples": nsamples, "seqlen": seqlen,
            "seed": settings.seed,
        },
    }  # fmt: skip


def recipe(source: Path, step: dict) -> str:
    """recipe.yaml: the source's own steps, then this one."""
    return yaml.safe_dump({"steps": [*recipe_file.steps(source), step]}, sort_keys=False, width=100)


def model_card(base: str, step: dict, layout: str, sizes: dict[str, float], read_by: str) -> str:
    """README.md of a result. ``sizes``: label -> megabytes or bits per weight."""
    trained = step.get("training")
    data = trained or step.get("calibration") or {}
    used = (
        f"{data['nsamples']} windows of {data['seqlen']} tokens of `{data['dataset']}`, "
        f"seed {data['seed']}"
        if data
        else "none needed"
    )
    if trained:
        used = used.replace(" windows of ", " examples of at most ", 1)
    # A conversion changes no weight, and the base may be anything.
    compressed = step["method"] not in REPACKED
    done = f"compressed with {step['method']}" if compressed else f"stored as {layout}"
    if trained:
        done = f"tuned with {step['method']}"
    dtypes = {f"{key} in": value for key, value in step["dtype"].items()} if "dtype" in step else {}
    rows = dtypes | step["settings"]
    settings = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    size_lines = "\n".join(f"| {label} | {value:.2f} |" for label, value in sizes.items())
    return f"""---
base_model: {base}
tags: [{step["method"]}, llm-compression]
---
# {Path(base).name}, {done}

Made from `{base}` with

```
{step["command"]}
```

| | |
| --- | --- |
| {"training" if trained else "calibration"} | {used} |
| stored as | {layout} |
| read by | {read_by} |
{size_lines}
{settings}

Versions: llm-compression-harness {__version__}, torch {version("torch")}, transformers \
{version("transformers")}, compressed-tensors {version("compressed-tensors")}.
"""
