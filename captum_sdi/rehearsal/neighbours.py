"""Nothing depends on the neighbours unnoticed: an example's features in a batch are compared with those alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from captum_sdi.features import StepFeatures

LARGEST, LARGEST_COARSE = 1e-2, 0.25
"""Beyond which relative difference of features they are refused; in half precision, whose kernels round anew for every
batch size, only what no rounding does."""
USUAL_COARSE = 0.05
"""Beyond which the difference in half precision is more than its usual rounding."""


def rounding(features: StepFeatures) -> float:
    """Return what rounding alone may change, relative to an example's features."""
    is_double = all(row.dtype == torch.float64 for row in features.rows.values())
    return 1e-8 if is_double else 1e-4


def relative_difference(
    batch: StepFeatures,
    number: int,
    alone: StepFeatures,
) -> float:
    """Return the norm of the difference over that of the example alone, all parameters' rows together."""
    distance, length = 0.0, 0.0
    for name, row in batch.rows.items():
        single_bins, batch_bins = alone.rows[name][0], row[number]
        n_bins = max(len(single_bins), len(batch_bins))  # an example may run fewer steps alone
        single_bins, batch_bins = (F.pad(bins, (0, 0, 0, n_bins - len(bins))) for bins in (single_bins, batch_bins))
        distance += float((batch_bins - single_bins).norm()) ** 2
        length += float(single_bins.norm()) ** 2
    if distance == 0:
        return 0.0
    return (distance / length) ** 0.5 if length else float("inf")
