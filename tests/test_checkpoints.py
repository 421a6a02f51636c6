"""Checkpoints: found, named and loaded as promised, or refused whole."""

import copy
import glob
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.av import AV
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

import captum_sdi
from captum_sdi.borrow import preserved
from captum_sdi.checkpoints import (
    Checkpoint,
    checkpoint_names,
    find_checkpoints,
    listed_checkpoints,
    load_checkpoint,
)

CAPTUM_SENTENCE = "Invalid checkpoints provided for TracIn class: {}!"
NO_RATE = "holds no learning rate: 1.0 is used"


def tiny_gpt(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 8}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**(sizes | ends | settings))).eval()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, state = values(model), torch.get_rng_state()
    yield
    assert_same(before, values(model))
    assert torch.equal(torch.get_rng_state(), state)


# --- Finding -------------------------------------------------------------------------------------


def make(folder: Path, *names: str) -> None:
    """Create empty files, or folders where a name ends in a slash."""
    for name in names:
        target = folder / name
        (target if name.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            target.touch()


def test_trainer_folders_are_ordered_by_step_and_the_rest_ignored(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-1000/", "checkpoint-500/", "checkpoint-90/", "runs/")
    make(tmp_path, "model.safetensors", "trainer_state.json", "tmp-checkpoint-7/", "checkpoint-3")
    found = [str(tmp_path / f"checkpoint-{step}") for step in (90, 500, 1000)]
    assert find_checkpoints(str(tmp_path)) == find_checkpoints(tmp_path) == found


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.safetensors",
        "pytorch_model_fsdp_0/",
        "zero_to_fp32.py",
    ],
)
def test_a_folder_that_is_a_checkpoint_is_a_list_of_one(tmp_path: Path, name: str) -> None:
    make(tmp_path, name, "config.json", "trainer_state.json")
    assert find_checkpoints(tmp_path) == [str(tmp_path)]


def test_another_folder_is_listed_as_captum_lists_it(tmp_path: Path) -> None:
    make(tmp_path, "step-10.pt", "step-9.pt", "step-9b.pt", ".hidden", "epoch-2/")
    found = find_checkpoints(str(tmp_path))
    assert found == AV.sort_files(glob.glob(str(tmp_path / "*")))
    assert [Path(f).name for f in found] == ["epoch-2", "step-9.pt", "step-9b.pt", "step-10.pt"]


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    make(tmp_path, "run[1]/a.pt", "run1/b.pt")
    assert find_checkpoints(tmp_path / "run[1]") == [str(tmp_path / "run[1]" / "a.pt")]


def test_a_file_is_a_list_of_one(tmp_path: Path) -> None:
    make(tmp_path, "last.pt")
    assert find_checkpoints(tmp_path / "last.pt") == [str(tmp_path / "last.pt")]


@pytest.mark.parametrize(
    ("passed", "found"),
    [
        (None, [None]),
        (["s10", "s9"], ["s9", "s10"]),
        ([Path("s10"), Path("s9")], ["s9", "s10"]),
        (("s10", Path("s9")), ["s10", "s9"]),
        (iter(["s10", "s9"]), ["s10", "s9"]),
        ([{"a": 1}, 7], [{"a": 1}, 7]),
    ],
)
def test_lists_of_paths_are_sorted_and_other_iterables_kept(passed: Any, found: list) -> None:
    assert find_checkpoints(passed) == found


@pytest.mark.parametrize(
    ("passed", "detail"),
    [
        ([], "It is empty. Pass at least one"),
        (["a", None], "Entry 1 of it is None. .* pass checkpoints=None"),
        ([None], "Entry 0 of it is None"),
        ("no/such/place", "There is no such file or directory"),
    ],
)
def test_no_checkpoints_is_captums_error(passed: Any, detail: str) -> None:
    with pytest.raises(ValueError, match=re.escape(CAPTUM_SENTENCE.format(passed)) + " " + detail):
        find_checkpoints(passed)


def test_an_empty_folder_is_captums_error(tmp_path: Path) -> None:
    sentence = re.escape(CAPTUM_SENTENCE.format(tmp_path)) + " The directory is empty"
    with pytest.raises(ValueError, match=sentence):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize("passed", [3, {"a.pt": 0.1}])
def test_what_is_no_list_of_checkpoints_is_a_type_error(passed: Any) -> None:
    with pytest.raises(TypeError, match=f"got {type(passed).__name__}. Put a single checkpoint in"):
        find_checkpoints(passed)


