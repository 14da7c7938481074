"""What the project promises of GPTQ, on the embedded model: better than rounding at every width."""

import pytest

import gptq
from harness.checkpoint import load
from harness.data import corpora
from harness.metrics import perplexity

WINDOWS = 20


def perplexity_of(model: str, windows) -> float:
    return perplexity.perplexity(load.load_model(model), windows, batch_size=8).value


def test_gptq_beats_rounding_and_closes_half_of_the_gap_at_three_bits(tmp_path):
    """Groups of 128, act-order, 32 calibration windows of 512; 20 held-out windows."""
    tokenizer = load.load_tokenizer("tiny-llama")
    windows = corpora.evaluation(tokenizer, "stdlib", seqlen=512, limit=WINDOWS)
    dense = perplexity_of("tiny-llama", windows)
    for bits in (4, 3, 2):
        rtn, solved = tmp_path / f"rtn{bits}", tmp_path / f"gptq{bits}"
        gptq.quantize("tiny-llama", out=rtn, wbits=bits, groupsize=128, nearest=True)
        gptq.quantize(
            "tiny-llama",
            "stdlib",
            out=solved,
            wbits=bits,
            groupsize=128,
            nsamples=32,
            act_order=True,
            true_sequential=True,
        )
        rounded, better = perplexity_of(rtn, windows), perplexity_of(solved, windows)
        assert better <= rounded
        if bits == 3:
            # Half of it; 49 % where the text is that of Python 3.11.7 (it is the running one's).
            assert rounded - better >= 0.47 * (rounded - dense)
        if bits == 4:
            assert better == pytest.approx(dense, rel=0.02)
