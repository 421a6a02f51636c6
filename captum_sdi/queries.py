"""Questions: all pairs, the top k, exact re-ranking, matrices of steps, every example with itself.

Each opens scored blocks, from the model at hand or from an index, and adds them to a collector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.blocks import Block, ScoredBlock, Source
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.data.examples import Examples
from captum_sdi.features import Columns, StepFeatures, join
from captum_sdi.index import SketchIndex, TrainIndex
from captum_sdi.index.search import Search
from captum_sdi.index.source import Indexed
from captum_sdi.passes import Engine, Live, Point
from captum_sdi.preconditioners import Identity, Preconditioner, apply_to_rows, preconditioned_blocks
from captum_sdi.progress import HIDDEN, Progress
from captum_sdi.scores.collect import (
    AllPairs,
    AllValues,
    Collector,
    Positions,
    SelfPairs,
    Sums,
    TopExamples,
    TopTrajectories,
    Winners,
    join_tests,
)
from captum_sdi.scores.contract import Scores, pair_scores, pair_values, self_scores, step_matrices
from captum_sdi.scores.ranking import Ranking, gather_pairs
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.exact import Exact

Contraction = Callable[[StepFeatures, StepFeatures], Scores]
"""``(test features with their total, train features)`` to scores: one of `captum_sdi.scores.contract`."""


@dataclass(frozen=True)
class Study:
    """A train set at some checkpoints, and how its influence is computed: what every question is asked of."""

    engine: Engine
    checkpoints: Sequence[Checkpoint]
    train: Examples
    index: TrainIndex | None = None
    """Where the train side's features are read from; None: they are computed."""
    preconditioner: Preconditioner = field(default_factory=Identity)
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

    def complete_at(self, point: Point, index: TrainIndex, *, thorough: bool = False) -> SketchIndex:
        """Write what an index lacks at one checkpoint."""
        return index.complete(point, self.train, thorough=thorough, progress=self.progress)


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
        n_batches = self.study.train.n_batches
        is_counted = n_batches is not None and only is None  # nobody knows which batches hold those of `only`
        n_blocks = n_batches * len(self.study.checkpoints) if is_counted else None
        with self.study.progress.bar(purpose, n_blocks) as bar, self.study.points() as points:
            blocks = self._live_blocks(points, train or Live(self.study.train), only, contract, by_step=by_step)
            yield counted(blocks, bar)

    def _live_blocks(
        self, points: Iterable[Point], train: Source, only: Tensor | None, contract: Contraction, *, by_step: bool
    ) -> Iterator[ScoredBlock]:
        for point in points:
            tests = self.test_features(point, by_step=by_step)
            for block in train.blocks(point, only):
                scores = contract(tests, block.features).times(point.checkpoint.rate)
                yield ScoredBlock(block.number, block.positions, point.checkpoint, scores, tests.n_steps)

    def test_features(self, point: Point, *, by_step: bool) -> StepFeatures:
        """Return P φ of all test examples at a checkpoint, totals first."""
        batches = self.test_batches(point, by_step=by_step)
        return join(batches, aggregate=self.aggregate).with_total()

    def test_batches(self, point: Point, *, by_step: bool) -> Iterator[StepFeatures]:
        """Yield P φ of the test examples at a checkpoint, batch by batch."""
        train = Live(self.study.train)
        for block in preconditioned_blocks(self.study.preconditioner, point, train, self.tests, by_step=by_step):
            yield block.features

    def searched(self, index: TrainIndex, *, by_step: bool) -> Search:
        """Put the test examples beside the index, which is completed where rows are missing."""
        checkpoints, tests = [], []
        with index.one_build(len(self.study.checkpoints)), self.study.points() as points:
            for point in points:
                sketches = self.study.complete_at(point, index)
                checkpoints.append(point.checkpoint)
                tests.append(self.test_features(point, by_step=by_step))
        return index.search(sketches, checkpoints, tests)


def counted(blocks: Iterable[ScoredBlock], bar: Any) -> Iterator[ScoredBlock]:
    """Move a progress bar on behind every block."""
    for block in blocks:
        yield block
        bar.update()


def collect(blocks: Iterable[ScoredBlock], collector: Collector) -> None:
    """Add all blocks to a collector."""
    for block in blocks:
        collector.add(block)


# --- all pairs ---


def total_influence(question: Question) -> Tensor:
    """Compute the influence of every train example on every test example, ``(q, n)``."""
    values = AllValues()
    purpose = "compute influence for training batches"
    with question.scored_blocks(purpose, by_step=False, contract=pair_values) as blocks:
        collect(blocks, values)
    return values.result()[..., Columns.TOTAL]


