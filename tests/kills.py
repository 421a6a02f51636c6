"""Processes that are killed with SIGKILL: before one of the things they do to files, or wherever they are."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from index_faults import ended, forked

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Of Python's audit events, those that may change a folder; `os.replace` is a renaming."""

KILLED = -signal.SIGKILL


def watch_changes(folder: Path, before: Callable[[int], object]) -> None:
    """Tells, for as long as this process lives, the number of every change below a folder before it is made."""
    numbers = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            before(next(numbers))

    sys.addaudithook(hook)


def n_changes(work: Callable[[], object], folder: Path) -> int:
    """How many changes a process makes below a folder."""
    reader, writer = os.pipe()

    def counted() -> None:
        watch_changes(folder, lambda number: os.write(writer, b"."))
        work()

    assert ended(forked(counted)) == 0
    os.close(writer)
    with open(reader, "rb") as pipe:
        return len(pipe.read())


def killed_at(work: Callable[[], object], folder: Path, change: int) -> int:
    """How a process ended that was killed before one of its changes below a folder."""

    def kill(number: int) -> None:
        if number == change:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched() -> None:
        watch_changes(folder, kill)
        work()

    return ended(forked(watched))


def killed_after(work: Callable[[], object], seconds: float) -> int:
    """How a process ended that was killed after so much time, if it was still there."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child)
