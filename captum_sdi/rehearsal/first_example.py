"""The first example of each side is run alone, once, and every check of the list looks at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.batch import select, split_batch
from captum_sdi.data.losses import TokenCrossEntropy, first_targeted_example, target_labels, token_logits
from captum_sdi.data.side import Side, identity
from captum_sdi.features import LoopSpec
from captum_sdi.loop.table import FoundLoop
from captum_sdi.model_facts import vocabulary_size
from captum_sdi.precision import is_coarse
from captum_sdi.rehearsal.ids import check_ids
from captum_sdi.rehearsal.keywords import check_keywords_are_named
from captum_sdi.rehearsal.labels import check_labels_are_unshifted, check_labels_on_padding
from captum_sdi.rehearsal.lengths import check_length, position_limit
from captum_sdi.rehearsal.neighbours import Neighbours, RunBatch
from captum_sdi.words import warn_user


@dataclass(frozen=True)
class FirstExample:
    """The first example of a side in which something is predicted."""

    capture: Capture
    loop: LoopSpec
    batch: Any
    """The example alone."""
    side: Side
    position: int
    """Of the example in its data set."""
    losses: Tensor
    """``(1,)`` from a pass under the hooks."""
    is_coarse: bool
    """Whether the model computes in half precision."""
    is_asked_first: bool
    """Whether loop steps of this side are asked for, and those of no other side were before."""


def check_loss_is_finite(first: FirstExample) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        ValueError: If it is.
    """
    first.capture.check_finite(first.losses.isfinite(), "loss", first.side, [first.position])


def check_loss_has_a_gradient(first: FirstExample) -> None:
    """Refuse a loss that no gradient leads back from; one of no targeted parameter alone is allowed.

    Raises:
        ValueError: If the loss depends on no parameter.
    """
    if not first.losses.requires_grad:
        first.capture.check_gradient(first.batch, first.side)


def check_parameters_and_determinism(first: FirstExample) -> None:
    """Refuse parameters that are used beside their layer's call, and losses that differ from pass to pass.

    Raises:
        ValueError: If either is so. One further pass tells both.
    """
    second_loss = first.capture.check_uses(first.batch, first.side)
    # Sums in another order from call to call, as on some GPU kernels, are no randomness.
    tolerance = 1e-3 if first.is_coarse else 1e-5
    if not torch.allclose(first.losses, second_loss, rtol=tolerance, equal_nan=True):
        raise ValueError(
            f"The model is not deterministic: the first {first.side.name} example has loss {first.losses.item():.6g}, "
            f"then {second_loss.item():.6g}. Fix its randomness, e.g. with a seeded state in forward_kwargs=."
        )


def check_default_loss(first: FirstExample) -> None:
    """Compare the default loss with the model's own, where it has one.

    Raises:
        ValueError: If they differ.
    """
    if not isinstance(first.side.loss_fn, TokenCrossEntropy):
        return
    answer = first.capture.own_loss(first.batch, first.side)
    if answer is None:
        return
    own_loss, output = answer
    default = first.losses.detach()[0]
    if agrees(own_loss, default, first.is_coarse):
        return
    _, _, labels = split_batch(first.batch)
    unshifted = TokenCrossEntropy(shift=False)(output, labels.to(own_loss.device))[0]
    remedy = "Pass loss_fn= with the loss you trained with: (output, labels) to one value per example."
    if agrees(own_loss, unshifted, first.is_coarse):
        remedy = "Pass loss_fn=captum_sdi.data.losses.TokenCrossEntropy(shift=False), which agrees with it."
    raise ValueError(
        f"The default loss, {first.side.loss_fn}, is {default.item():.6g} for the first {first.side.name} example, the "
        f"model's own loss {own_loss.item():.6g}. {remedy}"
    )


def agrees(own: Tensor, loss: Tensor, coarse: bool) -> bool:
    """Say whether a loss is the model's own, up to rounding."""
    return torch.allclose(own.to(loss), loss, rtol=3e-2 if coarse else 1e-3)


def needs_labels(capture: Capture, example: Any, side: Side) -> bool:
    """Say whether the default loss is the model's own only where the model is handed the labels, as Ouro's is."""
    if identity(side) in capture.labelled or not isinstance(side.loss_fn, TokenCrossEntropy):
        return False
    answer = capture.own_loss(example, side)
    if answer is None:
        return False
    own_loss, output = answer
    _, _, labels = split_batch(example)
    return agrees(own_loss, side.loss_fn(output, labels.to(own_loss.device))[0], is_coarse(capture.model))


