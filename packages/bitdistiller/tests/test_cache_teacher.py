"""A teacher's cache: what it holds is tested in `packages/minillm/tests/test_teacher_cache.py`."""

import pytest

from bitdistiller.cache_teacher import main


@pytest.mark.parametrize("count", ["0", "-3"])
def test_less_than_one_example_is_one_clear_line(tmp_path, monkeypatch, capsys, count):
    monkeypatch.chdir(tmp_path)
    words = ["tiny-llama", "--data", "stdlib-doc", "--max_train_samples", count, "--out", "x"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: --max_train_samples {count}: at least 1."
    assert not list(tmp_path.iterdir())
