"""The two-way bootstrap: intervals over test examples *and* what was left out, and paired differences of methods.

An agreement between predicted and measured effects ``(q, m)`` rests on q test examples and on m retrained models. Both
are a sample: with the same models and other tests it would come out differently, and with the same tests and other
examples left out, too. Each resample therefore draws tests and models at once, as in the pigeonhole bootstrap (Owen,
The Annals of Applied Statistics 1, 2007).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from captum_sdi.evaluate.arguments import Numbers, as_pair, generator_of
from captum_sdi.evaluate.correlations import check_kind, row_correlations, unit_deviations
from captum_sdi.evaluate.intervals import LEVEL, RESAMPLES, Estimate, check_level


def two_way_correlation(
    scores: Numbers,
    truth: Numbers,
    kind: str = "spearman",
    level: float = LEVEL,
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
    pool_steps: bool = False,
) -> Estimate:
    """Measure how well predicted effects order measured ones, with an interval over tests and effects.

    The value is that of `correlation`; the interval is wider. For the linear datamodeling score pass
    ``predicted_outputs(scores, subsets)`` and minus the losses.

    Args:
        scores: ``(q, m)`` predicted effects, or ``(q, m, t)`` to judge every step.
        truth: ``(q, m)`` measured effects, or as ``scores``.
        kind: "spearman" compares ranks (of equal values the average rank), "pearson" the values.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap.
        resamples: How often tests and effects are drawn.
        pool_steps: Correlate over effects and steps together, as for `deviation_from_step_mean`; an effect's steps
            are drawn together.

    Returns:
        The mean over test examples of the correlation over effects; ``n`` counts test examples.

    Raises:
        ValueError: If shapes differ, a value is NaN, or a test example's values are all equal.

    Example:
        >>> round(float(two_way_correlation([[0.1, 0.2, 0.9]], [[1.0, 5.0, 7.0]])), 12)
        1.0
    """
    check_kind(kind)
    check_level(level)
    predicted, measured = as_pair(scores, truth, "truth")
    ranks = kind == "spearman"
    drawn = draw_resamples(predicted, resamples, seed)
    if pool_steps:
        predicted, measured, drawn = pooled(predicted, measured, drawn)
    values = mean_correlations("scores", predicted, measured, ranks=ranks)
    resampled = resampled_correlations(predicted, measured, drawn, ranks=ranks)
    return estimate_of(values, resampled, level, n=len(predicted))


def paired_difference(
    scores: Numbers,
    other_scores: Numbers,
    truth: Numbers,
    kind: str = "spearman",
    level: float = LEVEL,
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
    pool_steps: bool = False,
) -> Estimate:
    """Measure by how much scores agree better with a truth than other scores do.

    Both are judged on the same draws of tests and effects: what makes a draw hard for both cancels, so the interval is
    far narrower than those of both agreements. One that holds 0 shows no difference.

    Args:
        scores: ``(q, m)`` predicted effects, or ``(q, m, t)`` to judge every step.
        other_scores: As ``scores``.
        truth: ``(q, m)`` measured effects, or as ``scores``.
        kind: "spearman" or "pearson", as in `correlation`.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap.
        resamples: How often tests and effects are drawn.
        pool_steps: Correlate over effects and steps together, as in `two_way_correlation`.

    Returns:
        The correlation of ``scores`` minus that of ``other_scores``: positive where ``scores`` are better.

    Raises:
        ValueError: If shapes differ, a value is NaN, or a test example's values are all equal.

    Example:
        >>> truth = [[1.0, 2.0, 3.0, 4.0]]
        >>> round(float(paired_difference([[1.0, 2.0, 3.0, 4.0]], [[4.0, 3.0, 2.0, 1.0]], truth)), 12)
        2.0
    """
    check_kind(kind)
    check_level(level)
    first, measured = as_pair(scores, truth, "truth")
    second, _ = as_pair(other_scores, truth, "truth")
    if first.shape != second.shape:
        raise ValueError(
            f"other_scores has shape {tuple(second.shape)}; it must be that of scores, {tuple(first.shape)}."
        )
    ranks = kind == "spearman"
    drawn = draw_resamples(first, resamples, seed)
    if pool_steps:
        second, _, _ = pooled(second, measured, drawn)
        first, measured, drawn = pooled(first, measured, drawn)
    values = mean_correlations("scores", first, measured, ranks=ranks)
    other_values = mean_correlations("other_scores", second, measured, ranks=ranks)
    resampled = resampled_correlations(first, measured, drawn, ranks=ranks)
    other_resampled = resampled_correlations(second, measured, drawn, ranks=ranks)
    return estimate_of(values - other_values, resampled - other_resampled, level, n=len(first))


class Resamples(NamedTuple):
    """How often each resample draws each test example and each effect."""

    tests: Tensor
    """``(resamples, q)``, float64."""
    effects: Tensor
    """``(resamples, m)``, float64."""


def draw_resamples(effects: Tensor, resamples: int, seed: int) -> Resamples:
    """Draw tests and effects of a table ``(q, m, ...)`` with replacement."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples!r} must be at least 1; take some hundreds.")
    q, m, *_ = effects.shape
    generator = generator_of(seed)
    tests = _draw_counts(q, resamples, generator)
    return Resamples(tests, _draw_counts(m, resamples, generator))


