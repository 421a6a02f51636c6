"""The looped models of Hugging Face, each against the slow truth: per parameter, per example, per step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import LAPS, VOCAB, ZOO, Looped

from captum_sdi import Exact, LoopSpec, SDIInfluence, coverage_check, find_loop
from captum_sdi.capture.featurizer import Featurizer
from captum_sdi.capture.rules import registry, rule
from captum_sdi.capture.rules.linear import linear
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import default_loss
from captum_sdi.data.side import Side


@pytest.fixture(params=ZOO, ids=lambda looped: looped.name)
def looped(request: pytest.FixtureRequest) -> Looped:
    return request.param


def features(looped: Looped, model: nn.Module, names: list[str], loop: LoopSpec) -> dict[str, Tensor]:
    """The library's ``(n, 2 + t, entries)`` of all rows in one batch, padded on the right."""
    featurizer = Featurizer(model, names, loop, Exact())
    rows = looped.rows()
    side = Side("train", looped.loss_fn or default_loss(model), None)
    with featurizer.installed("current") as capture:
        capture.check_uses(Collator()(rows[:1]), side)
        return capture(Collator()(rows), side, True, range(len(rows))).rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_use_of_every_parameter_is_exact(looped: Looped, dtype: torch.dtype) -> None:
    """Inside the loop and outside it, of three examples in one padded batch."""
    model = looped.model(dtype)
    loop = find_loop(model, Collator()(looped.rows()))
    assert loop == looped.loop_of(model)
    names = looped.trainable(model)
    ours = features(looped, model, names, loop)
    truths = [looped.truth(model, row, names) for row in looped.rows()]
    largest = max(theirs.abs().max() for truth in truths for theirs in truth.values())
    for name in looped.beside:
        theirs = torch.stack([looped.sums(model, row, [name])[name] for row in looped.rows()])
        assert (ours[name].sum(1) - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    for name in set(names) - set(looped.beside):
        theirs = torch.stack([truth[name] for truth in truths])
        assert ours[name].shape == theirs.shape == (3, 2 + looped.n_steps, model.get_parameter(name).numel())
        scale = theirs.abs().max().clamp(min=1e-2 * largest)
        assert (ours[name] - theirs).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_scores_are_exact_with_nothing_said_about_the_loop(looped: Looped, recompute: bool) -> None:
    """End to end: `SDIInfluence` finds the loop, pads, batches and multiplies, also with activation checkpointing."""
    model = looped.model()
    rows, names = looped.rows(), looped.in_loop(model)
    grads = torch.stack([torch.cat([*looped.truth(model, row, names).values()], 1) for row in rows])  # (n, 2 + t, d)
    settings = {"sketch": Exact(), "activation_checkpointing": recompute}
    sdi = SDIInfluence(model, rows, loss_fn=looped.loss_fn, batch_size=2, **settings)
    steps = sdi.step_influence(rows)
    assert sdi.loop == looped.loop_of(model)
    expected = torch.einsum("qtd,nd->qnt", grads[:, 2:], grads.sum(1))
    assert (steps.trajectories - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert steps.trajectories.any(0).any(0).logical_not().nonzero().flatten().tolist() == [*looped.without_gradient]


def test_all_trainable_parameters_are_covered(looped: Looped) -> None:
    model = looped.model()
    batch = Collator()(looped.rows())
    checked = coverage_check(model, batch, layers=None, loop=looped.loop, loss_fn=looped.loss_fn)
    assert set(checked.parameters) == set(looped.trainable(model)) >= set(looped.in_loop(model))


# --- finding the loop ---


def named(name: str) -> Looped:
    return next(looped for looped in ZOO if looped.name == name)


def batch_of(looped: Looped) -> dict[str, Tensor]:
    return Collator()(looped.rows())


TABLES = {
    "gpt2": """\
LoopSpec(modules=('transformer.h.1', 'transformer.h.2'), anchors=('transformer.h.1',)): 3 steps
module                 calls  step (from 0)
transformer.wte            1  prelude
transformer.wpe            1  prelude
transformer.h.0            1  prelude
transformer.h.1 to .2      3  0-2
transformer.h.7            1  coda
transformer.ln_f           1  coda
lm_head                    1  coda""",
    "hrm_text": """\
LoopSpec(modules=('model.L_module', 'model.H_module'), anchors=('model.L_module', 'model.H_module')): 8 steps
module              calls  step (from 0)
model.embed_tokens      1  prelude
model.L_module          6  0-2, 4-6
model.H_module          2  3, 7
lm_head                 1  coda
Without gradient, so of no influence: step 0-1, 4.""",
}


@pytest.mark.parametrize("name", TABLES)
def test_what_was_found_prints_as_a_table(name: str) -> None:
    looped = named(name)
    assert str(find_loop(looped.model(), batch_of(looped))) == TABLES[name]


def test_what_was_found_is_a_plain_loop_spec() -> None:
    looped = named("gpt2")
    found = find_loop(looped.model(), batch_of(looped))
    assert found == looped.loop
    assert looped.loop == found
    assert {found: 1}[looped.loop] == 1
    assert found != LoopSpec(looped.modules)
    assert found != "gpt2"
    assert repr(found) == repr(looped.loop)


@pytest.mark.parametrize("name", [looped.name for looped in ZOO if not looped.name.startswith("zamba")])
def test_watching_finds_what_the_presets_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_sdi.loop.presets.PRESETS", {})
    looped = named(name)
    assert find_loop(looped.model(), batch_of(looped)) == LoopSpec(looped.modules, looped.anchors)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **kwargs: Tensor) -> object:
        return self.inner(**kwargs)


@pytest.mark.parametrize("name", ["gpt2", "hrm_text", "albert, 2 group(s), chunks of 0"])
def test_prefixes_of_wrappers_do_not_matter(name: str) -> None:
    looped = named(name)
    model, batch = looped.model(), batch_of(looped)
    assert find_loop(torch.compile(model), batch) == looped.loop
    assert find_loop(nn.DataParallel(model), batch) == looped.loop
    inner = LoopSpec(*([f"inner.{name}" for name in names] for names in (looped.loop.modules, looped.loop.anchors)))
    assert find_loop(Wrapper(model), batch) == inner


def test_adapters_do_not_matter() -> None:
    peft = pytest.importorskip("peft")
    looped = named("qwen3")
    model = peft.get_peft_model(looped.model(), peft.LoraConfig(target_modules=["q_proj"]))
    found = find_loop(model, batch_of(looped))
    assert found.modules == tuple(f"base_model.model.{name}" for name in looped.modules)


class Settings:
    """The one thing of a config that tells a family."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


class OuroLike(nn.Module):
    """Ouro's module names and order of calls: a norm and an exit gate inside the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, 4)
        self.model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)])
        self.model.norm, self.model.early_exit_gate = nn.LayerNorm(4), nn.Linear(4, 1)
        self.lm_head = nn.Linear(4, VOCAB)
        self.config = Settings("ouro")

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.model.embed_tokens(input_ids)
        for _ in range(LAPS):
            for layer in self.model.layers:
                hidden = layer(hidden)
            hidden = self.model.norm(hidden)
            self.model.early_exit_gate(hidden)
        return self.lm_head(hidden)


