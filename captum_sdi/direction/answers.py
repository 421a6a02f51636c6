"""What test batches answer to a direction, summed over checkpoints and put into results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.data.batch import split_batch
from captum_sdi.data.targets import target_columns
from captum_sdi.direction.forward_mode import StepDerivatives
from captum_sdi.features import Bins
from captum_sdi.maps.look import first_place, token_ids
from captum_sdi.maps.per_checkpoint import step_labels
from captum_sdi.maps.words import Words
from captum_sdi.scores.contract import Scores
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.result import StepInfluence
from captum_sdi.scores.sums import equally_deep


@dataclass(frozen=True)
class Answers:
    """Influence of groups on the rows of some test batches: examples, or their target tokens."""

    values: Tensor
    """``(r, g, b)``, in the order of `captum_sdi.features.Bins`."""
    n_steps: Tensor
    """``(r,)``."""
    examples: Tensor
    """``(r,)`` the test example of each row."""
    places: Tensor
    """``(r,)`` the position of its target in the text; zeros where a row is an example."""
    ids: tuple[tuple[int, ...], ...]
    """The tokens of each example."""
    has_tokens: bool
    """Whether a row is a target token."""

    @staticmethod
    def of(
        derivatives: StepDerivatives,
        raw: Any,
        positions: Tensor,
        rate: float,
    ) -> Answers:
        """Pick the rows of a batch, and multiply by the checkpoint's weight."""
        values = rate * derivatives.values
        examples = positions
        places = torch.zeros_like(positions)
        has_tokens = derivatives.losses.ndim > 1
        if has_tokens:
            _, _, labels = split_batch(raw)
            is_target = target_columns(derivatives.losses, labels)
            numbers, columns = is_target.nonzero(as_tuple=True)
            values = values[numbers, columns]
            examples = positions[numbers.cpu()]
            places = first_place(derivatives.losses.shape[1], labels) + columns.cpu()
        n_steps = torch.full((len(values),), derivatives.n_steps)
        ids = tuple(token_ids(raw, len(positions)))
        return Answers(values, n_steps, examples, places, ids, has_tokens)

    @staticmethod
    def joined(batches: Sequence[Answers]) -> Answers:
        """Put batches one behind the other, shallower ones padded with zeros."""
        values = equally_deep([batch.values for batch in batches], joined_axis=0)
        ids: tuple[tuple[int, ...], ...] = ()
        for batch in batches:
            ids += batch.ids
        return Answers(
            torch.cat(values),
            torch.cat([batch.n_steps for batch in batches]),
            torch.cat([batch.examples for batch in batches]),
            torch.cat([batch.places for batch in batches]),
            ids,
            batches[0].has_tokens,
        )

    def plus(self, other: Answers) -> Answers:
        """Add the answers of the same rows at another checkpoint."""
        values, other_values = equally_deep([self.values, other.values])
        n_steps = torch.maximum(self.n_steps, other.n_steps)
        return replace(self, values=values + other_values, n_steps=n_steps)

    def step_influence(self) -> StepInfluence:
        """Return a result whose train examples are the groups; its errors are zero."""
        values = self.values
        columns = torch.cat([values.sum(-1, keepdim=True), values], dim=-1)
        scores = Scores(columns, torch.zeros_like(columns))
        steps = StepInfluence.from_sums(scores, self.n_steps)
        if self.has_tokens:
            token_of = torch.stack([self.examples, self.places], dim=1)
            steps = replace(steps, token_of=token_of.to(values.device))
        return steps

    def map(self, names: Sequence[str], words: Words | None) -> InfluenceMap:
        """Return the answers as a map of groups, target tokens and steps."""
        q = len(self.ids)
        _, n_groups, n_bins = self.values.shape
        n_places = 1 + int(self.places.max())
        values = self.values.new_zeros(q, 1, n_groups, n_places, n_bins)
        by_place = self.values.new_zeros(q, n_places, n_groups, n_bins)
        by_place[self.examples, self.places] = self.values
        order = torch.tensor([Bins.PRELUDE, *range(Bins.of_step(0), n_bins), Bins.CODA], device=values.device)
        values[:, 0] = by_place.transpose(1, 2).index_select(-1, order)
        return InfluenceMap(
            values,
            ("group", "token", "step"),
            {"group": tuple(names), "token": tuple(range(n_places)), "step": step_labels(n_bins)},
            indices=torch.zeros(q, 1, dtype=torch.long),
            test_tokens=None if words is None else tuple(tuple(words(ids)) for ids in self.ids),
        )
