"""records.py: rows in CSV, SQLite and TensorBoard through restarts and failures, iterations, console and summary."""

from __future__ import annotations

import csv
import json
import math
import pickle
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.tensorboard import SummaryWriter

import loggers
import main
import records
from auxiliaries import FlagParser, Progress, UserError
from records import (
    LOGS,
    Console,
    GradientRecord,
    IterationLog,
    Records,
    Row,
    best_epoch,
    build_summary,
    describe_selection,
    fit_columns,
    format_cell,
    format_metrics,
    mean_over_sets,
    metrics_of,
    print_start,
    print_summary,
    read_configurations,
    resume_hint,
    save_meta_rows,
    short_name,
    show_in_tensorboard,
)


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


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the (step, value) of each tag."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def text_of(folder: Path, tag: str) -> list[tuple[int, str]]:
    """The (step, text) of a tag in TensorBoard."""
    events = EventAccumulator(str(folder)).Reload().Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


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
    assert scalars(tmp_path) == {
        "train/Time": [(epoch, 1.5) for epoch in (1, 2, 3)],
        "train/Train Loss": [(epoch, pytest.approx(1 / epoch)) for epoch in (1, 2, 3)],
        "train/Iterations": [(epoch, 2) for epoch in (1, 2, 3)],
        "train/Time (val)": [(epoch, 0.5) for epoch in (1, 2, 3)],
        "metrics/val/Recall @ 1": [(epoch, epoch / 8) for epoch in (1, 2, 3)],
        "train iterations/Loss": [(i, i / 4) for i in range(1, 7)],
    }


def test_tensorboard_shows_metrics_first() -> None:
    """It sorts groups, which are what stands before the first slash."""
    groups = {kind: tag.split("/")[0] for kind, tag in loggers.TAGS.items()}
    assert groups.keys() == LOGS.keys()
    assert groups["val"] == groups["test"] < groups["train"] < groups["iterations"]


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
    for tag, values in scalars(tmp_path).items():
        assert [step for step, _ in values] == list(range(1, (2 if "iterations" in tag else 1) * epoch + 1)), tag

    three_epochs(log, first=epoch + 1)
    log.close()
    whole = {"train": [train_row(e) for e in (1, 2, 3)], "val": [val_row(e) for e in (1, 2, 3)]}
    whole["iterations"] = [iteration_row(i) for i in range(1, 7)]
    assert_holds(tmp_path, whole)
    assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(e, e / 8) for e in (1, 2, 3)]
    assert scalars(tmp_path)["train iterations/Loss"] == [(i, i / 4) for i in range(1, 7)]


def test_rows_of_a_final_evaluation_that_was_killed_vanish(tmp_path: Path) -> None:
    """They have the numbers of epochs that were saved long before, so that no number tells them apart."""
    log = Records(tmp_path)
    three_epochs(log)
    history = until(log.rows, 3)
    log.add("test", val_row(1), val_row(3))
    log.close()
    for _ in range(2):
        log = Records(tmp_path, history)
        log.flush()
        assert not [tag for tag in scalars(tmp_path) if "test" in tag]
        log.add("test", val_row(1))
        log.add("test", val_row(3))
        log.close()
        assert scalars(tmp_path)["metrics/test/Recall @ 1"] == [(1, 0.125), (3, 0.375)]
        assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(e, e / 8) for e in (1, 2, 3)]
    assert_holds(tmp_path, {kind: log.rows[kind] for kind in ("train", "val", "test", "iterations")})
    Records(tmp_path, history, mirrored_by=[]).close()  # nor do they stay where TensorBoard is turned off
    assert not [tag for tag in scalars(tmp_path) if "test" in tag]


def test_event_files_of_earlier_versions_are_taken_over(tmp_path: Path) -> None:
    """They had a folder for epochs and one for iterations; pictures and times come from there."""
    log = Records(tmp_path, mirrored_by=[])
    three_epochs(log)
    log.close()
    Image.new("RGB", (12, 7), "red").save(tmp_path / "a.png")
    for unit in ("epochs", "iterations"):
        with SummaryWriter(str(tmp_path / "tensorboard" / unit), purge_step=0) as writer:
            for step in range(1, 4) if unit == "epochs" else range(1, 7):
                tag = "val/Recall @ 1" if unit == "epochs" else "iterations/Loss"
                writer.add_scalar(tag, 0.5, step, walltime=1000.0 * step)
            if unit == "epochs":
                for epoch in (1, 3):
                    writer.add_image("sample recoveries", np.zeros((7, 12, 3), np.uint8), epoch, dataformats="HWC")
    Records(tmp_path, until(log.rows, 2)).close()
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [True]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("sample recoveries")] == [1]
    found = [(event.step, event.value, event.wall_time) for event in events.Scalars("metrics/val/Recall @ 1")]
    assert found == [(1, 0.125, 1000), (2, 0.25, 2000)]
    assert [event.wall_time for event in events.Scalars("train iterations/Loss")] == [1000, 2000, 3000, 4000]


