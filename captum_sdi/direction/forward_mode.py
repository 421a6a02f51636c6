"""The derivative of a batch's losses along a direction, bin by bin, by forward passes alone.

With φ_b(z) the part of the gradient that flows through bin b, and d a direction in parameter space,

    ⟨d, φ_b(z)⟩ = ∂/∂ε ℓ(z; w + ε d in the uses of bin b, w in all others)    at ε = 0

which forward-mode differentiation computes beside the loss, for every example, every token and every bin at once: one
forward pass carries the derivatives of all bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_sdi.borrow import observable
from captum_sdi.data.losses import example_losses
from captum_sdi.data.side import Side
from captum_sdi.data.targets import token_losses
from captum_sdi.direction.closed_forms import ClosedForms
from captum_sdi.direction.contracted import Vectors, step_products
from captum_sdi.direction.dual_uses import DualUses
from captum_sdi.direction.slopes import slopes_at_zero
from captum_sdi.features import Bins
from captum_sdi.passes import Point
from captum_sdi.precision import is_coarse

LARGEST_DIFFERENCE, LARGEST_COARSE = 1e-2, 0.2
"""How far forward mode may be from the backward pass, relative to all products of an example, by rounding."""


class ForwardMode:
    """A model at a checkpoint, and how the losses of its forward passes are taken apart.

    Args:
        point: The model at a checkpoint.
        side: How batches are run.
        by_token: Keep the losses of target tokens apart.
    """

    def __init__(self, point: Point, side: Side, *, by_token: bool) -> None:
        self.point = point
        self.side = side
        self.by_token = by_token
        self.uses = DualUses(point.model, point.loop, point.capture.tape.owners)

    def losses(self, raw: Any) -> Tensor:
        """Compute the losses of a batch's examples ``(n,)``, or of their tokens ``(n, p)``."""
        batch = self.point.capture.read(raw, self.side.forward_kwargs)
        output = self.point.model(*batch.args, **batch.kwargs)
        compute = token_losses if self.by_token else example_losses
        return compute(
            self.side.loss_fn,
            output,
            batch.labels,
            batch.size,
            self.side.argument,
        )

    def step_derivatives(self, raw: Any, vectors: Vectors) -> StepDerivatives:
        """Compute the derivatives of a batch's losses along vectors, in each bin.

        Args:
            raw: The batch.
            vectors: By targeted parameter ``(g, *shape)``.

        Returns:
            Losses and derivatives, of one forward pass for each group; and of one more where the batch before, if
            there was one, used parameters otherwise, as at another depth.

        Raises:
            ValueError: If the model has no forward-mode derivative, or its pass depends on more than the batch.
        """
        by_group = []
        with differentiable_forward(), ClosedForms():
            for group in range(len(next(iter(vectors.values())))):
                tangents = tangents_of(self.point, vectors, group)
                losses, derivatives = self.along(raw, tangents)
                by_group.append(derivatives)
        return StepDerivatives(losses, torch.stack(by_group, dim=-2), self.uses.clock.n_steps)

    def along(self, raw: Any, tangents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the losses of a batch, and their derivatives along one direction.

        Returns:
            Losses ``(n,)`` or ``(n, p)``, and derivatives with an axis ``b`` behind.

        Raises:
            ValueError: If the forward pass depends on more than the batch.
        """

        def losses_at(scales: Tensor) -> tuple[Tensor, Tensor]:
            by_place = dict(zip(places, scales.unbind(), strict=True))
            with self.uses.along(tangents, by_place):
                losses = self.losses(raw)
            return losses, losses

        parameter = next(iter(tangents.values()))
        for _ in range(2):  # the first may learn that this batch's uses are not those of the last
            bins, places = self.uses.bins, self.uses.places
            losses, slopes = slopes_at_zero(losses_at, parameter.new_zeros(len(places)))
            if self.uses.bins == bins:
                derivatives = losses.new_zeros(*losses.shape, Bins.count(self.uses.clock.n_steps))
                derivatives[..., places] = slopes
                return losses, derivatives
        raise ValueError(
            f"The model used its parameters {len(bins)} times, then {len(self.uses.bins)} times for the same batch, or "
            "in other loop steps: its forward pass depends on more than the batch."
        )

    def check(self, raw: Any, vectors: Vectors) -> None:
        """Compare forward mode with the backward pass on a batch: some operations have a wrong derivative, or none.

        Raises:
            ValueError: If they differ.
        """
        derivatives = self.step_derivatives(raw, vectors).of_examples()
        expected = step_products(self.point, raw, self.side, vectors)
        difference = float((derivatives.to(expected) - expected).norm())
        length = float(expected.norm())
        if difference > largest_difference(self.point.model) * length:
            raise ValueError(
                f"Forward-mode derivatives of this model differ from its gradients, by {difference / length:.2g} of "
                "their length: an operation has a wrong forward derivative, or a parameter is read in a way that dual "
                "numbers do not reach, as by torch.nn.LSTM. Ask step_influence or influence_map, which go backward."
            )


@dataclass(frozen=True)
class StepDerivatives:
    """Losses and their derivatives."""

    losses: Tensor
    """``(n,)``, or of tokens ``(n, p)``."""
    values: Tensor
    """``(n, g, b)``, or ``(n, p, g, b)``: in the order of `captum_sdi.features.Bins`."""
    n_steps: int

    def losses_of_examples(self) -> Tensor:
        """Return the losses of whole examples ``(n,)``."""
        return self.losses if self.losses.ndim == 1 else self.losses.sum(1)

    def of_examples(self) -> Tensor:
        """Return the derivatives of whole examples ``(n, g, b)``."""
        return self.values if self.losses.ndim == 1 else self.values.sum(1)


def tangents_of(point: Point, vectors: Vectors, group: int) -> Mapping[str, Tensor]:
    """Return one group's vector, by targeted parameter, in the parameters' own dtype."""
    targets = point.capture.targets()
    return {name: vectors[name][group].to(parameter) for name, parameter in targets.items()}


def largest_difference(model: nn.Module) -> float:
    """Return how far forward mode may be from the backward pass in a model's precision."""
    return LARGEST_COARSE if is_coarse(model) else LARGEST_DIFFERENCE


@contextmanager
def differentiable_forward() -> Iterator[None]:
    """Run forward passes by what has a forward derivative: no fused attention, no compiled graph.

    Raises:
        ValueError: If an operation has none.
        NotImplementedError: If the model raises it for another reason.
        RuntimeError: If the model raises it for another reason.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(observable())
        stack.enter_context(torch.enable_grad())  # where the model itself turns it off, nothing flows
        try:
            yield
        except (NotImplementedError, RuntimeError) as error:
            if not says_no_derivative(error):
                raise
            raise ValueError(
                f"Forward-mode differentiation does not support this model: {first_sentence(error)} Ask step_influence "
                "or influence_map, which go backward."
            ) from error


def says_no_derivative(error: Exception) -> bool:
    """Say whether an error is torch's for an operation without a forward derivative."""
    text = str(error)
    return "forward AD" in text or "forward-mode" in text or "jvp" in text


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error."""
    sentence, _, _ = str(error).partition(". ")
    return sentence.strip().rstrip(".") + "."
