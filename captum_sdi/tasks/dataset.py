"""What every task shares: a drawn example, how examples are drawn, and the dataset of their rows.

Shapes: `n` examples, `p` token positions.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100  # the label transformers and torch leave out of the loss
PAD_TOKEN_ID = 0
MISSES = 1000  # numbers in a row without an example after which no more are looked for


class Example(NamedTuple):
    """One example as text, a character per token."""

    text: str
    """What the model reads."""
    targets: str
    """What it should predict at the same places, with a space where nothing is predicted."""
    difficulty: int = 0
    """How hard it is, in the task's own measure; 0 where the task has none."""

    @classmethod
    def question(cls, prompt: str, answer: str, difficulty: int = 0) -> "Example":
        """Return an example that predicts every character of `answer` and none of `prompt`."""
        return cls(prompt + answer, " " * len(prompt) + answer, difficulty)


class TaskDataset(Dataset[dict[str, Tensor]]):
    """Rows of token ids, right-padded to one length, with the text they come from.

    A row is a mapping of three long tensors (p,): `input_ids`, `labels` (-100 where nothing is
    predicted; a label stands at its own token, and causal models shift) and `attention_mask`. A
    character's token id is its place in `characters`, counted from 1; 0 is padding.

    Attributes:
        examples: The examples as text.
        characters: Every character that can occur.
        input_ids: All rows, (n, p); `labels` and `attention_mask` likewise.
        difficulty: How hard each example is, (n,), in the task's own measure; not part of the rows.

    Example:
        >>> examples = [Example.question("10=", "1"), Example.question("1=", "1")]
        >>> data = TaskDataset(examples, characters="01=", length=4)
        >>> data[1]["input_ids"].tolist(), data[1]["labels"].tolist()
        ([2, 3, 2, 0], [-100, -100, 2, -100])
        >>> data.text(0), data.vocab_size, data.pad_token_id
        ('10=1', 4, 0)
    """

    pad_token_id = PAD_TOKEN_ID

    def __init__(self, examples: Sequence[Example], characters: str, length: int) -> None:
        """Encode and pad the examples.

        Args:
            examples: What the rows say.
            characters: Every character that can occur, each once, none a space.
            length: Number of positions of every row.

        Raises:
            ValueError: If an example does not fit `characters` or `length`, or its targets are not
                as long as its text.
        """
        self.examples = list(examples)
        self.characters = characters
        self.length = length
        shape = (len(self.examples), length)
        self.input_ids = torch.full(shape, PAD_TOKEN_ID)
        self.labels = torch.full(shape, IGNORED)
        self.attention_mask = torch.zeros(shape, dtype=torch.long)
        self.difficulty = torch.tensor([example.difficulty for example in self.examples])
        for row, example in enumerate(self.examples):
            self._check(example)
            end = len(example.text)
            self.input_ids[row, :end] = torch.tensor(self.encode(example.text))
            self.labels[row, :end] = torch.tensor([IGNORED if c == " " else self.encode(c)[0] for c in example.targets])
            self.attention_mask[row, :end] = 1

    @property
    def vocab_size(self) -> int:
        """Number of token ids, padding included."""
        return len(self.characters) + 1

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one row."""
        return {
            "input_ids": self.input_ids[index],
            "labels": self.labels[index],
            "attention_mask": self.attention_mask[index],
        }

    def text(self, index: int) -> str:
        """Return what row `index` says, answer included, such as "10110=1"."""
        return self.examples[index].text

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return [self.characters.index(character) + 1 for character in text]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of token ids (p,), padding left out."""
        return "".join(self.characters[int(i) - 1] for i in ids if int(i) != PAD_TOKEN_ID)

    def split(self, held_out: int) -> tuple["TaskDataset", "TaskDataset"]:
        """Part the rows in two that share no example.

        Rows come in random order, so the parts are alike.

        Args:
            held_out: Number of rows of the second part.

        Returns:
            All other rows, and the held-out ones.

        Raises:
            ValueError: If a part would be empty.
        """
        if not 0 < held_out < len(self):
            raise ValueError(f"held_out={held_out!r} must leave rows on both sides; there are {len(self)}.")
        kept = len(self) - held_out
        return (
            TaskDataset(self.examples[:kept], self.characters, self.length),
            TaskDataset(self.examples[kept:], self.characters, self.length),
        )

    def _check(self, example: Example) -> None:
        if len(example.text) != len(example.targets):
            raise ValueError(f"{example} has targets of another length than its text.")
        if len(example.text) > self.length:
            raise ValueError(f"{example} is longer than length={self.length}; raise the length.")
        written = set(example.text) | (set(example.targets) - {" "})
        if unknown := sorted(written - set(self.characters)):
            raise ValueError(f"{example} has {unknown}, not in characters={self.characters!r}.")


