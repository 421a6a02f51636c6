"""The passes: from checkpoints to blocks of features, computed by the model at hand.

Checkpoints are the outermost loop, each loaded once. At a checkpoint the test side's features are computed and kept;
the training side's are never held: a batch is sketched, scored and forgotten. Before the first batch of a side, its
first example is rehearsed, so that what cannot work is said before hours are spent.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.blocks import Block
from captum_sdi.borrow import preserved
from captum_sdi.capture.featurizer import Capture, Featurizer
from captum_sdi.capture.owners import check_targets
from captum_sdi.capture.tokens import Unit
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.data.batch import batch_size, select
from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.features import Gradient, LoopSpec, StepFeatures
from captum_sdi.loop.finding import N_EXAMPLES, loop_of_examples
from captum_sdi.loop.parameters import target_parameters
from captum_sdi.loop.presets import WHOLE_MODEL
from captum_sdi.loop.saved import check_saved_loop
from captum_sdi.model_facts import vocabulary_size
from captum_sdi.model_lock import exclusive
from captum_sdi.offload import weights_at_hand
from captum_sdi.pieces import Pieces
from captum_sdi.precision import score_dtype
from captum_sdi.rehearsal.alone import BatchRun
from captum_sdi.rehearsal.ids import check_ids
from captum_sdi.rehearsal.lengths import check_length, position_limit
from captum_sdi.rehearsal.rehearsal import Rehearsal
from captum_sdi.sketch.base import Sketch

Transform = Callable[[str, Gradient], Gradient]
"""``(parameter name, per-example gradient)`` to what is sketched in its place."""


@dataclass(frozen=True)
class Point:
    """The model at one checkpoint: loaded, hooked, ready for passes."""

    checkpoint: Checkpoint
    model: nn.Module
    loop: LoopSpec
    capture: Capture
    rehearsal: Rehearsal
    pieces: Pieces
    trainable: frozenset[str] = frozenset()
    """Names of the parameters that require a gradient outside the hooks, which freeze them all."""

    def batch(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        by_step: bool,
        transform: Transform | None = None,
        collated_alone: Callable[[int], Any] = lambda position: None,
    ) -> StepFeatures:
        """Compute the features of one batch, between its rehearsal and the comparison with its examples alone.

        Args:
            raw: The batch.
            side: How it is run.
            positions: Of its examples.
            by_step: Keep loop steps apart.
            transform: Applied to every per-example gradient before the sketch.
            collated_alone: From a position to the batch of that example alone, or None; see `Examples`.

        Returns:
            ``(n, b, width)`` for each parameter.
        """
        compute = partial(
            self.pieces.features,
            self.capture,
            by_step=by_step,
            transform=transform,
        )
        batch = BatchRun(self.capture, raw, side, positions, compute, collated_alone)
        features = self.rehearsal.features(batch)
        dtype = score_dtype(self.model)
        return features.map(lambda row: row.to(dtype))

    def rows(
        self,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        by_step: bool,
        unit: Unit,
        transform: Transform | None = None,
    ) -> StepFeatures:
        """Compute the features of a batch whose examples have been through `batch` before, as they are or in parts.

        Args:
            raw: The batch.
            side: How it is run.
            positions: Of its examples.
            by_step: Keep loop steps apart.
            unit: "token" gives every token position a row of its own; see `Capture`.
            transform: As for `batch`.

        Returns:
            ``(n, b, width)`` for each parameter, or ``(n * p, b, width)``.
        """
        features = self.pieces.features(
            self.capture, raw, side, positions, by_step=by_step, unit=unit, transform=transform
        )
        dtype = score_dtype(self.model)
        return features.map(lambda row: row.to(dtype))

    def blocks(
        self,
        examples: Examples,
        *,
        by_step: bool,
        only: Tensor | None = None,
        transform: Transform | None = None,
    ) -> Iterator[Block]:
        """Compute the features of a stream, batch by batch.

        Args:
            examples: The stream, and how it is run.
            by_step: Keep loop steps apart.
            only: Positions of the examples to compute; None: all.
            transform: Applied to every per-example gradient before the sketch.

        Yields:
            One block a batch.
        """
        for number, (positions, raw) in enumerate(examples.batches(only)):
            features = self.batch(
                raw,
                examples.side,
                positions.tolist(),
                by_step=by_step,
                transform=transform,
                collated_alone=examples.collated_alone,
            )
            yield Block(number, positions, features)


class Live:
    """The train side computed by the model at hand.

    Args:
        examples: The train set, and how it is run.
        by_step: Keep the train side's loop steps apart.
    """

    def __init__(self, examples: Examples, *, by_step: bool = False) -> None:
        self._examples, self._by_step = examples, by_step

    def blocks(self, point: Point, only: Tensor | None = None) -> Iterator[Block]:
        """Yield the features of all train examples, or of those at some positions, at one checkpoint."""
        return point.blocks(self._examples, by_step=self._by_step, only=only)


@dataclass(frozen=True)
class Prepared:
    """What is known once the first batch has been seen."""

    loop: LoopSpec
    targets: list[str]
    featurizer: Featurizer
    rehearsal: Rehearsal


class Engine:
    """Opens the model at one checkpoint after the other.

    Args:
        model: The model.
        load: ``(model, checkpoint)`` to the learning rate.
        layers: Which parameters count; see `SDIInfluence`.
        loop: What repeats; None: found on the first batch.
        sketch: How gradients are represented.
        activation_checkpointing: Recompute the loop's activations in the backward pass.

    Raises:
        ValueError: If what can be known before a forward pass is wrong: a layer or loop name, a parameter no rule
            covers.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[nn.Module, Any], float],
        layers: str | Sequence[str] | None,
        loop: LoopSpec | None,
        sketch: Sketch,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        self.model, self.layers, self.loop, self.sketch = model, layers, loop, sketch
        self.activation_checkpointing = activation_checkpointing
        self._load = load
        self._prepared: Prepared | None = None
        self._pieces = Pieces()
        self._known: dict[tuple[LoopSpec, tuple[str, ...]], Prepared] = {}
        check_saved_loop(model)
        if loop is not None or layers != "loop":
            self._checked_targets(loop or WHOLE_MODEL)

    def with_sketch(self, sketch: Sketch) -> Engine:
        """Return an engine for the same questions with another sketch, which knows what this one has found."""
        engine = Engine(
            self.model,
            self._load,
            self.layers,
            self.loop,
            sketch,
            activation_checkpointing=self.activation_checkpointing,
        )
        engine._known = self._known
        return engine

    @contextmanager
    def points(self, checkpoints: Sequence[Checkpoint], first: Examples) -> Iterator[Iterator[Point]]:
        """Open the model at every checkpoint; it comes back as it was, whatever happens.

        Args:
            checkpoints: What to load, in order.
            first: The examples whose first batch serves to find the loop.

        Yields:
            An iterator over the checkpoints: each point is loaded and hooked until the next one is asked for.

        Raises:
            ValueError: If a learning rate is no finite number.
        """
        loads_weights = any(checkpoint.source is not None for checkpoint in checkpoints)
        # Tensors made in the user's inference mode could not be saved for backward.
        with ExitStack() as borrowed:
            borrowed.enter_context(torch.inference_mode(mode=False))
            borrowed.enter_context(exclusive(self.model))
            borrowed.enter_context(weights_at_hand(self.model))
            borrowed.enter_context(preserved(self.model, weights=loads_weights))
            prepared = self._prepare(first)
            prepared.rehearsal.begin(first.side)
            # Closed before the weights are restored, also when the body ends early: no hook outlives it.
            with closing(self._visit(checkpoints, prepared)) as points:
                yield points
                prepared.rehearsal.finish()

    def _visit(self, checkpoints: Sequence[Checkpoint], prepared: Prepared) -> Generator[Point]:
        """Load and hook the model at one checkpoint after the other."""
        for checkpoint in checkpoints:
            loaded = checkpoint.loaded(self.model, self._load)
            trainable = frozenset(name for name, each in self.model.named_parameters() if each.requires_grad)
            with prepared.featurizer.installed(checkpoint.name) as capture:
                yield Point(
                    loaded,
                    self.model,
                    prepared.loop,
                    capture,
                    prepared.rehearsal,
                    self._pieces,
                    trainable,
                )
                prepared.rehearsal.finish()

    def _prepare(self, examples: Examples) -> Prepared:
        """Find the loop on the first batch, once, and the targets, anew where the model has others by now."""
        check_saved_loop(self.model)
        loop = self.loop or self._found_loop(examples)
        targets = self._checked_targets(loop)
        if self._prepared is None or self._prepared.targets != targets:
            key = LoopSpec(loop.modules, loop.anchors), tuple(targets)
            if key not in self._known:
                featurizer = Featurizer(
                    self.model,
                    targets,
                    loop,
                    self.sketch,
                    self.activation_checkpointing,
                )
                self._known[key] = Prepared(loop, targets, featurizer, Rehearsal(self.model, loop))
            prepared = self._known[key]
            self._prepared = replace(prepared, featurizer=prepared.featurizer.with_sketch(self.sketch))
        return self._prepared

    def _found_loop(self, examples: Examples) -> LoopSpec:
        """Find the loop, and remember it."""
        checked = self._checked_examples(examples)
        self.loop = loop_of_examples(self.model, checked, examples.side.forward_kwargs)
        return self.loop

    def _checked_examples(self, examples: Examples) -> Iterator[Any]:
        """Yield the first examples alone, after a look at their length and ids."""
        limit, n_ids = position_limit(self.model), vocabulary_size(self.model)
        for position, raw in enumerate(examples.stream.peek_examples(N_EXAMPLES)):
            check_length(raw, limit, examples.side.name, [position])
            if n_ids is not None and isinstance(raw, Mapping):
                check_ids(
                    "input_ids",
                    raw.get("input_ids"),
                    n_ids,
                    examples.side.name,
                    [position],
                )
            yield raw

    def _checked_targets(self, loop: LoopSpec) -> list[str]:
        """Name the targeted parameters, all of which some rule may cover."""
        names = target_parameters(self.model, self.layers, loop)
        check_targets(self.model, names, loop)
        return names


