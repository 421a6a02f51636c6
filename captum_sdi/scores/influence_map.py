"""`InfluenceMap`: the influence of chosen pairs split along named axes, saved and loaded without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from captum_sdi.scores import map_file, map_tables

Label = str | int
"""The name of a place along an axis: a layer, a checkpoint, a loop step or a position from 0."""
PAIR_AXES = 2
"""Test examples and their train examples come before the named axes."""
INDEPENDENT = ("layer", "parameter", "checkpoint", "update")
"""Axes along which sketches have hashes of their own: there variances add up."""


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no one truth value, and too many numbers
class InfluenceMap:
    """Influence of chosen train examples on test examples, split along named axes.

    Its sum along all axes is what `StepInfluence.influence_scores` says of the pair, up to rounding. Positive values
    are proponents. `SDIInfluence.influence_map` returns one, and describes the axes; any names will do here.

    Raises:
        ValueError: If the fields do not fit each other.

    Example:
        >>> values = torch.tensor([[[[0.5, 0.25], [1.0, -0.5]]]])  # one test and one train example, 2 layers, 2 steps
        >>> labels = {"layer": ("core.fc", "core.proj"), "step": (0, 1)}
        >>> split = InfluenceMap(values, ("layer", "step"), labels, indices=torch.tensor([[7]]))
        >>> split.sum("step").values
        tensor([[[0.7500, 0.5000]]])
        >>> split.sel(layer="core.proj", step=0).values
        tensor([[1.]])
        >>> split.top("step", 1).labels["step"]
        (0,)
        >>> print(split)
        InfluenceMap of 1 test example x 1 train example, total +1.2500
          layer  2: core.fc +0.7500, core.proj +0.5000
          step   2: 0 +1.5000, 1 -0.2500
    """

    values: Tensor
    """``(q, k, *axes)``."""
    axes: tuple[str, ...]
    """The names of the axes behind the pairs."""
    labels: Mapping[str, tuple[Label, ...]]
    """By axis, what its places are. Positions count the tokens of a text from 0."""
    indices: Tensor
    """``(q, k)`` the train examples."""
    errors: Tensor | None = None
    """``(q, k, *axes)`` the sketch's standard errors; None where scores are exact."""
    test_tokens: tuple[tuple[str, ...], ...] | None = None
    """Of each test example, the tokens at all its positions; None where no tokenizer was given."""
    train_tokens: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Of each train example, by its index, the tokens at all its positions."""

    def __post_init__(self) -> None:
        lengths = [len(self.labels.get(axis, ())) for axis in self.axes]
        pairs = tuple(self.indices.shape)
        expected = (*pairs, *lengths)
        axes_differ = len(set(self.axes)) == len(self.axes)
        axes_have_labels = set(self.labels) == set(self.axes)
        if not axes_differ or not axes_have_labels or len(pairs) != PAIR_AXES:
            raise ValueError(
                f"InfluenceMap needs labels for each of its axes {self.axes}, and indices (q, k); got labels for "
                f"{tuple(self.labels)} and indices of shape {pairs}."
            )
        for name, tensor in (("values", self.values), ("errors", self.errors)):
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ValueError(
                    f"InfluenceMap({name}=...) must be of shape {expected}: pairs, then as many places along "
                    f"{self.axes} as there are labels; got {tuple(tensor.shape)}."
                )
        if self.test_tokens is not None and len(self.test_tokens) != pairs[0]:
            raise ValueError(f"InfluenceMap has {pairs[0]} test examples, and tokens of {len(self.test_tokens)}.")

    # --- parts of it ---

    def sum(self, *axes: str) -> InfluenceMap:
        """Sum along axes, all of them where none is named.

        Returns:
            A map without them. Errors of layers, parameters and checkpoints are independent, and add in squares; those
            of steps and tokens share a sketch's hashes: what is returned then is an upper bound.

        Raises:
            ValueError: If the map has no such axis.
        """
        summed = self
        for axis in axes or self.axes:
            place = summed._place(axis)
            errors = summed.errors
            if errors is not None and axis in INDEPENDENT:
                errors = errors.square().sum(place).sqrt()
            elif errors is not None:
                errors = errors.sum(place)
            summed = summed._without(axis, summed.values.sum(place), errors)
        return summed

    def sel(self, **chosen: Label | Sequence[Label]) -> InfluenceMap:
        """Pick places along axes by their labels.

        Args:
            **chosen: By axis a label, and the axis is gone; or a list of labels, and it is as long as the list. Of one
                test example, a target token may be named by its text where it occurs once.

        Returns:
            A map of what was picked.

        Raises:
            KeyError: If an axis has no such label.
            ValueError: If the map has no such axis.
        """
        picked = self
        for axis, wanted in chosen.items():
            place = picked._place(axis)
            if isinstance(wanted, str | int):
                position = picked._at(axis, wanted)
                values = picked.values.select(place, position)
                errors = None if picked.errors is None else picked.errors.select(place, position)
                picked = picked._without(axis, values, errors)
                continue
            positions = [picked._at(axis, label) for label in wanted]
            picked = picked._picked(axis, positions)
        return picked

    def top(self, axis: str, k: int) -> InfluenceMap:
        """Keep the k places along an axis whose absolute sum, over pairs and all other axes, is the largest.

        Args:
            axis: Its name.
            k: How many; clipped to how many there are.

        Returns:
            A map of them, largest first.

        Raises:
            ValueError: If k is below 1, or the map has no such axis.
        """
        if k < 1:
            raise ValueError(f"top() needs a k of at least 1, got {k!r}.")
        place = self._place(axis)
        other_axes = [dimension for dimension in range(self.values.ndim) if dimension != place]
        sizes = self.values.sum(other_axes).abs()
        order = sizes.argsort(descending=True, stable=True)
        return self._picked(axis, order[:k].tolist())

    def total(self) -> Tensor:
        """Return the influence of each pair ``(q, k)``, the sum along all axes."""
        if not self.axes:
            return self.values
        pair_values = self.values.flatten(PAIR_AXES)
        return pair_values.sum(PAIR_AXES)

    def tokens_along(self, axis: str, test: int, train: int) -> tuple[str, ...] | None:
        """Return the tokens at the places of a token axis, for one pair.

        Args:
            axis: "token" or "position" of the test text, "train_token" or "train_position" of the train text.
            test: The test example, from 0.
            train: The place of the train example among the test example's, from 0.

        Returns:
            As many as the axis is long, empty beyond the text's end; None where the tokens are not known.
        """
        tokens: tuple[str, ...] | None = None
        if axis in ("token", "position") and self.test_tokens is not None:
            tokens = self.test_tokens[test]
        elif axis in ("train_token", "train_position"):
            train_example = int(self.indices[test, train])
            tokens = self.train_tokens.get(train_example)
        if tokens is None:
            return None
        places = [int(label) for label in self.labels[axis]]
        return tuple(tokens[place] if place < len(tokens) else "" for place in places)

    # --- elsewhere ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map to one safetensors file, whole or not at all, without pickle.

        Args:
            path: The file to write; an existing one is replaced.

        Raises:
            FileNotFoundError: If its folder does not exist.
            ValueError: If the path is a folder, a pipe or a device.
        """
        map_file.write_map(path, vars(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceMap:
        """Read what `save` wrote.

        Args:
            path: A file written by `save`.

        Returns:
            The map, on the CPU.

        Raises:
            ValueError: If the file holds something else, or is of a newer version.
        """
        fields = map_file.read_map(path)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {error}") from error

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row for each number: test, train, a column for each axis, influence, error.

        Raises:
            ImportError: If pandas is not installed.
        """
        return map_tables.data_frame(self)

    def to_xarray(self) -> Any:
        """Return a DataArray with the dimensions test, pair and the map's axes.

        Raises:
            ImportError: If xarray is not installed.
        """
        return map_tables.data_array(self)

    def __repr__(self) -> str:
        return map_tables.summary(self)

    def _repr_html_(self) -> str:
        """Return the sums along each axis as a table for notebooks."""
        return map_tables.html_table(self)

    # --- places ---

    def _place(self, axis: str) -> int:
        if axis not in self.axes:
            raise ValueError(f"The map has no axis {axis!r}; it has {self.axes}.")
        return PAIR_AXES + self.axes.index(axis)

    def _at(self, axis: str, label: Label) -> int:
        names: tuple[Label, ...] = self.labels[axis]
        if label not in names and isinstance(label, str) and len(self.indices) == 1:
            names = self.tokens_along(axis, 0, 0) or names
        n_found = names.count(label)
        if n_found == 1:
            return names.index(label)
        if n_found:
            places = [number for number, name in enumerate(names) if name == label]
            raise KeyError(f"{label!r} stands at {places} along {axis!r}: name one of these positions.")
        raise KeyError(f"There is no {label!r} along {axis!r}, but {map_tables.few(names)}.")

    def _picked(self, axis: str, places: list[int]) -> InfluenceMap:
        """Return the map of these places along an axis."""
        index = torch.tensor(places, dtype=torch.long, device=self.values.device)
        dimension = self._place(axis)
        values = self.values.index_select(dimension, index)
        errors = None if self.errors is None else self.errors.index_select(dimension, index)
        own_labels = tuple(self.labels[axis][place] for place in places)
        labels = {**self.labels, axis: own_labels}
        return replace(self, values=values, errors=errors, labels=labels)

    def _without(
        self,
        axis: str,
        values: Tensor,
        errors: Tensor | None,
    ) -> InfluenceMap:
        """Return the map of values that no longer have an axis."""
        axes = tuple(other for other in self.axes if other != axis)
        labels = {other: self.labels[other] for other in axes}
        return replace(self, values=values, errors=errors, axes=axes, labels=labels)
