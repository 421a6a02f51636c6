"""From the fields of a line of a jsonl file to the model's inputs; whatever else the line holds is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from captum_sdi.data.losses import IGNORED

INPUTS = ("input_ids", "labels", "attention_mask")
"""Fields that the model reads; a result carries the others."""


@dataclass(frozen=True)
class Encoder:
    """The encoding of a line's fields as the model's inputs.

    Example:
        >>> Encoder(vocab_size=10, max_length=2)({"input_ids": [5, 6, 7]})
        ({'input_ids': [5, 6], 'labels': [5, 6]}, 3)
    """

    vocab_size: int
    """How many token ids the model knows."""
    tokenizer: Any = None
    """Makes token ids of ``text``; None where there is none."""
    max_length: int | None = None
    """Longer examples are cut to so many tokens."""
    special_tokens: bool = True
    """Whether the tokenizer adds its own, such as the beginning of a sequence."""

    def __call__(self, fields: Any) -> tuple[dict[str, list[int]], int]:
        """Encode one line.

        Args:
            fields: ``text``, or ``input_ids`` and optionally ``labels`` and ``attention_mask``; others are ignored.

        Returns:
            Lists of one number per token, and how many tokens there were before they were cut.

        Raises:
            ValueError: If the line is something else.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f'a line must be a JSON object such as {{"text": "..."}}, this is {json_excerpt(fields)}')
        if "input_ids" in fields:
            row = {name: fields[name] for name in INPUTS if name in fields}
            check_token_lists(row)
            length = len(row["input_ids"])
            row = {name: numbers[: self.max_length] for name, numbers in row.items()}
            self.check_vocabulary(row, source="file")
        else:
            token_ids, length = self.tokenize(fields)
            row = {"input_ids": token_ids}
            self.check_vocabulary(row, source="tokenizer")
        mask = row.get("attention_mask", [1] * len(row["input_ids"]))
        unpadded = [token if seen else IGNORED for token, seen in zip(row["input_ids"], mask, strict=True)]
        row.setdefault("labels", unpadded)
        return row, length

    def text(self, fields: Mapping[str, Any]) -> str:
        """Return the text of an example, or that of its tokens, or these as numbers."""
        text = fields.get("text")
        if isinstance(text, str):
            return text
        token_ids = fields["input_ids"]
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        return str(self.tokenizer.decode(token_ids))

    def tokenize(self, fields: Mapping[str, Any]) -> tuple[list[int], int]:
        """Return the token ids of a text as far as they fit, and how many there are."""
        text = fields.get("text")
        if not isinstance(text, str):
            content = f'"text" is {json_excerpt(text)}' if "text" in fields else f"its fields are {sorted(fields)}"
            raise ValueError(f'a line needs "text", a string, or "input_ids", a list of token ids; {content}')
        if "labels" in fields:
            raise ValueError('"labels" are one per token: give "input_ids" with them instead of "text" alone')
        if self.tokenizer is None:
            raise ValueError('there is "text", but no tokenizer beside the model: name one with --tokenizer')
        check_encodable(text)
        settings = {"add_special_tokens": self.special_tokens, "verbose": False}
        token_ids = self.tokenizer(text, **settings)["input_ids"]
        length = len(token_ids)
        if length == 0:
            raise ValueError(f'"text" is {json_excerpt(text)}, which has no token: leave the line out')
        if self.max_length is not None and length > self.max_length:
            # The tokenizer cuts, as it knows which special tokens stay.
            encoding = self.tokenizer(text, **settings, truncation=True, max_length=self.max_length)
            token_ids = encoding["input_ids"]
        return token_ids, length

    def check_vocabulary(self, row: Mapping[str, list[int]], *, source: str) -> None:
        """Check that the model knows every token id of a source, the file or the tokenizer."""
        for name in ("input_ids", "labels"):
            for token_id in row.get(name, ()):
                is_ignored = name == "labels" and token_id == IGNORED
                if is_ignored or 0 <= token_id < self.vocab_size:
                    continue
                advice = f": the {source} seems to be another model's" if token_id >= 0 else ""
                raise ValueError(
                    f'"{name}" holds {token_id}, but the model knows the token ids 0 to {self.vocab_size - 1}{advice}'
                )


def check_token_lists(row: Mapping[str, Any]) -> None:
    """Check that the inputs of a line are lists of integers, all of one length."""
    for name, numbers in row.items():
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ValueError(f'"{name}" must be a list of integers, one per token; it is {json_excerpt(numbers)}')
    lengths = {name: len(numbers) for name, numbers in row.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"there must be as many of each as there are tokens; there are {lengths}")
    if not row["input_ids"]:
        raise ValueError('"input_ids" is empty: leave the line out')
    mask = row.get("attention_mask", [])
    if not set(mask) <= {0, 1}:
        raise ValueError(f'"attention_mask" must be 0 or 1 per token; it is {json_excerpt(mask)}')


def check_encodable(text: str) -> None:
    """Check that no character is half of a surrogate pair, which is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"text" holds half of a surrogate pair at character {error.start}: mend it') from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, for `json.loads`, in which no key stands twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {json_excerpt(twice)} stands twice in one object: which is meant?")
    return fields


def json_excerpt(value: Any, length: int = 60) -> str:
    """Return the beginning of a value's JSON."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[:length] + "…"
