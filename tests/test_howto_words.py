"""The blocks of docs/howto/which_word.md run one after the other, with a model that is hardly trained."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "which_word.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the source distribution has no docs")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    text = PAGE.read_text(encoding="utf-8").replace("n_steps = 160", "n_steps = 6")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    plt.close("all")
    printed = capsys.readouterr().out
    assert len(re.findall(r"  [+-]\d\.\d{4} ± \d\.\d{4}  \w+ has a \w+ \w+", printed)) == 12
    assert printed.count("InfluenceMap of 1 test example x 3 train examples") == 4
    for picture in ("words", "words_by_step", "layers_by_step", "sources_by_step"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000
