"""`SDIInfluence.direction` against the slow truth and against sums of exact scores: forward passes alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import CASES, VOCAB, Case, looped_gpt, rows
from matplotlib.figure import Figure
from reference import Untying
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from captum_sdi import Exact, LoopSpec, SDIInfluence
from captum_sdi.data.collate import Collator
from captum_sdi.direction.closed_forms import ClosedForms
from captum_sdi.plotting import plot_map
from captum_sdi.preconditioners import Fisher
from captum_sdi.scores.influence_map import InfluenceMap

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates differ on purpose

TRAIN = [row for row in rows(7, seed=1, longest=6) if (row["labels"][1:] != -100).any()]
TEST = rows(3, seed=2, longest=6)
WEIGHTS = torch.linspace(-1, 1, len(TRAIN), dtype=torch.float64)
GROUPS = {"ends": [0, len(TRAIN) - 1], "weighed": WEIGHTS}
RATES = (0.5, 0.125)
LOOP = Untying(loop=("core",), anchors=("core",), n_steps=3)


def load(model: nn.Module, checkpoint: tuple[float, dict[str, Tensor]]) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


def influence(case: Case = CASES[0], dtype: torch.dtype = torch.float64, **changes: Any) -> SDIInfluence:
    weights = [(RATES[0], dict(case.model(dtype).state_dict())), (RATES[1], dict(case.make().to(dtype).state_dict()))]
    settings = {"layers": None, "batch_size": 3, "sketch": Exact(), **changes}
    return SDIInfluence(case.model(dtype), TRAIN, weights, load, **settings)


@pytest.mark.parametrize("layers", ["loop", None])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_a_direction_is_the_truth_of_its_groups(case: Case, layers: str | None) -> None:
    steps = influence(case, layers=layers).direction(GROUPS).step_influence(TEST)
    expected = torch.zeros(len(TEST), 2, 5, dtype=torch.float64)
    for eta, model in zip(RATES, (case.model(), case.make().double()), strict=True):
        gradients = torch.stack([case.gradients(model.eval(), row, layers).sum(0) for row in TRAIN])
        directions = torch.stack([gradients[0] + gradients[-1], WEIGHTS @ gradients])
        for q, row in enumerate(TEST):
            expected[q] += eta * directions @ case.gradients(model, row, layers).T
    received = torch.cat([steps.prelude.unsqueeze(-1), steps.coda.unsqueeze(-1), steps.trajectories], dim=-1)
    assert (received - expected).abs().max() <= 1e-10 * expected.abs().max()
    torch.testing.assert_close(steps.influence_scores, expected.sum(-1))
    assert not steps.score_errors.any()
    assert list(steps.words.train) == ["ends", "weighed"]


def test_every_token_is_the_sum_of_its_exact_scores() -> None:
    """In float32, to the 1e-5 that is asked for; rows of a padded batch and of batches of one."""
    sdi = influence(dtype=torch.float32)
    direction = sdi.direction([0, 2])
    exact = sdi.step_influence(TEST, per="token")
    expected = exact.trajectories[:, [0, 2]].sum(1)
    for inputs in (TEST, DataLoader(TEST, 1, collate_fn=Collator())):
        tokens = direction.step_influence(inputs, per="token")
        assert torch.equal(tokens.token_of, exact.token_of)
        assert (tokens.trajectories[:, 0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    split = direction.influence_map(TEST, tokenizer=lambda ids: [str(token) for token in ids])
    assert split.axes == ("group", "token", "step")
    assert split.test_tokens is not None
    assert len(split.test_tokens) == len(TEST)
    for row, (q, place) in enumerate(exact.token_of.tolist()):
        one_token = split.sel(group="group", token=place).values[q, 0]
        torch.testing.assert_close(one_token[1:-1], expected[row], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    totals = direction.step_influence(TEST).influence_scores
    torch.testing.assert_close(split.total(), totals, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_which_group_acts_at_which_step_on_which_word_is_one_picture() -> None:
    values = torch.arange(24.0).reshape(1, 1, 2, 3, 4)
    labels = {"group": ("wiki", "code"), "token": (0, 1, 2), "step": ("prelude", 0, 1, "coda")}
    values[..., 0] = 0
    words = (("a", "b", "c"),)
    split = InfluenceMap(values, ("group", "token", "step"), labels, torch.zeros(1, 1).long(), test_tokens=words)
    ax = plot_map(split, x="token", y=("group", "step"), ax=Figure().subplots())
    rows_shown = [label.get_text() for label in ax.get_yticklabels()]
    assert rows_shown == ["wiki 1", "wiki 2", "wiki coda", "code 1", "code 2", "code coda"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b", "c"]
    assert ax.get_title(loc="left") == "test 0"
    drawn = torch.as_tensor(ax.get_images()[0].get_array().data).reshape(6, 3)
    expected = values[0, 0, :, :, 1:].transpose(1, 2).reshape(6, 3)
    assert torch.equal(drawn.float(), expected)
    with pytest.raises(ValueError, match="x and y are both 'token'"):
        plot_map(split, x="token", y=("group", "token"))


def test_depth_by_example_is_exact_in_ragged_batches() -> None:
    """Each example with as many loops as it is long, in one padded batch: scores, and directions, of each one alone."""
    case = Case("no positions", looped_gpt(has_positions=False, injection="add", n_prelude=0, n_coda=0), LOOP)
    model = case.model()
    train, test = [with_depth(row) for row in TRAIN[:3]], [with_depth(row) for row in TEST]
    sdi = SDIInfluence(model, train, batch_size=3, sketch=Exact())
    steps = sdi.step_influence(test)
    assert steps.n_steps.tolist() == [6, 6, 6]  # of the batch
    expected = torch.zeros(3, 3, 6, dtype=torch.float64)
    totals = []
    for row in TRAIN[:3]:
        totals.append(case.gradients(model, row, "loop", n_loops=len(row["labels"])).sum(0))
    for q, row in enumerate(TEST):
        depth = len(row["labels"])
        phi = case.gradients(model, row, "loop", n_loops=depth)[2:]
        expected[q, :, :depth] = torch.stack([phi @ total for total in totals])
    torch.testing.assert_close(steps.trajectories, expected)
    assert not steps.trajectories[1, :, 5:].any()
    sums = sdi.direction([0, 1, 2]).step_influence(test).trajectories[:, 0]
    torch.testing.assert_close(sums, expected.sum(1))


def with_depth(row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**row, "n_loops": torch.tensor(len(row["labels"]))}


class WithStates(nn.Module):
    """A loop with a parameter that no layer's call uses, a first step without gradient, and an operation in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 6)
        self.gates = nn.Parameter(torch.randn(3, 6))
        self.block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        state = self.embed(input_ids)
        for step in range(3):
            with torch.set_grad_enabled(step > 0):
                state = self.block(state)
            state = self.norm(state * self.gates[step])
        return self.head(state)


