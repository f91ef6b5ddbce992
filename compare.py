"""One table and one plot of several runs, grouped by configuration without the seed.

A seed's figure is the mean over its folds, which share their test classes. Means and confidence intervals are over
seeds.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import auxiliaries
import plots
import records
import runs
from auxiliaries import UserError
from records import Row

MODELS = ("selected", "last")
SPLITS = {"test": "test", "val": "validation"}
MAX_FOLDS, MAX_EPOCH = 1000, 10**9
CONFIGURATION_SCHEMA = {
    "type": "object",
    "properties": {"seed": {"type": ["integer", "null"]}, "fold": {"type": ["integer", "null"]}},
}


def add_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags."""
    # fmt: off
    add = parser.add_argument
    add("folders", nargs="+", type=auxiliaries.user_path, metavar="FOLDER",
        help="run folders, such as Training_Results/cub200/*")
    add("--metric", default="Recall @ 1", help="the metric to compare, as log_val_Base.csv names it")
    add("--svg", default="comparison.svg", type=_svg_file, metavar="FILE", help="where to draw the curves")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--csv", action="store_true", help="print CSV instead of Markdown")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    # fmt: on


def _svg_file(text: str) -> Path:
    """An argparse type: an SVG file that can be written."""
    path = Path(auxiliaries.user_path(text))
    if path.suffix.lower() != ".svg":
        raise UserError(f"--svg {auxiliaries.shown(text)} is not the name of an SVG file: end it with .svg")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--svg {auxiliaries.shown(text)} can't be written: name a file in a folder that exists")
    return path


# Reading runs


def read_run(folder: Path, metric: str) -> dict[str, Any]:
    """Reads the folder of one training run.

    Returns:
        `folder`, `seed`, `fold`, `flags` (those that are compared, as text), `split` (which classes the figures are of:
        a key of `SPLITS`), the metric's value of each of `MODELS`, `seconds`, `curve` (the metric by epoch), and
        `test data` (a description, or None).

    Raises:
        UserError: it is not a run folder, the run isn't finished, something is damaged, or it has no such metric.
    """
    if not folder.exists():
        raise UserError("not begun")
    flags = runs.read_configuration(folder)
    auxiliaries.check_schema(folder / "config.yaml", flags, CONFIGURATION_SCHEMA, "restore it")
    if not (folder / "summary.json").is_file():
        raise UserError("unfinished: it has no summary.json; continue it with --resume_training")
    summary = runs.read_summary(folder)
    split = "test" if "test" in summary["selected"] else "val"
    metrics = [summary[model].get(split, {}) for model in MODELS]
    values = {model: records.mean_over_sets(found, metric) for model, found in zip(MODELS, metrics)}
    if math.isnan(values["selected"]):
        names = {re.sub(r"^Set \d+ ", "", name) for name in metrics[0]}
        if metric in names:
            raise UserError(f"its {metric} is NaN, not defined on its images")
        near = auxiliaries.nearest_name(metric, names)
        raise UserError(f"it has no {metric}{near}: --evaluate computes further metrics, one run at a time")
    return {
        "folder": folder,
        "seed": flags.get("seed"),
        "fold": flags.get("fold"),
        "flags": {name: str(value) for name, value in runs.compared_flags(flags).items()},
        "split": split,
        **values,
        "seconds": math.nan if summary["seconds"] is None else float(summary["seconds"]),
        "curve": read_curve(folder / records.LOGS["val"], metric),
        "test data": runs.test_data(folder),
    }


