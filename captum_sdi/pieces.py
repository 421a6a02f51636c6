"""Batches in pieces that fit into the GPU's memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from captum_sdi.capture.featurizer import Capture
from captum_sdi.capture.tokens import Unit
from captum_sdi.data.batch import batch_size, select
from captum_sdi.data.side import Side
from captum_sdi.features import Gradient, StepFeatures, concatenate
from captum_sdi.words import warn_user


class Pieces:
    """Computes features of whole batches, and of ever smaller pieces of them once memory has run out."""

    def __init__(self) -> None:
        self._largest = sys.maxsize  # how many examples fit, once that is known

    def features(
        self,
        capture: Capture,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        by_step: bool,
        unit: Unit = "example",
        transform: Callable[[str, Gradient], Gradient] | None = None,
        checks_uses: bool = False,
    ) -> StepFeatures:
        """Compute the features of a batch, as `captum_sdi.passes.Point.batch` does."""
        pieces: list[StepFeatures] = []
        n_done = 0
        while n_done < len(positions):
            stop = min(n_done + self._largest, len(positions))
            takes_batch = stop - n_done == len(positions)
            piece = raw if takes_batch else select(raw, range(n_done, stop))
            try:
                own_positions = positions[n_done:stop]
                pieces.append(
                    capture(
                        piece,
                        side,
                        by_step=by_step,
                        positions=own_positions,
                        unit=unit,
                        transform=transform,
                        checks_uses=checks_uses,
                    )
                )
                n_done = stop
                continue
            except torch.OutOfMemoryError:
                if batch_size(piece) == 1:
                    raise
            # Outside the except block, or the exception would keep the failed pass's activations alive.
            self._halve(stop - n_done)
        return pieces[0] if len(pieces) == 1 else concatenate(pieces)

    def _halve(self, size: int) -> None:
        self._largest = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn_user(
            f"The GPU's memory does not suffice for {size} examples: going on with {self._largest} at a time. "
            f"batch_size={self._largest} would save the failed attempts."
        )
