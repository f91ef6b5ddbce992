# PYTHON_ARGCOMPLETE_OK
"""One table and one plot of several runs, grouped by configuration without the seed, and which differences hold.

A seed's figure is the mean over its folds, which share their test classes. Means and confidence intervals are over
seeds. Each configuration is compared with a reference one, in pairs: over the seeds that both have; where they share
one seed, over its folds; two single runs query by query, with whole test classes drawn anew.
"""

from __future__ import annotations

import os

if __name__ == "__main__" and "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
    import completion

    completion.complete("compare")

import csv
import io
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import auxiliaries
import evaluate
import plots
import records
import report
import runs
import significance
from auxiliaries import UserError, shown
from records import Row
from significance import Difference

NAMED_FIRST = ("dataset", "arch", "loss", "loss_params", "sampling", "training_method", "lr", "margin")
MODELS = ("selected", "last")
SPLITS = {"test": "test", "val": "validation"}
MAX_FOLDS, MAX_EPOCH = 1000, 10**9
MOST_RUNS = 20  # that are listed one by one in Markdown
DEFAULT_METRIC = "Recall @ 1"
FINEST = "Level 0 "  # before the names of metrics at all levels of the labels
BY_QUERY = {
    "Recall @ 1": "correct_at_1",
    "Precision @ 1": "correct_at_1",
    "MAP@R": "ap_at_r",
}  # arrays of per_query.npz
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
    add("--metric", type=evaluate.metric_name,
        help="the metric to compare, as log_val_Base.csv names it, or shorter, as R@1 (default: the first of "
        f"--metrics, or else {DEFAULT_METRIC})")
    add("--metrics", nargs="+", type=evaluate.metric_name, metavar="METRIC",
        help="the metrics to show, each in a column (default: the one that is compared); give it after the folders")
    add("--reference", metavar="LABEL",
        help="the configuration to compare the others with, as the table names it, or a part of that name; named in "
        "advance, such as a baseline, it lets more differences hold (default: the best)")
    add("--sort", metavar="COLUMN", help="sort by a column or a metric: the best first, other columns from the lowest "
        "(default: in the order of the folders)")
    add("--database", type=auxiliaries.user_path, metavar="FILE",
        help="also collect all rows of the folders' records.db in this SQLite file, with a column `run`; what it holds "
        "of other runs stays")
    add("--svg", default="comparison.svg", type=partial(_new_file, "--svg"), metavar="FILE",
        help="where to draw the curves")
    add("--html", type=partial(_new_file, "--html"), metavar="FILE",
        help="also write a page with the table, what can be told of it, curves, and the classes that gain and lose")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--csv", action="store_true", help="print CSV instead of Markdown")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    add("--latex", action="store_true", help="print a LaTeX tabular instead of Markdown, the best figures bold")
    # fmt: on


def _new_file(flag: str, text: str) -> Path:
    """An argparse type: a file that can be written, named like its flag."""
    path, suffix = Path(auxiliaries.user_path(text)), flag.replace("--", ".")
    if path.suffix.lower() != suffix:
        kind = suffix.removeprefix(".").upper()
        raise UserError(f"{flag} {auxiliaries.shown(text)} is not the name of an {kind} file: end it with {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {auxiliaries.shown(text)} can't be written: name a file in a folder that exists")
    return path


# Reading runs


