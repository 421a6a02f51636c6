"""A value with its confidence interval, and where the intervals of means come from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.evaluate.arguments import generator_of

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval: scalars for totals, ``(t,)`` for loop steps.

    Example:
        >>> print(Estimate(torch.tensor(0.81), torch.tensor(0.7), torch.tensor(0.9), n=40))
        0.810 [0.700, 0.900], n = 40
    """

    value: Tensor
    """``()`` or ``(t,)``."""
    low: Tensor
    """Lower end of the interval, as ``value``; NaN with one example, which leaves nothing to resample."""
    high: Tensor
    """Upper end of the interval, as ``low``."""
    n: int
    """Number of examples it rests on, those that the bootstrap resamples, or those that were ranked."""

    def __str__(self) -> str:
        """Return one line, or one line for each step."""
        if self.value.ndim == 0:
            interval = f"[{self.low:.3f}, {self.high:.3f}]"
            return f"{self.value:.3f} {interval}, n = {self.n}"
        lines = []
        for t, value in enumerate(self.value):
            estimate = Estimate(value, self.low[t], self.high[t], self.n)
            lines.append(f"step {t}: {estimate}")
        return "\n".join(lines)

    def __float__(self) -> float:
        """Return the value of a total."""
        return float(self.value)


def mean_estimate(values: Tensor, level: float, seed: int) -> Estimate:
    """Return the mean of ``(q,)`` or ``(q, t)`` over test examples, with its bootstrap interval.

    Returns:
        The mean over ``q``. With one test example there is nothing to resample: the interval is NaN.
    """
    check_level(level)
    q = len(values)
    if q == 1:
        unknown = torch.full_like(values[0], torch.nan)
        return Estimate(values[0], unknown, unknown, n=1)
    generator = generator_of(seed)
    drawn = torch.randint(q, (RESAMPLES, q), generator=generator)
    # Weights rather than gathered rows: (resamples, q) is all the memory it takes, whatever the number of steps.
    weights = torch.zeros(RESAMPLES, q, dtype=values.dtype)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    means = weights @ values / q
    lower_tail = (1 - level) / 2
    upper_tail = (1 + level) / 2
    tails = torch.tensor([lower_tail, upper_tail], dtype=values.dtype)
    low, high = means.quantile(tails, dim=0)
    return Estimate(values.mean(0), low, high, n=q)


def check_level(level: float) -> None:
    """Check that a level is a share between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must be between 0 and 1, such as 0.95.")
