"""What a checkpoint is: finding, naming and loading one, and giving the model back afterwards.

Three sentences hold everywhere in this file. A checkpoint is compared with the model, key by key
and shape by shape, before the first weight is copied, so that nothing is ever half-loaded. Weights
are copied *into* the model's own tensors: Parameter objects stay the objects they were. Pickles are
read with ``weights_only=True``, so a checkpoint never runs code.

The learning rate of a checkpoint is the one *used at its step*. A Trainer folder holds it in the
log of ``trainer_state.json``; its ``optimizer.pt`` and ``scheduler.pt`` already hold the next
step's.
"""

from __future__ import annotations

import copy
import glob
import json
import math
import os
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum._utils.av import AV
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

# In the order they are looked for: safetensors before pickles, whole models before adapters.
_WHOLE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINER_FOLDER = re.compile(r"checkpoint-(\d+)")

_STATE_KEYS = ("model_state_dict", "state_dict", "model")
_RATE_KEYS = ("learning_rate", "lr")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")

# Settings of an adapter that change what it computes without changing the shape of a weight.
_ADAPTER_SETTINGS = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora")

_LISTED = 10  # names per kind of difference in an error message


# --- Finding and naming --------------------------------------------------------------------------


def find_checkpoints(checkpoints: Any) -> list[Any]:
    """Order what the user passed as ``checkpoints`` into a list, by Captum's rules.

    A directory of Trainer folders (``checkpoint-<n>``) is ordered by step, and whatever else lies
    in it is ignored. A directory that is a checkpoint, or a file, is a list of one. The entries of
    any other directory, and a list of paths, are sorted naturally, as in Captum. Every other
    iterable keeps its order. ``None`` stands for the model's current weights.

    Args:
        checkpoints: A path, an iterable of whatever the load function takes, or None.

    Returns:
        The checkpoints in order, paths as ``str``; ``[None]`` for the current weights.

    Raises:
        ValueError: If nothing is found there, or None is among several checkpoints.
        TypeError: If ``checkpoints`` is neither a path nor an iterable, or is a mapping.

    Example:
        >>> find_checkpoints(["run/step-10.pt", "run/step-9.pt"])
        ['run/step-9.pt', 'run/step-10.pt']
        >>> find_checkpoints(None)
        [None]
    """
    if checkpoints is None:
        return [None]
    if isinstance(checkpoints, (str, os.PathLike)):
        return _checkpoints_at(os.fsdecode(checkpoints))
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Iterable):
        raise TypeError(
            "checkpoints must be a path, a list or an iterator of checkpoints, or None for the "
            f"model's current weights, got {type(checkpoints).__name__}. Put a single checkpoint "
            "in a list."
        )
    found = [os.fsdecode(c) if isinstance(c, os.PathLike) else c for c in checkpoints]
    if not found:
        raise ValueError(f"{_invalid(checkpoints)} It is empty. Pass at least one checkpoint.")
    if any(c is None for c in found):
        position = [c is None for c in found].index(True)
        raise ValueError(
            f"{_invalid(checkpoints)} Entry {position} of it is None. For the model's current "
            "weights pass checkpoints=None; they cannot stand among others."
        )
    # Captum sorts a list of paths, and takes everything else in the order given.
    if isinstance(checkpoints, list) and all(isinstance(c, str) for c in found):
        return AV.sort_files(found)
    return found


def _checkpoints_at(path: str) -> list[str]:
    """List the checkpoints at one path: a folder of them, a folder that is one, or a file."""
    if os.path.isfile(path):
        return [path]
    if not os.path.exists(path):
        raise ValueError(f"{_invalid(path)} There is no such file or directory. Check the path.")
    folder = Path(path)
    steps = {
        int(match[1]): os.path.join(path, entry.name)
        for entry in folder.iterdir()
        if entry.is_dir() and (match := _TRAINER_FOLDER.fullmatch(entry.name))
    }
    if steps:
        return [steps[step] for step in sorted(steps)]
    whole = any((folder / name).is_file() for name in _WHOLE_FILES + _ADAPTER_FILES)
    if whole or _conversion_command(folder):
        return [path]
    # Escaped, because a directory may be called "run[1]".
    files = AV.sort_files(glob.glob(os.path.join(glob.escape(path), "*")))
    if not files:
        raise ValueError(
            f"{_invalid(path)} The directory is empty. Pass one that holds checkpoint-<step> "
            "folders or checkpoint files."
        )
    return files


