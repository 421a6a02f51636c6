"""The demo end to end on a handful of strings, and what its command line says when it cannot run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from captum_sdi import StepInfluence, demo
from captum_sdi.__main__ import main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "N_TRAIN", 12)
    monkeypatch.setattr(demo, "N_HELD_OUT", 6)
    monkeypatch.setattr(demo, "N_TESTS", 2)


def test_the_demo_leaves_a_report_with_scores_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder" / "that does not exist"
    assert main(["demo", "--out", str(out), "--steps", "10", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "conservation" in printed
    report = (out / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([01]+=[01]) \| (proponent|opponent) \| ([01]+=[01]) \|", report, re.MULTILINE)
    assert len(rows) == 2 * 4
    assert {row[0] for row in rows}.isdisjoint(row[2] for row in rows)
    pictures = re.findall(r"!\[.*\]\((.*)\)", report)
    assert len(pictures) == 6
    assert all((out / name).stat().st_size > 5_000 for name in pictures)
    assert "[page.html](page.html)" in report
    assert (out / "page.html").stat().st_size > 30_000
    result = StepInfluence.load(out / "scores.safetensors")
    assert result.trajectories.shape == (2, 12, 8)
    assert torch.allclose(result.trajectories.sum(-1), result.influence_scores, rtol=1e-4, atol=1e-6)
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) >= 4


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path), "--steps", "3"]) == 1
    assert capsys.readouterr().err == "captum-sdi: error: --steps must be at least 10, got 3.\n"
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"captum-sdi: error: .*File exists.*\n", capsys.readouterr().err)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    assert "--steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main([])
