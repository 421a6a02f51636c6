"""A run replayed: forwards once, and its states backwards, as many of them kept as memory allows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from captum_sdi.unrolled.optimizers import State
from captum_sdi.unrolled.states import States, run_fingerprint
from captum_sdi.unrolled.updates import Updates
from captum_sdi.words import is_integer

Keep = Literal["all", "sqrt"] | int
"""How many states are kept: before every update; √T of them, the others computed again; or a number."""

_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-5}
"""What rounding makes of a run at most; losses of transformers are float32 even in a float64 model."""


def kept_updates(n_updates: int, keep: Keep) -> range:
    """Return before which updates (0-based) a state is kept, evenly spaced.

    Raises:
        ValueError: If ``keep`` is nothing of that kind.

    Example:
        >>> list(kept_updates(9, "sqrt")), list(kept_updates(3, "all")), list(kept_updates(10, 2))
        ([0, 3, 6], [0, 1, 2], [0, 5])
    """
    if keep == "all":
        n_states = n_updates
    elif keep == "sqrt":
        n_states = math.ceil(math.sqrt(n_updates))
    elif is_integer(keep) and keep >= 1:
        n_states = min(keep, n_updates)
    else:
        raise ValueError(f"keep must be 'all', 'sqrt' or a number of states of at least 1; got {keep!r}.")
    spacing = math.ceil(n_updates / n_states)
    return range(0, n_updates, spacing)


class Replay:
    """A run, computed again from its start.

    Args:
        updates: The run's updates.
        start: ``(size,)`` the parameters before the first.
        keep: How many states are kept.
        folder: Where they are written; None: they stay in memory.

    Raises:
        ValueError: If ``keep`` is no number of states.
    """

    def __init__(
        self,
        updates: Updates,
        start: Tensor,
        keep: Keep = "sqrt",
        folder: Path | None = None,
    ) -> None:
        self.updates, self.start = updates, start
        self.kept = kept_updates(updates.run.n_updates, keep)
        self.folder = None if folder is None else folder / f"run-{run_fingerprint(updates, start)}"
        self._states = States(self.folder)
        self._final: State | None = None

    def final(self, bar: Any) -> State:
        """Run forwards, once, from the last state that an earlier process left, and keep the states on the way.

        Args:
            bar: Moved on behind every update.

        Returns:
            The state behind the last update.
        """
        if self._final is None:
            state = self.updates.run.optimizer.initial(self.start)
            n_done = self._states.n_done(self.kept)
            if n_done > 0:
                state = self._states.state_before(n_done, self.start)
                bar.update(n_done)
            for update in range(n_done, self.updates.run.n_updates):
                if update in self.kept:
                    self._states.store(update, state)
                state = self.updates.step(state, update)
                bar.update()
            self._final = state
        return self._final

    def weighted(self, weights: Tensor, bar: Any) -> Tensor:
        """Run forwards with other weights of the examples ``(n,)``; return the final parameters ``(size,)``."""
        state = self.updates.run.optimizer.initial(self.start)
        for update in range(self.updates.run.n_updates):
            state = self.updates.step(state, update, weights)
            bar.update()
        return state[0]

    def backwards(self, n_left: int) -> Iterator[tuple[int, State]]:
        """Yield the first so many updates (0-based), the last one first, and the state before each.

        Args:
            n_left: How many; one before which a state is kept, or all. `final` must have run.
        """
        stop = n_left
        for first in reversed([update for update in self.kept if update < n_left]):
            yield from self._segment(first, stop)
            stop = first

    def _segment(self, first: int, stop: int) -> Iterator[tuple[int, State]]:
        """Compute the states spacing two kept ones again."""
        states = [self._states.state_before(first, self.start)]
        for update in range(first, stop - 1):
            states.append(self.updates.step(states[-1], update))
        for update in reversed(range(first, stop)):
            yield update, states.pop()


def relative_error(final: Tensor, expected: Tensor, start: Tensor) -> float:
    """Return ``‖θ_T - θ‖ / ‖θ - θ_0‖``: by how much a replay misses weights, in units of the way to them.

    Example:
        >>> relative_error(torch.tensor([1.5]), expected=torch.tensor([1.0]), start=torch.tensor([0.0]))
        0.5
    """
    way = (expected - start).double().norm()
    missed = (final - expected).double().norm()
    return float(missed / way) if way > 0 else float(missed)


def check_final(final: Tensor, expected: Tensor, start: Tensor) -> float:
    """Refuse a replay that ends elsewhere than the model.

    Returns:
        The relative error.

    Raises:
        ValueError: If it is above what rounding makes of a run.
    """
    error = relative_error(final, expected, start)
    tolerance = _ROUNDING[final.dtype]
    if not error <= tolerance:
        raise ValueError(
            f"The replay does not end at the model's weights: it misses them by {error:.2g} of the way from the start, "
            f"where rounding explains {tolerance:.1g}. Known causes: the model is not the one this run ended with, or "
            "start= not the one it began with; other positions or another order in batches=; learning rates one update "
            "early or late; a reduction= ('mean' or 'tokens'), max_grad_norm= or no_decay= that training did not have; "
            "dropout without random_states=; training in half precision (bf16, fp16, autocast, TF32); another loss_fn; "
            "a run that amplifies rounding, as a high constant rate does: record it in float64."
        )
    return error
