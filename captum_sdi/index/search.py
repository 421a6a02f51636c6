"""Scoring an index: pieces of it, small enough for the processor's cache, against all test examples at once.

No model is needed, and memory does not grow with the number of train examples. Several processes take blocks in turn;
the results are those of one process, to the last bit where they compute alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_sdi.blocks import ScoredBlock
from captum_sdi.features import StepFeatures
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.processes import Processes
from captum_sdi.index.reader import Reader
from captum_sdi.index.table import BLOCK, RowTable
from captum_sdi.scores.contract import Scores, pair_scores
from captum_sdi.scores.ranking import Ranking, RunningBest

if TYPE_CHECKING:
    from captum_sdi.checkpoints import Checkpoint

_EVEN = 16
"""Rows that a matrix product takes at a time, whatever the processor."""
NUMBERS_AT_ONCE = 2**24
"""Numbers of rows that are held at once where whole trajectories are contracted."""

Contract = Callable[[StepFeatures, StepFeatures], Scores]
"""``(test features, train features)`` to the scores of all pairs, such as `pair_scores`."""


class SearchedCheckpoint(NamedTuple):
    """What is needed of one checkpoint."""

    checkpoint: Checkpoint
    tests: StepFeatures
    """The test examples'."""
    reader: Reader
    """Of the train examples' rows."""


