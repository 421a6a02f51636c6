"""A result as rows of a page: for each test example, its training examples with all their numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from captum_sdi.report.chunks import rounded
from captum_sdi.report.texts import TextTable
from captum_sdi.scores.result import StepInfluence

Array: TypeAlias = NDArray[np.float64]
PAIRS_PER_CHUNK = 2_000


@dataclass(frozen=True)
class Pairs:
    """The pairs of one or two results, as arrays.

    Example:
        >>> import torch
        >>> from captum_sdi.scores.contract import Scores
        >>> scores = Scores(torch.tensor([[[0.75, 0.0, 0.0, 0.5, 0.25]]]), torch.zeros(1, 1, 5))
        >>> pairs = Pairs.from_result(StepInfluence.from_sums(scores, torch.tensor([2])))
        >>> pairs.steps.shape, pairs.n_train, pairs.has_all
        ((1, 1, 2), 1, True)
    """

    indices: NDArray[np.int64]  # (q, k)
    totals: Array  # (q, k)
    errors: Array  # (q, k)
    steps: Array  # (q, k, t)
    step_errors: Array  # (q, k, t)
    prelude: Array  # (q, k)
    coda: Array  # (q, k)
    n_steps: NDArray[np.int64]  # (q,)
    has_all: bool
    """Whether every training example is there, not only the strongest."""

    @classmethod
    def from_result(cls, result: StepInfluence) -> Pairs:
        """Check a result and return its pairs.

        Returns:
            The pairs, on the CPU.

        Raises:
            TypeError: If it is none, as what `SDIInfluence.influence` returns.
            ValueError: If it is one of self-influence, is empty, or holds a number that is not finite.
        """
        if not isinstance(result, StepInfluence):
            raise TypeError(
                f"result must be what step_influence returns, a StepInfluence, got {type(result).__name__}."
            )
        if result.trajectories.dim() != 3 or 0 in result.trajectories.shape:
            raise ValueError(
                f"result must hold trajectories (q, n, t) with no empty axis, got {tuple(result.trajectories.shape)}. "
                "What step_self_influence returns goes to self_influence=."
            )
        n_tests, n_columns = result.influence_scores.shape
        in_order = np.broadcast_to(np.arange(n_columns), (n_tests, n_columns))
        return cls(
            indices=in_order if result.indices is None else result.indices.cpu().numpy(),
            totals=finite("influence_scores", result.influence_scores),
            errors=finite("score_errors", result.score_errors),
            steps=finite("trajectories", result.trajectories),
            step_errors=finite("trajectory_errors", result.trajectory_errors),
            prelude=finite("prelude", result.prelude),
            coda=finite("coda", result.coda),
            n_steps=result.n_steps.cpu().numpy(),
            has_all=result.indices is None,
        )

    @classmethod
    def from_results(cls, results: Any) -> Pairs:
        """Return the pairs of a result, or of several of the same test examples, such as those of either sign.

        Returns:
            The pairs, side by side.

        Raises:
            ValueError: If there is none, or they are not of the same test examples.
        """
        if type(results) not in (list, tuple):  # Captum's results are a kind of tuple, too
            return cls.from_result(results)
        parts = [cls.from_result(result) for result in results]
        if not parts:
            raise ValueError("result is an empty list; pass what step_influence returns.")
        first = parts[0]
        for pairs in parts:
            if not np.array_equal(pairs.n_steps, first.n_steps) or pairs.steps.shape[-1] != first.steps.shape[-1]:
                raise ValueError("result holds results of different test examples; they are shown on a page each.")
        joined = {}
        for field in fields(cls):
            if field.name not in ("n_steps", "has_all"):
                joined[field.name] = np.concatenate([getattr(pairs, field.name) for pairs in parts], axis=1)
        return cls(**joined, n_steps=first.n_steps, has_all=any(pairs.has_all for pairs in parts))

    @property
    def n_train(self) -> int:
        """How many training examples there are, at least."""
        return int(self.indices.max()) + 1

    @property
    def tests_per_chunk(self) -> int:
        """How many test examples go into a chunk."""
        return max(1, PAIRS_PER_CHUNK // self.indices.shape[1])

    def row(self, test: int, texts: TextTable) -> dict[str, Any]:
        """Return a test example's pairs, the highest total first; a pair that two results hold stands there once."""
        order = np.argsort(-self.totals[test], kind="stable")
        _, first_places = np.unique(self.indices[test, order], return_index=True)
        places = order[np.sort(first_places)]
        depth = int(self.n_steps[test])
        indices = self.indices[test, places].tolist()
        return {
            "train": indices,
            "text": [texts.number(index) for index in indices],
            "total": rounded(self.totals[test, places]),
            "error": rounded(self.errors[test, places]),
            "steps": rounded(self.steps[test, places, :depth]),
            "stepErrors": rounded(self.step_errors[test, places, :depth]),
            "prelude": rounded(self.prelude[test, places]),
            "coda": rounded(self.coda[test, places]),
        }


def finite(name: str, tensor: Tensor) -> Array:
    """Return a field of a result as float64, all of it finite."""
    numbers = tensor.detach().cpu().double().numpy()
    if not np.isfinite(numbers).all():
        position = tuple(np.argwhere(~np.isfinite(numbers))[0].tolist())
        raise ValueError(
            f"result.{name} holds {numbers[position]} at {position}. Leave that example out, or look for the loss that "
            "overflowed."
        )
    return numbers