def test_a_torn_event_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    log = Records(tmp_path)
    three_epochs(log)
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    (tmp_path / "tensorboard" / "events.out.tfevents.0.other").write_bytes(b"no events" * 50)
    Records(tmp_path, log.rows).close()
    assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(e, e / 8) for e in (1, 2, 3)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_replaced_row_is_shown_once_in_tensorboard(log: Records, tmp_path: Path) -> None:
    three_epochs(log)
    log.add("val", val_row(2) | {"Recall @ 1": 0.75})
    log.flush()
    assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(1, 0.125), (2, 0.75), (3, 0.375)]


def test_flags_are_shown_in_tensorboard(log: Records, tmp_path: Path) -> None:
    log.note_configuration(0, {"lr": 0.5, "k_vals": [1, 2], "fold": None, "loss": "a|b", "download": True}, {})
    log.add("val", val_row(1))
    log.note_configuration(1, {"lr": 0.25}, {})
    log.add("val", val_row(1))  # which replaces a row
    log.flush()
    (first, text), (second, changed) = text_of(tmp_path / "tensorboard", "configuration")
    assert (first, second) == (0, 1)
    assert text.splitlines()[:5] == [
        *("| Flag | Value |", "|---|---|", "| --lr | 0.5 |", "| --k_vals | [1, 2] |", "| --fold | None |")
    ]
    assert "| --loss | a\\|b |" in text
    assert changed.splitlines()[2:] == ["| --lr | 0.25 |"]
    content = EventAccumulator(str(tmp_path / "tensorboard")).Reload().summary_metadata
    assert "_hparams_/session_start_info" in content


def test_history_comes_back_as_it_was_where_nothing_is_dropped(tmp_path: Path) -> None:
    log = Records(tmp_path)
    log.add("val", {"Epochs": 0, "Recall @ 1": 0.5})
    three_epochs(log)
    log.close()
    before = {name: (tmp_path / name).read_bytes() for name in (LOGS["val"], LOGS["train"], LOGS["iterations"])}
    Records(tmp_path, log.rows).close()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert_holds(tmp_path, {kind: log.rows[kind] for kind in ("train", "iterations")})
    assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(0, 0.5), *((e, e / 8) for e in (1, 2, 3))]


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


BAD_CONFIGURATIONS = [
    b"no database" * 100,
    "CREATE TABLE configurations (Epochs, Configuration)",
    "CREATE VIEW train AS SELECT 1 AS Epochs",
    "CREATE TABLE configurations (Epochs, Time, Configuration, Changes, Environment); "
    "INSERT INTO configurations VALUES (0, '', '{', '{}', '{}')",
    "CREATE TABLE configurations (Epochs, Time, Configuration, Changes, Environment); "
    "INSERT INTO configurations VALUES (0, '', '[1]', '{}', '{}')",
    "CREATE TABLE configurations (Epochs, Time, Configuration, Changes, Environment); "
    "INSERT INTO configurations VALUES (NULL, '', '{}', '{}', '{}')",
    "CREATE TABLE configurations (Epochs, Time, Configuration, Changes, Environment); "
    "INSERT INTO configurations VALUES (0, '', 7.5, '{}', '{}')",
    "CREATE TABLE configurations (Epochs, Time, Configuration, Changes, Environment); "
    f"INSERT INTO configurations VALUES (0, '', '{'[' * 100_000}', '', '')",
]


