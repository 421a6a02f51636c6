"""How the first example of a side is run: alone, its labels handed to a model that takes them, all uses in sight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.batch import split_batch
from captum_sdi.data.losses import IGNORED, TokenCrossEntropy
from captum_sdi.data.side import Side
from captum_sdi.data.targets import side_with_labels
from captum_sdi.model_facts import vocabulary_size
from captum_sdi.rehearsal.alone import BatchRun, alone, run_alone
from captum_sdi.rehearsal.first_example import FirstExample
from captum_sdi.rehearsal.randomness import sources_of_change
from captum_sdi.rehearsal.witness import Witness


def first_run(batch: BatchRun, number: int, before: Callable[[Any], None]) -> FirstExample:
    """Run an example alone, with its labels where the model's own loss is to be compared with the default one.

    Without them, so that it fails with the better words or works, where that fails or the default loss is not its own.

    Args:
        batch: The batch.
        number: Of the example in it.
        before: Called with what the model returned before the loss is.

    Returns:
        The example, its losses and features.

    Raises:
        ValueError: If the loss is not finite, or no module answers for a parameter's use.
        OutOfMemoryError: If one example is too much.
    """
    capture, side, example = batch.capture, batch.side, alone(batch, number)
    before_run = sources_of_change(capture.model)
    plain, n_runs = Witness(side.loss_fn, before, sees_labels=False), 1
    if may_see_labels(capture, example, side):
        witness = Witness(side.loss_fn, before, sees_labels=True)
        as_run = replace(side_with_labels(side), loss_fn=witness)
        try:
            with witness.watching(capture.model):
                run = run_alone(batch, number, example=example, side=as_run, checks_uses=True)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, IndexError, RuntimeError):
            plain.own_loss, plain.logits, n_runs = witness.own_loss, witness.logits, 2
        else:
            may_vary = sources_of_change(capture.model) != before_run
            return FirstExample(capture, side, run, witness, as_run, may_vary)
    as_run = replace(side, loss_fn=plain)
    run = run_alone(batch, number, example=example, side=as_run, checks_uses=True)
    may_vary = sources_of_change(capture.model) != before_run
    return FirstExample(capture, side, run, plain, as_run, may_vary, n_runs)


def may_see_labels(capture: Capture, example: Any, side: Side) -> bool:
    """Say whether a model computes a loss from labels, of tokens that it knows, and the default one is in its place."""
    if not isinstance(side.loss_fn, TokenCrossEntropy) or not capture.read.takes("labels"):
        return False
    _, _, labels = split_batch(example)
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    n_ids = vocabulary_size(capture.model)
    is_known = (labels == IGNORED) | (labels >= 0)
    if n_ids is not None:
        is_known &= labels < n_ids
    return bool(is_known.all())
