"""Collectors: what adds scored blocks up into an answer, and the only place that sums over checkpoints.

Blocks may come checkpoint by checkpoint, as from the model at hand, or all checkpoints of one block after the other, as
from an index: a collector takes either order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from captum_sdi.blocks import ScoredBlock
from captum_sdi.scores.contract import Scores
from captum_sdi.scores.ranking import Ranking, RunningBest, pick_winners
from captum_sdi.scores.sums import BlockSums, ScoreSums, deeper


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
        self._scores = ScoreSums(axis=1)
        self._n_steps: Tensor | None = None

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._scores.add(block.number, block.scores)
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(q, n, b)``."""
        assert self._n_steps is not None, "no block was added"
        return Sums(self._scores.result(), self._n_steps)


class SelfPairs:
    """Every example with itself: blocks ``(n, b)`` one below the other, batches of different depth, too."""

    def __init__(self) -> None:
        self._scores = ScoreSums(axis=0)
        self._n_steps: dict[int, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._scores.add(block.number, block.scores)
        earlier = self._n_steps.get(block.number)
        self._n_steps[block.number] = deeper(earlier, block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(n, b)``."""
        n_steps = torch.cat(list(self._n_steps.values()))
        return Sums(self._scores.result(), n_steps)


class Positions:
    """Which train examples came by, in order: the columns of what `AllPairs` returns."""

    def __init__(self) -> None:
        self._blocks: dict[int, Tensor] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        self._blocks[block.number] = block.positions

    def result(self) -> Tensor:
        """Return positions ``(n,)``."""
        if not self._blocks:
            return torch.empty(0, dtype=torch.long)
        position_blocks = list(self._blocks.values())
        return torch.cat(position_blocks)


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

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        values = block.scores.values
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
        """Return positions and what they are ranked by, ``(q, k)`` each, best first."""
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
        self._best.add(block.positions, self._ranking.column_of(values), values, block.scores.variances)
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> tuple[Sums, Tensor]:
        """Return the winners' scores ``(q, k, b)`` and positions ``(q, k)``, best first."""
        assert self._n_steps is not None, "no block was added"
        indices, _, values, variances = self._best.result()
        return Sums(Scores(values, variances), self._n_steps), indices


class Winners:
    """The trajectories of chosen train examples, others for each test example.

    Their variances are those of any pair. That they were chosen for being high is not in them; see
    `captum_sdi.StepInfluence.trajectory_errors`.

    Args:
        indices: ``(q, k)`` positions of train examples.
    """

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices
        self._scores = ScoreSums(axis=1)
        self._n_steps: Tensor | None = None

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        values = pick_winners(self._indices, block.positions, block.scores.values)
        variances = pick_winners(self._indices, block.positions, block.scores.variances)
        self._scores.add(0, Scores(values, variances))
        self._n_steps = deeper(self._n_steps, block.n_steps)

    def result(self) -> Sums:
        """Return the sums ``(q, k, b)``."""
        assert self._n_steps is not None, "no block was added"
        return Sums(self._scores.result(), self._n_steps)


def join_tests(parts: Sequence[Sums]) -> Sums:
    """Join the sums ``(q, k, b)`` of consecutive test examples, shallower ones padded with zeros.

    Returns:
        The sums of all test examples.
    """
    scores = ScoreSums(axis=0)
    for number, sums in enumerate(parts):
        scores.add(number, sums.scores)
    n_steps = torch.cat([sums.n_steps for sums in parts])
    return Sums(scores.result(), n_steps)


class PerCheckpoint:
    """Pairs at each checkpoint alone, times its learning rate.

    Args:
        indices: ``(q, k)`` the train examples of each test example; None: all.
    """

    def __init__(self, indices: Tensor | None = None) -> None:
        self._indices = indices
        self._collectors: dict[str, AllPairs | Winners] = {}

    def add(self, block: ScoredBlock) -> None:
        """Take one block at one checkpoint."""
        collector = self._collectors.get(block.checkpoint.name)
        if collector is None:
            collector = AllPairs() if self._indices is None else Winners(self._indices)
            self._collectors[block.checkpoint.name] = collector
        collector.add(block)

    def result(self) -> dict[str, Sums]:
        """Return the sums ``(q, n, b)`` by the checkpoint's name."""
        return {name: collector.result() for name, collector in self._collectors.items()}
