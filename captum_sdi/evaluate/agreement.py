"""Do scores agree with a truth: in rank, and at the top?"""

import torch
from torch import Tensor

from captum_sdi.evaluate.arguments import Numbers, are_flags, as_pair
from captum_sdi.evaluate.correlations import check_kind, row_correlations, unit_deviations
from captum_sdi.evaluate.intervals import LEVEL, Estimate, mean_estimate


def correlation(
    scores: Numbers,
    truth: Numbers,
    kind: str = "spearman",
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Measure how well scores order the training examples as a truth does.

    The truth is what `leave_one_out` measured (Koh & Liang, arXiv 1703.04730), or exact scores for sketched ones.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        truth: ``(q, n)``, or as ``scores``: then each step has its own truth.
        kind: "spearman" compares ranks (of equal values the average rank), "pearson" the values.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap over test examples.

    Returns:
        The mean over test examples of the correlation over training examples.

    Raises:
        ValueError: If shapes differ, a value is NaN, or a test example's values are all equal, so that they have no
            order.

    Example:
        >>> round(float(correlation([[0.1, 0.2, 0.9]], [[1.0, 5.0, 7.0]])), 12)
        1.0
    """
    check_kind(kind)
    predicted, expected = as_pair(scores, truth, "truth")
    ranks = kind == "spearman"
    first = unit_deviations("scores", predicted, ranks=ranks)
    second = unit_deviations("truth", expected, ranks=ranks)
    return mean_estimate(row_correlations(first, second), level, seed)


def recall_at_k(
    scores: Numbers,
    relevant: Numbers,
    k: int,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Measure the share of the relevant training examples that is among the k highest scores.

    It cannot reach 1 where more than ``k`` examples are relevant (Manning et al., Introduction to Information
    Retrieval, 2008, chapter 8).

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        relevant: ``(q, n)`` booleans: which training examples should be found for which test example.
        k: Number of highest scores that count; of equal scores, the first ones.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap over test examples.

    Returns:
        The mean over test examples.

    Raises:
        ValueError: If shapes differ, a score is NaN, ``k`` is impossible, or nothing is relevant for a test example.

    Example:
        >>> float(recall_at_k([[0.9, 0.5, 0.1]], [[True, False, True]], k=2))
        0.5
    """
    predicted, wanted = as_pair(scores, relevant, "relevant")
    if not are_flags(wanted):
        raise ValueError("relevant must be booleans (q, n): True where a training example should be found.")
    n_relevant = wanted.sum(1)
    unmatched = (n_relevant == 0).nonzero()[:, 0]
    if len(unmatched):
        tests = unmatched.unique().tolist()
        raise ValueError(f"relevant marks nothing for test examples {tests}; leave them out.")
    hits = _mark_highest(predicted, k) * wanted
    recall = hits.sum(1) / n_relevant
    return mean_estimate(recall, level, seed)


def top_k_overlap(
    scores: Numbers,
    truth: Numbers,
    k: int,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Measure the share of the k highest scores that are also the k highest of the truth.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        truth: ``(q, n)``, or as ``scores``: then each step has its own truth.
        k: Number of highest values on either side; of equal values, the first ones.
        level: Share of cases that the interval covers.
        seed: Seeds the bootstrap over test examples.

    Returns:
        The mean over test examples; ``k / n`` is what random scores reach.

    Raises:
        ValueError: If shapes differ, a value is NaN, or ``k`` is impossible.

    Example:
        >>> float(top_k_overlap([[0.9, 0.5, 0.1]], [[3.0, 1.0, 2.0]], k=2))
        0.5
    """
    predicted, expected = as_pair(scores, truth, "truth")
    shared = _mark_highest(predicted, k) * _mark_highest(expected, k)
    overlap = shared.sum(1) / k
    return mean_estimate(overlap, level, seed)


def _mark_highest(values: Tensor, k: int) -> Tensor:
    """Return 1 at the k highest values along the second axis, else 0."""
    n = values.shape[1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise ValueError(f"k={k!r} must be an integer from 1 to n = {n}.")
    order = values.sort(dim=1, descending=True, stable=True).indices
    marks = torch.zeros_like(values)
    return marks.scatter_(1, order[:, :k], 1.0)
