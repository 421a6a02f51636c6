"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from torch import nn

from captum_sdi.features import LoopSpec, canonical_name


def target_parameters(model: nn.Module, layers: str | Sequence[str] | None, loop: LoopSpec) -> list[str]:
    """Names of the parameters whose influence counts.

    Args:
        model: The model.
        layers: ``"loop"``: the loop's trainable parameters. None: every trainable parameter. A list of module names:
            all their parameters, frozen or not, as in Captum.
        loop: What repeats.

    Returns:
        Each once, in the model's order.

    Raises:
        TypeError: A bare string where a list is meant.
        ValueError: A name is unknown, or no parameter is left.
    """
    if layers == "loop":
        chosen, named = _inside(model, loop.modules, "loop="), "the loop"
        count = {id(p) for p in chosen if p.requires_grad}
    elif layers is None:
        named, count = type(model).__name__, {id(p) for p in model.parameters() if p.requires_grad}
    elif isinstance(layers, str):
        raise TypeError(f"layers={layers!r}: pass a list of module names, 'loop' or None.")
    else:
        named, count = f"layers={list(layers)}", {id(p) for p in _inside(model, layers, "layers=")}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in count]
    if not names:
        raise ValueError(
            f"There is no trainable parameter in {named}. Name other layers in layers=[...], or unfreeze some with "
            "requires_grad_(True)."
        )
    return names


def _inside(model: nn.Module, names: Sequence[str], argument: str) -> list[nn.Parameter]:
    return [p for name in names for p in find_module(model, name, argument).parameters()]


def called_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the modules that are called when these are: a container's children stand for it."""
    found = {id(part) for name in names for part in called_modules(find_module(model, name, "loop="))}
    return [canonical_name(name) for name, module in model.named_modules() if id(module) in found]


def as_loop(loop: str | Sequence[str] | LoopSpec | None) -> LoopSpec | None:
    """What the user named, as a LoopSpec.

    Args:
        loop: A module name, names, a LoopSpec, or None.

    Returns:
        A LoopSpec, or None when it is to be found.

    Raises:
        TypeError: It is something else.
    """
    if loop is None or isinstance(loop, LoopSpec):
        return loop
    if not isinstance(loop, Sequence):
        raise TypeError(f"loop= must be a module's name, several names, a LoopSpec or None, got {loop!r}.")
    return LoopSpec(modules=(loop,) if isinstance(loop, str) else tuple(loop))


def find_module(model: nn.Module, name: str, argument: str) -> nn.Module:
    """The submodule of that name, with or without the prefixes that wrappers put before it.

    Args:
        model: Where to look.
        name: As `torch.nn.Module.named_modules` gives it; "" is the model itself.
        argument: Named in the error.

    Returns:
        The module.

    Raises:
        ValueError: There is none; the nearest names are suggested.
    """
    modules = {canonical_name(known): module for known, module in model.named_modules(remove_duplicate=False)}
    module = modules.get(canonical_name(name))
    if module is None:
        near = difflib.get_close_matches(name, modules, n=3) or [known for known in modules if known][:5]
        raise ValueError(f"{argument} names {name!r}, which {type(model).__name__} does not have. Nearest: {near}.")
    return module


def called_modules(module: nn.Module) -> Iterator[nn.Module]:
    """``module``, or for a container that is never called itself, what it holds.

    Args:
        module: Any module.

    Yields:
        Modules with a forward of their own.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from called_modules(child)
    else:
        yield module
