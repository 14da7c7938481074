"""A trained result: a dense checkpoint of quantized values, and grid.safetensors with their grids.

The values are the model: any reader of dense checkpoints computes with them. grid.safetensors holds
"X.scale" [O, G] in the model's dtype and "X.zero" [O, G] uint8 for every quantized linear X, from
which the codes follow: round(value / scale) + zero. Its metadata has one entry, NOTE, in JSON:
{"bits", "group_size", "quant_type": "int", "nf3" or "nf4"}; normal-float results hold no grids.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from bitdistiller import clip_file
from harness.checkpoint import load, quantconfig
from harness.checkpoint.weights import Weights
from harness.errors import UserError, one_line
from harness.modules import get_matrix
from harness.quant.fake_quant import FakeQuantLinear
from harness.quant.grid import Grid, QuantizedWeight

FILE = "grid.safetensors"
NOTE = clip_file.NOTE

Tensors = dict[str, torch.Tensor]


def check_dense(model: Path) -> None:
    """Refuse a model that is quantized already: there is nothing more to find in it.

    Raises:
        UserError: packed, or a result of training.
    """
    if quantconfig.is_packed(model):
        raise UserError(f"{model} is packed already; give the dense model that it was made from.")
    if (model / FILE).is_file():
        raise UserError(
            f"{model} holds quantized values, no teacher; give the dense model that it was made "
            f"from, and train's --start {model} to go on from there."
        )


@torch.no_grad()
def finish(model: nn.Module) -> tuple[nn.Module, Tensors, dict[str, str]]:
    """Make the student the plain dense model with the quantized values, in place.

    Returns:
        the model; tensors and metadata of grid.safetensors.
    """
    tensors: Tensors = {}
    grid = None
    for name, module in list(model.named_modules()):
        if not isinstance(module, FakeQuantLinear):
            continue
        grid = module.grid
        plain, quantized = module.unwrap()
        if isinstance(quantized, QuantizedWeight):
            tensors |= grid_tensors(name, quantized)
        model.set_submodule(name, plain)
    return model, tensors, {NOTE: note(grid)}


def grid_tensors(name: str, quantized: QuantizedWeight) -> Tensors:
    """What grid.safetensors holds of one linear."""
    return {f"{name}.scale": quantized.scale, f"{name}.zero": quantized.zero}


def note(grid) -> str:
    """The metadata entry."""
    return json.dumps(clip_file.kind(grid), sort_keys=True)


class Grids:
    """grid.safetensors of a result folder, opened.

    Attributes:
        grid: bits and group size; None for normal-float results.
        names: the quantized linears.

    Raises:
        UserError: not a result folder, or the file is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / FILE
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {FILE}, so it is not a result of python -m bitdistiller.train "
                "or .blockwise; run one of them first."
            )
        try:
            self._file = safe_open(path, framework="pt")
            values = json.loads((self._file.metadata() or {})[NOTE])
            self.kind = values["quant_type"]
            self.grid = Grid(values["bits"], values["group_size"]) if self.kind == "int" else None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}); it is damaged or not of this program."
            ) from error
        keys = self._file.keys()
        self.names = {key.removesuffix(".scale") for key in keys if key.endswith(".scale")}

    def check_codes(self) -> None:
        """Raise :class:`UserError` for a normal-float result."""
        if self.grid is None:
            raise UserError(f"{self.folder} holds {self.kind} values, which have no integer codes.")

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point [O, G] of linear ``name``, as stored."""
        if name not in self.names:
            raise UserError(f"{self.folder / FILE} lacks {name}; it belongs to another model.")
        return tuple(self._file.get_tensor(f"{name}.{part}") for part in ("scale", "zero"))

    def quantized(self, name: str, values: torch.Tensor) -> QuantizedWeight:
        """Codes and grid of linear ``name`` from its stored values [O, I], of any dtype that holds
        them.

        Raises:
            UserError: the grid does not give these values.
        """
        scale, zero = self.read(name)
        width = self.grid.columns_per_group(values.shape[1])
        if scale.shape == zero.shape == (len(values), values.shape[1] / width):
            grouped = values.float().unflatten(1, (scale.shape[1], -1))
            codes = torch.round(grouped / scale.float()[..., None]) + zero.float()[..., None]
            codes = codes.clamp_(0, self.grid.max_code).flatten(1).to(torch.uint8)
            weight = QuantizedWeight(codes, scale, zero, self.grid)
            if torch.equal(weight.dequantize(scale.dtype), values.to(scale.dtype)):
                return weight
        raise UserError(
            f"{self.folder}: the values of {name} are not those of its grid in {FILE}; the folder "
            "was changed after training. Train again, or take an untouched copy."
        )


def read(folder: Path) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    """The plain dense model of a result folder, and codes and grids of its quantized linears.

    Raises:
        UserError: as :class:`Grids`; or a normal-float result, which has no integer codes.
    """
    grids = Grids(folder)
    grids.check_codes()
    weights = Weights(folder)
    model = load.load_dense(weights, load.load_config(folder), weights.dtype)
    modules = dict(model.named_modules())
    linears = {name: modules[name] for name in sorted(grids.names) if name in modules}
    return model, {n: grids.quantized(n, get_matrix(m)) for n, m in linears.items()}
