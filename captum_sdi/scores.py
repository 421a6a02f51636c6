"""Contractions of step features into influence, its standard errors, and `StepInfluence`, the result.

With g the step-summed features of a training example and φ_t those of a test example at loop step t, a trajectory
point is SDI_t = ⟨g, φ_t⟩. Sketched features carry their own error bar (Pham & Pagh 2013, section 4; measured in
``tests/test_errors.py``): with one row of features per parameter l,

    Var[⟨g, φ⟩] = Σ_l noise_l · (‖g_l‖² ‖φ_l‖² + ⟨g_l, φ_l⟩²)

where ``noise_l`` is 1/d for a sketched parameter and 0 for one that is kept exactly. A row in m parts counts as m
parameters of d/m numbers each: gradients that lie in one part have m times the variance of those spread over all. Steps
share their hashes, so the variance of a sum over steps is this formula at the summed φ; checkpoints do not, so their
variances add (with η²).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from captum_sdi.features import StepFeatures
from captum_sdi.tape import CODA, FIRST_STEP, PRELUDE

_VERSION = {"format": "captum_sdi.StepInfluence", "version": "1"}


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no one truth value, and too many numbers
class StepInfluence:
    """Influence split by the loop step of the test side at which it acts.

    ``influence_scores = trajectories.sum(-1) + prelude + coda``, up to rounding. Positive values are proponents: a
    gradient step on the training example lowers the loss of the test example. `SDIInfluence.step_self_influence`
    returns the same fields with one leading axis ``(n,)`` in place of ``(q, n)``.

    Example:
        >>> import torch
        >>> steps = torch.tensor([[[0.5, 0.25]]])  # one test example, one training example, two loop steps
        >>> zero = torch.zeros(1, 1)
        >>> result = StepInfluence(
        ...     indices=None, influence_scores=steps.sum(-1), trajectories=steps, prelude=zero, coda=zero,
        ...     n_steps=torch.tensor([2]), score_errors=zero, trajectory_errors=torch.zeros_like(steps))
        >>> result.influence_scores.item()
        0.75
    """

    indices: Tensor | None
    """``(q, k)`` the training examples, best first; None when all are given in order."""
    influence_scores: Tensor
    """``(q, n)`` or ``(q, k)`` the totals: TracIn."""
    trajectories: Tensor
    """``(q, n, t)`` or ``(q, k, t)`` one number per loop step; zero after a test example's last step."""
    prelude: Tensor
    """``(q, n)`` or ``(q, k)`` through uses of the parameters before the first loop step."""
    coda: Tensor
    """``(q, n)`` or ``(q, k)`` through uses of the parameters after the last loop step."""
    n_steps: Tensor
    """``(q,)`` how many loop steps each test example's batch ran."""
    score_errors: Tensor
    """``(q, n)`` or ``(q, k)`` the sketch's standard error of each total; zero with `Exact`.

    Estimated from the sketched norms: for one token per example and a small ``dim``, two of them cover less than 95%
    (93% at dim 128, 91% at 32, where measured).
    """
    trajectory_errors: Tensor
    """``(q, n, t)`` or ``(q, k, t)`` the sketch's standard error of each trajectory point."""

    def to(self, *args: object, **kwargs: object) -> StepInfluence:
        """The same result on another device, or with its floating point fields in another dtype.

        Args:
            *args: As `torch.Tensor.to`: a device, a dtype, or both.
            **kwargs: As `torch.Tensor.to`.

        Returns:
            A new result; index fields keep their integer dtype.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)  # type: ignore[call-overload]
            return moved if tensor.is_floating_point() else moved.to(tensor.dtype)

        fields: dict[str, Any] = {name: value if value is None else move(value) for name, value in self._fields()}
        return StepInfluence(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every field to one safetensors file, on the CPU and without pickle.

        Args:
            path: The file to write; an existing one is replaced.

        Raises:
            FileNotFoundError: Its folder does not exist.
        """
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} to save {Path(path).name} in: make it first.")
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._fields() if value is not None}
        save_file({name: value.clone() for name, value in tensors.items()}, os.fspath(path), metadata=_VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepInfluence:
        """Reads what `save` wrote.

        Args:
            path: A file written by `save`.

        Returns:
            The result, on the CPU.

        Raises:
            ValueError: The file holds something else, or is of a newer version.
        """
        name = os.fspath(path)
        try:
            with safe_open(name, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        except SafetensorError as error:
            raise ValueError(
                f"{name} is not a saved StepInfluence: {error}. Pass a file written by StepInfluence.save."
            ) from error
        if metadata.get("format") == _VERSION["format"] and int(metadata["version"]) > int(_VERSION["version"]):
            raise ValueError(
                f"{name} was saved by a newer captum_sdi, in version {metadata['version']} of the format; this one "
                f"reads {_VERSION['version']}. Update captum_sdi."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - {"indices"} - set(tensors)), sorted(set(tensors) - names)
        if missing or unknown or metadata.get("format") != _VERSION["format"]:
            raise ValueError(
                f"{name} is not a saved StepInfluence: missing fields {missing}, unknown fields {unknown}, format "
                f"{metadata.get('format')!r}. Pass a file written by StepInfluence.save."
            )
        fields: dict[str, Any] = {"indices": None, **tensors}
        return cls(**fields)

    def __repr__(self) -> str:
        shapes = (f"{name}={value if value is None else tuple(value.shape)}" for name, value in self._fields())
        return f"StepInfluence({', '.join(shapes)})"

    def _fields(self) -> Iterator[tuple[str, Any]]:
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))


