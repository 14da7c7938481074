"""Multiply-accumulates per token, from the shapes alone: no forward, no weights.

`torch.utils.flop_counter` sees nothing of fused attention on a CPU, so the count is made here and
checked in a test against it with eager attention.
"""

from collections.abc import Mapping
from math import prod

from harness.checkpoint import nonuniform


def macs_per_token(
    model, length: int, shapes: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, int]:
    """MACs of one token among `length`: {"linears", "head", "attention", "total"}.

    `model` is a transformers causal LM, best a `skeleton`; `shapes` overrides the (rows, columns)
    of linears by module name, for checkpoints whose layers differ in size. Attention counts every
    token against all `length` keys, as an eager prefill does; a causal kernel does half. Of a
    mixture's experts only those that a token visits count.
    """
    shapes = shapes or {}
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    linears = queries = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if module is head or weight is None or not _is_linear(module):
            continue
        shape = shapes.get(name, tuple(weight.shape))
        linears += prod(shape)
        if name.endswith("q_proj"):
            queries += shape[0]
    linears += _active_experts(model, config)
    if not queries:
        heads = sum(nonuniform.heads(model.config, i)[0] for i in range(config.num_hidden_layers))
        queries = heads * nonuniform.head_dim(config)
    parts = {
        "linears": linears,
        "head": prod(head.weight.shape) if head is not None else 0,
        # Scores and their product with the values: head_dim each, per head and key.
        "attention": 2 * queries * length,
    }
    return {**parts, "total": sum(parts.values())}


def _is_linear(module) -> bool:
    import torch

    kind = type(module).__name__
    return isinstance(module, torch.nn.Linear) or kind == "Conv1D" or kind.endswith("Router")


def _active_experts(model, config) -> int:
    """Fused expert matrices [experts, rows, columns], in proportion to those a token visits."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in name:
            visited = getattr(config, "num_experts_per_tok", parameter.shape[0])
            total += parameter.numel() * visited // parameter.shape[0]
    return total
