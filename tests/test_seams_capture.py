"""What may be added to capture from outside the package: layer rules, a row per token, a transform of gradients."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import aliased_gradients, spread
from torch import Tensor, nn
from torch.func import functional_call, vjp
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.pytorch_utils import Conv1D

import captum_sdi.capture
from captum_sdi import Exact, LoopSpec, TensorSketch
from captum_sdi.capture.featurizer import Capture, Featurizer
from captum_sdi.capture.owners import check_targets
from captum_sdi.capture.rules import Dense, Outer, PerExample, merge_positions, registry, rule, summed_over_positions
from captum_sdi.capture.rules.choose import choose_rule, why_uncovered
from captum_sdi.data.side import Side
from captum_sdi.features import Gradient

D, N, T = 4, 3, 5
"""Width, examples, positions."""

LOOP = LoopSpec(("core",))


@pytest.fixture(autouse=True)
def rules_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTERED", list(registry._REGISTERED))


def squared(output: Tensor, labels: Tensor) -> Tensor:
    return ((output - labels) ** 2).flatten(1).sum(1)


SIDE = Side("training", squared, None)


def data(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, N, *(shape or (T, D)), generator=generator, dtype=torch.float64)
    return x, y


class Looped(nn.Module):
    """``core`` three times between two linear layers."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.before, self.core, self.after = nn.Linear(D, D), core, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        for _ in range(3):
            h = h + self.core(h)
        return self.after(h)


def looped(core: nn.Module) -> nn.Module:
    return spread(Looped(core).double(), 0.3)


class Block(nn.Module):
    """A looped block whose forward a test writes down."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Leaf(nn.Module):
    """One weight, used as a test writes it down."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.run = nn.Parameter(torch.zeros(*(shape or (D,)))), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


def features(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    names: Sequence[str] | None = None,
    sketch: Any = None,
    by_step: bool = True,
    checkpointing: bool = False,
    side: Side = SIDE,
    **settings: Any,
) -> dict[str, Tensor]:
    """The rows of a batch, by parameter."""
    names = names or [name for name, _ in model.named_parameters()]
    featurizer = Featurizer(model, names, LOOP, sketch or Exact(), activation_checkpointing=checkpointing)
    with featurizer.installed("current") as capture:
        computed = capture(batch, side, by_step=by_step, positions=range(N), **settings)
    assert len(computed.n_steps) == computed.size == len(next(iter(computed.rows.values())))
    return computed.rows


def truth_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """By aliasing, one example at a time: ``(n, 2 + t, entries)``."""
    names = [name for name, _ in model.named_parameters()]
    each = []
    for x, y in zip(*batch, strict=True):
        loss = lambda model, x=x, y=y: squared(model(x[None]), y[None]).sum()  # noqa: E731
        each.append(aliased_gradients(model, loss, names, ["core"], ["core"]))
    return {name: torch.stack([one[name] for one in each]) for name in names}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(ours) == set(truth)
    largest = max(float(rows.abs().max()) for rows in truth.values())
    for name, rows in truth.items():
        assert ours[name].shape == rows.shape, name
        assert (ours[name] - rows).abs().max() <= tolerance * largest, name


# --- layer rules ---


class Gated(nn.Module):
    """Two parameters of its own beside a child: no generic rule covers it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.log_scale, self.shift = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.log_scale.exp() + self.shift


def gated(module: Gated, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
    slope = module.inner(activation) * module.log_scale.exp()  # a call that no hook may take for the model's
    yield "log_scale", slice(None), summed_over_positions(merge_positions(slope * backprop))
    yield "shift", slice(None), summed_over_positions(merge_positions(backprop))


def gated_by_autograd(
    module: Gated, activation: Tensor, backprop: Tensor, wanted: Sequence[str]
) -> Iterator[PerExample]:
    """One example at a time, and forward and backward through the whole module."""
    parameters = {name: module.get_parameter(name).detach() for name in wanted}
    for i in range(len(activation)):
        _, pullback = vjp(lambda p, a=activation[i : i + 1]: functional_call(module, p, (a,)), parameters)
        for name, gradient in pullback(backprop[i : i + 1])[0].items():
            yield name, slice(i, i + 1), Dense(gradient[None])


@pytest.mark.parametrize("by", ["type", "name"])
@pytest.mark.parametrize("gradients", [gated, gated_by_autograd], ids=lambda gradients: gradients.__name__)
def test_a_rule_for_a_layer_with_children_and_several_parameters(gradients: Any, by: str) -> None:
    model = looped(Gated())
    names = [name for name, _ in model.named_parameters()]
    assert why_uncovered(model.core) is not None
    rule(Gated if by == "type" else f"{__name__}.Gated", positionwise=True)(gradients)
    assert why_uncovered(model.core) is None
    check_targets(model, names, LOOP)
    truth = truth_of(model, data())
    for checkpointing in (False, True):
        assert_same(features(model, data(), checkpointing=checkpointing), truth)
    tokens = features(model, data(), unit="token")
    assert_same({name: rows.unflatten(0, (N, T)).sum(1) for name, rows in tokens.items()}, truth)


class Wide(nn.Linear):
    """Linear's own forward."""


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


