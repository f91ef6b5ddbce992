"""What takes several training runs: folds and their meta results, resuming, reproducing.

The training run itself is an argument, `train_run(opt, folder, only_check)`: resolved or unresolved flags, the run
folder to create or to continue in, and whether to stop before anything is written; it returns the selected network's
test metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import auxiliaries
import config
import datasets
import evaluate
import features
import loggers
import records
import report
import runs
from auxiliaries import UserError, by_first_rank, notice
from config import with_flags

META_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["Network", "Split", "Metric", "Mean"],
        "properties": {"Mean": {"type": ["number", "null"]}},
    },
}

TrainRun = Callable[..., dict[str, float]]


def run(argv: Sequence[str], train_run: TrainRun) -> dict[str, float]:
    """Trains, resumes or reproduces, as a command line asks for.

    Returns:
        Test metrics: of the selected epoch, or their means over folds; none while other folds are missing.

    Raises:
        UserError: what the user can fix.
    """
    opt, given = config.parse(argv), config.given_flags(argv)
    if opt.resume_training:
        return resume(runs.find_run(opt, given), argv, train_run)
    if opt.reproduce_results is not None:
        return reproduce(Path(opt.reproduce_results), argv, train_run)
    return train(opt, train_run)


# Training: one run, or folds


def train(
    opt: argparse.Namespace, train_run: TrainRun, folder: Path | None = None, source: Path | None = None
) -> dict[str, float]:
    """Trains once, or all folds of a cross-validation, or, with --fold, one of them.

    Args:
        opt: the flags.
        train_run: the training run.
        folder: the run folder to continue in (default: a new one).
        source: a run whose changes of flags are followed, too.
    """
    if opt.split_scheme == "predefined":
        return train_in_stages(opt, train_run, folder, source)
    if opt.fold is not None and opt.savename is None:
        raise UserError("--fold needs --savename, the name that all folds share")
    opt = config.resolve(opt)
    if opt.dry_run:
        return plan_folds(opt, train_run, folder)
    is_new = folder is None
    if folder is None:
        runs.check_folder(runs.default_folder(opt))
        check_data(with_flags(opt, fold=opt.fold or 0))  # before a folder is created
        loggers.check(opt.logger)
        folder = open_parent_folder(opt)
    auxiliaries.remove_folder(folder / "meta")  # until all folds are done
    source_folds = runs.fold_folders(source) if source else {}
    try:
        for fold in range(opt.num_training_sets) if opt.fold is None else [opt.fold]:
            print(f"\nfold {fold} of {opt.num_training_sets}")
            fold_folder, fold_opt = folder / f"fold_{fold}", with_flags(opt, fold=fold)
            if is_finished(fold_folder, fold_opt):
                print(f"{fold_folder} is finished")
                continue
            source_fold = source_folds.get(fold) or source_folds.get(None)
            train_in_stages(fold_opt, train_run, fold_folder, source_fold)
    except UserError:
        if is_new and opt.fold is None and not any(folder.glob("fold_*")):
            auxiliaries.remove_folder(folder)  # nothing has been trained
        raise
    return write_meta_results(opt, folder)


def plan_folds(opt: argparse.Namespace, train_run: TrainRun, folder: Path | None) -> dict[str, float]:
    """Prints what training all folds, or the one of --fold, would do."""
    folder = folder or runs.default_folder(opt)
    for fold in range(opt.num_training_sets) if opt.fold is None else [opt.fold]:
        print(f"\nfold {fold} of {opt.num_training_sets}")
        train_run(with_flags(opt, fold=fold), folder / f"fold_{fold}")
    return {}


def check_data(opt: argparse.Namespace) -> None:
    """Makes sure that the resolved flags' data can be read, split and formed into batches.

    Raises:
        UserError: they can't.
    """
    datasets.give_dataloaders(opt, datasets.give_splits(opt))


@by_first_rank
def open_parent_folder(opt: argparse.Namespace) -> Path:
    """The folder of all folds: a new one, or with --fold that of the folds that other machines train.

    Raises:
        UserError: it can't be created, or holds this fold or folds of other flags.
    """
    folder = runs.default_folder(opt)
    parent_opt = with_flags(opt, fold=None)

    def describe(into: Path) -> None:
        config.save_config(into / "config.yaml", config.configuration(parent_opt))
        environment = runs.describe_environment(auxiliaries.pick_device(opt.gpu))
        auxiliaries.save_json(into / "environment.json", environment)

    if opt.fold is None:
        return runs.create_folder(folder, describe)
    if not folder.exists():
        try:
            return runs.create_folder(folder, describe, may_be_numbered=False)
        except UserError:
            if not folder.exists():  # created by another machine meanwhile
                raise
    others = _configuration_changes(runs.load_flags(folder), parent_opt)
    if others:
        raise UserError(f"{folder} has folds with another --{others[0]}: give the same flags, or another --savename")
    if (folder / f"fold_{opt.fold}").exists():
        raise UserError(
            f"{folder / f'fold_{opt.fold}'} exists: continue it with --resume_training, or choose another --savename"
        )
    return folder


def _configuration_changes(before: argparse.Namespace, after: argparse.Namespace) -> list[str]:
    """The changed flags, without those that only say where a run is made."""
    machine = config.build_parser().names_with(machine=True)
    return [name for name in config.changed_flags(before, after) if name not in machine]


def train_in_stages(
    opt: argparse.Namespace, train_run: TrainRun, folder: Path | None, source: Path | None
) -> dict[str, float]:
    """One training run; it follows a `source` whose flags were changed on resuming through the same changes.

    Each stage is an ordinary run that ends with the epoch after which the source's flags were changed, and the next
    stage resumes it.
    """
    stages: list[dict[str, Any]] = []
    for row in records.read_configurations(source) if source else []:
        stages = [stage for stage in stages if stage["Epochs"] < row["Epochs"]]
        if not stages or stages[-1]["Configuration"] != row["Configuration"]:
            stages.append(row)
    same = {name: getattr(opt, name) for name in config.build_parser().names_with(machine=True)}
    for stage, following in itertools.pairwise(stages):
        stage_flags = {**config.with_todays_names(stage["Configuration"]), **same, "n_epochs": following["Epochs"]}
        train_run(with_flags(opt, **stage_flags), folder)
    return train_run(opt, folder)


# Meta results: over folds


@by_first_rank
def is_finished(folder: Path, opt: argparse.Namespace) -> bool:
    """Whether a fold is finished, with flags that give the same results as these."""
    if not (folder / "summary.json").exists():
        return False
    stored = runs.load_flags(folder)
    same = {name: getattr(stored, name) for name in ("fold", "meta_testing_method", "normalize_members")}
    return not _configuration_changes(stored, config.resolve(with_flags(opt, **same)))


def write_meta_results(opt: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Writes and prints mean, deviation and confidence interval over all folds, once all are finished.

    Returns:
        The mean test metrics of the selected networks; none before that.
    """
    folds = [folder / f"fold_{fold}" for fold in range(opt.num_training_sets)]
    finished = [path for path in folds if is_finished(path, opt)]
    if len(finished) < len(folds):
        counts = f"{len(finished)} of {len(folds)} folds are finished with these flags"
        print(f"{counts}: the last one writes {folder / 'meta'}")
        return {}
    finished = _with_same_test_data(finished)
    summaries = [runs.read_summary(path) for path in finished]
    rows = [
        {"Network": model, "Split": split, **over_folds(metric, [summary[model][split] for summary in summaries])}
        for model in ("selected", "last")
        for split in ("val", "test")
        for metric in summaries[0][model][split]
    ]
    if opt.meta_testing_method:
        rows += [
            {"Network": opt.meta_testing_method, "Split": "test", "Metric": name, "Mean": value, "Folds": len(finished)}
            for name, value in evaluate_concatenation(opt, finished).items()
        ]
    records.save_meta_rows(folder / "meta", rows)
    report.save_folds_page(opt, folder, rows, dict(zip(finished, summaries)))
    print(f"\nmean over {len(finished)} folds ± half of its 95 % confidence interval, in {folder / 'meta'}:\n")
    print(records.format_table([_in_words(row) for row in rows]))
    return {row["Metric"]: row["Mean"] for row in rows if (row["Network"], row["Split"]) == ("selected", "test")}


