"""The run folder: create, lock, describe, save, restore and find it.

`last.pth.tar` holds everything that continuing needs, the history of all rows included, and says what counts as done;
`checkpoint.pth.tar` is a copy of it, made when it holds the best network.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import auxiliaries
import config
import datasets
import loggers
import netlib
import records
from auxiliaries import UserError, by_first_rank, disk_advice, notice

if TYPE_CHECKING:
    from evaluate import EmbeddingSpace
    from methods import MetricLossOnly

RUN_VERSION = 1  # of the files in a run folder; raised when older code can't continue with them
TRAINS_ON_FINEST = (0, "all")  # values of --label_hierarchy_level
STALE_AFTER = 3600  # seconds after which a folder that was being created counts as abandoned

DataDescription = dict[str, dict[str, Any]]  # by set of images: number of images and classes, and a digest

DATA_SCHEMA = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["images", "classes", "sha256"],
        "properties": {"images": {"type": "integer"}, "classes": {"type": "integer"}, "sha256": {"type": "string"}},
    },
}
LARGEST = 1e100  # of figures: squares and sums of them are still finite
NUMBER_SCHEMA = {"type": ["number", "null"], "minimum": -LARGEST, "maximum": LARGEST}  # null: not defined
METRICS_SCHEMA = {"type": "object", "minProperties": 1, "additionalProperties": NUMBER_SCHEMA}
MODEL_SCHEMA = {
    "type": "object",
    "required": ["epoch"],
    "properties": {"epoch": {"type": "integer"}, **dict.fromkeys(("train", "val", "test"), METRICS_SCHEMA)},
    "anyOf": [{"required": ["val"]}, {"required": ["test"]}],
}
SUMMARY_SCHEMA = {
    "type": "object",
    "required": ["selection", "metric", "selected", "last", "seconds"],
    "properties": {
        "selection": {"type": "string"},
        "metric": {"type": "string"},
        "selected": MODEL_SCHEMA,
        "last": MODEL_SCHEMA,
        "best on test": MODEL_SCHEMA,
        "seconds": NUMBER_SCHEMA,
    },
}
ROWS_SCHEMA = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "object"}}}
OPTIMIZER_SCHEMA = {
    "type": "object",
    "required": ["state", "param_groups"],
    "properties": {
        "state": {"type": "object"},
        "param_groups": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["lr", "params"], "properties": {"lr": {"type": "number"}}},
        },
    },
}
STATE_SCHEMA = {
    "type": "object",
    "required": ["version", "epoch", "best_epoch", "metrics", "opt", "history", "state_dict", "criterion", "optimizer"],
    "properties": {
        "version": {"type": "integer"},
        "epoch": {"type": "integer", "minimum": 0},
        "best_epoch": {"type": "integer", "minimum": 0},
        "metrics": {"type": "object"},
        "opt": {"type": "object"},
        "history": ROWS_SCHEMA,
        "data": {"anyOf": [DATA_SCHEMA, {"type": "null"}]},
        "state_dict": {"type": "object"},
        "criterion": {"type": "object"},
        "optimizer": OPTIMIZER_SCHEMA,
        "further_optimizers": {"type": "array", "items": OPTIMIZER_SCHEMA},
        "processes": {"type": "integer"},  # that trained it together, if several
        "scheduler": {
            "type": "object",
            "required": ["schedule", "state"],
            "properties": {
                "schedule": {"type": "object"},
                "state": {"type": "object"},
                "further": {"type": "array", "items": {"type": "object"}},
            },
        },
        "raw_state_dict": {"type": "object"},  # of the network that learns, where state_dict is an average
        "lora": {"type": "object"},  # adapters that state_dict holds, too, as peft.set_peft_model_state_dict takes them
        "method": {"type": "object"},  # what the training method itself counts
    },
}


# A training run at work in its folder


@dataclass(frozen=True)
class Run:
    """A training run at work in its folder.

    Attributes:
        folder: the run folder.
        opt: the resolved flags.
        splits: the images.
        method: what is trained.
        log: the rows so far.
        epoch: the epoch after which this process began; 0 in a new run.
        spaces: the embedding spaces of evaluations by epoch and kind (`val` or `test`): those of the best epoch so far,
            and of what was evaluated since the last epoch was saved.
    """

    folder: Path
    opt: argparse.Namespace
    splits: datasets.Splits
    method: MetricLossOnly
    log: records.Records
    epoch: int
    spaces: dict[tuple[int, str], list[EmbeddingSpace]] = field(default_factory=dict)

    def save(self, epoch: int, best_epoch: int) -> None:
        """Saves everything that continuing needs, and the network as the best one if it is.

        Nothing counts as done before `last.pth.tar` says so; what stands elsewhere can be rebuilt from it.
        """
        for evaluation in [evaluation for evaluation in self.spaces if evaluation[0] != best_epoch]:
            del self.spaces[evaluation]
        self._save_state(epoch, best_epoch)
        for watcher in _watchers:
            watcher(self, epoch)

    @by_first_rank
    def _save_state(self, epoch: int, best_epoch: int) -> None:
        self.log.flush()
        state = {
            "version": RUN_VERSION,
            "epoch": epoch,
            "best_epoch": best_epoch,
            "metrics": records.metrics_of(self.log.rows["val"][-1]),
            "opt": config.configuration(self.opt),
            "data": read_data(self.folder),
            "history": self.log.rows,
            **self.method.state_dict(),
            **({"lora": netlib.lora_state(self.method.evaluated)} if self.opt.lora else {}),
            **({"processes": auxiliaries.ranks().count} if auxiliaries.ranks().count > 1 else {}),
        }
        self._write_state(state)

    @by_first_rank
    def save_history(self) -> None:
        """Adds the rows that were recorded since the last epoch was saved, those of the final evaluation."""
        self.log.flush()
        self._write_state({**read_state(self.folder / "last.pth.tar"), "history": self.log.rows})

    def _write_state(self, state: Mapping[str, Any]) -> None:
        auxiliaries.save_checkpoint(self.folder / "last.pth.tar", state)
        if state["best_epoch"] == state["epoch"]:
            auxiliaries.link_file(self.folder / "last.pth.tar", self.folder / "checkpoint.pth.tar")

    @by_first_rank
    def saved_networks(self) -> dict[int, dict[str, torch.Tensor]]:
        """State dicts of the last and of the selected network, by epoch."""
        states = [read_state(self.folder / name) for name in ("last.pth.tar", "checkpoint.pth.tar")]
        return {state["epoch"]: state["state_dict"] for state in states}


_watchers: list[Callable[[Run, int], None]] = []


@contextmanager
def watched(watcher: Callable[[Run, int], None]) -> Iterator[None]:
    """Inside the block, `watcher(run, epoch)` is called whenever a run of this process has saved an evaluated epoch.

    What it raises ends the run there, which can be continued later.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def open_run(
    opt: argparse.Namespace,
    splits: datasets.Splits,
    method: MetricLossOnly,
    device: torch.device,
    folder: Path | None = None,
) -> Iterator[Run]:
    """Creates a run folder, or continues in one, and keeps it locked until the end of the block.

    Args:
        opt: the resolved flags.
        splits: its images.
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
                write_description(into, opt, environment)
                auxiliaries.save_json(into / "data.json", describe_data(opt, splits))

            folder = create_folder(wanted, describe, may_be_numbered=folder is None)
            stack.enter_context(auxiliaries.locked(folder))
        else:
            stack.enter_context(auxiliaries.locked(folder))
            state = restore(opt, splits, method, folder)
            change_flags(folder, {folder: opt}, opt)
            auxiliaries.save_json(folder / "data.json", describe_data(opt, splits))
        kind = records.Records if auxiliaries.is_first_rank() else records.RowsAlone
        log = kind(folder, _history_to_keep(opt, state), opt.logger)
        stack.push(lambda error, *_: log.close(failed=error is not None))
        epoch = state["epoch"] if state else 0
        log.note_configuration(epoch, config.configuration(opt), environment)
        for name in ("summary.json", "report.html"):  # until this process is done
            auxiliaries.remove_file(folder / name)
        yield Run(folder, opt, splits, method, log, epoch)


def restored(opt: argparse.Namespace, splits: datasets.Splits, method: MetricLossOnly, folder: Path | None) -> Run:
    """A run as it would begin or go on, without a folder being made, changed or locked.

    Raises:
        UserError: it can't continue.
    """
    state = restore(opt, splits, method, folder)
    folder = folder or default_folder(opt)
    log = records.RowsAlone(folder, _history_to_keep(opt, state))
    return Run(folder, opt, splits, method, log, state["epoch"] if state else 0)


def restore(
    opt: argparse.Namespace, splits: datasets.Splits, method: MetricLossOnly, folder: Path | None
) -> dict[str, Any] | None:
    """Puts what is trained into the state that a run continues from, and returns it; None before the first was saved.

    Nothing in the folder changes.

    Raises:
        UserError: it can't be read, its data have changed, or the run can't continue with these flags.
    """
    if folder is None or not folder.exists():
        return None
    state = load_state(folder, opt)
    if state is not None:
        check_data(folder, opt, splits)
        method.load_state_dict(state)
        _tell_other_ranks(folder, state.get("processes", 1))
    return state


def _tell_other_ranks(folder: Path, before: int) -> None:
    """Says what differs where a run continues with another number of processes."""
    now = auxiliaries.ranks().count
    if now != before:
        notice(
            f"{folder} was trained by {before} process(es) and goes on with {now}: batches and random draws stay the "
            "same, and gradients differ in their last digits (dropout, and BatchNorm that isn't frozen, differ more)"
        )


def _history_to_keep(opt: argparse.Namespace, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The saved rows; without those of the final evaluation, if there is more to train."""
    if state is None:
        return None
    is_kept = state["epoch"] >= opt.n_epochs or "test" in opt.splits_to_eval
    return {kind: rows for kind, rows in state["history"].items() if kind != "test" or is_kept}


