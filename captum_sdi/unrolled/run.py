"""`TrainingRun`: all that fixes the weights of a training run, beside the model and the examples."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from captum_sdi.unrolled import run_files
from captum_sdi.unrolled.optimizers import SGD, AdamW, Optimizer, is_number
from captum_sdi.weighted_loss import Reduction, check_reduction
from captum_sdi.words import is_integer

ReducedOver = Literal["update", "micro_batch"]
"""What a mean is over where gradients accumulate: all examples of an update, or those that ran together."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """One run: its optimizer, and for every update the learning rate and the examples.

    Args:
        optimizer: `AdamW` or `SGD`, with its settings.
        rates: One learning rate for each update.
        batches: Positions in the train set, one sequence for each update.
        max_grad_norm: What the gradient's norm was clipped to; None: it was not.
        reduction: How the loss of an update is made of its examples' losses: "mean"; "tokens", the mean over all their
            targets, as `transformers.Trainer` does for language models; "sum".
        micro_batch_size: How many examples ran through the model at once, where gradients accumulated; None: all.
        reduced_over: What the reduction is over where gradients accumulated: "update", all examples, as new versions
            of Trainer do with language models; "micro_batch": each micro-batch, and the mean of these.
        random_states: For a run with dropout, torch's random state before every micro-batch, in order. The model
            is then replayed in training mode; None: in evaluation mode, which differs where there is randomness.

    Raises:
        TypeError: If the optimizer is none of these.
        ValueError: If a field cannot be right.

    Example:
        >>> run = TrainingRun(AdamW(), rates=[1e-3, 5e-4], batches=[[0, 1], [2, 0]])
        >>> run.n_updates, run.micro_batches(1)
        (2, [[2, 0]])
    """

    optimizer: Optimizer
    rates: Sequence[float]
    batches: Sequence[Sequence[int]]
    max_grad_norm: float | None = None
    reduction: Reduction = "mean"
    micro_batch_size: int | None = None
    reduced_over: ReducedOver = "update"
    random_states: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        rates = [checked_rate(rate) for rate in self.rates]
        batches = [list(map(checked_position, batch)) for batch in self.batches]
        object.__setattr__(self, "rates", rates)
        object.__setattr__(self, "batches", batches)
        check_updates(rates, batches)
        check_reduction(self.reduction)
        if self.max_grad_norm is not None and (not is_number(self.max_grad_norm) or self.max_grad_norm <= 0):
            raise ValueError(f"max_grad_norm must be a number above 0, or None; got {self.max_grad_norm!r}.")
        if self.micro_batch_size is not None and (not is_integer(self.micro_batch_size) or self.micro_batch_size < 1):
            raise ValueError(f"micro_batch_size must be an int of at least 1, or None; got {self.micro_batch_size!r}.")
        if self.reduced_over not in get_args(ReducedOver):
            raise ValueError(f"reduced_over must be one of {list(get_args(ReducedOver))}, got {self.reduced_over!r}.")
        if self.random_states is not None:
            check_random_states(self)

    @property
    def n_updates(self) -> int:
        """The number of updates T."""
        return len(self.rates)

    @property
    def n_examples(self) -> int:
        """How many examples the train set has at least."""
        return 1 + max(map(max, self.batches))

    def micro_batches(self, update: int) -> list[list[int]]:
        """Return the positions of the examples of one update (0-based), of each micro-batch."""
        batch = list(self.batches[update])
        size = self.micro_batch_size or len(batch)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def random_state(self, update: int, micro_batch: int) -> Tensor | None:
        """Return torch's random state before one micro-batch of one update; None where there is no randomness."""
        if self.random_states is None:
            return None
        first = self._first_micro_batches[update]
        return self.random_states[first + micro_batch]

    @cached_property
    def _first_micro_batches(self) -> list[int]:
        """How many micro-batches there are before each update."""
        counts = [len(self.micro_batches(update)) for update in range(self.n_updates)]
        return [0, *accumulate(counts)]

    def save(self, folder: str | os.PathLike[str], start: dict[str, Tensor] | None = None) -> None:
        """Write the run to a folder, whole or not at all.

        Args:
            folder: Made where it is missing.
            start: The weights before the first update, written beside it: ``UnrolledInfluence(start=folder)``.
        """
        run_files.write_run(folder, self, start)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> TrainingRun:
        """Read what `save` or `record_training` wrote.

        Returns:
            The run, without its start.

        Raises:
            FileNotFoundError: If the folder holds no run.
            ValueError: If it holds something else, or is damaged.
        """
        settings = run_files.read_settings(folder)
        kinds: dict[str, Any] = {"AdamW": AdamW, "SGD": SGD}
        kind = kinds[settings.pop("optimizer_kind")]
        try:
            optimizer = kind(**settings.pop("optimizer"))
            return cls(optimizer, **settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"The training run in {os.fspath(folder)} is damaged: {error}") from error


# --- checks ---


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no optimizer of ours.

    Raises:
        TypeError: If it is not.
    """
    is_optimizer = all(hasattr(optimizer, name) for name in ("initial", "step", "pullback"))
    if isinstance(optimizer, type) or not is_optimizer:
        raise TypeError(
            f"optimizer= must be captum_sdi.unrolled.AdamW(...) or SGD(...), got {optimizer!r}: the derivative through "
            "training is known for these. Others, fused or 8-bit ones too, keep other moments."
        )


def checked_rate(rate: Any) -> float:
    """Return a learning rate as a number.

    Raises:
        TypeError: If it is a text.
    """
    if isinstance(rate, str | bytes):
        raise TypeError(f"rates= must be numbers, got {rate!r}.")
    return float(rate)


def checked_position(position: Any) -> int:
    """Return a position in the train set as an int.

    Raises:
        TypeError: If it is none: of a fraction, a text or a mask nobody can tell which example is meant.
    """
    is_flag = isinstance(position, bool | np.bool_) or getattr(position, "dtype", None) == torch.bool
    if not is_flag:
        with suppress(TypeError):
            return operator.index(position)
    raise TypeError(f"batches= must hold integers, positions in the train set; got {position!r}.")


def check_updates(rates: Sequence[float], batches: Sequence[Sequence[int]]) -> None:
    """Refuse rates and batches that are not one for each update.

    Raises:
        ValueError: If they are not, or one cannot be.
    """
    if len(rates) == 0 or len(rates) != len(batches):
        raise ValueError(
            f"rates= and batches= need one entry for each update, at least one: got {len(rates)} learning rates and "
            f"{len(batches)} batches."
        )
    for update, (rate, batch) in enumerate(zip(rates, batches, strict=True)):
        if not math.isfinite(rate) or rate < 0:
            raise ValueError(f"rates[{update}] must be a number of at least 0, got {rate}.")
        if len(batch) == 0 or min(batch) < 0:
            raise ValueError(f"batches[{update}] must be positions of at least 0, and not none; got {batch}.")


def check_random_states(run: TrainingRun) -> None:
    """Refuse random states that are not one for each micro-batch.

    Raises:
        ValueError: If they are not.
    """
    states = run.random_states or []
    n_batches = sum(len(run.micro_batches(update)) for update in range(run.n_updates))
    if len(states) != n_batches or not all(isinstance(state, Tensor) for state in states):
        raise ValueError(
            f"random_states= needs one state of torch.get_rng_state() for each of {n_batches} micro-batches, got "
            f"{len(states)}."
        )
    if any(state.dtype != torch.uint8 for state in states):
        raise ValueError("random_states= must be what torch.get_rng_state() returned, bytes.")
