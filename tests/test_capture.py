"""The hard cases of capture: every one exact, per step, example and parameter, or refused with a sentence."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from cases import CASES, rows
from reference import aliased_gradients, next_token_loss, spread
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from captum_sdi import Exact, LoopSpec, SDIInfluence, find_loop
from captum_sdi.capture.tape import Tape
from captum_sdi.checkpoints import listed_checkpoints
from captum_sdi.data.collate import Collator
from captum_sdi.data.examples import Examples
from captum_sdi.data.losses import TokenCrossEntropy
from captum_sdi.data.side import Side
from captum_sdi.data.stream import Stream
from captum_sdi.features import concatenate
from captum_sdi.loop.parameters import as_loop
from captum_sdi.passes import Engine

D, N, T = 4, 3, 5
"""Width, examples, positions. No two are alike, or an axis taken for another would pass."""


def squared(output: Tensor, labels: Tensor) -> Tensor:
    return ((output - labels) ** 2).flatten(1).sum(1)


def data(n: int = N, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, n, *(shape or (T, D)), generator=generator, dtype=torch.float64)
    return x, y


def capture(
    model: nn.Module,
    batches: Sequence[Any],
    loop: Any = "core",
    layers: Any = "loop",
    loss_fn: Any = squared,
    forward_kwargs: Any = None,
    checkpointing: bool = False,
) -> dict[str, Tensor]:
    """What the library caught, by parameter: ``(n, 2 + t, entries)``."""
    engine = Engine(model, lambda *_: 1.0, layers, as_loop(loop), Exact(), activation_checkpointing=checkpointing)
    examples = Examples(Stream(batches, "train_dataset"), Side("training", loss_fn, forward_kwargs))
    with engine.points(listed_checkpoints([None]), examples) as points:
        blocks = next(points).blocks(examples, by_step=True)
        return concatenate([block.features for block in blocks]).rows


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(ours) == set(truth)
    assert any(value.any() for value in truth.values())
    scale = max(float(value.abs().max()) for value in truth.values())
    for name in truth:
        assert ours[name].shape == truth[name].shape, name
        assert (ours[name] - truth[name]).abs().max() <= tolerance * scale, name


def truth_of(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    names: Sequence[str],
    loop: Sequence[str] = ("core",),
    anchors: Sequence[str] | None = None,
    run: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x),
) -> dict[str, Tensor]:
    """By aliasing, one example at a time."""
    each = []
    for x, y in zip(*batch, strict=True):

        def loss(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            return squared(run(model, x.unsqueeze(0)), y.unsqueeze(0)).sum()

        each.append(aliased_gradients(model, loss, names, loop, anchors or loop[:1]))
    return {name: torch.stack([one[name] for one in each]) for name in names}


def halves(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, ...]]:
    """The same examples as a batch of two and one of one."""
    return [tuple(part[:2] for part in batch), tuple(part[2:] for part in batch)]


def assert_exact(model: nn.Module, names: Sequence[str] | None = None, layers: Any = None, **kwargs: Any) -> None:
    """Captured in one batch, in two, and with activations recomputed: always the truth."""
    names = names or [name for name, _ in model.named_parameters()]
    truth = truth_of(model, data(), names)
    for batches, checkpointing in (([data()], False), (halves(data()), False), ([data()], True)):
        ours = capture(model, batches, layers=layers, checkpointing=checkpointing, **kwargs)
        assert_same(ours, truth)
    assert all(p.is_leaf and p.grad is None for p in model.parameters())


def refused(match: str, model: nn.Module, layers: Any = None, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=match):
        capture(model, [data()], layers=layers, **kwargs)


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

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp(**changes: Any) -> nn.Module:
    return Block(lambda m, x: m.down(torch.tanh(m.up(x))), up=nn.Linear(D, 6), down=nn.Linear(6, D), **changes)


class Positions(nn.Module):
    """Learned positions: a slice of the parameter itself, or one per example."""

    def __init__(self, per_example: bool) -> None:
        super().__init__()
        self.weight, self.per_example = nn.Parameter(torch.zeros(9, D)), per_example

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight[: x.shape[1]]
        return rows.expand(len(x), *rows.shape) if self.per_example else rows


# --- what models do around their layers ---


EXACT: dict[str, Callable[[], nn.Module]] = {
    "in place on a view": lambda: Block(lambda m, x: m.fc(x).relu_(), fc=nn.Linear(D, D)),
    "in place without bias": lambda: Block(lambda m, x: m.fc(x).tanh_(), fc=nn.Linear(D, D, bias=False)),
    "in place on Conv1D": lambda: Block(lambda m, x: m.fc(x).mul_(2).tanh_(), fc=Conv1D(D, D)),
    "in place on a norm": lambda: Block(lambda m, x: m.fc(m.norm(x).add_(1)), norm=nn.LayerNorm(D), fc=nn.Linear(D, D)),
    "a part in place": lambda: Block(lambda m, x: _zeroed(m.fc(x)), fc=nn.Linear(D, D)),
    "a slice of the output": lambda: Block(lambda m, x: m.fc(x)[..., 1 : D + 1], fc=nn.Linear(D, D + 2)),
    "called with a keyword": lambda: Block(lambda m, x: m.fc(input=x), fc=nn.Linear(D, D)),
    "called twice in a step": lambda: Block(lambda m, x: m.fc(torch.tanh(m.fc(x))), fc=nn.Linear(D, D)),
    "a module under two names": lambda: _two_names(),
    "positions of each example": lambda: Block(
        lambda m, x: m.fc(x + m.pos(x)), fc=nn.Linear(D, D), pos=Positions(per_example=True)
    ),
    "parameters without gradient": lambda: Block(
        lambda m, x: m.fc(x) + m.off(x).detach(), fc=nn.Linear(D, D), off=nn.Linear(D, D)
    ),
    "a norm on four axes": lambda: Block(
        lambda m, x: m.norm(m.fc(x).unflatten(-1, (2, 2))).flatten(2), fc=nn.Linear(D, D), norm=nn.RMSNorm(2)
    ),
}  # fmt: skip


def _zeroed(x: Tensor) -> Tensor:
    x[:, 1:3].zero_()
    return x


def _two_names() -> nn.Module:
    fc = nn.Linear(D, D)
    return Block(lambda m, x: m.a(torch.tanh(m.b(x))), a=fc, b=fc)


@pytest.mark.parametrize("name", EXACT)
def test_what_a_block_does_with_its_layers(name: str) -> None:
    assert_exact(looped(EXACT[name]()))


class Copies(TorchDispatchMode):
    """Counts copies of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [nn.Linear(D, D), Conv1D(D, D), nn.LayerNorm(D), nn.RMSNorm(D)], ids=repr)
