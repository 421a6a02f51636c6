"""Results as checked arrays, and which of their training examples to draw."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from captum_sdi.scores.result import StepInfluence

Array: TypeAlias = NDArray[np.float64]
Positions: TypeAlias = NDArray[np.int64]
Result: TypeAlias = StepInfluence | Tensor | ArrayLike

_KINDS = {
    False: ("(q, n, t)", "step_self_influence use plot_self_influence, for step_matrix plot_step_matrix"),
    True: ("of self-influence (n, t)", "influence between different examples use plot_trajectories"),
}


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

    @property
    def has_ends(self) -> bool:
        """Whether totals are more than the sum of their steps."""
        return bool(self.prelude.any() or self.coda.any())

    def at(self, where: int | Positions) -> Scores:
        """A part of the first axis."""
        return Scores(*(getattr(self, field.name)[where] for field in fields(self)))

    def of(self, test: int, train: Sequence[int] | None = None) -> Scores:
        """One test example's scores of all training examples, or of those with the given training set indices."""
        one = self.at(position("test", test, len(self.totals)))
        if train is None:
            return one
        column_of = {int(index): column for column, index in enumerate(one.indices)}
        wanted = _integers("train", train)
        if absent := [index for index in wanted if index not in column_of]:
            raise ValueError(
                f"train={wanted} names examples that the result does not hold for test example {test}: {absent}. It "
                f"holds {len(column_of)}, such as {list(column_of)[:5]}; call step_influence without k for all."
            )
        return one.at(np.array([column_of[index] for index in wanted]))


def read(result: Result, texts: Sequence[str] | None = None, of_itself: bool = False) -> Scores:
    """Checks a result, and the texts of its training examples; plain trajectories have no errors, prelude or coda."""
    if isinstance(result, tuple):  # Captum's KMostInfluentialResults: an array of indices and totals, no steps
        raise ValueError(
            f"result must hold trajectories, got {type(result).__name__}. Use step_influence, not influence."
        )
    given: dict[str, Any] = vars(result) if isinstance(result, StepInfluence) else {}
    trajectories = array("result.trajectories", given["trajectories"]) if given else array("result", result)
    if trajectories.ndim not in ((2,) if of_itself else (3,) if given else (2, 3)) or not trajectories.size:
        wanted, other = _KINDS[of_itself]
        raise ValueError(
            f"result must hold trajectories {wanted} with no empty axis, got shape {trajectories.shape}. For {other}."
        )
    if trajectories.ndim == 2 and not of_itself:
        trajectories = trajectories[None]
    *pairs, depth = trajectories.shape

    def field(name: str, shape: Sequence[int], default: ArrayLike) -> Array:
        if given.get(name) is None:
            return np.broadcast_to(np.asarray(default, dtype=np.float64), shape)
        values = array(f"result.{name}", given[name])
        if values.shape == tuple(shape):
            return values
        fit = f"to fit trajectories of shape {trajectories.shape}"
        raise ValueError(f"result.{name} must have shape {tuple(shape)} {fit}, got {values.shape}.")

    n_steps = field("n_steps", pairs[:1], depth).astype(np.int64)
    complete = given.get("indices") is None
    indices = field("indices", pairs, np.arange(pairs[-1])).astype(np.int64)
    check_texts("texts", texts, pairs[-1] if complete else int(indices.max()) + 1, exact=complete)
    return Scores(
        trajectories=trajectories,
        errors=field("trajectory_errors", trajectories.shape, 0.0),
        totals=field("influence_scores", pairs, trajectories.sum(-1)),
        total_errors=field("score_errors", pairs, 0.0),
        prelude=field("prelude", pairs, 0.0),
        coda=field("coda", pairs, 0.0),
        indices=indices,
        n_steps=n_steps if of_itself else np.broadcast_to(n_steps[:, None], pairs),
    )


def array(name: str, values: Any) -> Array:
    """Any tensor, array or nested list as finite float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers: a tensor or array, got {type(values).__name__}.") from error
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise ValueError(
            f"{name} has {len(bad)} of {numbers.size} values that are not finite, the first ({numbers[place]}) at "
            f"{place}. Leave those examples out, or look for the loss that overflowed."
        )
    return numbers


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} takes integers that count from 0, got {value!r}.") from error


def _integers(name: str, values: Sequence[int]) -> list[int]:
    if isinstance(values, (str, int)) or not len(values):
        raise ValueError(f"{name} must be a sequence of integers with at least one entry, got {values!r}.")
    return [_integer(name, value) for value in values]


def position(name: str, value: int, size: int) -> int:
    """Checks one position."""
    if not 0 <= _integer(name, value) < size:
        raise ValueError(f"{name}={value} is out of range: the result has {size}, so pass 0 to {size - 1}.")
    return int(value)


def positions(name: str, values: Sequence[int] | None, size: int) -> Positions:
    """Checks a set of positions; None = all."""
    if values is None:
        return np.arange(size)
    return np.array([position(name, value, size) for value in _integers(name, values)])


def check_texts(name: str, texts: Sequence[str] | None, size: int, exact: bool = True) -> None:
    """One string per example; the k strongest only bound the number of training examples from below."""
    if texts is None or (not isinstance(texts, str) and (len(texts) == size or (len(texts) > size and not exact))):
        return
    raise ValueError(
        f"{name} must be one string per example, in order: expected {'' if exact else 'at least '}{size}, got "
        f"{'one string' if isinstance(texts, str) else len(texts)}."
    )


def strongest(totals: Array, k: int | None) -> tuple[Positions, Positions]:
    """Positions of the k (None = all) largest totals >= 0 and smallest < 0, strongest first."""
    if k is not None and _integer("k", k) < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}.")
    order = np.argsort(-totals, kind="stable")
    proponents, opponents = order[totals[order] >= 0], order[totals[order] < 0]
    return proponents[:k], opponents[::-1][:k]


def ranked(totals: Array, k: int | None) -> Positions:
    """The `strongest` of both signs by falling total."""
    proponents, opponents = strongest(totals, k)
    return np.concatenate([proponents, opponents[::-1]])
