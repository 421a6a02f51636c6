"""When first-order influence can be believed: how smoothly a run's end depends on its examples' weights.

With θ_j the end of the run whose examples weigh ``1 + j h v``, v standard normal, h = 0.05:

    metasmoothness = Σ_p |θ_2 - θ_0|_p / ‖θ_2 - θ_0‖₁ · sign(θ_1 - θ_0)_p · sign(θ_2 - θ_1)_p

It is 1 where the end moves along straight lines, and 0 where it jumps about (Engstrom et al., arXiv 2503.13751). Growth
is the largest ‖θ̄‖ on the way back through training in units of the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_sdi.unrolled.backward import visits
from captum_sdi.unrolled.optimizers import AdamW, State
from captum_sdi.unrolled.replay import Replay
from captum_sdi.unrolled.run import TrainingRun
from captum_sdi.words import warn_user

TRUSTED = 0.98
"""From this metasmoothness on, the derivative agreed with retraining on every run measured, at .86 to .95; below it on
some alone (``benchmarks/truth.md``)."""
_STEP = 0.05
_NOISE_UNITS = 10
"""Below so many units of rounding of the mean √v̂, a second moment is as good as zero."""


@dataclass(frozen=True)
class Gauge:
    """What is known of a run before its scores; prints as a short table with a verdict.

    Example:
        >>> print(Gauge(replay_error=0.0, metasmoothness=0.995, growth=1.8, noise_share=0.0))
        replay error    0         of the way from the start to the final weights
        metasmoothness  0.995     1: straight lines, 0: jumps
        growth          1.8       of a change on its way through training
        noise share     0         of parameters, where Adam divides noise by noise
        The end of this run depends smoothly on its examples' weights: its influence can be believed.
    """

    replay_error: float
    """By how much the replay misses the model's weights, in units of the way from the start to them."""
    metasmoothness: float
    """Up to 1: how straight the end moves when examples' weights do."""
    growth: float
    """The largest norm of the derivative on its way back, in units of where it began."""
    noise_share: float
    """The share of parameters with a second moment near zero but not zero; 0 for an optimizer without."""

    @property
    def is_trusted(self) -> bool:
        """Whether first-order influence is to be believed for this run."""
        return self.metasmoothness >= TRUSTED

    @property
    def verdict(self) -> str:
        """Whether influence can be believed, and else what makes runs smoother, in words."""
        if self.is_trusted:
            verdict = "The end of this run depends smoothly on its examples' weights: its influence can be believed."
        else:
            verdict = (
                f"A metasmoothness below {TRUSTED} is a warning: this run's end jumps when examples' weights move a "
                "little, and of such runs first-order influence agreed with retraining on some, on others not at all. "
                "Train again without a few examples to know. Smoother runs have a lower peak learning rate, warm-up, a "
                "cosine schedule, larger batches, or end before all is memorised."
            )
        if self.noise_share > 0.01:
            verdict += (
                f" {self.noise_share:.0%} of the parameters have a second moment near zero, where Adam divides noise "
                "by noise: compare with float64."
            )
        return verdict

    def __str__(self) -> str:
        rows = (
            ("replay error", f"{self.replay_error:.2g}", "of the way from the start to the final weights"),
            ("metasmoothness", f"{self.metasmoothness:.3g}", "1: straight lines, 0: jumps"),
            ("growth", f"{self.growth:.2g}", "of a change on its way through training"),
            ("noise share", f"{self.noise_share:.2g}", "of parameters, where Adam divides noise by noise"),
        )
        lines = [f"{name:<15} {number:<9} {meaning}" for name, number, meaning in rows]
        return "\n".join([*lines, self.verdict])


def warn_unless_trusted(gauge: Gauge) -> None:
    """Warn of a run whose influence is not to be believed."""
    if not gauge.is_trusted:
        warn_user(f"metasmoothness is {gauge.metasmoothness:.2f}. {gauge.verdict}")


def measured_gauge(
    replay: Replay,
    replay_error: float,
    seed: Tensor,
    bar: Any,
) -> Gauge:
    """Train twice with other weights, and go back once.

    Args:
        replay: The run, replayed forwards.
        replay_error: See `Gauge`.
        seed: ``(size,)`` what the growth is measured of.
        bar: Moved on behind every update.

    Returns:
        The gauge.
    """
    final = replay.final(bar)
    growth = 1.0
    for visit in visits(replay, seed.unsqueeze(0)):
        growth = max(growth, visit.growth)
        bar.update()
    return Gauge(
        replay_error=replay_error,
        metasmoothness=metasmoothness(replay, final[0], bar),
        growth=growth,
        noise_share=noise_share(final, replay.updates.run),
    )


def metasmoothness(
    replay: Replay,
    final: Tensor,
    bar: Any,
) -> float:
    """Measure by two further trainings how straight the end moves; see the module's formula."""
    n = len(replay.updates.rows)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(n, generator=generator, dtype=torch.float64)
    ends = [final]
    for multiple in (1, 2):
        weights = (1 + multiple * _STEP * change).to(final)
        ends.append(replay.weighted(weights, bar))
    first = ends[1] - ends[0]
    second = ends[2] - ends[1]
    end_change = ends[2] - ends[0]
    agreement = end_change.abs() * first.sign() * second.sign()
    distance = end_change.abs().sum()
    return float(agreement.sum() / distance) if distance > 0 else 1.0


def noise_share(final: State, run: TrainingRun) -> float:
    """Return the share of parameters whose second moment is near zero but not zero, where rounding is all there is."""
    if not isinstance(run.optimizer, AdamW):
        return 0.0
    second_moment = final[2]
    correction = 1 - run.optimizer.betas[1] ** run.n_updates
    root = (second_moment / correction).sqrt()
    units = _NOISE_UNITS * torch.finfo(root.dtype).eps
    smallest = max(units * float(root.mean()), run.optimizer.eps)
    is_noise = (root > 0) & (root < smallest)
    return float(is_noise.double().mean())
