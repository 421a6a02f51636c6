"""Reading state dicts and learning rates from any form of file; no pickle runs code."""

from __future__ import annotations

import json
import re
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from captum_sdi.checkpoints.files import abbreviated

_STATE_KEYS = ("model_state_dict", "state_dict", "model")
RATE_KEYS = ("learning_rate", "lr")
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states")
LIGHTNING_KEY = "pytorch-lightning_version"
# A link there may lead elsewhere, as those of the Hub's cache do; a name may not.
_PLAIN_NAME = re.compile(r"(?!\.\.?$)[^/\\\0:]+(?<!\.json)")

StateDict = dict[str, Tensor]


def read_weights(file: Path, *, headers: bool = False) -> tuple[StateDict, Mapping[str, Any]]:
    """Read the state dict in a file, or in the shards it indexes, and its other content.

    Args:
        file: The file.
        headers: Leave out the values: tensors are on the meta device, or mapped into memory.

    Returns:
        The state dict and the other content.
    """
    if file.name.endswith(".index.json"):
        return read_shards(file, headers=headers), {}
    return read_file(file, headers=headers)


def read_file(file: Path, *, headers: bool) -> tuple[StateDict, Mapping[str, Any]]:
    """Read the state dict in one file, and its other content."""
    if file.suffix == ".safetensors":
        return read_safetensors(file, headers=headers)
    return read_pickle(file, headers=headers)


def read_shards(index: Path, *, headers: bool) -> StateDict:
    """Read the state dict that an index of shards describes."""
    shards = [index.parent / name for name in shard_names(index)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: {abbreviated(missing)}. "
            "Was it copied or saved only in part?"
        )
    state: StateDict = {}
    for shard in shards:
        tensors, _ = read_file(shard, headers=headers)
        state.update(tensors)
    return state


def shard_names(index: Path) -> list[str]:
    """Read the names of the files that an index spreads its tensors over."""
    weight_map = read_json(index).get("weight_map")
    if weight_map is None:
        raise ValueError(f"{index} has no 'weight_map', so it is no index of shards.")
    if not isinstance(weight_map, dict):
        raise damaged(index, "'weight_map'", "an object of tensor names and file names", weight_map)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise damaged(index, f"'weight_map' of {tensor!r}", "the name of a file in the same folder", name)
    return sorted(set(weight_map.values()))


def read_safetensors(file: Path, *, headers: bool) -> tuple[StateDict, Mapping[str, Any]]:
    """Read the tensors of a safetensors file, and its metadata."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if headers:
                return {name: header(opened.get_slice(name)) for name in opened.keys()}, metadata  # noqa: SIM118
        return load_file(file), metadata
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}") from error


def header(stored: Any) -> Tensor:
    """Return a tensor without values that has the shape and the kind of numbers of a slice of a safetensors file."""
    dtype = torch.float32 if stored.get_dtype().startswith(("F", "BF")) else torch.int64
    if stored.get_dtype().startswith("C"):
        dtype = torch.complex64
    return torch.empty(stored.get_shape(), dtype=dtype, device="meta")


def read_pickle(file: Path, *, headers: bool) -> tuple[StateDict, Mapping[str, Any]]:
    """Read the state dict in a file of ``torch.save``, and everything in that file."""
    saved = unpickled(file, mapped=headers)
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"{file} holds a {type(saved).__name__} instead of a state dict. Save the model with "
            "torch.save({'model_state_dict': model.state_dict(), 'learning_rate': lr}, path)."
        )
    state = nested_state(saved)
    if state is None:
        state = {key: value for key, value in saved.items() if key not in RATE_KEYS + OPTIMIZER_KEYS}
    # A number or a list among the tensors (an epoch, a note) is nobody's weight.
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = abbreviated([str(key) for key in saved]) or "none"
        raise ValueError(
            f"{file} holds no state dict, neither at its top nor under {', '.join(_STATE_KEYS)}; its keys are: {keys}."
        )
    return tensors, saved


def nested_state(saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state dict under one of its usual keys, if there is one."""
    for key in _STATE_KEYS:
        value = saved.get(key)
        if isinstance(value, Mapping):
            return value
    return None


def unpickled(file: Path, *, mapped: bool = False) -> Any:
    """Read a file of ``torch.save`` without running code, or explain why that is impossible."""
    try:
        mmap = mapped and zipfile.is_zipfile(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, EOFError, ...
        refused = re.search(r"GLOBAL (\S+)|unrecognized (?:function|type) (\S+)", str(error))
        if not refused:
            reason, *_ = str(error).split("\n")
            if "weights" in reason.lower():  # torch's sentence advises to run whatever the file holds
                reason = "what torch.save writes for tensors looks otherwise"
            raise ValueError(
                f"{file} cannot be read: it is no file of torch.save, or is damaged ({type(error).__name__}: {reason})."
            ) from None
        raise ValueError(
            f"{file} holds Python objects ({refused[1] or refused[2]}) beside its tensors. Reading them could run any "
            "code, so load_checkpoint does not. If you trust the file, convert it once:\n"
            f"    saved = torch.load({str(file)!r}, weights_only=False)\n"
            "    torch.save({'model_state_dict': ..., 'learning_rate': ...}, 'converted.pt')\n"
            "with the model's state dict and learning rate taken from `saved` (`saved.state_dict()` where it is the "
            "model itself)."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is damaged: its lists and objects are nested too deeply to be read.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object.")
    return content


def damaged(
    file: Path,
    key: str,
    expected: str,
    value: Any,
) -> ValueError:
    """Return the error of a file whose ``key`` holds ``value`` where ``expected`` belongs."""
    return ValueError(f"{file} is damaged: {key} must be {expected}, but is {reprlib.repr(value)}.")
