"""One model and several threads: a pass is not disturbed, and a call that would be is refused where it is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import CASES, rows
from reference import next_token_loss
from torch import Tensor, nn

from captum_sdi import Exact, SDIInfluence, coverage_check, find_loop
from captum_sdi.data.collate import Collator

TRAIN, TEST = rows(7, seed=1), rows(3, seed=2)
CASE = CASES[0]
BATCH = Collator()(TRAIN)
REFUSED = r"was called in the thread 'intruder.*holds the model.*copy\.deepcopy\(model\)"


class Intruder:
    """Calls something in another thread, every time it is told to, and keeps what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.errors: list[BaseException] = []
        self.outputs: list[Any] = []

    def __call__(self, *_: Any) -> None:
        if threading.current_thread().name == "intruder":
            return
        thread = threading.Thread(target=self.run, name="intruder")
        thread.start()
        thread.join()

    def run(self) -> None:
        try:
            self.outputs.append(self.call())
        except RuntimeError as error:
            self.errors.append(error)

    def assert_refused(self) -> None:
        assert self.errors
        assert not self.outputs
        for error in self.errors:
            with pytest.raises(RuntimeError, match=REFUSED):
                raise error


STATE = torch.zeros(1, 2, CASE.model().config.n_embd, dtype=torch.float64)
PARTS: dict[str, Callable[[Any], Any]] = {
    "the model": lambda model: model(input_ids=TEST[0]["input_ids"][None]),
    "the loop": lambda model: model.core(STATE, STATE, None),
    "a layer": lambda model: model.core.blocks[0].attn.qkv(STATE),
}


def sdi_of(model: nn.Module, **settings: Any) -> SDIInfluence:
    return SDIInfluence(model, TRAIN, batch_size=3, sketch=Exact(), **settings)


class MeanLoss:
    """One value per example; calls ``meanwhile`` before it is computed."""

    reduction = "none"

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.meanwhile = meanwhile

    def __call__(self, output: Any, labels: Tensor) -> Tensor:
        self.meanwhile()
        return torch.stack([next_token_loss(*pair) for pair in zip(output.logits, labels, strict=True)])


@pytest.mark.parametrize("part", PARTS)
def test_e5_a_call_in_another_thread_is_refused_there_and_changes_nothing(part: str) -> None:
    """Tried between forward and backward, in the middle of a forward pass, and while activations are recomputed."""
    model = CASE.model()
    expected = sdi_of(model, loss_fn=MeanLoss(), activation_checkpointing=True).step_influence(TEST)
    intruder = Intruder(lambda: PARTS[part](model))

    handle = model.core.blocks[0].mlp.register_forward_hook(intruder)
    sdi = sdi_of(model, loss_fn=MeanLoss(intruder), activation_checkpointing=True)
    result = sdi.step_influence(TEST)
    intruder.assert_refused()
    assert len(intruder.errors) > 10
    assert torch.equal(result.trajectories, expected.trajectories)
    assert torch.equal(result.n_steps, expected.n_steps)
    handle.remove()
    intruder.run()  # afterwards the model answers again
    assert len(intruder.outputs) == 1


@pytest.mark.parametrize("ask", [find_loop, coverage_check])
def test_e5_a_model_that_is_watched_or_checked_is_held_too(ask: Callable[[nn.Module, Any], Any]) -> None:
    model = CASE.model()
    expected = str(ask(model, BATCH))
    intruder = Intruder(lambda: PARTS["the model"](model))
    handle = model.core.register_forward_hook(intruder)
    assert str(ask(model, BATCH)) == expected
    intruder.assert_refused()
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_e5_a_forward_pass_that_had_begun_is_refused_at_its_next_layer() -> None:
    model = CASE.model()
    expected = sdi_of(model).step_influence(TEST)
    begun, answered = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "intruder":
            begun.set()
            answered.wait(timeout=60)

    handle = model.core.blocks[0].register_forward_pre_hook(wait)
    intruder = Intruder(lambda: PARTS["the model"](model))
    thread = threading.Thread(target=intruder.run, name="intruder")
    thread.start()
    begun.wait(timeout=60)
    ends = model.lm_head.register_forward_hook(lambda *_: (answered.set(), thread.join(timeout=60), None)[-1])
    result = sdi_of(model).step_influence(TEST)
    thread.join(timeout=60)
    ends.remove()
    handle.remove()
    intruder.assert_refused()
    assert torch.equal(result.trajectories, expected.trajectories)


class Wrapper(nn.Module):
    """Holds the model that others ask about, too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_e5_questions_about_a_model_and_about_what_wraps_it_take_turns() -> None:
    model = CASE.model().train()
    expected = sdi_of(model, loss_fn=MeanLoss()).step_influence(TEST)
    asked = [model, Wrapper(model).train()] * 2
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda each: sdi_of(each, loss_fn=MeanLoss()).step_influence(TEST), asked))
    for result in results:
        torch.testing.assert_close(result.trajectories, expected.trajectories)
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
