"""The `harness` command, and what every command line of the house shares.

Nothing heavy is imported at module level: arguments are parsed first, so `--help` is immediate.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields

from harness import locks, paths, settings
from harness.commands.eval_settings import EvalSettings
from harness.errors import Finished, UserError
from harness.settings import Shared

DONE, FAULT, MENDABLE, INTERRUPTED = 0, 1, 2, 130
FORBIDDEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def add_some(group, *names: str) -> None:
    """Add flags of `settings.Shared` to a parser or a group of one."""
    for field in fields(Shared):
        if field.name in names:
            settings.add_flag(group, Shared, field)


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
    settings.add_flags(parser, EvalSettings)


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
        "--bubble", metavar="PNG",
        help="draw perplexity against decoding time, bubbles as large as the models (--speed)",
    )  # fmt: skip


def _generate_parser(commands) -> None:
    parser = commands.add_parser(
        "generate", help="greedy continuations by several models, side by side"
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, hub ids, embedded")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="may be given several times (default: three functions of the stdlib corpus)",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", "--max_new_tokens", type=int, default=64, metavar="N",
        help="length of a continuation, unless the model ends it earlier (default 64)",
    )  # fmt: skip
    parser.add_argument(
        "--load", choices=["nf4", "nf4-dq", "int8"], help="quantize while loading, as in eval"
    )
    add_some(parser, "device", "dtype")


def _convert_parser(commands) -> None:
    parser = commands.add_parser(
        "convert", help="store a checkpoint another way: its zeros left out, or dense again"
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or embedded name")
    parser.add_argument(
        "--format", required=True, choices=["dense", "bitmask"],
        help="bitmask: a bit per weight and the nonzero ones, read by the harness; dense: ordinary "
        "safetensors, from bitmask or packed ones too",
    )  # fmt: skip
    settings.add_flags(parser.add_argument_group(Shared.__doc__), Shared)


def _eval(args: argparse.Namespace) -> int:
    from harness.commands.evaluate import evaluate

    return evaluate(EvalSettings(**vars(args)))


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

    return generate(
        args.models, args.prompt, max_new_tokens=args.max_new_tokens, load=args.load,
        device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _convert(args: argparse.Namespace) -> int:
    from harness.checkpoint import card
    from harness.commands.convert import convert

    return convert(
        args.model, args.format, out=args.out, dtype=args.dtype, overwrite=args.overwrite,
        resume=args.resume, dry_run=args.dry_run, command=card.command_line(),
    )  # fmt: skip


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
    body = bodies[vars(args).pop("command")]
    return run(lambda: body(args))
