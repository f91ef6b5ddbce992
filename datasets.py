"""Where images are, which class belongs to which split, and how batches are formed.

A dataset is a function `root -> Splits` and its row in `DATASETS`; a folder of `images/<class>/*`, or a CSV file of
paths and labels, needs neither.
Batches are formed by a function in `BATCH_SAMPLERS`, which `BaseTripletDataset` calls.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import inspect
import io
import itertools
import math
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import transforms
from auxiliaries import (
    MAX_NAME,
    FlagGroup,
    FlagParser,
    UserError,
    atomic_write,
    by_first_rank,
    check_memory,
    check_params,
    cpu_cores,
    locked,
    nearest_name,
    notice,
    number,
    ranks,
    reason,
    seeded,
    share,
    shown,
    user_path,
)

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image, ImageFont

T = TypeVar("T")
U = TypeVar("U")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEST_SIZE = 0.5  # of the classes
TEST_START = 0.5  # among the classes
ALL_LEVELS = "all"  # of the labels
PARTS = ("train", "val", "test")  # folders of class folders
NAMES_OF_PARTS = {  # what others call them
    **{"training": "train", "trainset": "train", "train_set": "train"},
    **{"valid": "val", "validation": "val", "dev": "val", "testing": "test", "testset": "test", "test_set": "test"},
}
DOWNLOAD_TIMEOUT = 60.0  # seconds without an answer
BYTES_PER_DRAW = 200  # of an epoch's list of images

BOX_COLUMNS = ("x1", "y1", "x2", "y2")
CSV_COLUMNS = ("path", "label", "split", "is_query", "is_gallery", "parent", *BOX_COLUMNS)
YES_OR_NO = {  # as pandas and others write them; an empty value says no
    **dict.fromkeys(("true", "yes", "t", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0", "0.0", ""), False),
}


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of data, batches and splits."""
    # fmt: off
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", default="cub200", metavar="NAME", fixed=True, protocol=True,
        help=f"{', '.join(name for name in DATASETS if not name.startswith('torchvision_'))}; torchvision:NAME, "
        f"with the name of one of its classes: {', '.join(TORCHVISION)}; or any folder of class folders, or a CSV file "
        f"with the columns {', '.join(CSV_COLUMNS[:2])} and, where wanted, {', '.join(CSV_COLUMNS[2:])}: its name in "
        "--source_path, or its path")
    add_source_arguments(group)
    add("--check_images", action="switch", default=True, machine=True, compared=False,
        help="make sure that all images can be opened before training begins")
    add("--kernels", type=number(int, 0), machine=True, compared=False,
        help="data-loading workers, at most one per core (default: 8 beside a GPU; on the CPU a quarter of the cores)")
    add("--bs", type=number(int, 1), default=112, help="images per training batch")
    add("--eval_bs", type=number(int, 1), compared=False, help="images per batch in evaluation (default: --bs)")
    add("--samples_per_class", type=number(int, 1),
        help="images of each class in a batch; 1: batches don't depend on classes (default: by --loss, 4 or 1)")
    add("--batch_sampler", choices=BATCH_SAMPLERS,
        help="how batches are formed (default: shuffled with --samples_per_class 1, otherwise class_balanced); "
        "HierarchicalSampler, of pytorch-metric-learning: each from a few super classes, the next coarser labels")
    add("--batch_sampler_params", action="params", default={},
        help="parameters of --batch_sampler: for HierarchicalSampler super_classes_per_batch (default: 2) and "
        "batches_per_super_tuple (default: 4), the batches that each combination of super classes gets in an epoch")
    add("--redraw_images", action="switch",
        help="class_balanced: draw the images of a class anew for each batch, as the MPerClassSampler of "
        "pytorch-metric-learning does; by default all of them are drawn before any is drawn again")
    add("--iterations_per_epoch", type=number(int, 1), help="batches per epoch (default: training images // bs)")
    # fmt: on
    add_protocol_arguments(parser)


def add_source_arguments(group: FlagGroup) -> None:
    """Declares the flags of where a dataset's images are, and which of them count."""
    # fmt: off
    add = group.add_argument
    add("--source_path", type=user_path, default="Datasets", machine=True, compared=False,
        help="folder that contains the datasets")
    add("--download", action="switch", machine=True, compared=False, help="download the dataset first if it is missing")
    add("--download_url", metavar="URL", machine=True, compared=False,
        help="with --download: address of a folder that contains the archives (default: where they are published)")
    add("--exclude", type=user_path, metavar="FILE", protocol=True,
        help="CSV file with a column path: the images that are left out of the dataset, as `python check.py NAME` "
        "proposes them; relative paths begin in the dataset's folder")
    # fmt: on


def add_protocol_arguments(parser: FlagParser) -> None:
    """Declares the flags of which classes, or images, are for training, validation and testing."""
    # fmt: off
    add = parser.add_argument_group("protocol", protocol=True).add_argument
    add("--split_scheme", choices=SPLIT_SCHEMES, default="predefined", fixed=True,
        help="predefined: the literature's training and test images; cross_validation: some classes are set aside for "
        "testing, the others are divided into partitions, and each fold validates on one and trains on the rest; "
        "predefined_with_validation: the same inside the literature's training classes, tested on its test images: the "
        "sound way on Online Products and In-Shop; closed_set: of every class some images for testing, the others "
        "divided into partitions, which measures retrieval of known classes")
    add("--test_size", type=number(float, 0, below=1), default=TEST_SIZE, fixed=True,
        help="fraction of the classes used for testing, in cross_validation and of any folder of class folders, or in "
        "closed_set of the images of every class; 0, for such a folder: train on all classes, and evaluate on the same "
        "ones")
    add("--test_start_idx", type=number(float, 0, below=1), default=TEST_START, fixed=True, needs="cross_validation",
        help="cross_validation: where the test classes begin among the sorted classes, as a fraction of their number; "
        "closed_set: the same among the images of a class")
    add("--num_training_partitions", type=number(int, 2), default=4, fixed=True, needs="cross_validation",
        help="of all split schemes but predefined: number of partitions of the remaining classes or images")
    add("--num_training_sets", type=number(int, 1), compared=False, needs="cross_validation",
        help="of all split schemes but predefined: number of folds to run (default: 4, or the number of partitions if "
        "that is smaller)")
    add("--fold", type=number(int, 0), fixed=True, compared=False, needs="cross_validation",
        help="of all split schemes but predefined: run only this fold, counted from 0 (default: all)")
    add("--split_shuffle", nargs="?", const=0, type=number(int, 0), metavar="SEED", fixed=True,
        needs="cross_validation",
        help="permute the classes (closed_set: the images of each class) before they are cut into test, validation and "
        "training: with SEED, the same for all runs; without SEED or with 0, with --seed, so that runs of different "
        "seeds have different test classes (default: sorted)")
    add("--fold_order", choices=FOLD_ORDERS, default="partition", fixed=True, needs="cross_validation",
        help="which classes fold i validates on; partition: partition i; reality_check: as the benchmarker 0.9.13 did, "
        "the block that ends where partition i begins, which for fold 0 is the last one")
    add("--label_hierarchy_level", type=label_level, default=0, metavar="LEVEL", fixed=True,
        help="level of the labels to train and evaluate on: 0 is the finest; coarser ones where a dataset has them; "
        "all: train on the finest, evaluate on each (Level 0 Recall @ 1, ...) and average (Level mean Recall @ 1)")
    # fmt: on


def label_level(text: str) -> int | str:
    """An argparse type: a level of the labels, or `all`."""
    if text == ALL_LEVELS:
        return text
    try:
        return number(int, 0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor is it {ALL_LEVELS}") from None


@dataclass(frozen=True)
class ImageSet:
    """Labeled images.

    Attributes:
        paths: N image files.
        labels: `(N, H)` int64, one column per level of the label hierarchy, the finest first.
        class_names: for each level, the names that its labels index; shared by all sets of a dataset.
    """

    paths: Sequence[str]
    labels: np.ndarray
    class_names: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, chosen: np.ndarray) -> ImageSet:
        """The images that `chosen`, a mask `(N,)` or an array of positions, selects."""
        positions = np.arange(len(self))[chosen]
        return ImageSet([self.paths[i] for i in positions.tolist()], self.labels[positions], self.class_names)

    def at_level(self, level: int) -> ImageSet:
        """The same images without the levels finer than `level`."""
        return ImageSet(self.paths, self.labels[:, level:], self.class_names[level:])

    def num_classes(self) -> int:
        """The number of classes that occur, of the finest level."""
        return len(np.unique(self.labels[:, 0]))


@dataclass(frozen=True)
class RetrievalSet(Generic[T]):
    """Queries and the gallery that they search; without a gallery they search each other.

    What stands for the images is an `ImageSet`, later its `ImageLoader`, and then its embeddings.
    """

    name: str
    query: T
    gallery: T | None = None

    def map(self, function: Callable[[T], U]) -> RetrievalSet[U]:
        """The set with `function` applied to queries and gallery."""
        return RetrievalSet(self.name, function(self.query), None if self.gallery is None else function(self.gallery))


@dataclass(frozen=True)
class Splits:
    """A dataset's protocol. A label means the same class in all sets."""

    train: ImageSet
    val: Sequence[RetrievalSet[ImageSet]] = ()
    test: Sequence[RetrievalSet[ImageSet]] = ()

    def named_sets(self) -> Iterator[tuple[str, ImageSet]]:
        """Every set of images with a name."""
        yield "train", self.train
        for one in (*self.val, *self.test):
            yield one.name, one.query
            if one.gallery is not None:
                yield f"{one.name} gallery", one.gallery

    def map(self, function: Callable[[ImageSet], ImageSet]) -> Splits:
        """The splits with `function` applied to every set of images."""
        val, test = ([one.map(function) for one in sets] for sets in (self.val, self.test))
        return Splits(function(self.train), val, test)

    def at_level(self, level: int) -> Splits:
        """The same images without the levels finer than `level`.

        Raises:
            UserError: the labels have no such level.
        """
        levels = len(self.train.class_names)
        if level >= levels:
            raise UserError(
                f"--label_hierarchy_level {level} does not exist: the dataset's labels have levels 0 to {levels - 1}"
            )
        return self.map(lambda images: images.at_level(level))


def make_image_set(paths: Sequence[str], *levels: Sequence[str], key: Callable[[str], Any] | None = None) -> ImageSet:
    """Numbers class names in sorted order and sorts the images by class and path.

    Args:
        paths: N image files.
        levels: for each label level, the finest first, the class name of every image.
        key: sort key of the finest level's names (default: the name).
    """
    columns, class_names = [], []
    for level, names in enumerate(levels):
        ordered = sorted(set(names), key=None if level else key)
        numbers = {name: label for label, name in enumerate(ordered)}
        columns.append(np.array([numbers[name] for name in names], dtype=np.int64))
        class_names.append([printable(name) for name in ordered])
    by_path = np.array(sorted(range(len(paths)), key=paths.__getitem__), dtype=np.int64)
    order = by_path[np.argsort(columns[0][by_path], kind="stable")]
    return ImageSet([paths[i] for i in order.tolist()], np.stack(columns, axis=1)[order], class_names)


