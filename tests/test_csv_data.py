"""Datasets in CSV files: reading, crop boxes, bad files, images that are left out, and writing splits."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, make_tree, save_image
from PIL import Image

import config
import datasets
import main
import plots
import runs
from auxiliaries import UserError
from datasets import ImageSet, RetrievalSet, Splits
from transforms import check_image, load_image, split_box, with_box


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of 8 classes, `images/class_<i>/<j>.jpg`, 40 × 36 px."""
    folder = tmp_path_factory.mktemp("csv")
    make_tree(folder / "images", per_class=4)
    return folder


Rows = Sequence[Sequence[Any]]


def write(file: Path, names: str, rows: Rows) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([names.split(","), *rows])
    return file


def read(file: Path, *flags: str) -> Splits:
    return datasets.give_splits(config.resolve(config.parse(["--dataset", str(file), *flags])))


def rows_of(folder: Path, classes: range = range(8)) -> list[list[str]]:
    """A path and a label for each image."""
    return [[f"images/class_{label}/{number}.jpg", f"c{label}"] for label in classes for number in range(4)]


def content(splits: Splits) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Every set's paths with their names of classes, in order."""
    return [
        (name, [(path, [names[one] for names, one in zip(images.class_names, labels)]) for path, labels in pairs])
        for name, images in splits.named_sets()
        for pairs in [list(zip(images.paths, images.labels.tolist()))]
    ]


def paths(images: ImageSet, folder: Path) -> list[str]:
    return [path.removeprefix(f"{folder}/") for path in images.paths]


def test_without_splits_the_sorted_classes_are_halved(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder)
    np.random.default_rng(0).shuffle(rows)
    splits = read(write(folder / "all.csv", "path,label", rows))
    assert splits.train.class_names == [[f"c{label}" for label in range(8)]]
    assert splits.train.labels[:, 0].tolist() == np.repeat(range(4), 4).tolist()
    assert paths(splits.train, folder) == [path for path, _ in rows_of(folder, range(4))]
    assert splits.test[0].query.labels[:, 0].tolist() == np.repeat(range(4, 8), 4).tolist()
    assert read(folder / "all.csv", "--test_size", "0.25").train.num_classes() == 6
    absolute = write(tmp_path / "elsewhere.csv", "label,path", [[label, f"{folder}/{path}"] for path, label in rows])
    assert content(read(absolute)) == content(splits)


def test_columns_say_what_is_for_what(folder: Path) -> None:
    """The order of columns and rows is free; numbers are sorted as numbers."""
    rows: list[list[Any]] = [
        [path, 10 + int(label[1:]), f"p{int(label[1:]) % 2}", "", "", ""] for path, label in rows_of(folder)
    ]
    for i, row in enumerate(rows):
        label = row[1]
        row[3] = "train" if label < 14 else "val" if label < 16 else "test"
        row[4:] = ["", ""] if label < 14 else ["1", "TRUE"] if label < 16 else [i % 2 == 0, "yes" if i % 4 else "0.0"]
    rows[0][1] = rows[1][1] = rows[2][1] = rows[3][1] = 9
    splits = read(write(folder / "columns.csv", "path,label,parent,split,is_query,is_gallery", rows))
    assert splits.train.class_names == [["9", "11", "12", "13", "14", "15", "16", "17"], ["p0", "p1"]]
    assert len(splits.train) == 16
    assert splits.train.labels[:4].tolist() == [[0, 0]] * 4
    (val,), (test,) = splits.val, splits.test
    assert val.gallery is None
    assert len(val.query) == 8
    assert val.name == "val"
    assert test.gallery is not None
    assert test.name == "test"
    expected = [path for path, *_, split, query, _ in rows if split == "test" and query is True]
    assert paths(test.query, folder) == expected
    assert len(test.gallery) == 6
    assert set(test.query.paths) & set(test.gallery.paths)


