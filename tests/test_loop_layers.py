"""`loop_layers` against the same layers written out, transformers' expectations, and per-step gradients by untying."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from reference import next_token_loss, spread
from torch import Tensor, nn

from captum_sdi import Exact, LoopSpec, SDIInfluence, coverage_check, find_loop
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM, loop_layers

VOCAB = 13
START, STOP = 1, 3

# Sliding windows that are shorter than the sequences: a layer that is given another layer's mask is noticed.
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 1, "head_dim": 4}
MIXED = {**GROUPED, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 4,
                                 "bos_token_id": 1, "eos_token_id": 2}, "transformer.h"),
    "llama": ("LlamaForCausalLM", GROUPED, "model.layers"),
    "qwen3": ("Qwen3ForCausalLM", {**MIXED, "use_sliding_window": True}, "model.layers"),
    "gemma2": ("Gemma2ForCausalLM", MIXED, "model.layers"),
    "gemma3_text": ("Gemma3ForCausalLM", MIXED, "model.layers"),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON, "gpt_neox.layers"),
    "opt": ("OPTForCausalLM", {**COMMON, "ffn_dim": 12, "word_embed_proj_dim": 8}, "model.decoder.layers"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2,
                                          "moe_intermediate_size": 8}, "model.layers"),
    "bert": ("BertForMaskedLM", COMMON, "bert.encoder.layer"),
}  # fmt: skip


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    kind, settings, _ = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **{**settings, **changes})
    return spread(getattr(transformers, kind)(config))


def layers_of(model: nn.Module, family: str) -> nn.ModuleList:
    return model.get_submodule(FAMILIES[family][2])  # type: ignore[return-value]


def written_out(model: Any, family: str, n_loops: int, damping: float = 1.0) -> tuple[Any, list[list[nn.Module]]]:
    """An ordinary model with one copy of the layers for each repetition, and these copies."""
    model = copy.deepcopy(model)
    layers = layers_of(model, family)
    order = [0, *[*range(START, STOP)] * n_loops, *range(STOP, len(layers))]
    stack = [copy.deepcopy(layers[i]) for i in order]
    layers._modules.clear()
    layers.extend(stack)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in order]
    model.config.num_hidden_layers = len(order)
    steps = [stack[at : at + STOP - START] for at in range(START, START + n_loops * (STOP - START), STOP - START)]
    for step in steps:
        _dampen(step[0], step[-1], damping)
    return model, steps


def _dampen(first: nn.Module, last: nn.Module, damping: float) -> None:
    """The definition, by hooks: ``h + damping * (layers(h) - h)``."""
    if damping == 1.0:
        return  # h + (layers(h) - h) is not layers(h) to the last bit
    entered: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = entered.pop()
        if isinstance(output, tuple):
            return (hidden + damping * (output[0] - hidden), *output[1:])
        return hidden + damping * (output - hidden)

    last.register_forward_hook(leave)


def batch() -> dict[str, Tensor]:
    """Two rows, the second padded on the left."""
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# --- what the looped model computes ---


def test_one_repetition_is_the_untouched_model(family: str) -> None:
    model = build(family)
    before = model(**batch())
    looped = loop_layers(model, START, STOP, 1)
    once = looped(**batch())
    assert torch.equal(once.logits, before.logits)
    assert list(once) == list(before)  # with the key-value cache, where there is one
    looped.n_loops = 3
    assert torch.equal(looped(**batch(), n_loops=1).logits, before.logits)
    assert not torch.allclose(looped(**batch()).logits, before.logits, atol=1e-2)


@pytest.mark.parametrize("damping", [1.0, 0.5, 1 / 3])
def test_it_is_the_model_with_its_layers_written_out(family: str, damping: float) -> None:
    model = build(family)
    no_cache = {} if family == "bert" else {"use_cache": False}
    expected = written_out(model, family, 3, damping)[0](**batch(), **no_cache).logits
    logits = loop_layers(model, START, STOP, 3, damping=damping)(**batch()).logits
    if damping == 1.0:
        assert torch.equal(logits, expected)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [(0, 1), (3, 4), (0, 4)])
def test_any_contiguous_layers(window: tuple[int, int]) -> None:
    model = build("llama")
    order = [*range(window[0]), *[*range(*window)] * 2, *range(window[1], 4)]
    longer = copy.deepcopy(model)
    layers = list(longer.model.layers)
    longer.model.layers._modules.clear()
    longer.model.layers.extend(layers[i] for i in order)
    longer.config.num_hidden_layers = len(order)
    expected = longer(**batch(), use_cache=False).logits
    assert torch.equal(loop_layers(model, *window, 2)(**batch()).logits, expected)


def test_hooks_see_every_repetition_and_only_the_layers_calls() -> None:
    model = build("llama")
    calls: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    looped = loop_layers(model, START, STOP, 3)
    looped(**batch())
    assert calls == [0, 1, 2, 1, 2, 1, 2, 3]
    assert [*model.model.layers][1] is model.model.layers[1]  # outside a forward they are the layers


def test_the_depth_may_change_afterwards_and_for_one_call() -> None:
    model = build("gpt2")
    expected = {n: written_out(model, "gpt2", n)[0](**batch(), use_cache=False).logits for n in (2, 3, 4)}
    damped = written_out(model, "gpt2", 2, 0.5)[0](**batch(), use_cache=False).logits
    looped = loop_layers(model, START, STOP, 3)
    assert torch.equal(looped(**batch(), n_loops=4).logits, expected[4])
    assert torch.equal(looped(**batch()).logits, expected[3])
    with pytest.raises(ValueError, match=r"specify both|exactly one"):
        looped(input_ids=batch()["input_ids"], inputs_embeds=torch.zeros(2, 7, 8), n_loops=4)
    assert looped.n_loops == 3
    looped.n_loops = 2
    assert torch.equal(looped(**batch()).logits, expected[2])
    assert torch.equal(looped.forward(**batch(), n_loops=3).logits, expected[3])
    assert torch.equal(looped.lm_head(looped.transformer(**batch())[0]), expected[2])  # the headless model is looped
    looped.damping = 0.5
    torch.testing.assert_close(looped(**batch()).logits, damped)
    for name, value in (("n_loops", 0), ("damping", 0.0)):
        with pytest.raises(ValueError, match=f"{name}=0"):
            setattr(looped, name, value)
    with pytest.raises(ValueError, match="n_loops=True must be an integer of at least 1"):
        looped(**batch(), n_loops=True)
    assert (looped.n_loops, looped.damping) == (2, 0.5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activation_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    model = loop_layers(build(family), START, STOP, 3, damping=0.5).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        if hasattr(module, "attn_pdrop"):
            module.attn_pdrop = 0.0

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=batch()["input_ids"], labels=batch()["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain, rtol=1e-5, atol=1e-5)


# --- what stays as it was ---


def picture(model: nn.Module) -> list[Any]:
    """Everything that hangs on a model, by identity."""
    return [
        (name, type(module), *((key, {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value)
                               for key, value in vars(module).items()))
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["unloop", "with", "error", "unloop inside with"])
@pytest.mark.parametrize("headless", [False, True])
def test_it_is_undone(how: str, headless: bool) -> None:
    model = build("llama").model if headless else build("llama")
    model.register_forward_hook(lambda *_: None)
    before, logits = picture(model), model(**batch())[0]
    if how == "unloop":
        looped = loop_layers(model, START, STOP, 3)
        assert not torch.allclose(looped(**batch())[0], logits)
        looped.unloop()
    elif how == "error":
        with pytest.raises(KeyError, match="mine"), loop_layers(model, START, STOP, 3):
            raise KeyError("mine")
    else:
        with loop_layers(model, START, STOP, 3) as looped:
            assert looped is model
            looped(**batch())
            if how == "unloop inside with":
                looped.unloop()
    assert picture(model) == before
    assert torch.equal(model(**batch())[0], logits)
    assert not hasattr(model, "unloop")
    loop_layers(model, 0, 2, 2)  # and may be looped again


def test_an_error_in_the_forward_leaves_no_stand_in_behind() -> None:
    model = build("llama")
    looped = loop_layers(model, START, STOP, 2)
    before = picture(model)
    handle = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        looped(**batch())
    handle.remove()
    assert picture(model) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)
def test_parameters_keep_their_names_and_the_base_model_is_saved(family: str, tmp_path: Path) -> None:
    model = build(family)
    base, names, keys = type(model), [n for n, _ in model.named_parameters()], list(model.state_dict())
    before = model(**batch()).logits
    looped = loop_layers(model, START, STOP, 3)
    assert isinstance(looped, base)
    assert type(looped).__name__ == base.__name__
    assert [n for n, _ in looped.named_parameters()] == names
    assert list(looped.state_dict()) == keys
    looped.save_pretrained(tmp_path)
    for loader in (transformers.AutoModelForCausalLM, base, type(looped)):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is base
        assert loaded.config.architectures == [base.__name__]
        assert torch.equal(loaded(**batch()).logits, before)
    looped.load_state_dict(loaded.state_dict())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_looped_by_itself(way: Callable[[Any], Any]) -> None:
    looped = loop_layers(build("llama"), START, STOP, 3)
    expected = looped(**batch()).logits
    other = way(looped)
    assert torch.equal(other(**batch()).logits, expected)
    other.unloop()
    assert not torch.allclose(other(**batch()).logits, expected)
    assert torch.equal(looped(**batch()).logits, expected)


# --- the key-value cache, generate, and other libraries ---


def test_a_cache_is_refused_and_off_by_default() -> None:
    looped = loop_layers(build("llama"), START, STOP, 2)
    assert looped(**batch()).past_key_values is None
    refused = "cache was passed to layer 1, which is looped.*Pass use_cache=False, to generate as well"
    for call in (
        lambda: looped(**batch(), use_cache=True),
        lambda: looped(**batch(), past_key_values=transformers.DynamicCache()),
        lambda: looped.model(**batch(), use_cache=True),
        lambda: looped.generate(batch()["input_ids"], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    assert looped.config.use_cache


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"], indirect=True)
def test_generate(family: str) -> None:
    model = build(family)
    ids = batch()["input_ids"][:1]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None,
                "pad_token_id": 0}  # fmt: skip
    untouched = model.generate(ids, **settings)

    def by_hand(n_loops: int) -> Tensor:
        longer, sequence = written_out(model, family, n_loops)[0], ids
        for _ in range(4):
            following = longer(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat([sequence, following], 1)
        return sequence

    expected = {n: by_hand(n) for n in (2, 4)}
    looped = loop_layers(model, START, STOP, 2)
    assert torch.equal(looped.generate(ids, use_cache=False, **settings), expected[2])
    assert torch.equal(looped.generate(ids, use_cache=False, n_loops=4, **settings), expected[4])
    assert torch.equal(looped.generate(ids, n_loops=1, **settings), untouched)
    # Bloom, for one, does not hand on to forward what generate was given.
    looped.prepare_inputs_for_generation = lambda ids, attention_mask=None, **_: {"input_ids": ids, "use_cache": False}
    assert torch.equal(looped.generate(ids, use_cache=False, n_loops=4, **settings), expected[4])
    assert looped.n_loops == 2


def test_forward_says_what_it_takes() -> None:
    model = build("llama")
    before = list(inspect.signature(model.forward).parameters)
    looped = loop_layers(model, START, STOP, 2)
    assert [name for name in inspect.signature(looped.forward).parameters if name != "n_loops"] == before
    assert inspect.signature(looped.forward).parameters["n_loops"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("first", ["loop", "other"])
def test_with_adapters(first: str) -> None:
    model = build("llama")
    expected = {n: written_out(model, "llama", n)[0](**batch(), use_cache=False).logits for n in (2, 3)}
    adapters = LoraConfig(target_modules=["q_proj"])
    looped = loop_layers(model, START, STOP, 3) if first == "loop" else None
    adapted = get_peft_model(model, adapters)
    looped = looped or loop_layers(adapted, START, STOP, 3)
    for n_loops in (2, 3):
        torch.testing.assert_close(adapted(**batch(), n_loops=n_loops).logits, expected[n_loops])
    looped.unloop()
    assert not torch.allclose(adapted(**batch()).logits, expected[3])


@pytest.mark.parametrize("first", ["loop", "other"])
def test_with_modules_whose_forward_accelerate_replaced(first: str) -> None:
    model = build("llama")
    untouched = model(**batch()).logits
    expected = {n: written_out(model, "llama", n)[0](**batch(), use_cache=False).logits for n in (2, 3)}
    looped = loop_layers(model, START, STOP, 3) if first == "loop" else None
    for name, module in model.named_modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=not name))
    looped = looped or loop_layers(model, START, STOP, 3)
    for n_loops in (2, 3):
        assert torch.equal(looped(**batch(), n_loops=n_loops).logits, expected[n_loops])
    looped.unloop()
    assert torch.equal(model(**batch()).logits, untouched)


def test_compiled_afterwards() -> None:
    looped = loop_layers(build("llama", num_hidden_layers=2), 1, 2, 3)
    expected = looped(**batch(), n_loops=2).logits
    compiled = torch.compile(looped, backend="eager")
    torch.testing.assert_close(compiled(**batch(), n_loops=2).logits, expected)
    looped.unloop()
    with pytest.raises(ValueError, match=r"compiled: loop the layers first, then call torch\.compile"):
        loop_layers(compiled, 1, 2, 2)


# --- how the layers repeat: modes, anchors, and what a damped update adds to ---


def spelled_out(
    layers: list[Callable[[Tensor], Tensor]],
    hidden: Tensor,
    n_loops: int,
    damping: float,
    mode: str,
    anchor: float,
    remainder: str,
) -> Tensor:
    """The definitions: windows of all layers, or of one each, repeated and mixed with a single pass."""
    windows = [layers] if mode == "block" else [[layer] for layer in layers]
    for window in windows:
        entered = state = hidden
        outputs = []
        for _ in range(n_loops):
            output = state
            for layer in window:
                output = layer(output)
            outputs.append(output)
            kept = state if remainder == "state" else entered
            state = damping * output + (1 - damping) * kept
        hidden = anchor * outputs[0] + (1 - anchor) * state
    return hidden


MANNERS = list(itertools.product(("block", "layer"), (0.0, 0.5), ("state", "input"), (1.0, 0.3)))


@pytest.mark.parametrize(("mode", "anchor", "remainder", "damping"), MANNERS)
@pytest.mark.parametrize("answer", ["tensor", "tuple"])
def test_every_manner_of_repeating(mode: str, anchor: float, remainder: str, damping: float, answer: str) -> None:
    model, x = Own(answer), torch.randn(2, 3, 4)
    once = model(x)
    layers = [lambda h, i=i: torch.tanh(model.parts["stack"][i].linear(h)) + i for i in range(4)]
    inner = spelled_out(layers[1:3], layers[0](x), 3, damping, mode, anchor, remainder)
    looped: Any = loop_layers(model, 1, 3, 3, damping=damping, mode=mode, anchor=anchor, remainder=remainder)
    torch.testing.assert_close(looped(x), layers[3](inner))
    looped.damping = 1.0
    assert torch.equal(looped(x, n_loops=1), once)


def test_one_repetition_of_any_manner_is_the_untouched_model(family: str) -> None:
    model = build(family)
    before = model(**batch()).logits
    for mode, anchor, remainder in itertools.product(("block", "layer"), (0.0, 0.5), ("state", "input")):
        with loop_layers(model, START, STOP, 1, mode=mode, anchor=anchor, remainder=remainder) as looped:
            assert torch.equal(looped(**batch()).logits, before)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"], indirect=True)
def test_layers_that_repeat_one_by_one_are_the_model_with_them_written_out(family: str) -> None:
    model = build(family)
    longer = copy.deepcopy(model)
    layers = layers_of(longer, family)
    order = [0, 1, 1, 1, 2, 2, 2, 3]
    stack = [layers[i] for i in order]
    layers._modules.clear()
    layers.extend(stack)
    if getattr(longer.config, "layer_types", None):
        longer.config.layer_types = [longer.config.layer_types[i] for i in order]
    longer.config.num_hidden_layers = len(order)
    looped = loop_layers(model, START, STOP, 3, mode="layer")
    assert torch.equal(looped(**batch()).logits, longer(**batch(), use_cache=False).logits)
    with pytest.raises(ValueError, match="cache was passed to layer 1, which is looped"):
        looped.generate(batch()["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize(("mode", "n_steps"), [("block", 3), ("layer", 6)])
def test_the_loop_of_every_manner_is_found_and_exact(mode: str, n_steps: int) -> None:
    """Conservation against ordinary gradients, and the steps' number: those of a layer are its calls."""
    looped = loop_layers(build("gpt2").double(), START, STOP, 3, damping=0.5, mode=mode, anchor=0.5)

    def gradient(row: dict[str, Tensor]) -> Tensor:
        parameters = [p for layer in looped.transformer.h[START:STOP] for p in layer.parameters()]
        loss = next_token_loss(looped(row["input_ids"].unsqueeze(0)).logits[0], row["labels"])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    train, test = (torch.stack([gradient(row) for row in side]) for side in (TRAIN, TEST))
    steps = SDIInfluence(looped, TRAIN, batch_size=2, sketch=Exact()).step_influence(TEST)
    assert steps.trajectories.shape[-1] == n_steps
    torch.testing.assert_close(steps.trajectories.sum(-1), test @ train.T)


