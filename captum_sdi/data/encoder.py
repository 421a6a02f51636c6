"""From the fields of an example to the model's inputs.

An example is one of: ``input_ids``, optionally with ``labels`` and ``attention_mask``; ``messages``, whose assistant's
turns are learned; ``prompt`` and ``completion``, of which the completion is; or ``text``, of which everything is. Any
other field belongs to its owner, and whatever cannot be meant is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from captum_sdi.data.dialogue import completion_tokens, conversation_tokens, learned_turns, written
from captum_sdi.data.fields import LEARNED, check_encodable, json_excerpt, kind_of
from captum_sdi.data.losses import IGNORED

INPUTS = ("input_ids", "labels", "attention_mask")
"""Fields that the model reads; a result carries the others."""


@dataclass(frozen=True)
class Encoder:
    """The encoding of an example's fields as the model's inputs.

    Example:
        >>> Encoder(vocab_size=10, max_length=2)({"input_ids": [5, 6, 7]})
        ({'input_ids': [5, 6], 'labels': [5, 6]}, 3)
    """

    vocab_size: int
    """How many token ids the model knows."""
    tokenizer: Any = None
    """Makes token ids of texts; None where there is none."""
    max_length: int | None = None
    """Longer examples are cut to so many tokens."""
    special_tokens: bool = True
    """Whether the tokenizer adds its own, such as the beginning of a sequence."""

    def __call__(self, fields: Any) -> tuple[dict[str, list[int]], int]:
        """Encode one example.

        Args:
            fields: What the module's heading lists; others are ignored.

        Returns:
            Lists of one number per token, and how many tokens there were before they were cut.

        Raises:
            ValueError: If the fields are something else.
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
            row, length = self.tokenize(fields)
            self.check_vocabulary(row, source="tokenizer")
        token_ids = row["input_ids"]
        mask = row.get("attention_mask", [1] * len(token_ids))
        seen_tokens = zip(token_ids, mask, strict=True)
        unpadded = [token if seen else IGNORED for token, seen in seen_tokens]
        row.setdefault("labels", unpadded)
        return row, length

    def words(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text of an example and, of a completion or a conversation, which of its characters are learned.

        Returns:
            ``text``, and where it is known `LEARNED`, pairs of where a learned part starts and ends.

        Example:
            >>> Encoder(vocab_size=10).words({"prompt": "1+1=", "completion": "2"})
            {'text': '1+1=2', 'learned_characters': [[4, 5]]}
        """
        text = self.text(fields)
        learned = None
        if "input_ids" not in fields:
            kind = kind_of(fields)
            if kind == "completion":
                learned = [[len(fields["prompt"]), len(text)]]
            elif kind == "messages":
                with suppress(ValueError):  # of a slow tokenizer, turns are told apart by their tokens alone
                    learned = learned_turns(self.tokenizer, fields["messages"])
        return {"text": text} if learned is None else {"text": text, LEARNED: learned}

    def text(self, fields: Mapping[str, Any]) -> str:
        """Return the text of an example, or that of its tokens, or these as numbers."""
        text = fields.get("text")
        if isinstance(text, str):
            return text
        if "input_ids" not in fields and kind_of(fields) == "messages":
            return written(self.tokenizer, fields["messages"])
        if "input_ids" not in fields:
            prompt, completion = fields["prompt"], fields["completion"]
            return f"{prompt}{completion}"
        token_ids = fields["input_ids"]
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        return str(self.tokenizer.decode(token_ids))

    def tokenize(self, fields: Mapping[str, Any]) -> tuple[dict[str, list[int]], int]:
        """Return the tokens of a text, a completion or a conversation as far as they fit, and how many there are."""
        kind = kind_of(fields)
        if "labels" in fields:
            raise ValueError(f'"labels" are one per token: give "input_ids" with them instead of "{kind}" alone')
        if self.tokenizer is None:
            raise ValueError(f'there is "{kind}", but no tokenizer beside the model: name one with --tokenizer')
        if kind == "text":
            return self.tokenize_text(fields["text"])
        if kind == "messages":
            tokens = conversation_tokens(self.tokenizer, fields["messages"])
        else:
            tokens = completion_tokens(
                self.tokenizer, fields["prompt"], fields["completion"], special_tokens=self.special_tokens
            )
        row = {name: numbers[: self.max_length] for name, numbers in tokens.items()}
        return row, len(tokens["input_ids"])

    def tokenize_text(self, text: str) -> tuple[dict[str, list[int]], int]:
        """Return the tokens of a text, all of which are learned."""
        check_encodable("text", text)
        settings = {"add_special_tokens": self.special_tokens, "verbose": False}
        encoding = self.tokenizer(text, **settings)
        token_ids = encoding["input_ids"]
        length = len(token_ids)
        if length == 0:
            raise ValueError(f'"text" is {json_excerpt(text)}, which has no token: leave the line out')
        if self.max_length is not None and length > self.max_length:
            # The tokenizer cuts, as it knows which special tokens stay.
            encoding = self.tokenizer(text, **settings, truncation=True, max_length=self.max_length)
            token_ids = encoding["input_ids"]
        return {"input_ids": token_ids}, length

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
