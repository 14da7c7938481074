"""How every layer-wise command begins and ends: its model opened, its place claimed, its windows
drawn, then the pass or, with --dry-run, the plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from harness import distributed, precision
from harness.blocks import calibration, preflight, sequential
from harness.blocks.decoder import Decoder
from harness.blocks.plan import Cost, hessian_cost, print_plan
from harness.checkpoint import load, runs
from harness.checkpoint.weights import Weights
from harness.quant.scheme import Scheme


@dataclass(frozen=True)
class Job:
    """The flags that all layer-wise commands have.

    Attributes:
        model: folder, hub id or embedded name. out: the folder to make.
        device, dtype: of the computation, or "auto".
        seed: of what is drawn.
        ignore: linears that stay as they are, see :func:`harness.modules.ignore`.
        bos: at the head of calibration windows, see :func:`harness.blocks.calibration.draw`.
        command: for the card.
    """

    model: str
    out: str | Path
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    ignore: Sequence[str] = ()
    bos: str = "auto"
    overwrite: bool = False
    resume: bool = True
    dry_run: bool = False
    command: str = ""

    @classmethod
    def of(cls, settings, command: str) -> "Job":
        """The job of a command's settings, which have fields of these names."""
        names = [field.name for field in fields(cls) if hasattr(settings, field.name)]
        return cls(command=command, **{name: getattr(settings, name) for name in names})


def open_decoder(job: Job, *, trains: bool = False) -> Decoder:
    """The model of ``job``, on every rank; its process group begun.

    Args:
        trains: "auto" is then the dtype that training takes, so that it starts from these very
            values.
    """
    device = distributed.start(load.pick_device(job.device))
    folder = load.resolve(job.model)
    dtype = job.dtype
    if trains and dtype == "auto":
        dtype = precision.choose_for_training(dtype, Weights(folder).dtype, device, job.model)
    elif trains:
        dtype = precision.parse(dtype)
    decoder = Decoder(folder, device=device, dtype=dtype, name=job.model)
    decoder.ignore(job.ignore)
    return decoder


def claim(job: Job, decoder: Decoder, scheme: Scheme | None, layout: str) -> None:
    """Refuse what does not fit, and hold the output. To be called before the data, which may have
    to be downloaded and take minutes to tokenize."""
    preflight.check(decoder, scheme, layout, Path(job.out))
    runs.claim(Path(job.out), decoder.weights.folder, job.overwrite, job.dry_run)


def draw(
    job: Job, decoder: Decoder, dataset: str, nsamples: int, seqlen: int | None, held_out: int = 0
) -> tuple[torch.Tensor, dict]:
    """Calibration windows int64 [nsamples, seqlen], and what the card says of them."""
    return calibration.draw(
        decoder, dataset, nsamples=nsamples, seqlen=seqlen, seed=job.seed, bos=job.bos,
        held_out=held_out, try_bos=not job.dry_run,
    )  # fmt: skip


def run_job(
    job: Job,
    decoder: Decoder,
    method: sequential.Method,
    drawn: tuple[torch.Tensor | None, dict | None] = (None, None),
    *,
    cost: Cost = hessian_cost,
    side: Callable[[int, int], int] = lambda rows, columns: 0,
) -> list[dict]:
    """The pass (:func:`harness.blocks.sequential.compress`), or its plan (``cost``, ``side``: see
    :func:`harness.blocks.plan.print_plan`) and no rows."""
    windows, calibrated = drawn
    if job.ignore:
        method.settings["ignore"] = list(job.ignore)
    if job.dry_run:
        print_plan(decoder, method, job.out, 0 if windows is None else windows.numel(), cost, side)
        return []
    return sequential.compress(
        decoder, method, Path(job.out), base=job.model, windows=windows, calibration=calibrated,
        command=job.command, overwrite=job.overwrite, resume=job.resume,
    )  # fmt: skip
