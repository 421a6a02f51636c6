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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from captum_sdi.data.losses import IGNORED


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


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Whether a mapping holds several rows of tokens; input ids alone have two axes in a row of multiple choice."""
    ids, labels = row.get("input_ids"), row.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.ndim == 2 and ids.shape == labels.shape
