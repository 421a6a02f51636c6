"""Any layer that is affine in parameters along its last axis: Σ_p g_p ⊙ ∂m/∂w at p.

Norms, scales and shifts of any class are recognised by what they compute, not by name: with all parameters at zero and
at one, and at a third place as a check. Gemma's norm scales by 1 + weight and is exact all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from captum_sdi.capture.rules.bare_call import bare_call, lifted_buffers, lifted_parameters, own_parameters
from captum_sdi.capture.rules.base import (
    PerExample,
    lifted,
    merge_positions,
    positions_as_examples,
    summed_over_positions,
)


def affine(
    module: nn.Module,
    activation: Tensor,
    backprop: Tensor,
    wanted: Sequence[str],
) -> Iterator[PerExample]:
    """Yield the gradients of a layer of which `is_affine` is true."""
    _, slopes = offset_and_slopes(module, activation)
    for name in wanted:
        per_position = merge_positions(slopes[name] * backprop)
        yield name, slice(None), summed_over_positions(per_position)


def offset_and_slopes(module: nn.Module, activation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``m(x; 0)`` and each ``m(x; 1) - m(x; 0)``: the slope ∂m/∂w where m is affine."""
    activation = lifted(activation)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in lifted_parameters(module).items()}
    at_zero = {**lifted_buffers(module), **zeros}
    offset = bare_call(module, at_zero, activation)
    slopes = {}
    for name, zero in zeros.items():
        with_ones = {**at_zero, name: torch.ones_like(zero)}
        slopes[name] = bare_call(module, with_ones, activation) - offset
    return offset, slopes


@torch.no_grad()
def is_affine(module: nn.Module, activation: Tensor) -> bool:
    """Say whether ``m(x; w) = m(x; 0) + Σ w ⊙ slope`` with every parameter along the last axis."""
    if not activation.is_floating_point():
        return False
    last_axis = activation.shape[-1:]
    if any(parameter.shape != last_axis for parameter in own_parameters(module).values()):
        return False
    # Not at the activation alone: where that is zero, as a loop's first state may be, every layer looks affine.
    entries = torch.arange(activation.numel(), dtype=torch.float32, device=activation.device)
    irregular = 2 * (12.9898 * entries).sin().view(activation.shape).to(activation.dtype)
    try:
        return all(is_affine_at(module, lifted(tried)) for tried in (activation, irregular))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return False  # it does not take these values or this one input; the next rule decides


def is_affine_at(module: nn.Module, activation: Tensor) -> bool:
    """Say whether the slopes between zero and one predict the output at other parameters."""
    offset, slopes = offset_and_slopes(module, activation)
    # Parameters that differ from entry to entry, and in sign: at a weight of ones a GroupNorm, whose weight lies along
    # another axis, would pass, and so would the absolute value of a weight at positive ones.
    trial = {}
    for name, parameter in lifted_parameters(module).items():
        entries = parameter.numel()
        trial[name] = torch.linspace(
            -1.5,
            1.4,
            entries,
            dtype=parameter.dtype,
            device=parameter.device,
        )
    actual = bare_call(module, {**lifted_buffers(module), **trial}, activation)
    changes = [trial[name] * slope for name, slope in slopes.items()]
    predicted = offset + sum(changes)
    if actual.shape != activation.shape:
        return False
    difference = (actual - predicted).abs().max()
    return bool(difference <= 1e-4 * actual.abs().max())


@torch.no_grad()
def slopes_need_one_position(module: nn.Module, activation: Tensor) -> bool:
    """Say whether each position's slopes are the same without the others, up to rounding."""
    _, slopes = offset_and_slopes(module, activation)
    positions = positions_as_examples(activation)
    try:
        _, lone_slopes = offset_and_slopes(module, positions)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return False  # it does not take one position
    for name, slope in slopes.items():
        lone_slope = lone_slopes[name]
        if lone_slope.shape != positions.shape:
            return False
        rounding = 1e3 * torch.finfo(slope.dtype).eps
        difference = (lone_slope.reshape_as(slope) - slope).abs().max()
        if not difference <= rounding * slope.abs().max():  # NaN is not
            return False
    return True
