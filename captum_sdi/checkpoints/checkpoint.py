"""What a checkpoint is to the rest of the package: its name, its source, its learning rate."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

# float() takes more: underscores, and the digits of every alphabet.
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights that training passed through: its name, where it comes from, its learning rate η."""

    name: str  # identifies it in an index, seeds its hashes
    source: Any  # what the load function takes; None stands for the model's current weights
    rate: float = 1.0  # learning rate η, known once it was loaded
    number: int = 0  # position among the question's checkpoints
    fixed_weight: float | None = field(default=None, repr=False)  # stands for η in scores of other units

    @property
    def weight(self) -> float:
        """What scores at this checkpoint are multiplied by: its learning rate, unless their unit is another."""
        return self.rate if self.fixed_weight is None else self.fixed_weight

    def loaded(self, model: nn.Module, load: Callable[[nn.Module, Any], Any]) -> Checkpoint:
        """Load the weights into the model, in place, and return the checkpoint with its rate.

        ``load(model, source)`` returns the learning rate, as ``checkpoints_load_func`` does. It is not called for the
        model's current weights, which are there already.

        Returns:
            The checkpoint with the rate that ``load`` returned.

        Raises:
            ValueError: If ``load`` returned anything but a finite number.

        Example:
            >>> checkpoint = Checkpoint("step-9.pt", source="run/step-9.pt")
            >>> checkpoint.loaded(nn.Linear(2, 1), lambda model, path: 0.1).rate
            0.1
        """
        if self.source is None:
            return self
        returned = load(model, self.source)
        try:
            rate = as_number(returned)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            rate = math.nan
        if not math.isfinite(rate):
            raise ValueError(
                f"checkpoints_load_func returned the learning rate {returned!r} for checkpoint {self.name!r}. It must "
                "load the checkpoint and return a finite number."
            )
        return replace(self, rate=rate)


def as_number(value: Any) -> float:
    """Turn a number, a one-element tensor or a decimal string into a float; True and "1_0" are no numbers."""
    if isinstance(value, bool) or (isinstance(value, str) and not _DECIMAL.fullmatch(value.strip())):
        raise TypeError(f"{value!r} is no number.")
    return float(value)


def as_rate(value: Any, origin: str) -> float:
    """Turn a number, a one-element tensor or (in safetensors metadata) a string into a rate."""
    try:
        return as_number(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{origin} should be a learning rate, one number, but is {value!r}.") from None


def listed_checkpoints(sources: Sequence[Any]) -> list[Checkpoint]:
    """Name and number what :func:`find_checkpoints` returned.

    Args:
        sources: What the load function takes, one entry per checkpoint; ``[None]`` for the current weights.

    Returns:
        One checkpoint per source, in the same order.

    Example:
        >>> listed_checkpoints(["run/step-9.pt"])
        [Checkpoint(name='step-9.pt', source='run/step-9.pt', rate=1.0, number=0)]
    """
    names = checkpoint_names(list(sources))
    return [Checkpoint(names[number], source, number=number) for number, source in enumerate(sources)]


def checkpoint_names(checkpoints: list[Any]) -> list[str]:
    """Name each checkpoint; the sketch derives its random generator from this name.

    A path is named by its last component, so that moving the run's folder, or deleting another checkpoint of it,
    changes no name. Paths whose last components agree take as many more as they need to differ. An object without a
    name goes by its position.

    Args:
        checkpoints: What :func:`find_checkpoints` returned.

    Returns:
        One name per checkpoint, all different.

    Example:
        >>> checkpoint_names(["run/checkpoint-5", "run/checkpoint-10"])
        ['checkpoint-5', 'checkpoint-10']
        >>> checkpoint_names(["a/run/last.pt", "b/run/last.pt", "b/run/best.pt"])
        ['a/run/last.pt', 'b/run/last.pt', 'best.pt']
        >>> checkpoint_names([None])
        ['current']
    """
    paths = [name_components(checkpoint, position) for position, checkpoint in enumerate(checkpoints)]
    lengths = [1] * len(paths)  # how many of its last components a name consists of
    while True:
        endings = zip(paths, lengths, strict=True)
        names = ["/".join(path[-length:]) for path, length in endings]
        repeats = Counter(names)
        ambiguous = [position for position, name in enumerate(names) if repeats[name] > 1]
        extensible = [position for position in ambiguous if lengths[position] < len(paths[position])]
        if not extensible:
            return numbered_repeats(names)
        for position in extensible:
            lengths[position] += 1


def name_components(checkpoint: Any, position: int) -> tuple[str, ...]:
    """Split a checkpoint's name into components; the last one is its ordinary name."""
    if checkpoint is None:
        return ("current",)
    if isinstance(checkpoint, (str, os.PathLike)):
        # The path is made absolute, so that "." and "runs/.." have a name as well.
        absolute = Path(os.path.abspath(os.fsdecode(checkpoint)))
        root, *components = absolute.parts
        return (root.rstrip(os.sep), *components)
    if isinstance(checkpoint, int):
        return (str(checkpoint),)
    return (f"#{position}",)


def numbered_repeats(names: list[str]) -> list[str]:
    """Tell repeats of a name apart: one checkpoint listed twice still gets two generators."""
    occurrences: Counter[str] = Counter()
    numbered = []
    for name in names:
        occurrences[name] += 1
        repeat = occurrences[name]
        numbered.append(f"{name} ({repeat})" if repeat > 1 else name)
    return numbered
