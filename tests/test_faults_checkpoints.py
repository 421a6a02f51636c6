"""Checkpoint folders as people really have them: loaded right, or refused before anything is changed."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from captum_sdi import SDIInfluence
from captum_sdi.checkpoints import find_checkpoints, load_checkpoint
from tests.test_checkpoints import (
    NO_RATE,
    make,
    optimizer,
    saved_pretrained,
    sharded,
    tiny_gpt,
    train,
    unchanged,
    values,
    write_log,
)


def refused(model: nn.Module, path: Path, sentence: str) -> None:
    with unchanged(model), pytest.raises(ValueError, match=sentence) as caught:
        load_checkpoint(model, path)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None or "weights_only" not in str(caught.value.__cause__)


# --- What a file may not hold --------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["1_0", "１", "inf", "0x1", "", "True"])
def test_e10_only_decimal_numbers_are_rates(rate: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"learning_rate": rate})
    refused(model, tmp_path / "a.safetensors", rf"should be a learning rate, one number, but is '{rate}'")


@pytest.mark.parametrize("rate", ["1e-3", "0.001", " 1E-3", ".001"])
def test_e10_decimal_numbers_are_still_rates(rate: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"learning_rate": rate})
    assert load_checkpoint(model, tmp_path / "a.safetensors") == 0.001


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x04]q\x00\x95.", b"PK\x03\x04 cut"])
def test_e10_torchs_advice_to_run_the_file_is_not_passed_on(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    refused(nn.Linear(2, 1), tmp_path / "a.pt", "no file of torch.save, or is damaged")


def test_e10_a_torchscript_archive_is_named_without_torchs_advice(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 1)).save(str(tmp_path / "a.pt"))
    refused(nn.Linear(2, 1), tmp_path / "a.pt", "no file of torch.save, or is damaged")


NESTED = "[" * 100_000 + "]" * 100_000
DAMAGED_LOGS = {
    "nesting": (f'{{"log_history": {NESTED}}}', "nested too deeply"),
    "step": ('{"global_step": "5"}', r"'global_step' must be a number of steps, but is '5'"),
    "huge step": (f'{{"global_step": 1{"0" * 400}}}', "'global_step' must be"),
    "bool step": ('{"global_step": true}', "'global_step' must be"),
    "negative step": ('{"global_step": -5}', "'global_step' must be"),
    "history": ('{"global_step": 5, "log_history": {"a": 1}}', "'log_history' must be a list"),
    "entry": ('{"global_step": 5, "log_history": [3]}', r"'log_history\[0\]' must be an object"),
    "entry's step": (
        '{"global_step": 5, "log_history": [{"step": [], "learning_rate": 1}]}',
        r"'log_history\[0\].step' must be",
    ),
    "entry's rate": ('{"global_step": 5, "log_history": [{"step": 5, "learning_rate": {}}]}', "should be a learning"),
    "huge rate": (
        f'{{"global_step": 5, "log_history": [{{"step": 5, "learning_rate": 1{"0" * 400}}}]}}',
        "should be a learning rate",
    ),
}


@pytest.mark.parametrize(("log", "sentence"), DAMAGED_LOGS.values(), ids=DAMAGED_LOGS.keys())
def test_e8_a_damaged_trainer_state_is_named(log: str, sentence: str, tmp_path: Path) -> None:
    model, path = tiny_gpt(2), saved_pretrained(tiny_gpt(1), tmp_path)
    (path / "trainer_state.json").write_text(log)
    refused(model, path, rf"trainer_state\.json.*{sentence}")


OUTSIDE: list[Any] = [
    "../stolen.safetensors",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\\b",
    "C:x",
    "model.safetensors.index.json",
    3,
    None,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_e8_an_index_names_files_of_its_own_folder(name: Any, tmp_path: Path) -> None:
    path = sharded(tiny_gpt(1), tmp_path)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wpe.weight"] = name
    index.write_text(json.dumps(content))
    refused(tiny_gpt(2), path, r"index\.json is damaged: 'weight_map' of 'transformer.wpe.weight' must be the name")


@pytest.mark.parametrize("value", [[], "a", 3])
def test_e8_a_weight_map_of_another_type(value: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
    refused(tiny_gpt(2), tmp_path, r"index\.json is damaged: 'weight_map' must be an object of tensor names")


def test_e8_shards_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    path = sharded(tiny_gpt(1), tmp_path)
    write_log(path, 5, {5: 0.5})
    (tmp_path / "blobs").mkdir()
    for number, shard in enumerate(sorted(path.glob("model-*.safetensors"))):
        blob = shard.rename(tmp_path / "blobs" / str(number))
        shard.symlink_to(blob)
    assert load_checkpoint(tiny_gpt(2), path) == 0.5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_e7_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    refused(tiny_gpt(), tmp_path / "a.pt", r"a\.pt is neither a regular file nor a folder")
    refused(tiny_gpt(), Path(os.devnull), "is neither a regular file nor a folder")


# --- Nothing is ever half loaded -----------------------------------------------------------------


def two_tensors(late: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 1)
    model.register_buffer("z", late)
    return model


UNCOPYABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: two_tensors(torch.ones(3)), lambda: torch.ones(3).to_sparse(), "z .*sparse_coo in the check"),
    "complex": (
        lambda: two_tensors(torch.ones(3, dtype=torch.int64)),
        lambda: torch.ones(3, dtype=torch.complex64),
        "z .torch.complex64 in the checkpoint",
    ),
    "expanded": (
        lambda: two_tensors(torch.zeros(1).expand(3)),
        lambda: torch.ones(3),
        "'z' of the model has entries that share memory",
    ),
}


@pytest.mark.parametrize(("make_model", "stored", "sentence"), UNCOPYABLE.values(), ids=UNCOPYABLE.keys())
def test_e9_what_cannot_be_copied_is_found_before_the_first_copy(
    make_model: Any, stored: Any, sentence: str, tmp_path: Path
) -> None:
    model = make_model()
    state = {name: tensor + 1 for name, tensor in values(nn.Linear(2, 1)).items()}
    torch.save({"model": {**state, "z": stored()}, "lr": 0.1}, tmp_path / "a.pt")
    refused(model, tmp_path / "a.pt", re.compile(sentence, re.DOTALL))


def test_e9_a_model_of_inference_mode_is_refused(tmp_path: Path) -> None:
    with torch.inference_mode():
        late = torch.zeros(3)
    torch.save({**two_tensors(torch.ones(3)).state_dict(), "lr": 0.1}, tmp_path / "a.pt")
    refused(two_tensors(late), tmp_path / "a.pt", "'z' of the model has been made in inference mode")


# --- The rate that was used ----------------------------------------------------------------------

SCHEDULES = ["linear", "cosine", "constant_with_warmup"]
WARMUP, STEPS = 5, 22


@pytest.fixture(scope="module", params=SCHEDULES)
def scheduled_run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float], str]:
    """A run that logged every step, and saved within its warm-up, at its end, after it and at the last step."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"warmup_steps": WARMUP, "lr_scheduler_type": request.param, "save_steps": 3}
    return folder, train(folder, tiny_gpt(), STEPS, logging_steps=1, **settings).rates, request.param


