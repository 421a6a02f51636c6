"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_sdi.borrow import evaluating, frozen
from captum_sdi.data.batch import BatchReader, ForwardKwargs, run_model
from captum_sdi.features import canonical_name


@dataclass(frozen=True)
class Call:
    """One call of a module with parameters."""

    name: str
    path: tuple[str, ...]
    """Names of the modules whose forward it was called in."""
    with_gradient: bool


def watch_calls(model: nn.Module, batch: Any, forward_kwargs: ForwardKwargs | None) -> list[Call]:
    """Every call of a submodule with parameters, in order."""
    calls: list[Call] = []
    running: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever reads the batch to use it warns of what it drops
        parsed = BatchReader(model)(batch, forward_kwargs)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name == "" or next(module.parameters(), None) is None:
                continue

            def entered(*_: object, name: str = canonical_name(name)) -> None:
                calls.append(Call(name, tuple(running), torch.is_grad_enabled()))
                running.append(name)

            stack.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
            stack.callback(module.register_forward_hook(lambda *_: _ignore(running.pop())).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))  # nothing is kept for a backward pass
        # With gradients, to see which calls the model itself runs without; hooks are not called in compiled code.
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            run_model(model, parsed)
    return calls


def _ignore(_: object) -> None:
    """A forward hook must return None, or it replaces the output."""
