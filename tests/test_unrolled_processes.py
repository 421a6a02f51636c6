"""Two processes of torch.distributed share the seeds, and both get all scores."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed
from index_faults import ended, forked
from test_unrolled import TEST
from test_unrolled_questions import ran

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process")


def test_two_processes_are_one(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        rendezvous = f"file://{tmp_path}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
        torch.save(ran()[1].step_influence(TEST).trajectories, tmp_path / f"scores-{rank}.pt")
        other = tmp_path / f"scores-{1 - rank}.pt"  # who leaves first closes what the other still reads from
        for _ in range(6000):
            if other.exists():
                break
            time.sleep(0.01)

    processes = [forked(lambda rank=rank: work(rank)) for rank in range(2)]  # type: ignore[misc]
    assert [ended(process) for process in processes] == [0, 0]
    expected = ran()[1].step_influence(TEST).trajectories
    for rank in range(2):
        found = torch.load(tmp_path / f"scores-{rank}.pt")
        assert torch.allclose(found, expected, rtol=1e-9)