def _in_words(row: records.Row) -> records.Row:
    """A row of meta results as it is printed."""
    half = row.get("CI 95 %", float("nan"))
    mean = f"{row['Mean']:.4f}" + (f" ± {half:.4f}" if half == half else "")
    return {name: row[name] for name in ("Network", "Split", "Metric")} | {"Mean": mean}


def _with_same_test_data(folds: Sequence[Path]) -> list[Path]:
    """The folds that were tested on the images of the first one; a notice names the others."""
    first = runs.test_data(folds[0])
    same = [path for path in folds if runs.test_data(path) == first]
    for path in set(folds) - set(same):
        notice(f"{path} is left out: its test images differ from those of {folds[0]}")
    return same


def over_folds(metric: str, results: Sequence[Mapping[str, float]]) -> records.Row:
    """Mean of a metric and, of several folds, standard deviation and half of the 95 % confidence interval."""
    mean, deviation, half = auxiliaries.mean_and_interval([result[metric] for result in results])
    spread = {"Std": deviation, "CI 95 %": half} if len(results) > 1 else {}
    return {"Metric": metric, "Mean": mean, **spread, "Folds": len(results)}


def evaluate_concatenation(opt: argparse.Namespace, folds: Sequence[Path]) -> dict[str, float]:
    """Metrics of the test images, each embedded by the best networks of all folds, side by side."""
    opt = config.resolve(with_flags(opt, fold=0))
    device = auxiliaries.pick_device(opt.gpu, opt.deterministic)
    image_loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt), pin_memory=device.type == "cuda")
    loaders, by_fold = image_loaders, []
    for folder in folds:
        net = runs.load_network(folder, opt, device)
        if opt.cache_features is not None:
            loaders = features.give_cached_loaders(opt, image_loaders, [net], device)
        by_fold.append([evaluate.embed_set(net, images, device) for images in loaders.test])
    together = [concatenate(by_network, opt.normalize_members) for by_network in zip(*by_fold)]
    # The folds have no validation classes in common: there is no threshold for verification.
    all_levels = opt.label_hierarchy_level == datasets.ALL_LEVELS
    which = opt.k_vals, opt.eval_metrics, opt.testing_method
    clustering = evaluate.give_clustering(opt)
    metrics, _ = evaluate.evaluate_points(together, *which, {}, all_levels, clustering=clustering)
    return metrics


