"""Where images are, which class belongs to which split, and how batches are formed.

A dataset is a function `root -> Splits` and its row in `DATASETS`; a folder of `images/<class>/*` needs neither.
Batches are formed by a function in `BATCH_SAMPLERS`, which `BaseTripletDataset` calls.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

import transforms
from auxiliaries import FlagParser, UserError, cpu_cores, nearest_name, notice, number, seeded

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image, ImageFont

T = TypeVar("T")
U = TypeVar("U")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of data, batches and splits."""
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="cub200", metavar="NAME", fixed=True,
        help=f"{', '.join(DATASETS)}, or any folder <source_path>/NAME/images/<class>/*")
    add("--source_path", default="Datasets", machine=True, compared=False, help="folder that contains the datasets")
    add("--download", action="switch", machine=True, compared=False, help="download the dataset first if it is missing")
    add("--download_url", metavar="URL", machine=True, compared=False,
        help="with --download: address of a folder that contains the archives (default: where they are published)")
    add("--kernels", type=number(int, 0), default=8, machine=True, compared=False,
        help="data-loading workers, at most one per core; 0: the main process loads the data")
    add("--bs", type=number(int, 1), default=112, help="images per training batch")
    add("--eval_bs", type=number(int, 1), compared=False, help="images per batch in evaluation (default: --bs)")
    add("--samples_per_class", type=number(int, 1),
        help="images of each class in a batch; 1: batches don't depend on classes (default: by --loss, 4 or 1)")
    add("--batch_sampler", choices=BATCH_SAMPLERS,
        help="how batches are formed (default: shuffled with --samples_per_class 1, otherwise class_balanced)")
    add("--iterations_per_epoch", type=number(int, 1), help="batches per epoch (default: training images // bs)")

    add = parser.add_argument_group("protocol").add_argument
    add("--split_scheme", choices=SPLIT_SCHEMES, default="predefined", fixed=True,
        help="predefined: the literature's training and test images; cross_validation: some classes are set aside for "
        "testing, the others are divided into partitions, and each fold validates on one and trains on the rest")
    add("--test_size", type=number(float, 0, exclusive=True, below=1), default=0.5, fixed=True,
        needs="cross_validation", help="cross_validation: fraction of the classes used for testing")
    add("--test_start_idx", type=number(float, 0, below=1), default=0.5, fixed=True, needs="cross_validation",
        help="cross_validation: where the test classes begin among the sorted classes, as a fraction of their number")
    add("--num_training_partitions", type=number(int, 2), default=4, fixed=True, needs="cross_validation",
        help="cross_validation: number of partitions of the remaining classes")
    add("--num_training_sets", type=number(int, 1), compared=False, needs="cross_validation",
        help="cross_validation: number of folds to run (default: 4, or the number of partitions if that is smaller)")
    add("--fold", type=number(int, 0), fixed=True, compared=False, needs="cross_validation",
        help="cross_validation: run only this fold, counted from 0 (default: all)")
    add("--label_hierarchy_level", type=number(int, 0), default=0, fixed=True,
        help="level of the labels to train and evaluate on: 0 is the finest; coarser ones where a dataset has them")
    # fmt: on


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
        return ImageSet([self.paths[i] for i in positions], self.labels[positions], self.class_names)

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
        val, test = ([one.map(lambda images: images.at_level(level)) for one in sets] for sets in (self.val, self.test))
        return Splits(self.train.at_level(level), val, test)


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
        class_names.append(ordered)
    order = sorted(range(len(paths)), key=lambda i: (columns[0][i], paths[i]))
    return ImageSet([paths[i] for i in order], np.stack(columns, axis=1)[order], class_names)


def split_in_half(images: ImageSet) -> Splits:
    """Trains on the first half of the classes and tests on the second."""
    is_train = images.labels[:, 0] < len(images.class_names[0]) // 2
    return Splits(images.subset(is_train), test=[RetrievalSet("test", images.subset(~is_train))])


