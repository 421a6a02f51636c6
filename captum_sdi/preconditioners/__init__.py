"""Preconditioners: linear maps P in ⟨g, P φ⟩, fitted at a checkpoint and applied to the test side alone.

Influence that is linear in the test gradient splits exactly by loop step for any linear P, so that trajectories,
matrices, top k and a train side read from an index work unchanged. P is the identity in TracIn.

| | P | unit of a score | checkpoints | needs |
|---|---|---|---|---|
| `Identity` | 1 | what a step of gradient descent on z takes off the loss of z' | summed with η | - |
| `Adam` | 1 / (√v + ε) | the same, for a step of Adam | summed with η | moments |
| `Fisher` | (F + λ)⁻¹ / n, a block for each parameter | rise of the loss of z' without z | mean | the rows |
| `Hessian` | (H + λ)⁻¹ / n, by Lanczos vectors | rise of the loss of z' without z | the last | the train set |
"""

from captum_sdi.preconditioners.adam import Adam
from captum_sdi.preconditioners.base import Fitted, Preconditioner, summed_checkpoints
from captum_sdi.preconditioners.fisher import Fisher
from captum_sdi.preconditioners.hessian import Hessian
from captum_sdi.preconditioners.identity import Identity
from captum_sdi.preconditioners.preconditioned import Preconditioned

__all__ = [
    "Adam",
    "Fisher",
    "Fitted",
    "Hessian",
    "Identity",
    "Preconditioned",
    "Preconditioner",
    "summed_checkpoints",
]
