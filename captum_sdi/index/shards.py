"""A shard: the rows of consecutive train examples in one safetensors file, whole or not there at all.

It holds ``rows (n, D)``, every parameter's row of an example side by side, ``fingerprints (n, 8)`` of what the examples
are, and for half precision ``scales (n,)``, powers of two that bring each row's largest entry to one: gradients are
often smaller than what float16 can tell from zero.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from captum_sdi.whole_file import write_whole

SUFFIX = ".safetensors"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ALIGNMENT = 64  # bytes
HALF_PRECISION = (torch.float16, torch.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


class DamagedError(Exception):
    """A file that is not what a shard was when it was written."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    """Offset of its first byte in the file."""
    stop: int
    """Offset after its last byte."""


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
    """Of the file's content when it was written."""
    tensors: dict[str, Stored]
    """By name."""

    @staticmethod
    def write(
        folder: Path,
        start: int,
        rows: Tensor,
        fingerprints: Tensor,
        dtype: torch.dtype,
        owner: str,
    ) -> Shard:
        """Write a shard.

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
        if dtype in HALF_PRECISION:
            tensors["scales"] = powers_of_two(rows.abs().amax(1).float())
            rows = rows / tensors["scales"].unsqueeze(1)
        tensors["rows"] = rows.to(dtype).contiguous()
        return Shard.write_stored(folder, start, tensors, owner)

    @staticmethod
    def write_stored(
        folder: Path,
        start: int,
        tensors: dict[str, Tensor],
        owner: str,
    ) -> Shard:
        """Write a shard of rows as they are stored.

        Args:
            folder: The checkpoint's.
            start: Position of the first example.
            tensors: ``rows``, ``fingerprints`` and, for half precision, ``scales``.
            owner: See `owner`.

        Returns:
            The shard.
        """
        stop = start + len(tensors["rows"])
        metadata = shard_metadata(start, stop, owner)
        metadata["digest"] = content_digest(metadata, tensors)
        # Where a map of the file begins is the start of a page: rows that begin at 64 bytes of it are aligned as torch
        # aligns its own tensors, so that sums over either come out the same.
        metadata["pad"] = ""
        metadata["pad"] = " " * (-header_length(tensors, metadata) % ALIGNMENT)
        path = folder / file_name(start, stop)
        content = save(tensors, metadata)
        # By our own write, not `save_file`, whose error for a full disk is no OSError.
        write_whole(path, lambda unfinished: unfinished.write_bytes(content))
        return Shard.read(path)

    @staticmethod
    def read(path: Path) -> Shard:
        """Read a shard's header.

        Returns:
            The shard.

        Raises:
            DamagedError: If the file is no shard, or has another size than its header says.
        """
        try:
            shard = parsed_header(path)
            size_by_header = max(stored.stop for stored in shard.tensors.values())
            counts = {stored.shape[0] for stored in shard.tensors.values()}
            check_layout(shard)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise DamagedError(f"{path}: {error!r}") from error
        if path.name != file_name(shard.start, shard.stop):  # a sound shard in another's place
            raise DamagedError(f"{path}: holds examples {shard.start} to {shard.stop}")
        size = path.stat().st_size
        if size != size_by_header or counts != {shard.stop - shard.start}:
            raise DamagedError(f"{path}: {size} bytes instead of {size_by_header}")
        return shard

    @cached_property
    def rows(self) -> Tensor:
        """``(n, D)`` as stored, memory-mapped; not to be written to."""
        return self.mapped("rows")

    @property
    def dtype(self) -> torch.dtype:
        """In which rows are stored."""
        return self.tensors["rows"].dtype

    @property
    def has_scales(self) -> bool:
        """Whether rows are to be multiplied by ``scales``."""
        return "scales" in self.tensors

    def mapped(self, name: str) -> Tensor:
        """Map one of the tensors: it is read from disk as far as it is used, and forgotten with the tensor.

        Args:
            name: ``"rows"``, ``"fingerprints"`` or ``"scales"``.

        Returns:
            The tensor, not to be written to.
        """
        stored = self.tensors[name]
        size = self.path.stat().st_size
        content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        return content[stored.start : stored.stop].view(stored.dtype).view(stored.shape)

    def finite(self) -> bool:
        """Return whether all numbers are finite; a shard of another author may hold others."""
        numbers = [self.mapped(name) for name in ("rows", "scales") if name in self.tensors]
        return all(tensor.numel() == 0 or torch.stack(tensor.aminmax()).isfinite().all() for tensor in numbers)

    def intact(self) -> bool:
        """Compare the file's content with its checksum; reads all of it."""
        try:
            tensors = {name: self.mapped(name) for name in self.tensors}
            return self.digest == content_digest(shard_metadata(self.start, self.stop, self.owner), tensors)
        except (OSError, RuntimeError):
            return False