def write_database(path: Path, content: str | bytes) -> None:
    """Writes bytes, or what SQL makes of an empty database."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    database = sqlite3.connect(path)
    database.executescript(content)
    database.close()


@pytest.mark.parametrize("content", BAD_CONFIGURATIONS, ids=range(len(BAD_CONFIGURATIONS)))
def test_configurations_that_are_not_a_runs_are_one_sentence(content: str | bytes, tmp_path: Path) -> None:
    """They say which changes of flags a reproduced run follows: without them it would be another run, in silence."""
    write_database(tmp_path / "records.db", content)
    with pytest.raises(UserError, match=r"records\.db .*move it away") as caught:
        read_configurations(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_database_without_configurations_has_none(tmp_path: Path) -> None:
    write_database(tmp_path / "records.db", b"")
    assert read_configurations(tmp_path) == []
    write_database(tmp_path / "records.db", "CREATE TABLE train (Epochs INTEGER PRIMARY KEY)")
    assert read_configurations(tmp_path) == []
    (tmp_path / "records.db").unlink()
    (tmp_path / "records.db").mkdir()
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
log = Records(Path(sys.argv[1]), mirrored_by=[])
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
    log = Records(tmp_path, mirrored_by=[])
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
        Records(tmp_path, log.rows, mirrored_by=[])
    assert "\n" not in str(caught.value)
    path.unlink()
    Records(tmp_path, log.rows, mirrored_by=[]).close()
    assert table(tmp_path, "iterations") == log.rows["iterations"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"records\.db can't be written \(unable to open database file\)") as caught:
        Records(tmp_path / "gone")
    assert "\n" not in str(caught.value)
    (tmp_path / "taken" / "records.db").mkdir(parents=True)
    with pytest.raises(UserError, match=r"records\.db is a folder: move it away"):
        Records(tmp_path / "taken")


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TABLE places (url TEXT)", "it holds other tables than a run's"),
        ("CREATE VIEW train AS SELECT 1 AS Epochs", "its train is not a run's table"),
        ("CREATE TABLE train (speed REAL)", "its train is not a run's table"),
        ("CREATE TABLE Val (a REAL); CREATE TABLE train (Epochs INTEGER)", "its val is not a run's table"),
        ("CREATE TABLE iterations (Epochs INTEGER)", "its iterations is not a run's table"),
        ("CREATE TABLE configurations (Epochs INTEGER, Time TEXT)", "its configurations is not a run's table"),
        ("CREATE TABLE x (configurations TEXT); CREATE INDEX test ON x (configurations)", "its test is not a run's"),
    ],
)
def test_another_programs_database_is_left_as_it_is(statement: str, words: str, tmp_path: Path) -> None:
    write_database(tmp_path / "records.db", statement)
    before = (tmp_path / "records.db").read_bytes()
    with pytest.raises(UserError, match=rf"records\.db is not a run's database \({words}.*move it away"):
        Records(tmp_path, {"train": [train_row(1)]}, mirrored_by=[])
    assert (tmp_path / "records.db").read_bytes() == before


@pytest.mark.parametrize("content", [b"", "CREATE TABLE train (Epochs INTEGER PRIMARY KEY, Loss TEXT)"])
def test_a_database_that_lacks_something_is_filled(content: str | bytes, tmp_path: Path) -> None:
    write_database(tmp_path / "records.db", content)
    log = Records(tmp_path, {"train": [train_row(1)]}, mirrored_by=[])
    log.note_configuration(1, {"lr": 1}, {})
    log.close()
    assert table(tmp_path, "train") == [train_row(1)]
    assert [row["Epochs"] for row in read_configurations(tmp_path)] == [1]


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
    with pytest.raises(UserError, match=r"can't be written \(database is locked\): close the program that uses it"):
        log.add("train", train_row(1))
    other.close()


def test_event_files_that_cannot_be_written_are_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    log = Records(tmp_path)
    three_epochs(log)
    log.close()
    assert_holds(tmp_path, log.rows)
    assert capsys.readouterr().err.count("notice: --logger tensorboard failed") == 1


def test_an_event_that_cannot_be_written_is_a_notice(
    log: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard's writer thread hands on what it met, such as a full disk, at the next event."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    board = log.mirrors.loggers["tensorboard"]
    assert isinstance(board, loggers.TensorBoard)
    monkeypatch.setattr(board.writer.file_writer, "add_event", full)
    three_epochs(log)
    assert_holds(tmp_path, log.rows)
    assert capsys.readouterr().err == (
        "notice: --logger tensorboard failed (No space left on device): the run goes on without it; CSV and SQLite "
        "hold everything, and --resume_training sends what is missing\n"
    )
    board.writer.close()
    monkeypatch.undo()
    log.close()
    Records(tmp_path, log.rows).close()  # which a resumed run makes good
    assert scalars(tmp_path)["metrics/val/Recall @ 1"] == [(e, e / 8) for e in (1, 2, 3)]


def test_without_tensorboard_nothing_of_it_is_made(tmp_path: Path) -> None:
    log = Records(tmp_path, mirrored_by=[])
    three_epochs(log)
    log.add_picture("sample recoveries", tmp_path / "none.png", 1)
    log.flush()
    log.close()
    assert names_in(tmp_path) == {"records.db", LOGS["train"], LOGS["val"], LOGS["iterations"]}


def test_pictures_are_shown_in_tensorboard(log: Records, tmp_path: Path) -> None:
    Image.new("RGBA", (12, 7), "red").save(tmp_path / "a.png")
    log.add_picture("sample recoveries", tmp_path / "a.png", 3)
    log.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
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
    assert json.loads((tmp_path / "meta" / "results.json").read_text()) == rows
    ((_, text),) = text_of(tmp_path / "meta" / "tensorboard", "results over folds")
    assert text.splitlines() == [
        "| Network | Split | Metric | Mean | Std |",
        "|---|---|---|---|---|",
        "| selected | test | Recall @ 1 | 0.5000 | 0.2500 |",
        "| selected | test | NMI | 0.7500 |  |",
    ]


def test_gradient_statistics_equal_numpys_over_several_saves_and_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 7, 3)).astype(np.float32)  # (iterations, D, features)
    weight = nn.Parameter(torch.zeros(7, 3))
    path = tmp_path / "grad_measure.npz"
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
        saved = np.load(path)
        assert set(saved.files) == expected.keys()
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


class Bomb:
    """A pickle of it creates a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def damaged_arrays() -> dict[str, Any]:
    """What may stand in grad_measure.npz instead of the arrays of two iterations."""
    whole: dict[str, Any] = {name: np.ones((2, 3), np.float32) for name in GradientRecord.STATISTICS}
    whole["iteration"] = np.array([1, 2])
    return {
        "a lacking array": {name: array for name, array in whole.items() if name != "std"},
        "no iterations": {name: array for name, array in whole.items() if name != "iteration"},
        "other lengths": {**whole, "iteration": np.array([1])},
        "other shapes": {**whole, "mean": np.ones((2, 4), np.float32)},
        "flat arrays": {name: array.ravel() for name, array in whole.items()},
        "text": {**whole, "std": np.full((2, 3), "x")},
        "numbers that are none": {**whole, "iteration": np.array([0.5, 1.5])},
        "a single array": whole["mean"],
    }


