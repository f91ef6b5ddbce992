"""The table and the plot of several runs, from run folders made by hand."""

from __future__ import annotations

import contextlib
import csv
import html
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import compare
import records
import significance
from auxiliaries import UserError, save_json

FLAGS = {"dataset": "tiny", "arch": "resnet18", "loss": "marginloss", "lr": 1e-5, "num_training_sets": 2}


def make_run(folder: Path, recalls: list[float], **flags: object) -> Path:
    """A run folder whose epochs had these values of Recall @ 1; the highest is selected."""
    folder.mkdir(parents=True)
    best = int(np.argmax(recalls))
    (folder / "config.yaml").write_text(yaml.safe_dump({**FLAGS, **flags, "savename": folder.name}))
    models = {"selected": recalls[best], "last": recalls[-1]}
    write_summary(folder, {name: {"test": {"Recall @ 1": value}} for name, value in models.items()}, 10 * len(recalls))
    write_data(folder)
    with open(folder / "log_val_Base.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Epochs", "Time", "NMI", "Recall @ 1"])
        writer.writerows([epoch, 1.0, 0.5, value] for epoch, value in enumerate(recalls, start=1))
    return folder


def write_summary(folder: Path, models: dict[str, dict[str, object]], seconds: float = 1.0) -> None:
    networks = {name: {"epoch": 1, **figures} for name, figures in models.items()}
    save_json(folder / "summary.json", {"selection": "", "metric": "Recall @ 1", **networks, "seconds": seconds})


def write_data(folder: Path, digest: str = "ab", images: int = 8) -> None:
    """What a run says of the images that it was trained and tested on."""
    entry = {"images": images, "classes": 2, "sha256": digest}
    save_json(folder / "data.json", {"train": {**entry, "sha256": folder.name}, "test test query": entry})


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    folders = [
        make_run(tmp_path / "a", [0.4, 0.6, 0.5], seed=1, kernels=2),
        make_run(tmp_path / "b", [0.4, 0.7], seed=2, kernels=8),
        make_run(tmp_path / "c", [0.3, 0.8, 0.9], seed=3),
        make_run(tmp_path / "d", [0.5, 0.5, 0.55], seed=1, loss="triplet"),
    ]
    return [str(folder) for folder in folders]