# --- the file ---


def file_name(start: int, stop: int) -> str:
    """Return the name of the file that holds examples ``start`` to ``stop``."""
    return f"{start:012d}-{stop:012d}{SUFFIX}"


def is_shard_name(name: str) -> bool:
    """Return whether a file of that name may be a shard."""
    return re.fullmatch(r"\d{12,}-\d{12,}\.safetensors", name, re.ASCII) is not None


def shard_metadata(
    start: int,
    stop: int,
    owner: str,
) -> dict[str, str]:
    """Return what a header says beside where the tensors lie."""
    return {"start": str(start), "stop": str(stop), "owner": owner}


def header_length(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Return the offset of the data; rows come first in the data, being of the widest dtype."""
    data = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    return len(save(tensors, metadata)) - data


def parsed_header(path: Path) -> Shard:
    """Read a safetensors header: its length in eight bytes, then JSON."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__")
    first_byte = 8 + length
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = torch.Size(entry["shape"])
        tensors[name] = Stored(_SAFETENSORS_DTYPES[entry["dtype"]], shape, first_byte + start, first_byte + stop)
    start, stop = int(metadata["start"]), int(metadata["stop"])
    if "rows" not in tensors:
        raise KeyError("rows")
    return Shard(path, start, stop, metadata["owner"], metadata["digest"], tensors)


def check_layout(shard: Shard) -> None:
    """Check that a header's tensors are what a shard holds, and lie in the file as they should."""
    if not 0 <= shard.start < shard.stop < 2**48:
        raise ValueError(f"examples {shard.start} to {shard.stop}")
    names = {"rows", "fingerprints"} | ({"scales"} if shard.dtype in HALF_PRECISION else set())
    if set(shard.tensors) != names:
        raise ValueError(f"tensors {sorted(shard.tensors)}")
    if shard.dtype not in DTYPES.values() or shard.tensors["fingerprints"].shape[1:] != (8,):
        raise ValueError("rows or fingerprints of another kind")
    for name, stored in shard.tensors.items():
        if stored.stop - stored.start != math.prod(stored.shape) * stored.dtype.itemsize or stored.start < 8:
            raise ValueError(f"{name} of another size")


def content_digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Return a digest of a shard's metadata and tensors."""
    # SHA-256 because processors compute it in hardware: three times as fast here as BLAKE2.
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest_tensor(digest, name, tensor)
    return digest.hexdigest()


def digest_tensor(
    digest: Any,
    name: str,
    tensor: Tensor,
) -> None:
    """Add a tensor's name, dtype, shape and bytes to a digest of `hashlib`."""
    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]


def powers_of_two(numbers: Tensor) -> Tensor:
    """Round numbers up to powers of two.

    Returns:
        ``(n,)`` float32.

    Example:
        >>> powers_of_two(torch.tensor([0.3, 3.0]))
        tensor([0.5000, 4.0000])
    """
    return torch.ldexp(torch.ones(len(numbers)), torch.frexp(numbers).exponent)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, as in `DTYPES`."""
    return str(dtype).removeprefix("torch.")
