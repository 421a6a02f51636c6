"""Standard errors: calibrated on a trained model, and exactly the formula of `captum_sdi.scores`.

Calibration redraws the sketch over *stored* gradients. All scores of one draw share its hashes, so draws count, not
pairs: coverage is averaged within a draw first, and its standard error is that of the mean over draws.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi import Exact, LoopSpec, SDIInfluence, TensorSketch
from captum_sdi.checkpoints import checkpoint_names
from captum_sdi.features import POOLED, StepFeatures
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.scores import Scores, pair_scores, self_scores, with_total
from captum_sdi.sketch import Dense, Gradient, Outer, Projection
from captum_sdi.tape import FIRST_STEP, Tape
from captum_sdi.tasks import TaskDataset, parity

WIDTH, N_LOOPS, ETAS = 32, 3, (0.5, 0.2)
N_TRAIN, N_TEST, N_FITTED = 6, 3, 400
DRAWS = 400


# --- a trained model, its checkpoints, and their stored gradients -------------------------------------------------

Checkpoint = tuple[float, dict[str, Tensor]]


def load(model: nn.Module, checkpoint: Checkpoint) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


@functools.cache
def trained() -> tuple[LoopedGPTForCausalLM, TaskDataset, list[Checkpoint]]:
    """A small looped GPT on parity, half-way and at the end of a short training; the last rows are held out."""
    torch.manual_seed(0)
    data = parity(N_FITTED + N_TEST, running=True)
    config = LoopedGPTConfig(
        vocab_size=data.vocab_size, n_positions=data.length, n_embd=WIDTH, n_head=2, n_prelude=1, n_core=1, n_coda=0,
        n_loops=N_LOOPS, initializer_range=0.15,
    )  # fmt: skip
    model = LoopedGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    checkpoints, n_steps = [], 140
    for step in range(1, n_steps + 1):
        chosen = torch.randint(0, N_FITTED, (32,))
        loss = model(data.input_ids[chosen], data.attention_mask[chosen], labels=data.labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (n_steps // 2, n_steps):
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            checkpoints.append((ETAS[len(checkpoints)], weights))
    assert loss.item() < 0.5, f"a loss of {loss.item():.3f}: it should have learnt something, chance is 0.69"
    return model.eval(), data, checkpoints


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``(n,)``: the mean over each example's own targets."""
    terms = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return terms.sum(1) / (labels[:, 1:] != -100).sum(1)


@dataclass(frozen=True)
class Stored:
    """Gradients at one checkpoint, the test examples first: for each parameter one gradient per (example, step)."""

    parameters: Mapping[str, Tensor]
    gradients: Mapping[str, Gradient]

    def double(self) -> Stored:
        return Stored(
            {k: v.double() for k, v in self.parameters.items()}, {k: _double(g) for k, g in self.gradients.items()}
        )

    def features(self, sketch: TensorSketch | Exact, checkpoint: str) -> tuple[StepFeatures, StepFeatures]:
        """Step features of the test and of the train side, put together as `captum_sdi.features` does."""
        projections = {name: sketch.projection(name, p, checkpoint) for name, p in self.parameters.items()}
        rows = {name: self._by_step(projections[name], gradient) for name, gradient in self.gradients.items()}
        noise = {name: projection.noise for name, projection in projections.items()}
        if sketch.pool:
            rows, noise = {POOLED: torch.stack(list(rows.values())).sum(0)}, {POOLED: max(noise.values())}
        sides = (slice(N_TEST), slice(N_TEST, None))
        return tuple(
            StepFeatures({name: row[side] for name, row in rows.items()}, noise, torch.full((n,), N_LOOPS))
            for side, n in zip(sides, (N_TEST, N_TRAIN), strict=True)
        )

    @staticmethod
    def _by_step(projection: Projection, gradient: Gradient) -> Tensor:
        """``(n, 2 + t, width)``; nothing is used before or after the loop."""
        return F.pad(projection(gradient).view(N_TEST + N_TRAIN, N_LOOPS, -1), (0, 0, FIRST_STEP, 0))


def _double(gradient: Gradient) -> Gradient:
    if isinstance(gradient, Dense):
        return Dense(gradient.grads.double())
    return Outer(gradient.rows.double(), gradient.cols.double())


