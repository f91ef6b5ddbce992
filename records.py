"""What a run records and prints: rows in CSV, SQLite and mirrors of them, iterations, the console, and the summary."""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import json
import math
import re
import shlex
import shutil
import sqlite3
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

import loggers
from auxiliaries import (
    FlagParser,
    Progress,
    UserError,
    atomic_write,
    by_first_rank,
    colored,
    disk_advice,
    notice,
    number,
    ranks,
    save_json,
    to_builtin,
)
from loggers import Row, step_column

if TYPE_CHECKING:
    from datasets import ImageSet, RetrievalSet, Splits

LOGS = {
    "train": "log_train_Base.csv",
    "val": "log_val_Base.csv",
    "test": "log_test_Base.csv",
    "distances": "distance_measures_Train.csv",
    "iterations": "log_iterations.csv",
    "train_eval": "log_train_eval_Base.csv",  # metrics of the training images
}
TIMED = ("train", "train_eval", "val", "test")  # kinds of rows that say how many seconds they took
NOT_METRICS = ("Epochs", "Iteration", "Time")
PER_QUERY = "per_query.npz"
CONFIGURATION_COLUMNS = ("Epochs", "Time", "Configuration", "Changes", "Environment")


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of what is recorded."""
    # fmt: off
    add = parser.add_argument_group("records", compared=False).add_argument
    add("--log_every", type=number(int, 0), default=1,
        help="record loss, learning rates and statistics every so many iterations; 0: never")
    add("--logger", nargs="*", choices=tuple(loggers.LOGGERS), default=["tensorboard"],
        help="libraries that show the records, beside CSV and SQLite; --logger without a name: none. wandb writes into "
        "the run folder if the environment variable WANDB_MODE is offline, mlflow unless MLFLOW_TRACKING_URI is set")
    add("--tensorboard", action=loggers.TensorBoardAction, dest="logger", default=argparse.SUPPRESS,
        help="add TensorBoard to --logger, or take it out")
    add("--pictures", action="switch", default=True,
        help="draw curves, and retrievals of the best network: at the end, and at evaluations before it for at most a "
        "fiftieth of the time")
    add("--report", action="switch", default=True, machine=True,
        help="at the end, write report.html: a page with curves, retrievals, what is confused, and a map of "
        "embeddings; it takes some seconds, also where data are large")
    add("--dist_measure", action="switch",
        help="record the ratio of intra- to inter-class distances at every evaluation; embeds all training images")
    add("--grad_measure", action="switch",
        help="record statistics of the embedding layer's gradient at every iteration: 32 kB each for resnet50")
    # fmt: on


# Rows


def _columns(rows: Iterable[Row]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


class Records:
    """A run's rows by kind (a key of `LOGS`): in memory, as CSV, in records.db (SQLite), and in mirrors.

    Args:
        folder: the run folder.
        history: the rows so far, as a checkpoint holds them. All files are rewritten to hold these and no others.
        mirrored_by: keys of `loggers.LOGGERS`.

    Attributes:
        rows: the rows of each kind, in order of their epoch or iteration.

    Raises:
        UserError: something can't be written, or a file is not what a run writes.
    """

    def __init__(
        self,
        folder: Path,
        history: Mapping[str, Sequence[Row]] | None = None,
        mirrored_by: Sequence[str] = ("tensorboard",),
    ):
        self.folder = folder
        self.rows: dict[str, list[Row]] = {kind: list((history or {}).get(kind, [])) for kind in LOGS}
        self.columns = {kind: _columns(rows) for kind, rows in self.rows.items()}
        self._open(mirrored_by)

    def _open(self, mirrored_by: Sequence[str]) -> None:
        """Makes all files hold the rows of now."""
        folder = self.folder
        self._open_database()
        for kind, name in LOGS.items():
            if self.rows[kind] or (folder / name).exists():
                self._write_csv(kind)
        if "tensorboard" not in mirrored_by and (folder / "tensorboard").exists():
            loggers.Mirrors(["tensorboard"], folder, self.rows).close(failed=False)  # it holds no other rows either
        self.mirrors = loggers.Mirrors(mirrored_by, folder, self.rows)

    def add(self, kind: str, *rows: Row) -> None:
        """Appends rows; the row of an epoch (or iteration) that is already there is replaced."""
        step, earlier, columns = step_column(kind), self.rows[kind], self.columns[kind]
        follows = not earlier or earlier[-1][step] < rows[0][step]
        if not follows:
            replaced = {row[step] for row in rows}
            earlier[:] = [row for row in earlier if row[step] not in replaced]
        earlier += rows
        if not follows:
            earlier.sort(key=lambda row: row[step])
        self.columns[kind] = _columns([dict.fromkeys(columns), *rows])
        self._write(kind, rows, follows, self.columns[kind] == columns)

    def _write(self, kind: str, rows: Sequence[Row], follows: bool, has_same_columns: bool) -> None:
        """Writes rows that were added; they follow all others, or replace some."""
        columns = self.columns[kind]
        with _writing(self.folder / "records.db"), self.database:
            self._insert(kind, rows)
        if follows and has_same_columns:
            path = self.folder / LOGS[kind]
            with _writing(path), open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(rows)
        else:
            self._write_csv(kind)
        if follows:
            self.mirrors.add(kind, rows)
        else:
            self.mirrors.replace(self.rows)

    def row_of(self, kind: str, epoch: int) -> Row:
        """The row of an epoch; empty where there is none."""
        return next((row for row in self.rows[kind] if row["Epochs"] == epoch), {})

    def iterations(self) -> int:
        """The number of iterations of the recorded epochs."""
        return sum(row["Iterations"] for row in self.rows["train"])

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        """Shows a PNG in mirrors."""
        self.mirrors.add_picture(name, path, epoch)

    def note_configuration(self, epoch: int, flags: Mapping[str, Any], environment: Any) -> None:
        """Adds a row to the table `configurations`, and shows the flags in mirrors.

        Args:
            epoch: the epoch after which these flags hold.
            flags: all flags; those that differ from the row before are listed as changes.
            environment: versions and hardware.
        """
        flags = dict(to_builtin(flags))
        *_, before = [flags, *(row["Configuration"] for row in read_configurations(self.folder))]
        changes = {name: value for name, value in flags.items() if value != before.get(name)}
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        values = (epoch, now, *map(json.dumps, (flags, changes, to_builtin(environment))))
        with _writing(self.folder / "records.db"), self.database:
            self.database.execute("INSERT INTO configurations VALUES (?, ?, ?, ?, ?)", values)
        table = format_table([{"Flag": f"--{name}", "Value": value} for name, value in flags.items()])
        self.mirrors.note_flags(epoch, flags, table)

    def flush(self) -> None:
        """Writes what mirrors have pending; CSV and SQLite are written as rows are added."""
        self.mirrors.flush()

    def close(self, failed: bool = False) -> None:
        """Closes all files, and tells mirrors whether the run failed."""
        self.mirrors.close(failed)
        self.database.close()

    def _open_database(self) -> None:
        """Opens records.db and makes its tables hold the rows of now."""
        path = self.folder / "records.db"
        with _writing(path):
            if path.is_dir():
                raise UserError(f"{path} is a folder: move it away, and --resume_training makes the file anew")
            # Neither a write-ahead log nor shared memory, which network disks lack; the rollback journal that a killed
            # process leaves is undone by the next one that opens the database.
            self.database = sqlite3.connect(path, timeout=60)
            _check_tables(path, self.database)
            with self.database:
                columns = "(Epochs INTEGER, Time TEXT, Configuration TEXT, Changes TEXT, Environment TEXT)"
                self.database.execute(f"CREATE TABLE IF NOT EXISTS configurations {columns}")
                for kind, rows in self.rows.items():
                    self.database.execute(f"DROP TABLE IF EXISTS {kind}")
                    self._insert(kind, rows)

    def _insert(self, kind: str, rows: Sequence[Row]) -> None:
        """Inserts rows into a kind's table, which gets the columns that it lacks."""
        if rows:
            self.database.execute(f'CREATE TABLE IF NOT EXISTS {kind} ("{step_column(kind)}" INTEGER PRIMARY KEY)')
        known = {column[1] for column in self.database.execute(f"PRAGMA table_info({kind})")}
        for row in rows:
            for name in [name for name in row if name not in known]:
                column_type = "INTEGER" if isinstance(row[name], int) else "REAL"
                self.database.execute(f"ALTER TABLE {kind} ADD COLUMN {_quote(name)} {column_type}")
                known.add(name)
            names, marks = ", ".join(map(_quote, row)), ", ".join("?" * len(row))
            self.database.execute(f"INSERT OR REPLACE INTO {kind} ({names}) VALUES ({marks})", list(row.values()))

    def _write_csv(self, kind: str) -> None:
        """Rewrites a kind's CSV file, or removes it where there are no rows."""
        path = self.folder / LOGS[kind]
        if self.rows[kind]:
            _save_csv(path, self.columns[kind], self.rows[kind])
            return
        with _writing(path):
            path.unlink()


