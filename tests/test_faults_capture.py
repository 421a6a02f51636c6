"""Models as strangers write them: what their forward does with labels, masks, counters and parameters of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, rows
from reference import spread
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from captum_sdi import Exact, LoopSpec, SDIInfluence, TensorSketch, coverage_check, find_loop
from captum_sdi.capture.featurizer import Featurizer
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import TokenCrossEntropy, default_loss
from captum_sdi.data.side import Side
from captum_sdi.preconditioners import Hessian

D, V = 4, 11
ROWS = rows(5, seed=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, h: Tensor, *_: Any) -> Tensor:
        return h + torch.tanh(self.fc(h))


class Base(nn.Module):
    """An embedding, a causal loop of three steps, a head. Ignores padding on the right."""

    def __init__(self, core: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.core, self.head = nn.Embedding(V, D), core or Block(), nn.Linear(D, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.looped(self.emb(input_ids)))

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = self.core(h)
        return h


def sdi(model: nn.Module, data: Any = ROWS, **kwargs: Any) -> SDIInfluence:
    return SDIInfluence(model, data, **{"sketch": Exact(), "loop": "core", "batch_size": 3, **kwargs})


def causal(n: int) -> Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


def per_example(model: nn.Module, names: list[str], loss_fn: Any = None, **forward: Any) -> Tensor:
    """Ordinary gradients, an example at a time, without padding: ``(n, entries)``."""
    parameters = [model.get_parameter(name) for name in names]
    each = []
    for row in ROWS:
        ids, labels = row["input_ids"][None], row["labels"][None]
        loss = (loss_fn or default_loss(model))(model(input_ids=ids, **forward), labels).sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        each.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(each)


def assert_exact(model: nn.Module, layers: Any = None, tolerance: float = 1e-9, **kwargs: Any) -> None:
    """Scores of a ragged batch are products of ordinary gradients; steps are those of examples one by one."""
    named = model.named_parameters()
    names = [name for name, p in named if p.requires_grad and (layers is None or name.startswith("core."))]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    grads = per_example(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    expected = grads @ grads.T
    one_by_one = sdi(model, layers=layers, batch_size=1, **kwargs).step_influence(ROWS)
    for checkpointing in (False, True):
        steps = sdi(model, layers=layers, activation_checkpointing=checkpointing, **kwargs).step_influence(ROWS)
        assert (steps.influence_scores - expected).abs().max() <= tolerance * expected.abs().max()
        for field in ("trajectories", "prelude", "coda"):
            ours, alone = getattr(steps, field), getattr(one_by_one, field)
            assert (ours - alone).abs().max() <= tolerance * expected.abs().max()


def features(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The library's ``(n, 2 + t, entries)`` of one padded batch."""
    featurizer = Featurizer(model, names, LoopSpec(("core",)), Exact())
    side = Side("train", default_loss(model), None)
    with featurizer.installed("current") as capture:
        return capture(Collator()(ROWS), side, True, range(len(ROWS))).rows


# --- B1: other logits with labels ---


