"""The run folder: create, lock, describe, save, restore and find it.

`last.pth.tar` holds everything that continuing needs, the history of all rows included, and says what counts as done;
`checkpoint.pth.tar` is a copy of it, made when it holds the best network.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import importlib.metadata
import itertools
import os
import pickle
import platform
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

import auxiliaries
import config
import netlib
import records
from auxiliaries import UserError, disk_advice

if TYPE_CHECKING:
    from methods import MetricLossOnly

RUN_VERSION = 1  # of the files in a run folder; raised when older code can't continue with them


# A training run at work in its folder


@dataclass(frozen=True)
class Run:
    """A training run at work in its folder.

    Attributes:
        folder: the run folder.
        opt: the resolved flags.
        method: what is trained.
        log: the rows so far.
        epoch: the epoch after which this process began; 0 in a new run.
    """

    folder: Path
    opt: argparse.Namespace
    method: MetricLossOnly
    log: records.Records
    epoch: int

    def save(self, epoch: int, best_epoch: int) -> None:
        """Saves everything that continuing needs, and the network as the best one if it is.

        Nothing counts as done before `last.pth.tar` says so; what stands elsewhere can be rebuilt from it.
        """
        self.log.flush()
        state = {
            "version": RUN_VERSION,
            "epoch": epoch,
            "best_epoch": best_epoch,
            "metrics": records.metrics_of(self.log.rows["val"][-1]),
            "opt": config.configuration(self.opt),
            "history": self.log.rows,
            **self.method.state_dict(),
        }
        auxiliaries.save_checkpoint(self.folder / "last.pth.tar", state)
        if best_epoch == epoch:
            auxiliaries.copy_file(self.folder / "last.pth.tar", self.folder / "checkpoint.pth.tar")

    def saved_networks(self) -> dict[int, dict[str, torch.Tensor]]:
        """State dicts of the last and of the selected network, by epoch."""
        states = [read_state(self.folder / name) for name in ("last.pth.tar", "checkpoint.pth.tar")]
        return {state["epoch"]: state["state_dict"] for state in states}


@contextmanager
def open_run(
    opt: argparse.Namespace, method: MetricLossOnly, device: torch.device, folder: Path | None = None
) -> Iterator[Run]:
    """Creates a run folder, or continues in one, and keeps it locked until the end of the block.

    Args:
        opt: the resolved flags.
        method: what is trained; in a folder that has a state, it is put into that state.
        device: where it is trained.
        folder: the folder to create, or, where it exists, to continue in (default: a new one named by the flags).

    Raises:
        UserError: the folder can't be created or read, is in use, or holds a run of other flags.
    """
    environment = describe_environment(device)
    with contextlib.ExitStack() as stack:
        state = None
        if folder is None or not folder.exists():
            wanted = folder or default_folder(opt)

            def describe(into: Path) -> None:
                write_flags(into, opt)
                auxiliaries.save_json(into / "environment.json", environment)

            folder = create_folder(wanted, describe, may_be_numbered=folder is None)
            stack.enter_context(auxiliaries.locked(folder))
        else:
            stack.enter_context(auxiliaries.locked(folder))
            state = load_state(folder, opt)
        if state is not None:
            method.load_state_dict(state)
        log = records.Records(folder, state["history"] if state else None, opt.tensorboard)
        stack.callback(log.close)
        epoch = state["epoch"] if state else 0
        log.note_configuration(epoch, config.configuration(opt), environment)
        auxiliaries.remove_file(folder / "summary.json")  # until this process is done
        yield Run(folder, opt, method, log, epoch)


# Creating and describing


def default_folder(opt: argparse.Namespace) -> Path:
    """Where a new run of the resolved flags goes."""
    return Path(opt.save_path) / opt.dataset / opt.savename


def check_folder(folder: Path) -> None:
    """Makes sure, before anything expensive, that `create_folder` can work.

    Raises:
        UserError: nothing can be written where the folder would be.
    """
    try:
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(f"{folder} can't be a folder ({error.strerror}): choose another --save_path") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not a folder that can be written to: choose another --save_path")


def numbered(name: str) -> Iterator[str]:
    """The name, then `name_1`, `name_2`, …"""
    return (f"{name}_{number}" if number else name for number in itertools.count())


def create_folder(folder: Path, fill: Callable[[Path], object], may_be_numbered: bool = True) -> Path:
    """Creates a folder, or `<folder>_1`, `_2`, … when it exists: a run folder is never overwritten.

    It appears with what `fill` puts into it, or not at all.

    Raises:
        UserError: it can't be created, or exists and must have this very name.
    """
    check_folder(folder)
    parent, name = folder.parent, folder.name
    beside = parent / f".part-{secrets.token_hex(6)}-{name}"
    try:
        beside.mkdir(parents=True)
        fill(beside)
        for candidate in numbered(name) if may_be_numbered else [name]:
            if not (parent / candidate).exists():
                try:
                    os.rename(beside, parent / candidate)
                    return parent / candidate
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process was quicker
                        raise
        raise UserError(f"{folder} exists: continue it with --resume_training, or choose another --savename")
    except OSError as error:
        why = f"({error.strerror}): {disk_advice(error)} (--save_path, --savename)"
        raise UserError(f"no run folder can be created in {parent} {why}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_flags(folder: Path, opt: argparse.Namespace) -> None:
    """Writes the resolved flags as config.yaml, as hypa.pkl (a pickled dict) and as Parameter_Info.txt."""
    values = config.configuration(opt)
    with auxiliaries.atomic_write(folder / "hypa.pkl") as path:
        path.write_bytes(pickle.dumps(values))
    with auxiliaries.atomic_write(folder / "Parameter_Info.txt") as path:
        path.write_text("".join(f"{name}: {value}\n" for name, value in sorted(values.items())), encoding="utf-8")
    config.save_config(folder / "config.yaml", values)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The command line, the state of this repository, versions and hardware, as built-in types."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    def version(*packages: str) -> str | None:
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(package)
        return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": RUN_VERSION,
        "command": sys.argv,
        "git commit": git("rev-parse", "HEAD"),
        "git tree is dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "faiss": version("faiss-gpu", "faiss-cpu"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
    }


def _processor() -> str:
    """The processor's name, with the number of cores that torch uses, on which sums depend in their last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


