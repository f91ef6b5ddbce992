"""A cache of decoded images: every worker, run and fold after the first reads them from one file.

Of training images it keeps what random transforms begin with, of evaluated images what the network gets. So the pixels
are those of a run without it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

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
    save_json,
)
from datasets import ImageLoader, Loaders
from features import TEST_FLAGS, all_parts, describe_images, make_folder

PROBED = 64  # images whose mean size says how large the file will be
AT_ONCE = 64  # images that a worker decodes before it hands them over


def add_arguments(parser: FlagParser) -> None:
    """Declares the flag of the cache."""
    add = parser.add_argument_group("cached images").add_argument
    # fmt: off
    add("--cache_images", action="switch", machine=True, compared=False,
        help="decode images once, for all epochs, runs and folds, into a file in --cache_path: quicker where decoding "
        "keeps the device waiting; a 500 × 375 px photograph takes 0.56 MB")
    # fmt: on


def refuse_contradictions(opt: argparse.Namespace) -> None:
    """Checks the resolved flags of the cache against the others.

    Raises:
        UserError: they contradict each other.
    """
    if opt.cache_images and opt.cache_features is not None:
        raise UserError("--cache_images and --cache_features: with cached features no image is read again; drop one")


class StoredImages:
    """Images in a file that is mapped into memory, by their path.

    Args:
        file: all their pixels, one image after the other, each `(H, W, 3)`, as decoders give them.
        shapes: `(N, 3)`, height, width and channels of each image.
        paths: the N image files that they were read from.
    """

    def __init__(self, file: Path, shapes: np.ndarray, paths: Sequence[str]):
        self.file, self.shapes = file, shapes
        self.ends = np.cumsum(shapes.prod(axis=1, dtype=np.int64))  # (N,)
        self.row = {path: row for row, path in enumerate(paths)}
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file anew instead of copying it

    def read(self, path: str) -> torch.Tensor:
        """The image `(3, H, W)` uint8 that was read from a path."""
        if self._pixels is None:
            self._pixels = np.memmap(self.file, np.uint8, "r")
        row = self.row[path]
        shape = self.shapes[row]
        pixels = self._pixels[self.ends[row] - shape.prod() : self.ends[row]]
        return torch.from_numpy(np.array(pixels)).view(*shape.tolist()).permute(2, 0, 1)


def use_cached_images(opt: argparse.Namespace, loaders: Loaders) -> None:
    """With --cache_images, lets loaders read stored images in place of files; an earlier run may have stored them.

    Args:
        opt: the resolved flags.
        loaders: of images; their datasets are changed.

    Raises:
        UserError: an image can't be read, or the file can't be written.
    """
    if not opt.cache_images:
        return
    make_folder(opt.cache_path)
    # Validation classes are training classes of other folds: all folds share both files.
    learned = [loaders.train_eval, *all_parts(loaders.val)]
    begin, finish = transforms.split_random(loaders.train.dataset.transform)
    fixed = getattr(loaders.train.dataset.transform, "fixed", ())
    training = loaders.train.dataset
    training.read = _store(opt, learned, begin, {"transforms": list(fixed), "interpolation": opt.interpolation}).read
    training.transform = finish
    evaluated = [*learned, *all_parts(loaders.test)]
    of_test = _store(opt, evaluated, learned[0].dataset.transform, {name: getattr(opt, name) for name in TEST_FLAGS})
    for loader in evaluated:
        loader.dataset.read, loader.dataset.transform = of_test.read, transforms.unchanged


def _store(
    opt: argparse.Namespace, parts: Sequence[ImageLoader], transform: transforms.Transform, flags: Mapping[str, Any]
) -> StoredImages:
    """The loaders' images after a transform that the flags describe, from their file, which is made if necessary."""
    paths = sorted({path for part in parts for path in part.paths})
    file = make_file(opt, paths, transform, flags, parts[0].num_workers)
    return StoredImages(file, np.load(file.with_suffix(".npy"), allow_pickle=False), paths)