def test_every_manner_is_saved_in_the_config(tmp_path: Path) -> None:
    looped = loop_layers(build("llama"), START, STOP, 3, damping=0.3, mode="layer", anchor=0.25, remainder="input")
    looped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loop_layers(loaded)(**batch()).logits, looped(**batch()).logits)


# --- models of one's own ---


class Layer(nn.Module):
    def __init__(self, width: int, out: int, answer: str) -> None:
        super().__init__()
        self.linear, self.answer, self.kind = nn.Linear(width, out), answer, "full"

    def forward(self, x: Tensor, shift: float = 0.0) -> Any:
        out = torch.tanh(self.linear(x)) + shift
        return {"tensor": out, "tuple": (out, out.mean()), "dict": {"out": out}}[self.answer]


class Own(nn.Module):
    """Calls its layers by keyword; what it does otherwise is in `manner`."""

    def __init__(self, answer: str = "tensor", manner: str = "", widths: tuple[int, ...] = (4, 4, 4, 4, 4)) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.parts["stack"] = nn.ModuleList(Layer(i, o, answer) for i, o in itertools.pairwise(widths))
        self.manner = manner

    def forward(self, x: Tensor) -> Tensor:
        stack: Any = self.parts.stack
        if self.manner == "children":
            stack = [*self.parts["stack"].children()]
        if self.manner == "skips":
            stack = [layer for i, layer in enumerate(stack) if i != 1]
        shift: Any = 0.0
        for i, layer in enumerate(stack):
            assert layer.kind == "full"
            out = layer(x=x, shift=shift if self.manner == "shares" else float(i))
            x = out[0] if isinstance(out, tuple) else out["out"] if isinstance(out, dict) else out
            shift = out[1] if isinstance(out, tuple) else shift
            if self.manner == "between":
                x = 2 * x
        return x


