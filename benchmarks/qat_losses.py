"""CAKLD against the forward KL, the reverse KL, JSD and plain cross entropy, several seeds each.

    python benchmarks/qat_losses.py                       tiny-llama at 2 bits: half an hour
    python benchmarks/qat_losses.py --bits 3 --losses cakld ce --seeds 10

Every run is the same command but for --kd_loss_type and --seed (the order of the data): same start
(clipped), data, steps and learning rate, looked at only at the end.
Measured afterwards on the held-out text: perplexity, both KLs from the dense model, and the share
of equal first choices. Results that are there already are kept.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

LABELS = {
    "cakld": "CAKLD", "forward": "forward KL", "reverse": "reverse KL", "jsd": "JSD, .5",
    "ce": "cross entropy",
}  # fmt: skip
# Our column, and how the label of the harness begins.
COLUMNS = {
    "perplexity": "PPL", "KL from dense": "KL from", "reverse KL": "reverse KL from",
    "first choice, %": "top-1",
}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="tiny-llama")
    p.add_argument("--text", default="stdlib", help="calibration and held-out text")
    p.add_argument("--data", default="stdlib", help="what is trained on")
    p.add_argument("--bits", type=int, default=2)
    p.add_argument("--q_group_size", type=int, default=128)
    p.add_argument("--losses", nargs="+", default=list(LABELS), choices=list(LABELS))
    p.add_argument("--seeds", nargs="+", type=int, default=[10, 20, 30])
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--learning_rate", default="1e-3")
    p.add_argument("--out", type=Path, default=Path("out/qat_losses"))
    args = p.parse_args()
    clip = args.out / f"clipped-w{args.bits}-g{args.q_group_size}"
    width = ["--q_group_size", str(args.q_group_size)]
    if not clip.exists():
        run("-m", "bitdistiller.autoclip", args.model, args.text, "--w_bit", str(args.bits), *width,
            "--n_samples", "64", "--seqlen", "512", "--out", str(clip))  # fmt: skip
    rows = {"start: clipped": [measure(args, clip)]}
    for loss in args.losses:
        for seed in args.seeds:
            out = args.out / f"w{args.bits}-g{args.q_group_size}-{loss}-{seed}"
            if not out.exists():
                train(args, clip, loss, seed, out, width)
            rows.setdefault(LABELS[loss], []).append(measure(args, out))
            print(f"{out.name}: {rows[LABELS[loss]][-1]}", file=sys.stderr)
    print(f"| loss | {' | '.join(COLUMNS)} |")
    print("| --- |" + " ---: |" * len(COLUMNS))
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(cell([row[c] for row in found]) for c in COLUMNS)} |")


def train(args, clip: Path, loss: str, seed: int, out: Path, width: list[str]) -> None:
    run("-m", "bitdistiller.train", args.model, "--clip", str(clip), "--data", args.data,
        "--bits", str(args.bits), *width, "--kd_loss_type", loss, "--seed", str(seed),
        "--max_steps", str(args.steps), "--learning_rate", args.learning_rate,
        "--lr_scheduler_type", "cosine", "--warmup_steps", "20", "--model_max_length", "256",
        "--per_device_train_batch_size", "8", "--ppl", args.text, "--ppl_limit", "16",
        "--eval_steps", str(args.steps), "--out", str(out))  # fmt: skip


def measure(args, folder: Path) -> dict[str, float]:
    file = args.out / "results" / f"{folder.name}.json"
    # What was measured before is kept by the command itself.
    run("-m", "harness", "eval", str(folder), "--ppl", args.text, "--divergence-from", args.model,
        "--out", str(file))  # fmt: skip
    metrics = json.loads(file.read_text())["metrics"].values()
    found = {row["label"]: row["value"] for metric in metrics for row in metric["rows"]}
    return {
        column: next(value for label, value in found.items() if label.startswith(start))
        for column, start in COLUMNS.items()
    }


def cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
