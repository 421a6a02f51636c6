"""Is an influence score right? Retraining, planted labels and exact scores as judges, with confidence intervals.

Scores are plain tensors or arrays: totals ``(q, n)``, or trajectories ``(q, n, t)``, of which every loop step is then
judged by itself. The judges are an `Estimate`: a value with its interval, one for a total and ``(t,)`` for steps.

| question | judge |
|---|---|
| does the loss move as predicted when an example is left out? | `leave_one_out`, then `correlation` |
| ... when the top proponents are, or random examples? | `removal_effects` |
| ... when half of the training set is? | `draw_subsets`, `retrained_losses`, `linear_datamodeling_score` |
| does self-influence find mislabelled examples? | `mislabel_auc` |
| are the examples that must matter at the top? | `recall_at_k` |
| does a cheaper score agree with an exact one? | `correlation`, `top_k_overlap` |
| does an example act in the loop step that a trajectory names? | `block_swap`, then `deviation_from_step_mean` |
| how sure is an agreement, tests and left-out examples being samples both? | `two_way_correlation` |
| is one method better than another? | `paired_difference` |

Signs are those of the package: a positive influence is a proponent's. Without it the test loss is *higher*, so effects
of removal are the loss without minus the loss with the example, and agree with influence in sign.

You supply the training: ``retrain(kept, seed)`` trains a model on the training examples at the positions ``kept``, a
long tensor, from the random numbers of ``seed``, and returns the losses of the test examples ``(q,)``. It may return
``(q, ...)``, for instance the losses after every loop step ``(q, t)``: all effects then have these further axes at the
end. Results are not cached; caching them, and spreading runs over machines, is up to ``retrain``.

Intervals cover ``level`` of the cases: percentile bootstrap over test examples (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13), seeded; for the AUC, which has one data set and no test examples, see `mislabel_auc`.
They say how far the value would move with other *test examples*, not with other training runs: use several seeds.
Those of `two_way_correlation` and `paired_difference` hold for other left-out examples, or subsets, as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captum_sdi.evaluate.agreement import correlation, recall_at_k, top_k_overlap
from captum_sdi.evaluate.datamodels import draw_subsets, linear_datamodeling_score, predicted_outputs
from captum_sdi.evaluate.intervals import Estimate
from captum_sdi.evaluate.mislabels import mislabel_auc
from captum_sdi.evaluate.retraining import Retrain, leave_one_out, removal_effects, retrained_losses
from captum_sdi.evaluate.steps import deviation_from_step_mean
from captum_sdi.evaluate.two_way import paired_difference, two_way_correlation

if TYPE_CHECKING:
    from captum_sdi.evaluate.swapping import block_swap

__all__ = [
    "Estimate",
    "Retrain",
    "block_swap",
    "correlation",
    "deviation_from_step_mean",
    "draw_subsets",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_auc",
    "paired_difference",
    "predicted_outputs",
    "recall_at_k",
    "removal_effects",
    "retrained_losses",
    "top_k_overlap",
    "two_way_correlation",
]


def __getattr__(name: str) -> Any:
    # It alone hooks a model: pictures and saved results, which import the judges, do without.
    if name == "block_swap":
        return import_module("captum_sdi.evaluate.swapping").block_swap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
