"""What must not change a score: padding, the batch an example is in, its neighbours, its place. And what must add up.

Hypothesis draws lengths, batch splits, dtypes, layers, depths, checkpoints and sketches. Differences are measured
against the product of the two gradients' norms, the size of the terms that were added up: a score may be the small
difference of large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from cases import CASES, VOCAB, looped_gpt, rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import next_token_loss, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo import ZOO

from captum_sdi import Exact, LoopSpec, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.data.collate import Collator

Row = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Nothing repeats"),  # depths of one step are drawn, too
    pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from"),  # as are rates
]

# --- padding ---

TRAIN, TEST = rows(5, seed=1, longest=10), rows(3, seed=2, longest=9)
TRAIN[1] = {name: column[:3] for name, column in TRAIN[1].items()}  # one short, one long


@dataclass(frozen=True)
class Padding:
    """How rows become equally long."""

    side: str  # "right", "left", or "ours": ragged rows, padded by the library's collator
    positions: bool
    """The rows say their position ids."""

    def __call__(self, rows: Sequence[Row], length: int) -> list[Row]:
        return [self._padded(row, length) for row in rows]

    def _padded(self, row: Row, length: int) -> Row:
        real = torch.ones_like(row["input_ids"])
        row = {**row, "attention_mask": real}
        if self.positions:
            row["position_ids"] = torch.arange(len(real))
        if self.side == "ours":
            del row["attention_mask"]
            return row
        filling = {"labels": -100, "input_ids": 7, "position_ids": 1, "attention_mask": 0}
        padded = {name: torch.full((length - len(real),), filling[name]) for name in row}
        order = (lambda row, pad: [pad, row]) if self.side == "left" else (lambda row, pad: [row, pad])
        return {name: torch.cat(order(row[name], padded[name])) for name in row}


PADDINGS = [Padding(side, positions) for side in ("right", "left", "ours") for positions in (False, True)]
FAMILIES = {case.name: case for case in ZOO if case.name in ("gpt2", "llama")}


def family(name: str) -> tuple[nn.Module, LoopSpec | None]:
    if name == "looped_gpt":
        return CASES[0].model(), None
    return FAMILIES[name].model(), LoopSpec(FAMILIES[name].modules, FAMILIES[name].anchors)


@functools.cache
def totals_alone(name: str) -> Tensor:
    """TracIn by plain autograd, each example alone and without padding."""
    model, _ = family(name)

    def gradient(row: Row) -> Tensor:
        output = model(input_ids=row["input_ids"].unsqueeze(0), use_cache=False)
        loss = next_token_loss(output.logits[0], row["labels"])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    train, test = (torch.stack([gradient(row) for row in rows]) for rows in (TRAIN, TEST))
    return test @ train.T


@functools.cache
def alone(name: str) -> StepInfluence:
    model, loop = family(name)
    return SDIInfluence(model, TRAIN, layers=None, loop=loop, sketch=Exact()).step_influence(TEST)


@pytest.mark.parametrize("batch_size", [1, 2])  # of two, the last batch is smaller
@pytest.mark.parametrize("padding", PADDINGS, ids=lambda p: f"{p.side}{', position ids' * p.positions}")
@pytest.mark.parametrize("name", ["looped_gpt", *FAMILIES])
def test_a_padded_example_scores_as_it_does_alone(name: str, padding: Padding, batch_size: int) -> None:
    """Padding on the left needs position ids where positions are absolute and counted from the left edge: GPT-2.

    Llama's rotary angles are float32 even here, so that the same angles from other positions agree to 1e-6.
    """
    model, loop = family(name)
    train, test = padding(TRAIN, 12), padding(TEST, 11)
    sdi = SDIInfluence(model, train, layers=None, loop=loop, batch_size=batch_size, sketch=Exact())
    steps = sdi.step_influence(test)
    scale = alone(name).influence_scores.abs().max()
    if name == "gpt2" and padding == Padding("left", False):
        assert (steps.influence_scores - totals_alone(name)).abs().max() > 0.1 * scale  # the model itself differs
        return
    tolerance = 1e-6 if name == "llama" and padding == Padding("left", False) else 1e-10
    assert (steps.influence_scores - totals_alone(name)).abs().max() <= tolerance * scale
    for field in ("influence_scores", "trajectories", "prelude", "coda"):
        assert (getattr(steps, field) - getattr(alone(name), field)).abs().max() <= tolerance * scale, field


# --- a state of each example's own ---


def seeded_state(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Noise drawn from a seed that is the example's own, its first token: whatever batch the example is in."""

    def noise(row: Tensor) -> Tensor:
        return torch.randn(12, 8, generator=torch.Generator().manual_seed(int(row[0])))[: len(row)]

    return {"initial_state": torch.stack([noise(row) for row in batch["input_ids"]])}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_forward_kwargs_as_a_function_of_the_batch_equal_the_truth(batch_size: int) -> None:
    case, model = CASES[0], CASES[0].model()
    sdi = SDIInfluence(model, TRAIN, batch_size=batch_size, sketch=Exact(), forward_kwargs=seeded_state)
    states = [seeded_state({"input_ids": row["input_ids"].unsqueeze(0)}) for row in (*TRAIN, *TEST)]
    bins = [case.gradients(model, row, "loop", **state) for row, state in zip((*TRAIN, *TEST), states, strict=True)]
    train, test = bins[: len(TRAIN)], bins[len(TRAIN) :]
    expected = torch.stack([torch.stack([phi[2:] @ g.sum(0) for g in train]) for phi in test])
    steps = sdi.step_influence(TEST)
    assert (steps.trajectories - expected).abs().max() <= 1e-10 * expected.abs().max()
    plain = SDIInfluence(model, TRAIN, sketch=Exact()).step_influence(TEST)
    assert (plain.trajectories - expected).abs().max() > 0.01 * expected.abs().max()


