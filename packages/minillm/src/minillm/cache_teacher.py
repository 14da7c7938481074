"""``python -m minillm.cache_teacher TEACHER --data dolly``: the teacher's probabilities, once."""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from harness import cli
from harness.settings import flag, make_parser, word
from minillm import flags

EXAMPLES = """\
examples:
  python -m minillm.cache_teacher tiny-llama --data stdlib-doc --train-num 200 --out cache
  python -m minillm.finetune tiny-llama-student --data stdlib-doc --train-num 200 --type kd \\
      --teacher-cache cache --out kd
      no teacher is loaded; --data, --train-num and lengths must be the same
  python -m minillm.cache_teacher Qwen/Qwen2.5-7B --student Qwen/Qwen2.5-0.5B --data dolly
  torchrun --nproc-per-node 8 -m minillm.cache_teacher TEACHER --data dolly --out cache
"""


@dataclass(frozen=True, kw_only=True)
class Settings(flags.Data, flags.Shared):
    """Write a teacher's probabilities at every label of a training set: the top-k
    log-probabilities and the mass of the rest, 4 k + 4 bytes a label (6 k + 4 above 65,536
    tokens). `minillm.finetune --teacher-cache` trains from them.
    """

    model: str = word("TEACHER", "folder, hub id or embedded name")
    type: str = flag(
        "kd", "seqkd: the responses of a file that minillm.generate wrote (default kd)",
        choices=["kd", "seqkd"],
    )  # fmt: skip
    topk: int = flag(64, "tokens a label (default 64)", metavar="K")
    student: str | None = flag(
        None, "have its tokenizer checked, and the logits cut that only the teacher has",
        metavar="MODEL",
    )  # fmt: skip
    teacher_peft_path: str | None = flag(None, "adapter of the teacher", metavar="FOLDER")
    batch_size: int = flag(8, "examples at a time (default 8)")

    def completed(self) -> "Settings":
        """With the default of --out where it is left open."""
        return replace(self, out=self.out or f"{Path(self.model).name}-cache")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    return make_parser(Settings, "minillm.cache_teacher", EXAMPLES)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(Settings(**vars(args))))


def _run(settings: Settings) -> None:
    from harness.training import cache_writer, engine

    if note := engine.on_lead(run, settings):
        print(cache_writer.summary(note))
        print(f"written to {settings.completed().out}")


def run(settings: Settings) -> dict | None:
    """What the command does, on every rank.

    Returns:
        What is in cache.json; None with --dry-run.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    from harness import distributed, precision
    from harness.checkpoint import load
    from harness.checkpoint.load import context_length
    from harness.checkpoint.weights import Weights
    from harness.data import example_sets
    from harness.training import batching, cache_writer, distillation
    from minillm import finetune_run, models

    settings = settings.completed()
    device = distributed.start(load.pick_device(settings.device))
    source, out = load.resolve(settings.model), Path(settings.out)
    cache_writer.check(out, settings.overwrite, settings.batch_size, settings.dry_run)
    configs = [load.load_config(source)]
    tokenizer = load.load_tokenizer(settings.student or source)
    vocabulary = configs[0].get_text_config().vocab_size
    if settings.student:
        configs.append(load.load_config(load.resolve(settings.student)))
        vocabulary = distillation.shared_columns(settings.model, settings.student)
    longest, longest_prompt = flags.lengths(settings, *map(context_length, configs))
    pairs = finetune_run.pairs(
        settings, "train", tokenizer, generated=settings.type == "seqkd", cached=True
    )
    examples = example_sets.examples(
        tokenizer, pairs, max_length=longest, max_prompt_length=longest_prompt,
        name=f"{settings.data}, train",
    )  # fmt: skip
    example_sets.check_tokens([examples], configs[0])
    dtype = precision.choose(settings.dtype, Weights(source).dtype, device, settings.model)
    adapter = settings.teacher_peft_path
    return cache_writer.cache(
        lambda: models.load_teacher(settings.model, device=device, dtype=dtype, peft_path=adapter),
        examples, out, teacher=settings.model, source=source, data=settings.data,
        settings={"dtype": precision.name(dtype), "teacher_peft_path": adapter},
        top_k=settings.topk, vocabulary=vocabulary, batch=settings.batch_size,
        pad=batching.pad_id(tokenizer), overwrite=settings.overwrite, resume=settings.resume,
        dry_run=settings.dry_run,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
