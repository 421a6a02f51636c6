"""The model is given back exactly as it was, whatever happened to it."""

import random
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_sdi.borrow import preserved


class Nasty(nn.Module):
    """Everything a model may hold that is easy to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3).eval()
        self.lstm = nn.LSTM(3, 3, batch_first=True)
        self.register_buffer("wide", torch.randn(3, 1).expand(3, 5))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.register_buffer("empty", None)
        self.scale = nn.Parameter(torch.tensor([float("nan"), -0.0, 1.0]))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.lstm(y)[0] + self.scale.nan_to_num())


def nasty() -> Nasty:
    model = Nasty()
    model.scale.grad = torch.ones(3)
    return model


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything `preserved` promises, objects by identity and values by their bytes."""
    tensors = [*model.named_parameters(remove_duplicate=False)]
    tensors += [*model.named_buffers(remove_duplicate=False)]
    prints: list[Any] = [(name, id(m), m.training) for name, m in model.named_modules()]
    for name, t in tensors:
        layout = (t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad, t.is_leaf)
        grad = (id(t.grad), t.grad.numpy().tobytes()) if t.is_leaf and t.grad is not None else None
        reached = attrgetter(name)(model) is t  # no plain attribute of that name hides it
        prints.append((name, id(t), reached, layout, t.detach().numpy().tobytes(), grad))
    prints += [list(model.state_dict()), model.lstm._flat_weights[0] is model.lstm.weight_ih_l0]
    prints += [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002
    return prints


def write_everywhere(model: Nasty) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), model.norm.running_mean, model.scratch]:
            tensor.fill_(3.0)
        model.wide[:, :1].fill_(3.0)


def assign_state(model: Nasty) -> None:
    state = {k: v.clone() + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def swap_storage(model: Nasty) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros(5)


def write_through_data(model: Nasty) -> None:
    model.frozen.data.add_(1)


def new_parameters(model: Nasty) -> None:
    model.head.weight = nn.Parameter(torch.ones(4, 3))
    model.lstm.weight_ih_l0 = nn.Parameter(torch.ones(12, 3))


def delete_and_add(model: Nasty) -> None:
    del model.frozen, model.scratch
    model.frozen = torch.ones(2)
    model.scratch = torch.ones(2)
    model.register_parameter("more", nn.Parameter(torch.ones(1)))
    model.register_buffer("more_still", torch.ones(1))


def replace_modules(model: Nasty) -> None:
    model.head = nn.Linear(3, 7)
    model.extra = nn.Linear(1, 1)
    del model.norm


def replace_buffers(model: Nasty) -> None:
    model.register_buffer("scratch", torch.ones(9), persistent=True)
    model.empty = torch.ones(1)
    model.norm.running_var = torch.zeros(3)


def flip_flags(model: Nasty) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    model.train()
    model.lstm.eval()


def drop_gradients(model: Nasty) -> None:
    model.zero_grad(set_to_none=True)
    model.scale.grad = torch.zeros(3)


def zero_gradients(model: Nasty) -> None:
    model.zero_grad(set_to_none=False)


def train_a_step(model: Nasty) -> None:
    model.train()
    model(torch.tensor([[0, 1, 2]])).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def write_within_autograd(model: Nasty) -> None:
    model.frozen.mul_(model.scale[:2])


def draw_numbers(model: Nasty) -> None:
    torch.randn(3)
    random.random()
    np.random.rand()  # noqa: NPY002


def to_double(model: Nasty) -> None:
    model.double()


DISTURBANCES = [
    write_everywhere,
    assign_state,
    swap_storage,
    write_through_data,
    new_parameters,
    delete_and_add,
    replace_modules,
    replace_buffers,
    flip_flags,
    drop_gradients,
    zero_gradients,
    train_a_step,
    write_within_autograd,
    draw_numbers,
    to_double,
]
# These write to the values of a parameter or gradient in place.
WRITES = [
    write_everywhere,
    write_through_data,
    zero_gradients,
    train_a_step,
    write_within_autograd,
]


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_the_model_is_given_back_exactly(disturb: Callable[[Nasty], Any]) -> None:
    model = nasty()
    before = fingerprint(model)
    with preserved(model):
        disturb(model)
    assert fingerprint(model) == before


def disturbed_and_failed(model: Nasty, disturb: Callable[[Nasty], Any]) -> None:
    with preserved(model):
        disturb(model)
        raise RuntimeError("on the way")


@pytest.mark.parametrize("disturb", DISTURBANCES)
def test_also_after_an_error(disturb: Callable[[Nasty], Any]) -> None:
    model = nasty()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="on the way"):
        disturbed_and_failed(model, disturb)
    assert fingerprint(model) == before


def test_also_after_every_disturbance_at_once() -> None:
    model = nasty()
    before = fingerprint(model)
    with preserved(model):
        for disturb in (train_a_step, write_everywhere, new_parameters, assign_state, flip_flags):
            disturb(model)
        to_double(model)
        replace_buffers(model)
        delete_and_add(model)
        replace_modules(model)
    assert fingerprint(model) == before


def test_the_disturbances_disturb() -> None:
    for disturb in DISTURBANCES:
        model = nasty()
        before = fingerprint(model)
        disturb(model)
        with suppress(RuntimeError, AttributeError):  # too disturbed to be described
            assert fingerprint(model) != before, disturb


def test_each_weight_is_copied_once_and_none_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **kw: copied.append(t.numel()) or clone(t, **kw))
    buffers = sum(buffer.numel() for buffer in model.buffers())
    with preserved(model, weights=False):
        assert sum(copied) == buffers
    copied.clear()
    with preserved(model):
        assert sum(copied) == buffers + sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("disturb", [d for d in DISTURBANCES if d not in WRITES])
def test_without_weights_only_values_are_not_kept(disturb: Callable[[Nasty], Any]) -> None:
    model = nasty()
    before = fingerprint(model)
    with preserved(model, weights=False):
        disturb(model)
    assert fingerprint(model) == before


def test_buffers_are_kept_also_without_weights() -> None:
    model = nasty()
    before = model.norm.running_mean.clone()
    with preserved(model, weights=False):
        model.train()
        model(torch.tensor([[0, 1, 2]]))
        assert not torch.equal(model.norm.running_mean, before)
    assert torch.equal(model.norm.running_mean, before)
