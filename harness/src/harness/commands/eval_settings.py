"""What `harness eval` is told. No torch up here: cli.py makes its flags of this."""

from dataclasses import dataclass

from harness.settings import AT_LEAST_1, BOS, NOT_NEGATIVE, Shared, flag, word


@dataclass(frozen=True, kw_only=True)
class Measures:
    """what to measure"""

    ppl: list[str] | None = flag(
        None, "token perplexity on named texts (wikitext2, ptb, c4, stdlib ...) or local files; "
        "none named: stdlib", nargs="*", metavar="DATA",
    )  # fmt: skip
    choice: list[str] | None = flag(
        None, "multiple choice by likelihood: stdlib-quiz (default) or JSONL files of "
        '{"question", "choices", "answer"}', nargs="*", metavar="DATA",
    )  # fmt: skip
    mmlu: str | None = flag(
        None, "MMLU from a folder with dev/ and test/ CSV files; without PATH from the hub",
        nargs="?", const="hub", metavar="PATH",
    )  # fmt: skip
    mmlu_prompt: str = flag(
        "original", "whose prompt and scoring (default original)",
        choices=["original", "llmcbench"],
    )  # fmt: skip
    shots: int | None = flag(
        None, "MMLU shots (default 5; llmcbench prompt: 0)", check=NOT_NEGATIVE
    )
    tasks: str | None = flag(
        None, "zero-shot tasks of lm-evaluation-harness, e.g. piqa,hellaswag (extra: tasks)",
        metavar="A,B",
    )  # fmt: skip
    divergence_from: str | None = flag(
        None, "KL and top-1 agreement with this model, on the first --ppl text (default stdlib)",
        metavar="DENSE",
    )  # fmt: skip
    speed: bool = flag(
        False, "tokens/s, time to the first token, memory, bandwidth; 512 + 128 tokens"
    )


@dataclass(frozen=True, kw_only=True)
class How:
    """how"""

    load: str | None = flag(
        None, "quantize while loading, with bitsandbytes (nf4-dq: double quantization)",
        choices=["nf4", "nf4-dq", "int8"],
    )  # fmt: skip
    seqlen: int | None = flag(
        None, "window of perplexity and divergence (default: the model's context, at most 2048)",
        metavar="TOKENS",
    )  # fmt: skip
    bos: str = flag("auto", **BOS)
    limit: int | None = flag(
        None, "at most N windows per text and N questions per set (default: all)", check=AT_LEAST_1
    )
    batch_size: int | None = flag(
        None, "windows or sequences per forward (default: 1 window, 8 prompts, 16 choices)",
        check=AT_LEAST_1,
    )  # fmt: skip
    engine: str = flag(
        "transformers", "what --speed runs on (default transformers)",
        choices=["transformers", "vllm"],
    )  # fmt: skip
    block_by_block: bool = flag(
        False, "one block in memory at a time, for models that do not fit (--ppl, "
        "--divergence-from)",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Measures, How, Shared):
    """A model and what is to be measured of it; nothing: its sizes and perplexity on stdlib."""

    model: str = word("MODEL", "folder, hub id or embedded name (tiny-llama)")
