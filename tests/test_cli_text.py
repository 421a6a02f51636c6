"""Texts on the command line: in tables of every kind, in several files, and typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_page import INDEX, SCORE, TRAIN, here, project, read_lines, run, write_rows

from captum_sdi.models import LoopedGPTForCausalLM

__all__ = ["here", "project"]

ROWS = [{"prompt": "a b ", "completion": text, "id": f"r{i}"} for i, text in enumerate(TRAIN)]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows, "\t" if path.suffix == ".tsv" else ",")


def scores(folder: str) -> list[Any]:
    return [
        [(pair["index"], pair["score"]) for pair in line["proponents"]] for line in read_lines(f"{folder}/scores.jsonl")
    ]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".parquet"])
def test_a_table_is_as_good_as_json_lines(suffix: str, here: Path) -> None:
    write_rows(here / "train.jsonl", ROWS)
    write_table(here / f"table{suffix}", ROWS)
    assert run(INDEX.replace("idx", "lines")) == 0
    assert run(INDEX.replace("idx", "table").replace("train.jsonl", f"table{suffix}")) == 0
    for name in ("lines", "table"):
        assert run(SCORE.replace("--index idx", f"--index {name}").replace("--out out", f"--out out-{name}")) == 0
    assert scores("out-lines") == scores("out-table")
    example = read_lines("out-table/scores.jsonl")[0]["proponents"][0]["example"]
    assert example["text"] == example["prompt"] + example["completion"]


def test_several_files_are_one_set(here: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    write_rows(here / "first.jsonl", rows[:4])
    write_csv(here / "second.csv", rows[4:])
    assert run(INDEX.replace("idx", "joined").replace("train.jsonl", "first.jsonl second.csv")) == 0
    assert run(SCORE) == 0
    assert run(SCORE.replace("--index idx", "--index joined").replace("--out out", "--out out2")) == 0
    assert scores("out") == scores("out2")
    for pair in read_lines("out2/scores.jsonl")[0]["proponents"]:
        file, start = ("first.jsonl", 0) if pair["index"] < 4 else ("second.csv", 4)
        assert (pair["example"]["file"], pair["line"]) == (file, pair["index"] - start + 1)
    write_csv(here / "second.csv", rows[3:])
    assert run(SCORE.replace("--index idx", "--index joined").replace("--out out", "--out out3")) == 1
    assert "one of them has changed since" in capsys.readouterr().err


def test_a_text_in_each_line(here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("train.txt").write_text("a b c\n\nd e f g\nh i\n")
    write_rows(here / "same.jsonl", [{"text": "a b c"}, {"text": "d e f g"}, {"text": "h i"}])
    for name, file in (("plain", "train.txt"), ("lines", "same.jsonl")):
        assert run(INDEX.replace("idx", name).replace("train.jsonl", file)) == 0
        assert run(SCORE.replace("--index idx", f"--index {name}").replace("--out out", f"--out {name}-out")) == 0
    assert scores("plain-out") == scores("lines-out")
    (here / "json.txt").write_bytes((here / "same.jsonl").read_bytes())
    assert run(INDEX.replace("idx", "lines").replace("train.jsonl", "json.txt")) == 0, "the same file by another name"
    Path("plain.jsonl").write_text("no JSON\n")
    capsys.readouterr()
    assert run(INDEX.replace("idx", "new").replace("train.jsonl", "plain.jsonl")) == 1
    assert "let the name of a file of plain texts end in .txt" in capsys.readouterr().err
    Path("train.txt").write_bytes(b"\xff\xfe a")
    assert run(INDEX.replace("idx", "new").replace("train.jsonl", "train.txt")) == 1
    assert "train.txt is no text" in capsys.readouterr().err


def test_what_would_be_ignored_is_refused(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(f"{SCORE} --split train") == 1
    assert "error: --split train: queries.jsonl has no splits, as data sets have." in capsys.readouterr().err
    assert run(f"{SCORE} --completion yes") == 1
    assert "error: --completion is the answer to --prompt; the answers of --query" in capsys.readouterr().err


def test_a_folder_of_datasets_and_its_splits(here: Path, capsys: pytest.CaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    renamed = datasets.Dataset.from_list([{"body": row["text"], "id": row["id"]} for row in rows])
    datasets.DatasetDict({"train": renamed, "test": renamed}).save_to_disk(here / "set")
    capsys.readouterr()  # its progress bars
    line = INDEX.replace("idx", "folder").replace("train.jsonl", "set")
    assert run(line) == 1
    assert "set has the splits train, test: say which one with --split." in capsys.readouterr().err
    assert run(f"{line} --split train") == 1
    assert 'set, row 1: a line needs "text"' in capsys.readouterr().err
    assert run(f"{line} --split train --text-column body") == 0
    assert run(SCORE) == 0
    assert run(SCORE.replace("--index idx", "--index folder").replace("--out out", "--out out2")) == 0
    assert scores("out") == scores("out2")


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", "text,id\na b,1,2\n", r"a\.csv, row 1: it has more or fewer cells than the first line has names"),
        ("a.csv", "text\n", r"a\.csv holds no example: it has no row"),
        ("a.csv", "words\na b\n", r"a\.csv, row 1: a line needs \"text\", a string"),
        ("a.json", '{"text": "a"}', r"a\.json must be a JSON array of examples; of one example per line, name it"),
        ("a.json", '[{"text": "a"}', r"a\.json is no JSON: .* let its name end in \.jsonl"),
        ("a.json", '[{"text": "a", "text": "b"}]', 'the key "text" stands twice'),
        ("a.parquet", "no parquet", r"a\.parquet is no Parquet file"),
    ],
)
def test_a_bad_table_is_named(name: str, content: str, error: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    Path(name).write_text(content)
    with pytest.raises(AssertionError, match=error):
        assert run(INDEX.replace("idx", "new").replace("train.jsonl", name)) == 0, capsys.readouterr().err


def test_a_question_that_is_typed(here: Path, capsys: pytest.CaptureFixture) -> None:
    typed = SCORE.replace("--query queries.jsonl ", "").split()
    assert run_words([*typed, "--prompt", "a b ", "--completion", "c d"]) == 0
    write_rows(here / "queries.jsonl", [{"prompt": "a b ", "completion": "c d"}])
    assert run(SCORE.replace("--out out", "--out out2")) == 0
    assert scores("out") == scores("out2")
    assert run_words([*typed, "--prompt", "a b c", "--generate", "3", "--overwrite"]) == 0
    (line,) = read_lines("out/scores.jsonl")
    assert line["example"]["text"].startswith("a b c")
    assert 1 <= len(line["example"]["completion"].split()) <= 3
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_words(typed)
    assert "one of the arguments --query --prompt is required" in capsys.readouterr().err


def test_the_answer_is_that_of_the_depth_that_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def generate(self: LoopedGPTForCausalLM, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        given.append((settings["n_loops"], settings["use_cache"]))
        return torch.cat([input_ids, input_ids[:, :1]], dim=1)

    monkeypatch.setattr(LoopedGPTForCausalLM, "generate", generate)
    typed = SCORE.replace("--query queries.jsonl ", "").split()
    assert run_words([*typed, "--prompt", "a b c", "--n-loops", "3", "--pictures", "0"]) == 0
    assert given == [(3, False)]


def run_words(words: list[str]) -> int:
    from captum_sdi.__main__ import main

    return main(words)
