"""The two sides of an influence: how training examples are run, and how test examples are."""

from __future__ import annotations

from dataclasses import dataclass

from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.losses import LossFn


@dataclass(frozen=True)
class Side:
    """How the examples of one side, training or test, are run: their loss and keywords."""

    name: str
    """The side's name in errors, such as "training"."""
    loss_fn: LossFn
    forward_kwargs: ForwardKwargs | None
    argument: str = "loss_fn"
    """The argument that the loss came from, named in errors."""


def identity(side: Side) -> tuple[int, int]:
    """Return what a side's rehearsal holds for: its loss and its forward keywords."""
    return id(side.loss_fn), id(side.forward_kwargs)
