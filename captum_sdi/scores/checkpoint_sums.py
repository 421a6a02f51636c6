"""A collector of what each checkpoint contributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from captum_sdi.blocks import ScoredBlock
from captum_sdi.features import Columns
from captum_sdi.scores.checkpoint_shares import CheckpointShares
from captum_sdi.scores.ranking import pick_winners
from captum_sdi.scores.sums import equally_deep


class CheckpointSums:
    """A collector: how much each checkpoint contributes, and the test side's norms there.

    Args:
        indices: ``(q, k)`` train examples, others for each test example, whose pairs count; None: all pairs.
    """

    def __init__(self, indices: Tensor | None = None) -> None:
        self._indices = indices
        self._sizes: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        totals = block.scores.values[..., Columns.TOTAL : Columns.TOTAL + 1]
        if self._indices is not None:
            totals = pick_winners(self._indices, block.positions, totals)
        name = block.checkpoint.name
        size = totals.double().abs().sum().cpu()
        self._sizes[name] = self._sizes.get(name, torch.zeros_like(size)) + size
        if block.test_norms is not None:
            self._norms[name] = block.test_norms

    def result(self, losses: Mapping[str, float] | None = None) -> CheckpointShares:
        """Return the shares.

        Args:
            losses: The training loss at each checkpoint, as far as it is known.
        """
        names = tuple(self._sizes)
        sizes = torch.stack(list(self._sizes.values()))
        total = sizes.sum()
        shares = torch.where(total == 0, 0, sizes / total)
        known = [(losses or {}).get(name, torch.nan) for name in names]
        norms = None
        if self._norms:
            by_checkpoint = equally_deep(list(self._norms.values()))
            norms = torch.stack(by_checkpoint, dim=1)
        return CheckpointShares(names, shares, torch.tensor(known, dtype=shares.dtype), norms)
