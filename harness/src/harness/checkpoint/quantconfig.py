"""What a checkpoint's ``quantization_config`` says: read and checked by the layout it names.

A field that changes what the stored numbers mean is understood here or refused; one that nobody
here knows is named in a line, so that nothing is passed over in silence. Whether the tensors agree
with it is packed.py's to tell.
"""

from pathlib import Path

from harness import distributed, paths
from harness.checkpoint import layouts
from harness.errors import UserError
from harness.quant.scheme import Scheme

WEIGHT_ONLY = ("gptq", "awq")
OTHERS = {
    "awq": "AWQ's own packing",
    "bitsandbytes": "bitsandbytes' formats",
    "fp8": "8-bit floating point",
    "mxfp4": "4-bit floating point",
    "fbgemm_fp8": "8-bit floating point",
}


def of(config: dict, where) -> dict | None:
    """The quantization_config in the contents of a config.json; None for a dense checkpoint.

    Raises:
        UserError: it is no object, or lacks what its method needs.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("quant_method"), str):
        raise UserError(
            f"{where}: quantization_config is {found!r:.60}; expected an object with quant_method."
        )
    try:
        scheme_of(found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    layout = layout_of(found)
    kind = None if layout == layouts.OTHER else layouts.of(layout)
    strange = kind and {
        k: found[k] for k in sorted(set(found) - {*kind.KNOWN.split(), *kind.MEANINGFUL})
    }
    if strange:
        fields = ", ".join(f"{key}: {value!r:.40}" for key, value in strange.items())
        distributed.say_once(f"{where}: quantization_config says {fields}, unknown here; ignored")
    return found


def is_packed(folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` holds integers, of whatever library."""
    path = folder / "config.json"
    layout = layout_of(of(paths.read_json(path), path))
    return layout == layouts.OTHER or layouts.of(layout).HOLDS == "codes"


def layout_of(config: dict | None) -> str:
    """One of :data:`harness.checkpoint.layouts.LAYOUTS`, or OTHER for what is not read here: see
    :func:`foreign`."""
    if not config:
        return "dense"
    return layouts.OTHER if foreign(config) else config["quant_method"]


def is_weight_only(config: dict | None) -> bool:
    """Whether integers of 4 or 8 bits are stored for products with 16-bit activations, by whatever
    library."""
    method = (config or {}).get("quant_method")
    return method in WEIGHT_ONLY or scheme_of(config) is not None


def scheme_of(config: dict | None) -> Scheme | None:
    """The grids that a ``quantization_config`` tells; None where it tells of none.

    Raises:
        UserError: a field is missing, or has a value that it cannot have.
    """
    layout = layout_of(config)
    return None if layout == layouts.OTHER else layouts.of(layout).scheme_of(config)


def foreign(config: dict) -> str | None:
    """Why a checkpoint with this ``quantization_config`` is not read here; None where it is."""
    method = config.get("quant_method")
    if method not in layouts.LAYOUTS or layouts.of(method).MARK is None:
        return f"{method} ({OTHERS[method]})" if method in OTHERS else f"{method!r:.40}"
    kind = layouts.of(method)
    return kind.foreign(config) or _meaningful(config, kind.MEANINGFUL)


def _meaningful(config: dict, fields: dict) -> str | None:
    for key, idle in fields.items():
        value = config.get(key)
        if value not in idle and not (key == "sparsity_config" and _is_dense(value)):
            return f"{config['quant_method']} with {key} {value!r:.60}"
    return None


def _is_dense(sparsity) -> bool:
    return isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
