"""The estimate: what it measures, what it multiplies, and that it leaves no trace."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import looped_gpt, rows
from reference import next_token_loss
from torch import Tensor

from captum_sdi import SDIInfluence, TensorSketch
from captum_sdi.cost import Estimate, estimate
from captum_sdi.passes import Point
from captum_sdi.preconditioners import Hessian
from captum_sdi.preconditioners.hessian import HessianProduct

TRAIN = rows(10, seed=1)
COST = Estimate(
    n_examples=1_000_000,
    n_batches=62_500,
    n_checkpoints=4,
    device="cuda:0",
    batch_seconds=0.25,
    checkpoint_seconds=2.0,
    model_bytes=500_000_000,
    peak_bytes=7_300_000_000,
    row_bytes=8192,
)


def test_time_and_disk_multiply() -> None:
    assert COST.seconds == 4 * (2 + 62_500 * 0.25)
    assert COST.disk_bytes == 4 * 1_000_000 * 8192


def test_it_prints_what_a_user_asks() -> None:
    assert str(COST).splitlines() == [
        "1,000,000 examples at 4 checkpoints on cuda:0",
        "time    17 h 22 min  250 ms a batch, 62,500 batches, and 2 s a checkpoint",
        "memory       7.3 GB  of the GPU at the peak of a batch; the model is 500 MB",
        "disk        32.8 GB  8.19 kB an example and checkpoint",
    ]


def test_a_batch_and_a_checkpoint_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate([0, 100, 100, 0, 3, *[7] * 3, 500])  # warm-up; checkpoint; batches; the longest
    monkeypatch.setattr(sys.modules[estimate.__module__], "_now", lambda _: float(next(ticks)))
    cost = estimate(SDIInfluence(looped_gpt()(), TRAIN, batch_size=4), longest=0)
    assert (cost.checkpoint_seconds, cost.batch_seconds) == (3, 7)
    assert (cost.n_examples, cost.n_batches, cost.n_checkpoints) == (10, 3, 1)


@pytest.mark.parametrize(("settings", "n_batches"), [({}, 3), ({"examples": 5}, 2)])
def test_products_with_a_hessian_are_timed_and_counted(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, int],
    n_batches: int,
) -> None:
    products = []

    def product(self: HessianProduct, direction: Tensor) -> Tensor:
        products.append(direction)
        return direction

    monkeypatch.setattr(HessianProduct, "__call__", product)
    monkeypatch.setattr(sys.modules[estimate.__module__], "_now", lambda _: float(len(products)))  # a second each
    hessian = Hessian(rank=50, **settings)
    cost = estimate(SDIInfluence(looped_gpt()(), TRAIN, batch_size=4, preconditioner=hessian))
    assert cost.seconds == cost.curvature_seconds == 50 * n_batches
    assert "for curvatures" in str(cost)


def test_it_measures_examples_from_all_over_and_a_batch_of_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def batch(self: Point, raw: Any, *arguments: Any, **settings: Any) -> Any:
        seen.append(raw["input_ids"].tolist())
        return real(self, raw, *arguments, **settings)

    real = Point.batch
    monkeypatch.setattr(Point, "batch", batch)
    data = [{"input_ids": torch.tensor([i, 1, 2]), "labels": torch.tensor([i, 1, 2])} for i in range(10)]
    estimate(SDIInfluence(looped_gpt()(), data, batch_size=4), longest=7)
    assert {tuple(row[0] for row in ids) for ids in seen[:-1]} == {(0, 2, 5, 7)}
    assert [row[0] for row in seen[-1]] == [7, 7, 7, 7]


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_disk_is_that_of_the_index(dtype: torch.dtype | None, tmp_path: Path) -> None:
    settings = {"batch_size": 4, "sketch": TensorSketch(16), "index": tmp_path / "index", "index_dtype": dtype}
    sdi = SDIInfluence(looped_gpt()(), TRAIN, **settings)
    cost = estimate(sdi)
    assert not (tmp_path / "index").exists()
    index = sdi.build_index()
    assert cost.disk_bytes == 10 * index.width * index.dtype.itemsize
    assert cost.disk_bytes < index.bytes < cost.disk_bytes + 4_000  # fingerprints and headers


def test_the_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = looped_gpt()().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = looped_gpt(initializer_range=0.5)()
    torch.save({"model_state_dict": other.state_dict(), "learning_rate": 0.1}, tmp_path / "1.pt")
    cost = estimate(SDIInfluence(model, TRAIN, [str(tmp_path / "1.pt")] * 3, batch_size=4))
    assert cost.n_checkpoints == 3
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cost.model_bytes == 4 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


class Hungry:
    """A loss that needs memory for a moment."""

    reduction = "none"

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        torch.ones(self.n_bytes, dtype=torch.uint8)
        return torch.stack([next_token_loss(*pair) for pair in zip(output.logits, labels, strict=True)])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is that of the whole process")
def test_memory_is_the_peak_of_a_batch() -> None:
    torch.ones(600_000_000, dtype=torch.uint8)  # an earlier peak does not count
    peaks = []
    for n_bytes in (1, 300_000_000):
        sdi = SDIInfluence(looped_gpt()(), TRAIN, loss_fn=Hungry(n_bytes), batch_size=4)
        peaks.append(estimate(sdi).peak_bytes)
    assert 250_000_000 < peaks[1] - peaks[0] < 350_000_000


@pytest.mark.filterwarnings("ignore:Unable to determine the number of batches")
def test_what_cannot_be_estimated_is_said() -> None:
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(TRAIN)

    sdi = SDIInfluence(looped_gpt()(), Endless(), batch_size=4)
    with pytest.raises(ValueError, match=r"train_dataset does not tell its length: pass n_examples="):
        estimate(sdi)
    with pytest.raises(ValueError, match=r"longest= needs a train_dataset whose examples can be picked"):
        estimate(sdi, 100, longest=0)
    assert estimate(sdi, 100).n_batches == 25
    sdi = SDIInfluence(looped_gpt()(), TRAIN, batch_size=4)
    with pytest.raises(ValueError, match=r"n_examples must be an int of at least 1, or None for all; got 0"):
        estimate(sdi, 0)
    with pytest.raises(ValueError, match=r"longest=10 must be a position in train_dataset, 0 to 9"):
        estimate(sdi, longest=10)


@pytest.mark.gpu
def test_on_a_gpu_memory_is_what_torch_allocated() -> None:
    cost = estimate(SDIInfluence(looped_gpt()().cuda(), TRAIN, batch_size=4))
    assert cost.model_bytes < cost.peak_bytes <= torch.cuda.max_memory_allocated()
    assert "of the GPU" in str(cost)