@pytest.mark.parametrize("answer", ["tensor", "tuple"])
@pytest.mark.parametrize("damping", [1.0, 0.25])
def test_layers_called_by_keyword(answer: str, damping: float) -> None:
    model, x = Own(answer), torch.randn(2, 3, 4)
    h, layers = x, model.parts["stack"]
    run = lambda i, h: torch.tanh(layers[i].linear(h)) + i  # noqa: E731
    h = run(0, h)
    for _ in range(3):
        h = h + damping * (run(2, run(1, h)) - h)
    expected = run(3, h)
    torch.testing.assert_close(loop_layers(model, 1, 3, 3, damping=damping)(x), expected)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (Own("dict"), ValueError, "a looped layer returned dict; loop_layers takes layers that return their hidden"),
        (Own(manner="children"), RuntimeError, r"did not call the layers 1 to 2 through self\.parts\.stack: nothing"),
        (Own(manner="skips"), RuntimeError, "layer 2 was called out of order"),
        (Own(manner="between"), RuntimeError, "between layers 1 and 2 the model does something that is not in the lay"),
        (Own("tuple", manner="shares"), RuntimeError, "between layers 1 and 2 the model does something"),
        (Own(widths=(4, 4, 6, 5, 4)), ValueError, r"shape \(2, 3, 4\) into one of \(2, 3, 5\).*choose other start"),
    ],
    ids=["dict", "children", "skips", "between", "shares", "widths"],
)
def test_a_model_that_cannot_be_looped_says_so(model: nn.Module, error: type[Exception], match: str) -> None:
    looped = loop_layers(model, 1, 3, 2)
    with pytest.raises(error, match=match):
        looped(torch.randn(2, 3, 4))