def test_cross_validation_pools_all_rows(folder: Path) -> None:
    rows = [[*row, "train" if int(row[1][1:]) < 6 else "test"] for row in rows_of(folder)]
    file = write(folder / "pooled.csv", "path,label,split", rows)
    flags = ("--split_scheme", "cross_validation", "--fold", "1", "--num_training_partitions", "2")
    expected = read(write(folder / "plain.csv", "path,label", rows_of(folder)), *flags)
    assert content(read(file, *flags)) == content(expected)
    flags = ("--split_scheme", "predefined_with_validation", "--fold", "0", "--num_training_partitions", "3")
    assert [len(images) for _, images in read(file, *flags).named_sets()] == [16, 8, 8]


@pytest.mark.parametrize("change", [lambda data: b"\xef\xbb\xbf" + data, lambda data: data.replace(b"\n", b"\r\n")])
def test_byte_order_marks_and_line_ends_of_windows(change: Callable[[bytes], bytes], folder: Path) -> None:
    plain = write(folder / "plain.csv", "path,label", rows_of(folder))
    (folder / "other.csv").write_bytes(change(plain.read_bytes().replace(b"\r\n", b"\n") + b"\n\n"))
    assert content(read(folder / "other.csv")) == content(read(plain))


BOXED = "path,label,x1,y1,x2,y2"
A, B = "images/class_0/0.jpg", "images/class_1/0.jpg"


def boxed_rows(folder: Path) -> list[list[Any]]:
    """Two parts of each image, of different classes."""
    halves = [(0, 0, 20, 36), (20, "0.2", 40, 36)]
    return [[path, f"{label}_{half}", *box] for path, label in rows_of(folder) for half, box in enumerate(halves)]


def test_a_box_is_part_of_what_an_image_is(folder: Path) -> None:
    splits = read(write(folder / "boxes.csv", BOXED, boxed_rows(folder)))
    first = splits.train.paths[0]
    assert split_box(first) == (f"{folder}/{A}", (0, 0, 20, 36))
    assert len(set(splits.train.paths)) == len(splits.train) == 32
    whole = load_image(f"{folder}/{A}")
    assert torch.equal(load_image(first), whole[:, :, :20])
    assert torch.equal(load_image(with_box(f"{folder}/{A}", (3, 5, 9, 36))), whole[:, 5:, 3:9])
    opt = config.resolve(config.parse(["--dataset", str(folder / "boxes.csv")]))
    moved = write(folder / "moved.csv", BOXED, [[*row[:2], *row[2:5], 35] for row in boxed_rows(folder)])
    assert runs.describe_data(opt, splits) != runs.describe_data(opt, read(moved))


def test_an_image_without_a_box_is_whole(folder: Path) -> None:
    rows: list[list[Any]] = [[*row, "", "", "", ""] for row in rows_of(folder)]
    rows[0][2:] = [1, 2, 30, 31]
    splits = read(write(folder / "some.csv", BOXED, rows))
    assert paths(splits.train, folder)[:2] == [f"{A}#box=1,2,30,31", "images/class_0/1.jpg"]


def test_boxes_of_turned_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "a.jpg", exif=exif)
    upright = with_box(str(tmp_path / "a.jpg"), (0, 0, 20, 40))
    assert check_image(upright, exif_orientation=True)
    assert load_image(upright, True).shape == (3, 40, 20)
    for read_image in (check_image, load_image):
        with pytest.raises(UserError, match="is 20 px high, and y2 of its crop box is 40"):
            read_image(upright)


