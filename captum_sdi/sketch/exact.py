"""How one parameter's per-example gradient becomes a row of numbers: `TensorSketch` and `Exact`.

The gradient of a weight matrix for one example is a sum of outer products over token positions,
G = Σ_p u_p v_pᵀ. A count-sketch of a vector x has entries C(x)_b = Σ_{i: h(i)=b} s(i) x_i with random buckets h and
signs s. TensorSketch (Pham & Pagh, KDD 2013) sketches G with buckets h(r) + h'(c) mod d and signs s(r) s'(c), which
is a circular convolution of the two count-sketches, hence a product after an FFT:

    FFT(TS(G)) = Σ_p FFT(C(u_p)) ⊙ FFT(C'(v_p))          G itself is never formed

Inner products are preserved in expectation. Because Parseval holds we stay in the Fourier domain: `pack_spectrum`
lays a half spectrum out as exactly d real numbers with the same inner products, so rows of different token positions,
layers' uses and loop steps simply add up there.

The hashes never collide inside a factor while it is no longer than d, nor inside its blocks of d entries when it is
longer. That costs nothing and takes about a quarter off the error. Entries (r, c) and (r', c') collide when
h(r) - h(r') = h'(c') - h'(c) mod d. One random permutation h makes every difference equally likely, so the other
factor may keep its order: the shorter one is permuted (`_Permutation`), the longer one read as it lies in memory
(`_Rotation`). Where a factor fits into d/2 buckets the other one is dealt out to two parts of the row, each a
TensorSketch of half the matrix with half the buckets: entries still share a number with one in d others, and the
factor that fits is hashed and transformed once for both, at half the length. It takes a d that is a multiple of 64 and
a longer factor of a multiple of 32. This file is the only source of randomness in a score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.features import Dense, Gradient, Noise
from captum_sdi.sketch.base import Projection


@dataclass(frozen=True)
class Exact:
    """Keeps every entry of every per-example gradient: small models, tests and ground truth.

    Memory is n × t × (number of targeted parameters); use `TensorSketch` when that does not fit.

    Example:
        >>> Exact().projection("core.weight", torch.empty(3, 4)).width
        12
    """

    pool = False

    def projection(self, name: str, parameter: Tensor, checkpoint: str = "") -> Projection:
        """The identity, flattened.

        Args:
            name: The parameter's name; the identity does not depend on it.
            parameter: The parameter.
            checkpoint: The checkpoint's name; the identity does not depend on it.

        Returns:
            The map from gradients to ``(n, numel)``.
        """
        return ExactProjection(parameter, torch.promote_types(parameter.dtype, torch.float32))


class ExactProjection:
    """Every entry, flattened."""

    noise = Noise(0.0)

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.device = parameter.numel(), dtype, parameter.device

    def __call__(self, gradient: Gradient) -> Tensor:
        if isinstance(gradient, Dense):
            return flatten_entries(gradient.grads.to(self.dtype))
        rows, cols = gradient.rows, gradient.cols.to(self.dtype)
        if rows.is_floating_point():
            return torch.einsum("npr,npc->nrc", rows.to(self.dtype), cols).flatten(1)
        n, c = cols.shape[0], cols.shape[-1]
        n_rows = self.width // c
        flat = cols.new_zeros(n * n_rows, c)
        offsets = n_rows * torch.arange(n, device=rows.device).unsqueeze(1)  # one block of rows per example
        # Not index_add_, which rounds differently each time on a GPU.
        return flat.index_put_(((rows + offsets).flatten(),), cols.flatten(0, 1), accumulate=True).view(n, -1)

    def checksum(self) -> bytes:
        return b""


def flatten_entries(grads: Tensor) -> Tensor:
    """``(n, *shape)`` to ``(n, numel)``; a scalar parameter has no axis of its own."""
    return grads.reshape(grads.shape[0], -1)
