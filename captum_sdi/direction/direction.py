"""`Direction`: groups of training examples, each as one direction in parameter space, and what they ask of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from captum_sdi.direction.answers import Answers
from captum_sdi.direction.contracted import Vectors
from captum_sdi.direction.forward_mode import ForwardMode
from captum_sdi.direction.gradients import GroupGradients
from captum_sdi.direction.groups import Groups
from captum_sdi.direction.rehearsed import RehearsedBatch
from captum_sdi.index.weights import WeightHashes
from captum_sdi.maps.look import side_as_run
from captum_sdi.maps.words import words_by
from captum_sdi.passes import Point
from captum_sdi.rehearsal.alone import attended_lengths
from captum_sdi.rehearsal.arguments import check_inputs
from captum_sdi.rehearsal.turns import ORDERS, shown_by
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.result import StepInfluence
from captum_sdi.scores.words import Words, remembered
from captum_sdi.study import Question

CHANGED = (
    "The model's weights, its trainable parameters or its checkpoints have changed since this direction was made: make "
    "it again."
)


@dataclass(frozen=True)
class Direction:
    """The gradients of groups of training examples, each summed to one direction in parameter space.

    With weights a_i of the training examples z_i in a group,

        Σ_i a_i SDI_t(z_i, z') = Σ_c η_c ⟨ Σ_i a_i ∇ℓ(w_c; z_i), φ_t(w_c; z') ⟩

    is the derivative of the test loss along the group's direction, through the block's use in step t alone. One
    forward pass with dual numbers tells it for all steps and for every token of every test example, without a
    backward pass (forward-only attribution: arXiv 2511.19803). Two examples of the first batch ever asked about, and of
    the first one with padding, are compared with a backward pass of each alone. Nothing is sketched: the numbers are
    those of `captum_sdi.Exact`.

    `captum_sdi.SDIInfluence.direction` makes one. It holds the gradients of each group at each checkpoint,
    ``(g, size)`` for all targeted parameters' entries.
    """

    groups: Groups
    gradients: tuple[GroupGradients, ...]
    """At each checkpoint, in order."""
    ask: Callable[[Any], Question] = field(repr=False)
    """Puts test examples beside the study that the direction was made in."""
    _confirmed: set[str] = field(default_factory=set, repr=False, compare=False)
    """What test batches have shown whose answers backward passes of examples alone have confirmed."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the groups."""
        return self.groups.names

    def step_influence(self, inputs: Any, per: Literal["token"] | None = None) -> StepInfluence:
        """Compute the influence of each group on test examples, one number per loop step.

        Args:
            inputs: Test examples, as for `captum_sdi.SDIInfluence.influence`.
            per: "token": a row for every target token, which ``token_of`` names.

        Returns:
            Totals ``(q, g)`` and trajectories ``(q, g, t)``: where other results have training examples, this one has
            groups, whose names are its train words. Standard errors are zero.

        Raises:
            ValueError: If forward-mode differentiation does not support the model, or its weights have changed since.
        """
        if per not in (None, "token"):
            raise ValueError(f'per must be "token" or None; got {per!r}.')
        steps = self._answers(inputs, by_token=per == "token").step_influence()
        return steps.with_words(Words(remembered(inputs), list(self.names)))

    def influence_map(self, inputs: Any, tokenizer: Any = None) -> InfluenceMap:
        """Split the influence of each group by target token and loop step: which source acts when on which word.

        Args:
            inputs: As for `step_influence`.
            tokenizer: Writes tokens as text, as for `captum_sdi.SDIInfluence.influence_map`.

        Returns:
            A map ``(q, 1, g, p, t)`` with the axes "group", "token" and "step"; ``indices`` are zeros, since groups
            take the place of training examples.

        Raises:
            ValueError: As `step_influence`.
        """
        words = words_by(tokenizer)
        return self._answers(inputs, by_token=True).map(self.names, words)

    def _answers(self, inputs: Any, *, by_token: bool) -> Answers:
        """Add the answers of all test examples up over checkpoints."""
        check_inputs(inputs)
        question = self.ask(inputs)
        if len(question.study.checkpoints) != len(self.gradients):
            raise ValueError(CHANGED)
        total: Answers | None = None
        with question.study.engine.points(question.study.checkpoints, question.tests) as points:
            for point, gradients in zip(points, self.gradients, strict=True):
                is_other = point.capture.blank().rows.keys() != gradients.vectors.keys()
                if is_other or WeightHashes().of_model(point.model) != gradients.weights:
                    raise ValueError(CHANGED)
                batches = list(self._batches(point, gradients.vectors, question, by_token=by_token))
                answers = Answers.joined(batches)
                total = answers if total is None else total.plus(answers)
        assert total is not None, "there is always a checkpoint"
        return total

    def _batches(
        self,
        point: Point,
        vectors: Vectors,
        question: Question,
        *,
        by_token: bool,
    ) -> Iterator[Answers]:
        """Yield the answers of the test examples at one checkpoint, times its weight."""
        forward_mode: ForwardMode | None = None
        for positions, raw in question.tests.batches():
            shown = comparable(raw)
            if self._confirmed and shown <= self._confirmed:
                if forward_mode is None:
                    forward_mode = ForwardMode(point, side_as_run(point, question.tests.side), by_token=by_token)
                derivatives = forward_mode.step_derivatives(raw, vectors)
            else:
                rehearsed = RehearsedBatch(point, raw, question.tests, positions.tolist(), vectors, by_token=by_token)
                forward_mode, derivatives = rehearsed.derivatives()
                if rehearsed.compared():
                    self._confirmed.update(shown)
            yield Answers.of(derivatives, raw, positions, point.checkpoint.weight)


def comparable(raw: Any) -> set[str]:
    """Return what a batch shows that may make its examples others than alone: an example, neighbours, padding."""
    lengths = attended_lengths(raw)
    shown = shown_by(lengths, called_once=[]) - ORDERS if len(lengths) > 1 else set()
    return {"an example", *shown}