def check_loop_repeats(first: FirstExample) -> None:
    """Warn where the loop that the user named runs once; one that was found has warned already."""
    if first.is_asked_first and first.capture.n_steps == 1 and not isinstance(first.loop, FoundLoop):
        warn_user(
            f"Nothing repeats: {first.loop} runs once in the first {first.side.name} example. It is taken as one loop "
            "step, and influence as TracIn. Name the repeated module in loop=, or pass None to look for it."
        )


CHECKS: tuple[Callable[[FirstExample], None], ...] = (
    check_loss_is_finite,
    check_loss_has_a_gradient,
    check_parameters_and_determinism,
    check_default_loss,
    check_loop_repeats,
)
"""In this order: a later one may rely on the earlier ones."""


class Rehearsal:
    """Looks at every batch's ids, once for each side at its first example, and at two in the batch and alone.

    Args:
        model: The model.
        loop: What repeats.
    """

    def __init__(self, model: nn.Module, loop: LoopSpec) -> None:
        self._model, self._loop = model, loop
        self._n_labels: dict[tuple[int, int], int] = {}
        self._rehearsed: set[tuple[int, int]] = set()
        self._is_asked_first = True
        self._warned_of_padding: set[tuple[int, int]] = set()
        self._limit = position_limit(model)
        self._neighbours = Neighbours(model)

    def before_batch(
        self,
        capture: Capture,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        steps_count: bool = True,
    ) -> None:
        """Refuse or warn of what cannot work with a batch.

        Args:
            capture: Runs the model.
            raw: The batch.
            side: How it is run.
            positions: Of its examples.
            steps_count: Whether a loop that runs once on this side is worth a warning.

        Raises:
            ValueError: If a check says so.
        """
        self._check_batch(raw, side, positions)
        if identity(side) in self._rehearsed:
            return
        number = first_targeted_example(raw, side.loss_fn)
        if number is None:
            return  # nothing can be seen in losses of zero: a later batch's turn
        example = select(raw, [number])
        check_keywords_are_named(self._model, example, side)
        check_labels_are_unshifted(raw, side)
        checked_side = self._with_label_check(raw, side, positions)
        is_asked_first = steps_count and self._is_asked_first
        try:
            self._rehearse(capture, example, side, checked_side, positions[number], is_asked_first=is_asked_first)
        except ValueError:
            if not needs_labels(capture, example, side):
                raise
            capture.labelled.update({identity(side), identity(checked_side)})
            self._rehearse(capture, example, side, checked_side, positions[number], is_asked_first=is_asked_first)
            capture.labelled.discard(identity(checked_side))
        self._rehearsed.add(identity(side))
        self._is_asked_first = self._is_asked_first and not steps_count

    def _rehearse(
        self,
        capture: Capture,
        example: Any,
        side: Side,
        checked_side: Side,
        position: int,
        *,
        is_asked_first: bool,
    ) -> None:
        """Run an example alone, and let every check look at it."""
        _, losses = capture.forward(example, checked_side)
        first = FirstExample(
            capture, self._loop, example, side, position, losses, is_coarse(self._model), is_asked_first
        )
        for check in CHECKS:
            check(first)

    def after_batch(self, ran: RunBatch) -> None:
        """Refuse or warn of features that depend on the batch.

        Raises:
            ValueError: If they do.
        """
        self._neighbours.check(identity(ran.side), ran)

    def _check_batch(self, raw: Any, side: Side, positions: Sequence[int]) -> None:
        """Check length, padding, token ids against the embedding, and labels, once logits are known, against these."""
        check_length(raw, self._limit, side.name, positions)
        if identity(side) not in self._warned_of_padding and check_labels_on_padding(raw, side, positions):
            self._warned_of_padding.add(identity(side))
        n_ids, n_labels = vocabulary_size(self._model), self._n_labels.get(identity(side))
        if n_ids is not None and isinstance(raw, Mapping):
            check_ids("input_ids", raw.get("input_ids"), n_ids, side.name, positions)
        if n_labels is not None:
            check_ids(
                "labels",
                target_labels(raw, side.loss_fn),
                n_labels,
                side.name,
                positions,
            )

    def _with_label_check(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
    ) -> Side:
        """Let the default loss count the logits first, and refuse a label that has none."""
        if not isinstance(side.loss_fn, TokenCrossEntropy):
            return side

        def checked_loss(output: Any, labels: Any) -> Tensor:
            self._n_labels[identity(side)] = token_logits(output).shape[-1]
            self._check_batch(raw, side, positions)
            return side.loss_fn(output, labels)

        return replace(side, loss_fn=checked_loss)