class OuroReplica(Base):
    """With labels, logits are an expectation over the exits; without, the last exit's, and no gradient for the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        h, mixed = self.emb(input_ids), torch.zeros(())
        for _ in range(3):
            h = self.core(h)
            mixed = mixed + torch.sigmoid(self.gate(h)) * self.head(h)
        if labels is None:
            return {"logits": self.head(h)}
        own = F.cross_entropy(mixed[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Output", (), {"logits": mixed, "loss": own})()


@pytest.mark.parametrize("handed", [None, lambda batch: {"labels": batch["labels"]}], ids=["default", "by the user"])
def test_b1_models_that_answer_otherwise_with_labels(handed: Any) -> None:
    model = spread(OuroReplica().double())
    names = [name for name, _ in model.named_parameters()]
    each = []
    for row in ROWS:
        ids, labels = row["input_ids"][None], row["labels"][None]
        loss = model(ids, labels=labels).loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        each.append(torch.cat([grad.flatten() for grad in grads]))
    expected = torch.stack(each) @ torch.stack(each).T
    loop = LoopSpec(("core", "gate"), ("core",))
    influence = sdi(model, layers=None, loop=loop, forward_kwargs=handed)
    assert torch.allclose(influence.influence(ROWS), expected)
    assert "gate.weight" in names


def test_b1_curvature_is_of_the_loss_with_labels() -> None:
    model = spread(OuroReplica().double())
    loop = LoopSpec(("core", "gate"), ("core",))
    settings: dict[str, Any] = {"layers": None, "loop": loop, "preconditioner": Hessian(rank=12)}
    by_the_user = sdi(model, forward_kwargs=lambda batch: {"labels": batch["labels"]}, **settings).influence(ROWS)
    assert torch.allclose(sdi(model, **settings).influence(ROWS), by_the_user, rtol=1e-6)


# --- B2: counters, caches ---


class Counting(Base):
    """Hands its block a counter that it counts up in place, and a mask that it fills."""

    def __init__(self) -> None:
        super().__init__(CountedBlock())

    def looped(self, h: Tensor) -> Tensor:
        step, seen = torch.tensor(-1), torch.zeros(1, dtype=torch.bool)
        for _ in range(3):
            step += 1
            h = self.core(h, step, seen)
            seen |= True
        return h


class CountedBlock(Block):
    def forward(self, h: Tensor, step: Tensor, seen: Tensor) -> Tensor:
        return h + (1 + step + 2 * seen) * torch.tanh(self.fc(h))


def test_b2_counters_in_place_with_activation_checkpointing() -> None:
    assert_exact(spread(Counting().double()))


def test_b2_a_cache_is_refused_by_name() -> None:
    for checkpointing in (False, True):
        asked = {"forward_kwargs": {"use_cache": True}, "activation_checkpointing": checkpointing}
        with pytest.raises(ValueError, match=r"use_cache=True: a looped block would append.*use_cache=False"):
            sdi(CASES[0].model(), **asked).influence(ROWS)
    scores = sdi(CASES[0].model(), forward_kwargs={"use_cache": False}).influence(ROWS)
    assert torch.allclose(scores, sdi(CASES[0].model()).influence(ROWS))


# --- B3: parameters beside the calls of a layer ---


class StepEmbedding(Base):
    """Adds a row of its own parameter before every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.state = nn.Parameter(torch.zeros(3, D)), nn.Parameter(torch.zeros(D))

    def looped(self, h: Tensor) -> Tensor:
        e, h = h, h + self.state
        for t in range(3):
            h = self.core(h + e * self.steps[t])
        return h


class Injection(nn.Module):
    """Parcae's: a diagonal of exponentials and a matrix, of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a, self.b = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D, D))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return torch.exp(-self.log_a.exp()) * h + e @ self.b.T


class ParcaeReplica(Base):
    def __init__(self) -> None:
        super().__init__()
        self.adapter = Injection()

    def looped(self, h: Tensor) -> Tensor:
        e = h
        for _ in range(3):
            h = self.core(self.adapter(h, e))
        return h


class ParcaeAtTheTop(Injection, Base):
    """The same, its parameters in the model itself."""

    def __init__(self) -> None:
        Base.__init__(self)
        self.log_a, self.b = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D, D))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        e = h = self.emb(input_ids)
        for _ in range(3):
            h = self.core(Injection.forward(self, h, e))
        return self.head(h)


class Masked(nn.Module):
    """An encoder layer that looks back only."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 6, 0.0, batch_first=True, norm_first=norm_first)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer(h, src_mask=causal(h.shape[1]).to(h))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.attention(h, h, h, attn_mask=causal(h.shape[1]).to(h))[0]


class Experts(nn.Module):
    """Experts as one tensor, called on flattened tokens, each sent to its best expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(3, D, 6)), nn.Parameter(torch.zeros(3, 6, D))

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for expert in range(3):
            places = (chosen == expert).nonzero().flatten()
            hidden = torch.tanh(tokens[places] @ self.up[expert]) @ self.down[expert]
            out.index_add_(0, places, hidden * weights[places, None])
        return out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 3), Experts()

    def forward(self, h: Tensor) -> Tensor:
        tokens = h.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        return h + self.experts(tokens, chosen, weights).view_as(h)


class OwnLora(nn.Module):
    """Uses the weights of its adapters' layers, which are never called."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(D, D), nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(F.linear(h, self.base.weight + self.b.weight @ self.a.weight, self.base.bias))


class Told(nn.Module):
    """What it computes depends on an attribute that its parent sets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.child, self.step = nn.Parameter(torch.zeros(D)), nn.Linear(D, D), 0

    def forward(self, h: Tensor) -> Tensor:
        return h + (1 + self.step) * self.scale * torch.tanh(self.child(h))


class Tells(Base):
    def __init__(self) -> None:
        super().__init__(Told())

    def looped(self, h: Tensor) -> Tensor:
        for step in range(3):
            self.core.step = step
            h = self.core(h)
        return h


class Leaks(nn.Module):
    """Keeps a part of what it computes as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.child = nn.Parameter(torch.zeros(D)), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        out = self.scale * torch.tanh(self.child(h))
        self.kept = out * 2
        return h + out


