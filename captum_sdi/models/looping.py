"""Loops for models trained without one: training-free looping, arXiv 2605.23872.

    h = layers[:start](h)
    repeat n_loops times:  h = h + damping * (layers[start:stop](h) - h)
    h = layers[stop:](h)

`repetition.py` repeats the layers; `looped_model.py` makes the class that the model has meanwhile.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from captum_sdi.models.loop_settings import LoopSettings, check_damping, check_n_loops
from captum_sdi.models.looped_model import LoopedModel, looped_class
from captum_sdi.words import is_integer


def loop_layers(
    model: nn.Module,
    start: int,
    stop: int,
    n_loops: int,
    *,
    damping: float = 1.0,
    layers: str | None = None,
) -> LoopedModel:
    """Make a Hugging Face model apply its layers `start` to `stop - 1` `n_loops` times.

    Every repetition uses the same weights. The model is changed in place and returned; it keeps its class's name and is
    an instance of that class, and its parameters keep their names, so that ``save_pretrained`` saves the model without
    the loop. Leaving ``with``, or `unloop`, makes the model what it was. ``model(..., n_loops=4)`` and
    ``model.generate(..., n_loops=4)`` use another depth for one call.

    Training-Free Looped Transformers takes as many sub-steps of an Euler scheme as there are repetitions, which is
    ``damping=1 / n_loops`` here; it is not adapted when `n_loops` changes. (The paper's code also mixes the result
    with that of a single pass, which this function does not.) Plain repetition, ``damping=1.0``, is what a model
    trained with a loop does, and usually harms one that was not.

    There is no key-value cache: the repetitions would append to the same entry of it. A forward pass has
    ``use_cache=False`` unless it is told otherwise, and raises ValueError where it is handed a cache, so pass
    ``use_cache=False`` to ``generate``. With one undamped repetition the model is the untouched one, and may have a
    cache. With ``output_hidden_states`` each repetition of a layer may count as a layer.

    Args:
        model: The model, frozen or not, with a head or without one.
        start: The first looped layer, counted from 0.
        stop: The layer after the last looped one.
        n_loops: How often the looped layers are applied.
        damping: How much of the layers' update each repetition takes, above 0 and at most 1.
        layers: Name of the `torch.nn.ModuleList` that holds the layers, for a model that has several.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument has an impossible value, the layers are not found, or the model is looped already.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_head=2, n_layer=4)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> before = model(tokens).logits
        >>> with loop_layers(model, 1, 3, n_loops=4, damping=0.25):
        ...     looped = model(tokens).logits
        ...     half_as_deep = model(tokens, n_loops=2).logits
        >>> torch.equal(model(tokens).logits, before), torch.equal(looped, before)
        (True, False)
    """
    check_loopable(model)
    list_name = find_layers(model, layers)
    n_layers = len(model.get_submodule(list_name))  # type: ignore[arg-type]
    has_layers = f"{list_name!r} has {n_layers}"
    check_between("start", start, 0, n_layers - 1, reason=f"{has_layers} layers")
    check_between("stop", stop, start + 1, n_layers, reason=f"it is the layer after the last one, and {has_layers}")
    check_n_loops(n_loops)
    check_damping(damping)
    owner, path = find_owner(model, list_name)
    settings = LoopSettings(model, owner, start, stop, n_loops, float(damping))
    for module in dict.fromkeys((model, owner)):  # once when the model owns the layers itself
        untouched: Any = type(module)
        module.__class__ = looped_class(untouched)
        vars(module)["_loop"] = settings
    vars(owner)["_looped_list"] = path
    assert isinstance(model, LoopedModel)
    return model


def check_loopable(model: nn.Module) -> None:
    """Raise ValueError if `model` is no model, has a loop already, or is compiled."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a model, a torch.nn.Module.")
    for name, module in model.named_modules():
        if isinstance(module, LoopedModel):
            place = f" in {name!r}" if name else ""
            raise ValueError(
                f"model is looped already{place}: call unloop() on it first, or set its n_loops and damping."
            )
        if hasattr(module, "_orig_mod"):
            raise ValueError("model is compiled: loop the layers first, then call torch.compile.")
    if "n_loops" in inspect.signature(model.forward).parameters:
        raise ValueError(f"model={type(model).__name__} has n_loops of its own; pass it to forward instead.")


def find_layers(model: nn.Module, layers: str | None) -> str:
    """Return the name of the list of layers: `layers`, or that of the only list there is."""
    model_class = type(model).__name__
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            lists[name] = module
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


def has_children(module: nn.Module) -> bool:
    """Return whether a module contains others, as a transformer layer does."""
    return next(module.children(), None) is not None


def find_owner(model: nn.Module, list_name: str) -> tuple[nn.Module, str]:
    """Return the module whose forward iterates over the list, and the list's name in it."""
    *parents, path = list_name.split(".")
    owner = model.get_submodule(".".join(parents))
    while isinstance(owner, nn.ModuleDict | nn.ModuleList):  # containers are not called
        path = f"{parents.pop()}.{path}"
        owner = model.get_submodule(".".join(parents))
    return owner, path


def check_between(
    name: str,
    value: Any,
    lowest: int,
    highest: int,
    reason: str,
) -> None:
    """Raise ValueError naming the argument unless it is an integer from `lowest` to `highest`."""
    if not is_integer(value) or not lowest <= value <= highest:
        raise ValueError(f"{name}={value!r} must be an integer from {lowest} to {highest}: {reason}.")