# --- bad arguments ---


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1, 2, 2), r"start=-1 must be an integer from 0 to 3: 'model\.layers' has 4 layers"),
        ((4, 5, 2), "start=4 must be an integer from 0 to 3"),
        ((True, 2, 2), "start=True must be an integer"),
        ((2, 2, 2), r"stop=2 must be an integer from 3 to 4: it is the layer after the last one, and 'model\.layers'"),
        ((1, 5, 2), "stop=5 must be an integer from 2 to 4"),
        ((1, 2.0, 2), r"stop=2\.0 must be an integer"),
        ((1, 3, 0), "n_loops=0 must be an integer of at least 1; 1 applies every layer once"),
        ((1, 3, "2"), "n_loops='2' must be"),
        ((1, 3, 2, 0.0), r"damping=0\.0 must be a number above 0 and at most 1; 1\.0 is plain repetition"),
        ((1, 3, 2, 1.5), r"damping=1\.5 must be"),
        ((1, 3, 2, float("nan")), "damping=nan must be"),
        ((1, 3, 2, "half"), "damping='half' must be"),
        ((1, 3, 2, 1.0, None, "spiral"), r"mode='spiral' is unknown; use one of \('block', 'layer'\)"),
        ((1, 3, 2, 1.0, None, "layer", 1.0), r"anchor=1\.0 must be a number of at least 0 and below 1; 0\.0 is no"),
        ((1, 3, 2, 1.0, None, "layer", True), "anchor=True must be a number"),
        ((1, 3, 2, 1.0, None, "layer", 0.0, "past"), "remainder='past' is unknown"),
        ((1, 3, None), "n_loops=None must be an integer of at least 1"),
        ((1, 3, 2, 1.0, "layers"), r"layers='layers' names no ModuleList of LlamaForCausalLM; use one of \['model\.l"),
    ],
)
def test_a_bad_argument_is_named_and_changes_nothing(arguments: tuple[Any, ...], match: str) -> None:
    model = build("llama")
    before = picture(model)
    names = ("start", "stop", "n_loops", "damping", "layers", "mode", "anchor", "remainder")
    keywords = dict(zip(names, arguments, strict=False))
    with pytest.raises(ValueError, match=match):
        loop_layers(model, **keywords)
    assert picture(model) == before


