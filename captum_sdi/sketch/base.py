"""What a sketch is: the seam for another way to turn a gradient into a row of numbers.

A sketch is a small frozen dataclass that holds its settings and its seed. For each parameter it makes a `Projection`,
a linear map from per-example gradients to rows; inner products of rows estimate inner products of gradients.
"""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from captum_sdi.features import Gradient, Noise


class Projection(Protocol):
    """A linear map from one parameter's per-example gradients to rows of ``width`` numbers."""

    width: int
    """How many numbers a row has."""
    noise: Noise
    """How far inner products of rows may be from those of gradients."""
    dtype: torch.dtype
    """Of the rows."""
    device: torch.device
    """Of the rows: the parameter's."""

    def __call__(self, gradient: Gradient) -> Tensor:
        """Map gradients of n examples to ``(n, width)``."""
        ...

    def checksum(self) -> bytes:
        """Digest the map's hash tables: another version of torch may draw other numbers."""
        ...


@runtime_checkable
class Sketch(Protocol):
    """How gradients are represented: `TensorSketch`, `Exact`, or a frozen dataclass of the user's.

    Its fields, as `dataclasses.asdict` gives them, say in an index what its rows are.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    """Every dataclass has them."""

    @property
    def pool(self) -> bool:
        """Whether the rows of all parameters are added up in a single one."""
        ...

    def projection(
        self,
        name: str,
        parameter: Tensor,
        checkpoint: str = "",
    ) -> Projection:
        """Return the map for one parameter at one checkpoint, the same in every process.

        Args:
            name: The parameter's name, from which random maps are seeded.
            parameter: The parameter: its shape, dtype and device.
            checkpoint: The checkpoint's name: maps of different checkpoints should be independent, so that their
                errors average out.
        """
        ...
