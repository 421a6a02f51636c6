"""The demo: train a looped GPT on single facts, ask it chains of five, see which document acts at which loop step.

Everything goes through the public interface, as a user's own script would.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm

from captum_sdi import plotting
from captum_sdi.checkpoints import load_checkpoint
from captum_sdi.influence import SDIInfluence
from captum_sdi.loop import find_loop
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.report import write_page
from captum_sdi.scores.influence_map import InfluenceMap
from captum_sdi.scores.result import StepInfluence
from captum_sdi.sketch import Exact, Sketch, TensorSketch
from captum_sdi.tasks import Facts
from captum_sdi.tasks.facts import PEOPLE, WORDS, Sentences

HOPS = 5
N_CHECKPOINTS = 5
N_SHOWN = 3
"""Questions in the report's table."""
TITLE = "Which document supplied which hop?"


def run(out: Path, seed: int = 0, steps: int = 60) -> None:
    """Train, ask, draw and report, into a folder that is made.

    `seed` is that of the facts, the weights and the sketch.

    Raises:
        ValueError: If `steps` leaves no room for the checkpoints.
    """
    if steps < 2 * N_CHECKPOINTS:
        raise ValueError(f"--steps must be at least {2 * N_CHECKPOINTS}, got {steps}.")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is so small that threads would mostly wait for each other
    facts = Facts.draw(seed)
    documents, questions = facts.documents(), facts.questions(HOPS)
    model = new_model(seed)
    asked = Asked(model, documents, questions, facts, seed)
    untrained = asked.moment()
    say(f'1. Training a looped GPT on {len(documents)} documents, such as "{documents.texts[0]}"')
    checkpoints, losses = train_model(model, documents, out / "checkpoints", seed, steps)

    say(f'2. Asking {len(questions)} chains that it never saw, such as "{questions.texts[0]}"')
    moments = []
    for checkpoint in checkpoints:
        load_checkpoint(model, checkpoint)
        moments.append(asked.moment())
    summed = asked.influence(checkpoints)
    result = asked.influence(None)
    check_against_autograd(asked, result)
    result.save(out / "scores.safetensors")

    headline = in_two_sentences(asked, moments[-1], untrained)
    table = checkpoint_table(losses, moments, summed)
    say("\n".join(["3. What came out", "", headline, "", *table, ""]))
    captions = draw_pictures(out, asked, result, moments[-1], untrained)
    write_page(
        result,
        out / "page.html",
        texts=documents.texts,
        test_texts=questions.texts,
        map=asked.maps_of_two_questions(result),
        title=TITLE,
    )
    report = markdown_report([headline, "", *table, "", *path_table(asked, result)], captions, next_commands(out, seed))
    (out / "report.md").write_text(report, encoding="utf-8")
    say(f"4. Scores, pictures and report.md are in {out}/; open {out}/page.html in a browser")
    say("\n".join(next_commands(out, seed)))


def new_model(seed: int) -> LoopedGPTForCausalLM:
    """Make a small looped GPT whose loop hands on its answers, and which runs one step unless it is told otherwise."""
    from transformers import set_seed

    set_seed(seed)
    config = LoopedGPTConfig(
        vocab_size=len(WORDS),
        n_positions=3,
        n_embd=64,
        n_head=4,
        n_prelude=0,
        n_core=1,
        n_coda=0,
        n_loops=1,
        bias=True,
        initializer_range=0.05,
        is_causal=False,  # the answer is written in the place of the person
        injection="none",
        feedback="tokens",
    )
    return LoopedGPTForCausalLM(config)


def train_model(
    model: LoopedGPTForCausalLM,
    documents: Sentences,
    folder: Path,
    seed: int,
    steps: int,
) -> tuple[list[str], list[float]]:
    """Train on single facts with the Trainer of transformers; return its checkpoints and the losses it logged."""
    from transformers import Trainer, TrainingArguments

    interval = steps // N_CHECKPOINTS
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=N_CHECKPOINTS * interval,
        per_device_train_batch_size=len(documents),
        learning_rate=3e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant_with_warmup",  # a rate that decays would leave the last checkpoint without a say
        warmup_steps=steps // 10,
        logging_steps=interval,  # logs the learning rate of every checkpoint's own step
        save_steps=interval,
        save_only_model=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=documents)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    saved_steps = range(interval, N_CHECKPOINTS * interval + 1, interval)
    return [str(folder / f"checkpoint-{step}") for step in saved_steps], losses


@dataclass
class Moment:
    """The model at one time: what it answers, and whose documents act."""

    accuracies: list[float]
    """At 1 to HOPS hops."""
    path: Tensor
    """In which share of questions the document of hop j is the strongest at step t, (j, t)."""
    strangers: Tensor
    """The same, looked up for the chains of other questions."""