def test_models_that_are_refused() -> None:
    looped = loop_layers(build("llama"), START, STOP, 2)
    with pytest.raises(ValueError, match=r"model is looped already: call unloop\(\) on it first"):
        loop_layers(looped, 0, 1, 2)
    with pytest.raises(ValueError, match="model is looped already"):
        loop_layers(looped.model, 0, 1, 2)
    with pytest.raises(ValueError, match="model=LoopedGPTForCausalLM has n_loops of its own"):
        loop_layers(LoopedGPTForCausalLM(LoopedGPTConfig(vocab_size=8, n_embd=8, n_head=2, n_positions=8)), 0, 1, 2)
    with pytest.raises(ValueError, match=r"Linear has no list of layers.*There is: none"):
        loop_layers(nn.Linear(2, 2), 0, 1, 2)
    with pytest.raises(ValueError, match="model='gpt2' must be a model"):
        loop_layers("gpt2", 0, 1, 2)  # type: ignore[arg-type]


def test_of_several_lists_one_is_named() -> None:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=8, d_ff=12, num_layers=3, num_heads=2, d_kv=4)
    model = transformers.T5EncoderModel(config)
    both = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match=r"several lists.*layers=.*'encoder\.block' of 3, 'decoder\.block' of 3"):
        loop_layers(both, 0, 1, 2)
    encoder = loop_layers(both, 1, 2, 2, layers="encoder.block").encoder
    hidden = encoder(batch()["input_ids"])[0]
    both.unloop()
    encoder.block.insert(1, encoder.block[1])
    encoder.config.num_layers = 4
    assert torch.equal(encoder(batch()["input_ids"])[0], hidden)
    loop_layers(model, 0, 3, 2)