def test_runs_are_grouped_by_configuration_without_the_seed(runs: list[str], tmp_path: Path) -> None:
    rows = compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    assert [(row["Configuration"], row["Seeds"], row["Runs"]) for row in rows] == [
        ("loss marginloss", 3, 3),
        ("loss triplet", 1, 1),
    ]
    selected, last = np.array([0.6, 0.7, 0.9]), np.array([0.5, 0.7, 0.9])
    assert rows[0]["test Recall @ 1, selected"] == pytest.approx(selected.mean())
    assert rows[0]["test Recall @ 1, last"] == pytest.approx(last.mean())
    low, _ = stats.t.interval(0.95, 2, selected.mean(), stats.sem(selected))
    assert rows[0]["CI 95 %, selected"] == pytest.approx(selected.mean() - low)
    assert rows[0]["Seconds"] == pytest.approx((30 + 20 + 30) / 3)
    assert np.isnan(rows[1]["CI 95 %, selected"])
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("loss marginloss") == 1
    assert svg.count("loss triplet") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "--svg '' is not the name of an SVG file: end it with .svg"),
        ("table.docx", "--svg table.docx is not the name of an SVG file"),
        ("a\0b.svg", "has a NUL character"),
        ("none/a.svg", "can't be written: name a file in a folder that exists"),
        ("x" * 5000, f"--svg: {'x' * 60}… is not a path"),
    ],
    ids=["empty", "foreign", "NUL", "nowhere", "long"],
)
def test_a_plot_that_cannot_be_drawn_is_refused_before_runs_are_read(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        compare.main([str(tmp_path / "nothing"), f"--svg={name}"])
    assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_home_folder_is_expanded(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    compare.main(["~/a", "~/b", "--svg", "~/curves.svg"])
    assert (tmp_path / "curves.svg").exists()


@pytest.mark.parametrize(("name", "words"), [("x" * 5000, "x… is not a path"), ("a\0b", "has a NUL character")])
def test_folders_that_cannot_be_are_refused(runs: list[str], name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compare.main([*runs, name])


def test_figures_of_impossible_size_are_left_out(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (tmp_path / "a" / "log_val_Base.csv").read_text()
    (tmp_path / "a" / "log_val_Base.csv").write_text(text.replace("0.4", "1e308"))
    compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    assert (
        "a is left out: log_val_Base.csv is damaged: it has impossible values of Recall @ 1" in capsys.readouterr().err
    )


def test_a_curve_begins_with_the_network_before_training(runs: list[str]) -> None:
    log = Path(runs[0]) / "log_val_Base.csv"
    header, *rows = log.read_text().splitlines()
    log.write_text("\n".join([header, "-1,1.0,0.5,0.9", "0,1.0,0.5,0.2", *rows]))
    assert compare.read_curve(log, "Recall @ 1") == {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.5}


def test_curves_are_means_where_all_runs_were_evaluated(runs: list[str]) -> None:
    bands = compare.compute_bands(compare.average_folds(compare.read_runs(map(Path, runs), "Recall @ 1")))
    assert [epoch for epoch, _, _ in bands["loss marginloss"]] == [1, 2]
    assert [mean for _, mean, _ in bands["loss marginloss"]] == pytest.approx([1.1 / 3, 0.7])
    assert [mean for _, mean, _ in bands["loss triplet"]] == [0.5, 0.5, 0.55]


def test_a_repeated_seed_counts_once(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = make_run(tmp_path / "e", [0.99], seed=2, savename="another")
    rows = compare.main([*runs, str(again), "--svg", str(tmp_path / "curves.svg")])
    found = [(row["Runs"], row["test Recall @ 1, selected"]) for row in rows]
    assert found == [(3, pytest.approx(2.2 / 3)), (1, 0.55)]
    assert f"notice: {again} is left out: it repeats {runs[1]}, including the seed" in capsys.readouterr().err


def test_labels_keep_values_as_they_are(tmp_path: Path) -> None:
    """Runs may lack flags that others have; numbers don't turn into others of another type."""
    folders = [
        make_run(tmp_path / "a", [0.5], embed_dim=128, tau=[30, 55]),
        make_run(tmp_path / "b", [0.6], embed_dim=None, tau=[]),
        make_run(tmp_path / "c", [0.7], tau=[30, 55]),
        make_run(tmp_path / "d", [0.8], tau=[30, 55], seed=2),
    ]
    svg = ["--svg", str(tmp_path / "curves.svg")]
    rows = compare.main([*map(str, folders), *svg])
    assert [(row["Configuration"], row["Runs"]) for row in rows] == [
        ("embed_dim 128, tau [30, 55]", 1),
        ("embed_dim None, tau []", 1),
        ("embed_dim None, tau [30, 55]", 2),
    ]
    (row,) = compare.main([str(folders[0]), *svg])
    assert row["Configuration"] == "dataset tiny, arch resnet18, loss marginloss"


def test_several_test_sets_are_averaged(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [0.5])
    metrics = {"Set 0 Recall @ 1": 0.25, "Set 1 Recall @ 1": 0.75}
    write_summary(folder, {name: {"val": metrics} for name in ("selected", "last")})
    lines = ["Epochs,Time,Set 0 Recall @ 1,Set 1 Recall @ 1", "1,1.0,nan,0.5", "2,1.0,0.25,0.75", "3,1.0,,"]
    (folder / "log_val_Base.csv").write_text("\n".join(lines))
    (run,) = compare.read_runs([folder], "Recall @ 1")
    assert (run["selected"], run["curve"]) == (0.5, {2: 0.5})
    (row,) = compare.main([str(folder), "--svg", str(tmp_path / "curves.svg")])
    assert row["validation Recall @ 1, selected"] == 0.5


def make_folds(folder: Path, by_fold: list[list[float]], **flags: object) -> str:
    """A cross-validation of three folds, of which some are there."""
    cross = {"split_scheme": "cross_validation", "num_training_sets": 3, **flags}
    parent = make_run(folder, [0.1], **cross)
    (parent / "summary.json").unlink()
    for fold, recalls in enumerate(by_fold):
        make_run(parent / f"fold_{fold}", recalls, fold=fold, **cross)
    return str(parent)


def test_missing_folds_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = make_folds(tmp_path / "cv", [[0.4], [0.6]])
    (row,) = compare.main([parent, "--svg", str(tmp_path / "curves.svg")])
    assert (row["Seeds"], row["Runs"], row["test Recall @ 1, selected"]) == (1, 2, 0.5)
    assert f"{Path(parent) / 'fold_2'} is left out: not begun" in capsys.readouterr().err


def test_intervals_are_over_seeds_of_means_over_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folds share their test classes: they are no independent draws."""
    recalls = np.array([[0.4, 0.6, 0.8], [0.5, 0.7, 0.9], [0.3, 0.4, 0.65]])
    names = [
        make_folds(tmp_path / f"cv{seed}", [[0.1, recall] for recall in of_seed], seed=seed)
        for seed, of_seed in enumerate(recalls.tolist())
    ]
    (row,) = compare.main([*names, "--svg", str(tmp_path / "curves.svg")])
    means = recalls.mean(axis=1)
    low, _ = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert (row["Seeds"], row["Runs"]) == (3, 9)
    assert row["test Recall @ 1, selected"] == pytest.approx(means.mean())
    assert row["CI 95 %, selected"] == pytest.approx(means.mean() - low)
    printed = capsys.readouterr()
    what = "Mean over seeds ± half of its 95 % confidence interval; a seed's figure is the mean over its folds."
    assert printed.out.splitlines()[0] == what
    assert not printed.err.count("left out")
    bands = compare.compute_bands(compare.average_folds(compare.read_runs(map(Path, names), "Recall @ 1")))
    ((label, points),) = bands.items()
    assert label == "dataset tiny, arch resnet18, loss marginloss"
    assert [epoch for epoch, _, _ in points] == [1, 2]
    assert points[1][1:] == pytest.approx((means.mean(), means.mean() - low))

    compare.main([names[0], "--svg", str(tmp_path / "curves.svg")])
    assert "± 0" not in capsys.readouterr().out  # of a single seed there is no interval


def test_a_seed_that_lacks_folds_is_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        make_folds(tmp_path / "whole", [[0.4], [0.6], [0.8]], seed=1),
        make_folds(tmp_path / "part", [[0.1]], seed=2),
    ]
    (row,) = compare.main([*names, "--svg", str(tmp_path / "curves.svg")])
    assert (row["Seeds"], row["Runs"], row["test Recall @ 1, selected"]) == (1, 3, pytest.approx(0.6))
    reason = "seed 2 has other folds than another seed of this configuration"
    assert f"{tmp_path / 'part' / 'fold_0'} is left out: {reason}" in capsys.readouterr().err


def test_runs_on_other_test_images_are_left_out_by_name(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(Path(runs[1]), digest="cd")  # another image of the same number
    rows = compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    assert [row["Runs"] for row in rows] == [2, 1]
    assert f"{runs[1]} is left out: its test images differ from those of {runs[0]}" in capsys.readouterr().err
    for name in (runs[1], runs[3]):
        (Path(name) / "data.json").unlink()
    assert [row["Runs"] for row in compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])] == [3, 1]
    assert "2 run(s) don't say on which images they were tested" in capsys.readouterr().err
    write_data(Path(runs[3]), images=9)  # another configuration
    assert [row["Runs"] for row in compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])] == [3, 1]
    assert f"{runs[3]} and {runs[0]} were tested on different images" in capsys.readouterr().err


def test_figures_of_validation_classes_do_not_stand_beside_those_of_test_classes(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(Path(runs[0]), {name: {"val": {"Recall @ 1": 0.99}} for name in ("selected", "last")})
    rows = compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    assert [row["Runs"] for row in rows] == [2, 1]
    assert f"{runs[0]} is left out: it has figures of validation classes only" in capsys.readouterr().err


def summary_with(figures: dict[str, object], **more: object) -> str:
    """A summary.json in which both networks have these figures."""
    networks = {name: {"epoch": 1, **figures} for name in ("selected", "last")}
    return json.dumps({"selection": "", "metric": "Recall @ 1", **networks, "seconds": 1.0, **more})


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.yaml", None, "is not a run folder: it has no config.yaml"),
        ("summary.json", None, "unfinished: it has no summary.json"),
        ("summary.json", "{", "is not valid JSON"),
        ("summary.json", "{}", "damaged"),
        ("config.yaml", "[1", "is not a YAML file"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\n1,x\n", "damaged"),
        ("log_val_Base.csv", None, "damaged"),
        ("log_val_Base.csv", "Time,Recall @ 1\n1,0.5\n", "damaged"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\n1,0.5,7,8\n", "damaged"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\ninf,0.5\n", "damaged"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\n-2,0.5\n", "damaged"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\n1e300,0.5\n", "damaged"),
        ("log_val_Base.csv", f"Epochs,Recall @ 1\n1,{'5' * 200_000}\n", "damaged"),
        ("config.yaml", "seed: [1]\n", "damaged"),
        ("config.yaml", "fold: x\n", "damaged"),
        ("config.yaml", "- seed\n", "damaged"),
        ("summary.json", "[1]", "damaged"),
        ("summary.json", json.dumps({"selected": {"test": {}}, "last": {"test": {}}}), "damaged"),
        ("summary.json", summary_with({"test": {"Recall @ 1": "0.5"}}), "damaged"),
        ("summary.json", summary_with({"test": {"Recall @ 1": [0.5]}}), "damaged"),
        ("summary.json", summary_with({"test": [0.5]}), "damaged"),
        ("summary.json", summary_with({"test": {"Recall @ 1": 0.5}}, seconds="long"), "damaged"),
        ("summary.json", summary_with({"test": {"Recall @ 1": None}}), "its Recall @ 1 is NaN"),
        ("data.json", "[]", "damaged"),
    ],
)
def test_broken_folders_are_listed(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | None, words: str
) -> None:
    path = Path(runs[3]) / file
    path.unlink() if text is None else path.write_text(text)
    assert len(compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])) == 1
    line, _ = capsys.readouterr().err.splitlines()
    assert line.startswith(f"notice: {runs[3]} is left out: ")
    assert words in line


def test_impossible_numbers_of_folds_are_not_believed(tmp_path: Path) -> None:
    parent = make_folds(tmp_path / "cv", [[0.4]], num_training_sets=10**12)
    assert compare.expected_folders(Path(parent)) == [Path(parent) / "fold_0"]


def test_markdown_csv_and_json_say_the_same(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    table = [
        "| Configuration | Seeds | Runs | test Recall @ 1, selected | test Recall @ 1, last | Seconds |",
        "|---|---|---|---|---|---|",
        "| loss marginloss | 3 | 3 | 0.7333 ± 0.3795 | 0.7000 ± 0.4968 | 26.7 |",
        "| loss triplet | 1 | 1 | 0.5500 | 0.5500 | 30.0 |",
    ]
    what = "Mean over seeds ± half of its 95 % confidence interval."
    told = [
        "Differences in Recall @ 1 to loss marginloss, the best by Recall @ 1, with 95 % confidence intervals:",
        "",
        f"- no difference can be told between loss marginloss and loss triplet: +0.0500; {compare.ONE_PAIR}",
    ]
    assert capsys.readouterr().out.splitlines() == [what, "", *table, "", *told]
    compare.main([*runs, "--csv", "--svg", str(tmp_path / "curves.svg")])
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["test Recall @ 1, last"]) for row in printed] == [row["test Recall @ 1, last"] for row in rows]
    compare.main([*runs, "--json", "--svg", str(tmp_path / "curves.svg")])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is not JSON
    assert found == [
        {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}
        for row in rows
    ]
    assert found[1]["CI 95 %, last"] is None


def test_bad_input_is_one_sentence(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([*runs, "--metric", "Recal @ 1"])
    assert "it has no Recal @ 1 (did you mean Recall @ 1?)" in capsys.readouterr().err


# Which differences hold


def make_group(folder: Path, loss: str, recalls: list[float], **flags: object) -> list[str]:
    """Runs of one configuration, one for each seed."""
    return [
        str(make_run(folder / f"{loss}_{seed}", [recall], loss=loss, seed=seed, **flags))
        for seed, recall in enumerate(recalls)
    ]


@pytest.fixture
def groups(tmp_path: Path) -> list[str]:
    """Three configurations of five seeds: a good one, one that is a little worse in every seed, and one like it."""
    seeds = np.array([0.60, 0.66, 0.55, 0.63, 0.58])
    noise = np.array([0.001, -0.002, 0.0, 0.003, -0.002])
    folders = make_group(tmp_path, "good", seeds.tolist())
    folders += make_group(tmp_path, "worse", (seeds - 0.02 + noise).tolist())
    return folders + make_group(tmp_path, "alike", (seeds - 0.001 + 5 * noise[::-1]).tolist())


def compared(tmp_path: Path, folders: list[str], *flags: str) -> dict[str, dict[str, Any]]:
    """The rows of a comparison by label."""
    rows = compare.main([*folders, "--svg", str(tmp_path / "curves.svg"), *flags])
    return {row["Configuration"]: row for row in rows}


def test_groups_are_compared_in_pairs_of_seeds(
    groups: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seeds differ by far more than the configurations do, which unpaired intervals would not see through."""
    rows = compared(tmp_path, groups)
    worse = rows["loss worse"]
    pairs = np.array([[0.60, 0.66, 0.55, 0.63, 0.58], [0.581, 0.638, 0.53, 0.613, 0.558]])
    wanted = stats.ttest_rel(pairs[1], pairs[0])
    interval = wanted.confidence_interval(0.95)
    assert worse["Difference"] == pytest.approx(-0.02)
    assert (worse["Difference from"], worse["Difference to"]) == pytest.approx((interval.low, interval.high))
    assert worse["p"] == pytest.approx(wanted.pvalue)
    assert worse["p, Wilcoxon"] == pytest.approx(stats.wilcoxon(pairs[0], pairs[1]).pvalue)
    assert worse["p, Holm"] == pytest.approx(3 * wanted.pvalue)  # of all pairs of three configurations
    assert rows["loss good"]["In words"] == "the reference"
    words = "loss good is better than loss worse: +0.0200 [0.0174, 0.0226], p < 0.001 (Holm < 0.001; Wilcoxon 0.062)"
    assert worse["In words"] == f"{words}; over 5 seeds"
    assert str(rows["loss alike"]["In words"]).startswith(
        "no difference can be told between loss good and loss alike: +0"
    )
    told = capsys.readouterr().out.splitlines()[8:]
    assert told[2:4] == [f"- {rows[f'loss {name}']['In words']}" for name in ("worse", "alike")]
    assert told[5].startswith(
        "Holm's p-values hold for the comparisons of all 3 pairs, since the figures chose the ref"
    )


def test_a_reference_that_is_named_in_advance(
    groups: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compared(tmp_path, groups, "--reference", "worse")
    assert rows["loss worse"]["In words"] == "the reference"
    assert rows["loss good"]["Difference"] == pytest.approx(0.02)
    assert rows["loss good"]["p, Holm"] == pytest.approx(2 * float(str(rows["loss good"]["p"])))
    assert "Holm's p-values hold for 2 comparisons together." in capsys.readouterr().out
    for name, words in (
        ("wors", ""),
        ("loss", "is part of 3 labels: give one of loss good; loss worse; loss alike"),
        ("loss goud", r"is no label \(did you mean loss good\?\): give one of"),
    ):
        if words:
            with pytest.raises(UserError, match=f"--reference {name} {words}"):
                compared(tmp_path, groups, "--reference", name)
        else:
            compared(tmp_path, groups, "--reference", name)


def test_metrics_of_which_less_is_better_are_compared_so(tmp_path: Path) -> None:
    for loss, values in (("low", [0.1, 0.12, 0.13]), ("high", [0.3, 0.33, 0.31])):
        for seed, value in enumerate(values):
            folder = make_run(tmp_path / f"{loss}_{seed}", [0.5], loss=loss, seed=seed)
            metrics = {"Recall @ 1": 0.5, "Alignment": value}
            write_summary(folder, {name: {"test": metrics} for name in ("selected", "last")})
    rows = compared(tmp_path, [str(path) for path in tmp_path.glob("*_*")], "--metric", "Alignment")
    assert rows["loss low"]["In words"] == "the reference"
    assert str(rows["loss high"]["In words"]).startswith("loss low is better than loss high: -0.1967 [-0.2")


def test_one_seed_is_compared_over_its_folds(tmp_path: Path) -> None:
    recalls = {"good": [0.60, 0.64, 0.62], "bad": [0.50, 0.55, 0.51]}
    folders = [
        make_folds(tmp_path / loss, [[recall] for recall in by_fold], loss=loss, seed=3, num_training_partitions=4)
        for loss, by_fold in recalls.items()
    ]
    bad = compared(tmp_path, folders)["loss bad"]
    wanted = significance.paired_over_folds([-0.10, -0.09, -0.11], 4)
    assert (bad["Difference from"], bad["p"]) == pytest.approx((wanted.low, wanted.p))
    assert str(bad["In words"]).endswith(
        "over 3 folds of one seed, corrected for the training classes that folds share"
    )
    # with a second seed, pairs are means over folds
    folders += [
        make_folds(tmp_path / f"{loss}2", [[recall + 0.01 * (loss == "bad")] for recall in by_fold], loss=loss, seed=4)
        for loss, by_fold in recalls.items()
    ]
    for folder in folders[2:]:
        for path in Path(folder).glob("fold_*/config.yaml"):
            path.write_text(path.read_text() + "num_training_partitions: 4\n")
    bad = compared(tmp_path, folders)["loss bad"]
    assert (bad["Difference"], bad["p"]) == pytest.approx((-0.095, stats.ttest_1samp([-0.1, -0.09], 0).pvalue))
    assert str(bad["In words"]).endswith("; over 2 seeds")


def write_results(folder: Path, correct: np.ndarray, labels: np.ndarray, test_set: str = "ab") -> Path:
    """per_query.npz, and a summary of the same figures."""
    arrays = {"correct_at_1": correct, "ap_at_r": correct.astype(np.float32) / 2, "label": labels.astype(np.int32)}
    arrays["weight"] = np.full(len(labels), 1 / len(labels))
    records.save_query_results(folder, arrays, test_set=test_set, epoch=1)
    metrics = {"Recall @ 1": float(correct.mean()), "MAP@R": float(correct.mean()) / 2, "NMI": 0.5}
    write_summary(folder, {name: {"test": metrics} for name in ("selected", "last")})
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two single runs with results by query of 30 classes."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(30), 20)
    good, bad = rng.random(600) < 0.8, rng.random(600) < 0.6
    runs_of = {"good": (make_run(tmp_path / "good", [0.5], loss="good", seed=1), good)}
    runs_of["bad"] = (make_run(tmp_path / "bad", [0.5], loss="bad", seed=2), bad)
    return [str(write_results(folder, correct, labels)) for folder, correct in runs_of.values()]


def test_single_runs_are_compared_by_their_queries(pair: list[str], tmp_path: Path) -> None:
    results = [np.load(Path(folder) / "per_query.npz") for folder in pair]
    by_query = results[1]["correct_at_1"].astype(float) - results[0]["correct_at_1"]
    wanted = significance.bootstrap_over_classes(results[0]["label"], results[0]["weight"], by_query)
    bad = compared(tmp_path, pair)["loss bad"]
    assert (bad["Difference"], bad["Difference from"], bad["p"]) == (wanted.mean, wanted.low, wanted.p)
    assert str(bad["In words"]).startswith("loss good is better than loss bad: +0.")
    assert str(bad["In words"]).endswith("over 30 test classes, drawn anew; the seed's variance is left out")
    assert compared(tmp_path, pair, "--metric", "MAP@R")["loss bad"]["Difference"] == pytest.approx(wanted.mean / 2)
    words = str(compared(tmp_path, pair, "--metric", "NMI")["loss bad"]["In words"])
    assert "runs keep results by query of Recall @ 1, Precision @ 1, MAP@R only: train with two seeds" in words


def test_single_runs_whose_queries_cannot_be_compared_say_why(pair: list[str], tmp_path: Path) -> None:
    bad, labels = Path(pair[1]), np.repeat(np.arange(30), 20)

    def words() -> str:
        return str(compared(tmp_path, pair)["loss bad"]["In words"])

    write_results(bad, np.zeros(600, bool), labels, test_set="cd")
    assert "their queries are different ones, or stand in another order" in words()
    summary = (bad / "summary.json").read_text()
    write_results(bad, np.ones(600, bool), labels)
    (bad / "summary.json").write_text(summary)
    assert "per_query.npz has another Recall @ 1 than summary.json: remove both" in words()
    (bad / "per_query.npz").write_bytes(b"PK")
    assert "per_query.npz is damaged: remove it and summary.json" in words()
    (bad / "per_query.npz").unlink()
    assert "has no per_query.npz, it is of an earlier version: move its summary.json away" in words()
    for folder in pair:
        write_results(Path(folder), np.arange(40) % 4 < 2 + (folder == pair[0]), np.arange(40) % 5)
    assert "5 test classes are too few to draw from, 20 are needed: train with two seeds or more" in words()


def test_labels_are_as_short_as_tells_configurations_apart() -> None:
    tuned = [
        {"dataset": "tiny", "loss": "a", "loss_params": "alpha=31.887239093", "lr": "0.0018693488", "proxy_lr": "0.18"},
        {"dataset": "tiny", "loss": "b", "loss_params": "none", "lr": "0.0009479120", "proxy_lr": "1e-05"},
    ]
    assert compare.label_configurations(tuned) == [
        ("loss a", "loss_params alpha=31.89, lr 0.001869, proxy_lr 0.18"),
        ("loss b", "loss_params none, lr 0.0009479, proxy_lr 1e-05"),
    ]
    grid = [{"loss": loss, "lr": lr, "beta_lr": lr} for loss in "ab" for lr in ("1e-4", "1e-3")]
    assert [label for label, _ in compare.label_configurations(grid)] == [
        *("loss a, lr 1e-4", "loss a, lr 1e-3", "loss b, lr 1e-4", "loss b, lr 1e-3")
    ]
    near = [{"loss": "a", "lr": lr} for lr in ("0.123456", "0.123457")]  # the same with four digits
    assert [label for label, _ in compare.label_configurations(near)] == ["lr 0.123456", "lr 0.123457"]


def test_sentences_name_what_differs() -> None:
    labels = "bs 80, loss triplet, tau [30, 55]", "bs 80, loss npair, tau [30, 60]"
    assert compare.differing_parts(*labels) == ("loss triplet, tau [30, 55]", "loss npair, tau [30, 60]")
    assert compare.differing_parts("loss a", "loss a, lr 1") == ("loss a", "lr 1")


def test_too_few_pairs_have_no_interval(groups: list[str], tmp_path: Path) -> None:
    def words(*chosen: str) -> str:
        folders = [folder for folder in groups if Path(folder).name in chosen]
        (row,) = (row for row in compared(tmp_path, folders).values() if row["In words"] != "the reference")
        assert np.isnan([row["Difference from"], row["p"], row["p, Holm"]]).all()
        return str(row["In words"])

    assert words("good_0", "good_1", "worse_0").endswith(f"+0.0190; {compare.ONE_PAIR}")
    no_seed = "can't be compared: they share no seed: train both with two seeds or more in common"
    assert words("good_0", "good_1", "worse_2", "worse_3").endswith(no_seed)
    for name in ("worse_0", "worse_1"):
        make_run(tmp_path / f"more{name}", [0.5 + 0.1 * (name == "worse_1")], loss="more", seed=int(name[-1]))
        make_run(tmp_path / f"less{name}", [0.4 + 0.1 * (name == "worse_1")], loss="less", seed=int(name[-1]))
    folders = [str(path) for kind in ("more", "less") for path in sorted(tmp_path.glob(f"{kind}*"))]
    assert "all 2 seeds have the same difference" in str(compared(tmp_path, folders)["loss less"]["In words"])
    for path in tmp_path.glob("less*"):
        write_data(path, digest="other")
    assert "they were tested on different images" in str(compared(tmp_path, folders)["loss less"]["In words"])


@pytest.mark.parametrize("num_folds", [1, 4])
def test_configurations_that_do_not_differ_are_seldom_called_different(num_folds: int) -> None:
    """From rows to Holm's p-values: pairs of seeds, or of correlated folds of one seed."""
    rng, called = np.random.default_rng(num_folds), 0
    seeds = range(1 if num_folds > 1 else 5)
    for _ in range(1000):
        rows = []
        for label in "ab":
            classes = rng.normal(size=4)  # how much each quarter of the training classes helps
            for seed in seeds:
                values = (classes.sum() - classes)[:num_folds] + rng.normal(0, 0.5, num_folds)
                values = values if num_folds > 1 else rng.normal(size=1)
                common = {"partitions": 4, "test data": None, "folder": Path("none")}
                folds = {fold: {**common, "selected": float(value)} for fold, value in enumerate(values)}
                rows.append({"Configuration": label, "seed": seed, "folds": folds})
        comparison = compare.compare_with(rows, "a", "Recall @ 1", is_chosen=True)["b"]
        assert comparison.holm >= 0
        called += comparison.holm < 0.05
    assert called <= 70


def test_selection_optimism_is_per_run_and_on_average(
    groups: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, gain in ((groups[0], 0.01), (groups[1], 0.03)):
        val, test, higher = ({"Recall @ 1": value} for value in (0.7, 0.6, 0.6 + gain))
        networks: dict[str, Any] = {"selected": {"val": val, "test": test}, "last": {"val": val, "test": test}}
        write_summary(Path(folder), {**networks, "best on test": {"val": val, "test": higher}})
    rows = compared(tmp_path, groups)
    assert rows["loss good"]["Selection optimism"] == pytest.approx(0.02)
    assert rows["loss good"]["Selection optimism by run"] == {
        groups[0]: pytest.approx(0.01),
        groups[1]: pytest.approx(0.03),
    }
    assert np.isnan(float(str(rows["loss worse"]["Selection optimism"])))
    out = capsys.readouterr().out
    assert "Selection optimism: +0.0200 on average of 2 run(s). By so much Recall @ 1 on the test classes" in out
    assert f"| {groups[1]} | +0.0300 |" in out
    summary = json.loads((Path(groups[0]) / "summary.json").read_text())  # a run without validation classes has none
    for name in ("selected", "last", "best on test"):
        del summary[name]["val"]
    save_json(Path(groups[0]) / "summary.json", summary)
    assert list(compared(tmp_path, groups)["loss good"]["Selection optimism by run"]) == [groups[1]]


# Columns and forms


def test_columns_are_chosen_and_sorted(groups: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for position, folder in enumerate(groups):
        values = {"Recall @ 1": 0.5 + 0.01 * position, "MAP@R": 0.3 - 0.01 * position, "Alignment": 0.1 * position}
        write_summary(Path(folder), {name: {"test": values} for name in ("selected", "last")}, seconds=30 - position)
    rows = compared(tmp_path, groups, "--metrics", "MAP@R", "Alignment", "Recall @ 1", "--sort", "Recall @ 1")
    assert list(rows) == ["loss alike", "loss worse", "loss good"]
    assert [name for name in rows["loss good"] if "test" in name] == [
        *("test MAP@R, selected", "test MAP@R, last"),
        *("test Alignment, selected", "test Recall @ 1, selected"),
    ]
    assert "| loss good | 5 | 5 | 0.2800 ± 0.0196 | 0.2800 ± 0.0196 | 0.2000 ± 0.1963 |" in capsys.readouterr().out
    assert rows == compared(tmp_path, groups, "--metrics", "MAP@R", "Alignment", "R@1", "--sort", "Recall @ 1")
    for column, wanted in (("Alignment", "good"), ("Seconds", "alike"), ("Configuration", "alike"), ("MAP@R", "good")):
        flags = ("--metrics", "Recall @ 1", "MAP@R", "Alignment", "--sort", column)
        assert next(iter(compared(tmp_path, groups, *flags))) == f"loss {wanted}"
    assert list(compared(tmp_path, groups, "--sort", "p"))[-1] == "loss alike"  # the reference has no p-value
    with pytest.raises(
        UserError, match=r"--sort Secons is no column \(did you mean Seconds\?\); the columns are Config"
    ):
        compared(tmp_path, groups, "--sort", "Secons")
    with pytest.raises(
        UserError, match="--metrics MAP@5: none of the runs has it; --evaluate computes further metrics"
    ):
        compared(tmp_path, groups, "--metrics", "Recall @ 1", "MAP@5")


def test_all_forms_carry_what_can_be_told(
    groups: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {row["In words"] for row in compared(tmp_path, groups).values() if row["In words"] != "the reference"}
    for form in ("--csv", "--json", "--latex"):
        capsys.readouterr()
        compared(tmp_path, groups, form)
        out = capsys.readouterr().out
        assert all(str(sentence) in out for sentence in words)
    compared(tmp_path, groups, "--csv")
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()[-4:]))
    assert float(printed[1]["Difference"]) == pytest.approx(-0.02)
    with pytest.raises(UserError, match="not allowed with"):
        compared(tmp_path, groups, "--csv", "--latex")


def test_latex_is_a_tabular_of_plain_latex(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        str(
            make_run(
                tmp_path / f"{seed}{loss[0]}", [0.5 + 0.1 * (loss == "a_b&50%") + 0.01 * seed], loss=loss, seed=seed
            )
        )
        for loss in ("a_b&50%", r"c#{d}^~\\$")
        for seed in (0, 1, 2)
    ]
    compared(tmp_path, folders, "--latex")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("%")]
    assert lines[0] == r"\begin{tabular}{lrrrrrrr}"
    assert lines[-1] == r"\end{tabular}"
    assert lines.count(r"\hline") == 3
    body = [line for line in lines if line.endswith(r" \\")]
    assert len(body) == 3
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {7}
    assert r"loss a\_b\&50\%" in body[1]
    assert r"loss c\#\{d\}\textasciicircum{}\textasciitilde{}\textbackslash{}\textbackslash{}\$" in body[2]
    assert body[1].count(r"\textbf{0.6100 $\pm$ 0.0248}") == 2
    assert r"\textbf" not in body[2]
    assert all(line.count("$") % 2 == line.count(r"\$") % 2 for line in body)
    text = re.sub(r"\\(textbf|textasciicircum|textasciitilde|textbackslash|pm)|\\[&%$#_{}]|\\\\", "", "".join(body))
    assert not set(text) & set("\\%#_^~")
    assert text.count("{") == text.count("}")


# All rows in one database


def make_database(folder: Path, rows: list[dict[str, float]]) -> None:
    log = records.Records(folder, {"val": rows}, mirrored_by=[])
    log.note_configuration(0, {"lr": 1e-5}, {})
    log.close()


def collected(path: Path, table: str = "val") -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(f'SELECT run, Epochs, "Recall @ 1" FROM {table} ORDER BY run, Epochs').fetchall()


def test_rows_of_many_runs_are_collected_in_one_database(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for position, folder in enumerate(runs[:3]):
        further = {"NMI": 0.5} if position else {"Loss a": 0.1, "nmi": 0.4}
        make_database(Path(folder), [{"Epochs": 1, "Time": 1.0, "Recall @ 1": 0.1 * position, **further}])
    path = tmp_path / "out" / "all.db"
    path.parent.mkdir()
    compared(tmp_path, runs, "--database", str(path))
    assert collected(path) == [("../a", 1, 0.0), ("../b", 1, 0.1), ("../c", 1, 0.2)]
    said = capsys.readouterr().err
    assert f"{runs[3]} has no records.db: no rows of it are collected" in said
    assert f"the rows of 3 run(s) are in {path}" in said
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT COUNT(*) FROM configurations").fetchone() == (3,)
        assert database.execute('SELECT "NMI", "Loss a" FROM val ORDER BY run').fetchall() == [
            *((0.4, 0.1), (0.5, None), (0.5, None)),
        ]

    # again, from another folder: a run's rows are replaced, those of others stay, and damaged or locked files are named
    make_database(Path(runs[0]), [{"Epochs": epoch, "Time": 1.0, "Recall @ 1": 0.9} for epoch in (1, 2)])
    (Path(runs[1]) / "records.db").write_bytes(b"SQLite format 3\0" + bytes(200))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "READ_TIMEOUT", 0)
    with contextlib.closing(sqlite3.connect(Path(runs[2]) / "records.db", isolation_level=None)) as busy:
        busy.execute("BEGIN EXCLUSIVE")
        compared(tmp_path, ["a", "b", "c"], "--database", "out/all.db")
    assert collected(path) == [("../a", 1, 0.9), ("../a", 2, 0.9), ("../b", 1, 0.1), ("../c", 1, 0.2)]
    said = capsys.readouterr().err
    assert "no rows of ../b are collected: b/records.db" in said
    assert "no rows of ../c are collected: c/records.db can't be read (database is locked)" in said


def test_a_database_of_something_else_is_refused_and_kept(runs: list[str], tmp_path: Path) -> None:
    make_database(Path(runs[0]), [])
    own, text = Path(runs[0]) / "records.db", tmp_path / "text.db"
    text.write_text("no database at all, but text " * 50)
    for path, words in (
        (own, "is another program's database, or a single run's: choose another --database"),
        (text, r"can't be written \(file is not a database\): choose another --database"),
        (tmp_path / "none" / "all.db", r"can't be written \(unable to open database file\)"),
    ):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(UserError, match=words):
            compared(tmp_path, runs, "--database", str(path))
        assert (path.read_bytes() if path.exists() else None) == before


# The page


def make_classes(tmp_path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Two configurations of two seeds with results by query, and their recall in each of 25 classes."""
    labels = np.random.default_rng(0).integers(3, 28, 500)
    folders, by_class = [], []
    for position, loss in enumerate(("good", "bad")):
        for seed in (1, 2):
            correct = np.random.default_rng((position, seed)).random(500) < 0.8 - 0.2 * position
            folder = make_run(tmp_path / f"{loss} <b>{seed}", [0.4, 0.5], loss=f"{loss}<script>\"'&", seed=seed)
            folders.append(str(write_results(folder, correct, labels)))
            by_class.append([correct[labels == label].mean() for label in np.unique(labels)])
    values = np.array(by_class).reshape(2, 2, -1).mean(axis=1)
    return folders, values, labels


def seeds_of(folders: list[str], metric: str = "Recall @ 1") -> list[Any]:
    return compare.average_folds(compare.read_runs([Path(folder) for folder in folders], metric))


def test_classes_are_means_over_seeds(tmp_path: Path) -> None:
    folders, values, labels = make_classes(tmp_path)
    good, bad = (f"loss {name}<script>\"'&" for name in ("good", "bad"))
    (found,), refused = compare.compare_classes(seeds_of(folders), good, "Recall @ 1")
    assert (found.label, refused) == (bad, {})
    assert found.names == [f"class {label}" for label in np.unique(labels)]
    assert found.sizes == [int((labels == label).sum()) for label in np.unique(labels)]
    np.testing.assert_allclose([found.reference, found.values], values, atol=1e-12)
    results = dict(np.load(Path(folders[0]) / "per_query.npz"))  # runs of today say what classes are called
    names = [f"name {label}" for label in np.unique(labels)]
    records.save_query_results(
        Path(folders[0]), {k: results[k] for k in records.QUERY_ARRAYS}, test_set="ab", class_names=names
    )
    (found,), _ = compare.compare_classes(seeds_of(folders), good, "Recall @ 1")
    assert found.names == names
    (found,), _ = compare.compare_classes(seeds_of(folders, "NMI"), bad, "MAP@R", is_compared=False)
    np.testing.assert_allclose([found.values, found.reference], values / 2, atol=1e-7)


def test_classes_that_cannot_be_compared_say_why(tmp_path: Path) -> None:
    folders, _, labels = make_classes(tmp_path)
    good, bad = (f"loss {name}<script>\"'&" for name in ("good", "bad"))
    seeds = seeds_of(folders)

    def refused() -> dict[str, str]:
        found, why = compare.compare_classes(seeds, good, "Recall @ 1", is_compared=False)
        assert not found
        return why

    write_results(Path(folders[2]), np.ones(500, bool), labels, test_set="other")
    assert refused() == {bad: "its runs were tested on different queries"}
    write_results(Path(folders[3]), np.ones(500, bool), labels, test_set="other")
    assert refused() == {bad: "its queries are different ones"}
    (Path(folders[1]) / "per_query.npz").unlink()
    assert "has no per_query.npz" in refused()[good]


def test_the_page_says_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, _, _ = make_classes(tmp_path)
    page = tmp_path / "page.html"
    rows = compared(tmp_path, folders, "--html", str(page), "--metrics", "Recall @ 1", "MAP@R", "--json")
    output = capsys.readouterr()
    assert f"notice: page in {page}" in output.err
    text = page.read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    for row in rows.values():
        assert row["Configuration"] in shown
        assert row["In words"] == "the reference" or row["In words"] in shown
        assert f"{row['test MAP@R, selected']:.4f} ± {row['CI 95 %, MAP@R, selected']:.4f}" in shown
    assert all(folder in shown for folder in folders)
    assert "4 runs of 2 configurations. loss good<script>\"'& has the best Recall @ 1; " in shown
    assert "25 classes gain" in shown
    assert "<b>1" not in text
    assert "good<script>" not in re.sub(r"<script type.*?</script>", "", text, flags=re.DOTALL)
    assert len(text) < 6e6


def test_a_page_without_results_by_query_or_curves(groups: list[str], tmp_path: Path) -> None:
    for folder in groups:
        (Path(folder) / "log_val_Base.csv").write_text("Epochs,Time,Recall @ 1\n")
    page = tmp_path / "page.html"
    compared(tmp_path, groups, "--html", str(page), "--reference", "good")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', text) == ["results", "differences", "classes", "runs"]
    assert "The reference is loss good; 1 of 2 differences to it holds." in text
    assert "has no per_query.npz, it is of an earlier version" in text
    compared(tmp_path, groups[:1], "--html", str(page))
    assert re.findall(r'<section id="(\w+)"', page.read_text(encoding="utf-8")) == ["results", "runs"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("page.svg", "--html page.svg is not the name of an HTML file: end it with .html"),
        ("no/a.html", "can't be written"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_runs_are_read(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        compare.main([str(tmp_path / "nothing"), "--html", name])
