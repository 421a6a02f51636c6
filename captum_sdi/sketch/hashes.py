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

import hashlib
import math

import torch
from torch import Tensor


def seeded_generator(seed: int, *names: str) -> torch.Generator:
    """A generator that depends on the names by a stable hash: not on the order of layers, nor on the process."""
    key = "\x00".join((str(seed), *names)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class FactorHash:
    """Buckets and signs of one factor, and which part of the row each entry goes to."""

    parts: Tensor
    buckets: Tensor
    signs: Tensor
    n_parts = 1
    n_blocks: int

    def count_sketch(self, values: Tensor) -> Tensor:
        """Count-sketches of the last axis: ``(..., length)`` to ``(..., n_parts, n_buckets)``."""
        raise NotImplementedError

    def checksum(self) -> bytes:
        """A digest of the parts, buckets and signs."""
        digest = hashlib.sha256()
        for table in (self.parts.to(torch.int8), self.buckets.int(), self.signs.to(torch.int8)):
            digest.update(table.cpu().numpy().tobytes())
        return digest.digest()


class Rotation(FactorHash):
    """A long factor: its entries stay in order, in blocks of ``n_buckets``, each block randomly rotated.

    Nothing is gathered, so a count-sketch reads its entries in order. Entries of one block never collide, entries of
    two blocks do with probability 1/n_buckets, as under independent permutations. Several parts take turns at chunks
    of 16 entries, so that each gets its share of every head or gate of a layer.
    """

    def __init__(self, n_buckets: int, n_parts: int, length: int, draw: torch.Generator, device: torch.device) -> None:
        self.n_parts, self._n_buckets = n_parts, n_buckets
        self._chunk = chunk = CHUNK if n_parts > 1 else 1
        entries = torch.arange(length, device=CPU)
        turns = entries // chunk
        places = turns // n_parts * chunk + entries % chunk  # within the part
        self.n_blocks = _n_blocks(n_buckets, length // n_parts)
        shifts = torch.randint(0, n_buckets, (self.n_blocks,), generator=draw, device=CPU)
        shifts[0] = 0  # rotating all blocks alike would change no collision
        signs = _signs(length, draw)
        self.parts, self.signs = (turns % n_parts).to(device), signs.to(device)
        self.buckets = ((places + shifts[places // n_buckets]) % n_buckets).to(device)
        self._dealt_signs = self._dealt(signs).contiguous().to(device)
        self._pieces = _pieces(shifts.tolist(), n_buckets, length // n_parts)

    def _dealt(self, values: Tensor) -> Tensor:
        """``(..., length)`` to ``(..., n_parts, length // n_parts // chunk, chunk)``, a view."""
        return values.unflatten(-1, (-1, self.n_parts, self._chunk)).transpose(-3, -2)

    def count_sketch(self, values: Tensor) -> Tensor:
        dealt, m = self._dealt(values.float()), self._n_buckets
        size = dealt.shape[-2] * self._chunk
        shape = *values.shape[:-1], self.n_parts, max(size, m)
        sketched = torch.empty(shape, dtype=torch.float32, device=values.device)
        torch.mul(dealt, self._dealt_signs, out=sketched[..., :size].unflatten(-1, (-1, self._chunk)))
        sketched[..., size:] = 0
        for buckets, entries in self._pieces:
            sketched[..., buckets].add_(sketched[..., entries])
        return sketched[..., :m]


def _pieces(shifts: list[int], n_buckets: int, length: int) -> list[tuple[slice, slice]]:
    """Where every rotated block but the first goes: (buckets, entries), in two pieces where it wraps around."""
    pieces = []
    for start, shift in zip(range(n_buckets, length, n_buckets), shifts[1:], strict=True):
        stop = min(start + n_buckets, length)
        turn = min(start + n_buckets - shift, stop)
        for bucket, entries in ((shift, slice(start, turn)), (0, slice(turn, stop))):
            if entries.start < entries.stop:
                pieces.append((slice(bucket, bucket + entries.stop - entries.start), entries))
    return pieces


class Permutation(FactorHash):
    """A short factor: a random permutation of all parts' buckets, or one for each block of so many entries."""

    def __init__(self, n_buckets: int, n_parts: int, length: int, draw: torch.Generator, device: torch.device) -> None:
        self.n_parts, size = n_parts, n_parts * n_buckets
        self.n_blocks = _n_blocks(size, length)
        blocks = [torch.randperm(size, generator=draw, device=CPU) for _ in range(self.n_blocks)]
        slots, signs = torch.cat(blocks)[:length], _signs(length, draw)
        self.parts, self.buckets = (slots // n_buckets).to(device), (slots % n_buckets).to(device)
        self.signs = signs.to(device)
        # The same map read from the buckets' side: which entry of each block lands here, with sign 0 for none. A
        # gather into the buckets is several times faster than scattering the entries.
        entries = torch.arange(length, device=CPU)
        sources, weights = slots.new_zeros(self.n_blocks, size), signs.new_zeros(self.n_blocks, size)
        sources[entries // size, slots], weights[entries // size, slots] = entries, signs
        self._blocks = list(zip(sources.to(device), weights.to(device), strict=True))

    def count_sketch(self, values: Tensor) -> Tensor:
        values, (first, *others) = values.float(), self._blocks
        sketched = self._gathered(values, *first)
        for block in others:
            sketched += self._gathered(values, *block)
        return sketched.unflatten(-1, (self.n_parts, -1))

    def _gathered(self, values: Tensor, sources: Tensor, weights: Tensor) -> Tensor:
        return values.gather(-1, sources.expand(*values.shape[:-1], -1)).mul_(weights)


CHUNK = 16
"""How many neighbours go to the same part: a cache line of float32."""


CPU = torch.device("cpu")
"""Where hashes are drawn, in float32, whatever torch's default device and dtype are."""


def _n_blocks(n_buckets: int, length: int) -> int:
    return max(1, math.ceil(length / n_buckets))


def _signs(length: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(0, 2, (length,), generator=generator, device=CPU).float() - 1