def test_boxes_outside_of_images_are_found_before_training(folder: Path, tmp_path: Path) -> None:
    rows = boxed_rows(folder)
    rows[17][4] = 41
    file = write(folder / "outside.csv", BOXED, rows)
    flags = [*SMALL, "--dataset", str(file), "--save_path", str(tmp_path), "--bs", "8"]
    expected = f"row 19 of {file}: {folder}/images/class_2/0.jpg is 40 px wide, and x2 of its crop box is 41: "
    with pytest.raises(UserError, match=re.escape(expected)):
        main.command(flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ("path,lable", [], r"row 1 of {} has the unknown column lable \(did you mean label\?\); it may have path, "),
        (",path,label", [], r"row 1 of {} has a column without a name: name it, or remove it \(pandas: index=False\)"),
        ("path", [[A]], "row 1 of {} has no column label: it needs path and label"),
        ("path,label,label", [], "row 1 of {} has the column label 2 times: remove one"),
        ("path;label", [], "row 1 of {} has no commas, but ';': separate columns by commas"),
        ("path,label", [], "{} has no rows below the names of its columns"),
        ("path,label", [[A, "a"], [B, "  "]], "row 3 of {}, column label: it is empty"),
        ("path,label", [["", "a"]], "row 2 of {}, column path: it is empty"),
        ("path,label", [[A, "a"], [B, "b", "c"]], "row 3 of {} has 3 values for 2 columns: put values that contain"),
        ("path,label", [[A, "a"], ["images/none.jpg", "b"]], "images/none.jpg, row 3 of {}, does not exist"),
        ("path,label", [[A, "a"], [A, "b"]], r"0.jpg belongs to the classes a and b \(row 2 of {}; row 3 of {}\)"),
        ("path,label,split", [[A, "a", "train"], [A, "a", "test"]], r"belongs to train and test \(row 2 of {}; row 3"),
        (
            "path,label,split",
            [[A, "a", "training"]],
            r"row 2 of {}, column split: training .* \(did you mean train\?\)",
        ),
        ("path,label,split", [[A, "a", "tset"]], "row 2 of {}, column split: tset is not one of train, val, test"),
        ("path,label,split", [[A, "a", "test"]], "{}, column split, has no row with train"),
        ("path,label,parent", [[A, "a", ""]], "row 2 of {}, column parent: it is empty"),
        ("path,label,is_query", [[A, "a", 1]], "row 1 of {} has is_query and no column split"),
        ("path,label,split,is_query", [[A, "a", "test", 1]], "row 1 of {} has is_query and no column is_gallery"),
        ("path,label,x1,y1,x2", [[A, "a", 1, 2, 3]], "row 1 of {} has no column y2: a crop box needs x1, y1, x2, y2"),
        (BOXED, [[A, "a", 1, 2, "three", 4]], "row 2 of {}, column x2: three is not a number of pixels"),
        (BOXED, [[A, "a", 1, 2, "inf", 4]], "row 2 of {}, column x2: inf is not a number of pixels"),
        (BOXED, [[A, "a", 1, 2, "", 4]], "row 2 of {}, column x2: it is empty, and other sides of the box aren't"),
        (BOXED, [[A, "a", -1, 2, 3, 4]], "row 2 of {}, column x1: -1 is outside of the image"),
        (BOXED, [[A, "a", 5, 2, 3, 4]], "row 2 of {}, column x2: 3 is not above x1"),
        (BOXED, [[A, "a", 1, 4, 3, 4]], "row 2 of {}, column y2: 4 is not above y1"),
        (BOXED, [[f"{A}#box=1,2,3,4", "a", 1, 2, 3, 4]], "row 2 of {}, column path: .* ends in a crop box"),
    ],
)
def test_bad_files_are_refused(names: str, rows: Rows, message: str, folder: Path) -> None:
    file = write(folder / "bad.csv", names, rows)
    with pytest.raises(UserError, match=message.replace("{}", re.escape(str(file)))):
        read(file)


ROLES = "path,label,split,is_query,is_gallery"


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("maybe", "1"), "row 3 of {}, column is_query: maybe is neither true nor false"),
        (("0", ""), "row 3 of {}, column is_query: the image is neither a query nor in the gallery"),
        (("1", "0"), "{}, column is_gallery, is true of no row of split test"),
        (("0", "1"), "{}, column is_query, is true of no row of split test"),
    ],
)
def test_bad_queries_and_galleries_are_refused(roles: tuple[str, str], message: str, folder: Path) -> None:
    file = write(folder / "roles.csv", ROLES, [[A, "a", "train", "", ""], [B, "b", "test", *roles]])
    with pytest.raises(UserError, match=message.replace("{}", re.escape(str(file)))):
        read(file)
    write(file, ROLES, [[A, "a", "train", "yes", ""], [B, "b", "test", "1", "1"]])
    with pytest.raises(UserError, match="column is_query: yes says that a training image is for retrieval"):
        read(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "{} is empty: its first row names the columns"),
        (b"path,label\na.jpg,caf\xe9\n", r"row 2 of {}, column 2, is not text in UTF-8 \(byte 0xe9\)"),
        ("path,label\na.jpg,b\n".encode("utf-16"), r"row 1 of {}, column 1, is not text in UTF-8 \(byte 0x00\)"),
        (b'path,label\na.jpg,"b\n', "{} is not a CSV file: line 2 can't be read"),
    ],
)
def test_files_that_are_not_csv_are_refused(data: bytes, message: str, folder: Path) -> None:
    file = folder / "odd.csv"
    file.write_bytes(data)
    with pytest.raises(UserError, match=message.replace("{}", re.escape(str(file)))):
        read(file)


