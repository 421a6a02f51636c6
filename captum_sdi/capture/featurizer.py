"""From a batch to step features: loss, tape, rules and sketch put together.

The features of an example are, for each targeted parameter, the sketch of the part φ of its gradient that flowed
through each loop step. `Featurizer` holds the settings; `Featurizer.installed` gives a `Capture`, which computes them
at one checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import Tensor, nn

from captum_sdi.borrow import requiring_grad
from captum_sdi.capture.adoption import Adoption, UnsettledError
from captum_sdi.capture.settling import seen_forward, settled, uses_in_sight
from captum_sdi.capture.tape import Tape
from captum_sdi.capture.tokens import Unit
from captum_sdi.data.batch import Batch, BatchReader
from captum_sdi.data.calling import RefusedMaskError, run_model, with_labels
from captum_sdi.data.losses import check_gradient, example_losses, without_own_loss
from captum_sdi.data.side import Manner, Side
from captum_sdi.features import POOLED, Bins, Dense, Gradient, LoopSpec, Noise, StepFeatures, canonical_name
from captum_sdi.precision import in_float16
from captum_sdi.sketch.base import Projection, Sketch
from captum_sdi.sketch.exact import Exact

Transform = Callable[[str, Gradient], Gradient]
"""A linear map of one parameter's per-example gradients, such as a preconditioner: (parameter name, gradients)."""

_LOSS_SCALES = (2.0**12, 2.0**6, 1.0)
"""Loss scales tried in turn for float16 models; a power of two is exact; the next smaller one is used where a gradient
overflows."""


