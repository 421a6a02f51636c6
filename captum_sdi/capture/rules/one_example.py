"""Does a layer's call on one example alone tell what the layer does in the batch? Rules rest on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from captum_sdi.capture import refusals
from captum_sdi.capture.rules.bare_call import bare_call, own_parameters


@torch.no_grad()
def why_unlike_alone(
    module: nn.Module,
    activation: Tensor,
    output: Tensor,
) -> str | None:
    """Return why a layer's input does not determine its output, example by example."""
    first = activation[:1].detach().clone()
    version = first._version
    parameters = own_parameters(module)
    for parameter in parameters.values():
        parameter.requires_grad_()
    # Inside a checkpointed block, tensors that this trial saves must not be counted: its recomputation has no trial.
    uncounted = saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        with torch.enable_grad(), uncounted:
            lone_output = bare_call(module, parameters, first)
    except torch.OutOfMemoryError:  # the batch is too large, not the layer unknown
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        return refusals.fails_alone(error)
    if first._version != version:
        return refusals.changes_input()
    if output.shape[:1] != activation.shape[:1] or not is_first_of(lone_output, output):
        return refusals.differs_alone()
    unread = unread_parameters(lone_output, parameters)
    return refusals.unread_parameters(unread) if unread else None


def is_first_of(lone_output: object, output: Tensor) -> bool:
    """Say whether the output of one example is the first of the batch's, up to rounding."""
    first = output[:1]
    if not isinstance(lone_output, Tensor) or lone_output.shape != first.shape:
        return False
    # Rounding may differ by as much as matrix products in TF32 or half precision do.
    tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
    difference = (lone_output - first).abs().max()
    return not difference > tolerance * first.abs().max()


def unread_parameters(output: Tensor, parameters: dict[str, Tensor]) -> list[str]:
    """Return the names of the parameters that an output does not depend on."""
    if not output.requires_grad:
        return list(parameters)
    ones = torch.ones_like(output)
    gradients = torch.autograd.grad(output, list(parameters.values()), ones, allow_unused=True)
    named_gradients = zip(parameters, gradients, strict=True)
    return [name for name, gradient in named_gradients if gradient is None]
