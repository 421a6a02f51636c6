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
CALLS = {
    "ours": peers.ours,
    "ours, checkpointed": lambda *args, **kw: peers.ours(*args, activation_checkpointing=True, **kw),
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
    """MB against the number of train examples, scored in batches of 4, and against loop steps."""
    sizes, taus = ((4, 8), (2, 4)) if small else ((8, 32, 128), (2, 8, 32))
    shape = {"width": 64, "seq": 16, "batch_size": 4}
    found: dict[str, Any] = {"shape": shape, "examples": {"values": sizes, "tau": 8}, "tau": {"values": taus, "n": 64}}
    for who in ("ours, checkpointed", "reference"):
        found["examples"][who] = [_peak(who, shape | {"tau": 8, "n": n}) for n in sizes]
        found["tau"][who] = [_peak(who, shape | {"tau": tau, "n": sizes[-1] // 2}) for tau in taus]
    found["tau"]["n"] = sizes[-1] // 2
    return found


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
    call()
    finished.set()
    watcher.join()
    return (max(seen) - baseline) / 1e6


if __name__ == "__main__":
    print(_measure(sys.argv[1], json.loads(sys.argv[2])))
