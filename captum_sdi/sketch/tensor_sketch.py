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

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from captum_sdi.features import Dense, Gradient, Noise, canonical_name
from captum_sdi.sketch.base import Projection
from captum_sdi.sketch.exact import ExactProjection, flatten_entries
from captum_sdi.sketch.hashes import CHUNK, FactorHash, Permutation, Rotation, seeded_generator


@dataclass(frozen=True)
class TensorSketch:
    """Sketches every parameter's per-example gradient into ``dim`` numbers without ever forming it.

    A parameter with at most ``dim`` entries is kept exactly. Arithmetic is float32 whatever the model's dtype. The
    relative error of a score falls like 1/√dim.

    Args:
        dim: Numbers per parameter (d). 512 finds proponents, 2048 is for comparing single numbers: README.md has the
            errors measured at 256 to 8192.
        seed: Seeds every hash, together with the parameter's and the checkpoint's name: the same object gives the
            same sketch in every process and for any order of layers, and removing a layer changes no other.
        pool: Add the sketches of all parameters up in a single row of ``dim`` numbers: storage falls by the number of
            parameters, the error grows by up to the square root of it (1.4-1.7 times where measured).

    Raises:
        TypeError: ``dim`` or ``seed`` is not an integer.
        ValueError: ``dim`` is below 1.

    Example:
        >>> import torch
        >>> sketch = TensorSketch(dim=64, seed=0).projection("core.weight", torch.empty(40, 50))
        >>> u, v = torch.randn(2, 7, 40), torch.randn(2, 7, 50)  # (n, p, r) and (n, p, c)
        >>> sketch(Outer(u, v)).shape
        torch.Size([2, 64])
    """

    dim: int = 2048
    seed: int = 0
    pool: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"TensorSketch({name}=...) must be an int, got {value!r}.")
        if self.dim < 1:
            raise ValueError(
                f"TensorSketch(dim=...) must be at least 1, got {self.dim}. 2048 is a good start; the error falls "
                "like 1/sqrt(dim)."
            )

    def projection(self, name: str, parameter: Tensor, checkpoint: str = "") -> Projection:
        """The map for one parameter at one checkpoint.

        Args:
            name: The parameter's name; ``module.`` and ``_orig_mod.`` prefixes do not count, so that a wrapped model
                has the same sketch.
            parameter: The parameter; one with more than two axes is a matrix of its first axis and the others.
            checkpoint: The checkpoint's name: hashes of different checkpoints are independent, so that their errors
                average out.

        Returns:
            The map from gradients to ``(n, width)``.
        """
        if parameter.numel() <= self.dim and not self.pool:
            return ExactProjection(parameter, torch.float32)
        generator = seeded_generator(self.seed, canonical_name(name), checkpoint)
        if parameter.ndim < 2:
            return _CountSketch(self.dim, parameter, generator)
        # Rows of several parts cannot be pooled with others: how noisy a sum is would be known no more.
        return _MatrixSketch(self.dim, parameter, generator, in_parts=not self.pool)


def pack_spectrum(spectrum: Tensor, dim: int) -> Tensor:
    """Lays half spectra of length-``dim`` real signals out as ``dim`` reals with the same inner products.

    By Parseval ⟨x, y⟩ = Σ_k conj(X_k) Y_k for ``rfft(norm="ortho")``, where every frequency but zero and (for even
    ``dim``) Nyquist stands for two conjugate ones: these are scaled by √2.

    Args:
        spectrum: ``(..., dim // 2 + 1)`` complex.
        dim: The signal's length; its parity decides whether the last frequency is interior.

    Returns:
        ``(..., dim)`` real.

    Example:
        >>> import torch
        >>> x, y = torch.randn(2, 7).double()
        >>> X, Y = (pack_spectrum(torch.fft.rfft(z, norm="ortho"), 7) for z in (x, y))
        >>> torch.allclose(x @ y, X @ Y)
        True
    """
    packed = torch.view_as_real(spectrum).flatten(-2) * math.sqrt(2)  # real and imaginary parts in turn
    # Frequency zero has no imaginary part, and Nyquist, the last of an even dim, neither: its real part fills the gap.
    packed[..., 1] = packed[..., 0 if dim % 2 else dim]
    packed[..., :2] /= math.sqrt(2)
    return packed[..., 1:] if dim % 2 else packed[..., :dim]


class _CountSketch:
    """For a vector longer than ``dim``."""

    dtype = torch.float32

    def __init__(self, dim: int, parameter: Tensor, generator: torch.Generator) -> None:
        self.width, self.noise, self.device = dim, Noise(1.0 / dim), parameter.device
        self._hash = Permutation(dim, 1, parameter.numel(), generator, parameter.device)

    def __call__(self, gradient: Gradient) -> Tensor:
        if not isinstance(gradient, Dense):
            raise TypeError("A vector's gradient comes entry by entry, not as an outer product.")
        return self._hash.count_sketch(flatten_entries(gradient.grads)).squeeze(-2)

    def checksum(self) -> bytes:
        return self._hash.checksum()