class HuginnLike(nn.Module):
    """Huginn's module names and order of calls: an adapter first, a norm used after the loop and after the coda."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {
            name: nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]) for name in ("prelude", "core_block", "coda")
        }
        parts = {"wte": nn.Embedding(VOCAB, 4), "adapter": nn.Linear(8, 4), "ln_f": nn.LayerNorm(4)}
        self.transformer = nn.ModuleDict({**parts, **blocks})
        self.lm_head = nn.Linear(4, VOCAB)
        self.config = Settings("huginn_raven")

    def forward(self, input_ids: Tensor, num_steps: tuple[int, int] = (1, 2)) -> Tensor:
        parts = self.transformer
        embedded = state = parts["wte"](input_ids)
        for block in parts["prelude"]:
            embedded = block(embedded)
        for step in range(sum(num_steps)):
            with torch.set_grad_enabled(step >= num_steps[0]):
                state = parts["adapter"](torch.cat([state, embedded], -1))
                for block in parts["core_block"]:
                    state = torch.tanh(block(state))
        state = parts["ln_f"](state)
        for block in parts["coda"]:
            state = block(state)
        return self.lm_head(parts["ln_f"](state))


def test_the_presets_of_ouro_and_huginn() -> None:
    batch = {"input_ids": torch.arange(5).unsqueeze(0)}
    spec = "LoopSpec(modules=('model.layers', 'model.norm', 'model.early_exit_gate'), anchors=('model.layers.0',))"
    assert str(find_loop(OuroLike(), batch)) == (
        f"{spec}: 3 steps\n"
        "module                 calls  step (from 0)\n"
        "model.embed_tokens         1  prelude\n"
        "model.layers.0 to .1       3  0-2\n"
        "model.norm                 3  0-2\n"
        "model.early_exit_gate      3  0-2\n"
        "lm_head                    1  coda"
    )
    spec = "LoopSpec(modules=('transformer.adapter', 'transformer.core_block'), anchors=('transformer.adapter',))"
    assert str(find_loop(HuginnLike(), batch, forward_kwargs={"num_steps": (2, 2)})) == (
        f"{spec}: 4 steps\n"
        "module                          calls  step (from 0)\n"
        "transformer.wte                     1  prelude\n"
        "transformer.prelude.0 to .1         1  prelude\n"
        "transformer.adapter                 4  0-3\n"
        "transformer.core_block.0 to .1      4  0-3\n"
        "transformer.ln_f                    2  coda\n"
        "transformer.coda.0 to .1            1  coda\n"
        "lm_head                             1  coda\n"
        "Without gradient, so of no influence: step 0-1."
    )


@pytest.mark.parametrize("model", [OuroLike(), HuginnLike()], ids=["ouro", "huginn"])
def test_a_family_is_found_without_its_preset_too(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": torch.arange(5).unsqueeze(0)}
    known = find_loop(model, batch)
    monkeypatch.setattr("captum_sdi.loop.presets.PRESETS", {})
    watched = find_loop(model, batch)
    assert watched.rows == known.rows
    assert watched.anchors == known.anchors


def test_layers_that_point_to_another_layers_weights_are_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Mixture-of-Recursions: other modules, the same parameters."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.tanh(self.up(x)))

    layers = [Layer() for _ in range(6)]
    for i in (3, 4):
        for part in ("up", "down"):
            getattr(layers[i], part).weight = getattr(layers[i - 2], part).weight
    model = nn.Sequential(*layers)
    found = find_loop(model, (torch.randn(2, 4), torch.randn(2, 4)))
    assert found == LoopSpec(("1", "2", "3", "4"), ("1", "3"))
    assert [row.where for row in found.rows] == ["prelude", "0", "0", "1", "1", "coda"]
    looped = named("zamba2")
    model = looped.model()
    if looped.loop_of(model) != looped.loop:
        return  # one module with many names
    monkeypatch.setattr("captum_sdi.loop.presets.PRESETS", {})
    hybrid = tuple(site.removesuffix(".shared_transformer") for site in looped.modules)
    assert find_loop(model, batch_of(looped)) == LoopSpec(hybrid, hybrid)


def test_a_preset_that_does_not_fit_is_passed_over() -> None:
    """A model that only shares its family's name is watched."""
    model = named("gpt2").model()
    model.config.model_type = "hrm_text"
    assert find_loop(model, batch_of(named("gpt2"))) == named("gpt2").loop


