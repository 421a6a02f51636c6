"""What is kept of a run: states in memory or on disk, and how far a way back had come when it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from captum_sdi.data.fingerprints import batch_fingerprint
from captum_sdi.unrolled.optimizers import State
from captum_sdi.unrolled.run_files import read_tensors, write_tensors
from captum_sdi.unrolled.updates import Updates


class States:
    """States by the update that follows, in memory or on disk.

    Args:
        folder: Where they are written; None: they stay in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._in_memory: dict[int, State] = {}

    def store(self, update: int, state: State) -> None:
        """Keep the state before an update."""
        if self._folder is None:
            self._in_memory[update] = state
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(update), numbered(state))

    def state_before(self, update: int, like: Tensor) -> State:
        """Return the state before an update, on the device of a vector."""
        if self._folder is None:
            return self._in_memory[update]
        return in_order(read_tensors(self._path(update)), like)

    def n_done(self, kept: Sequence[int]) -> int:
        """Return before which update an earlier process left the last state; 0: before the first."""
        if self._folder is None:
            return 0
        n_done = 0
        for update in kept:
            if not self._path(update).exists():
                break
            n_done = update
        return n_done

    def _path(self, update: int) -> Path:
        assert self._folder is not None
        return self._folder / f"state-{update:08d}.safetensors"


class WayBack:
    """How far some seeds have come on their way back, on disk: an interrupted question goes on from there.

    Args:
        folder: Of the run; None: nothing is written.
        seeds: ``(seeds, size)`` of the question.
    """

    def __init__(self, folder: Path | None, seeds: Tensor) -> None:
        self._path: Path | None = None
        if folder is not None:
            self._path = folder / f"scores-{tensor_fingerprint(seeds)}.safetensors"

    def read(self, like: Tensor) -> tuple[int, State, Tensor] | None:
        """Return how many updates are left, the adjoint behind them and the scores so far; None: all are left."""
        if self._path is None or not self._path.exists():
            return None
        named = read_tensors(self._path)
        n_left, scores = int(named.pop("n_left")), named.pop("scores")
        return n_left, in_order(named, like), scores.to(like.device)

    def write(self, n_left: int, adjoint: State, scores: Tensor) -> None:
        """Write how far the seeds have come."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path, {**numbered(adjoint), "scores": scores, "n_left": torch.tensor(n_left)})

    def remove(self) -> None:
        """Forget it: the question is answered."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def numbered(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by their place."""
    return {str(place): tensor for place, tensor in enumerate(state)}


def in_order(named: dict[str, Tensor], like: Tensor) -> State:
    """Return what `numbered` named, on the device of a tensor."""
    tensors = [named[str(place)] for place in range(len(named))]
    return tuple(tensor.to(like.device) for tensor in tensors)


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return a digest of a tensor's numbers."""
    numbers = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def run_fingerprint(updates: Updates, start: Tensor) -> str:
    """Return a digest of a run: its settings, its start, and every batch of its examples."""
    run, digest = updates.run, hashlib.sha256()
    settings = [type(run.optimizer).__name__, asdict(run.optimizer), run.rates, run.batches, run.max_grad_norm]  # type: ignore[call-overload]
    settings += [run.reduction, run.micro_batch_size, run.reduced_over, tensor_fingerprint(start)]
    digest.update(json.dumps(settings).encode())
    for update in range(run.n_updates):
        for batch in updates.micro_batches(update):
            digest.update(batch_fingerprint(batch.raw))
            digest.update(tensor_fingerprint(batch.shares).encode())
            if batch.random_state is not None:
                digest.update(tensor_fingerprint(batch.random_state).encode())
    return digest.hexdigest()[:16]
