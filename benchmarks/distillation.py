"""SFT, KD and MiniLLM at equal budget on a synthetic language whose optimum is known.

    python benchmarks/distillation.py                      the table: three seeds, little data
    python benchmarks/distillation.py --train 8192 --sft-lr 0.01 --continued-lr 0.03
                                                           eight times the data
    python benchmarks/distillation.py --seeds 10 --steps 200 --methods kd minillm

The language is the teacher: a small random LLaMA, drawn wide so that what it says next is peaked
and has several modes. "Human" responses are samples of it, so the best a student can do is known:
the teacher itself, at a KL of 0. The student, one block of width 16, is far too small for that and
must choose what to give up. Prompts are random words.

Every seed has a student of its own. It is fine-tuned for half of --steps; from there SFT, KD
(forward KL alone, --kd-ratio 1) and MiniLLM (the command's defaults, no plain text) go on for the
other half, over the same prompts, all with --batch responses a step and a cosine to a hundredth.
"from scratch" is SFT for --steps in one go. Sequence-level KD is not among them: the responses of
the data set are the teacher's already. Each command writes the best of eleven looks, as it does by
default: by validation loss, MiniLLM by reverse KL; where no look is better, that is the start.

Measured on held-out prompts: the KLs in nats per token, exact at each position, the reverse one
along the student's own samples, the forward one along the teacher's; what the teacher thinks of the
student's samples, per token; and Rouge-L of --samples samples, temperature 1, and of the likeliest
response, to --references samples of the teacher, the best of them.

The rates were chosen on another student (seed 1) with --train 8192, out of 0.001, 0.003, 0.01 and
0.03 for each method (the start: the last three), by forward KL, MiniLLM by reverse KL; and for SFT
again with 1024, where no rate that was tried got it below its start.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

METHODS = ("scratch", "sft", "kd", "minillm")
LABELS = {
    "half": "SFT, half: the start of the next three", "scratch": "SFT, from scratch",
    "sft": "SFT, continued", "kd": "KD", "minillm": "MiniLLM", "teacher": "the teacher: optimum",
}  # fmt: skip
COLUMNS = {
    "reverse_kl": ("reverse KL", 3), "forward_kl": ("forward KL", 3),
    "teacher_logp": ("teacher's log-prob.", 3), "rouge_l": ("Rouge-L", 2),
    "rouge_l_greedy": ("Rouge-L, greedy", 2), "tokens": ("tokens", 1), "seconds": ("seconds", 0),
}  # fmt: skip
END = 0


def build(vocabulary: int, hidden: int, layers: int, seed: int):
    import torch
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 8, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=END, pad_token_id=END, tie_word_embeddings=False,
    )).eval()  # fmt: skip


def language(args):
    """The teacher: matrices that keep their input's size, and logits of deviation --sharpness."""
    import torch

    teacher = build(args.vocabulary, args.hidden, args.layers, args.language)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if parameter.dim() == 2:
                deviation = parameter.shape[1] ** -0.5
                if "embed" in name:
                    deviation = 1.0
                elif "lm_head" in name:
                    deviation *= args.sharpness
                parameter.normal_(0, deviation)
    return teacher


def save(model, folder: Path) -> str:
    """The model as a checkpoint, with a tokenizer that knows one word per id."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"</s>": END} | {f"w{i}": i for i in range(1, model.config.vocab_size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def text(ids) -> str:
    return " ".join(f"w{i}" for i in ids.tolist() if i != END)


def prompts(args, count: int, seed: int):
    import torch

    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, args.vocabulary, (count, args.prompt), generator=draw)


def respond(args, model, asked, seed: int):
    """`minillm.sampling.Rollouts` of ``model`` alone."""
    import torch

    from minillm.sampling import sample, uniforms

    draws = uniforms(len(asked), args.response, seed)
    ones = torch.ones_like(asked)
    return sample(model, None, asked, ones, draws, alpha=0.0, ends={END}, pad=END)


def write_data(args, teacher, folder: Path) -> str:
    """Prompts, and a response each that the teacher drew."""
    folder.mkdir()
    for seed, (name, count) in enumerate((("train", args.train), ("valid", args.test))):
        asked = prompts(args, count, seed)
        made = respond(args, teacher, asked, seed)
        rows = zip(asked, made.responses, strict=True)
        lines = [json.dumps({"prompt": text(p), "response": " " + text(r)}) for p, r in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


class Judge:
    """The held-out prompts, and what the teacher says to them."""

    def __init__(self, args, teacher):
        self.args, self.teacher = args, teacher
        self.asked = prompts(args, args.test, 2)
        self.said = [respond(args, teacher, self.asked, 100 + i) for i in range(args.references)]
        texts = ([text(row) for row in made.responses] for made in self.said)
        self.references = [list(of) for of in zip(*texts, strict=True)]

    def __call__(self, student, seed: int) -> dict[str, float]:
        import torch

        from harness.generation.responses import Sampling, transformers_engine
        from harness.losses.divergence import kl_rows, reverse_kl_rows
        from harness.metrics.rouge import rouge_l

        args, asked = self.args, self.asked
        made = respond(args, student, asked.repeat(args.samples, 1), seed)
        reverse, log_p = self.along(student, made, reverse_kl_rows)
        forward = [self.along(student, said, kl_rows)[0] for said in self.said]
        settings = Sampling(args.response, temperature=0)
        ask = transformers_engine(student, argparse.Namespace(eos_token_id=END), settings)
        likeliest = [torch.tensor(row) for row in ask(asked.tolist(), list(range(len(asked))))]
        return {
            "reverse_kl": reverse, "forward_kl": statistics.mean(forward), "teacher_logp": log_p,
            "rouge_l": rouge_l(
                [text(row) for row in made.responses], self.references * args.samples
            ),
            "rouge_l_greedy": rouge_l([text(row) for row in likeliest], self.references),
            "tokens": made.mask.sum().item() / len(made.mask),
        }  # fmt: skip

    def along(self, student, made, rows) -> tuple[float, float]:
        """Means over the tokens of responses: the divergence at each, its teacher's log-prob."""
        import torch

        from harness.losses.divergence import mean_over_rows

        ids = torch.cat([made.prompts, made.responses], 1)
        first = made.prompts.shape[1] - 1
        with torch.no_grad():
            p, q = (model(ids).logits[:, first:-1] for model in (self.teacher, student))
            found = mean_over_rows(rows, p, q, made.mask)
        log_p = p.log_softmax(-1).gather(-1, made.responses[..., None])[..., 0]
        return found.item(), log_p[made.mask].mean().item()


