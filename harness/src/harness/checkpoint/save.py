"""Write a model that is whole in memory as a checkpoint: beside its place, then renamed."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from harness import paths
from harness.checkpoint import card, load, names, readers, shards, side_files
from harness.checkpoint.nonuniform import skeleton
from harness.checkpoint.runs import LOG, RunFolder
from harness.checkpoint.weights import Weights

# File name -> (tensors, metadata: one entry or none), as `writer.save_tensors` takes them.
Side = dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None]]


# What a result consists of, by name.
def save_model(  # noqa: PLR0913
    model,
    source: Path,
    out: Path,
    *,
    base: str,
    step: dict,
    log: dict | None = None,
    sizes: dict[str, float] | None = None,
    config: dict | None = None,
    read_by: str | None = None,
    overwrite: bool = False,
    run: RunFolder | None = None,
    beside: Sequence[Path] = (),
    side: Side | None = None,
) -> Path:
    """Write ``model``, a transformers causal LM, in its own dtype to the folder ``out``.

    Args:
        source: the checkpoint it came from: tokenizer, config.json and recipe.yaml are taken there.
        base: the model as the user named it. step: what was done, for recipe.yaml and the card.
        log: what goes into compression_log.json besides ``step``.
        sizes: numbers for the card, by label.
        config: the whole of config.json (default: the source's, with the model's dtype).
        read_by: what loads the result (default: what loads any dense checkpoint).
        run: the open run that this is the end of (default: one of its own).
        beside: folders that are copied into the result, those that are there.
        side: tensors that are no part of the model, by the name of their file.

    Raises:
        UserError: ``out`` is in the way, or the disk is full.
    """
    if run is None:
        run = RunFolder(out)
        run.open({"step": step}, "*", overwrite=overwrite, resume=False)
    staging = run.partial / "result"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _save_weights(model, source, staging)
    for path in staging.glob("*.safetensors"):
        path.chmod(paths.file_mode())
    side_files.copy(source, staging)
    config = config or shards.config_for(source, model.dtype, None, False)
    weights = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
    sizes = (sizes or {}) | {"MB on disk": weights / 1e6}
    read_by = read_by or readers.of_result(model, set(), "dense", None, None)
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "recipe.yaml": card.recipe(source, step),
        "README.md": card.model_card(base, step, "dense", sizes, read_by),
        LOG: json.dumps({**step, **run.made_by, **(log or {})}, indent=1) + "\n",
    }
    for name, text in texts.items():
        paths.write_text(staging / name, text)
    for name, (tensors, metadata) in (side or {}).items():
        _write_index(staging)
        paths.save_tensors(staging / name, tensors, metadata)
    for folder in beside:
        if folder.is_dir():
            shutil.copytree(folder, staging / folder.name)
    run.publish(staging)
    return out


def _save_weights(model, source: Path, staging: Path) -> None:
    """The model's tensors, and those of ``source`` that it has no place for; what else transformers
    writes is replaced by the source's own files."""
    from transformers import GenerationConfig

    found = Weights(source)
    extra = names.match(skeleton(load.load_config(source)), found).extra
    state = model.state_dict() | {n: found.read(n) for n in extra} if extra else None
    # It refuses to save settings that it has loaded, those of Llama 2's chat models among them.
    own, model.generation_config = getattr(model, "generation_config", None), GenerationConfig()
    config, model.config = model.config, copy.copy(model.config)
    object.__setattr__(model.config, "save_pretrained", lambda folder: None)  # some are refused too
    try:
        model.save_pretrained(staging, max_shard_size="5GB", state_dict=state)
    except Exception as error:
        raise paths.disk_error(staging, error) from error
    finally:
        model.generation_config, model.config = own, config
    (staging / "generation_config.json").unlink(missing_ok=True)


def _write_index(folder: Path) -> None:
    """Which file has which tensor, where transformers left that out for a single file: vLLM reads
    every safetensors file of a folder without it."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        return
    with safe_open(single, framework="pt") as file:
        names = dict.fromkeys(sorted(file.keys()), single.name)
    total = {"total_size": paths.tensor_bytes(single)}
    paths.write_text(index, json.dumps({"metadata": total, "weight_map": names}, indent=1))
