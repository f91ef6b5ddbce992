# PYTHON_ARGCOMPLETE_OK
"""Trains an embedding network on labeled images and evaluates it by retrieval on classes it has never seen.

One run, on a GPU or else on the CPU:
    python main.py --dataset cub200 --loss marginloss --sampling distance --gpu 0 --savename my_run
Continue it after it was stopped:
    python main.py --resume_training --savename my_run
Cross-validation over classes, all folds or one of them per machine:
    python main.py --dataset cub200 --split_scheme cross_validation --savename folds
    python main.py --dataset cub200 --split_scheme cross_validation --savename folds --fold 2
Evaluate a finished run:
    python main.py --evaluate Training_Results/cub200/my_run --eval_metrics Recall MAP@R
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before torch is loaded: threads that spin while they wait take cores from others
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
        import completion

        completion.complete("main")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load ends it at once, without a traceback

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import auxiliaries
import config
import datasets
import evaluate
import evaluate_runs
import features
import image_cache
import loggers
import methods
import netlib
import plan
import protocol
import records
import runs
from auxiliaries import UserError

READ_LOSSES_EVERY = 50  # iterations: until then they stay on the device


def main(opt: argparse.Namespace, folder: Path | None = None, only_check: bool = False) -> dict[str, float]:
    """Trains and evaluates once.

    Args:
        opt: the flags, from `config.parse`; under cross-validation with --fold.
        folder: the run folder to create, or, where it exists, to continue in (default: a new one named by the flags).
        only_check: whether to stop before anything is written; what can be known to fail has failed then.

    Returns:
        The test metrics of the selected epoch.

    Raises:
        UserError: what the user can fix.
    """
    opt = config.resolve(opt)
    if opt.split_scheme != "predefined" and opt.fold is None:
        raise UserError(f"one training run is one fold of {opt.split_scheme}: give --fold")
    runs.check_folder(folder or runs.default_folder(opt))
    loggers.check(opt.logger)
    device = auxiliaries.pick_device(opt.gpu, opt.deterministic)

    # ================================================== Data ==========================================================
    splits = datasets.give_splits(opt)
    if opt.check_images:
        datasets.check_images(splits, opt.exif_orientation, datasets.csv_file(opt.dataset, opt.source_path))
    if opt.cache_features is not None and not opt.dry_run:
        features.make_folder(opt.cache_path)
    seen = methods.relabel(opt, splits)
    loaders = datasets.give_dataloaders(opt, seen, pin_memory=device.type == "cuda")

    # ========================================= Network, loss and optimizer ============================================
    lower_is_better = evaluate.lower_is_better(opt.eval_metric_for_best_epoch)
    method = methods.build_training(
        opt, seen.train.num_classes(), device, not runs.has_state(folder), len(loaders.train), lower_is_better
    )
    if only_check or opt.dry_run:
        run = runs.restored(opt, splits, method, folder)
        if opt.dry_run:
            plan.print_plan(run, loaders, device)
        return {}

    image_cache.use_cached_images(opt, loaders)  # before there is a run folder: the disk may be too full
    with runs.open_run(opt, splits, method, device, folder) as run, records.resume_hint(run.folder):
        plan.print_start(run, device, len(loaders.train))
        if opt.cache_features is not None:
            loaders = features.give_cached_loaders(opt, loaders, [method.net, method.evaluated], device)
        classes = "validation classes" if splits.val else "test classes"
        console = records.Console(opt.n_epochs, opt.eval_metric_for_best_epoch, classes)
        gradients = None
        if opt.grad_measure:
            gradients = records.GradientRecord(run.folder / "grad_measure.npz", run.log.iterations())
        if run.epoch == 0:
            evaluate_before_training(run, loaders, device, console)
        if 0 < opt.n_epochs <= run.epoch:
            auxiliaries.notice(f"{run.folder} is at epoch {run.epoch} of {opt.n_epochs}: nothing is left to train")

        pictures = evaluate_runs.Pictures(run, loaders, device)

        # ============================================= Training =======================================================
        for epoch in range(run.epoch + 1, opt.n_epochs + 1):
            if is_stuck(opt, run.log, epoch - 1):
                break
            auxiliaries.seed_everything(opt.seed, epoch)
            loaders.train.dataset.set_epoch(epoch)
            train_one_epoch(run, loaders.train, device, epoch, console, gradients)
            method.end_epoch()
            if epoch % opt.save_interval and epoch < opt.n_epochs:
                continue

            evaluate_epoch(run, loaders, device, epoch)
            method.end_evaluation(records.mean_over_sets(run.log.rows["val"][-1], opt.eval_metric_for_best_epoch))
            best_epoch = best_epoch_so_far(opt, run.log)
            console.print_epoch(epoch, run.log, best_epoch)
            if gradients is not None:
                gradients.save()
            run.save(epoch, best_epoch)
            pictures.draw(epoch, best_epoch)
        pictures.finish(best_epoch_so_far(opt, run.log))

        # ===================================== Test classes and summary ===============================================
        if splits.val and splits.test and "test" not in opt.splits_to_eval:
            evaluate_saved_networks(run, loaders, device)
        evaluate_runs.save_query_results(run, loaders, device)
        return summarize(run, loaders, device)


def train_one_epoch(
    run: runs.Run,
    loader: datasets.ImageLoader,
    device: torch.device,
    epoch: int,
    console: records.Console,
    gradients: records.GradientRecord | None = None,
) -> records.Row:
    """Trains on one epoch's batches, and records its iterations and its averages.

    Returns:
        The epoch's row: `Train Loss`, the mean over iterations; seconds, images per second, peak memory in GiB.

    Raises:
        UserError: the loss is not finite.
    """
    method, opt = run.method, run.opt
    method.start_epoch(epoch)
    iterations = records.IterationLog(method, epoch, run.log, opt.log_every)
    start, num_images, lr = time.perf_counter(), 0, method.learning_rates()["Learning Rate"]
    auxiliaries.peak_memory(device, reset=True)
    for iteration, (images, labels, _) in enumerate(console.watch(loader, epoch), start=1):
        parts = method.step(images.to(device, non_blocking=True), labels, epoch)
        if gradients is not None:
            gradients.add(method.net.last_linear.weight)
        iterations.add(iteration, **parts)
        num_images += len(labels)
        if iteration % READ_LOSSES_EVERY == 0 or iteration == len(loader) or console.wants_loss():
            console.show_loss(iterations.read(), iteration)
    seconds = time.perf_counter() - start
    row = {
        "Epochs": epoch,
        "Time": seconds,
        "Train Loss": iterations.mean_loss(),
        "Learning Rate": lr,
        "Iterations": len(iterations.losses),
        "Images/s": num_images / seconds,
        "Peak Memory": auxiliaries.peak_memory(device),
    }
    run.log.add("train", row)
    return row


def evaluate_epoch(run: runs.Run, loaders: datasets.Loaders, device: torch.device, epoch: int) -> None:
    """Evaluates and records what selects the epoch, the validation classes or, without them, the test classes, and
    what --splits_to_eval asks for beside it."""
    for kind, sets in loaders.watched(run.opt.splits_to_eval).items():
        evaluate_sets(run, sets, device, epoch, kind)
    if run.opt.dist_measure and epoch >= 0:
        points = evaluate.embed(run.method.evaluated, loaders.train_eval, device, "training images")
        ratio = evaluate.intra_inter_ratio(evaluate.EmbeddingSpace(points, loaders.train_eval.labels))
        run.log.add("distances", {"Epochs": epoch, "Intra / Inter": ratio})


def evaluate_sets(
    run: runs.Run, sets: Sequence[datasets.RetrievalSet], device: torch.device, epoch: int, kind: str
) -> None:
    """Evaluates retrieval sets, as epoch -1 by the backbone alone; records a row of that kind."""
    opt, start = run.opt, time.perf_counter()
    net = run.method.evaluated if epoch >= 0 else netlib.Trunk(run.method.evaluated)
    validation = None if kind == "val" else run.log.row_of("val", epoch)  # chooses the threshold of verification
    which = opt.k_vals, device, opt.eval_metrics, opt.testing_method, validation
    all_levels = opt.label_hierarchy_level == datasets.ALL_LEVELS
    metrics, spaces = evaluate.evaluate(net, sets, *which, all_levels, evaluate.give_clustering(opt))
    run.log.add(kind, {"Epochs": epoch, "Time": time.perf_counter() - start, **metrics})
    run.spaces[epoch, kind] = spaces


def evaluate_before_training(
    run: runs.Run, loaders: datasets.Loaders, device: torch.device, console: records.Console
) -> None:
    """Evaluates the backbone's features as epoch -1 and the network as epoch 0, as far as the flags ask for it."""
    opt = run.opt
    if opt.check_untrained_accuracy and opt.embed_dim:  # without an embedding layer they are the same
        evaluate_epoch(run, loaders, device, epoch=-1)
        console.print_epoch(-1, run.log, best_epoch=0)
    if opt.check_untrained_accuracy or not opt.n_epochs:
        evaluate_epoch(run, loaders, device, epoch=0)
        console.print_epoch(0, run.log, best_epoch=0)
    if not opt.n_epochs:
        run.save(epoch=0, best_epoch=0)


