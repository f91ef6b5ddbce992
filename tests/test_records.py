"""records.py: rows in CSV, SQLite and TensorBoard through restarts and failures, gradient statistics, and plots."""

from __future__ import annotations

import csv
import html
import itertools
import math
import pickle
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import ndimage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import nn

from auxiliaries import UserError
from records import (
    LOGS,
    GradientRecord,
    Records,
    Retrieval,
    Row,
    read_configurations,
    save_curve,
    save_info_plot,
    save_meta,
    save_recoveries,
    save_scatter,
    show_in_tensorboard,
)


@pytest.fixture(autouse=True)
def _event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files in the order of their names, which end, within a second, in a running number."""

    class Numbers:
        numbers = itertools.count(100_000)

        def get(self) -> int:
            return next(self.numbers)

    monkeypatch.setattr(event_file_writer, "_global_uid", Numbers())


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def csv_rows(folder: Path, kind: str) -> list[dict[str, str]]:
    with open(folder / LOGS[kind], newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(folder: Path, kind: str) -> list[dict[str, Any]]:
    """A table's rows by epoch or iteration, as another process would read them."""
    database = sqlite3.connect(folder / "records.db")
    database.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in database.execute(f"SELECT * FROM {kind} ORDER BY 1")]
    finally:
        database.close()


def in_sqlite(folder: Path, statement: str) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(folder / "records.db")
    try:
        return database.execute(statement).fetchall()
    finally:
        database.close()


