"""Sentences for the user: the first few of many names, counts, and warnings at the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard


def is_integer(value: Any) -> TypeGuard[int]:
    """Say whether a value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def first_few(names: Sequence[object], at_most: int = 5) -> str:
    """Write the first names and how many more there are.

    Returns:
        Such as "'a', 'b' and 1 more".

    Example:
        >>> first_few(["a", "b", "c"], at_most=2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:at_most])
    hidden = len(names) - at_most
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def warn_user(message: str) -> None:
    """Warn at the line that called this library, however deep inside it the cause was seen."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_internal(module: str) -> bool:
    package = module.split(".")[0]
    return package in ("captum", "captum_sdi", "contextlib")
