"""Is it the same? An index compared with the model and the train set at hand: settings, one row, the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_sdi.data.fingerprints import batch_fingerprint, example_fingerprints
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.identity import Identity, described
from captum_sdi.index.manifest import RATE, Manifest, differences
from captum_sdi.index.reader import Reader
from captum_sdi.index.shards import dtype_name
from captum_sdi.precision import is_coarse

if TYPE_CHECKING:
    from captum_sdi.data.examples import Examples
    from captum_sdi.index.processes import Processes
    from captum_sdi.passes import Point

CHECKED = 10_000
"""How many examples are read to compare the train set with a complete index; the others are taken on trust."""
CHECKED_IN_A_ROW = 50
"""How many neighbours of them, which are read together."""


# --- settings ---


def check_settings(
    path: Path,
    manifest: Manifest,
    identity: Identity,
    name: str,
    dtype: torch.dtype | None,
) -> None:
    """Refuse an index that was written for something else.

    Args:
        path: The index's folder.
        manifest: What it is of.
        identity: What it would be of now.
        name: The checkpoint's.
        dtype: In which rows should be stored; None: as they are.

    Raises:
        ValueError: If the two differ.
    """
    lines = differences(manifest.settings, identity.settings)
    if dtype is not None:
        lines += differences(manifest.dtype, dtype_name(dtype), "index_dtype")
    stored = dict(manifest.checkpoints.get(name, identity.checkpoint))
    # The rate is no part of a row: scores use the present one, and a run that goes on may change it.
    stored[RATE] = identity.checkpoint[RATE]
    lines += differences(stored, identity.checkpoint, f"checkpoint {name!r}")
    if lines:
        raise ValueError(
            f"The index at {path} is of something else: {'; '.join(lines)}. Pass what it was built with, or "
            "another folder as index=."
        )


# --- one row ---


def check_row(
    index: SketchIndex,
    point: Point,
    train: Examples,
) -> None:
    """Recompute one stored row: what no setting tells, such as another loss of the same name, shows here.

    Args:
        index: The index, which has rows at the point's checkpoint.
        point: The model there.
        train: The train set.

    Raises:
        ValueError: If the row differs from the stored one.
    """
    name = point.checkpoint.name
    position = telling_position(index, name)
    stored = Reader(index, name, torch.float64).read(position, position + 1)[0]
    for positions, raw, _ in compared_batches(index, train, only=torch.tensor([position])):
        numbers, collated_alone = positions.tolist(), train.collated_alone
        features = point.batch(
            raw,
            train.side,
            numbers,
            by_step=False,
            collated_alone=collated_alone,
        )
        computed = index.flat(features)[0, 0].cpu().double()
        length = stored.norm().clamp(min=1e-300)
        distance = float((stored - computed).norm() / length)
        # Half precision rounds, and its kernels round differently from one batch size to another.
        coarse = 5e-2 if is_coarse(point.model) else 0.0
        tolerance = max(1e-3, coarse, 4 * torch.finfo(index.dtype).eps)
        if not distance <= tolerance:
            raise ValueError(
                f"The index at {index.path} is of something else: the row of train example {position} at checkpoint "
                f"{name!r} differs from the one computed now by {distance:.2g} of its length. The settings agree, so "
                f"look at the example, at loss_fn= ({described(train.side.loss_fn)}), at forward_kwargs= and at the "
                "model's code, or pass another folder as index=."
            )


def telling_position(index: SketchIndex, checkpoint: str) -> int:
    """Return the position of the first shard's first row that is not zero, or of its first row."""
    shard = index.shards[checkpoint][0]
    largest = shard.mapped("rows").float().abs().amax(1)
    nonzero = largest.nonzero().flatten().tolist()
    return shard.start + nonzero[0] if nonzero else shard.start


# --- the data ---


