"""The seams: a preconditioner, a collector and a contraction written outside the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from index_faults import TEST, TRAIN, checkpoints, influence
from torch import Tensor

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.blocks import Block, ScoredBlock, Source
from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import Columns, Dense, Gradient, StepFeatures
from captum_sdi.passes import Point
from captum_sdi.queries import collect
from captum_sdi.scores.collect import AllPairs, PerCheckpoint
from captum_sdi.scores.contract import Scores, pair_scores
from captum_sdi.study import Question

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # one's gradients are much the larger

RATES = [rate for rate, _ in checkpoints()]


# --- preconditioners ---


@dataclass(frozen=True)
class SecondMoments:
    """P = 1 / (mean g² over the train set + damping), entry by entry of exact rows."""

    damping: float = 0.5
    acts_on = "row"

    def fit(self, point: Point, train: Source) -> Callable[[str, Tensor], Tensor]:
        sums: dict[str, Tensor] = {}
        n = 0
        for block in train.blocks(point):
            n += block.features.size
            for name, row in block.features.rows.items():
                sums[name] = sums.get(name, 0) + row.square().sum((0, 1))
        return lambda name, row: row / (sums[name] / n + self.damping)


@dataclass(frozen=True)
class Weights:
    """P = the diagonal of the checkpoint's weights, before the sketch or behind `Exact`."""

    acts_on: str = "gradient"

    def fit(self, point: Point, train: Source) -> Callable[[str, Any], Any]:
        weights = {name: parameter.detach().clone() for name, parameter in point.capture.targets().items()}

        def gradient(name: str, value: Gradient) -> Gradient:
            return Dense(value.entries(weights[name].shape) * weights[name])

        def row(name: str, value: Tensor) -> Tensor:
            return value * weights[name].flatten()

        return gradient if self.acts_on == "gradient" else row


@dataclass(frozen=True)
class Twice:
    """P = 2."""

    acts_on = "row"

    def fit(self, point: Point, train: Source) -> Callable[[str, Tensor], Tensor]:
        return lambda name, row: 2 * row


def exact_vectors(test: bool, checkpoint: int) -> Tensor:
    """Gradients ``(n, D)`` at one checkpoint, without its rate, by the public method."""
    sdi = influence(None, sketch=Exact(), checkpoints=[checkpoints()[checkpoint]])
    vectors = sdi.compute_intermediate_quantities(TEST if test else TRAIN, test=test)
    return vectors / RATES[checkpoint] ** 0.5