# --- influence ---


def rows(n: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCAB, (8 - i % 3,), generator=generator) for i in range(n)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in made]


TRAIN, TEST = rows(4, seed=1), rows(2, seed=2)
SDI_FAMILIES = ["gpt2", "llama", "qwen3", "gemma3_text"]


def steps_of(model: Any, family: str, row: dict[str, Tensor], n_loops: int, damping: float) -> Tensor:
    """One example's gradient by repetition, ``(t, entries)``: each has layers, and so gradients, of its own."""
    longer, steps = written_out(model, family, n_loops, damping)
    logits = longer(row["input_ids"].unsqueeze(0), use_cache=False).logits[0]
    loss = next_token_loss(logits, row["labels"])
    parameters = [[p for layer in step for p in layer.parameters()] for step in steps]
    grads = iter(torch.autograd.grad(loss, [p for step in parameters for p in step]))
    return torch.stack([torch.cat([next(grads).flatten() for _ in step]) for step in parameters]).double()


@pytest.mark.parametrize(
    ("family", "damping", "test_loops"),
    [
        *[(family, *rest) for family in ("gpt2", "llama") for rest in ((1.0, None), (0.5, None), (1.0, 4), (0.5, 1))],
        *[(family, *rest) for family in ("qwen3", "gemma3_text") for rest in ((1.0, None), (0.5, 4))],
    ],
    indirect=["family"],
)
def test_influence_equals_the_truth_step_by_step(family: str, damping: float, test_loops: int | None) -> None:
    """The loop is found, and the test side may be deeper or shallower."""
    model = build(family).double()
    train = [steps_of(model, family, row, 3, damping) for row in TRAIN]
    test = [steps_of(model, family, row, test_loops or 3, damping) for row in TEST]
    looped = loop_layers(model, START, STOP, 3, damping=damping)
    forward = {} if test_loops is None else {"test_forward_kwargs": {"n_loops": test_loops}}
    sdi = SDIInfluence(looped, TRAIN, batch_size=3, sketch=Exact(), **forward)
    steps = sdi.step_influence(TEST)
    expected = torch.stack([torch.stack([phi @ g.sum(0) for g in train]) for phi in test])
    # In float64, where rounding hides nothing; only norms and rotary embeddings compute in float32 all the same.
    assert (steps.trajectories - expected).abs().max() < 1e-6 * expected.abs().max()
    assert steps.n_steps.tolist() == [test_loops or 3] * len(TEST)
    matrix = torch.stack([torch.stack([g @ phi.T for g in train]) for phi in test])
    assert (sdi.step_matrix(TEST) - matrix).abs().max() < 1e-6 * matrix.abs().max()


