# PYTHON_ARGCOMPLETE_OK
"""A finished network put to use: searching images, embedding and comparing them, and taking the network along.

From Python:
    model = inference.load("Training_Results/cub200/my_run")
    embeddings = model.embed(["a.jpg", "b.jpg"])  # (2, D)
"""

from __future__ import annotations

import os

if __name__ == "__main__" and "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
    import completion

    completion.complete("inference")

import argparse
import csv
import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import auxiliaries
import config
import datasets
import evaluate
import export
import features
import netlib
import plots
import records
import report
import retrieval
import runs
import transforms
from auxiliaries import UserError, counted, notice, number, user_path
from evaluate import Points
from index import KINDS, Embedded, Gallery, Index, default_folder, list_gallery, open_index, report_unreadable

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = str | Path | Image.Image | np.ndarray  # a file, or an image: arrays are (H, W, 3) uint8


# A network from Python


def load(run: Path | str, device: torch.device | str | None = None) -> EmbeddingModel:
    """The best network of a run.

    Args:
        run: the run folder, or that of a fold.
        device: where to put the network (default: the first CUDA device, or else the CPU).

    Raises:
        UserError: there is no such run, it has no network yet, it has folds, or it can't be read.
    """
    folder = Path(run)
    chosen = auxiliaries.pick_device(0) if device is None else torch.device(device)
    opt = load_flags(folder, chosen)
    return EmbeddingModel(runs.load_network(folder, opt, chosen).eval(), opt, folder, chosen)


def load_flags(folder: Path, device: torch.device) -> argparse.Namespace:
    """A run's resolved flags, with what this device does in place of what the device did that it was trained on.

    Raises:
        UserError: it is not the folder of one network, or its config.yaml can't be read.
    """
    flags = config.parse([], runs.config_file(folder))
    folds = runs.fold_folders(folder)
    if None not in folds:
        raise UserError(f"{folder} has a network for each fold: name one, such as {folds[min(folds)]}")  # type: ignore[type-var]
    is_cuda = device.type == "cuda"
    keeps_precision = is_cuda and torch.cuda.is_bf16_supported(False)
    return config.resolve(
        config.with_flags(
            flags,
            gpu=(device.index or 0) if is_cuda else -1,
            precision=flags.precision if keeps_precision else "fp32",
            fast=False,
            compile=False,  # a search would wait longer for the compiler than for its images
        )
    )


class Match(NamedTuple):
    """An image that was found."""

    path: str
    distance: float
    label: str | None = None


