"""Loops that were counted wrong, and models that were loaded without theirs: each row as it was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reference import spread
from torch import Tensor, nn

from captum_sdi import Exact, LoopSpec, SDIInfluence, coverage_check, find_loop
from captum_sdi.cli.loading import load_model
from captum_sdi.cli.parser import build_parser
from captum_sdi.cli.recipe import Recipe
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM, loop_layers

VOCAB, WIDTH = 13, 8
IDS = torch.randint(1, VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


class Block(nn.Module):
    """A layer that keeps the shape of its input, whatever else it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, state: Tensor, *_: Any) -> Tensor:
        return state + self.down(torch.tanh(self.up(state)))


def deep_head() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "second block": Block,
    "leaf": lambda: nn.Linear(WIDTH, WIDTH),
    "cell": lambda: nn.GRUCell(WIDTH, WIDTH),
    "mixer": lambda: nn.Linear(2 * WIDTH, WIDTH),
    "adapter": lambda: nn.Linear(2 * WIDTH, WIDTH),
    "deep adapter": lambda: nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh()),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "gate": lambda: nn.Linear(WIDTH, 1),
    "head": lambda: nn.Linear(WIDTH, VOCAB),
    "deep head": deep_head,
    "wide": lambda: nn.Linear(WIDTH, VOCAB, bias=False),
    "slow": Block,
    "embedding": lambda: nn.Embedding(VOCAB, WIDTH),
}
READOUTS = ("gate", "head", "deep head", "wide")


class Order(nn.Module):
    """Calls its parts in an order: ``names`` of `PARTS`, one after the other."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.order = [*names]
        parts = {name: PARTS[name]() for name in dict.fromkeys(self.order)}
        self.parts = nn.ModuleDict({name.replace(" ", "_"): part for name, part in parts.items()})
        self.wte, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = state = self.wte(input_ids)
        logits: Any = 0
        for name in self.order:
            part = self.parts[name.replace(" ", "_")]
            if name == "cell":
                flat = part(embedded.flatten(0, 1), state.flatten(0, 1))
                state = flat.view_as(state)
            elif name in READOUTS:
                logits = logits + part(state).mean(-1, keepdim=True)
            elif name in ("mixer", "adapter", "deep adapter"):
                state = torch.tanh(part(torch.cat([state, embedded], -1)))
            elif name == "embedding":
                state = state + part(input_ids)
            else:
                state = torch.tanh(part(state))
        return self.lm_head(state) + logits


def order(text: str) -> Order:
    """An order written with stars: ``block*2 head`` is block, block, head."""
    names: list[str] = []
    for word in text.split():
        name, _, times = word.partition("*")
        names += [name.replace("-", " ")] * int(times or 1)
    torch.manual_seed(0)
    return Order(names)


def found(model: nn.Module, ids: Tensor = IDS) -> Any:
    """What is found, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find_loop(model, {"input_ids": ids})


@pytest.mark.parametrize(
    ("calls", "n_steps"),
    [
        # readouts at some iterations
        ("block*3 head block head block head", 5),
        ("block*2 head block*2 head", 4),
        ("block head block*2 head", 3),
        ("block*3 deep-head block deep-head block deep-head", 5),
        ("block*2 norm head block norm head", 3),
        ("block*2 gate block gate block*2 gate", 5),
        ("block second-block block second-block head block second-block head", 3),
        ("leaf*3 head leaf head leaf head", 5),
        ("cell*3 head cell head cell head", 5),
        ("cell*3 deep-head cell deep-head cell deep-head", 5),
        ("mixer*3 head mixer head mixer head", 5),
        # a part left out of an iteration
        ("leaf adapter leaf adapter leaf adapter leaf", 4),
        ("block adapter block adapter block adapter block", 4),
        ("block second-block adapter block second-block adapter block second-block", 3),
        ("block deep-adapter block deep-adapter block", 3),
        ("adapter block adapter block*2", 3),
        ("block norm block norm block", 3),
        ("block embedding block embedding block", 3),
        # two timescales on one timeline, and what takes turns: as before
        ("block*2 slow block*2 slow", 6),
        ("block second-block block second-block", 2),
        ("block head block head block head", 3),
        ("adapter block adapter block", 2),
        ("norm block gate norm block gate", 2),
    ],
)
def test_a14_irregular_calls_are_counted_by_the_core(calls: str, n_steps: int) -> None:
    model = order(calls)
    loop = found(model)
    assert loop.n_steps == n_steps
    if "cell" in calls:
        return  # of which no rule knows the parameters
    sdi = SDIInfluence(model, ROWS, sketch=Exact())
    steps = sdi.step_influence(ROWS[:1])
    assert steps.trajectories.shape[-1] == n_steps
    assert steps.trajectories.any(1).all()
    assert not steps.prelude.any()


