"""What a layer's call looks like from its hooks: its one tensor, and whether a graph is built around it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor


def only_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer was called with; None where there was anything beside it."""
    arguments = [*args, *kwargs.values()]
    given = [argument for argument in arguments if argument is not None]
    if len(given) == 1 and isinstance(given[0], Tensor):
        return given[0]
    return None


def inside_autograd_function() -> bool:
    """Say whether the caller runs in an autograd.Function, as reentrant checkpointing does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first_argument = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first_argument, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False
