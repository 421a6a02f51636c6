"""The benchmarks say what they measured, and what they measure is right."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

pytest.importorskip("psutil", reason="needs the extra 'bench': pip install 'captum-sdi[bench]'")
pytest.importorskip("sdi", reason="needs the extra 'bench': pip install 'captum-sdi[bench]'")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_readme_shows_the_recorded_results(script) -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    sections = script("run").SECTIONS
    assert results.keys() <= sections.keys()
    assert script("tables").tables(results, sections) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def test_the_picture_can_be_drawn_again(script, tmp_path: Path) -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    assert results.keys() >= script("run").PICTURED
    script("draw").draw(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_libraries_agree_where_they_are_compared(script) -> None:
    speed, subjects = script("speed"), script("subjects")
    speed._check_exact(subjects.looped_gpt(**speed.NARROW, bias=True), witness=True)
    speed._check_exact(subjects.looped_gpt2(**speed.NARROW), witness=False)


def test_the_truth_of_the_errors_is_the_exact_score(script) -> None:
    accuracy, peers = script("accuracy"), script("peers")
    work = accuracy.trained_workload(n_tests=2, n_trains=3, width=16, training_steps=2)
    exact = peers.ours_exact(work)().trajectories
    truth = accuracy.ExactScores(work).scores
    torch.testing.assert_close(truth, exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


def test_a_layer_at_a_time_is_exact(script) -> None:
    paper_table, peers, subjects = script("paper_table"), script("peers"), script("subjects")
    work = subjects.looped_gpt(**paper_table.SMALL | {"width": 16, "seq": 6})
    exact = peers.ours_exact(work)().trajectories
    torch.testing.assert_close(paper_table._exact(work).float(), exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


def test_the_largest_batch_is_one_that_need_not_be_halved(script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours goes on in halves where the memory does not suffice: that must not count as fitting."""
    paper_table, peers, subjects = script("paper_table"), script("peers"), script("subjects")
    monkeypatch.setattr(paper_table, "MOST", 16)
    work = subjects.looped_gpt(**paper_table.SMALL | {"width": 16, "seq": 6})

    def crowded(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        if len((*args, *kwargs.values())[0]) > 5:
            raise torch.OutOfMemoryError

    work.model.register_forward_pre_hook(crowded, with_kwargs=True)
    assert paper_table._largest(work, lambda work: peers.ours(work, 16)) == 5