# Creating and describing


def default_folder(opt: argparse.Namespace) -> Path:
    """Where a new run of the resolved flags goes."""
    return Path(opt.save_path) / opt.dataset / opt.savename


@by_first_rank
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


@by_first_rank
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
        for abandoned in parent.glob(".part-*"):  # by a process that was killed
            if time.time() - abandoned.stat().st_mtime > STALE_AFTER:
                shutil.rmtree(abandoned, ignore_errors=True)
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


def write_description(folder: Path, opt: argparse.Namespace, environment: Mapping[str, Any]) -> None:
    """Writes the flags, the environment, how a changed tree of this repository differs from its commit, and which
    images are left out."""
    write_flags(folder, opt)
    if opt.exclude is not None:
        auxiliaries.copy_file(Path(opt.exclude), folder / "exclude.csv")
    auxiliaries.save_json(folder / "environment.json", environment)
    if environment["git tree is dirty"]:
        with auxiliaries.atomic_write(folder / "git.diff") as path:
            path.write_text(f"{_git('diff', 'HEAD')}\n", encoding="utf-8", errors="surrogateescape")


def _git(*arguments: str) -> str | None:
    """What a git command prints in this repository; None without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="surrogateescape").strip()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The command line, the state of this repository, versions and hardware, as built-in types."""

    def version(*packages: str) -> str | None:
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(package)
        return None

    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": RUN_VERSION,
        "command": sys.argv,
        "git commit": _git("rev-parse", "HEAD"),
        "git tree is dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "faiss": version("faiss-gpu", "faiss-cpu"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": auxiliaries.ranks().count if auxiliaries.ranks().count > 1 else None,
    }


