"""The rehearsal of a side: its first example alone, before its batch; then two in their batch and alone.

All of it costs two examples' forward, backward and sketch. The first example's run serves three times: the checks
look at it, its features are compared with those in the batch, and where they agree the model is deterministic. A batch
of one is its own first example; a second pass, of it or of an example of a later batch, confirms it. Before passes that
ask for no features, as a Hessian's, an example runs forward alone, and their losses confirm it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.capture.apart import CAUSES, WAY_OUT
from captum_sdi.capture.featurizer import Capture
from captum_sdi.data.losses import TokenCrossEntropy, target_labels, token_logits
from captum_sdi.data.side import Manner, Side
from captum_sdi.features import LoopSpec, StepFeatures
from captum_sdi.model_facts import vocabulary_size
from captum_sdi.precision import is_coarse
from captum_sdi.rehearsal.alone import AloneRun, BatchRun, attended_lengths, run_alone, telling_examples
from captum_sdi.rehearsal.cutting import check_nothing_is_cut
from captum_sdi.rehearsal.first_example import CHECKS, FirstExample, check_repeats, repeats, warn_if_nothing_repeats
from captum_sdi.rehearsal.first_run import first_run
from captum_sdi.rehearsal.ids import check_ids
from captum_sdi.rehearsal.keywords import check_keywords_are_named
from captum_sdi.rehearsal.labels import check_labels_are_unshifted, check_labels_on_padding
from captum_sdi.rehearsal.lengths import check_length, position_limit
from captum_sdi.rehearsal.neighbours import (
    LARGEST,
    LARGEST_COARSE,
    USUAL_COARSE,
    relative_difference,
    rounding,
)
from captum_sdi.rehearsal.turns import PADDING, Turns, shown_by
from captum_sdi.words import warn_user


@dataclass
class Rehearsed:
    """What is known of the batches of one manner."""

    turns: Turns = field(default_factory=Turns)
    is_begun: bool = False
    """Whether a first example has been run."""
    unconfirmed: FirstExample | None = None
    """The first example, while nothing has shown that the model answers alike in a second pass."""
    waiting: Waiting | None = None
    """The second example of the largest batch so far, for as long as a later batch may show more."""
    whole: set[int] = field(default_factory=set)
    """The first positions of batches that are known to cut no example."""
    n_labels: int | None = None
    """How many logits there are."""
    warned_of_padding: bool = False
    warned_of_neighbours: bool = False


@dataclass(frozen=True)
class Waiting:
    """An example of a batch whose features there have been computed."""

    batch: BatchRun
    number: int
    features: StepFeatures
    """Of this example, in the batch."""


def waiting_example(batch: BatchRun, number: int, features: StepFeatures) -> Waiting:
    """Keep an example's features in the batch, to be compared later."""
    own_row = features.map(lambda row: row[number:][:1].clone(), features.n_steps[number:][:1])
    return Waiting(batch, number, own_row)


