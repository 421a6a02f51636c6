"""The same weights under two paths: links, and copies."""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_sdi.words import warn_user

_N_PROBES, _PROBE_BYTES = 64, 1024
_WEIGHTS = re.compile(r"(pytorch_|adapter_)?model.*\.(safetensors|bin)")


def without_copies(sources: Sequence[Any]) -> list[Any]:
    """Leave out, with a warning, every path to the weights of another one; one path listed twice is meant so."""
    kept: list[Any] = []
    for source in sources:
        twins = [earlier for earlier in kept if are_the_same(earlier, source) and earlier != source]
        if not twins:
            kept.append(source)
            continue
        warn_user(f"{source} holds the same weights as {twins[0]}: they are counted once. Remove one of the two.")
    return kept


def are_the_same(first: Any, second: Any) -> bool:
    """Tell whether two paths lead to the same file or folder, or to copies of it."""
    if not (isinstance(first, str) and isinstance(second, str) and os.path.exists(first) and os.path.exists(second)):
        return False
    if os.path.samefile(first, second):
        return True
    pairs = list(zip(compared_files(Path(first)), compared_files(Path(second)), strict=False))
    return bool(pairs) and all(same_bytes(ours, theirs) for ours, theirs in pairs)


def compared_files(path: Path) -> list[Path]:
    """List the files by which a checkpoint is told from others; a Trainer's log names its step."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    log = path / "trainer_state.json"
    weights = sorted(file for file in path.iterdir() if _WEIGHTS.fullmatch(file.name) and file.is_file())
    # Weights may stand still from one step to the next (a rate of 0): the log says that these are two steps.
    return [log, *weights] if log.is_file() else weights


def same_bytes(first: Path, second: Path) -> bool:
    """Compare two files: a few places first, since nearly all weights differ, and they can be large."""
    size = first.stat().st_size
    if size == 0 or size != second.stat().st_size:
        return False
    with first.open("rb") as ours, second.open("rb") as theirs:
        for place in range(0, size, size // _N_PROBES + 1):
            ours.seek(place)
            theirs.seek(place)
            if ours.read(_PROBE_BYTES) != theirs.read(_PROBE_BYTES):
                return False
    return filecmp.cmp(first, second, shallow=False)
