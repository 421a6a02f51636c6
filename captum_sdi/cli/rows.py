"""The examples of a jsonl file: checked once, line by line, then read from the disk when they are asked for."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from captum_sdi.data.losses import IGNORED

EXCERPT = 200
"""How many characters of an example's text a result carries."""

_INPUTS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True)
class Encoder:
    """From the fields of a line to the model's inputs.

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
        """Encodes one line.

        Args:
            fields: ``text``, or ``input_ids`` and optionally ``labels`` and ``attention_mask``; others are ignored.

        Returns:
            Lists of one number per token, and how many tokens there were before they were cut.

        Raises:
            ValueError: The line is something else.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f'a line must be a JSON object such as {{"text": "..."}}, this is {_shown(fields)}')
        if "input_ids" in fields:
            row = {name: fields[name] for name in _INPUTS if name in fields}
            length = self._check(row)
            row = {name: numbers[: self.max_length] for name, numbers in row.items()}
        else:
            ids, length = self._tokens(fields)
            row = {"input_ids": ids}
        self._check_vocabulary(row, "tokenizer" if "input_ids" not in fields else "file")
        row.setdefault("labels", row["input_ids"])
        return row, length

    def text(self, fields: Mapping[str, Any]) -> str:
        """What an example says, for people.

        Args:
            fields: The fields of its line.

        Returns:
            Its text, or that of its first tokens, or these as numbers.
        """
        if isinstance(text := fields.get("text"), str):
            return text
        ids = fields["input_ids"][:EXCERPT]
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(ids))

    def _tokens(self, fields: Mapping[str, Any]) -> tuple[list[int], int]:
        """Token ids of a text as far as they fit, and how many there are."""
        text = fields.get("text")
        if not isinstance(text, str):
            found = f'"text" is {_shown(text)}' if "text" in fields else f"its fields are {sorted(fields)}"
            raise ValueError(f'a line needs "text", a string, or "input_ids", a list of token ids; {found}')
        if "labels" in fields:
            raise ValueError('"labels" are one per token: give "input_ids" with them instead of "text" alone')
        if self.tokenizer is None:
            raise ValueError('there is "text", but no tokenizer beside the model: name one with --tokenizer')
        settings = {"add_special_tokens": self.special_tokens, "verbose": False}
        ids = self.tokenizer(text, **settings)["input_ids"]
        if not ids:
            raise ValueError(f'"text" is {_shown(text)}, which has no token: leave the line out')
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, len(ids)
        # By the tokenizer, which knows which special tokens stay.
        cut = self.tokenizer(text, **settings, truncation=True, max_length=self.max_length)["input_ids"]
        return cut, len(ids)

    def _check(self, row: Mapping[str, Any]) -> int:
        """The number of tokens of a line that gives them."""
        for name, numbers in row.items():
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                raise ValueError(f'"{name}" must be a list of integers, one per token; it is {_shown(numbers)}')
        lengths = {name: len(numbers) for name, numbers in row.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"there must be as many of each as there are tokens; there are {lengths}")
        if not row["input_ids"]:
            raise ValueError('"input_ids" is empty: leave the line out')
        if not set(row.get("attention_mask", ())) <= {0, 1}:
            raise ValueError(f'"attention_mask" must be 0 or 1 per token; it is {_shown(row["attention_mask"])}')
        return len(row["input_ids"])

    def _check_vocabulary(self, row: Mapping[str, list[int]], whose: str) -> None:
        for name in ("input_ids", "labels"):
            for number in row.get(name, ()):
                if not 0 <= number < self.vocab_size and (name, number) != ("labels", IGNORED):
                    raise ValueError(
                        f'"{name}" holds {number}, but the model knows the token ids 0 to {self.vocab_size - 1}'
                        + f": the {whose} seems to be another model's" * (number >= 0)
                    )