@dataclass(frozen=True, eq=False)
class EmbeddingModel:
    """A run's best network, to embed and to search images with.

    Attributes:
        net: the network, in evaluation mode.
        opt: the run's resolved flags.
        folder: the run folder.
        device: where the network is.
        bs: images that are embedded at once (default: those of the run's evaluation).
        mirrors: whether an embedding is the mean with that of the mirror image.
    """

    net: netlib.EmbeddingNet
    opt: argparse.Namespace
    folder: Path
    device: torch.device
    bs: int | None = None
    mirrors: bool = False

    def embed(self, images: Sequence[ImageLike] | ImageLike) -> torch.Tensor:
        """Embeds images.

        Args:
            images: paths, Pillow images, or arrays `(H, W, 3)` uint8; or a single one.

        Returns:
            `(N, D)` float32, on the CPU.

        Raises:
            UserError: one of them can't be read, or is something else.
        """
        several = [images] if _is_single(images) else images
        parts = [torch.empty(0, self.net.embed_dim)]
        for batch in self.embed_in_batches(several):  # type: ignore[arg-type]
            for error in batch.errors.values():
                raise error
            parts.append(batch.vectors)
        return torch.cat(parts)

    def embed_in_batches(self, images: Sequence[ImageLike]) -> Iterator[Embedded]:
        """Embeds any number of images, batch after batch; those that can't be read are left out of `vectors`.

        Args:
            images: as `embed` takes them.

        Yields:
            The batches in order.
        """
        bs = self.bs or self.opt.eval_bs
        starts = range(0, len(images), bs)
        waiting: deque[tuple[int, list[Any]]] = deque()
        # threads: they wait for the disk, and decoders work beside each other
        with ThreadPoolExecutor(auxiliaries.cpu_cores()) as threads:
            read = transforms.build_eval_transform(self.opt)
            for start in auxiliaries.Progress(starts, "embedding images"):
                items = [threads.submit(self._read, image, read) for image in images[start : start + bs]]
                waiting.append((start, items))
                if len(waiting) > BATCHES_AHEAD:
                    yield self._embed_batch(*waiting.popleft())
            while waiting:
                yield self._embed_batch(*waiting.popleft())

    def _read(self, image: ImageLike, transform: transforms.Transform) -> torch.Tensor | UserError:
        """An image as the network takes it, `(3, H, W)` uint8, or why it can't be."""
        try:
            return transform(read_pixels(image, self.opt.exif_orientation))
        except UserError as error:
            return error

    @cached_property
    def key(self) -> str:
        """A digest of what embeddings depend on: the network, and the transform of its images."""
        digest = hashlib.sha256(repr(self.net).encode())
        for name, value in self.net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        flags = {name: getattr(self.opt, name) for name in (*features.TEST_FLAGS, "precision")}
        digest.update(auxiliaries.as_json({**flags, **({"mirrors": True} if self.mirrors else {})}).encode())
        return digest.hexdigest()

    def open_index(self, gallery: Gallery, kind: str | None = None, folder: Path | None = None) -> Index:
        """The index of a gallery, brought up to date, see `index.open_index`.

        Args:
            gallery: the images.
            kind: of the index (default: by the number of images).
            folder: of the index (default: a hidden one beside the gallery); means with mirror images have one in it.
        """
        key = self.key if folder is None else f"{self.key} {gallery.source.absolute()}"
        folder = folder or default_folder(gallery.source)
        folder = folder / "flip" if self.mirrors else folder
        return open_index(gallery, folder, key, self.net.embed_dim, self.embed_in_batches, kind)

    def search(self, gallery: Path | str, queries: Sequence[ImageLike] | ImageLike, k: int = 10) -> list[list[Match]]:
        """Finds the nearest images of a gallery, whose embeddings are kept beside it.

        Args:
            gallery: a folder of images, or a CSV file that lists them, see `index.list_gallery`.
            queries: images as `embed` takes them. A file that is in the gallery does not find itself.
            k: how many images; fewer where the gallery doesn't have as many.

        Returns:
            For each query what was found, the nearest first.

        Raises:
            UserError: there is no such gallery, or an image can't be read.
        """
        several: Any = [queries] if _is_single(queries) else queries
        points = self.embed(several)  # first: what can't be read is noticed before the gallery is embedded
        index = self.open_index(list_gallery(Path(gallery)))
        found = index.search(points, k, find_in_gallery(several, index))
        return [matches_of(index.gallery, *one) for one in found]

    @torch.inference_mode()
    def _embed_batch(self, start: int, items: Sequence[Any]) -> Embedded:
        results = {start + i: item.result() for i, item in enumerate(items)}
        errors = {position: result for position, result in results.items() if isinstance(result, UserError)}
        positions = [position for position in results if position not in errors]
        if not positions:
            return Embedded([], torch.empty(0, self.net.embed_dim), errors)
        pixels = torch.stack([results[position] for position in positions])  # (P, 3, H, W)
        images = pixels.to(self.device)
        vectors = (
            retrieval.split_mirror(retrieval.WithMirror(self.net)(images))[1] if self.mirrors else self.net(images)
        )
        return Embedded(positions, vectors.float().cpu(), errors)


BATCHES_AHEAD = 2  # that are read while one is embedded


def find_in_gallery(queries: Sequence[Any], index: Index) -> list[list[int]]:
    """For each query the positions of its file in a gallery; none where it isn't there, or is not a file."""
    return [index.find(str(query)) if isinstance(query, str | Path) else [] for query in queries]


def matches_of(gallery: Gallery, positions: np.ndarray, distances: np.ndarray) -> list[Match]:
    """What `Index.search` found for a query, with paths and labels."""
    labels = gallery.labels
    return [
        Match(gallery.path(i), float(distance), labels[i] if labels else None)
        for i, distance in zip(positions, distances)
    ]


def _is_single(images: Any) -> bool:
    """Whether it is one image or path, and not a sequence of them."""
    is_image = isinstance(images, str | Path) or hasattr(images, "convert")
    return is_image or (isinstance(images, np.ndarray) and images.ndim == 3)


