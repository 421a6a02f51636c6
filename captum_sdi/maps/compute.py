"""`influence_map`: the influence of chosen pairs, split along any axes.

With g_r the gradient of a part r of a train example's loss and φ_c that of a part c of a test example's, as both arise
in a loop step, at a position, in a parameter, a cell is η ⟨g_r, P φ_c⟩. Gradients are linear in the loss and a sum over
uses, and an inner product is a sum over parameters: cells sum to TracIn along every axis.

Rows of the train side are held, as many as fit; those of the test side pass by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_sdi.features import Bins, canonical_name
from captum_sdi.maps.axes import MapAxes
from captum_sdi.maps.grid import GRID_AXES, Grid
from captum_sdi.maps.look import look, side_as_run
from captum_sdi.maps.memory import Needs, Portions, free_memory, portions
from captum_sdi.maps.per_checkpoint import step_labels
from captum_sdi.maps.rows import RowSide, held
from captum_sdi.maps.words import Words
from captum_sdi.model_facts import model_device
from captum_sdi.passes import Point
from captum_sdi.precision import score_dtype
from captum_sdi.scores.influence_map import InfluenceMap, Label
from captum_sdi.sketch.base import Sketch
from captum_sdi.study import Question, Study


@dataclass(frozen=True)
class Sides:
    """Both sides of a map, looked at."""

    tests: RowSide
    trains: RowSide
    indices: Tensor
    """``(q, k)`` the train examples of each test example."""

    def lengths(self, n_groups: int, n_checkpoints: int) -> dict[str, int]:
        """Return how long each axis of the grid is."""
        q, k = self.indices.shape
        lengths = (
            q,
            k,
            self.tests.n_places,
            self.trains.n_places,
            self.tests.n_positions,
            self.tests.n_bins,
            self.trains.n_positions,
            self.trains.n_bins,
            n_groups,
            n_checkpoints,
        )
        return dict(zip(GRID_AXES, lengths, strict=True))


def influence_map(
    question: Question,
    indices: Tensor,
    axes: MapAxes,
    sketch: Sketch,
    words: Words | None = None,
) -> InfluenceMap:
    """Split the influence of pairs along axes.

    Args:
        question: The test examples.
        indices: ``(k,)`` positions of train examples, the same for every test example, or ``(q, k)``.
        axes: Along which.
        sketch: How gradients are represented.
        words: Writes the tokens of a text.

    Returns:
        The map, its axes in the order that was asked for.

    Raises:
        ValueError: If there are no such train examples, the sketch cannot tell parameters apart, a loss no tokens or a
            layer no positions, or the map is too large.
    """
    check_parameters_apart(axes, sketch)
    study = replace(question.study, index=None)
    sides = look_at_sides(replace(question, study=study), indices, axes)
    map_study = replace(study, engine=study.engine.with_sketch(sketch))
    map_study.check_rows()
    groups: dict[str, list[str]] = {}
    grid: Grid | None = None
    with map_study.points() as points:
        for point in points:
            groups = axes.groups(list(point.capture.blank().rows))
            lengths = sides.lengths(len(groups), len(study.checkpoints) if "checkpoint" in axes.names else 1)
            shares = portions(needs_of(point, sides, lengths), free_memory(model_device(point.model)))
            grid = grid or Grid(sides.indices, lengths)
            add_checkpoint(grid, point, map_study, sides, groups, shares, axes)
    assert grid is not None, "there is always a checkpoint"
    return labelled(grid, axes, sides, groups, study, words)


def check_parameters_apart(axes: MapAxes, sketch: Sketch) -> None:
    """Refuse layers of a sketch that adds all parameters up.

    Raises:
        ValueError: If it does.
    """
    wanted = {"layer", "parameter"} & set(axes.names)
    if sketch.pool and wanted:
        raise ValueError(
            f"The axis {wanted.pop()!r} needs rows of each parameter, which {sketch!r} adds up. Pass sketch=None for "
            "exact gradients, or a sketch with pool=False."
        )


def look_at_sides(question: Question, indices: Tensor, axes: MapAxes) -> Sides:
    """Run all examples once at the first checkpoint, with the sketch of all other questions.

    Returns:
        Both sides, with what is known of their examples.

    Raises:
        ValueError: If an index is not in the train set, or the indices are not those of the test examples.
    """
    study = question.study
    first = replace(study, checkpoints=study.checkpoints[:1])
    with first.points() as points:
        point = next(points)
        test_looks = look(point, question.tests, axes.test)
        train_looks = look(point, study.train, axes.train, indices.unique())
        test_examples = replace(question.tests, side=side_as_run(point, question.tests.side))
        train_examples = replace(study.train, side=side_as_run(point, study.train.side))
    unknown = sorted(set(indices.flatten().tolist()) - set(train_looks))
    if unknown:
        raise ValueError(f"indices= names training examples {unknown}, which train_dataset does not have.")
    q = len(test_looks)
    if indices.ndim == 2 and len(indices) != q:
        raise ValueError(f"indices= has {len(indices)} rows for {q} test examples: pass (q, k), or (k,) for all.")
    tests = RowSide.of(test_examples, axes.test, test_looks)
    trains = RowSide.of(train_examples, axes.train, train_looks)
    return Sides(tests, trains, indices.expand(q, -1))


def needs_of(point: Point, sides: Sides, lengths: dict[str, int]) -> Needs:
    """Return the memory that a map needs at a checkpoint."""
    blank = point.capture.blank()
    width = sum(row.shape[-1] for row in blank.rows.values())
    test_cells = lengths["position"] * lengths["step"]
    train_cells = lengths["train_position"] * lengths["train_step"]
    return Needs(
        lengths=lengths,
        test_row=test_cells * width,
        train_row=train_cells * width,
        test_cells=test_cells,
        train_cells=train_cells,
        number_bytes=score_dtype(point.model).itemsize,
        has_errors=any(noise.variance for noise in blank.noise.values()),
    )


def add_checkpoint(
    grid: Grid,
    point: Point,
    study: Study,
    sides: Sides,
    groups: dict[str, list[str]],
    shares: Portions,
    axes: MapAxes,
) -> None:
    """Add the scores of all pairs at one checkpoint."""
    place = point.checkpoint.number if "checkpoint" in axes.names else 0
    checkpoint = place, point.checkpoint.weight
    preconditioned = study.preconditioned(point)
    trains = sides.trains.parts(
        point,
        min(shares.train_rows, shares.test_rows),
        only=sides.indices.unique(),
        unit_norm=study.normalize is not None,
    )
    for held_rows in held(trains, shares.train_rows):
        tests = sides.tests.parts(preconditioned, shares.test_rows, unit_norm=study.normalize == "both")
        for test_rows in tests:
            for train_rows in held_rows:
                grid.add(test_rows, train_rows, groups, checkpoint)


# --- what it is of ---


def labelled(
    grid: Grid,
    axes: MapAxes,
    sides: Sides,
    groups: dict[str, list[str]],
    study: Study,
    words: Words | None,
) -> InfluenceMap:
    """Put the axes in order, and say what the places along each are."""
    scores = grid.result()
    values, variances = scores.values, scores.variances
    labels = {axis: labels_along(axis, values.shape, groups, study) for axis in axes.names}
    errors = variances.clamp(min=0).sqrt() if variances.numel() else None
    return InfluenceMap(
        values=in_order(values, axes),
        axes=axes.names,
        labels=labels,
        indices=sides.indices.clone(),
        errors=None if errors is None else in_order(errors, axes),
        test_tokens=None if words is None else tuple(tokens_of(sides.tests, words).values()),
        train_tokens={} if words is None else tokens_of(sides.trains, words),
    )


def in_order(grid: Tensor, axes: MapAxes) -> Tensor:
    """Return a grid with the axes that were asked for; prelude comes first, and coda last."""
    kept = [0, 1]
    for name in axes.names:
        axis = grid_axis(name)
        kept.append(axis)
        if name in ("step", "train_step"):
            n_bins = grid.shape[axis]
            order = [Bins.PRELUDE, *range(Bins.of_step(0), n_bins), Bins.CODA]
            grid = grid.index_select(axis, torch.tensor(order, device=grid.device))
    absent = [axis for axis in range(grid.ndim) if axis not in kept]
    ordered = grid.permute(*kept, *absent)
    return ordered.reshape(ordered.shape[: len(kept)])


def grid_axis(name: str) -> int:
    """Return where an axis of a map is in a grid."""
    return GRID_AXES.index("layer" if name == "parameter" else name)


def labels_along(
    axis: str,
    shape: Sequence[int],
    groups: dict[str, list[str]],
    study: Study,
) -> tuple[Label, ...]:
    """Return what the places along an axis are."""
    if axis in ("layer", "parameter"):
        return tuple(canonical_name(name) for name in groups)
    if axis == "checkpoint":
        return tuple(checkpoint.name for checkpoint in study.checkpoints)
    length = shape[grid_axis(axis)]
    if axis in ("step", "train_step"):
        return step_labels(length)
    return tuple(range(length))


def tokens_of(side: RowSide, words: Words) -> dict[int, tuple[str, ...]]:
    """Return the tokens of each example of a side."""
    return {position: tuple(words(look.ids)) for position, look in side.looks.items()}
