"""From a batch to step features: loss, tape, rules and sketch put together.

The features of an example are, for each targeted parameter, the sketch of the part φ of its gradient that flowed
through each loop step. Their bins are ``[prelude, coda, step 0, step 1, ...]``: steps come last so that a deeper
batch only adds to the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.losses import LossFn


@dataclass(frozen=True)
class Side:
    """How the examples of one side, training or test, are run."""

    name: str
    loss_fn: LossFn
    forward_kwargs: ForwardKwargs | None
    argument: str = "loss_fn"
    """Which argument the loss came from, named in errors."""
