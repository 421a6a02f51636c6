"""How the layers of a looped model repeat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from captum_sdi.words import is_integer


@dataclass(eq=False)
class LoopSettings:
    """Which layers repeat, and how; shared by the model and the module that owns the layers."""

    model: nn.Module
    owner: nn.Module
    start: int
    stop: int
    n_loops: int
    damping: float

    @contextmanager
    def depth(self, n_loops: int | None) -> Iterator[None]:
        """Use another number of repetitions inside `with`; None keeps the present one."""
        if n_loops is None:
            yield
            return
        check_n_loops(n_loops)
        previous_n_loops = self.n_loops
        self.n_loops = n_loops
        try:
            yield
        finally:
            self.n_loops = previous_n_loops


def check_n_loops(n_loops: Any) -> None:
    """Raise ValueError unless `n_loops` is an integer of at least 1."""
    if not is_integer(n_loops) or n_loops < 1:
        raise ValueError(f"n_loops={n_loops!r} must be an integer of at least 1; 1 applies every layer once.")


def check_damping(damping: Any) -> None:
    """Raise ValueError unless `damping` is a number above 0 and at most 1."""
    if not (is_integer(damping) or isinstance(damping, float)) or not 0 < damping <= 1:
        raise ValueError(f"damping={damping!r} must be a number above 0 and at most 1; 1.0 is plain repetition.")