def evaluate_saved_networks(run: runs.Run, loaders: datasets.Loaders, device: torch.device) -> None:
    """Evaluates the test classes, which were not looked at while training, for the last and the selected network."""
    evaluated = [row["Epochs"] for row in run.log.rows["test"]]
    networks = {epoch: weights for epoch, weights in run.saved_networks().items() if epoch not in evaluated}
    for epoch, weights in sorted(networks.items()):
        run.method.evaluated.load_state_dict(weights)
        evaluate_sets(run, loaders.test, device, epoch, "test")
    if networks:
        run.save_history()


def best_epoch_so_far(opt: argparse.Namespace, log: records.Records) -> int:
    """The epoch with the best value of the metric that selects; 0 before there is one."""
    metric = opt.eval_metric_for_best_epoch
    return records.best_epoch(log.rows["val"], metric, evaluate.lower_is_better(metric))


def is_stuck(opt: argparse.Namespace, log: records.Records, epoch: int) -> bool:
    """Whether the metric that selects has not improved for --patience epochs, as of an epoch that was evaluated."""
    waited = epoch - best_epoch_so_far(opt, log)
    was_evaluated = epoch > 0 and epoch in [row["Epochs"] for row in log.rows["val"]]
    if not (opt.patience and was_evaluated and waited >= opt.patience):
        return False
    print(f"{opt.eval_metric_for_best_epoch} has not improved for {waited} epochs: stopping")
    return True


