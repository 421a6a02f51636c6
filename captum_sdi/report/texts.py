"""What examples say: each text stands in the page once, however many test examples it acted on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_sdi.data.fields import LEARNED
from captum_sdi.scores.words import Example

NO_TEXT = -1
"""Stands for an example of which no text is known."""
PER_CHUNK = 256


class TextTable:
    """The different texts of a page, numbered in the order in which they are asked for.

    Example:
        >>> table = TextTable(["a", "b", "a"])
        >>> [table.number(index) for index in (2, 1, 0)]
        [0, 1, 0]
        >>> table.entries
        [['a'], ['b']]
    """

    def __init__(self, examples: Sequence[Example] | None) -> None:
        self.entries: list[list[Any]] = []
        self._examples = examples
        self._number_of_index: dict[int, int] = {}
        self._number_of_entry: dict[str, int] = {}

    def number(self, index: int) -> int:
        """Return the number of a training example's text; `NO_TEXT` where no texts are known."""
        if self._examples is None:
            return NO_TEXT
        if index not in self._number_of_index:
            entry = example_entry("texts", self._examples, index)
            number = self._number_of_entry.setdefault(json.dumps(entry), len(self.entries))
            if number == len(self.entries):
                self.entries.append(entry)
            self._number_of_index[index] = number
        return self._number_of_index[index]


def example_entry(name: str, examples: Sequence[Example], position: int) -> list[Any]:
    """Return an example as the page holds it: its text and, where there are any, its other fields and learned parts.

    Raises:
        TypeError: If it is neither a text nor a mapping.
    """
    example = mapping_of(name, examples, position)
    text = str(example.get("text", ""))
    learned = learned_spans(text, example.get(LEARNED))
    shown = {"text"} if learned is None else {"text", LEARNED}
    fields = {str(name): readable(value) for name, value in example.items() if name not in shown}
    if learned is not None:
        return [text, fields, learned]
    return [text, fields] if fields else [text]


def mapping_of(name: str, examples: Sequence[Example], position: int) -> Mapping[str, Any]:
    """Return an example as a mapping with a ``text``.

    Raises:
        TypeError: If it is neither a text nor a mapping.
    """
    example = examples[position]
    if isinstance(example, str):
        return {"text": example}
    if not isinstance(example, Mapping):
        raise TypeError(f"{name}[{position}] must be a text, or a mapping with a 'text', got {type(example).__name__}.")
    return example


def learned_spans(text: str, spans: Any) -> list[list[int]] | None:
    """Return which parts of a text are learned, counted as JavaScript does; None where that is not said.

    A field of that name may be anything: what does not name parts of the text, in their order, is a field like others.

    Example:
        >>> learned_spans("🙂 yes", [[2, 5]]), learned_spans("no", [[1, 7]]), learned_spans("no", "yes")
        ([[3, 6]], None, None)
    """
    if not isinstance(spans, list) or not all(isinstance(span, list | tuple) and len(span) == 2 for span in spans):
        return None
    places = [place for span in spans for place in span]
    if not all(type(place) is int for place in places) or [0, *places, len(text)] != sorted([0, *places, len(text)]):
        return None
    return [[units(text[:start]), units(text[:end])] for start, end in spans]


def units(text: str) -> int:
    """Return how long a text is in JavaScript, whose strings are UTF-16."""
    return len(text.encode("utf-16-le", errors="surrogatepass")) // 2


def token_examples(test_texts: Sequence[Example], token_of: Tensor) -> list[Example]:
    """Return the text of each row of a result that has one for every target token, which is named beside it.

    Raises:
        ValueError: If there are not as many texts as test examples.
    """
    n_tests = 1 + int(token_of[:, 0].max())
    check_examples("test_texts", test_texts, n_tests, exact=True)
    rows: list[Example] = []
    for test, position in token_of.tolist():
        rows.append({"target token": position, **mapping_of("test_texts", test_texts, test)})
    return rows


def readable(value: Any) -> str:
    """Return a field of an example as it is shown: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def check_examples(name: str, examples: Any, n_examples: int, *, exact: bool) -> None:
    """Check that there is a text for each example.

    Raises:
        TypeError: If it is one string, or no sequence.
        ValueError: If there are too few, or too many.
    """
    if examples is None:
        return
    if isinstance(examples, str | Mapping) or not isinstance(examples, Sequence):
        raise TypeError(f"{name} must be a sequence of texts, one per example, got {type(examples).__name__}.")
    n_texts = len(examples)
    if n_texts < n_examples or (exact and n_texts != n_examples):
        wanted = f"{n_examples}" if exact else f"at least {n_examples}"
        raise ValueError(f"{name} must hold {wanted} texts, one per example, got {n_texts}.")