class Search:
    """Test examples beside a complete index.

    Args:
        index: The index.
        processes: Among whom the work is shared.
        checkpoints: The checkpoints, with their learning rates.
        tests: The test examples' features at each checkpoint, from `StepFeatures.with_total`.
        dtype: Of the scores.
        faiss: Finds the top k; None compares every row.
        unit: Divide every train example's row at each checkpoint by its norm.
    """

    def __init__(
        self,
        index: SketchIndex,
        processes: Processes,
        checkpoints: Sequence[Checkpoint],
        tests: Sequence[StepFeatures],
        dtype: torch.dtype,
        faiss: Faiss | None = None,
        *,
        unit: bool = False,
    ) -> None:
        self._index, self._processes, self._faiss = index, processes, faiss
        names = [checkpoint.name for checkpoint in checkpoints]
        self._table = RowTable(index, names, dtype, unit=unit)
        searched = zip(checkpoints, tests, self._table.readers, strict=True)
        self._checkpoints = [SearchedCheckpoint(*fields) for fields in searched]
        first_row = next(iter(tests[0].rows.values()))
        self._dtype, self._device = dtype, first_row.device

    @property
    def n_steps(self) -> Tensor:
        """``(q,)`` how many loop steps each test example ran at most."""
        n_steps = [searched.tests.n_steps for searched in self._checkpoints]
        return torch.stack(n_steps).amax(0)

    # --- the top k ---

    def top(self, ranking: Ranking) -> tuple[Tensor, Tensor]:
        """Find the k best train examples of each test example; of equal ones those with the lowest positions.

        Args:
            ranking: Which are the best; their number is clipped to n.

        Returns:
            Positions and scores, ``(q, k)`` each, best first.
        """
        queries = self._queries(ranking)
        if self._faiss is None:
            return self._scanned(ranking, queries)
        positions, scores = self._searched(self._faiss, ranking, queries)
        return positions.to(self._device), scores.to(self._device, self._dtype)

    def _queries(self, ranking: Ranking) -> list[Tensor]:
        """Return what rows are multiplied by at each checkpoint, ``(q, D)`` times its weight."""
        queries = []
        for searched in self._checkpoints:
            rows = self._index.flat(searched.tests)
            query = ranking.column_of(rows.transpose(1, 2))
            queries.append(searched.checkpoint.weight * query)
        return queries

    def _scanned(self, ranking: Ranking, queries: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compare every row."""
        best = RunningBest(ranking)
        no_scores = queries[0].new_empty(len(queries[0]), 0)
        best.add(torch.empty(0, dtype=torch.long), no_scores)  # a process may have no block at all
        blocks = self._blocks(BLOCK)
        own_blocks = blocks[self._processes.rank :: self._processes.count]
        with torch.autocast(self._device.type, enabled=False):
            for positions in own_blocks:
                scores = self._ranked(queries, positions)
                best.add(_as_tensor(positions), scores)
        return self._merged(ranking, *best.result())

    def _ranked(self, queries: list[Tensor], positions: range) -> Tensor:
        """Sum one number per pair over checkpoints, ``(q, n)``, piece by piece, so that sums come out alike."""
        n_queries, n_examples = len(queries[0]), len(positions)
        scores = torch.zeros(n_queries, n_examples, dtype=self._dtype, device=self._device)
        pieces = _split(positions, self._index.piece)
        for searched, query in zip(self._checkpoints, queries, strict=True):
            for piece in pieces:
                rows = searched.reader.rows(piece).to(self._device)
                columns = scores.narrow(1, piece.start - positions.start, len(piece))
                columns += _products(query, rows)
        return scores

    def _merged(
        self,
        ranking: Ranking,
        positions: Tensor,
        scores: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Pick the best of all processes' best; of equal ones the lowest position."""
        gathered = self._processes.gather((positions.cpu(), scores.cpu()))
        all_positions = [positions for positions, _ in gathered]
        all_scores = [scores for _, scores in gathered]
        positions = torch.cat(all_positions, dim=1).to(self._device)
        scores = torch.cat(all_scores, dim=1).to(self._device)
        order = positions.argsort(dim=1)
        positions = positions.gather(1, order)
        scores = scores.gather(1, order)
        order, scores = ranking.best(scores)
        return positions.gather(1, order), scores

    # --- the top k by FAISS ---

    def _searched(
        self,
        faiss: Faiss,
        ranking: Ranking,
        queries: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Ask FAISS; what it scores approximately is scored anew."""
        flat_queries = torch.cat(queries, dim=1)
        sign = 1 if ranking.proponents else -1  # FAISS looks for the largest scores
        signed_queries = sign * flat_queries
        k = min(ranking.k, self._table.n_examples)
        nearest = faiss.nearest(self._table, signed_queries.float().cpu(), k)
        if nearest.scores is not None:
            return nearest.positions, sign * nearest.scores
        in_order = nearest.positions.sort(dim=1)
        positions = in_order.values
        scores = self._rescored(positions, flat_queries)
        order, scores = ranking.best(scores)
        positions = positions.gather(1, order)
        if faiss.recall is None:
            faiss.recall = self._recall(ranking, queries, positions, n_queries=faiss.checked)
        return positions, scores

    def _rescored(self, positions: Tensor, flat_queries: Tensor) -> Tensor:
        """Score chosen train examples, others for each test example, by their own rows."""
        scores = []
        flat_queries = flat_queries.cpu().to(self._dtype)
        for chosen, query in zip(positions.tolist(), flat_queries, strict=True):
            rows = self._table.gathered(chosen)
            scores.append(rows @ query)
        return torch.stack(scores)

    def _recall(
        self,
        ranking: Ranking,
        queries: list[Tensor],
        positions: Tensor,
        n_queries: int,
    ) -> float:
        """Measure which share of the exact top k of the first queries is among the positions found."""
        first_queries = [query[:n_queries] for query in queries]
        exact, _ = self._scanned(ranking, first_queries)
        candidates = positions[: len(exact)].unsqueeze(2)
        winners = exact.to(positions.device).unsqueeze(1)
        is_hit = (candidates == winners).any(2)
        return float(is_hit.float().mean())

    # --- trajectories ---

    def scored_blocks(self, contract: Contract) -> Iterator[ScoredBlock]:
        """Score every pair: all checkpoints of a block, then the next block.

        Args:
            contract: Contracts the test side's features with a block's.

        Yields:
            Blocks in order, in every process all of them, times their checkpoint's weight.
        """
        blocks = self._blocks(NUMBERS_AT_ONCE // self._index.width)
        n_processes = self._processes.count
        for first in range(0, len(blocks), n_processes):
            this_round = blocks[first : first + n_processes]
            for number, scores in enumerate(self._shared(contract, this_round), start=first):
                yield from self._labelled(number, _as_tensor(blocks[number]), scores)

    def chosen_blocks(self, indices: Tensor) -> Iterator[ScoredBlock]:
        """Score chosen train examples with their trajectories.

        Args:
            indices: Their positions, in any shape.

        Yields:
            Blocks of them in order of position, each with all test examples.
        """
        n_at_once = max(1, NUMBERS_AT_ONCE // self._index.width)
        blocks = indices.unique().cpu().split(n_at_once)
        for number, positions in enumerate(blocks):
            scores = self._contracted(pair_scores, positions.tolist())
            yield from self._labelled(number, positions, scores)

    def _shared(self, contract: Contract, blocks: list[range]) -> Iterator[Iterable[Scores]]:
        """Contract one block in each process, and yield the scores of all of them, by checkpoint."""
        if self._processes.count == 1:
            yield self._contracted(contract, blocks[0])
            return
        own_scores: list[tuple[Tensor, Tensor]] = []
        rank = self._processes.rank
        if rank < len(blocks):  # the last round may have fewer blocks than processes
            for scores in self._contracted(contract, blocks[rank]):
                own_scores.append((scores.values.cpu(), scores.variances.cpu()))
        gathered = self._processes.gather(own_scores)
        for tensors in gathered[: len(blocks)]:
            yield [Scores(values.to(self._device), variances.to(self._device)) for values, variances in tensors]

    def _contracted(self, contract: Contract, positions: Sequence[int]) -> Iterator[Scores]:
        """Contract all test examples with some train examples at each checkpoint, times its weight."""
        for searched in self._checkpoints:
            rows = searched.reader.rows(positions).to(self._device)
            train_features = self._index.features(rows)
            scores = contract(searched.tests, train_features)
            yield scores.times(searched.checkpoint.weight)

    def _labelled(
        self,
        number: int,
        positions: Tensor,
        scores: Iterable[Scores],
    ) -> Iterator[ScoredBlock]:
        """Say of a block's scores at each checkpoint what they are of."""
        for searched, checkpoint_scores in zip(self._checkpoints, scores, strict=True):
            tests = searched.tests
            norms = tests.norms()[:, 1:]  # behind that of the total
            yield ScoredBlock(
                number,
                positions,
                searched.checkpoint,
                checkpoint_scores,
                tests.n_steps,
                norms,
            )

    def _blocks(self, size_limit: int) -> list[range]:
        """Cut the train set in multiples of a piece, small enough for every process to have one."""
        n_examples = self._table.n_examples
        share = math.ceil(n_examples / self._processes.count)
        n_pieces = max(1, min(size_limit, share) // self._index.piece)
        return _split(range(n_examples), n_pieces * self._index.piece)


def _as_tensor(positions: range) -> Tensor:
    return torch.arange(positions.start, positions.stop)


def _split(positions: range, size: int) -> list[range]:
    """Cut a range in consecutive ones of at most ``size``."""
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def _products(query: Tensor, rows: Tensor) -> Tensor:
    """Multiply ``(q, D)`` with ``(n, D)`` to ``(q, n)`` so that equal rows have equal products wherever they stand."""
    n = len(rows)
    # Matrix products take the last rows of an odd number by another kernel: on some processors it rounds differently.
    even_rows = F.pad(rows, (0, 0, 0, -n % _EVEN))
    return (query @ even_rows.T)[:, :n]
