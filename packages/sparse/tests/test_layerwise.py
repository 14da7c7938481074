"""Whole runs against loops over transformers models, and what the results hold."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import families
from harness import modules
from harness import modules as stages_module
from harness.blocks import decoder, sequential
from harness.blocks.streams import stream_logits
from harness.checkpoint import load
from harness.data import corpora
from harness.metrics import footprint
from sparse import magnitude, prune, sparsegpt, wanda
from sparse.command import honest_line
from sparse.ratios import outlier_ratio, sparsities

QUICK = {"nsamples": 5, "seqlen": 32}
COMMANDS = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
WINDOWS = families.windows(2)


@pytest.fixture(scope="module", autouse=True)
def small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "TOKENS_PER_BATCH", 64)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for family in ("llama", "gpt2", "opt"):
        families.save(family, folder / family, tokenizer=True)
    families.save("llama", folder / "half", tokenizer=True, dtype=torch.float16)
    (folder / "text.txt").write_text(families.TEXT * 100)
    return folder


def run(place, out, family="llama", **options):
    return prune(
        str(place / family),
        str(place / "text.txt"),
        out=out,
        **{"sparsity": 0.5, **QUICK, **options},
    )


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def blocks_of(model):
    return modules.find_blocks(model)[1]


def matrices(folder) -> dict[str, torch.Tensor]:
    """Every block's linears by name, [out, in]."""
    return {
        f"{index}.{name}": stages_module.get_matrix(module).clone()
        for index, block in enumerate(blocks_of(loaded(folder)))
        for name, module in stages_module.linears(block).items()
    }


@torch.no_grad()
def inputs_of(model, block, windows):
    """Linear -> all its inputs [tokens, in], by whole forwards of a transformers model."""
    found, hooks = {}, []
    for name, module in stages_module.linears(block).items():
        hook = lambda _, args, n=name: found.setdefault(n, []).append(args[0].flatten(0, -2))  # noqa: E731
        hooks.append(module.register_forward_pre_hook(hook))
    for part in windows.split(2):
        model(part, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(some) for name, some in found.items()}


def calibration(place, family="llama"):
    tokenizer = load.load_tokenizer(str(place / family))
    return corpora.calibration(tokenizer, str(place / "text.txt"), seed=0, **QUICK)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_wanda_is_the_ten_line_version(place, tmp_path, family, pattern):
    n, m = pattern or (0, 0)
    run(place, tmp_path / "out", family, method="wanda", prunen=n, prunem=m)
    got, model = matrices(tmp_path / "out"), loaded(place / family)
    for index, block in enumerate(blocks_of(model)):
        inputs = inputs_of(model, block, calibration(place, family))
        for name, module in stages_module.linears(block).items():
            weight = stages_module.get_matrix(module)
            scores = weight.abs() * inputs[name].double().square().sum(dim=0).sqrt().float()
            groups = scores.unflatten(1, (-1, m or scores.shape[1]))
            order = groups.argsort(dim=2, stable=True)
            gone = order[..., : n or int(scores.shape[1] * 0.5)]
            mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, gone, True).flatten(1)
            stages_module.set_matrix(module, weight.masked_fill(mask, 0))
            assert torch.equal(got[f"{index}.{name}"], stages_module.get_matrix(module))


AMOUNTS = {
    "half": {"sparsity": 0.5},
    "2:4": {"sparsity": None, "prunen": 2, "prunem": 4},
    "1:4 said twice": {"sparsity": 0.25, "prunen": 1, "prunem": 4},
    "nothing": {"sparsity": 0.0},
}


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("method", COMMANDS)
def test_amounts(place, tmp_path, method, amount):
    options = AMOUNTS[amount]
    rows = run(place, tmp_path / "out", method=method, **options)
    got, before = matrices(tmp_path / "out"), matrices(place / "llama")
    n, m = options.get("prunen", 0), options.get("prunem", 0)
    share = n / m if m else options["sparsity"]
    for row, (name, weight) in zip(rows, got.items(), strict=True):
        assert row["name"].endswith(name.split(".", 1)[1])
        assert row["zeros"] == (weight == 0).sum() == int(weight.numel() * share)
        if m:
            assert ((weight == 0).unflatten(1, (-1, m)).sum(dim=2) == n).all()
        if method != "sparsegpt" or share == 0:
            assert torch.equal(weight, before[name] * (weight != 0))
        error = row["error"]
        assert error is None if method == "magnitude" else (0 < error < 1) == (share > 0)
    settings = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"][0][
        "settings"
    ]
    assert settings["sparsity"] == share and settings["ratios"] == "uniform"
    assert (settings["prunen"], settings["prunem"]) == (n, m)


