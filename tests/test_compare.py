"""The table and the plot of several runs, from run folders made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

import compare
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
    assert capsys.readouterr().out.splitlines() == [what, "", *table]
    compare.main([*runs, "--csv", "--svg", str(tmp_path / "curves.svg")])
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["test Recall @ 1, last"]) for row in printed] == [row["test Recall @ 1, last"] for row in rows]
    compare.main([*runs, "--json", "--svg", str(tmp_path / "curves.svg")])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is not JSON
    assert found[0] == rows[0]
    assert found[1]["CI 95 %, last"] is None


def test_bad_input_is_one_sentence(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([*runs, "--metric", "Recal @ 1"])
    assert "it has no Recal @ 1 (did you mean Recall @ 1?)" in capsys.readouterr().err
