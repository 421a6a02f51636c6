"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` knows some families by name (`PRESETS`) and watches one forward pass of any other model: the outermost
modules that run more than once are the loop. Modules of their own that share their parameters (Zamba's shared
transformer, layers whose weights point to another layer's) count as one that runs as often as they do together.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.batches import (
    BatchReader,
    LossFn,
    Settings,
    check_gradient,
    default_loss,
    example_losses,
    run,
    select,
)
from captum_sdi.sketch import Exact, Gradient, canonical_name
from captum_sdi.tape import LoopSpec, Tape, called_modules, evaluating, find_module, frozen, requiring_grad

PRESETS = {
    "albert": LoopSpec(modules=("albert_layer_groups",), anchors=("albert_layer_groups",)),
    "hrm_text": LoopSpec(modules=("L_module", "H_module"), anchors=("L_module", "H_module")),
    "huginn_raven": LoopSpec(
        modules=("transformer.adapter", "transformer.core_block"), anchors=("transformer.adapter",)
    ),
    "looped_gpt": LoopSpec(modules=("core",), anchors=("core",)),
    "ouro": LoopSpec(modules=("layers", "norm", "early_exit_gate"), anchors=("layers.0",)),
    "zamba": LoopSpec(modules=("shared_transf",), anchors=("shared_transf",)),
    "zamba2": LoopSpec(modules=("shared_transformer",), anchors=("shared_transformer",)),
}
"""Known families by ``config.model_type``. A name stands for every module whose name ends in it, so that prefixes
(``model.``, a wrapper's) do not matter; add a family with one line.

Zamba's one transformer is several modules that share parameters. Each of its calls is a step, so a block that takes
turns with another one has gradients at every other step only; the Mamba layers in between belong to the step they
follow, and count with ``layers=None``."""

WHOLE_MODEL = LoopSpec(modules=("",), anchors=("",))
"""One step: the call of the model itself."""


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


def find_loop(model: nn.Module, batch: Any, *, forward_kwargs: Settings | None = None) -> FoundLoop:
    """Finds the modules that repeat, by `PRESETS` or by watching a forward pass of the first example.

    Args:
        model: The model.
        batch: A batch it takes; see `captum_sdi.batches`.
        forward_kwargs: Further keywords for its forward, or a function of the batch.

    Returns:
        The outermost modules with parameters that run more than once, and whose call starts a step; prints as a table
        of what was seen. When nothing repeats, the whole model as one step, with a warning: influence is then
        TracIn.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> config = LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8, n_coda=2, n_loops=3)
        >>> print(find_loop(LoopedGPTForCausalLM(config), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}))
        LoopSpec(modules=('core',), anchors=('core',)): 3 steps
        module             calls  step (from 0)
        wte                    1  prelude
        wpe                    1  prelude
        prelude.0 to .1        1  prelude
        core                   3  0-2
        coda.0 to .1           1  coda
        ln_f                   1  coda
        lm_head                1  coda
    """
    calls = _watch(model, select(batch, [0]), forward_kwargs)
    spec = _preset(model, calls)
    if spec is None:
        kinds = {canonical_name(name): type(module) for name, module in model.named_modules()}
        loop = _outermost_repeated(calls, _tied_blocks(model), kinds)
        if not loop:
            warnings.warn(_nothing_repeats(model, calls), stacklevel=2)
            return FoundLoop(WHOLE_MODEL.modules, WHOLE_MODEL.anchors)
        spec = LoopSpec(modules=tuple(dict.fromkeys(name for name, _ in loop)), anchors=_anchors(loop))
    return _described(model, spec, calls)