def read_pixels(image: ImageLike, exif_orientation: bool = False) -> torch.Tensor:
    """An image as RGB `(3, H, W)` uint8.

    Args:
        image: a path, a Pillow image, or an array `(H, W, 3)` uint8.
        exif_orientation: whether to turn it as its EXIF data say.

    Raises:
        UserError: it can't be read, or is something else.
    """
    if isinstance(image, str | Path):
        return transforms.load_image(str(image), exif_orientation)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an array is taken as (H, W, 3) uint8, RGB; this one is {image.shape} {image.dtype}")
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise UserError(
            f"images are paths, Pillow images, or arrays (H, W, 3) uint8; this is of type {type(image).__name__}"
        )
    if image.mode.startswith(("I", "F")):
        raise UserError(f"an image of mode {image.mode} has more than 8 bits per channel: scale it to mode L first")
    return transforms.from_pillow(ImageOps.exif_transpose(image) if exif_orientation else image)


FOLDER_OR_CSV = "a folder, with the folders in it, or a CSV file with a column path and, where wanted, label"


# Searching


def add_search_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags of the command `search`."""
    # fmt: off
    add_model_arguments(parser)
    add = parser.add_argument_group("search").add_argument
    add("--gallery", type=user_path, required=True, metavar="FOLDER|CSV",
        help=f"images to search in: {FOLDER_OR_CSV}")
    add("--query", type=user_path, nargs="+", required=True, metavar="IMAGE",
        help="images to search for; one that is in the gallery does not find itself")
    add("--k", type=number(int, 1), default=10, help="how many images to find for each query")
    add("--index", choices=KINDS,
        help="how to search. flat: compare with every image; hnsw and ivfpq: faiss's indexes, quick in large "
        "galleries; ivfpq takes the least memory (default: flat below 100,000 images, then hnsw, and from 1,000,000 on "
        "ivfpq)")
    add("--index_path", type=user_path, metavar="FOLDER",
        help="where to keep the gallery's embeddings (default: the hidden folder .NAME.index beside the gallery)")
    add("--png", type=partial(output_file, (".png",)), metavar="FILE",
        help="where to draw queries with what was found (default: search_GALLERY.png in the run folder, unless --html "
        "is given)")
    add("--html", type=partial(output_file, (".html", ".htm")), metavar="FILE",
        help="write a page of queries with what was found")
    # fmt: on
    retrieval.add_arguments(parser, "better retrieval")


def search_images(opt: argparse.Namespace) -> list[list[Match]]:
    """The command `search`: prints, draws and returns what was found for each query."""
    retrieval.check(opt)
    better = [f"--{name}" for name in BETTER if getattr(opt, name)]
    if better and opt.index not in (None, "flat"):
        raise UserError(f"{better[0]} compares with every image, and --index {opt.index} does not: drop one of them")
    gallery = list_images("--gallery", opt.gallery)
    for query in opt.query:
        if not Path(transforms.split_box(query)[0]).is_file():
            raise UserError(f"--query {auxiliaries.shown(query)} is not a file: give image files")
    png = picture_file(opt)
    model = replace(load_for(opt), mirrors=opt.tta == "flip")
    points = model.embed(opt.query)
    index = model.open_index(gallery, "flat" if better else opt.index, opt.index_path and Path(opt.index_path))
    if opt.k > len(index):
        notice(f"--k {opt.k} is more than the {counted(len(index), 'image')} of {opt.gallery}: all are shown")
    own = find_in_gallery(opt.query, index)
    found = search_better(opt, model, index, points, own) if better else index.search(points, opt.k, own)
    results = [matches_of(index.gallery, *one) for one in found]
    print(f"{describe_index(index, opt.k)}{' with ' if better else ''}{', '.join(better)}")
    for query, matches in zip(opt.query, results):
        print(f"\n{query}")
        for rank, match in enumerate(matches, start=1):
            label = "" if match.label is None else f"  {match.label}"
            print(f"{rank:>4}  {match.distance:.4f}  {match.path}{label}")
    labels = [index.gallery.labels[some[0]] if some and index.gallery.labels else None for some in own]
    show_results(opt, model, results, labels, png)
    return results


BETTER = ("whiten", "database_augmentation", "query_expansion", "rerank")  # flags that change the embeddings, or ranks


def search_better(
    opt: argparse.Namespace, model: EmbeddingModel, index: Index, points: torch.Tensor, own: Sequence[Sequence[int]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Searches as the flags of `retrieval` say, with the whole gallery in memory.

    Args:
        opt: the command's flags.
        model: the network.
        index: the gallery.
        points: `(Q, D)` queries.
        own: for each query the positions of its file in the gallery.

    Returns:
        As `Index.search`; with --rerank the distances are those that rank.
    """
    training = embed_training_images(model) if opt.whiten else None
    gallery = torch.from_numpy(index.vectors[index.rows])  # (G, D)
    alike = np.zeros(len(points), np.int64), np.zeros(len(gallery), np.int64)  # labels don't matter
    first = np.array([some[0] if some else -1 for some in own])
    space = evaluate.EmbeddingSpace(points, alike[0], gallery, alike[1], first)
    space = retrieval.chain([change for _, change in retrieval.build_changes(opt, training)])(space)
    found, k = [], opt.k + max(len(some) for some in own)
    for query, positions in enumerate(space.neighbors(np.arange(len(points)), k)):
        positions = positions[~np.isin(positions, own[query])][: opt.k]
        items = torch.from_numpy(positions)
        if space.ranking is None:
            distances = space.distances(torch.full_like(items, query), items)
        else:
            distances = space.ranking(torch.tensor([query]))[0, items]
        found.append((positions, distances.numpy()))
    return found


