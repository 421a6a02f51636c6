"""Captum's own influence tests, run on `SDIInfluence` in TracInCP's place.

Captum ships its tests in neither wheel nor sdist and they are no part of this repository: check out
https://github.com/meta-pytorch/captum at the tag of the installed version, then

    make test-captum CAPTUM_TESTS=path/to/captum/tests/influence/_core

or, the same by hand and from this repository's root,

    python -m pytest -p tests.captum_contract path/to/captum/tests/influence/_core/test_tracin_*.py

It is a pytest plugin because the test modules bind the name when they are imported: it has to be another class's by
then. What these tests do with TracInCPFast, Naive- or ArnoldiInfluenceFunction stays Captum's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import captum.influence
import pytest
from captum.influence._core import tracincp
from torch import nn
from torch.utils.data import DataLoader, Dataset

from captum_sdi import Exact, SDIInfluence, load_checkpoint


class SDIInfluenceAsTracInCP(SDIInfluence):
    """`SDIInfluence` with TracInCP's arguments and defaults."""

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any] | DataLoader[Any],
        checkpoints: Any,
        checkpoints_load_func: Callable[[nn.Module, Any], float] = load_checkpoint,
        layers: Sequence[str] | None = None,
        loss_fn: Callable[..., Any] | None = None,
        batch_size: int | None = 1,
        test_loss_fn: Callable[..., Any] | None = None,
        sample_wise_grads_per_batch: bool = False,
    ) -> None:
        arguments = (checkpoints_load_func, layers, loss_fn, batch_size, test_loss_fn, sample_wise_grads_per_batch)
        super().__init__(model, train_dataset, checkpoints, *arguments, sketch=Exact())


def pytest_configure(config: pytest.Config) -> None:
    # Not at import: pytest imports this file for its docstrings in every ordinary run, too.
    tracincp.TracInCP = captum.influence.TracInCP = SDIInfluenceAsTracInCP
    # Their networks have no loop and their checkpoints no learning rate.
    for message in ("Nothing repeats in", ".* holds no learning rate"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


def pytest_report_header() -> str:
    return "captum_contract: TracInCP is SDIInfluence(layers=None, sketch=Exact())"
