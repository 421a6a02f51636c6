"""Writing to an index: one builder at a time, and sentences about what stands in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from filelock import FileLock, Timeout

from captum_sdi.index.shards import HALF_PRECISION
from captum_sdi.words import in_bytes

if TYPE_CHECKING:
    from captum_sdi.index.folder import SketchIndex
    from captum_sdi.index.processes import Processes

HOLDER = "builder.json"
"""Says who holds the lock, while it is held."""

LOCK_SECONDS = 10.0
"""Workers of a killed process's DataLoader hold its lock until they notice, a few seconds later."""

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of the index in a folder."""
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / "building.lock", timeout=LOCK_SECONDS)
    holder = path / HOLDER
    is_ours = not holder.is_symlink()
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN,
            f"another process is building the index at {path}{holder_in_words(holder)}. Wait for it, or start several "
            "at once with `accelerate launch`, which share the work",
        ) from error
    try:
        if is_ours:
            holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        if is_ours:
            holder.unlink(missing_ok=True)
        lock.release()


def holder_in_words(file: Path) -> str:
    """Say who holds the lock, where that can be read."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f" (process {int(holder['pid'])} on {str(holder['host'])[:64]!r})"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


@contextmanager
def explained(index: SketchIndex) -> Iterator[None]:
    """Explain what stands in the way of writing."""
    try:
        yield
    except OSError as error:
        is_ours = str(error.filename).startswith(str(index.path))  # and not, say, the train set's
        if is_ours and error.errno in _READ_ONLY:
            raise PermissionError(
                error.errno,
                f"the index at {index.path} lacks rows or is damaged, and the folder is read-only: "
                f"{missing_rows(index)}. Build it where it can be written, or restore it",
            ) from error
        if is_ours and error.errno in _DISK_FULL:
            raise OSError(
                error.errno,
                f"the disk of the index at {index.path} is full. Every shard written so far is kept "
                f"({missing_rows(index)}): free some space and run again, or choose index_dtype=torch.float16 or "
                "pool=True in another folder",
            ) from error
        raise


def check_space(index: SketchIndex, n_rows: int, processes: Processes) -> None:
    """Check in all processes that so many more rows fit on the disk."""
    if any(processes.gather(needed_bytes(index, n_rows) > free_bytes(index.path))):
        refuse_disk(index, n_rows)


def refuse_disk(index: SketchIndex, n_rows: int) -> NoReturn:
    """Raise the error of a disk on which so many more rows do not fit."""
    needed, free = needed_bytes(index, n_rows), free_bytes(index.path)
    raise OSError(
        errno.ENOSPC,
        f"the index at {index.path} needs {in_bytes(needed)} more, and {in_bytes(free)} are free on its "
        "disk. Nothing was computed: free some space, or choose index_dtype=torch.float16 or pool=True in "
        "another folder",
    )


def needed_bytes(index: SketchIndex, n_rows: int) -> int:
    """Return how many bytes so many rows take."""
    scale_bytes = 4 if index.dtype in HALF_PRECISION else 0
    return n_rows * (index.width * index.dtype.itemsize + 8 + scale_bytes)


def free_bytes(folder: Path) -> int:
    """Return how much is free on the disk that a folder is on, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def missing_rows(index: SketchIndex) -> str:
    """Describe what an index lacks: damaged files, and how many examples it has at each checkpoint."""
    n_examples = "?" if index.examples is None else index.examples
    lines = [f"damaged {file}" for file in index.damaged]
    lines += [f"{index.rows_at(name)} of {n_examples} examples at {name!r}" for name in index.shards]
    return "; ".join(lines)
