# PYTHON_ARGCOMPLETE_OK
"""What is wrong with a dataset's images, and its splits as a CSV file that others can use.

Read every image, and look for damaged files and for duplicates:
    python check.py cub200
    python check.py cub200 --run Training_Results/cub200/my_run
Write which image is for what, of any split scheme, by the command split (see check.py split --help):
    python check.py split cub200 --split_scheme cross_validation --fold 0 --out Datasets/cub200/fold_0.csv
"""

from __future__ import annotations

import os

if __name__ == "__main__" and "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
    import completion

    completion.complete("check")

import argparse
import hashlib
import itertools
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import auxiliaries
import config
import datasets
import inference
import report
import transforms
from auxiliaries import FlagParser, Progress, UserError, counted, notice, number, shown

if TYPE_CHECKING:
    from PIL import Image

AT_ONCE = 64  # images that a worker reads before it hands them over
USUAL_MODES = ("RGB", "L")
HASH_BITS = 64
MOST_NEAR = 10  # bits in which near duplicates may differ
MOST_COMPARED = 200_000  # hashes, each with each
SMALL_SIDE = 16  # px, of the small versions of two images that are compared where their hashes are alike
LEAST_CORRELATION = 0.95  # of gray ones, for near duplicates: line drawings of different things may have the same hash
LEAST_COLOR = 4  # levels of 256 by which the channels of an image with colors differ from their mean
NEIGHBORS = 16  # of each image, among which embeddings find its near duplicates
MOST_PRINTED = 5  # examples of a kind
MOST_ON_PAGE = 2000  # pairs, of which the page shows as many as fit


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of a check."""
    # fmt: off
    add = parser.add_argument_group("check", stored=False).add_argument
    add("--out", type=auxiliaries.user_path, metavar="FOLDER",
        help="folder of what is found (default: Training_Results/check_NAME)")
    add("--near", type=number(int, 0, below=MOST_NEAR + 1), default=4, metavar="BITS",
        help=f"near duplicates are images whose perceptual hashes differ in at most so many of {HASH_BITS} bits; 0: in "
        f"none, {MOST_NEAR}: also images that only resemble each other")
    add("--run", type=auxiliaries.user_path, metavar="FOLDER",
        help="a run whose network finds further near duplicates, across splits and classes")
    add("--near_distance", type=number(float, 0), default=0.1, metavar="D",
        help="--run: near duplicates are images whose embeddings, scaled to length 1, are at most so far apart")
    add("--min_side", type=number(int, 0), default=32, metavar="PX",
        help="images with a shorter side than this are reported as tiny")
    add("--exif_orientation", action="switch", help="turn images as their EXIF data say, before crop boxes are cut out")
    add("--kernels", type=number(int, 0), help="processes that read images (default: one per core)")
    # fmt: on


def build_parser(prog: str, add_own: Callable[[FlagParser], None]) -> FlagParser:
    """The parser of one of the commands: its own flags, and those of main.py that say what is for what."""
    usage = None if prog.endswith("split") else f"{prog} [flags] NAME\n       {prog} split [flags] NAME"
    parser = FlagParser(prog=prog, usage=usage, description=__doc__, known_elsewhere=config.KNOWN_ELSEWHERE)
    parser.add_argument("dataset", metavar="NAME", help="what main.py takes as --dataset")
    add_own(parser)
    datasets.add_source_arguments(parser.add_argument_group("data"))
    datasets.add_protocol_arguments(parser)
    return parser


def resolve(parser: FlagParser, own: argparse.Namespace, default_fold: int | None = None) -> argparse.Namespace:
    """The resolved flags of main.py that a command's flags stand for.

    Args:
        parser: of the command.
        own: its flags.
        default_fold: the fold to take where none is named.

    Raises:
        UserError: they contradict each other, or no fold is named.
    """
    of_main = [name for name in parser.names_with(stored=True) if getattr(own, name) != parser.get_default(name)]
    given = {"dataset": own.dataset, **{name: getattr(own, name) for name in of_main}}
    if own.split_scheme != "predefined" and own.fold is None:
        if default_fold is None:
            raise UserError(f"--split_scheme {own.split_scheme} has folds: say which with --fold, counted from 0")
        given["fold"] = default_fold
    layered = {**dict.fromkeys(config.build_parser().traits, auxiliaries.UNSET), **given}
    opt = config.complete(layered, given)
    config.refuse_unused(opt, given)
    return config.resolve(opt)


# The images


@dataclass(frozen=True)
class Inventory:
    """All images of a dataset, each once.

    Attributes:
        paths: N images.
        labels: `(N,)` their classes.
        splits: `(N,)` 0 for training, 1 for validation, 2 for testing.
        class_names: what labels stand for.
    """

    paths: Sequence[str]
    labels: np.ndarray
    splits: np.ndarray
    class_names: Sequence[str]

    def group_keys(self) -> np.ndarray:
        """`(N,)` numbers that are the same for images of one class in one split."""
        return self.splits * len(self.class_names) + self.labels

    def describe(self, i: int) -> str:
        """An image with its class and split, in words."""
        path = datasets.printable(self.paths[i])
        return f"{path} ({self.class_names[self.labels[i]]}, {datasets.PARTS[self.splits[i]]})"

    def subset(self, chosen: np.ndarray) -> Inventory:
        """The images at some positions."""
        return Inventory([self.paths[i] for i in chosen], self.labels[chosen], self.splits[chosen], self.class_names)


def list_images(splits: datasets.Splits) -> Inventory:
    """All images of splits; one that is in several counts for the first of them."""
    first: dict[str, tuple[int, int]] = {}
    evaluated = [(part, sets) for part, sets in ((1, splits.val), (2, splits.test))]
    parts = [(part, images) for part, sets in evaluated for one in sets for images in (one.query, one.gallery)]
    for part, images in [(0, splits.train), *parts]:
        for path, label in zip(images.paths, images.labels[:, 0].tolist()) if images else []:
            first.setdefault(path, (label, part))
    labels, of_split = np.array(list(first.values()), dtype=np.int64).T
    return Inventory(list(first), labels, of_split, splits.train.class_names[0])


@dataclass(frozen=True)
class Reading:
    """What is known of an image once it is read.

    Attributes:
        mode: Pillow's name for the kind of its pixels.
        size: width and height, px.
        content: a digest of the file, and of the crop box, if there is one.
        pixels: a digest of the pixels.
        hash: the perceptual hash.
        small: `(SMALL_SIDE²,)` float32, the pixels of a small gray version, with mean 0 and length 1.
        colors: `(3 (SMALL_SIDE / 2)²,)` float32, of a still smaller version how the channels of each pixel differ from
            their mean, with length 1; 0 where it is gray.
    """

    mode: str
    size: tuple[int, int]
    content: bytes
    pixels: bytes
    hash: int
    small: np.ndarray
    colors: np.ndarray

    @property
    def hue(self) -> int:
        """The channel that stands out, 0 to 2; 3: none."""
        return int(self.colors.reshape(-1, 3).sum(axis=0).argmax()) if self.colors.any() else 3

    def resembles(self, other: Reading) -> bool:
        """Whether two small versions are alike: the gray ones, and their colors not opposed, such as red and blue."""
        return bool(self.small @ other.small >= LEAST_CORRELATION and self.colors @ other.colors >= 0)


class Reader(Dataset):
    """Images, each as its `Reading`, or as its `UserError`."""

    def __init__(self, paths: Sequence[str], exif_orientation: bool = False):
        self.paths, self.exif_orientation = paths, exif_orientation

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, idx: int) -> Reading | UserError:
        from PIL import Image

        try:
            pixels = transforms.load_image(self.paths[idx], self.exif_orientation).permute(1, 2, 0).contiguous().numpy()
        except UserError as error:
            return error
        file, box = transforms.split_box(self.paths[idx])
        content = hashlib.sha256(Path(file).read_bytes())
        content.update(repr(box).encode())
        with Image.open(file) as opened:
            mode = opened.mode
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(f"{width} {height} ".encode())
        digest.update(pixels.data)
        image = Image.fromarray(pixels)
        hashed, small = perceptual_hash(image), image.resize((SMALL_SIDE, SMALL_SIDE))
        seen = (hashed, gray_version(small), color_version(small))
        return Reading(mode, (width, height), content.digest(), digest.digest(), *seen)


def perceptual_hash(image: Image.Image) -> int:
    """The perceptual hash of an image: 64 bits, few of which change with its size or compression."""
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


def gray_version(small: Image.Image) -> np.ndarray:
    """The gray version of a small image `(SMALL_SIDE²,)`, scaled so that products of two are correlations.

    That of an image without any contrast is constant, and has a correlation of 1 with another such image alone.
    """
    pixels = np.asarray(small.convert("L"), dtype=np.float32).reshape(-1)
    if pixels.max() - pixels.min() < 2:
        return np.full(len(pixels), 1 / SMALL_SIDE, np.float32)
    pixels -= pixels.mean()
    return pixels / np.linalg.norm(pixels)


def color_version(small: Image.Image) -> np.ndarray:
    """The colors of a small image, see `Reading`: products of two are below 0 where most colors are opposed."""
    pixels = np.asarray(small.reduce(2), dtype=np.float32)  # (SMALL_SIDE / 2, SMALL_SIDE / 2, 3)
    colors = (pixels - pixels.mean(axis=2, keepdims=True)).reshape(-1)
    length = np.linalg.norm(colors)
    return colors / length if length >= LEAST_COLOR * len(colors) ** 0.5 else np.zeros_like(colors)


def read_images(paths: Sequence[str], num_workers: int, exif_orientation: bool = False) -> list[Reading | UserError]:
    """Reads all images, in parallel and with a bar."""
    reader = Reader(paths, exif_orientation)
    batches = DataLoader(reader, AT_ONCE, num_workers=num_workers, collate_fn=list, generator=torch.Generator())
    return [reading for batch in Progress(batches, f"reading {counted(len(paths), 'image')}") for reading in batch]


# Duplicates


@dataclass(frozen=True)
class Pair:
    """Two images that are the same, or nearly so.

    Attributes:
        i: the position of one.
        j: the position of the other, which is larger.
        what: what they have in common.
        distance: 0 for duplicates; larger ones are shown later.
    """

    i: int
    j: int
    what: str
    distance: float


def link(groups: np.ndarray, keys: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of images of one group, fewer than there are images: each with the first one that has another key, if any.

    Args:
        groups: `(N,)` the group of each image.
        keys: `(N,)` integers.
    """
    pairs: set[tuple[int, int]] = set()
    classes, sizes = np.unique(groups, return_counts=True)
    chosen = np.flatnonzero(np.isin(groups, classes[sizes > 1]))
    for members in datasets.members_of_classes(groups[chosen]) if len(chosen) else []:
        images = chosen[members]
        pairs |= _link_sets(images, images, keys)
    return sorted(pairs)


