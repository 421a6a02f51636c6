"""truth.json as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from captum_sdi.evaluate import correlation
from retraining.peers import PEERS

Results = dict[str, Any]
Agreement = dict[str, Any]
"""`value`, `interval` and `seeds`."""

TRACIN, FISHER, HESSIAN, UNROLLED = (
    "TracIn / SDI, 4 checkpoints",
    "Fisher, TensorSketch(512)",
    "Hessian, rank 80",
    "unrolled",
)
LEFT_OUT, PER_STEP, DEVIATION = "leave one out", "mean over steps", "deviation from the step mean"
MISSING = "-"


def document(results: Results) -> str:
    """Return all of truth.md."""
    parts = [INTRODUCTION, goals(results)]
    for name, bed in results.items():
        if name != "gauge":
            parts.append(bed_section(name, bed))
    if "gauge" in results:
        parts.append(gauge_section(results["gauge"]["runs"]))
    parts.append(environments(results))
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# What predicts retraining?

Written by `truth.py`; [README.md](README.md#what-predicts-retraining) says how it was measured. Numbers are rank
correlations of predicted with measured rises of the test loss, averaged over tests and seeds, with 95% intervals over
tests and left-out examples drawn together. By step: the retrained block stands in for the model's own in that loop step
alone.

![Agreement with retraining against cost](truth.png)

Filled: totals; hollow, a little to the right: the mean over loop steps."""


def bed_section(name: str, bed: Results) -> str:
    """Return what was found on one bed."""
    parts = [f"## {name}", bed_facts(bed)]
    kinds = bed["agreement"]
    header = ["", *kinds, "seconds"]
    parts.append("Totals over all parameters:\n\n" + table(header, total_rows(bed)))
    for kind, found in kinds.items():
        steps = step_table(found)
        if steps:
            parts.append(f"By loop step, {kind}:\n\n{steps}")
    parts.append(difference_table(kinds))
    if "own fact first" in bed:
        parts.append(own_fact_table(bed["own fact first"]))
    if "own top 10% removed" in bed:
        parts.append(own_removal_table(bed["own top 10% removed"]))
    return "\n\n".join(part for part in parts if part)


def bed_facts(bed: Results) -> str:
    """Return what was trained, and its gauge."""
    models = ", ".join(f"{kind}: {count}" for kind, count in bed["models"].items())
    gauges = bed["gauge"]
    repeated = all(gauge["second run is bit-identical"] for gauge in gauges)
    smoothness = ", ".join(f"{gauge['metasmoothness']:.3f}" for gauge in gauges)
    near_zero = ", ".join(f"{gauge['parameters with second moments near zero']:.1%}" for gauge in gauges)
    seeds = ", ".join(map(str, bed["seeds"]))
    identical = "bit-identical" if repeated else "**not** bit-identical"
    return (
        f"{bed['parameters']:,} parameters, {bed['tests']} tests, seeds {seeds}; models for each seed: {models}. "
        f"A second run was {identical}. Metasmoothness {smoothness}; parameters whose second moment is near zero "
        f"{near_zero}."
    )


def total_rows(bed: Results) -> list[list[str]]:
    """Return a row for each method, and one for the truth of another seed."""
    kinds = bed["agreement"]
    rows = []
    for method, seconds in bed["seconds"].items():
        cells = [of_method(found, method, "total") for found in kinds.values()]
        rows.append([method, *cells, f"{seconds:.1f}" if seconds else MISSING])
    ceilings = [found["truth of another seed"] for found in kinds.values()]
    if any(ceiling is not None for ceiling in ceilings):
        rows.append(["the truth of another seed", *map(number, ceilings), MISSING])
    slopes = [of_method(kinds[LEFT_OUT], method, "slope") for method in (TRACIN, FISHER, HESSIAN, UNROLLED)]
    rows.append(["slope of measured on predicted: TracIn; Fisher; Hessian 80; unrolled", "; ".join(slopes)])
    return rows


def step_table(found: Results) -> str:
    """Return agreements by step of the methods that have steps."""
    methods = {name: agreements for name, agreements in found["methods"].items() if PER_STEP in agreements}
    if not methods:
        return ""
    columns = [what for what in next(iter(methods.values())) if what.startswith("step ")]
    columns += [PER_STEP, "all steps at once", DEVIATION]
    rows = []
    for name, agreements in methods.items():
        cells = [number(agreements[what]["value"]) for what in columns[:-3]]
        rows.append([name, *cells, *(with_interval(agreements[what]) for what in columns[-3:])])
    return table(["", *columns], rows)


