"""Several training runs: cross-validation, resuming, crashes, reproducing."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    CROSS,
    ROOT,
    CrossValidated,
    Metrics,
    Run,
    csv_rows,
    embed_by_hand,
    make_tree,
    save_image,
    training_flags,
)
from crash_child import assert_same_run, rows_of
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import auxiliaries
import datasets
import evaluate
import main
import netlib
import protocol
import records
import runs
from auxiliaries import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_pictures")]


def configurations(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Epochs and changes of the rows of the table `configurations`."""
    database = sqlite3.connect(folder / "records.db")
    rows = database.execute("SELECT Epochs, Changes FROM configurations ORDER BY rowid").fetchall()
    database.close()
    return [(epoch, json.loads(changes)) for epoch, changes in rows]


def scores(patch: pytest.MonkeyPatch, *values: float) -> None:
    """Makes the next evaluations give these as Recall @ 1."""
    evaluate_points, remaining = evaluate.evaluate_points, iter(values)

    def scripted(*args: Any, **flags: Any) -> tuple[Metrics, list[evaluate.EmbeddingSpace]]:
        metrics, spaces = evaluate_points(*args, **flags)
        return metrics | {"Recall @ 1": next(remaining)}, spaces

    patch.setattr(evaluate, "evaluate_points", scripted)


# Cross-validation


def test_folds_share_the_test_classes_and_nothing_else(crossed: CrossValidated) -> None:
    assert [path.name for path in crossed.folds] == ["fold_0", "fold_1", "fold_2"]
    validated: set[str] = set()
    for splits in crossed.splits:
        train, val, test = (
            {Path(path).parent.name for path in images.paths}
            for images in (splits.train, splits.val[0].query, splits.test[0].query)
        )
        assert len(train) + len(val) + len(test) == len(train | val | test) == 16
        assert splits.test[0].query.paths == crossed.splits[0].test[0].query.paths
        assert not val & validated
        validated |= val
    listed = {path.name for path in crossed.folds[0].iterdir()}
    assert {"checkpoint.pth.tar", "last.pth.tar", "summary.json", "hypa.pkl", "config.yaml", "records.db"} <= listed
    found = {path.name for path in crossed.folder.iterdir()}
    assert found == {"fold_0", "fold_1", "fold_2", "meta", "config.yaml", "environment.json"}


