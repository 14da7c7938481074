"""A teacher's probabilities on disk: at each label the top_k log-probabilities, and what all other
tokens weigh together (the tail). From them KD trains with no teacher in memory.

Both distributions become ones over top_k + 1 outcomes, of which the last is "any other token". No
f-divergence grows by that; the forward KL falls by exactly tail x KL(teacher's tail || student's
tail), each tail normalised, which is all of the difference to KD in memory but for the rounding of
log-probabilities to float16 (at most 2^-11 of their size).

Files: shard-N.safetensors holds ids [R, K], uint16 or int32, log_probs float16 [R, K], falling, and
log_tail float32 [R]: 4 K + 4 bytes a label for vocabularies of up to 65,536 tokens, else 6 K + 4.
cache.json says of what. Legend: R labels, K = top_k, V vocabulary.
"""

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.checkpoint import checkpoint as again

from harness import paths
from harness.data.example_sets import Examples
from harness.errors import UserError, one_line
from harness.losses.divergence import CHUNK_ELEMENTS, LOG_ZERO, RowFunction
from harness.training.batching import IGNORED
from harness.training.validation import inputs_of

NOTE = "cache.json"
SHARD_BYTES = 2**25  # what is in memory before it is written, and what a kill may cost
AGAIN = "the cache is damaged, make it again with cache_teacher --overwrite."
KEYS = ("ids", "log_probs", "log_tail")


def counts(examples: Examples) -> list[int]:
    """Labels of each example."""
    pairs = zip(examples.lengths, examples.firsts, strict=True)
    return [length - first for length, first in pairs]


def content(examples: Examples) -> str:
    """A hash of the tokens and of where responses begin: two tokenizers that make the same tokens
    of the same data have the same."""
    digest = hashlib.sha256(json.dumps([examples.lengths, examples.firsts]).encode())
    for part in examples.rows.data.column("ids").chunks:
        digest.update(part.flatten().to_numpy())
    return digest.hexdigest()[:16]


def bytes_per_label(top_k: int, vocabulary: int) -> int:
    return top_k * (2 + (2 if vocabulary <= 2**16 else 4)) + 4


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def cut(examples: Examples, width: int) -> list[int]:
    """Edges of the shards, in examples: at least one each, and else at most SHARD_BYTES;
    ``width`` bytes a label."""
    edges, used = [0], 0
    for index, labels in enumerate(counts(examples)):
        if used and (used + labels) * width > SHARD_BYTES:
            edges.append(index)
            used = 0
        used += labels
    return [*edges, len(examples)]


