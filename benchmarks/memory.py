"""Peak memory of a GPTQ pass over 24 blocks beside one over 6 blocks of the same width.

    python benchmarks/memory.py [--hidden 1024] [--blocks 6 24]

The pass holds one block, one stage's statistics and the hidden states, so the two should agree:
within 10 per cent. Each pass runs in a process of its own; its peak is what the system counted.
Checkpoints are written to the temporary folder (24 blocks of width 1024: about 1.2 GB in float32).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def make_model(folder: Path, hidden: int, blocks: int) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")


def run_pass(folder: Path, out: Path) -> None:
    import torch

    import gptq
    from harness.checkpoint import load
    from harness.data import corpora

    class Tokenizer:  # random ids: memory does not depend on what they say
        def __call__(self, text, **_):
            return {"input_ids": torch.randint(0, 2048, (40_000,)).tolist()}

    load.load_tokenizer = lambda _: Tokenizer()
    corpora._text = lambda *_: ""
    rows = gptq.quantize(
        str(folder), "random", out=out, groupsize=128, nsamples=16, seqlen=512, true_sequential=True
    )
    assert len(rows) % 7 == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs=2, default=[6, 24])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_pass(*map(Path, args.run))
        return
    peaks = {}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            subprocess.run(
                [sys.executable, "-c", _MAKE, str(folder), str(args.hidden), str(blocks)],
                check=True,
                cwd=Path(__file__).parent,
            )
            size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
            command = [sys.executable, __file__, "--run", str(folder), str(Path(scratch) / "out")]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            peaks[blocks] = float(done.stdout.splitlines()[-1])
            print(
                f"{blocks} blocks of width {args.hidden}: model {size:.0f} MB, "
                f"peak {peaks[blocks]:.0f} MB"
            )
    few, many = (peaks[b] for b in args.blocks)
    print(f"{args.blocks[1]} blocks / {args.blocks[0]} blocks: {many / few:.3f}")


_MAKE = (
    "import sys, pathlib, memory; "
    "memory.make_model(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
)

if __name__ == "__main__":
    main()