def scalars(folder: Path, unit: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: for each tag its (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard" / unit)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train_row(epoch: int) -> Row:
    return {"Epochs": epoch, "Time": 1.5, "Train Loss": 1 / epoch, "Iterations": 2}


def val_row(epoch: int, **more: float) -> Row:
    return {"Epochs": epoch, "Time": 0.5, "Recall @ 1": epoch / 8, **more}


def iteration_row(iteration: int, **more: float) -> Row:
    return {"Iteration": iteration, "Epochs": (iteration + 1) // 2, "Loss": iteration / 4, **more}


def three_epochs(log: Records, first: int = 1) -> None:
    for epoch in range(first, 4):
        log.add("iterations", iteration_row(2 * epoch - 1), iteration_row(2 * epoch))
        log.add("train", train_row(epoch))
        log.add("val", val_row(epoch))


def until(rows: dict[str, list[Row]], epoch: int) -> dict[str, list[Row]]:
    """The history that a checkpoint of that epoch holds."""
    return {kind: [dict(row) for row in of_kind if row["Epochs"] <= epoch] for kind, of_kind in rows.items()}


def assert_holds(folder: Path, expected: dict[str, list[Row]]) -> None:
    """CSV and SQLite hold the expected rows and no others."""
    for kind, rows in expected.items():
        if rows:
            assert [{name: float(value) for name, value in row.items()} for row in csv_rows(folder, kind)] == rows
            assert table(folder, kind) == rows
        else:
            assert not (folder / LOGS[kind]).exists()
            assert not in_sqlite(folder, f"SELECT name FROM sqlite_master WHERE name = '{kind}'")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Records]:
    log = Records(tmp_path)
    yield log
    log.close()


def test_rows_arrive_in_csv_sqlite_and_tensorboard(log: Records, tmp_path: Path) -> None:
    three_epochs(log)
    # not after closing: a run that is looked at, or killed, has its rows there
    assert csv_rows(tmp_path, "train")[0] == {"Epochs": "1", "Time": "1.5", "Train Loss": "1.0", "Iterations": "2"}
    assert_holds(tmp_path, log.rows)
    assert log.iterations() == 6
    log.flush()
    assert scalars(tmp_path, "epochs") == {
        "train/Time": [(epoch, 1.5) for epoch in (1, 2, 3)],
        "train/Train Loss": [(epoch, pytest.approx(1 / epoch)) for epoch in (1, 2, 3)],
        "train/Iterations": [(epoch, 2) for epoch in (1, 2, 3)],
        "val/Time": [(epoch, 0.5) for epoch in (1, 2, 3)],
        "val/Recall @ 1": [(epoch, epoch / 8) for epoch in (1, 2, 3)],
    }
    assert scalars(tmp_path, "iterations") == {"iterations/Loss": [(i, i / 4) for i in range(1, 7)]}


def test_columns_of_the_database_have_types_and_a_key(log: Records, tmp_path: Path) -> None:
    three_epochs(log)
    types = {name: (kind, key) for _, name, kind, _, _, key in in_sqlite(tmp_path, "PRAGMA table_info(train)")}
    assert types == {
        "Epochs": ("INTEGER", 1),
        "Time": ("REAL", 0),
        "Train Loss": ("REAL", 0),
        "Iterations": ("INTEGER", 0),
    }
    columns = {name: (kind, key) for _, name, kind, _, _, key in in_sqlite(tmp_path, "PRAGMA table_info(iterations)")}
    assert columns == {"Iteration": ("INTEGER", 1), "Epochs": ("INTEGER", 0), "Loss": ("REAL", 0)}
    assert in_sqlite(tmp_path, 'SELECT DISTINCT typeof("Train Loss"), typeof(Epochs) FROM train') == [
        ("real", "integer")
    ]
    assert in_sqlite(tmp_path, "PRAGMA journal_mode") == [("delete",)]  # no write-ahead log: network disks
    assert names_in(tmp_path) >= {"records.db"}
    assert not {"records.db-wal", "records.db-shm"} & names_in(tmp_path)


def test_a_row_of_an_epoch_that_is_there_takes_its_place(log: Records, tmp_path: Path) -> None:
    three_epochs(log)
    again = val_row(2) | {"Recall @ 1": 0.75}
    log.add("val", again)
    assert sorted(log.rows["val"], key=lambda row: row["Epochs"]) == [val_row(1), again, val_row(3)]
    assert table(tmp_path, "val") == [val_row(1), again, val_row(3)]
    in_csv = {row["Epochs"]: row["Recall @ 1"] for row in csv_rows(tmp_path, "val")}
    assert len(csv_rows(tmp_path, "val")) == 3
    assert in_csv == {"1": "0.125", "2": "0.75", "3": "0.375"}


def test_later_rows_may_have_new_columns_and_lack_old_ones(log: Records, tmp_path: Path) -> None:
    log.add("val", val_row(1))
    log.add("val", val_row(2, NMI=0.5))
    log.add("val", {"Epochs": 3, "NMI": 0.25})
    assert csv_rows(tmp_path, "val") == [
        {"Epochs": "1", "Time": "0.5", "Recall @ 1": "0.125", "NMI": ""},
        {"Epochs": "2", "Time": "0.5", "Recall @ 1": "0.25", "NMI": "0.5"},
        {"Epochs": "3", "Time": "", "Recall @ 1": "", "NMI": "0.25"},
    ]
    assert table(tmp_path, "val") == [
        {**val_row(1), "NMI": None},
        val_row(2, NMI=0.5),
        {"Epochs": 3, "Time": None, "Recall @ 1": None, "NMI": 0.25},
    ]
    assert log.rows["val"] == [val_row(1), val_row(2, NMI=0.5), {"Epochs": 3, "NMI": 0.25}]
    header = (tmp_path / LOGS["val"]).read_text().splitlines()[0]
    assert header == "Epochs,Time,Recall @ 1,NMI"


def test_values_stand_under_their_name_in_whatever_order_they_come(log: Records, tmp_path: Path) -> None:
    log.add("val", {"Epochs": 1, "NMI": 0.5, "a, b": 1.0})
    log.add("val", {"a, b": 2.0, "NMI": 0.25, "Epochs": 2})
    assert [row["NMI"] for row in csv_rows(tmp_path, "val")] == ["0.5", "0.25"]
    assert [row["a, b"] for row in csv_rows(tmp_path, "val")] == ["1.0", "2.0"]


def test_nan_is_recorded(log: Records, tmp_path: Path) -> None:
    log.add("val", val_row(1) | {"Recall @ 1": math.nan})
    log.add("val", val_row(2))
    assert [row["Recall @ 1"] for row in csv_rows(tmp_path, "val")] == ["nan", "0.25"]
    assert [row["Recall @ 1"] for row in table(tmp_path, "val")] == [None, 0.25]


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_a_shorter_history_drops_what_comes_after_it(epoch: int, tmp_path: Path) -> None:
    log = Records(tmp_path)
    three_epochs(log)
    log.close()
    history = until(log.rows, epoch)

    log = Records(tmp_path, history)
    assert log.iterations() == 2 * epoch
    assert_holds(tmp_path, {kind: rows for kind, rows in log.rows.items() if kind in ("train", "val", "iterations")})
    log.flush()
    steps = {tag: [step for step, _ in values] for tag, values in scalars(tmp_path, "epochs").items()}
    assert all(values == list(range(1, epoch + 1)) for values in steps.values()), steps
    assert all(len(values) == 2 * epoch for values in scalars(tmp_path, "iterations").values())

    three_epochs(log, first=epoch + 1)
    log.close()
    whole = {"train": [train_row(e) for e in (1, 2, 3)], "val": [val_row(e) for e in (1, 2, 3)]}
    whole["iterations"] = [iteration_row(i) for i in range(1, 7)]
    assert_holds(tmp_path, whole)
    assert scalars(tmp_path, "epochs")["val/Recall @ 1"] == [(e, e / 8) for e in (1, 2, 3)]
    assert scalars(tmp_path, "iterations")["iterations/Loss"] == [(i, i / 4) for i in range(1, 7)]


def test_history_comes_back_as_it_was_where_nothing_is_dropped(tmp_path: Path) -> None:
    log = Records(tmp_path)
    log.add("val", {"Epochs": 0, "Recall @ 1": 0.5})
    three_epochs(log)
    log.close()
    before = {name: (tmp_path / name).read_bytes() for name in (LOGS["val"], LOGS["train"], LOGS["iterations"])}
    Records(tmp_path, log.rows).close()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_holds(tmp_path, {kind: log.rows[kind] for kind in ("train", "iterations")})
    assert scalars(tmp_path, "epochs")["val/Recall @ 1"] == [(0, 0.5), *((e, e / 8) for e in (1, 2, 3))]


def test_configurations_survive_reopening(tmp_path: Path) -> None:
    assert read_configurations(tmp_path) == []
    log = Records(tmp_path)
    log.note_configuration(0, {"lr": 0.5, "k_vals": (1, 2)}, {"python": "3"})
    three_epochs(log)
    log.close()
    log = Records(tmp_path, until(log.rows, 2))
    log.note_configuration(2, {"lr": 0.25, "k_vals": [1, 2]}, {"python": "3"})
    log.close()
    Records(tmp_path, until(log.rows, 1)).close()
    assert read_configurations(tmp_path) == [
        {"Epochs": 0, "Configuration": {"lr": 0.5, "k_vals": [1, 2]}},
        {"Epochs": 2, "Configuration": {"lr": 0.25, "k_vals": [1, 2]}},
    ]
    rows = in_sqlite(tmp_path, "SELECT Changes, Environment FROM configurations")
    assert rows == [("{}", '{"python": "3"}'), ('{"lr": 0.25}', '{"python": "3"}')]
    (tmp_path / "records.db").write_bytes(b"no database" * 100)
    assert read_configurations(tmp_path) == []


@pytest.mark.parametrize("length", [-1, -3, -9, 30, 3, 0])
def test_a_csv_cut_off_in_a_line_is_made_whole(length: int, tmp_path: Path) -> None:
    log = Records(tmp_path)
    three_epochs(log)
    log.close()
    for name in (LOGS["train"], LOGS["iterations"]):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:length])
    (tmp_path / LOGS["val"]).unlink()
    log = Records(tmp_path, until(log.rows, 2))
    assert_holds(tmp_path, until({kind: log.rows[kind] for kind in ("train", "val", "iterations")}, 2))
    three_epochs(log, first=3)
    log.close()
    assert_holds(tmp_path, {kind: log.rows[kind] for kind in ("train", "val", "iterations")})


