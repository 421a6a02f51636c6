"""Contractions of step features into influence, sums over checkpoints, and `StepInfluence`, the result."""

from captum_sdi.scores.result import StepInfluence

__all__ = ["StepInfluence"]
