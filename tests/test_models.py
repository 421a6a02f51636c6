"""LoopedGPT against its definition, a GPT-2, and what transformers expects of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

TINY = {
    "vocab_size": 13,
    "n_positions": 10,
    "n_embd": 8,
    "n_head": 2,
    "n_prelude": 1,
    "n_core": 1,
    "n_coda": 1,
    "n_loops": 3,
}


def tiny(**settings: Any) -> LoopedGPTForCausalLM:
    """A small model whose loop steps differ: with the usual initial weights they hardly do."""
    torch.manual_seed(0)
    model = LoopedGPTForCausalLM(LoopedGPTConfig(**{**TINY, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Pad `rows` to the longest plus one; token 5 is the padding, so that using it is noticed."""
    length = max(map(len, rows)) + 1
    ids = torch.full((len(rows), length), 5)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


# The model


def test_default_config_is_the_papers_model():
    with torch.device("meta"):
        model = LoopedGPTForCausalLM(LoopedGPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 135_121_920
    assert sum(p.numel() for p in model.core.parameters()) == 29_503_488


def test_one_loop_without_prelude_and_coda_is_gpt2():
    sizes = {"n_prelude": 0, "n_core": 2, "n_coda": 0, "n_loops": 1}
    kinds = {"injection": "add", "state_init": "zeros", "bias": True, "tie_word_embeddings": True}
    model = tiny(**sizes, **kinds)
    same = {name: TINY[name] for name in ("vocab_size", "n_positions", "n_embd", "n_head")}
    gpt2 = GPT2LMHeadModel(GPT2Config(**same, n_layer=2, bos_token_id=0, eos_token_id=0))
    gpt2.eval().load_state_dict(gpt2_state(model.state_dict()))
    ids, mask = padded([tokens(6), tokens(3)], side="left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(positions == 0, -100)  # nothing real precedes a first token

    ours = model(ids, attention_mask=mask, labels=labels)
    theirs = gpt2(ids, attention_mask=mask, position_ids=positions, labels=labels)

    torch.testing.assert_close(ours.logits[mask == 1], theirs.logits[mask == 1])
    torch.testing.assert_close(ours.loss, theirs.loss)


def gpt2_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a LoopedGPT's tensors to GPT-2's, whose projections are stored transposed."""
    names = {"core.blocks": "transformer.h", "qkv": "c_attn", ".fc": ".c_fc", "proj": "c_proj"}
    renamed = {}
    for name, value in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        is_projection = ".c_" in name and name.endswith("weight")
        prefix = "" if name.startswith(("transformer", "lm_head")) else "transformer."
        renamed[prefix + name] = value.T if is_projection else value
    return renamed


@pytest.mark.parametrize("injection", ["concat", "add"])
@pytest.mark.parametrize("state_init", ["prelude", "zeros"])
@pytest.mark.parametrize("n_loops", [1, 4])
def test_forward_is_prelude_loop_coda(injection: str, state_init: str, n_loops: int):
    model = tiny(injection=injection, state_init=state_init)
    ids = tokens(2, 6)
    inputs = model.prelude[0](model.wte(ids) + model.wpe.weight[:6], None)
    state = inputs if state_init == "prelude" else torch.zeros(2, 6, 8)
    for _ in range(n_loops):
        mixed = (
            torch.cat([state, inputs], -1) @ model.core.adapter.weight.T if (injection == "concat") else state + inputs
        )
        state = model.core.blocks[0](mixed, None)
    expected = model.ln_f(model.coda[0](state, None)) @ model.lm_head.weight.T

    torch.testing.assert_close(model(ids, n_loops=n_loops).logits, expected)


def test_every_example_may_have_its_own_number_of_loops():
    model = tiny(has_positions=False)
    assert model.wpe is None
    rows = [tokens(4), tokens(6, seed=2), tokens(3, seed=3)]
    ids, mask = padded(rows, "right")
    depths = torch.tensor([2, 5, 1])
    together = model(input_ids=ids, attention_mask=mask, n_loops=depths).logits
    for row, depth, logits in zip(rows, depths.tolist(), together, strict=True):
        alone = model(input_ids=row[None], n_loops=depth).logits[0]
        torch.testing.assert_close(logits[: len(row)], alone)


def test_core_is_called_once_per_loop_with_positional_arguments():
    model, calls = tiny(), []
    model.core.register_forward_pre_hook(lambda _, args, kwargs: calls.append((len(args), kwargs)), with_kwargs=True)
    model(tokens(2, 6))
    assert calls == [(3, {})] * 3
    model(tokens(2, 6), n_loops=5)
    assert len(calls) == 3 + 5


def test_parameters_belong_to_leaf_layers_that_keep_the_example_axis():
    model, seen = tiny(bias=True), set()

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert args[0].shape[:2] == (4, 6)
        seen.update(module.parameters())

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            assert type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)
            module.register_forward_pre_hook(record)
    model(tokens(4, 6))
    model(tokens(4, 6), position_ids=torch.arange(6))
    assert seen == set(model.parameters())


@pytest.mark.parametrize("is_causal", [True, False])
def test_causal_models_do_not_see_later_tokens(is_causal: bool):
    model, ids = tiny(is_causal=is_causal), tokens(1, 6)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 13
    before_it = slice(0, 4)
    difference = (model(ids).logits - model(changed).logits)[0, before_it].abs().max()
    assert (difference == 0) if is_causal else (difference > 1e-3)


def test_normal_state_is_fresh_in_training_and_fixed_in_evaluation():
    model, ids = tiny(state_init="normal", initializer_range=1.0), tokens(3, 6)
    rng = torch.get_rng_state()
    together, again = model(ids).logits, model(ids).logits
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(together, again)
    torch.testing.assert_close(together[1:2], model(ids[1:2]).logits)
    zeros = model(ids, initial_state=torch.zeros(3, 6, 8)).logits
    assert (together - zeros).abs().max() > 1e-2

    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-2


def test_initial_state_replaces_the_configured_one():
    model, ids = tiny(state_init="zeros"), tokens(2, 6)
    given = model(ids, initial_state=torch.zeros(2, 6, 8)).logits
    assert torch.equal(given, model(ids).logits)
    other = model(ids, initial_state=torch.ones(2, 6, 8)).logits
    assert (given - other).abs().max() > 1e-2


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("state_init", ["prelude", "normal"])
def test_padding_changes_no_real_position(side: str, is_causal: bool, state_init: str):
    model = tiny(is_causal=is_causal, state_init=state_init)
    rows = [tokens(6), tokens(3, seed=2), tokens(1, seed=3)]
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for row, got, real in zip(rows, logits, mask == 1, strict=True):
        torch.testing.assert_close(got[real], model(row[None]).logits[0], rtol=1e-4, atol=1e-5)


def test_mask_without_padding_is_no_mask():
    model, ids = tiny(), tokens(2, 6)
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones(2, 6)).logits)


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_of_padding_only_are_finite_forward_and_backward(is_causal: bool):
    model, ids, masks = tiny(is_causal=is_causal), tokens(2, 6), []
    model.core.register_forward_pre_hook(lambda _, args: masks.append(args[2]))
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    output = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert masks[0].any(dim=-1).all()  # what an empty row gives differs between backends


def test_positions_can_be_given():
    model, ids = tiny(), tokens(2, 4)
    shifted = model(ids, position_ids=torch.tensor([3, 4, 5, 6])).logits
    each = model(ids, position_ids=torch.tensor([[3, 4, 5, 6]] * 2)).logits
    assert torch.equal(shifted, each)
    assert (shifted - model(ids).logits).abs().max() > 1e-2


# Loss


@pytest.mark.parametrize("is_causal", [True, False])
def test_loss(is_causal: bool):
    model, ids = tiny(is_causal=is_causal), tokens(2, 6)
    labels = tokens(2, 6, seed=4)
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    logits, targets = output.logits, labels
    if is_causal:
        logits, targets = logits[:, :-1], labels[:, 1:]
    wanted = targets != -100
    summed = F.cross_entropy(logits[wanted], targets[wanted], reduction="sum")

    torch.testing.assert_close(output.loss, summed / wanted.sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=1).loss, summed)
    as_tuple = model(ids, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


# transformers


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, tied: bool):
    model, ids = tiny(tie_word_embeddings=tied), tokens(2, 6)
    model.save_pretrained(tmp_path)
    loaded = LoopedGPTForCausalLM.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.wte.weight) == tied

    shallow = AutoModelForCausalLM.from_pretrained(tmp_path, n_loops=2)
    assert isinstance(shallow, LoopedGPTForCausalLM)
    assert torch.equal(shallow(ids).logits, model(ids, n_loops=2).logits)


def test_config_round_trip(tmp_path: Path):
    settings = {**TINY, "injection": "add", "state_init": "normal", "is_causal": False}
    settings |= {"bias": True, "tie_word_embeddings": True, "pad_token_id": 0}
    LoopedGPTConfig(**settings).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert (loaded.hidden_size, loaded.num_attention_heads, loaded.num_hidden_layers) == (8, 2, 3)


@pytest.mark.parametrize("n_loops", [None, 5])
def test_generate_is_greedy_search_whatever_the_padding(n_loops: int | None):
    model = tiny()
    rows = [tokens(5), tokens(2, seed=2)]
    ids, mask = padded(rows, side="left")
    options: dict[str, Any] = {"n_loops": n_loops, "do_sample": False, "pad_token_id": 5}
    together = model.generate(ids, attention_mask=mask, max_new_tokens=3, **options)
    for row, got in zip(rows, together, strict=True):
        for _ in range(3):
            following = model(row[None], n_loops=n_loops).logits[0, -1].argmax()
            row = torch.cat([row, following[None]])
        assert torch.equal(got[-3:], row[-3:])


def test_generate_without_a_cache_even_when_asked_for_one():
    model, ids = tiny(), tokens(2, 5)
    plain = model.generate(ids, max_new_tokens=3, do_sample=False)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, use_cache=True)
    assert torch.equal(model.generate(ids, generation_config=config), plain)


def test_activation_checkpointing_gives_the_same_gradients():
    model, ids = tiny(), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    runs = []
    model.core.blocks[0].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()(ids, labels=ids).loss.backward()
    assert len(runs) == 2 * model.config.n_loops  # recomputed, so the setting did something
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_trainer_learns_and_writes_checkpoints_that_load(tmp_path: Path):
    model = tiny().train()
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    ids = tokens(2, 6)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


# Errors


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_embd": 10, "n_head": 4}, r"n_embd=10 is not divisible by n_head=4; choose"),
        ({"hidden_size": 9}, r"n_embd=9 is not divisible by n_head=2"),
        ({"n_loops": 0}, r"n_loops=0 must be an integer of at least 1"),
        ({"n_loops": True}, r"n_loops=True must be an integer"),
        ({"n_core": 0}, r"n_core=0 must be an integer of at least 1"),
        ({"n_coda": -1}, r"n_coda=-1 must be an integer of at least 0"),
        ({"injection": "mul"}, r"injection='mul' is unknown; use one of \('concat', 'add', 'none'\)"),
        ({"state_init": "one"}, r"state_init='one' is unknown; use one of \('prelude', "),
        ({"n_layer": 3}, r"n_layer=3 is no setting of LoopedGPTConfig; use one of n_coda, n_core"),
        ({"use_cache": True}, r"use_cache=True: LoopedGPT has no key-value cache; leave it False"),
    ],
)
def test_impossible_configs_are_refused(settings: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        LoopedGPTConfig(**{**TINY, **settings})


def test_settings_changed_later_are_checked_too(tmp_path: Path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"n_loops=0 must be"):
        LoopedGPTForCausalLM.from_pretrained(tmp_path, n_loops=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n_loops": 0}, r"n_loops=0 must be an integer of at least 1"),
        ({"n_loops": 2.0}, r"n_loops=2.0 must be an integer"),
        ({"n_loops": torch.tensor([2, 3, 1])}, r"n_loops must be .* a tensor of 2 of them, .* shape \(3,\)"),
        ({"n_loops": torch.tensor([2, 0])}, r"n_loops must be an integer of at least 1, or a tensor of 2"),
        ({"n_loop": 4}, r"n_loop is no argument of LoopedGPTForCausalLM.forward; leave it out"),
        ({"input_ids": tokens(6)}, r"input_ids has shape \(6,\); it must be \(examples, positions"),
        ({"input_ids": tokens(2, 11)}, r"input_ids has 11 positions, more than n_positions=10;"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\); it must be"),
        ({"labels": tokens(2, 5)}, r"labels has shape \(2, 5\); it must be that of input_ids, \(2"),
        ({"initial_state": torch.ones(6, 8)}, r"initial_state has shape \(6, 8\); it must be"),
    ],
)
def test_impossible_inputs_are_refused(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        tiny()(**{"input_ids": tokens(2, 6), **arguments})


def test_impossible_generation_is_refused():
    with pytest.raises(ValueError, match=r"generate needs is_causal=True"):
        tiny(is_causal=False).generate(tokens(1, 4), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"initial_state cannot be used in generate"):
        tiny().generate(tokens(1, 4), max_new_tokens=2, initial_state=torch.zeros(1, 4, 8))
