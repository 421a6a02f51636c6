"""`SketchIndex`: a folder of train sketches, looked at and read without a model."""

from __future__ import annotations

import bisect
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from captum_sdi.features import Noise, StepFeatures
from captum_sdi.index.manifest import NAME, RATE, Manifest
from captum_sdi.index.shards import ALIGNED, DTYPES, SUFFIX, DamagedError, Shard

_PIECE, _LEAST = 2**22, 64
"""Bytes of rows that are multiplied at once, and how many rows at least: with fewer a matrix product is slow."""


class SketchIndex:
    """The step-summed sketches of a train set, per checkpoint, on disk; `SDIInfluence` writes it with ``index=``.

    Args:
        path: The folder.
        manifest: What it is of.

    Example:
        >>> import tempfile
        >>> from captum_sdi import SDIInfluence
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train = parity(12, max_bits=4)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     built = SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4, index=folder).build_index()
        ...     index = SketchIndex.open(folder)
        >>> index.examples, index.checkpoints, index.dim, index.complete
        (12, ['current'], 2048, True)
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._known: dict[Path, tuple[tuple[int, int], Shard]] = {}
        self._intact: dict[int, Shard] = {}
        self.shards: dict[str, list[Shard]] = {}
        """By checkpoint, in the order of their examples."""
        self.damaged: list[Path] = []
        """Files that are not what they were when they were written."""
        self.scan()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SketchIndex:
        """Looks at an index; no model is needed, nothing is changed, and only headers are read.

        Args:
            path: The folder given to ``index=``.

        Returns:
            The index; ``print`` shows its summary.

        Raises:
            ValueError: There is none, or its manifest is damaged.
        """
        folder = Path(os.fsdecode(path))
        manifest = Manifest.load(folder)
        if manifest is None:
            raise ValueError(
                f"There is no index at {folder}: no {NAME} in it. SDIInfluence(..., index={str(folder)!r})"
                ".build_index() writes one."
            )
        return cls(folder, manifest)

    # --- summary ---

    @property
    def examples(self) -> int | None:
        """How many train examples it is of; None until a pass has counted them."""
        return self.manifest.examples

    @property
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints."""
        return list(self.manifest.checkpoints)

    @property
    def dim(self) -> int | None:
        """Numbers per parameter, or for all with ``pool=True``; None with `Exact`."""
        return self.manifest.settings["sketch"].get("dim")

    @property
    def width(self) -> int:
        """Numbers per example and checkpoint."""
        return self.manifest.width

    @property
    def dtype(self) -> torch.dtype:
        """In which rows are stored."""
        return DTYPES[self.manifest.dtype]

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.path.stat().st_size for shards in self.shards.values() for shard in shards)

    @property
    def complete(self) -> bool:
        """Whether every example is there at every checkpoint, as far as headers tell."""
        return bool(self.shards) and all(self.is_complete(name) for name in self.shards)

    def is_complete(self, checkpoint: str) -> bool:
        """Whether every example is there at one checkpoint.

        Args:
            checkpoint: Its name.

        Returns:
            False also while nobody knows how many there are.
        """
        return self.examples is not None and self.rows_at(checkpoint) == self.examples

    def rows_at(self, checkpoint: str) -> int:
        """How many examples are there at one checkpoint.

        Args:
            checkpoint: Its name.

        Returns:
            The number.
        """
        return sum(shard.stop - shard.start for shard in self.shards.get(checkpoint, []))

    def __str__(self) -> str:
        settings = self.manifest.settings
        sketch = ", ".join(f"{key}={value}" for key, value in settings["sketch"].items() if key != "kind")
        examples = "not counted yet" if self.examples is None else f"{self.examples:,}"
        lines = [
            f"index         {self.path}",
            f"state         {'complete' if self.complete else 'incomplete'}",
            f"examples      {examples}",
            f"sketch        {settings['sketch']['kind']}({sketch})",
            f"parameters    {len(settings['parameters'])}, loop {', '.join(settings['loop']['modules'])}",
            f"row           {self.width:,} x {self.manifest.dtype}",
            f"size          {self.bytes / 2**20:,.1f} MiB in {sum(map(len, self.shards.values()))} shards",
            f"loss          {settings['loss']}",
            f"written by    captum_sdi {settings['captum_sdi']}",
            "checkpoints",
        ]
        for name, entry in self.manifest.checkpoints.items():
            lines.append(f"  {name:<20} learning rate {entry[RATE]:g}, {self.rows_at(name):,} examples")
        lines += [f"damaged       {file}" for file in self.damaged]
        return "\n".join(lines)

    # --- shards ---

    def folder(self, checkpoint: str) -> Path:
        """Where a checkpoint's shards are.

        Args:
            checkpoint: Its name.

        Returns:
            A folder inside the index's, made of what every file system allows in a name.
        """
        digest = hashlib.blake2b(checkpoint.encode(), digest_size=4).hexdigest()
        return self.path / f"{re.sub(r'[^A-Za-z0-9._-]', '_', checkpoint)[-64:]}-{digest}"

    def scan(self) -> None:
        """Looks at the shards' headers anew.

        Raises:
            ValueError: A shard is sound but belongs to something else.
        """
        self.damaged = []
        self.shards = {name: self._scanned(name) for name in self.manifest.checkpoints}

    def _scanned(self, checkpoint: str) -> list[Shard]:
        owner, folder = self.manifest.owner(checkpoint), self.folder(checkpoint)
        found: list[Shard] = []
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                shard = self._read(path)
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            except DamagedError:
                self.damaged.append(path)
                continue
            if shard.owner != owner and shard.intact():
                raise ValueError(
                    f"{path} was written for another model, checkpoint, sketch or version than {self.path / NAME} "
                    "names. Move it away, or pass another folder as index=."
                )
            after = found[-1].stop if found else 0
            if shard.owner != owner or shard.start < after:
                self.damaged.append(path)
            else:
                found.append(shard)
        return found

    def _read(self, path: Path) -> Shard:
        """A shard's header, and with it its map: kept while the file stays what it is."""
        stamp = _stamp(path)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            self._known[path] = known = (stamp, Shard.read(path))
        return known[1]

    def verify(self) -> list[Path]:
        """Compares every shard with its checksum, once as long as the file does not change.

        Returns:
            The damaged ones, which are no longer among `shards`.
        """
        unknown = [shard for shards in self.shards.values() for shard in shards if id(shard) not in self._intact]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            intact = list(threads.map(Shard.intact, unknown))
        for shard, sound in zip(unknown, intact, strict=True):
            if sound:
                self._intact[id(shard)] = shard
            else:
                self.damaged.append(shard.path)
        bad = set(self.damaged)
        self.shards = {name: [s for s in shards if s.path not in bad] for name, shards in self.shards.items()}
        return self.damaged

    def fingerprints(self, checkpoints: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Which examples are there, and what they are.

        Args:
            checkpoints: At which; None: at any.

        Returns:
            ``(n,)`` whether each is there, and ``(n, 8)`` bytes, n reaching to the last that is.
        """
        shards = [shard for name in checkpoints or self.shards for shard in self.shards[name]]
        there = torch.zeros(max((shard.stop for shard in shards), default=0), dtype=torch.bool)
        known = torch.zeros(len(there), 8, dtype=torch.uint8)
        for shard in shards:
            there[shard.start : shard.stop] = True
            known[shard.start : shard.stop] = shard.mapped("fingerprints")
        return there, known

    # --- rows ---

    @property
    def piece(self) -> int:
        """How many examples `Reader.read` is best asked for at once; the same whatever the shards are."""
        return max(_LEAST, _PIECE // (4 * self.width))

    def features(self, rows: Tensor) -> StepFeatures:
        """Rows as features of one bin.

        Args:
            rows: ``(n, D)``.

        Returns:
            Views of it, ``(n, 1, width)`` per parameter.
        """
        columns = rows.unsqueeze(1).split([width for _, width, *_ in self.manifest.rows], dim=-1)
        named = {name: row for (name, *_), row in zip(self.manifest.rows, columns, strict=True)}
        noise = {name: Noise(variance, parts) for name, _, variance, parts in self.manifest.rows}
        return StepFeatures(named, noise, torch.zeros(len(rows), dtype=torch.long))

    def flat(self, features: StepFeatures) -> Tensor:
        """The opposite of `features`, for each bin.

        Args:
            features: ``(n, b, width)`` per parameter.

        Returns:
            ``(n, b, D)``.
        """
        rows = [features.rows[name] for name, *_ in self.manifest.rows]
        return torch.cat([row.to(rows[0].device) for row in rows], dim=-1)


class Reader:
    """Rows of one checkpoint, through memory maps of its shards.

    Args:
        index: The index.
        checkpoint: The checkpoint's name.
        dtype: Of the rows that are handed out.
    """

    def __init__(self, index: SketchIndex, checkpoint: str, dtype: torch.dtype) -> None:
        self._shards, self._dtype = index.shards[checkpoint], dtype
        self._buffer = torch.empty(0, index.width, dtype=dtype)
        self._starts = [shard.start for shard in self._shards]

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of consecutive examples.

        Args:
            start: Position of the first.
            stop: Position after the last.

        Returns:
            ``(stop - start, D)``, not to be written to, and overwritten by the next call.
        """
        pieces = list(self._pieces(start, stop))
        if len(pieces) == 1 and (whole := self._as_stored(*pieces[0][:2])) is not None:
            return whole
        if len(self._buffer) < stop - start:
            self._buffer = self._buffer.new_empty(stop - start, self._buffer.shape[1])
        for shard, inside, place in pieces:
            target = self._buffer[place].copy_(shard.rows[inside])
            if "scales" in shard.tensors:
                target.mul_(shard.mapped("scales")[inside].unsqueeze(1))
        return self._buffer[: stop - start]

    def gather(self, positions: Sequence[int]) -> Tensor:
        """Rows of some examples.

        Args:
            positions: Their positions.

        Returns:
            ``(n, D)``.
        """
        rows = torch.empty(len(positions), self._buffer.shape[1], dtype=self._dtype)
        for i in sorted(range(len(positions)), key=positions.__getitem__):  # in the order they lie on disk
            rows[i] = self.read(positions[i], positions[i] + 1)[0]
        return rows

    def _as_stored(self, shard: Shard, inside: slice) -> Tensor | None:
        """The map itself, where it has the right dtype and is aligned like a tensor of torch's own; else None."""
        # Everything else is copied, so that sums are the same to the last bit wherever shards happen to end.
        rows = shard.rows[inside]
        return rows if shard.dtype == self._dtype and rows.data_ptr() % ALIGNED == 0 else None

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Shard, slice, slice]]:
        """Shards that hold parts of a range: where inside each, and where in the range."""
        number, at = bisect.bisect_right(self._starts, start) - 1, start
        while at < stop:
            shard = self._shards[number]
            end = min(stop, shard.stop)
            assert shard.start <= at < end, f"position {at} is not in the index"
            yield shard, slice(at - shard.start, end - shard.start), slice(at - start, end - start)
            at, number = end, number + 1


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
