"""`ShardWriter`: collects rows of consecutive examples and writes them as shards."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_sdi.index.shards import Shard

if TYPE_CHECKING:
    from captum_sdi.index.folder import SketchIndex

SHARD_BYTES, SHARD_SECONDS = 64 * 2**20, 60.0
"""A shard is written when it is as large, or its first row as old: this much is lost when the process is killed."""


class ShardWriter:
    """Collects rows of one checkpoint, and writes shards; to be used in a ``with`` block.

    Args:
        index: The index.
        checkpoint: The checkpoint's name.
    """

    def __init__(self, index: SketchIndex, checkpoint: str) -> None:
        self._index, self._folder = index, index.folder(checkpoint)
        self._owner = index.manifest.owner(checkpoint)
        self._row_bytes = index.width * index.dtype.itemsize
        self._clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.flush()  # after an error, too: what was computed is worth keeping

    def _clear(self) -> None:
        self._rows: list[Tensor] = []
        self._fingerprints: list[Tensor] = []
        self._start = self._stop = 0  # positions of the first row collected, and after the last
        self._since = time.monotonic()

    def add(
        self,
        positions: Tensor,
        rows: Tensor,
        fingerprints: Tensor,
    ) -> None:
        """Take the rows of one batch.

        Args:
            positions: ``(n,)`` of its examples, ascending.
            rows: ``(n, D)`` on the CPU.
            fingerprints: ``(n, 8)``.
        """
        for run in consecutive_runs(positions):
            self._append(positions[run].tolist(), rows[run], fingerprints[run])
        n_bytes = (self._stop - self._start) * self._row_bytes
        if n_bytes >= SHARD_BYTES:
            # A piece inside one shard is scored without copying it.
            whole_pieces = self._stop - self._stop % self._index.piece
            self.flush(whole_pieces if whole_pieces > self._start else self._stop)
        elif time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def _append(
        self,
        positions: list[int],
        rows: Tensor,
        fingerprints: Tensor,
    ) -> None:
        """Take consecutive rows; they share a shard with those before only if nothing lies between."""
        if self._rows and positions[0] != self._stop:
            self.flush()
        if not self._rows:
            self._start, self._since = positions[0], time.monotonic()
        self._stop = positions[-1] + 1
        self._rows.append(rows)
        self._fingerprints.append(fingerprints)

    def flush(self, stop: int | None = None) -> None:
        """Write what was collected.

        Args:
            stop: Up to this position; None: all.
        """
        if not self._rows:
            return
        start, stop_collected = self._start, self._stop
        rows = torch.cat(self._rows)
        fingerprints = torch.cat(self._fingerprints)
        stop = stop_collected if stop is None else stop
        n_written = stop - start
        written_rows, written_fingerprints = rows[:n_written], fingerprints[:n_written]
        Shard.write(
            self._folder,
            start,
            written_rows,
            written_fingerprints,
            self._index.dtype,
            self._owner,
        )
        self._clear()
        if stop < stop_collected:
            self._start, self._stop = stop, stop_collected
            self._rows = [rows[n_written:].clone()]  # without what was written
            self._fingerprints = [fingerprints[n_written:]]


def consecutive_runs(positions: Tensor) -> list[slice]:
    """Cut ascending positions where they jump.

    Returns:
        One slice of them for each run of neighbours.

    Example:
        >>> consecutive_runs(torch.tensor([3, 4, 7]))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    steps = positions[1:] - positions[:-1]
    breaks = (steps != 1).nonzero().flatten() + 1
    ends = [0, *breaks.tolist(), len(positions)] if len(positions) else []
    return [slice(start, stop) for start, stop in pairwise(ends)]
