"""The demo end to end on a handful of strings, and what its command line says when it cannot run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from captum_sdi import StepInfluence, demo
from captum_sdi.__main__ import main


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_demo_leaves_a_report_with_scores_and_pictures(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "HOPS", 3)
    monkeypatch.setattr(demo, "N_CHECKPOINTS", 2)
    out = tmp_path / "a folder" / "that does not exist"
    assert main(["demo", "--out", str(out), "--steps", "30", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "conservation" in printed
    report = (out / "report.md").read_text(encoding="utf-8")
    title, _, headline, *_ = report.splitlines()
    assert title == "# Which document supplied which hop?"
    assert headline in printed
    stated = re.fullmatch(
        r"Trained on 52 single facts, the model answers (\d+)% of 52 chains of 3 that it never saw\. .* in (\d+)% of "
        r"the questions \(by chance 2%; another question's chain (\d+)%; untrained (\d+)%\)\.",
        headline,
    )
    assert stated is not None
    right, on_path, of_strangers, untrained = map(int, stated.groups())
    assert right >= 90  # all of them with most versions of torch
    assert on_path > 25 > 10 > max(of_strangers, untrained)
    assert len(re.findall(r"^\| checkpoint-\d+ \| \d\.\d+ \| \d+% \| \d+% \| \d+% \| [\d.]+% \|$", report, re.M)) == 2
    chain = re.findall(r"^\| (Ana's .*) \| (\d) \| (.*) \| (yes|no) \|$", report, re.M)
    assert [step for _, step, _, _ in chain] == ["1", "2", "3"]
    pictures = re.findall(r"!\[.*\]\((.*)\)", report)
    assert pictures == ["path.png", "trajectories.png", "step_share.png"]
    assert all((out / name).stat().st_size > 5_000 for name in pictures)
    assert "[page.html](page.html)" in report
    assert (out / "page.html").stat().st_size > 30_000
    result = StepInfluence.load(out / "scores.safetensors")
    assert result.trajectories.shape == (52, 52, 3)
    assert "captum-sdi demo --seed 4" in report


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
