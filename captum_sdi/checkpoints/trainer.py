"""The learning rate that a Trainer used at a checkpoint's step, from its logs and its schedulers.

``trainer_state.json`` holds it if the step was logged; Trainers before transformers 4.51 logged the next step's.
``scheduler.pt`` always holds the next step's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_sdi.checkpoints.checkpoint import as_rate
from captum_sdi.checkpoints.files import TRAINER_FOLDER
from captum_sdi.checkpoints.reading import damaged, read_json, unpickled
from captum_sdi.checkpoints.schedules import possible_rates
from captum_sdi.words import is_integer, warn_user

_MOST_STEPS = 2**53  # beyond it a float skips integers


@dataclass(frozen=True)
class TrainerState:
    """What one folder knows of its run's learning rates."""

    step: int | None
    n_steps: int | None  # of the whole run
    logged: dict[int, float]  # by step
    next_rate: float | None = None  # what scheduler.pt has for the step after this one
    peak: float | None = None

    def is_of_the_same_run(self, other: TrainerState) -> bool:
        """Say whether two logs, one of which ends earlier, contradict each other."""
        own_entries = self.logged.items()
        other_entries = other.logged.items()
        one_goes_on = own_entries <= other_entries or other_entries <= own_entries
        share_a_log = one_goes_on and bool(own_entries & other_entries)
        have_one_schedule = (self.n_steps, self.peak) == (other.n_steps, other.peak)
        nothing_differs = have_one_schedule and not (own_entries and other_entries)
        return share_a_log or nothing_differs

    @property
    def logged_its_own_rate(self) -> bool | None:
        """Say whether the log holds the rate used at its last step; None if that or the next step's."""
        if self.step not in self.logged:
            return None
        rate = self.logged[self.step]
        is_next_rate = self.next_rate is not None and math.isclose(rate, self.next_rate)
        return None if is_next_rate else True


def trainer_rate(folder: Path) -> float | None:
    """Find the rate used at a Trainer folder's step; None where neither log nor scheduler holds any."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    current = read_state(file)
    if current.step is None:
        return None
    if current.logged_its_own_rate:
        return current.logged[current.step]
    states = [current, *other_states(folder, current)]
    used = rates_by_step(states, logs_are_late=logs_are_late(states))
    if current.step in used:
        return used[current.step]
    rates = rates_of_schedule(current.step, used, states)
    if len(rates) != 1:
        return rate_between(current, used, folder)
    # The same words for every checkpoint of a run, so that Python shows them once.
    warn_user(
        f"The Trainer in {folder.absolute().parent} logged no learning rate at the steps of some checkpoints: they are "
        "worked out from scheduler.pt, which holds the next step's, and the schedule it follows. For logged rates "
        "choose logging_steps so that it divides save_steps."
    )
    return rates[0]


def read_state(file: Path) -> TrainerState:
    """Read a ``trainer_state.json``, and the ``scheduler.pt`` beside it."""
    content = read_json(file)
    step = steps_in(content, "global_step", file)
    logged = logged_rates(content, file)
    next_rate, peak = scheduler_rates(file.parent / "scheduler.pt")
    n_steps = steps_in(content, "max_steps", file)
    return TrainerState(step, n_steps, logged, next_rate, peak)


def steps_in(
    content: Mapping[str, Any],
    key: str,
    file: Path,
    prefix: str = "",
) -> int | None:
    """Read a number of steps; None where the file has none."""
    steps = content.get(key)
    if steps is None or (is_integer(steps) and 0 <= steps <= _MOST_STEPS):
        return steps
    raise damaged(file, f"'{prefix}{key}'", "a number of steps", steps)


def logged_rates(content: Mapping[str, Any], file: Path) -> dict[int, float]:
    """Read the learning rates in a Trainer's log, by step."""
    history = content.get("log_history") or []
    if not isinstance(history, list):
        raise damaged(file, "'log_history'", "a list", history)
    rates: dict[int, float] = {}
    for number, entry in enumerate(history):
        if not isinstance(entry, dict):
            raise damaged(file, f"'log_history[{number}]'", "an object", entry)
        step = steps_in(entry, "step", file, f"log_history[{number}].")
        if "learning_rate" in entry and step is not None:
            rates[step] = as_rate(entry["learning_rate"], f"step {step} of {file}")
    return rates


