"""Every wrong input gets its sentence before any work, and the user's model comes back exactly as it was."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, looped_gpt, rows
from reference import spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from captum_sdi import Exact, LoopSpec, SDIInfluence, TensorSketch, coverage_check
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.models import LoopedGPTForCausalLM

TRAIN, TEST = rows(5, seed=1), rows(2, seed=2)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of the user's that a call could have disturbed, comparable with ==."""
    state: list[Any] = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    state += [torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
        state.append((name, module.training, hooks, sorted(vars(module))))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        state.append((name, id(tensor), tensor.tolist(), tensor.requires_grad, tensor.is_leaf, grad))
    config = getattr(model, "config", None)
    return [*state, None if config is None else config.to_dict()]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert snapshot(model) == before


def refused(
    match: str, model: nn.Module, *args: Any, call: Callable[[SDIInfluence], object] | None = None, **kwargs: Any
) -> None:
    """Construction or the call raises, says `match`, and nothing has changed."""
    call = call or (lambda sdi: sdi.step_influence(TEST))
    with unchanged(model), pytest.raises((ValueError, TypeError), match=match):
        call(SDIInfluence(model, *args, **kwargs))


def a_model(train: bool = True) -> nn.Module:
    """In training mode, partly frozen, with a gradient and a hook of the user's: all of it must survive."""
    model = CASES[0].model(torch.float32).train(train)
    model.wpe.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.ln_f.register_forward_hook(lambda *_: None)
    return model


class Plain(nn.Module):
    """A loop over tensors, no language model: `up` and `down` three times."""

    def __init__(self, change: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.up, self.down, self.change = nn.Linear(4, 6), nn.Linear(6, 4), change

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.down(self.change(self.up(x)))
        return x


def tensors(n: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randn(2, 4, generator=generator)) for _ in range(n)]


# --- the model comes back, also after calls that work ---


@pytest.mark.parametrize("kwargs", [{}, {"activation_checkpointing": True}, {"layers": None, "sketch": Exact()}])
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_as_before_after_every_call(kwargs: dict[str, Any], mode: bool) -> None:
    model = a_model(mode)
    other = {name: value + 0.1 for name, value in model.state_dict().items()}

    def load(model: nn.Module, weights: dict[str, Tensor]) -> float:
        model.load_state_dict(weights, assign=True)  # other Parameter objects
        model.eval().requires_grad_(False)
        torch.rand(1)
        return 0.1

    for checkpoints in (None, [other, other]):
        sdi = SDIInfluence(model, TRAIN, checkpoints, load, batch_size=2, **kwargs)
        for call in (
            lambda sdi: sdi.influence(TEST, k=2),
            lambda sdi: sdi.step_influence(TEST),
            lambda sdi: sdi.step_influence(TEST, k=1),
            lambda sdi: sdi.step_matrix(TEST),
            lambda sdi: sdi.self_influence(),
            lambda sdi: sdi.step_self_influence(),
            lambda sdi: sdi.compute_intermediate_quantities(TEST),
        ):
            with unchanged(model):
                call(sdi)
    with unchanged(model):
        coverage_check(model, Collator()(TRAIN))


def test_it_works_where_gradients_are_off_and_leaves_them_off() -> None:
    model = a_model()
    expected = SDIInfluence(model, TRAIN).influence(TEST)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), unchanged(model):
            assert torch.equal(SDIInfluence(model, TRAIN).influence(TEST), expected)


