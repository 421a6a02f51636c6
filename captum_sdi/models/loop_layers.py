"""Loops the layers of a model that was trained without a loop: training-free looping, arXiv 2605.23872.

    h = layers[:start](h)
    repeat n_loops times:  h = h + damping * (layers[start:stop](h) - h)
    h = layers[stop:](h)

Only the list of layers that the model's own forward iterates over is replaced, and only while that forward runs. In
place of each looped layer it finds a stand-in, which calls the layer and remembers with what: mask, rotary embedding,
whatever that layer is given. The last one then repeats all of them with those arguments and a new hidden state. The
layers themselves are untouched and are called like any module, so that hooks see every repetition.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""How decoder layers call a key-value cache, or what takes its place."""


def loop_layers(
    model: nn.Module, start: int, stop: int, n_loops: int, *, damping: float = 1.0, layers: str | None = None
) -> LoopedModel:
    """Makes a Hugging Face model apply its layers ``start`` to ``stop - 1`` `n_loops` times, with the same weights.

    The model is changed in place and returned; it keeps its class's name and is an instance of it, and its parameters
    keep their names, so that ``save_pretrained`` saves the model without the loop. Leaving ``with`` or `unloop` makes
    it what it was. ``model(..., n_loops=4)`` and ``model.generate(..., n_loops=4)`` use another depth for one call.

    Training-Free Looped Transformers takes as many sub-steps of an Euler scheme as there are repetitions, which is
    ``damping=1 / n_loops`` here; it is not adapted when `n_loops` changes. (The paper's code also mixes the result
    with that of a single pass, which this function does not.) Plain repetition, ``damping=1.0``, is what a model
    trained with a loop does, and usually harms one that was not.

    There is no key-value cache: the repetitions would append to the same entry of it. A forward that is not told
    otherwise runs with ``use_cache=False``; one that is handed a cache raises ValueError, so pass ``use_cache=False``
    to ``generate``. With one undamped repetition the model is the untouched one, and may have a cache.
    With ``output_hidden_states`` each repetition of a layer may count as a layer.

    Args:
        model: The model, frozen or not, with a head or without one.
        start: The first looped layer, counted from 0.
        stop: The layer after the last looped one.
        n_loops: How often they are applied.
        damping: How much of the layers' update each repetition takes, above 0 and at most 1.
        layers: Name of the `torch.nn.ModuleList` that holds the layers, for a model that has several.

    Returns:
        The same model.

    Raises:
        ValueError: An argument has an impossible value, the layers are not found, or the model is looped already.

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
    _check_loopable(model)
    name = _find_layers(model, layers)
    size = len(model.get_submodule(name))  # type: ignore[arg-type]
    _check_integer("start", start, 0, size - 1, f"{name!r} has {size} layers")
    _check_integer("stop", stop, start + 1, size, f"it is the layer after the last one, and {name!r} has {size}")
    _check_depth(n_loops)
    _check_damping(damping)
    owner, path = _owner(model, name)
    loop = _Loop(model, owner, start, stop, n_loops, float(damping))
    classes: dict[nn.Module, Any] = {module: type(module) for module in (model, owner)}  # once when they are the same
    for module, base in classes.items():
        module.__class__ = _looped_class(base)
        vars(module)["_loop"] = loop
    vars(owner)["_looped_list"] = path
    assert isinstance(model, LoopedModel)
    return model


class LoopedModel(nn.Module):
    """What `loop_layers` adds to a model; its class is derived from this one and from the class it had."""

    _loop: _Loop

    @property
    def n_loops(self) -> int:
        """How often the layers are applied; assign to it to change that."""
        return self._loop.n_loops

    @n_loops.setter
    def n_loops(self, value: int) -> None:
        _check_depth(value)
        self._loop.n_loops = value

    @property
    def damping(self) -> float:
        """How much of the layers' update each repetition takes; assign to it to change that."""
        return self._loop.damping

    @damping.setter
    def damping(self, value: float) -> None:
        _check_damping(value)
        self._loop.damping = float(value)

    def unloop(self) -> None:
        """Makes the model exactly what it was before `loop_layers`."""
        for module in (self._loop.model, self._loop.owner):
            if isinstance(module, LoopedModel):  # not yet: the model may own the layers itself
                module.__class__ = type(module).__bases__[1]
                for attribute in ("_loop", "_looped_list"):
                    vars(module).pop(attribute, None)

    def __enter__(self) -> LoopedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if isinstance(self, LoopedModel):  # false when `unloop` was called inside
            self.unloop()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; takes ``n_loops``, too."""
        # Here as well as in forward: accelerate gives a module a forward of its own, and some models and wrappers
        # call a module's forward directly.
        return _run(self, super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return _blank, (type(self).__bases__[1],), *reduced[2:]  # pickle would look for the class by its name


@dataclass(eq=False)
class _Loop:
    """The settings, shared by the model and the module that owns the layers."""

    model: nn.Module
    owner: nn.Module
    start: int
    stop: int
    n_loops: int
    damping: float

    @contextmanager
    def depth(self, n_loops: int | None) -> Iterator[None]:
        if n_loops is None:
            yield
            return
        _check_depth(n_loops)
        before, self.n_loops = self.n_loops, n_loops
        try:
            yield
        finally:
            self.n_loops = before


# --- the forward pass ---


def _run(module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a looped module's own forward, with stand-ins for the looped layers."""
    loop: _Loop | None = vars(module).get("_loop")
    if loop is None:  # a wrapper kept the forward of a model that is no longer looped
        return call(*args, **kwargs)
    with loop.depth(kwargs.pop("n_loops", None)):
        if loop.n_loops == 1 and loop.damping == 1.0:
            return call(*args, **kwargs)
        if kwargs.get("use_cache") is None and "use_cache" in _parameters(type(module))[len(args) :]:
            kwargs["use_cache"] = False
        with _stand_ins(module, loop):
            return call(*args, **kwargs)


