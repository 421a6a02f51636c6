"""Memory that a CPU pass has freed, given back to the system step by step."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


class HeapTrimmer:
    """Trims the heap whenever a pass comes to another place.

    glibc keeps freed memory, and takes the small nodes of the graph out of the gaps that the activations left, so that
    the next step's activations no longer fit there: the memory that activation checkpointing frees would be lost again.
    """

    def __init__(self) -> None:
        self._place: object = None

    def restart(self) -> None:
        """Begin another pass."""
        self._place = None

    def trim_at(self, place: object) -> None:
        """Trim the heap, unless it was trimmed at this place."""
        if place != self._place:
            self._place = place
            malloc_trim = find_malloc_trim()
            malloc_trim(0)


@functools.cache
def find_malloc_trim() -> Callable[[int], int]:
    """Return malloc_trim of glibc; where there is none, a function that does nothing."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return lambda _: 0
