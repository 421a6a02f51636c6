"""``scores.csv``: a row for each query and training example, for spreadsheets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captum_sdi.cli.result_lines import ROLES

COLUMNS = ("query", "role", "rank", "index", "line", "score", "error", "prelude", "coda")


def write_spreadsheet(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the pairs of all lines; texts are whole, and half of a surrogate pair is an escape sequence."""
    n_steps = max(line["n_steps"] for line in lines)
    steps = [f"step_{number}" for number in range(1, n_steps + 1)]
    errors = [f"{step}_error" for step in steps]
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text:
        columns = [*COLUMNS, *steps, *errors, "query_text", "text", "fields"]
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        for line in lines:
            writer.writerows(rows_of(line))


def rows_of(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each training example of a query; steps count from 1."""
    for role in ROLES:
        for rank, pair in enumerate(line.get(role, []), start=1):
            other_fields = {name: value for name, value in pair["example"].items() if name != "text"}
            yield {
                "query": line["query"],
                "role": role.removesuffix("s"),
                "rank": rank,
                **{name: pair[name] for name in ("index", "line", "score", "error", "prelude", "coda")},
                **{f"step_{step}": number for step, number in enumerate(pair["trajectory"], start=1)},
                **{f"step_{step}_error": number for step, number in enumerate(pair["trajectory_errors"], start=1)},
                "query_text": line["example"]["text"],
                "text": pair["example"]["text"],
                "fields": json.dumps(other_fields, ensure_ascii=False) if other_fields else "",
            }