@contextmanager
def _stand_ins(module: nn.Module, loop: _Loop) -> Iterator[None]:
    path = vars(module).get("_looped_list")
    if path is None:
        yield
        return
    *parents, name = path.split(".")
    holder: Any = module.get_submodule(".".join(parents))
    if name in vars(holder):  # called by __call__, which put them there
        yield
        return
    all_layers = list(holder._modules[name])
    repeat = _Repeat(all_layers[loop.start : loop.stop], loop)
    all_layers[loop.start : loop.stop] = [_StandIn(repeat, i) for i in range(len(repeat.layers))]
    # An entry in the instance's own dictionary hides the submodule of that name from `self.layers`, and from nothing
    # else: parameters, state_dict and get_submodule look in `_modules`.
    vars(holder)[name] = all_layers
    try:
        yield
    finally:
        del vars(holder)[name]
    if not repeat.finished:
        raise RuntimeError(
            f"{type(module).__name__} did not call the layers {loop.start} to {loop.stop - 1} through "
            f"self.{path}: nothing was looped. loop_layers cannot loop this model; call unloop()."
        )


class _StandIn:
    """In one looped layer's place for one forward pass: calls it, and has its attributes."""

    def __init__(self, repeat: _Repeat, position: int) -> None:
        self._repeat, self._position = repeat, position

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._repeat.call(self._position, args, kwargs)

    def __getattr__(self, name: str) -> Any:  # models ask a layer for its attention_type
        return getattr(self._repeat.layers[self._position], name)