def split_by_part(
    paths: Sequence[str], parts: Sequence[str], *levels: Sequence[str], key: Callable[[str], Any] = str
) -> Splits:
    """Splits by each image's part: `train`; `query` and `gallery`, or any other parts, each a test set of its own."""
    images = make_image_set(paths, *levels, parts, key=key)
    part_labels = images.labels[:, -1]
    images = ImageSet(images.paths, images.labels[:, :-1], images.class_names[:-1])
    sets = {part: images.subset(part_labels == label) for label, part in enumerate(sorted(set(parts)))}
    train = sets.pop("train")
    if "gallery" in sets:
        return Splits(train, test=[RetrievalSet("test", sets["query"], sets["gallery"])])
    return Splits(train, test=[RetrievalSet(part, sets[part]) for part in dict.fromkeys(parts) if part != "train"])


def pool(splits: Splits) -> ImageSet:
    """All images of a dataset, each once, sorted by class and path."""
    held_out = [images for one in (*splits.val, *splits.test) for images in (one.query, one.gallery)]
    sets = [images for images in (splits.train, *held_out) if images is not None]
    labels = {path: label for images in sets for path, label in zip(images.paths, images.labels)}
    paths = sorted(labels, key=lambda path: (labels[path][0], path))
    return ImageSet(paths, np.stack([labels[path] for path in paths]), splits.train.class_names)


