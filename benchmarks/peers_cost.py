"""What an example costs each library that gives right totals on a loop: `python benchmarks/peers_cost.py`.

One looped GPT, the same examples, totals over all parameters, sketches of 2048 where a method sketches: the processor's
time and the memory above the model for each training example, in rounds that take turns. A method that has had its
minute (`--patience`) is left out of further rounds. Beside them stands how well each predicts retraining, from
truth.json. `pip install dattri traker kronfluence` installs the peers; LogIX, which is right as well, is not on PyPI
(`logix` there is something else), and what is not installed is left out. So are dattri's conjugate gradients: the
Hessians of its batches do not fit. Results go to peers_cost.json and peers_cost.md; `--small` is a smoke test.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from environment import environment
from real_sizes import peak_memory
from retraining.beds import Bed, as_batch, language_model_loss
from retraining.methods import BATCH, Method, Scores, Subject
from retraining.peers import captum_tracincp, dattri_tracin, kronfluence, trak
from timing import quartiles, ratio
from torch import Tensor

from captum_sdi import SDIInfluence, TensorSketch
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM

RESULTS = Path(__file__).with_suffix(".json")
TRUTH = Path(__file__).with_name("truth.json")
PASS = "forward and backward, no weight gradients"
TRAINING = "forward and backward of training, one gradient in all"
FASTEST = "ours, TensorSketch(512)"
BY_STEP = "ours, TensorSketch(512), by loop step"
SMALL_BATCHES = "ours, TensorSketch(512), batches of 4"
IN_TRUTH = {
    BY_STEP: "TracIn / SDI, TensorSketch(512)",
    SMALL_BATCHES: "TracIn / SDI, TensorSketch(512)",
    "ours, TensorSketch(2048)": "TracIn / SDI, 4 checkpoints",
    FASTEST: "TracIn / SDI, TensorSketch(512)",
    "dattri TracIn, 512": "dattri TracIn",
    "dattri TracIn, 2048": "dattri TracIn",
    "TRAK, 2048": "TRAK, 2048, damped",
}
"""By our names: the method's name in truth.json, where it is another."""
PEERS: dict[str, Method] = {
    "captum TracInCP": partial(captum_tracincp, batch_size=1),  # larger ones cost more
    "dattri TracIn, 512": partial(dattri_tracin, dim=512),
    "dattri TracIn, 2048": partial(dattri_tracin, dim=2048),
    "TRAK, 2048": trak,
    "kronfluence EK-FAC": kronfluence,
}
BED, KIND = "text", "20% removed"