def test_when_nothing_repeats_it_says_what_it_saw() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(3):
                x = self.block.forward(x)
            return x

    match = r"Nothing repeats in Direct.*\(1 modules with parameters ran once each, 'block' not at all; a call of"
    with pytest.warns(UserWarning, match=match):
        found = find_loop(Direct(), (torch.randn(2, 4), torch.randn(2, 4)))
    assert str(found) == "LoopSpec(modules=('',), anchors=('',)): 1 step"


# --- coverage ---


class Halved(nn.Linear):
    """A layer whose registered rule is wrong."""


class Twins(nn.Module):
    """Two branches, one of which hardly matters."""

    def __init__(self, faint: float, quiet: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.loud, self.quiet, self.faint = nn.Linear(4, 4), quiet(4, 4), faint

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.loud(x)) + self.faint * scale * torch.tanh(self.quiet(x))
        return x


@pytest.mark.parametrize(
    ("faint", "quiet", "refused"), [(1e-4, nn.Linear, False), (1e-4, Halved, True), (0.0, Halved, False)]
)
def test_coverage_is_relative_to_each_parameters_own_gradient(
    faint: float, quiet: type[nn.Linear], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missed of a small gradient is missed all the same; of a vanishing one, nothing can be."""
    monkeypatch.setattr(registry, "_REGISTERED", list(registry._REGISTERED))
    rule(Halved)(lambda module, activation, backprop, wanted: linear(module, activation, backprop / 2, wanted))
    torch.manual_seed(0)
    batch, loss = (torch.randn(3, 4), torch.randn(3, 4)), nn.MSELoss(reduction="none")
    model = Twins(faint, quiet)
    if refused:
        with pytest.raises(ValueError, match=r"differs from the gradient(.|\n)*quiet.weight"):
            coverage_check(model, batch, loss_fn=loss)
        kwargs = {"forward_kwargs": {"scale": 0.0}}
        assert max(coverage_check(model, batch, loss_fn=loss, **kwargs).differences) < 1e-5
    else:
        table = coverage_check(model, batch, loss_fn=loss)
        assert max(table.differences) < 1e-5
        assert str(table).splitlines()[0].split() == ["parameter", "captured", "expected", "difference"]


class Head(nn.Module):
    """As in Albert and BERT, a head that holds the bias of a layer inside it, too; `uses` adds it once more."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.block, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias, self.uses = self.decoder.bias, uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.block(x))
        return self.decoder(x) + (self.bias if self.uses else 0)


def test_a_bias_that_a_head_holds_is_exact_whether_it_uses_it_or_not() -> None:
    torch.manual_seed(0)
    rows, loss = [tuple(torch.randn(2, 4)) for _ in range(3)], nn.MSELoss(reduction="none")
    for model in (Head(False), Head(True)):
        table = coverage_check(model, Collator()(rows), layers=None, loss_fn=loss)
        assert "bias" in table.parameters
        scores = SDIInfluence(model, rows, layers=["decoder"], loss_fn=loss, sketch=Exact()).self_influence()
        parameters = list(model.decoder.parameters())
        for (x, y), score in zip(rows, scores, strict=True):
            grads = torch.autograd.grad(loss(model(x[None]), y[None]).sum(), parameters)
            assert torch.isclose(score, sum((grad**2).sum() for grad in grads), rtol=1e-5)
