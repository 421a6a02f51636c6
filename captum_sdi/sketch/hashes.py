"""Random hashes of one factor of a gradient: a part of the row, a bucket of that part and a sign for each entry.

They are the only randomness in a score. Entries of one block of a factor never collide: the module `tensor_sketch` says
what that is worth, and why only the shorter of two factors has to be permuted for it.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

CHUNK = 16
"""How many neighbouring entries stay in the same part of a row: a cache line of float32."""

CPU = torch.device("cpu")
"""Hashes are drawn here, so that they are the same on every device and under every default device of torch."""


def seeded_generator(seed: int, *names: str) -> torch.Generator:
    """Return a generator seeded by a stable hash of the seed and the names.

    It is the same in every process, and other layers do not change it.
    """
    key = "\x00".join([str(seed), *names])
    digest = hashlib.blake2b(key.encode(), digest_size=8)
    number = int.from_bytes(digest.digest(), "big")
    return torch.Generator().manual_seed(number >> 1)  # in the range of a signed 64-bit integer


class FactorHash(ABC):
    """A part of the row, a bucket and a sign for each entry of one factor."""

    n_parts: int
    """How many parts of the row share the entries."""
    n_blocks: int
    """How many blocks the entries of a part come in; entries of one block never collide."""
    parts: Tensor
    """``(length,)`` the part that each entry goes to."""
    buckets: Tensor
    """``(length,)`` each entry's bucket in its part."""
    signs: Tensor
    """``(length,)`` each entry's sign, 1 or -1, in float32."""

    @property
    def excess_variance(self) -> float:
        """The variance that collisions inside the factor add, in units of that of a factor without any.

        Where two entries of a factor collide, whole rows or columns of G do. With m blocks, 1 - 1/m is the most that
        this adds for gradients whose mass lies alike in all blocks, by Cauchy-Schwarz; two gradients in different
        blocks can reach 1.
        """
        return 1 - 1 / self.n_blocks

    @abstractmethod
    def count_sketch(self, values: Tensor) -> Tensor:
        """Add signed entries up in their buckets: ``(..., length)`` to ``(..., n_parts, n_buckets)``."""

    def checksum(self) -> bytes:
        """Digest the three tables."""
        parts = self.parts.to(torch.int8)
        buckets = self.buckets.to(torch.int32)
        signs = self.signs.to(torch.int8)
        digest = hashlib.sha256()
        for table in (parts, buckets, signs):
            digest.update(table.cpu().numpy().tobytes())
        return digest.digest()


