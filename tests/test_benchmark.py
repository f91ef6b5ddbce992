"""benchmark.py: what it measures of the evaluation at several sizes, and of losses with large batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import auxiliaries
import benchmark
import losses


def test_evaluation_at_several_sizes(tmp_path: Path) -> None:
    table, plot = tmp_path / "benchmark.json", tmp_path / "sizes.svg"
    benchmark.main(["evaluation", "--sizes", "60", "300", "--json", str(table), "--plot", str(plot)])
    rows = json.loads(table.read_text())["results"]["evaluation"]
    assert [row["what"] for row in rows[::4]] == ["60 queries, 60 items", "300 queries, 300 items"]
    assert [row["who"] for row in rows[:4]] == [
        "bare products",
        "Recall and MAP@R",
        "memory above the start",
        "flops of the products",
    ]
    assert rows[7]["value"] == pytest.approx(2 * 300 * 300 * 128 / 1e9, abs=1e-3)
    assert "<svg" in plot.read_text()


def test_more_items_than_are_compared_with_each_other_take_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MAX_OWN", 200)
    monkeypatch.setattr(benchmark, "NUM_QUERIES", 50)
    monkeypatch.setattr(benchmark.plots, "save_sizes", lambda path, points: None)
    rows = benchmark.benchmark_sizes([300], Path("sizes.svg"))
    assert rows[0]["what"] == "50 queries, 300 items"


@pytest.mark.parametrize("what", [[], ["losses"], ["evaluation", "losses"]])
def test_sizes_are_of_the_evaluation(what: list[str]) -> None:
    with pytest.raises(auxiliaries.UserError, match="--sizes is of the evaluation"):
        benchmark.main([*what, "--sizes"])


SMALL = 512  # embeddings; of 512 dimensions, as large batches have
SCALE = (SMALL / benchmark.LARGE[0]) ** 2  # of matrices (B, B)


def memory_of_tensors(run: Callable[[], object]) -> int:
    """The most bytes that tensors take at a time while something runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = sorted(events, key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in in_order), default=0)


def test_losses_and_samplers_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GiB for 4,096 embeddings of 512 dimensions; pairs of pairs of 1,024 classes alone would take 2.5."""
    monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", round(losses.ELEMENTS_AT_ONCE * SCALE))
    torch.manual_seed(0)
    steps = benchmark.large_steps(SMALL, benchmark.LARGE[1], torch.device("cpu"))
    needed = {step: memory_of_tensors(run) for step, run in steps.items()}
    assert max(needed.values()) < 2**31 * SCALE, needed


def test_the_table_of_large_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "LARGE", (64, 8))
    benchmark.main(["losses", "--large", "--json", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["results"]["losses"]
    steps = {row["what"] for row in rows}
    assert {*losses.LOSSES, *(f"{method} sampling" for method in losses.Sampler().methods)} <= steps
    assert {(row["who"], row["unit"], row["of"]) for row in rows} == {
        ("time", "s", "the product"),
        ("peak memory", "GiB", "the product"),
    }
    assert rows[0]["times ours"] == 1
    with pytest.raises(auxiliaries.UserError, match="--large is of losses or of steps"):
        benchmark.main(["records", "--large"])


@pytest.mark.slow
def test_the_table_of_gradient_caching(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "CHUNK", 8)
    monkeypatch.setattr(benchmark, "WHOLE", 128)
    benchmark.main(["step", "--large", "--json", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["results"]["step"]
    assert [row["what"] for row in rows[::2]] == ["--bs 8", "--bs 128 --grad_cache 8", "--bs 128"]
    assert {row["who"] for row in rows} == {"peak memory", "time"}
    _, cached, whole = (row["value"] for row in rows if row["who"] == "peak memory")
    assert cached < whole


@pytest.mark.slow
def test_the_table_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"128": "32", "6": "1"}  # px and iterations
    monkeypatch.setattr(benchmark, "RANK_FLAGS", [small.get(flag, flag) for flag in benchmark.RANK_FLAGS])
    one, two = benchmark.benchmark_ranks(num_epochs=2)
    assert (one["who"], two["who"]) == ("one process with one core", "two with a core each")
    assert one["times ours"] == 1
    assert two["times ours"] == pytest.approx(two["value"] / one["value"], abs=0.01)
