"""Searching an index: exact, in bounded memory, and through FAISS with a recall that is true."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from index_faults import TEST, influence
from torch import Tensor

from captum_sdi import Faiss, TensorSketch
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.features import Noise, StepFeatures
from captum_sdi.index import folder, search
from captum_sdi.index.manifest import Manifest
from captum_sdi.index.processes import Processes
from captum_sdi.index.reader import Reader
from captum_sdi.index.shards import Shard
from captum_sdi.queries import collect
from captum_sdi.scores.collect import AllPairs, Winners
from captum_sdi.scores.contract import pair_scores
from captum_sdi.scores.ranking import Ranking, RunningBest

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # one's gradients are much the larger

WIDTH = 32
RATES = (0.5, 2.0)


def random_index(path: Path, n: int, names: tuple[str, ...] = ("a", "b"), dtype: str = "float32") -> folder.SketchIndex:
    """An index of random rows in shards of uneven lengths."""
    entries: dict[str, dict[str, Any]] = {name: {"weights": name, "hash tables": name} for name in names}
    sketch = {"kind": "TensorSketch", "dim": WIDTH, "seed": 0, "pool": True}
    manifest = Manifest({"sketch": sketch}, dtype, [("", WIDTH, 1 / WIDTH, 1)], entries, examples=n)
    generator = torch.Generator().manual_seed(0)
    index = folder.SketchIndex(path, manifest)
    for name in names:
        index.folder(name).mkdir(parents=True)
        start = 0
        while start < n:
            rows = torch.randn(min(n - start, 150 + start % 97), WIDTH, generator=generator)
            fingerprints = torch.zeros(len(rows), 8, dtype=torch.uint8)
            Shard.write(index.folder(name), start, rows, fingerprints, index.dtype, manifest.owner(name))
            start += len(rows)
    index.scan()
    return index


def rows_of(index: folder.SketchIndex) -> list[Tensor]:
    """All rows, read by safetensors itself."""
    from safetensors.torch import load_file

    return [
        torch.cat([load_file(file)["rows"] for file in sorted(index.folder(name).iterdir())])
        for name in index.checkpoints
    ]


def searching(index: folder.SketchIndex, faiss: Faiss | None = None, q: int = 5) -> tuple[search.Search, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tests = [torch.randn(q, 1, WIDTH, generator=generator) for _ in index.checkpoints]
    features = [StepFeatures({"": rows}, {"": Noise(1 / WIDTH)}, torch.zeros(q)) for rows in tests]
    checkpoints = [Checkpoint(name, None, rate) for name, rate in zip(index.checkpoints, RATES, strict=True)]
    alone = Processes(torch.device("cpu"))
    searched = search.Search(index, alone, checkpoints, features, torch.float32, faiss)
    return searched, [rows[:, 0] for rows in tests]


@pytest.mark.parametrize("proponents", [True, False])
def test_the_top_k_is_that_of_the_whole_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proponents: bool
) -> None:
    monkeypatch.setattr(folder, "_PIECE", 4 * WIDTH * 70)
    monkeypatch.setattr(search, "BLOCK", 256)
    index = random_index(tmp_path, 3000)
    searched, tests = searching(index)
    whole = sum(eta * t @ r.T for eta, t, r in zip(RATES, tests, rows_of(index), strict=True))
    indices, scores = searched.top(Ranking(20, proponents))
    order = whole.argsort(dim=1, descending=proponents, stable=True)[:, :20]
    assert torch.equal(indices, order)
    torch.testing.assert_close(scores, whole.gather(1, order))


def test_equal_scores_keep_the_lowest_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of ones and zeros: their sums are exact in any order, and many of them equal."""
    monkeypatch.setattr(search, "BLOCK", 256)
    monkeypatch.setattr(torch, "randn", lambda *size, generator: torch.randint(0, 2, size, generator=generator).float())
    index = random_index(tmp_path, 2000)
    searched, tests = searching(index)
    whole = sum(eta * t @ r.T for eta, t, r in zip(RATES, tests, rows_of(index), strict=True))
    indices, scores = searched.top(Ranking(50, proponents=True))
    assert scores.unique().numel() < scores.numel() / 5
    assert torch.equal(indices, whole.argsort(dim=1, descending=True, stable=True)[:, :50])


def test_a_running_top_k_is_that_of_everything_at_once() -> None:
    """With many equal scores, in blocks of every size."""
    scores = torch.randint(0, 4, (3, 60)).float()
    for size in (1, 7, 60):
        for proponents in (True, False):
            ranking = Ranking(9, proponents)
            best = RunningBest(ranking)
            for start in range(0, 60, size):
                best.add(torch.arange(start, min(start + size, 60)), scores[:, start : start + size])
            assert torch.equal(best.result()[0], ranking.best(scores)[0])


