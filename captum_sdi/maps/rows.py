"""Rows of one side of a map: an example, or one of its targets, and within them positions and loop steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import select
from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.data.targets import one_target_side, target_rows
from captum_sdi.features import StepFeatures, concatenate
from captum_sdi.maps.axes import SideAxes
from captum_sdi.maps.look import Look
from captum_sdi.passes import Point
from captum_sdi.preconditioners import Preconditioned

RowSource = Point | Preconditioned
"""What computes rows."""


@dataclass(frozen=True)
class Rows:
    """Some rows and their features."""

    examples: Tensor
    """``(r,)`` the position of each row's example in its data set."""
    places: Tensor
    """``(r,)`` where each row stands along the token axis; 0 where there is none."""
    features: StepFeatures
    """``(r * p, b, width)``, a row's positions one after the other."""

    @property
    def n_positions(self) -> int:
        """How many positions each row is split into."""
        return self.features.size // len(self.examples)

    def scaled(self, scales: Tensor) -> Rows:
        """Multiply each row by a number ``(r,)``."""
        by_position = scales.repeat_interleave(self.n_positions)
        return replace(self, features=self.features.scaled(by_position))


@dataclass(frozen=True)
class RowSide:
    """One side's examples, and how they are split into rows."""

    examples: Examples
    axes: SideAxes
    looks: Mapping[int, Look]
    rows_side: Side
    """How a row is run."""

    @classmethod
    def of(
        cls,
        examples: Examples,
        axes: SideAxes,
        looks: Mapping[int, Look],
    ) -> RowSide:
        """Return the side of examples that have been looked at."""
        side = one_target_side(examples.side) if axes.token else examples.side
        return cls(examples, axes, looks, side)

    @property
    def n_places(self) -> int:
        """How long the token axis is."""
        if not self.axes.token:
            return 1
        return max(
            (1 + max(look.columns) + look.first_position for look in self.looks.values() if look.columns), default=1
        )

    @property
    def n_positions(self) -> int:
        """How long the position axis is."""
        return max(look.n_positions for look in self.looks.values())

    @property
    def n_bins(self) -> int:
        """How many bins there are at the checkpoint that was looked at."""
        return max(look.n_bins for look in self.looks.values())

    def parts(
        self,
        source: RowSource,
        at_once: int,
        *,
        only: Tensor | None = None,
        unit_norm: bool = False,
    ) -> Iterator[Rows]:
        """Compute the rows of all examples, or of some, a few at a time.

        Args:
            source: The model at a checkpoint, with a preconditioner or without.
            at_once: How many rows at most.
            only: Positions of the examples; None: all.
            unit_norm: Divide the rows of an example by the norm of its whole gradient.

        Yields:
            Rows in the order of the examples.
        """
        for positions, raw in self.examples.batches(only):
            scales = torch.ones(len(positions))
            if unit_norm:
                scales = self._inverse_norms(source, raw, positions)
            numbers, columns = rows_of(self.looks, positions.tolist())
            for start in range(0, len(numbers), at_once):
                chosen = slice(start, start + at_once)
                batch_rows = self._part(
                    source,
                    raw,
                    positions,
                    numbers[chosen],
                    columns[chosen],
                )
                yield batch_rows.scaled(scales[numbers[chosen]]) if unit_norm else batch_rows

    def _inverse_norms(self, source: RowSource, raw: Any, positions: Tensor) -> Tensor:
        """Return one over the norms of a batch's whole gradients."""
        examples = self.examples
        features = source.batch(
            raw,
            examples.side,
            positions.tolist(),
            by_step=False,
            collated_alone=examples.collated_alone,
        )
        return features.inverse_norms()

    def _part(
        self,
        source: RowSource,
        raw: Any,
        positions: Tensor,
        numbers: list[int],
        columns: list[int],
    ) -> Rows:
        rows = target_rows(raw, numbers, columns) if self.axes.token else select(raw, numbers)
        examples = positions[numbers]
        features = source.rows(
            rows,
            self.rows_side,
            examples.tolist(),
            by_step=self.axes.step,
            unit=self.axes.unit,
        )
        first_positions = [self.looks[example].first_position for example in examples.tolist()]
        places = torch.tensor(columns) + torch.tensor(first_positions)
        return Rows(examples, places if self.axes.token else torch.zeros_like(places), features)


def rows_of(looks: Mapping[int, Look], positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return, for each row of a batch, its example's number in the batch and the column of its loss.

    Args:
        looks: What is known of each example.
        positions: Of the batch's examples.

    Returns:
        Numbers and columns, as many as there are rows.
    """
    numbers: list[int] = []
    columns: list[int] = []
    for number, position in enumerate(positions):
        own_columns = looks[position].columns
        numbers += [number] * len(own_columns)
        columns += own_columns
    return numbers, columns


def joined(parts: Sequence[Rows]) -> Rows:
    """Join rows that have equally many positions."""
    features = concatenate([batch_rows.features for batch_rows in parts])
    examples = torch.cat([batch_rows.examples for batch_rows in parts])
    return Rows(examples, torch.cat([batch_rows.places for batch_rows in parts]), features)


def held(parts: Iterator[Rows], at_most: int) -> Iterator[list[Rows]]:
    """Gather rows that may be held at once, equally many positions each in one `Rows`.

    Args:
        parts: The rows, a few at a time.
        at_most: How many.

    Yields:
        Groups of rows.
    """
    group: list[Rows] = []
    for batch_rows in parts:
        n_held = sum(len(rows.examples) for rows in group)
        if group and n_held + len(batch_rows.examples) > at_most:
            yield _by_positions(group)
            group = []
        group.append(batch_rows)
    if group:
        yield _by_positions(group)


def _by_positions(group: list[Rows]) -> list[Rows]:
    alike: dict[int, list[Rows]] = {}
    for rows in group:
        alike.setdefault(rows.n_positions, []).append(rows)
    return [joined(rows) for rows in alike.values()]