def _processor() -> str:
    """The processor's name, with the number of cores that torch uses, on which sums depend in their last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


# The data of a run


def describe_data(opt: argparse.Namespace, splits: datasets.Splits) -> DataDescription:
    """Counts and a digest of each set of images: of their paths below the dataset's folder, and of their classes."""
    sets = {"train": splits.train}
    for kind, retrieval_sets in (("val", splits.val), ("test", splits.test)):
        for retrieval_set in retrieval_sets:
            sets[f"{kind} {retrieval_set.name} query"] = retrieval_set.query
            if retrieval_set.gallery:
                sets[f"{kind} {retrieval_set.name} gallery"] = retrieval_set.gallery
    root = f"{datasets.image_folder(opt.dataset, opt.source_path)}{os.sep}"
    return {name: _describe_images(images, root) for name, images in sets.items()}


def _describe_images(images: datasets.ImageSet, root: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    names = images.class_names[0]
    for path, label in sorted(zip(images.paths, images.labels[:, 0].tolist())):
        digest.update(f"{path.removeprefix(root)}\0{names[label]}\0".encode(errors="surrogateescape"))
    return {"images": len(images), "classes": images.num_classes(), "sha256": digest.hexdigest()}


def digest_sets(opt: argparse.Namespace, sets: Sequence[datasets.RetrievalSet[datasets.ImageSet]]) -> str:
    """A digest of retrieval sets' images and classes in their order: results of queries with the same one are pairs."""
    root = f"{datasets.image_folder(opt.dataset, opt.source_path)}{os.sep}"
    digest = hashlib.sha256()
    for one in sets:
        for role, images in (("query", one.query), ("gallery", one.gallery)):
            digest.update(f"{role}\0".encode())
            names = images.class_names[0] if images else []
            for path, label in zip(images.paths, images.labels[:, 0].tolist()) if images else []:
                digest.update(f"{path.removeprefix(root)}\0{names[label]}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


@by_first_rank
def read_data(folder: Path) -> DataDescription | None:
    """The description of the data that a run was trained on; None for a run of a version that had none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / "data.json"
    if not path.exists():
        return read_state(folder / "last.pth.tar").get("data") if has_state(folder) else None
    description = auxiliaries.load_json(path)
    auxiliaries.check_schema(path, description, DATA_SCHEMA, "remove it to continue without comparing the data")
    return description


def differing_data(before: DataDescription, now: DataDescription) -> list[str]:
    """What differs between two descriptions of data, in words, by set of images."""
    differences = []
    for key in dict.fromkeys([*before, *now]):
        was, found, name = before.get(key), now.get(key), _set_in_words(key)
        if was == found:
            continue
        counts = [f"{one['images']} images of {one['classes']} classes" if one else "no images" for one in (was, found)]
        is_same = counts[0] == counts[1]
        words = f"{counts[0]}, but other ones" if is_same else f"{counts[1]} instead of {counts[0]}"
        differences.append(f"{name} has {words}")
    return differences


def _set_in_words(key: str) -> str:
    """A set of images, such as `test test query` or `test 800 gallery`, in words: test, test 800 gallery."""
    kind, *name, role = [*key.split(" "), ""] if key == "train" else key.split(" ")
    names = [] if name == [kind] else name
    return " ".join(filter(None, [kind, *names, "" if role == "query" else role]))


def test_data(folder: Path) -> DataDescription | None:
    """The description of a run's test images; None for a run of a version that had none."""
    data = read_data(folder)
    return data and {name: entry for name, entry in data.items() if name.startswith("test ")}


@by_first_rank
def check_data(folder: Path, opt: argparse.Namespace, splits: datasets.Splits) -> None:
    """Makes sure that a run continues, or is evaluated, on the images and classes that it was trained with.

    Raises:
        UserError: they have changed, and --accept_changed_data was not given.
    """
    before = read_data(folder)
    if before is None:
        notice(f"{folder} doesn't say on which images it was trained: whether they are the same can't be checked")
        return
    differences = differing_data(before, describe_data(opt, splits))
    if not differences:
        return
    words = f"the data have changed since {folder} was trained: {'; '.join(differences)}"
    if not opt.accept_changed_data:
        raise UserError(f"{words}: restore them, or give --accept_changed_data")
    notice(words)


# Finding and reading


@by_first_rank
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


@by_first_rank
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
    """A run's config.yaml as plain values, without resolving them; flags that it lacks have what they meant before.

    Raises:
        UserError: it is missing or damaged.
    """
    values = config.read_yaml(config_file(folder))
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.yaml'} is damaged: it is not a mapping of flags")
    return {**_stored_defaults(), **config.MEANT_BEFORE, **config.with_todays_names(values)}


@functools.cache  # a comparison reads a thousand configurations
def _stored_defaults() -> dict[str, Any]:
    """What the flags of a configuration are by default."""
    return {name: config.get_default(name) for name in config.build_parser().names_with(stored=True)}


def compared_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a configuration's flags that make it another one in comparisons."""
    ignored = config.build_parser().names_with(compared=False)
    return {name: value for name, value in values.items() if name not in ignored}


@by_first_rank
def read_summary(folder: Path) -> dict[str, Any]:
    """A finished training run's summary.json.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / "summary.json"
    summary = auxiliaries.load_json(path)
    auxiliaries.check_schema(path, summary, SUMMARY_SCHEMA, "--resume_training writes it anew")
    for network in (summary[name] for name in ("selected", "last", "best on test") if name in summary):
        for kind in network.keys() & {"train", "val", "test"}:
            network[kind] = {name: math.nan if value is None else value for name, value in network[kind].items()}
    return summary


def test_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """The selected network's metrics on the test classes (on the validation classes, where there are no others)."""
    return summary["selected"]["test" if "test" in summary["selected"] else "val"]


# The state


def check_version(file: Path, values: Any) -> None:
    """Makes sure that a run folder's file, with these contents, isn't of a later version of this repository.

    Raises:
        UserError: it is, or it is damaged.
    """
    version = values.get("version") if isinstance(values, Mapping) else None
    if not isinstance(version, int):
        raise UserError(f"{file} is damaged: it doesn't say which version it has; remove it, or restore it")
    if version > RUN_VERSION:
        raise UserError(f"{file} is of a later version of this repository (run folders of version {version})")


def check_flags(folder: Path, opt: argparse.Namespace) -> None:
    """Makes sure that a run can continue, or be evaluated, with these resolved flags.

    Raises:
        UserError: it can't, or its configuration can't be read.
    """
    stored = load_flags(folder)
    fixed = config.build_parser().names_with(fixed=True)
    if opt.evaluate is not None:
        fixed.remove("splits_to_eval")  # it says what to evaluate now
        if stored.label_hierarchy_level in TRAINS_ON_FINEST and opt.label_hierarchy_level in TRAINS_ON_FINEST:
            fixed.remove("label_hierarchy_level")
    if stored.split_shuffle == 0:  # then the seed says which classes are in which set
        fixed.append("seed")
    changed = [name for name in config.changed_flags(stored, opt) if name in fixed]
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder} was trained with {as_flags({name: getattr(stored, name)})}, which must stay the same: drop the "
            "flag"
        )


