"""Trains an embedding network on labelled images and evaluates it by retrieval on classes it has never seen."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import auxiliaries
import config
import datasets
import evaluate
import losses
import netlib
import records
from auxiliaries import UserError, number

READ_LOSSES_EVERY = 50  # iterations: until then they stay on the device
QUERIES_SHOWN, NEIGHBOURS_SHOWN = 8, 6

SCHEDULERS: dict[str, Any] = {
    "step": lambda optimizer, opt: torch.optim.lr_scheduler.MultiStepLR(optimizer, opt.tau, opt.gamma),
    "exp": lambda optimizer, opt: torch.optim.lr_scheduler.ExponentialLR(optimizer, opt.gamma),
    "none": lambda optimizer, opt: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1),
}


# =====================================================================================================================
# Flags
# =====================================================================================================================


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of the training run itself."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=number(float, 0), default=1e-5, help="learning rate of the network (Adam)")
    group.add_argument(
        "--fc_lr_mul",
        type=number(float, 0),
        default=0.0,
        help="the embedding layer's learning rate, in multiples of --lr; 0: it shares --lr",
    )
    group.add_argument("--decay", type=number(float, 0), default=4e-4, help="weight decay of the network")
    group.add_argument("--n_epochs", type=number(int, 1), default=70, help="passes over the training images")
    group.add_argument("--scheduler", choices=SCHEDULERS, default="step", help="step: at --tau; exp: after every epoch")
    group.add_argument(
        "--gamma", type=number(float, 0), default=0.3, help="factor of all learning rates at a step of --scheduler"
    )
    group.add_argument(
        "--tau",
        type=number(int, 1),
        nargs="*",
        default=[30, 55],
        help="epochs after which --scheduler step multiplies by --gamma",
    )
    group.add_argument(
        "--seed", type=number(int, 0), default=1, help="seed of weights, batches, augmentation and sampling"
    )
    group.add_argument("--gpu", type=number(int, -1), default=0, help="number of the CUDA device; -1: the CPU")

    group = parser.add_argument_group("selection")
    group.add_argument(
        "--eval_metric_for_best_epoch",
        default="Recall @ 1",
        metavar="METRIC",
        help="what picks the best epoch, such as Recall @ 4 or MAP@R: on the validation classes, where there are some",
    )
    group.add_argument("--save_interval", type=number(int, 1), default=1, help="epochs between evaluations")
    group.add_argument(
        "--patience",
        type=number(int, 1),
        help="stop when the metric has not improved for so many epochs (default: never)",
    )
    group.add_argument(
        "--check_untrained_accuracy",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="evaluate before training, as epoch 0",
    )

    group = parser.add_argument_group("records")
    group.add_argument(
        "--log_every", type=number(int, 0), default=1, help="iterations between records of an iteration; 0: none"
    )
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=True, help="write TensorBoard's event files"
    )
    group.add_argument(
        "--dist_measure",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="record the intra/inter class distance ratio",
    )
    group.add_argument(
        "--grad_measure",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="record the embedding layer's gradient statistics",
    )
    group.add_argument("--savename", help="name of the run folder (default: data set, architecture and time)")
    group.add_argument("--save_path", default="Training_Results", help="folder of the data sets' run folders")


def give_parser() -> auxiliaries.FlagParser:
    """The parser of all modules' flags."""
    parser = auxiliaries.FlagParser(prog="main.py", description=__doc__)
    for module in (datasets, netlib, losses, evaluate):
        module.add_arguments(parser)
    add_arguments(parser)
    config.add_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None, stored: Path | None = None) -> argparse.Namespace:
    """Parses the files that --config names, and the flags on top of them.

    Args:
        argv: the command line (default: this process's).
        stored: a run's config.yaml, to lie below all of them.

    Raises:
        UserError: a flag is unknown or its value is no good.
    """
    return config.parse_layers(give_parser(), sys.argv[1:] if argv is None else argv, stored)


