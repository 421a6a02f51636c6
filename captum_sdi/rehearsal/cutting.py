"""Collate functions that cut rows to the shortest of their batch: seen without a pass, by what a row has alone."""

from __future__ import annotations

from captum_sdi.data.fingerprints import used_positions
from captum_sdi.rehearsal.alone import BatchRun


def check_nothing_is_cut(batch: BatchRun) -> None:
    """Refuse a batch in which an example has fewer tokens than alone.

    Where there is padding the shortest row has set nobody's length. Other batches are compared row by row with the
    same rows collated alone, where the data set can tell.

    Args:
        batch: The batch.

    Raises:
        ValueError: If one has.
    """
    used = used_positions(batch.raw)
    if used is None or batch.size == 1 or not used.all():
        return
    length = used.shape[1]
    for position in batch.positions:
        used_alone = used_positions(batch.collated_alone(position))
        if used_alone is not None and int(used_alone.sum()) > length:
            raise ValueError(
                f"{batch.side.name.capitalize()} example {position} has {length} tokens in a batch of {batch.size}, "
                f"{int(used_alone.sum())} alone: the collate function cuts rows to the length of their neighbours. Let "
                "it pad them, as captum_sdi.data.collate.Collator does, or pass batch_size=1 (to a DataLoader, too)."
            )
