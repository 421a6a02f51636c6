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

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp
from transformers.pytorch_utils import Conv1D

from captum_sdi.sketch import Dense, Gradient, Outer

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


def may_cover(module: nn.Module) -> bool:
    """Whether some rule can reach parameters that ``module`` itself owns, as far as its type tells.

    Args:
        module: A module that owns parameters.

    Returns:
        True for the layers with a closed form and for any module without children.
    """
    return _closed_form(module) is not None or next(module.children(), None) is None


def choose_rule(module: nn.Module, activation: Tensor, output: object) -> Rule | None:
    """The first rule that provably reproduces a call of ``module``.

    Args:
        module: A module that owns parameters.
        activation: ``(n, ..., i)`` the one tensor it was called with.
        output: What it returned.

    Returns:
        A rule, or None when none covers the module.
    """
    closed = _closed_form(module)
    if closed is not None:
        return closed
    if not isinstance(output, Tensor) or not may_cover(module):
        return None
    if _is_affine(module, activation):
        return Rule("affine", _affine)
    return Rule("per example", _per_example) if _acts_per_example(module, activation, output) else None


def _closed_form(module: nn.Module) -> Rule | None:
    """By type, where the type's own forward runs: a subclass or an instance that overrides it may compute anything."""
    for kind, rule in _CLOSED_FORMS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward and "forward" not in vars(module):
            batch_wide = isinstance(module, nn.Embedding) and (module.max_norm or module.scale_grad_by_freq)
            affine = getattr(module, "elementwise_affine", True)
            return rule if affine and not batch_wide else None
    return None


def _positions(tensor: Tensor, trailing: int = 1) -> Tensor:
    """``(n, ..., *trailing)`` to ``(n, p, *trailing)``: every axis between becomes one position axis."""
    shape = tensor.shape[tensor.ndim - trailing :]
    return tensor.reshape(tensor.shape[0], -1, *shape)


def _linear(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    a, g = _positions(activation), _positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=g, cols=a)
    if "bias" in wanted:
        yield "bias", slice(None), _summed(g)


def _conv1d(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    a, g = _positions(activation), _positions(backprop)
    if "weight" in wanted:
        yield "weight", slice(None), Outer(rows=a, cols=g)
    if "bias" in wanted:
        yield "bias", slice(None), _summed(g)


def _embedding(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    ids, g = activation.reshape(activation.shape[0], -1), _positions(backprop)
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is not None:  # autograd leaves this row without gradient
        g = g * ids.ne(module.padding_idx).unsqueeze(-1)
    yield "weight", slice(None), Outer(rows=ids, cols=g)


def _layer_norm(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    shape, normalize = module.normalized_shape, F.rms_norm if isinstance(module, nn.RMSNorm) else F.layer_norm
    if "weight" in wanted:
        normalized = normalize(_lifted(activation), shape, eps=module.eps)  # type: ignore[arg-type]
        yield "weight", slice(None), _summed(_positions(normalized * backprop, len(shape)))
    if "bias" in wanted:
        yield "bias", slice(None), _summed(_positions(backprop, len(shape)))


def _summed(per_position: Tensor) -> Dense:
    """``(n, p, *shape)`` summed over positions, in at least float32."""
    return Dense(_lifted(per_position).sum(1))


def _lifted(tensor: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for sums and differences."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- any elementwise-affine layer, recognised by what it computes -------------------------------------------------


class _Bare(nn.Module):
    """A module's own forward without its hooks: neither ours nor the user's belong to what the layer computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, activation: Tensor) -> Tensor:
        return self.inner.forward(activation)


def _own_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: _lifted(p.detach()) for name, p in module.named_parameters(recurse=False)}


def _call(module: nn.Module, parameters: dict[str, Tensor], activation: Tensor) -> Tensor:
    return functional_call(_Bare(module), {f"inner.{k}": v for k, v in parameters.items()}, (activation,))


def _affine_probe(module: nn.Module, activation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """``m(x; 0)`` and, for each parameter, ``m(x; 1) - m(x; 0)``: the slope ∂m/∂w if m is affine in w."""
    activation = _lifted(activation)
    zeros = {name: torch.zeros_like(p) for name, p in _own_parameters(module).items()}
    offset = _call(module, zeros, activation)
    slopes = {
        name: _call(module, {**zeros, name: torch.ones_like(p)}, activation) - offset for name, p in zeros.items()
    }
    return offset, slopes


@torch.no_grad()
def _is_affine(module: nn.Module, activation: Tensor) -> bool:
    """Whether ``m(x; w) = m(x; 0) + Σ w ⊙ slope`` with every parameter along the last axis."""
    # Tried at parameters that differ from entry to entry: at a weight of ones a GroupNorm, whose weight lies along
    # another axis, would pass.
    own = _own_parameters(module)
    if not activation.is_floating_point() or any(p.shape != activation.shape[-1:] for p in own.values()):
        return False
    try:
        offset, slopes = _affine_probe(module, activation)
        trial = {name: torch.linspace(0.5, 1.5, p.numel(), dtype=p.dtype, device=p.device) for name, p in own.items()}
        actual = _call(module, trial, _lifted(activation))
    except (RuntimeError, TypeError, ValueError):
        return False  # it does not take these values or this one input; the next rule decides
    predicted = offset + sum(trial[name] * slope for name, slope in slopes.items())
    return actual.shape == activation.shape and torch.allclose(actual, predicted, rtol=1e-4, atol=1e-5)


def _affine(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    _, slopes = _affine_probe(module, activation)
    for name in wanted:
        yield name, slice(None), _summed(_positions(slopes[name] * backprop))


# --- any other leaf -----------------------------------------------------------------------------------------------

_PER_EXAMPLE_BUDGET = 2**24
"""Entries of dense per-example gradients held at once by `_per_example`."""


@torch.no_grad()
def _acts_per_example(module: nn.Module, activation: Tensor, output: Tensor) -> bool:
    """Whether the layer's one input determines its output, example by example."""
    if not any(
        p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
        for p in inspect.signature(module.forward).parameters.values()
    ):
        return False
    try:
        alone = module.forward(activation[:1])
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(alone, Tensor) or alone.shape[1:] != output.shape[1:] or len(output) != len(activation):
        return False
    tolerance = 1e-5 if output.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(alone.float(), output[:1].float(), rtol=tolerance, atol=tolerance)


def _per_example(
    module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]
) -> Iterator[PerExample]:
    own = _own_parameters(module)
    chosen = {name: own[name] for name in wanted}
    activation, backprop = _lifted(activation), _lifted(backprop)

    def gradients(a: Tensor, g: Tensor) -> dict[str, Tensor]:
        _, pullback = vjp(lambda p: _call(module, {**own, **p}, a.unsqueeze(0)), chosen)  # type: ignore[misc]
        return pullback(g.unsqueeze(0))[0]

    size = max(1, _PER_EXAMPLE_BUDGET // sum(p.numel() for p in chosen.values()))
    for start in range(0, len(activation), size):
        examples = slice(start, start + size)
        for name, grads in torch.vmap(gradients)(activation[examples], backprop[examples]).items():
            yield name, examples, Dense(grads)


_CLOSED_FORMS: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule("linear", _linear, fresh_output=True),
    Conv1D: Rule("conv1d", _conv1d, fresh_output=True),
    nn.Embedding: Rule("embedding", _embedding, fresh_output=True),
    nn.LayerNorm: Rule("layer norm", _layer_norm, fresh_output=True),
    nn.RMSNorm: Rule("layer norm", _layer_norm, fresh_output=True),
}
