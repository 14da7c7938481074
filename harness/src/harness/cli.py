"""The `harness` command, and what every command line of the house shares.

Nothing heavy is imported at module level: arguments are parsed first, so `--help` is immediate.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable

from harness import locks, paths
from harness.errors import Finished, UserError

DONE, FAULT, MENDABLE, INTERRUPTED = 0, 1, 2, 130
FORBIDDEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def add_shared_flags(parser: argparse.ArgumentParser, seed: int = 0) -> None:
    """Add the flags that mean the same in every command of the house (design section 6); ``seed``
    is the default of --seed.

    `--out` is a path or None; `--device` and `--dtype` are strings, "auto" by default;
    `--resume` is a bool, True by default.
    """
    group = parser.add_argument_group("shared by all commands")
    group.add_argument("--out", metavar="PATH", help="where the result is written")
    add_numerics(group)
    group.add_argument(
        "--seed", type=int, default=seed, help=f"of every random choice (default {seed})"
    )
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from an interrupted run of the same command (default), or start again",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing result")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve everything, print the plan and what it needs, write nothing, exit 0",
    )


def add_ignore(group) -> None:
    """Add `--ignore` to a parser or a group of one: a list of patterns, [] by default."""
    group.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="linears that stay dense, by full name or last parts (dt_proj, mlp.down_proj) or "
        "re:REGEX; may be given again",
    )


def add_bos(group) -> None:
    """Add `--bos` to a parser or a group of one."""
    group.add_argument(
        "--bos",
        default="auto",
        choices=["auto", "none", "window"],
        help="BOS at the head of every window of text: auto (default: none, as published, unless "
        "trying shows that the model needs it), none, window",
    )


def add_numerics(group) -> None:
    """Add `--device` and `--dtype` to a parser or a group of one."""
    group.add_argument(
        "--device",
        default="auto",
        help="auto (default: a GPU if there is one), cpu, cuda, cuda:1 ...",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the computation (default auto: the one the checkpoint is stored in where "
        "the device is fast in it, else float32); what is written keeps the checkpoint's own",
    )


def run(body: Callable[[], int | None]) -> int:
    """Call `body` and turn its outcome into the house's exit code; nothing is raised.

    0 done (or the int that `body` returned; a line on stderr where the result was there already);
    2 the user can mend it (one line on stderr: a
    `UserError`, a full disk, a place that is not theirs); 130 interrupted; 1 a fault of ours
    (traceback on stderr).
    """
    try:
        return body() or DONE
    except Finished as there:
        if os.environ.get("RANK", "0") == "0":
            print(there, file=sys.stderr)
        return DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MENDABLE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has left: not worth a traceback, and stdout must not be flushed.
        sys.stdout = None
        return DONE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {error.filename}" if error.filename else ""
            print(
                f"error: the disk is full{where}; free some space or choose another --out, "
                "then run the same command again",
                file=sys.stderr,
            )
            return MENDABLE
        if error.errno in FORBIDDEN and error.filename:
            print(f"error: {error.filename}: {error.strerror}; choose another", file=sys.stderr)
            return MENDABLE
        traceback.print_exc()
        return FAULT
    except Exception:
        traceback.print_exc()
        return FAULT
    finally:
        locks.release_all()


EPILOG = """examples:
  harness eval tiny-llama
      sizes, and perplexity on the embedded stdlib corpus: no download
  harness eval OUT --ppl wikitext2 c4 --mmlu --speed
      the usual three; OUT is a folder or a hub id
  harness eval OUT --ppl test.txt --mmlu mmlu/ --limit 200
      local files; 200 windows per text and 200 questions
  harness eval OUT --divergence-from facebook/opt-125m
      how far the compressed model is from its dense original
  harness eval facebook/opt-125m --load nf4-dq --ppl wikitext2
      bitsandbytes' NF4, quantized while loading
  harness compare A/ B/ results/C.json --plot frontier.png
      one table, and quality against size
  harness compare results/*.json --curve curve.png --bubble bubble.png
      perplexity against pruning ratio; quality x time x size
  harness generate DENSE PRUNED --prompt "def add(a, b):"
      continuations side by side
  harness convert PRUNED --format bitmask --out SMALL
      the same weights without the zeros; --format dense goes back
  harness info OUT
      what a checkpoint is, how it was made, what reads it
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `harness` command."""
    parser = argparse.ArgumentParser(
        prog="harness",
        description="Measure a language model checkpoint, dense or compressed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _eval_parser(commands)
    _compare_parser(commands)
    _generate_parser(commands)
    _convert_parser(commands)
    info = commands.add_parser("info", help="what a checkpoint is, how it was made, what reads it")
    info.add_argument("model", metavar="MODEL", help="folder, hub id or embedded name")
    return parser


def _eval_parser(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure a model; the numbers go to a table and a JSON file",
        description="Measure a model. Without a metric: its sizes and its perplexity on stdlib.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder, hub id or embedded name (tiny-llama)"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--ppl",
        nargs="*",
        metavar="DATA",
        help="token perplexity on named texts (wikitext2, ptb, c4, stdlib ...) or local files; "
        "none named: stdlib",
    )
    what.add_argument(
        "--choice",
        nargs="*",
        metavar="DATA",
        help="multiple choice by likelihood: stdlib-quiz (default) or JSONL files of "
        '{"question", "choices", "answer"}',
    )
    what.add_argument(
        "--mmlu",
        nargs="?",
        const="hub",
        metavar="PATH",
        help="MMLU from a folder with dev/ and test/ CSV files; without PATH from the hub",
    )
    what.add_argument(
        "--mmlu-prompt",
        choices=["original", "llmcbench"],
        default="original",
        help="whose prompt and scoring (default original)",
    )
    what.add_argument(
        "--shots", type=int, metavar="N", help="MMLU shots (default 5; llmcbench prompt: 0)"
    )
    what.add_argument(
        "--tasks",
        metavar="A,B",
        help="zero-shot tasks of lm-evaluation-harness, e.g. piqa,hellaswag (extra: tasks)",
    )
    what.add_argument(
        "--divergence-from",
        metavar="DENSE",
        help="KL and top-1 agreement with this model, on the first --ppl text (default stdlib)",
    )
    what.add_argument(
        "--speed",
        action="store_true",
        help="tokens/s, time to the first token, memory, bandwidth; 512 + 128 tokens",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--load",
        choices=["nf4", "nf4-dq", "int8"],
        help="quantize while loading, with bitsandbytes (nf4-dq: double quantization)",
    )
    how.add_argument(
        "--seqlen",
        type=int,
        metavar="TOKENS",
        help="window of perplexity and divergence (default: the model's context, at most 2048)",
    )
    add_bos(how)
    how.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="at most N windows per text and N questions per set (default: all)",
    )
    how.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="windows or sequences per forward (default: 1 window, 8 prompts, 16 choices)",
    )
    how.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="what --speed runs on (default transformers)",
    )
    how.add_argument(
        "--block-by-block",
        action="store_true",
        help="one block in memory at a time, for models that do not fit (--ppl, --divergence-from)",
    )
    add_shared_flags(parser)


def _compare_parser(commands) -> None:
    parser = commands.add_parser(
        "compare", help="one table of several results files, and a frontier plot"
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="JSON files, or folders with results.json"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw quality and speed against size")
    parser.add_argument(
        "--curve", metavar="PNG", help="draw perplexity against pruning ratio, a line per method"
    )
    parser.add_argument(
        "--bubble",
        metavar="PNG",
        help="draw perplexity against decoding time, bubbles as large as the models (--speed)",
    )


def _generate_parser(commands) -> None:
    parser = commands.add_parser(
        "generate", help="greedy continuations by several models, side by side"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, hub ids, embedded")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times (default: three functions of the stdlib corpus)",
    )
    parser.add_argument(
        "--max-new-tokens",
        "--max_new_tokens",
        type=int,
        default=64,
        metavar="N",
        help="length of a continuation, unless the model ends it earlier (default 64)",
    )
    parser.add_argument(
        "--load", choices=["nf4", "nf4-dq", "int8"], help="quantize while loading, as in eval"
    )
    add_numerics(parser)


def _convert_parser(commands) -> None:
    parser = commands.add_parser(
        "convert", help="store a checkpoint another way: its zeros left out, or dense again"
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or embedded name")
    parser.add_argument(
        "--format",
        required=True,
        choices=["dense", "bitmask"],
        help="bitmask: a bit per weight and the nonzero ones, read by the harness; dense: ordinary "
        "safetensors, from bitmask or packed ones too",
    )
    add_shared_flags(parser)


def _eval(args: argparse.Namespace) -> int:
    from harness.commands.evaluate import evaluate

    return evaluate(args)


def _compare(args: argparse.Namespace) -> int:
    from pathlib import Path

    from harness.commands import report

    for flag in ("plot", "curve", "bubble"):
        if getattr(args, flag):
            paths.check_place(Path(getattr(args, flag)), f"--{flag}")
    loaded = [report.load(Path(name)) for name in args.results]
    print(report.comparison(loaded))
    for label in report.differing_protocols(loaded):
        print(f"note: {label} was not measured alike in all of these", file=sys.stderr)
    if args.plot or args.curve or args.bubble:
        from harness.commands.curves import bubble, curve
        from harness.commands.frontier import plot

        for path, draw in ((args.plot, plot), (args.curve, curve), (args.bubble, bubble)):
            if path:
                draw(loaded, Path(path))
                print(f"\nplot: {path}")
    return DONE


def _generate(args: argparse.Namespace) -> int:
    from harness.commands.generate import generate

    return generate(args)


def _convert(args: argparse.Namespace) -> int:
    from harness.commands.convert import convert

    return convert(args)


def _info(args: argparse.Namespace) -> int:
    from harness.commands.info import info

    print(info(args.model))
    return DONE


def main(argv: list[str] | None = None) -> int:
    """The `harness` command; returns the exit code (see `run`)."""
    args = build_parser().parse_args(argv)
    bodies = {
        "eval": _eval,
        "compare": _compare,
        "generate": _generate,
        "convert": _convert,
        "info": _info,
    }
    return run(lambda: bodies[args.command](args))