def concatenate(
    sets: Sequence[datasets.RetrievalSet[evaluate.Points]], normalize: bool
) -> datasets.RetrievalSet[evaluate.Points]:
    """One set, embedded by several networks, with their embeddings `(N, D)` side by side: `(N, networks · D)`.

    Args:
        sets: the set as each network embeds it.
        normalize: whether each network's embeddings are scaled to length 1 before.
    """

    def side_by_side(parts: Sequence[evaluate.Points]) -> evaluate.Points:
        members = [F.normalize(part.embeddings, dim=1) if normalize else part.embeddings for part in parts]
        return dataclasses.replace(parts[0], embeddings=torch.cat(members, dim=1))

    galleries = [one.gallery for one in sets if one.gallery is not None]
    query, gallery = side_by_side([one.query for one in sets]), side_by_side(galleries) if galleries else None
    return datasets.RetrievalSet(sets[0].name, query, gallery)


# Resuming a run


def resume(folder: Path, argv: Sequence[str], train_run: TrainRun) -> dict[str, float]:
    """Continues a run, or all folds of one, with its own flags and those of the command line on top."""
    opt = config.parse(argv, runs.config_file(folder))
    parent_opt = config.resolve(with_flags(opt, fold=None))
    flags_of = _resumed_flags(folder, opt)
    if opt.dry_run:
        return train(opt, train_run, folder)
    with contextlib.ExitStack() as locks:
        for path in {folder, *flags_of}:  # nothing is changed in a run that another process is using
            locks.enter_context(auxiliaries.locked(path))
        for path, flags in flags_of.items():
            runs.check_flags(path, flags)
        is_complete = len(flags_of) == (parent_opt.num_training_sets or 1)
        if is_complete and all(runs.is_trained(path, flags) for path, flags in flags_of.items()):
            notice(f"{folder} is finished: nothing is left to train, and its flags stay as they are")
            return report_finished(folder, parent_opt)
        if opt.split_scheme != "predefined":  # before anything changes in one fold, all must be able to continue
            for fold in range(parent_opt.num_training_sets) if opt.fold is None else [opt.fold]:
                train_run(with_flags(opt, fold=fold), folder / f"fold_{fold}", only_check=True)
            runs.change_flags(folder, flags_of, parent_opt)
            opt = with_flags(opt, resume_training="latest")  # they have gone back, if they were to
    return train(opt, train_run, folder)


