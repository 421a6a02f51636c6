"""The benchmarks say what they measured, and what they measure is right."""

from __future__ import annotations

import importlib
import json
import threading
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from captum_sdi.models import LoopedGPTConfig, LoopedGPTForCausalLM
from captum_sdi.scores.contract import pair_scores
from captum_sdi.scores.ranking import Ranking

pytest.importorskip("psutil", reason="needs the extra 'bench': pip install 'captum-sdi[bench]'")
pytest.importorskip("sdi", reason="needs the extra 'bench': pip install 'captum-sdi[bench]'")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_readme_shows_the_recorded_results(script) -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    sections = script("run").SECTIONS
    assert results.keys() <= sections.keys()
    assert script("tables").tables(results, sections) in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def test_the_page_on_coverage_shows_the_recorded_results(script) -> None:
    recorded = json.loads((BENCHMARKS / "coverage.json").read_text())
    table = script("coverage").table(recorded["found"])
    assert table in (BENCHMARKS / "coverage.md").read_text(encoding="utf-8")
    assert recorded["environment"]["packages"]["torch"]


def test_coverage_is_counted_of_the_winners_alone(script) -> None:
    """One test example, a total and a step: the ten highest of twelve, of which the two highest are too high."""
    coverage = script("coverage")
    exact = torch.arange(12.0)[None, :, None].expand(1, 12, 2)
    scores = exact + torch.tensor([0.0] * 10 + [3.0] * 2)[None, :, None]
    judged = coverage.judged(coverage.Estimate(scores, torch.ones(1, 12, 2)), exact)
    assert judged["all pairs, totals"] == pytest.approx(10 / 12)
    assert judged["winners by total"] == judged["winners by one step"] == pytest.approx(0.8)
    assert judged["overstated by one step"] == pytest.approx(6 / exact[0, 2:, 0].sum().item())


