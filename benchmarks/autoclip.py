"""The search for clipping ranges, ours against the plain loop over 100 candidates, in one run.

    python benchmarks/autoclip.py                   1024 x 1024, g128, 512 tokens, 2 bits: minutes
    python benchmarks/autoclip.py --quant-type nf3 --rows 256
    python benchmarks/autoclip.py --rows 4096 --columns 4096 --skip broadcast

"broadcast" is the plain loop as the method's authors write it: every candidate is quantized and
multiplied with every token, element by element, 256 rows (or 64) at a time. "matmul" is the same
loop with a matrix product per group in place of the broadcast. Ours knows the tokens by their
second moments only; making these is in its time. All three have the same 512 tokens and the same
roundings. Every contestant runs in a process of its own, on one thread, and imports are not
measured. Afterwards every result is judged in float64: how many ranges are the same as those of
the broadcast loop (sums in another order may turn a tie), and the error that they all leave.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gptq_pass

CONTESTANTS = ("broadcast", "matmul", "ours")
SHARES = [1 - i / 20 for i in range(10)]


def problem(args):
    """A weight [O, I] with heavy tails, inputs [N, I] of unequal size, correlated; the grid."""
    import torch

    from harness.quant.grid import Grid
    from harness.quant.normal_float import NormalFloat

    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    weight = normal(args.rows, args.columns) * normal(args.rows, args.columns).abs().sqrt()
    mixed = normal(args.tokens, args.columns) @ normal(args.columns, args.columns)
    inputs = mixed / args.columns**0.5 * torch.logspace(-1, 1, args.columns) + 0.2
    bits = {"int": args.bits, "nf3": 3, "nf4": 4}[args.quant_type]
    grid = (Grid if args.quant_type == "int" else NormalFloat)(bits, args.group)
    return weight.bfloat16().float(), inputs, grid


def ours(weight, inputs, grid, args):
    import torch

    from harness.quant.clip_search import search
    from harness.quant.hessian import GroupMoments

    moments = GroupMoments(weight.shape[1], "cpu", grid.group_size)
    moments.add(inputs)
    low, high, *_ = search(weight, moments.mean(), grid, torch.bfloat16)
    return low, high


def plain(weight, inputs, grid, args):
    """Both plain loops: they differ in how a quantized weight meets the tokens."""
    import torch

    grouped = weight.unflatten(1, (-1, args.group))  # [O, G, g]
    tokens = inputs.unflatten(1, (-1, args.group))  # [N, G, g]
    step = len(weight) if args.run == "matmul" else 256 if len(weight) % 256 == 0 else 64

    def outputs(w):
        if args.run == "matmul":
            return torch.matmul(w.transpose(0, 1), tokens.permute(1, 2, 0)).transpose(0, 1)
        return (tokens.transpose(0, 1)[None] * w[:, :, None]).sum(-1)  # [O, G, N]

    found = []
    for start in range(0, len(weight), step):
        w = grouped[start : start + step]
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        expected = outputs(w)
        least = torch.full_like(low, torch.inf)
        best_low, best_high = low.clone(), high.clone()
        for i in SHARES:
            for j in SHARES:
                try_low, try_high = (
                    (end * s).bfloat16().float() for end, s in ((low, j), (high, i))
                )
                change = outputs(rounded(w.clamp(try_low, try_high), grid)) - expected
                error = change.square().mean(-1, keepdim=True)
                better = error < least
                least = torch.where(better, error, least)
                best_low = torch.where(better, try_low, best_low)
                best_high = torch.where(better, try_high, best_high)
        found.append((best_low[..., 0], best_high[..., 0]))
    return tuple(torch.cat(ends) for ends in zip(*found, strict=True))


def rounded(w, grid):
    """Every group of [O, G, g] to the nearest point of its own min-max grid, scales in bfloat16."""
    import torch

    from harness.quant.grid import Grid, nearest
    from harness.quant.normal_float import nearest as nearest_level

    flat = w.flatten(1)
    if isinstance(grid, Grid):
        return nearest(flat, grid, torch.bfloat16).dequantize(torch.float32).view_as(w)
    return nearest_level(flat, grid, torch.bfloat16).view_as(w)


def errors(weight, inputs, grid, low, high):
    """Mean square output error of every group, [O, G] float64, of the weight in these ranges."""
    w = weight.unflatten(1, (low.shape[1], -1))
    clamped = w.clamp(low[..., None], high[..., None])
    change = (rounded(clamped, grid) - w).double().transpose(0, 1)
    tokens = inputs.double().unflatten(1, (low.shape[1], -1)).permute(1, 2, 0)
    return (change @ tokens).square().mean(-1).T


def contest(args) -> dict:
    import torch

    import bitdistiller.autoclip_run  # noqa: F401

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    weight, inputs, grid = problem(args)
    run, found = ours if args.run == "ours" else plain, []
    before = gptq_pass.measure(lambda: None)["peak_mb"]
    row = gptq_pass.measure(lambda: found.extend(run(weight, inputs, grid, args)))
    torch.save(found, Path(args.folder) / args.run)
    return row | {"added_mb": row["peak_mb"] - before}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"rows": 1024, "columns": 1024, "group": 128, "tokens": 512, "bits": 2}
    for name, value in sizes.items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--quant-type", default="int", choices=["int", "nf3", "nf4"])
    p.add_argument("--skip", nargs="*", default=[], choices=CONTESTANTS[:2])
    p.add_argument("--run", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.run:
        print(json.dumps(contest(args)))
        return

    import torch

    rows, found = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for who in (who for who in CONTESTANTS if who not in args.skip):
            command = [sys.executable, __file__, *sys.argv[1:], "--run", who, "--folder", scratch]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rows[who] = json.loads(done.stdout.splitlines()[-1])
            found[who] = torch.load(Path(scratch) / who, weights_only=True)
            print(f"{who}: {rows[who]['cpu_s']:.1f} CPU seconds", file=sys.stderr)
    weight, inputs, grid = problem(args)
    full = weight.unflatten(1, (-1, args.group))
    unclipped = errors(
        weight, inputs, grid, full.amin(-1).clamp(max=0), full.amax(-1).clamp(min=0)
    ).sum()
    first = next(iter(found.values()))
    print(
        f"{args.rows} x {args.columns}, groups of {args.group}, {args.tokens} tokens, "
        f"{args.quant_type} {grid.bits} bits, one thread"
    )
    print("| | CPU s | of ours | memory it adds, MB | same ranges | error / unclipped |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for who, row in rows.items():
        same = (found[who][0] == first[0]) & (found[who][1] == first[1])
        share = errors(weight, inputs, grid, *found[who]).sum() / unclipped
        print(
            f"| {who} | {row['cpu_s']:.2f} | {row['cpu_s'] / rows['ours']['cpu_s']:.1f} | "
            f"{row['added_mb']:.0f} | {same.double().mean():.3%} | {share:.6f} |"
        )


if __name__ == "__main__":
    main()