@by_first_rank
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
        UserError: it can't be read, is not a checkpoint of a run, or is of a later version of this repository.
    """
    state = auxiliaries.load_checkpoint(file)
    check_version(file, state)
    advice = "replace it with an intact one"
    auxiliaries.check_schema(file, state, STATE_SCHEMA, advice)
    for name, value in state["state_dict"].items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{file} is damaged (state_dict.{name} is not an ordinary tensor): {advice}")
    for kind, rows in state["history"].items():
        if kind not in records.LOGS or not all(_is_row(kind, row) for row in rows):
            raise UserError(f"{file} is damaged (history.{kind} does not hold rows of numbers): {advice}")
    return state


NEEDED_COLUMNS = {
    **{"train": ("Time", "Train Loss", "Iterations"), "val": ("Time",), "test": ("Time",), "train_eval": ("Time",)},
    **{"iterations": ("Iteration",), "distances": ()},
}


def _is_row(kind: str, row: Mapping[Any, Any]) -> bool:
    """Whether a row has numbers in named columns, with those that every row of its kind has."""
    numbers_only = all(isinstance(name, str) and isinstance(value, int | float) for name, value in row.items())
    counts = [row.get(name) for name in ("Epochs", *(["Iteration"] if kind == "iterations" else []))]
    is_counted = all(isinstance(count, int) and -1 <= count < 2**63 for count in counts)  # -1: the backbone
    return numbers_only and is_counted and all(name in row for name in NEEDED_COLUMNS[kind])


@by_first_rank
def epoch_reached(folder: Path) -> int:
    """The epoch of a run's `last.pth.tar`; 0 before there is one."""
    return read_state(folder / "last.pth.tar")["epoch"] if has_state(folder) else 0


