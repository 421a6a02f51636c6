"""Newer questions about models as strangers write them: maps, tokens, preconditioners, checkpointing of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import damped_fisher_inverse, spread
from test_faults_capture import ROWS, Base, D, OuroReplica, assert_exact, per_example, sdi
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_sdi import LoopSpec, SDIInfluence, TensorSketch
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.preconditioners import Fisher

EVERY = list(range(len(ROWS)))


def map_totals(influence: SDIInfluence, *axes: str) -> Tensor:
    """The map of all pairs, summed over its axes: ``(q, n)``."""
    return influence.influence_map(ROWS, EVERY, axes).values.nan_to_num().flatten(2).sum(2)


class UsedBeside(nn.Module):
    """Calls a layer, and uses its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(F.linear(torch.tanh(self.fc(h)), self.fc.weight.T))


@pytest.mark.parametrize("axes", [("layer", "step"), ("token", "train_token"), ("train_position",)], ids=str)
def test_b3_maps_hold_what_is_used_beside_the_calls(axes: tuple[str, ...]) -> None:
    model = spread(Base(UsedBeside()).double())
    influence = sdi(model, layers=None)
    assert torch.allclose(map_totals(influence, *axes), influence.influence(ROWS))


def test_b1_tokens_of_models_that_answer_otherwise_with_labels() -> None:
    model = spread(OuroReplica().double())
    settings: dict[str, Any] = {"layers": None, "loop": LoopSpec(("core", "gate"), ("core",))}
    influence = sdi(model, **settings)
    expected = influence.influence(ROWS)
    assert torch.allclose(map_totals(influence, "token", "train_token"), expected)
    by_token = influence.step_influence(ROWS, per="token")
    summed = torch.zeros_like(expected).index_add(0, by_token.token_of[:, 0], by_token.influence_scores)
    assert torch.allclose(summed, expected)


class KeyBias(nn.Module):
    """Attention whose softmax cancels the bias of its keys: a gradient of rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), is_causal=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_fisher_does_not_blow_rounding_errors_up(dtype: torch.dtype, tolerance: float) -> None:
    model = spread(Base(KeyBias())).to(dtype)
    names = [name for name, _ in model.named_parameters() if name != "core.key.bias"]
    gradients = per_example(model, names, TokenCrossEntropy()).double()
    sizes = [model.get_parameter(name).numel() for name in names]
    expected = gradients @ damped_fisher_inverse(gradients, sizes, 0.1) @ gradients.T / len(ROWS)
    scores = sdi(model, layers=None, preconditioner=Fisher(damping=0.1)).influence(ROWS)
    assert (scores - expected).abs().max() <= tolerance * expected.abs().max()


class Checkpoints(nn.Module):
    """Recomputes a part of its own, which uses a parameter beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(D, D), nn.Parameter(torch.ones(D))

    def part(self, h: Tensor) -> Tensor:
        return torch.tanh(self.fc(h)) * self.scale

    def forward(self, h: Tensor) -> Tensor:
        return h + checkpoint(self.part, h, use_reentrant=False)


@pytest.mark.parametrize("layers", [None, "loop"])
def test_b3_a_module_that_checkpoints_a_part_of_its_own_is_exact(layers: Any) -> None:
    assert_exact(spread(Base(Checkpoints()).double()), layers)


def test_e11_winners_by_sketch_are_overstated_and_rerank_mends_them() -> None:
    model = spread(Base(nn.Sequential(nn.Linear(D, D), nn.Tanh())).double())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (60, 5), generator=generator)
    many = [{"input_ids": row, "labels": row} for row in ids]
    exact = sdi(model, many).influence(many[:8])
    sketched = sdi(model, many, sketch=TensorSketch(dim=16, pool=True))
    winners = sketched.influence(many[:8], k=5)
    stated, true = winners.influence_scores, exact.gather(1, winners.indices)
    assert stated.mean() > true.mean()
    mended = sketched.influence(many[:8], k=5, rerank=60)
    assert torch.allclose(mended.influence_scores, exact.topk(5).values)
    assert "rerank" in str(SDIInfluence.step_influence.__doc__)
