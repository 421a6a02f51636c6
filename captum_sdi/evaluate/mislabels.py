"""Does self-influence find mislabelled examples?"""

from statistics import NormalDist

import torch
from torch import Tensor

from captum_sdi.evaluate.arguments import Numbers, are_flags, as_numbers
from captum_sdi.evaluate.correlations import average_ranks
from captum_sdi.evaluate.intervals import LEVEL, Estimate, check_level


def mislabel_auc(
    self_influence: Numbers,
    flipped: Numbers,
    level: float = LEVEL,
) -> Estimate:
    """Estimate how often a mislabelled example has more self-influence than a well labelled one.

    This area under the ROC curve is the Mann-Whitney statistic (Hanley & McNeil, Radiology 143, 1982), with equal
    values counting one half; finding mislabelled examples this way is TracIn's idea (Pruthi et al., arXiv 2002.08484).
    The interval holds all areas that lie within z standard errors, *their own*, of the measured one (Newcombe,
    Statistics in Medicine 25, 2006, method 5): it stays between 0 and 1 and has a width even when all mislabelled
    examples come first.

    Args:
        self_influence: ``(n,)``, or ``(n, t)`` to judge every step.
        flipped: ``(n,)`` booleans: which labels are wrong.
        level: Share of cases that the interval covers.

    Returns:
        0.5 for random scores, 1 when all mislabelled examples come first.

    Raises:
        ValueError: If shapes do not fit, a value is NaN, or no label, or every label, is flipped.

    Example:
        >>> print(mislabel_auc([0.1, 0.9, 0.3, 0.2], flipped=[False, True, True, False]))
        1.000 [0.386, 1.000], n = 4
    """
    check_level(level)
    values = as_numbers("self_influence", self_influence, "(n,) or (n, t)", (1, 2))
    flags = as_numbers("flipped", flipped, "booleans (n,)", (1,))
    n = len(values)
    if len(flags) != n or not are_flags(flags):
        raise ValueError(f"flipped has shape {tuple(flags.shape)}; it must be booleans (n,) with n = {n}.")
    n_wrong = int(flags.sum())
    n_right = n - n_wrong
    if not n_wrong or not n_right:
        raise ValueError(f"flipped marks {n_wrong} of {n} examples; some, but not all, must be.")
    ranks = average_ranks(values.unsqueeze(0)).squeeze(0)
    rank_sum = ranks[flags.bool()].sum(0)
    u = rank_sum - n_wrong * (n_wrong + 1) / 2
    area = u / (n_wrong * n_right)
    z = NormalDist().inv_cdf((1 + level) / 2)
    low = _interval_end(area, n_wrong, n_right, z, limit=0.0)
    high = _interval_end(area, n_wrong, n_right, z, limit=1.0)
    return Estimate(area, low, high, n=n)


def _interval_end(
    area: Tensor,
    n_wrong: int,
    n_right: int,
    z: float,
    limit: float,
) -> Tensor:
    """Return the area nearest to ``limit`` whose own z standard errors reach the measured one."""
    inside = area.clone()
    outside = torch.full_like(area, limit)
    for _ in range(60):  # bisection down to rounding
        middle = (inside + outside) / 2
        margin = z * _variance(middle, n_wrong, n_right).sqrt()
        plausible = (area - middle).abs() <= margin
        inside = torch.where(plausible, middle, inside)
        outside = torch.where(plausible, outside, middle)
    return inside


def _variance(area: Tensor, n_wrong: int, n_right: int) -> Tensor:
    """Return Hanley & McNeil's variance, with the mean of both counts in its numerator."""
    n_others = (n_wrong + n_right) / 2 - 1
    miss = 1 - area
    # Of exponential scores: pairs of comparisons that share the right example, and those that share the wrong one.
    two_wrong = n_others * miss / (2 - area)
    two_right = n_others * area / (1 + area)
    return area * miss * (1 + two_wrong + two_right) / (n_wrong * n_right)
