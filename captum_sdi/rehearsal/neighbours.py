"""Nothing depends on the neighbours unnoticed: two examples of a batch are compared with themselves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.batch import map_tensors, select, tensors_in
from captum_sdi.data.fingerprints import used_positions
from captum_sdi.data.losses import IGNORED, target_labels, untargeted_examples
from captum_sdi.data.side import Side
from captum_sdi.features import StepFeatures
from captum_sdi.precision import is_coarse
from captum_sdi.words import warn_user

LARGEST, LARGEST_COARSE = 1e-2, 0.25
"""Beyond which relative difference of features they are refused; in half precision, whose kernels round anew for every
batch size, only what no rounding does."""

CHECKED = (1, 3, 9)
"""The batches that are looked at although nothing about them is new; later ones would be refused after long work."""


@dataclass(frozen=True)
class RunBatch:
    """A batch whose features have been computed, and how those of an example alone are."""

    capture: Capture
    raw: Any
    side: Side
    positions: Sequence[int]
    features: StepFeatures
    called_once: frozenset[str]
    """Names of the layers that the model called once for the whole batch, or for one example of it."""
    features_of: Callable[[Any, Sequence[int]], StepFeatures]
    """From a batch and its examples' positions."""
    collated_alone: Callable[[int], Any]
    """From a position to the batch of that example alone; None where the data set cannot tell."""


class Neighbours:
    """Compares at a few of each side's batches, and at the first one with padding or with layers called once.

    What depends on what the examples are, such as sorting them by length, need not show in the first batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._checked: dict[Any, set[str]] = {}
        self._batches: dict[Any, set[tuple[str, int]]] = {}
        self._warned: set[Any] = set()

    def check(self, side: Any, ran: RunBatch) -> None:
        """Refuse, or warn of, features that are others in a batch than alone.

        Args:
            side: What holds for all batches that are run alike.
            ran: A batch of that side.

        Raises:
            ValueError: If they differ by more than any rounding does.
        """
        checked = self._checked.setdefault(side, set())
        if ran.features.size == 1:
            return
        news = {f"once {name}" for name in ran.called_once} | {"neighbours", "padding"}
        batches = self._batches.setdefault(side, set())
        if len(batches) < CHECKED[-1]:
            batches.add((ran.side.name, ran.positions[0]))
        news.update(f"batch {number}" for number in CHECKED if number <= len(batches))
        if news <= checked:
            return
        lengths = example_lengths(ran)
        if len(set(lengths)) == 1:
            news.remove("padding")
        numbers = telling_examples(ran, lengths)
        if numbers and not news <= checked:  # without a target there is nothing to see: a later batch's turn
            for number in numbers:
                self._compare(side, ran, number)
            checked |= news

    def _compare(self, side: Any, ran: RunBatch, number: int) -> None:
        position = ran.positions[number]
        example = alone(ran, number)
        features = ran.features_of(example, [position])
        difference = relative_difference(ran.features, number, features)
        coarse = is_coarse(self._model)
        largest = LARGEST_COARSE if coarse else LARGEST
        smallest = largest if coarse else rounding(features)
        if difference <= smallest:
            return
        # The gradient of a loss of nearly zero is a difference of numbers nearly alike.
        loss = float(ran.capture.forward(example, ran.side)[1].detach().abs())
        single = torch.finfo(torch.float32)
        cancelled = 10 * single.eps / max(loss, single.tiny)
        sentence = (
            f"The features of {ran.side.name} example {position} depend on the batch: in a batch of "
            f"{ran.features.size} they differ by {difference:.2g} of their length from those of the example alone. "
        )
        if not difference <= largest + cancelled:
            raise ValueError(sentence + CAUSES + WAY_OUT)
        if difference > smallest + cancelled and side not in self._warned:
            self._warned.add(side)
            warn_user(sentence + "That is more than rounding. " + CAUSES + WAY_OUT)


CAUSES = (
    "Likely causes: padding that the model sees, for want of an attention mask or, padded on the left, of position "
    "ids; a random state drawn anew for each call or from a seed per call (fix one noise per position: NOISE[:, "
    ":S].expand(n, -1, -1)); a loss divided by a count over the batch; layers that mix examples, as BatchNorm does; a "
    "forward that takes examples one by one or in groups; a loop that is chaotic in float32 (try model.double()). "
)
WAY_OUT = "Mend it, or pass batch_size=1 (to a DataLoader, too; inputs as a list of rows)."


def rounding(features: StepFeatures) -> float:
    """Return what rounding alone may change, relative to an example's features."""
    is_double = all(row.dtype == torch.float64 for row in features.rows.values())
    return 1e-8 if is_double else 1e-4


def relative_difference(
    batch: StepFeatures,
    number: int,
    alone: StepFeatures,
) -> float:
    """Return the norm of the difference over that of the example alone, all parameters' rows together."""
    distance, length = 0.0, 0.0
    for name, row in batch.rows.items():
        single_bins, batch_bins = alone.rows[name][0], row[number]
        n_bins = max(len(single_bins), len(batch_bins))  # an example may run fewer steps alone
        single_bins, batch_bins = (F.pad(bins, (0, 0, 0, n_bins - len(bins))) for bins in (single_bins, batch_bins))
        distance += float((batch_bins - single_bins).norm()) ** 2
        length += float(single_bins.norm()) ** 2
    if distance == 0:
        return 0.0
    return (distance / length) ** 0.5 if length else float("inf")


# --- which examples, and what they are alone ---


def example_lengths(ran: RunBatch) -> list[int]:
    """Return how many positions of each example are attended to, or else predicted; zeros where nothing tells."""
    mask = ran.raw.get("attention_mask") if hasattr(ran.raw, "get") else None
    labels = target_labels(ran.raw)
    counted = None
    if isinstance(mask, Tensor) and mask.ndim == 2:
        counted = mask.bool()
    elif labels is not None and labels.ndim == 2:
        counted = labels != IGNORED
    return [0] * ran.features.size if counted is None else counted.sum(1).tolist()


def telling_examples(ran: RunBatch, lengths: Sequence[int]) -> list[int]:
    """Return the most padded example and the longest, or the last, of those in which something is predicted."""
    untargeted = set(untargeted_examples(ran.raw, ran.side.loss_fn))
    numbers = [number for number in range(ran.features.size) if number not in untargeted]
    if len(numbers) < 2:
        return numbers
    by_length = sorted(numbers, key=lambda number: lengths[number])
    return [by_length[0], by_length[-1]]


def alone(ran: RunBatch, number: int) -> Any:
    """Return one example as it would be with batch_size=1; where the data set cannot tell, without its padding.

    A collate function that leaves a field out for a single row, such as the mask, does not tell what the model can be
    called with.
    """
    collated = ran.collated_alone(ran.positions[number])
    if collated is None or len(tensors_in(collated)) != len(tensors_in(ran.raw)):
        return without_padding(select(ran.raw, [number]))
    return collated


def without_padding(raw: Any) -> Any:
    """Cut the columns off that the attention mask says are padding, where every tensor is ``(1, p)``."""
    used = used_positions(raw)
    if used is None or used.all() or not used.any():
        return raw
    places = used[0].nonzero().flatten()
    span = slice(int(places[0]), int(places[-1]) + 1)
    shapes: set[Any] = set()
    map_tensors(lambda tensor: shapes.add(tensor.shape), raw)
    if shapes != {used.shape}:
        return raw
    return map_tensors(lambda tensor: tensor[:, span], raw)