class _Repeat:
    """The looped layers in one forward pass: the model calls them once, and they are repeated after the last."""

    def __init__(self, layers: list[nn.Module], loop: _Loop) -> None:
        self.layers, self.finished = layers, False
        self._first, self._n_loops, self._damping = loop.start, loop.n_loops, loop.damping
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._left: list[Any] = []

    def call(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(self._calls) != position:
            raise RuntimeError(
                f"layer {self._first + position} was called out of order: loop_layers repeats layers that the model "
                "calls one after the other, each once. Unloop the model, or turn off what skips layers or calls them "
                "again (LayerDrop, a checkpointing that bypasses the layer's own)."
            )
        self._check(position, args, kwargs)
        self._calls.append((args, kwargs))
        output = self.layers[position](*args, **kwargs)
        self._left = list(output) if isinstance(output, tuple) else [output]
        return self._repeated(output) if len(self._calls) == len(self.layers) else output

    def _check(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What repeating the layers with these arguments would get wrong."""
        values = [*args, *kwargs.values()]
        layer = self._first + position
        if any(isinstance(v, Cache) for v in values) or any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
            raise ValueError(
                f"a key-value cache was passed to layer {layer}, which is looped: every repetition would append to the "
                "same entry of it. Pass use_cache=False, to generate as well."
            )
        if position == 0:
            return
        # The previous layer's hidden state, nothing done to it, and nothing else that the previous layer computed.
        key = _hidden_key(self.layers[position], args, kwargs)
        others = [*args[1:], *(value for name, value in kwargs.items() if name != key)]
        before = [*self._calls[-1][0], *self._calls[-1][1].values()]
        fresh = [x for x in self._left[1:] if isinstance(x, Tensor) and not any(x is given for given in before)]
        unchanged = (args[0] if key is None else kwargs[key]) is _hidden(self._left[0])
        if not unchanged or any(x is other for x in fresh for other in others):
            raise RuntimeError(
                f"between layers {layer - 1} and {layer} the model does something that is not in the layers, which "
                "loop_layers would not repeat. Choose start and stop on one side of it, or unloop the model."
            )

    def _repeated(self, output: Any) -> Any:
        """From the last layer's first output to what it returns to the model."""
        calls, self._calls, self.finished = self._calls, [], True
        first = _hidden_key(self.layers[0], *calls[0])
        before = calls[0][0][0] if first is None else calls[0][1][first]
        for _ in range(self._n_loops - 1):
            before = hidden = self._damped(before, output)
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
                key = _hidden_key(layer, args, kwargs)
                output = layer(hidden, *args[1:], **kwargs) if key is None else layer(*args, **{**kwargs, key: hidden})
                hidden = _hidden(output)
        if self._damping == 1.0:
            return output
        damped = self._damped(before, output)
        return (damped, *output[1:]) if isinstance(output, tuple) else damped

    def _damped(self, before: Tensor, output: Any) -> Tensor:
        after = _hidden(output)
        if after.shape != before.shape:
            raise ValueError(
                f"the looped layers turn a tensor of shape {tuple(before.shape)} into one of {tuple(after.shape)}, "
                "which cannot be their input again; choose other start and stop."
            )
        return after if self._damping == 1.0 else before + self._damping * (after - before)


def _hidden(output: Any) -> Tensor:
    """The hidden state in what a layer returns: a tensor, or the first of a tuple."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"a looped layer returned {type(output).__name__}; loop_layers takes layers that return their hidden "
            "state, or a tuple that starts with it. Unloop the model."
        )
    return hidden


def _hidden_key(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The keyword that holds the hidden state, or None when it is the first positional argument."""
    if args:
        return None
    # Of the class: activation checkpointing puts a forward of its own on the layer.
    for name in (*_parameters(type(layer))[:1], "hidden_states"):
        if name in kwargs:
            return name
    raise ValueError(f"{type(layer).__name__} was called without a hidden state; loop_layers cannot loop it.")


def _parameters(kind: type[Any]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


# --- classes ---


@functools.cache
def _looped_class(base: type[Any]) -> type[Any]:
    """A class that is called like ``base`` and saved as it."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, functools.partial(base.forward, self), args, kwargs)

    # generate, Trainer and SDIInfluence read from the signature what forward takes.
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    parameters.insert(at, inspect.Parameter("n_loops", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    members: dict[str, Any] = {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    if hasattr(base, "from_pretrained"):
        members["from_pretrained"] = base.from_pretrained  # what it loads is not looped
    if hasattr(base, "generate"):

        @functools.wraps(base.generate)
        def generate(self: LoopedModel, *args: Any, n_loops: int | None = None, **kwargs: Any) -> Any:
            with self._loop.depth(n_loops):  # not every model passes on what its forward takes
                return base.generate(self, *args, **kwargs)

        members["generate"] = generate
    looped = type(base.__name__, (LoopedModel, base), members)
    looped.__qualname__ = base.__qualname__
    return looped


def _blank(base: Any) -> Any:
    """What copying and unpickling fill in."""
    kind: Any = _looped_class(base)
    return kind.__new__(kind)


# --- the arguments ---


def _check_loopable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} must be a model, a torch.nn.Module.")
    for name, module in model.named_modules():
        if isinstance(module, LoopedModel):
            raise ValueError(
                f"model is looped already{f' in {name!r}' if name else ''}: call unloop() on it first, or set its "
                "n_loops and damping."
            )
        if hasattr(module, "_orig_mod"):
            raise ValueError("model is compiled: loop the layers first, then call torch.compile.")
    if "n_loops" in inspect.signature(model.forward).parameters:
        raise ValueError(f"model={type(model).__name__} has n_loops of its own; pass it to forward instead.")


def _find_layers(model: nn.Module, layers: str | None) -> str:
    """The name of the list of layers."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if layers is not None:
        if layers not in lists:
            raise ValueError(f"layers={layers!r} names no ModuleList of {type(model).__name__}; use one of {[*lists]}.")
        return layers
    candidates: list[str] = []
    for name, module in lists.items():  # a list comes before those inside it, which hold experts or the like
        inside = any(name.startswith(f"{outer}.") for outer in candidates)
        if not inside and all(next(layer.children(), None) is not None for layer in module):
            candidates.append(name)
    if len(candidates) != 1:
        found = ", ".join(f"{name!r} of {len(lists[name])}" for name in candidates or lists) or "none"
        raise ValueError(
            f"{type(model).__name__} has {'several lists' if candidates else 'no list'} of layers, so layers=None does "
            f"not say which to loop; pass the name of a ModuleList in layers=. There is: {found}."
        )
    return candidates[0]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module whose forward iterates over the list, and the list's name in it."""
    *parents, path = name.split(".")
    owner = model.get_submodule(".".join(parents))
    while isinstance(owner, nn.ModuleDict | nn.ModuleList):  # containers are not called
        path = f"{parents.pop()}.{path}"
        owner = model.get_submodule(".".join(parents))
    return owner, path


def _check_integer(argument: str, value: Any, lowest: int, highest: int, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{argument}={value!r} must be an integer from {lowest} to {highest}: {why}.")


def _check_depth(n_loops: Any) -> None:
    if not isinstance(n_loops, int) or isinstance(n_loops, bool) or n_loops < 1:
        raise ValueError(f"n_loops={n_loops!r} must be an integer of at least 1; 1 applies every layer once.")


def _check_damping(damping: Any) -> None:
    if not isinstance(damping, int | float) or isinstance(damping, bool) or not 0 < damping <= 1:
        raise ValueError(f"damping={damping!r} must be a number above 0 and at most 1; 1.0 is plain repetition.")