class _MatrixSketch:
    """TensorSketch of a matrix, from its factors where they are known."""

    dtype = torch.float32

    def __init__(self, dim: int, parameter: Tensor, generator: torch.Generator, in_parts: bool) -> None:
        self.width, self.device = dim, parameter.device
        lengths = len(parameter), parameter[0].numel()
        short, long = sorted(lengths)
        # Parts share the other factor's hash, which must fit into their buckets: else it would collide with itself.
        even = in_parts and dim % (4 * CHUNK) == long % (2 * CHUNK) == 0
        of_long, of_short = (2 if even and 2 * other <= dim else 1 for other in (short, long))
        self._n_buckets = n_buckets = dim // (of_long * of_short)
        self._buffer = max(dim, long)
        shorter = Permutation(n_buckets, of_short, short, generator, parameter.device)
        longer = Rotation(n_buckets, of_long, long, generator, parameter.device)
        self._rows: FactorHash
        self._cols: FactorHash
        self._rows, self._cols = (longer, shorter) if lengths[0] >= lengths[1] else (shorter, longer)
        # A factor hashed in m > 1 blocks collides with itself, all columns of two colliding rows at once. For gradients
        # whose mass lies alike in the blocks this bounds what that adds, by Cauchy-Schwarz; in disjoint blocks it can
        # be up to 1 per factor.
        shared = sum(1 - 1 / factor.n_blocks for factor in (shorter, longer))
        self.noise = Noise((1 + shared) / n_buckets, of_long * of_short)

    def __call__(self, gradient: Gradient) -> Tensor:
        if isinstance(gradient, Dense):
            return self._dense(gradient.grads)
        if not gradient.cols.shape[1]:  # no token: MKL transforms no empty tensor
            return torch.zeros(len(gradient.cols), self.width, dtype=self.dtype, device=gradient.cols.device)
        if gradient.rows.is_floating_point():
            return self._packed(self._outer(gradient.rows, gradient.cols))
        return self._one_hot(gradient.rows, gradient.cols)

    def checksum(self) -> bytes:
        return self._rows.checksum() + self._cols.checksum()

    def _packed(self, spectrum: Tensor) -> Tensor:
        """``(n, parts, n_buckets // 2 + 1)`` to ``(n, d)``, part by part."""
        return pack_spectrum(spectrum, self._n_buckets).flatten(1)

    def _outer(self, rows: Tensor, cols: Tensor) -> Tensor:
        """``Σ_p FFT(rows_p) ⊙ FFT(cols_p)`` of each part, for so many tokens at a time that they stay in the cache."""
        at_once = _tokens_at_once(self._buffer, rows.device)
        examples = max(1, at_once // rows.shape[1])
        return torch.cat(
            [
                reduce(torch.add, map(self._product, some_rows.split(at_once, 1), some_cols.split(at_once, 1)))
                for some_rows, some_cols in zip(rows.split(examples), cols.split(examples), strict=True)
            ]
        )

    def _product(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Summed over tokens: every part of the rows with every part of the columns."""
        # One factor orthonormal, one not: their product is the orthonormal transform of the convolution.
        left = torch.fft.rfft(self._rows.count_sketch(rows), norm="ortho").unsqueeze(-2)
        right = torch.fft.rfft(self._cols.count_sketch(cols)).unsqueeze(-3)
        return (left * right).sum(1).flatten(1, 2)

    def _one_hot(self, ids: Tensor, cols: Tensor) -> Tensor:
        """A one-hot factor turns the convolution into a rotation by its bucket; one FFT per example at the end."""
        (n, p), m = ids.shape, self._n_buckets
        shape = n, self._rows.n_parts, self._cols.n_parts, m
        sketched = torch.zeros(shape, dtype=self.dtype, device=cols.device)
        offsets = torch.arange(m, device=cols.device)
        tokens = _tokens_at_once(self._buffer, cols.device)
        for i in range(n):
            for j in range(0, p, tokens):
                block = ids[i, j : j + tokens]
                values = self._cols.count_sketch(cols[i, j : j + tokens]) * self._rows.signs[block][:, None, None]
                source = (offsets - self._rows.buckets[block][:, None, None]) % m
                rotated = values.gather(-1, source.expand_as(values))
                for part in range(self._rows.n_parts):  # not index_add_, which rounds differently each time on a GPU
                    sketched[i, part] += (rotated * (self._rows.parts[block] == part)[:, None, None]).sum(0)
        return self._packed(torch.fft.rfft(sketched.flatten(1, 2), norm="ortho"))

    def _dense(self, grads: Tensor) -> Tensor:
        """A matrix is one token for each of its rows."""
        ids = torch.arange(len(self._rows.signs), device=grads.device).expand(len(grads), -1)
        return self._one_hot(ids, grads.reshape(*ids.shape, -1))


def _tokens_at_once(width: int, device: torch.device) -> int:
    """How many tokens' (token, width) buffers are processed at once."""
    # Small ones spend their time on starting operations, large ones leave a CPU's cache; a GPU wants large launches.
    budget = 3 * 2**19 if device.type == "cpu" else 3 * 2**23
    return max(1, budget // width)
