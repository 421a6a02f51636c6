"""A loss that looks on: what the model returned for an example, and the loss that it computed of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.losses import LossFn, token_logits, without_own_loss


class Witness:
    """A side's loss, which remembers what the model made of the labels.

    Args:
        loss_fn: The side's loss.
        before: Called with the output before the loss is.
        sees_labels: Whether the model is handed the labels, so that what it returns may begin with a loss.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        before: Callable[[Any], None],
        *,
        sees_labels: bool,
    ) -> None:
        self._loss_fn, self._before, self.sees_labels = loss_fn, before, sees_labels
        self.own_loss: Tensor | None = None
        """A scalar that the model itself computed from the labels."""
        self.logits: Tensor | None = None
        """What it returned beside that."""

    def __call__(self, output: Any, labels: Any) -> Tensor:
        """Compute the losses.

        Returns:
            What the side's loss does.

        Raises:
            ValueError: If the model sees labels, and computes no loss from them, or another one.
        """
        if not self.sees_labels:
            self._before(output)
            return self._loss_fn(output, labels)
        self.own_loss, output = without_own_loss(output)
        self._before(output)
        self.logits = token_logits(output).detach()
        losses = self._loss_fn(output, labels)
        if self.own_loss is None or not agree(self.own_loss, losses.detach().sum()):
            raise ValueError("The model's own loss is not the default one.")
        return losses


def agree(own: Tensor, loss: Tensor) -> bool:
    """Say whether a loss is the model's own, up to what its precision rounds."""
    is_single = torch.finfo(own.dtype).eps < 1e-5
    return torch.allclose(own.to(loss), loss, rtol=1e-3 if is_single else 3e-2)