def most_examples(model: nn.Module) -> int:
    """Return where the search for a batch size begins."""
    return 256 if any(parameter.is_cuda for parameter in model.parameters()) else 16


def largest_batch(engine: Engine, examples: Examples) -> int:
    """Find how many examples fit into memory, by accelerate's finder, at the model's current weights.

    Args:
        engine: Opens the model.
        examples: Of which the first batch is tried, then ever smaller parts of it.

    Returns:
        At most the size of the first batch.

    Raises:
        ImportError: If `accelerate` is not installed.
    """
    try:
        from accelerate.utils import find_executable_batch_size
    except ImportError as error:
        raise ImportError(
            "batch_size='auto' is found by accelerate: pip install 'captum-sdi[train]', or pass a number."
        ) from error
    raw = examples.stream.peek()
    n_most = batch_size(raw)
    with engine.points([Checkpoint("current", None)], examples) as points:
        point = next(points)

        def compute(
            raw: Any,
            side: Side,
            positions: Sequence[int],
            *,
            checks_uses: bool = False,
        ) -> StepFeatures:
            return point.capture(raw, side, by_step=True, positions=positions, checks_uses=checks_uses)

        def attempt(size: int) -> int:
            positions = range(size)
            tried = select(raw, positions)
            point.rehearsal.begin(examples.side)  # anew after an attempt that failed
            batch = BatchRun(point.capture, tried, examples.side, positions, compute, examples.collated_alone)
            point.rehearsal.features(batch)
            return size

        return find_executable_batch_size(attempt, starting_batch_size=n_most)()