def test_watching_a_layer_copies_nothing(layer: nn.Module) -> None:
    """Not even where it returns a view, as linear layers with a bias do on three axes."""
    model = looped(Block(lambda m, x: torch.tanh(m.layer(x)), layer=layer))
    (x, y), caught = data(), []
    with Tape(model, dict(model.named_parameters()), LoopSpec(("core",))) as tape, Copies() as copies:
        losses = tape.forward(lambda: squared(model(x), y), N)
        tape.backward(losses, lambda name, *_: caught.append(name))
    assert len(caught) == len(list(model.core.parameters())) * 3 + 4
    assert copies.count == 0


def test_a_slice_of_a_parameter_is_exact_and_the_parameter_stays_a_leaf() -> None:
    """No call of its module has an example axis: the block around it answers."""
    model = looped(Block(lambda m, x: m.fc(x + m.pos(x)), fc=nn.Linear(D, D), pos=Positions(per_example=False)))
    assert_exact(model)


class Pass(nn.Module):
    """Returns its own input when it is switched off."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.weight, self.on = nn.Parameter(torch.ones(D)), on

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if self.on else x


@pytest.mark.parametrize("on", [True, False])
def test_a_module_that_returns_its_own_input(on: bool) -> None:
    assert_exact(looped(Block(lambda m, x: m.fc(m.gate(x)), fc=nn.Linear(D, D), gate=Pass(on))))


class ScalesInPlace(Pass):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.weight)


def test_a_layer_that_changes_its_input() -> None:
    assert_exact(looped(Block(lambda m, x: m.fc(m.gate(x * 1)), fc=nn.Linear(D, D), gate=ScalesInPlace(True))))


class Steered(Pass):
    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        return x * self.weight ** (step + 1)


def test_a_layer_called_with_more_than_a_tensor() -> None:
    """Its first call gives the default and looks harmless."""
    assert_exact(looped(Block(lambda m, x: m.gate(m.gate(m.fc(x)), step=1), fc=nn.Linear(D, D), gate=Steered(True))))


# --- weights used beside their layer ---


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: m.fc(x) + x @ m.fc.weight.T,
        lambda m, x: m.fc(x) + m.fc.forward(x),
        lambda m, x: m.fc(x) + m.fc.bias,
        lambda m, x: m.fc.forward(x),
        lambda m, x: F.linear(x, m.fc.weight),
    ],
    ids=["weight", "forward", "bias", "only forward", "only weight"],
)
def test_a_weight_used_beside_its_layer_is_exact(use: Any) -> None:
    model = looped(Block(use, fc=nn.Linear(D, D), other=nn.Linear(D, D)))
    model.core.run = lambda m, x: use(m, torch.tanh(m.other(x)))
    assert_exact(model)


class FusedHead(nn.Module):
    """A language model that multiplies with the embedding's weight instead of calling a head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.core = nn.Embedding(7, D), mlp()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wte(ids)
        for _ in range(3):
            h = h + self.core(h)
        return h @ self.wte.weight.T