class RowsAlone(Records):
    """A run's rows in memory alone, as another rank than the first has them."""

    def _open(self, mirrored_by: Sequence[str]) -> None:
        self.mirrors = loggers.Mirrors([], self.folder, self.rows)

    def _write(self, kind: str, rows: Sequence[Row], follows: bool, has_same_columns: bool) -> None:
        pass

    def note_configuration(self, epoch: int, flags: Mapping[str, Any], environment: Any) -> None:
        """Does nothing: the first rank writes it."""

    def close(self, failed: bool = False) -> None:
        """Does nothing: no file is open."""


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same columns as a Markdown table."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    columns = _columns(map(dict, rows))
    body = [line(row.get(name, "") for name in columns) for row in rows]
    return "\n".join([line(columns), "|" + "---|" * len(columns), *body])


# Files


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk, or of a database, into `UserError`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "close the program that uses it" if "locked" in str(reason) else disk_advice(error)
        raise UserError(f"{path} can't be written ({reason}): {advice}, then --resume_training") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and --resume_training rebuilds it") from None


def _quote(name: str) -> str:
    """A column's name as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def _save_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    with atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows to a CSV file, in place of an earlier one.

    Raises:
        UserError: it can't be written.
    """
    with _writing(path):
        _save_csv(path, _columns(rows), rows)


