"""What takes several training runs, or none: folds, meta results, resuming, reproducing, evaluating a finished run."""

from __future__ import annotations

import argparse
import contextlib
import glob
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import nn

import auxiliaries
import config
import datasets
import evaluate
import main
import netlib
import records
from auxiliaries import UserError, notice
from evaluate import EmbeddedSet, Points

NEEDS_EVALUATE = (
    *("splits_to_eval", "eval_reference_set", "eval_normalize_embeddings", "eval_use_trunk_output"),
    *("eval_pca", "eval_size_of_tsne"),
)
NEEDS_CROSS_VALIDATION = (
    *("test_size", "test_start_idx", "num_training_partitions", "num_training_sets", "fold", "meta_testing_method"),
)
# where a run is made, not what it is
ELSEWHERE = ("savename", "save_path", "source_path", "download", "download_url", "gpu", "kernels")


def run(argv: Sequence[str]) -> dict[str, float]:
    """Does what a command line asks for.

    Returns:
        Test metrics: of the selected epoch, or their means over folds.

    Raises:
        UserError: what the user can mend.
    """
    opt = main.parse_args(argv)
    given = config.given_flags(main.give_parser(), argv)
    modes = [name for name in ("resume_training", "reproduce_results", "evaluate") if getattr(opt, name) is not None]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} contradict each other: leave one out")
    useless = [name for name in NEEDS_EVALUATE if name in given and opt.evaluate is None]
    if useless:
        raise UserError(f"--{useless[0]} says how to --evaluate a finished run: add that, or leave it out")
    defaults = main.parse_args([])
    folds_only = [name for name in NEEDS_CROSS_VALIDATION if getattr(opt, name) != getattr(defaults, name)]
    if folds_only and opt.split_scheme == "predefined" and not modes:
        raise UserError(f"--{folds_only[0]} needs --split_scheme cross_validation: predefined splits have no folds")
    if opt.evaluate is not None:
        folder = Path(opt.evaluate) if opt.evaluate else find_run(opt, given)
        return evaluate_run(folder, argv)
    if opt.resume_training:
        return resume(find_run(opt, given), argv)
    if opt.reproduce_results is not None:
        return reproduce(Path(opt.reproduce_results), argv, given)
    return train(opt)


def find_run(opt: argparse.Namespace, given: Mapping[str, Any]) -> Path:
    """The folder of the run that --savename names, of any data set unless --dataset says which.

    Raises:
        UserError: there is none, or more than one.
    """
    if "savename" not in given:
        raise UserError("which run? Name it with --savename")
    pattern = f"{glob.escape(opt.dataset) if 'dataset' in given else '*'}/{glob.escape(opt.savename)}"
    found = sorted(path for path in Path(opt.save_path).glob(pattern) if path.is_dir())
    if not found:
        names = [path.name for path in Path(opt.save_path).glob("*/*") if path.is_dir()]
        near = auxiliaries.nearest_name(opt.savename, names)
        raise UserError(f"there is no run {Path(opt.save_path) / pattern}{near}")
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found))} have that name: say which with --dataset")
    return found[0]