def printable(name: str) -> str:
    """A file's name as text: bytes in it that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def split_classes(images: ImageSet, test_size: float = TEST_SIZE) -> Splits:
    """Tests on the last classes, a fraction `test_size` of all, and trains on the others."""
    num_classes = len(images.class_names[0])
    is_train = images.labels[:, 0] < math.floor(num_classes * (1 - test_size) + 1e-9)
    return Splits(images.subset(is_train), test=[RetrievalSet("test", images.subset(~is_train))])


def split_by_part(
    paths: Sequence[str],
    parts: Sequence[str],
    *levels: Sequence[str],
    key: Callable[[str], Any] = str,
    origins: Sequence[str] | None = None,
) -> Splits:
    """Splits by each image's part: `train`; `val`; `query` and `gallery`, or any others, each a test set of its own.

    Args:
        paths: N image files.
        parts: the part of each.
        levels: for each label level, the finest first, the class name of every image.
        key: sort key of the finest level's names.
        origins: for each image, the row that lists it: repeated rows are dropped then.

    Raises:
        UserError: an image has two classes, or is for training and for testing.
    """
    if origins is not None:
        paths, kept = check_repeats(paths, levels[0], parts, origins)
        paths, parts, *levels = ([column[i] for i in kept] for column in (paths, parts, *levels))  # type: ignore[assignment]
    images = make_image_set(paths, *levels, parts, key=key)
    part_labels = images.labels[:, -1]
    images = ImageSet(images.paths, images.labels[:, :-1], images.class_names[:-1])
    sets = {part: images.subset(part_labels == sorted(set(parts)).index(part)) for part in dict.fromkeys(parts)}
    train = sets.pop("train")
    if "gallery" in sets:
        return Splits(train, test=[RetrievalSet("test", sets["query"], sets["gallery"])])
    val, test = ([RetrievalSet(part, sets[part]) for part in sets if (part == "val") == is_val] for is_val in (1, 0))
    return Splits(train, val, test)


def pool(splits: Splits) -> ImageSet:
    """All images of a dataset, each once, sorted by class and path."""
    sets = [images for _, images in splits.named_sets()]
    labels = {path: label for images in sets for path, label in zip(images.paths, images.labels)}
    paths = sorted(labels, key=lambda path: (labels[path][0], path))
    return ImageSet(paths, np.stack([labels[path] for path in paths]), splits.train.class_names)


def class_disjoint_splits(
    images: ImageSet,
    fold: int,
    test_size: float,
    test_start_idx: float,
    num_training_partitions: int,
    shuffle_seed: int | None = None,
    fold_order: str = "partition",
) -> Splits:
    """One fold of cross-validation over classes of the finest level.

    Of the n sorted classes, int(n · start) … int(n · start) + int(n · size) - 1, modulo n, are test classes. The others
    are divided into partitions: one is for validation, the rest for training. In every set, images search each other.

    Args:
        images: all images of the dataset.
        fold: 0 … num_training_partitions - 1.
        test_size: fraction of the classes to test on, in (0, 1).
        test_start_idx: where the test classes begin, as a fraction, in [0, 1).
        num_training_partitions: number of partitions.
        shuffle_seed: permutes the classes before they are cut (default: they are sorted).
        fold_order: a key of `FOLD_ORDERS`.

    Raises:
        UserError: a set gets fewer than two classes.
    """
    labels = images.labels[:, 0]
    classes = _order_classes(labels, shuffle_seed)
    start, size = int(len(classes) * test_start_idx), int(len(classes) * test_size)
    test = classes[np.arange(start, start + size) % len(classes)]
    others = classes[~np.isin(classes, test)]
    flags = f"--test_size {test_size:g} and --num_training_partitions {num_training_partitions}"
    leaves = "--split_scheme cross_validation leaves"
    if len(test) < 2:
        raise UserError(
            f"{leaves} {len(test)} test class(es) of {len(classes)} with {flags}, and two are needed: raise "
            "--test_size, or give more classes"
        )
    block = int(len(classes) * ((1 / num_training_partitions) * (1 - test_size)))  # as 0.9.13 rounds
    val = _choose_validation(others, fold, num_training_partitions, fold_order, block)
    if val is None:
        count = min(len(others) // num_training_partitions, block if fold_order == "reality_check" else len(others))
        raise UserError(
            f"{leaves} {count} validation class(es) of {len(classes)} with {flags}, and two are needed: lower "
            "--num_training_partitions or --test_size, or give more classes"
        )
    assert not set(val) & set(test), "sets share classes"
    val_set, test_set = (images.subset(np.isin(labels, chosen)) for chosen in (val, test))
    train_set = images.subset(~np.isin(labels, np.concatenate([val, test])))
    return Splits(train_set, val=[RetrievalSet("val", val_set)], test=[RetrievalSet("test", test_set)])


def _order_classes(labels: np.ndarray, shuffle_seed: int | None) -> np.ndarray:
    """The classes that occur, sorted, or permuted by a seed."""
    classes = np.unique(labels)
    return classes if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(classes)


def _validate_on_partition(classes: np.ndarray, fold: int, num_partitions: int, block: int) -> np.ndarray:
    """Partition `fold` of `numpy.array_split`."""
    return np.array_split(classes, num_partitions)[fold]


def _validate_as_reality_check(classes: np.ndarray, fold: int, num_partitions: int, block: int) -> np.ndarray:
    """The `block` classes that end, cyclically, where partition `fold` begins.

    The benchmarker 0.9.13, with which Musgrave et al. (ECCV 2020) made their tables, lets the training classes of fold
    i begin at int(i / partitions · classes), and validates on the block that follows them: on the last quarter in fold
    0, on the first one in fold 1. All blocks are of one size: with a remainder, a few classes are in none of them.
    """
    end = int(fold / num_partitions * len(classes))
    return classes[np.arange(end - block, end) % len(classes)]


FOLD_ORDERS: dict[str, Callable[[np.ndarray, int, int, int], np.ndarray]] = {
    "partition": _validate_on_partition,
    "reality_check": _validate_as_reality_check,
}


def _choose_validation(
    classes: np.ndarray, fold: int, num_partitions: int, fold_order: str, block: int
) -> np.ndarray | None:
    """The classes that a fold validates on; None where a partition would have fewer than two of them.

    With two in each of at least two partitions, enough are left to train on.
    """
    if len(classes) // num_partitions < 2:
        return None
    val = FOLD_ORDERS[fold_order](classes, fold, num_partitions, block)
    return val if len(val) > 1 else None


def validation_splits(
    splits: Splits,
    fold: int,
    num_training_partitions: int,
    shuffle_seed: int | None = None,
    fold_order: str = "partition",
) -> Splits:
    """One fold of cross-validation inside the training classes of a dataset's own splits, whose test sets stay.

    Images that the dataset sets aside for validation count as training images before they are divided.

    Args:
        splits: the dataset's own.
        fold: 0 … num_training_partitions - 1.
        num_training_partitions: number of partitions of the training classes.
        shuffle_seed: permutes the classes before they are divided (default: they are sorted).
        fold_order: a key of `FOLD_ORDERS`.

    Raises:
        UserError: there are no test sets, or a partition would have fewer than two classes.
    """
    scheme = "--split_scheme predefined_with_validation"
    if not splits.test:
        raise UserError(f"{scheme} needs test images of the dataset's own: choose cross_validation")
    images = pool(Splits(splits.train, val=splits.val))
    labels = images.labels[:, 0]
    classes = _order_classes(labels, shuffle_seed)
    block = len(classes) // num_training_partitions
    val = _choose_validation(classes, fold, num_training_partitions, fold_order, block)
    if val is None:
        raise UserError(
            f"{scheme} leaves {block} validation class(es) of {len(classes)} training classes with "
            f"--num_training_partitions {num_training_partitions}, and two are needed: lower it, or give more classes"
        )
    is_val = np.isin(labels, val)
    return Splits(images.subset(~is_val), val=[RetrievalSet("val", images.subset(is_val))], test=splits.test)


def closed_set_splits(
    images: ImageSet,
    fold: int,
    test_size: float,
    test_start_idx: float,
    num_training_partitions: int,
    shuffle_seed: int | None = None,
) -> Splits:
    """One fold of cross-validation over images, with every class of the finest level in every set.

    Of the n images of a class, sorted by path, n · size from int(n · start) on, modulo n, are test images, rounded up
    or down so that the classes together have that share. The others are divided into partitions (`numpy.array_split`),
    the larger of which fall to another fold in each class.

    Args:
        images: all images of the dataset, sorted by class and path.
        fold: the partition to validate on, 0 … num_training_partitions - 1.
        test_size: fraction of the images of each class to test on, in (0, 1).
        test_start_idx: where they begin, as a fraction, in [0, 1).
        num_training_partitions: number of partitions.
        shuffle_seed: permutes the images of each class before they are cut (default: they are sorted).

    Raises:
        UserError: a class has too few images to be in every set.
    """
    rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
    partition_of = np.full(len(images), -1)  # -1: for testing
    before = 0
    for label, members in enumerate(members_of_classes(images.labels[:, 0])):
        count = len(members)
        size = math.floor((before + count) * test_size + 1e-9) - math.floor(before * test_size + 1e-9)
        before += count
        if size < 1 or count - size < num_training_partitions:
            name = images.class_names[0][images.labels[members[0], 0]]
            raise UserError(
                f"--split_scheme closed_set needs images of every class in every set, and class {shown(name)} has only "
                f"{count} to divide with --test_size {test_size:g} and --num_training_partitions "
                f"{num_training_partitions}: lower --num_training_partitions, or leave such classes out"
            )
        members = members if rng is None else rng.permutation(members)
        test = np.arange(size) + int(count * test_start_idx)
        others = np.delete(members, test % count)
        for partition, part in enumerate(np.array_split(others, num_training_partitions)):
            partition_of[part] = (partition + label) % num_training_partitions
    train_set, val_set, test_set = (
        images.subset(chosen)
        for chosen in ((partition_of >= 0) & (partition_of != fold), partition_of == fold, partition_of < 0)
    )
    return Splits(train_set, val=[RetrievalSet("val", val_set)], test=[RetrievalSet("test", test_set)])


def _shuffle_seed(opt: argparse.Namespace) -> int | None:
    """What permutes classes, or the images of a class, before they are cut; None where they are sorted."""
    return None if opt.split_shuffle is None else opt.split_shuffle or opt.seed


SPLIT_SCHEMES: dict[str, Callable[[Splits, argparse.Namespace], Splits]] = {
    "predefined": lambda splits, opt: splits,
    "cross_validation": lambda splits, opt: class_disjoint_splits(
        pool(splits),
        opt.fold,
        opt.test_size,
        opt.test_start_idx,
        opt.num_training_partitions,
        _shuffle_seed(opt),
        opt.fold_order,
    ),
    "predefined_with_validation": lambda splits, opt: validation_splits(
        splits, opt.fold, opt.num_training_partitions, _shuffle_seed(opt), opt.fold_order
    ),
    "closed_set": lambda splits, opt: closed_set_splits(
        pool(splits), opt.fold, opt.test_size, opt.test_start_idx, opt.num_training_partitions, _shuffle_seed(opt)
    ),
}
WITH_FOLDS = "cross_validation, predefined_with_validation or closed_set"  # in words


_kept: list[dict[Any, Splits]] = []


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Inside the block, `give_splits` reads a dataset once, however many runs ask for it."""
    _kept.append({})
    try:
        yield
    finally:
        _kept.pop()


@by_first_rank
def give_splits(opt: argparse.Namespace) -> Splits:
    """The training, validation and test images, from the resolved flags.

    Raises:
        UserError: the data can't be read, or can't be split as the flags say.
    """
    cuts_anew = opt.split_scheme in ("cross_validation", "closed_set")
    test_size = TEST_SIZE if cuts_anew else opt.test_size
    may_download = opt.download and not opt.dry_run
    wanted = (opt.dataset, opt.source_path, may_download, opt.download_url, test_size, opt.exclude)
    kept = _kept[-1] if _kept else {}
    if wanted not in kept:
        kept[wanted] = read_splits(*wanted)
    splits = kept[wanted]
    level = 0 if opt.label_hierarchy_level == ALL_LEVELS else opt.label_hierarchy_level
    splits = SPLIT_SCHEMES[opt.split_scheme](splits, opt).at_level(level)
    check_splits(opt.dataset, splits, shares_classes=opt.split_scheme == "closed_set")
    _check_what_selects(opt, splits)
    if opt.label_hierarchy_level == ALL_LEVELS:
        _check_levels(opt, splits)
    if any(name.startswith("Verification") for name in opt.eval_metrics) and not splits.val:
        raise UserError(
            "Verification accuracy needs validation classes, which choose its threshold, and these splits have none: "
            f"choose another --split_scheme, such as {WITH_FOLDS}, or evaluate ROC AUC, EER or FNMR instead"
        )
    if opt.testing_method == "WithSameParentLabel" and len(splits.train.class_names) < 2:
        raise UserError(
            "--testing_method WithSameParentLabel needs labels coarser than --label_hierarchy_level "
            f"{opt.label_hierarchy_level}, which {opt.dataset} doesn't have: drop --testing_method"
        )
    return splits


def _check_what_selects(opt: argparse.Namespace, splits: Splits) -> None:
    """Makes sure that what --splits_to_eval asks for while training is there, and validation classes beside it.

    Raises:
        UserError: it isn't.
    """
    if opt.evaluate is not None or {"val", "test"} == set(opt.splits_to_eval):
        return
    flag = f"--splits_to_eval {' '.join(opt.splits_to_eval)}"
    if not splits.val:
        raise UserError(
            f"{flag} needs validation classes to select the epoch, and these splits of {opt.dataset} have none: choose "
            "--split_scheme predefined_with_validation, or drop --splits_to_eval, and the test classes select it"
        )
    if "test" in opt.splits_to_eval and not splits.test:
        raise UserError(f"{flag}: these splits of {opt.dataset} have no test classes: leave test out")


def _check_levels(opt: argparse.Namespace, splits: Splits) -> None:
    """Makes sure that the labels can be evaluated at each of their levels.

    Raises:
        UserError: they can't.
    """
    flag, levels = f"--label_hierarchy_level {ALL_LEVELS}", len(splits.train.class_names)
    if levels < 2:
        raise UserError(f"{flag}: the labels of {opt.dataset} have a single level: drop it")
    levels -= opt.testing_method == "WithSameParentLabel"  # the coarsest has no parents
    named = re.match(r"Level (\d+) ", opt.eval_metric_for_best_epoch)
    if named and int(named[1]) >= levels and opt.evaluate is None:
        metric = f"--eval_metric_for_best_epoch {opt.eval_metric_for_best_epoch}"
        raise UserError(f"{metric} does not exist: {opt.dataset} is evaluated at levels 0 to {levels - 1}")
    for level in range(1, levels):
        for one in (*splits.val, *splits.test):
            if len(np.unique((one.gallery or one.query).labels[:, level])) < 2:
                raise UserError(
                    f"{flag}: all images of {opt.dataset}, {one.name}, are of one class at level {level}, so there is "
                    "nothing to tell apart: name a level"
                )


def by_number(name: str) -> tuple[int, str]:
    """Sort key: names that consist of digits in the order of their numbers."""
    return len(name), name


def find_layout(root: Path, *layouts: str) -> Path:
    """The first of the layouts, paths relative to `root`, that exists.

    Raises:
        UserError: none of them exists.
    """
    for layout in layouts:
        if (root / layout).exists():
            return root / layout
    raise UserError(f"{root} contains none of {', '.join(layouts)}: Datasets/README.md shows the layouts")


def read_class_folders(folder: Path, key: Callable[[str], Any] | None = None, left_out: Sequence[str] = ()) -> ImageSet:
    """Reads `folder/<class>/<image>`; classes are sorted by `key(name)`, and the images of a class by name.

    Args:
        folder: of the class folders.
        key: sort key of the classes' names (default: the name).
        left_out: folders that are not classes.

    Raises:
        UserError: a class folder has no images, there are fewer than two classes, or a link leads nowhere.
    """
    paths, classes = list_class_folders(folder, left_out)
    if len(set(classes)) < 2:
        raise UserError(f"{folder} contains {len(set(classes))} class folder(s): at least two are needed")
    return make_image_set(paths, classes, key=key)


