"""Do scores agree with a truth: in rank, and at the top?"""

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.evaluate.estimate import LEVEL, Estimate, as_numbers, mean_estimate

KINDS = ("spearman", "pearson")
SCORES = "(q, n) or (q, n, t)"


def correlation(
    scores: ArrayLike | Tensor,
    truth: ArrayLike | Tensor,
    kind: str = "spearman",
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """How well scores order the training examples as a truth does, for the mean test example.

    The truth is what `leave_one_out` measured (Koh & Liang, arXiv 1703.04730), or exact scores for sketched ones.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        truth: ``(q, n)``, or as ``scores``: then each step has its own truth.
        kind: "spearman" compares ranks (of equal values the average rank), "pearson" the values.
        level: Share of cases that the interval covers.
        seed: Of the bootstrap over test examples.

    Returns:
        The mean over test examples of the correlation over training examples.

    Raises:
        ValueError: Shapes differ, a value is NaN, or a test example's values are all equal, so that nothing is ordered.

    Example:
        >>> float(correlation([[0.1, 0.2, 0.9]], [[1.0, 5.0, 7.0]]))
        1.0
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {KINDS}.")
    found, wanted = _pair(scores, truth, "truth")
    return mean_estimate(row_correlations(("scores", found), ("truth", wanted), ranks=kind == "spearman"), level, seed)


def recall_at_k(
    scores: ArrayLike | Tensor, relevant: ArrayLike | Tensor, k: int, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The share of the relevant training examples that is among the k highest scores, for the mean test example.

    It cannot reach 1 where more than ``k`` examples are relevant (Manning et al., Introduction to Information
    Retrieval, 2008, chapter 8).

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        relevant: ``(q, n)`` booleans: which training examples should be found for which test example.
        k: How many of the highest scores count; of equal scores the first.
        level: Share of cases that the interval covers.
        seed: Of the bootstrap over test examples.

    Returns:
        The mean over test examples.

    Raises:
        ValueError: Shapes differ, a score is NaN, ``k`` is impossible, or nothing is relevant for a test example.

    Example:
        >>> float(recall_at_k([[0.9, 0.5, 0.1]], [[True, False, True]], k=2))
        0.5
    """
    found, wanted = _pair(scores, relevant, "relevant")
    if not ((wanted == 0) | (wanted == 1)).all():
        raise ValueError("relevant must be booleans (q, n): True where a training example should be found.")
    if not wanted.any(1).all():
        nothing = (~wanted.any(1)).nonzero()[:, 0].unique().tolist()
        raise ValueError(f"relevant marks nothing for test examples {nothing}; leave them out.")
    hits = (_top(found, k) * wanted).sum(1)
    return mean_estimate(hits / wanted.sum(1), level, seed)


def top_k_overlap(
    scores: ArrayLike | Tensor, truth: ArrayLike | Tensor, k: int, level: float = LEVEL, seed: int = 0
) -> Estimate:
    """The share of the k highest scores that are also the k highest of the truth, for the mean test example.

    Args:
        scores: ``(q, n)``, or ``(q, n, t)`` to judge every step.
        truth: ``(q, n)``, or as ``scores``: then each step has its own truth.
        k: How many; of equal values the first.
        level: Share of cases that the interval covers.
        seed: Of the bootstrap over test examples.

    Returns:
        The mean over test examples; ``k / n`` is what random scores reach.

    Raises:
        ValueError: Shapes differ, a value is NaN, or ``k`` is impossible.

    Example:
        >>> float(top_k_overlap([[0.9, 0.5, 0.1]], [[3.0, 1.0, 2.0]], k=2))
        0.5
    """
    found, wanted = _pair(scores, truth, "truth")
    return mean_estimate((_top(found, k) * _top(wanted, k)).sum(1) / k, level, seed)


def row_correlations(first: tuple[str, Tensor], second: tuple[str, Tensor], ranks: bool) -> Tensor:
    """Correlations along the second axis of named ``(q, m, ...)`` tensors: ``(q, ...)``.

    Args:
        first: Argument name and values.
        second: As ``first``, of the same shape.
        ranks: Spearman's: Pearson's correlation of ranks.

    Returns:
        One correlation for each test example, and step.

    Raises:
        ValueError: The values of a test example are all equal.
    """
    deviations = []
    for name, values in (first, second):
        constant = (values == values[:, :1]).all(1).nonzero()
        if len(constant):
            q, *step = constant[0].tolist()
            at = f"test example {q}" + (f" at step {step[0]}" if step else "")
            raise ValueError(f"{name}: all values of {at} are equal: no correlation is defined; leave it out.")
        values = average_ranks(values) if ranks else values
        values = values - values.mean(1, keepdim=True)
        # Scaled first: squares of tiny influences would be lost.
        values = values / values.abs().amax(1, keepdim=True)
        deviations.append(values / values.square().sum(1, keepdim=True).sqrt())
    return (deviations[0] * deviations[1]).sum(1).clamp(-1, 1)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the second axis of ``(q, m, ...)``, equal values sharing the average of theirs.

    Args:
        values: ``(q, m, ...)``.

    Returns:
        As ``values``, float64.

    Example:
        >>> average_ranks(torch.tensor([[30.0, 10.0, 30.0]]))
        tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    rows = values.movedim(1, -1).contiguous()
    ordered = rows.sort(-1).values
    below = torch.searchsorted(ordered, rows)
    up_to = torch.searchsorted(ordered, rows, right=True)
    return ((below + 1 + up_to).double() / 2).movedim(-1, 1)


def _pair(scores: ArrayLike | Tensor, truth: ArrayLike | Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Scores and truth as tensors of one shape; a truth of totals is that of every step."""
    found = as_numbers("scores", scores, SCORES, (2, 3))
    wanted = as_numbers(name, truth, SCORES, (2, 3))
    if wanted.shape not in (found.shape, found.shape[:2]):
        raise ValueError(
            f"{name} has shape {tuple(wanted.shape)}; it must be that of scores, {tuple(found.shape)}, "
            f"or {tuple(found.shape[:2])}."
        )
    return found, wanted if wanted.ndim == found.ndim else wanted[..., None].expand_as(found)


def _top(values: Tensor, k: int) -> Tensor:
    """1 at the k highest along the second axis, else 0."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= values.shape[1]:
        raise ValueError(f"k={k!r} must be an integer from 1 to n = {values.shape[1]}.")
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values).scatter_(1, order, 1.0)
