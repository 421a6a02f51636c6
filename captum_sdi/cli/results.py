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

from captum_sdi.cli.output import ARRAYS, FILES, LINES, TENSORS
from captum_sdi.cli.rows import JsonLines, clip
from captum_sdi.schema import COUNT, OBJECT, Kind, check_fields, list_of, parse_json
from captum_sdi.scores.result import StepInfluence
from captum_sdi.whole_file import write_whole

QUERIES_SHOWN, EXAMPLES_SHOWN = 10, 3  # as many as a screen holds


class Texts(Sequence[str]):
    """The texts of some examples by index, as long as the largest index asks for; the others are empty."""

    def __init__(self, known: Mapping[int, str]) -> None:
        self._known = known

    def __len__(self) -> int:
        return 1 + max(self._known, default=-1)

    def __getitem__(self, index: Any) -> Any:
        return self._known.get(index, "")


ANY_TEXT = Kind("a string", lambda value: isinstance(value, str))
REAL = Kind("a number", lambda value: type(value) in (int, float) and not abs(value) > 1e300)


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
        queries: JsonLines,
        train: JsonLines,
        *,
        proponents: bool,
    ) -> Results:
        """Look up the examples of scores, which have ``indices`` of proponents or of opponents."""
        role = "proponents" if proponents else "opponents"
        lines = []
        for q in range(len(queries)):
            line = {
                "query": q,
                "line": queries.line(q),
                "example": queries.description(q),
                "n_steps": int(scores.n_steps[q]),
                role: describe_pairs(scores, q, train),
            }
            lines.append(line)
        return Results(scores, lines)

    @staticmethod
    def read(folder: Path) -> Results:
        """Read what `write` wrote, and check that it is of one run."""
        for name in (LINES, TENSORS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no results of captum-sdi score: there is no {name} in it.")
        results = Results(StepInfluence.load(folder / TENSORS), read_lines(folder / LINES))
        indices = results.scores.indices
        if indices is None or indices.tolist() != results.train_indices or not results.agree():
            raise ValueError(f"{LINES} and {TENSORS} in {folder} are of different runs: run captum-sdi score again.")
        return results

    def write(self, folder: Path, files: Sequence[str]) -> None:
        """Write the three files into a folder that is to hold `files`."""
        arrays = {}
        for field in dataclasses.fields(self.scores):
            tensor = getattr(self.scores, field.name)
            if tensor is not None:
                arrays[field.name] = tensor.cpu().numpy()
        with (folder / ARRAYS).open("wb") as file:
            np.savez(file, **arrays)
        json_lines = b"".join(json_line(line) for line in self.lines)
        write_whole(folder / LINES, lambda unfinished: unfinished.write_bytes(json_lines))
        self.write_tensors(folder, files)

    def write_tensors(self, folder: Path, files: Sequence[str]) -> None:
        """Write the scores, and the list of the files that belong to them."""
        self.scores.save(folder / TENSORS, **{FILES: json.dumps(sorted(files))})

    def agree(self) -> bool:
        """Return whether the lines hold the scores of the tensors, which have more digits."""
        totals = [[pair["score"] for pair in pairs] for pairs in self.pairs]
        written = np.array(totals, dtype=np.float64)
        return np.allclose(written, self.scores.influence_scores.double().numpy(), rtol=1e-5, atol=0, equal_nan=True)

    @property
    def pairs(self) -> list[list[dict[str, Any]]]:
        """For each query, its training examples, the strongest first."""
        pairs = []
        for line in self.lines:
            role = "proponents" if "proponents" in line else "opponents"
            pairs.append(line[role])
        return pairs

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
    def train_texts(self) -> Texts:
        """What each training example says; nothing for one that does not occur in the scores."""
        known: dict[int, str] = {}
        for pairs in self.pairs:
            known |= {pair["index"]: printable(pair["example"]["text"]) for pair in pairs}
        return Texts(known)

    def __str__(self) -> str:
        width = min(120, shutil.get_terminal_size().columns)
        table = []
        shown = list(zip(self.query_texts, self.pairs, strict=True))[:QUERIES_SHOWN]
        for q, (query_text, pairs) in enumerate(shown):
            table.append(f"query {q}: {query_text}")
            table.append("       score  ± error  step  example (steps count from 1)")
            for pair in pairs[:EXAMPLES_SHOWN]:
                step = 1 + int(np.abs(pair["trajectory"]).argmax())
                numbers = f"{pair['score']:>+12.2e}  {pair['error']:>7.0e}  {step:>4}"
                table.append(f"{numbers}  #{pair['index']}: {pair['example']['text']}")
        table = [clip(printable(line), width) for line in table]
        n_more = len(self.lines) - QUERIES_SHOWN
        if n_more > 0:
            table.append(f"... and {n_more:,} more queries in {LINES}")
        return "\n".join(table)


def describe_pairs(
    scores: StepInfluence,
    q: int,
    train: JsonLines,
) -> list[dict[str, Any]]:
    """Return the numbers and the description of a query's training examples, strongest first."""
    assert scores.indices is not None  # the scores are the k strongest
    n_steps = int(scores.n_steps[q])
    pairs = []
    for place, index in enumerate(scores.indices[q].tolist()):
        pair = {
            "index": index,
            "line": train.line(index),
            "score": short_number(scores.influence_scores[q, place]),
            "error": short_number(scores.score_errors[q, place]),
            "trajectory": short_numbers(scores.trajectories[q, place, :n_steps]),
            "trajectory_errors": short_numbers(scores.trajectory_errors[q, place, :n_steps]),
            "prelude": short_number(scores.prelude[q, place]),
            "coda": short_number(scores.coda[q, place]),
            "example": train.description(index),
        }
        pairs.append(pair)
    return pairs


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines of ``scores.jsonl``, and check what is read of them."""
    lines = []
    with file.open(encoding="utf-8") as text:  # which may hold what str.splitlines would split at
        try:
            for line in text:
                fields = parse_json(line)
                check_line(fields)
                lines.append(fields)
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged: line {len(lines) + 1}: {error}. Run captum-sdi score again."
            ) from error
    if not lines:
        raise ValueError(f"{file} is damaged: it is empty. Run captum-sdi score again.")
    return lines


def check_line(fields: Any) -> None:
    """Check one query of ``scores.jsonl``."""
    check_fields(fields, {"example": OBJECT, "n_steps": COUNT})
    check_fields(fields["example"], {"text": ANY_TEXT}, within="example ")
    role = "proponents" if "proponents" in fields else "opponents"
    check_fields(fields, {role: list_of(OBJECT)})
    for pair in fields[role]:
        kinds = {"index": COUNT, "score": REAL, "error": REAL, "trajectory": list_of(REAL), "example": OBJECT}
        check_fields(pair, kinds, within=f"{role} ")
        check_fields(pair["example"], {"text": ANY_TEXT}, within=f"{role} example ")


def json_line(line: dict[str, Any]) -> bytes:
    """Return a line of JSON; what no encoding holds, half of a surrogate pair, stays an escape sequence."""
    try:
        return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(line)}\n".encode()


def short_number(value: Tensor) -> float:
    """Return a number with the seven digits that float32 has."""
    return float(f"{value.item():.7g}")


def short_numbers(values: Tensor) -> list[float]:
    """Return numbers with the seven digits that float32 has."""
    return [short_number(value) for value in values]


def printable(text: str) -> str:
    """Return a text with blanks for line breaks and control characters."""
    return "".join(char if char.isprintable() else " " for char in text)