def compress(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """What is stored of logits [R, V], of any float dtype, on the CPU.

    Raises:
        UserError: they are NaN or infinite.
    """
    ids, tops, tails = [], [], []
    for part in logits.split(max(1, CHUNK_ELEMENTS // logits.shape[-1])):
        log_p = part.float().log_softmax(-1)
        top = log_p.topk(top_k, sorted=True)
        rest = log_p.scatter(1, top.indices, LOG_ZERO).logsumexp(-1)
        ids.append(top.indices.cpu())
        tops.append(top.values.clamp_min(LOG_ZERO).half().cpu())
        tails.append(rest.clamp_min(LOG_ZERO).cpu())
    kind = torch.uint16 if logits.shape[-1] <= 2**16 else torch.int32
    kept = torch.cat(ids).to(kind), torch.cat(tops), torch.cat(tails)
    if kept[1][:, 0].isnan().any():  # one such logit makes its row NaN
        raise UserError(
            f"the teacher gives NaN or infinite logits in {logits.dtype}; it is damaged, or try "
            "--dtype bfloat16 or float32."
        )
    return dict(zip(KEYS, kept, strict=True))


class Cache:
    """The probabilities in ``folder``, mapped into memory, for these examples.

    Attributes:
        vocabulary: of how many logits, from the first, the teacher's distribution is.
        identity: what a resumed training run must find again.

    Raises:
        UserError: there is no cache, it is damaged, or it was made for other examples, or for more
            logits than the student has.
    """

    def __init__(self, folder: str | Path, examples: Examples, student_vocabulary: int):
        self.folder = Path(folder)
        if not (self.folder / NOTE).is_file():
            raise UserError(f"{folder} holds no {NOTE}; make a cache with cache_teacher.")
        note = paths.read_json(self.folder / NOTE)
        lacking = {"content", "examples", "edges", "vocabulary", "teacher_files", "top_k"} - {*note}
        if lacking:
            raise UserError(f"{self.folder / NOTE} lacks {min(lacking)}; {AGAIN}")
        if note["content"] != content(examples):
            raise UserError(
                f"{folder} was made for {note['examples']} other examples, and there are "
                f"{len(examples)}; give cache_teacher the same --data, lengths and limits as here."
            )
        self.vocabulary = note["vocabulary"]
        if self.vocabulary > student_vocabulary:
            raise UserError(
                f"{folder} is of {self.vocabulary} logits, the student has {student_vocabulary}; "
                "give cache_teacher --student."
            )
        self.identity = {key: note[key] for key in ("teacher_files", "top_k", "vocabulary")}
        self.starts = [0, *accumulate(counts(examples))]
        self.edges = note["edges"]
        self.shards = [self._shard(n, pair) for n, pair in enumerate(pairwise(self.edges))]

    def _shard(self, number: int, edges: tuple[int, int]) -> list:
        """The slices of a shard, none of it in memory."""
        path = self.folder / shard_name(number)
        first, last = (self.starts[edge] for edge in edges)
        try:
            file = safe_open(path, framework="pt")
            slices = [file.get_slice(key) for key in KEYS]
        except (OSError, SafetensorError) as error:
            why = one_line(error)
            raise UserError(f"{path} cannot be read ({why}); {AGAIN}") from error
        if any(part.get_shape()[0] != last - first for part in slices):
            raise UserError(f"{path} has not the {last - first} labels of its examples; {AGAIN}")
        return slices

    def rows(self, indices: list[int]) -> dict[str, Tensor]:
        """What belongs in the micro-batch of these examples (`batching.collate`): "teacher_ids"
        int64, "teacher_log_probs" [R, K] and "teacher_log_tail" [R] float32, the labels of one
        example after those of another."""
        examples = [self._example(index) for index in indices]
        ids, tops, tails = (torch.cat(parts) for parts in zip(*examples, strict=True))
        return {
            "teacher_ids": ids.long(), "teacher_log_probs": tops.float(),
            "teacher_log_tail": tails,
        }  # fmt: skip

    def _example(self, index: int) -> list[Tensor]:
        number = bisect_right(self.edges, index) - 1
        before = self.starts[self.edges[number]]
        start, end = self.starts[index] - before, self.starts[index + 1] - before
        return [part[start:end] for part in self.shards[number]]


def buckets(log_q: Tensor, ids: Tensor, tops: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """(log p, log q) [R, K + 1] over the teacher's top tokens and the rest.

    Args:
        log_q: the student's log-probabilities [R, V]. ids int64, tops [R, K], tail [R]: the
            teacher's; what rounding has made of their sum is set right.
    """
    rest = log_q.scatter(1, ids, LOG_ZERO).logsumexp(-1, keepdim=True)
    both = torch.cat([tops, tail[:, None]], 1)
    log_q = torch.cat([log_q.gather(1, ids), rest.clamp_min(LOG_ZERO)], 1)
    return both.log_softmax(-1).clamp_min(LOG_ZERO), log_q


def loss(
    rows: RowFunction,
    kd_ratio: float,
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    tops: Tensor,
    tail: Tensor,
) -> Tensor:
    """[3]: (1 - kd_ratio) CE + kd_ratio rows, and its two parts, summed over the labels.

    Args:
        rows: a row function, of divergence.py say. logits: the student's [R, V], as wide as
            the teacher's distribution. labels: int64 [R]. ids, tops, tail: as in :func:`buckets`.
    """

    def part(logits, labels, *teacher):
        log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        log_q = log_q.clamp_min(LOG_ZERO)
        ce = -log_q.gather(1, labels[:, None])[:, 0]
        divergence = rows(*buckets(log_q, *teacher))
        mixed = (1 - kd_ratio) * ce + kd_ratio * divergence
        return torch.stack([mixed, ce, divergence]).sum(1)

    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    pieces = [tensor.split(size) for tensor in (logits, labels, ids, tops, tail)]
    return sum(again(part, *some, use_reentrant=False) for some in zip(*pieces, strict=True))


def distillation(rows: RowFunction, kd_ratio: float, vocabulary: int, running, batch: dict):
    """KD of a micro-batch with the cache's rows in it: (sum of losses, the sums to report), as
    `harness.training.loop.train` calls it once the first three are given."""
    device = running.device
    labels = batch["labels"].to(device)
    counted = labels != IGNORED
    logits = running(**inputs_of(batch, device)).logits[counted][:, :vocabulary]
    teacher = (batch[f"teacher_{key}"].to(device) for key in KEYS)
    total, ce, divergence = loss(rows, kd_ratio, logits, labels[counted], *teacher)
    return total, {"ce": ce.detach(), "kd": divergence.detach()}


def shard_ranges(edges: list[int]) -> list[range]:
    """The examples of each shard."""
    return [range(a, b) for a, b in pairwise(edges)]
