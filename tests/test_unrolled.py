"""Influence through training: against plain autograd through all of it, and finite differences of retraining."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import _OUTSIDE, Case, looped_gpt, rows
from reference import PlainAdamW, PlainSGD, PlainTraining, Untying, next_token_loss
from torch import Tensor, nn

from captum_sdi import StepInfluence
from captum_sdi.unrolled import SGD, AdamW, TrainingRun, UnrolledInfluence

N, T, N_LOOPS = 4, 5, 2
TRAIN, TEST = rows(N, seed=1, longest=6), rows(2, seed=2, longest=6)
COUNTS = [int((row["labels"][1:] != -100).sum()) for row in TRAIN]
BATCHES = [[2, 0, 3], [1], [3, 2, 1], [0], [1, 2, 0]]  # several epochs, whose last batches are short
RATES = [0.003 * (0.1 + 0.9 * math.cos(math.pi * k / 2 / T)) for k in range(T)]

OUTSIDE = {name: place for name, place in _OUTSIDE.items() if name not in ("prelude", "coda")}
UNTYING = Untying(loop=("core",), anchors=("core",), n_steps=N_LOOPS, outside=OUTSIDE)
TINY = {"n_prelude": 0, "n_core": 1, "n_coda": 0, "n_loops": N_LOOPS}
CONCAT = Case("concat", looped_gpt(injection="concat", bias=True, **TINY), UNTYING)
TIED = Case("tied", looped_gpt(injection="add", tie_word_embeddings=True, **TINY), UNTYING)


@dataclass(frozen=True)
class Setup:
    """A run, said twice: as the library takes it and as the reference does."""

    name: str
    case: Case
    run: dict[str, Any]
    plain: PlainAdamW | PlainSGD
    shares: Sequence[Sequence[float]]
    free: tuple[str, ...] = ()
    """Ends of the names of parameters without decay."""
    layers: Any = None

    def model(self) -> nn.Module:
        return self.case.model()

    def training(self, start: nn.Module) -> PlainTraining:
        decay = self.run["optimizer"].weight_decay
        pieces = [
            torch.full((parameter.numel(),), 0.0 if name.endswith(self.free) else decay, dtype=torch.float64)
            for name, parameter in start.named_parameters()
        ]

        def loss_of(call: Any, i: int) -> Tensor:
            logits = call(input_ids=TRAIN[i]["input_ids"].unsqueeze(0)).logits[0]
            return next_token_loss(logits, TRAIN[i]["labels"], self.case.causal)

        max_norm = self.run.get("max_grad_norm")
        return PlainTraining(start, loss_of, self.plain, RATES, BATCHES, self.shares, torch.cat(pieces), max_norm)


def by_tokens(batch: list[int]) -> list[float]:
    return [COUNTS[i] / sum(COUNTS[j] for j in batch) for i in batch]


MEAN = [[1 / len(batch)] * len(batch) for batch in BATCHES]
SUM = [[1.0] * len(batch) for batch in BATCHES]
TOKENS = [by_tokens(batch) for batch in BATCHES]
MICRO = [
    [a / len(chunks) for chunk in chunks for a in by_tokens(chunk)]
    for chunks in ([batch[:2], batch[2:]] if len(batch) > 2 else [batch] for batch in BATCHES)
]
ADAMW = AdamW(betas=(0.9, 0.99), weight_decay=0.1, no_decay=("bias", "ln_f.weight"), eps=1e-6)
ADAM = PlainAdamW((0.9, 0.99), 1e-6)
FREE = ("bias", "ln_f.weight")
NESTEROV = SGD(momentum=0.9, nesterov=True, weight_decay=0.1)

SETUPS = [
    Setup("AdamW, clipped, tied", TIED, {"optimizer": ADAMW, "max_grad_norm": 2.0}, ADAM, MEAN, FREE),
    Setup(
        "AdamW, accumulating, over tokens",
        CONCAT,
        {"optimizer": ADAMW, "reduction": "tokens", "micro_batch_size": 2},
        ADAM,
        TOKENS,
        FREE,
        "loop",
    ),
    Setup(
        "SGD with momentum, a mean of means",
        TIED,
        {
            "optimizer": SGD(momentum=0.9, weight_decay=0.1),
            "reduction": "tokens",
            "micro_batch_size": 2,
            "reduced_over": "micro_batch",
        },
        PlainSGD(0.9, nesterov=False),
        MICRO,
    ),
    Setup(
        "Nesterov, a sum, clipped",
        CONCAT,
        {"optimizer": NESTEROV, "reduction": "sum", "max_grad_norm": 1.0},
        PlainSGD(0.9, nesterov=True),
        SUM,
    ),
]


@dataclass(frozen=True)
class Trained:
    """A trained model, and the truth about it."""

    setup: Setup
    start: nn.Module
    model: nn.Module
    run: TrainingRun
    training: PlainTraining
    phi: Tensor
    """``(q, 2 + t, entries)``: the test gradients' bins, of the targeted parameters; zero at others."""
    truth: Tensor
    """``(q, 2 + t, updates, n)``: the derivative in the weight of each example at each update."""

    def unrolled(self, **changes: Any) -> UnrolledInfluence:
        settings = {"layers": self.setup.layers, "check": False, **changes}
        return UnrolledInfluence(self.model, TRAIN, self.run, self.start.state_dict(), **settings)