def test_a_missing_file_is_refused_with_the_nearest_name(folder: Path) -> None:
    write(folder / "photos.csv", "path,label", rows_of(folder))
    with pytest.raises(UserError, match=r"fotos.csv does not exist \(did you mean photos.csv\?\)"):
        read(folder / "fotos.csv")


def test_oddities_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[*row, "train" if int(row[1][1:]) < 4 else "test", row[1][1:]] for row in rows_of(folder)]
    rows[5][2], rows[6][3] = "test", "x"
    file = write(folder / "odd.csv", "path,label,split,parent", [*rows, rows[3]])
    splits = read(file)
    told = capsys.readouterr().err
    assert (
        f"1 of 8 labels have images in several splits, such as c1: train in row 6, and test in row 7 of {file}" in told
    )
    assert (
        f"1 of 8 labels have several parents, such as c1: 1 in row 6, and x in row 8 of {file}, column parent" in told
    )
    assert f"listed again count once: 1, e.g. {folder}/images/class_0/3.jpg (row 34 of {file})" in told
    assert len(splits.train) == 15


def test_an_image_may_be_a_query_in_one_row_and_in_the_gallery_in_another(folder: Path) -> None:
    (folder / "link.jpg").unlink(missing_ok=True)
    (folder / "link.jpg").symlink_to(folder / B)
    rows = [["images/class_4/0.jpg", "b", "test", 1, 1], ["images/class_4/1.jpg", "b", "test", 0, 1]]
    rows += [[A, "a", "train", "", ""], ["images/class_2/0.jpg", "d", "train", "", ""], [B, "c", "test", 1, 0]]
    rows += [["link.jpg", "c", "test", "", "true"], [B, "c", "test", 1, 1], ["images/class_1/1.jpg", "c", "test", 0, 1]]
    (test,) = read(write(folder / "twice.csv", ROLES, rows)).test
    assert test.gallery is not None
    assert paths(test.query, folder) == ["images/class_4/0.jpg", B]
    assert paths(test.gallery, folder) == ["images/class_4/0.jpg", "images/class_4/1.jpg", B, "images/class_1/1.jpg"]


