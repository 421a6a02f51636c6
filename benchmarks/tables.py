"""results.json as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Results = dict[str, Any]


def tables(results: Results, sections: Iterable[str]) -> str:
    """Every section that has been measured, and which ones have not."""
    parts = [
        table(results)
        for needed, table in (
            (("paper_shape",), _targets),
            (("paper_shape",), _times),
            (("deep_and_checkpointed",), _deep),
            (("accuracy",), _errors),
            (("memory",), _peaks),
            (("held",), _held),
            (("scaling",), _slopes),
            (("stages",), _stages),
            ((), _environments),
        )
        if results.keys() >= set(needed)
    ]
    missing = [name for name in sections if name not in results]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _targets(results: Results) -> str:
    """What was to be reached, and whether it was, by the sections that have been measured."""
    rows = [
        row
        for needed, rows in (
            (("paper_shape",), _time_goals),
            (("deep_and_checkpointed",), _deep_goals),
            (("accuracy",), _error_goals),
            (("memory",), _memory_goals),
            (("held",), _held_goals),
        )
        if results.keys() >= set(needed)
        for row in rows(results)
    ]
    body = [
        (what, theirs, f"<= {goal:.2f}", text, "yes" if value <= goal else "**no**")
        for what, theirs, goal, (value, text) in rows
    ]
    return "### What was to be reached\n\n" + _table(("what", "reference", "to reach", "measured", "reached"), body)


Goal = tuple[str, str, float, tuple[float, str]]
"""What, the reference's value, the goal, the value measured and its text."""


def _time_goals(results: Results) -> list[Goal]:
    times = results["paper_shape"]["ratios"]
    steps, limit = (_number(times[f"reference / {name}"][1]) for name in ("training steps", "limit"))
    return [
        ("time of a `step_influence` call / the reference's", "1.00", 0.60, _range(times["ours / reference"])),
        ("... / two training steps on the same batches", steps, 0.75, _range(times["ours / training steps"])),
        ("... / the limit: frozen weights, no sketch", limit, 1.12, _range(times["ours / limit"])),
    ]


def _deep_goals(results: Results) -> list[Goal]:
    ratios = results["deep_and_checkpointed"]["ratios"]
    return [
        ("time at τ = 16, checkpointed / the reference's", "1.00", 1.15, _range(ratios["checkpointed / reference"]))
    ]


def _error_goals(results: Results) -> list[Goal]:
    found = results["accuracy"]
    place = found["dims"].index(2048) if 2048 in found["dims"] else -1

    def against(column: str) -> tuple[float, str]:
        return _range([found["ours"][place][column][0] / found["reference"][place][column][0]])

    return [
        ("SDI error, examples against themselves / the reference's", "1.00", 0.85, against("self SDI")),
        ("TracIn error, examples against themselves / the reference's", "1.00", 0.85, against("self TracIn")),
        ("SDI error, pairs of different examples / the reference's", "1.00", 1.0, against("different SDI")),
    ]


def _memory_goals(results: Results) -> list[Goal]:
    taus = results["memory"]["tau"]
    at = {tau: i for i, tau in enumerate(taus["values"])}
    if not {4, 16, 32} <= at.keys():
        return []
    ours, reference = taus["ours, checkpointed"], taus["reference"]
    deep = ours[at[16]] / reference[at[16]]
    growth = [peaks[at[32]] / peaks[at[4]] for peaks in (reference, ours)]
    return [
        ("peak memory at τ = 16, checkpointed / the reference's", "1.00", 0.25, _range([deep])),
        ("peak memory at τ = 32 / at τ = 4, checkpointed", _number(growth[0]), 2.0, _range([growth[1]])),
    ]


def _held_goals(results: Results) -> list[Goal]:
    found = results["held"]
    sketches = {who: found[who][-1] / found["one sketch"] for who in ("reference", "ours, checkpointed")}
    what = f"memory held per train example, τ = {found['values'][-1]} / one sketch of its gradient"
    return [(what, _number(sketches["reference"]), 1.0, _range([sketches["ours, checkpointed"]]))]


def _times(results: Results) -> str:
    """Seconds and ratios of each model, side by side."""
    titles = {
        "paper_shape": "the paper's model",
        "with_biases": "with biases",
        "hugging_face_gpt2": "Hugging Face GPT-2",
    }
    names = ("ours", "reference", "training steps", "limit", "TracInCP")
    rows = []
    for key, title in titles.items():
        if key not in results:
            continue
        seconds, ratios = results[key]["seconds"], results[key]["ratios"]
        rows.append((f"{title}: seconds", *(_quartiles(seconds.get(name)) for name in names)))
        rows.append((f"{title}: ours / it", "", *(_quartiles(ratios.get(f"ours / {name}")) for name in names[1:])))
    text = "### Time, τ = 6, four examples on each side\n\n"
    text += _table(("", "ours", "reference", "two training steps", "limit", "TracInCP (totals only)"), rows)
    refusal = results.get("hugging_face_gpt2", {}).get("reference_raises")
    if refusal:
        text += f"\n\nThe reference on Hugging Face's GPT-2: `NotImplementedError: {refusal}`"
    checks = [
        f"{title}: "
        + ", ".join(
            f"{name} {value:.1e}" if "exact" in name else f"{name} {value:.1f}"
            for name, value in results[key]["agreement"].items()
        )
        for key, title in titles.items()
        if key in results
    ]
    return (
        text
        + "\n\nAgreement before timing (exact: largest difference as a share of the largest score; sketched: "
        + ("in standard errors): " + "; ".join(checks) + ".")
    )


