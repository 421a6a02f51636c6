"""Layer rules: from what a layer read and what flowed back to it, to its parameters' per-example gradients.

A rule is a pure function of (module, activation, backprop). With activation a (what the layer read) and backprop g (the
gradient at its output), one example's gradient is

    Linear       weight (o, i): Σ_p g_p a_pᵀ       bias: Σ_p g_p
    Conv1D       weight (i, o): Σ_p a_p g_pᵀ       bias: Σ_p g_p         (GPT-2's, transposed)
    Embedding    weight (v, o): Σ_p e_p g_pᵀ       e_p one-hot, never formed
    norms        weight: Σ_p g_p ⊙ x̂_p             bias: Σ_p g_p
    other leaf   the vector-Jacobian product of its forward, one example at a time

where p runs over all axes between the first (the example) and the last.

A rule of your own is found by the layer's type and goes before the generic ones, also for a layer with children or with
several parameters: you vouch for it. Write one where a layer is refused, or where its gradients cost too much.
It yields ``(the layer's own name of a parameter, examples, gradient)``: `Dense` with every entry, or `Outer` with the
two factors, which is never multiplied out by a sketch. Gradients of some examples may follow those of others; those of
one parameter and example add up. It may call the layer, whose hooks are silent meanwhile. `captum_sdi.coverage_check`
says whether it is right:

    >>> import torch
    >>> from torch import nn
    >>> from captum_sdi import coverage_check
    >>> class Stretch(nn.Module):
    ...     '''x · exp(w), a factor for each feature.'''
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.log_factor = nn.Parameter(torch.zeros(width))
    ...     def forward(self, x):
    ...         return x * self.log_factor.exp()
    >>> @rule(Stretch, parameters=["log_factor"], fresh_output=True, positionwise=True)
    ... def stretch(module, activation, backprop, wanted):
    ...     slope = activation * module.log_factor.exp()
    ...     yield "log_factor", slice(None), summed_over_positions(merge_positions(slope * backprop))
    >>> batch = torch.randn(2, 5, 3), torch.zeros(2, 5, 3)
    >>> table = coverage_check(nn.Sequential(Stretch(3)), batch, loop="0", loss_fn=nn.MSELoss())
    >>> max(table.differences) < 1e-4
    True
"""

from captum_sdi.capture.rules import conv1d, embedding, linear, norms  # noqa: F401  # each registers its rule
from captum_sdi.capture.rules.base import PerExample, Rule, lifted, merge_positions, summed_over_positions
from captum_sdi.capture.rules.registry import rule
from captum_sdi.features import Dense, Outer

__all__ = ["Dense", "Outer", "PerExample", "Rule", "lifted", "merge_positions", "rule", "summed_over_positions"]
