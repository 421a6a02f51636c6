"""The demo: train a looped GPT on parity, then ask which training strings shaped its answers, and at which loop step.

Everything goes through the public interface, as a user's own script would.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from captum_sdi import plotting
from captum_sdi.checkpoints import load_checkpoint
from captum_sdi.influence import SDIInfluence
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.exact import Exact
from captum_sdi.sketch.tensor_sketch import TensorSketch
from captum_sdi.tasks import TaskDataset, parity

N_TRAIN, N_HELD_OUT, N_TESTS = 400, 110, 6  # there are 510 strings of 1 to 8 bits
N_CHECKPOINTS = 5


def run(out: Path, seed: int = 0, steps: int = 500) -> None:
    """Trains, attributes, draws and reports.

    Args:
        out: The folder to write to; it is made.
        seed: Of the weights, the data and the sketch.
        steps: Training steps.

    Raises:
        ValueError: ``steps`` leaves no room for the checkpoints.
    """
    if steps < 2 * N_CHECKPOINTS:
        raise ValueError(f"--steps must be at least {2 * N_CHECKPOINTS}, got {steps}.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    train, held_out = parity(N_TRAIN + N_HELD_OUT, running=True, seed=seed).split(held_out=N_HELD_OUT)
    _say(f"1. Training a looped GPT on the parity of {len(train)} bit strings")
    model, losses, checkpoints = _trained(train, out / "checkpoints", seed, steps)
    accuracies = {name: accuracy(model, data) for name, data in (("training", train), ("held-out", held_out))}
    for name, value in accuracies.items():
        _say(f"   {name} accuracy {value:.1%}")

    _say(f"2. Influence of {len(train)} on {N_TESTS} held-out strings, at {len(checkpoints)} checkpoints")
    tests = torch.utils.data.Subset(held_out, range(N_TESTS))
    sdi = SDIInfluence(model, train, checkpoints, batch_size=50, sketch=TensorSketch(dim=2048, seed=seed))
    result = sdi.step_influence(tests, show_progress=True)
    itself = sdi.step_self_influence(show_progress=True)
    matrix = sdi.step_matrix(torch.utils.data.Subset(held_out, [0]), indices=result.influence_scores[0].topk(3).indices)
    _check_conservation(model, train, tests, checkpoints, result)
    result.save(out / "scores.safetensors")
    itself.save(out / "self_influence.safetensors")

    texts = [train.text(i) for i in range(len(train))], [held_out.text(i) for i in range(N_TESTS)]
    table = _table(result, *texts)
    _say("\n".join(("3. What shaped the answers", "", *table, "")))
    pictures = _pictures(out, result, itself, matrix, *texts)
    _report(out / "report.md", losses, accuracies, table, pictures)
    _say(f"4. Scores, pictures and report.md are in {out}/")


@torch.no_grad()
def accuracy(model: LoopedGPTForCausalLM, data: TaskDataset) -> float:
    """The share of strings whose last target, the answer, is the model's most likely token.

    Args:
        model: The model.
        data: Rows with labels.

    Returns:
        Between 0 and 1.
    """
    model.eval()
    right = []
    for batch in DataLoader(data, batch_size=100):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        last = labels.shape[1] - 1 - (labels != -100).flip(1).int().argmax(1)  # (n,) position of the answer
        rows = torch.arange(len(labels), device=labels.device)
        predicted = model(**batch).logits[rows, last - 1].argmax(-1)
        right.append(predicted == labels[rows, last])
    return torch.cat(right).float().mean().item()


def _trained(
    train: TaskDataset, folder: Path, seed: int, steps: int
) -> tuple[LoopedGPTForCausalLM, list[tuple[int, float]], list[str]]:
    """The model, its logged losses, and the checkpoints its Trainer saved."""
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(seed)
    config = LoopedGPTConfig(
        vocab_size=train.vocab_size,
        n_positions=train.length,
        n_embd=64,
        n_head=4,
        n_prelude=1,
        n_core=1,
        n_coda=1,
        n_loops=8,
        bias=True,
        initializer_range=0.1,  # from 0.02 the loop does not take off
        injection="concat",
        pad_token_id=train.pad_token_id,
    )
    every = steps // N_CHECKPOINTS
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 16,
        logging_steps=every,  # logs the learning rate of every checkpoint's own step
        save_steps=every,
        save_only_model=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    model = LoopedGPTForCausalLM(config)
    trainer = Trainer(model=model, args=arguments, train_dataset=train)
    trainer.train()
    losses = [(int(entry["step"]), entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    # The last checkpoint is saved when the learning rate has decayed to zero: it would contribute nothing.
    checkpoints = [str(folder / f"checkpoint-{every * i}") for i in range(1, N_CHECKPOINTS)]
    return model, losses, checkpoints


def _check_conservation(
    model: LoopedGPTForCausalLM, train: TaskDataset, tests: Dataset, checkpoints: list[str], result: StepInfluence
) -> None:
    """The steps sum to TracIn: as sketched, and exactly on a few strings against plain autograd."""
    summed = result.trajectories.sum(-1) + result.prelude + result.coda
    worst = (summed - result.influence_scores).abs().max() / result.influence_scores.abs().max()
    assert worst < 1e-4, f"the steps do not sum to the total: {worst}"
    few = torch.utils.data.Subset(train, range(8))
    model = copy.deepcopy(model)
    load_checkpoint(model, checkpoints[0])  # a trained model's gradients are so small that rounding would show
    exact = SDIInfluence(model, few, batch_size=8, sketch=Exact()).step_influence(tests)
    core = list(model.core.parameters())

    def gradient(row: dict[str, Tensor]) -> Tensor:
        row = {key: value.unsqueeze(0).to(model.device) for key, value in row.items()}
        loss = model(**row).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, core)])

    tracin = torch.stack([gradient(tests[0]) @ gradient(few[i]) for i in range(8)])
    worst = (exact.trajectories[0].sum(-1) - tracin).abs().max() / tracin.abs().max()
    assert worst < 1e-4, f"the steps do not sum to TracIn from plain autograd: {worst}"
    _say(f"   conservation: the steps sum to TracIn from plain autograd, relative error {worst:.0e}")


def _table(result: StepInfluence, train_texts: Sequence[str], test_texts: Sequence[str]) -> list[str]:
    """A Markdown table: test string, its top two proponents and opponents, total, standard error, strongest step."""
    lines = ["| test string | role | training string | total | ± | strongest step |", "|---|---|---|---|---|---|"]
    for q, text in enumerate(test_texts):
        order = result.influence_scores[q].argsort(descending=True).tolist()
        for role, n in (*(("proponent", n) for n in order[:2]), *(("opponent", n) for n in order[:-3:-1])):
            total, error = result.influence_scores[q, n].item(), result.score_errors[q, n].item()
            step = 1 + int(result.trajectories[q, n].abs().argmax())
            lines.append(f"| {text} | {role} | {train_texts[n]} | {total:+.2e} | {error:.0e} | {step} |")
    return lines


def _pictures(
    out: Path,
    result: StepInfluence,
    itself: StepInfluence,
    matrix: Tensor,
    train_texts: Sequence[str],
    test_texts: Sequence[str],
) -> dict[str, str]:
    """Draws every kind of plot once; file names with what they show."""
    asked = test_texts[0]
    best = int(result.influence_scores[0].argmax())
    drawings = {
        "trajectories.png": (
            plotting.plot_trajectories(result, 0, texts=train_texts, title=f"What shaped the answer to {asked}"),
            f"The strongest proponents and opponents of `{asked}`, by loop step, with two standard errors.",
        ),
        "heatmap.png": (
            plotting.plot_heatmap(result, 0, k=12, texts=train_texts, title=f"Acting on {asked}"),
            "The strongest training strings, sorted by total influence: when does each of them act?",
        ),
        "step_matrix.png": (
            plotting.plot_step_matrix(matrix, (0, 0), title=f"{train_texts[best]} on {asked}"),
            f"The best proponent of `{asked}`: which step of its own computation acts on which step of the answer's.",
        ),
        "totals.png": (
            plotting.plot_totals(result, texts=train_texts, test_texts=[text.split("=")[0] for text in test_texts]),
            "Totals beside trajectories: equal totals can have different stories.",
        ),
        "step_share.png": (
            plotting.plot_step_share(result),
            "At which loop steps influence acts, over all held-out strings.",
        ),
        "self_influence.png": (
            plotting.plot_self_influence(itself, texts=train_texts),
            "Influence of training strings on themselves: the highest are the most memorised.",
        ),
    }
    for name, (axes, _) in drawings.items():
        axes.figure.savefig(out / name, dpi=200)  # type: ignore[union-attr]
    return {name: caption for name, (_, caption) in drawings.items()}


def _report(
    path: Path,
    losses: list[tuple[int, float]],
    accuracies: dict[str, float],
    table: Sequence[str],
    pictures: dict[str, str],
) -> None:
    lines = ["# Which training strings shaped the answers, and at which loop step?", ""]
    lines += ["A looped GPT (width 64, one block applied 8 times between a prelude and a coda) trained on parity.", ""]
    lines += ["| step | training loss |", "|---|---|", *(f"| {step} | {loss:.4f} |" for step, loss in losses), ""]
    lines += [f"{name} accuracy: {value:.1%}  " for name, value in accuracies.items()]
    lines += ["", "Influence is positive when training on a string lowers the loss of the test string.", "", *table, ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _say(text: str) -> None:
    tqdm.write(text)  # does not tear a progress bar apart