def _check_tables(path: Path, database: sqlite3.Connection) -> None:
    """Makes sure that a database, if it has any tables, is one that a run writes.

    Raises:
        UserError: it is another program's, or its tables have other columns.
    """
    needed = {**{kind: {step_column(kind)} for kind in LOGS}, "configurations": set(CONFIGURATION_COLUMNS)}
    found = {name.lower(): kind for name, kind in database.execute("SELECT name, type FROM sqlite_master")}
    wrong = [name for name in needed if name in found and found[name] != "table"]
    for name in found.keys() & needed.keys():
        if not needed[name] <= {column[1] for column in database.execute(f"PRAGMA table_info({name})")}:
            wrong.append(name)
    if wrong or (found and not found.keys() & needed):
        what = f"its {sorted(wrong)[0]} is not a run's table" if wrong else "it holds other tables than a run's"
        raise UserError(f"{path} is not a run's database ({what}): move it away, and --resume_training makes it anew")


def read_configurations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's table `configurations`, oldest first; none where there is no such table.

    Raises:
        UserError: the database is damaged, or not a run's.
    """
    path = folder / "records.db"
    if not path.is_file():
        return []
    database = None
    try:
        database = sqlite3.connect(path, timeout=60)
        _check_tables(path, database)
        if not database.execute("SELECT name FROM sqlite_master WHERE name = 'configurations'").fetchone():
            return []
        rows = database.execute("SELECT Epochs, Configuration FROM configurations ORDER BY rowid").fetchall()
        configurations = [{"Epochs": epoch, "Configuration": json.loads(flags)} for epoch, flags in rows]
    except (sqlite3.Error, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())}): move it away") from None
    finally:
        if database is not None:
            database.close()
    for row in configurations:
        if not isinstance(row["Epochs"], int) or not isinstance(row["Configuration"], dict):
            raise UserError(
                f"{path} is damaged: its table configurations holds something else than flags; move it away"
            )
    return configurations


TABLES = (*LOGS, "configurations")
TYPES = ("INTEGER", "REAL", "TEXT")
READ_TIMEOUT = 2  # seconds to wait for a run that is writing to its database


def collect_rows(path: Path, databases: Mapping[str, Path]) -> int:
    """Collects the rows of several runs in one SQLite file: a run's tables, each with a further column `run`.

    Rows that the file has of these runs are replaced, those of others stay; so do those of a run whose database can't
    be read, which a notice names.

    Args:
        path: the file; an existing one is continued.
        databases: records.db of each run by the run's name.

    Returns:
        The number of runs whose rows were collected.

    Raises:
        UserError: the file can't be written, or is another program's; it stays as it was.
    """
    num_collected = 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as target, target:
            _check_collection(path, target)
            target.execute("BEGIN IMMEDIATE")
            for table in TABLES:
                target.execute(f"CREATE TABLE IF NOT EXISTS {table} (run TEXT)")
                target.execute(f"CREATE INDEX IF NOT EXISTS {table}_by_run ON {table} (run)")
            for run, database in databases.items():
                try:
                    tables = _read_tables(database)
                except UserError as error:
                    notice(f"no rows of {run} are collected: {error}")
                    continue
                num_collected += 1
                for table in TABLES:
                    target.execute(f"DELETE FROM {table} WHERE run = ?", [run])
                    _insert_rows(target, table, run, *tables.get(table, ({}, [])))
    except sqlite3.Error as error:
        why = " ".join(str(error).split())
        raise UserError(f"{path} can't be written ({why}): choose another --database") from None
    return num_collected


def _check_collection(path: Path, database: sqlite3.Connection) -> None:
    """Makes sure that a database, if it has any tables, is one of `collect_rows`."""
    found = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")]
    is_own = all(
        name in TABLES and "run" in [column[1] for column in database.execute(f"PRAGMA table_info({name})")]
        for name in found
    )
    if not is_own:
        raise UserError(f"{path} is another program's database, or a single run's: choose another --database")


def _read_tables(path: Path) -> dict[str, tuple[dict[str, str], list[tuple[Any, ...]]]]:
    """Types of columns by name, and rows, of each table of a run's records.db.

    Raises:
        UserError: it is damaged, another program uses it, or it is not a run's.
    """
    tables = {}
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=READ_TIMEOUT)) as source:
            _check_tables(path, source)
            names = {name for (name,) in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in names & {*TABLES}:
                columns = {column[1]: column[2] for column in source.execute(f"PRAGMA table_info({table})")}
                if "run" in map(str.lower, columns):
                    raise UserError(f"{path} is not a run's database: its {table} has a column `run`")
                listed = ", ".join(map(_quote, columns))
                tables[table] = (columns, source.execute(f"SELECT {listed} FROM {table} ORDER BY rowid").fetchall())
    except (sqlite3.Error, UnicodeError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())})") from None
    return tables


def _insert_rows(
    database: sqlite3.Connection, table: str, run: str, types: Mapping[str, str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Inserts a run's rows into a table, which gets the columns that it lacks."""
    known = {column[1].lower() for column in database.execute(f"PRAGMA table_info({table})")}  # as SQL compares them
    for name, kind in types.items():
        if name.lower() not in known:
            database.execute(f"ALTER TABLE {table} ADD COLUMN {_quote(name)} {kind if kind in TYPES else ''}")
    names = ", ".join(["run", *map(_quote, types)])
    marks = ", ".join("?" * (len(types) + 1))
    database.executemany(f"INSERT INTO {table} ({names}) VALUES ({marks})", ((run, *row) for row in rows))


