"""One table, and one plot, of several runs: grouped by configuration without the seed, over seeds and folds."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import auxiliaries
import records
from auxiliaries import UserError
from evaluate import mean_over_sets

# What doesn't make a configuration another one: the seed, the fold, where it ran, and what it recorded.
NOT_COMPARED = {
    *("seed", "fold", "savename", "save_path", "source_path", "download", "download_url", "gpu", "kernels", "eval_bs"),
    *("log_every", "tensorboard", "check_untrained_accuracy", "dist_measure", "grad_measure", "k_vals", "eval_metrics"),
    *("num_training_sets", "meta_testing_method"),
}


@dataclass(frozen=True)
class Result:
    """A finished training run: its flags, one metric's test values, how long it took, and its curve by epoch."""

    folder: Path
    flags: Mapping[str, Any]
    selected: float
    last: float
    seconds: float
    curve: Mapping[int, float]


@dataclass
class Group:
    """Runs of one configuration."""

    flags: Mapping[str, Any]
    results: list[Result] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="run folders, such as Training_Results/cub200/*")
    parser.add_argument("--metric", default="Recall @ 1", help="what is compared, as log_val_Base.csv names it")
    parser.add_argument("--svg", default="comparison.svg", metavar="FILE", help="where the curves are drawn")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV instead of Markdown")
    form.add_argument("--json", action="store_true", help="print JSON instead of Markdown")


def read_result(folder: Path, metric: str) -> Result:
    """Reads a training run's folder.

    Raises:
        UserError: it is no run folder, the run isn't finished, something is damaged, or it has no such metric.
    """
    if not folder.exists():
        raise UserError("not begun")
    if not (folder / "config.yaml").is_file():
        raise UserError("no run folder: it has no config.yaml")
    if not (folder / "summary.json").is_file():
        raise UserError("unfinished: it has no summary.json; --resume_training goes on with it")
    summary = records.read_summary(folder)
    models = {name: summary[name].get("test") or summary[name]["val"] for name in ("selected", "last")}
    file = folder / "config.yaml"
    try:
        flags = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(flags, dict):
            raise ValueError("it is no mapping of flags")
        file = folder / "summary.json"
        values = {name: float(mean_over_sets(metrics, metric)) for name, metrics in models.items()}
        seconds = float(summary["seconds"])
        file = folder / records.LOGS["val"]
        with open(file, newline="", encoding="utf-8") as log:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(log)]
        values_by_epoch = {int(row["Epochs"]): mean_over_sets(row, metric) for row in rows}
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{file.name} is damaged: {' '.join(str(error).split())}") from None
    curve = {epoch: value for epoch, value in values_by_epoch.items() if math.isfinite(value)}
    if math.isnan(values["selected"]):
        near = auxiliaries.nearest_name(metric, models["selected"])
        raise UserError(f"it has no {metric}{near}: --evaluate computes further metrics, one run at a time")
    return Result(folder, flags, values["selected"], values["last"], seconds, curve)


def read_all(folders: Iterable[Path], metric: str) -> tuple[list[Result], dict[Path, str]]:
    """All training runs in the folders, and what is wrong with those that can't be read."""
    results: list[Result] = []
    broken: dict[Path, str] = {}
    for folder in folders:
        for run in expected_runs(folder):
            try:
                results.append(read_result(run, metric))
            except UserError as error:
                broken[run] = str(error)
    return results, broken