def difference_table(kinds: Results) -> str:
    """Return paired differences of methods."""
    names = list(dict.fromkeys(name for found in kinds.values() for name in found["differences"]))
    if not names:
        return ""
    rows = []
    for name in names:
        cells = [with_interval(found["differences"].get(name)) for found in kinds.values()]
        rows.append([name, *cells])
    return "Paired differences:\n\n" + table(["", *kinds], rows)


def own_fact_table(shares: dict[str, Sequence[float]]) -> str:
    """Return how often the fact of a hop comes first at its own step."""
    n_steps = len(next(iter(shares.values())))
    header = ["", *(f"step {step + 1}" for step in range(n_steps))]
    rows = [[name, *map(number, of_steps)] for name, of_steps in shares.items()]
    return "Share of tests in which the fact of hop t comes first of all facts at step t:\n\n" + table(header, rows)


def own_removal_table(found: Results) -> str:
    """Return what taking each test's own top 10% away did to its loss."""
    rows = [[name, with_interval(rise, 3), f"{rise['share worse']:.0%}"] for name, rise in found.items()]
    header = ["ranked by", "rise of the test's loss", "higher in"]
    return "Each test's own first 10% of the train set taken away:\n\n" + table(header, rows)


def gauge_section(runs: Sequence[Results]) -> str:
    """Return metasmoothness beside the agreement of the unrolled derivative."""
    rows = []
    for run in sorted(runs, key=lambda run: run["metasmoothness"]):
        rows.append(
            [f"{run['run']}, seed {run['seed']}", f"{run['metasmoothness']:.3f}", with_interval(run["agreement"])]
        )
    agreement = f"Rank correlation over {len(runs)} runs: {number(gauge_correlation(runs))}."
    header = ["run", "metasmoothness", "unrolled, leave one out"]
    return f"## The gauge\n\n![Metasmoothness against agreement](gauge.png)\n\n{agreement}\n\n{table(header, rows)}"


def gauge_correlation(runs: Sequence[Results]) -> float | None:
    """Return the rank correlation of metasmoothness and agreement; None where all runs agree alike."""
    smoothness = [run["metasmoothness"] for run in runs]
    agreement = [run["agreement"]["value"] for run in runs]
    if max(agreement) - min(agreement) < 1e-9:
        return None
    return float(correlation([smoothness], [agreement]))


# --- what was to be reached ---


def goals(results: Results) -> str:
    """Return what was to be reached, and whether it was, of what has been measured."""
    rows = [*smooth_goals(results), *text_goals(results), *gauge_goals(results)]
    return "## What was to be reached\n\n" + table(["bed", "measure", "to reach", "measured", "reached"], rows)


def smooth_goals(results: Results) -> Iterable[list[str]]:
    """Yield the goals of the unrolled derivative on smooth beds."""
    for bed in ("parity", "text"):
        agreements = agreements_of(results, bed, LEFT_OUT, UNROLLED)
        if agreements is None:
            continue
        smoothness = [gauge["metasmoothness"] for gauge in results[bed]["gauge"]]
        name = f"{bed} (metasmoothness {sum(smoothness) / len(smoothness):.3f})"
        yield goal(name, "unrolled, leave one out: total", ">= .80", agreements["total"], 0.80)
        steps = [agreement for what, agreement in agreements.items() if what.startswith("step ")]
        weakest = min(steps, key=lambda agreement: agreement["value"])
        yield goal(name, "... every loop step (the weakest)", ">= .75", weakest, 0.75)
        yield goal(name, f"... {DEVIATION}", ">= .70", agreements[DEVIATION], 0.70)
        slope = agreements["slope"]
        reached = 0.8 <= slope["value"] <= 1.25
        yield [name, "... slope", ".8 to 1.25", with_interval(slope), yes(reached)]


