"""What a preconditioner is, and the one place where it meets the test side's gradients or rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from captum_sdi.features import StepFeatures

if TYPE_CHECKING:
    from captum_sdi.blocks import Block, Source
    from captum_sdi.data.examples import Examples
    from captum_sdi.passes import Point

Fitted = Callable[[str, Any], Any]
"""``(parameter name, gradient or row)`` to one of the same kind: a linear map for each parameter."""


@runtime_checkable
class Preconditioner(Protocol):
    """A linear map on the test side's gradients; its settings are the fields of a frozen dataclass."""

    @property
    def acts_on(self) -> Literal["gradient", "row"]:
        """Say where it acts.

        ``"gradient"``: on each per-example gradient (`captum_sdi.features.Outer` or ``Dense``) before the sketch;
        ``"row"``: on features ``(q, b, width)`` behind it.
        """
        ...

    def fit(self, point: Point, train: Source) -> Fitted:
        """Return the map at one checkpoint.

        Args:
            point: The model at that checkpoint; its name, source and learning rate are ``point.checkpoint``.
            train: The train side's features, block by block: ``train.blocks(point)``.
        """
        ...


def preconditioned_blocks(
    preconditioner: Preconditioner,
    point: Point,
    train: Source,
    tests: Examples,
    *,
    by_step: bool,
) -> Iterator[Block]:
    """Compute the test side's features with the preconditioner applied, P φ.

    Args:
        preconditioner: The linear map P.
        point: The model at a checkpoint.
        train: What P is fitted on.
        tests: The test examples.
        by_step: Keep loop steps apart.

    Yields:
        Features ``(q, b, width)`` for each parameter, one block a batch.
    """
    fitted = preconditioner.fit(point, train)
    if preconditioner.acts_on == "gradient":
        yield from point.blocks(tests, by_step=by_step, transform=fitted)
        return
    for block in point.blocks(tests, by_step=by_step):
        yield replace(block, features=apply_to_rows(fitted, block.features))


def apply_to_rows(fitted: Fitted, features: StepFeatures) -> StepFeatures:
    """Apply a preconditioner that acts on rows."""
    rows = {name: fitted(name, row) for name, row in features.rows.items()}
    return StepFeatures(rows, features.noise, features.n_steps)
