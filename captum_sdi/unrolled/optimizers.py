"""AdamW and SGD, each with the adjoint of its step.

A state is what an update changes: the parameters first, the optimizer's moments behind them, each a vector ``(size,)``
as `captum_sdi.parameter_vector.ParameterVector` lays it out. Steps repeat the arithmetic of `torch.optim` operation by
operation, so that a replay ends at the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from captum_sdi.words import first_few

State = tuple[Tensor, ...]
"""The parameters ``(size,)``, then the optimizer's moments, ``(size,)`` each; of an adjoint ``(seeds, size)`` each."""


@dataclass(frozen=True)
class UpdateSettings:
    """What is particular to one update."""

    number: int
    """1 for the first."""
    rate: float
    """The learning rate."""
    decay: Tensor
    """``(size,)`` the weight decay of every entry."""


class Pullback(NamedTuple):
    """The adjoint of one optimizer step: how much the seeds change with what went into it."""

    direction: Tensor
    """``(seeds, size)`` with the gradient."""
    earlier: State
    """``(seeds, size)`` each, with the state before, at a fixed gradient."""


class Optimizer(Protocol):
    """How gradients change the parameters; a frozen dataclass of its settings."""

    @property
    def weight_decay(self) -> float:
        """The weight decay of the parameters that have one."""
        ...

    @property
    def no_decay(self) -> Sequence[str]:
        """Parameters without weight decay: names, or what is contained in names."""
        ...

    def initial(self, vector: Tensor) -> State:
        """Return the state before the first update."""
        ...

    def step(self, state: State, gradient: Tensor, update: UpdateSettings) -> State:
        """Return the state after an update."""
        ...

    def pullback(
        self,
        state: State,
        gradient: Tensor,
        update: UpdateSettings,
        adjoint: State,
    ) -> Pullback:
        """Return the adjoint of `step`.

        Args:
            state: Before the update.
            gradient: Of the update.
            update: Its settings.
            adjoint: ``(seeds, size)`` each: how much the seeds change with the state after the update.
        """
        ...


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), as `torch.optim.AdamW`.

        m = β₁ m + (1 - β₁) g,   v = β₂ v + (1 - β₂) g²,   m̂ = m / (1 - β₁ᵏ),   v̂ = v / (1 - β₂ᵏ)
        θ = (1 - η λ) θ - η m̂ / (√v̂ + ε)

    Args:
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        no_decay: Parameters without decay: a parameter's name, or what its name contains, such as "bias".

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> optimizer = AdamW(weight_decay=0.1, no_decay=("bias",))
        >>> state = optimizer.initial(torch.ones(1))
        >>> update = UpdateSettings(number=1, rate=0.01, decay=torch.tensor([0.1]))
        >>> optimizer.step(state, torch.tensor([3.0]), update)[0]  # one rate down, and 0.001 of decay
        tensor([0.9890])
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "no_decay", checked_names(self.no_decay))
        if len(self.betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"AdamW(betas=...) must be two numbers from 0 to below 1, got {self.betas}.")
        check_at_least_zero("AdamW", {"eps": self.eps, "weight_decay": self.weight_decay})

    def initial(self, vector: Tensor) -> State:
        """Return the parameters and two moments of zero."""
        return vector, torch.zeros_like(vector), torch.zeros_like(vector)

    def step(self, state: State, gradient: Tensor, update: UpdateSettings) -> State:
        """Return parameters and moments after an update."""
        vector, _, _ = state
        first_moment, second_moment = self._moments(state, gradient)
        spread = self._root(second_moment, update).add_(self.eps)
        rate = update.rate / (1 - self.betas[0] ** update.number)
        decayed = vector.mul(1 - update.rate * update.decay)
        return decayed.addcdiv_(first_moment, spread, value=-rate), first_moment, second_moment

    def pullback(
        self,
        state: State,
        gradient: Tensor,
        update: UpdateSettings,
        adjoint: State,
    ) -> Pullback:
        """Return the adjoint of `step`, with D = 1 / (√v̂ + ε) and S = m̂ D² / (2 √v̂), zero where v̂ is.

        M = m̄ - η / (1 - β₁ᵏ) D θ̄,   V = v̄ + η / (1 - β₂ᵏ) S θ̄,   c = (1 - β₁) M + 2 (1 - β₂) g V
        """
        vector_bar, first_bar, second_bar = adjoint
        beta1, beta2 = self.betas
        first_moment, second_moment = self._moments(state, gradient)
        root = self._root(second_moment, update)
        spread = root + self.eps
        correction1 = 1 - beta1**update.number
        correction2 = 1 - beta2**update.number
        slope = first_moment / correction1 / (2 * root * spread.square())
        slope = torch.where(second_moment > 0, slope, 0)
        first_total = torch.addcmul(first_bar, vector_bar, update.rate / correction1 / spread, value=-1)
        second_total = torch.addcmul(second_bar, vector_bar, update.rate / correction2 * slope)
        through_square = 2 * (1 - beta2) * gradient
        direction = torch.addcmul((1 - beta1) * first_total, second_total, through_square)
        earlier_vector = vector_bar * (1 - update.rate * update.decay)
        earlier = earlier_vector, beta1 * first_total, beta2 * second_total
        return Pullback(direction, earlier)

    def _moments(self, state: State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        _, first_moment, second_moment = state
        beta1, beta2 = self.betas
        squared = second_moment.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return first_moment.lerp(gradient, 1 - beta1), squared

    def _root(self, second_moment: Tensor, update: UpdateSettings) -> Tensor:
        """Return ``√v̂``."""
        correction = 1 - self.betas[1] ** update.number
        return second_moment.sqrt().div_(math.sqrt(correction))


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum, as `torch.optim.SGD`.

        g = g + λ θ,   b = μ b + g,   θ = θ - η b, or with Nesterov's momentum θ - η (g + μ b)

    Args:
        momentum: μ.
        nesterov: Whether momentum is Nesterov's.
        weight_decay: λ.
        no_decay: Parameters without decay: a parameter's name, or what its name contains, such as "bias".

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> optimizer = SGD(momentum=0.9)
        >>> update = UpdateSettings(number=1, rate=0.1, decay=torch.zeros(1))
        >>> optimizer.step(optimizer.initial(torch.ones(1)), torch.tensor([3.0]), update)[0]
        tensor([0.7000])
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "no_decay", checked_names(self.no_decay))
        check_at_least_zero("SGD", {"momentum": self.momentum, "weight_decay": self.weight_decay})
        if self.nesterov and self.momentum == 0:
            raise ValueError("SGD(nesterov=True) needs a momentum above 0.")

    def initial(self, vector: Tensor) -> State:
        """Return the parameters and a momentum of zero."""
        return vector, torch.zeros_like(vector)

    def step(self, state: State, gradient: Tensor, update: UpdateSettings) -> State:
        """Return parameters and momentum after an update."""
        vector, buffer = state
        decayed = gradient + update.decay * vector
        buffer = self.momentum * buffer + decayed
        change = decayed + self.momentum * buffer if self.nesterov else buffer
        return vector.add(change, alpha=-update.rate), buffer

    def pullback(
        self,
        state: State,
        gradient: Tensor,
        update: UpdateSettings,
        adjoint: State,
    ) -> Pullback:
        """Return the adjoint of `step`: c = b̄ - η θ̄, with Nesterov's momentum b̄ - η (1 + μ) θ̄."""
        vector_bar, buffer_bar = adjoint
        change_bar = -update.rate * vector_bar
        if self.nesterov:
            buffer_total = buffer_bar + self.momentum * change_bar
            direction = buffer_total + change_bar
        else:
            direction = buffer_total = buffer_bar + change_bar
        earlier = vector_bar + update.decay * direction, self.momentum * buffer_total
        return Pullback(direction, earlier)


