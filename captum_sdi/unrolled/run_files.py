"""The files of a run: ``run.json``, and beside it the start and the random states, whose names it holds.

Their names are made of their content, so that a run is swapped for another by one renaming, that of ``run.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from captum_sdi.preconditioners.shelf import content_digest
from captum_sdi.schema import COUNT, NUMBER, OBJECT, TEXT, check_fields, list_of, one_of, optional, parse_json
from captum_sdi.whole_file import check_regular, write_whole

if TYPE_CHECKING:
    from captum_sdi.unrolled.run import TrainingRun

_SETTINGS, _RANDOM_STATES, _START = "run.json", "random_states", "start"
_NAME = re.compile(r"(random_states|start)-[0-9a-f]{16}\.safetensors")
_DIGEST = "digest"
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
    _START: optional(TEXT),
    _RANDOM_STATES: optional(TEXT),
}


def check_folder(argument: str, folder: str | os.PathLike[str]) -> None:
    """Refuse a place where no folder can be: a file, or a path that goes through one.

    Args:
        argument: What the user calls it.
        folder: The place.

    Raises:
        ValueError: If it is one.
    """
    path = Path(folder)
    for place in (path, *path.parents):
        if place.is_dir():
            return
        if place.exists() or place.is_symlink():
            raise ValueError(f"{argument}={os.fspath(folder)!r}: {os.fspath(place)} is no folder. Pass a folder.")


def write_run(
    folder: str | os.PathLike[str],
    run: TrainingRun,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a run, its settings last: until then the folder holds the earlier one, whole, or none.

    Args:
        folder: Made where it is missing.
        run: The run.
        start: The weights before the first update.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    names: dict[str, str | None] = {_START: None, _RANDOM_STATES: None}
    if start is not None:
        names[_START] = write_named(path, _START, start)
    if run.random_states is not None:
        names[_RANDOM_STATES] = write_named(path, _RANDOM_STATES, {"states": torch.stack(list(run.random_states))})
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
        **names,
    }
    text = json.dumps(settings)
    write_whole(path / _SETTINGS, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    for file in path.glob("*.safetensors"):
        if _NAME.fullmatch(file.name) and file.name not in names.values():
            file.unlink(missing_ok=True)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's fields.

    Returns:
        What `TrainingRun` takes, but ``optimizer_kind`` and the settings under ``optimizer``.

    Raises:
        FileNotFoundError: If there is no run.
        ValueError: If the file is damaged, of something else, or of a newer version.
    """
    settings = read_json(Path(folder))
    del settings[_START]
    name = settings.pop(_RANDOM_STATES)
    if name is not None:
        states = read_named(Path(folder), _RANDOM_STATES, name)["states"]
        settings[_RANDOM_STATES] = [state.clone() for state in states]  # torch takes aligned memory alone
    return settings


def read_json(folder: Path) -> dict[str, Any]:
    """Read ``run.json``, every field of which is known and of its kind."""
    path = folder / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no training run ({_SETTINGS}): write one with TrainingRun.save or "
            "record_training(trainer, folder); the latter writes it when training ends."
        )
    try:
        settings = parse_json(path.read_bytes())
        check_fields(settings, _FIELDS)
    except ValueError as error:
        raise ValueError(f"{path} is no training run, or damaged: {error}.") from error
    is_ours = settings.pop("format", None) == _FORMAT and settings.keys() == _FIELDS.keys()
    if not is_ours or settings.pop("version") != _VERSION:
        raise ValueError(f"{path} is of something else, or of another captum_sdi: update it, or save the run again.")
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
    name = read_json(Path(folder))[_START]
    if name is None:
        raise FileNotFoundError(
            f"{os.fspath(folder)} holds no weights to start from: pass start= a state dict, or write them with "
            "TrainingRun.save(folder, start=...)."
        )
    return read_named(Path(folder), _START, name)


def write_named(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a file named by its content.

    Returns:
        Its name.
    """
    name = f"{kind}-{content_digest(dict(tensors))[:16]}.safetensors"
    write_tensors(folder / name, tensors)
    return name


def read_named(folder: Path, kind: str, name: str) -> dict[str, Tensor]:
    """Read what `write_named` wrote.

    Returns:
        The tensors by name.

    Raises:
        ValueError: If the file is not there, or not the one that was written.
    """
    if not _NAME.fullmatch(name) or not (folder / name).exists():
        raise ValueError(f"{folder / _SETTINGS} is damaged: there is no {name!r} beside it.")
    tensors = read_tensors(folder / name)
    if name != f"{kind}-{content_digest(tensors)[:16]}.safetensors":
        raise ValueError(f"{folder / name} is damaged: it is another file.")
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, whole or not at all; those that share memory are written apart."""
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = save(apart, {_DIGEST: content_digest(apart)})
    # By our own write, not `save_file`, whose error for a full disk is no OSError.
    write_whole(path, lambda unfinished: unfinished.write_bytes(content))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors.

    Returns:
        By name.

    Raises:
        ValueError: If the file is damaged.
    """
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if metadata.get(_DIGEST) != content_digest(tensors):
        raise ValueError(f"{path} is damaged: its content is not what was written.")
    return tensors
