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

from torch import Tensor, nn

from captum_sdi.capture.rules.base import PerExample, merge_positions, summed_over_positions
from captum_sdi.features import Outer


def linear(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    a, g = merge_positions(activation), merge_positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=g, cols=a)
    if "bias" in wanted:
        yield "bias", slice(None), summed_over_positions(g)


def conv1d(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    a, g = merge_positions(activation), merge_positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=a, cols=g)
    if "bias" in wanted:
        yield "bias", slice(None), summed_over_positions(g)