def test_fused_head_on_a_called_embedding_is_exact() -> None:
    """The embedding's layer is called all the same: only the graph shows the other use, in the coda."""
    model = spread(FusedHead().double())
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    loss = lambda output, labels: F.cross_entropy(output.mT, labels, reduction="none").sum(1)  # noqa: E731
    ours = capture(model, [(ids, ids)], layers=None, loss_fn=loss)
    head = model.wte.weight.detach().clone().requires_grad_(True)
    for number, row in enumerate(ids):
        hidden = model.wte(row[None])
        for _ in range(3):
            hidden = hidden + model.core(hidden)
        grads = torch.autograd.grad(loss(hidden @ head.T, row[None]).sum(), [model.wte.weight, head])
        for place, grad in enumerate(grads):
            assert torch.allclose(ours["wte.weight"][number, place], grad.flatten())
    assert not ours["wte.weight"][:, 2:].any()


class Bare(nn.Module):
    """Attention-like: a parameter of its own beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.qk_bias = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.out(torch.softmax((q + self.qk_bias) @ (k + self.qk_bias).mT, -1) @ x)


@pytest.mark.parametrize("layers", ["loop", None])
def test_a_bare_parameter_is_exact(layers: str | None) -> None:
    model = looped(Block(lambda m, x: m.fc(m.attn(x)), attn=Bare(), fc=nn.Linear(D, D)))
    names = [n for n, _ in model.named_parameters() if layers is None or n.startswith("core.")]
    assert_exact(model, names, layers)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_in_a_block(norm_first: bool, batch_first: bool) -> None:
    """Its weights are bare, its output layer is never called, and the fast path of an encoder layer calls none."""
    encoder = nn.TransformerEncoderLayer(
        D, 2, dim_feedforward=6, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    core = encoder if batch_first else Block(lambda m, x: m.encoder(x.transpose(0, 1)).transpose(0, 1), encoder=encoder)
    assert_exact(looped(core))
    names = [f"{'core' if batch_first else 'core.encoder'}.self_attn.out_proj.{kind}" for kind in ("weight", "bias")]
    assert_exact(looped(core), names, layers=[names[0].rpartition(".")[0]])


class Experts(nn.Module):
    """A mixture with its experts' weights as one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.weight = nn.Linear(D, 2), nn.Parameter(torch.zeros(2, D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bte,btd,edf->btf", self.router(x).softmax(-1), x, self.weight)


class LeafExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,edf->btef", x, self.weight)


def test_moe_experts_as_one_parameter_of_three_axes() -> None:
    """Bare beside a router, and as a leaf of one tensor."""
    assert_exact(looped(Experts()))
    leaf = Block(
        lambda m, x: (m.router(x).softmax(-1).unsqueeze(-1) * m.experts(x)).sum(2),
        router=nn.Linear(D, 2),
        experts=LeafExperts(),
    )
    assert_exact(looped(leaf))


def test_positions_flattened_into_examples_are_exact() -> None:
    assert_exact(looped(Block(lambda m, x: m.fc(x.flatten(0, 1)).view_as(x), fc=nn.Linear(D, D))))


# --- hooks and reparametrisations of the user's ---


@pytest.mark.parametrize("kind", ["output changed", "input changed", "kept for the loss", "backward", "observed"])
def test_hooks_of_the_users(kind: str) -> None:
    model = looped(mlp())
    kept: list[Tensor] = []
    layer = model.core.up
    {
        "output changed": lambda: layer.register_forward_hook(lambda m, args, output: output * 3),
        "input changed": lambda: layer.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
        "kept for the loss": lambda: layer.register_forward_hook(lambda m, args, output: kept.append(output)),
        "backward": lambda: layer.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,)),
        "observed": lambda: model.register_forward_hook(lambda *_: None),
    }[kind]()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        extra = sum((h**2).flatten(1).sum(1) for h in kept[-3:])
        kept.clear()
        return squared(output, labels) + extra

    each = []
    for x, y in zip(*data(), strict=True):
        whole = lambda model, x=x, y=y: loss(model(x[None]), y[None]).sum()  # noqa: E731
        each.append(aliased_gradients(model, whole, [n for n, _ in model.named_parameters()], ["core"], ["core"]))
    truth = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    for checkpointing in (False, True):
        assert_same(capture(model, [data()], layers=None, loss_fn=loss, checkpointing=checkpointing), truth)


def test_a_hook_that_changes_a_gradient_is_refused() -> None:
    """Such as one that trains only some rows of an embedding: it sees the batch's gradient, never one example's."""
    model = looped(mlp())
    hook = model.core.up.weight.register_hook(lambda grad: grad * 0)
    refused(
        r"'core.up' .*because a hook of its own changes its gradient.*layers=\['before', 'core.down', 'after'\]", model
    )
    hook.remove()
    assert_exact(model)


@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda fc: prune.l1_unstructured(fc, "weight", 3),
    ],
    ids=["weight_norm", "parametrized weight_norm", "spectral_norm", "pruned"],
)
def test_a_weight_computed_from_other_parameters_is_exact(change: Any) -> None:
    model = looped(mlp())
    with torch.no_grad():
        change(model.core.up)
    assert_exact(model)
    if parametrize.is_parametrized(model.core.up):
        parametrize.remove_parametrizations(model.core.up, "weight")
        assert_exact(model)


# --- loops ---


