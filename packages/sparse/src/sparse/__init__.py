"""SparseGPT, Wanda, magnitude pruning, LLM-Pruner, and recovery."""

__all__ = ["prune"]


def __getattr__(name: str):
    # Loaded on first use: the command lines answer --help without importing torch.
    if name == "prune":
        from sparse.layerwise import prune

        return prune
    raise AttributeError(name)
