"""Error of sketched scores on a trained looped GPT, against exact ones from ordinary autograd.

"Self" is the paper's measure: 12 examples against themselves, `‖estimate - exact‖ / ‖exact‖` over all entries. Their
squared norms dominate it. What a user ranks are pairs of *different* examples, which are harder: the same 12 against 64
others. Mean and standard deviation over draws of the hashes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peers
import torch
from subjects import Workload, losses
from torch import Tensor, nn

from captum_sdi.evaluate import correlation, top_k_overlap
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.tasks import p_hop

DRAWS = {256: 10, 512: 10, 2048: 10, 8192: 3}  # of each sketch size; the largest takes longest
Gradients = dict[str, Tensor]


def accuracy(small: bool = False) -> dict[str, Any]:
    """Errors by library and sketch size."""
    n_tests, n_trains = (4, 12) if small else (12, 64)
    work = trained_workload(n_tests, n_trains, width=64 if small else 192, training_steps=20 if small else 300)
    exact = ExactScores(work)
    estimators: dict[str, Callable[[int, int], Tensor]] = {
        "ours": lambda dim, seed: peers.ours(work, dim, seed, batch_size=12)().trajectories,
        "reference": lambda dim, seed: peers.reference(work, dim, seed, batch_size=12)(),
        "two-sided": exact.projected,
    }
    draws = {256: 2, 512: 2} if small else DRAWS
    found = {
        who: [_judge([estimate(dim, seed) for seed in range(n)], exact.scores, n_tests) for dim, n in draws.items()]
        for who, estimate in estimators.items()
    }
    return {"dims": list(draws), "draws": list(draws.values()), "width": work.model.config.n_embd, **found}


def trained_workload(n_tests: int, n_trains: int, width: int, training_steps: int) -> Workload:
    """A looped GPT after a minute of p-hop induction; its test examples are the last of its train examples, too."""
    data = p_hop(512, length=16, running=True)
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=data.vocab_size,
        n_positions=data.length,
        n_embd=width,
        n_head=max(1, width // 64),
        n_prelude=1,
        n_core=1,
        n_coda=1,
        n_loops=6,
        initializer_range=0.06,
    )
    model = LoopedGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(training_steps):
        ids = data.input_ids[torch.randperm(len(data))[:32]]
        losses(model(ids), ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tests = data.input_ids[:n_tests]
    trains = data.input_ids[n_tests : n_tests + n_trains]
    return Workload(model.eval(), ("core",), "prelude.0", torch.cat([trains, tests]), tests)


def _judge(draws: list[Tensor], exact: Tensor, n_tests: int) -> dict[str, Any]:
    """Mean and standard deviation over draws `(q, n, t)`; the last `n_tests` train examples are the tests."""
    sides = {"different": slice(0, -n_tests), "self": slice(-n_tests, None)}
    found: dict[str, list[float]] = {}
    for draw in draws:
        for side, part in sides.items():
            guess, truth = draw[:, part], exact[:, part]
            found.setdefault(f"{side} SDI", []).append(_error(guess, truth))
            found.setdefault(f"{side} TracIn", []).append(_error(guess.sum(-1), truth.sum(-1)))
        totals = draw[:, sides["different"]].sum(-1), exact[:, sides["different"]].sum(-1)
        found.setdefault("spearman", []).append(float(correlation(*totals)))
        found.setdefault("top-10", []).append(float(top_k_overlap(*totals, k=10)))
    return {name: [float(torch.tensor(v).mean()), float(torch.tensor(v).std())] for name, v in found.items()}


def _error(guess: Tensor, truth: Tensor) -> float:
    return float((guess - truth).norm() / truth.norm())


class ExactScores:
    """Scores from whole gradients, which autograd tells apart by step because each step has a copy of the loop."""

    def __init__(self, work: Workload) -> None:
        unrolled = _Unrolled(work.model.core, work.model.config.n_loops)
        model = copy.deepcopy(work.model)
        model.core = unrolled
        self._tests = [_step_gradients(model, unrolled, ids) for ids in work.test]
        self._trains = [_summed(_step_gradients(model, unrolled, ids)) for ids in work.train]
        self.scores = _score(self._tests, self._trains)

    def projected(self, dim: int, seed: int) -> Tensor:
        """Scores of a two-sided dense projection of equal size (as in LoGra): P G Qᵀ, √dim × √dim numbers a matrix."""
        generator, size = torch.Generator().manual_seed(seed), round(dim**0.5)
        sides = {
            name: [torch.randn(size, length, generator=generator) / size**0.5 for length in gradient.shape[1:]]
            for name, gradient in self._tests[0].items()
            if gradient.ndim == 3  # vectors have fewer entries than a sketch and stay whole
        }

        def project(gradients: Gradients) -> Gradients:
            return {
                name: sides[name][0] @ gradient @ sides[name][1].T if name in sides else gradient
                for name, gradient in gradients.items()
            }

        return _score([project(each) for each in self._tests], [project(each) for each in self._trains])


class _Unrolled(nn.Module):
    def __init__(self, core: nn.Module, steps: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(core) for _ in range(steps))
        self.calls = 0

    def forward(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.copies[(self.calls - 1) % len(self.copies)](*args)


def _step_gradients(model: nn.Module, unrolled: _Unrolled, ids: Tensor) -> Gradients:
    """Of one example: `(t, *shape)` for each parameter of the loop."""
    parameters = [dict(copy.named_parameters()) for copy in unrolled.copies]
    loss = losses(model(ids.unsqueeze(0)), ids.unsqueeze(0)).sum()
    flat = iter(torch.autograd.grad(loss, [p for step in parameters for p in step.values()]))
    steps = [{name: next(flat) for name in step} for step in parameters]
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def _summed(gradients: Gradients) -> Gradients:
    return {name: gradient.sum(0) for name, gradient in gradients.items()}


def _score(tests: list[Gradients], trains: list[Gradients]) -> Tensor:
    """`(q, n, t)`, summed over parameters."""
    scores = torch.zeros(len(tests), len(trains), len(next(iter(tests[0].values()))))
    for name in tests[0]:
        columns = torch.stack([train[name].flatten() for train in trains], 1)  # (entries, n)
        for i, test in enumerate(tests):
            scores[i] += (test[name].flatten(1) @ columns).T
    return scores