def read_curve(file: Path, metric: str) -> dict[int, float]:
    """A metric by epoch, from a CSV file of rows; epochs without it, and the backbone before training, are left out.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with open(file, newline="", encoding="utf-8") as log:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(log)]
        curve = {int(row["Epochs"]): records.mean_over_sets(row, metric) for row in rows}
        if not all(-1 <= epoch < MAX_EPOCH for epoch in curve):
            raise ValueError("it has impossible epochs")
        if any(abs(value) > runs.LARGEST for value in curve.values()):
            raise ValueError(f"it has impossible values of {metric}")
    except (OSError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise UserError(f"{file.name} is damaged: {' '.join(str(error).split())}") from None
    return {epoch: value for epoch, value in curve.items() if epoch >= 0 and math.isfinite(value)}


def expected_folders(folder: Path) -> list[Path]:
    """The folders of a run's folds, including those that are still to come; or the folder of a single training run."""
    present = runs.fold_folders(folder)
    if None in present:
        return [folder]
    try:
        count = int(runs.read_configuration(folder)["num_training_sets"])
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        count = 0
    folds = range(count if count <= MAX_FOLDS else 0)
    return sorted({*present.values(), *(folder / f"fold_{fold}" for fold in folds)})


def read_runs(folders: Iterable[Path], metric: str) -> list[Row]:
    """The finished training runs in the folders, each what `read_run` returns and the label of its `Configuration`.

    A notice names what is left out, and why.

    Raises:
        UserError: there is nothing to compare.
    """
    found: list[Row] = []
    for training_folder in itertools.chain.from_iterable(map(expected_folders, folders)):
        try:
            found.append(read_run(training_folder, metric))
        except (UserError, OSError) as error:
            leave_out(training_folder, error)
    if not found:
        raise UserError("none of the folders holds a finished run to compare")
    for run, label in zip(found, label_configurations([run["flags"] for run in found])):
        run["Configuration"] = label
    for drop in (drop_repeated, drop_validation_figures, drop_other_data, drop_incomplete_seeds):
        found = drop(found)
    return found


def label_configurations(flags: Sequence[Mapping[str, str]]) -> list[str]:
    """A label for each run: the flags that differ between runs, or, where none does, what was trained."""
    names = sorted({str(name) for of_run in flags for name in of_run})
    differing = [name for name in names if len({of_run.get(name, "None") for of_run in flags}) > 1]
    shown = differing or [name for name in ("dataset", "arch", "loss") if name in names]
    return [", ".join(f"{name} {of_run.get(name, 'None')}" for name in shown) for of_run in flags]


# What doesn't compare


def leave_out(folder: Path, reason: object) -> None:
    """Says that a folder is left out, and why."""
    auxiliaries.notice(f"{folder} is left out: {reason}")


def group_by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values of some columns, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def drop_repeated(found: Sequence[Row]) -> list[Row]:
    """Keeps the first of several runs with one configuration, seed and fold."""
    groups = group_by(found, "Configuration", "seed", "fold").values()
    for first, *others in groups:
        for run in others:
            leave_out(run["folder"], f"it repeats {first['folder']}, including the seed")
    return [first for first, *_ in groups]


def drop_validation_figures(found: Sequence[Row]) -> list[Row]:
    """Keeps the runs with figures of test classes, if there are any."""
    tested = [run for run in found if run["split"] == "test"]
    if not tested:
        return list(found)
    for run in found:
        if run["split"] != "test":
            leave_out(run["folder"], "it has figures of validation classes only, others have those of test classes")
    return tested


def drop_other_data(found: Sequence[Row]) -> list[Row]:
    """Keeps, of each configuration, the runs that were tested on the images of its first one."""
    num_unknown = sum(run["test data"] is None for run in found)
    if num_unknown:
        auxiliaries.notice(f"{num_unknown} run(s) don't say on which images they were tested: that can't be compared")
    kept, firsts = [], []
    for group in group_by(found, "Configuration").values():
        first = next((run for run in group if run["test data"] is not None), group[0])
        firsts.append(first)
        for run in group:
            if run["test data"] in (None, first["test data"]):
                kept.append(run)
            else:
                leave_out(run["folder"], f"its test images differ from those of {first['folder']}")
    for first in firsts[1:]:
        is_known = None not in (first["test data"], firsts[0]["test data"])
        is_same_dataset = first["flags"].get("dataset") == firsts[0]["flags"].get("dataset")
        if is_known and is_same_dataset and first["test data"] != firsts[0]["test data"]:
            auxiliaries.notice(f"{first['folder']} and {firsts[0]['folder']} were tested on different images")
    return kept


