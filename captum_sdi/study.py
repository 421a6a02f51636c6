"""What a question is made of: a train set at some checkpoints, test examples beside it, and their scored blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from captum_sdi.blocks import ScoredBlock, Source, scored_block
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.data.examples import Examples
from captum_sdi.features import StepFeatures, join
from captum_sdi.index import SketchIndex, TrainIndex
from captum_sdi.index.search import Search
from captum_sdi.passes import Engine, Live, Point
from captum_sdi.preconditioners import Identity, Preconditioned, Preconditioner
from captum_sdi.preconditioners.shelf import Shelf
from captum_sdi.progress import HIDDEN, Progress
from captum_sdi.scores.contract import Scores, pair_scores
from captum_sdi.train_side import TrainSide

Contraction = Callable[[StepFeatures, StepFeatures], Scores]
"""``(test features with their total, train features)`` to scores: one of `captum_sdi.scores.contract`."""

Normalize = Literal["train", "both"]
"""Whose gradients are divided by their norms at each checkpoint: the train side's, or both sides'."""


@dataclass(frozen=True)
class Study:
    """A train set at some checkpoints, and how its influence is computed: what every question is asked of."""

    engine: Engine
    checkpoints: Sequence[Checkpoint]
    train: Examples
    index: TrainIndex | None = None
    """Where the train side's features are read from; None: they are computed."""
    preconditioner: Preconditioner = field(default_factory=Identity)
    normalize: Normalize | None = None
    """Whose gradients have unit norm."""
    shelf: Shelf = field(default_factory=Shelf)
    """Where what preconditioners computed is kept."""
    progress: Progress = HIDDEN

    @contextmanager
    def points(self) -> Iterator[Iterator[Point]]:
        """Open the model at every checkpoint."""
        with self.engine.points(self.checkpoints, self.train) as points:
            yield points

    def complete_index(self, index: TrainIndex) -> SketchIndex:
        """Write what an index lacks, at every checkpoint, and compare every train example with what it says."""
        with index.one_build(len(self.checkpoints)), self.points() as points:
            for point in points:
                is_first = point.checkpoint.number == 0
                sketches = self.complete_at(point, index, thorough=is_first)
        return sketches

    def complete_at(
        self,
        point: Point,
        index: TrainIndex,
        *,
        thorough: bool = False,
    ) -> SketchIndex:
        """Write what an index lacks at one checkpoint."""
        return index.complete(point, self.train, thorough=thorough, progress=self.progress)

    def preconditioned(self, point: Point) -> Preconditioned:
        """Fit the preconditioner at a checkpoint."""
        train = TrainSide(self.train, self.index, self.shelf, self.progress)
        return Preconditioned.fitted_at(point, self.preconditioner, train)

    def as_train(self, features: StepFeatures) -> StepFeatures:
        """Return the train side's features as they are contracted."""
        return features if self.normalize is None else features.unit()

    def as_tests(self, features: StepFeatures) -> StepFeatures:
        """Return the test side's features as they are contracted, totals first."""
        if self.normalize == "both":
            features = features.unit()
        return features.with_total()

    def of_train_gradients(self) -> Study:
        """Return the study in which a question's examples have the features that they have as train examples."""
        normalize: Normalize | None = None if self.normalize is None else "both"
        return replace(self, preconditioner=Identity(), normalize=normalize)

    def check_rows(self) -> None:
        """Refuse rows that the preconditioner cannot take, before any work.

        Raises:
            ValueError: If it cannot.
        """
        check = getattr(self.preconditioner, "check_rows", None)
        if check is None:
            return
        with self.points() as points:
            check(next(points).capture.blank())


@dataclass(frozen=True)
class Question:
    """Test examples beside a study's train examples."""

    study: Study
    tests: Examples
    aggregate: bool = False
    """Ask about the sum of the test losses: q is 1."""

    @contextmanager
    def scored_blocks(
        self,
        purpose: str,
        *,
        by_step: bool,
        contract: Contraction = pair_scores,
        train: Source | None = None,
        only: Tensor | None = None,
    ) -> Iterator[Iterator[ScoredBlock]]:
        """Score every block of train examples against all test examples, at every checkpoint.

        Args:
            purpose: What the progress bar says the pass is for.
            by_step: Keep the test side's loop steps apart.
            contract: What two sides' features are contracted to.
            train: Where the train side's features come from; None: the index, or else the model.
            only: Positions of the train examples to score; None: all.

        Yields:
            An iterator over scored blocks, valid inside the ``with`` block.
        """
        index = self.study.index
        if train is None and index is not None:
            yield self.searched(index, by_step=by_step).scored_blocks(contract)
            return
        n_batches = None if only is not None else self.study.train.n_batches  # of some examples nobody knows it
        n_blocks = None if n_batches is None else n_batches * len(self.study.checkpoints)
        with self.study.progress.bar(purpose, n_blocks) as bar, self.study.points() as points:
            blocks = self._live_blocks(
                points,
                train or Live(self.study.train),
                only,
                contract,
                by_step=by_step,
            )
            yield counted(blocks, bar)

    def _live_blocks(
        self,
        points: Iterable[Point],
        train: Source,
        only: Tensor | None,
        contract: Contraction,
        *,
        by_step: bool,
    ) -> Iterator[ScoredBlock]:
        for point in points:
            tests = self.test_features(point, by_step=by_step)
            norms = tests.norms()[:, 1:]  # behind that of the total
            for block in train.blocks(point, only):
                scores = contract(tests, self.study.as_train(block.features))
                yield scored_block(block, point.checkpoint, scores, tests.n_steps, norms)

    def test_features(self, point: Point, *, by_step: bool) -> StepFeatures:
        """Return P φ of all test examples at a checkpoint, totals first."""
        batches = self.test_batches(point, by_step=by_step)
        return self.study.as_tests(join(batches, aggregate=self.aggregate))

    def test_batches(self, point: Point, *, by_step: bool) -> Iterator[StepFeatures]:
        """Yield P φ of the test examples at a checkpoint, batch by batch."""
        for block in self.study.preconditioned(point).blocks(self.tests, by_step=by_step):
            yield block.features

    def searched(self, index: TrainIndex, *, by_step: bool) -> Search:
        """Put the test examples beside the index, which is completed where rows are missing."""
        checkpoints, tests = [], []
        with index.one_build(len(self.study.checkpoints)), self.study.points() as points:
            for point in points:
                sketches = self.study.complete_at(point, index)
                checkpoints.append(point.checkpoint)
                tests.append(self.test_features(point, by_step=by_step))
        return index.search(sketches, checkpoints, tests, unit=self.study.normalize is not None)


class PutsQuestions:
    """What knows a study, and puts questions: `SDIInfluence`, whose methods are in several files."""

    @abstractmethod
    def study(self, *, show_progress: bool = False, with_index: bool = True) -> Study:
        """Return the train set, the checkpoints and the methods."""
        ...

    @abstractmethod
    def _question(
        self,
        inputs: Any,
        *,
        aggregate: bool = False,
        show_progress: bool = False,
    ) -> Question:
        """Put test examples beside a study."""
        ...


def counted(blocks: Iterable[ScoredBlock], bar: Any) -> Iterator[ScoredBlock]:
    """Move a progress bar on behind every block."""
    for block in blocks:
        yield block
        bar.update()
