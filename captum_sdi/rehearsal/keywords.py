"""Forward keywords that nothing in the model names, and only ``**kwargs`` swallows."""

from __future__ import annotations

import inspect
import typing
from typing import Any

from torch import nn

from captum_sdi.data.side import Side
from captum_sdi.words import warn_user


def check_keywords_are_named(model: nn.Module, raw: Any, side: Side) -> None:
    """Warn of forward keywords, such as a misspelt number of loop steps, that no module's forward names."""
    given = side.forward_kwargs or {}
    keywords = given(raw) if callable(given) else given
    if not keywords:
        return
    parameters = inspect.signature(model.forward).parameters.values()
    swallows = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not swallows or not _named_keywords(model):
        return  # the model refuses what it does not know, or is a wrapper that hands it on
    named: set[str] = set()
    for module in model.modules():
        named |= _named_keywords(module)
    unknown = sorted(set(keywords) - named)
    if unknown:
        argument = "test_forward_kwargs" if side.name == "test" else "forward_kwargs"
        warn_user(
            f"{argument} names {unknown}, which no forward in {type(model).__name__} does: **kwargs swallows it, and "
            "it changes nothing. Is it misspelt?"
        )


def _named_keywords(module: nn.Module) -> set[str]:
    """Return what a forward names, also as ``**kwargs: Unpack[...]`` of a TypedDict."""
    named: set[str] = set()
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named.add(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD:
            for kind in typing.get_args(parameter.annotation):
                named |= set(getattr(kind, "__annotations__", ()))
    return named
