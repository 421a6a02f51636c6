"""What a preconditioner is, and what it may say of the checkpoints that its scores are summed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from captum_sdi.checkpoints import Checkpoint

if TYPE_CHECKING:
    from captum_sdi.passes import Point
    from captum_sdi.train_side import TrainSide

ActsOn = Literal["gradient", "row", "whole"]
"""Where a preconditioner acts; see `Preconditioner.acts_on`."""

Fitted = Callable[..., Any]
"""A linear map: of ``(parameter name, gradient or row)``, or with ``"whole"`` of exact features of all parameters."""


@runtime_checkable
class Preconditioner(Protocol):
    """A linear map on the test side's gradients; its settings are the fields of a frozen dataclass.

    Three more attributes may be there:

    * ``sums``: how checkpoints are summed. ``"rates"``, which is meant where it is absent: weighed by their learning
      rates; ``"mean"``: their mean; ``"last"``: the last one alone counts, and no other is loaded.
    * ``check_checkpoints(checkpoints)``: raises where a checkpoint lacks something, before any work.
    * ``check_rows(features)``: raises where rows of some kind, given by features of no example, cannot be taken.
    """

    @property
    def acts_on(self) -> ActsOn:
        """Say where it acts.

        ``"gradient"``: on each per-example gradient (`captum_sdi.features.Outer` or ``Dense``) before the sketch;
        ``"row"``: on features ``(q, b, width)`` behind it; ``"whole"``: on all parameters' entries together, exact
        `captum_sdi.features.StepFeatures`, which are sketched afterwards.
        """
        ...

    def fit(self, point: Point, train: TrainSide) -> Fitted:
        """Return the map at one checkpoint.

        Args:
            point: The model at that checkpoint; its name, source and learning rate are ``point.checkpoint``.
            train: The train side: its features, block by block, are ``train.blocks(point)``.
        """
        ...


def summed_checkpoints(preconditioner: Preconditioner, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints that count, with the weights that the preconditioner's unit gives them.

    Raises:
        ValueError: If the preconditioner finds that one of them lacks something.

    Example:
        >>> from captum_sdi.preconditioners import Fisher
        >>> both = [Checkpoint("early.pt", "early.pt", rate=0.1), Checkpoint("late.pt", "late.pt", rate=0.01, number=1)]
        >>> [checkpoint.weight for checkpoint in summed_checkpoints(Fisher(), both)]
        [0.5, 0.5]
    """
    sums = getattr(preconditioner, "sums", "rates")
    counting = list(checkpoints)
    if sums == "last":
        counting = [replace(checkpoints[-1], number=0, fixed_weight=1.0)]
    elif sums == "mean":
        share = 1 / len(checkpoints)
        counting = [replace(checkpoint, fixed_weight=share) for checkpoint in checkpoints]
    check = getattr(preconditioner, "check_checkpoints", None)
    if check is not None:
        check(counting)
    return counting
