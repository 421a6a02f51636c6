"""An `InfluenceMap` as checked arrays: one pair, or the sum of several, along some of its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_sdi.plotting._arguments import Array, check_position, finite_array
from captum_sdi.scores.influence_map import InfluenceMap

TEST_TEXT, TRAIN_TEXT = ("token", "position"), ("train_token", "train_position")
"""Axes along the words of a text."""


def check_map(split: Any) -> InfluenceMap:
    """Refuse what is no map.

    Returns:
        The map.

    Raises:
        ValueError: If it is none, or has a number that is not finite.
    """
    if not isinstance(split, InfluenceMap):
        raise ValueError(f"map must be what SDIInfluence.influence_map returned, got {type(split).__name__}.")
    finite_array("map.values", split.values)
    return split


def check_axis(name: str, axis: str, split: InfluenceMap) -> str:
    """Refuse an axis that a map does not have.

    Returns:
        Its name.

    Raises:
        ValueError: If it has not.
    """
    if axis not in split.axes:
        raise ValueError(f"{name}={axis!r} is no axis of this map, which has {split.axes}.")
    return axis


def values_along(
    split: InfluenceMap,
    axes: Sequence[str],
    test: int,
    train: int | None,
) -> Array:
    """Return the values along some axes, in their order, summed over all others.

    Args:
        split: The map.
        axes: Of the map.
        test: The test example, from 0.
        train: The place of the train example among the test example's, from 0; None: their sum.
    """
    q, k = split.indices.shape
    pair_values = split.values[check_position("test", test, q)]
    pair_values = pair_values.sum(0) if train is None else pair_values[check_position("train", train, k)]
    places = [split.axes.index(axis) for axis in axes]
    summed_places = [place for place in range(pair_values.ndim) if place not in places]
    kept = [place for place in range(pair_values.ndim) if place in places]
    summed = pair_values.sum(summed_places) if summed_places else pair_values
    return finite_array("map.values", summed.permute([kept.index(place) for place in places]))


def names_along(
    split: InfluenceMap,
    axis: str,
    test: int,
    train: int | None,
) -> list[str]:
    """Return what the places along an axis are called in a picture: tokens as text, steps counted from 1."""
    if axis in TEST_TEXT or (axis in TRAIN_TEXT and train is not None):
        tokens = split.tokens_along(axis, test, train or 0)
        if tokens is not None:
            return list(tokens)
    labels = split.labels[axis]
    if axis in ("step", "train_step"):
        return [str(label + 1) if isinstance(label, int) else label for label in labels]
    return [str(label) for label in labels]


def without_empty_ends(
    split: InfluenceMap,
    axis: str,
    values: Array,
    names: list[str],
) -> tuple[Array, list[str]]:
    """Leave out a prelude and a coda in which nothing happened; ``values`` have the axis first."""
    if axis not in ("step", "train_step"):
        return values, names
    kept = [place for place, name in enumerate(names) if name not in ("prelude", "coda") or values[place].any()]
    return values[kept], [names[place] for place in kept]


def pair_name(split: InfluenceMap, test: int, train: int | None) -> str:
    """Return what a picture is of."""
    k = split.indices.shape[1]
    if "group" in split.axes:  # groups take the place of train examples
        return f"test {test}"
    if train is None and k > 1:
        return f"{k} train examples, test {test}"
    index = int(split.indices[test, train or 0])
    return f"train example #{index}, test {test}"
