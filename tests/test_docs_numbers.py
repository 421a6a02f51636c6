"""The numbers in the README and in the documentation are those of the files that benchmarks wrote."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the source distribution has no benchmarks", allow_module_level=True)
BENCHMARKS = ROOT / "benchmarks"
COMPARISON = ROOT / "docs" / "comparison.md"
BELIEVE = ROOT / "docs" / "howto" / "believe.md"
METHODS = {
    "TracIn / SDI, 4 checkpoints": "TracIn / SDI, 4 checkpoints",
    "`preconditioner=Fisher()`": "Fisher, TensorSketch(512)",
    "`preconditioner=Hessian()`": "Hessian, rank 80",
    "`UnrolledInfluence`": "unrolled",
}
"""The rows of a table of methods, and what truth.json calls them."""
IN_README = {
    "SDI, as in the three lines": "TracIn / SDI, 4 checkpoints",
    "with `preconditioner=Hessian()`": "Hessian, rank 80",
    "`UnrolledInfluence`, from a recorded run": "unrolled",
}
"""The rows of the README's table."""
ON_TEXT = (
    "TracIn / SDI, 4 checkpoints",
    "kronfluence EK-FAC",
    "Fisher, TensorSketch(512)",
    "Hessian, rank 80",
    "unrolled",
)
BY_STEP = ("total", "mean over steps", "deviation from the step mean")


def rows_of(page: Path) -> dict[str, list[str]]:
    """The cells of every row of the tables on a page, by the first of them."""
    rows = {}
    for line in re.findall(r"^\|(.*)\|$", page.read_text(encoding="utf-8"), re.MULTILINE):
        first, *cells = [cell.strip() for cell in line.split(" | ")]
        rows[first] = cells
    return rows


def with_interval(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    return f"{measured['value']:.2f} [{low:.2f}, {high:.2f}]"


def test_what_predicts_retraining_is_what_was_measured() -> None:
    bed = json.loads((BENCHMARKS / "truth.json").read_text())["parity"]
    rows = rows_of(COMPARISON)
    for name, method in METHODS.items():
        left_out = bed["agreement"]["leave one out"]["methods"][method]
        expected = [with_interval(left_out[kind]) for kind in BY_STEP]
        expected.append(with_interval(bed["agreement"]["5% removed"]["methods"][method]["total"]))
        assert rows[name] == [*expected, f"{bed['seconds'][method]:.1f}"], name


def test_the_readme_says_how_far_to_trust_scores_as_it_was_measured() -> None:
    beds = json.loads((BENCHMARKS / "truth.json").read_text())
    rows = rows_of(ROOT / "README.md")
    for name, method in IN_README.items():
        expected = []
        for bed in ("parity", "text"):
            measured = beds[bed]["agreement"]["leave one out"]["methods"][method]
            expected += [with_interval(measured[kind]) for kind in ("total", "mean over steps")]
        assert rows[name] == expected, name


def test_how_far_to_believe_it_is_what_was_measured() -> None:
    beds = json.loads((BENCHMARKS / "truth.json").read_text())
    order = ("unrolled", "Hessian, rank 80", "Fisher, TensorSketch(512)", "TracIn / SDI, 4 checkpoints")
    values = {}
    for bed in ("parity", "text"):
        methods = beds[bed]["agreement"]["leave one out"]["methods"]
        values[bed] = [f"{methods[method]['total']['value']:.2f}".removeprefix("0") for method in order]
    _, _, *rows = rows_of(BELIEVE).values()  # the table's head and its rule come first
    assert [cells[-1] for cells in rows] == [
        f"{parity} / {text}" for parity, text in zip(*values.values(), strict=True)
    ]


def test_character_text_is_what_was_measured() -> None:
    bed = json.loads((BENCHMARKS / "truth.json").read_text())["text"]["agreement"]
    read = []
    for removal in ("leave one out", "5% removed"):
        methods = bed[removal]["methods"]
        first, *others, last = [f"{methods[method]['total']['value']:.2f}" for method in ON_TEXT]
        read.append(f"{', '.join([first, *others])} and {last}")
    words = " ".join(COMPARISON.read_text(encoding="utf-8").split())
    assert f"the first column reads {read[0]}, the one of 5% {read[1]}" in words


def test_speed_memory_and_accuracy_are_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    tables = importlib.import_module("tables")
    results = json.loads((BENCHMARKS / "results.json").read_text())
    measured = {}
    for goals in (tables._time_goals, tables._deep_goals, tables._error_goals, tables._memory_goals):
        measured |= {what: value for what, _, _, (value, _) in goals(results)}
    rows = rows_of(COMPARISON)
    pairs = {
        "time of a `step_influence` call, τ = 6 / the reference package's": "time of a `step_influence` call / the r",
        "... / two plain training steps on the same batches": "... / two training steps",
        "... / frozen weights and no sketch, the least a pass can cost": "... / the limit",
        "time at τ = 16 with `activation_checkpointing=True` / the reference package's": "time at τ = 16",
        "peak memory there / the reference package's": "peak memory at τ = 16",
    }
    for row, beginning in pairs.items():
        (value,) = [value for what, value in measured.items() if what.startswith(beginning)]
        assert rows[row] == [f"{value:.2f}"], row
    own = [value for what, value in measured.items() if "examples against themselves" in what]
    (errors,) = [cells for row, cells in rows.items() if row.startswith("error, examples against themselves")]
    assert errors == [", ".join(f"{value:.2f}" for value in own)]


def test_the_sizes_of_a_sketch_are_what_was_measured() -> None:
    accuracy = json.loads((BENCHMARKS / "results.json").read_text())["accuracy"]
    rows = rows_of(COMPARISON)
    for dim, measured in zip(accuracy["dims"], accuracy["ours"], strict=True):
        names = {"different SDI": 2, "different TracIn": 2, "spearman": 3, "top-10": 2}
        expected = [f"{measured[name][0]:.{digits}f}" for name, digits in names.items()]
        assert rows[f"{dim}, the default" if dim == 2048 else str(dim)] == expected