def embed_training_images(model: EmbeddingModel) -> torch.Tensor:
    """The embeddings `(N, D)` of a run's training images, which are kept in the run folder.

    Raises:
        UserError: they aren't there, or can't be kept.
    """
    try:
        paths = datasets.give_splits(model.opt).train.paths
    except UserError as error:
        raise UserError(f"--whiten is fitted to the run's training images: {error}") from None
    images = Gallery(model.folder, Path(), [os.path.abspath(path) for path in paths])
    index = model.open_index(images, "flat", model.folder / TRAINING_INDEX)
    return torch.from_numpy(index.vectors[index.rows])


TRAINING_INDEX = ".training.index"  # a folder in a run folder


def describe_index(index: Index, k: int) -> str:
    """The size and the kind of an index, and how much it misses."""
    text = f"{counted(len(index), 'image')}, index {index.kind}"
    if index.kind == "flat":
        return f"{text}: exact search"
    k = min(k, len(index) - 1)
    return f"{text}: finds {index.measure_recall(k):.1%} of the {counted(k, 'nearest image')} that exact search finds"


def picture_file(opt: argparse.Namespace) -> Path | None:
    """Where the flags ask for a picture of what is found; None: nowhere.

    Raises:
        UserError: it is in the gallery, where later searches would find it.
    """
    if opt.png is None and opt.html is not None:
        return None
    source = Path(os.path.abspath(opt.gallery))
    png = opt.png or Path(opt.run) / f"search_{source.name.removesuffix('.csv')}.png"
    if source.is_dir() and source.resolve() in png.resolve().parents:
        raise UserError(f"{png} is in the gallery, where later searches would find it: give another --png, or --html")
    return png


def show_results(
    opt: argparse.Namespace,
    model: EmbeddingModel,
    results: Sequence[Sequence[Match]],
    labels: Sequence[str | None],
    png: Path | None,
) -> None:
    """Draws the picture and writes the page that the flags ask for.

    Args:
        opt: the command's flags.
        model: the network.
        results: for each query what was found.
        labels: the queries' labels, where they are known.
        png: the picture, if one is drawn.
    """
    exif = model.opt.exif_orientation
    if opt.html:
        title = f"Search in {Path(opt.gallery).name}"
        report.save_search_page(opt.html, title, list(zip(opt.query, results)), exif)
        print(f"\npage: {opt.html}")
    if png:
        plots.draw_found(png, opt.query, results, labels, exif)
        print(f"\npicture: {png}")


# Embeddings as a file


