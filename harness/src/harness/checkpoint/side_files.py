"""The files of a model beside weights and config: tokenizer, processors, templates, licenses."""

import os
import stat
from pathlib import Path

from harness import paths

TEMPLATES = "additional_chat_templates"
LARGEST = 2**27  # bytes; the largest tokenizers have a quarter of that
# Made anew for a result, or about another one: how it was stored, measured or trained.
OTHERS = {
    "config.json", "recipe.yaml", "compression_log.json", "results.json", "params.json",
    "quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json",
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "adapter_config.json",
}  # fmt: skip
# Weights in whatever form, their indexes, and what lies about in folders of files: data, pictures.
ENDS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5",
    ".msgpack", ".npy", ".npz", ".pkl", ".pickle", ".ot", ".tflite", ".mlmodel", ".index.json",
    ".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z",
    ".parquet", ".arrow", ".jsonl", ".csv", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp",
    ".mp4", ".wav", ".ipynb", ".log", ".lock", ".tmp",
)  # fmt: skip


def names(source: Path) -> list[str]:
    """What a result takes over from the checkpoint ``source``, byte for byte: its small files that
    are neither weights nor config nor about one result.

    Raises:
        UserError: one of them is no regular file, or lies outside of the folder.
    """
    carried = sorted(name for name in os.listdir(source) if _carried(source, name))
    inside = source / TEMPLATES
    if inside.is_dir():
        carried += sorted(
            f"{TEMPLATES}/{name}" for name in os.listdir(inside) if name.endswith(".jinja")
        )
    return [name for name in carried if paths.regular(source, name).stat().st_size <= LARGEST]


def _carried(source: Path, name: str) -> bool:
    low = name.lower()
    if name.startswith(".") or low in OTHERS or low.endswith(ENDS):
        return False
    if low.startswith(("readme", "events.out.tfevents")):
        return False
    return not stat.S_ISDIR(_kind(source / name))


def _kind(path: Path) -> int:
    """What is there, behind links; 0 where nothing is."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def copy(source: Path, target: Path) -> None:
    """Tokenizer, processors, templates, generation settings and licence, byte for byte."""
    for path in paths_in(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        paths.copy(path, copied)


def nbytes(source: Path) -> int:
    """Of what :func:`copy` copies."""
    return sum(path.stat().st_size for path in paths_in(source))


def paths_in(source: Path) -> list[Path]:
    return [source / name for name in names(source)]
