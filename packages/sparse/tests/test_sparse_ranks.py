"""Two gloo processes give what one gives, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import families

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_ranks_prune_as_one(tmp_path):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    # Sizes that divide neither by the ranks nor by the width of a vector register.
    families.save("llama", model, tokenizer=True, num_hidden_layers=2, intermediate_size=80)
    text.write_text(families.TEXT * 200)
    driver = [Path(__file__).with_name("sparse_ranks_driver.py"), model, text]
    results = {}
    for name, launcher in (("one", []), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *launcher, *map(str, driver)],
            cwd=tmp_path / name,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        # Every rank's own word: gloo may abort a process that is only shutting down.
        assert launcher or done.returncode == 0, done.stderr
        ranks = 1 + (name == "two")
        assert done.stderr.count(f"ranks {ranks}, exit code 0") == ranks, done.stderr
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        results[name] = {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}
    assert {Path(p).parts[0] for p in results["one"]} == {
        "plain", "ordered", "packed", "norms", "single", "magnitude", "cli"
    }  # fmt: skip
    assert results["one"].keys() == results["two"].keys()
    different = [p for p, content in results["one"].items() if results["two"][p] != content]
    assert different == []
