"""Which linears are quantized on which grid: one for all, or others for some (mixed bits)."""

from dataclasses import dataclass

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

    def of(self, linear: str) -> Grid | None:
        """The grid of a linear by its full name; None: it stays dense."""
        found = (grid for pattern, grid in reversed(self.exceptions) if meets(pattern, linear))
        return next(found, self.weights)

    @property
    def grids(self) -> list[Grid]:
        """All that there are, the first first."""
        named = (self.weights, *(grid for _, grid in self.exceptions))
        return list(dict.fromkeys(grid for grid in named if grid is not None))
