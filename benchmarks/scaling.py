"""Time against tokens, loop steps, sketch size and batch, on a narrower model with one looped block."""

from __future__ import annotations

from typing import Any

import numpy as np
from peers import ours, reference
from subjects import looped_gpt
from timing import interleaved, quartiles

BASE = {"seq": 128, "tau": 6, "batch": 4, "dim": 2048}
AXES = {"seq": (32, 64, 128, 256), "tau": (2, 4, 8, 16), "dim": (512, 1024, 2048, 4096, 8192), "batch": (1, 2, 4, 8)}


def scaling(small: bool = False) -> dict[str, Any]:
    """For each axis its values, the median seconds at them, and a straight line through these."""
    width = 64 if small else 256
    points = {(axis, value): BASE | {axis: value} for axis, values in AXES.items() for value in values}
    calls = {}
    for (axis, value), point in points.items():
        dim = point.pop("dim")
        work = looped_gpt(width=width, **point, n_prelude=1, n_core=1, n_coda=1)
        calls[f"ours {axis} {value}"], calls[f"reference {axis} {value}"] = ours(work, dim), reference(work, dim)
    seconds = interleaved(calls, rounds=1 if small else 4)

    def line(who: str, axis: str) -> dict[str, Any]:
        medians = [quartiles(seconds[f"{who} {axis} {value}"])[1] for value in AXES[axis]]
        slope, start = np.polyfit(AXES[axis], medians, 1)
        correlation = np.corrcoef(AXES[axis], medians)[0, 1]
        return {"seconds": medians, "slope": slope, "intercept": start, "r_squared": correlation**2}

    return {
        "width": width,
        "base": BASE,
        "axes": {
            axis: {"values": list(values)} | {who: line(who, axis) for who in ("ours", "reference")}
            for axis, values in AXES.items()
        },
    }
