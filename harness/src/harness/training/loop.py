"""The training loop of every trainer of the house, on DeepSpeed (engine.py): batches in, the best
checkpoint out, and a run killed at any moment goes on as if nothing had been.

What is written has the dtype of the checkpoint that it was made from, whatever is trained in, and
the looks are at weights that are rounded to it.

In a run's folder (runs.RunFolder) are the last state, the best weights so far and TensorBoard's
events; at the end ``OUT`` is put together there and renamed.
Nothing random is kept: data order and dropout follow from the seed and the number of the step.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from harness import distributed, paths, precision
from harness.checkpoint import hashes, load, runs, save
from harness.checkpoint.weights import Weights
from harness.errors import UserError
from harness.quant import masks
from harness.training import engine, states
from harness.training.engine import Diverged, Training
from harness.training.meter import Meter

Finished = torch.nn.Module | tuple[torch.nn.Module, save.Side]
LOOKS = 10  # in all, where nothing else is said
BETTER = {"lower": lambda new, old: new < old, "higher": lambda new, old: new > old}


@dataclass
class Progress:
    """Where a run stands; JSON keeps it exactly. ``since_look``: sum of losses, and of what?"""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    since_look: dict[str, float] = field(default_factory=dict)
    steps_since_look: int = 0
    rows: list[dict] = field(default_factory=list)

    def stale(self, patience: int) -> bool:
        """Whether the last ``patience`` looks, if that is not 0, brought nothing better."""
        return 0 < patience <= sum(row["step"] > (self.best_step or 0) for row in self.rows)


# The loop, read from top to bottom; what a run consists of, by name.
@engine.memory_knobs()
def train(  # noqa: C901, PLR0913
    model: torch.nn.Module,
    training: Training,
    *,
    batches: Callable[[int], list[dict]],
    loss_of: Callable,
    out: Path,
    identity: dict,
    step_entry: dict,
    source: Path,
    evaluate: Callable | None = None,
    better: str = "lower",
    eval_steps: int | None = None,
    patience: int = 0,
    save_steps: int | None = None,
    boundary: Callable[[int], bool] | None = None,
    stored: list[str] | None = None,
    finish: Callable[[dict[str, torch.Tensor]], Finished] | None = None,
    keep_zeros: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> dict:
    """Train ``model`` for ``training.steps`` optimizer steps and write the best seen to ``out``.

    To be called by every rank, after :func:`training.engine.launch`. The model is trained in the
    mode, train or eval (no dropout), that it comes in.

    Args:
        batches: step -> this rank's ``training.accumulate`` micro-batches. Each has "tokens", what
            its loss sums over, and may have "read", all the tokens the model sees, for the speed.
        loss_of: (engine, batch) -> (sum of losses, {name: another such sum, to report}).
        identity: :func:`checkpoint.runs.fingerprint` of the run; a state of another one is refused.
        step_entry: what was done, for recipe.yaml and the card: method, base, command, settings.
        source: the folder of the checkpoint that the model came from.
        evaluate: (engine, step) -> {"value": ..., and what is to be logged, if it is not that},
            equal on all ranks, the model being in eval mode. Called at the start, every
            ``eval_steps`` (default: ten times in all) and at the end; the best value's weights are
            written. Without it the last weights are.
        better: "lower" or "higher" values.
        patience: end after so many looks without a better value; 0: never.
        save_steps: steps between saved states (default: one at each look).
        boundary: whether a state may be saved after so many steps; it waits until one may.
        stored: the trained parameters that the result holds as they are (default: all).
        finish: trained tensors by parameter name, on the CPU -> the model to be written, or it and
            files beside it, on rank 0, in the dtype of ``source`` (default: ``source`` with them
            put in).
        keep_zeros: a pruned model's zeros stay zeros.

    Returns:
        rows (a look each), best, best_step, steps, tokens, seconds.

    Raises:
        UserError: ``out`` is in the way, another run has begun there, the disk or the GPU is full.
        Diverged: a loss or value is not finite; the batch is saved beside ``out``.
    """
    run = _Run(Path(out), identity, overwrite, resume)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    stored = trained if stored is None else stored
    mode, dtype = model.training, Weights(source).dtype
    step_entry |= {"dtype": precision.record(next(model.parameters()).dtype, dtype)}
    if keep_zeros:
        masks.keep(model)
    running = engine.start(model, training)
    progress = run.load(running)
    clock = time.perf_counter() - progress.seconds

    def spent() -> float:
        """The share of a time limit that is gone, the same on every rank."""
        seconds = time.perf_counter() - clock
        limit = training.minutes
        return distributed.broadcast_object(seconds / (60 * limit)) if limit else 0.0

    def look():
        if evaluate:
            running.eval()
            with engine.rounded(running, stored, dtype):
                _look(run, running, trained, progress, evaluate(running, progress.step), better)
            running.train(mode)

    def save_state():
        progress.seconds = time.perf_counter() - clock
        run.save(running, progress)

    if not progress.rows:
        with run.folder.nothing_left():
            look()
    running.train(mode)
    meter = Meter(step_entry["method"], training.steps, progress.step, progress.tokens)
    log = run.events(progress.step)
    waiting, gone = False, spent()
    while progress.step < training.steps and gone < 1 and not progress.stale(patience):
        batch = batches(progress.step)
        try:
            means = engine.train_step(
                running, training, progress.step, batch, lambda b: loss_of(running, b), gone
            )
        except Diverged as error:
            run.save_batch(progress.step, batch, error)
            raise
        rate = training.learning_rate * engine.rate(training, progress.step, gone)
        read = sum(b.get("read", b["tokens"]) for b in batch)
        progress.tokens += int(distributed.sum_number(float(read)))
        progress.step += 1
        progress.steps_since_look += 1
        for name, value in means.items():
            progress.since_look[name] = progress.since_look.get(name, 0.0) + value
        meter.show(progress.step, means, rate, progress.tokens)
        log({f"train/{k}": v for k, v in means.items()} | {"train/lr": rate}, progress.step)
        before, gone = gone, spent()
        last = progress.step == training.steps or gone >= 1
        due = _due(training, progress.step, eval_steps, before, gone)
        if due or last:
            look()
            if evaluate:
                shown = progress.rows[-1]
                log({f"eval/{k}": v for k, v in shown.items() if k != "step"}, progress.step)
        waiting |= progress.step % save_steps == 0 if save_steps else due
        if waiting and not last and (boundary is None or boundary(progress.step)):
            save_state()
            waiting = False
    meter.close()
    log(None, progress.step)
    progress.seconds = time.perf_counter() - clock
    if progress.best_step is None:
        run.keep_best(running, trained, progress.step)
        progress.best_step = progress.step
    finish = finish or (lambda tensors: put_in(source_model(source), tensors))
    distributed.lead(lambda: run.write(progress, finish, source, step_entry))
    return {
        "rows": progress.rows, "best": progress.best, "best_step": progress.best_step,
        "steps": progress.step, "tokens": progress.tokens, "seconds": progress.seconds,
    }  # fmt: skip


def source_model(folder: Path):
    """The checkpoint in ``folder`` as it is stored, on the CPU."""
    return load.load_model(folder, dtype=Weights(folder).dtype)


@torch.no_grad()
def put_in(model, tensors: dict[str, torch.Tensor]):
    """``model`` with the parameters ``tensors``, by name, in its own dtype."""
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
    return model


def _due(training: Training, step: int, every: int | None, before: float, gone: float) -> bool:
    """Whether a look follows the ``step``-th step, during which the share of the time limit that
    was gone went from ``before`` to ``gone``."""
    if every:
        return step % every == 0
    shares = (max((step - 1) / training.steps, before), max(step / training.steps, gone))
    return int(LOOKS * shares[0]) < int(LOOKS * shares[1])


def _look(run, running, trained, progress: Progress, values: dict, better: str) -> None:
    """One row of the log; better weights than ever are kept."""
    value = values["value"]
    if not math.isfinite(value):
        raise Diverged(
            f"the validation value is {value} after {progress.step} steps"
            + ("; the model's weights are damaged." if progress.step == 0 else engine.DIVERGED)
        )
    means = {k: v / progress.steps_since_look for k, v in progress.since_look.items()}
    progress.since_look, progress.steps_since_look = {}, 0
    named = {name: v for name, v in values.items() if name != "value"} or values
    row = {f"training_{name}": mean for name, mean in means.items()} | named
    progress.rows.append({"step": progress.step, "tokens": progress.tokens, **row})
    shown = ", ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in row.items())
    distributed.say(f"step {progress.step}: {shown}")
    if progress.best is None or BETTER[better](value, progress.best):
        progress.best, progress.best_step = value, progress.step
        run.keep_best(running, trained, progress.step)


class _Run:
    """The files of one run. Rank 0 writes names; the engine's states are written by all."""

    def __init__(self, out: Path, identity: dict, overwrite: bool, resume: bool):
        self.out, self.folder = out, runs.RunFolder(out)
        self.partial = self.folder.partial
        self.states = self.partial / "states"
        self.saved_best: int | None = None  # of which step, by the last state
        ranks = identity | {"processes": distributed.world_size()}
        distributed.lead(lambda: self._open(ranks, overwrite, resume))

    def _open(self, identity: dict, overwrite: bool, resume: bool) -> None:
        how = {"overwrite": overwrite, "resume": resume}
        if not self.folder.open(identity, "states/state.json", **how):
            self.states.mkdir()
            for folder in (self.partial, self.states):
                states.keep_to_user(folder)

    def load(self, running) -> Progress:
        state = states.load(running, self.states)
        if state is None:
            return Progress()
        distributed.say(f"resuming: {state['progress']['step']} steps are done")
        progress = Progress(**state["progress"])
        best = self._best(progress.best_step)
        if progress.best_step is not None and hashes.mark(best) != state.get("best"):
            raise UserError(f"{best} is damaged; start again with --no-resume.")
        self.saved_best = progress.best_step
        return progress

    def save(self, running, progress: Progress) -> None:
        state = {"progress": asdict(progress), "best": hashes.mark(self._best(progress.best_step))}
        states.save(running, self.states, state)
        self.saved_best = progress.best_step
        distributed.lead(self._forget_worse)

    def _forget_worse(self) -> None:
        """Keep of the best weights those that the last state would go on from."""
        for path in self.partial.glob("best-*.safetensors"):
            if path != self._best(self.saved_best):
                path.unlink()

    def _best(self, step: int | None) -> Path:
        return self.partial / f"best-{step}.safetensors"

    def keep_best(self, running, trained: list[str], step: int) -> None:
        tensors = engine.weights(running)

        def write():
            self._forget_worse()
            paths.save_tensors(self._best(step), {name: tensors[name] for name in trained})

        distributed.lead(write)

    def events(self, step: int) -> Callable[[dict | None, int], None]:
        """(scalars or None to close, step) -> into TensorBoard's events, from rank 0, where
        tensorboard is installed; those of steps after ``step`` are of a killed run, and void."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            distributed.say("no TensorBoard events: pip install tensorboard")
            return lambda scalars, step: None
        if distributed.rank() > 0:
            return lambda scalars, step: None
        events = SummaryWriter(self.partial / "tensorboard", purge_step=step + 1 if step else None)

        def add(scalars, step):
            if scalars is None:
                events.close()
                return
            for name, value in scalars.items():
                events.add_scalar(name, value, step)

        return add

    def save_batch(self, step: int, batches: list[dict], error: Diverged) -> None:
        """This rank's batches of a step that failed, beside the output."""
        name = f"{self.out.name}.failed-step{step}-rank{distributed.rank()}"
        tensors, rest = {}, []
        for number, batch in enumerate(batches):
            parts = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
            tensors |= {f"{number}.{key}": value for key, value in parts.items()}
            rest.append({k: v for k, v in batch.items() if isinstance(v, int | float | str | list)})
        path = self.out.with_name(f"{name}.safetensors")
        paths.save_tensors(path, tensors)
        text = json.dumps({"error": str(error), "step": step, "batches": rest}, indent=1)
        paths.write_text(path.with_suffix(".json"), text)
        distributed.say(f"the batch is saved as {path}")

    def write(self, progress: Progress, finish, source: Path, step: dict) -> None:
        tensors = load_file(self._best(progress.best_step))
        finished = finish(tensors)
        model, side = finished if isinstance(finished, tuple) else (finished, None)
        save.save_model(
            model,
            source,
            self.out,
            base=step["base"],
            step=step,
            log={"looks": progress.rows, "written": {"step": progress.best_step}},
            sizes={} if progress.best is None else {"best validation value": progress.best},
            run=self.folder,
            beside=[self.partial / "tensorboard"],
            side=side,
        )
