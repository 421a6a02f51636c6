"""The folder of an index: what may lie in it, and what a killed process left there."""

from __future__ import annotations

import re
from pathlib import Path

from captum_sdi.index.manifest import Manifest
from captum_sdi.index.shards import is_shard_name
from captum_sdi.whole_file import UNFINISHED


def check_folder(path: Path) -> None:
    """Refuse to write among other things.

    Raises:
        ValueError: If the path is a file, or a folder of other things than an index.
    """
    if not path.is_dir():
        raise ValueError(f"index={str(path)!r} is a file; pass a folder of its own.")
    if Manifest.load(path) is not None:
        return
    strange = sorted(entry.name for entry in path.iterdir() if not could_be_of_index(entry))
    if strange:
        raise ValueError(
            f"index={str(path)!r} is no index, and holds other things ({', '.join(strange[:3])}): pass a folder of "
            "its own."
        )


def could_be_of_index(entry: Path) -> bool:
    """Say whether an entry of a folder without a manifest may be that of an index whose manifest was lost."""
    is_kept = re.fullmatch(r"[a-z]+-[0-9a-f]{16}\.safetensors", entry.name, re.ASCII) is not None
    if is_kept or entry.suffix in (UNFINISHED, ".lock", ".json", ".faiss"):
        return True
    if entry.is_symlink() or not entry.is_dir():
        return False
    return all(is_shard_name(file.name) or is_unfinished(file) for file in entry.iterdir())


def unfinished_files(folder: Path) -> list[Path]:
    """List what a killed process left of our files."""
    return [file for file in folder.glob(f"*{UNFINISHED}") if is_unfinished(file)]


def is_unfinished(file: Path) -> bool:
    """Say whether a file is one of ours that was being written."""
    derived = r"[0-9a-f]{16}\.faiss|[a-z]+-[0-9a-f]{16}\.safetensors"  # from rows: by FAISS, by preconditioners
    written = rf"(\d{{12,}}-\d{{12,}}\.safetensors|{derived}|manifest\.json|command\.json|builder\.json)"
    is_named = re.fullmatch(rf"{written}\.\d+{re.escape(UNFINISHED)}", file.name, re.ASCII)
    return is_named is not None and file.is_file() and not file.is_symlink()