def add_embed_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags of the command `embed`."""
    # fmt: off
    add_model_arguments(parser)
    add = parser.add_argument_group("embed").add_argument
    add("--images", type=user_path, required=True, metavar="FOLDER|CSV",
        help=f"the images: {FOLDER_OR_CSV}")
    add("--out", type=partial(output_file, tuple(WRITERS)), required=True, metavar="FILE",
        help="FILE.parquet: path, label where there are labels, vector; FILE.csv: path, label, and a column per "
        "dimension; FILE.npy: an array (N, D) float32, with path and label in FILE.csv beside it")
    # fmt: on


def embed_images(opt: argparse.Namespace) -> int:
    """The command `embed`: writes the embeddings of any number of images, and returns how many."""
    gallery = list_images("--images", opt.images)
    refuse_to_replace(opt.images, opt.out, *([opt.out.with_suffix(".csv")] if opt.out.suffix.lower() == ".npy" else []))
    if opt.out.suffix.lower() == ".parquet":
        import_pyarrow()
    model, errors, count = load_for(opt), dict[int, UserError](), 0

    def batches() -> Iterator[tuple[Gallery, np.ndarray]]:
        nonlocal count
        for batch in model.embed_in_batches(gallery.paths):
            errors.update(batch.errors)
            count += len(batch.positions)
            if batch.positions:
                yield gallery.subset(batch.positions), batch.vectors.numpy()
        report_unreadable(gallery.source, gallery.paths, errors)

    WRITERS[opt.out.suffix.lower()](opt.out, batches(), model.net.embed_dim, gallery.labels is not None)
    print(f"{counted(count, 'embedding')} of dimension {model.net.embed_dim}: {opt.out}")
    return count


Batches = Iterator[tuple[Gallery, np.ndarray]]  # of images and their embeddings (B, D)
ROWS_PER_GROUP = 4096  # of a Parquet file


def import_pyarrow() -> Any:
    """The module pyarrow.

    Raises:
        UserError: it can't be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file needs pyarrow: pip install pyarrow, or give a .npy or .csv file") from None
    return pyarrow


def write_parquet(path: Path, batches: Batches, dim: int, has_labels: bool) -> None:
    """Writes embeddings as a Parquet file."""
    pyarrow = import_pyarrow()
    names = ["path", *(["label"] if has_labels else [])]
    columns = [(name, pyarrow.string()) for name in names]
    schema = pyarrow.schema([*columns, ("vector", pyarrow.list_(pyarrow.float32(), dim))])

    def write(waiting: list[tuple[Gallery, np.ndarray]]) -> None:
        texts = zip(*(row for images, _ in waiting for row in images.rows()))
        flat = pyarrow.array(np.concatenate([vectors for _, vectors in waiting]).ravel())
        arrays = [*texts, pyarrow.FixedSizeListArray.from_arrays(flat, dim)]
        writer.write_table(pyarrow.table(arrays, schema=schema))
        waiting.clear()

    with auxiliaries.atomic_write(path) as beside, pyarrow.parquet.ParquetWriter(beside, schema) as writer:
        waiting: list[tuple[Gallery, np.ndarray]] = []
        for batch in batches:
            waiting.append(batch)
            if sum(len(vectors) for _, vectors in waiting) >= ROWS_PER_GROUP:
                write(waiting)
        if waiting:
            write(waiting)


def write_csv(path: Path, batches: Batches, dim: int, has_labels: bool) -> None:
    """Writes embeddings as a CSV file, with as many digits as float32 has."""
    with auxiliaries.atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(["label"] if has_labels else []), *range(dim)])
        for images, vectors in batches:
            writer.writerows([*row, *map(str, vector)] for row, vector in zip(images.rows(), vectors))


def write_npy(path: Path, batches: Batches, dim: int, has_labels: bool) -> None:
    """Writes embeddings as an array `(N, D)` float32, and paths and labels as a CSV file beside it."""
    layout = {"descr": "<f4", "fortran_order": False}
    listed = path.with_suffix(".csv")
    with (
        auxiliaries.atomic_write(listed) as beside_list,
        open(beside_list, "w", newline="", encoding="utf-8") as rows,
        auxiliaries.atomic_write(path) as beside,
        open(beside, "wb") as file,
    ):
        writer, count = csv.writer(rows), 0
        writer.writerow(["path", *(["label"] if has_labels else [])])
        np.lib.format.write_array_header_1_0(file, {**layout, "shape": (0, dim)})  # it has room for any number
        for images, vectors in batches:
            file.write(vectors.astype("<f4").tobytes())
            writer.writerows(images.rows())
            count += len(vectors)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {**layout, "shape": (count, dim)})
    print(f"paths: {listed}")