@pytest.mark.parametrize("family", SDI_FAMILIES, indirect=True)
def test_the_loop_is_found_and_covered(family: str) -> None:
    looped = loop_layers(build(family), START, STOP, 3, damping=0.5)
    first, second = (f"{FAMILIES[family][2]}.{i}" for i in range(START, STOP))
    inputs = {**batch(), "labels": batch()["input_ids"]}
    assert find_loop(looped, inputs) == LoopSpec(modules=(first, second), anchors=(first,))
    assert coverage_check(looped, {k: v[:1] for k, v in inputs.items()}).parameters == tuple(
        name for name, _ in looped.named_parameters() if name.startswith((f"{first}.", f"{second}."))
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)
def test_influence_with_every_parameter_and_with_checkpointing(family: str) -> None:
    """Conservation against one ordinary gradient per example."""
    looped = loop_layers(build(family), START, STOP, 3, damping=0.5)

    def gradient(row: dict[str, Tensor]) -> Tensor:
        logits = looped(row["input_ids"].unsqueeze(0)).logits[0]
        grads = torch.autograd.grad(next_token_loss(logits, row["labels"]), list(looped.parameters()))
        return torch.cat([g.flatten() for g in grads])

    train, test = (torch.stack([gradient(row) for row in side]) for side in (TRAIN, TEST))
    for recompute in (False, True):
        keywords: Any = {"layers": None, "sketch": Exact(), "activation_checkpointing": recompute}
        steps = SDIInfluence(looped, TRAIN, batch_size=2, **keywords).step_influence(TEST)
        total = steps.trajectories.sum(-1) + steps.prelude + steps.coda
        torch.testing.assert_close(total, test @ train.T, rtol=1e-4, atol=1e-4)


def test_influence_of_frozen_layers_by_name() -> None:
    """Nothing needs to be trainable, as in Captum."""
    model = build("llama")
    expected = SDIInfluence(loop_layers(model, START, STOP, 3), TRAIN, sketch=Exact()).step_influence(TEST)
    model.requires_grad_(False)
    names = ["model.layers.1", "model.layers.2"]
    frozen = SDIInfluence(model, TRAIN, layers=names, sketch=Exact()).step_influence(TEST)
    torch.testing.assert_close(frozen.trajectories, expected.trajectories)