def expected_runs(folder: Path) -> list[Path]:
    """The folders of a run's folds, those that are still to come included; or the folder itself."""
    present = records.training_runs(folder)
    if None in present:
        return [folder]
    try:
        count = int(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["num_training_sets"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        count = 0
    return sorted({*present.values(), *(folder / f"fold_{i}" for i in range(count))})


def group(results: Sequence[Result]) -> list[Group]:
    """The runs by configuration, in order of appearance; of several with one seed and fold, the first."""
    groups: dict[str, Group] = {}
    for result in results:
        flags = {name: value for name, value in sorted(result.flags.items()) if name not in NOT_COMPARED}
        one = groups.setdefault(json.dumps(flags, default=str), Group(flags))
        draw = (result.flags.get("seed"), result.flags.get("fold"))
        same = [other for other in one.results if (other.flags.get("seed"), other.flags.get("fold")) == draw]
        if same:
            auxiliaries.notice(f"{result.folder} is left out: it repeats {same[0].folder}, seed included")
        else:
            one.results.append(result)
    return list(groups.values())


def give_labels(groups: Sequence[Group]) -> list[str]:
    """What tells the groups apart: the flags that differ; for one group, what it trained."""
    names = sorted({name for one in groups for name in one.flags})
    apart = [name for name in names if len({str(one.flags.get(name)) for one in groups}) > 1]
    return [
        ", ".join(f"{name} {one.flags.get(name)}" for name in apart or ("dataset", "arch", "loss")) for one in groups
    ]


def give_rows(groups: Sequence[Group], metric: str) -> list[records.Row]:
    """The table's rows: means with half of their 95 % confidence intervals."""
    rows = []
    for label, one in zip(give_labels(groups), groups):
        row: records.Row = {"Configuration": label, "Runs": len(one.results)}
        for model in ("selected", "last"):
            mean, _, half = auxiliaries.mean_and_interval([getattr(result, model) for result in one.results])
            row |= {f"{metric}, {model}": mean, f"CI 95 %, {model}": half}
        row["Seconds"] = sum(result.seconds for result in one.results) / len(one.results)
        rows.append(row)
    return rows


def as_markdown(rows: Sequence[records.Row], metric: str) -> str:
    """The rows as a Markdown table."""
    lines = [f"| Configuration | Runs | {metric}, selected | {metric}, last | Seconds |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [row["Configuration"], str(row["Runs"])]
        for model in ("selected", "last"):
            half = row[f"CI 95 %, {model}"]
            cells.append(f"{row[f'{metric}, {model}']:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}"))
        lines.append(f"| {' | '.join([*cells, format(row['Seconds'], '.1f')])} |")
    return "\n".join(lines)


def as_csv(rows: Sequence[records.Row]) -> str:
    """The rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip()


def give_bands(groups: Sequence[Group]) -> dict[str, list[tuple[int, float, float]]]:
    """For each group its curve: (epoch, mean, half of the confidence interval), where all its runs were evaluated."""
    bands = {}
    for label, one in zip(give_labels(groups), groups):
        shared = sorted(set.intersection(*(set(result.curve) for result in one.results)))
        points = [(epoch, [result.curve[epoch] for result in one.results]) for epoch in shared]
        of_epochs = [(epoch, *auxiliaries.mean_and_interval(values)) for epoch, values in points]
        bands[label] = [(epoch, mean, half) for epoch, mean, _, half in of_epochs]
    return bands


def main(argv: Sequence[str] | None = None) -> list[records.Row]:
    """Prints the table, draws the curves, and lists folders that are not in it.

    Raises:
        UserError: there is nothing to compare.
    """
    parser = auxiliaries.FlagParser(prog="compare.py", description=__doc__)
    add_arguments(parser)
    opt = parser.parse_args(argv)
    results, broken = read_all(map(Path, opt.folders), opt.metric)
    for folder, reason in broken.items():
        auxiliaries.notice(f"{folder} is left out: {reason}")
    if not results:
        raise UserError("none of the folders holds a finished run to compare")
    groups = group(results)
    rows = give_rows(groups, opt.metric)
    if opt.json:
        print(json.dumps(auxiliaries.plain(rows), indent=1, ensure_ascii=False))
    else:
        print(as_csv(rows) if opt.csv else as_markdown(rows, opt.metric))
    records.save_bands(Path(opt.svg), give_bands(groups), opt.metric)
    auxiliaries.notice(f"curves in {opt.svg}")
    return rows


if __name__ == "__main__":
    auxiliaries.run_command(main)
