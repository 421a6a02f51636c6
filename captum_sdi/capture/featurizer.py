"""From a batch to step features: loss, tape, rules and sketch put together.

The features of an example are, for each targeted parameter, the sketch of the part φ of its gradient that flowed
through each loop step. Their bins are ``[prelude, coda, step 0, step 1, ...]``: steps come last so that a deeper
batch only adds to the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import requiring_grad
from captum_sdi.capture.tape import Tape
from captum_sdi.data.batch import BatchReader, run_model
from captum_sdi.data.losses import check_gradient, example_losses
from captum_sdi.data.side import Side
from captum_sdi.features import POOLED, Bins, Gradient, LoopSpec, Noise, StepFeatures, canonical_name
from captum_sdi.sketch.base import Projection, Sketch
from captum_sdi.words import first_few

_LOSS_SCALES = (2.0**12, 2.0**6, 1.0)
"""What losses are multiplied by, and gradients divided by, where they pass through float16, which knows nothing below
6e-8 and above 65504. A power of two rounds nothing; a smaller one is for gradients that overflow."""


class Featurizer:
    """Computes step features of batches at the model's current weights, one checkpoint at a time.

    Args:
        model: The model.
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
        self._model, self._names, self._loop, self._sketch = model, targets, loop, sketch
        self._activation_checkpointing = activation_checkpointing
        self.read = BatchReader(model)

    @contextmanager
    def installed(self, checkpoint: str) -> Iterator[None]:
        """Hooks on the model and hashes for this checkpoint, for as long as the ``with`` block lasts.

        Args:
            checkpoint: The checkpoint's name, from which its hashes are derived.
        """
        # Looked up anew: a load function may have replaced the Parameter objects.
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        targets = {name: parameters[name] for name in self._names}
        self._checkpoint = checkpoint
        self._projections: dict[str, Projection] = {
            name: self._sketch.projection(name, parameter, checkpoint) for name, parameter in targets.items()
        }
        with Tape(self._model, targets, self._loop, self._activation_checkpointing) as self._tape:
            yield

    def forward(self, raw: Any, side: Side) -> tuple[Any, Tensor]:
        """A forward pass under the hooks, inside `installed`.

        Args:
            raw: A batch as the loader yields it.
            side: Its loss and forward keywords.

        Returns:
            The model's output and ``(n,)`` losses.

        Raises:
            ValueError: A targeted parameter's layer was not called.
        """
        batch = self.read(raw, side.forward_kwargs)

        def losses() -> tuple[Any, Tensor]:
            output = run_model(self._model, batch)
            return output, example_losses(side.loss_fn, output, batch.labels, batch.size, side.argument)

        result = self._tape.forward(losses, batch.size)
        silent = [name for name in self._names if name not in self._tape.called]
        dark = [name for name in silent if name in self._tape.called_without_grad]
        if dark:
            raise ValueError(
                f"The forward pass runs the layer that owns {first_few(dark)} under torch.no_grad only: no gradient "
                f"reaches it. Leave it out{self._tape.without(dark)}, or let the model build a graph, e.g. with "
                "another number of loop steps in forward_kwargs=."
            )
        if silent:
            raise ValueError(
                f"The forward pass never called the layer that owns {first_few(silent)}: their influence cannot be "
                f"seen. Leave them out{self._tape.without(silent)}, or call the layer itself, not its weight or its "
                ".forward."
            )
        return result

    def check_uses(self, raw: Any, side: Side) -> Tensor:
        """A forward pass that tells whether parameters are used beside their layers' calls, inside `installed`.

        Args:
            raw: A batch as the loader yields it.
            side: Its loss and forward keywords.

        Returns:
            ``(n,)`` losses.

        Raises:
            ValueError: A targeted parameter is.
        """
        with self._tape.watching() as reached:
            _, losses = self.forward(raw, side)
            stray = reached(losses)
        if stray:
            raise ValueError(
                f"The model uses {first_few(stray)} beside the calls of the layer that owns it (its weight or its "
                ".forward directly): that part of its influence cannot be seen. Leave it out"
                f"{self._tape.without(stray)}, or call the layer itself."
            )
        return losses.detach()

    def check_gradient(self, raw: Any, side: Side) -> None:
        """A forward pass that tells a loss of no parameter at all from one of none that is targeted.

        Args:
            raw: A batch as the loader yields it.
            side: Its loss and forward keywords.

        Raises:
            ValueError: The loss depends on no parameter in a way that a gradient could follow.
        """
        every = {name: p for name, p in self._model.named_parameters() if p.is_floating_point()}
        with requiring_grad(every):
            check_gradient(self.forward(raw, side)[1], side.argument)

    def own_loss(self, raw: Any, side: Side) -> Tensor | None:
        """The loss that the model itself computes from labels, inside `installed`.

        Args:
            raw: A batch with labels.
            side: Its forward keywords.

        Returns:
            A scalar, or None when the model takes no labels or returns no loss.
        """
        batch = self.read(raw, side.forward_kwargs)
        if not isinstance(batch.labels, Tensor) or not self.read.takes("labels"):
            return None
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = self._model(*batch.args, **batch.kwargs, labels=batch.labels.long())
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        return loss if isinstance(loss, Tensor) and loss.ndim == 0 else None

    @property
    def n_steps(self) -> int:
        """How many loop steps the last forward pass ran, inside `installed`."""
        return self._tape.n_steps

    def targets(self) -> dict[str, Tensor]:
        """The targeted parameters by name, inside `installed`."""
        return dict(self._tape.targets)

    def blank(self) -> StepFeatures:
        """Features of no example, inside `installed`: which rows there are, how wide and how noisy."""
        return StepFeatures(self._zeros(0, 1), self._noise(), torch.zeros(0, dtype=torch.long))

    def checksum(self) -> str:
        """A digest of this checkpoint's hash tables, inside `installed`."""
        digest = hashlib.sha256()
        for name, projection in self._projections.items():
            digest.update(canonical_name(name).encode() + projection.checksum())
        return digest.hexdigest()

    def __call__(self, raw: Any, side: Side, by_step: bool, positions: Sequence[int]) -> StepFeatures:
        """Step features of a batch, inside `installed`.

        Args:
            raw: A batch as the loader yields it.
            side: Its loss and forward keywords.
            by_step: False sums all uses in one bin, for a fraction of the memory.
            positions: Of its examples, named in errors.

        Returns:
            The features, ``(n, 2 + t, width)`` per parameter, or ``(n, 1, width)``.

        Raises:
            ValueError: A loss or gradient is not finite.
        """
        first, *smaller = _LOSS_SCALES if self._in_float16() else (1.0,)
        kept, n_steps = self._swept(raw, side, by_step, positions, first)
        finite = _finite(kept)
        for scale in smaller:
            if finite.all():
                break
            # Each example at the first scale that suits it, whatever its neighbours in the batch need.
            rows, _ = self._swept(raw, side, by_step, positions, scale)
            kept = {name: torch.where(finite[:, None, None], kept[name], row) for name, row in rows.items()}
            finite = _finite(kept)
        self.check_finite(finite, "gradient", side, positions)
        return StepFeatures(kept, self._noise(), torch.full((len(finite),), n_steps))

    def _swept(
        self, raw: Any, side: Side, by_step: bool, positions: Sequence[int], scale: float
    ) -> tuple[dict[str, Tensor], int]:
        """Rows of a batch and the number of its loop steps, from one forward and one backward pass."""
        losses = self.forward(raw, side)[1]  # the logits need not outlive the loss's own backward
        self.check_finite(losses.detach().isfinite(), "loss", side, positions)
        n_steps = self._tape.n_steps
        rows = self._zeros(len(losses), Bins.count(n_steps) if by_step else 1)

        def consume(name: str, examples: slice, bin: int, gradient: Gradient) -> None:
            row = rows[POOLED if self._sketch.pool else name]
            row[examples, bin if by_step else 0].add_(self._projections[name](gradient), alpha=1 / scale)

        self._tape.backward(losses if scale == 1 else losses * scale, consume)
        return rows, n_steps

    def _in_float16(self) -> bool:
        """Whether gradients pass through float16, by the weights or the user's autocast."""
        if any(p.dtype == torch.float16 for p in self._model.parameters()):
            return True
        kinds = {p.device.type for p in self._model.parameters()}
        return any(torch.is_autocast_enabled(k) and torch.get_autocast_dtype(k) == torch.float16 for k in kinds)

    def _zeros(self, n: int, bins: int) -> dict[str, Tensor]:
        kinds = {POOLED if self._sketch.pool else name: kind for name, kind in self._projections.items()}
        return {
            name: torch.zeros(n, bins, kind.width, dtype=kind.dtype, device=kind.device) for name, kind in kinds.items()
        }

    def _noise(self) -> dict[str, Noise]:
        noise = {name: projection.noise for name, projection in self._projections.items()}
        if not self._sketch.pool:
            return noise
        return {POOLED: max(noise.values(), key=lambda each: each.variance)}

    def check_finite(self, finite: Tensor, what: str, side: Side, positions: Sequence[int]) -> None:
        """Names the examples whose loss or gradient is not finite, inside `installed`.

        Args:
            finite: ``(n,)`` which of them are.
            what: "loss" or "gradient".
            side: Of the examples.
            positions: Of the examples.

        Raises:
            ValueError: Some are not.
        """
        if not finite.all():
            bad = [positions[i] for i in (~finite).nonzero().flatten().tolist()]
            raise ValueError(
                f"The {what} of {side.name} example(s) {bad} is not finite at checkpoint {self._checkpoint!r}. "
                "Look at these examples and that checkpoint, or leave one of them out."
            )


def _finite(rows: dict[str, Tensor]) -> Tensor:
    """``(n,)`` which examples' rows are finite."""
    return torch.stack([row.flatten(1).sum(1).isfinite() for row in rows.values()]).all(0)
