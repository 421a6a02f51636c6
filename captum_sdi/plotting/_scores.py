"""Results as checked arrays, and which of their training examples to draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from captum_sdi.plotting._arguments import (
    Array,
    Positions,
    check_integer,
    check_integers,
    check_position,
    check_texts,
    finite_array,
)
from captum_sdi.scores.result import StepInfluence
from captum_sdi.scores.words import PlainTexts

Result: TypeAlias = StepInfluence | Tensor | ArrayLike


@dataclass(frozen=True)
class Scores:
    """A result as arrays; those of self-influence, and of a single test example, have no axis q."""

    trajectories: Array  # (q, n, t)
    errors: Array  # (q, n, t)
    totals: Array  # (q, n)
    total_errors: Array  # (q, n)
    prelude: Array  # (q, n)
    coda: Array  # (q, n)
    indices: Positions  # (q, n) in the training set
    n_steps: Positions  # (q, n)

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """Join scores along their first axis."""
        joined = {}
        for field in fields(cls):
            arrays = [getattr(scores, field.name) for scores in parts]
            joined[field.name] = np.concatenate(arrays)
        return cls(**joined)

    @property
    def has_outer_bins(self) -> bool:
        """Tell whether totals are more than the sum of their steps."""
        return bool(self.prelude.any() or self.coda.any())

    @property
    def steps_run(self) -> Array:
        """Return the trajectories, with NaN at the steps that an example did not run."""
        steps = np.arange(self.trajectories.shape[-1])
        was_run = steps < self.n_steps[..., None]
        return np.where(was_run, self.trajectories, np.nan)

    def select(self, rows: int | Positions) -> Scores:
        """Return the scores at one position of the first axis, or at several."""
        selected = {}
        for field in fields(self):
            array = getattr(self, field.name)
            selected[field.name] = array[rows]
        return Scores(**selected)

    def of_test_example(self, test: int, train: Sequence[int] | None = None) -> Scores:
        """Return one test example's scores, of all training examples or of these indices."""
        row = check_position("test", test, len(self.totals))
        scores = self.select(row)
        if train is None:
            return scores
        wanted = check_integers("train", train)
        columns = {int(index): column for column, index in enumerate(scores.indices)}
        absent = [index for index in wanted if index not in columns]
        if absent:
            raise ValueError(
                f"train={wanted} names examples that the result does not hold for test example {test}: {absent}. It "
                f"holds {len(columns)}, such as {list(columns)[:5]}; call step_influence without k for all."
            )
        wanted_columns = [columns[index] for index in wanted]
        return scores.select(np.array(wanted_columns))


def influence_label(*results: Result) -> str:
    """Return what an axis of influence says: scores of normalized gradients have no unit."""
    is_normalized = any(isinstance(result, StepInfluence) and result.is_normalized for result in results)
    return "influence\n(of unit gradients)" if is_normalized else "influence\n(drop in test loss)"


def train_texts(result: Result, texts: Sequence[str] | None) -> Sequence[str] | None:
    """Return the texts of the training examples: those that were passed, or else those that the result knows."""
    if texts is not None or not isinstance(result, StepInfluence) or result.words is None:
        return texts
    return None if result.words.train is None else PlainTexts(result.words.train)


def test_texts_of(result: Result, texts: Sequence[str] | None) -> Sequence[str] | None:
    """Return the texts of the test examples, likewise; of rows of target tokens only those that were passed."""
    if texts is not None or not isinstance(result, StepInfluence) or result.words is None:
        return texts
    is_by_token = result.token_of is not None
    return None if result.words.test is None or is_by_token else PlainTexts(result.words.test)


def read_scores(
    result: Result,
    texts: Sequence[str] | None = None,
    *,
    self_influence: bool = False,
) -> Scores:
    """Return a result as checked arrays; plain trajectories have no errors, prelude or coda."""
    trajectories = _read_trajectories(result, self_influence=self_influence)
    *pairs, depth = trajectories.shape
    no_errors = np.broadcast_to(0.0, trajectories.shape)
    zeros = np.broadcast_to(0.0, pairs)
    all_steps = np.full(pairs[0], float(depth))
    n_steps = _read_field(result, "n_steps", all_steps).astype(np.int64)
    positions = np.arange(pairs[-1], dtype=np.float64)
    in_order = np.broadcast_to(positions, pairs)
    indices = _read_field(result, "indices", in_order).astype(np.int64)
    # Of the k strongest, only the largest index is known: it bounds the number of training examples from below.
    complete = not isinstance(result, StepInfluence) or result.indices is None
    n_train = pairs[-1] if complete else int(indices.max()) + 1
    check_texts("texts", texts, n_train, exact=complete)
    if not self_influence:
        n_steps = np.broadcast_to(n_steps[:, None], pairs)
    return Scores(
        trajectories=trajectories,
        errors=_read_field(result, "trajectory_errors", no_errors),
        totals=_read_field(result, "influence_scores", trajectories.sum(-1)),
        total_errors=_read_field(result, "score_errors", zeros),
        prelude=_read_field(result, "prelude", zeros),
        coda=_read_field(result, "coda", zeros),
        indices=indices,
        n_steps=n_steps,
    )


def _read_trajectories(result: Result, *, self_influence: bool) -> Array:
    """Return trajectories ``(q, n, t)``, or ``(n, t)`` of self-influence."""
    if isinstance(result, tuple):  # Captum's KMostInfluentialResults: an array of indices and totals, no steps
        raise ValueError(
            f"result must hold trajectories, got {type(result).__name__}. Use step_influence, not influence."
        )
    if isinstance(result, StepInfluence):
        trajectories = finite_array("result.trajectories", result.trajectories)
        allowed_axes = [3]
    else:
        trajectories = finite_array("result", result)
        allowed_axes = [2, 3]
    expected = "(q, n, t)"
    remedy = "For step_self_influence use plot_self_influence, for step_matrix plot_step_matrix"
    if self_influence:
        allowed_axes = [2]
        expected = "of self-influence (n, t)"
        remedy = "For influence between different examples use plot_trajectories"
    if trajectories.ndim not in allowed_axes or not trajectories.size:
        raise ValueError(
            f"result must hold trajectories {expected} with no empty axis, got shape {trajectories.shape}. {remedy}."
        )
    one_test_example = trajectories.ndim == 2 and not self_influence
    return trajectories[None] if one_test_example else trajectories


def _read_field(result: Result, name: str, default: Array) -> Array:
    """Return a field of a `StepInfluence`, of the default's shape; without it the default."""
    if not isinstance(result, StepInfluence):
        return default
    field = getattr(result, name)
    if field is None:
        return default
    values = finite_array(f"result.{name}", field)
    if values.shape != default.shape:
        raise ValueError(
            f"result.{name} must have shape {default.shape} to fit trajectories of shape "
            f"{tuple(result.trajectories.shape)}, got {values.shape}."
        )
    return values


def strongest(totals: Array, k: int | None) -> tuple[Positions, Positions]:
    """Return positions of the k (None = all) largest totals >= 0 and smallest < 0, best first."""
    if k is not None and check_integer("k", k) < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
    order = np.argsort(-totals, kind="stable")
    proponents = order[totals[order] >= 0]
    opponents = order[totals[order] < 0][::-1]
    return proponents[:k], opponents[:k]


def ranked(totals: Array, k: int | None) -> Positions:
    """Return the `strongest` of both signs by falling total."""
    proponents, opponents = strongest(totals, k)
    return np.concatenate([proponents, opponents[::-1]])
