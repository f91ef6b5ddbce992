"""A run's best network, evaluated: for the files at its end, and by --evaluate, in other galleries or features."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
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
import report
import retrieval
import runs
import transforms
from auxiliaries import UserError, notice
from datasets import RetrievalSet
from evaluate import Points

DRAWING_EVERY = 50  # times as long as it takes to draw, at least, between pictures of a run that trains


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
    retrieval.check(opt)
    metrics: dict[str, float] = {}
    splits = datasets.give_splits(opt)
    embedded = embed_splits(folder, opt, splits)
    for variant in retrieval_variants(opt, embedded):
        metrics |= evaluate_variant(folder, opt, variant, splits.train.class_names)
    costs = evaluate_costs(folder, opt, embedded[0]) if opt.eval_dims or opt.eval_quantize else []
    if opt.attention:
        draw_attention_of_splits(folder, opt, embedded[0].sets, splits.train.class_names[0])
    add_evaluation(folder, opt, metrics, costs)
    return metrics


@dataclass(frozen=True)
class EmbeddedSplits:
    """Embedded images.

    Attributes:
        sets: the retrieval sets of each split.
        training: the training images, where a flag needs them.
    """

    sets: Mapping[str, Sequence[RetrievalSet[Points]]]
    training: Points | None = None

    def map(self, function: Callable[[Points], Points]) -> EmbeddedSplits:
        """The same with `function` applied to all images of a kind."""
        sets = {split: [one.map(function) for one in of_split] for split, of_split in self.sets.items()}
        return EmbeddedSplits(sets, None if self.training is None else function(self.training))


@dataclass(frozen=True)
class Variant:
    """A way to retrieve.

    Attributes:
        name: how it differs from the plain one, whose name is empty.
        sets: the retrieval sets of each split.
        change: makes the space that is searched of each set's.
        ranks_only: whether it is judged by metrics of ranks alone, not by those of pairs and clusters.
    """

    name: str
    sets: Mapping[str, Sequence[RetrievalSet[Points]]]
    change: retrieval.SpaceChange | None = None
    ranks_only: bool = False


def retrieval_variants(opt: argparse.Namespace, embedded: Sequence[EmbeddedSplits]) -> Iterator[Variant]:
    """The plain way to retrieve, and then what each flag of `retrieval` adds to those before it.

    Args:
        opt: the resolved flags.
        embedded: as from `embed_splits`.
    """
    yield Variant("", embedded[0].sets)
    best, names, changes = embedded[-1], [], []
    if opt.tta:
        names.append("with mirror images")
        yield Variant(names[0], best.sets)
    training = None if best.training is None else best.training.embeddings
    for name, change in retrieval.build_changes(opt, training):
        names.append(name)
        changes.append(change)
        yield Variant(", ".join(names), best.sets, retrieval.chain(changes), names[-1] != "whitened")


def evaluate_variant(
    folder: Path, opt: argparse.Namespace, variant: Variant, class_names: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Computes and prints the metrics of each split; of the plain variant, also what flags ask for beside them.

    Returns:
        `test Recall @ 1`, …, and where the variant has a name `test Recall @ 1 (re-ranked)`, ….
    """
    metrics: dict[str, float] = {}
    by_split: dict[str, dict[str, float]] = {}
    names = evaluate.ranking_metrics(opt.eval_metrics) if variant.ranks_only else opt.eval_metrics
    all_levels = opt.label_hierarchy_level == datasets.ALL_LEVELS
    for split, sets in sorted(variant.sets.items(), key=lambda item: item[0] != "val"):  # the others take its threshold
        validation = None if split == "val" else by_split.get("val", {})
        of_split, spaces = evaluate.evaluate_points(
            *(sets, opt.k_vals, names, opt.testing_method, validation, all_levels, variant.change),
            clustering=evaluate.give_clustering(opt),
        )
        by_split[split] = of_split
        print(f"{', '.join(filter(None, [split, variant.name]))} | {records.format_metrics(of_split)}")
        if opt.eval_every_class and not variant.name:
            macro = evaluate_classes(folder, opt, split, spaces, class_names)
            print(f"{split}, means over classes | {records.format_metrics(macro)}")
            of_split = of_split | macro
        suffix = f" ({variant.name})" if variant.name else ""
        metrics |= {f"{split} {name}{suffix}": value for name, value in of_split.items()}
        if opt.eval_size_of_tsne and not variant.name:
            draw_tsne(folder, split, sets[0].query, class_names[0], opt.eval_size_of_tsne, opt.seed)
    return metrics


