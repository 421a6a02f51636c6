"""A position is an identity: what a loader must keep to, so that the n-th example it yields is always the same one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from captum_sdi.data.batch import batch_size, plain_batch, tensors_in
from captum_sdi.data.fingerprints import batch_fingerprint

# --- before anything is read ---


def check_order(loader: DataLoader[Any], argument: str) -> None:
    """Check that a loader keeps its dataset's order and leaves nothing out.

    Raises:
        ValueError: If it is split among processes, shuffles, drops its last batch, leaves rows out or draws some
            twice, or has workers that change the order; names ``argument``.
    """
    for check in CHECKS:
        check(loader, argument)


def _check_is_whole(loader: DataLoader[Any], argument: str) -> None:
    dataset, batch_sampler = loader.dataset, loader.batch_sampler
    inner = getattr(batch_sampler, "sampler", None)
    among_processes = getattr(dataset, "_distributed", None)  # as `datasets.split_dataset_by_node` leaves it
    parts = [loader.sampler, batch_sampler, inner, dataset, among_processes]
    if hasattr(loader, "slice_fn"):  # accelerate's DataLoaderDispatcher
        parts.append(loader.state)  # type: ignore[attr-defined]
    for part in parts:
        for name in ("num_replicas", "num_processes", "world_size"):
            count = getattr(part, name, 1)
            if isinstance(count, int) and count > 1:
                raise ValueError(
                    f"{argument} is split among {count} processes ({type(part).__name__}) and would yield a part of "
                    "its rows. Pass the plain DataLoader to every process, neither prepared by accelerate nor with a "
                    "DistributedSampler: an index shares the work out itself."
                )


def _check_is_not_shuffled(loader: DataLoader[Any], argument: str) -> None:
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = getattr(sampler, "sampler", sampler)
    if not isinstance(loader.dataset, IterableDataset) and shuffles(sampler, _most_draws(loader)):
        raise ValueError(
            f"{argument} shuffles, but an example is known by its position: results could not be matched to "
            "examples. Build the DataLoader with shuffle=False."
        )


def _check_last_batch_is_kept(loader: DataLoader[Any], argument: str) -> None:
    if getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        raise ValueError(
            f"{argument} has drop_last=True and would leave examples out without a word. Build the DataLoader with "
            "drop_last=False."
        )


def _check_every_row_is_drawn(loader: DataLoader[Any], argument: str) -> None:
    n = _length(loader.dataset)
    if n is None or isinstance(loader.dataset, IterableDataset) or is_indexed(loader):
        return
    draws = loader.sampler if loader.batch_sampler is None else itertools.chain.from_iterable(loader.batch_sampler)
    drawn = [str(index) for index in itertools.islice(draws, n + 1)]
    n_different = len(set(drawn))
    if len(drawn) > n or n_different < len(drawn):
        raise ValueError(
            f"{argument} draws some of its dataset's {n} rows more than once, or without end: results could not be "
            "matched to examples. Build the DataLoader with shuffle=False and without sampler=."
        )
    if n_different < n:
        raise ValueError(
            f"{argument} draws {n_different} of its dataset's {n} rows and would leave {n - n_different} out without a "
            "word. Pass the rows that count, such as torch.utils.data.Subset(dataset, indices), without sampler=."
        )


def _check_workers_keep_order(loader: DataLoader[Any], argument: str) -> None:
    if loader.num_workers < 2:
        return
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{argument} reads an IterableDataset with num_workers={loader.num_workers}: each worker would yield its "
            "own share, or all of it again, in an order of its own. Build the DataLoader with num_workers of 0 or 1."
        )
    if hasattr(loader, "in_order") and not loader.in_order:
        raise ValueError(
            f"{argument} has in_order=False, but an example is known by its position. Build the DataLoader with "
            "in_order=True."
        )


CHECKS: tuple[Callable[[DataLoader[Any], str], None], ...] = (
    _check_is_whole,
    _check_is_not_shuffled,
    _check_last_batch_is_kept,
    _check_every_row_is_drawn,
    _check_workers_keep_order,
)


def shuffles(sampler: Any, at_most: int) -> bool:
    """Say whether a sampler draws its order; one of an unknown type is run from two seeds, so far."""
    if isinstance(sampler, SequentialSampler):
        return False
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return True
    if getattr(sampler, "shuffle", None) is True:
        return True
    orders = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            orders.append([str(index) for index in itertools.islice(sampler, at_most)])
    return orders[0] != orders[1]


def is_indexed(loader: Any) -> bool:
    """Say whether the example at a position is the dataset's at that index."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return False
    in_order = type(loader.sampler) is SequentialSampler
    plain_batches = type(loader.batch_sampler) is BatchSampler
    return in_order and plain_batches and hasattr(loader.dataset, "__len__")


