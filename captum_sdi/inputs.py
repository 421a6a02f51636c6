"""Examples in any of the forms that users have: a batch, a loader, a Dataset, a list of rows, columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from captum_sdi.data.collate import Collator
from captum_sdi.data.order import check_order
from captum_sdi.data.stream import Stream
from captum_sdi.model_facts import model_config, vocabulary_size
from captum_sdi.words import first_few, is_integer


def as_loader(
    data: Any,
    batch_size: Any,
    collate: Callable[[Any], Any],
    argument: str,
) -> DataLoader[Any]:
    """Return a DataLoader as it is, a Dataset in batches and in order.

    Args:
        data: A DataLoader, a Dataset, a list of rows, a mapping or tuple of columns.
        batch_size: Examples per batch of a Dataset.
        collate: Makes a batch of a Dataset's rows.
        argument: Named in errors.

    Raises:
        TypeError: If it is something else.
        ValueError: If a loader shuffles or leaves something out.
    """
    if isinstance(data, DataLoader):
        check_order(data, argument)
        return data
    check_batch_size(batch_size, argument)
    dataset = as_dataset(data, argument)
    return DataLoader(dataset, batch_size, shuffle=False, collate_fn=collate)


def as_dataset(data: Any, argument: str) -> Any:
    """Return something with a row at every position, or an IterableDataset.

    Raises:
        TypeError: If the data have no rows.
        ValueError: If they are one row, or columns of different length.
    """
    if isinstance(data, Mapping):
        return rows_of_columns(data, argument)
    if isinstance(data, tuple) and len(data) > 1 and all(isinstance(column, Tensor) for column in data):
        columns = {f"{argument}[{place}]": column for place, column in enumerate(data)}
        check_same_length(columns)
        return TensorDataset(*data)
    if hasattr(data, "iloc"):
        raise TypeError(f"{argument} is a {type(data).__name__}: pass its rows, {argument}.to_dict('records').")
    if isinstance(data, str | bytes):
        raise TypeError(
            f"{argument} must be a Dataset or a DataLoader, got {data!r}. Load it first; texts are "
            "rows by captum_sdi.texts([text], tokenizer)."
        )
    has_rows = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not isinstance(data, IterableDataset) and not has_rows:
        raise TypeError(
            f"{argument} must be a Dataset or a DataLoader, got {type(data).__name__}. Of rows that come one after "
            "the other make a list, or an IterableDataset that can be read again."
        )
    return data


def rows_of_columns(columns: Mapping[Any, Any], argument: str) -> list[dict[str, Any]]:
    """Return the rows of a mapping of columns, such as a slice of a Hugging Face Dataset."""
    splits = [name for name, value in columns.items() if _is_dataset(value)]
    if splits:
        name = splits[0]
        raise TypeError(f"{argument} holds several datasets: name one, such as {argument}[{name!r}]; has {splits}.")
    are_columns = [isinstance(column, list | tuple | np.ndarray | Tensor) for column in columns.values()]
    if not columns or not all(are_columns):
        raise TypeError(
            f"{argument} is a {type(columns).__name__} of {first_few(list(columns))}, neither a Dataset nor columns, "
            "each with one entry per row. Pass a list of rows, a Dataset or a DataLoader."
        )
    check_is_no_row(columns, argument)
    check_same_length(columns)
    entries = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in entries]


def as_batches(
    inputs: Any,
    batch_size: int,
    collate: Callable[[Any], Any],
    argument: str = "inputs",
) -> Iterable[Any]:
    """Return the batches of test examples.

    Args:
        inputs: A batch (tuple, list or mapping), a DataLoader, a Dataset, a list of rows, or a mapping of columns.
        batch_size: Examples per batch of a Dataset.
        collate: Makes a batch of a Dataset's rows.
        argument: Named in errors.
    """
    if isinstance(inputs, Mapping):
        check_is_no_row(inputs, argument)
        is_batch = any(isinstance(value, Tensor | Mapping) for value in inputs.values())
        is_batch &= not any(_is_dataset(value) for value in inputs.values())
    else:
        is_batch = isinstance(inputs, tuple) or (isinstance(inputs, list) and not _are_rows(inputs))
    return [inputs] if is_batch else as_loader(inputs, batch_size, collate, argument)


def first_batch(model: nn.Module, batch: Any, n_rows: int) -> Any:
    """Return a batch as it is, of anything else that `SDIInfluence` takes the first rows.

    Args:
        model: Whose padding token pads.
        batch: A batch, or rows, a Dataset or a DataLoader.
        n_rows: How many rows of a Dataset are taken.
    """
    collator = Collator(padding_token(model))
    batches = as_batches(batch, n_rows, collator, "batch")
    return Stream(batches, "batch").peek()


def first_examples(model: nn.Module, batch: Any, at_most: int) -> Iterator[Any]:
    """Return the first examples of anything that `SDIInfluence` takes, each as a batch of its own.

    Args:
        model: Whose padding token pads.
        batch: A batch, or rows, a Dataset or a DataLoader.
        at_most: How many examples are read.
    """
    collator = Collator(padding_token(model))
    batches = as_batches(batch, 1, collator, "batch")
    return Stream(batches, "batch").peek_examples(at_most)


def padding_token(model: nn.Module) -> int:
    """Return the id that pads, which attention masks hide: the config's where the model knows it, else 0."""
    token = getattr(model_config(model), "pad_token_id", None) or 0
    n_ids = vocabulary_size(model)
    is_known = token >= 0 and (n_ids is None or token < n_ids)
    return token if is_known else 0


# --- checks ---


def check_batch_size(batch_size: Any, argument: str) -> None:
    """Refuse a batch size that is no number of examples.

    Raises:
        AssertionError: If it is no int, as in Captum.
        ValueError: If it is below 1.
    """
    if not is_integer(batch_size):
        raise AssertionError(f"since the `{argument}` argument was a `Dataset`, `batch_size` must be an int.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def check_is_no_row(data: Mapping[Any, Any], argument: str) -> None:
    """Refuse a single row where several are meant.

    Raises:
        ValueError: If its ids have one axis.
    """
    ids = data.get("input_ids")
    is_flat = isinstance(ids, Tensor | np.ndarray) and ids.ndim == 1
    is_list_of_ids = isinstance(ids, list | tuple) and len(ids) > 0 and all(map(is_integer, ids))
    if is_flat or is_list_of_ids:
        raise ValueError(f"{argument} is one row of a dataset, not a batch of rows: pass it in a list, [row].")


def check_same_length(columns: Mapping[Any, Any]) -> None:
    """Refuse columns of different length.

    Raises:
        ValueError: If they are.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns need one entry per row, but their lengths are {lengths}.")


def _are_rows(inputs: list[Any]) -> bool:
    """Tell a list of a dataset's rows from a batch given as a list of tensors."""
    return all(isinstance(row, Mapping | tuple) for row in inputs)


def _is_dataset(value: Any) -> bool:
    if isinstance(value, list | tuple | Mapping | np.ndarray | Tensor | str):
        return False
    return hasattr(value, "__getitem__") or isinstance(value, IterableDataset)