def evaluate_costs(folder: Path, opt: argparse.Namespace, embedded: EmbeddedSplits) -> list[records.Row]:
    """Retrieves by embeddings of fewer dimensions and bits; prints a table, and draws embedding_costs_<split>.svg.

    Returns:
        A row for each way to keep the embeddings of each split.
    """
    assert embedded.training is not None
    reference, rows = embedded.training.embeddings, []
    dims = dict.fromkeys([reference.shape[1], *sorted(opt.eval_dims or [], reverse=True)])
    precisions = [name for name in retrieval.PRECISIONS if name in ("float32", *(opt.eval_quantize or []))]
    all_levels = opt.label_hierarchy_level == datasets.ALL_LEVELS
    for split, sets in embedded.sets.items():
        print(f"{split}: retrieval by bytes per image\n{'dimensions':>10}  precision  {'bytes':>5}  Recall @ 1  MAP@R")
        of_split: list[records.Row] = []
        for dim, precision in itertools.product(dims, precisions):
            change = partial(retrieval.compress, reference=reference, dim=dim, precision=precision)
            metrics, _ = evaluate.evaluate_points(
                sets, opt.k_vals, ["Recall", "MAP@R"], opt.testing_method, None, all_levels, change
            )
            size = retrieval.PRECISIONS[precision].bytes_per_image(dim)
            of_split.append({"split": split, "dimensions": dim, "precision": precision, "bytes": size, **metrics})
            recall, map_at_r = (records.mean_over_sets(metrics, name) for name in ("Recall @ 1", "MAP@R"))
            print(f"{dim:>10}  {precision:9}  {size:>5}  {recall:>10.4f}  {map_at_r:.4f}")
        try:
            plots.save_costs(folder / f"embedding_costs_{split}.svg", of_split, f"Recall @ 1, {split}")
        except UserError as error:
            notice(f"the costs of {split} embeddings are not drawn: {error}")
        rows += of_split
    return rows


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


