"""``--preset NAME``: the settings that a model was published with, as defaults of the flags.

presets/NAME.yaml holds a section for each command: sft, kd and seqkd (minillm.finetune --type),
minillm (minillm.train_minillm), evaluate. Keys are the flags' names with underscores; what is on
the command line wins. ``examples_per_step`` is the batch over all processes, whatever their number:
--gradient-accumulation-steps follows from it.
"""

import argparse
import os
from pathlib import Path

from harness.errors import UserError
from minillm import flags

FOLDER = Path(__file__).with_name("presets")
PER_STEP, ACCUMULATE = "examples_per_step", "gradient_accumulation_steps"


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> dict[str, dict]:
    """The sections of a preset."""
    import yaml

    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def add(p: argparse.ArgumentParser) -> None:
    """The flag --preset."""
    flags.add(
        p, "--preset", choices=names(), metavar="NAME",
        help="settings as published for a model, where no flag says otherwise: "
        + ", ".join(names()),
    )  # fmt: skip


def parse(p: argparse.ArgumentParser, argv: list[str] | None, section: str | None = None):
    """The command's arguments, a preset's section (by default that of --type) below them."""
    args = p.parse_args(argv)
    if not args.preset:
        return args
    section, found = section or args.type, load(args.preset)
    if section not in found:
        p.error(f"--preset {args.preset} is of {', '.join(found)}, and says nothing of {section}")
    values = dict(found[section])
    batch = values.pop(PER_STEP, None)
    p.set_defaults(**values, **({ACCUMULATE: None} if batch else {}))
    args = p.parse_args(argv)
    if batch and args.gradient_accumulation_steps is None:
        args.gradient_accumulation_steps = _accumulate(batch, args.batch_size)
    return args


def words(name: str, section: str) -> list[str]:
    """A section as words of a command line, for as many processes as there are now.

    Raises:
        UserError: the preset has no such section.
    """
    found = load(name)
    if section not in found:
        raise UserError(f"preset {name} is of {', '.join(found)}, and says nothing of {section}.")
    values, made = dict(found[section]), []
    batch = values.pop(PER_STEP, None)
    if batch:
        values[ACCUMULATE] = _accumulate(batch, values["batch_size"])
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            made.append(flag)
        elif value is False:
            made.append(f"--no-{flag[2:]}")
        else:
            made += [flag, str(value)]
    return made


def _accumulate(examples: int, batch: int) -> int:
    return max(1, examples // (batch * int(os.environ.get("WORLD_SIZE", "1"))))