def _link_sets(images: np.ndarray, others: np.ndarray, keys: np.ndarray) -> set[tuple[int, int]]:
    """Each of the images with the first of the others that has another key, if any, or else with the first of them."""
    first = others[0]
    differing = others[keys[others] != keys[first]]
    pairs = set()
    for image in images.tolist():
        partner = first if keys[image] != keys[first] or not len(differing) else differing[0]
        if image != partner:
            pairs.add((min(image, int(partner)), max(image, int(partner))))
    return pairs


def near_hashes(hashes: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of different hashes that differ in at most so many bits.

    Up to `MOST_COMPARED` hashes are all compared with each other, which takes seconds. More are cut into one piece more
    than bits, of which such a pair has one in common: only those that share a piece are compared.

    Args:
        hashes: `(U,)` uint64, each once.
        bits: at most `MOST_NEAR`.

    Returns:
        Positions `(P,)` of one hash and of the other, which is larger, and `(P,)` numbers of bits.
    """
    import faiss

    if bits == 0 or len(hashes) < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    codes = hashes.astype(">u8").view(np.uint8).reshape(-1, HASH_BITS // 8)  # (U, 8)
    index: Any = faiss.IndexBinaryFlat(HASH_BITS)
    if len(hashes) > MOST_COMPARED:
        index = faiss.IndexBinaryMultiHash(HASH_BITS, bits + 1, HASH_BITS // (bits + 1))
    index.add(codes)
    limits, distances, found = index.range_search(codes, bits + 1)  # below that radius
    limits = np.asarray(limits, np.int64)
    one = np.repeat(np.arange(len(hashes)), limits[1:] - limits[:-1])
    is_pair = one < found
    return one[is_pair], found[is_pair], distances[is_pair].astype(np.int64)


def near_pairs(hashes: np.ndarray, hues: np.ndarray, keys: np.ndarray, bits: int) -> list[tuple[int, int, int]]:
    """Pairs of images whose hashes differ in at most so many bits, with that number; of many alike only some.

    Args:
        hashes: `(N,)` uint64.
        hues: `(N,)` integers: an image gets partners of each, since those of another one may prove to differ.
        keys: `(N,)` integers: partners with other ones are preferred.
        bits: at most `MOST_NEAR`.
    """
    different, of_hash = np.unique(hashes, return_inverse=True)
    _, groups = np.unique(of_hash * (hues.max() + 1) + hues, return_inverse=True)
    pairs = dict.fromkeys(link(groups, keys), 0)
    members: list[list[np.ndarray]] = [[] for _ in different]  # of each hash, by hue
    for images in datasets.members_of_classes(groups):
        members[of_hash[images[0]]].append(images)
    near = [(u, u, 0) for u, parts in enumerate(members) if len(parts) > 1]
    near.extend(zip(*(column.tolist() for column in near_hashes(different, bits))))
    for u, v, distance in near:
        for one, other in itertools.product(members[u], members[v]):
            if one is not other:
                linked = _link_sets(one, other, keys) | _link_sets(other, one, keys)
                pairs.update(dict.fromkeys(linked, distance))
    return [(i, j, distance) for (i, j), distance in pairs.items()]


def near_embeddings(embeddings: np.ndarray, keys: np.ndarray, distance: float) -> list[tuple[int, int, float]]:
    """Pairs of images with different keys whose embeddings are near each other, with their distances.

    Of each image only the `NEIGHBORS` nearest ones are looked at.

    Args:
        embeddings: `(N, D)`.
        keys: `(N,)` integers.
        distance: the largest, between embeddings that are scaled to length 1.
    """
    import faiss

    points = np.ascontiguousarray(embeddings, dtype=np.float32)
    faiss.normalize_L2(points)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    squared, found = index.search(points, min(NEIGHBORS, len(points)))
    one = np.repeat(np.arange(len(points)), found.shape[1])
    other, apart = found.reshape(-1), np.sqrt(np.maximum(squared.reshape(-1), 0))
    is_pair = (apart <= distance) & (keys[one] != keys[other])
    pairs = {(min(i, j), max(i, j)): d for i, j, d in zip(*(part[is_pair].tolist() for part in (one, other, apart)))}
    return [(i, j, d) for (i, j), d in pairs.items()]


def find_pairs(images: Inventory, readings: Sequence[Reading], bits: int) -> list[Pair]:
    """Duplicates, and near duplicates by perceptual hashes."""
    keys = images.group_keys()
    _, pixels = np.unique([reading.pixels for reading in readings], return_inverse=True)
    pairs = []
    for i, j in link(pixels, keys):
        is_same = readings[i].content == readings[j].content
        pairs.append(Pair(i, j, "same file content" if is_same else "same pixels", 0))
    hashes = np.array([reading.hash for reading in readings], dtype=np.uint64)
    hues = np.array([reading.hue for reading in readings], dtype=np.int64)
    for i, j, distance in near_pairs(hashes, hues, keys, bits):
        if pixels[i] != pixels[j] and readings[i].resembles(readings[j]):
            pairs.append(Pair(i, j, f"perceptual hashes differ in {distance} bits", 1 + distance))
    return pairs


def is_exact(pair: Pair) -> bool:
    """Whether two images have the same pixels."""
    return pair.distance == 0


def choose_excluded(images: Inventory, readings: Sequence[Reading], pairs: Sequence[Pair]) -> dict[int, str]:
    """Which images to leave out, and why: of each set of duplicates all but one, and of near duplicates across splits
    or classes one of two. Training images go first, so that what is evaluated stays.

    Args:
        images: N images.
        readings: of each of them.
        pairs: near duplicates among them, and others.
    """

    def order(i: int) -> tuple[bool, int]:
        return bool(images.splits[i] == 0), i  # what comes first stays

    excluded: dict[int, str] = {}
    _, groups = np.unique([reading.pixels for reading in readings], return_inverse=True)
    for members in datasets.members_of_classes(groups):
        kept, *others = sorted(members.tolist(), key=order)
        excluded.update(dict.fromkeys(others, f"same pixels as {images.describe(kept)}"))
    keys = images.group_keys()
    for pair in sorted(pairs, key=lambda pair: pair.distance):
        if keys[pair.i] != keys[pair.j] and not {pair.i, pair.j} & excluded.keys():
            kept, other = sorted((pair.i, pair.j), key=order)
            excluded[other] = f"{pair.what} from {images.describe(kept)}"
    return excluded


# Reporting


@dataclass(frozen=True)
class Findings:
    """What a check finds.

    Attributes:
        images: those that can be read, in order.
        readings: of each of them.
        errors: why others can't be read, by path.
        pairs: duplicates and near duplicates among the images, those across splits or classes first.
        excluded: images to leave out, by path, and why.
    """

    images: Inventory
    readings: Sequence[Reading]
    errors: dict[str, UserError]
    pairs: Sequence[Pair]
    excluded: dict[str, str]

    def is_across(self, pair: Pair, groups: np.ndarray) -> bool:
        """Whether the images of a pair are in different groups, such as `images.splits` or `images.labels`."""
        return bool(groups[pair.i] != groups[pair.j])


def inspect_images(whole: Inventory, own: argparse.Namespace) -> Findings:
    """Reads all images, and looks for what is wrong with them, as a check's flags say.

    Raises:
        UserError: the run can't be used, or no image can be read.
    """
    workers = auxiliaries.cpu_cores() if own.kernels is None else own.kernels
    model = None if own.run is None else inference.load(own.run)
    results = read_images(whole.paths, workers, own.exif_orientation)
    errors = {path: result for path, result in zip(whole.paths, results) if isinstance(result, UserError)}
    readings = [result for result in results if isinstance(result, Reading)]
    if not readings:
        raise UserError(f"none of {len(whole.paths)} images can be read, of which the first is: {results[0]}")
    images = whole.subset(np.array([i for i, result in enumerate(results) if isinstance(result, Reading)]))
    pairs = find_pairs(images, readings, own.near)
    if model is not None:
        known = {(pair.i, pair.j) for pair in pairs}
        embeddings = model.embed(images.paths).numpy()
        for i, j, distance in near_embeddings(embeddings, images.group_keys(), own.near_distance):
            if (i, j) not in known:
                pairs.append(Pair(i, j, f"embeddings are {distance:.3f} apart", 2 + HASH_BITS + distance))
    keys = images.group_keys()
    pairs.sort(key=lambda pair: (keys[pair.i] == keys[pair.j], pair.distance, pair.i, pair.j))
    chosen = {images.paths[i]: why for i, why in choose_excluded(images, readings, pairs).items()}
    unreadable = dict.fromkeys(errors, "can't be read")
    return Findings(images, readings, errors, pairs, {**unreadable, **chosen})


def list_problems(found: Findings, min_side: int) -> list[tuple[str, str, str]]:
    """What is odd about single images: path, kind of the problem, and what is known of it."""
    problems = [(path, "can't be read", str(error)) for path, error in found.errors.items()]
    for path, reading in zip(found.images.paths, found.readings):
        if min(reading.size) < min_side:
            problems.append((path, "tiny", "{} × {} px".format(*reading.size)))
        if reading.mode not in USUAL_MODES:
            problems.append((path, "unusual mode", reading.mode))
    return problems


def print_findings(dataset: str, whole: Inventory, found: Findings, problems: Sequence[tuple[str, str, str]]) -> None:
    """Prints what a check finds, with a few examples."""
    sizes = np.bincount(whole.labels)
    sizes = sizes[sizes > 0]
    parts = [
        f"{name} {(whole.splits == split).sum():,} of {len(np.unique(whole.labels[whole.splits == split]))}"
        for split, name in enumerate(datasets.PARTS)
        if (whole.splits == split).any()
    ]
    print(f"{dataset}: {len(whole.paths):,} images of {len(sizes)} classes ({', '.join(parts)})")
    few = f"of one image: {(sizes == 1).sum()}"
    print(f"classes: {sizes.min()} to {counted(sizes.max(), 'image')}, median {np.median(sizes):g}; {few}")
    sides = [min(reading.size) for reading in found.readings]
    modes = Counter(reading.mode for reading in found.readings).most_common()
    print(f"shorter sides: {min(sides)} to {max(sides)} px, median {np.median(sides):g}", end="; ")
    print(f"modes: {', '.join(f'{mode} {count:,}' for mode, count in modes)}")
    for kind in ("can't be read", "tiny", "unusual mode"):
        of_kind = [(path, detail) for path, what, detail in problems if what == kind]
        examples = "; ".join(
            detail if kind == "can't be read" else f"{path} ({detail})" for path, detail in of_kind[:1]
        )
        print(f"{kind}: {len(of_kind)}{f', such as {examples}' if examples else ''}")
    print_pairs(found)
    note_torn_images(whole)


def note_torn_images(images: Inventory) -> None:
    """A notice where parts of one image, or an image and its parts, are in several splits."""
    splits_of: dict[str, set[int]] = {}
    for path, split in zip(images.paths, images.splits.tolist()):
        splits_of.setdefault(transforms.split_box(path)[0], set()).add(split)
    torn = [file for file, found in splits_of.items() if len(found) > 1]
    if torn:
        what = f"{counted(len(torn), 'image')} with parts in several splits, such as {datasets.printable(torn[0])}"
        notice(f"{what}: parts of one image share its light and surroundings, so put them into one split")


def print_pairs(found: Findings) -> None:
    """Prints how many duplicates there are of each kind, and which classes have most of them in common."""
    images = found.images
    kinds: dict[str, Callable[[Pair], bool]] = {
        "duplicates": is_exact,
        "near duplicates by perceptual hashes": lambda pair: pair.what.startswith("perceptual"),
        "near duplicates by embeddings": lambda pair: pair.what.startswith("embeddings"),
    }
    for kind, is_of_kind in kinds.items():
        pairs = [pair for pair in found.pairs if is_of_kind(pair)]
        if not pairs and kind.endswith("embeddings"):
            continue
        across = [sum(found.is_across(pair, groups) for pair in pairs) for groups in (images.splits, images.labels)]
        print(f"{kind}: {counted(len(pairs), 'pair')}, {across[0]} across splits and {across[1]} across classes")
        for pair in pairs[:MOST_PRINTED]:
            print(f"    {images.describe(pair.i)} and {images.describe(pair.j)}: {pair.what}")
    torn = [pair for pair in found.pairs if found.is_across(pair, images.labels)]
    between = Counter(tuple(sorted((images.labels[pair.i], images.labels[pair.j]))) for pair in torn)
    if between:
        print("classes with most of them in common:")
    for (one, other), count in between.most_common(MOST_PRINTED):
        print(f"    {shown(images.class_names[one])} and {shown(images.class_names[other])}: {counted(count, 'pair')}")


def refuse_unwritable(folder: Path) -> None:
    """Makes sure, before all images are read, that a folder can be made and written to.

    Raises:
        UserError: it can't.
    """
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{place} is not a folder that can be written to: choose another --out")


def save_findings(
    folder: Path, opt: argparse.Namespace, whole: Inventory, found: Findings, problems: Sequence[tuple[str, str, str]]
) -> None:
    """Writes what a check finds: a page of pairs, images to leave out, problems, and the sizes of classes.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made ({error.strerror}): {auxiliaries.disk_advice(error)}") from None
    root = datasets.image_folder(opt.dataset, opt.source_path)

    def save(name: str, columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> None:
        names = {row: datasets.printable(row[0]) for row in rows}
        odd = [name for row, name in names.items() if row[0] != name]
        if odd:
            few = f"{counted(len(odd), 'image')} not named in UTF-8, such as {odd[0]}"
            notice(f"{folder / name} lacks {few}: rename such files, and check again")
        held = [row for row, name in names.items() if row[0] == name]
        datasets.save_image_table(folder / name, columns, held, root)

    save("exclude.csv", ("reason",), found.excluded.items())
    save("problems.csv", ("problem", "detail"), problems)
    sizes = Counter(zip(whole.labels.tolist(), whole.splits.tolist()))
    rows = sorted((count, whole.class_names[label], datasets.PARTS[split]) for (label, split), count in sizes.items())
    datasets.save_table(folder / "classes.csv", ("class", "split", "images"), ((name, s, n) for n, name, s in rows))
    images, page = found.images, folder / "pairs.html"
    if not found.pairs:
        auxiliaries.remove_file(page)  # of an earlier check
        return
    shown_pairs = []
    for pair in found.pairs[:MOST_ON_PAGE]:
        sides = " | ".join(
            f"{images.class_names[images.labels[i]]}, {datasets.PARTS[images.splits[i]]}" for i in (pair.i, pair.j)
        )
        shown_pairs.append((images.paths[pair.i], images.paths[pair.j], f"{sides}: {pair.what}"))
    intro = (
        f"{counted(len(found.pairs), 'pair')} of images that are the same or nearly so, those across splits or classes "
        f"first. {folder / 'exclude.csv'} lists {counted(len(found.excluded), 'image')} to leave out: remove the rows "
        "of those that stay."
    )
    report.save_pairs_page(page, f"Duplicates in {opt.dataset}", intro, shown_pairs, opt.exif_orientation)


def check(argv: Sequence[str]) -> Findings:
    """Reads all images of a dataset, and prints and writes what is wrong with them.

    Raises:
        UserError: what the user can fix.
    """
    parser = build_parser("check.py", add_arguments)
    own = parser.parse_args(argv)
    if own.run is None and own.near_distance != parser.get_default("near_distance"):
        raise UserError("--near_distance does nothing without --run: add that, or drop it")
    opt = resolve(parser, own, default_fold=0)
    opt = config.with_flags(opt, exif_orientation=own.exif_orientation)
    folder = Path(own.out or Path("Training_Results") / f"check_{opt.dataset}")
    refuse_unwritable(folder)
    whole = list_images(datasets.give_splits(opt))
    found = inspect_images(whole, own)
    problems = list_problems(found, own.min_side)
    print_findings(opt.dataset, whole, found, problems)
    save_findings(folder, opt, whole, found, problems)
    page = f"the pairs: {folder / 'pairs.html'}; " if found.pairs else ""
    print(f"{page}all else: {folder}")
    if found.excluded:
        excluded = shlex.quote(str(folder / "exclude.csv"))
        print(f"leave out {counted(len(found.excluded), 'image')}: --exclude {excluded}")
    return found


# Splits as a file


def add_split_arguments(parser: FlagParser) -> None:
    """Declares the flag of writing splits."""
    # fmt: off
    add = parser.add_argument_group("split", stored=False).add_argument
    add("--out", type=auxiliaries.user_path, metavar="FILE.csv", required=True,
        help="file to write; in the folder of the images, or above it, it has relative paths, so that it can be shared")
    # fmt: on


def split(argv: Sequence[str]) -> None:
    """Writes which images are for training, validation and testing to a CSV file that `--dataset` reads back.

    Raises:
        UserError: what the user can fix.
    """
    parser = build_parser("check.py split", add_split_arguments)
    own = parser.parse_args(argv)
    file = Path(own.out)
    if file.suffix.lower() != ".csv":
        raise UserError(f"--out {file} must end in .csv, by which --dataset knows such a file")
    if file.exists():
        raise UserError(f"--out {file} exists: move it away, or choose another name")
    opt = resolve(parser, own)
    splits = datasets.give_splits(opt)
    count = datasets.write_csv_splits(file, splits)
    parts = ", ".join(f"{name} {len(part):,} of {part.num_classes()} classes" for name, part in splits.named_sets())
    fold = "" if opt.fold is None else f", fold {opt.fold} of {opt.split_scheme}"
    print(f"{file}: {count:,} images of {opt.dataset}{fold} ({parts})")
    root = datasets.image_folder(opt.dataset, opt.source_path)
    if file.absolute().parent not in (root.absolute(), *root.absolute().parents):
        notice(f"{file} names images by absolute paths: to share it, write it into {root}")
    print(shlex.join(["python", "main.py", "--dataset", str(file), *differing_defaults(opt.dataset)]))


def differing_defaults(dataset: str) -> list[str]:
    """The flags that are what a dataset's own defaults are, where those of a CSV file are others."""
    spec, usual = datasets.find_spec(dataset), datasets.find_spec("any.csv")
    flags = [] if spec.k_vals == usual.k_vals else ["--k_vals", *map(str, spec.k_vals)]
    flags += [] if spec.crop_scale == usual.crop_scale else ["--crop_scale", f"{spec.crop_scale:g}"]
    return [*flags, *([] if spec.flip == usual.flip else ["--flip" if spec.flip else "--no-flip"])]


def command(argv: Sequence[str]) -> None:
    """Does what a command line asks for.

    Raises:
        UserError: what the user can fix.
    """
    if argv[:1] == ["split"]:
        split(argv[1:])
    else:
        check(argv)


if __name__ == "__main__":
    auxiliaries.run_command(lambda: command(sys.argv[1:]))
