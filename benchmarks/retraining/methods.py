"""Every method's scores of one trained model, by loop step where it has steps, and the time they took.

Times are those of the processor, so that neighbours on a shared machine do not count. Settings are the defaults of the
library or those of TRUTH's protocol; none was chosen by looking at retrained models here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.preconditioners import Adam, Fisher, Hessian
from captum_sdi.unrolled import AdamW, TrainingRun, UnrolledInfluence
from retraining.beds import Bed, as_batch, as_dataset
from retraining.training import Flat, Trained, load, model_with, train

BATCH = 64
CHECKPOINTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
"""When, as a share of training."""


@dataclass(frozen=True)
class Scores:
    """What a method predicts: the rise of each test loss without each training example, up to a scale."""

    totals: Tensor
    """`(q, n)`, over all parameters."""
    steps: Tensor | None
    """`(q, n, t)`, through the loop's steps; None where a method has totals alone."""
    seconds: float
    facts: dict[str, Any]
    """What the method reports beside its scores."""


@dataclass(frozen=True)
class Subject:
    """A bed, trained once with its path kept when the first method asks for it."""

    bed: Bed

    @cached_property
    def run(self) -> Trained:
        return train(self.bed, torch.ones(1, self.bed.n), keep_path=True)

    @property
    def model(self) -> nn.Module:
        return model_with(self.bed, self.run.weights[0])

    def checkpoints(self) -> list[tuple[int, Tensor, float]]:
        """Return update, weights and learning rate."""
        updates = [int(share * len(self.run.path)) for share in CHECKPOINTS]
        return [(update, self.run.path[update].weights, self.bed.rates[update]) for update in updates]

    def question(self, **settings: Any) -> SDIInfluence:
        """Return the library's estimator on this bed, over all parameters."""
        bed = self.bed
        return SDIInfluence(
            self.model,
            as_dataset(bed.train),
            loss_fn=bed.loss,
            layers=None,
            loop=bed.loop,
            forward_kwargs=bed.forward_kwargs,
            test_forward_kwargs=bed.test_forward_kwargs,
            **{"batch_size": BATCH, **settings},
        )


Method = Callable[[Subject], Scores]


def asked(subject: Subject, **settings: Any) -> Scores:
    """Ask `SDIInfluence` once for totals and trajectories."""
    question = subject.question(**settings)
    start = time.process_time()
    result = question.step_influence(as_batch(subject.bed.test))
    return Scores(result.influence_scores, result.trajectories, time.process_time() - start, {})


def along_the_way(subject: Subject, **settings: Any) -> Scores:
    """Ask at four checkpoints, with their learning rates."""

    def load_checkpoint(model: nn.Module, checkpoint: tuple[int, Tensor, float]) -> float:
        _, weights, rate = checkpoint
        load(model, weights)
        return rate

    checkpoints = iter(subject.checkpoints())
    return asked(subject, checkpoints=checkpoints, checkpoints_load_func=load_checkpoint, **settings)


def tracin(subject: Subject) -> Scores:
    return along_the_way(subject, sketch=Exact())


def tracin_sketched(subject: Subject) -> Scores:
    return along_the_way(subject, sketch=TensorSketch(512))


def products_at_the_end(subject: Subject) -> Scores:
    return asked(subject, sketch=Exact())


def adam(subject: Subject) -> Scores:
    flat = Flat(subject.bed.start())

    def moments(checkpoint: tuple[int, Tensor, float]) -> dict[str, Tensor]:
        update, _, _ = checkpoint
        return flat.state(subject.run.path[update].second_moment)

    return along_the_way(subject, sketch=Exact(), preconditioner=Adam(moments))


def fisher(subject: Subject) -> Scores:
    return asked(subject, sketch=TensorSketch(512), preconditioner=Fisher())


def hessian(rank: int) -> Method:
    def scores(subject: Subject) -> Scores:
        return asked(subject, sketch=Exact(), preconditioner=Hessian(rank=rank))

    return scores


def through_training(subject: Subject) -> UnrolledInfluence:
    """Return the library's derivative through this bed's training; the gauge is measured apart."""
    bed = subject.bed
    run = TrainingRun(
        optimizer=AdamW(bed.adam.betas, bed.adam.eps, bed.adam.weight_decay, no_decay=()),
        rates=bed.rates,
        batches=bed.batches,
    )
    return UnrolledInfluence(
        subject.model,
        as_dataset(bed.train),
        run,
        start=bed.start().state_dict(),
        layers=None,
        loss_fn=bed.loss,
        loop=bed.loop,
        forward_kwargs=bed.forward_kwargs,
        test_forward_kwargs=bed.test_forward_kwargs,
        keep="all",
        check=False,
    )


def unrolled(subject: Subject) -> Scores:
    influence = through_training(subject)
    start = time.process_time()
    result = influence.step_influence(as_batch(subject.bed.test))
    return Scores(result.influence_scores, result.trajectories, time.process_time() - start, {})


def unrolled_totals(subject: Subject) -> Scores:
    """The same without steps: a seed for each test alone."""
    influence = through_training(subject)
    start = time.process_time()
    totals = influence.influence(as_batch(subject.bed.test))
    return Scores(totals, None, time.process_time() - start, {})


def at_random(subject: Subject) -> Scores:
    """The floor."""
    bed = subject.bed
    generator = torch.Generator().manual_seed(41 + bed.seed)
    steps = torch.randn(bed.q, bed.n, bed.n_steps, generator=generator)
    return Scores(steps.sum(-1), steps, 0.0, {})


METHODS: dict[str, Method] = {
    "random scores": at_random,
    "TracIn / SDI, 4 checkpoints": tracin,
    "TracIn / SDI, TensorSketch(512)": tracin_sketched,
    "gradient products at the end": products_at_the_end,
    "Adam, 4 checkpoints": adam,
    "Fisher, TensorSketch(512)": fisher,
    "Hessian, rank 20": hessian(20),
    "Hessian, rank 40": hessian(40),
    "Hessian, rank 80": hessian(80),
    "unrolled": unrolled,
}
