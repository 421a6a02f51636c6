"""What the examples of a result say, where their data sets remember it, as those of `captum_sdi.texts` do."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Subset

Example = str | Mapping[str, Any]
"""A text, or a mapping with a ``text`` and other fields, such as an ``id``."""

NOTE = "words"
"""The key of the words in the metadata of a saved result."""
LARGEST_NOTE = 64_000_000
"""Characters of words that a saved result holds; the header of a safetensors file has a limit of 100 MB."""


@dataclass(frozen=True)
class Words:
    """The words of both sides; None for a side whose data set remembers none."""

    test: Sequence[Example] | None
    train: Sequence[Example] | None


class Remembered(Sequence[Example]):
    """The words of a data set, made when they are asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        dataset = self.dataset
        while isinstance(dataset, Subset):
            position = dataset.indices[position]
            dataset = dataset.dataset
        return dataset.example(position)


class Kept(Sequence[Example]):
    """The words of some of many examples, as they were saved; of the others there is an empty text."""

    def __init__(self, known: Mapping[int, Example], size: int) -> None:
        self.known = known
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.known.get(position, "")


class PlainTexts(Sequence[str]):
    """The texts of examples, without their other fields."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: Any) -> Any:
        example = self.examples[position]
        return example if isinstance(example, str) else str(example.get("text", ""))


def words_of(tests: Any, trains: Any) -> Words | None:
    """Return the words of two data sets, or of the data sets in two loaders; None where neither remembers any."""
    words = Words(remembered(tests), remembered(trains))
    return None if words.test is None and words.train is None else words


def remembered(examples: Any) -> Sequence[Example] | None:
    """Return the words of a data set, or of the part that a `Subset` has of one; None where it remembers none."""
    dataset = examples.dataset if isinstance(examples, DataLoader) else examples
    whole = dataset
    while isinstance(whole, Subset):
        whole = whole.dataset
    return Remembered(dataset) if callable(getattr(whole, "example", None)) else None


Method = TypeVar("Method", bound=Callable[..., Any])


def with_words(method: Method) -> Method:
    """Let the results of a method of `SDIInfluence` know what their examples say, where the data sets remember it."""

    @functools.wraps(method)
    def remembering(self: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = method(self, inputs, *args, **kwargs)
        words = words_of(inputs, self.train_dataloader)
        return result.with_words(words) if hasattr(result, "with_words") else result

    return remembering  # type: ignore[return-value]  # it is called as the method is


def as_note(words: Words | None, used: Sequence[int]) -> dict[str, str]:
    """Return words as a note beside saved tensors: all of the test side, those that are used of the train side.

    Nothing where there are none, or where they are larger than a file's header may be.
    """
    if words is None:
        return {}
    trains = None
    if words.train is not None:
        kept = {str(index): words.train[index] for index in used}
        trains = {"size": len(words.train), "kept": kept}
    tests = None if words.test is None else list(words.test)
    note = json.dumps({"test": tests, "train": trains}, default=str)
    return {NOTE: note} if len(note) <= LARGEST_NOTE else {}


def from_note(metadata: Mapping[str, str]) -> Words | None:
    """Return the words beside saved tensors; None where there are none, or what is there is no words.

    A file may come from anywhere: words that do not fit are no reason to refuse its numbers.
    """
    try:
        content = json.loads(metadata.get(NOTE, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    tests, trains = content.get("test"), content.get("train")
    test_words = tests if isinstance(tests, list) and all(map(is_example, tests)) else None
    train_words = None
    if isinstance(trains, dict) and type(trains.get("size")) is int and isinstance(trains.get("kept"), dict):
        known = {}
        for index, text in trains["kept"].items():
            if index.isdecimal() and is_example(text):
                known[int(index)] = text
        train_words = Kept(known, max(0, trains["size"]))
    return Words(test_words, train_words)


def is_example(value: Any) -> bool:
    """Return whether a value of JSON is a text, or has one."""
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("text"), str))
