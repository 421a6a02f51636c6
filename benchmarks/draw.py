"""results.png: time, memory and error, at the width of a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Colours of Okabe and Ito, told apart by every kind of colour vision, and a marker each.
LOOKS = {
    "ours": {"color": "#0072B2", "marker": "o", "label": "captum_sdi"},
    "ours, checkpointed": {"color": "#009E73", "marker": "D", "label": "captum_sdi, checkpointed"},
    "reference": {"color": "#D55E00", "marker": "s", "label": "reference package"},
    "two-sided": {"color": "#999999", "marker": "^", "label": "two-sided projection"},
}
STYLE = {
    "font.size": 6.5,
    "axes.titlesize": 6.5,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "lines.linewidth": 1,
    "lines.markersize": 2.5,
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Two panels in each of four rows."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(4, 2, figsize=(3.4, 6.0), layout="constrained")
        titles = {"seq": "tokens per example", "tau": "loop steps τ", "dim": "sketch size", "batch": "examples a side"}
        for ax, (axis, title) in zip(panels[:2].flat, titles.items(), strict=True):
            _time(ax, results["scaling"]["axes"][axis], title)
        for ax, axis, title in zip(panels[2], ("tau", "batch"), ("loop steps τ", "examples a side"), strict=True):
            _memory(ax, results["memory"][axis], title)
        for ax, side in zip(panels[3], ("self", "different"), strict=True):
            _error(ax, results["accuracy"], side)
        figure.align_ylabels()
        handles = {h.get_label(): h for ax in panels.flat for h in ax.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=300)
        plt.close(figure)


def _time(ax: Axes, axis: dict[str, Any], title: str) -> None:
    """Measured points and the straight line through them."""
    for who in ("reference", "ours"):
        look, line, x = LOOKS[who], axis[who], axis["values"]
        ax.plot(x, line["seconds"], linestyle="none", **look)
        ax.plot((0, x[-1]), [line["intercept"] + line["slope"] * at for at in (0, x[-1])], color=look["color"])
    _label(ax, title, "seconds")


def _memory(ax: Axes, found: dict[str, Any], title: str) -> None:
    for who in ("reference", "ours", "ours, checkpointed"):
        ax.plot(found["values"], [mb / 1000 for mb in found[who]], **LOOKS[who])
    _label(ax, title, "peak memory, GB")


def _error(ax: Axes, found: dict[str, Any], side: str) -> None:
    for who in ("two-sided", "reference", "ours"):
        mean, deviation = zip(*(each[f"{side} SDI"] for each in found[who]), strict=True)
        ax.errorbar(found["dims"], mean, deviation, elinewidth=0.6, **LOOKS[who])
    ax.set(xscale="log", yscale="log", xticks=found["dims"], xticklabels=found["dims"], ylim=(0.01, 1))
    ax.set(yticks=(0.01, 0.03, 0.1, 0.3, 1), yticklabels=("0.01", "0.03", "0.1", "0.3", "1"))
    ax.minorticks_off()
    ax.set_xlabel("sketch size")
    ax.set_ylabel("error of SDI")
    ax.set_title({"self": "examples against themselves", "different": "different examples"}[side])


def _label(ax: Axes, xlabel: str, ylabel: str) -> None:
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0, 1.05 * ax.dataLim.x1), ylim=(0, 1.1 * ax.dataLim.y1))
