"""What an index costs and saves: `python benchmarks/index.py [part ...]` from a checkout.

Parts: `sizes` (bytes and errors per example), `questions` (the first without an index against the second with it),
`scan` (against a plain matrix product), `million` (a million pooled rows; 4 GB of disk meanwhile), `faiss`. Results go
to index.json beside this file, with the environment; index.md explains them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_sdi import Exact, Faiss, SDIInfluence, TensorSketch, __version__
from captum_sdi.checkpoints import Checkpoint
from captum_sdi.features import Noise, StepFeatures
from captum_sdi.index.folder import SketchIndex
from captum_sdi.index.manifest import Manifest
from captum_sdi.index.processes import Processes
from captum_sdi.index.search import Search
from captum_sdi.index.shards import SUFFIX, Shard
from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.scores.ranking import Ranking

TOP_TEN = Ranking(k=10, proponents=True)
RESULTS = Path(__file__).with_suffix(".json")


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def timed(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """The fastest of so many runs, in seconds, and the last one's result."""
    fastest = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        result = work()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest, result


def token_rows(n: int, length: int, vocabulary: int, seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def looped_gpt(width: int, vocabulary: int, length: int) -> LoopedGPTForCausalLM:
    """Two blocks before, two in and two after the loop, six loop steps."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "n_positions": length, "n_embd": width, "n_head": width // 64}
    return LoopedGPTForCausalLM(LoopedGPTConfig(**sizes, n_prelude=2, n_core=2, n_coda=2, n_loops=6))


def sizes() -> dict[str, Any]:
    """Bytes per example and the error of totals, relative to exact gradients, on train examples against others."""
    model = looped_gpt(128, 200, 32)
    with torch.no_grad():  # at the usual initialisation all loop steps look alike
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    train, test = token_rows(100, 32, 200, 1), token_rows(8, 32, 200, 2)
    exact = SDIInfluence(model, train, batch_size=10, sketch=Exact()).influence(test)
    found = {}
    for pool in (False, True):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            errors, sizes, stored = [], [], []
            for seed in range(3):
                with scratch() as folder:
                    sketch = TensorSketch(2048, seed, pool)
                    settings: dict[str, Any] = {"sketch": sketch, "batch_size": 10}
                    sdi = SDIInfluence(model, train, index=folder, index_dtype=dtype, **settings)
                    scores = sdi.influence(test)
                    sizes.append(sdi.build_index().bytes / len(train))
                    errors.append(float((scores - exact).norm() / exact.norm()))
                    unrounded = SDIInfluence(model, train, **settings).influence(test)
                    stored.append(float((scores - unrounded).norm() / unrounded.norm()))
            name = f"{'pooled' if pool else 'by parameter'}, {str(dtype)[6:]}"
            mean = {key: sum(values) / 3 for key, values in (("error", errors), ("of storage", stored))}
            found[name] = {"bytes per example and checkpoint": sum(sizes) / 3, **mean}
    return found


def questions() -> dict[str, Any]:
    """A model of the paper's shape: the first question without an index, and the second one with it."""
    found: dict[str, Any] = {}
    for n, length in ((100, 64), (1000, 8)):
        model = looped_gpt(768, 50257, length)
        train, tests = token_rows(n, length, 50257, 1), token_rows(2, length, 50257, 2)
        with scratch() as folder:
            found[f"{n} examples of {length} tokens"] = asked(model, train, tests, folder)
    return found


def asked(model: LoopedGPTForCausalLM, train: Any, tests: Any, index: Path) -> dict[str, float]:
    settings: dict[str, Any] = {"sketch": TensorSketch(2048), "batch_size": 8}
    without, plain = timed(lambda: SDIInfluence(model, train, **settings).step_influence(tests[:1], k=10))
    sdi = SDIInfluence(model, train, index=index, **settings)
    building, built = timed(sdi.build_index)
    sdi.step_influence(tests[1:], k=10)
    second, best = timed(lambda: sdi.step_influence(tests[:1], k=10), times=3)
    assert torch.equal(best.indices, plain.indices)
    fresh, _ = timed(lambda: SDIInfluence(model, train, index=index, **settings).step_influence(tests[:1], k=10))
    return {
        "first question without an index, s": without,
        "building the index, s": building,
        "second question, s": second,
        "times faster": without / second,
        "first question of a new object, s": fresh,
        "MB": built.bytes / 1e6,
    }


def simulated(folder: Path, n: int, width: int, dtype: str, clusters: int = 0) -> SketchIndex:
    """An index of random rows; around so many centres, as gradients are that resemble each other."""
    sketch = {"kind": "TensorSketch", "dim": width, "seed": 0, "pool": True}
    rows = [("", width, *astuple(Noise(1 / width)))]
    settings: dict[str, Any] = {
        "captum_sdi": "simulated",
        "sketch": sketch,
        "parameters": {},
        "loop": {"modules": [], "anchors": []},
        "loss": "none",
        "forward_kwargs": "none",
    }
    manifest = Manifest(
        settings, dtype, rows, {"simulated": {"weights": "", "hash tables": "", "learning rate": 1.0}}, examples=n
    )
    index = SketchIndex(folder, manifest)
    index.folder("simulated").mkdir(parents=True)
    manifest.save(folder)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(max(clusters, 1), width, generator=generator) * (clusters > 0)
    size = max(1, 2**26 // (width * index.dtype.itemsize) // index.piece) * index.piece  # as a builder's are
    for start in range(0, n, size):
        block = torch.randn(min(size, n - start), width, generator=generator)
        block += centres[torch.randint(0, len(centres), (len(block),), generator=generator)]
        none = torch.zeros(len(block), 8, dtype=torch.uint8)
        Shard.write(index.folder("simulated"), start, block, none, index.dtype, manifest.owner("simulated"))
    index.scan()
    return index


def searching(index: SketchIndex, tests: Tensor, faiss: Faiss | None = None) -> Search:
    features = StepFeatures({"": tests.unsqueeze(1)}, {"": Noise(1 / index.width)}, torch.zeros(len(tests)))
    checkpoint = Checkpoint("simulated", None)
    return Search(index, Processes(tests.device), [checkpoint], [features], torch.float32, faiss)


def scan() -> dict[str, Any]:
    """The running top k over an index against one float32 matrix product over the same bytes in memory."""
    found = {}
    for name, n, width in (("pooled", 50_000, 2048), ("50 parameters", 1000, 50 * 2048)):
        with scratch() as folder:
            index = simulated(folder, n, width, "float32")
            whole = torch.randn(n, width)
            for q in (1, 8, 64):
                tests = torch.randn(q, width)
                search = searching(index, tests)
                plain, _ = timed(lambda tests=tests, whole=whole: tests @ whole.T, times=5)
                ours, _ = timed(lambda search=search: search.top(TOP_TEN), times=5)
                speed = {"plain product, s": plain, "index, s": ours, "share": plain / ours}
                found[f"{name}, {n} x {width}, {q} queries"] = speed
    return found


_MILLION = """
import json, sys, threading, time
sys.path.insert(0, {here!r})
import torch
from index import TOP_TEN, SketchIndex, searching
torch.set_num_threads({threads})

def own():  # memory of its own, without the maps of files that the system may drop at any time
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1e3

def watch():
    while not done.wait(0.01):
        peaks.append(own())

index = SketchIndex.open({folder!r})
search = searching(index, torch.randn(16, index.width))
peaks, done, before = [own()], threading.Event(), own()
threading.Thread(target=watch, daemon=True).start()  # or a failure below would not end the process
began = time.perf_counter(); assert not index.verify(); verified = time.perf_counter() - began
began = time.perf_counter(); search.top(TOP_TEN); took = time.perf_counter() - began
done.set()
memory = max(peaks) - before
print(json.dumps({{"checksums, s": verified, "16 queries, top 10, s": took, "memory, MB": memory}}))
"""


def million() -> dict[str, Any]:
    """A million pooled rows of float16, and a tenth of them: time, and memory that does not grow."""
    found = {}
    for n in (100_000, 1_000_000):
        with scratch() as folder:
            index = simulated(folder, n, 2048, "float16")
            settings = {"here": str(Path(__file__).parent), "folder": str(folder), "threads": torch.get_num_threads()}
            command = [sys.executable, "-c", _MILLION.format(**settings)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{n} rows"] = {"GB": index.bytes / 1e9, **json.loads(told)}
    return found


def faiss() -> dict[str, Any]:
    """Approximate search among pooled rows around a thousand centres."""
    found: dict[str, Any] = {}
    with scratch() as folder:
        index = simulated(folder, 200_000, 512, "float32", clusters=1000)
        tests = torch.randn(64, 512)
        found["every row"] = {"64 queries, top 10, s": timed(lambda: searching(index, tests).top(TOP_TEN), 3)[0]}
        for nprobe in (8, 32, 128):
            way = Faiss("IVF1024,SQfp16", nprobe)
            first, _ = timed(lambda way=way: searching(index, tests, way).top(TOP_TEN))
            again, _ = timed(lambda way=way: searching(index, tests, way).top(TOP_TEN), times=3)
            measured = {"64 queries, top 10, s": again, "recall": way.recall, "first question, s": first}
            found[f"IVF1024,SQfp16, nprobe={nprobe}"] = measured
        found["files, MB"] = {
            "shards": index.bytes / 1e6,
            "FAISS": sum(file.stat().st_size for file in folder.glob("*.faiss")) / 1e6,
        }
        assert all(file.suffix == SUFFIX for file in index.folder("simulated").iterdir())
    return found


PARTS = {"sizes": sizes, "questions": questions, "scan": scan, "million": million, "faiss": faiss}


def environment() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {"torch": torch.__version__, "captum_sdi": __version__, "cpu": cpu, "threads": torch.get_num_threads()}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in parser.parse_args().parts:
        began = time.perf_counter()
        results[part] = {"environment": environment(), "results": PARTS[part]()}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(part, f"{time.perf_counter() - began:.0f} s", json.dumps(results[part]["results"], indent=2), flush=True)
    print("peak memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "GB")


if __name__ == "__main__":
    main()