def scheduler_rates(file: Path) -> tuple[float | None, float | None]:
    """Read the next step's rate and the peak from a ``scheduler.pt``; None for what cannot be told."""
    try:
        state = unpickled(file) if file.is_file() else {}
        next_rate = as_rate(state["_last_lr"][0], str(file))
        peak = as_rate(state["base_lrs"][0], str(file)) if "base_lrs" in state else None
    except (ValueError, TypeError, LookupError):  # other schedulers hold anything
        return None, None
    return next_rate, peak


def other_states(folder: Path, current: TrainerState) -> list[TrainerState]:
    """Read what the same run's other checkpoints, and the folder they are in, know of it."""
    # A checkpoint's own log ends at its step at the latest, so the next logged rate is never in it.
    folder = folder.absolute()
    if not TRAINER_FOLDER.fullmatch(folder.name):
        return []
    run = folder.parent
    files = [*run.glob("checkpoint-*/trainer_state.json"), run / "trainer_state.json"]
    states = [read_state(file) for file in files if file.is_file() and file.parent != folder]
    # A log that contradicts the checkpoint's own is of another run in the same directory.
    return [state for state in states if state.is_of_the_same_run(current)]


def rates_by_step(states: list[TrainerState], *, logs_are_late: bool) -> dict[int, float]:
    """Return every rate that is known, by the step that used it."""
    used: dict[int, float] = {}
    for state in states:
        if state.next_rate is not None and state.step is not None:
            used[state.step + 1] = state.next_rate
    for state in states:
        for step, rate in state.logged.items():
            used[step + int(logs_are_late)] = rate
    return used


def logs_are_late(states: list[TrainerState]) -> bool:
    """Tell whether the logs hold the next step's rates, as those of transformers before 4.51 do."""
    if any(state.logged_its_own_rate and state.next_rate is not None for state in states):
        return False
    for late in (False, True):  # on a plateau a rate is the next one as well, and only the whole schedule can tell
        used = rates_by_step(states, logs_are_late=late)
        if rates_of_schedule(1, used, states):
            return late
    # A scheduler without base_lrs (ReduceLROnPlateau) moves at evaluations only: the next rate is mostly the same.
    return any(state.step in state.logged and state.peak is not None for state in states)


def rates_of_schedule(
    step: int,
    used: Mapping[int, float],
    states: list[TrainerState],
) -> list[float]:
    """List what a step's rate can have been by the schedules that all known rates follow."""
    peak, n_steps = states[0].peak, states[0].n_steps
    if peak is None or n_steps is None:
        return []
    rates = {known - 1: rate for known, rate in used.items()}
    return possible_rates(step - 1, rates, peak, n_steps)


def rate_between(
    current: TrainerState,
    used: Mapping[int, float],
    folder: Path,
) -> float | None:
    """Interpolate linearly between the nearest known steps; beyond the ends take the nearest."""
    step = current.step or 0
    steps_before = [known for known in used if known < step]
    steps_after = [known for known in used if known > step]
    if steps_before and steps_after:
        earlier = max(steps_before)
        later = min(steps_after)
        weight = (step - earlier) / (later - earlier)
        difference = used[later] - used[earlier]
        rate = used[earlier] + weight * difference
        explanation = f"{rate:g} is interpolated between those of steps {earlier} and {later}"
    elif steps_before or steps_after:
        nearest = max(steps_before) if steps_before else min(steps_after)
        rate = used[nearest]
        origin = "one step late by scheduler.pt," if nearest == step + 1 else "the nearest logged one,"
        explanation = f"{rate:g}, that of step {nearest}, {origin} is used"
    else:
        return None
    warn_user(
        f"{folder} logged no learning rate at its step {step}: {explanation}. For exact rates choose logging_steps so "
        "that it divides save_steps."
    )
    return rate