@dataclass
class Asked:
    """A model with its documents and questions."""

    model: LoopedGPTForCausalLM
    documents: Sentences
    questions: Sentences
    facts: Facts
    seed: int

    @property
    def chains(self) -> Tensor:
        """The documents that each answer rests on, in order: (q, HOPS)."""
        return self.facts.chains(HOPS)

    def attribution(self, checkpoints: Sequence[str] | None, sketch: Sketch | None = None) -> SDIInfluence:
        """Attribute chains to documents: one loop step is trained, as many as there are hops are asked."""
        deep = {"n_loops": HOPS}
        return SDIInfluence(
            self.model,
            self.documents,
            checkpoints,
            batch_size=len(self.documents),
            loop=find_loop(self.model, self.questions, forward_kwargs=deep),
            sketch=sketch or TensorSketch(dim=2048, seed=self.seed),
            forward_kwargs={"n_loops": 1},
            test_forward_kwargs=deep,
        )

    def influence(self, checkpoints: Sequence[str] | None) -> StepInfluence:
        """Return the influence of every document on every question by loop step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\d+% of these scores come from")  # the report says so
            return self.attribution(checkpoints).step_influence(self.questions)

    def moment(self) -> Moment:
        """Ask the model as it is, and look for the path."""
        strongest = self.influence(None).trajectories.argmax(1)  # (q, t)
        other_chains = self.chains.roll(len(PEOPLE) // 2, dims=0)
        accuracies = [self.accuracy(hops) for hops in range(1, HOPS + 1)]
        return Moment(accuracies, shares_on(self.chains, strongest), shares_on(other_chains, strongest))

    @torch.no_grad()
    def accuracy(self, hops: int) -> float:
        """Return the share of questions of so many hops that are answered."""
        questions = self.facts.questions(hops)
        logits = self.model.eval()(questions.input_ids.to(self.model.device), n_loops=hops).logits
        answers = logits[:, 0].argmax(-1).cpu()
        return float((answers == questions.labels[:, 0]).float().mean())

    def maps_of_two_questions(self, result: StepInfluence) -> InfluenceMap:
        """Return the influence of the strongest documents on two questions by layer, step and token."""
        order = result.influence_scores[:2].argsort(descending=True)
        ends = torch.cat([order[:, :5], order[:, -5:]], dim=1)
        axes = ("layer", "step", "token")
        two_questions = Subset(self.questions, range(2))
        return self.attribution(None).influence_map(two_questions, ends, axes, tokenizer=self.documents)


def shares_on(chains: Tensor, strongest: Tensor) -> Tensor:
    """Return in which share of questions the document of hop j is the strongest at step t, (j, t)."""
    is_strongest = chains.unsqueeze(2) == strongest.unsqueeze(1)
    return is_strongest.float().mean(0)


def on_path(path: Tensor) -> float:
    """Return the mean of the diagonal without the last step, whose document has the label of the answer itself."""
    return float(path.diagonal()[:-1].mean())


def check_against_autograd(asked: Asked, result: StepInfluence) -> None:
    """Check that the steps sum to TracIn: as sketched, and exactly, on one question, against plain autograd."""
    summed = result.trajectories.sum(-1) + result.prelude + result.coda
    assert relative_error(summed, result.influence_scores) < 1e-4, "the steps do not sum to the total"
    exact = asked.attribution(None, sketch=Exact()).step_influence(Subset(asked.questions, [0]))
    documents = [asked.documents[index] for index in range(len(asked.documents))]
    test_gradient = gradient(asked.model, asked.questions[0], HOPS)
    train_gradients = [gradient(asked.model, document, 1) for document in documents]
    tracin = torch.stack([test_gradient @ train_gradient for train_gradient in train_gradients])
    error = relative_error(exact.trajectories[0].sum(-1), tracin)
    assert error < 1e-3, f"the steps do not sum to TracIn from plain autograd: {error}"
    say(f"   conservation: the steps sum to TracIn from plain autograd, relative error {error:.0e}")


def gradient(model: LoopedGPTForCausalLM, row: dict[str, Tensor], n_loops: int) -> Tensor:
    """Return the gradient of one row's loss, flat: where tokens are handed on, the whole model loops."""
    batch = {name: tensor.unsqueeze(0).to(model.device) for name, tensor in row.items()}
    loss = model(**batch, n_loops=n_loops).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([each.flatten() for each in gradients])