class ReadsWhatLeaks(Base):
    def __init__(self) -> None:
        super().__init__(Leaks())

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = self.core(h)
        kept = self.core.kept
        del self.core.kept
        return h + kept


def adapted(**settings: Any) -> nn.Module:
    model = Base(Mlp())
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"], **settings))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 6), nn.Linear(6, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


BARE: dict[str, Callable[[], nn.Module]] = {
    "step embedding and state of the model's own": StepEmbedding,
    "parcae": ParcaeReplica,
    "parcae, at the top": ParcaeAtTheTop,
    "multihead attention": lambda: Base(Attention()),
    "encoder layer": lambda: Base(Masked(False)),
    "encoder layer, norm first": lambda: Base(Masked(True)),
    "experts": lambda: Base(Mixture()),
    "lora of one's own": lambda: Base(OwnLora()),
    "leaks": ReadsWhatLeaks,
}


@pytest.mark.parametrize("layers", ["loop", None])
@pytest.mark.parametrize("name", BARE)
def test_b3_bare_parameters_are_exact(name: str, layers: Any) -> None:
    assert_exact(spread(BARE[name]().double()), layers)


@pytest.mark.parametrize("name", ["encoder layer", "experts", "step embedding and state of the model's own"])
def test_b3_bare_parameters_are_exact_in_float32(name: str) -> None:
    assert_exact(spread(BARE[name]()), tolerance=1e-4)


@pytest.mark.parametrize("dora", [True, False])
def test_b3_dora_is_exact(dora: bool) -> None:
    model = spread(adapted(use_dora=dora, init_lora_weights=False).double(), 0.1)
    assert_exact(model, loop="base_model.model.core")


@pytest.mark.parametrize("name", ["multihead attention", "parcae, at the top"])
def test_b3_a_sketch_of_bare_parameters_keeps_its_error_bars(name: str) -> None:
    model = spread(BARE[name]().double())
    exact = sdi(model, layers=None).step_influence(ROWS)
    scores = [sdi(model, layers=None, sketch=TensorSketch(dim=8, seed=seed)).step_influence(ROWS) for seed in range(5)]
    deviations = torch.stack([(s.influence_scores - exact.influence_scores) / s.score_errors for s in scores])
    assert deviations.square().mean().sqrt() < 2
    assert deviations.abs().max() < 6


def test_b3_the_row_of_a_step_is_used_at_that_step_alone() -> None:
    """Before a step's first layer it belongs to the step before, as a layer that is called there would."""
    rows_of_steps = features(spread(StepEmbedding().double()), ["steps", "core.fc.weight"])["steps"]
    by_row = rows_of_steps.view(len(ROWS), 5, 3, D)
    prelude, coda, *in_steps = by_row.unbind(1)
    assert not coda.any()
    for step, bin in enumerate([prelude, *in_steps[:2]]):
        assert bin[:, step].abs().amax(-1).all()
        assert not torch.cat([bin[:, :step], bin[:, step + 1 :]], 1).any()


def test_b3_tokens_of_a_recomputed_module_add_up_to_its_example() -> None:
    model = spread(Base(Attention()).double())
    featurizer = Featurizer(model, ["core.attention.in_proj_weight"], LoopSpec(("core",)), Exact())
    side = Side("train", default_loss(model), None)
    with featurizer.installed("current") as capture:
        batch = Collator()(ROWS)
        examples, tokens = (
            capture(batch, side, True, range(len(ROWS)), unit=unit).rows["core.attention.in_proj_weight"]
            for unit in ("example", "token")
        )
    assert torch.allclose(tokens.view(len(ROWS), -1, *examples.shape[1:]).sum(1), examples)


def test_b3_a_module_told_by_its_parent_is_exact_and_not_recomputed_with_another_state() -> None:
    model = spread(Tells().double())
    grads = per_example(model, [name for name, _ in model.named_parameters()])
    assert torch.allclose(sdi(model, layers=None).influence(ROWS), grads @ grads.T)
    with pytest.raises(ValueError, match=r"set as its attribute.*pass activation_checkpointing=False"):
        sdi(model, layers=None, activation_checkpointing=True).influence(ROWS)


