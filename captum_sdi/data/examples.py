"""Examples of one side of a question, and how they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import batch_size
from captum_sdi.data.fingerprints import batch_fingerprint
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream


@dataclass(frozen=True)
class Examples:
    """A stream of batches, and the loss and forward keywords that they are run with."""

    stream: Stream
    side: Side

    @property
    def n_batches(self) -> int | None:
        """How many batches there are; None where only a pass can tell."""
        try:
            return len(self.stream)
        except TypeError:
            return None

    def batches(self, only: Tensor | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Read the stream, or the examples at some positions alone.

        Args:
            only: Positions; None: all.

        Yields:
            The positions of a batch's examples ``(n,)``, and the batch.
        """
        if only is not None:
            yield from self.stream.picked(only)
            return
        for start, raw in self.stream:
            yield torch.arange(start, start + batch_size(raw)), raw

    def collated_alone(self, position: int) -> Any:
        """Return the batch of one example alone, as with batch_size=1.

        Returns:
            None where the loader has no dataset in its own order, or this one's rows differ at every reading.
        """
        batches = []
        for _ in range(2):
            batch = self.stream.collated_alone(position)
            if batch is None or batch_size(batch) != 1:
                return None
            batches.append(batch)
        first, second = batches
        return first if batch_fingerprint(first) == batch_fingerprint(second) else None
