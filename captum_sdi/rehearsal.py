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

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_sdi.data.losses import IGNORED


def check_ids(name: str, ids: Any, size: int, side: str, positions: Sequence[int]) -> None:
    """Refuses ids of tokens or labels that do not exist, which a GPU would not name.

    Args:
        name: "input_ids" or "labels", of which -100 is one.
        ids: Of a batch; what is no tensor on the CPU is not looked at, as a GPU would have to be waited for.
        size: How many there are.
        side: Named in the error.
        positions: Of the batch's examples.

    Raises:
        TypeError: The ids are no integers.
        ValueError: An id is negative or too large.
    """
    if not isinstance(ids, Tensor) or ids.ndim == 0 or ids.device.type != "cpu":
        return
    if ids.is_floating_point():
        raise TypeError(f"{name} must be the integer ids of tokens, got {ids.dtype} for {side} example {positions[0]}.")
    bad = (ids < 0) | (ids >= size)
    ignored = ""
    if name == "labels":
        bad, ignored = bad & (ids != IGNORED), f", or {IGNORED} where nothing is predicted"
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} of {side} example {positions[first[0]]} hold {ids[first]}, but the model knows 0 to {size - 1}"
            f"{ignored}. Does the tokenizer, or what pads, belong to another model?"
        )