def with_parameters(model: nn.Module, theta: Tensor) -> nn.Module:
    moved = copy.deepcopy(model)
    sizes = [parameter.numel() for parameter in moved.parameters()]
    with torch.no_grad():
        for parameter, piece in zip(moved.parameters(), theta.split(sizes), strict=True):
            parameter.copy_(piece.view_as(parameter))
    return moved


def seeds(setup: Setup, model: nn.Module) -> Tensor:
    """The reference's step gradients, laid out over all parameters."""
    names = setup.case.names(model, setup.layers)
    gradients = torch.stack([setup.case.gradients(model, row, setup.layers) for row in TEST])
    pieces = dict(zip(names, gradients.split([model.get_parameter(name).numel() for name in names], -1), strict=True))
    absent = gradients.new_zeros(*gradients.shape[:2], 1)
    return torch.cat(
        [pieces.get(name, absent.expand(-1, -1, p.numel())) for name, p in model.named_parameters()], dim=-1
    )


@pytest.fixture(scope="module", params=SETUPS, ids=lambda setup: setup.name)
def trained(request: pytest.FixtureRequest) -> Trained:
    setup = request.param
    start = setup.model()
    training = setup.training(start)
    weights = torch.ones(T, N, dtype=torch.float64, requires_grad=True)
    end = training.end(weights)
    model = with_parameters(start, end.detach())
    phi = seeds(setup, model)
    flat = phi.flatten(0, 1)
    derivatives = [torch.autograd.grad(end, weights, seed, retain_graph=True)[0] for seed in flat]
    truth = torch.stack(derivatives).unflatten(0, phi.shape[:2])
    run = TrainingRun(rates=RATES, batches=BATCHES, **setup.run)
    return Trained(setup, start, model, run, training, phi, truth)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).norm() < tolerance * expected.norm())


def test_totals_steps_and_updates_are_the_derivative_of_training(trained: Trained) -> None:
    unrolled = trained.unrolled()
    found = unrolled.step_influence(TEST)
    expected = -trained.truth.sum(2)  # (q, b, n)
    assert isinstance(found, StepInfluence)
    assert close(found.influence_scores, expected.sum(1))
    assert close(found.trajectories, expected[:, 2:].transpose(1, 2))
    if trained.setup.layers is None:
        assert close(found.prelude, expected[:, 0])
        assert close(found.coda, expected[:, 1])
    assert not found.score_errors.any()
    assert not found.trajectory_errors.any()
    assert close(unrolled.influence(TEST), expected.sum(1))
    updates = unrolled.update_influence(TEST)
    assert updates.shape == (len(TEST), N, T)
    assert close(updates, -trained.truth.sum(1).transpose(1, 2))


@pytest.mark.parametrize("axes", [("update", "step"), ("step", "update"), ("step",)])
def test_a_map_of_updates_and_steps_is_the_derivative_of_training(trained: Trained, axes: tuple[str, ...]) -> None:
    indices = torch.tensor([[3, 0], [0, 2]])
    split = trained.unrolled().influence_map(TEST, indices, axes)
    in_order = [0, *range(2, trained.truth.shape[1]), 1]
    by_example = -trained.truth[:, in_order].permute(0, 3, 2, 1)  # (q, n, updates, b)
    expected = torch.stack([by_example[q, indices[q]] for q in range(len(TEST))])
    if axes == ("step", "update"):
        expected = expected.transpose(2, 3)
    elif axes == ("step",):
        expected = expected.sum(2)
    assert close(split.values, expected)
    assert torch.equal(split.indices, indices)
    assert split.labels["step"] == ("prelude", *range(N_LOOPS), "coda")
    if "update" in axes:
        assert split.sel(update=T - 1).axes == ("step",)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": ("update", "layer")}, "has the axes 'update' and 'step', once each"),
        ({"axes": ("step", "step")}, "once each"),
        ({"indices": [9]}, r"training examples \[9\], which train_dataset does not have"),
        ({"indices": torch.tensor([[0]])}, "indices= has 1 rows for 2 test examples"),
    ],
)
def test_maps_through_training_that_cannot_be(trained: Trained, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trained.unrolled().influence_map(TEST, **{"indices": [0], **changes})


def test_retraining_with_other_weights_ends_where_the_derivative_says(trained: Trained) -> None:
    step, example = 1e-5, 2
    with torch.no_grad():
        change = torch.zeros(T, N, dtype=torch.float64)
        change[:, example] = step
    ends = [trained.training.end(1 + sign * change).detach() for sign in (1, -1)]
    expected = trained.phi @ (ends[0] - ends[1]) / (2 * step)  # (q, b)
    found = trained.unrolled().step_influence(TEST)
    assert close(found.trajectories[:, example], -expected[:, 2:])
    assert close(found.influence_scores[:, example], -expected.sum(1))
