"""Process groups: whose they are."""

import subprocess
import sys

CODE = """
import sys
import torch.distributed as dist
from harness import distributed

with distributed.group():
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
assert dist.is_initialized()
"""


def test_a_group_that_others_make_stays(tmp_path):
    # In a process of its own: another test may have left DeepSpeed's group in this one.
    subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "store")], check=True)
