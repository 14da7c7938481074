"""Which rows and columns of a block can only go together (LLM-Pruner, arXiv 2305.11627, 3.1).

No table per family. Every linear of the block is made to return free numbers, and the block's own
derivatives say what is read by what (harness.blocks.probe):

- a linear whose input depends on the block's input reads the residual stream (q, k, v, gate, up);
- one whose input does not is an inner one (o, down), fed by those whose free numbers reach it;
- a column of an inner linear needs the rows of its feeders from which it has a derivative. Columns
  and rows that are connected in this graph are one group: an attention head, a key/value head with
  all its query heads, a channel of the MLP, in whatever order a fused layout keeps them.

A family where this does not hold is refused by :func:`check`, which removes groups from a block and
compares it with the same block where they are zero.

Legend: B probes in a batch, T tokens, C columns of an inner linear, G groups.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.blocks.decoder import Decoder
from harness.blocks.probe import FreeRun, free_run
from harness.checkpoint import nonuniform
from harness.errors import UserError
from harness.modules import get_matrix, linears

TOKENS = 6
PROBE_ELEMENTS = 2**21
TOLERANCE = 1e-4
NONE = torch.iinfo(torch.long).max


@dataclass
class Groups:
    """The groups behind one inner linear.

    Attributes:
        reader: its name in the block ("self_attn.o_proj"); its columns belong to the groups.
        columns: [G, c] ascending columns of the reader per group.
        rows: by feeder's name, [G, r] ascending rows per group.
    """

    reader: str
    columns: torch.Tensor
    rows: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def kind(self) -> str:
        """ "channels" where every column is its own group, else "heads"."""
        return "channels" if self.columns.shape[1] == 1 else "heads"


@dataclass
class Structure:
    """What was found in one block: its groups, the linears on the residual stream, and those that
    could not be cut (name -> why)."""

    groups: list[Groups]
    residual_readers: list[str]
    residual_writers: list[str]
    left: dict[str, str]


def find(decoder: Decoder, index: int) -> Structure:
    """The structure of block ``index`` of a float32 ``decoder``; loads and releases the block.

    Raises:
        UserError: the block calls its linears in a way that cannot be followed.
    """
    block = decoder.load(index)
    widest = max(sum(get_matrix(m).shape) for m in linears(block).values())
    batch = max(1, min(PROBE_ELEMENTS // (TOKENS * widest), widest))
    try:
        return _follow(free_run(decoder, index, embed_something(decoder, batch)))
    finally:
        decoder.release(index)


def embed_something(decoder: Decoder, batch: int) -> torch.Tensor:
    """Hidden states [B, T, D] of some tokens; the decoder then knows what its blocks are handed."""
    vocabulary = decoder.config.get_text_config().vocab_size
    return decoder.embed(torch.arange(batch * TOKENS).view(batch, TOKENS) % vocabulary)


def _follow(run: FreeRun) -> Structure:
    readers, writers, groups, left = [], [], [], {}
    for name, x in run.inputs.items():
        feeders = run.feeders(name)
        if not feeders:
            readers.append(name)
            continue
        writers.append(name)
        fed = _groups(name, x, {n: run.outputs[n] for n in feeders}, len(run.hidden))
        if isinstance(fed, Groups):
            groups.append(fed)
        else:
            left[name] = fed
    return Structure(groups, readers, writers, left)


def _groups(name: str, x: torch.Tensor, leaves: dict[str, torch.Tensor], batch: int):
    """Groups behind the linear with input ``x`` [B, T, C] (or flattened), or why there are none."""
    if x.numel() != batch * TOKENS * x.shape[-1]:
        return "its tokens are routed"
    columns = x.shape[-1]
    flat = x.reshape(batch, TOKENS, columns)
    widths = {n: z.shape[-1] for n, z in leaves.items()}
    edges = []  # (column, row counted over all feeders)
    for start in range(0, columns, batch):
        picked = torch.arange(start, start + batch, device=x.device).clamp_max(columns - 1)
        one_each = flat.gather(2, picked.view(-1, 1, 1).expand(batch, TOKENS, 1))
        gradients = torch.autograd.grad(one_each.sum(), list(leaves.values()), retain_graph=True)
        reach = [g.reshape(batch, TOKENS, -1).abs().sum(1) for g in gradients]
        probe, row = torch.cat(reach, dim=1).nonzero(as_tuple=True)
        edges.append((picked[probe].cpu(), row.cpu()))
    column, row = (torch.cat(part) for part in zip(*edges, strict=True))
    of_column, of_row = _connected(column, row, columns, sum(widths.values()))
    members = {name: _by_group(of_column)}
    for feeder, labels in zip(widths, of_row.split(list(widths.values())), strict=True):
        members[feeder] = _by_group(labels)
    if any(m is None or len(m) != len(members[name]) for m in members.values()):
        return "its groups differ in size"
    if len(members[name]) == 1:
        return "all of it is one group"
    return Groups(name, members.pop(name), members)


def _connected(column, row, columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least column of the connected component of every column and row of a bipartite graph."""
    of_column = torch.arange(columns)
    while True:
        of_row = torch.full((rows,), NONE).scatter_reduce(0, row, of_column[column], "amin")
        new = of_column.scatter_reduce(0, column, of_row[row], "amin")
        if torch.equal(new, of_column):
            return of_column, of_row
        of_column = new


