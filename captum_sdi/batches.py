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
import inspect
import itertools
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

IGNORED = -100
"""The label of a position where nothing is predicted, as in Hugging Face."""

LossFn = Callable[[Any, Any], Tensor]
Settings = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Batch:
    """A batch taken apart: ``model(*args, **kwargs)`` and the labels of ``size`` examples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    size: int


class BatchReader:
    """Reads the batches of one model.

    Args:
        model: The model that the batches are for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._accepted = _forward_keys(model)
        self._dropped: set[str] = set()

    def __call__(self, raw: Any, forward_kwargs: Settings | None = None) -> Batch:
        """Takes a batch apart and moves it to the model's device.

        Args:
            raw: A tuple, list or mapping; see the module's docstring.
            forward_kwargs: Further keywords for the model's forward, or a function of the batch that returns them.

        Returns:
            The batch.

        Raises:
            TypeError: It is something else.
            ValueError: Its tensors disagree on the number of examples.
        """
        size = batch_size(raw)
        extra = forward_kwargs(raw) if callable(forward_kwargs) else forward_kwargs or {}
        if not isinstance(extra, Mapping):
            raise TypeError(f"forward_kwargs must be a mapping or return one, got {type(extra).__name__}.")
        # Asked anew for every batch: a checkpoint's load function may have moved the model.
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        args, kwargs, labels = _parts(raw)
        kwargs = {**self._known(kwargs), **extra}
        args, kwargs, labels = (_map(lambda t: _moved(t, device), part) for part in (args, kwargs, labels))
        return Batch(tuple(args), kwargs, labels, size)

    def takes(self, key: str) -> bool:
        """Whether the model's forward names this keyword.

        Args:
            key: The keyword.

        Returns:
            False also for a forward that takes any keyword without naming it.
        """
        return self._accepted is not None and key in self._accepted

    def _known(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._accepted is None:
            return kwargs
        unknown = set(kwargs) - self._accepted
        if unknown - self._dropped:
            warn(f"{type(self._model).__name__}.forward does not take {sorted(unknown)}: dropped from every batch.")
            self._dropped |= unknown
        return {key: value for key, value in kwargs.items() if key not in unknown}


def batch_size(raw: Any) -> int:
    """The number of examples in a batch.

    Args:
        raw: A tuple, list or mapping; see the module's docstring.

    Returns:
        The length of the first axis of its tensors.

    Raises:
        TypeError: It is something else.
        ValueError: Its tensors disagree, or there is none, or no example in them.

    Example:
        >>> batch_size({"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4, 7)})
        4
    """
    hint = " Tokenize texts first, into input_ids and labels." if _holds_text(raw) else ""
    if isinstance(raw, Mapping):
        leaves = {str(key): value for key, value in raw.items()}
    elif isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) > 1:
        leaves = {f"batch[{i}]": value for i, value in enumerate(raw)}
    else:
        raise TypeError(
            f"A batch must be a tuple (inputs..., labels) or a mapping of model inputs, got {_described(raw)}.{hint}"
        )
    sizes = {name: len(t) for name, value in leaves.items() for t in _tensors(value) if t.ndim > 0}
    if not sizes:
        raise ValueError(f"The batch holds no tensor with an example axis: {list(leaves)}.{hint}")
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The batch's tensors disagree on the number of examples (their first axis): {sizes}. "
            "Give each one row per example, or pass what all examples share in forward_kwargs=."
        )
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError(f"The batch holds no example: the tensors of {list(sizes)} have no row.")
    return size