def as_if_logged(run: Path, folder: Path, every: int, *, late: bool = False) -> list[Path]:
    """Copy a run, its logs thinned out and, as before transformers 4.51, one step late."""
    shutil.copytree(run, folder)
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text())
        next_rate = torch.load(file.with_name("scheduler.pt"), weights_only=True)["_last_lr"][0]
        rates = [entry["learning_rate"] for entry in state["log_history"]] + [next_rate]
        rates = rates[int(late) :]
        for entry, rate in zip(state["log_history"], rates, strict=False):
            entry["learning_rate"] = rate
        state["log_history"] = [entry for entry in state["log_history"] if entry["step"] % every == 0]
        file.write_text(json.dumps(state))
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.mark.parametrize("late", [False, True], ids=["own rates", "next rates"])
@pytest.mark.parametrize("every", [1, 2, 10, 500])
@pytest.mark.filterwarnings("ignore:.*logged no learning rate")
def test_a9_rates_are_those_used_however_seldom_they_were_logged(
    scheduled_run: tuple[Path, dict[int, float], str], every: int, late: bool, tmp_path: Path
) -> None:
    run, truth, _ = scheduled_run
    model = tiny_gpt(2)
    folders = as_if_logged(run, tmp_path / "run", every, late=late)
    assert len(folders) == 8
    for folder in folders:
        step = int(folder.name.split("-")[1])
        assert load_checkpoint(model, folder) == pytest.approx(truth[step], rel=0.01), step