@by_first_rank
def save_meta_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Writes results over folds, in place of earlier ones: results.csv, results.json, and a table in TensorBoard.

    Args:
        folder: the folder to write them into; its parent exists.
        rows: `Network`, `Split`, `Metric`, `Mean` and, of several folds, `Std` and `CI 95 %`.

    Raises:
        UserError: something can't be written.
    """
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        _save_csv(folder / "results.csv", _columns(rows), rows)
        save_json(folder / "results.json", rows)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        shown = [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        loggers.write_table(folder / "tensorboard", "results over folds", format_table(shown))


@by_first_rank
def show_in_tensorboard(folder: Path, name: str, picture: Path) -> None:
    """Adds a PNG to a folder of event files.

    Raises:
        UserError: it can't be written.
    """
    with _writing(folder):
        loggers.write_picture(folder, name, picture)


# Results by query

QUERY_ARRAYS = {"correct_at_1": "b", "ap_at_r": "f", "label": "i", "weight": "f"}  # and their kinds of values


def save_query_results(folder: Path, results: Mapping[str, np.ndarray], **about: str | int | Sequence[str]) -> None:
    """Writes what the selected network's figures are made of, query by query, as per_query.npz.

    Args:
        folder: the run folder.
        results: the `QUERY_ARRAYS`, `(Q,)` each, as `evaluate.query_results` gives them.
        about: what they are of; it is stored, too.
    """
    with atomic_write(folder / PER_QUERY) as beside, open(beside, "wb") as file:
        arrays: dict[str, Any] = {**results, **{name: np.array(value) for name, value in about.items()}}
        np.savez_compressed(file, **arrays)


def read_query_results(folder: Path) -> dict[str, np.ndarray]:
    """Reads what `save_query_results` wrote.

    Raises:
        UserError: the folder has no per_query.npz, or it is damaged.
    """
    path = folder / PER_QUERY
    if not path.is_file():
        raise UserError(
            f"{folder} has no {PER_QUERY}, it is of an earlier version: move its summary.json away, and "
            "--resume_training writes both"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            results = {name: file[name] for name in file.files}
        lengths = {results[name].shape for name in QUERY_ARRAYS}
        kinds = {name: results[name].dtype.kind for name in QUERY_ARRAYS}
        numbers = [results[name] for name in ("ap_at_r", "weight")]
        is_intact = len(lengths) == 1 and len(lengths.pop()) == 1 and kinds == QUERY_ARRAYS
        is_intact = is_intact and results["test_set"].dtype.kind == "U"
        is_intact = is_intact and all(np.isfinite(one).all() and (one >= 0).all() for one in numbers)
        if is_intact and results["weight"].any():
            return results
    except Exception:  # NumPy raises anything at all on a damaged file
        pass
    raise UserError(f"{path} is damaged: remove it and summary.json, and --resume_training writes both anew")


# Metrics of a row


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row, without epoch and time."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS}


def format_metrics(row: Mapping[str, Any]) -> str:
    """The metrics of a row in one line."""
    return " | ".join(f"{name} {value:.4f}" for name, value in metrics_of(row).items())


def mean_over_sets(metrics: Mapping[str, float], name: str) -> float:
    """A metric, or its mean over test sets or label levels where there are several; NaN where none has that name."""
    if name in metrics:
        return metrics[name]
    of_sets = [(re.sub(r"^Set \d+ ", "", key), value) for key, value in metrics.items()]
    values = [value for key, value in of_sets if key == name] or [
        value for key, value in of_sets if key == f"Level mean {name}"
    ]
    return float(np.mean(values)) if values else math.nan


def best_epoch(rows: Sequence[Row], metric: str, lower_is_better: bool) -> int:
    """The first trained epoch with the best value of a metric (its mean over sets); 0 where there is none yet.

    Raises:
        UserError: the metric is NaN in all epochs.
    """
    sign = -1 if lower_is_better else 1
    values = {row["Epochs"]: sign * mean_over_sets(row, metric) for row in rows if row["Epochs"] > 0}
    defined = {epoch: value for epoch, value in values.items() if not math.isnan(value)}
    if values and not defined:
        raise UserError(
            f"{metric} is NaN, not defined, on these images, and so can't select the best epoch: choose another "
            "--eval_metric_for_best_epoch"
        )
    return max(defined, key=defined.__getitem__, default=0)


# Iterations


class StepReporter(Protocol):
    """What `IterationLog` asks a training method about its last step."""

    def learning_rates(self) -> dict[str, float]:
        """Learning rates by column: `Learning Rate`, and `Learning Rate <group>` for each further group."""
        ...

    def statistics(self) -> dict[str, torch.Tensor]:
        """Statistics by column: scalars on the device."""
        ...


class IterationLog:
    """Losses of an epoch's iterations and, of every few, learning rates and statistics.

    All of it stays on the device until `read`, so that no iteration waits for it.

    Args:
        method: the training method.
        epoch: the epoch, counted from 1.
        log: where the rows go.
        log_every: iterations between two rows, counted from the first of the run; 0: no rows.
    """

    def __init__(self, method: StepReporter, epoch: int, log: Records, log_every: int):
        self.method = method
        self.epoch = epoch
        self.log = log
        self.log_every = log_every
        self.iterations_before = log.iterations()
        self.losses: list[float] = []
        self._pending_losses: list[torch.Tensor] = []
        self._pending_rows: list[tuple[Row, dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, loss: torch.Tensor, **parts: torch.Tensor) -> None:
        """Takes the loss of the method's last step, and what it consists of.

        Args:
            iteration: counted from 1 in every epoch.
            loss: a detached scalar, on the device.
            parts: the same, by name; each has a column `Loss <name>`.
        """
        self._pending_losses.append(loss)
        position = self.iterations_before + iteration  # in the run
        if self.log_every and position % self.log_every == 0:
            row = {"Iteration": position, "Epochs": self.epoch, **self.method.learning_rates()}
            scalars = {"Loss": loss, **{f"Loss {name}": part for name, part in parts.items()}}
            self._pending_rows.append((row, scalars | self.method.statistics()))

    def read(self) -> float:
        """Fetches and records everything since the last call; returns the mean loss of the epoch so far.

        Raises:
            UserError: a loss is not finite.
        """
        self.losses += torch.stack(self._pending_losses).tolist()
        self._pending_losses.clear()
        if self._pending_rows:
            scalars = [scalar for _, statistics in self._pending_rows for scalar in statistics.values()]
            values = iter(torch.stack(scalars).tolist())  # one copy from the device for all of them
            rows = [row | {name: next(values) for name in statistics} for row, statistics in self._pending_rows]
            self.log.add("iterations", *rows)
            self._pending_rows.clear()
        not_finite = np.flatnonzero(~np.isfinite(self.losses))
        if len(not_finite):
            first = not_finite[0]
            raise UserError(
                f"the loss is {self.losses[first]} in epoch {self.epoch}, iteration {first + 1}: lower --lr"
                + ("; the checkpoints of earlier epochs are kept" if self.epoch > 1 else "")
            )
        return self.mean_loss()

    def mean_loss(self) -> float:
        """The mean loss of the iterations that were read."""
        return float(np.mean(self.losses))


class GradientRecord:
    """Statistics of the embedding layer's gradient at every iteration, for --grad_measure.

    Of the gradient `(D, features)` it keeps mean and standard deviation over the D outputs, of the values and of
    their absolute values: four arrays `(iterations, features)`, and the iterations' numbers `(iterations,)`.

    Args:
        path: an .npz file of the arrays; an existing one is continued.
        iterations: the number of iterations that the run had before; what comes after them is dropped.

    Raises:
        UserError: the file is damaged.
    """

    STATISTICS = ("mean", "std", "abs_mean", "abs_std")

    def __init__(self, path: Path, iterations: int = 0):
        self.path = path
        self.arrays: dict[str, Any] = {name: np.empty((0, 0), np.float32) for name in self.STATISTICS}
        self.arrays["iteration"] = np.empty(0, np.int64)
        if iterations and path.exists():
            saved = self._load()
            kept = saved["iteration"] <= iterations
            self.arrays = {name: saved[name][kept] for name in self.arrays}
        elif iterations and path.with_suffix(".pkl").exists():
            notice(
                f"{path.with_suffix('.pkl')}, of an earlier version, is not continued, since reading a pickle can run "
                f"code: {path.name} begins with iteration {iterations + 1}"
            )
        self._iteration = iterations
        self._pending: list[torch.Tensor] = []  # on the device, so that no iteration waits for it

    def _load(self) -> dict[str, np.ndarray]:
        """The saved arrays."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in self.arrays}
        except Exception:  # NumPy raises anything at all on a damaged file
            arrays = {}
        shapes = {arrays[name].shape for name in self.STATISTICS if name in arrays}
        rows = arrays["iteration"].shape if "iteration" in arrays else ()
        is_intact = (
            len(shapes) == 1 and len(rows) == 1 and all(len(shape) == 2 and shape[:1] == rows for shape in shapes)
        )
        if not is_intact or any(arrays[name].dtype.kind != empty.dtype.kind for name, empty in self.arrays.items()):
            raise UserError(f"{self.path} is damaged: move it away, and a new record begins")
        return arrays

    def add(self, weight: torch.Tensor) -> None:
        """Takes the gradient that the layer's weight `(D, features)` has after an iteration's backward pass."""
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        values = torch.stack([gradient, gradient.abs()])  # (2, D, features)
        mean, std = values.mean(dim=1), values.std(dim=1, correction=0)  # (2, features) each
        self._pending.append(torch.stack([mean[0], std[0], mean[1], std[1]]))  # (4, features)

    def save(self) -> None:
        """Writes the statistics of all iterations so far."""
        if not self._pending:
            return
        recorded = torch.stack(self._pending, dim=1).cpu().numpy()  # (4, iterations, features)
        numbers = self._iteration + 1 + np.arange(len(self._pending))  # (iterations,)
        self._iteration += len(self._pending)
        self._pending.clear()
        for name, rows in zip((*self.STATISTICS, "iteration"), (*recorded, numbers)):
            self.arrays[name] = np.concatenate([self.arrays[name], rows]) if self.arrays[name].size else rows
        with atomic_write(self.path) as beside, open(beside, "wb") as file:
            np.savez(file, **self.arrays)


