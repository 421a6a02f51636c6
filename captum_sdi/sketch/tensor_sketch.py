"""`TensorSketch`: a per-example gradient becomes d numbers, and the gradient itself is never formed.

TensorSketch (Pham & Pagh, KDD 2013). The gradient of a weight matrix for one example is a sum of outer products over
token positions, G = Σ_p u_p v_pᵀ. A count-sketch (Charikar, Chen & Farach-Colton, ICALP 2002) adds the entries of a
vector up in random buckets h(i) with random signs s(i), C(x)_b = Σ_{i: h(i)=b} s(i) x_i, and keeps inner products in
expectation. Put entry (r, c) of G in bucket h(r) + h'(c) mod d with sign s(r) s'(c): this count-sketch of G is the
circular convolution of those of the factors, hence a product after a Fourier transform.

    FFT(TS(G)) = Σ_p FFT(C(u_p)) ⊙ FFT(C'(v_p))

Packing (Parseval's theorem). Rows stay in the Fourier domain: those of token positions, of a layer's uses and of loop
steps add up there, and no inverse transform is needed. An orthonormal transform keeps inner products, and a real
signal's frequencies k and d - k are conjugates, so half of the spectrum says it all. `pack_spectrum` lays it out as
exactly d real numbers, with a factor √2 for every frequency that stands for two (the last term is there for even d).

    ⟨x, y⟩ = X_0 Y_0 + 2 Σ_{0<k<d/2} (Re X_k Re Y_k + Im X_k Im Y_k) + X_{d/2} Y_{d/2}

Hashes without collisions (our own; `tests/test_sketch.py` measures their variance). Entries (r, c) and (r', c') of G
share a bucket when the equation below holds. One random permutation h makes every difference on its left equally
likely, so only the shorter factor is permuted (`PermutationHash`), and the longer one is read as it lies in memory
(`RotationHash`). A factor of at most d entries then never collides with itself, nor does a block of d entries of a
longer one, which costs nothing and takes about a quarter off the error.

    h(r) - h(r') = h'(c') - h'(c)  mod d

Two halves (our own). Where the shorter factor fits into d/2 buckets, the longer one is split in two halves, and each
half of G gets a TensorSketch of d/2 numbers. Two entries of G lie in the same half one time in two and then share one
of d/2 buckets, so the collision rate stays 1/d, while the shorter factor needs one FFT of half the length for both
halves. Where the longer factor fits into d/2 buckets too, the shorter one is split as well, into four parts of a row in
all; d has to be a multiple of 64 and the longer factor one of 32.

    TS(G) = [TS(G_1), TS(G_2)]          1/2 · 1/(d/2) = 1/d
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import starmap

import torch
from torch import Tensor

from captum_sdi.features import Dense, Gradient, Noise, Outer, canonical_name
from captum_sdi.sketch.base import Projection
from captum_sdi.sketch.exact import ExactProjection
from captum_sdi.sketch.hashes import CHUNK, FactorHash, PermutationHash, RotationHash, seeded_generator
from captum_sdi.words import is_integer

SQRT_2 = math.sqrt(2)

CPU_BUDGET = 3 * 2**19
"""Numbers to process at once: fewer spend their time on starting operations, more leave a CPU's cache."""
GPU_BUDGET = 3 * 2**23
"""The same on a GPU, which wants large launches."""


