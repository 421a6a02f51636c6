"""The k best train examples of each test example: by what they are ranked, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.features import Columns


@dataclass(frozen=True)
class Ranking:
    """Which train examples are the best ones."""

    k: int
    """How many; clipped to n."""
    proponents: bool
    """The highest scores first; False: the lowest."""
    column: int = Columns.TOTAL
    """The column of the scores that they are ranked by."""

    def column_of(self, values: Tensor) -> Tensor:
        """Return what ``(..., b)`` is ranked by, zero where a checkpoint runs fewer steps than the column's."""
        if self.column < values.shape[-1]:
            return values[..., self.column]
        return torch.zeros_like(values[..., 0])

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Pick the k best columns of each row; of equal ones the first.

        Args:
            scores: ``(q, n)``.

        Returns:
            Their indices and scores, ``(q, k)`` each, best first.

        Example:
            >>> Ranking(k=2, proponents=True).best(torch.tensor([[1.0, 3.0, 3.0]]))[0]
            tensor([[1, 2]])
        """
        values, indices = torch.sort(scores, dim=1, descending=self.proponents, stable=True)
        return indices[:, : self.k], values[:, : self.k]

    def check_column(self, n_columns: int) -> None:
        """Refuse to rank by a loop step that the test side does not run.

        Raises:
            ValueError: If the column is beyond the deepest test example's last step.
        """
        if self.column >= n_columns:
            rank_by, n_steps = Columns.n_steps(self.column), Columns.n_steps(n_columns)
            raise ValueError(f"rank_by={rank_by}, but the test side runs {n_steps} loop steps (0-based).")


class RunningBest:
    """The k best train examples of each test example so far, each with what is known about the pair."""

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._kept: list[Tensor] | None = None

    def add(self, positions: Tensor, ranked: Tensor, *payloads: Tensor) -> None:
        """Offer a block of train examples.

        Args:
            positions: ``(n,)``, or ``(q, n)`` where they differ, their positions, higher than those offered before.
            ranked: ``(q, n)`` what they are ranked by.
            *payloads: ``(q, n, ...)`` what is kept with each pair.
        """
        offered = [positions.to(ranked.device).expand(ranked.shape), ranked, *payloads]
        if self._kept is not None:
            offered = self._contenders(self._kept[1], offered)
            offered = [torch.cat(pair, dim=1) for pair in zip(self._kept, offered, strict=True)]
        order, _ = self._ranking.best(offered[1])
        self._kept = [gather_pairs(tensor, order) for tensor in offered]

    def _contenders(self, best: Tensor, offered: list[Tensor]) -> list[Tensor]:
        """Leave out the examples that beat nobody: nearly all of them, after a while, and sorting is slow."""
        if best.shape[1] < self._ranking.k:
            return offered
        ranked, worst = offered[1], best[:, -1:]
        beats = ranked > worst if self._ranking.proponents else ranked < worst
        columns = beats.any(0).nonzero().flatten()
        return [tensor.index_select(1, columns) for tensor in offered]

    def result(self) -> list[Tensor]:
        """Return ``indices (q, k)``, what they were ranked by ``(q, k)``, and the payloads ``(q, k, ...)``."""
        assert self._kept is not None, "no block was added"
        return self._kept


def pick_winners(
    indices: Tensor,
    positions: Tensor,
    values: Tensor,
) -> Tensor:
    """Pick the winners' scores from a block's.

    Args:
        indices: ``(q, k)`` the winners' positions.
        positions: ``(n,)`` the block's.
        values: ``(q, n, b)``.

    Returns:
        ``(q, k, b)``, zero where the winner is not in this block.
    """
    hits = indices.unsqueeze(-1) == positions.to(indices.device)  # (q, k, n)
    picked = gather_pairs(values, hits.int().argmax(-1))
    return picked * hits.any(-1).unsqueeze(-1)


def gather_pairs(tensor: Tensor, order: Tensor) -> Tensor:
    """Return ``(q, n, ...)`` at the columns ``(q, k)`` of each row."""
    trailing_shape = tensor.shape[2:]
    ones = [1 for _ in trailing_shape]
    index = order.reshape(*order.shape, *ones)
    index = index.expand(*order.shape, *trailing_shape)
    return tensor.gather(1, index)
