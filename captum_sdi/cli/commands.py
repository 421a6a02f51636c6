"""The commands, step by step. What goes wrong is an exception, of which `captum_sdi.__main__` prints one line."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

from captum_sdi.cli import pictures
from captum_sdi.cli.config import RUN, write_run
from captum_sdi.cli.loading import build_influence, load_encoder, load_model, preconditioner_of, resolve_checkpoints
from captum_sdi.cli.output import (
    ARRAYS,
    LINES,
    PAGE,
    SPREADSHEET,
    TENSORS,
    check_output_folder,
    listed_files,
    written_whole,
)
from captum_sdi.cli.places import may_be_on_hub
from captum_sdi.cli.printing import is_first_process, print_line, print_summary, print_unless_quiet, shows_progress
from captum_sdi.cli.recipe import NAME, Recipe, seen_from_here
from captum_sdi.cli.results import Results
from captum_sdi.cli.scoring import open_queries, score_queries
from captum_sdi.cli.tables import AnyExamples, check_files, open_examples
from captum_sdi.cost import estimate
from captum_sdi.data.encoder import Encoder
from captum_sdi.index import SketchIndex
from captum_sdi.index.lock import free_bytes
from captum_sdi.index.manifest import NAME as MANIFEST
from captum_sdi.words import readable_size

# --- the commands ---


def index(options: Namespace) -> None:
    """Run ``captum-sdi index``: check everything, then write the first file."""
    folder = options.index
    check_files(options.train)
    recipe = Recipe.from_options(options)
    recipe = dataclasses.replace(recipe, checkpoints=resolve_checkpoints(recipe))
    check_same_recipe(recipe, folder)
    show_progress = shows_progress(options)
    model = load_model(recipe, options.device, quiet=options.quiet)
    train = open_train(recipe, load_encoder(recipe, model), show_progress=show_progress)
    print_summary(train, options)
    recipe = dataclasses.replace(recipe, train_digest=train.digest)
    sdi = build_influence(recipe, model, train, folder)
    if options.dry_run:
        cost = estimate(sdi, longest=train.longest)
        print_line(f"{cost}; {readable_size(free_bytes(folder))} are free")
        return
    recipe = dataclasses.replace(recipe, batch_size=sdi.batch_size)
    try:
        sdi.build_index(show_progress=show_progress)
    except KeyboardInterrupt:
        write_recipe(recipe, options)  # captum-sdi score may complete the index, too
        raise
    train.check_unchanged()
    write_recipe(recipe, options)
    print_unless_quiet(SketchIndex.open(folder), options)


def score(options: Namespace) -> None:
    """Run ``captum-sdi score``: find the strongest training examples, write them and draw them.

    Raises:
        ValueError: If ``--rerank`` leaves fewer candidates than ``-k`` training examples.
    """
    check_output_folder(options.out, overwrite=options.overwrite, pictures=options.pictures > 0, page=options.html)
    if options.rerank is not None and options.rerank < options.k:
        raise ValueError(f"--rerank {options.rerank} must be at least -k {options.k}: it chooses among so many.")
    show_progress = shows_progress(options)
    check_files(options.query or [])
    preconditioner = preconditioner_of(options)
    recipe = recipe_of_index(options)
    model = load_model(recipe, options.device, quiet=options.quiet)
    encoder = load_encoder(recipe, model)
    queries = open_queries(options, model, encoder, options.n_loops or recipe.n_loops)
    print_summary(queries, options)
    train = open_train(recipe, encoder, recipe.train_digest, show_progress=show_progress)
    sdi = build_influence(
        recipe,
        model,
        train,
        options.index,
        n_loops=options.n_loops,
        preconditioner=preconditioner,
        normalize=options.normalize,
    )
    scored = score_queries(sdi, queries, len(train), options)
    for examples in (queries, train):
        examples.check_unchanged()
    if not is_first_process():
        return
    results = Results.from_scores(scored.scores, queries, train, scored.roles)
    files = [LINES, SPREADSHEET, ARRAYS, TENSORS, RUN]
    if options.html:
        files.append(PAGE)
    with written_whole(options.out, overwrite=options.overwrite) as unfinished:
        if options.pictures:
            drawn = range(len(queries))[: options.pictures]
            files += pictures.draw(results, drawn, 5, unfinished, options.format, options.width)
        results.write(unfinished, files)
        write_run(options, unfinished)
    table = results.table(options.columns)
    listed = ", ".join(files)
    print_unless_quiet(f"{table}\n{options.out}: {listed}", options)


def plot(options: Namespace) -> None:
    """Run ``captum-sdi plot``: draw saved results.

    Raises:
        ValueError: If a query is not among the results.
    """
    results = Results.read(options.results)
    folder = options.out or options.results
    positions = range(len(results.lines))
    queries = options.query or positions[: options.pictures]
    absent = sorted(set(queries) - set(positions))
    if absent:
        raise ValueError(f"--query {absent[0]}: {options.results} holds the queries 0 to {positions[-1]}.")
    listed = listed_files(folder)
    with written_whole(folder, overwrite=options.overwrite, keep=True) as unfinished:
        files = pictures.draw(
            results,
            queries,
            options.k,
            unfinished,
            options.format,
            options.width,
        )
        if TENSORS in listed:
            results.write_tensors(unfinished, [*listed, *files])
    print_unless_quiet(f"{folder}: {', '.join(files)}", options)


def show(options: Namespace) -> None:
    """Run ``captum-sdi show``: print what is in an index."""
    print_line(SketchIndex.open(options.index))


def demo(options: Namespace) -> None:
    """Run ``captum-sdi demo``.

    Raises:
        ImportError: If a package that the demo trains with is not installed.
    """
    try:
        from captum_sdi.demo import run  # imports transformers.Trainer, which needs the extra `train`

        run(options.out, options.seed, options.steps)
    except ImportError as error:
        raise ImportError(f"{error} - install what the demo trains with: pip install 'captum-sdi[train]'") from error


# --- the recipe of an index ---


def check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Check that an index that is already in the folder was made with the same numbers."""
    earlier = Recipe.read(folder)
    differences = [] if earlier is None else earlier.differences(recipe)
    if differences:
        raise ValueError(
            f"{folder} holds an index made with {'; '.join(differences)}. Name another --index, or say the same."
        )