def named(module: nn.Module, x: Tensor | None = None) -> str:
    x = torch.randn(N, T, D) if x is None else x
    chosen = choose_rule(module, x, module(x))
    return chosen if isinstance(chosen, str) else chosen.name


def test_a_rule_is_for_subclasses_as_long_as_they_keep_its_forward() -> None:
    @rule(nn.Linear, parameters=["weight", "bias"])
    def mine(*_: Any) -> Iterator[PerExample]:
        yield from ()

    overridden = nn.Linear(D, D)
    overridden.forward = lambda x: nn.Linear.forward(overridden, x) ** 2  # type: ignore[method-assign]
    assert [named(layer) for layer in (nn.Linear(D, D), Wide(D, D))] == ["mine", "mine"]
    assert [named(layer) for layer in (Other(D, D), overridden)] == ["per example", "per example"]


def test_the_closest_type_and_the_last_rule_for_it_win() -> None:
    @rule(Wide)
    def closest(*_: Any) -> Iterator[PerExample]:
        yield from ()

    assert [named(layer) for layer in (nn.Linear(D, D), Wide(D, D))] == ["linear", "closest"]

    @rule("torch.nn.modules.linear.Linear")
    def later(*_: Any) -> Iterator[PerExample]:
        yield from ()

    assert named(nn.Linear(D, D)) == "later"


def test_a_rule_goes_before_the_generic_ones() -> None:
    leaf = Leaf(lambda x, w: x * w)
    assert named(leaf) == "affine"

    @rule(Leaf, parameters=["weight"])
    def my_scale(*_: Any) -> Iterator[PerExample]:
        yield from ()

    assert named(leaf) == "my scale"
    leaf.register_parameter("extra", nn.Parameter(torch.zeros(())))
    assert why_uncovered(leaf) is None
    assert named(leaf) == "its forward does not read ['extra'] (a hook does, as for torch.nn.utils.weight_norm)"


def test_a_rule_that_forgets_a_parameter_is_refused() -> None:
    @rule(Gated)
    def half(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: Sequence[str]) -> Iterator[PerExample]:
        yield "shift", slice(None), summed_over_positions(backprop)

    match = r"rule 'half' for 'core' \(Gated\).*yielded no gradient of 'log_scale'.*register it with parameters="
    with pytest.raises(ValueError, match=match):
        features(looped(Gated()), data())


@pytest.mark.parametrize("layer_types", [(3,), ("Conv1D",), (nn.Linear, "Linear")])
def test_a_rule_must_be_given_types(layer_types: Any) -> None:
    with pytest.raises(TypeError, match=r"must be given layer types or 'module\.Class' names, got"):
        rule(*layer_types)


def test_a_rule_must_be_given_a_type() -> None:
    with pytest.raises(TypeError, match=r"must be given the layer types that it is for, such as @rule"):
        rule()


def test_capture_knows_transformers_by_name_only() -> None:
    folder = Path(captum_sdi.capture.__file__).parent
    files = list(folder.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(module.split(".")[0] == "transformers" for module in modules), file


def test_checking_targets_leaves_no_hook() -> None:
    model = looped(Block(lambda m, x: m.fc(x), fc=nn.Linear(D, D)))
    with pytest.raises(ValueError, match="loop= names 'croe'"):
        check_targets(model, ["core.fc.weight"], LoopSpec(("croe",)))
    with pytest.raises(ValueError, match=r"loop= names 'before\.x'"):
        check_targets(model, ["core.fc.weight"], LoopSpec(("core",), ("before.x",)))
    check_targets(model, ["core.fc.weight"], LOOP)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- a row per token ---


def over_positions(x: Tensor, w: Tensor) -> Tensor:
    """Affine in w at every position, from all of them."""
    return (x - x.mean(1, keepdim=True)) * w


class Ids(nn.Module):
    """Ids made of the activation, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, D, padding_idx=2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table((x.detach().abs().sum(-1) * 10).long() % 6)


class Learned(nn.Module):
    """Positions looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(T, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]).unsqueeze(0))


