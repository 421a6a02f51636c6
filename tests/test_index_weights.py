"""The hash of a model's weights: remembered only while every weight is what it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captum_sdi.index import weights
from captum_sdi.index.weights import WeightHashes


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Two weights that are large enough to be recognised, one in half precision, with an end that fills no line."""
    monkeypatch.setattr(weights, "_LEAST", 4096)
    monkeypatch.setattr(weights, "_WORDS", 16)
    torch.manual_seed(0)
    half = nn.Linear(50, 61).to(torch.bfloat16)
    return nn.ModuleDict({"single": nn.Linear(40, 33), "coarse": half, "norm": nn.LayerNorm(8)})


def swapped(weight: Tensor, first: tuple[int, int], second: tuple[int, int]) -> None:
    """Two entries change places past autograd."""
    entry = weight[first].item()
    weight[first] = weight[second]
    weight[second] = entry


def moved(model: nn.ModuleDict) -> None:
    model["coarse"].weight = nn.Parameter(model["coarse"].weight + 1)


CHANGES: list[Callable[[nn.ModuleDict], object]] = [
    lambda model: model["single"].weight.data.add_(1),
    lambda model: model["single"].weight.data.mul_(-1),
    lambda model: model["single"].weight.data[7, 3].add_(1e-6),
    lambda model: swapped(model["single"].weight.data, (0, 0), (0, 2)),
    lambda model: swapped(model["single"].weight.data, (0, 0), (4, 0)),
    lambda model: model["single"].weight.data.copy_(model["single"].weight.data.flip(0)),
    lambda model: model["coarse"].weight.data[-1, -1].add_(1),
    lambda model: model["single"].weight.detach().numpy().__setitem__((0, 0), 9.0),
    lambda model: model["norm"].weight.data.add_(1),
    moved,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(model: nn.ModuleDict, change: Callable[[nn.ModuleDict], object]) -> None:
    hashes = WeightHashes()
    before = hashes.of_model(model)
    change(model)
    assert hashes.of_model(model) == WeightHashes().of_model(model) != before


def test_what_has_not_changed_is_not_hashed_again(model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    tensor_hash = weights.tensor_hash

    def noted(name: str, tensor: Tensor) -> bytes:
        hashed.append(name)
        return tensor_hash(name, tensor)

    monkeypatch.setattr(weights, "tensor_hash", noted)
    hashes = WeightHashes()
    before = hashes.of_model(model)
    assert {"single.weight", "coarse.weight"} <= set(hashed)
    hashed.clear()
    assert hashes.of_model(model) == before
    assert sorted(hashed) == ["coarse.bias", "norm.bias", "norm.weight", "single.bias"]
    with torch.no_grad():
        model["single"].weight.mul_(1)  # written to, though nothing came of it
    hashed.clear()
    assert hashes.of_model(model) == before
    assert "single.weight" in hashed


def test_weights_that_begin_between_words_or_leave_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hashed anew at every question."""
    monkeypatch.setattr(weights, "_LEAST", 0)
    model, hashes = nn.Linear(2, 2, bias=False), WeightHashes()
    for values in (torch.randn(5)[1:].view(2, 2), torch.randn(2, 4)[:, ::2], torch.randn(2, 0), torch.ones(2, 3)):
        model.weight = nn.Parameter(values)
        assert hashes.of_model(model) == WeightHashes().of_model(model) == hashes.of_model(model)
