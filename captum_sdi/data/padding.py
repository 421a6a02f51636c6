"""Which positions of a batch are used, and an example without those that are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import map_tensors
from captum_sdi.data.losses import IGNORED


def used_positions(raw: Any) -> Tensor | None:
    """Mark the positions ``(n, p)`` attended to or predicted; None for a batch without tokens."""
    input_ids = raw.get("input_ids") if isinstance(raw, Mapping) else None
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        return None
    attention_mask = raw.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        used = attention_mask.cpu().bool()
    else:
        used = torch.ones(input_ids.shape, dtype=torch.bool)
    labels = raw.get("labels")
    if isinstance(labels, Tensor) and labels.shape == input_ids.shape:
        predicted = labels.cpu() != IGNORED
        used = used | predicted
    return used


def without_padding(raw: Any) -> Any:
    """Cut the columns off that the attention mask says are padding, where every tensor is ``(1, p)``."""
    used = used_positions(raw)
    if used is None or used.all() or not used.any():
        return raw
    places = used[0].nonzero().flatten()
    span = slice(int(places[0]), int(places[-1]) + 1)
    shapes: set[Any] = set()
    map_tensors(lambda tensor: shapes.add(tensor.shape), raw)
    if shapes != {used.shape}:
        return raw
    return map_tensors(lambda tensor: tensor[:, span], raw)
