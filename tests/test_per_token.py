"""`step_influence(per=)`: a row for each target token, and the trajectories of each checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, rows
from reference import one_target_loss, step_gradients
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from captum_sdi import Exact, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.data.collate import Collator
from captum_sdi.maps import per_token

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates differ on purpose

CASE = CASES[0]
TRAIN = [row for row in rows(9, seed=1, longest=6) if (row["labels"][1:] != -100).any()]
TEST = rows(2, seed=2, longest=5)
TARGETS = [(q, p) for q, row in enumerate(TEST) for p in range(1, len(row["labels"])) if row["labels"][p] != -100]
WEIGHTS = [(0.5, dict(CASE.model().state_dict())), (0.125, dict(CASE.make().double().state_dict()))]


def load(model: nn.Module, checkpoint: tuple[float, dict[str, Tensor]]) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


def influence(**changes: Any) -> SDIInfluence:
    settings = {"layers": None, "batch_size": 3, "sketch": TensorSketch(64), **changes}
    return SDIInfluence(CASE.model(), TRAIN, WEIGHTS, load, **settings)


def test_rows_are_the_truth_of_one_targets_loss() -> None:
    steps = influence(sketch=Exact()).step_influence(TEST, per="token")
    assert steps.token_of is not None
    assert list(map(tuple, steps.token_of.tolist())) == TARGETS
    expected = torch.zeros(len(TARGETS), len(TRAIN), 3, dtype=torch.float64)
    model = CASE.model()
    for checkpoint in WEIGHTS:
        eta = load(model, checkpoint)
        train = [CASE.gradients(model, row, None).sum(0) for row in TRAIN]
        for number, (q, p) in enumerate(TARGETS):

            def loss(untied: nn.Module, row: dict[str, Tensor] = TEST[q], p: int = p) -> Tensor:
                return one_target_loss(untied(input_ids=row["input_ids"].unsqueeze(0)).logits[0], row["labels"], p)

            phi = step_gradients(model, loss, CASE.untying, CASE.names(model, None))[2:]
            expected[number] += eta * torch.stack([phi @ g for g in train])
    assert (steps.trajectories - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("indexed", [False, True], ids=["live", "index"])
def test_the_top_of_every_token(indexed: bool, tmp_path: Path) -> None:
    sdi = influence(index=tmp_path / "index" if indexed else None)
    every, whole = sdi.step_influence(TEST, per="token"), sdi.step_influence(TEST)
    for q in range(len(TEST)):
        own = every.token_of[:, 0] == q
        torch.testing.assert_close(every.trajectories[own].sum(0), whole.trajectories[q])
    top = sdi.step_influence(TEST, k=3, per="token")
    torch.testing.assert_close(top.influence_scores, every.influence_scores.topk(3).values)
    assert torch.equal(top.indices, every.influence_scores.topk(3).indices)
    places = top.indices.unsqueeze(-1).expand(-1, -1, 3)
    torch.testing.assert_close(top.trajectories, every.trajectories.gather(1, places))
    torch.testing.assert_close(top.score_errors, every.score_errors.gather(1, top.indices))
    assert torch.equal(top.token_of, every.token_of)
    ranked = sdi.step_influence(TEST, k=2, per="token", rank_by=1, proponents=False)
    torch.testing.assert_close(ranked.trajectories[..., 1], every.trajectories[..., 1].topk(2, largest=False).values)


def test_long_texts_are_answered_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sdi = influence()
    top = sdi.step_influence(TEST, k=3, per="token")
    monkeypatch.setattr(per_token, "ROWS_AT_ONCE", 2)
    total_bytes = 2 * len(TARGETS) * 8 * row_width(sdi)
    monkeypatch.setattr(per_token, "free_memory", lambda device: 2 * total_bytes)
    monkeypatch.setattr(per_token.queries, "top_step_influence", None)  # the way that would hold everything
    chunked = sdi.step_influence(TEST, k=3, per="token")
    for name in ("indices", "influence_scores", "trajectories", "score_errors", "token_of"):
        torch.testing.assert_close(getattr(chunked, name), getattr(top, name))
    monkeypatch.setattr(per_token, "free_memory", lambda device: total_bytes)
    with pytest.raises(ValueError, match=r"The gradients of 6 target tokens take .* Pass fewer texts at a time"):
        sdi.step_influence(TEST, k=3, per="token")


def row_width(sdi: SDIInfluence) -> int:
    with sdi.study().points() as points:
        return sum(row.shape[-1] for row in next(points).capture.blank().rows.values())


def test_rows_of_a_loader_and_of_padded_batches_are_the_same() -> None:
    sdi = influence(sketch=Exact())
    rows_alone = sdi.step_influence(DataLoader(TEST, 1, collate_fn=Collator()), per="token")
    torch.testing.assert_close(rows_alone.trajectories, sdi.step_influence(TEST, per="token").trajectories)


def test_a_first_label_that_nothing_predicts_is_no_target() -> None:
    ids = TEST[0]["input_ids"]
    whole = influence().step_influence([{"input_ids": ids, "labels": ids.clone()}], per="token")
    assert whole.token_of[:, 1].tolist() == list(range(1, len(ids)))


def test_the_file_knows_whose_tokens_they_are(tmp_path: Path) -> None:
    steps = influence().step_influence(TEST, k=2, per="token")
    steps.save(tmp_path / "rows.safetensors")
    assert torch.equal(StepInfluence.load(tmp_path / "rows.safetensors").token_of, steps.token_of)
    replace(steps, token_of=None).save(tmp_path / "plain.safetensors")
    assert StepInfluence.load(tmp_path / "plain.safetensors").token_of is None
    replace(steps, checkpoints=None).save(tmp_path / "rows.safetensors")
    tensors = load_file(tmp_path / "rows.safetensors")
    with safe_open(tmp_path / "rows.safetensors", "pt") as file:
        metadata = file.metadata()
    for broken in (tensors["token_of"][:, :1], tensors["token_of"].float(), -tensors["token_of"] - 1):
        save_file({**tensors, "token_of": broken.contiguous()}, tmp_path / "broken.safetensors", metadata)
        with pytest.raises(ValueError, match="is damaged: token_of must"):
            StepInfluence.load(tmp_path / "broken.safetensors")


# --- checkpoints ---


@pytest.mark.parametrize("indexed", [False, True], ids=["live", "index"])
def test_checkpoints_share_the_influence_among_them(indexed: bool, tmp_path: Path) -> None:
    sdi = influence(index=tmp_path / "index" if indexed else None)
    whole, split = sdi.step_influence(TEST), sdi.step_influence(TEST, per="checkpoint")
    assert split.axes == ("checkpoint", "step")
    assert split.labels["step"] == ("prelude", 0, 1, 2, "coda")
    torch.testing.assert_close(split.sum("checkpoint").values[..., 1:-1], whole.trajectories)
    torch.testing.assert_close(split.sum("checkpoint").errors[..., 1:-1], whole.trajectory_errors)
    for place, weights in enumerate(WEIGHTS):
        alone = SDIInfluence(CASE.model(), TRAIN, [weights], load, layers=None, sketch=Exact()).step_influence(TEST)
        exact = influence(sketch=Exact()).step_influence(TEST, per="checkpoint")
        torch.testing.assert_close(exact.values[:, :, place, 1:-1], alone.trajectories)
        assert exact.errors is None
    top = sdi.step_influence(TEST, k=3, per="checkpoint")
    assert torch.equal(top.indices, whole.influence_scores.topk(3).indices)
    torch.testing.assert_close(top.total(), whole.influence_scores.topk(3).values)


def test_what_cannot_be_taken_apart_is_refused() -> None:
    sdi = influence()
    with pytest.raises(ValueError, match='per must be "token", "checkpoint" or None'):
        sdi.step_influence(TEST, per="word")
    with pytest.raises(ValueError, match="per='token' and aggregate=True do not go together"):
        sdi.step_influence(TEST, per="token", aggregate=True)
    with pytest.raises(ValueError, match="per='checkpoint' and rerank=4 do not go together"):
        sdi.step_influence(TEST, k=2, rerank=4, per="checkpoint")
    untargeted = [{"input_ids": row["input_ids"], "labels": torch.full_like(row["labels"], -100)} for row in TEST]
    with pytest.warns(UserWarning, match="no target"), pytest.raises(ValueError, match="no target token"):
        sdi.step_influence(untargeted, per="token")
    by_example = lambda output, labels: output.logits[:, 0].square().mean(1)  # noqa: E731
    by_example.reduction = "none"
    with pytest.raises(ValueError, match="needs loss_fn to tell tokens apart"):
        influence(loss_fn=by_example).step_influence(TEST, per="token")