def resolve(opt: argparse.Namespace) -> argparse.Namespace:
    """A frozen copy of the flags in which everything that depends on something else is filled in.

    Raises:
        UserError: flags contradict each other.
    """
    opt = argparse.Namespace(**vars(opt))
    arch, loss = netlib.ARCHS[opt.arch], losses.LOSSES[opt.loss]

    def fill(name: str, value: Any) -> None:
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    opt.sampling = losses.choose_sampling(opt.loss, opt.sampling)
    opt.normalize = loss.normalize
    fill("samples_per_class", loss.samples_per_class)
    fill("batch_sampler", "shuffled" if opt.samples_per_class == 1 else "class_balanced")
    fill("eval_bs", opt.bs)
    fill("k_vals", list(datasets.default_k_vals(opt.dataset)))
    fill("embed_dim", arch.embed_dim)
    fill("resize", arch.resize if opt.crop_size is None else round(opt.crop_size * arch.resize / arch.crop_size))
    fill("crop_size", arch.crop_size)
    if opt.split_scheme == "cross_validation":
        fill("num_training_sets", min(4, opt.num_training_partitions))
    fill("freeze_batchnorm", not opt.not_pretrained)
    fill("savename", f"{opt.dataset}_{opt.arch}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    refuse_contradictions(opt)
    return auxiliaries.FrozenNamespace(**vars(opt))


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks resolved flags against each other.

    Raises:
        UserError: they contradict each other.
    """
    if opt.weights and opt.not_pretrained:
        raise UserError("--weights and --not_pretrained contradict each other: leave one out")
    if opt.not_pretrained and opt.freeze_batchnorm:
        raise UserError("--freeze_batchnorm needs pretrained statistics to keep: leave it or --not_pretrained out")
    if opt.resize < opt.crop_size:
        raise UserError(
            f"--resize {opt.resize} is less than --crop_size {opt.crop_size}: the crop must fit into the image"
        )
    if opt.bs % opt.samples_per_class:
        raise UserError(
            f"--bs {opt.bs} is no multiple of --samples_per_class {opt.samples_per_class}: change one of them"
        )
    if opt.sampling and opt.samples_per_class == 1:
        raise UserError(f"--loss {opt.loss} needs two images of a class in a batch: raise --samples_per_class")
    if opt.sampling and opt.bs < 2 * opt.samples_per_class:
        raise UserError(f"--loss {opt.loss} needs two classes of {opt.samples_per_class} images in a batch: raise --bs")
    if opt.split_scheme == "predefined" and opt.fold is not None:
        raise UserError("--fold needs --split_scheme cross_validation: predefined splits have no folds")
    sets = opt.num_training_sets
    if sets is not None and sets > opt.num_training_partitions:
        raise UserError(
            f"--num_training_sets {sets} is more than --num_training_partitions {opt.num_training_partitions}: each "
            "fold needs a partition to validate on"
        )
    if opt.fold is not None and opt.fold >= sets:
        raise UserError(f"--fold {opt.fold} does not exist: --num_training_sets {sets} counts from 0")
    computed = list(evaluate.chosen_metrics(opt.k_vals, opt.eval_metrics))
    if opt.evaluate is None and opt.eval_metric_for_best_epoch not in computed:
        near = auxiliaries.nearest_name(opt.eval_metric_for_best_epoch, computed)
        raise UserError(
            f"--eval_metric_for_best_epoch {opt.eval_metric_for_best_epoch} is not computed{near}: choose one of "
            f"{', '.join(computed)}, or add it to --eval_metrics and --k_vals"
        )


# =====================================================================================================================
# What is trained
# =====================================================================================================================


@dataclass(frozen=True)
class Training:
    """A network with all that changes while it learns."""

    net: netlib.EmbeddingNet
    criterion: losses.Criterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def state(self) -> dict[str, Any]:
        """State dicts; the scheduler's follows from the epoch."""
        return {
            "state_dict": self.net.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a state after `state["epoch"]`; learning rates and decay follow the flags of now.

        Raises:
            UserError: it is the state of another network or loss.
        """
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.net.load_state_dict(state["state_dict"])
            self.criterion.load_state_dict(state["criterion"])
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the run's network or loss is another than these flags give ({reason})") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps of the scheduler without any of the optimiser
            for _ in range(state["epoch"]):
                self.scheduler.step()


def give_training(
    opt: argparse.Namespace, num_classes: int, device: torch.device, load_pretrained: bool = True
) -> Training:
    """Builds network, loss and optimiser from the resolved flags."""
    auxiliaries.seed_everything(opt.seed, 0)
    net = netlib.networkselect(opt, load_pretrained).to(device)
    to_optim = net.parameter_groups(opt.lr, opt.decay, opt.fc_lr_mul)
    criterion, to_optim = losses.loss_select(opt.loss, opt, to_optim, num_classes)
    criterion.to(device)
    optimizer = torch.optim.Adam(to_optim)
    return Training(net, criterion, optimizer, SCHEDULERS[opt.scheduler](optimizer, opt))


# =====================================================================================================================
# One epoch
# =====================================================================================================================


def train_one_epoch(
    training: Training,
    loader: datasets.ImageLoader,
    device: torch.device,
    epoch: int,
    log: records.Records,
    log_every: int = 1,
    gradients: records.GradientRecord | None = None,
) -> records.Row:
    """Trains on one epoch's batches and records its iterations.

    Returns:
        The epoch's row: `Train Loss`, the mean over the iterations, seconds, images a second, peak memory in GiB.

    Raises:
        UserError: the loss is not finite.
    """
    net, criterion, optimizer = training.net, training.criterion, training.optimizer
    net.train()
    criterion.train()
    meter = IterationMeter(training, epoch, log, log_every)
    start, images_seen, lr = time.perf_counter(), 0, optimizer.param_groups[0]["lr"]
    auxiliaries.peak_memory(device, reset=True)
    batches = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for iteration, (images, labels, _) in enumerate(batches, start=1):
        embeddings = net(images.to(device, non_blocking=True))  # (B, D)
        loss = criterion(embeddings, labels)  # labels stay on the host, where tuples are decided on
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if gradients is not None:
            gradients.add(net.embedding.weight)
        optimizer.step()

        meter.add(iteration, loss.detach(), embeddings.detach(), labels)
        images_seen += len(labels)
        if iteration % READ_LOSSES_EVERY == 0 or iteration == len(batches):
            batches.set_postfix(loss=f"{meter.read():.4f}")
    seconds = time.perf_counter() - start
    return {
        "Epochs": epoch,
        "Time": seconds,
        "Train Loss": float(np.mean(meter.losses)),
        "Learning Rate": lr,
        "Iterations": len(meter.losses),
        "Images/s": images_seen / seconds,
        "Peak Memory": auxiliaries.peak_memory(device),
    }


class IterationMeter:
    """Losses, and every few iterations what sampler and loss say of their work; all of it stays on the device until
    `read`, so that no iteration waits for it."""

    def __init__(self, training: Training, epoch: int, log: records.Records, log_every: int):
        self.training = training
        self.epoch = epoch
        self.log = log
        self.log_every = log_every
        self.before = log.iterations()
        self.losses: list[float] = []
        self._on_device: list[torch.Tensor] = []
        self._rows: list[tuple[records.Row, dict[str, torch.Tensor]]] = []

    @torch.no_grad()
    def add(self, iteration: int, loss: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes an iteration's loss and batch."""
        self._on_device.append(loss)
        if not self.log_every or (self.before + iteration) % self.log_every:
            return
        first, *others = self.training.optimizer.param_groups
        row = {"Iteration": self.before + iteration, "Epochs": self.epoch, "Learning Rate": first["lr"]}
        row |= {f"Learning Rate {group['name']}": group["lr"] for group in others}
        self._rows.append((row, {"Loss": loss, **self.training.criterion.statistics(embeddings, labels)}))

    def read(self) -> float:
        """Fetches and records everything since the last call; returns the mean loss so far.

        Raises:
            UserError: a loss is not finite.
        """
        self.losses += torch.stack(self._on_device).tolist()
        self._on_device.clear()
        broken = np.flatnonzero(~np.isfinite(self.losses))
        if self._rows:
            values = iter(torch.stack([value for _, of_row in self._rows for value in of_row.values()]).tolist())
            self.log.add("iterations", *(row | {name: next(values) for name in of_row} for row, of_row in self._rows))
            self._rows.clear()
        if len(broken):
            raise UserError(
                f"the loss is {self.losses[broken[0]]} in epoch {self.epoch}, iteration {broken[0] + 1}: lower --lr"
                + ("; the checkpoints of the epochs before are kept" if self.epoch > 1 else "")
            )
        return float(np.mean(self.losses))


# =====================================================================================================================
# What is recorded of it
# =====================================================================================================================


def evaluate_sets(
    opt: argparse.Namespace,
    net: netlib.EmbeddingNet,
    sets: Sequence[datasets.RetrievalLoaders],
    device: torch.device,
    epoch: int,
    kind: str,
    log: records.Records,
) -> list[evaluate.EmbeddingSpace]:
    """Evaluates retrieval sets, records a row of that kind, and returns the embedding spaces."""
    start = time.perf_counter()
    metrics, spaces = evaluate.evaluate(net, sets, opt.k_vals, device, opt.eval_metrics, opt.testing_method)
    log.add(kind, {"Epochs": epoch, "Time": time.perf_counter() - start, **metrics})
    return spaces


def evaluate_epoch(
    opt: argparse.Namespace,
    net: netlib.EmbeddingNet,
    loaders: datasets.Loaders,
    device: torch.device,
    epoch: int,
    log: records.Records,
) -> evaluate.EmbeddingSpace:
    """Evaluates and records what may be looked at while training: the validation classes, and under predefined splits
    the test classes, as the literature does.

    Returns:
        The embedding space of the (first) set that selects the epoch.
    """
    watched = {"val": loaders.val or loaders.test}
    if loaders.val and opt.split_scheme == "predefined":
        watched["test"] = loaders.test
    spaces = {kind: evaluate_sets(opt, net, sets, device, epoch, kind, log) for kind, sets in watched.items()}
    if opt.dist_measure:
        points = evaluate.embed(net, loaders.train_eval, device, "training images")
        ratio = evaluate.intra_inter_ratio(evaluate.EmbeddingSpace(points, loaders.train_eval.labels))
        log.add("distances", {"Epochs": epoch, "Intra / Inter": ratio})
    loss = f"loss {log.rows['train'][-1]['Train Loss']:.4f} | " if epoch else ""
    print(f"epoch {epoch:3d} | {loss}{report(log.rows['val'][-1])}", flush=True)
    return spaces["val"][0]


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's metrics."""
    return {name: value for name, value in row.items() if name not in records.NOT_METRICS}


def report(row: Mapping[str, Any]) -> str:
    """The metrics in one line."""
    return " | ".join(f"{name} {value:.4f}" for name, value in metrics_of(row).items())


def show_retrievals(path: Path, space: evaluate.EmbeddingSpace, images: datasets.RetrievalSet, seed: int) -> None:
    """Draws a few queries, the same at every call, with their nearest neighbours."""
    gallery, names = images.gallery or images.query, images.query.class_names[0]
    candidates = np.flatnonzero(space.has_positive)
    count = min(QUERIES_SHOWN, len(candidates))
    chosen = np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
    retrievals = []
    for query, neighbours in zip(chosen, space.neighbours(chosen, NEIGHBOURS_SHOWN)):
        found = space.gallery_labels[neighbours]
        retrievals.append(
            records.Retrieval(
                query=datasets.load_image(images.query.paths[query]).permute(1, 2, 0).numpy(),
                query_class=names[space.query_labels[query]],
                neighbours=[datasets.load_image(gallery.paths[i]).permute(1, 2, 0).numpy() for i in neighbours],
                neighbour_classes=[names[label] for label in found],
                correct=(found == space.query_labels[query]).tolist(),
            )
        )
    records.save_recoveries(path, retrievals)


def selection_in_words(opt: argparse.Namespace, splits: datasets.Splits) -> str:
    """What picks the best epoch, and what that means."""
    if splits.val:
        return f"selected by {opt.eval_metric_for_best_epoch} on the validation classes"
    return (
        f"selected by {opt.eval_metric_for_best_epoch} on the test classes, as in the literature: "
        "optimistic, since these choose the epoch"
    )


def draw_records(opt: argparse.Namespace, splits: datasets.Splits, log: records.Records, best_epoch: int) -> None:
    """Draws the curves of all rows so far."""
    title = f"{opt.dataset}, {opt.arch}, {opt.loss}, {opt.sampling or 'no tuples'}\n{selection_in_words(opt, splits)}"
    path = log.folder / "InfoPlot_Base.svg"
    records.save_info_plot(path, log.rows["train"], log.rows["val"], best_epoch, title, evaluate.LOWER_IS_BETTER)
    if log.rows["distances"]:
        records.save_curve(log.folder / "distance_measures_Train.svg", log.rows["distances"], "Intra / Inter")


def evaluate_tests(
    opt: argparse.Namespace, training: Training, loaders: datasets.Loaders, device: torch.device, log: records.Records
) -> None:
    """Evaluates the test classes, which were not looked at while training, for the last and the selected network."""
    last, selected = (auxiliaries.load_checkpoint(log.folder / name) for name in ("last.pth.tar", "checkpoint.pth.tar"))
    for state in {state["epoch"]: state for state in (last, selected)}.values():
        training.net.load_state_dict(state["state_dict"])
        evaluate_sets(opt, training.net, loaders.test, device, state["epoch"], "test", log)


def summarise(opt: argparse.Namespace, splits: datasets.Splits, log: records.Records) -> dict[str, float]:
    """Writes and prints how the run ended.

    Returns:
        The selected epoch's metrics on the test classes (of the validation classes, where there are no others).
    """
    by_epoch = {kind: {row["Epochs"]: metrics_of(row) for row in log.rows[kind]} for kind in ("val", "test")}
    if not splits.val:
        by_epoch = {"test": by_epoch["val"]}
    metric, val_rows = opt.eval_metric_for_best_epoch, log.rows["val"]
    epochs = {"selected": evaluate.best_epoch(val_rows, metric), "last": val_rows[-1]["Epochs"]}
    if opt.split_scheme == "predefined":
        epochs["best on test"] = evaluate.best_epoch(log.rows["test"] if splits.val else val_rows, metric)
    if val_rows[0]["Epochs"] == 0:
        epochs["untrained"] = 0
    models = {
        name: {"epoch": epoch, **{kind: rows[epoch] for kind, rows in by_epoch.items() if epoch in rows}}
        for name, epoch in epochs.items()
    }
    summary = {
        "selection": selection_in_words(opt, splits),
        "metric": metric,
        **models,
        "seconds": sum(row["Time"] for kind in ("train", "val", "test") for row in log.rows[kind]),
    }
    auxiliaries.save_json(log.folder / "summary.json", summary)
    print(f"\n{summary['selection']}")
    for name, model in models.items():
        for kind in by_epoch:
            if kind in model:
                print(f"{name:>12}, epoch {model['epoch']:3d}, {kind} | {report(model[kind])}")
    if "untrained" in models:
        kind = "test" if "test" in models["untrained"] else "val"
        before, after = (evaluate.mean_over_sets(models[name][kind], metric) for name in ("untrained", "selected"))
        print(f"{metric} on unseen classes: {before:.4f} untrained, {after:.4f} trained ({after - before:+.4f})")
    print(f"plots, retrievals and checkpoints: {log.folder}")
    return models["selected"].get("test") or models["selected"]["val"]


# =====================================================================================================================
# The run folder
# =====================================================================================================================

FIXED = (  # what a run can't be resumed with another of
    *("dataset", "split_scheme", "test_size", "test_start_idx", "num_training_partitions", "label_hierarchy_level"),
    *("fold", "arch", "embed_dim", "loss", "beta_constant", "eval_metric_for_best_epoch"),
)


def describe_flags(folder: Path, opt: argparse.Namespace) -> None:
    """Writes the resolved flags in each of their forms."""
    values = config.configuration(opt)
    auxiliaries.save_parameters(folder, values)
    config.save_config(folder / "config.yaml", values, give_parser())


def describe_run(folder: Path, opt: argparse.Namespace, environment: Mapping[str, Any]) -> None:
    """Writes what a new run folder begins with."""
    describe_flags(folder, opt)
    auxiliaries.save_json(folder / "environment.json", environment)


def stored_flags(folder: Path) -> argparse.Namespace:
    """The resolved flags that a run folder's config.yaml holds.

    Raises:
        UserError: it can't be read.
    """
    return resolve(parse_args([], folder / "config.yaml"))


def check_flags(folder: Path, opt: argparse.Namespace) -> None:
    """Makes sure that a run can go on, or be evaluated, with these flags.

    Raises:
        UserError: it can't, or its configuration can't be read.
    """
    stored = stored_flags(folder)
    fixed = [name for name in config.differences(stored, opt) if name in FIXED]
    if fixed:
        was = getattr(stored, fixed[0])
        raise UserError(f"{folder} was trained with --{fixed[0]} {was}, and is of no use with another: leave it out")


def read_state(file: Path) -> dict[str, Any]:
    """Reads `last.pth.tar` or `checkpoint.pth.tar`.

    Raises:
        UserError: it can't be read, or is of a later version of this repository.
    """
    state = auxiliaries.load_checkpoint(file)
    auxiliaries.check_version(file, state)
    return state


def epoch_reached(folder: Path) -> int:
    """The epoch of a run's `last.pth.tar`; 0 before there is one."""
    return read_state(folder / "last.pth.tar")["epoch"] if has_state(folder) else 0


def has_state(folder: Path) -> bool:
    """Whether a run has saved anything to go on from.

    Raises:
        UserError: it has, but it is gone.
    """
    if (folder / "last.pth.tar").exists():
        return True
    if (folder / "checkpoint.pth.tar").exists():
        raise UserError(f"{folder} has lost last.pth.tar: a copy of checkpoint.pth.tar goes on from the best epoch")
    return False


def best_state(folder: Path) -> dict[str, Any]:
    """What the checkpoint of a run's best network holds.

    Raises:
        UserError: there is none yet, or it can't be read.
    """
    best, last = folder / "checkpoint.pth.tar", folder / "last.pth.tar"
    if not has_state(folder):
        raise UserError(f"{folder} has no network yet: it was stopped before its first evaluation; resume it first")
    state = read_state(last)
    # the run may have been stopped before its last state was copied
    return state if state["best_epoch"] == state["epoch"] else read_state(best)


def load_state(folder: Path, opt: argparse.Namespace) -> dict[str, Any] | None:
    """What `last.pth.tar` holds, with the best network beside it as it says; None before the first was saved.

    Raises:
        UserError: it can't be read, or the run can't go on with these flags.
    """
    check_flags(folder, opt)
    last = folder / "last.pth.tar"
    if not has_state(folder):
        return None
    state = read_state(last)
    if state["best_epoch"] == state["epoch"]:  # see best_state
        auxiliaries.copy_file(last, folder / "checkpoint.pth.tar")
    return state


def save_state(opt: argparse.Namespace, training: Training, log: records.Records, epoch: int, best_epoch: int) -> None:
    """Saves everything that going on needs, all rows included, and the network as the best if it is.

    Nothing counts as done before `last.pth.tar` says so; what stands elsewhere can be had from it.
    """
    log.flush()
    state = {
        "version": auxiliaries.RUN_VERSION,
        "epoch": epoch,
        "best_epoch": best_epoch,
        "metrics": metrics_of(log.rows["val"][-1]),
        "opt": config.configuration(opt),
        "history": log.rows,
        **training.state(),
    }
    auxiliaries.save_checkpoint(log.folder / "last.pth.tar", state)
    if best_epoch == epoch:
        auxiliaries.copy_file(log.folder / "last.pth.tar", log.folder / "checkpoint.pth.tar")


# =====================================================================================================================
# A training run
# =====================================================================================================================


def train(
    opt: argparse.Namespace,
    training: Training,
    splits: datasets.Splits,
    loaders: datasets.Loaders,
    device: torch.device,
    log: records.Records,
    epoch: int,
    last_epoch: int,
) -> None:
    """Trains from after `epoch` to `last_epoch`, evaluating and saving every few epochs."""
    eval_set = (splits.val or splits.test)[0]
    metric = opt.eval_metric_for_best_epoch
    gradients = None
    if opt.grad_measure:
        gradients = records.GradientRecord(log.folder / "grad_measure.pkl", log.iterations())
    if epoch == 0 and opt.check_untrained_accuracy:
        evaluate_epoch(opt, training.net, loaders, device, 0, log)

    if epoch >= last_epoch:
        auxiliaries.notice(f"{log.folder} is at epoch {epoch} of {last_epoch}: nothing is left to train")
    while epoch < last_epoch:
        best_epoch, evaluated = evaluate.best_epoch(log.rows["val"], metric), [row["Epochs"] for row in log.rows["val"]]
        if opt.patience and epoch > 0 and epoch in evaluated and epoch - best_epoch >= opt.patience:
            print(f"{metric} has not improved for {epoch - best_epoch} epochs: stopping")
            break
        epoch += 1
        auxiliaries.seed_everything(opt.seed, epoch)
        loaders.train.set_epoch(epoch)
        log.add("train", train_one_epoch(training, loaders.train, device, epoch, log, opt.log_every, gradients))
        training.scheduler.step()
        if epoch % opt.save_interval and epoch < last_epoch:
            continue

        space = evaluate_epoch(opt, training.net, loaders, device, epoch, log)
        best_epoch = evaluate.best_epoch(log.rows["val"], metric)
        if best_epoch == epoch:
            show_retrievals(log.folder / "sample_recoveries.png", space, eval_set, opt.seed)
            log.add_picture("sample recoveries", log.folder / "sample_recoveries.png", epoch)
        draw_records(opt, splits, log, best_epoch)
        if gradients is not None:
            gradients.save()
        save_state(opt, training, log, epoch, best_epoch)


def main(opt: argparse.Namespace, folder: Path | None = None, until: int | None = None) -> dict[str, float]:
    """Trains and evaluates once.

    Args:
        opt: the flags, from `parse_args`; under cross-validation with --fold.
        folder: the run folder to make, or, where it exists, to go on in (default: a new one by the flags).
        until: an epoch to stop after for now, before the end.

    Returns:
        The test metrics of the selected epoch; none before the end.

    Raises:
        UserError: what the user can mend.
    """
    opt = resolve(opt)
    if opt.split_scheme == "cross_validation" and opt.fold is None:
        raise UserError("one training run is one fold of cross_validation: give --fold")
    if folder is None:
        auxiliaries.check_run_folder(Path(opt.save_path) / opt.dataset, opt.savename)
    device = auxiliaries.pick_device(opt.gpu)

    # ================================================== Data ==========================================================
    splits = datasets.give_splits(opt)
    loaders = datasets.give_dataloaders(opt, splits, pin_memory=device.type == "cuda")
    num_classes = splits.train.num_classes()

    with contextlib.ExitStack() as until_the_end:
        # ===================================== Network, loss and optimiser ============================================
        state = None
        is_new = folder is None or not folder.exists()
        if folder is not None and not is_new:
            until_the_end.enter_context(auxiliaries.locked(folder))
            state = load_state(folder, opt)
        training = give_training(opt, num_classes, device, load_pretrained=state is None)
        if state is not None:
            training.restore(state)

        # ============================================== Run folder ====================================================
        environment = auxiliaries.describe_environment(device)
        if is_new:
            parent, name = (folder.parent, folder.name) if folder else (Path(opt.save_path) / opt.dataset, opt.savename)
            fill = partial(describe_run, opt=opt, environment=environment)
            folder = auxiliaries.create_run_folder(parent, name, fill, may_be_numbered=folder is None)
            until_the_end.enter_context(auxiliaries.locked(folder))
        assert folder is not None
        log = records.Records(folder, state["history"] if state else None, opt.tensorboard)
        until_the_end.callback(log.close)
        epoch = state["epoch"] if state else 0
        log.note_configuration(epoch, config.configuration(opt), environment)
        auxiliaries.remove_file(folder / "summary.json")  # until this call is at its end
        print(f"{opt.dataset}: {len(splits.train)} training images of {num_classes} classes; run folder {folder}")

        train(opt, training, splits, loaders, device, log, epoch, opt.n_epochs if until is None else until)
        if until is not None:
            return {}
        if not log.rows["test"] and splits.val and loaders.test:
            evaluate_tests(opt, training, loaders, device, log)
        return summarise(opt, splits, log)


if __name__ == "__main__":
    import protocol  # which imports this module

    auxiliaries.run_command(lambda: protocol.run(sys.argv[1:]))