def _most_draws(loader: DataLoader[Any]) -> int:
    """Return how many draws tell enough of a sampler, which may have no end."""
    n = _length(loader.dataset)
    return 1_000_000 if n is None else n + 1


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


# --- while it is read ---


def check_rows(
    batches: Iterable[Any],
    loader: Any,
    argument: str,
) -> Iterator[Any]:
    """Yield batches that have as many rows as were drawn for them.

    Args:
        batches: Of one pass over the loader.
        loader: Where they come from; anything but a DataLoader of rows is taken at its word.
        argument: Named in errors.

    Raises:
        ValueError: If a batch has more or fewer rows: its collate function left some out, or made several of one.
    """
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
        yield from batches
        return
    is_stream = isinstance(loader.dataset, IterableDataset)
    drawn: Iterator[Any] = itertools.repeat(None) if is_stream else iter(loader.batch_sampler)
    size = n_drawn = loader.batch_size or 0
    for number, raw in enumerate(batches):
        if is_stream and size != n_drawn:  # the last batch alone may be smaller
            raise ValueError(other_rows(argument, number - 1, n_drawn, size))
        indices = next(drawn, ())
        size = batch_size(raw)
        if not is_stream:
            n_drawn = len(indices)
        if size > n_drawn or (size < n_drawn and not is_stream):
            raise ValueError(other_rows(argument, number, n_drawn, size))
        yield raw


def other_rows(
    argument: str,
    number: int,
    n_drawn: int,
    size: int,
) -> str:
    """Write the sentence about a batch of other rows than its dataset's."""
    return (
        f"{argument} yields {size} rows in batch {number}, for which {n_drawn} were drawn: its collate function leaves "
        "rows out, splits or packs them, but an example is known by its position. Filter, split or pack the dataset "
        "before, so that one row is one example."
    )


def check_places(
    loader: DataLoader[Any],
    indices: Sequence[Any],
    raw: Any,
    argument: str,
) -> None:
    """Read a batch's rows again: they must be the same, and lie where they were drawn.

    Args:
        loader: A loader of a dataset's rows.
        indices: What was drawn for the batch.
        raw: The batch.
        argument: Named in errors.

    Raises:
        ValueError: If they are others this time, or the collate function changes their order.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            rows = rows_at(loader.dataset, indices)
            second_reading = plain_batch(loader.collate_fn(list(map(copy.copy, rows))))
            single_batches = [plain_batch(loader.collate_fn([copy.copy(row)])) for row in rows]
    except Exception:  # of a dataset that only its workers can read, or a collate function that wants several rows
        return
    if batch_fingerprint(second_reading) != batch_fingerprint(raw):
        raise ValueError(
            f"{argument} yields something else when it is read again: the rows of indices {list(indices)[:3]}... "
            "changed. Fix what is random in the dataset or its collate function, such as crops or masks, for example "
            "by storing what they return once."
        )
    if any(batch_size(row) != 1 for row in single_batches):
        return
    for place, row in enumerate(single_batches):
        matching_places = [candidate for candidate in range(len(single_batches)) if _lies_at(row, raw, candidate)]
        if matching_places and place not in matching_places:
            raise ValueError(
                f"{argument}: the collate function changes the order of rows: row {place} of a batch comes out as row "
                f"{matching_places[0]}, but an example is known by its position. Sort the dataset before, "
                "not in collate_fn."
            )


def rows_at(dataset: Any, indices: Sequence[Any]) -> list[Any]:
    """Read rows as a DataLoader does: all at once where the dataset can."""
    read_all = getattr(dataset, "__getitems__", None)
    if callable(read_all):
        return list(read_all(list(indices)))
    return [dataset[index] for index in indices]


def _lies_at(
    row: Any,
    raw: Any,
    place: int,
) -> bool:
    """Say whether a row collated alone is in a batch at a place, up to padding on either side."""
    pairs = zip(tensors_in(row), tensors_in(raw), strict=False)
    return all(single.ndim == 0 or _is_padded(single[0], batched[place]) for single, batched in pairs)


def _is_padded(single: Tensor, padded: Tensor) -> bool:
    if single.ndim == 0:
        return torch.equal(single, padded)
    length = len(single)
    head, tail = padded[:length], padded[len(padded) - length :]
    return torch.equal(single, head) or torch.equal(single, tail)
