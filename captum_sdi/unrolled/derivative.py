"""A run, ready for questions: replayed, compared with the model, gauged; and its derivative of any seeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from captum_sdi.checkpoints import Checkpoint
from captum_sdi.data.examples import Examples
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import join
from captum_sdi.passes import Engine, Point
from captum_sdi.progress import Progress
from captum_sdi.unrolled.backward import Visit, add_scores, visits
from captum_sdi.unrolled.gauge import Gauge, measured_gauge, warn_unless_trusted
from captum_sdi.unrolled.optimizers import State
from captum_sdi.unrolled.processes import own_rows, summed_over_processes
from captum_sdi.unrolled.replay import Replay, check_final
from captum_sdi.unrolled.seeds import Seeds, loss_gradients
from captum_sdi.unrolled.states import WayBack
from captum_sdi.unrolled.updates import Updates


@dataclass
class Derivative:
    """The derivative of test losses in the weights of the train examples, through one run."""

    replay: Replay
    engine: Engine
    """Opens the model at its present weights, with exact features."""
    loader: DataLoader[Any]
    """Of the train set."""
    is_gauged: bool
    """Whether the gauge is measured before the first scores."""
    owner: str
    """Whose work it is, as progress bars begin."""
    test_side: Side
    """How test examples are run: a model may loop there that did not in training."""
    gauge: Gauge | None = None
    replay_error: float | None = None

    @property
    def updates(self) -> Updates:
        """The updates of the run."""
        return self.replay.updates

    @property
    def n_examples(self) -> int:
        """The number of training examples n."""
        return len(self.updates.rows)

    def train_examples(self) -> Examples:
        """Return the train set in its own order."""
        side = self.updates.loss.side
        return Examples(Stream(self.loader, "train_dataset", side.loss_fn), side)

    def bar(self, purpose: str, n_trainings: int, *, show_progress: bool) -> Any:
        """Return a progress bar over the updates of so many passes through the run."""
        n_updates = n_trainings * self.updates.run.n_updates
        return Progress(self.owner, show_progress).bar(f"{purpose}. Processing update", n_updates)

    # --- before the first scores ---

    def prepare(self, *, show_progress: bool) -> None:
        """Replay the run and look at the gauge, once."""
        self.check_replay(show_progress=show_progress)
        if self.is_gauged and self.gauge is None:
            warn_unless_trusted(self.measure_gauge(show_progress=show_progress))

    def check_replay(self, *, show_progress: bool) -> float:
        """Replay the run once, and compare its end with the model's weights.

        Returns:
            By how much it misses them; see `captum_sdi.unrolled.replay.relative_error`.
        """
        if self.replay_error is None:
            self.rehearse()
            with self.bar("replay training", 1, show_progress=show_progress) as shown, self.updates.borrowed():
                final = self.replay.final(shown)[0]
                expected = self.updates.loss.layout.flat(dict(self.engine.model.named_parameters()))
            self.replay_error = check_final(final, expected, self.replay.start)
        return self.replay_error

    def rehearse(self) -> None:
        """Say what cannot work with the train set before hours are spent."""
        side = self.updates.loss.side
        steps_count = side.manner == self.test_side.manner
        positions = list(self.updates.run.batches[0])
        raw = self.updates.rows.batch(positions, 0)
        as_tests = Examples(self.train_examples().stream, self.test_side)
        with self.final_point(as_tests) as point:
            point.rehearsal.before_batch(point.capture, raw, side, positions, steps_count=steps_count)

    def measure_gauge(self, *, show_progress: bool) -> Gauge:
        """Measure the gauge, once."""
        if self.gauge is None:
            replay_error = self.check_replay(show_progress=show_progress)
            first_batch = self.train_examples().stream.peek()
            with self.bar("measure the gauge", 3, show_progress=show_progress) as shown, self.updates.borrowed():
                vector = self.replay.final(shown)[0]
                _, gradients = loss_gradients(self.updates.loss, vector, [first_batch])
                self.gauge = measured_gauge(self.replay, replay_error, gradients.mean(0), shown)
        return self.gauge

    # --- seeds, and their way back ---

    @contextmanager
    def final_point(self, tests: Examples) -> Iterator[Point]:
        """Open the model at its present weights, hooked; its loop is what repeats in examples run as tests are."""
        with self.engine.points([Checkpoint("final", None)], tests) as points:
            yield next(points)

    def seeds(self, tests: Examples, *, by_step: bool, aggregate: bool) -> Seeds:
        """Compute the gradients of test losses at the end of training, split by loop step."""
        with self.final_point(tests) as point:
            blocks = point.blocks(tests, by_step=by_step)
            features = join((block.features for block in blocks), aggregate=aggregate)
        return Seeds.of(features, self.updates.loss.layout)

    def visits(
        self,
        flat: Tensor,
        *,
        show_progress: bool,
        resumed: tuple[int, State] | None = None,
    ) -> Iterator[Visit]:
        """Go back through training with all seeds ``(seeds, size)``, or through what is left of it."""
        purpose = f"take {len(flat)} seeds back through training"
        with self.bar(purpose, 1, show_progress=show_progress) as shown, self.updates.borrowed():
            if resumed is not None:
                shown.update(self.updates.run.n_updates - resumed[0])
            for visit in visits(self.replay, flat, resumed):
                yield visit
                shown.update()

    def example_scores(self, flat: Tensor, *, show_progress: bool) -> Tensor:
        """Compute how much seeds change with the examples' weights; several processes share the seeds.

        Args:
            flat: ``(seeds, size)``.
            show_progress: Show a progress bar.

        Returns:
            ``(seeds, n)``.

        Raises:
            ValueError: If a score is not finite.
        """
        scores = flat.new_zeros(len(flat), self.n_examples)
        rows = own_rows(len(flat))
        if len(rows) > 0:
            scores[rows] = self.resumed_scores(flat[rows], show_progress=show_progress)
        scores = summed_over_processes(scores)
        if not scores.isfinite().all():
            raise ValueError("The derivative through training overflowed: this run amplifies every change without end.")
        return scores

    def resumed_scores(self, flat: Tensor, *, show_progress: bool) -> Tensor:
        """Compute the scores ``(seeds, n)`` in this process, from where an interrupted one had come to."""
        way_back = WayBack(self.replay.folder, flat)
        scores, resumed = flat.new_zeros(len(flat), self.n_examples), None
        left_by_another = way_back.read(flat)
        if left_by_another is not None:
            n_left, adjoint, scores = left_by_another
            resumed = n_left, adjoint
        for visit in self.visits(flat, show_progress=show_progress, resumed=resumed):
            add_scores(scores, visit)
            if visit.update in self.replay.kept:
                way_back.write(visit.update, visit.adjoint, scores)
        way_back.remove()
        return scores

    def update_scores(
        self,
        flat: Tensor,
        *,
        only: Tensor | None = None,
        show_progress: bool,
    ) -> Tensor:
        """Compute how much seeds change with the examples' weights at each update alone.

        Args:
            flat: ``(seeds, size)``.
            only: ``(n,)`` positions of the examples to keep; None: all.
            show_progress: Show a progress bar.

        Returns:
            ``(seeds, n, updates)``.
        """
        chosen = torch.arange(self.n_examples) if only is None else only
        scores = flat.new_zeros(self.updates.run.n_updates, len(flat), len(chosen))
        for visit in self.visits(flat, show_progress=show_progress):
            of_update = add_scores(flat.new_zeros(len(flat), self.n_examples), visit)
            scores[visit.update] = of_update[:, chosen.to(flat.device)]
        return scores.permute(1, 2, 0)


def load_vector(model: torch.nn.Module, named: dict[str, Tensor]) -> float:
    """Write parameters into a model, as a checkpoint's load function does; the rate is 1."""
    with torch.no_grad():
        for name, tensor in named.items():
            model.get_parameter(name).copy_(tensor)
    return 1.0
