"""What `step_influence(per="token")` costs beside the plain question: `python benchmarks/per_token.py [--small]`.

One text of 64 tokens against 1,000 train examples of 64 tokens, without an index and with one. Calls take turns, times
are of the processor, and the ratio is taken within each round. Where the time goes with an index is profiled. Results
go to per_token.json beside this file, with the environment.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from index import token_rows
from timing import interleaved, quartiles, ratio

from captum_sdi import SDIInfluence, TensorSketch
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

VOCABULARY, LENGTH = 200, 64
RESULTS = Path(__file__).with_suffix(".json")
TARGETS = {"live": 3.0, "index": 1.5}
"""How many times the plain question it may cost at most."""
STAGES = {
    "the index against the train set": ("build.py", "complete"),
    "a first look at the text": ("per_token.py", "rows_question"),
    "rehearsal": ("first_example.py", "before_batch"),
    "rows beside themselves alone": ("first_example.py", "after_batch"),
    "forward passes": ("tape.py", "forward"),
    "backward passes and sketches": ("tape.py", "backward"),
    "of which sketches": ("tensor_sketch.py", "__call__"),
}
"""Functions whose time is counted with all that they call: the passes of a look and of a rehearsal count twice."""


def influence(width: int, n_train: int, index: Path | None) -> SDIInfluence:
    """One block before, two in and one after the loop, four loop steps; totals and trajectories of the loop."""
    torch.manual_seed(0)
    model = LoopedGPTForCausalLM(
        LoopedGPTConfig(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=width,
            n_head=2,
            n_prelude=1,
            n_core=2,
            n_coda=1,
            n_loops=4,
        )
    )
    train = token_rows(n_train, LENGTH, VOCABULARY, seed=1)
    return SDIInfluence(model, train, batch_size=16, sketch=TensorSketch(512), index=index)


def measure(width: int, n_train: int, rounds: int) -> dict[str, Any]:
    """Seconds and ratios, without an index and with one."""
    text = token_rows(1, LENGTH, VOCABULARY, seed=2)
    measured: dict[str, Any] = {"n_train": n_train, "width": width, "n_tokens": LENGTH, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        for name, index in (("live", None), ("index", Path(folder) / "index")):
            sdi = influence(width, n_train, index)
            check_conservation(sdi, text)
            calls = {
                "plain": lambda sdi=sdi: sdi.step_influence(text, k=10),
                "per token": lambda sdi=sdi: sdi.step_influence(text, k=10, per="token"),
            }
            seconds = interleaved(calls, rounds, clock=time.process_time)
            measured[name] = {
                "seconds": {call: quartiles(times) for call, times in seconds.items()},
                "ratio": ratio(seconds, "per token", "plain"),
                "at most": TARGETS[name],
            }
        measured["profile with an index"] = {call: profiled(asked) for call, asked in calls.items()}
    return measured


def profiled(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the processor in each stage of a call, the profiler's own included."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(call)
    stages = {"all": pstats.Stats(profiler).total_tt}
    for (path, _, function), (_, _, _, seconds, _) in pstats.Stats(profiler).stats.items():
        for stage, place in STAGES.items():
            if (Path(path).name, function) == place and "captum_sdi" in path:
                stages[stage] = round(stages.get(stage, 0.0) + seconds, 4)
    return stages


def check_conservation(sdi: SDIInfluence, text: list[Any]) -> None:
    """The rows of all tokens must sum to the text's, or a time means nothing."""
    rows, whole = sdi.step_influence(text, per="token"), sdi.step_influence(text)
    largest = whole.trajectories.abs().max()
    assert (rows.trajectories.sum(0) - whole.trajectories[0]).abs().max() <= 1e-4 * largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    measured = measure(16, 40, 1) if small else measure(64, 1000, 5)
    text = json.dumps({"environment": environment(), "per_token": measured}, indent=1)
    print(text)
    if not small:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