def _deep(results: Results) -> str:
    found = results["deep_and_checkpointed"]
    rows = [(name, _quartiles(value)) for name, value in (found["seconds"] | found["ratios"]).items()]
    return "### τ = 16, with and without activation checkpointing\n\n" + _table(("", "seconds, or ratio"), rows)


def _errors(results: Results) -> str:
    found = results["accuracy"]
    columns = ("self SDI", "self TracIn", "different SDI", "different TracIn", "spearman", "top-10")
    rows = [
        (who, str(dim), str(found["draws"][i]), *(_spread(found[who][i][column]) for column in columns))
        for who in ("ours", "reference", "two-sided")
        for i, dim in enumerate(found["dims"])
    ]
    return "### Error of sketched scores, mean and standard deviation over draws\n\n" + _table(
        ("", "dim", "draws", *columns[:4], "Spearman of totals", "top-10 overlap"), rows
    )


def _peaks(results: Results) -> str:
    text = "### Peak memory above the baseline, MB\n"
    for axis, title in (("tau", "loop steps τ, four examples a side"), ("batch", "examples a side, τ = 4")):
        found = results["memory"][axis]
        rows = [(who, *map(_whole, found[who])) for who in ("ours", "ours, checkpointed", "reference")]
        text += f"\n{title}:\n\n" + _table(("", *map(str, found["values"])), rows) + "\n"
    return text.rstrip()


def _held(results: Results) -> str:
    found = results["held"]
    rows = [(who, *map(_whole, found[who])) for who in ("ours, checkpointed", "reference")]
    title = f"### Memory held per train example while scoring, KB (one sketch: {_whole(found['one sketch'])})\n\n"
    return title + _table(("loop steps τ", *map(str, found["values"])), rows)


def _slopes(results: Results) -> str:
    found = results["scaling"]
    names = {"seq": "tokens per example", "tau": "loop steps", "dim": "sketch size", "batch": "examples a side"}
    rows = []
    for axis, title in names.items():
        for who in ("ours", "reference"):
            line = found["axes"][axis][who]
            unit = 1000 if axis == "dim" else 1
            rows.append(
                (
                    title,
                    who,
                    f"{1000 * line['slope'] * unit:.2f} ms per {'thousand' if unit > 1 else 'unit'}",
                    f"{1000 * line['intercept']:.0f} ms",
                    f"{line['r_squared']:.3f}",
                )
            )
    text = f"### Time is linear in tokens, steps, sketch size and batch (width {found['width']})\n\n"
    return text + _table(("against", "", "slope", "at zero", "R² of the line"), rows)


def _stages(results: Results) -> str:
    found = results["stages"]
    names = sorted({name for each in found["dims"].values() for name, share in each["shares"].items() if share >= 0.01})
    rows = [
        (dim, f"{each['ms']:.1f}", *(f"{100 * each['shares'].get(name, 0):.0f}%" for name in names))
        for dim, each in found["dims"].items()
    ]
    shape = found["shape"]
    title = f"{shape['n']} examples of {shape['p']} tokens, a {shape['rows']} × {shape['columns']} matrix"
    return f"### Where the sketch's time goes: {title}\n\n" + _table(("dim", "ms", *names), rows)


def _environments(results: Results) -> str:
    """One line for each environment that a section was measured in."""
    sections: dict[str, list[str]] = {}
    for name, found in results.items():
        each = found["environment"]
        packages = ", ".join(f"{package} {version}" for package, version in each["packages"].items())
        text = (
            f"{each['date']}: {each['cpu']}, {each['cores']} cores, {each['threads']} threads, {each['memory_gb']} GB, "
            f"{each['vector_instructions']}, {each['gpu'] or 'no GPU'}, {each['system']}, Python {each['python']}, "
            f"{packages}"
        )
        sections.setdefault(text, []).append(name)
    return "### Environment\n\n" + "\n".join(f"- {', '.join(names)}: {text}" for text, names in sections.items())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float) -> str:
    return f"{value:.2f}"


def _range(values: Sequence[float]) -> tuple[float, str]:
    """The value to judge and its text: the median with its quartiles, or a single value."""
    if len(values) == 1:
        return values[0], _number(values[0])
    return values[1], _quartiles(values)


def _quartiles(values: Sequence[float] | None) -> str:
    if values is None:
        return "raises"
    low, median, high = values
    if low == high:  # measured once
        return _number(median)
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def _spread(values: Sequence[float]) -> str:
    mean, deviation = values
    return f"{mean:.3f} ± {deviation:.3f}"


def _whole(value: float) -> str:
    return f"{value:.0f}"