def draw_examples(
    size: int,
    seed: int,
    spaces: Mapping[int, int],
    make: Callable[[int, int], Example | None],
    kinds: str = "lengths",
) -> list[Example]:
    """Draw different examples, equally many of each length (or other kind) until one runs out.

    One has run out when all its numbers were drawn, or `MISSES` in a row were of no example.

    Args:
        size: How many.
        seed: The same seed gives the same examples, on every machine and in every process.
        spaces: For each length, how many examples of it exist, or how many numbers to try.
        make: `make(length, number)` is the example with that number, 0 <= number < spaces[length]; None
            if there is none, or it is too much like another one.
        kinds: What the lengths are called in error messages.

    Returns:
        The examples, in random order.

    Raises:
        ValueError: If `size` or `seed` is no proper number, or fewer examples exist or are found, or
            none of some length.
    """
    check_integer("size", size, minimum=1)
    check_integer("seed", seed)
    rng = random.Random(str(seed))  # of a number it would take the absolute value: -1 and 1 alike
    lengths = [_examples_of(kinds, length, _in_random_order(rng, space), make) for length, space in spaces.items()]
    examples = list(islice(_in_turn(lengths), size))
    if len(examples) < size:
        raise ValueError(
            f"size={size}: only {len(examples)} different examples of these {kinds} exist or can be found; "
            f"ask for fewer or allow more {kinds}."
        )
    rng.shuffle(examples)
    return examples


def _examples_of(
    kinds: str, length: int, numbers: Iterator[int], make: Callable[[int, int], Example | None]
) -> Iterator[Example]:
    """Yield the examples of one length until none, or hardly any, are left."""
    found = misses = 0
    for number in numbers:
        example = make(length, number)
        if example is not None:
            found, misses = found + 1, 0
            yield example
        elif (misses := misses + 1) == MISSES:
            break
    if not found:
        raise ValueError(f"{misses} attempts gave no example for {length}, one of the {kinds}; leave it out.")


def _in_turn(iterators: list[Iterator[Example]]) -> Iterator[Example]:
    """Yield one of each, again and again, until all have run out."""
    while iterators:
        for iterator in list(iterators):
            example = next(iterator, None)
            if example is None:
                iterators.remove(iterator)
            else:
                yield example


def _in_random_order(rng: random.Random, space: int) -> Iterator[int]:
    """Yield every number below `space` once.

    Fisher-Yates, with only the moved entries in memory: `space` may be astronomically large.
    """
    moved: dict[int, int] = {}
    for position in range(space):
        chosen = rng.randrange(position, space)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.get(position, position)


def check_integer(name: str, value: object, minimum: int | None = None, maximum: int | None = None) -> None:
    """Raise ValueError naming the argument unless it is an integer, of at least `minimum`, at most `maximum`."""
    low = -math.inf if minimum is None else minimum
    high = math.inf if maximum is None else maximum
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        bounds = [f"at {end} {bound}" for end, bound in (("least", minimum), ("most", maximum)) if bound is not None]
        raise ValueError(f"{name}={value!r} must be an integer{' of ' * bool(bounds)}{' and '.join(bounds)}.")


def check_range(name: str, fewest: int, most: int, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise ValueError unless `min_NAME` to `max_NAME` is a range of integers within the bounds."""
    check_integer(f"min_{name}", fewest, minimum, maximum)
    check_integer(f"max_{name}", most, minimum, maximum)
    if fewest > most:
        raise ValueError(f"min_{name}={fewest} is more than max_{name}={most}; swap or change them.")
