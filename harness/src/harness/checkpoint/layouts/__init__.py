"""How a linear's weight lies in a checkpoint's files: a module per layout, each the same functions.

| what a layout module has | |
| --- | --- |
| HOLDS | "values", "codes" (integers on a grid) or "zeros" (a pruned matrix without them) |
| MARK, NEEDED, OPTIONAL | what marks a linear X as stored so (X.MARK), and the tensors beside it |
| KNOWN | fields of its quantization_config that change no number |
| MEANINGFUL | those that may, with the values that do not |
| foreign(config) | why such a file of another tool is not read here, or None |
| config(scheme, actorder) | the quantization_config that it is recognised by |
| name_targets(config, scheme, packed, dense, conv1d) | names in it what is packed |
| scheme_of(config) | the grids that a quantization_config tells, or None |
| refuse(scheme, shapes, some_left) | raises where these, or dense ones beside, do not fit |
| scale_dtype(stored) | the dtype of scales in a checkpoint of that dtype |
| check(linear, shapes, grid) | raises where a linear's tensors are not what the config says |
| parts(grid, rows, columns, dtype) | shape and dtype of a linear's tensors |
| encode(name, weight) | the tensors, on the CPU, of a QuantizedWeight (codes) or a matrix |
| matrix(tensors, name, grid, config, stored, dtype, turned) | the matrix that they stand for |
| shape(tensors, name, grid) | its shape, from the files' headers |
| describe(scheme) | for `harness info` |
| readers(scheme, family, fault) | what loads it, for cards; ASKED: whether transformers is asked |

No torch up here: command lines take their choices from these names.
"""

import importlib

PACKED = ("compressed-tensors", "gptq")
PRUNED = ("dense", "bitmask")
QUANTIZED = (*PACKED, "dense")
LAYOUTS = ("dense", *PACKED, "bitmask")
# A checkpoint of another tool, which is not read here.
OTHER = "other"


def of(name: str):
    """The module of one of LAYOUTS."""
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def marks() -> dict[str, str]:
    """What marks a packed linear -> the layout that has it."""
    return {of(name).MARK: name for name in LAYOUTS if of(name).MARK}
