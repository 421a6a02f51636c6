"""Writing to an index: one builder at a time, and sentences about what stands in the way."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from filelock import FileLock, Timeout

from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.processes import Processes

LOCK_SECONDS = 10.0
"""Workers of a killed process's DataLoader hold its lock until they notice, a few seconds later."""

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(index: SketchIndex, processes: Processes) -> Iterator[None]:
    """Hold the index's lock, in the first of its processes, and explain what stands in the way of writing."""
    try:
        if processes.rank == 0:
            index.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(index.path / "building.lock", timeout=LOCK_SECONDS)
        with lock if processes.rank == 0 else nullcontext():
            yield
    except Timeout as error:
        raise BlockingIOError(
            errno.EAGAIN,
            f"another process is building the index at {index.path}. Wait for it, or start several at once with "
            "`accelerate launch`, which share the work",
        ) from error
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
                f"the disk of the index at {index.path} is full. Every shard written so far is kept: free some "
                "space and run again, or choose index_dtype=torch.float16 or pool=True in another folder",
            ) from error
        raise


def missing_rows(index: SketchIndex) -> str:
    """Describe what an index lacks: damaged files, and how many examples it has at each checkpoint."""
    n_examples = "?" if index.examples is None else index.examples
    lines = [f"damaged {file}" for file in index.damaged]
    lines += [f"{index.rows_at(name)} of {n_examples} examples at {name!r}" for name in index.shards]
    return "; ".join(lines)