def write_recipe(recipe: Recipe, options: Namespace) -> None:
    """Write the recipe, and what was typed, into a folder that holds an index; other files are left alone."""
    if is_first_process() and (options.index / MANIFEST).is_file():
        recipe.write(options.index)
        write_run(options, options.index)


def open_train(
    recipe: Recipe,
    encoder: Encoder,
    digest: str | None = None,
    *,
    show_progress: bool,
) -> AnyExamples:
    """Open the training examples of a recipe; with a digest, they must be those that were indexed."""
    return open_examples(
        [seen_from_here(Path(path)) for path in recipe.train],
        encoder,
        digest,
        split=recipe.split,
        text_column=recipe.text_column,
        show_progress=show_progress,
    )


def recipe_of_index(options: Namespace) -> Recipe:
    """Return the recipe of the index to be scored, with what the options of scoring change."""
    SketchIndex.open(options.index)
    recipe = Recipe.read(
        options.index,
        model=options.model,
        checkpoints=options.checkpoints,
        train=options.train,
        tokenizer=options.tokenizer,
    )
    if recipe is None:
        raise ValueError(
            f"{options.index} does not say how it was built: there is no {NAME} in it. Run captum-sdi index again as "
            "it was run, which completes it; an index made in Python is scored in Python, with "
            "SDIInfluence(..., index=...)."
        )
    for path in recipe.train:
        if not Path(path).exists() and not may_be_on_hub(path):
            raise ValueError(f"There are no training examples at {path}; say with --train where they are.")
    check_files([Path(path) for path in recipe.train])
    return dataclasses.replace(
        recipe,
        checkpoints=resolve_checkpoints(recipe),
        batch_size=options.batch_size or recipe.batch_size,
        trust_remote_code=options.trust_remote_code,  # a folder, which may come from a stranger, cannot grant it
    )
