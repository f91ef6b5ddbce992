"""What a run records: rows in CSV, SQLite and TensorBoard, the log of iterations, and the summary."""

from __future__ import annotations

import csv
import json
import math
import pickle
import re
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from auxiliaries import FlagParser, UserError, atomic_write, disk_advice, number, save_json, to_builtin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, Any]

LOGS = {
    "train": "log_train_Base.csv",
    "val": "log_val_Base.csv",
    "test": "log_test_Base.csv",
    "distances": "distance_measures_Train.csv",
    "iterations": "log_iterations.csv",
}
NOT_METRICS = ("Epochs", "Iteration", "Time")


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of what is recorded."""
    # fmt: off
    add = parser.add_argument_group("records", compared=False).add_argument
    add("--log_every", type=number(int, 0), default=1,
        help="record loss, learning rates and statistics every so many iterations; 0: never")
    add("--tensorboard", action="switch", default=True, help="write TensorBoard event files")
    add("--dist_measure", action="switch",
        help="record the ratio of intra- to inter-class distances at every evaluation; embeds all training images")
    add("--grad_measure", action="switch",
        help="record statistics of the embedding layer's gradient at every iteration: 32 kB each for resnet50")
    # fmt: on


# Rows


def _step_column(kind: str) -> str:
    """The column that numbers the rows of a kind."""
    return "Iteration" if kind == "iterations" else "Epochs"


def _columns(rows: Iterable[Row]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


class Records:
    """A run's rows by kind (a key of `LOGS`): in memory, as CSV, in records.db (SQLite), and in TensorBoard.

    Args:
        folder: the run folder.
        history: the rows so far, as a checkpoint holds them. The CSV files and the database are rewritten to hold
            these and no others, and TensorBoard drops what comes after them.
        tensorboard: whether to write event files.

    Attributes:
        rows: the rows of each kind, in order of their epoch or iteration.

    Raises:
        UserError: something can't be written.
    """

    def __init__(self, folder: Path, history: Mapping[str, Sequence[Row]] | None = None, tensorboard: bool = True):
        self.folder = folder
        self.rows: dict[str, list[Row]] = {kind: list((history or {}).get(kind, [])) for kind in LOGS}
        self.columns = {kind: _columns(rows) for kind, rows in self.rows.items()}
        self._open_database()
        for kind, name in LOGS.items():
            if self.rows[kind] or (folder / name).exists():
                self._write_csv(kind)
        self.writers: dict[str, SummaryWriter] = {}
        if tensorboard:
            self._open_tensorboard()

    def add(self, kind: str, *rows: Row) -> None:
        """Appends rows; the row of an epoch (or iteration) that is already there is replaced."""
        step, earlier, columns = _step_column(kind), self.rows[kind], self.columns[kind]
        follows = not earlier or earlier[-1][step] < rows[0][step]
        if not follows:
            replaced = {row[step] for row in rows}
            earlier[:] = [row for row in earlier if row[step] not in replaced]
        earlier += rows
        if not follows:
            earlier.sort(key=lambda row: row[step])
        self.columns[kind] = _columns([dict.fromkeys(columns), *rows])
        with _writing(self.folder / "records.db"), self.database:
            self._insert(kind, rows)
        if follows and self.columns[kind] == columns:
            path = self.folder / LOGS[kind]
            with _writing(path), open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerows(rows)
        else:
            self._write_csv(kind)
        self._add_scalars(kind, rows)

    def iterations(self) -> int:
        """The number of iterations of the recorded epochs."""
        return sum(row["Iterations"] for row in self.rows["train"])

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        """Shows a PNG in TensorBoard."""
        if "epochs" in self.writers:
            with _writing(self.folder / "tensorboard"):
                self.writers["epochs"].add_image(name, _read_pixels(path), epoch, dataformats="HWC")

    def note_configuration(self, epoch: int, flags: Mapping[str, Any], environment: Any) -> None:
        """Adds a row to the table `configurations`.

        Args:
            epoch: the epoch after which these flags hold.
            flags: all flags; those that differ from the row before are listed as changes.
            environment: versions and hardware.
        """
        flags = to_builtin(flags)
        *_, before = [flags, *(row["Configuration"] for row in read_configurations(self.folder))]
        changes = {name: value for name, value in flags.items() if value != before.get(name)}
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        values = (epoch, now, *map(json.dumps, (flags, changes, to_builtin(environment))))
        with _writing(self.folder / "records.db"), self.database:
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS configurations"
                "(Epochs INTEGER, Time TEXT, Configuration TEXT, Changes TEXT, Environment TEXT)"
            )
            self.database.execute("INSERT INTO configurations VALUES (?, ?, ?, ?, ?)", values)

    def flush(self) -> None:
        """Writes TensorBoard's pending events; CSV and SQLite are written as rows are added."""
        with _writing(self.folder / "tensorboard"):
            for writer in self.writers.values():
                writer.flush()

    def close(self) -> None:
        """Closes all files."""
        with _writing(self.folder / "tensorboard"):
            for writer in self.writers.values():
                writer.close()
        self.database.close()

    def _open_database(self) -> None:
        """Opens records.db and makes its tables hold the rows of now."""
        with _writing(self.folder / "records.db"):
            # Neither a write-ahead log nor shared memory, which network disks lack; the rollback journal that a killed
            # process leaves is undone by the next one that opens the database.
            self.database = sqlite3.connect(self.folder / "records.db", timeout=60)
            with self.database:
                for kind, rows in self.rows.items():
                    self.database.execute(f"DROP TABLE IF EXISTS {kind}")
                    self._insert(kind, rows)

    def _insert(self, kind: str, rows: Sequence[Row]) -> None:
        """Inserts rows into a kind's table, which gets the columns that it lacks."""
        if rows:
            self.database.execute(f'CREATE TABLE IF NOT EXISTS {kind} ("{_step_column(kind)}" INTEGER PRIMARY KEY)')
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

    def _open_tensorboard(self) -> None:
        """Starts event files that drop what earlier ones have after the last row."""
        from torch.utils.tensorboard import SummaryWriter

        was_off = not (self.folder / "tensorboard").exists()
        for unit, kind in (("epochs", "train"), ("iterations", "iterations")):
            last_step = max((row[_step_column(kind)] for row in self.rows[kind]), default=-1)
            with _writing(self.folder / "tensorboard"):
                self.writers[unit] = SummaryWriter(str(self.folder / "tensorboard" / unit), purge_step=last_step + 1)
        for kind, rows in self.rows.items() if was_off else ():
            self._add_scalars(kind, rows)

    def _add_scalars(self, kind: str, rows: Sequence[Row]) -> None:
        """Writes rows as TensorBoard scalars."""
        writer = self.writers.get("iterations" if kind == "iterations" else "epochs")
        if writer is None:
            return
        with _writing(self.folder / "tensorboard"):
            for row in rows:
                for name in [name for name in row if name not in ("Epochs", "Iteration")]:
                    writer.add_scalar(f"{kind}/{name}", row[name], row[_step_column(kind)])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk, or of a database, into `UserError`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be written ({reason}): {disk_advice(error)}, then --resume_training") from None
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


