"""Free memory is what a container may still take, not what its host has."""

import psutil
import torch

from harness import memory

CPU = torch.device("cpu")


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 300000\nactive_file 7\n")
    assert memory.free(CPU) == 400_000


def test_without_a_limit_the_machine_counts(tmp_path, monkeypatch):
    total = psutil.virtual_memory().total
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert 0 < memory.free(CPU) <= total
    (tmp_path / "memory.max").write_text("max\n")
    assert 0 < memory.free(CPU) <= total


def test_peak_is_in_words():
    assert memory.peak().split()[1] == "GB"