@dataclass(frozen=True)
class Scores:
    """Influence at one checkpoint, before its learning rate, split by the test side's bins.

    The first bin is the total; the others, where the test side was split, are those of `StepFeatures`.
    """

    values: Tensor
    """``(..., b)``."""
    variances: Tensor
    """``(..., b)`` the sketch's variance of each value."""


def with_total(features: StepFeatures) -> StepFeatures:
    """Puts the sum of all bins in front of them: a total and its variance come from the summed φ.

    Args:
        features: ``(q, b, width)`` per parameter.

    Returns:
        ``(q, 1 + b, width)`` per parameter; unchanged when there is one bin, which is the total already.
    """
    return features.map(lambda row: row if row.shape[1] == 1 else torch.cat([row.sum(1, keepdim=True), row], dim=1))


def pair_scores(test: StepFeatures, train: StepFeatures) -> Scores:
    """Influence of every training example on every test example.

    Args:
        test: ``(q, b, width)`` per parameter, from `with_total`.
        train: ``(n, 1, width)`` per parameter, summed over bins.

    Returns:
        Values and variances ``(q, n, b)``.
    """
    with _full_precision(test):
        return _contract("qb", "n", test, train)


def self_scores(features: StepFeatures) -> Scores:
    """Influence of every example on itself, split by the step at which it acts as a test example.

    Args:
        features: ``(n, b, width)`` per parameter.

    Returns:
        Values and variances ``(n, 1 + b)``, or ``(n, 1)`` when there is one bin.
    """
    with _full_precision(features):
        return _contract("nb", "n", with_total(features), features.summed())


def step_matrices(test: StepFeatures, train: StepFeatures) -> Tensor:
    """Influence of every training step on every test step: ``SDI_{s,t} = ⟨φ_s(z), φ_t(z')⟩``.

    Args:
        test: ``(q, 2 + t, width)`` per parameter.
        train: ``(n, 2 + s, width)`` per parameter.

    Returns:
        ``(q, n, s, t)`` over loop steps, prelude and coda left out.
    """
    with _full_precision(test):
        products = [
            torch.einsum("qtw,nsw->qnst", phi[:, FIRST_STEP:], train.rows[name][:, FIRST_STEP:])
            for name, phi in test.rows.items()
        ]
    return _sum_on(products[0].device, products)


class Running:
    """Sums over checkpoints of blocks of scores, one block per batch, which may differ in depth.

    Args:
        axis: The axis along which the blocks follow each other.
    """

    def __init__(self, axis: int = 1) -> None:
        self._axis = axis
        self._blocks: list[Tensor] = []

    def add(self, i: int, block: Tensor) -> None:
        """Adds to the i-th block.

        Args:
            i: Number of the batch.
            block: Its scores.
        """
        if i == len(self._blocks):
            self._blocks.append(block)
        else:
            self._blocks[i] = torch.stack(_equally_large([self._blocks[i], block])).sum(0)

    def result(self) -> Tensor:
        """All blocks together."""
        return (
            torch.cat(_equally_large(self._blocks, self._axis), dim=self._axis) if self._blocks else torch.empty(1, 0)
        )


def _equally_large(blocks: list[Tensor], but: int | None = None) -> list[Tensor]:
    """Zeros behind the shallower ones, along every axis but one."""
    sizes = [max(along) for along in zip(*(block.shape for block in blocks), strict=True)]

    def missing(block: Tensor) -> list[int]:  # from the last axis to the first, before and behind, as F.pad wants them
        axes = reversed(range(block.ndim))
        return [n for axis in axes for n in (0, 0 if axis == but else sizes[axis] - block.shape[axis])]

    return [F.pad(block, missing(block)) for block in blocks]


