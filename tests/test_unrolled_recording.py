"""`record_training`: what a real Trainer did is recorded, read back, and replayed to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from cases import looped_gpt, rows
from torch import nn

from captum_sdi.data import Collator
from captum_sdi.unrolled import SGD, AdamW, TrainingRun, UnrolledInfluence, record_training

transformers = pytest.importorskip("transformers")

TRAIN = rows(7, seed=1, longest=6)
TINY = {"n_prelude": 0, "n_core": 1, "n_coda": 0, "n_loops": 2}


def trainer(model: nn.Module, folder: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        **{"per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-3, **settings},
    )
    return transformers.Trainer(model, arguments, train_dataset=TRAIN, data_collator=Collator())


def recorded(model: nn.Module, folder: Path, **settings: Any) -> TrainingRun:
    trains = trainer(model, folder, **settings)
    record_training(trains, folder)
    trains.train()
    return TrainingRun.load(folder)


def influence(model: nn.Module, run: TrainingRun, folder: Path) -> Any:
    unrolled = UnrolledInfluence(model, TRAIN, run, folder, layers=None, loop="core", check=False)
    return unrolled, unrolled.influence(TRAIN[:2])


def test_a_run_of_adamw_is_recorded_and_replayed(tmp_path: Path) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "adam_beta2": 0.99,
    }
    model = looped_gpt(**TINY, bias=True)().double()
    run = recorded(model, tmp_path, **settings)
    assert run.optimizer.betas == (0.9, 0.99)
    assert run.optimizer.weight_decay == 0.1
    assert {"ln_f.weight", "core.blocks.0.ln_1.bias"} & set(run.optimizer.no_decay)
    assert [len(batch) for batch in run.batches] == [4, 3, 4, 3]
    assert [sorted(run.batches[0] + run.batches[1]), sorted(run.batches[2] + run.batches[3])] == [list(range(7))] * 2
    assert run.rates[0] == 0
    assert max(run.rates) == 1e-3
    assert (run.max_grad_norm, run.reduction, run.micro_batch_size, run.random_states) == (0.5, "tokens", 2, None)
    unrolled, scores = influence(model, run, tmp_path)
    assert unrolled.check().replay_error < 1e-6  # the loss of transformers is float32
    assert scores.shape == (2, 7)


def test_a_run_with_dropout_is_replayed_by_its_random_states(tmp_path: Path) -> None:
    model = zoo.gpt2()
    model.config.use_cache = False  # in training, older transformers keep what every repetition appends to
    run = recorded(model, tmp_path, optim="sgd", num_train_epochs=1, lr_scheduler_type="constant", learning_rate=0.1)
    assert isinstance(run.optimizer, SGD)
    assert run.random_states is not None
    assert len(run.random_states) == run.n_updates == 4
    unrolled = UnrolledInfluence(model, TRAIN, run, tmp_path, check=False)
    unrolled.influence(TRAIN[:1])
    assert unrolled.check().replay_error < 1e-5
    without = TrainingRun(run.optimizer, run.rates, run.batches, run.max_grad_norm, run.reduction)
    with pytest.raises(ValueError, match="dropout without random_states="):
        UnrolledInfluence(model, TRAIN, without, tmp_path).influence(TRAIN[:1])
    with pytest.raises(ValueError, match="step_matrix splits gradients in evaluation mode"):
        unrolled.step_matrix(TRAIN[:1])


def test_recording_changes_nothing(tmp_path: Path) -> None:
    watched, alone = looped_gpt(**TINY)(), looped_gpt(**TINY)()
    recorded(watched, tmp_path / "watched")
    trainer(alone, tmp_path / "alone").train()
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "smooths labels"),
        ({"dataloader_num_workers": 1}, "workers load its data"),
        ({"neftune_noise_alpha": 5.0}, "adds noise to embeddings"),
        ({"bf16": True}, "half precision"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    trains = trainer(looped_gpt(**TINY)(), tmp_path, **settings)
    with pytest.raises(ValueError, match=f"cannot be recorded: .*{reason}"):
        record_training(trains, tmp_path)


def test_an_unknown_optimizer_is_refused_when_training_begins(tmp_path: Path) -> None:
    model = looped_gpt(**TINY)()
    trains = trainer(model, tmp_path)
    trains.optimizer = torch.optim.RMSprop(model.parameters())
    record_training(trains, tmp_path)
    with pytest.raises(ValueError, match="RMSprop, whose derivative is not known"):
        trains.train()
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        TrainingRun.load(tmp_path)


def test_a_run_survives_its_folder(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    run = TrainingRun(AdamW(no_decay=("bias",)), [0.1, 0.2], [[0, 1], [2]], 1.0, "sum", 1, "micro_batch", [state] * 3)
    run.save(tmp_path, {"weight": torch.ones(2)})
    loaded = TrainingRun.load(tmp_path)
    assert loaded.optimizer == run.optimizer
    for field in ("rates", "batches", "max_grad_norm", "reduction", "micro_batch_size", "reduced_over"):
        assert getattr(loaded, field) == getattr(run, field), field
    assert loaded.random_states is not None
    assert torch.equal(loaded.random_states[2], state)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="no training run, or damaged: version must be a whole number"):
        TrainingRun.load(tmp_path)
