"""No preconditioner at all: the influence is TracIn's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from captum_sdi.blocks import Source
    from captum_sdi.passes import Point
    from captum_sdi.preconditioners.base import Fitted


@dataclass(frozen=True)
class Identity:
    """P = 1: inner products of gradients as they are.

    Example:
        >>> Identity().acts_on
        'row'
    """

    acts_on: ClassVar[Literal["row"]] = "row"

    def fit(self, point: Point, train: Source) -> Fitted:
        """Return the identity, which needs nothing of the model or the train set."""
        return unchanged


def unchanged(name: str, row: Any) -> Any:
    """Return the row of a parameter as it is."""
    return row
