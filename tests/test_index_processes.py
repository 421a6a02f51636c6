"""Two processes on gloo against one: the same index, the same scores, the same order."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from index_faults import TEST, TRAIN, ended, forked, influence

from captum_sdi import SketchIndex, StepInfluence, whole_file
from captum_sdi.index import folder, shards, writer
from captum_sdi.index.reader import Reader

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a warm process"),
    pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from"),  # one's gradients are much the larger
]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 3000)
    monkeypatch.setattr(folder, "_PIECE", 0)
    monkeypatch.setattr(folder, "_LEAST", 3)


def ranks(work: Callable[[int], object]) -> list[int]:
    """Runs something as the two ranks of a `torchrun`; their numbers as processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def as_rank(number: str) -> None:
        from accelerate import PartialState

        PartialState._reset_state()  # that of the process it was forked from
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": number})
        os.environ.update({"LOCAL_RANK": number, "LOCAL_WORLD_SIZE": "2"})
        work(int(number))

    return [forked(lambda number=number: as_rank(number)) for number in "01"]  # type: ignore[misc]


def assert_same(ours: StepInfluence, theirs: StepInfluence) -> None:
    if theirs.indices is not None:
        assert torch.equal(ours.indices, theirs.indices)
    for field in ("influence_scores", "trajectories", "score_errors", "trajectory_errors"):
        ours_, theirs_ = getattr(ours, field), getattr(theirs, field)
        assert (ours_ - theirs_).abs().max() <= 1e-6 * theirs_.abs().max()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Every row twice in the train set: among equal ones, which the ranks hold apart, the lowest positions win."""
    twice = {"train_dataset": TRAIN + TRAIN}

    def work(rank: int) -> None:
        shared = influence(tmp_path / "two", **twice)
        shared.step_influence(TEST).save(tmp_path / f"all{rank}")
        shared.step_influence(TEST, k=9, rank_by=1).save(tmp_path / f"top{rank}")
        best = shared.influence(TEST, k=9, proponents=False)
        torch.save(best.indices, tmp_path / f"opponents{rank}")

    assert [ended(child) for child in ranks(work)] == [0, 0]
    alone = influence(tmp_path / "one", **twice)
    opponents = alone.influence(TEST, k=9, proponents=False).indices
    for rank in range(2):
        assert_same(StepInfluence.load(tmp_path / f"all{rank}"), alone.step_influence(TEST))
        assert_same(StepInfluence.load(tmp_path / f"top{rank}"), alone.step_influence(TEST, k=9, rank_by=1))
        assert torch.equal(torch.load(tmp_path / f"opponents{rank}"), opponents)
    one, two = (SketchIndex.open(tmp_path / name) for name in ("one", "two"))
    for name in one.checkpoints:
        assert [s.stop for s in two.shards[name]] != [46]
        assert torch.equal(Reader(two, name, torch.float32).read(0, 46), Reader(one, name, torch.float32).read(0, 46))


def test_both_ranks_sketch_their_part(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        written: list[str] = []
        write = shards.Shard.write

        def noted(where: Path, start: int, *args: object) -> shards.Shard:
            written.append(f"{where.name} {start}")
            return write(where, start, *args)  # type: ignore[arg-type]

        shards.Shard.write = noted  # type: ignore[method-assign,assignment]
        influence(tmp_path / "index").build_index()
        (tmp_path / f"rank{rank}").write_text("\n".join(written))

    assert [ended(child) for child in ranks(work)] == [0, 0]
    mine, others = (set((tmp_path / f"rank{rank}").read_text().split("\n")) for rank in range(2))
    assert len(mine) >= 6
    assert len(others) >= 6
    assert not mine & others


def test_ranks_that_die_are_started_again(tmp_path: Path) -> None:
    def dying(rank: int) -> None:
        sync, written = whole_file._sync, iter(range(1000))

        def fatal(file: Path) -> None:
            sync(file)
            if rank == 1 and next(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        whole_file._sync = fatal
        influence(tmp_path).build_index()

    first, second = ranks(dying)
    assert ended(second) == -signal.SIGKILL
    os.kill(first, signal.SIGKILL)  # which torchrun does
    ended(first)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert stamps
    assert not SketchIndex.open(tmp_path).complete
    assert [ended(child) for child in ranks(lambda _: influence(tmp_path).build_index())] == [0, 0]
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert_same(influence(tmp_path).step_influence(TEST), influence(None).step_influence(TEST))


def test_without_accelerate_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"several processes.*pip install 'captum-sdi\[train\]'"):
        influence(tmp_path).build_index()
