"""A loss that looks on: what the model returned for an example, and the loss that it computed of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        self.is_one_layers = True
        """Whether these are what one of its modules returned, and not made of several, as an expectation over exits."""
        self._outputs: dict[int, weakref.ref[Tensor]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at what every module inside a model returns, for as long as the ``with`` block lasts."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[id(output)] = weakref.ref(output)

        with ExitStack() as hooks:
            for module in model.modules():
                if module is not model:
                    hooks.callback(module.register_forward_hook(note).remove)
            yield

    def _is_an_output(self, tensor: Tensor | None) -> bool:
        noted = self._outputs.get(id(tensor))
        return tensor is not None and noted is not None and noted() is tensor

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
        logits = token_logits(output)
        self.logits = logits.detach()
        self.is_one_layers = self._is_an_output(logits) or self._is_an_output(logits._base)
        losses = self._loss_fn(output, labels)
        if self.own_loss is None or not agree(self.own_loss, losses.detach().sum()):
            raise ValueError("The model's own loss is not the default one.")
        return losses


def agree(own: Tensor, loss: Tensor) -> bool:
    """Compare a loss with the model's own.

    Returns:
        Whether they are the same up to what their precision rounds.

    Example:
        >>> agree(torch.tensor(5.48348e-05), torch.tensor(5.49345e-05)), agree(torch.tensor(0.101), torch.tensor(0.1))
        (True, False)
    """
    is_single = torch.finfo(own.dtype).eps < 1e-5
    # Of what is known by heart the softmax's sum is all but one, and rounded by 1e-7 whatever the loss.
    return torch.allclose(own.to(loss), loss, rtol=1e-3 if is_single else 3e-2, atol=1e-6)
