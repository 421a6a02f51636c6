"""A call of the model on a batch; where it fails, what would let it run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import standing_in
from captum_sdi.data.batch import Batch, forward_keywords

MASK_REMEDY = (
    "It runs without attention_mask, which is 1 where an example has tokens: it stands in the rows, or captum_sdi's "
    "Collator made it for rows of different length. Pass rows with a mask in the form that the model takes, or rows "
    "without one and batch_size=1, where nothing is padded."
)


class RefusedMaskError(ValueError):
    """A model fails on a batch, and runs without its attention mask."""


def run_model(
    model: nn.Module,
    batch: Batch,
    parameters: Mapping[str, Tensor] | None = None,
) -> Any:
    """Return the model's output for a batch.

    Args:
        model: The model.
        batch: The batch.
        parameters: By name, what stands in for the model's own; None: nothing does.

    Raises:
        TypeError: If the model's forward does not take the batch's arguments.
        ValueError: If it fails on them, and works with the labels.
        RefusedMaskError: If it fails on them, and works without the attention mask.
        RuntimeError: If it fails otherwise.
        IndexError: If it fails otherwise.
        AssertionError: If it fails otherwise.
    """
    stand_ins = nullcontext() if parameters is None else standing_in(model, parameters)
    try:
        with stand_ins:
            return model(*batch.args, **batch.kwargs)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        failure = f"{type(model).__name__} could not be called: {error}"
        if _needs_labels(model, batch):
            remedy = "It needs its labels: pass forward_kwargs=lambda batch: {'labels': batch['labels']}."
            raise ValueError(f"{failure} {remedy}") from error
        if _refuses_mask(model, batch):
            raise RefusedMaskError(f"{failure} {MASK_REMEDY}") from error
        raise
    except TypeError as error:
        if "argument" not in str(error):
            raise
        model_name = type(model).__name__
        keywords = list(batch.kwargs)
        raise TypeError(
            f"{model_name} could not be called with {len(batch.args)} positional argument(s) and the "
            f"keywords {keywords}: {error}. What it needs comes from the batch and forward_kwargs=."
        ) from error


def with_labels(batch: Batch) -> Batch:
    """Return a batch whose labels are handed to the model as well."""
    return replace(batch, kwargs={**batch.kwargs, "labels": batch.labels})


def _needs_labels(model: nn.Module, batch: Batch) -> bool:
    is_withheld = "labels" in (forward_keywords(model) or ()) and batch.labels is not None
    return is_withheld and "labels" not in batch.kwargs and _runs(model, with_labels(batch))


def _refuses_mask(model: nn.Module, batch: Batch) -> bool:
    without_mask = {name: value for name, value in batch.kwargs.items() if name != "attention_mask"}
    return "attention_mask" in batch.kwargs and _runs(model, replace(batch, kwargs=without_mask))


def _runs(model: nn.Module, batch: Batch) -> bool:
    try:
        with torch.no_grad():
            model(*batch.args, **batch.kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True
