"""Where images are, which class belongs to which split, and what forms a batch.

A data set is a function `root -> Splits` and its row in `DATASETS`; a folder of `images/<class>/*` needs neither.
What makes a batch is a function in `BATCH_SAMPLERS`, called by `BaseTripletDataset`.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import secrets
import shutil
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy.io import loadmat
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets.utils import download_url, extract_archive
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from auxiliaries import UserError, cpu_cores, nearest_name, notice, number, seeded

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of data and batches."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="cub200",
        metavar="NAME",
        help=f"{', '.join(DATASETS)}, or any folder <source_path>/NAME/images/<class>/*",
    )
    group.add_argument("--source_path", default="Datasets", help="folder of the data sets")
    group.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="fetch the data set first if it is missing",
    )
    group.add_argument("--download_url", metavar="URL", help="with --download: the address of a folder of the archives")
    group.add_argument("--kernels", type=number(int, 0), default=8, help="data-loading workers, at most one a core")
    group.add_argument("--bs", type=number(int, 1), default=112, help="images a training batch")
    group.add_argument("--eval_bs", type=number(int, 1), help="images a batch in evaluation (default: --bs)")
    group.add_argument(
        "--samples_per_class",
        type=number(int, 1),
        help="images of each class in a batch; 1: no constraint (default: by the loss, 4 or 1)",
    )
    group.add_argument(
        "--batch_sampler",
        choices=BATCH_SAMPLERS,
        help="what forms a batch (default: shuffled with --samples_per_class 1, else class_balanced)",
    )
    group.add_argument("--iterations_per_epoch", type=number(int, 1), help="batches an epoch (default: images // bs)")
    group.add_argument("--crop_size", type=number(int, 1), help="side of the network's input, px (default: by --arch)")
    group.add_argument(
        "--resize",
        type=number(int, 1),
        help="shorter side of a test image before its centre crop, px (default: by --arch and --crop_size)",
    )

    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--split_scheme",
        choices=SPLIT_SCHEMES,
        default="predefined",
        help="predefined: the literature's training and test images; cross_validation: test classes are set aside, the "
        "others divided into partitions, each of which validates a fold that trains on the rest",
    )
    group.add_argument(
        "--test_size",
        type=number(float, 0, exclusive=True, below=1),
        default=0.5,
        help="cross_validation: share of the classes that test",
    )
    group.add_argument(
        "--test_start_idx",
        type=number(float, 0, below=1),
        default=0.5,
        help="cross_validation: where the test classes begin among the sorted classes, as a share of them",
    )
    group.add_argument(
        "--num_training_partitions",
        type=number(int, 2),
        default=4,
        help="cross_validation: partitions of the other classes",
    )
    group.add_argument(
        "--num_training_sets",
        type=number(int, 1),
        help="cross_validation: how many folds are run (default: 4, or as many as there are partitions)",
    )
    group.add_argument("--fold", type=number(int, 0), help="cross_validation: run this fold only, counted from 0")
    group.add_argument(
        "--label_hierarchy_level",
        type=number(int, 0),
        default=0,
        help="level of the labels to train and evaluate on: 0 the finest; coarser ones where a data set has them",
    )


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        paths: N image files.
        labels: `(N, H)` int64, one column for each level of the label hierarchy, the finest first.
        class_names: for each level the names that its labels index; shared by all sets of a data set.
    """

    paths: Sequence[str]
    labels: np.ndarray
    class_names: Sequence[Sequence[str]]

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, chosen: np.ndarray) -> ImageSet:
        """The images that `chosen`, a mask `(N,)` or positions, picks."""
        positions = np.arange(len(self))[chosen]
        return ImageSet([self.paths[i] for i in positions], self.labels[positions], self.class_names)

    def at_level(self, level: int) -> ImageSet:
        """The same images without the levels finer than `level`."""
        return ImageSet(self.paths, self.labels[:, level:], self.class_names[level:])

    def num_classes(self) -> int:
        """How many classes of the finest level occur."""
        return len(np.unique(self.labels[:, 0]))


@dataclass(frozen=True)
class RetrievalSet:
    """Queries and the gallery in which their class is looked for; without a gallery it is the queries themselves."""

    name: str
    query: ImageSet
    gallery: ImageSet | None = None

    def at_level(self, level: int) -> RetrievalSet:
        """The same images without the levels finer than `level`."""
        return RetrievalSet(self.name, self.query.at_level(level), self.gallery and self.gallery.at_level(level))


@dataclass(frozen=True)
class Splits:
    """The protocol of a data set. Labels mean the same class in all sets."""

    train: ImageSet
    val: Sequence[RetrievalSet] = ()
    test: Sequence[RetrievalSet] = ()

    def at_level(self, level: int) -> Splits:
        """The same images without the levels finer than `level`.

        Raises:
            UserError: the labels have no such level.
        """
        levels = len(self.train.class_names)
        if level >= levels:
            raise UserError(
                f"--label_hierarchy_level {level} does not exist: the data set's labels have levels 0 to {levels - 1}"
            )
        val, test = ([chosen.at_level(level) for chosen in sets] for sets in (self.val, self.test))
        return Splits(self.train.at_level(level), val, test)


