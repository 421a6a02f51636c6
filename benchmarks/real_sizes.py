"""What users have: the shapes of Ouro and Huginn, `python benchmarks/real_sizes.py Ouro-1.4B` from a checkout.

Weights are random and made in place, in bfloat16, and so is everything but the sketch; sketches of 512, the loop's
activations recomputed. Measured: the peak of memory above the weights; the time of a call beside that of a pass with
frozen weights and no sketch, whose activations are recomputed as well; what the checks around an object's first batch
cost. The layers are Llama's, which are those of Ouro but for two more norms, and those of Huginn but for its adapter;
`loop_layers` loops them. On a CPU one example, on a GPU batches as well. Results go to real_sizes.json and
real_sizes.md, each shape beside those that were measured before; `--small` shrinks everything.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from environment import environment
from subjects import losses, tokens
from timing import quartiles, ratio
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from captum_sdi import SDIInfluence, TensorSketch
from captum_sdi.capture.heap import find_malloc_trim
from captum_sdi.models import loop_layers

# From their configs: the looped layers, and how many times they are applied.
SHAPES: dict[str, dict[str, Any]] = {
    "Ouro-1.4B": {"width": 2048, "mlp": 5632, "heads": 16, "layers": 24, "vocab": 49152, "loop": (0, 24), "loops": 4},
    "Ouro-2.6B": {"width": 2048, "mlp": 5632, "heads": 16, "layers": 48, "vocab": 49152, "loop": (0, 48), "loops": 4},
    "Huginn-3.5B": {
        "width": 5280,
        "mlp": 17920,
        "heads": 55,
        "layers": 8,
        "vocab": 65536,
        "loop": (2, 6),
        "loops": 32,
        "tied": True,
    },
}
SMALL = {"width": 64, "mlp": 176, "heads": 2, "layers": 4, "vocab": 128, "loop": (0, 4), "loops": 2}
DIM = 512
FOLDER = Path(__file__).parent


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.shapes:
        shape = SMALL if options.small else shallower(SHAPES[name], options.layers)
        n_tokens = 8 if options.small else options.tokens
        loops = options.loops or shape["loops"]
        found: dict[str, Any] = {"environment": environment(), "tokens": n_tokens, "loop steps": loops}
        model = looped_llama(shape, loops, device)
        found["weights, GB"] = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
        for batch in options.batches:
            found[f"batch {batch}"] = measured(model, shape, tokens(batch, n_tokens, shape["vocab"], 1), options.rounds)
            key = f"{name}, {shape['layers']} layers, {loops} loop steps, on {device.type}"
            results[key] = found
            options.out.write_text(json.dumps(results, indent=1) + "\n")  # each takes long, and the next one may fail
            options.out.with_suffix(".md").write_text(table(results))
            print(key, json.dumps(found[f"batch {batch}"]), flush=True)
        del model
        gc.collect()


def parsed() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["Ouro-1.4B"], help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--tokens", type=int, default=512 if has_gpu else 64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32] if has_gpu else [1])
    parser.add_argument("--loops", type=int, help="other than the config's")
    parser.add_argument("--layers", type=int, help="no more looped layers than these: time per layer is the same")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, default=FOLDER / "real_sizes.json")
    return parser.parse_args()


def shallower(shape: dict[str, Any], n_looped: int | None) -> dict[str, Any]:
    """A shape with no more looped layers than were asked for."""
    start, stop = shape["loop"]
    removed = 0 if n_looped is None else max(0, stop - start - n_looped)
    return {**shape, "loop": (start, stop - removed), "layers": shape["layers"] - removed}


def looped_llama(shape: dict[str, Any], loops: int, device: torch.device) -> nn.Module:
    """A model in bfloat16 whose weights are never held twice."""
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        tie_word_embeddings=shape.get("tied", False),
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffer is computed
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    start, stop = shape["loop"]
    return loop_layers(model.eval(), start, stop, n_loops=loops)


def measured(model: nn.Module, shape: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """The first call of an object, and calls of the same object in turn with passes that sketch nothing."""
    ids = ids.to(next(model.parameters()).device)
    rows = [{"input_ids": row, "labels": row} for row in ids.cpu()]
    sdi = SDIInfluence(
        model,
        rows,
        loop=[f"model.layers.{number}" for number in range(*shape["loop"])],
        sketch=TensorSketch(DIM),
        batch_size=len(rows),
        activation_checkpointing=True,
    )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    calls = {"ours": sdi.step_self_influence, "pass": partial(frozen_pass, model, shape, ids)}
    calls["pass"]()  # what libraries allocate once is no part of a peak
    with peak_memory(ids.device) as peak:
        first, _ = seconds_of(calls["ours"])
    first_peak = peak()
    with peak_memory(ids.device) as peak:
        calls["ours"]()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call)[0])
    steady = quartiles(seconds["ours"])[1]
    return {
        "peak of the first call above the weights": first_peak / weights,
        "peak of the second call above the weights": peak() / weights,
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "time over the pass": ratio(seconds, "ours", "pass"),
        "checks around the first batch, in examples": (first - steady) / steady * len(rows),
    }


def frozen_pass(model: nn.Module, shape: dict[str, Any], ids: torch.Tensor) -> None:
    """Forward and backward to where the loop begins, without weight gradients; the looped layers are recomputed."""
    layers = [model.get_submodule(f"model.layers.{number}") for number in range(*shape["loop"])]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    entry = layers[0].register_forward_pre_hook(required, with_kwargs=True)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        losses(model(ids), ids).sum().backward()
    finally:
        entry.remove()
        for layer in layers:
            del layer.forward
        for parameter in trainable:
            parameter.requires_grad_(True)


def required(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let a gradient reach what enters the loop."""
    hidden = args[0]
    return ((hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)), *args[1:]), kwargs


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time  # others may use the processor
    began = clock()
    answer = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, answer


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Give the bytes that were held at most in the block, above those before; of the process on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    find_malloc_trim()(0)  # what was freed before would be used again unseen
    process = psutil.Process()
    before = process.memory_info().rss
    seen, finished = [before], threading.Event()

    def watch() -> None:
        while not finished.wait(0.005):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(seen) - before
    finally:  # or the thread would never end, and with it the process
        finished.set()
        watcher.join()


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Ouro's and Huginn's shapes",
        "",
        "`python benchmarks/real_sizes.py` writes this page; bfloat16, `TensorSketch(512)`, activations of the loop",
        "recomputed, random weights. A pass is forward and backward with frozen weights and no sketch, recomputed too;",
        "time on a CPU is the processor's.",
        "",
        "| shape | weights | tokens | batch | peak above the weights: first call, later | time / the pass | checks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        for key, row in found.items():
            if not key.startswith("batch"):
                continue
            low, median, high = row["time over the pass"]
            peaks = [row[f"peak of the {call} call above the weights"] for call in ("first", "second")]
            checks = row["checks around the first batch, in examples"]
            lines.append(
                f"| {name} | {found['weights, GB']:.2f} GB | {found['tokens']} | {key[6:]} | {peaks[0]:.1%}, "
                f"{peaks[1]:.1%} | {median:.2f} ({low:.2f}-{high:.2f}) | {checks:.1f} examples |"
            )
    machines = {json.dumps(found["environment"], sort_keys=True): None for found in results.values()}
    return "\n".join([*lines, "", "Measured with:", "", *(f"- `{machine}`" for machine in machines), ""])


if __name__ == "__main__":
    main()
