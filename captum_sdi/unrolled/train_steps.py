"""The train side's loop steps: which step of training acts on which step of the answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.checkpoints import Checkpoint
from captum_sdi.data.batch import select
from captum_sdi.data.examples import Examples
from captum_sdi.features import Bins
from captum_sdi.passes import Engine
from captum_sdi.unrolled.backward import Visit
from captum_sdi.unrolled.seeds import Seeds
from captum_sdi.unrolled.updates import MicroBatch, Updates


class StepMatrices:
    """Adds up ``-a_i ⟨φ_s(θ_{k-1}; z_i), c_t⟩`` over the updates.

    Args:
        engine: Opens the model with exact features.
        examples: The train set, whose first batch serves to find the loop.
        updates: The run's.
        positions: ``(n,)`` of the train examples wanted.

    Raises:
        ValueError: If a position is not in the train set, or the run has dropout.
    """

    def __init__(
        self,
        engine: Engine,
        examples: Examples,
        updates: Updates,
        positions: Tensor,
    ) -> None:
        unknown = positions[positions >= len(updates.rows)].tolist()
        if unknown:
            raise ValueError(f"indices= names training examples {unknown}, which train_dataset does not have.")
        if updates.run.random_states is not None:
            raise ValueError("step_matrix splits gradients in evaluation mode, and this run had dropout.")
        self._engine, self._examples, self._updates = engine, examples, updates
        self._positions = positions
        self._sums: Tensor | None = None

    def add(self, visit: Visit, seeds: Seeds) -> None:
        """Take one update: split the gradients of its examples at the parameters before it."""
        named = self._updates.loss.layout.named(visit.vector)
        checkpoint = Checkpoint(f"update-{visit.update}", named)
        if not torch.isin(visit.positions, self._positions).any():
            return
        with self._engine.points([checkpoint], self._examples) as points:
            point = next(points)
            for batch in visit.batches:
                wanted = torch.isin(batch.positions, self._positions).nonzero().flatten().tolist()
                if not wanted:
                    continue
                positions = batch.positions[wanted].tolist()
                raw = select(batch.raw, wanted)
                features = point.batch(raw, self._examples.side, positions, by_step=True)
                train_steps = Bins.steps(self._updates.loss.layout.rows(features.rows))
                self._add_batch(batch, wanted, train_steps, seeds.by_test(visit.directions))

    def _add_batch(
        self,
        batch: MicroBatch,
        wanted: list[int],
        train_steps: Tensor,
        directions: Tensor,
    ) -> None:
        """Contract the train steps ``(n, s, size)`` of some examples with directions ``(q, b, size)``."""
        test_steps = Bins.steps(directions)
        products = torch.einsum("nsw,qtw->qnst", train_steps, test_steps)
        products = products * batch.shares[wanted][None, :, None, None]
        q, _, s, t = products.shape
        if self._sums is None:
            self._sums = products.new_zeros(q, len(self._positions), s, t)
        deeper = s - self._sums.shape[2]
        self._sums = F.pad(self._sums, (0, 0, 0, max(0, deeper)))
        products = F.pad(products, (0, 0, 0, max(0, -deeper)))
        for place, position in enumerate(batch.positions[wanted].tolist()):
            columns = (self._positions == position).nonzero().flatten()
            self._sums[:, columns] -= products[:, place : place + 1]

    def result(self) -> Tensor:
        """Return the matrices ``(q, n, s, t)``."""
        assert self._sums is not None, "no update was added"
        return self._sums
