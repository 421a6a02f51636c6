"""Scoring an index: pieces of it, small enough for the processor's cache, against all test examples at once.

No model is needed, and memory does not grow with the number of train examples. With several processes each takes
every so many blocks; the results are those of one process, to the last bit where they compute alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_sdi.features import StepFeatures
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import Reader, SketchIndex
from captum_sdi.index.processes import Processes
from captum_sdi.scores.collect import Running, TopK, pick_winners, top_k
from captum_sdi.scores.contract import Scores, pair_scores

_BLOCK = 4096
"""Examples between two looks at the running top k."""
_ROWS = 2**24
"""Numbers of rows that are held at once where standard errors are wanted."""


class Search:
    """Test examples beside a complete index.

    Args:
        index: The index.
        processes: Among whom the work is shared.
        names: The checkpoints.
        etas: Their learning rates.
        tests: The test examples' features at each, from `with_total`.
        dtype: Of the scores.
        faiss: Finds the top k in place of `scanned`.
    """

    def __init__(
        self,
        index: SketchIndex,
        processes: Processes,
        names: Sequence[str],
        etas: Sequence[float],
        tests: Sequence[StepFeatures],
        dtype: torch.dtype,
        faiss: Faiss | None = None,
    ) -> None:
        assert index.examples is not None
        self._index, self._processes, self._n = index, processes, index.examples
        self._etas, self._tests, self._dtype = etas, tests, dtype
        self._readers = [Reader(index, name, dtype) for name in names]
        self._device = next(iter(tests[0].rows.values())).device
        self._faiss = faiss
        self.folder = index.path
        self.identity = [index.manifest.owner(name) for name in names] + [self._n]

    @property
    def n_examples(self) -> int:
        """How many train examples there are."""
        return self._n

    @property
    def width(self) -> int:
        """Numbers per example, those of all checkpoints side by side."""
        return self._index.width * len(self._readers)

    @property
    def n_columns(self) -> int:
        """What test examples can be ranked by: the total, then bins."""
        return max(row.shape[1] for test in self._tests for row in test.rows.values())

    def queries(self, column: int) -> list[Tensor]:
        """What rows are multiplied by at each checkpoint.

        Args:
            column: 0 for totals, or 1 + a bin.

        Returns:
            ``(q, D)`` each, times the learning rate.
        """
        found = []
        for eta, test in zip(self._etas, self._tests, strict=True):
            flat = self._index.flat(test)
            inside = column < flat.shape[1]  # a checkpoint may make the test side run fewer steps
            found.append(eta * flat[:, column] if inside else torch.zeros_like(flat[:, 0]))
        return found

    def totals(self, queries: Sequence[Tensor], start: int, stop: int) -> Tensor:
        """Scores of consecutive examples.

        Args:
            queries: From `queries`.
            start: Position of the first; a multiple of the index's piece, so that sums come out alike.
            stop: Position after the last.

        Returns:
            ``(q, stop - start)``.
        """
        scores = torch.zeros(len(queries[0]), stop - start, dtype=self._dtype, device=self._device)
        for reader, query in zip(self._readers, queries, strict=True):
            for at in range(start, stop, self._index.piece):
                rows = reader.read(at, min(at + self._index.piece, stop)).to(self._device)
                scores[:, at - start : at - start + len(rows)].addmm_(query, rows.T)
        return scores

    def top(self, column: int, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
        """The k best train examples of each test example; of equal ones those with the lowest positions.

        Args:
            column: 0 to rank by totals, or 1 + a bin.
            k: How many; clipped to n.
            proponents: The highest; False: the lowest.

        Returns:
            Positions and scores, ``(q, k)`` each, best first.
        """
        if self._faiss is not None:
            indices, scores = self._faiss.top(self, column, k, proponents)
            return indices.to(self._device), scores.to(self._device, self._dtype)
        return self.scanned(column, k, proponents)

    def scanned(self, column: int, k: int, proponents: bool, first: int | None = None) -> tuple[Tensor, Tensor]:
        """As `top`, by comparing every row.

        Args:
            column: As for `top`.
            k: As for `top`.
            proponents: As for `top`.
            first: Only so many test examples; None: all.

        Returns:
            As `top`.
        """
        queries = [query[:first] for query in self.queries(column)]
        best = TopK(k, proponents)
        best.add(torch.empty(0, dtype=torch.long), queries[0].new_empty(len(queries[0]), 0))
        with torch.autocast(self._device.type, enabled=False):
            for start, stop in self._blocks(_BLOCK):
                best.add(torch.arange(start, stop), self.totals(queries, start, stop))
        indices, scores = (torch.cat(parts, 1) for parts in zip(*self._gathered(best.result()), strict=True))
        order = indices.argsort(dim=1)
        indices, scores = indices.gather(1, order), scores.gather(1, order)
        order, scores = top_k(scores, k, proponents)
        return indices.gather(1, order), scores

    def scores(self) -> Iterator[tuple[int, Tensor, Scores]]:
        """Every pair, with the sketch's variances, summed over checkpoints with η and η².

        Yields:
            The number of a block, its examples' positions ``(n,)``, and values and variances ``(q, n, b)``.
        """
        mine = (
            (start, stop, self._pairs(range(start, stop))) for start, stop in self._blocks(_ROWS // self._index.width)
        )
        blocks = mine if self._processes.count == 1 else self._all_of(list(mine))
        for i, (start, stop, scores) in enumerate(blocks):
            yield i, torch.arange(start, stop), scores

    def winners(self, indices: Tensor) -> Scores:
        """Some pairs, with the sketch's variances.

        Args:
            indices: ``(q, k)`` positions of train examples.

        Returns:
            Values and variances ``(q, k, b)``.
        """
        values, variances = Running(), Running()
        for positions in indices.unique().cpu().split(max(1, _ROWS // self._index.width)):
            scores = self._pairs(positions.tolist())
            values.add(0, pick_winners(indices, positions, scores.values))
            variances.add(0, pick_winners(indices, positions, scores.variances))
        return Scores(values.result(), variances.result())

    def winners_by(self, column: int, indices: Tensor) -> Tensor:
        """What some pairs are ranked by.

        Args:
            column: As for `top`.
            indices: ``(q, k)`` positions of train examples.

        Returns:
            ``(q, k)``.
        """
        query = torch.cat(self.queries(column), dim=1).cpu()
        return torch.stack(
            [self.gathered(some) @ q for some, q in zip(indices.tolist(), query.to(self._dtype), strict=True)]
        )

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """All rows, those of all checkpoints side by side.

        Yields:
            The position of the first, and ``(n, width)`` float32 on the CPU, overwritten by the next.
        """
        for start in range(0, self._n, _BLOCK):
            stop = min(start + _BLOCK, self._n)
            parts = [reader.read(start, stop) for reader in self._readers]
            yield start, (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).float()

    def gathered(self, positions: Sequence[int]) -> Tensor:
        """Rows of some examples, those of all checkpoints side by side.

        Args:
            positions: Their positions.

        Returns:
            ``(n, width)``.
        """
        return torch.cat([reader.gather(positions) for reader in self._readers], dim=1)

    def _pairs(self, positions: Sequence[int]) -> Scores:
        """All test examples with some train examples."""
        values, variances = Running(), Running()
        for eta, test, reader in zip(self._etas, self._tests, self._readers, strict=True):
            if isinstance(positions, range):
                rows = reader.read(positions.start, positions.stop)
            else:
                rows = reader.gather(positions)
            scores = pair_scores(test, self._index.features(rows.to(self._device)))
            values.add(0, eta * scores.values)
            variances.add(0, eta**2 * scores.variances)
        return Scores(values.result(), variances.result())

    def _blocks(self, examples: int) -> Iterator[tuple[int, int]]:
        """This process's blocks; multiples of a piece, and small enough for every process to have one."""
        piece, count = self._index.piece, self._processes.count
        pieces = max(1, min(examples, -(-self._n // count)) // piece)
        for start in range(pieces * piece * self._processes.rank, self._n, pieces * piece * count):
            yield start, min(start + pieces * piece, self._n)

    def _gathered(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        gathered = self._processes.gather([tensor.cpu() for tensor in tensors])
        return [[tensor.to(self._device) for tensor in parts] for parts in gathered]

    def _all_of(self, mine: list[tuple[int, int, Scores]]) -> Iterator[tuple[int, int, Scores]]:
        """Everybody's blocks in order."""
        gathered = self._processes.gather([(a, b, s.values.cpu(), s.variances.cpu()) for a, b, s in mine])
        for start, stop, values, variances in sorted(
            (block for part in gathered for block in part), key=lambda b: b[0]
        ):
            yield start, stop, Scores(values.to(self._device), variances.to(self._device))
