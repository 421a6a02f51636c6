"""FAISS in place of the plain search for the top k: exact, or approximate with a recall that was measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_sdi.index.shards import written_whole
from captum_sdi.scores.collect import TopK, top_k

if TYPE_CHECKING:
    from captum_sdi.index.search import Search

_TRAINED_ON = 2**16
"""How many rows centroids and codes are learnt from, evenly spread."""


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
        ImportError: FAISS is not installed.
        ValueError: ``nprobe`` or ``checked`` is below 1.
    """

    def __init__(self, factory: str = "Flat", nprobe: int | None = None, checked: int = 16) -> None:
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
        self._built: tuple[Path, Any] | None = None

    def top(self, search: Search, column: int, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
        """As `Search.top`.

        Args:
            search: Test examples beside an index.
            column: What to rank by.
            k: How many.
            proponents: The highest; False: the lowest.

        Returns:
            Positions and scores, ``(q, k)`` each, best first.

        Raises:
            ValueError: Fewer than k were found.
        """
        k = min(k, search.n_examples)
        wanted = torch.cat(search.queries(column), dim=1).float().cpu().contiguous()
        wanted = wanted if proponents else -wanted
        if self.factory == "Flat":
            return self._flat(search, wanted, k, proponents)
        found = self._approximate(search, wanted, k)
        if (found < 0).any():
            raise ValueError(
                f"FAISS found only {int((found >= 0).sum(1).min())} of k={k} with {self.factory!r}: raise nprobe "
                f"(now {self.nprobe or 1}), or use the plain search."
            )
        found = found.sort(dim=1).values
        scores = search.winners_by(column, found)
        order, scores = top_k(scores, k, proponents)
        found = found.gather(1, order)
        if self.recall is None:
            exact, _ = search.scanned(column, k, proponents, first=self.checked)
            hits = (found[: len(exact)].unsqueeze(2) == exact.to(found.device).unsqueeze(1)).any(2)
            self.recall = float(hits.float().mean())
        return found, scores

    def _flat(self, search: Search, wanted: Tensor, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
        best = TopK(k, proponents)
        for start, rows in search.rows():
            metric = self._faiss.METRIC_INNER_PRODUCT
            scores, inside = self._faiss.knn(wanted.numpy(), rows.numpy(), min(k, len(rows)), metric=metric)
            inside, order = torch.from_numpy(inside).sort(dim=1)  # of equal ones the first
            scores = torch.from_numpy(scores).gather(1, order)
            best.add(inside + start, scores if proponents else -scores)
        indices, scores = best.result()
        return indices, scores

    def _approximate(self, search: Search, wanted: Tensor, k: int) -> Tensor:
        built = self._index(search)
        if self.nprobe is not None:
            self._faiss.ParameterSpace().set_index_parameter(built, "nprobe", self.nprobe)
        return torch.from_numpy(built.search(wanted.numpy(), k)[1])

    def _index(self, search: Search) -> Any:
        """The FAISS index: in memory, on disk, or built now."""
        said = json.dumps([self.factory, search.identity])
        file = search.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.faiss"
        if self._built is None or self._built[0] != file:
            if not file.exists():
                built = self._build(search)
                written_whole(file, lambda unfinished: self._faiss.write_index(built, str(unfinished)))
            self._built = file, self._faiss.read_index(str(file))
        return self._built[1]

    def _build(self, search: Search) -> Any:
        built = self._faiss.index_factory(search.width, self.factory, self._faiss.METRIC_INNER_PRODUCT)
        if not built.is_trained:
            n = search.n_examples
            positions = torch.linspace(0, n - 1, min(n, _TRAINED_ON), dtype=torch.float64).long()
            built.train(search.gathered(positions.tolist()).float().numpy())
        for _, rows in search.rows():
            built.add(rows.numpy())
        return built
