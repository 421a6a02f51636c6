"""The first test batch of a direction: its forward-mode derivatives beside the backward passes of examples alone.

One comparison, the rehearsal's, tells of neighbours, of randomness and of wrong forward derivatives. A rehearsal of its
own compares them: that a batch is right going forward does not say that its features, which go backward, are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.direction.contracted import Vectors, step_products
from captum_sdi.direction.forward_mode import ForwardMode, StepDerivatives, largest_difference
from captum_sdi.features import StepFeatures
from captum_sdi.maps.look import side_as_run
from captum_sdi.passes import Point
from captum_sdi.rehearsal.alone import BatchRun, telling_examples
from captum_sdi.rehearsal.neighbours import relative_difference


class RehearsedBatch:
    """A batch of test examples whose derivatives are compared with products of gradients.

    Args:
        point: The model at a checkpoint.
        raw: The batch.
        tests: Its side.
        positions: Of its examples.
        vectors: By targeted parameter.
        by_token: Keep the losses of target tokens apart.
    """

    def __init__(
        self,
        point: Point,
        raw: Any,
        tests: Examples,
        positions: list[int],
        vectors: Vectors,
        *,
        by_token: bool,
    ) -> None:
        self._point, self._raw, self._tests, self._positions = point, raw, tests, positions
        self._vectors, self._by_token = vectors, by_token
        self._together: tuple[ForwardMode, StepDerivatives] | None = None
        self._together_features = StepFeatures({}, {}, torch.zeros(0))
        self._alone: dict[int, tuple[Any, StepFeatures]] = {}

    def derivatives(self) -> tuple[ForwardMode, StepDerivatives]:
        """Compute the batch's derivatives, and compare them with those of its examples alone.

        Returns:
            How they were computed, and the derivatives.

        Raises:
            ValueError: If forward mode is wrong, derivatives depend on the batch, or a check of the rehearsal says so.
        """
        point, tests = self._point, self._tests
        rehearsal = point.rehearsal.anew()
        rehearsal.begin(tests.side)
        batch = BatchRun(
            point.capture,
            self._raw,
            tests.side,
            self._positions,
            self.features,
            tests.collated_alone,
        )
        rehearsal.features(batch)
        if self._together is None:  # a batch of one has run backward only, as its own first example
            losses = self._run_forward()
            if rehearsal.answered(tests.side, self._positions, losses):
                self._run_forward()
            self._check_forward_mode()
        rehearsal.finish()
        assert self._together is not None, "it has been run"
        return self._together

    def compared(self) -> list[int]:
        """Return the positions of the examples that were compared; none where all losses are zero."""
        return list(self._alone) if telling_examples(self._raw, self._tests.side) else []

    def features(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        checks_uses: bool = False,
    ) -> StepFeatures:
        """Run the batch forward, or an example alone backward.

        Returns:
            ``(n, b, g)``: the products of gradients with directions, in place of features.
        """
        if raw is self._raw and len(positions) > 1:
            losses = self._run_forward()
            self._check_forward_mode()
            self._point.capture.tape.state.losses = losses  # where the rehearsal looks for those of the last pass
            return self._together_features
        products = step_products(self._point, raw, side, self._vectors, checks_uses=checks_uses)
        alone = as_features(products, self._point.capture.n_steps)
        self._alone[positions[0]] = raw, alone
        self._check_forward_mode()
        return alone

    def _run_forward(self) -> Tensor:
        """Compute the batch's derivatives, as the model is run by what is known by now, and return its losses."""
        capture, side = self._point.capture, self._tests.side
        forward_mode = ForwardMode(self._point, side_as_run(self._point, side), by_token=self._by_token)
        derivatives = forward_mode.step_derivatives(self._raw, self._vectors)
        losses, products = derivatives.losses_of_examples().detach(), derivatives.of_examples()
        capture.check_finite(losses.isfinite(), "loss", side, self._positions)
        capture.check_finite(products.isfinite().flatten(1).all(1), "gradient", side, self._positions)
        self._together = forward_mode, derivatives
        self._together_features = as_features(products, derivatives.n_steps)
        return losses

    def _check_forward_mode(self) -> None:
        """Where an example alone has other products than in the batch, look whether forward mode is to blame.

        Raises:
            ValueError: If it is; where the neighbours are, the rehearsal says so.
        """
        if self._together is None:
            return
        side = self._together[0].side
        for position, (example, alone) in self._alone.items():
            number = self._positions.index(position)
            difference = relative_difference(self._together_features, number, alone)
            if difference > largest_difference(self._point.model):
                ForwardMode(self._point, side, by_token=False).check(example, self._vectors)


def as_features(products: Tensor, n_steps: int) -> StepFeatures:
    """Return products of gradients with directions ``(n, g, b)`` as features ``(n, b, g)``."""
    return StepFeatures({"products": products.transpose(1, 2)}, {}, torch.full((len(products),), n_steps))