# --- Naming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoints", "names"),
    [
        ([None], ["current"]),
        (["/a/checkpoint-5", "checkpoint-10/"], ["checkpoint-5", "checkpoint-10"]),
        (["a/r/x", "b/r/x", "b/r/y"], ["a/r/x", "b/r/x", "y"]),
        (["a/r/x", "b/r/x", "b/s/x"], ["a/r/x", "b/r/x", "s/x"]),
        ([Path("a/x"), "b/x"], ["a/x", "b/x"]),
        (["a/x", "a/x", "a/y"], ["{}/a/x", "{}/a/x (2)", "y"]),
        ([object(), "x", nn.Linear(1, 1)], ["#0", "x", "#2"]),
        ([500, 1000], ["500", "1000"]),
    ],
)
def test_names(checkpoints: list, names: list[str]) -> None:
    here = str(Path.cwd()).lstrip("/")
    found = checkpoint_names(checkpoints)
    assert [name.lstrip("/") for name in found] == [name.format(here) for name in names]
    assert len(set(found)) == len(found)


def test_the_folder_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoint-5")
    assert checkpoint_names(["."]) == ["checkpoint-5"]


def test_deleting_or_moving_checkpoints_changes_no_name() -> None:
    paths = [f"/old/run/checkpoint-{step}" for step in range(5, 50, 5)]
    names = dict(zip(paths, checkpoint_names(paths), strict=True))
    assert checkpoint_names(paths[3:]) == [names[path] for path in paths[3:]]
    moved = [path.replace("/old/run", "new") for path in paths]
    assert checkpoint_names(moved) == list(names.values())


# --- Checkpoints as objects ----------------------------------------------------------------------


def test_listed_checkpoints_have_names_numbers_and_no_rate_yet() -> None:
    weights = object()
    assert listed_checkpoints(("a/r/x", "b/r/x", weights)) == [
        Checkpoint("a/r/x", "a/r/x", rate=1.0, number=0),
        Checkpoint("b/r/x", "b/r/x", rate=1.0, number=1),
        Checkpoint("#2", weights, rate=1.0, number=2),
    ]
    assert listed_checkpoints([None]) == [Checkpoint("current", None)]


@pytest.mark.parametrize("returned", [0.25, np.float32(0.25), torch.tensor(0.25), "0.25"])
def test_a_loaded_checkpoint_has_the_rate_that_was_returned(returned: Any) -> None:
    model, calls = nn.Linear(1, 1), []

    def load(*arguments: Any) -> Any:
        calls.append(arguments)
        return returned

    listed = Checkpoint("step-9.pt", "run/step-9.pt", number=3)
    loaded = listed.loaded(model, load)
    assert loaded == Checkpoint("step-9.pt", "run/step-9.pt", rate=0.25, number=3)
    assert type(loaded.rate) is float
    assert listed.rate == 1.0
    assert calls == [(model, "run/step-9.pt")]


def test_the_current_weights_are_not_loaded() -> None:
    def load(model: nn.Module, source: Any) -> float:
        raise AssertionError("there is nothing to load")

    assert Checkpoint("current", None).loaded(nn.Linear(1, 1), load) == Checkpoint("current", None, rate=1.0)


@pytest.mark.parametrize("returned", [None, "fast", float("nan"), float("inf"), [0.1]])
def test_what_a_load_function_returns_must_be_a_finite_number(returned: Any) -> None:
    sentence = re.escape(
        f"checkpoints_load_func returned the learning rate {returned!r} for checkpoint 'x'. It must load the "
        "checkpoint and return a finite number."
    )
    with pytest.raises(ValueError, match=sentence):
        Checkpoint("x", "run/x").loaded(nn.Linear(1, 1), lambda model, source: returned)


def test_a_checkpoint_needs_neither_transformers_nor_peft() -> None:
    # The package itself needs transformers: an empty one takes its place.
    code = f"""
import sys, types
sys.modules["captum_sdi"] = types.ModuleType("captum_sdi")
sys.modules["captum_sdi"].__path__ = {list(captum_sdi.__path__)}
sys.modules["transformers"] = sys.modules["peft"] = None  # to import one of them is an error
import captum_sdi.checkpoints.checkpoint
"""
    ran = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 0, ran.stderr


# --- Loading: every form -------------------------------------------------------------------------


def as_pickle(**beside: Any) -> Callable[[nn.Module, Path], Path]:
    """Write {key: state dict, **beside}, under the key called STATE, or at the top without one."""

    def write(model: nn.Module, folder: Path) -> Path:
        content = {k: v for k, v in beside.items() if v is not STATE}
        nested = [k for k, v in beside.items() if v is STATE]
        content |= {nested[0]: model.state_dict()} if nested else model.state_dict()
        torch.save(content, folder / "step.pt")
        return folder / "step.pt"

    return write


STATE = object()


def named(name: str) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        return as_pickle(lr=0.5)(model, folder).rename(folder / name)

    return write


