"""Collectors: what adds scored blocks up into an answer, and the only place that sums over checkpoints.

Blocks may come checkpoint by checkpoint, as from the model at hand, or all checkpoints of one block after the other, as
from an index: a collector takes either order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.blocks import ScoredBlock
from captum_sdi.features import Columns
from captum_sdi.scores.contract import Scores


class Collector(Protocol):
    """Adds up scored blocks; write one for another answer from the same pass."""

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        ...

    def result(self) -> Any:
        """Return the answer from all blocks taken."""
        ...


class Sums(NamedTuple):
    """Scores summed over checkpoints, of all examples in order."""

    scores: Scores
    """``(q, n, b)``, or ``(n, b)`` of examples against themselves."""
    n_steps: Tensor
    """``(q,)`` or ``(n,)`` how many loop steps each example ran at most."""


class AllValues:
    """The values alone of every pair: totals, or matrices of steps."""

    def __init__(self) -> None:
        self._values = BlockSums(axis=1)

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._values.add(block.number, block.scores.values)

    def result(self) -> Tensor:
        """Return the sums ``(q, n, ...)``."""
        return self._values.result()


class AllPairs:
    """Every pair of a test and a train example."""

    def __init__(self) -> None:
        self._values, self._variances = BlockSums(axis=1), BlockSums(axis=1)
        self._n_steps: Tensor | None = None

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._values.add(block.number, block.scores.values)
        self._variances.add(block.number, block.scores.variances)
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(q, n, b)``."""
        assert self._n_steps is not None, "no block was added"
        return Sums(Scores(self._values.result(), self._variances.result()), self._n_steps)


