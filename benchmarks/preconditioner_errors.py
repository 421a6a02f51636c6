"""Standard errors of preconditioned scores, against exact ones with the same preconditioner.

    python preconditioner_errors.py

For each preconditioner and sketch size: the deviation of sketched from exact scores in units of their standard errors
(its root mean square; 1 where errors are right) and the share of pairs within 1.96 of them, of totals and of loop
steps; the correlation of sketched with exact totals. Four draws of the hashes, a looped GPT trained on parity for a
moment.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from captum_sdi import Exact, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.data import Collator
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.preconditioners import Adam, Fisher, Hessian, Preconditioner
from captum_sdi.sketch import Sketch
from captum_sdi.tasks import TaskDataset, parity

DIMS = (64, 256, 1024)
DRAWS = 4
UPDATES = 150


def trained_model(train: TaskDataset) -> tuple[LoopedGPTForCausalLM, dict[str, Tensor]]:
    """A looped GPT of 8,688 parameters after some updates of AdamW, and the second moments there."""
    torch.manual_seed(0)
    config = LoopedGPTConfig(
        vocab_size=train.vocab_size,
        n_embd=24,
        n_head=2,
        n_positions=12,
        n_prelude=0,
        n_coda=0,
        n_core=1,
        n_loops=4,
        initializer_range=0.1,
    )
    model = LoopedGPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = [train[position] for position in range(len(train))]
    for _ in range(UPDATES):
        positions = torch.randperm(len(rows))[:16].tolist()
        batch = Collator()([rows[position] for position in positions])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    correction = 1 - 0.999**UPDATES
    moments = {}
    for name, parameter in model.named_parameters():
        moments[name] = optimizer.state[parameter]["exp_avg_sq"] / correction
    return model.eval(), moments


def deviations(exact: StepInfluence, sketched: StepInfluence) -> Iterator[Tensor]:
    """Deviations in standard errors: of totals, then of loop steps."""
    yield ((sketched.influence_scores - exact.influence_scores) / sketched.score_errors).flatten()
    yield ((sketched.trajectories - exact.trajectories) / sketched.trajectory_errors).flatten()


def main() -> None:
    """Print a line for each preconditioner and size."""
    train, test = parity(120, max_bits=7).split(held_out=8)
    model, moments = trained_model(train)

    def scores(sketch: Sketch, preconditioner: Preconditioner | None) -> StepInfluence:
        sdi = SDIInfluence(model, train, batch_size=16, sketch=sketch, preconditioner=preconditioner)
        return sdi.step_influence(test)

    methods = {"none": None, "Adam": Adam(lambda checkpoint: moments), "Hessian": Hessian(), "Fisher": Fisher()}
    for name, preconditioner in methods.items():
        exact = scores(Exact(), preconditioner)
        for dim in DIMS:
            totals, steps, pairs = [], [], []
            for draw in range(DRAWS):
                sketched = scores(TensorSketch(dim, seed=draw), preconditioner)
                of_totals, of_steps = deviations(exact, sketched)
                totals.append(of_totals)
                steps.append(of_steps)
                pairs.append(torch.stack([exact.influence_scores.flatten(), sketched.influence_scores.flatten()]))
            figures = []
            for kind, measured in (("totals", torch.cat(totals)), ("steps", torch.cat(steps))):
                share = (measured.abs() < 1.96).float().mean()
                figures.append(f"{kind} {measured.square().mean().sqrt():.2f} ({share:.1%})")
            correlation = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean()
            print(f"{name:8} d = {dim:4}: {', '.join(figures)}; correlation {correlation:.3f}", flush=True)


if __name__ == "__main__":
    main()