class Rehearsal:
    """Looks at every batch's ids, at the first example of each side, and at two in the batch and alone.

    Args:
        model: The model.
        loop: What repeats.
    """

    def __init__(self, model: nn.Module, loop: LoopSpec) -> None:
        self._model, self._loop = model, loop
        self._limit = position_limit(model)
        self._of: dict[Manner, Rehearsed] = {}
        self._steps_counted = False
        self._expected: Side | None = None

    def anew(self) -> Rehearsal:
        """Return another rehearsal of the same model, for which nothing has been compared; it does not warn again."""
        other = Rehearsal(self._model, self._loop)
        other._steps_counted = self._steps_counted
        return other

    def begin(self, side: Side) -> None:
        """Note which side's batches will come, whatever others do, and forget what an error left unfinished."""
        self._expected = side
        for known in self._of.values():
            if known.unconfirmed is not None:
                known.is_begun, known.turns.n_alone = False, 0
            known.unconfirmed = known.waiting = None

    def finish(self) -> None:
        """Do what waited for later batches, while the hooks of the last ones are on the model.

        Raises:
            ValueError: If the model is not deterministic, or features depend on the batch.
        """
        for known in self._of.values():
            if known.unconfirmed is not None:
                self._confirm(known, known.unconfirmed)
            waiting, known.waiting = known.waiting, None
            if waiting is not None:
                known.turns.n_alone += 1
                run = run_alone(waiting.batch, waiting.number)
                difference = relative_difference(waiting.features, 0, run.features)
                self._judge(known, waiting.batch, run, difference)

    # --- before the batch ---

    def before_batch(
        self,
        capture: Capture,
        raw: Any,
        side: Side,
        positions: Sequence[int],
        *,
        steps_count: bool = True,
    ) -> None:
        """Refuse or warn of what cannot work with a batch whose features are not asked for, by a forward pass.

        Hand the batch's losses to `answered`; else another forward pass confirms the model at the end of its point.

        Args:
            capture: Runs the model.
            raw: The batch.
            side: How it is run.
            positions: Of its examples.
            steps_count: Whether a loop that runs once on this side is worth a warning.

        Raises:
            ValueError: If a check says so.
        """

        def only_check(example: Any, side: Side, positions: Sequence[int], *, checks_uses: bool) -> StepFeatures:
            capture.check_uses(example, side)
            return StepFeatures({}, {}, torch.zeros(len(positions)))

        batch = BatchRun(capture, raw, side, positions, only_check, lambda position: None)
        known = self._of.setdefault(side.manner, Rehearsed())
        self._check_batch(batch, known)
        known.turns.padding_comes |= PADDING in shown_by(attended_lengths(raw), [])
        numbers = [] if known.is_begun else telling_examples(raw, side)
        if numbers:
            self._begin(batch, numbers[0], known, steps_count=steps_count)

    def answered(
        self,
        side: Side,
        positions: Sequence[int],
        losses: Tensor,
    ) -> bool:
        """Take a batch's losses for the second pass that a model is known by, where they are what the first one gave.

        Args:
            side: How the batch was run.
            positions: Of its examples.
            losses: ``(n,)``.

        Returns:
            Whether the batch has to be run again, its labels handed to the model.

        Raises:
            ValueError: If the model is not deterministic.
        """
        known = self._of[side.manner]
        first = known.unconfirmed
        if first is None:
            return False
        if first.side.name == side.name and first.run.position in positions:
            number = positions.index(first.run.position)
            if repeats(first, losses.detach()[number:][:1]):
                known.unconfirmed = None
                return False
        return self._confirm(known, first)

    def _begin(
        self,
        batch: BatchRun,
        number: int,
        known: Rehearsed,
        *,
        steps_count: bool = True,
    ) -> FirstExample:
        """Run the first example, and let every check look at it."""
        if not known.is_begun:
            check_keywords_are_named(self._model, batch.raw, batch.side)
            check_labels_are_unshifted(batch.raw, batch.side)
        first = first_run(batch, number, partial(self._check_logits, batch, known))
        for check in CHECKS:
            check(first)
        if steps_count and not self._steps_counted:
            warn_if_nothing_repeats(first, self._loop)
            self._steps_counted = True
        known.is_begun = True
        known.unconfirmed = first
        known.turns.n_alone += first.n_runs
        if first.witness.sees_labels and not first.witness.is_one_layers:
            # Such logits may be others without labels, as Ouro's: with them they are those of the model's own loss.
            batch.capture.labelled.add(batch.side.manner)
        return first

    def _check_batch(self, batch: BatchRun, known: Rehearsed) -> None:
        """Check length, padding, token ids against the embedding, and labels, once logits are known, against these."""
        raw, side, positions = batch.raw, batch.side, batch.positions
        check_length(raw, self._limit, side.name, positions)
        if not known.warned_of_padding and check_labels_on_padding(raw, side, positions):
            known.warned_of_padding = True
        n_ids = vocabulary_size(self._model)
        if n_ids is not None and isinstance(raw, Mapping):
            check_ids("input_ids", raw.get("input_ids"), n_ids, side.name, positions)
        if known.n_labels is not None:
            labels = target_labels(raw, side.loss_fn)
            check_ids("labels", labels, known.n_labels, side.name, positions)

    def _check_logits(
        self,
        batch: BatchRun,
        known: Rehearsed,
        output: Any,
    ) -> None:
        """Let the default loss count the logits first, and refuse a label that has none."""
        if isinstance(batch.side.loss_fn, TokenCrossEntropy):
            known.n_labels = token_logits(output).shape[-1]
            self._check_batch(batch, known)

    def _confirm(self, known: Rehearsed, first: FirstExample) -> bool:
        """Refuse a model that does not answer alike in a second pass; say whether it has to be handed labels."""
        needs_labels = check_repeats(first)
        known.unconfirmed = None
        if needs_labels:
            first.capture.labelled.add(first.side.manner)
        return needs_labels

    # --- the batch ---

    def features(self, batch: BatchRun) -> StepFeatures:
        """Compute a batch's features, between the rehearsal and the comparison with its examples alone.

        Returns:
            ``(n, b, width)`` for each parameter.

        Raises:
            ValueError: If a check says so, or features depend on the batch.
        """
        known = self._of.setdefault(batch.side.manner, Rehearsed())
        self._check_batch(batch, known)
        if batch.positions[0] not in known.whole:  # once, not at every checkpoint
            check_nothing_is_cut(batch)
            known.whole.add(batch.positions[0])
        if batch.size == 1:
            return self._features_of_one(batch, known)
        numbers = telling_examples(batch.raw, batch.side)
        if not numbers:  # nothing can be seen in losses of zero: a later batch's turn
            return batch.features()
        if not known.is_begun or known.unconfirmed is not None:
            first = self._begin(batch, numbers[0], known)
            return self._compared_with_first(batch, numbers, known, first)
        features = batch.features()
        was_padded = PADDING in known.turns.seen
        if known.turns.take(self._shown_by(batch)):
            number = numbers[-1] if was_padded else numbers[0]
            self._compare(known, batch, number, features)
        elif known.turns.grows(batch.size, features.n_steps):
            known.waiting = waiting_example(batch, numbers[-1], features)
        return features

    def _features_of_one(self, batch: BatchRun, known: Rehearsed) -> StepFeatures:
        """Compute the features of a batch of one, which is its own first example."""
        expected, unconfirmed = self._expected, known.unconfirmed
        if not known.is_begun and telling_examples(batch.raw, batch.side):
            first = self._begin(batch, 0, known)
            known.turns.n_alone -= 1
            if expected is None or expected.manner != batch.side.manner:
                self._confirm(known, first)
            return first.run.features
        if unconfirmed is not None and expected is not None and batch.side.name == expected.name:
            # The expected side comes one by one, too: no later batch is sure to confirm it.
            known.turns.n_alone += 1
            self._confirm(known, unconfirmed)
            unconfirmed = None
        side = batch.side if unconfirmed is None else unconfirmed.as_run
        return batch.compute(batch.raw, side, batch.positions)

    def _compared_with_first(
        self,
        batch: BatchRun,
        numbers: Sequence[int],
        known: Rehearsed,
        first: FirstExample,
    ) -> StepFeatures:
        """Compute a batch's features, and compare them with those of its first example, or of two."""
        features = batch.features()
        losses = batch.capture.tape.state.losses
        difference = relative_difference(features, numbers[0], first.run.features)
        is_other = not repeats(first, losses[numbers[0] :][:1]) or difference > rounding(features)
        if is_coarse(self._model) and not first.may_vary:
            is_other = difference > USUAL_COARSE  # what is repeated is repeated to the bit: kernels round otherwise
        if is_other and self._confirm(known, first):
            features = batch.features()
            difference = relative_difference(features, numbers[0], first.run.features)
        known.unconfirmed = None
        self._judge(known, batch, first.run, difference)
        shown = self._shown_by(batch)
        if len(numbers) > 1 and known.turns.begin(shown):
            self._compare(known, batch, numbers[1], features)
        elif known.turns.grows(batch.size, features.n_steps):
            known.waiting = waiting_example(batch, numbers[-1], features)
        return features

    def _shown_by(self, batch: BatchRun) -> set[str]:
        return shown_by(attended_lengths(batch.raw), batch.capture.tape.state.expanded)

    def _compare(
        self,
        known: Rehearsed,
        batch: BatchRun,
        number: int,
        features: StepFeatures,
    ) -> None:
        """Compare an example's features in the batch with those alone."""
        known.turns.n_alone += 1
        known.waiting = None
        run = run_alone(batch, number)
        self._judge(known, batch, run, relative_difference(features, number, run.features))

    def _judge(
        self,
        known: Rehearsed,
        batch: BatchRun,
        run: AloneRun,
        difference: float,
    ) -> None:
        """Refuse, or warn of, features that are others in a batch than alone, beyond what rounding does."""
        coarse = is_coarse(self._model)
        largest = LARGEST_COARSE if coarse else LARGEST
        smallest = largest if coarse else rounding(run.features)
        # The gradient of a loss of nearly zero is a difference of numbers nearly alike.
        single = torch.finfo(torch.float32)
        cancelled = 10 * single.eps / max(float(run.losses.abs()), single.tiny)
        sentence = (
            f"The features of {batch.side.name} example {run.position} depend on the batch: in a batch of {batch.size} "
            f"they differ by {difference:.2g} of their length from those of the example alone. "
        )
        if difference > smallest and not difference <= largest + cancelled:
            raise ValueError(sentence + CAUSES + WAY_OUT)
        if difference > smallest + cancelled and not known.warned_of_neighbours:
            known.warned_of_neighbours = True
            warn_user(sentence + "That is more than rounding. " + CAUSES + WAY_OUT)
