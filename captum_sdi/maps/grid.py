"""The numbers of a map while it is computed: blocks of pairs of rows, added where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.features import StepFeatures
from captum_sdi.maps.rows import Rows
from captum_sdi.scores.contract import Scores, pair_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GRID_AXES = (
    "test",
    "train",
    "token",
    "train_token",
    "position",
    "step",
    "train_position",
    "train_step",
    "layer",
    "checkpoint",
)
"""The order of a grid's axes; those that were not asked for have one place."""
_FIRST_GROWING = 4
"""Axes from here to `_LAST_GROWING` may be longer at a later checkpoint."""
_LAST_GROWING = 7


class Grid:
    """Adds blocks of scores up.

    Args:
        indices: ``(q, k)`` the train examples of each test example.
        lengths: How long each axis is, as far as is known.
    """

    def __init__(self, indices: Tensor, lengths: Mapping[str, int]) -> None:
        self._indices = indices
        self._shape = [lengths[axis] for axis in GRID_AXES]
        self._values: Tensor | None = None
        self._variances: Tensor | None = None

    def add(
        self,
        tests: Rows,
        trains: Rows,
        groups: Mapping[str, Sequence[str]],
        checkpoint: tuple[int, float],
    ) -> None:
        """Contract rows of both sides, and add the blocks of those that are pairs.

        Args:
            tests: Rows of the test side.
            trains: Rows of the train side.
            groups: The parameters of each place along the layer axis.
            checkpoint: Its place along its axis, and its weight.
        """
        place, weight = checkpoint
        pairs = self._pairs(tests, trains)
        if not len(pairs[0]):
            return
        train_features = flat_bins(trains.features)
        is_noisy = any(noise.variance for noise in tests.features.noise.values())
        for number, names in enumerate(groups.values()):
            scores = pair_scores(tests.features.only(names), train_features.only(names))
            scores = scores.times(weight)
            at = number, place
            self._values = self._put(self._values, blocks(scores.values, tests, trains), pairs, at)
            if is_noisy:
                self._variances = self._put(self._variances, blocks(scores.variances, tests, trains), pairs, at)

    def result(self) -> Scores:
        """Return values and variances ``GRID_AXES``; variances are empty where scores are exact."""
        values = torch.zeros(self._shape) if self._values is None else self._values
        variances = values.new_empty(0) if self._variances is None else self._variances
        return Scores(values, variances)

    def _pairs(self, tests: Rows, trains: Rows) -> tuple[Tensor, ...]:
        """Return the pairs of rows: which test and train row, and q, k and both tokens of their cell."""
        wanted = self._indices[tests.examples]
        hits = wanted.unsqueeze(2) == trains.examples
        test_rows, columns, train_rows = hits.nonzero(as_tuple=True)
        cell = tests.examples[test_rows], columns, tests.places[test_rows], trains.places[train_rows]
        return test_rows, train_rows, *cell

    def _put(
        self,
        grid: Tensor | None,
        block: Tensor,
        pairs: tuple[Tensor, ...],
        at: tuple[int, int],
    ) -> Tensor:
        """Add the blocks ``(r, r, p, b, p, s)`` of pairs of rows."""
        if grid is None:
            grid = block.new_zeros(self._shape)
        grid = with_room(grid, block.shape[2:])
        self._shape = list(grid.shape)
        test_rows, train_rows, *cell = pairs
        layer, checkpoint = at
        cells = grid[..., layer, checkpoint]
        for axis, length in enumerate(block.shape[2:], start=_FIRST_GROWING):
            cells = cells.narrow(axis, 0, length)
        device = block.device
        chosen = block[test_rows.to(device), train_rows.to(device)]
        places = tuple(index.to(device) for index in cell)
        cells.index_put_(places, chosen, accumulate=True)
        return grid


def flat_bins(features: StepFeatures) -> StepFeatures:
    """Return features ``(n * s, 1, width)`` of which every bin is an example of its own."""
    n_bins = next(iter(features.rows.values())).shape[1]
    n_steps = features.n_steps.repeat_interleave(n_bins)
    return features.map(lambda row: row.flatten(0, 1).unsqueeze(1), n_steps)


def blocks(scores: Tensor, tests: Rows, trains: Rows) -> Tensor:
    """Return scores ``(r * p, r * p * s, b)`` as blocks ``(r, r, p, b, p, s)``, one for each pair of rows."""
    n_tests, n_trains = len(tests.examples), len(trains.examples)
    by_train = scores.unflatten(1, (n_trains, trains.n_positions, -1))
    by_cell = by_train.unflatten(0, (n_tests, tests.n_positions))
    return by_cell.permute(0, 2, 1, 5, 3, 4)


def with_room(grid: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return a grid whose position and step axes are at least so long."""
    padding: list[int] = []
    last_first = range(_LAST_GROWING, _FIRST_GROWING - 1, -1)
    for axis, length in zip(last_first, reversed(lengths), strict=True):
        padding += [0, max(0, length - grid.shape[axis])]
    if not any(padding):
        return grid
    trailing = [0, 0] * (grid.ndim - 1 - _LAST_GROWING)
    return F.pad(grid, [*trailing, *padding])
