"""Trains every loss with the same budget, and prints a table of what each reaches on classes that it has never seen.

    python benchmark_losses.py --savename losses --dataset caltech101 --arch timm:tf_efficientnet_lite0 \
        --freeze_trunk --cache_features --n_epochs 20

Each learning rate of --lrs trains on the first fold of a cross-validation; the one with the best validation score then
trains the other folds. All further flags are main.py's, the same for all losses. Every training is an ordinary run
folder, `<savename>_<loss>_lr<rate>`, and the same command again continues where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import auxiliaries
import config
import losses
import main
import protocol
import records
import runs
from auxiliaries import UserError

METRICS = ("Recall @ 1", "MAP@R")
BASE = "backbone_alone"
# What is trained by another name: losses that are meant to be added to one, and nothing at all.
NATURAL = {
    "IntraPairVarianceLoss": ["--loss", "TupletMarginLoss", "IntraPairVarianceLoss"],
    "ThresholdConsistentMarginLoss": ["--loss", "smoothap", "ThresholdConsistentMarginLoss"],
    BASE: ["--n_epochs", "0", "--embed_dim", "0"],
}


@dataclass(frozen=True)
class Result:
    """What a loss reached.

    Attributes:
        loss: its name.
        lr: the chosen learning rate; 0 where nothing was trained.
        scores: mean over folds and half of the 95 % confidence interval, by metric.
        failure: why there are none.
    """

    loss: str
    lr: float
    scores: dict[str, tuple[float, float]]
    failure: str = ""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The script's own flags, and those that go to main.py.

    Raises:
        UserError: a flag is wrong.
    """
    parser = auxiliaries.FlagParser(
        prog="benchmark_losses.py",
        description="Trains every loss with the same budget on cross-validated classes. Further flags are main.py's.",
    )
    add = parser.add_argument
    names = [*losses.LOSSES, *losses.LIBRARY_LOSSES]
    # fmt: off
    add("--losses", nargs="+", default=names, choices=names, metavar="NAME", help="losses to train (default: all)")
    add("--lrs", nargs="+", type=auxiliaries.number(float, 0, exclusive=True), default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metavar="RATE", help="learning rates to choose from")
    add("--processes", type=auxiliaries.number(int, 1), default=auxiliaries.cpu_cores(),
        help="losses that train at the same time (default: as many as there are cores)")
    add("--savename", required=True, help="beginning of the names of the run folders")
    # fmt: on
    own, flags = parser.parse_known_args(argv)
    selects = ["--split_scheme", "cross_validation", "--eval_metrics", "Recall", "MAP@R"]
    flags = [
        *selects,
        "--eval_metric_for_best_epoch",
        "MAP@R",
        "--no-tensorboard",
        "--no-pictures",
        "--no-report",
        "--no-check_images",
        *flags,
    ]
    config.resolve(config.parse([*flags, "--savename", own.savename]))  # a wrong flag is found before anything starts
    return own, flags


def natural_flags(loss: str) -> list[str]:
    """The flags of main.py that train a loss as it is meant to be."""
    if loss in NATURAL:
        return NATURAL[loss]
    params = losses.LIBRARY_LOSSES[loss].paper_params if loss in losses.LIBRARY_LOSSES else ()
    return ["--loss", loss, *(["--loss_params", *params] if params else [])]


def continue_or_start(flags: Sequence[str], name: str, lr: float, fold: int | None = None) -> Path:
    """Trains a cross-validation with a learning rate, or one fold of it, unless that is done already.

    Returns:
        Its run folder.

    Raises:
        UserError: it fails.
    """
    only = [] if fold is None else ["--fold", str(fold)]
    argv = [*flags, "--lr", f"{lr:g}", "--savename", f"{name}_lr{lr:g}", *only]
    opt = config.parse(argv)
    folder = runs.default_folder(opt)
    wanted = range(config.resolve(opt).num_training_sets) if fold is None else [fold]
    is_done = all(protocol.is_finished(folder / f"fold_{one}", opt) for one in wanted)
    if is_done and (fold is not None or (folder / "meta" / "results.json").exists()):
        return folder
    protocol.run([*argv, *(["--resume_training"] if folder.exists() else [])], main.main)
    return folder


