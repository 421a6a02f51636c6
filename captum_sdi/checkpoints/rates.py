"""The learning rate of a checkpoint: the one *used at its step*."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_sdi.checkpoints.checkpoint import as_rate
from captum_sdi.checkpoints.files import WEIGHT_FILES, abbreviated
from captum_sdi.checkpoints.reading import OPTIMIZER_KEYS, RATE_KEYS
from captum_sdi.checkpoints.trainer import trainer_rate
from captum_sdi.words import warn_user


def learning_rate(metadata: Mapping[str, Any], path: Path, file: Path) -> float | None:
    """Find the rate in the file of the weights, else in the Trainer's log; None if in neither."""
    rate = rate_beside_weights(metadata, file)
    if rate is None and file.name in WEIGHT_FILES:
        folder = path if path.is_dir() else path.parent
        rate = trainer_rate(folder)
    if rate is not None and (not math.isfinite(rate) or rate < 0):
        raise ValueError(f"The learning rate of {path} is {rate}; it must be finite and not < 0.")
    return rate


def rate_beside_weights(metadata: Mapping[str, Any], file: Path) -> float | None:
    """Read the rate that has a name in the file, or stands in an optimizer's state."""
    for key in RATE_KEYS:
        value = metadata.get(key)
        if value is not None:
            return as_rate(value, f"'{key}' of {file}")
    for key in OPTIMIZER_KEYS:
        optimizer = metadata.get(key)
        if isinstance(optimizer, list) and len(optimizer) == 1:  # Lightning's
            optimizer = optimizer[0]
        if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
            return optimizer_rate(optimizer["param_groups"], f"'{key}' of {file}")
    return None


def optimizer_rate(groups: list[dict[str, Any]], origin: str) -> float | None:
    """Read the rate of an optimizer's first parameter group; warn where another group differs."""
    rates = [as_rate(group["lr"], origin) for group in groups if "lr" in group]
    if not rates:
        return None
    if len(set(rates)) > 1:
        # Influence has one rate per checkpoint. The first group's is also what the Trainer logs.
        listed = abbreviated([f"{rate:g}" for rate in rates])
        warn_user(
            f"{origin} has parameter groups with different learning rates ({listed}). The first is used for all of "
            "them; save 'learning_rate' beside the state dict to choose another."
        )
    return rates[0]


def effective_rate(rate: float | None, path: Path) -> float:
    """Replace a missing rate by 1.0, and warn of it, or of one that has no effect."""
    if rate is None:
        advice = "Save 'learning_rate' beside the state dict, or keep trainer_state.json beside the weights."
        if (path / "trainer_state.json").is_file():
            advice = "Its trainer_state.json logged none: keep scheduler.pt, or choose logging_steps <= save_steps."
        # The same words for every checkpoint of a run, so that Python shows them once.
        warn_user(
            f"A checkpoint in {os.path.dirname(os.path.abspath(path))} holds no learning rate: 1.0 is used, so all "
            f"such checkpoints count alike. {advice}"
        )
        return 1.0
    if rate == 0:
        warn_user(
            f"The learning rate of {path} is 0: this checkpoint contributes nothing to any score. Leave it out, or "
            "take one from the middle of the schedule."
        )
    return rate
