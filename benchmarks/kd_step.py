"""One step of word-level distillation, chunked against naive: tokens/s and peak memory, in one run.

    python benchmarks/kd_step.py                    8 x 512 tokens, the vocabulary of GPT-2, float32
    python benchmarks/kd_step.py --dtype bfloat16 --batch 4 --loss reverse_kl
    python benchmarks/kd_step.py --device cuda --layers 12 --hidden 768

A step is: the teacher's forward, the student's forward, the divergence over all positions, and the
backward pass; teacher and student are GPT-2s of --layers blocks, the student half as wide. "naive"
is the textbook: both models' logits, softmax, logarithm, sum. "logits" keeps both B x T x V tensors
of logits and computes the divergence in chunks; "chunked" is what minillm trains with: no such
tensor exists. TRL's GKD loss runs beside them where ``import trl`` works. Each runs in a process of
its own, of which the peak is measured from what it had once the models stood.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from functools import partial

WAYS = ("naive", "logits", "chunked", "trl")


def build(args, hidden: int):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary, n_embd=hidden, n_layer=args.layers, n_head=hidden // 32,
        n_positions=args.length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(args.device, getattr(torch, args.dtype))
    model.config.use_cache = False
    return model


def naive(name: str, teacher, student, ids):
    """The divergence from whole logits, as one would write it first."""
    import torch

    with torch.no_grad():
        p = teacher(ids).logits.float().softmax(-1)
    q = student(ids).logits.float().softmax(-1)
    if name == "reverse_kl":
        p, q = q, p
    return (p * (p.log() - q.log())).sum()


def trl_loss(name: str, teacher, student, ids):
    import torch
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        p = teacher(ids).logits
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}[name]
    return GKDTrainer.generalized_jsd_loss(student(ids).logits, p, beta=beta, reduction="sum")


def ours(fused: bool, name: str, teacher, student, ids):
    import torch

    from harness.losses.from_hidden import over_models
    from minillm.losses import ROWS

    mask = torch.ones_like(ids)
    return over_models(ROWS[name], teacher, student, {"input_ids": ids}, mask, fused=fused)


def peak(args) -> float:
    """GB at the most so far."""
    if args.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    import torch

    return torch.cuda.max_memory_allocated() / 1e9


def contest(args) -> dict:
    """What a process does: warm up on a short batch, then time ``--steps`` steps."""
    import torch

    torch.set_num_threads(args.threads)
    teacher, student = build(args, args.hidden), build(args, args.hidden // 2)
    teacher.requires_grad_(False)
    ways = {
        "naive": naive, "trl": trl_loss, "logits": partial(ours, False),
        "chunked": partial(ours, True),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (args.batch, args.length), generator=draw)
    ids = ids.to(args.device)

    def step(some) -> float:
        loss = ways[args.run](args.loss, teacher, student, some)
        student.zero_grad(set_to_none=False)
        loss.backward()
        return loss.item() / some.numel()

    step(ids[:1, :8])
    before = peak(args)
    start = time.perf_counter()
    losses = [step(ids) for _ in range(args.steps)]
    seconds = (time.perf_counter() - start) / args.steps
    gradient = sum(p.grad.double().square().sum().item() for p in student.parameters()) ** 0.5
    return {
        "tokens_per_second": ids.numel() / seconds, "peak_gb": peak(args) - before,
        "loss": losses[-1], "gradient": gradient / ids.numel(),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--batch", type=int, default=8, help="sequences")
    p.add_argument("--length", type=int, default=512, help="tokens of each")
    p.add_argument("--vocabulary", type=int, default=50257, help="tokens there are")
    p.add_argument("--hidden", type=int, default=256, help="the teacher's width, a multiple of 64")
    p.add_argument("--layers", type=int, default=2, help="blocks of both")
    p.add_argument("--loss", default="forward_kl", choices=["forward_kl", "reverse_kl"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2, help="of the CPU")
    p.add_argument("--steps", type=int, default=1, help="steps to take the mean of")
    p.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    p.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    return p


def main() -> None:
    args = parser().parse_args()
    if args.run:
        print(json.dumps(contest(args)))
        return
    found = {}
    for way in WAYS:
        if way == "trl" and importlib.util.find_spec("trl") is None:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--run", way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found[way] = json.loads(done.stdout.splitlines()[-1])
        else:
            print(f"{way} failed: {(done.stderr.splitlines() or [done.returncode])[-1]}")
    print(f"{args.batch} x {args.length} tokens x {args.vocabulary}, {args.loss}, {args.dtype}")
    print("| | tokens/s | peak GB of the step | loss | gradient |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way, row in found.items():
        print(
            f"| {way} | {row['tokens_per_second']:,.0f} | {row['peak_gb']:.2f} | {row['loss']:.5f} "
            f"| {row['gradient']:.5g} |"
        )
    if {"naive", "chunked"} <= set(found):
        share = found["chunked"]["peak_gb"] / found["naive"]["peak_gb"]
        print(f"chunked: {share:.0%} of naive's memory")
    if importlib.util.find_spec("trl") is None:
        print("TRL's GKD loss is not among them: trl is not installed here")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), **found}, file, indent=1)


if __name__ == "__main__":
    main()