def _invalid(checkpoints: Any) -> str:
    # The first sentence is Captum's, word for word: its tests and its users match on it.
    return f"Invalid checkpoints provided for TracIn class: {checkpoints}!"


def checkpoint_names(checkpoints: list[Any]) -> list[str]:
    """Name each checkpoint; the sketch derives its random generator from this name.

    A path is named by its last component, so that moving the run's folder, or deleting another
    checkpoint of it, changes no name. Paths whose last components agree take as many more as they
    need to differ. An object without a name goes by its position.

    Args:
        checkpoints: What :func:`find_checkpoints` returned.

    Returns:
        One name per checkpoint, all different.

    Example:
        >>> checkpoint_names(["run/checkpoint-5", "run/checkpoint-10"])
        ['checkpoint-5', 'checkpoint-10']
        >>> checkpoint_names(["a/run/last.pt", "b/run/last.pt", "b/run/best.pt"])
        ['a/run/last.pt', 'b/run/last.pt', 'best.pt']
        >>> checkpoint_names([None])
        ['current']
    """
    parts = [_name_parts(c, position) for position, c in enumerate(checkpoints)]
    length = [1] * len(parts)
    names = [part[-1] for part in parts]
    while True:
        count = Counter(names)
        grown = [
            n + 1 if count[name] > 1 and n < len(part) else n
            for n, name, part in zip(length, names, parts, strict=True)
        ]
        if grown == length:
            return _numbered(names)
        length = grown
        names = ["/".join(part[-n:]) for n, part in zip(length, parts, strict=True)]


def _name_parts(checkpoint: Any, position: int) -> tuple[str, ...]:
    """Split a checkpoint's name into components; the last one is its ordinary name."""
    if checkpoint is None:
        return ("current",)
    if isinstance(checkpoint, (str, os.PathLike)):
        # Absolute, so that "." and "runs/.." have a name as well.
        parts = Path(os.path.abspath(os.fsdecode(checkpoint))).parts
        return (parts[0].rstrip(os.sep), *parts[1:])
    if isinstance(checkpoint, int):
        return (str(checkpoint),)
    return (f"#{position}",)


def _numbered(names: list[str]) -> list[str]:
    """Number the repeats of a name: one checkpoint listed twice still gets two generators."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return numbered


# --- Loading -------------------------------------------------------------------------------------


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> float:
    """Load a checkpoint into ``model``, in place, and return its learning rate.

    What it reads:

    * folders of the Hugging Face ``Trainer`` and of ``save_pretrained``: safetensors or
      ``pytorch_model.bin``, in one file or sharded, and adapters for a ``peft.PeftModel``;
    * ``.safetensors`` files, with ``learning_rate`` in their metadata if they have it;
    * files of ``torch.save``: a state dict, alone or under ``model_state_dict``, ``state_dict`` or
      ``model``, with ``learning_rate``, ``lr`` or an optimizer's state dict (``optimizer``,
      ``optimizer_state_dict``) beside it. An optimizer saved *after* ``scheduler.step()`` holds the
      next step's rate, so prefer ``learning_rate``.

    The prefixes ``module.`` and ``_orig_mod.`` may be on either side, a tied weight may be stored
    under one of its names only, and values are cast to the model's dtype.

    The learning rate of a Trainer folder is the one logged at its step. At an unlogged step it is
    interpolated between the nearest logged ones; the later of them stands in the log of a later
    checkpoint of the same run.

    Args:
        model: The model to load into.
        path: The folder or file.

    Returns:
        The learning rate; 1.0, with a warning, where the checkpoint holds none.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the path is missing, unreadable, or sharded by FSDP or DeepSpeed; if keys or
            shapes differ from the model's; if the learning rate is negative or not finite; or if
            the model is on the meta device. The model is then unchanged.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "step-1.pt")
        ...     torch.save({"model_state_dict": model.state_dict(), "learning_rate": 0.1}, path)
        ...     load_checkpoint(model, path)
        0.1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"load_checkpoint takes the path of a file or folder, got {type(path).__name__}. "
            "Pass checkpoints_load_func to load checkpoints of another kind."
        )
    _check_not_on_meta(model)
    source = Path(os.fsdecode(path))
    file = _weights_file(model, source)
    state, rate = _read_weights(file)
    if rate is None and file.name in _WHOLE_FILES + _ADAPTER_FILES:
        rate = _trainer_rate(source if source.is_dir() else source.parent)
    if rate is not None and (not math.isfinite(rate) or rate < 0):
        raise ValueError(f"The learning rate of {source} is {rate}; it must be finite and not < 0.")
    if file.name in _ADAPTER_FILES:
        _load_adapter(model, state, file)
    else:
        _load_whole(model, state, file)
    return _effective_rate(rate, source)


