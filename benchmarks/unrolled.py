"""What a way back through training costs: a seed in units of a plain training of the same run.

    python benchmarks/unrolled.py [rounds]

A looped character GPT (width 48, one block looped four times, 38,400 parameters), AdamW, batches of 32 texts of 32
characters. All seeds of 8 tests x (4 loop steps + prelude + coda) go back together through the run; a plain training of
it is timed in turns with them, and the ratio is taken within each round. "replay" is the forward pass that comes first,
once for all questions. CPU time of the process on one thread: other processes on the machine count less than in time on
the wall. The median and both ends over rounds are written to unrolled.json beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum._utils.progress import NullProgress
from environment import environment
from torch import Tensor

from captum_sdi.data.losses import default_loss
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.unrolled import AdamW, TrainingRun, UnrolledInfluence

N_TRAIN, N_TESTS, LENGTH, BATCH, UPDATES, VOCABULARY = 64, 8, 32, 32, 4, 40
RATES = [1e-3] * UPDATES


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Texts of random characters: what they say changes no time."""
    ids = torch.randint(0, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def new_model() -> LoopedGPTForCausalLM:
    """A looped GPT, the same every time."""
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=48,
        n_head=4,
        n_loops=4,
        n_prelude=0,
        n_core=1,
        n_coda=0,
        injection="concat",
        bias=True,
    )
    return LoopedGPTForCausalLM(config)


def plain_training(train: list[dict[str, Tensor]], batches: list[list[int]]) -> LoopedGPTForCausalLM:
    """Train as anybody would."""
    model = new_model()
    loss_fn, optimizer = default_loss(model), torch.optim.AdamW(model.parameters(), lr=RATES[0])
    for batch in batches:
        ids = torch.stack([train[i]["input_ids"] for i in batch])
        optimizer.zero_grad()
        loss_fn(model(input_ids=ids), ids).mean().backward()
        optimizer.step()
    return model


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of some work."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    train, tests = texts(N_TRAIN, seed=1), texts(N_TESTS, seed=2)
    batches = [list(range(BATCH)) if update % 2 else list(range(BATCH, N_TRAIN)) for update in range(UPDATES)]
    model = plain_training(train, batches)
    run = TrainingRun(AdamW(), RATES, batches)
    start = new_model().state_dict()
    unrolled = UnrolledInfluence(model, train, run, start, layers=None, keep="all", check=False)
    derivative = unrolled._derivative
    flat = unrolled._seeds(tests, by_step=True, show_progress=False).flat
    ratios: dict[str, list[float]] = {"replay": [], "one seed alone": [], f"a seed of {len(flat)}": []}
    for _ in range(rounds):
        plain = seconds(lambda: plain_training(train, batches))
        derivative.replay._final = None
        with derivative.updates.borrowed():
            replay = seconds(lambda: derivative.replay.final(NullProgress()))
        alone = seconds(lambda: derivative.example_scores(flat[:1], show_progress=False))
        together = seconds(lambda: derivative.example_scores(flat, show_progress=False))
        for name, spent in zip(ratios, (replay, alone, together / len(flat)), strict=True):
            ratios[name].append(spent / plain)
        print(
            f"plain training {plain:.2f} s;", {name: round(found[-1], 2) for name, found in ratios.items()}, flush=True
        )
    measured = {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in ratios.items()
    }
    content = {"environment": environment(), "rounds": rounds, "in plain trainings": measured}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