# The console

CONSOLE_WIDTH = 100  # characters
ROWS_BELOW_HEADER = 25
BEFORE_TRAINING = {"untrained": 0, "trunk": -1}  # networks by name, and the epochs as which they are recorded


READ_LOSS_EVERY = 10  # seconds


class Console:
    """What a training run shows: its progress, and a line of metrics per evaluation.

    Args:
        n_epochs: epochs of the whole run.
        metric: the metric that selects the best epoch.
        classes: the classes that it is evaluated on, in words.
        clock: gives seconds.
    """

    def __init__(self, n_epochs: int, metric: str, classes: str, clock: Callable[[], float] = time.monotonic):
        self.n_epochs, self.metric, self.classes, self.clock = n_epochs, metric, classes, clock
        self.lines = 0
        self._columns: list[str] = []
        self._start: tuple[float, float] | None = None  # when the loss was first shown: seconds, and epochs until then

    def watch(self, batches: Iterable[Any], epoch: int) -> Progress:
        """Goes through an epoch's batches and shows how far training is."""
        self.epoch, self.progress = epoch, Progress(batches, f"epoch {epoch}/{self.n_epochs}", self.clock)
        self._last_loss = -math.inf  # seconds
        return self.progress

    def wants_loss(self) -> bool:
        """Whether it is time to read the loss: after the first iteration of an epoch, then every ten seconds."""
        return self.clock() - self._last_loss >= READ_LOSS_EVERY

    def show_loss(self, loss: float, iteration: int) -> None:
        """Shows the mean loss of the epoch so far, and the remaining time of the run.

        The time is estimated from the part of the run that lies behind, evaluations included.
        """
        now = self._last_loss = self.clock()
        done = self.epoch - 1 + iteration / self.progress.bar.total  # epochs
        self._start = self._start or (now, done)
        seconds, epochs = now - self._start[0], done - self._start[1]
        left = f", run: {tqdm.format_interval(round(seconds / epochs * (self.n_epochs - done)))} left" if epochs else ""
        self.progress.show(f"loss {loss:.4f}{left}")

    def print_epoch(self, epoch: int, log: Records, best_epoch: int) -> None:
        """Prints a line about an epoch that was evaluated, and marks it if it is the best so far."""
        row = next(row for row in log.rows["val"] if row["Epochs"] == epoch)
        losses = {row["Epochs"]: row["Train Loss"] for row in log.rows["train"]}
        since = max((other["Epochs"] for other in log.rows["val"] if other["Epochs"] < epoch), default=-2)
        timed = [other for kind in TIMED for other in log.rows[kind]]
        seconds = sum(other["Time"] for other in timed if since < other["Epochs"] <= epoch)
        columns = fit_columns(row, self.metric, CONSOLE_WIDTH - 28)
        if columns != self._columns or self.lines % ROWS_BELOW_HEADER == 0:
            self._columns = columns
            self._print_header(row)
        self.lines += 1
        counted = f"{epoch}/{self.n_epochs}"
        cells = [losses.get(epoch, math.nan), *(mean_over_sets(row, name) for name in columns)]
        texts = [format_cell(cell, name) for cell, name in zip(cells, ["loss", *columns])]
        texts[0] = texts[0] if epoch in losses else " " * len(texts[0])
        mark = " *" if epoch == best_epoch > 0 else ""
        line = f"{counted:>9}{''.join(texts)}{tqdm.format_interval(round(seconds)):>9}{mark}"
        print(colored(line, "green", sys.stdout) if mark else line, flush=True)

    def _print_header(self, row: Row) -> None:
        """Prints what the columns are."""
        hidden = len(metrics_of(row).keys() - set(self._columns))
        more = f", {hidden} more in {LOGS['val']}" if hidden else ""
        names = "".join(f"{short_name(name):>{column_width(name)}}" for name in ["loss", *self._columns])
        print(f"\nmetrics of the {self.classes}{more}; * the best {short_name(self.metric)} so far")
        print(f"{'epoch':>9}{names}{'time':>9}")


