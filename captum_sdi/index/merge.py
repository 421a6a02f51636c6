"""Several indexes made one: each is of a part of the train set, as the tasks of an array job write them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_sdi.index.lock import explained, free_bytes, locked, missing_rows, needed_bytes, refuse_disk
from captum_sdi.index.manifest import Manifest, differences
from captum_sdi.index.place import check_folder, unfinished_files
from captum_sdi.index.shards import Shard
from captum_sdi.index.writer import consecutive_runs
from captum_sdi.words import counted, warn_user

if TYPE_CHECKING:
    from captum_sdi.index.folder import SketchIndex

_IN_EARLIER = "in the first", "in this one"


# --- what the parts say ---


def merged_manifest(path: Path, parts: Sequence[SketchIndex]) -> Manifest:
    """Say what an index of all parts is of, one after the other, once they are seen to belong together.

    Args:
        path: Its folder, which may hold an unfinished merge of the same parts.
        parts: Indexes, in the order of their examples.

    Returns:
        Its manifest.

    Raises:
        ValueError: If a part is incomplete, of something else than the first, or there twice; or if the folder holds
            something else.
    """
    check_parts(path, parts)
    content = hashlib.sha256()
    for fingerprints in distinct_fingerprints(parts):
        content.update(fingerprints.numpy().tobytes())
    n_examples = sum(part.n_examples for part in parts)
    digits = content.hexdigest()[:32]
    manifest = replace(parts[0].manifest, examples=n_examples, fingerprint=digits)
    if path.exists():
        check_folder(path)
    earlier = Manifest.load(path) or manifest
    lines = differences(asdict(earlier), asdict(manifest))
    if lines:
        raise ValueError(f"The index at {path} is of something else: {'; '.join(lines)}. Merge into another folder.")
    return manifest


def check_parts(path: Path, parts: Sequence[SketchIndex]) -> None:
    """Check that parts are complete, and of the same model, checkpoints and settings."""
    if not parts:
        raise ValueError("parts= is empty; name the folders of one index or more.")
    first = parts[0]
    folders = [part.path.resolve() for part in parts]
    for part, folder in zip(parts, folders, strict=True):
        if folder == path.resolve():
            raise ValueError(f"{path} is one of the parts; merge into a folder of its own.")
        if folders.count(folder) > 1:
            raise ValueError(f"{part.path} is named twice: its examples would count twice.")
        if part.damaged or not part.complete:
            raise ValueError(
                f"The index at {part.path} lacks rows: {missing_rows(part)}. Complete it by what built it, then merge."
            )
        lines = differences(comparable(first.manifest), comparable(part.manifest), places=_IN_EARLIER)
        if lines:
            raise ValueError(f"{part.path} is of something else than {first.path}: {'; '.join(lines)}.")


def comparable(manifest: Manifest) -> dict[str, object]:
    """Return what the manifests of all parts must agree on: everything but their train sets."""
    content = asdict(manifest)
    del content["examples"], content["fingerprint"]
    return content


def distinct_fingerprints(parts: Sequence[SketchIndex]) -> list[Tensor]:
    """Read every part's fingerprints, and compare those of one part with all others'.

    Returns:
        ``(n, 8)`` bytes for each part.

    Raises:
        ValueError: If two parts are of the same examples.
    """
    fingerprints = [part.fingerprints()[1] for part in parts]
    for number, part in enumerate(parts):
        for other, theirs in zip(parts[:number], fingerprints, strict=False):
            if torch.equal(theirs, fingerprints[number]):
                raise ValueError(f"{other.path} and {part.path} are of the same examples, which would count twice.")
    numbers = [part_fingerprints.view(torch.int64).flatten().unique() for part_fingerprints in fingerprints]
    n_shared = sum(map(len, numbers)) - len(torch.cat(numbers).unique())
    if n_shared:
        warn_user(
            f"{counted(n_shared, 'train example')} stand in more than one of the merged parts, and count as often: "
            "make sure that the parts do not overlap."
        )
    return fingerprints


# --- their shards ---


def copy_shards(merged: SketchIndex, parts: Sequence[SketchIndex]) -> None:
    """Copy the shards of all parts to their places in one index; what an earlier merge copied is kept.

    Args:
        merged: The index, as `merged_manifest` describes it.
        parts: As they were given there.

    Raises:
        ValueError: If a part is damaged.
        OSError: If the disk is too small, or another process writes to the index.
    """
    with explained(merged), locked(merged.path):
        clean(merged)
        for name in merged.shards:
            merged.folder(name).mkdir(exist_ok=True)
        merged.manifest.save(merged.path)
        start = 0
        for part in parts:
            if part.verify():
                raise ValueError(
                    f"The index at {part.path} is damaged: {missing_rows(part)}. Complete it by what built it, then "
                    "merge again: what is copied is kept."
                )
            copy_part(merged, part, start)
            start += part.n_examples
    merged.scan()


def clean(merged: SketchIndex) -> None:
    """Remove what a killed merge left unfinished and what is damaged, and see that the rest fits on the disk."""
    merged.scan()
    unfinished = unfinished_files(merged.path)
    for name in merged.shards:
        unfinished += unfinished_files(merged.folder(name))
    for file in [*unfinished, *merged.verify()]:
        file.unlink(missing_ok=True)
    n_present = sum(map(merged.rows_at, merged.shards))
    n_rows = merged.n_examples * len(merged.shards) - n_present
    if needed_bytes(merged, n_rows) > free_bytes(merged.path):
        refuse_disk(merged, n_rows)


def copy_part(merged: SketchIndex, part: SketchIndex, start: int) -> None:
    """Copy one part's rows, as they are stored, behind those of the parts before.

    Args:
        merged: Where they go.
        part: Where they are.
        start: Position of the part's first example.
    """
    for name, shards in part.shards.items():
        is_absent = torch.ones(merged.n_examples, dtype=torch.bool)
        for shard in merged.shards[name]:
            is_absent[shard.start : shard.stop] = False
        for shard in shards:
            positions = torch.arange(shard.start, shard.stop)
            absent = positions[is_absent[positions + start]]
            for run in consecutive_runs(absent):
                copy_rows(merged, name, shard, absent[run], start)


def copy_rows(
    merged: SketchIndex,
    checkpoint: str,
    shard: Shard,
    positions: Tensor,
    start: int,
) -> None:
    """Copy some consecutive rows of a shard to a shard of their own."""
    first, last = positions[[0, -1]].tolist()
    rows = slice(first - shard.start, last - shard.start + 1)
    tensors = {name: shard.mapped(name)[rows] for name in shard.tensors}
    Shard.write_stored(
        merged.folder(checkpoint),
        first + start,
        tensors,
        merged.manifest.owner(checkpoint),
    )