@pytest.mark.parametrize("kind", [*damaged_arrays(), "other bytes", "nothing", "half a file", "a pickle", "an object"])
def test_damaged_gradients_are_one_sentence_and_run_no_code(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "grad_measure.npz"
    arrays = damaged_arrays().get(kind)
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays is not None:
        with open(path, "wb") as file:
            np.save(file, arrays)
    elif kind == "an object":
        np.savez(path, **{**damaged_arrays()["other lengths"], "mean": np.array([Bomb(tmp_path / "ran")], object)})
    else:
        pickled = pickle.dumps(Bomb(tmp_path / "ran"))
        np.savez(path, **damaged_arrays()["other lengths"])
        half = path.read_bytes()[:200]
        path.write_bytes({"other bytes": b"nothing", "nothing": b"", "half a file": half, "a pickle": pickled}[kind])
    with pytest.raises(UserError, match=r"grad_measure\.npz is damaged: move it away, and a new record begins$"):
        GradientRecord(path, iterations=2)
    assert not (tmp_path / "ran").exists()


def test_gradients_of_an_earlier_version_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were pickled: reading them would run what stands in them."""
    old = tmp_path / "grad_measure.pkl"
    old.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    record = GradientRecord(tmp_path / "grad_measure.npz", iterations=4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"notice: {old}, of an earlier version, is not continued")
    assert line.endswith("grad_measure.npz begins with iteration 5")
    record.add(nn.Parameter(torch.ones(7, 3)))
    record.save()
    GradientRecord(tmp_path / "grad_measure.npz", iterations=5)
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "ran").exists()


def test_a_missing_gradient_counts_as_zero(tmp_path: Path) -> None:
    record = GradientRecord(tmp_path / "grad_measure.npz", iterations=4)  # without a file to go on with
    record.add(nn.Parameter(torch.ones(7, 3)))
    record.save()
    arrays = dict(np.load(tmp_path / "grad_measure.npz"))
    assert arrays.pop("iteration").tolist() == [5]
    assert all(not array.any() for array in arrays.values())


def test_flags_are_not_compared() -> None:
    parser = FlagParser()
    records.add_arguments(parser)
    assert parser.names_with(compared=False) == [
        "log_every",
        "logger",
        "pictures",
        "report",
        "dist_measure",
        "grad_measure",
    ]
    opt = parser.parse_args([])
    assert (opt.log_every, opt.logger, opt.dist_measure, opt.grad_measure) == (1, ["tensorboard"], False, False)
    opt = parser.parse_args(["--log_every", "0", "--no-tensorboard", "--dist_measure"])
    assert (opt.log_every, opt.logger, opt.dist_measure, opt.grad_measure) == (0, [], True, False)
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


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_a_metric_that_is_nan_selects_no_epoch(lower_is_better: bool) -> None:
    rows: list[Row] = [{"Epochs": epoch, "Time": 1.0, "Intra / Inter": math.nan} for epoch in (0, 1, 2)]
    assert best_epoch(rows[:1], "Intra / Inter", lower_is_better) == 0  # before training
    for evaluated in (rows[:2], rows):
        with pytest.raises(UserError, match=r"^Intra / Inter is NaN.*choose another --eval_metric_for_best_epoch$"):
            best_epoch(evaluated, "Intra / Inter", lower_is_better)


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


# The console


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_plain_line_comes_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(range(10), "epoch 1/4", clock)
    for number in progress:
        clock.now += 12
        if number == 4:
            progress.show("loss 0.5000")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "epoch 1/4: 3 of 10",
        "epoch 1/4: 6 of 10, loss 0.5000",
        "epoch 1/4: 9 of 10, loss 0.5000",
    ]
    assert printed.out == ""


def test_on_a_terminal_a_bar_shows_the_note_and_goes_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = Clock()
    progress = Progress(range(10), "epoch 1/4", clock)
    for _ in progress:
        clock.now += 60
        progress.show("loss 0.5000")
    lines = capsys.readouterr().err.split("\r")
    assert any(re.search(r"^epoch 1/4:.* \d+/10 .*, loss 0\.5000", line) for line in lines)
    assert not any("\n" in line for line in lines)
    assert lines[-1] == ""


def test_the_loss_is_shown_from_the_first_iteration_on_and_then_every_ten_seconds() -> None:
    clock = Clock()
    console = Console(4, "Recall @ 1", "test classes", clock)
    for epoch in (1, 2):
        shown = []
        for iteration in console.watch(range(1, 21), epoch):
            clock.now += 3
            if console.wants_loss():
                console.show_loss(0.25, iteration)
                shown.append(iteration)
        assert shown == [1, 5, 9, 13, 17]


def test_the_remaining_time_counts_evaluations() -> None:
    clock = Clock()
    console = Console(4, "Recall @ 1", "test classes", clock)
    notes = []
    clock.now += 500  # the start of workers, before the first iteration has ended, counts for nothing
    for epoch in (3, 4):  # a run that was resumed
        for iteration in console.watch(range(1, 11), epoch):
            console.show_loss(0.25, iteration)
            notes.append(console.progress.note)
            clock.now += 6
        clock.now += 40
    # 19 iterations are left, of 6 seconds each; in the second epoch, 100 seconds per epoch are known
    assert notes[0] == "loss 0.2500"
    assert notes[1] == "loss 0.2500, run: 01:48 left"
    assert notes[9] == "loss 0.2500, run: 01:00 left"
    assert notes[10] == "loss 0.2500, run: 01:30 left"
    assert notes[19] == "loss 0.2500, run: 00:00 left"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.66814, "  0.6681"),
        (-0.5, "  -0.500"),
        (12.3456, "  12.346"),
        (1234.5678, "  1234.6"),
        (123456.7, "  123457"),
        (1e12, "   1e+12"),
        (math.nan, "     nan"),
        (-math.inf, "    -inf"),
    ],
)
def test_numbers_fit_into_their_columns(value: float, text: str) -> None:
    assert format_cell(value, "NMI") == text
    assert format_cell(value, "Recall @ 1000") == text


def test_names_are_short() -> None:
    names = ["Recall @ 10", "Set 0 Recall @ 1", "Class Recall @ 4", "Precision @ 1", "MAP@R", "Recall", "Mean rank"]
    short = ["R@10", "Set 0 R@1", "Class R@4", "P@1", "MAP@R", "Recall", "Mean rank"]
    assert list(map(short_name, names)) == short


def test_the_metric_that_selects_is_always_shown() -> None:
    row: Row = {"Epochs": 1, "Time": 1.0, **{f"Recall @ {2**i}": 0.5 for i in range(20)}, "MAP@R": 0.5}
    assert fit_columns(row, "MAP@R", 32) == ["Recall @ 1", "Recall @ 2", "Recall @ 4", "MAP@R"]
    assert fit_columns(row, "MAP@R", 1) == ["MAP@R"]
    sets: Row = {"Epochs": 1, **{f"Set {i} {name}": 0.5 for i in range(3) for name in ("NMI", "Recall @ 1")}}
    assert fit_columns(sets, "Recall @ 1", 32) == ["Recall @ 1", "Set 0 NMI", "Set 0 Recall @ 1"]


def print_epochs(log: Records, console: Console, rows: list[Row], lower_is_better: bool = False) -> None:
    for row in rows:
        if row["Epochs"]:
            log.add("train", {**train_row(row["Epochs"]), "Time": 60.0})
        log.add("val", row)
        console.print_epoch(row["Epochs"], log, best_epoch(log.rows["val"], console.metric, lower_is_better))


def test_the_best_epoch_has_a_color_in_a_terminal_alone(
    log: Records, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    rows = [val_row(1), val_row(2) | {"Recall @ 1": 0.1}]
    print_epochs(log, Console(2, "Recall @ 1", "test classes"), rows)
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_epochs(log, Console(2, "Recall @ 1", "test classes"), rows)
    colored = capsys.readouterr().out
    assert "\033" not in plain
    assert [line for line in colored.splitlines() if "\033" in line] == [
        f"\033[32m{line}\033[0m" for line in plain.splitlines() if line.endswith(" *")
    ]


def test_each_epoch_is_a_line_in_which_the_best_is_marked(log: Records, capsys: pytest.CaptureFixture[str]) -> None:
    values = {0: 0.9, 1: 0.25, 2: 0.5, 3: 0.375, 12: 0.75}
    rows: list[Row] = [{"Epochs": e, "Time": 2.0, "NMI": 0.1, "Recall @ 1": value} for e, value in values.items()]
    print_epochs(log, Console(12, "Recall @ 1", "test classes"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "metrics of the test classes; * the best R@1 so far",
        "    epoch    loss     NMI     R@1     time",
        "     0/12          0.1000  0.9000    00:02",
        "     1/12  1.0000  0.1000  0.2500    01:02 *",
        "     2/12  0.5000  0.1000  0.5000    01:02 *",
        "     3/12  0.3333  0.1000  0.3750    01:02",
        "    12/12  0.0833  0.1000  0.7500    01:02 *",
    ]


def test_the_time_of_a_line_counts_the_epochs_since_the_last_one(
    log: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in range(1, 7):
        log.add("train", {**train_row(epoch), "Time": 60.0})
        if epoch % 3 == 0:
            log.add("val", val_row(epoch))
    for epoch in (3, 6):
        Console(6, "Recall @ 1", "test classes").print_epoch(epoch, log, 6)
    assert re.findall(r"\d\d:\d\d", capsys.readouterr().out) == ["03:00", "03:00"]


@pytest.mark.parametrize("num_sets", [1, 3])
def test_lines_fit_100_columns(num_sets: int, log: Records, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["NMI", "F1", *(f"Recall @ {10**i}" for i in range(9)), "Mean rank"]
    names = names if num_sets == 1 else [f"Set {i} {name}" for i in range(num_sets) for name in names]
    rows: list[Row] = [{"Epochs": e, "Time": 7e5, **dict.fromkeys(names, -123.456)} for e in (1, 1000)]
    print_epochs(log, Console(1000, "Recall @ 1", "validation classes"), rows)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    shown = len(re.findall(r"-123\.5", lines[3]))
    hidden = len(names) - shown + (num_sets > 1)
    assert lines[1] == f"metrics of the validation classes, {hidden} more in log_val_Base.csv; * the best R@1 so far"
    assert len(lines[2]) <= len(lines[3]) <= len(lines[2]) + 2


def test_the_header_comes_again_after_many_lines_and_with_other_metrics(
    log: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(100, "Recall @ 1", "test classes")
    print_epochs(log, console, [val_row(epoch) for epoch in range(1, 52)])
    assert capsys.readouterr().out.count("epoch") == 3
    print_epochs(log, console, [val_row(52, NMI=0.5), val_row(53, NMI=0.5)])
    assert capsys.readouterr().out.count("epoch") == 1


class Images:
    """A set of images that knows how many it has."""

    def __init__(self, num_images: int, num_classes: int):
        self.count, self.classes = num_images, num_classes

    def __len__(self) -> int:
        return self.count

    def num_classes(self) -> int:
        return self.classes


def test_the_start_says_what_a_run_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    def retrieval_set(query: Images, gallery: Images | None = None) -> Any:
        return SimpleNamespace(query=query, gallery=gallery)

    test = [retrieval_set(Images(14218, 3985), Images(12612, 3985)), retrieval_set(Images(800, 10))]
    splits: Any = SimpleNamespace(train=Images(25882, 3997), val=[], test=test)
    cpu = torch.device("cpu")
    print_start("in-shop", splits, "resnet50", "marginloss", cpu, Path("Training_Results/in-shop/a"), epoch=0)
    assert capsys.readouterr().out.splitlines() == [
        "data        in-shop",
        "training    25,882 images of 3,997 classes",
        "test        14,218 queries and a gallery of 12,612 images of 3,985 classes + 800 images of 10 classes",
        "network     resnet50",
        "loss        marginloss",
        f"device      CPU, {torch.get_num_threads()} threads",
        "run folder  Training_Results/in-shop/a",
    ]
    splits.val = [retrieval_set(Images(7, 2))]
    print_start("in-shop", splits, "resnet50", "marginloss", cpu, Path("a"), epoch=3)
    printed = capsys.readouterr().out
    assert "\nvalidation  7 images of 2 classes\n" in printed
    assert printed.endswith("run folder  a, after epoch 3\n")


@pytest.mark.parametrize(
    ("folder", "others", "command"),
    [
        ("Training_Results/cub200/run", [], "--resume_training --savename run"),
        ("Training_Results/cub200/a b", [], "--resume_training --savename 'a b'"),
        ("else where/cub200/run", [], "--resume_training --savename run --save_path 'else where'"),
        (
            "Training_Results/cub200/run",
            ["Training_Results/glyphs/run"],
            "--resume_training --savename run --dataset cub200",
        ),
        (
            "Training_Results/cub200/folds/fold_2",
            ["Training_Results/cub200/folds"],
            "--resume_training --savename folds",
        ),
        ("Training_Results/cub200/fold_2", [], "--resume_training --savename fold_2"),
    ],
)
def test_stopping_says_how_to_continue(
    folder: str,
    others: list[str],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (folder, *others):
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / "config.yaml").touch()
    with pytest.raises(KeyboardInterrupt), resume_hint(Path(folder)):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.strip() == f"to continue: python main.py {command}"
    with pytest.raises(UserError), resume_hint(Path(folder)):
        raise UserError("a sentence")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("without_pictures")
def test_the_printed_command_continues_a_run(
    small_flags: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_one_epoch = main.train_one_epoch

    def stopped(run: Any, loader: Any, device: Any, epoch: int, *args: Any) -> Row:
        if epoch == 2:
            raise KeyboardInterrupt
        return train_one_epoch(run, loader, device, epoch, *args)

    flags = small_flags("--n_epochs", "3", "--iterations_per_epoch", "2", "--check_untrained_accuracy")
    with monkeypatch.context() as patch:
        patch.setattr(main, "train_one_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            main.command(flags)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:3] == ["data        tiny", "training    24 images of 4 classes", "test        24 images of 4 classes"]
    assert [line.split()[0] for line in lines[-3:]] == ["-1/3", "0/3", "1/3"]
    command = re.search("to continue: python main.py (.*)", printed.err)
    assert command
    main.command(shlex.split(command[1]))
    lines = capsys.readouterr().out.splitlines()
    assert f"run folder  {tmp_path / 'results/tiny/run'}, after epoch 1" in lines
    assert [line.split()[0] for line in lines if re.match(r" +\d/3", line)] == ["2/3", "3/3"]
    assert max(map(len, lines[7:-1])) <= 100  # below the paths


# The summary


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
    selection = describe_selection("Recall @ 1", has_val_classes=True, watches_test=True)
    assert selection.endswith("validation classes; the test classes were watched while training, but did not select")
    summary = build_summary(summary_rows(), "Recall @ 1", False, has_val_classes=True, watches_test=True)
    assert list(summary.items()) == [
        ("selection", selection),
        ("metric", "Recall @ 1"),
        ("selected", {"epoch": 2, "val": {"Recall @ 1": 0.6}, "test": {"Recall @ 1": 0.3}}),
        ("last", {"epoch": 3, "val": {"Recall @ 1": 0.5}, "test": {"Recall @ 1": 0.4}}),
        ("best on test", {"epoch": 3, "val": {"Recall @ 1": 0.5}, "test": {"Recall @ 1": 0.4}}),
        ("untrained", {"epoch": 0, "val": {"Recall @ 1": 0.95}, "test": {"Recall @ 1": 0.9}}),
        ("initial weights", "random"),
        ("seconds", 38.0),
    ]
    pretrained = build_summary(summary_rows(), "Recall @ 1", False, True, True, is_pretrained=True)
    assert pretrained == {**summary, "initial weights": "pretrained"}


def test_a_summary_with_metrics_of_training_images(capsys: pytest.CaptureFixture[str]) -> None:
    rows = summary_rows()
    rows["train_eval"] = [{"Epochs": epoch, "Time": 2.0, "Recall @ 1": 0.1 + epoch / 4} for epoch in (1, 2, 3)]
    summary = build_summary(rows, "Recall @ 1", False, has_val_classes=True, watches_test=False)
    assert summary["selected"]["train"] == {"Recall @ 1": 0.6}
    assert summary["seconds"] == 44.0
    print_summary(summary)
    assert capsys.readouterr().out.splitlines()[2:6] == [
        "           epoch            R@1",
        " selected      2  val    0.6000",
        " selected      2  test   0.3000",
        " selected      2  train  0.6000",
    ]


def test_a_summary_where_the_test_classes_select() -> None:
    rows = {**summary_rows(), "test": []}
    rows["val"] = rows["val"][1:]  # the untrained network was not evaluated
    summary = build_summary(rows, "Recall @ 1", False, has_val_classes=False, watches_test=True)
    assert "on the test classes, as in the literature: optimistic" in summary["selection"]
    assert summary["selected"] == summary["best on test"] == {"epoch": 2, "test": {"Recall @ 1": 0.6}}
    assert summary["last"] == {"epoch": 3, "test": {"Recall @ 1": 0.5}}
    assert not {"untrained", "initial weights"} & summary.keys()
    summary = build_summary(rows, "Recall @ 1", True, has_val_classes=False, watches_test=False)
    assert summary["selected"] == {"epoch": 1, "test": {"Recall @ 1": 0.2}}
    assert "best on test" not in summary


def test_a_summary_of_a_fold(capsys: pytest.CaptureFixture[str]) -> None:
    """Its test classes were evaluated for the last and the selected network only."""
    rows = summary_rows()
    rows["test"] = rows["test"][2:]
    summary = build_summary(rows, "Recall @ 1", False, has_val_classes=True, watches_test=False)
    assert "best on test" not in summary
    assert summary["untrained"] == {"epoch": 0, "val": {"Recall @ 1": 0.95}}
    print_summary(summary)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "selected by Recall @ 1 on the validation classes",
        "           epoch           R@1",
        " selected      2  val   0.6000",
        " selected      2  test  0.3000",
        "     last      3  val   0.5000",
        "     last      3  test  0.4000",
        "untrained      0  val   0.9500",
        # on the classes of which both are known
        "Recall @ 1 on unseen classes: 0.9500 untrained, 0.6000 trained (-0.3500)",
    ]


def test_networks_of_the_same_epoch_are_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {**summary_rows(), "test": []}
    rows["val"] = rows["val"][:3]
    print_summary(build_summary(rows, "Recall @ 1", False, False, True, is_pretrained=True))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "selected by Recall @ 1 on the test classes, as in the literature: optimistic, since these choose the",
        "epoch",
        "                                epoch           R@1",
        "selected = last = best on test      2  test  0.6000",
        "               before training      0  test  0.9500",
        "Recall @ 1 on unseen classes: 0.9500 before training, 0.6000 trained (-0.3500)",
    ]


def test_a_summary_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {**summary_rows(), "test": []}
    for row in rows["val"]:
        row |= {"NMI": 0.5, **{f"Recall @ {10**i}": 0.5 for i in range(1, 9)}, "MAP@R": 0.25}
    print_summary(build_summary(rows, "MAP@R", False, False, True))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "MAP@R" in lines[3]
    hidden = 11 - len(lines[3].split()) + 1
    assert f"({hidden} more metrics in summary.json)" in " ".join(lines[1:3])