def stored_configuration(folder: Path) -> Path:
    """A run's config.yaml.

    Raises:
        UserError: the folder has none, or is of a later version of this repository.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    if (folder / "environment.json").exists():
        auxiliaries.check_version(folder / "environment.json", auxiliaries.load_json(folder / "environment.json"))
    return folder / "config.yaml"


def with_flags(opt: argparse.Namespace, **flags: Any) -> argparse.Namespace:
    """A copy of the flags with others in place of some."""
    return argparse.Namespace(**{**vars(opt), **flags})


# Training: one run, or folds


def train(opt: argparse.Namespace, folder: Path | None = None, source: Path | None = None) -> dict[str, float]:
    """Trains once, or all folds of a cross-validation, or, with --fold, one of them.

    Args:
        opt: the flags.
        folder: the run folder to go on in (default: a new one).
        source: a run to follow through the changes of its flags, too.
    """
    if opt.split_scheme == "predefined":
        return train_in_stages(opt, folder, source)
    if opt.fold is not None and opt.savename is None:
        raise UserError("--fold needs --savename, the name that all folds share")
    opt = main.resolve(opt)
    is_new = folder is None
    if folder is None:
        auxiliaries.check_run_folder(Path(opt.save_path) / opt.dataset, opt.savename)
        check_data(with_flags(opt, fold=opt.fold or 0))  # before a folder is made
        folder = give_parent_folder(opt)
    shutil.rmtree(folder / "meta", ignore_errors=True)  # until all folds are at their end
    try:
        for fold in range(opt.num_training_sets) if opt.fold is None else [opt.fold]:
            print(f"\nfold {fold} of {opt.num_training_sets}")
            runs = records.training_runs(source) if source else {}
            of_source = runs.get(fold) or runs.get(None)
            train_in_stages(with_flags(opt, fold=fold), folder / f"fold_{fold}", of_source)
    except UserError:
        if is_new and opt.fold is None and not any(folder.glob("fold_*")):
            shutil.rmtree(folder)  # nothing has been trained
        raise
    return give_meta_results(opt, folder)


def check_data(opt: argparse.Namespace) -> None:
    """Makes sure that the resolved flags' data can be read, split and formed into batches.

    Raises:
        UserError: they can't.
    """
    datasets.give_dataloaders(opt, datasets.give_splits(opt))


def give_parent_folder(opt: argparse.Namespace) -> Path:
    """The folder of all folds: a new one, or with --fold that of the folds that other machines train."""
    folder = Path(opt.save_path) / opt.dataset / opt.savename

    def save(into: Path) -> None:
        config.save_config(into / "config.yaml", config.configuration(with_flags(opt, fold=None)), main.give_parser())
        environment = auxiliaries.describe_environment(auxiliaries.pick_device(opt.gpu))
        auxiliaries.save_json(into / "environment.json", environment)

    if opt.fold is None:
        return auxiliaries.create_run_folder(folder.parent, folder.name, save)
    if not folder.exists():
        try:
            return auxiliaries.create_run_folder(folder.parent, folder.name, save, may_be_numbered=False)
        except UserError:
            if not folder.exists():  # by another machine
                raise
    stored_configuration(folder)
    others = [
        name
        for name in config.differences(main.stored_flags(folder), with_flags(opt, fold=None))
        if name not in ELSEWHERE
    ]
    if others:
        raise UserError(f"{folder} has folds with another --{others[0]}: give the same flags, or another --savename")
    if (folder / f"fold_{opt.fold}").exists():
        raise UserError(
            f"{folder / f'fold_{opt.fold}'} exists: --resume_training goes on with it, or choose another --savename"
        )
    return folder


def train_in_stages(opt: argparse.Namespace, folder: Path | None, source: Path | None) -> dict[str, float]:
    """One training run; it follows a `source` whose flags were changed underway through the same changes."""
    stages: list[dict[str, Any]] = []
    for row in records.read_configurations(source) if source else []:
        stages = [stage for stage in stages if stage["Epochs"] < row["Epochs"]]
        if not stages or stages[-1]["Configuration"] != row["Configuration"]:
            stages.append(row)
    same = {name: getattr(opt, name) for name in ELSEWHERE}
    for stage, following in itertools.pairwise(stages):
        main.main(with_flags(opt, **{**stage["Configuration"], **same}), folder, until=following["Epochs"])
        if folder is not None:
            main.describe_flags(folder, main.resolve(opt))
    return main.main(opt, folder)


# Meta results: over folds


def is_finished(folder: Path, opt: argparse.Namespace) -> bool:
    """Whether a fold is at its end, by flags that make the same of it as these."""
    if not (folder / "summary.json").exists():
        return False
    stored_configuration(folder)
    stored = main.stored_flags(folder)
    same = {name: getattr(stored, name) for name in ("fold", "meta_testing_method", *ELSEWHERE)}
    return not config.differences(stored, main.resolve(with_flags(opt, **same)))


def give_meta_results(opt: argparse.Namespace, folder: Path) -> dict[str, float]:
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
    summaries = [records.read_summary(path) for path in finished]
    rows = []
    for model in ("selected", "last"):
        for split in ("val", "test"):
            rows += [
                {
                    "Network": model,
                    "Split": split,
                    **over_folds(metric, [summary[model][split] for summary in summaries]),
                }
                for metric in summaries[0][model][split]
            ]
    if opt.meta_testing_method:
        metrics = concatenated_metrics(opt, finished)
        rows += [
            {
                "Network": opt.meta_testing_method,
                "Split": "test",
                "Metric": metric,
                "Mean": value,
                "Folds": len(finished),
            }
            for metric, value in metrics.items()
        ]
    records.save_meta(folder / "meta", rows)
    print(f"\nover {len(finished)} folds (mean ± half of the 95 % confidence interval), in {folder / 'meta'}:")
    for row in rows:
        interval = f" ± {row['CI 95 %']:.4f}" if "CI 95 %" in row else ""
        print(f"{row['Network']:>12}, {row['Split']:>4} | {row['Metric']} {row['Mean']:.4f}{interval}")
    return {row["Metric"]: row["Mean"] for row in rows if (row["Network"], row["Split"]) == ("selected", "test")}


def over_folds(metric: str, results: Sequence[Mapping[str, float]]) -> records.Row:
    """Mean of a metric and, of several folds, standard deviation and half of the 95 % confidence interval."""
    mean, deviation, half = auxiliaries.mean_and_interval([result[metric] for result in results])
    spread = {"Std": deviation, "CI 95 %": half} if len(results) > 1 else {}
    return {"Metric": metric, "Mean": mean, **spread, "Folds": len(results)}


def load_network(folder: Path, opt: argparse.Namespace, device: torch.device) -> netlib.EmbeddingNet:
    """A run's best network, from its resolved flags.

    Raises:
        UserError: the run has none yet, or it can't be read.
    """
    state = main.best_state(folder)
    net = netlib.networkselect(vars(opt))
    net.load_state_dict(state["state_dict"])
    return net.to(device)


def concatenated_metrics(opt: argparse.Namespace, folds: Sequence[Path]) -> dict[str, float]:
    """Metrics of the test images, each embedded by the best network of every fold, one after the other."""
    opt = main.resolve(with_flags(opt, fold=0))
    device = auxiliaries.pick_device(opt.gpu)
    loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt), pin_memory=device.type == "cuda")
    by_fold = []
    for folder in folds:
        net = load_network(folder, opt, device)
        by_fold.append([evaluate.embed_set(net, images, device) for images in loaders.test])
    together = [concatenate(of_set) for of_set in zip(*by_fold)]
    return evaluate.measure(together, opt.k_vals, opt.eval_metrics, opt.testing_method)


def concatenate(sets: Sequence[EmbeddedSet]) -> EmbeddedSet:
    """One set, embedded by several networks, with their embeddings `(N, D)` side by side: `(N, networks · D)`."""
    first = sets[0].query
    side_by_side = torch.cat([one.query.embeddings for one in sets], dim=1)
    return EmbeddedSet(sets[0].name, Points(side_by_side, first.labels, first.parents, first.paths))


# Going on with a run


def resume(folder: Path, argv: Sequence[str]) -> dict[str, float]:
    """Goes on with a run, or with all folds of one, with its own flags and those of the command line on top."""
    stored = stored_configuration(folder)
    before = main.stored_flags(folder)
    opt = main.parse_args(argv, stored)
    runs = records.training_runs(folder)
    if opt.fold is not None and None not in runs:
        runs = {fold: path for fold, path in runs.items() if fold == opt.fold}
    count = main.resolve(with_flags(opt, fold=None)).num_training_sets
    begun = [fold for fold in runs if fold is not None and fold >= count]
    if begun:
        raise UserError(f"{folder} has begun with fold {begun[0]} already: leave --num_training_sets {count} out")
    resolved = {path: main.resolve(with_flags(opt, fold=fold)) for fold, path in runs.items()}
    with contextlib.ExitStack() as locks:
        for path in {folder, *resolved}:  # nothing is changed in a run that another process is at work in
            locks.enter_context(auxiliaries.locked(path))
        for path, flags in resolved.items():
            stored_configuration(path)
            main.check_flags(path, flags)
        some_fold = None if before.split_scheme == "predefined" else opt.fold or 0
        check_data(main.resolve(with_flags(opt, fold=some_fold)))
        changes = config.differences(before, main.resolve(with_flags(opt, fold=None)))
        for path, flags in resolved.items():  # a fold may have gone on alone, with flags of its own
            changes |= config.differences(main.stored_flags(path), flags)
        if changes:
            save_changes(folder, list(resolved), changes)
            for path, flags in resolved.items():
                main.describe_flags(path, flags)
            if folder not in resolved:
                values = config.configuration(main.resolve(with_flags(opt, fold=None)))
                config.save_config(stored, values, main.give_parser())
        if opt.resume_training == "best":
            for path in resolved:
                go_back_to_best(path)
    return train(opt, folder)


def save_changes(folder: Path, runs: Sequence[Path], changes: Mapping[str, Any]) -> None:
    """Keeps flags that a resumed run changes, in a folder named after the epochs that its folds have reached."""
    epochs = [str(main.epoch_reached(path)) for path in runs]
    name = f"resume_training_config_diffs_{'_'.join(epochs) or 0}"

    def save(into: Path) -> None:
        config.save_config(into / "config.yaml", changes, main.give_parser())

    kept = auxiliaries.create_run_folder(folder, name, save)
    print(f"changed flags, kept in {kept}: " + ", ".join(f"--{name} {value}" for name, value in changes.items()))


def go_back_to_best(folder: Path) -> None:
    """Makes the best epoch the last one; what came after it is kept in a folder of its own."""
    last = folder / "last.pth.tar"
    if not last.exists():
        return
    epoch = main.best_state(folder)["epoch"]
    if epoch == main.epoch_reached(folder):
        return

    def keep(into: Path) -> None:
        for name in ("last.pth.tar", "records.db", "grad_measure.pkl", *records.LOGS.values()):
            if (folder / name).exists():
                shutil.copyfile(folder / name, into / name)

    kept = auxiliaries.create_run_folder(folder, f"dropped_after_epoch_{epoch}", keep)
    auxiliaries.copy_file(folder / "checkpoint.pth.tar", last)
    print(f"going back to epoch {epoch}; what came after it is in {kept}")


# Reproducing a run


def reproduce(source: Path, argv: Sequence[str], given: Mapping[str, Any]) -> dict[str, float]:
    """Runs a run folder's configuration again in a new folder, and prints both results side by side."""
    opt = main.parse_args(argv, stored_configuration(source))
    if "savename" not in given:
        opt.savename = f"{source.resolve().name}_reproduced"
    before = main.stored_flags(source)
    changes = config.differences(before, main.resolve(opt))
    if changes:
        print("other flags than the original's: " + ", ".join(f"--{name} {value}" for name, value in changes.items()))
    warn_of_environment(source, auxiliaries.pick_device(opt.gpu))
    original = results_of(records.training_runs(source).get(opt.fold, source))
    if not original:
        notice(f"{source} isn't finished: there is nothing to compare with")
    parent = Path(opt.save_path) / opt.dataset
    opt.savename = next(name for name in auxiliaries.numbered(opt.savename) if not (parent / name).exists())
    follows = not set(changes) - {*ELSEWHERE}
    if not follows:
        notice("with other flags, the original's changes of flags on resuming, if any, are not followed")
    single = opt.split_scheme == "predefined"
    results = train(opt, parent / opt.savename if single else None, source if follows else None)
    reproduced = results_of(records.training_runs(parent / opt.savename).get(opt.fold, parent / opt.savename))
    print(f"\n{'':34}{'original':>12}{'reproduced':>12}{'difference':>12}")
    for name, value in reproduced.items():
        was = original.get(name, float("nan"))
        print(f"{name:34}{was:12.4f}{value:12.4f}{value - was:+12.4f}")
    return results


