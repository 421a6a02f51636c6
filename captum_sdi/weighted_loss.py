"""The losses of a batch's examples as a twice differentiable function of the parameters.

For weights w and shares a, the loss of a training update is ``L(θ, w) = Σ_i a_i w_i l_i(θ)``. Its gradient with
``create_graph=True`` can be differentiated again, in θ (products with the Hessian) and in w (what one example's weight
does), for many vectors at once with ``is_grads_batched=True``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_sdi.borrow import evaluating
from captum_sdi.data.batch import BatchReader, batch_size
from captum_sdi.data.calling import run_model, with_labels
from captum_sdi.data.losses import IGNORED, example_losses, target_labels, without_own_loss
from captum_sdi.data.side import Side
from captum_sdi.parameter_vector import ParameterVector

ASYMMETRY = 1e-2
"""How far a Hessian may be from symmetric, relative to its products with random directions, by rounding in float32."""
Reduction = Literal["mean", "tokens", "sum"]
"""How a training loss is made of its examples' losses: their mean; the mean over all their targets; their sum."""


class BatchLoss:
    """The losses ``(n,)`` of a batch's examples at any parameters, which may be differentiated twice.

    Tied parameters stay tied, and attention runs in the one kernel that has a second derivative. The model's own
    parameters are never written to, and it runs in the mode that it is in: see `captum_sdi.borrow.evaluating`.

    Args:
        model: The model.
        side: The loss and the forward keywords.

    Raises:
        ValueError: If no parameter is trainable, or they are not all of float32 or all of float64.

    Example:
        >>> from torch.nn.functional import mse_loss
        >>> model = nn.Linear(2, 1)
        >>> loss = BatchLoss(model, Side("training", lambda output, labels: mse_loss(output, labels), None))
        >>> vector = loss.layout.flat(dict(model.named_parameters())).requires_grad_()
        >>> losses = loss(vector, (torch.eye(2), torch.zeros(2, 1)))
        >>> gradient = torch.autograd.grad(losses.mean(), vector, create_graph=True)[0]
        >>> torch.autograd.grad(gradient, vector, torch.tensor([0.0, 0.0, 1.0]))[0]  # a column of the Hessian
        tensor([1., 1., 2.])
    """

    def __init__(self, model: nn.Module, side: Side) -> None:
        self.model, self.side = model, side
        self.layout = ParameterVector.of(model)
        self._read = BatchReader(model)

    def __call__(
        self,
        vector: Tensor,
        raw: Any,
        *,
        hands_labels: bool = False,
    ) -> Tensor:
        """Compute the losses of a batch's examples.

        Args:
            vector: ``(size,)`` the parameters, as `layout` lays them out.
            raw: A batch as a loader yields it.
            hands_labels: Hand the model the labels, for one whose logits are others with them.

        Returns:
            ``(n,)``.
        """
        with twice_differentiable(vector.device):
            batch = self._read(raw, self.side.forward_kwargs)
            if hands_labels:
                batch = with_labels(batch)
            output = run_model(self.model, batch, self.layout.named(vector))
            if hands_labels:
                _, output = without_own_loss(output)
            return example_losses(
                self.side.loss_fn,
                output,
                batch.labels,
                batch.size,
                self.side.argument,
            )

    @contextmanager
    def evaluated(self) -> Iterator[Tensor]:
        """Switch the model to evaluation mode without a key-value cache.

        Yields:
            Its present parameters as a vector ``(size,)``.
        """
        with torch.inference_mode(mode=False), evaluating(self.model):
            yield self.layout.flat(dict(self.model.named_parameters()))


@contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Run forward passes by what has a second derivative: no flash attention, no compiled graph, no autocast."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def check_second_derivative(gradient: Tensor, vector: Tensor) -> None:
    """Refuse second derivatives that are no Hessian's: a few operations of torch have wrong ones, and say nothing.

    A Hessian is symmetric: ⟨u, H v⟩ = ⟨v, H u⟩, here for two random directions.

    Args:
        gradient: ``(size,)`` of a loss, differentiable.
        vector: ``(size,)`` what it was taken in.

    Raises:
        ValueError: If they differ by more than rounding does.
    """
    if not gradient.requires_grad:  # of a loss that is linear
        return
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, len(vector), generator=generator).to(vector)
    settings: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    (first_product,) = torch.autograd.grad(gradient, vector, first, **settings)
    (second_product,) = torch.autograd.grad(gradient, vector, second, **settings)
    difference = float((second @ first_product - first @ second_product).abs())
    scale = float(first_product.norm() + second_product.norm())
    if difference > ASYMMETRY * scale:
        raise ValueError(
            f"torch's second derivative of the training loss is wrong: its Hessian is not symmetric, by "
            f"{difference / scale:.1g} of its size. Some operation of the model has a faulty double backward pass, as "
            "torch.nn.utils.parametrizations.weight_norm on a CPU: remove the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), or ask without second derivatives."
        )


def check_reduction(reduction: Any) -> None:
    """Refuse a reduction that is none.

    Raises:
        ValueError: If it is not one of them.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {list(get_args(Reduction))}, got {reduction!r}.")


def example_shares(raw: Any, side: Side, reduction: Reduction) -> Tensor:
    """Return a_i in ``L = Σ_i a_i l_i``: how much of each example's loss is in the loss of its batch.

    Args:
        raw: The batch.
        side: Its loss: one that predicts next tokens never predicts the first.
        reduction: "mean": 1/n each. "tokens": the mean over the targets of all examples, as in
            `transformers.Trainer`, where each l_i is a mean over its own. "sum": 1 each.

    Returns:
        ``(n,)``, float64.

    Raises:
        ValueError: If targets cannot be counted.

    Example:
        >>> from captum_sdi.data.losses import TokenCrossEntropy
        >>> labels = torch.tensor([[-100, 1, 2, 3], [-100, 1, -100, -100]])
        >>> side = Side("training", TokenCrossEntropy(), None)
        >>> example_shares({"input_ids": labels, "labels": labels}, side, "tokens")
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    check_reduction(reduction)
    if reduction == "tokens":
        n_targets = target_counts(raw, side)
        return n_targets / n_targets.sum().clamp(min=1)
    ones = torch.ones(batch_size(raw), dtype=torch.float64)
    return ones / len(ones) if reduction == "mean" else ones


def target_counts(raw: Any, side: Side) -> Tensor:
    """Return how many targets each example of a batch has, ``(n,)``, float64.

    Raises:
        ValueError: If they cannot be counted.
    """
    labels = target_labels(raw, side.loss_fn)
    if labels is None:
        raise ValueError("reduction='tokens' counts integer labels, and there are none: pass 'mean' or 'sum'.")
    is_target = labels.reshape(len(labels), -1) != IGNORED
    return is_target.sum(1).double()
