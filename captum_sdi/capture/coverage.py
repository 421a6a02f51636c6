"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import evaluating, requiring_grad
from captum_sdi.capture.tape import Tape
from captum_sdi.data.batch import BatchReader, ForwardKwargs, run_model
from captum_sdi.data.losses import LossFn, check_gradient, default_loss, example_losses
from captum_sdi.features import Gradient, LoopSpec
from captum_sdi.loop.finding import find_loop
from captum_sdi.loop.parameters import as_loop, target_parameters
from captum_sdi.sketch.exact import Exact


@dataclass(frozen=True)
class Coverage:
    """One row per targeted parameter: what was captured against an ordinary backward pass. Prints as a table."""

    parameters: tuple[str, ...]
    """Names."""
    captured: tuple[float, ...]
    """Norms of the captured gradients, summed over steps and examples."""
    expected: tuple[float, ...]
    """Norms of ``.grad``."""
    differences: tuple[float, ...]
    """Norms of their differences, relative to the expected norm or a hundredth of the largest, whichever is more."""

    def __str__(self) -> str:
        width = max(map(len, ("parameter", *self.parameters)))
        header = f"{'parameter':<{width}}  {'captured':>10}  {'expected':>10}  {'difference':>10}"
        rows = zip(self.parameters, self.captured, self.expected, self.differences, strict=True)
        return "\n".join([header, *(f"{n:<{width}}  {c:>10.4g}  {e:>10.4g}  {d:>10.1e}" for n, c, e, d in rows)])


def coverage_check(
    model: nn.Module,
    batch: Any,
    *,
    loop: str | Sequence[str] | LoopSpec | None = None,
    layers: str | Sequence[str] | None = "loop",
    loss_fn: LossFn | None = None,
    forward_kwargs: ForwardKwargs | None = None,
) -> Coverage:
    """Checks on one batch that nothing of any targeted parameter's gradient is missed or counted twice.

    Run it on a model this library has not seen: it notices weights that are used without calling their layer.

    Args:
        model: The model.
        batch: A batch; see `captum_sdi.data`.
        loop: As for `captum_sdi.SDIInfluence`.
        layers: As for `captum_sdi.SDIInfluence`.
        loss_fn: As for `captum_sdi.SDIInfluence`.
        forward_kwargs: As for `captum_sdi.SDIInfluence`.

    Returns:
        The table.

    Raises:
        ValueError: Captured and ordinary gradients differ by more than 1e-3 (5e-2 below float32) in some parameter, or
            the loss has none or is not finite.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> max(coverage_check(model, {"input_ids": ids, "labels": ids}).differences) < 1e-4
        True
    """
    spec = as_loop(loop) or find_loop(model, batch, forward_kwargs=forward_kwargs)
    names = target_parameters(model, layers, spec)
    parsed = BatchReader(model)(batch, forward_kwargs)
    loss_fn = loss_fn or default_loss(model)

    def loss() -> Tensor:
        return example_losses(loss_fn, run_model(model, parsed), parsed.labels, parsed.size).sum()

    targets = {name: p for name, p in model.named_parameters() if name in set(names)}
    captured = _captured(Tape(model, targets, spec), targets, loss, parsed.size)
    with evaluating(model), requiring_grad(targets), torch.enable_grad():
        check_gradient(total := loss(), "loss_fn")
        if not total.isfinite():
            raise ValueError(f"The loss of the batch is {total.item()}: look at its examples and the model's weights.")
        grads = torch.autograd.grad(total, list(targets.values()), allow_unused=True)
    expected = [torch.zeros_like(c) if g is None else g.to(c).flatten() for c, g in zip(captured, grads, strict=True)]
    table = _compared(names, captured, expected)
    tolerance = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p in targets.values()) else 5e-2
    if not all(difference < tolerance for difference in table.differences):  # NaN is not
        raise ValueError(
            "What was captured differs from the gradient of an ordinary backward pass: a parameter is used outside "
            f"its layer's call, or the model is not deterministic.\n{table}\nLeave that layer out with layers=[...]."
        )
    return table


def _captured(tape: Tape, targets: dict[str, nn.Parameter], loss: Any, size: int) -> list[Tensor]:
    projections = {name: Exact().projection(name, p) for name, p in targets.items()}
    sums = {name: torch.zeros(p.width, dtype=p.dtype, device=p.device) for name, p in projections.items()}

    def consume(name: str, _examples: slice, _bin: int, gradient: Gradient) -> None:
        sums[name] += projections[name](gradient).sum(0)

    with tape:
        tape.backward(tape.forward(loss, size), consume)
    return list(sums.values())


def _compared(names: Sequence[str], captured: Sequence[Tensor], expected: Sequence[Tensor]) -> Coverage:
    norms = [float(e.norm()) for e in expected]
    # Some gradients vanish but for rounding: adding to every key changes no attention.
    floor = max(1e-2 * max(norms), torch.finfo(torch.float32).tiny)
    differences = [
        float((c - e).norm()) / max(norm, floor) for c, e, norm in zip(captured, expected, norms, strict=True)
    ]
    return Coverage(tuple(names), tuple(float(c.norm()) for c in captured), tuple(norms), tuple(differences))
