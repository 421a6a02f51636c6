"""`TrainSide`: the train set as a preconditioner is fitted on it: features, raw examples, and where fits are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from captum_sdi.blocks import Block
from captum_sdi.data.examples import Examples
from captum_sdi.data.fingerprints import example_fingerprints
from captum_sdi.index import SketchIndex, TrainIndex
from captum_sdi.index.source import Indexed
from captum_sdi.passes import Live, Point
from captum_sdi.preconditioners.shelf import Shelf, Tensors
from captum_sdi.progress import HIDDEN, Progress


class Content(NamedTuple):
    """How many train examples there are, and a digest of what they are."""

    n_examples: int
    digest: str


@dataclass(frozen=True)
class TrainSide:
    """The train side at whatever checkpoint it is asked for: a `captum_sdi.blocks.Source`, and more."""

    examples: Examples
    index: TrainIndex | None = None
    """Where features are read from; None: they are computed."""
    shelf: Shelf = field(default_factory=Shelf)
    progress: Progress = HIDDEN

    def blocks(self, point: Point, only: Tensor | None = None) -> Iterator[Block]:
        """Yield the features of all train examples, or of those at some positions, at one checkpoint."""
        if self.index is None:
            return Live(self.examples).blocks(point, only)
        return Indexed(self._completed(self.index, point)).blocks(point, only)

    def fitted_on_rows(
        self,
        kind: str,
        point: Point,
        compute: Callable[[], Tensors],
    ) -> Tensors:
        """Return what depends on the rows at a checkpoint alone; kept where they are those of an index."""
        if self.index is None:
            return compute()
        sketches = self._completed(self.index, point)
        name = point.checkpoint.name
        identity = {
            "rows": sketches.manifest.owner(name),
            "examples": sketches.n_examples,
            "content": sketches.manifest.fingerprint,
        }
        return self.shelf.tensors(kind, identity, compute)

    def content(self, point: Point) -> Content:
        """Return what the train examples are: as a complete index says, or else by reading them."""
        if self.index is not None:
            manifest = self._completed(self.index, point).manifest
            if manifest.examples is not None and manifest.fingerprint is not None:
                return Content(manifest.examples, manifest.fingerprint)
        digest = hashlib.sha256()
        n_examples = 0
        for positions, raw in self.examples.batches():
            digest.update(example_fingerprints(raw).numpy().tobytes())
            n_examples += len(positions)
        return Content(n_examples, digest.hexdigest()[:32])

    def _completed(self, index: TrainIndex, point: Point) -> SketchIndex:
        return index.complete(point, self.examples, thorough=False, progress=self.progress)
