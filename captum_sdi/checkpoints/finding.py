"""Finding checkpoints, and naming them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from captum._utils.av import AV

from captum_sdi.checkpoints.files import ADAPTER_FILES, TRAINER_FOLDER, WHOLE_FILES, conversion_command


def find_checkpoints(checkpoints: Any) -> list[Any]:
    """Order what the user passed as ``checkpoints`` into a list, by Captum's rules.

    A directory of Trainer folders (``checkpoint-<n>``) is ordered by step, and whatever else lies in it is ignored. A
    directory that is a checkpoint, or a file, is a list of one. The entries of any other directory, and a list of
    paths, are sorted naturally, as in Captum. Every other iterable keeps its order. ``None`` stands for the model's
    current weights.

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
            "checkpoints must be a path, a list or an iterator of checkpoints, or None for the model's current "
            f"weights, got {type(checkpoints).__name__}. Put a single checkpoint in a list."
        )
    found = [os.fsdecode(c) if isinstance(c, os.PathLike) else c for c in checkpoints]
    if not found:
        raise ValueError(f"{_invalid(checkpoints)} It is empty. Pass at least one checkpoint.")
    if any(c is None for c in found):
        position = [c is None for c in found].index(True)
        raise ValueError(
            f"{_invalid(checkpoints)} Entry {position} of it is None. For the model's current weights pass "
            "checkpoints=None; they cannot stand among others."
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
        if entry.is_dir() and (match := TRAINER_FOLDER.fullmatch(entry.name))
    }
    if steps:
        return [steps[step] for step in sorted(steps)]
    whole = any((folder / name).is_file() for name in WHOLE_FILES + ADAPTER_FILES)
    if whole or conversion_command(folder):
        return [path]
    # Escaped, because a directory may be called "run[1]".
    files = AV.sort_files(glob.glob(os.path.join(glob.escape(path), "*")))
    if not files:
        raise ValueError(
            f"{_invalid(path)} The directory is empty. Pass one that holds checkpoint-<step> folders or checkpoint "
            "files."
        )
    return files


def _invalid(checkpoints: Any) -> str:
    # The first sentence is Captum's, word for word: its tests and its users match on it.
    return f"Invalid checkpoints provided for TracIn class: {checkpoints}!"


def checkpoint_names(checkpoints: list[Any]) -> list[str]:
    """Name each checkpoint; the sketch derives its random generator from this name.

    A path is named by its last component, so that moving the run's folder, or deleting another checkpoint of it,
    changes no name. Paths whose last components agree take as many more as they need to differ. An object without a
    name goes by its position.

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