def test_a_preconditioner_is_fitted_on_the_train_set_at_every_checkpoint() -> None:
    expected = torch.zeros(len(TEST), len(TRAIN))
    for checkpoint, rate in enumerate(RATES):
        train, test = exact_vectors(False, checkpoint), exact_vectors(True, checkpoint)
        fisher = train.square().mean(0) + SecondMoments.damping
        expected += rate * test / fisher @ train.T
    sdi = influence(None, sketch=Exact(), preconditioner=SecondMoments())
    torch.testing.assert_close(sdi.influence(TEST), expected, rtol=1e-4, atol=1e-5)
    steps = sdi.step_influence(TEST)
    torch.testing.assert_close(steps.influence_scores, expected, rtol=1e-4, atol=1e-5)
    plain = influence(None, sketch=Exact()).influence(TEST)
    assert (plain - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*of these scores come from:UserWarning")
def test_every_split_of_preconditioned_influence_is_conserved() -> None:
    sdi = influence(None, sketch=Exact(), preconditioner=Weights(), layers="loop")
    steps, matrix = sdi.step_influence(TEST), sdi.step_matrix(TEST)
    torch.testing.assert_close(matrix.sum(2), steps.trajectories, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps.trajectories.sum(-1), steps.influence_scores, rtol=1e-4, atol=1e-5)
    top = sdi.step_influence(TEST, k=4)
    torch.testing.assert_close(top.trajectories, steps.trajectories.gather(1, expanded(top.indices, steps)))
    reranked = sdi.step_influence(TEST, k=4, rerank=9)
    torch.testing.assert_close(reranked.influence_scores, top.influence_scores, rtol=1e-4, atol=1e-5)
    vectors = [sdi.compute_intermediate_quantities(rows, test=test) for rows, test in ((TEST, True), (TRAIN, False))]
    torch.testing.assert_close(vectors[0] @ vectors[1].T, steps.influence_scores, rtol=1e-4, atol=1e-5)
    own = sdi.influence(TRAIN).diagonal()
    torch.testing.assert_close(sdi.self_influence(), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sdi.step_self_influence().influence_scores, own, rtol=1e-4, atol=1e-5)


def expanded(indices: Tensor, steps: Any) -> Tensor:
    return indices.unsqueeze(-1).expand(-1, -1, steps.trajectories.shape[-1])


def test_gradients_and_exact_rows_are_preconditioned_alike() -> None:
    before, behind = (
        influence(None, sketch=Exact(), preconditioner=Weights(where), layers=None) for where in ("gradient", "row")
    )
    torch.testing.assert_close(before.influence(TEST), behind.influence(TEST), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(before.self_influence(), behind.self_influence(), rtol=1e-5, atol=1e-6)


def test_a_preconditioned_gradient_is_sketched_within_its_errors() -> None:
    exact = influence(None, sketch=Exact(), preconditioner=Weights()).step_influence(TEST)
    sketched = influence(None, sketch=TensorSketch(64, seed=2), preconditioner=Weights()).step_influence(TEST)
    z = (sketched.influence_scores - exact.influence_scores) / sketched.score_errors
    assert 0.1 < z.square().mean().sqrt() < 2


def test_an_index_serves_every_preconditioner(tmp_path: Path) -> None:
    influence(tmp_path).build_index()
    plain = influence(tmp_path).step_influence(TEST)
    doubled = influence(tmp_path, preconditioner=Twice())
    torch.testing.assert_close(doubled.step_influence(TEST).trajectories, 2 * plain.trajectories)
    torch.testing.assert_close(doubled.step_influence(TEST).score_errors, 2 * plain.score_errors)
    top, doubled_top = (asked.influence(TEST, k=5) for asked in (influence(tmp_path), doubled))
    torch.testing.assert_close(doubled_top.influence_scores, 2 * top.influence_scores)
    torch.testing.assert_close(doubled.self_influence(), 2 * influence(tmp_path).self_influence())
    live, read = (influence(path, preconditioner=Weights()).influence(TEST) for path in (None, tmp_path))
    torch.testing.assert_close(live, read)


def test_what_is_no_preconditioner_is_refused() -> None:
    with pytest.raises(TypeError, match="preconditioner= must have acts_on and fit"):
        influence(None, preconditioner="adam")


# --- collectors and contractions ---


def question(sdi: SDIInfluence) -> Question:
    side = Side("test", sdi.study().train.side.loss_fn, None)
    loader = influence(None, train_dataset=TEST).train_dataloader
    return Question(sdi.study(), Examples(Stream(loader, "inputs"), side))


class Extremes:
    """The largest total of each test example at one checkpoint at a time: no sum over checkpoints at all."""

    def __init__(self) -> None:
        self._largest: dict[str, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        largest = block.scores.values[..., Columns.TOTAL].amax(1)
        earlier = self._largest.get(block.checkpoint.name, largest)
        self._largest[block.checkpoint.name] = torch.maximum(earlier, largest)

    def result(self) -> dict[str, Tensor]:
        return self._largest


@pytest.mark.parametrize("indexed", [False, True])
def test_a_collector_of_the_users_own(tmp_path: Path, indexed: bool) -> None:
    sdi = influence(tmp_path if indexed else None)
    extremes, apart, together = Extremes(), PerCheckpoint(), AllPairs()
    with question(sdi).scored_blocks("look for extremes", by_step=True) as blocks:
        for block in blocks:
            for collector in (extremes, apart, together):
                collector.add(block)
    values = {name: sums.scores.values for name, sums in apart.result().items()}
    assert len(values) == len(RATES)
    torch.testing.assert_close(sum(values.values()), together.result().scores.values)
    for name, largest in extremes.result().items():
        assert torch.equal(largest, values[name][..., Columns.TOTAL].amax(1))


def test_scores_of_each_parameter_alone() -> None:
    def each_parameter(test: StepFeatures, train: StepFeatures) -> Scores:
        parts = [pair_scores(test.only([name]), train.only([name])) for name in test.rows]
        return Scores(torch.stack([p.values for p in parts], -1), torch.stack([p.variances for p in parts], -1))

    sdi, parts = influence(None), AllPairs()
    with question(sdi).scored_blocks("tell parameters apart", by_step=True, contract=each_parameter) as blocks:
        collect(blocks, parts)
    scores, whole = parts.result().scores, sdi.step_influence(TEST)
    torch.testing.assert_close(scores.values[..., Columns.TOTAL, :].sum(-1), whole.influence_scores)
    torch.testing.assert_close(scores.variances[..., Columns.TOTAL, :].sum(-1).sqrt(), whole.score_errors)
    assert scores.values.shape[-1] == len(target_names(sdi))


def target_names(sdi: SDIInfluence) -> list[str]:
    with sdi.study().points() as points:
        return list(next(points).capture.targets())


# --- what a pass leaves behind ---


def interrupted(asked: Question) -> None:
    with asked.scored_blocks("stop", by_step=True) as blocks:
        for block in blocks:
            if block.checkpoint.number == 1:
                raise KeyboardInterrupt


def test_a_pass_that_is_broken_off_leaves_no_hook_and_the_weights_as_they_were() -> None:
    sdi = influence(None)
    before = {name: value.clone() for name, value in sdi.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        interrupted(question(sdi))
    assert all(torch.equal(value, before[name]) for name, value in sdi.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sdi.model.modules())
    assert all(parameter.requires_grad for parameter in sdi.model.parameters())


def test_blocks_have_the_same_number_at_every_checkpoint() -> None:
    sdi = influence(None)
    seen: dict[str, list[tuple[int, list[int]]]] = {}
    with sdi.study().points() as points:
        for point in points:
            blocks: list[Block] = list(point.blocks(sdi.study().train, by_step=False))
            seen[point.checkpoint.name] = [(block.number, block.positions.tolist()) for block in blocks]
    first, second = seen.values()
    assert first == second
    assert [position for _, positions in first for position in positions] == list(range(len(TRAIN)))
