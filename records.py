"""What a run records: rows in CSV, SQLite and TensorBoard, plots, and sample retrievals."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import shutil
import sqlite3
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import get_data_path
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.tensorboard import SummaryWriter

from auxiliaries import UserError, cure, load_json, plain, replacing, save_json

Row = dict[str, Any]

LOGS = {
    "train": "log_train_Base.csv",
    "val": "log_val_Base.csv",
    "test": "log_test_Base.csv",
    "distances": "distance_measures_Train.csv",
    "iterations": "log_iterations.csv",
}
NOT_METRICS = ("Epochs", "Iteration", "Time")


def _step(kind: str) -> str:
    """The column that numbers the rows of a kind."""
    return "Iteration" if kind == "iterations" else "Epochs"


def _columns(rows: Iterable[Row]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


class Records:
    """A run's rows by kind (a key of `LOGS`): in memory, as CSV, in records.db (SQLite), and in TensorBoard.

    Args:
        folder: the run folder.
        history: the rows so far, as `self.rows` had them when they were saved. The CSV files and the database are made
            to hold these and no others, and TensorBoard to forget what comes after them.
        tensorboard: whether to write event files.

    Raises:
        UserError: something can't be written.
    """

    def __init__(self, folder: Path, history: Mapping[str, Sequence[Row]] | None = None, tensorboard: bool = True):
        self.folder = folder
        self.rows: dict[str, list[Row]] = {kind: list((history or {}).get(kind, [])) for kind in LOGS}
        self.columns = {kind: _columns(rows) for kind, rows in self.rows.items()}
        with _writing(self.folder / "records.db"):
            # Neither a write-ahead log nor shared memory, so that a network disk will do; the rollback journal that
            # a killed process leaves is undone by the next one that opens the database.
            self.database = sqlite3.connect(folder / "records.db", timeout=60)
            with self.database:
                for kind, rows in self.rows.items():
                    self.database.execute(f"DROP TABLE IF EXISTS {kind}")
                    self._insert(kind, rows)
        for kind, name in LOGS.items():
            if self.rows[kind] or (folder / name).exists():
                self._write_csv(kind)
        self.writers: dict[str, SummaryWriter] = {}
        if tensorboard:
            is_late = bool(history) and not (folder / "tensorboard").exists()
            for unit, kind in (("epochs", "train"), ("iterations", "iterations")):
                done = max((row[_step(kind)] for row in self.rows[kind]), default=-1)
                with _writing(folder / "tensorboard"):
                    self.writers[unit] = SummaryWriter(str(folder / "tensorboard" / unit), purge_step=done + 1)
            for kind, rows in self.rows.items() if is_late else ():
                self._show(kind, rows)

    def add(self, kind: str, *rows: Row) -> None:
        """Appends rows; a row of an epoch that is there already takes its place."""
        step, before, columns = _step(kind), self.rows[kind], self.columns[kind]
        follows = not before or before[-1][step] < rows[0][step]
        if not follows:
            replaced = {row[step] for row in rows}
            before[:] = [row for row in before if row[step] not in replaced]
        before += rows
        if not follows:
            before.sort(key=lambda row: row[step])
        self.columns[kind] = _columns([dict.fromkeys(columns), *rows])
        with _writing(self.folder / "records.db"), self.database:
            self._insert(kind, rows)
        if follows and self.columns[kind] == columns:
            with (
                _writing(self.folder / LOGS[kind]),
                open(self.folder / LOGS[kind], "a", newline="", encoding="utf-8") as file,
            ):
                csv.DictWriter(file, columns).writerows(rows)
        else:
            self._write_csv(kind)
        self._show(kind, rows)

    def _show(self, kind: str, rows: Sequence[Row]) -> None:
        """Writes rows for TensorBoard."""
        writer = self.writers.get("iterations" if kind == "iterations" else "epochs")
        if writer is None:
            return
        with _writing(self.folder / "tensorboard"):
            for row in rows:
                for name in [name for name in row if name not in ("Epochs", "Iteration")]:
                    writer.add_scalar(f"{kind}/{name}", row[name], row[_step(kind)])

    def iterations(self) -> int:
        """How many iterations the recorded epochs had."""
        return sum(row["Iterations"] for row in self.rows["train"])

    def add_picture(self, name: str, path: Path, epoch: int) -> None:
        """Shows a PNG in TensorBoard."""
        if "epochs" in self.writers:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            with _writing(self.folder / "tensorboard"):
                self.writers["epochs"].add_image(name, pixels, epoch, dataformats="HWC")

    def note_configuration(self, epoch: int, flags: Mapping[str, Any], about: Any) -> None:
        """Adds to the table `configurations` which flags hold after an epoch, which of them have changed since the last
        start, and the machine's particulars."""
        flags = plain(flags)
        *_, before = [flags, *(row["Configuration"] for row in read_configurations(self.folder))]
        changes = {name: value for name, value in flags.items() if value != before.get(name)}
        values = (epoch, f"{datetime.now():%Y-%m-%d %H:%M:%S}", *map(json.dumps, (flags, changes, plain(about))))
        with _writing(self.folder / "records.db"), self.database:
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS configurations"
                "(Epochs INTEGER, Time TEXT, Configuration TEXT, Changes TEXT, Environment TEXT)"
            )
            self.database.execute("INSERT INTO configurations VALUES (?, ?, ?, ?, ?)", values)

    def flush(self) -> None:
        """Hands everything to the operating system; rows are there already, all but TensorBoard's."""
        with _writing(self.folder / "tensorboard"):
            for writer in self.writers.values():
                writer.flush()

    def close(self) -> None:
        """Closes all files."""
        with _writing(self.folder / "tensorboard"):
            for writer in self.writers.values():
                writer.close()
        self.database.close()

    def _insert(self, kind: str, rows: Sequence[Row]) -> None:
        if rows:
            self.database.execute(f'CREATE TABLE IF NOT EXISTS {kind} ("{_step(kind)}" INTEGER PRIMARY KEY)')
        known = {column[1] for column in self.database.execute(f"PRAGMA table_info({kind})")}
        for row in rows:
            for name in [name for name in row if name not in known]:
                kept_as = "INTEGER" if isinstance(row[name], int) else "REAL"
                self.database.execute(f"ALTER TABLE {kind} ADD COLUMN {_quoted(name)} {kept_as}")
                known.add(name)
            names, marks = ", ".join(map(_quoted, row)), ", ".join("?" * len(row))
            self.database.execute(f"INSERT OR REPLACE INTO {kind} ({names}) VALUES ({marks})", list(row.values()))

    def _write_csv(self, kind: str) -> None:
        path = self.folder / LOGS[kind]
        if not self.rows[kind]:
            with _writing(path):
                path.unlink()
            return
        with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns[kind])
            writer.writeheader()
            writer.writerows(self.rows[kind])


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk, or of a database, into `UserError`."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be written ({reason}): {cure(error)}, then --resume_training") from None
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and --resume_training writes it anew") from None


