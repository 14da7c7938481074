"""``python -m bitdistiller.generate MODEL --dataset wikitext2,alpaca --out FILE.jsonl``: what the
dense model says, which its quantized twin is then trained on."""

import argparse
import sys

from harness import cli

EXAMPLES = """\
examples:
  python -m bitdistiller.generate MODEL --dataset wikitext2,alpaca --out teacher.jsonl
      3000 and 5000 prompts, in vLLM on all GPUs, as published for LLaMA-2
  python -m bitdistiller.generate MODEL --dataset code=evol.jsonl --engine transformers
      a local copy of the set, and no vLLM
  torchrun --nproc-per-node 8 -m bitdistiller.generate MODEL --dataset math --engine transformers
  python -m bitdistiller.generate tiny-llama --dataset stdlib,stdlib-doc --max_sample 100 \\
      --max_new_tokens 64 --engine transformers --out teacher.jsonl
then:
  python -m bitdistiller.mix teacher.jsonl --out mix.jsonl
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments; names and defaults are the original's where it has them."""
    p = argparse.ArgumentParser(
        prog="python -m bitdistiller.generate",
        description="Let the dense model respond to the prompts of one or several sets. Each line "
        "of the result holds a prompt, the response, the set, and whether the response came to an "
        "end; a killed run goes on, and ends with the same bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", nargs="?", metavar="MODEL", help="folder, hub id or embedded name")
    p.add_argument("--base_model", "--base-model", metavar="MODEL", help="the same as a flag")
    g = p.add_argument_group("prompts")
    g.add_argument(
        "--dataset", "--dataset_name", "--dataset-name", required=True, metavar="A,B",
        help="wikitext2, alpaca, code, math; stdlib, stdlib-doc (embedded); local files or "
        "folders; code=FILE: a local copy of a set",
    )  # fmt: skip
    g.add_argument(
        "--max_sample", "--max-sample", metavar="N,M",
        help="prompts, at most, drawn at random: for each set, or one number for all (default: "
        "3000, alpaca 5000, all of a local file)",
    )  # fmt: skip
    g = p.add_argument_group("responses")
    g.add_argument(
        "--engine", default="vllm", choices=["vllm", "transformers"],
        help="default vllm; transformers needs no further install, and is much slower on a GPU",
    )  # fmt: skip
    g.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, metavar="N",
        help="of a response, at most (default 1024, or half of the model's context if that is "
        "less); prompts that leave no room for them are left out",
    )  # fmt: skip
    g.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="default 0.7; 0: greedy"
    )
    g.add_argument(
        "--top_p", "--top-p", type=float, default=1.0, metavar="P", help="default 1: all"
    )
    g.add_argument(
        "--batch_size", "--batch-size", type=int, metavar="N",
        help="prompts at a time in each process, and what a kill may cost (default 16; 1024 in "
        "vLLM)",
    )  # fmt: skip
    g.add_argument(
        "--tensor_parallel_size", "--tensor-parallel-size", type=int, metavar="N",
        help="GPUs that share the model in vLLM (default: all)",
    )  # fmt: skip
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    cli.add_shared_flags(p, seed=42)
    p.add_argument(
        "--out_path", "--out-path", metavar="FOLDER",
        help="instead of --out: a folder for a file that is named after sets and sampling",
    )  # fmt: skip
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from bitdistiller.generate_run import generate
    from harness import distributed

    with distributed.group():
        report = generate(args)
        lead = distributed.rank() == 0
    if lead and report:
        print(report)


if __name__ == "__main__":
    sys.exit(main())
