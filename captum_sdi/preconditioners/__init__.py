"""Preconditioners: linear maps P in ⟨g, P φ⟩, fitted at a checkpoint and applied to the test side alone.

Influence that is linear in the test gradient splits exactly by loop step for any linear P, so that trajectories,
matrices, top k and a train side read from an index work unchanged. P is the identity in TracIn.
"""

from captum_sdi.preconditioners.base import Fitted, Preconditioner, apply_to_rows, preconditioned_blocks
from captum_sdi.preconditioners.identity import Identity

__all__ = ["Fitted", "Identity", "Preconditioner", "apply_to_rows", "preconditioned_blocks"]
