"""A million texts: `python benchmarks/million.py` from a checkout; 12.3 GB of disk meanwhile.

A simulated index of a million examples, 12 parameters of 512 numbers in float16, is opened, scored whole for 16
questions and searched, in a process of its own whose memory is watched; and a tenth of it, to see what grows. From the
measured throughput follows a table up to a billion. Results go to million.json and million.md; `--small` is a smoke
test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import environment

from captum_sdi.checkpoints import Checkpoint
from captum_sdi.features import Noise
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.manifest import Manifest
from captum_sdi.index.processes import Processes
from captum_sdi.index.search import Search
from captum_sdi.index.shards import Shard
from captum_sdi.index.writer import SHARD_BYTES
from captum_sdi.scores.contract import pair_scores
from captum_sdi.scores.ranking import Ranking

PARAMETERS, DIM, QUESTIONS = 12, 512, 16
NAME = "simulated"
SEARCH = "top 10 of 16 questions"
RESULTS = Path(__file__).with_suffix(".json")

OPERATIONS = 1e14
"""A second of a card: assumed, none was at hand to measure."""
PER_TOKEN = 4 * 5.0e9
"""Operations of Ouro-1.4B's shape: 5.0e9 multiply-adds a token, forward and backward without weight gradients."""
TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a thousand examples: does it run?")
    parser.add_argument("--folder", type=Path, help="where the index is written meanwhile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--look-at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look_at:
        print(json.dumps(looked_at(options.look_at)))
        return
    results: dict[str, Any] = {"environment": environment()}
    for n in (100, 1_000) if options.small else (100_000, 1_000_000):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            began = time.perf_counter()
            index = written(Path(folder), n)
            writing = time.perf_counter() - began
            found = {"GB": index.bytes / 1e9, "writing, s": writing}
            command = [sys.executable, __file__, "--look-at", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[f"{n:,} examples"] = found | json.loads(done.stdout)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(results))
    print(page(results))


def written(folder: Path, n: int) -> SketchIndex:
    """An index of random rows, the same in every shard: what they say changes neither time nor memory."""
    rows = [(f"parameter {number}", DIM, *astuple(Noise(1 / DIM))) for number in range(PARAMETERS)]
    settings: dict[str, Any] = {
        "captum_sdi": NAME,
        "sketch": {"kind": "TensorSketch", "dim": DIM, "seed": 0, "pool": False},
        "parameters": {},
        "loop": {"modules": [], "anchors": []},
        "loss": "none",
        "forward_kwargs": "none",
    }
    checkpoint = {"weights": "", "hash tables": "", "learning rate": 1.0}
    manifest = Manifest(settings, "float16", rows, {NAME: checkpoint}, examples=n)
    index = SketchIndex(folder, manifest)
    index.folder(NAME).mkdir(parents=True)
    manifest.save(folder)
    size = max(1, SHARD_BYTES // (index.width * index.dtype.itemsize) // index.piece) * index.piece
    numbers = torch.randn(size, index.width, generator=torch.Generator().manual_seed(0))
    rows_of_shard = {"rows": numbers.to(index.dtype), "scales": torch.ones(size)}
    for start in range(0, n, size):
        positions = torch.arange(start, min(start + size, n))
        tensors = {name: tensor[: len(positions)] for name, tensor in rows_of_shard.items()}
        tensors["fingerprints"] = positions.unsqueeze(1).view(torch.uint8)
        Shard.write_stored(index.folder(NAME), start, tensors, manifest.owner(NAME))
    index.scan()
    return index


def looked_at(folder: Path) -> dict[str, float]:
    """Open an index, score it whole and search it."""
    opening, index = timed(lambda: SketchIndex.open(folder))
    tests = index.features(torch.randn(QUESTIONS, index.width))
    before = own_memory()
    peaks, finished = [before], threading.Event()

    def watch() -> None:
        while not finished.wait(0.01):
            peaks.append(own_memory())

    threading.Thread(target=watch, daemon=True).start()  # or a failure below would not end the process
    search = Search(index, Processes(torch.device("cpu")), [Checkpoint(NAME, None)], [tests], torch.float32)
    searching, _ = timed(lambda: search.top(Ranking(k=10, proponents=True)))
    scoring, n_scores = timed(lambda: sum(block.scores.values.numel() for block in search.scored_blocks(pair_scores)))
    checking, damaged = timed(index.verify)
    finished.set()
    assert not damaged
    assert n_scores % (QUESTIONS * index.n_examples) == 0
    found = {"own memory, MB": max(peaks) - before}
    for name, spent in (
        ("opening", opening),
        (SEARCH, searching),
        ("all scores of 16 questions", scoring),
        ("checksums, once per process", checking),
    ):
        found[f"{name}, s"] = spent.wall
        found[f"{name}, s of the processor"] = spent.processor
    return found


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    processor: float


def timed(work: Callable[[], Any]) -> tuple[Spent, Any]:
    began, processor_began = time.perf_counter(), time.process_time()
    answer = work()
    return Spent(time.perf_counter() - began, time.process_time() - processor_began), answer


def own_memory() -> float:
    """MB of the process's own, beside the maps of files, which the system may drop at any time."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1e3


# --- the page ---


def page(results: dict[str, Any]) -> str:
    measured = {name: found for name, found in results.items() if name != "environment"}
    largest = list(measured.values())[-1]
    gb_per_second = largest["GB"] / largest[f"{SEARCH}, s of the processor"]
    gb_per_example = largest["GB"] / int(list(measured)[-1].split()[0].replace(",", ""))
    lines = [
        "# A million texts",
        "",
        f"`python benchmarks/million.py`: {PARAMETERS} parameters x {DIM} numbers in float16 an example, one",
        f"checkpoint, {QUESTIONS} questions at once. Opening reads headers alone; checksums are compared before the",
        "first question of a process, and not again. Seconds of the processor are those of one thread, whoever",
        "else used the machine.",
        "",
        *measured_table(measured),
        "",
        f"On paper, at the {gb_per_second:.2f} GB/s that one thread searched: an example is {TOKENS} tokens of",
        "Ouro-1.4B's shape; a card sustains 1e14 operations a second (assumed, none was at hand) and holds 48 GB.",
        "",
        *paper_table(gb_per_example, gb_per_second),
        "",
        f"Measured with `{json.dumps(results['environment'])}`.",
        "",
    ]
    return "\n".join(lines)


def measured_table(measured: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| | {' | '.join(measured)} |", f"| --- |{' --- |' * len(measured)}"]
    for key in next(iter(measured.values())):
        cells = []
        for found in measured.values():
            cells.append(in_digits(found.get(key)))
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return lines


def paper_table(gb_per_example: float, gb_per_second: float) -> list[str]:
    lines = [
        "| texts | bytes | 16 questions | on 64 machines | building on a card | on 64 cards | cards for the rows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for texts in (10**6, 10**7, 10**8, 10**9):
        gigabytes = gb_per_example * texts
        hours = gigabytes / gb_per_second / 3600
        building = PER_TOKEN * TOKENS * texts / OPERATIONS / 3600
        times = [in_time(each) for each in (hours, hours / 64, building, building / 64)]
        lines.append(f"| {texts:,} | {gigabytes:,.0f} GB | {' | '.join(times)} | {max(1, round(gigabytes / 48)):,} |")
    return lines


def in_digits(number: float | None) -> str:
    if number is None:
        return "not measured"
    return f"{number:,.3g}" if number < 100 else f"{number:,.0f}"


def in_time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} s"
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:,.0f} h" if hours < 100 else f"{hours / 24:,.0f} days"


if __name__ == "__main__":
    main()
