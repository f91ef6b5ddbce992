"""A cache of the features of a frozen trunk: it runs once per image, and every run, fold and trial after that reads."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transforms
from auxiliaries import (
    FlagParser,
    Progress,
    UserError,
    as_json,
    atomic_write,
    by_first_rank,
    locked,
    notice,
    number,
    save_json,
    seeded,
    user_path,
)
from datasets import ImageDataset, ImageLoader, ImageSet, Loaders, in_batches, in_shares
from netlib import EmbeddingNet

DTYPES = ("float32", "float16")
# Flags of what an image goes through.
TEST_FLAGS = ("crop_size", "resize", "interpolation", "eval_transforms", "exif_orientation")
TRAIN_FLAGS = ("crop_size", "crop_scale", "flip", "interpolation", "train_transforms", "exif_orientation", "seed")


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of the cache."""
    add = parser.add_argument_group("cached features").add_argument
    # fmt: off
    add("--cache_features", nargs="?", const=0, type=number(int, 0), metavar="VIEWS", fixed=True,
        help="with --freeze_trunk: run the trunk once per image and train on its stored features; of VIEWS random "
        "transforms of each training image, or, without VIEWS or with 0, of its test transform")
    add("--cache_dtype", choices=DTYPES, default="float32", fixed=True, needs="cache_features",
        help="type of stored features; float16 halves the file")
    add("--cache_path", type=user_path, default="Training_Results/feature_cache", metavar="FOLDER", machine=True,
        compared=False, help="folder of stored features and images, which all runs share")
    # fmt: on


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks the resolved flags of the cache against the others.

    Raises:
        UserError: they contradict each other.
    """
    if opt.cache_features is None:
        return
    if not opt.freeze_trunk:
        raise UserError(
            "--cache_features stores what the trunk gives, which changes while it learns: add --freeze_trunk"
        )
    if opt.training_method == "UnsupervisedByAugmentation" and opt.cache_features < opt.samples_per_class:
        raise UserError(
            f"--training_method UnsupervisedByAugmentation compares {opt.samples_per_class} transforms of each image: "
            f"give --cache_features {opt.samples_per_class} or more"
        )


class FeatureDataset(ImageDataset):
    """The features of a dataset's images in place of the images.

    Args:
        images: the dataset whose images, labels and, for training, batches it takes over.
        features: `(views, N, features)`.
        rows: the position of each image in them, `(len(images),)`.
    """

    def __init__(self, images: ImageDataset, features: np.ndarray, rows: np.ndarray):
        self.images, self.labels, self.parents = images.images, images.labels, images.parents
        self.features, self.rows = features, rows

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A batch: features `(B, features)` float32, labels `(B,)`, indices `(B,)`."""
        return self.take(np.zeros(len(indices), np.int64), np.asarray(indices))

    def take(self, views: np.ndarray, idx: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The views `(B,)` of the images `(B,)`, as a batch."""
        features = self.features[views, self.rows[idx]].astype(np.float32, copy=False)  # (B, features)
        return torch.from_numpy(features), torch.from_numpy(self.labels[idx]), torch.from_numpy(idx)


class TrainFeatureDataset(FeatureDataset):
    """The features of training images; which view a draw shows depends on seed, epoch and position alone.

    Draws of one image in a batch show different views, as far as there are.
    """

    def __init__(self, images: Any, features: np.ndarray, rows: np.ndarray):
        super().__init__(images, features, rows)
        self.drawn, self.num_classes = images, images.num_classes
        self.set_epoch(1)

    @property
    def batches(self) -> list[list[tuple[int, int, int]]]:
        """The current epoch's batches of (index, epoch, position)."""
        return self.drawn.batches

    def set_epoch(self, epoch: int) -> None:
        """Forms the epoch's batches, and draws the view of each of their images."""
        self.drawn.set_epoch(epoch)
        rng, num_views = np.random.default_rng((self.drawn.seed, epoch, len(self.features))), len(self.features)
        views = [draw_views(np.array([idx for idx, _, _ in batch]), num_views, rng) for batch in self.batches]
        self.views = np.concatenate(views)  # (positions,)

    def __getitems__(self, draws: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        idx, _, positions = np.array(draws).T
        return self.take(self.views[positions], idx)


def draw_views(idx: np.ndarray, num_views: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a view for each image `(B,)` of a batch; those of the same image differ, as far as there are enough."""
    images, image = np.unique(idx, return_inverse=True)
    order = rng.permuted(np.tile(np.arange(num_views), (len(images), 1)), axis=1)  # (images, views)
    position = np.argsort(image, kind="stable")
    first = np.searchsorted(image[position], image)
    occurrence = np.empty(len(idx), np.int64)  # of the same image, so far
    occurrence[position] = np.arange(len(idx)) - first[position]
    return order[image, occurrence % num_views]


def give_cached_loaders(
    opt: argparse.Namespace, loaders: Loaders, nets: Sequence[EmbeddingNet], device: torch.device
) -> Loaders:
    """Loaders of features in place of images, which the networks take from then on.

    The features are computed unless they are stored already.

    Args:
        opt: the resolved flags.
        loaders: of the images.
        nets: networks on `device` with the same frozen trunk.
        device: where the trunk runs.

    Raises:
        UserError: an image can't be read, or the features can't be stored.
    """
    net, trunk = nets[0], describe_trunk(nets[0])
    # Validation classes are training classes of other folds: all folds share both files.
    learned = [loaders.train_eval, *all_parts(loaders.val)]
    of_test = give_features(opt, loaders, [*learned, *all_parts(loaders.test)], 0, net, trunk, device)
    views = opt.cache_features
    of_train = give_features(opt, loaders, learned, views, net, trunk, device) if views else of_test
    common: dict[str, Any] = {"collate_fn": _as_it_is, "pin_memory": loaders.train.pin_memory}

    def in_order(loader: ImageLoader) -> ImageLoader:
        dataset = FeatureDataset(loader.dataset, of_test.values, of_test.find(loader.paths))
        order = in_shares(dataset)
        return ImageLoader(dataset, batch_size=opt.eval_bs, sampler=order, generator=torch.Generator(), **common)

    train = TrainFeatureDataset(loaders.train.dataset, of_train.values, of_train.find(loaders.train.paths))
    for one in nets:
        one.takes_features = True
    return Loaders(
        train=ImageLoader(train, batch_sampler=in_batches(train.batches), **common),
        train_eval=in_order(loaders.train_eval),
        val=[one.map(in_order) for one in loaders.val],
        test=[one.map(in_order) for one in loaders.test],
    )


def all_parts(sets: Iterable[Any]) -> list[ImageLoader]:
    """Queries and galleries of retrieval sets."""
    return [part for one in sets for part in (one.query, one.gallery) if part is not None]


def _as_it_is(batch: Any) -> Any:
    """A collate function for batches that are whole already."""
    return batch


# Computing and storing


@dataclass(frozen=True)
class Features:
    """Stored features.

    Attributes:
        values: `(views, N, features)`.
        paths: N image files, sorted.
    """

    values: np.ndarray
    paths: Sequence[str]

    def find(self, paths: Sequence[str]) -> np.ndarray:
        """The positions of images among the N."""
        position = {path: row for row, path in enumerate(self.paths)}
        return np.array([position[path] for path in paths], np.int64)


def give_features(
    opt: argparse.Namespace,
    loaders: Loaders,
    parts: Sequence[ImageLoader],
    views: int,
    net: EmbeddingNet,
    trunk: Mapping[str, str],
    device: torch.device,
) -> Features:
    """The features of images from their file, which is made where there is none; one file holds them all.

    The arguments are those of `make_features`.

    Raises:
        UserError: an image can't be read, or the file can't be read or written.
    """
    paths = sorted({path for part in parts for path in part.paths})
    file = make_features(opt, loaders, paths, views, net, trunk, device)
    return Features(read_features(file, (max(views, 1), len(paths), net.num_features)), paths)


@by_first_rank
def make_features(
    opt: argparse.Namespace,
    loaders: Loaders,
    paths: Sequence[str],
    views: int,
    net: EmbeddingNet,
    trunk: Mapping[str, str],
    device: torch.device,
) -> Path:
    """The file of features of images, which is made where there is none.

    Args:
        opt: the resolved flags.
        loaders: of images, from which the transforms are taken.
        paths: the images, sorted.
        views: random transforms of each image; 0: its test transform.
        net: the network, on `device`.
        trunk: what `describe_trunk` says of it.
        device: where the trunk runs.

    Raises:
        UserError: an image can't be read, or the file can't be written.
    """
    description = describe(opt, paths, views, trunk)
    key = hashlib.sha256(as_json(description).encode()).hexdigest()[:20]
    folder = Path(opt.cache_path)
    file = folder / f"{key}.npy"
    if not file.exists():
        make_folder(opt.cache_path)
        with locked(folder, f"{key}.lock", wait=True):  # another process may be making it
            for unfinished in folder.glob(f".part-*-{key}.npy"):
                unfinished.unlink(missing_ok=True)
            if not file.exists():
                _make(opt, loaders, paths, views, net, device, file)
                save_json(file.with_suffix(".json"), description)
    return file


@by_first_rank
def make_folder(path: str) -> None:
    """Creates the folder of stored features, where there is none.

    Raises:
        UserError: it can't be created.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache_path {path} can't be created ({error.strerror}): give another folder") from None


def read_features(file: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Maps stored features into memory.

    Raises:
        UserError: the file is damaged.
    """
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
        if values.shape != shape or str(values.dtype) not in DTYPES:
            raise ValueError(f"it holds {values.dtype} {values.shape} instead of {shape}")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{file} can't be read as stored features ({error}): remove it, and they are made again"
        ) from None
    return values


def describe_trunk(net: EmbeddingNet) -> dict[str, str]:
    """Digests of the layers of a network's trunk and of its weights."""
    weights = hashlib.sha256()
    for name, value in [*net.backbone.state_dict().items(), ("mean", net.mean), ("std", net.std)]:
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {"network": hashlib.sha256(repr(net.backbone).encode()).hexdigest(), "weights": weights.hexdigest()}


def describe(opt: argparse.Namespace, paths: Sequence[str], views: int, trunk: Mapping[str, str]) -> dict[str, Any]:
    """All that features depend on, for the name of their file and the description beside it."""
    flags = TRAIN_FLAGS if views else TEST_FLAGS
    return {
        **{name: getattr(opt, name) for name in ("arch", "pooling", "cascade_layers")},
        **({"precision": opt.precision} if opt.precision != "fp32" else {}),
        **trunk,
        "transform": {name: getattr(opt, name) for name in flags},
        "views": views,
        "dtype": opt.cache_dtype,
        "dataset": opt.dataset,
        "images": describe_images(paths, opt.source_path),
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "timm")},
    }


def describe_images(paths: Sequence[str], source_path: str) -> dict[str, Any]:
    """The number of image files, and a digest of their names below the source path, sizes and times of change."""
    images, root = hashlib.sha256(), os.path.abspath(source_path)
    for path in paths:
        status = os.stat(transforms.split_box(path)[0])
        name = os.path.relpath(path, root)
        images.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return {"count": len(paths), "sha256": images.hexdigest()}


class _Views(ImageDataset):
    """Images in order, once for each view; transforms are drawn from seed, view and position."""

    def __init__(self, paths: Sequence[str], transform: transforms.Transform, opt: argparse.Namespace, views: int):
        labels = np.zeros((len(paths), 1), np.int64)
        super().__init__(ImageSet(paths, labels, [["any"]]), transform, opt.exif_orientation)
        self.seed, self.views = opt.seed, views

    def __len__(self) -> int:
        return max(self.views, 1) * len(self.images)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int, int] | UserError:
        view, idx = divmod(position, len(self.images))
        if not self.views:
            return self.load(idx)
        with seeded(self.seed, view, idx):
            return self.load(idx)


def _make(
    opt: argparse.Namespace,
    loaders: Loaders,
    paths: Sequence[str],
    views: int,
    net: EmbeddingNet,
    device: torch.device,
    file: Path,
) -> None:
    """Runs the trunk on all views of all images, and writes their features."""
    source = loaders.train if views else loaders.train_eval
    dataset = _Views(paths, source.dataset.transform, opt, views)
    loader = ImageLoader(
        dataset,
        batch_size=opt.eval_bs,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        generator=torch.Generator(),
    )
    shape = (max(views, 1), len(paths), net.num_features)
    gigabytes = np.prod(shape) * np.dtype(opt.cache_dtype).itemsize / 2**30
    free = shutil.disk_usage(file.parent).free / 2**30
    if gigabytes > free:  # writing to a file that is mapped into memory would end the process without a word
        raise UserError(
            f"--cache_path {file.parent} has {free:.2f} GiB free, and features take {gigabytes:.2f}: give another "
            "folder, --cache_dtype float16, or fewer VIEWS"
        )
    notice(f"features of {len(dataset)} images are stored in {file}, {gigabytes:.2f} GiB, which later runs read")
    net.eval()
    with atomic_write(file) as beside, torch.inference_mode():
        values = np.lib.format.open_memmap(beside, "w+", opt.cache_dtype, shape)
        rows, start = values.reshape(-1, net.num_features), 0
        for images, _, _ in Progress(loader, "features of the trunk"):
            features = net.features(images.to(device, non_blocking=True))  # (B, features)
            rows[start : start + len(features)] = features.float().cpu().numpy()
            start += len(features)
        values.flush()
