"""What happens to a test example's loss when the train examples that a method ranks highest for it are taken away.

Beside methods: sets drawn at random, and the train examples whose tokens are most like the test example's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_sdi.evaluate.intervals import LEVEL, mean_estimate
from retraining.beds import Bed
from retraining.measuring import model_at_the_end, retrained, test_losses
from retraining.methods import Scores
from retraining.training import load

SHARE = 0.1
N_RANDOM_SETS = 3
RANKED = ("unrolled", "Hessian, rank 80", "Fisher, TensorSketch(512)", "TracIn / SDI, 4 checkpoints")
LIKENESS = "tokens most alike"


def own_removals(beds: Sequence[Bed], scores: dict[str, list[Scores]], cache: Path) -> dict[str, Any]:
    """Take each test example's own top 10% away, and train again.

    Returns:
        For each ranking the mean rise of the test example's loss with its interval over tests, each test a mean over
        seeds, and the share of tests and seeds where it rose.
    """
    rises: dict[str, list[Tensor]] = {}
    for place, bed in enumerate(beds):
        for name, ranking in rankings(bed, scores, place).items():
            rises.setdefault(name, []).append(own_rises(bed, ranking, name, cache))
    random_sets = [rises.pop(f"random set {number}") for number in range(N_RANDOM_SETS)]
    rises["random sets"] = [torch.stack(of_seed).mean(0) for of_seed in zip(*random_sets, strict=True)]
    return {name: told(torch.stack(of_seeds)) for name, of_seeds in rises.items()}


def rankings(bed: Bed, scores: dict[str, list[Scores]], place: int) -> dict[str, Tensor]:
    """Return scores `(q, n)` of what goes first, for methods and what stands beside them."""
    found = {name: scores[name][place].totals for name in RANKED if name in scores}
    found[LIKENESS] = token_likeness(bed)
    generator = torch.Generator().manual_seed(53)
    for number in range(N_RANDOM_SETS):
        found[f"random set {number}"] = torch.rand(bed.q, bed.n, generator=generator)
    return found


def token_likeness(bed: Bed) -> Tensor:
    """Return the cosine `(q, n)` of counts of neighbouring pairs of tokens."""
    test, train = (pair_counts(rows["input_ids"]) for rows in (bed.test, bed.train))
    pairs = sorted({pair for counts in (*test, *train) for pair in counts})
    columns = {pair: column for column, pair in enumerate(pairs)}
    tables = []
    for side in (test, train):
        table = torch.zeros(len(side), len(pairs))
        for row, counts in enumerate(side):
            for pair, count in counts.items():
                table[row, columns[pair]] = count
        tables.append(torch.nn.functional.normalize(table))
    return tables[0] @ tables[1].T


def pair_counts(ids: Tensor) -> list[dict[tuple[int, int], int]]:
    """Count every row's pairs of neighbouring tokens."""
    found = []
    for row in ids.tolist():
        counts: dict[tuple[int, int], int] = {}
        for pair in pairwise(row):
            counts[pair] = counts.get(pair, 0) + 1
        found.append(counts)
    return found


def own_rises(bed: Bed, ranking: Tensor, name: str, cache: Path) -> Tensor:
    """Return by how much each test example's loss rises `(q,)` without the train examples ranked first for it."""
    removed = ranking.topk(math.ceil(SHARE * bed.n), dim=1).indices
    kept = torch.ones(bed.q, bed.n, dtype=torch.bool).scatter_(1, removed, False)
    model = model_at_the_end(bed, cache)
    with_all = test_losses(bed, model)
    without = []
    for test, weights in enumerate(retrained(bed, kept, f"own top 10%, {name.replace('/', 'or')}", cache)):
        load(model, weights)
        without.append(test_losses(bed, model)[test])
    return torch.stack(without) - with_all


def told(rises: Tensor) -> dict[str, Any]:
    """Return what is recorded of rises `(seeds, q)`."""
    mean = mean_estimate(rises.mean(0), LEVEL, seed=0)
    return {
        "value": float(mean),
        "interval": [float(mean.low), float(mean.high)],
        "share worse": float((rises > 0).double().mean()),
    }
