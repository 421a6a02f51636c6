"""`Reader`: rows of one checkpoint of an index, through memory maps of its shards."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.shards import ALIGNMENT, Shard


@dataclass(frozen=True)
class ShardSlice:
    """The rows of one shard that a range of examples needs."""

    shard: Shard
    source: slice
    """Of the shard's rows."""
    target: slice
    """Of the range's."""


class Reader:
    """Rows of one checkpoint, through memory maps of its shards.

    Args:
        index: The index.
        checkpoint: The checkpoint's name.
        dtype: Of the rows that are handed out.
        unit: Divide every row by its norm.
    """

    def __init__(
        self,
        index: SketchIndex,
        checkpoint: str,
        dtype: torch.dtype,
        *,
        unit: bool = False,
    ) -> None:
        self._unit = unit
        self._shards, self._dtype = index.shards[checkpoint], dtype
        self._starts = [shard.start for shard in self._shards]
        self._width = index.width
        self._buffer = torch.empty(0, index.width, dtype=dtype)

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Read the rows of some examples, a range of them without copying where that is possible.

        Args:
            positions: Their positions.

        Returns:
            ``(n, D)``, not to be written to, and overwritten by the next call.
        """
        if isinstance(positions, range):
            return self.read(positions.start, positions.stop)
        return self.gather(positions)

    def read(self, start: int, stop: int) -> Tensor:
        """Read the rows of consecutive examples, divided by their norms where that was asked for.

        Returns:
            As `read_stored`.
        """
        rows = self.read_stored(start, stop)
        if not self._unit:
            return rows
        norms = rows.norm(dim=1, keepdim=True)
        return rows * torch.where(norms > 0, 1 / norms, 0)

    def read_stored(self, start: int, stop: int) -> Tensor:
        """Read the rows of consecutive examples.

        Args:
            start: Position of the first.
            stop: Position after the last.

        Returns:
            ``(stop - start, D)``, not to be written to, and overwritten by the next call.
        """
        slices = list(self._slices(start, stop))
        if len(slices) == 1:
            stored = self._as_stored(slices[0])
            if stored is not None:
                return stored
        n_rows = stop - start
        if len(self._buffer) < n_rows:
            self._buffer = self._buffer.new_empty(n_rows, self._width)
        for piece in slices:
            target = self._buffer[piece.target]
            target.copy_(piece.shard.rows[piece.source])
            if piece.shard.has_scales:
                scales = piece.shard.mapped("scales")[piece.source]
                target.mul_(scales.unsqueeze(1))
        return self._buffer[:n_rows]

    def gather(self, positions: Sequence[int]) -> Tensor:
        """Read the rows of examples in any order.

        Args:
            positions: Their positions.

        Returns:
            ``(n, D)``.
        """
        rows = torch.empty(len(positions), self._width, dtype=self._dtype)
        order_on_disk = sorted(range(len(positions)), key=positions.__getitem__)
        for place in order_on_disk:
            position = positions[place]
            rows[place] = self.read(position, position + 1)[0]
        return rows

    def _as_stored(self, piece: ShardSlice) -> Tensor | None:
        """Return the map itself, where it has the right dtype and is aligned like a tensor of torch's own."""
        # Everything else is copied, so that sums are the same to the last bit wherever shards happen to end.
        rows = piece.shard.rows[piece.source]
        is_aligned = rows.data_ptr() % ALIGNMENT == 0
        return rows if piece.shard.dtype == self._dtype and is_aligned else None

    def _slices(self, start: int, stop: int) -> Iterator[ShardSlice]:
        """Yield the shards that a range lies in, in order."""
        number = bisect.bisect_right(self._starts, start) - 1
        position = start
        while position < stop:
            shard = self._shards[number]
            end = min(stop, shard.stop)
            assert shard.start <= position < end, f"position {position} is not in the index"
            source = slice(position - shard.start, end - shard.start)
            target = slice(position - start, end - start)
            yield ShardSlice(shard, source, target)
            position, number = end, number + 1
