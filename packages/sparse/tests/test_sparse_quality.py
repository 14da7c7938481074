"""What the project promises of pruning, on the embedded model at 50 and 70 %."""

import pytest

from harness.checkpoint import load
from harness.data import corpora
from harness.metrics import perplexity
from sparse import prune

pytestmark = pytest.mark.slow
AMOUNTS = {
    "50": {"sparsity": 0.5},
    "4:8": {"prunen": 4, "prunem": 8},
    "2:4": {"prunen": 2, "prunem": 4},
}


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    """``loss(method, ...)``: held-out perplexity of tiny-llama pruned so (20 windows of 512)."""
    tokenizer = load.load_tokenizer("tiny-llama")
    windows = corpora.evaluation(tokenizer, "stdlib", seqlen=512, limit=20)
    known = {}

    def measure(method, **options):
        key = (method, *options.items())
        if key not in known:
            out = tmp_path_factory.mktemp("out") / "it"
            prune("tiny-llama", "stdlib", out=out, method=method, nsamples=16, **options)
            model = load.load_model(out)
            known[key] = perplexity.perplexity(model, windows, batch_size=8).value
        return known[key]

    return measure


def test_sparsegpt_beats_wanda_beats_magnitude_at_half(loss):
    half = {"sparsity": 0.5}
    assert loss("sparsegpt", **half) < loss("wanda", **half) < loss("magnitude", **half)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_patterns_cost_more_the_tighter_they_are(loss, method):
    free, wide, tight = (loss(method, **amount) for amount in AMOUNTS.values())
    assert free < wide < tight


def test_owl_helps_wanda_at_seventy(loss):
    seventy = {"sparsity": 0.7}
    assert loss("wanda", **seventy, ratios="owl") < 0.95 * loss("wanda", **seventy)