@pytest.mark.parametrize(("schedule", "every"), [("linear", 500), ("cosine", 10), ("constant", 500)])
@pytest.mark.filterwarnings("ignore:.*logged no learning rate")
def test_a9_real_runs_that_log_seldom(schedule: str, every: int, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": schedule, "save_steps": 4, "warmup_steps": 3, "logging_steps": every}
    truth = train(tmp_path, tiny_gpt(), 13, **settings).rates
    for step in (4, 8, 12, 13):
        rate = load_checkpoint(tiny_gpt(2), tmp_path / f"checkpoint-{step}")
        assert rate == pytest.approx(truth[step], rel=0.01), step


def test_a9_the_schedulers_rate_is_said_once_at_the_users_line(
    scheduled_run: tuple[Path, dict[int, float], str], tmp_path: Path
) -> None:
    folders = as_if_logged(scheduled_run[0], tmp_path / "run", 500)
    model = tiny_gpt(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for folder in folders:
            load_checkpoint(model, folder)
    assert [warning.filename for warning in caught] == [__file__]
    sentence = r"run logged no learning rate .* scheduler.pt, .* choose logging_steps so that it divides save_steps"
    assert re.search(sentence, str(caught[0].message))


def test_a9_an_unknown_schedule_is_read_one_step_late(tmp_path: Path) -> None:
    path = saved_pretrained(tiny_gpt(1), tmp_path)
    (path / "trainer_state.json").write_text('{"global_step": 6, "max_steps": 9, "log_history": []}')
    torch.save({"_last_lr": [0.123], "base_lrs": [1.0], "last_epoch": 6}, path / "scheduler.pt")
    with pytest.warns(UserWarning, match=r"logged no .* at its step 6: 0.123, that of step 7, one step late by sched"):
        assert load_checkpoint(tiny_gpt(2), path) == 0.123


def test_a9_the_advice_fits_a_folder_whose_log_is_there(tmp_path: Path) -> None:
    path = saved_pretrained(tiny_gpt(1), tmp_path)
    write_log(path, 6, {})
    with pytest.warns(UserWarning, match=rf"{NO_RATE}.*trainer_state.json logged none: .*choose logging_steps <= save"):
        assert load_checkpoint(tiny_gpt(2), path) == 1.0


# --- All of several checkpoints are looked at before the first pass ------------------------------


def as_folder(folder: Path, number: int) -> Path:
    path = saved_pretrained(tiny_gpt(number), folder).rename(folder / f"checkpoint-{number}")
    write_log(path, number, {number: 0.5})
    return path


def as_file(folder: Path, number: int) -> Path:
    torch.save({"model": tiny_gpt(number).state_dict(), "lr": 0.5}, folder / f"{number}.pt")
    return folder / f"{number}.pt"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def of_another_shape(path: Path) -> None:
    torch.save({"model": tiny_gpt(n_layer=2).state_dict(), "lr": 0.5}, path)


SPOILT: dict[str, tuple[Any, Callable[[Path], Any], str]] = {
    "cut": (as_folder, lambda path: cut(path / "model.safetensors"), r"3.model\.safetensors is .* damaged"),
    "shape": (as_folder, lambda path: tiny_gpt(n_positions=9).save_pretrained(path), r"3.* does not fit the model"),
    "log": (as_folder, lambda path: cut(path / "trainer_state.json"), r"3.trainer_state\.json is not valid JSON"),
    "no weights": (as_folder, lambda path: (path / "model.safetensors").unlink(), "3 holds no weights"),
    "cut pickle": (as_file, cut, r"3\.pt .* damaged"),
    "shape of a pickle": (as_file, of_another_shape, r"3\.pt does not fit the model"),
    "stray": (as_file, lambda path: path.write_text("a note"), r"3\.pt .* no file of torch.save"),
}


@pytest.mark.parametrize(("write", "spoil", "sentence"), SPOILT.values(), ids=SPOILT.keys())
def test_b8_the_last_of_three_checkpoints_is_refused_before_any_work(
    write: Any, spoil: Any, sentence: str, tmp_path: Path
) -> None:
    paths = [str(write(tmp_path, number)) for number in (1, 2, 3)]
    spoil(Path(paths[-1]))
    model, ids = tiny_gpt(), torch.tensor([1, 2, 3])
    forwards: list[Any] = []
    influence = SDIInfluence(model, [{"input_ids": ids, "labels": ids}], checkpoints=paths)
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with unchanged(model), pytest.raises(ValueError, match=sentence):
        influence.influence([{"input_ids": ids, "labels": ids}])
    assert not forwards


@pytest.mark.parametrize("write", [as_folder, as_file])
@pytest.mark.filterwarnings("ignore:Nothing repeats")
def test_b8_checkpoints_that_fit_are_read_as_before(write: Any, tmp_path: Path) -> None:
    paths = [str(write(tmp_path, number)) for number in (1, 2, 3)]
    ids = torch.tensor([1, 2, 3])
    rows = [{"input_ids": ids, "labels": ids}]
    all_three = SDIInfluence(tiny_gpt(), rows, checkpoints=paths, layers=None).influence(rows)
    totals = [SDIInfluence(tiny_gpt(), rows, checkpoints=[path], layers=None).influence(rows) for path in paths]
    assert torch.allclose(all_three, torch.stack(totals).sum(0))


@pytest.mark.filterwarnings("ignore:Nothing repeats")
def test_b8_a_load_function_of_the_users_reads_what_it_likes(tmp_path: Path) -> None:
    ids = torch.tensor([1, 2, 3])
    rows = [{"input_ids": ids, "labels": ids}]
    sources = ["one.json", "two.json"]
    influence = SDIInfluence(tiny_gpt(), rows, sources, checkpoints_load_func=lambda *_: 1.0, layers=None)
    assert influence.influence(rows).shape == (1, 1)


# --- Which entries of a folder are checkpoints ---------------------------------------------------


def found_in(folder: Path) -> list[str]:
    return [Path(path).relative_to(folder).as_posix() for path in find_checkpoints(folder)]


@pytest.mark.parametrize("names", [["epoch_0", "epoch_2", "epoch_10"], ["step_5", "step_50"], ["ckpt-1", "ckpt-2"]])
@pytest.mark.parametrize("saved", ["model.safetensors", "pytorch_model.bin", "zero_to_fp32.py", "adapter_model.bin"])
def test_a10_numbered_folders_beside_the_final_model_are_the_checkpoints(
    names: list[str], saved: str, tmp_path: Path
) -> None:
    make(tmp_path, "model.safetensors", "config.json", "all_results.json", "runs/a", "eval_1/results.json")
    make(tmp_path, *[f"{name}/{saved}" for name in names])
    assert found_in(tmp_path) == names


def test_a10_accelerates_epochs_beside_a_final_model(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(tiny_gpt())
    for epoch in range(3):
        with torch.no_grad():
            next(prepared.parameters()).add_(1.0)
        accelerator.save_state(str(tmp_path / f"epoch_{epoch}"))
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path)
    assert found_in(tmp_path) == ["epoch_0", "epoch_1", "epoch_2"]
    shutil.copytree(tmp_path / "epoch_1", tmp_path / "epoch_3")
    with pytest.warns(UserWarning, match=r"epoch_3 holds the same weights as .*epoch_1.*counted once"):
        assert found_in(tmp_path) == ["epoch_0", "epoch_1", "epoch_2"]


def test_a10_other_folders_with_weights_are_named(tmp_path: Path) -> None:
    make(tmp_path, "model.safetensors", "best/model.safetensors", "logs/a.txt")
    with pytest.warns(UserWarning, match=r"is taken as one checkpoint, although folders in it hold weights .*: best\."):
        assert found_in(tmp_path) == ["."]


def test_a10_what_cannot_be_weights_is_skipped(tmp_path: Path) -> None:
    others = ["all_results.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth", "notes.txt", "scheduler.bin"]
    others += ["events.out.tfevents.17.host.1.0", "tokenizer.model", "runs/", "wandb/a", "loss.png", "run.log"]
    make(tmp_path, *others)
    with pytest.raises(ValueError, match=r"Nothing in it can be weights: all_results.json, events.*list of paths"):
        find_checkpoints(tmp_path)
    make(tmp_path, "1.pt", "2.ckpt", "3.safetensors", "4", "5.npz")
    assert found_in(tmp_path) == ["1.pt", "2.ckpt", "3.safetensors", "4", "5.npz"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_e7_a_pipe_among_checkpoints_is_skipped_and_alone_refused(tmp_path: Path) -> None:
    as_file(tmp_path, 1)
    os.mkfifo(tmp_path / "2.pt")
    assert found_in(tmp_path) == ["1.pt"]
    with pytest.raises(ValueError, match=r"2\.pt! It is neither a regular file nor a directory"):
        find_checkpoints(tmp_path / "2.pt")


def linked(path: Path, twin: Path) -> None:
    twin.symlink_to(path)


def copied(path: Path, twin: Path) -> None:
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, twin)


@pytest.mark.parametrize("twice", [linked, copied])
@pytest.mark.parametrize("write", [as_folder, as_file])
def test_a10_links_and_copies_of_the_same_weights_count_once(write: Any, twice: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path, number) for number in (1, 2)]
    twice(paths[1], tmp_path / ("checkpoint-3" if paths[1].is_dir() else "last.pt"))
    with pytest.warns(
        UserWarning, match=r"(checkpoint-3|last.pt) holds the same weights as .*2.*counted once"
    ) as caught:
        assert find_checkpoints(tmp_path) == [str(path) for path in paths]
    assert [warning.filename for warning in caught] == [__file__]
    twin = tmp_path / ("checkpoint-3" if paths[1].is_dir() else "last.pt")
    with pytest.warns(UserWarning, match=r"holds the same weights"):
        assert find_checkpoints([paths[0], paths[1], twin]) == [str(path) for path in paths]
    meant = [str(paths[0])] * 2  # a path listed twice counts twice, as in Captum
    assert find_checkpoints(meant) == meant


def lightning(folder: Path, prefixes: list[str], **more: torch.Tensor) -> Path:
    state = {prefix + name: tensor for prefix in prefixes for name, tensor in tiny_gpt(1).state_dict().items()}
    saved = {"pytorch-lightning_version": "2.5.0", "epoch": 1, "callbacks": {"a": {"best": torch.ones(1)}}}
    torch.save({**saved, "state_dict": state | more, "optimizer_states": [optimizer(0.5)]}, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("prefix", ["model.", "net.gpt.", ""])
def test_a10_lightnings_weights_are_told_by_their_prefix(prefix: str, tmp_path: Path) -> None:
    more = {"metric.total": torch.ones(1)} if prefix else {}
    model = tiny_gpt(2)
    assert load_checkpoint(model, lightning(tmp_path, [prefix], **more)) == 0.5
    for name, tensor in tiny_gpt(1).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a10_two_models_in_one_lightning_module_are_refused(tmp_path: Path) -> None:
    refused(tiny_gpt(2), lightning(tmp_path, ["student.", "teacher."]), r"under several names: student\., teacher\.")