def text_goals(results: Results) -> Iterable[list[str]]:
    """Yield the goals of text."""
    unrolled = agreements_of(results, "text", "5% removed", UNROLLED)
    if unrolled is not None:
        yield goal("text, 5% removed", "unrolled, LDS", ">= .70", unrolled["total"], 0.70)
        yield from peer_goals(results, "5% removed", UNROLLED)
    for kind in ("50% removed", "20% removed"):
        fisher = agreements_of(results, "text", kind, FISHER)
        tracin = agreements_of(results, "text", kind, TRACIN)
        if fisher is not None and tracin is not None:
            ratio = fisher["total"]["value"] / tracin["total"]["value"]
            differences = results["text"]["agreement"][kind]["differences"]
            difference = differences[f"{FISHER} - {TRACIN}, total"]
            is_shown = difference["interval"][0] > 0
            reached = yes(ratio >= 1.5) if is_shown else "not shown: the interval holds 0"
            measured = f"{ratio:.2f}; difference {with_interval(difference)}"
            yield [f"text, {kind}", "Fisher / TracIn", ">= 1.5", measured, reached]
            yield from peer_goals(results, kind, FISHER, ["TRAK, 2048, damped"])
    for kind in ("50% removed", "20% removed", "5% removed"):
        hessian = agreements_of(results, "text", kind, HESSIAN)
        if hessian is not None:
            yield goal(f"text, {kind}", "Hessian, rank 80, totals", ">= .75", hessian["total"], 0.75)
            yield from peer_goals(results, kind, HESSIAN)
    hessian = agreements_of(results, "text", "5% removed", HESSIAN)
    if hessian is not None:
        yield goal("text, 5% removed", "Hessian by loop step (mean)", "> .4 aimed at", hessian[PER_STEP], 0.4)
        yield goal("text, 5% removed", f"... {DEVIATION}", "reported", hessian[DEVIATION], None)


def peer_goals(results: Results, kind: str, method: str, peers: Iterable[str] = PEERS) -> Iterable[list[str]]:
    """Yield whether a method's totals are below those of the best peer that was measured on text."""
    methods = results["text"]["agreement"][kind]["methods"]
    measured = {name: methods[name]["total"] for name in peers if name in methods}
    if not measured:
        return
    best = max(measured, key=lambda name: measured[name]["value"])
    own = methods[method]["total"]
    reached = yes(own["value"] >= measured[best]["value"])
    found = f"{with_interval(own)} beside {with_interval(measured[best])}"
    yield [f"text, {kind}", f"{method}, beside the best of its peers, {best}", "not below", found, reached]


def gauge_goals(results: Results) -> Iterable[list[str]]:
    """Yield the goal of the gauge."""
    if "gauge" in results:
        runs = results["gauge"]["runs"]
        found = gauge_correlation(runs)
        what = f"rank correlation of metasmoothness with agreement, {len(runs)} runs"
        yield ["gauge", what, ">= .8", number(found), MISSING if found is None else yes(found >= 0.8)]


def agreements_of(results: Results, bed: str, kind: str, method: str) -> dict[str, Agreement] | None:
    """Return a method's agreements; None where they have not been measured."""
    found = results.get(bed, {}).get("agreement", {}).get(kind, {})
    return found.get("methods", {}).get(method)


def goal(bed: str, what: str, wanted: str, agreement: Agreement, least: float | None) -> list[str]:
    reached = MISSING if least is None else yes(agreement["value"] >= least)
    return [bed, what, wanted, with_interval(agreement), reached]


# --- parts ---


def environments(results: Results) -> str:
    """Return what was measured when, with what."""
    lines = []
    for name, found in results.items():
        environment = found["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in environment["packages"].items())
        lines.append(
            f"- {name}: {environment['date']}, {environment['cpu']}, {environment['threads']} thread, {versions}"
        )
    return "## Measured with\n\n" + "\n".join(lines)


def of_method(found: Results, method: str, what: str) -> str:
    return with_interval(found["methods"].get(method, {}).get(what))


def with_interval(agreement: Agreement | None, decimals: int = 2) -> str:
    if agreement is None:
        return MISSING
    value, (low, high) = agreement["value"], agreement["interval"]
    return f"{number(value, decimals)} [{number(low, decimals)}, {number(high, decimals)}]"


def number(value: float | None, decimals: int = 2) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}"


def yes(reached: bool) -> str:
    return "yes" if reached else "**no**"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join([*line, *[''] * (len(header) - len(line))])} |" for line in lines)
