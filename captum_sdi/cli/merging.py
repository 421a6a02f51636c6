"""The command that merges indexes. What goes wrong is an exception, of which `captum_sdi.__main__` prints one line."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from captum_sdi.cli.printing import is_first_process, print_unless_quiet
from captum_sdi.cli.recipe import NAME, Recipe
from captum_sdi.cli.rows import joined_digest
from captum_sdi.index import SketchIndex


def merge(options: Namespace) -> None:
    """Run ``captum-sdi merge``: join the indexes of parts of the training examples to one."""
    if not is_first_process():
        return
    recipe = merged_recipe(options.parts)
    merged = SketchIndex.merge(options.index, options.parts)
    recipe.write(options.index)
    print_unless_quiet(merged, options)


def merged_recipe(parts: Sequence[Path]) -> Recipe:
    """Return the recipe of all parts: the first part's, with the training files of all.

    Raises:
        ValueError: If a part has none, or one that gives other numbers.
    """
    recipes = [recipe_of_part(part) for part in parts]
    first = recipes[0]
    train: list[str] = []
    for part, recipe in zip(parts, recipes, strict=True):
        train += recipe.train
        differences = recipe.differences(first)
        if differences:
            raise ValueError(f"{part} was made with {'; '.join(differences)}, as {parts[0]} was.")
    digests = [recipe.train_digest for recipe in recipes if recipe.train_digest and len(recipe.train) == 1]
    # Of a part of several files only a digest of all is known: they are then checked line by line.
    digest = joined_digest(digests) if len(digests) == len(train) else None
    if len(recipes) == 1:
        digest = first.train_digest
    return dataclasses.replace(first, train=tuple(train), train_digest=digest)


def recipe_of_part(part: Path) -> Recipe:
    """Read a part's recipe, or say how to write one."""
    recipe = Recipe.read(part)
    if recipe is None:
        raise ValueError(
            f"{part} does not say how it was built: there is no {NAME} in it. Indexes made in Python are merged in "
            "Python, with SketchIndex.merge."
        )
    return recipe