def target_parameters(model: nn.Module, layers: str | Sequence[str] | None, loop: LoopSpec) -> list[str]:
    """Names of the parameters whose influence counts.

    Args:
        model: The model.
        layers: ``"loop"``: the loop's trainable parameters. None: every trainable parameter. A list of module names:
            all their parameters, frozen or not, as in Captum.
        loop: What repeats.

    Returns:
        Each once, in the model's order.

    Raises:
        TypeError: A bare string where a list is meant.
        ValueError: A name is unknown, or no parameter is left.
    """
    if layers == "loop":
        chosen, named = _inside(model, loop.modules, "loop="), "the loop"
        count = {id(p) for p in chosen if p.requires_grad}
    elif layers is None:
        named, count = type(model).__name__, {id(p) for p in model.parameters() if p.requires_grad}
    elif isinstance(layers, str):
        raise TypeError(f"layers={layers!r}: pass a list of module names, 'loop' or None.")
    else:
        named, count = f"layers={list(layers)}", {id(p) for p in _inside(model, layers, "layers=")}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in count]
    if not names:
        raise ValueError(
            f"There is no trainable parameter in {named}. Name other layers in layers=[...], or unfreeze some with "
            "requires_grad_(True)."
        )
    return names


def _inside(model: nn.Module, names: Sequence[str], argument: str) -> list[nn.Parameter]:
    return [p for name in names for p in find_module(model, name, argument).parameters()]


# --- finding the loop ---


@dataclass(frozen=True)
class _Call:
    """One call of a module with parameters."""

    name: str
    path: tuple[str, ...]
    """Names of the modules whose forward it was called in."""
    with_gradient: bool


def _preset(model: nn.Module, calls: Sequence[_Call]) -> LoopSpec | None:
    configs = (getattr(module, "config", None) for module in model.modules())
    kinds = dict.fromkeys(str(getattr(config, "model_type", "")) for config in configs if config is not None)
    names = [canonical_name(name) for name, _ in model.named_modules()]
    called = {call.name for call in calls}
    for preset in (PRESETS[kind] for kind in kinds if kind in PRESETS):
        full = {
            short: [name for name in names if name == short or name.endswith(f".{short}")]
            for short in (*preset.modules, *preset.anchors)
        }
        spec = [tuple(name for short in group for name in full[short]) for group in (preset.modules, preset.anchors)]
        # Of a model that only shares the name, such as one with untied layers, nothing may be known.
        if all(full.values()) and called & set(_called_names(model, spec[1])):
            return LoopSpec(*spec)
    return None


