"""Sums over checkpoints of blocks that follow each other and may differ in depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.scores.contract import Scores


class BlockSums:
    """Sums over checkpoints of blocks of tensors, which may differ in depth; shallower ones are padded with zeros.

    Args:
        axis: The axis along which the blocks follow each other.
    """

    def __init__(self, axis: int = 1) -> None:
        self._axis = axis
        self._blocks: dict[int, Tensor] = {}

    def add(self, number: int, block: Tensor) -> None:
        """Add to the block of that number."""
        if number in self._blocks:
            pair = equally_deep([self._blocks[number], block])
            block = torch.stack(pair).sum(0)
        self._blocks[number] = block

    def result(self) -> Tensor:
        """Return all blocks together, in the order of their numbers' first appearance."""
        blocks = list(self._blocks.values())
        return torch.cat(equally_deep(blocks, joined_axis=self._axis), dim=self._axis)


class ScoreSums:
    """Sums over checkpoints of blocks of scores, values and variances.

    Args:
        axis: The axis along which the blocks follow each other.
    """

    def __init__(self, axis: int) -> None:
        self._values = BlockSums(axis)
        self._variances = BlockSums(axis)

    def add(self, number: int, scores: Scores) -> None:
        """Add to the block of that number."""
        self._values.add(number, scores.values)
        self._variances.add(number, scores.variances)

    def result(self) -> Scores:
        """Return all blocks together."""
        return Scores(self._values.result(), self._variances.result())


def equally_deep(blocks: list[Tensor], joined_axis: int | None = None) -> list[Tensor]:
    """Zero-pad blocks to a common shape, along every axis but the one they will be joined at."""
    n_axes = blocks[0].ndim
    shape = [max(block.shape[axis] for block in blocks) for axis in range(n_axes)]
    padded = []
    for block in blocks:
        padding: list[int] = []
        for axis in reversed(range(n_axes)):  # F.pad wants (before, behind) from the last axis to the first
            missing = 0 if axis == joined_axis else shape[axis] - block.shape[axis]
            padding += [0, missing]
        padded.append(F.pad(block, padding))
    return padded


def deeper(n_steps: Tensor | None, block_steps: Tensor) -> Tensor:
    """Return the larger of two depths for each example, of which the first may not be known yet."""
    return block_steps if n_steps is None else torch.maximum(n_steps, block_steps)
