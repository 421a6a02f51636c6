"""Scores on disk and on the screen: for jq, for numpy, for `StepInfluence.load`, and for people."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from captum_sdi.cli.rows import JsonLines
from captum_sdi.scores.result import StepInfluence

LINES, ARRAYS, TENSORS = "scores.jsonl", "scores.npz", "scores.safetensors"
_QUERIES, _EXAMPLES = 10, 3  # as many as a screen holds


@dataclass(frozen=True)
class Results:
    """Scores, and the same with what is known about the examples."""

    scores: StepInfluence
    """With ``indices``."""
    lines: list[dict[str, Any]]
    """Those of ``scores.jsonl``, one per query."""

    @staticmethod
    def of(scores: StepInfluence, queries: JsonLines, train: JsonLines, proponents: bool) -> Results:
        """Looks the examples up.

        Args:
            scores: With ``indices``.
            queries: The test examples.
            train: The training examples.
            proponents: Whether the highest scores come first.

        Returns:
            The results.
        """
        role = "proponents" if proponents else "opponents"
        lines = [
            {
                "query": q,
                "line": queries.line(q),
                "example": queries.about(q),
                "n_steps": int(scores.n_steps[q]),
                role: _pairs(scores, q, train),
            }
            for q in range(len(queries))
        ]
        return Results(scores, lines)

    @staticmethod
    def read(folder: Path) -> Results:
        """Reads what `write` wrote.

        Args:
            folder: Where.

        Returns:
            The results.

        Raises:
            ValueError: There are none, or those of two runs.
        """
        for name in (LINES, TENSORS):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no results of captum-sdi score: there is no {name} in it.")
        with (folder / LINES).open(encoding="utf-8") as file:  # a text may hold what str.splitlines would split at
            lines = [json.loads(line) for line in file]
        results = Results(StepInfluence.load(folder / TENSORS), lines)
        indices = [[pair["index"] for pair in results.pairs(q)] for q in range(len(results.lines))]
        if results.scores.indices is None or results.scores.indices.tolist() != indices:
            raise ValueError(f"{LINES} and {TENSORS} in {folder} are of different runs: run captum-sdi score again.")
        return results

    def write(self, folder: Path) -> None:
        """Writes the three files.

        Args:
            folder: Where; made where there is none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        fields = {field.name: getattr(self.scores, field.name) for field in dataclasses.fields(self.scores)}
        np.savez(folder / ARRAYS, **{name: value.cpu().numpy() for name, value in fields.items()})
        self.scores.save(folder / TENSORS)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
        (folder / LINES).write_text(text, encoding="utf-8")

    def pairs(self, q: int) -> list[dict[str, Any]]:
        """What acted on a query, best first.

        Args:
            q: The query's position.

        Returns:
            One entry per training example.
        """
        line = self.lines[q]
        return line["proponents" if "proponents" in line else "opponents"]

    @property
    def query_texts(self) -> list[str]:
        """What each query says."""
        return [line["example"]["text"] for line in self.lines]

    @property
    def train_texts(self) -> list[str]:
        """What each training example says, as far as it occurs in the scores."""
        said = {pair["index"]: pair["example"]["text"] for q in range(len(self.lines)) for pair in self.pairs(q)}
        return [said.get(i, "") for i in range(1 + max(said))]

    def __str__(self) -> str:
        width = min(120, shutil.get_terminal_size().columns)
        lines = []
        for q in range(min(_QUERIES, len(self.lines))):
            lines += [_clipped(f"query {q}: {self.query_texts[q]}", width), "       score  ± error  step  example"]
            for pair in self.pairs(q)[:_EXAMPLES]:
                step = 1 + int(np.abs(pair["trajectory"]).argmax())
                numbers = f"{pair['score']:>+12.2e}  {pair['error']:>7.0e}  {step:>4}  "
                lines.append(_clipped(f"{numbers}#{pair['index']}: {pair['example']['text']}", width))
        if (more := len(self.lines) - _QUERIES) > 0:
            lines.append(f"... and {more:,} more queries in {LINES}")
        return "\n".join(lines)


def _pairs(scores: StepInfluence, q: int, train: JsonLines) -> list[dict[str, Any]]:
    assert scores.indices is not None
    steps = int(scores.n_steps[q])
    return [
        {
            "index": index,
            "line": train.line(index),
            "score": _number(scores.influence_scores[q, place]),
            "error": _number(scores.score_errors[q, place]),
            "trajectory": _numbers(scores.trajectories[q, place, :steps]),
            "trajectory_errors": _numbers(scores.trajectory_errors[q, place, :steps]),
            "prelude": _number(scores.prelude[q, place]),
            "coda": _number(scores.coda[q, place]),
            "example": train.about(index),
        }
        for place, index in enumerate(scores.indices[q].tolist())
    ]


def _number(value: Tensor) -> float:
    return float(f"{value.item():.7g}")  # float32 says no more


def _numbers(values: Tensor) -> list[float]:
    return [_number(value) for value in values]


def _clipped(text: str, width: int) -> str:
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= width else line[: width - 1] + "…"
