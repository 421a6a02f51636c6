"""Batches, padding and per-example losses.

The batch contract, described here once. A batch is either

* a tuple or list, as in Captum: ``model(*batch[:-1])``, the labels last; or
* a mapping, as in Hugging Face: ``model(**batch)`` without ``"labels"``, which are the labels.

Every tensor's first axis is the example. Keys that the model's forward does not take are dropped with one warning;
tensors are moved to the model's device. Rows of a dataset are collated by `Collator` when the user gives no
``collate_fn``.

A loss function is called as ``loss_fn(output, labels)`` with what the model returned, untouched. It returns one value
per example (first axis; others are summed), or, where the model returns a tensor, a scalar: it is then called on
slices of one example, so that a mean over tokens or examples cannot mix examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import batch_size, tensors_in
from captum_sdi.data.losses import IGNORED


def batch_fingerprint(raw: Any) -> bytes:
    """A hash of a batch's content, to notice that an iterable yields something else the next time.

    Args:
        raw: A batch.

    Returns:
        8 bytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors_in(raw):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return digest.digest()


def example_fingerprints(raw: Any) -> Tensor:
    """A hash of every example's content, the same however its batch was padded.

    Positions that are neither attended to nor predicted do not count; nor, in tensors that have no attention mask,
    does a tail of zeros (labels: of -100).

    Args:
        raw: A batch.

    Returns:
        ``(n, 8)`` bytes.

    Example:
        >>> rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
        >>> alone, padded = example_fingerprints(Collator()(rows[1:])), example_fingerprints(Collator()(rows))
        >>> torch.equal(alone[0], padded[1])
        True
    """
    digests = [hashlib.blake2b(digest_size=8) for _ in range(batch_size(raw))]
    real = _real_positions(raw)
    items = sorted(raw.items()) if isinstance(raw, Mapping) else enumerate(raw)
    for key, value in items:
        for i, tensor in enumerate(tensors_in(value)):
            _digest_rows(digests, f"{key}.{i}", tensor.detach().cpu(), real)
    return torch.tensor([list(digest.digest()) for digest in digests], dtype=torch.uint8)


def _real_positions(raw: Any) -> Tensor | None:
    """``(n, p)`` positions of a token batch that are attended to or predicted."""
    if not isinstance(raw, Mapping) or not isinstance(ids := raw.get("input_ids"), Tensor) or ids.ndim != 2:
        return None
    mask, labels = raw.get("attention_mask"), raw.get("labels")
    fits = isinstance(mask, Tensor) and mask.shape == ids.shape
    real = mask.cpu().bool() if fits else torch.ones(ids.shape, dtype=torch.bool)  # type: ignore[union-attr]
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        real = real | (labels.cpu() != IGNORED)
    return real


def _digest_rows(digests: Sequence[Any], name: str, tensor: Tensor, real: Tensor | None) -> None:
    """Adds one tensor's rows, without their padding, to their examples' digests."""
    if name.startswith("attention_mask."):  # made by the collator where rows are ragged: all ones says nothing
        tensor = tensor.bool()
    rows = tensor.expand(len(digests)) if tensor.ndim == 0 else tensor
    rows = rows.reshape(len(rows), rows.shape[1] if rows.ndim > 1 else 1, -1).contiguous()
    if real is None or rows.shape[:2] != real.shape:
        real = (rows != (IGNORED if name.startswith("labels.") else 0)).any(2)
        real[:, 0] = True  # only a tail is padding
    first, after = real.int().argmax(1).tolist(), (real.shape[1] - real.flip(1).int().argmax(1)).tolist()
    kind = f"{name}{tensor.dtype}{tuple(tensor.shape[2:])}".encode()
    for digest, row, start, stop in zip(digests, rows.view(torch.uint8).numpy(), first, after, strict=True):
        if not (name.startswith("attention_mask.") and row[start:stop].all()):
            digest.update(kind + row[start:stop].tobytes())