class TopK:
    """The k best training examples of each test example so far, each with what is known about the pair.

    Args:
        k: How many.
        proponents: The highest influences; False: the lowest.
    """

    def __init__(self, k: int, proponents: bool) -> None:
        self._k, self._proponents = k, proponents
        self._kept: list[Tensor] | None = None

    def add(self, positions: Tensor, ranked: Tensor, *payloads: Tensor) -> None:
        """Offers a batch of training examples.

        Args:
            positions: ``(n,)``, or ``(q, n)`` where they differ, their positions, higher than those offered before.
            ranked: ``(q, n)`` what they are ranked by.
            *payloads: ``(q, n, ...)`` what is kept with each pair.
        """
        new = [positions.to(ranked.device).expand(ranked.shape), ranked, *payloads]
        if self._kept is not None:
            new = self._contenders(new)
            new = [torch.cat(pair, dim=1) for pair in zip(self._kept, new, strict=True)]
        order, _ = top_k(new[1], self._k, self._proponents)
        self._kept = [_picked(tensor, order) for tensor in new]

    def _contenders(self, new: list[Tensor]) -> list[Tensor]:
        """Without the examples that beat nobody: nearly all of them, after a while, and sorting is slow."""
        assert self._kept is not None
        best, ranked = self._kept[1], new[1]
        if best.shape[1] < self._k:
            return new
        better = ranked > best[:, -1:] if self._proponents else ranked < best[:, -1:]
        columns = better.any(0).nonzero().flatten()
        return [tensor.index_select(1, columns) for tensor in new]

    def result(self) -> list[Tensor]:
        """``indices (q, k)``, what they were ranked by ``(q, k)``, and the payloads ``(q, k, ...)``."""
        assert self._kept is not None
        return self._kept


def top_k(scores: Tensor, k: int, proponents: bool) -> tuple[Tensor, Tensor]:
    """The k best columns of each row; of equal ones the first.

    Args:
        scores: ``(q, n)``.
        k: How many; clipped to n.
        proponents: The highest; False: the lowest.

    Returns:
        Indices and scores, ``(q, k)`` each, best first.

    Example:
        >>> top_k(torch.tensor([[1.0, 3.0, 3.0]]), 2, proponents=True)[0]
        tensor([[1, 2]])
    """
    values, indices = torch.sort(scores, dim=1, descending=proponents, stable=True)
    return indices[:, :k], values[:, :k]


def pick_winners(indices: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Of a batch's scores those that belong to winners.

    Args:
        indices: ``(q, k)`` the winners' positions.
        positions: ``(n,)`` the batch's.
        values: ``(q, n, b)``.

    Returns:
        ``(q, k, b)``, zero where the winner is not in this batch.
    """
    hits = indices.unsqueeze(-1) == positions.to(indices.device)  # (q, k, n)
    picked = _picked(values, hits.int().argmax(-1))
    return picked * hits.any(-1).unsqueeze(-1)


def step_influence(indices: Tensor | None, values: Tensor, variances: Tensor, n_steps: Tensor) -> StepInfluence:
    """Takes summed scores apart.

    Args:
        indices: ``(q, k)`` or None.
        values: ``(..., 3 + t)``: total, prelude, coda, steps.
        variances: As ``values``.
        n_steps: ``(q,)``.

    Returns:
        The result.
    """
    first = 1 + FIRST_STEP
    errors = variances.clamp(min=0).sqrt()
    return StepInfluence(
        indices=indices,
        influence_scores=values[..., 0],
        trajectories=values[..., first:],
        prelude=values[..., 1 + PRELUDE],
        coda=values[..., 1 + CODA],
        n_steps=n_steps.to(values.device),
        score_errors=errors[..., 0],
        trajectory_errors=errors[..., first:],
    )


def _picked(tensor: Tensor, order: Tensor) -> Tensor:
    """``(q, n, ...)`` at ``(q, k)``."""
    index = order.reshape(*order.shape, *(1,) * (tensor.ndim - 2)).expand(*order.shape, *tensor.shape[2:])
    return tensor.gather(1, index)


def _contract(test_axes: str, train_axes: str, test: StepFeatures, train: StepFeatures) -> Scores:
    """The module's formula; ``l`` runs over the parts of parameters whose rows can be stacked."""
    out = "nb" if test_axes == "nb" else "qnb"
    values, variances = [], []
    for names in _alike(test):
        noise = test.noise[names[0]]
        phi, g = (torch.stack([side.rows[name] for name in names], dim=-2) for side in (test, train))
        phi, g = (row.unflatten(-1, (noise.parts, -1)).flatten(-3, -2) for row in (phi, g.squeeze(1)))
        inner = torch.einsum(f"{test_axes}lw,{train_axes}lw->l{out}", phi, g)
        values.append(inner.sum(0))
        if noise.variance == 0:
            variances.append(torch.zeros_like(values[-1]))
            continue
        norms = torch.einsum(f"{test_axes}l,{train_axes}l->{out}", phi.square().sum(-1), g.square().sum(-1))
        variances.append(noise.variance * (norms + inner.square().sum(0)))
    device = values[0].device
    return Scores(_sum_on(device, values), _sum_on(device, variances))


def _full_precision(features: StepFeatures) -> torch.autocast:
    """Inside the user's autocast, too: it would contract features in half precision."""
    return torch.autocast(next(iter(features.rows.values())).device.type, enabled=False)


def _alike(features: StepFeatures) -> list[list[str]]:
    """Parameters with equally wide and equally noisy rows on one device, to be contracted together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, row in features.rows.items():
        groups.setdefault((features.noise[name], row.shape[-1], row.dtype, row.device), []).append(name)
    return list(groups.values())


def _sum_on(device: torch.device, tensors: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape that may lie on different devices, on one of them."""
    return torch.stack([tensor.to(device) for tensor in tensors]).sum(0)