# Writes a row, then dies in the middle of a transaction that is larger than SQLite's cache.
DIES_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from records import Records
log = Records(Path(sys.argv[1]), tensorboard=False)
log.add("train", {"Epochs": 1, "Train Loss": 0.5, "Iterations": 3})
log.note_configuration(0, {"lr": 1}, {})
log.database.execute("PRAGMA cache_size = 1")
log.database.execute("BEGIN")
log.database.execute('UPDATE train SET "Train Loss" = 99')
for epoch in range(2, 5000):
    log.database.execute('INSERT INTO train (Epochs, "Train Loss") VALUES (?, 99)', (epoch,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_a_readable_database_that_a_run_goes_on_with(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES_WHILE_WRITING, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    journal = (tmp_path / "records.db-journal").read_bytes()
    assert journal  # or nothing would be proved
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert table(tmp_path, "train") == [{"Epochs": 1, "Train Loss": 0.5, "Iterations": 3}]
    assert in_sqlite(tmp_path, "PRAGMA integrity_check") == [("ok",)]

    log = Records(tmp_path / "copy", {"train": [train_row(1)]})
    log.add("train", train_row(2))
    log.close()
    assert table(tmp_path / "copy", "train") == [train_row(1), train_row(2)]
    assert [row["Epochs"] for row in read_configurations(tmp_path / "copy")] == [0]
    assert "records.db-journal" not in names_in(tmp_path / "copy")


@pytest.mark.parametrize("content", [b"no database" * 1000, None], ids=["other bytes", "zeros in the middle"])
def test_a_damaged_database_is_one_sentence(content: bytes | None, tmp_path: Path) -> None:
    log = Records(tmp_path, tensorboard=False)
    log.add("iterations", *(iteration_row(i) for i in range(1, 3000)))
    log.close()
    path = tmp_path / "records.db"
    if content is None:
        whole = path.read_bytes()
        content = whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"records\.db is damaged .*remove it") as caught:
        Records(tmp_path, log.rows, tensorboard=False)
    assert "\n" not in str(caught.value)
    path.unlink()
    Records(tmp_path, log.rows, tensorboard=False).close()
    assert table(tmp_path, "iterations") == log.rows["iterations"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"records\.db can't be written \(unable to open database file\)") as caught:
        Records(tmp_path / "gone")
    assert "\n" not in str(caught.value)
    (tmp_path / "taken" / "records.db").mkdir(parents=True)
    with pytest.raises(UserError, match=r"records\.db can't be written"):
        Records(tmp_path / "taken")


@pytest.mark.parametrize("kind", ["train", "iterations"])
def test_a_log_that_cannot_be_written_is_one_sentence(kind: str, log: Records, tmp_path: Path) -> None:
    rows = [train_row(i) if kind == "train" else iteration_row(i) for i in (1, 2)]
    log.add(kind, rows[0])
    (tmp_path / LOGS[kind]).unlink()
    (tmp_path / LOGS[kind]).mkdir()
    with pytest.raises(UserError, match=rf"{LOGS[kind]} can't be written \(Is a directory\)") as caught:
        log.add(kind, rows[1])
    assert "\n" not in str(caught.value)


def test_a_database_that_another_process_holds_is_one_sentence(log: Records, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "records.db")
    other.execute("BEGIN EXCLUSIVE")
    log.database.execute("PRAGMA busy_timeout = 1")
    with pytest.raises(UserError, match=r"records\.db can't be written \(database is locked\)"):
        log.add("train", train_row(1))
    other.close()


def test_event_files_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(UserError, match=r"tensorboard can't be written"):
        Records(tmp_path)


def test_an_event_that_cannot_be_written_is_one_sentence(
    log: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's writer thread hands on what it met, such as a full disk, at the next event."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log.writers["epochs"], "add_scalar", full)
    with pytest.raises(UserError, match=r"tensorboard can't be written \(No space left on device\)"):
        log.add("train", train_row(1))


def test_without_tensorboard_nothing_of_it_is_made(tmp_path: Path) -> None:
    log = Records(tmp_path, tensorboard=False)
    three_epochs(log)
    log.add_picture("sample recoveries", tmp_path / "none.png", 1)
    log.flush()
    log.close()
    assert names_in(tmp_path) == {"records.db", LOGS["train"], LOGS["val"], LOGS["iterations"]}


def test_pictures_are_shown_in_tensorboard(log: Records, tmp_path: Path) -> None:
    Image.new("RGBA", (12, 7), "red").save(tmp_path / "a.png")
    log.add_picture("sample recoveries", tmp_path / "a.png", 3)
    log.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "epochs")).Reload()
    (image,) = events.Images("sample recoveries")
    assert (image.step, image.width, image.height) == (3, 12, 7)
    show_in_tensorboard(tmp_path / "other", "t-SNE", tmp_path / "a.png")
    assert EventAccumulator(str(tmp_path / "other")).Reload().Tags()["images"] == ["t-SNE"]


def test_meta_results_are_kept_as_csv_json_and_in_tensorboard(tmp_path: Path) -> None:
    rows = [
        {"Network": "selected", "Split": "test", "Metric": "Recall @ 1", "Mean": 0.5, "Std": 0.25},
        {"Network": "selected", "Split": "test", "Metric": "NMI", "Mean": 0.75},
    ]
    save_meta(tmp_path / "meta", rows)
    with open(tmp_path / "meta" / "results.csv", newline="") as file:
        assert [row["Std"] for row in csv.DictReader(file)] == ["0.25", ""]
    events = EventAccumulator(str(tmp_path / "meta" / "tensorboard")).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        "selected/test Recall @ 1/Mean": 0.5,
        "selected/test Recall @ 1/Std": 0.25,
        "selected/test NMI/Mean": 0.75,
    }


