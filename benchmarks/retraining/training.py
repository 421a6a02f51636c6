"""AdamW written out, for one model or a stack of models that differ in how much each training example weighs.

    g = gradient of sum_i w_i l_i / B,   B the size of the batch whatever the weights are
    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    theta = (1 - rate decay) theta - rate m^ / (sqrt(v^) + eps)        (Loshchilov & Hutter, arXiv 1711.05101)

To leave an example out is to train with weight 0 in the same order. Weights lie in one flat vector `(k, parameters)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retraining.beds import Bed, Rows

State = dict[str, Tensor]


class Moment(NamedTuple):
    """A model before an update."""

    weights: Tensor
    """`(parameters,)`."""
    second_moment: Tensor
    """`(parameters,)`: v^, with bias correction; zero before the first update."""


@dataclass(frozen=True)
class Trained:
    """Models at the end of training."""

    weights: Tensor
    """`(k, parameters)`."""
    second_moment: Tensor
    """`(k, parameters)`: v^."""
    path: list[Moment]
    """The first model before each update; empty unless asked for."""


class Flat:
    """A model's parameters as slices of one vector."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.start = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def state(self, weights: Tensor) -> State:
        """Return views of a vector `(parameters,)` by name."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = weights.split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def train(bed: Bed, weights: Tensor, keep_path: bool = False) -> Trained:
    """Train a model for each row of `weights (k, n)`."""
    flat = Flat(bed.start())
    theta = flat.start.expand(len(weights), -1).clone()
    first = torch.zeros_like(theta)
    second = torch.zeros_like(theta)
    corrected = second.clone()
    (beta1, beta2), path = bed.adam.betas, []
    weights = weights.to(bed.dtype)
    # The math backend alone maps over models, and has the second derivatives that other methods need.
    with sdpa_kernel(SDPBackend.MATH):
        for update, (rate, batch) in enumerate(zip(bed.rates, bed.batches, strict=True), start=1):
            if keep_path:
                path.append(Moment(theta[0], corrected[0]))
            gradient = gradients(bed, flat, theta, weights[:, batch], batch)
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            mean = first / (1 - beta1**update)
            corrected = second / (1 - beta2**update)
            spread = corrected.sqrt().add_(bed.adam.eps)
            theta = theta.mul(1 - rate * bed.adam.weight_decay).addcdiv_(mean, spread, value=-rate)
    return Trained(theta, corrected, path)


def gradients(bed: Bed, flat: Flat, theta: Tensor, weights: Tensor, batch: Tensor) -> Tensor:
    """Return the gradients `(k, parameters)` of the weighted losses of a batch; `weights` are `(k, b)`."""
    if len(theta) > 1:
        rows = rows_at(bed.train, batch)
        of_one = grad(lambda vector, weight: weighted_loss(bed, flat, vector, rows, weight, len(batch)))
        return vmap(of_one)(theta, weights)
    kept = weights[0].nonzero()[:, 0]
    if len(kept) == 0:
        return torch.zeros_like(theta)
    vector = theta[0].detach().requires_grad_()
    loss = weighted_loss(bed, flat, vector, rows_at(bed.train, batch[kept]), weights[0, kept], len(batch))
    return torch.autograd.grad(loss, vector)[0][None]


def weighted_loss(bed: Bed, flat: Flat, vector: Tensor, rows: Rows, weights: Tensor, size: int) -> Tensor:
    """Return sum_i w_i l_i / size."""
    inputs = {"input_ids": rows["input_ids"], **bed.forward_kwargs}
    output = functional_call(flat.model, flat.state(vector), kwargs=inputs)
    return (weights * bed.loss(output, rows["labels"])).sum() / size


def rows_at(rows: Rows, positions: Tensor) -> Rows:
    return {name: column[positions] for name, column in rows.items()}


def model_with(bed: Bed, weights: Tensor) -> nn.Module:
    """Return a model with these weights `(parameters,)`."""
    model = bed.start()
    load(model, weights)
    return model


@torch.no_grad()
def load(model: nn.Module, weights: Tensor) -> None:
    """Put weights `(parameters,)` into a model."""
    state = Flat(model).state(weights)
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])
