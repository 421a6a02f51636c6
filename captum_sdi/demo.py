"""The demo: train a looped GPT on parity, ask what shaped its answers at which loop step.

Everything goes through the public interface, as a user's own script would.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from captum_sdi import plotting
from captum_sdi.checkpoints import load_checkpoint
from captum_sdi.influence import SDIInfluence
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.report import write_page
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch.exact import Exact
from captum_sdi.sketch.tensor_sketch import TensorSketch
from captum_sdi.tasks import TaskDataset, parity

N_TRAIN, N_HELD_OUT, N_TESTS = 400, 110, 6  # there are 510 strings of 1 to 8 bits
N_CHECKPOINTS = 5


def run(out: Path, seed: int = 0, steps: int = 500) -> None:
    """Train, attribute, draw and report, into a folder that is made.

    `seed` is that of the weights, the data and the sketch.

    Raises:
        ValueError: If `steps` leaves no room for the checkpoints.
    """
    if steps < 2 * N_CHECKPOINTS:
        raise ValueError(f"--steps must be at least {2 * N_CHECKPOINTS}, got {steps}.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    strings = parity(N_TRAIN + N_HELD_OUT, running=True, seed=seed)
    train, held_out = strings.split(held_out=N_HELD_OUT)
    say(f"1. Training a looped GPT on the parity of {len(train)} bit strings")
    trained = train_model(train, out / "checkpoints", seed, steps)
    model = trained.model
    accuracies = {"training": accuracy(model, train), "held-out": accuracy(model, held_out)}
    for name, share in accuracies.items():
        say(f"   {name} accuracy {share:.1%}")

    n_checkpoints = len(trained.checkpoints)
    say(f"2. Influence of {len(train)} on {N_TESTS} held-out strings, at {n_checkpoints} checkpoints")
    tests = Subset(held_out, range(N_TESTS))
    sketch = TensorSketch(dim=2048, seed=seed)
    sdi = SDIInfluence(model, train, trained.checkpoints, batch_size=50, sketch=sketch)
    result = sdi.step_influence(tests, show_progress=True)
    self_influence = sdi.step_self_influence(show_progress=True)
    strongest = result.influence_scores[0].topk(3).indices
    matrix = sdi.step_matrix(Subset(held_out, [0]), indices=strongest)
    split = sdi.influence_map(Subset(held_out, range(2)), ends(result, 2), ("layer", "step", "token"), tokenizer=train)
    check_sum_of_steps(result)
    check_against_autograd(model, train, tests, trained.checkpoints[0])
    result.save(out / "scores.safetensors")
    self_influence.save(out / "self_influence.safetensors")

    train_texts = [train.text(index) for index in range(len(train))]
    test_texts = [held_out.text(index) for index in range(N_TESTS)]
    table = influence_table(result, train_texts, test_texts)
    say("\n".join(["3. What shaped the answers", "", *table, ""]))
    captions = draw_pictures(out, result, self_influence, matrix, train_texts, test_texts)
    write_page(
        result,
        out / "page.html",
        texts=train_texts,
        test_texts=test_texts,
        map=split,
        step_matrix=matrix,
        step_matrix_indices=strongest.tolist(),
        self_influence=self_influence,
        title="Which training strings shaped the answers, and at which loop step?",
    )
    report = markdown_report(trained.losses, accuracies, table, captions)
    (out / "report.md").write_text(report, encoding="utf-8")
    say(f"4. Scores, pictures and report.md are in {out}/; open {out}/page.html in a browser")


@dataclass
class Trained:
    """A trained model, the losses it logged by step, and the checkpoints that its Trainer saved."""

    model: LoopedGPTForCausalLM
    losses: dict[int, float]
    checkpoints: list[str]


def train_model(
    train: TaskDataset,
    folder: Path,
    seed: int,
    steps: int,
) -> Trained:
    """Train a small looped GPT with the Trainer of transformers."""
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
    interval = steps // N_CHECKPOINTS
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 16,
        logging_steps=interval,  # logs the learning rate of every checkpoint's own step
        save_steps=interval,
        save_only_model=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    model = LoopedGPTForCausalLM(config)
    trainer = Trainer(model=model, args=arguments, train_dataset=train)
    trainer.train()
    losses = {}
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses[int(entry["step"])] = entry["loss"]
    # The last checkpoint is saved when the learning rate has decayed to zero: it would contribute nothing.
    saved_steps = range(interval, N_CHECKPOINTS * interval, interval)
    checkpoints = [str(folder / f"checkpoint-{step}") for step in saved_steps]
    return Trained(model, losses, checkpoints)


@torch.no_grad()
def accuracy(model: LoopedGPTForCausalLM, data: TaskDataset) -> float:
    """Return the share of strings whose last target, the answer, is the likeliest token."""
    model.eval()
    is_right = []
    for batch in DataLoader(data, batch_size=100):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        n_examples, length = labels.shape
        is_target = (labels != -100).int()
        answers = length - 1 - is_target.flip(1).argmax(1)  # (n,) the last targets' positions
        rows = torch.arange(n_examples, device=labels.device)
        logits = model(**batch).logits
        predicted = logits[rows, answers - 1].argmax(-1)
        is_right.append(predicted == labels[rows, answers])
    return torch.cat(is_right).float().mean().item()


def check_sum_of_steps(result: StepInfluence) -> None:
    """Check that the steps sum to the total, as sketched."""
    summed = result.trajectories.sum(-1) + result.prelude + result.coda
    error = relative_error(summed, result.influence_scores)
    assert error < 1e-4, f"the steps do not sum to the total: {error}"


def check_against_autograd(
    model: LoopedGPTForCausalLM,
    train: TaskDataset,
    tests: Dataset,
    checkpoint: str,
) -> None:
    """Check that the steps sum to TracIn: exactly, on a few strings, against plain autograd."""
    sample = Subset(train, range(8))
    model = copy.deepcopy(model)
    load_checkpoint(model, checkpoint)  # a trained model's gradients are so small that rounding would show
    sdi = SDIInfluence(model, sample, batch_size=8, sketch=Exact())
    exact = sdi.step_influence(tests)
    test_gradient = core_gradient(model, tests[0])
    train_gradients = [core_gradient(model, sample[index]) for index in range(8)]
    tracin = torch.stack([test_gradient @ train_gradient for train_gradient in train_gradients])
    error = relative_error(exact.trajectories[0].sum(-1), tracin)
    assert error < 1e-4, f"the steps do not sum to TracIn from plain autograd: {error}"
    say(f"   conservation: the steps sum to TracIn from plain autograd, relative error {error:.0e}")


def core_gradient(model: LoopedGPTForCausalLM, row: dict[str, Tensor]) -> Tensor:
    """Return the gradient of one row's loss with respect to the looped block, flat."""
    batch = {name: tensor.unsqueeze(0).to(model.device) for name, tensor in row.items()}
    loss = model(**batch).loss
    parameters = list(model.core.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def ends(result: StepInfluence, n_tests: int) -> Tensor:
    """Return the five strongest proponents and the five strongest opponents of the first test strings."""
    order = result.influence_scores[:n_tests].argsort(descending=True)
    return torch.cat([order[:, :5], order[:, -5:]], dim=1)


def relative_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Return the largest error, relative to the largest true entry."""
    largest_error = (estimate - truth).abs().max()
    return largest_error / truth.abs().max()


def influence_table(
    result: StepInfluence,
    train_texts: Sequence[str],
    test_texts: Sequence[str],
) -> list[str]:
    """Return a Markdown table, by line: each test string's top two proponents and opponents."""
    lines = [
        "| test string | role | training string | total | ± | strongest step |",
        "|---|---|---|---|---|---|",
    ]
    for test, text in enumerate(test_texts):
        totals = result.influence_scores[test]
        errors = result.score_errors[test]
        strongest_steps = 1 + result.trajectories[test].abs().argmax(-1)
        order = totals.argsort(descending=True).tolist()
        roles = {"proponent": order[:2], "opponent": order[:-3:-1]}
        for role, train_indices in roles.items():
            for train in train_indices:
                numbers = f"{totals[train]:+.2e} | {errors[train]:.0e} | {strongest_steps[train]}"
                lines.append(f"| {text} | {role} | {train_texts[train]} | {numbers} |")
    return lines


def draw_pictures(
    out: Path,
    result: StepInfluence,
    self_influence: StepInfluence,
    matrix: Tensor,
    train_texts: Sequence[str],
    test_texts: Sequence[str],
) -> dict[str, str]:
    """Draw every kind of plot once; return the caption of each file."""
    question = test_texts[0]
    best = int(result.influence_scores[0].argmax())
    proponent = train_texts[best]
    prompts = [text.split("=")[0] for text in test_texts]
    drawings = {
        "trajectories.png": (
            plotting.plot_trajectories(result, 0, texts=train_texts, title=f"What shaped the answer to {question}"),
            f"The strongest proponents and opponents of `{question}`, by loop step, with two standard errors.",
        ),
        "heatmap.png": (
            plotting.plot_heatmap(
                result,
                0,
                k=12,
                texts=train_texts,
                title=f"Acting on {question}",
            ),
            "The strongest training strings, sorted by total influence: when does each of them act?",
        ),
        "step_matrix.png": (
            plotting.plot_step_matrix(matrix, (0, 0), title=f"{proponent} on {question}"),
            f"The best proponent of `{question}`: which step of its own computation acts on which step of the "
            "answer's.",
        ),
        "totals.png": (
            plotting.plot_totals(result, texts=train_texts, test_texts=prompts),
            "Totals beside trajectories: equal totals can have different stories.",
        ),
        "step_share.png": (
            plotting.plot_step_share(result),
            "At which loop steps influence acts, over all held-out strings.",
        ),
        "self_influence.png": (
            plotting.plot_self_influence(self_influence, texts=train_texts),
            "Influence of training strings on themselves: the highest are the most memorised.",
        ),
    }
    captions = {}
    for name, (axes, caption) in drawings.items():
        axes.figure.savefig(out / name, dpi=200)  # type: ignore[union-attr]
        captions[name] = caption
    return captions


def markdown_report(
    losses: dict[int, float],
    accuracies: dict[str, float],
    table: Sequence[str],
    captions: dict[str, str],
) -> str:
    """Return the report in Markdown."""
    lines = [
        "# Which training strings shaped the answers, and at which loop step?",
        "",
        "[page.html](page.html) shows all of it, to click through.",
        "",
        "A looped GPT (width 64, one block applied 8 times between a prelude and a coda) trained on parity.",
        "",
        "| step | training loss |",
        "|---|---|",
    ]
    for step, loss in losses.items():
        lines.append(f"| {step} | {loss:.4f} |")
    lines.append("")
    for name, share in accuracies.items():
        lines.append(f"{name} accuracy: {share:.1%}  ")
    lines += ["", "Influence is positive when training on a string lowers the loss of the test string.", "", *table, ""]
    for name, caption in captions.items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    return "\n".join(lines)


def say(text: str) -> None:
    """Print above the progress bars, without tearing them apart."""
    tqdm.write(text)
