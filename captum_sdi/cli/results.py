"""Scores on disk and on the screen: for jq, for numpy, for `StepInfluence.load`, and for people."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from captum_sdi.cli.output import ARRAYS, FILES, LINES, PAGE, SPREADSHEET, TENSORS, finish_interrupted
from captum_sdi.cli.result_lines import ROLES, describe_pairs, json_line, pairs_of, read_lines
from captum_sdi.cli.rows import clip
from captum_sdi.cli.spreadsheet import write_spreadsheet
from captum_sdi.cli.tables import AnyExamples
from captum_sdi.data.texts import SOURCES
from captum_sdi.scores.result import StepInfluence
from captum_sdi.whole_file import write_whole

QUERIES_SHOWN, EXAMPLES_SHOWN = 10, 3  # as many as a screen holds


class Known(Sequence[Any]):
    """What is known of some examples, by index, as long as the largest index asks for; a default for the others."""

    def __init__(self, known: Mapping[int, Any], default: Any) -> None:
        self._known = known
        self._default = default

    def __len__(self) -> int:
        return 1 + max(self._known, default=-1)

    def __getitem__(self, index: Any) -> Any:
        return self._known.get(index, self._default)


@dataclass(frozen=True)
class Results:
    """Scores, and the same with what is known about the examples."""

    scores: StepInfluence
    """With ``indices``."""
    lines: list[dict[str, Any]]
    """Those of ``scores.jsonl``, one per query."""

    @staticmethod
    def from_scores(
        scores: StepInfluence,
        queries: AnyExamples,
        train: AnyExamples,
        roles: Mapping[str, range],
    ) -> Results:
        """Look up the examples of scores, in whose columns the proponents, the opponents or both stand."""
        lines = []
        for q in range(len(queries)):
            line = {
                "query": q,
                "line": queries.line(q),
                "example": queries.description(q),
                "n_steps": int(scores.n_steps[q]),
            }
            for role, places in roles.items():
                line[role] = describe_pairs(scores, q, places, train)
            lines.append(line)
        return Results(scores, lines)

    @staticmethod
    def read(folder: Path) -> Results:
        """Read what `write` wrote, and check that it is of one run."""
        finish_interrupted(folder)
        for name in (LINES, TENSORS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no results of captum-sdi score: there is no {name} in it.")
        results = Results(StepInfluence.load(folder / TENSORS), read_lines(folder / LINES))
        indices = results.scores.indices
        if indices is None or indices.tolist() != results.train_indices or not results.agree():
            raise ValueError(f"{LINES} and {TENSORS} in {folder} are of different runs: run captum-sdi score again.")
        return results

    def write(self, folder: Path, files: Sequence[str]) -> None:
        """Write numbers and texts into a folder that is to hold `files`."""
        arrays: dict[str, Any] = {}
        for field in dataclasses.fields(self.scores):
            tensor = getattr(self.scores, field.name)
            if isinstance(tensor, Tensor):
                arrays[field.name] = tensor.cpu().numpy()
        with (folder / ARRAYS).open("wb") as file:
            np.savez(file, **arrays)
        json_lines = b"".join(json_line(line) for line in self.lines)
        write_whole(folder / LINES, lambda unfinished: unfinished.write_bytes(json_lines))
        write_spreadsheet(folder / SPREADSHEET, self.lines)
        if PAGE in files:
            self.write_page(folder / PAGE)
        self.write_tensors(folder, files)

    def write_tensors(self, folder: Path, files: Sequence[str]) -> None:
        """Write the scores, and the list of the files that belong to them."""
        self.scores.save(folder / TENSORS, **{FILES: json.dumps(sorted(files))})

    def agree(self) -> bool:
        """Return whether the lines hold the scores of the tensors, which have more digits."""
        totals = []
        for pairs in self.pairs:
            totals.append([pair["score"] for pair in pairs])
        written = np.array(totals, dtype=np.float64)
        computed = self.scores.influence_scores.double().numpy()
        return np.allclose(written, computed, rtol=1e-5, atol=0, equal_nan=True)

    @property
    def pairs(self) -> list[list[dict[str, Any]]]:
        """For each query, its training examples in the order of the scores."""
        return [pairs_of(line) for line in self.lines]

    @property
    def train_indices(self) -> list[list[int]]:
        """For each query, the positions of its training examples, the strongest first."""
        indices = []
        for pairs in self.pairs:
            indices.append([pair["index"] for pair in pairs])
        return indices

    @property
    def query_texts(self) -> list[str]:
        """What each query says."""
        return [line["example"]["text"] for line in self.lines]

    @property
    def train_texts(self) -> Known:
        """What each training example says; nothing for one that does not occur in the scores."""
        known: dict[int, str] = {}
        for pairs in self.pairs:
            known |= {pair["index"]: printable(pair["example"]["text"]) for pair in pairs}
        return Known(known, "")

    @property
    def train_examples(self) -> Known:
        """What is known of each training example: its text, its other fields and its line."""
        known: dict[int, dict[str, Any]] = {}
        for pairs in self.pairs:
            for pair in pairs:
                known[pair["index"]] = {**shown_fields(pair["example"]), "line": pair.get("line", "")}
        return Known(known, {"text": ""})

    def write_page(self, file: Path) -> None:
        """Write the page to explore the scores in."""
        from captum_sdi.report import write_page  # only where one is wanted

        examples = [shown_fields(line["example"]) for line in self.lines]
        write_page(self.scores, file, texts=self.train_examples, test_texts=examples)

    def table(self, width: int | None = None) -> str:
        """Return the first queries and their strongest examples.

        Args:
            width: Characters in a line; None: as many as the terminal has, at most 120.
        """
        width = width or min(120, shutil.get_terminal_size().columns)
        lines = []
        for q, line in enumerate(self.lines[:QUERIES_SHOWN]):
            lines.append(f"query {q}: {line['example']['text']}")
            lines.append("       score  ± error  step  example (steps count from 1)")
            roles = [role for role in ROLES if line.get(role)]
            for role in roles:
                if len(roles) > 1:
                    lines.append(HEADINGS[role])
                lines += map(table_row, line[role][:EXAMPLES_SHOWN])
        table = [clip(printable(line), width) for line in lines]
        n_more = len(self.lines) - QUERIES_SHOWN
        if n_more > 0:
            table.append(f"... and {n_more:,} more queries in {LINES}")
        return "\n".join(table)


HEADINGS = {"proponents": "  highest", "opponents": "  lowest"}
"""Of both signs; where all influence is positive, the lowest are no opponents."""


def shown_fields(example: dict[str, Any]) -> dict[str, Any]:
    """Return an example as a page shows it: without the parts that its text is made of."""
    return {name: value for name, value in example.items() if name not in SOURCES}


def table_row(pair: dict[str, Any]) -> str:
    """Return a pair's numbers and its training example as a row of the table."""
    sizes = np.abs(pair["trajectory"])
    step = 1 + int(sizes.argmax())
    numbers = f"{pair['score']:>+12.2e}  {pair['error']:>7.0e}  {step:>4}"
    text = pair["example"]["text"]
    return f"{numbers}  #{pair['index']}: {text}"


def printable(text: str) -> str:
    """Return a text with blanks for line breaks and control characters."""
    return "".join(char if char.isprintable() else " " for char in text)