def step_influence(question: Question) -> StepInfluence:
    """Compute the trajectories of all pairs, ``(q, n, t)``."""
    pairs = AllPairs()
    with question.scored_blocks("compute step influence for training batches", by_step=True) as blocks:
        collect(blocks, pairs)
    return StepInfluence.from_sums(*pairs.result())


def step_matrix(question: Question, indices: Tensor | None) -> Tensor:
    """Compute the influence of every train step on every test step, ``(q, n, s, t)``.

    Args:
        question: The test examples.
        indices: Positions of the train examples; None: all.

    Returns:
        The matrices, in the order of the indices.

    Raises:
        ValueError: If an index is not in the train set.
    """
    matrices, positions = AllValues(), Positions()
    train = Live(question.study.train, by_step=True)
    hidden = replace(question, study=replace(question.study, progress=HIDDEN))
    with hidden.scored_blocks("", by_step=True, contract=step_matrices, train=train, only=indices) as blocks:
        for block in blocks:
            matrices.add(block)
            positions.add(block)
    if indices is None:
        return matrices.result()
    columns = {position: column for column, position in enumerate(positions.result().tolist())}
    unknown = [index for index in indices.tolist() if index not in columns]
    if unknown:
        raise ValueError(f"indices= names training examples {unknown}, which train_dataset does not have.")
    return matrices.result()[:, [columns[index] for index in indices.tolist()]]


# --- the top k ---


def top_examples(question: Question, ranking: Ranking) -> tuple[Tensor, Tensor]:
    """Find the winners by one number per pair: positions and scores, ``(q, k)`` each."""
    index, by_step = question.study.index, ranking.column != Columns.TOTAL
    if index is not None:
        search = question.searched(index, by_step=by_step)
        ranking.check_column(search.n_columns)
        return search.top(ranking)
    best = TopExamples(ranking, len(question.study.checkpoints))
    with question.scored_blocks(ranking_purpose(ranking), by_step=by_step, contract=pair_values) as blocks:
        collect(blocks, best)
    return best.result()


def top_step_influence(question: Question, ranking: Ranking) -> StepInfluence:
    """Find the winners and their trajectories, ``(q, k, t)``; memory grows by one number per pair at most."""
    index = question.study.index
    if index is not None:
        search = question.searched(index, by_step=True)
        ranking.check_column(search.n_columns)
        indices, _ = search.top(ranking)
        return StepInfluence.from_sums(*search.winners(indices), indices)
    if len(question.study.checkpoints) > 1:
        return top_in_two_passes(question, ranking)
    best = TopTrajectories(ranking)
    with question.scored_blocks(ranking_purpose(ranking), by_step=True) as blocks:
        collect(blocks, best)
    sums, indices = best.result()
    return StepInfluence.from_sums(*sums, indices)


def top_in_two_passes(question: Question, ranking: Ranking) -> StepInfluence:
    """Find the winners of several checkpoints in one pass, their trajectories in a short second one."""
    indices, _ = top_examples(question, ranking)
    winners = Winners(indices)
    purpose = "score winners step by step"
    with question.scored_blocks(purpose, by_step=True, only=indices.unique().cpu()) as blocks:
        collect(blocks, winners)
    return StepInfluence.from_sums(*winners.result(), indices)


def reranked(question: Question, ranking: Ranking, n_candidates: int) -> tuple[Sums, Tensor]:
    """Let sketches shortlist and exact gradients of the shortlisted train examples decide.

    Args:
        question: The test examples.
        ranking: How many winners, and what they are ranked by.
        n_candidates: How many train examples are shortlisted for each test example.

    Returns:
        The winners' exact scores ``(q, k, b)``, and their positions ``(q, k)``.
    """
    candidates, _ = top_examples(question, replace(ranking, k=n_candidates))
    candidates = candidates.sort(dim=1).values
    engine = question.study.engine.with_sketch(Exact())
    exact = replace(question, study=replace(question.study, engine=engine, index=None))
    sums = join_tests([winners.result() for winners in exact_winners(exact, candidates)])
    values = sums.scores.values
    ranking.check_column(values.shape[-1])
    order, _ = ranking.best(ranking.column_of(values))
    best = gather_pairs(values, order)
    return Sums(Scores(best, torch.zeros_like(best)), sums.n_steps), candidates.gather(1, order)


def exact_winners(question: Question, candidates: Tensor) -> list[Winners]:
    """Score each test batch's candidates alone: exact gradients of one batch are held at a time."""
    collectors: dict[int, Winners] = {}
    train = Live(question.study.train)
    with question.study.points() as points:
        for point in points:
            batches = question.test_batches(point, by_step=True)
            if question.aggregate:
                batches = iter([join(batches, aggregate=True)])
            start = 0
            for number, batch in enumerate(batches):
                own_candidates = candidates[start : start + batch.size]
                start += batch.size
                winners = collectors.setdefault(number, Winners(own_candidates))
                tests = batch.with_total()
                for block in train.blocks(point, own_candidates.unique().cpu()):
                    scores = pair_values(tests, block.features).times(point.checkpoint.rate)
                    winners.add(ScoredBlock(block.number, block.positions, point.checkpoint, scores, tests.n_steps))
    return list(collectors.values())


