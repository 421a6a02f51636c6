"""`SDIInfluence.influence_map` against the slow truth along every axis, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, N_LOOPS, Case, rows
from reference import aliased_gradients, live_at, map_truth, one_target_loss, spread, step_gradients
from torch import Tensor, nn
from zoo import ZOO, Looped, _no_cache

from captum_sdi import Exact, InfluenceMap, SDIInfluence, TensorSketch
from captum_sdi.features import Dense, Gradient
from captum_sdi.maps import compute
from captum_sdi.maps.memory import Needs, Portions, portions
from captum_sdi.preconditioners import Hessian

pytestmark = pytest.mark.filterwarnings(r"ignore:\d+% of these scores come from")  # rates differ on purpose

LONGEST = 4
TRAIN = [row for row in rows(9, seed=1, longest=LONGEST) if (row["labels"][1:] != -100).any()]
TEST = rows(2, seed=2, longest=LONGEST)
PAIRS = [2, 1]
ETAS = (0.5, 0.125)
TRUTH_AXES = (
    "token", "train_token", "position", "train_position", "step", "train_step", "parameter", "checkpoint",
)  # fmt: skip


def checkpoints_of(case: Case) -> list[tuple[float, dict[str, Tensor]]]:
    models = case.model(torch.float32), spread(case.model(torch.float32), 0.1, seed=5)
    return [(eta, dict(model.state_dict())) for eta, model in zip(ETAS, models, strict=True)]


def load(model: nn.Module, checkpoint: tuple[float, dict[str, Tensor]]) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


def influence(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> SDIInfluence:
    settings: dict[str, Any] = {"layers": None, "batch_size": 2, "sketch": Exact(), **changes}
    return SDIInfluence(case.model(dtype), TRAIN, checkpoints_of(case), load, **settings)


def split_gradients(case: Case, model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    """One example's gradient by target, position and bin, each from a backward pass of its own."""
    names = case.names(model, None)
    shape = LONGEST, LONGEST, 2 + N_LOOPS, sum(model.get_parameter(name).numel() for name in names)
    parts = torch.zeros(shape, dtype=torch.float64)
    for position in range(len(row["input_ids"])):
        live = live_at(model, position)
        for column in range(len(row["labels"])):
            if row["labels"][column] == -100 or (case.causal and column == 0):
                continue

            def loss(untied: nn.Module, column: int = column) -> Tensor:
                logits = untied(input_ids=row["input_ids"].unsqueeze(0)).logits[0]
                return one_target_loss(logits, row["labels"], column, case.causal)

            parts[column, position] = step_gradients(live, loss, case.untying, names)
    return parts


