"""SparseGPT, Wanda, magnitude pruning, LLM-Pruner, and recovery."""

__all__ = ["prune"]


def prune(
    model, dataset: str | None = None, *, method: str = "sparsegpt",
    command: str = "sparse.prune(...)", **flags,
) -> list[dict]:  # fmt: skip
    """The commands that zero weights from Python: ``method`` "sparsegpt", "wanda" or "magnitude",
    and its flags, with underscores, as keywords (out=, sparsity=, ...).

    Returns:
        One row per pruned linear: block, name, weights, zeros, error (relative output error; None
        for magnitude).

    Raises:
        harness.errors.UserError: anything the user can mend, in one line.
    """
    # Inside: the command lines answer --help without importing torch.
    from sparse import layerwise, magnitude, sparsegpt, wanda

    commands = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
    layerwise.check_method(method)
    settings = commands[method].Settings(model=str(model), dataset=dataset, **flags)
    return layerwise.run(settings, command)