def pooled(
    scores: Tensor,
    truth: Tensor,
    drawn: Resamples,
) -> tuple[Tensor, Tensor, Resamples]:
    """Return tables ``(q, m, t)`` as ``(q, m t)``, and their draws; an effect's steps stay together."""
    if scores.ndim == 2:
        return scores, truth, drawn
    n_steps = scores.shape[2]
    effects = drawn.effects.repeat_interleave(n_steps, dim=1)
    return scores.flatten(1), truth.flatten(1), Resamples(drawn.tests, effects)


def mean_correlations(
    name: str,
    scores: Tensor,
    truth: Tensor,
    *,
    ranks: bool,
) -> Tensor:
    """Return the mean over test examples of the correlations, ``()`` or ``(t,)``."""
    first = unit_deviations(name, scores, ranks=ranks)
    second = unit_deviations("truth", truth, ranks=ranks)
    return row_correlations(first, second).mean(0)


def resampled_correlations(
    scores: Tensor,
    truth: Tensor,
    drawn: Resamples,
    *,
    ranks: bool,
) -> Tensor:
    """Return the mean correlation in each resample, ``(resamples,)`` or ``(resamples, t)``.

    A test example whose drawn effects are all equal has no correlation in that resample and is left out of its mean.
    """
    tests = []
    for first, second in zip(scores, truth, strict=True):
        by_step = zip(rows_of_steps(first), rows_of_steps(second), strict=True)
        correlations = [weighted_correlations(*rows, drawn.effects, ranks=ranks) for rows in by_step]
        tests.append(torch.stack(correlations, dim=-1))
    of_tests = torch.stack(tests, dim=1)  # (resamples, q, t)
    is_defined = ~of_tests.isnan()
    weights = drawn.tests[..., None] * is_defined
    means = (weights * of_tests.nan_to_num()).sum(1) / weights.sum(1)
    return means if scores.ndim == 3 else means[:, 0]


def rows_of_steps(effects: Tensor) -> Tensor:
    """Return one test example's effects ``(m,)`` or ``(m, t)`` as ``(t, m)``."""
    return effects.reshape(len(effects), -1).T.contiguous()


def weighted_correlations(
    first: Tensor,
    second: Tensor,
    counts: Tensor,
    *,
    ranks: bool,
) -> Tensor:
    """Return the correlation ``(resamples,)`` of two rows ``(m,)`` whose entries are drawn ``counts`` times."""
    if ranks:
        first = resampled_ranks(first, counts)
        second = resampled_ranks(second, counts)
    size = counts.sum(1, keepdim=True)
    first_deviations = first - (counts * first).sum(1, keepdim=True) / size
    second_deviations = second - (counts * second).sum(1, keepdim=True) / size
    covariance = (counts * first_deviations * second_deviations).sum(1)
    first_variance = (counts * first_deviations.square()).sum(1)
    second_variance = (counts * second_deviations.square()).sum(1)
    return covariance / (first_variance.sqrt() * second_variance.sqrt())


def resampled_ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Return the average ranks ``(resamples, m)`` of values ``(m,)`` among those drawn.

    Example:
        >>> resampled_ranks(torch.tensor([30.0, 10.0, 20.0]), torch.tensor([[1.0, 2.0, 0.0]]))
        tensor([[3.0000, 1.5000, 2.5000]])
    """
    in_order, order = values.sort()
    n_below = torch.searchsorted(in_order, values)
    n_up_to = torch.searchsorted(in_order, values, right=True)
    none_drawn = torch.zeros_like(counts[:, :1])
    drawn_so_far = torch.cat([none_drawn, counts[:, order].cumsum(1)], dim=1)
    return (drawn_so_far[:, n_below] + 1 + drawn_so_far[:, n_up_to]) / 2


def estimate_of(
    values: Tensor,
    resampled: Tensor,
    level: float,
    n: int,
) -> Estimate:
    """Return values ``()`` or ``(t,)`` with the interval of their resamples."""
    lower, upper = (1 - level) / 2, (1 + level) / 2
    tails = torch.tensor([lower, upper], dtype=resampled.dtype)
    low, high = resampled.nanquantile(tails, dim=0)
    return Estimate(values, low, high, n=n)


def _draw_counts(size: int, resamples: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(size, (resamples, size), generator=generator)
    counts = torch.zeros(resamples, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))
