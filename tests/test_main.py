"""Whole runs: flags, one training run end to end, what it writes, its determinism, and bad input."""

from __future__ import annotations

import argparse
import csv
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, make_tree, save_image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import auxiliaries
import config
import datasets
import evaluate
import evaluate_runs
import features
import image_cache
import loggers
import losses
import main
import methods
import netlib
import plots
import protocol
import records
import retrieval
import runs
import transforms
from auxiliaries import UserError

Flags = Callable[..., list[str]]

pytestmark = pytest.mark.usefixtures("without_pictures")

PAIRS = [
    *[
        (loss, sampling)
        for loss in ("marginloss", "triplet")
        for sampling in ("distance", "semihard", "softhard", "random")
    ],
    ("npair", "npair"),
    ("proxynca", None),
    ("crossentropy", None),
]


# Two folds of two classes for training and two for validation; the fold's number is to follow.
FOLD = ["--split_scheme", "cross_validation", "--num_training_partitions", "2", "--num_training_sets", "2", "--fold"]


def run(flags: list[str]) -> dict[str, float]:
    return main.main(config.parse(flags))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def names_in(folder: Path) -> set[str]:
    """What a run folder shows: files, and folders with a slash behind their name."""
    shown = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {f"{path.name}/" if path.is_dir() else path.name for path in shown}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


VERIFIED = ["--eval_metrics", "Verification accuracy", "--eval_metric_for_best_epoch", "EER"]


@pytest.mark.parametrize("watched", [["val"], ["val", "test"]], ids=str)
def test_the_threshold_of_verification_is_that_of_the_validation_classes(
    small_flags: Flags, results: Path, watched: list[str]
) -> None:
    flags = small_flags(*FOLD, "1", "--n_epochs", "2", "--lr", "1e-2", "--iterations_per_epoch", "1", *VERIFIED)
    metrics = run([*flags, "--splits_to_eval", *watched])
    val, test = (rows_of(results / "run" / f"log_{kind}_Base.csv") for kind in ("val", "test"))
    assert list(val[0])[2:] == ["Recall @ 1", "EER", "Verification accuracy", "Verification threshold"]
    chosen = {row["Epochs"]: row["Verification threshold"] for row in val}
    assert len(set(chosen.values())) == 2
    assert {row["Epochs"]: row["Verification threshold"] for row in test}.items() <= chosen.items()
    summary = auxiliaries.load_json(results / "run" / "summary.json")["selected"]
    epochs = sorted((float(row["EER"]), int(row["Epochs"])) for row in val)
    assert summary["epoch"] == epochs[0][1]  # lower is better
    assert summary["test"]["Verification threshold"] == summary["val"]["Verification threshold"]
    assert metrics == summary["test"]

    evaluation = ["--evaluate", str(results / "run"), "--splits_to_eval", "test", "val"]
    again = main.command(evaluation)
    for split in ("val", "test"):
        assert again[f"{split} Verification accuracy"] == pytest.approx(summary[split]["Verification accuracy"])
    with pytest.raises(UserError, match="needs a threshold from validation classes: give --splits_to_eval val test"):
        main.command(evaluation[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "sampling"), PAIRS)
def test_every_loss_and_sampling_trains(small_flags: Flags, results: Path, loss: str, sampling: str | None) -> None:
    flags = small_flags("--loss", loss, "--samples_per_class", "4", "--lr", "1e-3")
    metrics = run(flags + (["--sampling", sampling] if sampling else []))
    assert set(metrics) == {"NMI", "F1", *(f"Recall @ {k}" for k in (1, 2, 4, 8))}
    assert all(0 <= value <= 1 for value in metrics.values())
    checkpoint = auxiliaries.load_checkpoint(results / "run" / "checkpoint.pth.tar")
    opt = config.resolve(config.parse(flags))
    untrained = netlib.networkselect(opt).state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in checkpoint["state_dict"].items())


