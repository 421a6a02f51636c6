"""The peers that are right on a loop, on the same bed. Each is optional: what is not installed is left out.

None of them tells loop steps apart. Settings are their defaults, but for damping, which is what ours is: a tenth of
the mean eigenvalue where the default is none at all. `pip install dattri traker kronfluence` installs them.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from retraining.beds import Bed, as_batch, as_dataset
from retraining.methods import Method, Scores, Subject
from retraining.training import load

BATCH = 64
SKETCH = 2048


class Logits(nn.Module):
    """A model that is called with token ids alone and returns a tensor."""

    def __init__(self, model: nn.Module, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.keywords = keywords

    def forward(self, input_ids: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, **self.keywords)
        return getattr(output, "logits", output)


def logits_of(subject: Subject) -> Logits:
    return Logits(subject.model, dict(subject.bed.forward_kwargs))


def captum_tracincp(subject: Subject, batch_size: int = BATCH) -> Scores:
    """Captum's `TracInCP` at the same checkpoints: a backward pass of the batch for each of its examples."""
    from captum.influence import TracInCP

    bed = subject.bed

    def load_checkpoint(model: nn.Module, checkpoint: tuple[int, Tensor, float]) -> float:
        _, weights, rate = checkpoint
        load(model.model, weights)
        return rate

    model, checkpoints = logits_of(subject), iter(subject.checkpoints())
    start = time.process_time()
    estimator = TracInCP(
        model, as_dataset(bed.train), checkpoints, load_checkpoint, loss_fn=bed.loss, batch_size=batch_size
    )
    totals = estimator.influence(as_batch(bed.test))
    return Scores(totals.detach(), None, time.process_time() - start, {})


# --- dattri ---


def dattri_tracin(subject: Subject, dim: int = 512) -> Scores:
    """TracIn of randomly projected gradients; dattri's own projection has 512 numbers."""
    from dattri.algorithm.tracin import TracInAttributor

    checkpoints = subject.checkpoints()
    task = dattri_task(subject, [weights for _, weights, _ in checkpoints])
    rates = torch.tensor([rate for _, _, rate in checkpoints])
    projector = {"proj_dim": dim}
    attributor = TracInAttributor(task, weight_list=rates, normalized_grad=False, projector_kwargs=projector)
    return dattri_scores(subject.bed, attributor, reads_train_set_first=False)


def dattri_conjugate_gradients(subject: Subject) -> Scores:
    """Influence functions by conjugate gradients; dattri sums the inverses of the batches' Hessians."""
    from dattri.algorithm.influence_function import IFAttributorCG

    task = dattri_task(subject, [subject.run.weights[0]])
    return dattri_scores(subject.bed, IFAttributorCG(task, regularization=0.1), reads_train_set_first=True)


def dattri_task(subject: Subject, checkpoints: list[Tensor]) -> Any:
    from dattri.task import AttributionTask

    bed, model = subject.bed, logits_of(subject)

    def loss(parameters: dict[str, Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
        ids, labels = (column.reshape(-1, column.shape[-1]) for column in rows)  # of one example or of several
        return bed.loss(functional_call(model, parameters, ids), labels).mean()

    states = []
    for weights in checkpoints:
        load(model.model, weights)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return AttributionTask(loss_func=loss, model=model, checkpoints=states)


def dattri_scores(bed: Bed, attributor: Any, reads_train_set_first: bool) -> Scores:
    train, test = (DataLoader(as_dataset(rows), BATCH) for rows in (bed.train, bed.test))
    start = time.process_time()
    with sdpa_kernel(SDPBackend.MATH):
        if reads_train_set_first:
            attributor.cache(train)
        scores = attributor.attribute(train, test)
    return Scores(scores.T.detach(), None, time.process_time() - start, {})


# --- TRAK ---


def trak(subject: Subject) -> Scores:
    """TRAK of one model, its kernel damped by a tenth of the mean of its eigenvalues; by default it is not damped."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    bed, model = subject.bed, logits_of(subject)

    class LogOdds(AbstractModelOutput):
        """log p / (1 - p), with p the geometric mean of the probabilities of an example's targets."""

        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(
            model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], ids: Tensor, labels: Tensor
        ) -> Tensor:
            logits = functional_call(model, (weights, buffers), ids[None])
            loss = bed.loss(logits, labels[None])[0]
            return -loss - torch.log(-torch.expm1(-loss))

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any
        ) -> Tensor:
            ids, labels = batch
            losses = bed.loss(functional_call(model, (weights, buffers), ids), labels)
            return (1 - torch.exp(-losses)).detach()[:, None]

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
        traker = TRAKer(
            model, LogOdds(), bed.n, folder, device="cpu", proj_dim=SKETCH, use_half_precision=False, logging_level=40
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(as_batch(bed.train), num_samples=bed.n)
        gradients = torch.as_tensor(traker.saver.current_store["grads"])
        traker.score_computer.lambda_reg = 0.1 * float(gradients.square().sum()) / min(gradients.shape)
        traker.finalize_features()
        traker.start_scoring_checkpoint("tests", model.state_dict(), 0, bed.q)
        traker.score(as_batch(bed.test), num_samples=bed.q)
        scores = torch.as_tensor(traker.finalize_scores("tests")).T.clone()
    return Scores(scores, None, time.process_time() - start, {})


# --- kronfluence ---


def kronfluence(subject: Subject) -> Scores:
    """EK-FAC over linear layers; an identity in the place of its post-processing makes it right on a loop."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    bed = subject.bed

    class LanguageModelling(Task):
        enable_post_process_per_sample_gradient = True

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            ids, labels = batch
            logits = model(ids)
            if sample:
                drawn = torch.distributions.Categorical(logits=logits[:, :-1].detach()).sample()
                drawn = torch.cat([labels[:, :1], drawn], dim=1)
                labels = torch.where(labels == -100, labels, drawn)
            return bed.loss(logits, labels).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        task = LanguageModelling()
        model = prepare_model(logits_of(subject), task)
        analyzer = Analyzer("truth", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        train, test = as_dataset(bed.train), as_dataset(bed.test)
        factors = FactorArguments(strategy="ekfac", has_shared_parameters=True)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=BATCH, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            test,
            train,
            per_device_query_batch_size=bed.q,
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"].clone()
    return Scores(scores, None, time.process_time() - start, {})


PEERS: dict[str, Method] = {
    "captum TracInCP": captum_tracincp,
    "dattri TracIn": dattri_tracin,
    "dattri influence by CG": dattri_conjugate_gradients,
    "TRAK, 2048, damped": trak,
    "kronfluence EK-FAC": kronfluence,
}
