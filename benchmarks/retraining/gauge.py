"""When can a derivative be believed? The same run twice, and metasmoothness.

Training with example weights 1, 1 + h v and 1 + 2 h v leads to theta_0, theta_1, theta_2. Where the end depends
smoothly on the weights, every parameter moves the same way twice (Engstrom et al., arXiv 2503.13751):

    metasmoothness = sum |theta_2 - theta_0| sign(theta_1 - theta_0) sign(theta_2 - theta_1) / sum |theta_2 - theta_0|
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retraining.beds import Bed
from retraining.training import train

STEP = 0.05
NEAR_ZERO = 1e-6
"""Of the largest root second moment: below it float32 gradients are little but rounding."""


def gauge(bed: Bed) -> dict[str, Any]:
    """Train four times and report what can be said before any score."""
    generator = torch.Generator().manual_seed(31)
    direction = torch.randn(bed.n, generator=generator)
    weights = torch.stack([1 + factor * STEP * direction for factor in range(3)])
    one_by_one = replace(bed, stack=1)
    runs = [train(one_by_one, weight[None]) for weight in weights]
    again = train(one_by_one, weights[:1])
    roots = runs[0].second_moment[0].sqrt()
    return {
        "second run is bit-identical": torch.equal(runs[0].weights, again.weights),
        "metasmoothness": metasmoothness(*(run.weights[0].double() for run in runs)),
        "parameters with second moments near zero": float((roots < NEAR_ZERO * roots.max()).double().mean()),
    }


def metasmoothness(first: Tensor, second: Tensor, third: Tensor) -> float:
    """Return how much of the way from the first weights to the third goes one way, 1 at best."""
    distance = (third - first).abs()
    same_way = (second - first).sign() * (third - second).sign()
    return float((distance * same_way).sum() / distance.sum())
