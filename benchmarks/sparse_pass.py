"""SparseGPT and Wanda at 50 %, ours against the textbook order: CPU seconds, memory, error.

    python benchmarks/sparse_pass.py                    8 LLaMA blocks of width 1024, one CPU thread
    python benchmarks/sparse_pass.py --dtype bfloat16 --blocks 4

SparseGPT's textbook order is that of gptq_pass.py (a Hessian per linear, sample by sample, full
products, three factorizations, every block run twice) around the paper's column loop, with a sorted
threshold every 128 columns. Wanda is measured against two plain forwards of the calibration set,
which its plain order cannot do without. Every contestant runs in a process of its own. Measured
afterwards, in the same way for all: the error of the linears, |(W - Q) X|² / |W X|² on the dense
model's own inputs (which favours the plain order, whose inputs they are), and that of the last
block's output.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gptq_pass

SPARSITY, BLOCK, DAMPING = 0.5, 128, 0.01
CONTESTANTS = (
    "sparsegpt textbook",
    "sparsegpt ours, true-sequential",
    "sparsegpt ours, plain order",
    "two forwards",
    "wanda ours, plain order",
    "wanda ours, true-sequential",
)


def textbook_solver(weight, hessian):
    import torch

    weight = weight.clone()
    columns = weight.shape[1]
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        pruned, small = torch.zeros_like(block), factor[start:end, start:end]
        scores = block**2 / small.diagonal() ** 2
        threshold = scores.flatten().sort().values[int(scores.numel() * SPARSITY)]
        keep = scores > threshold
        for j in range(end - start):
            column = block[:, j]
            pruned[:, j] = column * keep[:, j]
            error = (column - pruned[:, j]) / small[j, j]
            block[:, j:] -= error[:, None] * small[j, j:][None]
            errors[:, j] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def run_textbook(folder: Path, out: Path, args) -> None:
    gptq_pass.textbook_solver = textbook_solver  # the same work around another column loop
    gptq_pass.run_textbook(folder, out, args)


def run_ours(folder: Path, out: Path, args) -> None:
    from harness.blocks import sequential
    from harness.blocks.decoder import Decoder
    from harness.quant.hessian import Hessian
    from sparse import methods

    decoder = Decoder(folder, dtype=gptq_pass.dtype_of(args))
    goal = lambda where, name: methods.Target(SPARSITY)  # noqa: E731
    if "wanda" in args.run:
        update, statistics = methods.wanda(goal, decoder.stored_dtype, variant=False), methods.Norms
    else:
        statistics = Hessian
        update = methods.sparsegpt(
            goal, decoder.stored_dtype, percdamp=DAMPING, blocksize=BLOCK, grid=None,
            scale_dtype=decoder.stored_dtype,
        )  # fmt: skip
    method = sequential.Method(
        args.run, {}, [sequential.per_stage(update, statistics, true_sequential="true" in args.run)]
    )
    windows = gptq_pass.windows_of(args)
    sequential.compress(decoder, method, out, base=str(folder), windows=windows)


def run_forwards(folder: Path, args) -> None:
    """Every block twice over the calibration set; nothing else."""
    from harness.blocks.decoder import Decoder, batches

    decoder = Decoder(folder, dtype=gptq_pass.dtype_of(args))
    hidden = [decoder.embed(part) for part in batches(gptq_pass.windows_of(args))]
    for index in range(len(decoder)):
        decoder.load(index)
        for h in hidden:
            decoder.forward(index, h)
        hidden = [decoder.forward(index, h) for h in hidden]
        decoder.release(index)


def last_errors(folder: Path, outs: dict[str, Path], args) -> dict[str, float]:
    """|h - h'|² / |h|² of the last block's output h on four windows, for every result."""
    from safetensors.torch import load_file

    from harness.blocks.decoder import Decoder

    def last(replaced):
        decoder = Decoder(folder, dtype=gptq_pass.dtype_of(args))
        hidden = decoder.embed(gptq_pass.windows_of(args)[:4])
        for index in range(len(decoder)):
            own = decoder.block_tensors(index)
            decoder.load(index, own | {name: replaced[name] for name in own if name in replaced})
            hidden = decoder.forward(index, hidden)
            decoder.release(index)
        return hidden.float()

    dense, errors = last({}), {}
    for who, out in outs.items():
        files = [load_file(path) for path in out.glob("*.safetensors")]
        pruned = last({name: tensor for file in files for name, tensor in file.items()})
        errors[who] = ((pruned - dense).square().sum() / dense.square().sum()).item()
    return errors


def contest(args) -> dict:
    import torch

    torch.set_grad_enabled(False)
    # Imports are not what is measured.
    from accelerate import init_empty_weights  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import harness.blocks.sequential  # noqa: F401
    import sparse.methods  # noqa: F401

    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    out = folder.parent / args.run.replace(" ", "-")
    if "ours" in args.run:
        return gptq_pass.measure(lambda: run_ours(folder, out, args))
    if "textbook" in args.run:
        return gptq_pass.measure(lambda: run_textbook(folder, out, args))
    return gptq_pass.measure(lambda: run_forwards(folder, args))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sizes = {"hidden": 1024, "mlp": 2816, "blocks": 8, "nsamples": 32, "seqlen": 512, "threads": 1}
    for name, value in sizes.items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--run", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.run:
        print(json.dumps(contest(args)))
        return

    import torch

    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        gptq_pass.make_model(folder, args)
        rows = {}
        for who in CONTESTANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--run", who, "--folder", folder]
            done = subprocess.run(
                list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True
            )
            rows[who] = json.loads(done.stdout.splitlines()[-1])
            print(f"{who}: {rows[who]['cpu_s']:.1f} CPU seconds", file=sys.stderr)
        outs = {
            who: Path(scratch) / who.replace(" ", "-")
            for who in CONTESTANTS
            if "forwards" not in who
        }
        errors = gptq_pass.compare_errors(folder, outs, args)
        ends = last_errors(folder, outs, args)
    print(
        f"hidden {args.hidden}, MLP {args.mlp}, {args.blocks} blocks, {args.nsamples} windows of "
        f"{args.seqlen}, {args.dtype}, {args.threads} thread(s), {SPARSITY:.0%} sparsity"
    )
    print("| | CPU s | wall s | peak MB | error of linears | error at the end |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for who, row in rows.items():
        mean = sum(e[who] for e in errors.values()) / len(errors) if who in outs else None
        error = "|" if mean is None else f"{mean:.5f} | {ends[who]:.5f}"
        sizes = f"{row['cpu_s']:.1f} | {row['wall_s']:.1f} | {row['peak_mb']:.0f}"
        print(f"| {who} | {sizes} | {error} |")
    textbook, ordered, plain, forwards, wanda, _ = (row["cpu_s"] for row in rows.values())
    print(
        f"SparseGPT, textbook / ours: {textbook / ordered:.2f} ({textbook / plain:.2f} plain order)"
    )
    print(f"Wanda, ours / two forwards: {wanda / forwards:.2f}")


if __name__ == "__main__":
    main()