# Training on it


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on parts of images, some of which are left out, with cached images, and what its pictures show."""
    file = write(folder / "train.csv", BOXED, boxed_rows(folder))
    exclude = write(folder / "exclude.csv", "path,why", [["images/class_0/3.jpg", "blurred"]])
    results, drawn = tmp_path_factory.mktemp("results"), list[plots.Retrieval]()
    flags = [
        *SMALL,
        "--dataset",
        str(file),
        "--exclude",
        str(exclude),
        "--save_path",
        str(results),
        "--savename",
        "run",
    ]
    flags += ["--bs", "8", "--n_epochs", "1", "--cache_images", "--cache_path", str(tmp_path_factory.mktemp("cache"))]
    save = plots.save_recoveries

    def note(path: Path, retrievals: Sequence[plots.Retrieval]) -> None:
        drawn.extend(retrievals)
        save(path, retrievals)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save_recoveries", note)
        patch.setattr(plots, "save_info_plot", lambda path, *_: path.write_text("<svg/>"))
        metrics = main.command([*flags, "--no-check_untrained_accuracy"])
    return {"folder": results / "train.csv" / "run", "metrics": metrics, "drawn": drawn, "flags": flags}


def test_pictures_show_the_parts(trained: dict[str, Any]) -> None:
    shapes = {image.shape for one in trained["drawn"] for image in (one.query, *one.neighbors)}
    assert shapes == {(36, 20, 3)}


def test_cached_images_are_the_parts(trained: dict[str, Any]) -> None:
    more = ["--no-cache_images", "--no-check_untrained_accuracy", "--no-pictures", "--savename", "plain"]
    assert main.command([*trained["flags"], *more]) == trained["metrics"]


def test_what_is_left_out_belongs_to_the_run(
    trained: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained["folder"]
    assert "blurred" in (run / "exclude.csv").read_text()
    assert runs.load_flags(run).exclude == str(folder / "exclude.csv")
    data = runs.read_data(run)
    assert data is not None
    assert data["train"]["images"] == 30
    capsys.readouterr()
    metrics = main.command(["--evaluate", str(run), "--gpu", "-1"])
    told = "exclude.csv leaves out 2 images of train.csv: 2 of 32 of train, 0 of 32 of test"
    assert told in capsys.readouterr().err
    assert metrics["test Recall @ 1"] == trained["metrics"]["Recall @ 1"]
    write(folder / "more.csv", "path", [[A]])
    with pytest.raises(UserError, match=r"data have changed.*train has 30 images of 8 classes, but other ones"):
        main.command(["--evaluate", str(run), "--gpu", "-1", "--exclude", str(folder / "more.csv")])


# Images that are left out


def test_whole_images_and_parts_are_left_out(folder: Path) -> None:
    whole = read(write(folder / "boxes.csv", BOXED, boxed_rows(folder)))
    rows: Rows = [
        [B, "", "", "", ""],
        [str(folder / A), 20, 0, 40, 36],
        ["./images/../images/class_7/1.jpg", 0, 0, 20, 36],
    ]
    exclude = write(folder / "exclude_parts.csv", "path,x1,y1,x2,y2", rows)
    splits = read(folder / "boxes.csv", "--exclude", str(exclude))
    gone = [path.removeprefix(f"{folder}/") for path in set(whole.train.paths) - set(splits.train.paths)]
    assert sorted(gone) == [f"{A}#box=20,0,40,36", f"{B}#box=0,0,20,36", f"{B}#box=20,0,40,36"]
    assert len(splits.test[0].query) == len(whole.test[0].query) - 1


def test_images_of_folders_are_left_out(folder: Path) -> None:
    exclude = write(folder / "exclude_folders.csv", "reason,path", [["twin", A]])
    splits = read(folder, "--exclude", str(exclude))
    assert [len(images) for _, images in splits.named_sets()] == [15, 16]


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ("path", [[A], ["images/none.jpg"]], "row 3 of {}, column path: images/none.jpg is not an image of csv"),
        ("path", [["a"], ["b"], ["c"]], "a is not an image of csv.*, nor are those of 2 other rows: correct it"),
        ("path,x1,y1,x2,y2", [[A, 1, 2, 3, 4]], f"{A} with the crop box 1, 2, 3, 4 is not an image of csv"),
        ("paht", [[A]], "row 1 of {} has no column path: it needs path, and has paht"),
        ("path,x1", [[A, 1]], "row 1 of {} has no column y1: a crop box needs"),
    ],
)
def test_wrong_lists_of_images_to_leave_out_are_refused(names: str, rows: Rows, message: str, folder: Path) -> None:
    exclude = write(folder / "wrong.csv", names, rows)
    with pytest.raises(UserError, match=message.replace("{}", re.escape(str(exclude)))):
        read(folder, "--exclude", str(exclude))
    with pytest.raises(UserError, match=r"nowhere.csv can't be read"):
        read(folder, "--exclude", "nowhere.csv")


def test_leaving_out_all_images_is_refused(folder: Path) -> None:
    exclude = write(folder / "all.csv", "path", [[name] for name, _ in rows_of(folder)])
    with pytest.raises(UserError, match=r"all.csv leaves out all 32 images of csv\d*: remove some of its rows"):
        read(folder, "--exclude", str(exclude))


# Finding the file


def test_names_and_paths_of_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "plain.csv", "path,label", rows_of(folder))
    assert datasets.find_dataset("plain.csv", str(folder)) == ("plain.csv", str(folder))
    assert datasets.find_dataset(str(folder / "plain.csv"), "Datasets") == ("plain.csv", str(folder))
    monkeypatch.chdir(folder)
    assert datasets.find_dataset("plain.csv", "Datasets") == ("plain.csv", ".")
    monkeypatch.chdir(folder.parent)
    assert datasets.find_dataset(f"{folder.name}/plain.csv", "Datasets") == ("plain.csv", folder.name)
    make_tree(tmp_path / "folder.csv" / "images", classes=4, per_class=2)
    assert len(read(tmp_path / "folder.csv").train) == 4  # a folder is a folder


def test_a_description_of_data_doesnt_depend_on_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "plain.csv", "path,label", [[f"./{path}", label] for path, label in rows_of(folder)])

    def describe(name: str) -> runs.DataDescription:
        opt = config.resolve(config.parse(["--dataset", name]))
        return runs.describe_data(opt, datasets.give_splits(opt))

    absolute = describe(str(folder / "plain.csv"))
    monkeypatch.chdir(folder)
    assert describe("plain.csv") == describe("./plain.csv") == absolute


# Writing


def written(splits: Splits, file: Path) -> Splits:
    datasets.write_csv_splits(file, splits)
    return datasets.read_splits(file.name, str(file.parent))


def test_splits_are_read_back(folder: Path) -> None:
    whole = read(write(folder / "boxes.csv", BOXED, boxed_rows(folder)))
    assert content(written(whole, folder / "copy.csv")) == content(whole)
    (images,) = [one.query for one in whole.test]
    half = np.arange(len(images)) % 2 == 0
    test = RetrievalSet("test", images.subset(half), images)
    val = RetrievalSet("val", whole.train.subset(whole.train.labels[:, 0] < 2))
    splits = Splits(whole.train.subset(whole.train.labels[:, 0] >= 2), [val], [test])
    again = written(splits, folder / "gallery.csv")
    assert content(again) == content(splits)
    assert again.val[0].gallery is None
    with open(folder / "gallery.csv", encoding="utf-8") as opened:
        assert opened.readline() == "path,label,split,is_query,is_gallery,x1,y1,x2,y2\n"


def test_paths_outside_of_the_files_folder_are_absolute(folder: Path, tmp_path: Path) -> None:
    splits = read(folder)
    assert content(written(splits, tmp_path / "copy.csv")) == content(splits)


def test_what_a_file_cant_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    splits = read(folder)
    several = Splits(splits.train, test=[*splits.test, RetrievalSet("small", splits.test[0].query)])
    with pytest.raises(UserError, match="holds one test set, and these splits have test, small"):
        datasets.write_csv_splits(tmp_path / "a.csv", several)
    with pytest.raises(UserError, match="is in train and in test, and a CSV file can't say so"):
        datasets.write_csv_splits(tmp_path / "a.csv", Splits(splits.train, test=[RetrievalSet("test", splits.train)]))
    odd = ImageSet([str(tmp_path / "a,\n\udcff.jpg")], np.zeros((1, 1), np.int64), [["a"]])
    with pytest.raises(UserError, match=re.escape(r"can't hold a name that is not UTF-8, 'a,\n\\udcff.jpg': rename")):
        datasets.write_csv_splits(tmp_path / "a.csv", Splits(odd))
    assert not list(tmp_path.iterdir())


def test_names_with_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ["a, b", 'say "c"', "two\nlines", "é", " x "]
    for i, name in enumerate(names):
        for number in range(2):
            save_image(tmp_path / "images" / f"{name}" / f"{number},.jpg", rng, tint=i)
    splits = read(tmp_path)
    assert content(written(splits, tmp_path / "copy.csv")) == content(splits)


@pytest.mark.slow
def test_a_million_rows(folder: Path) -> None:
    count = 10**6
    rows = ((A, f"c{i % 10**4}", "train" if i % 10**4 < 5000 else "test", i, 0, i + 9, 9) for i in range(count))
    splits = datasets.read_splits(write(folder / "large.csv", "path,label,split,x1,y1,x2,y2", rows).name, str(folder))  # type: ignore[arg-type]
    assert len(splits.train) == len(splits.test[0].query) == count // 2
    (folder / "large.csv").unlink()
