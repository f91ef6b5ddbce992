"""Whole runs: flags, one training run end to end, what it writes, its determinism, and bad input."""

from __future__ import annotations

import argparse
import csv
import inspect
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, make_tree, save_image

import auxiliaries
import config
import datasets
import evaluate
import losses
import main
import netlib
from auxiliaries import UserError

Flags = Callable[..., list[str]]

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


def run(flags: list[str]) -> dict[str, float]:
    return main.main(main.parse_args(flags))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


@pytest.mark.parametrize(("loss", "sampling"), PAIRS)
def test_every_loss_and_sampling_trains(small_flags: Flags, results: Path, loss: str, sampling: str | None) -> None:
    flags = small_flags("--loss", loss, "--samples_per_class", "4", "--lr", "1e-3")
    metrics = run(flags + (["--sampling", sampling] if sampling else []))
    assert set(metrics) == {"NMI", "F1", *(f"Recall @ {k}" for k in (1, 2, 4, 8))}
    assert all(0 <= value <= 1 for value in metrics.values())
    checkpoint = auxiliaries.load_checkpoint(results / "run" / "checkpoint.pth.tar")
    opt = main.resolve(main.parse_args(flags))
    untrained = netlib.networkselect(opt).state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in checkpoint["state_dict"].items())


def test_run_folder_holds_what_its_readme_lists(small_flags: Flags, results: Path) -> None:
    flags = small_flags("--n_epochs", "3", "--grad_measure", "--dist_measure", "--check_untrained_accuracy")
    metrics = run(flags)
    folder = results / "run"
    listed = set(re.findall(r"^\| `([^`]+)`", (ROOT / "Training_Results/README.md").read_text(), re.MULTILINE))
    assert {path.name for path in folder.iterdir()} == listed

    train_rows, val_rows = rows_of(folder / "log_train_Base.csv"), rows_of(folder / "log_val_Base.csv")
    assert [row["Epochs"] for row in train_rows] == ["1", "2", "3"]
    assert [row["Epochs"] for row in val_rows] == ["0", "1", "2", "3"]
    assert list(val_rows[0]) == ["Epochs", "Time", *metrics]
    assert len(rows_of(folder / "distance_measures_Train.csv")) == 4

    best, last = (auxiliaries.load_checkpoint(folder / f"{name}.pth.tar") for name in ("checkpoint", "last"))
    recalls = [float(row["Recall @ 1"]) for row in val_rows[1:]]
    assert best["epoch"] == last["best_epoch"] == 1 + int(np.argmax(recalls))
    assert best["metrics"] == metrics == {k: float(v) for k, v in val_rows[best["epoch"]].items() if k in metrics}
    assert last["epoch"] == 3
    assert [row["Epochs"] for row in last["history"]["val"]] == [0, 1, 2, 3]
    assert last["optimizer"]["state"]
    assert "beta" in last["criterion"]

    gradients = pickle.loads((folder / "grad_measure.pkl").read_bytes())
    assert {array.shape for array in gradients.values()} == {(9, 1024)}
    assert "margin: 0.2\n" in (folder / "Parameter_Info.txt").read_text()


@pytest.mark.parametrize("pretrained", [True, False])
def test_network_comes_back_from_hypa_and_checkpoint(
    small_flags: Flags, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: bool
) -> None:
    """Issue: also for a run that was flagged as pretrained, and with downloads blocked."""
    flags = small_flags("--arch", "googlenet", "--crop_size", "64", "--embed_dim", "16", "--kernels", "0")
    if pretrained:
        weights = tmp_path / "googlenet.pth"
        network, _ = netlib.ARCHS["googlenet"].build(False, False)
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
    exec(snippet[1].replace("Training_Results/glyphs/demo", str(results / "run")), names)
    assert names["net"].backbone.transform_input is pretrained

    opt = main.resolve(main.parse_args(flags))
    loaders = datasets.give_dataloaders(opt, datasets.read_splits(opt.dataset, opt.source_path))
    again = evaluate.embed(names["net"], loaders.test[0].query, torch.device("cpu"))
    assert torch.equal(again, spaces[0].query)


def test_existing_run_folder_is_never_overwritten(small_flags: Flags, results: Path) -> None:
    for _ in range(3):
        run(small_flags())
    assert {path.name for path in results.iterdir()} == {"run", "run_1", "run_2"}


def keep(splits: datasets.Splits, root: Path) -> datasets.Splits:
    """A reader that has its splits already."""
    return splits


