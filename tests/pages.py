"""Results with texts of every kind, for the tests of the page that shows them."""

from __future__ import annotations

import dataclasses

import torch

from captum_sdi import StepInfluence

STEPS, TESTS, TRAINS = 4, 3, 30
HOSTILE = (
    "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">",
    "</script><script>document.title='hacked'</script>",
    "{{facts}} {{script}} ${document.title='hacked'} <!--<script>",
    "half \ud800 a pair",
    "مرحبا بالعالم",
    "two\nlines\tand a tab",
)
TEXTS = [*HOSTILE, *(f"training text number {number}" for number in range(len(HOSTILE), TRAINS))]
TEST_TEXTS = ["<b>which</b> answer is it", "the second question", "the third one"]


def random_result(tests: int = TESTS, trains: int = TRAINS, steps: int = STEPS, seed: int = 0) -> StepInfluence:
    """Scores of both signs, some of them within their error, with a prelude and a coda."""
    draw = torch.Generator().manual_seed(seed)
    trajectories = 1e-3 * torch.randn(tests, trains, steps, generator=draw)
    prelude, coda = 1e-3 * torch.randn(2, tests, trains, generator=draw)
    errors = 1e-3 * torch.rand(tests, trains, steps, generator=draw)
    return StepInfluence(
        indices=None,
        influence_scores=trajectories.sum(-1) + prelude + coda,
        trajectories=trajectories,
        prelude=prelude,
        coda=coda,
        n_steps=torch.full((tests,), steps),
        score_errors=errors.square().sum(-1).sqrt(),
        trajectory_errors=errors,
    )


def self_influence_of(result: StepInfluence) -> StepInfluence:
    """The first test example's scores, as if they were every training example's on itself."""
    fields = {name: value[0] for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    fields["n_steps"] = torch.full_like(result.influence_scores[0], STEPS).long()
    return dataclasses.replace(result, **fields)


@dataclasses.dataclass
class TokenMap:
    """What the page reads of a map: layers, loop steps and target tokens of the first test example."""

    values: torch.Tensor
    errors: torch.Tensor
    axes: tuple[str, ...] = ("layer", "step", "token")

    @property
    def labels(self) -> dict[str, tuple[str | int, ...]]:
        return {"layer": ("core.attn", "core.mlp"), "step": (*range(STEPS), "coda"), "token": (0, 1, 2, 3, 4)}

    @property
    def indices(self) -> torch.Tensor:
        return torch.tensor([[3, 7, 9]])

    def tokens_along(self, axis: str, test: int, place: int) -> tuple[str, ...]:
        assert axis == "token"
        assert (test, place) == (0, 0)
        return ("[BOS]", "<b>which</b>", " answer", " is", " it")


def random_map() -> TokenMap:
    draw = torch.Generator().manual_seed(1)
    shape = (1, 3, 2, STEPS + 1, 5)
    return TokenMap(1e-3 * torch.randn(shape, generator=draw), 1e-5 * torch.rand(shape, generator=draw))
