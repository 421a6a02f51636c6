"""What a forward-only question costs beside a forward pass: `python benchmarks/direction.py [--small]`.

The influence of one group on every token of a batch, by a forward pass with dual numbers, against the model's plain
forward pass of the same batch, as it runs without gradients, in seconds of the processor. Calls take turns, ten plain
passes and one with dual numbers, and the ratio is taken within each round; the first batch of a question costs a plain
pass more, which is not in it. Results go to direction.json beside this file, with the environment.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from index import token_rows
from timing import interleaved, quartiles, ratio

from captum_sdi import Exact, SDIInfluence
from captum_sdi.data.collate import Collator
from captum_sdi.direction.forward_mode import ForwardMode
from captum_sdi.maps.look import side_as_run
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

VOCABULARY = 200
N_PLAIN = 10
"""Plain passes in a round, as one is too short to time."""
RESULTS = Path(__file__).with_suffix(".json")


def influence(width: int, n_loops: int, length: int) -> SDIInfluence:
    """One block before, two in and one after the loop; the loop's parameters."""
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=width,
        n_head=4,
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_loops=n_loops,
    )
    train = token_rows(8, length, VOCABULARY, seed=1)
    return SDIInfluence(LoopedGPTForCausalLM(config), train, batch_size=4, sketch=Exact())


def measure(width: int, n_loops: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds and their ratio, once the numbers are those of exact scores."""
    sdi = influence(width, n_loops, length)
    texts = token_rows(4, length, VOCABULARY, seed=2)
    direction = sdi.direction(list(range(8)))
    check_exact(sdi, direction.step_influence(texts).trajectories[:, 0], texts)
    batch = Collator()(texts)
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    vectors = direction.gradients[0].vectors
    question = direction.ask(batch)
    with question.study.points() as points:
        point = next(points)
        forward_mode = ForwardMode(point, side_as_run(point, question.tests.side), by_token=True)

        def plain_forward() -> None:
            with torch.no_grad():
                for _ in range(N_PLAIN):
                    point.model(**inputs)

        calls = {
            "forward pass": plain_forward,
            "direction": lambda: forward_mode.step_derivatives(batch, vectors),
        }
        seconds = interleaved(calls, rounds, time.process_time)
        seconds["forward pass"] = [spent / N_PLAIN for spent in seconds["forward pass"]]
    return {
        "width": width,
        "n_loops": n_loops,
        "n_tokens": length,
        "batch": len(texts),
        "rounds": rounds,
        "seconds": {call: quartiles(times) for call, times in seconds.items()},
        "ratio": ratio(seconds, "direction", "forward pass"),
        "at most": 2 * (n_loops + 1),
    }


def check_exact(sdi: SDIInfluence, received: Any, texts: list[Any]) -> None:
    """The numbers must be sums of exact scores, or a time means nothing."""
    expected = sdi.step_influence(texts).trajectories.sum(1)
    assert (received - expected).abs().max() <= 1e-4 * expected.abs().max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    if small:
        measured = [measure(16, 2, 8, 1)]
    else:
        measured = [measure(width, n_loops, 64, 15) for width, n_loops in ((64, 4), (64, 8), (256, 4))]
    text = json.dumps({"environment": environment(), "direction": measured}, indent=1)
    print(text)
    if not small:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