def make_image_set(paths: Sequence[str], *levels: Sequence[str], key: Callable[[str], Any] | None = None) -> ImageSet:
    """Numbers class names in sorted order and sorts the images by class and path.

    Args:
        paths: N image files.
        levels: for each label level, the finest first, the class name of every image.
        key: what the finest names are sorted by (default: the name).
    """
    columns, names = [], []
    for level, of_image in enumerate(levels):
        ordered = sorted(set(of_image), key=None if level else key)
        numbers = {name: label for label, name in enumerate(ordered)}
        columns.append(np.array([numbers[name] for name in of_image], dtype=np.int64))
        names.append(ordered)
    order = sorted(range(len(paths)), key=lambda i: (columns[0][i], paths[i]))
    return ImageSet([paths[i] for i in order], np.stack(columns, axis=1)[order], names)


def split_in_half(images: ImageSet) -> Splits:
    """Trains on the first half of the classes and tests on the others."""
    is_train = images.labels[:, 0] < len(images.class_names[0]) // 2
    return Splits(images.subset(is_train), test=[RetrievalSet("test", images.subset(~is_train))])


def split_by_part(
    paths: Sequence[str], parts: Sequence[str], *levels: Sequence[str], key: Callable[[str], Any] = str
) -> Splits:
    """Splits by a list: `train`, and either `query` with `gallery` or any other parts as test sets of their own."""
    images = make_image_set(paths, *levels, parts, key=key)
    part_of = images.labels[:, -1]
    images = ImageSet(images.paths, images.labels[:, :-1], images.class_names[:-1])
    by_part = {part: images.subset(part_of == number_) for number_, part in enumerate(sorted(set(parts)))}
    train = by_part.pop("train")
    if "gallery" in by_part:
        return Splits(train, test=[RetrievalSet("test", by_part["query"], by_part["gallery"])])
    return Splits(train, test=[RetrievalSet(part, by_part[part]) for part in dict.fromkeys(parts) if part != "train"])


def pool(splits: Splits) -> ImageSet:
    """All images of a data set, each once, sorted by class and path."""
    sets = [splits.train]
    for chosen in (*splits.val, *splits.test):
        sets += [chosen.query, *([chosen.gallery] if chosen.gallery else [])]
    label_of = {path: label for images in sets for path, label in zip(images.paths, images.labels)}
    paths = sorted(label_of, key=lambda path: (label_of[path][0], path))
    return ImageSet(paths, np.stack([label_of[path] for path in paths]), splits.train.class_names)


def class_disjoint_splits(
    images: ImageSet, fold: int, test_size: float, test_start_idx: float, num_training_partitions: int
) -> Splits:
    """One fold of cross-validation over classes of the finest level.

    Of the n sorted classes, test classes are int(n · start) … int(n · start) + int(n · size) - 1, modulo n. The others
    form partitions (`numpy.array_split`), of which number `fold` validates and the rest train. Every set is all against
    all.

    Args:
        images: all of them.
        fold: 0 … num_training_partitions - 1.
        test_size: share of the classes that test, in (0, 1).
        test_start_idx: where they begin, in [0, 1).
        num_training_partitions: number of partitions.

    Raises:
        UserError: a set gets fewer than two classes.
    """
    labels = images.labels[:, 0]
    classes = np.unique(labels)
    start, size = int(len(classes) * test_start_idx), int(len(classes) * test_size)
    test = classes[np.arange(start, start + size) % len(classes)]
    others = np.setdiff1d(classes, test)
    partitions = np.array_split(others, num_training_partitions)
    val, train = partitions[fold], np.concatenate([p for i, p in enumerate(partitions) if i != fold])
    for name, chosen in (("test", test), ("validation", min(partitions, key=len)), ("training", train)):
        if len(chosen) < 2:
            raise UserError(
                f"cross_validation leaves {len(chosen)} {name} class(es) of {len(classes)}, and needs two: change "
                "--test_size or --num_training_partitions"
            )
    assert len(train) + len(val) + len(test) == len(set(train) | set(val) | set(test)), "sets share classes"
    train_set, val_set, test_set = (images.subset(np.isin(labels, chosen)) for chosen in (train, val, test))
    return Splits(train_set, val=[RetrievalSet("val", val_set)], test=[RetrievalSet("test", test_set)])


SPLIT_SCHEMES: dict[str, Callable[[Splits, argparse.Namespace], Splits]] = {
    "predefined": lambda splits, opt: splits,
    "cross_validation": lambda splits, opt: class_disjoint_splits(
        pool(splits), opt.fold, opt.test_size, opt.test_start_idx, opt.num_training_partitions
    ),
}


