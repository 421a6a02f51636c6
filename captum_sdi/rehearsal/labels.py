"""Labels that the default loss would read otherwise than they were meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import split_batch
from captum_sdi.data.losses import IGNORED, TokenCrossEntropy, target_labels
from captum_sdi.data.side import Side
from captum_sdi.words import warn_user


def check_labels_on_padding(raw: Any, side: Side, positions: Sequence[int]) -> bool:
    """Warn of the default loss's targets where the attention mask is 0; say whether there were any."""
    _, keywords, labels = split_batch(raw)
    mask: Any = keywords.get("attention_mask")
    if not _are_comparable(mask, labels) or not isinstance(side.loss_fn, TokenCrossEntropy):
        return False
    targets = target_labels(raw, side.loss_fn)
    assert targets is not None
    on_padding = (targets != IGNORED) & (mask[:, -targets.shape[1] :] == 0)
    n_labels = int(on_padding.sum())
    if n_labels:
        warn_user(
            f"{n_labels} labels stand where attention_mask is 0, in {side.name} examples {positions[0]} to "
            f"{positions[-1]}: padding is predicted, too, and counts in the loss. Set labels to {IGNORED} there."
        )
    return n_labels > 0


def check_labels_are_unshifted(raw: Any, side: Side) -> None:
    """Warn where the default loss shifts labels that are the next tokens already."""
    if not (isinstance(side.loss_fn, TokenCrossEntropy) and side.loss_fn.shift):
        return
    inputs, keywords, labels = split_batch(raw)
    ids: Any = keywords.get("input_ids", inputs[0] if inputs else None)
    if not _are_comparable(ids, labels):
        return
    is_target = labels != IGNORED
    is_next_token = (labels[:, :-1] == ids[:, 1:])[is_target[:, :-1]]
    is_same_token = (labels == ids)[is_target]
    if len(is_next_token) > 1 and is_next_token.all() and not is_same_token.all():
        warn_user(
            f"labels of the {side.name} side are input_ids shifted by one already, and the default loss shifts once "
            "more: it would predict the token after the next. Pass labels as they stand in input_ids, or "
            "loss_fn=captum_sdi.data.losses.TokenCrossEntropy(shift=False)."
        )


def _are_comparable(tensor: Any, labels: Any) -> bool:
    """Say whether both are ``(n, p)``, and on the CPU: to look at them on a GPU would synchronise."""
    if not isinstance(tensor, Tensor) or not isinstance(labels, Tensor) or labels.ndim != 2:
        return False
    is_integer = not torch.is_floating_point(labels)
    return is_integer and tensor.shape == labels.shape and tensor.device.type == labels.device.type == "cpu"