def test_gradient_statistics_equal_numpys_over_several_saves_and_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 7, 3)).astype(np.float32)  # (iterations, D, features)
    weight = nn.Parameter(torch.zeros(7, 3))
    path = tmp_path / "grad_measure.pkl"
    record = GradientRecord(path)
    record.save()
    assert not path.exists()

    def take(iterations: range) -> None:
        for iteration in iterations:
            weight.grad = torch.from_numpy(gradients[iteration].copy())
            record.add(weight)
            weight.grad.zero_()  # what comes later leaves the record alone
        record.save()

    def check(iterations: int) -> None:
        done, size = gradients[:iterations], np.abs(gradients[:iterations])
        expected = {
            "mean": done.mean(axis=1),
            "std": done.std(axis=1),
            "abs_mean": size.mean(axis=1),
            "abs_std": size.std(axis=1),
            "iteration": np.arange(1, iterations + 1),
        }
        saved = pickle.loads(path.read_bytes())
        assert saved.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(saved[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)

    take(range(2))
    check(2)
    take(range(2, 5))
    check(5)
    record = GradientRecord(path, iterations=3)  # another process goes on after the third
    take(range(3, 5))
    check(5)
    record = GradientRecord(path)  # and one starts anew
    take(range(1))
    check(1)


def test_a_missing_gradient_counts_as_zero(tmp_path: Path) -> None:
    record = GradientRecord(tmp_path / "grad_measure.pkl", iterations=4)  # without a file to go on with
    record.add(nn.Parameter(torch.ones(7, 3)))
    record.save()
    arrays = pickle.loads((tmp_path / "grad_measure.pkl").read_bytes())
    assert arrays.pop("iteration").tolist() == [5]
    assert all(not array.any() for array in arrays.values())


def svg_texts(path: Path) -> list[str]:
    """All texts of a figure: matplotlib writes them as comments beside the glyphs."""
    tree = ET.fromstring(path.read_text(encoding="utf-8"), ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    comments = [element.text or "" for element in tree.iter() if element.tag is ET.Comment]
    return [html.unescape(text).replace("\N{NO-BREAK SPACE}", " ").strip() for text in comments]


def metric_rows(names: list[str], epochs: int = 3) -> list[dict[str, float]]:
    values = np.random.default_rng(0).random((epochs, len(names)))
    return [{"Epochs": i + 1, "Time": 9.0, **dict(zip(names, row.tolist()))} for i, row in enumerate(values)]


RECALLS = [f"Recall @ {k}" for k in (1, 2, 4, 8, 16)]
SETS = [f"Set {position} {name}" for position in range(3) for name in ("NMI", "F1", "Recall @ 1", "Recall @ 5")]


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        (["Recall @ 1"], ["Recall"]),
        (["NMI", "F1", *RECALLS], ["NMI", "F1", "Recall"]),
        ([f"Measure {i % 10} @ {i}" for i in range(30)], [f"Measure {i}" for i in range(10)]),
        (SETS, ["NMI", "F1", "Recall"]),
    ],
    ids=["1 metric", "7 metrics", "30 metrics", "3 sets"],
)
def test_info_plot(names: list[str], panels: list[str], tmp_path: Path) -> None:
    open_figures, path = plt.get_fignums(), tmp_path / "InfoPlot_Base.svg"
    losses = [{"Epochs": epoch, "Train Loss": 1 / epoch} for epoch in (1, 2, 3)]
    rows = metric_rows(names)
    save_info_plot(path, losses, rows, selected_epoch=2, title="tiny_data, resnet18 & <margin>")
    texts = svg_texts(path)
    assert "tiny_data, resnet18 & <margin>" in texts
    start, middle = (
        texts.index("selected epoch 2:"),
        texts.index("each metric's best value (its epoch), not one model's:"),
    )
    header, footer = "    ".join(texts[start + 1 : middle]), "    ".join(texts[middle + 1 :])
    assert re.split(" {2,}", header) == [f"{name} {rows[1][name]:.4f}" for name in names]
    best = {name: max(rows, key=lambda row: row[name]) for name in names}
    assert re.split(" {2,}", footer) == [f"{name} {row[name]:.4f} ({row['Epochs']})" for name, row in best.items()]
    assert len(re.findall(r'id="axes_\d+"', path.read_text(encoding="utf-8"))) == 1 + len(panels)
    assert all(texts.count(panel) >= 1 for panel in ["Train Loss", *panels])
    assert plt.get_fignums() == open_figures
    assert names_in(tmp_path) == {path.name}


