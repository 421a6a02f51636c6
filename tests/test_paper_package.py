"""The same looped block through this library and through the paper's package, where that one works.

It needs plain `Linear`, `LayerNorm` and `Embedding` layers called with one positional tensor that has the examples in
front; on such a model its exact estimator and ours are two ways to the same numbers. Its axes are (train, query, step)
and (train, query, step of train, step of query).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_sdi import Exact, SDIInfluence, TensorSketch

sdi = pytest.importorskip("sdi", reason="the paper's package is not installed: pip install step-decomposed-influence")

VOCAB, WIDTH, LOOPS = 7, 6, 4
ETAS = (0.5, 0.125)


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(2 * WIDTH, 10), nn.Linear(10, WIDTH, bias=False)

    def forward(self, state: Tensor, inputs: Tensor) -> Tensor:
        mixed = state.cumsum(1) / 3  # tokens see the ones before
        return state + self.down(torch.tanh(self.up(torch.cat([self.norm(mixed), inputs], -1))))


class Looped(nn.Module):
    """Embedding, a block applied four times, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(VOCAB, WIDTH), Core(), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        inputs = state = self.embed(ids)
        for _ in range(LOOPS):
            state = self.core(state, inputs)
        return self.head(state)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


losses.reduction = "none"  # type: ignore[attr-defined]


def data(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, VOCAB, (2, 5), generator=generator)) for _ in range(n)]


def batches(rows: list[tuple[Tensor, Tensor]], size: int = 2) -> list[tuple[Tensor, ...]]:
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [tuple(torch.stack(column) for column in zip(*part, strict=True)) for part in parts]


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"checkpoint-{i}.pt" for i in range(len(ETAS))]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        torch.save(Looped().double().state_dict(), path)
    return paths


TRAIN, TEST = data(5, seed=1), data(3, seed=2)


def theirs(kind: Any, checkpoints: list[Path], layers: list[str], **settings: Any) -> Any:
    model = Looped().double()
    modules = [model.get_submodule(name) for name in layers]
    estimator = kind(model=model, target_modules=modules, **settings)
    try:
        return estimator.influence_across_checkpoints(
            checkpoints=[sdi.CheckpointSpec(path, eta) for path, eta in zip(checkpoints, ETAS, strict=True)],
            train_loader=batches(TRAIN),
            query_loader=batches(TEST),
            loss_fn=lambda model, batch: losses(model(batch[0]), batch[1]),
            with_step_matrix=True,
        )
    finally:
        estimator.close()


def ours(checkpoints: list[Path], layers: Any, sketch: Any) -> SDIInfluence:
    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return dict(zip(map(str, checkpoints), ETAS, strict=True))[path]

    arguments = {"loss_fn": losses, "batch_size": 3, "loop": "core", "sketch": sketch}
    return SDIInfluence(Looped().double(), TRAIN, [str(path) for path in checkpoints], load, layers, **arguments)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    """Their scores are float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_exact_influence_agrees_step_by_step(checkpoints: list[Path]) -> None:
    reference = theirs(sdi.FullGradientTracInSDI, checkpoints, ["core"], expected_steps=LOOPS)
    library = ours(checkpoints, "loop", Exact())
    steps = library.step_influence(TEST)
    assert_close(steps.trajectories, reference.sdi.transpose(0, 1))
    assert_close(library.influence(TEST), reference.tracin.T)
    assert_close(library.step_matrix(TEST), reference.sdi_matrix.transpose(0, 1))


def test_what_is_used_once_agrees_as_prelude_and_coda(checkpoints: list[Path]) -> None:
    """Theirs come first and last among the steps."""
    layers = ["embed", "core", "head"]
    reference = theirs(sdi.FullGradientTracInSDI, checkpoints, layers, allow_mixed_steps=True)
    steps = ours(checkpoints, None, Exact()).step_influence(TEST)
    both = torch.cat([steps.prelude.unsqueeze(-1), steps.trajectories, steps.coda.unsqueeze(-1)], -1)
    assert_close(both, reference.sdi.transpose(0, 1))


def test_both_sketches_estimate_the_same_numbers(checkpoints: list[Path]) -> None:
    """Other hashes, so equal only up to the error that ours reports and theirs has, about a third larger."""
    exact = ours(checkpoints, "loop", Exact()).step_influence(TEST).trajectories
    steps = ours(checkpoints, "loop", TensorSketch(dim=64)).step_influence(TEST)
    reference = theirs(sdi.ProjectedTracInSDI, checkpoints, ["core"], projection_size=64, seed=0)
    error = steps.trajectory_errors.square().mean().sqrt()
    assert error > 0
    for sketched, sizes in ((steps.trajectories, 2), (reference.sdi.transpose(0, 1), 3)):
        assert (sketched - exact).square().mean().sqrt() < sizes * error
