"""``python -m bitdistiller.cache_teacher MODEL --data FILE``: the dense model's probabilities,
once."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bitdistiller import flags
from harness import cli
from harness.settings import flag, make_parser, word

EXAMPLES = """\
examples:
  python -m bitdistiller.cache_teacher tiny-llama --data stdlib-doc --out cache
  python -m bitdistiller.train tiny-llama --clip clipped --data stdlib-doc --teacher_cache cache
      no teacher is loaded; --data and what else says which examples must be the same
  torchrun --nproc-per-node 8 -m bitdistiller.cache_teacher MODEL --data generated.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Settings(flags.Data, flags.Shared):
    """Write the dense model's probabilities at every label of a training set: the top-k
    log-probabilities and the mass of the rest, 4 k + 4 bytes a label (6 k + 4 above 65,536
    tokens). `bitdistiller.train --teacher_cache` trains from them.
    """

    model: str = word("MODEL", "the dense one: folder, hub id, embedded name")
    topk: int = flag(64, "tokens a label (default 64)", metavar="K")
    batch_size: int = flag(8, "examples at a time (default 8)")

    def completed(self) -> "Settings":
        """With the default of --out where it is left open."""
        return replace(self, out=self.out or f"{Path(self.model).name}-cache")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "bitdistiller.cache_teacher", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness import distributed
    from harness.training import cache_writer

    with distributed.group():
        note = run(settings)
        lead = distributed.rank() == 0
    if lead and note:
        print(cache_writer.summary(note))
        print(f"written to {settings.completed().out}")


def run(settings: Settings) -> dict | None:
    """What the command does, on every rank; returns what `harness.training.cache_writer.cache`
    does."""
    from bitdistiller import train_examples
    from harness import distributed, precision
    from harness.checkpoint import load
    from harness.checkpoint.weights import Weights
    from harness.data import example_sets
    from harness.training import batching, cache_writer

    settings = settings.completed()
    device = distributed.start(load.pick_device(settings.device))
    source, out = load.resolve(settings.model), Path(settings.out)
    cache_writer.check(out, settings.overwrite, settings.batch_size, settings.dry_run)
    config = load.load_config(source)
    tokenizer = load.load_tokenizer(source)
    longest = train_examples.length(settings.model_max_length, config)
    examples = train_examples.read(settings, tokenizer, longest, "train")
    example_sets.check_tokens([examples], config)
    dtype = precision.choose(settings.dtype, Weights(source).dtype, device, settings.model)
    return cache_writer.cache(
        lambda: load.load_model(source, device=device, dtype=dtype),
        examples, out, teacher=settings.model, source=source, data=settings.data,
        settings={"dtype": precision.name(dtype)}, top_k=settings.topk,
        vocabulary=config.get_text_config().vocab_size, batch=settings.batch_size,
        pad=batching.pad_id(tokenizer), overwrite=settings.overwrite, resume=settings.resume,
        dry_run=settings.dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
