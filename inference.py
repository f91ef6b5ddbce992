"""A finished network put to use: evaluating it again, on other images, in other galleries, or on other features."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import auxiliaries
import config
import datasets
import evaluate
import netlib
import plots
import records
import runs
from auxiliaries import UserError, notice
from datasets import RetrievalSet
from evaluate import Points


def evaluate_run(argv: Sequence[str]) -> dict[str, float]:
    """Evaluates the best network of a run, or of each of its folds, as --evaluate and the flags beside it say.

    Returns:
        The metrics, named by split; their means over folds.

    Raises:
        UserError: what the user can fix.
    """
    opt = config.parse(argv)
    folder = Path(opt.evaluate) if opt.evaluate else runs.find_run(opt, config.given_flags(argv))
    opt = config.parse(argv, runs.config_file(folder))
    if opt.eval_pca_normalize and not opt.eval_pca:
        raise UserError("--eval_pca_normalize does nothing without --eval_pca: add that, or drop it")
    unused = [name for name in ("meta_testing_method", "normalize_members") if name in config.given_flags(argv)]
    if unused:
        raise UserError(f"--{unused[0]} does nothing with --evaluate: give it to --resume_training, or drop it")
    # those of the run were for training
    opt = config.with_flags(opt, splits_to_eval=config.given_flags(argv).get("splits_to_eval", ["test"]))
    fold_paths = runs.fold_folders(folder)
    if None in fold_paths:
        if opt.split_scheme != "predefined" and opt.fold is None:
            raise UserError(f"{folder} has no fold yet: --resume_training begins with the first")
        return evaluate_checkpoint(folder, opt)
    chosen = {fold: path for fold, path in fold_paths.items() if opt.fold in (None, fold)}
    if not chosen:
        raise UserError(f"{folder} has no fold {opt.fold}")
    if opt.fold is None and len(chosen) < config.resolve(opt).num_training_sets:
        notice(f"{folder} has only {len(chosen)} of its folds: --resume_training begins the others")
    by_fold = []
    for fold, path in chosen.items():
        print(f"fold {fold}")
        by_fold.append(evaluate_checkpoint(path, config.with_flags(opt, fold=fold)))
    means = {name: float(np.mean([metrics[name] for metrics in by_fold])) for name in by_fold[0]}
    print(f"mean over {len(by_fold)} fold(s) | {records.format_metrics(means)}")
    return means


def evaluate_checkpoint(folder: Path, opt: argparse.Namespace) -> dict[str, float]:
    """Evaluates one training run's best network, and adds the result to its evaluation.json."""
    opt = config.resolve(opt)
    runs.check_flags(folder, opt)
    read_evaluations(folder)  # a damaged file is reported before anything expensive
    if evaluate.needs_validation(opt.eval_metrics) and "val" not in opt.splits_to_eval:
        raise UserError(
            "Verification accuracy needs a threshold from validation classes: give --splits_to_eval val test"
        )
    metrics: dict[str, float] = {}
    all_levels = opt.label_hierarchy_level == datasets.ALL_LEVELS
    splits = datasets.give_splits(opt)
    class_names = splits.train.class_names[0]
    by_split: dict[str, dict[str, float]] = {}
    embedded = embed_splits(folder, opt, splits)
    for split, sets in sorted(embedded.items(), key=lambda item: item[0] != "val"):  # whose threshold the others take
        validation = None if split == "val" else by_split.get("val", {})
        split_metrics, spaces = evaluate.evaluate_points(
            sets, opt.k_vals, opt.eval_metrics, opt.testing_method, validation, all_levels
        )
        by_split[split] = split_metrics
        print(f"{split} | {records.format_metrics(split_metrics)}")
        if opt.eval_every_class:
            macro = evaluate_classes(folder, opt, split, spaces, splits.train.class_names)
            print(f"{split}, means over classes | {records.format_metrics(macro)}")
            split_metrics = split_metrics | macro
        metrics |= {f"{split} {name}": value for name, value in split_metrics.items()}
        if opt.eval_size_of_tsne:
            draw_tsne(folder, split, sets[0].query, class_names, opt.eval_size_of_tsne, opt.seed)
    add_evaluation(folder, opt, metrics)
    return metrics


