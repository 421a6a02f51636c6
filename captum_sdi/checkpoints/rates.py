"""The learning rate of a checkpoint: the one *used at its step*.

A Trainer folder holds it in the log of ``trainer_state.json``; its ``optimizer.pt`` and ``scheduler.pt`` already hold
the next step's.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_sdi.checkpoints.checkpoint import as_number
from captum_sdi.checkpoints.files import TRAINER_FOLDER, WEIGHT_FILES, abbreviated
from captum_sdi.checkpoints.reading import OPTIMIZER_KEYS, RATE_KEYS, read_json


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
        _warn(
            f"{origin} has parameter groups with different learning rates ({listed}). The first is used for all of "
            "them; save 'learning_rate' beside the state dict to choose another."
        )
    return rates[0]


def as_rate(value: Any, origin: str) -> float:
    """Turn a number, a one-element tensor or (in safetensors metadata) a string into a rate."""
    try:
        return as_number(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{origin} should be a learning rate, one number, but is {value!r}.") from None


def trainer_rate(folder: Path) -> float | None:
    """Read the rate used at a Trainer folder's step from its log; None where it has no log."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    state = read_json(file)
    rates = logged_rates(state, file)
    step = state.get("global_step")
    if not isinstance(step, int):
        return None
    if step in rates:
        return rates[step]
    later_rates = rates_logged_later(folder, rates)
    return rate_between(step, rates | later_rates, folder)


def logged_rates(state: dict[str, Any], file: Path) -> dict[int, float]:
    """Read the learning rates in a Trainer's log, by step."""
    rates: dict[int, float] = {}
    for entry in state.get("log_history") or []:
        if "learning_rate" in entry and "step" in entry:
            step = entry["step"]
            rates[step] = as_rate(entry["learning_rate"], f"step {step} of {file}")
    return rates


def rates_logged_later(folder: Path, own_rates: dict[int, float]) -> dict[int, float]:
    """Collect the rates in the logs of the same run's other checkpoints."""
    # A checkpoint's own log ends at its step at the latest, so the next logged rate is never in it.
    if not TRAINER_FOLDER.fullmatch(folder.absolute().name):
        return {}
    run = folder.absolute().parent
    later_rates: dict[int, float] = {}
    for file in [*run.glob("checkpoint-*/trainer_state.json"), run / "trainer_state.json"]:
        if not file.is_file():
            continue
        rates = logged_rates(read_json(file), file)
        # A log that contradicts the checkpoint's own is of another run in the same directory.
        if own_rates.items() <= rates.items():
            later_rates |= rates
    return later_rates


def rate_between(step: int, rates: dict[int, float], folder: Path) -> float | None:
    """Interpolate linearly between the nearest logged steps; beyond the ends take the nearest."""
    steps_before = [logged for logged in rates if logged < step]
    steps_after = [logged for logged in rates if logged > step]
    if steps_before and steps_after:
        earlier, later = max(steps_before), min(steps_after)
        weight = (step - earlier) / (later - earlier)
        rate = rates[earlier] + weight * (rates[later] - rates[earlier])
        explanation = f"{rate:g} is interpolated between those of steps {earlier} and {later}"
    elif steps_before or steps_after:
        nearest = max(steps_before) if steps_before else min(steps_after)
        rate = rates[nearest]
        explanation = f"{rate:g}, that of step {nearest}, the nearest logged one, is used"
    else:
        return None
    _warn(
        f"{folder} logged no learning rate at its step {step}: {explanation}. For exact rates choose logging_steps so "
        "that it divides save_steps."
    )
    return rate


def effective_rate(rate: float | None, path: Path) -> float:
    """Replace a missing rate by 1.0, and warn of it, or of one that has no effect."""
    if rate is None:
        # The same words for every checkpoint of a run, so that Python shows them once.
        _warn(
            f"A checkpoint in {os.path.dirname(os.path.abspath(path))} holds no learning rate: 1.0 is used, so all "
            "such checkpoints count alike. Save 'learning_rate' beside the state dict, or keep trainer_state.json "
            "beside the weights."
        )
        return 1.0
    if rate == 0:
        _warn(
            f"The learning rate of {path} is 0: this checkpoint contributes nothing to any score. Leave it out, or "
            "take one from the middle of the schedule."
        )
    return rate


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
