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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_sdi.features import Dense, Gradient

PerExample = tuple[str, slice, Gradient]
"""A local parameter name, the examples, and their gradients of that parameter."""


@dataclass(frozen=True)
class Rule:
    """How one layer's per-example gradients are formed."""

    name: str
    gradients: Callable[[nn.Module, Tensor, Tensor, Sequence[str]], Iterator[PerExample]]
    """``(module, activation, backprop, wanted parameter names)`` to the gradients of those parameters."""
    fresh_output: bool = False
    """The layer's output shares memory with nothing else, so that it may be tapped in place."""


def merge_positions(tensor: Tensor, trailing: int = 1) -> Tensor:
    """``(n, ..., *trailing)`` to ``(n, p, *trailing)``: every axis between becomes one position axis."""
    shape = tensor.shape[tensor.ndim - trailing :]
    return tensor.reshape(tensor.shape[0], -1, *shape)


def summed_over_positions(per_position: Tensor) -> Dense:
    """``(n, p, *shape)`` summed over positions, in at least float32."""
    return Dense(lifted(per_position).sum(1))


def lifted(tensor: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for sums and differences."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
