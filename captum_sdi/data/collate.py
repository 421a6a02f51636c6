"""The collator: a dataset's rows become one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from captum_sdi.data.batch import PaddingMask, plain_batch, plain_value
from captum_sdi.data.losses import IGNORED


class Collator:
    """A collate function that pads a dataset's rows on the right and stacks them into a batch.

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
        """Collate rows of a dataset.

        Returns:
            A batch: a dict for mapping rows, else what `torch.utils.data.default_collate` makes of them.

        Raises:
            ValueError: If rows have different keys, are ragged tuples, or are batches.
        """
        first = rows[0]
        if not isinstance(first, Mapping):
            return plain_batch(_collate_tuples(rows))
        if _is_batch(first):
            raise ValueError(
                f"A row is one example, but input_ids and labels of this one are of shape "
                f"{tuple(first['labels'].shape)}: it is a batch. Pass the rows themselves, or "
                "DataLoader(batches, batch_size=None)."
            )
        keys = set(first)
        for number, row in enumerate(rows):
            if set(row) != keys:
                raise ValueError(f"Row {number} of a batch has keys {sorted(row)}, its first row {sorted(keys)}.")
            if _is_empty(row.get("input_ids")):
                raise ValueError(f"Row {number} of a batch is empty: its input_ids hold no token. Leave such rows out.")
        batch = {}
        for key in first:
            values = [row[key] for row in rows]
            batch[key] = self._stack(key, values)
        if "input_ids" in keys and "attention_mask" not in keys:
            lengths = [len(row["input_ids"]) for row in rows]
            if len(set(lengths)) > 1:
                batch["attention_mask"] = _attention_mask(lengths)
        return batch

    def _stack(self, key: str, values: list[Any]) -> Any:
        try:
            tensors = [plain_value(key, torch.as_tensor(value)) for value in values]
        except (TypeError, ValueError, RuntimeError):
            return values  # such as texts; the reader drops what forward does not take
        has_scalars = any(tensor.ndim == 0 for tensor in tensors)
        further_axes = {tensor.shape[1:] for tensor in tensors}
        is_mixed = has_scalars and any(tensor.ndim > 0 for tensor in tensors)
        if len(further_axes) > 1 or is_mixed:
            shapes = [tuple(tensor.shape) for tensor in tensors]
            raise ValueError(
                f"The rows of a batch hold {key!r} of shapes {shapes[:5]}: only the first axis is padded. Give them "
                "the same further axes, or pass collate_fn=."
            )
        if has_scalars:
            return torch.stack(tensors)
        padding_value = self._padding.get(key, 0)
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding_value)


def _collate_tuples(rows: Sequence[Any]) -> Any:
    try:
        return default_collate(list(rows))
    except RuntimeError as error:
        raise ValueError(
            "The rows of a batch differ in shape and tuples have no place for an attention mask: yield mapping "
            "rows (input_ids, attention_mask, labels), which are padded, or pass collate_fn=."
        ) from error


def _is_empty(ids: Any) -> bool:
    if isinstance(ids, list | tuple):
        return len(ids) == 0
    return 0 in getattr(ids, "shape", ())


def _attention_mask(lengths: Sequence[int]) -> Tensor:
    """Return ``(n, p)`` ones where an example has tokens, zeros where it is padded."""
    positions = torch.arange(max(lengths))
    ends = torch.tensor(lengths).unsqueeze(1)
    is_token = positions < ends
    return is_token.long().as_subclass(PaddingMask)


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Say whether ids and labels both hold several rows; in multiple choice ids alone do."""
    input_ids, labels = row.get("input_ids"), row.get("labels")
    if not isinstance(input_ids, Tensor) or not isinstance(labels, Tensor):
        return False
    return input_ids.ndim == 2 and input_ids.shape == labels.shape
