"""The peers that are right on a loop, on the same bed. Each is optional: what is not installed is left out.

None of them tells loop steps apart. Their settings are their defaults, or those that PEERS' authors recommend for
language models; the sign is turned to that of this library where it is the other one.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from retraining.methods import Method, Scores, Subject
from retraining.training import load
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Logits(nn.Module):
    """A model that is called with token ids alone and returns a tensor."""

    def __init__(self, model: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.keywords = keywords

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, **self.keywords)
        return getattr(output, "logits", output)


class WithLogits:
    """An output as the beds' losses read it."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def captum_tracincp(subject: Subject) -> Scores:
    """Captum's `TracInCP` in its mode of one example at a time, at the same checkpoints."""
    from captum.influence import TracInCP

    bed = subject.bed
    model = Logits(subject.model, dict(bed.forward_kwargs))

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return bed.loss(WithLogits(logits), labels)

    losses.reduction = "none"  # type: ignore[attr-defined]

    def load_checkpoint(model: nn.Module, checkpoint: tuple[int, Tensor, float]) -> float:
        _, weights, rate = checkpoint
        load(model.model, weights)
        return rate

    def weights_at_checkpoints() -> Any:
        return list(subject.checkpoints())

    start = time.process_time()
    estimator = TracInCP(
        model,
        TensorDataset(bed.train["input_ids"], bed.train["labels"]),
        weights_at_checkpoints(),
        load_checkpoint,
        loss_fn=losses,
        batch_size=64,
    )
    totals = estimator.influence((bed.test["input_ids"], bed.test["labels"]))
    return Scores(totals.detach(), None, time.process_time() - start, {})


PEERS: dict[str, Method] = {
    "captum TracInCP": captum_tracincp,
}