def read_run(folder: Path, metric: str, further: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the folder of one training run.

    Returns:
        `folder`, `seed`, `fold`, `partitions` (of the training classes), `flags` (those that are compared, as text),
        `split` (which classes the figures are of: a key of `SPLITS`), the metric's value of each of `MODELS`, `figures`
        (the selected network's, of further metrics), `optimism` (how much higher the metric is on the test classes in
        the epoch that these choose, than in the one that validation classes choose; NaN where not both are known),
        `seconds`, `curve` (the metric by epoch), and `test data` (a description, or None).

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
        raise UserError(f"it has no {shown(metric)}{near}: --evaluate computes further metrics, one run at a time")
    return {
        "folder": folder,
        "seed": flags.get("seed"),
        "fold": flags.get("fold"),
        "partitions": flags.get("num_training_partitions"),
        "flags": {name: as_text(value) for name, value in runs.compared_flags(flags).items()},
        "split": split,
        **values,
        "figures": {name: records.mean_over_sets(metrics[0], name) for name in further},
        "optimism": _selection_optimism(summary, metric),
        "seconds": math.nan if summary["seconds"] is None else float(summary["seconds"]),
        "curve": read_curve(folder / records.LOGS["val"], metric),
        "test data": runs.test_data(folder),
    }


def _selection_optimism(summary: Mapping[str, Any], metric: str) -> float:
    """What choosing the epoch on the test classes adds to their figure; NaN where the summary doesn't say."""
    selected, on_test = summary["selected"], summary.get("best on test", {})
    if "test" not in on_test or not {"val", "test"} <= selected.keys():
        return math.nan
    difference = records.mean_over_sets(on_test["test"], metric) - records.mean_over_sets(selected["test"], metric)
    return -difference if evaluate.lower_is_better(metric) else difference


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


def read_runs(folders: Iterable[Path], metric: str, further: Sequence[str] = ()) -> list[Row]:
    """The finished training runs in the folders, each what `read_run` returns and the label of its `Configuration`.

    A notice names what is left out, and why.

    Raises:
        UserError: there is nothing to compare.
    """
    found: list[Row] = []
    for training_folder in itertools.chain.from_iterable(map(expected_folders, folders)):
        try:
            found.append(read_run(training_folder, metric, further))
        except (UserError, OSError) as error:
            leave_out(training_folder, error)
    if not found:
        raise UserError("none of the folders holds a finished run to compare")
    for name in further:
        if all(math.isnan(run["figures"][name]) for run in found):
            raise UserError(f"--metrics {shown(name)}: none of the runs has it; --evaluate computes further metrics")
    for run, (label, others) in zip(found, label_configurations([run["flags"] for run in found])):
        run |= {"Configuration": label, "Further flags": others}
    for drop in (drop_repeated, drop_validation_figures, drop_other_data, drop_incomplete_seeds):
        found = drop(found)
    return found


def label_configurations(flags: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Names each run's configuration by as few flags as tell all of them apart.

    Returns:
        For each run those flags, or, where none differs, what was trained; and all other flags that differ.
    """
    names = sorted({str(name) for of_run in flags for name in of_run}, key=lambda name: (_rank(name), name))
    differing = [name for name in names if len({of_run.get(name) for of_run in flags}) > 1]

    def count(chosen: Sequence[str]) -> int:
        return len({tuple(of_run.get(name) for name in chosen) for of_run in flags})

    needed = differing
    for name in reversed(differing):  # others follow from these, or were chosen with them
        fewer = [other for other in needed if other != name]
        needed = fewer if fewer and count(fewer) == count(differing) else needed
    shown = needed or [name for name in NAMED_FIRST if name in names][:3]
    others = [name for name in differing if name not in needed]
    labels, further = (
        [", ".join(f"{name} {of_run.get(name, 'None')}" for name in chosen) for of_run in flags]
        for chosen in (shown, others)
    )
    shorter = [shorten_numbers(label) for label in labels]
    return list(zip(shorter if len(set(shorter)) == len(set(labels)) else labels, map(shorten_numbers, further)))


def _rank(name: str) -> int:
    return NAMED_FIRST.index(name) if name in NAMED_FIRST else len(NAMED_FIRST)


def shorten_numbers(text: str) -> str:
    """A text whose numbers have four digits at most, unless they are integers."""
    return re.sub(r"\d+\.\d+(e[+-]?\d+)?", lambda match: f"{float(match[0]):.4g}", text)


def as_text(value: Any) -> str:
    """A flag's value; a mapping as its entries."""
    if not isinstance(value, dict):
        return str(value)
    return " ".join(f"{key}={entry}" for key, entry in value.items()) or "none"


def collect_database(database: Path, folders: Iterable[Path]) -> None:
    """Collects the rows of the training runs' records.db, each named by its path from the database's folder.

    Raises:
        UserError: the database can't be written, or is another program's.
    """
    place = database.absolute().parent
    names = {}
    for folder in itertools.chain.from_iterable(map(expected_folders, folders)):
        if (folder / "records.db").is_file():
            names[Path(os.path.relpath(folder.absolute(), place)).as_posix()] = folder / "records.db"
        else:
            auxiliaries.notice(f"{folder} has no records.db: no rows of it are collected")
    num_collected = records.collect_rows(database, names)
    auxiliaries.notice(f"the rows of {num_collected} run(s) are in {database}")


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
    """One row per configuration and seed: means over the seed's folds, the number of `Runs`, and these by `folds`."""
    rows = []
    for (label, seed, split), group in group_by(found, "Configuration", "seed", "split").items():
        means: Row = {name: fmean(run[name] for run in group) for name in (*MODELS, "seconds")}
        means["figures"] = {name: fmean(run["figures"][name] for run in group) for name in group[0]["figures"]}
        curve = {epoch: fmean(values) for epoch, values in join_curves(group).items()}
        folds = {run["fold"]: run for run in group}
        row = {"Configuration": label, "seed": seed, "split": split, "Runs": len(group), "folds": folds}
        rows.append(row | means | {"curve": curve, "Further flags": group[0]["Further flags"]})
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
        for name in group[0]["figures"]:
            center, _, half = auxiliaries.mean_and_interval([seed["figures"][name] for seed in group])
            row |= {f"{SPLITS[split]} {name}, selected": center, f"CI 95 %, {name}, selected": half}
        row["Seconds"] = fmean(seed["seconds"] for seed in group)
        rows.append(row | ({"Further flags": group[0]["Further flags"]} if group[0]["Further flags"] else {}))
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


# Which differences hold

THE_REFERENCE = "the reference"


@dataclass(frozen=True)
class Comparison:
    """How a configuration compares with the reference.

    Attributes:
        difference: its figure minus the reference's; None where they can't be compared.
        how: what the pairs are, or, where nothing can be told, why, and what to do.
        holm: the p-value that holds for all comparisons together.
    """

    difference: Difference | None
    how: str
    holm: float = math.nan


ONE_PAIR = (
    "a single pair gives no interval: train both with two seeds or more in common, or compare one run with one run"
)


def compare_pair(group: Sequence[Row], reference: Sequence[Row], metric: str) -> Comparison:
    """Compares the seeds of two configurations, rows of `average_folds`."""
    mine, theirs = ({row["seed"]: row["folds"] for row in rows} for rows in (group, reference))
    runs_of_each = [[run for folds in seeds.values() for run in folds.values()] for seeds in (mine, theirs)]
    test_data = [found[0]["test data"] for found in runs_of_each]
    if None not in test_data and test_data[0] != test_data[1]:
        return Comparison(None, "they were tested on different images")
    shared = {seed: mine[seed].keys() & theirs[seed].keys() for seed in mine if seed in theirs}
    differences = {
        seed: {fold: mine[seed][fold]["selected"] - theirs[seed][fold]["selected"] for fold in sorted(folds, key=str)}
        for seed, folds in shared.items()
        if folds
    }
    if len(differences) > 1:
        found = significance.paired_over_seeds([fmean(folds.values()) for folds in differences.values()])
        return Comparison(found, _do_not_vary(found, "seeds") if math.isnan(found.p) else f"over {found.count} seeds")
    of_seed = [*next(iter(differences.values()), {}).values()]
    partitions = {run["partitions"] for found in runs_of_each for run in found}
    if len(of_seed) > 1:
        return _compare_folds(of_seed, partitions)
    if [len(found) for found in runs_of_each] == [1, 1]:
        return _compare_queries(runs_of_each[0][0], runs_of_each[1][0], metric)
    if of_seed:
        return Comparison(Difference(of_seed[0]), ONE_PAIR)
    return Comparison(
        None, f"they share no {'fold' if shared else 'seed'}: train both with two seeds or more in common"
    )


def _do_not_vary(difference: Difference, pairs: str) -> str:
    return f"all {difference.count} {pairs} have the same difference, which says nothing of how it varies"


def _compare_folds(differences: Sequence[float], partitions: Collection[Any]) -> Comparison:
    """Compares two configurations over the folds of the seed that they share."""
    num_partitions, *others = partitions
    if others or type(num_partitions) is not int or num_partitions < 2:
        return Comparison(Difference(fmean(differences)), "their folds are of different --num_training_partitions")
    found = significance.paired_over_folds(differences, num_partitions)
    if math.isnan(found.p):
        return Comparison(found, _do_not_vary(found, "folds"))
    return Comparison(
        found, f"over {found.count} folds of one seed, corrected for the training classes that folds share"
    )


def _compare_queries(run: Row, reference: Row, metric: str) -> Comparison:
    """Compares two single runs by their queries."""
    name, difference = BY_QUERY.get(metric.removeprefix(FINEST)), Difference(run["selected"] - reference["selected"])
    if name is None:
        listed = ", ".join(BY_QUERY)
        return Comparison(difference, f"runs keep results by query of {listed} only: train with two seeds or more")
    try:
        results, others = (_read_query_results(one, metric) for one in (run, reference))
    except UserError as error:
        return Comparison(difference, str(error))
    if results["test_set"] != others["test_set"] or not np.array_equal(results["weight"], others["weight"]):
        return Comparison(difference, "their queries are different ones, or stand in another order")
    by_query = results[name].astype(np.float64) - others[name]  # (Q,)
    found = significance.bootstrap_over_classes(results["label"], results["weight"], by_query)
    if found.count < significance.MIN_CLASSES:
        few = f"{found.count} test classes are too few to draw from, {significance.MIN_CLASSES} are needed"
        return Comparison(found, f"{few}: train with two seeds or more")
    if math.isnan(found.p):
        return Comparison(found, _do_not_vary(found, "test classes"))
    return Comparison(found, f"over {found.count} test classes, drawn anew; the seed's variance is left out")


def _read_query_results(run: Row, metric: str) -> dict[str, np.ndarray]:
    """A run's results by query.

    Raises:
        UserError: they are missing or damaged, or aren't those of the run's figure.
    """
    results = records.read_query_results(run["folder"])
    figure = float((results["weight"] * results[BY_QUERY[metric.removeprefix(FINEST)]]).sum())
    if not math.isclose(figure, run["selected"], abs_tol=1e-5):  # AP@R is stored as float32
        raise UserError(
            f"{run['folder'] / records.PER_QUERY} has another {metric} than summary.json: remove both, and "
            "--resume_training writes them anew"
        )
    return results


def compare_classes(
    seeds: Sequence[Row], reference: str, metric: str, is_compared: bool = True
) -> tuple[list[report.ClassDifferences], dict[str, str]]:
    """Which classes gain and lose with each configuration, in place of the reference.

    Args:
        seeds: rows of `average_folds`.
        reference: the label of the reference.
        metric: a key of `BY_QUERY`, perhaps of the finest of several levels.
        is_compared: whether the rows' figures are of this metric.

    Returns:
        The differences, and why there are none for other configurations.
    """
    groups = {label: rows for (label,), rows in group_by(seeds, "Configuration").items()}
    found: list[report.ClassDifferences] = []
    refused: dict[str, str] = {}
    try:
        theirs = _read_classes(groups[reference], metric, is_compared)
    except UserError as error:
        return [], {reference: str(error)}
    for label in [label for label in groups if label != reference]:
        try:
            mine = _read_classes(groups[label], metric, is_compared)
        except UserError as error:
            refused[label] = str(error)
            continue
        if mine.images == theirs.images and mine.sizes == theirs.sizes:
            names = theirs.names if theirs.are_named else mine.names
            found.append(report.ClassDifferences(label, names, mine.sizes, theirs.values, mine.values))
        else:
            refused[label] = "its queries are different ones"
    return found, refused


@dataclass(frozen=True)
class ClassFigures:
    """A configuration's figure of each class, the mean over its seeds of means over their folds.

    Attributes:
        images: a digest of what was tested.
        names: of the classes; `class 7` where the runs don't say (`are_named`).
        sizes: their numbers of queries that count.
        values: their figures.
    """

    images: str
    names: list[str]
    are_named: bool
    sizes: list[int]
    values: list[float]


def _read_classes(seeds: Sequence[Row], metric: str, is_compared: bool) -> ClassFigures:
    """Reads per_query.npz of a configuration's runs.

    Raises:
        UserError: one is missing or damaged, isn't that of its run's figure, or they are of different queries.
    """
    by_seed, first = [], None
    for row in seeds:
        by_fold = []
        for run in row["folds"].values():
            results = _read_query_results(run, metric) if is_compared else records.read_query_results(run["folder"])
            first = results if first is None else first
            if not all(np.array_equal(results[name], first[name]) for name in ("test_set", "label", "weight")):
                raise UserError("its runs were tested on different queries")
            counts = results["weight"] > 0
            classes, place = np.unique(results["label"][counts], return_inverse=True)
            weights = results["weight"][counts]
            values = weights * results[BY_QUERY[metric.removeprefix(FINEST)]][counts]
            by_fold.append(np.bincount(place, values) / np.bincount(place, weights))
        by_seed.append(np.mean(by_fold, axis=0))
    assert first is not None, "a configuration has a run"
    labels = np.unique(first["label"]).tolist()
    stored = first.get("class_names", np.array([]))
    are_named = stored.dtype.kind == "U" and stored.shape == (len(labels),)
    name_of = dict(zip(labels, stored.tolist())) if are_named else {label: f"class {label}" for label in labels}
    return ClassFigures(
        str(first["test_set"]),
        [name_of[label] for label in classes.tolist()],
        are_named,
        np.bincount(place).tolist(),
        np.mean(by_seed, axis=0).tolist(),
    )


def choose_reference(rows: Sequence[Row], column: str, lower_is_better: bool, wanted: str | None) -> str:
    """The label of the configuration that the others are compared with: the one asked for, or the best one.

    Raises:
        UserError: none has that label, or a part of several labels was given.
    """
    labels = [row["Configuration"] for row in rows]
    if wanted is None:
        return min(rows, key=lambda row: row[column] if lower_is_better else -row[column])["Configuration"]
    found = [label for label in labels if label == wanted] or [label for label in labels if wanted in label]
    if len(found) == 1:
        return found[0]
    which = f"is part of {len(found)} labels" if found else f"is no label{auxiliaries.nearest_name(wanted, labels)}"
    listed = "; ".join(labels[: auxiliaries.MAX_LISTED]) + ("; …" if len(labels) > auxiliaries.MAX_LISTED else "")
    raise UserError(f"--reference {shown(wanted)} {which}: give one of {listed}")


def compare_with(seeds: Sequence[Row], reference: str, metric: str, is_chosen: bool) -> dict[str, Comparison]:
    """Compares every other configuration with the reference.

    Args:
        seeds: rows of `average_folds`.
        reference: its label.
        metric: the metric.
        is_chosen: whether the reference was chosen by these figures. Then a comparison of every pair was possible, and
            all of these count.

    Returns:
        The comparisons by label.
    """
    groups = {label: rows for (label,), rows in group_by(seeds, "Configuration").items()}
    others = [label for label in groups if label != reference]
    found = [compare_pair(groups[label], groups[reference], metric) for label in others]
    p_values = [math.nan if one.difference is None else one.difference.p for one in found]
    adjusted = significance.holm(p_values, count_comparisons(len(groups), is_chosen))
    return {label: replace(one, holm=p) for label, one, p in zip(others, found, adjusted)}


def count_comparisons(num_groups: int, is_chosen: bool) -> int:
    """How many comparisons p-values are corrected for: with a reference named in advance, or of every pair."""
    return math.comb(num_groups, 2) if is_chosen else num_groups - 1


def differing_parts(label: str, other: str) -> tuple[str, str]:
    """Two labels without the flags in which they agree."""
    parts, others = (re.split(r", (?=\w+ )", one) for one in (label, other))
    mine, theirs = ([part for part in some if part not in rest] for some, rest in ((parts, others), (others, parts)))
    return ", ".join(mine) or label, ", ".join(theirs) or other


def in_words(label: str, reference: str, comparison: Comparison, lower_is_better: bool) -> str:
    """One sentence: which of both is better, or that this can't be told."""
    label, reference = differing_parts(label, reference)
    difference, better, worse, sign = comparison.difference, label, reference, 1
    if difference is None:
        return f"{label} and {reference} can't be compared: {comparison.how}"
    if (difference.mean < 0) != lower_is_better:
        better, worse, sign = reference, label, -1
    mean = f"{sign * difference.mean:+.4f}"
    if math.isnan(difference.p):
        return f"no difference can be told between {better} and {worse}: {mean}; {comparison.how}"
    low, high = sorted((sign * difference.low, sign * difference.high))
    more = "" if math.isnan(difference.p_wilcoxon) else f"; Wilcoxon {_format_p(difference.p_wilcoxon)}"
    numbers = f"{mean} [{low:.4f}, {high:.4f}], p {_format_p(difference.p)} (Holm {_format_p(comparison.holm)}{more})"
    holds = comparison.holm < significance.LEVEL
    what = f"{better} is better than {worse}" if holds else f"no difference can be told between {better} and {worse}"
    return f"{what}: {numbers}; {comparison.how}"


def _format_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def add_comparisons(
    rows: Sequence[Row],
    comparisons: Mapping[str, Comparison],
    reference: str,
    lower_is_better: bool,
    num_comparisons: int,
) -> None:
    """Adds columns of what can be told of each configuration's difference to the reference."""
    for row in rows:
        label = row["Configuration"]
        comparison = comparisons.get(label, Comparison(None, ""))
        difference = comparison.difference or Difference(math.nan)
        row |= {"Difference": difference.mean, "Difference from": difference.low, "Difference to": difference.high}
        row |= {"p": difference.p, "p, Wilcoxon": difference.p_wilcoxon, "p, Holm": comparison.holm}
        row["Comparisons"] = num_comparisons
        is_other = label != reference
        row["In words"] = in_words(label, reference, comparison, lower_is_better) if is_other else THE_REFERENCE


def add_optimism(rows: Sequence[Row], seeds: Sequence[Row]) -> None:
    """Adds the selection optimism of each configuration's runs, and its mean, where any run has it."""
    groups = {label: of_label for (label,), of_label in group_by(seeds, "Configuration").items()}
    by_label = {
        label: {str(run["folder"]): run["optimism"] for row in of_label for run in row["folds"].values()}
        for label, of_label in groups.items()
    }
    by_label = {label: {k: v for k, v in by_run.items() if v == v} for label, by_run in by_label.items()}
    if not any(by_label.values()):
        return
    for row in rows:
        by_run = by_label[row["Configuration"]]
        row["Selection optimism"] = fmean(by_run.values()) if by_run else math.nan
        row["Selection optimism by run"] = by_run


def sort_rows(rows: Sequence[Row], column: str | None, split: str) -> list[Row]:
    """The rows by a column, NaN last: of metrics the best first, of others the lowest.

    Args:
        rows: the table.
        column: a column's name, or a metric's, which stands for the selected network's figure.
        split: which classes the figures are of.

    Raises:
        UserError: there is no such column.
    """
    if column is None:
        return list(rows)
    metric = column.removeprefix(f"{SPLITS[split]} ").partition(", ")[0]
    name = column if column in rows[0] else f"{SPLITS[split]} {column}, selected"
    if name not in rows[0] or isinstance(rows[0][name], dict):
        names = [name for name, value in rows[0].items() if not isinstance(value, dict)]
        near = auxiliaries.nearest_name(column, names)
        raise UserError(f"--sort {shown(column)} is no column{near}; the columns are {'; '.join(names)}")
    is_figure = name.startswith(f"{SPLITS[split]} ")
    sign = -1 if is_figure and not evaluate.lower_is_better(metric) else 1
    is_text = isinstance(rows[0][name], str)
    return sorted(rows, key=lambda row: row[name] if is_text else (math.isnan(row[name]), sign * row[name]))


# Printing

COMPARISON_COLUMNS = (
    *("Difference", "Difference from", "Difference to", "p", "p, Wilcoxon", "p, Holm", "Comparisons"),
    *("In words", "Selection optimism by run"),
)


def format_cells(rows: Sequence[Row], plus_minus: str = "±") -> list[dict[str, str]]:
    """The table as it is shown: a figure and its interval in one cell, and no column of the comparisons."""
    return [
        {
            name: _format_cell(name, value, row, plus_minus)
            for name, value in row.items()
            if name not in (*COMPARISON_COLUMNS, "Further flags") and not name.startswith("CI 95 %")
        }
        for row in rows
    ]


def _format_cell(name: str, value: Any, row: Row, plus_minus: str) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return ""
    if name == "Seconds":
        return f"{value:.1f}"
    metric, _, model = name.partition(" ")[2].rpartition(", ")  # of `test Recall @ 1, selected`
    names = (f"CI 95 %, {metric}, {model}", f"CI 95 %, {model}")
    half = next((row[name] for name in names if name in row), math.nan)
    return f"{value:.4f}" + ("" if math.isnan(half) else f" {plus_minus} {half:.4f}")


def describe_table(rows: Sequence[Row]) -> str:
    """What the figures of the table are."""
    what = "Mean over seeds ± half of its 95 % confidence interval"
    folds = "; a seed's figure is the mean over its folds" if any(row["Runs"] > row["Seeds"] for row in rows) else ""
    return f"{what}{folds}."


def describe_comparisons(rows: Sequence[Row], metric: str, is_chosen: bool) -> list[str]:
    """Which differences hold, in sentences; none where there is nothing to compare."""
    reference = next(row["Configuration"] for row in rows if row["In words"] == THE_REFERENCE)
    sentences = [row["In words"] for row in rows if row["In words"] != THE_REFERENCE]
    if not sentences:
        return []
    how = f", the best by {metric}" if is_chosen else ""
    title = f"Differences in {metric} to {reference}{how}, with 95 % confidence intervals:"
    count, num_own = rows[0]["Comparisons"], len(rows) - 1
    holm = f"Holm's p-values hold for {count} comparisons together."
    if count > num_own:
        holm = (
            f"Holm's p-values hold for the comparisons of all {count} pairs, since the figures chose the reference: "
            f"named in advance by --reference, only its own {num_own} count."
        )
    has_p = any(not math.isnan(row["p"]) for row in rows)
    return [title, *(f"- {sentence}" for sentence in sentences), holm if has_p and count > 1 else ""]


def describe_optimism(rows: Sequence[Row], metric: str) -> str:
    """How much choosing the epoch on the test classes adds to their figure, on average; empty where no run says."""
    by_run = [value for row in rows for value in row.get("Selection optimism by run", {}).values()]
    if not by_run:
        return ""
    return (
        f"Selection optimism: {fmean(by_run):+.4f} on average of {len(by_run)} run(s). By so much {metric} on the test "
        "classes is better in the epoch that these choose than in the one that the validation classes choose."
    )


def format_markdown(rows: Sequence[Row], metric: str, is_chosen: bool) -> str:
    """The rows as a Markdown table, below a line that says what they are; then what can be told of them."""
    parts = [describe_table(rows), records.format_table(format_cells(rows))]
    others = [f"- {row['Configuration']}: {row['Further flags']}" for row in rows if "Further flags" in row]
    parts += ["They differ in other flags, too:", "\n".join(others)] if others else []
    title, *sentences = describe_comparisons(rows, metric, is_chosen) or [""]
    parts += [title, "\n".join(sentences[:-1]), *filter(None, sentences[-1:])] if sentences else []
    optimism = describe_optimism(rows, metric)
    if optimism:
        by_run = [item for row in rows for item in row["Selection optimism by run"].items()]
        table = [{"Run": run, "Selection optimism": f"{value:+.4f}"} for run, value in by_run]
        is_short = len(table) <= MOST_RUNS
        parts += [optimism, records.format_table(table) if is_short else "--json lists it for every run."]
    return "\n\n".join(parts)


def format_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV; what holds several values is text."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({name: _flatten(value) for name, value in row.items()})
    return text.getvalue().rstrip("\n")


def _flatten(value: Any) -> Any:
    return "; ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else value


LATEX_CHARACTERS = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$"},
}


def escape_latex(text: str) -> str:
    """Plain text as LaTeX writes it, in one line."""
    return "".join(LATEX_CHARACTERS.get(character, character) for character in " ".join(text.split()))


def _best_figures(rows: Sequence[Row]) -> dict[str, float]:
    """The best value of each column of figures."""
    best = {}
    for name in rows[0]:
        metric, _, model = name.partition(" ")[2].rpartition(", ")
        values = [row[name] for row in rows if model in MODELS and not math.isnan(row[name])]
        if values and not name.startswith("CI 95 %"):
            best[name] = min(values) if evaluate.lower_is_better(metric) else max(values)
    return best


def format_latex(rows: Sequence[Row], metric: str, is_chosen: bool) -> str:
    """The rows as a LaTeX tabular, which needs no package; the best figures are bold, sentences are comments."""
    cells, best = format_cells(rows), _best_figures(rows)
    for row, of_row in zip(rows, cells):
        for name, text in of_row.items():
            bold = len(rows) > 1 and name in best and row[name] == best[name]
            of_row[name] = rf"\textbf{{{escape_latex(text)}}}" if bold else escape_latex(text)
    for row, of_row in zip(rows, cells):
        values = [row[name] for name in ("Difference", "Difference from", "Difference to", "p, Holm")]
        mean, low, high, p = ("" if math.isnan(value) else f"{value:.4f}" for value in values)
        of_row["Difference"] = f"${mean}$ $[{low}, {high}]$" if low else f"${mean}$" if mean else ""
        of_row["$p$ (Holm)"] = "" if not p else escape_latex(_format_p(row["p, Holm"]))
    names = [name if "$" in name else escape_latex(name) for name in cells[0]]
    comments = [describe_table(rows), *describe_comparisons(rows, metric, is_chosen), describe_optimism(rows, metric)]
    comments += [
        f"{run} {value:+.4f}" for row in rows for run, value in row.get("Selection optimism by run", {}).items()
    ]
    lines = [f"% {' '.join(comment.split())}" for comment in comments if comment]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}", r"\hline"]
    body = [" & ".join(row) + r" \\" for row in (names, *(list(of_row.values()) for of_row in cells))]
    return "\n".join([*lines, body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])


