"""``scores.jsonl``: a line for each query, with its training examples, their numbers and their texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_sdi.cli.tables import AnyExamples
from captum_sdi.schema import COUNT, OBJECT, Kind, check_fields, list_of, parse_json
from captum_sdi.scores.result import StepInfluence

ROLES = ("proponents", "opponents")
"""The keys of a line under which training examples stand; it has one of them, or both."""

ANY_TEXT = Kind("a string", lambda value: isinstance(value, str))
REAL = Kind("a number", lambda value: type(value) in (int, float) and not abs(value) > 1e300)


def pairs_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the training examples of a line, proponents first."""
    pairs: list[dict[str, Any]] = []
    for role in ROLES:
        pairs += line.get(role, [])
    return pairs


def describe_pairs(
    scores: StepInfluence,
    q: int,
    places: range,
    train: AnyExamples,
) -> list[dict[str, Any]]:
    """Return the numbers and the description of the training examples at some places of a query's scores."""
    assert scores.indices is not None  # the scores are the k strongest
    n_steps = int(scores.n_steps[q])
    pairs = []
    for place in places:
        index = int(scores.indices[q, place])
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


PAIR_FIELDS = {"index": COUNT, "score": REAL, "error": REAL, "trajectory": list_of(REAL), "example": OBJECT}
"""What is read of a pair; the rest is for other programs."""


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
    for role in [role for role in ROLES if role in fields] or ROLES[-1:]:
        check_fields(fields, {role: list_of(OBJECT)})
        for pair in fields[role]:
            check_fields(pair, PAIR_FIELDS, within=f"{role} ")
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