def ranking_purpose(ranking: Ranking) -> str:
    """Say, as Captum does, what a pass for the top k is for."""
    sought = "proponents" if ranking.proponents else "opponents"
    return f"perform computation for getting {sought}. Processing training batches"


# --- every example with itself, and vectors ---


def self_influence(study: Study, examples: Examples, *, by_step: bool) -> Sums:
    """Score every example against itself, ``(n, b)``, under one progress bar over all batches."""
    pairs = SelfPairs()
    n_batches = examples.n_batches
    n_blocks = None if n_batches is None else n_batches * len(study.checkpoints)
    with study.progress.bar("compute self influence. Processing batch", n_blocks) as bar, study.points() as points:
        for point in points:
            collect(counted(self_blocks(study, point, examples, by_step=by_step), bar), pairs)
    return pairs.result()


def self_influence_by_checkpoints(study: Study, examples: Examples) -> Sums:
    """Score every example against itself, ``(n, 1)``, under a bar over checkpoints and one over each's batches."""
    pairs = SelfPairs()
    purpose = "compute self influence. Processing"
    outer = study.progress.bar(f"{purpose} checkpoint", len(study.checkpoints))
    with outer as checkpoint_bar, study.points() as points:
        for point in points:
            with study.progress.bar(f"{purpose} batch", examples.n_batches) as bar:
                collect(counted(self_blocks(study, point, examples, by_step=False), bar), pairs)
            checkpoint_bar.update()
    return pairs.result()


def self_blocks(study: Study, point: Point, examples: Examples, *, by_step: bool) -> Iterator[ScoredBlock]:
    """Score every example against itself at one checkpoint: ⟨g, P φ⟩ of the same example."""
    for block, test_features in both_sides(study, point, examples, by_step=by_step):
        scores = self_scores(test_features, block.features).times(point.checkpoint.rate)
        yield ScoredBlock(block.number, block.positions, point.checkpoint, scores, block.features.n_steps)


def both_sides(
    study: Study, point: Point, examples: Examples, *, by_step: bool
) -> Iterator[tuple[Block, StepFeatures]]:
    """Yield the features of each block of examples as train examples, g, and as test examples, P φ."""
    preconditioner = study.preconditioner
    fitted = preconditioner.fit(point, Live(study.train))
    if preconditioner.acts_on == "gradient":
        for number, (positions, raw) in enumerate(examples.batches()):
            side, places = examples.side, positions.tolist()
            train = point.batch(raw, side, places, by_step=by_step)
            test = point.batch(raw, side, places, by_step=by_step, transform=fitted)
            yield Block(number, positions, train), test
        return
    if study.index is None:
        blocks = point.blocks(examples, by_step=by_step)
    else:
        sketches = replace(study, progress=HIDDEN).complete_at(point, study.index)
        blocks = Indexed(sketches).blocks(point)
    for block in blocks:
        yield block, apply_to_rows(fitted, block.features)


def gradient_vectors(study: Study, examples: Examples, *, aggregate: bool, as_tests: bool) -> Tensor:
    """Lay features out as vectors ``(n, D)`` whose dot products are influences, √η on each side.

    Args:
        study: What the examples are run with.
        examples: The examples.
        aggregate: Sum over the examples: n is 1.
        as_tests: Apply the preconditioner, which acts on the test side.

    Returns:
        One vector for each example.

    Raises:
        ValueError: If a learning rate is negative.
    """
    preconditioner = study.preconditioner if as_tests else Identity()
    question = Question(replace(study, preconditioner=preconditioner), examples, aggregate)
    width = getattr(study.engine.sketch, "dim", 0)  # what is kept exactly is padded to it
    vectors: list[Tensor] = []
    with study.engine.points(study.checkpoints, examples) as points:
        for point in points:
            rate = point.checkpoint.rate
            if rate < 0:
                raise ValueError(f"A learning rate of {rate} has no square root; influence() takes it.")
            rows = list(question.test_features(point, by_step=False).rows.values())
            padded = [F.pad(row[:, Columns.TOTAL], (0, max(0, width - row.shape[-1]))) for row in rows]
            vectors.append(math.sqrt(rate) * torch.cat([row.to(rows[0].device) for row in padded], 1))
    return torch.cat(vectors, dim=1)