class Centred(nn.Module):
    """Mixes the examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.child = nn.Parameter(torch.zeros(D)), nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.scale * torch.tanh(self.child(h) - h.mean(0, keepdim=True))


def test_b3_b6_mixing_modules_are_refused_in_one_sentence_whose_advice_works() -> None:
    model = spread(Base(nn.Sequential(Centred(), Centred())).double())
    equal = [{name: column[:5] for name, column in row.items()} for row in ROWS]
    match = r"'core.0' \(Centred\).*and in 'core.1' \(Centred\).*Pass batch_size=1"
    with pytest.raises(ValueError, match=match):
        sdi(model, equal).influence(equal)
    assert sdi(model, equal, batch_size=1).influence(equal).isfinite().all()


# --- B4, B5 ---


class Edits(Base):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.emb(input_ids)
        for step in range(3):
            h = self.core(h * attention_mask[..., None].clone())
            attention_mask[:, : step + 1] = 0
        return self.head(h)


def test_b4_a_model_that_edits_its_inputs_is_handed_copies() -> None:
    model = Edits().double()
    masked = [{**row, "attention_mask": torch.ones(len(row["input_ids"]))} for row in ROWS]
    batch = Collator()(masked)
    before = {name: column.clone() for name, column in batch.items()}
    assert sdi(model, masked).influence(masked).any()
    assert max(coverage_check(model, batch, layers=None, loop="core").differences) < 1e-6
    find_loop(model, batch)
    assert all(torch.equal(batch[name], column) for name, column in before.items())


class FloatMask(Base):
    """Hands its mask on to an attention that adds it."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.emb(input_ids)
        for _ in range(3):
            h = self.core(F.scaled_dot_product_attention(h, h, h, attn_mask=attention_mask))
        return self.head(h)


class CausalFloatMask(Base):
    """As `FloatMask`, but no example looks at its padding on the right."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.emb(input_ids)
        mask = causal(h.shape[1]).to(h)
        if attention_mask is not None:
            assert attention_mask.is_floating_point()
            mask = mask + attention_mask[:, None]
        for _ in range(3):
            h = self.core(F.scaled_dot_product_attention(h, h, h, attn_mask=mask))
        return self.head(h)


def test_b5_the_collators_mask_is_left_out_where_that_is_right() -> None:
    model = spread(CausalFloatMask().double())
    with pytest.warns(UserWarning, match=r"fails on the attention_mask that captum_sdi's Collator makes.*left out"):
        scores = sdi(model).influence(ROWS)
    assert torch.allclose(scores, sdi(model, batch_size=1).influence(ROWS))
    masked = [{**row, "attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.long)} for row in ROWS]
    with pytest.raises(ValueError, match=r"runs without attention_mask.*it stands in the rows"):
        sdi(model).influence(masked)


def test_b5_a_model_that_looks_at_padding_is_refused_without_its_mask_and_the_advice_works() -> None:
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"depend on the batch.*mask"):
        sdi(FloatMask()).influence(ROWS)
    assert sdi(FloatMask(), batch_size=1).influence(ROWS).any()


def test_b5_what_compares_no_example_alone_leaves_no_mask_out() -> None:
    with pytest.raises(ValueError, match=r"runs without attention_mask.*Collator made it.*batch_size=1"):
        sdi(spread(CausalFloatMask().double()), preconditioner=Hessian(rank=1)).influence(ROWS)


# --- B6, B7 ---


class Flat(Base):
    """Four layers on flattened tokens, inside no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def looped(self, h: Tensor) -> Tensor:
        for _ in range(3):
            flat = self.core(h).flatten(0, 1)
            for expert in self.experts:
                flat = torch.tanh(expert(flat))
            h = flat.view_as(h)
        return h


class Unused(Base):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.other = nn.Linear(D, D), nn.Linear(D, D)


def test_b6_layers_on_flattened_tokens_are_exact_and_what_is_unused_is_refused_at_once() -> None:
    flat = LoopSpec(("core", "experts"), ("core",))
    assert_exact(spread(Flat().double()), loop=flat)
    with pytest.raises(ValueError, match=r"'spare.weight', 'spare.bias', 'other.weight', 'other.bias'"):
        sdi(Unused(), layers=None).influence(ROWS)


class TrainOnly(Base):
    graph: Callable[[nn.Module], bool] = staticmethod(lambda module: module.training)

    def looped(self, h: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.graph(self)):
            return super().looped(h)


def test_b7_a_graph_in_train_only_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"runs in eval\(\), without asking for self.training"):
        sdi(TrainOnly()).influence(ROWS)
    mended = TrainOnly()
    mended.graph = lambda module: torch.is_grad_enabled()
    assert sdi(mended).influence(ROWS).any()


