"""Contractions of step features into influence, and its standard errors.

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

from captum_sdi.features import Bins, Columns, StepFeatures


@dataclass(frozen=True)
class Scores:
    """Influence split by `Columns`: the total first, then the test side's bins."""

    values: Tensor
    """``(..., b)``."""
    variances: Tensor
    """``(..., b)`` the sketch's variance of each value; zero where none was asked for."""

    def times(self, rate: float) -> Scores:
        """Return the scores times a learning rate η, their variances times η²."""
        return Scores(rate * self.values, rate**2 * self.variances)


def pair_scores(test: StepFeatures, train: StepFeatures) -> Scores:
    """Contract every test example with every training example.

    Args:
        test: ``(q, b, width)`` per parameter, from `StepFeatures.with_total`.
        train: ``(n, 1, width)`` per parameter, summed over bins.

    Returns:
        Values and variances ``(q, n, b)``.
    """
    with _full_precision(test):
        return _contract("qb", "n", "qnb", test, train)


def pair_values(test: StepFeatures, train: StepFeatures) -> Scores:
    """Contract as `pair_scores` does, to the same values, without their variances.

    Args:
        test: As for `pair_scores`.
        train: As for `pair_scores`.

    Returns:
        Values ``(q, n, b)``, and zeros for their variances.
    """
    with _full_precision(test):
        values = []
        for group in _alike(test):
            products = torch.einsum("qblw,nlw->lqnb", _stacked(group, test), _stacked(group, train).squeeze(1))
            values.append(products.sum(0))
    return _without_variances(values)


def self_scores(test: StepFeatures, train: StepFeatures) -> Scores:
    """Contract every example with itself, split by the step at which it acts as a test example.

    Args:
        test: ``(n, b, width)`` per parameter, as they act on the test side.
        train: ``(n, b, width)`` per parameter, as they act on the train side.

    Returns:
        Values and variances ``(n, 1 + b)``, or ``(n, 1)`` when there is one bin.
    """
    with _full_precision(test):
        return _contract("nb", "n", "nb", test.with_total(), train.summed())


def step_matrices(test: StepFeatures, train: StepFeatures) -> Scores:
    """Contract every training step with every test step: ``SDI_{s,t} = ⟨φ_s(z), φ_t(z')⟩``.

    Args:
        test: ``(q, 3 + t, width)`` per parameter, from `StepFeatures.with_total`.
        train: ``(n, 2 + s, width)`` per parameter.

    Returns:
        Values ``(q, n, s, t)`` over loop steps, prelude and coda left out, and zeros for their variances.
    """
    with _full_precision(test):
        values = []
        for name in test.rows:
            test_steps = Columns.steps(test.rows[name], axis=1)
            train_steps = Bins.steps(train.rows[name])
            values.append(torch.einsum("qtw,nsw->qnst", test_steps, train_steps))
    return _without_variances(values)


def _contract(
    test_axes: str,
    train_axes: str,
    pair_axes: str,
    test: StepFeatures,
    train: StepFeatures,
) -> Scores:
    """Evaluate the module's formula; ``l`` runs over the parts of parameters whose rows can be stacked."""
    values, variances = [], []
    for group in _alike(test):
        noise = test.noise[group[0]]
        test_rows = _stacked(group, test)
        train_rows = _stacked(group, train).squeeze(1)
        products = torch.einsum(f"{test_axes}lw,{train_axes}lw->l{pair_axes}", test_rows, train_rows)
        values.append(products.sum(0))
        if noise.variance == 0:
            variances.append(torch.zeros_like(values[-1]))
            continue
        test_norms = test_rows.square().sum(-1)
        train_norms = train_rows.square().sum(-1)
        norms = torch.einsum(f"{test_axes}l,{train_axes}l->{pair_axes}", test_norms, train_norms)
        variances.append(noise.variance * (norms + products.square().sum(0)))
    device = values[0].device
    return Scores(_sum_on(device, values), _sum_on(device, variances))


def _stacked(group: list[str], features: StepFeatures) -> Tensor:
    """Stack the parts of several parameters' rows, ``(n, b, l, width / parts)``."""
    n_parts = features.noise[group[0]].parts
    rows = torch.stack([features.rows[name] for name in group], dim=-2)
    return rows.unflatten(-1, (n_parts, -1)).flatten(-3, -2)


def _alike(features: StepFeatures) -> list[list[str]]:
    """Group parameters with equally wide and equally noisy rows on one device, to be contracted together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, row in features.rows.items():
        likeness = (features.noise[name], row.shape[-1], row.dtype, row.device)
        groups.setdefault(likeness, []).append(name)
    return list(groups.values())


def _without_variances(values: list[Tensor]) -> Scores:
    total = _sum_on(values[0].device, values)
    return Scores(total, total.new_zeros(()).expand_as(total))


def _full_precision(features: StepFeatures) -> torch.autocast:
    """Switch the user's autocast off: it would contract features in half precision."""
    first_row = next(iter(features.rows.values()))
    return torch.autocast(first_row.device.type, enabled=False)


def _sum_on(device: torch.device, tensors: list[Tensor]) -> Tensor:
    """Sum tensors of one shape that may lie on different devices, on one of them."""
    gathered = [tensor.to(device) for tensor in tensors]
    return torch.stack(gathered).sum(0)
