"""Data value embedding beside the exact derivative: `python benchmarks/data_value_embedding.py [--small]`.

Both say what an example contributed in *one* update of a run. Data value embedding (Wang et al., arXiv 2412.09538)
takes training for plain gradient descent, and the Hessian of each update for the sum of its gradients' squares:

    u_T = ∇ℓ(z'; θ_T)
    score_k(z) = η_k/B ⟨u_{k+1}, ∇ℓ(z; θ_k)⟩,    u_k = u_{k+1} - η_k/B Σ_{i in k} g_i ⟨g_i, u_{k+1}⟩

`UnrolledInfluence.update_influence` is exact, through AdamW. Truth: leave-one-out retraining on the parity bed. Results
go to data_value_embedding.json beside this file, with the environment.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from retraining.beds import Bed, as_batch, shortened, smooth_parity
from retraining.measuring import LEFT_OUT, subsets_of, test_losses
from retraining.methods import Subject, through_training
from retraining.training import Flat, model_with, rows_at, train, weighted_loss
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_sdi.evaluate import correlation

RESULTS = Path(__file__).with_suffix(".json")


def gradients_of(bed: Bed, flat: Flat, rows: dict[str, Tensor], vector: Tensor) -> Tensor:
    """Each row's gradient, ``(n, parameters)``."""

    def loss(parameters: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        one = {"input_ids": ids[None], "labels": labels[None]}
        return weighted_loss(bed, flat, parameters, one, torch.ones(1), 1)

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(loss), in_dims=(None, 0, 0))(vector, rows["input_ids"], rows["labels"])


def embedded(subject: Subject) -> Tensor:
    """Data value embedding's scores, ``(q, n, updates)``."""
    bed, run = subject.bed, subject.run
    flat = Flat(bed.start())
    tests = gradients_of(bed, flat, bed.test, run.weights[0])
    scores = torch.zeros(bed.q, bed.n, len(bed.rates))
    for update in reversed(range(len(bed.rates))):
        batch, rate = bed.batches[update], bed.rates[update]
        examples = gradients_of(bed, flat, rows_at(bed.train, batch), run.path[update].weights)
        products = tests @ examples.T
        share = rate / len(batch)
        scores[:, batch, update] = share * products
        tests = tests - share * products @ examples
    return scores


def measure(bed: Bed, n_left_out: int) -> dict[str, Any]:
    """Agreement with retraining, and with each other update by update."""
    subject = Subject(bed)
    start = time.process_time()
    approximated = embedded(subject)
    seconds = {"data value embedding": time.process_time() - start}
    start = time.process_time()
    exact = through_training(subject).update_influence(as_batch(bed.test))
    seconds["update_influence"] = time.process_time() - start
    kept = subsets_of(bed, LEFT_OUT, n_left_out)
    left_out = (~kept).float().argmax(1)
    base = test_losses(bed, subject.model)
    weights = train(bed, kept).weights
    rises = torch.stack([test_losses(bed, model_with(bed, row)) for row in weights], dim=1) - base[:, None]
    agreements = {}
    for name, scores in (("data value embedding", approximated), ("update_influence", exact)):
        found = correlation(scores.sum(-1)[:, left_out].double(), rises)
        agreements[name] = {"spearman": float(found.value), "interval": [float(found.low), float(found.high)]}
    own = exact != 0
    pair = torch.stack([approximated[own].double(), exact[own].double()])
    return {
        "left out": n_left_out,
        "tests": bed.q,
        "leave one out": agreements,
        "correlation of single updates": float(torch.corrcoef(pair)[0, 1]),
        "cpu seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="does it run? Nothing is written")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    bed = smooth_parity(0)
    measured = measure(shortened(bed), 4) if small else measure(bed, 24)
    text = json.dumps({"environment": environment(), "data_value_embedding": measured}, indent=1)
    print(text)
    if not small:
        RESULTS.write_text(text + "\n")


if __name__ == "__main__":
    main()
