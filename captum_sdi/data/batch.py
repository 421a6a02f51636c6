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

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.words import warn_user

ForwardKwargs = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]


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

    def __call__(self, raw: Any, forward_kwargs: ForwardKwargs | None = None) -> Batch:
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
        args, kwargs, labels = split_batch(raw)
        kwargs = {**self._known(kwargs), **extra}
        args, kwargs, labels = (map_tensors(lambda t: _moved(t, device), part) for part in (args, kwargs, labels))
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
            warn_user(
                f"{type(self._model).__name__}.forward does not take {sorted(unknown)}: dropped from every batch."
            )
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
            f"A batch must be a tuple (inputs..., labels) or a mapping of model inputs, got {describe_value(raw)}.{hint}"
        )
    sizes = {name: len(t) for name, value in leaves.items() for t in tensors_in(value) if t.ndim > 0}
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
        if isinstance(value, list | tuple) and len(value) == size and not list(tensors_in(value)):
            return [value[i] for i in index.tolist()]  # such as the examples' texts
        return map_tensors(lambda t: t if t.ndim == 0 else t[index.to(t.device)], value)

    if isinstance(raw, Mapping):
        return {key: rows(value) for key, value in raw.items()}
    return tuple(rows(value) for value in raw)


def run_model(model: nn.Module, batch: Batch) -> Any:
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


def _forward_keys(model: nn.Module) -> set[str] | None:
    """The keywords that forward takes, or None when it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # Like transformers.Trainer, a named parameter counts and **kwargs does not, or every column of a dataset would
    # reach the model; a wrapper that only forwards (*args, **kwargs) takes all.
    return named or (None if any(p.kind is p.VAR_KEYWORD for p in parameters) else set())


def split_batch(raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    if isinstance(raw, Mapping):
        return (), {key: value for key, value in raw.items() if key != "labels"}, raw.get("labels")
    return tuple(raw[:-1]), {}, raw[-1]


def map_tensors(apply: Callable[[Tensor], Any], value: Any) -> Any:
    """``apply`` on every tensor inside."""
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(apply, item) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map_tensors(apply, item) for item in value)
    return value


def tensors_in(value: Any) -> Iterable[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def _holds_text(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, str) or any(map(_holds_text, inside))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    tensor = tensor.to(device)
    return tensor.clone() if tensor.is_inference() else tensor  # inference tensors cannot be saved for backward


def describe_value(value: Any) -> str:
    return f"{type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, list | tuple) else "")