# The page


def save_page(
    path: Path, rows: Sequence[Row], seeds: Sequence[Row], reference: str, metric: str, is_chosen: bool
) -> None:
    """Writes all that can be told as one page; what is shown is what the table and its sentences say.

    Args:
        path: the page.
        rows: the table, with its columns of comparisons.
        seeds: rows of `average_folds`.
        reference: the label of the reference.
        metric: the metric.
        is_chosen: whether the reference was chosen by these figures.
    """
    of_classes = metric if metric.removeprefix(FINEST) in BY_QUERY else DEFAULT_METRIC
    classes, refused = (
        ([], {}) if len(rows) < 2 else compare_classes(seeds, reference, of_classes, of_classes == metric)
    )
    title, *sentences = describe_comparisons(rows, metric, is_chosen) or [""]
    cells, best, split = format_cells(rows), _best_figures(rows), SPLITS[seeds[0]["split"]]
    shown = [name for name in cells[0] if name != "Selection optimism"]  # which has a section of its own
    short = {name: name.removeprefix(f"{split} ").removesuffix(", selected") for name in shown}
    table = [
        report.ComparedRow(
            label=row["Configuration"],
            cells=[(short[name], of_row[name]) for name in shown],
            best={short[name] for name in shown if len(rows) > 1 and name in best and row[name] == best[name]},
            difference=Difference(row["Difference"], row["Difference from"], row["Difference to"]),
            p="" if math.isnan(row["p, Holm"]) else _format_p(row["p, Holm"]),
            holds=row["p, Holm"] < significance.LEVEL,
            is_reference=row["In words"] == THE_REFERENCE,
        )
        for row, of_row in zip(rows, cells)
    ]
    compared = report.ComparedRuns(
        metric=metric,
        split=split,
        lead=summarize_in_words(rows, metric, is_chosen),
        table=table,
        about_table=describe_table(rows),
        title=title.rstrip(":"),
        sentences=[sentence.removeprefix("- ") for sentence in sentences if sentence],
        bands=compute_bands(seeds),
        classes=classes,
        classes_metric=of_classes,
        no_classes=refused,
        optimism=describe_optimism(rows, metric),
        optimism_by_label={
            row["Configuration"]: f"{row['Selection optimism']:+.4f}"
            for row in rows
            if row.get("Selection optimism by run")
        },
        further={row["Configuration"]: row["Further flags"] for row in rows if "Further flags" in row},
        runs=[_list_run(row["Configuration"], run) for row in seeds for run in row["folds"].values()],
    )
    report.save_comparison_page(path, compared)
    auxiliaries.notice(f"page in {path}")