TOKENWISE: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(D, D),
    "Conv1D": lambda: Conv1D(D, D),
    "Embedding": Ids,
    "Embedding called once": Learned,
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm over positions": lambda: nn.LayerNorm((T, D)),
    "RMSNorm on heads": lambda: Block(
        lambda m, x: m.norm(x.unflatten(-1, (2, 2))).flatten(2), norm=nn.RMSNorm(2)
    ),
    "affine": lambda: Leaf(lambda x, w: x.tanh() * (1 + w)),
    "affine, in float32": lambda: GemmaRMSNorm(D),
    "affine over positions": lambda: Leaf(over_positions),
    "affine on whole sequences only": lambda: Leaf(lambda x, w: x.view(-1, T, D) * w),
    "per example": lambda: Leaf(lambda x, w: torch.tanh(x * w)),
    "per example over positions": lambda: Leaf(lambda x, w: torch.einsum("npi,pq->nqi", x, w), T, T),
}  # fmt: skip


@pytest.mark.parametrize("by_step", [True, False], ids=["by step", "summed"])
@pytest.mark.parametrize("name", TOKENWISE)
def test_tokens_sum_up_to_their_example(name: str, by_step: bool) -> None:
    model = looped(TOKENWISE[name]())
    whole = features(model, data(), by_step=by_step)
    tokens = features(model, data(), by_step=by_step, unit="token")
    for parameter, rows in tokens.items():
        assert rows.shape == (N * T, *whole[parameter].shape[1:])
        assert rows.flatten(1).any(1).sum() > N  # not all in one position
    summed = {parameter: rows.unflatten(0, (N, T)).sum(1) for parameter, rows in tokens.items()}
    in_float32 = name == "affine, in float32"
    assert_same(summed, whole, 1e-6 if in_float32 else 1e-12)


def test_each_token_has_its_own_gradient_and_examples_come_first() -> None:
    """Where positions do not look at each other, a token's row is the gradient of its own part of the loss."""
    core = Block(
        lambda m, x: m.off(m.down(torch.tanh(m.norm(m.up(x)) * m.scale(x).sum(-1, keepdim=True)))),
        up=nn.Linear(D, 6), down=Conv1D(D, 6), norm=nn.LayerNorm(6), scale=Leaf(lambda x, w: x * w),
        off=Leaf(lambda x, w: torch.tanh(x * w)),
    )  # fmt: skip
    model, (x, y) = looped(core), data()
    tokens = features(model, (x, y), unit="token")
    parts = x.reshape(N * T, 1, D), y.reshape(N * T, 1, D)
    assert_same(tokens, truth_of(model, parts))


def test_positionwise_rules_give_what_any_rule_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = looped(Block(lambda m, x: m.norm(torch.tanh(m.fc(x))), fc=nn.Linear(D, D), norm=nn.LayerNorm(D)))
    fast = features(model, data(), unit="token")
    monkeypatch.setattr("captum_sdi.capture.rules.base.Rule.is_positionwise", lambda *_: False)
    assert_same(features(model, data(), unit="token"), fast, 1e-12)


@pytest.mark.parametrize("pool", [False, True])
def test_tokens_through_a_sketch(pool: bool) -> None:
    model = looped(TOKENWISE["Embedding"]())
    sketch = TensorSketch(7, pool=pool)
    whole = features(model, data(), sketch=sketch)
    tokens = features(model, data(), sketch=sketch, unit="token")
    assert_same({name: rows.unflatten(0, (N, T)).sum(1) for name, rows in tokens.items()}, whole, 1e-5)


def test_a_layer_without_a_token_axis_is_refused() -> None:
    model = looped(Block(lambda m, x: x * m.fc(x.mean(1)).unsqueeze(1), fc=nn.Linear(D, D)))
    match = r"unit='token' needs.*'core.fc' \(Linear\).*shape \(3, 4\).*with layers=\['before', 'after'\]"
    with pytest.raises(ValueError, match=match):
        features(model, data(), unit="token")
    names = ["before.weight", "after.bias"]
    tokens = features(model, data(), names=names, unit="token")
    assert_same(
        {name: rows.unflatten(0, (N, T)).sum(1) for name, rows in tokens.items()},
        features(model, data(), names=names),
        1e-12,
    )


