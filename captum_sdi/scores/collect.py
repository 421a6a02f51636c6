"""Contractions of step features into influence, its standard errors, and `StepInfluence`, the result.

With g the step-summed features of a training example and φ_t those of a test example at loop step t, a trajectory
point is SDI_t = ⟨g, φ_t⟩. Sketched features carry their own error bar (Pham & Pagh 2013, section 4; measured in
``tests/test_errors.py``): with one row of features per parameter l,

    Var[⟨g, φ⟩] = Σ_l noise_l · (‖g_l‖² ‖φ_l‖² + ⟨g_l, φ_l⟩²)

where ``noise_l`` is 1/d for a sketched parameter and 0 for one that is kept exactly. A row in m parts counts as m
parameters of d/m numbers each: gradients that lie in one part have m times the variance of those spread over all. Steps
share their hashes, so the variance of a sum over steps is this formula at the summed φ; checkpoints do not, so their
variances add (with η²).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.features import Columns
from captum_sdi.scores.result import StepInfluence


class Running:
    """Sums over checkpoints of blocks of scores, one block per batch, which may differ in depth.

    Args:
        axis: The axis along which the blocks follow each other.
    """

    def __init__(self, axis: int = 1) -> None:
        self._axis = axis
        self._blocks: list[Tensor] = []

    def add(self, i: int, block: Tensor) -> None:
        """Adds to the i-th block.

        Args:
            i: Number of the batch.
            block: Its scores.
        """
        if i == len(self._blocks):
            self._blocks.append(block)
        else:
            self._blocks[i] = torch.stack(_equally_large([self._blocks[i], block])).sum(0)

    def result(self) -> Tensor:
        """All blocks together."""
        return (
            torch.cat(_equally_large(self._blocks, self._axis), dim=self._axis) if self._blocks else torch.empty(1, 0)
        )


def _equally_large(blocks: list[Tensor], but: int | None = None) -> list[Tensor]:
    """Zeros behind the shallower ones, along every axis but one."""
    sizes = [max(along) for along in zip(*(block.shape for block in blocks), strict=True)]

    def missing(block: Tensor) -> list[int]:  # from the last axis to the first, before and behind, as F.pad wants them
        axes = reversed(range(block.ndim))
        return [n for axis in axes for n in (0, 0 if axis == but else sizes[axis] - block.shape[axis])]

    return [F.pad(block, missing(block)) for block in blocks]


class TopK:
    """The k best training examples of each test example so far, each with what is known about the pair.

    Args:
        k: How many.
        proponents: The highest influences; False: the lowest.
    """

    def __init__(self, k: int, proponents: bool) -> None:
        self._k, self._proponents = k, proponents
        self._kept: list[Tensor] | None = None

    def add(self, positions: Tensor, ranked: Tensor, *payloads: Tensor) -> None:
        """Offers a batch of training examples.

        Args:
            positions: ``(n,)``, or ``(q, n)`` where they differ, their positions, higher than those offered before.
            ranked: ``(q, n)`` what they are ranked by.
            *payloads: ``(q, n, ...)`` what is kept with each pair.
        """
        new = [positions.to(ranked.device).expand(ranked.shape), ranked, *payloads]
        if self._kept is not None:
            new = self._contenders(new)
            new = [torch.cat(pair, dim=1) for pair in zip(self._kept, new, strict=True)]
        order, _ = top_k(new[1], self._k, self._proponents)
        self._kept = [_picked(tensor, order) for tensor in new]

    def _contenders(self, new: list[Tensor]) -> list[Tensor]:
        """Without the examples that beat nobody: nearly all of them, after a while, and sorting is slow."""
        assert self._kept is not None
        best, ranked = self._kept[1], new[1]
        if best.shape[1] < self._k:
            return new
        better = ranked > best[:, -1:] if self._proponents else ranked < best[:, -1:]
        columns = better.any(0).nonzero().flatten()
        return [tensor.index_select(1, columns) for tensor in new]

    def result(self) -> list[Tensor]:
        """``indices (q, k)``, what they were ranked by ``(q, k)``, and the payloads ``(q, k, ...)``."""
        assert self._kept is not None
        return self._kept


def top_k(scores: Tensor, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
    """The k best columns of each row; of equal ones the first.

    Args:
        scores: ``(q, n)``.
        k: How many; clipped to n.
        proponents: The highest; False: the lowest.

    Returns:
        Indices and scores, ``(q, k)`` each, best first.

    Example:
        >>> top_k(torch.tensor([[1.0, 3.0, 3.0]]), 2, proponents=True)[0]
        tensor([[1, 2]])
    """
    values, indices = torch.sort(scores, dim=1, descending=proponents, stable=True)
    return indices[:, :k], values[:, :k]


def pick_winners(indices: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Of a batch's scores those that belong to winners.

    Args:
        indices: ``(q, k)`` the winners' positions.
        positions: ``(n,)`` the batch's.
        values: ``(q, n, b)``.

    Returns:
        ``(q, k, b)``, zero where the winner is not in this batch.
    """
    hits = indices.unsqueeze(-1) == positions.to(indices.device)  # (q, k, n)
    picked = _picked(values, hits.int().argmax(-1))
    return picked * hits.any(-1).unsqueeze(-1)


def step_influence(indices: Tensor | None, values: Tensor, variances: Tensor, n_steps: Tensor) -> StepInfluence:
    """Takes summed scores apart.

    Args:
        indices: ``(q, k)`` or None.
        values: ``(..., 3 + t)``: total, prelude, coda, steps.
        variances: As ``values``.
        n_steps: ``(q,)``.

    Returns:
        The result.
    """
    errors = variances.clamp(min=0).sqrt()
    return StepInfluence(
        indices=indices,
        influence_scores=values[..., 0],
        trajectories=Columns.steps(values),
        prelude=values[..., Columns.PRELUDE],
        coda=values[..., Columns.CODA],
        n_steps=n_steps.to(values.device),
        score_errors=errors[..., 0],
        trajectory_errors=Columns.steps(errors),
    )


def _picked(tensor: Tensor, order: Tensor) -> Tensor:
    """``(q, n, ...)`` at ``(q, k)``."""
    index = order.reshape(*order.shape, *(1,) * (tensor.ndim - 2)).expand(*order.shape, *tensor.shape[2:])
    return tensor.gather(1, index)
