"""A finished network put to use on images of one's own: from Python, and by the commands search, embed and pairs."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, SMALL, embed_by_hand, make_tree
from PIL import Image

import auxiliaries
import datasets
import evaluate
import inference
import main
import plots
import retrieval
import runs
import transforms
from auxiliaries import UserError
from evaluate import EmbeddingSpace
from inference import EmbeddingModel, Match

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network before training, with validation classes."""
    results = tmp_path_factory.mktemp("results")
    where = ["--dataset", "cv", "--source_path", str(source), "--save_path", str(results), "--savename", "run"]
    split = ["--split_scheme", "predefined_with_validation", "--num_training_partitions", "2", "--fold", "0"]
    flags = ["--n_epochs", "0", "--bs", "8", "--samples_per_class", "2", "--embed_dim", "16", "--no-pictures"]
    main.command([*SMALL, "--arch", "resnet18", *where, *split, *flags])  # whose embeddings differ well
    return results / "cv" / "run" / "fold_0"


@pytest.fixture(scope="module")
def model(trained: Path) -> EmbeddingModel:
    return inference.load(trained, "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four classes of five images."""
    return make_tree(tmp_path / "photos", classes=4, per_class=5, seed=3)


Use = Callable[..., Any]


@pytest.fixture
def use(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """A function that gives a command with its flags to inference.py, in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def use(command: str, *flags: object, run: Path = trained) -> Any:
        return inference.main([command, "--run", str(run), "--gpu", "-1", *map(str, flags)])

    return use


# From Python


def test_embeddings_equal_those_of_the_evaluation(trained: Path, model: EmbeddingModel) -> None:
    images = datasets.give_splits(runs.load_flags(trained)).test[0].query
    assert torch.equal(model.embed(images.paths), embed_by_hand(trained, images))


def test_images_of_all_kinds(model: EmbeddingModel, photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:3]
    expected = model.embed(paths)
    assert expected.shape == (3, 16)
    assert expected.dtype == torch.float32
    opened = [Image.open(path) for path in paths]
    arrays = [transforms.load_image(str(path)).permute(1, 2, 0).numpy() for path in paths]
    for images in ([str(path) for path in paths], arrays, np.stack(arrays)):
        assert torch.equal(model.embed(images), expected)
    assert torch.allclose(model.embed(opened), expected, atol=0.02)  # Pillow decodes JPEG a little otherwise
    for single in (paths[0], arrays[0]):
        assert torch.allclose(model.embed(single), expected[:1], atol=1e-6)
    assert model.embed([]).shape == (0, 16)


def test_transparent_images_lie_on_white(model: EmbeddingModel) -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert torch.equal(model.embed([clear]), model.embed([Image.new("RGB", (40, 40), "white")]))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"an array is taken as \(H, W, 3\) uint8, RGB; this one is \(3, 8, 8\) uint8"),
        (np.zeros((8, 8, 3)), r"this one is \(8, 8, 3\) float64"),
        (7, "images are paths, Pillow images, or arrays .* this is of type int"),
        ("nowhere.jpg", r"nowhere\.jpg can't be read"),
        (Image.new("I", (8, 8)), "an image of mode I has more than 8 bits per channel"),
    ],
)
def test_bad_images_are_one_sentence(model: EmbeddingModel, image: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.embed([image])


def test_three_lines_of_python(trained: Path, photos: Path) -> None:
    model = inference.load(trained, "cpu")
    embeddings = model.embed([photos / "class_0/0.jpg", photos / "class_1/0.jpg"])
    ((match, *_), _) = model.search(photos, [photos / "class_0/0.jpg", photos / "class_1/0.jpg"], k=3)
    assert embeddings.shape == (2, 16)
    assert isinstance(match, Match)
    assert match.path in map(str, photos.rglob("*.jpg"))
    assert match.label in {"class_0", "class_1", "class_2", "class_3"}


def test_a_run_without_a_network_yet(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="has no network yet, it was stopped before its first evaluation"):
        inference.load(folder, "cpu")
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        inference.load(tmp_path / "nowhere", "cpu")
    with pytest.raises(UserError, match=r"has a network for each fold: name one, such as .*fold_0"):
        inference.load(trained.parent, "cpu")


def test_a_network_is_taken_along_without_its_data(trained: Path, photos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    config_file = folder / "config.yaml"
    text = re.sub("source_path: .*", "source_path: /gone", config_file.read_text())
    config_file.write_text(re.sub("precision: .*", "precision: fp16", text))  # as a GPU trained it
    paths = sorted(photos.rglob("*.jpg"))
    assert torch.equal(inference.load(folder, "cpu").embed(paths), inference.load(trained, "cpu").embed(paths))


def test_the_key_follows_from_the_network_and_its_transform(
    trained: Path, model: EmbeddingModel, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    assert inference.load(folder, "cpu").key == model.key
    state = torch.load(folder / "last.pth.tar", weights_only=True)
    state["state_dict"]["embedding.bias"][0] += 1e-6
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        torch.save(state, folder / name)
    other = inference.load(folder, "cpu").key
    config_file = folder / "config.yaml"
    config_file.write_text(config_file.read_text().replace("exif_orientation: false", "exif_orientation: true"))
    assert len({model.key, other, inference.load(folder, "cpu").key}) == 3


# Search


def nearest_by_hand(model: EmbeddingModel, photos: Path, query: Path, k: int) -> list[tuple[str, float]]:
    paths = sorted(map(str, photos.rglob("*.jpg")))
    space = EmbeddingSpace(
        model.embed([query]), np.zeros(1), model.embed(paths), np.zeros(len(paths)), np.array([paths.index(str(query))])
    )
    (found,) = space.neighbors(np.array([0]), k)
    distances = space.distances(torch.zeros(k, dtype=torch.long), torch.from_numpy(found))
    return [(paths[i], float(distance)) for i, distance in zip(found, distances)]


def test_search(
    use: Use, trained: Path, model: EmbeddingModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = [photos / "class_2/3.jpg", photos / "class_0/1.jpg"]
    results = use("search", "--gallery", photos, "--query", *queries, "--k", 4)
    out, err = capsys.readouterr()
    assert "20 images, index flat: exact search" in out
    assert f"20 of 20 images were embedded: {tmp_path}/.photos.index keeps that for later searches" in err
    for query, matches in zip(queries, results):
        expected = nearest_by_hand(model, photos, query, 4)
        assert [match.path for match in matches] == [path for path, _ in expected]
        assert [match.distance for match in matches] == pytest.approx([distance for _, distance in expected], abs=1e-6)
        assert [match.label for match in matches] == [Path(path).parent.name for path, _ in expected]
        first = matches[0]
        assert f"\n{query}\n   1  {first.distance:.4f}  {first.path}  {first.label}\n" in out
    assert f"picture: {trained}/search_photos.png\n" in out
    with Image.open(trained / "search_photos.png") as picture:
        assert picture.width > 5 * 128
        colors = {picture.getpixel((12 + column * 148, y)) for column in range(5) for y in range(40, 200)}
    assert {(214, 39, 40), (176, 176, 176)} & colors == {(214, 39, 40), (176, 176, 176)}
    assert results == use("search", "--gallery", photos, "--query", *queries, "--k", 4)
    assert "embedded" not in capsys.readouterr().err


def test_search_writes_a_page(use: Use, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = photos / "class_0/1.jpg"
    (matches,) = use("search", "--gallery", photos, "--query", query, "--html", "page.html", "--k", 2)
    page = Path("page.html").read_text()
    assert all(Path(match.path).name in page for match in matches)
    assert "picture" not in capsys.readouterr().out
    assert "data:image/" in page


@pytest.mark.parametrize("better", [[], ["--query_expansion", 1]])
def test_a_query_does_not_find_itself_under_other_names(use: Use, photos: Path, better: list[Any]) -> None:
    query, other = photos / "class_0/1.jpg", photos / "class_0/0.jpg"
    (photos / "class_1/linked.jpg").symlink_to(query)
    (photos / "class_2/hard.jpg").hardlink_to(query)
    copy = shutil.copy2(query, photos / "class_3/copy.jpg")  # of the same size and time, but another file
    (photos / "class_1/other.jpg").symlink_to(other)
    flags = ["--gallery", photos, "--k", 50, "--html", "x.html", *better]
    for name in (query, photos / "class_2/hard.jpg"):
        matches, others = use("search", "--query", name, other, *flags)
        found = [match.path for match in matches]
        assert found[0] == str(copy)
        assert len(found) == len({os.stat(path).st_ino for path in found}) + 1 == 21  # both names of the other one
        assert len(others) == 22


def test_a_picture_is_not_drawn_into_the_gallery(use: Use, trained: Path, photos: Path, tmp_path: Path) -> None:
    query = photos / "class_0/1.jpg"
    for gallery, flags in ((photos, ["--png", "photos/x.png"]), (trained.parent, [])):
        with pytest.raises(UserError, match=r"png is in the gallery, where later searches would find it: give another"):
            use("search", "--gallery", gallery, "--query", query, *flags)
    use("search", "--gallery", ".", "--query", query)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == []


def test_search_for_an_image_from_elsewhere(use: Use, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither it nor the gallery has a label."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_recoveries", lambda path, retrievals: drawn.extend(retrievals))
    other = shutil.copy(photos / "class_0/1.jpg", tmp_path / "elsewhere.jpg")
    shutil.copy(other, photos / "on_top.jpg")
    (matches,) = use("search", "--gallery", photos, "--query", other, "--k", 3)
    assert [match.label for match in matches] == [None] * 3
    assert [match.distance for match in matches[:2]] == pytest.approx([0, 0], abs=1e-4)  # both copies
    (retrieval,) = drawn
    assert (retrieval.query_class, retrieval.correct) == ("elsewhere.jpg", [None] * 3)
    assert retrieval.neighbor_classes == [Path(match.path).name for match in matches]


def test_the_picture_says_what_is_right(use: Use, photos: Path, monkeypatch: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_recoveries", lambda path, retrievals: drawn.extend(retrievals))
    queries = sorted(photos.rglob("*.jpg"))
    results = use("search", "--gallery", photos, "--query", *queries, "--k", 12, "--png", "found.png")
    assert len(drawn) == plots.QUERIES_SHOWN
    for query, matches, row in zip(queries, results, drawn):
        assert row.query_class == query.parent.name
        assert row.correct == [match.label == query.parent.name for match in matches[: plots.FOUND_SHOWN]]


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_search_by_an_index_of_faiss(use: Use, photos: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    use("search", "--gallery", photos, "--query", photos / "class_0/1.jpg", "--index", kind, "--png", "found.png")
    out = capsys.readouterr().out
    assert re.search(rf"20 images, index {kind}: finds \d+\.\d% of the 10 nearest images that exact search finds", out)


@pytest.mark.parametrize("kind", inference.KINDS)
def test_a_gallery_of_one_image(use: Use, photos: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one").mkdir()
    shutil.copy(photos / "class_0/0.jpg", "one")
    flags = ["--gallery", "one", "--index", kind, "--html", "page.html"]
    found = use("search", "--query", "one/0.jpg", photos / "class_1/0.jpg", *flags)
    assert [[match.path for match in matches] for matches in found] == [[], ["one/0.jpg"]]
    assert "1 image, index flat: exact search" in capsys.readouterr().out


def test_more_than_the_gallery_has(use: Use, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = photos / "class_0/1.jpg"
    (matches,) = use("search", "--gallery", photos, "--query", query, "--k", 99, "--html", "page.html")
    assert len(matches) == 19
    assert f"--k 99 is more than the 20 images of {photos}: all are shown" in capsys.readouterr().err


def test_an_index_elsewhere_is_of_one_gallery(use: Use, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(photos, photos.parent / "other")  # files of the same names, sizes and times
    query = photos / "class_0/1.jpg"
    for gallery, words in ((photos, "20 of 20 images were embedded"), (other, "is of another network")):
        flags = ["--index_path", "index", "--html", "page.html"]
        use("search", "--gallery", gallery, "--query", query, *flags)
        assert words in capsys.readouterr().err
    assert not list(photos.parent.glob(".*.index"))


def test_an_image_that_is_cut_off_among_others(use: Use, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = photos / "class_1/2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    (matches,) = use("search", "--gallery", photos, "--query", photos / "class_0/1.jpg", "--k", 50, "--png", "x.png")
    assert len(matches) == 18
    assert f"1 of 20 images can't be read and is left out: {cut} is incomplete or corrupt" in capsys.readouterr().err


def test_search_by_better_embeddings_and_ranks(
    use: Use, trained: Path, model: EmbeddingModel, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(map(str, photos.rglob("*.jpg")))
    gallery, query = model.embed(paths), paths[7]
    flags = ["--rerank", "kreciprocal", "--rerank_params", "k1=5", "k2=2", "--query_expansion", "2", "--whiten"]
    (matches,) = use("search", "--gallery", photos, "--query", query, "--k", 4, "--html", "x.html", *flags)
    training = datasets.give_splits(runs.load_flags(trained)).train
    whitened = retrieval.fit_whitening(model.embed(training.paths))
    space = EmbeddingSpace(whitened(gallery[7:8]), np.zeros(1), whitened(gallery), np.zeros(20), np.array([7]))
    space = retrieval.expand_queries(space, 2)
    space = retrieval.rerank(space, lambda points: retrieval.KReciprocal(points, k1=5, k2=2))
    assert space.ranking is not None
    distances = space.ranking(torch.tensor([0]))[0]
    distances[7] = torch.inf
    expected, order = distances.sort(stable=True)
    assert [match.path for match in matches] == [paths[i] for i in order[:4]]
    assert [match.distance for match in matches] == pytest.approx(expected[:4].tolist(), abs=1e-5)
    err = capsys.readouterr().err
    assert f"{len(training)} of {len(training)} images were embedded: {trained}/.training.index keeps that" in err
    use("search", "--gallery", photos, "--query", query, "--html", "x.html", "--whiten")
    assert "embedded" not in capsys.readouterr().err


def test_search_by_means_with_mirror_images(use: Use, model: EmbeddingModel, photos: Path) -> None:
    paths = sorted(map(str, photos.rglob("*.jpg")))
    flags = ["--tta", "flip", "--database_augmentation", 1, "--k", 3, "--html", "x.html"]
    (matches,) = use("search", "--gallery", photos, "--query", paths[3], *flags)
    pixels = torch.stack([transforms.build_eval_transform(model.opt)(transforms.load_image(path)) for path in paths])
    with torch.inference_mode():
        means = torch.nn.functional.normalize((model.net(pixels) + model.net(pixels.flip(3))) / 2, dim=1)
    apart = torch.cdist(means.double(), means.double()).fill_diagonal_(torch.inf)
    augmented = torch.nn.functional.normalize((means + means[apart.argmin(dim=1)]) / 2, dim=1)
    distances = (augmented - means[3]).norm(dim=1)
    distances[3] = torch.inf
    expected, order = distances.sort()
    assert [match.path for match in matches] == [paths[i] for i in order[:3]]
    assert [match.distance for match in matches] == pytest.approx(expected[:3].tolist(), abs=1e-5)


def test_embeddings_with_and_without_mirror_images_are_both_kept(
    use: Use, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gallery", photos, "--query", photos / "class_0/1.jpg", "--whiten", "--html", "x.html"]
    found = [use("search", *flags), use("search", *flags, "--tta", "flip")]
    assert found[0] != found[1]
    capsys.readouterr()
    assert [use("search", *flags), use("search", *flags, "--tta", "flip")] == found
    assert "embedded" not in capsys.readouterr().err


def test_help_says_what_a_command_does_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inference.main(["search", "--help"])
    text = capsys.readouterr().out
    assert "\n\nFind the nearest images of a gallery.\n\n" in text
    assert "\nbetter retrieval:\n" in text


REFUSED = [
    (
        ["search", "--gallery", "photos", "--query", "a.jpg", "--rerank", "kreciprocal", "--index", "hnsw"],
        "--rerank compares with every image, and --index hnsw does not: drop one of them",
    ),
    (
        ["search", "--gallery", "photos", "--query", "a.jpg", "--rerank_params", "k1=3"],
        "--rerank_params does nothing without --rerank",
    ),
    (["search", "--gallery", "photos", "--query", "gone.jpg"], "--query gone.jpg is not a file: give image files"),
    (["search", "--gallery", "photos", "--query", "photos"], "--query photos is not a file"),
    (["search", "--gallery", "photos", "--query", ""], "--query '' is not a file"),
    (["search", "--gallery", "photos", "--query", "notes.jpg"], "notes.jpg is incomplete or corrupt, or not an image"),
    (["search", "--gallery", "empty", "--query", "a.jpg"], "empty contains no images"),
    (["search", "--gallery", "nowhere", "--query", "a.jpg"], "nowhere does not exist"),
    (["search", "--gallery", "", "--query", "a.jpg"], "--gallery is empty: give a folder of images"),
    (["embed", "--images", "", "--out", "x.npy"], "--images is empty: give a folder of images"),
    (["search", "--query", "a.jpg"], "the following arguments are required: --gallery"),
    (["search", "--galery", "photos"], "unknown flag --galery (did you mean --gallery?): inference.py search --help"),
    (["search", "--gallery", "photos", "--query", "a.jpg", "--k", "0"], "--k: 0 is not at least 1"),
    (["search", "--gallery", "photos", "--query", "a.jpg", "--index", "hnws"], "--index hnws is unknown (did you mean"),
    (["search", "--gallery", "photos", "--query", "a.jpg", "--html", "x.png"], "x.png does not end with .html or .htm"),
    (["search", "--gallery", "photos", "--query", "a.jpg", "--png", "gone/x.png"], "--png: gone/x.png is not the name"),
    (["serch"], "COMMAND serch is unknown (did you mean search?)"),
    ([], "the following arguments are required: COMMAND"),
    (["embed", "--images", "photos", "--out", "x.txt"], "--out: x.txt does not end with .parquet or .npy or .csv"),
    (["embed", "--images", "empty", "--out", "x.npy"], "empty contains no images"),
    (["pairs"], "which pairs? Give --images IMAGE IMAGE, or --pairs CSV, and not both"),
    (["pairs", "--images", "notes.jpg", "photos/class_0/0.jpg"], "notes.jpg is incomplete or corrupt, or not an image"),
    (["pairs", "--pairs", "pairs.csv"], "pairs.csv has no column path_b"),
    (["pairs", "--pairs", ""], ". can't be read (Is a directory)"),
    (["pairs", "--pairs", "none.csv"], "none.csv has no rows below the names of its columns: list pairs in it"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_bad_input_is_one_sentence(
    trained: Path, photos: Path, flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    Path("notes.jpg").write_text("notes")
    Path("pairs.csv").write_text("path_a,path_c\nx.jpg,y.jpg\n")
    Path("none.csv").write_text("path_a,path_b\n")
    run = ["--run", str(trained), "--gpu", "-1"] if flags and flags[0] in inference.COMMANDS else []
    with pytest.raises(UserError) as error:
        inference.main([*flags, *run])
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(Path().glob(".*.index"))  # refused before anything expensive


def test_the_program_ends_with_2(trained: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "inference.py",
        "search",
        "--run",
        str(trained),
        "--gallery",
        str(tmp_path),
        "--query",
        "x",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} contains no images")


# Embeddings as a file


def expected_rows(model: EmbeddingModel, photos: Path) -> tuple[list[str], list[str], np.ndarray]:
    paths = sorted(map(str, photos.rglob("*.jpg")))
    return paths, [Path(path).parent.name for path in paths], model.embed(paths).numpy()


def test_embeddings_as_parquet(
    use: Use, model: EmbeddingModel, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference, "ROWS_PER_GROUP", 10)
    assert use("embed", "--images", photos, "--out", "x.parquet") == 20
    assert "20 embeddings of dimension 16: x.parquet" in capsys.readouterr().out
    assert pyarrow.parquet.ParquetFile("x.parquet").num_row_groups == 2
    table = pyarrow.parquet.read_table("x.parquet")
    paths, labels, vectors = expected_rows(model, photos)
    assert table.column_names == ["path", "label", "vector"]
    assert (table["path"].to_pylist(), table["label"].to_pylist()) == (paths, labels)
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors)


def test_embeddings_as_csv_and_npy(use: Use, model: EmbeddingModel, photos: Path) -> None:
    paths, labels, vectors = expected_rows(model, photos)
    use("embed", "--images", photos, "--out", "x.csv")
    use("embed", "--images", photos, "--out", "y.npy")
    with open("x.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "label", *map(str, range(16))]
    assert [row[:2] for row in rows] == [list(pair) for pair in zip(paths, labels)]
    assert np.array_equal(np.array([row[2:] for row in rows], np.float32), vectors)
    assert np.array_equal(np.load("y.npy"), vectors)
    with open("y.csv", newline="") as file:
        assert list(csv.reader(file)) == [["path", "label"], *([path, label] for path, label in zip(paths, labels))]


@pytest.mark.parametrize("name", ["x.parquet", "x.npy", "x.csv"])
def test_embeddings_without_labels_and_without_what_cant_be_read(
    use: Use, photos: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(photos.rglob("*.jpg"))
    (tmp_path / "some.csv").write_text("path\n" + "".join(f"{file}\n" for file in files))
    files[2].write_bytes(files[2].read_bytes()[:300])
    assert use("embed", "--images", "some.csv", "--out", name, "--bs", 3) == 19
    assert f"1 of 20 images can't be read and is left out: {files[2]}" in capsys.readouterr().err
    if name == "x.parquet":
        table = pyarrow.parquet.read_table(name)
        assert (table.column_names, len(table)) == (["path", "vector"], 19)
    else:
        rows = Path("x.csv").read_text().splitlines()
        assert rows[0].split(",")[:2] == (["path"] if name == "x.npy" else ["path", "0"])
        assert (len(rows), str(files[2]) in Path("x.csv").read_text()) == (20, False)
    if name == "x.npy":
        assert np.load(name).shape == (19, 16)


@pytest.mark.parametrize("name", ["x.parquet", "x.npy", "x.csv"])
def test_nothing_is_written_where_nothing_can_be_read(use: Use, photos: Path, name: str) -> None:
    for file in photos.rglob("*.jpg"):
        file.write_text("notes")
    with pytest.raises(UserError, match=r"none of the 20 images of .* can be read"):
        use("embed", "--images", photos, "--out", name)
    assert [path.name for path in Path().iterdir()] == ["photos"]


@pytest.mark.parametrize("name", ["some.csv", "some.npy"])
def test_the_list_of_images_is_not_replaced(use: Use, photos: Path, tmp_path: Path, name: str) -> None:
    listed = "path\n" + "".join(f"{file}\n" for file in photos.rglob("*.jpg"))
    Path("some.csv").write_text(listed)
    with pytest.raises(UserError, match=r"--out would replace some.csv, which lists the images: give another name"):
        use("embed", "--images", tmp_path / "some.csv", "--out", name)
    assert Path("some.csv").read_text() == listed


def test_parquet_without_pyarrow(use: Use, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"a .parquet file needs pyarrow: pip install pyarrow, or give a .npy or .csv"):
        use("embed", "--images", photos, "--out", "x.parquet")


# Pairs


def copy_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run that keeps no threshold."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("verification.json"))


def test_the_threshold_is_chosen_on_validation_images(
    use: Use, trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(trained, tmp_path)
    images = datasets.give_splits(runs.load_flags(run)).val[0].query
    space = EmbeddingSpace(embed_by_hand(run, images), images.labels[:, 0])
    threshold, accuracy = evaluate.verification_threshold(space), evaluate.verification_accuracy(space)
    one, other = photos / "class_0/0.jpg", photos / "class_1/0.jpg"
    ((*paths, distance, same),) = use("pairs", "--images", one, other, run=run)
    assert (paths, same) == ([str(one), str(other)], distance <= threshold)
    points = inference.load(run, "cpu").embed([one, other]).double()
    assert distance == pytest.approx(float((points[0] - points[1]).norm()))
    words = f"threshold {threshold:.4f}, chosen on {len(images)} validation images"
    assert words in capsys.readouterr().out
    kept = auxiliaries.load_json(run / "verification.json")
    assert (kept["threshold"], kept["balanced accuracy"]) == (pytest.approx(threshold), pytest.approx(accuracy))
    auxiliaries.save_json(run / "verification.json", {**kept, "threshold": 0.5})
    use("pairs", "--images", one, other, run=run)
    assert "threshold 0.5000, chosen on" in capsys.readouterr().out
    auxiliaries.save_json(run / "verification.json", {**kept, "network": "another"})
    use("pairs", "--images", one, other, run=run)
    assert words in capsys.readouterr().out
    (run / "verification.json").write_text("{}")
    with pytest.raises(UserError, match=r"verification.json is damaged .*: remove it, and it is made anew"):
        use("pairs", "--images", one, other, run=run)


def test_a_threshold_that_the_run_knows(use: Use, trained: Path, photos: Path, tmp_path: Path) -> None:
    run = copy_run(trained, tmp_path)
    summary = auxiliaries.load_json(run / "summary.json")
    summary["selected"]["val"]["Verification threshold"] = 0.123
    auxiliaries.save_json(run / "summary.json", summary)
    assert inference.give_threshold(inference.load(run, "cpu")) == 0.123
    assert not (run / "verification.json").exists()


def test_runs_without_a_threshold(
    use: Use, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = "--images", photos / "class_0/0.jpg", photos / "class_1/0.jpg"
    splits = datasets.give_splits(runs.load_flags(trained))
    run = copy_run(trained, tmp_path)
    monkeypatch.setattr(datasets, "give_splits", lambda opt: datasets.Splits(splits.train, test=splits.test))
    with pytest.raises(
        UserError, match="has no validation images to choose a threshold on: give --threshold, or train"
    ):
        use("pairs", *images, run=run)

    def refuse(opt: object) -> None:
        raise UserError("Datasets/cv does not exist")

    monkeypatch.setattr(datasets, "give_splits", refuse)
    words = "is chosen on the run's validation images, or given by --threshold: Datasets/cv does not exist"
    with pytest.raises(UserError, match=words):
        use("pairs", *images, run=run)
    ((_, _, distance, same),) = use("pairs", *images, "--threshold", 2, run=run)
    assert same == (distance <= 2)


def test_pairs_of_names_that_are_not_text(use: Use, photos: Path) -> None:
    name = os.fsdecode(b"photos/class_0/\xff.jpg")
    shutil.copy(photos / "class_0/0.jpg", name)
    (pair,) = use("pairs", "--images", name, "photos/class_0/0.jpg", "--threshold", 1, "--out", "out.csv")
    assert (pair.path_a, pair.distance) == (name, 0)
    rows = Path("out.csv").read_text().splitlines()
    assert rows == ["path_a,path_b,distance,same", r"photos/class_0/\udcff.jpg,photos/class_0/0.jpg,0.0,1"]


def test_pairs_of_which_none_can_be_compared(use: Use, photos: Path) -> None:
    Path("pairs.csv").write_text("path_a,path_b\nphotos/class_0/0.jpg,gone.jpg\nphotos/class_1/0.jpg,gone.jpg\n")
    with pytest.raises(UserError, match=r"in each pair of .*pairs.csv there is an image that can't be read"):
        use("pairs", "--pairs", "pairs.csv", "--threshold", 1, "--out", "out.csv")
    assert not Path("out.csv").exists()
    with pytest.raises(UserError, match=r"--out would replace pairs.csv, which lists the images"):
        use("pairs", "--pairs", "pairs.csv", "--threshold", 1, "--out", "pairs.csv")


def test_pairs_of_a_csv_file(
    use: Use, model: EmbeddingModel, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [("class_0/0.jpg", "class_0/1.jpg"), ("class_0/0.jpg", "class_3/1.jpg"), ("class_2/2.jpg", "class_1/0.jpg")]
    (photos / "pairs.csv").write_text("path_a,path_b\n" + "".join(f"{a},{b}\n" for a, b in names))
    cut = photos / "class_2/2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    files = [photos / name for name in ("class_0/0.jpg", "class_0/1.jpg", "class_3/1.jpg")]
    points = model.embed(files).double()
    distances = [float((points[0] - points[i]).norm()) for i in (1, 2)]
    threshold = sum(distances) / 2
    flags = ["--threshold", threshold, "--out", "out.csv", "--html", "page.html"]
    pairs = use("pairs", "--pairs", photos / "pairs.csv", *flags)
    assert [pair.distance for pair in pairs] == pytest.approx(distances)
    assert sorted(pair.same for pair in pairs) == [False, True]
    out, err = capsys.readouterr()
    assert f"1 of 5 images can't be read and is left out: {cut}" in err
    assert f"1 of 2 pairs are the same, up to the distance {threshold:.4f}" in out
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path_a"], row["path_b"]) for row in rows] == [(pair.path_a, pair.path_b) for pair in pairs]
    assert [row["same"] for row in rows] == [str(int(pair.same)) for pair in pairs]
    assert [float(row["distance"]) for row in rows] == pytest.approx(distances)
    assert "different, distance" in Path("page.html").read_text()