def plain(**changes: Any) -> SDIInfluence:
    model = WithStates().double()
    settings = {"layers": None, "batch_size": 2, "sketch": Exact(), "loop": "block", **changes}
    return SDIInfluence(model, TRAIN, **settings)


def test_steps_without_a_graph_are_zero_and_stray_uses_belong_to_their_moment() -> None:
    sdi = plain()
    exact = sdi.step_influence(TEST)
    steps = sdi.direction([1, 3]).step_influence(TEST)
    for name in ("trajectories", "prelude", "coda", "influence_scores"):
        expected = getattr(exact, name)[:, [1, 3]].sum(1)
        torch.testing.assert_close(getattr(steps, name)[:, 0], expected)
    assert not exact.prelude.any()  # nothing flows through the step without a graph
    assert steps.trajectories[:, :, 1:].all()


def test_the_model_is_given_back_and_its_changes_noticed() -> None:
    sdi = plain()
    parameters = dict(sdi.model.named_parameters())
    direction = sdi.direction([1])
    direction.step_influence(TEST)
    left = dict(sdi.model.named_parameters())
    assert all(left[name] is parameter and parameter.requires_grad for name, parameter in parameters.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sdi.model.modules())
    with torch.no_grad():
        sdi.model.head.bias.add_(1)
    with pytest.raises(ValueError, match="have changed since this direction was made"):
        direction.step_influence(TEST)
    direction = sdi.direction([1])
    sdi.model.head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"its trainable parameters.*have changed since this direction was made"):
        direction.step_influence(TEST)


