"""How the layers of a looped model repeat, and how its config remembers it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from captum_sdi.model_facts import LOOP_KEY
from captum_sdi.schema import INTEGER, NUMBER, TEXT, check_fields, one_of
from captum_sdi.words import is_integer

MODES = ("block", "layer")
REMAINDERS = ("state", "input")

RECORD_FIELDS = {
    "layers": TEXT,
    "start": INTEGER,
    "stop": INTEGER,
    "n_loops": INTEGER,
    "damping": NUMBER,
    "mode": one_of(MODES),
    "anchor": NUMBER,
    "remainder": one_of(REMAINDERS),
}
"""What a config holds under `LOOP_KEY`."""


@dataclass(frozen=True)
class LoopPlan:
    """Which layers repeat, and how; see `captum_sdi.models.loop_layers`."""

    start: int
    stop: int
    n_loops: int
    damping: float
    mode: str
    anchor: float
    remainder: str

    @property
    def changes_nothing(self) -> bool:
        """Whether the model computes what it computed before."""
        return self.n_loops == 1 and self.damping == 1.0


@dataclass(eq=False)
class LoopSettings:
    """The plan of a looped model, shared by the model and the module that owns the layers, and kept in its config."""

    model: nn.Module
    owner: nn.Module
    list_name: str
    plan: LoopPlan

    @contextmanager
    def depth(self, n_loops: int | None) -> Iterator[None]:
        """Use another number of repetitions inside `with`; None keeps the present one."""
        if n_loops is None:
            yield
            return
        check_n_loops(n_loops)
        previous_plan = self.plan
        self.plan = replace(previous_plan, n_loops=n_loops)
        try:
            yield
        finally:
            self.plan = previous_plan

    def change(self, **changes: Any) -> None:
        """Repeat in another way from now on."""
        self.plan = replace(self.plan, **changes)
        self.write_record()

    def write_record(self) -> None:
        """Write the loop into the config, so that `save_pretrained` saves it; a model without one keeps none."""
        named_config = self._named_config()
        if named_config is None:
            return
        name, config = named_config
        layers = self.list_name.removeprefix(f"{name}.")
        record = {"layers": layers, **vars(self.plan)}
        setattr(config, LOOP_KEY, record)

    def remove_record(self) -> None:
        """Let the config say nothing of a loop."""
        named_config = self._named_config()
        if named_config is not None:
            vars(named_config[1]).pop(LOOP_KEY, None)

    def _named_config(self) -> tuple[str, Any] | None:
        """Return the outermost config that can be saved, and the name of the module that has it."""
        for name, module in self.model.named_modules():
            config = getattr(module, "config", None)
            if hasattr(config, "save_pretrained"):
                return name, config
        return None


def read_record(record: Any) -> tuple[str, LoopPlan]:
    """Return the name of the looped list, and the plan, that a config holds.

    Raises:
        ValueError: If it holds something else.
    """
    check_fields(record, RECORD_FIELDS, within=f"model.config.{LOOP_KEY}: ")
    settings = {name: record[name] for name in RECORD_FIELDS}
    layers = settings.pop("layers")
    return layers, LoopPlan(**settings)


def check_plan(plan: LoopPlan, list_name: str, n_layers: int) -> None:
    """Raise ValueError naming the first argument that is impossible for a list of so many layers."""
    has_layers = f"{list_name!r} has {n_layers}"
    check_between("start", plan.start, 0, n_layers - 1, reason=f"{has_layers} layers")
    after_the_last = f"it is the layer after the last one, and {has_layers}"
    check_between("stop", plan.stop, plan.start + 1, n_layers, reason=after_the_last)
    check_n_loops(plan.n_loops)
    check_damping(plan.damping)
    check_anchor(plan.anchor)
    check_choice("mode", plan.mode, MODES)
    check_choice("remainder", plan.remainder, REMAINDERS)


def check_between(
    name: str,
    value: Any,
    lowest: int,
    highest: int,
    reason: str,
) -> None:
    """Raise ValueError naming the argument unless it is an integer from `lowest` to `highest`."""
    if not is_integer(value) or not lowest <= value <= highest:
        raise ValueError(f"{name}={value!r} must be an integer from {lowest} to {highest}: {reason}.")


def check_n_loops(n_loops: Any) -> None:
    """Raise ValueError unless `n_loops` is an integer of at least 1."""
    if not is_integer(n_loops) or n_loops < 1:
        raise ValueError(f"n_loops={n_loops!r} must be an integer of at least 1; 1 applies every layer once.")


def check_damping(damping: Any) -> None:
    """Raise ValueError unless `damping` is a number above 0 and at most 1."""
    if not is_number(damping) or not 0 < damping <= 1:
        raise ValueError(f"damping={damping!r} must be a number above 0 and at most 1; 1.0 is plain repetition.")


def check_anchor(anchor: Any) -> None:
    """Raise ValueError unless `anchor` is a number of at least 0 and below 1."""
    if not is_number(anchor) or not 0 <= anchor < 1:
        raise ValueError(f"anchor={anchor!r} must be a number of at least 0 and below 1; 0.0 is no anchor.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError naming the argument unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {choices}.")


def is_number(value: Any) -> bool:
    """Say whether a value is an int or a float; True and False are neither."""
    return is_integer(value) or isinstance(value, float)
