"""The derivative of a batch's losses along a direction, bin by bin, by forward passes alone.

With φ_b(z) the part of the gradient that flows through bin b, and d a direction in parameter space,

    ⟨d, φ_b(z)⟩ = ∂/∂ε ℓ(z; w + ε d in the uses of bin b, w in all others)    at ε = 0

which forward-mode differentiation computes beside the loss, for every example and every token of a batch at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_sdi.borrow import observable
from captum_sdi.data.losses import example_losses
from captum_sdi.data.side import Side
from captum_sdi.data.targets import token_losses
from captum_sdi.direction.contracted import Vectors, step_products
from captum_sdi.direction.dual_uses import DualUses
from captum_sdi.features import Bins
from captum_sdi.passes import Point
from captum_sdi.precision import is_coarse

LARGEST_DIFFERENCE, LARGEST_COARSE = 1e-2, 0.2
"""How far forward mode may be from the backward pass, relative to all products of an example, by rounding."""


@dataclass(frozen=True)
class ForwardMode:
    """A model at a checkpoint, and how the losses of its forward passes are taken apart."""

    point: Point
    side: Side
    by_token: bool
    """Keep the losses of target tokens apart."""

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
            As many forward passes as bins are used, for each group, and one more.

        Raises:
            ValueError: If the model has no forward-mode derivative.
        """
        uses = DualUses(self.point.model, self.point.loop, self.point.capture.tape.owners)
        with differentiable_forward():
            with uses.noted():
                losses = self.losses(raw)
            n_groups = len(next(iter(vectors.values())))
            n_bins = Bins.count(uses.clock.n_steps)
            derivatives = losses.new_zeros(*losses.shape, n_groups, n_bins)
            for group in range(n_groups):
                tangents = tangents_of(self.point, vectors, group)
                for place in uses.used_bins:
                    with forward_ad.dual_level(), uses.dual_in(place, tangents):
                        dual_losses = self.losses(raw)
                        tangent = forward_ad.unpack_dual(dual_losses).tangent
                    if tangent is not None:
                        derivatives[..., group, place] = tangent
        return StepDerivatives(losses, derivatives, uses.clock.n_steps)

    def check(self, raw: Any, vectors: Vectors) -> None:
        """Compare forward mode with the backward pass on a batch: some operations have a wrong derivative, or none.

        Raises:
            ValueError: If they differ.
        """
        derivatives = self.step_derivatives(raw, vectors).of_examples()
        expected = step_products(self.point, raw, self.side, vectors)
        difference = float((derivatives.to(expected) - expected).norm())
        length = float(expected.norm())
        limit = LARGEST_COARSE if is_coarse(self.point.model) else LARGEST_DIFFERENCE
        if difference > limit * length:
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

    def of_examples(self) -> Tensor:
        """Return the derivatives of whole examples ``(n, g, b)``."""
        return self.values if self.losses.ndim == 1 else self.values.sum(1)


def tangents_of(point: Point, vectors: Vectors, group: int) -> Mapping[str, Tensor]:
    """Return one group's vector, by targeted parameter, in the parameters' own dtype."""
    targets = point.capture.targets()
    return {name: vectors[name][group].to(parameter) for name, parameter in targets.items()}


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