# Finding and reading


def find_run(opt: argparse.Namespace, given: Mapping[str, Any]) -> Path:
    """The folder of the run that --savename names, of any dataset unless --dataset says which.

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


def fold_folders(folder: Path) -> dict[int | None, Path]:
    """The folders of a run's folds by number; or, for a single training run, the folder itself by None."""
    matches = ((re.fullmatch(r"fold_([0-9]+)", path.name), path) for path in folder.glob("fold_*") if path.is_dir())
    folds = sorted((int(match[1]), path) for match, path in matches if match)
    return {**dict(folds)} or {None: folder}


def config_file(folder: Path) -> Path:
    """A run's config.yaml.

    Raises:
        UserError: the folder has none, or is of a later version of this repository.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    if (folder / "environment.json").exists():
        check_version(folder / "environment.json", auxiliaries.load_json(folder / "environment.json"))
    return folder / "config.yaml"


def load_flags(folder: Path) -> argparse.Namespace:
    """A run's resolved flags.

    Raises:
        UserError: its config.yaml can't be read.
    """
    return config.resolve(config.parse([], config_file(folder)))


def read_configuration(folder: Path) -> dict[str, Any]:
    """A run's config.yaml as plain values, without resolving them.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is not a mapping of flags")
    return values


def compared_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a configuration's flags that make it another one in comparisons."""
    ignored = config.build_parser().names_with(compared=False)
    return {name: value for name, value in values.items() if name not in ignored}


def read_summary(folder: Path) -> dict[str, Any]:
    """A finished training run's summary.json.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "summary.json"
    summary = auxiliaries.load_json(path)
    models = [summary.get(name) for name in ("selected", "last")] if isinstance(summary, dict) else []
    if not models or not all(isinstance(model, dict) and ("test" in model or "val" in model) for model in models):
        raise UserError(f"{path} is damaged: --resume_training writes it anew")
    return summary


# The state


def check_version(file: Path, values: Any) -> None:
    """Makes sure that a run folder's file, with these contents, isn't of a later version of this repository.

    Raises:
        UserError: it is, or it is damaged.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if not isinstance(version, int):
        raise UserError(f"{file} is damaged: it doesn't say which version it has")
    if version > RUN_VERSION:
        raise UserError(f"{file} is of a later version of this repository (run folders of version {version})")


