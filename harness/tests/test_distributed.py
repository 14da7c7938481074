"""Process groups: whose they are."""

import torch.distributed as dist

from harness import distributed


def test_a_group_that_others_make_stays(tmp_path):
    with distributed.group():
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    assert dist.is_initialized()
    dist.destroy_process_group()
