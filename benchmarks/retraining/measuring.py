"""The truth: models trained again without some examples. Weights are kept in a cache, so that a run can go on.

A cache is a folder outside of the repository; a file holds the final weights of one kind of removal on one bed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_sdi.evaluate import block_swap, draw_subsets
from retraining.beds import Bed, as_batch
from retraining.training import load, model_with, train

LEFT_OUT = "leave one out"
REMOVED = {"5% removed": 0.05, "20% removed": 0.2, "50% removed": 0.5}


@dataclass(frozen=True)
class Counts:
    """How many models are trained for each kind of removal."""

    left_out: int = 24
    subsets: int = 64
    kinds: tuple[str, ...] = (LEFT_OUT, *REMOVED)

    def of(self, kind: str) -> int:
        return self.left_out if kind == LEFT_OUT else self.subsets


def subsets_of(bed: Bed, kind: str, count: int) -> Tensor:
    """Return which examples each model keeps `(m, n)`, the same for every seed; more begin with the same ones."""
    if kind == LEFT_OUT:
        order = torch.randperm(bed.n, generator=torch.Generator().manual_seed(11))[:count]
        return ~torch.nn.functional.one_hot(order, bed.n).bool()
    return draw_subsets(bed.n, count, 1 - REMOVED[kind], seed=20 + list(REMOVED).index(kind))


def retrained(bed: Bed, kept: Tensor, label: str, cache: Path) -> Tensor:
    """Train the models that the cache lacks, a stack at a time.

    Args:
        bed: What is trained.
        kept: `(m, n)` booleans.
        label: Names the subsets in the cache; a longer list of subsets begins with the shorter one.
        cache: The folder.

    Returns:
        Weights `(m, parameters)`.
    """
    path = cache / f"{fingerprint(bed)} {label}.pt"
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
        print(f"{bed.name}, seed {bed.seed}, {label}: {len(weights)} of {len(kept)}, {seconds:.1f} s", flush=True)
    return weights[: len(kept)]


@dataclass(frozen=True)
class Effects:
    """How much higher test losses are without the examples that each subset leaves out."""

    kept: Tensor
    """`(m, n)` booleans."""
    whole: Tensor
    """`(q, m)`: of the models trained again."""
    together: Tensor
    """`(q, m)`: of the first model with the retrained block in all steps."""
    steps: Tensor
    """`(q, m, t)`: of the first model with the retrained block in one step."""


def measured_effects(bed: Bed, kept: Tensor, label: str, cache: Path) -> Effects:
    """Train without some examples, and compare with the model trained with all of them."""
    base = model_at_the_end(bed, cache)
    with_all = test_losses(bed, base)
    model = bed.start()
    all_steps = range(bed.n_steps)
    whole, swapped = [], []
    for weights in retrained(bed, kept, label, cache):
        load(model, weights)
        whole.append(test_losses(bed, model))
        swapped.append(
            block_swap(
                base,
                model,
                as_batch(bed.test),
                loop=bed.loop,
                loss_fn=bed.loss,
                forward_kwargs=bed.test_forward_kwargs,
                steps=[*all_steps, all_steps],
            )
        )
    steps = torch.stack(swapped, dim=1) - with_all[:, None, None]
    return Effects(kept, torch.stack(whole, dim=1) - with_all[:, None], steps[..., -1], steps[..., :-1])


def model_at_the_end(bed: Bed, cache: Path) -> nn.Module:
    """Return the model trained with all examples: the first of a stack of its own, whose sums round as a stack's do."""
    everything = torch.ones(min(bed.stack, 2), bed.n, dtype=torch.bool)
    return model_with(bed, retrained(bed, everything, "all", cache)[0])


@torch.no_grad()
def test_losses(bed: Bed, model: nn.Module) -> Tensor:
    """Return the test losses `(q,)`."""
    output = model(input_ids=bed.test["input_ids"], **bed.test_forward_kwargs)
    return bed.loss(output, bed.test["labels"]).double()


def fingerprint(bed: Bed) -> str:
    """Name a bed by what decides its truth: data, model, order, rates."""
    told = sha256(repr((bed.rates, bed.adam, bed.forward_kwargs, bed.dtype, bed.stack, bed.start())).encode())
    for column in (*bed.train.values(), *bed.batches, *bed.start().parameters()):
        told.update(column.detach().numpy().tobytes())
    return f"{bed.name} {bed.seed} {told.hexdigest()[:10]}"
