"""Which checkpoint speaks: shares, losses and norms against the slow truth, kept in files, and the warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from safetensors.torch import load_file, save_file
from test_influence import ETAS, TEST, TRAIN, checkpoints_of, load
from torch import Tensor

from captum_sdi import Exact, SDIInfluence, StepInfluence, TensorSketch, plotting
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.checkpoints.training_losses import training_losses
from captum_sdi.scores.checkpoint_shares import CheckpointShares

CASE = CASES[0]


def influence(checkpoints: Any = None, **kwargs: Any) -> SDIInfluence:
    checkpoints = checkpoints_of(CASE) if checkpoints is None else checkpoints
    return SDIInfluence(CASE.model(), TRAIN, checkpoints, load, None, batch_size=2, **{"sketch": Exact(), **kwargs})


@pytest.fixture(scope="module")
def parts() -> tuple[Tensor, Tensor]:
    """Totals ``(c, q, n)`` times their rates, and norms ``(q, c, 2 + t)``, from gradients of untied copies."""
    totals, norms = [], []
    model = CASE.model()
    for checkpoint in checkpoints_of(CASE):
        eta = load(model, checkpoint)
        train = torch.stack([CASE.gradients(model, row, None).sum(0) for row in TRAIN])
        tests = torch.stack([CASE.gradients(model, row, None) for row in TEST])
        totals.append(eta * tests.sum(1) @ train.T)
        norms.append(tests.norm(dim=-1))
    return torch.stack(totals), torch.stack(norms, dim=1)


@pytest.fixture(scope="module")
def whole() -> StepInfluence:
    return influence().step_influence(TEST)


def test_shares_and_norms_are_the_definitions(whole: StepInfluence, parts: tuple[Tensor, Tensor]) -> None:
    totals, norms = parts
    sizes = totals.abs().sum((1, 2))
    assert whole.checkpoints.names == ("#0", "#1")
    torch.testing.assert_close(whole.checkpoints.shares, sizes / sizes.sum())
    torch.testing.assert_close(whole.checkpoints.test_norms, norms)
    assert whole.checkpoints.losses.isnan().all()


@pytest.mark.parametrize("k", [1, 3])
def test_of_a_top_k_the_winners_alone_count(k: int, parts: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    totals, norms = parts
    sketch = TensorSketch(dim=4096)
    for sdi in (influence(), influence(sketch=sketch), influence(sketch=sketch, index=tmp_path / "index")):
        best = sdi.step_influence(TEST, k=k)
        chosen = totals.gather(2, best.indices.expand(len(ETAS), -1, -1)).abs().sum((1, 2))
        tolerance = 1e-8 if sdi.sketch == Exact() else 0.1
        torch.testing.assert_close(best.checkpoints.shares, chosen / chosen.sum(), rtol=0, atol=tolerance)
        torch.testing.assert_close(best.checkpoints.test_norms.double(), norms, rtol=tolerance, atol=1e-8)


def test_reranked_and_self_influence_have_shares_without_norms(parts: tuple[Tensor, Tensor]) -> None:
    sizes = parts[0].abs().sum((1, 2))
    best = influence(sketch=TensorSketch(dim=64)).step_influence(TEST, k=2, rerank=len(TRAIN))
    torch.testing.assert_close(best.checkpoints.shares, sizes / sizes.sum())
    with pytest.warns(UserWarning, match="of these scores come from #0"):  # its rate is four times the other's
        own = influence().step_self_influence()
    assert float(own.checkpoints.shares.sum()) == pytest.approx(1)
    assert best.checkpoints.test_norms is None


def test_one_checkpoint_among_several_that_says_nearly_all_is_named() -> None:
    names = [(eta, weights) for (_, weights), eta in zip(checkpoints_of(CASE), (1.0, 1e-4), strict=True)]
    with pytest.warns(UserWarning, match=r"^(99|100)% of these scores come from #0, one of 2 checkpoints") as caught:
        influence(names).step_influence(TEST[:1])
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    influence(names[:1]).step_influence(TEST[:1])  # alone, it says all, and no warning


@pytest.mark.parametrize(("share", "is_named"), [(0.81, True), (0.79, False), (0.5, False), (torch.nan, False)])
def test_the_warning_begins_at_80_percent(share: float, is_named: bool, recwarn: pytest.WarningsRecorder) -> None:
    CheckpointShares(("a", "b"), torch.tensor([1 - share, share]), torch.tensor([torch.nan, 0.25])).warn()
    assert ["come from b (training loss 0.25)" in str(each.message) for each in recwarn] == [True] * is_named


def test_the_training_loss_is_the_trainers(tmp_path: Path) -> None:
    histories = {"both": [{"loss": 3.0}, {"loss": 2.0, "step": 8}, {"eval_loss": 9.0}], "none": [], "broken": 5}
    for name, history in histories.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "no json").mkdir()
    (tmp_path / "no json" / "trainer_state.json").write_text("{")
    sources = [*(tmp_path / name for name in (*histories, "no json", "missing")), None, 3, "\0"]
    checkpoints = [Checkpoint(str(number), source) for number, source in enumerate(sources)]
    assert training_losses(checkpoints) == {"0": 2.0}


def test_shares_are_kept_in_files_and_moved(whole: StepInfluence, tmp_path: Path) -> None:
    file = tmp_path / "scores"
    whole.save(file, note="mine")
    loaded = StepInfluence.load(file).checkpoints
    assert loaded.names == whole.checkpoints.names
    for name, tensor in whole.checkpoints.tensors().items():
        torch.testing.assert_close(loaded.tensors()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert whole.to(torch.float32).checkpoints.test_norms.dtype == torch.float32


def test_files_of_the_first_version_have_none(whole: StepInfluence, tmp_path: Path) -> None:
    whole.save(tmp_path / "new")
    tensors = {key: each for key, each in load_file(tmp_path / "new").items() if not key.startswith("checkpoints")}
    save_file(tensors, tmp_path / "old", {"format": "captum_sdi.StepInfluence", "version": "1"})
    old = StepInfluence.load(tmp_path / "old")
    assert old.checkpoints is None
    assert torch.equal(old.trajectories, whole.trajectories)


@pytest.mark.parametrize("names", ['["a"]', '["a", 2]', "{", "3"])
def test_damaged_shares_are_refused(whole: StepInfluence, tmp_path: Path, names: str) -> None:
    whole.save(tmp_path / "new")
    metadata = {"format": "captum_sdi.StepInfluence", "version": "2", "checkpoints": names}
    save_file(load_file(tmp_path / "new"), tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match="bad is damaged: its checkpoints' shares"):
        StepInfluence.load(tmp_path / "bad")


def test_the_grey_line_is_the_share_of_norms(whole: StepInfluence, parts: tuple[Tensor, Tensor]) -> None:
    norms = parts[1]
    by_checkpoint = norms / norms.sum(-1, keepdim=True)
    mean = torch.einsum("c,qcb->b", whole.checkpoints.shares, by_checkpoint) / len(TEST)
    ax = plotting.plot_step_share(whole)
    (line,) = [line for line in ax.get_lines() if line.get_linewidth() == 2.5]
    np.testing.assert_allclose(line.get_ydata(), mean[2:], rtol=1e-6)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["share of the test gradient's norm"]
    plain = plotting.plot_step_share(whole.trajectories)
    assert plain.get_legend() is None


def test_hubs_fill_the_top_lists() -> None:
    totals = torch.tensor([[9.0, 1, 2, 8], [9, 3, 1, 2], [7, 8, 1, 0]])
    steps, zero = totals.unsqueeze(-1), torch.zeros(3, 4)
    result = StepInfluence(None, totals, steps, zero, zero, torch.ones(3, dtype=torch.long), zero, 0 * steps)
    hubs = result.hubs(k=2)
    assert hubs.indices.tolist() == [0, 1, 3]
    assert hubs.counts.tolist() == [3, 2, 1]
    assert str(hubs) == "3 of 4 training examples fill the top 2 of 3 test examples: #0 is in 3 lists, #1 in 2, #3 in 1"
    assert len(result.hubs()) == 4
    with pytest.raises(ValueError, match="k=5 must be an int from 1 to the 4 training examples"):
        result.hubs(k=5)
    with pytest.raises(ValueError, match="k=True must be an int"):
        result.hubs(k=True)


def test_hubs_of_a_top_k_are_those_in_its_lists() -> None:
    best = influence().step_influence(TEST, k=2)
    hubs = best.hubs()
    assert int(hubs.counts.sum()) == best.indices.numel()
    assert set(hubs.indices.tolist()) == set(best.indices.flatten().tolist())
    with pytest.raises(ValueError, match=r"hubs\(\) needs top lists"):
        influence(checkpoints_of(CASE)[:1]).step_self_influence().hubs()
