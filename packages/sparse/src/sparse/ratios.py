"""OWL: blocks with more outliers keep more of their weights.

Yin et al., "Outlier Weighed Layerwise Sparsity", ICML 2024, arXiv:2310.05175. A block's outlier
ratio is the share of its |W| x ‖X‖ (Wanda's scores, of the dense model) above M times their mean.
Sparsities are the target less these ratios, stretched to a range of 2 lambda and shifted so that
the mean is the target.
"""

import torch

from harness import distributed, memory
from harness.blocks.block import BlockInHand
from harness.blocks.decoder import Decoder
from harness.blocks.streams import Streams
from harness.errors import UserError
from harness.modules import get_matrix
from harness.progress import track
from sparse.methods import Norms


def outlier_ratio(scores: list[torch.Tensor], m: float) -> float:
    """Share of all entries of the matrices ``scores`` that exceed ``m`` times their joint mean."""
    count = sum(s.numel() for s in scores)
    limit = m * sum(s.sum(dtype=torch.float64).item() for s in scores) / count
    return sum((s > limit).sum().item() for s in scores) / count


def sparsities(
    outliers: list[float], sparsity: float, spread: float, weights: list[int]
) -> list[float]:
    """One sparsity per block from its outlier ratio.

    Args:
        outliers: outlier ratio of every block.
        sparsity: their mean, weighted by ``weights``, the number of weights in each block (in the
            original blocks count alike, which is the same where they are of one size).
        spread: lambda; the largest and the smallest differ by twice this.

    Raises:
        UserError: a block's sparsity would leave [0, 1).
    """
    low, high = min(outliers), max(outliers)
    if high == low:
        return [sparsity] * len(outliers)
    keeps = [2 * spread * (ratio - low) / (high - low) for ratio in outliers]
    mean = sum(k * w for k, w in zip(keeps, weights, strict=True)) / sum(weights)
    result = [sparsity - keep + mean for keep in keeps]
    if min(result) < 0 or max(result) >= 1:
        raise UserError(
            f"OWL would give sparsities from {min(result):.3f} to {max(result):.3f}; expected all "
            f"of [0, 1). Use an --owl_lambda below {spread}, or another --sparsity."
        )
    return result


@torch.no_grad()
def owl(
    decoder: Decoder,
    windows: torch.Tensor,
    chosen: dict[int, list[str]],
    sparsity: float,
    m: float,
    spread: float,
) -> dict[int, float]:
    """Sparsity of each block of ``chosen`` (its linears that are to be pruned), from one more pass
    over the dense model. ``windows`` [N, T] are dealt to the ranks as in the pass itself."""
    outliers, sizes = [], []
    last = max(chosen)
    streams = Streams(decoder, windows)
    for index in track(range(last + 1), "owl", last + 1):
        hand = BlockInHand(decoder, index, streams)
        norms = {
            name: gathered.root_mean_square()
            for names, gathered in hand.statistics(Norms)
            for name in names
        }
        hand.advance()
        block = hand.block
        if index in chosen:
            names = [name for name in chosen[index] if name in norms]
            weights = [get_matrix(block.get_submodule(name)).float().abs() for name in names]
            scores = [w * norms[name] for w, name in zip(weights, names, strict=True)]
            outliers.append(outlier_ratio(scores, m))
            sizes.append(sum(w.numel() for w in weights))
        decoder.release(index)
        memory.give_back()
    shares = sparsities(outliers, sparsity, spread, sizes)
    distributed.say(f"owl: sparsity per block {', '.join(f'{share:.3f}' for share in shares)}")
    return dict(zip(sorted(chosen), shares, strict=True))
