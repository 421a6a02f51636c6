"""The files of a run: ``run.json``, and beside it ``random_states.safetensors`` and ``start.safetensors``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_sdi.schema import COUNT, NUMBER, OBJECT, check_fields, list_of, one_of, optional, parse_json
from captum_sdi.whole_file import write_whole

if TYPE_CHECKING:
    from captum_sdi.unrolled.run import TrainingRun

_SETTINGS, _RANDOM_STATES, _START = "run.json", "random_states.safetensors", "start.safetensors"
_FORMAT, _VERSION = "captum_sdi.TrainingRun", 1
_FIELDS = {
    "version": COUNT,
    "optimizer_kind": one_of(("AdamW", "SGD")),
    "optimizer": OBJECT,
    "rates": list_of(NUMBER),
    "batches": list_of(list_of(COUNT)),
    "max_grad_norm": optional(NUMBER),
    "reduction": one_of(("mean", "tokens", "sum")),
    "micro_batch_size": optional(COUNT),
    "reduced_over": one_of(("update", "micro_batch")),
}


def write_run(
    folder: str | os.PathLike[str],
    run: TrainingRun,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a run, its settings last: a folder without them holds none.

    Args:
        folder: Made where it is missing.
        run: The run.
        start: The weights before the first update.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if start is not None:
        write_tensors(path / _START, start)
    if run.random_states is not None:
        write_tensors(path / _RANDOM_STATES, {"states": torch.stack(list(run.random_states))})
    settings = {
        "format": _FORMAT,
        "version": _VERSION,
        "optimizer_kind": type(run.optimizer).__name__,
        "optimizer": asdict(run.optimizer),  # type: ignore[call-overload]  # every one is a dataclass
        "rates": list(run.rates),
        "batches": [list(batch) for batch in run.batches],
        "max_grad_norm": run.max_grad_norm,
        "reduction": run.reduction,
        "micro_batch_size": run.micro_batch_size,
        "reduced_over": run.reduced_over,
        "has_random_states": run.random_states is not None,
    }
    text = json.dumps(settings)
    write_whole(path / _SETTINGS, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's fields.

    Returns:
        What `TrainingRun` takes, but ``optimizer_kind`` and the settings under ``optimizer``.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the file is damaged, of something else, or of a newer version.
    """
    path = Path(folder) / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{os.fspath(folder)} holds no training run ({_SETTINGS}): write one with TrainingRun.save or "
            "record_training(trainer, folder); the latter writes it when training ends."
        )
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
        check_fields(settings, _FIELDS)
    except ValueError as error:
        raise ValueError(f"{path} is no training run, or damaged: {error}.") from error
    if settings.pop("format", None) != _FORMAT or settings.pop("version") > _VERSION:
        raise ValueError(f"{path} is of something else, or of a newer captum_sdi: update it.")
    if settings.pop("has_random_states", None):
        states = read_tensors(path.with_name(_RANDOM_STATES))["states"]
        settings["random_states"] = [state.clone() for state in states]  # torch takes aligned memory alone
    return settings


def remove_run(folder: str | os.PathLike[str]) -> None:
    """Remove an earlier run's settings, so that a run which never ends leaves no other's behind."""
    (Path(folder) / _SETTINGS).unlink(missing_ok=True)


def read_start(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights before the first update.

    Returns:
        By parameter.

    Raises:
        FileNotFoundError: If the folder holds none.
    """
    path = Path(folder) / _START
    if not path.is_file():
        raise FileNotFoundError(
            f"{os.fspath(folder)} holds no weights to start from ({_START}): pass start= a state dict, or "
            "TrainingRun.save(folder, start=model.state_dict()) before training."
        )
    return read_tensors(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, whole or not at all; those that share memory are written apart."""
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda unfinished: save_file(apart, unfinished))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors.

    Returns:
        By name.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
