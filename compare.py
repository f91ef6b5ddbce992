"""One table and one plot of several runs: grouped by configuration, without the seed, over seeds and folds."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import auxiliaries
import plots
import records
import runs
from auxiliaries import UserError

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("selected", "last")


def add_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags."""
    # fmt: off
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="run folders, such as Training_Results/cub200/*")
    add("--metric", default="Recall @ 1", help="the metric to compare, as log_val_Base.csv names it")
    add("--svg", default="comparison.svg", metavar="FILE", help="where to draw the curves")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--csv", action="store_true", help="print CSV instead of Markdown")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    # fmt: on


# Reading runs


def read_run(folder: Path, metric: str) -> dict[str, Any]:
    """Reads the folder of one training run.

    Returns:
        `folder`, `seed`, `fold`, `flags` (those that are compared, as text), the metric's value of each of `MODELS`,
        `seconds`, and `curve` (the metric by epoch).

    Raises:
        UserError: it is not a run folder, the run isn't finished, something is damaged, or it has no such metric.
    """
    if not folder.exists():
        raise UserError("not begun")
    flags = runs.read_configuration(folder)
    if not (folder / "summary.json").is_file():
        raise UserError("unfinished: it has no summary.json; continue it with --resume_training")
    summary = runs.read_summary(folder)
    file = folder / "summary.json"
    try:
        metrics = {model: summary[model].get("test") or summary[model]["val"] for model in MODELS}
        values = {model: float(records.mean_over_sets(metrics[model], metric)) for model in MODELS}
        seconds = float(summary["seconds"])
        file = folder / records.LOGS["val"]
        with open(file, newline="", encoding="utf-8") as log:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(log)]
        by_epoch = {int(row["Epochs"]): records.mean_over_sets(row, metric) for row in rows}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file.name} is damaged: {' '.join(str(error).split())}") from None
    if math.isnan(values["selected"]):
        near = auxiliaries.nearest_name(metric, metrics["selected"])
        raise UserError(f"it has no {metric}{near}: --evaluate computes further metrics, one run at a time")
    return {
        "folder": folder,
        "seed": flags.get("seed"),
        "fold": flags.get("fold"),
        "flags": {name: str(value) for name, value in runs.compared_flags(flags).items()},
        **values,
        "seconds": seconds,
        "curve": {epoch: value for epoch, value in by_epoch.items() if math.isfinite(value)},
    }


def expected_folders(folder: Path) -> list[Path]:
    """The folders of a run's folds, including those that are still to come; or the folder of a single training run."""
    present = runs.fold_folders(folder)
    if None in present:
        return [folder]
    try:
        count = int(runs.read_configuration(folder)["num_training_sets"])
    except (UserError, KeyError, TypeError, ValueError):
        count = 0
    return sorted({*present.values(), *(folder / f"fold_{fold}" for fold in range(count))})


def read_table(folders: Iterable[Path], metric: str) -> pd.DataFrame:
    """A table of the finished training runs in the folders, one per row; a notice names what is left out, and why.

    Its columns are what `read_run` returns, with the label of the configuration in place of the flags.

    Raises:
        UserError: there is nothing to compare.
    """
    import pandas as pd

    rows = []
    for training_folder in itertools.chain.from_iterable(map(expected_folders, folders)):
        try:
            rows.append(read_run(training_folder, metric))
        except UserError as error:
            auxiliaries.notice(f"{training_folder} is left out: {error}")
    if not rows:
        raise UserError("none of the folders holds a finished run to compare")
    table = pd.DataFrame(rows)
    flags = pd.DataFrame([row["flags"] for row in rows]).fillna("None")
    table["Configuration"] = label_configurations(flags)
    return drop_repeated(table)


def label_configurations(flags: pd.DataFrame) -> list[str]:
    """A label for each row: the flags that differ between rows, or, where none does, what was trained."""
    names = sorted(str(name) for name in flags if flags[name].nunique() > 1)
    names = names or [name for name in ("dataset", "arch", "loss") if name in flags]
    return [", ".join(f"{name} {row[name]}" for name in names) for row in flags.to_dict("records")]


def drop_repeated(table: pd.DataFrame) -> pd.DataFrame:
    """Keeps the first of several runs with one configuration, seed and fold; a notice names the others."""
    draw = ["Configuration", "seed", "fold"]
    first = table.groupby(draw, dropna=False)["folder"].transform("first")
    is_repeated = table.duplicated(draw)
    for folder, kept in zip(table["folder"][is_repeated], first[is_repeated]):
        auxiliaries.notice(f"{folder} is left out: it repeats {kept}, including the seed")
    return table[~is_repeated]


# Comparing them


def summarize(table: pd.DataFrame, metric: str) -> list[records.Row]:
    """One row per configuration: means over its runs, with half the width of their 95 % confidence intervals."""
    rows = []
    for label, group in table.groupby("Configuration", sort=False):
        row: records.Row = {"Configuration": label, "Runs": len(group)}
        for model in MODELS:
            mean, _, half = auxiliaries.mean_and_interval(group[model].tolist())
            row |= {f"{metric}, {model}": mean, f"CI 95 %, {model}": half}
        row["Seconds"], _, _ = auxiliaries.mean_and_interval(group["seconds"].tolist())
        rows.append(row)
    return rows


def compute_bands(table: pd.DataFrame) -> dict[str, list[tuple[int, float, float]]]:
    """For each configuration its points (epoch, mean, half the width of the confidence interval).

    They are of the epochs in which all its runs were evaluated.
    """
    import pandas as pd

    bands = {}
    for label, group in table.groupby("Configuration", sort=False):
        curves = pd.DataFrame(group["curve"].tolist()).dropna(axis="columns").sort_index(axis="columns")
        points = {epoch: auxiliaries.mean_and_interval(curves[epoch].tolist()) for epoch in curves}
        bands[str(label)] = [(int(epoch), mean, half) for epoch, (mean, _, half) in points.items()]
    return bands


def format_markdown(rows: Sequence[records.Row], metric: str) -> str:
    """The rows as a Markdown table."""
    lines = [f"| Configuration | Runs | {metric}, selected | {metric}, last | Seconds |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["Configuration"], str(row["Runs"])]
        for model in MODELS:
            half = row[f"CI 95 %, {model}"]
            cells.append(f"{row[f'{metric}, {model}']:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}"))
        lines.append(f"| {' | '.join([*cells, format(row['Seconds'], '.1f')])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[records.Row]:
    """Prints the table, draws the curves, and names the folders that are left out.

    Raises:
        UserError: there is nothing to compare.
    """
    parser = auxiliaries.FlagParser(prog="compare.py", description=__doc__)
    add_arguments(parser)
    opt = parser.parse_args(argv)
    table = read_table(map(Path, opt.folders), opt.metric)
    rows = summarize(table, opt.metric)
    if opt.json:
        print(json.dumps(auxiliaries.to_builtin(rows), indent=1, ensure_ascii=False))
    elif opt.csv:
        import pandas as pd

        print(pd.DataFrame(rows).to_csv(index=False, na_rep="nan", lineterminator="\n").rstrip())
    else:
        print(format_markdown(rows, opt.metric))
    plots.save_bands(Path(opt.svg), compute_bands(table), opt.metric)
    auxiliaries.notice(f"curves in {opt.svg}")
    return rows


if __name__ == "__main__":
    auxiliaries.run_command(main)