@pytest.mark.parametrize("per_row", [False, True])
def test_magnitude_drops_the_smallest_of_the_matrix_or_of_every_row(place, tmp_path, per_row):
    run(place, tmp_path / "out", method="magnitude", sparsity=0.3, per_row=per_row)
    before = matrices(place / "llama")
    for name, weight in matrices(tmp_path / "out").items():
        old = before[name].abs() if per_row else before[name].abs().flatten()[None]
        zero = (weight == 0).view(old.shape)
        assert old.masked_fill(~zero, 0).amax(1).le(old.masked_fill(zero, 9).amin(1)).all()
        assert (zero.sum(dim=1) == int(old.shape[1] * 0.3)).all()


def test_sparsegpt_repays_and_the_true_order_sees_earlier_stages(place, tmp_path):
    """Output errors of the first block on the inputs it was solved for, against Wanda's."""
    errors = {}
    for name, options in {
        "sparsegpt": {},
        "ordered": {"true_sequential": True},
        "wanda": {"method": "wanda"},
    }.items():
        rows = run(place, tmp_path / name, **options)
        errors[name] = [row["error"] for row in rows]
    model = loaded(place / "llama")
    inputs = inputs_of(model, blocks_of(model)[0], calibration(place))
    before, pruned = matrices(place / "llama"), matrices(tmp_path / "sparsegpt")
    zeros = {name: weight == 0 for name, weight in matrices(tmp_path / "wanda").items()}
    ratios = []
    for name, x in inputs.items():
        weight, got = before[f"0.{name}"], pruned[f"0.{name}"]
        error = (x @ (weight - got).T).square().sum() / (x @ weight.T).square().sum()
        lost = weight.masked_fill(~zeros[f"0.{name}"], 0)
        plain = (x @ lost.T).square().sum() / (x @ weight.T).square().sum()
        ratios.append((error / plain).item())
        row = list(inputs).index(name)
        assert error.item() == pytest.approx(errors["sparsegpt"][row], rel=1e-3)
    assert sum(ratios) / len(ratios) < 0.9
    assert errors["ordered"][:3] == errors["sparsegpt"][:3]  # q, k, v come first in both orders
    assert errors["ordered"][3:] != errors["sparsegpt"][3:]


SELECTIONS = {
    "part": ({"prune_only": "down_proj"}, lambda i, n: "down_proj" in n),
    "all but a part": ({"prune_only": "mlp", "invert": True}, lambda i, n: "mlp" not in n),
    "blocks": ({"minlayer": 1, "maxlayer": 3}, lambda i, n: 1 <= i < 3),
    "both, inverted": (
        {"minlayer": 1, "prune_only": "attn", "invert": True},
        lambda i, n: not (i >= 1 and "attn" in n),
    ),
}


@pytest.mark.parametrize("case", SELECTIONS)
@pytest.mark.parametrize("method", COMMANDS)
def test_selections(place, tmp_path, method, case):
    options, chosen = SELECTIONS[case]
    rows = run(place, tmp_path / "out", method=method, **options)
    before = matrices(place / "llama")
    pruned = 0
    for key, weight in matrices(tmp_path / "out").items():
        index, name = key.split(".", 1)
        pruned += chosen(int(index), name)
        assert torch.equal(weight, before[key]) != chosen(int(index), name), key
    assert len(rows) == pruned


