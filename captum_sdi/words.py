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


def counted(number: int, noun: str) -> str:
    """Write how many there are of something.

    Returns:
        Such as "2 steps".

    Example:
        >>> counted(1, "test example"), counted(1_200, "test example")
        ('1 test example', '1,200 test examples')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def readable_size(n_bytes: int) -> str:
    """Write a number of bytes with three digits and a decimal unit.

    Returns:
        Such as "56.7 GB".

    Example:
        >>> readable_size(999), readable_size(1_234), readable_size(56_700_000_000)
        ('999 B', '1.23 kB', '56.7 GB')
    """
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def in_bytes(size: float) -> str:
    """Write a size in MiB, or in KiB where it is less than one."""
    if size >= 2**20:
        return f"{size / 2**20:,.1f} MiB"
    return f"{size / 2**10:,.1f} KiB"


def warn_user(message: str) -> None:
    """Warn at the line that called this library, however deep inside it the cause was seen."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_internal(module: str) -> bool:
    package = module.split(".")[0]
    return package in ("captum", "captum_sdi", "contextlib")