@by_first_rank
def make_file(
    opt: argparse.Namespace,
    paths: Sequence[str],
    transform: transforms.Transform,
    flags: Mapping[str, Any],
    num_workers: int,
) -> Path:
    """Stores images, unless that is done, and returns the file of their pixels; their shapes are beside it.

    Args:
        opt: the resolved flags.
        paths: image files, sorted.
        transform: what is applied to them; nothing in it is random.
        flags: what it depends on.
        num_workers: processes that decode.

    Raises:
        UserError: an image can't be read, or the file can't be written.
    """
    description = {
        "layout": "height, width, channels",
        "transform": flags,
        "exif_orientation": opt.exif_orientation,
        "dataset": opt.dataset,
        "images": describe_images(paths, opt.source_path),
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "pillow")},
    }
    key = hashlib.sha256(as_json(description).encode()).hexdigest()[:20]
    folder = Path(opt.cache_path)
    file = folder / f"{key}.images"
    if is_whole(file, len(paths)):
        return file
    with locked(folder, f"{key}.lock", wait=True):  # another process may be making it
        for unfinished in folder.glob(f".part-*-{key}.*"):
            unfinished.unlink(missing_ok=True)
        if is_whole(file, len(paths)):
            return file
        if file.exists():
            notice(f"{file} is damaged, and made anew")
            file.unlink()
        read = _Reader(paths, transform, opt.exif_orientation)
        refuse_full_disk(folder, read)
        loader = DataLoader(read, AT_ONCE, num_workers=num_workers, collate_fn=list, generator=torch.Generator())
        write(file, loader)
        save_json(file.with_suffix(".json"), description)
    return file


def is_whole(file: Path, count: int) -> bool:
    """Whether a file of so many images is there, and as long as their shapes say."""
    try:
        shapes = np.load(file.with_suffix(".npy"), allow_pickle=False)
        return shapes.shape == (count, 3) and file.stat().st_size == shapes.prod(axis=1, dtype=np.int64).sum()
    except (OSError, ValueError, EOFError):
        return False


class _Reader(Dataset):
    """Images as they are stored; one that can't be read comes as its `UserError`."""

    def __init__(self, paths: Sequence[str], transform: transforms.Transform, exif_orientation: bool):
        self.paths, self.transform, self.exif_orientation = paths, transform, exif_orientation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, idx: int) -> np.ndarray | UserError:
        try:
            image = self.transform(transforms.load_image(self.paths[idx], self.exif_orientation))
        except UserError as error:
            return error
        return image.permute(1, 2, 0).contiguous().numpy()


def refuse_full_disk(folder: Path, read: _Reader) -> None:
    """Refuses to store images for which there is no room, by the mean size of some of them.

    Raises:
        UserError: there is none.
    """
    some = [read[idx] for idx in np.linspace(0, len(read) - 1, min(PROBED, len(read)), dtype=int)]
    sizes = [image.nbytes for image in some if isinstance(image, np.ndarray)]
    needed, free = np.mean(sizes or [0]) * len(read) / 2**30, shutil.disk_usage(folder).free / 2**30
    if needed > free:
        raise UserError(
            f"--cache_path {folder} has {free:.2f} GiB free, and {len(read)} decoded images take about {needed:.2f}: "
            "give another folder, or drop --cache_images"
        )
    notice(f"{len(read)} decoded images are stored in {folder}, about {needed:.2f} GiB, which later runs read")


def write(file: Path, batches: DataLoader) -> None:
    """Writes images one after the other, and their shapes, `(N, 3)`, beside them.

    Raises:
        UserError: an image can't be read, or a file can't be written.
    """
    shapes: list[tuple[int, ...]] = []
    with atomic_write(file) as beside, open(beside, "wb") as pixels:
        for batch in Progress(batches, "storing images"):
            for image in batch:
                if isinstance(image, UserError):
                    raise image
                pixels.write(image.tobytes())
                shapes.append(image.shape)
        with atomic_write(file.with_suffix(".npy")) as shapes_beside, open(shapes_beside, "wb") as table:
            np.save(table, np.array(shapes, np.int64))
