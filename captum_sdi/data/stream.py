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

import itertools
from collections.abc import Iterable, Iterator
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

from captum_sdi.data.batch import batch_size, select
from captum_sdi.data.fingerprints import batch_fingerprint
from captum_sdi.data.losses import IGNORED, LossFn, untargeted_examples
from captum_sdi.words import warn_user


def check_order(loader: DataLoader[Any], argument: str) -> None:
    """Refuses a loader whose order or length is not that of its dataset: an example's position is its identity.

    Args:
        loader: The loader.
        argument: Named in the error.

    Raises:
        ValueError: It shuffles, or drops its last batch.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if not isinstance(loader.dataset, IterableDataset) and _shuffles(getattr(sampler, "sampler", sampler)):
        raise ValueError(
            f"{argument} shuffles, but an example is known by its position: results could not be matched to "
            "examples. Build the DataLoader with shuffle=False."
        )
    if getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        raise ValueError(
            f"{argument} has drop_last=True and would leave examples out without a word. Build the DataLoader with "
            "drop_last=False."
        )


def _shuffles(sampler: Any) -> bool:
    if isinstance(sampler, SequentialSampler):
        return False
    if isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler):
        return True
    if getattr(sampler, "shuffle", False) is True:
        return True
    orders = []
    for seed in (0, 1):  # a sampler of somebody else's, as one that groups by length: does it draw?
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            orders.append([str(each) for each in sampler])
    return orders[0] != orders[1]


class Stream:
    """The batches of a loader, pass after pass in one order; the first one can be looked at beforehand.

    Args:
        loader: A DataLoader, or any iterable of batches.
        argument: Named in errors.
        loss_fn: What the batches are for: the default loss predicts nothing from one token.

    Raises:
        ValueError: The loader shuffles or drops its last batch.
    """

    def __init__(self, loader: Iterable[Any], argument: str, loss_fn: LossFn | None = None) -> None:
        if isinstance(loader, DataLoader):
            check_order(loader, argument)
        self._loader, self._argument, self._loss_fn = loader, argument, loss_fn
        self._peeked: tuple[Any, Iterator[Any]] | None = None
        self._seen: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError when unknown, as for DataLoader

    def peek(self) -> Any:
        """The first batch, without losing it for a loader that can be read only once.

        Returns:
            The batch.

        Raises:
            ValueError: There is none, or none any more.
        """
        if self._peeked is None:
            iterator = iter(self._loader)
            try:
                self._peeked = next(iterator), iterator
            except StopIteration:
                if self._seen is None:
                    raise ValueError(f"{self._argument} is empty.") from None
                raise ValueError(self._changed(f"it ended after 0 batches instead of {len(self._seen)}")) from None
        return self._peeked[0]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """One pass.

        Yields:
            The position of a batch's first example, and the batch.

        Raises:
            ValueError: A pass differs from the first one.
        """
        first, rest = self.peek(), self._peeked[1]  # type: ignore[index]
        self._peeked = None
        seen: list[bytes] = []
        empty: list[int] = []
        start = 0
        for raw in itertools.chain([first], rest):
            seen.append(batch_fingerprint(raw))
            if self._seen is not None and self._seen[len(seen) - 1 : len(seen)] != seen[-1:]:
                raise ValueError(self._changed(f"batch {len(seen) - 1} is another one"))
            empty += [start + i for i in untargeted_examples(raw, self._loss_fn)] if self._seen is None else []
            yield start, raw
            start += batch_size(raw)
        if self._seen is not None and len(seen) != len(self._seen):
            raise ValueError(self._changed(f"it ended after {len(seen)} batches instead of {len(self._seen)}"))
        self._seen = seen
        if empty:
            shown = f"{empty[:10]}{f' and {len(empty) - 10} more' * (len(empty) > 10)}"
            warn_user(
                f"{self._argument}: example(s) {shown} have no target (no label but {IGNORED} to predict); their "
                "influence is zero."
            )

    @property
    def n_examples(self) -> int | None:
        """How many examples there are; None when only a whole pass can tell."""
        return len(self._loader.dataset) if self._is_indexed() else None  # type: ignore[attr-defined]

    def picked(self, only: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """Some of the examples; a dataset in its own order is asked for their batches alone.

        Args:
            only: Their positions.

        Yields:
            The positions of a batch's examples ``(n,)``, and the batch.
        """
        if not self._is_indexed():
            for start, raw in self:
                positions = torch.arange(start, start + batch_size(raw))
                found = positions[torch.isin(positions, only)]
                if len(found):
                    yield found, select(raw, (found - start).tolist())
                if only.max() <= positions[-1]:
                    return
            return
        loader: Any = self._loader
        wanted = only.unique()
        wanted = wanted[wanted < len(loader.dataset)]
        numbers = wanted // loader.batch_size
        for number in numbers.unique().tolist():
            rows = range(len(loader.dataset))[number * loader.batch_size : (number + 1) * loader.batch_size]
            positions = wanted[numbers == number]
            # Padded like their batch in a whole pass: rounding is the same.
            yield (
                positions,
                select(loader.collate_fn([loader.dataset[i] for i in rows]), (positions - rows[0]).tolist()),
            )

    def _is_indexed(self) -> bool:
        """Whether the example at a position is the dataset's at that index."""
        loader = self._loader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return False
        plain = type(loader.sampler) is SequentialSampler and type(loader.batch_sampler) is BatchSampler
        return plain and hasattr(loader.dataset, "__len__")

    def _changed(self, how: str) -> str:
        return (
            f"{self._argument} yields something else at the next checkpoint: {how}. An example is known by its "
            "position, so every pass must yield the same batches: no shuffling, no random augmentation, and an "
            "iterable that can be read again."
        )
