"""Does self-influence find mislabelled examples?"""

from statistics import NormalDist

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.evaluate.agreement import average_ranks
from captum_sdi.evaluate.estimate import LEVEL, Estimate, as_numbers, check_level


def mislabel_auc(self_influence: ArrayLike | Tensor, flipped: ArrayLike | Tensor, level: float = LEVEL) -> Estimate:
    """The probability that a mislabelled example has a higher self-influence than a well labelled one.

    This area under the ROC curve is the Mann-Whitney statistic (Hanley & McNeil, Radiology 143, 1982), equal values
    counting one half; to find mislabelled examples so is TracIn's idea (Pruthi et al., arXiv 2002.08484). The interval
    holds all areas that lie within z standard errors, *their own*, of the measured one (Newcombe, Statistics in
    Medicine 25, 2006, method 5): it stays between 0 and 1 and has a width even when all mislabelled ones come first.

    Args:
        self_influence: ``(n,)``, or ``(n, t)`` to judge every step.
        flipped: ``(n,)`` booleans: which labels are wrong.
        level: Share of cases that the interval covers.

    Returns:
        0.5 for random scores, 1 when all mislabelled examples come first.

    Raises:
        ValueError: Shapes do not fit, a value is NaN, or no label, or every label, is flipped.

    Example:
        >>> print(mislabel_auc([0.1, 0.9, 0.3, 0.2], flipped=[False, True, True, False]))
        1.000 [0.386, 1.000], n = 4
    """
    check_level(level)
    values = as_numbers("self_influence", self_influence, "(n,) or (n, t)", (1, 2))
    wrong = as_numbers("flipped", flipped, "booleans (n,)", (1,))
    if wrong.shape != values.shape[:1] or not ((wrong == 0) | (wrong == 1)).all():
        raise ValueError(f"flipped has shape {tuple(wrong.shape)}; it must be booleans (n,) with n = {len(values)}.")
    n_wrong = int(wrong.sum())
    n_right = len(values) - n_wrong
    if not n_wrong or not n_right:
        raise ValueError(f"flipped marks {n_wrong} of {len(values)} examples; some, but not all, must be.")
    ranks = average_ranks(values.unsqueeze(0)).squeeze(0)
    u = ranks[wrong.bool()].sum(0) - n_wrong * (n_wrong + 1) / 2
    area = u / (n_wrong * n_right)
    z = NormalDist().inv_cdf((1 + level) / 2)
    low = _end(area, n_wrong, n_right, z, towards=0.0)
    return Estimate(area, low, _end(area, n_wrong, n_right, z, towards=1.0), n=len(values))


def _end(area: Tensor, n_wrong: int, n_right: int, z: float, towards: float) -> Tensor:
    """The area furthest in a direction from which the measured one is within z of that area's standard errors."""
    inside, outside = area.clone(), torch.full_like(area, towards)
    for _ in range(60):  # bisection down to rounding
        middle = (inside + outside) / 2
        within = (area - middle).abs() <= z * _variance(middle, n_wrong, n_right).sqrt()
        inside, outside = torch.where(within, middle, inside), torch.where(within, outside, middle)
    return inside


def _variance(area: Tensor, n_wrong: int, n_right: int) -> Tensor:
    """Hanley & McNeil's variance for exponential scores, both counts in its numerator replaced by their mean."""
    mean = (n_wrong + n_right) / 2 - 1
    return area * (1 - area) * (1 + mean * (1 - area) / (2 - area) + mean * area / (1 + area)) / (n_wrong * n_right)
