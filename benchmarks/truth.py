"""What predicts retraining, in total and by loop step? `make truth`, or `python benchmarks/truth.py [bed ...]`.

Every method scores the same models, trained by AdamW; the truth is these models trained again without some of their
examples, in the same order from the same start. Results go to truth.json, truth.md, truth.png and gauge.png beside this
file. Retrained weights and scores are kept in a cache: what was interrupted goes on, and more subsets or another seed
only add to it.

    make truth ARGS=--small                                  # does it run? Results go to the temporary folder
    python benchmarks/truth.py text --seeds 0 --subsets 16   # a part
    python benchmarks/truth.py --peers                       # beside other libraries, those that are installed
    python benchmarks/truth.py --tables                      # measure nothing: tables and pictures of truth.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from retraining import beds, study, tables
from retraining.measuring import LEFT_OUT, Counts
from retraining.pictures import draw_costs, draw_gauge

BEDS: dict[str, Callable[[int], beds.Bed]] = {
    "parity": beds.smooth_parity,
    "text": beds.text_bed,
    "hops": beds.hop_bed,
    "hops, float64": lambda seed: beds.hop_bed(seed, torch.float64),
    "parity, 3e-3": beds.rough_parity,
}
HERE = Path(__file__).parent
PERCENT = (5, 20, 50)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "truth.json"
    chosen = [] if options.tables else options.beds or list(BEDS)
    for name in chosen:
        start = time.perf_counter()
        results = study.study(
            named(name, options),
            options.counts,
            options.cache,
            options.methods,
            peers=options.peers,
            own=options.own,
        )
        record(path, name, {"environment": environment(), "minutes": minutes_since(start), **results})
    if options.gauge:
        start = time.perf_counter()
        runs = study.gauge_study(options.cache, small=options.small)
        record(path, "gauge", {"environment": environment(), "minutes": minutes_since(start), "runs": runs})
    results = json.loads(path.read_text())
    text = tables.document(results)
    (options.out / "truth.md").write_text(text, encoding="utf-8")
    print(text)
    draw_costs(results, options.out / "truth.png")
    if "gauge" in results:
        draw_gauge(results["gauge"]["runs"], options.out / "gauge.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("beds", nargs="*", metavar="bed", help=f"default: all of {', '.join(BEDS)}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--left-out", type=int, default=24, help="examples that are left out one at a time")
    parser.add_argument("--subsets", type=int, default=64, help="models for each share that is removed")
    parser.add_argument("--removed", nargs="*", type=int, choices=PERCENT, default=PERCENT, help="percent")
    parser.add_argument("--tests", type=int, help="how many of a bed's tests are asked about; default: all")
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--peers", action="store_true", help="other libraries, too")
    parser.add_argument("--own", action="store_true", help="each test's own top 10%% removed, too")
    parser.add_argument("--gauge", action="store_true", help="metasmoothness against agreement, over many runs")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "captum_sdi_truth")
    parser.add_argument("--out", type=Path, help="folder for the results; default: this one, or a temporary one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="tiny beds: does it run?")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    options = parser.parse_args()
    unknown = set(options.beds) - set(BEDS)
    if unknown:
        parser.error(f"no beds {sorted(unknown)}; choose from {', '.join(BEDS)}")
    if options.out is None:
        # The numbers of tiny beds mean nothing and must not replace real ones.
        options.out = options.cache / "small" if options.small else HERE
    kinds = (LEFT_OUT, *(f"{percent}% removed" for percent in options.removed))
    options.counts = Counts(options.left_out, options.subsets, kinds)
    if options.small:
        options.counts = Counts(left_out=3, subsets=3, kinds=kinds)
        options.seeds = options.seeds[:1]
    return options


def named(name: str, options: argparse.Namespace) -> list[beds.Bed]:
    """Return a bed with each seed."""
    of_seeds = [beds.with_tests(BEDS[name](seed), options.tests) for seed in options.seeds]
    return [beds.shortened(bed) for bed in of_seeds] if options.small else of_seeds


def record(path: Path, name: str, results: dict[str, Any]) -> None:
    """Write a bed's results beside those of others, which may have been measured meanwhile."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(rounded(earlier | {name: results}), indent=1) + "\n")
    print(f"{name}: {results['minutes']:.1f} minutes", flush=True)


def rounded(entry: Any) -> Any:
    """Return results with four decimals, which is more than they are good for."""
    if isinstance(entry, float):
        return round(entry, 4)
    if isinstance(entry, list):
        return [rounded(part) for part in entry]
    if isinstance(entry, dict):
        return {name: rounded(part) for name, part in entry.items()}
    return entry


def minutes_since(start: float) -> float:
    return (time.perf_counter() - start) / 60


if __name__ == "__main__":
    main()