def summarize(run: runs.Run, loaders: datasets.Loaders, device: torch.device) -> dict[str, float]:
    """Writes and prints how the run ended, and its page.

    Returns:
        The selected epoch's metrics on the test classes (on the validation classes, where there are no others).
    """
    opt, metric, has_val = run.opt, run.opt.eval_metric_for_best_epoch, bool(loaders.val)
    watches_test = "test" in opt.splits_to_eval and bool(loaders.test)
    about = metric, evaluate.lower_is_better(metric), has_val, watches_test, not opt.not_pretrained
    summary = records.build_summary(run.log.rows, *about)
    auxiliaries.save_json(run.folder / "summary.json", summary)
    records.print_summary(summary)
    print(f"plots, retrievals and checkpoints: {run.folder}")
    evaluate_runs.save_report(run, loaders, device, summary)
    return runs.test_metrics(summary)


def command(argv: Sequence[str]) -> dict[str, float]:
    """Does what a command line asks for.

    Returns:
        Test metrics: of the selected epoch, or their means over folds.

    Raises:
        UserError: what the user can fix.
    """
    opt = config.parse(argv)
    config.refuse_unused(opt, config.given_flags(argv))
    return evaluate_runs.evaluate_run(argv) if opt.evaluate is not None else protocol.run(argv, main)


if __name__ == "__main__":
    auxiliaries.run_command(lambda: command(sys.argv[1:]), takes_ranks=True)
