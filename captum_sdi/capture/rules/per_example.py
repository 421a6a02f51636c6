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
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vjp

from captum_sdi.capture.rules.bare_call import bare_call, lifted_buffers, own_parameters
from captum_sdi.capture.rules.base import PerExample, lifted
from captum_sdi.features import Dense

_PER_EXAMPLE_BUDGET = 2**24
"""Entries of dense per-example gradients held at once by `per_example`."""


@torch.no_grad()
def unlike_alone(module: nn.Module, activation: Tensor, output: Tensor) -> str | None:
    """Why the layer's one input does not determine its output, example by example, through its parameters."""
    first = activation[:1].detach().clone()
    version = first._version
    parameters = {name: p.requires_grad_() for name, p in own_parameters(module, lift=False).items()}
    # Inside a checkpointed block, what this trial saves must not be counted: its recomputation does without.
    uncounted = saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        with torch.enable_grad(), uncounted:
            alone = bare_call(module, parameters, first)
    except torch.OutOfMemoryError:  # the batch is too large, not the layer unknown
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        return f"calling its forward on one example alone fails ({error})"
    if first._version != version:
        return "it changes its input in place"
    # Only rounding may differ, by as much as matrix products in TF32 or half precision do.
    tolerance = 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2
    if (
        not isinstance(alone, Tensor)
        or alone.shape[1:] != output.shape[1:]
        or (len(alone), len(output)) != (1, len(activation))
        or (alone - output[:1]).abs().max() > tolerance * output[:1].abs().max()
    ):
        return "its forward on one example alone gives something else than in the batch"
    reached: Sequence[Tensor | None] = [None] * len(parameters)
    if alone.requires_grad:
        ones = torch.ones_like(alone)
        reached = torch.autograd.grad(alone, list(parameters.values()), ones, allow_unused=True)
    unused = [name for name, grad in zip(parameters, reached, strict=True) if grad is None]
    return f"its forward does not read {unused} (a hook does, as for torch.nn.utils.weight_norm)" if unused else None


def per_example(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    own = {**lifted_buffers(module), **own_parameters(module)}
    chosen = {name: own[name] for name in wanted}
    activation, backprop = lifted(activation), lifted(backprop)

    def gradients(a: Tensor, g: Tensor) -> dict[str, Tensor]:
        _, pullback = vjp(lambda p: bare_call(module, {**own, **p}, a.unsqueeze(0)), chosen)  # type: ignore[misc]
        return pullback(g.unsqueeze(0))[0]

    size = max(1, _PER_EXAMPLE_BUDGET // sum(p.numel() for p in chosen.values()))
    for start in range(0, len(activation), size):
        examples = slice(start, start + size)
        a, g = activation[examples], backprop[examples]
        parts: dict[str, Tensor] | None = None
        try:
            parts = torch.vmap(gradients)(a, g)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass  # its forward looks at values, or calls what vmap does not know
        if parts is None:
            each = [gradients(*one) for one in zip(a, g, strict=True)]
            parts = {name: torch.stack([grads[name] for grads in each]) for name in chosen}
        for name, grads in parts.items():
            yield name, examples, Dense(grads)