def test_a_direction_of_an_offloaded_model_is_the_same() -> None:
    model = CASES[0].model()
    sdi = SDIInfluence(model, rows(3, seed=1), loop="core", sketch=Exact())
    kept = sdi.direction([0, 2]).step_influence(rows(1, seed=2))
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    brought = sdi.direction([0, 2]).step_influence(rows(1, seed=2))
    torch.testing.assert_close(brought.trajectories, kept.trajectories)


def test_after_the_first_batch_nothing_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    direction = plain().direction([1, 2])
    first = direction.step_influence(TEST)
    monkeypatch.setattr(torch.autograd, "grad", None)
    torch.testing.assert_close(direction.step_influence(TEST).trajectories, first.trajectories)


def test_batches_of_other_depths_are_noted_anew() -> None:
    """A batch's uses are taken to be those of the batch before, until its pass says otherwise."""
    case = Case("no positions", looped_gpt(has_positions=False, injection="add", n_prelude=0, n_coda=0), LOOP)
    sdi = SDIInfluence(case.model(), TRAIN[:2], batch_size=2, sketch=Exact())
    batches = [
        Collator()([{**row, "n_loops": torch.tensor(depth)}]) for row, depth in zip(TEST, (2, 4, 1), strict=True)
    ]
    direction = sdi.direction([0, 1])
    together = direction.step_influence(DataLoader(batches, batch_size=None))
    assert together.n_steps.tolist() == [2, 4, 1]
    for received, batch in zip(together.trajectories, batches, strict=True):
        alone = direction.step_influence(DataLoader([batch], batch_size=None)).trajectories[0]
        assert alone.any()
        torch.testing.assert_close(received[..., : alone.shape[-1]], alone)
        assert not received[..., alone.shape[-1] :].any()


def test_layers_with_a_frozen_parameter_keep_it() -> None:
    sdi = plain()
    sdi.model.head.bias.requires_grad_(False)
    sdi.model.block[1].weight.requires_grad_(False)
    expected = sdi.step_influence(TEST)
    received = sdi.direction([1, 3]).step_influence(TEST)
    for name in ("trajectories", "coda"):
        torch.testing.assert_close(getattr(received, name)[:, 0], getattr(expected, name)[:, [1, 3]].sum(1))


def test_a_pass_that_depends_on_more_than_the_batch_is_refused() -> None:
    sdi = plain()
    direction = sdi.direction([1])
    direction.step_influence(TEST)
    calls = itertools.count()

    def call_again(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if next(calls) % 2:
            module.forward(sdi.model.block[1](args[0]))

    sdi.model.block.register_forward_hook(call_again)
    with pytest.raises(ValueError, match="its forward pass depends on more than the batch"):
        direction.step_influence(TEST)


SEEN = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.linear(q, k[0, 0], v[0, 0, :, 0]),
        lambda q, k, v: F.layer_norm(q, (3, 4), k[0, 0], None) + F.layer_norm(v, (4,), k[0, 0, 0], v[0, 0, 0]),
        lambda q, k, v: F.gelu(q) + F.gelu(k, approximate="tanh"),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SEEN.double()),
    ],
)
@pytest.mark.parametrize("n_moving", [1, 3])
def test_a_closed_form_is_torch_s_own_derivative(function: Any, n_moving: int) -> None:
    """Also where several arguments move, or a row of the attention sees nothing."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 2, 2, 3, 4, generator=generator, dtype=torch.float64)
    tangents = torch.randn(n_moving, 2, 2, 3, 4, generator=generator, dtype=torch.float64)

    def moving(*first: Tensor) -> Tensor:
        return function(*first, *points[n_moving:])

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(moving, tuple(points[:n_moving]), tuple(tangents))
        with ClosedForms():
            received = torch.func.jvp(moving, tuple(points[:n_moving]), tuple(tangents))
    torch.testing.assert_close(received, expected)


class Doubled(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return 2 * state

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class WronglyDoubled(Doubled):
    """One with a wrong forward derivative."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * tangent