def warn_of_environment(source: Path, device: torch.device) -> None:
    """Warns where versions or hardware are others than those of the original run."""
    path = next(iter(records.training_runs(source).values())) / "environment.json"
    if not path.exists():
        return
    original, now = auxiliaries.load_json(path), auxiliaries.describe_environment(device)
    for name, value in now.items():
        if name not in ("command", "git tree is dirty") and original.get(name) != value:
            notice(f"{name} is {value}, and was {original.get(name)} in the original: figures may differ")


def results_of(folder: Path) -> dict[str, float]:
    """A finished run's results, named by network and metric; empty where it isn't finished."""
    meta = folder / "meta/results.json"
    if meta.exists():
        try:
            return {
                f"{row['Network']}, {row['Split']}, {row['Metric']}": row["Mean"] for row in auxiliaries.load_json(meta)
            }
        except (KeyError, TypeError):
            raise UserError(f"{meta} is damaged: --resume_training writes it anew") from None
    if not (folder / "summary.json").exists():
        return {}
    summary = records.read_summary(folder)
    return {
        f"{model}, {split}, {metric}": value
        for model in ("selected", "last")
        for split in ("val", "test")
        for metric, value in summary[model].get(split, {}).items()
    }


# Evaluating a finished run


def evaluate_run(folder: Path, argv: Sequence[str]) -> dict[str, float]:
    """Evaluates the best network of a run, or of each of its folds, as the eval flags say.

    Returns:
        The metrics, named by split; their means over folds.
    """
    opt = main.parse_args(argv, stored_configuration(folder))
    runs = records.training_runs(folder)
    if None in runs:
        if opt.split_scheme == "cross_validation" and opt.fold is None:
            raise UserError(f"{folder} has no fold yet: --resume_training begins with the first")
        return evaluate_network(folder, opt)
    chosen = {fold: path for fold, path in runs.items() if opt.fold in (None, fold)}
    if not chosen:
        raise UserError(f"{folder} has no fold {opt.fold}")
    if opt.fold is None and len(chosen) < main.resolve(opt).num_training_sets:
        notice(f"{folder} has only {len(chosen)} of its folds: --resume_training begins the others")
    of_folds = []
    for fold, path in chosen.items():
        print(f"fold {fold}")
        of_folds.append(evaluate_network(path, with_flags(opt, fold=fold)))
    means = {name: float(np.mean([metrics[name] for metrics in of_folds])) for name in of_folds[0]}
    print(f"mean over {len(of_folds)} fold(s) | {main.report(means)}")
    return means


