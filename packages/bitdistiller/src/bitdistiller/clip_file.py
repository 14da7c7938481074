"""clip.safetensors: the range of every group of every linear, and the model that they belong to.

Tensors "X.low" and "X.high" [O, G] in the model's dtype, X a linear's full name. The metadata has
one entry, NOTE, in JSON: {"quant_type": "int", "nf3" or "nf4", "bits", "group_size", "model": file
name -> size and hash}.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from harness.checkpoint import hashes
from harness.errors import UserError, one_line
from harness.quant.grid import Grid
from harness.quant.normal_float import NormalFloat

FILE = "clip.safetensors"
NOTE = "bitdistiller"
FLAGS = {"quant_type": "--quant_type", "bits": "--w_bit", "group_size": "--q_group_size"}


def note(model_folder: Path, grid: Grid | NormalFloat) -> dict[str, str]:
    """The file's metadata."""
    values = kind(grid) | {"model": hashes.model_files(model_folder)}
    return {NOTE: json.dumps(values, sort_keys=True)}


def kind(grid: Grid | NormalFloat) -> dict:
    """What a file says of its grid."""
    name = "int" if isinstance(grid, Grid) else f"nf{grid.bits}"
    return {"quant_type": name, "bits": grid.bits, "group_size": grid.group_size}


def locate(path: str | Path) -> Path:
    """The file itself, from it or the folder that it is in."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def read(
    path: str | Path, model_folder: Path, grid: Grid | NormalFloat
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Linear's full name -> (low, high), each [O, G], from clip.safetensors or the folder with it.

    Raises:
        UserError: there is none, it cannot be read, or it was made for another model, bits, group
            size or type.
    """
    path = locate(path)
    if not path.is_file():
        raise UserError(f"{path} not found; make it with python -m bitdistiller.autoclip.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}); expected the clip.safetensors "
            "of python -m bitdistiller.autoclip."
        ) from error
    try:
        values = json.loads(metadata[NOTE])
        files = dict(values["model"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} holds no clipping ranges; expected the clip.safetensors of python -m "
            "bitdistiller.autoclip."
        ) from error
    for key, wanted in kind(grid).items():
        if values.get(key) != wanted:
            raise UserError(
                f"{path} was searched for {key} {values.get(key)}, asked for is {wanted}; run "
                f"python -m bitdistiller.autoclip with {FLAGS[key]} {wanted}."
            )
    ours = hashes.model_files(model_folder)
    for name in sorted({*files, *ours}):
        if files.get(name) != ours.get(name):
            raise UserError(
                f"{path} belongs to another model than {model_folder}: {name} differs; run python "
                "-m bitdistiller.autoclip on this one."
            )
    linears = {name.rpartition(".")[0] for name in tensors}
    if set(tensors) != {f"{name}.{end}" for name in linears for end in ("low", "high")}:
        raise UserError(f"{path} is damaged: some group has one end only. Run autoclip again.")
    return {name: (tensors[f"{name}.low"], tensors[f"{name}.high"]) for name in linears}