def _check_not_on_meta(model: nn.Module) -> None:
    for name, tensor in _named_tensors(model).items():
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' of the model is on the meta device, so there is nothing to load weights "
                "into. Give the model memory first, e.g. model.to_empty(device='cpu'), or build it "
                "with from_pretrained and without offloading."
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take off DataParallel, DistributedDataParallel and torch.compile."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


# Which file holds the weights


def _weights_file(model: nn.Module, path: Path) -> Path:
    """Find the file that holds (or indexes) the weights at ``path``, or say why there is none."""
    if not path.exists():
        raise ValueError(f"There is no checkpoint at {path}: no such file or directory.")
    if path.is_file() and path.suffix != ".distcp":
        return path
    folder = path if path.is_dir() else path.parent
    named = _adapter_name(model)
    inside = [folder] if named is None else [folder, folder / named]
    for file in (d / name for d in inside for name in _WHOLE_FILES + _ADAPTER_FILES):
        if file.is_file():
            return file
    if command := _conversion_command(folder):
        raise ValueError(
            f"{folder} holds weights sharded by FSDP or DeepSpeed, which must be merged "
            f"before they can be read. Run once:\n    {command}"
        )
    entries = _some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise ValueError(
        f"{folder} holds no weights: none of {', '.join(_WHOLE_FILES + _ADAPTER_FILES)} is in it, "
        f"but {entries}. Pass a checkpoint folder or file; a folder of several checkpoints goes to "
        "checkpoints=."
    )


def _conversion_command(folder: Path) -> str | None:
    """Tell the command that merges the FSDP or DeepSpeed shards in a folder, None without any."""
    for shard in sorted([*folder.glob("*.distcp"), *folder.glob("pytorch_model_fsdp*/*.distcp")]):
        merged = folder.parent if shard.parent == folder else folder
        return f"accelerate merge-weights {shard.parent} {merged}"
    for entry in sorted(folder.glob("pytorch_model_fsdp*")):
        if entry.is_dir():
            return f"accelerate merge-weights {entry} {folder}"
    top = folder.parent if folder.name.startswith("global_step") else folder
    if _is_deepspeed(top):
        return f"python {top / 'zero_to_fp32.py'} {top} {top} --safe_serialization"
    return None