def select(raw: Any, indices: Sequence[int]) -> Any:
    """The batch of some of its examples.

    Args:
        raw: A batch.
        indices: Positions of the examples.

    Returns:
        A batch of the same form.
    """
    size, index = batch_size(raw), torch.as_tensor(indices, dtype=torch.long)

    def rows(value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == size and not list(_tensors(value)):
            return [value[i] for i in index.tolist()]  # such as the examples' texts
        return _map(lambda t: t if t.ndim == 0 else t[index.to(t.device)], value)

    if isinstance(raw, Mapping):
        return {key: rows(value) for key, value in raw.items()}
    return tuple(rows(value) for value in raw)


def fingerprint(raw: Any) -> bytes:
    """A hash of a batch's content, to notice that an iterable yields something else the next time.

    Args:
        raw: A batch.

    Returns:
        8 bytes.
    """
    digest = hashlib.blake2b(digest_size=8)
    for tensor in _tensors(raw):
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
        for i, tensor in enumerate(_tensors(value)):
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
            seen.append(fingerprint(raw))
            if self._seen is not None and self._seen[len(seen) - 1 : len(seen)] != seen[-1:]:
                raise ValueError(self._changed(f"batch {len(seen) - 1} is another one"))
            empty += [start + i for i in untargeted(raw, self._loss_fn)] if self._seen is None else []
            yield start, raw
            start += batch_size(raw)
        if self._seen is not None and len(seen) != len(self._seen):
            raise ValueError(self._changed(f"it ended after {len(seen)} batches instead of {len(self._seen)}"))
        self._seen = seen
        if empty:
            shown = f"{empty[:10]}{f' and {len(empty) - 10} more' * (len(empty) > 10)}"
            warn(
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


# --- collating rows ---


class Collator:
    """Stacks a dataset's rows into a batch, padding ragged mapping rows on the right.

    Labels are padded with -100, the attention mask with 0 (and made when rows are ragged and have none), token ids
    with the model's padding token and everything else with 0. Ragged tuple rows are refused: a tuple has no place for
    an attention mask.

    Args:
        pad_token_id: What pads ``input_ids``.

    Example:
        >>> batch = Collator()([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
        >>> batch["labels"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6], [7, -100]], [[1, 1], [1, 0]])
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self._padding = {"input_ids": pad_token_id, "labels": IGNORED}

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Collates.

        Args:
            rows: What the dataset yields.

        Returns:
            A batch: a dict for mapping rows, else what `torch.utils.data.default_collate` makes of them.

        Raises:
            ValueError: Rows have different keys, are ragged tuples, or are batches.
        """
        if not isinstance(rows[0], Mapping):
            return self._collated_tuples(rows)
        if _is_batch(rows[0]):
            raise ValueError(
                f"A row is one example, but input_ids and labels of this one are of shape "
                f"{tuple(rows[0]['labels'].shape)}: it is a batch. Pass the rows themselves, or "
                "DataLoader(batches, batch_size=None)."
            )
        keys = set(rows[0])
        for i, row in enumerate(rows):
            if set(row) != keys:
                raise ValueError(f"Row {i} of a batch has keys {sorted(row)}, its first row {sorted(keys)}.")
        batch = {key: self._column(key, [row[key] for row in rows]) for key in rows[0]}
        lengths = [len(row["input_ids"]) for row in rows] if "input_ids" in keys else []
        if len(set(lengths)) > 1 and "attention_mask" not in keys:
            batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
        return batch

    def _column(self, key: str, values: list[Any]) -> Any:
        try:
            tensors = [torch.as_tensor(value) for value in values]
        except (TypeError, ValueError, RuntimeError):
            return values  # such as texts; the reader drops what forward does not take
        if len({tensor.shape[1:] for tensor in tensors}) > 1 or any(t.ndim == 0 for t in tensors):
            return torch.stack(tensors)
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=self._padding.get(key, 0))

    @staticmethod
    def _collated_tuples(rows: Sequence[Any]) -> Any:
        try:
            return default_collate(list(rows))
        except RuntimeError as error:
            raise ValueError(
                "The rows of a batch differ in shape and tuples have no place for an attention mask: yield mapping "
                "rows (input_ids, attention_mask, labels), which are padded, or pass collate_fn=."
            ) from error


# --- losses ---


class TokenCrossEntropy:
    """Cross-entropy from a language model's logits, averaged over each example's own target tokens.

    ``ℓ = -1/|T| Σ_{p in T} log softmax(logits_p)[label_p]`` with T the positions whose label is not -100. An example
    without any has loss zero.

    Args:
        shift: The logits at position p predict the label at p + 1, as in causal models.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 8), torch.tensor([[-100, 2, 3]])
        >>> round(TokenCrossEntropy()(logits, labels).item(), 4)  # log 8
        2.0794
    """

    reduction = "none"

    def __init__(self, shift: bool = True) -> None:
        self.shift = shift

    def __repr__(self) -> str:
        return f"{'next-token' if self.shift else 'token'} cross-entropy averaged over an example's targets"

    def __call__(self, output: Any, labels: Any) -> Tensor:
        """The loss of each example.

        Args:
            output: What the model returned: logits, or something with ``logits``, or a tuple that begins with them.
            labels: ``(n, p)``, or ``(n,)`` for logits of one position ``(n, v)``.

        Returns:
            ``(n,)``.

        Raises:
            ValueError: There are no labels, or they do not fit the logits.
        """
        logits = token_logits(output)
        if not isinstance(labels, Tensor):
            raise ValueError(
                "There are no labels and no loss_fn to do without them: put 'labels' into the batch (last in a "
                "tuple), or pass loss_fn=."
            )
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} and dtype {labels.dtype} do not fit logits of shape "
                f"{tuple(logits.shape)}: the default loss needs token ids. Pass loss_fn=."
            )
        if self.shift and labels.ndim > 1:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=IGNORED, reduction="none")
        losses, targets = losses.view(len(labels), -1), (labels != IGNORED).view(len(labels), -1)
        return losses.sum(1) / targets.sum(1).clamp(min=1)