WRITERS: dict[str, Callable[[Path, Batches, int, bool], None]] = {
    ".parquet": write_parquet,
    ".npy": write_npy,
    ".csv": write_csv,
}


# Pairs: the same or different


def add_pairs_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags of the command `pairs`."""
    # fmt: off
    add_model_arguments(parser)
    group = parser.add_argument_group("pairs")
    add = group.add_argument
    add("--images", type=user_path, nargs=2, metavar=("IMAGE", "IMAGE"), help="two images to compare")
    add("--pairs", type=user_path, metavar="CSV", help="pairs to compare: a CSV file with columns path_a and path_b")
    add("--threshold", type=number(float, 0),
        help="the distance up to which two images are taken for one class (default: the one with the highest balanced "
        "accuracy of the pairs of the run's validation images)")
    add("--out", type=partial(output_file, (".csv",)), metavar="FILE",
        help="write path_a, path_b, distance and same (1 or 0) as a CSV file, too")
    add("--html", type=partial(output_file, (".html", ".htm")), metavar="FILE", help="write a page of the pairs")
    # fmt: on


class Pair(NamedTuple):
    """Two images, and whether they are taken for one class."""

    path_a: str
    path_b: str
    distance: float
    same: bool

    def row(self) -> records.Row:
        """The pair as a row of a table."""
        paths = {name: datasets.printable(getattr(self, name)) for name in ("path_a", "path_b")}
        return {**paths, "distance": self.distance, "same": int(self.same)}


def compare_pairs(opt: argparse.Namespace) -> list[Pair]:
    """The command `pairs`: prints and returns, for pairs of images, whether they show the same class."""
    if (opt.images is None) == (opt.pairs is None):
        raise UserError("which pairs? Give --images IMAGE IMAGE, or --pairs CSV, and not both")
    if opt.pairs is not None and opt.out:
        refuse_to_replace(opt.pairs, opt.out)
    listed = [tuple(opt.images)] if opt.pairs is None else read_pairs(Path(opt.pairs))
    for path in opt.images or ():
        transforms.check_image(path)  # before a threshold is chosen, which takes longer
    model = load_for(opt)
    threshold = give_threshold(model) if opt.threshold is None else opt.threshold
    pairs = measure_pairs(model, listed, threshold, "--images" if opt.images else opt.pairs)
    for pair in pairs:
        print(f"{WORDS[pair.same]:<9}  {pair.distance:.4f}  {pair.path_a}  {pair.path_b}")
    same = sum(pair.same for pair in pairs)
    if len(pairs) > 1:
        print(f"{same} of {len(pairs)} pairs are the same, up to the distance {threshold:.4f}")
    if opt.out:
        records.save_rows(opt.out, [pair.row() for pair in pairs])
        print(f"table: {opt.out}")
    if opt.html:
        intro = f"{same} of {len(pairs)} are taken for pairs of one class: those up to the distance {threshold:.4f}."
        shown = [(one.path_a, one.path_b, f"{WORDS[one.same]}, distance {one.distance:.4f}") for one in pairs]
        title = f"Pairs of images, by {model.folder.name}"
        report.save_pairs_page(opt.html, title, intro, shown, model.opt.exif_orientation)
        print(f"page: {opt.html}")
    return pairs


WORDS = {True: "same", False: "different"}


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The pairs of paths that a CSV file lists; relative ones are relative to its folder.

    Raises:
        UserError: it can't be read, or lists none.
    """
    table = datasets.read_csv(file, ("path_a", "path_b"))
    if not len(table):
        raise UserError(f"{file} has no rows below the names of its columns: list pairs in it")
    one, other = ([str(file.parent / path) for path in table.columns[name]] for name in ("path_a", "path_b"))
    return list(zip(one, other))


