"""Influence that is true for AdamW: exact derivatives through a recorded training run, split by loop step.

`TrainingRun` holds what fixed the weights, `record_training` writes one while a Trainer trains, `UnrolledInfluence`
answers, and its ``check()`` says when to believe it.
"""

from captum_sdi.unrolled.gauge import Gauge
from captum_sdi.unrolled.influence import UnrolledInfluence
from captum_sdi.unrolled.optimizers import SGD, AdamW
from captum_sdi.unrolled.recording import record_training
from captum_sdi.unrolled.run import TrainingRun

__all__ = ["SGD", "AdamW", "Gauge", "TrainingRun", "UnrolledInfluence", "record_training"]