def class_disjoint_splits(
    images: ImageSet, fold: int, test_size: float, test_start_idx: float, num_training_partitions: int
) -> Splits:
    """One fold of cross-validation over classes of the finest level.

    Of the n sorted classes, int(n · start) … int(n · start) + int(n · size) - 1, modulo n, are test classes. The others
    are divided into partitions (`numpy.array_split`): partition `fold` is for validation, the rest for training. In
    every set, images search each other.

    Args:
        images: all images of the dataset.
        fold: 0 … num_training_partitions - 1.
        test_size: fraction of the classes to test on, in (0, 1).
        test_start_idx: where the test classes begin, as a fraction, in [0, 1).
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
                f"cross_validation leaves {len(chosen)} {name} class(es) of {len(classes)}, and two are needed: change "
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
    """The training, validation and test images, from the resolved flags.

    Raises:
        UserError: the data can't be read, or can't be split as the flags say.
    """
    splits = read_splits(opt.dataset, opt.source_path, opt.download, opt.download_url)
    splits = SPLIT_SCHEMES[opt.split_scheme](splits, opt).at_level(opt.label_hierarchy_level)
    check_splits(opt.dataset, splits)
    if opt.testing_method == "WithSameParentLabel" and len(splits.train.class_names) < 2:
        raise UserError(
            "--testing_method WithSameParentLabel needs labels coarser than --label_hierarchy_level "
            f"{opt.label_hierarchy_level}, which {opt.dataset} doesn't have: drop --testing_method"
        )
    return splits


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


def read_class_folders(folder: Path, key: Callable[[str], Any] | None = None) -> ImageSet:
    """Reads `folder/<class>/<image>`; classes are sorted by `key(name)`, and the images of a class by name.

    Raises:
        UserError: a class folder has no images, or there are fewer than two classes.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of class folders: Datasets/README.md shows the layouts")
    paths: list[str] = []
    classes: list[str] = []
    others: list[str] = []
    for class_folder in (entry for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."):
        files = [entry.path for entry in os.scandir(class_folder) if entry.is_file() and entry.name[0] != "."]
        images = [path for path in files if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
        others += set(files) - set(images)
        if not images:
            raise UserError(f"{class_folder.path} contains no images: add some, or remove the folder")
        paths += images
        classes += [class_folder.name] * len(images)
    if others:
        notice(f"{len(others)} files in {folder} don't have an image's suffix and are ignored, e.g. {min(others)}")
    if len(set(classes)) < 2:
        raise UserError(f"{folder} contains {len(set(classes))} class folder(s): at least two are needed")
    return make_image_set(paths, classes, key=key)


def read_table(path: Path, columns: Sequence[str], skip_lines: int = 0, header: bool = True) -> pd.DataFrame:
    """Reads a file of columns, separated by runs of spaces, as strings.

    Raises:
        UserError: the file is missing or is not such a table, or a column or a value is missing.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, sep=r"\s+", dtype=str, skiprows=skip_lines, header=0 if header else None)
    except OSError as error:
        problem = "does not exist" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise UserError(f"{path} {problem}: Datasets/README.md shows the layouts") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table of {', '.join(columns)}: {str(error).strip()}") from None
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
    return table


def locate_images(folder: Path, names: Sequence[str], listed_in: Path) -> list[str]:
    """The paths of listed images; a name in the list and its file may differ in case.

    Raises:
        UserError: a listed image does not exist.
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
            raise UserError(
                f"{folder / name}, listed in {listed_in}, does not exist: add it, or remove it from the list"
            )
        paths.append(os.path.join(folder, parent, actual))
    return paths


def read_cub200(root: Path) -> Splits:
    """CUB-200-2011: trains on the first 100 classes, sorted by the number in the folder's name."""
    folder = find_layout(root, "images", "CUB_200_2011/images")

    def class_number(name: str) -> tuple[int, str]:
        match = re.match(r"\d+", name)
        if not match:
            raise UserError(f"{folder / name} doesn't begin with a class number, as 001.Black_footed_Albatross does")
        return int(match.group()), name

    return split_in_half(read_class_folders(folder, key=class_number))


def read_cars196(root: Path) -> Splits:
    """Cars196: trains on the first 98 classes, sorted by name."""
    if (root / "images").is_dir():
        return split_in_half(read_class_folders(root / "images"))
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
        classes = [names[int(row["class"]) - 1] for row in rows]
    except Exception as error:  # scipy raises anything at all on a damaged file
        raise UserError(f"{info_file} can't be read as Cars196's annotations ({error}): download it again") from None
    folder_names = [name.replace("/", "-") for name in classes]  # the names of the class folders in the other layout
    return split_in_half(make_image_set(locate_images(root, images, info_file), folder_names))


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
        tables.append(table.assign(part=part, file=locate_images(images, table["path"].tolist(), info_file)))
    rows = pd.concat(tables)
    super_classes = [os.path.dirname(path).removesuffix("_final") for path in rows["path"]]
    return split_by_part(
        rows["file"].tolist(), rows["part"].tolist(), rows["class_id"].tolist(), super_classes, key=by_number
    )


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
    files = locate_images(find_layout(root, "img", "Img/img").parent, names, info_file)
    categories = ["/".join(name.split("/")[1:3]) for name in names]
    return split_by_part(files, parts, rows["item_id"].tolist(), categories)


def read_vehicle_id(root: Path) -> Splits:
    """PKU VehicleID: three test sets of increasing size, the images of each searching each other."""
    import pandas as pd

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
    """Characters rendered in sixteen fonts; level 1 is the scripts (LATIN, GREEK, CYRILLIC, …)."""
    if not (root / "images").is_dir():
        render_glyphs(root / "images")
    images = read_class_folders(root / "images", key=by_number)
    try:
        characters = [chr(int(name.removeprefix("U+"), 16)) for name in images.class_names[0]]
        scripts = [unicodedata.name(character).split()[0] for character in characters]
    except ValueError as error:
        raise UserError(
            f"{root / 'images'} contains a folder that is not named after a character ({error}): remove {root}"
        ) from None
    finest = [images.class_names[0][label] for label in images.labels[:, 0]]
    coarser = [scripts[label] for label in images.labels[:, 0]]
    return split_in_half(make_image_set(images.paths, finest, coarser, key=by_number))


def render_glyphs(folder: Path) -> None:
    """Renders every letter, number, symbol and other punctuation mark that all `GLYPH_FONTS` have, 64 × 64 px.

    Writes `folder/U+0041/<font>.png`, black on white. A character that looks exactly like an earlier one in any font
    (Greek Alpha like Latin A) is skipped, since it would put training images into the test set.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

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
        raise UserError(f"{folder} can't be written ({error.strerror}): choose another --source_path") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    notice(f"rendered {kept} characters in {len(fonts)} fonts into {folder}")


def _render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    from PIL import Image, ImageDraw

    image = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(image).text((32, 32), character, fill=0, font=font, anchor="mm")
    return image


@dataclass(frozen=True)
class Archive:
    """A file to download: its address, of which --download_url replaces all but the name, and its MD5."""

    url: str
    md5: str


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset's row: how to read it, the default k, and what is known about it.

    Attributes:
        read: from the dataset's folder to its splits.
        k_vals: the k of Recall @ k that its literature reports.
        counts: published numbers of classes and images of `train` and of each test set, or of `query` and `gallery`.
        archives: what --download downloads and unpacks.
        license: for data that must be requested: from whom, and what to put into the folder.
        made_here: whether `read` creates missing data itself.
    """

    read: Callable[[Path], Splits]
    k_vals: tuple[int, ...] = (1, 2, 4, 8)
    counts: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    archives: tuple[Archive, ...] = ()
    license: str = ""
    made_here: bool = False


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
    "glyphs": DatasetSpec(read_glyphs, made_here=True),
}


def default_k_vals(dataset: str) -> tuple[int, ...]:
    """The k of Recall @ k that the dataset's literature reports."""
    return DATASETS[dataset].k_vals if dataset in DATASETS else DatasetSpec.k_vals


def read_splits(dataset: str, source_path: str, download: bool = False, download_url: str | None = None) -> Splits:
    """Reads a dataset's protocol, with `download` after downloading the dataset if it is missing.

    Raises:
        UserError: the data is missing, incomplete, or not in a layout of the dataset.
    """
    if dataset in ("", "..") or Path(dataset).name != dataset:
        raise UserError(f"--dataset {dataset} is not a name: give the folder's name, and its parent as --source_path")
    root = Path(source_path) / dataset
    spec = DATASETS.get(dataset)
    is_missing = not root.is_dir() or all(entry.name.startswith(".") for entry in root.iterdir())
    if is_missing and download and spec and not spec.made_here:
        download_archives(dataset, root, download_url)
    elif is_missing and not (spec and spec.made_here):
        raise UserError(_how_to_get(dataset, root))
    splits = spec.read(root) if spec else split_in_half(read_class_folders(find_layout(root, "images")))
    compare_counts(dataset, splits)
    return splits


def _how_to_get(dataset: str, root: Path) -> str:
    spec = DATASETS.get(dataset)
    demo = "`bash Sample_Runs.sh demo` needs neither data nor pretrained weights"
    if spec is None:
        near = nearest_name(dataset, DATASETS)
        return f"no images were found in {root.resolve() / 'images'}, where --dataset {dataset}{near} would be; {demo}"
    if spec.license:
        how = f"--download can't download it: {spec.license}"
    elif not spec.archives:
        how = "put its files there"
    elif "://" not in spec.archives[0].url:
        how = "--download --download_url URL downloads its archives, or Datasets/README.md says where to put them"
    else:
        how = "--download downloads it"
    return f"no data of {dataset} was found in {root.resolve()}; {how}; {demo}"


def download_archives(dataset: str, root: Path, base_url: str | None = None) -> None:
    """Downloads, checks and unpacks a dataset's archives; nothing appears in `root` until all of them are there.

    Raises:
        UserError: the dataset needs a license, no address is known, or the download failed.
    """
    import http.client
    import tarfile
    import zipfile
    import zlib

    from torchvision.datasets.utils import download_url, extract_archive

    failures = (  # of the connection, by a wrong --download_url, or in unpacking
        *(OSError, RuntimeError, ValueError, http.client.HTTPException),
        *(EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error),
    )
    archives = DATASETS[dataset].archives
    if not archives or (base_url is None and "://" not in archives[0].url):
        raise UserError(_how_to_get(dataset, root))
    downloaded = root.with_name(f".download-{dataset}")
    unpacked = downloaded / "unpacked"
    try:
        unpacked.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            file = archive.url.rsplit("/", 1)[-1]
            url = f"{base_url.rstrip('/')}/{file}" if base_url else archive.url
            download_url(url, str(downloaded), file, archive.md5)  # skips intact files, so a second try continues
            if file.endswith((".tgz", ".zip")):
                extract_archive(str(downloaded / file), str(unpacked))
            else:
                shutil.copy(downloaded / file, unpacked)
        shutil.rmtree(root, ignore_errors=True)  # contains hidden files at most
        os.replace(unpacked, root)
        shutil.rmtree(downloaded)
    except failures as error:
        raise UserError(
            f"{dataset} can't be downloaded ({error}): try again, or see Datasets/README.md for where to put its files"
        ) from None


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


def check_splits(dataset: str, splits: Splits) -> None:
    """Refuses splits that can't be trained or evaluated on, and warns of oddities.

    Raises:
        UserError: there are no sets to evaluate on, too few training classes, or no query has anything to find.
    """
    if not (splits.val or splits.test):
        raise UserError(f"{dataset} has nothing to evaluate on: its splits need val or test sets")
    if splits.train.num_classes() < 2:
        raise UserError(f"{dataset} has {splits.train.num_classes()} training class(es): at least two are needed")
    for test in [*splits.val, *splits.test]:
        gallery = test.query if test.gallery is None else test.gallery
        if np.isin(gallery.labels[:, 0], splits.train.labels[:, 0]).any():
            notice(f"{dataset}, {test.name}: some of its classes are training classes, too")
        sizes = np.bincount(gallery.labels[:, 0], minlength=len(gallery.class_names[0]))
        alone = int((sizes[test.query.labels[:, 0]] <= (test.gallery is None)).sum())
        if alone == len(test.query):
            raise UserError(f"{dataset}, {test.name}: no query has another image of its class to find: add images")
        if alone:
            notice(
                f"{dataset}, {test.name}: {alone} of {len(test.query)} queries have no other image of their class and "
                "don't count in retrieval metrics"
            )


class ImageDataset(Dataset):
    """Images in order, for evaluation. An unreadable image comes back as its `UserError`.

    Attributes:
        labels: `(N,)` labels of the finest level.
        parents: `(N,)` labels of the next coarser level, if there is one.
    """

    def __init__(self, images: ImageSet, transform: transforms.Transform):
        self.images = images
        self.transform = transform
        self.labels = images.labels[:, 0]
        self.parents: np.ndarray | None = images.labels[:, 1] if images.labels.shape[1] > 1 else None

    def __len__(self) -> int:
        return len(self.images)

    def load(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        """One item: image `(3, crop, crop)` uint8, label, index."""
        try:
            return self.transform(transforms.load_image(self.images.paths[idx])), int(self.labels[idx]), idx
        except UserError as error:  # raised by the main process: raised in a worker it would arrive as a traceback
            return error

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, int, int] | UserError:
        return self.load(idx)


def class_balanced(
    labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches of `bs / samples_per_class` distinct classes with `samples_per_class` images each.

    Every class is drawn before any is drawn again. Within a batch, an image occurs once if its class has enough images.

    Yields:
        `(bs,)` positions, max(1, images // bs) times.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    classes_per_batch = bs // samples_per_class
    waiting: list[int] = []
    for _ in range(max(1, len(labels) // bs)):
        if len(waiting) < classes_per_batch:
            # What is left of this round opens the batch, so the next round begins with classes that are not in it.
            upcoming = rng.permutation(len(members))
            repeated = np.isin(upcoming, waiting)
            waiting += [*upcoming[~repeated], *upcoming[repeated]]
        classes, waiting = waiting[:classes_per_batch], waiting[classes_per_batch:]
        yield np.concatenate([_draw(members[label], samples_per_class, rng) for label in classes])


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


# labels (N,), bs, samples_per_class, generator -> batches of image positions, one pass over the images
BatchSampler = Callable[[np.ndarray, int, int, np.random.Generator], Iterator[np.ndarray]]
BATCH_SAMPLERS: dict[str, BatchSampler] = {
    "class_balanced": class_balanced,
    "shuffled": shuffled,
}

Draw = tuple[int, int, int]  # a training image to load: (position in the dataset, epoch, position in the epoch)


class BaseTripletDataset(ImageDataset):
    """Training images, augmented, and the batches of an epoch.

    Batches and augmentation depend only on the seed, the epoch and the position in the epoch. All that a worker needs
    is in the draws it gets, since workers live longer than an epoch and don't see what changes in the main process.

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
    ):
        super().__init__(images, transform)
        classes, self.labels = np.unique(self.labels, return_inverse=True)
        self.num_classes = len(classes)
        self.bs = bs
        self.samples_per_class = samples_per_class
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.iterations = iterations
        self._batches: list[list[Draw]] = []
        self._warn_about_repeats()
        self.set_epoch(1)

    @property
    def batches(self) -> list[list[Draw]]:
        """The current epoch's batches. The loader reads this very list, which `set_epoch` refills."""
        return self._batches

    def _warn_about_repeats(self) -> None:
        sizes = np.bincount(self.labels)
        if self.batch_sampler == "class_balanced" and sizes.min() < self.samples_per_class:
            few = int((sizes < self.samples_per_class).sum())
            notice(
                f"classes with fewer than {self.samples_per_class} images: {few}; their images repeat within a batch"
            )
        if len(self) < self.bs:
            notice(
                f"--bs {self.bs} is more than the {len(self)} training images: images repeat, or batches are smaller"
            )

    def form_batches(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches of image positions; a subclass may form others.

        Raises:
            UserError: the batch sampler forms none.
        """
        rng = np.random.default_rng((self.seed, epoch))
        batches: list[np.ndarray] = []
        while not batches or len(batches) < (self.iterations or 0):
            one_pass = [*BATCH_SAMPLERS[self.batch_sampler](self.labels, self.bs, self.samples_per_class, rng)]
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


class ImageLoader(DataLoader):
    """A DataLoader whose main process raises the `UserError` that a worker met."""

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
    def paths(self) -> Sequence[str]:
        """N image files."""
        return self.dataset.images.paths

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._iterator is not None:
            # DataLoader draws a random number when it starts workers, but not when it uses them again. Training must be
            # the same whether they were started in this epoch, as in a resumed run, or in an earlier one.
            torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # or the error would refer to itself, and its loader's workers stop much later
            yield batch


@dataclass(frozen=True)
class Loaders:
    """`train` gives augmented batches, `train_eval` the same images in order, with the test transform."""

    train: ImageLoader
    train_eval: ImageLoader
    val: Sequence[RetrievalSet[ImageLoader]]
    test: Sequence[RetrievalSet[ImageLoader]]


def build_train_dataset(opt: argparse.Namespace, images: ImageSet) -> BaseTripletDataset:
    """The dataset to train on, from the resolved flags.

    Raises:
        UserError: batches of --bs images can't be formed.
    """
    num_classes, classes_per_batch = images.num_classes(), opt.bs // opt.samples_per_class
    if opt.batch_sampler == "class_balanced" and classes_per_batch > num_classes:
        raise UserError(
            f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} needs {classes_per_batch} classes per "
            f"batch, and {opt.dataset} trains on {num_classes}: lower --bs or raise --samples_per_class"
        )
    return BaseTripletDataset(
        images,
        transforms.build_train_transform(opt),
        opt.bs,
        opt.samples_per_class,
        opt.batch_sampler,
        opt.seed,
        opt.iterations_per_epoch,
    )


def give_dataloaders(opt: argparse.Namespace, splits: Splits, pin_memory: bool = False) -> Loaders:
    """Builds all loaders from the resolved flags; `pin_memory` is for batches that go to a CUDA device.

    Raises:
        UserError: batches of --bs images can't be formed.
    """
    train = build_train_dataset(opt, splits.train)
    workers = min(opt.kernels, cpu_cores())
    if workers < opt.kernels:
        notice(f"--kernels {opt.kernels} is more than this machine's {workers} cores: {workers} workers load data")
    common: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": collate,
        "pin_memory": pin_memory,
    }
    eval_transform = transforms.build_eval_transform(opt)

    def in_order(images: ImageSet) -> ImageLoader:
        # a generator of its own, so that evaluation draws nothing from training's
        return ImageLoader(
            ImageDataset(images, eval_transform), batch_size=opt.eval_bs, generator=torch.Generator(), **common
        )

    return Loaders(
        train=ImageLoader(train, batch_sampler=train.batches, **common),
        train_eval=in_order(splits.train),
        val=[one.map(in_order) for one in splits.val],
        test=[one.map(in_order) for one in splits.test],
    )