class HuginnReplica(Base):
    """A bare bias in its core, a state for each position, and pairs of depths; an int runs without gradient."""

    def __init__(self) -> None:
        super().__init__(Centreless())
        self.adapter = nn.Linear(2 * D, D)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, num_steps: Any = (0, 3), input_states: Any = None
    ) -> Tensor:
        e = self.emb(input_ids)
        h = torch.randn_like(e) if input_states is None else input_states
        dark, lit = num_steps if isinstance(num_steps, tuple) else (num_steps, 0)
        step = torch.tensor(0)
        for lap in range(dark + lit):
            with torch.set_grad_enabled(lap >= dark):
                h = self.core(self.adapter(torch.cat([h, e], -1)), step)
            step += 1
        return self.head(h)


class Centreless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk_bias, self.qk = nn.Parameter(torch.zeros(2, 1, D)), nn.Linear(D, D)

    def forward(self, h: Tensor, step: Tensor) -> Tensor:
        q, k = self.qk(h) + self.qk_bias[0], self.qk(h) + self.qk_bias[1]
        return h + torch.softmax(q @ k.mT + causal(h.shape[1]).to(h), -1) @ h / (1 + step)


NOISE = torch.randn(1, 12, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def huginn(num_steps: Any) -> Callable[[Any], dict[str, Any]]:
    """One noise for each position, and how many steps run without and with gradient."""

    def keywords(batch: Any) -> dict[str, Any]:
        n, p = batch["input_ids"].shape
        return {"input_states": NOISE[:, :p].expand(n, -1, -1), "num_steps": num_steps}

    return keywords


@pytest.mark.parametrize("checkpointing", [False, True])
def test_b7_huginn_in_three_lines(checkpointing: bool) -> None:
    model = spread(HuginnReplica().double())
    loop = LoopSpec(("adapter", "core"), ("adapter",))
    settings = {"loop": loop, "activation_checkpointing": checkpointing}
    with pytest.raises(ValueError, match=r"a pair such as \{'num_steps': \(0, 4\)\}"):
        sdi(model, **settings, forward_kwargs=huginn(4)).influence(ROWS)
    names = ["core.qk_bias", "core.qk.weight", "core.qk.bias", "adapter.weight", "adapter.bias"]
    each = []
    for row in ROWS:
        states = NOISE[:, : len(row["input_ids"])]
        logits = model(row["input_ids"][None], num_steps=(0, 4), input_states=states)
        loss = TokenCrossEntropy()(logits, row["labels"][None]).sum()
        grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        each.append(torch.cat([grad.flatten() for grad in grads]))
    expected = torch.stack(each) @ torch.stack(each).T
    assert torch.allclose(sdi(model, **settings, forward_kwargs=huginn((0, 4))).influence(ROWS), expected)


def test_b7_frozen_adapters_name_the_remedy() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"PeftModel.from_pretrained\(..., is_trainable=True\)"):
        sdi(model, layers=None, loop="base_model.model.core").influence(ROWS)


def test_b7_labels_withheld_from_t5_and_the_remedies() -> None:
    torch.manual_seed(0)
    settings = {"vocab_size": V, "d_model": D, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**settings, decoder_start_token_id=0)).eval()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    data = [{"input_ids": row, "labels": row} for row in ids]
    kwargs: dict[str, Any] = {"loop": "encoder.block.0", "layers": ["encoder.block.0"], "batch_size": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"needs its labels: pass forward_kwargs=lambda batch"):
            sdi(model, data, **kwargs).influence(data)
        kwargs["forward_kwargs"] = lambda batch: {"labels": batch["labels"]}
        with pytest.raises(ValueError, match=r"TokenCrossEntropy\(shift=False\), which agrees"):
            sdi(model, data, **kwargs).influence(data)
        kwargs["loss_fn"] = TokenCrossEntropy(shift=False)
        assert sdi(model, data, **kwargs).influence(data).any()


def test_the_adoption_holds_for_later_checkpoints() -> None:
    """A second checkpoint repeats no search: as many forward passes as a model without bare parameters needs."""
    counts = []
    for core in (Attention(), Mlp()):
        model = spread(Base(core).double())
        calls: list[int] = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        featurizer = Featurizer(model, [n for n, _ in model.named_parameters()], LoopSpec(("core",)), Exact())
        side = Side("train", default_loss(model), None)
        for checkpoint in ("first", "second"):
            with featurizer.installed(checkpoint) as capture:
                calls.clear()
                capture(Collator()(ROWS), side, True, range(len(ROWS)))
        counts.append(len(calls))
    assert counts == [1, 1]


def test_what_is_checked_costs_two_examples_alone() -> None:
    """Once for all that is run alike."""
    model = Base()
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    influence = sdi(model, batch_size=5)
    influence.influence(ROWS)
    assert sorted(seen) == [1] * 2 + [5] * 2  # both sides are run alike here
    seen.clear()
    influence.influence(ROWS)
    assert seen == [5, 5]
