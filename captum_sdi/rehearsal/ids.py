"""Ids of tokens and labels that the model does not know, which a GPU would not name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_sdi.data.losses import IGNORED


def check_ids(
    name: str,
    ids: Any,
    size: int,
    side: str,
    positions: Sequence[int],
) -> None:
    """Refuse ids of tokens or labels that do not exist.

    Args:
        name: "input_ids" or "labels", of which -100 is one.
        ids: Of a batch. Only tensors on the CPU are looked at: a check on the GPU would synchronise.
        size: How many ids there are.
        side: Named in the error.
        positions: Of the batch's examples.

    Raises:
        TypeError: If the ids are no integers.
        ValueError: If an id is negative or too large.
    """
    if not isinstance(ids, Tensor) or ids.ndim == 0 or ids.device.type != "cpu":
        return
    if ids.is_floating_point():
        raise TypeError(f"{name} must be the integer ids of tokens, got {ids.dtype} for {side} example {positions[0]}.")
    unknown = (ids < 0) | (ids >= size)
    exception = ""
    if name == "labels":
        unknown &= ids != IGNORED
        exception = f", or {IGNORED} where nothing is predicted"
    if unknown.any():
        first = tuple(unknown.nonzero()[0].tolist())
        raise ValueError(
            f"{name} of {side} example {positions[first[0]]} hold {ids[first]}, but the model knows 0 to {size - 1}"
            f"{exception}. Does the tokenizer, or what pads, belong to another model?"
        )
