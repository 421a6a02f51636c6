"""Per-example losses: the default one, and one value per example from any loss function.

A loss function is called as ``loss_fn(output, labels)`` with what the model returned, untouched. It returns one value
per example (first axis; others are summed), or, where the model returns a tensor, a scalar: it is then called on
slices of one example, so that a mean over tokens or examples cannot mix examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi.data.batch import batch_size, describe_value, map_tensors, split_batch
from captum_sdi.model_facts import model_config

IGNORED = -100
"""The label of a position where nothing is predicted, as in Hugging Face."""

LossFn = Callable[[Any, Any], Tensor]


class TokenCrossEntropy:
    """Cross-entropy from a language model's logits, averaged over each example's own targets.

    ``ℓ = -1/|T| Σ_{p in T} log softmax(logits_p)[label_p]`` with T the positions whose label is not -100. An example
    without any has loss zero.

    Args:
        shift: The logits at position p predict the label at p + 1, as in causal models.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[-100, 2, 3]])
        >>> round(TokenCrossEntropy()(logits, labels).item(), 4)  # log 8
        2.0794
    """

    reduction = "none"

    def __init__(self, shift: bool = True) -> None:
        self.shift = shift

    def __repr__(self) -> str:
        return f"{'next-token' if self.shift else 'token'} cross-entropy averaged over an example's targets"

    def __call__(self, output: Any, labels: Any) -> Tensor:
        """Compute the loss of each example.

        Args:
            output: Logits, or something with ``logits``, or a tuple that begins with them.
            labels: ``(n, p)``, or ``(n,)`` for logits of one position ``(n, v)``.

        Returns:
            ``(n,)``.

        Raises:
            ValueError: If there are no labels, or they do not fit the logits.
        """
        token_losses, n_targets = self._undivided(output, labels)
        return token_losses.sum(1) / n_targets

    def token_losses(self, output: Any, labels: Any) -> Tensor:
        """Compute what each target adds to its example's loss.

        Args:
            output: As for a call.
            labels: As for a call.

        Returns:
            ``(n, p)`` by the label's position; rows sum to the losses.

        Raises:
            ValueError: As a call does.
        """
        token_losses, n_targets = self._undivided(output, labels)
        n_unpredicted = labels.flatten(1).shape[1] - token_losses.shape[1] if labels.ndim > 1 else 0
        return F.pad(token_losses / n_targets.unsqueeze(1), (n_unpredicted, 0))

    def _undivided(self, output: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Return the cross-entropies of all labels that could be predicted, and by how many each row is divided."""
        logits = token_logits(output)
        if not isinstance(labels, Tensor):
            raise ValueError(
                "There are no labels and no loss_fn to do without them: put 'labels' into the batch (last in a "
                "tuple), or pass loss_fn=."
            )
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} and dtype {labels.dtype} do not fit logits of shape "
                f"{tuple(logits.shape)}: the default loss needs token ids. Pass loss_fn=."
            )
        if self.shift and labels.ndim > 1:
            logits = logits[:, :-1]
            labels = labels[:, 1:]
        precise = torch.promote_types(logits.dtype, torch.float32)
        flat_logits = logits.to(precise).flatten(0, -2)
        flat_labels = labels.flatten().long()
        token_losses = F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORED, reduction="none")
        n = len(labels)
        is_target = labels != IGNORED
        n_targets = is_target.view(n, -1).sum(1)
        return token_losses.view(n, -1), n_targets.clamp(min=1)