# --- everything else, drawn ---

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
"""Of a batch's arithmetic, in units of the largest squared norm. Measured: 2e-7, 1e-16 and 4e-8; a CPU with bfloat16
units of its own may round an activation elsewhere in another batch, by 2^-8."""
SKETCHES = [Exact(), TensorSketch(dim=48), TensorSketch(dim=32, pool=True)]
LAYERS = ["loop", None, ["core.adapter", "lm_head"]]


@functools.cache
def model_of(dtype: torch.dtype) -> nn.Module:
    return spread(looped_gpt(n_prelude=0, n_core=1, n_coda=0, bias=True)()).to(dtype)


@dataclass(frozen=True)
class Setup:
    """What hypothesis draws."""

    dtype: torch.dtype
    lengths: tuple[int, ...]
    test_lengths: tuple[int, ...]
    layers: Any
    n_loops: int
    test_n_loops: int
    sketch: Exact | TensorSketch
    etas: tuple[float, ...]
    split: tuple[int, ...]

    @property
    def train(self) -> list[Row]:
        return examples(self.lengths, seed=1)

    @property
    def test(self) -> list[Row]:
        return examples(self.test_lengths, seed=2)

    def sdi(self, data: Any = None, factor: float = 1.0, **changes: Any) -> SDIInfluence:
        """`data` in place of the training set, one example a batch."""
        names = [f"checkpoint-{i}" for i in range(len(self.etas))]
        etas = {name: factor * eta for name, eta in zip(names, self.etas, strict=True)}
        arguments = {
            "layers": self.layers,
            "sketch": self.sketch,
            "loop": "core",
            "forward_kwargs": {"n_loops": self.n_loops},
            "test_forward_kwargs": {"n_loops": self.test_n_loops},
            **changes,
        }
        data = self.train if data is None else data
        return SDIInfluence(model_of(self.dtype), data, names, lambda _, name: etas[name], **arguments)

    @functools.cached_property
    def scale(self) -> float:
        """The largest squared norm of a gradient."""
        positive = replace(self, etas=tuple(abs(eta) for eta in self.etas))
        everything = batched([*self.train, *self.test], [9])
        return float(positive.sdi().compute_intermediate_quantities(everything).square().sum(1).max())

    @property
    def batch_rounding(self) -> float:
        """Of what two passes over the same examples in other batches compute."""
        return max(ROUNDING[self.dtype], self.rounding)

    @property
    def rounding(self) -> float:
        """Of what is done with features: float32 at least, and at most where they are sketched."""
        exact = isinstance(self.sketch, Exact) and self.dtype == torch.float64
        return ROUNDING[torch.float64 if exact else torch.float32]

    def same(self, ours: Tensor, theirs: Tensor, rounding: float) -> None:
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs().max() / self.scale
        assert difference <= rounding, f"{difference:.1e} of the norms' product"


def examples(lengths: Sequence[int], seed: int) -> list[Row]:
    """An example's tokens depend on its place and length alone."""
    made = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(100 * seed + i))
        made.append({"input_ids": ids, "labels": ids})
    return made


def batched(rows: Sequence[Row], sizes: Sequence[int]) -> DataLoader[Any]:
    """In order, in batches of these sizes; what is left over is the last batch."""
    cuts = [0]
    for size in sizes:
        cuts.append(min(cuts[-1] + size, len(rows)))
    batches = [list(range(a, b)) for a, b in zip(cuts, [*cuts[1:], len(rows)], strict=True) if a < b]
    return DataLoader(rows, batch_sampler=batches, collate_fn=Collator())  # type: ignore[arg-type]


