"""The class of a model with looped layers: derived from its own, and saved as its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from captum_sdi.models.loop_settings import LoopSettings, check_damping, check_n_loops
from captum_sdi.models.repetition import call_looped


class LoopedModel(nn.Module):
    """A model with looped layers; its class is derived from this one and from the class it had."""

    _loop: LoopSettings

    @property
    def n_loops(self) -> int:
        """How often the layers are applied; assign to it to change that."""
        return self._loop.plan.n_loops

    @n_loops.setter
    def n_loops(self, value: int) -> None:
        check_n_loops(value)
        self._loop.change(n_loops=value)

    @property
    def damping(self) -> float:
        """How much of the layers' update each repetition takes; assign to it to change that."""
        return self._loop.plan.damping

    @damping.setter
    def damping(self, value: float) -> None:
        check_damping(value)
        self._loop.change(damping=value)

    def unloop(self) -> None:
        """Make the model exactly what it was before `loop_layers`; its config says nothing of a loop any more."""
        self._loop.remove_record()
        for module in (self._loop.model, self._loop.owner):
            if isinstance(module, LoopedModel):  # false the second time when the model owns the layers itself
                module.__class__ = untouched_class(type(module))
                vars(module).pop("_loop", None)
                vars(module).pop("_looped_list", None)

    def __enter__(self) -> LoopedModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if isinstance(self, LoopedModel):  # false when `unloop` was called inside
            self.unloop()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; takes `n_loops`, too."""
        # Here as well as in forward: accelerate gives a module a forward of its own, and some models and wrappers
        # call a module's forward directly.
        return call_looped(self, super().__call__, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle would look for the looped class by its name, and find the untouched one.
        reduced: Any = super().__reduce_ex__(protocol)
        base = untouched_class(type(self))
        return new_looped_model, (base,), *reduced[2:]


def new_looped_model(base: Any) -> Any:
    """Make an empty instance of the looped `base`, which copying and unpickling fill in."""
    looped: Any = looped_class(base)
    return looped.__new__(looped)


def untouched_class(looped: type[Any]) -> type[Any]:
    """Return the class from which `looped_class` derived a looped one."""
    return looped.__bases__[1]


@functools.cache
def looped_class(base: type[Any]) -> type[Any]:
    """Derive a class that is called like `base`, and saved as it."""
    members: dict[str, Any] = {
        "forward": looped_forward(base),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    if hasattr(base, "from_pretrained"):
        members["from_pretrained"] = base.from_pretrained  # the model it loads is not looped
    if hasattr(base, "generate"):
        members["generate"] = looped_generate(base)
    looped = type(base.__name__, (LoopedModel, base), members)
    looped.__qualname__ = base.__qualname__
    return looped


def looped_forward(base: type[Any]) -> Callable[..., Any]:
    """Return the forward of `base` with looped layers; its signature has `n_loops`, too."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call_looped(self, functools.partial(base.forward, self), args, kwargs)

    # generate, Trainer and SDIInfluence read from the signature what forward takes.
    signature = inspect.signature(base.forward)
    parameters = list(signature.parameters.values())
    n_loops = inspect.Parameter("n_loops", inspect.Parameter.KEYWORD_ONLY, default=None)
    takes_any_keyword = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    kinds = {parameter.kind for parameter in parameters[1:]}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return forward  # of a wrapper, which hands on whatever it is given: naming one keyword would exclude others
    end = len(parameters) - 1 if takes_any_keyword else len(parameters)
    parameters.insert(end, n_loops)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def looped_generate(base: type[Any]) -> Callable[..., Any]:
    """Return the generate of `base`, which takes `n_loops`, too."""

    @functools.wraps(base.generate)
    def generate(self: LoopedModel, *args: Any, n_loops: int | None = None, **kwargs: Any) -> Any:
        with self._loop.depth(n_loops):  # not every model passes on the keywords that its forward takes
            return base.generate(self, *args, **kwargs)

    return generate
