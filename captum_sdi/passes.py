"""The passes over checkpoints, test examples and training examples.

Checkpoints are the outermost loop, each loaded once. At a checkpoint the test side's features are computed and kept;
the training side's are never held: a batch is sketched, scored and forgotten. Before the first batch of a side, its
first example is rehearsed, so that what cannot work is said before hours are spent.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.borrow import preserved
from captum_sdi.capture.featurizer import Capture, Featurizer
from captum_sdi.capture.owners import check_targets
from captum_sdi.checkpoints import checkpoint_names
from captum_sdi.data.batch import batch_size, select
from captum_sdi.data.losses import TokenCrossEntropy, first_targeted_example, target_labels, token_logits
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import LoopSpec, StepFeatures, concatenate
from captum_sdi.loop.finding import find_loop
from captum_sdi.loop.parameters import target_parameters
from captum_sdi.loop.table import FoundLoop
from captum_sdi.rehearsal import check_ids
from captum_sdi.scores.contract import Scores, pair_scores, with_total
from captum_sdi.sketch.base import Sketch
from captum_sdi.words import warn_user

Receive = Callable[[int, Tensor, float, Scores], None]
"""Called for each training batch with (its number, its examples' positions, η, scores)."""


class Engine:
    """Everything `SDIInfluence` does that is not Captum's interface.

    Args:
        model: The model.
        load: ``(model, checkpoint)`` to the learning rate.
        layers: Which parameters count; see `SDIInfluence`.
        loop: What repeats; None: found on the first batch.
        sketch: How gradients are represented.
        activation_checkpointing: Recompute the loop's activations in the backward pass.

    Raises:
        ValueError: What can be known before a forward pass is wrong: a layer or loop name, a parameter no rule covers.
    """

    def __init__(
        self,
        model: nn.Module,
        load: Callable[[nn.Module, Any], float],
        layers: str | Sequence[str] | None,
        loop: LoopSpec | None,
        sketch: Sketch,
        activation_checkpointing: bool,
    ) -> None:
        self.model, self.layers, self.loop, self.sketch = model, layers, loop, sketch
        self._load, self._activation_checkpointing = load, activation_checkpointing
        self._featurizer: Featurizer | None = None
        self._capture: Capture | None = None
        self._fitting = sys.maxsize  # how many examples fit into a GPU's memory, once that is known
        self._n_labels: dict[tuple[int, int], int] = {}
        self._rehearsed: set[tuple[int, int]] = set()
        if loop is not None or layers != "loop":
            self._targets(loop or LoopSpec(("",)))

    def sweep(
        self, checkpoints: Sequence[Any], first: tuple[Stream, Side], visit: Callable[[int, float], None]
    ) -> None:
        """Calls ``visit`` at every checkpoint; the model comes back as it was, whatever happens.

        Args:
            checkpoints: What to load, in order; None stands for the current weights.
            first: The side whose first batch serves to find the loop.
            visit: Called with the checkpoint's position and its learning rate.

        Raises:
            ValueError: A learning rate is no finite number.
        """
        loads = any(checkpoint is not None for checkpoint in checkpoints)
        # Tensors made in the user's inference mode could not be saved for backward.
        with torch.inference_mode(False), preserved(self.model, weights=loads):
            featurizer = self._prepared(*first)
            for i, (checkpoint, name) in enumerate(zip(checkpoints, checkpoint_names(list(checkpoints)), strict=True)):
                eta = 1.0 if checkpoint is None else _learning_rate(self._load(self.model, checkpoint), name)
                with featurizer.installed(name) as self._capture:
                    visit(i, eta)

    def features(self, stream: Stream, side: Side, by_step: bool, aggregate: bool = False) -> StepFeatures:
        """Features of every example of a stream, inside `sweep`.

        Args:
            stream: Batches.
            side: How they are run.
            by_step: Keep loop steps apart.
            aggregate: Sum over the examples.

        Returns:
            The features of all, or of their sum.
        """
        parts = (features for _, features in self.blocks(stream, side, by_step))
        if not aggregate:
            return concatenate(list(parts))
        return reduce(lambda a, b: concatenate([a, b]).aggregated(), parts).aggregated()

    def parts(self, stream: Stream, side: Side, aggregate: bool) -> Iterator[StepFeatures]:
        """Features by step of a stream, batch by batch, or their sum as the only one; inside `sweep`.

        Args:
            stream: Batches.
            side: How they are run.
            aggregate: Sum over the examples.

        Yields:
            The features of consecutive examples.
        """
        if aggregate:
            yield self.features(stream, side, True, aggregate)
        else:
            yield from (features for _, features in self.blocks(stream, side, True))

    def largest_batch(self, stream: Stream, side: Side) -> int:
        """How many examples fit into memory, by accelerate's finder, at the model's current weights.

        Args:
            stream: Its first batch is tried, then ever smaller parts of it.
            side: How it is run.

        Returns:
            At most the size of the first batch.

        Raises:
            ImportError: `accelerate` is not installed.
        """
        try:
            from accelerate.utils import find_executable_batch_size
        except ImportError as error:
            raise ImportError(
                "batch_size='auto' is found by accelerate: pip install 'captum-sdi[train]', or pass a number."
            ) from error
        raw = stream.peek()
        found: list[int] = []

        def attempt(size: int) -> None:
            self.featurizer(select(raw, range(size)), side, True, range(size))
            found.append(size)

        def visit(*_: object) -> None:
            self._rehearse(raw, side, range(batch_size(raw)))
            find_executable_batch_size(attempt, starting_batch_size=batch_size(raw))()

        self.sweep([None], (stream, side), visit)
        return found[0]

    def blocks(
        self, stream: Stream, side: Side, by_step: bool, only: Tensor | None = None
    ) -> Iterator[tuple[Tensor, StepFeatures]]:
        """Features of a stream, batch by batch, inside `sweep`.

        Args:
            stream: Batches.
            side: How they are run.
            by_step: Keep loop steps apart.
            only: Positions of the examples to compute; None: all.

        Yields:
            The positions of a batch's examples ``(n,)``, and their features.
        """
        whole = ((torch.arange(start, start + batch_size(raw)), raw) for start, raw in stream)
        for positions, raw in whole if only is None else stream.picked(only):
            yield positions, self.batch(raw, side, by_step, positions.tolist())

    def batch(self, raw: Any, side: Side, by_step: bool, positions: Sequence[int]) -> StepFeatures:
        """Features of one batch, inside `sweep`; in halves where it does not fit into the GPU's memory.

        Args:
            raw: A batch.
            side: How it is run.
            by_step: Keep loop steps apart.
            positions: Of its examples.

        Returns:
            The features.
        """
        self._rehearse(raw, side, positions)
        parts: list[StepFeatures] = []
        dtype = self.dtype
        done = 0
        while done < len(positions):
            part = range(done, min(done + self._fitting, len(positions)))
            some = raw if len(part) == len(positions) else select(raw, part)
            features = self._tried(some, side, by_step, positions[done : part.stop])
            if features is None:
                self._halve(len(part))
                continue
            parts.append(features)
            done = part.stop
        return (parts[0] if len(parts) == 1 else concatenate(parts)).map(lambda row: row.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Of scores and their sums over checkpoints: float64 for a float64 model, whatever the sketch's arithmetic."""
        double = any(parameter.dtype == torch.float64 for parameter in self.model.parameters())
        return torch.float64 if double else torch.float32

    def pairs(
        self,
        checkpoints: Sequence[Any],
        train: tuple[Stream, Side],
        test: tuple[Stream, Side],
        receive: Receive,
        by_step: bool,
        aggregate: bool = False,
        only: Tensor | None = None,
    ) -> Tensor:
        """Scores every training batch against all test examples, at every checkpoint.

        Args:
            checkpoints: As for `sweep`.
            train: The training side.
            test: The test side.
            receive: Takes each batch's scores ``(q, n, b)``.
            by_step: Keep the test side's loop steps apart.
            aggregate: Sum over the test examples: q is 1.
            only: Positions of the training examples to compute; None: all.

        Returns:
            ``(q,)`` how many loop steps each test example ran, at most.
        """
        depths: list[Tensor] = []

        def visit(_: int, eta: float) -> None:
            tested = with_total(self.features(*test, by_step, aggregate))
            depths.append(tested.n_steps)
            for i, (positions, trained) in enumerate(self.blocks(*train, False, only)):
                receive(i, positions, eta, pair_scores(tested, trained))

        self.sweep(checkpoints, train, visit)
        return torch.stack(depths).amax(0)

    def _tried(self, raw: Any, side: Side, by_step: bool, positions: Sequence[int]) -> StepFeatures | None:
        """Features, or None when the GPU's memory does not suffice and fewer examples could be tried."""
        try:
            return self.featurizer(raw, side, by_step, positions)
        except torch.OutOfMemoryError:
            if batch_size(raw) == 1:
                raise
        return None  # out of the except block, or the exception would keep the failed pass's activations alive

    def _halve(self, size: int) -> None:
        self._fitting = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"The GPU's memory does not suffice for {size} examples: going on with {self._fitting} at a time. "
            f"batch_size={self._fitting} would save the failed attempts.",
            stacklevel=2,
        )

    @property
    def featurizer(self) -> Capture:
        """What computes features, inside `sweep`."""
        assert self._capture is not None
        return self._capture

    # --- before the first batch ---

    def _targets(self, loop: LoopSpec) -> list[str]:
        """Names of the targeted parameters, all of which some rule may cover."""
        names = target_parameters(self.model, self.layers, loop)
        check_targets(self.model, names, loop)
        return names

    def _prepared(self, stream: Stream, side: Side) -> Featurizer:
        if self._featurizer is None:
            if self.loop is None:
                self._check_ids(raw := stream.peek(), side, range(batch_size(raw)))
                self.loop = find_loop(self.model, raw, forward_kwargs=side.forward_kwargs)
            targets = self._targets(self.loop)
            self._featurizer = Featurizer(self.model, targets, self.loop, self.sketch, self._activation_checkpointing)
        return self._featurizer

    def _rehearse(self, raw: Any, side: Side, positions: Sequence[int]) -> None:
        """Checks a batch's ids, and once per side runs its first example alone."""
        self._check_ids(raw, side, positions)
        settings = _settings(side)
        if settings in self._rehearsed:
            return
        first = first_targeted_example(raw, side.loss_fn)
        if first is None:
            return  # nothing to see in their losses; a later batch's turn
        example = select(raw, [first])

        def checked(output: Any, labels: Any) -> Tensor:
            if isinstance(side.loss_fn, TokenCrossEntropy):  # how many labels there are, before one that is not
                self._n_labels[settings] = token_logits(output).shape[-1]
                self._check_ids(raw, side, positions)
            return side.loss_fn(output, labels)

        _, losses = self.featurizer.forward(example, replace(side, loss_fn=checked))
        self.featurizer.check_finite(losses.isfinite(), "loss", side, [positions[first]])
        if not losses.requires_grad:
            self.featurizer.check_gradient(example, side)
        again = self.featurizer.check_uses(example, side)
        # Sums in another order from call to call, as on some GPU kernels, are no randomness.
        if not torch.allclose(losses, again, rtol=1e-3 if self.is_coarse else 1e-5, equal_nan=True):
            raise ValueError(
                f"The model is not deterministic: the first {side.name} example has loss {losses.item():.6g}, then "
                f"{again.item():.6g}. Fix its randomness, e.g. with a seeded state in forward_kwargs=."
            )
        if isinstance(side.loss_fn, TokenCrossEntropy):
            self._check_default_loss(example, side, losses.detach())
        if not self._rehearsed and self.featurizer.n_steps == 1 and not isinstance(self.loop, FoundLoop):
            warn_user(
                f"Nothing repeats: {self.loop} runs once in the first {side.name} example. It is taken as one loop "
                "step, and influence as TracIn. Name the repeated module in loop=, or pass None to look for it."
            )
        self._rehearsed.add(settings)

    def _check_ids(self, raw: Any, side: Side, positions: Sequence[int]) -> None:
        """Refuses token ids that the model does not know, and labels, once its logits have been seen."""
        n_ids, n_labels = _vocabulary_size(self.model), self._n_labels.get(_settings(side))
        if n_ids is not None and isinstance(raw, Mapping):
            check_ids("input_ids", raw.get("input_ids"), n_ids, side.name, positions)
        if n_labels is not None:
            check_ids("labels", target_labels(raw, side.loss_fn), n_labels, side.name, positions)

    @property
    def is_coarse(self) -> bool:
        """Whether the model computes in half precision, by its weights or the user's autocast."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        return half or any(torch.is_autocast_enabled(p.device.type) for p in self.model.parameters())

    def _check_default_loss(self, example: Any, side: Side, losses: Tensor) -> None:
        """Compares the default loss with the model's own, where it has one."""
        own = self.featurizer.own_loss(example, side)
        if own is not None and not torch.allclose(own.to(losses), losses[0], rtol=3e-2 if self.is_coarse else 1e-3):
            raise ValueError(
                f"The default loss, {side.loss_fn}, is {losses.item():.6g} for the first {side.name} example, the "
                f"model's own loss {own.item():.6g}. Pass loss_fn= with the loss you trained with: "
                "(output, labels) to one value per example."
            )


def _settings(side: Side) -> tuple[int, int]:
    """What a side's rehearsal holds for."""
    return id(side.loss_fn), id(side.forward_kwargs)


def _vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model's input embedding knows; None where it does not say."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def _learning_rate(returned: Any, checkpoint: str) -> float:
    """What a load function returned, as a finite number."""
    try:
        eta = float(returned)
    except (TypeError, ValueError):
        eta = math.nan
    if not math.isfinite(eta):
        raise ValueError(
            f"checkpoints_load_func returned the learning rate {returned!r} for checkpoint {checkpoint!r}. It must "
            "load the checkpoint and return a finite number."
        )
    return eta
