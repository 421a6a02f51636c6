"""Hashes of a model's weights: does an index belong to them? Asked at every question, and computed where it must be."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_sdi.features import canonical_name
from captum_sdi.index.shards import digest_tensor

_LEAST = 2**20
"""Bytes; what is smaller is hashed as fast as it is recognised."""
_WORDS = 1024
"""Words of eight bytes in a line of those that are summed."""


class Recognised(NamedTuple):
    """A weight as it was when it was hashed."""

    place: tuple[Any, ...]
    """Where it lay, and how often autograd had seen it written to."""
    sums: bytes
    """Digest of the sums of its words, along lines and across them."""
    digest: bytes
    """Its hash."""


class WeightHashes:
    """Hashes a model's weights and buffers; of a weight that is what it was, it remembers the hash.

    A weight is what it was if it lies where it lay, autograd has not seen it written to, and the sums of its words,
    which take a tenth of the time, are the same: what is written past autograd, through ``.data``, changes them.
    """

    def __init__(self) -> None:
        self._recognised: dict[str, Recognised] = {}

    def of_model(self, model: nn.Module) -> str:
        """Hash all weights and buffers of a model to 32 hexadecimal digits."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        named_tensors = sorted((canonical_name(name), tensor.detach()) for name, tensor in state.items())
        names, tensors = zip(*named_tensors, strict=True)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            digests = list(threads.map(self._digest, names, tensors))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]

    def _digest(self, name: str, tensor: Tensor) -> bytes:
        can_be_summed = tensor.is_contiguous() and tensor.data_ptr() % 8 == 0
        if tensor.nbytes < _LEAST or not can_be_summed or tensor.is_inference():
            return tensor_hash(name, tensor)
        place = tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype, tensor.device
        sums = digest_of_sums(tensor)
        known = self._recognised.get(name)
        if known is None or (known.place, known.sums) != (place, sums):
            known = Recognised(place, sums, tensor_hash(name, tensor))
            self._recognised[name] = known
        return known.digest


def tensor_hash(name: str, tensor: Tensor) -> bytes:
    """Hash a tensor with its name."""
    digest = hashlib.sha256()
    digest_tensor(digest, name, tensor.cpu())
    return digest.digest()


def digest_of_sums(tensor: Tensor) -> bytes:
    """Digest the sums of a contiguous tensor's words along lines of them and across, where it lies."""
    entries = tensor.reshape(-1).view(torch.uint8)
    n_lines = len(entries) // (8 * _WORDS)
    whole = entries[: 8 * _WORDS * n_lines].view(torch.int64).view(n_lines, _WORDS)
    rest = entries[8 * _WORDS * n_lines :]
    digest = hashlib.blake2b(digest_size=16)
    for part in (whole.sum(0), whole.sum(1), rest):
        digest.update(part.cpu().numpy().tobytes())
    return digest.digest()
