"""Rows longer than the model has positions for, which would fail in the middle of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from captum_sdi.model_facts import model_configs

_LIMITS = ("max_position_embeddings", "n_positions")
_MOST_UNUSED = 2  # rows of a table of positions that are none, as in OPT


def position_limit(model: nn.Module) -> tuple[str, int] | None:
    """Return how many positions a model's table of them holds, and what its config calls that.

    Returns:
        None for models without such a table: rotary positions go on.
    """
    sizes = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
    for config in model_configs(model):
        for name in _LIMITS:
            limit = getattr(config, name, None)
            if isinstance(limit, int) and any(limit + unused in sizes for unused in range(_MOST_UNUSED + 1)):
                return name, limit
    return None


def check_length(
    raw: Any,
    limit: tuple[str, int] | None,
    side: str,
    positions: Sequence[int],
) -> None:
    """Refuse a batch with more positions than the model's table holds.

    Raises:
        ValueError: If there are more.
    """
    ids = raw.get("input_ids") if isinstance(raw, Mapping) else None
    if limit is None or not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= limit[1]:
        return
    name, maximum = limit
    mask = raw.get("attention_mask")
    is_mask = isinstance(mask, Tensor) and mask.shape == ids.shape
    number = int(mask.sum(1).argmax()) if is_mask else 0
    raise ValueError(
        f"{side} example {positions[number]} has {ids.shape[1]} tokens, but the model's {name} is {maximum}. Truncate "
        f"rows to {maximum} tokens, e.g. tokenizer(..., truncation=True, max_length={maximum})."
    )