def token_logits(output: Any) -> Tensor:
    """Return the logits ``(n, ..., v)`` in a language model's output.

    Raises:
        ValueError: If it is no logits, holds none under ``logits`` and does not begin with them.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, Sequence) and output:
        logits = output[0]
    if logits is None:
        logits = output
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(
            f"The default loss needs logits, but the model returned {describe_value(output)}. Pass loss_fn=."
        )
    return logits


def without_own_loss(output: Any) -> tuple[Tensor | None, Any]:
    """Return the loss that a model computed from labels, None where it returned none, and its output without."""
    is_tuple = isinstance(output, tuple) and len(output) > 0
    loss = output[0] if is_tuple else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        return None, output
    return loss.detach(), output[1:] if is_tuple else output


def default_loss(model: nn.Module) -> TokenCrossEntropy:
    """Return the loss of ``loss_fn=None``: unshifted where ``config.is_causal`` is False."""
    config = model_config(model)
    is_causal = getattr(config, "is_causal", None)
    return TokenCrossEntropy(shift=is_causal is not False)


def example_losses(
    loss_fn: LossFn,
    output: Any,
    labels: Any,
    size: int,
    argument: str = "loss_fn",
) -> Tensor:
    """Return the losses ``(size,)`` of a batch's examples, whatever the loss function reduces.

    Raises:
        TypeError: If the loss function returns no tensor.
        ValueError: If it returns a tensor of another shape. Both name the ``argument`` that it came from.
    """
    losses = loss_fn(output, labels)
    if not isinstance(losses, Tensor):
        raise TypeError(f"{argument} must return a tensor, got {describe_value(losses)}.")
    is_scalar = losses.ndim == 0
    if is_scalar and isinstance(output, Tensor) and len(output) == size:
        scalars = [_loss_of_one(loss_fn, output, labels, position) for position in range(size)]
        return torch.stack(scalars)
    if is_scalar or len(losses) != size:
        shape = tuple(losses.shape)
        hint = ""
        if is_scalar:
            hint = f" (a scalar is possible only where the model returns a tensor, not {describe_value(output)})"
        raise ValueError(
            f"{argument} returned a tensor of shape {shape} for a batch of {size}. Return one value per "
            f"example, of shape ({size},), such as the mean over each one's own targets{hint}."
        )
    return losses.reshape(size, -1).sum(1)


def _loss_of_one(
    loss_fn: LossFn,
    output: Tensor,
    labels: Any,
    position: int,
) -> Tensor:
    """Return one example's loss as a scalar, from a loss function that reduces over a batch."""
    one_row = slice(position, position + 1)
    own_labels = map_tensors(lambda tensor: tensor[one_row], labels)
    loss = loss_fn(output[one_row], own_labels)
    return loss.reshape(())


def target_labels(raw: Any, loss_fn: LossFn | None = None) -> Tensor | None:
    """Return the integer labels ``(n, ...)`` that the loss predicts; None where there are none.

    A loss that predicts next tokens never predicts an example's first label.
    """
    _, _, labels = split_batch(raw)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return None
    predicts_next = isinstance(loss_fn, TokenCrossEntropy) and loss_fn.shift
    if predicts_next and labels.ndim > 1:
        labels = labels[:, 1:]
    return labels


def untargeted_examples(raw: Any, loss_fn: LossFn | None = None) -> list[int]:
    """Return the positions of the examples without a target: all their labels are -100."""
    labels = target_labels(raw, loss_fn)
    if labels is None:
        return []
    is_ignored = labels.reshape(len(labels), -1) == IGNORED
    untargeted = is_ignored.all(1)
    return untargeted.nonzero().flatten().tolist()


def first_targeted_example(raw: Any, loss_fn: LossFn | None = None) -> int | None:
    """Return the position of the first example that has a target; None where none has."""
    untargeted = set(untargeted_examples(raw, loss_fn))
    for position in range(batch_size(raw)):
        if position not in untargeted:
            return position
    return None


def check_gradient(losses: Tensor, argument: str) -> None:
    """Check that a gradient leads back from the losses; else every influence would be zero.

    Args:
        losses: From a pass in which the model's parameters require a gradient.
        argument: Which argument the loss function came from, named in the error.

    Raises:
        ValueError: If the losses do not require a gradient.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"The loss does not require a gradient: {argument} or the model's forward probably cuts it off with "
            ".detach(), .item() or torch.no_grad(). Compute the loss from the model's output by differentiable "
            "operations alone."
        )