@torch.no_grad()
@pytest.mark.parametrize("method", COMMANDS)
def test_results_reload_in_transformers_with_the_pass_s_logits(place, tmp_path, method):
    last = {}
    real = sequential.work_on

    def work_on(decoder, index, streams, method):
        hand = real(decoder, index, streams, method)
        last["hidden"] = [h.clone() for h in streams.inputs]
        last["logits"] = decoder.logits
        return hand

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "work_on", work_on)
        run(place, tmp_path / "out", method=method)
    model = loaded(tmp_path / "out")
    streamed = torch.cat([batch for _, batch in stream_logits(tmp_path / "out", WINDOWS)])
    torch.testing.assert_close(model(WINDOWS).logits, streamed, rtol=1e-5, atol=1e-5)
    windows = calibration(place)
    for part, hidden in zip(windows.split(2), last["hidden"], strict=False):
        got = model(part, use_cache=False).logits
        torch.testing.assert_close(got, last["logits"](part, hidden), rtol=1e-5, atol=1e-5)
    assert bool(last["hidden"]) == (method != "magnitude")


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "bitmask"])
def test_joint_quantization_is_the_same_in_every_format(place, tmp_path, layout):
    options = {"wbits": 4, "groupsize": 16, "sym": layout == "gptq", "family": "half"}
    run(place, tmp_path / "dense", **options)
    rows = run(place, tmp_path / "other", format=layout, **options)
    dense = loaded(tmp_path / "dense")
    other = load.load_model(tmp_path / "other", dtype=torch.float16)
    assert torch.equal(dense(WINDOWS).logits, other(WINDOWS).logits)
    assert all(row["zeros"] >= row["weights"] // 2 for row in rows)
    for weight in matrices(tmp_path / "dense").values():
        assert weight.unflatten(1, (-1, 16)).sort(dim=2).values.diff(dim=2).ne(0).sum(2).max() < 16


@torch.no_grad()
@pytest.mark.parametrize("method", COMMANDS)
def test_owl_spares_blocks_with_outliers(place, tmp_path, method):
    rows = run(place, tmp_path / "out", method=method, ratios="owl", owl_lambda=0.2, owl_m=3.0)
    model = loaded(place / "llama")
    outliers = []
    for block in blocks_of(model):
        inputs = inputs_of(model, block, calibration(place))
        scores = [
            module.weight.abs() * inputs[name].square().mean(dim=0).sqrt()
            for name, module in stages_module.linears(block).items()
        ]
        outliers.append(outlier_ratio(scores, 3.0))
    want = sparsities(outliers, 0.5, 0.2, [1] * len(outliers))
    assert max(want) - min(want) == pytest.approx(0.4)
    for row in rows:
        # 1/32: a row of 32 columns loses a whole number of weights.
        assert row["zeros"] / row["weights"] == pytest.approx(want[row["block"]], abs=1 / 32)


@pytest.mark.parametrize("method", COMMANDS)
def test_commands(place, tmp_path, method, monkeypatch, capsys):
    """Flags reach the method, the table and the honest line come out, names are as promised."""
    monkeypatch.chdir(tmp_path)
    words = [str(place / "llama"), str(place / "text.txt"), "--nsamples", "5", "--seqlen", "32"]
    main = COMMANDS[method].main
    assert main([*words, "--sparsity_ratio", ".5", "--sparsity_type", "2:4"]) == 0
    shown = capsys.readouterr().out
    assert "| mlp.down_proj | 0.5000 |" in shown
    assert "50.0% of the pruned linears" in shown and "written to llama-" in shown
    log = json.loads((tmp_path / f"llama-{method}-2of4" / "compression_log.json").read_text())
    assert log["settings"]["prunen"] == 2 and log["method"] == method
    assert main([*words, "--sparsity", ".3", "--dry-run"]) == 0
    assert f"{method}: 5 blocks -> llama-{method}-30" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == [f"llama-{method}-2of4"]


def test_the_honest_line_says_what_the_files_weigh(place, tmp_path):
    lines, stored = set(), []
    for layout in ("dense", "bitmask"):
        rows = run(place, tmp_path / layout, method="wanda", format=layout, prune_only="mlp")
        lines.add(honest_line(rows, tmp_path / layout, layout))
        size = footprint.footprint(tmp_path / layout)
        stored.append(size.bits_per_parameter * size.parameters / 8e6)
    (line,) = lines
    assert "50.0% of the pruned linears" in line and "It runs no faster" in line
    said = re.search("([0-9.]+) MB dense, ([0-9.]+) MB as bitmask", line).groups()
    assert list(map(float, said)) == pytest.approx(stored, rel=0.01)
    assert stored[1] < 0.9 * stored[0]


def test_gmp_is_magnitude_pruning(place, tmp_path):
    model = str(place / "llama")
    words = [model, "--sparsity", ".4", "--out"]
    assert sparsegpt.main([*words, str(tmp_path / "gmp"), "--gmp"]) == 0
    assert magnitude.main([*words, str(tmp_path / "magnitude")]) == 0
    ours, theirs = matrices(tmp_path / "gmp"), matrices(tmp_path / "magnitude")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sparsegpt_s_own_flags_reach_the_solver(place, tmp_path):
    words = [str(place / "llama"), str(place / "text.txt"), "--nsamples", "5", "--seqlen", "32"]
    words += ["--sparsity", ".5", "--out"]
    runs = {
        "plain": [], "damped": ["--percdamp", ".5"], "blocks": ["--blocksize", "8"],
        "ordered": ["--true-sequential"], "coarse": ["--wbits", "3"],
        "grouped": ["--wbits", "3", "--groupsize", "16"], "sym": ["--wbits", "3", "--sym"],
    }  # fmt: skip
    results = {}
    for name, flags in runs.items():
        assert sparsegpt.main([*words, str(tmp_path / name), *flags]) == 0
        results[name] = torch.cat([w.flatten() for w in matrices(tmp_path / name).values()])
    names = list(results)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(results[one], results[other]), (one, other)


@pytest.mark.parametrize("method", COMMANDS)
def test_help_is_light(method):
    code = (
        f"import sys\nfrom sparse.{method} import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert not done.code\n"
        "print('heavy:', [n for n in ('torch', 'numpy', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "DROPPED" in done.stdout and "heavy: []" in done.stdout
