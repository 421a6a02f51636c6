"""Two-way intervals against brute force and against their coverage; the shape of trajectories."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from captum_sdi.evaluate import (
    correlation,
    deviation_from_step_mean,
    draw_subsets,
    linear_datamodeling_score,
    paired_difference,
    predicted_outputs,
    two_way_correlation,
)
from captum_sdi.evaluate.two_way import draw_resamples, pooled, resampled_correlations

Q, M, T = 4, 9, 3
OF_SCIPY = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def tied(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.as_tensor(rng.integers(0, 8, size=shape) / 8)


def by_repetition(scores: Tensor, truth: Tensor, kind: str, tests: Tensor, effects: Tensor) -> float:
    """The mean correlation of a resample, its tests and effects written out as often as they are drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, where drawn effects are all equal: that test does not count
        drawn = torch.arange(scores.shape[1]).repeat_interleave(effects.long())
        each = [OF_SCIPY[kind](scores[q, drawn], truth[q, drawn]).statistic for q in range(len(scores))]
    repeated = np.repeat(each, tests.long().numpy())
    return float(np.nanmean(repeated))


@pytest.mark.parametrize("kind", OF_SCIPY)
def test_resamples_are_those_of_repeated_rows(rng: np.random.Generator, kind: str, seed: int) -> None:
    scores, truth = tied(rng, Q, M, T), tied(rng, Q, M, T)
    drawn = draw_resamples(scores, 20, seed)
    assert drawn.tests.sum(1).tolist() == [Q] * 20
    assert drawn.effects.sum(1).tolist() == [M] * 20
    resampled = resampled_correlations(scores, truth, drawn, ranks=kind == "spearman")
    for draw, (tests, effects) in enumerate(zip(*drawn, strict=True)):
        for t in range(T):
            expected = by_repetition(scores[..., t], truth[..., t], kind, tests, effects)
            assert float(resampled[draw, t]) == pytest.approx(expected, abs=1e-12)


def test_pooled_steps_are_drawn_together(rng: np.random.Generator, seed: int) -> None:
    scores, truth = tied(rng, Q, M, T), tied(rng, Q, M, T)
    drawn = draw_resamples(scores, 10, seed)
    resampled = resampled_correlations(*pooled(scores, truth, drawn), ranks=True)
    for draw, (tests, effects) in enumerate(zip(*drawn, strict=True)):
        steps_of_effects = effects.repeat_interleave(T)
        expected = by_repetition(scores.flatten(1), truth.flatten(1), "spearman", tests, steps_of_effects)
        assert float(resampled[draw]) == pytest.approx(expected, abs=1e-12)
    pooled_value = two_way_correlation(scores, truth, pool_steps=True, resamples=50)
    assert float(pooled_value) == pytest.approx(float(correlation(scores.flatten(1), truth.flatten(1))))


def test_the_value_is_that_of_correlation(rng: np.random.Generator) -> None:
    scores, truth = tied(rng, Q, M, T), tied(rng, Q, M)
    estimate = two_way_correlation(scores, truth, resamples=200)
    torch.testing.assert_close(estimate.value, correlation(scores, truth).value)
    assert (estimate.low < estimate.value).all()
    assert (estimate.value < estimate.high).all()
    assert estimate.n == Q


def test_predicted_outputs_lead_to_the_linear_datamodeling_score(rng: np.random.Generator) -> None:
    scores, subsets, losses = rng.normal(size=(Q, 30)), draw_subsets(30, M), rng.normal(size=(Q, M))
    estimate = two_way_correlation(predicted_outputs(scores, subsets), -losses, resamples=10)
    assert float(estimate) == pytest.approx(float(linear_datamodeling_score(scores, subsets, losses)))


def one_study(rng: np.random.Generator, q: int, m: int) -> tuple[Tensor, Tensor]:
    """Predicted and measured effects that share what an example does to all tests, true or not."""
    truth = rng.normal(size=(q, m))
    luck = rng.normal(size=(1, m)) * rng.normal(size=(q, 1))
    return torch.as_tensor(truth + luck + rng.normal(size=(q, m))), torch.as_tensor(truth)


