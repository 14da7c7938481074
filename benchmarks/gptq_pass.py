"""One GPTQ pass, ours against the textbook order, in one run: CPU seconds, wall, memory, error.

    python benchmarks/gptq_pass.py                      8 LLaMA blocks of width 1024, one CPU thread
    python benchmarks/gptq_pass.py --dtype bfloat16
    python benchmarks/gptq_pass.py --device cuda        one block of a 7B shape, kernel against loop

The textbook order keeps a Hessian per linear, updates it sample by sample with full products,
factors it by Cholesky, inverse and Cholesky, walks the columns one by one with rank-1 updates
inside blocks of 128, and runs every block twice over the calibration set. "floor" is what no
layer-wise method can do without: one forward of the calibration set and one symmetric product per
stage. Every contestant runs in a process of its own. Errors are |(W - Q) X|² / |W X|² of every
linear on the dense model's own inputs, measured afterwards in the same way for both results.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = {"bits": 4, "group_size": 128, "symmetric": True}


def make_model(folder: Path, args) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=args.hidden, intermediate_size=args.mlp,
        num_hidden_layers=args.blocks, num_attention_heads=args.hidden // 128,
        num_key_value_heads=args.hidden // 128, max_position_embeddings=2048,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    # Correlated features of unequal size, as trained models have them: white noise is too easy.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.logspace(-1, 1, args.hidden))
    model.to(getattr(torch, args.dtype)).save_pretrained(folder)


def windows_of(args):
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2048, (args.nsamples, args.seqlen), generator=generator)


def measure(function) -> dict:
    """CPU and wall seconds of ``function()`` and the process's peak memory; its dict is merged."""
    wall, cpu = time.perf_counter(), time.process_time()
    extra = function() or {}
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        **extra,
    }


def dtype_of(args):
    """What is computed in, whatever this machine is fast in."""
    import torch

    return getattr(torch, args.dtype)


def run_ours(folder: Path, out: Path, args) -> None:
    import torch

    from gptq.method import _gptq_update
    from harness.blocks import sequential
    from harness.blocks.decoder import Decoder
    from harness.quant.grid import Grid
    from harness.quant.hessian import Hessian
    from harness.quant.scheme import Scheme

    grid = Grid(**GRID)
    decoder = Decoder(folder, device=args.device, dtype=dtype_of(args))
    dtypes = {"dtype": decoder.stored_dtype, "scale_dtype": decoder.stored_dtype}
    update = _gptq_update(grid, dtypes, 0.01, False, False)
    act = sequential.per_stage(update, Hessian, args.run == "ours")
    method = sequential.Method("gptq", {}, [act], layout="compressed-tensors", scheme=Scheme(grid))
    sequential.compress(decoder, method, out, base=str(folder), windows=windows_of(args))
    if args.device == "cuda":
        torch.cuda.synchronize()


def run_floor(folder: Path, args) -> dict:
    """One forward, and the symmetric products of every stage; timed apart."""
    import torch

    from harness.blocks.decoder import Decoder, batches
    from harness.blocks.stages import find_stages
    from harness.quant.hessian import Hessian

    decoder = Decoder(folder, dtype=dtype_of(args))
    parts = batches(windows_of(args))
    forward = products = 0.0
    hidden = [decoder.embed(p) for p in parts]
    for index in range(len(decoder)):
        block = decoder.load(index)
        stages = find_stages(block, lambda i=index, h=hidden[0]: decoder.forward(i, h))
        start = time.process_time()
        hidden = [decoder.forward(index, h) for h in hidden]
        forward += time.process_time() - start
        for names in stages:
            columns = block.get_submodule(names[0]).weight.shape[1]
            x = torch.randn(parts[0].numel(), columns).to(decoder.dtype)
            hessian = Hessian(columns)
            start = time.process_time()
            for _ in parts:
                hessian.add(x)
            products += time.process_time() - start
        decoder.release(index)
    return {"forward_cpu_s": forward, "products_cpu_s": products, "cpu_s": forward + products}