def evaluate_network(folder: Path, opt: argparse.Namespace) -> dict[str, float]:
    """Evaluates one training run's best network, and adds the result to its evaluation.json."""
    stored_configuration(folder)
    opt = main.resolve(opt)
    main.check_flags(folder, opt)
    path = folder / "evaluation.json"
    earlier = auxiliaries.load_json(path) if path.exists() else []
    embedded = embed_splits(folder, opt)
    metrics: dict[str, float] = {}
    for split, sets in embedded.items():
        of_split = evaluate.measure(sets, opt.k_vals, opt.eval_metrics, opt.testing_method)
        print(f"{split} | {main.report(of_split)}")
        metrics |= {f"{split} {name}": value for name, value in of_split.items()}
        if opt.eval_size_of_tsne:
            draw_tsne(folder, split, sets[0].query, opt)
    settings = {name: getattr(opt, name) for name in ("k_vals", "testing_method", *NEEDS_EVALUATE)}
    auxiliaries.save_json(path, [*earlier, {"settings": settings, "metrics": metrics}])
    print(f"also in {path}")
    return metrics


def embed_splits(folder: Path, opt: argparse.Namespace) -> dict[str, list[EmbeddedSet]]:
    """The sets of --splits_to_eval, embedded by a run's best network and compared to what the eval flags say.

    Raises:
        UserError: the run has no such splits, or no network yet.
    """
    device = auxiliaries.pick_device(opt.gpu)
    loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt), pin_memory=device.type == "cuda")
    net = load_network(folder, opt, device)
    if opt.eval_use_trunk_output:
        net.embedding = nn.Identity()  # type: ignore[assignment]
    if opt.eval_normalize_embeddings is not None:
        net.normalize = opt.eval_normalize_embeddings
    training_set = datasets.RetrievalLoaders("train", loaders.train_eval)
    sets_of = {"train": [training_set], "val": loaders.val, "test": loaders.test}
    wanted = list(dict.fromkeys(opt.splits_to_eval or ["test"]))
    absent = [split for split in wanted if not sets_of[split]]
    if absent:
        raise UserError(f"--splits_to_eval {absent[0]}: these splits have no {absent[0]} classes")
    embedded = {split: [evaluate.embed_set(net, images, device) for images in sets_of[split]] for split in wanted}
    if opt.eval_reference_set == "compared_to_training_set":
        training = embedded.get("train") or [evaluate.embed_set(net, training_set, device)]
        reference = [training[0].query]
    else:
        all_sets = [one for sets in embedded.values() for one in sets]
        reference = [points for one in all_sets for points in (one.query, one.gallery) if points]
    if opt.eval_pca:
        embedded, reference = project(embedded, reference, opt.eval_pca)
    if opt.eval_reference_set in ("compared_to_sets_combined", "compared_to_training_set"):
        gallery = union(reference)
        return {split: [search_in(one, gallery) for one in sets] for split, sets in embedded.items()}
    return embedded


