"""Time of a whole `step_influence` call, beside the reference package, Captum, training and the physical limit.

Four examples on each side and the paper's shape: width 768, sequence 128, sketches of 2048. Before anything is timed,
the answers are checked: on a narrow model whole gradients against whole gradients, then at full width Captum's exact
totals and the reference's trajectories against ours within their standard errors.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from peers import Call, limit, ours, ours_exact, reference, reference_exact, tracincp, training_steps
from subjects import Workload, looped_gpt, looped_gpt2
from timing import interleaved, quartiles, ratio

DIM = 2048
Result = dict[str, Any]


def paper_shape(small: bool = False) -> Result:
    """The paper's model at τ = 6."""
    shape = _shape(small)
    return _side_by_side(looped_gpt(**shape), looped_gpt(**NARROW), rounds=2 if small else 11)


def with_biases(small: bool = False) -> Result:
    """The same with a bias in every linear layer, as GPT-2 has them."""
    shape = _shape(small)
    return _side_by_side(looped_gpt(**shape, bias=True), looped_gpt(**NARROW, bias=True), rounds=2 if small else 7)


def hugging_face_gpt2(small: bool = False) -> Result:
    """GPT-2 from transformers; the reference package refuses its layers, so that Captum is the only witness."""
    try:
        reference(looped_gpt2(**NARROW), dim=64)()
    except NotImplementedError as error:
        refusal = str(error)
    work, rounds = looped_gpt2(**_shape(small)), 2 if small else 7
    return _side_by_side(work, looped_gpt2(**NARROW), rounds, witness=False) | {"reference_raises": refusal}


def deep_and_checkpointed(small: bool = False) -> Result:
    """τ = 16: what recomputing activations costs in time; `memory.py` shows what it saves."""
    work = looped_gpt(**_shape(small) | {"tau": 16})
    calls = {
        "ours": ours(work, DIM),
        "ours, checkpointed": ours(work, DIM, activation_checkpointing=True),
        "reference": reference(work, DIM),
    }
    seconds = interleaved(calls, rounds=2 if small else 3)
    names = ("ours", "reference")
    return _summary(seconds, {f"checkpointed / {name}": ("ours, checkpointed", name) for name in names})


NARROW = {"width": 64, "tau": 3, "seq": 16}


def _shape(small: bool) -> dict[str, int]:
    return {"width": 128, "tau": 6, "seq": 32} if small else {}


def _side_by_side(work: Workload, narrow: Workload, rounds: int, witness: bool = True) -> Result:
    calls: dict[str, Call] = {"ours": ours(work, DIM)}
    if witness:
        calls["reference"] = reference(work, DIM)
    calls |= {"training steps": training_steps(work), "limit": limit(work)}
    start = time.perf_counter()
    totals = tracincp(work)()
    once = time.perf_counter() - start  # by far the slowest: it takes no part in the rounds
    agreement = _check_exact(narrow, witness) | _check_sketched(calls, totals)
    seconds = interleaved(calls, rounds) | {"TracInCP": [once] * rounds}
    ratios = {f"ours / {name}": ("ours", name) for name in seconds if name != "ours"}
    if witness:
        ratios |= {f"reference / {name}": ("reference", name) for name in ("training steps", "limit")}
    return {"agreement": agreement} | _summary(seconds, ratios)


def _summary(seconds: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> Result:
    return {
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": {name: ratio(seconds, *pair) for name, pair in ratios.items()},
        "rounds": len(seconds["ours"]),
    }


def _check_exact(narrow: Workload, witness: bool) -> Result:
    """Largest differences between exact scores, as shares of the largest score; float32 leaves about 1e-6."""
    scores = ours_exact(narrow)()
    found = {"TracInCP": _distance(scores.influence_scores, tracincp(narrow)())}
    if witness:
        found["reference"] = _distance(scores.trajectories, reference_exact(narrow)())
    for name, distance in found.items():
        if not distance <= 1e-4:  # not >, which NaN would pass
            raise AssertionError(f"{name} and captum_sdi differ by {distance:.1e} of the largest exact score.")
    return {f"exact, {name}": distance for name, distance in found.items()}


def _check_sketched(calls: dict[str, Call], totals: torch.Tensor) -> Result:
    """Largest differences in standard errors of ours; the reference has about 4/3 of them beside, as random."""
    scores = calls["ours"]()
    found = {"TracInCP": ((scores.influence_scores - totals).abs() / scores.score_errors).max().item()}
    allowed = {"TracInCP": 5.0, "reference": 5 * (1 + (4 / 3) ** 2) ** 0.5}
    if "reference" in calls:
        gap = scores.trajectories - calls["reference"]()
        found["reference"] = (gap.abs() / scores.trajectory_errors).max().item()
    for name, distance in found.items():
        if not distance <= allowed[name]:
            raise AssertionError(f"{name} is {distance:.1f} standard errors away; {allowed[name]:.1f} are allowed.")
    return {f"sketched, {name}": distance for name, distance in found.items()}


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
