"""FAISS in place of the plain search for the top k: exact, or approximate with a recall that was measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_sdi.index.table import RowTable
from captum_sdi.scores.ranking import Ranking, RunningBest
from captum_sdi.whole_file import write_whole

_TRAINED_ON = 2**16
"""How many rows centroids and codes are learnt from, evenly spread."""

_BYTES_AT_ONCE = 2**24


class Nearest(NamedTuple):
    """The rows with the largest inner products with each query."""

    positions: Tensor
    """``(q, k)``."""
    scores: Tensor | None
    """``(q, k)`` the inner products, largest first; None where they are approximate, and so is the order."""


class Faiss:
    """Finds the top k of an index with FAISS; ``pip install 'captum-sdi[faiss]'``.

    ``"Flat"`` compares every row, block by block, like the plain search. Any other of FAISS's factory strings builds
    an approximate index once, beside the shards, and is faster from some hundred thousand rows on, most of all with
    ``pool=True``. It may miss some of the top k: how many it finds is measured on test examples of the first question.

    Args:
        factory: A string for ``faiss.index_factory``, such as ``"IVF1024,Flat"`` or ``"IVF4096,SQfp16"``.
        nprobe: In how many of an inverted file's lists to look; None: FAISS's default, 1.
        checked: On how many test examples the recall is measured, by comparing them with every row.

    Raises:
        ImportError: If FAISS is not installed.
        ValueError: If ``nprobe`` or ``checked`` is below 1.
    """

    def __init__(
        self,
        factory: str = "Flat",
        nprobe: int | None = None,
        checked: int = 16,
    ) -> None:
        if (nprobe is not None and nprobe < 1) or checked < 1:
            raise ValueError(f"Faiss(nprobe=..., checked=...) must be at least 1, got {nprobe} and {checked}.")
        try:
            import faiss
        except ImportError as error:
            raise ImportError("Faiss(...) needs FAISS: pip install 'captum-sdi[faiss]'.") from error
        self._faiss: Any = faiss
        self.factory, self.nprobe, self.checked = factory, nprobe, checked
        self.recall: float | None = 1.0 if factory == "Flat" else None
        """The share of the exact top k that was found, once measured; 1 for ``"Flat"``."""
        self._opened: tuple[Path, Any] | None = None

    def nearest(self, table: RowTable, queries: Tensor, k: int) -> Nearest:
        """Find the rows with the largest inner products.

        Args:
            table: The rows.
            queries: ``(q, width)`` float32 on the CPU.
            k: How many rows for each query; at most n.

        Returns:
            Their positions, and their scores where these are exact.

        Raises:
            ValueError: If fewer than k were found.
        """
        queries = queries.contiguous()
        if self.factory == "Flat":
            return self._nearest_of_all(table, queries, k)
        approximate = self._index_of(table)
        if self.nprobe is not None:
            self._faiss.ParameterSpace().set_index_parameter(approximate, "nprobe", self.nprobe)
        _, positions = approximate.search(queries.numpy(), k)
        is_hit = torch.from_numpy(positions) >= 0
        if not is_hit.all():
            fewest = int(is_hit.sum(1).min())
            raise ValueError(
                f"FAISS found only {fewest} of k={k} with {self.factory!r}: raise nprobe (now {self.nprobe or 1}), or "
                "use the plain search."
            )
        return Nearest(torch.from_numpy(positions), scores=None)

    def _nearest_of_all(self, table: RowTable, queries: Tensor, k: int) -> Nearest:
        best = RunningBest(Ranking(k, proponents=True))
        start = 0
        for rows in table.blocks():
            k_here = min(k, len(rows))
            metric = self._faiss.METRIC_INNER_PRODUCT
            scores, places = self._faiss.knn(queries.numpy(), rows.numpy(), k_here, metric=metric)
            places, order = torch.from_numpy(places).sort(dim=1)  # of equal ones the first
            scores = torch.from_numpy(scores).gather(1, order)
            best.add(start + places, scores)
            start += len(rows)
        positions, scores = best.result()
        return Nearest(positions, scores)

    def _index_of(self, table: RowTable) -> Any:
        """Return the FAISS index: from memory, from disk, or built now."""
        identity = json.dumps([self.factory, table.identity])
        digest = hashlib.sha256(identity.encode()).hexdigest()
        file = table.folder / f"{digest[:16]}.faiss"
        if self._opened is not None:
            opened_file, opened = self._opened
            if opened_file == file:
                return opened
        if not is_intact(file):
            # By our own write: FAISS's error for a full disk is no OSError.
            content = memoryview(self._faiss.serialize_index(self._built(table)))
            write_whole(file, lambda unfinished: write_with_digest(unfinished, content))
        read = self._faiss.read_index(str(file))
        self._opened = file, read
        return read

    def _built(self, table: RowTable) -> Any:
        built = self._faiss.index_factory(table.width, self.factory, self._faiss.METRIC_INNER_PRODUCT)
        if not built.is_trained:
            n_rows = min(table.n_examples, _TRAINED_ON)
            positions = torch.linspace(0, table.n_examples - 1, n_rows, dtype=torch.float64).long()
            sample = table.gathered(positions.tolist())
            built.train(sample.float().numpy())
        for rows in table.blocks():
            built.add(rows.numpy())
        return built


def write_with_digest(file: Path, content: memoryview) -> None:
    """Write bytes, and their digest behind them, where FAISS does not read."""
    with file.open("wb") as opened:
        opened.write(content)
        opened.write(hashlib.sha256(content).digest())


def is_intact(file: Path) -> bool:
    """Return whether a file is there and ends with the digest of what is before: FAISS believes any byte of it."""
    if not file.is_file():
        return False
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        n_left = file.stat().st_size - digest.digest_size
        while n_left > 0:
            piece = opened.read(min(n_left, _BYTES_AT_ONCE))
            if not piece:  # it shrinks
                return False
            digest.update(piece)
            n_left -= len(piece)
        return opened.read() == digest.digest()
