"""Examples in other files than JSON lines, as `readers` reads them, and those of several files."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_sdi.cli.places import may_be_on_hub
from captum_sdi.cli.readers import READERS, is_dataset_folder, is_plain_text, named_rows, read_table
from captum_sdi.cli.rows import JsonLines, joined_digest, stamp
from captum_sdi.data.encoder import INPUTS, Encoder
from captum_sdi.data.texts import has_target
from captum_sdi.whole_file import check_regular


class TableRows(Dataset[dict[str, Tensor]]):
    """The rows of a table that is held in memory, each checked before any work starts.

    Args:
        path: Where the table is from, for messages.
        rows: Its rows.
        encoder: Makes tokens of them.
        digest: That of the rows that were indexed.

    Raises:
        ValueError: If a row cannot be used, there is none, or they are not those of ``digest``.
    """

    def __init__(
        self,
        path: Path,
        rows: Sequence[dict[str, Any]],
        encoder: Encoder,
        digest: str | None = None,
    ) -> None:
        self.path = path
        self.rows = rows
        self.n_tokens = self.n_cut = self.n_without_target = 0
        self._encoder = encoder
        self._lengths: list[int] = []
        self._stamp = stamp(check_regular(path)) if path.is_file() else None
        for number, row in enumerate(rows, start=1):
            self._check(row, number)
        if not rows:
            raise ValueError(f"{path} holds no example: it has no row.")
        self.digest = digest_of(rows)
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{path} is not what was indexed, or it has changed since: put that back, say where it is now, or "
                "build an index of this one."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        encoded, _ = self._encoder(self.rows[position])
        return {name: torch.tensor(numbers) for name, numbers in encoded.items()}

    @property
    def longest(self) -> int:
        """Position of the longest example."""
        return max(range(len(self)), key=self._lengths.__getitem__)

    def line(self, position: int) -> int:
        """Return the number of an example's row, from 1."""
        return position + 1

    def description(self, position: int) -> dict[str, Any]:
        """Return what a result says of an example: its text, whole, and its other fields."""
        return described(self._encoder, self.rows[position])

    def summary(self) -> str:
        """Return how much the table holds, and how much of it is cut or predicts nothing."""
        text = f"{self.path.name}: {len(self):,} examples, {self.n_tokens:,} tokens"
        if self.n_cut:
            text += f"; {self.n_cut:,} cut to {self._encoder.max_length} tokens (--max-length)"
        if self.n_without_target:
            text += f"; {self.n_without_target:,} in which nothing is predicted: their influence is zero"
        return text

    def check_unchanged(self) -> None:
        """Check that the file is still the one that was read.

        Raises:
            ValueError: If it was written to or replaced.
        """
        if self._stamp is not None and stamp(check_regular(self.path)) != self._stamp:
            raise ValueError(f"{self.path} has changed since it was read: run again when it is finished.")

    def _check(self, row: dict[str, Any], number: int) -> None:
        try:
            encoded, length = self._encoder(row)
        except ValueError as error:
            raise ValueError(f"{self.path}, row {number}: {error}.") from error
        kept = len(encoded["input_ids"])
        self._lengths.append(kept)
        self.n_tokens += kept
        self.n_cut += length > kept
        self.n_without_target += not has_target(encoded["labels"])


Examples = JsonLines | TableRows
"""The examples of one file."""


class JoinedRows(Dataset[dict[str, Tensor]]):
    """The examples of several files, one file after the other."""

    def __init__(self, parts: Sequence[Examples], digest: str | None = None) -> None:
        self.parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))
        self.digest = joined_digest([examples.digest for examples in parts])
        if digest is not None and digest != self.digest:
            names = ", ".join(str(examples.path) for examples in parts)
            raise ValueError(
                f"{names} are not the files that were indexed, or one of them has changed since: put them back, say "
                "where they are now, or build an index of these."
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        examples, place = self._find(position)
        return examples[place]

    @property
    def longest(self) -> int:
        """Position of the longest example."""
        starts = [0, *self._ends[:-1]]
        files = zip(starts, self.parts, strict=True)
        longest = [start + examples.longest for start, examples in files]
        return max(longest, key=lambda position: len(self[position]["input_ids"]))

    def line(self, position: int) -> int:
        """Return the number of an example's line in its own file."""
        examples, place = self._find(position)
        return examples.line(place)

    def description(self, position: int) -> dict[str, Any]:
        """Return what a result says of an example, and which file it is from."""
        examples, place = self._find(position)
        description = examples.description(place)
        return {"file": examples.path.name, **description}

    def summary(self) -> str:
        """Return how much each file holds."""
        return "\n".join(examples.summary() for examples in self.parts)

    def check_unchanged(self) -> None:
        """Check that every file is still the one that was read."""
        for examples in self.parts:
            examples.check_unchanged()

    def _find(self, position: int) -> tuple[Examples, int]:
        number = bisect.bisect_right(self._ends, position)
        start = self._ends[number - 1] if number else 0
        return self.parts[number], position - start


AnyExamples = Examples | JoinedRows
"""The examples of one or of several files."""


def open_examples(
    paths: Sequence[Path],
    encoder: Encoder,
    digest: str | None = None,
    *,
    split: str | None = None,
    text_column: str | None = None,
    show_progress: bool = False,
) -> AnyExamples:
    """Open files of examples, each by the end of its name.

    Args:
        paths: One or more files, folders that `datasets` saved, or data sets on the Hub.
        encoder: Makes tokens of the examples.
        digest: That of examples that were indexed.
        split: Which split of a folder, or of a data set.
        text_column: The field that is the text.
        show_progress: Whether to show how far a long file was read.

    Returns:
        The examples.

    Raises:
        ValueError: If one of the files cannot be used.
    """
    check_files(paths)
    if split is not None and not any(has_splits(path) for path in paths):
        raise ValueError(f"--split {split}: {', '.join(map(str, paths))} has no splits, as data sets have.")
    own_digest = digest if len(paths) == 1 else None
    parts: list[Examples] = []
    for path in paths:
        is_table = has_splits(path) or path.suffix in READERS or is_plain_text(path)
        if is_table or text_column is not None:
            table = read_table(path, split)
            rows = named_rows(table, path, text_column)
            examples = TableRows(path, rows, encoder, own_digest)
            parts.append(examples)
        else:
            lines = JsonLines(path, encoder, own_digest, show_progress=show_progress)
            parts.append(lines)
    return parts[0] if len(parts) == 1 else JoinedRows(parts, digest)


def has_splits(path: Path) -> bool:
    """Say whether a path is a data set, which may have splits, and no file."""
    return may_be_on_hub(path) or is_dataset_folder(path)


def check_files(paths: Sequence[Path]) -> None:
    """Check that each path is a regular file, a folder that `datasets` saved, or may be a data set on the Hub."""
    for path in paths:
        if not has_splits(path):
            check_regular(path)


def described(encoder: Encoder, fields: dict[str, Any]) -> dict[str, Any]:
    """Return what a result says of an example: its text, whole, and its other fields."""
    other_fields = {name: value for name, value in fields.items() if name not in INPUTS}
    return {**other_fields, **encoder.words(fields)}


def digest_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return a digest of rows, whatever file they are from."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        line = json.dumps(row, sort_keys=True, default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
