"""What each command does, step by step; errors are exceptions, which `captum_sdi.__main__` makes one line of."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from captum_sdi.cli import pictures
from captum_sdi.cli.loading import attribution, load_encoder, load_model, resolved_checkpoints
from captum_sdi.cli.options import FORMATS
from captum_sdi.cli.recipe import NAME, Recipe
from captum_sdi.cli.results import ARRAYS, LINES, TENSORS, Results
from captum_sdi.cli.rows import Encoder, JsonLines
from captum_sdi.cost import estimate, readable_size
from captum_sdi.index import SketchIndex
from captum_sdi.index.manifest import NAME as MANIFEST
from captum_sdi.influence import SDIInfluence
from captum_sdi.scores.result import StepInfluence


def index(options: argparse.Namespace) -> None:
    """``captum-sdi index``: everything is checked before the first file is written.

    Args:
        options: What was typed.

    Raises:
        ValueError: The folder holds an index of something else.
    """
    recipe, folder = Recipe.of(options), options.index
    recipe = dataclasses.replace(recipe, checkpoints=resolved_checkpoints(recipe))
    earlier = Recipe.read(folder)
    if earlier is not None and (differences := earlier.differences(recipe)):
        raise ValueError(
            f"{folder} holds an index made with {'; '.join(differences)}. Name another --index, or say the same."
        )
    model, encode = _loaded(recipe, options)
    train = JsonLines(options.train, encode, show_progress=_shows(options))
    _note(train, options)
    recipe = dataclasses.replace(recipe, train_digest=train.digest)
    sdi = attribution(recipe, model, train, folder)
    if options.dry_run:
        _print(f"{estimate(sdi, longest=train.longest)}; {readable_size(_free(folder))} are free")
        return
    recipe = dataclasses.replace(recipe, batch_size=sdi.batch_size)
    _build(sdi, recipe, folder, _shows(options))
    _say(SketchIndex.open(folder), options)


def score(options: argparse.Namespace) -> None:
    """``captum-sdi score``.

    Args:
        options: What was typed.

    Raises:
        ValueError: There is no index, results are in the way, or ``--rerank`` chooses among too few.
    """
    _check_free(options.out, options.overwrite)
    if options.rerank is not None and options.rerank < options.k:
        raise ValueError(f"--rerank {options.rerank} must be at least -k {options.k}: it chooses among so many.")
    recipe = _recipe(options)
    model, encode = _loaded(recipe, options)
    queries = JsonLines(options.query, encode, show_progress=_shows(options))
    _note(queries, options)
    train = JsonLines(recipe.train, encode, recipe.train_digest, show_progress=_shows(options))
    sdi = attribution(recipe, model, train, options.index, options.n_loops)
    scores = _scored(sdi, queries, options)
    if not _is_first_process():
        return
    results = Results.of(scores, queries, train, not options.opponents)
    _clear(options.out)
    results.write(options.out)
    names = [LINES, ARRAYS, TENSORS]
    if options.pictures:
        names += pictures.draw(results, range(len(queries))[: options.pictures], 5, options.out, options.format)
    _say(f"{results}\n{options.out}: {', '.join(names)}", options)


def plot(options: argparse.Namespace) -> None:
    """``captum-sdi plot``.

    Args:
        options: What was typed.

    Raises:
        ValueError: There are no results, or not that query among them.
    """
    results, out = Results.read(options.results), options.out or options.results
    everything = range(len(results.lines))
    queries = options.query or everything[: options.pictures]
    if absent := sorted(set(queries) - set(everything)):
        raise ValueError(f"--query {absent[0]}: {options.results} holds the queries 0 to {everything[-1]}.")
    names = pictures.draw(results, queries, options.k, out, options.format)
    _say(f"{out}: {', '.join(names)}", options)


def show(options: argparse.Namespace) -> None:
    """``captum-sdi show``.

    Args:
        options: What was typed.
    """
    _print(_opened(options.index))


def demo(options: argparse.Namespace) -> None:
    """``captum-sdi demo``.

    Args:
        options: What was typed.

    Raises:
        ImportError: What the demo trains with is not installed.
    """
    try:
        from captum_sdi.demo import run  # imports transformers.Trainer, which needs the extra `train`

        run(options.out, options.seed, options.steps)
    except ImportError as error:
        raise ImportError(f"{error} - install what the demo trains with: pip install 'captum-sdi[train]'") from error


# --- what they share ---


def _build(sdi: SDIInfluence, recipe: Recipe, folder: Path, show_progress: bool) -> None:
    try:
        sdi.build_index(show_progress)
    except KeyboardInterrupt:
        _record(recipe, folder)  # captum-sdi score may complete it, too
        raise
    _record(recipe, folder)


def _record(recipe: Recipe, folder: Path) -> None:
    """Only where an index is: beside other files there would never be one."""
    if _is_first_process() and (folder / MANIFEST).is_file():
        recipe.write(folder)


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of the index that is to be scored, and where its things are now."""
    _opened(options.index)
    moved = {name: getattr(options, name) for name in ("model", "checkpoints", "train", "tokenizer")}
    recipe = Recipe.read(options.index, **moved)
    if recipe is None:
        raise ValueError(
            f"{options.index} does not say how it was built: there is no {NAME} in it. Run captum-sdi index again as "
            "it was run, which completes it; an index made in Python is scored in Python, with "
            "SDIInfluence(..., index=...)."
        )
    if not Path(recipe.train).is_file():
        raise ValueError(f"There are no training examples at {recipe.train}; say with --train where they are.")
    return dataclasses.replace(
        recipe,
        checkpoints=resolved_checkpoints(recipe),
        batch_size=options.batch_size or recipe.batch_size,
        trust_remote_code=options.trust_remote_code,  # a folder, which may come from a stranger, cannot grant it
    )