def check_data(
    index: SketchIndex,
    train: Examples,
    *,
    thorough: bool,
) -> None:
    """Compare the train set with a complete index, a sample of it where it is large.

    Args:
        index: The index.
        train: The train set.
        thorough: Compare all examples, however many there are.

    Raises:
        ValueError: If the index is of another train set.
    """
    length = train.stream.n_examples
    if length is not None:
        check_length(index, length)
    is_sampled = not thorough and index.n_examples > CHECKED
    only = evenly_spread(index.n_examples) if is_sampled and length is not None else None
    n_seen = 0
    for positions, _, _ in compared_batches(index, train, only):
        n_seen = int(positions[-1]) + 1
        if is_sampled and only is None and n_seen > CHECKED:
            return  # a stream can only be read from its beginning
    check_length(index, n_seen)


def first_reading(train: Examples) -> tuple[int | None, bytes]:
    """Return what tells a train set before it is read: its length, and its first batch's fingerprint."""
    return train.stream.n_examples, batch_fingerprint(train.stream.peek())


def check_same_reading(processes: Processes, reading: tuple[int | None, bytes]) -> None:
    """Refuse processes of one launch that read other train sets, or other batches of one.

    Args:
        processes: All come here.
        reading: How many examples this process has read, and a fingerprint of them.

    Raises:
        ValueError: If theirs are not all the same.
    """
    readings = processes.gather(reading)
    different = [rank for rank, other in enumerate(readings) if other != readings[0]]
    if different:
        raise ValueError(
            f"train_dataset is another one in process {different[0]} than in process 0: each sketches its part of the "
            "batches, so all must read the same ones. Pass the plain, whole DataLoader or Dataset to every process, "
            "and the same batch_size."
        )


def compared_batches(
    index: SketchIndex,
    train: Examples,
    only: Tensor | None = None,
) -> Iterator[tuple[Tensor, Any, Tensor]]:
    """Read batches, and compare their examples with the index as far as it has them.

    Args:
        index: The index.
        train: The train set.
        only: Positions of the examples to read; None: all.

    Yields:
        The positions of a batch's examples ``(n,)``, the batch, and their fingerprints ``(n, 8)``.

    Raises:
        ValueError: If an example is another one than the index says.
    """
    is_present, stored = index.fingerprints()
    for positions, raw in train.batches(only):
        fingerprints = example_fingerprints(raw)
        is_changed = (fingerprints != lookup(stored, positions)).any(1)
        is_changed &= lookup(is_present, positions)
        if is_changed.any():
            first = int(positions[is_changed][0])
            raise ValueError(other_data(index, f"example {first} is the first that differs"))
        yield positions, raw, fingerprints


def check_length(index: SketchIndex, n_examples: int) -> None:
    """Refuse a train set of another length.

    Raises:
        ValueError: If the index has counted its examples, and they are more or fewer.
    """
    if index.examples not in (None, n_examples):
        difference = f"it has {n_examples} examples, the index {index.examples}"
        raise ValueError(other_data(index, difference))


def other_data(index: SketchIndex, difference: str) -> str:
    """Write the sentence about an index of another train set."""
    return (
        f"The index at {index.path} is of another train_dataset: {difference}. Pass the one it was built with, in the "
        "same order, or another folder as index=."
    )


def lookup(known: Tensor, positions: Tensor) -> Tensor:
    """Return ``known[positions]``, zero beyond its end.

    Example:
        >>> lookup(torch.tensor([7, 8]), torch.tensor([1, 2]))
        tensor([8, 0])
    """
    is_inside = positions < len(known)
    values = known.new_zeros(len(positions), *known.shape[1:])
    values[is_inside] = known[positions[is_inside]]
    return values


def evenly_spread(n_examples: int) -> Tensor:
    """Return `CHECKED` positions in evenly spread runs, from the first example to the last."""
    length = min(CHECKED_IN_A_ROW, CHECKED // 2)
    starts = torch.linspace(0, n_examples - length, CHECKED // length, dtype=torch.float64).long()
    runs = starts.unsqueeze(1) + torch.arange(length)
    return runs.flatten()