def check_flags(folder: Path, opt: argparse.Namespace) -> None:
    """Makes sure that a run can continue, or be evaluated, with these resolved flags.

    Raises:
        UserError: it can't, or its configuration can't be read.
    """
    stored = load_flags(folder)
    fixed = config.build_parser().names_with(fixed=True)
    changed = [name for name in config.changed_flags(stored, opt) if name in fixed]
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder} was trained with --{name} {getattr(stored, name)}, which must stay the same: drop the flag"
        )


def has_state(folder: Path | None) -> bool:
    """Whether a run has saved anything to continue from.

    Raises:
        UserError: it has, but that is gone.
    """
    if folder is None:
        return False
    if (folder / "last.pth.tar").exists():
        return True
    if (folder / "checkpoint.pth.tar").exists():
        raise UserError(
            f"{folder} has lost last.pth.tar: copy checkpoint.pth.tar to it to continue from the best epoch"
        )
    return False


def read_state(file: Path) -> dict[str, Any]:
    """Reads `last.pth.tar` or `checkpoint.pth.tar`.

    Raises:
        UserError: it can't be read, or is of a later version of this repository.
    """
    state = auxiliaries.load_checkpoint(file)
    check_version(file, state)
    return state


def epoch_reached(folder: Path) -> int:
    """The epoch of a run's `last.pth.tar`; 0 before there is one."""
    return read_state(folder / "last.pth.tar")["epoch"] if has_state(folder) else 0


def load_state(folder: Path, opt: argparse.Namespace) -> dict[str, Any] | None:
    """What `last.pth.tar` holds; None before the first was saved.

    The run may have been stopped before its best network was copied from it: that is made up for.

    Raises:
        UserError: it can't be read, or the run can't continue with these flags.
    """
    check_flags(folder, opt)
    if not has_state(folder):
        return None
    state = read_state(folder / "last.pth.tar")
    if state["best_epoch"] == state["epoch"]:
        auxiliaries.copy_file(folder / "last.pth.tar", folder / "checkpoint.pth.tar")
    return state


def best_state(folder: Path) -> dict[str, Any]:
    """What the checkpoint of a run's best network holds.

    Raises:
        UserError: there is none yet, or it can't be read.
    """
    if not has_state(folder):
        raise UserError(
            f"{folder} has no network yet, it was stopped before its first evaluation: continue it with "
            "--resume_training"
        )
    state = read_state(folder / "last.pth.tar")
    # The run may have been stopped before its last state was copied to checkpoint.pth.tar.
    return state if state["best_epoch"] == state["epoch"] else read_state(folder / "checkpoint.pth.tar")


def load_network(folder: Path, opt: argparse.Namespace, device: torch.device) -> netlib.EmbeddingNet:
    """A run's best network.

    Args:
        folder: the run folder.
        opt: its resolved flags.
        device: where to put the network.

    Raises:
        UserError: the run has none yet, or it can't be read.
    """
    state = best_state(folder)
    net = netlib.networkselect(vars(opt))
    net.load_state_dict(state["state_dict"])
    return net.to(device)


def go_back_to_best(folder: Path) -> None:
    """Makes the best epoch the last one; what came after it is kept in a folder of its own."""
    last = folder / "last.pth.tar"
    if not last.exists():
        return
    epoch = best_state(folder)["epoch"]
    if epoch == epoch_reached(folder):
        return

    def keep(into: Path) -> None:
        for name in ("last.pth.tar", "records.db", "grad_measure.pkl", *records.LOGS.values()):
            if (folder / name).exists():
                shutil.copyfile(folder / name, into / name)

    kept = create_folder(folder / f"dropped_after_epoch_{epoch}", keep)
    auxiliaries.copy_file(folder / "checkpoint.pth.tar", last)
    print(f"going back to epoch {epoch}; what came after it is in {kept}")