def test_layers_that_read_different_numbers_of_tokens_are_refused() -> None:
    model = looped(Block(lambda m, x: x * m.fc(x.mean(1, keepdim=True)), fc=nn.Linear(D, D)))
    match = r"unit='token' needs the same number.*'before'.*was given 5, 'core.fc'.* 1\. Leave the second one out"
    with pytest.raises(ValueError, match=match):
        features(model, data(), unit="token")


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit must be 'example' or 'token', got 'word'"):
        features(looped(nn.Linear(D, D)), data(), unit="word")


def test_a_token_without_finite_gradient_names_its_example() -> None:
    model = looped(Block(lambda m, x: m.fc(x), fc=nn.Linear(D, D)))
    x, y = data()
    y[1, 2] = float("inf")  # the square root of zero has no slope
    side = Side("training", lambda output, labels: ((output * 0 + 1 / labels).abs().sqrt()).flatten(1).sum(1), None)
    with pytest.raises(ValueError, match=r"The gradient of training example\(s\) \[1\] is not finite"):
        features(model, (x, y), side=side, unit="token")


# --- a transform of gradients ---


def halved(name: str, gradient: Gradient) -> Gradient:
    """The first row of a matrix set to zero and the others halved, in whichever form they come."""
    if isinstance(gradient, Outer):
        rows = gradient.rows.clone()
        rows[..., 0] = 0
        return Outer(rows, gradient.cols / 2)
    grads = gradient.grads / 2
    grads[:, 0] = 0
    return Dense(grads)


@pytest.mark.parametrize("unit", ["example", "token"])
def test_gradients_are_transformed_before_the_sketch(unit: str) -> None:
    core = Block(lambda m, x: m.off(torch.tanh(m.fc(x))), fc=nn.Linear(D, D), off=Leaf(lambda x, w: torch.tanh(x * w)))
    model = looped(core)
    names: list[str] = []

    def transform(name: str, gradient: Gradient) -> Gradient:
        names.append(name)
        return halved(name, gradient)

    plain = features(model, data(), unit=unit)
    changed = features(model, data(), unit=unit, transform=transform)
    expected = {}
    for name, rows in plain.items():
        shape = model.get_parameter(name).shape
        entries = rows.unflatten(-1, shape) / 2
        entries[:, :, 0] = 0
        expected[name] = entries.flatten(2)
    assert set(names) == set(plain)
    assert_same(changed, expected, 1e-12)
    sketch = TensorSketch(7)
    rows = features(model, data(), unit=unit, transform=halved, sketch=sketch)["core.fc.weight"]
    projection = sketch.projection("core.fc.weight", model.get_parameter("core.fc.weight"), "current")
    entries = expected["core.fc.weight"].unflatten(-1, (D, D))
    sketched = torch.stack([projection(Dense(entries[:, place])) for place in range(entries.shape[1])], dim=1)
    assert torch.allclose(rows, sketched, rtol=1e-4, atol=1e-5 * float(sketched.abs().max()))


# --- what `installed` gives ---


def test_installed_gives_a_capture_and_takes_the_hooks_off() -> None:
    model = looped(Block(lambda m, x: m.fc(x), fc=nn.Linear(D, D)))
    names = ["core.fc.weight", "after.bias"]
    featurizer = Featurizer(model, names, LOOP, TensorSketch(7))
    checksums = []
    for checkpoint in ("first", "second"):
        with featurizer.installed(checkpoint) as capture:
            assert isinstance(capture, Capture)
            assert capture.checkpoint == checkpoint
            assert capture.targets() == {name: model.get_parameter(name) for name in names}
            blank = capture.blank()
            assert {name: row.shape for name, row in blank.rows.items()} == {
                "core.fc.weight": (0, 1, 7), "after.bias": (0, 1, D),
            }  # fmt: skip
            _, losses = capture.forward(data(), SIDE)
            assert capture.n_steps == 3
            assert torch.equal(capture.check_uses(data(), SIDE), losses.detach())
            checksums.append(capture.checksum())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert checksums[0] != checksums[1]
