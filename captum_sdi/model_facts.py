"""What a model says of itself: its configs, its device, its vocabulary. Any `torch.nn.Module` may be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_sdi.schema import parse_json


def model_configs(model: nn.Module) -> Iterator[Any]:
    """Yield the config of every module that has one, each once, the outermost first."""
    yielded: set[int] = set()
    for module in model.modules():
        if hasattr(module, "config") and id(module.config) not in yielded:
            yielded.add(id(module.config))
            yield module.config


def model_config(model: nn.Module) -> Any | None:
    """Return the outermost config; None where no module has one.

    Example:
        >>> print(model_config(nn.Linear(2, 2)))
        None
    """
    return next(model_configs(model), None)


LOOP_KEY = "captum_sdi_loop"
"""Under which name a config holds how `captum_sdi.models.loop_layers` loops the model's layers."""


def saved_loop(model: nn.Module) -> Any | None:
    """Return what a config says of looped layers, or that of the folder that adapters name as their base model's.

    Returns:
        None where none says anything.

    Example:
        >>> print(saved_loop(nn.Linear(2, 2)))
        None
    """
    for config in model_configs(model):
        record = getattr(config, LOOP_KEY, None)
        if record is not None:
            return record
    for settings in dict(getattr(model, "peft_config", {})).values():
        record = _loop_in_folder(getattr(settings, "base_model_name_or_path", None))
        if record is not None:
            return record
    return None


def _loop_in_folder(folder: Any) -> Any | None:
    if not isinstance(folder, str) or not Path(folder, "config.json").is_file():
        return None
    try:
        content = parse_json(Path(folder, "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return content.get(LOOP_KEY) if isinstance(content, dict) else None


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without parameters.

    Example:
        >>> model_device(nn.Linear(2, 2)), model_device(nn.Tanh())
        (device(type='cpu'), device(type='cpu'))
    """
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids the input embedding knows; None where the model does not say.

    Example:
        >>> print(vocabulary_size(nn.Embedding(10, 2)))  # has no get_input_embeddings, as models of transformers do
        None
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def has_children(module: nn.Module) -> bool:
    """Say whether a module contains others, as a transformer layer does."""
    return next(module.children(), None) is not None
