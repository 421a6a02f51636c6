"""What the tests of the index share: its data, a process that is killed, and five ways to damage a shard."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, rows
from torch import Tensor, nn

from captum_sdi import SDIInfluence, TensorSketch, whole_file

TRAIN, TEST = rows(23, seed=1), rows(3, seed=2)


def checkpoints() -> list[tuple[float, dict[str, Tensor]]]:
    """Two sets of weights with different learning rates."""
    torch.manual_seed(0)
    return [(0.5, dict(CASES[0].model(torch.float32).state_dict())), (0.25, dict(CASES[0].make().state_dict()))]


def load(model: nn.Module, checkpoint: tuple[float, dict[str, Tensor]]) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


def influence(path: Path | None, **changes: Any) -> SDIInfluence:
    """One attribution with an index at `path`."""
    settings: dict[str, Any] = {
        "model": CASES[0].model(torch.float32),
        "train_dataset": TRAIN,
        "checkpoints": checkpoints(),
        "checkpoints_load_func": load,
        "batch_size": 4,
        "sketch": TensorSketch(64),
        "index": path,
        **changes,
    }
    if settings["checkpoints"] is None:
        settings.pop("checkpoints_load_func")
    return SDIInfluence(**settings)


def forked(work: Callable[[], object]) -> int:
    """Runs something in a fork of this process, which is warm; the child's number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # whatever it was, this process must not go on with the tests
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_while_building(path: Path, moment: random.Random, **changes: Any) -> int:
    """A process that builds an index and is killed with SIGKILL before or after one of its writes reaches the disk."""
    at, sync, written = moment.randrange(60), whole_file._sync, iter(range(10**6))

    def fatal(file: Path) -> None:
        number = next(written)
        if number == at // 2 and at % 2 == 0:
            if moment.random() < 0.5 and file.is_file():
                os.truncate(file, moment.randrange(file.stat().st_size))  # what a crash leaves of a file not yet synced
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)
        if number == at // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        whole_file._sync = fatal
        influence(path, **changes).build_index()

    return ended(forked(work))


def killed_after(path: Path, seconds: float, **changes: Any) -> int:
    """A process that builds an index and is killed with SIGKILL after so much time, wherever it is."""
    child = forked(lambda: influence(path, **changes).build_index())
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def edited(file: Path) -> None:
    """One bit: the sign of one number. Rows are aligned, so a number's last byte holds it."""
    data = bytearray(file.read_bytes())
    data[(len(data) - 200) // 4 * 4 + 3] ^= 0x80
    file.write_bytes(data)


def removed(file: Path) -> None:
    file.unlink()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def swapped(file: Path) -> None:
    """A sound shard under another's name: its examples twice, the other's not at all."""
    other = min(other for other in file.parent.glob("*.safetensors") if other != file)
    file.write_bytes(other.read_bytes())


DAMAGES = [truncated, edited, removed, emptied, swapped]