@pytest.mark.parametrize(
    "calls", ["embedding*2", "norm*2", "embedding norm embedding norm", "norm leaf norm block norm"]
)
def test_a14_an_embedding_or_a_norm_called_twice_is_no_loop(calls: str) -> None:
    with pytest.warns(UserWarning, match="Nothing repeats in Order: it is taken as one loop step"):
        loop = find_loop(order(calls), {"input_ids": IDS})
    assert loop.modules == ("",)


def test_a14_embeddings_of_one_module_called_for_two_towers_are_no_loop() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH))
            self.encoder, self.decoder, self.head = Block(), Block(), nn.Linear(WIDTH, VOCAB)

        def forward(self, input_ids: Tensor) -> Tensor:
            encoded = self.encoder(self.shared(input_ids))
            return self.head(self.decoder(self.shared(input_ids) + encoded))

    with pytest.warns(UserWarning, match="Nothing repeats in Towers"):
        find_loop(Towers(), {"input_ids": IDS})


# --- families known by name ---


class Settings:
    """The one thing of a config that tells a family."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type


class Huginn(nn.Module):
    """The names of Huginn; which iterations use the adapter is in `adapted`."""

    def __init__(self, adapted: Iterable[bool], core: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = {"wte": nn.Embedding(VOCAB, WIDTH), "adapter": nn.Linear(2 * WIDTH, WIDTH)}
        self.transformer = nn.ModuleDict({**parts, "core_block": nn.ModuleList([core(), core()])})
        self.lm_head = nn.Linear(WIDTH, VOCAB)
        self.config, self.adapted = Settings("huginn_raven"), [*adapted]

    def forward(self, input_ids: Tensor) -> Tensor:
        parts = self.transformer
        embedded = state = parts["wte"](input_ids)
        for uses_adapter in self.adapted:
            if uses_adapter:
                state = parts["adapter"](torch.cat([state, embedded], -1))
            for block in parts["core_block"]:
                state = torch.tanh(block(state))
        return self.lm_head(state)


@pytest.mark.parametrize("core", [Block, PARTS["leaf"]], ids=["block", "leaf"])
@pytest.mark.parametrize("adapted", ["0111", "1111", "0001", "1101", "1110", "0011", "0000"])
def test_a14_a_family_whose_anchor_is_left_out_of_an_iteration(adapted: str, core: Callable[[], nn.Module]) -> None:
    """Whether its first one, as in the report, or another."""
    model = Huginn([uses == "1" for uses in adapted], core)
    assert found(model).n_steps == 4
    steps = SDIInfluence(model, ROWS, layers=["transformer.core_block"], sketch=Exact()).step_influence(ROWS[:1])
    assert steps.trajectories.shape[-1] == 4
    assert steps.trajectories.any(1).all()
    assert not steps.prelude.any()


def test_a14_a_named_anchor_that_is_left_out_of_the_first_iteration() -> None:
    loop = LoopSpec(("transformer.core_block", "transformer.adapter"), ("transformer.adapter",))
    model = Huginn([False, True, True])
    assert SDIInfluence(model, ROWS, loop=loop, sketch=Exact()).step_influence(ROWS[:1]).trajectories.shape[-1] == 3


@pytest.mark.parametrize("anchor", ["parts.block", "parts.block.up", "parts.block.down"])
def test_a14_an_anchor_inside_the_looped_module_starts_no_step_more(anchor: str) -> None:
    model = order("norm block*3")
    loop = LoopSpec(("parts.norm", "parts.block"), (anchor,))
    assert SDIInfluence(model, ROWS, loop=loop, sketch=Exact()).step_influence(ROWS[:1]).trajectories.shape[-1] == 3


def test_a14_a_family_that_runs_once_warns() -> None:
    config = LoopedGPTConfig(vocab_size=VOCAB, n_embd=WIDTH, n_head=2, n_positions=8, n_loops=1)
    model = LoopedGPTForCausalLM(config)
    said = r"Nothing repeats: LoopSpec\(modules=\('core',\).*runs once.*influence as TracIn"
    with pytest.warns(UserWarning, match=said) as caught:
        assert find_loop(model, ROWS).n_steps == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=said) as caught:
        SDIInfluence(model, ROWS).influence(ROWS[:1])
    assert caught[0].filename == __file__


class Halting(nn.Module):
    """Runs as many iterations as the first token of its one example says."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.core, self.head = nn.Embedding(VOCAB, WIDTH), Block(), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        state = self.wte(input_ids)
        for _ in range(int(input_ids[:, 0].max())):
            state = self.core(state)
        return self.head(state)


