"""Evaluation: the statistics against scipy and brute force, retraining against what is known in closed form."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, rows
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from captum_sdi import Exact, SDIInfluence
from captum_sdi.evaluate import (
    Estimate,
    correlation,
    draw_subsets,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_auc,
    recall_at_k,
    removal_effects,
    retrained_losses,
    top_k_overlap,
    two_way_correlation,
)
from captum_sdi.evaluate.correlations import average_ranks
from captum_sdi.evaluate.intervals import mean_estimate

Q, N, T, M = 5, 30, 3, 20


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def tied(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers with many equal ones among them."""
    return rng.integers(0, 8, size=shape) / 8


# Statistics


def test_ranks_are_scipys(rng: np.random.Generator):
    values = tied(rng, Q, N, T)
    np.testing.assert_allclose(average_ranks(torch.as_tensor(values)), stats.rankdata(values, axis=1))


@pytest.mark.parametrize(("kind", "of_scipy"), [("spearman", stats.spearmanr), ("pearson", stats.pearsonr)])
def test_correlations_are_scipys(rng: np.random.Generator, kind: str, of_scipy: Callable[..., Any]):
    scores, truth = tied(rng, Q, N), tied(rng, Q, N)
    expected = np.mean([of_scipy(scores[q], truth[q]).statistic for q in range(Q)])
    # Influences may be tiny: the scale must not matter.
    assert float(correlation(scores * 1e-200, truth, kind=kind)) == pytest.approx(expected, abs=1e-12)


def test_linear_datamodeling_score_by_hand(rng: np.random.Generator):
    scores, losses = rng.normal(size=(Q, N)), tied(rng, Q, M)
    subsets = draw_subsets(N, M).numpy()
    each = []
    for q in range(Q):
        predicted = [scores[q, subset].sum() for subset in subsets]
        each.append(stats.spearmanr(predicted, -losses[q]).statistic)
    estimate = linear_datamodeling_score(scores, subsets, losses)
    assert float(estimate) == pytest.approx(np.mean(each), abs=1e-12)
    assert estimate.n == Q


def test_auc_counts_pairs(rng: np.random.Generator):
    values, flipped = tied(rng, N), rng.random(N) < 0.3
    pairs = [(v > w) + (v == w) / 2 for v, w in itertools.product(values[flipped], values[~flipped])]
    assert float(mislabel_auc(values, flipped)) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_the_top_is_counted(rng: np.random.Generator):
    scores, truth, relevant = tied(rng, Q, N), rng.normal(size=(Q, N)), rng.random((Q, N)) < 0.3
    recalls, overlaps = [], []
    for q in range(Q):
        top = set(sorted(range(N), key=lambda n: -scores[q, n])[:7])  # of equal scores the first
        best = set(sorted(range(N), key=lambda n: -truth[q, n])[:7])
        marked = set(relevant[q].nonzero()[0].tolist())
        recalls.append(len(top & marked) / len(marked))
        overlaps.append(len(top & best) / 7)
    assert float(recall_at_k(scores, relevant, k=7)) == pytest.approx(np.mean(recalls))
    assert float(top_k_overlap(scores, truth, k=7)) == pytest.approx(np.mean(overlaps))


def judges(rng: np.random.Generator) -> dict[str, Callable[[Tensor], Estimate]]:
    truth, relevant = torch.as_tensor(rng.normal(size=(Q, N))), torch.as_tensor(rng.random((Q, N)) < 0.3)
    subsets, losses = draw_subsets(N, M), torch.as_tensor(rng.normal(size=(Q, M)))
    return {
        "correlation": lambda scores: correlation(scores, truth),
        "recall_at_k": lambda scores: recall_at_k(scores, relevant, k=5),
        "top_k_overlap": lambda scores: top_k_overlap(scores, truth, k=5),
        "linear_datamodeling_score": lambda scores: linear_datamodeling_score(scores, subsets, losses),
        "mislabel_auc": lambda scores: mislabel_auc(scores[0], relevant[0]),
    }