def test_the_picture_can_be_drawn_again(script, tmp_path: Path) -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    assert results.keys() >= script("run").PICTURED
    script("draw").draw(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.long
def test_libraries_agree_where_they_are_compared(script) -> None:
    speed, subjects = script("speed"), script("subjects")
    speed._check_exact(subjects.looped_gpt(**speed.NARROW, bias=True), witness=True)
    speed._check_exact(subjects.looped_gpt2(**speed.NARROW), witness=False)


def test_the_truth_of_the_errors_is_the_exact_score(script) -> None:
    accuracy, peers = script("accuracy"), script("peers")
    work = accuracy.trained_workload(n_tests=2, n_trains=3, width=16, training_steps=2)
    exact = peers.ours_exact(work)().trajectories
    truth = accuracy.ExactScores(work).scores
    torch.testing.assert_close(truth, exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


@pytest.mark.long
def test_a_layer_at_a_time_is_exact(script) -> None:
    paper_table, peers, subjects = script("paper_table"), script("peers"), script("subjects")
    work = subjects.looped_gpt(**paper_table.SMALL | {"width": 16, "seq": 6})
    exact = peers.ours_exact(work)().trajectories
    torch.testing.assert_close(paper_table._exact(work).float(), exact, atol=1e-5 * exact.abs().max().item(), rtol=0)


@pytest.mark.long
def test_the_largest_batch_is_one_that_need_not_be_halved(script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours goes on in halves where the memory does not suffice: that must not count as fitting."""
    paper_table, peers, subjects = script("paper_table"), script("peers"), script("subjects")
    monkeypatch.setattr(paper_table, "MOST", 16)
    work = subjects.looped_gpt(**paper_table.SMALL | {"width": 16, "seq": 6})

    def crowded(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        if len((*args, *kwargs.values())[0]) > 5:
            raise torch.OutOfMemoryError

    work.model.register_forward_pre_hook(crowded, with_kwargs=True)
    assert paper_table._largest(work, lambda work: peers.ours(work, 16)) == 5


@pytest.mark.parametrize("most", [5, 8])
def test_the_search_for_the_largest_batch_stops_where_it_should(
    script, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    paper_table = script("paper_table")
    tried = []
    monkeypatch.setattr(paper_table, "MOST", most)
    monkeypatch.setattr(paper_table, "_fits", lambda work, method, batch: not tried.append(batch))
    assert paper_table._largest(None, None) == max(tried) == most


@pytest.mark.parametrize(("name", "number"), [("cuda", 3), ("cuda:1", 1)])
@pytest.mark.parametrize(("limit", "fraction"), [(48.0, 0.75), (80.0, 1.0)])
def test_a_card_is_limited_by_its_number(
    script, monkeypatch: pytest.MonkeyPatch, name: str, number: int, limit: float, fraction: float
) -> None:
    current, limits = [3], {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=64 * 2**30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.update({device.index: share})
    )
    device, given = script("paper_table")._imitated(torch.device(name), limit)
    assert (device, given) == (torch.device("cuda", number), min(limit, 64.0))
    assert limits == {number: fraction}
    assert current[-1] == number


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint that is smaller than `SMALL`, and not of float32."""
    config = LoopedGPTConfig(vocab_size=7, n_positions=6, n_embd=16, n_head=2, n_loops=3)
    LoopedGPTForCausalLM(config).bfloat16().save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def test_a_checkpoint_is_given_its_own_tokens(script, monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    paper_table = script("paper_table")
    monkeypatch.delattr(paper_table, "looped_gpt")  # no model of the paper's size, to be thrown away
    work = paper_table._workload(paper_table.SMALL | {"batch": 50}, str(trained), torch.device("cpu"))
    assert work.train.shape == work.test.shape == (50, 6)
    assert work.train.max() == work.test.max() == 6
    assert {parameter.dtype for parameter in work.model.parameters()} == {torch.float32}


def test_a_section_is_written_before_the_next_one_fails(
    script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: Path
) -> None:
    paper_table, out = script("paper_table"), tmp_path / "out.json"

    def fails(*_: object) -> None:
        raise RuntimeError("out of luck")

    torch.set_float32_matmul_precision("high")  # as a container of NVIDIA's says
    monkeypatch.setattr(paper_table, "_overheads", lambda *_: {"ours": 2.5})
    monkeypatch.setattr(paper_table, "_errors", fails)
    monkeypatch.setattr("sys.argv", ["", "--small", "--device=cpu", f"--checkpoint={trained}", f"--out={out}"])
    with pytest.raises(RuntimeError, match="out of luck"):
        paper_table.main()
    results = json.loads(out.read_text())
    assert results["seconds over a forward pass"] == {"ours": 2.5}
    settings = results["settings"]
    assert settings["matmul precision"] == torch.get_float32_matmul_precision() == "highest"
    assert (settings["checkpoint"], settings["tau"], settings["sequence"]) == (str(trained), 3, 6)
    assert settings["model"].items() >= {"n_embd": 16, "n_loops": 3, "vocab_size": 7}.items()


def test_one_draw_has_no_standard_deviation(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["", "--small", "--device=cpu", "--draws=1", f"--out={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit):
        script("paper_table").main()
    assert "--draws=1: a standard deviation takes 2 or more" in capsys.readouterr().err


def test_nobody_watches_a_call_that_failed(script, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = script("memory")

    def fails(work, dim: int):
        def call() -> None:
            if work.train.shape[1] == 4:  # and not the narrow model that comes first
                raise MemoryError

        return call

    monkeypatch.setitem(memory.CALLS, "fails", fails)
    # A thread that is left over fails this test and does not keep it from ending.
    monkeypatch.setattr(threading, "Thread", partial(threading.Thread, daemon=True))
    before = threading.active_count()
    with pytest.raises(MemoryError):
        memory._measure("fails", {"width": 16, "tau": 2, "seq": 4})
    assert threading.active_count() == before


def test_no_number_is_not_agreement(script, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, subjects = script("speed"), script("subjects")
    work, nan = subjects.looped_gpt(**speed.NARROW), torch.full((4, 4), torch.nan)
    monkeypatch.setattr(speed, "tracincp", lambda work: lambda: nan)
    with pytest.raises(AssertionError, match="differ by nan"):
        speed._check_exact(work, witness=False)
    with pytest.raises(AssertionError, match="nan standard errors"):
        speed._check_sketched({"ours": speed.ours(work, 64)}, nan)


def test_a_simulated_index_can_be_searched(script, tmp_path: Path) -> None:
    index = script("index")
    simulated, tests = index.simulated(tmp_path, 70, 64, "float32"), torch.randn(2, 64)
    rows = torch.cat([shard.rows for shard in simulated.shards["simulated"]])
    reopened = index.SketchIndex.open(tmp_path)  # as the processes that `million` starts do
    positions, scores = index.searching(reopened, tests).top(Ranking(k=3, proponents=True))
    torch.testing.assert_close((scores, positions), tuple((tests @ rows.T).topk(3)))
    values = torch.cat([b.scores.values for b in index.searching(reopened, tests).scored_blocks(pair_scores)], dim=1)
    torch.testing.assert_close(values[..., 0], tests @ rows.T)


@pytest.mark.long
def test_truth_is_measured_and_told(script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    truth = script("truth")
    methods = ["random scores", "TracIn / SDI, 4 checkpoints", "unrolled"]
    arguments = [
        "parity",
        "--small",
        "--own",
        f"--cache={tmp_path / 'cache'}",
        f"--out={tmp_path}",
        "--methods",
        *methods,
    ]
    monkeypatch.setattr("sys.argv", ["", *arguments])
    truth.main()
    bed = json.loads((tmp_path / "truth.json").read_text())["parity"]
    assert bed["gauge"][0]["second run is bit-identical"]
    assert bed["gauge"][0]["metasmoothness"] > 0.9
    left_out = bed["agreement"]["leave one out"]["methods"]
    assert left_out.keys() == set(methods)
    # Six small updates: the derivative is nearly all there is.
    assert left_out["unrolled"]["total"]["value"] > 0.95
    assert left_out["unrolled"]["mean over steps"]["value"] > 0.95
    assert 0.8 < left_out["unrolled"]["slope"]["value"] < 1.25
    own = bed["own top 10% removed"]
    assert own["unrolled"]["value"] > 1.5 * own["random sets"]["value"] > 0
    assert "unrolled, leave one out: total" in (tmp_path / "truth.md").read_text()
    assert (tmp_path / "truth.png").stat().st_size > 10_000
    trained_before = "leave one out: 3 of 3"
    assert trained_before in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["", *arguments[:-2]])  # random scores alone
    truth.main()
    assert trained_before not in capsys.readouterr().out  # the cache has them


def test_a_stack_trains_as_torch_does(script) -> None:
    beds, training = script("retraining.beds"), script("retraining.training")
    bed = beds.shortened(beds.smooth_parity(seed=0))
    weights = torch.stack([torch.ones(bed.n), torch.linspace(0, 2, bed.n)]).double()
    model = bed.start()
    adam = bed.adam
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, adam.betas, adam.eps, adam.weight_decay)
    for rate, batch in zip(bed.rates, bed.batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        losses = bed.loss(model(input_ids=bed.train["input_ids"][batch]), bed.train["labels"][batch])
        optimizer.zero_grad()
        (weights[1, batch] * losses).mean().backward()
        optimizer.step()
    expected = training.Flat(model).start
    for trained in (training.train(bed, weights).weights[1], training.train(bed, weights[1:]).weights[0]):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)


def test_metasmoothness_by_hand(script) -> None:
    metasmoothness = script("retraining.gauge").metasmoothness
    first, second = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    assert metasmoothness(first, second, torch.tensor([3.0, 4.0, 5.0])) == 1
    assert metasmoothness(first, second, torch.tensor([3.0, 1.0, 4.0])) == pytest.approx((3 - 1 + 4) / 8)


def test_the_truth_that_is_recorded_is_the_one_that_is_told(script) -> None:
    recorded = json.loads((BENCHMARKS / "truth.json").read_text())
    assert script("retraining.tables").document(recorded) == (BENCHMARKS / "truth.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_real_sizes_run_in_small_on_a_cpu(script) -> None:
    """Peak, time and checks of a shape that takes no memory; the model comes back as it was."""
    sizes = script("real_sizes")
    model = sizes.looped_llama(sizes.SMALL, 2, torch.device("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    forwards = [module.forward for module in model.modules()]
    row = sizes.measured(model, sizes.SMALL, sizes.tokens(1, 8, 128, 1), rounds=1)
    assert row["time over the pass"][1] > 0
    assert [module.forward for module in model.modules()] == forwards
    assert all(parameter.requires_grad for parameter in model.parameters())
    found = {"environment": {}, "tokens": 8, "loop steps": 2, "weights, GB": 0.0, "batch 1": row}
    assert "| small | 0.00 GB | 8 | 1 |" in sizes.table({"small": found})
    ouro = sizes.SHAPES["Ouro-1.4B"]
    assert sizes.shallower(ouro, 2)["layers"] == 2
    assert sizes.shallower(ouro, None) == ouro


@pytest.mark.long
def test_a_simulated_index_is_opened_scored_and_searched(script, tmp_path: Path) -> None:
    million = script("million")
    million.written(tmp_path, 100)
    found = million.looked_at(tmp_path)
    assert found["opening, s"] < 60
    table = million.page({"environment": {}, "100 examples": {"GB": 0.001, **found}})
    assert "| 1,000,000,000 | 10,000 GB |" in table
