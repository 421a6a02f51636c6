"""`TrainIndex`: an index beside the model it is of. It opens, checks, continues and completes it."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from captum_sdi.data.batch import batch_size
from captum_sdi.data.fingerprints import example_fingerprints
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import StepFeatures
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import Reader, SketchIndex
from captum_sdi.index.manifest import RATE, Manifest, described, differences, settings, weights_hash
from captum_sdi.index.processes import Processes
from captum_sdi.index.search import Search
from captum_sdi.index.shards import DTYPES, UNFINISHED, Shard
from captum_sdi.passes import Engine

SHARD_BYTES, SHARD_SECONDS = 64 * 2**20, 60.0
"""A shard is written when it is as large, or its first row as old: this much is lost when the process is killed."""
LOCK_SECONDS = 10.0
"""Workers of a killed process's DataLoader hold its lock until they notice, a few seconds later."""
CHECKED = 10_000
"""How many examples are read to compare the train set with a complete index; the others are taken on trust."""


class TrainIndex:
    """The train side of `SDIInfluence` on disk.

    Args:
        path: The folder; made when it does not exist.
        dtype: In which rows are stored; None: that of an index already there, else as they are computed.
        engine: Computes what is missing.
        side: How train examples are run.
        faiss: Finds the top k.

    Raises:
        TypeError: ``path`` is no path, or ``dtype`` none that rows can have.
        ValueError: ``path`` is a file, or a folder of other things.
    """

    def __init__(
        self, path: Any, dtype: torch.dtype | None, engine: Engine, side: Side, faiss: Faiss | None = None
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"index= must be the path of a folder, got {type(path).__name__}.")
        if dtype is not None and dtype not in DTYPES.values():
            raise TypeError(f"index_dtype= must be one of {list(map(str, DTYPES.values()))}, got {dtype!r}.")
        self.path, self._dtype, self._engine, self._side = Path(os.fsdecode(path)), dtype, engine, side
        self._faiss = faiss
        self._processes: Processes | None = None
        self._index: SketchIndex | None = None
        self._data_checked = False
        self._rows_checked: set[str] = set()
        if self.path.exists():
            self._check_folder()

    @property
    def processes(self) -> Processes:
        """Those of this launch; joined when first needed."""
        if self._processes is None:
            device = next((p.device for p in self._engine.model.parameters()), torch.device("cpu"))
            self._processes = Processes(device)
        return self._processes

    @property
    def opened(self) -> SketchIndex:
        """The index, after `complete`."""
        assert self._index is not None
        return self._index

    def search(self, names: Sequence[str], etas: Sequence[float], tests: Sequence[StepFeatures]) -> Search:
        """Test examples beside the complete index.

        Args:
            names: The checkpoints.
            etas: Their learning rates.
            tests: The test examples' features at each, from `with_total`.

        Returns:
            What scores them.
        """
        return Search(self.opened, self.processes, names, etas, tests, self._engine.dtype, self._faiss)

    def blocks(self, name: str) -> Iterator[tuple[Tensor, StepFeatures]]:
        """All rows of one checkpoint of the complete index, as `Engine.blocks` yields them.

        Args:
            name: The checkpoint's.

        Yields:
            Positions ``(n,)`` and features of one bin.
        """
        index = self.opened
        assert index.examples is not None
        reader = Reader(index, name, self._engine.dtype)
        for start in range(0, index.examples, index.piece):
            stop = min(start + index.piece, index.examples)
            yield torch.arange(start, stop), index.features(reader.read(start, stop))

    # --- one checkpoint ---

    def complete(self, stream: Stream, name: str, eta: float, thorough: bool = False, bar: Any = nullcontext) -> None:
        """Compares the index with the model at one checkpoint, inside `Engine.sweep`, and computes what is missing.

        Args:
            stream: The train set.
            name: The checkpoint's.
            eta: Its learning rate.
            thorough: Compare every train example's content, however many there are.
            bar: Makes a progress bar, updated with every batch of a pass over the train set.

        Raises:
            ValueError: The index is of something else.
            OSError: It is incomplete, and another process is building it, the folder is read-only or the disk full.
        """
        live = self._live(eta)
        index = self._open(name, *live)
        self._check_row(stream, name)
        missing = bool(index.damaged) or not index.is_complete(name)
        if any(self.processes.gather(missing)):
            with self._writing(), bar() as shown:
                self._prepare_folder(stream, name, *live)
                self._build(stream, name, shown)
        elif thorough or not self._data_checked:
            self._check_data(stream, thorough)
        self._data_checked = True

    def _build(self, stream: Stream, name: str, bar: Any) -> None:
        """One pass over the train set: what is there is compared, what is not is computed."""
        index = self.opened
        there, _ = index.fingerprints([name])
        turns = _Turns(self.processes, self._batches_per_turn(stream, int(there.sum())))
        seen, n = hashlib.sha256(), 0
        with _Writer(index, name) as writer:
            for positions, raw, fingerprints in self._compared(stream):
                seen.update(fingerprints.numpy().tobytes())
                n = int(positions[-1]) + 1
                absent = ~_at(there, positions)
                if absent.any() and turns.is_mine():
                    # All of it, even where only some is absent: in another company rows would round differently.
                    features = self._engine.batch(raw, self._side, False, positions.tolist())
                    writer.add(positions[absent], index.flat(features)[:, 0].cpu()[absent], fingerprints[absent])
                if bar is not None:
                    bar.update()
        self.processes.wait()
        self._finish(n, seen.hexdigest()[:32])

    def _finish(self, n: int, fingerprint: str) -> None:
        """Writes down how many examples there are."""
        index = self.opened
        self._check_length(n)
        index.manifest.examples, index.manifest.fingerprint = n, fingerprint
        if self.processes.rank == 0:
            index.manifest.save(self.path)
        index.scan()
        self.processes.wait()

    def _prepare_folder(self, stream: Stream, name: str, live: dict[str, Any], entry: dict[str, Any]) -> None:
        """Removes what a killed process left unfinished and what is damaged; writes the manifest."""
        if stream.n_examples is not None:
            self._check_length(stream.n_examples)
        if self.processes.rank == 0:
            index = self._open(name, live, entry)  # anew: another builder may just have finished
            folder = index.folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            for file in [*folder.glob(f"*{UNFINISHED}"), *self.path.glob(f"*{UNFINISHED}"), *index.damaged]:
                file.unlink(missing_ok=True)
            index.manifest.save(self.path)
        self.processes.wait()
        self._open(name, live, entry)
        self.processes.wait()  # nobody writes before all have seen the same

    def _batches_per_turn(self, stream: Stream, there: int) -> int:
        """How many batches one process takes in a row: shards are full, and nobody waits long at the end."""
        n = stream.n_examples
        absent = 64 * self.processes.count if n is None else len(stream) * (1 - there / max(n, 1))
        return max(1, int(absent / (4 * self.processes.count)))

    # --- is it the same? ---

    def _live(self, eta: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a manifest would say of everything, and of this checkpoint."""
        engine = self._engine
        assert engine.loop is not None
        targets = engine.featurizer.targets()
        said = settings(version("captum-sdi"), engine.sketch, targets, engine.loop, self._side)
        hashes = {"weights": weights_hash(engine.model), "hash tables": engine.featurizer.checksum()}
        return said, {**hashes, RATE: eta}

    def _open(self, name: str, live: dict[str, Any], entry: dict[str, Any]) -> SketchIndex:
        """The index as it is on disk now, which agrees with the model; a new one where there is none."""
        manifest = Manifest.load(self.path) or self._new_manifest(live)
        found = differences(manifest.settings, live)
        if self._dtype is not None:
            found += differences(manifest.dtype, _name_of(self._dtype), "index_dtype")
        # The rate is no part of a row: scores use the present one, and a run that goes on may change it.
        stored = {**manifest.checkpoints.get(name, entry), RATE: entry[RATE]}
        found += differences(stored, entry, f"checkpoint {name!r}")
        if found:
            raise ValueError(
                f"The index at {self.path} is of something else: {'; '.join(found)}. Pass what it was built with, or "
                "another folder as index=."
            )
        manifest.checkpoints[name] = entry
        if self._index is None:
            self._index = SketchIndex(self.path, manifest)
        else:
            self._index.manifest = manifest
            self._index.scan()
        self._index.verify()
        return self._index

    def _new_manifest(self, live: dict[str, Any]) -> Manifest:
        blank = self._engine.featurizer.blank()
        widest = max((row.dtype for row in blank.rows.values()), key=lambda dtype: dtype.itemsize)
        rows = [(key, row.shape[-1], *astuple(blank.noise[key])) for key, row in blank.rows.items()]
        return Manifest(live, _name_of(self._dtype or widest), rows)

    def _check_row(self, stream: Stream, name: str) -> None:
        """Recomputes one stored row: what no setting tells, such as another loss of the same name, shows here."""
        index = self.opened
        if name in self._rows_checked or not index.shards[name]:
            return
        self._rows_checked.add(name)
        shard = index.shards[name][0]
        told = shard.mapped("rows").float().abs().amax(1).nonzero().flatten()
        position = shard.start + (int(told[0]) if len(told) else 0)
        stored = Reader(index, name, torch.float64).read(position, position + 1)[0]
        for positions, raw in stream.picked(torch.tensor([position])):
            features = self._engine.batch(raw, self._side, False, positions.tolist())
            computed = index.flat(features)[0, 0].cpu().double()
            self._compare(positions, example_fingerprints(raw), *index.fingerprints())
            self._compare_rows(name, position, stored, computed)

    def _compare_rows(self, name: str, position: int, stored: Tensor, computed: Tensor) -> None:
        distance = float((stored - computed).norm() / stored.norm().clamp(min=1e-300))
        # Half precision rounds, and its kernels round differently from one batch size to another.
        coarse = 5e-2 if self._engine.is_coarse else 0.0
        allowed = max(1e-3, coarse, 4 * torch.finfo(self.opened.dtype).eps)
        if not distance <= allowed:
            raise ValueError(
                f"The index at {self.path} is of something else: the row of train example {position} at checkpoint "
                f"{name!r} differs from the one computed now by {distance:.2g} of its length. The settings agree, so "
                f"look at the example, at loss_fn= ({described(self._side.loss_fn)}), at forward_kwargs= and at the "
                "model's code, or pass another folder as index=."
            )

    def _check_data(self, stream: Stream, thorough: bool) -> None:
        """Compares the train set with what a complete index says of it."""
        n = self.opened.examples
        assert n is not None
        if stream.n_examples is not None:
            self._check_length(stream.n_examples)
        some = None if thorough or n <= CHECKED else _sample(n)
        last = -1
        for positions, _, _ in self._compared(stream, some if stream.n_examples is not None else None):
            last = int(positions[-1])
            if some is not None and stream.n_examples is None and last >= CHECKED:
                return  # a stream can only be read from its beginning
        self._check_length(last + 1)

    def _compared(self, stream: Stream, only: Tensor | None = None) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Batches with their examples' positions and fingerprints, which are what the index says, where it does."""
        there, known = self.opened.fingerprints()
        whole = ((torch.arange(start, start + batch_size(raw)), raw) for start, raw in stream)
        for positions, raw in whole if only is None else stream.picked(only):
            fingerprints = example_fingerprints(raw)
            self._compare(positions, fingerprints, there, known)
            yield positions, raw, fingerprints

    def _compare(self, positions: Tensor, found: Tensor, there: Tensor, known: Tensor) -> None:
        differ = _at(there, positions) & (found != _at(known, positions)).any(1)
        if differ.any():
            raise ValueError(self._other_data(f"example {int(positions[differ][0])} is the first that differs"))

    def _check_length(self, n: int) -> None:
        if self.opened.examples not in (None, n):
            raise ValueError(self._other_data(f"it has {n} examples, the index {self.opened.examples}"))

    def _other_data(self, how: str) -> str:
        return (
            f"The index at {self.path} is of another train_dataset: {how}. Pass the one it was built with, in the "
            "same order, or another folder as index=."
        )

    # --- the folder ---

    def _check_folder(self) -> None:
        if not self.path.is_dir():
            raise ValueError(f"index={str(self.path)!r} is a file; pass a folder of its own.")
        if Manifest.load(self.path) is None:
            strange = [
                p.name
                for p in self.path.iterdir()
                if p.suffix not in (UNFINISHED, ".lock", ".json", ".faiss") and not _is_ours(p)
            ]
            if strange:
                raise ValueError(
                    f"index={str(self.path)!r} is no index, and holds other things ({', '.join(sorted(strange)[:3])}): "
                    "pass a folder of its own."
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the index's lock, and explains what stands in the way of writing."""
        try:
            if self.processes.rank > 0:
                yield
                return
            self.path.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path / "building.lock", timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise BlockingIOError(
                errno.EAGAIN,
                f"another process is building the index at {self.path}. Wait for it, or start several at once with "
                "`accelerate launch`, which share the work",
            ) from error
        except OSError as error:
            if not str(error.filename).startswith(str(self.path)):  # of the train set, say
                raise
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise PermissionError(
                    error.errno,
                    f"the index at {self.path} lacks rows or is damaged, and the folder is read-only: "
                    f"{self._what_is_missing()}. Build it where it can be written, or restore it",
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    error.errno,
                    f"the disk of the index at {self.path} is full. Every shard written so far is kept: free some "
                    "space and run again, or choose index_dtype=torch.float16 or pool=True in another folder",
                ) from error
            raise

    def _what_is_missing(self) -> str:
        index = self.opened
        damaged = [f"damaged {file}" for file in index.damaged]
        n = "?" if index.examples is None else index.examples
        return "; ".join(damaged + [f"{index.rows_at(name)} of {n} examples at {name!r}" for name in index.shards])


class _Writer:
    """Collects rows of consecutive examples and writes them as shards."""

    def __init__(self, index: SketchIndex, checkpoint: str) -> None:
        self._index, self._folder = index, index.folder(checkpoint)
        self._owner = index.manifest.owner(checkpoint)
        self._row_bytes = index.width * index.dtype.itemsize
        self._clear()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.flush()  # after an error, too: what was computed is worth keeping

    def _clear(self) -> None:
        self._rows: list[Tensor] = []
        self._fingerprints: list[Tensor] = []
        self._start = self._next = self._bytes = 0
        self._since = time.monotonic()

    def add(self, positions: Tensor, rows: Tensor, fingerprints: Tensor) -> None:
        """Takes the rows of one batch."""
        for part in _runs(positions):
            at = positions[part].tolist()
            if self._rows and at[0] != self._next:
                self.flush()
            if not self._rows:
                self._start, self._since = at[0], time.monotonic()
            self._next = at[-1] + 1
            self._rows.append(rows[part])
            self._fingerprints.append(fingerprints[part])
            self._bytes += len(at) * self._row_bytes
        if self._bytes >= SHARD_BYTES:
            even = self._next - self._next % self._index.piece  # a piece inside one shard is scored without copying it
            self.flush(even if even > self._start else self._next)
        elif time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self, stop: int | None = None) -> None:
        """Writes what was collected, up to a position; None: all."""
        if not self._rows:
            return
        rows, fingerprints, after = torch.cat(self._rows), torch.cat(self._fingerprints), self._next
        n = (after if stop is None else stop) - self._start
        Shard.write(self._folder, self._start, rows[:n], fingerprints[:n], self._index.dtype, self._owner)
        start = self._start + n
        self._clear()
        if start < after:
            self._start, self._next, self._bytes = start, after, (after - start) * self._row_bytes
            self._rows, self._fingerprints = [rows[n:].clone()], [fingerprints[n:]]


class _Turns:
    """Whose turn it is: processes take so many batches each, one after another, the same without talking."""

    def __init__(self, processes: Processes, batches: int) -> None:
        self._processes, self._batches, self._asked = processes, batches, -1

    def is_mine(self) -> bool:
        """Whether the next batch is this process's."""
        self._asked += 1
        return (self._asked // self._batches) % self._processes.count == self._processes.rank


def _runs(positions: Tensor) -> list[slice]:
    """Slices of consecutive positions."""
    breaks = ((positions[1:] - positions[:-1]) != 1).nonzero().flatten().add(1).tolist()
    return [slice(a, b) for a, b in zip([0, *breaks], [*breaks, len(positions)], strict=True)]


def _at(known: Tensor, positions: Tensor) -> Tensor:
    """``known[positions]``, zero beyond its end."""
    inside = positions < len(known)
    found = known.new_zeros(len(positions), *known.shape[1:])
    found[inside] = known[positions[inside]]
    return found


def _sample(n: int) -> Tensor:
    """Runs of positions, evenly spread: neighbours are read together."""
    run = min(50, CHECKED // 2)
    starts = torch.linspace(0, n - run, CHECKED // run, dtype=torch.float64).long()
    return (starts.unsqueeze(1) + torch.arange(run)).flatten()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_ours(path: Path) -> bool:
    """Whether an entry of a folder without a manifest is one of an index whose manifest was lost."""
    return path.is_dir() and all(file.suffix in (".safetensors", UNFINISHED) for file in path.iterdir())