@functools.cache
def truth_of(case: Case) -> Tensor:
    model, every = case.model(), []
    for checkpoint in checkpoints_of(case):
        eta = load(model, checkpoint)
        train = [split_gradients(case, model, TRAIN[index]) for index in PAIRS]
        every.append((eta, train, [split_gradients(case, model, row) for row in TEST]))
    sizes = [model.get_parameter(name).numel() for name in case.names(model, None)]
    return map_truth(every, sizes)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Relative to the largest entry: 1e-5 in float32, 1e-10 in float64."""
    assert ours.shape == theirs.shape
    tolerance = 1e-10 if ours.dtype == torch.float64 else 1e-5
    assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def summed_truth(case: Case, axes: tuple[str, ...]) -> Tensor:
    """The truth along some axes, in their order; layers are left as parameters."""
    full = truth_of(case)
    absent = [2 + place for place, axis in enumerate(TRUTH_AXES) if axis not in axes]
    kept = [axis for axis in TRUTH_AXES if axis in axes]
    summed = full.sum(absent) if absent else full
    return summed.permute(0, 1, *(2 + kept.index(axis) for axis in axes))


# --- the truth ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_all_axes_together_equal_the_truth(case: Case, dtype: torch.dtype) -> None:
    split = influence(case, dtype).influence_map(TEST, PAIRS, TRUTH_AXES)
    assert split.values.dtype == dtype
    assert_close(split.values, truth_of(case))
    assert split.errors is None
    assert split.indices.tolist() == [PAIRS] * len(TEST)
    assert split.labels["step"] == ("prelude", 0, 1, 2, "coda")
    assert split.labels["token"] == tuple(range(LONGEST))
    assert list(split.labels["parameter"]) == case.names(case.model(), None)


@pytest.mark.parametrize(
    "axes",
    [
        (),
        ("step",),
        ("token",),
        ("train_position", "token"),
        ("checkpoint", "position", "train_step"),
        ("parameter", "train_token", "step"),
    ],
    ids=" ".join,
)
def test_any_axes_in_any_order_equal_the_truth(axes: tuple[str, ...]) -> None:
    split = influence(CASES[0]).influence_map(TEST, PAIRS, axes)
    assert split.axes == axes
    assert_close(split.values, summed_truth(CASES[0], axes))


def test_a_layer_is_the_sum_of_its_parameters() -> None:
    split = influence(CASES[0]).influence_map(TEST, PAIRS, ("layer",))
    by_parameter = summed_truth(CASES[0], ("parameter",))
    names = CASES[0].names(CASES[0].model(), None)
    for place, layer in enumerate(split.labels["layer"]):
        own = [number for number, name in enumerate(names) if name.rpartition(".")[0] == layer]
        assert own
        assert_close(split.values[..., place], by_parameter[..., own].sum(-1))


def test_maps_sum_to_step_influence_and_the_step_matrix() -> None:
    sdi = influence(CASES[0], layers="loop")
    steps, matrix = sdi.step_influence(TEST), sdi.step_matrix(TEST, PAIRS)
    split = sdi.influence_map(TEST, PAIRS, ("token", "train_step", "step"))
    assert_close(split.total(), steps.influence_scores[:, PAIRS])
    assert_close(split.sum("token", "train_step").values[..., 1:-1], steps.trajectories[:, PAIRS])
    assert_close(split.sum("token").values[..., 1:-1, 1:-1], matrix)
    assert not split.sel(step=["prelude", "coda"]).values.any()
    for axis in ("layer", "checkpoint"):
        assert_close(sdi.influence_map(TEST, PAIRS, (axis,)).sum(axis).values, steps.influence_scores[:, PAIRS])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_padding_and_batches_change_nothing(batch_size: int) -> None:
    axes = ("token", "train_position", "step")
    split = influence(CASES[0], batch_size=batch_size).influence_map(TEST, PAIRS, axes)
    assert_close(split.values, summed_truth(CASES[0], axes))


def test_each_test_example_may_have_pairs_of_its_own() -> None:
    sdi = influence(CASES[0])
    top = sdi.step_influence(TEST, k=3)
    split = sdi.influence_map(TEST, top.indices, ("train_token", "step"))
    assert_close(split.total(), top.influence_scores)
    assert torch.equal(split.indices, top.indices)
    doubled = sdi.influence_map(TEST, [1, 1], ("step",)).values
    assert torch.equal(doubled[:, 0], doubled[:, 1])


def test_long_axes_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "portions", lambda needs, free: Portions(test_rows=3, train_rows=2))
    axes = ("token", "train_token", "position", "step")
    split = influence(CASES[0]).influence_map(TEST, PAIRS, axes)
    assert_close(split.values, summed_truth(CASES[0], axes))


# --- models ---


def token_gradients(looped: Looped, model: nn.Module, row: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """By target ``(2 + t, entries)``, of one example alone."""
    each = []
    first_names = {name for name, _ in model.named_modules()}  # of a module that has several
    modules, anchors = ([name for name in loop if name in first_names] for loop in (looped.modules, looped.anchors))
    for column in range(len(row["labels"])):

        def loss(model: nn.Module, column: int = column) -> Tensor:
            output = model(**{looped.inputs: row[looped.inputs].unsqueeze(0)}, **_no_cache(model))
            return one_target_loss(output.logits[0], row["labels"], column, looped.causal)

        by_name = aliased_gradients(model, loss, names, modules, anchors)
        each.append(torch.cat([by_name[name] for name in names], dim=1))
    return each


@pytest.mark.parametrize("looped", ZOO, ids=lambda looped: looped.name)
def test_tokens_and_steps_of_every_looped_model(looped: Looped) -> None:
    model = looped.model()
    data = looped.rows(n=3, longest=5)
    names = looped.in_loop(model)
    sdi = SDIInfluence(model, data, loss_fn=looped.loss_fn, batch_size=3, loop=looped.loop_of(model), sketch=Exact())
    split = sdi.influence_map(data[:1], [1], ("token", "step", "layer"))
    g = sum(token_gradients(looped, model, data[1], names)).sum(0)
    expected = torch.stack([phi @ g for phi in token_gradients(looped, model, data[0], names)])
    assert expected.abs().max() > 0
    order = [0, *range(2, expected.shape[1]), 1]
    n_places = len(split.labels["token"])
    assert not expected[n_places:].any()
    # Some compute norms in float32, whatever the model's dtype: as in test_looped_models.py.
    ours = split.sum("layer").values[0, 0]
    assert (ours - expected[:n_places, order]).abs().max() <= 1e-6 * expected.abs().max()


# --- other ways to compute ---


@dataclass(frozen=True)
class Weights:
    """P = the diagonal of the checkpoint's weights, before the sketch or behind it."""

    acts_on: str

    def fit(self, point: Any, train: Any) -> Callable[[str, Any], Any]:
        weights = {name: parameter.detach().clone() for name, parameter in point.capture.targets().items()}

        def gradient(name: str, grad: Gradient) -> Gradient:
            return Dense(grad.entries(weights[name].shape) * weights[name])

        def row(name: str, row: Tensor) -> Tensor:
            return row * weights[name].flatten()

        return gradient if self.acts_on == "gradient" else row


