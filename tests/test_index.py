"""The index of a gallery: what is embedded anew and what is not, exact and quick search, and damaged files."""

from __future__ import annotations

import multiprocessing
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tree

import index
from auxiliaries import UserError
from index import Embedded, Index, list_gallery, open_index

DIM, BATCH = 8, 4


def vector_of(path: Path | str) -> np.ndarray:
    """What stands for the embedding of a file: a function of its content."""
    return np.random.default_rng(list(Path(path).read_bytes())).normal(size=DIM).astype(np.float32)


class Embedder:
    """Embeds files in batches, and remembers which; a file that begins with `cut` can't be read."""

    def __init__(self, stop_after: int | None = None):
        self.embedded: list[str] = []
        self.stop_after = stop_after

    def __call__(self, paths: Sequence[str]) -> Iterator[Embedded]:
        for start in range(0, len(paths), BATCH):
            if self.stop_after is not None and len(self.embedded) >= self.stop_after:
                raise KeyboardInterrupt
            some = range(start, min(start + BATCH, len(paths)))
            errors = {i: UserError(f"{paths[i]} is cut off") for i in some if Path(paths[i]).read_bytes()[:3] == b"cut"}
            readable = [i for i in some if i not in errors]
            self.embedded += [os.path.basename(paths[i]) for i in readable]
            vectors = torch.from_numpy(np.array([vector_of(paths[i]) for i in readable], np.float32))
            yield Embedded(readable, vectors.reshape(-1, DIM), errors)


def make_files(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:03}.png").write_text(f"image {number}")
    return folder


