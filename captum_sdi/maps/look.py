"""A look at the examples of a map before the work: their targets and tokens, and how large everything will be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import split_batch
from captum_sdi.data.examples import Examples
from captum_sdi.data.losses import IGNORED
from captum_sdi.data.side import Side
from captum_sdi.data.targets import column_labels, side_with_labels, target_columns, token_losses
from captum_sdi.features import Bins
from captum_sdi.maps.axes import SideAxes
from captum_sdi.passes import Point


@dataclass(frozen=True)
class Look:
    """What is known of one example once it has been run."""

    columns: tuple[int, ...]
    """Of its token losses, those of targets."""
    first_position: int
    """The label's position that the first column belongs to."""
    n_positions: int
    """How many positions its layers read; 1 where these are not kept apart."""
    n_bins: int
    """How many bins its uses fall into; 1 where these are not kept apart."""
    ids: tuple[int, ...]
    """Its tokens: what was to be predicted, or else what was read. Empty where there are no token ids."""


def look(
    point: Point,
    examples: Examples,
    axes: SideAxes,
    only: Tensor | None = None,
) -> dict[int, Look]:
    """Run examples once as they are, rehearsed and compared with themselves alone.

    Args:
        point: The model at a checkpoint.
        examples: One side's.
        axes: What is to be kept apart.
        only: Positions of the examples; None: all.

    Returns:
        By position, what is known of each.
    """
    looks: dict[int, Look] = {}
    for positions, raw in examples.batches(only):
        places = positions.tolist()
        point.batch(raw, examples.side, places, by_step=False, collated_alone=examples.collated_alone)
        side = side_as_run(point, examples.side)
        losses = None
        if axes.token:
            losses = losses_by_token(point, raw, side, len(places))
        else:
            point.capture.forward(raw, side)
        n_positions = point.capture.tape.n_tokens if axes.position else 1
        n_bins = Bins.count(point.capture.n_steps) if axes.step else 1
        columns, first_position = _columns(losses, raw, len(places))
        texts = token_ids(raw, len(places))
        for number, (place, ids) in enumerate(zip(places, texts, strict=True)):
            looks[place] = Look(columns[number], first_position, n_positions, n_bins, ids)
    return looks


def side_as_run(point: Point, side: Side) -> Side:
    """Return a side that says in its keywords whether the model is handed labels, for any loss of its examples."""
    return side_with_labels(side) if point.capture.hands_labels(side) else side


def losses_by_token(
    point: Point,
    raw: Any,
    side: Side,
    size: int,
) -> Tensor:
    """Return what each target adds to its example's loss ``(n, p)``, by a forward pass."""
    kept: list[Tensor] = []

    def keep(output: Any, labels: Any) -> Tensor:
        losses = token_losses(side.loss_fn, output, labels, size, side.argument)
        kept.append(losses.detach())
        return losses

    point.capture.forward(raw, replace(side, loss_fn=keep))
    return kept[0]


def _columns(
    losses: Tensor | None,
    raw: Any,
    size: int,
) -> tuple[list[tuple[int, ...]], int]:
    """Return the columns of each example's targets, and the position that the first column belongs to."""
    if losses is None:
        return [(0,)] * size, 0
    _, _, labels = split_batch(raw)
    is_target = target_columns(losses, labels).cpu()
    columns = [tuple(row.nonzero().flatten().tolist()) for row in is_target]
    return columns, first_place(losses.shape[1], labels)


def first_place(n_columns: int, labels: Any) -> int:
    """Return the position, in the labels, that the first column of token losses belongs to."""
    own_labels = column_labels(n_columns, labels)
    return 0 if own_labels is None else labels[0].numel() - own_labels.shape[1]


def token_ids(raw: Any, size: int) -> list[tuple[int, ...]]:
    """Return the tokens of each example: at every position the label, or the input where there is none.

    Example:
        >>> token_ids({"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 7]])}, size=1)
        [(5, 7)]
    """
    args, keywords, labels = split_batch(raw)
    ids = _first_ids(keywords, args)
    if ids is None:
        return [()] * size
    if isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_floating_point():
        ids = torch.where(labels == IGNORED, ids, labels)
    return [tuple(row) for row in ids.tolist()]


def _first_ids(keywords: Mapping[str, Any], args: tuple[Any, ...]) -> Tensor | None:
    named = keywords.get("input_ids", keywords.get("inputs"))
    for value in (named, *args):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value
    return None