def _is_deepspeed(folder: Path) -> bool:
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*/*_states.pt")):
        return True
    # DeepSpeed's "latest" names its newest folder; other programs use the word for other things.
    latest = folder / "latest"
    return latest.is_file() and latest.read_bytes().startswith(b"global_step")


# Reading one file


def _read_weights(file: Path) -> tuple[dict[str, Tensor], float | None]:
    """Read the state dict in a file, or in the shards it indexes, and the rate beside it."""
    if file.name.endswith(".index.json"):
        return _read_shards(file), None
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    return _read_pickle(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map', so it is no index of shards.")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: {_some(missing)}. "
            "Was it copied or saved only in part?"
        )
    return {name: tensor for shard in shards for name, tensor in _read_weights(shard)[0].items()}


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], float | None]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(file), _rate_beside(metadata, file)
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}") from error


def _read_pickle(file: Path) -> tuple[dict[str, Tensor], float | None]:
    saved = _unpickled(file)
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"{file} holds a {type(saved).__name__} instead of a state dict. Save the model with "
            "torch.save({'model_state_dict': model.state_dict(), 'learning_rate': lr}, path)."
        )
    nested = (saved[key] for key in _STATE_KEYS if isinstance(saved.get(key), Mapping))
    state = next(nested, None)
    if state is None:
        beside = (*_RATE_KEYS, *_OPTIMIZER_KEYS)
        state = {key: value for key, value in saved.items() if key not in beside}
    # A number or a list among the tensors (an epoch, a note) is nobody's weight.
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{file} holds no state dict, neither at its top nor under {', '.join(_STATE_KEYS)}; "
            f"its keys are: {_some([str(key) for key in saved]) or 'none'}."
        )
    return tensors, _rate_beside(saved, file)


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
            f"{file} holds Python objects ({found[1] or found[2]}) beside its tensors. Reading "
            "them could run any code, so load_checkpoint does not. If you trust the file, convert "
            "it once:\n"
            f"    saved = torch.load({str(file)!r}, weights_only=False)\n"
            "    torch.save({'model_state_dict': ..., 'learning_rate': ...}, 'converted.pt')\n"
            "with the model's state dict and learning rate taken from `saved` "
            "(`saved.state_dict()` where it is the model itself)."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, expected an object.")
    return content


# Learning rates


def _rate_beside(saved: Mapping[str, Any], file: Path) -> float | None:
    """Read the learning rate stored beside a state dict, by name or in an optimizer's state."""
    for key in _RATE_KEYS:
        if saved.get(key) is not None:
            return _as_rate(saved[key], f"'{key}' of {file}")
    for key in _OPTIMIZER_KEYS:
        optimizer = saved.get(key)
        if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
            return _optimizer_rate(optimizer["param_groups"], f"'{key}' of {file}")
    return None


def _optimizer_rate(groups: list[dict[str, Any]], where: str) -> float | None:
    rates = [_as_rate(group["lr"], f"{where}") for group in groups if "lr" in group]
    if len(set(rates)) > 1:
        # Influence has one rate per checkpoint. The first group's is also what the Trainer logs.
        _warn(
            f"{where} has parameter groups with different learning rates "
            f"({_some([f'{rate:g}' for rate in rates])}). The first is used for all of them; save "
            "'learning_rate' beside the state dict to choose another."
        )
    return rates[0] if rates else None


def _as_rate(value: Any, where: str) -> float:
    """Turn a number, a one-element tensor or (in safetensors metadata) a string into a rate."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{where} should be a learning rate, one number, but is {value!r}.") from None


def _trainer_rate(folder: Path) -> float | None:
    """Read the rate used at a Trainer folder's step from its log; None where it has no log."""
    file = folder / "trainer_state.json"
    if not file.is_file():
        return None
    state = _read_json(file)
    step = state.get("global_step")
    rates = _logged_rates(state, file)
    if not isinstance(step, int):
        return None
    if step in rates:
        return rates[step]
    return _rate_between(step, rates | _rates_logged_later(folder, rates), folder)


def _logged_rates(state: dict[str, Any], file: Path) -> dict[int, float]:
    return {
        entry["step"]: _as_rate(entry["learning_rate"], f"step {entry['step']} of {file}")
        for entry in state.get("log_history") or []
        if "learning_rate" in entry and "step" in entry
    }


def _rates_logged_later(folder: Path, own: dict[int, float]) -> dict[int, float]:
    """Collect what other checkpoints of the same run logged, the later ones above all."""
    # A checkpoint's own log ends at its step at the latest: the next logged rate is never in it. A
    # log that disagrees with it is of another run in the same directory and does not count.
    if not _TRAINER_FOLDER.fullmatch(folder.absolute().name):
        return {}
    above = folder.absolute().parent
    later: dict[int, float] = {}
    for file in [*above.glob("checkpoint-*/trainer_state.json"), above / "trainer_state.json"]:
        rates = _logged_rates(_read_json(file), file) if file.is_file() else {}
        if all(rates.get(step) == rate for step, rate in own.items()):
            later |= rates
    return later


def _rate_between(step: int, rates: dict[int, float], folder: Path) -> float | None:
    """Interpolate linearly between the nearest logged steps; beyond the ends take the nearest."""
    below = max((s for s in rates if s < step), default=None)
    above = min((s for s in rates if s > step), default=None)
    if below is not None and above is not None:
        weight = (step - below) / (above - below)
        rate = rates[below] + weight * (rates[above] - rates[below])
        how = f"{rate:g} is interpolated between those of steps {below} and {above}"
    elif (nearest := below if above is None else above) is not None:
        rate = rates[nearest]
        how = f"{rate:g}, that of step {nearest}, the nearest logged one, is used"
    else:
        return None
    _warn(
        f"{folder} logged no learning rate at its step {step}: {how}. "
        "For exact rates choose logging_steps so that it divides save_steps."
    )
    return rate