def drop_incomplete_seeds(found: Sequence[Row]) -> list[Row]:
    """Keeps, of each configuration, the seeds with as many folds as any of its seeds has: folds differ."""
    kept = []
    for group in group_by(found, "Configuration").values():
        seeds = group_by(group, "seed")
        fullest = {run["fold"] for run in max(seeds.values(), key=len)}
        for (seed,), runs_of_seed in seeds.items():
            if {run["fold"] for run in runs_of_seed} == fullest:
                kept += runs_of_seed
                continue
            for run in runs_of_seed:
                leave_out(run["folder"], f"seed {seed} has other folds than another seed of this configuration")
    return kept


# Comparing them


def average_folds(found: Sequence[Row]) -> list[Row]:
    """One row per configuration and seed: means over the seed's folds, and the number of `Runs`."""
    rows = []
    for (label, seed, split), group in group_by(found, "Configuration", "seed", "split").items():
        means = {name: fmean(run[name] for run in group) for name in (*MODELS, "seconds")}
        curve = {epoch: fmean(values) for epoch, values in join_curves(group).items()}
        rows.append({"Configuration": label, "seed": seed, "split": split, "Runs": len(group), **means, "curve": curve})
    return rows


def join_curves(rows: Sequence[Row]) -> dict[int, list[float]]:
    """The values of the rows' curves in each epoch that all of them have."""
    curves = [row["curve"] for row in rows]
    return {epoch: [curve[epoch] for curve in curves] for epoch in sorted(set.intersection(*map(set, curves)))}


def summarize(seeds: Sequence[Row], metric: str) -> list[Row]:
    """One row per configuration: means over its seeds, with half the width of their 95 % confidence intervals."""
    rows = []
    for (label, split), group in group_by(seeds, "Configuration", "split").items():
        row: Row = {"Configuration": label, "Seeds": len(group), "Runs": sum(seed["Runs"] for seed in group)}
        for model in MODELS:
            center, _, half = auxiliaries.mean_and_interval([seed[model] for seed in group])
            row |= {f"{SPLITS[split]} {metric}, {model}": center, f"CI 95 %, {model}": half}
        rows.append(row | {"Seconds": fmean(seed["seconds"] for seed in group)})
    return rows


def compute_bands(seeds: Sequence[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """For each configuration its points (epoch, mean over seeds, half the width of the confidence interval).

    They are of the epochs in which all its runs were evaluated.
    """
    bands: dict[str, list[tuple[int, float, float]]] = {}
    for (label,), group in group_by(seeds, "Configuration").items():
        intervals = {epoch: auxiliaries.mean_and_interval(values) for epoch, values in join_curves(group).items()}
        bands[label] = [(epoch, center, half) for epoch, (center, _, half) in intervals.items()]
    return bands


def format_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, below a line that says what they are."""
    shown = []
    for row in rows:
        cells = {}
        for name, value in row.items():
            half = row.get(f"CI 95 %, {name.rpartition(', ')[2]}")  # of the figure of this model
            if half is None:
                cells[name] = f"{value:.1f}" if name == "Seconds" else value
            elif not name.startswith("CI 95 %"):
                cells[name] = f"{value:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")
        shown.append(cells)
    what = "Mean over seeds ± half of its 95 % confidence interval"
    what += "; a seed's figure is the mean over its folds" if any(row["Runs"] > row["Seeds"] for row in rows) else ""
    return f"{what}.\n\n{records.format_table(shown)}"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Prints the table, draws the curves, and names the folders that are left out.

    Raises:
        UserError: there is nothing to compare.
    """
    parser = auxiliaries.FlagParser(prog="compare.py", description=__doc__)
    add_arguments(parser)
    opt = parser.parse_args(argv)
    seeds = average_folds(read_runs(map(Path, opt.folders), opt.metric))
    rows = summarize(seeds, opt.metric)
    if opt.json:
        print(auxiliaries.as_json(rows))
    elif opt.csv:
        table = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    else:
        print(format_markdown(rows))
    plots.save_bands(opt.svg, compute_bands(seeds), opt.metric)
    auxiliaries.notice(f"curves in {opt.svg}")
    return rows


if __name__ == "__main__":
    auxiliaries.run_command(main)
