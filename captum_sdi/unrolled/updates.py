"""The updates of a run as functions of the parameters: gradients, steps, and products with the Hessian.

Update k takes ``h = Σ_i a_i w_i ∇l_i(θ)`` over its examples, with all weights w = 1 in the run that was; clips it;
and hands it to the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_sdi.borrow import evaluating, preserved
from captum_sdi.data.batch import batch_size, plain_batch
from captum_sdi.data.losses import check_gradient
from captum_sdi.data.order import is_indexed, other_rows, rows_at
from captum_sdi.data.side import Side
from captum_sdi.model_lock import exclusive
from captum_sdi.unrolled.clipping import clipped
from captum_sdi.unrolled.optimizers import State, UpdateSettings, decays
from captum_sdi.unrolled.run import TrainingRun
from captum_sdi.weighted_loss import BatchLoss, check_second_derivative, example_shares, target_counts


class TrainRows:
    """The rows of a train set by position, collated into batches.

    Args:
        loader: A loader of a dataset in its own order.

    Raises:
        TypeError: If its examples cannot be read by position.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if not is_indexed(loader):
            raise TypeError(
                "train_dataset must be a Dataset with a row at every position: a run names its examples by position."
            )
        self._dataset: Any = loader.dataset
        self._collate: Any = loader.collate_fn

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, positions: list[int], number: int) -> Any:
        """Collate the rows at some positions into the batch of an update."""
        raw = plain_batch(self._collate(rows_at(self._dataset, positions)))
        if batch_size(raw) != len(positions):
            raise ValueError(other_rows("train_dataset", number, len(positions), batch_size(raw)))
        return raw


@dataclass(frozen=True)
class MicroBatch:
    """Examples that ran through the model at once."""

    positions: Tensor
    """``(n,)`` in the train set."""
    raw: Any
    shares: Tensor
    """``(n,)`` how much of each example's loss is in the update's."""
    random_state: Tensor | None


class Updates:
    """The updates of one run.

    Args:
        loss: The training loss of the model.
        rows: The train set.
        run: The run.

    Raises:
        ValueError: If the run names examples that are not there, or parameters without decay.
    """

    def __init__(self, loss: BatchLoss, rows: TrainRows, run: TrainingRun) -> None:
        if run.n_examples > len(rows):
            raise ValueError(
                f"The run names example {run.n_examples - 1}, but train_dataset has {len(rows)}: pass the dataset "
                "that the run was trained on."
            )
        self.loss, self.rows, self.run = loss, rows, run
        layout = loss.layout
        like = torch.zeros((), dtype=layout.dtype, device=layout.device)
        self._decay = decays(run.optimizer, dict(layout.shapes), like)
        self._is_curvature_checked = False

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Borrow the model, in the mode that it was trained in as far as that matters."""
        model = self.loss.model
        with torch.inference_mode(mode=False), exclusive(model), preserved(model, weights=False), evaluating(model):
            if self.run.random_states is not None:
                check_statistics(model)
                model.train()
            yield

    def settings(self, update: int) -> UpdateSettings:
        """Return what is particular to one update (0-based)."""
        return UpdateSettings(update + 1, self.run.rates[update], self._decay)

    def micro_batches(self, update: int) -> list[MicroBatch]:
        """Read the examples of one update (0-based)."""
        chunks = self.run.micro_batches(update)
        raws = [self.rows.batch(positions, update) for positions in chunks]
        shares = update_shares(raws, self.loss.side, self.run)
        batches = []
        for number, raw in enumerate(raws):
            positions = torch.tensor(chunks[number])
            own_shares = shares[number].to(self.loss.layout.device, self.loss.layout.dtype)
            batches.append(MicroBatch(positions, raw, own_shares, self.run.random_state(update, number)))
        return batches

    def graph(
        self,
        vector: Tensor,
        batch: MicroBatch,
        weights: Tensor | None = None,
        *,
        differentiable: bool = False,
    ) -> GradientGraph:
        """Compute the gradient of one micro-batch's part of the loss.

        Args:
            vector: ``(size,)`` the parameters.
            batch: The examples.
            weights: ``(n,)`` of all train examples; None: 1 each.
            differentiable: Keep what a second derivative needs.

        Returns:
            The gradient.
        """
        if batch.random_state is not None:
            set_random_state(batch.random_state, vector.device)
        leaf = vector.detach().clone().requires_grad_()
        own_weights = torch.ones_like(batch.shares) if weights is None else weights[batch.positions].to(batch.shares)
        own_weights.requires_grad_(differentiable)
        losses = self.loss(leaf, batch.raw)
        check_gradient(losses, self.loss.side.argument)
        total = (batch.shares * own_weights * losses.to(batch.shares)).sum()
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=differentiable)
        if differentiable and not self._is_curvature_checked:
            check_second_derivative(gradient, leaf)
            self._is_curvature_checked = True
        return GradientGraph(gradient, leaf, own_weights)

    def gradient(
        self,
        vector: Tensor,
        update: int,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the gradient ``(size,)`` of one update's loss, not clipped yet."""
        gradients = [self.graph(vector, batch, weights).gradient for batch in self.micro_batches(update)]
        return torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]

    def step(self, state: State, update: int, weights: Tensor | None = None) -> State:
        """Return the state after one update.

        Returns:
            The state.

        Raises:
            ValueError: If it is not finite.
        """
        gradient = self.gradient(state[0], update, weights)
        gradient = clipped(gradient, self.run.max_grad_norm)
        stepped = self.run.optimizer.step(state, gradient, self.settings(update))
        if not stepped[0].isfinite().all():
            raise ValueError(f"The replay diverged: parameters are not finite after update {update + 1}.")
        return stepped


