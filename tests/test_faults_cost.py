"""All that is checked costs two examples' forward, backward and sketch, once, and misses nothing for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, rows
from test_faults_neighbours import Base, equal_rows
from torch import nn

from captum_sdi import Exact, SDIInfluence

ORDERED = sorted(rows(4, seed=1), key=lambda row: -len(row["input_ids"]))


class Counter:
    """How many examples a model runs forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self.forward, self.backward = 0, 0
        model.register_forward_hook(self._on_forward)

    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        n = len(logits)
        self.forward += n
        if logits.requires_grad:
            logits.register_hook(lambda gradient: self._on_backward(n))

    def _on_backward(self, n: int) -> None:
        self.backward += n

    def during(self, call: Callable[[], Any]) -> tuple[int, int]:
        self.forward, self.backward = 0, 0
        call()
        return self.forward, self.backward


def looped_gpt() -> nn.Module:
    return CASES[0].model(torch.float32)


QUESTIONS: dict[str, Callable[[SDIInfluence, Any], Any]] = {
    "all": lambda sdi, tests: sdi.influence(tests),
    "top": lambda sdi, tests: sdi.influence(tests, k=2),
    "self": lambda sdi, tests: sdi.self_influence(),
    "map": lambda sdi, tests: sdi.influence_map(tests, axes=("test_step",), train_indices=[0, 1]),
}


@pytest.mark.parametrize("question", list(QUESTIONS))
@pytest.mark.parametrize("make", [looped_gpt, Base])
def test_the_first_call_costs_at_most_two_examples_more(question: str, make: Callable[[], nn.Module]) -> None:
    padded, equal, mixed = rows(6, seed=1), equal_rows(3), [*equal_rows(3), *rows(3, seed=1)]
    loop = "core" if make is looped_gpt else "block"
    for data in (padded, equal, mixed, [*ORDERED, *reversed(ORDERED)]):
        if make is Base:
            data = [{name: column[:5] for name, column in row.items()} for row in data]
        for tests in (data[:1], data[:3]):
            for batch_size in (1, 2, 3):
                model = make()
                sdi = SDIInfluence(model, data, loop=loop, batch_size=batch_size, sketch=Exact())
                counter = Counter(model)

                def call(sdi: SDIInfluence = sdi, tests: Any = tests) -> Any:
                    return QUESTIONS[question](sdi, tests)

                first, second = counter.during(call), counter.during(call)
                extra = [more - usual for more, usual in zip(first, second, strict=True)]
                assert max(extra) <= 2, (question, len(data), len(tests), batch_size, extra)
                assert max(extra) > 0
