"""The README's quickstart runs as it stands, on what a user of `Trainer` has on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import looped_gpt
from transformers import Trainer, TrainingArguments

from captum_sdi import SketchIndex, StepInfluence
from captum_sdi.tasks import parity

README = Path(__file__).parents[1] / "README.md"
RUNNABLE = ("Quickstart: your own model", "Trained with AdamW?", "Index once, ask often")
"""Sections whose example needs nothing but what a Trainer leaves; others begin with a download."""


@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sections = README.read_text(encoding="utf-8").split("\n## ")
    chosen = [section for section in sections if section.startswith(RUNNABLE)]
    blocks = [block for section in chosen for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)]
    assert len(blocks) == len(RUNNABLE)
    assert len(blocks[0].strip().splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    train, test = parity(40, max_bits=6).split(held_out=3)
    often = {"max_steps": 20, "save_steps": 10, "logging_steps": 5}
    arguments = TrainingArguments("my_run", **often, report_to="none", use_cpu=True)
    model = looped_gpt(vocab_size=train.vocab_size)()
    Trainer(model=model, args=arguments, train_dataset=train).train()
    briefly = TrainingArguments("my_other_run", max_steps=4, save_strategy="no", report_to="none", use_cpu=True)
    small = looped_gpt(vocab_size=train.vocab_size, n_prelude=0, n_core=1, n_coda=0)()
    trainer = Trainer(model=small, args=briefly, train_dataset=train)
    torch.manual_seed(0)
    quickstart = "\n".join(blocks).replace("checkpoint-1000", "checkpoint-20")
    exec(compile(quickstart, str(README), "exec"), {"train": train, "test": test, "trainer": trainer})
    printed = capsys.readouterr().out
    assert "LoopSpec(modules=('core',)" in printed
    winners = r"\n +#\d+  [+-]\d\.\d+e[+-]\d+ +\de[+-]\d+ +[0-2]"
    assert re.search(
        rf"of 3 test examples x 5 training examples, 3 loop steps\n.*\ntest 0:({winners}){{5}}\ntest 1:", printed
    )
    assert StepInfluence.load("influence.safetensors").trajectories.shape == (3, 5, 3)
    assert (tmp_path / "trajectories.png").stat().st_size > 10_000
    assert re.search(r"state +complete\nexamples +37\n", printed)
    assert SketchIndex.open("my_index").complete
    assert re.search(
        r"replay error +\S+ +of the way.*metasmoothness.*StepInfluence of 3 test examples x 5 .*\ntest 2:",
        printed,
        re.DOTALL,
    )


def test_the_lines_that_train_are_those_that_the_documentation_runs() -> None:
    section = README.read_text(encoding="utf-8").split("\n## No looped model yet?\n")[1]
    lines = section.split("```python\n")[1].split("```")[0]
    assert lines in (README.parent / "docs" / "start.md").read_text(encoding="utf-8")
    assert len(lines.replace("\n\n", "\n").splitlines()) <= 12
