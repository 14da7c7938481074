"""Several examples in a row of a batch."""

import math
import random

from minillm import packing


def test_packs_hold_every_example_once_and_waste_little():
    lengths = [random.Random(i).randrange(1, 100) for i in range(400)]
    rows = packing.pack(lengths, 128, seed=0)
    assert sorted(i for row in rows for i in row) == list(range(400))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= math.ceil(sum(lengths) / 128 * 1.05)
    assert packing.pack(lengths, 128, seed=0) == rows != packing.pack(lengths, 128, seed=1)
