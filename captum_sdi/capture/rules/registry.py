"""The registry: which layer rule is for a module, by its type."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from torch import nn

from captum_sdi.borrow import recompute
from captum_sdi.capture.rules.base import Gradients, PositionTest, Rule
from captum_sdi.offload import align_hooks

LayerType = type[nn.Module] | str
"""A class, or ``"module.qualified_name"`` of a class that may not be installed."""

_REGISTERED: list[tuple[LayerType, Rule]] = []


def rule(
    *layer_types: LayerType,
    parameters: Iterable[str] | None = None,
    fresh_output: bool = False,
    positionwise: bool | PositionTest = False,
) -> Callable[[Gradients], Gradients]:
    """Register a layer rule for these types; a later one for the same type takes its place.

    A rule is taken for a type's subclasses too, as long as the forward that runs is the registered type's own.

    Args:
        layer_types: Classes, or their names such as ``"transformers.pytorch_utils.Conv1D"``.
        parameters: Names of all parameters that the rule knows. A module that owns others is left to the next rule;
            None: the rule knows whatever such a module owns.
        fresh_output: The layer's output shares memory with nothing else, neither its input nor a buffer, so that it
            can be observed without a copy.
        positionwise: Positions along the activation's second axis do not look at each other, so that each can be taken
            for an example when features are kept per token; or a function ``(module, activation)`` that says so. False
            is right for every layer, and slower.

    Returns:
        A decorator that registers a function and returns it unchanged.

    Raises:
        TypeError: If a type is neither a class nor such a name, or none is given.
    """
    for layer_type in layer_types:
        is_name = isinstance(layer_type, str) and "." in layer_type
        if not is_name and not isinstance(layer_type, type):
            raise TypeError(f"rule(...) must be given layer types or 'module.Class' names, got {layer_type!r}.")
    if not layer_types:
        raise TypeError("rule() must be given the layer types that it is for, such as @rule(torch.nn.Linear).")
    known = None if parameters is None else frozenset(parameters)

    def register(gradients: Gradients) -> Gradients:
        name = gradients.__name__.replace("_", " ")
        registered = Rule(name, gradients, known, fresh_output, positionwise)
        _REGISTERED.extend((layer_type, registered) for layer_type in layer_types)
        return gradients

    return register


def registered_rule(module: nn.Module) -> Rule | None:
    """Return the rule registered for a module's type, or for its closest base type.

    A subclass or an instance that overrides the forward may compute anything, and parameters that a rule does not know
    (weight_g of an old-style weight_norm) reach the output in unknown ways: such modules are not taken.

    Returns:
        None where no rule is registered.
    """
    forward = forward_of(module)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    for layer_type in type(module).__mro__:
        if getattr(layer_type, "forward", None) is not forward:
            continue
        keys = layer_type, f"{layer_type.__module__}.{layer_type.__qualname__}"
        for registered_type, candidate in reversed(_REGISTERED):
            if registered_type in keys and candidate.knows(names):
                return candidate
    return None


def forward_of(module: nn.Module) -> object:
    """Return the function that computes a module's output, beneath harmless wrappers."""
    forward: object = vars(module).get("forward", type(module).forward)
    if isinstance(forward, functools.partial) and forward.func is recompute:
        forward = forward.args[0]
    if align_hooks(module):  # it moves tensors between devices
        forward = vars(module).get("_old_forward", forward)
    return getattr(forward, "__func__", forward)