def evaluate_classes(
    folder: Path,
    opt: argparse.Namespace,
    split: str,
    spaces: Sequence[evaluate.EmbeddingSpace],
    class_names: Sequence[Sequence[str]],
) -> dict[str, float]:
    """Writes the metrics of each class to per_class_<split>.csv; where it can't be written, a notice says so.

    Args:
        folder: the run folder.
        opt: the resolved flags.
        split: the split's name.
        spaces: its sets.
        class_names: for each level of the labels, what they stand for.

    Returns:
        Their means over classes, `Macro Recall @ 1`, …, by the names of several sets and levels as elsewhere.
    """
    rows: list[records.Row] = []
    macro: dict[str, float] = {}
    for prefix, level, space in evaluate.parts_of_spaces(
        spaces, opt.testing_method, opt.label_hierarchy_level == datasets.ALL_LEVELS
    ):
        classes, sizes, means = evaluate.class_means_of_queries(space, opt.k_vals, opt.eval_metrics, opt.testing_method)
        where = {"Part": prefix.strip()} if prefix else {}
        for i, label in enumerate(classes):
            values = {name: float(mean[i]) for name, mean in means.items()}
            rows.append({**where, "Class": class_names[level][label], "Queries": int(sizes[i]), **values})
        macro |= {f"{prefix}Macro {name}": float(mean.mean()) for name, mean in means.items()}
    by_level: dict[str, list[float]] = {}
    for name, value in macro.items():
        by_level.setdefault(re.sub(r"Level \d+", "Level mean", name), []).append(value)
    macro |= {name: float(np.mean(values)) for name, values in by_level.items()}
    path = folder / f"per_class_{split}.csv"
    try:
        records.save_rows(path, rows)
    except UserError as error:
        notice(f"the metrics of each class are not kept: {error}")
    else:
        print(f"metrics of each class: {path}")
    return macro


EVALUATIONS_SCHEMA = {
    "type": "array",
    "items": {"type": "object", "required": ["settings", "metrics"], "properties": {"metrics": {"type": "object"}}},
}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's evaluation.json, oldest first.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return []
    evaluations = auxiliaries.load_json(path)
    auxiliaries.check_schema(path, evaluations, EVALUATIONS_SCHEMA, "move it away")
    return evaluations


def add_evaluation(folder: Path, opt: argparse.Namespace, metrics: Mapping[str, float]) -> None:
    """Adds an entry to a run's evaluation.json; where it can't be written, a notice says so."""
    names = ("splits_to_eval", "k_vals", "testing_method", *config.build_parser().names_with(needs="evaluate"))
    entry = {
        "settings": {name: getattr(opt, name) for name in names},
        "epoch": runs.best_state(folder)["epoch"],
        "date": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "command": sys.argv,
        "metrics": metrics,
    }
    try:
        with auxiliaries.locked(folder, ".evaluation.lock", wait=True):
            auxiliaries.save_json(folder / "evaluation.json", [*read_evaluations(folder), entry])
    except UserError as error:
        notice(f"the result is not kept: {error}")
    else:
        print(f"also in {folder / 'evaluation.json'}")


def save_query_results(run: runs.Run, loaders: datasets.Loaders, device: torch.device) -> None:
    """Writes the selected network's results of each query, for comparisons: per_query.npz.

    They are of the test classes (of the validation classes, where there are no others). Where the network was evaluated
    by a process that was stopped since, it is evaluated again.
    """
    opt, sets = run.opt, loaders.test or loaders.val
    kind = "test" if loaders.val and loaders.test else "val"  # by which its rows are found
    lower_is_better = evaluate.lower_is_better(opt.eval_metric_for_best_epoch)
    epoch = records.best_epoch(run.log.rows["val"], opt.eval_metric_for_best_epoch, lower_is_better)
    digest, spaces = runs.digest_sets(opt, run.splits.test or run.splits.val), run.spaces.get((epoch, kind))
    if spaces is None and _are_known(run, kind, epoch, digest):
        return
    if spaces is None:
        run.method.evaluated.load_state_dict(runs.best_state(run.folder)["state_dict"])
        embedded = [evaluate.embed_set(run.method.evaluated, images, device) for images in sets]
        spaces = [evaluate.build_space(points) for points in embedded]
    by_set = [evaluate.query_results(space, opt.testing_method) for space in spaces]
    results = {name: np.concatenate([of_set[name] for of_set in by_set]) for name in by_set[0]}
    results["weight"] /= len(spaces)
    records.save_query_results(run.folder, results, test_set=digest, epoch=epoch)


def _are_known(run: runs.Run, kind: str, epoch: int, digest: str) -> bool:
    """Whether the results of each query are stored already, those that the epoch's row is the mean of."""
    try:
        known = records.read_query_results(run.folder)
    except UserError:
        return False
    figure = records.mean_over_sets(run.log.row_of(kind, epoch), "Recall @ 1")
    is_same = str(known["test_set"]) == digest and int(known.get("epoch", -1)) == epoch
    return is_same and abs(float(known["weight"] @ known["correct_at_1"]) - figure) < 1e-9


