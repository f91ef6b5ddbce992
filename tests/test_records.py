"""records.py: rows in CSV, SQLite and TensorBoard through restarts and failures, iterations, and the summary."""

from __future__ import annotations

import csv
import itertools
import math
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import records
from auxiliaries import FlagParser, UserError
from records import (
    LOGS,
    GradientRecord,
    IterationLog,
    Records,
    Row,
    best_epoch,
    build_summary,
    describe_selection,
    format_metrics,
    mean_over_sets,
    metrics_of,
    print_summary,
    read_configurations,
    save_meta_rows,
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
    """What TensorBoard shows: the (step, value) of each tag."""
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
    return {kind: [dict(row) for row in kind_rows if row["Epochs"] <= epoch] for kind, kind_rows in rows.items()}


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
    with pytest.raises(
        UserError, match=r"records\.db is damaged .*remove it, and --resume_training rebuilds"
    ) as caught:
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
    save_meta_rows(tmp_path / "meta", rows)
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
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"grad_measure\.pkl is damaged: move it away"):
        GradientRecord(path, iterations=1)


def test_a_missing_gradient_counts_as_zero(tmp_path: Path) -> None:
    record = GradientRecord(tmp_path / "grad_measure.pkl", iterations=4)  # without a file to go on with
    record.add(nn.Parameter(torch.ones(7, 3)))
    record.save()
    arrays = pickle.loads((tmp_path / "grad_measure.pkl").read_bytes())
    assert arrays.pop("iteration").tolist() == [5]
    assert all(not array.any() for array in arrays.values())


def test_flags_are_not_compared() -> None:
    parser = FlagParser()
    records.add_arguments(parser)
    assert parser.names_with(compared=False) == ["log_every", "tensorboard", "dist_measure", "grad_measure"]
    opt = parser.parse_args([])
    assert (opt.log_every, opt.tensorboard, opt.dist_measure, opt.grad_measure) == (1, True, False, False)
    opt = parser.parse_args(["--log_every", "0", "--no-tensorboard", "--dist_measure"])
    assert (opt.log_every, opt.tensorboard, opt.dist_measure, opt.grad_measure) == (0, False, True, False)
    with pytest.raises(UserError, match="at least 0"):
        parser.parse_args(["--log_every", "-1"])


def test_metrics_of_a_row() -> None:
    row = {"Epochs": 3, "Time": 1.5, "Recall @ 1": 0.25, "NMI": 0.12345}
    assert metrics_of(row) == {"Recall @ 1": 0.25, "NMI": 0.12345}
    assert format_metrics(row) == "Recall @ 1 0.2500 | NMI 0.1235"


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"Recall @ 1": 0.25, "Recall @ 10": 1.0, "NMI": 0.5}, 0.25),
        ({"Set 0 Recall @ 1": 0.25, "Set 1 Recall @ 1": 0.75, "Set 0 Recall @ 10": 1.0}, 0.5),
        ({"Recall @ 1": 0.25, "Class Recall @ 1": 0.75}, 0.25),
        ({"Set 0 Recall @ 1": 0.25, "Set 0 Class Recall @ 1": 1.0, "Set 1 Recall @ 1": 0.75}, 0.5),
    ],
    ids=["one set", "two sets", "a like-named metric", "two sets and a like-named metric"],
)
def test_mean_over_sets(metrics: dict[str, float], expected: float) -> None:
    assert mean_over_sets(metrics, "Recall @ 1") == pytest.approx(expected)
    assert math.isnan(mean_over_sets(metrics, "mAP"))


@pytest.mark.parametrize(
    ("lower_is_better", "values", "best"),
    [
        (False, {}, 0),
        (False, {0: 0.9}, 0),
        (False, {1: 0.1, 2: 0.5, 3: 0.2}, 2),
        (False, {1: 0.1, 2: 0.5, 3: 0.5}, 2),  # the first of equals
        (False, {3: 0.5, 1: 0.25, 2: 0.5}, 3),  # the first in the rows' order
        (False, {0: 0.9, 2: 0.1, 4: 0.2}, 4),  # never the untrained network
        (False, {1: math.nan, 2: 0.0, 3: math.nan}, 2),
        (False, {1: 0.5, 2: 0.25}, 1),
        (True, {0: 0.0, 1: 0.5, 2: 0.25, 3: 0.25}, 2),
        (True, {1: math.nan, 2: 7.0}, 2),
        (True, {1: -3.0, 2: -2.0}, 1),
        (True, {1: 0.5, 2: 0.25}, 2),
    ],
)
def test_the_best_epoch(lower_is_better: bool, values: dict[int, float], best: int) -> None:
    rows: list[Row] = [{"Epochs": epoch, "Time": 1.0, "MAP@R": value} for epoch, value in values.items()]
    assert best_epoch(rows, "MAP@R", lower_is_better) == best


