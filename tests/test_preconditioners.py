"""Preconditioners against dense linear algebra on explicit gradients, in float64 and exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, looped_gpt, rows
from reference import Truth, Untying, damped_fisher_inverse, damped_hessian_inverse, next_token_loss, truth
from safetensors import safe_open
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.preconditioners import Adam, Fisher, Hessian, Preconditioner

TRAIN, TEST = rows(7, seed=1), rows(3, seed=2)
RATES = (0.5, 0.25)
DAMPING = 0.1
OUTSIDE = {"wte": "prelude", "wpe": "prelude", "ln_f": "coda", "lm_head": "coda"}
CASE = Case(
    "tiny",
    looped_gpt(n_embd=4, n_head=1, n_prelude=0, n_core=1, n_coda=0, injection="add", bias=True),
    Untying(loop=("core",), anchors=("core",), n_steps=3, outside=OUTSIDE),
)
MODEL = CASE.model()
SIZES = {name: parameter.numel() for name, parameter in MODEL.named_parameters()}
N_PARAMETERS = sum(SIZES.values())


def weights(number: int) -> dict[str, Tensor]:
    """The weights of one of two checkpoints."""
    generator = torch.Generator().manual_seed(number)
    state = {}
    for name, tensor in MODEL.state_dict().items():
        state[name] = tensor + 0.05 * number * torch.randn(tensor.shape, generator=generator).to(tensor)
    return state


def load(model: nn.Module, number: int) -> float:
    model.load_state_dict(weights(number))
    return RATES[number]


def squares(number: int) -> dict[str, Tensor]:
    """Second moments that an Adam could have at one of two checkpoints."""
    generator = torch.Generator().manual_seed(10 + number)
    moments = {}
    for name, parameter in MODEL.named_parameters():
        moments[name] = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.01
    return moments


def model_at(number: int) -> nn.Module:
    model = CASE.model()
    load(model, number)
    return model


@dataclass(frozen=True)
class Gradients:
    """Bins ``(2 + t, entries)`` of every example at one checkpoint."""

    train: list[Tensor]
    test: list[Tensor]

    @property
    def whole(self) -> Tensor:
        """The train examples' gradients ``(n, entries)``."""
        return torch.stack([gradient.sum(0) for gradient in self.train])


@pytest.fixture(scope="module")
def gradients() -> list[Gradients]:
    made = []
    for number in range(len(RATES)):
        model = model_at(number)
        train, test = ([CASE.gradients(model, row, None) for row in part] for part in (TRAIN, TEST))
        made.append(Gradients(train, test))
    return made


def mean_loss(model: nn.Module) -> Tensor:
    losses = []
    for row in TRAIN:
        logits = model(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
        losses.append(next_token_loss(logits, row["labels"]))
    return torch.stack(losses).mean()


@pytest.fixture(scope="module")
def hessian_inverse() -> Tensor:
    return damped_hessian_inverse(model_at(1), mean_loss, list(SIZES), DAMPING)


Weighed = list[tuple[float, Tensor, Gradients]]
"""For each checkpoint that counts: its weight, P as a matrix, the gradients."""


@pytest.fixture(params=["fisher", "adam", "hessian"])
def method(request: pytest.FixtureRequest, gradients: list[Gradients]) -> tuple[Preconditioner, Weighed]:
    """A preconditioner, and what it stands for."""
    sizes, n = list(SIZES.values()), len(TRAIN)
    if request.param == "fisher":
        blocks = [damped_fisher_inverse(each.whole, sizes, DAMPING) / n for each in gradients]
        return Fisher(DAMPING), [(0.5, block, each) for block, each in zip(blocks, gradients, strict=True)]
    if request.param == "adam":
        moments = [torch.cat([square.flatten() for square in squares(number).values()]) for number in range(2)]
        diagonals = [torch.diag(1 / (moment.sqrt() + 1e-3)) for moment in moments]
        return Adam(squares, eps=1e-3), list(zip(RATES, diagonals, gradients, strict=True))
    inverse = request.getfixturevalue("hessian_inverse")
    return Hessian(rank=N_PARAMETERS, damping=DAMPING), [(1.0, inverse / n, gradients[1])]


def expected(weighed: Weighed) -> Truth:
    """Every split of ⟨g, P φ⟩ from the definitions; what it says of examples themselves is another thing's."""
    parts = []
    for weight, matrix, each in weighed:
        parts.append((weight, each.train, [bins @ matrix for bins in each.test]))
    return truth(parts)


def influence(preconditioner: Preconditioner | None, **changes: Any) -> SDIInfluence:
    settings: dict[str, Any] = {
        "model": CASE.model(),
        "train_dataset": TRAIN,
        "checkpoints": [0, 1],
        "checkpoints_load_func": load,
        "layers": None,
        "batch_size": 4,
        "sketch": Exact(),
        "preconditioner": preconditioner,
        **changes,
    }
    return SDIInfluence(**settings)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8 * float(theirs.abs().max()))


# --- every split is that of dense matrices ------------------------------------------------------------------------


def test_every_question_is_answered_by_the_dense_matrix(method: tuple[Preconditioner, Weighed], tmp_path: Path) -> None:
    preconditioner, weighed = method
    wanted = expected(weighed)
    sdi = influence(preconditioner)
    assert_close(sdi.influence(TEST), wanted.totals)
    steps = sdi.step_influence(TEST)
    assert_close(steps.trajectories, wanted.trajectories)
    assert_close(steps.prelude, wanted.prelude)
    assert_close(steps.coda, wanted.coda)
    assert_close(steps.trajectories.sum(-1) + steps.prelude + steps.coda, steps.influence_scores)
    assert_close(sdi.step_matrix(TEST), wanted.matrix)

    order = wanted.totals.argsort(dim=1, descending=True)[:, :3]
    for top in (sdi.step_influence(TEST, k=3), sdi.step_influence(TEST, k=3, rerank=5)):
        assert torch.equal(top.indices, order)
        assert_close(top.influence_scores, wanted.totals.gather(1, order))
        assert_close(top.trajectories, wanted.trajectories.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)))
    vectors = sdi.compute_intermediate_quantities(TEST, test=True), sdi.compute_intermediate_quantities(TRAIN)
    assert_close(vectors[0] @ vectors[1].T, wanted.totals)

    own = sum(weight * ((each.whole @ matrix) * each.whole).sum(1) for weight, matrix, each in weighed)
    assert_close(sdi.self_influence(), own)
    assert_close(sdi.step_self_influence().influence_scores, own)
    assert_close(sdi.influence(TEST, aggregate=True), wanted.totals.sum(0, keepdim=True))

    indexed = influence(preconditioner, index=tmp_path)
    assert_close(indexed.step_influence(TEST).trajectories, wanted.trajectories)
    assert torch.equal(indexed.influence(TEST, k=3).indices, order)
    assert_close(indexed.self_influence(), own)
    assert_close(indexed.step_matrix(TEST), wanted.matrix)