def _list_run(label: str, run: Row) -> tuple[str, str, str, str, str, str]:
    """A run as the page lists it."""
    optimism = "" if math.isnan(run["optimism"]) else f"{run['optimism']:+.4f}"
    seed, fold = ("" if run[name] is None else str(run[name]) for name in ("seed", "fold"))
    return label, seed, fold, f"{run['selected']:.4f}", optimism, str(run["folder"])


def summarize_in_words(rows: Sequence[Row], metric: str, is_chosen: bool) -> str:
    """One sentence or two: what is compared, and how many differences hold."""
    num_runs = sum(row["Runs"] for row in rows)
    what = f"{num_runs} run{'s' * (num_runs != 1)} of {len(rows)} configuration{'s' * (len(rows) != 1)}"
    if len(rows) < 2:
        return f"{what}."
    reference = next(row["Configuration"] for row in rows if row["In words"] == THE_REFERENCE)
    others = [row for row in rows if row["In words"] != THE_REFERENCE]
    holds = [row for row in others if row["p, Holm"] < significance.LEVEL]
    which = f"{reference} has the best {metric}" if is_chosen else f"The reference is {reference}"
    if len(others) == 1:
        told = "the difference holds" if holds else "no difference can be told"
    else:
        told = f"{len(holds) or 'none'} of {len(others)} differences to it {'holds' if len(holds) == 1 else 'hold'}"
    return f"{what}. {which}; {told}."