def give_splits(opt: argparse.Namespace) -> Splits:
    """Which images train, validate and test, from the resolved flags.

    Raises:
        UserError: the data can't be read, or not be split as the flags say.
    """
    splits = read_splits(opt.dataset, opt.source_path, opt.download, opt.download_url)
    splits = SPLIT_SCHEMES[opt.split_scheme](splits, opt).at_level(opt.label_hierarchy_level)
    check_splits(opt.dataset, splits)
    if opt.testing_method == "WithSameParentLabel" and len(splits.train.class_names) < 2:
        raise UserError(
            "--testing_method WithSameParentLabel needs labels of a coarser level than those of "
            f"--label_hierarchy_level {opt.label_hierarchy_level}, which {opt.dataset} doesn't have: leave it out"
        )
    return splits


def by_number(name: str) -> tuple[int, str]:
    """Sorts names of digits as numbers."""
    return len(name), name


def find_layout(root: Path, *layouts: str) -> Path:
    """The first of the layouts, paths below `root`, that exists.

    Raises:
        UserError: none does.
    """
    for layout in layouts:
        if (root / layout).exists():
            return root / layout
    raise UserError(f"{root} has neither of {', '.join(layouts)}: Datasets/README.md shows the layouts")


def read_class_folders(folder: Path, key: Callable[[str], Any] | None = None) -> ImageSet:
    """Reads `folder/<class>/<image>`; classes are sorted by `key` of their name, images by theirs.

    Raises:
        UserError: a class folder without an image, or fewer than two classes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of class folders: Datasets/README.md shows the layouts")
    paths: list[str] = []
    classes: list[str] = []
    others: list[str] = []
    for class_folder in (entry for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."):
        files = [entry.path for entry in os.scandir(class_folder) if entry.is_file() and entry.name[0] != "."]
        images = [path for path in files if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
        others += set(files) - set(images)
        if not images:
            raise UserError(f"{class_folder.path} holds no image: add some or remove the folder")
        paths += images
        classes += [class_folder.name] * len(images)
    if others:
        notice(f"{len(others)} files under {folder} have no image's suffix and are left out, e.g. {min(others)}")
    if len(set(classes)) < 2:
        raise UserError(f"{folder} holds {len(set(classes))} class folder(s): at least two are needed")
    return make_image_set(paths, classes, key=key)


def read_table(path: Path, columns: Sequence[str], skip_lines: int = 0, header: bool = True) -> pd.DataFrame:
    """Reads a file of columns separated by runs of spaces, as strings.

    Raises:
        UserError: the file is missing or is no such table, or lacks a column or a value.
    """
    try:
        table = pd.read_csv(path, sep=r"\s+", dtype=str, skiprows=skip_lines, header=0 if header else None)
    except OSError as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise UserError(f"{path} {problem}: Datasets/README.md shows the layouts") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of {', '.join(columns)}: {str(error).strip()}") from None
    if not header and table.shape[1] == len(columns):
        table.columns = pd.Index(columns)
    if table.empty:
        raise UserError(f"{path} has no row below its header: complete it")
    for column in columns:
        if column not in table:
            raise UserError(f"{path} has no column {column}: it needs {', '.join(columns)}")
        if table[column].isna().any():
            row = int(table[column].isna().to_numpy().argmax()) + 1
            raise UserError(f"{path} lacks {column} in row {row} of its table")
    return table


def locate_images(folder: Path, names: Sequence[str], listed_in: Path) -> list[str]:
    """The paths of listed images; a name may differ from its file in upper and lower case.

    Raises:
        UserError: a listed image doesn't exist.
    """
    listings: dict[str, dict[str, str]] = {}
    paths = []
    for name in names:
        parent, file = os.path.split(name)
        if parent not in listings:
            below = folder / parent
            entries = os.listdir(below) if below.is_dir() else []
            listings[parent] = {**{entry.lower(): entry for entry in entries}, **{entry: entry for entry in entries}}
        actual = listings[parent].get(file) or listings[parent].get(file.lower())
        if actual is None:
            raise UserError(f"{folder / name}, listed in {listed_in}, does not exist: complete the images or the list")
        paths.append(os.path.join(folder, parent, actual))
    return paths


def read_cub200(root: Path) -> Splits:
    """CUB-200-2011: the first 100 classes, by the number in the folder's name, train."""
    folder = find_layout(root, "images", "CUB_200_2011/images")

    def class_number(name: str) -> tuple[int, str]:
        match = re.match(r"\d+", name)
        if not match:
            raise UserError(f"{folder / name} does not begin with a class number such as 001.Black_footed_Albatross")
        return int(match.group()), name

    return split_in_half(read_class_folders(folder, key=class_number))