@pytest.mark.parametrize("fail_at", [0, 1, 3, 6])
def test_the_model_is_as_before_after_failing_half_way(fail_at: int) -> None:
    """The loss fails at its n-th call: in the rehearsal, at the test side, at the train side."""
    model = a_model()
    calls = 0

    def loss(output: Any, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise RuntimeError("the user's loss failed")
        return output.logits.sum((1, 2))

    loss.reduction = "none"  # type: ignore[attr-defined]
    weights = [{name: value + i for name, value in model.state_dict().items()} for i in range(2)]
    load = lambda model, state: model.load_state_dict(state) and 1.0  # noqa: E731
    sdi = SDIInfluence(model, TRAIN, weights, load, loss_fn=loss)
    with unchanged(model), pytest.raises(RuntimeError, match="the user's loss failed"):
        sdi.influence(TEST)


# --- losses and labels ---


def test_no_loss_and_no_labels() -> None:
    unlabelled = [{"input_ids": row["input_ids"]} for row in TRAIN]
    refused("no labels and no loss_fn", a_model(), unlabelled)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_example_without_a_target_has_no_influence_and_is_named_once(batch_size: int) -> None:
    train = [*TRAIN[:2], {**TRAIN[2], "labels": torch.full_like(TRAIN[2]["labels"], -100)}, TRAIN[3]]
    sdi = SDIInfluence(a_model(), train, [1, 2], lambda *_: 1.0, batch_size=batch_size)
    with pytest.warns(UserWarning, match=r"train_dataset: example\(s\) \[2\] have no target") as caught:
        scores = sdi.influence(TEST)
    assert len(caught) == 1
    assert not scores[:, 2].any()
    assert scores[:, [0, 1, 3]].all()


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("labels", [[3], [3, -100, -100]])
def test_an_example_whose_first_token_alone_has_a_label_has_no_target(place: int, labels: list[int]) -> None:
    row = {"input_ids": torch.tensor([3] * len(labels)), "labels": torch.tensor(labels)}
    train = [*TRAIN[:place], row, *TRAIN[place:4]]
    for batch_size in (1, 2):
        with pytest.warns(UserWarning, match=rf"train_dataset: example\(s\) \[{place}\] have no target") as caught:
            scores = SDIInfluence(a_model(), train, batch_size=batch_size).influence(TEST)
        assert [warning.filename for warning in caught] == [__file__]
        assert scores.any(0).tolist() == [i != place for i in range(5)]


def test_labels_of_one_position_are_targets_where_nothing_is_shifted() -> None:
    model, row = CASES[3].model(), {"input_ids": torch.tensor([3]), "labels": torch.tensor([4])}
    assert SDIInfluence(model, [row, *TRAIN]).influence(TEST).all()


def test_many_examples_without_a_target_are_not_all_listed() -> None:
    row = {"input_ids": torch.tensor([3]), "labels": torch.tensor([3])}
    with pytest.warns(UserWarning, match=r"8, 9, 10\] and 5 more have no target"):
        SDIInfluence(a_model(), [TRAIN[0], *[row] * 15]).influence(TEST)


def cut(output: Any, labels: Tensor) -> Tensor:
    """A loss that no gradient leads back from."""
    return output.logits.detach().sum((1, 2))


def constant(output: Any, labels: Tensor) -> Tensor:
    return torch.zeros(len(labels))


cut.reduction = constant.reduction = "none"  # type: ignore[attr-defined]


@pytest.mark.parametrize("loss", [cut, constant])
def test_a_loss_without_a_gradient(loss: Any) -> None:
    match = r"loss does not require a gradient: {} or.*\.detach\(\)"
    refused(match.format("loss_fn"), a_model(), TRAIN, loss_fn=loss)
    refused(match.format("test_loss_fn"), a_model(), TRAIN, test_loss_fn=loss)
    with pytest.raises(ValueError, match=match.format("loss_fn")):
        coverage_check(a_model(), Collator()(TRAIN), loss_fn=loss)


def test_a_model_whose_output_is_detached() -> None:
    class Detached(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    mse = nn.MSELoss(reduction="none")
    refused("model's forward probably cuts", Detached(), tensors(), loss_fn=mse, call=lambda s: s.self_influence())


def test_a_loss_of_other_parameters_than_the_targeted_ones_is_no_error() -> None:
    class Two(Plain):
        def forward(self, x: Tensor) -> Any:
            return self.up(x), super().forward(x)

    def first(output: Any, labels: Tensor) -> Tensor:
        return output[0].sum(1)

    first.reduction = "none"  # type: ignore[attr-defined]
    assert not SDIInfluence(Two(), tensors(), loss_fn=first, layers=["down"], loop="down").self_influence().any()


def test_weights_that_are_not_finite_are_not_blamed_on_the_loss() -> None:
    model = a_model()
    model.core.blocks[0].ln_1.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss of test example\(s\) \[0\] is not finite at checkpoint 'current'"):
        SDIInfluence(model, TRAIN).influence(TEST)
    with pytest.raises(ValueError, match="The loss of the batch is nan"):
        coverage_check(model, Collator()(TRAIN))


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize(("place", "id"), [(0, 11), (3, 11), (3, -1)])
def test_ids_that_the_model_does_not_know(key: str, place: int, id: int, batch_size: int) -> None:
    train = [{name: value.clone() for name, value in row.items()} for row in TRAIN]
    train[place][key][-1] = id
    ignored = ", or -100" if key == "labels" else r"\."
    match = rf"{key} of train example {place} hold {id}, but the model knows 0 to 10{ignored}"
    refused(match, a_model(), train, batch_size=batch_size)


def test_a_label_that_is_not_predicted_may_be_anything() -> None:
    train = [{**row, "labels": torch.cat([torch.tensor([-1]), row["labels"][1:]])} for row in TRAIN]
    sdi = SDIInfluence(a_model(), train, loss_fn=TokenCrossEntropy())
    assert torch.equal(sdi.influence(TEST), SDIInfluence(a_model(), TRAIN).influence(TEST))


def test_ids_of_other_types() -> None:
    def as_type(dtype: torch.dtype) -> list[dict[str, Tensor]]:
        return [{name: value.to(dtype) for name, value in row.items()} for row in TRAIN]

    refused(r"input_ids must be the integer ids.*torch.float32 for train example 0", a_model(), as_type(torch.float32))
    expected = SDIInfluence(a_model(), TRAIN).self_influence()
    assert torch.equal(SDIInfluence(a_model(), as_type(torch.int32)).self_influence(), expected)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (
            lambda output, labels: output.logits.mean(),
            r"^loss_fn .*of shape \(\) for a batch of 1.*of shape \(1,\).*not CausalLMOutput",
        ),
        (lambda output, labels: output.logits.sum((0, 2)), r"of shape \(.*Return one value per example"),
        (lambda output, labels: 3.0, "must return a tensor, got float"),
    ],
)
def test_a_loss_of_the_wrong_shape(loss: Any, match: str) -> None:
    loss.reduction = "none"
    refused(match, a_model(), TRAIN, loss_fn=loss, batch_size=2)


