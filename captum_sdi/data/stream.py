"""A stream of batches: pass after pass the same examples in the same order, since a position is an identity."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
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
    """Check that a loader keeps its dataset's order and leaves nothing out.

    Raises:
        ValueError: If it shuffles, or drops its last batch; names ``argument``.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = getattr(sampler, "sampler", sampler)
    if not isinstance(loader.dataset, IterableDataset) and shuffles(sampler):
        raise ValueError(
            f"{argument} shuffles, but an example is known by its position: results could not be matched to "
            "examples. Build the DataLoader with shuffle=False."
        )
    if getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        raise ValueError(
            f"{argument} has drop_last=True and would leave examples out without a word. Build the DataLoader with "
            "drop_last=False."
        )


def shuffles(sampler: Any) -> bool:
    """Say whether a sampler draws its order; one of an unknown type is run from two seeds."""
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
            orders.append([str(index) for index in sampler])
    return orders[0] != orders[1]


class Stream:
    """The batches of a loader, pass after pass in one order; the first can be looked at before.

    Args:
        loader: A DataLoader, or any iterable of batches.
        argument: Which argument the loader came from, named in errors.
        loss_fn: What the batches are for: the default loss predicts nothing from one token.

    Raises:
        ValueError: If the loader shuffles or drops its last batch.
    """

    def __init__(self, loader: Iterable[Any], argument: str, loss_fn: LossFn | None = None) -> None:
        if isinstance(loader, DataLoader):
            check_order(loader, argument)
        self._loader = loader
        self._argument = argument
        self._loss_fn = loss_fn
        self._opened: tuple[Any, Iterator[Any]] | None = None
        self._fingerprints: list[bytes] | None = None  # of the first whole pass, by batch

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError when unknown, as for DataLoader

    def peek(self) -> Any:
        """Return the first batch, without losing it for a loader that can be read only once."""
        first, _ = self._open()
        return first

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Make one pass, and compare it with the first one.

        Yields:
            The position of a batch's first example, and the batch.

        Raises:
            ValueError: If the pass yields other batches than the first one.
        """
        first, following = self._open()
        self._opened = None
        fingerprints: list[bytes] = []
        untargeted: list[int] = []
        start = 0
        batches = itertools.chain([first], following)
        for number, raw in enumerate(batches):
            fingerprint = batch_fingerprint(raw)
            if self._fingerprints is None:
                in_batch = untargeted_examples(raw, self._loss_fn)
                untargeted += [start + position for position in in_batch]
            elif self._fingerprints[number : number + 1] != [fingerprint]:
                raise ValueError(self._changed(f"batch {number} is another one"))
            fingerprints.append(fingerprint)
            yield start, raw
            start += batch_size(raw)
        if self._fingerprints is not None and len(fingerprints) != len(self._fingerprints):
            raise ValueError(self._changed_length(len(fingerprints), len(self._fingerprints)))
        self._fingerprints = fingerprints
        if untargeted:
            self._warn_of_untargeted(untargeted)

    @property
    def n_examples(self) -> int | None:
        """How many examples there are; None when only a whole pass can tell."""
        return len(self._loader.dataset) if self._is_indexed() else None  # type: ignore[attr-defined]

    def picked(self, only: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """Yield some of the examples, batch by batch.

        Of a dataset in its own order only their batches are read, of any other loader a whole pass.

        Args:
            only: Positions of the examples.

        Yields:
            The positions of a batch's examples ``(n,)``, and the batch.
        """
        if self._is_indexed():
            yield from self._picked_from_dataset(only)
        else:
            yield from self._picked_from_pass(only)

    def collated_alone(self, position: int) -> Any:
        """Return the batch of one example alone; None where the loader has no dataset in its own order."""
        if not self._is_indexed():
            return None
        loader: Any = self._loader
        return loader.collate_fn([loader.dataset[position]])

    def _picked_from_pass(self, only: Tensor) -> Iterator[tuple[Tensor, Any]]:
        for start, raw in self:
            positions = torch.arange(start, start + batch_size(raw))
            wanted = positions[torch.isin(positions, only)]
            if len(wanted):
                in_batch = wanted - start
                yield wanted, select(raw, in_batch.tolist())
            if only.max() <= positions[-1]:
                return

    def _picked_from_dataset(self, only: Tensor) -> Iterator[tuple[Tensor, Any]]:
        loader: Any = self._loader
        dataset, size = loader.dataset, loader.batch_size
        wanted = only.unique()
        wanted = wanted[wanted < len(dataset)]
        batch_numbers = wanted // size
        for number in batch_numbers.unique().tolist():
            start = number * size
            stop = min(start + size, len(dataset))
            # The whole batch is collated, so that its examples are padded, and rounded, as in a whole pass.
            rows = [dataset[index] for index in range(start, stop)]
            raw = loader.collate_fn(rows)
            positions = wanted[batch_numbers == number]
            in_batch = positions - start
            yield positions, select(raw, in_batch.tolist())

    def _open(self) -> tuple[Any, Iterator[Any]]:
        """Return the first batch and an iterator of the others, which the next pass will use up."""
        if self._opened is None:
            iterator = iter(self._loader)
            try:
                self._opened = next(iterator), iterator
            except StopIteration:
                if self._fingerprints is None:
                    raise ValueError(f"{self._argument} is empty.") from None
                raise ValueError(self._changed_length(0, len(self._fingerprints))) from None
        return self._opened

    def _is_indexed(self) -> bool:
        """Say whether the example at a position is the dataset's at that index."""
        loader = self._loader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return False
        in_order = type(loader.sampler) is SequentialSampler
        plain_batches = type(loader.batch_sampler) is BatchSampler
        return in_order and plain_batches and hasattr(loader.dataset, "__len__")

    def _changed_length(self, n_batches: int, n_before: int) -> str:
        return self._changed(f"it ended after {n_batches} batches instead of {n_before}")

    def _changed(self, difference: str) -> str:
        return (
            f"{self._argument} yields something else at the next checkpoint: {difference}. An example is known by its "
            "position, so every pass must yield the same batches: no shuffling, no random augmentation, and an "
            "iterable that can be read again."
        )

    def _warn_of_untargeted(self, positions: Sequence[int]) -> None:
        shown = str(positions[:10])
        if len(positions) > 10:
            shown += f" and {len(positions) - 10} more"
        warn_user(
            f"{self._argument}: example(s) {shown} have no target (no label but {IGNORED} to predict); their "
            "influence is zero."
        )
