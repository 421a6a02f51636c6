"""How often two standard errors hold the exact score: of all pairs, and of winners, which are chosen for being high.

`python benchmarks/coverage.py` trains a small looped GPT on p-hop induction, scores it exactly and by sketches of many
sizes, and writes `coverage.json` and the table in `coverage.md`. Winners are the top ten of each test example, by total
and by each loop step alone. Overstated: by how much the winners' estimates together exceed their exact scores.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import environment
from subjects import losses
from torch import Tensor

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.tasks import p_hop

FOLDER = Path(__file__).parent
K = 10


class Setting(NamedTuple):
    """What is measured on: sketch sizes, draws of the hashes, examples and training."""

    dims: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    n_draws: int = 6
    n_train: int = 240
    n_test: int = 12
    width: int = 64
    n_training_steps: int = 400


SMALL = Setting(dims=(64, 128), n_draws=1, n_train=24, n_test=2, width=16, n_training_steps=5)


class Estimate(NamedTuple):
    """Scores and their standard errors, `(q, n, 1 + t)`: the total, then the loop steps."""

    scores: Tensor
    errors: Tensor


def measure(setting: Setting) -> dict[str, Any]:
    """Coverage and overstatement by pool and sketch size."""
    model, train, test = trained(setting)
    exact = estimate(model, train, test, Exact()).scores
    found: dict[str, Any] = {}
    for pool in (False, True):
        for dim in setting.dims:
            draws = defaultdict(list)
            for seed in range(setting.n_draws):
                sketched = estimate(model, train, test, TensorSketch(dim=dim, pool=pool, seed=seed))
                for name, number in judged(sketched, exact).items():
                    draws[name].append(number)
            found[f"pool={pool}, dim={dim}"] = {name: sum(numbers) / len(numbers) for name, numbers in draws.items()}
    return {"setting": setting._asdict(), "environment": environment(), "found": found}


def trained(setting: Setting) -> tuple[LoopedGPTForCausalLM, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A looped GPT after a little p-hop induction, train rows and test rows."""
    data = p_hop(1024, length=16, running=True)
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=data.vocab_size,
        n_positions=data.length,
        n_embd=setting.width,
        n_head=max(1, setting.width // 32),
        n_prelude=1,
        n_core=1,
        n_coda=1,
        n_loops=6,
        initializer_range=0.06,
    )
    model = LoopedGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(setting.n_training_steps):
        ids = data.input_ids[torch.randperm(len(data))[:32]]
        losses(model(ids), ids).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = [{"input_ids": ids, "labels": ids} for ids in data.input_ids]
    return model.eval(), rows[: setting.n_train], rows[-setting.n_test :]


def estimate(model: LoopedGPTForCausalLM, train: Any, test: Any, sketch: Any) -> Estimate:
    """Scores of every pair by one sketch."""
    steps = SDIInfluence(model, train, batch_size=60, sketch=sketch).step_influence(test)
    totals = steps.influence_scores.unsqueeze(-1)
    total_errors = steps.score_errors.unsqueeze(-1)
    return Estimate(
        torch.cat([totals, steps.trajectories], -1),
        torch.cat([total_errors, steps.trajectory_errors], -1),
    )


def judged(sketched: Estimate, exact: Tensor) -> dict[str, float]:
    """Coverage of all pairs and of winners; totals are the first column, the others are loop steps."""
    within = (sketched.scores - exact).abs() <= 2 * sketched.errors
    winners = sketched.scores.topk(min(K, exact.shape[1]), dim=1).indices  # (q, k, 1 + t): by each column its own
    won = within.gather(1, winners).double()
    stated = sketched.scores.gather(1, winners).double().sum((0, 1))
    true = exact.gather(1, winners).double().sum((0, 1))
    overstated = stated / true - 1
    return {
        "all pairs, totals": float(within[..., 0].double().mean()),
        "all pairs, steps": float(within[..., 1:].double().mean()),
        "winners by total": float(won[..., 0].mean()),
        "winners by one step": float(won[..., 1:].mean()),
        "overstated by total": float(overstated[0]),
        "overstated by one step": float(overstated[1:].mean()),
        "overstated by one step, worst": float(overstated[1:].max()),
    }


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    names = list(next(iter(found.values())))
    lines = ["| sketch | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for sketch, numbers in found.items():
        cells = [f"{number:.3f}" if "overstated" not in name else f"{number:+.1%}" for name, number in numbers.items()]
        lines.append(f"| {sketch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run?")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    measured = measure(SMALL if options.small else Setting())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "coverage.json").write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured["found"]))


if __name__ == "__main__":
    main()
