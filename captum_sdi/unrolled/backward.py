"""The derivative through training: every update backwards, all seeds at once.

From θ̄ = φ at the last parameters and moments' adjoints of zero, for k = T..1: the optimizer's pullback turns the
adjoint of the state after update k into the direction c in which its gradient matters; then

    score_i += a_i ⟨∇l_i(θ_{k-1}), c⟩ for i in batch k,        θ̄ += H_k c

in one double backward pass of the update's loss. A score is dL/dw_i, L the seed's loss and w_i the weight of example i
wherever it was trained on; influence is its negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_sdi.unrolled.clipping import clip_pullback, clipped
from captum_sdi.unrolled.optimizers import State
from captum_sdi.unrolled.replay import Replay
from captum_sdi.unrolled.updates import GradientGraph, MicroBatch, Updates

SEEDS_AT_ONCE = 4
"""More do not fit into a processor's cache and take longer each: 8 a tenth longer than 4, at width 48."""


@dataclass(frozen=True)
class Visit:
    """One update, on the way back."""

    update: int
    """0 for the first."""
    batches: list[MicroBatch]
    vector: Tensor
    """``(size,)`` the parameters before it."""
    directions: Tensor
    """``(seeds, size)`` how much the seeds change with its gradient."""
    positions: Tensor
    """``(n,)`` of its examples in the train set."""
    scores: Tensor
    """``(seeds, n)`` how much the seeds change with its examples' weights."""
    growth: float
    """``‖θ̄‖`` before the update, of the seed where it is the largest in units of the seed's own."""
    adjoint: State
    """``(seeds, size)`` each: how much the seeds change with the state before the update."""


def visits(
    replay: Replay,
    seeds: Tensor,
    resumed: tuple[int, State] | None = None,
) -> Iterator[Visit]:
    """Go backwards through a run.

    Args:
        replay: The run, which has been replayed forwards.
        seeds: ``(seeds, size)`` the gradients φ of what is asked about, at the last parameters.
        resumed: How many updates are left, and the adjoint behind them; None: all, from the seeds.

    Yields:
        Every update that is left, the last one first.
    """
    norms = seeds.norm(dim=1).clamp(min=torch.finfo(seeds.dtype).tiny)
    n_moments = len(replay.updates.run.optimizer.initial(replay.start)) - 1
    n_left = replay.updates.run.n_updates
    moments = [torch.zeros_like(seeds) for _ in range(n_moments)]
    adjoint: State = (seeds, *moments)
    if resumed is not None:
        n_left, adjoint = resumed
    for update, state in replay.backwards(n_left):
        visit = visited(replay.updates, update, state, adjoint, norms)
        adjoint = visit.adjoint
        yield visit


def visited(
    updates: Updates,
    update: int,
    state: State,
    later: State,
    norms: Tensor,
) -> Visit:
    """Go backwards through one update.

    Args:
        updates: The run's.
        update: Its number, 0 for the first.
        state: Before it.
        later: The adjoint of the state after it, ``(seeds, size)`` each.
        norms: ``(seeds,)`` of the seeds at the end of training.

    Returns:
        What was seen.
    """
    vector, run = state[0], updates.run
    batches = updates.micro_batches(update)
    only_graph = updates.graph(vector, batches[0], differentiable=True) if len(batches) == 1 else None
    gradient = updates.gradient(vector, update) if only_graph is None else only_graph.gradient.detach()

    gradient_taken = clipped(gradient, run.max_grad_norm)
    pulled = run.optimizer.pullback(state, gradient_taken, updates.settings(update), later)
    directions = clip_pullback(gradient, pulled.direction, run.max_grad_norm)

    vector_bar, scores = pulled.earlier[0], []
    for batch in batches:
        # Those of several micro-batches are not held together: they are why gradients accumulate.
        graph = only_graph or updates.graph(vector, batch, differentiable=True)
        curved, by_example = products(graph, directions)
        vector_bar = vector_bar + curved
        scores.append(by_example)
    growth = float((vector_bar.norm(dim=1) / norms).max())
    positions = torch.cat([batch.positions for batch in batches])
    return Visit(
        update=update,
        batches=batches,
        vector=vector,
        directions=directions,
        positions=positions,
        scores=torch.cat(scores, dim=1),
        growth=growth,
        adjoint=(vector_bar, *pulled.earlier[1:]),
    )


def products(graph: GradientGraph, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute H c and the examples' scores for all directions, some at a time."""
    pairs = [graph.products(chunk) for chunk in directions.split(SEEDS_AT_ONCE)]
    curved, by_example = zip(*pairs, strict=True)
    return torch.cat(curved), torch.cat(by_example)


def add_scores(scores: Tensor, visit: Visit) -> Tensor:
    """Add an update's scores to those of the train set ``(seeds, n)``, in place; positions may repeat."""
    return scores.index_add_(1, visit.positions.to(scores.device), visit.scores)