def short_name(metric: str) -> str:
    """A metric's name as the literature shortens it: `Set 0 Recall @ 1` -> `Set 0 R@1`."""
    return re.sub(r"\b(Recall|Precision) @ (?=\d)", lambda match: f"{match[1][0]}@", metric)


def column_width(metric: str) -> int:
    """Characters of a column, the gap before it included."""
    return 2 + max(6, len(short_name(metric)))


def format_cell(value: float, metric: str) -> str:
    """A number as wide as the metric's column, with four decimals where they fit into six characters."""
    texts = (f"{value:.{decimals}f}" for decimals in (4, 3, 2, 1, 0))
    text = next((text for text in texts if len(text) <= 6), f"{value:.0e}")
    return f"{text:>{column_width(metric)}}"


def fit_columns(row: Mapping[str, Any], metric: str, width: int) -> list[str]:
    """The metrics of a row that fit into `width` characters, in their order; the one that selects is among them.

    Where there are several sets, its mean over them comes first.
    """
    names = list(metrics_of(row))
    names = names if metric in names else [metric, *names]
    chosen = {metric}
    for name in names:
        if sum(map(column_width, chosen | {name})) <= width:
            chosen.add(name)
    return [name for name in names if name in chosen]


def join_names(names: str | Sequence[str] | None) -> str:
    """One name or several in words, such as `triplet + ArcFaceLoss`."""
    return names if isinstance(names, str) else " + ".join(names or ())