def embed_splits(
    folder: Path, opt: argparse.Namespace, splits: datasets.Splits
) -> dict[str, list[RetrievalSet[Points]]]:
    """The sets of --splits_to_eval, embedded by a run's best network, with the galleries that the eval flags name.

    Raises:
        UserError: the run has no such splits, or no network yet.
    """
    device = auxiliaries.pick_device(opt.gpu, opt.deterministic)
    runs.check_data(folder, opt, splits)
    loaders = datasets.give_dataloaders(opt, splits, pin_memory=device.type == "cuda")
    net = runs.load_network(folder, opt, device)
    if opt.eval_normalize_embeddings is not None:
        net.normalize = opt.eval_normalize_embeddings
    evaluated = netlib.Trunk(net) if opt.eval_use_trunk_output else net
    training_set = RetrievalSet("train", loaders.train_eval)
    sets_by_split = {"train": [training_set], "val": loaders.val, "test": loaders.test}
    wanted = list(dict.fromkeys(opt.splits_to_eval))
    absent = [split for split in wanted if not sets_by_split[split]]
    if absent:
        raise UserError(f"--splits_to_eval {absent[0]}: these splits have no {absent[0]} classes")
    embedded = {
        split: [evaluate.embed_set(evaluated, images, device) for images in sets_by_split[split]] for split in wanted
    }
    if opt.eval_reference_set == "compared_to_training_set":
        training = embedded.get("train") or [evaluate.embed_set(evaluated, training_set, device)]
        reference = [training[0].query]
    else:
        all_sets = [one for sets in embedded.values() for one in sets]
        reference = [points for one in all_sets for points in (one.query, one.gallery) if points]
    if opt.eval_pca:
        embedded, reference = project(embedded, reference, opt.eval_pca, opt.eval_pca_normalize)
    if opt.eval_reference_set in ("compared_to_sets_combined", "compared_to_training_set"):
        gallery = union(reference)
        return {split: [RetrievalSet(one.name, one.query, gallery) for one in sets] for split, sets in embedded.items()}
    return embedded


def union(parts: Sequence[Points]) -> Points:
    """All images of several sets, each once."""
    paths = [path for points in parts for path in points.paths]
    _, first = np.unique(paths, return_index=True)
    return Points(
        torch.cat([points.embeddings for points in parts])[torch.from_numpy(first)],
        np.concatenate([points.hierarchy for points in parts])[first],
        [paths[i] for i in first],
    )


def project(
    embedded: Mapping[str, Sequence[RetrievalSet[Points]]],
    reference: Sequence[Points],
    dim: int,
    normalize: bool = False,
) -> tuple[dict[str, list[RetrievalSet[Points]]], list[Points]]:
    """Everything on the first principal components of the reference's embeddings.

    Args:
        embedded: the sets by split.
        reference: the images that the components are of.
        dim: number of components.
        normalize: whether the projected embeddings are scaled to length 1.

    Returns:
        The projected sets, and the projected reference.

    Raises:
        UserError: there are fewer components.
    """
    from sklearn.decomposition import PCA

    fitted = union(reference).embeddings.cpu().numpy()  # (N, D)
    if dim > min(fitted.shape):
        raise UserError(
            f"--eval_pca {dim} is more than {fitted.shape[0]} embeddings of dimension {fitted.shape[1]} have"
        )
    pca = PCA(dim, svd_solver="full").fit(fitted)

    def projected(points: Points) -> Points:
        values = torch.from_numpy(pca.transform(points.embeddings.cpu().numpy())).to(points.embeddings)
        return Points(F.normalize(values, dim=1) if normalize else values, points.hierarchy, points.paths)

    sets = {split: [one.map(projected) for one in split_sets] for split, split_sets in embedded.items()}
    return sets, [projected(points) for points in reference]


def draw_tsne(folder: Path, split: str, points: Points, class_names: Sequence[str], size: int, seed: int) -> None:
    """Draws a t-SNE plot of all images of a few classes, chosen at random but always the same ones.

    Args:
        folder: the run folder.
        split: the split's name, for the title and the file.
        points: the embedded images.
        class_names: what their labels stand for.
        size: number of images, at most.
        seed: of the choice of classes.
    """
    from sklearn.manifold import TSNE

    classes, labels = np.unique(points.labels, return_inverse=True)
    count = min(size, len(labels))
    rank = np.random.default_rng(seed).permutation(len(classes))
    chosen = np.argsort(rank[labels], kind="stable")[:count]
    values = points.embeddings[torch.from_numpy(chosen)].cpu().numpy()  # (count, D)
    start = "pca" if values.shape[1] > 1 else "random"
    flat = TSNE(perplexity=min(30, (count - 1) / 3), init=start, random_state=0).fit_transform(values)  # (count, 2)
    num_classes = len(np.unique(labels[chosen]))
    path = folder / f"tsne_{split}.png"
    title = f"t-SNE of {count} {split} images of {num_classes} classes, one color per class"
    plots.save_scatter(path, flat, points.labels[chosen], title, class_names)
    records.show_in_tensorboard(folder / "tensorboard/evaluation", f"t-SNE {split}", path)