def decays(
    optimizer: Optimizer,
    shapes: dict[str, torch.Size],
    like: Tensor,
) -> Tensor:
    """Return the weight decay of every entry.

    An entry of ``no_decay`` that is a parameter's name means this parameter, any other all whose names contain it.

    Args:
        optimizer: Says what has none.
        shapes: By parameter, in the vector's order.
        like: Of the dtype and device of the vector.

    Returns:
        ``(size,)``.

    Raises:
        ValueError: If something in ``no_decay`` is in no name.
    """
    unused = [entry for entry in optimizer.no_decay if not any(entry in name for name in shapes)]
    if unused:
        raise ValueError(
            f"no_decay={first_few(unused)} is in no trainable parameter's name; these are {first_few(list(shapes))}."
        )
    whole_names = {entry for entry in optimizer.no_decay if entry in shapes}
    fragments = [entry for entry in optimizer.no_decay if entry not in whole_names]
    pieces = []
    for name, shape in shapes.items():
        is_free = name in whole_names or any(entry in name for entry in fragments)
        decay = 0.0 if is_free else optimizer.weight_decay
        piece = like.new_full((shape.numel(),), decay)
        pieces.append(piece)
    return torch.cat(pieces)


# --- checks ---


def is_number(value: Any) -> bool:
    """Say whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_at_least_zero(owner: str, settings: dict[str, Any]) -> None:
    """Refuse settings that are no numbers of at least 0.

    Raises:
        ValueError: If one is not.
    """
    for name, setting in settings.items():
        if not is_number(setting) or setting < 0:
            raise ValueError(f"{owner}({name}=...) must be a number of at least 0, got {setting!r}.")


def checked_names(names: Any) -> tuple[str, ...]:
    """Return names as a tuple.

    Raises:
        ValueError: If they are none.
    """
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"no_decay= must be a tuple of names, or parts of names, got {names!r}.")
    return tuple(names)