def test_two_way_intervals_cover(rng: np.random.Generator) -> None:
    """Of many studies, 90% intervals hold the value of an endless one in most; one-way intervals miss it more often."""
    studies, true = 120, float(correlation(*one_study(rng, 60, 400), kind="pearson"))
    held = {"two-way": 0, "one-way": 0}
    for _ in range(studies):
        pair = one_study(rng, 6, 12)
        two = two_way_correlation(*pair, kind="pearson", level=0.9, resamples=200)
        one = correlation(*pair, kind="pearson", level=0.9)
        held["two-way"] += float(two.low) <= true <= float(two.high)
        held["one-way"] += float(one.low) <= true <= float(one.high)
    error = math.sqrt(0.9 * 0.1 / studies)
    assert held["two-way"] / studies > 0.9 - 4 * error
    assert held["two-way"] > held["one-way"]


def test_a_paired_difference_is_one_of_agreements(rng: np.random.Generator) -> None:
    truth = torch.as_tensor(rng.normal(size=(Q, 30)))
    better, worse = (truth + noise * torch.as_tensor(rng.normal(size=truth.shape)) for noise in (0.5, 1.5))
    difference = paired_difference(better, worse, truth, resamples=400)
    expected = float(correlation(better, truth)) - float(correlation(worse, truth))
    assert float(difference) == pytest.approx(expected)
    assert difference.low <= difference.value <= difference.high
    opposite = paired_difference(worse, better, truth, resamples=400)
    torch.testing.assert_close(opposite.low, -difference.high)
    same = paired_difference(better, 3 * better, truth, resamples=50)
    assert float(same.low) == float(same) == float(same.high) == 0
    # On the same draws: narrower than two intervals put side by side.
    alone = two_way_correlation(better, truth, resamples=400)
    nearly = paired_difference(better, better + 0.01 * worse, truth, resamples=400)
    assert nearly.high - nearly.low < (alone.high - alone.low) / 3


def test_few_effects_may_be_drawn_all_equal() -> None:
    """Two effects: in half of the draws one of them comes twice, and there is no correlation."""
    estimate = two_way_correlation([[1.0, 2.0], [2.0, 1.0]], [[1.0, 2.0], [1.0, 2.0]], resamples=100)
    assert [float(estimate), float(estimate.low), float(estimate.high)] == pytest.approx([0, -1, 1])


def test_deviations_forget_totals(rng: np.random.Generator) -> None:
    trajectories = rng.normal(size=(Q, M, T))
    deviations = deviation_from_step_mean(trajectories)
    np.testing.assert_allclose(deviations, trajectories - trajectories.mean(2)[..., None])
    more = trajectories + rng.normal(size=(Q, M, 1))
    torch.testing.assert_close(deviation_from_step_mean(more), deviations)


PAIR = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: two_way_correlation(PAIR, PAIR[:, :2]), r"truth has shape \(2, 2\); it must be that of scores"),
        (lambda: two_way_correlation(PAIR, PAIR, kind="kendall"), r"kind='kendall' is unknown"),
        (lambda: two_way_correlation(PAIR, PAIR, level=95), r"level=95 must be between 0 and 1"),
        (lambda: two_way_correlation(PAIR, PAIR, resamples=0), r"resamples=0 must be at least 1"),
        (lambda: two_way_correlation(PAIR * 0, PAIR), r"scores: all values of test example 0 are equal"),
        (lambda: paired_difference(PAIR, PAIR * 0, PAIR), r"other_scores: all values of test example 0 are equal"),
        (lambda: paired_difference(PAIR[..., None], PAIR, PAIR), r"other_scores has shape \(2, 3\); it must be that"),
        (lambda: predicted_outputs(PAIR, [[True, False]]), r"subsets has shape \(1, 2\)"),
        (lambda: deviation_from_step_mean(PAIR), r"trajectories has shape \(2, 3\); it must be \(q, n, t\)"),
        (lambda: deviation_from_step_mean(PAIR[..., None]), r"trajectories has one loop step"),
    ],
)
def test_impossible_arguments(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