@dataclass(frozen=True)
class GradientGraph:
    """A gradient, and what it can be differentiated in."""

    gradient: Tensor
    """``(size,)``."""
    vector: Tensor
    """``(size,)`` the parameters."""
    weights: Tensor
    """``(n,)`` the examples'."""

    def products(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one double backward pass for all directions c.

        Args:
            directions: ``(seeds, size)``.

        Returns:
            H c ``(seeds, size)``, and how the seeds change with the examples' weights, ``a_i ⟨∇l_i, c⟩``
            ``(seeds, n)``.
        """
        curved, by_example = torch.autograd.grad(
            self.gradient,
            [self.vector, self.weights],
            directions,
            is_grads_batched=True,
            retain_graph=True,
            materialize_grads=True,
        )
        curved = curved.expand(directions.shape)  # zeros for one seed where the loss is linear in every parameter
        return curved, by_example


def update_shares(raws: Sequence[Any], side: Side, run: TrainingRun) -> list[Tensor]:
    """Return how much of each example's loss is in the loss of its update.

    Args:
        raws: The micro-batches of the update.
        side: How their losses are computed.
        run: Says what the reduction is over.

    Returns:
        ``(n,)`` for each micro-batch, float64.
    """
    if run.reduced_over == "micro_batch" or run.reduction == "sum":
        n_means = len(raws) if run.reduced_over == "micro_batch" else 1
        return [example_shares(raw, side, run.reduction) / n_means for raw in raws]
    if run.reduction == "tokens":
        amounts = [target_counts(raw, side) for raw in raws]
    else:
        amounts = [torch.ones(batch_size(raw), dtype=torch.float64) for raw in raws]
    total = torch.cat(amounts).sum().clamp(min=1)
    return [amount / total for amount in amounts]


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Set torch's random state on the device that dropout draws on."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def check_statistics(model: nn.Module) -> None:
    """Refuse layers that mix examples and keep statistics while training.

    Raises:
        ValueError: If there is one.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) normalizes over the batch in training: one example's weight "
                "changes the others' losses. Influence through training is not defined for it."
            )