def test_a_loss_that_is_no_function() -> None:
    refused("loss_fn must be a function of", a_model(), TRAIN, loss_fn="mse")


def test_labels_that_do_not_fit_the_logits() -> None:
    train = [{"input_ids": row["input_ids"], "labels": row["labels"].float()} for row in TRAIN]
    refused("do not fit logits of shape.*Pass loss_fn=", a_model(), train)


def test_a_default_loss_that_is_not_the_models_own() -> None:
    class Smoothed(looped_gpt()().__class__):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, labels=labels, **kwargs)
            output.loss = None if output.loss is None else output.loss + 0.5
            return output

    refused("The default loss.*the model's own loss.*Pass loss_fn=", spread(Smoothed(looped_gpt()().config)), TRAIN)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_names_checkpoint_and_example(where: str) -> None:
    train = tensors()
    train[4] = (torch.full((4,), float("nan") if where == "loss" else 0.0), torch.zeros(4))
    root = torch.sqrt if where == "gradient" else torch.tanh  # the slope of a root is infinite at zero
    model = Plain(lambda x: root(x.abs()))
    nn.init.zeros_(model.up.bias)
    refused(
        rf"The {where} of train example\(s\) \[4\] is not finite at checkpoint 'early.pt'",
        model,
        train,
        ["early.pt", "late.pt"],
        lambda *_: 1.0,
        loss_fn=nn.MSELoss(reduction="none"),
        batch_size=2,
        call=lambda sdi: sdi.step_influence(tensors(2)),
    )