class Untrained(Subject):
    """A model with random weights: what they are changes neither time nor memory."""

    @cached_property
    def run(self) -> Any:
        parameters = [parameter.detach().reshape(-1) for parameter in self.bed.start().parameters()]
        return SimpleNamespace(weights=torch.cat(parameters).unsqueeze(0))

    def checkpoints(self) -> list[tuple[int, Tensor, float]]:
        return [(0, self.run.weights[0], 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=30, help="seconds after which a method has had its rounds")
    parser.add_argument("--without-peers", action="store_true", help="measure ours again, beside what is recorded")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes = (8, 32, 8) if options.small else (options.examples, options.width, 64)
    subject = Untrained(bed_of(*sizes))
    recorded = json.loads(options.out.read_text()) if options.without_peers else None
    methods = installed(Untrained(bed_of(4, 16, 8)), {} if options.without_peers else PEERS)
    costs: dict[str, list[Cost]] = {name: [] for name in methods}
    for _ in range(1 if options.small else options.rounds):
        for name, method in methods.items():
            if sum(cost.seconds for cost in costs[name]) > options.patience:
                continue
            costs[name].append(cost_of(partial(method, subject)))
            print(name, costs[name][-1], flush=True)
            results = summed_up(costs, subject.bed, sizes)  # some take long, and the next may fail
            if recorded is not None and recorded["model"] == results["model"]:
                results["methods"] = {**results["methods"], **peers_of(recorded)}
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(page(results))
    print(page(results))


def peers_of(recorded: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in recorded["methods"].items() if name in PEERS}


class Cost(NamedTuple):
    """Of all examples."""

    seconds: float
    """Of the processor, as the method counts them."""
    bytes: int
    """Held above those before."""


def summed_up(costs: dict[str, list[Cost]], bed: Bed, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Quartiles over rounds."""
    measured = {name: rounds for name, rounds in costs.items() if rounds}
    seconds = {name: [cost.seconds for cost in rounds] for name, rounds in measured.items()}
    results: dict[str, Any] = {
        "environment": environment(),
        "model": {"width": sizes[1], "tokens": sizes[2], "examples": bed.n, "tests": bed.q},
        "methods": {},
        "TensorSketch(512) over the pass": {},
    }
    for name, rounds in measured.items():
        results["methods"][name] = {
            "milliseconds of the processor per example": quartiles([1000 * each / bed.n for each in seconds[name]]),
            "peak memory, MB": quartiles([cost.bytes / 1e6 for cost in rounds]),
            "rounds": len(rounds),
        }
    for name in (PASS, TRAINING):
        if len(seconds.get(FASTEST, [])) == len(seconds[PASS]) == len(seconds.get(TRAINING, [])):
            results["TensorSketch(512) over the pass"][name] = ratio(seconds, FASTEST, name)
    return results


def bed_of(n: int, width: int, length: int) -> Bed:
    """Rows of random tokens, and a looped GPT of two looped blocks and four loop steps."""
    vocabulary = 256
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, vocabulary, (count, length), generator=generator) for count in (n, 4))
    config = LoopedGPTConfig(
        vocab_size=vocabulary,
        n_embd=width,
        n_head=max(1, width // 64),
        n_positions=length,
        n_loops=4,
        n_prelude=1,
        n_core=2,
        n_coda=1,
        initializer_range=0.05,
    )
    return Bed(
        "cost",
        0,
        {"input_ids": train, "labels": train},
        {"input_ids": test, "labels": test},
        partial(LoopedGPTForCausalLM, config),
        language_model_loss,
        (1.0,),
        (torch.arange(n),),
    )


def installed(subject: Subject, peers: dict[str, Method]) -> dict[str, Method]:
    """Every method that runs here, ours first; each is tried once on next to nothing, which warms it up."""
    methods: dict[str, Method] = {PASS: passes, TRAINING: training_passes}
    for dim in (2048, 512):
        methods[f"ours, TensorSketch({dim})"] = partial(ours, dim=dim)
    methods[BY_STEP] = partial(ours, dim=512, by_step=True)
    methods[SMALL_BATCHES] = partial(ours, dim=512, batch_size=4)
    for name, method in peers.items():
        try:
            method(subject)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        methods[name] = method
    for name in list(methods)[:6]:
        methods[name](subject)
    return methods


def ours(subject: Subject, dim: int, *, by_step: bool = False, batch_size: int = BATCH) -> Scores:
    """Totals of one object, from its first batch on, checks included."""
    sdi: SDIInfluence = subject.question(sketch=TensorSketch(dim), batch_size=batch_size)
    ask = sdi.step_influence if by_step else sdi.influence
    tests = as_batch(subject.bed.test)
    start = time.process_time()
    ask(tests)
    return Scores(torch.empty(0), None, time.process_time() - start, {})


def passes(subject: Subject) -> Scores:
    """The least that a gradient costs."""
    model = subject.model.requires_grad_(False)
    model.wte.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
    start = time.process_time()
    for rows in (subject.bed.train, subject.bed.test):
        ids, labels = as_batch(rows)
        subject.bed.loss(model(input_ids=ids), labels).sum().backward()
    return Scores(torch.empty(0), None, time.process_time() - start, {})


def training_passes(subject: Subject) -> Scores:
    """What the same passes cost in training, which sums the batch's gradients up."""
    model = subject.model.requires_grad_(True)
    start = time.process_time()
    for rows in (subject.bed.train, subject.bed.test):
        ids, labels = as_batch(rows)
        subject.bed.loss(model(input_ids=ids), labels).sum().backward()
    return Scores(torch.empty(0), None, time.process_time() - start, {})


def cost_of(method: Callable[[], Scores]) -> Cost:
    gc.collect()
    with peak_memory(torch.device("cpu")) as peak:
        scores = method()
    return Cost(scores.seconds, peak())


def page(results: dict[str, Any]) -> str:
    model = results["model"]
    truth = json.loads(TRUTH.read_text())[BED]["agreement"][KIND]["methods"]
    lines = [
        "# An example's cost, beside the peers that are right on a loop",
        "",
        f"`python benchmarks/peers_cost.py`: a looped GPT of width {model['width']}, two looped blocks, four loop",
        f"steps; {model['examples']} training examples of {model['tokens']} tokens and {model['tests']} tests, totals",
        "over all parameters, one thread, checks included. Only ours tells loop steps apart where it is asked to.",
        "",
        f"| method | ms of the processor per example | rounds | peak memory, MB | LDS on *{BED}*, {KIND} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in results["methods"].items():
        low, median, high = found["milliseconds of the processor per example"]
        held = found["peak memory, MB"][1]
        agreement = predicted(truth, IN_TRUTH.get(name, name))
        lines.append(f"| {name} | {median:.1f} ({low:.1f}-{high:.1f}) | {found['rounds']} | {held:.0f} | {agreement} |")
    lines.append("")
    for name, (low, median, high) in results["TensorSketch(512) over the pass"].items():
        lines.append(f"TensorSketch(512) over {name}: {median:.2f} ({low:.2f}-{high:.2f}).")
    return "\n".join([*lines, "", f"Measured with `{json.dumps(results['environment'])}`.", ""])


def predicted(truth: dict[str, Any], name: str) -> str:
    """The rank correlation with retraining, where it was measured."""
    found = truth.get(name)
    if found is None:
        return "not measured"
    low, high = found["total"]["interval"]
    return f"{found['total']['value']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