class SelfPairs:
    """Every example with itself: blocks ``(n, b)`` one below the other, test batches of different depth, too."""

    def __init__(self) -> None:
        self._values, self._variances = BlockSums(axis=0), BlockSums(axis=0)
        self._n_steps: dict[int, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._values.add(block.number, block.scores.values)
        self._variances.add(block.number, block.scores.variances)
        self._n_steps[block.number] = deeper(self._n_steps.get(block.number), block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(n, b)``."""
        scores = Scores(self._values.result(), self._variances.result())
        return Sums(scores, torch.cat(list(self._n_steps.values())))


class Positions:
    """Which train examples came by, in order: the columns of what `AllPairs` returns."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._blocks[block.number] = block.positions

    def result(self) -> Tensor:
        """Return positions ``(n,)``."""
        return torch.cat(list(self._blocks.values())) if self._blocks else torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Ranking:
    """Which train examples are the best ones."""

    k: int
    """How many; clipped to n."""
    proponents: bool
    """The highest scores first; False: the lowest."""
    column: int = Columns.TOTAL
    """The column of the scores that they are ranked by."""

    def column_of(self, values: Tensor) -> Tensor:
        """Return what ``(..., b)`` is ranked by, zero where a checkpoint runs fewer steps than the column's."""
        if self.column < values.shape[-1]:
            return values[..., self.column]
        return torch.zeros_like(values[..., 0])

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Pick the k best columns of each row; of equal ones the first.

        Args:
            scores: ``(q, n)``.

        Returns:
            Their indices and scores, ``(q, k)`` each, best first.

        Example:
            >>> Ranking(k=2, proponents=True).best(torch.tensor([[1.0, 3.0, 3.0]]))[0]
            tensor([[1, 2]])
        """
        values, indices = torch.sort(scores, dim=1, descending=self.proponents, stable=True)
        return indices[:, : self.k], values[:, : self.k]

    def check_column(self, n_columns: int) -> None:
        """Refuse to rank by a loop step that the test side does not run.

        Raises:
            ValueError: If the column is beyond the deepest test example's last step.
        """
        if self.column >= n_columns:
            rank_by, n_steps = Columns.n_steps(self.column), Columns.n_steps(n_columns)
            raise ValueError(f"rank_by={rank_by}, but the test side runs {n_steps} loop steps (0-based).")


class TopExamples:
    """The k best train examples of each test example, by one number per pair.

    What is kept of a block is ``(q, n)`` until its last checkpoint has come, and then its winners alone.

    Args:
        ranking: Which examples are the best.
        n_checkpoints: How many blocks of one number there are.
    """

    def __init__(self, ranking: Ranking, n_checkpoints: int) -> None:
        self._ranking, self._n_checkpoints = ranking, n_checkpoints
        self._best = RunningBest(ranking)
        self._pending: dict[int, tuple[int, Tensor]] = {}
        self._n_columns = 0

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        values = block.scores.values
        self._n_columns = max(self._n_columns, values.shape[-1])
        if self._n_checkpoints == 1:
            self._ranking.check_column(self._n_columns)
        ranked = self._ranking.column_of(values)
        n_summed, total = 1, ranked
        if block.number in self._pending:
            n_earlier, earlier = self._pending.pop(block.number)
            n_summed, total = n_earlier + 1, earlier + ranked
        if n_summed < self._n_checkpoints:
            self._pending[block.number] = n_summed, total
        else:
            self._best.add(block.positions, total)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return positions and what they are ranked by, ``(q, k)`` each, best first.

        Raises:
            ValueError: If they are ranked by a step that no test example ran.
        """
        self._ranking.check_column(self._n_columns)
        indices, ranked = self._best.result()
        return indices, ranked


class TopTrajectories:
    """The k best train examples of each test example with their trajectories, where there is one checkpoint."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._best = RunningBest(ranking)
        self._n_steps: Tensor | None = None

    def add(self, block: ScoredBlock) -> None:
        """Take one block."""
        values = block.scores.values
        self._ranking.check_column(values.shape[-1])
        self._best.add(block.positions, self._ranking.column_of(values), values, block.scores.variances)
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> tuple[Sums, Tensor]:
        """Return the winners' scores ``(q, k, b)`` and positions ``(q, k)``, best first."""
        assert self._n_steps is not None, "no block was added"
        indices, _, values, variances = self._best.result()
        return Sums(Scores(values, variances), self._n_steps), indices


class Winners:
    """The trajectories of chosen train examples, others for each test example.

    Args:
        indices: ``(q, k)`` positions of train examples.
    """

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices
        self._values, self._variances = BlockSums(), BlockSums()
        self._n_steps: Tensor | None = None

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._values.add(0, pick_winners(self._indices, block.positions, block.scores.values))
        self._variances.add(0, pick_winners(self._indices, block.positions, block.scores.variances))
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(q, k, b)``."""
        assert self._n_steps is not None, "no block was added"
        return Sums(Scores(self._values.result(), self._variances.result()), self._n_steps)


def join_tests(parts: Sequence[Sums]) -> Sums:
    """Join the sums ``(q, k, b)`` of consecutive test examples, shallower ones padded with zeros.

    Returns:
        The sums of all test examples.
    """
    values = equally_deep([sums.scores.values for sums in parts], joined_axis=0)
    variances = equally_deep([sums.scores.variances for sums in parts], joined_axis=0)
    n_steps = torch.cat([sums.n_steps for sums in parts])
    return Sums(Scores(torch.cat(values), torch.cat(variances)), n_steps)


class PerCheckpoint:
    """Every pair at each checkpoint alone, times its learning rate."""

    def __init__(self) -> None:
        self._collectors: dict[str, AllPairs] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._collectors.setdefault(block.checkpoint.name, AllPairs()).add(block)

    def result(self) -> dict[str, Sums]:
        """Return the sums ``(q, n, b)`` by the checkpoint's name."""
        return {name: collector.result() for name, collector in self._collectors.items()}


# --- what the collectors are made of ---


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


def deeper(n_steps: Tensor | None, other: Tensor) -> Tensor:
    """Return the larger of two depths for each example, of which the first may not be known yet."""
    return other if n_steps is None else torch.maximum(n_steps, other)


class RunningBest:
    """The k best train examples of each test example so far, each with what is known about the pair."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._kept: list[Tensor] | None = None

    def add(self, positions: Tensor, ranked: Tensor, *payloads: Tensor) -> None:
        """Offer a block of train examples.

        Args:
            positions: ``(n,)``, or ``(q, n)`` where they differ, their positions, higher than those offered before.
            ranked: ``(q, n)`` what they are ranked by.
            *payloads: ``(q, n, ...)`` what is kept with each pair.
        """
        offered = [positions.to(ranked.device).expand(ranked.shape), ranked, *payloads]
        if self._kept is not None:
            offered = self._contenders(self._kept[1], offered)
            offered = [torch.cat(pair, dim=1) for pair in zip(self._kept, offered, strict=True)]
        order, _ = self._ranking.best(offered[1])
        self._kept = [gather_pairs(tensor, order) for tensor in offered]

    def _contenders(self, best: Tensor, offered: list[Tensor]) -> list[Tensor]:
        """Leave out the examples that beat nobody: nearly all of them, after a while, and sorting is slow."""
        if best.shape[1] < self._ranking.k:
            return offered
        ranked, worst = offered[1], best[:, -1:]
        beats = ranked > worst if self._ranking.proponents else ranked < worst
        columns = beats.any(0).nonzero().flatten()
        return [tensor.index_select(1, columns) for tensor in offered]

    def result(self) -> list[Tensor]:
        """Return ``indices (q, k)``, what they were ranked by ``(q, k)``, and the payloads ``(q, k, ...)``."""
        assert self._kept is not None, "no block was added"
        return self._kept


def pick_winners(indices: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Pick the winners' scores from a block's.

    Args:
        indices: ``(q, k)`` the winners' positions.
        positions: ``(n,)`` the block's.
        values: ``(q, n, b)``.

    Returns:
        ``(q, k, b)``, zero where the winner is not in this block.
    """
    hits = indices.unsqueeze(-1) == positions.to(indices.device)  # (q, k, n)
    picked = gather_pairs(values, hits.int().argmax(-1))
    return picked * hits.any(-1).unsqueeze(-1)


def gather_pairs(tensor: Tensor, order: Tensor) -> Tensor:
    """Return ``(q, n, ...)`` at the columns ``(q, k)`` of each row."""
    further = tensor.shape[2:]
    index = order.reshape(*order.shape, *(1 for _ in further)).expand(*order.shape, *further)
    return tensor.gather(1, index)
