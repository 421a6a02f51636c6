"""One forward pass with looped layers: stand-ins for the layers, and their repetition.

Only the list of layers that the model's own forward iterates over is replaced, and only while that forward runs. In
place of each looped layer the forward finds a stand-in, which calls the layer and remembers the arguments: the mask,
the rotary embedding, and whatever else the model passes. The last stand-in then repeats all layers with those
arguments and a new hidden state. The layers themselves are untouched and are called like any module, so that hooks
see every repetition.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from captum_sdi.models.loop_settings import LoopPlan, LoopSettings

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""How decoder layers call a key-value cache, or the state that takes its place."""


def call_looped(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a looped module's own `forward`, with stand-ins for the looped layers."""
    settings: LoopSettings | None = vars(module).get("_loop")
    if settings is None:  # a wrapper kept the forward of a model that is no longer looped
        return forward(*args, **kwargs)
    with settings.depth(kwargs.pop("n_loops", None)):
        if settings.plan.changes_nothing:
            return forward(*args, **kwargs)
        keyword_parameters = parameter_names(type(module))[len(args) :]
        if kwargs.get("use_cache") is None and "use_cache" in keyword_parameters:
            kwargs["use_cache"] = False
        with replace_layers(module, settings):
            return forward(*args, **kwargs)


@contextmanager
def replace_layers(module: nn.Module, settings: LoopSettings) -> Iterator[None]:
    """Put stand-ins in place of the looped layers inside `with`, if `module` owns the layers."""
    path = vars(module).get("_looped_list")
    if path is None:
        yield
        return
    *parents, name = path.split(".")
    holder: Any = module.get_submodule(".".join(parents))
    if name in vars(holder):  # __call__ has put the stand-ins there already
        yield
        return
    layers = list(holder._modules[name])
    repetitions = [Repetition(layers[start:stop], start, settings.plan) for start, stop in windows(settings.plan)]
    looped = slice(settings.plan.start, settings.plan.stop)
    stand_ins = [repetition.stand_ins() for repetition in repetitions]
    layers[looped] = itertools.chain.from_iterable(stand_ins)
    # An entry in the instance's own dictionary hides the submodule of that name from `self.layers`, and from nothing
    # else: parameters, state_dict and get_submodule look in `_modules`.
    vars(holder)[name] = layers
    try:
        yield
    finally:
        del vars(holder)[name]
    if not all(repetition.finished for repetition in repetitions):
        model_class = type(module).__name__
        last_layer = settings.plan.stop - 1
        raise RuntimeError(
            f"{model_class} did not call the layers {settings.plan.start} to {last_layer} through self.{path}: "
            "nothing was looped. loop_layers cannot loop this model; call unloop()."
        )


def windows(plan: LoopPlan) -> list[tuple[int, int]]:
    """Return the first layer, and the one after the last, of what is repeated together.

    Example:
        >>> windows(LoopPlan(1, 3, 4, 1.0, "layer", 0.0, "state"))
        [(1, 2), (2, 3)]
    """
    if plan.mode == "block":
        return [(plan.start, plan.stop)]
    return [(layer, layer + 1) for layer in range(plan.start, plan.stop)]


class StandIn:
    """A stand-in for one looped layer: it calls the layer, and has the layer's attributes."""

    def __init__(self, repetition: Repetition, position: int) -> None:
        self._repetition = repetition
        self._position = position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, and after the last one repeat them all."""
        return self._repetition.call_layer(self._position, args, kwargs)

    def __getattr__(self, name: str) -> Any:  # models ask a layer for its attention_type
        return getattr(self._repetition.layers[self._position], name)


class Repetition:
    """Layers that repeat together in one forward pass: called once by the model, then again.

    Args:
        layers: The layers.
        start: The place of the first one among the model's.
        plan: How they repeat.
    """

    def __init__(self, layers: list[nn.Module], start: int, plan: LoopPlan) -> None:
        self.layers = layers
        self.finished = False
        self._start = start
        self._plan = plan
        self._calls: list[LayerCall] = []
        self._previous_output: Any = None

    def stand_ins(self) -> list[StandIn]:
        """Return a stand-in for each layer."""
        return [StandIn(self, position) for position in range(len(self.layers))]

    def call_layer(
        self,
        position: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the looped layer at `position`, counted from 0; after the last one, repeat them all."""
        layer = self._start + position
        if len(self._calls) != position:
            raise RuntimeError(
                f"layer {layer} was called out of order: loop_layers repeats layers that the model "
                "calls one after the other, each once. Unloop the model, or turn off what skips layers or calls them "
                "again (LayerDrop, a checkpointing that bypasses the layer's own)."
            )
        call = LayerCall(self.layers[position], args, kwargs)
        if call.has_cache():
            raise ValueError(
                f"a key-value cache was passed to layer {layer}, which is looped: every repetition would append to the "
                "same entry of it. Pass use_cache=False, to generate as well."
            )
        if position > 0 and self._has_work_between(self._calls[-1], call):
            raise RuntimeError(
                f"between layers {layer - 1} and {layer} the model does something that is not in the layers, which "
                "loop_layers would not repeat. Choose start and stop on one side of it, or unloop the model."
            )
        self._calls.append(call)
        output = call.layer(*args, **kwargs)
        if len(self._calls) == len(self.layers):
            return self._repeat(output)
        self._previous_output = output
        return output

    def _has_work_between(self, previous: LayerCall, call: LayerCall) -> bool:
        """Return whether the model does more between two layers than pass on the hidden state.

        A repetition would leave that out; and where a layer is given a second result of the layer before, every
        repetition would be given the first one's.
        """
        output = self._previous_output
        if call.hidden is not hidden_state(output):
            return True
        other_results = output[1:] if isinstance(output, tuple) else ()
        for result in other_results:
            is_new = isinstance(result, Tensor) and not contains(previous.values(), result)
            if is_new and contains(call.other_values(), result):
                return True
        return False

    def _repeat(self, output: Any) -> Any:
        """Repeat the layers, given the last one's first output, and return its final output."""
        calls, self._calls = self._calls, []
        self.finished = True
        window_input = calls[0].hidden
        single_pass = output
        state = window_input
        for _ in range(self._plan.n_loops - 1):
            state = hidden = self._advance(window_input, state, output)
            for call in calls:
                output = call.repeat(hidden)
                hidden = hidden_state(output)
        state = self._advance(window_input, state, output)
        if self._plan.anchor:
            state = torch.lerp(state, hidden_state(single_pass), self._plan.anchor)
        if state is hidden_state(output):
            return output
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _advance(self, window_input: Tensor, state: Tensor, output: Any) -> Tensor:
        """Return the state after a repetition: part of the update, added to the state before it or to the input."""
        hidden = hidden_state(output)
        if hidden.shape != state.shape:
            shape = tuple(state.shape)
            new_shape = tuple(hidden.shape)
            raise ValueError(
                f"the looped layers turn a tensor of shape {shape} into one of {new_shape}, "
                "which cannot be their input again; choose other start and stop."
            )
        if self._plan.damping == 1.0:
            return hidden
        kept = state if self._plan.remainder == "state" else window_input
        return kept + self._plan.damping * (hidden - kept)


@dataclass(eq=False)
class LayerCall:
    """A looped layer, and the arguments with which the model called it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state that the layer was given."""
        keyword = self.hidden_keyword()
        return self.args[0] if keyword is None else self.kwargs[keyword]

    def hidden_keyword(self) -> str | None:
        """Return the keyword of the hidden state, None when it is the first positional argument."""
        if self.args:
            return None
        # The class is asked: activation checkpointing puts a forward of its own on the layer.
        first_parameter = parameter_names(type(self.layer))[:1]
        for name in (*first_parameter, "hidden_states"):
            if name in self.kwargs:
                return name
        raise ValueError(f"{type(self.layer).__name__} was called without a hidden state; loop_layers cannot loop it.")

    def has_cache(self) -> bool:
        """Return whether the layer was given a key-value cache."""
        if any(self.kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
            return True
        return any(isinstance(value, Cache) for value in self.values())

    def values(self) -> list[Any]:
        """Return the values of all arguments."""
        return [*self.args, *self.kwargs.values()]

    def other_values(self) -> list[Any]:
        """Return the values of all arguments but the hidden state."""
        hidden_keyword = self.hidden_keyword()
        keyword_values = [value for name, value in self.kwargs.items() if name != hidden_keyword]
        return [*self.args[1:], *keyword_values]

    def repeat(self, hidden: Tensor) -> Any:
        """Call the layer again with a new hidden state."""
        keyword = self.hidden_keyword()
        if keyword is None:
            return self.layer(hidden, *self.args[1:], **self.kwargs)
        return self.layer(**{**self.kwargs, keyword: hidden})


def hidden_state(output: Any) -> Tensor:
    """Return the hidden state in a layer's output: a tensor, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a looped layer returned {type(output).__name__}; loop_layers takes layers that return their hidden "
            "state, or a tuple that starts with it. Unloop the model."
        )
    return hidden


def parameter_names(module_class: type[Any]) -> list[str]:
    """Return the names of the arguments that a class's forward takes."""
    signature = inspect.signature(module_class.forward)
    return list(signature.parameters)[1:]  # without self


def contains(values: list[Any], tensor: Tensor) -> bool:
    """Return whether this very tensor is among the values; `in` would compare entries."""
    return any(value is tensor for value in values)