def run_textbook(folder: Path, out: Path, args) -> None:
    import torch
    from safetensors.torch import save_file

    from harness.blocks.decoder import Decoder
    from harness.modules import linears

    decoder = Decoder(folder, dtype=dtype_of(args))
    windows = windows_of(args)
    hidden = [decoder.embed(w[None]) for w in windows]
    results = {}
    for index in range(len(decoder)):
        block = decoder.load(index)
        moments = {}

        def collect(name, moments=moments):
            def hook(module, inputs):
                x = inputs[0].flatten(0, -2).T.float()
                h, count = moments.get(name, (torch.zeros(len(x), len(x)), 0))
                h *= count / (count + 1)
                x = (2 / (count + 1)) ** 0.5 * x
                moments[name] = (h + x @ x.T, count + 1)

            return hook

        hooks = [m.register_forward_pre_hook(collect(n)) for n, m in linears(block).items()]
        for h in hidden:
            decoder.forward(index, h)
        for handle in hooks:
            handle.remove()
        for name, module in linears(block).items():
            weight = textbook_solver(module.weight.data.float(), moments.pop(name)[0])
            module.weight.data.copy_(weight)
            results[f"{decoder.prefix}.{index}.{name}.weight"] = module.weight.data.clone()
        hidden = [decoder.forward(index, h) for h in hidden]
        decoder.release(index)
    out.mkdir()
    save_file(results, out / "model.safetensors")


def textbook_solver(weight, hessian):
    import torch

    weight = weight.clone()
    columns, g, top = weight.shape[1], GRID["group_size"], 2 ** GRID["bits"] - 1
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, columns, 128):
        end = min(start + 128, columns)
        block, errors = weight[:, start:end].clone(), torch.zeros_like(weight[:, start:end])
        small = factor[start:end, start:end]
        for j in range(end - start):
            if (start + j) % g == 0:
                here = weight[:, start + j : start + j + g]
                scale = 2 * here.abs().amax(dim=1) / top
            column = block[:, j]
            code = (torch.round(column / scale) + (top + 1) / 2).clamp(0, top)
            value = scale * (code - (top + 1) / 2)
            result[:, start + j] = value
            error = (column - value) / small[j, j]
            block[:, j:] -= error[:, None] * small[j, j:][None]
            errors[:, j] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return result


def compare_errors(folder: Path, outs: dict[str, Path], args) -> dict[str, dict[str, float]]:
    """Relative output error per kind of linear and result, on the dense model's own inputs."""
    import torch
    from safetensors.torch import load_file

    from harness.blocks.decoder import Decoder
    from harness.checkpoint.load import Weights
    from harness.modules import linears

    decoder = Decoder(folder, dtype=dtype_of(args))
    read = {}
    for name, out in outs.items():
        packed = (out / "config.json").is_file()
        read[name] = Weights(out).read if packed else load_file(out / "model.safetensors").get
    hidden = decoder.embed(windows_of(args)[:4])
    errors: dict[str, dict[str, float]] = {}
    for index in range(len(decoder)):
        block, inputs = decoder.load(index), {}
        hooks = [
            m.register_forward_pre_hook(lambda _, x, n=n, i=inputs: i.__setitem__(n, x[0]))
            for n, m in linears(block).items()
        ]
        hidden = decoder.forward(index, hidden)
        for hook in hooks:
            hook.remove()
        for name, module in linears(block).items():
            x, weight = inputs[name].flatten(0, -2).float(), module.weight.float()
            for who in outs:
                got = read[who](f"{decoder.prefix}.{index}.{name}.weight").float()
                share = (x @ (weight - got).T).square().sum() / (x @ weight.T).square().sum()
                row = errors.setdefault(name, {})
                row[who] = row.get(who, 0.0) + share.item() / len(decoder)
        decoder.release(index)
    assert torch.isfinite(hidden).all()
    return errors


