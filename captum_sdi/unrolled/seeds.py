"""Seeds: the gradients φ of test losses at the end of training, from which the derivative goes back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.features import StepFeatures
from captum_sdi.parameter_vector import ParameterVector
from captum_sdi.scores.contract import Scores
from captum_sdi.weighted_loss import BatchLoss


@dataclass(frozen=True)
class Seeds:
    """Seeds of q test examples, split by bin (`captum_sdi.features.Bins`)."""

    vectors: Tensor
    """``(q, b, size)``."""
    n_steps: Tensor
    """``(q,)`` how many loop steps each test example ran."""

    @staticmethod
    def of(tests: StepFeatures, layout: ParameterVector) -> Seeds:
        """Lay exact features out as vectors; one bin is the whole gradient."""
        return Seeds(layout.rows(tests.rows), tests.n_steps)

    @property
    def flat(self) -> Tensor:
        """All of them, ``(q b, size)``."""
        return self.vectors.flatten(0, 1)

    def by_test(self, scores: Tensor) -> Tensor:
        """Return scores of the flat seeds ``(q b, ...)`` by test example and bin, ``(q, b, ...)``."""
        return scores.unflatten(0, self.vectors.shape[:2])

    def columns(self, scores: Tensor) -> Scores:
        """Return influence from scores, the total first.

        Args:
            scores: ``(q b, n)`` how much the seeds' losses change with the examples' weights.

        Returns:
            ``(q, n, 1 + b)``, the negative scores, their variances zero.
        """
        influence = -self.by_test(scores).transpose(1, 2)
        total = influence.sum(-1, keepdim=True)
        values = torch.cat([total, influence], dim=-1)
        return Scores(values, torch.zeros_like(values))


def loss_gradients(
    loss: BatchLoss,
    vector: Tensor,
    batches: Iterable[Any],
) -> tuple[Tensor, Tensor]:
    """Compute losses and whole gradients, also of parameters that no layer rule covers.

    Args:
        loss: The losses.
        vector: ``(size,)`` the parameters.
        batches: Of the examples.

    Returns:
        ``(q,)`` losses and ``(q, size)`` gradients.
    """
    losses, gradients = [], []
    for raw in batches:
        leaf = vector.detach().clone().requires_grad_()
        batch_losses = loss(leaf, raw)
        losses.append(batch_losses.detach())
        for example_loss in batch_losses:
            (gradient,) = torch.autograd.grad(example_loss, leaf, retain_graph=True)
            gradients.append(gradient)
    return torch.cat(losses), torch.stack(gradients)