@pytest.mark.parametrize("depths", [(1, 3), (1, 1, 1, 2), (3, 1)])
def test_a14_a_first_example_of_one_iteration_hides_no_loop(depths: tuple[int, ...]) -> None:
    ids = torch.stack([torch.cat([torch.tensor([depth]), IDS[0]]) for depth in depths])
    rows = [{"input_ids": row, "labels": row} for row in ids]
    assert found(Halting(), ids).modules == ("core",)
    steps = SDIInfluence(Halting(), rows, batch_size=1, sketch=Exact()).step_influence(rows)
    assert steps.n_steps.tolist() == [*depths]


# --- the table and the capture ---


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, state: Tensor) -> Tensor:
        state = torch.tanh(self.fc(state))
        self.out(state)
        return state


class Outer(nn.Module):
    """Calls a layer inside the loop's module by itself: before the loop, or after it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.wte, self.lm, self.before = nn.Embedding(VOCAB, WIDTH), Inner(), before

    def forward(self, input_ids: Tensor) -> Tensor:
        state = self.wte(input_ids)
        if self.before:
            state = self.lm.fc(state)
        for _ in range(3):
            state = self.lm(state)
        return self.lm.out(state)


@pytest.mark.parametrize("before", [False, True])
def test_a14_the_table_says_what_the_capture_does(before: bool) -> None:
    torch.manual_seed(0)
    model = Outer(before)
    table = {row.module: row.where for row in found(model).rows}
    assert table["lm"] == "0-2"
    assert table["lm.out"] == "2"
    out = SDIInfluence(model, ROWS, layers=["lm.out"], sketch=Exact()).step_influence(ROWS[:1])
    assert not out.coda.any()
    assert out.trajectories[0, 0].nonzero().flatten().tolist() == [2]
    if before:
        assert table["lm.fc"] == "prelude"
        assert SDIInfluence(model, ROWS, layers=["lm.fc"], sketch=Exact()).step_influence(ROWS[:1]).prelude.all()


# --- layers that share their weights ---


def tied(make: Callable[[], nn.Module], n_laps: int, n_layers: int) -> list[list[nn.Module]]:
    """Laps of layers, those of one place with the same parameters."""
    torch.manual_seed(0)
    laps = [[make() for _ in range(n_layers)] for _ in range(n_laps)]
    for lap in laps[1:]:
        for layer, first in zip(lap, laps[0], strict=True):
            owners = dict(first.named_modules())
            for name, module in layer.named_modules():
                for key in module._parameters:
                    setattr(module, key, getattr(owners[name], key))
    return laps


class Nested(nn.Module):
    """Runs through lists in lists, or dictionaries of lists, of layers."""

    def __init__(self, laps: nn.Module) -> None:
        super().__init__()
        self.wte, self.laps, self.head = nn.Embedding(VOCAB, WIDTH), laps, nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.run(self.laps, self.wte(input_ids)))

    def run(self, part: nn.Module, state: Tensor) -> Tensor:
        if not isinstance(part, nn.ModuleList | nn.ModuleDict):
            return part(state)
        for child in part.children():
            state = self.run(child, state)
        return state


@pytest.mark.parametrize("make", [Block, PARTS["leaf"]], ids=["block", "leaf"])
@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("form", ["list of lists", "dictionary of lists", "list", "two deep", "sequentials"])
def test_a14_tied_layers_are_one_block_in_any_nesting(form: str, n_layers: int, make: Callable[[], nn.Module]) -> None:
    laps = tied(make, 3, n_layers)
    forms = {
        "list of lists": lambda: nn.ModuleList(nn.ModuleList(lap) for lap in laps),
        "dictionary of lists": lambda: nn.ModuleDict({f"lap_{i}": nn.ModuleList(lap) for i, lap in enumerate(laps)}),
        "list": lambda: nn.ModuleList(layer for lap in laps for layer in lap),
        "two deep": lambda: nn.ModuleList(nn.ModuleList([nn.ModuleList([layer]) for layer in lap]) for lap in laps),
        "sequentials": lambda: nn.ModuleList(nn.Sequential(*lap) for lap in laps),
    }
    model = Nested(forms[form]())
    loop = found(model)
    assert loop.n_steps == 3
    assert SDIInfluence(model, ROWS, sketch=Exact()).step_influence(ROWS[:1]).trajectories.any(1).all()


def test_a14_towers_that_share_an_embedding_are_no_loop() -> None:
    """Every tower has an embedding of its own with the same weight, as in translation models."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.norm, self.block = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH), Block()

        def forward(self, input_ids: Tensor, other: Tensor | float = 0.0) -> Tensor:
            return self.block(self.norm(self.wte(input_ids) + other))

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.head = Tower(), Tower(), nn.Linear(WIDTH, VOCAB)
            self.decoder.wte.weight, self.decoder.norm.weight = self.encoder.wte.weight, self.encoder.norm.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.decoder(input_ids, self.encoder(input_ids)))

    with pytest.warns(UserWarning, match="Nothing repeats in Towers"):
        find_loop(Towers(), {"input_ids": IDS})