def read_cars196(root: Path) -> Splits:
    """Cars196: the first 98 classes, by name, train."""
    if (root / "images").is_dir():
        return split_in_half(read_class_folders(root / "images"))
    find_layout(root, "images", "car_ims")
    info_file = root / "cars_annos.mat"
    if not info_file.is_file():
        raise UserError(f"{info_file} does not exist: Datasets/README.md shows the layouts")
    try:
        mat = loadmat(info_file, squeeze_me=True)
        names = [str(name) for name in np.atleast_1d(mat["class_names"])]
        rows = np.atleast_1d(mat["annotations"])
        images = [str(row["relative_im_path"]) for row in rows]
        classes = [names[int(row["class"]) - 1] for row in rows]
    except Exception as error:  # scipy raises anything at all on a damaged file
        raise UserError(f"{info_file} can't be read as Cars196's annotations ({error}): fetch it again") from None
    folder_names = [name.replace("/", "-") for name in classes]  # as the folders of the other layout are named
    return split_in_half(make_image_set(locate_images(root, images, info_file), folder_names))


def read_online_products(root: Path) -> Splits:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt; level 1 are the twelve super classes."""
    images, lists = root / "images", root / "Info_Files"
    if not images.is_dir():
        images = lists = find_layout(root, "images", "Stanford_Online_Products")
    tables = []
    for part in ("train", "test"):
        info_file = lists / f"Ebay_{part}.txt"
        table = read_table(info_file, ("image_id", "class_id", "super_class_id", "path"))
        tables.append(table.assign(part=part, file=locate_images(images, table["path"].tolist(), info_file)))
    rows = pd.concat(tables)
    super_classes = [os.path.dirname(path).removesuffix("_final") for path in rows["path"]]
    return split_by_part(
        rows["file"].tolist(), rows["part"].tolist(), rows["class_id"].tolist(), super_classes, key=by_number
    )


def read_in_shop(root: Path) -> Splits:
    """In-Shop Clothes Retrieval: queries look for their item in a gallery; level 1 are the categories."""
    info_file = find_layout(root, "Eval/list_eval_partition.txt", "list_eval_partition.txt")
    rows = read_table(info_file, ("image_name", "item_id", "evaluation_status"), skip_lines=1)
    with info_file.open(encoding="utf-8") as file:
        announced = file.readline().strip()
    if announced != str(len(rows)):
        notice(f"{info_file} announces {announced} rows and has {len(rows)}")
    parts, names = rows["evaluation_status"].tolist(), rows["image_name"].tolist()
    if set(parts) != {"train", "query", "gallery"}:
        raise UserError(f"{info_file} assigns {', '.join(sorted(set(parts)))}: it must assign train, query and gallery")
    files = locate_images(find_layout(root, "img", "Img/img").parent, names, info_file)
    categories = ["/".join(name.split("/")[1:3]) for name in names]
    return split_by_part(files, parts, rows["item_id"].tolist(), categories)


def read_vehicle_id(root: Path) -> Splits:
    """PKU VehicleID: three test sets of growing size, each all against all."""
    tables = []
    for part in ("train", "800", "1600", "2400"):
        info_file = root / "train_test_split" / ("train_list.txt" if part == "train" else f"test_list_{part}.txt")
        table = read_table(info_file, ("image_number", "class_id"), header=False)
        files = [f"{image.zfill(7)}.jpg" for image in table["image_number"]]
        tables.append(table.assign(part=part, file=locate_images(root / "image", files, info_file)))
    rows = pd.concat(tables)
    return split_by_part(rows["file"].tolist(), rows["part"].tolist(), rows["class_id"].tolist(), key=by_number)


GLYPH_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)


def read_glyphs(root: Path) -> Splits:
    """Characters rendered in sixteen fonts; level 1 are the scripts (LATIN, GREEK, CYRILLIC, …)."""
    if not (root / "images").is_dir():
        render_glyphs(root / "images")
    images = read_class_folders(root / "images", key=by_number)
    try:
        characters = [chr(int(name.removeprefix("U+"), 16)) for name in images.class_names[0]]
        scripts = [unicodedata.name(character).split()[0] for character in characters]
    except ValueError as error:
        raise UserError(f"{root / 'images'} holds a folder that is no character ({error}): remove {root}") from None
    finest = [images.class_names[0][label] for label in images.labels[:, 0]]
    coarser = [scripts[label] for label in images.labels[:, 0]]
    return split_in_half(make_image_set(images.paths, finest, coarser, key=by_number))


def render_glyphs(folder: Path) -> None:
    """Renders every letter, number, symbol and other punctuation mark that all `GLYPH_FONTS` have, 64 × 64 px.

    Writes `folder/U+0041/<font>.png`, black on white. A character that in any font looks exactly like one already kept
    (Latin A, Greek Alpha) is left out, since it would put training images into the test set.
    """
    files = {name: os.path.join(get_data_path(), "fonts", "ttf", f"{name}.ttf") for name in GLYPH_FONTS}
    fonts = {name: ImageFont.truetype(file, 44) for name, file in files.items()}
    shared = set.intersection(*(set(FT2Font(file).get_charmap()) for file in files.values()))
    drawable = [chr(code) for code in sorted(shared) if re.match("[LNS]|Po", unicodedata.category(chr(code)))]
    beside = folder.with_name(f".part-{secrets.token_hex(6)}-{folder.name}")
    seen: set[bytes] = set()
    kept = 0
    try:
        for character in drawable:
            renderings = {name: _render(character, font) for name, font in fonts.items()}
            pixels = {rendering.tobytes() for rendering in renderings.values()}
            if pixels & seen:
                continue
            seen |= pixels
            kept += 1
            class_folder = beside / f"U+{ord(character):04X}"
            class_folder.mkdir(parents=True)
            for name, rendering in renderings.items():
                rendering.save(class_folder / f"{name}.png")
        os.replace(beside, folder)
    except OSError as error:
        raise UserError(f"{folder} can't be rendered ({error.strerror}): choose another --source_path") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    notice(f"rendered {kept} characters in {len(fonts)} fonts into {folder}")


def _render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(image).text((32, 32), character, fill=0, font=font, anchor="mm")
    return image


@dataclass(frozen=True)
class Archive:
    """A file to download: its address (with --download_url only its name counts) and MD5."""

    url: str
    md5: str


@dataclass(frozen=True)
class Source:
    """A data set's row: how it is read, its default k, and what is known of it.

    Attributes:
        read: from the data set's folder to its splits.
        k_vals: the k of Recall @ k that its literature reports.
        counts: for `train`, each test set's name, or `query` and `gallery`: number of classes and of images.
        archives: what --download fetches and unpacks.
        licence: for data that must be asked for: where, and what to put into the folder.
        made_here: whether `read` makes the data itself when they are missing.
    """

    read: Callable[[Path], Splits]
    k_vals: tuple[int, ...] = (1, 2, 4, 8)
    counts: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()
    licence: str = ""
    made_here: bool = False


DATASETS: dict[str, Source] = {
    "cub200": Source(
        read_cub200,
        counts={"train": (100, 5864), "test": (100, 5924)},
        archives=(
            Archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
            ),
        ),
    ),
    "cars196": Source(
        read_cars196,
        counts={"train": (98, 8054), "test": (98, 8131)},
        archives=(  # their first host is gone: --download_url names another
            Archive("car_ims.tgz", "d5c8f0aa497503f355e17dc7886c3f14"),
            Archive("cars_annos.mat", "b407c6086d669747186bd1d764ff9dbc"),
        ),
    ),
    "online_products": Source(
        read_online_products,
        k_vals=(1, 10, 100, 1000),
        counts={"train": (11318, 59551), "test": (11316, 60502)},
        archives=(
            Archive("ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e"),
        ),
    ),
    "in-shop": Source(
        read_in_shop,
        k_vals=(1, 10, 20, 30, 50),
        counts={"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
        licence="ask the DeepFashion project of the Chinese University of Hong Kong for the In-shop Clothes Retrieval "
        "Benchmark and put img/ and Eval/list_eval_partition.txt there",
    ),
    "vehicle_id": Source(
        read_vehicle_id,
        k_vals=(1, 5),
        counts={"train": (13134, 110178), "800": (800, None), "1600": (1600, None), "2400": (2400, None)},
        licence="ask the National Engineering Laboratory for Video Technology of Peking University for PKU VehicleID "
        "and put image/ and train_test_split/ there",
    ),
    "glyphs": Source(read_glyphs, made_here=True),
}


def default_k_vals(dataset: str) -> tuple[int, ...]:
    """The k of Recall @ k that are reported for the data set."""
    return DATASETS[dataset].k_vals if dataset in DATASETS else Source.k_vals


def read_splits(dataset: str, source_path: str, download: bool = False, download_url: str | None = None) -> Splits:
    """Reads a data set's protocol, fetching it first when it is missing and `download` says so.

    Raises:
        UserError: the data are missing, incomplete or not as the data set's layout says.
    """
    if dataset in ("", "..") or Path(dataset).name != dataset:
        raise UserError(f"--dataset {dataset} is no name: give the folder's name, and its parent as --source_path")
    root = Path(source_path) / dataset
    source = DATASETS.get(dataset)
    is_missing = not root.is_dir() or all(entry.name.startswith(".") for entry in root.iterdir())
    if is_missing and download and source and not source.made_here:
        download_archives(dataset, root, download_url)
    elif is_missing and not (source and source.made_here):
        raise UserError(_how_to_get(dataset, root))
    splits = source.read(root) if source else split_in_half(read_class_folders(find_layout(root, "images")))
    compare_counts(dataset, splits)
    return splits


def _how_to_get(dataset: str, root: Path) -> str:
    source = DATASETS.get(dataset)
    demo = "`bash Sample_Runs.sh demo` needs neither data nor pretrained weights"
    if source is None:
        near = nearest_name(dataset, DATASETS)
        return f"no images were found in {root.resolve() / 'images'}, where --dataset {dataset}{near} would be; {demo}"
    if source.licence:
        how = f"--download can't fetch it: {source.licence}"
    elif not source.archives:
        how = "put its files there"
    elif "://" not in source.archives[0].url:
        how = "--download --download_url URL fetches its archives, or Datasets/README.md says where to put them"
    else:
        how = "--download fetches it"
    return f"no data of {dataset} were found in {root.resolve()}; {how}; {demo}"


DOWNLOAD_ERRORS = (  # of the connection, of a wrong --download_url, and of unpacking
    *(OSError, RuntimeError, ValueError, http.client.HTTPException),
    *(EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error),
)


def download_archives(dataset: str, root: Path, base_url: str | None = None) -> None:
    """Fetches, checks and unpacks a data set's archives; nothing appears in `root` before all are there.

    Raises:
        UserError: the data set needs a licence, no address is known, or the download failed.
    """
    archives = DATASETS[dataset].archives
    if not archives or (base_url is None and "://" not in archives[0].url):
        raise UserError(_how_to_get(dataset, root))
    fetched = root.with_name(f".download-{dataset}")
    unpacked = fetched / "unpacked"
    try:
        unpacked.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            file = archive.url.rsplit("/", 1)[-1]
            url = f"{base_url.rstrip('/')}/{file}" if base_url else archive.url
            download_url(url, str(fetched), file, archive.md5)  # keeps what is whole, so a second try goes on
            if file.endswith((".tgz", ".zip")):
                extract_archive(str(fetched / file), str(unpacked))
            else:
                shutil.copy(fetched / file, unpacked)
        shutil.rmtree(root, ignore_errors=True)  # it holds hidden files at most
        os.replace(unpacked, root)
        shutil.rmtree(fetched)
    except DOWNLOAD_ERRORS as error:
        raise UserError(f"{dataset} can't be fetched ({error}): Datasets/README.md says how to place it") from None


def compare_counts(dataset: str, splits: Splits) -> None:
    """Warns where a data set's counts differ from the published ones."""
    parts = {"train": splits.train}
    for test in splits.test:
        parts |= {"query": test.query, "gallery": test.gallery} if test.gallery else {test.name: test.query}
    for part, (classes, images) in (DATASETS[dataset].counts if dataset in DATASETS else {}).items():
        found = parts[part].num_classes(), len(parts[part])
        for what, expected, got in zip(("classes", "images"), (classes, images), found):
            if expected not in (None, got):
                notice(f"{dataset}, {part}: {got} {what}, where the published protocol has {expected}")