@pytest.mark.parametrize("name", judges(np.random.default_rng(0)))
def test_every_step_is_judged_by_itself(rng: np.random.Generator, name: str):
    judge = judges(rng)[name]
    trajectories = torch.as_tensor(rng.normal(size=(Q, N, T)))
    together = judge(trajectories)
    assert together.value.shape == together.low.shape == together.high.shape == (T,)
    for t in range(T):
        alone = judge(trajectories[..., t])
        assert alone.value.shape == ()
        for field in ("value", "low", "high"):
            torch.testing.assert_close(getattr(together, field)[t], getattr(alone, field))
        assert alone.low <= alone.value <= alone.high
    assert str(together).splitlines()[1].startswith(f"step 1: {float(together.value[1]):.3f} [")


@pytest.mark.parametrize("judge", [correlation, lambda *pair: top_k_overlap(*pair, k=4)])
def test_exact_steps_can_be_the_truth(rng: np.random.Generator, judge: Callable[..., Estimate]):
    sketched, exact = rng.normal(size=(2, Q, N, T))
    together = judge(sketched, exact)
    for t in range(T):
        torch.testing.assert_close(together.value[t], judge(sketched[..., t], exact[..., t]).value)


# Intervals


def test_the_bootstrap_is_that_of_a_mean(rng: np.random.Generator, seed: int):
    values = torch.as_tensor(rng.normal(size=(200, 1)))
    estimate = mean_estimate(values, level=0.9, seed=seed)
    error = float(values.std(correction=0)) / math.sqrt(200)
    mean, z = float(values.mean()), stats.norm.ppf(0.95)
    # An end is an empirical quantile of 2,000 resamples: measured, it moves by 0.05 standard errors.
    assert float(estimate.low) == pytest.approx(mean - z * error, abs=0.25 * error)
    assert float(estimate.high) == pytest.approx(mean + z * error, abs=0.25 * error)
    again, other = mean_estimate(values, 0.9, seed), mean_estimate(values, 0.9, seed + 1)
    assert torch.equal(estimate.low, again.low)
    assert not torch.equal(estimate.low, other.low)


def test_the_interval_of_an_auc_covers(rng: np.random.Generator):
    """1,000 data sets with a known area: 95% intervals hold it in 93 to 98% of them."""
    draws, shift = 1000, 1.2
    flipped = np.arange(60) < 15
    values = rng.normal(size=(60, draws)) + shift * flipped[:, None]
    estimate = mislabel_auc(values, flipped)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    covered = float(((estimate.low <= truth) & (truth <= estimate.high)).double().mean())
    assert 0.93 <= covered <= 0.98
    assert float(estimate.value.mean()) == pytest.approx(truth, abs=4 * float(estimate.value.std()) / math.sqrt(draws))


def test_a_perfect_auc_is_not_certain():
    few, many = (mislabel_auc([0.0] * n + [1.0] * n, [False] * n + [True] * n) for n in (3, 100))
    assert float(few) == float(few.high) == float(many) == 1
    assert 0.3 < few.low < 0.7 < 0.95 < many.low < 1
    upside_down = mislabel_auc([1.0] * 3 + [0.0] * 3, [False] * 3 + [True] * 3)
    assert float(upside_down) == 0
    assert float(upside_down.high) == pytest.approx(1 - float(few.low))


def test_one_test_example_has_no_interval():
    estimate = correlation([[1.0, 2.0, 3.0]], [[1.0, 3.0, 2.0]])
    assert float(estimate) == pytest.approx(0.5)
    assert estimate.low.isnan()
    assert estimate.high.isnan()


# Retraining


def test_leave_one_out_of_least_squares(rng: np.random.Generator):
    """The loss without an example, from the hat matrix instead of from fitting again."""
    x, y = torch.as_tensor(rng.normal(size=(12, 3))), torch.as_tensor(rng.normal(size=12))
    test_x, test_y = torch.as_tensor(rng.normal(size=(4, 3))), torch.as_tensor(rng.normal(size=4))

    def losses(beta: Tensor) -> Tensor:
        return (test_x @ beta - test_y).square()

    def retrain(kept: Tensor, seed: int) -> Tensor:
        return losses(torch.linalg.lstsq(x[kept], y[kept]).solution)

    inverse = (x.T @ x).inverse()
    beta = inverse @ x.T @ y
    without = [beta - inverse @ x[i] * (y[i] - x[i] @ beta) / (1 - x[i] @ inverse @ x[i]) for i in (7, 0, 11)]
    expected = torch.stack([losses(other) - losses(beta) for other in without], dim=1)
    torch.testing.assert_close(leave_one_out(retrain, n=12, indices=[7, 0, 11]), expected)
    assert leave_one_out(retrain, n=12).shape == (4, 12)


