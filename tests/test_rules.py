"""Every layer rule against ordinary autograd, one example at a time: exactly, and through a sketch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from reference import spread
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from captum_sdi import Exact, SDIInfluence, TensorSketch
from captum_sdi.capture.adoption import Adoption
from captum_sdi.capture.rules.bare_call import bare_call
from captum_sdi.capture.rules.base import Rule
from captum_sdi.capture.rules.choose import choose_rule, why_uncovered
from captum_sdi.capture.rules.per_example import per_example as PER_EXAMPLE
from captum_sdi.features import Dense

N = 3


class CastedLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * nn.functional.linear(x, self.weight.to(x.dtype)) + torch.tanh(self.bias.to(x.dtype))


class WithScale(nn.Linear):
    """Linear's forward and one more parameter, which a hook applies."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[1]))
        self.register_forward_hook(lambda m, args, output: output * m.scale)


class Elementwise(nn.Module):
    """One weight along the last axis, used as a test writes it down."""

    def __init__(self, run: Callable[[Tensor, Tensor], Tensor], size: int = 4) -> None:
        super().__init__()
        self.weight, self.run = nn.Parameter(torch.zeros(size)), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


class Looks(Elementwise):
    """Looks at values, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__(lambda x, w: torch.stack([one * w * w if one.sum() > 0 else one * w for one in x]))


class Keeps(Elementwise):
    """Draws its cue from the whole batch."""

    def __init__(self) -> None:
        super().__init__(lambda x, w: (x - x.mean(0)) * w)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 6, shape)


def norm(module: nn.Module) -> nn.Module:
    """With running statistics that are not the initial ones."""
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2)
    return module


Make = tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]

LAYERS: dict[str, Make] = {
    "Linear": ("linear", lambda: nn.Linear(4, 6), lambda: torch.randn(N, 5, 4)),
    "Linear without bias": ("linear", lambda: nn.Linear(4, 6, bias=False), lambda: torch.randn(N, 5, 4)),
    "Linear on two axes": ("linear", lambda: nn.Linear(4, 6), lambda: torch.randn(N, 4)),
    "Linear on four axes": ("linear", lambda: nn.Linear(4, 6), lambda: torch.randn(N, 2, 5, 4)),
    "Linear with a frozen bias": ("linear", lambda: _frozen(nn.Linear(4, 6), "bias"), lambda: torch.randn(N, 5, 4)),
    "Conv1D": ("conv1d", lambda: Conv1D(6, 4), lambda: torch.randn(N, 5, 4)),
    "Embedding": ("embedding", lambda: nn.Embedding(6, 4), lambda: ids(N, 5)),
    "Embedding of one id": ("embedding", lambda: nn.Embedding(6, 4), lambda: ids(N)),
    "Embedding with padding": ("embedding", lambda: nn.Embedding(6, 4, padding_idx=2), lambda: ids(N, 9)),
    "Embedding with the last as padding": ("embedding", lambda: nn.Embedding(6, 4, padding_idx=-1), lambda: ids(N, 9)),
    "LayerNorm": ("layer norm", lambda: nn.LayerNorm(4), lambda: torch.randn(N, 5, 4)),
    "LayerNorm without bias": ("layer norm", lambda: nn.LayerNorm(4, bias=False), lambda: torch.randn(N, 5, 4)),
    "LayerNorm over two axes": ("layer norm", lambda: nn.LayerNorm((5, 4)), lambda: torch.randn(N, 2, 5, 4)),
    "LayerNorm over all axes": ("layer norm", lambda: nn.LayerNorm((5, 4)), lambda: torch.randn(N, 5, 4)),
    "RMSNorm": ("layer norm", lambda: nn.RMSNorm(4), lambda: torch.randn(N, 2, 5, 4)),
    "RMSNorm over two axes": ("layer norm", lambda: nn.RMSNorm((5, 4), eps=0.1), lambda: torch.randn(N, 5, 4)),
    "Llama's norm": ("affine", lambda: LlamaRMSNorm(4), lambda: torch.randn(N, 5, 4)),
    "Qwen3's norm on heads": ("affine", lambda: Qwen3RMSNorm(4), lambda: torch.randn(N, 5, 2, 4)),
    "Gemma's norm": ("affine", lambda: GemmaRMSNorm(4), lambda: torch.randn(N, 5, 4)),
    "T5's norm": ("affine", lambda: T5LayerNorm(4), lambda: torch.randn(N, 5, 4)),
    "a scale": ("affine", lambda: Elementwise(lambda x, w: x * w), lambda: torch.randn(N, 5, 4)),
    "a shift": ("affine", lambda: Elementwise(lambda x, w: x + w), lambda: torch.randn(N, 5, 4)),
    "an absolute scale": ("per example", lambda: Elementwise(lambda x, w: x * w.abs()), lambda: torch.randn(N, 5, 4)),
    "a squared scale": ("per example", lambda: Elementwise(lambda x, w: x * w**2), lambda: torch.randn(N, 5, 4)),
    "a rotated scale": ("per example", lambda: Elementwise(lambda x, w: x * w.roll(1)), lambda: torch.randn(N, 5, 4)),
    "a scale of another axis": (
        "per example", lambda: Elementwise(lambda x, w: x * w.view(4, 1)), lambda: torch.randn(N, 4, 4),
    ),
    "a layer that looks at values": ("per example", Looks, lambda: torch.randn(N, 5, 4)),
    "GroupNorm": ("per example", lambda: nn.GroupNorm(2, 4), lambda: torch.randn(N, 4, 4)),
    "GroupNorm on two axes": ("affine", lambda: nn.GroupNorm(2, 4), lambda: torch.randn(N, 4)),
    "BatchNorm1d": ("per example", lambda: norm(nn.BatchNorm1d(4)), lambda: torch.randn(N, 4, 4)),
    "BatchNorm1d on two axes": ("affine", lambda: norm(nn.BatchNorm1d(4)), lambda: torch.randn(N, 4)),
    "BatchNorm2d": ("per example", lambda: norm(nn.BatchNorm2d(4)), lambda: torch.randn(N, 4, 5, 4)),
    "InstanceNorm1d": ("per example", lambda: nn.InstanceNorm1d(4, affine=True), lambda: torch.randn(N, 4, 4)),
    "PReLU": ("per example", lambda: nn.PReLU(4), lambda: torch.randn(N, 4, 4)),
    "PReLU on two axes": ("affine", lambda: nn.PReLU(4), lambda: torch.randn(N, 4)),
    "PReLU with one weight": ("per example", nn.PReLU, lambda: torch.randn(N, 5, 4)),
    "Conv1d": ("per example", lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(N, 4, 5)),
    "Conv1d in groups": ("per example", lambda: nn.Conv1d(4, 6, 2, groups=2), lambda: torch.randn(N, 4, 5)),
    "Conv2d": ("per example", lambda: nn.Conv2d(2, 3, 2, stride=2), lambda: torch.randn(N, 2, 6, 5)),
    "ConvTranspose1d": ("per example", lambda: nn.ConvTranspose1d(4, 2, 3), lambda: torch.randn(N, 4, 5)),
    "CastedLinear": ("per example", lambda: CastedLinear(4, 6), lambda: torch.randn(N, 5, 4)),
    "an overridden Linear": ("per example", lambda: _overridden(nn.Linear(4, 6)), lambda: torch.randn(N, 4)),
    "EmbeddingBag": ("per example", lambda: nn.EmbeddingBag(6, 4, mode="sum"), lambda: ids(N, 5)),
}  # fmt: skip


def _frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


def _overridden(module: nn.Module) -> nn.Module:
    module.forward = lambda x: torch.tanh(type(module).forward(module, x))  # type: ignore[method-assign]
    return module


def made(name: str, dtype: torch.dtype) -> tuple[str, nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, make, activation = LAYERS[name]
    module, x = spread(make(), 0.7).to(dtype), activation()
    return kind, module, x.to(dtype) if x.is_floating_point() else x


def truth_of(module: nn.Module, activation: Tensor, backprop: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    """One example at a time, in a batch of one."""
    parameters = [module.get_parameter(name).requires_grad_(True) for name in wanted]
    each = []
    for a, g in zip(activation, backprop, strict=True):
        each.append(torch.autograd.grad((module(a.unsqueeze(0))[0] * g).sum(), parameters))
    return {name: torch.stack(grads) for name, grads in zip(wanted, zip(*each, strict=True), strict=True)}


def projected(rule: Rule, module: nn.Module, a: Tensor, g: Tensor, wanted: list[str], sketch: Any) -> dict[str, Tensor]:
    kinds = {name: sketch.projection(name, module.get_parameter(name)) for name in wanted}
    sums = {name: torch.zeros(len(a), kind.width, dtype=kind.dtype) for name, kind in kinds.items()}
    for name, examples, gradient in rule.gradients(module, a, g, wanted):
        sums[name][examples] += kinds[name](gradient)
    return sums


@pytest.mark.parametrize("name", LAYERS)
def test_a_rule_is_exact(name: str) -> None:
    kind, module, activation = made(name, torch.float64)
    wanted = [n for n, p in module.named_parameters() if p.requires_grad]
    output = module(activation).detach()
    backprop = torch.randn_like(output)
    rule = choose_rule(module, activation, output)
    assert isinstance(rule, Rule), rule
    assert rule.name == kind
    assert why_uncovered(module) is None
    truth = truth_of(module, activation, backprop, wanted)
    before = {n: p.clone() for n, p in (*module.named_parameters(), *module.named_buffers())}
    ours = projected(rule, module, activation, backprop, wanted, Exact())
    assert all(torch.equal(before[n], p) for n, p in (*module.named_parameters(), *module.named_buffers()))
    for n in wanted:
        scale = truth[n].abs().max()
        assert scale > 0
        # Norms of transformers compute in float32, whatever they are given.
        tolerance = 1e-10 if module.__module__.startswith(("torch.", "test_")) else 1e-6
        assert (ours[n] - truth[n].flatten(1)).abs().max() <= tolerance * scale
        assert ours[n].dtype == torch.float64
    sketch = TensorSketch(5)  # every factor hashed in blocks or in one
    ours = projected(rule, module, activation, backprop, wanted, sketch)
    for n in wanted:
        entries = sketch.projection(n, module.get_parameter(n))(Dense(truth[n]))
        assert ours[n].dtype == torch.float32
        assert torch.allclose(ours[n], entries, rtol=1e-4, atol=1e-5 * float(entries.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_taken_in_full_precision(name: str, dtype: torch.dtype) -> None:
    """Weights, activations and backprops are rounded to half precision; what is made of them is not."""
    _, module, activation = made(name, dtype)
    wanted = [n for n, p in module.named_parameters() if p.requires_grad]
    output = module(activation).detach()
    backprop = torch.randn_like(output)
    rule = choose_rule(module, activation, output)
    assert isinstance(rule, Rule), rule
    ours = projected(rule, module, activation, backprop, wanted, Exact())
    whole = module.double()
    lifted = activation.double() if activation.is_floating_point() else activation
    truth = truth_of(whole, lifted, backprop.double(), wanted)
    for n in wanted:
        assert ours[n].dtype == torch.float32
        assert (ours[n] - truth[n].flatten(1)).abs().max() <= 1e-5 * truth[n].abs().max()


def test_a_call_on_many_examples_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "captum_sdi.capture.rules.per_example._PER_EXAMPLE_BUDGET", 80
    )  # one example of 24 + 6 entries, or two
    module, activation = spread(CastedLinear(4, 6)).double(), torch.randn(7, 5, 4, dtype=torch.float64)
    backprop = torch.randn(7, 5, 6, dtype=torch.float64)
    rule = choose_rule(module, activation, module(activation))
    assert isinstance(rule, Rule)
    pieces = [examples for name, examples, _ in rule.gradients(module, activation, backprop, ["weight"])]
    assert len(pieces) > 1
    truth = truth_of(module, activation, backprop, ["weight", "bias"])
    ours = projected(rule, module, activation, backprop, ["weight", "bias"], Exact())
    for name, grads in truth.items():
        assert torch.allclose(ours[name], grads.flatten(1))


@pytest.mark.parametrize(
    ("make", "activation", "match"),
    [
        (lambda: nn.Embedding(6, 4, scale_grad_by_freq=True), lambda: ids(N, 5), "scale_grad_by_freq"),
        (lambda: nn.Embedding(6, 4, max_norm=1.0), lambda: ids(N, 5), "max_norm"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), lambda: torch.randn(N, 4), "on one example alone"),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), lambda: torch.randn(N, 4, 5), "something else than in"),
        (Keeps, lambda: torch.randn(N, 5, 4), "something else than in the batch"),
        (lambda: nn.GRU(4, 4, batch_first=True), lambda: torch.randn(N, 5, 4), "it returned a tuple, not one tensor"),
        (lambda: WithScale(6, 4), lambda: torch.randn(N, 6), r"something else than in the batch"),
        (lambda: nn.MultiheadAttention(4, 2), lambda: torch.randn(N, 4), "outside any layer of its own"),
    ],
    ids=["frequency", "max_norm", "batch statistics", "batch statistics 3d", "mean", "GRU", "extra parameter", "MHA"],
)
def test_what_no_rule_covers_says_why(make: Any, activation: Any, match: str) -> None:
    torch.manual_seed(0)
    module, x = spread(make(), 0.7), activation()
    output = x if isinstance(module, nn.MultiheadAttention) else module(x)
    reason = choose_rule(module, x, output)
    assert isinstance(reason, str)
    assert match in reason


def test_a_state_of_zeros_does_not_make_a_layer_look_affine() -> None:
    layer, zeros = Elementwise(lambda x, w: x * nn.functional.softplus(w)), torch.zeros(N, 5, 4)
    rule = choose_rule(layer, zeros, layer(zeros))
    assert isinstance(rule, Rule)
    assert rule.name == "per example"


def test_a_layer_that_mixes_examples_is_found_after_a_state_of_zeros() -> None:
    mixing = Elementwise(lambda x, w: (x - x.mean(0)) * (1 + w))

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Sequential(mixing)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros_like(x)
            for _ in range(3):
                state = self.core(state) + x
            return state

    def squares(output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels).square().sum(1)

    squares.reduction = "none"  # type: ignore[attr-defined]
    rows = [(torch.randn(4), torch.randn(4)) for _ in range(N)]
    sdi = SDIInfluence(Loop(), rows, loop="core", loss_fn=squares, batch_size=N)
    with pytest.raises(ValueError, match=r"In a batch of 2 examples are mixed.*\(Elementwise\).*batch_size=1"):
        sdi.influence((torch.randn(2, 4), torch.randn(2, 4)))


def test_running_out_of_memory_is_not_taken_for_an_unknown_layer() -> None:
    def fail(x: Tensor, w: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = torch.ones(N, 4)
    with pytest.raises(torch.OutOfMemoryError):
        choose_rule(Elementwise(fail), x, x)
    with pytest.raises(torch.OutOfMemoryError):
        list(PER_EXAMPLE(Elementwise(fail), x, x, ["weight"]))


def test_a_rule_leaves_the_activation_and_the_parameters_alone() -> None:
    """Trying a layer out must not disturb a forward pass that is under way."""
    module = Elementwise(lambda x, w: x.add_(1) * w)
    x = torch.randn(N, 5, 4)
    before = x.clone()
    reason = choose_rule(module, x, (x + 1) * module.weight)
    assert reason == "it changes its input in place"
    assert torch.equal(x, before)
    assert module.weight.grad is None
    assert module.weight.is_leaf


def test_a_layer_placed_by_accelerate_keeps_its_closed_form() -> None:
    """Or its gradients would be formed entry by entry."""
    placed, other = nn.Linear(4, 6), nn.Linear(4, 6)
    add_hook_to_module(placed, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(other, ModelHook())  # may compute anything
    x = torch.randn(N, 5, 4)
    rules = [choose_rule(layer, x, nn.Linear.forward(layer, x)) for layer in (placed, other)]
    assert [rule.name for rule in rules if isinstance(rule, Rule)] == ["linear", "per example"]


def test_a_layer_is_called_with_other_tensors_and_gets_its_own_back() -> None:
    """Also under the second name of a tied parameter, and when the call fails."""
    module = Elementwise(lambda x, w: x * w * module.again)
    weight = module.again = module.weight
    called = bare_call(module, {"weight": torch.full((4,), 3.0)}, torch.ones(1, 4))
    assert torch.equal(called, torch.full((1, 4), 9.0))
    with pytest.raises(RuntimeError):
        bare_call(module, {"weight": torch.ones(3)}, torch.ones(1, 4))
    assert module.weight is module.again is weight


def test_a_found_rule_is_forgotten_with_the_forward_it_was_found_for() -> None:
    """It is kept for later passes of an object, in which a user may have changed the layer."""
    adoption, layer, x = Adoption(), CastedLinear(4, 6), torch.randn(N, 5, 4)
    chosen = choose_rule(layer, x, layer(x))
    assert isinstance(chosen, Rule)
    adoption.rules_of(layer)[True] = chosen
    assert adoption.rules_of(layer) == {True: chosen}
    layer.forward = partial(nn.Linear.forward, layer)  # type: ignore[method-assign]
    assert adoption.rules_of(layer) == {}