# --- models saved with a loop ---


def decoder() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_head=2, n_layer=4, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return spread(transformers.GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looped")
    looped = loop_layers(decoder(), 1, 3, 3, damping=0.5)
    looped.n_loops = 4
    looped(IDS, n_loops=2)  # another depth for one call is not the model's
    looped.save_pretrained(folder)
    return folder


def expected_logits() -> Tensor:
    return loop_layers(decoder(), 1, 3, 4, damping=0.5)(IDS).logits


REFUSED = (
    r"The config of GPT2\w*, or .* says that its layers were looped.*model = captum_sdi\.models\.loop_layers\(model\)"
)


def test_a13_a_reloaded_model_is_looped_again_in_one_line(saved: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    assert not torch.allclose(loaded(IDS).logits, expected_logits())
    looped = loop_layers(loaded)
    assert torch.equal(looped(IDS).logits, expected_logits())
    assert (looped.n_loops, looped.damping) == (4, 0.5)
    assert find_loop(looped, ROWS).n_steps == 4
    assert SDIInfluence(looped, ROWS, sketch=Exact()).step_influence(ROWS).trajectories.shape[-1] == 4


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: find_loop(model, ROWS),
        lambda model: coverage_check(model, ROWS),
        lambda model: coverage_check(model, ROWS, loop="transformer.h.1"),
        lambda model: SDIInfluence(model, ROWS),
        lambda model: SDIInfluence(model, ROWS, layers=None),
        lambda model: SDIInfluence(model, ROWS, loop="transformer.h.1"),
    ],
)
def test_a13_a_reloaded_model_without_its_loop_is_refused(saved: Path, ask: Callable[[Any], Any]) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match=REFUSED):
        ask(loaded)
    del loaded.config.captum_sdi_loop  # the other way out that the sentence names
    with pytest.warns(UserWarning, match="Nothing repeats"):
        SDIInfluence(loaded, ROWS).influence(ROWS[:1])


def test_a13_a_model_unlooped_after_the_question_was_asked_is_refused(saved: Path) -> None:
    looped = loop_layers(transformers.AutoModelForCausalLM.from_pretrained(saved))
    sdi = SDIInfluence(looped, ROWS)
    sdi.influence(ROWS[:1])
    record = looped.config.captum_sdi_loop
    looped.unloop()
    assert not hasattr(looped.config, "captum_sdi_loop")
    looped.config.captum_sdi_loop = record
    with pytest.raises(ValueError, match=REFUSED):
        sdi.influence(ROWS[:1])


def test_a13_without_its_head_inside_adapters_and_again_on_disk(saved: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = expected_logits()
    headless = loop_layers(transformers.AutoModel.from_pretrained(saved).eval())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    assert torch.equal(loaded.lm_head(headless(IDS)[0]), expected)
    adapted = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match=r"of PeftModel\w*, or .* says that its layers were looped"):
        SDIInfluence(adapted, ROWS)
    torch.testing.assert_close(loop_layers(adapted)(input_ids=IDS).logits, expected)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loop_layers(again)(IDS).logits, expected)


