"""What repeats in a model, which parameters count, and whether all of their gradient was caught.

`find_loop` watches one forward pass: the outermost modules that are called more than once are the loop.
`coverage_check` compares the sum of everything captured with ``.grad`` of an ordinary backward pass.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_sdi.batches import BatchReader, LossFn, Settings, default_loss, example_losses, select
from captum_sdi.sketch import Exact, Gradient, canonical_name
from captum_sdi.tape import LoopSpec, Tape, evaluating, find_module

PRESETS = {
    "looped_gpt": LoopSpec(modules=("core",), anchors=("core",)),
    "hrm_text": LoopSpec(modules=("L_module", "H_module"), anchors=("L_module", "H_module")),
}
"""Known families by ``config.model_type``; a name stands for the one module whose name ends in it."""

WHOLE_MODEL = LoopSpec(modules=("",), anchors=("",))
"""One step: the call of the model itself."""


def find_loop(model: nn.Module, batch: Any, *, forward_kwargs: Settings | None = None) -> LoopSpec:
    """Finds the modules that repeat, by `PRESETS` or by watching a forward pass of the first example.

    Args:
        model: The model.
        batch: A batch it takes; see `captum_sdi.batches`.
        forward_kwargs: Further keywords for its forward, or a function of the batch.

    Returns:
        The outermost modules with parameters that are called more than once, and whose call starts a step. When
        nothing repeats, the whole model as one step, with a warning: influence is then TracIn.

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8))
        >>> find_loop(model, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
        LoopSpec(modules=('core',), anchors=('core',))
    """
    known = _preset(model)
    if known is not None:
        return known
    calls = _outermost_repeated(_watch(model, select(batch, [0]), forward_kwargs))
    if not calls:
        warnings.warn(
            f"Nothing repeats in {type(model).__name__}: it is taken as one loop step, and influence as TracIn. Name "
            "the repeated module in loop= if there is one.",
            stacklevel=2,
        )
        return WHOLE_MODEL
    modules = tuple(dict.fromkeys(calls))
    return LoopSpec(modules=modules, anchors=_anchors(calls))


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

_Call = tuple[str, tuple[str, ...]]
"""A module's name and those of the modules whose forward it was called in."""


def _preset(model: nn.Module) -> LoopSpec | None:
    preset = PRESETS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if preset is None:
        return None
    names = [canonical_name(name) for name, _ in model.named_modules()]
    full = {short: [n for n in names if n == short or n.endswith("." + short)] for short in preset.modules}
    if any(len(matches) != 1 for matches in full.values()):
        return None
    return LoopSpec(*(tuple(full[short][0] for short in group) for group in (preset.modules, preset.anchors)))


def _watch(model: nn.Module, batch: Any, forward_kwargs: Settings | None) -> list[_Call]:
    """Every call of a submodule with parameters, in order."""
    calls: list[_Call] = []
    running: list[str] = []
    parsed = BatchReader(model)(batch, forward_kwargs)
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if name == "" or next(module.parameters(), None) is None:
                continue

            def entered(*_: object, name: str = canonical_name(name)) -> None:
                calls.append((name, tuple(running)))
                running.append(name)

            stack.callback(module.register_forward_pre_hook(entered, prepend=True).remove)
            stack.callback(module.register_forward_hook(lambda *_: _ignore(running.pop())).remove)
        stack.enter_context(evaluating(model))
        model(*parsed.args, **parsed.kwargs)
    return calls


def _ignore(_: object) -> None:
    """A forward hook must return None, or it replaces the output."""


def _outermost_repeated(calls: list[_Call]) -> list[str]:
    """The loop's calls in order: of modules called more than once while the biggest of them repeats."""
    # A norm that is used once before and once after the loop is called twice, too, but not while the loop runs.
    counts = Counter(name for name, _ in calls)
    outer = [name for name, path in calls if counts[name] > 1 and all(counts[parent] == 1 for parent in path)]
    if not outer:
        return []
    inner = Counter(parent for _, path in calls for parent in path)  # a block calls many layers, a norm none
    biggest = max(outer, key=lambda name: (inner[name], counts[name]))
    first, last = outer.index(biggest), len(outer) - 1 - outer[::-1].index(biggest)
    meanwhile = set(outer[first : last + 1])
    return [name for name in outer if name in meanwhile]


def _anchors(calls: list[str]) -> tuple[str, ...]:
    """Whose call starts a step: the first module's when every step calls it once among others, else every module's."""
    # a b a b are two steps of two layers; l l h l l h are six steps of two modules on one timeline.
    first = calls[0]
    if len(set(calls)) == 1:
        return (first,)
    starts = [i for i, name in enumerate(calls) if name == first] + [len(calls)]
    steps = [calls[i:j] for i, j in itertools.pairwise(starts)]
    regular = all(1 < len(step) == len(set(step)) for step in steps)
    return (first,) if regular else tuple(dict.fromkeys(calls))


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
    """Norms of their differences relative to the largest expected norm."""

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
) -> Coverage:
    """Checks on one batch that nothing of any targeted parameter's gradient is missed or counted twice.

    Run it on a model this library has not seen: it notices weights that are used without calling their layer.

    Args:
        model: The model.
        batch: A batch; see `captum_sdi.batches`.
        loop: As for `captum_sdi.SDIInfluence`.
        layers: As for `captum_sdi.SDIInfluence`.
        loss_fn: As for `captum_sdi.SDIInfluence`.

    Returns:
        The table.

    Raises:
        ValueError: Captured and ordinary gradients differ by more than 1e-3 (1e-2 below float32).

    Example:
        >>> from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
        >>> model = LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> max(coverage_check(model, {"input_ids": ids, "labels": ids}).differences) < 1e-4
        True
    """
    spec = as_loop(loop) or find_loop(model, batch)
    names = target_parameters(model, layers, spec)
    parsed = BatchReader(model)(batch)
    loss_fn = loss_fn or default_loss(model)

    def loss() -> Tensor:
        output = model(*parsed.args, **parsed.kwargs)
        return example_losses(loss_fn, output, parsed.labels, parsed.size).sum()

    targets = {name: p for name, p in model.named_parameters() if name in set(names)}
    captured = _captured(Tape(model, targets, spec), targets, loss, parsed.size)
    with evaluating(model), _requiring_grad(targets), torch.enable_grad():
        grads = torch.autograd.grad(loss(), list(targets.values()), allow_unused=True)
    expected = [torch.zeros_like(c) if g is None else g.to(c).flatten() for c, g in zip(captured, grads, strict=True)]
    table = _compared(names, captured, expected)
    tolerance = 1e-3 if all(p.dtype in (torch.float32, torch.float64) for p in targets.values()) else 1e-2
    if not max(table.differences) < tolerance:
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
    """
    if loop is None or isinstance(loop, LoopSpec):
        return loop
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
    scale = max(*norms, torch.finfo(torch.float32).tiny)
    differences = [float((c - e).norm()) / scale for c, e in zip(captured, expected, strict=True)]
    return Coverage(tuple(names), tuple(float(c.norm()) for c in captured), tuple(norms), tuple(differences))


@contextmanager
def _requiring_grad(targets: dict[str, nn.Parameter]) -> Iterator[None]:
    """Frozen targets (named in ``layers``) need a gradient for the comparison, too."""
    frozen = [p for p in targets.values() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
