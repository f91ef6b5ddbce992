"""Trains an embedding network on labelled images and evaluates it by retrieval on classes it has never seen."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime
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
from auxiliaries import UserError, number

SELECTION_METRIC = "Recall @ 1"
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

    group = parser.add_argument_group("records")
    group.add_argument(
        "--check_untrained_accuracy",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="evaluate before training, as epoch 0",
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the files that --config names, and the flags on top of them.

    Raises:
        UserError: a flag is unknown or its value is no good.
    """
    return config.parse_layers(give_parser(), sys.argv[1:] if argv is None else argv)


def resolve(opt: argparse.Namespace) -> argparse.Namespace:
    """A frozen copy of the flags in which everything that depends on something else is filled in.

    Raises:
        UserError: flags contradict each other.
    """
    if opt.weights and opt.not_pretrained:
        raise UserError("--weights and --not_pretrained contradict each other: leave one out")
    if opt.not_pretrained and opt.freeze_batchnorm:
        raise UserError("--freeze_batchnorm needs pretrained statistics to keep: leave it or --not_pretrained out")
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
    fill("freeze_batchnorm", not opt.not_pretrained)
    fill("savename", f"{opt.dataset}_{opt.arch}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
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
    auxiliaries.check_run_folder(Path(opt.save_path) / opt.dataset, opt.savename)
    return auxiliaries.FrozenNamespace(**vars(opt))


# =====================================================================================================================
# One epoch
# =====================================================================================================================


def train_one_epoch(
    net: netlib.EmbeddingNet,
    criterion: losses.Criterion,
    optimizer: torch.optim.Optimizer,
    loader: datasets.ImageLoader,
    device: torch.device,
    epoch: int,
    gradients: auxiliaries.GradientRecord | None = None,
) -> dict[str, float]:
    """Trains on one epoch's batches.

    Returns:
        `Train Loss`, the mean over the iterations.

    Raises:
        UserError: the loss is not finite.
    """
    net.train()
    criterion.train()
    on_device: list[torch.Tensor] = []
    values: list[float] = []
    batches = tqdm(loader, desc=f"epoch {epoch}", leave=False, disable=None)
    for iteration, (images, labels, _) in enumerate(batches, start=1):
        embeddings = net(images.to(device, non_blocking=True))  # (B, D)
        loss = criterion(embeddings, labels)  # labels stay on the host, where tuples are decided on
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if gradients is not None:
            gradients.add(net.embedding.weight)
        optimizer.step()

        on_device.append(loss.detach())
        if iteration % READ_LOSSES_EVERY == 0 or iteration == len(batches):
            values += torch.stack(on_device).tolist()
            on_device.clear()
            broken = np.flatnonzero(~np.isfinite(values))
            if len(broken):
                raise UserError(
                    f"the loss is {values[broken[0]]} in epoch {epoch}, iteration {broken[0] + 1}: lower --lr"
                    + ("; the checkpoints of the epochs before are kept" if epoch > 1 else "")
                )
            batches.set_postfix(loss=f"{np.mean(values):.4f}")
    return {"Train Loss": float(np.mean(values))}


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
            auxiliaries.Retrieval(
                query=datasets.load_image(images.query.paths[query]).permute(1, 2, 0).numpy(),
                query_class=names[space.query_labels[query]],
                neighbours=[datasets.load_image(gallery.paths[i]).permute(1, 2, 0).numpy() for i in neighbours],
                neighbour_classes=[names[label] for label in found],
                correct=(found == space.query_labels[query]).tolist(),
            )
        )
    auxiliaries.save_recoveries(path, retrievals)