def _by_group(labels: torch.Tensor) -> torch.Tensor | None:
    """[G, n] ascending members per label; None where labels differ in count or some has none."""
    counts = labels.unique(return_counts=True)[1]
    if (labels == NONE).any() or len(counts.unique()) != 1:
        return None
    return labels.argsort(stable=True).view(len(counts), -1)


# -- taking groups out ----------------------------------------------------------------------------


def is_turned(module: nn.Module) -> bool:
    """Whether ``module`` stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


def kept(members: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Ascending members of the groups that stay: [G, n] int64 and [G] bool -> [n']."""
    return members[alive].flatten().sort().values


def zero(block: nn.Module, groups: Groups, alive: torch.Tensor) -> None:
    """Zero the reader's columns of dead groups, in place: to the block they are gone."""
    get_matrix(block.get_submodule(groups.reader))[:, groups.columns[~alive].flatten()] = 0


def cut(
    block: nn.Module, tensors: dict[str, torch.Tensor], chosen: list[tuple[Groups, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """``tensors`` (by name in the block) without the dead groups of ``chosen``."""
    tensors = dict(tensors)

    def take(name: str, indices: torch.Tensor, dim: int):
        weight = tensors[f"{name}.weight"]
        axis = 1 - dim if is_turned(block.get_submodule(name)) else dim
        tensors[f"{name}.weight"] = weight.index_select(axis, indices.to(weight.device))
        bias = tensors.get(f"{name}.bias")
        if dim == 0 and bias is not None:
            tensors[f"{name}.bias"] = bias.index_select(0, indices.to(bias.device))

    for groups, alive in chosen:
        take(groups.reader, kept(groups.columns, alive), 1)
        for feeder, rows in groups.rows.items():
            take(feeder, kept(rows, alive), 0)
    return tensors


def entry(decoder: Decoder, index: int, chosen: list[tuple[Groups, torch.Tensor]]) -> dict:
    """The block's sizes after the cut, as config.json records them (checkpoint.nonuniform)."""
    block = decoder.blocks[index]
    before = nonuniform.entry(decoder.config, index)
    heads, kv_heads = nonuniform.heads(decoder.config, index)
    result = {"heads": heads, "kv_heads": kv_heads} | before
    result["linears"] = {n: list(shape) for n, shape in before.get("linears", {}).items()}

    def resize(name: str, dim: int, size: int):
        shape = list(get_matrix(block.get_submodule(name)).shape)
        result["linears"].setdefault(name, shape)[dim] = size

    for groups, alive in chosen:
        count, of = int(alive.sum()), len(groups)
        if count == of:
            continue
        resize(groups.reader, 1, count * groups.columns.shape[1])
        for feeder, rows in groups.rows.items():
            resize(feeder, 0, count * rows.shape[1])
        if groups.kind == "channels":
            continue
        result["attention"] = groups.reader.rpartition(".")[0]
        result["heads"], result["kv_heads"] = heads * count // of, kv_heads * count // of
        if _gives_heads(decoder, index):
            known = before.get("kept_heads", range(heads))
            own = (groups.columns[alive] // (groups.columns.numel() // heads)).unique()
            result["kept_heads"] = [known[i] for i in own.tolist()]
    return result


def _gives_heads(decoder: Decoder, index: int) -> bool:
    """Whether the model hands the block something for each head (ALiBi slopes)."""
    count = nonuniform.model_heads(decoder.config)
    embed_something(decoder, 1)
    return any(
        nonuniform.head_axis(name, value, batch, count) is not None
        for batch, named in decoder.arguments(index)
        for name, value in named.items()
    )


@torch.no_grad()
def check(decoder: Decoder, index: int, chosen: list[tuple[Groups, torch.Tensor]]) -> None:
    """Raise :class:`UserError` unless block ``index`` without its dead groups gives what it gives
    with them at zero, on one window of random hidden states; a float32 ``decoder``."""
    block = decoder.load(index)
    width = decoder.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(index)
    embed_something(decoder, 1)
    hidden = torch.randn(1, TOKENS, width, generator=generator).to(decoder.device)
    for groups, alive in chosen:
        zero(block, groups, alive)
    wanted = decoder.forward(index, hidden)
    small = copy.deepcopy(block)
    left = cut(block, block.state_dict(), chosen)
    decoder.release(index)
    try:
        nonuniform.resize_block(small, entry(decoder, index, chosen), decoder.config)
        small.load_state_dict(left)
        got = decoder.forward(index, hidden, block=small)
        wrong = (got - wanted).abs().max() > TOLERANCE * wanted.abs().max()
    except (RuntimeError, ValueError) as error:
        raise UserError(_refusal(decoder, index, str(error).splitlines()[0])) from error
    if wrong:
        raise UserError(_refusal(decoder, index, "its output changes"))


def _refusal(decoder: Decoder, index: int, why: str) -> str:
    return (
        f"heads or channels cannot be taken out of block {index} of "
        f"{type(decoder.model).__name__} ({why}); this family is not supported by --block_wise."
    )