def _quoted(name: str) -> str:
    """A column's name, as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


def training_runs(folder: Path) -> dict[int | None, Path]:
    """A run's folds, by number, and their folders; or None and the folder itself, where it is one training run."""
    folds = {re.sub(r"^fold_([0-9]+)$", r"\1", path.name): path for path in folder.glob("fold_*") if path.is_dir()}
    numbered = sorted((int(number), path) for number, path in folds.items() if not number.startswith("fold_"))
    return {**dict(numbered)} or {None: folder}


def read_summary(folder: Path) -> dict[str, Any]:
    """A finished training run's summary.json.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "summary.json"
    summary = load_json(path)
    models = [summary.get(name) for name in ("selected", "last")] if isinstance(summary, dict) else []
    if not models or not all(isinstance(model, dict) and ("test" in model or "val" in model) for model in models):
        raise UserError(f"{path} is damaged: --resume_training writes it anew")
    return summary


def save_meta(folder: Path, rows: Sequence[Row]) -> None:
    """Writes results over folds, in place of earlier ones: results.csv, results.json and TensorBoard."""
    with _writing(folder):
        folder.mkdir(exist_ok=True)
        with replacing(folder / "results.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns(rows))
            writer.writeheader()
            writer.writerows(rows)
        save_json(folder / "results.json", rows)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with SummaryWriter(str(folder / "tensorboard")) as tensorboard:
            for row in rows:
                for name in ("Mean", "Std", "CI 95 %"):
                    if name in row:
                        tensorboard.add_scalar(f"{row['Network']}/{row['Split']} {row['Metric']}/{name}", row[name])


def show_in_tensorboard(folder: Path, name: str, picture: Path) -> None:
    """Adds a PNG to a folder of event files."""
    with _writing(folder), SummaryWriter(str(folder)) as tensorboard:
        tensorboard.add_image(name, np.asarray(Image.open(picture).convert("RGB")), dataformats="HWC")


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


class GradientRecord:
    """Statistics of the embedding layer's gradient at every iteration, for --grad_measure.

    Of the gradient `(D, features)` it keeps mean and standard deviation over the D outputs, of the values and of
    their absolute values: four arrays `(iterations, features)`, and the iterations' numbers `(iterations,)`.

    Args:
        path: a pickled dict of the arrays; where it exists, the record goes on.
        iterations: how many iterations the run had before.

    Raises:
        UserError: what stands at the path is damaged.
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
                raise UserError(f"{path} is damaged: move it away, and its record begins anew") from None
        self._iteration = iterations
        self._pending: list[torch.Tensor] = []  # on the device, so that no iteration waits for it

    def add(self, weight: torch.Tensor) -> None:
        """Takes the gradient that the layer's weight `(D, features)` has after an iteration's backward pass."""
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        values = torch.stack([gradient, gradient.abs()])  # (2, D, features)
        mean, std = values.mean(dim=1), values.std(dim=1, correction=0)
        self._pending.append(torch.stack([mean[0], std[0], mean[1], std[1]]))

    def save(self) -> None:
        """Writes all iterations so far."""
        if not self._pending:
            return
        recorded = torch.stack(self._pending, dim=1).cpu().numpy()  # (4, iterations, features)
        numbers = self._iteration + 1 + np.arange(len(self._pending))
        self._iteration += len(self._pending)
        self._pending.clear()
        for name, rows in zip((*self.STATISTICS, "iteration"), (*recorded, numbers)):
            self.arrays[name] = np.concatenate([self.arrays[name], rows]) if self.arrays[name].size else rows
        with replacing(self.path) as beside:
            beside.write_bytes(pickle.dumps(self.arrays))


