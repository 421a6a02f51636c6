"""Captum's contract: what TracInCP promises, `SDIInfluence` keeps; where TracInCP is wrong, `SDIInfluence` is right.

The second half has one test or more for each defect of captum 0.9's TracInCP, by number:

    C1  dot products of its intermediate quantities are η times the influence
    C2  its default load function returns no learning rate and refuses nested checkpoints
    C3  its fast mode drops the layers it does not know, without a word
    C4  it takes neither dict batches nor model outputs
    C5  it loads every checkpoint once per training batch
    C6  it uses the training loss's reduction for the test loss
    C7  it runs one backward pass per example and leaves the model at another checkpoint
    C8  it does not move batches to the model's device

Captum's own tests run through tests/captum_contract.py. Its test helpers are not used here: captum 0.8 has none.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.influence import DataInfluence, TracInCP
from captum.influence._utils.common import KMostInfluentialResults
from cases import VOCAB, looped_gpt
from reference import spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from captum_sdi import Exact, SDIInfluence, TensorSketch

pytestmark = pytest.mark.filterwarnings("ignore:Nothing repeats in")

ETAS = (0.5, 0.125, 2.0)
BATCH_SIZE = 2

Checkpoint = tuple[float, dict[str, Tensor]]


class Net(nn.Module):
    """No language model: any number of float inputs, three outputs."""

    def __init__(self, n_inputs: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(5 * n_inputs, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat(inputs, dim=1))))


class Logits(nn.Module):
    """A Hugging Face model as Captum wants it: tensors in, a tensor out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids=input_ids).logits


class NextToken(nn.Module):
    """Next-token cross-entropy, summed over positions."""

    def __init__(self, reduction: str = "none") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").sum(1)
        return losses if self.reduction == "none" else losses.sum()


@dataclass(frozen=True)
class Setting:
    """A model with data and checkpoints of different learning rates, for both classes."""

    model: nn.Module
    train: TensorDataset
    test: tuple[Tensor, ...]
    loss: nn.Module
    checkpoints: list[Checkpoint]

    def ours(self, **changes: Any) -> SDIInfluence:
        return self._made(SDIInfluence, sketch=Exact(), layers=None, **changes)

    def theirs(self, **changes: Any) -> TracInCP:
        return self._made(TracInCP, **changes)

    def _made(self, kind: Callable[..., Any], **changes: Any) -> Any:
        settings = {
            "train_dataset": self.train,
            "checkpoints": self.checkpoints,
            "checkpoints_load_func": load,
            "loss_fn": self.loss,
            "batch_size": BATCH_SIZE,
        }
        return kind(copy.deepcopy(self.model), **{**settings, **changes})


def load(model: nn.Module, checkpoint: Checkpoint) -> float:
    eta, weights = checkpoint
    model.load_state_dict(weights)
    return eta


def checkpoints_of(model: nn.Module) -> list[Checkpoint]:
    """One set of weights per learning rate; the model's own are none of them."""
    return [(eta, spread(copy.deepcopy(model), 0.1, seed=i).state_dict()) for i, eta in enumerate(ETAS)]


def floats(n_inputs: int = 1, dtype: torch.dtype = torch.float32) -> Setting:
    torch.manual_seed(0)
    model = spread(Net(n_inputs).to(dtype))
    train = [torch.randn(7, 5, dtype=dtype) for _ in range(n_inputs)]
    test = [torch.randn(4, 5, dtype=dtype) for _ in range(n_inputs)]
    data = TensorDataset(*train, torch.randn(7, 3, dtype=dtype))
    loss = nn.MSELoss(reduction="none")
    return Setting(model, data, (*test, torch.randn(4, 3, dtype=dtype)), loss, checkpoints_of(model))


def tokens(model: nn.Module, dtype: torch.dtype = torch.float32) -> Setting:
    torch.manual_seed(1)
    model = spread(Logits(model)).to(dtype)
    train, test = torch.randint(0, VOCAB, (5, 8)), torch.randint(0, VOCAB, (3, 8))
    return Setting(model, TensorDataset(train, train), (test, test), NextToken(), checkpoints_of(model))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=12, vocab_size=VOCAB)).eval()


