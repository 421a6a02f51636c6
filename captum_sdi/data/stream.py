"""A stream of batches: pass after pass the same examples in the same order, since a position is an identity."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from captum_sdi.data.batch import batch_size, plain_batch, select
from captum_sdi.data.fingerprints import batch_fingerprint
from captum_sdi.data.losses import IGNORED, LossFn, untargeted_examples
from captum_sdi.data.order import check_order, check_places, check_rows, is_indexed, other_rows, rows_at
from captum_sdi.words import warn_user

READ_TWICE = 4
"""How many batches are read twice, to notice data that differs at every reading."""


class Stream:
    """The batches of a loader, pass after pass in one order; the first can be looked at before.

    Args:
        loader: A DataLoader, or any iterable of batches.
        argument: Which argument the loader came from, named in errors.
        loss_fn: What the batches are for: the default loss predicts nothing from one token.

    Raises:
        ValueError: If the loader shuffles, or leaves something out.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        argument: str,
        loss_fn: LossFn | None = None,
    ) -> None:
        if isinstance(loader, DataLoader):
            check_order(loader, argument)
        self._loader = loader
        self._argument = argument
        self._loss_fn = loss_fn
        self._opened: tuple[Any, Iterator[Any]] | None = None
        self._fingerprints: dict[int, bytes] = {}  # of every batch read so far, by its number
        self._n_batches: int | None = None  # known after the first whole pass
        self._n_read_twice = 0

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError when unknown, as for DataLoader

    def peek(self) -> Any:
        """Return the first batch, without losing it for a loader that can be read only once."""
        first, _ = self._open()
        return first

    def peek_examples(self, at_most: int) -> Iterator[Any]:
        """Yield the first examples, each as a batch of its own; none is lost for a loader that can be read only once.

        Args:
            at_most: How many are read.
        """
        first, following = self._open()
        read_batches: list[Any] = []
        raw: Any = first
        n_seen = 0
        while raw is not None and n_seen < at_most:
            n_examples = min(batch_size(raw), at_most - n_seen)
            for number in range(n_examples):
                yield select(raw, [number])
            n_seen += n_examples
            if n_seen < at_most:
                raw = next(following, None)
                if raw is not None:
                    read_batches.append(raw)
                self._opened = first, itertools.chain(read_batches, following)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Make one pass, and compare it with the first one.

        Yields:
            The position of a batch's first example, and the batch.

        Raises:
            ValueError: If the pass yields other batches than the first one.
        """
        first, following = self._open()
        self._opened = None
        untargeted: list[int] = []
        start = n_batches = 0
        batches = check_rows(itertools.chain([first], following), self._loader, self._argument)
        for number, raw in enumerate(batches):
            self._compare(number, start, raw)
            if self._n_batches is None:
                in_batch = untargeted_examples(raw, self._loss_fn)
                untargeted += [start + position for position in in_batch]
            n_batches = number + 1
            yield start, raw
            start += batch_size(raw)
        if self._n_batches not in (None, n_batches):
            raise ValueError(self._changed_length(n_batches))
        self._n_batches = n_batches
        if untargeted:
            self._warn_of_untargeted(untargeted)

    def _compare(self, number: int, start: int, raw: Any) -> None:
        """Compare a batch with the one read before, the first ones with their rows read again.

        Raises:
            ValueError: If it is another one.
        """
        fingerprint = batch_fingerprint(raw)
        is_new = number not in self._fingerprints
        is_past_end = self._n_batches is not None and number >= self._n_batches
        if is_past_end or self._fingerprints.setdefault(number, fingerprint) != fingerprint:
            raise ValueError(self._changed(f"batch {number} is another one"))
        if is_new and self._n_read_twice < READ_TWICE and is_indexed(self._loader):
            self._n_read_twice += 1
            indices = range(start, start + batch_size(raw))
            check_places(self._loader, indices, raw, self._argument)  # type: ignore[arg-type]

    @property
    def n_examples(self) -> int | None:
        """How many examples there are; None when only a whole pass can tell."""
        return len(self._loader.dataset) if is_indexed(self._loader) else None  # type: ignore[attr-defined]

    def picked(self, only: Tensor) -> Iterator[tuple[Tensor, Any]]:
        """Yield some of the examples, batch by batch.

        Of a dataset in its own order only their batches are read, of any other loader a whole pass.

        Args:
            only: Positions of the examples.

        Yields:
            The positions of a batch's examples ``(n,)``, and the batch.
        """
        if is_indexed(self._loader):
            yield from self._picked_from_dataset(only)
        else:
            yield from self._picked_from_pass(only)

    def collated_alone(self, position: int) -> Any:
        """Return the batch of one example alone; None where the loader has no dataset in its own order."""
        if not is_indexed(self._loader):
            return None
        loader: Any = self._loader
        return plain_batch(loader.collate_fn([loader.dataset[position]]))

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
            rows = rows_at(dataset, range(start, stop))
            raw = plain_batch(loader.collate_fn(rows))
            if batch_size(raw) != stop - start:
                raise ValueError(other_rows(self._argument, number, stop - start, batch_size(raw)))
            self._compare(number, start, raw)
            positions = wanted[batch_numbers == number]
            in_batch = positions - start
            yield positions, select(raw, in_batch.tolist())

    def _open(self) -> tuple[Any, Iterator[Any]]:
        """Return the first batch and an iterator of the others, which the next pass will use up."""
        if self._opened is None:
            iterator = map(plain_batch, self._loader)
            try:
                self._opened = next(iterator), iterator
            except StopIteration:
                if self._n_batches is None:
                    raise ValueError(f"{self._argument} is empty.") from None
                raise ValueError(self._changed_length(0)) from None
        return self._opened

    def _changed_length(self, n_batches: int) -> str:
        return self._changed(f"it ended after {n_batches} batches instead of {self._n_batches}")

    def _changed(self, difference: str) -> str:
        return (
            f"{self._argument} yields something else when it is read again: {difference}. An example is known by its "
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
