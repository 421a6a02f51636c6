"""One target token's loss at a time: an example becomes a row for each of its targets.

The loss of a row is what its target adds to the example's loss, divided as the whole loss divides, so that the rows'
gradients sum to the example's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import describe_value, select, split_batch
from captum_sdi.data.losses import IGNORED, LossFn
from captum_sdi.data.side import Side

LABELS, COLUMN = "labels", "column"
"""What the labels of rows hold: the example's own labels, and which column of its token losses counts."""


def token_losses(
    loss_fn: LossFn,
    output: Any,
    labels: Any,
    size: int,
    argument: str = "loss_fn",
) -> Tensor:
    """Return what each target adds to its example's loss.

    Args:
        loss_fn: A loss with a method ``token_losses``, as the default one, or one that returns a value per token.
        output: What the model returned.
        labels: The batch's.
        size: How many examples it has.
        argument: Which argument the loss came from, named in errors.

    Returns:
        ``(n, p)``.

    Raises:
        ValueError: If the loss function returns no value per token.
    """
    by_token = getattr(loss_fn, "token_losses", loss_fn)
    losses = by_token(output, labels)
    if isinstance(losses, Tensor) and losses.ndim > 1 and len(losses) == size:
        return losses.flatten(1)
    received = tuple(losses.shape) if isinstance(losses, Tensor) else describe_value(losses)
    raise ValueError(
        f"One target token's loss at a time needs {argument} to tell tokens apart, but it returned {received} for a "
        f"batch of {size}. Return one value per token, of shape ({size}, p) and divided as the loss divides (they are "
        "summed), or give the loss a method token_losses(output, labels) that does; or leave the token axes out."
    )


class OneTarget:
    """The loss of a row: one target's share of another loss.

    Args:
        loss_fn: The loss of whole examples.
        argument: Which argument it came from.
    """

    reduction = "none"

    def __init__(self, loss_fn: LossFn, argument: str) -> None:
        self._loss_fn, self._argument = loss_fn, argument

    def __repr__(self) -> str:
        return f"one target's share of {self._loss_fn!r}"

    def __call__(self, output: Any, labels: Mapping[str, Any]) -> Tensor:
        """Compute the loss of each row, ``(n,)``."""
        columns = labels[COLUMN].long()
        losses = token_losses(
            self._loss_fn,
            output,
            labels[LABELS],
            len(columns),
            self._argument,
        )
        return losses.gather(1, columns.unsqueeze(1)).squeeze(1)


def side_with_labels(side: Side) -> Side:
    """Return how the same examples are run where the model is handed their labels, whatever the loss."""
    given = side.forward_kwargs

    def with_labels(raw: Any) -> Mapping[str, Any]:
        _, _, labels = split_batch(raw)
        keywords = given(raw) if callable(given) else given
        return {"labels": labels, **(keywords or {})}

    return replace(side, forward_kwargs=with_labels)


def one_target_side(side: Side) -> Side:
    """Return how the rows of a side's examples are run."""
    forward_kwargs = side.forward_kwargs
    if callable(forward_kwargs):
        of_examples = forward_kwargs

        def of_rows(raw: Any) -> Mapping[str, Any]:
            return of_examples(with_own_labels(raw))

        forward_kwargs = of_rows
    return Side(side.name, OneTarget(side.loss_fn, side.argument), forward_kwargs, side.argument)


def target_rows(raw: Any, examples: Sequence[int], columns: Sequence[int]) -> Any:
    """Return the batch of rows: these examples of a batch, each with one target.

    Args:
        raw: The batch.
        examples: Places in it, one for each row; an example has as many rows as it has targets.
        columns: The column of its token losses that counts, for each row.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> target_rows(batch, [0, 0], [1, 2])["labels"]["column"]
        tensor([1, 2])
    """
    repeated = select(raw, examples)
    _, _, labels = split_batch(repeated)
    row_labels = {LABELS: labels, COLUMN: torch.as_tensor(columns)}
    return _with_labels(repeated, row_labels)


def with_own_labels(raw: Any) -> Any:
    """Return a batch of rows with the labels of their examples, as a user's function expects it."""
    _, _, labels = split_batch(raw)
    return _with_labels(raw, labels[LABELS])


def target_columns(losses: Tensor, labels: Any) -> Tensor:
    """Say which token losses are those of targets.

    Args:
        losses: ``(n, p)`` from `token_losses`.
        labels: The batch's.

    Returns:
        ``(n, p)`` booleans: False where the label is -100 and the loss zero, and at a first label that none predicts.
    """
    own_labels = column_labels(losses.shape[1], labels)
    if own_labels is None:
        return torch.ones_like(losses, dtype=torch.bool)
    is_labelled = own_labels.to(losses.device) != IGNORED
    is_labelled[:, :1] &= bool(losses[:, :1].any())
    return is_labelled | (losses != 0)


def column_labels(n_columns: int, labels: Any) -> Tensor | None:
    """Return the labels ``(n, p)`` of the columns of token losses; None where there is not one for each.

    A loss that predicts next tokens may have one column less than there are labels.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return None
    flat_labels = labels.reshape(len(labels), -1)
    n_unpredicted = flat_labels.shape[1] - n_columns
    return flat_labels[:, n_unpredicted:] if n_unpredicted in (0, 1) else None


def _with_labels(raw: Any, labels: Any) -> Any:
    if isinstance(raw, Mapping):
        return {**raw, "labels": labels}
    *inputs, _ = raw
    return (*inputs, labels)
