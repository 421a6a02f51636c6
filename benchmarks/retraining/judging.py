"""Scores against retrained models: rank correlations, slopes and intervals over tests and left-out examples at once.

An interval is that of the mean over seeds: tests and subsets are the same for every seed and are drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.evaluate import deviation_from_step_mean, predicted_outputs
from captum_sdi.evaluate.two_way import Resamples, draw_resamples, mean_correlations, pooled, resampled_correlations
from retraining.measuring import Effects
from retraining.methods import Scores

RESAMPLES = 300
LEVEL = 0.95


@dataclass(frozen=True)
class Judged:
    """An agreement, averaged over seeds."""

    seeds: tuple[float, ...]
    """One agreement for each seed."""
    resampled: Tensor
    """`(resamples,)`, of the mean over seeds."""

    @property
    def value(self) -> float:
        return sum(self.seeds) / len(self.seeds)

    def interval(self) -> list[float]:
        tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=self.resampled.dtype)
        return self.resampled.nanquantile(tails).tolist()

    def as_json(self) -> dict[str, object]:
        return {"value": self.value, "interval": self.interval(), "seeds": list(self.seeds)}


Pair = tuple[Tensor, Tensor]
"""Predicted and measured effects of one seed, `(q, m)` or `(q, m, t)`."""


def pairs(scores: Scores, effects: Effects) -> dict[str, Pair]:
    """Return what is compared: totals, the loop at once, every step, and what is left without the step mean."""
    removed = ~effects.kept
    compared = {"total": (predicted_outputs(scores.totals, removed), effects.whole)}
    if scores.steps is None:
        return compared
    by_step = predicted_outputs(scores.steps, removed)
    compared["all steps at once"] = (by_step.sum(-1), effects.together)
    for step in range(by_step.shape[-1]):
        compared[f"step {step + 1}"] = (by_step[..., step], effects.steps[..., step])
    compared["deviation from the step mean"] = (
        deviation_from_step_mean(by_step),
        deviation_from_step_mean(effects.steps),
    )
    return compared


def judged(of_seeds: Sequence[Pair]) -> Judged:
    """Correlate the ranks of predicted and measured effects."""
    values, resampled = [], []
    for predicted, measured in of_seeds:
        drawn = draw_resamples(predicted, RESAMPLES, seed=0)
        tables = pooled(predicted, measured, drawn)
        values.append(float(mean_correlations("predicted effects", tables[0], tables[1], ranks=True)))
        resampled.append(resampled_correlations(*tables, ranks=True))
    return Judged(tuple(values), torch.stack(resampled).mean(0))


def slopes(of_seeds: Sequence[Pair]) -> Judged:
    """Regress measured on predicted effects, both less their mean over effects: 1 where sizes are right, too."""
    values, resampled = [], []
    for predicted, measured in of_seeds:
        once = Resamples(torch.ones(1, len(predicted)).double(), torch.ones(1, predicted.shape[1]).double())
        values.append(float(_slopes(predicted, measured, once)))
        resampled.append(_slopes(predicted, measured, draw_resamples(predicted, RESAMPLES, seed=0)))
    return Judged(tuple(values), torch.stack(resampled).mean(0))


def _slopes(predicted: Tensor, measured: Tensor, drawn: Resamples) -> Tensor:
    """Return the slope `(resamples,)` over all tests and effects that are drawn."""
    share = drawn.effects / drawn.effects.sum(1, keepdim=True)

    def covariance(first: Tensor, second: Tensor) -> Tensor:
        together = torch.einsum("rm,qm->rq", share, first * second)
        return together - (share @ first.T) * (share @ second.T)

    shared = (drawn.tests * covariance(predicted, measured)).sum(1)
    return shared / (drawn.tests * covariance(predicted, predicted)).sum(1)


def mean_of(parts: Sequence[Judged]) -> Judged:
    """Average agreements, such as those of every step, on the same draws."""
    seeds = [sum(values) / len(parts) for values in zip(*(part.seeds for part in parts), strict=True)]
    return Judged(tuple(seeds), torch.stack([part.resampled for part in parts]).mean(0))


def difference(first: Judged, second: Judged) -> Judged:
    """Return by how much the first agrees better, on the same draws."""
    seeds = [a - b for a, b in zip(first.seeds, second.seeds, strict=True)]
    return Judged(tuple(seeds), first.resampled - second.resampled)


def ceiling(effects: Sequence[Effects]) -> float | None:
    """Return how well the truth of one seed ranks that of another; None for one seed."""
    if len(effects) < 2:
        return None
    following = [*effects[1:], effects[0]]
    return judged([(first.whole, second.whole) for first, second in zip(effects, following, strict=True)]).value
