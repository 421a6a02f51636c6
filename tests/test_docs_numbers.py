"""The numbers in the README and on the page that compares methods are those of the files that benchmarks wrote."""

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
METHODS = {
    "TracIn / SDI, 4 checkpoints": "TracIn / SDI, 4 checkpoints",
    "`preconditioner=Fisher()`": "Fisher, TensorSketch(512)",
    "`preconditioner=Hessian()`": "Hessian, rank 80",
    "`UnrolledInfluence`": "unrolled",
}
"""The rows of a table of methods, and what truth.json calls them."""
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


@pytest.mark.parametrize("page", [ROOT / "README.md", COMPARISON], ids=lambda page: page.stem)
def test_what_predicts_retraining_is_what_was_measured(page: Path) -> None:
    bed = json.loads((BENCHMARKS / "truth.json").read_text())["parity"]
    rows = rows_of(page)
    for name, method in METHODS.items():
        left_out = bed["agreement"]["leave one out"]["methods"][method]
        expected = [with_interval(left_out[kind]) for kind in BY_STEP]
        expected.append(with_interval(bed["agreement"]["5% removed"]["methods"][method]["total"]))
        assert rows[name] == [*expected, f"{bed['seconds'][method]:.1f}"], name


def test_the_character_text_of_the_readme_is_what_was_measured() -> None:
    bed = json.loads((BENCHMARKS / "truth.json").read_text())["text"]["agreement"]["leave one out"]["methods"]
    numbers = [f"{bed[method]['total']['value']:.2f}" for method in METHODS.values()]
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the first column reads {', '.join(numbers[:3])} and {numbers[3]}, with wide intervals" in words


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
