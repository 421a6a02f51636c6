"""Influence along further axes, such as layers and tokens, for the pairs that a map holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_sdi.report.chunks import rounded
from captum_sdi.report.extras import as_array
from captum_sdi.report.pairs import Array

TEST_TOKENS, TRAIN_TOKENS = ("token", "position"), ("train_token", "train_position")
"""Axes along which a map splits the test text, and the train text."""
STEPS = ("step", "train_step")
"""Axes whose labels count from 0; the page counts loop steps from 1."""


def map_rows(influence_map: Any, n_tests: int) -> list[dict[str, Any]]:
    """Return the map of each test example: its training examples, its axes with their labels, its values.

    Args:
        influence_map: An `InfluenceMap`, or what has its ``values`` (q, k, *axes), ``axes``, ``labels`` by axis and
            ``indices`` (q, k); its ``errors`` and ``tokens_along``, if it has them, say how far the sketch may be off,
            and what stands at the places of a text.
        n_tests: How many test examples the page has; a map may be of the first of them only.

    Returns:
        Of each test example ``train``, ``axes``, ``labels``, ``testTokens``, ``trainTokens``, and ``values`` and
        ``errors``, flat.

    Raises:
        TypeError: If it is no map.
        ValueError: If it is of more test examples than the page.
    """
    missing = [name for name in ("values", "axes", "labels", "indices") if not hasattr(influence_map, name)]
    if missing:
        raise TypeError(
            f"map must be what influence_map returns, an InfluenceMap; {type(influence_map).__name__} has no "
            f"{missing[0]}."
        )
    axes = [str(axis) for axis in influence_map.axes]
    values = as_array("map.values", influence_map.values)
    if values.ndim != 2 + len(axes) or len(values) > n_tests:
        raise ValueError(
            f"map.values must be of shape (q, k, {', '.join(axes)}) with at most {n_tests} test examples, got "
            f"{values.shape}."
        )
    errors = errors_of(influence_map, values.shape)
    labels = [axis_labels(axis, influence_map.labels[axis]) for axis in axes]
    rows = []
    for test in range(len(values)):
        trains = influence_map.indices[test].tolist()
        own_tokens = [tokens_at(influence_map, axes, TRAIN_TOKENS, test, place) for place in range(len(trains))]
        row = {
            "train": trains,
            "axes": axes,
            "labels": labels,
            "testTokens": tokens_at(influence_map, axes, TEST_TOKENS, test, 0),
            "trainTokens": own_tokens,
            "values": rounded(values[test].ravel()),
            "errors": None if errors is None else rounded(errors[test].ravel()),
        }
        rows.append(row)
    return rows


def errors_of(influence_map: Any, shape: tuple[int, ...]) -> Array | None:
    """Return the sketch's standard errors of a map; None where it has none, as one of exact scores.

    Raises:
        ValueError: If they are not of the shape of the map's values.
    """
    given = getattr(influence_map, "errors", None)
    if given is None:
        return None
    errors = as_array("map.errors", given)
    if errors.shape != shape:
        raise ValueError(f"map.errors must be of the shape of map.values, {shape}, got {errors.shape}.")
    return errors


def axis_labels(axis: str, labels: Sequence[Any]) -> list[str]:
    """Return the labels of an axis as the page shows them."""
    shown = []
    for label in labels:
        is_step = axis in STEPS and isinstance(label, int)
        shown.append(str(label + 1) if is_step else str(label))
    return shown


def tokens_at(
    influence_map: Any,
    axes: Sequence[str],
    wanted: Sequence[str],
    test: int,
    place: int,
) -> Any:
    """Return the tokens along the first of the wanted axes; None where the map does not know them."""
    text_axes = [axis for axis in wanted if axis in axes]
    if not text_axes or not hasattr(influence_map, "tokens_along"):
        return None
    tokens = influence_map.tokens_along(text_axes[0], test, place)
    return None if tokens is None else list(tokens)
