"""What an index would be of if it were written now: the settings, and hashes of the model's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from captum_sdi.data.side import Side
from captum_sdi.features import LoopSpec, canonical_name
from captum_sdi.index.manifest import RATE
from captum_sdi.index.weights import WeightHashes
from captum_sdi.sketch.base import Sketch

if TYPE_CHECKING:
    from captum_sdi.passes import Point


@dataclass(frozen=True)
class Identity:
    """What the rows of one checkpoint depend on, as a `Manifest` holds it."""

    settings: dict[str, Any]
    """What the rows of every checkpoint depend on."""
    checkpoint: dict[str, Any]
    """What those of this checkpoint depend on; and its learning rate, which scores are multiplied by."""


def identity_at(
    point: Point,
    sketch: Sketch,
    side: Side,
    hashes: WeightHashes,
) -> Identity:
    """Describe the rows that the model would give at a checkpoint.

    Args:
        point: The model there.
        sketch: How gradients are represented.
        side: The training side.
        hashes: Of its weights, as far as they are known.

    Returns:
        The settings, and hashes of what this checkpoint holds.
    """
    checkpoint = {
        "weights": hashes.of_model(point.model),
        "hash tables": point.capture.checksum(),
        RATE: point.checkpoint.rate,
    }
    return Identity(settings(sketch, point.capture.targets(), point.loop, side), checkpoint)


def settings(
    sketch: Sketch,
    parameters: Mapping[str, Tensor],
    loop: LoopSpec,
    side: Side,
) -> dict[str, Any]:
    """Describe what the rows of every checkpoint depend on.

    Args:
        sketch: How gradients are represented.
        parameters: The targeted parameters.
        loop: What repeats.
        side: The training side.

    Returns:
        What JSON can hold.
    """
    shapes = {canonical_name(name): list(parameter.shape) for name, parameter in parameters.items()}
    described_settings = {
        "captum_sdi": version("captum-sdi"),
        "sketch": {"kind": type(sketch).__name__, **asdict(sketch)},
        "parameters": shapes,
        "loop": {"modules": loop.modules, "anchors": loop.anchors},
        "loss": described(side.loss_fn),
        "forward_kwargs": described(side.forward_kwargs),
    }
    return json.loads(json.dumps(described_settings))


def described(value: Any) -> str:
    """Describe a function by its name, anything else by its representation; the same in every process.

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