def list_class_folders(folder: Path, left_out: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """The images `folder/<class>/<image>` and their classes; a notice counts other files.

    Args:
        folder: of the class folders.
        left_out: folders that are not classes.

    Raises:
        UserError: a class folder has no images, or a link leads nowhere.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of class folders: Datasets/README.md shows the layouts")
    paths: list[str] = []
    classes: list[str] = []
    ignored: dict[str, list[str]] = defaultdict(list)
    class_folders, files = _list_entries(folder)
    ignored["images that are in no class folder"] = list(filter(has_image_suffix, files))
    for class_folder in class_folders:
        if os.path.basename(class_folder) in left_out:
            continue
        subfolders, files = _list_entries(class_folder)
        below = [os.path.join(at, name) for top in subfolders for at, _, names in os.walk(top) for name in names]
        ignored["images in subfolders of class folders"] += filter(has_image_suffix, below)
        images = list(filter(has_image_suffix, files))
        ignored["files without an image's suffix"] += set(files) - set(images)
        if not images:
            raise UserError(
                f"{class_folder} contains no images{' itself' if below else ''}: add some, or remove the folder"
            )
        paths += images
        classes += [os.path.basename(class_folder)] * len(images)
    for what, files in ignored.items():
        if files:
            notice(f"{len(files)} {what} of {folder} are ignored, e.g. {min(files)}")
    return paths, classes


def has_image_suffix(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(file).startswith(".")


def _list_entries(folder: str | Path) -> tuple[list[str], list[str]]:
    """The folders and the files in a folder, without hidden ones.

    Raises:
        UserError: an image, or what may be a folder, is a link that leads nowhere.
    """
    folders, files = [], []
    for entry in os.scandir(folder):
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            if not suffix or suffix in IMAGE_SUFFIXES:
                raise UserError(f"{entry.path} is a link that leads nowhere: mend or remove it")
        elif entry.is_dir():
            folders.append(entry.path)
        elif entry.is_file():
            files.append(entry.path)
    return folders, files


def read_folder(root: Path, test_size: float = TEST_SIZE) -> Splits:
    """Reads class folders in `root` or `root/images`, or in folders `train` and `test` or `val` there.

    Args:
        root: the dataset's folder.
        test_size: fraction of the classes to test on, where there are no such folders.

    Raises:
        UserError: there are no such folders, or they leave nothing to train or to evaluate on.
    """
    subfolders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    is_class = root / "images" in subfolders and len(subfolders) > 1 and not _list_entries(root / "images")[0]
    folder = root / "images" if (root / "images").exists() and not is_class else root
    parts = find_parts(folder)
    if "train" not in parts:
        return split_classes(read_class_folders(folder), test_size)
    if len(parts) == 1:
        raise UserError(f"{folder} has a folder train, but neither val nor test beside it: add one to evaluate on")
    if test_size != TEST_SIZE:
        raise UserError(f"--test_size {test_size} contradicts the folders {', '.join(parts)} of {folder}: drop it")
    listed = {part: list_class_folders(path) for part, path in parts.items()}
    return split_by_part(
        [path for paths, _ in listed.values() for path in paths],
        [part for part, (paths, _) in listed.items() for _ in paths],
        [name for _, classes in listed.values() for name in classes],
    )


def find_parts(folder: Path) -> dict[str, Path]:
    """The folders `train`, `val` and `test` of class folders, in upper or lower case; those that there are.

    Raises:
        UserError: there are two of one name, or there are others whose names say the same.
    """
    subfolders = sorted(path for path in folder.iterdir() if path.name.lower() in (*PARTS, *NAMES_OF_PARTS))
    subfolders = [path for path in subfolders if _holds_class_folders(path)]
    parts: dict[str, Path] = {}
    for path in subfolders:
        part = path.name.lower()
        if part in NAMES_OF_PARTS:
            raise UserError(f"{path} is not read as a part of the images: rename it to {NAMES_OF_PARTS[part]}")
        if part in parts:
            raise UserError(f"{folder} has both {parts[part].name} and {path.name}: put their class folders into one")
        if part in PARTS:
            parts[part] = path
    return {part: parts[part] for part in PARTS if part in parts}


def _holds_class_folders(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    folders, files = _list_entries(folder)
    return bool(folders) and not any(map(has_image_suffix, files))


def read_table(path: Path, columns: Sequence[str], skip_lines: int = 0, header: bool = True) -> pd.DataFrame:
    """Reads a file of columns, separated by runs of spaces, as strings.

    Raises:
        UserError: the file is missing or is not such a table, or a column or a value is missing.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            path,
            sep=r"\s+",
            dtype=str,
            skiprows=skip_lines,
            header=0 if header else None,
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,  # NA may be a name
            na_values=[""],
        )
    except OSError as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise UserError(f"{path} {problem}: Datasets/README.md shows the layouts") from None
    except ValueError as error:  # pandas' own errors, and of the encoding
        raise UserError(f"{path} is not a table of {', '.join(columns)}: {' '.join(str(error).split())}") from None
    if not header and table.shape[1] == len(columns):
        table.columns = pd.Index(columns)
    if table.empty:
        raise UserError(f"{path} has no rows below its header: replace it with a complete one")
    for column in columns:
        if column not in table:
            raise UserError(f"{path} has no column {column}: it needs {', '.join(columns)}")
        if table[column].isna().any():
            row = int(table[column].isna().to_numpy().argmax()) + 1
            raise UserError(f"{path} has no {column} in row {row} of its table: replace it with a complete one")
    return table.assign(origin=[f"row {row} of {path}" for row in range(1, len(table) + 1)])


def locate_images(folder: Path, names: Sequence[str], origins: Sequence[str], may_leave: bool = False) -> list[str]:
    """The paths of listed images; a name in the list and its file may differ in case.

    Args:
        folder: what the names are relative to.
        names: of N images.
        origins: for each of them, the row of the list, to be named in errors.
        may_leave: whether they may also lie elsewhere.

    Raises:
        UserError: a listed image does not exist, or is not in `folder`.
    """
    listings: dict[str, tuple[str, dict[str, str]]] = {}  # by folder: what its files' paths begin with, and their names
    paths = []
    for name, origin in zip(names, origins):
        parent, file = os.path.split(name)
        if parent not in listings:
            if not may_leave and (os.path.isabs(name) or ".." in Path(name).parts):
                raise UserError(f"{printable(name)}, {origin}, leads out of {folder}: correct the list")
            whole = os.path.join(folder, os.path.normpath(parent) if parent and may_leave else parent)
            listings[parent] = os.path.join(whole, ""), _list_file_names(whole)
        prefix, files = listings[parent]
        actual = files.get(file) or files.get(file.lower())
        if actual is None:
            shown = f"{folder / name}" if len(name) < 500 else f"{folder / name[:100]}…"
            raise UserError(f"{shown}, {origin}, does not exist: add it, or remove it from the list")
        paths.append(f"{prefix}{actual}")
    return paths


def _list_file_names(folder: str) -> dict[str, str]:
    """The names of a folder's files by these names and, where none is called so, by these names in lower case."""
    if not os.path.isdir(folder):
        return {}
    entries = os.scandir(folder)
    names = [one.name for one in entries if (os.path.isfile(one.path) if one.is_symlink() else one.is_file())]
    return {**{name.lower(): name for name in names}, **{name: name for name in names}}


def real_files(paths: Sequence[str]) -> list[str]:
    """The file that each path leads to: all spellings of a path, and links to a file, lead to one.

    A part of an image stays a part of it.
    """
    folders: dict[str, str] = {}
    files = []
    for path in paths:
        whole, box = transforms.split_box(path)
        folder, name = os.path.split(whole)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        file = os.path.join(folders[folder], name)
        file = os.path.realpath(file) if os.path.islink(file) else file
        files.append(file if box is None else transforms.with_box(file, box))
    return files


