"""Whether all of the targets' gradient is captured: it is compared with an ordinary one."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating, requiring_grad
from captum_sdi.capture.apart import check_apart, example_weights
from captum_sdi.capture.settling import seen_forward, settled, uses_in_sight
from captum_sdi.capture.tape import Tape
from captum_sdi.data.batch import BatchReader, ForwardKwargs, batch_size
from captum_sdi.data.calling import run_model
from captum_sdi.data.losses import LossFn, check_gradient, default_loss, example_losses
from captum_sdi.features import Gradient, LoopSpec
from captum_sdi.inputs import first_batch
from captum_sdi.loop.finding import find_loop
from captum_sdi.loop.parameters import as_loop, target_parameters
from captum_sdi.loop.saved import check_saved_loop
from captum_sdi.model_lock import exclusive
from captum_sdi.sketch.exact import Exact


@dataclass(frozen=True)
class Coverage:
    """Captured gradients against ordinary ones, a row per targeted parameter; a table in print."""

    parameters: tuple[str, ...]
    """Names."""
    captured: tuple[float, ...]
    """Norms of the captured gradients, summed over steps and examples."""
    expected: tuple[float, ...]
    """Norms of ``.grad``."""
    differences: tuple[float, ...]
    """Norms of their differences, relative to the expected norm or a hundredth of the largest, whichever is more."""

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        header = "parameter"
        width = max(map(len, (header, *self.parameters)))
        lines = [f"{header:<{width}}    captured    expected  difference"]
        columns = zip(
            self.parameters,
            self.captured,
            self.expected,
            self.differences,
            strict=True,
        )
        for name, captured, expected, difference in columns:
            numbers = f"{captured:>10.4g}  {expected:>10.4g}  {difference:>10.1e}"
            lines.append(f"{name:<{width}}  {numbers}")
        return "\n".join(lines)


def coverage_check(
    model: nn.Module,
    batch: Any,
    *,
    loop: str | Sequence[str] | LoopSpec | None = None,
    layers: str | Sequence[str] | None = "loop",
    loss_fn: LossFn | None = None,
    forward_kwargs: ForwardKwargs | None = None,
) -> Coverage:
    """Check on one batch that no targeted parameter's gradient is missed, counted twice or another example's.

    Run it on a model this library has not seen: it notices weights that are used without calling their layer, and
    examples that are others beside their neighbours than alone. `captum_sdi.SDIInfluence` compares two examples of a
    batch with the same ones alone; here it is all of them, so that scores of such batches are those of batch_size=1.

    Args:
        model: The model.
        batch: A batch; see `captum_sdi.data.batch`. Of rows or a Dataset the first 8 count, of a DataLoader its first
            batch.
        loop: As for `captum_sdi.SDIInfluence`.
        layers: As for `captum_sdi.SDIInfluence`.
        loss_fn: As for `captum_sdi.SDIInfluence`.
        forward_kwargs: As for `captum_sdi.SDIInfluence`.

    Returns:
        The table.

    Raises:
        ValueError: If captured and ordinary gradients differ by more than 1e-3 (5e-2 below float32) in some parameter,
            those of examples in the batch and alone by more than 1e-2 (0.25 below float32) in all of them together, or
            the loss has none or is not finite.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> max(coverage_check(model, {"input_ids": ids, "labels": ids}).differences) < 1e-4
        True
    """
    check_saved_loop(model)
    batch = first_batch(model, batch, 8)
    spec = as_loop(loop) or find_loop(model, batch, forward_kwargs=forward_kwargs)
    names = target_parameters(model, layers, spec)
    targets = {name: model.get_parameter(name) for name in names}
    read = BatchReader(model)
    loss_fn = loss_fn or default_loss(model)

    def losses_of(raw: Any) -> Tensor:
        parsed = read(raw, forward_kwargs)  # anew: some models write to what they are given
        output = run_model(model, parsed)
        return example_losses(loss_fn, output, parsed.labels, parsed.size)

    def gradients_of(raw: Any) -> dict[str, Tensor]:
        return ordinary_gradients(model, targets, lambda: losses_of(raw).sum())

    weights = example_weights(batch_size(batch))
    tape = Tape(model, targets, spec)
    with exclusive(model):
        captured = captured_gradients(tape, lambda: losses_of(batch), weights)
        expected = gradients_of(batch)
    table = compare_gradients({name: sums[0] for name, sums in captured.items()}, expected)
    dtypes = {parameter.dtype for parameter in targets.values()}
    is_precise = dtypes <= {torch.float32, torch.float64}
    check_differences(table, tolerance=1e-3 if is_precise else 5e-2)
    own_sums = {name: sums[1] for name, sums in captured.items()}
    with exclusive(model):
        check_apart(model, batch, losses_of, gradients_of, own_sums, tolerance=1e-2 if is_precise else 0.25)
    return table


def check_differences(table: Coverage, tolerance: float) -> None:
    """Check that captured and ordinary gradients are the same.

    Raises:
        ValueError: If they differ by more than the tolerance in some parameter.
    """
    if not all(difference < tolerance for difference in table.differences):  # NaN is not
        raise ValueError(
            "What was captured differs from the gradient of an ordinary backward pass: a parameter is used outside "
            f"its layer's call, or the model is not deterministic.\n{table}\nLeave that layer out with layers=[...]."
        )


def captured_gradients(
    tape: Tape,
    losses: Callable[[], Tensor],
    weights: Tensor,
) -> dict[str, Tensor]:
    """Return weighted sums over examples, and over all uses, of what a tape captures.

    Args:
        tape: Not yet installed.
        losses: Computes those of a batch, ``(n,)``.
        weights: ``(w, n)`` of its examples in each sum.

    Returns:
        ``(w, entries)`` for each target.
    """
    projections = {}
    sums: dict[str, Tensor] = {}
    for name, parameter in tape.targets.items():
        projection = Exact().projection(name, parameter)
        projections[name] = projection

    def consume(
        name: str,
        examples: slice,
        _bin: int,
        gradient: Gradient,
    ) -> None:
        rows = projections[name](gradient)
        sums[name] += weights[:, examples].to(rows) @ rows

    def forward() -> Tensor:
        return seen_forward(tape, lambda: (None, losses()), weights.shape[1])[1]

    def attempted() -> dict[str, Tensor]:
        for name, projection in projections.items():
            shape = len(weights), projection.width
            sums[name] = torch.zeros(shape, dtype=projection.dtype, device=projection.device)
        with uses_in_sight(tape, checked=True) as check_uses:
            loss = forward()
            check_uses(loss)
            tape.backward(loss, consume)
        return sums

    with tape:
        return settled(attempted)


def ordinary_gradients(
    model: nn.Module,
    targets: Mapping[str, nn.Parameter],
    summed_loss: Callable[[], Tensor],
) -> dict[str, Tensor]:
    """Return the flattened gradients of an ordinary backward pass, zeros for unused targets.

    Raises:
        ValueError: If the loss has no gradient, or is not finite.
    """
    with evaluating(model), requiring_grad(targets), torch.enable_grad():
        loss = summed_loss()
        check_gradient(loss, "loss_fn")
        if not loss.isfinite():
            raise ValueError(f"The loss of the batch is {loss.item()}: look at its examples and the model's weights.")
        parameters = list(targets.values())
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = {}
    for name, gradient in zip(targets, gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(targets[name])
        if gradient.is_sparse:  # of nn.Embedding(sparse=True)
            gradient = gradient.to_dense()
        expected[name] = gradient.flatten()
    return expected


def compare_gradients(captured: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Coverage:
    """Return the norms of captured and expected gradients and of their differences."""
    captured_norms = []
    expected_norms = []
    distances = []
    for name, gradient in captured.items():
        truth = expected[name].to(gradient)
        captured_norms.append(float(gradient.norm()))
        expected_norms.append(float(truth.norm()))
        distances.append(float((gradient - truth).norm()))
    # Some gradients vanish but for rounding: adding to every key changes no attention.
    tiny = torch.finfo(torch.float32).tiny
    floor = max(1e-2 * max(expected_norms), tiny)
    differences = []
    for distance, norm in zip(distances, expected_norms, strict=True):
        differences.append(distance / max(norm, floor))
    return Coverage(tuple(captured), tuple(captured_norms), tuple(expected_norms), tuple(differences))
