"""truth.png: agreement against cost, and gauge.png: agreement against metasmoothness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from retraining.methods import METHODS
from retraining.peers import PEERS

STYLE = {
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "lines.linewidth": 1,
    "lines.markersize": 3,
}
PANELS = (("parity", "leave one out"), ("parity", "5% removed"), ("text", "5% removed"), ("text", "50% removed"))
COLORS = ("#999999", "#D55E00", "#E69F00", "#CC79A7", "#F0E442", "#56B4E9", "#009E73", "#009E73", "#009E73", "#0072B2")
MARKERS = "x osv^ <>D*".replace(" ", "")


def draw_costs(results: dict[str, Any], path: Path) -> None:
    """Draw a panel for each bed and share that is removed: truth against cost, all methods."""
    panels = [(bed, kind) for bed, kind in PANELS if bed in results and kind in results[bed]["agreement"]]
    if not panels:
        return
    with plt.rc_context(STYLE):
        rows = (len(panels) + 1) // 2
        figure, axes = plt.subplots(rows, 2, figsize=(5.2, 0.9 + 1.7 * rows), layout="constrained", squeeze=False)
        for ax, (bed, kind) in zip(axes.flat, panels, strict=False):
            draw_panel(ax, results[bed], kind)
            ax.set_title(f"{bed}: {kind}", loc="left")
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def draw_panel(ax: Axes, bed: dict[str, Any], kind: str) -> None:
    """Draw each method's total, filled, and its mean over loop steps, hollow."""
    names = [*METHODS, *PEERS]
    for name, agreements in bed["agreement"][kind]["methods"].items():
        seconds = bed["seconds"][name]
        if not seconds:
            low, high = agreements["total"]["interval"]
            ax.axhspan(low, high, color="#dddddd", linewidth=0, label=name)
            continue
        place = names.index(name)
        look = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
        draw_point(ax, seconds, agreements["total"], label=name, **look)
        if "mean over steps" in agreements:
            draw_point(ax, seconds * 1.12, agreements["mean over steps"], markerfacecolor="white", **look)
    ax.set(xscale="log", ylim=(-0.35, 1.02), xlabel="processor seconds for all tests", ylabel="rank correlation")


def draw_point(ax: Axes, seconds: float, agreement: dict[str, Any], **look: Any) -> None:
    value = agreement["value"]
    low, high = agreement["interval"]
    spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
    ax.errorbar(seconds, value, spread, linestyle="none", elinewidth=0.6, **look)


def draw_gauge(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the agreement of the unrolled derivative with leaving one out against metasmoothness."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(3.4, 3.0), layout="constrained")
        names, colors = (list(dict.fromkeys(entries)) for entries in ([run["run"] for run in runs], COLORS))
        for run in runs:
            place = names.index(run["run"])
            label = run["run"] if run["seed"] == 0 else None
            look = {"color": colors[place + 1], "marker": MARKERS[place]}
            draw_point(ax, 1 - run["metasmoothness"], run["agreement"], label=label, **look)
        ax.axvline(0.02, color="#999999", linewidth=0.6, linestyle=":")
        ax.set(xscale="log", xlabel="1 - metasmoothness", ylabel="unrolled, leave one out")
        ax.invert_xaxis()
        figure.legend(loc="outside lower center", fontsize=5, frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)
