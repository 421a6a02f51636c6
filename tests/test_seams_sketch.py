"""The seam for another sketch: one written outside the package works wherever `TensorSketch` does.

Statements about random numbers are checked over draws (seeds of the sketch) and allow four *measured* standard errors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import N_LOOPS, looped_gpt, rows
from reference import spread
from torch import Tensor, nn

from captum_sdi import Exact, SDIInfluence, SketchIndex, TensorSketch
from captum_sdi.features import Gradient, Noise
from captum_sdi.sketch import Projection, Sketch

DIM = 64
N_DRAWS = 40
TRAIN = rows(4, seed=1)
TEST = rows(2, seed=2)


# --- a sketch written outside the package -------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Projects the entries of a gradient on ``dim`` random directions (Johnson & Lindenstrauss 1984)."""

    dim: int = DIM
    seed: int = 0
    pool: bool = False

    def projection(self, name: str, parameter: Tensor, checkpoint: str = "") -> Projection:
        digest = hashlib.sha256(f"{self.seed} {name} {checkpoint}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        directions = torch.randn(parameter.numel(), self.dim, generator=generator) / self.dim**0.5
        return GaussianProjection(directions, parameter)


class GaussianProjection:
    dtype = torch.float32

    def __init__(self, directions: Tensor, parameter: Tensor) -> None:
        self.width = directions.shape[1]
        self.noise = Noise(1 / self.width)  # exactly: Var⟨Pg, Pφ⟩ = (‖g‖²‖φ‖² + ⟨g,φ⟩²) / d
        self.device = parameter.device
        self._shape = parameter.shape
        self._directions = directions.to(parameter.device)

    def __call__(self, gradient: Gradient) -> Tensor:
        entries = gradient.entries(self._shape).flatten(1)
        return entries.to(self.dtype) @ self._directions

    def checksum(self) -> bytes:
        return self._directions.cpu().numpy().tobytes()


def influence_with(sketch: Sketch, index: Path | None = None) -> SDIInfluence:
    """`SDIInfluence` on a looped GPT with matrices and vectors, and nothing outside of the loop."""
    model = spread(looped_gpt(n_prelude=0, n_coda=0, n_core=1, bias=True)())
    return SDIInfluence(model, TRAIN, loop="core", batch_size=4, sketch=sketch, index=index)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Up to rounding in float32, relative to the largest entry."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --- it works -----------------------------------------------------------------------------------------------------


def test_it_is_a_sketch() -> None:
    assert isinstance(Gaussian(), Sketch)


@pytest.mark.parametrize("pool", [False, True])
def test_influence_is_unbiased_and_the_reported_errors_are_the_measured_ones(pool: bool, seed: int) -> None:
    exact = influence_with(Exact()).step_influence(TEST)
    truth = torch.cat([exact.influence_scores.unsqueeze(-1), exact.trajectories], dim=-1)
    estimates, variances = [], []
    for draw in range(seed * N_DRAWS, (seed + 1) * N_DRAWS):
        result = influence_with(Gaussian(seed=draw, pool=pool)).step_influence(TEST)
        estimates.append(torch.cat([result.influence_scores.unsqueeze(-1), result.trajectories], dim=-1))
        errors = torch.cat([result.score_errors.unsqueeze(-1), result.trajectory_errors], dim=-1)
        variances.append(errors.square())
    sketched = torch.stack(estimates).double()
    assert sketched.shape == (N_DRAWS, len(TEST), len(TRAIN), 1 + N_LOOPS)

    deviations = sketched - truth
    standard_error = deviations.std(0) / N_DRAWS**0.5
    assert (deviations.mean(0).abs() <= 4 * standard_error).all()

    # The error bar is computed from sketched norms: on average it is the true variance times a factor between 1 + 1/d
    # and 1 + 2/d. All pairs of a draw share its hashes, so draws count, not pairs.
    squares = deviations.square().flatten(1).sum(1)
    reported = torch.stack(variances).double().flatten(1).sum(1)
    least = reported - (1 + 1 / DIM) * squares
    most = reported - (1 + 2 / DIM) * squares
    assert least.mean() + 4 * least.std() / N_DRAWS**0.5 >= 0
    assert most.mean() - 4 * most.std() / N_DRAWS**0.5 <= 0


def test_every_question_has_the_same_answer() -> None:
    sdi = influence_with(Gaussian())
    totals = sdi.step_influence(TEST).influence_scores
    assert_same(sdi.influence(TEST), totals)
    top = sdi.influence(TEST, k=2)
    assert_same(top.influence_scores, totals.gather(1, top.indices))
    train, test = sdi.compute_intermediate_quantities(TRAIN), sdi.compute_intermediate_quantities(TEST, test=True)
    assert_same(test @ train.T, totals)


@pytest.mark.parametrize("pool", [False, True])
def test_an_index_keeps_its_rows(tmp_path: Path, pool: bool) -> None:
    live = influence_with(Gaussian(pool=pool)).step_influence(TEST)
    folder = tmp_path / "index"
    for _ in ("written", "read"):
        stored = influence_with(Gaussian(pool=pool), folder).step_influence(TEST)
        assert_same(stored.influence_scores, live.influence_scores)
        assert_same(stored.trajectories, live.trajectories)
        assert_same(stored.trajectory_errors, live.trajectory_errors)
    assert f"Gaussian(dim={DIM}, seed=0, pool={pool})" in str(SketchIndex.open(folder))
    with pytest.raises(ValueError, match="sketch seed: 0 in the index, 1 here"):
        influence_with(Gaussian(seed=1, pool=pool), folder).step_influence(TEST)


# --- what is no sketch is refused ---------------------------------------------------------------------------------


class NoProjection:
    pool = False


class NoDataclass:
    """An index could not say what its rows are."""

    pool = False
    projection = Gaussian.projection


@pytest.mark.parametrize(
    "value", [2048, None, "TensorSketch", nn.Linear(2, 2), NoProjection(), NoDataclass(), Exact, TensorSketch]
)
def test_what_is_no_sketch_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"sketch= must be TensorSketch\(\.\.\.\) or Exact\(\), got "):
        influence_with(value)  # type: ignore[arg-type]