def token_logits(output: Any) -> Tensor:
    """The logits in what a language model returned.

    Args:
        output: Logits, or something with ``logits``, or a tuple that begins with them.

    Returns:
        ``(n, ..., v)``.

    Raises:
        ValueError: There are none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, Sequence) and output:
        logits = output[0]
    logits = output if logits is None else logits
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise ValueError(f"The default loss needs logits, but the model returned {_described(output)}. Pass loss_fn=.")
    return logits


def default_loss(model: nn.Module) -> TokenCrossEntropy:
    """The loss that ``loss_fn=None`` stands for.

    Args:
        model: Its config says whether it is causal.

    Returns:
        Next-token cross-entropy, unshifted when ``config.is_causal`` is False.
    """
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    return TokenCrossEntropy(shift=getattr(config, "is_causal", True) is not False)


def example_losses(loss_fn: LossFn, output: Any, labels: Any, size: int, argument: str = "loss_fn") -> Tensor:
    """The loss of each example, whatever the loss function reduces.

    Args:
        loss_fn: See the module's docstring.
        output: What the model returned.
        labels: The batch's labels.
        size: The number of examples n.
        argument: Named in the error.

    Returns:
        ``(n,)``.

    Raises:
        TypeError: It returned no tensor.
        ValueError: What it returned has another shape.
    """
    losses = loss_fn(output, labels)
    if not isinstance(losses, Tensor):
        raise TypeError(f"{argument} must return a tensor, got {_described(losses)}.")
    if losses.ndim == 0 and isinstance(output, Tensor) and len(output) == size:
        parts = ((output[i : i + 1], _map(operator.itemgetter(slice(i, i + 1)), labels)) for i in range(size))
        return torch.stack([loss_fn(*part).reshape(()) for part in parts])
    if losses.ndim == 0 or losses.shape[0] != size:
        scalar = f" (a scalar is possible only where the model returns a tensor, not {_described(output)})"
        raise ValueError(
            f"{argument} returned a tensor of shape {tuple(losses.shape)} for a batch of {size}. Return one value per "
            f"example, of shape ({size},), such as the mean over each one's own targets{scalar * (losses.ndim == 0)}."
        )
    return losses.reshape(size, -1).sum(1)


def targets(raw: Any, loss_fn: LossFn | None = None) -> Tensor | None:
    """The labels that are predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        Integer labels ``(n, ...)``, without each example's first where the loss predicts next tokens; None where there
        are none.
    """
    labels = _parts(raw)[2]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return None
    shifted = isinstance(loss_fn, TokenCrossEntropy) and loss_fn.shift and labels.ndim > 1
    return labels[:, 1:] if shifted else labels


def untargeted(raw: Any, loss_fn: LossFn | None = None) -> list[int]:
    """Positions of the examples in which nothing is predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        Those whose targets are all -100.
    """
    labels = targets(raw, loss_fn)
    if labels is None:
        return []
    return (labels.reshape(len(labels), -1) == IGNORED).all(1).nonzero().flatten().tolist()


def first_targeted(raw: Any, loss_fn: LossFn | None = None) -> int | None:
    """Position of the first example in which something is predicted.

    Args:
        raw: A batch.
        loss_fn: Its loss.

    Returns:
        The position; None when there is none.
    """
    empty = set(untargeted(raw, loss_fn))
    return next((i for i in range(batch_size(raw)) if i not in empty), None)


def check_ids(name: str, ids: Any, size: int, side: str, positions: Sequence[int]) -> None:
    """Refuses ids of tokens or labels that do not exist, which a GPU would not name.

    Args:
        name: "input_ids" or "labels", of which -100 is one.
        ids: Of a batch; what is no tensor on the CPU is not looked at, as a GPU would have to be waited for.
        size: How many there are.
        side: Named in the error.
        positions: Of the batch's examples.

    Raises:
        TypeError: The ids are no integers.
        ValueError: An id is negative or too large.
    """
    if not isinstance(ids, Tensor) or ids.ndim == 0 or ids.device.type != "cpu":
        return
    if ids.is_floating_point():
        raise TypeError(f"{name} must be the integer ids of tokens, got {ids.dtype} for {side} example {positions[0]}.")
    bad = (ids < 0) | (ids >= size)
    ignored = ""
    if name == "labels":
        bad, ignored = bad & (ids != IGNORED), f", or {IGNORED} where nothing is predicted"
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} of {side} example {positions[first[0]]} hold {ids[first]}, but the model knows 0 to {size - 1}"
            f"{ignored}. Does the tokenizer, or what pads, belong to another model?"
        )


def check_gradient(losses: Tensor, argument: str) -> None:
    """Refuses losses that no gradient leads back from: every influence would be zero.

    Args:
        losses: From a pass in which the model's parameters require a gradient.
        argument: Named in the error.

    Raises:
        ValueError: They do not require a gradient.
    """
    if not losses.requires_grad:
        raise ValueError(
            f"The loss does not require a gradient: {argument} or the model's forward probably cuts it off with "
            ".detach(), .item() or torch.no_grad(). Compute the loss from the model's output by differentiable "
            "operations alone."
        )


# --- helpers ---


def run(model: nn.Module, batch: Batch) -> Any:
    """Calls the model on a batch.

    Args:
        model: The model.
        batch: From `BatchReader`.

    Returns:
        What it returns.

    Raises:
        TypeError: Its forward does not take the batch's arguments.
    """
    try:
        return model(*batch.args, **batch.kwargs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(
            f"{type(model).__name__} could not be called with {len(batch.args)} positional argument(s) and the "
            f"keywords {list(batch.kwargs)}: {error}. What it needs comes from the batch and forward_kwargs=."
        ) from error


def warn(message: str) -> None:
    """Warns of the line that called this library, however deep inside it the cause was seen.

    Args:
        message: What to say.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("captum", "captum_sdi"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _forward_keys(model: nn.Module) -> set[str] | None:
    """The keywords that forward takes, or None when it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # Like transformers.Trainer, a named parameter counts and **kwargs does not, or every column of a dataset would
    # reach the model; a wrapper that only forwards (*args, **kwargs) takes all.
    return named or (None if any(p.kind is p.VAR_KEYWORD for p in parameters) else set())


def _parts(raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    if isinstance(raw, Mapping):
        return (), {key: value for key, value in raw.items() if key != "labels"}, raw.get("labels")
    return tuple(raw[:-1]), {}, raw[-1]


def _map(apply: Callable[[Tensor], Any], value: Any) -> Any:
    """``apply`` on every tensor inside."""
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, Mapping):
        return {key: _map(apply, item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_map(apply, item) for item in value)
    return value


def _tensors(value: Any) -> Iterable[Tensor]:
    found: list[Tensor] = []
    _map(found.append, value)
    return found


def _holds_text(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, str) or any(map(_holds_text, inside))


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Whether a mapping holds several rows of tokens; input ids alone have two axes in a row of multiple choice."""
    ids, labels = row.get("input_ids"), row.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.ndim == 2 and ids.shape == labels.shape


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor  # inference tensors cannot be saved for backward


def _described(value: Any) -> str:
    return f"{type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, list | tuple) else "")
