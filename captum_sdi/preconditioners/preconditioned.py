"""The one place where a preconditioner meets the test side: P φ, wherever P acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from captum_sdi.blocks import Block
from captum_sdi.capture.tokens import Unit
from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.features import StepFeatures
from captum_sdi.preconditioners.base import ActsOn, Fitted, Preconditioner

if TYPE_CHECKING:
    from captum_sdi.passes import Point
    from captum_sdi.train_side import TrainSide


@dataclass(frozen=True)
class Preconditioned:
    """The model at a checkpoint, with a preconditioner fitted there."""

    point: Point
    acts_on: ActsOn
    fitted: Fitted

    @staticmethod
    def fitted_at(
        point: Point,
        preconditioner: Preconditioner,
        train: TrainSide,
    ) -> Preconditioned:
        """Fit a preconditioner at a checkpoint."""
        return Preconditioned(point, preconditioner.acts_on, preconditioner.fit(point, train))

    def batch(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        by_step: bool,
        collated_alone: Callable[[int], Any],
    ) -> StepFeatures:
        """Compute P φ of a batch; the arguments are those of `captum_sdi.passes.Point.batch`.

        Returns:
            ``(q, b, width)`` for each parameter.
        """
        features = self._source.batch(
            raw,
            side,
            positions,
            by_step=by_step,
            transform=self._transform,
            collated_alone=collated_alone,
        )
        return self._mapped(features)

    def rows(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        by_step: bool,
        unit: Unit,
    ) -> StepFeatures:
        """Compute P φ of a batch in parts; the arguments are those of `captum_sdi.passes.Point.rows`.

        Returns:
            ``(q, b, width)`` for each parameter, or ``(q * p, b, width)``.
        """
        features = self._source.rows(
            raw,
            side,
            positions,
            by_step=by_step,
            unit=unit,
            transform=self._transform,
        )
        return self._mapped(features)

    @property
    def _source(self) -> Point:
        """The model, with exact features where the preconditioner wants these."""
        if self.acts_on != "whole":
            return self.point
        return replace(self.point, capture=self.point.capture.exact())

    @property
    def _transform(self) -> Fitted | None:
        return self.fitted if self.acts_on == "gradient" else None

    def _mapped(self, features: StepFeatures) -> StepFeatures:
        """Apply a preconditioner that acts behind the gradients."""
        if self.acts_on == "row":
            return self.of_rows(features)
        if self.acts_on == "whole":
            return self.point.capture.sketched(self.fitted(features))
        return features

    def of_rows(self, features: StepFeatures) -> StepFeatures:
        """Apply a preconditioner that acts on rows."""
        rows = {name: self.fitted(name, row) for name, row in features.rows.items()}
        return StepFeatures(rows, features.noise, features.n_steps)

    def blocks(self, tests: Examples, *, by_step: bool) -> Iterator[Block]:
        """Compute P φ of a stream, one block a batch."""
        for number, (positions, raw) in enumerate(tests.batches()):
            features = self.batch(
                raw,
                tests.side,
                positions.tolist(),
                by_step=by_step,
                collated_alone=tests.collated_alone,
            )
            yield Block(number, positions, features)
