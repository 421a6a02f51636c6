"""Facts a -> f(a) and a loop that answers one hop at each step: the bed whose answer is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HIDDEN = 32, 64


class Hop(nn.Module):
    """From a distribution over entities `(n, v)` to the next one."""

    def __init__(self, n_entities: int) -> None:
        super().__init__()
        self.embed = nn.Linear(n_entities, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, n_entities)

    def forward(self, distribution: Tensor) -> Tensor:
        hidden = self.embed(distribution)
        hidden = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return self.head(hidden).softmax(-1)


class Chain(nn.Module):
    """Applies one block `n_loops` times: trained on one hop, asked several."""

    def __init__(self, n_entities: int) -> None:
        super().__init__()
        self.n_entities = n_entities
        self.block = Hop(n_entities)

    def forward(self, input_ids: Tensor, n_loops: int = 1) -> Tensor:
        """Return log probabilities `(n, v)` of where the hops from `input_ids (n,)` end."""
        entities = torch.eye(self.n_entities, dtype=self.block.embed.weight.dtype)
        distribution = entities[input_ids]
        for _ in range(n_loops):
            distribution = self.block(distribution)
        return distribution.clamp_min(1e-12).log()


def random_cycle(n_entities: int, seed: int) -> Tensor:
    """Draw the facts `(v,)`: one cycle through all entities."""
    order = torch.randperm(n_entities, generator=torch.Generator().manual_seed(seed))
    facts = torch.empty(n_entities, dtype=torch.long)
    facts[order] = order.roll(-1)
    return facts


def follow(facts: Tensor, start: Tensor, hops: int) -> Tensor:
    """Return the entities that many hops from the start."""
    for _ in range(hops):
        start = facts[start]
    return start
