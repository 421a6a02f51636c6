"""One forward pass watched: which modules run, in which order, inside which others."""

from __future__ import annotations

import functools
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_sdi.borrow import evaluating, frozen, observable
from captum_sdi.data.batch import BatchReader, ForwardKwargs, run_model
from captum_sdi.loop.parameters import canonical_modules


@dataclass(frozen=True)
class Call:
    """One call of a module with parameters."""

    name: str
    path: tuple[str, ...]
    """Names of the modules whose forward it was called in."""
    with_gradient: bool


def watch_calls(model: nn.Module, batch: Any, forward_kwargs: ForwardKwargs | None) -> list[Call]:
    """Run the model once and return every call of a submodule with parameters, in order."""
    calls: list[Call] = []
    running: list[str] = []

    def enter(name: str, *_: object) -> None:
        call = Call(name, path=tuple(running), with_gradient=torch.is_grad_enabled())
        calls.append(call)
        running.append(name)

    def leave(*_: object) -> None:
        running.pop()  # not returned: a forward hook's result would replace the module's output

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dropped keys are warned of when the batch is read to be used
        parsed = BatchReader(model)(batch, forward_kwargs)
    with ExitStack() as stack:
        for name, module in canonical_modules(model):
            if name == "" or next(module.parameters(), None) is None:
                continue
            enter_module = functools.partial(enter, name)
            stack.callback(module.register_forward_pre_hook(enter_module, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))  # nothing is kept for a backward pass
        # With gradients, to see which calls the model itself runs without.
        with observable(), torch.enable_grad():
            run_model(model, parsed)
    return calls
