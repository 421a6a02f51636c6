"""`record_training`: all that fixes the weights of a Hugging Face `Trainer`'s run, written while it trains.

Nothing of the training changes: rows are counted as they are read, random states as they are found.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_sdi.data.order import rows_at
from captum_sdi.model_facts import model_device
from captum_sdi.parameter_vector import ParameterVector
from captum_sdi.unrolled.optimizers import SGD, AdamW, Optimizer
from captum_sdi.unrolled.run import TrainingRun
from captum_sdi.unrolled.run_files import check_folder, remove_run

if TYPE_CHECKING:
    from transformers import Trainer


def record_training(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """Let a Trainer record its run: call it before ``trainer.train()``, and load the run when that is done.

    Recorded are the start, the order of rows, the learning rate of every update, clipping, accumulation, decay groups
    and, where the model draws random numbers, their states. `TrainingRun.load(folder)` reads the run;
    ``UnrolledInfluence(start=folder)`` its start.

    Args:
        trainer: A Trainer on one device, with an optimizer of torch (AdamW, fused or not, or SGD), in full precision.
        folder: Where the run is written when training ends.

    Raises:
        ValueError: If the folder is a file, or the run could not be replayed, with the reason: half precision, several
            processes, workers that load data, a streaming train set, label smoothing.
    """
    from transformers import TrainerCallback

    check_folder("folder", folder)
    check_replayable(trainer)
    recorder = Recorder(trainer, folder)

    class Recording(TrainerCallback):
        """Tells the recorder when what happens."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.begin(kwargs["optimizer"], n_updates_before=state.global_step)

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.note_micro_batch()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.note_micro_batch()
            recorder.note_update(kwargs["optimizer"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.end()

    trainer.add_callback(Recording)
    recorder.watch_rows()


class RecordedRows:
    """A train set that remembers which rows were read together.

    Args:
        rows: The train set.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.batches: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Read the rows of one batch, as a DataLoader does."""
        self.batches.append([int(index) for index in indices])
        return rows_at(self._rows, indices)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


class Recorder:
    """What is known of a run while it goes on.

    Args:
        trainer: Who trains.
        folder: Where the run is written at the end.
    """

    def __init__(self, trainer: Any, folder: str | os.PathLike[str]) -> None:
        self._trainer, self._folder = trainer, folder
        self._rows = RecordedRows(trainer.train_dataset)
        self._rates: list[float] = []
        self._n_micro_batches = [0]
        self._random_states: list[Tensor] = []
        self._draws = False
        self._n_passes = 0
        self._hooks: list[Any] = []
        self._unused_state = torch.empty(0)

    def watch_rows(self) -> None:
        """Let the loader that the Trainer will make read through the recorded rows."""
        trainer, make_loader = self._trainer, self._trainer.get_train_dataloader

        def recorded_loader() -> Any:
            rows = trainer.train_dataset
            trainer.train_dataset = self._rows
            try:
                return make_loader()
            finally:
                trainer.train_dataset = rows

        trainer.get_train_dataloader = recorded_loader

    def begin(self, optimizer: Any, n_updates_before: int) -> None:
        """Note the start.

        Raises:
            ValueError: If training goes on from a checkpoint.
        """
        if n_updates_before > 0:
            raise ValueError(
                f"Training goes on from update {n_updates_before}, and what the optimizer remembers is not in a "
                "recorded run: record it from its beginning."
            )
        remove_run(self._folder)
        model = self._trainer.model
        self._optimizer = recorded_optimizer(optimizer, model)
        self._start = {name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters()}
        self._hooks = [
            model.register_forward_pre_hook(self._before_pass),
            model.register_forward_hook(self._after_pass),
        ]

    def note_micro_batch(self) -> None:
        """Note that a micro-batch ran.

        Raises:
            ValueError: If it was none or several passes through the model.
        """
        if self._n_passes != 1:
            raise ValueError(
                f"The model ran {self._n_passes} times for one batch: a loss that is no function of one pass cannot be "
                "replayed."
            )
        self._n_passes = 0
        self._n_micro_batches[-1] += 1

    def note_update(self, optimizer: Any) -> None:
        """Note the learning rate that the coming step will use, and how many passes it is made of.

        Raises:
            ValueError: If parameters have different learning rates.
        """
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) > 1:
            raise ValueError(f"The parameters have different learning rates, {sorted(rates)}: this cannot be replayed.")
        self._rates.append(rates.pop())
        self._n_micro_batches.append(0)

    def end(self) -> None:
        """Write the run."""
        for hook in self._hooks:
            hook.remove()
        arguments = self._trainer.args
        batches, micro_batches = [], iter(self._rows.batches)
        for count in self._n_micro_batches[:-1]:
            chunks = [next(micro_batches) for _ in range(count)]
            batches.append([position for chunk in chunks for position in chunk])
        counts_tokens = self._trainer.model_accepts_loss_kwargs or self._trainer.compute_loss_func is not None
        run = TrainingRun(
            optimizer=self._optimizer,
            rates=self._rates,
            batches=batches,
            max_grad_norm=arguments.max_grad_norm or None,
            reduction="tokens",
            micro_batch_size=arguments.train_batch_size,
            reduced_over="update" if counts_tokens else "micro_batch",
            random_states=self._random_states if self._draws else None,
        )
        run.save(self._folder, self._start)

    def _before_pass(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self._state = random_state(model_device(model))

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if not model.training:
            return
        self._n_passes += 1
        has_drawn = not torch.equal(self._state, random_state(model_device(model)))
        self._draws |= has_drawn
        if has_drawn or len(self._unused_state) == 0:
            self._unused_state = self._state  # where nothing is drawn any state will do, and one takes less memory
        self._random_states.append(self._unused_state)


def random_state(device: torch.device) -> Tensor:
    """Return torch's random state on the device that dropout draws on."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def recorded_optimizer(optimizer: Any, model: nn.Module) -> Optimizer:
    """Return what a Trainer's optimizer does, as one of ours.

    Raises:
        ValueError: If it is no AdamW or SGD of torch, or its groups differ in more than weight decay.
    """
    torch_optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    kind, defaults = type(torch_optimizer), torch_optimizer.defaults
    has_unknown_settings = any(defaults.get(setting) for setting in ("amsgrad", "maximize", "dampening"))
    if kind not in (torch.optim.AdamW, torch.optim.SGD) or has_unknown_settings:
        raise ValueError(
            f"The optimizer is {kind.__module__}.{kind.__name__}, whose derivative is not known: train with "
            "optim='adamw_torch', 'adamw_torch_fused' or 'sgd', without amsgrad, maximize and dampening."
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay_of: dict[str, float] = {}
    for group in torch_optimizer.param_groups:
        for parameter in group["params"]:
            decay_of[names[id(parameter)]] = float(group["weight_decay"])
    decays = sorted({decay for decay in decay_of.values() if decay > 0})
    settings = set()
    for group in torch_optimizer.param_groups:
        settings.add((group.get("betas"), group.get("eps"), group.get("momentum")))
    if len(decays) > 1 or len(settings) > 1:
        raise ValueError("The optimizer's groups differ in more than whether they have weight decay.")
    trainable = list(ParameterVector.of(model).shapes)
    missing = [name for name in trainable if name not in decay_of]
    if missing:
        raise ValueError(f"The optimizer does not train these trainable parameters: {missing[:5]}. Freeze them.")
    weight_decay = decays[0] if decays else 0.0
    no_decay = tuple(name for name in trainable if decay_of[name] == 0) if decays else ()
    group = torch_optimizer.param_groups[0]
    if isinstance(torch_optimizer, torch.optim.SGD):
        return SGD(group["momentum"], group["nesterov"], weight_decay, no_decay)
    return AdamW(tuple(group["betas"]), group["eps"], weight_decay, no_decay)


def check_replayable(trainer: Any) -> None:
    """Refuse a Trainer whose run could not be replayed.

    Raises:
        ValueError: If it could not, with the reason.
    """
    arguments = trainer.args
    ParameterVector.of(trainer.model)
    reasons = {
        "it trains in half precision (bf16 or fp16), which rounds second derivatives away": (
            arguments.bf16 or arguments.fp16
        ),
        "it trains in several processes or on several devices": arguments.world_size > 1 or arguments.n_gpu > 1,
        "workers load its data (dataloader_num_workers), out of sight": arguments.dataloader_num_workers > 0,
        "its train set has no length, and so no positions": not hasattr(trainer.train_dataset, "__len__"),
        "it smooths labels (label_smoothing_factor)": arguments.label_smoothing_factor != 0,
        "it adds noise to embeddings (neftune_noise_alpha)": arguments.neftune_noise_alpha is not None,
        "its batch size is found while it trains (auto_find_batch_size)": arguments.auto_find_batch_size,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"This Trainer's run cannot be recorded: {reason}.")
