"""The windows that a layer-wise method looks at: drawn, with or without BOS at their heads."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from harness import distributed
from harness.blocks.decoder import Decoder
from harness.blocks.streams import stream_logits
from harness.checkpoint import load
from harness.checkpoint.load import window_length
from harness.data import corpora
from harness.errors import UserError
from harness.losses.nll import perplexity_of_logits
from harness.modules import get_matrix, linears

BOS = ("auto", "none", "window")
TRIAL = 4  # windows
HELPS = 0.9  # BOS is used where it takes their perplexity below this share of what it was


def draw(
    decoder: Decoder,
    dataset: str,
    *,
    nsamples: int,
    seqlen: int | None,
    seed: int,
    bos: str = "auto",
    held_out: int = 0,
    try_bos: bool = True,
) -> tuple[Tensor, dict]:
    """Calibration windows int64 [nsamples, seqlen], and what the card says of them.

    Args:
        seqlen: None is the model's context, at most 2,048.
        bos: "none" (the published protocol), "window" (every window begins with it), or "auto",
            see :func:`choose`. try_bos: False takes "auto" for "none", and runs nothing.

    Raises:
        UserError: the text does not suffice, ``seqlen`` or ``bos`` does not fit the model.
    """
    seqlen = window_length(decoder.config, seqlen)
    tokenizer = load.load_tokenizer(decoder.weights.folder)
    windows = corpora.calibration(
        tokenizer, dataset, nsamples=nsamples, seqlen=seqlen, seed=seed, held_out=held_out
    )
    corpora.check_token(int(windows.max()), decoder.config)
    if bos == "auto" and not try_bos:
        bos = "none"
    chosen = choose(bos, tokenizer, windows, lambda some: _stream(decoder, some))
    note = {"dataset": dataset, "nsamples": nsamples - held_out, "seqlen": seqlen, "seed": seed}
    if chosen:
        windows, note["bos"] = put_bos(windows, tokenizer), "at the head of every window"
    _say_few(decoder, windows)
    return windows, note


def _stream(decoder: Decoder, windows: Tensor) -> Iterable[tuple[int, Tensor]]:
    where = {"device": str(decoder.device), "dtype": decoder.dtype, "batch_size": 1}
    return stream_logits(decoder.weights.folder, windows, **where)


def put_bos(windows: Tensor, tokenizer) -> Tensor:
    """Windows [N, T] with BOS at the head of each and their first T - 1 tokens behind it."""
    bos = torch.full((len(windows), 1), tokenizer.bos_token_id, dtype=windows.dtype)
    return torch.cat([bos, windows[:, :-1]], dim=1)


def choose(
    bos: str,
    tokenizer,
    windows: Tensor,
    logits: Callable[[Tensor], Iterable[tuple[int, Tensor]]],
) -> bool:
    """Whether BOS goes to the head of every window.

    "auto" keeps the published protocols, which have none, unless the model needs it: it is tried
    out on the first TRIAL windows, whose first token gives way to it, and used where it takes their
    perplexity below HELPS of what it was. That costs two forwards of those windows. Gemma 3's is
    four times as high without.

    Args:
        windows: int64 [N, T] without BOS. logits: those of some windows, as
            :func:`harness.blocks.streams.stream_logits` gives them.

    Raises:
        UserError: "window", and the tokenizer has no BOS; or no such choice.
    """
    if bos not in BOS:
        raise UserError(f"--bos {bos}: expected {', '.join(BOS)}.")
    token = tokenizer.bos_token_id
    if bos == "window" and token is None:
        raise UserError("--bos window: the tokenizer has no BOS token; use --bos none.")
    if bos != "auto" or token is None:
        return bos == "window"
    plain = windows[:TRIAL]
    headed = plain.clone()
    headed[:, 0] = token
    if torch.equal(plain, headed):
        return False
    try:
        before, after = (perplexity_of_logits(logits(w), w, "BOS?").value for w in (plain, headed))
    except UserError:  # NaN logits: the work itself says where they begin
        return False
    helps = distributed.broadcast_object(after < HELPS * before)
    if helps:
        distributed.say(
            f"BOS goes to the head of every window: on {len(plain)} of them it takes the "
            f"perplexity from {before:.1f} to {after:.1f} (--bos none leaves it out)"
        )
    return helps


def _say_few(decoder: Decoder, windows: Tensor) -> None:
    widest = max(get_matrix(m).shape[1] for b in decoder.blocks for m in linears(b).values())
    if windows.numel() < widest:
        distributed.say(
            f"{windows.numel()} calibration tokens are fewer than the {widest} columns of the "
            "widest layer: the result can be worse than round-to-nearest; raise --nsamples or "
            "--seqlen"
        )
