"""Standard errors: calibrated on a trained model, and exactly the formula of `captum_sdi.scores`.

Calibration redraws the sketch over *stored* gradients. All scores of one draw share its hashes, so draws count, not
pairs: coverage is averaged within a draw first, and its standard error is that of the mean over draws.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi import Exact, LoopSpec, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.capture.tape import Tape
from captum_sdi.checkpoints import checkpoint_names
from captum_sdi.features import POOLED, Bins, Columns, Dense, Gradient, Noise, Outer, StepFeatures
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.scores.contract import Scores, pair_scores, self_scores
from captum_sdi.sketch.base import Projection
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
            rows, noise = (
                {POOLED: torch.stack(list(rows.values())).sum(0)},
                {POOLED: Noise(max(n.variance / n.parts for n in noise.values()))},
            )
        sides = (slice(N_TEST), slice(N_TEST, None))
        return tuple(
            StepFeatures({name: row[side] for name, row in rows.items()}, noise, torch.full((n,), N_LOOPS))
            for side, n in zip(sides, (N_TEST, N_TRAIN), strict=True)
        )

    @staticmethod
    def _by_step(projection: Projection, gradient: Gradient) -> Tensor:
        """``(n, 2 + t, width)``; nothing is used before or after the loop."""
        return F.pad(projection(gradient).view(N_TEST + N_TRAIN, N_LOOPS, -1), (0, 0, Bins.of_step(0), 0))


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
    assert {bin for _, bin in uses} == {Bins.of_step(t) for t in range(N_LOOPS)}
    gradients = {name: _stacked([uses[name, Bins.of_step(t)] for t in range(N_LOOPS)]) for name in targets}
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
    pairs = pair_scores(test.with_total(), train.summed())
    selves = self_scores(train, train)
    aggregated = pair_scores(test.aggregated().with_total(), train.summed())
    first = Columns.of_step(0)  # after the total, prelude and coda
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


def summary(coverage: Mapping[str, list[Tensor]]) -> tuple[dict[str, float], str]:
    """Mean coverage over draws, and the same with its standard error for a reader."""
    shares = {what: torch.stack(draws) for what, draws in coverage.items()}
    lines = [f"{what}: {s.mean():.4f} ± {s.std() / len(s) ** 0.5:.4f}" for what, s in shares.items()]
    return {what: s.mean().item() for what, s in shares.items()}, "\n".join(["95% intervals cover", *lines])


@pytest.mark.long
@pytest.mark.parametrize("pool", [False, True], ids=["rows", "pool"])
@pytest.mark.parametrize("dim", [128, 40], ids=["one block", "several blocks"])
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
    found, report = summary(coverage)
    # Pooled, every parameter's noise counts as that of the noisiest: at least 93% is all that is promised.
    most = 0.97 if longest <= dim and not pool else 1.0
    assert all(0.93 <= share <= most for share in found.values()), report


def test_factors_hashed_in_blocks_need_their_share_of_the_bound(seed: int) -> None:
    """Single-token gradients against themselves, the worst case: without 1 + Σ(1 − 1/m) they are under-covered.

    Not at a smaller d: the bar is computed from the sketched norms, so that a self-influence drawn too low gets too
    short a bar. Intervals with the true norms cover 95-96% from d = 32 on; with the sketched ones it is 92.5% at
    d = 64, 93.4% at 128 and 95% from 256 on, where a bar is a seventh of the score.
    """
    r, c, dim, n = 768, 3072, 256, 4
    parameter, factor = torch.empty(r, c), 1 + (1 - 1 / 3) + (1 - 1 / 12)
    generator = torch.Generator().manual_seed(3)
    gradient = Outer(torch.randn(n, 1, r, generator=generator), torch.randn(n, 1, c, generator=generator))
    exact = (gradient.rows.double().square().sum(-1) * gradient.cols.double().square().sum(-1)).squeeze(1)
    coverage: dict[str, list[Tensor]] = {"with": [], "without": []}
    for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
        projection = TensorSketch(dim, draw).projection("weight", parameter)
        features = StepFeatures({"": projection(gradient).unsqueeze(1)}, {"": projection.noise}, torch.ones(n))
        scores = self_scores(features, features)
        scores = Scores(scores.values[:, 0], scores.variances[:, 0])
        coverage["with"].append(covered(scores, exact))
        coverage["without"].append(covered(Scores(scores.values, scores.variances / factor), exact))
    found, report = summary(coverage)
    assert found["with"] >= 0.93, report
    assert found["without"] < 0.85, report


def test_gradients_in_one_part_have_twice_the_variance_and_the_bars_know(seed: int) -> None:
    """The first 16 rows, as of a vocabulary's first tokens, lie in one of the two halves of a row."""
    r, c, dim, n = 320, 64, 512, 2
    generator = torch.Generator().manual_seed(3)
    rows, cols = torch.randn(n, 5, r, generator=generator), torch.randn(n, 5, c, generator=generator)
    errors: dict[str, tuple[float, float]] = {}
    for name, kept in (("spread", r), ("one part", 16)):
        gradient = Outer(F.pad(rows[..., :kept], (0, r - kept)), cols)
        whole = torch.einsum("npr,npc->nrc", gradient.rows, cols).flatten(1)
        squares, variances = [], []
        for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
            projection = TensorSketch(dim, draw).projection("weight", torch.empty(r, c))
            sketch = projection(gradient).view(n, 1, -1)
            test, train = (StepFeatures({"": row}, {"": projection.noise}, torch.ones(1)) for row in sketch.split(1))
            scores = pair_scores(test, train)
            squares.append((scores.values.squeeze() - whole[0] @ whole[1]).square())
            variances.append(scores.variances.squeeze())
        ratio = torch.stack(squares) / torch.stack(variances).mean()
        assert abs(ratio.mean() - 1) <= 4 * ratio.std() / DRAWS**0.5, (name, ratio.mean())
        scale = whole.square().sum(1).prod() + (whole[0] @ whole[1]).square()
        errors[name] = (torch.stack(variances).mean() / scale * dim).item()
    assert 0.95 < errors["spread"] < 1.1, errors
    assert 1.9 < errors["one part"] < 2.1, errors


