"""`Hessian`: the damped inverse of the training loss's Hessian, by its largest curvatures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from captum_sdi.borrow import requiring_grad
from captum_sdi.features import StepFeatures, canonical_name
from captum_sdi.index.identity import described
from captum_sdi.index.weights import WeightHashes
from captum_sdi.preconditioners.arguments import check_count, check_damping
from captum_sdi.preconditioners.lanczos import ritz_pairs
from captum_sdi.preconditioners.shelf import Tensors, scratch
from captum_sdi.weighted_loss import BatchLoss, check_second_derivative

if TYPE_CHECKING:
    from captum_sdi.passes import Point
    from captum_sdi.preconditioners.base import Fitted
    from captum_sdi.train_side import Content, TrainSide


@dataclass(frozen=True)
class Hessian:
    """P = (H₊ + λ)⁻¹ / n with H₊ the positive part of the Hessian of the mean training loss, at the last checkpoint.

    A score is the rise of the test loss to be expected where training had gone without the example, to first order
    (Koh & Liang 2017): (1/n) φᵀ (H₊ + λ)⁻¹ g. With the Ritz values l > 0 and vectors V of a Lanczos run (`ritz_pairs`),

        P = (1 - V diag(l / (l + λ)) Vᵀ) / (λ n)

    treats what no vector spans, and negative curvature, as flat. P is one linear map for every question and loop step,
    so that every split, the matrix, top k and an index of any sketch work unchanged. It couples all parameters that
    count: ``layers=None`` is recommended, ``"loop"`` holds what is outside the loop fixed. The start is random,
    from a fixed seed: at a rank far below the number of parameters another start would give somewhat other scores.

    No record of training is needed. Only the last checkpoint is loaded, and learning rates do not enter. It costs rank
    products with H, each a pass over the train set of some four gradients' time, once: the vectors, rank x parameters,
    are kept in memory, and beside an index on disk.

    Test gradients are formed exactly, then sketched. Standard errors are those of P φ and cover 94% to 99% of the exact
    scores where 95% were meant (``benchmarks/preconditioner_errors.py``). They are wider than without P: totals of 64
    numbers a parameter correlate .95 with exact ones, of 1024 1.00.

    Args:
        rank: How many Lanczos vectors; at most the number of parameters that count.
        damping: λ in units of the largest Ritz value.
        examples: How many train examples H is the mean of, spaced evenly over the train set; None: all.
        on_disk: Keep the vectors in a file from the start, in the index's folder or the system's temporary one, where
            rank x parameters does not fit into memory.

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is not positive.

    Example:
        >>> from captum_sdi import SDIInfluence
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> model = LoopedGPTForCausalLM(config)
        >>> sdi = SDIInfluence(model, train, batch_size=4, layers=None, preconditioner=Hessian(rank=4))
        >>> sdi.step_influence(test).trajectories.shape  # (q, n, t)
        torch.Size([2, 10, 3])
    """

    rank: int = 80
    damping: float = 3e-3
    examples: int | None = None
    on_disk: bool = False

    acts_on: ClassVar[Literal["whole"]] = "whole"
    sums: ClassVar[Literal["last"]] = "last"

    def __post_init__(self) -> None:
        check_count(self, "rank", self.rank)
        check_damping(self, self.damping)
        if self.examples is not None:
            check_count(self, "examples", self.examples)

    def fit(self, point: Point, train: TrainSide) -> Fitted:
        """Return the map at one checkpoint."""
        size = sum(parameter.numel() for parameter in point.capture.targets().values())
        if self.rank > size:
            raise ValueError(f"Hessian(rank={self.rank}) is more than the {size} entries of the parameters that count.")
        content = train.content(point)
        identity = self._identity(point, train, content)
        tensors = train.shelf.tensors("hessian", identity, lambda: self.curvatures(point, train, content.n_examples))
        values, vectors = tensors["values"], tensors["vectors"]
        largest = float(values.max())
        if not largest > 0:
            raise ValueError(
                f"The training loss curves nowhere upwards at {point.checkpoint.name!r}: the largest Ritz value is "
                f"{largest:.3g}. Hessian() needs a model that was trained on train_dataset; Fisher() does not."
            )
        shift = self.damping * largest

        def apply(features: StepFeatures) -> StepFeatures:
            rows = deflated(features.rows, values.clamp(min=0), vectors, shift)
            scaled = {name: row / content.n_examples for name, row in rows.items()}
            return StepFeatures(scaled, features.noise, features.n_steps)

        return apply

    def _identity(
        self,
        point: Point,
        train: TrainSide,
        content: Content,
    ) -> dict[str, Any]:
        """Return what the Ritz pairs depend on."""
        shapes = {}
        for name, parameter in point.capture.targets().items():
            shapes[canonical_name(name)] = [str(parameter.dtype), *parameter.shape]
        side = train.examples.side
        return {
            "captum_sdi": version("captum-sdi"),
            "weights": WeightHashes().of_model(point.model),
            "parameters": shapes,
            "loss": described(side.loss_fn),
            "forward_kwargs": described(side.forward_kwargs),
            "train set": list(content),
            "rank": self.rank,
            "examples": self.examples,
        }

    def curvatures(self, point: Point, train: TrainSide, n_examples: int) -> Tensors:
        """Run Lanczos on the Hessian of the mean loss over so many train examples.

        Returns:
            ``values`` l and ``vectors`` V of `ritz_pairs`.
        """
        chosen, n_batches = None, train.examples.n_batches
        if self.examples is not None and self.examples < n_examples:
            chosen, n_batches = evenly_spaced(self.examples, n_examples), None
        # The hooks freeze every parameter: those that count are what the loss is a function of.
        with requiring_grad(point.capture.tape.targets):
            loss = BatchLoss(point.model, train.examples.side)
        vector = loss.layout.flat(point.capture.targets())
        shape = (self.rank, loss.layout.size)
        if self.on_disk:
            basis = scratch(shape, vector.dtype, train.shelf.folder)
        else:
            basis = vector.new_empty(shape)
        n_updates = None if n_batches is None else self.rank * n_batches
        purpose = f"find curvatures at {point.checkpoint.name}"
        with train.progress.bar(purpose, n_updates) as bar:
            product = HessianProduct(point, train, loss, vector, chosen, bar)
            values = ritz_pairs(product, basis, torch.Generator().manual_seed(0))
        return {"values": values, "vectors": basis}


class HessianProduct:
    """The product of the Hessian of the mean loss over train examples with a vector: a pass over these.

    Args:
        point: The model.
        train: The train side.
        loss: The losses of a batch.
        vector: ``(size,)`` the parameters.
        chosen: Positions of the train examples; None: all.
        bar: Updated with every batch.
    """

    def __init__(
        self,
        point: Point,
        train: TrainSide,
        loss: BatchLoss,
        vector: Tensor,
        chosen: Tensor | None,
        bar: Any,
    ) -> None:
        self._point, self._train, self._loss, self._chosen, self._bar = point, train, loss, chosen, bar
        self._vector = vector.requires_grad_()
        self._is_checked = False

    def __call__(self, direction: Tensor) -> Tensor:
        """Multiply a direction ``(size,)``.

        Returns:
            ``(size,)``.

        Raises:
            ValueError: If the product is not finite.
        """
        direction = direction.to(self._vector)
        product = torch.zeros_like(direction)
        n_examples = 0
        for positions, raw in self._train.examples.batches(self._chosen):
            with torch.enable_grad():
                summed_loss = self._losses(positions.tolist(), raw).sum()
                (gradient,) = torch.autograd.grad(summed_loss, self._vector, create_graph=True)
                if not self._is_checked:
                    check_second_derivative(gradient, self._vector)
                    self._is_checked = True
                (curved,) = torch.autograd.grad(gradient, self._vector, direction)
            product += curved
            n_examples += len(positions)
            self._bar.update()
        if not product.isfinite().all():
            raise ValueError(f"The Hessian is not finite at checkpoint {self._point.checkpoint.name!r}.")
        return product / n_examples

    def _losses(self, positions: list[int], raw: Any) -> Tensor:
        """Compute the losses ``(n,)`` of a batch that has been rehearsed."""
        capture, rehearsal, side = self._point.capture, self._point.rehearsal, self._loss.side
        rehearsal.before_batch(capture, raw, side, positions)
        losses = self._loss(self._vector, raw, hands_labels=capture.hands_labels(side))
        if rehearsal.answered(side, positions, losses):
            losses = self._loss(self._vector, raw, hands_labels=True)
        return losses


def evenly_spaced(count: int, n_examples: int) -> Tensor:
    """Choose positions all over a train set.

    Returns:
        ``(count,)``.

    Example:
        >>> evenly_spaced(3, 10)
        tensor([1, 5, 8])
    """
    return ((torch.arange(count) + 0.5) * n_examples / count).long()


def deflated(
    rows: dict[str, Tensor],
    values: Tensor,
    vectors: Tensor,
    shift: float,
) -> dict[str, Tensor]:
    """Apply (1 - V diag(l / (l + λ)) Vᵀ) / λ to exact rows of all parameters, one parameter at a time.

    Args:
        rows: ``(q, b, entries)`` for each parameter, in the order of the vectors' entries.
        values: l, ``(rank,)``, none negative.
        vectors: V, ``(rank, size)``.
        shift: λ.

    Returns:
        Rows of the same shapes.
    """
    sizes = [row.shape[-1] for row in rows.values()]
    pieces = dict(zip(rows, vectors.split(sizes, dim=1), strict=True))
    coefficients: Any = 0
    for name, row in rows.items():
        coefficients = coefficients + row @ pieces[name].to(row).T
    shrunk = coefficients * (values / (values + shift)).to(coefficients)
    results = {}
    for name, row in rows.items():
        results[name] = (row - shrunk @ pieces[name].to(row)) / shift
    return results
