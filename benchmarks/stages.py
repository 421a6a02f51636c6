"""Where the sketch's time goes, by `torch.profiler`: the widest layer of the paper's model, four examples."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from captum_sdi import TensorSketch
from captum_sdi.features import Outer

# Parts of the names of operations, by the stage they serve.
STAGES = {
    "gather": ("index_select", "gather", "index_copy", "scatter"),
    "FFT": ("fft",),
    "signs and product": ("mul", "bmm", "mm", "complex"),
    "sum": ("sum", "add"),
    "copies and allocation": ("empty", "zero", "fill", "copy", "clone", "cat", "resize", "contiguous"),
}


def stages(small: bool = False) -> dict[str, Any]:
    """Milliseconds of a sketch of one layer, and the share of each stage, for several sketch sizes."""
    n, p, r, c = (2, 16, 96, 32) if small else (4, 128, 3072, 768)
    torch.manual_seed(0)
    gradient = Outer(torch.randn(n, p, r), torch.randn(n, p, c))
    found = {}
    for dim in (512, 2048, 8192):
        sketch = TensorSketch(dim).projection("core.weight", torch.empty(r, c))
        sketch(gradient)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            for _ in range(5):
                sketch(gradient)
        shares: dict[str, float] = {}
        for event in record.key_averages():
            stage = _stage(event.key.removeprefix("aten::"))
            shares[stage] = shares.get(stage, 0.0) + event.self_cpu_time_total / 5000
        total = sum(shares.values())
        found[str(dim)] = {"ms": total, "shares": {stage: ms / total for stage, ms in shares.items()}}
    return {"shape": {"n": n, "p": p, "rows": r, "columns": c}, "dims": found}


def _stage(operation: str) -> str:
    return next((stage for stage, names in STAGES.items() if any(name in operation for name in names)), "views")