class Featurizer:
    """Computes step features of batches, one checkpoint at a time.

    Args:
        model: The model; only inside `installed` are there hooks on it.
        targets: Names of the targeted parameters.
        loop: What repeats.
        sketch: How gradients are represented.
        activation_checkpointing: Recompute the loop's activations in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str],
        loop: LoopSpec,
        sketch: Sketch,
        activation_checkpointing: bool = False,
    ) -> None:
        self._model = model
        self._names = targets
        self._loop = loop
        self._sketch = sketch
        self._activation_checkpointing = activation_checkpointing
        self._read = BatchReader(model)
        self._adoption = Adoption()
        self._labelled: set[Manner] = set()

    def with_sketch(self, sketch: Sketch) -> Featurizer:
        """Return a featurizer with another sketch, which knows what passes of this one have found."""
        other = copy.copy(self)
        other._sketch = sketch
        return other

    @contextmanager
    def installed(self, checkpoint: str) -> Iterator[Capture]:
        """Put hooks on the model, at its present weights, for as long as the ``with`` block lasts.

        Args:
            checkpoint: The checkpoint's name, from which its hashes are derived.

        Yields:
            The features of batches at this checkpoint.
        """
        targets = {}
        projections = {}
        for name in self._names:
            # Looked up anew: a load function may have replaced the Parameter objects.
            parameter = self._model.get_parameter(name)
            targets[name] = parameter
            projections[name] = self._sketch.projection(name, parameter, checkpoint)
        recompute = self._activation_checkpointing
        tape = Tape(self._model, targets, self._loop, activation_checkpointing=recompute, adoption=self._adoption)
        with tape:
            yield Capture(self._model, self._read, self._sketch, checkpoint, projections, tape, self._labelled)


@dataclass(frozen=True, eq=False)
class Capture:
    """The step features of batches at one checkpoint, while its hooks are on the model."""

    model: nn.Module
    read: BatchReader
    sketch: Sketch
    checkpoint: str
    """The checkpoint's name."""
    projections: Mapping[str, Projection]
    """By targeted parameter."""
    tape: Tape
    labelled: set[Manner]
    """Of the sides whose batches' labels are handed to the model, too."""

    # --- features ---

    def __call__(
        self,
        raw: Any,
        side: Side,
        by_step: bool,
        positions: Sequence[int],
        *,
        unit: Unit = "example",
        transform: Transform | None = None,
        checks_uses: bool = False,
    ) -> StepFeatures:
        """Compute the step features of a batch.

        Args:
            raw: A batch as the loader yields it.
            side: Its loss and forward keywords.
            by_step: False sums all uses in one bin, for a fraction of the memory.
            positions: Positions of its examples in the data set, named in errors.
            unit: "token" gives every token position of every example a row of its own: of n examples with p positions
                ``n * p`` rows, the first example's positions first. They sum up to the example's row. Positions are
                the second axis of what targeted layers read.
            transform: Applied to each use's gradients before they are sketched; parameters are named as in `targets`.
            checks_uses: Let other modules answer for the targets that are used outside their layer's calls.

        Returns:
            The features, ``(n, 2 + t, width)`` per parameter, or ``(n, 1, width)``.

        Raises:
            ValueError: If a loss or gradient is not finite, or with ``unit="token"`` a targeted layer reads something
                else than ``(n, p, ...)``.
        """
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be 'example' or 'token', got {unit!r}.")

        def attempted(scale: float) -> dict[str, Tensor]:
            with uses_in_sight(self.tape, checked=checks_uses) as check_uses:
                losses = self.losses(raw, side)
                check_uses(losses)
                self.check_finite(losses.detach().isfinite(), "loss", side, positions)
                return self._rows(losses, scale, unit, transform, by_step=by_step)

        def rows_at(scale: float) -> dict[str, Tensor]:
            return settled(partial(attempted, scale))

        scales = _LOSS_SCALES if in_float16(self.model) else (1.0,)
        rows = rows_at(scales[0])
        finite = finite_rows(rows)
        for scale in scales[1:]:
            if finite.all():
                break
            # Each row at the first scale that suits it, whatever its neighbours in the batch need.
            for name, scaled in rows_at(scale).items():
                rows[name] = torch.where(finite[:, None, None], rows[name], scaled)
            finite = finite_rows(rows)
        n_rows = len(finite)
        by_example = finite.view(len(positions), n_rows // len(positions))
        self.check_finite(by_example.all(1), "gradient", side, positions)
        n_steps = torch.full((n_rows,), self.n_steps)
        return StepFeatures(rows, self._noise(), n_steps)

    def exact(self) -> Capture:
        """Return the same capture with every entry of every gradient; `sketched` sketches them afterwards."""
        sketch = Exact()
        projections = {}
        for name, parameter in self.tape.targets.items():
            projections[name] = sketch.projection(name, parameter, self.checkpoint)
        return replace(self, sketch=sketch, projections=projections)

    def sketched(self, exact: StepFeatures) -> StepFeatures:
        """Sketch exact features, with the hashes that gradients are sketched with.

        Args:
            exact: ``(n, b, entries)`` for each parameter.

        Returns:
            ``(n, b, width)`` for each parameter.
        """
        first_row = next(iter(exact.rows.values()))
        n, bins, _ = first_row.shape
        rows = self._zeros(n, bins)
        for name, projection in self.projections.items():
            shape = self.tape.targets[name].shape
            entries = exact.rows[name].reshape(n * bins, *shape)
            row = rows[POOLED if self.sketch.pool else name]
            row += projection(Dense(entries)).view_as(row)
        return StepFeatures(rows, self._noise(), exact.n_steps).map(lambda row: row.to(first_row.dtype))

    def blank(self) -> StepFeatures:
        """Return features of no example: which rows there are, how wide and how noisy."""
        return StepFeatures(self._zeros(0, 1), self._noise(), torch.zeros(0, dtype=torch.long))

    def _rows(
        self,
        losses: Tensor,
        scale: float,
        unit: Unit,
        transform: Transform | None,
        *,
        by_step: bool,
    ) -> dict[str, Tensor]:
        """Backpropagate the last forward pass's losses, and add the sketches of all uses up."""
        n_rows = len(losses)
        if unit == "token":
            n_rows *= self.tape.n_tokens
        bins = Bins.count(self.n_steps) if by_step else 1
        rows = self._zeros(n_rows, bins)

        def consume(
            name: str,
            chosen_rows: slice,
            place: int,
            gradient: Gradient,
        ) -> None:
            if transform is not None:
                gradient = transform(name, gradient)
            sketched = self.projections[name](gradient)
            row = rows[POOLED if self.sketch.pool else name]
            step_bin = place if by_step else 0
            row[chosen_rows, step_bin].add_(sketched.to(row.device), alpha=1 / scale)

        if scale != 1:
            losses = losses * scale
        self.tape.backward(losses, consume, unit)
        return rows

    def _zeros(self, n: int, bins: int) -> dict[str, Tensor]:
        """Return rows of zeros, in the sketch's numbers; pooled parameters share one."""
        projections = dict(self.projections)
        if self.sketch.pool:
            _, last_projection = projections.popitem()
            projections = {POOLED: last_projection}
        rows = {}
        for name, projection in projections.items():
            shape = n, bins, projection.width
            rows[name] = torch.zeros(shape, dtype=projection.dtype, device=projection.device)
        return rows

    def _noise(self) -> dict[str, Noise]:
        noise = {name: projection.noise for name, projection in self.projections.items()}
        if not self.sketch.pool:
            return noise
        return {POOLED: max(noise.values(), key=attrgetter("variance"))}

    # --- forward passes ---

    def forward(self, raw: Any, side: Side) -> tuple[Any, Tensor]:
        """Run a forward pass under the hooks.

        Returns:
            The model's output and ``(n,)`` losses.

        Raises:
            ValueError: If a targeted parameter's layer was not called, or only where no graph is built.
        """
        return settled(lambda: self._forward(raw, side))

    def _forward(self, raw: Any, side: Side) -> tuple[Any, Tensor]:
        """Attempt a forward pass."""
        batch = self._read(raw, side)

        def output_and_losses() -> tuple[Any, Tensor]:
            output = run_model(self.model, batch)
            if self.hands_labels(side):
                _, output = without_own_loss(output)
            return output, example_losses(side.loss_fn, output, batch.labels, batch.size, side.argument)

        return seen_forward(self.tape, output_and_losses, batch.size)

    def losses(self, raw: Any, side: Side) -> Tensor:
        """Attempt a forward pass of a batch that is compared with examples alone, so that a mask may be left out."""
        try:
            return self._forward(raw, side)[1]  # the logits need not outlive the loss's own backward
        except RefusedMaskError:
            if self.read.leave_mask_out(raw):
                raise UnsettledError from None
            raise

    def _read(self, raw: Any, side: Side) -> Batch:
        batch = self.read(raw, side.forward_kwargs)
        return with_labels(batch) if self.hands_labels(side) else batch

    def hands_labels(self, side: Side) -> bool:
        """Say whether the model is handed a side's labels: its logits are others with them, as Ouro's."""
        return side.manner in self.labelled

    def check_uses(self, raw: Any, side: Side) -> Tensor:
        """Let other modules answer for the targets that are used outside their layer's calls.

        Returns:
            ``(n,)`` losses of a forward pass without such uses.

        Raises:
            ValueError: If no module answers for one.
        """

        def attempted() -> Tensor:
            with uses_in_sight(self.tape, checked=True) as check_uses:
                losses = self._forward(raw, side)[1]
                check_uses(losses)
            return losses.detach()

        return settled(attempted)

    def check_gradient(self, raw: Any, side: Side) -> None:
        """Check, in a forward pass, that the loss depends on some parameter at all, targeted or not.

        Raises:
            ValueError: If no gradient could follow from the loss to a parameter.
        """
        floating = {}
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                floating[name] = parameter
        with requiring_grad(floating):
            losses = self.forward(raw, side)[1]
            check_gradient(losses, side.argument)

    def check_finite(
        self,
        finite: Tensor,
        quantity: str,
        side: Side,
        positions: Sequence[int],
    ) -> None:
        """Check that the examples' losses or gradients are finite.

        Args:
            finite: ``(n,)`` which of them are.
            quantity: "loss" or "gradient".
            side: Of the examples.
            positions: Of the examples.

        Raises:
            ValueError: If some are not.
        """
        if not finite.all():
            indices = (~finite).nonzero().flatten()
            bad = [positions[index] for index in indices.tolist()]
            raise ValueError(
                f"The {quantity} of {side.name} example(s) {bad} is not finite at checkpoint {self.checkpoint!r}. "
                "Look at these examples and that checkpoint, or leave one of them out."
            )

    # --- what is captured ---

    @property
    def n_steps(self) -> int:
        """How many loop steps the last forward pass ran."""
        return self.tape.n_steps

    def targets(self) -> dict[str, Tensor]:
        """Return the targeted parameters by name."""
        return dict(self.tape.targets)

    def checksum(self) -> str:
        """Return a digest of this checkpoint's hash tables."""
        digest = hashlib.sha256()
        for name, projection in self.projections.items():
            digest.update(canonical_name(name).encode() + projection.checksum())
        return digest.hexdigest()


def finite_rows(rows: Mapping[str, Tensor]) -> Tensor:
    """Return ``(n,)`` which examples' rows are finite."""
    sums = [row.flatten(1).sum(1) for row in rows.values()]
    device = sums[0].device  # of a model spread over devices each parameter has its own
    return torch.stack([total.isfinite().to(device) for total in sums]).all(0)
