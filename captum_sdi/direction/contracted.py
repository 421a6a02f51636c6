"""Weighted sums of training gradients, and their products with test gradients, while the gradients pass by.

A use of a parameter hands its per-example gradients on in factors; neither a sum over examples nor an inner product
with a fixed direction needs them formed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_sdi.capture.settling import settled, uses_in_sight
from captum_sdi.data.batch import batch_size
from captum_sdi.data.side import Side
from captum_sdi.features import Bins, Dense, Gradient, Outer
from captum_sdi.passes import Point
from captum_sdi.precision import score_dtype

Vectors = Mapping[str, Tensor]
"""A vector in parameter space for each group: by targeted parameter ``(g, *shape)``."""


def weighted_gradients(
    point: Point,
    raw: Any,
    side: Side,
    weights: Tensor,
    *,
    is_compared: bool = False,
    checks_uses: bool = False,
) -> dict[str, Tensor]:
    """Sum the gradients of a batch's losses, weighed for each group.

    Args:
        point: The model at a checkpoint.
        raw: The batch.
        side: How it is run.
        weights: ``(g, n)``.
        is_compared: The batch is compared with an example alone: a mask that the model fails on may be left out.
        checks_uses: Let other modules answer for the targets that are used outside their layer's calls.

    Returns:
        By targeted parameter ``(g, *shape)``.
    """
    targets = point.capture.targets()

    def attempted() -> dict[str, Tensor]:
        sums = {}
        for name, parameter in targets.items():
            shape = len(weights), *parameter.shape
            sums[name] = torch.zeros(shape, dtype=score_dtype(point.model), device=parameter.device)

        def add(
            name: str,
            rows: slice,
            place: int,
            gradient: Gradient,
        ) -> None:
            own_weights = weights[:, rows].to(sums[name])
            for group, scales in enumerate(own_weights):
                if scales.any():
                    sums[name][group] += weighted_sum(gradient, scales, sums[name].shape[1:])

        with uses_in_sight(point.capture.tape, checked=checks_uses) as check_uses:
            losses = point.capture.losses(raw, side) if is_compared else point.capture.forward(raw, side)[1]
            check_uses(losses)
            point.capture.tape.backward(losses, add)
        return sums

    return settled(attempted)


def weighted_sum(gradient: Gradient, scales: Tensor, shape: torch.Size) -> Tensor:
    """Sum per-example gradients of one use, times a scale for each example ``(n,)``.

    Returns:
        ``shape``.

    Example:
        >>> outer = Outer(rows=torch.ones(2, 1, 2), cols=torch.ones(2, 1, 1))
        >>> weighted_sum(outer, torch.tensor([1.0, 3.0]), torch.Size([2, 1])).flatten()
        tensor([4., 4.])
    """
    chosen = scales.nonzero().flatten()
    scales = scales[chosen]
    if isinstance(gradient, Dense):
        return torch.einsum("n,n...->...", scales, gradient.grads[chosen].to(scales)).reshape(shape)
    cols = gradient.cols[chosen].to(scales) * scales[:, None, None]
    rows = gradient.rows[chosen]
    if rows.is_floating_point():
        rows = rows.to(scales)
    # The examples' tokens as those of one example: what is summed over.
    one_example = Outer(rows.flatten(0, 1).unsqueeze(0), cols.flatten(0, 1).unsqueeze(0))
    return one_example.entries(shape).squeeze(0)


def step_products(
    point: Point,
    raw: Any,
    side: Side,
    vectors: Vectors,
    *,
    checks_uses: bool = False,
) -> Tensor:
    """Multiply the gradients of a batch's losses with vectors, in each bin, by a backward pass.

    Args:
        point: The model at a checkpoint.
        raw: The batch, which is compared with another pass: a mask that the model fails on may be left out.
        side: How it is run.
        vectors: By targeted parameter.
        checks_uses: Let other modules answer for the targets that are used outside their layer's calls.

    Returns:
        ``(n, g, b)``, in the order of `captum_sdi.features.Bins`.
    """
    n_examples = batch_size(raw)

    def attempted() -> Tensor:
        products: dict[int, Tensor] = {}

        def add(
            name: str,
            rows: slice,
            place: int,
            gradient: Gradient,
        ) -> None:
            vector = vectors[name]
            entries = gradient.entries(vector.shape[1:])
            summed = products.setdefault(place, vector.new_zeros(n_examples, len(vector)))
            summed[rows] += torch.einsum("n...,g...->ng", entries.to(vector), vector)

        with uses_in_sight(point.capture.tape, checked=checks_uses) as check_uses:
            losses = point.capture.losses(raw, side)
            check_uses(losses)
            point.capture.tape.backward(losses, add)
        some_vector = next(iter(vectors.values()))
        zeros = some_vector.new_zeros(n_examples, len(some_vector))
        places = range(Bins.count(point.capture.n_steps))
        return torch.stack([products.get(place, zeros) for place in places], dim=2)

    return settled(attempted)