def cuda_report(folder: Path, args) -> None:
    """Seconds per block, Triton loop against torch loop, share of the GPU's matmul peak."""
    import torch

    import gptq.solver
    from gptq.kernel import triton_loop
    from harness.quant.grid import Grid
    from harness.quant.hessian import Hessian, inverse_factor

    def seconds(function, repeats=3):
        function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    out = folder.parent / "out"
    run_ours(folder, out, args)  # compiles the kernel
    first = time.perf_counter()
    run_ours(folder, folder.parent / "again", args)
    whole = time.perf_counter() - first
    n, tokens = args.hidden, args.nsamples * args.seqlen
    half = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / seconds(lambda: half @ half, 10)
    x = torch.randn(8192, args.mlp, device="cuda", dtype=torch.bfloat16)
    hessian = Hessian(args.mlp, "cuda")
    add = seconds(lambda: hessian.add(x))
    matrix = (x.float().T @ x.float()) / len(x)
    factor_time = seconds(lambda: inverse_factor(matrix))
    factor, _ = inverse_factor(matrix)
    weight, grid = torch.randn(n, args.mlp, device="cuda"), Grid(**GRID)
    solve = lambda: gptq.solver.solve(weight, factor, grid, dtype=torch.bfloat16)  # noqa: E731
    kernel = seconds(solve)
    gptq.solver._pick_loop = lambda _: gptq.solver.torch_loop
    loop = seconds(solve, 1)
    gptq.solver._pick_loop = lambda _: triton_loop
    linear_weights = 4 * n * n + 3 * n * args.mlp
    useful = 2 * tokens * linear_weights + tokens * (3 * n * n + args.mlp**2)
    print(f"one block, hidden {n}, MLP {args.mlp}, {args.nsamples} windows of {args.seqlen}, bf16")
    print(f"| whole pass over the block, reading and writing included | {whole:.2f} s |")
    print(f"| of it Hessian of the widest stage, all tokens | {add * tokens / 8192:.3f} s |")
    print(f"| of it factorization of the widest stage ({args.mlp}) | {factor_time:.3f} s |")
    print(f"| down projection {n} x {args.mlp}: Triton loop | {kernel:.3f} s |")
    print(f"| the same with the torch loop | {loop:.3f} s |")
    print(f"| bf16 product peak measured here | {peak / 1e12:.0f} TFLOP/s |")
    share = len(x) * args.mlp**2 / add / peak
    print(f"| symmetric Hessian product, useful operations over peak | {share:.0%} |")
    print(f"| whole pass, useful operations over peak | {useful / whole / peak:.0%} |")
    print(f"| peak GPU memory | {torch.cuda.max_memory_allocated() / 1e9:.1f} GB |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default=None, help="float32 (CPU default) or bfloat16 (GPU default)")
    for name in ("hidden", "mlp", "blocks", "nsamples", "seqlen"):
        p.add_argument(f"--{name}", type=int)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--run", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args()
    big = args.device == "cuda"
    shape = (4096, 11008, 1, 128, 2048) if big else (1024, 2816, 8, 32, 512)
    for name, value in zip(("hidden", "mlp", "blocks", "nsamples", "seqlen"), shape, strict=True):
        setattr(args, name, getattr(args, name) or value)
    args.dtype = args.dtype or ("bfloat16" if big else "float32")

    import torch

    torch.set_grad_enabled(False)
    if args.run:
        # imports are not what is measured
        import compressed_tensors.compressors.pack_quantized.helpers  # noqa: F401
        import transformers  # noqa: F401

        import gptq.method  # noqa: F401
        import harness.blocks.sequential  # noqa: F401

        torch.set_num_threads(args.threads)
        folder = Path(args.folder)
        out = folder.parent / args.run
        runs = {
            "textbook": lambda: run_textbook(folder, out, args),
            "ours": lambda: run_ours(folder, out, args),
            "ours, plain order": lambda: run_ours(folder, out, args),
            "floor": lambda: run_floor(folder, args),
        }
        print(json.dumps(measure(runs[args.run])))
        return

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, args)
        if big:
            cuda_report(folder, args)
            return
        rows = {}
        for who in ("textbook", "ours", "ours, plain order", "floor"):
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--run",
                who,
                "--folder",
                str(folder),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            rows[who] = json.loads(done.stdout.splitlines()[-1])
            print(f"{who}: {rows[who]['cpu_s']:.1f} CPU seconds", file=sys.stderr)
        outs = {who: Path(scratch) / who for who in rows if who != "floor"}
        errors = compare_errors(folder, outs, args)
        print(
            f"hidden {args.hidden}, MLP {args.mlp}, {args.blocks} blocks, {args.nsamples} windows "
            f"of {args.seqlen}, {args.dtype}, {args.threads} thread(s), w4 g128 symmetric"
        )
        print("| | CPU s | wall s | peak MB | mean error |\n| --- | ---: | ---: | ---: | ---: |")
        for who, row in rows.items():
            mean = (
                sum(e[who] for e in errors.values()) / len(errors) if who in outs else float("nan")
            )
            wall = "" if who == "floor" else f"{row['wall_s']:.1f}"
            error = "" if who == "floor" else f"{mean:.5f}"
            print(f"| {who} | {row['cpu_s']:.1f} | {wall} | {row['peak_mb']:.0f} | {error} |")
        floor = rows["floor"]
        print(
            f"floor: forward {floor['forward_cpu_s']:.1f} s, "
            f"products {floor['products_cpu_s']:.1f} s"
        )
        less = rows["textbook"]["cpu_s"] / rows["ours"]["cpu_s"]
        print(f"textbook / ours: {less:.2f} times less CPU")
        print(f"ours / floor: {rows['ours']['cpu_s'] / floor['cpu_s']:.2f}")
        print("| linear | " + " | ".join(outs) + " |\n| --- |" + " ---: |" * len(outs))
        for name, row in errors.items():
            print(f"| {name} | " + " | ".join(f"{row[who]:.5f}" for who in outs) + " |")


if __name__ == "__main__":
    main()
