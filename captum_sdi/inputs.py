"""Examples in any of the forms that users have: a batch, a loader, a Dataset, a list of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from captum_sdi.data.stream import check_order
from captum_sdi.rehearsal.arguments import check_batch_size, check_inputs


def as_loader(data: Any, batch_size: Any, collate: Callable[[Any], Any], argument: str) -> DataLoader[Any]:
    """Return a DataLoader as it is, a Dataset in batches and in order.

    Args:
        data: A DataLoader, a Dataset, or a list of rows.
        batch_size: Examples per batch of a Dataset.
        collate: Makes a batch of a Dataset's rows.
        argument: Named in errors.

    Raises:
        TypeError: If it is something else.
        ValueError: If a loader shuffles or drops its last batch.
    """
    if isinstance(data, DataLoader):
        check_order(data, argument)
        return data
    check_batch_size(batch_size, argument)
    if not isinstance(data, IterableDataset) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"{argument} must be a Dataset or a DataLoader, got {type(data).__name__}. Of rows that come one after "
            "the other make a list, or an IterableDataset that can be read again."
        )
    return DataLoader(data, batch_size, shuffle=False, collate_fn=collate)


def as_batches(inputs: Any, batch_size: int, collate: Callable[[Any], Any]) -> Iterable[Any]:
    """Return the batches of test examples.

    Args:
        inputs: A batch (tuple, list or mapping), a DataLoader, a Dataset, or a list of rows.
        batch_size: Examples per batch of a Dataset.
        collate: Makes a batch of a Dataset's rows.
    """
    check_inputs(inputs)
    is_batch = isinstance(inputs, tuple | Mapping) or (isinstance(inputs, list) and not _are_rows(inputs))
    return [inputs] if is_batch else as_loader(inputs, batch_size, collate, "inputs")


def _are_rows(inputs: list[Any]) -> bool:
    """Tell a list of a dataset's rows from a batch given as a list of tensors."""
    return all(isinstance(row, Mapping | tuple) for row in inputs)
