"""`SketchIndex`: a folder of train sketches, looked at without a model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from captum_sdi.features import Noise, StepFeatures
from captum_sdi.index.manifest import NAME, RATE, Manifest
from captum_sdi.index.merge import copy_shards, merged_manifest
from captum_sdi.index.shards import DTYPES, DamagedError, Shard, is_shard_name
from captum_sdi.whole_file import check_replaceable
from captum_sdi.words import in_bytes

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
        self.shards: dict[str, list[Shard]] = {}
        """By checkpoint, in the order of their examples."""
        self.damaged: list[Path] = []
        """Files that are not what they were when they were written."""
        self._headers: dict[Path, tuple[tuple[int, int], Shard]] = {}  # with the file's size and time
        self._intact: dict[int, Shard] = {}  # by id, which is theirs as long as they are held here
        self.scan()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SketchIndex:
        """Look at an index; no model is needed, nothing is changed, and only headers are read.

        Args:
            path: The folder given to ``index=``.

        Returns:
            The index; ``print`` shows its summary.

        Raises:
            ValueError: If there is none, or its manifest is damaged.
        """
        folder = Path(os.fsdecode(path))
        manifest = Manifest.load(folder)
        if manifest is None:
            raise ValueError(
                f"There is no index at {folder}: no {NAME} in it. SDIInfluence(..., index={str(folder)!r})"
                ".build_index() writes one."
            )
        return cls(folder, manifest)

    @classmethod
    def merge(cls, index: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]]) -> SketchIndex:
        """Join indexes of consecutive parts of a train set to the index of all of it; the parts stay as they are.

        Each task of an array job indexes its own part at the same checkpoints, ``train.select(range(...))`` or a file.
        A merge that was killed goes on when it is called again. Scores are those of an index that one process built,
        to rounding, since examples at the parts' ends were run in other company.

        Args:
            index: The folder to write.
            parts: The parts' folders, in the order of their examples.

        Returns:
            The index.

        Raises:
            TypeError: If ``parts`` is a single path.
            ValueError: If a part is incomplete, damaged, of another model, data already merged, or other settings.
            OSError: If the disk is too small, or another process writes to the index.
        """
        is_list = isinstance(parts, Sequence) and not isinstance(parts, str)
        if not is_list or not all(isinstance(part, str | os.PathLike) for part in parts):
            raise TypeError(f"parts= must be a list of folders, got {parts!r}.")
        opened = [cls.open(part) for part in parts]
        folder = Path(os.fsdecode(index))
        merged = cls(folder, merged_manifest(folder, opened))
        copy_shards(merged, opened)
        return merged

    # --- summary ---

    @property
    def examples(self) -> int | None:
        """How many train examples it is of; None until a pass has counted them."""
        return self.manifest.examples

    @property
    def n_examples(self) -> int:
        """How many train examples a complete index is of.

        Raises:
            ValueError: If no pass has counted them.
        """
        if self.examples is None:
            raise ValueError(f"The index at {self.path} is incomplete: its train examples have not been counted.")
        return self.examples

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
        size = 0
        for shards in self.shards.values():
            size += sum(shard.path.stat().st_size for shard in shards)
        return size

    @property
    def complete(self) -> bool:
        """Whether every example is there at every checkpoint, as far as headers tell."""
        return bool(self.shards) and all(self.is_complete(name) for name in self.shards)

    def is_complete(self, checkpoint: str) -> bool:
        """Say whether every example is there at one checkpoint; False while nobody knows how many there are."""
        return self.examples is not None and self.rows_at(checkpoint) == self.examples

    def rows_at(self, checkpoint: str) -> int:
        """Count the examples that are there at one checkpoint."""
        return sum(shard.stop - shard.start for shard in self.shards.get(checkpoint, []))

    def __str__(self) -> str:
        settings = self.manifest.settings
        sketch = dict(settings["sketch"])
        kind = sketch.pop("kind")
        sketch_settings = ", ".join(f"{key}={value}" for key, value in sketch.items())
        state = "complete" if self.complete else "incomplete"
        examples = "not counted yet" if self.examples is None else f"{self.examples:,}"
        loop = ", ".join(settings["loop"]["modules"])
        n_shards = sum(len(shards) for shards in self.shards.values())
        lines = [
            f"index         {self.path}",
            f"state         {state}",
            f"examples      {examples}",
            f"sketch        {kind}({sketch_settings})",
            f"parameters    {len(settings['parameters'])}, loop {loop}",
            f"row           {self.width:,} x {self.manifest.dtype}",
            f"size          {in_bytes(self.bytes)} in {n_shards} {'shard' if n_shards == 1 else 'shards'}",
            f"loss          {settings['loss']}",
            f"written by    captum_sdi {settings['captum_sdi']}",
            "checkpoints",
        ]
        for name, entry in self.manifest.checkpoints.items():
            n_rows = self.rows_at(name)
            lines.append(f"  {name:<20} learning rate {entry[RATE]:g}, {n_rows:,} examples")
        lines += [f"damaged       {file}" for file in self.damaged]
        return "\n".join(lines)

    # --- shards ---

    def folder(self, checkpoint: str) -> Path:
        """Return where a checkpoint's shards are.

        Args:
            checkpoint: Its name.

        Returns:
            A folder inside the index's, made of what every file system allows in a name.
        """
        readable = re.sub(r"[^A-Za-z0-9._-]", "_", checkpoint)[-64:]
        digest = hashlib.blake2b(checkpoint.encode(), digest_size=4)
        return self.path / f"{readable}-{digest.hexdigest()}"

    def scan(self) -> None:
        """Look at the shards' headers anew.

        Raises:
            ValueError: If a shard is sound but belongs to something else.
        """
        self.damaged = []
        self.shards = {name: self._scanned(name) for name in self.manifest.checkpoints}

    def _scanned(self, checkpoint: str) -> list[Shard]:
        """List one checkpoint's sound shards, and note the others as damaged."""
        owner = self.manifest.owner(checkpoint)
        files = shard_files(self.folder(checkpoint))
        shards: list[Shard] = []
        next_example = 0
        for file in files:
            try:
                shard = self._header(file)
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            except DamagedError:
                self.damaged.append(file)
                continue
            if shard.owner != owner and shard.intact():
                raise ValueError(
                    f"{file} was written for another model, checkpoint, sketch or version than {self.path / NAME} "
                    "names. Move it away, or pass another folder as index=."
                )
            overlaps = shard.start < next_example
            if shard.owner != owner or overlaps or not self._could_hold(shard):
                self.damaged.append(file)
                continue
            shards.append(shard)
            next_example = shard.stop
        return shards

    def _could_hold(self, shard: Shard) -> bool:
        """Say whether a shard's claims agree with the manifest, before memory is set aside for them."""
        is_past_end = self.examples is not None and shard.stop > self.examples
        row_shape = shard.tensors["rows"].shape[1:]
        return not is_past_end and shard.dtype == self.dtype and row_shape == (self.width,)

    def _header(self, file: Path) -> Shard:
        """Read a shard's header; it is kept, and with it the map, while the file stays what it is."""
        status = file.stat()
        stamp = status.st_size, status.st_mtime_ns
        if file in self._headers:
            known_stamp, shard = self._headers[file]
            if known_stamp == stamp:
                return shard
        shard = Shard.read(file)
        self._headers[file] = stamp, shard
        return shard

    def verify(self) -> list[Path]:
        """Compare every shard with its checksum, once as long as the file does not change.

        Returns:
            The damaged ones, which are no longer among `shards`.

        Raises:
            ValueError: If an intact one holds numbers that are not finite.
        """
        unverified: list[Shard] = []
        for shards in self.shards.values():
            unverified += [shard for shard in shards if id(shard) not in self._intact]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            verdicts = list(threads.map(Shard.intact, unverified))
        for shard, is_intact in zip(unverified, verdicts, strict=True):
            if is_intact and not shard.finite():
                raise ValueError(f"{shard.path} holds numbers that are not finite, which no build writes: remove it.")
        for shard, is_intact in zip(unverified, verdicts, strict=True):
            if is_intact:
                self._intact[id(shard)] = shard
            else:
                self.damaged.append(shard.path)
        damaged = set(self.damaged)
        for name, shards in self.shards.items():
            self.shards[name] = [shard for shard in shards if shard.path not in damaged]
        return self.damaged

    def fingerprints(self, checkpoints: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Read which examples are there, and what they are.

        Args:
            checkpoints: At which; None: at any.

        Returns:
            ``(n,)`` whether each is there, and ``(n, 8)`` bytes, n reaching to the last that is.

        Raises:
            ValueError: If a shard claims an example far beyond all others.
        """
        shards: list[Shard] = []
        for name in checkpoints or self.shards:
            shards += self.shards[name]
        n_examples = max((shard.stop for shard in shards), default=0)
        n_rows = sum(shard.stop - shard.start for shard in shards)
        if n_examples > 10**7 + 64 * n_rows:  # the manifest may not know yet how many there are
            raise ValueError(f"{self.path} is damaged: a shard claims to hold example {n_examples - 1}. Remove it.")
        is_present = torch.zeros(n_examples, dtype=torch.bool)
        fingerprints = torch.zeros(n_examples, 8, dtype=torch.uint8)
        for shard in shards:
            is_present[shard.start : shard.stop] = True
            fingerprints[shard.start : shard.stop] = shard.mapped("fingerprints")
        return is_present, fingerprints

    # --- rows ---

    @property
    def piece(self) -> int:
        """How many examples a reader is best asked for at once; the same whatever the shards are."""
        return max(_LEAST, _PIECE // (4 * self.width))

    def features(self, rows: Tensor) -> StepFeatures:
        """Split rows into features of one bin.

        Args:
            rows: ``(n, D)``.

        Returns:
            Views of it, ``(n, 1, width)`` per parameter.
        """
        parameters = self.manifest.rows
        widths = [parameter.width for parameter in parameters]
        columns = rows.unsqueeze(1).split(widths, dim=-1)
        named_rows, noise = {}, {}
        for parameter, row in zip(parameters, columns, strict=True):
            named_rows[parameter.name] = row
            noise[parameter.name] = Noise(parameter.variance, parameter.parts)
        no_steps = torch.zeros(len(rows), dtype=torch.long)
        return StepFeatures(named_rows, noise, no_steps)

    def flat(self, features: StepFeatures) -> Tensor:
        """Join features to rows, bin by bin: the opposite of `features`.

        Args:
            features: ``(n, b, width)`` per parameter.

        Returns:
            ``(n, b, D)``.
        """
        rows = [features.rows[parameter.name] for parameter in self.manifest.rows]
        device = rows[0].device
        on_one_device = [row.to(device) for row in rows]
        return torch.cat(on_one_device, dim=-1)


def shard_files(folder: Path) -> list[Path]:
    """List the files of a checkpoint's folder that may be shards; whatever else is there is left alone.

    Returns:
        Regular files, in the order of their examples.

    Raises:
        ValueError: If the folder or one of them is a link: it would lead to what is not the index's.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link; an index has its shards in folders of its own: remove the link.")
    files = sorted(file for file in folder.glob("*") if is_shard_name(file.name))
    for file in files:
        check_replaceable(file)
    return files
