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

from captum_sdi.checkpoints.files import ADAPTER_FILES, TRAINER_FOLDER, WHOLE_FILES, some
from captum_sdi.checkpoints.reading import OPTIMIZER_KEYS, RATE_KEYS, read_json


def learning_rate(beside: Mapping[str, Any], path: Path, file: Path) -> float | None:
    """Find the rate saved beside the weights in their file, else in the Trainer's log; None where there is none."""
    rate = _rate_beside(beside, file)
    if rate is None and file.name in WHOLE_FILES + ADAPTER_FILES:
        rate = _trainer_rate(path if path.is_dir() else path.parent)
    if rate is not None and (not math.isfinite(rate) or rate < 0):
        raise ValueError(f"The learning rate of {path} is {rate}; it must be finite and not < 0.")
    return rate


def _rate_beside(saved: Mapping[str, Any], file: Path) -> float | None:
    """Read the rate that has a name, or stands in an optimizer's state."""
    for key in RATE_KEYS:
        if saved.get(key) is not None:
            return _as_rate(saved[key], f"'{key}' of {file}")
    for key in OPTIMIZER_KEYS:
        optimizer = saved.get(key)
        if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
            return _optimizer_rate(optimizer["param_groups"], f"'{key}' of {file}")
    return None


def _optimizer_rate(groups: list[dict[str, Any]], where: str) -> float | None:
    rates = [_as_rate(group["lr"], where) for group in groups if "lr" in group]
    if len(set(rates)) > 1:
        # Influence has one rate per checkpoint. The first group's is also what the Trainer logs.
        _warn(
            f"{where} has parameter groups with different learning rates "
            f"({some([f'{rate:g}' for rate in rates])}). The first is used for all of them; save 'learning_rate' "
            "beside the state dict to choose another."
        )
    return rates[0] if rates else None


def _as_rate(value: Any, where: str) -> float:
    """Turn a number, a one-element tensor or (in safetensors metadata) a string into a rate."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{where} should be a learning rate, one number, but is {value!r}.") from None


def _trainer_rate(folder: Path) -> float | None:
    """Read the rate used at a Trainer folder's step from its log; None where it has no log."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    state = read_json(file)
    step = state.get("global_step")
    rates = _logged_rates(state, file)
    if not isinstance(step, int):
        return None
    if step in rates:
        return rates[step]
    return _rate_between(step, rates | _rates_logged_later(folder, rates), folder)


def _logged_rates(state: dict[str, Any], file: Path) -> dict[int, float]:
    return {
        entry["step"]: _as_rate(entry["learning_rate"], f"step {entry['step']} of {file}")
        for entry in state.get("log_history") or []
        if "learning_rate" in entry and "step" in entry
    }


def _rates_logged_later(folder: Path, own: dict[int, float]) -> dict[int, float]:
    """Collect what other checkpoints of the same run logged, the later ones above all."""
    # A checkpoint's own log ends at its step at the latest: the next logged rate is never in it. A
    # log that disagrees with it is of another run in the same directory and does not count.
    if not TRAINER_FOLDER.fullmatch(folder.absolute().name):
        return {}
    above = folder.absolute().parent
    later: dict[int, float] = {}
    for file in [*above.glob("checkpoint-*/trainer_state.json"), above / "trainer_state.json"]:
        rates = _logged_rates(read_json(file), file) if file.is_file() else {}
        if all(rates.get(step) == rate for step, rate in own.items()):
            later |= rates
    return later


def _rate_between(step: int, rates: dict[int, float], folder: Path) -> float | None:
    """Interpolate linearly between the nearest logged steps; beyond the ends take the nearest."""
    below = max((s for s in rates if s < step), default=None)
    above = min((s for s in rates if s > step), default=None)
    if below is not None and above is not None:
        weight = (step - below) / (above - below)
        rate = rates[below] + weight * (rates[above] - rates[below])
        how = f"{rate:g} is interpolated between those of steps {below} and {above}"
    elif (nearest := below if above is None else above) is not None:
        rate = rates[nearest]
        how = f"{rate:g}, that of step {nearest}, the nearest logged one, is used"
    else:
        return None
    _warn(
        f"{folder} logged no learning rate at its step {step}: {how}. For exact rates choose logging_steps so that it "
        "divides save_steps."
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