def test_gradients_on_a_few_features_of_every_head_stay_within_their_bars(seed: int) -> None:
    """Blocks rotated by multiples of a head's width would let all of them collide at once, or none."""
    r, c, dim = 1024, 64, 512  # two parts of 512 rows in 256 buckets: two blocks
    generator = torch.Generator().manual_seed(3)
    rows, cols = torch.randn(1, 1, r, generator=generator), torch.randn(1, 1, c, generator=generator)
    gradient = Outer(rows * (torch.arange(r) % 16 == 0), cols)
    ratios = []
    for draw in range(seed * DRAWS, (seed + 1) * DRAWS):
        projection = TensorSketch(dim, draw).projection("weight", torch.empty(r, c))
        sketch = projection(gradient).unsqueeze(1)
        features = StepFeatures({"": sketch}, {"": projection.noise}, torch.ones(1))
        scores = pair_scores(features, features)
        error = scores.values - gradient.rows.square().sum() * gradient.cols.square().sum()
        ratios.append((error.square() / scores.variances).squeeze())
    ratio = torch.stack(ratios)
    assert ratio.mean() <= 1 + 4 * ratio.std() / DRAWS**0.5, ratio.mean()
    assert (ratio <= 1.96**2).double().mean() >= 0.93, ratio


# --- the formula, end to end --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """Scores and their standard errors by the formula, ``(q, n)`` and ``(q, n, t)``."""

    totals: Tensor
    steps: Tensor
    total_errors: Tensor
    step_errors: Tensor


