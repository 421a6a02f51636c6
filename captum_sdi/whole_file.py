"""Files that are written whole or not at all, and files that are files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished"
"""The suffix of a file that is being written, or was when its process was killed."""


def check_regular(path: Path) -> os.stat_result:
    """Check that a path leads to a file: a pipe would hang, and a device never ends.

    Returns:
        Its status.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a folder, a pipe, a device or a socket.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise ValueError(f"{path} is {kind}; name a regular file.")
    return status


def check_replaceable(path: Path) -> None:
    """Check that nothing but a regular file would be replaced.

    Raises:
        ValueError: If the path is a link, a folder, a pipe, a device or a socket.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link, which is not written through: remove it, or name another place.")
    if path.exists():
        check_regular(path)


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the file that a path leads to, so that a link stays one when it is written.

    Raises:
        TypeError: If it is no path.
        FileNotFoundError: If its folder does not exist.
        ValueError: If it is a folder, a pipe, a device or a socket.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a file to write, got {path!r}.")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to save {Path(path).name} in: make it first.")
    target = Path(os.path.realpath(path))
    if target.exists():
        check_regular(target)
    return target


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
