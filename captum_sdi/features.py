"""The vocabulary: a loop, its bins, gradients, and the step features of examples. No hooks, no models.

The features of an example are, for each targeted parameter, a row of numbers for the part φ of its gradient that
flowed through the parameter's uses before the loop, after it, and at each loop step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# --- the loop and its bins ---


@dataclass(frozen=True)
class LoopSpec:
    """Which modules are the loop, and whose call starts a loop step.

    Args:
        modules: Names of the modules that repeat. Containers that are never called themselves (`torch.nn.ModuleList`)
            count for what they hold.
        anchors: Names of the modules whose call starts a new step, among them or not; empty: the first of ``modules``
            that is called. Several anchors share one timeline.

    Raises:
        TypeError: If a field is not a sequence of names.
        ValueError: If no module is named.

    Example:
        >>> LoopSpec(modules=("core",), anchors=("core",)).modules
        ('core',)
    """

    modules: tuple[str, ...]
    anchors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("modules", "anchors"):
            names = getattr(self, field)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"LoopSpec({field}=...) must be a tuple of module names, got {names!r}.")
            object.__setattr__(self, field, tuple(names))
        if not self.modules:
            raise ValueError("LoopSpec(modules=()) names no module; name the block that repeats, or pass loop=None.")


class Bins:
    """The parts that a parameter's uses fall into, along one axis: ``[prelude, coda, step 0, step 1, ...]``.

    Steps come last, so that a deeper batch only adds to the end.

    Example:
        >>> Bins.of_step(0), Bins.count(n_steps=3)
        (2, 5)
    """

    PRELUDE = 0
    """Uses before the first loop step."""
    CODA = 1
    """Uses after the last loop step."""
    _FIRST_STEP = 2

    @classmethod
    def of_step(cls, step: int) -> int:
        """Return the bin of a 0-based loop step."""
        return cls._FIRST_STEP + step

    @classmethod
    def count(cls, n_steps: int) -> int:
        """Return how many bins a loop of that many steps has."""
        return cls._FIRST_STEP + n_steps

    @classmethod
    def steps(cls, rows: Tensor) -> Tensor:
        """Return the loop steps ``(n, t, width)`` of rows ``(n, b, width)``."""
        return rows[:, cls._FIRST_STEP :]


class Columns:
    """The last axis of scores: ``[total, prelude, coda, step 0, step 1, ...]``, the bins behind their sum.

    Example:
        >>> Columns.of_step(0), Columns.n_steps(count=6)
        (3, 3)
    """

    TOTAL = 0
    """The sum of all bins: the influence of the whole gradient."""
    PRELUDE = 1 + Bins.PRELUDE
    CODA = 1 + Bins.CODA
    _FIRST_STEP = 3

    @classmethod
    def of_step(cls, step: int) -> int:
        """Return the column of a 0-based loop step."""
        return cls._FIRST_STEP + step

    @classmethod
    def n_steps(cls, count: int) -> int:
        """Return how many loop steps that many columns hold."""
        return count - cls._FIRST_STEP

    @classmethod
    def steps(cls, scores: Tensor, axis: int = -1) -> Tensor:
        """Return the loop steps ``(..., t)`` of scores ``(..., b)``."""
        n_steps = cls.n_steps(scores.shape[axis])
        return scores.narrow(axis, cls._FIRST_STEP, n_steps)


# --- gradients ---


def canonical_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` and data-parallel wrappers put into it.

    Example:
        >>> canonical_name("module._orig_mod.core.fc.weight")
        'core.fc.weight'
    """
    return name.replace("_orig_mod.", "").removeprefix("module.")


@dataclass(frozen=True)
class Outer:
    """A gradient given by its factors: G[r, c] = Σ_p rows[p, r] · cols[p, c] for each example.

    Integer ``rows`` of shape ``(n, p)`` stand for one-hot vectors (token ids of an embedding), which are never formed.
    """

    rows: Tensor
    """``(n, p, r)`` floating point, or ``(n, p)`` integer indices; ``r`` is the parameter's first axis."""
    cols: Tensor
    """``(n, p, c)``; ``c`` is the parameter's second axis."""

    def entries(self, shape: Sequence[int]) -> Tensor:
        """Form the gradient.

        Args:
            shape: The parameter's.

        Returns:
            ``(n, *shape)``.

        Example:
            >>> Outer(rows=torch.ones(1, 2, 3), cols=torch.ones(1, 2, 4)).entries((3, 4)).sum()
            tensor(24.)
        """
        n = len(self.cols)
        if self.rows.is_floating_point():
            return torch.einsum("npr,npc->nrc", self.rows, self.cols).reshape(n, *shape)
        width = self.cols.shape[-1]
        entries = self.cols.new_zeros(n * shape[0], width)
        first_rows = shape[0] * torch.arange(n, device=self.rows.device).unsqueeze(1)  # of each example's block
        places = (self.rows + first_rows).flatten()
        # Not index_add_, which rounds differently each time on a GPU.
        entries.index_put_((places,), self.cols.flatten(0, 1), accumulate=True)
        return entries.view(n, *shape)


@dataclass(frozen=True)
class Dense:
    """A gradient given entry by entry."""

    grads: Tensor
    """``(n, *parameter.shape)``."""

    def entries(self, shape: Sequence[int]) -> Tensor:
        """Return the gradient ``(n, *shape)``."""
        return self.grads.reshape(len(self.grads), *shape)


