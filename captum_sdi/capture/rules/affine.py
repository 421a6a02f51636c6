"""Layer rules: from what a layer read and what flowed back to it, to its parameters' per-example gradients.

A rule is a pure function of (module, activation, backprop) and this is the only file that knows layer types. With
activation a (what the layer read) and backprop g (the gradient at its output), one example's gradient is

    Linear       weight (o, i): Σ_p g_p a_pᵀ       bias: Σ_p g_p
    Conv1D       weight (i, o): Σ_p a_p g_pᵀ       bias: Σ_p g_p         (GPT-2's, transposed)
    Embedding    weight (v, o): Σ_p e_p g_pᵀ       e_p one-hot, never formed
    norms        weight: Σ_p g_p ⊙ x̂_p             bias: Σ_p g_p
    other leaf   the vector-Jacobian product of its forward, one example at a time

where p runs over all axes between the first (the example) and the last. Norms of any class are recognised by what
they compute, not by name (`_affine`): Gemma's scales by 1 + weight and is exact all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from captum_sdi.capture.rules.bare_call import bare_call, lifted_buffers, own_parameters
from captum_sdi.capture.rules.base import PerExample, lifted, merge_positions, summed_over_positions


def _affine_probe(module: nn.Module, activation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """``m(x; 0)`` and, for each parameter, ``m(x; 1) - m(x; 0)``: the slope ∂m/∂w if m is affine in w."""
    activation = lifted(activation)
    zeros = {name: torch.zeros_like(p) for name, p in own_parameters(module).items()}
    given = {**lifted_buffers(module), **zeros}
    offset = bare_call(module, given, activation)
    slopes = {
        name: bare_call(module, {**given, name: torch.ones_like(p)}, activation) - offset for name, p in zeros.items()
    }
    return offset, slopes


@torch.no_grad()
def is_affine(module: nn.Module, activation: Tensor) -> bool:
    """Whether ``m(x; w) = m(x; 0) + Σ w ⊙ slope`` with every parameter along the last axis."""
    own = own_parameters(module)
    if not activation.is_floating_point() or any(p.shape != activation.shape[-1:] for p in own.values()):
        return False
    # Not at the activation alone: where that is zero, as a loop's first state may be, every layer looks affine.
    entries = torch.arange(activation.numel(), dtype=torch.float32, device=activation.device)
    irregular = 2 * (12.9898 * entries).sin().view(activation.shape).to(activation.dtype)
    try:
        return all(_is_affine_at(module, lifted(tried)) for tried in (activation, irregular))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return False  # it does not take these values or this one input; the next rule decides


def _is_affine_at(module: nn.Module, activation: Tensor) -> bool:
    # Tried at parameters that differ from entry to entry, and in sign: at a weight of ones a GroupNorm, whose weight
    # lies along another axis, would pass, and so would the absolute value of a weight at positive ones.
    offset, slopes = _affine_probe(module, activation)
    trial = {
        name: torch.linspace(-1.5, 1.4, p.numel(), dtype=p.dtype, device=p.device)
        for name, p in own_parameters(module).items()
    }
    actual = bare_call(module, {**lifted_buffers(module), **trial}, activation)
    predicted = offset + sum(trial[name] * slope for name, slope in slopes.items())
    if actual.shape != activation.shape:
        return False
    return bool((actual - predicted).abs().max() <= 1e-4 * actual.abs().max())


def affine(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    _, slopes = _affine_probe(module, activation)
    for name in wanted:
        yield name, slice(None), summed_over_positions(merge_positions(slopes[name] * backprop))
