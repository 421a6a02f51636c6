"""The paper's own table at full size: `python benchmarks/paper_table.py --device cuda`, with 48 GB or more.

A looped GPT-2 of 135 million parameters, τ = 32, sequence 128, sketches of 2048, float32 (arXiv 2602.10097):

* the largest batch that fits in 48 GB (the paper: 4 with full gradients, 40 with SDI);
* seconds over a forward pass, per checkpoint (2.55);
* errors over ten draws, examples against themselves (SDI 0.0388 ± 0.0030, TracIn 0.0220 ± 0.0052), against gradients
  that are exact and are computed for one layer at a time;
* beside the paper: seconds with matrix products in TF32, and of the model in bfloat16; what a sketch of the widest
  layer takes, by how many tokens it takes at once, beside a copy of what it must read and write at least.

`--checkpoint FOLDER` measures a trained model, in float32, in place of random weights; `--small` shrinks everything for
a CPU, which has no limit to set, so that the largest batch is left out. Results are written after every section.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from environment import environment
from peers import Call
from subjects import Workload, looped_gpt, losses, of_looped_gpt, tokens
from timing import interleaved, quartiles
from torch import Tensor

from captum_sdi import TensorSketch
from captum_sdi.features import Outer
from captum_sdi.models import LoopedGPTForCausalLM

FULL = {"width": 768, "tau": 32, "seq": 128, "vocab": 50257, "batch": 10}
SMALL = {"width": 64, "tau": 4, "seq": 16, "vocab": 128, "batch": 4}
MOST = 4096  # examples in a batch: the search goes no further


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--checkpoint", help="a folder that LoopedGPTForCausalLM.save_pretrained wrote")
    parser.add_argument("--limit-gb", type=float, default=48.0, help="memory of the card that is imitated, GiB")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("paper_table.json"))
    options = parser.parse_args()
    if options.draws < 2:
        parser.error(f"--draws={options.draws}: a standard deviation takes 2 or more")
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers turn TF32 on by an environment variable
    device = torch.device(options.device)
    if device.type == "cuda":
        device, options.limit_gb = _imitated(device, options.limit_gb)
    work = _workload(SMALL if options.small else FULL, options.checkpoint, device)
    methods = _methods(options.dim)
    sections: dict[str, Callable[[], Any]] = {
        "largest batch": lambda: (
            {name: _largest(work, method) for name, method in methods.items()}
            if device.type == "cuda"
            else "not searched: a CPU has no memory limit to set"
        ),
        "seconds over a forward pass": lambda: _overheads(work, methods, device),
        "errors": lambda: _errors(work, options.dim, options.draws),
        "seconds over a forward pass, TF32": lambda: _in_tf32(lambda: _overheads(work, methods, device)),
        "seconds over a forward pass, bfloat16": lambda: _overheads(
            dataclasses.replace(work, model=copy.deepcopy(work.model).bfloat16()), methods, device, ("ours",)
        ),
        "milliseconds of a sketch": lambda: _traffic(work, options.dim, device),
    }
    results = {"environment": environment(), "settings": _settings(options, work)}
    for name, measure in sections.items():
        results[name] = measure()
        options.out.write_text(json.dumps(results, indent=1) + "\n")  # each takes long, and the next one may fail
        print(name, json.dumps(results[name], indent=1), flush=True)


def _imitated(device: torch.device, limit: float) -> tuple[torch.device, float]:
    """The device by its number, and the limit it was given: no more GiB than it has."""
    # A limit is refused for a device without a number; environment() names the current one.
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return device, min(limit, total)


def _workload(shape: dict[str, int], checkpoint: str | None, device: torch.device) -> Workload:
    if checkpoint:
        # Without a dtype, transformers 5 would keep that of the file.
        model = LoopedGPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        work = of_looped_gpt(model, shape["batch"], min(shape["seq"], model.config.n_positions))
    else:
        work = looped_gpt(**shape)
    return dataclasses.replace(
        work, model=work.model.to(device), train=work.train.to(device), test=work.test.to(device)
    )


def _settings(options: argparse.Namespace, work: Workload) -> dict[str, Any]:
    """What was asked for, and of which model: where the checkpoint is None, weights are random."""
    config = work.model.config
    shape = {name: value for name, value in config.to_dict().items() if name.startswith("n_") or name == "vocab_size"}
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    measured = {"tau": config.n_loops, "sequence": work.train.shape[1], "model": shape}
    return asked | measured | {"matmul precision": torch.get_float32_matmul_precision()}


def _methods(dim: int) -> dict[str, Callable[[Workload], Call]]:
    return {
        "ours": lambda work: peers.ours(work, dim),
        "ours, checkpointed": lambda work: peers.ours(work, dim, activation_checkpointing=True),
        "reference": lambda work: peers.reference(work, dim),
        "reference, full gradients": peers.reference_exact,
    }


def _largest(work: Workload, method: Callable[[Workload], Call]) -> int:
    """The largest batch of train examples up to MOST, against one test example: by doubling, then halving the gap."""
    fits, fails = 0, 1
    while fails <= MOST and _fits(work, method, fails):
        fits, fails = fails, 2 * fails
    fails = min(fails, MOST + 1)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if _fits(work, method, middle) else (fits, middle)
    return fits


def _fits(work: Workload, method: Callable[[Workload], Call], batch: int) -> bool:
    vocab = work.model.config.vocab_size
    train = tokens(batch, work.train.shape[1], vocab, seed=3).to(work.train.device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The GPU's memory does not suffice")  # ours would go on in halves
            method(dataclasses.replace(work, train=train, test=work.test[:1]))()
    except (torch.cuda.OutOfMemoryError, UserWarning):
        return False
    finally:
        work.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _overheads(
    work: Workload,
    methods: dict[str, Callable[[Workload], Call]],
    device: torch.device,
    names: tuple[str, ...] = ("ours", "ours, checkpointed", "reference"),
) -> dict[str, Any]:
    """Seconds of a call with four examples on each side, less those of a forward pass of the same batches."""
    four = dataclasses.replace(work, train=work.train[:4], test=work.test[:4])

    def forward() -> None:
        with torch.no_grad():
            for ids in (four.train, four.test):
                losses(four.model(ids), ids)

    sketched = {name: methods[name](four) for name in names}
    seconds = interleaved(
        {name: _synchronized(call, device) for name, call in {"forward": forward, **sketched}.items()}, rounds=5
    )
    base = quartiles(seconds["forward"])[1]
    return {"forward": base} | {name: quartiles(seconds[name])[1] - base for name in sketched}


def _synchronized(call: Call, device: torch.device) -> Call:
    def whole() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return whole


def _in_tf32(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.set_float32_matmul_precision("high")
    try:
        return measure()
    finally:
        torch.set_float32_matmul_precision("highest")


def _traffic(work: Workload, dim: int, device: torch.device) -> dict[str, float]:
    """A sketch of the widest layer's gradients of four examples, and a copy of as many bytes as it must move."""
    width, length = work.model.config.n_embd, work.train.shape[1]
    gradient = Outer(
        torch.randn(4, length, 4 * width, device=device),
        torch.randn(4, length, width, device=device),
    )
    sketch = TensorSketch(dim).projection("widest", torch.empty(4 * width, width, device=device))
    n_numbers = gradient.rows.numel() + gradient.cols.numel() + 4 * dim
    source = torch.randn(n_numbers // 2, device=device)  # a copy reads and writes
    calls = {"a copy": lambda: source.clone()}
    for tokens_at_once in (32, 128, 512):
        calls[f"{tokens_at_once} tokens at once"] = partial(_sketched, sketch, tokens_at_once, gradient)
    calls["as it is"] = partial(sketch, gradient)
    calls = {name: _synchronized(call, device) for name, call in calls.items()}
    return {name: 1000 * quartiles(spent)[1] for name, spent in interleaved(calls, rounds=20).items()}


def _sketched(sketch: Any, tokens_at_once: int, gradient: Outer) -> Tensor:
    usual = sketch._tokens_at_once
    sketch._tokens_at_once = tokens_at_once
    try:
        return sketch(gradient)
    finally:
        sketch._tokens_at_once = usual


def _errors(work: Workload, dim: int, draws: int) -> dict[str, Any]:
    """Mean and standard deviation over draws of ‖estimate - exact‖ / ‖exact‖, examples against themselves."""
    same = dataclasses.replace(work, test=work.train)
    exact = _exact(same)
    estimates: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda seed: peers.ours(same, dim, seed)().trajectories,
        "reference": lambda seed: peers.reference(same, dim, seed)(),
    }

    def error(guess: Tensor, truth: Tensor) -> float:
        return float((guess.to(truth) - truth).norm() / truth.norm())

    found = {}
    for name, estimate in estimates.items():
        guesses = [estimate(seed) for seed in range(draws)]
        for what, errors in (
            ("SDI", [error(guess, exact) for guess in guesses]),
            ("TracIn", [error(guess.sum(-1), exact.sum(-1)) for guess in guesses]),
        ):
            values = torch.tensor(errors)
            found[f"{name}, {what}"] = [float(values.mean()), float(values.std())]
    return found


def _exact(work: Workload) -> Tensor:
    """Exact trajectories `(q, n, t)`: of all layers at once they would take τ times the model for each example."""
    owners = {name.rpartition(".")[0] for name, _ in work.model.named_parameters()}
    layers = sorted(name for name in owners if name.startswith(tuple(f"{part}." for part in work.loop)))
    return sum(peers.ours_exact(work, batch_size=1, layers=[layer])().trajectories.double() for layer in layers)


if __name__ == "__main__":
    main()
