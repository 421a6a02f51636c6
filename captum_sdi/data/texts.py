"""`texts`: examples that remember their words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_sdi.data.encoder import INPUTS, Encoder
from captum_sdi.data.losses import IGNORED
from captum_sdi.words import is_integer

SOURCES = {"prompt", "completion", "messages", *INPUTS}
"""Fields that an example's text is made of."""


class Texts(Dataset[dict[str, Tensor]]):
    """A Dataset of texts; see `texts`, which makes one."""

    def __init__(self, rows: Sequence[Any], encoder: Encoder) -> None:
        self.rows = rows
        self.encoder = encoder
        self.n_cut = 0
        self.n_without_target = 0
        for position, row in enumerate(rows):
            try:
                encoded, length = encoder(as_fields(row))
            except ValueError as error:
                raise ValueError(f"rows[{position}]: {error}.") from error
            self.n_cut += length > len(encoded["input_ids"])
            self.n_without_target += not has_target(encoded["labels"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        encoded, _ = self.encoder(as_fields(self.rows[position]))
        return {name: torch.tensor(numbers) for name, numbers in encoded.items()}

    @property
    def examples(self) -> list[dict[str, Any]]:
        """What each example says: its ``text``, which of its characters are learned, and its other fields."""
        return [self.example(position) for position in range(len(self))]

    def example(self, position: int) -> dict[str, Any]:
        """Return what one example says."""
        fields = as_fields(self.rows[position])
        other_fields = {name: value for name, value in fields.items() if name not in SOURCES}
        return {**other_fields, **self.encoder.words(fields)}

    def __repr__(self) -> str:
        parts = [f"Texts of {len(self):,} examples"]
        if self.n_cut:
            parts.append(f"{self.n_cut:,} cut to {self.encoder.max_length} tokens")
        if self.n_without_target:
            parts.append(f"{self.n_without_target:,} in which nothing is predicted: their influence is zero")
        return "; ".join(parts)


def texts(
    rows: Sequence[Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    special_tokens: bool = True,
) -> Texts:
    """Return a Dataset of texts that remembers its words; no two texts are packed into one example.

    Args:
        rows: Strings, or mappings with ``text``, with ``prompt`` and ``completion`` (only the completion is predicted),
            with ``messages`` (only the assistant's turns are; the tokenizer's chat template writes them), or with
            ``input_ids``. Other fields, such as an ``id``, are kept.
        tokenizer: A tokenizer of transformers.
        max_length: Longer examples are cut at their end to so many tokens; None leaves them whole.
        special_tokens: Whether the tokenizer adds its own to texts and prompts.

    Returns:
        Rows of ``input_ids`` and ``labels``, for `SDIInfluence`; ``examples`` are the words, for a page or a table, and
        ``print`` says how many were cut.

    Raises:
        TypeError: If the rows are one string or one mapping or have no order, or the tokenizer is none.
        ValueError: If a row cannot be used, which the message names, or ``max_length`` is no length.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"one": 0, "and": 1, "two": 2}, unk_token="one"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> rows = ["one and two", {"prompt": "one and ", "completion": "two", "id": 7}]
        >>> train = texts(rows, PreTrainedTokenizerFast(tokenizer_object=words))
        >>> train[1]["labels"].tolist(), train.example(1)
        ([-100, -100, 2], {'id': 7, 'text': 'one and two', 'learned_characters': [[8, 11]]})
    """
    if isinstance(rows, str | Mapping):
        raise TypeError(f"rows must be a list of texts or of mappings, got one {type(rows).__name__}.")
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise TypeError(f"rows must be a list of texts or of mappings, in their order, got {type(rows).__name__}.")
    if not callable(tokenizer) or not hasattr(tokenizer, "__len__"):
        raise TypeError(f"tokenizer must be one of transformers, such as AutoTokenizer loads, got {tokenizer!r}.")
    if max_length is not None and (not is_integer(max_length) or max_length < 1):
        raise ValueError(f"max_length must be an int of at least 1, or None; got {max_length!r}.")
    return Texts(rows, Encoder(len(tokenizer), tokenizer, max_length, special_tokens))


def as_fields(row: Any) -> Any:
    """Return a row as fields; a string is a text."""
    return {"text": row} if isinstance(row, str) else row


def has_target(labels: Sequence[int]) -> bool:
    """Return whether a token is predicted: the first one never is."""
    return any(label != IGNORED for label in labels[1:])
