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

from captum_sdi.capture.rules.base import PerExample, merge_positions
from captum_sdi.features import Outer


def embedding(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    ids, g = activation.reshape(activation.shape[0], -1), merge_positions(backprop)
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is not None:  # autograd leaves this row without gradient
        g = g * ids.ne(module.padding_idx).unsqueeze(-1)
    yield "weight", slice(None), Outer(rows=ids, cols=g)
