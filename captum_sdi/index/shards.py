"""A shard: the rows of consecutive train examples in one safetensors file, whole or not there at all.

It holds ``rows (n, D)``, every parameter's row of an example side by side, ``fingerprints (n, 8)`` of what the examples
are, and for half precision ``scales (n,)``, powers of two that bring each row's largest entry to one: gradients are
often smaller than what float16 can tell from zero.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from captum_sdi.whole_file import write_whole

SUFFIX = ".safetensors"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALIGNED = 64  # bytes
_HALF = (torch.float16, torch.bfloat16)
_NAMES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


class DamagedError(Exception):
    """A file that is not what a shard was when it was written."""


@dataclass(frozen=True)
class Shard:
    """One file, known by its header; `intact` reads the rest."""

    path: Path
    start: int
    """Position of the first example."""
    stop: int
    """Position after the last."""
    owner: str
    """A digest of what the rows depend on: the index's settings and the checkpoint's weights."""
    digest: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]]
    """By name: dtype, shape, and the offset in the file."""

    @staticmethod
    def write(folder: Path, start: int, rows: Tensor, fingerprints: Tensor, dtype: torch.dtype, owner: str) -> Shard:
        """Writes a shard.

        Args:
            folder: The checkpoint's.
            start: Position of the first example.
            rows: ``(n, D)`` on the CPU.
            fingerprints: ``(n, 8)`` bytes.
            dtype: In which rows are stored.
            owner: See `owner`.

        Returns:
            The shard.
        """
        tensors = {"fingerprints": fingerprints}
        if dtype in _HALF:
            largest = rows.abs().amax(1).float()
            tensors["scales"] = torch.ldexp(torch.ones(len(rows)), torch.frexp(largest).exponent)
            rows = rows / tensors["scales"].unsqueeze(1)
        tensors["rows"] = rows.to(dtype).contiguous()
        stop = start + len(rows)
        metadata = {"start": str(start), "stop": str(stop), "owner": owner}
        metadata["digest"] = _digest(metadata, tensors)
        # Where a map of the file begins is the start of a page: rows that begin at 64 bytes of it are aligned as torch
        # aligns its own tensors, so that sums over either come out the same.
        metadata["pad"] = ""
        metadata["pad"] = " " * (-_header(tensors, metadata) % ALIGNED)
        path = folder / _name(start, stop)
        # By our own write, not `save_file`, whose error for a full disk is no OSError.
        write_whole(path, lambda unfinished: unfinished.write_bytes(save(tensors, metadata)))
        return Shard.read(path)

    @staticmethod
    def read(path: Path) -> Shard:
        """Reads a shard's header.

        Args:
            path: The file.

        Returns:
            The shard.

        Raises:
            DamagedError: It is none, or has another size than its header says.
        """
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, size)))
            metadata = header.pop("__metadata__")
            tensors = {
                name: (_NAMES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            said = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
            found = Shard(
                path, int(metadata["start"]), int(metadata["stop"]), metadata["owner"], metadata["digest"], tensors
            )
            counts = {shape[0] for _, shape, _ in tensors.values()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedError(f"{path}: {error!r}") from error
        if path.name != _name(found.start, found.stop):  # a sound shard in another's place
            raise DamagedError(f"{path}: holds examples {found.start} to {found.stop}")
        if said != size or counts != {found.stop - found.start}:
            raise DamagedError(f"{path}: {size} bytes instead of {said}")
        return found

    @cached_property
    def rows(self) -> Tensor:
        """``(n, D)`` as stored, memory-mapped; not to be written to."""
        return self.mapped("rows")

    @property
    def dtype(self) -> torch.dtype:
        """In which rows are stored."""
        return self.tensors["rows"][0]

    def mapped(self, name: str) -> Tensor:
        """One of its tensors, memory-mapped: read from disk as far as it is used, forgotten with the tensor.

        Args:
            name: ``"rows"``, ``"fingerprints"`` or ``"scales"``.

        Returns:
            The tensor, not to be written to.
        """
        dtype, shape, offset = self.tensors[name]
        whole = torch.from_file(str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8)
        size = dtype.itemsize * torch.Size(shape).numel()
        return whole[offset : offset + size].view(dtype).view(shape)

    def intact(self) -> bool:
        """Whether the checksum is that of what is in the file; reads all of it."""
        metadata = {"start": str(self.start), "stop": str(self.stop), "owner": self.owner}
        try:
            return self.digest == _digest(metadata, {name: self.mapped(name) for name in self.tensors})
        except (OSError, RuntimeError):
            return False


def _name(start: int, stop: int) -> str:
    return f"{start:012d}-{stop:012d}{SUFFIX}"


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """How long the part before the data is; rows come first in the data, being of the widest dtype."""
    return len(save(tensors, metadata)) - sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    # SHA-256 because processors compute it in hardware: three times as fast here as BLAKE2.
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
