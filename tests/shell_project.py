"""A small project for the shell: a model, two files of rows, an index and results on demand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cases import CASES

from captum_sdi.__main__ import main
from captum_sdi.cli import commands

ROWS = [{"input_ids": [1 + i % 5, 2, 3 + i % 3], "id": i} for i in range(6)]
INDEX = "index --model model --train train.jsonl --index idx --dim 16 --quiet"
SCORE = "score --index idx --query queries.jsonl -k 2 --out out --quiet --pictures 0"


def make_project(folder: Path, *lines: str) -> None:
    """Makes it, with the shell standing there meanwhile, and runs further lines of the shell."""
    CASES[1].make().float().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "queries.jsonl", ROWS[:2])
    before = os.getcwd()
    os.chdir(folder)
    try:
        for line in (INDEX, *lines):
            assert run(line) == 0
    finally:
        os.chdir(before)


def write_rows(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def run(line: str) -> int:
    """The exit code of a line of the shell."""
    return main(line.split())


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def remember_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``captum-sdi score`` compute once for each ``-k``: what is tried is how it writes."""
    answers: dict[int, Any] = {}
    score_queries = commands.score_queries

    def remembered(sdi: Any, queries: Any, n_train: int, options: Any) -> Any:
        if options.k not in answers:
            answers[options.k] = score_queries(sdi, queries, n_train, options)
        return answers[options.k]

    monkeypatch.setattr(commands, "score_queries", remembered)
