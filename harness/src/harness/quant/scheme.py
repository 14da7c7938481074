"""Which linears are quantized on which grid: one for all, or others for some (mixed bits)."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from harness.errors import UserError, nearest
from harness.modules import meets
from harness.quant.grid import Grid


@dataclass(frozen=True)
class Scheme:
    """Grids by linear.

    Attributes:
        weights: of the linears that no exception means; None leaves them dense.
        exceptions: (pattern, grid or None), of which the last that means a linear counts: a full
            name, its last parts, or "re:" and a regular expression, as --ignore takes them.
    """

    weights: Grid | None
    exceptions: tuple[tuple[str, Grid | None], ...] = ()

    def __post_init__(self):
        if not self.grids:
            raise ValueError("a scheme without a grid; what stays dense altogether has none")

    def of(self, linear: str) -> Grid | None:
        """The grid of a linear by its full name; None: it stays dense."""
        place = self._place(linear)
        return self.weights if place < 0 else self.exceptions[place][1]

    def check(self, linears: Iterable[str]) -> None:
        """Refuse an exception that means none of ``linears``, by full name: it is misspelt.

        Raises:
            UserError: the first of them.
        """
        names = list(linears)
        for pattern, _ in self.exceptions:
            if not any(meets(pattern, name) for name in names):
                last = {name.rpartition(".")[2] for name in names}
                raise UserError(
                    f"{pattern}: no linear of the blocks is meant by it.{nearest(pattern, last)}"
                )

    def _place(self, linear: str) -> int:
        """Which exception counts, -1 for none. By name: schemes of some thousand names are read."""
        ends = accumulate(reversed(linear.split(".")), lambda end, part: f"{part}.{end}")
        by_name = max((self._named.get(end, -1) for end in ends), default=-1)
        fitting = (n for n, pattern in self._patterns if n > by_name and meets(pattern, linear))
        return max(fitting, default=by_name)

    @cached_property
    def _named(self) -> dict[str, int]:
        return {p: n for n, (p, _) in enumerate(self.exceptions) if not p.startswith("re:")}

    @cached_property
    def _patterns(self) -> list[tuple[int, str]]:
        return [(n, p) for n, (p, _) in enumerate(self.exceptions) if p.startswith("re:")]

    @property
    def grids(self) -> list[Grid]:
        """All that there are, the first first."""
        named = (self.weights, *(grid for _, grid in self.exceptions))
        return list(dict.fromkeys(grid for grid in named if grid is not None))