def check_splits(dataset: str, splits: Splits) -> None:
    """Refuses splits that can't be trained or evaluated on, and warns of what is odd about others.

    Raises:
        UserError: there are no sets to evaluate on, too few training classes, or queries that have nothing to find.
    """
    if not (splits.val or splits.test):
        raise UserError(f"{dataset} has nothing to evaluate on: its splits need val or test sets")
    if splits.train.num_classes() < 2:
        raise UserError(f"{dataset} has {splits.train.num_classes()} training class(es): at least two are needed")
    for test in [*splits.val, *splits.test]:
        gallery = test.gallery or test.query
        if np.isin(gallery.labels[:, 0], splits.train.labels[:, 0]).any():
            notice(f"{dataset}, {test.name}: some of its classes are training classes too")
        seen = np.bincount(gallery.labels[:, 0], minlength=len(gallery.class_names[0]))
        alone = int((seen[test.query.labels[:, 0]] <= (test.gallery is None)).sum())
        if alone == len(test.query):
            raise UserError(f"{dataset}, {test.name}: no query has another image of its class to find: add images")
        if alone:
            notice(
                f"{dataset}, {test.name}: {alone} of {len(test.query)} queries have no other image of their class and "
                "are left out of retrieval metrics"
            )


def load_image(path: str) -> torch.Tensor:
    """Reads an image of any kind as RGB `(3, H, W)` uint8, transparent parts on white.

    Raises:
        UserError: the file is no whole image.
    """
    try:
        data = np.fromfile(path, np.uint8)
        if data[:3].tolist() == [0xFF, 0xD8, 0xFF] and (image := _decode_jpeg(data)) is not None:
            return image
        with Image.open(path) as opened:
            if opened.mode.startswith("I;16"):  # Pillow would clip, not scale
                rgba = Image.fromarray((np.array(opened) >> 8).astype(np.uint8)).convert("RGBA")
            elif opened.mode in ("I", "F"):
                raise ValueError(f"it has pixels of 32 bits, mode {opened.mode}")
            else:
                rgba = opened.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is no whole image ({error}): replace the file, or remove it from folder and lists, and start again"
        ) from None


