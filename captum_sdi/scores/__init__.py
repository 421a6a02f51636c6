"""Contractions of step features into influence, sums over checkpoints, and the results, step by step or as a map."""

from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.result import StepInfluence

__all__ = ["InfluenceMap", "StepInfluence"]
