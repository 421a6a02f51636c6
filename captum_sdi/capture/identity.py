"""The identity in the autograd graph that observes a layer's call, without a copy where that is safe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Report = Callable[[Tensor, Tensor], None]
"""Called in the backward pass with a layer's activation and the backprop at its output."""


class ReportingIdentity(torch.autograd.Function):
    """The identity; its backward pass reports a saved activation and the gradient there.

    The activation is saved the ordinary way, so that activation checkpointing drops and recomputes it like any other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        dummy: Tensor,
        activation: Tensor,
        in_place: bool,
        report: Report,
    ) -> Tensor:
        """Return the output; as the same tensor, in a new place of the graph, when ``in_place``."""
        ctx.save_for_backward(activation)
        ctx.report = report
        if not in_place:
            return output.clone()
        ctx.mark_dirty(output)  # a view of the output instead would break models that work in place on it
        return output

    @staticmethod
    def backward(ctx: Any, backprop: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Report, and hand the gradient on."""
        (activation,) = ctx.saved_tensors
        ctx.report(activation, backprop)
        return backprop, None, None, None, None


def observed(
    output: Tensor,
    dummy: Tensor,
    activation: Tensor,
    report: Report,
    *,
    fresh: bool,
) -> Tensor:
    """Return a layer's output behind a `ReportingIdentity`, not copied where it is ``fresh``.

    ``dummy`` is a scalar that requires a gradient, and so keeps the identity in the graph of frozen parameters. A fresh
    output shares memory with nothing else.

    Returns:
        A tensor of the same values.
    """
    if fresh and output._is_view():
        base = output._base
        if base is not None and base.numel() == output.numel() and output.is_contiguous():
            # Linear with a bias and Conv1D return a view of a whole tensor. Observing the view would copy it.
            return ReportingIdentity.apply(base, dummy, activation, fresh, report).view(output.shape)
    in_place = fresh and not output._is_view()
    return ReportingIdentity.apply(output, dummy, activation, in_place, report)


Reports = Callable[[Sequence[Tensor], Sequence[Tensor | None]], None]
"""Called in the backward pass with what a module was given and the backprops at its outputs."""


class ReportingIdentities(torch.autograd.Function):
    """The identity on all outputs of a module; its backward pass reports once, what was saved and the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        dummy: Tensor,
        owner: object,
        report: Reports,
        saved: tuple[Tensor, ...],
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return copies of the outputs."""
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(value=False)  # an output without a gradient has None
        ctx.report = report
        ctx.owner = owner
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *backprops: Tensor | None) -> tuple[Tensor | None, ...]:
        """Report, and hand the gradients on."""
        ctx.report(ctx.saved_tensors, backprops)
        return None, None, None, None, *backprops
