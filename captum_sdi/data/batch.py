"""The batch contract, and what follows from it: how many examples, some of them, how the model takes them.

A batch is either

* a tuple or list, as in Captum: ``model(*batch[:-1])``, the labels last; or
* a mapping, as in Hugging Face: ``model(**batch)`` without ``"labels"``, which are the labels.

Every tensor's first axis is the example. Keys that the model's forward does not take are dropped with one warning;
tensors are moved to the model's device. Rows of a dataset are collated by `captum_sdi.data.Collator` when the user
gives no ``collate_fn``; what a loss function may return is described in `captum_sdi.data.losses`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_sdi.model_facts import model_device
from captum_sdi.words import warn_user

ForwardKwargs = Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]
"""Further keywords for the model's forward, or a function of the batch that returns them."""


class PaddingMask(Tensor):
    """An attention mask ``(n, p)`` that the collator made, and no row held."""


@dataclass(frozen=True)
class Batch:
    """A batch taken apart: ``model(*args, **kwargs)`` and the labels of ``size`` examples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    size: int


class BatchReader:
    """A reader of one model's batches; it warns once of every key that forward does not take."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._keywords = forward_keywords(model)
        self._dropped: set[str] = set()
        self._leaves_mask_out = False

    def __call__(self, raw: Any, forward_kwargs: ForwardKwargs | None = None) -> Batch:
        """Take a batch apart and move it to the model's device.

        Returns:
            The batch, with ``forward_kwargs`` among its keywords.

        Raises:
            TypeError: If the batch is no tuple, list or mapping, or the keywords are no mapping.
            ValueError: If the batch's tensors disagree on the number of examples, or a cache is asked for.
        """
        size = batch_size(raw)
        extra = forward_kwargs or {}
        if callable(extra):
            extra = extra(raw)
        if not isinstance(extra, Mapping):
            raise TypeError(f"forward_kwargs must be a mapping or return one, got {type(extra).__name__}.")
        if extra.get("use_cache"):
            raise ValueError(
                "forward_kwargs asks for use_cache=True: a looped block would append to the cache of its previous "
                "iteration. Leave it out, or pass use_cache=False."
            )
        # Asked anew for every batch: a checkpoint's load function may have moved the model.
        device = model_device(self._model)
        args, kwargs, labels = split_batch(raw)
        if self._leaves_mask_out and has_made_mask(raw):
            del kwargs["attention_mask"]
        kwargs = {**self._without_unknown(kwargs), **extra}

        def move(tensor: Tensor) -> Tensor:
            # A copy in any case: some models write to what they are given, and autograd saves no inference tensor.
            copied = tensor.to(device, copy=True)
            return copied.as_subclass(Tensor) if isinstance(tensor, PaddingMask) else copied

        return Batch(
            args=map_tensors(move, args),
            kwargs=map_tensors(move, kwargs),
            labels=map_tensors(move, labels),
            size=size,
        )

    def leave_mask_out(self, raw: Any) -> bool:
        """Leave masks that the collator made out of every batch, where this one's mask is one of them, with a warning.

        Returns:
            Whether they are left out from now on.
        """
        if self._leaves_mask_out or not has_made_mask(raw):
            return False
        self._leaves_mask_out = True
        warn_user(
            f"{type(self._model).__name__} fails on the attention_mask that captum_sdi's Collator makes for rows of "
            "different length, 1 where an example has tokens, and runs without: it is left out of every batch. Scores "
            "are right where the model does not look at padding on the right, as with causal attention; an example of "
            "a padded batch is compared with the same one alone. Pass rows with a mask in the form that the model "
            "takes, or batch_size=1, to decide it yourself."
        )
        return True

    def takes(self, key: str) -> bool:
        """Say whether the model's forward names this keyword; ``**kwargs`` do not count."""
        return self._keywords is not None and key in self._keywords

    def _without_unknown(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self._keywords is None:
            return kwargs
        unknown = set(kwargs) - self._keywords
        if unknown - self._dropped:
            model_name = type(self._model).__name__
            warn_user(f"{model_name}.forward does not take {sorted(unknown)}: dropped from every batch.")
            self._dropped |= unknown
        return {key: value for key, value in kwargs.items() if key not in unknown}


def has_made_mask(raw: Any) -> bool:
    """Say whether a batch has an attention mask that the collator made."""
    return isinstance(raw, Mapping) and isinstance(raw.get("attention_mask"), PaddingMask)


def batch_size(raw: Any) -> int:
    """Return the number of examples in a batch: the length of the first axis of its tensors.

    Raises:
        ValueError: If its tensors disagree, or there is none, or no example in them.

    Example:
        >>> batch_size({"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4, 7)})
        4
    """
    named = named_values(raw)
    sizes: dict[str, int] = {}
    for name, value in named.items():
        for tensor in tensors_in(value):
            if tensor.ndim > 0:
                sizes[name] = len(tensor)
    if not sizes:
        raise ValueError(f"The batch holds no tensor with an example axis: {list(named)}.{_text_hint(raw)}")
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The batch's tensors disagree on the number of examples (their first axis): {sizes}. "
            "Give each one row per example, or pass what all examples share in forward_kwargs=."
        )
    size = next(iter(sizes.values()))
    if size == 0:
        raise ValueError(f"The batch holds no example: the tensors of {list(sizes)} have no row.")
    return size


