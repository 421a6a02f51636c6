"""The truth: models trained again without some examples. Weights are kept in a cache, so that a run can go on.

A cache is a folder outside of the repository; a file holds the final weights of one kind of removal on one bed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from retraining.beds import Bed
from retraining.training import train
from torch import Tensor

from captum_sdi.evaluate import draw_subsets

LEFT_OUT = "leave one out"
REMOVED = {"5% removed": 0.05, "20% removed": 0.2, "50% removed": 0.5}


@dataclass(frozen=True)
class Retrained:
    """Models trained on subsets."""

    kept: Tensor
    """`(m, n)` booleans."""
    weights: Tensor
    """`(m, parameters)`, at the end."""


@dataclass(frozen=True)
class Counts:
    """How many models are trained for each kind of removal."""

    left_out: int = 24
    subsets: int = 64

    def of(self, kind: str) -> int:
        return self.left_out if kind == LEFT_OUT else self.subsets


def subsets_of(bed: Bed, kind: str, count: int) -> Tensor:
    """Return which examples each model keeps `(m, n)`, the same for every seed; more begin with the same ones."""
    if kind == LEFT_OUT:
        order = torch.randperm(bed.n, generator=torch.Generator().manual_seed(11))[:count]
        return ~torch.nn.functional.one_hot(order, bed.n).bool()
    return draw_subsets(bed.n, count, 1 - REMOVED[kind], seed=20 + list(REMOVED).index(kind))


def retrained(bed: Bed, kind: str, count: int, cache: Path) -> Retrained:
    """Train the models that the cache lacks, a stack at a time."""
    kept = subsets_of(bed, kind, count)
    path = cache / f"{fingerprint(bed)} {kind}.pt"
    weights = torch.load(path) if path.exists() else torch.empty(0)
    while len(weights) < len(kept):
        more = kept[len(weights) :][: bed.stack]
        start = time.process_time()
        weights = torch.cat([weights.to(bed.dtype), train(bed, more).weights])
        seconds = time.process_time() - start
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(weights, unfinished)
        unfinished.replace(path)
        print(f"{bed.name}, seed {bed.seed}, {kind}: {len(weights)} of {len(kept)}, {seconds:.1f} s", flush=True)
    return Retrained(kept, weights[:count])


def fingerprint(bed: Bed) -> str:
    """Name a bed by what decides its truth: data, model, order, rates."""
    told = sha256(repr((bed.rates, bed.adam, bed.forward_kwargs, bed.dtype, bed.stack, bed.start())).encode())
    for column in (*bed.train.values(), *bed.batches, *bed.start().parameters()):
        told.update(column.detach().numpy().tobytes())
    return f"{bed.name} {bed.seed} {told.hexdigest()[:10]}"