SETTINGS: dict[str, Callable[[], Setting]] = {
    "linear": floats,
    "two inputs, float64": lambda: floats(2, torch.float64),
    "looped GPT": lambda: tokens(looped_gpt()()),
    "tied looped GPT, float64": lambda: tokens(looped_gpt(tie_word_embeddings=True)(), torch.float64),
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return SETTINGS[request.param]()


@pytest.fixture
def linear() -> Setting:
    return floats()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Relative to the largest entry: 1e-5 in float32, 1e-10 in float64."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    tolerance = 1e-10 if ours.dtype == torch.float64 else 1e-5
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def gradients(model: nn.Module, batch: tuple[Tensor, ...], loss: Callable[..., Tensor]) -> Tensor:
    """Ordinary autograd, one example at a time: ``(n, all parameters)``."""
    rows = []
    for i in range(len(batch[0])):
        *inputs, labels = (tensor[i : i + 1] for tensor in batch)
        grads = torch.autograd.grad(loss(model(*inputs), labels).sum(), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


# --- the interface ---


def test_arguments_are_tracincps_in_its_order_and_ours_come_after() -> None:
    assert TracInCP.__module__ == "captum.influence._core.tracincp"  # and not tests/captum_contract.py's
    theirs = list(inspect.signature(TracInCP).parameters.values())
    ours = list(inspect.signature(SDIInfluence).parameters.values())
    shared = len(theirs)
    assert [p.name for p in ours[:shared]] == [p.name for p in theirs[:shared]]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[shared:])


@pytest.mark.parametrize("method", ["influence", "self_influence", "compute_intermediate_quantities"])
def test_methods_take_captums_arguments_with_its_defaults(method: str) -> None:
    theirs = list(inspect.signature(getattr(TracInCP, method)).parameters.values())
    ours = list(inspect.signature(getattr(SDIInfluence, method)).parameters.values())[: len(theirs)]
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_it_is_a_captum_data_influence(linear: Setting) -> None:
    sdi = linear.ours()
    assert isinstance(sdi, DataInfluence)
    assert sdi.get_name() == "SDIInfluence"


def test_captums_positional_call_works(linear: Setting) -> None:
    arguments = (linear.train, linear.checkpoints, load, ["second"], linear.loss, BATCH_SIZE, linear.loss)
    ours = SDIInfluence(copy.deepcopy(linear.model), *arguments, sketch=Exact()).influence(linear.test)
    assert_close(ours, TracInCP(copy.deepcopy(linear.model), *arguments).influence(linear.test))


def test_inputs_are_required(linear: Setting) -> None:
    for tracin in (linear.ours(), linear.theirs()):
        with pytest.raises(AssertionError, match="`inputs` argument is required"):
            tracin.influence(None)


# --- equal to TracInCP, number by number ---


@pytest.mark.parametrize("aggregate", [False, True])
def test_scores_equal_tracincps(setting: Setting, aggregate: bool) -> None:
    ours = setting.ours().influence(setting.test, aggregate=aggregate)
    assert ours.shape == (1 if aggregate else len(setting.test[0]), len(setting.train))
    assert_close(ours, setting.theirs().influence(setting.test, aggregate=aggregate))


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("aggregate", [False, True])
def test_top_k_equals_tracincps(setting: Setting, proponents: bool, aggregate: bool) -> None:
    ours = setting.ours().influence(setting.test, 3, proponents, aggregate=aggregate)
    theirs = setting.theirs().influence(setting.test, 3, proponents, aggregate=aggregate)
    assert isinstance(ours, KMostInfluentialResults)
    assert ours.indices.dtype == torch.long
    assert torch.equal(ours.indices, theirs.indices)
    assert_close(ours.influence_scores, theirs.influence_scores)


@pytest.mark.parametrize("outer_loop_by_checkpoints", [False, True])
def test_self_influence_equals_tracincps(setting: Setting, outer_loop_by_checkpoints: bool) -> None:
    ours, theirs = setting.ours(), setting.theirs()
    for inputs in (None, setting.test):
        expected = theirs.self_influence(inputs, outer_loop_by_checkpoints=outer_loop_by_checkpoints)
        assert_close(ours.self_influence(inputs, outer_loop_by_checkpoints=outer_loop_by_checkpoints), expected)


def test_self_influence_is_the_diagonal_of_the_training_set_on_itself(linear: Setting) -> None:
    sdi = linear.ours()
    assert_close(sdi.self_influence(), sdi.influence(linear.train.tensors).diagonal())


def test_named_layers_equal_tracincps_frozen_or_not(linear: Setting) -> None:
    linear.model.second.requires_grad_(False)
    ours = linear._made(SDIInfluence, sketch=Exact(), layers=["second"]).influence(linear.test)
    assert_close(ours, linear.theirs(layers=["second"]).influence(linear.test))


def test_axes_are_test_then_train(linear: Setting) -> None:
    """Each test example alone is a row, each training example alone a column."""
    whole = linear.ours().influence(linear.test)
    row = linear.ours().influence(tuple(tensor[2:3] for tensor in linear.test))
    column = linear.ours(train_dataset=TensorDataset(*linear.train[5:6])).influence(linear.test)
    assert_close(row, whole[2:3])
    assert_close(column, whole[:, 5:6])


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_k_is_clipped_and_best_come_first(linear: Setting, k: int, proponents: bool) -> None:
    sdi = linear.ours()
    scores, best = sdi.influence(linear.test), sdi.influence(linear.test, k, proponents)
    assert best.indices.shape == best.influence_scores.shape == (4, min(k, 7))
    assert_close(best.influence_scores, scores.sort(dim=1, descending=proponents).values[:, :k])
    assert_close(best.influence_scores, scores.gather(1, best.indices))


def test_aggregate_sums_over_the_test_examples(linear: Setting) -> None:
    sdi = linear.ours()
    loader = DataLoader(TensorDataset(*linear.test), batch_size=3)
    assert_close(sdi.influence(linear.test, aggregate=True), sdi.influence(linear.test).sum(0, keepdim=True))
    assert_close(sdi.influence(loader, aggregate=True), sdi.influence(linear.test, aggregate=True))


def test_a_loader_of_inputs_equals_one_batch(linear: Setting) -> None:
    sdi, loader = linear.ours(), DataLoader(TensorDataset(*linear.test), batch_size=3)
    assert_close(sdi.influence(loader), sdi.influence(linear.test))
    assert_close(sdi.self_influence(loader), sdi.self_influence(linear.test))
    assert_close(sdi.compute_intermediate_quantities(loader), sdi.compute_intermediate_quantities(linear.test))


def test_a_sketch_keeps_captums_shapes(linear: Setting) -> None:
    sdi = linear._made(SDIInfluence, sketch=TensorSketch(dim=16), layers=None)
    assert sdi.influence(linear.test).shape == (4, 7)
    assert sdi.influence(linear.test, k=2).indices.shape == (4, 2)
    assert sdi.self_influence().shape == (7,)
    assert sdi.compute_intermediate_quantities(linear.test).shape[0] == 4


# --- losses ---


def test_reduced_and_per_example_losses_agree(linear: Setting) -> None:
    """Summed over an example's three outputs, or their mean: a third on each side."""
    each = linear.ours().influence(linear.test)
    summed = linear.ours(loss_fn=nn.MSELoss(reduction="sum"))
    mean = linear.ours(loss_fn=nn.MSELoss(reduction="mean"))
    assert_close(summed.influence(linear.test), each)
    assert_close(mean.influence(linear.test), each / 9)
    assert_close(mean.self_influence(), summed.self_influence() / 9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reduced_losses_equal_tracincps_fast_mode(linear: Setting, reduction: str) -> None:
    loss = nn.MSELoss(reduction=reduction)
    theirs = linear.theirs(loss_fn=loss, sample_wise_grads_per_batch=True)
    assert_close(linear.ours(loss_fn=loss).influence(linear.test), theirs.influence(linear.test))


def test_calls_of_tracincp_work_as_they_are(linear: Setting) -> None:
    summed, each = nn.MSELoss(reduction="sum"), nn.MSELoss(reduction="none")
    arguments = (copy.deepcopy(linear.model), linear.train, linear.checkpoints, load, None)
    for loss, reduces in ((summed, True), (each, False)):
        theirs = TracInCP(*arguments, loss, 4, loss, reduces)
        ours = SDIInfluence(*arguments, loss, 4, loss, reduces, sketch=Exact())
        assert_close(ours.influence(linear.test), theirs.influence(linear.test))
        for kind in (TracInCP, SDIInfluence):
            for losses in ((loss, None), (None, loss)):
                with pytest.raises(
                    AssertionError, match=r"reduction for `(test_)?loss_fn` must be .none|sum. or .mean"
                ):
                    kind(*arguments, losses[0], 4, losses[1], not reduces)


@pytest.mark.parametrize("argument", ["loss_fn", "test_loss_fn"])
def test_a_loss_without_reduction_warns_as_captum_does(linear: Setting, argument: str) -> None:
    def squares(output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels).square().sum(1)

    sentence = f'Since `{argument}` has no "reduction" attribute, (and .* is False, )?the implementation assumes that '
    sentence += f'`{argument}` is a "per-example" loss function'
    with pytest.warns(UserWarning, match=sentence):
        theirs = linear.theirs(**{argument: squares})
    with pytest.warns(UserWarning, match=sentence) as caught:
        ours = linear.ours(**{argument: squares})
    assert len(caught) == 1
    assert_close(ours.influence(linear.test), theirs.influence(linear.test))


def test_a_loss_with_reduction_does_not_warn(linear: Setting, recwarn: pytest.WarningsRecorder) -> None:
    linear.ours(test_loss_fn=nn.MSELoss(reduction="sum"))
    assert not recwarn.list


def test_a_constant_test_loss_has_no_influence(linear: Setting) -> None:
    class Zero(nn.Module):
        reduction = "none"

        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return output.sum(1) * 0

    sdi = linear.ours(test_loss_fn=Zero())
    assert not sdi.influence(linear.test).any()
    assert sdi.self_influence().all()


# --- checkpoints and loaders ---


def saved(folder: Path, checkpoints: list[Checkpoint]) -> list[str]:
    """Files whose alphabetical order is not their numerical one."""
    paths = [str(folder / f"checkpoint-{number}.pt") for number in (2, 9, 10)]
    for path, (_, weights) in zip(paths, checkpoints, strict=True):
        torch.save(weights, path)
    return paths


def test_checkpoints_are_found_and_sorted_as_captum_does(tmp_path: Path, linear: Setting) -> None:
    paths = saved(tmp_path, linear.checkpoints)
    for given in (str(tmp_path), paths[::-1], iter(paths[::-1])):
        ours, theirs = linear.ours(checkpoints=paths), linear.theirs(checkpoints=paths)
        ours.checkpoints = given  # as its constructor does
        expected = paths[::-1] if isinstance(given, Iterator) else paths
        assert ours.checkpoints == expected
        theirs.checkpoints = iter(paths[::-1]) if isinstance(given, Iterator) else given
        assert theirs.checkpoints == expected


def test_an_empty_directory_is_captums_error(tmp_path: Path, linear: Setting) -> None:
    for make in (linear.ours, linear.theirs):
        with pytest.raises(ValueError, match="Invalid checkpoints provided for TracIn class: "):
            make(checkpoints=str(tmp_path))


def test_the_order_of_checkpoints_does_not_matter(linear: Setting) -> None:
    turned = linear.ours(checkpoints=linear.checkpoints[::-1])
    assert_close(turned.influence(linear.test), linear.ours().influence(linear.test))


class Stream(IterableDataset):
    """Rows without a length; those of an iterator can be read only once."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def test_a_loader_without_length_warns_and_works(linear: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(Stream(linear.train), batch_size=3)
    sentence = "Unable to determine the number of batches in training dataset `train_dataset`"
    with pytest.warns(UserWarning, match=sentence):
        sdi = linear.ours(train_dataset=loader)
    usual = linear.ours()
    assert_close(sdi.influence(linear.test, show_progress=True), usual.influence(linear.test))
    best = sdi.influence(linear.test, k=3, show_progress=True)  # TracInCP: TypeError
    assert torch.equal(best.indices, usual.influence(linear.test, k=3).indices)
    assert "9it" in capsys.readouterr().err  # 3 batches at 3 checkpoints, of an unknown total


@pytest.mark.filterwarnings("ignore:Unable to determine the number of batches")
def test_an_iterable_that_can_be_read_only_once_is_refused(linear: Setting) -> None:
    """TracInCP needs one pass, for it loads every checkpoint for each batch; with one checkpoint so do we."""

    def once() -> DataLoader[Any]:
        return DataLoader(Stream(iter(list(linear.train))), batch_size=3)

    with pytest.raises(ValueError, match="it ended after 0 batches instead of 3"):
        linear.ours(train_dataset=once()).influence(linear.test)
    first = linear.checkpoints[:1]
    expected = linear.ours(checkpoints=first).influence(linear.test)
    assert_close(linear.ours(train_dataset=once(), checkpoints=first).influence(linear.test), expected)


def test_a_batch_without_examples_is_refused(linear: Setting) -> None:
    with pytest.raises(ValueError, match="The batch holds no example"):
        linear.ours().influence(tuple(tensor[:0] for tensor in linear.test))


@pytest.mark.parametrize("returned", [None, float("nan"), "0.1e"])
def test_a_load_function_must_return_a_learning_rate(linear: Setting, returned: Any) -> None:
    sdi = linear.ours(checkpoints_load_func=lambda model, checkpoint: returned)
    with pytest.raises(ValueError, match=f"returned the learning rate {returned!r} for checkpoint '#0'"):
        sdi.influence(linear.test)


@pytest.mark.parametrize("outer_loop_by_checkpoints", [False, True])
def test_self_influence_of_inputs_without_length_warns_under_a_bar(
    linear: Setting, outer_loop_by_checkpoints: bool, recwarn: pytest.WarningsRecorder
) -> None:
    sdi, loader = linear.ours(), DataLoader(Stream(linear.train), batch_size=3)
    expected = sdi.self_influence()
    recwarn.clear()
    assert_close(sdi.self_influence(loader, outer_loop_by_checkpoints=outer_loop_by_checkpoints), expected)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="Unable to determine the number of batches in `inputs"):
        shown = sdi.self_influence(loader, True, outer_loop_by_checkpoints)
    assert_close(shown, expected)


def test_a_dataset_needs_a_batch_size(linear: Setting) -> None:
    for make in (linear.ours, linear.theirs):
        with pytest.raises(AssertionError, match="argument was a `Dataset`, `batch_size` must be an int"):
            make(batch_size=None)
    loader = DataLoader(linear.train, batch_size=3)
    assert_close(
        linear.ours(train_dataset=loader, batch_size=None).influence(linear.test), linear.ours().influence(linear.test)
    )


# --- progress ---


CALLS: dict[str, Callable[[Any, Setting], Any]] = {
    "influence": lambda it, s: it.influence(s.test, show_progress=True),
    "proponents": lambda it, s: it.influence(s.test, 2, True, show_progress=True),
    "opponents": lambda it, s: it.influence(s.test, 2, False, show_progress=True),
    "self influence": lambda it, s: it.self_influence(show_progress=True),
    "self influence by checkpoints": lambda it, s: it.self_influence(None, True, True),
}


@pytest.mark.parametrize("call", CALLS)
def test_progress_texts_are_captums(call: str, linear: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    def finished(tracin: Any) -> set[str]:
        CALLS[call](tracin, linear)
        return set(re.findall(rf"Using {tracin.get_name()} to ([^:]+): 100%", capsys.readouterr().err))

    theirs = finished(linear.theirs())
    assert theirs
    assert finished(linear.ours()) == theirs


def test_every_checkpoint_has_its_bar_of_batches(linear: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    linear.ours().self_influence(show_progress=True, outer_loop_by_checkpoints=True)
    error = capsys.readouterr().err
    assert error.count("Processing batch: 100%") >= len(ETAS)
    assert "3/3" in error  # checkpoints
    assert "4/4" in error  # batches


def test_nothing_is_printed_unless_asked(linear: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    sdi = linear.ours()
    sdi.influence(linear.test)
    sdi.influence(linear.test, k=2)
    sdi.self_influence(outer_loop_by_checkpoints=True)
    sdi.compute_intermediate_quantities(linear.test)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


# --- where TracInCP is wrong ---


def test_c1_dot_products_of_intermediate_quantities_are_influences(setting: Setting) -> None:
    ours, theirs = setting.ours(), setting.theirs()
    train, expected = DataLoader(setting.train, batch_size=3), theirs.influence(setting.test)
    rows = ours.compute_intermediate_quantities(train)
    tested = ours.compute_intermediate_quantities(setting.test, test=True)
    assert rows.shape == (len(setting.train), len(ETAS) * sum(p.numel() for p in setting.model.parameters()))
    assert_close(tested @ rows.T, expected)
    wrong = theirs.compute_intermediate_quantities(setting.test) @ theirs.compute_intermediate_quantities(train).T
    assert (wrong - expected).abs().max() > 0.1 * expected.abs().max()  # η² instead of η


def test_c1_holds_for_aggregates_and_for_a_test_loss(linear: Setting) -> None:
    sdi = linear.ours(test_loss_fn=nn.L1Loss(reduction="none"))
    rows = sdi.compute_intermediate_quantities(linear.train.tensors)
    total = sdi.compute_intermediate_quantities(linear.test, aggregate=True, test=True)
    assert_close(total @ rows.T, sdi.influence(linear.test, aggregate=True))
    each = sdi.compute_intermediate_quantities(linear.test, test=True)
    assert_close(total, each.sum(0, keepdim=True))
    assert not torch.allclose(each, sdi.compute_intermediate_quantities(linear.test))  # the training loss


@pytest.mark.parametrize("nested", ["model_state_dict", "state_dict", "model"])
def test_c2_the_default_loader_finds_learning_rates(tmp_path: Path, linear: Setting, nested: str) -> None:
    for i, (eta, weights) in enumerate(linear.checkpoints):
        torch.save({nested: weights, "learning_rate": eta}, tmp_path / f"checkpoint-{i}.pt")

    def by_default(kind: Any, **more: Any) -> Any:
        model = copy.deepcopy(linear.model)
        return kind(model, linear.train, str(tmp_path), loss_fn=linear.loss, batch_size=2, **more)

    ours = by_default(SDIInfluence, layers=None, sketch=Exact()).influence(linear.test)
    assert_close(ours, linear.theirs().influence(linear.test))
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
        by_default(TracInCP).influence(linear.test)


def test_c3_no_layer_is_dropped() -> None:
    """GPT-2's projections are Conv1D; besides them norms and embeddings, one of them tied to the head."""
    setting = tokens(gpt2())
    sdi = setting.ours(checkpoints=None)
    train, test = (gradients(setting.model, batch, setting.loss) for batch in (setting.train.tensors, setting.test))
    expected = test @ train.T
    assert_close(sdi.influence(setting.test), expected)
    assert_close(sdi.self_influence(), train.square().sum(1))
    now = [(1.0, setting.model.state_dict())]
    fast = setting.theirs(checkpoints=now, loss_fn=NextToken("sum"), sample_wise_grads_per_batch=True)
    assert (fast.influence(setting.test) - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("make", [gpt2, looped_gpt()], ids=["GPT-2", "looped GPT"])
def test_c4_dict_batches_and_model_outputs(make: Callable[[], nn.Module]) -> None:
    setting = tokens(make())
    (ids, _), (asked, _) = setting.train.tensors, setting.test
    rows, batch = [{"input_ids": row, "labels": row} for row in ids], {"input_ids": asked, "labels": asked}
    model = setting.model.inner

    # The model's own loss is the mean over positions, TracInCP is given the sum.
    positions = ids.shape[1] - 1
    expected = setting.theirs(checkpoints=[(1.0, setting.model.state_dict())]).influence(setting.test) / positions**2
    ours = SDIInfluence(model, rows, layers=None, batch_size=2, sketch=Exact())
    assert_close(ours.influence(batch), expected)
    assert_close(ours.influence(DataLoader(rows, batch_size=3)), ours.influence(rows))

    now = [(1.0, model.state_dict())]
    theirs = setting._made(lambda _, **settings: TracInCP(copy.deepcopy(model), **settings), checkpoints=now)
    with pytest.raises((TypeError, KeyError)):
        theirs.influence(batch)
    with pytest.raises(AttributeError):
        theirs.influence(setting.test)


def counting(loads: list[float]) -> Callable[[nn.Module, Checkpoint], float]:
    def count(model: nn.Module, checkpoint: Checkpoint) -> float:
        loads.append(checkpoint[0])
        return load(model, checkpoint)

    return count


def test_c5_each_checkpoint_is_loaded_once_per_call(linear: Setting) -> None:
    loads: list[float] = []
    sdi = linear.ours(checkpoints_load_func=counting(loads))
    for call in (
        lambda: sdi.influence(linear.test),
        lambda: sdi.influence(linear.test, k=2),
        lambda: sdi.influence(linear.test, aggregate=True),
        lambda: sdi.self_influence(),
        lambda: sdi.self_influence(outer_loop_by_checkpoints=True),
        lambda: sdi.compute_intermediate_quantities(linear.train.tensors),
        lambda: sdi.step_influence(linear.test),
        lambda: sdi.step_matrix(linear.test),
    ):
        loads.clear()
        call()
        assert loads == list(ETAS)
    loads.clear()
    sdi.step_influence(linear.test, k=2)  # and once more for the winners' trajectories
    assert loads == list(ETAS) * 2
    loads.clear()
    linear.theirs(checkpoints_load_func=counting(loads)).influence(linear.test)
    assert len(loads) == len(ETAS) * (1 + 4)  # the test side, and every training batch


@pytest.mark.parametrize(("trained", "tested"), [("sum", "mean"), ("mean", "sum"), ("none", "mean")])
def test_c6_losses_of_different_reductions(linear: Setting, trained: str, tested: str) -> None:
    loss, test_loss = nn.MSELoss(reduction=trained), nn.MSELoss(reduction=tested)
    train = gradients(linear.model, linear.train.tensors, loss)
    test = gradients(linear.model, linear.test, test_loss)
    ours = linear.ours(checkpoints=None, loss_fn=loss, test_loss_fn=test_loss)
    assert_close(ours.influence(linear.test), test @ train.T)
    assert_close(ours.self_influence(), train.square().sum(1))

    def theirs() -> None:
        fast = trained != "none"
        linear.theirs(loss_fn=loss, test_loss_fn=test_loss, sample_wise_grads_per_batch=fast).influence(linear.test)

    with pytest.raises(AssertionError, match="reduction"):
        theirs()


def test_c7_one_backward_pass_per_batch(linear: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = linear.ours(), linear.theirs()
    ours.influence(linear.test)  # the first question compares two examples of each side with themselves alone
    passes: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: passes.append(1) or grad(*args, **kwargs))
    ours.influence(linear.test)
    assert len(passes) == len(ETAS) * (1 + 4)
    passes.clear()
    theirs.influence(linear.test)
    assert len(passes) == len(ETAS) * (4 + 7)


def state(model: nn.Module) -> list[Any]:
    """Everything about a model that a call could leave changed, and the identity of its parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts: list[Any] = [(m.training, *(len(getattr(m, name)) for name in hooks)) for m in model.modules()]
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        parts.append((name, id(parameter), parameter.requires_grad, parameter.tolist(), grad))
    return [*parts, torch.get_rng_state().tolist()]


def test_c7_the_model_is_given_back(linear: Setting) -> None:
    sdi = linear._made(SDIInfluence, sketch=Exact(), layers=["second"])
    sdi.model.train()
    sdi.model.second.requires_grad_(False)
    sdi.model.first.weight.grad = torch.ones_like(sdi.model.first.weight)
    before = state(sdi.model)
    sdi.influence(linear.test)
    sdi.influence(linear.test, k=2)
    sdi.self_influence()
    sdi.compute_intermediate_quantities(linear.test)
    assert state(sdi.model) == before

    theirs = linear.theirs()
    weights = theirs.model.second.weight.tolist()
    theirs.influence(linear.test)
    assert theirs.model.second.weight.tolist() != weights


def test_c7_the_model_is_given_back_after_a_failure(linear: Setting) -> None:
    def failing(model: nn.Module, checkpoint: Checkpoint) -> float:
        if checkpoint is linear.checkpoints[1]:
            raise OSError("the disk is gone")
        return load(model, checkpoint)

    sdi = linear.ours(checkpoints_load_func=failing)
    before = state(sdi.model)
    for call in (sdi.influence, sdi.self_influence, sdi.compute_intermediate_quantities):
        with pytest.raises(OSError, match="the disk is gone"):
            call(linear.test)
        assert state(sdi.model) == before


@pytest.mark.gpu
def test_c8_batches_go_to_the_models_device(linear: Setting) -> None:
    sdi = linear.ours()
    expected = sdi.influence(linear.test)
    sdi.model.cuda()
    scores = sdi.influence(linear.test)
    assert scores.is_cuda
    assert_close(scores.cpu(), expected)