class Nested(nn.Module):
    """Twice an outer block, in which an inner block runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Block(self.turn, fc=nn.Linear(D, D), inner=mlp())

    @staticmethod
    def turn(m: Any, x: Tensor) -> Tensor:
        x = m.fc(x)
        for _ in range(3):
            x = x + m.inner(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.outer(x)))


@pytest.mark.parametrize(
    ("loop", "n_steps"),
    [
        (LoopSpec(("outer",)), 2),
        (LoopSpec(("outer.inner",)), 6),
        (LoopSpec(("outer",), ("outer.inner",)), 6),
        (LoopSpec(("outer",), ("outer", "outer.inner")), 8),
    ],
)
def test_nested_loops(loop: LoopSpec, n_steps: int) -> None:
    model = spread(Nested().double())
    truth = truth_of(
        model, data(), [n for n, _ in model.named_parameters()], loop.modules, loop.anchors or loop.modules
    )
    for checkpointing in (False, True):
        ours = capture(model, [data()], loop=loop, layers=None, checkpointing=checkpointing)
        assert ours["outer.inner.up.weight"].shape[1] == 2 + n_steps
        assert_same(ours, truth)


# --- activation checkpointing ---


class Checkpointed(Looped):
    """Checkpoints by itself, in evaluation mode too."""

    def __init__(self, core: nn.Module, reentrant: bool, where: str = "core") -> None:
        super().__init__(core)
        self.reentrant, self.where = reentrant, where

    def forward(self, x: Tensor) -> Tensor:
        run = lambda part, h: checkpoint(part, h, use_reentrant=self.reentrant)  # noqa: E731
        h = self.before(x)
        for _ in range(3):
            h = h + (run(self.core, h) if self.where == "core" else self.core(h))
        return run(self.after, h) if self.where == "after" else self.after(h)


@pytest.mark.parametrize("where", ["core", "after"])
def test_a_model_that_checkpoints_itself(where: str) -> None:
    """The blocks run twice, in the forward pass and again in the backward pass, and count once."""
    for core in (mlp(), EXACT["in place on a view"](), EXACT["called twice in a step"]()):
        assert_exact(spread(Checkpointed(core, False, where).double()))


@pytest.mark.parametrize("layers", ["loop", None, ["after"]])
def test_reentrant_checkpointing_is_refused(layers: Any) -> None:
    """With the loop alone as the target nothing before it asks for a gradient: torch itself would stay silent."""
    match = "reentrant activation checkpointing.*Checkpoint with use_reentrant=False"
    for where in ("core", "after"):
        model = spread(Checkpointed(mlp(), True, where).double())
        if layers == ["after"] and where == "core":  # no gradient flows through what is not asked for
            names = ["after.weight", "after.bias"]
            assert_same(capture(model, [data()], layers=layers), truth_of(model, data(), names))
        else:
            refused(match, model, layers)


class Runs(torch.autograd.Function):
    """A checkpoint of somebody's own, which recomputes in the backward pass without asking torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.run = run
        return run(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(grad)
        return x.grad, None


def test_another_autograd_function_around_a_layer_is_refused() -> None:
    model = spread(Looped(mlp()).double())
    model.core.run = lambda m, x: Runs.apply(x, lambda x: m.down(torch.tanh(m.up(x))))
    refused("'core.up' .*runs inside reentrant activation checkpointing or another autograd.Function", model)


def implicit(m: Any, x: Tensor) -> Tensor:
    """As implicit layers do it: the backward pass asks for a vector-Jacobian product of another call."""
    again = x.detach().requires_grad_()
    other = m.fc(again)
    output = m.fc(x)
    output.register_hook(lambda grad: grad + torch.autograd.grad(other, again, grad)[0])
    return output


def penalised(m: Any, x: Tensor) -> Tensor:
    """A gradient in the forward pass."""
    again = x.detach().requires_grad_()
    return m.fc(x) + torch.autograd.grad(m.fc(again).sum(), again)[0]


@pytest.mark.parametrize("run", [implicit, penalised], ids=lambda run: run.__name__)
def test_a_backward_pass_of_the_models_own_is_refused(run: Any) -> None:
    model = looped(Block(run, fc=nn.Linear(D, D)))
    refused(r"A backward pass within the forward or backward pass.*runs through 'core.fc' \(Linear\)", model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers_is_off_in_evaluation_mode(reentrant: bool) -> None:
    model, batch = CASES[0].model(), Collator()(rows(3, seed=1))
    plain = capture(model, [batch], layers=None, loss_fn=TokenCrossEntropy())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(capture(model.train(), [batch], layers=None, loss_fn=TokenCrossEntropy()), plain)
    assert model.training


# --- compiled, dispatched, wrapped ---


def compiled_inside(model: nn.Module) -> nn.Module:
    model.core = torch.compile(model.core)
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.core.forward = torch.compile(model.core.forward)
    return model


def compiled_layer(model: nn.Module) -> nn.Module:
    model.core.up.forward = torch.compile(model.core.up.forward)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, {"before": "cpu", "core": "cpu", "after": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, compiled_inside, compiled_forward, compiled_layer, compiled_in_place, dispatched, nn.DataParallel],
    ids=lambda wrap: wrap.__name__,
)
def test_a_wrapped_model_gives_the_same(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is compiled: a machine without a C++ compiler will do."""
    monkeypatch.setenv("CXX", "/no/compiler")
    model = looped(mlp(norm=nn.LayerNorm(D)))
    model.core.run = lambda m, x: m.down(m.up(m.norm(x)).relu_())
    plain = capture(model, [data()], layers=None)
    wrapped = wrap(copy.deepcopy(model))
    for checkpointing in (False, True):
        ours = capture(wrapped, [data()], layers=None, checkpointing=checkpointing)
        bare = {name.replace("_orig_mod.", "").removeprefix("module."): rows for name, rows in ours.items()}
        assert_same(bare, plain, tolerance=0)


def test_a_compiled_language_model_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    model, train = CASES[0].model(), rows(4, seed=1)
    plain = SDIInfluence(model, train, batch_size=2).step_influence(train[:2])
    ours = SDIInfluence(torch.compile(model), train, batch_size=2).step_influence(train[:2])
    assert torch.equal(ours.trajectories, plain.trajectories)


# --- the mechanics of published looped models, in small ---


def token_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy averaged over an example's targets, by the slow reference."""
    return torch.stack([next_token_loss(*one) for one in zip(output, labels, strict=True)])


def truth_of_rows(
    model: nn.Module, train: Sequence[dict[str, Tensor]], names: Sequence[str], loop: LoopSpec, forward: Any
) -> dict[str, Tensor]:
    """By aliasing, each row alone and unpadded, with the forward keywords that `forward` gives it."""
    each = []
    for row in train:
        ids = row["input_ids"].unsqueeze(0)

        def loss(model: nn.Module, row: dict[str, Tensor] = row, ids: Tensor = ids) -> Tensor:
            output = model(input_ids=ids, **forward({"input_ids": ids}))
            return next_token_loss(getattr(output, "logits", output)[0], row["labels"])

        each.append(aliased_gradients(model, loss, names, loop.modules, loop.anchors))
    return {name: torch.stack([one[name] for one in each]) for name in names}


def assert_rows_exact(
    model: nn.Module, loop: LoopSpec, layers: Any, names: Sequence[str], forward: Any = lambda batch: {}
) -> dict[str, Tensor]:
    """Padded in one batch, two by two, and with activations recomputed: always the truth, which is returned."""
    train = rows(4, seed=1)
    truth = truth_of_rows(model, train, names, loop, forward)
    for size, checkpointing in ((4, False), (3, False), (4, True)):
        batches = [Collator()(train[i : i + size]) for i in range(0, 4, size)]
        loss = TokenCrossEntropy() if isinstance(model, peft.PeftModel) else token_loss
        assert_same(capture(model, batches, loop, layers, loss, forward, checkpointing), truth)
    return truth


class OuroStyle(nn.Module):
    """The norm and an exit gate are inside the loop; logits are an expectation over the steps one may exit at."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.norm, self.gate = nn.Embedding(11, D), nn.LayerNorm(D), nn.Linear(D, 1)
        self.layers, self.lm_head = nn.ModuleList([mlp(), mlp()]), nn.Linear(D, 11, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, exit_at_step: int | None = None
    ) -> Tensor:
        h, states = self.wte(input_ids), []
        stay = exits = 1.0
        for _ in range(4):
            for layer in self.layers:
                h = h + layer(h)
            h = self.norm(h)
            states.append((h, exits := stay * torch.sigmoid(self.gate(h))))
            stay = stay - exits
        if exit_at_step is not None:
            return self.lm_head(states[exit_at_step][0])
        last = stay + states[-1][1]
        return sum(self.lm_head(h) * p for h, p in states[:-1]) + self.lm_head(states[-1][0]) * last


OURO = LoopSpec(("layers", "norm", "gate"), ("layers.0",))


@pytest.mark.parametrize("layers", ["loop", None])
def test_ouro_exit_gate_inside_the_loop(layers: str | None) -> None:
    """The gate of the last step decides nothing: its gradient is zero there, and not moved to another step."""
    model = spread(OuroStyle().double())
    names = [n for n, _ in model.named_parameters() if layers is None or n.startswith(("layers", "norm", "gate"))]
    truth = assert_rows_exact(model, OURO, layers, names)
    gate = truth["gate.weight"][:, 2:]
    assert gate[:, :3].abs().amax(-1).all()
    assert not gate[:, 3].any()


@pytest.mark.parametrize("exit_at", [0, 1, 3])
def test_ouro_early_exit_leaves_later_steps_at_zero(exit_at: int) -> None:
    model = spread(OuroStyle().double())
    names = [n for n, _ in model.named_parameters() if n.startswith(("layers", "norm", "gate"))]
    truth = assert_rows_exact(model, OURO, "loop", names, lambda batch: {"exit_at_step": exit_at})
    for name in ("layers.0.up.weight", "norm.weight"):
        steps = truth[name][:, 2:]
        assert steps[:, : exit_at + 1].abs().amax(-1).all()
        assert not steps[:, exit_at + 1 :].any()
    assert not truth["gate.weight"].any()


class CausalBare(Bare):
    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        scores = (q + self.qk_bias) @ (k + self.qk_bias).mT
        return self.out(torch.softmax(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -1e9), -1) @ x)


class HuginnStyle(nn.Module):
    """A random initial state, an adapter before two core blocks, first steps under no_grad, a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.prelude, self.adapter = nn.Embedding(11, D), mlp(), nn.Linear(2 * D, D)
        self.core_block = nn.ModuleList([CausalBare(), mlp()])
        self.ln_f, self.lm_head = nn.RMSNorm(D), nn.Linear(D, 11, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,  # taken and ignored, as Huginn does
        input_states: Tensor | None = None,
        num_steps: int | tuple[int, int] = (0, 3),
    ) -> Tensor:
        e = self.prelude(self.wte(input_ids))
        h = torch.randn_like(e) if input_states is None else input_states
        dark, lit = num_steps if isinstance(num_steps, tuple) else (num_steps, 0)
        with torch.no_grad():
            for _ in range(dark):
                h = self.step(h, e)
        for _ in range(lit):
            h = self.step(h, e)
        return self.lm_head(self.ln_f(h))  # (n, p, v)

    def step(self, h: Tensor, e: Tensor) -> Tensor:
        h = self.adapter(torch.cat([h, e], -1))
        for block in self.core_block:
            h = h + block(h)
        return self.ln_f(h)


HUGINN = LoopSpec(("adapter", "core_block"), ("adapter",))


def states(batch: Any) -> Tensor:
    """One initial state per example, seeded by its tokens: the same in any batch and behind any padding."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    made = torch.zeros(*batch["input_ids"].shape, D, dtype=torch.float64)
    for i, (ids, real) in enumerate(zip(batch["input_ids"], mask, strict=True)):
        digest = hashlib.blake2b(bytes(ids[real].tolist()), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        made[i, real] = torch.randn(int(real.sum()), D, generator=generator, dtype=torch.float64)
    return made


def huginn(num_steps: int | tuple[int, int]) -> Callable[[Any], dict[str, Any]]:
    return lambda batch: {"input_states": states(batch), "num_steps": num_steps}


@pytest.mark.parametrize(("num_steps", "dark"), [((0, 3), 0), ((2, 3), 2), ((1, 1), 1)])
@pytest.mark.parametrize("layers", ["loop", None])
def test_huginn_random_state_first_steps_without_gradient_and_a_bare_parameter(
    layers: str | None, num_steps: tuple[int, int], dark: int
) -> None:
    model = spread(HuginnStyle().double())
    inside = ("adapter", "core_block")
    names = [n for n, _ in model.named_parameters() if layers is None or n.startswith(inside)]
    assert "core_block.0.qk_bias" in names
    truth = assert_rows_exact(model, HUGINN, layers, names, huginn(num_steps))
    steps = truth["adapter.weight"][:, 2:]
    assert steps.shape[1] == sum(num_steps)
    assert not steps[:, :dark].any()
    assert steps[:, dark:].abs().amax(-1).all()


def test_huginn_random_state_that_nobody_seeds_is_refused() -> None:
    model, batch = spread(HuginnStyle().double()), Collator()(rows(4, seed=1))
    named = ["adapter", "core_block.1"]
    with pytest.raises(ValueError, match=r"not deterministic.*seeded state in forward_kwargs="):
        capture(model, [batch], HUGINN, named, token_loss)


def test_a_loop_that_runs_without_gradient_throughout_is_refused() -> None:
    """What an integer `num_steps` does in Huginn: every score would be zero."""
    model, batch = spread(HuginnStyle().double()), Collator()(rows(4, seed=1))
    match = r"owns 'adapter.weight'.*under torch.no_grad only.*Leave it out with layers=\['lm_head'\]"
    with pytest.raises(ValueError, match=match):
        capture(model, [batch], HUGINN, ["adapter", "core_block.1", "lm_head"], token_loss, huginn(3))


@pytest.mark.parametrize("layers", ["loop", None])
@pytest.mark.parametrize("merged", [False, True])
def test_lora_on_a_looped_block(layers: str | None, merged: bool) -> None:
    base = CASES[0].model()
    config = peft.LoraConfig(r=2, target_modules=r".*core\..*(attn|mlp)\..*", init_lora_weights=False)
    model = peft.get_peft_model(base, config).double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n and "core" in n for n in names)
    if merged:
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"never called the layer that owns 'base_model\.model\.core"):
            capture(model, [Collator()(rows(2, seed=1))], None, layers, TokenCrossEntropy())
        return
    core = LoopSpec(("base_model.model.core",), ("base_model.model.core",))
    truth = assert_rows_exact(model, core, layers, names)
    train = rows(4, seed=1)
    found = capture(model, [Collator()(train)], None, layers, TokenCrossEntropy())
    assert_same(found, truth)
    scores = SDIInfluence(model, train, layers=layers, batch_size=2, sketch=Exact()).step_influence(train)
    whole = torch.cat([truth[n] for n in names], -1)
    expected = torch.einsum("qtd,nd->qnt", whole[:, 2:], whole.sum(1))
    assert torch.allclose(scores.trajectories, expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in names)


# --- what a pass holds --------------------------------------------------------------------------------------------


def test_finding_the_loop_keeps_no_activation() -> None:
    """It runs a forward pass in gradient mode; with many loop steps its activations would outweigh those to come."""
    model, saved = CASES[0].model(torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        find_loop(model, Collator()(rows(2, seed=1)))
    assert not saved
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_free_memory_goes_back_once_per_loop_step(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    monkeypatch.setattr("captum_sdi.capture.heap.find_malloc_trim", lambda: returned.append)
    n_steps = 3

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(n_steps):
                x = self.core(x)
            return x

    capture(Looped().double(), [data()], checkpointing=checkpointing)
    of_one_batch = len(returned)
    returned.clear()
    capture(Looped().double(), [data(), data()], checkpointing=checkpointing)
    # The second batch is a forward and a backward pass; of the first one an example is rehearsed, too.
    assert len(returned) - of_one_batch == (2 * n_steps if checkpointing else 0)
    assert of_one_batch <= 6 * n_steps