@functools.cache
def stored(position: int) -> Stored:
    """What the tape reports at a checkpoint, once."""
    model, data, checkpoints = trained()
    load(model, checkpoints[position])
    chosen = torch.cat([torch.arange(N_FITTED, N_FITTED + N_TEST), torch.arange(N_TRAIN)])
    targets = {name: p for name, p in model.named_parameters() if name.startswith("core.")}
    uses: dict[tuple[str, int], Gradient] = {}

    def consume(name: str, examples: slice, bin: int, gradient: Gradient) -> None:
        assert examples == slice(None)
        assert (name, bin) not in uses
        uses[name, bin] = gradient

    with Tape(model, targets, LoopSpec(("core",))) as tape:
        logits = tape.forward(lambda: model(data.input_ids[chosen], data.attention_mask[chosen]).logits, len(chosen))
        tape.backward(losses(logits, data.labels[chosen]).sum(), consume)
    assert {bin for _, bin in uses} == {FIRST_STEP + t for t in range(N_LOOPS)}
    gradients = {name: _stacked([uses[name, FIRST_STEP + t] for t in range(N_LOOPS)]) for name in targets}
    return Stored({name: p.detach() for name, p in targets.items()}, gradients)


def _stacked(steps: list[Gradient]) -> Gradient:
    """One gradient whose examples are all (example, step)."""

    def stack(field: str) -> Tensor:
        return torch.stack([getattr(gradient, field) for gradient in steps], dim=1).flatten(0, 1).detach()

    return Dense(stack("grads")) if isinstance(steps[0], Dense) else Outer(stack("rows"), stack("cols"))


# --- calibration --------------------------------------------------------------------------------------------------


def scores_of(sketch: TensorSketch | Exact, gradients: list[Stored]) -> dict[str, Scores]:
    """Everything that carries an error bar, at one checkpoint and summed over both."""
    at = [_scores_at(sketch, stored, f"step-{i}") for i, stored in enumerate(gradients)]
    summed = {
        f"{what}, two checkpoints": Scores(
            sum(eta * scores[what].values for eta, scores in zip(ETAS, at, strict=True)),
            sum(eta**2 * scores[what].variances for eta, scores in zip(ETAS, at, strict=True)),
        )
        for what in ("totals", "steps")
    }
    return at[1] | summed


def _scores_at(sketch: TensorSketch | Exact, stored: Stored, checkpoint: str) -> dict[str, Scores]:
    test, train = stored.features(sketch, checkpoint)
    pairs = pair_scores(with_total(test), train.summed())
    selves = self_scores(train)
    aggregated = pair_scores(with_total(test.aggregated()), train.summed())
    first = 1 + FIRST_STEP  # after the total, prelude and coda
    return {
        "totals": Scores(pairs.values[..., 0], pairs.variances[..., 0]),
        "steps": Scores(pairs.values[..., first:], pairs.variances[..., first:]),
        "self totals": Scores(selves.values[..., 0], selves.variances[..., 0]),
        "self steps": Scores(selves.values[..., first:], selves.variances[..., first:]),
        "aggregated totals": Scores(aggregated.values[..., 0], aggregated.variances[..., 0]),
        "aggregated steps": Scores(aggregated.values[..., first:], aggregated.variances[..., first:]),
    }


def covered(sketched: Scores, exact: Tensor) -> Tensor:
    """The share of a draw's scores whose 95% interval holds the exact one."""
    return ((sketched.values - exact).abs() <= 1.96 * sketched.variances.sqrt()).double().mean()


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
@pytest.mark.parametrize("dim", [128, 40])
def test_95_percent_intervals_cover_95_percent(dim: int, pool: bool, seed: int) -> None:
    """At d = 128 no factor is longer than d, and coverage is 93-97%; at d = 40 most are, and it is at least 93%."""
    gradients = [stored(0), stored(1)]
    longest = max(max(p.shape) for p in gradients[0].parameters.values())
    assert longest == 4 * WIDTH  # the MLP's
    assert 40 < longest <= 128
    exact = scores_of(Exact(), [stored.double() for stored in gradients])
    coverage: dict[str, list[Tensor]] = {what: [] for what in exact}
    for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
        for what, scores in scores_of(TensorSketch(dim, draw, pool), gradients).items():
            coverage[what].append(covered(scores, exact[what].values))
    found = {what: torch.stack(shares) for what, shares in coverage.items()}
    report = {what: f"{c.mean():.4f} ± {c.std() / DRAWS**0.5:.4f}" for what, c in found.items()}
    print(dim, pool, report)
    most = 0.97 if longest <= dim else 1.0
    assert all(0.93 <= c.mean() <= most for c in found.values()), report
