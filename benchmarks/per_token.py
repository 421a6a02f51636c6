"""What `step_influence(per="token")` costs beside the plain question: `python benchmarks/per_token.py [--small]`.

One text of 64 tokens against 1,000 train examples of 64 tokens, without an index and with one. Calls take turns, and
the ratio is taken within each round. Results go to per_token.json beside this file, with the environment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
            seconds = interleaved(calls, rounds)
            measured[name] = {
                "seconds": {call: quartiles(times) for call, times in seconds.items()},
                "ratio": ratio(seconds, "per token", "plain"),
                "at most": TARGETS[name],
            }
    return measured


def check_conservation(sdi: SDIInfluence, text: list[Any]) -> None:
    """The rows of all tokens must sum to the text's, or a time means nothing."""
    rows, whole = sdi.step_influence(text, per="token"), sdi.step_influence(text)
    largest = whole.trajectories.abs().max()
    assert (rows.trajectories.sum(0) - whole.trajectories[0]).abs().max() <= 1e-4 * largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    measured = measure(16, 40, 1) if small else measure(64, 1000, 3)
    text = json.dumps({"environment": environment(), "per_token": measured}, indent=1)
    print(text)
    if not small:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