@pytest.mark.parametrize(
    "preconditioner", [Weights("gradient"), Weights("row"), Hessian(rank=4)], ids=lambda p: p.acts_on
)
def test_preconditioned_influence_is_split_alike(preconditioner: Any) -> None:
    sdi = influence(CASES[0], preconditioner=preconditioner, layers="loop")
    steps = sdi.step_influence(TEST)
    split = sdi.influence_map(TEST, PAIRS, ("token", "train_position", "step"))
    assert_close(split.sum("token", "train_position").values[..., 1:-1], steps.trajectories[:, PAIRS])


@pytest.mark.parametrize("normalize", ["train", "both"])
def test_parts_of_a_gradient_of_unit_norm(normalize: str) -> None:
    sdi = influence(CASES[0], normalize=normalize, preconditioner=Weights("gradient"))
    steps = sdi.step_influence(TEST)
    split = sdi.influence_map(TEST, PAIRS, ("token", "train_token", "position", "step"))
    summed = split.sum("token", "train_token", "position")
    assert_close(summed.values[..., 1:-1], steps.trajectories[:, PAIRS])


def test_an_index_is_neither_read_nor_written(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    split = influence(CASES[0], sketch=TensorSketch(8), index=folder).influence_map(TEST, PAIRS, ("token",))
    assert_close(split.values, summed_truth(CASES[0], ("token",)))
    assert not folder.exists()


def test_depth_may_differ_between_the_batches_and_checkpoints() -> None:
    def deepen(model: nn.Module, depth: int) -> float:
        model.config.n_loops = depth
        return 0.5

    model, data = CASES[0].model(), TRAIN
    sdi = SDIInfluence(model, data, [1, 3], deepen, layers=None, sketch=Exact())
    split = sdi.influence_map(TEST, PAIRS, ("step", "train_step", "checkpoint"))
    assert split.values.shape == (2, 2, 5, 5, 2)
    first = split.sel(checkpoint=split.labels["checkpoint"][0])
    assert not first.sel(step=[1, 2]).values.any()
    steps = sdi.step_influence(TEST)
    assert_close(split.sum("train_step", "checkpoint").values[..., 1:-1], steps.trajectories[:, PAIRS])

    by_length = lambda batch: {"n_loops": 1 + int(batch["labels"].shape[1]) % 3}  # noqa: E731
    sdi = SDIInfluence(model, data, layers=None, sketch=Exact(), forward_kwargs=by_length)
    split = sdi.influence_map(TEST, PAIRS, ("token", "step"))
    assert_close(split.total(), sdi.step_influence(TEST).influence_scores[:, PAIRS])


def test_sketched_maps_say_how_far_off_they_may_be() -> None:
    exact = influence(CASES[0]).influence_map(TEST, PAIRS, ("token", "step", "layer"))
    sketched = influence(CASES[0]).influence_map(TEST, PAIRS, ("token", "step", "layer"), sketch=TensorSketch(64))
    assert sketched.errors is not None
    noisy = sketched.errors > 0
    z = (sketched.values - exact.values)[noisy] / sketched.errors[noisy]
    assert 0.5 < z.square().mean().sqrt() < 2
    layers = sketched.sum("layer")
    torch.testing.assert_close(layers.errors, sketched.errors.square().sum(-1).sqrt())
    tokens = sketched.sum("token")
    direct = influence(CASES[0]).influence_map(TEST, PAIRS, ("step", "layer"), sketch=TensorSketch(64))
    assert (tokens.errors >= direct.errors * (1 - 1e-6)).all()
    torch.testing.assert_close(tokens.values, direct.values)


def test_a_pooled_sketch_splits_steps_and_no_layers() -> None:
    sdi, pooled = influence(CASES[0]), TensorSketch(64, pool=True)
    split = sdi.influence_map(TEST, PAIRS, ("step", "token"), sketch=pooled)
    sketched = influence(CASES[0], sketch=pooled).step_influence(TEST)
    torch.testing.assert_close(split.sum("token").values[..., 1:-1], sketched.trajectories[:, PAIRS])
    with pytest.raises(ValueError, match="The axis 'layer' needs rows of each parameter"):
        sdi.influence_map(TEST, PAIRS, ("layer",), sketch=pooled)


# --- losses ---


def by_token(output: Any, labels: Tensor) -> Tensor:
    """One value per token, as many users write it."""
    losses = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return losses / (labels[:, 1:] != -100).sum(1, keepdim=True)


by_token.reduction = "none"  # type: ignore[attr-defined]


def by_example(output: Any, labels: Tensor) -> Tensor:
    return by_token(output, labels).sum(1)


by_example.reduction = "none"  # type: ignore[attr-defined]


def test_a_loss_of_the_users_that_tells_tokens_apart() -> None:
    split = influence(CASES[0], loss_fn=by_token).influence_map(TEST, PAIRS, ("token", "train_token"))
    assert_close(split.values, summed_truth(CASES[0], ("token", "train_token")))


def test_a_loss_with_a_method_for_tokens() -> None:
    class Both:
        reduction = "none"
        token_losses = staticmethod(by_token)

        def __call__(self, output: Any, labels: Tensor) -> Tensor:
            return by_example(output, labels)

    split = influence(CASES[0], loss_fn=Both()).influence_map(TEST, PAIRS, ("token",))
    assert_close(split.values, summed_truth(CASES[0], ("token",)))


def test_a_loss_that_tells_no_tokens_apart_is_refused_where_tokens_are_asked_for() -> None:
    sdi = influence(CASES[0], loss_fn=by_example)
    assert_close(sdi.influence_map(TEST, PAIRS, ("position",)).values, summed_truth(CASES[0], ("position",)))
    with pytest.raises(ValueError, match=r"needs loss_fn to tell tokens apart, but it returned \(2,\)"):
        sdi.influence_map(TEST, PAIRS, ("token",))
    with pytest.raises(ValueError, match="Return one value per token"):
        sdi.influence_map(TEST, PAIRS, ("train_token",))


# --- what is refused, and what is left behind ---


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"axes": ("layers",)}, ValueError, r"axes= names \['layers'\]"),
        ({"axes": "layer"}, TypeError, "axes= must be a tuple of names"),
        ({"axes": ("step", "step")}, ValueError, "names an axis twice"),
        ({"axes": ("layer", "parameter")}, ValueError, "Take one"),
        ({"axes": ("update",)}, ValueError, "UnrolledInfluence follows them"),
        ({"indices": [0, 99]}, ValueError, r"names training examples \[99\]"),
        ({"indices": []}, ValueError, "indices must be positions in train_dataset"),
        ({"indices": [-1]}, ValueError, "0 or more"),
        ({"indices": [[0], [1], [2]]}, ValueError, "has 3 rows for 2 test examples"),
        ({"indices": [0.5]}, ValueError, "indices must be positions"),
        ({"sketch": TensorSketch}, TypeError, "sketch= must be TensorSketch"),
        ({"tokenizer": 3}, TypeError, "tokenizer= must have decode"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = {"inputs": TEST, "indices": PAIRS, "axes": ("step",), **changes}
    with pytest.raises(error, match=sentence):
        influence(CASES[0]).influence_map(**arguments)


def test_a_map_that_does_not_fit_is_refused_before_the_work() -> None:
    lengths = {"test": 2, "train": 10, "token": 1000, "position": 1000}
    small = {"test_row": 10, "train_row": 10, "test_cells": 1, "train_cells": 1, "number_bytes": 4}
    with pytest.raises(ValueError, match="Leave an axis out, such as the longest, 'token', or pass fewer pairs"):
        portions(Needs(lengths, **small, has_errors=False), free_bytes=10**8)
    large = {**small, "test_row": 10**8}
    with pytest.raises(ValueError, match=r"1\.2 GB for one row of gradients of each side; 50 MB may be used"):
        portions(Needs({"test": 1}, **large, has_errors=False), free_bytes=10**8)
    shares = portions(Needs({"test": 1}, **small, has_errors=True), free_bytes=10**8)
    assert shares.train_rows > 1
    assert shares.test_rows > 1


def test_the_estimate_is_asked_and_the_model_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "free_memory", lambda device: 1000)
    sdi = influence(CASES[0])
    before = {name: weight.clone() for name, weight in sdi.model.state_dict().items()}
    with pytest.raises(ValueError, match="The map needs"):
        sdi.influence_map(TEST, PAIRS, ("token",))
    assert all(torch.equal(weight, before[name]) for name, weight in sdi.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sdi.model.modules())


