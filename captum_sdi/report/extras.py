"""What a page can hold beside its pairs: shares of steps over the set, self-influence, step matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from captum_sdi.report.chunks import rounded
from captum_sdi.report.pairs import Array, Pairs, finite
from captum_sdi.report.texts import TextTable
from captum_sdi.scores.result import StepInfluence


def step_shares(pairs: Pairs) -> dict[str, Any]:
    """Return the share of absolute influence in each bin over the test examples that have any: prelude, steps, coda.

    Returns:
        Of each bin the mean, and the 10th and the 90th percentile.
    """
    prelude = pairs.prelude[..., None]
    coda = pairs.coda[..., None]
    bins = np.concatenate([prelude, pairs.steps, coda], axis=-1)
    sizes = np.abs(bins).sum(1)  # (q, 1 + t + 1)
    sizes = sizes[sizes.any(1)]
    if not len(sizes):
        sizes = np.ones_like(bins[:1, 0])
    shares = sizes / sizes.sum(1, keepdims=True)
    return {
        "mean": rounded(shares.mean(0)),
        "low": rounded(np.quantile(shares, 0.1, axis=0)),
        "high": rounded(np.quantile(shares, 0.9, axis=0)),
    }


def test_summary(pairs: Pairs, test: int) -> dict[str, Any]:
    """Return what the list of test examples is sorted by: the largest total, and when influence acts on average."""
    sizes = np.abs(pairs.steps[test]).sum(0)  # (t,)
    numbers = np.arange(1, len(sizes) + 1)
    total_size = sizes.sum()
    centre = float(sizes @ numbers / total_size) if total_size > 0 else 0.0
    return {
        "steps": int(pairs.n_steps[test]),
        "top": float(np.abs(pairs.totals[test]).max()),
        "centre": round(centre, 4),
        "shape": rounded(sizes / (sizes.max() or 1.0)),
    }


def self_influence_rows(result: StepInfluence, texts: TextTable) -> list[list[Any]]:
    """Return the training examples by falling influence on themselves, with their numbers.

    Returns:
        Lists of the index, the number of the text, total, error, trajectory and its errors.
    """
    totals = finite("influence_scores", result.influence_scores)
    order = np.argsort(-totals, kind="stable")
    columns = (
        order.tolist(),
        [texts.number(index) for index in order.tolist()],
        rounded(totals[order]),
        rounded(finite("score_errors", result.score_errors)[order]),
        rounded(finite("trajectories", result.trajectories)[order]),
        rounded(finite("trajectory_errors", result.trajectory_errors)[order]),
    )
    return [list(row) for row in zip(*columns, strict=True)]


def check_self_influence(result: Any) -> int:
    """Check that a result is one of self-influence.

    Returns:
        Of how many training examples it is.

    Raises:
        TypeError: If it is no `StepInfluence`.
        ValueError: If it is none of self-influence.
    """
    if not isinstance(result, StepInfluence):
        raise TypeError(
            f"self_influence must be what step_self_influence returns, a StepInfluence, got {type(result).__name__}."
        )
    if result.trajectories.dim() != 2:
        raise ValueError(
            f"self_influence must hold trajectories (n, t), got shape {tuple(result.trajectories.shape)}: pass what "
            "step_self_influence returns."
        )
    return len(result.influence_scores)


def matrix_rows(
    matrix: Any,
    indices: Sequence[int] | None,
    n_tests: int,
) -> list[dict[str, Any]]:
    """Return the step matrices of each test example, beside the training examples they are of.

    Args:
        matrix: ``(q, m, s, t)``, as `SDIInfluence.step_matrix` returns it.
        indices: The m training examples; None: all, in order.
        n_tests: q.

    Returns:
        Of each test example ``train`` and ``values``, rounded.

    Raises:
        ValueError: If shapes do not fit each other.
    """
    values = as_array("step_matrix", matrix)
    if values.ndim != 4 or len(values) > n_tests:
        raise ValueError(
            f"step_matrix must be of shape (q, n, s, t) with at most {n_tests} test examples, got {values.shape}."
        )
    if indices is None:
        indices = range(values.shape[1])
    trains = [int(index) for index in indices]
    if len(trains) != values.shape[1]:
        raise ValueError(
            f"step_matrix_indices must name the {values.shape[1]} training examples of step_matrix, got {len(trains)}."
        )
    return [{"train": trains, "values": rounded(rows)} for rows in values]


def as_array(name: str, values: Any) -> Array:
    """Return any tensor or array as float64, all of it finite."""
    tensor = values if isinstance(values, Tensor) else Tensor(np.asarray(values, dtype=np.float64))
    return finite(name, tensor)
