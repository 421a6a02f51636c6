"""What Simfluence learns from many runs, from one: `python benchmarks/simulated_runs.py [--small]`.

The test losses of runs on other subsets (20% left out), as `UnrolledInfluence.predicted_losses` predicts them from the
one run on everything, against those of models trained on these subsets; at four points of training, for a run that the
gauge believes and one that it does not. Numbers go to simulated_runs.json beside this file, the picture to
simulated_runs.png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from matplotlib.figure import Figure
from retraining.beds import Bed, as_batch, as_dataset, rough_parity, smooth_parity
from retraining.measuring import subsets_of, test_losses
from retraining.training import model_with, train
from torch import Tensor

from captum_sdi.plotting import plot_predicted_losses
from captum_sdi.unrolled import AdamW, Gauge, TrainingRun, UnrolledInfluence

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of training, at whose ends losses are compared."""
RESULTS = Path(__file__).with_suffix(".json")


def shortened_to(bed: Bed, n_updates: int) -> Bed:
    """The first updates of a run."""
    return replace(bed, rates=bed.rates[:n_updates], batches=bed.batches[:n_updates])


def simulated(bed: Bed, kept: Tensor) -> tuple[Tensor, Tensor, Gauge]:
    """Predicted and measured losses ``(m, q)`` at the end of a bed's run, and its gauge."""
    everything = torch.ones(1, bed.n, dtype=torch.bool)
    end = train(bed, torch.cat([everything, kept])).weights
    optimizer = AdamW(bed.adam.betas, bed.adam.eps, bed.adam.weight_decay, no_decay=())
    influence = UnrolledInfluence(
        model_with(bed, end[0]),
        as_dataset(bed.train),
        TrainingRun(optimizer=optimizer, rates=bed.rates, batches=bed.batches),
        start=bed.start().state_dict(),
        layers=None,
        loss_fn=bed.loss,
        loop=bed.loop,
        keep="all",
        check=False,
    )
    predicted = influence.predicted_losses(as_batch(bed.test), kept).detach()
    measured = torch.stack([test_losses(bed, model_with(bed, weights)) for weights in end[1:]])
    return predicted.double(), measured, influence.check()


def measure(bed: Bed, n_subsets: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor, Gauge]]:
    """Compare at all points of training."""
    kept = subsets_of(bed, "20% removed", n_subsets)
    comparisons = [simulated(shortened_to(bed, int(share * len(bed.rates))), kept) for share in SHARES]
    predicted = torch.stack([predictions for predictions, _, _ in comparisons])
    measured = torch.stack([losses for _, losses, _ in comparisons])
    gauges = [gauge for _, _, gauge in comparisons]
    rows = []
    for share, predictions, losses, gauge in zip(SHARES, predicted, measured, gauges, strict=True):
        rows.append(
            {
                "share of training": share,
                "metasmoothness": gauge.metasmoothness,
                "believed": gauge.is_trusted,
                "correlation": correlation(predictions, losses),
                "mean absolute error": float((predictions - losses).abs().mean()),
                "mean absolute deviation of runs": float((losses - losses.mean(0)).abs().mean()),
            }
        )
    return {"updates": len(bed.rates), "runs": n_subsets, "rows": rows}, (predicted, measured, gauges[-1])


def correlation(predicted: Tensor, measured: Tensor) -> float:
    """Of the runs' losses, each test about its own mean."""
    deviations = torch.stack([(predicted - predicted.mean(0)).flatten(), (measured - measured.mean(0)).flatten()])
    return float(torch.corrcoef(deviations)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    figure = Figure(figsize=(6.8, 2.9), layout="constrained")
    measured: dict[str, Any] = {}
    for bed, ax in zip((smooth_parity(0), rough_parity(0)), figure.subplots(1, 2), strict=True):
        bed = shortened_to(bed, 4) if small else bed
        name = bed.name
        measured[name], (predictions, losses, gauge) = measure(bed, 3 if small else 16)
        plot_predicted_losses(predictions, losses, times=[f"{share:.0%}" for share in SHARES], gauge=gauge, ax=ax)
    text = json.dumps({"environment": environment(), "simulated_runs": measured}, indent=1)
    print(text)
    if not small:
        RESULTS.write_text(text + "\n")
        figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
