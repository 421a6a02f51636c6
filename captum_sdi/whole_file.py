"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished"
"""The suffix of a file that is being written, or was when its process was killed."""


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, sync it and rename it: whatever happens, ``path`` is old, new or absent.

    Args:
        path: Where the file goes.
        write: Writes it to the path it is given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "note.txt", lambda unfinished: unfinished.write_text("whole"))
        ...     (Path(folder) / "note.txt").read_text()
        'whole'
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        write(unfinished)
        _sync(unfinished)
        os.replace(unfinished, path)
        _sync(path.parent)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say whose file it is
            error.filename = str(path)
        raise


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle on a folder; its renames need none
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
