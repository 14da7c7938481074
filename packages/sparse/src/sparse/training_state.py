"""What an interrupted recovery goes on from.

The state (trained weights and Adam's moments) of one step and the best weights so far. The run
(runs.RunFolder) notes last which files count, so a kill at any moment leaves a state that is whole.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from harness import distributed, paths
from harness.checkpoint import hashes, runs
from harness.errors import UserError
from sparse.training import Progress

MOMENTS = ("exp_avg", "exp_avg_sq")


class Store:
    """The files of one run. Rank 0 writes; every rank reads.

    Raises:
        UserError: ``out`` is in the way, or another run has begun there.
    """

    def __init__(self, out: Path, identity: dict, *, overwrite: bool, resume: bool):
        self.out, self.run = out, runs.RunFolder(out)
        self.partial = self.run.partial
        self.begun = distributed.lead(lambda: self._open(identity, overwrite, resume))

    def _open(self, identity: dict, overwrite: bool, resume: bool) -> dict:
        """The record of the run that is to be gone on with; {} where there is none."""
        self.run.open(identity, "state-*", overwrite=overwrite, resume=resume)
        for name, marked in self.run.progress.get("marks", {}).items():
            if hashes.mark(self.partial / name) != marked:
                raise UserError(f"{self.partial / name} is damaged; start again with --no-resume.")
        return self.run.progress

    @staticmethod
    def _best(step: int) -> str:
        return f"best-{step:07d}.safetensors"

    def load(self, parameters: dict[str, nn.Parameter], optimizer) -> Progress | None:
        """Put the saved step into ``parameters`` and ``optimizer``; None where there is none."""
        if not self.begun:
            return None
        progress = Progress(**self.begun["progress"])
        distributed.say(f"resuming: {progress.step} steps are done")
        with safe_open(self.partial / self.begun["state"], framework="pt") as file:
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"parameter:{name}"))
                if f"exp_avg:{name}" in file.keys():  # noqa: SIM118
                    moments = {
                        key: file.get_tensor(f"{key}:{name}").to(parameter.device)
                        for key in MOMENTS
                    }
                    step = torch.tensor(float(progress.step))
                    optimizer.state[parameter] = {"step": step, **moments}
        return progress

    def save(self, progress: Progress, parameters: dict[str, nn.Parameter], optimizer) -> None:
        """Save everything about this step; what it makes needless is deleted."""

        def write():
            tensors = {f"parameter:{name}": p for name, p in parameters.items()}
            for name, parameter in parameters.items():
                for key in MOMENTS:
                    if key in optimizer.state[parameter]:
                        tensors[f"{key}:{name}"] = optimizer.state[parameter][key]
            state = f"state-{progress.step:07d}.safetensors"
            paths.save_tensors(self.partial / state, tensors)
            needed = {state, self._best(progress.best_step)}
            marks = {name: hashes.mark(self.partial / name) for name in sorted(needed)}
            self.run.note(state=state, progress=asdict(progress), marks=marks)
            for path in self.partial.iterdir():
                if path.name not in needed and path.is_file():
                    path.unlink()

        distributed.lead(write)

    def keep_best(self, step: int, parameters: dict[str, nn.Parameter]) -> None:
        distributed.lead(lambda: paths.save_tensors(self.partial / self._best(step), parameters))

    def load_best(self, step: int, parameters: dict[str, nn.Parameter]) -> None:
        """Put the weights of the best look into ``parameters``."""
        with safe_open(self.partial / self._best(step), framework="pt") as file:
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(name))