# --- batches ---


def test_a_batch_whose_leaves_disagree() -> None:
    batch = {**Collator()(TEST), "position_ids": torch.arange(9).unsqueeze(0)}
    refused(
        "disagree on the number of examples.*'position_ids': 1", a_model(), TRAIN, call=lambda sdi: sdi.influence(batch)
    )


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (torch.zeros(2, 3),), 7])
def test_a_batch_of_the_wrong_type(batch: Any) -> None:
    refused("must be a", a_model(), TRAIN, call=lambda sdi: sdi.influence(batch))


@pytest.mark.parametrize("texts", [["a", "b"], [{"text": "a"}, {"text": "b"}]])
def test_texts(texts: list[Any]) -> None:
    refused(r"Tokenize texts first.*captum_sdi\.texts\(texts, tokenizer\)", a_model(), texts)
    refused("Tokenize texts first", a_model(), TRAIN, call=lambda sdi: sdi.influence(texts))


def test_a_list_of_batches_where_rows_are_meant() -> None:
    batches = [Collator()(TRAIN[:3]), Collator()(TRAIN[3:])]
    match = r"of shape \(3, 9\): it is a batch.*DataLoader\(batches, batch_size=None\)"
    refused(match, a_model(), batches)
    refused(match, a_model(), TRAIN, call=lambda sdi: sdi.influence(batches))
    loader = DataLoader(batches, batch_size=None)
    scores = SDIInfluence(a_model(), loader).influence(loader)
    assert torch.allclose(scores, SDIInfluence(a_model(), TRAIN).influence(TRAIN))


def test_a_generator() -> None:
    refused("train_dataset must be a Dataset.*got generator.*make a list", a_model(), (row for row in TRAIN))
    refused("inputs must be .*got generator", a_model(), TRAIN, call=lambda sdi: sdi.influence(row for row in TEST))


def test_forward_keywords_that_do_not_fit() -> None:
    class Strict(Plain):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return scale * super().forward(x)

    kwargs: dict[str, Any] = {"loss_fn": nn.MSELoss(reduction="none"), "call": lambda sdi: sdi.self_influence()}
    refused(r"Strict could not be called.*'scale'.*forward_kwargs=", Strict(), tensors(), **kwargs)
    match = r"Strict could not be called.*\['scale', 'sale'\].*'sale'.*forward_kwargs="
    for loop in (None, "up"):
        refused(match, Strict(), tensors(), loop=loop, forward_kwargs={"scale": 1.0, "sale": 2.0}, **kwargs)


def test_a_row_where_a_batch_is_meant() -> None:
    refused(r"one row of a dataset.*pass it in a list, \[row\]", a_model(), TRAIN, call=lambda s: s.influence(TRAIN[0]))


def test_something_that_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        SDIInfluence("gpt2", TRAIN)  # type: ignore[arg-type]


def test_ragged_tuple_rows_have_no_place_for_a_mask() -> None:
    train = [(row["input_ids"], row["labels"]) for row in TRAIN]
    refused("tuples have no place for an attention mask", a_model(), train, batch_size=2)


def test_keys_that_forward_does_not_take_are_dropped_with_one_warning() -> None:
    train = [{**row, "text": "words", "idx": torch.tensor(i)} for i, row in enumerate(TRAIN)]
    sdi = SDIInfluence(a_model(), train, batch_size=2)
    with pytest.warns(UserWarning, match=r"does not take \['idx', 'text'\]: dropped") as caught:
        scores = sdi.influence(TEST)
    assert len(caught) == 1
    assert torch.allclose(scores, SDIInfluence(a_model(), TRAIN, batch_size=2).influence(TEST))


