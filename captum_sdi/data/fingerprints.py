"""Fingerprints of batches and examples: is the data of this pass the data of the last one, or of the index?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import batch_size, tensors_in
from captum_sdi.data.losses import IGNORED
from captum_sdi.data.padding import used_positions


def batch_fingerprint(raw: Any) -> bytes:
    """Hash a batch's content to 8 bytes, to notice when the next pass yields other batches."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors_in(raw):
        shape = tuple(tensor.shape)
        digest.update(f"{tensor.dtype}{shape}".encode())
        entries = tensor.detach().cpu().contiguous().reshape(-1)
        content = entries.view(torch.uint8).numpy()
        digest.update(memoryview(content))  # type: ignore[arg-type]
    return digest.digest()


def example_fingerprints(raw: Any) -> Tensor:
    """Hash every example's content, the same however its batch was padded.

    Positions that are neither attended to nor predicted do not count; nor, in tensors that have no attention mask,
    does a tail of zeros (labels: of -100).

    Returns:
        ``(n, 8)`` bytes.

    Example:
        >>> from captum_sdi.data import Collator
        >>> rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
        >>> alone, padded = example_fingerprints(Collator()(rows[1:])), example_fingerprints(Collator()(rows))
        >>> torch.equal(alone[0], padded[1])
        True
    """
    n = batch_size(raw)
    digests = [hashlib.blake2b(digest_size=8) for _ in range(n)]
    used = used_positions(raw)
    items = sorted(raw.items()) if isinstance(raw, Mapping) else enumerate(raw)
    for key, value in items:
        for number, tensor in enumerate(tensors_in(value)):
            on_cpu = tensor.detach().cpu()
            _digest_rows(digests, f"{key}.{number}", on_cpu, used)
    fingerprints = [list(digest.digest()) for digest in digests]
    return torch.tensor(fingerprints, dtype=torch.uint8)


def _digest_rows(
    digests: Sequence[Any],
    name: str,
    tensor: Tensor,
    used: Tensor | None,
) -> None:
    """Add one tensor's rows, without their padding, to their examples' digests."""
    is_mask = name.startswith("attention_mask.")
    if is_mask:
        tensor = tensor.bool()
    further_axes = tuple(tensor.shape[2:])
    header = f"{name}{tensor.dtype}{further_axes}".encode()
    if tensor.ndim == 0:
        tensor = tensor.repeat(len(digests))  # expanded, one row could not be viewed as bytes
    length = tensor.shape[1] if tensor.ndim > 1 else 1
    rows = tensor.reshape(len(tensor), length, -1).contiguous()
    if used is None or used.shape != rows.shape[:2]:
        padding = IGNORED if name.startswith("labels.") else 0
        used = (rows != padding).any(2)
        used[:, 0] = True  # only a tail is padding
    content = rows.view(torch.uint8).numpy()
    for digest, row, span in zip(digests, content, _spans(used), strict=True):
        entries = row[span]
        # The collator makes a mask where rows are ragged: one of all ones must hash as if it were absent.
        if is_mask and entries.all():
            continue
        digest.update(header)
        digest.update(entries.tobytes())


def _spans(used: Tensor) -> list[slice]:
    """Return the slice from the first to the last used position of each row."""
    starts = used.int().argmax(1)
    tails = used.flip(1).int().argmax(1)
    stops = used.shape[1] - tails
    return list(map(slice, starts.tolist(), stops.tolist()))