def print_start(
    dataset: str,
    splits: Splits,
    network: str,
    loss: str,
    device: torch.device,
    folder: Path,
    epoch: int,
    mirrors: Sequence[str] = (),
) -> None:
    """Prints what a run is made of.

    Args:
        dataset: its name.
        splits: its images.
        network: the network in words.
        loss: what is trained, in words.
        device: where.
        folder: the run folder.
        epoch: the epoch after which the run goes on; 0 in a new run.
        mirrors: where its records can be looked at, beside the run folder.
    """
    one = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    facts = {
        "data": dataset,
        "training": _describe_images(splits.train),
        "validation": " + ".join(map(_describe_set, splits.val)),
        "test": " + ".join(map(_describe_set, splits.test)),
        "network": network,
        "loss": loss,
        "device": one if ranks().count == 1 else f"{ranks().count} processes, each with {one}",
        "run folder": f"{folder}, after epoch {epoch}" if epoch else str(folder),
        "mirrored to": ", ".join(mirrors),
    }
    print_facts(facts)


def print_facts(facts: Mapping[str, str]) -> None:
    """Prints a line for each fact that isn't empty, after its name."""
    print("\n".join(f"{name:<12}{fact}" for name, fact in facts.items() if fact), flush=True)


def _describe_images(images: ImageSet) -> str:
    return f"{len(images):,} images of {images.num_classes():,} classes"


def _describe_set(one: RetrievalSet[ImageSet]) -> str:
    if one.gallery is None:
        return _describe_images(one.query)
    return f"{len(one.query):,} queries and a gallery of {_describe_images(one.gallery)}"


@contextmanager
def resume_hint(folder: Path) -> Iterator[None]:
    """On Ctrl-C, prints the command that continues the run in this folder."""
    try:
        yield
    except KeyboardInterrupt:
        is_fold = re.fullmatch(r"fold_\d+", folder.name) and (folder.parent / "config.yaml").exists()
        run = folder.parent if is_fold else folder
        where = run.parent.parent
        flags = ["--resume_training", "--savename", run.name]
        flags += ["--save_path", str(where)] if str(where) != "Training_Results" else []
        flags += ["--dataset", run.parent.name] if len([*where.glob(f"*/{glob.escape(run.name)}")]) > 1 else []
        print(f"\nto continue: python main.py {shlex.join(flags)}", file=sys.stderr, flush=True)
        raise


# The summary


def describe_selection(metric: str, has_val_classes: bool, watches_test: bool = False) -> str:
    """What selects the best epoch, and what that means for the results."""
    if has_val_classes:
        watched = "; the test classes were watched while training, but did not select" if watches_test else ""
        return f"selected by {metric} on the validation classes{watched}"
    return f"selected by {metric} on the test classes, as in the literature: optimistic, since these choose the epoch"