def test_query_and_gallery_and_several_test_sets(
    small_flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = datasets.read_splits("tiny", main.parse_args(small_flags()).source_path)
    images = whole.test[0].query
    query, gallery = images.subset(np.arange(len(images)) % 3 == 0), images.subset(np.arange(len(images)) % 3 > 0)
    one = datasets.Splits(whole.train, test=[datasets.RetrievalSet("test", query, gallery)])
    two = datasets.Splits(whole.train, test=[datasets.RetrievalSet("a", images), datasets.RetrievalSet("b", gallery)])
    for name, splits in (("one", one), ("two", two)):
        monkeypatch.setitem(datasets.DATASETS, name, datasets.Source(partial(keep, splits), made_here=True))
        metrics = run(small_flags("--dataset", name, "--k_vals", "2"))
        expected = ["NMI", "F1", "Recall @ 1", "Recall @ 2"]
        assert list(metrics) == (expected if name == "one" else [f"Set {i} {key}" for i in (0, 1) for key in expected])


def trained(flags: list[str], results: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    run(flags)
    folder = max(results.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    rows = rows_of(folder / "log_train_Base.csv") + rows_of(folder / "log_val_Base.csv")
    state = auxiliaries.load_checkpoint(folder / "last.pth.tar")
    weights = {**state["state_dict"], **{f"criterion.{name}": value for name, value in state["criterion"].items()}}
    return weights, [{name: value for name, value in row.items() if name != "Time"} for row in rows]


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


def test_evaluation_never_changes_training(small_flags: Flags, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake 2: neither more measures nor other results of the test classes may steer training."""
    flags = small_flags("--n_epochs", "3", "--lr", "1e-3")
    weights, _ = trained(flags, results)
    monkeypatch.setattr(evaluate, "mean_over_sets", lambda metrics, name: -metrics[name])
    other, _ = trained(
        [*flags, "--dist_measure", "--k_vals", "3", "--check_untrained_accuracy", "--eval_bs", "5"], results
    )
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


def test_defaults_are_resolved_from_what_they_depend_on() -> None:
    def resolved(*flags: str) -> argparse.Namespace:
        return main.resolve(main.parse_args(list(flags)))

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


def test_every_flag_is_consumed() -> None:
    """No flag is declared that nothing reads (mistake 3): a loss reads its own through its constructor."""
    modules = (main, config, datasets, netlib, losses)
    read = "".join(inspect.getsource(module) for module in modules)
    keywords = {name for loss in losses.LOSSES.values() for name in loss.__init__.__code__.co_varnames}
    for name in vars(main.parse_args([])):
        assert re.search(rf"\bopt\.{name}\b", read) or name in keywords, name


def test_help_reads_as_a_manual(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.parse_args(["--help"])
    text = capsys.readouterr().out
    for name in vars(main.parse_args([])):
        assert f"--{name} " in text or f"--{name}\n" in text
    assert "default: None" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--los", "triplet"], "unknown flag --los (did you mean --loss?)"),
        (["--loss", "tripplet"], "did you mean triplet"),
        (["--sampling", "semi_hard"], "did you mean semihard"),
        (["--arch", "resnet51"], "did you mean resnet50"),
        (["--k_vals", "0"], "0 is not at least 1"),
        (["--lr", "nan"], "nan is not at least 0"),
        (["--bs", "9"], "--bs 9 is no multiple of --samples_per_class 4"),
        (["--loss", "proxynca", "--sampling", "distance"], "uses no tuples: leave --sampling out"),
        (["--loss", "npair", "--sampling", "semihard"], "can't use the tuples of --sampling semihard"),
        (["--loss", "triplet", "--sampling", "npair"], "can't use the tuples of --sampling npair"),
        (["--samples_per_class", "1"], "needs two images of a class"),
        (["--samples_per_class", "1", "--batch_sampler", "class_balanced"], "needs two images of a class"),
        (["--bs", "4"], "needs two classes of 4 images in a batch"),
        (["--loss", "npair", "--bs", "4"], "needs two classes of 4 images in a batch"),
        (["--bs", "80"], "needs 20 classes a batch, and tiny trains on 4"),
        (["--resize", "20"], "--resize 20 is less than --crop_size 32"),
        (["--freeze_batchnorm"], "--freeze_batchnorm needs pretrained statistics"),
        (["--weights", "x.pth"], "--weights and --not_pretrained contradict"),
        (["--arch", "squeezenet1_0"], "does not end in a Linear layer"),
        (["--arch", "vit_b_16"], "can't take images of --crop_size 32"),
        (["--savename", "a/b"], "no folder name"),
        (["--dataset", "tinyy"], "no images were found in"),
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
    with pytest.raises(UserError, match="choose another --save_path"):
        run(small_flags("--save_path", str(save_path)))


def test_more_workers_than_cores_is_a_notice(small_flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    opt = main.resolve(main.parse_args(small_flags("--kernels", "1000")))
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
    assert "classes with fewer than 4 images: 1; theirs repeat" in notices
    assert "1 of 25 queries" in notices
