"""Unigram and Kneser-Ney n-gram perplexities: what the embedded models must clearly beat.

Interpolated Kneser-Ney with one discount per order (Chen & Goodman 1999, section 4.1.6 and
equation 26): the highest order uses counts, every lower one the number of distinct predecessors,
and the lowest is mixed with the uniform distribution so that nothing has probability zero.
"""

import numpy as np


class Level:
    """Counts of one order: n-gram keys (base-V numbers, int64) with their counts."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, base: int):
        self.keys, self.counts = keys, counts
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        self.discount = ones / (ones + 2 * twos) if ones else 0.5
        self.contexts, first = np.unique(keys // base, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.kinds = np.diff(np.append(first, len(keys)))


def fit(tokens: np.ndarray, base: int, order: int = 4) -> list[Level]:
    """Levels of orders 1 to `order` of tokens [n] below `base`; base ** order must fit int64."""
    levels = []
    keys, counts = np.unique(_keys(tokens, base, order), return_counts=True)
    for n in range(order, 0, -1):
        levels.append(Level(keys, counts, base))
        # Continuation counts: in how many distinct n-grams does the shorter one end?
        keys, counts = np.unique(keys % base ** (n - 1), return_counts=True)
    return levels[::-1]


def _keys(tokens: np.ndarray, base: int, n: int) -> np.ndarray:
    """Keys of the n-grams ending at positions n - 1 and on: int64 [len - n + 1]."""
    tokens = tokens.astype(np.int64)
    keys = np.zeros(len(tokens) - n + 1, dtype=np.int64)
    for offset in range(n):
        keys = keys * base + tokens[offset : offset + len(keys)]
    return keys


def _find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    places = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return places, sorted_keys[places] == wanted


def log_probabilities(levels: list[Level], windows: np.ndarray, base: int) -> np.ndarray:
    """Natural log-probabilities of tokens 1..T-1 of each window [N, T], context inside it.

    Returns float64 [N, T - 1].
    """
    out = np.empty((windows.shape[0], windows.shape[1] - 1))
    for row, window in enumerate(windows):
        probability = np.full(len(window), 1.0 / base)
        for n, level in enumerate(levels, 1):
            keys = _keys(window, base, n)
            lower = probability[n - 1 :]
            place, seen = _find(level.keys, keys)
            count = np.where(seen, level.counts[place], 0)
            place, known = _find(level.contexts, keys // base)
            total, kinds = level.totals[place], level.kinds[place]
            mixed = (np.maximum(count - level.discount, 0) + level.discount * kinds * lower) / total
            probability[n - 1 :] = np.where(known, mixed, lower)
        out[row] = np.log(probability[1:])
    return out


def unigram_log_probabilities(tokens: np.ndarray, windows: np.ndarray, base: int) -> np.ndarray:
    """The same of an add-one unigram model of `tokens`."""
    counts = np.bincount(tokens, minlength=base) + 1.0
    return np.log(counts / counts.sum())[windows[:, 1:]]