def build_summary(
    log_rows: Mapping[str, Sequence[Row]],
    metric: str,
    lower_is_better: bool,
    has_val_classes: bool,
    watches_test: bool,
    is_pretrained: bool = False,
) -> dict[str, Any]:
    """How a run ended: summary.json.

    Args:
        log_rows: all rows, by kind.
        metric: the metric that selects the epoch.
        lower_is_better: whether its best value is the lowest.
        has_val_classes: whether validation classes select it; otherwise `log_rows["val"]` is of the test classes.
        watches_test: whether the test classes are evaluated while training.
        is_pretrained: whether the network had pretrained weights before training.

    Returns:
        `selection`, `metric`, `seconds`, and networks by name (`selected`, `last`, where known `best on test`,
        `untrained` and `trunk`), each with its `epoch` and one network's metrics on `val`, `test` and `train`, as far
        as evaluated. Beside `untrained`, which is the network before training, `initial weights` says which it had:
        random or pretrained. `trunk` is its backbone alone.
    """
    metrics = {kind: {row["Epochs"]: metrics_of(row) for row in log_rows[kind]} for kind in ("val", "test")}
    if not has_val_classes:
        metrics = {"test": metrics["val"]}
    metrics["train"] = {row["Epochs"]: metrics_of(row) for row in log_rows.get("train_eval", ())}
    val_rows = log_rows["val"]
    epochs = {"selected": best_epoch(val_rows, metric, lower_is_better), "last": val_rows[-1]["Epochs"]}
    if watches_test:
        test_rows = log_rows["test"] if has_val_classes else val_rows
        with contextlib.suppress(UserError):  # the metric is not defined on the test classes
            epochs["best on test"] = best_epoch(test_rows, metric, lower_is_better)
    evaluated = {row["Epochs"] for row in val_rows}
    epochs |= {name: epoch for name, epoch in BEFORE_TRAINING.items() if epoch in evaluated}
    networks = {
        name: {"epoch": epoch, **{kind: by_epoch[epoch] for kind, by_epoch in metrics.items() if epoch in by_epoch}}
        for name, epoch in epochs.items()
    }
    seconds = sum(row["Time"] for kind in TIMED for row in log_rows.get(kind, ()))
    selection = describe_selection(metric, has_val_classes, watches_test)
    initial = {"initial weights": "pretrained" if is_pretrained else "random"} if "untrained" in networks else {}
    return {"selection": selection, "metric": metric, **networks, **initial, "seconds": seconds}


def _before_training(summary: Mapping[str, Any]) -> str:
    return "before training" if summary.get("initial weights") == "pretrained" else "untrained"


def summary_rows(summary: Mapping[str, Any]) -> dict[tuple[str, int, str], dict[str, float]]:
    """A summary as a table: metrics by network, its epoch and kind of classes; networks of one epoch are in one row."""
    other_names = {"untrained": _before_training(summary), "trunk": f"backbone {_before_training(summary)}"}
    networks = {name: network for name, network in summary.items() if isinstance(network, Mapping)}
    names: dict[int, list[str]] = {}
    for name, network in networks.items():
        names.setdefault(network["epoch"], []).append(other_names.get(name, name))
    by_epoch = {network["epoch"]: network for network in networks.values()}
    return {
        (" = ".join(names[epoch]), epoch, kind): network[kind]
        for epoch, network in by_epoch.items()
        for kind in ("val", "test", "train")
        if kind in network
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints a summary as a table."""
    rows = summary_rows(summary)
    first, width = max(len(label) for label, _, _ in rows), max(4, *(len(kind) for _, _, kind in rows))
    columns = fit_columns(next(iter(rows.values())), summary["metric"], CONSOLE_WIDTH - first - 9 - width)
    header = "".join(f"{short_name(name):>{column_width(name)}}" for name in columns)
    hidden = len({name for metrics in rows.values() for name in metrics} - set(columns))
    selection = summary["selection"] + (f" ({hidden} more metrics in summary.json)" if hidden else "")
    print(f"\n{textwrap.fill(selection, CONSOLE_WIDTH)}")
    print(f"{'':{first}}  epoch  {'':{width}}{header}")
    for (label, epoch, kind), metrics in rows.items():
        cells = "".join(format_cell(mean_over_sets(metrics, name), name) for name in columns)
        print(f"{label:>{first}}  {epoch:>5}  {kind:<{width}}{cells}")
    if "untrained" in summary and summary["selected"]["epoch"] > 0:
        metric, kind = summary["metric"], "test" if "test" in summary["untrained"] else "val"
        before, after = (mean_over_sets(summary[name][kind], metric) for name in ("untrained", "selected"))
        trained = f"{after:.4f} trained ({after - before:+.4f})"
        print(f"{metric} on unseen classes: {before:.4f} {_before_training(summary)}, {trained}")
