"""quanda's metrics on `SDIInfluence`, through the class of docs/howto/quanda.md, held to their definitions.

quanda wants another captum than this library is developed with: `make test-quanda` has an environment of its own.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("quanda") is None:
    pytest.skip("quanda is not here: make test-quanda", allow_module_level=True)
try:
    import torchvision  # noqa: F401  # quanda imports it
except RuntimeError:
    # Built for CUDA, its operators do not load beside a CPU build of torch, and it only wants to know that they exist.
    OPERATORS = torch.library.Library("torchvision", "DEF")  # as long as this object lives
    OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from cases import looped_gpt
from quanda.metrics.downstream_eval import MislabelingDetectionMetric, MRRMetric, RecallAtKMetric
from quanda.metrics.ground_truth import LinearDatamodelingMetric
from reference import spread

from captum_sdi import SDIInfluence
from captum_sdi.evaluate import linear_datamodeling_score

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "quanda.md"
N_TRAIN, N_TESTS, STEP = 12, 3, 1


@pytest.fixture(scope="module")
def explainer_class() -> Any:
    """The class of the page."""
    names: dict[str, Any] = {"__name__": "quanda_page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names["StepDecomposed"]


@pytest.fixture(scope="module")
def model() -> Any:
    return spread(looped_gpt()())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 11, (N_TRAIN + N_TESTS, 6), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


@pytest.fixture(scope="module")
def train(rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return rows[:N_TRAIN]


@pytest.fixture(scope="module")
def tests(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows[N_TRAIN:]]) for name in rows[0]}


@pytest.fixture(scope="module", params=[None, STEP], ids=["total", "step"])
def explained(request: pytest.FixtureRequest, explainer_class: Any, model: Any, train: Any, tests: Any) -> Any:
    """The step that was asked about, and what the page's class explains."""
    explainer = explainer_class(model, train, batch_size=4, step=request.param)
    return request.param, explainer.explain({"input_ids": tests["input_ids"]}, tests["labels"])


def test_an_explanation_is_influence(explained: Any, model: Any, train: Any, tests: Any) -> None:
    step, scores = explained
    result = SDIInfluence(model, train, batch_size=4).step_influence(tests)
    expected = result.influence_scores if step is None else result.trajectories[..., step]
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (N_TESTS, N_TRAIN)


def test_mean_reciprocal_rank_and_recall(explained: Any, model: Any, train: Any) -> None:
    _, scores = explained
    entails = torch.zeros(N_TESTS, N_TRAIN, dtype=torch.bool)
    ranks = (2, 1, 5)
    for test, rank in enumerate(ranks):
        entails[test, scores[test].argsort(descending=True)[rank - 1 :]] = True  # the first of them is at this rank
    reciprocal = MRRMetric(model, train)
    reciprocal.update(scores, entails)
    assert reciprocal.compute()["score"] == pytest.approx(sum(1 / rank for rank in ranks) / N_TESTS)
    recall = RecallAtKMetric(model, train, k=2)
    recall.update(scores, entails)
    assert recall.compute()["score"] == pytest.approx(2 / 3)  # of ranks 2, 1 and 5


def test_mislabelled_examples(explainer_class: Any, model: Any, train: Any) -> None:
    flipped = [1, 4, 7]
    metric = MislabelingDetectionMetric(
        model, train, flipped, explainer_cls=explainer_class, expl_kwargs={"batch_size": 4, "step": STEP}
    )
    own = SDIInfluence(model, train, batch_size=4).step_self_influence().trajectories[:, STEP]
    assert own.sort().values.diff().min() > 1e-4 * N_TRAIN  # quanda adds 1e-4 times the position, against ties
    found = torch.tensor([index in flipped for index in own.argsort(descending=True).tolist()])
    curve = found.float().cumsum(0) / len(flipped)
    area = (curve[1:] + curve[:-1]).sum() / 2 / N_TRAIN
    assert metric.compute()["score"] == pytest.approx(float(area))


def test_the_linear_datamodeling_score_is_this_librarys(explained: Any, model: Any, train: Any, tests: Any) -> None:
    _, scores = explained
    draw = torch.Generator().manual_seed(0)
    kept = [torch.randperm(N_TRAIN, generator=draw)[:6].tolist() for _ in range(8)]
    outputs = torch.randn(len(kept), N_TESTS, generator=draw)  # of models trained on the subsets
    files = [f"model-{number}" for number in range(len(kept))]
    metric = LinearDatamodelingMetric(model, train, m=len(kept), subset_ids=kept, subset_ckpt_filenames=files)
    logits = {number: row.unsqueeze(1) for number, row in enumerate(outputs)}
    metric.update(scores, torch.zeros(N_TESTS), tests, subset_logits=logits)
    subsets = torch.zeros(len(kept), N_TRAIN, dtype=torch.bool)
    for number, indices in enumerate(kept):
        subsets[number, indices] = True
    ours = linear_datamodeling_score(scores, subsets, losses=-outputs.T)
    assert metric.compute()["score"] == pytest.approx(float(ours.value), abs=1e-6)