def report(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    return " | ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def draw_records(folder: Path, history: dict[str, list[dict[str, float]]], best_epoch: int, title: str) -> None:
    """Draws the curves of all rows so far."""
    auxiliaries.save_info_plot(folder / "InfoPlot_Base.svg", history["train"], history["val"], best_epoch, title)
    if history["distances"]:
        auxiliaries.save_curve(folder / "distance_measures_Train.svg", history["distances"], "Intra / Inter")


def summarise(folder: Path, val_rows: Sequence[dict[str, float]], best_epoch: int) -> dict[str, float]:
    """Prints how the run ended and returns the selected epoch's metrics."""
    by_epoch = {row["Epochs"]: {name: row[name] for name in row if name not in ("Epochs", "Time")} for row in val_rows}
    selected = by_epoch[best_epoch]
    print(f"best epoch by {SELECTION_METRIC}: {best_epoch} | {report(selected)}")
    if 0 in by_epoch:
        before, after = (evaluate.mean_over_sets(by_epoch[e], SELECTION_METRIC) for e in (0, best_epoch))
        print(
            f"{SELECTION_METRIC} on unseen classes: {before:.4f} untrained, {after:.4f} trained ({after - before:+.4f})"
        )
    print(f"plots, retrievals and checkpoints: {folder}")
    return selected


# =====================================================================================================================
# A training run
# =====================================================================================================================


def main(opt: argparse.Namespace) -> dict[str, float]:
    """Trains and evaluates once.

    Args:
        opt: the flags, from `parse_args`.

    Returns:
        The metrics of the selected epoch, the one with the highest Recall @ 1.

    Raises:
        UserError: what the user can mend.
    """
    opt = resolve(opt)
    device = auxiliaries.pick_device(opt.gpu)

    # ================================================== Data ==========================================================
    splits = datasets.read_splits(opt.dataset, opt.source_path, opt.download, opt.download_url)
    loaders = datasets.give_dataloaders(opt, splits, pin_memory=device.type == "cuda")
    eval_sets, eval_loaders = (splits.val, loaders.val) if splits.val else (splits.test, loaders.test)
    num_classes = splits.train.num_classes()

    # ======================================= Network, loss and optimiser ==============================================
    auxiliaries.seed_everything(opt.seed, 0)
    net = netlib.networkselect(opt).to(device)
    to_optim = net.parameter_groups(opt.lr, opt.decay, opt.fc_lr_mul)
    criterion, to_optim = losses.loss_select(opt.loss, opt, to_optim, num_classes)
    criterion.to(device)
    optimizer = torch.optim.Adam(to_optim)
    scheduler = SCHEDULERS[opt.scheduler](optimizer, opt)

    # ================================================ Run folder ======================================================
    folder = auxiliaries.create_run_folder(Path(opt.save_path) / opt.dataset, opt.savename)
    auxiliaries.save_parameters(folder, vars(opt))
    config.save_config(folder / "config.yaml", opt, give_parser())
    gradients = auxiliaries.GradientRecord() if opt.grad_measure else None
    history: dict[str, list[dict[str, float]]] = {"train": [], "val": [], "distances": []}
    best_epoch, best_score = 0, -np.inf
    print(f"{opt.dataset}: {len(splits.train)} training images of {num_classes} classes; run folder {folder}")

    for epoch in range(0 if opt.check_untrained_accuracy else 1, opt.n_epochs + 1):
        # ============================================= Training =======================================================
        auxiliaries.seed_everything(opt.seed, epoch)
        if epoch > 0:
            start, lr = time.perf_counter(), optimizer.param_groups[0]["lr"]
            loaders.train.set_epoch(epoch)
            averages = train_one_epoch(net, criterion, optimizer, loaders.train, device, epoch, gradients)
            row = {"Epochs": epoch, "Time": time.perf_counter() - start, **averages, "Learning Rate": lr}
            auxiliaries.append_row(folder / "log_train_Base.csv", row)
            history["train"].append(row)
            scheduler.step()

        # ============================================ Evaluation ======================================================
        start = time.perf_counter()
        metrics, spaces = evaluate.evaluate(net, eval_loaders, opt.k_vals, device, opt.eval_metrics)
        row = {"Epochs": epoch, "Time": time.perf_counter() - start, **metrics}
        auxiliaries.append_row(folder / "log_val_Base.csv", row)
        history["val"].append(row)
        if opt.dist_measure:
            points = evaluate.embed(net, loaders.train_eval, device, "training images")
            train_space = evaluate.EmbeddingSpace(points, loaders.train_eval.labels)
            row = {"Epochs": epoch, "Intra / Inter": evaluate.intra_inter_ratio(train_space)}
            auxiliaries.append_row(folder / "distance_measures_Train.csv", row)
            history["distances"].append(row)
        print(f"epoch {epoch:3d} | " + (f"loss {averages['Train Loss']:.4f} | " if epoch else "") + report(metrics))
        if epoch == 0:
            continue

        # ======================================= Plots and checkpoints ================================================
        score = evaluate.mean_over_sets(metrics, SELECTION_METRIC)
        is_best = score > best_score
        if is_best:
            best_epoch, best_score = epoch, score
            show_retrievals(folder / "sample_recoveries.png", spaces[0], eval_sets[0], opt.seed)
        draw_records(
            folder, history, best_epoch, f"{opt.dataset}, {opt.arch}, {opt.loss}, {opt.sampling or 'no tuples'}"
        )
        if gradients is not None:
            gradients.save(folder / "grad_measure.pkl")
        state = {
            "epoch": epoch,
            "metrics": metrics,
            "opt": vars(opt),
            "state_dict": net.state_dict(),
            "criterion": criterion.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "history": history,
            "best_epoch": best_epoch,
        }
        if is_best:
            auxiliaries.save_checkpoint(folder / "checkpoint.pth.tar", state)
        auxiliaries.save_checkpoint(folder / "last.pth.tar", state)

    return summarise(folder, history["val"], best_epoch)


if __name__ == "__main__":
    auxiliaries.run_command(lambda: main(parse_args()))
