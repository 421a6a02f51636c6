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

    @property
    def manner(self) -> Manner:
        """How its examples are run, whatever its name."""
        return Manner(self.loss_fn, self.forward_kwargs)


@dataclass(frozen=True, eq=False)
class Manner:
    """A loss and forward keywords; equal to another one of the very same objects.

    What is known of a manner is kept under it. It holds both objects: the id of one that is gone is given to another,
    of which nothing is known.

    Example:
        >>> known = {Side("train", lambda output, labels: output.sum(1), None).manner}
        >>> Side("test", lambda output, labels: output.mean(1), None).manner in known
        False
    """

    loss_fn: LossFn
    forward_kwargs: ForwardKwargs | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Manner):
            return False
        return self.loss_fn is other.loss_fn and self.forward_kwargs is other.forward_kwargs

    def __hash__(self) -> int:
        return hash((id(self.loss_fn), id(self.forward_kwargs)))
