"""Everything side by side: `make bench`, or `python benchmarks/run.py [section ...]`.

Writes results.json, results.png and the tables of README.md. A section that is not asked for keeps its last result.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import accuracy
import memory
import scaling
import speed
import stages
from draw import draw
from environment import environment
from tables import tables

SECTIONS = {
    "paper_shape": speed.paper_shape,
    "with_biases": speed.with_biases,
    "hugging_face_gpt2": speed.hugging_face_gpt2,
    "deep_and_checkpointed": speed.deep_and_checkpointed,
    "scaling": scaling.scaling,
    "memory": memory.peaks,
    "held": memory.held,
    "accuracy": accuracy.accuracy,
    "stages": stages.stages,
}
PICTURED = {"scaling", "memory", "accuracy"}
MARKS = "<!-- tables: written by run.py -->", "<!-- end of tables -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the results")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--tables", action="store_true", help="measure nothing: tables and picture of results.json")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no sections {sorted(unknown)}; choose from {', '.join(SECTIONS)}")
    if options.small and options.out == Path(__file__).parent:
        parser.error("--small needs --out=FOLDER: its numbers mean nothing and must not replace real ones")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    for name in [] if options.tables else options.sections or SECTIONS:
        start = time.perf_counter()
        found = SECTIONS[name](options.small)
        _record(path, name, {"environment": environment(), "minutes": (time.perf_counter() - start) / 60, **found})
    results = json.loads(path.read_text())
    text = tables(results, SECTIONS)
    if results.keys() >= PICTURED:
        draw(results, options.out / "results.png")
        text = f"![Time, memory and error](results.png)\n\n{text}"
    print(text)
    _insert(options.out / "README.md", text)


def _record(path: Path, name: str, found: dict[str, Any]) -> None:
    """Read again first: another section may be measured meanwhile."""
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
    print(f"{name}: {found['minutes']:.1f} minutes", flush=True)


def _insert(readme: Path, text: str) -> None:
    """Between the marks of the README, where there is one."""
    if not readme.exists():
        return
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    readme.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
