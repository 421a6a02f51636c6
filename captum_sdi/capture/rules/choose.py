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
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from captum_sdi.capture.rules.affine import affine, is_affine
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.embedding import embedding
from captum_sdi.capture.rules.linear import conv1d, linear
from captum_sdi.capture.rules.norms import layer_norm
from captum_sdi.capture.rules.per_example import per_example, unlike_alone


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
    reason = unlike_alone(module, activation, output)
    if reason is not None:
        return reason
    return Rule("affine", affine) if is_affine(module, activation) else Rule("per example", per_example)


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


_CLOSED_FORMS: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule("linear", linear, fresh_output=True),
    Conv1D: Rule("conv1d", conv1d, fresh_output=True),
    nn.Embedding: Rule("embedding", embedding, fresh_output=True),
    nn.LayerNorm: Rule("layer norm", layer_norm, fresh_output=True),
    nn.RMSNorm: Rule("layer norm", layer_norm, fresh_output=True),
}