def _decode_jpeg(data: np.ndarray) -> torch.Tensor | None:
    """Decodes grey and YCbCr JPEGs; None for what only Pillow reads or reports well (CMYK, cut-off files)."""
    try:
        image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED)
    except RuntimeError:
        return None
    return image.expand(3, -1, -1) if len(image) == 1 else image if len(image) == 3 else None


class RandomCropAndFlip:
    """Random crop of 8 to 100 % of the area, resized to `crop_size` px, flipped half of the time; uint8 in and out.

    The same draws as torchvision's RandomResizedCrop and RandomHorizontalFlip, in half of their time.
    """

    def __init__(self, crop_size: int):
        self.crop_size = crop_size
        self.crop = v2.RandomResizedCrop(crop_size)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        cut = image[None, :, top : top + box["height"], left : left + box["width"]]
        # resizing to the same pixels is quicker in this layout
        cut = cut.contiguous(memory_format=torch.channels_last)
        resized = v2.functional.resize_image(cut, [self.crop_size, self.crop_size], antialias=True)[0]
        return v2.functional.horizontal_flip_image(resized) if torch.rand(()) < 0.5 else resized


def eval_transform(crop_size: int, resize: int) -> v2.Transform:
    """Shorter side to `resize` px, centre crop of `crop_size` px; uint8 in and out."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(crop_size)])


class ImageDataset(Dataset):
    """Images in their order, for evaluation. An unreadable image comes back as its `UserError`."""

    def __init__(self, images: ImageSet, transform: Callable[[torch.Tensor], torch.Tensor]):
        self.images = images
        self.transform = transform
        self.labels = images.labels[:, 0]
        self.parents = images.labels[:, 1] if images.labels.shape[1] > 1 else None

    def __len__(self) -> int:
        return len(self.images)

    def load(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        """One item: image `(3, crop, crop)` uint8, label, index."""
        try:
            return self.transform(load_image(self.images.paths[idx])), int(self.labels[idx]), idx
        except UserError as error:  # raised by the main process: out of a worker it would arrive as a traceback
            return error

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        return self.load(idx)


def class_balanced(
    labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of `bs / samples_per_class` distinct classes with `samples_per_class` images of each.

    Every class is drawn before any is drawn again. The images of a class in a batch are different ones, as far as the
    class has enough.

    Yields:
        `(bs,)` positions, max(1, images // bs) times.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    classes_per_batch = bs // samples_per_class
    waiting: list[int] = []
    for _ in range(max(1, len(labels) // bs)):
        if len(waiting) < classes_per_batch:
            # The next round begins with classes that the rest of this one, which opens the batch, doesn't hold.
            upcoming = rng.permutation(len(members))
            repeated = np.isin(upcoming, waiting)
            waiting += [*upcoming[~repeated], *upcoming[repeated]]
        classes, waiting = waiting[:classes_per_batch], waiting[classes_per_batch:]
        yield np.concatenate([_draw(members[label], samples_per_class, rng) for label in classes])


def _draw(members: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the members, in whole rounds over all of them before the last, partial one."""
    rounds = [rng.permutation(members) for _ in range(-(-count // len(members)))]
    return np.concatenate(rounds)[:count]


def shuffled(labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of shuffled images without regard to their class.

    Yields:
        `(bs,)` positions, images // bs times, or all images once where they are fewer than `bs`.
    """
    order = rng.permutation(len(labels))
    for batch in range(max(1, len(labels) // bs)):
        yield order[batch * bs : (batch + 1) * bs]


BATCH_SAMPLERS: dict[str, Callable[[np.ndarray, int, int, np.random.Generator], Iterator[np.ndarray]]] = {
    "class_balanced": class_balanced,
    "shuffled": shuffled,
}


class BaseTripletDataset(ImageDataset):
    """Training images, augmented, and what forms a batch of them.

    An epoch's batches and each sample's augmentation depend on (seed, epoch) and the position in the epoch alone, never
    on the workers that load them.

    Attributes:
        labels: `(N,)` training labels 0 … num_classes - 1.
    """

    def __init__(
        self,
        images: ImageSet,
        transform: Callable[[torch.Tensor], torch.Tensor],
        bs: int,
        samples_per_class: int,
        batch_sampler: str = "class_balanced",
        seed: int = 1,
        iterations: int | None = None,
    ):
        super().__init__(images, transform)
        classes, self.labels = np.unique(self.labels, return_inverse=True)
        self.num_classes = len(classes)
        self.bs = bs
        self.samples_per_class = samples_per_class
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.iterations = iterations
        self._warn_of_repeats()
        self.set_epoch(1)

    def _warn_of_repeats(self) -> None:
        sizes = np.bincount(self.labels)
        if self.batch_sampler == "class_balanced" and sizes.min() < self.samples_per_class:
            few = int((sizes < self.samples_per_class).sum())
            notice(f"classes with fewer than {self.samples_per_class} images: {few}; theirs repeat inside a batch")
        if len(self) < self.bs:
            notice(
                f"--bs {self.bs} is more than the {len(self)} training images: images repeat, or batches are smaller"
            )

    def set_epoch(self, epoch: int) -> None:
        """Forms the epoch's batches: `self.batches`, a list of arrays of image positions."""
        self.epoch = epoch
        rng = np.random.default_rng((self.seed, epoch))
        self.batches: list[np.ndarray] = []
        while not self.batches or len(self.batches) < (self.iterations or 0):
            one_pass = BATCH_SAMPLERS[self.batch_sampler](self.labels, self.bs, self.samples_per_class, rng)
            before = len(self.batches)
            self.batches += one_pass
            if len(self.batches) == before:
                what = f"--batch_sampler {self.batch_sampler} forms no batch of {self.bs}"
                raise UserError(f"{what} from {len(self)} images: lower --bs")
        del self.batches[self.iterations or len(self.batches) :]

    def __getitem__(self, draw: tuple[int, int]) -> tuple[torch.Tensor, int, int] | UserError:  # type: ignore[override]
        idx, position = draw
        with seeded(self.seed, self.epoch, position):
            return self.load(idx)


class EpochBatches:
    """The batches of a `BaseTripletDataset`'s epoch, each image with its position in the epoch."""

    def __init__(self, dataset: BaseTripletDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = 0
        for batch in self.dataset.batches:
            yield [(int(idx), position + slot) for slot, idx in enumerate(batch)]
            position += len(batch)


def collate(items: list) -> Any:
    """Stacks items to `(images (B, 3, H, W) uint8, labels (B,), indices (B,))`; one error stands for its batch.

    The images' channels lie side by side in memory, as they do when decoded: to sort them here would take longer.
    """
    error = next((item for item in items if isinstance(item, UserError)), None)
    if error is not None:
        return error
    images, labels, indices = default_collate([(image.permute(1, 2, 0), label, idx) for image, label, idx in items])
    return images.permute(0, 3, 1, 2), labels, indices


class ImageLoader(DataLoader):
    """A DataLoader that raises, in the main process, the `UserError` that a worker met."""

    dataset: ImageDataset

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` labels of the data set's images."""
        return self.dataset.labels

    @property
    def parents(self) -> np.ndarray | None:
        """`(N,)` labels of the next coarser level, where there is one."""
        return self.dataset.parents

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class TrainLoader(ImageLoader):
    """The loader of a `BaseTripletDataset`, which forms the batches."""

    dataset: BaseTripletDataset

    def __init__(self, dataset: BaseTripletDataset, **common: Any):
        super().__init__(dataset, batch_sampler=EpochBatches(dataset), **common)

    def set_epoch(self, epoch: int) -> None:
        """Forms the epoch's batches."""
        self.dataset.set_epoch(epoch)


@dataclass(frozen=True)
class RetrievalLoaders:
    """The loaders of a `RetrievalSet`."""

    name: str
    query: ImageLoader
    gallery: ImageLoader | None = None


@dataclass(frozen=True)
class Loaders:
    """`train` gives augmented batches, `train_eval` the same images with test transforms, in their order."""

    train: TrainLoader
    train_eval: ImageLoader
    val: Sequence[RetrievalLoaders]
    test: Sequence[RetrievalLoaders]


def give_dataloaders(opt: argparse.Namespace, splits: Splits, pin_memory: bool = False) -> Loaders:
    """Builds all loaders from the resolved flags; `pin_memory` for batches that go to a CUDA device.

    Raises:
        UserError: batches of --bs images can't be formed.
    """
    num_classes = splits.train.num_classes()
    if opt.batch_sampler == "class_balanced" and opt.bs // opt.samples_per_class > num_classes:
        raise UserError(
            f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} needs {opt.bs // opt.samples_per_class} "
            f"classes a batch, and {opt.dataset} trains on {num_classes}: lower --bs or raise --samples_per_class"
        )
    if opt.kernels > cpu_cores():
        notice(
            f"--kernels {opt.kernels} is more than this machine's {cpu_cores()} cores: {cpu_cores()} workers load data"
        )
    common: dict[str, Any] = {
        "num_workers": min(opt.kernels, cpu_cores()),
        "collate_fn": collate,
        "pin_memory": pin_memory,
    }
    for_test = eval_transform(opt.crop_size, opt.resize)

    def in_order(images: ImageSet) -> ImageLoader:
        # a generator of its own, so that evaluation draws nothing from training's
        return ImageLoader(
            ImageDataset(images, for_test), batch_size=opt.eval_bs, generator=torch.Generator(), **common
        )

    def retrieval(sets: Sequence[RetrievalSet]) -> list[RetrievalLoaders]:
        return [RetrievalLoaders(s.name, in_order(s.query), in_order(s.gallery) if s.gallery else None) for s in sets]

    train = BaseTripletDataset(
        splits.train,
        RandomCropAndFlip(opt.crop_size),
        opt.bs,
        opt.samples_per_class,
        opt.batch_sampler,
        opt.seed,
        opt.iterations_per_epoch,
    )
    return Loaders(
        train=TrainLoader(train, **common),
        train_eval=in_order(splits.train),
        val=retrieval(splits.val),
        test=retrieval(splits.test),
    )