def trained(args, method: str, model: str, out: Path, steps: int, rate: float, where, seed: int):
    """One command, with its output in a log; returns the checkpoint and seconds."""
    from minillm import finetune, train_minillm

    flags = {
        "data": where["data"], "out": out, "seed": seed, "lr": rate, "lr-decay-style": "cosine",
        "lr-min": rate / 100, "warmup-iters": 10, "total-iters": steps, "batch-size": args.batch,
        "max-length": args.prompt + args.response, "max-prompt-length": args.prompt,
        "eval-interval": max(1, steps // 10), "eval-batch-size": args.test, "device": "cpu",
    }  # fmt: skip
    main = finetune.main
    if method == "kd":
        flags |= {"type": "kd", "teacher": where["teacher"], "kd-ratio": args.kd_ratio}
    if method == "minillm":
        main = train_minillm.main
        flags |= {
            "teacher": where["teacher"], "num-rollouts": 4 * args.batch, "lm-coef": 0,
            "chunk-size": 4 * args.batch, "epochs": 1e6,
        }  # fmt: skip
    argv = [model, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]
    start = time.perf_counter()
    log = out.with_suffix(".log")
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = main(argv)
    if code:
        sys.exit(f"{method} failed: {(log.read_text().splitlines() or [code])[-1]}")
    return str(out), time.perf_counter() - start


def contest(args, seed: int, where: dict, judge: Judge, folder: Path):
    """Yields (name, values) of each model of a seed."""
    from harness.checkpoint import load

    student = build(args.vocabulary, args.student_hidden, 1, seed)
    start = save(student, folder / f"student-{seed}")
    half = args.steps // 2
    tuned = str(folder / f"half-{seed}")
    runs = {
        "half": ("sft", start, half, args.sft_lr),
        "scratch": ("sft", start, 2 * half, args.sft_lr),
        "sft": ("sft", tuned, half, args.continued_lr),
        "kd": ("kd", tuned, half, args.kd_lr),
        "minillm": ("minillm", tuned, half, args.minillm_lr),
    }
    for name in ("half", *args.methods):
        method, model, steps, rate = runs[name]
        out = folder / f"{name}-{seed}"
        made, seconds = trained(args, method, model, out, steps, rate, where, seed)
        yield name, judge(load.load_model(made), seed) | {"seconds": seconds}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30], help="a student each")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    p.add_argument("--steps", type=int, default=2000, help="in all; a half from the common start")
    p.add_argument("--batch", type=int, default=64, help="responses of a step")
    p.add_argument("--sft-lr", type=float, default=3e-3, help="of the start and from scratch")
    p.add_argument("--continued-lr", type=float, default=1e-3, help="of SFT, continued")
    p.add_argument("--kd-lr", type=float, default=3e-2)
    p.add_argument("--kd-ratio", type=float, default=1.0, help="the divergence's part in KD")
    p.add_argument("--minillm-lr", type=float, default=1e-2)
    p.add_argument("--language", type=int, default=0, help="seed of the teacher's weights")
    p.add_argument("--vocabulary", type=int, default=64, help="words, the end among them")
    p.add_argument("--hidden", type=int, default=64, help="the teacher's width")
    p.add_argument("--layers", type=int, default=3, help="the teacher's blocks")
    p.add_argument("--sharpness", type=float, default=3.0, help="deviation of its logits")
    p.add_argument("--student-hidden", type=int, default=16, help="its width; it has one block")
    p.add_argument("--prompt", type=int, default=4, help="words")
    p.add_argument("--response", type=int, default=20, help="words, at most")
    p.add_argument("--train", type=int, default=1024, help="examples to train on")
    p.add_argument("--test", type=int, default=512, help="held-out prompts, as for validation")
    p.add_argument("--samples", type=int, default=4, help="of a model for each of them")
    p.add_argument("--references", type=int, default=8, help="samples of the teacher for Rouge-L")
    p.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    return p


def main() -> None:
    args = parser().parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        teacher = language(args)
        where = {"data": write_data(args, teacher, folder / "data")}
        where["teacher"] = save(teacher, folder / "teacher")
        judge = Judge(args, teacher)
        for seed in args.seeds:
            for label, values in contest(args, seed, where, judge, folder):
                found.setdefault(label, []).append(values)
                said = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
                print(f"seed {seed}, {label}: {said}", file=sys.stderr, flush=True)
            # The optimum has its own noise in what is sampled.
            found.setdefault("teacher", []).append(judge(teacher, seed))
    print(f"| | {' | '.join(title for title, _ in COLUMNS.values())} |")
    print(f"| --- |{' ---: |' * len(COLUMNS)}")
    for label in (label for label in LABELS if label in found):
        cells = []
        for key, (_, digits) in COLUMNS.items():
            values = [row[key] for row in found[label] if key in row]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        print(f"| {LABELS[label]} | {' | '.join(cells)} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), **found}, file, indent=1)


if __name__ == "__main__":
    main()
