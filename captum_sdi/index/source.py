"""`Indexed`: the train side's features read from an index, a `captum_sdi.blocks.Source`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_sdi.blocks import Block
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.reader import Reader
from captum_sdi.precision import score_dtype

if TYPE_CHECKING:
    from captum_sdi.passes import Point


class Indexed:
    """The train side read from an index.

    Args:
        index: The index, complete at the checkpoints that will be asked for.
    """

    def __init__(self, index: SketchIndex) -> None:
        self._index = index

    def blocks(self, point: Point, only: Tensor | None = None) -> Iterator[Block]:
        """Read the features of all train examples, or of those at some positions, at one checkpoint.

        Args:
            point: The checkpoint.
            only: Positions of the examples to read; None: all.

        Yields:
            Features of one bin, on the CPU, overwritten by the next block's.
        """
        reader = Reader(self._index, point.checkpoint.name, score_dtype(point.model))
        for number, positions in enumerate(self._pieces(only)):
            features = self._index.features(reader.rows(positions))
            yield Block(number, torch.tensor(positions), features)

    def _pieces(self, only: Tensor | None) -> Iterator[Sequence[int]]:
        """Yield the positions that are read at once."""
        positions: Sequence[int] = range(self._index.n_examples) if only is None else only.tolist()
        for first in range(0, len(positions), self._index.piece):
            yield positions[first : first + self._index.piece]
