"""`Adam`: the diagonal that Adam divides its steps by, from the optimizer's state beside each checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from captum_sdi.features import Dense, Gradient, canonical_name
from captum_sdi.preconditioners.moments import Moments, check_has_moments, optimizer_moments
from captum_sdi.words import first_few

if TYPE_CHECKING:
    from captum_sdi.checkpoints import Checkpoint
    from captum_sdi.passes import Point
    from captum_sdi.preconditioners.base import Fitted
    from captum_sdi.train_side import TrainSide

EPS = 1e-8
"""As in `torch.optim.Adam`."""


@dataclass(frozen=True)
class Adam:
    """P = 1 / (√v̂ + ε), entry by entry: TracIn with the steps that Adam takes instead of gradient descent's.

    v̂ = v / (1 - β₂ᵏ) are the second moments at the checkpoint's k-th update (Kingma & Ba 2015). Momentum and weight
    decay do not enter. Checkpoints are summed with their learning rates, as in TracIn (Pruthi et al. 2020).

    It is cheap and rarely a cure: of what retraining without examples does it says little more than TracIn. `Fisher`
    and `Hessian` say more. Standard errors are those of P φ, and cover 91% to 99% where 95% were meant
    (``benchmarks/preconditioner_errors.py``; 89% to 99.9% without P).

    Args:
        moments: From what ``checkpoints_load_func`` takes to v̂ by the parameter's name, each of its parameter's shape.
            None: read from the optimizer's state, ``optimizer.pt`` in the folder of a `transformers.Trainer`, or under
            ``optimizer`` or ``optimizer_state_dict`` in a checkpoint file. It lists parameters by position: they are
            told apart by the Trainer's rule for weight decay, or by their order, and every shape is compared.
        eps: ε; None: that of the optimizer's state, or 1e-8 beside ``moments``.

    Raises:
        TypeError: If ``moments`` is no function, or ``eps`` no number.
        ValueError: If ``eps`` is negative.

    Example:
        >>> import torch
        >>> from captum_sdi import SDIInfluence
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> from captum_sdi.tasks import parity
        >>> train, test = parity(12, max_bits=4).split(held_out=2)
        >>> config = LoopedGPTConfig(vocab_size=train.vocab_size, n_embd=8, n_head=2, n_positions=8, n_loops=3)
        >>> model = LoopedGPTForCausalLM(config)
        >>> squares = {name: torch.full_like(each, 0.01) for name, each in model.named_parameters()}
        >>> adam = Adam(moments=lambda checkpoint: squares)
        >>> sdi = SDIInfluence(model, train, batch_size=4, preconditioner=adam)
        >>> sdi.step_influence(test).trajectories.shape  # (q, n, t)
        torch.Size([2, 10, 3])
    """

    moments: Callable[[Any], Mapping[str, Tensor]] | None = None
    eps: float | None = None

    acts_on: ClassVar[Literal["gradient"]] = "gradient"
    sums: ClassVar[Literal["rates"]] = "rates"

    def __post_init__(self) -> None:
        if self.moments is not None and not callable(self.moments):
            raise TypeError(f"Adam(moments=...) must be a function of a checkpoint, got {self.moments!r}.")
        if self.eps is None:
            return
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float):
            raise TypeError(f"Adam(eps=...) must be a number, got {self.eps!r}.")
        if not self.eps >= 0:
            raise ValueError(f"Adam(eps=...) must not be negative, got {self.eps!r}.")

    def check_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Refuse checkpoints without an optimizer's state, where none is given by a function.

        Raises:
            ValueError: If one has none.
        """
        if self.moments is None:
            for checkpoint in checkpoints:
                check_has_moments(checkpoint.source)

    def fit(self, point: Point, train: TrainSide) -> Fitted:
        """Return the map at one checkpoint."""
        targets = point.capture.targets()
        divisors = self._divisors(point, targets)

        def apply(name: str, gradient: Gradient) -> Gradient:
            entries = gradient.entries(targets[name].shape)
            return Dense(entries / divisors[name].to(entries))

        return apply

    def _divisors(self, point: Point, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return √v̂ + ε of the targeted parameters."""
        source = point.checkpoint.source
        if self.moments is None:
            moments, origin = optimizer_moments(source, point.model, point.trainable), str(source)
        else:
            answer = self.moments(source)
            if not isinstance(answer, Mapping):
                raise TypeError(f"moments= must return second moments by the parameter's name, got {answer!r:.80}.")
            given = {canonical_name(name): square for name, square in answer.items()}
            moments, origin = Moments(given, dict.fromkeys(given, EPS)), "moments="
        divisors = {}
        for name, parameter in targets.items():
            known_as = canonical_name(name)
            square = checked_square(moments.squares, known_as, parameter, origin)
            eps = moments.eps[known_as] if self.eps is None else self.eps
            divisors[name] = square.to(parameter.device).sqrt() + eps
            if not (divisors[name] > 0).all():
                raise ValueError(f"Adam() divides by √v + ε, which is 0 in {known_as!r}: pass Adam(eps=1e-8).")
        return divisors


def checked_square(
    squares: Mapping[str, Tensor],
    name: str,
    parameter: Tensor,
    origin: str,
) -> Tensor:
    """Return the second moments of a parameter.

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If there are none, or they have another shape, are negative or not finite; names their ``origin``.
    """
    if name not in squares:
        raise ValueError(f"{origin} has no second moments of {name!r}, only of {first_few(list(squares))}.")
    square = squares[name]
    if not isinstance(square, Tensor) or square.is_complex():
        raise TypeError(f"{origin} has second moments of {name!r} that are no tensor of real numbers.")
    if square.shape != parameter.shape:
        shapes = f"{tuple(square.shape)} for {name!r}, which has shape {tuple(parameter.shape)}"
        raise ValueError(f"{origin} has second moments of shape {shapes}.")
    if not (square.isfinite().all() and (square >= 0).all()):
        raise ValueError(f"{origin} has second moments of {name!r} that are negative or not finite.")
    return square
