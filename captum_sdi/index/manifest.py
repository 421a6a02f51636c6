"""What an index is of: everything its rows depend on, as JSON that a person can read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.data.side import Side
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.index.shards import written_whole
from captum_sdi.sketch.base import Sketch

NAME, RATE = "manifest.json", "learning rate"
_FORMAT = {"format": "captum_sdi.SketchIndex", "format_version": 2}


@dataclass
class Manifest:
    """The content of ``manifest.json``."""

    settings: dict[str, Any]
    """What the rows of every checkpoint depend on, by the words of an error message."""
    dtype: str
    """In which rows are stored."""
    rows: list[tuple[str, int, float, int]]
    """The columns: parameter (or the pooled row), how many, and their `Noise`, in order."""
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: a hash of the weights, one of the hash tables, the learning rate."""
    examples: int | None = None
    """How many train examples there are, once a pass has counted them."""
    fingerprint: str | None = None
    """A hash of their content."""

    @property
    def width(self) -> int:
        """Numbers per example and checkpoint, D."""
        return sum(width for _, width, *_ in self.rows)

    def owner(self, checkpoint: str) -> str:
        """A digest of everything a checkpoint's rows depend on; each of its shards carries it.

        Args:
            checkpoint: Its name.

        Returns:
            The digest.
        """
        identity = {key: value for key, value in self.checkpoints[checkpoint].items() if key != RATE}
        said = json.dumps([self.settings, self.dtype, checkpoint, identity], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes it, whole or not at all.

        Args:
            folder: The index's.
        """
        said = json.dumps({**_FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        written_whole(folder / NAME, lambda unfinished: _write(unfinished, said))

    @staticmethod
    def load(folder: Path) -> Manifest | None:
        """Reads it.

        Args:
            folder: The index's.

        Returns:
            The manifest, or None when there is none.

        Raises:
            ValueError: It is damaged, or that of another format.
        """
        file = folder / NAME
        if not file.is_file():
            return None
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            found = {key: said.pop(key, None) for key in _FORMAT}
            manifest = Manifest(**said)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Remove it: the next build writes it anew and keeps every shard that "
                "belongs to the model, checkpoints and settings it is given."
            ) from error
        if found != _FORMAT:
            raise ValueError(f"{file} says {found}, this version of captum_sdi reads {_FORMAT}. Pass another folder.")
        return manifest


def _write(path: Path, said: str) -> None:
    path.write_text(said + "\n", encoding="utf-8")


def settings(
    version: str, sketch: Sketch, parameters: Mapping[str, Tensor], loop: LoopSpec, side: Side
) -> dict[str, Any]:
    """What the rows of every checkpoint depend on.

    Args:
        version: Of this library.
        sketch: How gradients are represented.
        parameters: The targeted parameters.
        loop: What repeats.
        side: The training side.

    Returns:
        What JSON can hold.
    """
    said = {
        "captum_sdi": version,
        "sketch": {"kind": type(sketch).__name__, **asdict(sketch)},
        "parameters": {canonical_name(name): list(parameter.shape) for name, parameter in parameters.items()},
        "loop": {"modules": loop.modules, "anchors": loop.anchors},
        "loss": described(side.loss_fn),
        "forward_kwargs": described(side.forward_kwargs),
    }
    return json.loads(json.dumps(said))


def described(value: Any) -> str:
    """A function by its name, anything else by its representation; the same in every process.

    Args:
        value: A loss function, or forward keywords.

    Returns:
        The description.

    Example:
        >>> described(len), described({"n_loops": 4})
        ('builtins.len', "{'n_loops': 4}")
    """
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def differences(stored: Any, live: Any, name: str = "") -> list[str]:
    """What an index says and a model does not, in words.

    Args:
        stored: The index's part of the manifest.
        live: What it would be now.
        name: What the two are called.

    Returns:
        One line for each difference.

    Example:
        >>> differences({"dim": 64, "seed": 0}, {"dim": 32, "seed": 0}, "sketch")
        ['sketch dim: 64 in the index, 32 here']
    """
    if isinstance(stored, dict) and isinstance(live, dict):
        keys = list(dict.fromkeys([*stored, *live]))
        return [line for key in keys for line in differences(stored.get(key), live.get(key), f"{name} {key}".strip())]
    return [] if stored == live else [f"{name}: {_short(stored)} in the index, {_short(live)} here"]


def _short(value: Any) -> str:
    said = "none" if value is None else str(value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def weights_hash(model: nn.Module) -> str:
    """A hash of all weights and buffers of a model.

    Args:
        model: The model.

    Returns:
        32 hexadecimal digits.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = sorted((canonical_name(name), tensor.detach()) for name, tensor in state.items())
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
        digests = list(threads.map(_tensor_hash, *zip(*named, strict=True)))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _tensor_hash(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return digest.digest()
