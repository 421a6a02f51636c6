"""An example of a task as text, and the dataset of rows of token ids that examples become.

Shapes: `n` examples, `p` token positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""The label that transformers and torch leave out of the loss."""
NO_TARGET = " "
PAD_TOKEN_ID = 0


class Example(NamedTuple):
    """One example as text, a character per token."""

    text: str
    """The text that the model reads."""
    targets: str
    """The characters to predict at the same positions, with a space where nothing is predicted."""
    difficulty: int = 0
    """How hard the example is, in the task's own measure; 0 where the task has none."""

    @classmethod
    def question(cls, prompt: str, answer: str, difficulty: int = 0) -> "Example":
        """Return an example that predicts every character of `answer` and none of `prompt`."""
        targets = NO_TARGET * len(prompt) + answer
        return cls(prompt + answer, targets, difficulty)


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

    def __init__(
        self,
        examples: Sequence[Example],
        characters: str,
        length: int,
    ) -> None:
        """Encode and pad the examples.

        Args:
            examples: The examples as text, one a row.
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
        difficulties = [example.difficulty for example in self.examples]
        self.difficulty = torch.tensor(difficulties)
        for row, example in enumerate(self.examples):
            self._check(example)
            token_ids = self.encode(example.text)
            labels = [self._label(target) for target in example.targets]
            end = len(token_ids)
            self.input_ids[row, :end] = torch.tensor(token_ids)
            self.labels[row, :end] = torch.tensor(labels)
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
        """Return the text of row `index`, answer included, such as "10110=1"."""
        return self.examples[index].text

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return [self.characters.index(character) + 1 for character in text]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of token ids (p,), padding left out."""
        text = ""
        for token_id in map(int, ids):
            if token_id != PAD_TOKEN_ID:
                text += self.characters[token_id - 1]
        return text

    def split(self, held_out: int) -> tuple["TaskDataset", "TaskDataset"]:
        """Divide the rows into two datasets that share no example.

        Rows come in random order, so the two are alike.

        Returns:
            The first rows, and the last `held_out` ones.

        Raises:
            ValueError: If one of the two would be empty.
        """
        if not 0 < held_out < len(self):
            raise ValueError(f"held_out={held_out!r} must leave rows on both sides; there are {len(self)}.")
        n_kept = len(self) - held_out
        first_examples = self.examples[:n_kept]
        last_examples = self.examples[n_kept:]
        return (
            TaskDataset(first_examples, self.characters, self.length),
            TaskDataset(last_examples, self.characters, self.length),
        )

    def _label(self, target: str) -> int:
        return IGNORED if target == NO_TARGET else self.encode(target)[0]

    def _check(self, example: Example) -> None:
        if len(example.text) != len(example.targets):
            raise ValueError(f"{example} has targets of another length than its text.")
        if len(example.text) > self.length:
            raise ValueError(f"{example} is longer than length={self.length}; raise the length.")
        targets = example.targets.replace(NO_TARGET, "")
        unknown_characters = set(example.text + targets) - set(self.characters)
        if unknown_characters:
            raise ValueError(f"{example} has {sorted(unknown_characters)}, not in characters={self.characters!r}.")
