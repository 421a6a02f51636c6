"""A state dict, and what was saved beside it, from any form of file; no pickle runs code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from captum_sdi.checkpoints.files import some

_STATE_KEYS = ("model_state_dict", "state_dict", "model")
RATE_KEYS = ("learning_rate", "lr")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")


def read_weights(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read the state dict in a file, or in the shards it indexes, and whatever was saved beside it."""
    if file.name.endswith(".index.json"):
        return _read_shards(file), {}
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_pickle(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map', so it is no index of shards.")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: {some(missing)}. "
            "Was it copied or saved only in part?"
        )
    return {name: tensor for shard in shards for name, tensor in read_weights(shard)[0].items()}


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file), metadata
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}") from error


def _read_pickle(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    saved = _unpickled(file)
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"{file} holds a {type(saved).__name__} instead of a state dict. Save the model with "
            "torch.save({'model_state_dict': model.state_dict(), 'learning_rate': lr}, path)."
        )
    nested = (saved[key] for key in _STATE_KEYS if isinstance(saved.get(key), Mapping))
    state = next(nested, None)
    if state is None:
        state = {key: value for key, value in saved.items() if key not in RATE_KEYS + OPTIMIZER_KEYS}
    # A number or a list among the tensors (an epoch, a note) is nobody's weight.
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{file} holds no state dict, neither at its top nor under {', '.join(_STATE_KEYS)}; "
            f"its keys are: {some([str(key) for key in saved]) or 'none'}."
        )
    return tensors, saved


def _unpickled(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, EOFError, ...
        found = re.search(r"GLOBAL (\S+)|unrecognized (?:function|type) (\S+)", str(error))
        if not found:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{file} cannot be read: it is no file of torch.save, or is damaged ({type(error).__name__}: {reason})."
            ) from error
        raise ValueError(
            f"{file} holds Python objects ({found[1] or found[2]}) beside its tensors. Reading them could run any "
            "code, so load_checkpoint does not. If you trust the file, convert it once:\n"
            f"    saved = torch.load({str(file)!r}, weights_only=False)\n"
            "    torch.save({'model_state_dict': ..., 'learning_rate': ...}, 'converted.pt')\n"
            "with the model's state dict and learning rate taken from `saved` (`saved.state_dict()` where it is the "
            "model itself)."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object.")
    return content