def _called_names(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of the modules that are called when these are: a container's children stand for it."""
    found = {id(part) for name in names for part in called_modules(find_module(model, name, "loop="))}
    return [canonical_name(name) for name, module in model.named_modules() if id(module) in found]


def _watch(model: nn.Module, batch: Any, forward_kwargs: Settings | None) -> list[_Call]:
    """Every call of a submodule with parameters, in order."""
    calls: list[_Call] = []
    running: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever reads the batch to use it warns of what it drops
        parsed = BatchReader(model)(batch, forward_kwargs)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name == "" or next(module.parameters(), None) is None:
                continue

            def entered(*_: object, name: str = canonical_name(name)) -> None:
                calls.append(_Call(name, tuple(running), torch.is_grad_enabled()))
                running.append(name)

            stack.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
            stack.callback(module.register_forward_hook(lambda *_: _ignore(running.pop())).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))  # nothing is kept for a backward pass
        # With gradients, to see which calls the model itself runs without; hooks are not called in compiled code.
        with torch.inference_mode(False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            run(model, parsed)
    return calls


def _ignore(_: object) -> None:
    """A forward hook must return None, or it replaces the output."""


def _tied_blocks(model: nn.Module) -> dict[str, str]:
    """Modules that share parameters with an earlier one of their type: their name to the first one's."""
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for _, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(name)
    modules = dict(model.named_modules())
    blocks: dict[str, str] = {}
    for first, *others in owners.values():
        for other in others:
            # Of layers.1.mlp.up and layers.4.mlp.up the blocks are layers.1 and layers.4; an embedding and a head
            # that share their weight have nothing alike around them.
            a, b = first.split("."), other.split(".")
            differ = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            if differ is None or a[differ + 1 :] != b[differ + 1 :]:
                continue
            block, twin = ".".join(a[: differ + 1]), ".".join(b[: differ + 1])
            if type(modules[block]) is type(modules[twin]) and next(modules[block].children(), None) is not None:
                blocks.setdefault(canonical_name(twin), canonical_name(block))
    return blocks


def _outermost_repeated(
    calls: Sequence[_Call], blocks: dict[str, str], kinds: dict[str, type[nn.Module]]
) -> list[tuple[str, str]]:
    """The loop's calls in order, as (name, block): of modules that run more than once while the biggest repeats."""
    # A norm that is used once before and once after the loop is called twice, too, but not while the loop runs. Blocks
    # of the biggest one's type that repeat before or after it (Albert's second group) are the loop as well.
    named = [(call.name, blocks.get(call.name, call.name)) for call in calls]
    counts = Counter(block for _, block in named)
    once = {name for name, block in named if counts[block] == 1}
    outer = [
        pair for pair, call in zip(named, calls, strict=True) if pair[0] not in once and once.issuperset(call.path)
    ]
    if not outer:
        return []
    inner = Counter(blocks.get(parent, parent) for call in calls for parent in call.path)  # a norm calls no layer
    biggest = max((block for _, block in outer), key=lambda block: (inner[block], counts[block]))
    positions = [i for i, (_, block) in enumerate(outer) if block == biggest]
    meanwhile = {block for _, block in outer[positions[0] : positions[-1] + 1]}
    return [(name, block) for name, block in outer if block in meanwhile or kinds[name] is kinds[biggest]]


def _anchors(loop: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Whose call starts a step: the first block's when every step calls it once among others, else every block's."""
    # a b a b are two steps of two layers; l l h l l h are six steps of two modules on one timeline.
    blocks = [block for _, block in loop]
    starts = [i for i, block in enumerate(blocks) if block == blocks[0]] + [len(blocks)]
    steps = [blocks[i:j] for i, j in itertools.pairwise(starts)]
    regular = len(set(blocks)) == 1 or all(1 < len(step) == len(set(step)) for step in steps)
    return tuple(dict.fromkeys(name for name, block in loop if not regular or block == blocks[0]))


# --- showing what was found ---


def _described(model: nn.Module, spec: LoopSpec, calls: Sequence[_Call]) -> FoundLoop:
    """The loop with its table: the calls that are in no other but those around the loop, and the step of each."""
    loop, anchors = set(_called_names(model, spec.modules)), set(_called_names(model, spec.anchors))
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


def _nothing_repeats(model: nn.Module, calls: Sequence[_Call]) -> str:
    """What was seen, and what to pass."""
    called = {call.name for call in calls}
    named = ((canonical_name(name), module) for name, module in model.named_modules())
    silent = [n for n, m in named if n and n not in called and any(True for _ in m.parameters(recurse=False))]
    seen = f"{len(called)} modules with parameters ran once each"
    if silent:
        seen += f", {silent[0]!r}{f' and {len(silent) - 1} more' * (len(silent) > 1)} not at all"
    return (
        f"Nothing repeats in {type(model).__name__}: it is taken as one loop step, and influence as TracIn. Name the "
        f"repeated module in loop= if there is one ({seen}; a call of a module's .forward cannot be seen)."
    )


# --- was all of it caught? ---


@dataclass(frozen=True)
class Coverage:
    """One row per targeted parameter: what was captured against an ordinary backward pass. Prints as a table."""

    parameters: tuple[str, ...]
    """Names."""
    captured: tuple[float, ...]
    """Norms of the captured gradients, summed over steps and examples."""
    expected: tuple[float, ...]
    """Norms of ``.grad``."""
    differences: tuple[float, ...]
    """Norms of their differences, relative to the expected norm or a hundredth of the largest, whichever is more."""

    def __str__(self) -> str:
        width = max(map(len, ("parameter", *self.parameters)))
        header = f"{'parameter':<{width}}  {'captured':>10}  {'expected':>10}  {'difference':>10}"
        rows = zip(self.parameters, self.captured, self.expected, self.differences, strict=True)
        return "\n".join([header, *(f"{n:<{width}}  {c:>10.4g}  {e:>10.4g}  {d:>10.1e}" for n, c, e, d in rows)])


def coverage_check(
    model: nn.Module,
    batch: Any,
    *,
    loop: str | Sequence[str] | LoopSpec | None = None,
    layers: str | Sequence[str] | None = "loop",
    loss_fn: LossFn | None = None,
    forward_kwargs: Settings | None = None,
) -> Coverage:
    """Checks on one batch that nothing of any targeted parameter's gradient is missed or counted twice.

    Run it on a model this library has not seen: it notices weights that are used without calling their layer.

    Args:
        model: The model.
        batch: A batch; see `captum_sdi.batches`.
        loop: As for `captum_sdi.SDIInfluence`.
        layers: As for `captum_sdi.SDIInfluence`.
        loss_fn: As for `captum_sdi.SDIInfluence`.
        forward_kwargs: As for `captum_sdi.SDIInfluence`.

    Returns:
        The table.

    Raises:
        ValueError: Captured and ordinary gradients differ by more than 1e-3 (5e-2 below float32) in some parameter, or
            the loss has none or is not finite.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> max(coverage_check(model, {"input_ids": ids, "labels": ids}).differences) < 1e-4
        True
    """
    spec = as_loop(loop) or find_loop(model, batch, forward_kwargs=forward_kwargs)
    names = target_parameters(model, layers, spec)
    parsed = BatchReader(model)(batch, forward_kwargs)
    loss_fn = loss_fn or default_loss(model)

    def loss() -> Tensor:
        return example_losses(loss_fn, run(model, parsed), parsed.labels, parsed.size).sum()

    targets = {name: p for name, p in model.named_parameters() if name in set(names)}
    captured = _captured(Tape(model, targets, spec), targets, loss, parsed.size)
    with evaluating(model), requiring_grad(targets), torch.enable_grad():
        check_gradient(total := loss(), "loss_fn")
        if not total.isfinite():
            raise ValueError(f"The loss of the batch is {total.item()}: look at its examples and the model's weights.")
        grads = torch.autograd.grad(total, list(targets.values()), allow_unused=True)
    expected = [torch.zeros_like(c) if g is None else g.to(c).flatten() for c, g in zip(captured, grads, strict=True)]
    table = _compared(names, captured, expected)
    tolerance = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p in targets.values()) else 5e-2
    if not all(difference < tolerance for difference in table.differences):  # NaN is not
        raise ValueError(
            "What was captured differs from the gradient of an ordinary backward pass: a parameter is used outside "
            f"its layer's call, or the model is not deterministic.\n{table}\nLeave that layer out with layers=[...]."
        )
    return table


def as_loop(loop: str | Sequence[str] | LoopSpec | None) -> LoopSpec | None:
    """What the user named, as a LoopSpec.

    Args:
        loop: A module name, names, a LoopSpec, or None.

    Returns:
        A LoopSpec, or None when it is to be found.

    Raises:
        TypeError: It is something else.
    """
    if loop is None or isinstance(loop, LoopSpec):
        return loop
    if not isinstance(loop, Sequence):
        raise TypeError(f"loop= must be a module's name, several names, a LoopSpec or None, got {loop!r}.")
    return LoopSpec(modules=(loop,) if isinstance(loop, str) else tuple(loop))


def _captured(tape: Tape, targets: dict[str, nn.Parameter], loss: Any, size: int) -> list[Tensor]:
    projections = {name: Exact().projection(name, p) for name, p in targets.items()}
    sums = {name: torch.zeros(p.width, dtype=p.dtype, device=p.device) for name, p in projections.items()}

    def consume(name: str, _examples: slice, _bin: int, gradient: Gradient) -> None:
        sums[name] += projections[name](gradient).sum(0)

    with tape:
        tape.backward(tape.forward(loss, size), consume)
    return list(sums.values())


def _compared(names: Sequence[str], captured: Sequence[Tensor], expected: Sequence[Tensor]) -> Coverage:
    norms = [float(e.norm()) for e in expected]
    # Some gradients vanish but for rounding: adding to every key changes no attention.
    floor = max(1e-2 * max(norms), torch.finfo(torch.float32).tiny)
    differences = [
        float((c - e).norm()) / max(norm, floor) for c, e, norm in zip(captured, expected, norms, strict=True)
    ]
    return Coverage(tuple(names), tuple(float(c.norm()) for c in captured), tuple(norms), tuple(differences))
