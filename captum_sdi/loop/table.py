"""A found loop as a table: which modules ran how often, and in which loop steps."""

from __future__ import annotations

import html
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from captum_sdi.features import Bins, LoopSpec
from captum_sdi.loop.clock import LoopClock
from captum_sdi.loop.parameters import called_names, canonical_modules
from captum_sdi.loop.watch import Call


@dataclass(frozen=True)
class Row:
    """One line of the table that `find_loop` returns."""

    module: str
    """Its name."""
    calls: int
    """How often it ran."""
    where: str
    """The loop steps it ran in, or "prelude" or "coda"."""


@dataclass(frozen=True, eq=False, repr=False)
class FoundLoop(LoopSpec):
    """A `LoopSpec` that prints as a table of the calls seen when it was found.

    It equals the same plain `LoopSpec`.

    Args:
        modules: As for `LoopSpec`.
        anchors: As for `LoopSpec`.
        rows: One per outermost module with parameters, in the order of first calls.
        n_steps: How many loop steps the example ran.
        without_gradient: Steps that ran under `torch.no_grad`, whose influence is zero.
    """

    rows: tuple[Row, ...] = field(default=())
    n_steps: int = 1
    without_gradient: tuple[int, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LoopSpec):
            return NotImplemented
        return (self.modules, self.anchors) == (other.modules, other.anchors)

    def __hash__(self) -> int:
        return LoopSpec.__hash__(self)

    def __repr__(self) -> str:
        return repr(LoopSpec(self.modules, self.anchors))

    def _repr_html_(self) -> str:
        """Return the table for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        unit = "step" if self.n_steps == 1 else "steps"
        lines = [f"{self!r}: {self.n_steps} {unit}"]
        if self.rows:
            lines += aligned(condensed(self.rows))
        if self.without_gradient:
            lines.append(f"Without gradient, so of no influence: step {ranges(self.without_gradient)}.")
        return "\n".join(lines)


def tabulate_loop(
    model: nn.Module,
    spec: LoopSpec,
    calls: Sequence[Call],
) -> FoundLoop:
    """Add to a loop its table: a row for each outermost module, but for those that contain it."""
    modules = dict(canonical_modules(model))
    clock = LoopClock(model, spec)
    moments = []
    has_gradient: defaultdict[int, bool] = defaultdict(bool)  # by loop step
    for call in calls:
        moment = clock.replay_call(modules[call.name])
        moments.append(moment)
        if moment.in_loop:
            has_gradient[moment.step] |= call.with_gradient
    containing = modules_around(calls, called_names(model, spec.modules))
    places: defaultdict[str, list[int]] = defaultdict(list)  # by module: the bin of each of its calls
    for call, moment in zip(calls, moments, strict=True):
        if call.name not in containing and containing.issuperset(call.path):
            place = clock.bin(moment)
            places[call.name].append(place)
    rows = []
    for name, module_places in places.items():
        summarized_places = summary(module_places)
        rows.append(Row(name, len(module_places), summarized_places))
    without_gradient = [step for step in range(clock.n_steps) if not has_gradient[step]]
    return FoundLoop(
        spec.modules,
        spec.anchors,
        rows=tuple(rows),
        n_steps=clock.n_steps,
        without_gradient=tuple(without_gradient),
    )


def modules_around(calls: Sequence[Call], names: Sequence[str]) -> set[str]:
    """Return the modules in whose forward the modules of these names were called, without these themselves."""
    containing: set[str] = set()
    for call in calls:
        if call.name in names:
            containing.update(call.path)
    return containing.difference(names)


def summary(places: Sequence[int]) -> str:
    """Return the bins of a module's calls in words.

    Example:
        >>> summary([Bins.PRELUDE, *map(Bins.of_step, (0, 1, 2, 5))])
        'prelude, 0-2, 5'
    """
    steps = {step for step in range(max(places)) if Bins.of_step(step) in places}
    words = []
    if Bins.PRELUDE in places:
        words.append("prelude")
    if steps:
        words.append(ranges(sorted(steps)))
    if Bins.CODA in places:
        words.append("coda")
    return ", ".join(words)


def ranges(steps: Iterable[int]) -> str:
    """Write ascending steps as ranges, ``0-2, 5``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    words = []
    for run in runs:
        word = str(run[0])
        if len(run) > 1:
            word += f"-{run[-1]}"
        words.append(word)
    return ", ".join(words)


def aligned(rows: Sequence[Row]) -> list[str]:
    """Write rows as lines under a header."""
    names = [row.module for row in rows]
    width = max(map(len, ["module", *names]))
    header = "module".ljust(width)
    lines = [f"{header}  calls  step (from 0)"]
    for row in rows:
        name = row.module.ljust(width)
        lines.append(f"{name}  {row.calls:>5}  {row.where}")
    return lines


def condensed(rows: Iterable[Row]) -> list[Row]:
    """Join neighbours that differ in their last number only to one row, ``h.3 to .9``."""
    condensed_rows = []
    for _, group in itertools.groupby(rows, _without_last_number):
        neighbours = list(group)
        row = neighbours[0]
        if len(neighbours) > 1:
            *_, last_number = neighbours[-1].module.split(".")
            row = replace(row, module=f"{row.module} to .{last_number}")
        condensed_rows.append(row)
    return condensed_rows


def _without_last_number(row: Row) -> Row:
    name = re.sub(r"\d+$", "", row.module)
    return replace(row, module=name)
