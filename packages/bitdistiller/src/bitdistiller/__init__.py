"""BitDistiller: 2- and 3-bit models by clipping and quantization-aware self-distillation."""

__all__ = ["clip", "train_blocks"]


def __getattr__(name: str):
    # Loaded on first use: the command lines answer --help without importing torch.
    if name == "clip":
        from bitdistiller.autoclip import clip

        return clip
    if name == "train_blocks":
        from bitdistiller.blockwise import train_blocks

        return train_blocks
    raise AttributeError(name)
