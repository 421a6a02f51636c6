"""Whether the examples of a batch are what they are alone, each of them, by sums in which they have other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating
from captum_sdi.data.batch import batch_size, select
from captum_sdi.data.padding import without_padding

CAUSES = (
    "Likely causes: padding that the model sees, for want of an attention mask or, padded on the left, of position "
    "ids; a random state drawn anew for each call or from a seed per call (fix one noise per position: NOISE[:, "
    ":S].expand(n, -1, -1)); a loss divided by a count over the batch; layers that mix examples, as BatchNorm does; a "
    "forward that takes examples one by one or in groups; a loop that is chaotic in float32 (try model.double()). "
)
WAY_OUT = "Mend it, or pass batch_size=1 (to a DataLoader, too; inputs as a list of rows)."


def example_weights(n: int) -> Tensor:
    """Return ones, and a weight of its own for each example: sums by both tell which gradient is whose.

    Returns:
        ``(2, n)``, float64.

    Example:
        >>> example_weights(3)
        tensor([[1.0000, 1.0000, 1.0000],
                [0.5000, 1.0000, 1.5000]], dtype=torch.float64)
    """
    own_weights = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    return torch.stack([torch.ones_like(own_weights), own_weights])


def check_apart(
    model: nn.Module,
    raw: Any,
    losses_of: Callable[[Any], Tensor],
    gradients_of: Callable[[Any], Mapping[str, Tensor]],
    captured: Mapping[str, Tensor],
    tolerance: float,
) -> None:
    """Refuse a batch whose examples have other gradients than each of them alone.

    Args:
        model: The model.
        raw: The batch.
        losses_of: From a batch to its losses ``(n,)``.
        gradients_of: From a batch of one to its gradients, flattened.
        captured: The gradients in the batch, summed by the second row of `example_weights`, ``(entries,)`` each.
        tolerance: The largest norm of all differences, relative to that of the examples alone.

    Raises:
        ValueError: If they differ by more.
    """
    n = batch_size(raw)
    examples = [without_padding(select(raw, [number])) for number in range(n)]
    apart = {name: torch.zeros_like(gradient) for name, gradient in captured.items()}
    for example, weight in zip(examples, example_weights(n)[1].tolist(), strict=True):
        for name, gradient in gradients_of(example).items():
            apart[name] += weight * gradient.to(apart[name])
    distance = sum(float((captured[name] - gradient).norm()) ** 2 for name, gradient in apart.items())
    length = sum(float(gradient.norm()) ** 2 for gradient in apart.values())
    if distance <= tolerance**2 * length:
        return
    with evaluating(model), torch.no_grad():
        together = losses_of(raw)
        alone = torch.cat([losses_of(example) for example in examples]).to(together)
    worst = int((together - alone).abs().argmax())
    raise ValueError(
        f"The {n} examples of the batch depend on their neighbours: their gradients differ by "
        f"{(distance / length) ** 0.5:.2g} of their length from those of each example alone. The loss of example "
        f"{worst} is {float(together[worst]):.6g} in the batch, {float(alone[worst]):.6g} alone. {CAUSES}{WAY_OUT}"
    )
