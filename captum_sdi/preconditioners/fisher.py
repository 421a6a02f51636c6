"""`Fisher`: the inverse of the empirical Fisher, a block for each parameter, where the rows are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from captum_sdi.blocks import Block
from captum_sdi.features import StepFeatures
from captum_sdi.preconditioners.arguments import check_damping

if TYPE_CHECKING:
    from captum_sdi.passes import Point
    from captum_sdi.preconditioners.base import Fitted
    from captum_sdi.preconditioners.shelf import Tensors
    from captum_sdi.train_side import TrainSide

WIDEST = 8192
"""Numbers in a row: its moments are a matrix of WIDEST x WIDEST, half a GiB."""


@dataclass(frozen=True)
class Fisher:
    """P = (F + λ)⁻¹ / n with F the mean of g gᵀ over the train set, a block for each parameter, on sketched rows.

    A score is the rise of the test loss to be expected where training had gone without the example, to first order,
    with the empirical Fisher for the Hessian (Koh & Liang 2017; Park et al. 2023): (1/n) φᵀ (F + λ)⁻¹ g. Learning rates
    do not enter; of several checkpoints the mean is taken, and the last one alone served best where measured.

    Take it for ranks: the rises that it predicts are too large, 50 to 100 times on the beds of ``benchmarks/truth.md``.
    Most of that is a known factor: where an example's loss is a mean over L targets, g gᵀ is about L times below its
    Hessian, in traces 13 and 19 times with 8 targets, 44 times with 32. Divide scores by L where examples are equally
    long and sizes matter. The rest is that examples are fitted better than they would be if they were new.

    It costs one pass over the rows: those of an index, beside which the moments are kept, or else one more pass over
    the train set. Memory is a matrix of d x d for each parameter, never n rows: `TensorSketch` of 512 is enough.

    With a sketch, F is that of the sketched gradients, and scores are nearly those of exact ones (correlation .99 at 64
    numbers a parameter, 1.00 at 1024: ``benchmarks/preconditioner_errors.py``). Standard errors are those of P φ for a
    given P; F draws P φ towards where gradients are small, so that they are 4 to 14 times too wide: an upper bound.

    Args:
        damping: λ, in units of the mean of those eigenvalues of F that can differ from zero, the trace of the block
            by the smaller of n and its width: its mean diagonal, or where examples are fewer that of their Gram matrix.

    Raises:
        TypeError: If ``damping`` is no number.
        ValueError: If it is not positive and finite.

    Example:
        >>> from captum_sdi import SDIInfluence, TensorSketch
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> model, sketch = LoopedGPTForCausalLM(config), TensorSketch(dim=64)
        >>> sdi = SDIInfluence(model, train, batch_size=4, sketch=sketch, preconditioner=Fisher())
        >>> sdi.step_influence(test).trajectories.shape  # (q, n, t)
        torch.Size([2, 10, 3])
    """

    damping: float = 0.1

    acts_on: ClassVar[Literal["row"]] = "row"
    sums: ClassVar[Literal["mean"]] = "mean"

    def __post_init__(self) -> None:
        check_damping(self, self.damping)

    def check_rows(self, features: StepFeatures) -> None:
        """Refuse rows that are too wide.

        Raises:
            ValueError: If a parameter's rows have more than `WIDEST` numbers.
        """
        for name, row in features.rows.items():
            width = row.shape[-1]
            if width > WIDEST:
                raise ValueError(
                    f"Fisher() needs a matrix of {width:,} x {width:,} for {name!r}, whose rows have as many numbers; "
                    f"{WIDEST:,} is the most. Pass a smaller sketch, such as TensorSketch(dim=512), and no rerank=, "
                    "which takes exact gradients; or Hessian(), which takes rows of any width."
                )

    def fit(self, point: Point, train: TrainSide) -> Fitted:
        """Return the map at one checkpoint, from all rows there."""
        self.check_rows(point.capture.blank())
        moments = train.fitted_on_rows("fisher", point, lambda: second_moments(train.blocks(point)))
        n_examples = int(moments["examples"])
        rows = point.capture.blank().rows
        largest = max(mean_eigenvalue(moments[moment_of(name)], n_examples) for name in rows)
        factors = {}
        for name, row in rows.items():
            factors[name] = damped_factor(moments[moment_of(name)], self.damping, n_examples, largest, row.dtype)

        def apply(name: str, row: Tensor) -> Tensor:
            columns = row.flatten(0, 1).to(factors[name]).T
            solved = torch.cholesky_solve(columns, factors[name])
            return (solved.T / n_examples).to(row).reshape(row.shape)

        return apply


def second_moments(blocks: Iterable[Block]) -> Tensors:
    """Average g gᵀ over all examples of a pass.

    Returns:
        ``(width, width)`` float64 for each parameter, under `moment_of` its name, and how many examples there were.
    """
    sums: dict[str, Tensor] = {}
    n_examples = 0
    for block in blocks:
        n_examples += len(block.positions)
        for name, row in block.features.rows.items():
            gradients = row.sum(1).double()
            if name not in sums:
                width = gradients.shape[1]
                sums[name] = gradients.new_zeros(width, width)
            sums[name].addmm_(gradients.T, gradients)
    moments = {"examples": torch.tensor(n_examples)}
    for name, total in sums.items():
        moments[moment_of(name)] = total / n_examples
    return moments


def moment_of(parameter: str) -> str:
    """Name the moments of a parameter's rows."""
    return f"moment of {parameter}"


def mean_eigenvalue(moment: Tensor, n_examples: int) -> float:
    """Average those eigenvalues of F ``(width, width)`` that can differ from zero, as the mean of so many squares."""
    return float(moment.trace()) / min(len(moment), n_examples)


def damped_factor(
    moment: Tensor,
    damping: float,
    n_examples: int,
    largest: float,
    dtype: torch.dtype,
) -> Tensor:
    """Return the lower Cholesky factor of F + λ.

    Args:
        moment: F, ``(width, width)``.
        damping: λ in units of its `mean_eigenvalue`.
        n_examples: How many gradients F is the mean of.
        largest: The largest `mean_eigenvalue` of all parameters.
        dtype: Of the gradients.

    Raises:
        ValueError: If squares of gradients overflow.
    """
    mean = mean_eigenvalue(moment, n_examples)
    if not math.isfinite(mean):
        raise ValueError("Gradients are too large for their squares: Fisher() overflows. Scale the loss down.")
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    rounding = 100 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if mean <= rounding**2 * largest:
        # No example moves this parameter, a bias of attention's keys, say, which softmax cancels: every score has a
        # zero for it, unless P blows rounding errors up.
        return identity * (math.sqrt(largest) or 1.0)
    return torch.linalg.cholesky(moment + damping * mean * identity)
