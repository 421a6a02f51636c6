"""Checkpoints: finding, naming and loading them, and their learning rates.

A checkpoint is compared with the model, key by key and shape by shape, before the first weight is copied, so that
nothing is ever half-loaded. Weights are copied *into* the model's own tensors: Parameter objects stay the objects they
were. Pickles are read with ``weights_only=True``, so a checkpoint never runs code.

Imports go down this list: loading, adapters, whole, differences, rates, trainer, schedules, reading, finding, copies,
files, checkpoint.
"""

from captum_sdi.checkpoints.checkpoint import Checkpoint, checkpoint_names, listed_checkpoints
from captum_sdi.checkpoints.finding import find_checkpoints
from captum_sdi.checkpoints.loading import check_checkpoints, load_checkpoint

__all__ = [
    "Checkpoint",
    "check_checkpoints",
    "checkpoint_names",
    "find_checkpoints",
    "listed_checkpoints",
    "load_checkpoint",
]
