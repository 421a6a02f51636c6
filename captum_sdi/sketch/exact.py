"""`Exact`: every entry of every per-example gradient, with no randomness and no error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.features import Dense, Gradient, Noise, Outer
from captum_sdi.sketch.base import Projection


@dataclass(frozen=True)
class Exact:
    """Every entry of every per-example gradient: for small models, tests and ground truth.

    Memory is n × t × (number of targeted parameters); use `TensorSketch` when that does not fit.

    Example:
        >>> Exact().projection("core.weight", torch.empty(3, 4)).width
        12
    """

    pool = False

    def projection(
        self,
        name: str,
        parameter: Tensor,
        checkpoint: str = "",
    ) -> Projection:
        """Return the map that lists a gradient's entries; it depends on neither name nor checkpoint."""
        at_least_float32 = torch.promote_types(parameter.dtype, torch.float32)
        return ExactProjection(parameter, at_least_float32)


class ExactProjection:
    """The map that lists a gradient's entries."""

    noise = Noise(0.0)

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.width = parameter.numel()
        self.dtype = dtype
        self.device = parameter.device
        self._shape = parameter.shape

    def __call__(self, gradient: Gradient) -> Tensor:
        """List the entries of n gradients, ``(n, numel)``."""
        # Converted before it is formed: half precision would round the sum over tokens.
        converted = convert(gradient, self.dtype)
        entries = converted.entries(self._shape)
        return entries.reshape(-1, self.width)

    def checksum(self) -> bytes:
        """Return no bytes: nothing is drawn."""
        return b""


def convert(gradient: Gradient, dtype: torch.dtype) -> Gradient:
    """Return the gradient with its floating point tensors in ``dtype``."""
    if isinstance(gradient, Dense):
        return Dense(gradient.grads.to(dtype))
    rows = gradient.rows
    if rows.is_floating_point():
        rows = rows.to(dtype)
    return Outer(rows, gradient.cols.to(dtype))