@by_first_rank
def load_state(folder: Path, opt: argparse.Namespace) -> dict[str, Any] | None:
    """The state that a run continues from: its last one, or with --resume_training best that of its best epoch.

    Returns:
        What its file holds; None before the first was saved.

    Raises:
        UserError: it can't be read, or the run can't continue with these flags.
    """
    check_flags(folder, opt)
    if not has_state(folder):
        return None
    return best_state(folder) if opt.resume_training == "best" else read_state(folder / "last.pth.tar")


@by_first_rank
def is_trained(folder: Path, opt: argparse.Namespace) -> bool:
    """Whether a run has finished, and with these resolved flags has no epoch left to train."""
    if not (folder / "summary.json").exists():
        return False
    state = load_state(folder, opt)
    return state is not None and state["epoch"] >= opt.n_epochs


@by_first_rank
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
    try:
        net.load_state_dict(state["state_dict"])
    except Exception as error:  # torch raises anything at all on the state of something else
        why = auxiliaries.reason(error)
        raise UserError(f"the checkpoint of {folder} is of another network than its config.yaml: {why}") from None
    return net.to(device)


# Continuing with other flags


@by_first_rank
def change_flags(folder: Path, flags_of: Mapping[Path, argparse.Namespace], opt: argparse.Namespace) -> None:
    """Makes a run that is about to continue one of these flags.

    Args:
        folder: the run folder; flags that change are kept there in a folder of their own.
        flags_of: its training runs, the folder itself or those of folds, with their resolved flags.
        opt: the resolved flags of the whole run.
    """
    for path, flags in flags_of.items():
        _repair_best(path)
        if flags.resume_training == "best":
            _go_back_to_best(path)
    changes = config.changed_flags(load_flags(folder), opt)
    for path, flags in flags_of.items():  # a fold may have continued alone, with flags of its own
        changes |= config.changed_flags(load_flags(path), flags)
    if not changes:
        return
    epochs = [str(epoch_reached(path)) for path in flags_of]
    wanted = folder / f"resume_training_config_diffs_{'_'.join(epochs) or 0}"
    kept = create_folder(wanted, lambda into: config.save_config(into / "config.yaml", changes))
    print(f"changed flags, kept in {kept}: {as_flags(changes)}")
    for path, flags in flags_of.items():
        write_flags(path, flags)
        auxiliaries.remove_file(path / "summary.json")  # it was of other flags
    if folder not in flags_of:
        config.save_config(folder / "config.yaml", config.configuration(opt))


