"""One bed with all its seeds: the gauge, the truth, every method's scores, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retraining import judging
from retraining.beds import Bed, gauge_beds, shortened
from retraining.gauge import gauge
from retraining.judging import Judged
from retraining.measuring import LEFT_OUT, Counts, Effects, fingerprint, measured_effects, subsets_of
from retraining.methods import METHODS, Method, Scores, Subject, unrolled_totals
from retraining.own_removal import own_removals
from retraining.peers import PEERS

PER_STEP = "mean over steps"
PAIRED = (
    ("unrolled", "TracIn / SDI, 4 checkpoints"),
    ("Fisher, TensorSketch(512)", "TracIn / SDI, 4 checkpoints"),
    ("Hessian, rank 80", "TracIn / SDI, 4 checkpoints"),
    ("unrolled", "Hessian, rank 80"),
    ("kronfluence EK-FAC", "Fisher, TensorSketch(512)"),
    ("Fisher, TensorSketch(512)", "TRAK, 2048, damped"),
    ("Hessian, rank 80", "kronfluence EK-FAC"),
    ("unrolled", "kronfluence EK-FAC"),
)


def study(
    beds: Sequence[Bed],
    counts: Counts,
    cache: Path,
    wanted: Sequence[str] | None,
    peers: bool,
    own: bool,
) -> dict[str, Any]:
    """Judge every method on a bed with several seeds."""
    methods = {**METHODS, **(PEERS if peers and not is_one_fact_each(beds[0]) else {})}
    if wanted:
        methods = {name: methods[name] for name in wanted}
    subjects = [Subject(bed) for bed in beds]
    scores = {name: scores_of_seeds(subjects, name, method, cache) for name, method in methods.items()}
    scores = {name: of_seeds for name, of_seeds in scores.items() if of_seeds}
    kinds = [LEFT_OUT] if is_one_fact_each(beds[0]) else list(counts.kinds)
    judged = {}
    for kind in kinds:
        effects = [effects_of(bed, kind, counts, cache) for bed in beds]
        judged[kind] = judge_kind(kind, effects, scores)
    results = {
        "seeds": [bed.seed for bed in beds],
        "models": {kind: model_count(beds[0], kind, counts) for kind in kinds},
        "tests": beds[0].q,
        "parameters": sum(parameter.numel() for parameter in beds[0].start().parameters()),
        "gauge": [gauge(bed) for bed in beds],
        "seconds": {name: sum(each.seconds for each in of_seeds) / len(of_seeds) for name, of_seeds in scores.items()},
        "facts": {name: [each.facts for each in of_seeds] for name, of_seeds in scores.items() if of_seeds[0].facts},
        "agreement": judged,
    }
    if is_one_fact_each(beds[0]):
        results["own fact first"] = own_facts(beds, effects, scores)
    elif own:
        results["own top 10% removed"] = own_removals(beds, scores, cache)
    return results


def is_one_fact_each(bed: Bed) -> bool:
    """Say whether a bed has a known answer: facts, of which nothing else can be left out."""
    return bed.loop == "block"


def model_count(bed: Bed, kind: str, counts: Counts) -> int:
    """Return how many models are trained again: without each fact in turn, or as many as asked for."""
    return bed.n if is_one_fact_each(bed) else counts.of(kind)


def effects_of(bed: Bed, kind: str, counts: Counts, cache: Path) -> Effects:
    """Measure the effects of one kind of removal, once."""
    count = model_count(bed, kind, counts)
    path = cache / f"{fingerprint(bed)} {bed.q} tests, {kind}, {count} models.pt"
    if not path.exists():
        torch.save(measured_effects(bed, subsets_of(bed, kind, count), kind, cache), path)
    return torch.load(path, weights_only=False)


def scores_of_seeds(subjects: Sequence[Subject], name: str, method: Method, cache: Path) -> list[Scores]:
    """Score every seed's model; what the cache has is not computed again. Nothing where a library is missing."""
    of_seeds = []
    for subject in subjects:
        bed = subject.bed
        path = cache / f"{fingerprint(bed)} {bed.q} tests, {name.replace('/', 'or')}.pt"
        if not path.exists():
            try:
                scores = method(subject)
            except ModuleNotFoundError as missing:
                print(f"{name}: left out, {missing}", flush=True)
                return []
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(scores, path)
            print(f"{bed.name}, seed {bed.seed}, {name}: {scores.seconds:.1f} s", flush=True)
        of_seeds.append(torch.load(path, weights_only=False))
    return of_seeds