@pytest.mark.parametrize("kwargs", [{"shuffle": True}, {"drop_last": True}])
def test_a_loader_that_shuffles_or_drops(kwargs: dict[str, Any]) -> None:
    loader = DataLoader(TRAIN, batch_size=2, collate_fn=Collator(), **kwargs)
    refused("train_dataset (shuffles|has drop_last)", a_model(), loader)
    refused("inputs (shuffles|has drop_last)", a_model(), TRAIN, call=lambda sdi: sdi.influence(loader))


def test_a_sampler_that_draws_is_one_that_shuffles() -> None:
    sampler = LengthGroupedSampler(2, lengths=[len(row["input_ids"]) for row in TRAIN])
    loader = DataLoader(TRAIN, batch_size=2, collate_fn=Collator(), sampler=sampler)
    refused("train_dataset shuffles", a_model(), loader)
    backwards = DataLoader(TRAIN, batch_size=2, collate_fn=Collator(), sampler=[4, 3, 2, 1, 0])
    scores = SDIInfluence(a_model(), backwards).influence(TEST)
    assert torch.allclose(scores.flip(1), SDIInfluence(a_model(), TRAIN, batch_size=2).influence(TEST), atol=1e-6)


class Restless(IterableDataset):
    """Yields what `passes` says, one list per pass."""

    def __init__(self, *passes: list[Any]) -> None:
        self.passes = iter(passes)

    def __iter__(self) -> Iterator[Any]:
        return iter(next(self.passes))


@pytest.mark.filterwarnings("ignore:Unable to determine the number of batches")
@pytest.mark.parametrize(
    ("second", "match"),
    [
        (TRAIN[:3], "ended after 3 batches instead of 5"),
        (TRAIN[::-1], "batch 0 is another one"),
        ([*TRAIN, TRAIN[0]], "batch 5 is another one"),
        ([], "ended after 0 batches instead of 5"),
    ],
)
def test_an_iterable_that_yields_something_else_at_the_next_checkpoint(second: list[Any], match: str) -> None:
    refused(match, a_model(), Restless(TRAIN, second), [1, 2], lambda *_: 1.0)


@pytest.mark.filterwarnings("ignore:Unable to determine the number of batches")
def test_an_iterable_that_can_be_read_once_loses_no_batch() -> None:
    """Looking for the loop on the first batch must not swallow it."""
    model = Plain()
    loss = nn.MSELoss(reduction="none")
    test = tuple(torch.stack(column) for column in zip(*tensors(2), strict=True))
    once = SDIInfluence(model, Restless(tensors()), loss_fn=loss, batch_size=2)
    assert torch.allclose(once.influence(test), SDIInfluence(model, tensors(), loss_fn=loss).influence(test))


def test_an_empty_training_set() -> None:
    refused("train_dataset is empty", a_model(), [])


# --- layers, loops, parameters ---


def test_unknown_names_suggest_the_nearest() -> None:
    refused("layers= names 'core.block.0'.*Nearest: .*'core.blocks.0'", a_model(), TRAIN, layers=["core.block.0"])
    refused("loop= names 'cor'.*Nearest: .*'core'", a_model(), TRAIN, loop="cor")
    refused("loop= names 'coda.7'", a_model(), TRAIN, loop=LoopSpec(("core",), ("coda.7",)))


def test_a_bare_string_where_a_list_of_layers_is_meant() -> None:
    refused(r"`layers` should be a list! .*pass layers=\['core'\]", a_model(), TRAIN, layers="core")


def test_layers_with_no_trainable_parameter() -> None:
    model = a_model()
    model.core.requires_grad_(False)
    refused("no trainable parameter in the loop", model, TRAIN)
    refused("no trainable parameter in the loop", model, TRAIN, loop="core")
    refused(r"no trainable parameter in LoopedGPT", model.requires_grad_(False), TRAIN, layers=None)


