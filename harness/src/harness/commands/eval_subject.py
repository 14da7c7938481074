"""The model under evaluation, and what a metric's step is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness import paths, precision
from harness.checkpoint import layouts, load, quantconfig
from harness.checkpoint.load import window_length
from harness.checkpoint.weights import Weights
from harness.commands.eval_settings import EvalSettings
from harness.data import corpora
from harness.errors import UserError
from harness.metrics.footprint import linear_shapes


@dataclass(frozen=True)
class Step:
    """`measure` returns (table rows, details); `settings` decide whether an old result still holds;
    `tokens` is about how many the model will read, for the plan."""

    key: str
    settings: dict
    plan: str
    measure: Callable[[], tuple[list[dict], dict]]
    tokens: int = 0


class Subject:
    """The model under evaluation; everything heavy is made when first asked for."""

    def __init__(self, settings: EvalSettings):
        self.settings = settings
        self.folder: Path = load.resolve(settings.model)
        self.config = load.load_config(self.folder)
        self.device = load.pick_device(settings.device)
        self.seqlen = window_length(self.config, settings.seqlen)
        quantization = paths.read_json(self.folder / "config.json").get("quantization_config")
        # How the weights are stored, one of the formats or "other", which only vLLM measures.
        self.layout = quantconfig.layout_of(quantization)
        if self.layout == layouts.OTHER:
            self.stored_dtype = self.config.dtype or precision.parse("float32")
        else:
            self.stored_dtype = Weights(self.folder).dtype
        self.dtype = precision.choose(
            settings.dtype, self.stored_dtype, self.device, settings.model
        )
        self.numerics = {
            "dtype": precision.record(self.dtype, self.stored_dtype), "load": settings.load,
        }  # fmt: skip

    @cached_property
    def tokenizer(self):
        return load.load_tokenizer(self.folder)

    @cached_property
    def model(self):
        if self.settings.block_by_block:
            raise UserError("--block-by-block measures perplexity and divergence only")
        return self.load(self.folder, self.settings.load)

    def load(self, folder: Path, how: str | None = None):
        return load.load_model(folder, device=self.device, dtype=self.dtype, load=how)

    @cached_property
    def macs(self) -> dict[str, int]:
        from harness.checkpoint.nonuniform import skeleton
        from harness.metrics.macs import macs_per_token

        return macs_per_token(skeleton(self.config), self.seqlen, linear_shapes(self.folder))

    def stream(self, folder: Path, windows):
        """(start, logits) of the checkpoint in `folder`, a block in memory at a time."""
        from harness.blocks.streams import stream_logits

        return stream_logits(folder, windows, device=self.device, dtype=self.dtype, batch_size=1)

    def windows(self, dataset: str, bos: bool = False):
        """Token windows int64 [N, T] of an evaluation text, and how it was cut."""
        windows = corpora.evaluation(
            self.tokenizer, dataset, seqlen=self.seqlen, limit=self.settings.limit, bos=bos
        )
        corpora.check_token(int(windows.max()), self.config)
        headed = ", BOS at the head of each" if bos else ""
        return (
            windows,
            f"{corpora.protocol(dataset)}, seqlen {self.seqlen}, non-overlapping{headed}",
        )

    def with_bos(self, dataset: str, windows, logits):
        """The same with BOS at the heads, where --bos wants it: see
        :func:`harness.blocks.calibration.choose`, which asks for ``logits`` of some windows."""
        from harness.blocks.calibration import choose

        return self.windows(dataset, choose(self.settings.bos, self.tokenizer, windows, logits))


def short(dataset: str) -> str:
    """A dataset's name, or a path's last part."""
    return Path(dataset).name
