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
from harness.settings import flag

FOLDER = Path(__file__).with_name("presets")
PER_STEP, ACCUMULATE = "examples_per_step", "gradient_accumulation_steps"


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> dict[str, dict]:
    """The sections of a preset."""
    import yaml

    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def preset():
    """The flag --preset, for a settings class."""
    return flag(
        None, "settings as published for a model, where no flag says otherwise: "
        + ", ".join(names()), choices=names(), metavar="NAME",
    )  # fmt: skip


def parse(p: argparse.ArgumentParser, argv: list[str] | None, section: str | None = None):
    """The command's arguments, a preset's section (by default that of --type) below them."""
    args = p.parse_args(argv)
    if not args.preset:
        return args
    section, sections = section or args.type, load(args.preset)
    if section not in sections:
        p.error(
            f"--preset {args.preset} is of {', '.join(sections)}, and says nothing of {section}"
        )
    values = dict(sections[section])
    batch = values.pop(PER_STEP, None)
    p.set_defaults(**values)
    if batch:
        p.set_defaults(**{ACCUMULATE: _accumulate(batch, p.parse_args(argv).batch_size)})
    return p.parse_args(argv)


def words(name: str, section: str) -> list[str]:
    """A section as words of a command line, for as many processes as there are now.

    Raises:
        UserError: the preset has no such section.
    """
    sections = load(name)
    if section not in sections:
        raise UserError(
            f"preset {name} is of {', '.join(sections)}, and says nothing of {section}."
        )
    values, line = dict(sections[section]), []
    batch = values.pop(PER_STEP, None)
    if batch:
        values[ACCUMULATE] = _accumulate(batch, values["batch_size"])
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no-{name}")
        else:
            line += [f"--{name}", str(value)]
    return line


def _accumulate(examples: int, batch: int) -> int:
    return max(1, examples // max(1, batch * int(os.environ.get("WORLD_SIZE", "1"))))
