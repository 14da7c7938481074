"""Scores against autograd on the whole model; which groups they choose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import families
from harness.blocks.decoder import Decoder
from harness.blocks.gradients import backward
from harness.errors import UserError
from sparse.structured import groups, selection
from sparse.structured import levels as cuts
from sparse.structured.importance import group_scores, line_scores
from sparse.structured.scores import score

EXAMPLES = 3


def of_examples(model, ids):
    """Per parameter, the gradients [N, ...] of every example's loss, by autograd on the model."""
    each = {name: [] for name, _ in model.named_parameters()}
    for window in ids:
        model.zero_grad()
        out = model(window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, window[1:]).backward()
        for name, parameter in model.named_parameters():
            each[name].append(parameter.grad.clone())
    return {name: torch.stack(gradients) for name, gradients in each.items()}


def close(got, wanted):
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_block_by_block_gradients_are_autograds(family, tied, tmp_path):
    model = families.save(family, tmp_path, tie_word_embeddings=tied)
    ids = families.windows(EXAMPLES, 16)
    wanted = of_examples(model, ids)
    decoder = Decoder(tmp_path)

    def names(index):
        module = decoder.model if index is None else decoder.blocks[index]
        inside = f"{decoder.prefix}."
        return [n for n, _ in module.named_parameters() if index is not None or inside not in n]

    seen = []
    for index, found in backward(decoder, ids, names, squares=True):
        prefix = "" if index is None else f"{decoder.prefix}.{index}."
        for name, (_, first, second) in found.items():
            each = wanted[prefix + name]
            close(first, each.mean(dim=0))
            close(second, each.square().mean(dim=0))
            seen.append(prefix + name)
    assert sorted(seen) == sorted(wanted)
    assert not any(p.requires_grad for p in decoder.model.parameters())


def test_only_what_is_wanted_is_differentiated(tmp_path):
    families.save("llama", tmp_path)
    decoder = Decoder(tmp_path)
    down = "mlp.down_proj.weight"
    steps = list(
        backward(decoder, families.windows(2, 16), lambda i: [down] if i in (2, 3) else [])
    )
    assert [(index, list(found)) for index, found in steps] == [
        (4, []), (3, [down]), (2, [down])
    ]  # fmt: skip


@pytest.mark.parametrize("taylor", ["vectorize", "param_first", "param_second", "param_mix"])
def test_scores_of_heads_and_channels(taylor, tmp_path):
    model = families.save("llama", tmp_path)
    ids = families.windows(EXAMPLES, 16)
    each = of_examples(model, ids)
    decoder = Decoder(tmp_path)
    cut = cuts.block_wise(decoder, {"attention": (1, 3), "mlp": (0, 5)}, 8)
    scores = score(decoder, cut, ids, "taylor", taylor, "sum", 0)
    assert len(scores) == 2 + 5

    def by_line(name, dim):
        w, g = model.get_parameter(name).detach().double(), each[name].double()
        first, second = w * g.mean(0), w * w * g.square().mean(0)
        if taylor == "vectorize":
            return first.sum(1 - dim).abs()
        one = {"param_first": first, "param_second": second, "param_mix": first - second / 2}
        return one[taylor].abs().sum(1 - dim)

    at = "model.layers.2."
    # Two key/value heads of 8, each with two query heads.
    heads = sum(
        by_line(f"{at}self_attn.{n}.weight", dim).view(2, -1).sum(1)
        for n, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1))
    )
    close(scores["block 2 self_attn.o_proj"], heads.float())
    channels = sum(
        by_line(f"{at}mlp.{n}.weight", dim)
        for n, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
    )
    close(scores["block 2 mlp.down_proj"], channels.float())


