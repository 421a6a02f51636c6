"""Which rule covers a call of a layer, or why none does."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from captum_sdi.capture import refusals
from captum_sdi.capture.rules.affine import affine, is_affine, slopes_need_one_position
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.embedding import looks_at_batch
from captum_sdi.capture.rules.one_example import why_unlike_alone
from captum_sdi.capture.rules.per_example import per_example
from captum_sdi.capture.rules.registry import registered_rule

_AFFINE = Rule("affine", affine, positionwise=slopes_need_one_position)
_PER_EXAMPLE = Rule("per example", per_example)


def why_uncovered(module: nn.Module) -> str | None:
    """Return why no rule can reach a module's own parameters, as far as its type tells.

    Returns:
        The reason; None for the types with a registered rule and for any module without children.
    """
    if looks_at_batch(module):
        return refusals.depends_on_batch()
    if isinstance(module, ParametrizationList):
        return refusals.computed_elsewhere()
    if registered_rule(module) is None and next(module.children(), None) is not None:
        return refusals.used_outside_layers()
    return None


def choose_rule(module: nn.Module, activation: Tensor, output: object) -> Rule | str:
    """Return the rule for a call: the one registered for the type, or a generic one on trial.

    A generic rule is taken where it provably reproduces this call.

    Args:
        module: A module that owns parameters.
        activation: ``(n, ..., i)`` the one tensor it was called with.
        output: What it returned.

    Returns:
        A rule, or the reason why none covers the module.
    """
    reason = why_uncovered(module)
    if reason is not None:
        return reason
    if not isinstance(output, Tensor):
        return refusals.several_outputs(output)
    registered = registered_rule(module)
    if registered is not None:
        return registered
    reason = why_unlike_alone(module, activation, output)
    if reason is not None:
        return reason
    return _AFFINE if is_affine(module, activation) else _PER_EXAMPLE