@dataclass(frozen=True)
class TensorSketch:
    """A sketch of every parameter's per-example gradient in ``dim`` numbers, without ever forming the gradient.

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
        TypeError: If ``dim`` or ``seed`` is not an integer.
        ValueError: If ``dim`` is below 1.

    Example:
        >>> from captum_sdi.features import Outer
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
            if not is_integer(value):
                raise TypeError(f"TensorSketch({name}=...) must be an int, got {value!r}.")
        if self.dim < 1:
            raise ValueError(
                f"TensorSketch(dim=...) must be at least 1, got {self.dim}. 2048 is a good start; the error falls "
                "like 1/sqrt(dim)."
            )

    def projection(
        self,
        name: str,
        parameter: Tensor,
        checkpoint: str = "",
    ) -> Projection:
        """Return the map from one parameter's gradients at one checkpoint to ``(n, width)``.

        Args:
            name: The parameter's name; ``module.`` and ``_orig_mod.`` prefixes do not count, so that a wrapped model
                has the same sketch.
            parameter: One with more than two axes is a matrix of its first axis and the others.
            checkpoint: Hashes of different checkpoints are independent, so that their errors average out.

        Returns:
            The map.
        """
        if parameter.numel() <= self.dim and not self.pool:
            return ExactProjection(parameter, torch.float32)
        generator = seeded_generator(self.seed, canonical_name(name), checkpoint)
        if parameter.ndim < 2:
            return VectorProjection(self.dim, parameter, generator)
        # A pooled row is a sum over parameters: halves of different matrices would leave its variance unknown.
        return MatrixProjection(self.dim, parameter, generator, split=not self.pool)


class VectorProjection:
    """The count-sketch of a parameter with one axis, or none."""

    dtype = torch.float32

    def __init__(
        self,
        dim: int,
        parameter: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.width = dim
        self.noise = Noise(1.0 / dim)
        self.device = parameter.device
        self._length = parameter.numel()
        self._hash = PermutationHash(self._length, dim, 1, generator, self.device)

    def __call__(self, gradient: Gradient) -> Tensor:
        """Count-sketch n gradients, ``(n, dim)``."""
        if not isinstance(gradient, Dense):
            raise TypeError("A vector's gradient comes entry by entry, not as an outer product.")
        entries = gradient.entries((self._length,))
        sketched = self._hash.count_sketch(entries)  # (n, 1, dim): a vector has one part
        return sketched.squeeze(-2)

    def checksum(self) -> bytes:
        """Digest the hash table."""
        return self._hash.checksum()


class MatrixProjection:
    """The TensorSketch of a matrix, from its factors where they are known."""

    dtype = torch.float32
    _row_hash: FactorHash
    _col_hash: FactorHash

    def __init__(
        self,
        dim: int,
        parameter: Tensor,
        generator: torch.Generator,
        *,
        split: bool,
    ) -> None:
        self.width = dim
        self.device = parameter.device
        n_rows = len(parameter)
        n_cols = parameter[0].numel()
        self._shape = (n_rows, n_cols)
        short, long = sorted(self._shape)
        short_parts, long_parts = 1, 1
        if split:
            short_parts, long_parts = count_parts(dim, short, long)
        n_parts = short_parts * long_parts
        n_buckets = dim // n_parts
        self._n_buckets = n_buckets
        self._buckets = torch.arange(n_buckets, device=self.device)
        self._tokens_at_once = tokens_at_once(max(dim, long), self.device)

        shorter = PermutationHash(short, n_buckets, short_parts, generator, self.device)
        longer = RotationHash(long, n_buckets, long_parts, generator, self.device)
        if n_rows >= n_cols:
            self._row_hash, self._col_hash = longer, shorter
        else:
            self._row_hash, self._col_hash = shorter, longer
        excess_variance = shorter.excess_variance + longer.excess_variance
        self.noise = Noise((1 + excess_variance) / n_buckets, n_parts)

    def __call__(self, gradient: Gradient) -> Tensor:
        """Sketch n gradients, ``(n, dim)``."""
        if isinstance(gradient, Dense):
            gradient = self._one_token_per_row(gradient)
        rows, cols = gradient.rows, gradient.cols
        n_examples, n_tokens, _ = cols.shape
        if n_tokens == 0:  # MKL transforms no empty tensor
            return cols.new_zeros(n_examples, self.width, dtype=self.dtype)
        if rows.is_floating_point():
            spectrum = self._spectrum_of_factors(rows, cols)
        else:
            spectrum = self._spectrum_of_ids(rows, cols)
        packed = pack_spectrum(spectrum, self._n_buckets)  # (n, parts, n_buckets)
        return packed.flatten(1)

    def checksum(self) -> bytes:
        """Digest the hash tables of both factors."""
        return self._row_hash.checksum() + self._col_hash.checksum()

    def _one_token_per_row(self, gradient: Dense) -> Outer:
        """Write a matrix as a sum over its rows, G = Σ_r e_r G_rᵀ, with one-hot e_r."""
        matrices = gradient.entries(self._shape)
        n_examples, n_rows, _ = matrices.shape
        ids = torch.arange(n_rows, device=matrices.device)
        return Outer(ids.expand(n_examples, -1), matrices)

    def _spectrum_of_factors(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return ``(n, parts, frequencies)``, from so few tokens at a time that they stay in the cache."""
        tokens = self._tokens_at_once
        examples = max(1, tokens // rows.shape[1])
        spectra = []
        for block_rows, block_cols in split_both(rows, cols, examples):
            token_blocks = split_both(block_rows, block_cols, tokens, axis=1)
            products = starmap(self._product, token_blocks)
            spectra.append(reduce(torch.add, products))
        return torch.cat(spectra)

    def _product(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return Σ_p FFT(C(rows_p)) ⊙ FFT(C'(cols_p)): every part of the rows with every part of the columns."""
        # An orthonormal transform times one that is not normalised is the orthonormal transform of the convolution.
        row_spectrum = torch.fft.rfft(self._row_hash.count_sketch(rows), norm="ortho")
        col_spectrum = torch.fft.rfft(self._col_hash.count_sketch(cols))
        products = row_spectrum.unsqueeze(-2) * col_spectrum.unsqueeze(-3)
        return products.sum(1).flatten(1, 2)  # (n, row parts x column parts, frequencies)

    def _spectrum_of_ids(self, ids: Tensor, cols: Tensor) -> Tensor:
        """Return ``(n, parts, frequencies)``: with a one-hot factor, one FFT per example is enough."""
        tokens = self._tokens_at_once
        n_examples = len(ids)
        shape = (n_examples, self._row_hash.n_parts, self._col_hash.n_parts, self._n_buckets)
        sketched = cols.new_zeros(shape, dtype=self.dtype)
        for example in range(n_examples):
            for block_ids, block_cols in split_both(ids[example], cols[example], tokens):
                self._add_rotated(sketched[example], block_ids, block_cols)
        return torch.fft.rfft(sketched.flatten(1, 2), norm="ortho")

    def _add_rotated(self, sketch: Tensor, ids: Tensor, cols: Tensor) -> None:
        """Add tokens to one example's sketch: convolving with a one-hot factor is a rotation by its bucket."""
        ids = ids[:, None, None]  # one for all column parts and buckets of a token
        values = self._col_hash.count_sketch(cols) * self._row_hash.signs[ids]
        sources = (self._buckets - self._row_hash.buckets[ids]) % self._n_buckets
        rotated = values.gather(-1, sources.expand_as(values))
        row_parts = self._row_hash.parts[ids]
        for part_number in range(self._row_hash.n_parts):  # not index_add_, which rounds differently each time on a GPU
            in_part = row_parts == part_number
            sketch[part_number].add_((rotated * in_part).sum(0))


def count_parts(dim: int, short: int, long: int) -> tuple[int, int]:
    """Return how many parts the shorter and the longer factor are split in.

    One factor is split where the other fits into half of the buckets: a hash that did not would collide with itself.

    Example:
        >>> count_parts(dim=64, short=32, long=96), count_parts(dim=64, short=32, long=32)
        ((1, 2), (2, 2))
    """
    if dim % (4 * CHUNK) or long % (2 * CHUNK):
        return 1, 1
    half = dim // 2
    short_parts = 2 if long <= half else 1
    long_parts = 2 if short <= half else 1
    return short_parts, long_parts


def tokens_at_once(width: int, device: torch.device) -> int:
    """Return how many tokens' buffers of ``width`` numbers to process at once."""
    budget = CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    return max(1, budget // width)


def split_both(
    rows: Tensor,
    cols: Tensor,
    size: int,
    axis: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the two factors in blocks of the same ``size`` examples or tokens."""
    return zip(rows.split(size, axis), cols.split(size, axis), strict=True)


def pack_spectrum(spectrum: Tensor, dim: int) -> Tensor:
    """Lay half spectra of real signals out as real numbers with the same inner products.

    Args:
        spectrum: ``(..., dim // 2 + 1)`` complex, from ``rfft(norm="ortho")``.
        dim: The signal's length; its parity decides whether the last frequency stands for two.

    Returns:
        ``(..., dim)`` real.

    Example:
        >>> x, y = torch.randn(2, 7).double()
        >>> X, Y = (pack_spectrum(torch.fft.rfft(z, norm="ortho"), 7) for z in (x, y))
        >>> torch.allclose(x @ y, X @ Y)
        True
    """
    real_and_imaginary = torch.view_as_real(spectrum).flatten(-2)
    packed = real_and_imaginary * SQRT_2
    # Frequency 0 stands for itself alone and has no imaginary part. For an even dim the last frequency (Nyquist) stands
    # for itself, too, and its real part fills the gap.
    if dim % 2:
        packed[..., 1] = packed[..., 0]
        packed = packed[..., 1:]
        unpaired = packed[..., :1]
    else:
        packed[..., 1] = packed[..., dim]
        packed = packed[..., :dim]
        unpaired = packed[..., :2]
    unpaired /= SQRT_2
    return packed