def measure_pairs(
    model: EmbeddingModel, listed: Sequence[tuple[str, str]], threshold: float, source: str
) -> list[Pair]:
    """Compares pairs of image files; a notice counts images that can't be read, whose pairs are left out.

    Args:
        model: the network.
        listed: the pairs.
        threshold: the distance up to which two images are taken for one class.
        source: where they are listed.

    Raises:
        UserError: no pair has two images that can be read.
    """
    files = list(dict.fromkeys(file for pair in listed for file in pair))
    vectors, errors = np.empty((len(files), model.net.embed_dim), np.float32), dict[int, UserError]()
    for batch in model.embed_in_batches(files):
        vectors[batch.positions] = batch.vectors.numpy()
        errors.update(batch.errors)
    if errors and len(listed) == 1:
        raise errors[min(errors)]
    report_unreadable(source, files, errors)
    position = {file: i for i, file in enumerate(files) if i not in errors}
    pairs = []
    for one, other in listed:
        if one in position and other in position:
            difference = vectors[position[one]].astype(np.float64) - vectors[position[other]]
            distance = float(np.linalg.norm(difference))
            pairs.append(Pair(one, other, distance, distance <= threshold))
    if not pairs:
        raise UserError(f"in each pair of {source} there is an image that can't be read: correct the paths")
    return pairs


THRESHOLD_FILE = "verification.json"
THRESHOLD_SCHEMA = {
    "type": "object",
    "required": ["network", "threshold", "images", "balanced accuracy"],
    "properties": {
        "network": {"type": "string"},
        "threshold": {"type": "number"},
        "images": {"type": "integer"},
        "balanced accuracy": {"type": "number"},
    },
}


def give_threshold(model: EmbeddingModel) -> float:
    """The distance up to which two images are taken for one class, chosen on the run's validation images.

    It is kept in the run folder, and computed where it isn't there.

    Raises:
        UserError: the run has no validation images, or they can't be read.
    """
    path, found = model.folder / THRESHOLD_FILE, None
    if (known := known_threshold(model.folder)) is not None:
        print(f"threshold {known:.4f}, chosen on the validation images when the run was trained")
        return known
    if path.exists():
        found = auxiliaries.load_json(path)
        auxiliaries.check_schema(path, found, THRESHOLD_SCHEMA, "remove it, and it is made anew")
    if found is None or found["network"] != model.key:
        found = {"network": model.key, **choose_threshold(model)}
        try:
            auxiliaries.save_json(path, found)
        except UserError as error:
            notice(f"the threshold is not kept: {error}")
    print(
        f"threshold {found['threshold']:.4f}, chosen on {found['images']} validation images, of whose pairs "
        f"{found['balanced accuracy']:.1%} are judged rightly (balanced accuracy)"
    )
    return found["threshold"]


def known_threshold(folder: Path) -> float | None:
    """The threshold that a run chose for --eval_metrics, if it did."""
    if not (folder / "summary.json").exists():
        return None
    threshold = runs.read_summary(folder)["selected"].get("val", {}).get("Verification threshold", math.nan)
    return None if math.isnan(threshold) else threshold


def choose_threshold(model: EmbeddingModel) -> dict[str, Any]:
    """The threshold with the highest balanced accuracy of the pairs of a run's validation images; of several sets, the
    mean of theirs.

    Raises:
        UserError: there are none, or no pairs of both kinds.
    """
    try:
        splits = datasets.give_splits(model.opt)
    except UserError as error:
        raise UserError(
            f"a threshold is chosen on the run's validation images, or given by --threshold: {error}"
        ) from None
    if not splits.val:
        raise UserError(
            f"{model.folder} has no validation images to choose a threshold on: give --threshold, or train with "
            "--split_scheme predefined_with_validation"
        )
    runs.check_data(model.folder, config.with_flags(model.opt, accept_changed_data=True), splits)  # a notice, if at all

    def embed_part(images: datasets.ImageSet) -> Points:
        return Points(model.embed(images.paths), images.labels, images.paths)

    spaces = [evaluate.build_space(one.map(embed_part)) for one in splits.val]
    threshold = evaluate.nanmean([evaluate.verification_threshold(space) for space in spaces])
    if math.isnan(threshold):
        raise UserError(
            f"the validation images of {model.folder} have no pairs of one class and of two: give --threshold"
        )
    return {
        "threshold": threshold,
        "images": sum(len(space.query) for space in spaces),
        "balanced accuracy": evaluate.nanmean([space.pairs.accuracy(threshold) for space in spaces]),
    }


# Other programs