def _loaded(recipe: Recipe, options: argparse.Namespace) -> tuple[PreTrainedModel, Encoder]:
    if options.quiet:
        disable_progress_bar()  # transformers has one for loading weights
    model = load_model(recipe, options.device)
    return model, load_encoder(recipe, model)


def _scored(sdi: SDIInfluence, queries: JsonLines, options: argparse.Namespace) -> StepInfluence:
    rank_by = None if options.rank_by is None else options.rank_by - 1
    ranking = {"rank_by": rank_by, "rerank": options.rerank}
    try:
        return sdi.step_influence(queries, options.k, not options.opponents, _shows(options), **ranking)
    except ValueError as error:
        if str(error).startswith("rank_by="):  # which counts from 0
            raise ValueError(f"--rank-by {options.rank_by}: no query runs that many loop steps.") from error
        raise


def _opened(folder: Path) -> SketchIndex:
    if not folder.is_dir():
        raise ValueError(f"There is no index at {folder}; captum-sdi index writes one.")
    return SketchIndex.open(folder)


def _check_free(folder: Path, overwrite: bool) -> None:
    """Before hours of work: results have a place to go."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder.")
    if (folder / LINES).exists() and not overwrite:
        raise ValueError(f"{folder} holds the results of an earlier run: name another --out, or say --overwrite.")


def _clear(folder: Path) -> None:
    """Removes an earlier run's files, of which a later one may write fewer."""
    for pattern in (LINES, ARRAYS, TENSORS, *(f"{name}.{end}" for name in pictures.NAMES for end in FORMATS)):
        for file in folder.glob(pattern):
            file.unlink()


def _free(folder: Path) -> int:
    """Bytes on the disk that a folder is on, or will be."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def _is_first_process() -> bool:
    """Of those of an `accelerate launch` or `torchrun`, which share the work."""
    return os.environ.get("RANK", "0") == "0"


def _shows(options: argparse.Namespace) -> bool:
    return not options.quiet and _is_first_process()


def _note(data: JsonLines, options: argparse.Namespace) -> None:
    """What was read, beside the output that a pipe would take."""
    if _shows(options):
        sys.stderr.write(f"{data.summary()}\n")


def _say(text: object, options: argparse.Namespace) -> None:
    if _shows(options):
        _print(text)


def _print(text: object) -> None:
    sys.stdout.write(f"{text}\n")
