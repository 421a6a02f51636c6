"""The peers that are right on a loop, on the same bed. Each is optional: what is not installed is left out.

None of them tells loop steps apart. Their settings are their defaults, or those that PEERS' authors recommend for
language models; the sign is turned to that of this library where it is the other one.
"""

from __future__ import annotations

import time
from typing import Any

from retraining.beds import as_batch, as_dataset
from retraining.methods import Method, Scores, Subject
from retraining.training import load
from torch import Tensor, nn


class Logits(nn.Module):
    """A model that is called with token ids alone and returns a tensor."""

    def __init__(self, model: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.keywords = keywords

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, **self.keywords)
        return getattr(output, "logits", output)


def captum_tracincp(subject: Subject) -> Scores:
    """Captum's `TracInCP` in its mode of one example at a time, at the same checkpoints."""
    from captum.influence import TracInCP

    bed = subject.bed
    model = Logits(subject.model, dict(bed.forward_kwargs))

    def load_checkpoint(model: nn.Module, checkpoint: tuple[int, Tensor, float]) -> float:
        _, weights, rate = checkpoint
        load(model.model, weights)
        return rate

    start = time.process_time()
    estimator = TracInCP(
        model,
        as_dataset(bed.train),
        iter(subject.checkpoints()),
        load_checkpoint,
        loss_fn=bed.loss,
        batch_size=64,
    )
    totals = estimator.influence(as_batch(bed.test))
    return Scores(totals.detach(), None, time.process_time() - start, {})


PEERS: dict[str, Method] = {
    "captum TracInCP": captum_tracincp,
}