Open = Callable[..., tuple[Index, list[str]]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_files(tmp_path / "photos", 30)


@pytest.fixture
def reopen(photos: Path) -> Open:
    """A function that brings the index of photos up to date, and says which files were embedded for that."""

    def reopen(key: str = "net", kind: str | None = None) -> tuple[Index, list[str]]:
        embed = Embedder()
        opened = open_index(list_gallery(photos), index.default_folder(photos), key, DIM, embed, kind)
        assert sorted(opened.gallery.names) == sorted(path.name for path in photos.iterdir())
        for i, name in enumerate(opened.gallery.names):
            assert np.array_equal(opened.vectors[opened.rows[i]], vector_of(photos / name))
        return opened, embed.embedded

    return reopen


def nearest_by_hand(photos: Path, query: np.ndarray, k: int, own: str = "") -> list[tuple[str, float]]:
    files = sorted(path for path in photos.iterdir() if path.name != own)
    distances = [float(np.linalg.norm(vector_of(file).astype(float) - query)) for file in files]
    return [(files[i].name, distances[i]) for i in np.argsort(distances, kind="stable")[:k]]


QUERIES = torch.from_numpy(np.random.default_rng(1).normal(size=(5, DIM)).astype(np.float32))


def check_search(opened: Index, photos: Path, k: int = 7) -> None:
    for query, (positions, distances) in zip(QUERIES.numpy(), opened.search(QUERIES, k)):
        expected = nearest_by_hand(photos, query, k)
        assert [opened.gallery.names[i] for i in positions] == [name for name, _ in expected]
        assert distances == pytest.approx([distance for _, distance in expected], rel=1e-12)


# What is embedded


def test_only_what_is_new_or_has_changed_is_embedded(
    photos: Path, reopen: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, embedded = reopen()
    assert embedded == [f"{number:03}.png" for number in range(30)]
    assert "30 of 30 images were embedded" in capsys.readouterr().err
    check_search(opened, photos)
    assert reopen()[1] == []
    assert capsys.readouterr().err == ""
    make_files(photos, 2, first=40)
    (photos / "003.png").write_text("another one")  # another size
    (photos / "004.png").write_text("image 7")  # the same size, another time
    os.utime(photos / "004.png", ns=(1, 1))
    (photos / "005.png").unlink()
    opened, embedded = reopen()
    assert embedded == ["003.png", "004.png", "040.png", "041.png"]
    check_search(opened, photos)
    assert reopen()[1] == []


def test_rows_of_images_that_are_gone_are_dropped(photos: Path, reopen: Open) -> None:
    reopen()
    for number in range(5, 25):
        (photos / f"{number:03}.png").unlink()
    for _ in range(2):
        opened, embedded = reopen()
        assert embedded == []
        assert opened.vectors.shape == (10, DIM)
        check_search(opened, photos)
    assert len(list(index.default_folder(photos).glob("vectors-*"))) == 1


def test_what_was_embedded_before_a_stop_is_kept(photos: Path, reopen: Open) -> None:
    folder = index.default_folder(photos)
    stopped = Embedder(stop_after=12)
    with pytest.raises(KeyboardInterrupt):
        open_index(list_gallery(photos), folder, "net", DIM, stopped)
    with open(next(folder.glob("vectors-*")), "ab") as file:
        file.write(b"half a row")  # as a process that was killed leaves it
    opened, embedded = reopen()
    assert len(stopped.embedded) == 12
    assert len(embedded) == 18
    assert not set(embedded) & set(stopped.embedded)
    check_search(opened, photos)


def test_states_between_are_written_while_embedding(
    photos: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "COMMIT_EVERY", 8)
    reopen()
    with sqlite3.connect(index.default_folder(photos) / index.DATABASE) as database:
        segments = database.execute("SELECT start, count FROM segments").fetchall()
    assert segments == [(0, 8), (8, 8), (16, 8), (24, 6)]
    assert reopen()[1] == []


def open_in_process(photos: Path, results: Path) -> None:
    embed = Embedder()
    open_index(list_gallery(photos), index.default_folder(photos), "net", DIM, embed)
    results.write_text("\n".join(embed.embedded))


def test_two_processes_embed_each_image_once(photos: Path, tmp_path: Path, reopen: Open) -> None:
    context = multiprocessing.get_context("fork")
    outputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    processes = [context.Process(target=open_in_process, args=(photos, output)) for output in outputs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(len(output.read_text().split()) for output in outputs) == [0, 30]
    assert reopen()[1] == []


def test_an_index_that_another_process_rewrites_can_still_be_searched(photos: Path, reopen: Open) -> None:
    before, _ = reopen()
    found = before.search(QUERIES, 5)
    for number in range(20):
        (photos / f"{number:03}.png").unlink()
    reopen()
    for (positions, _), (again, _) in zip(found, before.search(QUERIES, 5)):
        assert np.array_equal(positions, again)


# Files that can't be used


def spoil_database(folder: Path) -> None:
    (folder / index.DATABASE).write_bytes(b"not a database" * 100)


def spoil_tables(folder: Path) -> None:
    with sqlite3.connect(folder / index.DATABASE) as database:
        database.execute("DROP TABLE files")


def drop_rows(folder: Path) -> None:
    with sqlite3.connect(folder / index.DATABASE) as database:
        database.execute("DELETE FROM segments")


def change_version(folder: Path) -> None:
    with sqlite3.connect(folder / index.DATABASE) as database:
        database.execute("UPDATE state SET value = 99 WHERE name = 'version'")


def flip_a_bit(folder: Path) -> None:
    path = next(folder.glob("vectors-*"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def cut_vectors(folder: Path) -> None:
    path = next(folder.glob("vectors-*"))
    path.write_bytes(path.read_bytes()[:-1])


def remove_vectors(folder: Path) -> None:
    next(folder.glob("vectors-*")).unlink()


SPOILS = [
    (spoil_database, "is damaged"),
    (spoil_tables, "is damaged"),
    (drop_rows, "is damaged"),
    (change_version, "is of another version of this repository"),
    (flip_a_bit, "has a wrong checksum"),
    (cut_vectors, "is damaged"),
    (remove_vectors, "is damaged"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILS)
def test_a_damaged_index_is_made_anew(
    photos: Path, reopen: Open, spoil: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reopen()
    folder = index.default_folder(photos)
    spoil(folder)
    capsys.readouterr()
    opened, embedded = reopen()
    notice, *_ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"notice: the index {folder} .*{words}.*: it is made anew", notice)
    assert len(embedded) == 30
    check_search(opened, photos)
    assert reopen()[1] == []


def test_an_index_of_another_network_is_made_anew(
    photos: Path, reopen: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    reopen("one")
    assert len(reopen("other")[1]) == 30
    assert (
        "is of another network or transform (--index_path FOLDER keeps one for each): it is made anew"
        in capsys.readouterr().err
    )
    assert reopen("other")[1] == []


def test_files_of_others_stay_where_an_index_is_begun(photos: Path, reopen: Open) -> None:
    folder = index.default_folder(photos)
    folder.mkdir()
    for name in ("vectors-of-mine.npy", "index.dbase"):
        (folder / name).write_text("precious")
    reopen("one")
    before = set(folder.iterdir())
    reopen("other")
    assert len(set(folder.iterdir())) == len(before)  # the old vectors are gone
    assert (folder / "vectors-of-mine.npy").read_text() == (folder / "index.dbase").read_text() == "precious"


def test_an_index_that_can_only_be_read(photos: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    reopen()
    monkeypatch.setattr(index, "_is_writable", lambda folder: False)
    opened, embedded = reopen()
    assert embedded == []
    check_search(opened, photos)
    make_files(photos, 1, first=50)
    with pytest.raises(
        UserError, match=r"the index .* can't be written .*: choose another place or name \(--index_path names its"
    ):
        reopen()
    (photos / "050.png").unlink()
    assert reopen(kind="hnsw")[1] == []  # it is built, and not kept
    assert not list(index.default_folder(photos).glob("*.hnsw"))


def test_a_folder_that_cant_be_made_is_one_sentence(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"move away what stands in its place \(--index_path names its folder\)"):
        open_index(list_gallery(photos), tmp_path / "file" / "index", "net", DIM, Embedder())


# Search


def test_search_in_parts_equals_search_at_once(photos: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(index, "QUERIES_AT_ONCE", 2)
    opened, _ = reopen()
    check_search(opened, photos)
    check_search(opened, photos, k=100)  # more than there are
    assert all(len(positions) == 30 for positions, _ in opened.search(QUERIES, 100))


def test_an_image_of_the_gallery_does_not_find_itself(photos: Path, reopen: Open) -> None:
    opened, _ = reopen()
    names = ["011.png", "000.png"]
    own = [[opened.gallery.names.index(name)] for name in names]
    queries = torch.from_numpy(np.stack([vector_of(photos / name) for name in names]))
    for name, query, (positions, _) in zip(names, queries.numpy(), opened.search(queries, 3, own)):
        assert [opened.gallery.names[i] for i in positions] == [
            one for one, _ in nearest_by_hand(photos, query, 3, name)
        ]
    (_, distances), _ = opened.search(queries, 3)
    assert distances[0] == 0


def test_equal_embeddings_are_found_in_the_gallerys_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        make_files(tmp_path / name, 1)
    opened = open_index(list_gallery(tmp_path), tmp_path / ".index", "net", DIM, Embedder())
    ((positions, distances),) = opened.search(QUERIES[:1], 3)
    assert positions.tolist() == [0, 1, 2]
    assert len(set(distances)) == 1


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return make_files(tmp_path / "many", 400)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_quick_search(many: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = index.default_folder(many)

    def reopen() -> Index:
        return open_index(list_gallery(many), folder, "net", DIM, Embedder(), kind)

    def is_built() -> bool:
        return "building an index for quick search among 4" in capsys.readouterr().err

    opened = reopen()
    assert is_built()
    recall = opened.measure_recall(5)
    found, exact = opened.search(QUERIES, 5), opened.search(QUERIES, 5, exact=True)
    for query, (positions, distances), (_, nearest) in zip(QUERIES.numpy(), found, exact):
        by_hand = dict(nearest_by_hand(many, query, 400))
        for position, distance in zip(positions, distances):  # of what is found, the distances are exact
            assert distance == pytest.approx(by_hand[opened.gallery.names[position]])
        assert (np.sort(distances) == distances).all()
        assert (distances >= nearest - 1e-12).all()
    assert 0.6 < recall <= 1
    reopen()
    assert not is_built()
    make_files(many, 3, first=900)
    for number in (1, 7):
        (many / f"{number:03}.png").unlink()
    opened = reopen()  # new rows are added to what was built
    assert not is_built()
    for positions, _ in opened.search(torch.from_numpy(vector_of(many / "901.png"))[None], 1):
        assert opened.gallery.names[positions[0]] == "901.png"
    every = opened.search(QUERIES, 401)[0][0]
    assert len(set(every.tolist())) == len(every)  # none of those that are gone
    capsys.readouterr()
    file = next(folder.glob(f"vectors-*.{kind}"))
    file.write_bytes(file.read_bytes()[:-50])
    assert reopen().measure_recall(5) > 0.6
    assert f"{file} is damaged (wrong checksum): it is made anew" in capsys.readouterr().err


def test_recall_is_the_share_of_nearest_images_that_are_found(photos: Path, reopen: Open) -> None:
    opened, _ = reopen(kind="hnsw")

    class OddRows:
        """Finds only images in odd rows."""

        hnsw = type("Search", (), {"efSearch": 0})()

        def search(self, queries: np.ndarray, count: int) -> tuple[None, np.ndarray]:
            odd = np.arange(1, 30, 2)
            distances = np.linalg.norm(opened.vectors[odd][None] - queries[:, None], axis=2)
            return None, odd[np.argsort(distances, axis=1)]

    opened.faiss_index = OddRows()
    shares = []
    for name in opened.gallery.names:
        nearest = nearest_by_hand(photos, vector_of(photos / name), 5, name)
        shares.append(np.mean([opened.rows[opened.gallery.names.index(other)] % 2 for other, _ in nearest]))
    assert opened.measure_recall(5) == pytest.approx(np.mean(shares))


def test_the_kind_follows_from_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (10, 99_999, 100_000, 999_999, 1_000_000)
    assert [index.choose_kind(size) for size in sizes] == ["flat", "flat", "hnsw", "hnsw", "ivfpq"]
    monkeypatch.setattr(index, "import_faiss", lambda: None)
    assert index.choose_kind(10**6) == "flat"


def test_a_kind_that_needs_faiss_without_it(photos: Path, reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "import_faiss", lambda: None)
    with pytest.raises(UserError, match="--index hnsw needs faiss, which can't be imported: install faiss-cpu"):
        reopen(kind="hnsw")


# Galleries


def test_a_folder_of_classes_has_labels(tmp_path: Path) -> None:
    make_tree(tmp_path / "a" / "images", classes=2, per_class=2)
    (tmp_path / "a/images/class_0/.hidden.jpg").write_text("")
    (tmp_path / "a/images/.index").mkdir()
    (tmp_path / "a/images/.index/0.jpg").write_text("")
    (tmp_path / "a/images/class_0/notes.txt").write_text("")
    gallery = list_gallery(tmp_path / "a" / "images")
    assert gallery.names == [f"class_{label}/{number}.jpg" for label in range(2) for number in range(2)]
    assert gallery.labels == ["class_0", "class_0", "class_1", "class_1"]
    assert gallery.paths[0] == str(tmp_path / "a/images/class_0/0.jpg")
    deeper = list_gallery(tmp_path / "a")  # all of its folders, though not as classes
    assert len(deeper.names) == 4
    assert deeper.labels is None
    (tmp_path / "a/images/top.jpg").write_text("")
    assert list_gallery(tmp_path / "a/images").labels is None


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    make_files(tmp_path / "real", 2)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path)
    assert len(list_gallery(tmp_path).names) == 2


def test_a_csv_file_lists_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_files(tmp_path / "photos", 3)
    file = tmp_path / "some.csv"
    file.write_text(f"label,path,split\na,photos/002.png,x\nb,{tmp_path}/photos/000.png,y\na,photos/002.png,z\n")
    gallery = list_gallery(file)
    assert gallery.paths == [f"{tmp_path}/photos/002.png", f"{tmp_path}/photos/000.png"]
    assert gallery.labels == ["a", "b"]
    assert "images that are listed again count once: 1, e.g. " in capsys.readouterr().err
    file.write_text("path\nphotos/002.png\n")
    assert list_gallery(file).labels is None
    opened = open_index(list_gallery(file), index.default_folder(file), "net", DIM, Embedder())
    assert len(opened) == 1
    assert index.default_folder(file) == tmp_path / ".some.csv.index"
    assert index.default_folder(tmp_path / "photos/..") == index.default_folder(tmp_path)


def test_an_image_with_two_labels_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path, 1)
    (tmp_path / "linked.png").symlink_to(tmp_path / "000.png")
    for other in ("000.png", "./000.png", "linked.png"):
        (tmp_path / "some.csv").write_text(f"path,label\n000.png,a\n{other},b\n")
        words = r"000.png.* belongs to the classes a and b \(row 2 of .*some.csv; row 3 of .*some.csv\): remove one"
        with pytest.raises(UserError, match=words):
            list_gallery(tmp_path / "some.csv")


def test_a_csv_file_lists_parts_of_images(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text("path,x1,y1,x2,y2\na.png,0,1,5,6\na.png,,,,\n")
    assert list_gallery(file).names == ["a.png#box=0,1,5,6", "a.png"]


def test_bad_galleries_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photo.jpg").write_text("")
    (tmp_path / "header.csv").write_text("path,label\n")
    (tmp_path / "other.csv").write_text("file,label\na.png,b\n")
    (tmp_path / "typo.csv").write_text("path,lable\na.png,b\n")
    for name, words in (
        ("empty", r"empty contains no images \(files that end with .bmp, "),
        ("photo.jpg", "is neither a folder of images nor a CSV file that lists them"),
        ("nowhere", "nowhere does not exist: give a folder of images"),
        ("header.csv", "header.csv has no rows below the names of its columns: list images in it"),
        ("other.csv", "unknown column file"),
        ("typo.csv", r"unknown column lable \(did you mean label\?\)"),
    ):
        with pytest.raises(UserError, match=words):
            list_gallery(tmp_path / name)


def test_images_that_cant_be_read_are_named_and_left_out(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def reopen() -> tuple[Index, list[str]]:
        embed = Embedder()
        return open_index(list_gallery(photos), tmp_path / "index", "net", DIM, embed), embed.embedded

    (photos / "007.png").write_text("cut off")
    opened, _ = reopen()
    assert len(opened) == 29
    assert f"1 of 30 images can't be read and is left out: {photos}/007.png is cut off" in capsys.readouterr().err
    for number in range(8, 15):
        (photos / f"{number:03}.png").write_text("cut, too")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    opened, embedded = reopen()
    assert (len(opened), embedded) == (22, [])
    listed = ", ".join(f"{photos}/{number:03}.png" for number in range(8, 13))
    words = f"9 of 31 images can't be read and are left out: {photos}/007.png is cut off; likewise {listed} and 3 more"
    assert words in capsys.readouterr().err
    (photos / "007.png").write_text("mended")
    assert reopen()[1] == ["007.png"]


def test_a_gallery_of_which_nothing_can_be_read(photos: Path, tmp_path: Path) -> None:
    for path in photos.iterdir():
        path.write_text("cut")
    with pytest.raises(UserError, match=r"none of the 30 images of .*photos can be read, of which the first is: .*000"):
        open_index(list_gallery(photos), tmp_path / "index", "net", DIM, Embedder())
    for path in sorted(photos.iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match=r"^.*/000.png is cut off$"):
        open_index(list_gallery(photos), tmp_path / "index", "net", DIM, Embedder())


def test_names_of_any_bytes(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "photos", 1)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_text("image")
    gallery = list_gallery(folder)
    for _ in range(2):
        opened = open_index(gallery, tmp_path / "index", "net", DIM, Embedder())
        assert len(opened) == 2
    assert [row[0] for row in gallery.rows()] == [f"{folder}/000.png", f"{folder}/caf\\udce9.png"]
