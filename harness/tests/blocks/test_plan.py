"""What --dry-run tells: never less than what is taken, and not much more."""

import re

import pytest
import torch

import families
from harness import progress
from harness.blocks import plan, sequential
from harness.blocks.decoder import Decoder
from harness.blocks.plan import print_plan
from harness.checkpoint import layouts
from harness.quant.grid import Grid, nearest
from harness.quant.scheme import Scheme

SIZES = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def place_without_a_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "multiply_adds_per_second", lambda device, dtype: 1e9)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    families.save("llama", folder, tokenizer=True, dtype=torch.bfloat16, **SIZES)
    return folder


def told(decoder, method, capsys, tokens=0) -> tuple[float, float]:
    """Gigabytes of memory and megabytes of disk of the plan's last line."""
    capsys.readouterr()
    print_plan(decoder, method, "out", tokens)
    line = capsys.readouterr().out.splitlines()[-1]
    return tuple(map(float, re.search(r"about ([\d.]+) GB of memory, ([\d.]+) MB", line).groups()))


@pytest.mark.parametrize(
    ("layout", "bits", "group", "symmetric"),
    [
        ("compressed-tensors", 3, 32, False),
        ("compressed-tensors", 5, -1, False),
        ("compressed-tensors", 4, 32, True),
        ("gptq", 3, 32, False),
        ("gptq", 8, -1, True),
        ("dense", 3, 32, False),
        ("bitmask", None, None, None),
    ],
)
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_disk(layout, bits, group, symmetric, computed, source, tmp_path, capsys):
    decoder = Decoder(source, dtype=computed)
    grid = None if bits is None else Grid(bits, group, symmetric)
    scales = layouts.of(layout).scale_dtype(decoder.stored_dtype)

    def update(matrices, statistics, hand):
        if grid is None:
            halves = {n: m.where(m.abs() > m.abs().median(), 0) for n, m in matrices.items()}
            return {n: sequential.Update(m) for n, m in halves.items()}
        return {n: sequential.Update(nearest(m, grid, scales)) for n, m in matrices.items()}

    settings = {"sparsity": 0.5} if grid is None else {}
    method = sequential.Method(
        "some",
        settings,
        [sequential.per_stage(update)],
        (),
        layout=layout,
        scheme=grid and Scheme(grid),
    )
    _, disk = told(decoder, method, capsys)
    out = tmp_path / "made"
    sequential.compress(decoder, method, out, base="base")
    taken = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    # Above it by the 50 kB of rounding up and what JSON may take of a few hundred tensors.
    assert taken <= disk < taken + 0.15


def test_memory_grows_with_the_tokens_and_is_that_of_the_dtype_computed_in(source, capsys):
    method = sequential.Method(
        "some", {}, [sequential.per_stage(None, lambda columns, device: None)]
    )
    few, many = (
        told(Decoder(source, dtype=torch.float32), method, capsys, n)[0] for n in (1, 10**6)
    )
    short = told(Decoder(source, dtype=torch.bfloat16), method, capsys, 10**6)[0]
    # Of a token: hidden states and what waits for a linear, at least.
    assert many - few > 10**6 * 4 * (3 * 128 + 2 * 160) / 1e9
    assert 1.9 < (many - few) / (short - few) < 2.1


def test_lines_off_a_terminal_tell_the_time_left(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    assert list(progress.track(range(4), "blocks")) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "blocks: 1/4, 40 s, about 2 min left"
    assert lines[1] == "blocks: 2/4, 80 s, about 80 s left"
    assert lines[-1].startswith("blocks: 4/4, ")
    assert progress.time_left(3600, 1, 5) == "about 4.0 h left"