def train_loss(loss: str, lrs: Sequence[float], savename: str, flags: Sequence[str], log: Path) -> Result:
    """Chooses a loss's learning rate on the first fold, and trains it on all; what is printed goes to a file."""
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return _train_loss(loss, lrs, savename, [*flags, *natural_flags(loss)])


def _train_loss(loss: str, lrs: Sequence[float], savename: str, flags: Sequence[str]) -> Result:
    by_score: dict[float, float] = {}
    failure = ""
    rates = [0.0] if loss == BASE else lrs
    for lr in rates:
        try:
            folder = continue_or_start(flags, f"{savename}_{loss}", lr, fold=0)
        except UserError as error:  # it diverged
            failure = str(error)
            continue
        summary = runs.read_summary(folder / "fold_0")
        by_score[summary["selected"]["val"][METRICS[-1]]] = lr
    if not by_score:
        return Result(loss, 0, {}, failure)
    lr = by_score[max(by_score)]
    try:
        folder = continue_or_start(flags, f"{savename}_{loss}", lr)
    except UserError as error:
        return Result(loss, lr, {}, str(error))
    rows = auxiliaries.load_json(folder / "meta" / "results.json")
    wanted = {(row["Network"], row["Split"], row["Metric"]): row for row in rows}
    found = {name: wanted["selected", "test", name] for name in METRICS}
    return Result(loss, lr, {name: (row["Mean"], row["CI 95 %"]) for name, row in found.items()})


def table(results: Sequence[Result]) -> str:
    """The results in Markdown, the best first."""
    rows = []
    for result in sorted(results, key=lambda result: -result.scores.get(METRICS[-1], (-1.0, 0))[0]):
        natural = natural_flags(result.loss)
        scores = {name: f"{mean:.4f} ± {half:.4f}" for name, (mean, half) in result.scores.items()}
        rows.append(
            {
                "loss": BASE.replace("_", " ") if result.loss == BASE else " ".join(natural).removeprefix("--loss "),
                "--lr": f"{result.lr:g}" if result.lr else "",
                **{name: scores.get(name, result.failure) for name in METRICS},
            }
        )
    return records.format_table(rows)


def share_cores(context: Any, processes: int) -> Any:
    """A queue of as many sets of cores as there are processes, to take one each; without any where there is no way to.

    Small steps on several threads mostly wait for each other: processes with a core of their own get more done.
    """
    queue = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for position in range(processes):
        queue.put(cores[position::processes])
    return queue


def take_cores(shares: Any) -> None:
    """Keeps this process, and all that it starts, on its share of the cores."""
    if cores := shares.get():
        os.sched_setaffinity(0, cores)


def command(argv: Sequence[str]) -> None:
    """Trains what is asked for and prints the table, which also goes to a file beside the run folders.

    Raises:
        UserError: a flag is wrong.
    """
    own, flags = parse(argv)
    opt = config.parse(flags)
    folder = Path(opt.save_path) / opt.dataset
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    processes = min(own.processes, auxiliaries.cpu_cores(), len(own.losses))
    context = multiprocessing.get_context("spawn")
    shares = share_cores(context, processes)
    with ProcessPoolExecutor(processes, context, initializer=take_cores, initargs=(shares,)) as pool:
        for group in ([BASE], own.losses):  # the first one stores the features, which all others read
            waiting = [
                pool.submit(train_loss, loss, own.lrs, own.savename, flags, folder / f"{own.savename}_{loss}.log")
                for loss in group
            ]
            results += [done.result() for done in auxiliaries.Progress(as_completed(waiting), "losses")]
            if results[0].failure:  # all others would fail for the same reason
                raise UserError(results[0].failure)
    text = table(results)
    file = folder / f"{own.savename}.md"
    with auxiliaries.atomic_write(file) as beside:
        beside.write_text(text, encoding="utf-8")
    print(f"{text}\nalso in {file}; run folders beside it")


if __name__ == "__main__":
    auxiliaries.run_command(lambda: command(sys.argv[1:]))
