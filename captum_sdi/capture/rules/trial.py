"""Does running a module's call again tell what its parameters did in the batch? Recomputation rests on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from captum_sdi.capture.rules.recompute import Call, replaced


@dataclass(frozen=True)
class Trial:
    """What a call that was run again says of its module."""

    agrees: bool
    """Whether it returned the same, and left what it was given alone."""
    read: frozenset[str] = frozenset()
    """Names of the targets that it used."""
    mixes: bool = False
    """Whether the first example's output depends on other examples' input."""


def tried(
    call: Call,
    tensors: Sequence[Tensor],
    by_example: Sequence[bool],
    outputs: Sequence[Tensor],
    aliases: tuple[Mapping[str, nn.Parameter], Mapping[str, nn.Parameter]],
    batch_size: int,
) -> Trial:
    """Run a call again and compare.

    Args:
        call: The call.
        tensors: What it was given.
        by_example: Which of these have an example axis.
        outputs: What it returned.
        aliases: Of the parameters: see `aliases_of`.
        batch_size: The number of examples.

    Returns:
        What that says.
    """
    inputs = []
    for tensor, is_by_example in zip(tensors, by_example, strict=True):
        inputs.append(tensor.detach().clone().requires_grad_(is_by_example and tensor.is_floating_point()))
    # Inside a checkpointed block, tensors that this trial saves must not be counted: its recomputation has no trial.
    with saved_tensors_hooks(lambda saved: saved, lambda saved: saved), replaced(call.module, aliases[0]):
        repeated = _rerun_unless_it_fails(call, inputs)
        if repeated is None or not are_alike(repeated, outputs):
            return Trial(agrees=False)
        varied = [tensor for tensor in inputs if tensor.requires_grad]
        read, mixes = _dependencies(repeated, aliases[1], varied, batch_size)
        return Trial(agrees=True, read=read, mixes=mixes)


def _rerun_unless_it_fails(call: Call, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return a call's outputs; None where it fails or writes to what it was given."""
    versions = [tensor._version for tensor in inputs]
    try:
        outputs = call.rerun(inputs)
    except torch.OutOfMemoryError:  # the batch is too large, not the module unknown
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None
    return outputs if versions == [tensor._version for tensor in inputs] else None


@torch.no_grad()
def are_alike(repeated: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Say whether two calls returned the same, up to rounding."""
    repeated_shapes = [tensor.shape for tensor in repeated]
    if repeated_shapes != [tensor.shape for tensor in outputs]:
        return False
    pairs = zip(repeated, outputs, strict=True)
    return all(_is_alike(*pair) for pair in pairs)


def _is_alike(repeated: Tensor, output: Tensor) -> bool:
    if output.numel() == 0:
        return True
    finite = output.isfinite()  # -inf in a mask is no number to subtract
    difference = (repeated - output)[finite].abs()
    if not difference.numel():
        return True
    largest = output[finite].abs().max()
    return not difference.max() > _tolerance(output) * largest


def _tolerance(output: Tensor) -> float:
    return 1e-3 if output.dtype in (torch.float32, torch.float64) else 3e-2


def _dependencies(
    outputs: Sequence[Tensor],
    aliases: Mapping[str, nn.Parameter],
    inputs: Sequence[Tensor],
    batch_size: int,
) -> tuple[frozenset[str], bool]:
    """Return the targets that the outputs depend on, and whether the first example's depend on others' inputs."""
    connected = [output for output in outputs if output.requires_grad]
    if not connected:
        return frozenset(), False
    ones = [torch.ones_like(output) for output in connected]
    gradients = torch.autograd.grad(
        connected,
        list(aliases.values()),
        ones,
        retain_graph=True,
        allow_unused=True,
    )
    pairs = zip(aliases, gradients, strict=True)
    read = frozenset(name for name, gradient in pairs if gradient is not None)
    firsts = [output[0] for output in connected if output.shape[:1] == (batch_size,)]
    if batch_size == 1 or not inputs or not firsts:
        return read, False
    weights = [_irregular(first) for first in firsts]
    slopes = torch.autograd.grad(firsts, list(inputs), weights, allow_unused=True)
    return read, any(slope is not None and bool(slope[1:].any()) for slope in slopes)


def _irregular(tensor: Tensor) -> Tensor:
    """Return numbers that no sum cancels by chance, in the shape of a tensor."""
    entries = torch.arange(tensor.numel(), dtype=torch.float32, device=tensor.device)
    numbers = (12.9898 * entries).sin()
    return numbers.view(tensor.shape).to(tensor.dtype)


@dataclass(frozen=True)
class Digest:
    """A few numbers of a call's outputs, kept in their place to see that a later call returns the same."""

    sums: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]

    @staticmethod
    def of(outputs: Sequence[Tensor]) -> Digest:
        """Return that of some outputs."""
        detached = [output.detach() for output in outputs]
        sums = tuple(output.sum() for output in detached)
        norms = tuple(output.norm() for output in detached)
        return Digest(sums, norms)

    def fits(self, outputs: Sequence[Tensor]) -> bool:
        """Say whether it is that of these outputs, up to rounding."""
        second_digest = Digest.of(outputs)
        for number, output in enumerate(outputs):
            norm = self.norms[number]
            rounding = _tolerance(output) * norm
            norm_change = (second_digest.norms[number] - norm).abs()
            sum_change = (second_digest.sums[number] - self.sums[number]).abs()
            if norm_change > rounding or sum_change > rounding:
                return False
        return True
