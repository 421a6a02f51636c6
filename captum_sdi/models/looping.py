"""Loops for models trained without one: training-free looping, arXiv 2605.23872.

    h_0 = layers[:start](...),    g = layers[start:stop]
    h_t = h_(t-1) + damping * (g(h_(t-1)) - h_(t-1))    for t = 1 .. n_loops
    h = anchor * g(h_0) + (1 - anchor) * h_n_loops,     and layers[stop:](h) goes on

`repetition.py` repeats the layers; `looped_model.py` makes the class that the model has meanwhile; `loop_settings.py`
keeps the loop in the model's config.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from captum_sdi.model_facts import saved_loop
from captum_sdi.models.layer_lists import find_layers, find_owner, find_saved_layers
from captum_sdi.models.loop_settings import LoopPlan, LoopSettings, check_plan, read_record
from captum_sdi.models.looped_model import LoopedModel, looped_class


def loop_layers(
    model: nn.Module,
    start: int | None = None,
    stop: int | None = None,
    n_loops: int | None = None,
    *,
    damping: float = 1.0,
    mode: str = "block",
    anchor: float = 0.0,
    remainder: str = "state",
    layers: str | None = None,
) -> LoopedModel:
    """Make a Hugging Face model apply its layers `start` to `stop - 1` `n_loops` times.

    Every repetition uses the same weights. The model is changed in place and returned; it keeps its class's name and is
    an instance of that class, and its parameters keep their names. Leaving ``with``, or `unloop`, makes the model what
    it was. ``model(..., n_loops=4)`` and ``model.generate(..., n_loops=4)`` use another depth for one call.

    ``save_pretrained`` saves the model without the loop, and how it loops in its config. After ``from_pretrained``,
    ``loop_layers(model)`` repeats the layers as the config says; until then `find_loop` and `SDIInfluence` refuse the
    model, which is another one without its loop. An adapter's folder (peft) says nothing of the loop of its base, but
    for a folder that this was saved to: loop the base before the adapter is loaded onto it.

    Training-Free Looped Transformers takes as many sub-steps of an Euler scheme as there are repetitions, which is
    ``damping=1 / n_loops``; it is not adapted when `n_loops` changes. It averages the result with that of a single
    pass, ``anchor=0.5``: an explicit Runge-Kutta quadrature over the Euler chain, in the authors' words. Plain
    repetition, ``damping=1.0``, usually harms a model trained without a loop.

    There is no key-value cache: the repetitions would append to the same entry. A forward pass has ``use_cache=False``
    unless told otherwise, and refuses a cache: pass ``use_cache=False`` to ``generate``. One undamped repetition is the
    untouched model, and may have one. With ``output_hidden_states`` each repetition of a layer may count as a layer.

    Args:
        model: The model, frozen or not, with a head or without one.
        start: The first looped layer, counted from 0; without it, `stop` and `n_loops`, the config says everything.
        stop: The layer after the last looped one.
        n_loops: How often the looped layers are applied.
        damping: How much of the layers' update each repetition takes, above 0 and at most 1.
        mode: "block" repeats the looped layers together, ``a b a b``; "layer" each by itself, ``a a b b``, where
            `n_loops`, `damping` and `anchor` are those of every layer, and each of its calls is a loop step.
        anchor: The weight of a single pass's output in the final one, at least 0 and below 1.
        remainder: To what a damped update adds: "state", that before the repetition, or "input", what came into the
            window first, ``h_0 + damping * (g(h_(t-1)) - h_0)``.
        layers: Name of the `torch.nn.ModuleList` that holds the layers, for a model that has several.

    Returns:
        The same model.

    Raises:
        ValueError: If an argument has an impossible value, the layers are not found, the model is looped already, or
            its config is to say how it loops and does not.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_head=2, n_layer=4)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> before = model(tokens).logits
        >>> with loop_layers(model, 1, 3, n_loops=4, damping=0.25):
        ...     looped = model(tokens).logits
        >>> torch.equal(model(tokens).logits, before), torch.equal(looped, before)
        (True, False)
    """
    check_loopable(model)
    plan = LoopPlan(start, stop, n_loops, damping, mode, anchor, remainder)  # type: ignore[arg-type]
    list_name, plan = chosen_loop(model, plan, layers)
    return install_loop(model, list_name, plan)


def chosen_loop(model: nn.Module, plan: LoopPlan, layers: str | None) -> tuple[str, LoopPlan]:
    """Return the list of layers to loop and the plan that was passed, or those of the model's config where none was.

    Raises:
        ValueError: If the layers are not found, or the config is to say how they are looped and does not.
    """
    numbers: tuple[Any, ...] = (plan.start, plan.stop, plan.n_loops)
    if all(number is None for number in numbers):
        check_says_nothing(plan, layers)
        return plan_of_config(model)
    return find_layers(model, layers), plan


def install_loop(model: nn.Module, list_name: str, plan: LoopPlan) -> LoopedModel:
    """Change the class of a model, and that of the owner of its layers, to one that loops them as planned.

    Returns:
        The same model.

    Raises:
        ValueError: If the plan does not fit the layers.
    """
    n_layers = len(model.get_submodule(list_name))  # type: ignore[arg-type]
    check_plan(plan, list_name, n_layers)
    owner, path = find_owner(model, list_name)
    settings = LoopSettings(model, owner, list_name, plan)
    for module in dict.fromkeys((model, owner)):  # once when the model owns the layers itself
        untouched: Any = type(module)
        module.__class__ = looped_class(untouched)
        vars(module)["_loop"] = settings
    vars(owner)["_looped_list"] = path
    settings.write_record()
    assert isinstance(model, LoopedModel)
    return model


def plan_of_config(model: nn.Module) -> tuple[str, LoopPlan]:
    """Return the list that a loaded model's config says is looped, and the plan.

    Raises:
        ValueError: If the config says nothing, or nothing that makes sense.
    """
    record = saved_loop(model)
    if record is None:
        raise ValueError(
            f"the config of {type(model).__name__} does not say how its layers are looped: pass start=, stop= and "
            "n_loops=."
        )
    saved_name, plan = read_record(record)
    return find_saved_layers(model, saved_name), plan


def check_says_nothing(plan: LoopPlan, layers: str | None) -> None:
    """Raise ValueError if something is asked for, although the config is to say everything."""
    check_no_changes(damping=(plan.damping, 1.0), mode=(plan.mode, "block"), anchor=(plan.anchor, 0.0))
    check_no_changes(remainder=(plan.remainder, "state"), layers=(layers, None))


def check_no_changes(**arguments: tuple[Any, Any]) -> None:
    """Raise ValueError naming the first argument, a value and its default, that would change what the config says."""
    for name, (value, default) in arguments.items():
        if value != default:
            raise ValueError(
                f"{name}={value!r} without start=, stop= and n_loops=: these come from the config together. Pass all "
                f"of them, or set model.n_loops or model.damping afterwards."
            )


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
