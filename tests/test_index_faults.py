"""Kills and damages: whatever happens to a builder, the next one ends with the same scores, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from index_faults import DAMAGES, TEST, influence, killed_after, killed_while_building

from captum_sdi import SketchIndex, StepInfluence
from captum_sdi.index import folder, writer

KILLS = int(os.environ.get("CAPTUM_SDI_KILLS", "3"))  # `make test-faults` kills 20 times

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process"),
    pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from"),  # one's gradients are much the larger
]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    monkeypatch.setattr(folder, "_PIECE", 0)
    monkeypatch.setattr(folder, "_LEAST", 3)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StepInfluence, float]]:
    """Its scores, and how long building took."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 3000)
        patch.setattr(folder, "_PIECE", 0)
        patch.setattr(folder, "_LEAST", 3)
        influence(path / "warm").build_index()
        began = time.perf_counter()
        influence(path / "index").build_index()
        seconds = time.perf_counter() - began
        yield influence(path / "index").step_influence(TEST), seconds


def assert_identical(ours: StepInfluence, theirs: StepInfluence) -> None:
    for field in ("influence_scores", "trajectories", "score_errors", "trajectory_errors"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


def test_killed_again_and_again_at_any_write(
    tmp_path: Path, seed: int, uninterrupted: tuple[StepInfluence, float]
) -> None:
    """One index, one builder after another, each killed at another moment of its writing."""
    moment = random.Random(seed)
    ends = [killed_while_building(tmp_path, moment) for _ in range(KILLS)]
    assert set(ends) <= {0, -signal.SIGKILL}
    assert -signal.SIGKILL in ends
    with FileLock(tmp_path / "building.lock", timeout=0):  # the lock of the killed blocks nobody
        pass
    assert_identical(influence(tmp_path).step_influence(TEST), uninterrupted[0])
    assert not list(tmp_path.rglob("*.unfinished"))


def test_killed_at_a_random_time(tmp_path: Path, seed: int, uninterrupted: tuple[StepInfluence, float]) -> None:
    theirs, seconds = uninterrupted
    moment = random.Random(seed + 1)
    for i in range(KILLS):
        path = tmp_path / str(i)
        assert killed_after(path, moment.uniform(0.1, 1.0) * seconds) in (0, -signal.SIGKILL)
        found = list(path.rglob("*.safetensors")) if path.exists() else []
        stamps = {file: file.stat().st_mtime_ns for file in found}
        assert_identical(influence(path).step_influence(TEST), theirs)
        assert {file: file.stat().st_mtime_ns for file in found} == stamps  # what was written is not computed again


def test_continued_with_another_batch_size(tmp_path: Path, uninterrupted: tuple[StepInfluence, float]) -> None:
    killed_while_building(tmp_path, random.Random(3))
    ours, theirs = influence(tmp_path, batch_size=3).step_influence(TEST), uninterrupted[0]
    scale = theirs.trajectories.abs().max()
    assert (ours.trajectories - theirs.trajectories).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_noticed_and_rebuilt(
    tmp_path: Path, damage: Callable[[Path], None], seed: int, uninterrupted: tuple[StepInfluence, float]
) -> None:
    asked = influence(tmp_path)
    asked.build_index()
    chosen = random.Random(seed).choice(sorted(tmp_path.rglob("*.safetensors"))[1:])
    others = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors") if file != chosen}
    damage(chosen)
    for again in (asked, influence(tmp_path)):  # by the object that has read it before, too
        assert_identical(again.step_influence(TEST), uninterrupted[0])
    assert {file: file.stat().st_mtime_ns for file in others} == others
    assert SketchIndex.open(tmp_path).complete
