"""``python -m bitdistiller.export RESULT --format ...``: a trained result, packed."""

import argparse
import sys
from dataclasses import dataclass

from harness import cli
from harness.checkpoint import layouts
from harness.settings import Shared, flag, make_parser, word

EXAMPLES = """\
examples:
  python -m bitdistiller.export llama-2bit --out llama-2bit-packed
  python -m bitdistiller.export llama-3bit --format gptq --out llama-3bit-for-kernels
then:
  harness eval llama-2bit-packed --ppl wikitext2
"""


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """Store what python -m bitdistiller.train or .blockwise made as the integers it stands for.
    Nothing is rounded again: the packed model computes with the same weights, bit for bit.
    """

    model: str = word("RESULT", "the folder that training wrote")
    format: str = flag(
        "compressed-tensors", "compressed-tensors (default): transformers reads it, and vLLM at 4 "
        "bits; gptq: for GPTQ kernels, scales in float16; dense: ordinary safetensors",
        choices=layouts.QUANTIZED,
    )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    return make_parser(Settings, "bitdistiller.export", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from bitdistiller.export_run import export
    from harness.checkpoint import card

    export(
        settings.model, settings.format, out=settings.out, dtype=settings.dtype,
        overwrite=settings.overwrite, resume=settings.resume, dry_run=settings.dry_run,
        command=card.command_line(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