def check_repeats(
    paths: Sequence[str], classes: Sequence[str], parts: Sequence[str], origins: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Finds images that occur more than once; in several sets to test on they may.

    Args:
        paths: N image files.
        classes: the class of each.
        parts: the set that each belongs to, `train` or others.
        origins: where each is listed, to be named in errors.

    Returns:
        The paths, a file's first spelling in place of all others; and the positions without those that repeat an image
        within a set, which a notice counts.

    Raises:
        UserError: an image has two classes, or is for training and for testing.
    """
    first: dict[str, int] = {}
    seen: set[tuple[int, str]] = set()
    spellings: list[str] = []
    kept: list[int] = []
    repeated: list[int] = []
    for i, file in enumerate(real_files(paths)):
        j = first.setdefault(file, i)
        torn = ""
        if classes[i] != classes[j]:
            torn = printable(f"the classes {classes[j]} and {classes[i]}")
        elif parts[i] != parts[j] and "train" in (parts[i], parts[j]):
            torn = f"{parts[j]} and {parts[i]}"
        if torn:
            same = "" if paths[i] == paths[j] else f" (the same file as {paths[j]})"
            raise UserError(f"{paths[i]}{same} belongs to {torn} ({origins[j]}; {origins[i]}): remove one of the two")
        (repeated if (j, parts[i]) in seen else kept).append(i)
        seen.add((j, parts[i]))
        spellings.append(paths[j])
    if repeated:
        example = f"{paths[repeated[0]]} ({origins[repeated[0]]})"
        notice(f"images that are listed again count once: {len(repeated)}, e.g. {example}")
    return spellings, kept


def drop_repeats(splits: Splits) -> Splits:
    """The splits without images that occur twice in a set; every file has one spelling.

    Raises:
        UserError: an image has two classes, or is for training and for testing.
    """
    sets = list(splits.named_sets())
    paths = [path for _, images in sets for path in images.paths]
    classes = [images.class_names[0][label] for _, images in sets for label in images.labels[:, 0]]
    parts = [name for name, images in sets for _ in images.paths]
    spellings, kept = check_repeats(paths, classes, parts, parts)
    if len(kept) == len(paths) and spellings == paths:
        return splits
    is_kept = np.isin(np.arange(len(paths)), kept)
    ends = np.cumsum([len(images) for _, images in sets])
    rebuilt = {}
    for (_, images), end in zip(sets, ends):
        here = slice(end - len(images), end)
        rebuilt[id(images)] = ImageSet(spellings[here], images.labels, images.class_names).subset(is_kept[here])
    return splits.map(lambda images: rebuilt[id(images)])


@dataclass(frozen=True)
class Table:
    """A CSV file's values, as text.

    Attributes:
        file: the file.
        columns: for each column its R values.
        rows: R numbers of rows, counted as spreadsheets do: the names of the columns are row 1.
    """

    file: Path
    columns: Mapping[str, Sequence[str]]
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, i: int, column: str, problem: str) -> UserError:
        """What to say of the value that the i-th row has in a column."""
        return UserError(f"row {self.rows[i]} of {self.file}, column {column}: {problem}")

    def refuse(self, column: str, is_wrong: Iterable[bool] | np.ndarray, problem: str) -> None:
        """Raises an error for the first of the R rows whose value is wrong; `problem` may show the value as `{}`.

        Raises:
            UserError: there is one.
        """
        wrong = is_wrong if isinstance(is_wrong, np.ndarray) else np.fromiter(is_wrong, bool)  # (R,)
        if wrong.any():
            i = int(wrong.argmax())
            raise self.error(i, column, problem.format(shown(self.columns[column][i])))


def read_csv(file: Path, needed: Sequence[str], known: Sequence[str] | None = None) -> Table:
    """Reads a CSV file in UTF-8, with any line ends and with or without a byte order mark.

    Args:
        file: the file.
        needed: columns that it must have; no value of theirs is empty.
        known: all columns that it may have (default: any).

    Raises:
        UserError: it can't be read, or has other columns, or a row has too many or too few values, or an empty one.
    """
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    try:
        with without_collection():
            records = list(reader)
    except csv.Error as error:
        raise UserError(f"{file} is not a CSV file: line {reader.line_num} can't be read ({error})") from None
    if not records:
        raise UserError(f"{file} is empty: its first row names the columns, such as {','.join(needed)}")
    names = [name.strip() for name in records[0]]
    _check_columns(file, names, needed, known)
    rows = [number for number, record in enumerate(records[1:], start=2) if record]  # not the empty lines
    records = [record for record in records[1:] if record]
    uneven = next((i for i, record in enumerate(records) if len(record) != len(names)), None)
    if uneven is not None:
        raise UserError(
            f"row {rows[uneven]} of {file} has {len(records[uneven])} values for {len(names)} columns: put values that "
            "contain commas into quotes"
        )
    columns = dict(zip(names, zip(*records))) if records else dict.fromkeys(names, ())
    table = Table(file, columns, rows)
    for name in needed:
        is_empty = (not value.strip() for value in columns[name])
        table.refuse(name, is_empty, "it is empty: give a value, or remove the row")
    return table


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Inside the block Python doesn't look for garbage, which takes most of the time where many rows are read."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_text(file: Path) -> str:
    """A CSV file's text.

    Raises:
        UserError: it can't be read, or is not text in UTF-8.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}): see to its name and its permissions") from None
    try:
        at = data.find(b"\0")
        if at >= 0:
            raise UnicodeDecodeError("utf-8", data, at, at + 1, "NUL")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = before[before.rfind(b"\n") + 1 :]
        raise UserError(
            f"row {before.count(bytes([10])) + 1} of {file}, column {line.count(b',') + 1}, is not text in UTF-8 (byte "
            f"0x{data[error.start]:02x}): save the file as UTF-8"
        ) from None


def _check_columns(file: Path, names: Sequence[str], needed: Sequence[str], known: Sequence[str] | None) -> None:
    """Makes sure that a CSV file has the columns that it needs, each once, and no unknown ones.

    Raises:
        UserError: it hasn't.
    """
    others = [separator for separator in (";", "\t", "|") if len(names) == 1 and separator in names[0]]
    if others:
        raise UserError(f"row 1 of {file} has no commas, but {others[0]!r}: separate columns by commas")
    for name in names:
        if name == "" and known is not None:
            raise UserError(f"row 1 of {file} has a column without a name: name it, or remove it (pandas: index=False)")
        if known is not None and name not in known:
            unknown = f"unknown column {shown(name)}{nearest_name(name, known)}"
            raise UserError(f"row 1 of {file} has the {unknown}; it may have {', '.join(known)}")
        if names.count(name) > 1 and name in (known or needed):
            raise UserError(f"row 1 of {file} has the column {name} {names.count(name)} times: remove one")
    for name in needed:
        if name not in names:
            there = shown(", ".join(names))
            raise UserError(f"row 1 of {file} has no column {name}: it needs {' and '.join(needed)}, and has {there}")


def read_csv_splits(file: Path, test_size: float = TEST_SIZE) -> Splits:
    """Reads a dataset from a CSV file of `CSV_COLUMNS`, of which path and label are needed; see docs/data.md.

    Args:
        file: the CSV file; relative paths begin in its folder.
        test_size: fraction of the classes to test on, where it has no column split.

    Raises:
        UserError: a column or a value is missing or wrong, an image does not exist, has two classes, or is for training
            and for testing, or there is nothing to train on.
    """
    if not file.exists():
        near = nearest_name(file.name, sorted(path.name for path in file.parent.glob("*.csv")))
        raise UserError(f"--dataset {file} does not exist{near}: give the path of a CSV file")
    table = read_csv(file, ("path", "label"), CSV_COLUMNS)
    if not len(table):
        raise UserError(f"{file} has no rows below the names of its columns: list images in it")
    has_box = (transforms.split_box(path)[1] is not None for path in table.columns["path"])
    table.refuse("path", has_box, "{} ends in a crop box: give that in the columns x1, y1, x2, y2")
    where = str(file)
    origins = [f"row {row} of {where}" for row in table.rows]
    files = _locate_each_once(file.parent, table.columns["path"], origins)
    paths: Sequence[str] = _with_boxes(files, read_boxes(table))
    levels = [table.columns[name] for name in ("label", "parent") if name in table.columns]
    if len(levels) == 2:
        table.refuse("parent", (not name.strip() for name in levels[1]), "it is empty: give every label a parent")
        _note_torn_classes(table, levels[1], "parent", "several parents")
    roles = _read_roles(table)
    has_repeats = len(set(paths)) < len(paths) or len(set(real_files(list(set(files))))) < len(set(files))
    if has_repeats:
        paths, kept = check_repeats(paths, levels[0], roles, origins)
        paths, roles = [paths[i] for i in kept], [roles[i] for i in kept]
        levels = [[level[i] for i in kept] for level in levels]
    splits = _split_by_role(table, paths, roles, levels, test_size)
    # An image may be a query in one row, and both a query and in the gallery in another.
    return drop_repeats(splits) if has_repeats else splits


def _locate_each_once(folder: Path, names: Sequence[str], origins: Sequence[str]) -> list[str]:
    """The files of a table's rows, of which many may be parts of one image; see `locate_images`."""
    first = dict(zip(reversed(names), reversed(origins)))  # the first row of each
    located = dict(zip(first, locate_images(folder, list(first), list(first.values()), may_leave=True)))
    return [located[name] for name in names]


def _with_boxes(files: Sequence[str], boxes: Sequence[transforms.Box | None]) -> list[str]:
    """The paths of images, or of parts of them."""
    return [file if box is None else transforms.with_box(file, box) for file, box in zip(files, boxes)]


def _find_row(file: Path, path: str) -> str:
    """The row of a dataset's CSV file that lists an image first, as `row 7 of photos.csv: `."""
    table = read_csv(file, ("path", "label"), CSV_COLUMNS)
    listed = real_files([os.path.join(file.parent, name) for name in table.columns["path"]])
    listed = _with_boxes(listed, read_boxes(table))
    (wanted,) = real_files([path])
    return f"row {table.rows[listed.index(wanted)]} of {file}: " if wanted in listed else ""


def read_boxes(table: Table) -> list[transforms.Box | None]:
    """The crop box of each row of a table, in whole pixels; None where the row has none.

    Raises:
        UserError: one isn't a box, or lacks a value.
    """
    there = [name for name in BOX_COLUMNS if name in table.columns]
    if not there:
        return [None] * len(table)
    absent = [name for name in BOX_COLUMNS if name not in there]
    if absent:
        raise UserError(f"row 1 of {table.file} has no column {absent[0]}: a crop box needs {', '.join(BOX_COLUMNS)}")
    sides = np.stack([_read_numbers(table, name) for name in BOX_COLUMNS])  # (4, R)
    has_box = (~np.isnan(sides)).any(axis=0)  # (R,)
    for name, side in zip(BOX_COLUMNS, sides):
        table.refuse(name, np.isnan(side) & has_box, "it is empty, and other sides of the box aren't: give all or none")
        table.refuse(name, side < 0, "{} is outside of the image: pixels are counted from 0")
    x1, y1, x2, y2 = sides
    table.refuse("x2", x2 <= x1, "{} is not above x1: boxes are x1, y1 (upper left), x2, y2 (lower right)")
    table.refuse("y2", y2 <= y1, "{} is not above y1: boxes are x1, y1 (upper left), x2, y2 (lower right)")
    corners = np.nan_to_num(sides).astype(np.int64).tolist()
    return [box if is_there else None for box, is_there in zip(zip(*corners), has_box.tolist())]


def _read_numbers(table: Table, name: str) -> np.ndarray:
    """A column as whole numbers `(R,)` float64, NaN where it is empty.

    Raises:
        UserError: a value is not a number, or too large for one of pixels.
    """
    values = [value.strip() or "nan" for value in table.columns[name]]
    try:
        numbers = np.array(values, dtype=np.float64)
    except ValueError:
        numbers = np.array([_number_or_infinity(value) for value in values])
    is_wrong = ~(np.abs(numbers) < 1e9)
    is_wrong &= np.fromiter((value != "nan" for value in values), bool)
    table.refuse(name, is_wrong, "{} is not a number of pixels")
    return np.rint(numbers)


def _number_or_infinity(text: str) -> float:
    """A number from text; infinity for what isn't one."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def _note_torn_classes(table: Table, groups: Sequence[str], column: str, what: str) -> None:
    """Says in a notice, with the rows of the first, which classes have images in several groups of a column."""
    if len(set(zip(table.columns["label"], groups))) == len(set(table.columns["label"])):
        return
    first: dict[str, int] = {}
    torn: dict[str, int] = {}
    for i, (label, group) in enumerate(zip(table.columns["label"], groups)):
        j = first.setdefault(label, i)
        if group != groups[j]:
            torn.setdefault(label, i)
    label, i = next(iter(torn.items()))
    j = first[label]
    notice(
        f"{len(torn)} of {len(first)} labels have {what}, such as {shown(label)}: {shown(groups[j])} in row "
        f"{table.rows[j]}, and {shown(groups[i])} in row {table.rows[i]} of {table.file}, column {column}"
    )


def _read_roles(table: Table) -> list[str]:
    """What each row is for: `train`, `val` or `test`, of which the latter may have ` query`, ` gallery` or both.

    Without a column split all are "".

    Raises:
        UserError: a value is unknown, or says nothing or too much.
    """
    asked = [name for name in ("is_query", "is_gallery") if name in table.columns]
    if len(asked) == 1 or (asked and "split" not in table.columns):
        absent = next(name for name in ("split", "is_query", "is_gallery") if name not in table.columns)
        raise UserError(f"row 1 of {table.file} has {asked[0]} and no column {absent}: add it, or remove {asked[0]}")
    if "split" not in table.columns:
        return [""] * len(table)
    splits = [value.strip() for value in table.columns["split"]]
    for i, split in enumerate(splits):
        if split not in PARTS:
            known = NAMES_OF_PARTS.get(split.lower(), split.lower())
            near = f" (did you mean {known}?)" if known in PARTS else ""
            raise table.error(i, "split", f"{shown(split)} is not one of {', '.join(PARTS)}{near}")
    _note_torn_classes(table, splits, "split", "images in several splits")
    if "train" not in splits:
        raise UserError(f"{table.file}, column split, has no row with train: there is nothing to train on")
    if not asked:
        return splits
    is_query, is_gallery = (_read_answers(table, name, splits) for name in asked)
    is_neither = (split != "train" and not (q or g) for split, q, g in zip(splits, is_query, is_gallery))
    table.refuse("is_query", is_neither, "the image is neither a query nor in the gallery: set one, or remove the row")
    return [f"{split}{' query' * q}{' gallery' * g}" for split, q, g in zip(splits, is_query, is_gallery)]


def _read_answers(table: Table, name: str, splits: Sequence[str]) -> list[bool]:
    """A column of yes and no, which is empty or no for training images.

    Raises:
        UserError: it has other values, or isn't.
    """
    values = [value.strip().lower() for value in table.columns[name]]
    table.refuse(name, (value not in YES_OR_NO for value in values), "{} is neither true nor false")
    answers = [YES_OR_NO[value] for value in values]
    is_wrong = (split == "train" and answer for split, answer in zip(splits, answers))
    table.refuse(name, is_wrong, "{} says that a training image is for retrieval: leave it empty")
    return answers


def _split_by_role(
    table: Table, paths: Sequence[str], roles: Sequence[str], levels: Sequence[Sequence[str]], test_size: float
) -> Splits:
    """Splits by the roles of `_read_roles`; where these are "", by class.

    Raises:
        UserError: there are no queries, or no gallery, or the flag contradicts the file.
    """
    key = by_number if all(name.isdecimal() for name in set(levels[0])) else None
    images = make_image_set(paths, *levels, roles, key=key)
    names, role = images.class_names[-1], images.labels[:, -1]
    images = ImageSet(images.paths, images.labels[:, :-1], images.class_names[:-1])
    if "split" not in table.columns:
        return split_classes(images, test_size)
    if test_size != TEST_SIZE:
        raise UserError(f"--test_size {test_size} contradicts the column split of {table.file}: drop one")

    def having(split: str, what: str = "") -> ImageSet:
        ends = (split, f"{split} query gallery", f"{split} {what}")
        return images.subset(np.isin(role, [i for i, name in enumerate(names) if name in ends]))

    sets: dict[str, list[RetrievalSet[ImageSet]]] = {"val": [], "test": []}
    for split in sets:
        there = {name for name in names if name.split(" ")[0] == split}
        if there <= {split, f"{split} query gallery"}:
            sets[split] = [RetrievalSet(split, having(split))] if there else []
            continue
        query, gallery = having(split, "query"), having(split, "gallery")
        for column, part in (("is_query", query), ("is_gallery", gallery)):
            if not len(part):
                raise UserError(f"{table.file}, column {column}, is true of no row of split {split}: set it")
        sets[split] = [RetrievalSet(split, query, gallery)]
    return Splits(having("train"), **sets)


def write_csv_splits(file: Path, splits: Splits) -> int:
    """Writes splits to a CSV file, which `--dataset` reads back: paths below its folder are relative to that.

    Returns:
        The number of images.

    Raises:
        UserError: such a file can't hold these splits, or can't be written.
    """
    for kind, several in (("validation", splits.val), ("test", splits.test)):
        if len(several) > 1:
            names = ", ".join(one.name for one in several)
            raise UserError(f"a CSV file holds one {kind} set, and these splits have {names}: choose cross_validation")
    sets: list[tuple[str, tuple[str, ...], ImageSet]] = [("train", (), splits.train)]
    for split, found in (("val", splits.val), ("test", splits.test)):
        for one in found:
            sets.append((split, ("is_query", "is_gallery") if one.gallery is None else ("is_query",), one.query))
            sets += [] if one.gallery is None else [(split, ("is_gallery",), one.gallery)]
    rows: dict[str, dict[str, Any]] = {}
    for split, roles, images in sets:
        for path, labels in zip(images.paths, images.labels.tolist()):
            row = rows.setdefault(path, _describe_row(file.parent, path, images.class_names, labels, split))
            if row["split"] != split:
                both = f"{row['split']} and in {split}"
                raise UserError(f"{path} is in {both}, and a CSV file can't say so: choose another --split_scheme")
            row |= dict.fromkeys(roles, "true")
    used = {name for row in rows.values() for name in row}
    if all(one.gallery is None for one in (*splits.val, *splits.test)):
        used -= {"is_query", "is_gallery"}
    columns = [name for name in CSV_COLUMNS if name in used]
    save_table(file, columns, ([row.get(name, "") for name in columns] for row in rows.values()))
    return len(rows)


def _describe_row(
    folder: Path, path: str, class_names: Sequence[Sequence[str]], labels: Sequence[int], split: str
) -> dict[str, Any]:
    """A row of a dataset's CSV file in a folder, by column."""
    whole, box = transforms.split_box(path)
    row = {"path": relative_path(whole, folder), "label": class_names[0][labels[0]], "split": split}
    if len(labels) > 1:
        row["parent"] = class_names[1][labels[1]]
    return row | (dict(zip(BOX_COLUMNS, box)) if box else {})


def relative_path(path: str, folder: Path) -> str:
    """A path as it is seen from a folder that it lies in; as an absolute path, if it lies elsewhere."""
    seen = os.path.relpath(path, folder)
    return os.path.abspath(path) if seen.split(os.sep)[0] == ".." else seen


def save_image_table(file: Path, names: Sequence[str], rows: Iterable[Sequence[Any]], folder: Path) -> None:
    """Writes a CSV file of images, as `leave_out` reads it: a path, its crop box if any has one, and other values.

    Args:
        file: the CSV file.
        names: of the other columns.
        rows: each an image and its other values.
        folder: where relative paths begin, the dataset's folder.

    Raises:
        UserError: it can't be written.
    """
    parts = [(*transforms.split_box(path), values) for path, *values in rows]
    has_boxes = any(box for _, box, _ in parts)
    columns = ("path", *(BOX_COLUMNS if has_boxes else ()), *names)
    empty = [""] * len(BOX_COLUMNS)
    save_table(
        file,
        columns,
        ([relative_path(path, folder), *(box or empty if has_boxes else ()), *values] for path, box, values in parts),
    )


def save_table(file: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file.

    Raises:
        UserError: it can't be written.
    """
    try:
        with atomic_write(file) as beside, open(beside, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(names)
            writer.writerows(rows)
    except UnicodeEncodeError as error:
        values = next(csv.reader(io.StringIO(error.object)))  # of the row
        name = printable(next(value for value in values if printable(value) != value))
        raise UserError(f"{file} can't hold a name that is not UTF-8, {shown(name)}: rename that file") from None


def leave_out(splits: Splits, file: Path, dataset: str, folder: Path) -> Splits:
    """The splits without the images that a CSV file lists in its column path; a notice counts them.

    A row with a crop box leaves out that part of an image, one without a box the image with all its parts. Columns
    other than these are ignored.

    Args:
        splits: of all images.
        file: the CSV file.
        dataset: the dataset's name.
        folder: where relative paths begin.

    Raises:
        UserError: the file can't be read, or lists what is not an image of the dataset.
    """
    table = read_csv(file, ("path",))
    boxes = read_boxes(table)
    listed = _with_boxes(real_files([os.path.join(folder, path) for path in table.columns["path"]]), boxes)
    wanted, found, dropped = set(listed), set[str](), set[str]()
    is_kept: dict[int, np.ndarray] = {}
    for _, images in splits.named_sets():
        names = [(path, transforms.split_box(path)[0]) for path in real_files(images.paths)]
        hits = [wanted.intersection(name) for name in names]
        found.update(*hits)
        dropped |= {path for (path, _), hit in zip(names, hits) if hit}
        is_kept[id(images)] = np.array([not hit for hit in hits], bool)
    unknown = [i for i, path in enumerate(listed) if path not in found]
    if unknown:
        more = f", nor are those of {len(unknown) - 1} other rows" if len(unknown) > 1 else ""
        box = f" with the crop box {', '.join(map(str, boxes[unknown[0]] or ()))}" if boxes[unknown[0]] else ""
        problem = f"{shown(table.columns['path'][unknown[0]])}{box} is not an image of {dataset}{more}"
        raise table.error(unknown[0], "path", f"{problem}: correct it (relative paths begin in {folder}), or remove it")
    left = [f"{(~is_kept[id(images)]).sum()} of {len(images)} of {name}" for name, images in splits.named_sets()]
    if not any(kept.any() for kept in is_kept.values()):
        raise UserError(f"--exclude {file} leaves out all {len(dropped)} images of {dataset}: remove some of its rows")
    notice(f"--exclude {file} leaves out {len(dropped)} images of {dataset}: {', '.join(left)}")
    return splits.map(lambda images: images.subset(is_kept[id(images)]))


def read_cub200(root: Path) -> Splits:
    """CUB-200-2011: trains on the classes up to 100, by the number in the folder's name."""
    folder = find_layout(root, "images", "CUB_200_2011/images")

    def class_number(name: str) -> tuple[int, str]:
        match = re.match(r"\d+", name)
        if not match:
            raise UserError(f"{folder / name} doesn't begin with a class number, as 001.Black_footed_Albatross does")
        return int(match.group()), name

    images = read_class_folders(folder, key=class_number)
    numbers = np.array([class_number(name)[0] for name in images.class_names[0]])
    is_train = numbers[images.labels[:, 0]] <= 100
    if is_train.all() or not is_train.any():
        raise UserError(f"{folder} lacks the classes {'above' if is_train.all() else 'up to'} 100: download it again")
    return Splits(images.subset(is_train), test=[RetrievalSet("test", images.subset(~is_train))])


def read_cars196(root: Path) -> Splits:
    """Cars196: trains on the first 98 classes, sorted by name."""
    if (root / "images").is_dir():
        return split_classes(read_class_folders(root / "images"))
    find_layout(root, "images", "car_ims")
    info_file = root / "cars_annos.mat"
    if not info_file.is_file():
        raise UserError(f"{info_file} does not exist: Datasets/README.md shows the layouts")

    from scipy.io import loadmat

    try:
        mat = loadmat(info_file, squeeze_me=True)
        names = [str(name) for name in np.atleast_1d(mat["class_names"])]
        rows = np.atleast_1d(mat["annotations"])
        images = [str(row["relative_im_path"]) for row in rows]
        numbers = [float(row["class"]) for row in rows]
    except Exception as error:  # scipy raises anything at all on a damaged file
        raise UserError(f"{info_file} can't be read as Cars196's annotations ({error}): download it again") from None
    origins = [f"row {row} of {info_file}" for row in range(1, len(rows) + 1)]
    if not names:
        raise UserError(f"{info_file} names no classes: download it again")
    for class_number, origin in zip(numbers, origins):
        if class_number not in range(1, len(names) + 1):
            raise UserError(
                f"{origin} has class {class_number:g}, but classes are 1 to {len(names)}: download it again"
            )
    # the names of the class folders in the other layout
    classes = [names[int(class_number) - 1].replace("/", "-") for class_number in numbers]
    files, kept = check_repeats(locate_images(root, images, origins), classes, [""] * len(rows), origins)
    return split_classes(make_image_set([files[i] for i in kept], [classes[i] for i in kept]))


def read_caltech101(root: Path) -> Splits:
    """Caltech-101: trains on the first 50 classes, sorted by name; the folder BACKGROUND_Google is not a class.

    Li, Fergus and Perona, CVPR Workshops 2004.
    """
    layouts = ("101_ObjectCategories", "caltech-101/101_ObjectCategories", "accordion")
    folder = find_layout(root, *layouts)
    folder = root if folder.name == "accordion" else folder
    return split_classes(read_class_folders(folder, left_out=("BACKGROUND_Google",)))


def read_online_products(root: Path) -> Splits:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt; level 1 is the twelve super classes."""
    import pandas as pd

    images, lists = root / "images", root / "Info_Files"
    if not images.is_dir():
        images = lists = find_layout(root, "images", "Stanford_Online_Products")
    tables = []
    for part in ("train", "test"):
        info_file = lists / f"Ebay_{part}.txt"
        table = read_table(info_file, ("image_id", "class_id", "super_class_id", "path"))
        tables.append(
            table.assign(part=part, file=locate_images(images, table["path"].tolist(), table["origin"].tolist()))
        )
    rows = pd.concat(tables)
    super_classes = [os.path.dirname(os.path.normpath(path)).removesuffix("_final") for path in rows["path"]]
    files, parts, class_ids, origins = (rows[name].tolist() for name in ("file", "part", "class_id", "origin"))
    return split_by_part(files, parts, class_ids, super_classes, key=by_number, origins=origins)


def read_in_shop(root: Path) -> Splits:
    """In-Shop Clothes Retrieval: queries search a gallery for their item; level 1 is the categories."""
    info_file = find_layout(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    rows = read_table(info_file, ("image_name", "item_id", "evaluation_status"), skip_lines=1)
    with info_file.open(encoding="utf-8") as file:
        announced = file.readline().strip()
    if announced != str(len(rows)):
        notice(f"{info_file} has {len(rows)} rows, and its first line says {announced}")
    parts, names = rows["evaluation_status"].tolist(), rows["image_name"].tolist()
    if set(parts) != {"train", "query", "gallery"}:
        raise UserError(f"{info_file} assigns {', '.join(sorted(set(parts)))}: it must assign train, query and gallery")
    origins = rows["origin"].tolist()
    files = locate_images(find_layout(root, "img", "Img/img").parent, names, origins)
    categories = ["/".join(os.path.normpath(name).split("/")[1:3]) for name in names]
    return split_by_part(files, parts, rows["item_id"].tolist(), categories, origins=origins)


def read_vehicle_id(root: Path) -> Splits:
    """PKU VehicleID: three test sets of increasing size, the images of each searching each other."""
    import pandas as pd

    tables = []
    for part in ("train", "800", "1600", "2400"):
        info_file = root / "train_test_split" / ("train_list.txt" if part == "train" else f"test_list_{part}.txt")
        table = read_table(info_file, ("image_number", "class_id"), header=False)
        files = [f"{image.zfill(7)}.jpg" for image in table["image_number"]]
        tables.append(table.assign(part=part, file=locate_images(root / "image", files, table["origin"].tolist())))
    rows = pd.concat(tables)
    files, parts, class_ids, origins = (rows[name].tolist() for name in ("file", "part", "class_id", "origin"))
    return split_by_part(files, parts, class_ids, key=by_number, origins=origins)


def read_inaturalist2018(root: Path) -> Splits:
    """iNaturalist 2018 with the class-disjoint split of Smooth-AP; level 1 is the super categories.

    Brown, Xie, Kalogeiton and Zisserman, ECCV 2020. The split is in the authors' Inaturalist_train_set1.txt and
    Inaturalist_test_set1.txt, in the folder Inat_dataset_splits or beside the images: lists of paths
    `train_val2018/<super category>/<class>/<image>`, relative to `root`.
    """
    import pandas as pd

    tables = []
    for part in ("train", "test"):
        name = f"Inaturalist_{part}_set1.txt"
        table = read_table(find_layout(root, f"Inat_dataset_splits/{name}", name), ("path",), header=False)
        paths, origins = table["path"].tolist(), table["origin"].tolist()
        for path, origin in zip(paths, origins):
            if len(Path(path).parts) < 3:
                raise UserError(f"{path}, {origin}, names no super category and class: replace the list")
        tables.append(table.assign(part=part, file=locate_images(root, paths, origins)))
    rows = pd.concat(tables)
    super_categories = [Path(path).parts[-3] for path in rows["path"]]
    classes = ["/".join(Path(path).parts[-3:-1]) for path in rows["path"]]
    return split_by_part(
        rows["file"].tolist(), rows["part"].tolist(), classes, super_categories, origins=rows["origin"].tolist()
    )


GLYPH_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)


def read_glyphs(root: Path) -> Splits:
    """Characters rendered in sixteen fonts; level 1 is the scripts (LATIN, GREEK, CYRILLIC, …)."""
    if not (root / "images").is_dir():
        render_glyphs(root / "images")
    images = read_class_folders(root / "images", key=by_number)
    try:
        characters = [chr(int(name.removeprefix("U+"), 16)) for name in images.class_names[0]]
        scripts = [unicodedata.name(character).split()[0] for character in characters]
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{root / 'images'} contains a folder that is not named after a character ({error}): remove {root}"
        ) from None
    finest = [images.class_names[0][label] for label in images.labels[:, 0]]
    coarser = [scripts[label] for label in images.labels[:, 0]]
    return split_classes(make_image_set(images.paths, finest, coarser, key=by_number))


def render_glyphs(folder: Path, skip_look_alikes: bool = True) -> None:
    """Renders every letter, number, symbol and other punctuation mark that all `GLYPH_FONTS` have, 64 × 64 px.

    Writes `folder/U+0041/<font>.png`, black on white.

    Args:
        folder: where to.
        skip_look_alikes: whether to leave out a character that looks exactly like an earlier one in any font (Greek
            Alpha like Latin A), since it would put training images into the test set.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    files = {name: os.path.join(get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in GLYPH_FONTS}
    fonts = {name: ImageFont.truetype(file, 44) for name, file in files.items()}
    shared = set.intersection(*(set(FT2Font(file).get_charmap()) for file in files.values()))
    drawable = [chr(code) for code in sorted(shared) if re.match("[LNS]|Po", unicodedata.category(chr(code)))]
    seen: set[bytes] = set()
    kept = 0
    with made_whole(folder) as beside:
        for character in drawable:
            renderings = {name: _render(character, font) for name, font in fonts.items()}
            pixels = {rendering.tobytes() for rendering in renderings.values()}
            if skip_look_alikes and pixels & seen:
                continue
            seen |= pixels
            kept += 1
            class_folder = beside / f"U+{ord(character):04X}"
            class_folder.mkdir(parents=True)
            for name, rendering in renderings.items():
                rendering.save(class_folder / f"{name}.png")
    notice(f"rendered {kept} characters in {len(fonts)} fonts into {folder}")


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `folder` once the block ends without an error, unless another process was
    quicker.

    Raises:
        UserError: it can't be written.
    """
    beside = folder.with_name(f".part-{secrets.token_hex(6)}-{folder.name}")
    try:
        yield beside
        try:
            os.replace(beside, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker
                raise
    except OSError as error:
        raise UserError(f"{folder} can't be written ({error.strerror}): choose another --source_path") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    from PIL import Image, ImageDraw

    image = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(image).text((32, 32), character, fill=0, font=font, anchor="mm")
    return image


@dataclass(frozen=True)
class TorchvisionSpec:
    """How a dataset of torchvision is read.

    Attributes:
        parts: keywords of its class for each of its parts, which are pooled.
        paths: how its images' files are found: "loader", its class passes them to its parameter `loader`; "transform",
            the images that its class passes to its transform know them; or the names of its two attributes with files
            and labels, or of one with both. None: it keeps arrays, which are written to files once.
        names: its attribute with the names of the classes; without it they are numbers.
        by_hand: why torchvision can't download it, if so.
        is_text: whether it shows characters or signs, of which a part or a mirror image means something else.
    """

    parts: tuple[Mapping[str, Any], ...] = ({},)
    paths: str | None = "loader"
    names: str = "classes"
    by_hand: str = ""
    is_text: bool = False


def _parts(**values: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    """A dict of keywords for each value of the one keyword given."""
    ((name, choices),) = values.items()
    return tuple({name: choice} for choice in choices)


_TRAIN_TEST, _ALL_THREE = _parts(split=("train", "test")), _parts(split=("train", "val", "test"))
_IS_TRAIN, _TRAIN_VAL = _parts(train=(True, False)), _parts(split=("train", "val"))
_DIGITS = TorchvisionSpec(_IS_TRAIN, None, is_text=True)

# Classes of torchvision.datasets with one label per image.
TORCHVISION: dict[str, TorchvisionSpec] = {
    "Caltech101": TorchvisionSpec(paths="transform", names="categories"),
    "Caltech256": TorchvisionSpec(paths="transform", names="categories"),
    "CelebA": TorchvisionSpec(({"split": "all", "target_type": "identity"},), "transform"),
    "CIFAR10": TorchvisionSpec(_IS_TRAIN, None),
    "CIFAR100": TorchvisionSpec(_IS_TRAIN, None),
    "CLEVRClassification": TorchvisionSpec(_TRAIN_VAL),  # its test images have no labels
    "Country211": TorchvisionSpec(_parts(split=("train", "valid", "test"))),
    "DTD": TorchvisionSpec(_ALL_THREE),
    "EMNIST": TorchvisionSpec(tuple({"split": "balanced", **part} for part in _IS_TRAIN), None, is_text=True),
    "EuroSAT": TorchvisionSpec(),
    "FashionMNIST": TorchvisionSpec(_IS_TRAIN, None),
    "FER2013": TorchvisionSpec(_TRAIN_TEST, None, by_hand="Kaggle, fer2013.csv or icml_face_data.csv in fer2013/"),
    "FGVCAircraft": TorchvisionSpec(_parts(split=("trainval", "test"))),
    "Flowers102": TorchvisionSpec(_ALL_THREE),
    "Food101": TorchvisionSpec(_TRAIN_TEST),
    "GTSRB": TorchvisionSpec(_TRAIN_TEST, "_samples", is_text=True),
    "ImageNet": TorchvisionSpec(
        _TRAIN_VAL, names="wnids", by_hand="image-net.org, its archives ILSVRC2012_img_train.tar, "
        "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
    ),
    "Imagenette": TorchvisionSpec(_TRAIN_VAL, names="wnids"),
    "INaturalist": TorchvisionSpec(_parts(version=("2021_train", "2021_valid")), names="all_categories"),
    "KMNIST": _DIGITS,
    "LFWPeople": TorchvisionSpec(
        names="class_to_idx", by_hand="Kaggle, lfw-funneled.tgz, people.txt, lfw-names.txt and the unpacked "
        "lfw_funneled/ in lfw-py/"
    ),
    "MNIST": _DIGITS,
    "Omniglot": TorchvisionSpec(_parts(background=(True, False)), names="_characters", is_text=True),
    "OxfordIIITPet": TorchvisionSpec(_parts(split=("trainval", "test")), "_images _labels"),
    "Places365": TorchvisionSpec(tuple({"split": part, "small": True} for part in ("train-standard", "val"))),
    "QMNIST": _DIGITS,
    "SEMEION": TorchvisionSpec(paths=None, is_text=True),
    "StanfordCars": TorchvisionSpec(
        _TRAIN_TEST, by_hand="Kaggle, devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat in "
        "stanford_cars/; or take --dataset cars196"
    ),
    "STL10": TorchvisionSpec(_TRAIN_TEST, None),
    "SUN397": TorchvisionSpec(),
    "SVHN": TorchvisionSpec(_TRAIN_TEST, None, is_text=True),
    "USPS": _DIGITS,
}  # fmt: skip

_PAIRS, _FLOW, _BOXES = "it has pairs of images", "it has optical flow, not classes", "it has boxes, not classes"
_VIDEO, _CAPTIONS, _OUTLINES = "it has videos", "it has captions, not classes", "it has segmentations, not classes"
_TWO = "it has two classes, and some must be left to test on"
_FOLDERS = "give the folder of class folders itself: --dataset PATH"

# The other datasets of torchvision, and why they can't be taken.
NOT_FROM_TORCHVISION: dict[str, str] = {
    **dict.fromkeys(("CocoCaptions", "Flickr8k", "Flickr30k", "SBU"), _CAPTIONS),
    **dict.fromkeys(("CocoDetection", "Kitti", "VOCDetection", "WIDERFace"), _BOXES),
    **dict.fromkeys(("Cityscapes", "SBDataset", "VOCSegmentation"), _OUTLINES),
    **dict.fromkeys(("HMDB51", "Kinetics", "MovingMNIST", "UCF101"), _VIDEO),
    **dict.fromkeys(("FlyingChairs", "FlyingThings3D", "HD1K", "KittiFlow", "Sintel"), _FLOW),
    **dict.fromkeys(("CarlaStereo", "CREStereo", "ETH3DStereo", "FallingThingsStereo", "InStereo2k"), _PAIRS),
    **dict.fromkeys(("Kitti2012Stereo", "Kitti2015Stereo", "Middlebury2014Stereo", "SceneFlowStereo"), _PAIRS),
    **dict.fromkeys(("LFWPairs", "PhotoTour", "SintelStereo"), _PAIRS),
    **dict.fromkeys(("PCAM", "RenderedSST2"), _TWO),
    **dict.fromkeys(("DatasetFolder", "ImageFolder"), _FOLDERS),
    **dict.fromkeys(
        ("LSUN", "LSUNClass"), "it is a database that needs the package lmdb: export its images to folders"
    ),
    "FakeData": "its images are noise",
    "VisionDataset": "it is the base of the others",
}


def read_torchvision(root: Path, name: str) -> Splits:
    """A dataset of torchvision, its parts pooled: trains on the first half of its sorted classes.

    Arrays are written once, to `root/images/<class>/<part>_<number>.png`.

    Args:
        root: its folder, which holds what torchvision downloads or what is put there in the layout that its class
            expects.
        name: its class.

    Raises:
        UserError: its files are missing or damaged.
    """
    row = TORCHVISION[name]
    if row.paths is None:
        if not (root / "images").is_dir():
            with locked(root, wait=True):
                if not (root / "images").is_dir():  # otherwise another process has written them meanwhile
                    _write_arrays(root / "images", open_torchvision(root, name), row)
        paths, classes = list_class_folders(root / "images")
    else:
        paths, classes = [], []
        for part in open_torchvision(root, name):
            names = _class_names(part, row)
            for path, label in _files_and_labels(part, row):
                paths.append(path)
                classes.append(names(label))
    key = by_number if all(one.isdecimal() for one in classes) else None
    levels = [[one.partition("/")[0] for one in classes]] if name == "Omniglot" else []  # its alphabets
    return split_classes(make_image_set(paths, classes, *levels, key=key))


def open_torchvision(root: Path, name: str, download: bool = False) -> list[Any]:
    """The parts of a dataset of torchvision, with `download` after downloading them.

    Raises:
        UserError: torchvision can't read them.
    """
    import torchvision

    row, kind = TORCHVISION[name], getattr(torchvision.datasets, name)
    keywords: dict[str, Any] = {} if row.by_hand else {"download": download}  # a class's default may be to download
    if row.paths == "loader":
        keywords["loader"] = os.fspath
    elif row.paths == "transform":
        keywords["transform"] = attrgetter("filename")
    try:
        return [kind(str(root), **part, **keywords) for part in row.parts]
    except Exception as error:  # torchvision raises anything at all on missing or damaged files
        if download:
            raise
        again = f"get it by hand from {row.by_hand}" if row.by_hand else "--download downloads it again"
        raise UserError(
            f"{root} can't be read as torchvision's {name} ({reason(error)}): remove it, and {again}"
        ) from None


def _files_and_labels(part: Any, row: TorchvisionSpec) -> Iterator[tuple[str, Any]]:
    """The file and the label of every image of a part that has files; what has no label is left out."""
    attributes = str(row.paths).split()
    if row.paths in ("loader", "transform"):
        rows: Iterable[tuple[Any, Any]] = (part[i] for i in range(len(part)))
    elif len(attributes) == 2:
        rows = zip(*(getattr(part, name) for name in attributes))
    else:
        rows = getattr(part, attributes[0])
    yield from ((os.fspath(path), label) for path, label in rows if label is not None)


def _class_names(part: Any, row: TorchvisionSpec) -> Callable[[Any], str]:
    """From a label to the name of its class, or, where classes have no names, to its number."""
    names = getattr(part, row.names, None)
    if names is None:
        return lambda label: str(int(label))
    listed = list(names)  # of a mapping from names to labels, its keys
    return lambda label: str(listed[int(label)])


def _write_arrays(folder: Path, parts: Sequence[Any], row: TorchvisionSpec) -> None:
    """Writes the images of a dataset that keeps arrays as `folder/<class>/<part>_<number>.png`."""
    total = sum(map(len, parts))
    with (
        made_whole(folder) as beside,
        tqdm(desc=f"writing {folder}", total=total, leave=False, unit=" images", disable=None) as bar,
    ):
        for number, part in enumerate(parts):
            names = _class_names(part, row)
            for i in range(len(part)):
                image, label = part[i]
                bar.update()
                if label is None:
                    continue
                class_folder = beside / names(label).replace("/", "-")
                class_folder.mkdir(parents=True, exist_ok=True)
                image.save(class_folder / f"{number}_{i:06d}.png")
    notice(f"wrote {total} images into {folder}")


def download_torchvision(root: Path, name: str) -> None:
    """Downloads a dataset of torchvision into `root`."""
    open_torchvision(root, name, download=True)


@dataclass(frozen=True)
class Archive:
    """A file to download: its address, of which --download_url replaces all but the name, and its MD5."""

    url: str
    md5: str
    holds: tuple[str, ...] = ()  # archives within it that are to be unpacked, too


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset's row: how to read it, the default k, and what is known about it.

    Attributes:
        read: from the dataset's folder to its splits.
        k_vals: the k of Recall @ k that its literature reports.
        counts: published numbers of classes and images of `train` and of each test set, or of `query` and `gallery`.
        archives: what --download downloads and unpacks.
        download: in place of archives, a function that downloads the dataset into a folder.
        license: for data that must be requested: from whom, and what to put into the folder.
        made_here: whether `read` creates missing data itself.
        crop_scale: the default of --crop_scale.
        flip: the default of --flip.
    """

    read: Callable[[Path], Splits]
    k_vals: tuple[int, ...] = (1, 2, 4, 8)
    counts: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()
    download: Callable[[Path], None] | None = None
    license: str = ""
    made_here: bool = False
    crop_scale: float = transforms.CROP_SCALE
    flip: bool = True


DATASETS: dict[str, DatasetSpec] = {
    "cub200": DatasetSpec(
        read_cub200,
        counts={"train": (100, 5864), "test": (100, 5924)},
        archives=(
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
            ),
        ),
    ),
    "cars196": DatasetSpec(
        read_cars196,
        counts={"train": (98, 8054), "test": (98, 8131)},
        archives=(  # their original host is gone: --download_url gives another
            Archive("car_ims.tgz", "d5c8f0aa497503f355e17dc7886c3f14"),
            Archive("cars_annos.mat", "b407c6086d669747186bd1d764ff9dbc"),
        ),
    ),
    "caltech101": DatasetSpec(
        read_caltech101,
        counts={"train": (50, 5526), "test": (51, 3151)},
        archives=(
            Archive(
                "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip",
                "3138e1922a9193bfa496528edbbc45d0",
                holds=("caltech-101/101_ObjectCategories.tar.gz",),
            ),
        ),
    ),
    "inaturalist2018": DatasetSpec(
        read_inaturalist2018,
        k_vals=(1, 4, 16, 32),
        counts={"train": (5690, 325846), "test": (2452, 136093)},
        license="get the training and validation images from the iNaturalist 2018 competition and the lists of the "
        "split from the Smooth-AP project, and put train_val2018/ and Inat_dataset_splits/ there",
    ),
    "online_products": DatasetSpec(
        read_online_products,
        k_vals=(1, 10, 100, 1000),
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        archives=(
            Archive("ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e"),
        ),
    ),
    "in-shop": DatasetSpec(
        read_in_shop,
        k_vals=(1, 10, 20, 30, 50),
        counts={"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
        license="ask the DeepFashion project of the Chinese University of Hong Kong for the In-shop Clothes Retrieval "
        "Benchmark and put img/ and Eval/list_eval_partition.txt there",
    ),
    "vehicle_id": DatasetSpec(
        read_vehicle_id,
        k_vals=(1, 5),
        counts={"train": (13134, 110178), "800": (800, None), "1600": (1600, None), "2400": (2400, None)},
        license="ask the National Engineering Laboratory for Video Technology of Peking University for PKU VehicleID "
        "and put image/ and train_test_split/ there",
    ),
    "glyphs": DatasetSpec(read_glyphs, made_here=True, crop_scale=0.5, flip=False),
    **{
        f"torchvision_{name}": DatasetSpec(
            partial(read_torchvision, name=name),
            download=None if row.by_hand else partial(download_torchvision, name=name),
            license=row.by_hand and f"get it by hand from {row.by_hand}",
            crop_scale=0.5 if row.is_text else transforms.CROP_SCALE,
            flip=not row.is_text,
        )
        for name, row in TORCHVISION.items()
    },
}


def name_of_row(dataset: str) -> str:
    """The name of a dataset's row and folder, which `torchvision:DTD` has as `torchvision_DTD`.

    Raises:
        UserError: torchvision has no such dataset, or one that can't be taken.
    """
    library, colon, name = dataset.partition(":")
    if library != "torchvision" or not colon:
        return dataset
    if name in NOT_FROM_TORCHVISION:
        raise UserError(f"--dataset {dataset} can't be split by class: {NOT_FROM_TORCHVISION[name]}")
    if name not in TORCHVISION:
        near = nearest_name(name, TORCHVISION)
        raise UserError(f"--dataset {shown(dataset)} is unknown{near}; torchvision has {', '.join(TORCHVISION)}")
    return f"torchvision_{name}"


def find_spec(dataset: str) -> DatasetSpec:
    """A dataset's row; for a folder of any other name the usual one."""
    return DATASETS.get(dataset, DatasetSpec(read_folder))


def default_k_vals(dataset: str) -> tuple[int, ...]:
    """The k of Recall @ k that the dataset's literature reports."""
    return find_spec(dataset).k_vals


def find_dataset(dataset: str, source_path: str) -> tuple[str, str]:
    """Name and parent folder of a dataset, given by its name in `source_path`, or by a path to its folder or CSV file.

    Raises:
        UserError: torchvision has no such dataset, or the name is too long for a folder.
    """
    dataset = name_of_row(dataset)
    if any(len(name.encode(errors="replace")) > MAX_NAME for name in Path(dataset).parts):
        raise UserError(f"--dataset {shown(dataset)} is not a name: it is longer than {MAX_NAME} bytes")
    is_here = names_csv(Path(dataset)) and not os.path.exists(Path(source_path) / dataset) and os.path.isfile(dataset)
    if os.sep not in dataset and dataset not in (".", "..") and not dataset.startswith("~") and not is_here:
        return dataset, source_path
    folder = Path(os.path.normpath(os.path.expanduser(dataset)))
    if not os.path.exists(folder) and os.path.exists(Path(source_path) / folder):
        folder = Path(source_path) / folder
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    return folder.name, str(folder.parent)


def names_csv(root: Path) -> bool:
    """Whether a dataset's place is a CSV file, there or not, rather than a folder."""
    return root.suffix.lower() == ".csv" and not root.is_dir()


def csv_file(dataset: str, source_path: str) -> Path | None:
    """The CSV file that lists a dataset's images, if it is one."""
    root = Path(source_path) / dataset
    return root if names_csv(root) else None


def image_folder(dataset: str, source_path: str) -> Path:
    """The folder below which a dataset's images are named: its own, or that of its CSV file."""
    root = Path(source_path) / dataset
    return root.parent if names_csv(root) else root


def read_splits(
    dataset: str,
    source_path: str,
    download: bool = False,
    download_url: str | None = None,
    test_size: float = TEST_SIZE,
    exclude: str | None = None,
) -> Splits:
    """Reads a dataset's protocol, with `download` after downloading the dataset if it is missing.

    Args:
        dataset: its name.
        source_path: the folder that contains its folder.
        download: whether to download it if it is missing.
        download_url: from where, in place of where it is published.
        test_size: the fraction of the classes to test on, of a folder of class folders; 0: train and test on all.
        exclude: a CSV file of images to leave out.

    Raises:
        UserError: the data is missing, incomplete, or not in a layout of the dataset.
    """
    dataset = name_of_row(dataset)
    if dataset in ("", "..") or Path(dataset).name != dataset:
        raise UserError(
            f"--dataset {shown(dataset)} is not a name: give the folder's name, and its parent as --source_path"
        )
    if dataset in DATASETS and test_size != TEST_SIZE:
        raise UserError(
            f"--test_size {test_size} contradicts {dataset}'s own split: drop it, or choose cross_validation"
        )
    root = Path(source_path) / dataset
    try:
        splits = _read(dataset, root, download, download_url, test_size)
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else root
        raise UserError(f"{where} can't be used ({error.strerror}): see to its permissions and its name") from None
    compare_counts(dataset, splits)
    if exclude is not None:
        splits = leave_out(splits, Path(exclude), dataset, image_folder(dataset, source_path))
    if test_size == 0:
        notice(f"--test_size 0: {dataset} is evaluated on its training classes, which says nothing about unseen ones")
        return Splits(splits.train, test=[RetrievalSet("test", splits.train)])
    return splits


def _read(dataset: str, root: Path, download: bool, download_url: str | None, test_size: float) -> Splits:
    """Reads a dataset from its folder or CSV file; every image occurs once in a set."""
    if names_csv(root):
        with without_collection():
            return read_csv_splits(root, test_size)
    if _is_missing(root) and not find_spec(dataset).made_here:
        if not (download and dataset in DATASETS):
            raise UserError(_how_to_get(dataset, root))
        download_archives(dataset, root, download_url)
    return drop_repeats(DATASETS[dataset].read(root) if dataset in DATASETS else read_folder(root, test_size))


def _is_missing(root: Path) -> bool:
    return not root.is_dir() or all(entry.name.startswith(".") for entry in root.iterdir())


def _how_to_get(dataset: str, root: Path) -> str:
    spec = DATASETS.get(dataset)
    demo = "`bash Sample_Runs.sh demo` needs neither data nor pretrained weights"
    if spec is None:
        others = sorted(path.name for path in root.parent.glob("[!.]*") if path.is_dir() and path != root)
        near = nearest_name(dataset, [*DATASETS, *others])
        there = f"; {root.parent} contains {', '.join(others)}" if 0 < len(others) <= 12 else ""
        return f"no images were found in {root.absolute()}, where --dataset {dataset}{near} would be{there}; {demo}"
    if spec.license:
        how = f"--download can't download it: {spec.license}"
    elif spec.download is not None:
        how = "--download downloads it"
    elif not spec.archives:
        how = "put its files there"
    elif "://" not in spec.archives[0].url:
        how = "--download --download_url URL downloads its archives, or Datasets/README.md says where to put them"
    else:
        how = "--download downloads it"
    return f"no data of {dataset} was found in {root.absolute()}; {how}; {demo}"


def download_archives(dataset: str, root: Path, base_url: str | None = None) -> None:
    """Downloads, checks and unpacks a dataset's archives; nothing appears in `root` until all of them are there.

    Where another process is downloading them, it waits for that process.

    Raises:
        UserError: the dataset needs a license, no address is known, or the download failed.
    """
    spec = DATASETS[dataset]
    archives = spec.archives
    if spec.download is not None and base_url is not None:
        raise UserError(f"--download_url contradicts --dataset {dataset}, whose addresses torchvision knows: drop it")
    if spec.download is None and (not archives or (base_url is None and "://" not in archives[0].url)):
        raise UserError(_how_to_get(dataset, root))
    folder = root.with_name(f".download-{dataset}")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except UserError:
            notice(f"waiting for another process that is downloading {dataset}")
            stack.enter_context(locked(folder, wait=True))
        if _is_missing(root):  # otherwise the other process has downloaded it
            _download_and_unpack(dataset, folder, root, base_url)


def _download_and_unpack(dataset: str, folder: Path, root: Path, base_url: str | None) -> None:
    import http.client
    import tarfile
    import zipfile
    import zlib

    from torchvision.datasets.utils import download_url

    failures = (  # of the connection, by a wrong --download_url, or in unpacking
        *(OSError, RuntimeError, ValueError, ImportError, http.client.HTTPException),
        *(EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error),
    )
    unpacked, spec = folder / "unpacked", DATASETS[dataset]
    try:
        shutil.rmtree(unpacked, ignore_errors=True)  # of a process that was killed
        unpacked.mkdir(parents=True)
        if spec.download is not None:
            with _timeout(DOWNLOAD_TIMEOUT):
                spec.download(unpacked)
        for archive in spec.archives:
            file = archive.url.rsplit("/", 1)[-1]
            url = f"{base_url.rstrip('/')}/{file}" if base_url else archive.url
            with _timeout(DOWNLOAD_TIMEOUT):
                # skips intact files, so a second try continues
                download_url(url, str(folder), file, archive.md5)
            unpack(folder / file, unpacked)
            for inner in archive.holds:
                unpack(unpacked / inner, (unpacked / inner).parent)
                (unpacked / inner).unlink()
        shutil.rmtree(root, ignore_errors=True)  # contains hidden files at most
        os.replace(unpacked, root)
        shutil.rmtree(folder)
    except failures as error:
        raise UserError(
            f"{dataset} can't be downloaded ({error}): try again, or see Datasets/README.md for where to put its files"
        ) from None


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Makes connections give up when nothing has arrived for so long."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .tgz, .tar.gz or .zip file, and copies any other one.

    Raises:
        ValueError: it contains something other than files and folders that stay in `folder`.
    """
    import tarfile
    import zipfile

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{archive.name} contains {name!a}, which is not a plain file or folder within it")

    # Python 3.10 and 3.11 have it in their later releases.
    extra: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    if archive.name.endswith((".tgz", ".tar.gz")):
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isfile() or member.isdir()) or _leaves(member.name):
                    refuse(member.name)
                tar.extract(member, folder, **extra)
    elif archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or _leaves(info.filename):
                    refuse(info.filename)
            packed.extractall(folder)
    else:
        shutil.copy(archive, folder)


def _leaves(name: str) -> bool:
    """Whether a path leads out of the folder that it is relative to."""
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)


def compare_counts(dataset: str, splits: Splits) -> None:
    """Warns where a dataset's counts differ from the published ones."""
    parts = {"train": splits.train}
    for test in splits.test:
        parts |= {"query": test.query, "gallery": test.gallery} if test.gallery is not None else {test.name: test.query}
    for part, (classes, images) in (DATASETS[dataset].counts if dataset in DATASETS else {}).items():
        found = parts[part].num_classes(), len(parts[part])
        for what, expected, got in zip(("classes", "images"), (classes, images), found):
            if expected not in (None, got):
                notice(f"{dataset}, {part}: {got} {what}, but the published protocol has {expected}")


def check_splits(dataset: str, splits: Splits, shares_classes: bool = False) -> None:
    """Refuses splits that can't be trained or evaluated on, and warns of oddities.

    Args:
        dataset: its name.
        splits: its splits.
        shares_classes: whether training classes are evaluated on purpose.

    Raises:
        UserError: there are no sets to evaluate on, too few training classes, or no query has anything to find.
    """
    if not (splits.val or splits.test):
        raise UserError(f"{dataset} has nothing to evaluate on: its splits need val or test sets")
    if splits.train.num_classes() < 2:
        raise UserError(f"{dataset} has {splits.train.num_classes()} training class(es): at least two are needed")
    for test in [*splits.val, *splits.test]:
        gallery = test.query if test.gallery is None else test.gallery
        if gallery.num_classes() < 2:
            raise UserError(
                f"{dataset}, {test.name}: {gallery.num_classes()} class(es) to search: at least two are needed"
            )
        in_gallery = set(gallery.paths)
        is_shared = np.array([path in in_gallery for path in test.query.paths])
        if test.gallery and is_shared.any():
            count = f"{is_shared.sum()} of {len(test.query)} queries"
            notice(f"{dataset}, {test.name}: {count} are in the gallery, too, and don't find themselves there")
        is_known = not shares_classes and gallery.paths is not splits.train.paths
        if is_known and np.isin(gallery.labels[:, 0], splits.train.labels[:, 0]).any():
            notice(f"{dataset}, {test.name}: some of its classes are training classes, too")
        sizes = np.bincount(gallery.labels[:, 0], minlength=len(gallery.class_names[0]))
        alone = int((sizes[test.query.labels[:, 0]] <= is_shared).sum())
        if alone == len(test.query):
            raise UserError(f"{dataset}, {test.name}: no query has another image of its class to find: add images")
        if alone:
            notice(
                f"{dataset}, {test.name}: {alone} of {len(test.query)} queries have no other image of their class and "
                "don't count in retrieval metrics"
            )


@by_first_rank
def check_images(splits: Splits, exif_orientation: bool = False, listed_in: Path | None = None) -> None:
    """Makes sure that every image can be opened, without decoding it: headers are read, in parallel, with a bar.

    Args:
        splits: the images.
        exif_orientation: whether images will be turned as their EXIF data say; otherwise a notice counts those.
        listed_in: the CSV file of the dataset, whose rows are to be named in errors.

    Raises:
        UserError: some can't be read, or a crop box isn't in its image; it names the first, and how many there are.
    """
    paths = list(dict.fromkeys(path for _, images in splits.named_sets() for path in images.paths))
    parts = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    results: list[bool | UserError] = []
    with (
        ThreadPoolExecutor(min(16, 4 * cpu_cores())) as threads,  # they wait for the disk
        warnings.catch_warnings(),
        tqdm(desc="checking images", total=len(paths), leave=False, unit=" images", disable=None) as bar,
    ):
        warnings.simplefilter("ignore")  # about oddities that Pillow copes with
        for part in threads.map(partial(_check_images, exif_orientation=exif_orientation), parts):
            results += part
            bar.update(len(part))
    errors = {path: result for path, result in zip(paths, results) if isinstance(result, UserError)}
    if errors:
        path, error = next(iter(errors.items()))
        row = "" if listed_in is None else _find_row(listed_in, path)
        if len(errors) == 1:
            raise UserError(f"{row}{error}")
        raise UserError(f"{len(errors)} of {len(paths)} images can't be read, of which the first is: {row}{error}")
    turned = sum(result is True for result in results)
    if turned and not exif_orientation:
        notice(
            f"{turned} of {len(paths)} images are to be turned, by their EXIF data, which is ignored, as in the "
            "literature: --exif_orientation turns them"
        )


def _check_images(paths: Sequence[str], exif_orientation: bool) -> list[bool | UserError]:
    """For each image whether it is to be turned, or why it can't be read."""
    results: list[bool | UserError] = []
    for path in paths:
        try:
            results.append(transforms.check_image(path, exif_orientation))
        except UserError as error:
            results.append(error)
    return results


class ImageDataset(Dataset):
    """Images in order, for evaluation. An unreadable image comes back as its `UserError`.

    Attributes:
        read: a path to the image `(3, H, W)` uint8 that the transform gets.
        labels: `(N,)` labels of the finest level.
        parents: `(N,)` labels of the next coarser level, if there is one.
    """

    def __init__(self, images: ImageSet, transform: transforms.Transform, exif_orientation: bool = False):
        self.images = images
        self.transform = transform
        self.read: Callable[[str], torch.Tensor] = partial(transforms.load_image, exif_orientation=exif_orientation)
        self.labels = images.labels[:, 0]
        self.parents: np.ndarray | None = images.labels[:, 1] if images.labels.shape[1] > 1 else None

    def __len__(self) -> int:
        return len(self.images)

    def load(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        """One item: image `(3, crop, crop)` uint8, label, index."""
        try:
            return self.transform(self.read(self.images.paths[idx])), int(self.labels[idx]), idx
        except UserError as error:  # raised by the main process: raised in a worker it would arrive as a traceback
            return error

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        return self.load(idx)


class Deck:
    """Cards 0 … size - 1, which are drawn without replacement until all are used up, and then shuffled again.

    A draw that goes beyond the end of a round holds each card as seldom as possible.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng
        self.waiting: list[int] = []

    def draw(self, count: int) -> list[int]:
        """The next `count` cards."""
        while len(self.waiting) < count:
            # What is left of this round opens the draw, so the next round begins with cards that are not in it.
            times = Counter(self.waiting)
            self.waiting += sorted(self.rng.permutation(self.size).tolist(), key=times.__getitem__)
        drawn, self.waiting = self.waiting[:count], self.waiting[count:]
        return drawn


def members_of_classes(labels: np.ndarray) -> list[np.ndarray]:
    """For each class, in the order of labels, the positions of its images."""
    sizes = np.unique(labels, return_counts=True)[1]
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])


class class_balanced:
    """Batches of `bs / samples_per_class` distinct classes with `samples_per_class` images each.

    Every class is drawn before any is drawn again, and likewise, within a class, every image. Within a batch, an image
    occurs once if its class has enough images. Each iteration gives `(bs,)` positions, max(1, images // bs) times, and
    goes on where the one before it ended.
    """

    def __init__(self, labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator):
        self.samples_per_class = samples_per_class
        self.classes_per_batch, self.num_batches = bs // samples_per_class, max(1, len(labels) // bs)
        self.members = members_of_classes(labels)
        self.classes = Deck(len(self.members), rng)
        self.images = [Deck(len(members), rng) for members in self.members]

    def __iter__(self) -> Iterator[np.ndarray]:
        for _ in range(self.num_batches):
            classes = self.classes.draw(self.classes_per_batch)
            yield np.concatenate([self.members[one][self.images[one].draw(self.samples_per_class)] for one in classes])


def class_balanced_redrawn(
    labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """As `class_balanced`, but images of a class are drawn anew for each batch: in an epoch, many are never drawn.

    Yields:
        `(bs,)` positions, max(1, images // bs) times.
    """
    members = members_of_classes(labels)
    classes = Deck(len(members), rng)
    for _ in range(max(1, len(labels) // bs)):
        chosen = [members[one] for one in classes.draw(bs // samples_per_class)]
        yield np.concatenate([_draw(images, samples_per_class, rng) for images in chosen])


def _draw(members: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the members: as many complete permutations as fit, and a part of one more."""
    rounds = [rng.permutation(members) for _ in range(-(-count // len(members)))]
    return np.concatenate(rounds)[:count]


def shuffled(labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of shuffled images, regardless of their classes.

    Yields:
        `(bs,)` positions, images // bs times, or all images once if there are fewer than `bs`.
    """
    order = rng.permutation(len(labels))
    for batch in range(max(1, len(labels) // bs)):
        yield order[batch * bs : (batch + 1) * bs]


class HierarchicalSampler:
    """Batches from a few super classes each, as the HierarchicalSampler of pytorch-metric-learning forms them.

    In an epoch every combination of `super_classes_per_batch` super classes gets `batches_per_super_tuple` batches, in
    random order. Each of these super classes has an equal share of a batch: `samples_per_class` random images of each
    of its classes, in random order, until the share is full; with too few classes it, and the batch, stay smaller.

    Args:
        labels: `(N,)`.
        bs: images per batch, a multiple of super_classes_per_batch * samples_per_class.
        samples_per_class: images of each class in a batch; images of a smaller class repeat.
        rng: of all draws.
        parents: `(N,)` super classes.
        super_classes_per_batch: super classes in a batch.
        batches_per_super_tuple: batches of each combination of super classes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        bs: int,
        samples_per_class: int,
        rng: np.random.Generator,
        parents: np.ndarray,
        super_classes_per_batch: int = 2,
        batches_per_super_tuple: int = 4,
    ):
        self.samples_per_class, self.rng = samples_per_class, rng
        self.classes_per_super = bs // super_classes_per_batch // samples_per_class
        self.members: list[list[np.ndarray]] = []  # of each super class, the images of each class
        for images in members_of_classes(parents):
            self.members.append([images[those] for those in members_of_classes(labels[images])])
        combinations = itertools.combinations(range(len(self.members)), super_classes_per_batch)
        self.combinations = list(combinations) * batches_per_super_tuple

    def __iter__(self) -> Iterator[np.ndarray]:
        for which in self.rng.permutation(len(self.combinations)):
            batch = []
            for super_class in self.combinations[which]:
                classes = self.members[super_class]
                chosen = self.rng.permutation(len(classes))[: self.classes_per_super]
                batch += [_draw(classes[one], self.samples_per_class, self.rng) for one in chosen]
            yield self.rng.permutation(np.concatenate(batch))


# labels (N,), bs, samples_per_class, generator -> batches of image positions, one pass over the images. One that has
# a parameter `parents` gets the next coarser labels (N,), too; others are what --batch_sampler_params give.
BatchSampler = Callable[..., Iterable[np.ndarray]]
BATCH_SAMPLERS: dict[str, BatchSampler] = {
    "class_balanced": class_balanced,
    "shuffled": shuffled,
    "HierarchicalSampler": HierarchicalSampler,
}
GIVEN_TO_BATCH_SAMPLERS = ("labels", "bs", "samples_per_class", "rng", "parents")
MAX_BATCHES = 10**6  # per epoch
REDRAWING: dict[str, BatchSampler] = {"class_balanced": class_balanced_redrawn}  # in its place, with --redraw_images

Draw = tuple[int, int, int]  # a training image to load: (position in the dataset, epoch, position in the epoch)


class BaseTripletDataset(ImageDataset):
    """Training images, augmented, and the batches of an epoch.

    Batches and augmentation depend only on the seed, the epoch and the position in the epoch. All that a worker needs
    is in the draws it gets, since workers live longer than an epoch and don't see what changes in the main process.

    Args:
        images: the training images.
        transform: the random transform.
        bs: images per batch.
        samples_per_class: images of each class in a batch.
        batch_sampler: a key of `BATCH_SAMPLERS`.
        seed: of batches and transforms.
        iterations: batches per epoch (default: one pass of the batch sampler).
        redraw_images: whether `class_balanced` draws the images of a class anew for each batch.
        exif_orientation: whether to turn images as their EXIF data say.
        batch_sampler_params: further parameters of the batch sampler.

    Attributes:
        labels: `(N,)` training labels 0 … num_classes - 1.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: transforms.Transform,
        bs: int,
        samples_per_class: int,
        batch_sampler: str = "class_balanced",
        seed: int = 1,
        iterations: int | None = None,
        redraw_images: bool = False,
        exif_orientation: bool = False,
        batch_sampler_params: Mapping[str, Any] | None = None,
    ):
        super().__init__(images, transform, exif_orientation)
        classes, self.labels = np.unique(self.labels, return_inverse=True)
        self.num_classes = len(classes)
        self.bs = bs
        self.samples_per_class = samples_per_class
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.iterations = iterations
        self.redraw_images = redraw_images
        self.batch_sampler_params = dict(batch_sampler_params or {})
        self._batches: list[list[Draw]] = []
        self.set_epoch(1)
        self._warn_about_repeats()

    @property
    def batches(self) -> list[list[Draw]]:
        """The current epoch's batches. The loader reads this very list, which `set_epoch` refills."""
        return self._batches

    def _warn_about_repeats(self) -> None:
        sizes = np.bincount(self.labels)
        is_by_class = self.batch_sampler == "class_balanced" and self.images.class_names[0] != self.images.paths
        if is_by_class and sizes.min() < self.samples_per_class:
            few = int((sizes < self.samples_per_class).sum())
            notice(
                f"classes with fewer than {self.samples_per_class} images: {few}; their images repeat within a batch"
            )
        if len(self) < self.bs:
            notice(
                f"--bs {self.bs} is more than the {len(self)} training images: images repeat, or batches are smaller"
            )
        smaller = sum(len(batch) < self.bs for batch in self.batches)
        if self.batch_sampler == "HierarchicalSampler" and smaller:
            notice(
                f"--batch_sampler HierarchicalSampler: {smaller} of {len(self.batches)} batches have fewer than "
                f"{self.bs} images, since some super classes have few classes"
            )
        num_draws = sum(map(len, self.batches))
        shown = np.minimum(sizes, num_draws / len(sizes)).sum()  # where each class is drawn equally often
        if is_by_class and shown < 0.9 * min(num_draws, len(self)):
            notice(
                f"an epoch shows {self.num_images_shown()} of the {len(self)} training images: classes are drawn "
                "equally often, so that images of small ones repeat and some of large ones wait for later epochs"
            )

    def num_images_shown(self) -> int:
        """The number of different images in the current epoch's batches."""
        return len({idx for batch in self.batches for idx, _, _ in batch})

    def form_batches(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches of image positions; a subclass may form others.

        Raises:
            UserError: the batch sampler forms none.
        """
        rng = np.random.default_rng((self.seed, epoch))
        rows = {**BATCH_SAMPLERS, **(REDRAWING if self.redraw_images else {})}
        row, params = rows[self.batch_sampler], self.batch_sampler_params
        if knows_parents(row):
            params = {**params, "parents": self.parents}
        begin = partial(row, self.labels, self.bs, self.samples_per_class, rng, **params)
        sampler = begin()
        batches: list[np.ndarray] = []
        while not batches or len(batches) < (self.iterations or 0):
            one_pass = [*sampler]
            if not one_pass:  # a generator ends with its pass; class_balanced goes on with the next one
                sampler = begin()
                one_pass = [*sampler]
            if not one_pass:
                what = f"--batch_sampler {self.batch_sampler} forms no batch of {self.bs}"
                raise UserError(f"{what} from {len(self)} images: lower --bs")
            batches += one_pass
        return batches[: self.iterations]

    def set_epoch(self, epoch: int) -> None:
        """Forms the epoch's batches, in place of the previous epoch's."""
        position = itertools.count()
        self.batches[:] = [[(int(idx), epoch, next(position)) for idx in batch] for batch in self.form_batches(epoch)]

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int, int] | UserError:  # type: ignore[override]
        idx, epoch, position = draw
        with seeded(self.seed, epoch, position):
            return self.load(idx)


def collate(items: list) -> Any:
    """Stacks items to `(images (B, 3, H, W) uint8, labels (B,), indices (B,))`; one error stands for its batch.

    The channels of a pixel stay adjacent in memory, as they are when decoded: reordering them here would take longer.
    """
    error = next((item for item in items if isinstance(item, UserError)), None)
    if error is not None:
        return error
    images, labels, indices = default_collate([(image.permute(1, 2, 0), label, idx) for image, label, idx in items])
    return images.permute(0, 3, 1, 2), labels, indices


def collate_arrays(items: list) -> Any:
    """As `collate`, but arrays, images as `(B, H, W, 3)`: they go through a pipe, and tensors through shared memory."""
    error = next((item for item in items if isinstance(item, UserError)), None)
    if error is not None:
        return error
    images, labels, indices = zip(*items)
    return np.stack([image.permute(1, 2, 0).numpy() for image in images]), np.array(labels), np.array(indices)


def free_shared_memory() -> float:
    """The bytes that are free for the batches that workers pass on; containers often have no more than 64 MB."""
    try:
        status = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # systems that have no such folder, or no such function
        return math.inf
    return status.f_bavail * status.f_frsize


def refuse_dead_worker(error: Exception) -> None:
    """Raises a `UserError` in place of an error by which PyTorch tells of a data-loading worker that died.

    Any other error is left to the caller.
    """
    if isinstance(error.__cause__, UserError):  # of the signal handler, which knows more
        raise error.__cause__ from None
    text = str(error)
    if text.startswith("Caught") and "shared memory" not in text:
        return  # raised in a worker that lives
    if isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        threading.Event().wait(1)  # the worker's batch can't be fetched any more: in a moment the signal says why
        causes = ["connection lost"]
    else:
        causes = re.findall(r"killed by signal: [\w ]+|exited unexpectedly|unable to allocate shared memory", text)
    if causes:
        raise UserError(
            f"a data-loading worker died ({causes[0]}), perhaps for lack of memory: lower --kernels or --bs, and "
            "continue with --resume_training"
        ) from None


def _on_dead_worker(pytorchs_handler: Callable[[int, Any], object], number: int, frame: Any) -> None:
    try:
        pytorchs_handler(number, frame)
    except RuntimeError as error:
        refuse_dead_worker(error)
        raise


def handle_dead_workers() -> None:
    """Wraps PyTorch's signal handler, which interrupts the main process wherever it is when a worker dies."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return
    handler = signal.getsignal(signal.SIGCHLD)
    if callable(handler) and getattr(handler, "func", None) is not _on_dead_worker:
        signal.signal(signal.SIGCHLD, partial(_on_dead_worker, handler))


class Shares:
    """This rank's share of each of the batches that all ranks form alike.

    Attributes:
        batches: the whole batches; the list may be refilled.
    """

    def __init__(self, batches: list[list[Draw]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in self.batches:
            if len(batch) % ranks().count:
                raise UserError(
                    f"{ranks().count} processes can't share a batch of {len(batch)} images equally, which "
                    "--batch_sampler has formed: give another --bs, or start another number of processes"
                )
            yield batch[share(len(batch))]


def in_batches(batches: list[list[Draw]]) -> Any:
    """A sampler of batches, or of this rank's share of them."""
    return batches if ranks().count == 1 else Shares(batches)


def in_shares(dataset: Dataset) -> range | None:
    """A sampler of this rank's share of a dataset, in order; None where it has all of it."""
    count = len(dataset)  # type: ignore[arg-type]
    own = share(count)
    return range(own.start, own.stop) if 1 < ranks().count <= count else None


class ImageLoader(DataLoader):
    """A DataLoader whose main process raises the `UserError` that a worker met.

    Of several ranks, each loads the images of its share. With `Shares` it gives labels and indices of whole batches.
    """

    dataset: Any  # an ImageDataset; for training a BaseTripletDataset

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` labels of the dataset's images."""
        return self.dataset.labels

    @property
    def parents(self) -> np.ndarray | None:
        """`(N,)` labels of the next coarser level, if there is one."""
        return self.dataset.parents

    @property
    def hierarchy(self) -> np.ndarray:
        """`(N, H)` labels of every level, the finest first."""
        return self.dataset.images.labels

    @property
    def paths(self) -> Sequence[str]:
        """N image files."""
        return self.dataset.images.paths

    @property
    def is_shared(self) -> bool:
        """Whether it gives a rank's share of the dataset, in order, and not all of it."""
        return isinstance(self.sampler, range)

    def _whole(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches of a rank's images, with labels and indices of all images of each batch."""
        draws = list(self.batch_sampler.batches)  # type: ignore[union-attr]
        for (images, _, _), batch in zip(batches, draws):
            idx = torch.tensor([idx for idx, _, _ in batch])
            yield images, torch.from_numpy(self.labels).index_select(0, idx), idx

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = self._load()
        return self._whole(batches) if isinstance(self.batch_sampler, Shares) else batches

    def _load(self) -> Iterator[Any]:
        if self._iterator is not None:
            # DataLoader draws a random number when it starts workers, but not when it uses them again. Training must be
            # the same whether they were started in this epoch, as in a resumed run, or in an earlier one.
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        try:
            batches = super().__iter__()
            handle_dead_workers()
            for batch in batches:
                if isinstance(batch, UserError):
                    try:
                        raise batch
                    finally:
                        del batch  # or the error would refer to itself, and its loader's workers stop much later
                if isinstance(batch[0], np.ndarray):
                    images, labels, indices = map(torch.from_numpy, batch)
                    batch = images.permute(0, 3, 1, 2), labels, indices
                yield batch
        except UserError:
            raise
        except Exception as error:
            if self.num_workers:
                refuse_dead_worker(error)
            raise


@dataclass(frozen=True)
class Loaders:
    """`train` gives augmented batches, `train_eval` the same images in order, with the test transform."""

    train: ImageLoader
    train_eval: ImageLoader
    val: Sequence[RetrievalSet[ImageLoader]]
    test: Sequence[RetrievalSet[ImageLoader]]

    def watched(self, splits_to_eval: Sequence[str]) -> dict[str, Sequence[RetrievalSet[ImageLoader]]]:
        """What is evaluated while training, by kind of rows: `val`, which selects the epoch, and what is asked for."""
        sets = {"val": self.val or self.test}
        if self.val and self.test and "test" in splits_to_eval:
            sets["test"] = self.test
        if "train" in splits_to_eval:
            sets["train_eval"] = [RetrievalSet("train", self.train_eval)]
        return sets


def knows_parents(batch_sampler: BatchSampler) -> bool:
    """Whether a batch sampler takes the next coarser labels."""
    return "parents" in inspect.signature(batch_sampler).parameters


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks the resolved flags of splits and batches against each other.

    Raises:
        UserError: they contradict each other.
    """
    _refuse_split_contradictions(opt)
    params = _batch_sampler_params(opt)
    if opt.batch_sampler != "HierarchicalSampler":
        return
    for name, value in params.items():
        if value < 1:
            raise UserError(f"--batch_sampler_params {name}={value} is not at least 1")
    super_classes = params.get("super_classes_per_batch", 2)
    if opt.bs % (super_classes * opt.samples_per_class):
        raise UserError(
            f"--bs {opt.bs} is not a multiple of {super_classes} super classes, super_classes_per_batch, times "
            f"{opt.samples_per_class} images, --samples_per_class: change one of them"
        )


def _refuse_split_contradictions(opt: argparse.Namespace) -> None:
    """Refuses flags that the split scheme doesn't ask."""
    scheme = f"--split_scheme {opt.split_scheme}"
    if opt.split_scheme == "closed_set" and opt.fold_order != "partition":
        raise UserError(f"--fold_order {opt.fold_order} is an order of classes, and {scheme} divides images: drop it")
    if opt.split_scheme != "predefined_with_validation":
        return
    if opt.test_start_idx != TEST_START:
        raise UserError(
            f"--test_start_idx {opt.test_start_idx:g} contradicts {scheme}, which keeps the test images: drop it"
        )
    if opt.test_size == 0:
        raise UserError(f"--test_size 0 leaves no test classes, which {scheme} needs: drop it, or choose predefined")


def _batch_sampler_params(opt: argparse.Namespace) -> dict[str, Any]:
    row = BATCH_SAMPLERS[opt.batch_sampler]
    return check_params("--batch_sampler_params", opt.batch_sampler_params, row, GIVEN_TO_BATCH_SAMPLERS)


def _check_super_classes(opt: argparse.Namespace, images: ImageSet, params: Mapping[str, Any]) -> None:
    """Makes sure that the training images have the super classes of which HierarchicalSampler forms batches.

    Raises:
        UserError: they don't.
    """
    if images.labels.shape[1] < 2:
        raise UserError(
            f"--batch_sampler {opt.batch_sampler} needs labels coarser than --label_hierarchy_level "
            f"{opt.label_hierarchy_level}, which {opt.dataset} doesn't have: choose class_balanced"
        )
    if opt.batch_sampler != "HierarchicalSampler":
        return
    wanted, there = params.get("super_classes_per_batch", 2), len(np.unique(images.labels[:, 1]))
    if wanted > there:
        raise UserError(
            f"--batch_sampler_params super_classes_per_batch={wanted} is more than the {there} super classes of "
            f"{opt.dataset}'s training images: lower it"
        )
    batches = math.comb(there, wanted) * params.get("batches_per_super_tuple", 4)
    if batches > MAX_BATCHES:
        raise UserError(
            f"--batch_sampler HierarchicalSampler would form {batches:,} batches per epoch from {there} super classes: "
            "lower super_classes_per_batch or batches_per_super_tuple of --batch_sampler_params"
        )


def build_train_dataset(opt: argparse.Namespace, images: ImageSet) -> BaseTripletDataset:
    """The dataset to train on, from the resolved flags.

    Raises:
        UserError: batches of --bs images can't be formed.
    """
    num_classes, classes_per_batch = images.num_classes(), opt.bs // opt.samples_per_class
    count = ranks().count
    if opt.bs % count and opt.evaluate is None:
        near = math.lcm(count, opt.samples_per_class)
        raise UserError(
            f"--bs {opt.bs} can't be shared equally by {count} processes: give a multiple of {near}, such as "
            f"--bs {max(1, round(opt.bs / near)) * near}"
        )
    if opt.batch_sampler == "class_balanced" and classes_per_batch > num_classes:
        raise UserError(
            f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} needs {classes_per_batch} classes per "
            f"batch, and {opt.dataset} trains on {num_classes}: lower --bs or raise --samples_per_class"
        )
    params = _batch_sampler_params(opt)
    if knows_parents(BATCH_SAMPLERS[opt.batch_sampler]):
        _check_super_classes(opt, images, params)
    iterations = f"--iterations_per_epoch {opt.iterations_per_epoch} with --bs {opt.bs}"
    check_memory((opt.iterations_per_epoch or 0) * opt.bs * BYTES_PER_DRAW, iterations)
    return BaseTripletDataset(
        images,
        transforms.build_train_transform(opt),
        opt.bs,
        opt.samples_per_class,
        opt.batch_sampler,
        opt.seed,
        opt.iterations_per_epoch,
        opt.redraw_images,
        opt.exif_orientation,
        params,
    )


def give_dataloaders(opt: argparse.Namespace, splits: Splits, pin_memory: bool = False) -> Loaders:
    """Builds all loaders from the resolved flags; `pin_memory` is for batches that go to a CUDA device.

    Raises:
        UserError: batches of --bs images can't be formed.
    """
    workers = min(opt.kernels, cpu_cores())
    if workers < opt.kernels:
        notice(f"--kernels {opt.kernels} is more than this machine's {workers} cores: {workers} workers load data")
    loaded_ahead = 2 + 2 * workers  # two per worker, and two that the main process has
    eval_transform = transforms.build_eval_transform(opt)
    train = build_train_dataset(opt, splits.train)
    free = free_shared_memory()
    needs_pipes = workers > 0 and loaded_ahead * max(opt.bs, opt.eval_bs) * 3 * opt.crop_size**2 > free
    if needs_pipes:
        notice(
            f"/dev/shm has only {free / 1e6:.0f} MB: workers send batches through pipes instead, which takes a little "
            "longer; a container gets more by --shm-size"
        )
    common: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": collate_arrays if needs_pipes else collate,
        "pin_memory": pin_memory,
    }

    def in_order(images: ImageSet) -> ImageLoader:
        dataset = ImageDataset(images, eval_transform, opt.exif_orientation)
        # a generator of its own, so that evaluation draws nothing from training's
        order = in_shares(dataset)
        return ImageLoader(dataset, batch_size=opt.eval_bs, sampler=order, generator=torch.Generator(), **common)

    return Loaders(
        train=ImageLoader(train, batch_sampler=in_batches(train.batches), **common),
        train_eval=in_order(splits.train),
        val=[one.map(in_order) for one in splits.val],
        test=[one.map(in_order) for one in splits.test],
    )