def as_flags(values: Mapping[str, Any]) -> str:
    """Flags as a user would type them; where there is no value, `no --name`."""
    return ", ".join(_as_flag(name, value) for name, value in values.items())


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        off = name.removeprefix("not_") if name.startswith("not_") else f"no-{name}"
        return f"--{name if value else off}"
    if value is None or value in ([], {}):
        return f"no --{name}"
    parts = [f"{key}={entry}" for key, entry in value.items()] if isinstance(value, dict) else value
    return f"--{name} {' '.join(map(str, parts)) if isinstance(parts, list | tuple) else parts}"


def _repair_best(folder: Path) -> None:
    """Makes the last state the best network's, too, where the run was stopped before it was."""
    if has_state(folder):
        state = read_state(folder / "last.pth.tar")
        if state["best_epoch"] == state["epoch"]:
            auxiliaries.link_file(folder / "last.pth.tar", folder / "checkpoint.pth.tar")


def _go_back_to_best(folder: Path) -> None:
    """Makes the best epoch the last one; what came after it is kept in a folder of its own."""
    last = folder / "last.pth.tar"
    if not last.exists():
        return
    epoch = best_state(folder)["epoch"]
    if epoch == epoch_reached(folder):
        return

    def keep(into: Path) -> None:
        for name in ("last.pth.tar", "records.db", "grad_measure.npz", *records.LOGS.values(), *loggers.SENDERS):
            if (folder / name).exists():
                shutil.copyfile(folder / name, into / name)

    kept = create_folder(folder / f"dropped_after_epoch_{epoch}", keep)
    for name in loggers.SENDERS:  # they can't take rows back: another run begins there
        auxiliaries.remove_file(folder / name)
    auxiliaries.link_file(folder / "checkpoint.pth.tar", last)
    print(f"going back to epoch {epoch}; what came after it is in {kept}")
