"""The training gradients of groups, summed at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.side import Side
from captum_sdi.direction.contracted import Vectors, weighted_gradients
from captum_sdi.direction.groups import Groups
from captum_sdi.features import StepFeatures
from captum_sdi.index.weights import WeightHashes
from captum_sdi.passes import Point
from captum_sdi.precision import in_float16
from captum_sdi.preconditioners import Identity
from captum_sdi.rehearsal.alone import BatchRun, telling_examples
from captum_sdi.study import Study


@dataclass(frozen=True)
class GroupGradients:
    """The summed training gradients of all groups at one checkpoint."""

    vectors: Vectors
    """By targeted parameter ``(g, *shape)``."""
    weights: str
    """A digest of the model's weights there."""


def group_gradients(study: Study, groups: Groups) -> tuple[GroupGradients, ...]:
    """Sum the training gradients of groups at every checkpoint, one batch in memory at a time.

    Returns:
        Those of each checkpoint, in order.

    Raises:
        ValueError: If the study changes gradients, computes in float16, or has no such training examples.
    """
    check_plain(study)
    n_examples = study.train.stream.n_examples
    if n_examples is not None:
        groups.check_size(n_examples)
    gradients = []
    with study.points() as points:
        for point in points:
            vectors = summed_gradients(point, study, groups)
            gradients.append(GroupGradients(vectors, WeightHashes().of_model(point.model)))
    return tuple(gradients)


def check_plain(study: Study) -> None:
    """Refuse a study whose scores are no products of plain gradients in a precision that sums keep.

    Raises:
        ValueError: If it is one.
    """
    changed = None
    if not isinstance(study.preconditioner, Identity):
        changed = f"preconditioner={study.preconditioner!r}"
    elif study.normalize is not None:
        changed = f"normalize={study.normalize!r}"
    if changed is not None:
        raise ValueError(
            f"A direction is a sum of plain gradients, which {changed} changes example by example: make it from "
            "SDIInfluence without that argument."
        )
    if in_float16(study.engine.model):
        raise ValueError("Sums of float16 gradients lose small ones: make a direction of model.float().")


def summed_gradients(point: Point, study: Study, groups: Groups) -> dict[str, Tensor]:
    """Sum the training gradients of groups at one checkpoint.

    Returns:
        By targeted parameter ``(g, *shape)``.

    Raises:
        ValueError: If there are no such training examples.
    """
    train = study.train
    is_weighed = groups.n_weighed is not None
    only = None if is_weighed else groups.members
    sums: dict[str, Tensor] = {}
    n_read = 0
    with study.progress.bar("sum gradients", None) as bar:
        for positions, raw in train.batches(only):
            n_read += len(positions)
            batch_sums = BatchSums(point, raw, groups.weights_of(positions))
            batch = BatchRun(
                point.capture,
                raw,
                train.side,
                positions.tolist(),
                batch_sums.features,
                train.collated_alone,
            )
            point.rehearsal.features(batch)
            for name, vectors in batch_sums.vectors.items():
                sums[name] = vectors + sums.get(name, 0)
            bar.update()
    check_read(groups, n_read)
    return sums


class BatchSums:
    """The summed gradients of a batch, and beside them those of the examples that are compared with themselves alone.

    Args:
        point: The model at a checkpoint.
        raw: The batch.
        weights: ``(g, n)``.
    """

    def __init__(self, point: Point, raw: Any, weights: Tensor) -> None:
        self._point, self._raw, self._weights = point, raw, weights
        self.vectors: dict[str, Tensor] = {}
        """By targeted parameter ``(g, *shape)``, once the batch has been run."""

    def features(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        checks_uses: bool = False,
    ) -> StepFeatures:
        """Run the batch, or one of its examples alone.

        Returns:
            ``(n, 1, width)`` for each parameter, of the telling examples; zeros for the others.
        """
        capture, n = self._point.capture, len(positions)
        is_batch = raw is self._raw
        weights = self._weights if is_batch else self._weights.new_zeros(0, n)
        told = [] if is_batch and n == 1 else telling_examples(raw, side)
        weights = torch.cat([weights, torch.eye(n).to(weights)[told]])
        sums = weighted_gradients(
            self._point,
            raw,
            side,
            weights,
            is_compared=True,
            checks_uses=checks_uses,
        )
        n_groups = len(weights) - len(told)
        if is_batch:
            self.vectors = {name: vectors[:n_groups] for name, vectors in sums.items()}
        own = {name: vectors[n_groups:].flatten(1).unsqueeze(1) for name, vectors in sums.items()}
        exact = StepFeatures(own, {}, torch.zeros(len(told)))
        sketched = capture.sketched(exact) if told else capture.blank()
        places = torch.tensor(told, dtype=torch.long)

        def spread_out(row: Tensor) -> Tensor:
            return row.new_zeros(n, *row.shape[1:]).index_copy(0, places.to(row.device), row)

        return sketched.map(spread_out, torch.full((n,), capture.n_steps))


def check_read(groups: Groups, n_read: int) -> None:
    """Refuse groups that named more examples than there were to read, or weighed another number.

    Raises:
        ValueError: If they did.
    """
    if groups.n_weighed is not None:
        groups.check_size(n_read)
    elif n_read < len(groups.members):
        raise ValueError(f"groups names {len(groups.members)} training examples, of which train_dataset has {n_read}.")
