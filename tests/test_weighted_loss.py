"""The losses of a batch as a twice differentiable function: against plain backward passes of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from cases import CASES, Case, rows
from reference import next_token_loss, spread
from torch import Tensor, nn

from captum_sdi import SDIInfluence
from captum_sdi.data import Collator
from captum_sdi.data.losses import default_loss
from captum_sdi.data.side import Side
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.parameter_vector import ParameterVector
from captum_sdi.preconditioners import Hessian
from captum_sdi.weighted_loss import BatchLoss, check_second_derivative, example_shares

TRAIN = rows(4, seed=1)


def plain_gradient(case: Case, model: nn.Module, moved: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Losses one example at a time, and the gradient of their weighted sum, at the model's weights plus `moved`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, change in zip(
            model.parameters(), moved.split([p.numel() for p in model.parameters()]), strict=True
        ):
            parameter.add_(change.view_as(parameter))
    losses = torch.stack(
        [
            next_token_loss(model(input_ids=row["input_ids"].unsqueeze(0)).logits[0], row["labels"], case.causal)
            for row in TRAIN
        ]
    )
    gradients = torch.autograd.grad(shares @ losses, list(model.parameters()))
    return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_gradients_and_hessian_products_are_those_of_the_model(case: Case) -> None:
    model = case.model()
    loss = BatchLoss(model, Side("training", default_loss(model), None))
    shares = torch.rand(len(TRAIN), dtype=torch.float64)
    direction = torch.randn(loss.layout.size, dtype=torch.float64)
    zero, step = torch.zeros_like(direction), 1e-6

    with loss.evaluated() as vector:
        vector.requires_grad_()
        losses = loss(vector, Collator()(TRAIN))
        gradient = torch.autograd.grad(shares @ losses, vector, create_graph=True)[0]
        product = torch.autograd.grad(gradient, vector, direction)[0]

    expected_losses, expected_gradient = plain_gradient(case, model, zero, shares)
    above = plain_gradient(case, model, step * direction, shares)[1]
    below = plain_gradient(case, model, -step * direction, shares)[1]
    expected_product = (above - below) / (2 * step)
    assert torch.allclose(losses, expected_losses, rtol=1e-10)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert (product - expected_product).norm() < 1e-7 * product.norm()


@pytest.mark.parametrize("make", [CASES[0].model, CASES[2].model, zoo.gpt2], ids=["concat", "tied", "many names"])
def test_the_model_is_left_alone(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    loss = BatchLoss(model, Side("training", default_loss(model), None))
    with loss.evaluated() as vector:
        loss(vector.add(1).requires_grad_(), Collator()(TRAIN)).sum().backward()
    assert model.training
    assert all(parameter.grad is None and parameter.is_leaf for parameter in model.parameters())
    assert {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)} == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_shares_are_those_of_the_usual_reductions() -> None:
    model = CASES[0].model()
    side = Side("training", default_loss(model), None)
    batch = Collator()(TRAIN)
    loss = BatchLoss(model, side)
    with loss.evaluated() as vector:
        losses = loss(vector, batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    over_tokens = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert torch.allclose(example_shares(batch, side, "tokens") @ losses, over_tokens, rtol=1e-12)
    assert torch.allclose(example_shares(batch, side, "mean") @ losses, losses.mean(), rtol=1e-12)
    assert torch.allclose(example_shares(batch, side, "sum") @ losses, losses.sum(), rtol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    model = CASES[0].model()
    side = Side("training", default_loss(model), None)
    with pytest.raises(ValueError, match=r"reduction must be one of \['mean', 'tokens', 'sum'\], got 'avg'"):
        example_shares(Collator()(TRAIN), side, "avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction='tokens' counts integer labels, and there are none"):
        example_shares((torch.ones(2, 3), torch.ones(2)), side, "tokens")
    with pytest.raises(ValueError, match=r"all float32, or all float64; these are \['torch.bfloat16'\]"):
        BatchLoss(CASES[0].model(torch.bfloat16), side)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterVector.of(CASES[0].model().requires_grad_(requires_grad=False))
    with pytest.raises(ValueError, match=r"not trainable, so that no training changes them: \['other'\]"):
        ParameterVector.of(model).rows({"other": torch.zeros(1, 3)})


class WronglyTwice(torch.autograd.Function):
    """A square whose double backward pass forgets a factor, as one of torch's own does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return grad * y, grad * x.detach()


def test_a_hessian_that_is_not_symmetric_is_refused() -> None:
    vector = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_()
    right, wrong = vector[:3] * vector[3:], WronglyTwice.apply(vector[:3], vector[3:])
    for product in (right, right.square(), right.sin() * vector[:3]):
        (gradient,) = torch.autograd.grad(product.sum(), vector, create_graph=True)
        check_second_derivative(gradient, vector)
    (gradient,) = torch.autograd.grad(wrong.sum(), vector, create_graph=True)
    with pytest.raises(ValueError, match=r"Hessian is not symmetric, by .*weight_norm"):
        check_second_derivative(gradient, vector)


def test_curvature_of_what_torch_differentiates_wrongly_is_refused() -> None:
    torch.manual_seed(0)
    model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8, n_loops=2)).double()
    for module in list(model.core.modules()):
        if isinstance(module, nn.Linear):
            torch.nn.utils.parametrizations.weight_norm(module)
    spread(model, 0.5)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 8, (4, 6))]
    sdi = SDIInfluence(model, rows, batch_size=2, layers=None, preconditioner=Hessian(rank=4))
    with pytest.raises(ValueError, match="Hessian is not symmetric"):
        sdi.influence(rows[:1])