def add_evaluation(
    folder: Path, opt: argparse.Namespace, metrics: Mapping[str, float], costs: Sequence[records.Row] = ()
) -> None:
    """Adds an entry to a run's evaluation.json; where it can't be written, a notice says so.

    Args:
        folder: the run folder.
        opt: the resolved flags.
        metrics: as from `evaluate_checkpoint`.
        costs: as from `evaluate_costs`.
    """
    names = ("splits_to_eval", "k_vals", "testing_method", *config.build_parser().names_with(needs="evaluate"))
    entry = {
        "settings": {name: getattr(opt, name) for name in names},
        "epoch": runs.best_state(folder)["epoch"],
        "date": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "command": sys.argv,
        "metrics": metrics,
        **({"costs": costs} if costs else {}),
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
    epoch, kind = _selected(run, loaders)
    digest = runs.digest_sets(run.opt, run.splits.test or run.splits.val)
    if (epoch, kind) not in run.spaces and _are_known(run, kind, epoch, digest):
        return
    spaces = selected_spaces(run, loaders, device)
    by_set = [evaluate.query_results(space, run.opt.testing_method) for space in spaces]
    results = {name: np.concatenate([of_set[name] for of_set in by_set]) for name in by_set[0]}
    results["weight"] /= len(spaces)
    names = (run.splits.test or run.splits.val)[0].query.class_names[0]
    names = [names[label] for label in np.unique(results["label"])]  # which comparisons show
    records.save_query_results(run.folder, results, test_set=digest, epoch=epoch, class_names=names)


def selected_spaces(run: runs.Run, loaders: datasets.Loaders, device: torch.device) -> list[evaluate.EmbeddingSpace]:
    """The selected network's embeddings of the test sets (of the validation sets, where there are no others)."""
    return embedding_spaces(run, loaders, device, *_selected(run, loaders))


def embedding_spaces(
    run: runs.Run, loaders: datasets.Loaders, device: torch.device, epoch: int, kind: str
) -> list[evaluate.EmbeddingSpace]:
    """The best epoch's embeddings of the sets of a kind of rows.

    Where the network was evaluated by a process that was stopped since, it embeds them again.
    """
    if (epoch, kind) not in run.spaces:
        run.method.evaluated.load_state_dict(runs.best_state(run.folder)["state_dict"])
        sets = loaders.watched(["test"])[kind]
        embedded = [evaluate.embed_set(run.method.evaluated, one, device) for one in sets]
        run.spaces[epoch, kind] = [evaluate.build_space(points) for points in embedded]
    return run.spaces[epoch, kind]


def _selected(run: runs.Run, loaders: datasets.Loaders) -> tuple[int, str]:
    """The selected epoch, and the kind of the rows of its figures, which are found in the test classes, if any."""
    metric = run.opt.eval_metric_for_best_epoch
    epoch = records.best_epoch(run.log.rows["val"], metric, evaluate.lower_is_better(metric))
    return epoch, "test" if loaders.val and loaders.test else "val"


def save_report(run: runs.Run, loaders: datasets.Loaders, device: torch.device, summary: Mapping[str, Any]) -> None:
    """Writes the page of a run that has ended, unless --no-report; where it can't be made, a notice says so."""
    if not run.opt.report:
        return
    try:
        report.save_run_page(run, selected_spaces(run, loaders, device), summary)
    except UserError as error:
        notice(f"there is no page of this run: {error}")
    else:
        print(f"page to look into: {run.folder / report.RUN_PAGE}")


def _are_known(run: runs.Run, kind: str, epoch: int, digest: str) -> bool:
    """Whether the results of each query are stored already, those that the epoch's row is the mean of."""
    try:
        known = records.read_query_results(run.folder)
    except UserError:
        return False
    figure = records.mean_over_sets(run.log.row_of(kind, epoch), "Recall @ 1")
    is_same = str(known["test_set"]) == digest and int(known.get("epoch", -1)) == epoch
    return is_same and abs(float(known["weight"] @ known["correct_at_1"]) - figure) < 1e-9


def embed_splits(folder: Path, opt: argparse.Namespace, splits: datasets.Splits) -> list[EmbeddedSplits]:
    """The sets of --splits_to_eval, embedded by a run's best network, with the galleries that the eval flags name.

    Returns:
        The plain embeddings, and with --tta the means with those of mirror images.

    Raises:
        UserError: the run has no such splits, or no network yet.
    """
    device = auxiliaries.pick_device(opt.gpu, opt.deterministic)
    runs.check_data(folder, opt, splits)
    loaders = datasets.give_dataloaders(opt, splits, pin_memory=device.type == "cuda")
    net = runs.load_network(folder, opt, device)
    if opt.eval_normalize_embeddings is not None:
        net.normalize = opt.eval_normalize_embeddings
    evaluated: torch.nn.Module = netlib.Trunk(net) if opt.eval_use_trunk_output else net
    training_set = RetrievalSet("train", loaders.train_eval)
    sets_by_split = {"train": [training_set], "val": loaders.val, "test": loaders.test}
    wanted = list(dict.fromkeys(opt.splits_to_eval))
    absent = [split for split in wanted if not sets_by_split[split]]
    if absent:
        raise UserError(f"--splits_to_eval {absent[0]}: these splits have no {absent[0]} classes")
    dim = opt.eval_pca or (net.num_features if opt.eval_use_trunk_output else net.embed_dim)
    retrieval.check_dims(opt.eval_dims or [], len(loaders.train_eval.labels), dim)
    if opt.tta:
        evaluated = retrieval.WithMirror(evaluated)
    sets = {
        split: [evaluate.embed_set(evaluated, images, device) for images in sets_by_split[split]] for split in wanted
    }
    training = None
    if opt.eval_reference_set == "compared_to_training_set" or opt.whiten or opt.eval_dims or opt.eval_quantize:
        of_training = sets.get("train") or [evaluate.embed_set(evaluated, training_set, device)]
        training = of_training[0].query
    embedded = EmbeddedSplits(sets, training)
    views = [partial(_view, number=number) for number in (0, 1)] if opt.tta else [lambda points: points]
    return [_place(embedded.map(view), opt) for view in views]


def _view(points: Points, number: int) -> Points:
    """Of images that `retrieval.WithMirror` embedded their own embeddings, or the means with their mirror images'."""
    return replace(points, embeddings=retrieval.split_mirror(points.embeddings)[number])


def _place(embedded: EmbeddedSplits, opt: argparse.Namespace) -> EmbeddedSplits:
    """Embedded images on the principal components, and in the galleries, that the eval flags name."""
    if opt.eval_reference_set == "compared_to_training_set":
        assert embedded.training is not None
        reference = [embedded.training]
    else:
        all_sets = [one for sets in embedded.sets.values() for one in sets]
        reference = [points for one in all_sets for points in (one.query, one.gallery) if points]
    if opt.eval_pca:
        project = fit_components(reference, opt.eval_pca, opt.eval_pca_normalize)
        embedded, reference = embedded.map(project), [project(points) for points in reference]
    if opt.eval_reference_set in ("compared_to_sets_combined", "compared_to_training_set"):
        gallery = union(reference)
        sets = {
            split: [RetrievalSet(one.name, one.query, gallery) for one in of] for split, of in embedded.sets.items()
        }
        return EmbeddedSplits(sets, embedded.training)
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


def fit_components(reference: Sequence[Points], dim: int, normalize: bool = False) -> Callable[[Points], Points]:
    """Puts points on the first principal components of the reference's embeddings.

    Args:
        reference: the images that the components are of.
        dim: number of components.
        normalize: whether the projected embeddings are scaled to length 1.

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

    def project(points: Points) -> Points:
        values = torch.from_numpy(pca.transform(points.embeddings.cpu().numpy())).to(points.embeddings)
        return Points(F.normalize(values, dim=1) if normalize else values, points.hierarchy, points.paths)

    return project


def draw_tsne(folder: Path, split: str, points: Points, class_names: Sequence[str], size: int, seed: int) -> None:
    """Draws a t-SNE plot of all images of a few classes, chosen at random but always the same ones.

    Where it can't be written, a notice says so.

    Args:
        folder: the run folder.
        split: the split's name, for the title and the file.
        points: the embedded images.
        class_names: what their labels stand for.
        size: number of images, at most.
        seed: of the choice of classes.
    """
    classes, labels = np.unique(points.labels, return_inverse=True)
    count = min(size, len(labels))
    rank = np.random.default_rng(seed).permutation(len(classes))
    chosen = np.argsort(rank[labels], kind="stable")[:count]
    values = points.embeddings[torch.from_numpy(chosen)].cpu().numpy()  # (count, D)
    flat = report.flatten(values, max_iter=1000)  # (count, 2)
    num_classes = len(np.unique(labels[chosen]))
    path = folder / f"tsne_{split}.png"
    title = f"t-SNE of {count} {split} images of {num_classes} classes, one color per class"
    try:
        plots.save_scatter(path, flat, points.labels[chosen], title, class_names)
        records.show_in_tensorboard(folder / "tensorboard/evaluation", f"t-SNE {split}", path)
    except UserError as error:
        notice(f"the t-SNE plot of {split} images is not kept: {error}")


# Where similarities come from


@auxiliaries.by_first_rank
def draw_attention(
    path: Path,
    net: netlib.EmbeddingNet | netlib.Trunk,
    space: evaluate.EmbeddingSpace,
    images: RetrievalSet[Any],
    class_names: Sequence[str],
    opt: argparse.Namespace,
) -> None:
    """Draws the retrievals that `plots.draw_retrievals` chooses, with where their similarities come from, into a PNG.

    Args:
        path: the PNG to write.
        net: the network, on the device that embeds.
        space: its embeddings of the images.
        images: queries and gallery with their `paths`, in the same order.
        class_names: what their labels stand for.
        opt: the resolved flags.

    Raises:
        UserError: an image can't be read, or the picture can't be written.
    """
    transform, device = transforms.build_eval_transform(opt), next(net.buffers()).device
    gallery, shown, is_of_embedding = images.gallery or images.query, [], True
    for query_idx, neighbor_idx in plots.choose_retrievals(space, opt.seed):
        paths = [images.query.paths[query_idx], *(gallery.paths[i] for i in neighbor_idx)]
        pixels = torch.stack([transform(transforms.load_image(one, opt.exif_orientation)) for one in paths])
        maps = netlib.similarity_maps(net, pixels.to(device))
        is_of_embedding = maps.is_of_embedding
        query, *neighbors = pixels.permute(0, 2, 3, 1).numpy()
        shown.append(
            plots.SharedSimilarity(
                query,
                class_names[space.query_labels[query_idx]],
                neighbors,
                [class_names[label] for label in space.gallery_labels[neighbor_idx]],
                *(values.cpu().numpy() for values in (maps.similarities, maps.of_query, maps.of_others)),
            )
        )
    what = "their cosine similarity" if is_of_embedding else "the similarity of their patches' mean"
    plots.save_attention(path, shown, f"queries above their nearest neighbors, red where {what} comes from")


@auxiliaries.by_first_rank
def _is_drawn(folder: Path) -> bool:
    """Whether retrievals were drawn since the best network was saved, by a process that was stopped later."""
    picture, best = folder / "sample_recoveries.png", folder / "checkpoint.pth.tar"
    return picture.exists() and picture.stat().st_mtime_ns >= best.stat().st_mtime_ns


class Pictures:
    """Curves and retrievals of a run while it trains, drawn as often as a fiftieth of the time allows, and at its end.

    They are not drawn with --no-pictures.

    Args:
        run: the run.
        loaders: its images.
        device: where its network is.
    """

    def __init__(self, run: runs.Run, loaders: datasets.Loaders, device: torch.device):
        self.run, self.loaders, self.device = run, loaders, device
        self.shown: int | None = None  # the epoch whose retrievals this process drew last
        self.are_current, self.next_time = False, -math.inf  # whether curves show all that there is, and when to draw

    def draw(self, epoch: int, best_epoch: int) -> None:
        """Draws curves once an epoch is saved, and retrievals if it is the best so far; or nothing yet."""
        start = time.monotonic()
        self.are_current = self.run.opt.pictures and auxiliaries.from_first_rank(start >= self.next_time)
        if self.are_current:
            if epoch == best_epoch:
                self._draw_retrievals(epoch)
            self._draw_curves(best_epoch)
            self.next_time = time.monotonic() + DRAWING_EVERY * (time.monotonic() - start)

    def finish(self, best_epoch: int) -> None:
        """Draws what does not show the end yet, after which the network may have the weights of the best epoch."""
        is_drawn = self.shown == best_epoch or (self.shown is None and _is_drawn(self.run.folder))
        if self.run.opt.pictures and not is_drawn:
            self.run.method.evaluated.load_state_dict(runs.best_state(self.run.folder)["state_dict"])
            self._draw_retrievals(best_epoch)
        if self.run.opt.pictures and not self.are_current:
            self._draw_curves(best_epoch)

    def _draw_retrievals(self, epoch: int) -> None:
        """Draws a few queries with their nearest neighbors, by the network of that epoch."""
        opt, folder, log = self.run.opt, self.run.folder, self.run.log
        images = (self.run.splits.val or self.run.splits.test)[0]
        space = embedding_spaces(self.run, self.loaders, self.device, epoch, "val")[0]
        plots.draw_retrievals(folder / "sample_recoveries.png", space, images, opt.seed, opt.exif_orientation)
        log.add_picture("sample recoveries", folder / "sample_recoveries.png", epoch)
        if opt.attention:
            net, class_names = self.run.method.evaluated, images.query.class_names[0]
            draw_attention(folder / "attention.png", net, space, images, class_names, opt)
            log.add_picture("attention", folder / "attention.png", epoch)
        self.shown = epoch

    def _draw_curves(self, best_epoch: int) -> None:
        """Draws the curves of all epochs so far."""
        opt, folder, rows = self.run.opt, self.run.folder, self.run.log.rows
        of_network = [row for row in rows["val"] if row["Epochs"] >= 0]  # not of its backbone alone
        sampling = records.join_names(opt.sampling) or "no sampling"
        selection = records.describe_selection(opt.eval_metric_for_best_epoch, bool(self.loaders.val))
        title = f"{opt.dataset}, {opt.arch}, {records.join_names(opt.loss)}, {sampling}\n{selection}"
        path = folder / "InfoPlot_Base.svg"
        plots.save_info_plot(path, rows["train"], of_network, best_epoch, title, evaluate.lower_is_better)
        if rows["distances"]:
            plots.save_curve(folder / "distance_measures_Train.svg", rows["distances"], "Intra / Inter")


def draw_attention_of_splits(
    folder: Path,
    opt: argparse.Namespace,
    embedded: Mapping[str, Sequence[RetrievalSet[Points]]],
    class_names: Sequence[str],
) -> None:
    """Draws attention_<split>.png of a run's best network, for the first set of each split."""
    net: Any = runs.load_network(folder, opt, auxiliaries.find_device(opt.gpu))
    net = netlib.Trunk(net) if opt.eval_use_trunk_output else net
    for split, (points, *_) in embedded.items():
        path = folder / f"attention_{split}.png"
        try:
            draw_attention(path, net, evaluate.build_space(points), points, class_names, opt)
        except UserError as error:
            notice(f"where similarities of {split} images come from is not drawn: {error}")
            continue
        records.show_in_tensorboard(folder / "tensorboard/evaluation", f"attention {split}", path)
        print(f"where similarities come from: {path}")