def test_dead_groups_are_zero_to_the_scores(tmp_path):
    model = families.save("gpt2", tmp_path)
    ids = families.windows(EXAMPLES, 16)
    decoder = Decoder(tmp_path)
    cut = cuts.block_wise(decoder, {"attention": (0, 5), "mlp": (0, 5)}, 8)
    for mask in cut.alive.values():
        mask[::3] = False
    got = score(decoder, cut, ids, "taylor", "param_first", "sum", 0)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.weight[::3] = 0
            for head in (0, 3):
                block.attn.c_proj.weight[8 * head : 8 * head + 8] = 0
    each = of_examples(model, ids)
    name = "transformer.h.4.mlp.{}.weight"
    salience = [
        (model.get_parameter(name.format(n)).detach() * each[name.format(n)].mean(0)).abs()
        for n in ("c_fc", "c_proj")
    ]
    close(got["block 4 mlp.c_proj"], salience[0].sum(0) + salience[1].sum(1))


def test_matrices_are_put_together():
    lines = [
        (torch.tensor([1.0, 2, 3, 4]), torch.tensor([[0, 1], [2, 3]])),
        (torch.tensor([5.0, 1]), torch.tensor([[0], [1]])),
    ]
    wanted = {"sum": [8, 8], "mean": [4, 4], "max": [5, 7], "prod": [15, 7], "first": [3, 7]}
    for strategy, values in wanted.items():
        assert group_scores(lines, strategy).tolist() == values
    weight = torch.tensor([[1.0, -2], [3, 0]])
    assert line_scores(weight, 0, "l1", "").tolist() == [3, 3]
    assert line_scores(weight, 1, "l2", "").tolist() == [10, 4]


counts = st.integers(2, 40)


@settings(max_examples=60, deadline=None)
@given(counts, counts, st.floats(0, 0.95), st.sampled_from([1, 4, 8]), st.integers(0, 99))
def test_what_stays(first, second, ratio, multiple, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": first, "b": second}
    multiples = {"a": multiple, "b": 1}
    scores = {n: torch.rand(size, generator=generator) for n, size in sizes.items()}
    alive = {n: torch.rand(size, generator=generator) < 0.9 for n, size in sizes.items()}
    for choose in (selection.uniform, selection.by_one_threshold):
        for name, mask in choose(scores, alive, ratio, multiples).items():
            assert not (mask & ~alive[name]).any()
            kept = scores[name][mask]
            rest = scores[name][alive[name] & ~mask]
            assert not len(kept) or not len(rest) or kept.min() >= rest.max()
            # Below a multiple only where fewer were alive.
            assert int(mask.sum()) in (int(alive[name].sum()), sizes[name]) or (
                int(mask.sum()) % (multiples[name] if sizes[name] >= multiples[name] else 1) == 0
            )
            if choose is selection.by_one_threshold and alive[name].any():
                assert mask.any()


def test_one_threshold_takes_the_lowest_of_all():
    scores = {"a": torch.arange(8.0), "b": torch.arange(100.0, 108)}
    alive = {name: torch.ones(8, dtype=torch.bool) for name in scores}
    masks = selection.by_one_threshold(scores, alive, 0.25, {"a": 1, "b": 1})
    assert masks["a"].tolist() == [False] * 4 + [True] * 4 and masks["b"].all()
    masks = selection.by_one_threshold(scores, alive, 0.75, {"a": 2, "b": 2})
    assert masks["a"].sum() == 2 and masks["b"].sum() == 4


def test_a_ratio_that_leaves_nothing_is_named():
    selection.check_counts({"x": 4}, 0.85, {"x": 1})
    with pytest.raises(UserError, match="leaves none of the 4 groups of x"):
        selection.check_counts({"x": 4}, 0.9, {"x": 1})
    with pytest.raises(UserError, match="a multiple of 8"):
        selection.check_counts({"x": 16}, 0.8, {"x": 8})


def test_rows_that_nothing_reads_are_no_groups():
    assert groups._by_group(torch.tensor([0, 0, groups.NONE])) is None
    assert groups._by_group(torch.tensor([0, 0, 1])) is None
    assert groups._by_group(torch.tensor([0, 1, 0, 1])).tolist() == [[0, 2], [1, 3]]
