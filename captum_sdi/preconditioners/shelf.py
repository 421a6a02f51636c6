"""What was fitted is kept: in memory while its `SDIInfluence` lives, and in a file beside the index.

A file is known by a digest of everything that its tensors depend on, and is believed only if its content has the
digest that was written with it. A damaged one is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from captum_sdi.whole_file import UNFINISHED, check_replaceable, write_whole
from captum_sdi.words import warn_user

Tensors = dict[str, Tensor]

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}
"""As safetensors spells them: of what may be kept."""
BYTES_AT_ONCE = 2**24


class Shelf:
    """Where fitted tensors are kept.

    Args:
        folder: The index's; None keeps the last ones in memory alone.

    Example:
        >>> shelf = Shelf()
        >>> shelf.tensors("fisher", {"weights": "ab12"}, lambda: {"factor": torch.ones(2)})["factor"]
        tensor([1., 1.])
        >>> shelf.tensors("fisher", {"weights": "ab12"}, lambda: {"factor": torch.zeros(2)})["factor"]  # is there
        tensor([1., 1.])
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._last: tuple[str, Tensors] | None = None

    def tensors(
        self,
        kind: str,
        identity: Mapping[str, Any],
        compute: Callable[[], Tensors],
    ) -> Tensors:
        """Return what was kept under an identity, or compute and keep it.

        Args:
            kind: What they are, in one word.
            identity: Everything they depend on, as JSON can hold it.
            compute: Computes them.
        """
        text = json.dumps([kind, identity], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        if self._last is not None:
            last_key, last_tensors = self._last
            if last_key == key:
                return last_tensors
        if self.folder is None:
            tensors = compute()
        else:
            tensors = kept_tensors(self.folder / f"{kind}-{key[:16]}.safetensors", key, compute)
        self._last = key, tensors
        return tensors


def kept_tensors(
    file: Path,
    key: str,
    compute: Callable[[], Tensors],
) -> Tensors:
    """Return the tensors in a file, or compute and write them."""
    tensors = read_kept(file, key)
    if tensors is None:
        tensors = compute()
        write_kept(file, key, tensors)
    return tensors


def read_kept(file: Path, key: str) -> Tensors | None:
    """Read the tensors in a file, memory-mapped; None where there are none, or the file is damaged."""
    check_replaceable(file)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    is_sound = metadata.get("key") == key and metadata.get("digest") == content_digest(tensors)
    return tensors if is_sound else None


def write_kept(file: Path, key: str, tensors: Tensors) -> None:
    """Write tensors to a file, or warn that this is impossible: they are there in memory all the same."""
    metadata = {"key": key, "digest": content_digest(tensors)}

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as opened:
            write_safetensors(opened, tensors, metadata)

    try:
        write_whole(file, write)
    except OSError as error:
        warn_user(f"{file} could not be written ({error.strerror}): what is in it will be computed again next time.")


def scratch(shape: tuple[int, int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return a tensor whose memory is a file, which is gone when the tensor is.

    Args:
        shape: Its shape.
        dtype: Of its numbers.
        folder: Where the file is; None: the system's temporary folder.

    Raises:
        OSError: If the disk is full.
    """
    place = folder or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"scratch-{os.urandom(8).hex()}.safetensors.{os.getpid()}{UNFINISHED}"
    n_rows, n_columns = shape
    try:
        take_space(path, n_rows * n_columns * dtype.itemsize)
        tensor = torch.from_file(str(path), shared=True, size=n_rows * n_columns, dtype=dtype)
    finally:
        if os.name != "nt":  # Windows removes no file that is mapped: it stays until somebody does
            path.unlink(missing_ok=True)
    return tensor.view(shape)


def take_space(path: Path, n_bytes: int) -> None:
    """Make a file of a size, for which there is room: on a full disk, writing to mapped memory ends the process."""
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, n_bytes))
        except OSError as error:
            error.filename = str(path)
            raise


def write_safetensors(
    file: BinaryIO,
    tensors: Tensors,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file piece by piece: the library's own writer copies all tensors first."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor in tensors.values():
        for piece in pieces_of(tensor):
            file.write(piece)


def content_digest(tensors: Tensors) -> str:
    """Digest names, shapes and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        for piece in pieces_of(tensor):
            digest.update(piece)
    return digest.hexdigest()


def pieces_of(tensor: Tensor) -> list[memoryview]:
    """Return views of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return [content[start : start + BYTES_AT_ONCE] for start in range(0, len(content), BYTES_AT_ONCE)]
