"""What a way back through training will cost, from one measured update."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from captum_sdi.cost import readable_time
from captum_sdi.unrolled.backward import SEEDS_AT_ONCE, visited
from captum_sdi.unrolled.replay import Replay
from captum_sdi.words import readable_size


@dataclass(frozen=True)
class UnrolledEstimate:
    """The cost of one question; prints as a short table.

    Example:
        >>> print(UnrolledEstimate(n_seeds=48, n_updates=160, n_examples=256, update_seconds=0.05, seed_seconds=0.12,
        ...     memory_bytes=90_000_000))
        48 seeds back through 160 updates
        time         16 min  50 ms an update to replay, 120 ms a seed and update
        memory        90 MB  states kept, and the seeds on their way
    """

    n_seeds: int
    """Test examples times their loop steps, prelude and coda."""
    n_updates: int
    n_examples: int
    """Of the train set."""
    update_seconds: float
    """One update forwards; measured."""
    seed_seconds: float
    """One seed through one update; measured."""
    memory_bytes: int
    """States that are kept in memory, and the adjoints of all seeds."""

    @property
    def seconds(self) -> float:
        """Time in all, two replays included."""
        return self.n_updates * (2 * self.update_seconds + self.n_seeds * self.seed_seconds)

    @property
    def retraining_seconds(self) -> float:
        """Time to leave out every training example in turn, and train again."""
        return self.n_examples * self.n_updates * self.update_seconds

    def __str__(self) -> str:
        lines = [
            f"{self.n_seeds} seeds back through {self.n_updates} updates",
            f"time    {readable_time(self.seconds):>11}  {readable_time(self.update_seconds)} an update to replay, "
            f"{readable_time(self.seed_seconds)} a seed and update",
            f"memory  {readable_size(self.memory_bytes):>11}  states kept, and the seeds on their way",
        ]
        if self.retraining_seconds < self.seconds:
            lines.append(
                f"Training again without each of {self.n_examples} examples is cheaper: "
                f"{readable_time(self.retraining_seconds)}."
            )
        return "\n".join(lines)


def estimated(replay: Replay, n_seeds: int) -> UnrolledEstimate:
    """Measure the first update forwards and backwards, and multiply.

    Args:
        replay: The run.
        n_seeds: How many seeds will go back.

    Returns:
        The estimate.
    """
    updates, n_timed = replay.updates, min(n_seeds, SEEDS_AT_ONCE)
    initial = updates.run.optimizer.initial(replay.start)
    adjoint = tuple(torch.ones(n_timed, len(replay.start)).to(replay.start) for _ in initial)
    with updates.borrowed():
        updates.step(initial, 0)  # warms up
        begun = time.perf_counter()
        updates.step(initial, 0)
        stepped = time.perf_counter()
        visited(updates, 0, initial, adjoint, torch.ones(n_timed).to(replay.start))
        finished = time.perf_counter()
    n_kept = len(replay.kept) + replay.kept.step
    n_vectors = len(initial) * (n_seeds + (n_kept if replay.folder is None else replay.kept.step))
    return UnrolledEstimate(
        n_seeds=n_seeds,
        n_updates=updates.run.n_updates,
        n_examples=len(updates.rows),
        update_seconds=stepped - begun,
        seed_seconds=(finished - stepped) / n_timed,
        memory_bytes=n_vectors * replay.start.nbytes,
    )