def add_export_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags of `export`."""
    # fmt: off
    add = parser.add_argument_group("export").add_argument
    add("--run", type=user_path, required=True, metavar="FOLDER", help="the run folder; its best network is taken")
    add("--format", choices=tuple(export.FORMATS), required=True,
        help="onnx and torchscript: the network as a function of images, (B, 3, H, W) uint8 RGB of the run's "
        "--crop_size, any number of them, which it normalizes itself; safetensors: its weights. All say how to make "
        "the input of a photo, and hold the run's configuration")
    add("--out", type=user_path, required=True, metavar="FILE", help="the file to write; one that is there is replaced")
    add("--source_path", type=user_path, metavar="FOLDER",
        help="where the run's data are, on a few images of which the file is checked (default: where they were)")
    # fmt: on


def export_run(opt: argparse.Namespace) -> float:
    """Writes a run's best network to a file that other programs read; returns how far its embeddings are off.

    Raises:
        UserError: what the user can fix.
    """
    model = load(opt.run, "cpu")
    flags = config.with_flags(model.opt, source_path=opt.source_path) if opt.source_path else model.opt
    return export.export_network(model.net, flags, opt.format, Path(opt.out))


# The command


def add_model_arguments(parser: auxiliaries.FlagParser) -> None:
    """Declares the flags that all commands share."""
    # fmt: off
    add = parser.add_argument_group("network").add_argument
    add("--run", type=user_path, required=True, metavar="FOLDER", help="the run folder; its best network is taken")
    add("--gpu", type=number(int, -1), default=0, help="number of the CUDA device; -1: the CPU")
    add("--bs", type=number(int, 1), help="images that are embedded at once (default: as in the run's evaluation)")
    # fmt: on


def output_file(suffixes: Sequence[str], text: str) -> Path:
    """An argparse type: a file to be written, with one of these suffixes, in a folder that exists."""
    path = Path(user_path(text))
    if path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"{auxiliaries.shown(text)} does not end with {' or '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{auxiliaries.shown(text)} is not the name of a file in a folder that exists")
    return path


def list_images(flag: str, source: str) -> Gallery:
    """The images of a flag, see `index.list_gallery`.

    Raises:
        UserError: it says nothing, which would stand for the current folder, or contains no images.
    """
    if not source:
        raise UserError(f"{flag} is empty: give a folder of images, or a CSV file that lists them")
    return list_gallery(Path(source))


def refuse_to_replace(source: str, *written: Path) -> None:
    """Makes sure that no file that is written is the one that lists the images.

    Raises:
        UserError: one is.
    """
    for path in written:
        if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"--out would replace {path}, which lists the images: give another name")


def load_for(opt: argparse.Namespace) -> EmbeddingModel:
    """The network that a command's flags name."""
    return replace(load(opt.run, auxiliaries.pick_device(opt.gpu)), bs=opt.bs)


class Command(NamedTuple):
    """A command: what it does, its flags, and the function that does it."""

    help: str
    add_arguments: Callable[[auxiliaries.FlagParser], None]
    run: Callable[[argparse.Namespace], Any]


COMMANDS = {
    "search": Command("find the nearest images of a gallery", add_search_arguments, search_images),
    "embed": Command("write the embeddings of images to a file", add_embed_arguments, embed_images),
    "pairs": Command("tell whether two images show the same class", add_pairs_arguments, compare_pairs),
    "export": Command("write the network to a file for other programs", add_export_arguments, export_run),
}


def build_parser() -> auxiliaries.FlagParser:
    """The parser of all commands."""
    description = "Puts the best network of a run to use. `python inference.py COMMAND --help` lists a command's flags."
    parser = auxiliaries.FlagParser(prog="inference.py", description=description)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=auxiliaries.CommandParser
    )
    for name, command in COMMANDS.items():
        sentence = f"{command.help[0].upper()}{command.help[1:]}."
        command.add_arguments(commands.add_parser(name, help=command.help, description=sentence))
    return parser


def main(argv: Sequence[str] | None = None) -> Any:
    """Does what a command line asks for, and returns what was found.

    Raises:
        UserError: what the user can fix.
    """
    opt = build_parser().parse_args(argv)
    return COMMANDS[opt.command].run(opt)


if __name__ == "__main__":
    auxiliaries.run_command(main)
