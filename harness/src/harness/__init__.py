"""The shared floor: data, block-by-block decoders, integer grids, checkpoints and evaluation."""

__version__ = "0.1.0"
