"""A batch, and two of its examples alone: which two tell most, and what they are without their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.batch import batch_size, select, tensors_in
from captum_sdi.data.losses import IGNORED, target_labels, untargeted_examples
from captum_sdi.data.padding import without_padding
from captum_sdi.data.side import Side
from captum_sdi.features import StepFeatures


@dataclass(frozen=True)
class BatchRun:
    """A batch at a point, and how features are computed there."""

    capture: Capture
    raw: Any
    side: Side
    positions: Sequence[int]
    compute: Callable[..., StepFeatures]
    """From a batch, its side and its examples' positions; see `captum_sdi.pieces.Pieces.features`."""
    collated_alone: Callable[[int], Any]
    """From a position to the batch of that example alone; None where the data set cannot tell."""

    @property
    def size(self) -> int:
        """How many examples there are."""
        return len(self.positions)

    def features(self) -> StepFeatures:
        """Compute the features of all examples together."""
        return self.compute(self.raw, self.side, self.positions)


@dataclass(frozen=True)
class AloneRun:
    """An example that was run alone."""

    example: Any
    """As a batch of one."""
    position: int
    """In its data set."""
    losses: Tensor
    """``(1,)``."""
    has_gradient: bool
    """Whether a gradient leads back from them."""
    features: StepFeatures
    """Empty where none were asked for."""


def run_alone(
    batch: BatchRun,
    number: int,
    *,
    example: Any = None,
    side: Side | None = None,
    checks_uses: bool = False,
) -> AloneRun:
    """Run an example of a batch alone.

    Args:
        batch: The batch.
        number: Of the example in it.
        example: What it is alone, where that is known.
        side: How it is run; None: as the batch.
        checks_uses: Let other modules answer for the parameters that are used outside their layer's calls.

    Returns:
        The run.
    """
    example = alone(batch, number) if example is None else example
    position = batch.positions[number]
    features = batch.compute(example, side or batch.side, [position], checks_uses=checks_uses)
    state = batch.capture.tape.state
    return AloneRun(example, position, state.losses, state.has_gradient, features)


def example_sizes(raw: Any) -> list[tuple[int, int]]:
    """Return how many positions of each example are attended to, and how many predicted; zeros where nothing tells."""
    n = batch_size(raw)
    mask = raw.get("attention_mask") if hasattr(raw, "get") else None
    labels = target_labels(raw)
    n_targets = n_attended = [0] * n
    if labels is not None and labels.ndim == 2:
        n_attended = n_targets = (labels != IGNORED).sum(1).tolist()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        n_attended = mask.bool().sum(1).tolist()
    return list(zip(n_attended, n_targets, strict=True))


def attended_lengths(raw: Any) -> list[int]:
    """Return how many positions of each example are attended to; zeros where nothing tells."""
    return [n_attended for n_attended, _ in example_sizes(raw)]


def telling_examples(raw: Any, side: Side) -> list[int]:
    """Return the most padded example, and one that differs from it in as many sizes as any does, or the last.

    Of a size that is not the same everywhere, such as the number of targets, the two are not both the batch's largest
    or both its smallest. Examples in which nothing is predicted do not count: fewer than two may be left.
    """
    untargeted = set(untargeted_examples(raw, side.loss_fn))
    numbers = [number for number in range(batch_size(raw)) if number not in untargeted]
    if len(numbers) < 2:
        return numbers
    sizes = example_sizes(raw)
    shortest = min(numbers, key=lambda number: sizes[number])

    def unlike_shortest(number: int) -> tuple[int, tuple[int, int], int]:
        n_differing = sum(own != other for own, other in zip(sizes[number], sizes[shortest], strict=True))
        return n_differing, sizes[number], number

    numbers.remove(shortest)
    return [shortest, max(numbers, key=unlike_shortest)]


def alone(batch: BatchRun, number: int) -> Any:
    """Return one example as it would be with batch_size=1; where the data set cannot tell, without its padding.

    A collate function that leaves a field out for a single row, such as the mask, does not tell what the model can be
    called with.
    """
    if batch.size == 1:
        return batch.raw
    collated = batch.collated_alone(batch.positions[number])
    if collated is None or len(tensors_in(collated)) != len(tensors_in(batch.raw)):
        return without_padding(select(batch.raw, [number]))
    return collated