def test_mapped_and_copied_rows_score_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, or a killed builder's scores would differ from an uninterrupted one's."""
    index = random_index(tmp_path, 3000)
    mapped = searching(index, q=64)[0].top(Ranking(3000, proponents=True))
    monkeypatch.setattr(Reader, "_as_stored", lambda *_: None)
    copied = searching(index, q=64)[0].top(Ranking(3000, proponents=True))
    assert torch.equal(mapped[0], copied[0])
    assert torch.equal(mapped[1], copied[1])
    assert all(shard.rows.data_ptr() % 64 == 0 for shards in index.shards.values() for shard in shards)


def test_all_pairs_and_chosen_ones_are_those_of_the_whole_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of every checkpoint in order, with the variances of the formula."""
    monkeypatch.setattr(folder, "_PIECE", 4 * WIDTH * 70)
    monkeypatch.setattr(search, "NUMBERS_AT_ONCE", 300 * WIDTH)
    index = random_index(tmp_path, 1000)
    searched, tests = searching(index)
    pairs, labels, positions = AllPairs(), [], []
    for block in searched.scored_blocks(pair_scores):
        pairs.add(block)
        labels.append((block.number, block.checkpoint.name))
        positions.append(block.positions)
    assert labels == [(number, name) for number in range(4) for name in ("a", "b")]
    assert torch.equal(torch.cat(positions[::2]), torch.arange(1000))
    values, variances = torch.zeros(5, 1000), torch.zeros(5, 1000)
    for rate, test, rows in zip(RATES, tests, rows_of(index), strict=True):
        products = test @ rows.T
        norms = test.square().sum(1).unsqueeze(1) * rows.square().sum(1)
        values += rate * products
        variances += rate**2 / WIDTH * (norms + products.square())
    scores = pairs.result().scores
    torch.testing.assert_close(scores.values[..., 0], values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores.variances[..., 0], variances)
    indices = torch.randint(0, 1000, (5, 400))
    winners = Winners(indices)
    collect(searched.chosen_blocks(indices), winners)
    chosen = winners.result().scores
    torch.testing.assert_close(chosen.values[..., 0], values.gather(1, indices), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(chosen.variances[..., 0], variances.gather(1, indices))


def test_rows_come_out_the_same_wherever_shards_end(tmp_path: Path) -> None:
    index = random_index(tmp_path, 1000, names=("a",))
    reader, whole = Reader(index, "a", torch.float32), rows_of(index)[0]
    for start, stop in ((0, 1000), (0, 1), (149, 151), (150, 399), (999, 1000)):
        assert torch.equal(reader.read(start, stop), whole[start:stop])
    assert torch.equal(reader.gather([700, 3, 700, 151]), whole[[700, 3, 700, 151]])


@pytest.mark.parametrize("proponents", [True, False])
def test_flat_faiss_is_exact(tmp_path: Path, proponents: bool) -> None:
    pytest.importorskip("faiss")
    index = random_index(tmp_path, 5000)
    faiss = Faiss()
    ours, theirs = (searching(index, way)[0].top(Ranking(20, proponents)) for way in (faiss, None))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    assert faiss.recall == 1


@pytest.mark.parametrize("proponents", [True, False])
def test_approximate_faiss_reports_its_recall(tmp_path: Path, proponents: bool) -> None:
    pytest.importorskip("faiss")
    index = random_index(tmp_path, 5000)
    exact, scores = searching(index)[0].top(Ranking(20, proponents))
    recalls = []
    for nprobe in (4, 16, 32):
        faiss = Faiss("IVF32,Flat", nprobe)
        assert faiss.recall is None
        ours, found = searching(index, faiss)[0].top(Ranking(20, proponents))
        hits = [len(set(a) & set(b)) / 20 for a, b in zip(ours.tolist(), exact.tolist(), strict=True)]
        assert faiss.recall == pytest.approx(sum(hits) / len(hits))
        recalls.append(faiss.recall)
    assert 0.1 < recalls[0] < recalls[1] < recalls[2] == 1
    torch.testing.assert_close(found, scores)
    (file,) = tmp_path.glob("*.faiss")
    stamp = file.stat().st_mtime_ns
    searching(index, Faiss("IVF32,Flat", 4))[0].top(Ranking(20, proponents))
    assert file.stat().st_mtime_ns == stamp  # built once
    with pytest.raises(ValueError, match=r"FAISS found only \d+ of k=3000 .*raise nprobe"):
        searching(index, Faiss("IVF32,Flat"))[0].top(Ranking(3000, proponents))


def test_faiss_beside_a_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pooled = {"sketch": TensorSketch(64, pool=True)}
    theirs = influence(tmp_path, **pooled).step_influence(TEST, k=5, rank_by=1)
    faiss = Faiss("IVF2,Flat", nprobe=2)
    ours = influence(tmp_path, search=faiss, **pooled).step_influence(TEST, k=5, rank_by=1)
    assert torch.equal(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.trajectories, theirs.trajectories)
    assert faiss.recall == 1
    influence(tmp_path, search=faiss, **pooled).build_index()  # a FAISS index beside the shards disturbs nobody


def test_what_faiss_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"search= must be Faiss\(...\), beside index="):
        influence(tmp_path, search="Flat")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 16"):
        Faiss("IVF4,Flat", nprobe=0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'captum-sdi\[faiss\]'"):
        Faiss()