def test_seeds_are_averaged_and_shared():
    calls = []

    def retrain(kept: Tensor, seed: int) -> Tensor:
        calls.append((kept.tolist(), seed))
        return torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) * len(kept) + 100 * seed  # (q, t)

    effects = removal_effects(retrain, n=4, removed=[torch.tensor([0, 2]), torch.tensor([3])], seeds=(1, 5))
    wanted = -torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(effects, torch.stack([2 * wanted, wanted], dim=1).double())
    assert calls == [(kept, seed) for kept in ([0, 1, 2, 3], [1, 3], [0, 1, 2]) for seed in (1, 5)]
    subsets = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(
        retrained_losses(retrain, subsets, seeds=(1, 5))[0, 0], torch.tensor([302.0, 304.0]).double()
    )


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]):
    def retrain(kept: Tensor, seed: int) -> Tensor:
        return torch.zeros(1)

    leave_one_out(retrain, n=2, seeds=(0, 1))
    assert capsys.readouterr().err == ""
    leave_one_out(retrain, n=2, seeds=(0, 1), show_progress=True)
    assert "6/6" in capsys.readouterr().err


def test_subsets_are_equally_large_and_random(seed: int):
    subsets = draw_subsets(n=40, m=300, fraction=0.25, seed=seed)
    assert subsets.dtype == torch.bool
    assert subsets.sum(1).tolist() == [10] * 300
    assert float((subsets.double().mean(0) - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / 300)
    assert torch.equal(subsets, draw_subsets(n=40, m=300, fraction=0.25, seed=seed))
    assert not torch.equal(subsets, draw_subsets(n=40, m=300, fraction=0.25, seed=seed + 1))


def test_influence_predicts_one_step_of_training():
    """Where training is a single gradient step, TracIn is what removal does: all judges say so, signs included."""
    train, test = rows(12, seed=1), rows(3, seed=2)
    model = CASES[0].model(torch.float64)
    result = SDIInfluence(model, train, sketch=Exact()).step_influence(test)
    core = list(model.core.parameters())
    start = [parameter.detach().clone() for parameter in core]

    def losses(some: list[dict[str, Tensor]]) -> Tensor:
        # Not the model's own loss, which transformers computes in float32.
        logits = [model(input_ids=row["input_ids"][None]).logits[0, :-1] for row in some]
        return torch.stack([F.cross_entropy(x, row["labels"][1:]) for x, row in zip(logits, some, strict=True)])

    gradients = [torch.autograd.grad(losses([row])[0], core) for row in train]

    def retrain(kept: Tensor, seed: int) -> Tensor:
        with torch.no_grad():
            for i, (parameter, before) in enumerate(zip(core, start, strict=True)):
                parameter.copy_(before - 1e-8 * sum(gradients[n][i] for n in kept.tolist()))
            return losses(test)

    effects = leave_one_out(retrain, n=12)
    torch.testing.assert_close(effects, 1e-8 * result.influence_scores, rtol=1e-3, atol=1e-12)
    assert float(correlation(result.influence_scores, effects)) > 0.99
    subsets = draw_subsets(n=12, m=15)
    assert float(linear_datamodeling_score(result.influence_scores, subsets, retrained_losses(retrain, subsets))) > 0.99
    top = result.influence_scores[0].topk(3).indices
    assert removal_effects(retrain, 12, [top])[0, 0] >= leave_one_out(retrain, 12)[0].max()


# Errors

SCORES, TRUTH = torch.arange(6.0).reshape(2, 3), torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
NAN, STEPS = SCORES.clone().fill_(math.nan), torch.stack([torch.zeros(2, 3), SCORES], dim=-1)
HALF = torch.tensor([[True, False, False], [False, True, True]])


def zeros(kept: Tensor, seed: int) -> Tensor:
    return torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: correlation(SCORES[0], TRUTH), r"scores has shape \(3,\); it must be \(q, n\) or \(q, n, t\)"),
        (lambda: correlation(SCORES, TRUTH[:1]), r"truth has shape \(1, 3\); it must be that of scores, \(2, 3\)"),
        (lambda: correlation(SCORES[:0], TRUTH[:0]), r"scores has shape \(0, 3\)"),
        (lambda: correlation(NAN, TRUTH), r"scores has 6 values that are NaN or infinite; leave those examples out"),
        (lambda: correlation(SCORES, TRUTH / 0), r"truth has 6 values that are NaN"),
        (lambda: correlation(STEPS, TRUTH), r"scores: all values of test example 0 at step 0 are equal"),
        (lambda: correlation(SCORES, TRUTH * 0), r"truth: all values of test example 0 are equal"),
        (lambda: correlation(SCORES, TRUTH, kind="kendall"), r"kind='kendall' is unknown; use one of"),
        (lambda: correlation(SCORES, TRUTH, level=95), r"level=95 must be between 0 and 1"),
        (lambda: recall_at_k(SCORES, TRUTH, k=2), r"relevant must be booleans"),
        (lambda: recall_at_k(SCORES, HALF & HALF[:1], k=2), r"relevant marks nothing for test examples \[1\]"),
        (lambda: recall_at_k(SCORES, HALF, k=0), r"k=0 must be an integer from 1 to n = 3"),
        (lambda: top_k_overlap(SCORES, TRUTH, k=4), r"k=4 must be an integer from 1 to n = 3"),
        (lambda: mislabel_auc(SCORES[0], HALF), r"flipped has shape \(2, 3\); it must be booleans \(n,\)"),
        (lambda: mislabel_auc(SCORES[0], HALF[0, :2]), r"flipped has shape \(2,\); it must be booleans .* n = 3"),
        (lambda: mislabel_auc(SCORES[0], [False] * 3), r"flipped marks 0 of 3 examples; some, but not all"),
        (lambda: linear_datamodeling_score(SCORES, HALF[:, :2], TRUTH), r"subsets has shape \(2, 2\)"),
        (lambda: linear_datamodeling_score(SCORES, [[0, 2]], TRUTH), r"subsets has shape \(1, 2\)"),
        (lambda: linear_datamodeling_score(SCORES, HALF, TRUTH), r"losses has shape \(2, 3\); it must be .* \(2, 2\)"),
        (lambda: linear_datamodeling_score(STEPS, HALF, TRUTH[:, :2]), r"predictions from scores: all values of test"),
        (lambda: draw_subsets(n=4, m=2, fraction=0.1), r"fraction=0.1 of n=4 examples keeps 0"),
        (lambda: draw_subsets(n=4, m=0), r"m=0 must be an integer of at least 1"),
        (lambda: retrained_losses(zeros, SCORES), r"subsets is torch.float32 \(2, 3\); it must be torch.bool"),
        (lambda: retrained_losses(zeros, HALF & HALF[:1]), r"subset 1 is empty; keep something"),
        (lambda: retrained_losses(zeros, HALF[:0]), r"subsets is empty; pass at least one"),
        (lambda: correlation(SCORES * 1j, TRUTH), r"scores holds complex numbers"),
        (lambda: retrained_losses(zeros, HALF, seeds=()), r"seeds is empty; pass at least one"),
        (lambda: retrained_losses(lambda kept, seed: 0.5, HALF), r"retrain returned float; it must return a tensor"),
        (lambda: retrained_losses(lambda kept, seed: torch.zeros(()), HALF), r"retrain returned shape \(\)"),
        (lambda: retrained_losses(lambda kept, seed: torch.zeros(len(kept)), HALF), r"shape \(2,\), before \(1,\)"),
        (lambda: retrained_losses(lambda kept, seed: NAN, HALF), r"NaN or infinite: that training run diverged"),
        (
            lambda: removal_effects(zeros, 3, [torch.tensor([3])]),
            r"removed=\[3\] must be positions from 0 to n - 1 = 2",
        ),
        (lambda: removal_effects(zeros, 3, [HALF[0]]), r"removed=\[.*\] must be positions"),  # no mask
        (lambda: removal_effects(zeros, 3, [torch.arange(3)]), r"subset 1 is empty"),
        (lambda: leave_one_out(zeros, 3, indices=[]), r"removed is empty"),
        (lambda: leave_one_out(zeros, 3, indices=[-1]), r"removed=\[-1\] must be positions"),
    ],
)
def test_impossible_arguments(call: Callable[[], object], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_a_seed_is_an_integer() -> None:
    for judge in (correlation, two_way_correlation):
        with pytest.raises(TypeError, match="seed must be an int, got 'a'"):
            judge(SCORES, TRUTH, seed="a")
