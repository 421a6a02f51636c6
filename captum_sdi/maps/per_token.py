"""`step_influence` for every target token: a test example becomes a row for each of its targets.

One pass over the train set, or over an index, answers for all rows at once. Rows' features at every loop step are
kept where they fit into the memory; else rows are ranked by their totals, and the winners scored a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi import queries
from captum_sdi.data.batch import batch_size
from captum_sdi.data.examples import Examples
from captum_sdi.data.targets import one_target_side, target_rows
from captum_sdi.maps.axes import SideAxes
from captum_sdi.maps.look import Look, look, side_as_run
from captum_sdi.maps.memory import ROWS_AT_ONCE, free_memory
from captum_sdi.maps.rows import rows_of
from captum_sdi.model_facts import model_device
from captum_sdi.precision import score_dtype
from captum_sdi.scores.collect import join_tests
from captum_sdi.scores.contract import pair_scores
from captum_sdi.scores.ranking import Ranking
from captum_sdi.scores.result import StepInfluence
from captum_sdi.study import Question
from captum_sdi.words import readable_size


@dataclass(frozen=True)
class TargetExamples(Examples):
    """Examples of which every target token is one; ``side`` is how such a row is run."""

    looks: Mapping[int, Look]
    """Of the examples that they are made from."""

    @property
    def token_of(self) -> Tensor:
        """The example of each row, and its target's position in the text, ``(q, 2)``."""
        places = []
        for example, token_look in self.looks.items():
            places += [(example, token_look.first_position + column) for column in token_look.columns]
        return torch.tensor(places, dtype=torch.long).reshape(-1, 2)

    def batches(self, only: Tensor | None = None) -> Iterator[tuple[Tensor, Any]]:
        """Read the rows, a few at a time.

        Args:
            only: Not supported: test examples are read in order.

        Yields:
            Their numbers ``(n,)``, and the batch.
        """
        assert only is None, "rows are test examples, all of which are read"
        n_before = 0
        for start, raw in self.stream:
            examples = range(start, start + batch_size(raw))
            numbers, columns = rows_of(self.looks, examples)
            for first in range(0, len(numbers), ROWS_AT_ONCE):
                chosen = slice(first, first + ROWS_AT_ONCE)
                rows = target_rows(raw, numbers[chosen], columns[chosen])
                n_rows = len(numbers[chosen])
                yield torch.arange(n_before, n_before + n_rows), rows
                n_before += n_rows

    def collated_alone(self, position: int) -> Any:
        """Return None: a row is compared with itself alone as it stands; its example was, as it is in the data set."""
        return None


def token_step_influence(question: Question, ranking: Ranking | None) -> StepInfluence:
    """Compute influence on every target token of the test examples.

    Args:
        question: The test examples.
        ranking: How many winners, and what they are ranked by; None: all train examples.

    Returns:
        One row for each target token, ``token_of`` says whose.

    Raises:
        ValueError: If there is no target, the loss does not tell tokens apart, or the rows do not fit into the memory.
    """
    rows, fits_by_step = rows_question(question)
    if ranking is None:
        steps = queries.step_influence(rows)
    elif fits_by_step:
        steps = queries.top_step_influence(rows, ranking)
    else:
        indices, _ = queries.top_examples(rows, ranking)
        winners = queries.winners_by_batch(rows, indices, pair_scores)
        sums = join_tests([winner.result() for winner in winners])
        steps = StepInfluence.from_sums(*sums, indices)
    assert isinstance(rows.tests, TargetExamples), "that is what rows_question makes"
    return replace(
        steps,
        token_of=rows.tests.token_of.to(steps.influence_scores.device),
        is_normalized=question.study.normalize is not None,
    )


def rows_question(question: Question) -> tuple[Question, bool]:
    """Look at the test examples, and ask about each of their targets.

    Returns:
        The question, and whether its rows fit into the memory at every loop step.

    Raises:
        ValueError: If there is no target, or rows do not fit even summed over steps.
    """
    study = question.study
    axes = SideAxes(token=True, position=False, step=True)
    first = replace(study, checkpoints=study.checkpoints[:1])
    with first.points() as points:
        point = next(points)
        looks = look(point, question.tests, axes)
        side = one_target_side(side_as_run(point, question.tests.side))
        blank_rows = point.capture.blank().rows.values()
        width = sum(row.shape[-1] for row in blank_rows)
        free_bytes = free_memory(model_device(point.model))
        number_bytes = score_dtype(point.model).itemsize
    tests = TargetExamples(question.tests.stream, side, looks)
    n_rows = len(tests.token_of)
    if n_rows == 0:
        raise ValueError("inputs has no target token to ask about: every label is -100.")
    n_checkpoints = len(study.checkpoints) if study.index else 1
    total_bytes = 2 * n_rows * width * number_bytes * max(1, n_checkpoints)
    if total_bytes > free_bytes // 2:
        raise ValueError(
            f"The gradients of {n_rows:,} target tokens take {readable_size(total_bytes)}, of which "
            f"{readable_size(free_bytes // 2)} are free. Pass fewer texts at a time, or a sketch of a smaller dim."
        )
    n_bins = max(token_look.n_bins for token_look in looks.values())
    fits_by_step = (1 + n_bins) * total_bytes <= free_bytes // 2
    return replace(question, tests=tests), fits_by_step
