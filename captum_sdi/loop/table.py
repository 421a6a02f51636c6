"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from captum_sdi.features import LoopSpec
from captum_sdi.loop.parameters import called_names
from captum_sdi.loop.watch import Call


@dataclass(frozen=True)
class Row:
    """One line of what `find_loop` saw."""

    module: str
    """Its name."""
    calls: int
    """How often it ran."""
    where: str
    """The loop steps it ran in, or "prelude" or "coda"."""


@dataclass(frozen=True, eq=False, repr=False)
class FoundLoop(LoopSpec):
    """A `LoopSpec`, and what was seen when it was found. Prints as a table; equal to the same plain `LoopSpec`.

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

    def __str__(self) -> str:
        lines = [f"{self!r}: {self.n_steps} step{'s' * (self.n_steps != 1)}"]
        if self.rows:
            rows = _condensed(self.rows)
            width = max(len(row.module) for row in (Row("module", 0, ""), *rows))
            lines += [f"{'module':<{width}}  calls  step (from 0)"]
            lines += [f"{row.module:<{width}}  {row.calls:>5}  {row.where}" for row in rows]
        if self.without_gradient:
            lines.append(f"Without gradient, so of no influence: step {_ranges(self.without_gradient)}.")
        return "\n".join(lines)


def tabulate_loop(model: nn.Module, spec: LoopSpec, calls: Sequence[Call]) -> FoundLoop:
    """The loop with its table: the calls that are in no other but those around the loop, and the step of each."""
    loop, anchors = set(called_names(model, spec.modules)), set(called_names(model, spec.anchors))
    around = {parent for call in calls if call.name in loop for parent in call.path} - loop
    last = max(i for i, call in enumerate(calls) if call.name in loop)
    places: defaultdict[str, list[int | str]] = defaultdict(list)
    gradient: list[bool] = []
    for i, call in enumerate(calls):
        if call.name in anchors:
            gradient.append(False)
        if gradient and call.name in loop:
            gradient[-1] |= call.with_gradient
        if call.name not in around and around.issuperset(call.path):
            inside = call.name in loop or i < last
            places[call.name].append("prelude" if not gradient else len(gradient) - 1 if inside else "coda")
    rows = tuple(Row(name, len(where), _places(where)) for name, where in places.items())
    without = tuple(step for step, has in enumerate(gradient) if not has)
    return FoundLoop(spec.modules, spec.anchors, rows, len(gradient), without)


def _places(where: Sequence[int | str]) -> str:
    steps = sorted({step for step in where if isinstance(step, int)})
    parts = ["prelude"] * ("prelude" in where) + [_ranges(steps)] * bool(steps) + ["coda"] * ("coda" in where)
    return ", ".join(parts)


def _ranges(steps: Iterable[int]) -> str:
    """``0-2, 5``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _condensed(rows: Iterable[Row]) -> list[Row]:
    """Neighbours that differ in their last number only as one row, ``h.3 to .9``."""
    condensed: list[Row] = []
    for _, group in itertools.groupby(rows, lambda row: (re.sub(r"\d+$", "", row.module), row.calls, row.where)):
        first, *others = group
        name = f"{first.module} to .{others[-1].module.rpartition('.')[2]}" if others else first.module
        condensed.append(Row(name, first.calls, first.where))
    return condensed
