"""Masks against stable sorts, ties included; OWL's ratios against a case worked by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from sparse import masks
from sparse.methods import Norms, Target, wanda
from sparse.ratios import outlier_ratio, sparsities

quick = settings(max_examples=60, deadline=None)


WIDTHS = st.integers(1, 24)


@st.composite
def matrices(draw, widths):
    """Small matrices, often of few different values, so that ties and zeros are common."""
    rows, columns = draw(st.integers(1, 6)), draw(widths)
    levels = draw(st.sampled_from([2, 5, 1000]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator).float() - levels // 2


def by_sort(scores, count):
    """True for the ``count`` first of every row in a stable sort."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, gone in zip(scores.argsort(dim=1, stable=True), mask, strict=True):
        gone[row[:count]] = True
    return mask


@quick
@given(matrices(WIDTHS), st.floats(0, 0.99))
def test_wanda_s_mask_is_a_sort_s(weight, sparsity):
    """The whole method: streamed norms, scores, masks; against ten lines with torch.sort."""
    generator = torch.Generator().manual_seed(weight.numel())
    x = torch.randint(-2, 3, (3, 5, weight.shape[1]), generator=generator).float()
    norms = Norms(weight.shape[1])
    norms.add(x[:2])
    norms.add(x[2:])
    update = wanda(lambda *_: Target(sparsity), torch.float32, variant=False)
    got = update({"it": weight}, norms, "block 0")["it"].weight
    mean = x.double().square().flatten(0, 1).mean(dim=0)
    scores = weight.abs() * mean.sqrt().float()
    mask = by_sort(scores, int(weight.shape[1] * sparsity))
    assert torch.equal(got, weight.masked_fill(mask, 0))


@quick
@given(matrices(WIDTHS), st.floats(0, 0.99))
def test_masks_of_rows_and_of_a_tensor_are_a_sort_s(scores, sparsity):
    rows = masks.of_rows(scores, sparsity)
    assert torch.equal(rows, by_sort(scores, int(scores.shape[1] * sparsity)))
    flat = by_sort(scores.reshape(1, -1), int(scores.numel() * sparsity))
    assert torch.equal(masks.of_tensor(scores, sparsity), flat.view(scores.shape))


@quick
@given(st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (0, 4), (3, 12)]), st.data())
def test_n_of_m_is_a_sort_s(pattern, data):
    n, m = pattern
    scores = data.draw(matrices(st.integers(1, 4).map(lambda groups: groups * m)))
    want = torch.cat([by_sort(part, n) for part in scores.split(m, dim=1)], dim=1)
    assert torch.equal(masks.n_of_m(scores, n, m), want)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_the_variant_meets_the_sparsity_with_one_share_of_mass_for_all_rows(sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 256, generator=generator) ** torch.linspace(0.3, 3, 64)[:, None]
    mask = masks.of_mass(scores, sparsity)
    assert mask.double().mean().item() == pytest.approx(sparsity, abs=1.1e-3)
    # The smallest of every row, and nobody's next weight would still fit under the common share.
    assert all(
        torch.equal(m, by_sort(s[None], int(m.sum()))[0]) for m, s in zip(mask, scores, strict=True)
    )
    total = scores.sum(dim=1)
    lost = (scores * mask).sum(dim=1) / total
    kept = scores.masked_fill(mask, torch.inf).min(dim=1).values
    assert lost.max() <= ((lost * total + kept) / total).min() + 1e-5
    if sparsity > 0:
        assert mask.sum(dim=1).unique().numel() > 10


def test_owl_by_hand():
    # Means 2 and 3.5: above 2 x 3 = 6 lie 1 of 8 entries; above 2.5 x 3.5 = 8.75 none.
    scores = [torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 9]])]
    assert outlier_ratio(scores, 3) == 1 / 8
    assert outlier_ratio([torch.tensor([[3.0, 4]]), torch.tensor([[3.0], [4.0]])], 2.5) == 0
    # Ratios 1, 3, 2 stretch to keep 0, .16, .08 more, .08 on average.
    got = sparsities([0.01, 0.03, 0.02], 0.7, 0.08, [5, 5, 5])
    assert got == pytest.approx([0.78, 0.62, 0.70])
    assert sparsities([0.2, 0.2], 0.7, 0.08, [1, 1]) == [0.7, 0.7]


@quick
@given(
    st.lists(st.tuples(st.floats(0, 0.1), st.integers(1, 9)), min_size=1, max_size=9),
    st.floats(0.2, 0.8),
    st.floats(0, 0.09),
)
def test_owl_keeps_the_mean_and_its_bounds(blocks, sparsity, spread):
    outliers, weights = zip(*blocks, strict=True)
    got = sparsities(list(outliers), sparsity, spread, list(weights))
    mean = sum(s * w for s, w in zip(got, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(sparsity)
    assert max(got) - min(got) <= 2 * spread + 1e-9
    assert all(abs(s - sparsity) <= 2 * spread + 1e-9 for s in got)
    by_outliers = [s for _, s in sorted(zip(outliers, got, strict=True))]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(by_outliers))


def test_owl_refuses_to_leave_the_range():
    with pytest.raises(UserError, match=r"sparsities from 0\.870 to 1\.030; .* below 0\.08"):
        sparsities([0.0, 0.1], 0.95, 0.08, [1, 1])
