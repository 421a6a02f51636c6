"""The question of ``captum-sdi score``: the strongest training examples of one sign, or of both."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_sdi.cli.printing import shows_progress
from captum_sdi.cli.rows import JsonLines
from captum_sdi.influence import SDIInfluence
from captum_sdi.scores.result import StepInfluence


class Scored(NamedTuple):
    """Scores, and in which of their columns proponents and opponents stand."""

    scores: StepInfluence
    roles: dict[str, range]


def score_queries(sdi: SDIInfluence, queries: JsonLines, n_train: int, options: Namespace) -> Scored:
    """Return the scores of the strongest training examples of each query; of both signs, none stands there twice."""
    counts = {"opponents" if options.opponents else "proponents": options.k}
    if options.both:
        counts = {"proponents": min(options.k, (n_train + 1) // 2), "opponents": min(options.k, n_train // 2)}
    parts, roles, n_columns = [], {}, 0
    for role, count in counts.items():
        if count:
            part = strongest(sdi, queries, count, options, proponents=role == "proponents")
            n_found = part.influence_scores.shape[1]
            parts.append(part)
            roles[role] = range(n_columns, n_columns + n_found)
            n_columns += n_found
    return Scored(side_by_side(parts), roles)


def strongest(
    sdi: SDIInfluence,
    queries: JsonLines,
    k: int,
    options: Namespace,
    *,
    proponents: bool,
) -> StepInfluence:
    """Return the scores of the k strongest training examples of one sign."""
    try:
        return sdi.step_influence(
            queries,
            k,
            proponents=proponents,
            show_progress=shows_progress(options),
            rank_by=None if options.rank_by is None else options.rank_by - 1,
            rerank=options.rerank,
        )
    except ValueError as error:
        if str(error).startswith("rank_by="):  # which counts from 0
            raise ValueError(f"--rank-by {options.rank_by}: no query runs that many loop steps.") from error
        raise


def side_by_side(parts: list[StepInfluence]) -> StepInfluence:
    """Join results of the same test examples along their training examples."""
    first = parts[0]
    joined = {}
    for field in dataclasses.fields(first):
        tensors = [getattr(part, field.name) for part in parts]
        if field.name != "n_steps" and all(isinstance(tensor, Tensor) for tensor in tensors):
            joined[field.name] = torch.cat(tensors, dim=1)
    return dataclasses.replace(first, **joined)