def _effective_rate(rate: float | None, path: Path) -> float:
    """Replace a missing rate by 1.0, and warn of it, or of one that has no effect."""
    if rate is None:
        _warn(
            f"{path} holds no learning rate: 1.0 is used, so all such checkpoints count alike. Save "
            "'learning_rate' beside the state dict, or keep trainer_state.json beside the weights."
        )
        return 1.0
    if rate == 0:
        _warn(
            f"The learning rate of {path} is 0: this checkpoint contributes nothing to any score. "
            "Leave it out, or take one from the middle of the schedule."
        )
    return rate


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


# Comparing a state dict with the model, then copying it


@dataclass(frozen=True)
class _Differences:
    """How a checkpoint differs from the model it is meant for."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def error(self, file: Path, model: nn.Module) -> ValueError:
        kinds = [
            (self.missing, "missing from the checkpoint"),
            (self.unexpected, "in the checkpoint but not in the model"),
            (self.shapes, "different in the two"),
        ]
        lines = [f"\n    {len(names)} {kind}: {_some(names)}" for names, kind in kinds if names]
        return ValueError(
            f"{file} does not fit the model ({type(_unwrapped(model)).__name__}):{''.join(lines)}\n"
            "Nothing was loaded. Build the model from the same config as the checkpoint."
        )


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _load_whole(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Copy a state dict of the whole model into it, if the two agree in every key and shape."""
    matched, differences = _matched(model, state)
    if differences and (renamed := _read_by_transformers(model, file)) is not None:
        matched, differences = _matched(model, renamed)
    if differences:
        raise differences.error(file, model)
    # Not strict, because a module's "_extra_state" is no tensor and is left as it is.
    model.load_state_dict(matched, strict=False)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List the model's own tensors under the names its state dict uses, tied ones repeatedly."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map names without the prefixes of torch.compile and DataParallel to the names as they are."""
    # "module." is a prefix only where every name has it: a model may have a submodule called so.
    bare = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): name for name in names}
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): original for name, original in bare.items()}
    return bare


def _matched(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], _Differences]:
    """Pair a state dict with the model's names, and list everything in which the two differ."""
    targets = _named_tensors(model)
    stored = {bare: state[name] for bare, name in _bare_names(state).items()}
    wanted = _bare_names(targets)
    matched: dict[str, Tensor] = {}
    shapes: list[str] = []
    for bare, name in wanted.items():
        if bare in stored:
            matched[name] = stored[bare]
            shapes += _difference(bare, stored[bare], targets[name])
    shapes += _fill_tied(matched, targets)
    optional = _declared_patterns(model, "_keys_to_ignore_on_load_missing")
    missing = [bare for bare, name in wanted.items() if name not in matched and not optional(bare)]
    surplus = _declared_patterns(model, "_keys_to_ignore_on_load_unexpected")
    unexpected = [bare for bare in stored if bare not in wanted and not surplus(bare)]
    return matched, _Differences(missing, unexpected, shapes)


def _difference(name: str, stored: Tensor, target: Tensor) -> list[str]:
    """Describe a difference in shape, or between numbers and codes (quantised weights)."""
    if stored.shape != target.shape:
        there, here = str(tuple(stored.shape)), str(tuple(target.shape))
    elif stored.is_floating_point() != target.is_floating_point():
        there, here = str(stored.dtype), str(target.dtype)
    else:
        return []
    return [f"{name} ({there} in the checkpoint, {here} in the model)"]