def test_folds_train_on_their_training_classes(
    source: Path, tmp_path: Path, crossed: CrossValidated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the network is fed, not what the splits say."""
    seen: set[str] = set()
    train_one_epoch = main.train_one_epoch

    def watching(training: Any, loader: datasets.ImageLoader, *args: Any, **kwargs: Any) -> records.Row:
        for _, _, indices in loader:
            seen.update(Path(loader.dataset.images.paths[i]).parent.name for i in indices.tolist())
        return train_one_epoch(training, loader, *args, **kwargs)

    monkeypatch.setattr(main, "train_one_epoch", watching)
    main.command(training_flags(source, tmp_path, *CROSS, "--n_epochs", "1", "--savename", "x", "--fold", "1"))
    assert seen == {Path(path).parent.name for path in crossed.splits[1].train.paths}


def test_validation_chooses_the_epoch_and_test_classes_wait_for_the_end(crossed: CrossValidated) -> None:
    kinds = {}
    for fold, splits in zip(crossed.folds, crossed.splits):
        kinds[fold.name] = [tuple(splits.val[0].query.paths), tuple(splits.test[0].query.paths)]
    for fold in crossed.folds:
        of_fold = [
            (epoch, kinds[name].index(tuple(paths))) for name, epoch, paths in crossed.embedded if name == fold.name
        ]
        best = auxiliaries.load_checkpoint(fold / "checkpoint.pth.tar")["epoch"]
        tests = 1 if best == 2 else 2
        of_meta = 3 if fold == crossed.folds[-1] else 0
        assert of_fold == [(1, 0), (2, 0), *[(2, 1)] * (tests + of_meta)]

        val = csv_rows(fold / "log_val_Base.csv")
        assert best == 1 + int(np.argmax([float(row["Recall @ 1"]) for row in val]))
        summary = auxiliaries.load_json(fold / "summary.json")
        assert "validation classes" in summary["selection"]
        assert set(summary) == {"selection", "metric", "selected", "last", "seconds"}
        assert (summary["selected"]["epoch"], summary["last"]["epoch"]) == (best, 2)
        test = {int(row["Epochs"]): row for row in csv_rows(fold / "log_test_Base.csv")}
        for model in ("selected", "last"):
            epoch = summary[model]["epoch"]
            for kind, row in (("val", val[epoch - 1]), ("test", test[epoch])):
                assert summary[model][kind] == {name: float(row[name]) for name in row if name != "Epochs"}


def test_meta_results_by_hand(crossed: CrossValidated) -> None:
    summaries = [json.loads((fold / "summary.json").read_text()) for fold in crossed.folds]
    with open(crossed.folder / "meta" / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    of_folds = [row for row in rows if row["Network"] != "ConcatenateEmbeddings"]
    assert {(row["Network"], row["Split"]) for row in of_folds} == {
        (model, split) for model in ("selected", "last") for split in ("val", "test")
    }
    for row in of_folds:
        values = np.array([summary[row["Network"]][row["Split"]][row["Metric"]] for summary in summaries])
        deviation = np.sqrt(((values - values.mean()) ** 2).sum() / 2)
        low, high = np.array(stats.t.interval(0.95, df=2)) * deviation / np.sqrt(3)
        assert float(row["Mean"]) == pytest.approx(values.mean())
        assert float(row["Std"]) == pytest.approx(deviation, abs=1e-12)
        assert float(row["CI 95 %"]) == pytest.approx((high - low) / 2, abs=1e-12)
        assert row["Folds"] == "3"
        if (row["Network"], row["Split"]) == ("selected", "test"):
            assert crossed.metrics[row["Metric"]] == float(row["Mean"])
    events = EventAccumulator(str(crossed.folder / "meta" / "tensorboard")).Reload()
    (table,) = events.Tensors("results over folds/text_summary")
    assert (
        f"| selected | test | Recall @ 1 | {crossed.metrics['Recall @ 1']:.4f} |"
        in table.tensor_proto.string_val[0].decode()
    )


def test_meta_results_are_printed_as_one_table(
    crossed: CrossValidated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    capsys.readouterr()
    metrics = protocol.write_meta_results(runs.load_flags(folder), folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| Network | Split | Metric | Mean |", "|---|---|---|---|"]
    (found,) = [line for line in lines if line.startswith("| selected | test | Recall @ 1 |")]
    assert re.fullmatch(rf".* {metrics['Recall @ 1']:.4f} ± 0\.\d{{4}} \|", found)
    assert len(lines) == 2 + len(auxiliaries.load_json(folder / "meta" / "results.json"))


def test_concatenated_embeddings_by_hand(crossed: CrossValidated) -> None:
    images = crossed.splits[0].test[0].query
    members = [torch.nn.functional.normalize(embed_by_hand(fold, images), dim=1) for fold in crossed.folds]
    together = torch.cat(members, dim=1)
    assert together.shape == (32, 48)
    expected = evaluate.evaluate_space(evaluate.EmbeddingSpace(together, images.labels[:, 0]), [1, 2, 4, 8])
    rows = auxiliaries.load_json(crossed.folder / "meta" / "results.json")
    found = {row["Metric"]: row["Mean"] for row in rows if row["Network"] == "ConcatenateEmbeddings"}
    assert found == pytest.approx(expected)


def in_shop_tree(root: Path) -> None:
    """Eight training items and four to test on, of four images each, half of which are queries."""
    rows = []
    for item in range(12):
        for image in range(4):
            name, part = f"img/MEN/Denim/id_{item:08d}/0{image}.jpg", ("query", "gallery")[image % 2]
            rows.append(f"{name} id_{item:08d} {part if item > 7 else 'train'}\n")
            save_image(root / name, np.random.default_rng((item, image)), tint=item)
    (root / "Eval").mkdir()
    text = f"{len(rows)}\nimage_name item_id evaluation_status\n{''.join(rows)}"
    (root / "Eval/list_eval_partition.txt").write_text(text)


def test_folds_inside_the_training_classes_are_tested_on_query_and_gallery(tmp_path: Path) -> None:
    """And concatenated with members of length 1 or as they are, as the flag, or what was meant before it, says."""
    in_shop_tree(tmp_path / "in-shop")
    start = ["--dataset", "in-shop", "--savename", "run", "--n_epochs", "1", "--loss", "npair"]
    scheme = ["--split_scheme", "predefined_with_validation", "--num_training_sets", "2"]
    meta = ["--meta_testing_method", "ConcatenateEmbeddings"]
    main.command([*training_flags(tmp_path, tmp_path, *start, *scheme), *meta])
    folder = tmp_path / "in-shop" / "run"
    folds = [folder / "fold_0", folder / "fold_1"]
    (test,) = datasets.give_splits(runs.load_flags(folds[0])).test
    assert test.gallery is not None
    query, gallery = ([embed_by_hand(fold, images) for fold in folds] for images in (test.query, test.gallery))
    assert not torch.allclose(query[0].norm(dim=1), torch.ones(8), atol=0.1)
    labels = test.query.labels[:, 0], test.gallery.labels[:, 0]

    def by_hand(normalize: bool) -> Metrics:
        q, g = (
            torch.cat([part / part.norm(dim=1, keepdim=True) if normalize else part for part in parts], dim=1)
            for parts in (query, gallery)
        )
        space = evaluate.EmbeddingSpace(q, labels[0], g, labels[1])
        return evaluate.evaluate_space(space, [1, 10, 20, 30, 50])

    def found() -> Metrics:
        rows = auxiliaries.load_json(folder / "meta" / "results.json")
        return {row["Metric"]: row["Mean"] for row in rows if row["Network"] == "ConcatenateEmbeddings"}

    assert found() == pytest.approx(by_hand(True))
    again = ["--save_path", str(tmp_path), "--savename", "run", "--resume_training"]
    main.command([*again, "--no-normalize_members"])
    assert found() == pytest.approx(by_hand(False))
    assert by_hand(False) != by_hand(True)
    main.command(again)
    assert found() == pytest.approx(by_hand(True))
    for path in (folder, *folds):  # as an earlier version wrote it
        config_file = path / "config.yaml"
        config_file.write_text(config_file.read_text().replace("normalize_members: true\n", ""))
    main.command(again)
    assert found() == pytest.approx(by_hand(False))


def test_folds_may_run_one_by_one(source: Path, tmp_path: Path, crossed: CrossValidated) -> None:
    """In any order; the last one writes the meta results, which are the same as in one go."""
    more = ("--savename", "run", "--meta_testing_method", "ConcatenateEmbeddings")
    flags = training_flags(source, tmp_path, *CROSS, *more)
    folder = tmp_path / "cv" / "run"
    assert main.command([*flags, "--fold", "2"]) == {}
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["fold_2"]
    with pytest.raises(UserError, match=r"fold_2 exists.*--resume_training"):
        main.command([*flags, "--fold", "2"])
    with pytest.raises(UserError, match="another --lr"):
        main.command([*flags, "--fold", "1", "--lr", "0.5"])
    with pytest.raises(UserError, match="does not exist"):
        main.command([*flags, "--fold", "3"])
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["fold_2"]
    main.command([*flags, "--fold", "0"])
    assert not (folder / "meta").exists()
    assert main.command([*flags, "--fold", "1"]) == crossed.metrics
    for fold in crossed.folds:
        assert_same_run(folder / fold.name, fold)
    written = [(path / "meta" / "results.csv").read_bytes() for path in (folder, crossed.folder)]
    assert written[0] == written[1]


def test_one_fold_needs_a_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--fold needs --savename"):
        main.command(training_flags(source, tmp_path, *CROSS, "--fold", "1"))
    with pytest.raises(UserError, match="--fold needs --split_scheme cross_validation"):
        main.command(training_flags(source, tmp_path, "--dataset", "cv", "--savename", "x", "--fold", "1"))
    assert not list(tmp_path.iterdir())


def test_flags_that_cannot_train_leave_no_folder(source: Path, tmp_path: Path) -> None:
    for more in ([], ["--fold", "1"]):
        with pytest.raises(UserError, match="needs 40 classes per batch"):
            main.command(training_flags(source, tmp_path, *CROSS, "--savename", "x", "--bs", "80", *more))
        assert not (tmp_path / "cv" / "x").exists()


def test_two_machines_may_have_one_process_id(source: Path, tmp_path: Path) -> None:
    """As in containers: what another one is writing in a shared folder is left alone."""
    theirs = tmp_path / "cv" / f".part-{os.getpid()}-run"
    theirs.mkdir(parents=True)
    (theirs / "config.yaml").write_text("x: 1")
    main.command(training_flags(source, tmp_path, *CROSS, "--savename", "run", "--fold", "0"))
    assert (theirs / "config.yaml").exists()


# Resuming


def test_resumed_run_is_the_uninterrupted_one(source: Path, tmp_path: Path) -> None:
    """Learned beta, Adam's moments, BatchNorm, workers, a step of the learning rate before and one after the stop."""
    more = ["--dataset", "tiny", "--embed_dim", "512", "--kernels", "2", "--tau", "1", "3", "--gamma", "0.5"]
    flags = training_flags(source, tmp_path, *more, "--loss", "marginloss", "--grad_measure", "--dist_measure")
    main.command([*flags, "--savename", "whole", "--n_epochs", "4"])
    main.command([*flags, "--savename", "run", "--n_epochs", "2"])
    whole, resumed = tmp_path / "tiny" / "whole", tmp_path / "tiny" / "run"
    main.command(["--save_path", str(tmp_path), "--resume_training", "--savename", "run", "--n_epochs", "4"])
    assert_same_run(resumed, whole)
    rates = [float(row["Learning Rate"]) for row in csv_rows(resumed / "log_train_Base.csv")]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])
    gradients = [np.load(folder / "grad_measure.npz") for folder in (resumed, whole)]
    assert all(gradients[0][name].tobytes() == gradients[1][name].tobytes() for name in gradients[1])
    assert len(csv_rows(resumed / "distance_measures_Train.csv")) == 4
    events = EventAccumulator(str(resumed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/Train Loss")] == [1, 2, 3, 4]


def test_changed_flags_hold_and_are_kept(copied: Path, go_on: Run) -> None:
    go_on("--resume_training", "--n_epochs", "3", "--lr", "0.25")
    kept = yaml.safe_load((copied / "resume_training_config_diffs_2" / "config.yaml").read_text())
    assert (kept["lr"], kept["n_epochs"]) == (0.25, 3)
    assert set(kept) <= {"lr", "n_epochs", "save_path"}
    stored = yaml.safe_load((copied / "config.yaml").read_text())
    assert (stored["lr"], stored["n_epochs"], stored["embed_dim"]) == (0.25, 3, 16)
    (first, nothing), (second, changes) = configurations(copied)
    assert (first, nothing, second) == (0, {}, 2)
    assert (changes["lr"], changes["n_epochs"]) == (0.25, 3)
    rows = csv_rows(copied / "log_train_Base.csv")
    assert [float(row["Learning Rate"]) for row in rows] == [1e-3, 1e-3, 0.25]


def test_best_goes_back_and_keeps_what_came_after(
    run: Run, go_on: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny" / "run"
    scores(monkeypatch, 0.5, 0.9, 0.1, 0.2, 0.3)
    run("--n_epochs", "4")
    before = csv_rows(folder / "log_train_Base.csv")
    last = (folder / "last.pth.tar").read_bytes()
    go_on("--resume_training", "best", "--n_epochs", "3")
    for kind in ("train", "val"):
        assert [int(row["Epochs"]) for row in csv_rows(folder / f"log_{kind}_Base.csv")] == [1, 2, 3]
        assert [row["Epochs"] for row in rows_of(folder)[kind]] == [1, 2, 3]
    assert csv_rows(folder / "log_train_Base.csv") == before[:3]  # the same seeds, the same epoch
    kept = folder / "dropped_after_epoch_2"
    assert csv_rows(kept / "log_train_Base.csv") == before
    assert [row["Epochs"] for row in rows_of(kept)["val"]] == [1, 2, 3, 4]
    assert (kept / "last.pth.tar").read_bytes() == last
    assert auxiliaries.load_json(folder / "summary.json")["selected"]["epoch"] == 2


def test_best_is_what_last_says_where_its_copy_is_missing(
    run: Run, go_on: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after last.pth.tar was written and before checkpoint.pth.tar was."""
    folder = tmp_path / "tiny" / "run"
    scores(monkeypatch, 0.5, 0.9, 0.1, 0.1)
    link_file = auxiliaries.link_file

    def stopped(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pth.tar" and target.exists():
            raise KeyboardInterrupt
        link_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(auxiliaries, "link_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    go_on("--resume_training", "best", "--n_epochs", "3")

    assert not list(folder.glob("dropped_after_epoch_*"))
    assert auxiliaries.load_json(folder / "summary.json")["selected"]["epoch"] == 2


def test_resuming_a_finished_run_changes_nothing(finished: Path, crossed: CrossValidated) -> None:
    for folder in (finished, crossed.folder):
        before = {path: path.read_bytes() for path in folder.rglob("*.csv")}
        states = {path: path.read_bytes() for path in folder.rglob("last.pth.tar")}
        main.command(["--resume_training", "--savename", "run", "--save_path", str(folder.parents[1])])
        assert {path: path.read_bytes() for path in states} == states
        for path, content in before.items():
            if path.name != "log_test_Base.csv":  # its times are new
                assert path.read_bytes() == content, path
        assert not list(folder.rglob("resume_training_config_diffs_*"))


def test_numbered_run_goes_on_without_changes(run: Run, go_on: Run, tmp_path: Path) -> None:
    run("--n_epochs", "1")
    run("--n_epochs", "1")
    go_on("--resume_training", savename="run_1")
    assert not list((tmp_path / "tiny" / "run_1").glob("resume_training_config_diffs_*"))


@pytest.mark.parametrize("savename", ["run[1]", "run*"])
def test_name_with_brackets_is_found_again(run: Run, go_on: Run, tmp_path: Path, savename: str) -> None:
    run("--savename", savename, "--n_epochs", "1")
    (tmp_path / "tiny" / "run2").mkdir()
    go_on("--resume_training", "--n_epochs", "1", savename=savename)


def test_refused_flags_are_not_kept(crossed: CrossValidated, tmp_path: Path, go_on: Run) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    with pytest.raises(UserError, match="needs 40 classes per batch"):
        go_on("--resume_training", "--bs", "80", "--n_epochs", "3")

    assert yaml.safe_load((folder / "config.yaml").read_text())["bs"] == 8
    assert not list(folder.glob("resume_training_config_diffs_*"))


def test_folds_go_on(
    source: Path, tmp_path: Path, crossed: CrossValidated, go_on: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is finished, one half done, one not begun."""
    train_one_epoch, calls = main.train_one_epoch, 0

    def stopped(*args: Any, **kwargs: Any) -> records.Row:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return train_one_epoch(*args, **kwargs)

    folder = tmp_path / "cv" / "run"
    folder.mkdir(parents=True)
    shutil.copyfile(crossed.folder / "config.yaml", folder / "config.yaml")
    shutil.copytree(crossed.folds[0], folder / "fold_0")
    flags = ["--save_path", str(tmp_path), "--savename", "run", "--resume_training"]
    with monkeypatch.context() as patch:
        patch.setattr(main, "train_one_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            main.command([*flags, "--fold", "1"])
    assert runs.epoch_reached(folder / "fold_1") == 1
    assert main.command(flags) == crossed.metrics
    for fold in crossed.folds:
        assert_same_run(folder / fold.name, fold)
    assert (folder / "meta/results.csv").read_bytes() == (crossed.folder / "meta/results.csv").read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--savename", "runn"], "did you mean run?"),
        (
            ["--arch", "squeezenet1_1"],
            "was trained with --arch shufflenet_v2_x0_5, which must stay the same: drop the flag",
        ),
        (["--loss", "triplet"], "was trained with --loss marginloss, which must stay the same: drop the flag"),
        (["--embed_dim", "32"], "was trained with --embed_dim 16, which must stay the same: drop the flag"),
        (["--dataset", "cv"], "there is no run"),
        (["--reproduce_results", "x"], "--resume_training and --reproduce_results contradict"),
        (["--evaluate"], "--resume_training and --evaluate contradict"),
        (["--eval_pca", "2"], "--eval_pca says how to --evaluate"),
    ],
)
def test_refused_to_go_on(copied: Path, go_on: Run, flags: list[str], words: str) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        go_on("--resume_training", "--n_epochs", "3", *flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_refused_for_what_the_folder_is(copied: Path, go_on: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Name it with --savename"):
        main.command(["--resume_training"])
    (tmp_path / "other" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="say which with --dataset"):
        go_on("--resume_training")
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        go_on("--resume_training", "--dataset", "other")
    shutil.rmtree(tmp_path / "other")

    environment = copied / "environment.json"
    original = environment.read_text()
    environment.write_text(json.dumps({**json.loads(original), "version": 99}))
    with pytest.raises(UserError, match="later version"):
        go_on("--resume_training")
    environment.write_text(original)
    last = copied / "last.pth.tar"
    whole = last.read_bytes()
    torch.save({**torch.load(last, weights_only=True), "version": 99}, last)
    with pytest.raises(UserError, match="later version"):
        go_on("--resume_training")
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"last\.pth\.tar is incomplete or corrupt"):
        go_on("--resume_training")


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("refused", flush=True)
else:
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_kept_out(copied: Path, go_on: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    command = [sys.executable, "-c", LOCK, str(copied / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        for kind in ("latest", "best"):
            with pytest.raises(UserError, match="another process is using"):
                go_on("--resume_training", kind, "--lr", "0.5", "--n_epochs", "3")
        other.communicate("")
    train_one_epoch, answers = main.train_one_epoch, []

    def asking(*args: Any, **kwargs: Any) -> records.Row:
        answers.append(subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout)
        return train_one_epoch(*args, **kwargs)

    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    monkeypatch.setattr(main, "train_one_epoch", asking)
    go_on("--resume_training", "--n_epochs", "3", "--kernels", "1")
    assert answers == ["refused\n"]
    assert after == before


# Crashes


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of tests/crash_child.py."""
    work = tmp_path_factory.mktemp("crashes")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(ROOT / "tests" / "crash_child.py"), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return auxiliaries.load_json(work / "report.json")


def test_killed_run_goes_on_as_if_nothing_had_happened(crashes: dict[str, Any]) -> None:
    moments = crashes["moments"]
    for moment in moments:
        print(f"killed at event {moment['number']}, {moment['event']}" + " and again" * bool(moment["again"]))
    assert len(moments) >= 20
    assert all(moment["killed"] and moment.get("killed again", True) for moment in moments)
    for moment in moments:
        assert moment["resumed"], moment
        assert moment["differences"] == [], moment
        assert moment.get("integrity", "ok") == "ok", moment


def test_moments_cover_every_rename_and_every_kind(crashes: dict[str, Any]) -> None:
    covered = {moment["event"] for moment in crashes["moments"]}
    renames = {name for name in crashes["events"] if re.match("before (replace|rename) ", name)}
    assert renames <= covered
    assert {"before replace last.pth.tar", "before replace checkpoint.pth.tar", "before rename run"} <= renames
    for kind in (
        *("optimizer.step", "in mid-row of ", "half of torch.save", "after SQLite insert"),
        *("after Records.add", "before evaluate", "after evaluate", "before flush", "after replace last.pth.tar"),
        *("after replace checkpoint.pth.tar", "half of write_", "after note_configuration"),
    ):
        assert any(event.startswith(kind) for event in covered), kind


def test_nothing_half_written_is_left_in_a_resumed_run(crashes: dict[str, Any]) -> None:
    left = {m["event"]: m["left over"] for m in crashes["moments"] if m["had a folder"] and m["left over"]}
    assert left == {}


# Reproducing


def test_reproduced_run_is_equal(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = main.command(["--reproduce_results", str(finished), "--save_path", str(tmp_path)])
    again = tmp_path / "tiny" / "run_reproduced"
    assert_same_run(again, finished)
    summaries = [auxiliaries.load_json(folder / "summary.json") for folder in (finished, again)]
    assert metrics == summaries[0]["selected"]["test"]
    assert summaries[0]["selected"] == summaries[1]["selected"]
    printed = capsys.readouterr()
    value = metrics["Recall @ 1"]
    assert re.search(r"original +reproduced +difference", printed.out)
    assert re.search(rf"selected, test, Recall @ 1 +{value:.4f} +{value:.4f} +\+0.0000", printed.out)
    assert "other flags" not in printed.out
    assert "figures may differ" not in printed.err


def test_config_alone_is_enough_and_flags_beside_it_are_shown(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "only"
    source.mkdir()
    shutil.copyfile(finished / "config.yaml", source / "config.yaml")
    flags = ["--reproduce_results", str(source), "--save_path", str(tmp_path / "results")]
    main.command([*flags, "--n_epochs", "1"])
    assert "other flags than the original's: --n_epochs 1" in capsys.readouterr().out
    again = tmp_path / "results" / "tiny" / "only_reproduced"
    assert csv_rows(again / "log_train_Base.csv") == csv_rows(finished / "log_train_Base.csv")[:1]


def test_reproduced_cross_validation_is_equal(
    crossed: CrossValidated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = main.command(["--reproduce_results", str(crossed.folder), "--save_path", str(tmp_path)])
    assert metrics == crossed.metrics
    for fold in crossed.folds:
        assert_same_run(tmp_path / "cv" / "run_reproduced" / fold.name, fold)
    value = metrics["NMI"]
    assert re.search(rf"selected, test, NMI +{value:.4f} +{value:.4f} +\+0.0000", capsys.readouterr().out)


def test_change_on_resume_is_reproduced(copied: Path, go_on: Run, tmp_path: Path) -> None:
    metrics = go_on("--resume_training", "--n_epochs", "3", "--lr", "0.05")
    assert main.command(["--reproduce_results", str(copied), "--save_path", str(tmp_path / "new")]) == metrics
    again = tmp_path / "new" / "tiny" / "run_reproduced"
    assert_same_run(again, copied)
    assert [float(row["Learning Rate"]) for row in csv_rows(again / "log_train_Base.csv")] == [1e-3, 1e-3, 0.05]


def test_other_versions_are_noticed(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = json.loads((copied / "environment.json").read_text())
    (copied / "environment.json").write_text(json.dumps({**environment, "torch": "0.4.1", "git commit": "abc"}))
    monkeypatch.setattr(protocol, "train", lambda *_, **__: {})
    main.command(["--reproduce_results", str(copied), "--save_path", str(tmp_path / "new")])
    notices = capsys.readouterr().err
    assert f"torch is {torch.__version__}, and was 0.4.1 in the original" in notices
    assert "git commit is" in notices
    assert "numpy" not in notices


# What was found by trying


def test_a_fold_that_went_on_alone_takes_the_others_with_it(
    crossed: CrossValidated, tmp_path: Path, go_on: Run
) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    assert go_on("--resume_training", "--fold", "0", "--n_epochs", "3") == {}
    assert not (folder / "meta").exists()  # it was of other flags
    assert go_on("--resume_training") != {}
    rows = auxiliaries.load_json(folder / "meta" / "results.json")
    assert {row["Folds"] for row in rows} == {3}
    assert [runs.load_flags(fold).n_epochs for fold in sorted(folder.glob("fold_*"))] == [3, 3, 3]
    kept = sorted(path.name for path in folder.glob("resume_training_config_diffs_*"))
    assert kept == ["resume_training_config_diffs_2", "resume_training_config_diffs_3_2_2"]


def test_fewer_folds_than_have_begun_are_refused(crossed: CrossValidated, tmp_path: Path, go_on: Run) -> None:
    shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    with pytest.raises(UserError, match="has begun with fold 2 already: drop --num_training_sets 2"):
        go_on("--resume_training", "--num_training_sets", "2")


def test_gradients_that_are_recorded_late_are_recorded_once(
    copied: Path, go_on: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            go_on("--resume_training", "--grad_measure", "--n_epochs", "4")
    go_on("--resume_training")
    iterations = [int(row["Iteration"]) for row in csv_rows(copied / "log_iterations.csv") if row["Epochs"] in "34"]
    gradients = np.load(copied / "grad_measure.npz")
    assert gradients["iteration"].tolist() == iterations
    assert len(gradients["mean"]) == len(iterations)


def test_lost_last_checkpoint_starts_nothing_anew(copied: Path, go_on: Run) -> None:
    (copied / "last.pth.tar").unlink()
    best = (copied / "checkpoint.pth.tar").read_bytes()
    for flags in (["--resume_training"], ["--resume_training", "best"], ["--evaluate"]):
        with pytest.raises(UserError, match=r"has lost last\.pth\.tar: copy checkpoint\.pth\.tar to it"):
            go_on(*flags)
    assert (copied / "checkpoint.pth.tar").read_bytes() == best


def test_tensorboard_that_is_asked_for_late_shows_everything(run: Run, go_on: Run, tmp_path: Path) -> None:
    run("--no-tensorboard")
    folder = tmp_path / "tiny" / "run"
    assert not (folder / "tensorboard").exists()
    go_on("--resume_training", "--tensorboard", "--n_epochs", "3")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("metrics/val/Recall @ 1")] == [1, 2, 3]


def test_lower_n_epochs_says_that_nothing_is_left(copied: Path, go_on: Run, capsys: pytest.CaptureFixture[str]) -> None:
    go_on("--resume_training", "--n_epochs", "1")
    assert "is finished: nothing is left to train, and its flags stay as they are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("summary.json", "{", "is not valid JSON"),
        ("summary.json", "{}", "is damaged (it lacks selection): --resume_training writes it anew"),
        ("environment.json", "[1]", "is damaged: it doesn't say which version it has"),
        ("environment.json", '{"version": "x"}', "is damaged: it doesn't say which version it has"),
    ],
)
def test_damaged_original_is_noticed_before_anything_is_trained(
    copied: Path, tmp_path: Path, file: str, content: str, words: str
) -> None:
    (copied / file).write_text(content)
    with pytest.raises(UserError) as error:
        main.command(["--reproduce_results", str(copied), "--save_path", str(tmp_path / "new")])
    assert words in str(error.value)
    assert not (tmp_path / "new").exists()


def test_reproducing_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        main.command(training_flags(source, tmp_path, "--dataset", "tiny", "--reproduce_results", ""))


@pytest.mark.parametrize("state", [[1], {"a": 1}])
def test_checkpoint_of_another_kind_is_one_sentence(copied: Path, go_on: Run, state: Any) -> None:
    torch.save(state, copied / "last.pth.tar")
    for flags in (["--resume_training"], ["--evaluate"]):
        with pytest.raises(UserError, match=r"last\.pth\.tar is damaged"):
            go_on(*flags)


def test_folders_in_place_of_files_are_one_sentence(copied: Path, go_on: Run) -> None:
    for name in ("summary.json", "log_test_Base.csv"):
        (copied / name).unlink(missing_ok=True)
        (copied / name).mkdir()
        with pytest.raises(UserError, match=f"{name} can't be"):
            go_on("--resume_training")
        (copied / name).rmdir()


def test_only_numbered_folders_are_folds(crossed: CrossValidated, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name in ("fold_1", "fold_0", "fold_²", "fold_", "fold_x"):
        (folder / name).mkdir(parents=True)
    (folder / "fold_5").write_text("")
    assert runs.fold_folders(folder) == {0: folder / "fold_0", 1: folder / "fold_1"}


def test_names_with_spaces_follow_other_flags(run: Run, tmp_path: Path) -> None:
    run("--n_epochs", "1", "--savename=a b")
    metrics = main.command(["--save_path", str(tmp_path), "--resume_training", "--savename=a b"])
    assert metrics


# A run folder from before this version


@pytest.fixture
def stored_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of version 1.0.0, with its data, in the current directory, and the network that it needs."""
    shutil.copytree(ROOT / "tests" / "stored_run", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def build_tiny(weights: netlib.Weights) -> tuple[torch.nn.Module, int]:
        layers = [torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), 8

    monkeypatch.setitem(netlib.ARCHS, "tiny", netlib.Arch(build_tiny, crop_size=16, resize=18, embed_dim=8))
    return Path("Training_Results/small/run")


def test_a_stored_run_evaluates(stored_run: Path) -> None:
    expected = auxiliaries.load_json(stored_run / "summary.json")["selected"]["test"]
    found = main.command(["--evaluate", str(stored_run)])
    assert found == pytest.approx({f"test {name}": value for name, value in expected.items()}, abs=1e-6)


def test_a_stored_run_resumes(stored_run: Path) -> None:
    train, val = (csv_rows(stored_run / f"log_{kind}_Base.csv") for kind in ("train", "val"))
    main.command(["--resume_training", "--savename", "run", "--n_epochs", "3"])
    for kind, before in (("train", train), ("val", val)):
        after = csv_rows(stored_run / f"log_{kind}_Base.csv")
        assert after[:2] == before
        assert [row["Epochs"] for row in after] == ["1", "2", "3"]
    assert [float(row["Learning Rate"]) for row in csv_rows(stored_run / "log_train_Base.csv")] == pytest.approx(
        [1e-2, 3e-3, 3e-3]
    )
    assert auxiliaries.load_json(stored_run / "summary.json")["last"]["epoch"] == 3


def test_a_stored_run_is_reproduced(stored_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main.command(["--reproduce_results", str(stored_run)])
    again = stored_run.with_name("run_reproduced")
    losses_before, losses_after = (
        [float(row["Train Loss"]) for row in csv_rows(path / "log_train_Base.csv")] for path in (stored_run, again)
    )
    assert losses_after == pytest.approx(losses_before, rel=1e-4)
    assert re.search(r"selected, test, Recall @ 1 +0\.6250", capsys.readouterr().out)


# Data that changed


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy of the datasets that a test may change."""
    return shutil.copytree(source, tmp_path / "own_source")


def test_changed_data_are_refused_on_resuming_and_evaluating(
    own_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.command(training_flags(own_source, tmp_path, "--dataset", "tiny", "--savename", "run", "--n_epochs", "1"))
    folder, images = tmp_path / "tiny" / "run", own_source / "tiny" / "images"
    shutil.copytree(images / "class_0", images / "class_00")  # now class_3 trains no more, but tests
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resume = ["--save_path", str(tmp_path), "--resume_training", "--savename", "run", "--n_epochs", "2"]
    for flags in (resume, ["--evaluate", str(folder)]):
        with pytest.raises(UserError, match=r"the data have changed since .*--accept_changed_data") as error:
            main.command(flags)
        assert "train has 24 images of 4 classes, but other ones" in str(error.value)
        assert "test has 30 images of 5 classes instead of 24 images of 4 classes" in str(error.value)
    assert {path: path.read_bytes() for path in before} == before
    main.command([*resume, "--accept_changed_data"])
    assert "the data have changed" in capsys.readouterr().err
    main.command([*resume[:-1], "3"])  # what was accepted is what the run is of now
    assert auxiliaries.load_checkpoint(folder / "last.pth.tar")["data"]["test test query"]["classes"] == 5
    main.command(["--reproduce_results", str(folder), "--n_epochs", "1"])
    assert "in the original" not in capsys.readouterr().err
    shutil.rmtree(images / "class_00")
    main.command(["--reproduce_results", str(folder), "--n_epochs", "1"])
    assert "test has 24 images of 4 classes instead of 30 images of 5 classes" in capsys.readouterr().err


def test_folds_of_other_test_images_are_left_out_by_name(
    crossed: CrossValidated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    data = auxiliaries.load_json(folder / "fold_1" / "data.json")
    data["test test query"]["sha256"] = "of other images"
    auxiliaries.save_json(folder / "fold_1" / "data.json", data)
    protocol.write_meta_results(runs.load_flags(folder), folder)
    assert f"{folder / 'fold_1'} is left out: its test images differ" in capsys.readouterr().err
    assert {row["Folds"] for row in auxiliaries.load_json(folder / "meta" / "results.json")} == {2}


def test_a_run_from_before_data_were_described_says_so(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "data.json").unlink()
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        state = torch.load(copied / name, weights_only=True)
        torch.save({key: value for key, value in state.items() if key != "data"}, copied / name)
    main.command(["--evaluate", str(copied)])
    assert "doesn't say on which images it was trained" in capsys.readouterr().err


# Finished runs


def test_finished_folds_are_neither_trained_nor_evaluated_again(
    crossed: CrossValidated, tmp_path: Path, go_on: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    (folder / "fold_2" / "summary.json").unlink()  # it was stopped right before its end
    embedded: list[str] = []
    embed = evaluate.embed

    def recording(net: Any, loader: datasets.ImageLoader, device: torch.device, name: str) -> torch.Tensor:
        embedded.append(name)
        return embed(net, loader, device, name)

    monkeypatch.setattr(evaluate, "embed", recording)
    assert go_on("--resume_training", "--no-tensorboard") == crossed.metrics
    assert embedded == ["test"] * 3  # for the concatenated embeddings: fold 2's own rows are in its history
    for fold in crossed.folds:
        assert_same_run(folder / fold.name, fold)


def test_a_finished_fold_that_goes_on_is_the_uninterrupted_one(source: Path, tmp_path: Path, go_on: Run) -> None:
    """The test rows of what was the last epoch go."""
    flags = training_flags(source, tmp_path, *CROSS, "--num_training_sets", "1")
    main.command([*flags, "--savename", "whole", "--n_epochs", "3"])
    main.command([*flags, "--savename", "run"])
    go_on("--resume_training", "--n_epochs", "3")
    assert_same_run(tmp_path / "cv/run/fold_0", tmp_path / "cv/whole/fold_0")
    assert csv_rows(tmp_path / "cv/run/meta/results.csv") == csv_rows(tmp_path / "cv/whole/meta/results.csv")


def test_flags_of_a_finished_run_stay_as_they_are(copied: Path, go_on: Run) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    metrics = go_on("--resume_training", "--lr", "0.5", "--tau", "7")
    assert metrics == auxiliaries.load_json(copied / "summary.json")["selected"]["test"]
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_two_reproductions_at_once_get_folders_of_their_own(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first one trains."""
    flags = ["--reproduce_results", str(finished), "--save_path", str(tmp_path), "--n_epochs", "1"]
    train_one_epoch, others = main.train_one_epoch, [flags]

    def interrupted(*args: Any, **kwargs: Any) -> records.Row:
        if others:
            main.command(others.pop())
        return train_one_epoch(*args, **kwargs)

    monkeypatch.setattr(main, "train_one_epoch", interrupted)
    main.command(flags)
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"run_reproduced", "run_reproduced_1"}
    assert all((path / "summary.json").exists() for path in (tmp_path / "tiny").iterdir())


def test_a_reproduction_that_cannot_train_leaves_no_folder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 20 classes per batch"):
        main.command(["--reproduce_results", str(finished), "--save_path", str(tmp_path), "--bs", "40"])
    assert not list(tmp_path.rglob("config.yaml"))


# What a hunt for bad inputs found


def test_a_resumption_that_fails_changes_nothing(own_source: Path, tmp_path: Path) -> None:
    main.command(training_flags(own_source, tmp_path, "--dataset", "tiny", "--savename", "run", "--n_epochs", "1"))
    folder, image = tmp_path / "tiny" / "run", own_source / "tiny" / "images" / "class_0" / "0.jpg"
    image.write_text("junk")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resume = ["--save_path", str(tmp_path), "--resume_training", "--savename", "run", "--n_epochs", "2", "--lr", "0.5"]
    with pytest.raises(UserError, match=r"class_0.*0\.jpg"):
        main.command(resume)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("kind", ["latest", "best"])
def test_a_run_whose_state_does_not_fit_stays_as_it_is(
    run: Run, go_on: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tmp_path / "tiny" / "run"
    scores(monkeypatch, 0.9, 0.1)
    run()
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        state = torch.load(folder / name, weights_only=True)
        state["state_dict"]["embedding.bias"] = torch.zeros(3)
        torch.save(state, folder / name)
    before = contents(folder)
    with pytest.raises(UserError, match="embedding"):
        go_on("--resume_training", kind, "--n_epochs", "3", "--lr", "0.5")
    assert contents(folder) == before


@pytest.mark.parametrize("spoiled", ["data", "state"])
def test_folds_stay_as_they_are_where_one_cannot_continue(
    own_source: Path, crossed: CrossValidated, tmp_path: Path, go_on: Run, spoiled: str
) -> None:
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    if spoiled == "data":
        data = auxiliaries.load_json(folder / "fold_2" / "data.json")
        data["train"]["sha256"] = "of other images"
        auxiliaries.save_json(folder / "fold_2" / "data.json", data)
    else:
        for name in ("last.pth.tar", "checkpoint.pth.tar"):
            state = torch.load(folder / "fold_2" / name, weights_only=True)
            state["criterion"] = {"beta": torch.zeros(3)}
            torch.save(state, folder / "fold_2" / name)
    before = contents(folder)
    with pytest.raises(UserError):
        go_on("--resume_training", "best", "--n_epochs", "3", "--lr", "0.5")
    assert contents(folder) == before


def test_all_folds_go_back_before_one_goes_on(
    crossed: CrossValidated, tmp_path: Path, go_on: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first fold, the others continue from their best epochs without being told once more."""
    folder = shutil.copytree(crossed.folder, tmp_path / "cv" / "run")
    best = [auxiliaries.load_checkpoint(fold / "checkpoint.pth.tar")["epoch"] for fold in crossed.folds]

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "train_one_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        go_on("--resume_training", "best", "--n_epochs", "3")
    assert [runs.epoch_reached(folder / fold.name) for fold in crossed.folds] == best


def test_training_and_validation_folders_are_enough(tmp_path: Path) -> None:
    make_tree(tmp_path / "data" / "train", classes=4, per_class=4)
    make_tree(tmp_path / "data" / "val", classes=4, per_class=4, seed=1)
    for label in range(4):
        (tmp_path / "data" / "val" / f"class_{label}").rename(tmp_path / "data" / "val" / f"other_{label}")
    flags = training_flags(tmp_path, tmp_path / "results", "--savename", "run", "--n_epochs", "1")
    metrics = main.command([*flags, "--dataset", str(tmp_path / "data")])
    summary = auxiliaries.load_json(tmp_path / "results" / "data" / "run" / "summary.json")
    assert metrics == summary["selected"]["val"]
    assert "best on test" not in summary


def test_the_description_of_the_data_is_also_in_the_checkpoint(own_source: Path, tmp_path: Path) -> None:
    main.command(training_flags(own_source, tmp_path, "--dataset", "tiny", "--savename", "run", "--n_epochs", "1"))
    (tmp_path / "tiny" / "run" / "data.json").unlink()
    shutil.copytree(own_source / "tiny/images/class_0", own_source / "tiny/images/class_00")
    with pytest.raises(UserError, match="the data have changed"):
        main.command(["--evaluate", str(tmp_path / "tiny" / "run")])


@pytest.mark.parametrize("change", ["missing", "odd name", "shape"])
def test_evaluating_the_network_of_another_run_is_one_sentence(copied: Path, change: str) -> None:
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        state = torch.load(copied / name, weights_only=True)
        weights = state["state_dict"]
        if change == "missing":
            del weights["embedding.bias"]
        elif change == "odd name":
            weights[5] = torch.zeros(1)
        else:
            weights["embedding.bias"] = torch.zeros(3)
        torch.save(state, copied / name)
    with pytest.raises(UserError, match=r"the checkpoint of .* is of another network than its config\.yaml") as error:
        main.command(["--evaluate", str(copied)])
    assert "\n" not in str(error.value)
