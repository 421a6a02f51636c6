"""Where a model holds its layers: the list that is looped, and whose forward goes through it."""

from __future__ import annotations

from torch import nn

from captum_sdi.model_facts import has_children


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the model's lists of modules by name, the outer ones first."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
    return lists


def find_layers(model: nn.Module, layers: str | None) -> str:
    """Return the name of the list of layers: `layers`, or that of the only list there is."""
    model_class = type(model).__name__
    lists = layer_lists(model)
    if layers is not None:
        if layers not in lists:
            raise ValueError(f"layers={layers!r} names no ModuleList of {model_class}; use one of {[*lists]}.")
        return layers
    candidates: list[str] = []
    for name, module_list in lists.items():
        # A list comes before the lists inside it, which hold experts or the like.
        is_inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if not is_inside and all(has_children(layer) for layer in module_list):
            candidates.append(name)
    if len(candidates) == 1:
        return candidates[0]
    problem = "several lists" if candidates else "no list"
    choices = [f"{name!r} of {len(lists[name])}" for name in candidates or lists]
    raise ValueError(
        f"{model_class} has {problem} of layers, so layers=None does not say which to loop; "
        f"pass the name of a ModuleList in layers=. There is: {', '.join(choices) or 'none'}."
    )


def find_saved_layers(model: nn.Module, saved_name: str) -> str:
    """Return the name of the list that was looped: the model may be loaded without its head, or inside adapters.

    Raises:
        ValueError: If no list, or several, have that name but for what comes before it.
    """
    names = [*layer_lists(model)]
    if saved_name in names:
        return saved_name
    longer = [name for name in names if name.endswith(f".{saved_name}")]
    matching = longer + [name for name in names if saved_name.endswith(f".{name}")]
    if len(matching) != 1:
        raise ValueError(
            f"the config says that the layers {saved_name!r} are looped, and {type(model).__name__} has the lists "
            f"{names}: pass layers= with one of them, start=, stop= and n_loops=."
        )
    return matching[0]


def find_owner(model: nn.Module, list_name: str) -> tuple[nn.Module, str]:
    """Return the module whose forward iterates over the list, and the list's name in it."""
    *parents, path = list_name.split(".")
    owner = model.get_submodule(".".join(parents))
    while isinstance(owner, nn.ModuleDict | nn.ModuleList):  # containers are not called
        path = f"{parents.pop()}.{path}"
        owner = model.get_submodule(".".join(parents))
    return owner, path
