"""How a question is worked through: blocks of train examples, each scored at one checkpoint.

A `Source` yields the train side's features block by block, computed by the model at hand or read from an index. Each
block, contracted with the test side's features, is a `ScoredBlock`; collectors (`captum_sdi.scores.collect`) add these
up into an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from captum_sdi.features import StepFeatures
from captum_sdi.scores.contract import Scores

if TYPE_CHECKING:
    from captum_sdi.checkpoints import Checkpoint
    from captum_sdi.passes import Point


@dataclass(frozen=True)
class Block:
    """Features of consecutive examples at one checkpoint."""

    number: int
    """Of the block within a pass: the same examples have the same number at every checkpoint."""
    positions: Tensor
    """``(n,)`` of its examples in the data set."""
    features: StepFeatures


@dataclass(frozen=True)
class ScoredBlock:
    """Influence of one block's train examples on all test examples, at one checkpoint, times its weight."""

    number: int
    """As `Block.number`."""
    positions: Tensor
    """``(n,)`` of the train examples."""
    checkpoint: Checkpoint
    scores: Scores
    """``(q, n, b)``, multiplied by the checkpoint's weight."""
    n_steps: Tensor
    """``(q,)`` how many loop steps each test example ran at this checkpoint."""
    test_norms: Tensor | None = None
    """``(q, 2 + t)`` norms of the test examples' features through each of their bins; None where nobody asks."""


def scored_block(
    block: Block,
    checkpoint: Checkpoint,
    scores: Scores,
    n_steps: Tensor,
    test_norms: Tensor | None = None,
) -> ScoredBlock:
    """Say of a block's scores what they are of, and multiply them by the checkpoint's weight."""
    weighted = scores.times(checkpoint.weight)
    return ScoredBlock(
        block.number,
        block.positions,
        checkpoint,
        weighted,
        n_steps,
        test_norms,
    )


class Source(Protocol):
    """Where the train side's features come from: the model at hand, or an index."""

    def blocks(self, point: Point, only: Tensor | None = None) -> Iterator[Block]:
        """Yield the features of all train examples, or of those at some positions, at one checkpoint."""
        ...