def union(parts: Sequence[Points]) -> Points:
    """All images of several sets, each once."""
    paths = [path for points in parts for path in points.paths]
    _, first = np.unique(paths, return_index=True)
    parents = None
    if all(points.parents is not None for points in parts):
        parents = np.concatenate([np.asarray(points.parents) for points in parts])[first]
    return Points(
        torch.cat([points.embeddings for points in parts])[torch.from_numpy(first)],
        np.concatenate([points.labels for points in parts])[first],
        parents,
        [paths[i] for i in first],
    )


def search_in(embedded: EmbeddedSet, gallery: Points) -> EmbeddedSet:
    """The set's queries in another gallery, in which none of them finds itself."""
    position = {path: i for i, path in enumerate(gallery.paths)}
    places = [position.get(path) for path in embedded.query.paths]
    inside = None if None in places else np.array(places)
    return EmbeddedSet(embedded.name, embedded.query, gallery, inside)


def project(
    embedded: Mapping[str, Sequence[EmbeddedSet]], reference: Sequence[Points], dim: int
) -> tuple[dict[str, list[EmbeddedSet]], list[Points]]:
    """Everything on the first principal components of the reference's embeddings.

    Raises:
        UserError: there are fewer components.
    """
    points = union(reference).embeddings.cpu().numpy()
    if dim > min(points.shape):
        raise UserError(
            f"--eval_pca {dim} is more than {points.shape[0]} embeddings of dimension {points.shape[1]} have"
        )
    pca = PCA(dim, svd_solver="full").fit(points)

    def projected(of: Points) -> Points:
        values = torch.from_numpy(pca.transform(of.embeddings.cpu().numpy())).to(of.embeddings)
        return Points(values, of.labels, of.parents, of.paths)

    sets = {
        split: [EmbeddedSet(one.name, projected(one.query), one.gallery and projected(one.gallery)) for one in of_split]
        for split, of_split in embedded.items()
    }
    return sets, [projected(points) for points in reference]


def draw_tsne(folder: Path, split: str, points: Points, opt: argparse.Namespace) -> None:
    """Draws a t-SNE of all images of a few classes, chosen at random, always the same ones."""
    classes, labels = np.unique(points.labels, return_inverse=True)
    count = min(opt.eval_size_of_tsne, len(labels))
    rank = np.random.default_rng(opt.seed).permutation(len(classes))
    chosen = np.argsort(rank[labels], kind="stable")[:count]
    values = points.embeddings[torch.from_numpy(chosen)].cpu().numpy()
    start = "pca" if values.shape[1] > 1 else "random"
    flat = TSNE(perplexity=min(30, (count - 1) / 3), init=start, random_state=0).fit_transform(values)
    shown = len(np.unique(labels[chosen]))
    path = folder / f"tsne_{split}.png"
    records.save_scatter(
        path, flat, labels[chosen], f"t-SNE of {count} {split} images of {shown} classes, a colour each"
    )
    records.show_in_tensorboard(folder / "tensorboard/evaluation", f"t-SNE {split}", path)
