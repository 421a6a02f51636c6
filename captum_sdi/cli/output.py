"""The folder that results go to: only what this program wrote there is replaced or removed, and all of it at once."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from captum_sdi.cli.config import RUN
from captum_sdi.whole_file import UNFINISHED, check_replaceable

LINES, ARRAYS, TENSORS, SPREADSHEET = "scores.jsonl", "scores.npz", "scores.safetensors", "scores.csv"
PAGE = "page.html"
FILES = "files"
"""Under this note, ``scores.safetensors`` lists what was written together with it."""

COMPLETE = ".scores-complete"
"""The folder, inside that of the results, whose files are whole and on their way to their places."""

ABANDONED_AFTER = 24 * 60 * 60
"""Seconds after which nobody writes into a folder any more that takes seconds to write."""

PICTURES = re.compile(r"(trajectories-\d+|heatmap-\d+|totals|step-share)\.(png|pdf|svg)")


def is_result(name: str) -> bool:
    """Return whether a file of that name may be one of ours."""
    return name in (LINES, ARRAYS, TENSORS, SPREADSHEET, PAGE, RUN) or PICTURES.fullmatch(name) is not None


def listed_files(folder: Path) -> set[str]:
    """Return the names of the files that an earlier run says it wrote into the folder."""
    file = folder / TENSORS
    if file.is_symlink() or not file.is_file():
        return set()
    try:
        with safe_open(file, "np") as tensors:  # for which torch is not imported
            names = json.loads((tensors.metadata() or {}).get(FILES, "[]"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return set()
    if not isinstance(names, list):
        return set()
    return {name for name in names if isinstance(name, str) and is_result(name)}


def check_output_folder(
    folder: Path,
    *,
    overwrite: bool,
    pictures: bool,
    page: bool = False,
) -> None:
    """Check, before hours of work, that results have a folder to go to, and that nothing is in the way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder.")
    if not folder.exists():
        return
    finish_interrupted(folder)
    names = sorted(name for name in os.listdir(folder) if is_result(name))
    if not pictures:
        names = [name for name in names if not PICTURES.fullmatch(name)]
    if not page:
        names = [name for name in names if name != PAGE]
    if LINES in names and not overwrite:
        raise ValueError(f"{folder} holds the results of an earlier run: name another --out, or say --overwrite.")
    check_in_the_way(folder, names, overwrite=overwrite)


def check_in_the_way(
    folder: Path,
    names: Collection[str],
    *,
    overwrite: bool,
) -> None:
    """Check that no file has one of the names, or that those which have may be replaced."""
    for name in sorted(names):
        if not overwrite and os.path.lexists(folder / name):
            raise ValueError(f"{folder / name} is in the way: name another --out, or say --overwrite to replace it.")
        check_replaceable(folder / name)


@contextmanager
def written_whole(
    folder: Path,
    *,
    overwrite: bool,
    keep: bool = False,
) -> Iterator[Path]:
    """Write files into a folder beside their place, and put all of them there at the end, or none.

    A link to the folder stays one. Files that an earlier run lists as its own are removed, unless `keep` is said.

    Yields:
        The folder to write into.

    Raises:
        ValueError: If something is in the way at the end; the message says where the new files are.
    """
    folder = Path(os.path.realpath(folder))
    parent = folder if folder.is_dir() else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, folder.name)
    stage = parent / f".{folder.name}.{secrets.token_hex(4)}{UNFINISHED}"
    stage.mkdir()
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    try:
        put_in_place(stage, folder, overwrite=overwrite, keep=keep)
    except (OSError, ValueError) as error:
        place = stage if stage.exists() else folder / COMPLETE
        raise ValueError(f"{without_period(error)} The new files are in {place}.") from error


def remove_abandoned(parent: Path, name: str) -> None:
    """Remove what processes that were killed while they wrote results of that name left beside their place.

    Only folders that `written_whole` makes, of results alone, into which nothing was written for a day.
    """
    long_ago = time.time() - ABANDONED_AFTER
    for stage in parent.glob(f".{glob.escape(name)}.*{UNFINISHED}"):
        is_ours = re.fullmatch(r"[0-9a-f]{8}", stage.name[len(name) + 2 : -len(UNFINISHED)])
        if not is_ours or stage.is_symlink() or not stage.is_dir():
            continue
        files = list(stage.iterdir())
        is_old = all(file.lstat().st_mtime < long_ago for file in (stage, *files))
        if is_old and all(is_result(file.name) or file.name.endswith(UNFINISHED) for file in files):
            shutil.rmtree(stage, ignore_errors=True)


def put_in_place(
    stage: Path,
    folder: Path,
    *,
    overwrite: bool,
    keep: bool,
) -> None:
    """Put what was written in its place; from one renaming on, also if this process is killed."""
    if not folder.exists():
        stage.rename(folder)
        return
    finish_interrupted(folder)
    names = set(os.listdir(stage))
    listed = listed_files(folder)
    replaced = names & listed if keep else set()
    check_in_the_way(folder, names - replaced, overwrite=overwrite)
    check_in_the_way(folder, replaced | stale_files(stage, folder), overwrite=True)
    stage.rename(folder / COMPLETE)
    finish_interrupted(folder)


def finish_interrupted(folder: Path) -> None:
    """Put new results in their places, if they are complete: a process may have been killed while it did so.

    Raises:
        ValueError: If a link, a folder or a device has come in the way.
    """
    complete = folder / COMPLETE
    if not os.path.lexists(complete):
        return
    if complete.is_symlink() or not complete.is_dir():
        raise ValueError(f"{complete} is not the folder that captum-sdi score makes there for a moment: remove it.")
    names = {name for name in os.listdir(complete) if is_result(name)}
    stale = stale_files(complete, folder)
    check_in_the_way(folder, names | stale, overwrite=True)
    for name in sorted(names - {TENSORS}):
        os.replace(complete / name, folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    if TENSORS in names:  # the old list is needed to the end
        os.replace(complete / TENSORS, folder / TENSORS)
    complete.rmdir()


def stale_files(new: Path, folder: Path) -> set[str]:
    """Return which files of the results in a folder do not belong to the new ones."""
    return listed_files(folder) - listed_files(new) if (new / TENSORS).exists() else set()


def without_period(error: Exception) -> str:
    """Return an error's message, ended by one period."""
    return f"{str(error).rstrip('.')}."
