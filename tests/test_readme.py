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


@pytest.mark.filterwarnings("ignore:Cannot copy out:UserWarning")
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
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
    assert len(re.findall(r"training example \d+: [+-]\d+\.\d+ ± \d+\.\d+, strongest at step [1-3]", printed)) == 5
    assert StepInfluence.load("influence.safetensors").trajectories.shape == (3, 5, 3)
    assert (tmp_path / "trajectories.png").stat().st_size > 10_000
    assert re.search(r"state +complete\nexamples +37\n", printed)
    assert SketchIndex.open("my_index").complete
    assert re.search(
        r"replay error +\S+ +of the way.*metasmoothness.*StepInfluence\(indices=\(3, 5\)", printed, re.DOTALL
    )
