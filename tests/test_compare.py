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
from auxiliaries import UserError

FLAGS = {"dataset": "tiny", "arch": "resnet18", "loss": "marginloss", "lr": 1e-5, "num_training_sets": 2}


def make_run(folder: Path, recalls: list[float], **flags: object) -> Path:
    """A run folder whose epochs had these values of Recall @ 1; the highest is selected."""
    folder.mkdir(parents=True)
    best = int(np.argmax(recalls))
    (folder / "config.yaml").write_text(yaml.safe_dump({**FLAGS, **flags, "savename": folder.name}))
    models = {"selected": recalls[best], "last": recalls[-1]}
    summary = {name: {"epoch": 1, "test": {"Recall @ 1": value}} for name, value in models.items()}
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": 10.0 * len(recalls)}))
    with open(folder / "log_val_Base.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Epochs", "Time", "NMI", "Recall @ 1"])
        writer.writerows([epoch, 1.0, 0.5, value] for epoch, value in enumerate(recalls, start=1))
    return folder


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
    assert [(row["Configuration"], row["Runs"]) for row in rows] == [("loss marginloss", 3), ("loss triplet", 1)]
    selected, last = np.array([0.6, 0.7, 0.9]), np.array([0.5, 0.7, 0.9])
    assert rows[0]["Recall @ 1, selected"] == pytest.approx(selected.mean())
    assert rows[0]["Recall @ 1, last"] == pytest.approx(last.mean())
    low, _ = stats.t.interval(0.95, 2, selected.mean(), stats.sem(selected))
    assert rows[0]["CI 95 %, selected"] == pytest.approx(selected.mean() - low)
    assert rows[0]["Seconds"] == pytest.approx((30 + 20 + 30) / 3)
    assert np.isnan(rows[1]["CI 95 %, selected"])
    svg = (tmp_path / "curves.svg").read_text()
    assert svg.count("loss marginloss") == 1
    assert svg.count("loss triplet") == 1


def test_curves_are_means_where_all_runs_were_evaluated(runs: list[str]) -> None:
    bands = compare.compute_bands(compare.read_table(map(Path, runs), "Recall @ 1"))
    assert [epoch for epoch, _, _ in bands["loss marginloss"]] == [1, 2]
    assert [mean for _, mean, _ in bands["loss marginloss"]] == pytest.approx([1.1 / 3, 0.7])
    assert [mean for _, mean, _ in bands["loss triplet"]] == [0.5, 0.5, 0.55]


def test_a_repeated_seed_counts_once(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = make_run(tmp_path / "e", [0.99], seed=2, savename="another")
    rows = compare.main([*runs, str(again), "--svg", str(tmp_path / "curves.svg")])
    assert [(row["Runs"], row["Recall @ 1, selected"]) for row in rows] == [(3, pytest.approx(2.2 / 3)), (1, 0.55)]
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
    summary = {name: {"epoch": 2, "val": metrics} for name in ("selected", "last")}
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": 1}))
    lines = ["Epochs,Time,Set 0 Recall @ 1,Set 1 Recall @ 1", "1,1.0,nan,0.5", "2,1.0,0.25,0.75", "3,1.0,,"]
    (folder / "log_val_Base.csv").write_text("\n".join(lines))
    table = compare.read_table([folder], "Recall @ 1")
    assert table["selected"].tolist() == [0.5]
    assert table["curve"].tolist() == [{2: 0.5}]


def test_folds_count_as_runs_and_missing_ones_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = make_run(tmp_path / "cv", [0.1], split_scheme="cross_validation", num_training_sets=3)
    (parent / "summary.json").unlink()
    for fold, recall in enumerate([0.4, 0.6]):
        make_run(parent / f"fold_{fold}", [recall], split_scheme="cross_validation", fold=fold, num_training_sets=3)
    (row,) = compare.main([str(parent), "--svg", str(tmp_path / "curves.svg")])
    assert (row["Runs"], row["Recall @ 1, selected"]) == (2, 0.5)
    assert f"{parent / 'fold_2'} is left out: not begun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.yaml", None, "is not a run folder: it has no config.yaml"),
        ("summary.json", None, "unfinished: it has no summary.json"),
        ("summary.json", "{", "is not valid JSON"),
        ("summary.json", "{}", "damaged"),
        ("config.yaml", "[1", "damaged"),
        ("log_val_Base.csv", "Epochs,Recall @ 1\n1,x\n", "damaged"),
        ("log_val_Base.csv", None, "damaged"),
    ],
)
def test_broken_folders_are_listed(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | None, words: str
) -> None:
    path = Path(runs[3]) / file
    path.unlink() if text is None else path.write_text(text)
    assert len(compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])) == 1
    line, _ = capsys.readouterr().err.splitlines()
    assert runs[3] in line
    assert words in line


def test_markdown_csv_and_json_say_the_same(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compare.main([*runs, "--svg", str(tmp_path / "curves.svg")])
    assert "| loss marginloss | 3 | 0.7333 ± 0.3795 | 0.7000 ± 0.4968 | 26.7 |" in capsys.readouterr().out
    compare.main([*runs, "--csv", "--svg", str(tmp_path / "curves.svg")])
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["Recall @ 1, last"]) for row in printed] == [row["Recall @ 1, last"] for row in rows]
    compare.main([*runs, "--json", "--svg", str(tmp_path / "curves.svg")])
    assert json.loads(capsys.readouterr().out)[0] == rows[0]


def test_bad_input_is_one_sentence(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="none of the folders holds a finished run"):
        compare.main([*runs, "--metric", "Recal @ 1"])
    assert "it has no Recal @ 1 (did you mean Recall @ 1?)" in capsys.readouterr().err
