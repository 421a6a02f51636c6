"""Which schedule of transformers a run followed, told from a few of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_MOST_STEPS = 10_000_000
_SAME_RATE = 1e-9

# What is left of the peak rate once a share of the steps after the warm-up is done.
_DECAYS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda done: 1 - done,  # linear
    lambda done: (1 + torch.cos(math.pi * done)) / 2,  # cosine
    torch.ones_like,  # constant
)


def possible_rates(
    after: int,
    known: Mapping[int, float],
    peak: float,
    n_steps: int,
) -> list[float]:
    """List the different rates after a number of steps, by the schedules on which all known rates lie.

    A schedule here is linear, cosine or constant, after any warm-up.

    Args:
        after: The number of steps.
        known: Rates by the number of steps after which they are the schedule's.
        peak: The rate at the end of the warm-up.
        n_steps: Of the whole run.

    Returns:
        The least and the greatest rate if the schedules that fit differ; the one they agree in; none if none fits.
    """
    if not 0 < n_steps <= _MOST_STEPS or peak <= 0:
        return []
    fitting_rates: list[Tensor] = []
    for decay in _DECAYS:
        warmups = torch.arange(n_steps + 1, dtype=torch.float64)
        for steps, rate in known.items():
            deviation = (peak * share_of_peak(steps, warmups, n_steps, decay) - rate).abs()
            warmups = warmups[deviation <= _SAME_RATE * peak]
        fitting_rates.append(peak * share_of_peak(after, warmups, n_steps, decay))
    rates = torch.cat(fitting_rates)
    if not len(rates):
        return []
    lowest, highest = rates.min().item(), rates.max().item()
    return [lowest] if highest - lowest <= _SAME_RATE * peak else [lowest, highest]


def share_of_peak(
    steps: int,
    warmups: Tensor,
    n_steps: int,
    decay: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the share of the peak rate that a schedule has after some steps, for each length of the warm-up."""
    rising = steps / warmups.clamp(min=1)
    progress = (steps - warmups) / (n_steps - warmups).clamp(min=1)
    return torch.where(warmups > steps, rising, decay(progress.clamp(0, 1)))