Gradient = Outer | Dense


@dataclass(frozen=True)
class Noise:
    """How far inner products of a sketch's rows may be from exact ones: see `captum_sdi.scores.contract`."""

    variance: float
    """Of ⟨Pg, Pφ⟩ in units of ‖g‖²‖φ‖² + ⟨g,φ⟩², for one part: 0 when the map is exact."""
    parts: int = 1
    """Equal slices of a row, each of which sketches a share of the entries on its own; their variances add up."""


# --- features ---

POOLED = ""
"""The name of the one row that all parameters share with ``TensorSketch(pool=True)``."""


@dataclass(frozen=True)
class StepFeatures:
    """Step features of n examples (or, kept per token, of n × p token positions)."""

    rows: dict[str, Tensor]
    """By parameter ``(n, b, width)``: one row of numbers for each bin b."""
    noise: dict[str, Noise]
    """By parameter, that of its sketch."""
    n_steps: Tensor
    """``(n,)`` how many loop steps each example's batch ran."""

    @property
    def size(self) -> int:
        """The number of examples n."""
        return len(self.n_steps)

    def map(self, change: Callable[[Tensor], Tensor], n_steps: Tensor | None = None) -> StepFeatures:
        """Return features with every parameter's rows changed.

        Args:
            change: Applied to each ``(n, b, width)``.
            n_steps: The new depths; None keeps them.
        """
        rows = {name: change(row) for name, row in self.rows.items()}
        return StepFeatures(rows, self.noise, self.n_steps if n_steps is None else n_steps)

    def only(self, names: Collection[str]) -> StepFeatures:
        """Return the features of some parameters alone, in the order they have here."""
        rows = {name: row for name, row in self.rows.items() if name in names}
        noise = {name: self.noise[name] for name in rows}
        return StepFeatures(rows, noise, self.n_steps)

    def summed(self) -> StepFeatures:
        """Sum over all bins: one bin is left, the whole gradient."""
        return self.map(lambda row: row.sum(1, keepdim=True))

    def norms(self) -> Tensor:
        """Return the norm of each bin's features over all parameters, ``(n, b)``.

        Example:
            >>> rows = {"weight": torch.tensor([[[3.0], [0.0]]]), "bias": torch.tensor([[[4.0], [2.0]]])}
            >>> StepFeatures(rows, noise={}, n_steps=torch.tensor([0])).norms()
            tensor([[5., 2.]])
        """
        squares = [row.square().sum(-1) for row in self.rows.values()]
        device = squares[0].device
        return torch.stack([square.to(device) for square in squares]).sum(0).sqrt()

    def unit(self) -> StepFeatures:
        """Divide every example by the norm of its whole gradient, over all parameters; a zero gradient stays zero."""
        return self.scaled(self.inverse_norms())

    def inverse_norms(self) -> Tensor:
        """Return one over the norm of each example's whole gradient, over all parameters ``(n,)``; zero of zero."""
        norms = self.summed().norms().squeeze(1)
        return torch.where(norms > 0, 1 / norms, 0)

    def scaled(self, scales: Tensor) -> StepFeatures:
        """Multiply every example by a number of its own, ``(n,)``."""
        return self.map(lambda row: row * scales.to(row)[:, None, None])

    def aggregated(self) -> StepFeatures:
        """Sum over the examples: one is left, as deep as the deepest."""
        return self.map(lambda row: row.sum(0, keepdim=True), self.n_steps.amax().reshape(1))

    def with_total(self) -> StepFeatures:
        """Put the sum of all bins in front of them: a total and its variance come from the summed φ.

        Returns:
            ``(n, 1 + b, width)`` for each parameter, in the order of `Columns`; unchanged when there is one bin, which
            is the total already.
        """
        if all(row.shape[1] == 1 for row in self.rows.values()):
            return self
        return self.map(lambda row: torch.cat([row.sum(1, keepdim=True), row], dim=1))


def concatenate(batches: Sequence[StepFeatures]) -> StepFeatures:
    """Join features of several batches, shallower ones padded with zero steps to the deepest.

    Args:
        batches: At least one.

    Returns:
        Features of all examples in order.
    """
    first = batches[0]
    first_rows = [next(iter(batch.rows.values())) for batch in batches]
    deepest = max(row.shape[1] for row in first_rows)
    padded = [batch.map(lambda row: F.pad(row, (0, 0, 0, deepest - row.shape[1]))) for batch in batches]
    rows = {}
    for name in first.rows:
        rows[name] = torch.cat([batch.rows[name] for batch in padded])
    return StepFeatures(rows, first.noise, torch.cat([batch.n_steps for batch in batches]))


def join(batches: Iterable[StepFeatures], *, aggregate: bool = False) -> StepFeatures:
    """Join features of consecutive batches, or add them up, one batch at a time in memory.

    Args:
        batches: At least one.
        aggregate: Sum over the examples.

    Returns:
        The features of all examples, or of their sum.
    """
    if not aggregate:
        return concatenate(list(batches))
    remaining = iter(batches)
    total = next(remaining).aggregated()
    for batch in remaining:
        total = concatenate([total, batch]).aggregated()
    return total