def judge_kind(kind: str, effects: Sequence[Effects], scores: dict[str, list[Scores]]) -> dict[str, Any]:
    """Judge every method against one kind of removal."""
    of_methods = {}
    for name, of_seeds in scores.items():
        compared = [judging.pairs(each, effect) for each, effect in zip(of_seeds, effects, strict=True)]
        agreements = {what: judging.judged([pairs[what] for pairs in compared]) for what in compared[0]}
        steps = [judged for what, judged in agreements.items() if what.startswith("step ")]
        if steps:
            agreements[PER_STEP] = judging.mean_of(steps)
        if kind == LEFT_OUT and of_seeds[0].seconds:
            agreements["slope"] = judging.slopes([pairs["total"] for pairs in compared])
        of_methods[name] = agreements
    return {
        "methods": {name: as_json(agreements) for name, agreements in of_methods.items()},
        "differences": differences(of_methods),
        "truth of another seed": judging.ceiling(effects),
    }


def as_json(agreements: dict[str, Judged]) -> dict[str, Any]:
    return {what: judged.as_json() for what, judged in agreements.items()}


def differences(of_methods: dict[str, dict[str, Judged]]) -> dict[str, Any]:
    """Return paired differences of totals, and of the mean over steps."""
    found = {}
    for first, second in PAIRED:
        if first in of_methods and second in of_methods:
            for what in ("total", PER_STEP):
                if what in of_methods[first] and what in of_methods[second]:
                    difference = judging.difference(of_methods[first][what], of_methods[second][what])
                    found[f"{first} - {second}, {what}"] = difference.as_json()
    return found


def own_facts(beds: Sequence[Bed], effects: Sequence[Effects], scores: dict[str, list[Scores]]) -> dict[str, Any]:
    """Return how often, at each step, the fact of that hop comes first of all facts, for each method and the truth."""
    found = {name: [] for name in ("truth", *scores)}
    for place, (bed, effect) in enumerate(zip(beds, effects, strict=True)):
        found["truth"].append(own_fact_first(bed, by_fact(effect)))
        for name, of_seeds in scores.items():
            if of_seeds[place].steps is not None:
                found[name].append(own_fact_first(bed, of_seeds[place].steps))
    return {name: torch.tensor(shares).mean(0).tolist() for name, shares in found.items() if shares}


def by_fact(effect: Effects) -> torch.Tensor:
    """Put effects `(q, m, t)` into the order of the facts that were left out."""
    left_out = (~effect.kept).int().argmax(1)
    return effect.steps[:, left_out.argsort()]


def own_fact_first(bed: Bed, steps: torch.Tensor) -> list[float]:
    """Return the share of tests `(t,)` whose fact of hop t has the highest score at step t."""
    facts, fact = bed.train["labels"], bed.test["input_ids"]
    shares = []
    for step in range(steps.shape[-1]):
        shares.append(float((steps[..., step].argmax(1) == fact).double().mean()))
        fact = facts[fact]
    return shares


def gauge_study(cache: Path, small: bool) -> list[dict[str, Any]]:
    """Measure metasmoothness, and how well the derivative predicts leaving one out, on runs from smooth to chaotic."""
    runs = []
    for bed in gauge_beds(1 if small else 2):
        bed = shortened(bed) if small else bed
        effects = measured_effects(bed, subsets_of(bed, LEFT_OUT, 3 if small else 12), LEFT_OUT, cache)
        scores = scores_of_seeds([Subject(bed)], "unrolled, totals", unrolled_totals, cache)
        pair = judging.pairs(scores[0], effects)["total"]
        agreement = judging.judged([pair])
        runs.append({"run": bed.name, "seed": bed.seed, **gauge(bed), "agreement": agreement.as_json()})
        print(runs[-1], flush=True)
    return runs
