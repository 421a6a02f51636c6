"""Peak memory above what the process held before the call, each configuration in a process of its own.

The model and the imports belong to the baseline, and so does what the libraries allocate once: a call on a
narrow model comes first. A thread reads the resident set size every 2 ms.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import peers
import psutil
from subjects import looped_gpt

DIM = 2048
OURS = "ours, checkpointed"
CALLS = {
    "ours": peers.ours,
    OURS: lambda *args, **kw: peers.ours(*args, activation_checkpointing=True, **kw),
    "reference": peers.reference,
}


def peaks(small: bool = False) -> dict[str, Any]:
    """MB by library against loop steps (batch 4) and against batch (τ = 4)."""
    width = 96 if small else 768
    taus, batches = ((2, 4), (1, 2)) if small else ((4, 16, 32), (1, 4, 8))

    def row(axis: str, values: tuple[int, ...]) -> dict[str, Any]:
        points = [{"tau": 4, "batch": 4, "width": width} | {axis: value} for value in values]
        return {"values": values} | {who: [_peak(who, point) for point in points] for who in CALLS}

    return {"width": width, "tau": row("tau", taus), "batch": row("batch", batches)}


def held(small: bool = False) -> dict[str, Any]:
    """KB that every further train example holds while it is scored, against loop steps; one test example."""
    taus = (2, 4) if small else (2, 8, 32)
    # The resident set is uncertain by some MB: the less is held, the more examples it takes to see.
    sizes = {who: (8, 16) if small else size for who, size in {OURS: (128, 1024), "reference": (8, 64)}.items()}
    shape = {"width": 64, "seq": 16, "batch_size": 8}
    found: dict[str, Any] = {"shape": shape, "examples": sizes, "values": taus}
    for who, (few, many) in sizes.items():
        peaks = [[_peak(who, shape | {"tau": tau, "n": n}) for n in (few, many)] for tau in taus]
        found[who] = [1000 * (most - least) / (many - few) for least, most in peaks]
    matrices = [p for p in looped_gpt(width=64).model.get_submodule("core").parameters() if p.ndim == 2]
    return found | {"one sketch": len(matrices) * DIM * 4 / 1000}


def _peak(who: str, shape: dict[str, int]) -> float:
    """MB that a process of its own reports."""
    command = [sys.executable, __file__, who, json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {who} with {shape} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _measure(who: str, shape: dict[str, int]) -> float:
    settings = {"batch_size": shape.pop("batch_size")} if "batch_size" in shape else {}
    if "n" in shape:
        shape["batch"] = shape.pop("n")
    CALLS[who](looped_gpt(width=64, tau=2, seq=16), DIM)()
    work = looped_gpt(**shape)
    if settings:  # many train examples, few test ones, which are held by design
        work = type(work)(work.model, work.loop, work.entry, work.train, work.test[:1])
    call = CALLS[who](work, DIM, **settings)
    process = psutil.Process()
    baseline = process.memory_info().rss
    seen, finished = [baseline], threading.Event()

    def watch() -> None:
        while not finished.is_set():
            seen.append(process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:  # or the thread would never end, and with it the process
        finished.set()
        watcher.join()
    return (max(seen) - baseline) / 1e6


if __name__ == "__main__":
    print(_measure(sys.argv[1], json.loads(sys.argv[2])))
