"""A value with its confidence interval, and where the intervals of means come from."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval: scalars for totals, ``(t,)`` for the steps of trajectories.

    Example:
        >>> print(Estimate(torch.tensor(0.81), torch.tensor(0.7), torch.tensor(0.9), n=40))
        0.810 [0.700, 0.900], n = 40
    """

    value: Tensor
    """``()`` or ``(t,)``."""
    low: Tensor
    """As ``value``: where the interval begins; NaN where one example cannot tell."""
    high: Tensor
    """As ``value``: where it ends."""
    n: int
    """How many examples it rests on: those that the bootstrap resamples, or those that were ranked."""

    def __str__(self) -> str:
        """One line, or one line for each step."""
        rows = zip(self.value.reshape(-1), self.low.reshape(-1), self.high.reshape(-1), strict=True)
        lines = [f"{value:.3f} [{low:.3f}, {high:.3f}], n = {self.n}" for value, low, high in rows]
        return lines[0] if self.value.ndim == 0 else "\n".join(f"step {t}: {line}" for t, line in enumerate(lines))

    def __float__(self) -> float:
        """The value of a total."""
        return float(self.value)


def mean_estimate(values: Tensor, level: float, seed: int) -> Estimate:
    """The mean over test examples, with the percentile interval of its bootstrap.

    Args:
        values: ``(q,)`` or ``(q, t)``.
        level: Share of cases that the interval should cover.
        seed: Of the resampling.

    Returns:
        The mean over ``q``. With one test example there is nothing to resample: the interval is NaN.

    Raises:
        ValueError: ``level`` is no share.
    """
    check_level(level)
    q = len(values)
    if q == 1:
        unknown = torch.full_like(values[0], torch.nan)
        return Estimate(values[0], unknown, unknown, n=1)
    generator = torch.Generator().manual_seed(seed)
    # Weights rather than gathered rows: (resamples, q) is all the memory it takes, whatever the number of steps.
    drawn = torch.randint(q, (RESAMPLES, q), generator=generator)
    weights = torch.zeros(RESAMPLES, q, dtype=values.dtype).scatter_add_(
        1, drawn, torch.ones((), dtype=values.dtype).expand_as(drawn)
    )
    means = weights @ values / q
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = means.quantile(tails, dim=0)
    return Estimate(values.mean(0), low, high, n=q)


def check_level(level: float) -> None:
    """Raise ValueError unless the level is a share."""
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must be between 0 and 1, such as 0.95.")


def as_numbers(name: str, values: ArrayLike | Tensor, shape: str, ndims: tuple[int, ...]) -> Tensor:
    """Return what a caller passed as a float64 tensor on the CPU.

    Args:
        name: The argument.
        values: What was passed.
        shape: The shapes it may have, in words.
        ndims: How many axes that is.

    Returns:
        The numbers.

    Raises:
        ValueError: The number of axes is another one, one of them is empty, or a number is NaN or infinite.
    """
    plain = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    numbers = plain.to("cpu", torch.float64)
    if numbers.ndim not in ndims or 0 in numbers.shape:
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; it must be {shape}.")
    if wrong := int((~numbers.isfinite()).sum()):
        raise ValueError(f"{name} has {wrong} values that are NaN or infinite; leave those examples out.")
    return numbers
