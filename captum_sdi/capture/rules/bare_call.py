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

from torch import Tensor, nn
from torch.func import functional_call

from captum_sdi.capture.rules.base import lifted


class _Bare(nn.Module):
    """A module's own forward without its hooks: neither ours nor the user's belong to what the layer computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, activation: Tensor) -> Tensor:
        return self.inner.forward(activation)


def lifted_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: lifted(buffer) for name, buffer in module.named_buffers(recurse=False)}


def own_parameters(module: nn.Module, lift: bool = True) -> dict[str, Tensor]:
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    return {name: lifted(p) for name, p in own.items()} if lift else own


def bare_call(module: nn.Module, tensors: dict[str, Tensor], activation: Tensor) -> Tensor:
    return functional_call(_Bare(module), {f"inner.{name}": t for name, t in tensors.items()}, (activation,))