def _fill_tied(matched: dict[str, Tensor], targets: dict[str, Tensor]) -> list[str]:
    """Give a tied tensor's absent names the value of a present one; list values that disagree."""
    groups: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        groups.setdefault(id(tensor), []).append(name)
    differences = []
    for names in groups.values():
        present = [name for name in names if name in matched]
        if len(names) == 1 or not present:
            continue
        first = matched[present[0]]
        for name in present[1:]:
            # Copying both would silently keep the last: the checkpoint is of an untied model.
            if not _same_values(first, matched[name]):
                differences.append(f"{present[0]} and {name} (two tensors there, one in the model)")
        matched.update(dict.fromkeys(names, first))
    return differences


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Compare exactly, NaN equal to NaN; tensors of another shape are reported elsewhere."""
    if a.shape != b.shape:
        return True
    return bool(torch.isclose(a, b.to(a.dtype), rtol=0, atol=0, equal_nan=True).all())


def _declared_patterns(model: nn.Module, attribute: str) -> Callable[[str], bool]:
    """Make a test for the keys that a transformers class declares safe to lack or to ignore."""
    patterns = {p for module in model.modules() for p in getattr(module, attribute, None) or ()}
    return lambda key: any(re.search(pattern, key) for pattern in patterns)


def _read_by_transformers(model: nn.Module, file: Path) -> dict[str, Tensor] | None:
    """Read a save_pretrained folder through transformers, where its names are not the model's."""
    # transformers 5 stores some models under other names and shapes than it computes with (the
    # experts of a Mixtral one by one), and only from_pretrained knows how to go back. It builds a
    # second model, so it is the second choice.
    inner = _unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or not (file.parent / "config.json").is_file():
        return None
    loader: Any = type(inner)  # its annotation leaves out the pair that loading info makes
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report would call "ok" what we are about to refuse
    try:
        with _kept_rng():
            read, info = loader.from_pretrained(
                file.parent,
                config=copy.deepcopy(inner.config),
                dtype="auto",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception:  # whatever it stumbles over, our own list of differences says it better
        return None
    finally:
        logging.set_verbosity(verbosity)
    return None if any(info.values()) else read.state_dict()


# Adapters


def _adapter_name(model: nn.Module) -> str | None:
    """Tell a PeftModel's active adapter; peft saves one not called default in a subfolder."""
    name = getattr(_unwrapped(model), "active_adapter", None)
    return name if isinstance(name, str) else None


def _load_adapter(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Copy an adapter's weights into the active adapter of a PeftModel; the base model stays."""
    inner, name = _unwrapped(model), _adapter_name(model)
    if name is None or not hasattr(inner, "peft_config"):
        raise ValueError(
            f"{file} holds the weights of an adapter, but the model ({type(inner).__name__}) is no "
            "PeftModel. Wrap it first: model = peft.PeftModel.from_pretrained(model, "
            f"{str(file.parent)!r}, is_trainable=True)."
        )
    from peft import set_peft_model_state_dict  # optional: a PeftModel proves that it is installed

    _check_adapter_settings(inner, name, file)
    if differences := _adapter_differences(inner, name, state):
        raise differences.error(file, model)
    set_peft_model_state_dict(inner, state, adapter_name=name)


def _check_adapter_settings(model: Any, name: str, file: Path) -> None:
    saved_file = file.parent / "adapter_config.json"
    if not saved_file.is_file():
        return
    saved, current = _read_json(saved_file), model.peft_config[name].to_dict()
    differ = [
        f"{key} ({saved[key]} in the checkpoint, {current.get(key)} in the model)"
        for key in _ADAPTER_SETTINGS
        if key in saved and saved[key] != current.get(key)
    ]
    if differ:
        raise ValueError(
            f"{file} was trained as another adapter than the model's '{name}': "
            f"{', '.join(differ)}. Nothing was loaded. Build the model with "
            f"peft.PeftModel.from_pretrained(base, {str(file.parent)!r})."
        )


def _adapter_differences(model: Any, name: str, state: dict[str, Tensor]) -> _Differences:
    from peft import get_peft_model_state_dict

    # Whether embeddings were saved along (they were if resized) only the checkpoint tells; peft's
    # own guess would ask the Hub. Take the answer that fits better.
    found: list[_Differences] = []
    for embeddings in (False, True):
        own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
        shapes = [d for k in own if k in state for d in _difference(k, state[k], own[k])]
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        found.append(_Differences(missing, unexpected, shapes))
        if not unexpected:
            break
    return min(found, key=len)


# --- Giving the model back -----------------------------------------------------------------------


@contextmanager
def preserved(model: nn.Module, weights: bool = True) -> Iterator[None]:
    """Give the model back on exit exactly as it was, whatever happened inside, errors included.

    Restored: which module, Parameter and buffer object stands under which name, their storage,
    values, ``requires_grad`` and ``.grad``, the train/eval flag of every submodule, and the global
    random state of torch (CUDA too, once in use), Python and numpy.

    Args:
        model: The model that is borrowed.
        weights: Copy the values of parameters and gradients as well. False saves the memory of one
            copy of the model, for a block that loads no checkpoint; buffers are copied in any case,
            since a forward pass may write to them.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> weight = model.weight
        >>> with preserved(model):
        ...     model.weight = nn.Parameter(torch.ones(1, 2))
        >>> model.weight is weight
        True
    """
    parameters = [_TensorState.of(p, copied=weights) for p in model.parameters()]
    gradients = [_TensorState.of(p.grad, copied=weights) for p in parameters if p.grad is not None]
    buffers = [_TensorState.of(buffer, copied=True) for buffer in model.buffers()]
    modules = [_ModuleState.of(module) for module in model.modules()]
    # A stack runs every callback, the last one first, even when one of them fails.
    with _kept_rng(), ExitStack() as stack:
        for state in [*parameters, *gradients, *buffers]:
            stack.callback(state.restore)
        for module in modules:
            stack.callback(module.restore)
        yield


@contextmanager
def _kept_rng() -> Iterator[None]:
    """Restore the global random state of torch, Python and numpy on exit."""
    cpu, python = torch.get_rng_state(), random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - the global state is the one to be kept
    # Asking CUDA for its state would initialise it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@dataclass(frozen=True)
class _ModuleState:
    """What one module holds under which name, and its train/eval flag."""

    module: nn.Module
    training: bool
    tables: tuple[dict[str, Any], ...]
    non_persistent: set[str]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        tables = tuple(dict(table.items()) for table in _tables(module))
        return _ModuleState(module, module.training, tables, set(module._non_persistent_buffers_set))

    def restore(self) -> None:
        self.module.training = self.training
        for current, saved in zip(_tables(self.module), self.tables, strict=True):
            if [(k, id(v)) for k, v in current.items()] != [(k, id(v)) for k, v in saved.items()]:
                self._restore_table(current, saved)
        if self.module._non_persistent_buffers_set != self.non_persistent:
            self.module._non_persistent_buffers_set = set(self.non_persistent)

    def _restore_table(self, current: dict[str, Any], saved: dict[str, Any]) -> None:
        changed = [name for name in saved if current.get(name) is not saved[name]]
        current.clear()
        current.update(saved)
        for name in changed:
            # A plain attribute of that name would hide the entry, and an LSTM keeps a second list
            # of its weights, which only setattr updates.
            self.module.__dict__.pop(name, None)
            setattr(self.module, name, saved[name])


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return module._modules, module._parameters, module._buffers


@dataclass(frozen=True)
class _TensorState:
    """One parameter, buffer or gradient: its storage, its values, and which gradient it has."""

    tensor: Tensor
    alias: Tensor  # shares the storage, so it finds it again after `tensor.data = other`
    values: Tensor | None
    is_leaf: bool
    requires_grad: bool
    grad: Tensor | None

    @staticmethod
    def of(tensor: Tensor, copied: bool) -> _TensorState:
        alias = tensor.detach()
        return _TensorState(
            tensor,
            alias,
            _writable(alias).clone() if copied else None,
            tensor.is_leaf,
            tensor.requires_grad,
            tensor.grad if tensor.is_leaf else None,
        )

    def restore(self) -> None:
        tensor = self.tensor
        if _layout(tensor) != _layout(self.alias):
            tensor.data = self.alias
        if self.values is not None:
            _writable(self.alias).copy_(self.values)
        if tensor.grad_fn is not None and self.is_leaf:
            tensor.detach_()  # somebody wrote to it within autograd's sight
        if tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if self.is_leaf and tensor.grad is not self.grad:
            tensor.grad = self.grad


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _writable(tensor: Tensor) -> Tensor:
    """View an expanded tensor without its repetitions, which torch refuses to write to."""
    if tensor.layout != torch.strided:
        return tensor
    return tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())]
