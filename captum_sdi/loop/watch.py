"""One forward pass watched: which modules run, in which order, inside which others."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating, frozen, observable
from captum_sdi.data.batch import BatchReader, ForwardKwargs
from captum_sdi.data.calling import run_model
from captum_sdi.loop.parameters import canonical_modules
from captum_sdi.model_lock import exclusive


@dataclass(frozen=True)
class Call:
    """One call of a module with parameters."""

    name: str
    path: tuple[str, ...]
    """Names of the modules whose forward it was called in."""
    with_gradient: bool
    given: frozenset[torch.Size] = frozenset()
    """Shapes of the tensors among its arguments."""
    returned: torch.Size | None = None
    """Shape of the first tensor in its output."""


def watch_calls(
    model: nn.Module,
    batch: Any,
    forward_kwargs: ForwardKwargs | None,
) -> list[Call]:
    """Run the model once and return every call of a submodule with parameters, in order."""
    calls: list[Call] = []
    running: list[int] = []  # positions of the calls that have not returned

    def enter(name: str, *_: object) -> None:
        path = tuple(calls[position].name for position in running)
        call = Call(name, path, with_gradient=torch.is_grad_enabled())
        running.append(len(calls))
        calls.append(call)

    def leave(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:  # nothing is returned: a forward hook's result would replace the module's output
        position = running.pop()
        given = frozenset(shapes_in([args, kwargs]))
        returned = next(shapes_in(output), None)
        calls[position] = replace(calls[position], given=given, returned=returned)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropped keys are warned of when the batch is read to be used
        parsed = BatchReader(model)(batch, forward_kwargs)
    with ExitStack() as stack:
        stack.enter_context(exclusive(model))
        for name, module in canonical_modules(model):
            if name == "" or next(module.parameters(), None) is None:
                continue
            enter_module = functools.partial(enter, name)
            stack.callback(module.register_forward_pre_hook(enter_module, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))  # nothing is kept for a backward pass
        # With gradients, to see which calls the model itself runs without.
        with observable(), torch.enable_grad():
            run_model(model, parsed)
    return calls


def shapes_in(value: Any) -> Iterator[torch.Size]:
    """Yield the shapes of the tensors inside mappings, lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value.shape
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from shapes_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from shapes_in(entry)