def test_a_title_is_drawn_as_it_is(tmp_path: Path) -> None:
    """A data set's folder may have a name that matplotlib would read as a formula."""
    save_info_plot(tmp_path / "plot.svg", [], metric_rows(["NMI"]), 1, title=r"$\cost$_of")
    assert r"$\cost$_of" in svg_texts(tmp_path / "plot.svg")


def test_a_curve(tmp_path: Path) -> None:
    save_curve(tmp_path / "curve.svg", [{"Epochs": 1, "Ratio": 0.5}, {"Epochs": 2, "Ratio": 0.25}], "Ratio")
    assert {"epoch", "Ratio"} <= set(svg_texts(tmp_path / "curve.svg"))


def test_the_best_value_of_a_metric_may_be_its_lowest_and_is_never_nan(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"Epochs": epoch, "Set 0 Alignment": alignment, "Set 0 Recall @ 1": recall}
        for epoch, alignment, recall in ((1, 0.5, math.nan), (2, 0.25, 0.125), (3, math.nan, 0.5), (4, 0.25, 0.5))
    ]
    save_info_plot(tmp_path / "plot.svg", [], rows, 2, title="", lower_is_better={"Alignment"})
    footer = svg_texts(tmp_path / "plot.svg")[-1]
    assert re.split(" {2,}", footer) == ["Set 0 Alignment 0.2500 (2)", "Set 0 Recall @ 1 0.5000 (3)"]