def test_the_best_epoch_of_several_sets_is_by_their_mean() -> None:
    values = {1: (0.5, 0.2, 0.9), 2: (0.1, 0.7, 0.0), 3: (0.3, 0.4, 0.0), 4: (1.0, math.nan, 1.0)}
    rows: list[Row] = [
        {"Epochs": epoch, "Set 0 Recall @ 1": a, "Set 1 Recall @ 1": b, "Set 1 Recall @ 10": c}
        for epoch, (a, b, c) in values.items()
    ]
    assert best_epoch(rows, "Recall @ 1", lower_is_better=False) == 2
    assert best_epoch(rows, "Recall @ 10", lower_is_better=False) == 4
    assert best_epoch(rows, "Recall @ 1", lower_is_better=True) == 1  # 0.35, as in epoch 3


def test_rows_without_the_metric_are_never_the_best() -> None:
    """A run may have been resumed with other metrics."""
    rows: list[Row] = [{"Epochs": 1, "NMI": 1.0}, {"Epochs": 2, "NMI": 0.5, "mAP": 0.25}]
    assert best_epoch(rows, "mAP", lower_is_better=False) == 2


class Method:
    """A training method that counts how often it is asked about its last step."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.asked = 0

    def learning_rates(self) -> dict[str, float]:
        return {"Learning Rate": 0.5, "Learning Rate proxies": 0.25}

    def statistics(self) -> dict[str, torch.Tensor]:
        self.asked += 1
        return {name: torch.tensor(float(value), device=self.device) for name, value in self.expected().items()}

    def expected(self) -> dict[str, float]:
        return {"Tuples": 8 * self.asked, "Norm": self.asked / 4}


def test_an_iteration_log_records_every_few_iterations(log: Records, tmp_path: Path) -> None:
    log.add("train", {"Epochs": 1, "Train Loss": 1.0, "Iterations": 4})  # so that the next iteration is the fifth
    method = Method()
    iterations = IterationLog(method, epoch=2, log=log, log_every=3)
    for iteration in (1, 2, 3):
        iterations.add(iteration, torch.tensor(iteration / 2))
    assert log.rows["iterations"] == []  # nothing is fetched before it is read
    assert iterations.read() == 1.0
    for iteration in (4, 5):
        iterations.add(iteration, torch.tensor(iteration / 2))
    assert iterations.read() == 1.5
    assert iterations.losses == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert iterations.mean_loss() == 1.5
    rates = {"Learning Rate": 0.5, "Learning Rate proxies": 0.25}
    expected = [
        {"Iteration": 6, "Epochs": 2, **rates, "Loss": 1.0, "Tuples": 8.0, "Norm": 0.25},
        {"Iteration": 9, "Epochs": 2, **rates, "Loss": 2.5, "Tuples": 16.0, "Norm": 0.5},
    ]
    assert [list(row.items()) for row in log.rows["iterations"]] == [list(row.items()) for row in expected]
    assert method.asked == 2
    assert_holds(tmp_path, {"iterations": expected})


def test_an_iteration_log_may_record_no_iteration(log: Records) -> None:
    method = Method()
    iterations = IterationLog(method, epoch=1, log=log, log_every=0)
    iterations.add(1, torch.tensor(0.5))
    assert iterations.read() == 0.5
    assert (log.rows["iterations"], method.asked) == ([], 0)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_named_after_it_is_recorded(value: float, word: str, log: Records) -> None:
    iterations = IterationLog(Method(), epoch=1, log=log, log_every=1)
    iterations.add(1, torch.tensor(0.5))
    iterations.read()
    for iteration, loss in ((2, 0.25), (3, value), (4, value)):
        iterations.add(iteration, torch.tensor(loss))
    with pytest.raises(UserError, match=f"^the loss is {word} in epoch 1, iteration 3: lower --lr$"):
        iterations.read()
    assert [row["Iteration"] for row in log.rows["iterations"]] == [1, 2, 3, 4]
    iterations = IterationLog(Method(), epoch=2, log=log, log_every=0)
    iterations.add(1, torch.tensor(value))
    with pytest.raises(UserError, match="epoch 2, iteration 1: lower --lr; the checkpoints of earlier epochs are kept"):
        iterations.read()


def test_an_iteration_is_taken_without_waiting_for_the_device(log: Records) -> None:
    """Reading a fake CUDA tensor's value raises."""
    with FakeTensorMode():
        iterations = IterationLog(Method("cuda"), epoch=1, log=log, log_every=1)
        for iteration in (1, 2):
            iterations.add(iteration, torch.tensor(0.5, device="cuda"))
        with pytest.raises(DataDependentOutputException):
            iterations.read()


