"""Finding the checkpoints that the user meant, and their order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from captum._utils.av import AV

from captum_sdi.checkpoints.copies import without_copies
from captum_sdi.checkpoints.files import (
    TRAINER_FOLDER,
    WEIGHT_FILES,
    abbreviated,
    conversion_command,
    may_be_weights,
)
from captum_sdi.words import warn_user


def find_checkpoints(checkpoints: Any) -> list[Any]:
    """Order what the user passed as ``checkpoints`` into a list, by Captum's rules.

    A directory of Trainer folders (``checkpoint-<n>``), or of others with weights and a number at the end of their
    names (``epoch_2``, ``step_500``), is ordered by step, and whatever else lies in it is ignored. A directory that is
    a checkpoint, or a file, is a list of one. The entries of any other directory, less those that cannot be weights
    (results, logs, optimizers), and a list of paths, are sorted naturally, as in Captum. Every other iterable keeps its
    order. The same weights under two paths count once, with a warning. ``None`` stands for the model's current weights.

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
        return without_copies(checkpoints_at(os.fsdecode(checkpoints)))
    if isinstance(checkpoints, Mapping) or not isinstance(checkpoints, Iterable):
        raise TypeError(
            "checkpoints must be a path, a list or an iterator of checkpoints, or None for the model's current "
            f"weights, got {type(checkpoints).__name__}. Put a single checkpoint in a list."
        )
    sources: list[Any] = []
    for position, source in enumerate(checkpoints):
        if source is None:
            raise ValueError(
                f"{captums_sentence(checkpoints)} Entry {position} of it is None. For the model's current weights "
                "pass checkpoints=None; they cannot stand among others."
            )
        sources.append(os.fsdecode(source) if isinstance(source, os.PathLike) else source)
    if not sources:
        raise ValueError(f"{captums_sentence(checkpoints)} It is empty. Pass at least one checkpoint.")
    # Captum sorts a list of paths, and takes everything else in the order given.
    if isinstance(checkpoints, list) and all(isinstance(source, str) for source in sources):
        sources = AV.sort_files(sources)
    return without_copies(sources)


def checkpoints_at(path: str) -> list[str]:
    """List the checkpoints at a path: a folder of checkpoints, a checkpoint folder, or a file."""
    if os.path.isfile(path):
        return [path]
    if not os.path.exists(path):
        raise ValueError(f"{captums_sentence(path)} There is no such file or directory. Check the path.")
    if not os.path.isdir(path):
        raise ValueError(f"{captums_sentence(path)} It is neither a regular file nor a directory (a pipe, a device?).")
    numbered_folders = trainer_folders_in(path) or numbered_folders_in(path)
    if numbered_folders:
        return numbered_folders
    if is_checkpoint(Path(path)):
        warn_of_others_within(Path(path))
        return [path]
    # The path is escaped, because a directory may be called "run[1]".
    pattern = os.path.join(glob.escape(path), "*")
    entries = AV.sort_files(glob.glob(pattern))
    if not entries:
        raise ValueError(
            f"{captums_sentence(path)} The directory is empty. Pass one that holds checkpoint-<step> folders or "
            "checkpoint files."
        )
    files = [entry for entry in entries if may_be_weights(Path(entry))]
    if not files:
        names = [os.path.basename(entry) for entry in entries]
        raise ValueError(
            f"{captums_sentence(path)} Nothing in it can be weights: {abbreviated(names)}. Pass a directory that holds "
            "checkpoint-<step> folders or checkpoint files, or a list of paths."
        )
    return files


def trainer_folders_in(path: str) -> list[str]:
    """List the Trainer folders (``checkpoint-<step>``) of a run's directory by their steps."""
    folders: dict[int, str] = {}
    for entry in Path(path).iterdir():
        match = TRAINER_FOLDER.fullmatch(entry.name)
        if match and entry.is_dir():
            step = int(match[1])
            folders[step] = os.path.join(path, entry.name)
    return [folders[step] for step in sorted(folders)]


def numbered_folders_in(path: str) -> list[str]:
    """List the folders with weights whose names end in a number, as accelerate's do, in that order."""
    entries = Path(path).iterdir()
    folders = [entry for entry in entries if entry.name[-1].isdecimal() and entry.is_dir()]
    numbered = [os.path.join(path, entry.name) for entry in folders if is_checkpoint(entry)]
    return AV.sort_files(numbered)


def warn_of_others_within(folder: Path) -> None:
    """Warn of folders with weights inside a folder that is taken as one checkpoint."""
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and is_checkpoint(entry))
    if inner:
        warn_user(
            f"{folder} is taken as one checkpoint, although folders in it hold weights as well: {abbreviated(inner)}. "
            "Pass a list of paths to choose others."
        )


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder is one checkpoint, readable or sharded, by its entries."""
    readable = any((folder / name).is_file() for name in WEIGHT_FILES)
    return readable or conversion_command(folder) is not None


def captums_sentence(checkpoints: Any) -> str:
    """Return Captum's sentence, word for word: its tests and its users match on it."""
    return f"Invalid checkpoints provided for TracIn class: {checkpoints}!"
