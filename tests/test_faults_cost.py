"""All that is checked costs two examples' forward, backward and sketch, once, and misses nothing for it."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, rows
from reference import spread
from test_faults_capture import OuroReplica
from test_faults_neighbours import REFUSED, Base, Mean, SortedByLength, equal_rows
from test_unrolled_questions import ran
from torch import Tensor, nn

from captum_sdi import Exact, LoopSpec, SDIInfluence, TensorSketch
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.data.side import Side
from captum_sdi.preconditioners import Fisher, Hessian
from captum_sdi.rehearsal.rehearsal import Rehearsal

ORDERED = sorted(rows(4, seed=1), key=lambda row: -len(row["input_ids"]))


class Counter:
    """How many examples a model runs forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self.forward, self.backward = 0, 0
        model.register_forward_hook(self._on_forward)

    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
        n = len(logits)
        self.forward += n
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._on_backward(n))

    def _on_backward(self, n: int) -> None:
        self.backward += n

    def during(self, call: Callable[[], Any]) -> tuple[int, int]:
        self.forward, self.backward = 0, 0
        call()
        return self.forward, self.backward


def looped_gpt() -> nn.Module:
    return CASES[0].model(torch.float32)


def in_half_precision() -> nn.Module:
    return CASES[0].model(torch.bfloat16)


QUESTIONS: dict[str, Callable[[SDIInfluence, Any], Any]] = {
    "all": lambda sdi, tests: sdi.influence(tests),
    "self": lambda sdi, tests: sdi.self_influence(),
    "map": lambda sdi, tests: sdi.influence_map(tests, indices=[0, 1], axes=("step",)),
}
PADDED, EQUAL = rows(4, seed=1), equal_rows(3)
ROWS = {
    "padded": PADDED,
    "equal": EQUAL,
    "padding later": [*EQUAL, *PADDED[:3]],
    "order later": [*ORDERED, *reversed(ORDERED)],
}


@pytest.mark.parametrize("question", list(QUESTIONS))
@pytest.mark.parametrize("make", [looped_gpt, Base, in_half_precision])
@pytest.mark.parametrize("kind", list(ROWS))
def test_the_first_call_costs_at_most_two_examples_more(
    question: str, make: Callable[[], nn.Module], kind: str
) -> None:
    data = [{name: column[:5] for name, column in row.items()} for row in ROWS[kind]] if make is Base else ROWS[kind]
    for n_tests, batch_size in ((1, 3), (2, 2), (1, 1)):
        model = make()
        loop = "block" if make is Base else "core"
        sdi = SDIInfluence(model, data, loop=loop, batch_size=batch_size, sketch=Exact())
        counter = Counter(model)

        def call(sdi: SDIInfluence = sdi, tests: Any = data[:n_tests]) -> Any:
            return QUESTIONS[question](sdi, tests)

        first, second = counter.during(call), counter.during(call)
        extra = [more - usual for more, usual in zip(first, second, strict=True)]
        assert 1 <= max(extra) <= 2, (n_tests, batch_size, extra)


class RoundingByBatch(Base):
    """Rounds otherwise in a batch than alone, as kernels in half precision do."""

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.looped(self.emb(input_ids))
        return self.head(h if len(input_ids) == 1 else h * 1.01)


def rounding_by_batch() -> nn.Module:
    return RoundingByBatch().bfloat16()


def ouro() -> nn.Module:
    return spread(OuroReplica())


OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "other logits with labels": (ouro, {"layers": None, "loop": LoopSpec(("core", "gate"), ("core",))}),
    "half precision": (rounding_by_batch, {"loop": "block"}),
    "activation checkpointing": (looped_gpt, {"activation_checkpointing": True}),
    "fisher": (looped_gpt, {"preconditioner": Fisher()}),
    "hessian": (looped_gpt, {"preconditioner": Hessian(rank=2, damping=1)}),
    "index": (looped_gpt, {"sketch": TensorSketch(dim=16)}),
}


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("kind", ["equal", "padding later"])
def test_so_does_that_of_other_models_and_settings(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, settings = OTHERS[name]
    data = [{name: column[:5] for name, column in row.items()} for row in ROWS[kind]]
    for question, n_tests, batch_size in (("all", 1, 3), ("self", 2, 1)):

        def cost_of_first_call(n_tests: int = n_tests, batch_size: int = batch_size, question: str = question) -> Any:
            model = make()
            index = {"index": tempfile.mkdtemp(dir=tmp_path)} if name == "index" else {}
            settings_here = {"loop": "core", "sketch": Exact(), **settings, **index}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # attention_mask is dropped
                sdi = SDIInfluence(model, data, batch_size=batch_size, **settings_here)
                return Counter(model).during(lambda: QUESTIONS[question](sdi, data[:n_tests]))

        extra = what_checks_cost(cost_of_first_call, monkeypatch)
        assert 1 <= max(extra) <= 2, (question, batch_size, extra)


def what_checks_cost(cost_of_first_call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many examples more are run forward and backward than without all checks."""
    first = cost_of_first_call()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(Rehearsal, "features", lambda self, batch: batch.features())
        unchecked.setattr(Rehearsal, "before_batch", lambda *args, **kwargs: None)
        unchecked.setattr(Rehearsal, "answered", lambda *args: False)
        usual = cost_of_first_call()
    return [more - rest for more, rest in zip(first, usual, strict=True)]


def by_direction() -> tuple[int, int]:
    model, data = looped_gpt(), ROWS["padding later"]
    sdi = SDIInfluence(model, data, loop="core", batch_size=3, sketch=Exact())
    weights = torch.ones(len(data))
    return Counter(model).during(lambda: sdi.direction(weights).step_influence(data[:1]))


def by_automatic_batch_size() -> tuple[int, int]:
    model, data = looped_gpt(), ROWS["padding later"]
    settings: dict[str, Any] = {"loop": "core", "batch_size": "auto", "sketch": Exact()}
    return Counter(model).during(lambda: SDIInfluence(model, data, **settings).influence(data[:1]))


def by_unrolling() -> tuple[int, int]:
    model, unrolled = ran()
    return Counter(model).during(lambda: unrolled.influence(ROWS["padding later"]))


@pytest.mark.parametrize("ask", [by_direction, by_automatic_batch_size, by_unrolling])
def test_so_does_that_of_other_questions(ask: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    extra = what_checks_cost(ask, monkeypatch)
    assert 1 <= max(extra) <= 2, extra


def test_a_direction_reads_its_examples_once() -> None:
    model = looped_gpt()
    sdi = SDIInfluence(model, PADDED, loop="core", batch_size=3, sketch=Exact())
    weights = torch.ones(len(PADDED))
    first, second = (Counter(model).during(lambda: sdi.direction(weights)) for _ in range(2))
    assert max(first) <= len(PADDED) + 2
    assert second == (len(PADDED), len(PADDED))


@pytest.mark.parametrize("name", ["plain", "half precision", "other logits with labels"])
def test_the_first_question_to_a_direction_costs_at_most_two_examples_more(name: str) -> None:
    make, settings = OTHERS.get(name, (looped_gpt, {"loop": "core"}))
    data = [{name: column[:5] for name, column in row.items()} for row in ORDERED]
    for n_tests, batch_size in ((1, 3), (3, 3), (4, 2), (2, 1)):
        model = make()
        settings_here = {"batch_size": batch_size, "sketch": Exact(), "test_loss_fn": TokenCrossEntropy(), **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attention_mask is dropped
            sdi = SDIInfluence(model, data, **settings_here)
            direction = sdi.direction([0, 1])
            counter, calls = Counter(model), [direction.step_influence, direction.step_influence, sdi.influence]
            first, second, features = (counter.during(partial(call, data[:n_tests])) for call in calls)
            features_again = counter.during(lambda sdi=sdi, n_tests=n_tests: sdi.influence(data[:n_tests]))
        extra = [more - usual for more, usual in zip(first, second, strict=True)]
        assert 1 <= max(extra) <= 2, (n_tests, batch_size, extra)
        assert second[1] == 0
        assert features > features_again, "of which the direction has shown nothing"


def test_a3_neighbours_that_matter_in_the_test_batch_of_a_direction_are_refused() -> None:
    sdi = SDIInfluence(spread(Mean().double()), equal_rows(3), loop="block", batch_size=3, sketch=Exact())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        with pytest.raises(ValueError, match=REFUSED):
            sdi.direction([0, 1]).step_influence(PADDED[:3])


@pytest.mark.parametrize("n_first", [1, 3])
def test_a3_padding_in_a_later_question_to_a_direction_is_refused(n_first: int) -> None:
    sdi = SDIInfluence(spread(Mean().double()), equal_rows(3), loop="block", batch_size=3, sketch=Exact())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        direction = sdi.direction([0, 1])
        direction.step_influence(equal_rows(3)[:n_first])
        with pytest.raises(ValueError, match=REFUSED):
            direction.step_influence(PADDED[:3])


def test_a3_padding_in_a_later_batch_of_a_direction_is_refused() -> None:
    data = [*equal_rows(3), *PADDED[:3]]
    sdi = SDIInfluence(spread(Mean().double()), data, loop="block", batch_size=3, sketch=Exact())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        with pytest.raises(ValueError, match=REFUSED):
            sdi.direction(torch.ones(len(data)))


def test_b13_a_step_beyond_the_depth_is_refused_before_the_train_set_is_read() -> None:
    model = looped_gpt()
    sdi = SDIInfluence(model, PADDED, loop="core", batch_size=2, sketch=Exact())
    counter = Counter(model)
    with pytest.raises(ValueError, match="the test side runs 3 loop steps"):
        sdi.step_influence(PADDED[:2], k=2, rank_by=3)
    assert max(counter.forward, counter.backward) <= 2 + 2


# --- half precision: what is no rounding ---


class NoisyByItsOwnGenerator(RoundingByBatch):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (1 + 0.05 * torch.rand((), generator=self.generator))


def test_noise_in_half_precision_is_not_taken_for_rounding() -> None:
    data = equal_rows(3)
    with pytest.raises(ValueError, match="not deterministic"):
        SDIInfluence(
            NoisyByItsOwnGenerator().bfloat16(), data, loop="block", batch_size=3, sketch=Exact()
        ).self_influence()


# --- what is seen within that ---


class SortedUp(Base):
    """Sorts examples, the shortest first, and never sorts them back."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            input_ids = input_ids[attention_mask.sum(1).argsort()]
        return self.head(self.looped(self.emb(input_ids)))


@pytest.mark.parametrize(("kind", "reverse"), [(SortedByLength, False), (SortedUp, True)])
@pytest.mark.parametrize("n_tests", [1, 2])
def test_a3_what_batches_in_order_hide_is_refused_at_the_first_that_is_not(
    kind: type[Base], reverse: bool, n_tests: int
) -> None:
    ordered = sorted(rows(4, seed=1), key=lambda row: -len(row["input_ids"]), reverse=reverse)
    data = [*ordered, *reversed(ordered)]
    sdi = SDIInfluence(spread(kind().double()), data, loop="block", batch_size=2, sketch=Exact())
    with pytest.raises(ValueError, match=REFUSED):
        sdi.influence(data[:n_tests])


def test_a3_padding_is_seen_in_a_later_call() -> None:
    sdi = SDIInfluence(Mean(), equal_rows(3), loop="block", batch_size=3, sketch=Exact())
    sdi.influence(equal_rows(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        with pytest.raises(ValueError, match=REFUSED):
            sdi.influence(rows(3, seed=1))


class ByMaximum(nn.Module):
    """A loss divided by the largest number of targets in the batch."""

    reduction = "none"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(1) / (labels[:, 1:] != -100).sum(1).max()


def test_a3_a_maximum_that_the_ends_of_a_batch_share_is_seen() -> None:
    data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in equal_rows(3, length=6)]
    data[1]["labels"] = data[1]["labels"].clone()
    data[1]["labels"][:3] = -100  # of the same length as its neighbours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention_mask is dropped
        with pytest.raises(ValueError, match=REFUSED):
            SDIInfluence(Base(), data, loop="block", batch_size=3, sketch=Exact(), loss_fn=ByMaximum()).influence(data)


class NoisyLoss(nn.Module):
    """Scales by noise."""

    reduction = "none"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (1 + 1e-3 * torch.rand(())) * logits.square().sum((1, 2))


@pytest.mark.parametrize("argument", ["loss_fn", "test_loss_fn"])
@pytest.mark.parametrize(("n_tests", "batch_size"), [(1, 1), (1, 3), (3, 3)])
def test_a_loss_that_is_random_is_refused_whatever_batches_there_are(
    argument: str, n_tests: int, batch_size: int
) -> None:
    data = equal_rows(3)
    torch.manual_seed(1)
    losses = {"loss_fn": TokenCrossEntropy(), argument: NoisyLoss()}
    sdi = SDIInfluence(Base(), data, loop="block", batch_size=batch_size, sketch=Exact(), **losses)
    with pytest.raises(ValueError, match="not deterministic"):
        sdi.influence(data[:n_tests])


def test_a_loss_that_is_random_is_refused_before_curvatures_at_every_call() -> None:
    data = equal_rows(3)
    torch.manual_seed(1)
    settings: dict[str, Any] = {"loss_fn": NoisyLoss(), "preconditioner": Hessian(rank=2, damping=1)}
    sdi = SDIInfluence(Base().double(), data, loop="block", batch_size=3, sketch=Exact(), **settings)
    counter = Counter(sdi.model)
    for _ in range(2):
        with pytest.raises(ValueError, match="not deterministic"):
            sdi.influence(data)
    assert counter.forward == 2 * (1 + 3 + 1)  # alone, in the batch whose losses are others, and again


def test_what_is_known_of_a_loss_is_not_believed_of_another_one_in_its_place() -> None:
    def known_of(scale: int) -> Side:
        return Side("test", lambda output, labels: scale * output, None)

    known = {known_of(1).manner}
    for scale in range(100):  # each takes the memory that the one before has left
        assert known_of(scale).manner not in known