def _read_pixels(path: Path) -> np.ndarray:
    """A picture as `(H, W, 3)` uint8."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_configurations(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's table `configurations`, oldest first; none where there is no such table."""
    path = folder / "records.db"
    if not path.is_file():
        return []
    database = sqlite3.connect(path, timeout=60)
    try:
        rows = database.execute("SELECT Epochs, Configuration FROM configurations ORDER BY rowid").fetchall()
    except sqlite3.DatabaseError:
        return []
    finally:
        database.close()
    return [{"Epochs": epoch, "Configuration": json.loads(flags)} for epoch, flags in rows]


def save_meta_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Writes results over folds, in place of earlier ones: results.csv, results.json and TensorBoard.

    Args:
        folder: the folder to write them into; its parent exists.
        rows: `Network`, `Split`, `Metric`, `Mean` and, of several folds, `Std` and `CI 95 %`.

    Raises:
        UserError: something can't be written.
    """
    from torch.utils.tensorboard import SummaryWriter

    with _writing(folder):
        folder.mkdir(exist_ok=True)
        _save_csv(folder / "results.csv", _columns(rows), rows)
        save_json(folder / "results.json", rows)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with SummaryWriter(str(folder / "tensorboard")) as tensorboard:
            for row in rows:
                for name in ("Mean", "Std", "CI 95 %"):
                    if name in row:
                        tensorboard.add_scalar(f"{row['Network']}/{row['Split']} {row['Metric']}/{name}", row[name])


def show_in_tensorboard(folder: Path, name: str, picture: Path) -> None:
    """Adds a PNG to a folder of event files."""
    from torch.utils.tensorboard import SummaryWriter

    with _writing(folder), SummaryWriter(str(folder)) as tensorboard:
        tensorboard.add_image(name, _read_pixels(picture), dataformats="HWC")


# Metrics of a row


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row, without epoch and time."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS}


def format_metrics(row: Mapping[str, Any]) -> str:
    """The metrics of a row in one line."""
    return " | ".join(f"{name} {value:.4f}" for name, value in metrics_of(row).items())


def mean_over_sets(metrics: Mapping[str, float], name: str) -> float:
    """A metric, or its mean over the test sets where there are several; NaN where no metric has that name."""
    if name in metrics:
        return metrics[name]
    values = [value for key, value in metrics.items() if re.sub(r"^Set \d+ ", "", key) == name]
    return float(np.mean(values)) if values else math.nan


def best_epoch(rows: Sequence[Row], metric: str, lower_is_better: bool) -> int:
    """The first trained epoch with the best value of a metric (its mean over sets); 0 where there is none yet."""
    sign = -1 if lower_is_better else 1
    scores = {row["Epochs"]: sign * mean_over_sets(row, metric) for row in rows if row["Epochs"] > 0}
    return max(scores, key=lambda epoch: -math.inf if math.isnan(scores[epoch]) else scores[epoch], default=0)


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

    def add(self, iteration: int, loss: torch.Tensor) -> None:
        """Takes the loss of the method's last step.

        Args:
            iteration: counted from 1 in every epoch.
            loss: a detached scalar, on the device.
        """
        self._pending_losses.append(loss)
        position = self.iterations_before + iteration  # in the run
        if self.log_every and position % self.log_every == 0:
            row = {"Iteration": position, "Epochs": self.epoch, **self.method.learning_rates()}
            self._pending_rows.append((row, {"Loss": loss, **self.method.statistics()}))

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
        path: a pickled dict of the arrays; an existing one is continued.
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
            try:
                saved = pickle.loads(path.read_bytes())
                kept = saved["iteration"] <= iterations
                self.arrays = {name: saved[name][kept] for name in self.arrays}
            except Exception:  # pickle raises anything at all on a damaged file
                raise UserError(f"{path} is damaged: move it away, and a new record begins") from None
        self._iteration = iterations
        self._pending: list[torch.Tensor] = []  # on the device, so that no iteration waits for it

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
        with atomic_write(self.path) as beside:
            beside.write_bytes(pickle.dumps(self.arrays))


# The summary


def describe_selection(metric: str, has_val_classes: bool) -> str:
    """What selects the best epoch, and what that means for the results."""
    if has_val_classes:
        return f"selected by {metric} on the validation classes"
    return f"selected by {metric} on the test classes, as in the literature: optimistic, since these choose the epoch"


def build_summary(
    log_rows: Mapping[str, Sequence[Row]],
    metric: str,
    lower_is_better: bool,
    has_val_classes: bool,
    is_predefined: bool,
) -> dict[str, Any]:
    """How a run ended: summary.json.

    Args:
        log_rows: all rows, by kind.
        metric: the metric that selects the epoch.
        lower_is_better: whether its best value is the lowest.
        has_val_classes: whether validation classes select it; otherwise `log_rows["val"]` is of the test classes.
        is_predefined: whether the splits are predefined, so that the test classes are evaluated while training.

    Returns:
        `selection`, `metric`, `seconds`, and networks by name (`selected`, `last`, where known `best on test` and
        `untrained`), each with its `epoch` and one network's metrics on `val` and `test`, as far as evaluated.
    """
    metrics = {kind: {row["Epochs"]: metrics_of(row) for row in log_rows[kind]} for kind in ("val", "test")}
    if not has_val_classes:
        metrics = {"test": metrics["val"]}
    val_rows = log_rows["val"]
    epochs = {"selected": best_epoch(val_rows, metric, lower_is_better), "last": val_rows[-1]["Epochs"]}
    if is_predefined:
        test_rows = log_rows["test"] if has_val_classes else val_rows
        epochs["best on test"] = best_epoch(test_rows, metric, lower_is_better)
    if val_rows[0]["Epochs"] == 0:
        epochs["untrained"] = 0
    networks = {
        name: {"epoch": epoch, **{kind: by_epoch[epoch] for kind, by_epoch in metrics.items() if epoch in by_epoch}}
        for name, epoch in epochs.items()
    }
    seconds = sum(row["Time"] for kind in ("train", "val", "test") for row in log_rows[kind])
    selection = describe_selection(metric, has_val_classes)
    return {"selection": selection, "metric": metric, **networks, "seconds": seconds}


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints a summary, one line per network and kind of classes."""
    print(f"\n{summary['selection']}")
    networks = {name: network for name, network in summary.items() if isinstance(network, Mapping)}
    for name, network in networks.items():
        for kind in [kind for kind in ("val", "test") if kind in network]:
            print(f"{name:>12}, epoch {network['epoch']:3d}, {kind} | {format_metrics(network[kind])}")
    if "untrained" in networks:
        metric, kind = summary["metric"], "test" if "test" in networks["untrained"] else "val"
        before, after = (mean_over_sets(networks[name][kind], metric) for name in ("untrained", "selected"))
        print(f"{metric} on unseen classes: {before:.4f} untrained, {after:.4f} trained ({after - before:+.4f})")