def named_values(raw: Any) -> dict[str, Any]:
    """Return a batch's values under the names that errors call them by, ``batch[0]`` in a tuple.

    Raises:
        TypeError: If the batch is no tuple or list of several values, nor a mapping.
    """
    if isinstance(raw, Mapping):
        return {str(key): value for key, value in raw.items()}
    is_sequence = isinstance(raw, Sequence) and not isinstance(raw, str)
    if is_sequence and len(raw) > 1:
        return {f"batch[{place}]": value for place, value in enumerate(raw)}
    raise TypeError(
        f"A batch must be a tuple (inputs..., labels) or a mapping of model inputs, got {describe_value(raw)}."
        f"{_text_hint(raw)}"
    )


def split_batch(raw: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the model's positional arguments and keywords, and the labels."""
    if isinstance(raw, Mapping):
        keywords = dict(raw)
        labels = keywords.pop("labels", None)
        return (), keywords, labels
    *inputs, labels = raw
    return tuple(inputs), {}, labels


def select(raw: Any, indices: Sequence[int]) -> Any:
    """Return the batch of the examples at these positions, in the same form."""
    size = batch_size(raw)
    index = torch.as_tensor(indices, dtype=torch.long)
    if isinstance(raw, Mapping):
        return {key: _select_rows(value, index, size) for key, value in raw.items()}
    return tuple(_select_rows(value, index, size) for value in raw)


def _select_rows(
    value: Any,
    index: Tensor,
    size: int,
) -> Any:
    one_per_example = isinstance(value, list | tuple) and len(value) == size
    if one_per_example and not tensors_in(value):
        return [value[position] for position in index.tolist()]  # such as the examples' texts

    def rows(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        return tensor[index.to(tensor.device)]

    return map_tensors(rows, value)


def forward_keywords(model: nn.Module) -> set[str] | None:
    """Return the keywords that forward names; None where it names none and takes any."""
    # Wrappers, of torch.compile and of DataParallel, take anything and hand it on.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    keywords: set[str] = set()
    takes_any = False
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            keywords.add(parameter.name)
        takes_any |= parameter.kind is parameter.VAR_KEYWORD
    # As in transformers.Trainer, **kwargs beside named parameters does not count, or every column of a dataset would
    # reach the model.
    return None if takes_any and not keywords else keywords


# --- plain values ---

SMALL_INTEGERS = (torch.int8, torch.uint8, torch.int16)
UNSIGNED_INTEGERS = (torch.uint16, torch.uint32, torch.uint64)
"""Few operations of torch take them, and none that looks up an id."""


def plain_batch(raw: Any) -> Any:
    """Return a batch in the same form, whose arrays and lists of numbers are tensors and whose ids are int64.

    Raises:
        ValueError: If a list of numbers is ragged.

    Example:
        >>> ids = torch.tensor([[1, 2]], dtype=torch.uint8)
        >>> plain_batch({"input_ids": ids, "labels": [[1, 2]]})
        {'input_ids': tensor([[1, 2]]), 'labels': tensor([[1, 2]])}
    """
    if isinstance(raw, Mapping):
        return with_values(raw, {key: plain_value(str(key), value) for key, value in raw.items()})
    if isinstance(raw, list | tuple):
        values = [plain_value(f"batch[{place}]", value) for place, value in enumerate(raw)]
        return in_form_of(raw, values)
    return raw


def plain_value(name: str, value: Any) -> Any:
    """Return a batch's value as a tensor where it is made of numbers; others, such as texts, as they are."""
    if isinstance(value, Mapping):
        return plain_batch(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.tensor(value)
    elif isinstance(value, list) and _is_of_numbers(value):
        try:
            value = torch.tensor(np.array(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} of a batch is a list of rows of different length: pad it, or pass the rows one by one, "
                "[{...}, {...}], which are padded."
            ) from error
    if not isinstance(value, Tensor):
        return value
    is_small = value.dtype in SMALL_INTEGERS and value.ndim <= 2 and "mask" not in name  # images have more axes
    return value.long() if is_small or value.dtype in UNSIGNED_INTEGERS else value


def _is_of_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(_is_of_numbers, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, int | float | np.number)


# --- nested values ---


def map_tensors(apply: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor inside mappings, lists and tuples; the rest stays."""
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, Mapping):
        return with_values(value, {key: map_tensors(apply, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return in_form_of(value, [map_tensors(apply, item) for item in value])
    return value


def with_values(mapping: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the same type, whose attributes may be its keys as in `BatchEncoding`."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return values
    changed = copy.copy(mapping)
    changed.update(values)
    return changed


def in_form_of(sequence: list[Any] | tuple[Any, ...], values: list[Any]) -> Any:
    """Return a list or tuple of the same type, named or not."""
    kind = type(sequence)
    return kind(*values) if hasattr(sequence, "_fields") else kind(values)


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors inside mappings, lists and tuples."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, value)
    return tensors


def describe_value(value: Any) -> str:
    """Name a value's type, and the length of a list or tuple."""
    description = type(value).__name__
    if isinstance(value, list | tuple):
        description += f" of length {len(value)}"
    return description


def _text_hint(raw: Any) -> str:
    advice = " Tokenize texts first, into input_ids and labels, as captum_sdi.texts(texts, tokenizer) does."
    return advice if _holds_text(raw) else ""


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_text(item) for item in value)
    return isinstance(value, str)
