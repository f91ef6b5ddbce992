"""Damaged images and duplicates are found, and splits are written as files that give the same splits."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
import shutil
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tree, save_image
from PIL import Image
from test_csv_data import content

import check
import config
import datasets
import inference
import runs
from auxiliaries import UserError


def smooth(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """An image of a few large blobs, which looks the same in other sizes."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --source_path with `odd`: 4 classes of 5 images, of which some are wrong.

    a/0 is also b/0 (re-encoded, so its content differs), a/1 also c/1, and b/2 also b/3; a/2 is d/2 in another size;
    a/3 is cut off, b/4 tiny, c/4 has a palette, and d/4 an alpha channel.
    """
    source = tmp_path_factory.mktemp("source")
    images = source / "odd" / "images"
    for label, name in enumerate("abcd"):
        (images / name).mkdir(parents=True)
        for number in range(5):
            smooth(10 * label + number).save(images / name / f"{number}.png")
    with Image.open(images / "a/0.png") as image:
        image.save(images / "b/0.png", compress_level=1)
    shutil.copy(images / "a/1.png", images / "c/1.png")
    shutil.copy(images / "b/2.png", images / "b/3.png")
    with Image.open(images / "a/2.png") as image:
        image.resize((60, 50)).save(images / "d/2.png")
    data = (images / "a/3.png").read_bytes()
    (images / "a/3.png").write_bytes(data[: len(data) // 2])
    smooth(99, (20, 12)).save(images / "b/4.png")
    smooth(98).quantize(8).save(images / "c/4.png")
    smooth(97).convert("RGBA").save(images / "d/4.png")
    return source


def run(name: str, source: Path, out: Path, *flags: str) -> check.Findings:
    return check.check([name, "--source_path", str(source), "--out", str(out), "--kernels", "0", *flags])


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def pairs_of(found: check.Findings) -> dict[tuple[str, str], str]:
    """What each pair of images, by class and number, has in common."""
    names = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in found.images.paths]
    return {(names[pair.i], names[pair.j]): pair.what for pair in found.pairs}


def test_what_is_wrong_is_found(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("odd", source, tmp_path / "out")
    pairs = pairs_of(found)
    assert {pair: what for pair, what in pairs.items() if what.startswith("same")} == {
        ("a/0", "b/0"): "same pixels",
        ("a/1", "c/1"): "same file content",
        ("b/2", "b/3"): "same file content",
    }
    near = {pair: what for pair, what in pairs.items() if what.startswith("perceptual")}
    assert list(near) == [("a/2", "d/2")]
    assert [Path(path).parts[-2:] for path in found.errors] == [("a", "3.png")]
    root = source / "odd"
    assert {row["path"].removeprefix("images/"): row["reason"] for row in table(tmp_path / "out/exclude.csv")} == {
        "a/3.png": "can't be read",
        "a/1.png": f"same pixels as {root}/images/c/1.png (c, test)",  # what is evaluated stays
        "b/0.png": f"same pixels as {root}/images/a/0.png (a, train)",
        "b/3.png": f"same pixels as {root}/images/b/2.png (b, train)",
        "a/2.png": f"{near['a/2', 'd/2']} from {root}/images/d/2.png (d, test)",
    }
    problems = {row["path"]: (row["problem"], row["detail"]) for row in table(tmp_path / "out/problems.csv")}
    assert "cut off" in problems.pop("images/a/3.png")[1]
    assert problems == {
        "images/b/4.png": ("tiny", "20 × 12 px"),
        "images/c/4.png": ("unusual mode", "P"),
        "images/d/4.png": ("unusual mode", "RGBA"),
    }
    assert table(tmp_path / "out/classes.csv")[0] == {"class": "a", "split": "train", "images": "5"}
    said = capsys.readouterr().out
    assert "odd: 20 images of 4 classes (train 10 of 2, test 10 of 2)" in said
    assert "classes: 5 to 5 images, median 5; of one image: 0" in said
    assert "duplicates: 3 pairs, 1 across splits and 2 across classes" in said
    assert "near duplicates by perceptual hashes: 1 pair, 1 across splits and 1 across classes" in said
    assert "leave out 5 images: --exclude" in said
    page = (tmp_path / "out/pairs.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp") == 8
    assert "same file content" in page


def test_without_what_was_found_nothing_more_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("odd", source, tmp_path)
    exclude = tmp_path / "exclude.csv"
    shutil.copy(exclude, tmp_path / "found.csv")
    again = run("odd", source, tmp_path, "--exclude", str(tmp_path / "found.csv"))
    assert not again.pairs
    assert not again.errors
    assert table(exclude) == []
    assert not (tmp_path / "pairs.html").exists()  # that of the first check would be wrong now
    assert "leaves out 5 images of odd: 5 of 10 of train, 0 of 10 of test" in capsys.readouterr().err


def test_parts_of_images_are_images(source: Path, tmp_path: Path) -> None:
    boxes = [("a", 0, 40), ("b", 40, 96), ("c", 0, 40), ("d", 0, 60)]
    rows = [f"images/{'a' if label == 'b' else label}/0.png,{label},{x1},0,{x2},80" for label, x1, x2 in boxes]
    rows += [f"images/{label}/1.png,{label},0,0,96,{80 + 9 * (label == 'd')}" for label in "bd"]
    file = source / "odd" / "boxes.csv"
    file.write_text("\n".join(["path,label,x1,y1,x2,y2", *rows]))
    found = check.check([str(file), "--out", str(tmp_path), "--near", "0", "--kernels", "0"])
    assert "y2 of its crop box is 89" in str(*found.errors.values())
    assert {row["y2"] for row in table(tmp_path / "problems.csv")} >= {"89"}
    shape = {reading.size for reading in found.readings}
    assert (40, 80) in shape
    assert (56, 80) in shape


def test_parts_of_one_image_in_several_splits_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"images/a/0.png,{label},train,{x},0,{x + 30},80" for label, x in (("a", 0), ("b", 30))]
    rows += [
        f"images/d/0.png,{label},test,{x},0,{x + 30},80" for label, x in (("c", 0), ("c", 30), ("d", 60), ("d", 66))
    ]
    words = f"1 image with parts in several splits, such as {source}/odd/images/a/0.png: parts of one image share"
    for more in ([], ["images/a/0.png,c,test,60,0,90,80"]):
        file = source / "odd" / "torn.csv"
        file.write_text("\n".join(["path,label,split,x1,y1,x2,y2", *rows, *more]))
        found = check.check([str(file), "--out", str(tmp_path), "--near", "0", "--kernels", "0"])
        assert len(found.readings) == 6 + len(more)
        assert (words in capsys.readouterr().err) == bool(more)


def test_images_that_differ_in_color_alone_are_not_near_duplicates(tmp_path: Path) -> None:
    """Though a gray version of them is, and of many that look alike in gray those of one color are found."""
    shape = np.asarray(smooth(5).convert("L"), np.float32)[:, :, None]
    colors = {"blue.png": (0.2, 0.2, 1), "red.png": (1, 0.2, 0.2), "red.jpg": (1, 0.2, 0.2), "gray.png": (1, 1, 1)}
    for name, color in colors.items():
        Image.fromarray((shape * color).astype(np.uint8)).save(tmp_path / name)
    readings = []
    for reading in check.read_images([str(tmp_path / name) for name in colors], 0):
        assert isinstance(reading, check.Reading)
        readings.append(dataclasses.replace(reading, hash=0))
    images = check.Inventory(list(colors), np.zeros(4, np.int64), np.zeros(4, np.int64), ["any"])
    assert {(images.paths[pair.i], images.paths[pair.j]) for pair in check.find_pairs(images, readings, 4)} == {
        ("blue.png", "gray.png"),
        ("red.png", "red.jpg"),
        ("red.png", "gray.png"),
        ("red.jpg", "gray.png"),
    }


def test_near_hashes_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centers = rng.integers(0, 2**63, 30, dtype=np.uint64)
    flips = [np.uint64(sum(1 << int(bit) for bit in rng.choice(64, count, replace=False))) for count in range(8)]
    hashes = np.unique([center ^ flip for center in centers for flip in flips])
    for bits, most in itertools.product((0, 1, 4, 10), (10**6, 0)):
        monkeypatch.setattr(check, "MOST_COMPARED", most)
        expected = {
            (i, j, (int(one) ^ int(other)).bit_count())
            for (i, one), (j, other) in itertools.combinations(enumerate(hashes), 2)
            if (int(one) ^ int(other)).bit_count() <= bits and bits
        }
        found = check.near_hashes(hashes, bits)
        assert set(zip(*(column.tolist() for column in found))) == expected
        assert len(found[0]) == len(expected)


def test_many_alike_give_few_pairs() -> None:
    groups, keys = np.zeros(1000, np.int64), np.zeros(1000, np.int64)
    keys[700] = 1
    pairs = check.link(groups, keys)
    assert len(pairs) == 999
    assert sum(700 in pair for pair in pairs) == 999  # each is shown beside the one that is of another kind
    assert check.link(np.arange(5), keys[:5]) == []
    hashes = np.array([5, 5, 5, 4], np.uint64)
    assert sorted(check.near_pairs(hashes, np.zeros(4, np.int64), np.array([0, 0, 1, 0]), 2)) == [
        (0, 2, 0),
        (0, 3, 1),
        (1, 2, 0),
        (1, 3, 1),
        (2, 3, 1),
    ]


def test_near_embeddings_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    points = np.repeat(rng.normal(size=(20, 8)), 3, axis=0) + rng.normal(size=(60, 8)) * 0.05
    keys = rng.integers(0, 3, 60)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    apart = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    expected = {(i, j) for i, j in itertools.combinations(range(60), 2) if apart[i, j] <= 0.1 and keys[i] != keys[j]}
    found = check.near_embeddings(points, keys, 0.1)
    assert {(i, j) for i, j, _ in found} == expected
    assert all(abs(distance - apart[i, j]) < 1e-3 for i, j, distance in found)
    assert expected


def test_embeddings_of_a_run_find_further_pairs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network finds that a/4 and c/0 are alike, and of one class b/1 and b/2."""

    def embed(paths: list[str]) -> torch.Tensor:
        rows = torch.eye(20)[: len(paths)]
        names = ["/".join(Path(path).parts[-2:]) for path in paths]
        for one, other in (("a/4.png", "c/0.png"), ("b/1.png", "b/2.png")):
            rows[names.index(one)] = rows[names.index(other)] + 0.001
        return rows

    monkeypatch.setattr(inference, "load", lambda run: SimpleNamespace(embed=embed))
    pairs = pairs_of(run("odd", source, tmp_path, "--run", "some/run"))
    assert {pair for pair, what in pairs.items() if what.startswith("embeddings are 0.00")} == {("a/4", "c/0")}
    assert "near duplicates by embeddings: 1 pair, 1 across splits and 1 across classes" in capsys.readouterr().out


