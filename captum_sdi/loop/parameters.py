"""From the names a user gives to modules and parameters: ``loop=``, ``layers=``, with the nearest names in errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from torch import nn

from captum_sdi.features import LoopSpec, canonical_name


def as_loop(loop: str | Sequence[str] | LoopSpec | None) -> LoopSpec | None:
    """Return the LoopSpec that a user named; None where the loop is to be found.

    Raises:
        TypeError: If ``loop`` is neither a name, several names, a LoopSpec nor None.
    """
    if loop is None or isinstance(loop, LoopSpec):
        return loop
    if not isinstance(loop, Sequence):
        raise TypeError(f"loop= must be a module's name, several names, a LoopSpec or None, got {loop!r}.")
    names = (loop,) if isinstance(loop, str) else tuple(loop)
    return LoopSpec(modules=names)


def target_parameters(
    model: nn.Module,
    layers: str | Sequence[str] | None,
    loop: LoopSpec,
) -> list[str]:
    """Return the names of the parameters whose influence counts, in the model's order.

    ``layers="loop"`` stands for the loop's trainable parameters, None for every trainable parameter, and a list of
    module names for all their parameters, frozen or not, as in Captum.

    Raises:
        TypeError: If a bare string is given where a list is meant.
        ValueError: If a name is unknown, or no parameter is left.
    """
    if layers == "loop":
        place = "the loop"
        targets = _trainable(parameters_inside(model, loop.modules, "loop="))
    elif layers is None:
        place = type(model).__name__
        targets = _trainable(model.parameters())
    elif isinstance(layers, str):
        raise TypeError(f"layers={layers!r}: pass a list of module names, 'loop' or None.")
    else:
        place = f"layers={list(layers)}"
        targets = list(parameters_inside(model, layers, "layers="))
    target_ids = set(map(id, targets))
    names = [name for name, parameter in model.named_parameters() if id(parameter) in target_ids]
    if not names:
        raise ValueError(
            f"There is no trainable parameter in {place}. Name other layers in layers=[...], or unfreeze some with "
            "requires_grad_(True); adapters are loaded frozen unless "
            "PeftModel.from_pretrained(..., is_trainable=True) is said."
        )
    return names


def _trainable(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def parameters_inside(
    model: nn.Module,
    names: Sequence[str],
    argument: str,
) -> Iterator[nn.Parameter]:
    """Yield the parameters of the modules of these names."""
    for name in names:
        yield from find_module(model, name, argument).parameters()


def find_module(
    model: nn.Module,
    name: str,
    argument: str,
) -> nn.Module:
    """Return the submodule of that name, wrappers' prefixes put aside; ``""`` is the model.

    Raises:
        ValueError: If there is none; names the ``argument`` that the name came from, and the nearest names.
    """
    modules = {canonical_name(known): module for known, module in model.named_modules(remove_duplicate=False)}
    module = modules.get(canonical_name(name))
    if module is None:
        nearest = difflib.get_close_matches(name, modules, n=3)
        if not nearest:
            nearest = [known for known in modules if known][:5]
        model_name = type(model).__name__
        raise ValueError(f"{argument} names {name!r}, which {model_name} does not have. Nearest: {nearest}.")
    return module


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, with its name without wrappers' prefixes."""
    for name, module in model.named_modules():
        yield canonical_name(name), module


def called_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of the modules to be called; a container's children stand for it."""
    called_ids: set[int] = set()
    for name in names:
        module = find_module(model, name, "loop=")
        called_ids.update(map(id, called_modules(module)))
    return [name for name, module in canonical_modules(model) if id(module) in called_ids]


def called_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or the contents of a container that is never called itself."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from called_modules(child)
    else:
        yield module