def _resumed_flags(folder: Path, opt: argparse.Namespace) -> dict[Path, argparse.Namespace]:
    """The run's training runs, all folds or the one that --fold names, and their resolved flags.

    Raises:
        UserError: more folds have begun than the flags ask for.
    """
    fold_paths = runs.fold_folders(folder)
    if opt.fold is not None and None not in fold_paths:
        fold_paths = {fold: path for fold, path in fold_paths.items() if fold == opt.fold}
    count = config.resolve(with_flags(opt, fold=None)).num_training_sets
    begun = [fold for fold in fold_paths if fold is not None and fold >= count]
    if begun:
        raise UserError(f"{folder} has begun with fold {begun[0]} already: drop --num_training_sets {count}")
    return {path: config.resolve(with_flags(opt, fold=fold)) for fold, path in fold_paths.items()}


def report_finished(folder: Path, opt: argparse.Namespace) -> dict[str, float]:
    """Prints how a finished run ended, and returns its test metrics."""
    if opt.split_scheme != "predefined":
        return write_meta_results(opt, folder)
    summary = runs.read_summary(folder)
    records.print_summary(summary)
    return runs.test_metrics(summary)


# Reproducing a run


def reproduce(source: Path, argv: Sequence[str], train_run: TrainRun) -> dict[str, float]:
    """Runs a run folder's configuration again in a new folder, and prints both results side by side."""
    opt = config.parse(argv, runs.config_file(source))
    if "savename" not in config.given_flags(argv):
        opt.savename = f"{source.resolve().name}_reproduced"
    before, after = runs.load_flags(source), config.resolve(opt)
    changes = config.changed_flags(before, after)
    if changes:
        print(f"other flags than the original's: {runs.as_flags(changes)}")
    warn_of_changes(source, after, auxiliaries.pick_device(opt.gpu))
    original = read_results(runs.fold_folders(source).get(opt.fold, source))
    if not original:
        notice(f"{source} isn't finished: there is nothing to compare with")
    is_followed = not _configuration_changes(before, after)
    if not is_followed:
        notice("with other flags, the original's changes of flags on resuming, if any, are not followed")
    environment = runs.describe_environment(auxiliaries.pick_device(opt.gpu))
    if opt.dry_run:
        return train(opt, train_run)
    folder = runs.create_folder(
        runs.default_folder(after), lambda into: runs.write_description(into, after, environment)
    )
    try:
        results = train(opt, train_run, folder, source if is_followed else None)
    except UserError:
        if not any(folder.rglob("last.pth.tar")):
            auxiliaries.remove_folder(folder)  # nothing has been trained
        raise
    print_side_by_side(original, read_results(runs.fold_folders(folder).get(opt.fold, folder)))
    return results


def print_side_by_side(original: Mapping[str, float], reproduced: Mapping[str, float]) -> None:
    """Prints each result of two runs with the difference."""
    print(f"\n{'':34}{'original':>12}{'reproduced':>12}{'difference':>12}")
    for name, value in reproduced.items():
        was = original.get(name, float("nan"))
        print(f"{name:34}{was:12.4f}{value:12.4f}{value - was:+12.4f}")


def warn_of_changes(source: Path, opt: argparse.Namespace, device: torch.device) -> None:
    """Warns where data, versions or hardware differ from those of the original run."""
    fold, path = next(iter(runs.fold_folders(source).items()))
    data = runs.read_data(path)
    if data is not None:
        splits = datasets.give_splits(config.resolve(with_flags(opt, fold=fold)))
        for difference in runs.differing_data(data, runs.describe_data(opt, splits)):
            notice(f"{difference} in the original: figures will differ")
    if not (path / "environment.json").exists():
        return
    original, now = auxiliaries.load_json(path / "environment.json"), runs.describe_environment(device)
    for name, value in now.items():
        if name not in ("command", "git tree is dirty") and original.get(name) != value:
            notice(f"{name} is {value}, and was {original.get(name)} in the original: figures may differ")


@by_first_rank
def read_results(folder: Path) -> dict[str, float]:
    """A finished run's results, named by network and metric; empty where it isn't finished."""
    meta = folder / "meta/results.json"
    if meta.exists():
        rows = auxiliaries.load_json(meta)
        auxiliaries.check_schema(meta, rows, META_SCHEMA, "--resume_training writes it anew")
        means = [float("nan") if row["Mean"] is None else row["Mean"] for row in rows]
        return {f"{row['Network']}, {row['Split']}, {row['Metric']}": mean for row, mean in zip(rows, means)}
    if not (folder / "summary.json").exists():
        return {}
    summary = runs.read_summary(folder)
    return {
        f"{model}, {split}, {metric}": value
        for model in ("selected", "last")
        for split in ("val", "test")
        for metric, value in summary[model].get(split, {}).items()
    }