def build_parser() -> auxiliaries.FlagParser:
    """The parser of all flags."""
    parser = auxiliaries.FlagParser(prog="compare.py", description=__doc__)
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Prints the table and which differences hold, draws the curves, and names the folders that are left out.

    Returns:
        The rows of the table, with columns of the comparisons.

    Raises:
        UserError: there is nothing to compare.
    """
    opt = build_parser().parse_args(argv)
    metric = (opt.metrics or [DEFAULT_METRIC])[0] if opt.metric is None else opt.metric
    further = [name for name in dict.fromkeys(opt.metrics or []) if name != metric]
    folders = [Path(folder) for folder in opt.folders]
    if opt.database is not None:
        collect_database(Path(opt.database), folders)
    seeds = average_folds(read_runs(folders, metric, further))
    split, lower_is_better, is_chosen = seeds[0]["split"], evaluate.lower_is_better(metric), opt.reference is None
    rows = summarize(seeds, metric)
    reference = choose_reference(rows, f"{SPLITS[split]} {metric}, selected", lower_is_better, opt.reference)
    comparisons = compare_with(seeds, reference, metric, is_chosen)
    add_optimism(rows, seeds)
    add_comparisons(rows, comparisons, reference, lower_is_better, count_comparisons(len(rows), is_chosen))
    rows = sort_rows(rows, opt.sort, split)
    if opt.json:
        print(auxiliaries.as_json(rows))
    elif opt.csv:
        print(format_csv(rows))
    else:
        print((format_latex if opt.latex else format_markdown)(rows, metric, is_chosen))
    plots.save_bands(opt.svg, compute_bands(seeds), metric)
    auxiliaries.notice(f"curves in {opt.svg}")
    if opt.html is not None:
        save_page(opt.html, rows, seeds, reference, metric, is_chosen)
    return rows


if __name__ == "__main__":
    auxiliaries.run_command(main)