def test_a13_adapters_name_a_looped_base_that_the_model_is_not(saved: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    looped = loop_layers(transformers.AutoModelForCausalLM.from_pretrained(saved).eval())
    trained = peft.get_peft_model(looped, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    trained.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved).eval()
    del plain.config.captum_sdi_loop  # as a copy of the same weights from before
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="or that of the base model that its adapters name, says that its layers were"):
        SDIInfluence(adapted, ROWS)
    torch.testing.assert_close(loop_layers(adapted)(input_ids=IDS).logits, trained(input_ids=IDS).logits)
    assert SDIInfluence(adapted, ROWS).step_influence(ROWS[:1]).trajectories.shape[-1] == 4


def test_a13_the_command_line_loops_again_what_it_loads(saved: Path, tmp_path: Path) -> None:
    lines = tmp_path / "train.jsonl"
    lines.write_text("\n".join(f'{{"input_ids": {ids.tolist()}}}' for ids in IDS))
    command = ["index", "--model", str(saved), "--train", str(lines), "--index", str(tmp_path / "index"), "--dry-run"]
    recipe = Recipe.from_options(build_parser("0").parse_args(command))
    assert torch.equal(load_model(recipe, "cpu", quiet=True)(IDS).logits, expected_logits())
    command += ["--loop-layers", "0", "2", "2"]  # said on the command line, it counts
    recipe = Recipe.from_options(build_parser("0").parse_args(command))
    assert load_model(recipe, "cpu", quiet=True).n_loops == 2


def test_a13_saving_after_unloop_saves_no_loop(tmp_path: Path) -> None:
    looped = loop_layers(decoder(), 1, 3, 3)
    looped.unloop()
    looped.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of GPT2LMHeadModel does not say how its layers are looped"):
        loop_layers(loaded)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": -1}, "start=-1 must be an integer from 0 to 3"),
        ({"stop": 9}, "stop=9 must be an integer from 2 to 4"),
        ({"n_loops": 0}, "n_loops=0 must be"),
        ({"damping": 7.0}, r"damping=7\.0 must be"),
        ({"anchor": 1.0}, r"anchor=1\.0 must be"),
        ({"n_loops": "3"}, "n_loops must be a whole number"),
        ({"mode": "spiral"}, "mode must be one of block, layer"),
        ({"layers": "transformer.blocks"}, r"'transformer\.blocks' are looped, and GPT2LMHeadModel has the lists"),
        ({"layers": None}, "layers must be a string"),
    ],
)
def test_a13_what_a_config_says_is_checked(saved: Path, changes: dict[str, Any], match: str) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    loaded.config.captum_sdi_loop = {**loaded.config.captum_sdi_loop, **changes}
    with pytest.raises(ValueError, match=match):
        loop_layers(loaded)
    assert type(loaded) is transformers.GPT2LMHeadModel


def test_a13_the_config_says_all_or_nothing(saved: Path) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"damping=0\.3 without start=, stop= and n_loops="):
        loop_layers(loaded, damping=0.3)
    with pytest.raises(ValueError, match="n_loops=None must be an integer of at least 1"):
        loop_layers(loaded, 1, 3)
    loop_layers(loaded, 0, 2, 2)  # its own words count, and are remembered
    assert loaded.config.captum_sdi_loop["stop"] == 2


class Siamese(nn.Module):
    """One encoder for two inputs: what it returns for the first is not what it is given for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Block(), nn.Linear(2 * WIDTH, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(left), self.encoder(right)], dim=-1))


def test_a14_the_calls_of_an_encoder_for_two_inputs_are_the_steps_and_add_up() -> None:
    model = spread(Siamese().double())
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    loop = find_loop(model, (left, right, labels))
    assert loop.n_steps == 2
    assert loop.modules == ("encoder",)
    influence = SDIInfluence(
        model, [*zip(left, right, labels, strict=True)], loss_fn=nn.MSELoss(reduction="none"), sketch=Exact()
    )
    steps = influence.step_influence((left, right, labels)).trajectories
    gradients: list[list[Tensor]] = [[], []]
    for number in range(4):
        for place, given in enumerate((left[number], right[number])):
            states = [model.encoder(left[number]), model.encoder(right[number])]
            states = [state.detach() for state in states]
            states[place] = model.encoder(given)
            loss = nn.functional.mse_loss(model.head(torch.cat(states)), labels[number], reduction="sum")
            parts = torch.autograd.grad(loss, list(model.encoder.parameters()))
            gradients[place].append(torch.cat([part.flatten() for part in parts]))
    by_call = [torch.stack(rows) for rows in gradients]
    whole = by_call[0] + by_call[1]
    for place, rows in enumerate(by_call):
        assert torch.allclose(steps[..., place], rows @ whole.T)
