"""Rows of files that are no JSON lines: text, CSV, Parquet, a JSON array, a folder of `datasets`, or the Hub's."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captum_sdi.cli.places import may_be_on_hub
from captum_sdi.data.fields import unique_keys
from captum_sdi.whole_file import check_regular

DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")
"""One of them is in every folder that `datasets` saved."""


def read_table(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a file, of a folder that `datasets` saved, or of a data set on the Hub."""
    if may_be_on_hub(path):
        return read_hub_dataset(str(path), split)
    if is_dataset_folder(path):
        return read_dataset(path, split)
    check_regular(path)
    if is_plain_text(path):
        return read_text_lines(path)
    read_rows = READERS.get(path.suffix, read_json_lines)
    return read_rows(path)


def is_plain_text(path: Path) -> bool:
    """Return whether a file holds a text in each line: it ends in .txt, and does not begin as JSON does."""
    if path.suffix != ".txt":
        return False
    with path.open("rb") as file:
        return not file.read(1024).lstrip().startswith(b"{")


def read_text_lines(path: Path) -> list[dict[str, Any]]:
    """Return a row for each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}.") from error
    return [{"text": line} for line in lines if line.strip()]


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of text whose first line names the columns."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"{path}, row {number}: it has more or fewer cells than the first line has names.")
    return rows


def read_json_array(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON array."""
    try:
        rows = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}. Of one example per line, let its name end in .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a JSON array of examples; of one example per line, name it .jsonl.")
    return rows


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one of them in each line."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line, object_pairs_hook=unique_keys))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: {error}.") from error
    return rows


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("Parquet files are read by pyarrow: pip install pyarrow.") from error
    try:
        table = parquet.read_table(path)
        table.validate(full=True)  # Arrow reads where a damaged file tells it to, and ends the process
        return table.to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or is damaged: {first_line(error)}.") from error


def read_dataset(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a folder that `datasets` saved."""
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError("Such a folder is read by datasets: pip install datasets.") from error
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises nearly anything: KeyError, TypeError, ...
        raise damaged_dataset(path, error) from error
    if isinstance(dataset, dict):
        dataset = split_of(dataset, path, split)
    elif split is not None:
        raise ValueError(f"--split {split}: {path} has no splits.")
    try:
        dataset.data.validate(full=True)  # Arrow reads where a damaged file tells it to, and ends the process
        return [dict(row) for row in dataset]
    except Exception as error:
        raise damaged_dataset(path, error) from error


def read_hub_dataset(name: str, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a data set that the Hub gives, or gave before."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name} is no file; data sets of the Hub are read by datasets: pip install datasets."
        ) from error
    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:  # of the Hub, the network, the files or the names of splits: all kinds
        raise ValueError(f"{name} is no file, and datasets cannot load it: {first_line(error)}.") from error
    if split is None:
        dataset = split_of(dataset, name, split)
    return [dict(row) for row in dataset]


def split_of(splits: Any, place: object, split: str | None) -> Any:
    """Return one of the splits of a data set: the one that is named, or the only one.

    Raises:
        ValueError: If there is none of that name, or none is named of several.
    """
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"{place} has the splits {', '.join(splits)}: say which one with --split.")
    return splits[split]


def damaged_dataset(path: Path, error: Exception) -> ValueError:
    """Return the error of a folder that `datasets` cannot read."""
    return ValueError(f"{path} cannot be read by datasets, or is damaged: {type(error).__name__}, {first_line(error)}.")


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, without a period."""
    return str(error).partition("\n")[0].rstrip(".")


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".json": read_json_array,
    ".parquet": read_parquet,
}
"""By the end of a file's name; any other is one of JSON lines, or plain text."""


def is_dataset_folder(path: Path) -> bool:
    """Return whether `datasets` saved a folder."""
    return path.is_dir() and any((path / name).is_file() for name in DATASET_FILES)


def named_rows(
    rows: list[dict[str, Any]],
    path: Path,
    text_column: str | None,
) -> list[dict[str, Any]]:
    """Return the rows with the text under its own name."""
    if text_column is None:
        return rows
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or text_column not in row:
            names = sorted(row) if isinstance(row, dict) else "no object"
            raise ValueError(f"{path}, row {number}: there is no --text-column {text_column}, only {names}.")
    return [{"text": row[text_column], **without(row, text_column)} for row in rows]


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a row without one of its fields, and without what was called a text before."""
    return {field: value for field, value in row.items() if field not in (name, "text")}
