"""From files to a page on the command line: both signs, whole texts, a spreadsheet, and what opens a browser."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import webbrowser
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from captum_sdi import StepInfluence
from captum_sdi.__main__ import main

WORDS = [*"abcdefghi", "[PAD]", "[UNK]"]
TRAIN = [" ".join(WORDS[(i * j + j) % 9] for j in range(2 + i % 7)) for i in range(9)]
LONG = "b a\tb\n<script>" + " and so on" * 40  # far longer than the model reads
INDEX = "index --model model --train train.jsonl --index idx --dim 64 --max-length 8 --quiet"
SCORE = "score --index idx --query queries.jsonl -k 3 --out out --quiet --pictures 0"


def run(line: str) -> int:
    return main(line.split())


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def unpacked(page: Path, name: str) -> Any:
    chunk = re.search(f'id="chunk-{name}">([^<]*)<', page.read_text(encoding="utf-8"))
    assert chunk is not None
    if chunk[1].startswith("["):  # the first chunks, which are drawn while the rest is read
        return json.loads(chunk[1])
    return json.loads(zlib.decompress(base64.b64decode(chunk[1])))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, two files and an index."""
    folder = tmp_path_factory.mktemp("page")
    spread(CASES[1].make().float(), seed=1).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", [{"text": text, "id": f"t{i}"} for i, text in enumerate([*TRAIN, LONG])])
    write_rows(folder / "queries.jsonl", [{"text": "a b c d"}, {"text": LONG}])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(INDEX) == 0
    return folder


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the shell stands."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_signs_in_one_call(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(f"{SCORE} --out high") == 0
    assert run(f"{SCORE} --out low --opponents") == 0
    capsys.readouterr()
    assert run(f"{SCORE} --out both --both".replace(" --quiet", "")) == 0
    printed = capsys.readouterr().out
    assert printed.count("  highest\n") == printed.count("  lowest\n") == 2
    high, low, both = (read_lines(f"{name}/scores.jsonl") for name in ("high", "low", "both"))
    for above, below, line in zip(high, low, both, strict=True):
        assert line["proponents"] == above["proponents"]
        assert line["opponents"] == below["opponents"]
    scores = StepInfluence.load("both/scores.safetensors")
    assert scores.trajectories.shape[:2] == (2, 6)
    for name in ("high", "low"):
        part = StepInfluence.load(f"{name}/scores.safetensors")
        columns = slice(0, 3) if name == "high" else slice(3, 6)
        np.testing.assert_array_equal(scores.trajectory_errors[:, columns], part.trajectory_errors)
    assert run("plot both --pictures 1 --quiet") == 0
    assert run(f"{SCORE} --out all --both -k 99") == 0
    for line in read_lines("all/scores.jsonl"):
        indices = [pair["index"] for role in ("proponents", "opponents") for pair in line[role]]
        assert sorted(indices) == list(range(10))


def test_nothing_of_a_text_is_lost(here: Path) -> None:
    assert run(f"{SCORE} --both -k 99 --html") == 0
    lines = read_lines("out/scores.jsonl")
    assert lines[1]["example"]["text"] == LONG
    texts = {pair["index"]: pair["example"]["text"] for role in ("proponents", "opponents") for pair in lines[0][role]}
    assert texts == dict(enumerate([*TRAIN, LONG]))
    with Path("out/scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {int(row["index"]): row["text"] for row in rows} == texts
    assert [json.loads(row["fields"])["id"] for row in rows] == [f"t{row['index']}" for row in rows]
    page = Path("out/page.html")
    assert sorted(text for text, _ in unpacked(page, "texts-0")) == sorted([*TRAIN, LONG])
    assert unpacked(page, "tests")[1]["entry"] == [LONG]


def test_a_spreadsheet_has_the_numbers_of_the_lines(here: Path) -> None:
    assert run(f"{SCORE} --both") == 0
    with Path("out/scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pairs = [
        (line["query"], role, rank, pair)
        for line in read_lines("out/scores.jsonl")
        for role in ("proponents", "opponents")
        for rank, pair in enumerate(line[role], start=1)
    ]
    for row, (query, role, rank, pair) in zip(rows, pairs, strict=True):
        assert (int(row["query"]), f"{row['role']}s", int(row["rank"])) == (query, role, rank)
        assert float(row["score"]) == pair["score"]
        assert [float(row[f"step_{step}"]) for step in (1, 2, 3)] == pair["trajectory"]
        assert [float(row[f"step_{step}_error"]) for step in (1, 2, 3)] == pair["trajectory_errors"]


def test_view_writes_the_page_once_and_opens_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert run(f"{SCORE} --both") == 0
    assert "page.html" not in os.listdir("out")
    assert run("view out") == 0
    assert capsys.readouterr().out == "out/page.html\n"
    assert opened == [(here / "out" / "page.html").as_uri()]
    written = Path("out/page.html").stat().st_mtime_ns
    assert run("view out --no-open") == 0
    assert (len(opened), Path("out/page.html").stat().st_mtime_ns) == (1, written)
    assert run(f"{SCORE} --overwrite") == 0  # the page of the scores before
    assert "page.html" not in os.listdir("out")
    Path("out/page.html").write_text("of somebody else")
    assert run("view out") == 1
    assert "page.html is in the way" in capsys.readouterr().err
    assert run("view model") == 1
    assert "model holds no results of captum-sdi score" in capsys.readouterr().err


def test_the_width_of_a_line_can_be_said(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(SCORE.replace(" --quiet", " --columns 400")) == 0
    table = capsys.readouterr().out
    assert LONG[:300].replace("\n", " ").replace("\t", " ") in table
    assert max(map(len, table.splitlines())) <= 400


def test_a_page_that_is_there_opens_without_torch(here: Path) -> None:
    assert run(f"{SCORE} --html") == 0
    program = """
import sys
from captum_sdi.__main__ import main
print(main(sys.argv[1:]), "torch" in sys.modules)
"""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program, "view", "out", "--no-open"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("out/page.html\n0 False\n", "")
