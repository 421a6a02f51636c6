"""The first example of each side that is run alone, and every check of the list that looks at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.batch import split_batch
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.data.side import Side
from captum_sdi.features import LoopSpec
from captum_sdi.loop.table import FoundLoop
from captum_sdi.precision import is_coarse
from captum_sdi.rehearsal.alone import AloneRun
from captum_sdi.rehearsal.witness import Witness, agree
from captum_sdi.words import warn_user


@dataclass(frozen=True)
class FirstExample:
    """An example of a side in which something is predicted, run alone."""

    capture: Capture
    side: Side
    run: AloneRun
    witness: Witness
    """What else the model returned."""
    as_run: Side
    """How it was run: where the model computes a loss from labels, it was handed them."""
    may_vary: bool
    """Whether random numbers were drawn, or buffers changed."""
    n_runs: int = 1
    """How often, until it worked."""

    @property
    def loss(self) -> Tensor:
        """The loss, a scalar."""
        return self.run.losses[0]


def check_loss_is_finite(first: FirstExample) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        ValueError: If it is.
    """
    first.capture.check_finite(first.run.losses.isfinite(), "loss", first.side, [first.run.position])


def check_loss_has_a_gradient(first: FirstExample) -> None:
    """Refuse a loss that no gradient leads back from; one of no targeted parameter alone is allowed.

    Raises:
        ValueError: If the loss depends on no parameter.
    """
    if not first.run.has_gradient:
        first.capture.check_gradient(first.run.example, first.side)


def check_default_loss(first: FirstExample) -> None:
    """Compare the default loss with the model's own, where it has one.

    Raises:
        ValueError: If they differ.
    """
    own_loss, logits = first.witness.own_loss, first.witness.logits
    if own_loss is None or agree(own_loss, first.loss):
        return
    remedy = "Pass loss_fn= with the loss you trained with: (output, labels) to one value per example."
    _, _, labels = split_batch(first.run.example)
    unshifted = TokenCrossEntropy(shift=False)
    if logits is not None and agree(own_loss, unshifted(logits, labels.to(logits.device))[0]):
        remedy = "Pass loss_fn=captum_sdi.data.losses.TokenCrossEntropy(shift=False), which agrees with it."
    raise ValueError(
        f"The default loss, {first.side.loss_fn}, is {first.loss.item():.6g} for the first {first.side.name} example "
        f"looked at, the model's own loss {own_loss.item():.6g}. {remedy}"
    )


CHECKS: tuple[Callable[[FirstExample], None], ...] = (
    check_loss_is_finite,
    check_loss_has_a_gradient,
    check_default_loss,
)
"""In this order: a later one may rely on the earlier ones."""


def warn_if_nothing_repeats(first: FirstExample, loop: LoopSpec) -> None:
    """Warn where the loop that the user named runs once; one that was found has warned already."""
    if first.capture.n_steps == 1 and not isinstance(loop, FoundLoop):
        warn_user(
            f"Nothing repeats: {loop} runs once in the first {first.side.name} example looked at. It is taken as one "
            "loop step, and influence as TracIn. Name the repeated module in loop=, or pass None to look for it."
        )


def check_repeats(first: FirstExample) -> bool:
    """Refuse a model whose loss for the same example is another one in a second pass.

    Returns:
        Whether the loss is another one where the model is handed the labels.

    Raises:
        ValueError: If it is, run the same way.
    """
    losses = first.capture.forward(first.run.example, first.side)[1].detach()
    if repeats(first, losses):
        return False
    if first.witness.sees_labels:
        losses = first.capture.forward(first.run.example, first.as_run)[1].detach()
        if repeats(first, losses):
            return True
    raise ValueError(
        f"The model is not deterministic: the first {first.side.name} example looked at has loss "
        f"{first.loss.item():.6g}, then {losses.item():.6g}. Fix its randomness, e.g. with a seeded state in "
        "forward_kwargs=."
    )


def repeats(first: FirstExample, losses: Tensor) -> bool:
    """Say whether losses ``(1,)`` are the first ones, up to rounding."""
    # Sums in another order from call to call, as on some GPU kernels, are no randomness.
    tolerance = 1e-3 if is_coarse(first.capture.model) else 1e-5
    return torch.allclose(first.run.losses, losses, rtol=tolerance, equal_nan=True)
