"""Contractions of step features into influence, its standard errors, and `StepInfluence`, the result.

With g the step-summed features of a training example and φ_t those of a test example at loop step t, a trajectory
point is SDI_t = ⟨g, φ_t⟩. Sketched features carry their own error bar (Pham & Pagh 2013, section 4; measured in
``tests/test_errors.py``): with one row of features per parameter l,

    Var[⟨g, φ⟩] = Σ_l noise_l · (‖g_l‖² ‖φ_l‖² + ⟨g_l, φ_l⟩²)

where ``noise_l`` is 1/d for a sketched parameter and 0 for one that is kept exactly. A row in m parts counts as m
parameters of d/m numbers each: gradients that lie in one part have m times the variance of those spread over all. Steps
share their hashes, so the variance of a sum over steps is this formula at the summed φ; checkpoints do not, so their
variances add (with η²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.features import Bins, StepFeatures


@dataclass(frozen=True)
class Scores:
    """Influence at one checkpoint, before its learning rate, split by the test side's bins.

    The first bin is the total; the others, where the test side was split, are those of `StepFeatures`.
    """

    values: Tensor
    """``(..., b)``."""
    variances: Tensor
    """``(..., b)`` the sketch's variance of each value."""


def with_total(features: StepFeatures) -> StepFeatures:
    """Puts the sum of all bins in front of them: a total and its variance come from the summed φ.

    Args:
        features: ``(q, b, width)`` per parameter.

    Returns:
        ``(q, 1 + b, width)`` per parameter; unchanged when there is one bin, which is the total already.
    """
    return features.map(lambda row: row if row.shape[1] == 1 else torch.cat([row.sum(1, keepdim=True), row], dim=1))


def pair_scores(test: StepFeatures, train: StepFeatures) -> Scores:
    """Influence of every training example on every test example.

    Args:
        test: ``(q, b, width)`` per parameter, from `with_total`.
        train: ``(n, 1, width)`` per parameter, summed over bins.

    Returns:
        Values and variances ``(q, n, b)``.
    """
    with _full_precision(test):
        return _contract("qb", "n", test, train)


def self_scores(features: StepFeatures) -> Scores:
    """Influence of every example on itself, split by the step at which it acts as a test example.

    Args:
        features: ``(n, b, width)`` per parameter.

    Returns:
        Values and variances ``(n, 1 + b)``, or ``(n, 1)`` when there is one bin.
    """
    with _full_precision(features):
        return _contract("nb", "n", with_total(features), features.summed())


def step_matrices(test: StepFeatures, train: StepFeatures) -> Tensor:
    """Influence of every training step on every test step: ``SDI_{s,t} = ⟨φ_s(z), φ_t(z')⟩``.

    Args:
        test: ``(q, 2 + t, width)`` per parameter.
        train: ``(n, 2 + s, width)`` per parameter.

    Returns:
        ``(q, n, s, t)`` over loop steps, prelude and coda left out.
    """
    with _full_precision(test):
        products = [
            torch.einsum("qtw,nsw->qnst", Bins.steps(phi), Bins.steps(train.rows[name]))
            for name, phi in test.rows.items()
        ]
    return _sum_on(products[0].device, products)


def _contract(test_axes: str, train_axes: str, test: StepFeatures, train: StepFeatures) -> Scores:
    """The module's formula; ``l`` runs over the parts of parameters whose rows can be stacked."""
    out = "nb" if test_axes == "nb" else "qnb"
    values, variances = [], []
    for names in _alike(test):
        noise = test.noise[names[0]]
        phi, g = (torch.stack([side.rows[name] for name in names], dim=-2) for side in (test, train))
        phi, g = (row.unflatten(-1, (noise.parts, -1)).flatten(-3, -2) for row in (phi, g.squeeze(1)))
        inner = torch.einsum(f"{test_axes}lw,{train_axes}lw->l{out}", phi, g)
        values.append(inner.sum(0))
        if noise.variance == 0:
            variances.append(torch.zeros_like(values[-1]))
            continue
        norms = torch.einsum(f"{test_axes}l,{train_axes}l->{out}", phi.square().sum(-1), g.square().sum(-1))
        variances.append(noise.variance * (norms + inner.square().sum(0)))
    device = values[0].device
    return Scores(_sum_on(device, values), _sum_on(device, variances))


def _full_precision(features: StepFeatures) -> torch.autocast:
    """Inside the user's autocast, too: it would contract features in half precision."""
    return torch.autocast(next(iter(features.rows.values())).device.type, enabled=False)


def _alike(features: StepFeatures) -> list[list[str]]:
    """Parameters with equally wide and equally noisy rows on one device, to be contracted together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, row in features.rows.items():
        groups.setdefault((features.noise[name], row.shape[-1], row.dtype, row.device), []).append(name)
    return list(groups.values())


def _sum_on(device: torch.device, tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape that may lie on different devices, on one of them."""
    return torch.stack([tensor.to(device) for tensor in tensors]).sum(0)