def noise_of(name: str, parameters: Mapping[str, Tensor], dim: int) -> tuple[float, int]:
    """A part's noise and the number of parts; written out here, not read from the library."""

    def hashed(parameter: Tensor) -> tuple[float, int]:
        if parameter.ndim < 2:
            return 1 / dim, 1
        short, long = sorted(parameter.shape)
        even = name != POOLED and dim % 64 == long % 32 == 0
        of_long, of_short = 1 + (even and 2 * short <= dim), 1 + (even and 2 * long <= dim)
        parts = of_long * of_short
        blocks = [-(-length // (dim // parts)) for length in (short / of_short, long / of_long)]
        return (1 + sum(1 - 1 / n for n in blocks)) * parts / dim, parts

    if name == POOLED:
        return max(map(hashed, parameters.values()))
    return hashed(parameters[name]) if parameters[name].numel() > dim else (0.0, 1)


def value_and_variance(phi: Tensor, g: Tensor, noise: tuple[float, int]) -> tuple[Tensor, Tensor]:
    of_parts = zip(phi.chunk(noise[1]), g.chunk(noise[1]), strict=True)
    return phi @ g, noise[0] * sum(a.square().sum() * b.square().sum() + (a @ b).square() for a, b in of_parts)


def bars(sketch: TensorSketch, names: list[str], aggregate: bool = False) -> Bars:
    """Σ_c η_c ⟨g, φ⟩ and the root of Σ_c η_c² Σ_l noise_l (‖g_l‖²‖φ_l‖² + ⟨g_l, φ_l⟩²), number by number."""
    n_test = 1 if aggregate else N_TEST
    numbers = torch.zeros(2, n_test, N_TRAIN, N_LOOPS + 1, dtype=torch.float64)  # the last column is the total
    for position, (eta, name) in enumerate(zip(ETAS, names, strict=True)):
        test, train = stored(position).features(sketch, name)
        for parameter in test.rows:
            noise = noise_of(parameter, stored(position).parameters, sketch.dim)
            phi, g = (side.rows[parameter].double() for side in (test, train))
            phi = phi.sum(0, keepdim=True) if aggregate else phi
            for q, n, t in np.ndindex(n_test, N_TRAIN, N_LOOPS + 1):
                part = phi[q].sum(0) if t == N_LOOPS else phi[q, Bins.of_step(t)]
                value, variance = value_and_variance(part, g[n].sum(0), noise)
                numbers[:, q, n, t] += torch.stack([eta * value, eta**2 * variance])
    values, errors = numbers[0], numbers[1].sqrt()
    return Bars(values[..., -1], values[..., :-1], errors[..., -1], errors[..., :-1])


def assert_reported(result: StepInfluence, expected: Bars) -> None:
    for ours, theirs in (
        (result.influence_scores, expected.totals),
        (result.trajectories, expected.steps),
        (result.score_errors, expected.total_errors),
        (result.trajectory_errors, expected.step_errors),
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def influence_with(sketch: TensorSketch | Exact) -> tuple[SDIInfluence, list[dict[str, Tensor]], list[str]]:
    """`SDIInfluence` on both checkpoints, the test rows, and what the checkpoints are called."""
    model, data, checkpoints = trained()
    train = [data[i] for i in range(N_TRAIN)]
    sdi = SDIInfluence(model, train, checkpoints, load, batch_size=4, loop="core", sketch=sketch)
    return sdi, [data[i] for i in range(N_FITTED, N_FITTED + N_TEST)], checkpoint_names(checkpoints)


@pytest.mark.parametrize(
    "sketch",
    [TensorSketch(40, seed=1), TensorSketch(128, seed=2), TensorSketch(40, seed=3, pool=True)],
    ids=["several blocks", "one block", "pool"],
)
@pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates and depths differ on purpose
def test_reported_errors_are_the_formula(sketch: TensorSketch) -> None:
    sdi, tests, names = influence_with(sketch)
    result, expected = sdi.step_influence(tests), bars(sketch, names)
    assert_reported(result, expected)
    assert_reported(sdi.step_influence(tests, aggregate=True), bars(sketch, names, aggregate=True))
    # Steps share their hashes: the variance of a total is no sum of theirs.
    of_steps = result.trajectory_errors.square().sum(-1).sqrt()
    assert ((of_steps - result.score_errors).abs() > 0.05 * result.score_errors).double().mean() > 0.5


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("n_checkpoints", [1, 2])
def test_the_top_k_carry_their_own_errors(n_checkpoints: int, proponents: bool) -> None:
    sdi, tests, _ = influence_with(TensorSketch(40, seed=1))
    sdi.checkpoints = sdi.checkpoints[:n_checkpoints]
    every, top = sdi.step_influence(tests), sdi.step_influence(tests, k=2, proponents=proponents)
    assert torch.allclose(top.score_errors, every.score_errors.gather(1, top.indices))
    index = top.indices.unsqueeze(-1).expand(-1, -1, N_LOOPS)
    assert torch.allclose(top.trajectory_errors, every.trajectory_errors.gather(1, index))


def test_errors_of_self_influence_are_those_of_the_pair_with_itself() -> None:
    sdi, _, _ = influence_with(TensorSketch(40, seed=1))
    _, data, _ = trained()
    pairs, selves = sdi.step_influence([data[i] for i in range(N_TRAIN)]), sdi.step_self_influence()
    assert (selves.score_errors > 0).all()
    assert torch.allclose(selves.score_errors, pairs.score_errors.diagonal(), rtol=1e-4)
    assert torch.allclose(selves.trajectory_errors, pairs.trajectory_errors.diagonal().T, rtol=1e-4)


def test_exact_scores_have_no_error() -> None:
    sdi, tests, _ = influence_with(Exact())
    for result in (sdi.step_influence(tests), sdi.step_influence(tests, k=2), sdi.step_self_influence()):
        assert not result.score_errors.any()
        assert not result.trajectory_errors.any()


def test_a_model_kept_exactly_by_a_large_dim_has_no_error() -> None:
    """Every parameter has at most dim entries: the sketch is the gradient itself."""
    (sdi, tests, _), (exact, _, _) = influence_with(TensorSketch(4 * WIDTH * WIDTH)), influence_with(Exact())
    result = sdi.step_influence(tests)
    assert not result.score_errors.any()
    assert not result.trajectory_errors.any()
    assert torch.allclose(result.influence_scores, exact.step_influence(tests).influence_scores, rtol=1e-4, atol=1e-7)
