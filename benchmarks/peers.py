"""The same scores from each library, and the passes they are measured against.

Each function prepares what can be prepared once and returns a call without arguments. Scores come as `(q, n, t)`,
totals as `(q, n)`. Every call leaves the model without hooks, so that none slows another one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import sdi
from captum.influence import TracInCP
from subjects import Workload, losses
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from captum_sdi import Exact, SDIInfluence, StepInfluence, TensorSketch
from captum_sdi.sketch.base import Sketch

Call = Callable[[], Any]


def ours(work: Workload, dim: int, seed: int = 0, batch_size: int | None = None, **settings: Any) -> Call:
    """`SDIInfluence.step_influence`: a `StepInfluence`."""
    return _step_influence(work, TensorSketch(dim, seed), batch_size, settings)


def ours_exact(work: Workload, batch_size: int | None = None, **settings: Any) -> Call:
    """The same with whole gradients."""
    return _step_influence(work, Exact(), batch_size, settings)


def _step_influence(work: Workload, sketch: Sketch, batch_size: int | None, settings: dict[str, Any]) -> Call:
    rows = [{"input_ids": ids, "labels": ids} for ids in work.train]
    estimator = SDIInfluence(work.model, rows, batch_size=batch_size or len(rows), sketch=sketch, **settings)
    batch = {"input_ids": work.test, "labels": work.test}

    def call() -> StepInfluence:
        return estimator.step_influence(batch)

    return call


def reference(work: Workload, dim: int, seed: int = 0, batch_size: int | None = None) -> Call:
    """The paper's package, sketched: `(q, n, t)`."""
    return _reference(work, batch_size, sdi.ProjectedTracInSDI, projection_size=dim, seed=seed)


def reference_exact(work: Workload, batch_size: int | None = None) -> Call:
    """The paper's package, with whole gradients."""
    return _reference(work, batch_size, sdi.FullGradientTracInSDI)


def _reference(work: Workload, batch_size: int | None, kind: Any, **settings: Any) -> Call:
    modules = [work.model.get_submodule(name) for name in work.loop]
    size = batch_size or len(work.train)

    def call() -> Tensor:
        estimator = kind(model=work.model, target_modules=modules, **settings)
        try:
            outputs = estimator.influence_across_checkpoints(
                checkpoints=[sdi.CheckpointSpec("the model's own weights", 1.0)],
                train_loader=[(ids,) for ids in work.train.split(size)],
                query_loader=[(ids,) for ids in work.test.split(size)],
                loss_fn=lambda model, batch: losses(model(batch[0]), batch[0]),
                load_checkpoint_fn=lambda path: {},
                load_model_state_dict_fn=lambda model, state: None,
            )
        finally:
            estimator.close()
            work.model.zero_grad(set_to_none=True)
        return outputs.sdi.transpose(0, 1)

    return call


def tracincp(work: Workload) -> Call:
    """Captum's TracInCP: exact totals `(q, n)`, no steps."""
    model = _Logits(work.model)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    layers = sorted(name for name in owners if name.startswith(tuple(f"model.{part}." for part in work.loop)))
    data = TensorDataset(work.train, work.train)
    estimator = TracInCP(model, data, ["weights"], lambda *_: 1.0, layers, losses, batch_size=len(data))
    return lambda: estimator.influence((work.test, work.test))


class _Logits(nn.Module):
    """Captum wants a tensor for an output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def training_steps(work: Workload) -> Call:
    """A forward and a backward pass for each of both batches, without the optimizer's step."""

    def call() -> None:
        for ids in (work.train, work.test):
            losses(work.model(ids), ids).sum().backward()
            work.model.zero_grad(set_to_none=True)

    return call


def limit(work: Workload) -> Call:
    """The physical limit: the same passes with frozen weights, backward to where the loop begins, and no sketch."""
    model = copy.deepcopy(work.model).requires_grad_(False)
    entry = model.get_submodule(work.entry)
    entry.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())

    def call() -> None:
        for ids in (work.train, work.test):
            losses(model(ids), ids).sum().backward()

    return call