def safetensors_with_metadata(model: nn.Module, folder: Path) -> Path:
    state = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "step.safetensors", metadata={"learning_rate": "0.5"})
    return folder / "step.safetensors"


def saved_pretrained(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder / "saved")
    return folder / "saved"


def sharded(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder / "saved", max_shard_size="1KB")
    assert len(list((folder / "saved").glob("model-*.safetensors"))) > 2
    return folder / "saved"


def index_of_shards(model: nn.Module, folder: Path) -> Path:
    return sharded(model, folder) / "model.safetensors.index.json"


def bin_folder(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def sharded_bin(model: nn.Module, folder: Path) -> Path:
    names = list(model.state_dict())
    shards = {f"pytorch_model-{i + 1:05}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        torch.save({name: model.state_dict()[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def in_trainer_folder(model: nn.Module, folder: Path) -> Path:
    """The path of the file inside a Trainer folder; the rate lies beside it."""
    log = {"global_step": 5, "log_history": [{"step": 5, "learning_rate": 0.5}]}
    (folder / "trainer_state.json").write_text(json.dumps(log))
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def optimizer(*rates: float) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": rate, "params": []} for rate in rates]}


FORMS: dict[str, tuple[Callable[[nn.Module, Path], Path], float | None]] = {
    "top": (as_pickle(), None),
    "top, rate": (as_pickle(learning_rate=0.5, epoch=3), 0.5),
    "top, tensor rate": (as_pickle(learning_rate=torch.tensor(0.5)), 0.5),
    "top, optimizer": (as_pickle(optimizer=optimizer(0.5, 0.5)), 0.5),
    "model_state_dict": (as_pickle(model_state_dict=STATE, learning_rate=0.5), 0.5),
    "state_dict": (as_pickle(state_dict=STATE, lr=0.5, optimizer=optimizer(0.1)), 0.5),
    "model": (as_pickle(model=STATE, optimizer=optimizer(0.5)), 0.5),
    "model, no rate": (as_pickle(model=STATE, learning_rate=None), None),
    "optimizer_state_dict": (as_pickle(model=STATE, optimizer_state_dict=optimizer(0.5)), 0.5),
    ".pth": (named("a.pth"), 0.5),
    ".bin": (named("a.bin"), 0.5),
    "no suffix": (named("a"), 0.5),
    "safetensors": (safetensors_with_metadata, 0.5),
    "save_pretrained": (saved_pretrained, None),
    "sharded": (sharded, None),
    "index": (index_of_shards, None),
    "pytorch_model.bin": (bin_folder, None),
    "sharded bin": (sharded_bin, None),
    "file in a Trainer folder": (in_trainer_folder, 0.5),
}


@pytest.mark.parametrize(("write", "rate"), FORMS.values(), ids=FORMS.keys())
def test_every_form_loads_in_place(write: Callable, rate: float | None, tmp_path: Path) -> None:
    source, model = tiny_gpt(seed=1), tiny_gpt(seed=2)
    path = write(source, tmp_path)
    objects = {name: id(p) for name, p in model.named_parameters()}
    if rate is None:
        with pytest.warns(UserWarning, match=NO_RATE) as caught:
            assert load_checkpoint(model, path) == 1.0
        assert len(caught) == 1
    else:
        assert load_checkpoint(model, str(path)) == rate
    assert_same(values(source), values(model))
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(p.requires_grad and p.grad is None and p.is_leaf for p in model.parameters())


def test_buffers_are_loaded_and_values_cast(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    source(torch.randn(5, 3, dtype=torch.bfloat16))
    path = as_pickle(model=STATE, lr=0.1)(source, tmp_path)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    load_checkpoint(model, path)
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, source[0].weight.float())
    assert torch.equal(model[1].running_mean, source[1].running_mean.float())
    assert model[1].num_batches_tracked == 1


def test_a_folder_of_the_bare_model_and_one_with_converted_names(tmp_path: Path) -> None:
    """Names on disk that only transformers can map: its base model, a mixture of experts."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(**sizes, **heads)
    pairs = [
        (tiny_gpt(1).transformer, tiny_gpt(2)),
        (MixtralForCausalLM(config), MixtralForCausalLM(config)),
    ]
    for i, (source, model) in enumerate(pairs):
        source.save_pretrained(tmp_path / str(i))
        state, verbosity = torch.get_rng_state(), logging.get_verbosity()
        with pytest.warns(UserWarning, match=NO_RATE):
            load_checkpoint(model, tmp_path / str(i))
        inner = model.transformer if isinstance(source, GPT2Model) else model
        assert_same(values(source), values(inner))
        assert torch.equal(torch.get_rng_state(), state)
        assert logging.get_verbosity() == verbosity


# --- Loading: prefixes, tied keys, declared keys -------------------------------------------------


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # spares the tests the import of the real compiler


def compiled_block(model: GPT2LMHeadModel) -> nn.Module:
    model.transformer.h[0] = compiled(model.transformer.h[0])
    return model


WRAPPERS: dict[str, Callable[[GPT2LMHeadModel], nn.Module]] = {
    "bare": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "compiled block": compiled_block,
}


@pytest.mark.parametrize("into", WRAPPERS)
@pytest.mark.parametrize("saved", WRAPPERS)
def test_prefixes_on_either_side(saved: str, into: str, tmp_path: Path) -> None:
    source, model = tiny_gpt(1), tiny_gpt(2)
    path = as_pickle(model=STATE, lr=0.1)(WRAPPERS[saved](copy.deepcopy(source)), tmp_path)
    load_checkpoint(WRAPPERS[into](model), path)
    assert all(map(torch.equal, source.state_dict().values(), model.state_dict().values()))


def test_a_submodule_called_module_is_no_prefix(tmp_path: Path) -> None:
    def build() -> nn.Module:
        inner = nn.ModuleDict({"head": nn.Linear(2, 2)})
        return nn.ModuleDict({"module": inner, "head": nn.Linear(2, 2)})

    source, model = build(), build()
    load_checkpoint(model, as_pickle(model=STATE, lr=0.1)(source, tmp_path))
    assert_same(values(source), values(model))


@pytest.mark.parametrize("stored", ["transformer.wte.weight", "lm_head.weight"])
def test_one_name_of_a_tied_weight_is_enough(stored: str, tmp_path: Path) -> None:
    source, model = tiny_gpt(1), tiny_gpt(2)
    tied = {"transformer.wte.weight", "lm_head.weight"}
    state = {k: v for k, v in source.state_dict().items() if k == stored or k not in tied}
    torch.save({"model": state, "lr": 0.1}, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert_same(values(source), values(model))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_an_untied_checkpoint_does_not_fit_a_tied_model(tmp_path: Path) -> None:
    path = as_pickle(model=STATE, lr=0.1)(tiny_gpt(1, tie_word_embeddings=False), tmp_path)
    model = tiny_gpt(2)
    with unchanged(model), pytest.raises(ValueError, match=r"wte.weight and lm_head.weight \(two"):
        load_checkpoint(model, path)


def test_tied_weights_with_nan_still_agree(tmp_path: Path) -> None:
    source, model = tiny_gpt(1), tiny_gpt(2)
    with torch.no_grad():
        source.lm_head.weight[0, 0] = float("nan")
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    torch.save({"model": state, "lr": 0.1}, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert model.lm_head.weight[0, 0].isnan()


def test_a_tied_checkpoint_does_not_fit_an_untied_model(tmp_path: Path) -> None:
    model = tiny_gpt(2, tie_word_embeddings=False)
    path = safetensors_with_metadata(tiny_gpt(1), tmp_path)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"1 missing from the checkpoint: lm_head.weight"),
    ):
        load_checkpoint(model, path)


def test_keys_that_the_model_class_declares_may_differ(tmp_path: Path) -> None:
    source, model = tiny_gpt(1), tiny_gpt(2)
    model._keys_to_ignore_on_load_missing = [r"wpe\.weight$"]
    model._keys_to_ignore_on_load_unexpected = [r"attn\.bias"]
    positions = model.transformer.wpe.weight.clone()
    state = source.state_dict() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    del state["transformer.wpe.weight"]
    torch.save({"model": state, "lr": 0.1}, tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert torch.equal(model.transformer.wte.weight, source.transformer.wte.weight)
    assert torch.equal(model.transformer.wpe.weight, positions)


# --- Loading: what does not fit ------------------------------------------------------------------


def changed_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        state = dict(model.state_dict())
        change(state)
        torch.save({"model": state, "lr": 0.1}, folder / "a.pt")
        return folder / "a.pt"

    return write


def written(content: bytes, name: str = "a.pt") -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def truncated(model: nn.Module, folder: Path) -> Path:
    path = as_pickle(model=STATE)(model, folder)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def without_a_shard(model: nn.Module, folder: Path) -> Path:
    path = sharded(model, folder)
    next(path.glob("model-00002-*")).unlink()
    return path


def whole_model(model: nn.Module, folder: Path) -> Path:
    torch.save(model, folder / "a.pt")
    return folder / "a.pt"


def made(*names: str) -> Callable[[nn.Module, Path], Path]:
    def write(model: nn.Module, folder: Path) -> Path:
        make(folder, *names)
        return folder

    return write


def broken_log(model: nn.Module, folder: Path) -> Path:
    path = in_trainer_folder(model, folder)
    (folder / "trainer_state.json").write_text("{")
    return path


class Note:
    """What a pickle may hold beside its tensors."""


MISFITS: dict[str, tuple[Callable[[nn.Module, Path], Path], str]] = {
    "missing": (
        changed_state(lambda state: state.pop("transformer.wpe.weight")),
        r"does not fit the model \(GPT2LMHeadModel\):\n"
        r"    1 missing from the checkpoint: transformer.wpe.weight\nNothing was loaded. Build",
    ),
    "unexpected": (
        changed_state(lambda state: state.update(extra=torch.ones(2))),
        "1 in the checkpoint but not in the model: extra",
    ),
    "many unexpected": (
        changed_state(lambda state: state.update({f"x{i}": torch.ones(1) for i in range(25)})),
        "25 in the checkpoint but not in the model: x0, x1, .*, x9, and 15 more\n",
    ),
    "shape": (
        changed_state(lambda state: state.update({"transformer.wpe.weight": torch.ones(9, 8)})),
        r"1 different in the two: transformer.wpe.weight "
        r"\(\(9, 8\) in the checkpoint, \(8, 8\) in the model\)",
    ),
    "quantised": (
        changed_state(lambda state: state.update({"transformer.wpe.weight": torch.ones(8, 8).to(torch.int8)})),
        r"wpe.weight \(torch.int8 in the checkpoint, torch.float32 in the model\)",
    ),
    "another depth": (
        lambda model, folder: saved_pretrained(tiny_gpt(n_layer=3), folder),
        r"2[24] in the checkpoint but not in the model: transformer\.h\.1\.",
    ),
    "another vocabulary": (
        lambda model, folder: saved_pretrained(tiny_gpt(vocab_size=12), folder),
        r"1 different in the two: transformer.wte.weight \(\(12, 8\) in the checkpoint",
    ),
    "objects": (
        as_pickle(model=STATE, note=Note()),
        r"holds Python objects \(.*Note\) beside its tensors.*convert it once:\n.*weights_only=False",
    ),
    "whole model": (whole_model, r"holds Python objects \(transformers.*GPT2LMHeadModel\)"),
    "truncated": (truncated, "no file of torch.save, or is damaged"),
    "empty": (written(b""), r"no file of torch.save, or is damaged \(EOFError"),
    "text": (written(b"hello world", "notes.txt"), "no file of torch.save, or is damaged"),
    "damaged safetensors": (written(b"hello", "a.safetensors"), "no safetensors file, or is damag"),
    "a list": (
        lambda model, folder: (torch.save([1], folder / "a.pt"), folder / "a.pt")[1],
        "holds a list instead of a state dict. Save the model with",
    ),
    "no state dict": (
        lambda model, folder: (torch.save({"a": 1}, folder / "a.pt"), folder / "a.pt")[1],
        "no state dict, neither at its top nor under model_state_dict, .*; its keys are: a",
    ),
    "nothing there": (
        lambda model, folder: folder / "checkpoint-7",
        "There is no checkpoint at .*checkpoint-7: no such file",
    ),
    "no weights": (
        made("config.json", "notes.md"),
        "holds no weights: none of model.safetensors, .* but config.json, notes.md. Pass a",
    ),
    "nothing in it": (made(), "holds no weights: .* but nothing"),
    "a shard missing": (without_a_shard, r"lacks 1 of its \d+ shards: model-00002-.*only in part"),
    "no index": (written(b"{}", "model.safetensors.index.json"), "has no 'weight_map'"),
    "broken log": (broken_log, "trainer_state.json is not valid JSON"),
    "list log": (written(b"[]", "model.safetensors.index.json"), "holds a JSON list, expected an"),
}


@pytest.mark.parametrize(("write", "sentence"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_whole(write: Any, sentence: str, tmp_path: Path) -> None:
    path, model = write(tiny_gpt(1), tmp_path), tiny_gpt(2)
    with unchanged(model), pytest.raises(ValueError, match=re.compile(sentence, re.DOTALL)):
        load_checkpoint(model, path)


SHARDS = {
    "FSDP": (["pytorch_model_fsdp_0/__0_0.distcp"], "", "merge-weights {}/pytorch_model_fsdp_0 {}"),
    "FSDP, empty": (["pytorch_model_fsdp_0/"], "", "merge-weights {}/pytorch_model_fsdp_0 {}"),
    "FSDP, inner": (["fsdp/__0_0.distcp"], "fsdp", "accelerate merge-weights {}/fsdp {}"),
    "FSDP, file": (["f/0.distcp"], "f/0.distcp", "accelerate merge-weights {}/f {}"),
    "DeepSpeed": (["zero_to_fp32.py", "global_step5/"], "", "python {}/zero_to_fp32.py {} {} --"),
    "DeepSpeed, inner": (["zero_to_fp32.py", "global_step5/"], "global_step5", "{} {} --safe_ser"),
    "DeepSpeed, states": (["global_step5/mp_rank_00_model_states.pt"], "", "zero_to_fp32.py {} {}"),
}


@pytest.mark.parametrize(("names", "inner", "command"), SHARDS.values(), ids=SHARDS.keys())
def test_shards_are_refused_with_the_command_that_merges_them(
    names: list[str], inner: str, command: str, tmp_path: Path
) -> None:
    make(tmp_path, *names)
    command = re.escape(command).replace(r"\{\}", re.escape(str(tmp_path)))
    with pytest.raises(ValueError, match=rf"must be merged before .* Run once:\n.*{command}"):
        load_checkpoint(tiny_gpt(), tmp_path / inner)


def test_merged_weights_beside_the_shards_are_read(tmp_path: Path) -> None:
    make(tmp_path, "pytorch_model_fsdp_0/__0_0.distcp", "zero_to_fp32.py", "latest")
    source, model = tiny_gpt(1), tiny_gpt(2)
    in_trainer_folder(source, tmp_path)
    assert load_checkpoint(model, tmp_path) == 0.5
    assert_same(values(source), values(model))


def test_a_file_called_latest_is_deepspeeds_only_if_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step5")
    with pytest.raises(ValueError, match=r"zero_to_fp32.py"):
        load_checkpoint(tiny_gpt(), tmp_path)
    (tmp_path / "latest").write_text("yesterday's run")
    with pytest.raises(ValueError, match=r"holds no weights"):
        load_checkpoint(tiny_gpt(), tmp_path)


def test_a_model_on_meta_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' of the model is on the meta device.*to_empty"):
        load_checkpoint(model, tmp_path)


def test_wrong_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        load_checkpoint("a.pt", tiny_gpt())
    with pytest.raises(TypeError, match=r"takes the path of a file or folder, got dict. Pass check"):
        load_checkpoint(tiny_gpt(), {})


# --- Learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "sentence"),
    [
        (-0.1, "learning rate of .*step.pt is -0.1; it must be finite and not < 0"),
        (float("nan"), "is nan; it must be finite"),
        (float("inf"), "is inf; it must be finite"),
        ("fast", "'learning_rate' of .* should be a learning rate, one number, but is 'fast'"),
        (True, "one number, but is True"),
        (torch.ones(2), "one number, but is tensor"),
    ],
)
def test_impossible_rates_are_refused_before_anything_is_copied(rate: Any, sentence: str, tmp_path: Path) -> None:
    path = as_pickle(model=STATE, learning_rate=rate)(tiny_gpt(1), tmp_path)
    model = tiny_gpt(2)
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        load_checkpoint(model, path)


def test_a_rate_of_zero_warns(tmp_path: Path) -> None:
    path = as_pickle(model=STATE, lr=0)(tiny_gpt(1), tmp_path)
    with pytest.warns(UserWarning, match=r"is 0: this checkpoint contributes nothing"):
        assert load_checkpoint(tiny_gpt(2), path) == 0.0


def test_parameter_groups_of_different_rates_warn(tmp_path: Path) -> None:
    path = as_pickle(model=STATE, optimizer=optimizer(0.5, 0.1))(tiny_gpt(1), tmp_path)
    with pytest.warns(UserWarning, match=r"different learning rates \(0.5, 0.1\). The first is"):
        assert load_checkpoint(tiny_gpt(2), path) == 0.5


def test_many_checkpoints_without_a_rate_warn_once(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    paths = [tmp_path / f"step-{step}.pt" for step in range(3)]
    for path in paths:
        torch.save(model.state_dict(), path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for path in paths * 2:
            assert load_checkpoint(model, path) == 1.0
    assert [str(warning.message) for warning in caught if str(tmp_path) + " " + NO_RATE in str(warning.message)]
    assert len(caught) == 1


def test_a_file_beside_a_trainers_log_does_not_take_its_rate(tmp_path: Path) -> None:
    in_trainer_folder(tiny_gpt(1), tmp_path)
    path = as_pickle(model=STATE)(tiny_gpt(1), tmp_path)
    with pytest.warns(UserWarning, match=NO_RATE):
        assert load_checkpoint(tiny_gpt(2), path) == 1.0


class Recorder(TrainerCallback):
    """The ground truth: the rate in the optimizer just before each step, the weights at each save."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates[state.global_step + 1] = kwargs["optimizer"].param_groups[0]["lr"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = values(kwargs["model"])


def train(folder: Path, model: nn.Module, steps: int, **settings: Any) -> Recorder:
    rows = [{"input_ids": torch.arange(i, i + 4), "labels": torch.arange(i, i + 4)} for i in (1, 2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    recorder = Recorder()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[recorder]).train()
    return recorder


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run that logs at every step it saves; its first step has rate 0, for it warms up."""
    folder = tmp_path_factory.mktemp("logged")
    settings = {"save_steps": 1, "logging_steps": 1, "warmup_steps": 1}
    return folder, train(folder, tiny_gpt(), 4, lr_scheduler_type="linear", **settings)


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    """A run that saves at steps 3, 6, 9 and 12, logs at 5 and 10, and kept no scheduler."""
    folder = tmp_path_factory.mktemp("sparse")
    settings = {"save_steps": 3, "logging_steps": 5, "lr_scheduler_type": "cosine"}
    recorder = train(folder, tiny_gpt(), 12, **settings)
    for scheduler in folder.glob("*/scheduler.pt"):
        scheduler.unlink()
    return folder, recorder


def test_the_rate_used_at_a_logged_step(logged_run: tuple[Path, Recorder]) -> None:
    folder, truth = logged_run
    model = tiny_gpt(2)
    assert [Path(path).name for path in find_checkpoints(folder)] == [f"checkpoint-{step}" for step in range(1, 5)]
    for step in range(2, 5):
        assert load_checkpoint(model, folder / f"checkpoint-{step}") == truth.rates[step] > 0
        assert_same(truth.weights[step], values(model))
        # The reason for reading the log: the optimizer's file is one step ahead.
        state = torch.load(folder / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)
        assert state["param_groups"][0]["lr"] == truth.rates.get(step + 1, 0.0)


def test_the_first_step_of_a_warmup_warns(logged_run: tuple[Path, Recorder]) -> None:
    folder, truth = logged_run
    with pytest.warns(UserWarning, match=r"checkpoint-1 is 0: this checkpoint contributes nothing"):
        assert load_checkpoint(tiny_gpt(), folder / "checkpoint-1") == truth.rates[1] == 0


@pytest.mark.parametrize("step", [6, 9])
def test_an_unlogged_rate_is_interpolated(sparse_run: tuple[Path, Recorder], step: int) -> None:
    folder, truth = sparse_run
    sentence = f"checkpoint-{step} logged no .* at its step {step}: .* between those of steps 5 and"
    with pytest.warns(UserWarning, match=sentence):
        rate = load_checkpoint(tiny_gpt(), folder / f"checkpoint-{step}")
    assert rate == pytest.approx(np.interp(step, [5, 10], [truth.rates[5], truth.rates[10]]))
    assert rate == pytest.approx(truth.rates[step], rel=0.1)  # a cosine is nearly straight there


@pytest.mark.parametrize(("step", "nearest"), [(3, 5), (12, 10)])
def test_beyond_the_log_the_nearest_rate_is_used(sparse_run: tuple[Path, Recorder], step: int, nearest: int) -> None:
    folder, truth = sparse_run
    with pytest.warns(UserWarning, match=f"that of step {nearest}, the nearest logged one, is used"):
        rate = load_checkpoint(tiny_gpt(), folder / f"checkpoint-{step}")
    assert rate == truth.rates[nearest]


def write_log(folder: Path, step: int, rates: dict[int, float]) -> None:
    history = [{"step": s, "learning_rate": rate, "loss": 1.0} for s, rate in rates.items()]
    log = {"global_step": step, "log_history": [*history, {"step": step, "eval_loss": 1.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(log))


def test_the_log_of_another_run_in_the_same_folder_does_not_count(tmp_path: Path) -> None:
    for step, rates in {6: {5: 0.4}, 12: {5: 0.1, 10: 0.2}}.items():
        saved_pretrained(tiny_gpt(1), tmp_path).rename(tmp_path / f"checkpoint-{step}")
        write_log(tmp_path / f"checkpoint-{step}", step, rates)
    with pytest.warns(UserWarning, match=r"that of step 5, the nearest"):
        assert load_checkpoint(tiny_gpt(2), tmp_path / "checkpoint-6") == 0.4


def test_the_log_saved_after_training_counts(tmp_path: Path) -> None:
    saved_pretrained(tiny_gpt(1), tmp_path).rename(tmp_path / "checkpoint-6")
    write_log(tmp_path / "checkpoint-6", 6, {4: 0.4})
    write_log(tmp_path, 8, {4: 0.4, 8: 0.2})
    with pytest.warns(UserWarning, match=r"between those of steps 4 and 8"):
        assert load_checkpoint(tiny_gpt(2), tmp_path / "checkpoint-6") == pytest.approx(0.3)


@pytest.mark.parametrize("log", ["{}", '{"global_step": 6, "log_history": []}'])
def test_a_log_without_rates_is_no_rate(log: str, tmp_path: Path) -> None:
    path = saved_pretrained(tiny_gpt(1), tmp_path)
    (path / "trainer_state.json").write_text(log)
    with pytest.warns(UserWarning, match=NO_RATE):
        assert load_checkpoint(tiny_gpt(2), path) == 1.0


# --- Adapters ------------------------------------------------------------------------------------


def with_adapter(seed: int, name: str = "default", **settings: Any) -> Any:
    model = tiny_gpt(0)
    torch.manual_seed(seed)
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**({"r": 2} | targets | settings)), adapter_name=name)


def saved_adapter(folder: Path, seed: int = 1, **settings: Any) -> Path:
    with_adapter(seed, **settings).save_pretrained(folder)
    write_log(folder, 5, {5: 0.5})
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["c_attn", "wte"]}, {"name": "mine"}],
    ids=["plain", "modules_to_save", "embedding", "named"],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers")
def test_an_adapter_loads_in_place(settings: dict[str, Any], tmp_path: Path) -> None:
    source, model = with_adapter(1, **settings), with_adapter(2, **settings)
    path = saved_adapter(tmp_path, **settings)
    objects = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        model.get_base_model().transformer.wpe.weight.fill_(7.0)  # no part of the adapter
        source.get_base_model().transformer.wpe.weight.fill_(7.0)
    assert load_checkpoint(nn.DataParallel(model), path) == 0.5
    assert_same(values(source), values(model))
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def test_an_adapter_saved_with_its_embeddings(tmp_path: Path) -> None:
    source, model = with_adapter(1), with_adapter(2)
    with torch.no_grad():
        source.get_base_model().transformer.wte.weight.fill_(7.0)
    source.save_pretrained(tmp_path, save_embedding_layers=True)
    write_log(tmp_path, 5, {5: 0.5})
    assert load_checkpoint(model, tmp_path) == 0.5
    assert_same(values(source), values(model))


def test_a_trainers_adapter_folder(tmp_path: Path) -> None:
    truth = train(tmp_path, with_adapter(1), 2, save_steps=1, logging_steps=1)
    model = with_adapter(2)
    for step in (1, 2):
        assert load_checkpoint(model, tmp_path / f"checkpoint-{step}") == truth.rates[step]
        assert_same(truth.weights[step], values(model))


def test_an_adapter_needs_a_peft_model(tmp_path: Path) -> None:
    model, path = tiny_gpt(2), saved_adapter(tmp_path)
    sentence = re.escape(f"PeftModel.from_pretrained(model, {str(path)!r}, is_trainable=True)")
    with unchanged(model), pytest.raises(ValueError, match=rf"is no PeftModel. Wrap.*{sentence}"):
        load_checkpoint(model, path)
    wrapped = PeftModel.from_pretrained(tiny_gpt(0), path, is_trainable=True)
    assert load_checkpoint(wrapped, path) == 0.5  # what the sentence says works


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"r": 4}, r"2 different in the two: .*lora_A.* \(\(4, 8\) in the checkpoint, \(2, 8\)"),
        ({"target_modules": ["c_fc"]}, "2 missing from .*c_attn.*2 in the checkpoint but .*c_fc"),
        ({"lora_alpha": 32}, r"another adapter .* lora_alpha \(32 in the checkpoint, 8 in the m"),
        ({"use_rslora": True}, r"another adapter .* use_rslora \(True"),
    ],
)
def test_another_adapter_is_refused(settings: dict, sentence: str, tmp_path: Path) -> None:
    model, path = with_adapter(2), saved_adapter(tmp_path, **settings)
    with unchanged(model), pytest.raises(ValueError, match=re.compile(sentence, re.DOTALL)):
        load_checkpoint(model, path)


# --- Within `preserved` --------------------------------------------------------------------------


def test_loading_within_preserved(tmp_path: Path) -> None:
    model = tiny_gpt(2)
    path = as_pickle(model=STATE, lr=0.1)(tiny_gpt(1), tmp_path)
    with unchanged(model), preserved(model):
        load_checkpoint(model, path)
        assert_same(values(tiny_gpt(1)), values(model))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    model = tiny_gpt(2).cuda()
    path = as_pickle(model=STATE, lr=0.1)(tiny_gpt(1), tmp_path)
    state = torch.cuda.get_rng_state()
    with unchanged(model), preserved(model):
        load_checkpoint(model, path)
        torch.randn(3, device="cuda")
        model.cpu()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(p.is_cuda for p in model.parameters())
