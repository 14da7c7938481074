"""How many weights of a model's blocks are exactly zero, and what that is worth in bytes.

Only the blocks' linears count: nothing prunes embeddings, norms or the head weight by weight.
"""

from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint import layouts
from harness.checkpoint.layouts import bitmask

WORTH_SAYING = 0.01  # below this share zeros are chance
NO_KERNELS = (
    "no: no engine here has kernels for scattered or n:m zeros, which take the time "
    "and memory of any other number (smaller matrices, by python -m sparse.llm_pruner, save both)"
)
SMALLER = "yes: its matrices are smaller than the original's, for every engine"


@dataclass(frozen=True)
class Sparsity:
    """`blocks` holds (weights, zeros) of every block; bytes are those of the blocks' linears,
    each stored whichever way is smaller in `bitmask_bytes`."""

    blocks: list[tuple[int, int]]
    dense_bytes: int
    bitmask_bytes: int

    @property
    def share(self) -> float:
        """Zeros among the weights, 0 to 1."""
        return sum(zeros for _, zeros in self.blocks) / sum(weights for weights, _ in self.blocks)

    def as_dict(self) -> dict:
        return {
            "share": self.share,
            "by_block": [zeros / weights for weights, zeros in self.blocks],
            "linear_bytes_dense": self.dense_bytes,
            "linear_bytes_bitmask": self.bitmask_bytes,
        }


def of_model(model, item: int) -> Sparsity:
    """Of a loaded causal LM whose checkpoint has `item` bytes per weight."""
    from harness.modules import find_blocks

    return _total([_block(block, item) for block in find_blocks(model)[1]])


def of_checkpoint(folder: Path) -> Sparsity:
    """Of a checkpoint, read one block at a time.

    Raises UserError where the weights are damaged or only another library reads them.
    """
    from harness.blocks.decoder import Decoder
    from harness.checkpoint.weights import Weights
    from harness.progress import track

    decoder = Decoder(folder, dtype=Weights(folder).dtype)
    parts = []
    for index in track(range(len(decoder)), "counting zeros", len(decoder)):
        parts.append(_block(decoder.load(index), decoder.dtype.itemsize))
        decoder.release(index)
    return _total(parts)


def stored_otherwise(zeros: Sparsity, layout: str, disk: int) -> tuple[str, int]:
    """The other of `layouts.PRUNED`, and what weight files of ``disk`` bytes take in it."""
    (other,) = set(layouts.PRUNED) - {layout}
    saved = zeros.dense_bytes - zeros.bitmask_bytes
    return other, disk + saved if layouts.of(layout).HOLDS == "zeros" else disk - saved


def _block(block, item: int) -> tuple[int, int, int, int]:
    """Weights, zeros, dense bytes, bitmask bytes of one block's linears."""
    import torch

    from harness.modules import linears

    weights = zeros = dense = masked = 0
    for module in linears(block).values():
        matrix = module.weight.data
        nonzeros = int(torch.count_nonzero(matrix))
        weights += matrix.numel()
        zeros += matrix.numel() - nonzeros
        dense += matrix.numel() * item
        masked += min(matrix.numel() * item, bitmask.nbytes(*matrix.shape, nonzeros, item))
    return weights, zeros, dense, masked


def _total(parts: list[tuple[int, int, int, int]]) -> Sparsity:
    return Sparsity(
        blocks=[(weights, zeros) for weights, zeros, _, _ in parts],
        dense_bytes=sum(dense for _, _, dense, _ in parts),
        bitmask_bytes=sum(masked for _, _, _, masked in parts),
    )
