"""An index of a gallery: the embeddings of its images, kept on disk, brought up to date, and searched.

Its folder holds `index.db`, which says which image is in which row, and a file of vectors, to which rows are only
appended, so that what was embedded before a crash or Ctrl-C is kept; for large galleries also an index of faiss.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
from auxiliaries import UserError, atomic_write, counted, disk_advice, locked, notice
from datasets import printable
from evaluate import import_faiss
from transforms import split_box, with_box

VERSION = 1  # of the files
DATABASE = "index.db"
KINDS = ("flat", "hnsw", "ivfpq")
HNSW_FROM, IVFPQ_FROM = 100_000, 1_000_000  # images from which on a kind is chosen
COMMIT_EVERY = 2048  # images that are embedded between two states on disk
ROWS_AT_ONCE, QUERIES_AT_ONCE = 2**14, 2**9  # of exact search
FETCHED = 4  # times as many as are wanted are taken from faiss, whose distances are not exact
RECALL_QUERIES = 100  # images of the gallery by which an index of faiss is compared with exact search
NAMED = 5  # unreadable images in a message

TABLES = """
CREATE TABLE state (name TEXT PRIMARY KEY, value);
CREATE TABLE files (name BLOB PRIMARY KEY, size INTEGER, changed INTEGER, row INTEGER UNIQUE);
CREATE TABLE segments (start INTEGER PRIMARY KEY, count INTEGER, checksum INTEGER);
"""


# Galleries


@dataclass(frozen=True)
class Gallery:
    """Images to search in, or to embed.

    Attributes:
        source: the folder or the CSV file that lists them.
        root: the folder that `names` are relative to.
        names: N image files.
        labels: N class names; None where the images have none.
    """

    source: Path
    root: Path
    names: Sequence[str]
    labels: Sequence[str] | None = None

    def subset(self, positions: Sequence[int]) -> Gallery:
        """Some of the images."""
        labels = None if self.labels is None else [self.labels[i] for i in positions]
        return Gallery(self.source, self.root, [self.names[i] for i in positions], labels)

    def rows(self) -> Iterator[list[str]]:
        """For each image its path and, where they have labels, its label, as text."""
        for i, path in enumerate(self.paths):
            yield [printable(path), *([] if self.labels is None else [self.labels[i]])]

    def path(self, position: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, self.names[position])

    @property
    def paths(self) -> list[str]:
        """N paths."""
        return [os.path.join(self.root, name) for name in self.names]


def list_gallery(source: Path) -> Gallery:
    """Lists the images of a folder, with all folders in it, or of a CSV file with columns `path` and perhaps `label`.

    Images in a folder have its subfolders' names as labels where each of them is in a subfolder of its own class,
    `<class>/<image>`. Hidden files and folders are left out.

    Raises:
        UserError: it is neither, or contains no images.
    """
    if source.is_dir():
        names = sorted(_walk(source))
        parts = [os.path.split(name) for name in names]
        is_by_class = all(parent and os.sep not in parent for parent, _ in parts)
        labels = [printable(parent) for parent, _ in parts] if is_by_class else None
        gallery = Gallery(source, source, names, labels)
    elif source.suffix.lower() == ".csv":
        gallery = _read_csv(source)
    elif source.exists():
        raise UserError(f"{source} is neither a folder of images nor a CSV file that lists them")
    else:
        raise UserError(f"{source} does not exist: give a folder of images, or a CSV file that lists them")
    if not gallery.names:
        suffixes = ", ".join(sorted(datasets.IMAGE_SUFFIXES))
        raise UserError(f"{source} contains no images (files that end with {suffixes}): give another folder")
    return gallery


def _walk(root: Path) -> Iterator[str]:
    """The names of all images in a folder and the folders in it, relative to it; links to folders are followed once."""
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} can't be read ({error.strerror}): see to its permissions")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        is_new = os.path.realpath(folder) not in seen
        subfolders[:] = sorted(name for name in subfolders if is_new and not name.startswith("."))
        if not is_new:
            continue
        seen.add(os.path.realpath(folder))
        at = os.path.relpath(folder, root)
        yield from (os.path.normpath(os.path.join(at, file)) for file in files if datasets.has_image_suffix(file))


def _read_csv(file: Path) -> Gallery:
    """A gallery from a CSV file like that of a dataset; relative paths are relative to its folder.

    Raises:
        UserError: it can't be read, lists no images, or an image with two labels.
    """
    table = datasets.read_csv(file, ("path",), datasets.CSV_COLUMNS)
    if not len(table):
        raise UserError(f"{file} has no rows below the names of its columns: list images in it")
    boxes = datasets.read_boxes(table)
    listed = [path if box is None else with_box(path, box) for path, box in zip(table.columns["path"], boxes)]
    gallery = Gallery(file, file.parent, listed, table.columns.get("label"))
    origins = [f"row {row} of {file}" for row in table.rows]
    _, kept = datasets.check_repeats(gallery.paths, gallery.labels or [""] * len(listed), [""] * len(listed), origins)
    return gallery.subset(kept)


# The index


@dataclass(frozen=True)
class Embedded:
    """Some images of a sequence, embedded.

    Attributes:
        positions: those of the images that could be read, in the sequence.
        vectors: `(P, D)` float32, on the CPU.
        errors: why others can't be read, by their positions.
    """

    positions: Sequence[int]
    vectors: torch.Tensor
    errors: Mapping[int, UserError]


Embed = Callable[[Sequence[str]], Iterator[Embedded]]  # paths to their embeddings, batch after batch


class Index:
    """The embeddings of a gallery's images, to be searched.

    Args:
        gallery: the images that could be read.
        vectors: `(R, D)` float32, mapped into memory; some rows are of images that are gone.
        rows: `(N,)` the row of each image.
        states: `(N, 2)` size and time of change of their files.
        kind: one of `KINDS`.
        faiss_index: of the rows, for another kind than flat.
    """

    def __init__(
        self,
        gallery: Gallery,
        vectors: np.ndarray,
        rows: np.ndarray,
        states: np.ndarray,
        kind: str,
        faiss_index: Any = None,
    ):
        self.gallery, self.vectors, self.rows, self.states = gallery, vectors, rows, states
        self.kind, self.faiss_index = kind, faiss_index
        self.position = np.full(len(vectors), -1, np.int64)  # (R,) of the image in the gallery; -1: it is gone
        self.position[rows] = np.arange(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, path: str) -> list[int]:
        """The positions of an image in the gallery: several where links give its file several names."""
        file, box = split_box(path)
        state = os.stat(file)
        alike = (self.states == (state.st_size, state.st_mtime_ns)).all(axis=1)  # (N,), which spares asking for each
        found = [(position, *split_box(self.gallery.path(position))) for position in np.flatnonzero(alike).tolist()]
        return [position for position, one, part in found if part == box and os.path.samefile(one, file)]

    def search(
        self, queries: torch.Tensor, k: int, own: Sequence[Sequence[int]] | None = None, exact: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Finds the nearest images.

        Args:
            queries: `(Q, D)` float32.
            k: how many; fewer where the gallery doesn't have that many.
            own: for each query the positions in the gallery that it does not find, since they are its own.
            exact: whether to compare with all images, whatever the kind.

        Returns:
            For each query positions in the gallery `(k,)`, nearest first, and distances `(k,)` float64.
        """
        found: list[tuple[np.ndarray, np.ndarray]] = []
        own = [()] * len(queries) if own is None else own
        count = min(k + max(map(len, own), default=0), len(self.rows))
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            rows = self._nearest(part, count) if exact or self.faiss_index is None else self._from_faiss(part, count)
            for query, candidates, itself in zip(part.double().numpy(), rows, own[start:]):
                found.append(self._rank(query, candidates, k, itself))
        return found

    def _nearest(self, queries: torch.Tensor, count: int) -> np.ndarray:
        """The rows `(Q, count)` nearest to each query, by comparison with all."""
        points = queries.double()  # (Q, D)
        nearest = torch.full((len(points), 0), torch.inf, dtype=torch.float64)  # (Q, count)
        rows = torch.empty(len(points), 0, dtype=torch.int64)
        for start in range(0, len(self.vectors), ROWS_AT_ONCE):
            part = torch.from_numpy(self.vectors[start : start + ROWS_AT_ONCE].astype(np.float64))  # (P, D)
            scores = part.square().sum(dim=1) - 2 * points @ part.T  # (Q, P)
            scores[:, torch.from_numpy(self.position[start : start + ROWS_AT_ONCE] < 0)] = torch.inf
            nearest = torch.cat([nearest, scores], dim=1)
            rows = torch.cat([rows, torch.arange(start, start + len(part)).expand(len(points), -1)], dim=1)
            nearest, order = nearest.topk(min(count, nearest.shape[1]), largest=False)
            rows = rows.gather(1, order)
        return rows.numpy()

    def _from_faiss(self, queries: torch.Tensor, count: int) -> np.ndarray:
        """Rows that are likely to be the nearest to each query; -1 where there are fewer."""
        gone = len(self.vectors) - len(self.rows)
        wanted = min(len(self.vectors), FETCHED * count + (FETCHED * count * gone) // len(self.vectors))
        if self.kind == "hnsw":
            self.faiss_index.hnsw.efSearch = max(64, 2 * wanted)
        return self.faiss_index.search(np.ascontiguousarray(queries.numpy()), wanted)[1]

    def _rank(self, query: np.ndarray, rows: np.ndarray, k: int, own: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of candidate rows, as positions, with their distances."""
        positions = self.position[rows[rows >= 0]]
        positions = np.sort(positions[(positions >= 0) & ~np.isin(positions, own)])  # equally near: in gallery order
        distances = np.linalg.norm(self.vectors[self.rows[positions]] - query, axis=1)
        order = np.argsort(distances, kind="stable")[:k]
        return positions[order], distances[order]

    def measure_recall(self, k: int, seed: int = 0) -> float:
        """Share of the k nearest images that the index finds, over images of the gallery as queries."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:RECALL_QUERIES]
        queries = torch.from_numpy(self.vectors[self.rows[chosen]])
        own, shares = chosen[:, None].tolist(), []
        for (_, found), (_, nearest) in zip(self.search(queries, k, own), self.search(queries, k, own, True)):
            if len(nearest):  # of equally near ones any counts
                shares.append((found <= nearest[-1] * (1 + 1e-9)).sum() / len(nearest))
        return float(np.mean(shares)) if shares else math.nan


def choose_kind(num_images: int) -> str:
    """The kind of index for a gallery of that size: exact search while it is quick, then what needs less memory."""
    kind = "flat" if num_images < HNSW_FROM else "hnsw" if num_images < IVFPQ_FROM else "ivfpq"
    return kind if kind == "flat" or import_faiss() else "flat"


def default_folder(source: Path) -> Path:
    """Where the index of a gallery is kept: a hidden folder beside it."""
    path = Path(os.path.abspath(source))  # which leaves no `..` at its end
    return path.parent / f".{path.name}.index"


def open_index(gallery: Gallery, folder: Path, key: str, dim: int, embed: Embed, kind: str | None = None) -> Index:
    """A gallery's index, brought up to date: only images that are new, or have changed, are embedded.

    Args:
        gallery: the images.
        folder: of the index; it is made where there is none.
        key: says by which network, and after which transform, images are embedded; an index of another one is made
            anew.
        dim: dimension D of embeddings.
        embed: embeds images.
        kind: one of `KINDS` (default: by the number of images).

    Raises:
        UserError: the folder can't be written to, no image can be read, or there is no faiss for the kind.
    """
    if kind not in (None, "flat") and not import_faiss():
        raise UserError(f"--index {kind} needs faiss, which can't be imported: install faiss-cpu, or give --index flat")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), _Store(folder, key, dim) as store:
            store.update(gallery, embed)
            return store.give_index(gallery, kind)
    except OSError as error:
        raise _refused(folder, error) from None
    except sqlite3.Error as error:
        raise UserError(f"{folder / DATABASE} can't be used ({error}): {disk_advice(OSError())}") from None


def _refused(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"the index {folder} can't be written ({error.strerror}): {disk_advice(error)} (--index_path names its folder)"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder, and waits for those that are there; one that can't be written to is only
    read."""
    if not _is_writable(folder):
        yield
        return
    try:
        with locked(folder):
            pass
    except UserError:
        notice(f"another process is at work on the index {folder}: waiting for it")
    with locked(folder, wait=True):
        yield


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK)


class _Store:
    """The files of an index, while no other process changes them."""

    def __init__(self, folder: Path, key: str, dim: int):
        self.folder, self.key, self.dim = folder, key, dim
        self.is_writable = _is_writable(folder)
        self.waiting: list[tuple[bytes, int, int, int]] = []  # rows of `files` that are still to be written
        self.checksum = 0  # of their vectors

    def __enter__(self) -> _Store:
        self.database, problem = self._connect(), None
        if self.is_there:
            try:
                self.state = dict(self.database.execute("SELECT name, value FROM state"))
                problem = self._find_problem()
            except (sqlite3.DatabaseError, OSError, KeyError, TypeError, ValueError) as error:
                problem = f"is damaged ({error})"
        if problem:
            notice(f"the index {self.folder} {problem}: it is made anew")
        if problem or not self.is_there:
            self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.database.close()

    @property
    def is_there(self) -> bool:
        return (self.folder / DATABASE).exists() and (self.folder / DATABASE).stat().st_size > 0

    def _connect(self) -> sqlite3.Connection:
        if not self.is_writable and not self.is_there:
            raise PermissionError(13, "Permission denied")
        mode = "rwc" if self.is_writable else "ro&immutable=1"
        return sqlite3.connect(f"{(self.folder / DATABASE).absolute().as_uri()}?mode={mode}", uri=True, timeout=60)

    def _find_problem(self) -> str | None:
        """What keeps the files from being used, in words."""
        if self.state["version"] != VERSION:
            return "is of another version of this repository"
        if self.state["key"] != self.key or self.state["dim"] != self.dim:
            return "is of another network or transform (--index_path FOLDER keeps one for each)"
        rows = self.num_rows
        size = (self.folder / self.state["vectors"]).stat().st_size
        if size < 4 * self.dim * rows:
            return f"is damaged ({self.state['vectors']} has {size} bytes)"
        vectors, covered = self.map_vectors(), 0
        for start, count, checksum in self.database.execute("SELECT start, count, checksum FROM segments"):
            if zlib.crc32(vectors[start : start + count].data) != checksum:
                return f"is damaged ({self.state['vectors']} has a wrong checksum)"
            covered += count
        count, last = self.database.execute("SELECT count(*), max(row) FROM files").fetchone()
        return (
            None if covered == rows and (last or 0) < max(rows, 1) and count <= rows else "is damaged (it lacks rows)"
        )

    def _begin(self) -> None:
        """Makes empty files in place of what is there."""
        if not self.is_writable:
            raise PermissionError(13, "Permission denied")
        self.database.close()
        for file in self.folder.iterdir():
            if re.match(rf"({re.escape(DATABASE)}|vectors-[0-9a-f]{{12}})(\W|$)", file.name):  # not what is the user's
                file.unlink()
        self.database = self._connect()
        self.database.executescript(TABLES)
        self.state = {"version": VERSION, "key": self.key, "dim": self.dim, "rows": 0, "vectors": _new_name()}
        (self.folder / self.state["vectors"]).touch()
        with self.database:
            self.database.executemany("INSERT INTO state VALUES (?, ?)", self.state.items())

    @property
    def num_rows(self) -> int:
        """Rows of the file of vectors that count."""
        return self.state["rows"]

    def map_vectors(self) -> np.ndarray:
        """`(R, D)` the vectors, mapped into memory."""
        shape = (self.num_rows, self.dim)
        if not self.num_rows:
            return np.empty(shape, np.float32)
        return np.memmap(self.folder / self.state["vectors"], np.float32, "r", shape=shape)

    def _set(self, **state: Any) -> None:
        """Changes the state, in the transaction that is open."""
        self.state |= state
        self.database.executemany("REPLACE INTO state VALUES (?, ?)", state.items())

    # Bringing up to date

    def update(self, gallery: Gallery, embed: Embed) -> None:
        """Drops images that are gone or have changed, and embeds those that are new."""
        known = {
            bytes(name): (size, changed)
            for name, size, changed in self.database.execute("SELECT name, size, changed FROM files")
        }
        errors: dict[int, UserError] = {}
        sizes: dict[int, tuple[int, int]] = {}  # and times of change, of images to embed
        for position, name in enumerate(gallery.names):
            try:
                status = os.stat(split_box(gallery.path(position))[0])
            except OSError as error:
                errors[position] = UserError(f"{gallery.path(position)} can't be read ({error.strerror})")
                continue
            size = status.st_size, status.st_mtime_ns
            if known.get(os.fsencode(name)) == size:
                del known[os.fsencode(name)]
            else:
                sizes[position] = size
        if (known or sizes) and not self.is_writable:
            raise PermissionError(13, "Permission denied")
        with self.database:
            self.database.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in known])
        before = self.num_rows
        self._embed(gallery, sizes, embed, errors)
        if self.num_rows > before:
            kept = f"{self.folder} keeps that for later searches"
            embedded = f"{self.num_rows - before:,} of {counted(len(gallery.names), 'image')}"
            notice(f"{embedded} {'was' if self.num_rows == before + 1 else 'were'} embedded: {kept}")
        if 4 * self._count_files() < 3 * self.num_rows:
            self._compact()
        report_unreadable(gallery.source, gallery.paths, errors)

    def _embed(
        self, gallery: Gallery, sizes: Mapping[int, tuple[int, int]], embed: Embed, errors: dict[int, UserError]
    ) -> None:
        """Embeds images, and adds why others can't be read; what is done is kept, whatever ends it."""
        new = list(sizes)
        if not new:
            return
        with open(self.folder / self.state["vectors"], "r+b") as file:
            file.seek(4 * self.dim * self.num_rows)
            try:
                for batch in embed([gallery.path(position) for position in new]):
                    content = batch.vectors.numpy().astype(np.float32).tobytes()
                    file.write(content)
                    self.checksum = zlib.crc32(content, self.checksum)
                    for i in batch.positions:
                        row = self.num_rows + len(self.waiting)
                        self.waiting.append((os.fsencode(gallery.names[new[i]]), *sizes[new[i]], row))
                    errors |= {new[i]: error for i, error in batch.errors.items()}
                    if len(self.waiting) >= COMMIT_EVERY:
                        self._commit(file)
            finally:
                self._commit(file)

    def _commit(self, file: Any) -> None:
        """Makes what was embedded count."""
        if not self.waiting:
            return
        file.flush()
        os.fsync(file.fileno())
        count = len(self.waiting)
        with self.database:
            segment = self.num_rows, count, self.checksum
            self.database.execute("INSERT INTO segments VALUES (?, ?, ?)", segment)
            self.database.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", self.waiting)
            self._set(rows=self.num_rows + count)
        self.waiting, self.checksum = [], 0

    def _count_files(self) -> int:
        return self.database.execute("SELECT count(*) FROM files").fetchone()[0]

    def _compact(self) -> None:
        """Rewrites the vectors without those of images that are gone."""
        kept = self.database.execute("SELECT name, row FROM files ORDER BY row").fetchall()
        rows, vectors = np.array([row for _, row in kept], np.int64), self.map_vectors()
        old, name, segments = self.state["vectors"], _new_name(), []
        with atomic_write(self.folder / name) as beside, open(beside, "wb") as file:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                content = vectors[rows[start : start + ROWS_AT_ONCE]].tobytes()
                file.write(content)
                segments.append((start, len(content) // (4 * self.dim), zlib.crc32(content)))
        with self.database:
            self.database.execute("DELETE FROM segments")
            self.database.executemany("INSERT INTO segments VALUES (?, ?, ?)", segments)
            self.database.execute("UPDATE files SET row = -1 - row")  # rows are unique at each moment
            self.database.executemany(
                "UPDATE files SET row = ? WHERE name = ?", [(row, file) for row, (file, _) in enumerate(kept)]
            )
            self._set(rows=len(rows), vectors=name)
        for path in self.folder.glob(f"{old}*"):
            path.unlink()

    # Giving

    def give_index(self, gallery: Gallery, kind: str | None) -> Index:
        """The index of the images that could be read."""
        files = self.database.execute("SELECT name, row, size, changed FROM files")
        known = {bytes(name): of_file for name, *of_file in files}
        there = [i for i, name in enumerate(gallery.names) if os.fsencode(name) in known]
        readable = gallery.subset(there)
        of_files = np.array([known[os.fsencode(name)] for name in readable.names], np.int64).reshape(-1, 3)
        rows = of_files[:, 0]
        kind = "flat" if len(rows) < 2 else kind or choose_kind(len(rows))  # faiss needs two to train on
        faiss_index = None if kind == "flat" else self._give_faiss_index(kind)
        return Index(readable, self.map_vectors(), rows, of_files[:, 1:], kind, faiss_index)

    def _give_faiss_index(self, kind: str) -> Any:
        """faiss's index of all rows: from its file, to which new rows are added, or built."""
        faiss, vectors = import_faiss(), self.map_vectors()
        file = self.folder / f"{self.state['vectors']}.{kind}"
        faiss_index = self._read_faiss_index(faiss, file, kind)
        if faiss_index is not None and faiss_index.ntotal == len(vectors):
            return faiss_index
        if faiss_index is None:
            notice(f"building an index for quick search among {len(vectors):,} images ({kind})")
            faiss_index = _build_faiss_index(faiss, vectors, kind)
        for start in range(faiss_index.ntotal, len(vectors), ROWS_AT_ONCE):
            faiss_index.add(np.ascontiguousarray(vectors[start : start + ROWS_AT_ONCE]))
        if self.is_writable:
            with atomic_write(file) as beside:
                faiss.write_index(faiss_index, str(beside))
                checksum = _checksum(beside)
            with self.database:
                self._set(**{f"checksum of {kind}": checksum})
        return faiss_index

    def _read_faiss_index(self, faiss: Any, file: Path, kind: str) -> Any:
        """faiss's index from its file; None where it has to be built."""
        if not file.exists():
            return None
        try:
            if _checksum(file) != self.state.get(f"checksum of {kind}"):
                raise ValueError("wrong checksum")
            faiss_index = faiss.read_index(str(file))
        except (RuntimeError, OSError, ValueError) as error:
            notice(f"{file} is damaged ({str(error).splitlines()[0]}): it is made anew")
            return None
        outgrown = kind == "ivfpq" and _num_lists(self.num_rows) > 2 * faiss_index.nlist
        return None if outgrown or faiss_index.ntotal > self.num_rows else faiss_index


def _new_name() -> str:
    """A file of vectors: each has a name of its own, so that a process that still reads another one isn't disturbed."""
    return f"vectors-{secrets.token_hex(6)}"


def _checksum(file: Path) -> int:
    checksum = 0
    with open(file, "rb") as opened:
        while part := opened.read(2**24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _num_lists(num_rows: int) -> int:
    """The lists that ivfpq divides vectors into."""
    return max(1, min(round(4 * math.sqrt(num_rows)), num_rows // 39))  # faiss wants 39 for each to train on


def _build_faiss_index(faiss: Any, vectors: np.ndarray, kind: str) -> Any:
    """An empty index, trained on these vectors `(R, D)`."""
    dim = vectors.shape[1]
    if kind == "hnsw":
        faiss_index = faiss.IndexHNSWFlat(dim, 32)
        faiss_index.hnsw.efConstruction = 80
        return faiss_index
    num_lists = _num_lists(len(vectors))
    parts = next(
        parts for parts in range(-(-dim // 4), dim + 1) if dim % parts == 0
    )  # of about 4 dimensions, a byte each
    bits = max(1, min(8, int(math.log2(max(2, len(vectors))))))
    faiss_index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dim), dim, num_lists, parts, bits)
    faiss_index.cp.min_points_per_centroid = faiss_index.pq.cp.min_points_per_centroid = 1  # small ones are for tests
    faiss_index.nprobe = max(8, num_lists // 16)
    count = min(len(vectors), max(64 * num_lists, 2**14))
    chosen = np.sort(np.random.default_rng(0).permutation(len(vectors))[:count])
    faiss_index.train(np.ascontiguousarray(vectors[chosen]))
    return faiss_index


def report_unreadable(source: Path | str, paths: Sequence[str], errors: Mapping[int, UserError]) -> None:
    """Says which of a source's images can't be read, and how many, by their positions.

    Raises:
        UserError: none can be.
    """
    if not errors:
        return
    first = errors[min(errors)]
    if len(paths) == 1:
        raise first
    if len(errors) == len(paths):
        raise UserError(f"none of the {len(errors):,} images of {source} can be read, of which the first is: {first}")
    names = [printable(paths[position]) for position in sorted(errors)[1 : 1 + NAMED]]
    more = f"; likewise {', '.join(names)}" if names else ""
    more += f" and {len(errors) - 1 - len(names):,} more" if len(errors) > 1 + len(names) else ""
    left_out = f"{'is' if len(errors) == 1 else 'are'} left out"
    notice(f"{len(errors):,} of {len(paths):,} images can't be read and {left_out}: {first}{more}")