def summary_rows() -> dict[str, list[Row]]:
    """Rows of three epochs after an untrained evaluation; on the validation classes the second is the best."""
    rows: dict[str, list[Row]] = {kind: [] for kind in LOGS}
    rows["train"] = [{"Epochs": epoch, "Time": 10.0, "Train Loss": 1.0, "Iterations": 2} for epoch in (1, 2, 3)]
    for kind, recalls in {"val": (0.95, 0.2, 0.6, 0.5), "test": (0.9, 0.1, 0.3, 0.4)}.items():
        rows[kind] = [{"Epochs": epoch, "Time": 1.0, "Recall @ 1": value} for epoch, value in enumerate(recalls)]
    return rows


def test_a_summary_with_validation_classes() -> None:
    selection = describe_selection("Recall @ 1", has_val_classes=True)
    assert selection == "selected by Recall @ 1 on the validation classes"
    summary = build_summary(summary_rows(), "Recall @ 1", False, has_val_classes=True, is_predefined=True)
    assert list(summary.items()) == [
        ("selection", selection),
        ("metric", "Recall @ 1"),
        ("selected", {"epoch": 2, "val": {"Recall @ 1": 0.6}, "test": {"Recall @ 1": 0.3}}),
        ("last", {"epoch": 3, "val": {"Recall @ 1": 0.5}, "test": {"Recall @ 1": 0.4}}),
        ("best on test", {"epoch": 3, "val": {"Recall @ 1": 0.5}, "test": {"Recall @ 1": 0.4}}),
        ("untrained", {"epoch": 0, "val": {"Recall @ 1": 0.95}, "test": {"Recall @ 1": 0.9}}),
        ("seconds", 38.0),
    ]


def test_a_summary_where_the_test_classes_select() -> None:
    rows = {**summary_rows(), "test": []}
    rows["val"] = rows["val"][1:]  # the untrained network was not evaluated
    summary = build_summary(rows, "Recall @ 1", False, has_val_classes=False, is_predefined=True)
    assert "on the test classes, as in the literature: optimistic" in summary["selection"]
    assert summary["selected"] == summary["best on test"] == {"epoch": 2, "test": {"Recall @ 1": 0.6}}
    assert summary["last"] == {"epoch": 3, "test": {"Recall @ 1": 0.5}}
    assert "untrained" not in summary
    summary = build_summary(rows, "Recall @ 1", True, has_val_classes=False, is_predefined=False)
    assert summary["selected"] == {"epoch": 1, "test": {"Recall @ 1": 0.2}}
    assert "best on test" not in summary


def test_a_summary_of_a_fold(capsys: pytest.CaptureFixture[str]) -> None:
    """Its test classes were evaluated for the last and the selected network only."""
    rows = summary_rows()
    rows["test"] = rows["test"][2:]
    summary = build_summary(rows, "Recall @ 1", False, has_val_classes=True, is_predefined=False)
    assert "best on test" not in summary
    assert summary["untrained"] == {"epoch": 0, "val": {"Recall @ 1": 0.95}}
    print_summary(summary)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "selected by Recall @ 1 on the validation classes",
        "    selected, epoch   2, val | Recall @ 1 0.6000",
        "    selected, epoch   2, test | Recall @ 1 0.3000",
        "        last, epoch   3, val | Recall @ 1 0.5000",
        "        last, epoch   3, test | Recall @ 1 0.4000",
        "   untrained, epoch   0, val | Recall @ 1 0.9500",
        # on the classes of which both are known
        "Recall @ 1 on unseen classes: 0.9500 untrained, 0.6000 trained (-0.3500)",
    ]
