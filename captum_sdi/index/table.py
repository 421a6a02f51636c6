"""`RowTable`: the rows of several checkpoints of an index side by side, as one matrix that is read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.reader import Reader

BLOCK = 4096
"""Examples that are looked through at once."""


class RowTable:
    """A matrix of n examples, each with its rows at all checkpoints side by side.

    Args:
        index: A complete index.
        checkpoints: The checkpoints' names.
        dtype: Of the rows.
        unit: Divide every row at each checkpoint by its norm.
    """

    def __init__(
        self,
        index: SketchIndex,
        checkpoints: Sequence[str],
        dtype: torch.dtype,
        *,
        unit: bool = False,
    ) -> None:
        self.folder = index.path
        """Where what is derived from the rows may be kept."""
        self.n_examples = index.n_examples
        self.readers = [Reader(index, name, dtype, unit=unit) for name in checkpoints]
        """One per checkpoint."""
        self.width = index.width * len(self.readers)
        """Numbers per example, all checkpoints together."""
        self.identity: list[Any] = [index.manifest.owner(name) for name in checkpoints] + [self.n_examples]
        """What the rows depend on, as JSON can hold it."""
        if unit:
            self.identity.append("unit norm")

    def blocks(self) -> Iterator[Tensor]:
        """Read all rows.

        Yields:
            ``(n, width)`` float32 on the CPU, in order; overwritten by the next.
        """
        for start in range(0, self.n_examples, BLOCK):
            stop = min(start + BLOCK, self.n_examples)
            columns = [reader.read(start, stop) for reader in self.readers]
            rows = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
            yield rows.float()

    def gathered(self, positions: Sequence[int]) -> Tensor:
        """Read the rows of some examples.

        Args:
            positions: Their positions.

        Returns:
            ``(n, width)``.
        """
        return torch.cat([reader.gather(positions) for reader in self.readers], dim=1)
