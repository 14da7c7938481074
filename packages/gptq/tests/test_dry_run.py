"""--dry-run against the run itself, in processes of their own."""

import re

import pytest

import driving

WORDS = ("-m", "gptq", "tiny-llama", "stdlib", "--wbits", "3", "--groupsize", "128",
         "--nsamples", "16", "--seqlen", "512")  # fmt: skip


@pytest.mark.slow
def test_no_more_is_taken_than_was_told(tmp_path):
    told = driving.python(*WORDS, "--dry-run", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    memory, disk = map(
        float, re.search(r"about ([\d.]+) GB of memory, ([\d.]+) MB of disk", told.stdout).groups()
    )
    done = driving.python(*WORDS, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peaks = [float(peak) for peak in re.findall(r"peak ([\d.]+) GB", done.stderr)]
    taken = sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) / 1e6
    assert max(peaks) <= memory < 1.5 * max(peaks)
    assert taken <= disk < 1.05 * taken
