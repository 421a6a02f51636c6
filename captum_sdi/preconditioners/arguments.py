"""The settings of preconditioners, looked at when they are made."""

from __future__ import annotations

import math
from typing import Any

from captum_sdi.words import is_integer


def check_damping(owner: object, damping: Any) -> None:
    """Refuse a damping that is no positive number.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not positive and finite.
    """
    kind = type(owner).__name__
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise TypeError(f"{kind}(damping=...) must be a number, got {damping!r}.")
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"{kind}(damping=...) must be positive and finite, got {damping!r}.")


def check_count(owner: object, name: str, count: Any) -> None:
    """Refuse a count that is no integer of at least 1.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below 1.
    """
    kind = type(owner).__name__
    if not is_integer(count):
        raise TypeError(f"{kind}({name}=...) must be an int, got {count!r}.")
    if count < 1:
        raise ValueError(f"{kind}({name}=...) must be at least 1, got {count}.")
