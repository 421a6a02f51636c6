"""The training loss that a Trainer logged at a checkpoint: told beside scores, part of none."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_sdi.checkpoints.checkpoint import Checkpoint
from captum_sdi.checkpoints.reading import read_json


def training_losses(checkpoints: Sequence[Checkpoint]) -> dict[str, float]:
    """Read the training losses of checkpoints, by name, as far as they are known."""
    losses = {}
    for checkpoint in checkpoints:
        loss = logged_loss(checkpoint.source)
        if loss is not None:
            losses[checkpoint.name] = loss
    return losses


def logged_loss(source: Any) -> float | None:
    """Return the last loss in the ``trainer_state.json`` of a checkpoint's folder.

    Args:
        source: What the load function takes; only of a path to a folder, or to a file in it, a loss is known.

    Returns:
        A Trainer's mean over the steps since it had logged before; None where no such file can be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(os.fsdecode(source))
    folder = path if path.is_dir() else path.parent
    try:
        history = read_json(folder / "trainer_state.json")["log_history"]
        logged = [entry["loss"] for entry in history if "loss" in entry]
        loss = float(logged[-1])
    except (OSError, LookupError, TypeError, ValueError):  # a note must not stop the work
        return None
    return loss if math.isfinite(loss) else None