def test_tokens_are_kept_as_text() -> None:
    letters = "abcdefghijk"
    split = influence(CASES[0]).influence_map(
        TEST[:1], PAIRS, ("token", "train_position"), tokenizer=lambda ids: [letters[token] for token in ids]
    )
    assert split.test_tokens == (tuple(letters[token] for token in TEST[0]["input_ids"]),)
    assert split.tokens_along("train_position", 0, 0)[:4] == tuple(
        letters[token] for token in TRAIN[PAIRS[0]]["input_ids"]
    )
    last = split.test_tokens[0][-1]
    if split.test_tokens[0].count(last) == 1:
        assert torch.equal(split.sel(token=last).values, split.sel(token=LONGEST - 1).values)
    assert isinstance(split, InfluenceMap)


def test_what_mixes_positions_is_refused_where_positions_are_asked_for() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.core, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.embed(input_ids).mean(1)
            for _ in range(3):
                hidden = hidden + self.core(hidden)
            return self.head(hidden)

    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(4)} for _ in range(3)]
    sdi = SDIInfluence(spread(Flat()), data, loop="core", layers=None, sketch=Exact())
    split = sdi.influence_map(data[:1], [1], ("token", "layer"))
    torch.testing.assert_close(split.total(), sdi.influence(data[:1])[:, [1]])
    with pytest.raises(ValueError, match="token"):
        sdi.influence_map(data[:1], [1], ("position",))
