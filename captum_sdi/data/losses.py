"""Batches, padding and per-example losses.

The batch contract, described here once. A batch is either

* a tuple or list, as in Captum: ``model(*batch[:-1])``, the labels last; or
* a mapping, as in Hugging Face: ``model(**batch)`` without ``"labels"``, which are the labels.

Every tensor's first axis is the example. Keys that the model's forward does not take are dropped with one warning;
tensors are moved to the model's device. Rows of a dataset are collated by `Collator` when the user gives no
``collate_fn``.

A loss function is called as ``loss_fn(output, labels)`` with what the model returned, untouched. It returns one value
per example (first axis; others are summed), or, where the model returns a tensor, a scalar: it is then called on
slices of one example, so that a mean over tokens or examples cannot mix examples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi.data.batch import batch_size, describe_value, map_tensors, split_batch

IGNORED = -100
"""The label of a position where nothing is predicted, as in Hugging Face."""


LossFn = Callable[[Any, Any], Tensor]


class TokenCrossEntropy:
    """Cross-entropy from a language model's logits, averaged over each example's own target tokens.

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
        """The loss of each example.

        Args:
            output: What the model returned: logits, or something with ``logits``, or a tuple that begins with them.
            labels: ``(n, p)``, or ``(n,)`` for logits of one position ``(n, v)``.

        Returns:
            ``(n,)``.

        Raises:
            ValueError: There are no labels, or they do not fit the logits.
        """
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
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORED, reduction="none")
        losses, targets = losses.view(len(labels), -1), (labels != IGNORED).view(len(labels), -1)
        return losses.sum(1) / targets.sum(1).clamp(min=1)


def token_logits(output: Any) -> Tensor:
    """The logits in what a language model returned.

    Args:
        output: Logits, or something with ``logits``, or a tuple that begins with them.

    Returns:
        ``(n, ..., v)``.

    Raises:
        ValueError: There are none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, Sequence) and output:
        logits = output[0]
    logits = output if logits is None else logits
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(
            f"The default loss needs logits, but the model returned {describe_value(output)}. Pass loss_fn=."
        )
    return logits


def default_loss(model: nn.Module) -> TokenCrossEntropy:
    """The loss that ``loss_fn=None`` stands for.

    Args:
        model: Its config says whether it is causal.

    Returns:
        Next-token cross-entropy, unshifted when ``config.is_causal`` is False.
    """
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    return TokenCrossEntropy(shift=getattr(config, "is_causal", True) is not False)


def example_losses(loss_fn: LossFn, output: Any, labels: Any, size: int, argument: str = "loss_fn") -> Tensor:
    """The loss of each example, whatever the loss function reduces.

    Args:
        loss_fn: See the module's docstring.
        output: What the model returned.
        labels: The batch's labels.
        size: The number of examples n.
        argument: Named in the error.

    Returns:
        ``(n,)``.

    Raises:
        TypeError: It returned no tensor.
        ValueError: What it returned has another shape.
    """
    losses = loss_fn(output, labels)
    if not isinstance(losses, Tensor):
        raise TypeError(f"{argument} must return a tensor, got {describe_value(losses)}.")
    if losses.ndim == 0 and isinstance(output, Tensor) and len(output) == size:
        parts = ((output[i : i + 1], map_tensors(operator.itemgetter(slice(i, i + 1)), labels)) for i in range(size))
        return torch.stack([loss_fn(*part).reshape(()) for part in parts])
    if losses.ndim == 0 or losses.shape[0] != size:
        scalar = f" (a scalar is possible only where the model returns a tensor, not {describe_value(output)})"
        raise ValueError(
            f"{argument} returned a tensor of shape {tuple(losses.shape)} for a batch of {size}. Return one value per "
            f"example, of shape ({size},), such as the mean over each one's own targets{scalar * (losses.ndim == 0)}."
        )
    return losses.reshape(size, -1).sum(1)


def target_labels(raw: Any, loss_fn: LossFn | None = None) -> Tensor | None:
    """The labels that are predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        Integer labels ``(n, ...)``, without each example's first where the loss predicts next tokens; None where there
        are none.
    """
    labels = split_batch(raw)[2]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return None
    shifted = isinstance(loss_fn, TokenCrossEntropy) and loss_fn.shift and labels.ndim > 1
    return labels[:, 1:] if shifted else labels


def untargeted_examples(raw: Any, loss_fn: LossFn | None = None) -> list[int]:
    """Positions of the examples in which nothing is predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        Those whose targets are all -100.
    """
    labels = target_labels(raw, loss_fn)
    if labels is None:
        return []
    return (labels.reshape(len(labels), -1) == IGNORED).all(1).nonzero().flatten().tolist()


def first_targeted_example(raw: Any, loss_fn: LossFn | None = None) -> int | None:
    """Position of the first example in which something is predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        The position; None when there is none.
    """
    empty = set(untargeted_examples(raw, loss_fn))
    return next((i for i in range(batch_size(raw)) if i not in empty), None)


def check_gradient(losses: Tensor, argument: str) -> None:
    """Refuses losses that no gradient leads back from: every influence would be zero.

    Args:
        losses: From a pass in which the model's parameters require a gradient.
        argument: Named in the error.

    Raises:
        ValueError: They do not require a gradient.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"The loss does not require a gradient: {argument} or the model's forward probably cuts it off with "
            ".detach(), .item() or torch.no_grad(). Compute the loss from the model's output by differentiable "
            "operations alone."
        )