class RotationHash(FactorHash):
    """The hash of a long factor: its entries stay in order, in blocks of ``n_buckets``, each block randomly rotated.

    A count-sketch reads the entries as they lie in memory and gathers nothing. Entries of two blocks collide with
    probability 1/n_buckets, as under independent permutations. Several parts take turns at chunks of 16 entries, so
    that each part gets its share of every head or gate of a layer.
    """

    def __init__(
        self,
        length: int,
        n_buckets: int,
        n_parts: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.n_parts = n_parts
        self._n_buckets = n_buckets
        self._chunk = CHUNK if n_parts > 1 else 1
        self._part_length = length // n_parts
        self.n_blocks = count_blocks(self._part_length, n_buckets)
        shifts = draw_integers(n_buckets, self.n_blocks, generator)
        shifts[0] = 0  # rotating all blocks alike would change no collision
        signs = draw_signs(length, generator)

        entries = torch.arange(length, device=CPU)
        chunks = entries // self._chunk
        chunks_of_part = chunks // n_parts
        positions = chunks_of_part * self._chunk + entries % self._chunk  # of the entries within their part
        blocks = positions // n_buckets
        buckets = (positions + shifts[blocks]) % n_buckets
        self.parts = (chunks % n_parts).to(device)
        self.buckets = buckets.to(device)
        self.signs = signs.to(device)
        self._signs_by_part = self._view_by_part(self.signs).contiguous()
        self._folds = fold_blocks(shifts.tolist(), n_buckets, self._part_length)

    def _view_by_part(self, values: Tensor) -> Tensor:
        """View ``(..., length)`` as ``(..., n_parts, part_length // chunk, chunk)``."""
        chunks = values.unflatten(-1, (-1, self.n_parts, self._chunk))
        return chunks.transpose(-3, -2)

    def count_sketch(self, values: Tensor) -> Tensor:
        """Add signed entries up, block by block: each block is one or two contiguous pieces."""
        values = values.float()
        *leading, _ = values.shape
        buffer_length = max(self._part_length, self._n_buckets)
        sketched = values.new_empty(*leading, self.n_parts, buffer_length)
        signed = sketched[..., : self._part_length]
        signed_chunks = signed.unflatten(-1, (-1, self._chunk))
        torch.mul(self._view_by_part(values), self._signs_by_part, out=signed_chunks)
        sketched[..., self._part_length :] = 0
        for bucket, entry, size in self._folds:
            buckets = sketched.narrow(-1, bucket, size)
            buckets += sketched.narrow(-1, entry, size)
        return sketched[..., : self._n_buckets]


def fold_blocks(
    shifts: list[int],
    n_buckets: int,
    length: int,
) -> list[tuple[int, int, int]]:
    """Return pieces ``(bucket, entry, size)`` that add every block but the first, rotated, to the first.

    A block that is rotated by ``shift`` wraps around after bucket ``n_buckets - 1``: it comes in two pieces.

    Example:
        >>> fold_blocks([0, 1], n_buckets=4, length=8)
        [(1, 4, 3), (0, 7, 1)]
    """
    pieces = []
    for block, shift in enumerate(shifts[1:], start=1):
        start = block * n_buckets
        stop = min(start + n_buckets, length)
        wrap = min(start + n_buckets - shift, stop)  # the entry that lands in bucket 0
        pieces.append((shift, start, wrap - start))
        if wrap < stop:
            pieces.append((0, wrap, stop - wrap))
    return pieces


class PermutationHash(FactorHash):
    """The hash of a short factor: a random permutation of the buckets of all parts.

    A factor with more entries than there are buckets has a permutation for each block of so many entries.
    """

    def __init__(
        self,
        length: int,
        n_buckets: int,
        n_parts: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.n_parts = n_parts
        n_slots = n_parts * n_buckets
        self.n_blocks = count_blocks(length, n_slots)
        permutations = [torch.randperm(n_slots, generator=generator, device=CPU) for _ in range(self.n_blocks)]
        slots = torch.cat(permutations)[:length]
        signs = draw_signs(length, generator)
        self.parts = (slots // n_buckets).to(device)
        self.buckets = (slots % n_buckets).to(device)
        self.signs = signs.to(device)

        # The same map read from the slots' side: the entry of each block that lands in a slot, with sign 0 where none
        # does. Gathering from the entries is several times faster than scattering them.
        entries = torch.arange(length, device=CPU)
        blocks = entries // n_slots
        sources = slots.new_zeros(self.n_blocks, n_slots)
        sources[blocks, slots] = entries
        source_signs = signs.new_zeros(self.n_blocks, n_slots)
        source_signs[blocks, slots] = signs
        gathers = zip(sources.to(device), source_signs.to(device), strict=True)
        self._gathers = list(gathers)

    def count_sketch(self, values: Tensor) -> Tensor:
        """Gather the signed entries of each block into the slots, and add the blocks up."""
        values = values.float()
        first_block, *other_blocks = self._gathers
        sketched = gather_signed(values, *first_block)
        for sources, signs in other_blocks:
            sketched += gather_signed(values, sources, signs)
        return sketched.unflatten(-1, (self.n_parts, -1))


def gather_signed(values: Tensor, sources: Tensor, signs: Tensor) -> Tensor:
    """Return ``signs[b] · values[..., sources[b]]`` for each slot b."""
    *leading, _ = values.shape
    index = sources.expand(*leading, -1)
    return values.gather(-1, index).mul_(signs)


def count_blocks(length: int, block_length: int) -> int:
    """Return how many blocks that many entries fill, at least one."""
    n_blocks = math.ceil(length / block_length)
    return max(1, n_blocks)


def draw_integers(n_values: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw ``(length,)`` integers below ``n_values``."""
    return torch.randint(n_values, (length,), generator=generator, device=CPU)


def draw_signs(length: int, generator: torch.Generator) -> Tensor:
    """Draw ``(length,)`` signs, 1 or -1, in float32."""
    bits = draw_integers(2, length, generator)
    return 2 * bits.float() - 1