def relative_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Return the largest error, relative to the largest true entry."""
    largest_error = (estimate - truth).abs().max()
    return largest_error / truth.abs().max()


# --- what is told ---


def in_two_sentences(asked: Asked, moment: Moment, untrained: Moment) -> str:
    """Return what came out: the answers, and the path with its controls."""
    n_documents = len(asked.documents)
    return (
        f"Trained on {n_documents} single facts, the model answers {moment.accuracies[-1]:.0%} of "
        f"{len(asked.questions)} chains of {HOPS} that it never saw. At loop steps 1 to {HOPS - 1} the strongest "
        f"of all {n_documents} documents is the fact of that very hop in {on_path(moment.path):.0%} of the questions "
        f"(by chance {1 / n_documents:.0%}; another question's chain {on_path(moment.strangers):.0%}; untrained "
        f"{on_path(untrained.path):.0%})."
    )


def checkpoint_table(losses: Sequence[float], moments: Sequence[Moment], summed: StepInfluence) -> list[str]:
    """Return a Markdown table, by line: what each checkpoint can do, and how much of a sum over all is its own."""
    assert summed.checkpoints is not None
    shares = summed.checkpoints.shares.tolist()
    lines = [
        f"| checkpoint | training loss | right at 1 hop | at {HOPS} hops | on the path | of a sum over all |",
        "|---|---|---|---|---|---|",
    ]
    for name, loss, moment, share in zip(summed.checkpoints.names, losses, moments, shares, strict=True):
        right = f"{moment.accuracies[0]:.0%} | {moment.accuracies[-1]:.0%}"
        lines.append(f"| {Path(name).name} | {loss:.4f} | {right} | {on_path(moment.path):.0%} | {share:.1%} |")
    loudest = max(range(len(shares)), key=shares.__getitem__)
    lines += [
        "",
        f"A sum over checkpoints would be {shares[loudest]:.0%} about one that answers "
        f"{moments[loudest].accuracies[-1]:.0%} of the chains. All else is about the last checkpoint.",
    ]
    return lines


def path_table(asked: Asked, result: StepInfluence) -> list[str]:
    """Return a Markdown table, by line: of some questions, the strongest document at each step."""
    strongest = result.trajectories.argmax(1).tolist()
    chains = asked.chains.tolist()
    lines = ["| question | step | strongest document | the fact of that hop? |", "|---|---|---|---|"]
    for question in range(N_SHOWN):
        text = asked.questions.texts[question]
        for step, document in enumerate(strongest[question]):
            verdict = "yes" if document == chains[question][step] else "no"
            lines.append(f"| {text} | {step + 1} | {asked.documents.texts[document]} | {verdict} |")
    return lines


def draw_pictures(
    out: Path,
    asked: Asked,
    result: StepInfluence,
    moment: Moment,
    untrained: Moment,
) -> dict[str, str]:
    """Draw what came out; return the caption of each file."""
    texts = asked.documents.texts
    question = asked.questions.texts[0]
    paths = {"trained": moment.path, "another question's chain": moment.strangers, "untrained": untrained.path}
    strongest = f"is the strongest of all {len(texts)} documents"
    drawings = {
        "path.png": (
            plotting.plot_path(paths, title=f"Share of questions in which the fact of this hop {strongest}", width=7),
            f"In which share of questions the fact of a hop {strongest}, by loop step. The last step's has the label "
            f"of the answer itself, and is the strongest in {untrained.path[-1, -1]:.0%} untrained, too: no evidence.",
        ),
        "trajectories.png": (
            plotting.plot_trajectories(result, 0, texts=texts, title=f"What shaped the answer to {question}", width=7),
            f"The strongest proponents and opponents of `{question}`, by total: the last step is nearly all of it.",
        ),
        "step_share.png": (
            plotting.plot_step_share(result),
            "How much influence acts at each step, beside the norm of the question's own gradient: where the two agree "
            "it says nothing of the documents. Compare documents at one step, not one document's steps.",
        ),
    }
    captions = {}
    for name, (axes, caption) in drawings.items():
        axes.figure.savefig(out / name, dpi=200)  # type: ignore[union-attr]
        captions[name] = caption
    return captions


def markdown_report(findings: Sequence[str], captions: dict[str, str], further: Sequence[str]) -> str:
    """Return the report in Markdown."""
    lines = [f"# {TITLE}", "", *findings, "", "[page.html](page.html) shows all of it, to click through.", ""]
    for name, caption in captions.items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    lines += [*further, ""]
    return "\n".join(lines)


def next_commands(out: Path, seed: int) -> list[str]:
    """Return what to run next, by line."""
    other_seed = seed + 1
    return [
        f"Was it luck? captum-sdi demo --seed {other_seed} --out {out}-{other_seed}",
        "Your own model: captum-sdi index --help, or tutorials/02_your_own_model.ipynb",
    ]


def say(text: str) -> None:
    """Print above the progress bars, without tearing them apart."""
    tqdm.write(text)
