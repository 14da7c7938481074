"""What LLM-Pruner takes out at each of its levels: blocks, hidden channels, or heads and channels
of the MLP; and the check that a family can do without it."""

from dataclasses import dataclass, field

import torch

from harness import distributed, memory, paths
from harness.blocks import residual
from harness.blocks.decoder import Decoder
from harness.checkpoint import nonuniform
from harness.errors import UserError
from sparse.structured import groups, hidden_channels, selection

HIDDEN = "hidden channels"


@dataclass
class Cut:
    """What is to go. Parts are named "block 3 self_attn.o_proj", or :data:`HIDDEN`.

    Attributes:
        alive: part -> [G] bool, True for the groups that stay.
        multiples: part -> what the number of its groups that stay is a multiple of.
        chosen: block -> its groups that may go.
        holds: block, or None for what lies outside -> how parameters hold hidden channels.
        channels: MLP channels of every block before, where known.
        layers: how many blocks stay.
    """

    layers: int
    alive: dict[str, torch.Tensor] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)
    chosen: dict[int, list[groups.Groups]] = field(default_factory=dict)
    holds: dict[int | None, dict[str, residual.Hold]] = field(default_factory=dict)
    channels: list[int] = field(default_factory=list)

    def masks(self, index: int) -> list[tuple[groups.Groups, torch.Tensor]]:
        """The groups of block ``index`` with their masks."""
        return [(g, self.alive[part(index, g)]) for g in self.chosen.get(index, [])]


def part(index: int, some: groups.Groups) -> str:
    return f"block {index} {some.reader}"


def layer_wise(decoder: Decoder, layer: int) -> Cut:
    if layer >= len(decoder):
        raise UserError(
            f"--layer {layer}: the model has {len(decoder)} blocks; keep fewer than that."
        )
    return Cut(layer)


def ranges(decoder: Decoder, attention, mlp) -> dict[str, tuple[int, int]]:
    """First block and the one after the last, by kind; chosen where not given."""
    count = len(decoder)
    start, end = -(-3 * count // 32), count - -(-count // 32)
    if start >= end:  # two blocks or fewer
        start, end = 0, count
    spans = {}
    for kind, (first, last) in (("attention", attention), ("mlp", mlp)):
        chosen = (start if first is None else first, end if last is None else last)
        flags = f"--block_{kind}_layer_start {chosen[0]} --block_{kind}_layer_end {chosen[1]}"
        if not 0 <= chosen[0] < chosen[1] <= count:
            raise UserError(
                f"{flags}: expected 0 <= start < end <= {count}, the number of the model's blocks."
            )
        if None in (first, last):
            distributed.say(
                f"{flags}: the first and the last blocks matter most (the original's 3 and 31 of "
                f"32, for {count} blocks)"
            )
        spans[kind] = chosen
    return spans


def _structures(exact: Decoder) -> list[groups.Structure]:
    """The structure of every block, looked for once per kind of block."""
    known, result = {}, []
    for index, block in enumerate(exact.blocks):
        shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
        if shapes not in known:
            known[shapes] = groups.find(exact, index)
            for name, why in known[shapes].left.items():
                distributed.say(f"left as it is from block {index} on: {name} ({why})")
        result.append(known[shapes])
    return result


def block_wise(exact: Decoder, spans: dict[str, tuple[int, int]], multiple: int) -> Cut:
    cut = Cut(len(exact))
    span = {"heads": range(*spans["attention"]), "channels": range(*spans["mlp"])}
    for index, structure in enumerate(_structures(exact)):
        cut.channels.append(_channels(structure))
        cut.chosen[index] = [g for g in structure.groups if index in span[g.kind]]
        for some in cut.chosen[index]:
            name = part(index, some)
            cut.alive[name] = torch.ones(len(some), dtype=torch.bool)
            cut.multiples[name] = multiple if some.kind == "channels" else 1
    if not cut.alive:
        raise UserError(
            f"{type(exact.model).__name__} has no heads or channels that can be taken out one by "
            "one in these blocks."
        )
    return cut


def channel_wise(exact: Decoder, ratio: float, multiple: int) -> Cut:
    structures = _structures(exact)
    width = exact.config.get_text_config().hidden_size
    if not all(s.residual_writers for s in structures):
        raise UserError(
            f"in {type(exact.model).__name__} some block has no linear that writes to the residual "
            "stream; its hidden channels cannot be taken out."
        )
    if getattr(exact.config, nonuniform.KEY, None):
        raise UserError(
            "--channel_wise needs blocks of one size; take out hidden channels first, then "
            "--block_wise."
        )
    kept = selection.rounded(width, 1 - ratio, multiple) or multiple
    raw = paths.read_json(exact.weights.folder / "config.json")
    hidden_channels.check_untied(exact, structures[0], kept, raw)
    cut = Cut(len(exact), {HIDDEN: torch.ones(width, dtype=torch.bool)}, {HIDDEN: multiple})
    cut.channels = [_channels(s) for s in structures]
    cut.holds = hidden_channels.block_linears(exact) | {None: hidden_channels.outside(exact)}
    return cut


def _channels(structure: groups.Structure) -> int:
    return sum(len(g) for g in structure.groups if g.kind == "channels")


def check(exact: Decoder, cut: Cut, alive: dict[str, torch.Tensor]) -> None:
    """Compare every block without its dead groups to itself with them at zero."""
    for index in range(len(exact)):
        if index in cut.holds:
            hidden_channels.check(exact, index, cut.holds[index], alive[HIDDEN])
        elif cut.chosen.get(index):
            masks = [(g, alive[part(index, g)]) for g in cut.chosen[index]]
            groups.check(exact, index, masks)
        memory.give_back()
