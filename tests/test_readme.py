"""The README's code runs as it stands, one block after the other, and so do the pages that go on from there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from captum_sdi import SketchIndex, StepInfluence
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GO_ON = ("believe", "scale")
"""How-tos whose first block begins with what a run of Trainer left."""


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```py(?:thon)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, names: dict[str, object]) -> None:
    exec(compile(code, str(README), "exec"), names)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The folder in which the README's lines trained a model, and the names that they left."""
    folder = tmp_path_factory.mktemp("readme")
    _, lines_that_train, _ = blocks_of(README)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(lines_that_train, names)
    return folder, names


@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_the_quickstart_runs(
    trained: tuple[Path, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder, names = trained
    monkeypatch.chdir(folder)
    three_lines, _, quickstart = blocks_of(README)
    run(quickstart, names)
    printed = capsys.readouterr().out
    assert "LoopSpec(modules=('core',)" in printed
    winners = r"\n +#\d+  [+-]\d\.\d+e[+-]\d+ +\de[+-]\d+ +[0-3]"
    assert re.search(
        rf"of 4 test examples x 5 training examples, 4 loop steps\n.*\ntest 0:({winners}){{5}}\ntest 1:", printed
    )
    assert StepInfluence.load("influence.safetensors").trajectories.shape == (4, 5, 4)
    assert (folder / "trajectories.png").stat().st_size > 10_000
    run(three_lines, names)
    assert re.search(r"checkpoint-20: \d+% of the absolute scores.*\ncheckpoint-40: \d+%", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_what_goes_on_from_the_readme_runs(
    trained: tuple[Path, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder, names = trained
    monkeypatch.chdir(folder)
    arguments = TrainingArguments("my_other_run", max_steps=4, save_strategy="no", report_to="none", use_cpu=True)
    sizes = {"vocab_size": names["train"].vocab_size, "n_embd": 16, "n_head": 2, "n_loops": 3, "n_positions": 16}
    small = LoopedGPTForCausalLM(LoopedGPTConfig(**sizes, n_prelude=0, n_core=1, n_coda=0))
    trainer = Trainer(model=small, args=arguments, train_dataset=names["train"])
    for page in GO_ON:
        first, *_ = blocks_of(ROOT / "docs" / "howto" / f"{page}.md")
        run(first, {**names, "trainer": trainer})
    printed = capsys.readouterr().out
    assert re.search(r"state +complete\nexamples +76\n", printed)
    assert SketchIndex.open("my_index").complete
    assert re.search(
        r"replay error +\S+ +of the way.*metasmoothness.*StepInfluence of 4 test examples x 5 .*\ntest 2:",
        printed,
        re.DOTALL,
    )


def test_the_readme_is_a_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    three_lines, lines_that_train, quickstart = blocks_of(README)
    assert len(three_lines.strip().splitlines()) <= 3
    assert len(lines_that_train.replace("\n\n", "\n").splitlines()) <= 12
    assert len(quickstart.strip().splitlines()) <= 24
    assert lines_that_train in (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
