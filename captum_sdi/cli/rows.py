"""The examples of a jsonl file: checked once, line by line, then read from the disk when they are asked for."""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from captum_sdi.data.encoder import INPUTS, Encoder
from captum_sdi.data.fields import unique_keys
from captum_sdi.data.texts import has_target
from captum_sdi.whole_file import check_regular


class JsonLines(Dataset[dict[str, Tensor]]):
    r"""The examples of a jsonl file, one per line; blank lines are none.

    Only where each line begins is kept in memory. A bad line is an error that names it before any work starts.

    Args:
        digest: That of a file that was checked before: its lines are only counted.

    Raises:
        ValueError: If a line cannot be used, there is none, or the file is not the one of ``digest``.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"input_ids": [1, 2], "id": "a"}\n{"input_ids": [3]}\n'), file.flush()
        ...     data = JsonLines(file.name, Encoder(vocab_size=10))
        ...     len(data), data[0]["labels"].tolist(), data.description(0)
        (2, [1, 2], {'id': 'a', 'text': '1 2'})
    """

    def __init__(
        self,
        path: str | Path,
        encoder: Encoder,
        digest: str | None = None,
        *,
        show_progress: bool = False,
    ) -> None:
        self.path = Path(path)
        self.n_tokens = 0
        self.n_cut = 0
        self.n_without_target = 0
        self._encoder = encoder
        self._starts = array.array("Q")  # bytes before each example
        self._line_numbers = array.array("Q")
        self._lengths = array.array("Q")  # in tokens
        self._input_names: set[str] = set()
        self._stamp = stamp(check_regular(self.path))
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

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        row, _ = self._encoder(self._fields(position))
        return {name: torch.tensor(numbers) for name, numbers in row.items()}

    @property
    def longest(self) -> int:
        """Position of the longest example; 0 where the lines were only counted."""
        return max(range(len(self._lengths)), key=self._lengths.__getitem__, default=0)

    def line(self, position: int) -> int:
        """Return the number of an example's line, from 1; blank lines count."""
        return self._line_numbers[position]

    def description(self, position: int) -> dict[str, Any]:
        """Return what a result says of an example: its text, whole, and its other fields."""
        fields = self._fields(position)
        other_fields = {name: value for name, value in fields.items() if name not in INPUTS}
        return {**other_fields, **self._encoder.words(fields)}

    def summary(self) -> str:
        """Return how much the file holds, and how much of it is cut or predicts nothing."""
        text = f"{self.path.name}: {len(self):,} examples, {self.n_tokens:,} tokens"
        if self.n_cut:
            text += f"; {self.n_cut:,} cut to {self._encoder.max_length} tokens (--max-length)"
        n_single = self._lengths.count(1)
        if n_single:
            text += f"; {n_single:,} of a single token, in which nothing is predicted: their influence is zero"
        n_silent = self.n_without_target - n_single
        if n_silent:
            text += f"; {n_silent:,} whose targets are all cut off or ignored: their influence is zero"
        return text

    def _fields(self, position: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            self.check_unchanged(os.fstat(file.fileno()))
            file.seek(self._starts[position])
            return json.loads(file.readline())

    def check_unchanged(self, status: os.stat_result | None = None) -> None:
        """Check that the file is still the one whose lines were counted.

        Raises:
            ValueError: If it was truncated, written to or replaced.
        """
        if stamp(status or check_regular(self.path)) != self._stamp:
            raise ValueError(f"{self.path} has changed since its lines were counted: run again when it is finished.")

    def _scan(self, *, check: bool, show_progress: bool) -> str:
        """Find every example, check it if asked to, and return a digest of the file."""
        digest = hashlib.blake2b(digest_size=16)
        start = 0
        with self.path.open("rb") as file, self._progress_bar(show_progress=show_progress) as bar:
            for line_number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    if check:
                        self._check(line, line_number)
                    self._starts.append(start)
                    self._line_numbers.append(line_number)
                start += len(line)
                bar.update(len(line))
        self.check_unchanged()
        return digest.hexdigest()

    def _progress_bar(self, *, show_progress: bool) -> tqdm:
        return tqdm(
            desc=f"Reading {self.path.name}",
            total=self.path.stat().st_size,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not show_progress,
        )

    def _check(self, line: bytes, line_number: int) -> None:
        """Check one line, and count its tokens."""
        try:
            fields = json.loads(line.strip(), object_pairs_hook=unique_keys)
            row, length = self._encoder(fields)
            self._input_names = self._input_names or set(row)
            if set(row) != self._input_names:
                raise ValueError('some lines have an "attention_mask" and others do not: give it on all or on none')
        except json.JSONDecodeError as error:
            message = f"no JSON, {error.msg} at column {error.colno}"
            if line_number == 1 and not line.lstrip().startswith(b"{"):
                message += '; a line is such as {"text": "..."}, or let the name of a file of plain texts end in .txt'
            raise ValueError(f"{self.path}, line {line_number}: {message}.") from error
        except RecursionError as error:
            raise ValueError(f"{self.path}, line {line_number}: lists or objects are nested too deeply.") from error
        except ValueError as error:
            raise ValueError(f"{self.path}, line {line_number}: {error}.") from error
        kept = len(row["input_ids"])
        self._lengths.append(kept)
        self.n_tokens += kept
        self.n_cut += length > kept
        self.n_without_target += not has_target(row["labels"])


def joined_digest(digests: Sequence[str]) -> str:
    """Return the digest of several files of examples by those of each."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Return what changes when a file does."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def clip(text: str, length: int) -> str:
    """Return a text of at most `length` characters; an ellipsis ends one that was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"