def look_alikes() -> list[str]:
    """Characters of several scripts, of which some look the same."""
    return [*"AB!&cex", *map(chr, (0x1C3, 0x391, 0x392, 0x394, 0x410, 0x411, 0x412, 0x430, 0x435, 0x441, 0x445))]


def test_in_raw_glyphs_what_glyphs_leave_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = ("DejaVuSans", "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol")
    monkeypatch.setattr(datasets, "GLYPH_FONTS", fonts)
    category = unicodedata.category
    wanted = look_alikes()
    monkeypatch.setattr(unicodedata, "category", lambda one: category(one) if one in wanted else "Cn")
    datasets.render_glyphs(tmp_path / "raw/images", skip_look_alikes=False)
    datasets.render_glyphs(tmp_path / "kept/images")
    removed = {path.name for path in (tmp_path / "raw/images").iterdir()}
    assert len(removed) == len(wanted)
    removed -= {path.name for path in (tmp_path / "kept/images").iterdir()}
    images = (found := run("raw", tmp_path, tmp_path / "out", "--near", "0")).images
    exact = [pair for pair in found.pairs if check.is_exact(pair) and images.labels[pair.i] != images.labels[pair.j]]
    later = {images.class_names[max(images.labels[pair.i], images.labels[pair.j])] for pair in exact}
    assert later == removed
    assert {"U+0391", "U+0392", "U+0441"} <= removed
    assert not any(map(check.is_exact, run("kept", tmp_path, tmp_path / "out", "--near", "0").pairs))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--near", "11"], "--near: 11 is not below 11"),
        (["--near_distance", "0.2"], "--near_distance does nothing without --run"),
        (["--lr", "1"], "unknown flag --lr"),
        (["--run", "nowhere"], "nowhere is not a run folder"),
        (["--fold", "0"], "--fold needs --split_scheme"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run("odd", source, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_dataset_of_damaged_images_is_refused(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "bad" / name / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 8 images can be read, of which the first is: .*0.jpg is incomplete"):
        run("bad", tmp_path, tmp_path / "out")


# Splits as files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --source_path with datasets of several layouts."""
    source = tmp_path_factory.mktemp("data")
    make_tree(source / "tiny" / "images", classes=12, per_class=8)
    rng = np.random.default_rng(0)
    shop, rows = source / "in-shop", []
    for item in range(8):
        for number in range(4):
            part = "train" if item < 4 else ("query", "gallery")[number % 2]
            name = f"img/{('MEN', 'WOMEN')[item % 2]}/Tees/id_{item:08}/{number}.jpg"
            save_image(shop / name, rng, tint=item)
            rows.append(f"{name} id_{item:08} {part}")
    heading = [str(len(rows)), "image_name item_id evaluation_status"]
    (shop / "list_eval_partition.txt").write_text("\n".join([*heading, *rows]))
    images = source / "online_products" / "images"
    products: list[list[str]] = [[], []]
    for item in range(1, 13):  # as text, 10 comes before 2
        for number in range(2):
            name = f"{('chair', 'sofa')[item % 2]}_final/{item}_{number}.JPG"
            save_image(images / name, rng, tint=item)
            products[item > 6].append(f"{item * 2 + number} {item} {item % 2} {name}")
    for part, lines in zip(("train", "test"), products):
        (images / f"Ebay_{part}.txt").write_text("\n".join(["image_id class_id super_class_id path", *lines]))
        (source / "online_products/Info_Files").mkdir(exist_ok=True)
        shutil.move(images / f"Ebay_{part}.txt", source / "online_products/Info_Files")
    (source / "glyphs").mkdir()
    for code in (0x41, 0x391, 0x411, 0x5A, 0x2030, 0x266F):
        for number in range(3):
            save_image(source / "glyphs/images" / f"U+{code:04X}" / f"{number}.png", rng, tint=code)
    return source


CROSS = ["--split_scheme", "cross_validation", "--fold", "1", "--num_training_partitions", "2"]
INSIDE = ["--split_scheme", "predefined_with_validation", "--fold", "0", "--num_training_partitions", "2"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tiny", []),
        ("tiny", ["--test_size", "0.25"]),
        ("tiny", [*CROSS, "--split_shuffle", "3"]),
        ("tiny", [*CROSS, "--fold_order", "reality_check", "--test_start_idx", "0"]),
        ("tiny", ["--split_scheme", "closed_set", "--fold", "0", "--num_training_partitions", "2"]),
        ("in-shop", []),
        ("in-shop", INSIDE),
        ("online_products", INSIDE),
        ("online_products", CROSS),
        ("glyphs", []),
    ],
)
def test_written_splits_are_read_back(name: str, flags: list[str], data: Path, tmp_path: Path) -> None:
    """Beside the images, the digests are those of the dataset itself; elsewhere, the images and labels."""
    where = ["--source_path", str(data)]
    opt = config.resolve(config.parse(["--dataset", name, *where, *flags]))
    expected = datasets.give_splits(opt)
    for file in (data / name / "split.csv", tmp_path / "split.csv"):
        check.command(["split", name, *where, *flags, "--out", str(file)])
        again_opt = config.resolve(config.parse(["--dataset", str(file)]))
        again = datasets.give_splits(again_opt)
        assert content(again) == content(expected)
        for (_, images), (_, others) in zip(again.named_sets(), expected.named_sets()):
            assert images.labels.tolist() == others.labels.tolist()
        if file.parent == data / name:
            assert runs.describe_data(again_opt, again) == runs.describe_data(opt, expected)
            assert runs.digest_sets(again_opt, again.test) == runs.digest_sets(opt, expected.test)
            file.unlink()


def test_writing_says_how_to_go_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inside, outside = data / "glyphs" / "shared.csv", tmp_path / "mine.csv"
    check.command(["split", "glyphs", "--source_path", str(data), "--out", str(inside)])
    said = capsys.readouterr()
    assert f"{inside}: 18 images of glyphs (train 9 of 3 classes, test 9 of 3 classes)" in said.out
    assert f"python main.py --dataset {inside} --crop_scale 0.5 --no-flip\n" in said.out
    assert said.err == ""
    assert inside.read_text().splitlines()[1].startswith("images/U+0041/0.png,U+0041,train,LATIN")
    check.command(["split", "glyphs", "--source_path", str(data), "--out", str(outside)])
    assert f"names images by absolute paths: to share it, write it into {data}/glyphs" in capsys.readouterr().err
    inside.unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "a.txt"], "--out a.txt must end in .csv"),
        (["--split_scheme", "cross_validation", "--out", "a.csv"], "has folds: say which with --fold"),
        (["--test_size", "0", "--out", "a.csv"], "is in train and in test, and a CSV file can't say so"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_wrong_ways_to_write_splits_are_refused(
    flags: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        check.command(["split", "tiny", "--source_path", str(data), *flags])
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(UserError, match=r"a.csv exists: move it away"):
        check.command(["split", "tiny", "--source_path", str(data), "--out", "a.csv"])
    assert (tmp_path / "a.csv").read_text() == "mine"


def test_help_names_both_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.command(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: check.py [flags] NAME\n       check.py split [flags] NAME\n\n")
    assert "\n    python check.py cub200\n" in text
    assert "by the command split" in text


def test_a_place_that_cant_be_written_to_is_refused_before_images_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(check, "read_images", lambda *_: pytest.fail("images are read"))
    for place in ("file", "file/folder"):
        with pytest.raises(UserError, match=r"/file is not a folder that can be written to: choose another --out"):
            run("odd", source, tmp_path / place)


def test_commands_to_copy_are_quoted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check.command(["split", "tiny", "--source_path", str(data), "--out", "my split.csv"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("python main.py --dataset 'my split.csv'")


def test_images_whose_names_are_not_utf8_are_told_and_nothing_else_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, name in enumerate("abcd"):
        (tmp_path / "odd/images" / name).mkdir(parents=True)
        for number in range(2):
            smooth(10 * label + number).save(tmp_path / "odd/images" / name / f"{number}.png")
    for copy in ("\udcff.png", "2.png"):
        shutil.copy(tmp_path / "odd/images/a/0.png", tmp_path / "odd/images/b" / copy)
    run("odd", tmp_path, tmp_path / "out", "--near", "0")
    told = r"exclude.csv lacks 1 image not named in UTF-8, such as .*b/\\udcff.png: rename such files"
    assert re.search(told, capsys.readouterr().err)
    assert [row["path"] for row in table(tmp_path / "out/exclude.csv")] == ["images/b/2.png"]
    assert (tmp_path / "out/pairs.html").exists()
    assert (tmp_path / "out/classes.csv").exists()