class RightlyDoubled(Doubled):
    """One with the right forward derivative, along one direction at a time."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


def test_what_cannot_be_done_for_all_steps_at_once_is_done_one_by_one() -> None:
    doubled = []
    for operation in (RightlyDoubled.apply, lambda output: 2 * output):
        sdi = plain()
        sdi.model.block.register_forward_hook(lambda module, args, output, double=operation: double(output))
        doubled.append(sdi.direction([1]).step_influence(TEST).trajectories)
    torch.testing.assert_close(*doubled)
    assert doubled[0][:, :, 1:].all()


@pytest.mark.parametrize(
    ("operation", "sentence"),
    [
        (Doubled, "Forward-mode differentiation does not support this model: .*jvp"),
        (
            WronglyDoubled,
            r"Forward-mode derivatives of this model differ from its gradients, by 0\.\d+ of their length",
        ),
    ],
)
def test_a_model_without_a_right_forward_derivative_is_refused(operation: Any, sentence: str) -> None:
    sdi = plain()
    sdi.model.block.register_forward_hook(lambda module, args, output: operation.apply(output))
    direction = sdi.direction([1])
    with pytest.raises(ValueError, match=sentence):
        direction.step_influence(TEST)


class ByNeighbours(RightlyDoubled):
    """One whose derivatives, forward and backward, are others in a batch."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (2 if len(gradient) == 1 else 3) * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return (2 if len(tangent) == 1 else 3) * tangent


@pytest.mark.parametrize(
    ("operation", "batch_size", "sentence"),
    [
        (WronglyDoubled, 1, "Forward-mode derivatives of this model differ from its gradients"),
        (WronglyDoubled, 3, "Forward-mode derivatives of this model differ from its gradients"),
        (ByNeighbours, 3, r"The features of test example \d depend on the batch: in a batch of 3"),
    ],
)
def test_a_wrong_forward_derivative_is_told_from_one_that_neighbours_change(
    operation: Any, batch_size: int, sentence: str
) -> None:
    sdi = plain(batch_size=batch_size)
    direction = sdi.direction([1])
    sdi.model.block.register_forward_hook(lambda module, args, output: operation.apply(output))
    with pytest.raises(ValueError, match=sentence):
        direction.step_influence(TEST)


def test_that_nothing_repeats_is_said_once() -> None:
    with pytest.warns(UserWarning, match="Nothing repeats") as said:
        plain(loop="head").direction([1]).step_influence(TEST)
    assert sum("Nothing repeats" in str(warning.message) for warning in said) == 1


class WithoutMask(WithStates):
    """Fails on every mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            raise RuntimeError("the mask has another shape")
        return super().forward(input_ids)


@pytest.mark.filterwarnings("ignore:WithoutMask fails on the attention_mask")
def test_a_mask_that_only_the_test_batch_has_may_be_left_out() -> None:
    model = WithoutMask().double()
    train = [{name: column[:3] for name, column in row.items()} for row in TRAIN[:2]]
    sdi = SDIInfluence(model, train, layers=None, batch_size=3, sketch=Exact(), loop="block")
    received = sdi.direction([0, 1]).step_influence(TEST)
    expected = sdi.step_influence(TEST)
    torch.testing.assert_close(received.trajectories[:, 0], expected.trajectories.sum(1))


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({}, "groups is empty"),
        ([], "must be positions in train_dataset, or a weight for each"),
        ([0, 99], r"groups names training examples \[99\], and train_dataset has"),
        ([-1], "0 or more"),
        ([0.5, 0.5], "has weights of 2 training examples, and train_dataset has"),
        ({"none": torch.zeros(3)}, "finite, and not all zero"),
        ({"one": torch.ones(3), "other": torch.ones(4)}, r"has weights of \[3, 4\] training examples"),
        (None, "must be positions in train_dataset"),
        ([1, 0, 1], r"names training examples \[1\] more than once.*a mask of booleans"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plain().direction(groups)


@pytest.mark.parametrize("changes", [{"preconditioner": Fisher()}, {"normalize": "train"}], ids=str)
def test_a_study_that_changes_gradients_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="A direction is a sum of plain gradients, which"):
        plain(**changes).direction([0])


def test_a_loader_of_unknown_length_is_counted() -> None:
    train = [Collator()([row]) for row in TRAIN[:3]]
    sdi = SDIInfluence(WithStates(), DataLoader(train, batch_size=None), loop=LoopSpec(("block",)), batch_size=None)
    with pytest.raises(ValueError, match="names 2 training examples, of which train_dataset has 1"):
        sdi.direction([0, 5])
    with pytest.raises(ValueError, match="weights of 4 training examples, and train_dataset has 3"):
        sdi.direction(torch.ones(4))
    with pytest.raises(ValueError, match='per must be "token" or None'):
        sdi.direction([0]).step_influence(TEST, per="checkpoint")  # type: ignore[arg-type]
