"""The questions: all pairs, the top k, exact re-ranking, matrices of steps, every example with itself.

Each opens scored blocks, from the model at hand or from an index, and adds them to a collector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.blocks import Block, ScoredBlock, scored_block
from captum_sdi.checkpoints.training_losses import training_losses
from captum_sdi.data.examples import Examples
from captum_sdi.features import Columns, StepFeatures, join
from captum_sdi.index.source import Indexed
from captum_sdi.passes import Live, Point
from captum_sdi.progress import HIDDEN
from captum_sdi.scores.checkpoint_sums import CheckpointSums
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
from captum_sdi.scores.contract import Scores, pair_values, self_scores, step_matrices
from captum_sdi.scores.ranking import Ranking, gather_pairs
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.exact import Exact
from captum_sdi.study import Contraction, Question, Study, counted


def collect(blocks: Iterable[ScoredBlock], *collectors: Collector) -> None:
    """Add all blocks to each collector."""
    for block in blocks:
        for collector in collectors:
            collector.add(block)


def with_shares(
    study: Study,
    sums: Sums,
    checkpoint_sums: CheckpointSums,
    indices: Tensor | None = None,
) -> StepInfluence:
    """Build a result that says which checkpoint speaks, and warn where nearly all comes from one of several."""
    losses = training_losses(study.checkpoints)
    checkpoints = checkpoint_sums.result(losses)
    checkpoints.warn()
    steps = StepInfluence.from_sums(*sums, indices, checkpoints)
    return replace(steps, is_normalized=study.normalize is not None)


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
    pairs, checkpoint_sums = AllPairs(), CheckpointSums()
    with question.scored_blocks("compute step influence for training batches", by_step=True) as blocks:
        collect(blocks, pairs, checkpoint_sums)
    return with_shares(question.study, pairs.result(), checkpoint_sums)


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
    purpose = "compute step matrices for training batches"
    with question.scored_blocks(purpose, by_step=True, contract=step_matrices, train=train, only=indices) as blocks:
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
        return question.searched(index, by_step=by_step).top(ranking)
    best = TopExamples(ranking, len(question.study.checkpoints))
    with question.scored_blocks(ranking_purpose(ranking), by_step=by_step, contract=pair_values) as blocks:
        collect(blocks, best)
    return best.result()


def check_depth(question: Question, ranking: Ranking) -> None:
    """Refuse to rank by a loop step that no test example runs, before a train example is read.

    Args:
        question: The test examples, which are run up to the first checkpoint at which one is deep enough.
        ranking: What is ranked by.

    Raises:
        ValueError: If no test example runs that many steps at any checkpoint.
    """
    if ranking.column == Columns.TOTAL:
        return
    n_columns = 0
    with question.study.points() as points:
        for point in points:
            for block in point.blocks(question.tests, by_step=True):
                deepest = int(block.features.n_steps.max())
                n_columns = max(n_columns, Columns.of_step(deepest))
            if ranking.column < n_columns:
                return
    ranking.check_column(n_columns)


def top_step_influence(question: Question, ranking: Ranking) -> StepInfluence:
    """Find the winners and their trajectories, ``(q, k, t)``; memory grows by one number per pair at most."""
    check_depth(question, ranking)
    index = question.study.index
    if index is not None:
        search = question.searched(index, by_step=True)
        indices, _ = search.top(ranking)
        return chosen_influence(question.study, search.chosen_blocks(indices), indices)
    if len(question.study.checkpoints) > 1:
        return top_in_two_passes(question, ranking)
    best, checkpoint_sums = TopTrajectories(ranking), CheckpointSums()
    with question.scored_blocks(ranking_purpose(ranking), by_step=True) as blocks:
        collect(blocks, best, checkpoint_sums)
    sums, indices = best.result()
    return with_shares(question.study, sums, checkpoint_sums, indices)


def top_in_two_passes(question: Question, ranking: Ranking) -> StepInfluence:
    """Find the winners of several checkpoints in one pass, their trajectories in a short second one."""
    indices, _ = top_examples(question, ranking)
    purpose = "score winners step by step"
    with question.scored_blocks(purpose, by_step=True, only=indices.unique().cpu()) as blocks:
        return chosen_influence(question.study, blocks, indices)


def chosen_influence(study: Study, blocks: Iterable[ScoredBlock], indices: Tensor) -> StepInfluence:
    """Sum the trajectories ``(q, k, t)`` of chosen train examples, others for each test example."""
    winners, checkpoint_sums = Winners(indices), CheckpointSums(indices)
    collect(blocks, winners, checkpoint_sums)
    return with_shares(study, winners.result(), checkpoint_sums, indices)


class Reranked(NamedTuple):
    """Winners by exact gradients."""

    sums: Sums
    """Their scores ``(q, k, b)``."""
    indices: Tensor
    """``(q, k)`` their positions."""
    checkpoint_sums: CheckpointSums
    """Of all pairs that were scored exactly."""


def reranked_step_influence(question: Question, ranking: Ranking, n_candidates: int) -> StepInfluence:
    """Find the winners as `reranked` does, with their trajectories, ``(q, k, t)``."""
    best = reranked(question, ranking, n_candidates)
    return with_shares(question.study, best.sums, best.checkpoint_sums, best.indices)


def reranked(question: Question, ranking: Ranking, n_candidates: int) -> Reranked:
    """Let sketches shortlist and exact gradients of the shortlisted train examples decide.

    Args:
        question: The test examples.
        ranking: How many winners, and what they are ranked by.
        n_candidates: How many train examples are shortlisted for each test example.

    Returns:
        The winners, best first.
    """
    check_depth(question, ranking)
    engine = question.study.engine.with_sketch(Exact())
    exact = replace(question, study=replace(question.study, engine=engine, index=None))
    exact.study.check_rows()
    candidates, _ = top_examples(question, replace(ranking, k=n_candidates))
    candidates = candidates.sort(dim=1).values
    checkpoint_sums = CheckpointSums()
    winners = winners_by_batch(exact, candidates, pair_values, checkpoint_sums)
    sums = join_tests([winner.result() for winner in winners])
    values = sums.scores.values
    order, _ = ranking.best(ranking.column_of(values))
    best = gather_pairs(values, order)
    scores = Scores(best, torch.zeros_like(best))
    return Reranked(Sums(scores, sums.n_steps), candidates.gather(1, order), checkpoint_sums)


def winners_by_batch(
    question: Question,
    candidates: Tensor,
    contract: Contraction,
    *collectors: Collector,
) -> list[Winners]:
    """Score each test batch's candidates alone: features of one batch are held at a time.

    Args:
        question: The test examples.
        candidates: ``(q, k)`` positions of train examples, whose features are computed anew.
        contract: What two sides' features are contracted to.
        *collectors: Further ones, for the blocks of all batches.

    Returns:
        One collector for each test batch.
    """
    winners_of: dict[int, Winners] = {}
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
                winners = winners_of.setdefault(number, Winners(own_candidates))
                tests = question.study.as_tests(batch)
                for block in train.blocks(point, own_candidates.unique().cpu()):
                    scores = contract(tests, question.study.as_train(block.features))
                    scored = scored_block(block, point.checkpoint, scores, tests.n_steps)
                    collect([scored], winners, *collectors)
    return list(winners_of.values())


def ranking_purpose(ranking: Ranking) -> str:
    """Say, as Captum does, what a pass for the top k is for."""
    sought = "proponents" if ranking.proponents else "opponents"
    return f"perform computation for getting {sought}. Processing training batches"


# --- every example with itself, and vectors ---


def step_self_influence(study: Study, examples: Examples) -> StepInfluence:
    """Score every example against itself by loop step, ``(n, t)``."""
    checkpoint_sums = CheckpointSums()
    sums = self_influence(study, examples, checkpoint_sums, by_step=True)
    return with_shares(study, sums, checkpoint_sums)


def self_influence(
    study: Study,
    examples: Examples,
    *further: Collector,
    by_step: bool,
) -> Sums:
    """Score every example against itself, ``(n, b)``, under one progress bar over all batches."""
    pairs = SelfPairs()
    n_batches = examples.n_batches
    n_blocks = None if n_batches is None else n_batches * len(study.checkpoints)
    with study.progress.bar("compute self influence. Processing batch", n_blocks) as bar, study.points() as points:
        for point in points:
            collect(counted(self_blocks(study, point, examples, by_step=by_step), bar), pairs, *further)
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


def self_blocks(
    study: Study,
    point: Point,
    examples: Examples,
    *,
    by_step: bool,
) -> Iterator[ScoredBlock]:
    """Score every example against itself at one checkpoint: ⟨g, P φ⟩ of the same example."""
    for block, test_features in both_sides(study, point, examples, by_step=by_step):
        if study.normalize == "both":
            test_features = test_features.unit()
        scores = self_scores(test_features, study.as_train(block.features))
        yield scored_block(block, point.checkpoint, scores, block.features.n_steps)


def both_sides(
    study: Study,
    point: Point,
    examples: Examples,
    *,
    by_step: bool,
) -> Iterator[tuple[Block, StepFeatures]]:
    """Yield the features of each block of examples as train examples, g, and as test examples, P φ."""
    preconditioned = study.preconditioned(point)
    if preconditioned.acts_on != "row":
        for number, (positions, raw) in enumerate(examples.batches()):
            side, places = examples.side, positions.tolist()
            collated_alone = examples.collated_alone
            train = point.batch(raw, side, places, by_step=by_step, collated_alone=collated_alone)
            test = preconditioned.batch(raw, side, places, by_step=by_step, collated_alone=collated_alone)
            yield Block(number, positions, train), test
        return
    if study.index is None:
        blocks = point.blocks(examples, by_step=by_step)
    else:
        sketches = replace(study, progress=HIDDEN).complete_at(point, study.index)
        blocks = Indexed(sketches).blocks(point)
    for block in blocks:
        yield block, preconditioned.of_rows(block.features)


def gradient_vectors(
    study: Study,
    examples: Examples,
    *,
    aggregate: bool,
    as_tests: bool,
) -> Tensor:
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
    if not as_tests:
        study = study.of_train_gradients()
    question = Question(study, examples, aggregate)
    width = getattr(study.engine.sketch, "dim", 0)  # what is kept exactly is padded to it
    vectors: list[Tensor] = []
    with study.engine.points(study.checkpoints, examples) as points:
        for point in points:
            rate = point.checkpoint.weight
            if rate < 0:
                raise ValueError(f"A learning rate of {rate} has no square root; influence() takes it.")
            features = question.test_features(point, by_step=False)
            vectors.append(math.sqrt(rate) * side_by_side(features, width))
    return torch.cat(vectors, dim=1)


def side_by_side(features: StepFeatures, width: int) -> Tensor:
    """Lay the totals of all parameters side by side ``(n, D)``, each padded with zeros to a width."""
    rows = [row[:, Columns.TOTAL] for row in features.rows.values()]
    padded = []
    for row in rows:
        missing = max(0, width - row.shape[-1])
        padded.append(F.pad(row, (0, missing)).to(rows[0].device))
    return torch.cat(padded, dim=1)