def test_rows_may_have_other_metrics_than_the_last(tmp_path: Path) -> None:
    """A run may have been resumed with more or fewer metrics."""
    rows: list[Row] = [{"Epochs": 1, "NMI": 0.5}, {"Epochs": 2, "NMI": 0.25, "F1": 0.75}]
    save_info_plot(tmp_path / "plot.svg", [], rows, 1, title="")
    texts = svg_texts(tmp_path / "plot.svg")
    assert "NMI 0.5000    F1 nan" in texts
    assert "NMI 0.5000 (1)    F1 0.7500 (2)" in texts


def test_a_scatter_is_coloured_by_label(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    save_scatter(tmp_path / "tsne.png", points, np.array([5, 900, -3])[np.arange(30) % 3], "$three_ classes")
    with Image.open(tmp_path / "tsne.png") as image:
        assert image.format == "PNG"
        assert image.width == image.height == 960


def frames(pixels: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Top left corners (row, column) of the frames of one colour, row by row."""
    regions, _ = ndimage.label((pixels == colour).all(axis=2))
    boxes = [box for box in ndimage.find_objects(regions) if min(side.stop - side.start for side in box) > 50]
    return sorted((rows.start, columns.start) for rows, columns in boxes)


def test_sample_retrievals_are_framed_by_what_they_are(tmp_path: Path) -> None:
    blue = np.full((40, 40, 3), (0, 0, 255), np.uint8)
    retrievals = [
        Retrieval(
            blue, "Laysan_Albatross", [blue] * 3, ["Laysan_Albatross", "Crow", "Laysan_Albatross"], [True, False, True]
        ),
        Retrieval(blue, "Crow", [blue], ["Laysan_Albatross"], [False]),  # fewer neighbours
    ]
    save_recoveries(tmp_path / "sample_recoveries.png", retrievals)
    with Image.open(tmp_path / "sample_recoveries.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    red, green, grey = (frames(pixels, colour) for colour in ((214, 39, 40), (44, 160, 44), (176, 176, 176)))
    (top, left), (bottom, below_left) = red
    assert left == below_left
    assert top < bottom
    (green_row, second), (other_row, fourth) = green
    assert green_row == other_row == top
    (grey_row, third), (last_row, last) = grey
    assert (grey_row, last_row) == (top, bottom)
    assert left < second == last < third < fourth