def _family(name: str) -> str:
    """The metric without its set and its k: `Set 0 Recall @ 4` -> `Recall`."""
    return re.sub(r"^Set \d+ | @ \d+$", "", name)


def _wrapped(parts: Iterable[str], width: int) -> str:
    """The parts joined by wide gaps, broken into lines only between parts."""
    joined = "    ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return textwrap.fill(joined, width, break_long_words=False, break_on_hyphens=False)


def save_info_plot(
    path: Path,
    train_rows: Sequence[Row],
    val_rows: Sequence[Row],
    selected_epoch: int,
    title: str,
    lower_is_better: Collection[str] = (),
) -> None:
    """Draws training loss and metrics over epochs, a panel for each kind of metric.

    Args:
        path: where to write the SVG.
        train_rows: rows with `Epochs` and `Train Loss`.
        val_rows: rows with `Epochs` and any number of metrics; `Time` is not drawn.
        selected_epoch: the epoch whose metrics, as one model's, stand in the header.
        title: the first lines of the header.
        lower_is_better: metrics, without their set, whose lowest value is their best.
    """
    metrics = [name for name in val_rows[-1] if name not in NOT_METRICS]
    families = list(dict.fromkeys(map(_family, metrics)))
    curves = {"Train Loss": [("Train Loss", train_rows)]} if train_rows else {}
    curves |= {family: [(name, val_rows) for name in metrics if _family(name) == family] for family in families}
    columns = min(len(curves), 2 if len(curves) in (2, 4) else 3)
    rows = math.ceil(len(curves) / columns)
    width = 5.5 * columns

    selected = next(row for row in val_rows if row["Epochs"] == selected_epoch)
    best = {name: _best_row(name, val_rows, _family(name) in lower_is_better) for name in metrics}
    header = _wrapped([f"{name} {selected.get(name, math.nan):.4f}" for name in metrics], int(13 * width))
    footer = _wrapped([f"{name} {best[name][name]:.4f} ({best[name]['Epochs']})" for name in metrics], int(15 * width))
    header = f"{title}\nselected epoch {selected_epoch}:\n{header}"
    footer = f"each metric's best value (its epoch), not one model's:\n{footer}"
    margin = 0.2 * (header.count("\n") + footer.count("\n") + 2)

    figure = Figure(figsize=(width, 3.5 * rows + margin), layout="constrained")
    for number, (family, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for name, source in lines:
            with_value = [row for row in source if name in row]
            epochs = [row["Epochs"] for row in with_value]
            marker = "o" if len(epochs) < 30 else ""
            axes.plot(epochs, [row[name] for row in with_value], marker=marker, ms=3, label=name)
        axes.axvline(selected_epoch, color="0.6", linestyle=":", zorder=0)
        axes.set(title=family, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small", ncols=math.ceil(len(lines) / 8))
    figure.suptitle(header, fontsize="medium", parse_math=False)
    figure.supxlabel(footer, fontsize="small", parse_math=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="svg")


def _best_row(name: str, rows: Sequence[Row], lowest: bool) -> Row:
    """The first row with the best value of a metric; NaN is none."""
    sign = -1 if lowest else 1
    with_value = [row for row in rows if name in row]
    return max(with_value, key=lambda row: -math.inf if math.isnan(row[name]) else sign * row[name])


def save_curve(path: Path, rows: Sequence[Mapping[str, float]], name: str) -> None:
    """Draws one column of the rows over `Epochs` into an SVG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["Epochs"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
    axes.set(xlabel="epoch", title=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    with replacing(path) as beside:
        figure.savefig(beside, format="svg")


def save_bands(path: Path, curves: Mapping[str, Sequence[tuple[int, float, float]]], name: str) -> None:
    """Draws curves of (epoch, mean, half of its confidence interval), by label, into an SVG."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for label, points in curves.items():
        epochs, mean, half = np.array(points, dtype=float).reshape(-1, 3).T
        (line,) = axes.plot(epochs, mean, marker="o" if len(epochs) < 30 else "", ms=3, label=label)
        axes.fill_between(epochs, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    means = [mean for points in curves.values() for _, mean, _ in points]
    if means:  # of two runs the interval is so wide that curves would look flat
        room = 0.6 * np.ptp(means) or 0.1
        axes.set_ylim(min(means) - room, max(means) + room)
    axes.set(xlabel="epoch", ylabel=f"{name} of the classes that select the epoch")
    axes.set_title("mean and 95 % confidence interval over seeds and folds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    legend = axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for text in legend.get_texts():
        text.set_parse_math(False)
    with replacing(path) as beside:
        figure.savefig(beside, format="svg")


def save_scatter(path: Path, points: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Draws points `(N, 2)`, coloured by label, into a PNG."""
    _, ranks = np.unique(labels, return_inverse=True)
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], c=ranks, cmap="gist_rainbow", s=12, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[])
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


@dataclass(frozen=True)
class Retrieval:
    """A query and its nearest neighbours, ready to draw: images are `(H, W, 3)` uint8 arrays."""

    query: np.ndarray
    query_class: str
    neighbours: Sequence[np.ndarray]
    neighbour_classes: Sequence[str]
    correct: Sequence[bool]


def save_recoveries(path: Path, retrievals: Sequence[Retrieval]) -> None:
    """Draws each query (framed red) beside its nearest neighbours (green: right class; grey: wrong) into a PNG."""
    side, frame, caption, gap = 128, 5, 18, 6  # px
    cell = side + 2 * frame
    columns = 1 + max(len(retrieval.neighbours) for retrieval in retrievals)
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, len(retrievals) * (cell + caption + gap) + 28), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), "query (red) and its nearest neighbours (green: right class, grey: wrong)", "black", _font(13))
    for row, retrieval in enumerate(retrievals):
        images = [retrieval.query, *retrieval.neighbours]
        names = [retrieval.query_class, *retrieval.neighbour_classes]
        colours = ["#d62728", *("#2ca02c" if right else "#b0b0b0" for right in retrieval.correct)]
        for column, (image, name, colour) in enumerate(zip(images, names, colours)):
            x, y = gap + column * (cell + gap), 28 + row * (cell + caption + gap)
            draw.text((x + cell // 2, y), _fitting(name.replace("_", " "), cell), "black", _font(11), anchor="ma")
            thumbnail = ImageOps.pad(Image.fromarray(image), (side, side), color="white")
            canvas.paste(ImageOps.expand(thumbnail, frame, colour), (x, y + caption))
    with replacing(path) as beside:
        canvas.save(beside, format="png")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _fitting(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` px of a caption."""
    if _font(11).getlength(text) <= width:
        return text
    return next(cut for end in range(len(text), -1, -1) if _font(11).getlength(cut := text[:end] + "…") <= width)
