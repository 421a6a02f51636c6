"""`TrainIndex`: an index beside the model it is of. It opens, checks, continues and completes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captum_sdi.features import StepFeatures
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.identity import Identity, identity_at
from captum_sdi.index.lock import check_space, explained, locked
from captum_sdi.index.manifest import Manifest, ParameterColumns
from captum_sdi.index.place import check_folder, unfinished_files
from captum_sdi.index.processes import Processes, Turns
from captum_sdi.index.search import Search
from captum_sdi.index.shards import DTYPES, dtype_name
from captum_sdi.index.verify import (
    check_data,
    check_length,
    check_row,
    check_same_reading,
    check_settings,
    compared_batches,
    first_reading,
    lookup,
)
from captum_sdi.index.weights import WeightHashes
from captum_sdi.index.writer import ShardWriter
from captum_sdi.model_facts import model_device
from captum_sdi.sketch.base import Sketch

if TYPE_CHECKING:
    from captum_sdi.checkpoints import Checkpoint
    from captum_sdi.data.examples import Examples
    from captum_sdi.data.side import Side
    from captum_sdi.data.stream import Stream
    from captum_sdi.passes import Point
    from captum_sdi.progress import Progress


@dataclass(frozen=True)
class Build:
    """One checkpoint that is being completed."""

    point: Point
    train: Examples
    identity: Identity
    processes: Processes

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return self.point.checkpoint.name


class TrainIndex:
    """The train side of `SDIInfluence` on disk.

    Args:
        path: The folder; made when it does not exist.
        dtype: In which rows are stored; None: that of an index already there, else as they are computed.
        sketch: How gradients are represented.
        side: How train examples are run.
        faiss: Finds the top k.

    Raises:
        TypeError: If ``path`` is no path, or ``dtype`` none that rows can have.
        ValueError: If ``path`` is a file, or a folder of other things.
    """

    def __init__(
        self,
        path: Any,
        dtype: torch.dtype | None,
        sketch: Sketch,
        side: Side,
        faiss: Faiss | None = None,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"index= must be the path of a folder, got {type(path).__name__}.")
        if dtype is not None and dtype not in DTYPES.values():
            raise TypeError(f"index_dtype= must be one of {list(map(str, DTYPES.values()))}, got {dtype!r}.")
        self.path, self.dtype, self.faiss = Path(os.fsdecode(path)), dtype, faiss
        self._sketch, self._side = sketch, side
        self._index: SketchIndex | None = None  # kept between questions, for what it has verified
        self._checked_rows: set[str] = set()
        self._checked_data: Stream | None = None  # of the last question: a new one may find edited rows
        self._held: ExitStack | None = None  # what ends with the build of all checkpoints
        self._is_locked, self._n_checkpoints = False, 1
        self._completed: set[str] = set()
        self._hashes = WeightHashes()
        if self.path.exists():
            check_folder(self.path)

    def complete(
        self,
        point: Point,
        train: Examples,
        *,
        thorough: bool,
        progress: Progress,
    ) -> SketchIndex:
        """Compare the index with the model at one checkpoint, and compute what is missing.

        Args:
            point: The model at the checkpoint.
            train: The train set.
            thorough: Compare every train example's content, however many there are.
            progress: Shows a bar over batches where something is computed.

        Returns:
            The index, which has all rows at this checkpoint.

        Raises:
            ValueError: If the index is of something else.
            OSError: If it is incomplete, and another process is building it, the folder is read-only or the disk full.
        """
        identity = identity_at(point, self._sketch, self._side, self._hashes)
        build = Build(point, train, identity, Processes(model_device(point.model)))
        check_same_reading(build.processes, first_reading(train))
        index = self._compared(build)
        if build.name not in self._checked_rows and index.shards[build.name]:
            self._checked_rows.add(build.name)
            check_row(index, point, train)
        lacks_rows = bool(index.damaged) or not index.is_complete(build.name)
        if any(build.processes.gather(lacks_rows)):
            purpose = f"index training batches at {build.name}"
            with ExitStack() as exclusive, explained(index), progress.bar(purpose, train.n_batches) as bar:
                self._check_space(index, build)
                self._take_lock(build, exclusive)
                self._prepare(index, build)
                compute_missing(index, build, bar)
        elif thorough or self._checked_data is not train.stream:
            check_data(index, train, thorough=thorough)
        self._checked_data = train.stream
        self._completed.add(build.name)
        return index

    @contextmanager
    def one_build(self, n_checkpoints: int) -> Iterator[None]:
        """Hold the lock, once it is needed, until rows at all checkpoints have been completed."""
        with ExitStack() as held:
            self._held, self._n_checkpoints, self._is_locked = held, n_checkpoints, False
            self._completed.clear()
            try:
                yield
            finally:
                self._held, self._n_checkpoints = None, 1

    def _take_lock(self, build: Build, alone: ExitStack) -> None:
        if build.processes.rank != 0:
            return
        if self._held is None:
            alone.enter_context(locked(self.path))
        elif not self._is_locked:
            self._held.enter_context(locked(self.path))
            self._is_locked = True

    def _check_space(self, index: SketchIndex, build: Build) -> None:
        """Check that what is missing at this checkpoint and those that follow fits on the disk."""
        n_examples = build.train.stream.n_examples
        if n_examples is None:
            return
        names, n_checkpoints = {build.name}, 1
        if self._held is not None:
            names = set(index.shards) - self._completed
            n_checkpoints = self._n_checkpoints - len(self._completed)
        n_present = sum(min(index.rows_at(name), n_examples) for name in names)
        check_space(index, max(0, n_checkpoints * n_examples - n_present), build.processes)

    def search(
        self,
        index: SketchIndex,
        checkpoints: Sequence[Checkpoint],
        tests: Sequence[StepFeatures],
        *,
        unit: bool = False,
    ) -> Search:
        """Put test examples beside the index, which is complete at all checkpoints.

        Args:
            index: From `complete`.
            checkpoints: The checkpoints, with their learning rates.
            tests: The test examples' features at each, from `StepFeatures.with_total`.
            unit: Divide every train example's row at each checkpoint by its norm.

        Returns:
            What scores them.
        """
        row = next(iter(tests[0].rows.values()))
        return Search(
            index,
            Processes(row.device),
            checkpoints,
            tests,
            row.dtype,
            self.faiss,
            unit=unit,
        )

    def _compared(self, build: Build) -> SketchIndex:
        """Read the index as it is on disk now, which agrees with the model; a new one where there is none."""
        manifest = Manifest.load(self.path) or self._new_manifest(build)
        check_settings(self.path, manifest, build.identity, build.name, self.dtype)
        manifest.checkpoints[build.name] = build.identity.checkpoint
        if self._index is None:
            self._index = SketchIndex(self.path, manifest)
        else:
            self._index.manifest = manifest
            self._index.scan()
        self._index.verify()
        return self._index

    def _new_manifest(self, build: Build) -> Manifest:
        blank = build.point.capture.blank()
        columns = []
        for name, row in blank.rows.items():
            columns.append(ParameterColumns(name, row.shape[-1], *astuple(blank.noise[name])))
        widest = max((row.dtype for row in blank.rows.values()), key=lambda dtype: dtype.itemsize)
        return Manifest(build.identity.settings, dtype_name(self.dtype or widest), columns)

    def _prepare(self, index: SketchIndex, build: Build) -> None:
        """Remove what a killed process left unfinished and what is damaged; write the manifest."""
        n_examples = build.train.stream.n_examples
        if n_examples is not None:
            check_length(index, n_examples)
        if build.processes.rank == 0:
            index = self._compared(build)  # anew: another builder may just have finished
            folder = index.folder(build.name)
            folder.mkdir(parents=True, exist_ok=True)
            for file in [*unfinished_files(folder), *unfinished_files(self.path), *index.damaged]:
                file.unlink(missing_ok=True)
            index.manifest.save(self.path)
        build.processes.wait()
        self._compared(build)
        build.processes.wait()  # nobody writes before all have seen the same


# --- one pass over the train set ---


def compute_missing(
    index: SketchIndex,
    build: Build,
    bar: Any,
) -> None:
    """Read the train set: compare the rows that are there, compute and write the others.

    Args:
        index: The index, writable.
        build: The checkpoint.
        bar: Updated with every batch.
    """
    is_present, _ = index.fingerprints([build.name])
    turns = Turns(build.processes, batches_per_turn(index, build))
    content, n_examples = hashlib.sha256(), 0
    with ShardWriter(index, build.name) as writer:
        for positions, raw, fingerprints in compared_batches(index, build.train):
            content.update(fingerprints.numpy().tobytes())
            n_examples = int(positions[-1]) + 1
            absent = ~lookup(is_present, positions)
            if absent.any() and turns.take():
                # All of it, even where only some is absent: in another company rows would round differently.
                train, numbers = build.train, positions.tolist()
                collated_alone = train.collated_alone
                features = build.point.batch(
                    raw,
                    train.side,
                    numbers,
                    by_step=False,
                    collated_alone=collated_alone,
                )
                rows = index.flat(features)[:, 0].cpu()
                writer.add(positions[absent], rows[absent], fingerprints[absent])
            bar.update()
    check_same_reading(build.processes, (n_examples, content.digest()))
    finish(index, build.processes, n_examples, fingerprint=content.hexdigest()[:32])


def finish(
    index: SketchIndex,
    processes: Processes,
    n_examples: int,
    fingerprint: str,
) -> None:
    """Write down how many examples there are, and what they are."""
    check_length(index, n_examples)
    index.manifest.examples, index.manifest.fingerprint = n_examples, fingerprint
    if processes.rank == 0:
        index.manifest.save(index.path)
    index.scan()
    processes.wait()


def batches_per_turn(index: SketchIndex, build: Build) -> int:
    """Choose how many batches a process takes in a row: shards are full, and nobody waits long at the end."""
    stream = build.train.stream
    if stream.n_examples is None:
        return 16
    share_present = index.rows_at(build.name) / max(stream.n_examples, 1)
    n_absent = len(stream) * (1 - share_present)
    n_turns = 4 * build.processes.count
    return max(1, int(n_absent / n_turns))
