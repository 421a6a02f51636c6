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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vjp
from torch.nn.utils.parametrize import ParametrizationList
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


def why_uncovered(module: nn.Module) -> str | None:
    """Why no rule can reach parameters that ``module`` itself owns, as far as its type tells.

    Args:
        module: A module that owns parameters.

    Returns:
        The reason; None for the layers with a closed form and for any module without children.
    """
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq make its gradient depend on the whole batch"
    if isinstance(module, ParametrizationList):
        return "another module computes its weight from them (torch.nn.utils.parametrize)"
    if _closed_form(module) is None and next(module.children(), None) is not None:
        return "it uses them outside any layer of its own"
    return None


def choose_rule(module: nn.Module, activation: Tensor, output: object) -> Rule | str:
    """The first rule that provably reproduces a call of ``module``.

    Args:
        module: A module that owns parameters.
        activation: ``(n, ..., i)`` the one tensor it was called with.
        output: What it returned.

    Returns:
        A rule, or the reason why none covers the module.
    """
    reason, closed = why_uncovered(module), _closed_form(module)
    if reason is not None:
        return reason
    if closed is not None:
        return closed
    if not isinstance(output, Tensor):
        return f"it returned a {type(output).__name__}, not one tensor"
    reason = _unlike_alone(module, activation, output)
    if reason is not None:
        return reason
    return Rule("affine", _affine) if _is_affine(module, activation) else Rule("per example", _per_example)


def _closed_form(module: nn.Module) -> Rule | None:
    """By type, where the type's own forward runs: a subclass or an instance that overrides it may compute anything."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    for kind, rule in _CLOSED_FORMS.items():
        # Further parameters (weight_g of an old-style weight_norm) reach the output in ways unknown to a closed form.
        if isinstance(module, kind) and _forward_of(module) is kind.forward and own <= {"weight", "bias"}:
            return rule
    return None


def _forward_of(module: nn.Module) -> object:
    """The function that computes ``module``'s output, beneath a wrapper that computes the same."""
    forward: object = vars(module).get("forward", type(module).forward)
    hook = vars(module).get("_hf_hook")
    if type(hook).__name__ == "AlignDevicesHook":  # accelerate's: it moves tensors between devices
        forward = vars(module).get("_old_forward", forward)
    return getattr(forward, "__func__", forward)


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
        yield "weight", slice(None), _summed(_positions(normalized.mul_(backprop), len(shape)))
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


def _lifted_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: _lifted(buffer) for name, buffer in module.named_buffers(recurse=False)}


def _own_parameters(module: nn.Module, lift: bool = True) -> dict[str, Tensor]:
    own = {name: p.detach() for name, p in module.named_parameters(recurse=False)}
    return {name: _lifted(p) for name, p in own.items()} if lift else own


def _call(module: nn.Module, tensors: dict[str, Tensor], activation: Tensor) -> Tensor:
    return functional_call(_Bare(module), {f"inner.{name}": t for name, t in tensors.items()}, (activation,))


def _affine_probe(module: nn.Module, activation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """``m(x; 0)`` and, for each parameter, ``m(x; 1) - m(x; 0)``: the slope ∂m/∂w if m is affine in w."""
    activation = _lifted(activation)
    zeros = {name: torch.zeros_like(p) for name, p in _own_parameters(module).items()}
    given = {**_lifted_buffers(module), **zeros}
    offset = _call(module, given, activation)
    slopes = {
        name: _call(module, {**given, name: torch.ones_like(p)}, activation) - offset for name, p in zeros.items()
    }
    return offset, slopes


@torch.no_grad()
def _is_affine(module: nn.Module, activation: Tensor) -> bool:
    """Whether ``m(x; w) = m(x; 0) + Σ w ⊙ slope`` with every parameter along the last axis."""
    own = _own_parameters(module)
    if not activation.is_floating_point() or any(p.shape != activation.shape[-1:] for p in own.values()):
        return False
    # Not at the activation alone: where that is zero, as a loop's first state may be, every layer looks affine.
    entries = torch.arange(activation.numel(), dtype=torch.float32, device=activation.device)
    irregular = 2 * (12.9898 * entries).sin().view(activation.shape).to(activation.dtype)
    try:
        return all(_is_affine_at(module, _lifted(tried)) for tried in (activation, irregular))
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
        for name, p in _own_parameters(module).items()
    }
    actual = _call(module, {**_lifted_buffers(module), **trial}, activation)
    predicted = offset + sum(trial[name] * slope for name, slope in slopes.items())
    if actual.shape != activation.shape:
        return False
    return bool((actual - predicted).abs().max() <= 1e-4 * actual.abs().max())


def _affine(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    _, slopes = _affine_probe(module, activation)
    for name in wanted:
        yield name, slice(None), _summed(_positions(slopes[name] * backprop))


# --- any other leaf -----------------------------------------------------------------------------------------------

_PER_EXAMPLE_BUDGET = 2**24
"""Entries of dense per-example gradients held at once by `_per_example`."""


@torch.no_grad()
def _unlike_alone(module: nn.Module, activation: Tensor, output: Tensor) -> str | None:
    """Why the layer's one input does not determine its output, example by example, through its parameters."""
    first = activation[:1].detach().clone()
    version = first._version
    parameters = {name: p.requires_grad_() for name, p in _own_parameters(module, lift=False).items()}
    # Inside a checkpointed block, what this trial saves must not be counted: its recomputation does without.
    uncounted = saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        with torch.enable_grad(), uncounted:
            alone = _call(module, parameters, first)
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


def _per_example(
    module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]
) -> Iterator[PerExample]:
    own = {**_lifted_buffers(module), **_own_parameters(module)}
    chosen = {name: own[name] for name in wanted}
    activation, backprop = _lifted(activation), _lifted(backprop)

    def gradients(a: Tensor, g: Tensor) -> dict[str, Tensor]:
        _, pullback = vjp(lambda p: _call(module, {**own, **p}, a.unsqueeze(0)), chosen)  # type: ignore[misc]
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


_CLOSED_FORMS: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule("linear", _linear, fresh_output=True),
    Conv1D: Rule("conv1d", _conv1d, fresh_output=True),
    nn.Embedding: Rule("embedding", _embedding, fresh_output=True),
    nn.LayerNorm: Rule("layer norm", _layer_norm, fresh_output=True),
    nn.RMSNorm: Rule("layer norm", _layer_norm, fresh_output=True),
}