def test_run_folder_holds_what_its_readme_lists(small_flags: Flags, results: Path) -> None:
    flags = small_flags("--n_epochs", "3", "--grad_measure", "--dist_measure", "--check_untrained_accuracy")
    metrics = run(flags)
    folder = results / "run"
    rows = re.findall(r"^\|([^|]*`[^|]*)\|", (ROOT / "Training_Results/README.md").read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    of_other_runs = {
        "log_test_Base.csv",
        "log_train_eval_Base.csv",
        "evaluation.json",
        "exclude.csv",  # see tests/test_csv_data.py
        "report.html",  # see tests/test_report.py
        "attention.png",
        "verification.json",  # see tests/test_inference.py
        ".training.index/",
        *(name for name in listed if "<" in name),
    }
    assert of_other_runs <= listed
    assert names_in(folder) - {"git.diff"} == listed - of_other_runs - {"git.diff"}  # of a changed tree

    train_rows, val_rows = rows_of(folder / "log_train_Base.csv"), rows_of(folder / "log_val_Base.csv")
    assert [row["Epochs"] for row in train_rows] == ["1", "2", "3"]
    assert [row["Epochs"] for row in val_rows] == ["-1", "0", "1", "2", "3"]
    assert list(val_rows[0]) == ["Epochs", "Time", *metrics]
    assert len(rows_of(folder / "distance_measures_Train.csv")) == 4

    best, last = (auxiliaries.load_checkpoint(folder / f"{name}.pth.tar") for name in ("checkpoint", "last"))
    recalls = [float(row["Recall @ 1"]) for row in val_rows[2:]]
    assert best["epoch"] == last["best_epoch"] == 1 + int(np.argmax(recalls))
    assert best["metrics"] == metrics == {k: float(v) for k, v in val_rows[best["epoch"] + 1].items() if k in metrics}
    assert last["epoch"] == 3
    assert [row["Epochs"] for row in last["history"]["val"]] == [-1, 0, 1, 2, 3]
    assert last["optimizer"]["state"]
    assert "beta" in last["criterion"]

    gradients = dict(np.load(folder / "grad_measure.npz"))
    assert gradients.pop("iteration").tolist() == list(range(1, 10))
    assert {array.shape for array in gradients.values()} == {(9, 1024)}
    assert "margin: 0.2\n" in (folder / "Parameter_Info.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
def test_network_comes_back_from_hypa_and_checkpoint(
    small_flags: Flags, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool
) -> None:
    """Issue: also for a run that was flagged as pretrained, and with downloads blocked."""
    flags = small_flags("--arch", "googlenet", "--crop_size", "64", "--embed_dim", "16", "--kernels", "0")
    if pretrained:
        weights = tmp_path / "googlenet.pth"
        network, _ = netlib.ARCHS["googlenet"].build(netlib.Weights.RANDOM)
        torch.save(network.state_dict(), weights)
        flags = [flag for flag in flags if flag != "--not_pretrained"] + ["--weights", str(weights)]
    spaces = []
    evaluate_run = evaluate.evaluate

    def remembering(*args: Any) -> tuple[dict[str, float], list[evaluate.EmbeddingSpace]]:
        metrics, (space,) = evaluate_run(*args)
        spaces.append(space)
        return metrics, [space]

    monkeypatch.setattr(evaluate, "evaluate", remembering)
    run(flags)

    def blocked(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", blocked)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", blocked)
    readme = (ROOT / "Training_Results/README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert snippet
    names: dict[str, Any] = {}
    opt = config.resolve(config.parse(flags))
    photo = str(Path(opt.source_path) / "tiny/images/class_0/0.jpg")
    exec(snippet[1].replace("Training_Results/glyphs/demo", str(results / "run")).replace("photo.jpg", photo), names)
    net = names["model"].net
    assert names["embeddings"].shape == (1, 16)
    assert net.backbone.transform_input is pretrained

    loaders = datasets.give_dataloaders(opt, datasets.read_splits(opt.dataset, opt.source_path))
    again = evaluate.embed(net, loaders.test[0].query, torch.device("cpu"))
    assert torch.equal(again, spaces[0].query)


@pytest.mark.slow
def test_existing_run_folder_is_never_overwritten(small_flags: Flags, results: Path) -> None:
    for _ in range(3):
        run(small_flags())
    assert {path.name for path in results.iterdir()} == {"run", "run_1", "run_2"}


def keep(splits: datasets.Splits, root: Path) -> datasets.Splits:
    """A reader that has its splits already."""
    return splits


@pytest.mark.slow
def test_query_and_gallery_and_several_test_sets(
    small_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = datasets.read_splits("tiny", config.parse(small_flags()).source_path)
    images = whole.test[0].query
    query, gallery = images.subset(np.arange(len(images)) % 3 == 0), images.subset(np.arange(len(images)) % 3 > 0)
    one = datasets.Splits(whole.train, test=[datasets.RetrievalSet("test", query, gallery)])
    two = datasets.Splits(whole.train, test=[datasets.RetrievalSet("a", images), datasets.RetrievalSet("b", gallery)])
    for name, splits in (("one", one), ("two", two)):
        monkeypatch.setitem(datasets.DATASETS, name, datasets.DatasetSpec(partial(keep, splits), made_here=True))
        metrics = run(small_flags("--dataset", name, "--k_vals", "2"))
        expected = ["NMI", "F1", "Recall @ 1", "Recall @ 2"]
        assert list(metrics) == (expected if name == "one" else [f"Set {i} {key}" for i in (0, 1) for key in expected])


OF_THE_MACHINE = ("Time", "Images/s", "Peak Memory")


def trained(flags: list[str], results: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    run(flags)
    folder = max(results.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    rows = rows_of(folder / "log_train_Base.csv") + rows_of(folder / "log_val_Base.csv")
    state = auxiliaries.load_checkpoint(folder / "last.pth.tar")
    weights = {**state["state_dict"], **{f"criterion.{name}": value for name, value in state["criterion"].items()}}
    return weights, [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("loss", list(losses.LOSSES))
def test_same_seed_gives_the_same_run_whatever_the_workers(small_flags: Flags, results: Path, loss: str) -> None:
    flags = small_flags(
        "--loss", loss, "--samples_per_class", "2", "--embed_dim", "512", "--lr", "1e-3", "--n_epochs", "2"
    )
    weights, rows = trained([*flags, "--kernels", "0"], results)
    for kernels in ("1", "2") if loss == "marginloss" else ("2",):
        other_weights, other_rows = trained([*flags, "--kernels", kernels], results)
        assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
        assert rows == other_rows
    other_weights, _ = trained([*flags, "--seed", "2"], results)
    assert not torch.equal(weights["embedding.weight"], other_weights["embedding.weight"])


@pytest.mark.slow
def test_evaluation_never_changes_training(small_flags: Flags, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake 2: neither more measures nor other results of the test classes may steer training."""
    flags = small_flags("--n_epochs", "3", "--lr", "1e-3")
    weights, _ = trained(flags, results)
    monkeypatch.setattr(records, "mean_over_sets", lambda metrics, name: -metrics[name])
    other, _ = trained(
        [*flags, "--dist_measure", "--k_vals", "3", "--check_untrained_accuracy", "--eval_bs", "5"], results
    )
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


def test_defaults_are_resolved_from_what_they_depend_on() -> None:
    def resolved(*flags: str) -> argparse.Namespace:
        return config.resolve(config.parse(list(flags)))

    opt = resolved()
    assert (opt.dataset, opt.arch, opt.loss, opt.sampling) == ("cub200", "resnet50", "marginloss", "distance")
    assert (opt.embed_dim, opt.crop_size, opt.resize, opt.eval_bs) == (128, 224, 256, 112)
    assert (opt.samples_per_class, opt.batch_sampler, opt.normalize) == (4, "class_balanced", True)
    assert opt.freeze_batchnorm is True
    assert opt.k_vals == [1, 2, 4, 8]
    opt = resolved("--arch", "googlenet", "--loss", "npair", "--not_pretrained", "--dataset", "in-shop")
    assert (opt.embed_dim, opt.crop_size, opt.resize, opt.sampling) == (512, 227, 256, "npair")
    assert opt.freeze_batchnorm is False  # mistake 7
    assert opt.normalize is False
    assert opt.k_vals == [1, 10, 20, 30, 50]
    for loss in ("proxynca", "crossentropy"):
        opt = resolved("--loss", loss)
        assert (opt.sampling, opt.samples_per_class, opt.batch_sampler) == (None, 1, "shuffled")
    assert resolved("--dataset", "online_products", "--k_vals", "3").k_vals == [3]  # mistake 10
    assert resolved("--no-freeze_batchnorm").freeze_batchnorm is False
    assert resolved("--crop_size", "112").resize == 128
    with pytest.raises(AttributeError):
        opt.lr = 1.0


@pytest.mark.slow
def test_learning_rates_drop_after_tau(small_flags: Flags, results: Path) -> None:
    """Mistake 15: the logged rate is the one that the epoch was trained with."""
    run(small_flags("--n_epochs", "4", "--lr", "1e-2", "--tau", "1", "3", "--gamma", "0.5"))
    rows = rows_of(results / "run" / "log_train_Base.csv")
    assert [float(row["Learning Rate"]) for row in rows] == pytest.approx([1e-2, 5e-3, 5e-3, 2.5e-3])
    run(small_flags("--n_epochs", "3", "--lr", "1e-2", "--scheduler", "exp", "--gamma", "0.1"))
    rows = rows_of(results / "run_1" / "log_train_Base.csv")
    assert [float(row["Learning Rate"]) for row in rows] == pytest.approx([1e-2, 1e-3, 1e-4])
    run(small_flags("--n_epochs", "2", "--scheduler", "none"))
    assert len({row["Learning Rate"] for row in rows_of(results / "run_2" / "log_train_Base.csv")}) == 1


Scripts = dict[str, list[dict[str, float]]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scripts], dict[str, list[torch.Tensor]]]:
    """A function that makes evaluations of a set (`val`, `test`) come out as they are told to, one after the other.

    It returns a dict that takes, for each set, the embedding layers of the networks that were evaluated. Nothing is
    drawn, which takes longer than all the rest.
    """
    monkeypatch.setattr(plots, "save_info_plot", lambda *_: None)
    monkeypatch.setattr(plots, "draw_retrievals", lambda *_: None)
    monkeypatch.setattr(records.Records, "add_picture", lambda *_: None)

    def told(scripts: Scripts) -> dict[str, list[torch.Tensor]]:
        evaluate_sets, remaining = evaluate.evaluate, {name: iter(results) for name, results in scripts.items()}
        networks: dict[str, list[torch.Tensor]] = {name: [] for name in scripts}

        def scripted(net: Any, sets: Any, *args: Any) -> tuple[dict[str, float], list[evaluate.EmbeddingSpace]]:
            _, spaces = evaluate_sets(net, sets, *args)
            if isinstance(net, netlib.EmbeddingNet):
                networks[sets[0].name].append(net.last_linear.weight.detach().clone())
            return dict(next(remaining[sets[0].name])), spaces

        monkeypatch.setattr(evaluate, "evaluate", scripted)
        return networks

    return told


def scores(name: str, *values: float) -> list[dict[str, float]]:
    return [{name: value} for value in values]


def epochs_of(path: Path) -> list[int]:
    return [int(row["Epochs"]) for row in rows_of(path)]


@pytest.mark.parametrize(("interval", "evaluated"), [("2", [2, 4, 5]), ("7", [5])])
def test_evaluations_come_at_intervals_and_at_the_end(
    small_flags: Flags, results: Path, script: Any, interval: str, evaluated: list[int]
) -> None:
    script({"test": scores("Recall @ 1", 0.2, 0.9, 0.4)})
    metrics = run(small_flags("--n_epochs", "5", "--save_interval", interval, "--iterations_per_epoch", "1"))
    folder = results / "run"
    assert epochs_of(folder / "log_train_Base.csv") == [1, 2, 3, 4, 5]
    assert epochs_of(folder / "log_val_Base.csv") == evaluated
    last, best = (auxiliaries.load_checkpoint(folder / f"{name}.pth.tar") for name in ("last", "checkpoint"))
    selected = 4 if interval == "2" else 5
    assert (last["epoch"], last["best_epoch"], best["epoch"]) == (5, selected, selected)
    assert best["metrics"] == metrics == {"Recall @ 1": 0.9 if interval == "2" else 0.2}


@pytest.mark.parametrize(
    ("seconds", "drawn"),
    [
        (
            1,
            [
                "retrievals of epoch 1",
                "curves of 1 epochs, 1 best",
                "retrievals of epoch 3",
                "curves of 4 epochs, 3 best",
            ],
        ),
        (
            60,
            [
                "retrievals of epoch 1",
                "curves of 1 epochs, 1 best",
                "curves of 2 epochs, 1 best",
                "retrievals of epoch 3",
                "curves of 3 epochs, 3 best",
                "curves of 4 epochs, 3 best",
            ],
        ),
    ],
)
def test_pictures_take_a_fiftieth_of_the_time_and_show_the_end(
    small_flags: Flags, script: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, drawn: list[str]
) -> None:
    """Epochs of 1 s or 60 s, and pictures that take 0.5 s each."""
    now, shown, train = 0.0, [], main.train_one_epoch
    script({"test": scores("Recall @ 1", 0.5, 0.4, 0.9, 0.8)})

    def train_for_seconds(*args: Any) -> Any:
        nonlocal now
        now += seconds
        return train(*args)

    def draw_curves(path: Path, train_rows: Any, val_rows: Any, best_epoch: int, *_: Any) -> None:
        nonlocal now
        now += 0.5
        assert len(train_rows) == len(val_rows)
        shown.append(f"curves of {len(val_rows)} epochs, {best_epoch} best")

    def add_picture(log: Any, name: str, path: Path, epoch: int) -> None:
        nonlocal now
        now += 0.5
        shown.append(f"retrievals of epoch {epoch}")

    monkeypatch.setattr(main, "train_one_epoch", train_for_seconds)
    monkeypatch.setattr(plots, "save_info_plot", draw_curves)
    monkeypatch.setattr(records.Records, "add_picture", add_picture)
    monkeypatch.setattr(evaluate_runs, "time", SimpleNamespace(monotonic=lambda: now))
    run(small_flags("--n_epochs", "4", "--iterations_per_epoch", "1"))
    assert shown == drawn


def test_resumed_run_draws_what_the_stopped_one_did_not(small_flags: Flags, results: Path) -> None:
    flags, pictures = small_flags("--n_epochs", "1"), ["sample_recoveries.png", "InfoPlot_Base.svg"]
    run(flags)
    drawn = [(results / "run" / name).read_bytes() for name in pictures]
    for name in pictures:
        (results / "run" / name).unlink()
    main.main(config.parse(flags), results / "run")
    assert [(results / "run" / name).read_bytes() for name in pictures] == drawn


@pytest.mark.parametrize(
    ("values", "trained_epochs", "selected"),
    [
        ((0.5, 0.6, 0.6, 0.4, 0.9, 0.9), 4, 2),
        ((0.5, 0.4, 0.6, 0.5, 0.7, 0.6), 6, 5),
        ((0.5, 0.4, 0.3, 0.9, 0.9, 0.9), 3, 1),
    ],
)
def test_patience_stops_a_run_that_does_not_improve(
    small_flags: Flags,
    results: Path,
    script: Any,
    capsys: pytest.CaptureFixture[str],
    values: tuple[float, ...],
    trained_epochs: int,
    selected: int,
) -> None:
    script({"test": scores("Recall @ 1", *values)})
    run(small_flags("--n_epochs", "6", "--patience", "2", "--iterations_per_epoch", "1"))
    folder = results / "run"
    for log in ("train", "val"):
        assert epochs_of(folder / f"log_{log}_Base.csv") == list(range(1, trained_epochs + 1))
    assert ("has not improved for 2 epochs: stopping" in capsys.readouterr().out) == (trained_epochs < 6)
    summary = auxiliaries.load_json(folder / "summary.json")
    assert (summary["selected"]["epoch"], summary["last"]["epoch"]) == (selected, trained_epochs)


def test_patience_waits_for_evaluations(small_flags: Flags, results: Path, script: Any) -> None:
    """Nothing can improve between them: here every evaluation is better than the one before."""
    script({"test": scores("Recall @ 1", 0.1, 0.2)})
    run(small_flags("--n_epochs", "6", "--save_interval", "3", "--patience", "2", "--iterations_per_epoch", "1"))
    assert epochs_of(results / "run" / "log_val_Base.csv") == [3, 6]


@pytest.mark.slow
def test_what_is_logged_of_iterations_changes_no_training(small_flags: Flags, results: Path) -> None:
    flags = small_flags("--n_epochs", "2", "--iterations_per_epoch", "4", "--lr", "1e-3", "--fc_lr_mul", "2")
    states = []
    for number, (log_every, logged) in enumerate([("1", [*range(1, 9)]), ("3", [3, 6]), ("0", [])]):
        run([*flags, "--log_every", log_every, *(["--no-tensorboard"] if log_every == "0" else [])])
        folder = results / (f"run_{number}" if number else "run")
        states.append(auxiliaries.load_checkpoint(folder / "last.pth.tar")["state_dict"])
        assert (folder / "log_iterations.csv").exists() == bool(logged)
        assert (folder / "tensorboard").exists() == bool(logged)
        if logged:
            rows = rows_of(folder / "log_iterations.csv")
            assert [int(row["Iteration"]) for row in rows] == logged
            assert [int(row["Epochs"]) for row in rows] == [1 + (iteration - 1) // 4 for iteration in logged]
            events = EventAccumulator(str(folder / "tensorboard")).Reload()
            shown = [(event.step, event.value) for event in events.Scalars("train iterations/Loss")]
            assert shown == [(int(row["Iteration"]), pytest.approx(float(row["Loss"]))) for row in rows]
        if log_every == "1":
            of_epochs = rows_of(folder / "log_train_Base.csv")
            means = [np.mean([float(row["Loss"]) for row in rows[i : i + 4]]) for i in (0, 4)]
            assert [float(row["Train Loss"]) for row in of_epochs] == pytest.approx(means)
            assert [row["Iterations"] for row in of_epochs] == ["4", "4"]
            assert [float(rows[0][f"Learning Rate{name}"]) for name in ("", " embedding", " marginloss")] == [
                *(1e-3, 2e-3, 5e-4)
            ]
            of_loss = {"Loss", "Embedding Norm", "Tuples", "Hard Positives", "Hard Negatives", "Violations"}
            assert of_loss | {"d(a, p)", "d(a, n)", "Mean Beta"} <= set(rows[0])
            assert float(rows[0]["Embedding Norm"]) == pytest.approx(1)
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())


def test_the_metric_that_is_asked_for_selects(small_flags: Flags, results: Path, script: Any) -> None:
    """Issue: also where Recall @ 1 and NMI are best in other epochs."""
    told = [
        {"NMI": 0.1, "Recall @ 1": 0.9, "MAP@R": 0.2},
        {"NMI": 0.2, "Recall @ 1": 0.1, "MAP@R": 0.4},
        {"NMI": 0.9, "Recall @ 1": 0.3, "MAP@R": 0.3},
    ]
    networks = script({"test": told})["test"]
    flags = ["--n_epochs", "3", "--lr", "1e-2", "--iterations_per_epoch", "1"]
    flags += ["--eval_metrics", "NMI", "Recall", "MAP@R", "--eval_metric_for_best_epoch", "MAP@R"]
    assert run(small_flags(*flags)) == told[1]
    folder = results / "run"
    best, last = (auxiliaries.load_checkpoint(folder / f"{name}.pth.tar") for name in ("checkpoint", "last"))
    assert (best["epoch"], best["metrics"], last["epoch"], last["best_epoch"]) == (2, told[1], 3, 2)
    assert torch.equal(best["state_dict"]["embedding.weight"], networks[1])
    assert not torch.equal(networks[1], networks[2])
    summary = auxiliaries.load_json(folder / "summary.json")
    # each is one model's: not the highest value of each metric
    assert summary["selected"] == summary["best on test"] == {"epoch": 2, "test": told[1]}
    assert summary["last"] == {"epoch": 3, "test": told[2]}
    assert (summary["metric"], "untrained" in summary) == ("MAP@R", False)
    assert "on the test classes, as in the literature: optimistic" in summary["selection"]


def test_metrics_of_which_less_is_better_select_the_lowest(small_flags: Flags, results: Path, script: Any) -> None:
    told = [
        {"Recall @ 1": recall, "Alignment": alignment} for recall, alignment in ((0.9, 0.3), (0.1, 0.2), (0.5, 0.4))
    ]
    script({"test": told})
    flags = ["--n_epochs", "3", "--iterations_per_epoch", "1", "--eval_metrics", "Alignment"]
    assert run(small_flags(*flags, "--eval_metric_for_best_epoch", "Alignment")) == told[1]
    assert auxiliaries.load_checkpoint(results / "run" / "checkpoint.pth.tar")["epoch"] == 2


def test_summary_of_a_run_with_validation_classes_has_one_models_rows(
    small_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any
) -> None:
    whole = datasets.read_splits("tiny", config.parse(small_flags()).source_path)
    images = whole.test[0].query
    is_val = images.labels[:, 0] < 6
    val, test = (
        datasets.RetrievalSet("val", images.subset(is_val)),
        datasets.RetrievalSet("test", images.subset(~is_val)),
    )
    splits = datasets.Splits(whole.train, val=[val], test=[test])
    monkeypatch.setitem(datasets.DATASETS, "watched", datasets.DatasetSpec(partial(keep, splits), made_here=True))
    told = {
        name: [{"Recall @ 1": a, "NMI": b} for a, b in pairs]
        for name, pairs in {
            "val": [(0.8, 0.7), (0.9, 0.9), (0.2, 0.3), (0.6, 0.1), (0.5, 0.2)],
            "test": [(0.7, 0.4), (0.95, 0.0), (0.1, 0.8), (0.3, 0.2), (0.4, 0.1)],
        }.items()
    }
    script(told)
    flags = ["--dataset", "watched", "--n_epochs", "3", "--check_untrained_accuracy", "--iterations_per_epoch", "1"]
    assert run(small_flags(*flags)) == told["test"][3]
    folder = tmp_path / "results" / "watched" / "run"
    summary = auxiliaries.load_json(folder / "summary.json")
    expected = {"selected": 2, "last": 3, "best on test": 3, "untrained": 0, "trunk": -1}
    for name, epoch in expected.items():
        assert summary[name] == {"epoch": epoch, "val": told["val"][epoch + 1], "test": told["test"][epoch + 1]}
    assert summary["selection"].startswith("selected by Recall @ 1 on the validation classes; the test classes were")
    assert epochs_of(folder / "log_test_Base.csv") == [-1, 0, 1, 2, 3]


def test_a_run_without_epochs_is_a_baseline(small_flags: Flags, results: Path) -> None:
    """The features of the backbone, by a run folder like any other, are epoch -1 of a run with an embedding layer."""
    zero_shot = run(small_flags("--n_epochs", "0", "--embed_dim", "0", "--pooling", "avg+max"))
    folder = results / "run"
    assert names_in(folder) >= {"checkpoint.pth.tar", "last.pth.tar", "summary.json", "sample_recoveries.png"}
    summary = auxiliaries.load_json(folder / "summary.json")
    assert summary["selected"] == summary["last"] == summary["untrained"] == {"epoch": 0, "test": zero_shot}
    found = evaluate_runs.evaluate_run(["--evaluate", str(folder)])
    assert {name.removeprefix("test "): value for name, value in found.items()} == pytest.approx(zero_shot)
    again = ["--savename", "other", "--check_untrained_accuracy", "--iterations_per_epoch", "1"]
    run(small_flags("--pooling", "avg+max", *again))
    summary = auxiliaries.load_json(results / "other" / "summary.json")
    assert summary["trunk"] == {"epoch": -1, "test": pytest.approx(zero_shot)}
    assert summary["selected"]["epoch"] == 1


def test_a_baseline_can_be_trained_further(small_flags: Flags, results: Path) -> None:
    run(small_flags("--n_epochs", "0", "--iterations_per_epoch", "1"))
    whole = run(small_flags("--check_untrained_accuracy", "--iterations_per_epoch", "1", "--savename", "whole"))
    again = ["--save_path", str(results.parent), "--savename", "run", "--resume_training", "--n_epochs", "1"]
    assert main.command(again) == whole


def test_a_fold_looks_at_its_test_classes_once_it_has_been_trained(
    small_flags: Flags, results: Path, script: Any
) -> None:
    told = {"val": scores("Recall @ 1", 0.2, 0.9, 0.5), "test": scores("Recall @ 1", 0.3, 0.8)}
    networks = script(told)
    flags = small_flags(*FOLD, "1", "--n_epochs", "3", "--lr", "1e-2", "--iterations_per_epoch", "1")
    assert run(flags) == {"Recall @ 1": 0.3}
    of_val, of_test = networks["val"], networks["test"]
    assert [torch.equal(of_test[0], of_val[1]), torch.equal(of_test[1], of_val[2])] == [True, True]
    summary = auxiliaries.load_json(results / "run" / "summary.json")
    assert summary["selected"] == {"epoch": 2, "val": {"Recall @ 1": 0.9}, "test": {"Recall @ 1": 0.3}}
    assert summary["last"] == {"epoch": 3, "val": {"Recall @ 1": 0.5}, "test": {"Recall @ 1": 0.8}}
    assert "best on test" not in summary
    by_epoch = {row["Epochs"]: row["Recall @ 1"] for row in rows_of(results / "run" / "log_test_Base.csv")}
    assert by_epoch == {"2": "0.3", "3": "0.8"}


def test_watched_test_classes_do_not_select(small_flags: Flags, results: Path, script: Any) -> None:
    told = {
        "val": scores("Recall @ 1", 0.2, 0.9, 0.5),
        "test": scores("Recall @ 1", 0.8, 0.3, 0.7),
        "train": scores("Recall @ 1", 0.9, 0.8, 0.95),
    }
    script(told)
    flags = small_flags(*FOLD, "1", "--n_epochs", "3", "--iterations_per_epoch", "1", "--patience", "5")
    assert run([*flags, "--splits_to_eval", "train", "test"]) == {"Recall @ 1": 0.3}
    summary = auxiliaries.load_json(results / "run" / "summary.json")
    expected = {kind: rows[1] for kind, rows in told.items()}
    assert summary["selected"] == {"epoch": 2, **expected}
    assert summary["best on test"]["epoch"] == 1
    assert summary["selection"].endswith("the test classes were watched while training, but did not select")
    for kind in ("test", "train_eval"):
        assert epochs_of(results / "run" / records.LOGS[kind]) == [1, 2, 3]
    best = auxiliaries.load_checkpoint(results / "run" / "checkpoint.pth.tar")
    assert (best["epoch"], best["opt"]["splits_to_eval"]) == (2, ["train", "test"])


def test_watching_changes_no_training_and_is_resumed(small_flags: Flags, results: Path) -> None:
    flags = small_flags(*FOLD, "0", "--n_epochs", "2", "--lr", "1e-3", "--iterations_per_epoch", "2")
    run(flags)
    watch = [*flags, "--splits_to_eval", "train", "val", "test"]
    metrics = run([*watch, "--savename", "watched"])
    run([*watch, "--savename", "stopped", "--n_epochs", "1"])
    opt = config.parse([*watch, "--savename", "stopped"], runs.config_file(results / "stopped"))
    assert main.main(opt, results / "stopped") == metrics
    states = [auxiliaries.load_checkpoint(results / name / "last.pth.tar") for name in ("run", "watched", "stopped")]
    for name, weight in states[0]["state_dict"].items():
        assert all(torch.equal(weight, state["state_dict"][name]) for state in states[1:])
    for kind in ("val", "test", "train_eval"):
        plain, watched, stopped = (
            [{k: v for k, v in row.items() if k != "Time"} for row in state["history"][kind]] for state in states
        )
        assert watched == stopped
        assert len(watched) == 2
        assert all(row in watched for row in plain)
    # the training images, embedded by the last network
    net = netlib.networkselect(opt := config.resolve(config.parse(watch)))
    net.load_state_dict(states[1]["state_dict"])
    loader = datasets.give_dataloaders(opt, datasets.give_splits(opt)).train_eval
    space = evaluate.EmbeddingSpace(evaluate.embed(net, loader, torch.device("cpu")), loader.labels)
    assert states[1]["history"]["train_eval"][-1]["Recall @ 1"] == evaluate.recall_at_k(space, 1)
    with pytest.raises(UserError, match=r"was trained with --splits_to_eval .*must stay the same"):
        main.main(config.parse([*flags, "--savename", "watched"]), results / "watched")


@pytest.fixture
def two_levels(small_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> datasets.Splits:
    """The dataset `leveled`: that of the small flags, with two classes in each coarser one."""
    whole = datasets.read_splits("tiny", config.parse(small_flags()).source_path)

    def add_level(images: datasets.ImageSet) -> datasets.ImageSet:
        fine = images.labels[:, 0]
        return datasets.ImageSet(images.paths, np.stack([fine, fine // 2], 1), [*images.class_names, list("abcd")])

    splits = whole.map(add_level)
    monkeypatch.setitem(datasets.DATASETS, "leveled", datasets.DatasetSpec(partial(keep, splits), made_here=True))
    return splits


def test_all_label_levels_are_evaluated_and_one_selects(
    small_flags: Flags, tmp_path: Path, two_levels: datasets.Splits
) -> None:
    flags = small_flags("--dataset", "leveled", "--n_epochs", "2", "--iterations_per_epoch", "1")
    finest = run([*flags, "--savename", "finest", "--eval_metrics", "Recall", "MAP@R"])
    select = ["--label_hierarchy_level", "all", "--eval_metric_for_best_epoch", "Level 1 MAP@R"]
    metrics = run([*flags, *select, "--savename", "all"])
    folder = tmp_path / "results" / "leveled"
    names = ["NMI", "F1", *(f"Recall @ {k}" for k in (1, 2, 4, 8)), "MAP@R"]
    assert list(metrics) == [f"Level {level} {name}" for level in (0, 1, "mean") for name in names]
    for name in names:
        mean = (metrics[f"Level 0 {name}"] + metrics[f"Level 1 {name}"]) / 2
        assert metrics[f"Level mean {name}"] == pytest.approx(mean)
    summary = auxiliaries.load_json(folder / "all" / "summary.json")
    by_epoch = {int(row["Epochs"]): float(row["Level 1 MAP@R"]) for row in rows_of(folder / "all" / "log_val_Base.csv")}
    assert summary["selected"]["epoch"] == max(by_epoch, key=by_epoch.__getitem__)
    assert list(by_epoch) == [1, 2]
    # training is that of the finest level, and --evaluate evaluates its network at all levels, too
    states = [auxiliaries.load_checkpoint(folder / name / "last.pth.tar") for name in ("finest", "all")]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    found = evaluate_runs.evaluate_run(["--evaluate", str(folder / "finest"), "--label_hierarchy_level", "all"])
    assert {name: found[f"test Level 0 {name}"] for name in finest} == pytest.approx(finest)
    again = evaluate_runs.evaluate_run(["--evaluate", str(folder / "all"), "--label_hierarchy_level", "0"])
    assert list(again) == [f"test {name}" for name in names]
    other = config.parse(["--label_hierarchy_level", "all"], runs.config_file(folder / "finest"))
    with pytest.raises(UserError, match="was trained with --label_hierarchy_level 0, which must stay the same"):
        main.main(other, folder / "finest")


def test_the_mean_over_levels_selects_by_a_plain_name(small_flags: Flags, tmp_path: Path, two_levels: Any) -> None:
    flags = small_flags("--dataset", "leveled", "--iterations_per_epoch", "1", "--label_hierarchy_level", "all")
    metrics = run([*flags, "--testing_method", "GlobalEmbeddingSpace", "--scheduler", "ReduceLROnPlateau"])
    summary = auxiliaries.load_json(tmp_path / "results" / "leveled" / "run" / "summary.json")
    assert records.mean_over_sets(metrics, summary["metric"]) == metrics["Level mean Recall @ 1"]
    within = run([*flags, "--testing_method", "WithSameParentLabel", "--savename", "within"])
    assert {name.split(" ")[1] for name in within} == {"0", "mean"}  # the coarsest level has no parents


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--label_hierarchy_level", "all"], "--label_hierarchy_level all: the labels of tiny have a single level"),
        (["--label_hierarchy_level", "any"], "any is not an integer, nor is it all"),
        (
            ["--eval_metric_for_best_epoch", "Level 1 NMI"],
            "--eval_metric_for_best_epoch Level 1 NMI needs --label_hierarchy_level all: add that, or choose NMI",
        ),
        (
            ["--dataset=leveled", "--label_hierarchy_level=all", "--eval_metric_for_best_epoch=Level 2 NMI"],
            "--eval_metric_for_best_epoch Level 2 NMI does not exist: leveled is evaluated at levels 0 to 1",
        ),
    ],
)
def test_levels_that_are_not_there_are_refused(
    small_flags: Flags, two_levels: datasets.Splits, flags: list[str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        run(small_flags(*flags))
    assert words in str(error.value)


def test_a_level_of_one_class_is_refused(
    small_flags: Flags, two_levels: datasets.Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def coarsen(images: datasets.ImageSet) -> datasets.ImageSet:
        return datasets.ImageSet(images.paths, images.labels // (1, 2), images.class_names)

    splits = two_levels.map(coarsen)  # all test classes are of one
    monkeypatch.setitem(datasets.DATASETS, "leveled", datasets.DatasetSpec(partial(keep, splits), made_here=True))
    with pytest.raises(UserError, match="all images of leveled, test, are of one class at level 1"):
        run(small_flags("--dataset", "leveled", "--label_hierarchy_level", "all"))


def test_metrics_of_every_class_are_written(small_flags: Flags, tmp_path: Path, two_levels: datasets.Splits) -> None:
    flags = small_flags("--dataset", "leveled", "--iterations_per_epoch", "1", "--eval_metrics", "NMI", "Recall", "mAP")
    run(flags)
    folder = tmp_path / "results" / "leveled" / "run"
    every = ["--evaluate", str(folder), "--eval_every_class", "--splits_to_eval", "train", "test"]
    found = evaluate_runs.evaluate_run([*every, "--label_hierarchy_level", "all"])
    net = runs.load_network(folder, opt := runs.load_flags(folder), torch.device("cpu"))
    loader = datasets.give_dataloaders(opt, two_levels).test[0].query
    points, labels = evaluate.embed(net, loader, torch.device("cpu")), loader.hierarchy
    nearest = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf).argmin(dim=1).numpy()
    rows = rows_of(folder / "per_class_test.csv")
    columns = ["Part", "Class", "Queries", *(f"Recall @ {k}" for k in (1, 2, 4, 8)), "mAP"]
    assert [list(row) for row in rows] == [columns] * 6
    expected = [(level, label) for level in (0, 1) for label in np.unique(labels[:, level])]
    recalls: dict[int, list[float]] = {0: [], 1: []}
    for row, (level, label) in zip(rows, expected):
        queries = np.flatnonzero(labels[:, level] == label)
        assert (row["Part"], row["Class"]) == (f"Level {level}", two_levels.train.class_names[level][label])
        assert int(row["Queries"]) == len(queries)
        recalls[level].append(float((labels[nearest[queries], level] == label).mean()))
        assert float(row["Recall @ 1"]) == pytest.approx(recalls[level][-1])
    for level, values in recalls.items():
        assert found[f"test Level {level} Macro Recall @ 1"] == pytest.approx(np.mean(values))
    mean = np.mean([np.mean(values) for values in recalls.values()])
    assert found["test Level mean Macro Recall @ 1"] == pytest.approx(mean)
    assert len(rows_of(folder / "per_class_train.csv")) == 6
    entry = evaluate_runs.read_evaluations(folder)[-1]
    assert entry["metrics"] == found
    assert entry["settings"]["eval_every_class"] is True
    evaluate_runs.evaluate_run([*every, "--testing_method", "WithSameParentLabel"])
    assert [row["Class"] for row in rows_of(folder / "per_class_test.csv")] == [f"class_{i}" for i in range(4, 8)]
    with pytest.raises(UserError, match="--eval_every_class says how to --evaluate a finished run"):
        main.command([*flags, "--savename", "other", "--eval_every_class"])


def test_every_split_scheme_trains_and_resumes(small_flags: Flags, results: Path) -> None:
    """Splits that are shuffled by the seed, and training that is stopped after an epoch and continued."""
    for scheme in ("predefined_with_validation", "closed_set"):
        flags = [*small_flags("--lr", "1e-3", "--bs", "4", "--samples_per_class", "2", "--iterations_per_epoch", "1")]
        flags += ["--split_scheme", scheme, "--num_training_partitions", "2", "--split_shuffle", "--fold", "1"]
        flags += ["--test_size", "0.34"] if scheme == "closed_set" else []
        whole = run([*flags, "--savename", scheme, "--n_epochs", "2"])
        run([*flags, "--savename", f"{scheme}_2"])
        opt = config.parse([*flags, "--n_epochs", "2"], runs.config_file(results / f"{scheme}_2"))
        assert main.main(opt, results / f"{scheme}_2") == whole
        summary = auxiliaries.load_json(results / scheme / "summary.json")
        assert summary["selection"] == "selected by Recall @ 1 on the validation classes"
        assert summary["selected"]["test"] == whole
        found = evaluate_runs.evaluate_run(["--evaluate", str(results / scheme)])
        assert {name.removeprefix("test "): value for name, value in found.items()} == pytest.approx(whole)
        with pytest.raises(UserError, match="was trained with --seed 1, which must stay the same"):
            main.main(config.parse([*flags, "--seed", "2", "--savename", scheme]), results / scheme)


def test_a_run_folder_says_with_what_it_was_made(small_flags: Flags, results: Path) -> None:
    flags = small_flags("--lr", "1e-3", "--iterations_per_epoch", "1")
    run(flags)
    folder = results / "run"
    environment = auxiliaries.load_json(folder / "environment.json")
    assert (environment["command"], environment["torch"]) == (sys.argv, torch.__version__)
    values = config.configuration(config.resolve(config.parse(flags)))
    assert pickle.loads((folder / "hypa.pkl").read_bytes()) == values
    assert auxiliaries.load_checkpoint(folder / "last.pth.tar")["opt"] == values
    assert records.read_configurations(folder) == [{"Epochs": 0, "Configuration": values}]
    for flag, value in (("--embed_dim", "8"), ("--loss", "triplet")):
        with pytest.raises(UserError, match=f"was trained with {flag} .*, which must stay the same: drop the flag"):
            runs.check_flags(folder, config.resolve(config.parse([*flags, flag, value])))
    assert runs.epoch_reached(folder) == 1
    assert runs.epoch_reached(results) == 0

    state = auxiliaries.load_checkpoint(folder / "last.pth.tar")
    opt = config.resolve(config.parse(flags))
    (folder / "checkpoint.pth.tar").unlink()  # as after a crash between the two
    runs.change_flags(folder, {folder: opt}, opt)
    assert auxiliaries.load_checkpoint(folder / "checkpoint.pth.tar")["epoch"] == 1
    auxiliaries.save_checkpoint(folder / "last.pth.tar", {**state, "version": runs.RUN_VERSION + 1})
    with pytest.raises(UserError, match="is of a later version of this repository"):
        runs.load_state(folder, opt)


def test_every_flag_is_consumed() -> None:
    """No flag is declared that nothing reads (mistake 3): a loss reads its own through its constructor."""
    modules = [main, config, runs, protocol, datasets, transforms, netlib, features, image_cache, losses, methods]
    modules += [evaluate, evaluate_runs, retrieval, loggers]
    read = "".join(inspect.getsource(module) for module in modules)
    keywords = {name for loss in losses.LOSSES.values() for name in inspect.signature(loss).parameters}
    keywords |= {name for method in methods.METHODS.values() for name in method.flags}
    for name in vars(config.parse([])):
        is_read = re.search(rf"\b(opt\.{name}\b|(flags|given)\[\"{name}\"\])", read)
        assert is_read or name in keywords, name


def test_help_reads_as_a_manual(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = capsys.readouterr().out
    for name in vars(config.parse([])):
        assert re.search(rf"--{name}[\s,]", text)
    assert "default: None" not in text


def test_metrics_within_parents_need_coarser_labels(small_flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--testing_method WithSameParentLabel needs labels coarser than") as error:
        run(small_flags("--testing_method", "WithSameParentLabel"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--los", "triplet"], "unknown flag --los (did you mean --loss?)"),
        (["--loss", "tripplet"], "did you mean triplet"),
        (["--sampling", "semi_hard"], "did you mean semihard"),
        (["--arch", "resnet51"], "did you mean resnet50"),
        (["--k_vals", "0"], "0 is not at least 1"),
        (["--lr", "nan"], "nan is not at least 0"),
        (["--bs", "9"], "--bs 9 is not a multiple of --samples_per_class 4"),
        (["--loss", "proxynca", "--sampling", "distance"], "uses no tuples: drop --sampling distance"),
        (["--loss", "npair", "--sampling", "semihard"], "takes n-pairs, but --sampling semihard gives triplets"),
        (["--loss", "triplet", "--sampling", "npair"], "takes triplets, but --sampling npair gives n-pairs"),
        (["--samples_per_class", "1"], "needs two images per class"),
        (["--samples_per_class", "1", "--batch_sampler", "class_balanced"], "needs two images per class"),
        (["--bs", "4"], "needs two classes of 4 images in a batch"),
        (["--loss", "npair", "--bs", "4"], "needs two classes of 4 images in a batch"),
        (["--bs", "80"], "needs 20 classes per batch, and tiny trains on 4"),
        (["--resize", "20"], "--resize 20 is less than --crop_size 32"),
        (["--freeze_batchnorm"], "--freeze_batchnorm needs pretrained statistics"),
        (["--weights", "x.pth"], "--weights and --not_pretrained contradict"),
        (["--arch", "squeezenet1_0"], "does not end in a Linear layer"),
        (["--arch", "vit_b_16"], "can't take images of --crop_size 32"),
        (["--savename", "a/b"], "not a folder name"),
        (["--dataset", "tinyy"], "no images were found in"),
        (["--fold", "0"], "--fold needs --split_scheme cross_validation"),
        (["--splits_to_eval", "train", "test"], "--splits_to_eval train test needs validation classes to select the"),
        (["--splits_to_eval", "all"], "--splits_to_eval all is unknown; it takes one of train, val, test"),
        (["--num_training_sets", "5"], "--num_training_sets 5 is more than --num_training_partitions 4"),
        ([*FOLD, "2"], "--fold 2 does not exist: with --num_training_sets 2, folds are 0 to 1"),
        (FOLD[:-1], "one training run is one fold of cross_validation: give --fold"),
        ([*FOLD, "0", "--test_size", "0.1"], "leaves 0 test class(es) of 8"),
        ([*FOLD, "0", "--num_training_partitions", "3"], "leaves 1 validation class(es) of 8"),
        (["--test_size", "1"], "--test_size: 1 is not below 1"),
        ([*FOLD, "0", "--test_size", "0"], "leaves 0 test class(es) of 8"),
        (["--test_start_idx", "1"], "--test_start_idx: 1 is not below 1"),
        (["--test_start_idx", "-0.1"], "--test_start_idx: -0.1 is not at least 0"),
        (["--eval_metric_for_best_epoch", "MAP@"], "MAP@ is unknown (did you mean MAP@R?); it takes one of NMI, F1"),
        (["--eval_metric_for_best_epoch", "Recall @ 0"], "Recall @ 0 is not a metric: 0 is not at least 1"),
        (["--savename", "x" * 201], "is longer than 200 bytes"),
        (["--learning_rate", "1"], "unknown flag --learning_rate (did you mean --lr?)"),
        (["--batch-size", "1"], "unknown flag --batch-size (did you mean --bs?)"),
        (["--num_epochs_train=3"], "unknown flag --num_epochs_train=3 (did you mean --n_epochs?)"),
        (["--wandb"], "unknown flag --wandb: main.py --help"),
        (["--savename", "a\udcff"], "is not valid text: it has a NUL character or is not UTF-8"),
        (["--eval_metrics", "MAP"], "--eval_metrics MAP is unknown (did you mean mAP?)"),
        (["--eval_metrics", "FNMR @ 2"], "--eval_metrics: FNMR @ 2 is not a metric: 2 is not below 1"),
        (["--eval_metrics", "mAP @ 5"], "--eval_metrics: mAP @ 5 is not a metric: mAP takes no number"),
        (
            ["--eval_metrics", "Verification accuracy"],
            "Verification accuracy needs validation classes, which choose",
        ),
        (["--eval_metric_for_best_epoch", "Precision"], "Precision is unknown (did you mean Precision @ "),
        (["--eval_metric_for_best_epoch", "Verification threshold"], "Verification threshold is unknown"),
        (["--label_hierarchy_level", "3"], "--label_hierarchy_level 3 does not exist"),
        (["--patience", "0"], "--patience: 0 is not at least 1"),
        (["--save_interval", "0"], "--save_interval: 0 is not at least 1"),
        (["--log_every", "-1"], "--log_every: -1 is not at least 0"),
        (["--dataset="], "--dataset '' is not a name"),
        (["--dataset=" + "x" * 5000], f"--dataset {'x' * 60}… is not a name"),
        (["--loss="], "--loss '' is unknown; --loss takes marginloss"),
        (["--loss", "mat_based_loss"], "--loss mat_based_loss is unknown"),
    ],
)
def test_bad_flags_are_one_sentence(small_flags: Flags, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        run(small_flags(*flags))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_command_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "main.py", "--source_path", str(tmp_path), "--gpu", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    for words in (str(tmp_path / "cub200"), "--download", "bash Sample_Runs.sh demo"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "needed"), [("memory_start", "5", "memory_size"), ("cache_dtype", "float16", "cache_features")]
)
def test_a_flag_that_needs_another_one_is_refused_without(
    small_flags: Flags, flag: str, value: str, needed: str
) -> None:
    with pytest.raises(UserError, match=f"--{flag} does nothing without --{needed}: add that, or drop --{flag}"):
        main.command(small_flags(f"--{flag}", value))


@pytest.mark.parametrize("flags", [["--split_shuffle"], ["--fold_order=reality_check"], ["--no-normalize_members"]])
def test_flags_of_folds_are_refused_without(small_flags: Flags, flags: list[str]) -> None:
    name = flags[0].removeprefix("--no-").removeprefix("--").split("=")[0]
    schemes = "cross_validation, predefined_with_validation or closed_set"
    with pytest.raises(UserError, match=f"^--{name} needs --split_scheme {schemes}: predefined splits have no folds$"):
        main.command(small_flags(*flags))


def test_ctrl_c_while_modules_load_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "main.py"), "--help"]
    restore = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # where the tests themselves ignore it
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, preexec_fn=restore)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_blocked_download_of_weights_names_the_ways_out(small_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    def blocked(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", blocked)
    flags = [flag for flag in small_flags() if flag != "--not_pretrained"]
    with pytest.raises(UserError, match=r"no route to host.*--weights FILE.*--not_pretrained"):
        run(flags)


@pytest.mark.parametrize("kernels", ["0", "2"])
def test_broken_image_is_named_and_the_checkpoint_kept(tmp_path: Path, kernels: str) -> None:
    images = make_tree(tmp_path / "source" / "broken" / "images")
    flags = [*SMALL, "--dataset", "broken", "--source_path", str(tmp_path / "source"), "--kernels", kernels]
    victim = images / "class_1" / "3.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(UserError) as error:
        run([*flags, "--save_path", str(tmp_path / "results"), "--bs", "8", "--n_epochs", "2"])
    assert str(victim) in str(error.value)
    assert "start again" in str(error.value)


def test_nan_loss_stops_the_run_and_leaves_the_last_good_checkpoint(
    small_flags: Flags, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = losses.MarginLoss.forward, 0

    def broken(self: losses.MarginLoss, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, batch, labels) * (float("nan") if calls == 5 else 1)  # 3 iterations an epoch

    monkeypatch.setattr(losses.MarginLoss, "forward", broken)
    with pytest.raises(UserError, match="the loss is nan in epoch 2, iteration 2"):
        run(small_flags("--n_epochs", "3"))
    last = auxiliaries.load_checkpoint(results / "run" / "last.pth.tar")
    assert last["epoch"] == 1
    assert all(value.isfinite().all() for value in last["state_dict"].values() if value.is_floating_point())


@pytest.mark.parametrize("where", ["file", "read-only", "refused later"])
def test_save_path_that_cannot_be_written(
    small_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    save_path = tmp_path / "taken"
    if where == "file":
        save_path.write_text("")
    elif where == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="save_path"):
        run(small_flags("--save_path", str(save_path)))


def test_more_workers_than_cores_is_a_notice(small_flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    opt = config.resolve(config.parse(small_flags("--kernels", "1000")))
    loaders = datasets.give_dataloaders(opt, datasets.read_splits(opt.dataset, opt.source_path))
    assert loaders.train.num_workers == auxiliaries.cpu_cores()
    assert "--kernels 1000 is more than this machine's" in capsys.readouterr().err


def test_class_with_one_image_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_tree(tmp_path / "source" / "single" / "images")
    rng = np.random.default_rng(1)
    save_image(images / "class_00" / "only.jpg", rng)  # sorted first: trains
    save_image(images / "class_9" / "only.jpg", rng)  # sorted last: tests
    flags = [*SMALL, "--dataset", "single", "--source_path", str(tmp_path / "source"), "--bs", "8", "--n_epochs", "1"]
    run([*flags, "--save_path", str(tmp_path / "results")])
    notices = capsys.readouterr().err
    assert "classes with fewer than 4 images: 1; their images repeat within a batch" in notices
    assert "1 of 25 queries" in notices
