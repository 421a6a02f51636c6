"""What a layer rule is, and the arithmetic that rules share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_sdi.features import Dense, Gradient

PerExample = tuple[str, slice, Gradient]
"""The layer's own name of a parameter, the examples, and their gradients of that parameter."""

Gradients = Callable[[nn.Module, Tensor, Tensor, Sequence[str]], Iterator[PerExample]]
"""``(module, activation, backprop, wanted parameter names)`` to the gradients of those parameters."""

PositionTest = Callable[[nn.Module, Tensor], bool]
"""``(module, activation)`` to whether positions along the second axis can be taken for examples."""

WEIGHT_AND_BIAS = frozenset({"weight", "bias"})


@dataclass(frozen=True)
class Rule:
    """How a layer's per-example gradients are formed; `rule` describes the fields."""

    name: str
    gradients: Gradients
    parameters: frozenset[str] | None = None
    fresh_output: bool = False
    positionwise: bool | PositionTest = False

    def knows(self, names: Collection[str]) -> bool:
        """Say whether the rule is for a layer whose own parameters have these names."""
        return self.parameters is None or self.parameters.issuperset(names)

    def is_positionwise(self, module: nn.Module, activation: Tensor) -> bool:
        """Say whether each position ``(n, p, ...)`` of this activation can be taken for an example."""
        if callable(self.positionwise):
            return self.positionwise(module, activation)
        return self.positionwise


def merge_positions(tensor: Tensor, trailing: int = 1) -> Tensor:
    """Reshape ``(n, ..., *trailing)`` to ``(n, p, *trailing)``, with one axis of positions."""
    shape = tensor.shape[tensor.ndim - trailing :]
    return tensor.reshape(tensor.shape[0], -1, *shape)


def positions_as_examples(tensor: Tensor) -> Tensor:
    """Reshape ``(n, p, ...)`` to ``(n * p, 1, ...)``: every position becomes an example."""
    return tensor.reshape(-1, 1, *tensor.shape[2:])


def summed_over_positions(per_position: Tensor) -> Dense:
    """Sum ``(n, p, *shape)`` over positions, in at least float32."""
    return Dense(lifted(per_position).sum(1))


def lifted(tensor: Tensor) -> Tensor:
    """Return a tensor in at least float32: half precision has too few digits for sums."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
