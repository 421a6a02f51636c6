"""Pictures of step-decomposed influence, sized for one column of a paper.

A positive influence marks a proponent: a gradient step on the training example, with the learning rate that the score
contains, lowers the test example's loss by about that much. Axes therefore say "drop in test loss", unless gradients
were normalized; maps and step matrices, which do not say, are labelled "influence" alone. Steps are numbered
from 1 in pictures (from 0 in tensors). Bands and error bars are two standard errors of the sketch; there are none with
`Exact` or plain tensors. Steps beyond an example's ``n_steps`` are not drawn.

Every function returns the `matplotlib.axes.Axes` it drew on and takes what it needs of these arguments:

* ``result``: a `StepInfluence`, complete ``(q, n)`` or the k strongest ``(q, k)``; or plain trajectories, a tensor or
  array ``(q, n, t)``, or ``(n, t)`` for one test example.
* ``test`` / ``tests``: positions of test examples in ``result``, from 0.
* ``train``: training examples to draw in place of the strongest, by index in the training set.
* ``k``: how many proponents, and how many opponents, to draw.
* ``texts``: the training examples as text, in the order of the training set; None = those that the result knows, as
  one of `captum_sdi.texts` does. They are shown on one line, beside a few rows on two, and cut with an ellipsis where
  room ends. Scripts that the default font lacks are written in an installed one that has them; without any,
  "[8 CJK]" stands for eight characters.
* ``limit``: the absolute value at which colours saturate, to compare pictures; None = the largest value
  drawn, or where a few outliers would hide all others the largest of those; outliers are marked.
* ``title``: shown literally and cut like ``texts``; None = a default, ``""`` = none.
* ``width``: of a new figure, in inches; None = one column, 3.4. Twice as wide shows thrice the text.
* ``ax``: the Axes to draw on; None makes a figure. A plain grid of subplots is given ``layout="constrained"``, which
  finds room for labels, and for legends below the picture. Where you have set the spacing, or placed the Axes
  yourself, it is left alone: legends then cover part of the picture, and long labels may reach into its neighbours.

What cannot be drawn truthfully (a wrong shape, NaN, an example that is not there) is a `ValueError`.
"""

from captum_sdi.plotting.agreement import plot_agreement
from captum_sdi.plotting.comparison import plot_comparison
from captum_sdi.plotting.groups import plot_groups
from captum_sdi.plotting.heatmap import plot_heatmap
from captum_sdi.plotting.map import plot_map
from captum_sdi.plotting.path import plot_path
from captum_sdi.plotting.predicted_losses import plot_predicted_losses
from captum_sdi.plotting.self_influence import plot_self_influence
from captum_sdi.plotting.step_matrix import plot_step_matrix
from captum_sdi.plotting.step_share import plot_step_share
from captum_sdi.plotting.tokens import plot_token_steps, plot_tokens
from captum_sdi.plotting.totals import plot_totals
from captum_sdi.plotting.trajectories import plot_trajectories
from captum_sdi.plotting.trajectory_panels import plot_trajectory_panels

__all__ = [
    "plot_agreement",
    "plot_comparison",
    "plot_groups",
    "plot_heatmap",
    "plot_map",
    "plot_path",
    "plot_predicted_losses",
    "plot_self_influence",
    "plot_step_matrix",
    "plot_step_share",
    "plot_token_steps",
    "plot_tokens",
    "plot_totals",
    "plot_trajectories",
    "plot_trajectory_panels",
]
