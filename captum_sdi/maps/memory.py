"""How much memory a map needs, said before the work, and how much of the work is done at once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from captum_sdi.words import readable_size

UNKNOWN_BYTES = 4 * 2**30
"""What is counted on where nobody says what is free."""
ROWS_AT_ONCE = 32
"""Rows of a batch at most: each is a forward and a backward pass of a whole text."""


@dataclass(frozen=True)
class Needs:
    """What a map needs, in numbers of one size."""

    lengths: Mapping[str, int]
    """How long each axis of the result is, pairs included."""
    test_row: int
    """Numbers of a row of the test side."""
    train_row: int
    """Numbers of a row of the train side."""
    test_cells: int
    """Cells that a test row has in each train row: its positions times its bins."""
    train_cells: int
    """Cells that a train row has: its positions times its bins."""
    number_bytes: int
    has_errors: bool

    @property
    def map_bytes(self) -> int:
        """What the result takes, and once more while its axes are put in order."""
        copies = 4 if self.has_errors else 2
        return copies * self.number_bytes * math.prod(self.lengths.values())

    @property
    def row_bytes(self) -> int:
        """What one row of each side takes, and what they are contracted to, intermediate results included."""
        return 3 * self.number_bytes * (self.test_row + self.train_row + 2 * self.test_cells * self.train_cells)


@dataclass(frozen=True)
class Portions:
    """How many rows are worked on at once."""

    test_rows: int
    train_rows: int
    """Of the train side they are held while the test side passes by."""


def portions(needs: Needs, free_bytes: int) -> Portions:
    """Check that a map fits, and divide the memory.

    Args:
        needs: What it needs.
        free_bytes: What there is.

    Returns:
        How many rows are worked on at once.

    Raises:
        ValueError: If not even one row of each side fits beside the result.
    """
    usable = free_bytes // 2
    if needs.map_bytes + needs.row_bytes > usable:
        raise ValueError(_too_large(needs, usable))
    share = (usable - needs.map_bytes) // (2 * 3 * needs.number_bytes)
    train_rows = max(1, share // (needs.train_row + needs.train_cells))
    cells = 2 * needs.test_cells * needs.train_cells * min(train_rows, 10 * ROWS_AT_ONCE)
    test_rows = max(1, share // (needs.test_row + cells))
    return Portions(min(test_rows, ROWS_AT_ONCE), min(train_rows, 10 * ROWS_AT_ONCE))


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN_BYTES


def _too_large(needs: Needs, usable: int) -> str:
    long_axes = [f"{name} {length:,}" for name, length in needs.lengths.items() if length > 1]
    sizes = ", ".join(long_axes)
    sentence = (
        f"The map needs {readable_size(needs.map_bytes)} for its numbers ({sizes}) and "
        f"{readable_size(needs.row_bytes)} for one row of gradients of each side; {readable_size(usable)} may be used. "
    )
    if needs.map_bytes > needs.row_bytes:
        axes = {name: length for name, length in needs.lengths.items() if name not in ("test", "train")}
        longest = max(axes, key=lambda name: axes[name], default="")
        return sentence + f"Leave an axis out, such as the longest, {longest!r}, or pass fewer pairs."
    return sentence + (
        "Pass sketch=TensorSketch(dim=2048), which keeps less of each gradient, leave a position or step axis out, or "
        "name fewer layers=."
    )
