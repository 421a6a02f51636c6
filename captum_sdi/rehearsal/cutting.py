"""Collate functions that cut rows to the length of their neighbours: seen without a pass, by what a row has alone."""

from __future__ import annotations

from captum_sdi.data.padding import used_positions
from captum_sdi.rehearsal.alone import BatchRun


def check_nothing_is_cut(batch: BatchRun) -> None:
    """Refuse a batch in which an example has fewer tokens than alone.

    Only rows without padding can have been cut. They are compared with the same rows collated alone, where the data
    set can tell.

    Args:
        batch: The batch.

    Raises:
        ValueError: If one has.
    """
    used = used_positions(batch.raw)
    if used is None or batch.size == 1:
        return
    length = used.shape[1]
    for number in used.all(1).nonzero().flatten().tolist():
        position = batch.positions[number]
        used_alone = used_positions(batch.collated_alone(position))
        if used_alone is not None and int(used_alone.sum()) > length:
            raise ValueError(
                f"{batch.side.name.capitalize()} example {position} has {length} tokens in a batch of {batch.size}, "
                f"{int(used_alone.sum())} alone: the collate function cuts rows to the length of their neighbours. Let "
                "it pad them, as captum_sdi.data.collate.Collator does, or pass batch_size=1 (to a DataLoader, too)."
            )
