"""`step_influence` at each checkpoint alone: when in training did an example have its influence?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from captum_sdi import queries
from captum_sdi.features import Bins, Columns
from captum_sdi.scores.collect import PerCheckpoint, Sums
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.ranking import Ranking
from captum_sdi.scores.sums import equally_deep
from captum_sdi.study import Question


def checkpoint_step_influence(question: Question, ranking: Ranking | None) -> InfluenceMap:
    """Compute the trajectories of each checkpoint, times its learning rate.

    Args:
        question: The test examples.
        ranking: How many winners, by their sum over checkpoints; None: all train examples.

    Returns:
        A map with the axes "checkpoint" and "step".
    """
    indices = None if ranking is None else queries.top_examples(question, ranking)[0]
    only = None if indices is None else indices.unique().cpu()
    parts = PerCheckpoint(indices)
    with question.scored_blocks("score checkpoints one by one", by_step=True, only=only) as blocks:
        queries.collect(blocks, parts)
    sums = parts.result()
    if indices is None:
        q, n, _ = next(iter(sums.values())).scores.values.shape
        indices = torch.arange(n).expand(q, n)
    return checkpoint_map(sums, indices)


def checkpoint_map(sums: Mapping[str, Sums], indices: Tensor) -> InfluenceMap:
    """Put the sums ``(q, n, b)`` of each checkpoint side by side.

    Returns:
        A map with the axes "checkpoint" and "step".
    """
    values = torch.stack(equally_deep([checkpoint_sums.scores.values for checkpoint_sums in sums.values()]), dim=2)
    variances = torch.stack(
        equally_deep([checkpoint_sums.scores.variances for checkpoint_sums in sums.values()]), dim=2
    )
    n_steps = Columns.n_steps(values.shape[-1])
    step_columns = map(Columns.of_step, range(n_steps))
    columns = torch.tensor([Columns.PRELUDE, *step_columns, Columns.CODA])
    columns = columns.to(values.device)
    errors = variances.clamp(min=0).sqrt().index_select(-1, columns)
    return InfluenceMap(
        values=values.index_select(-1, columns),
        axes=("checkpoint", "step"),
        labels={"checkpoint": tuple(sums), "step": step_labels(Bins.count(n_steps))},
        indices=indices.to(values.device),
        errors=errors if errors.any() else None,
    )


def step_labels(n_bins: int) -> tuple[str | int, ...]:
    """Return the labels of a step axis.

    Example:
        >>> step_labels(n_bins=4)
        ('prelude', 0, 1, 'coda')
    """
    return ("prelude", *range(n_bins - Bins.count(0)), "coda")
