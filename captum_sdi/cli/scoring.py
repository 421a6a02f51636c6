"""The question of ``captum-sdi score``: the strongest training examples of one sign, or of both."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_sdi.cli.loading import depth_kwargs
from captum_sdi.cli.printing import shows_progress
from captum_sdi.cli.tables import AnyExamples, TableRows, open_examples
from captum_sdi.data.encoder import Encoder
from captum_sdi.influence import SDIInfluence
from captum_sdi.scores.result import StepInfluence


def open_queries(
    options: Namespace,
    model: Any,
    encoder: Encoder,
    n_loops: int | None,
) -> AnyExamples:
    """Return the queries of a file, or the one that was typed, which a model of that depth answers."""
    if options.prompt is None:
        if options.completion is not None:
            raise ValueError("--completion is the answer to --prompt; the answers of --query stand in its file.")
        return open_examples(
            options.query,
            encoder,
            split=options.split,
            text_column=options.text_column,
            show_progress=shows_progress(options),
        )
    completion = options.completion
    if completion is None:
        completion = greedy_answer(model, encoder, options.prompt, options.generate, n_loops)
    return TableRows(Path("--prompt"), [{"prompt": options.prompt, "completion": completion}], encoder)


@torch.no_grad()
def greedy_answer(
    model: Any,
    encoder: Encoder,
    prompt: str,
    n_tokens: int,
    n_loops: int | None,
) -> str:
    """Return what the model answers at the depth at which it is asked: the likeliest token, again and again.

    Raises:
        ValueError: If there is no tokenizer, or the model ends at once.
    """
    if encoder.tokenizer is None:
        raise ValueError("--prompt needs a tokenizer, and there is none beside the model: name one with --tokenizer.")
    row, _ = encoder({"text": prompt})
    given = torch.tensor([row["input_ids"]], device=model.device)
    answer = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=n_tokens,
        do_sample=False,
        use_cache=False,  # a looped layer has no entry of its own for each repetition
        **(depth_kwargs(n_loops) or {}),
        pad_token_id=encoder.tokenizer.pad_token_id or 0,
    )
    full_text = encoder.tokenizer.decode(answer[0], skip_special_tokens=True)
    start = encoder.tokenizer.decode(given[0], skip_special_tokens=True)
    completion = str(full_text).removeprefix(start)
    if not completion:
        raise ValueError("the model ends at once after --prompt: give it a --completion.")
    return completion


class Scored(NamedTuple):
    """Scores, and in which of their columns proponents and opponents stand."""

    scores: StepInfluence
    roles: dict[str, range]


def score_queries(
    sdi: SDIInfluence,
    queries: AnyExamples,
    n_train: int,
    options: Namespace,
) -> Scored:
    """Return the scores of the strongest training examples of each query; of both signs, none stands there twice."""
    counts = {"opponents" if options.opponents else "proponents": options.k}
    if options.both:
        n_proponents = min(options.k, (n_train + 1) // 2)
        n_opponents = min(options.k, n_train // 2)
        counts = {"proponents": n_proponents, "opponents": n_opponents}
    parts, roles, n_columns = [], {}, 0
    for role, count in counts.items():
        if count:
            role_scores = strongest(
                sdi,
                queries,
                count,
                options,
                proponents=role == "proponents",
            )
            n_found = role_scores.influence_scores.shape[1]
            parts.append(role_scores)
            roles[role] = range(n_columns, n_columns + n_found)
            n_columns += n_found
    return Scored(side_by_side(parts), roles)


def strongest(
    sdi: SDIInfluence,
    queries: AnyExamples,
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
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(first):
        tensors = [getattr(influence, field.name) for influence in parts]
        if field.name != "n_steps" and all(isinstance(tensor, Tensor) for tensor in tensors):
            joined[field.name] = torch.cat(tensors, dim=1)
    return dataclasses.replace(first, **joined)
