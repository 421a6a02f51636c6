"""In which precision a model computes, and scores are summed."""

from __future__ import annotations

import torch
from torch import nn


def score_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of scores and their sums: float64 for a float64 model, whatever the sketch's arithmetic.

    Example:
        >>> score_dtype(nn.Linear(2, 2).half())
        torch.float32
    """
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return torch.float64 if is_double else torch.float32


def is_coarse(model: nn.Module) -> bool:
    """Say whether the model computes in half precision, by its weights or the user's autocast.

    Returns:
        False for float32 and float64.

    Example:
        >>> is_coarse(nn.Linear(2, 2)), is_coarse(nn.Linear(2, 2).half())
        (False, True)
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(parameter.device.type):
            return True
    return False


def in_float16(model: nn.Module) -> bool:
    """Say whether gradients pass through float16, by the weights or the user's autocast."""
    devices = set()
    for parameter in model.parameters():
        if parameter.dtype == torch.float16:
            return True
        devices.add(parameter.device.type)
    if "meta" in devices:  # offloaded weights do not say where they are brought to
        devices = {"cpu", "cuda"}
    for device in devices:
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            return True
    return False
