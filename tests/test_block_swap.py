"""Block swaps against a model whose loop is untied, one deep copy of the block for each step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, N_LOOPS, Case, rows
from reference import next_token_loss, spread, with_block_swapped
from torch import Tensor, nn

from captum_sdi.evaluate import block_swap

TEST = rows(3, seed=2)
CONCAT = CASES[0]


def another(case: Case) -> nn.Module:
    return spread(case.model(), scale=0.2, seed=5)


def losses_by_hand(case: Case, make: Callable[[], nn.Module]) -> Tensor:
    """The reference's untied models run once: each example has its own."""
    logits = [make()(input_ids=row["input_ids"][None]).logits[0] for row in TEST]
    losses = [next_token_loss(each, row["labels"], case.causal) for each, row in zip(logits, TEST, strict=True)]
    return torch.stack(losses).detach()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_step_has_the_other_block(case: Case) -> None:
    model, other = case.model(), another(case)
    swapped = [partial(with_block_swapped, model, other, case.untying, step) for step in range(N_LOOPS)]
    expected = torch.stack([losses_by_hand(case, each) for each in swapped], dim=1)
    assert expected.std(1).min() > 0.01  # the steps differ, or a wrong order would not show
    torch.testing.assert_close(block_swap(model, other, TEST, batch_size=2), expected)


def test_several_steps_at_once() -> None:
    model, other = CONCAT.model(), another(CONCAT)
    whole = copy.deepcopy(model)
    whole.core.load_state_dict(other.core.state_dict())
    first = partial(with_block_swapped, model, other, CONCAT.untying, 0)
    expected = [losses_by_hand(CONCAT, each) for each in (lambda: model, lambda: whole, first)]
    measured = block_swap(model, other.state_dict(), TEST, steps=[(), range(N_LOOPS), 0])
    torch.testing.assert_close(measured, torch.stack(expected, dim=1))


def test_the_test_side_may_be_deeper_and_have_its_own_loss() -> None:
    model, other = CONCAT.model(), another(CONCAT)

    def confidence(output: object, labels: Tensor) -> Tensor:
        return output.logits.softmax(-1).amax(-1).mean(1)

    deep = block_swap(model, other, TEST, loss_fn=confidence, forward_kwargs={"n_loops": 5}, loop="core", batch_size=1)
    assert deep.shape == (len(TEST), 5)
    assert ((deep > 1 / 11) & (deep < 1)).all()


def test_the_model_comes_back_as_it_was() -> None:
    model, other = CONCAT.model().train(), another(CONCAT)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}

    def fails(module: nn.Module, args: object) -> None:
        raise RuntimeError("out of luck")

    block_swap(model, other, TEST)
    hook = model.core.blocks[0].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        block_swap(model, other, TEST, loop="core", steps=[0])
    hook.remove()
    assert model.training
    assert not model.core._forward_hooks
    assert not model.core._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        pointer, values = before[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, values)


def test_an_error_in_a_swapped_step_leaves_no_other_weights() -> None:
    model, other = CONCAT.model(), another(CONCAT)
    before = copy.deepcopy(model.state_dict())

    def fails_with_others(module: nn.Module, args: object) -> None:
        if not torch.equal(module.ln_1.weight, before["core.blocks.0.ln_1.weight"]):
            raise RuntimeError("out of luck")

    hook = model.core.blocks[0].register_forward_pre_hook(fails_with_others)
    with pytest.raises(RuntimeError, match="out of luck"):
        block_swap(model, other, TEST, loop="core", steps=[2])
    hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_models_that_do_not_fit() -> None:
    model = CONCAT.model()
    with pytest.raises(ValueError, match=r"other has nothing for the loop's parameter 'core.adapter.weight'"):
        block_swap(model, {}, TEST)
    halved = {name: tensor[:1] for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"other has \(1, 16\) for .* of shape \(8, 16\)"):
        block_swap(model, halved, TEST)

    with pytest.raises(ValueError, match=r"other has NaN or infinite values for .*'core.adapter.weight'"):
        block_swap(model, {name: tensor * float("nan") for name, tensor in model.state_dict().items()}, TEST)
    with pytest.raises(TypeError, match="other must be a model or its state dict, got NoneType"):
        block_swap(model, None, TEST)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test is empty"):
        block_swap(model, model, [])


@pytest.mark.parametrize("steps", [[0.5], "01", [True], [(0, "1")]])
def test_steps_that_are_no_integers(steps: Any) -> None:
    with pytest.raises(TypeError, match="steps must be ints"):
        block_swap(CONCAT.model(), another(CONCAT), TEST, steps=steps)


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([N_LOOPS], r"steps names \[3\], but the model runs 3 loop steps, numbered from 0"),
        ([(0, -1)], r"steps names \[-1\]"),
        ([], r"steps is empty; name at least one"),
    ],
)
def test_steps_that_do_not_exist(steps: list[object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        block_swap(CONCAT.model(), another(CONCAT), TEST, steps=steps)


def test_examples_of_different_depth_are_refused() -> None:
    def depth(batch: dict[str, Tensor]) -> dict[str, int]:
        return {"n_loops": 2 + int(batch["input_ids"][0, 0] % 2)}

    test = [{"input_ids": torch.tensor([i, 1, 2]), "labels": torch.tensor([i, 1, 2])} for i in (0, 1)]
    with pytest.raises(ValueError, match=r"test examples run \[2, 3\] loop steps; pass those of one depth"):
        block_swap(CONCAT.model(), another(CONCAT), test, forward_kwargs=depth, loop="core", batch_size=1)
