"""Influence split by the updates of training, as a method of whatever goes back through a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from captum.log import log_usage
from torch import Tensor

from captum_sdi.features import Bins
from captum_sdi.maps.per_checkpoint import step_labels
from captum_sdi.rehearsal import arguments
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.unrolled.derivative import Derivative
from captum_sdi.unrolled.seeds import Seeds

UPDATE_AXES = ("update", "step")
"""The axes of a map through training."""


class AsksForUpdates:
    """The part of `UnrolledInfluence` that says when in training each example acted."""

    _derivative: Derivative

    @abstractmethod
    def _seeds(
        self,
        inputs: Any,
        *,
        by_step: bool,
        show_progress: bool,
        aggregate: bool = False,
    ) -> Seeds:
        """Compute the gradients of test losses at the end of training."""
        ...

    @log_usage(part_of_slo=True)
    def update_influence(self, inputs: Any, show_progress: bool = False) -> Tensor:
        """Compute when in training each example acted: its influence through every update.

        Args:
            inputs: As for `influence`.
            show_progress: As for `influence`.

        Returns:
            ``(q, n, updates)``; summed over updates it is `influence`.
        """
        seeds = self._seeds(inputs, by_step=False, show_progress=show_progress)
        return -self._derivative.update_scores(seeds.flat, show_progress=show_progress)

    @log_usage(part_of_slo=True)
    def influence_map(
        self,
        inputs: Any,
        indices: Sequence[int] | Tensor,
        axes: Sequence[str] = UPDATE_AXES,
        show_progress: bool = False,
    ) -> InfluenceMap:
        """Split the influence of chosen pairs by updates of training and by loop steps of the test side.

        All updates but one are held as they were, also in what they do to later ones: the parts sum to `influence`,
        and along "update" to `step_influence`. The train side's loop steps are `step_matrix`'s.

        Args:
            inputs: As for `influence`.
            indices: Positions of training examples, ``(k,)``, or ``(q, k)`` as in ``StepInfluence.indices``.
            axes: "update", "step" or both, in any order.
            show_progress: As for `influence`.

        Returns:
            Values ``(q, k, *axes)``, exact; updates are numbered from 0.

        Raises:
            ValueError: If there is another axis, or an index is not in the train set.
        """
        names = checked_update_axes(axes)
        pairs = arguments.checked_pairs(indices)
        unknown = sorted(set(pairs[pairs >= self._derivative.n_examples].tolist()))
        if unknown:
            raise ValueError(f"indices= names training examples {unknown}, which train_dataset does not have.")
        seeds = self._seeds(inputs, by_step="step" in names, show_progress=show_progress)
        q = len(seeds.vectors)
        if pairs.ndim == 2 and len(pairs) != q:
            raise ValueError(f"indices= has {len(pairs)} rows for {q} test examples: pass (q, k), or (k,) for all.")
        chosen, places = pairs.expand(q, -1).unique(return_inverse=True)
        scores = self._derivative.update_scores(seeds.flat, only=chosen, show_progress=show_progress)
        by_pair = -seeds.by_test(scores).permute(0, 2, 3, 1)  # (q, chosen, updates, b)
        rows = torch.arange(q, device=by_pair.device).unsqueeze(1)
        return update_map(by_pair[rows, places.to(by_pair.device)], names, chosen[places])


def checked_update_axes(axes: Any) -> tuple[str, ...]:
    """Refuse axes that no map through training has.

    Returns:
        Their names.

    Raises:
        TypeError: If they are no sequence of names.
        ValueError: If one is unknown, or comes twice.
    """
    if isinstance(axes, str) or not isinstance(axes, Sequence):
        raise TypeError(f'axes= must be a tuple of names, such as ("update", "step"); got {axes!r}.')
    unknown = [name for name in axes if name not in UPDATE_AXES]
    if unknown or len(set(axes)) != len(axes):
        raise ValueError(
            f"axes={tuple(axes)!r}: a map through training has the axes 'update' and 'step', once each. Loop steps of "
            "the train side are those of step_matrix; all other axes those of SDIInfluence.influence_map."
        )
    return tuple(axes)


def update_map(values: Tensor, axes: tuple[str, ...], indices: Tensor) -> InfluenceMap:
    """Put values ``(q, k, updates, b)`` in the order of the axes, the prelude first and the coda last."""
    _, _, n_updates, n_bins = values.shape
    labels: dict[str, tuple[str | int, ...]] = {}
    if "step" in axes:
        order = [Bins.PRELUDE, *range(Bins.of_step(0), n_bins), Bins.CODA]
        values = values[..., order]
        labels["step"] = step_labels(n_bins)
    else:
        values = values.sum(-1)
    if "update" in axes:
        labels["update"] = tuple(range(n_updates))
    else:
        values = values.sum(2)
    if axes == ("step", "update"):
        values = values.transpose(2, 3)
    return InfluenceMap(values=values, axes=axes, labels=labels, indices=indices)