class JsonLines(Dataset[dict[str, Tensor]]):
    r"""The examples of a jsonl file, one per line; blank lines are none.

    Only where each line begins is kept in memory. A bad line is an error that names it before any work starts.

    Args:
        path: The file.
        encode: Makes model inputs of a line.
        digest: That of a file that was checked before: the lines are then only counted.
        show_progress: Show a progress bar.

    Raises:
        ValueError: A line cannot be used, there is none, or the file is not the one of ``digest``.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"input_ids": [1, 2], "id": "a"}\n{"input_ids": [3]}\n'), file.flush()
        ...     data = JsonLines(file.name, Encoder(vocab_size=10))
        ...     len(data), data[0]["labels"].tolist(), data.about(0)
        (2, [1, 2], {'id': 'a', 'text': '1 2'})
    """

    def __init__(
        self, path: str | Path, encode: Encoder, digest: str | None = None, show_progress: bool = False
    ) -> None:
        self.path, self._encode = Path(path), encode
        self.n_tokens, self.n_cut = 0, 0
        self._starts, self._lines, self._lengths = array.array("Q"), array.array("Q"), array.array("Q")
        self._keys: set[str] = set()
        self.digest = self._scan(check=digest is None, show_progress=show_progress)
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{self.path} is not the file that was indexed, or it has changed since: put that file back, say where "
                "it is now, or build an index of this one."
            )
        if not self._starts:
            raise ValueError(f"{self.path} holds no example: every line is blank.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, _ = self._encode(self._fields(index))
        return {name: torch.tensor(numbers) for name, numbers in row.items()}

    @property
    def longest(self) -> int:
        """Position of the longest example; 0 where the lines were only counted."""
        return max(range(len(self._lengths)), key=self._lengths.__getitem__, default=0)

    def line(self, index: int) -> int:
        """The number of an example's line, from 1.

        Args:
            index: The example's position.

        Returns:
            The number; blank lines count.
        """
        return self._lines[index]

    def about(self, index: int) -> dict[str, Any]:
        """What a result says about an example: an excerpt of its text, and its other fields.

        Args:
            index: The example's position.

        Returns:
            All but the model's inputs.
        """
        fields = self._fields(index)
        text = self._encode.text(fields)
        others = {name: value for name, value in fields.items() if name not in _INPUTS}
        return {**others, "text": text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"}

    def summary(self) -> str:
        """What the file holds, and how much of it was cut."""
        text = f"{self.path.name}: {len(self):,} examples, {self.n_tokens:,} tokens"
        if self.n_cut:
            text += f"; {self.n_cut:,} cut to {self._encode.max_length} tokens (--max-length)"
        if alone := sum(length == 1 for length in self._lengths):
            text += f"; {alone:,} of a single token, in which nothing is predicted: their influence is zero"
        return text

    def _fields(self, index: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return json.loads(file.readline())

    def _scan(self, check: bool, show_progress: bool) -> str:
        """Finds and checks every line; a digest of the file."""
        digest, start = hashlib.blake2b(digest_size=16), 0
        settings = {"unit": "B", "unit_scale": True, "leave": False, "disable": not show_progress}
        with (
            self.path.open("rb") as file,
            tqdm(desc=f"Reading {self.path.name}", total=self.path.stat().st_size, **settings) as bar,
        ):
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    if check:
                        self._check(number, line)
                    self._starts.append(start)
                    self._lines.append(number)
                start += len(line)
                bar.update(len(line))
        return digest.hexdigest()

    def _check(self, number: int, line: bytes) -> None:
        try:
            row, length = self._encode(json.loads(line.strip()))
            self._keys = self._keys or set(row)
            if set(row) != self._keys:
                raise ValueError('some lines have an "attention_mask" and others do not: give it on all or on none')
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {number}: no JSON, {error.msg} at column {error.colno}.") from error
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: {error}.") from error
        self._lengths.append(len(row["input_ids"]))
        self.n_tokens += len(row["input_ids"])
        self.n_cut += length > len(row["input_ids"])


def _shown(value: Any, at_most: int = 60) -> str:
    """A value as JSON, cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= at_most else text[:at_most] + "…"
