"""Make the embedded models: tokenizer, tiny-llama and tiny-llama-student, from the `stdlib` corpus.

Three steps, so that the middle one can run on another machine than the first (the tokens travel):

    python recipes/train_tiny.py prepare  WORK             tokenizer and token arrays
    python recipes/train_tiny.py train    WORK tiny-llama  one model, from WORK to WORK/tiny-llama
    python recipes/train_tiny.py evaluate WORK tiny-llama  perplexity, n-gram baselines, quiz

Weights are trained in float32, with bfloat16 matrix products where the device is fast in them, and
stored in bfloat16. The checkpoint kept is the one with the lowest loss on the calibration split;
the test split is only evaluated.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np

END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
# Line breaks carry the indentation that follows them: one token per line of Python pays for both.
PRETOKENS = r"(?:[ \t]*\n)+[ \t]*| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+"
SHAPES = {
    "tiny-llama": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "tiny-llama-student": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 384,
    },
}


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def build_tokenizer(texts: list[str]):
    """Byte-level BPE trained on `texts`, a transformers tokenizer without special tokens added."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def prepare(work: Path) -> None:
    """Write WORK/tokenizer/ and WORK/{train,calibration,test}.npy (uint16 tokens)."""
    from harness.data import stdlib

    tokenizer = build_tokenizer(list(stdlib.documents("train").values()))
    tokenizer.save_pretrained(work / "tokenizer")
    # The name that every version of transformers knows, for version 5's TokenizersBackend.
    settings = work / "tokenizer" / "tokenizer_config.json"
    config = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    settings.write_text(json.dumps(config, indent=2) + "\n")
    for split in stdlib.SPLITS:
        if split == "train":  # documents end in the end token, so that the model learns to stop
            text = "".join(source + END for source in stdlib.documents(split).values())
        else:
            text = stdlib.text(split)
        tokens = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.uint16)
        np.save(work / f"{split}.npy", tokens)
        log(f"{split}: {len(tokens)} tokens, {len(text.encode()) / len(tokens):.2f} bytes each")


def windows(tokens: np.ndarray):
    """Non-overlapping windows of the context, tail dropped: LongTensor [n, CONTEXT]."""
    import torch

    count = len(tokens) // CONTEXT
    return torch.from_numpy(tokens[: count * CONTEXT].astype(np.int64)).view(count, CONTEXT)


def autocast(device: str):
    """bfloat16 matrix products, where the device is fast in them."""
    import torch

    from harness import precision

    return torch.autocast(device, torch.bfloat16, enabled=precision.is_fast(torch.bfloat16, device))


def mean_loss(model, batch_windows, device: str) -> float:
    """Mean next-token loss in nats over windows [n, CONTEXT]."""
    import torch
    from torch.nn import functional as F

    total = 0.0
    with torch.no_grad(), autocast(device):
        for batch in batch_windows.split(16):
            batch = batch.to(device)
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item() * len(
                batch
            )
    return total / len(batch_windows)


def add_dropout(model, chance: float) -> None:
    """Drop entries of the embeddings and of each sub-layer's output while the model trains."""
    from torch.nn import functional as F

    def drop(module, _, output):
        if isinstance(output, tuple):
            return (F.dropout(output[0], chance, module.training), *output[1:])
        return F.dropout(output, chance, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def make_optimizers(model, rate: float) -> list:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms.

    Measured on the student over half an epoch in batches of 16 windows: perplexity 109 against 264
    for AdamW alone at the best of two rates each.
    """
    import torch

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]


def train(work: Path, name: str, args: argparse.Namespace) -> None:
    """Train one model on WORK's tokens and save the best checkpoint with the tokenizer."""
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness import precision

    torch.manual_seed(args.seed)
    device = args.device
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **SHAPES[name],
    )
    model = LlamaForCausalLM(config).to(device).train()
    add_dropout(model, args.dropout)
    model.generation_config.pad_token_id = 0
    products = "bfloat16" if precision.is_fast(torch.bfloat16, device) else "float32"
    log(f"{name}: {model.num_parameters() / 1e6:.2f} M parameters, matrix products in {products}")

    tokens = np.load(work / "train.npy")
    out = work / name
    shutil.copytree(work / "tokenizer", out, dirs_exist_ok=True)
    held_out = windows(np.load(work / "calibration.npy"))
    optimizers = make_optimizers(model, args.lr)
    steps = int(args.epochs * len(tokens) / (args.batch * CONTEXT))
    warmup = max(1, min(100, steps // 10))
    every = max(1, steps // args.checks)
    draw = np.random.default_rng(args.seed)
    best, started = math.inf, time.time()
    for step in range(1, steps + 1):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = args.lr * min(step / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        # Half-length windows cost less attention; the last third learns the full context.
        length = CONTEXT // 2 if step < steps * 2 // 3 else CONTEXT
        starts = draw.integers(0, len(tokens) - length - 1, args.batch * CONTEXT // length)
        batch = torch.from_numpy(
            np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
        ).to(device)
        with autocast(device):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            log(f"step {step}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s")
        if step % every == 0 or step == steps:
            model.eval()
            held = mean_loss(model, held_out, device)
            model.train()
            log(f"step {step}/{steps} calibration loss {held:.4f} ppl {math.exp(held):.2f}")
            if held < best:
                best = held
                copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    log(f"{name}: best calibration perplexity {math.exp(best):.3f} -> {out}")


def evaluate(work: Path, name: str, device: str) -> None:
    """Test perplexity beside the n-gram models', and quiz accuracy; also to WORK/NAME.json."""
    import ngram
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.data import corpora
    from harness.metrics import multiple_choice, perplexity

    tokenizer = AutoTokenizer.from_pretrained(work / name)
    model = AutoModelForCausalLM.from_pretrained(work / name).to(device).eval()
    held_out = corpora.evaluation(tokenizer, "stdlib", seqlen=CONTEXT)
    tokens, cells = np.load(work / "train.npy"), held_out.numpy()
    levels = ngram.fit(tokens, VOCABULARY)
    quiz = multiple_choice.score(model, tokenizer, corpora.questions("stdlib-quiz"))
    result = {
        "parameters": model.num_parameters(),
        "protocol": f"{corpora.protocol('stdlib')}, windows of {CONTEXT}",
        "perplexity": perplexity.perplexity(model, held_out).value,
        "unigram": math.exp(-ngram.unigram_log_probabilities(tokens, cells, VOCABULARY).mean()),
        "4-gram": math.exp(-ngram.log_probabilities(levels, cells, VOCABULARY).mean()),
        "quiz": {key: quiz[key] for key in ("acc", "acc_norm", "acc_stderr", "n", "chance")},
    }
    (work / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {json.dumps(result, indent=1)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("prepare", "train", "evaluate"):
        sub = steps.add_parser(step)
        sub.add_argument("work", type=Path, help="working folder")
        if step != "prepare":
            sub.add_argument("name", choices=list(SHAPES))
            sub.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
        if step == "train":
            sub.add_argument("--epochs", type=float, default=4.5)
            sub.add_argument("--batch", type=int, default=8, help="windows per step")
            sub.add_argument("--lr", type=float, default=8e-3)
            sub.add_argument("--dropout", type=float, default=0.1)
            sub.add_argument("--checks", type=int, default=10, help="looks at the held-out loss")
            sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.step == "prepare":
        prepare(args.work)
    elif args.step == "train":
        train(args.work, args.name, args)
    else:
        evaluate(args.work, args.name, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