class WithBareParameter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_a_parameter_beside_all_layers_is_exact() -> None:
    """One the model itself holds, whose call is of all steps, and an attention that is the whole model."""
    batch = tuple(torch.stack(column) for column in zip(*tensors(), strict=True))
    settings = {"layers": None, "loss_fn": nn.MSELoss(reduction="none")}
    for model in (WithBareParameter(), nn.MultiheadAttention(4, 2, batch_first=True)):
        kwargs: dict[str, Any] = {"loop": "up"} if isinstance(model, Plain) else {"loop": ""}
        with unchanged(model):
            if isinstance(model, nn.MultiheadAttention):
                x, y = (tensor.unsqueeze(1) for tensor in batch)
                table = coverage_check(model, (x, x, x, y), **{**settings, **kwargs, "loss_fn": first_of_two})
            else:
                table = coverage_check(model, batch, **settings, **kwargs)
        assert max(table.differences) < 1e-5


def first_of_two(output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    return (output[0] - labels).square()


class Unused(Plain):
    """Holds a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_a_layer_that_is_never_called() -> None:
    refused(
        r"never called the layer that owns 'spare.weight', 'spare.bias'.*out with layers=\['up', 'down'\]",
        Unused(),
        tensors(),
        loss_fn=nn.MSELoss(reduction="none"),
        layers=None,
        loop="up",
        call=lambda sdi: sdi.self_influence(),
    )


def test_coverage_check_reaches_a_weight_used_beside_its_layer() -> None:
    class Beside(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.up.weight.T @ self.down.weight.T

    batch = tuple(torch.stack(column) for column in zip(*tensors(), strict=True))
    loss = nn.MSELoss(reduction="none")
    model = Beside()
    with unchanged(model):
        assert max(coverage_check(model, batch, layers=None, loop="up", loss_fn=loss).differences) < 1e-5
    assert max(coverage_check(Plain(), batch, layers=None, loss_fn=loss).differences) < 1e-5


def test_coverage_check_does_not_pass_what_is_not_a_number() -> None:
    class Infinite(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 1, bias=False)
            nn.init.zeros_(self.last.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.last(x).square().sqrt()  # its slope at zero: 0 times infinity

    batch = tuple(torch.stack(column) for column in zip(*tensors(), strict=True))
    with pytest.raises(ValueError, match=r"nan"):
        coverage_check(Infinite(), batch, layers=None, loop="up", loss_fn=nn.MSELoss(reduction="none"))


def test_a_model_in_which_nothing_repeats_is_one_step() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    sdi = SDIInfluence(model, tensors(), loss_fn=nn.MSELoss(reduction="none"), sketch=Exact())
    with pytest.warns(UserWarning, match="Nothing repeats in Sequential: it is taken as one loop step"):
        steps = sdi.step_influence(tuple(torch.stack(column) for column in zip(*tensors(2), strict=True)))
    assert steps.trajectories.shape == (2, 6, 1)
    assert torch.allclose(steps.trajectories[..., 0], steps.influence_scores)
    assert not steps.coda.any()


@pytest.mark.parametrize("loop", ["", "second"])
def test_a_named_loop_that_does_not_repeat(loop: str) -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 6), second=nn.Linear(6, 4)))
    sdi = SDIInfluence(model, tensors(), loss_fn=nn.MSELoss(reduction="none"), loop=loop)
    with pytest.warns(UserWarning, match=rf"Nothing repeats: .*'{loop}'.* runs once in the first train") as caught:
        sdi.step_self_influence()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_model_on_meta() -> None:
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ValueError, match=r"'up.weight' is on the meta device"):
        SDIInfluence(model, tensors())


def test_a_model_that_answers_differently_each_time() -> None:
    model = Plain(lambda x: x + torch.randn_like(x))
    refused(
        "not deterministic", model, tensors(), loss_fn=nn.MSELoss(reduction="none"), call=lambda s: s.self_influence()
    )


class RandomState(LoopedGPTForCausalLM):
    """Starts its loop from noise, as Huginn does, unless it is given a state."""

    noise = 1.0

    def _initial_state(self, initial_state: Tensor | None, inputs: Tensor, position_ids: Tensor) -> Tensor:
        state = self.noise * torch.randn_like(inputs) if initial_state is None else initial_state
        return super()._initial_state(state, inputs, position_ids)


@pytest.mark.parametrize("noise", [1.0, 1e-3])  # little noise moves a loss by 1e-4 of it, and is noise all the same
def test_a_random_initial_state(noise: float) -> None:
    model = spread(RandomState(looped_gpt()().config))
    model.noise = noise
    refused("not deterministic: the first test example.*a seeded state in forward_kwargs=", model, TRAIN)
    fixed = {"forward_kwargs": lambda batch: {"initial_state": torch.zeros(*batch["input_ids"].shape, 8)}}
    sdi = SDIInfluence(model, TRAIN, **fixed)
    assert torch.equal(sdi.influence(TEST), sdi.influence(TEST))


# --- checkpoints ---


def test_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    refused("Invalid checkpoints provided for TracIn class: ", a_model(), TRAIN, str(tmp_path))
    refused("Invalid checkpoints provided for TracIn class: ", a_model(), TRAIN, str(tmp_path / "missing"))
    refused("Invalid checkpoints provided for TracIn class: ", a_model(), TRAIN, [])


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    looped_gpt(n_embd=16)().save_pretrained(tmp_path / "checkpoint-1")
    refused("does not fit the model", a_model(), TRAIN, str(tmp_path))


@pytest.mark.parametrize("eta", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number(eta: float) -> None:
    refused("returned the learning rate .* for checkpoint", a_model(), TRAIN, ["a.pt"], lambda *_: eta)


# --- settings ---


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_k_below_one(k: Any) -> None:
    refused("k must be an int of at least 1", a_model(), TRAIN, call=lambda sdi: sdi.influence(TEST, k=k))
    refused("k must be an int of at least 1", a_model(), TRAIN, call=lambda sdi: sdi.step_influence(TEST, k=k))


def test_rank_by() -> None:
    refused("pass k=", a_model(), TRAIN, call=lambda sdi: sdi.step_influence(TEST, rank_by=0))
    refused("pass k=", a_model(), TRAIN, call=lambda sdi: sdi.step_influence(TEST, k=2, rank_by=-1))
    for step in (2.0, "1", True):
        refused(
            "an int of 0", a_model(), TRAIN, call=lambda sdi, step=step: sdi.step_influence(TEST, k=2, rank_by=step)
        )
    refused("runs 3 loop steps", a_model(), TRAIN, call=lambda sdi: sdi.step_influence(TEST, k=2, rank_by=3))


def test_indices_outside_the_training_set() -> None:
    refused(
        "indices= names training examples .*5", a_model(), TRAIN, call=lambda s: s.step_matrix(TEST, indices=[0, 5])
    )
    refused("indices must be a list", a_model(), TRAIN, call=lambda sdi: sdi.step_matrix(TEST, indices=[-1]))


def test_sketch_settings() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TensorSketch(dim=0)
    with pytest.raises(TypeError, match=r"must be an int, got 2\.5"):
        TensorSketch(dim=2.5)  # type: ignore[arg-type]
    refused(r"sketch= must be TensorSketch\(...\) or Exact\(\), got 2048", a_model(), TRAIN, sketch=2048)


def test_batch_size() -> None:
    refused("batch_size must be at least 1, got 0", a_model(), TRAIN, batch_size=0)
    with pytest.raises(AssertionError, match="`batch_size` must be an int"):
        SDIInfluence(a_model(), TRAIN, batch_size=None)
    with pytest.raises(AssertionError, match="`batch_size` must be an int"):
        SDIInfluence(a_model(), TRAIN, batch_size=True)


def test_loop_specs() -> None:
    with pytest.raises(TypeError, match="must be a tuple of module names, got 'core'"):
        LoopSpec(modules="core")  # type: ignore[arg-type]
    refused("loop= must be a module's name.*got 5", a_model(), TRAIN, loop=5)
    with pytest.raises(ValueError, match="names no module"):
        LoopSpec(modules=())