SETUPS = st.builds(
    Setup,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4).map(tuple),
    test_lengths=st.lists(st.integers(2, 12), min_size=1, max_size=2).map(tuple),
    layers=st.sampled_from(LAYERS),
    n_loops=st.integers(1, 3),
    test_n_loops=st.integers(1, 3),
    sketch=st.sampled_from(SKETCHES),
    etas=st.lists(st.sampled_from([0.01, 0.3, 1.0, -0.5]), min_size=1, max_size=2).map(tuple),
    split=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
)


def drawn(n: int) -> Callable[[Any], Any]:
    # Without shrinking, which takes minutes here: a drawn setup is small enough to read.
    phases = (Phase.explicit, Phase.generate)
    return lambda test: settings(max_examples=n, phases=phases)(given(setup=SETUPS)(test))


@drawn(20)
def test_batches_change_no_score(setup: Setup) -> None:
    one = setup.sdi().step_influence(setup.test)
    many = setup.sdi(batched(setup.train, setup.split)).step_influence(batched(setup.test, setup.split[::-1]))
    for field in fields(StepInfluence):
        ours, theirs = getattr(many, field.name), getattr(one, field.name)
        if isinstance(theirs, Tensor):
            setup.same(ours, theirs, setup.batch_rounding)
    assert many.checkpoints is not None
    assert one.checkpoints is not None
    torch.testing.assert_close(many.checkpoints.shares, one.checkpoints.shares, rtol=1e-3, atol=1e-6)


@drawn(8)
def test_steps_add_up_to_totals_and_the_matrix_to_trajectories(setup: Setup) -> None:
    sdi = setup.sdi(batched(setup.train, setup.split))
    steps, rounding = sdi.step_influence(setup.test), setup.rounding
    assert steps.n_steps.tolist() == [setup.test_n_loops] * len(setup.test)
    setup.same(steps.trajectories.sum(-1) + steps.prelude + steps.coda, steps.influence_scores, rounding)
    setup.same(sdi.influence(setup.test), steps.influence_scores, rounding)
    summed = sdi.step_influence(setup.test, aggregate=True)
    setup.same(summed.trajectories, steps.trajectories.sum(0, keepdim=True), rounding)
    loop = setup.sdi(batched(setup.train, setup.split), layers="loop")
    matrix = loop.step_matrix(setup.test)
    assert matrix.shape[2:] == (setup.n_loops, setup.test_n_loops)
    setup.same(matrix.sum(2), loop.step_influence(setup.test).trajectories, rounding)


@drawn(8)
def test_top_k_is_the_whole_result_sorted_and_cut(setup: Setup) -> None:
    sdi, k = setup.sdi(batched(setup.train, setup.split)), 1 + setup.lengths[0] % len(setup.lengths)
    whole = sdi.influence(setup.test)
    for proponents in (True, False):
        order = whole.argsort(dim=1, descending=proponents, stable=True)[:, :k]
        best, steps = (call(setup.test, k=k, proponents=proponents) for call in (sdi.influence, sdi.step_influence))
        assert best.indices.tolist() == order.tolist()
        assert torch.equal(best.influence_scores, whole.gather(1, order))
        setup.same(steps.influence_scores, best.influence_scores, setup.rounding)


@drawn(8)
def test_self_influence_is_the_diagonal_of_the_influence_on_the_same_data(setup: Setup) -> None:
    sdi = setup.sdi(test_forward_kwargs=None)
    pairs, rounding = sdi.step_influence(setup.train), setup.rounding
    itself = sdi.step_self_influence()
    scale = float(pairs.influence_scores.diagonal().abs().max())
    for ours, theirs in (
        (sdi.self_influence(), pairs.influence_scores.diagonal()),
        (sdi.self_influence(setup.train), pairs.influence_scores.diagonal()),
        (itself.influence_scores, pairs.influence_scores.diagonal()),
        (itself.trajectories, pairs.trajectories.diagonal().T),
    ):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= rounding * max(scale, float(theirs.abs().max()))


@drawn(8)
def test_an_examples_place_moves_its_scores_and_changes_none(setup: Setup) -> None:
    order = torch.randperm(len(setup.lengths), generator=torch.Generator().manual_seed(len(setup.split))).tolist()
    moved = setup.sdi([setup.train[i] for i in order]).step_influence(setup.test)
    setup.same(moved.trajectories, setup.sdi().step_influence(setup.test).trajectories[:, order], setup.rounding)


@drawn(8)
@pytest.mark.parametrize("factor", [8.0, -0.25])  # powers of two: exact
def test_learning_rates_scale_scores_and_errors(setup: Setup, factor: float) -> None:
    plain = setup.sdi().step_influence(setup.test)
    scaled = setup.sdi(factor=factor).step_influence(setup.test)
    for field in ("influence_scores", "trajectories", "prelude", "coda"):
        assert torch.equal(getattr(scaled, field), factor * getattr(plain, field)), field
    for field in ("score_errors", "trajectory_errors"):
        assert torch.equal(getattr(scaled, field), abs(factor) * getattr(plain, field)), field
