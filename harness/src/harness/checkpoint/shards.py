"""Write a checkpoint block by block: whole or not at all, and resumable after any kill.

One shard holds what lies outside the blocks, then comes one shard per block. While the run
(runs.RunFolder) is under way they stand under their final names, and it notes their log. Tensors
that are no part of the model wait beside, a file per block, and end as one file of the result.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from harness import distributed, paths
from harness.checkpoint import layouts, packed, quantconfig
from harness.checkpoint.hashes import mark
from harness.checkpoint.runs import RunFolder, read_state
from harness.paths import save_tensors, tensor_bytes


class Writer:
    """Shards of one output checkpoint.

    Args:
        out: the folder to make. An existing one is an error without ``overwrite``.
        blocks: how many decoder blocks there will be.
        run: :func:`fingerprint` of this one.
        resume: go on from shards of a killed run with the same fingerprint.
        lead: False on ranks that only read what rank 0 writes.
    """

    def __init__(
        self,
        out: Path,
        blocks: int,
        run: dict,
        *,
        overwrite: bool = False,
        resume: bool = True,
        lead: bool = True,
    ):
        self.blocks, self.lead = blocks, lead
        self.run = RunFolder(out)
        self.partial = self.run.partial
        if not lead:
            return
        if self.run.open(run, "model-*.safetensors", overwrite=overwrite, resume=resume):
            self.run.note(**self._checked(self.run.progress))
        else:
            self.run.progress = {"log": [], "shards": []}
        # Half-written files, under our names or the safetensors library's, and what finish() makes.
        shards = {self.shard(1 + index) for index in range(self.finished)}
        for leftover in set(self.partial.iterdir()) - shards:
            folder = leftover.is_dir() and not leftover.is_symlink()
            shutil.rmtree(leftover) if folder else leftover.unlink()

    def _checked(self, state: dict) -> dict:
        """``state`` up to the first block that is not on the disk as it was written."""
        good, log, marks = 0, state.get("log"), state.get("shards")
        if not (isinstance(log, list) and isinstance(marks, list)):
            return {"log": [], "shards": []}
        for _, marked in zip(log[: self.blocks], marks, strict=False):
            files = (self.shard(1 + good), self._side_part(good))
            if marked != [mark(path) for path in files]:
                distributed.say(f"{files[0]} is not whole; it is made again")
                break
            good += 1
        return {"log": log[:good], "shards": marks[:good]}

    def shard(self, index: int) -> Path:
        """File of shard ``index``: 0 is what lies outside the blocks, 1 + i is block i."""
        return self.partial / f"model-{index + 1:05d}-of-{self.blocks + 1:05d}.safetensors"

    @property
    def finished(self) -> int:
        """How many blocks, counted from the first, are on disk; 0 where rank 0 knows."""
        return len(self.run.progress["shards"]) if self.lead else 0

    def write_block(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        rows: list[dict],
        side: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Store block ``index``; ``rows`` are its lines of the log (deterministic values only),
        ``side`` what :meth:`finish` collects from all blocks."""
        # Not in the shard's metadata: the library writes two keys in an order of its own choice,
        # and results would differ from run to run.
        shard, part = self.shard(1 + index), self._side_part(index)
        part.unlink(missing_ok=True)
        if side:
            self.run.side.mkdir(exist_ok=True)
            save_tensors(part, side)
        save_tensors(shard, tensors)
        # Last, because this is what makes a block count as finished.
        done = self.run.progress
        marks = [mark(shard), mark(part)]
        self.run.note(log=[*done["log"][:index], rows], shards=[*done["shards"][:index], marks])

    def _side_part(self, index: int) -> Path:
        return self.run.side / f"{index + 1:05d}.safetensors"

    def read_block(self, index: int) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """Physical tensors and log rows of a finished block."""
        with safe_open(self.shard(1 + index), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, read_state(self.run.file)["progress"]["log"][index]

    def finish(
        self,
        outer: dict[str, torch.Tensor],
        config: dict,
        texts: dict[str, str],
        side: tuple[str, dict[str, str]] | None = None,
    ) -> None:
        """Write the rest and rename the folder to its final name.

        Args:
            outer: tensors outside the blocks.
            config: the whole of config.json.
            texts: further files by name (model card, recipe, log).
            side: name and metadata of the file that takes the blocks' side tensors.
        """
        save_tensors(self.shard(0), outer)
        weight_map, total = {}, 0
        for index in range(self.blocks + 1):
            path = self.shard(index)
            with safe_open(path, framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), path.name))
            total += tensor_bytes(path)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        paths.write_text(self.partial / "model.safetensors.index.json", json.dumps(index, indent=1))
        paths.write_text(self.partial / "config.json", json.dumps(config, indent=2) + "\n")
        for name, text in texts.items():
            paths.write_text(self.partial / name, text)
        if side:
            name, note = side
            parts = (self._side_part(index) for index in range(self.blocks))
            tensors = {n: t for part in parts if part.is_file() for n, t in load_file(part).items()}
            save_tensors(self.partial / name, tensors, note)
        self.run.publish()


def config_for(folder: Path, dtype: torch.dtype, quantization: dict | None, conv1d: bool) -> dict:
    """The source's config.json with dtype and quantization_config of the result."""
    config = paths.read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization:
        config["quantization_config"] = quantization
    config.pop("harness_conv1d", None)
    if conv1d and quantconfig.scheme_of(quantization):
        config["harness_conv1d"] = True
    return config


def decode_block(
    tensors: dict[str, torch.Tensor],
    layout: str,
    quantization: dict | None,
    stored: torch.dtype,
    conv1d: bool,
) -> dict[str, torch.Tensor]:
    """Logical tensors of a block of a checkpoint in ``stored``: packed linears unpacked, in it."""
    linears, plain = packed.split_names(tensors, layout)
    scheme = quantconfig.scheme_of(quantization)
    logical = {name: tensors[name] for name in plain}
    for name in linears:
        logical[f"{name}.weight"] = layouts.of(layout).matrix(
            tensors, name, scheme and scheme.of(name), quantization, stored, stored, conv1d
        )
    return logical
