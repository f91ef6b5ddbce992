"""Readers, downloads, splits, batches and loaders, on small trees and with a server on the loopback address."""

from __future__ import annotations

import errno
import hashlib
import inspect
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import stat
import struct
import tarfile
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, csv_rows, make_tree, save_image
from PIL import Image
from pytorch_metric_learning.samplers import HierarchicalSampler as LibrarysSampler
from scipy.io import loadmat, savemat

import config
import datasets
import main
import transforms
from auxiliaries import FlagParser, UserError, seed_everything
from datasets import (
    BATCH_SAMPLERS,
    DATASETS,
    Archive,
    BaseTripletDataset,
    BatchSampler,
    DatasetSpec,
    ImageDataset,
    ImageLoader,
    ImageSet,
    Loaders,
    RetrievalSet,
    Splits,
    class_balanced,
    class_balanced_redrawn,
    class_disjoint_splits,
    collate,
    make_image_set,
    shuffled,
)

# Small trees in the layouts of the official archives. Their files are empty, as readers look at names alone.

CUB_CLASSES = ("110.Red_Bird", "2.Laysan", "100.Wren", "101.Black_Bird")
CAR_CLASSES = ("Ram C/V Cargo Van 2012", "BMW M3 2012", "Acura TL 2012", "Audi A5 2012")
CAR_FIELDS = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
SUPER_CLASSES = (
    *("bicycle", "cabinet", "chair", "coffee_maker", "fan", "kettle"),
    *("lamp", "mug", "sofa", "stapler", "table", "toaster"),
)
IN_SHOP_ROWS = (
    ("img/WOMEN/Dresses/id_00000007/01_1_front.jpg", "id_00000007", "train"),
    ("img/WOMEN/Dresses/id_00000007/02_3_back.jpg", "id_00000007", "train"),
    ("img/MEN/Denim/id_00000080/01_1_front.jpg", "id_00000080", "train"),
    ("img/MEN/Denim/id_00000080/01_2_side.jpg", "id_00000080", "train"),
    ("img/MEN/Denim/id_00000002/05_1_front.jpg", "id_00000002", "gallery"),
    ("img/MEN/Denim/id_00000002/05_2_side.jpg", "id_00000002", "query"),
    ("img/WOMEN/Shorts/id_00000033/01_1_front.jpg", "id_00000033", "query"),
    ("img/WOMEN/Shorts/id_00000033/01_7_additional.jpg", "id_00000033", "gallery"),
)
VEHICLES = {
    "train_list": "1 9\n12 9\n3 40\n1234567 40\n",
    "test_list_800": "20 7\n21 7\n",
    "test_list_1600": "20 7\n21 7\n22 100\n23 100\n",
    "test_list_2400": "20 7\n21 7\n22 100\n23 100\n24 25\n25 25\n",
}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_birds(root: Path) -> None:
    touch(root / "images", *(f"{name}/{i}.jpg" for name in ("wren", "crow", "owl", "tit", "jay") for i in range(2)))


def write_cub200(root: Path, images: str = "images") -> None:
    touch(root / images, *(f"{name}/{i}.jpg" for name in CUB_CLASSES for i in range(2)))


def write_cars196(root: Path, official: bool = True) -> None:
    """Eight images, in a folder for each class or, officially, together and beside their annotations."""
    classes = (3, 1, 2, 4, 4, 2, 1, 3)  # positions in CAR_CLASSES, counted from 1 as in MATLAB
    files = [f"{number:06d}.jpg" for number in range(1, 9)]
    if not official:
        folders = [CAR_CLASSES[number - 1].replace("/", "-") for number in classes]
        return touch(root / "images", *(f"{folder}/{file}" for folder, file in zip(folders, files)))
    touch(root / "car_ims", *files)
    annotations = np.empty((1, 8), dtype=[(name, object) for name in CAR_FIELDS])
    for i in range(8):
        annotations[0, i] = (f"car_ims/{files[i]}", 10, 20, 300, 200, classes[i], i % 2)
    names = np.empty((1, 4), dtype=object)
    names[0] = CAR_CLASSES
    savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names}, do_compression=True)


def write_online_products(root: Path, official: bool = False) -> None:
    """24 classes of two images, half of them for training, each half with all twelve super classes."""
    images, lists = ("Stanford_Online_Products",) * 2 if official else ("images", "Info_Files")
    for part, class_ids in (("train", range(1, 13)), ("test", range(13, 25))):
        rows = [(c, f"{SUPER_CLASSES[(c - 1) % 12]}_final/{c}_{i}.JPG") for c in class_ids for i in range(2)]
        touch(root / images, *(path for _, path in rows))
        listed = [f"{n} {c} {(c - 1) % 12 + 1} {path}\n" for n, (c, path) in enumerate(rows, start=1)]
        listed[0] = listed[0].replace(".JPG", ".jpg")  # differs from its file
        write(root / lists / f"Ebay_{part}.txt", "image_id class_id super_class_id path\n" + "".join(listed))
    touch(root / lists, "Ebay_info.txt", "bicycle_final.txt")


def write_in_shop(
    root: Path, images: str = "img", info_file: str = "Eval/list_eval_partition.txt", announced: int = len(IN_SHOP_ROWS)
) -> None:
    touch((root / images).parent, *(name for name, _, _ in IN_SHOP_ROWS))
    rows = "".join(f"{name:<70}{item:<15}{part}\n" for name, item, part in IN_SHOP_ROWS)
    write(root / info_file, f"{announced}\nimage_name item_id evaluation_status\n{rows}")


def write_vehicle_id(root: Path) -> None:
    for name, rows in VEHICLES.items():
        write(root / "train_test_split" / f"{name}.txt", rows)
        touch(root / "image", *(f"{int(row.split()[0]):07d}.jpg" for row in rows.splitlines()))


def write_caltech101(root: Path, images: str = "101_ObjectCategories") -> None:
    names = ("Faces", "accordion", "ant", "bass", "BACKGROUND_Google")
    touch(root / images, *(f"{name}/image_{i:04d}.jpg" for name in names for i in (1, 2)))


def write_inaturalist2018(root: Path, lists: str = "Inat_dataset_splits") -> None:
    """Two super categories with a class for training and one for testing each."""
    for part, classes in (("train", ("Aves/4102", "Plantae/17")), ("test", ("Aves/9", "Plantae/6000"))):
        paths = [f"train_val2018/{name}/{i}.jpg" for name in classes for i in range(2)]
        touch(root, *paths)
        write(root / lists / f"Inaturalist_{part}_set1.txt", "".join(f"{path}\n" for path in paths))


WRITE: dict[str, Callable[..., None]] = {
    "caltech101": write_caltech101,
    "inaturalist2018": write_inaturalist2018,
    "birds": write_birds,
    "cub200": write_cub200,
    "cars196": write_cars196,
    "online_products": write_online_products,
    "in-shop": write_in_shop,
    "vehicle_id": write_vehicle_id,
}

Content = dict[str, list[tuple[str, ...]]]


def content(splits: Splits) -> Content:
    """For each set its images: the file's name, and for each level the label with the name that it stands for."""
    sets = {"train": splits.train}
    for test in splits.test:
        sets |= {test.name: test.query} | ({f"{test.name}, gallery": test.gallery} if test.gallery else {})
    for images in sets.values():
        assert all(os.path.isfile(path) for path in images.paths)
        assert images.labels.dtype == np.int64
        assert images.labels.shape == (len(images), len(images.class_names))

    def described(images: ImageSet) -> list[tuple[str, ...]]:
        return [
            (os.path.basename(path), *(f"{label} {names[label]}" for label, names in zip(labels, images.class_names)))
            for path, labels in zip(images.paths, images.labels.tolist())
        ]

    return {name: described(images) for name, images in sets.items()}


EXPECTED: dict[str, Content] = {
    "caltech101": {
        "train": [(f"image_{i:04d}.jpg", name) for name in ("0 Faces", "1 accordion") for i in (1, 2)],
        "test": [(f"image_{i:04d}.jpg", name) for name in ("2 ant", "3 bass") for i in (1, 2)],
    },
    "inaturalist2018": {
        "train": [
            (f"{i}.jpg", *row) for row in (("0 Aves/4102", "0 Aves"), ("2 Plantae/17", "1 Plantae")) for i in (0, 1)
        ],
        "test": [
            (f"{i}.jpg", *row) for row in (("1 Aves/9", "0 Aves"), ("3 Plantae/6000", "1 Plantae")) for i in (0, 1)
        ],
    },
    "birds": {
        "train": [(f"{i}.jpg", name) for name in ("0 crow", "1 jay") for i in range(2)],
        "test": [(f"{i}.jpg", name) for name in ("2 owl", "3 tit", "4 wren") for i in range(2)],
    },
    "cub200": {
        "train": [(f"{i}.jpg", name) for name in ("0 2.Laysan", "1 100.Wren") for i in range(2)],
        "test": [(f"{i}.jpg", name) for name in ("2 101.Black_Bird", "3 110.Red_Bird") for i in range(2)],
    },
    "cars196": {
        "train": [
            ("000001.jpg", "0 Acura TL 2012"),
            ("000008.jpg", "0 Acura TL 2012"),
            ("000004.jpg", "1 Audi A5 2012"),
            ("000005.jpg", "1 Audi A5 2012"),
        ],
        "test": [
            ("000003.jpg", "2 BMW M3 2012"),
            ("000006.jpg", "2 BMW M3 2012"),
            ("000002.jpg", "3 Ram C-V Cargo Van 2012"),
            ("000007.jpg", "3 Ram C-V Cargo Van 2012"),
        ],
    },
    "online_products": {
        part: [
            (f"{c}_{i}.JPG", f"{c - 1} {c}", f"{(c - 1) % 12} {SUPER_CLASSES[(c - 1) % 12]}")
            for c in class_ids
            for i in range(2)
        ]
        for part, class_ids in (("train", range(1, 13)), ("test", range(13, 25)))
    },
    "in-shop": {  # labels are sorted by name over all parts; query and gallery share theirs
        "train": [
            ("01_1_front.jpg", "1 id_00000007", "1 WOMEN/Dresses"),
            ("02_3_back.jpg", "1 id_00000007", "1 WOMEN/Dresses"),
            ("01_1_front.jpg", "3 id_00000080", "0 MEN/Denim"),
            ("01_2_side.jpg", "3 id_00000080", "0 MEN/Denim"),
        ],
        "test": [
            ("05_2_side.jpg", "0 id_00000002", "0 MEN/Denim"),
            ("01_1_front.jpg", "2 id_00000033", "2 WOMEN/Shorts"),
        ],
        "test, gallery": [
            ("05_1_front.jpg", "0 id_00000002", "0 MEN/Denim"),
            ("01_7_additional.jpg", "2 id_00000033", "2 WOMEN/Shorts"),
        ],
    },
    "vehicle_id": {
        "train": [("0000001.jpg", "1 9"), ("0000012.jpg", "1 9"), ("0000003.jpg", "3 40"), ("1234567.jpg", "3 40")],
        "800": [("0000020.jpg", "0 7"), ("0000021.jpg", "0 7")],
        "1600": [("0000020.jpg", "0 7"), ("0000021.jpg", "0 7"), ("0000022.jpg", "4 100"), ("0000023.jpg", "4 100")],
        "2400": [
            *(("0000020.jpg", "0 7"), ("0000021.jpg", "0 7")),
            *(("0000024.jpg", "2 25"), ("0000025.jpg", "2 25")),
            *(("0000022.jpg", "4 100"), ("0000023.jpg", "4 100")),
        ],
    },
}

LAYOUTS = [
    ("birds", {}),
    ("cub200", {"images": "images"}),
    ("cub200", {"images": "CUB_200_2011/images"}),
    ("cars196", {"official": False}),
    ("cars196", {"official": True}),
    ("online_products", {"official": False}),
    ("online_products", {"official": True}),
    ("in-shop", {}),
    ("in-shop", {"info_file": "list_eval_partition.txt"}),
    ("in-shop", {"images": "Img/img"}),
    ("in-shop", {"images": "Img/img", "info_file": "list_eval_partition.txt"}),
    ("vehicle_id", {}),
    ("caltech101", {}),
    ("caltech101", {"images": "caltech-101/101_ObjectCategories"}),
    ("caltech101", {"images": ""}),
    ("inaturalist2018", {}),
    ("inaturalist2018", {"lists": ""}),
]

# Classes and images of each set, and the k of Recall @ k, as published.
PUBLISHED: dict[str, tuple[dict[str, tuple[int, int | None]], tuple[int, ...]]] = {
    "cub200": ({"train": (100, 5864), "test": (100, 5924)}, (1, 2, 4, 8)),
    "cars196": ({"train": (98, 8054), "test": (98, 8131)}, (1, 2, 4, 8)),
    "online_products": ({"train": (11318, 59551), "test": (11316, 60502)}, (1, 10, 100, 1000)),
    "in-shop": ({"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)}, (1, 10, 20, 30, 50)),
    "vehicle_id": ({"train": (13134, 110178), "800": (800, None), "1600": (1600, None), "2400": (2400, None)}, (1, 5)),
    "caltech101": ({"train": (50, 5526), "test": (51, 3151)}, (1, 2, 4, 8)),
    "inaturalist2018": ({"train": (5690, 325846), "test": (2452, 136093)}, (1, 4, 16, 32)),
}


def read(dataset: str, source: Path) -> Splits:
    return datasets.read_splits(dataset, str(source))


def given(dataset: str, source: Path, *flags: str) -> Splits:
    """The splits of a run with these flags."""
    where = ["--dataset", dataset, "--source_path", str(source), "--not_pretrained"]
    return datasets.give_splits(config.resolve(config.parse([*where, *flags])))


def read_spoiled(dataset: str, path: str, spoil: Callable[[Path], object], source: Path) -> str:
    """Writes a dataset, spoils one of its files, and returns the error that reading it gives."""
    WRITE[dataset](source / dataset)
    spoil(source / dataset / path)
    with pytest.raises(UserError) as error:
        read(dataset, source)
    return str(error.value)


def assert_one_sentence(message: str, *parts: object) -> None:
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.mark.parametrize(("dataset", "layout"), LAYOUTS, ids=str)
def test_every_layout_gives_the_protocols_splits(dataset: str, layout: dict, tmp_path: Path) -> None:
    WRITE[dataset](tmp_path / dataset, **layout)
    assert content(read(dataset, tmp_path)) == EXPECTED[dataset]


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_counts_that_differ_from_the_published_ones_are_noticed_with_both_numbers(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITE[dataset](tmp_path / dataset)
    found = content(read(dataset, tmp_path))
    if dataset == "in-shop":
        found = {"train": found["train"], "query": found["test"], "gallery": found["test, gallery"]}
    counts, k_vals = PUBLISHED[dataset]
    expected = set()
    for part, (classes, images) in counts.items():
        here = len({names for _, names, *_ in found[part]})
        expected.add(f"{dataset}, {part}: {here} classes, but the published protocol has {classes}")
        if images is not None:
            expected.add(f"{dataset}, {part}: {len(found[part])} images, but the published protocol has {images}")
    assert set(capsys.readouterr().err.splitlines()) == {f"notice: {line}" for line in expected}
    assert datasets.default_k_vals(dataset) == k_vals


def test_a_whole_dataset_is_read_without_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "cub200" / "images"
    for number in range(1, 201):
        surplus = {1: 64, 200: 24}.get(number, 0)  # 100 * 58 + 64 = 5864, 100 * 59 + 24 = 5924
        touch(images / f"{number:03d}.Bird", *(f"{i}.jpg" for i in range((58 if number <= 100 else 59) + surplus)))
    splits = read("cub200", tmp_path)
    assert (splits.train.num_classes(), splits.test[0].query.num_classes()) == (100, 100)
    assert capsys.readouterr().err == ""


def test_a_wrong_announced_count_is_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_in_shop(tmp_path / "in-shop", announced=52712)
    assert content(read("in-shop", tmp_path)) == EXPECTED["in-shop"]
    assert "list_eval_partition.txt has 8 rows, and its first line says 52712" in capsys.readouterr().err


def test_hidden_files_are_not_images_and_other_files_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_birds(tmp_path / "birds")
    touch(tmp_path / "birds/images", "._crow", ".thumbs/0.jpg", "crow/._0.jpg", "crow/.DS_Store", "jay/.hidden.png")
    assert content(read("birds", tmp_path)) == EXPECTED["birds"]
    assert capsys.readouterr().err == ""

    touch(tmp_path / "birds/images", "crow/2.JPEG", "crow/notes.txt", "tit/a.mp4")
    assert content(read("birds", tmp_path))["train"][2] == ("2.JPEG", "0 crow")
    assert_one_sentence(capsys.readouterr().err.strip(), "notice: 2 files", tmp_path / "birds/images/crow/notes.txt")


def test_images_outside_of_class_folders_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "birds/images"
    write_birds(tmp_path / "birds")
    touch(images, "0.jpg", "1.PNG", "list.txt", "crow/young/2.jpg", "crow/young/far/3.jpg", "jay/.thumbs/4.jpg")
    touch(images, "owl/young/notes.txt")
    assert content(read("birds", tmp_path)) == EXPECTED["birds"]
    assert set(capsys.readouterr().err.splitlines()) == {
        f"notice: 2 images that are in no class folder of {images} are ignored, e.g. {images}/0.jpg",
        f"notice: 2 images in subfolders of class folders of {images} are ignored, e.g. {images}/crow/young/2.jpg",
    }
    touch(images, "tern/young/0.jpg")
    with pytest.raises(UserError, match=r"tern contains no images itself: add some, or remove the folder"):
        read("birds", tmp_path)


@pytest.mark.parametrize("name", ["tern", "crow/7.jpg"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_links_that_lead_nowhere_are_refused(name: str, target: str, tmp_path: Path) -> None:
    write_birds(tmp_path / "birds")
    link = tmp_path / "birds/images" / name
    link.symlink_to(link if target == "itself" else tmp_path / "gone")
    with pytest.raises(UserError) as error:
        read("birds", tmp_path)
    assert_one_sentence(str(error.value), f"{link} is a link that leads nowhere")


def test_links_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_birds(tmp_path / "birds")
    touch(tmp_path / "elsewhere", "0.jpg", "1.jpg", "2.jpg")
    for name in ("owl", "owl/1.jpg"):
        path = tmp_path / "birds/images" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(tmp_path / "elsewhere" / ("" if name == "owl" else "2.jpg"))
        if name == "owl":
            path.unlink()
            touch(path, "0.jpg", "1.jpg")
    (tmp_path / "birds/images/tit/notes.txt").symlink_to(tmp_path / "gone")
    assert content(read("birds", tmp_path)) == EXPECTED["birds"]
    assert capsys.readouterr().err == ""


def with_part(*parts: str) -> list[str]:
    """Class folders below folders of parts: four classes each, two of which are the next part's, too."""
    names = ("crow", "jay", "owl", "tern", "tit", "wren")
    return [f"{part}/{name}/{n}.jpg" for i, part in enumerate(parts) for name in names[i : i + 4] for n in range(2)]


@pytest.mark.parametrize("inside", ["", "images/"])
@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")], ids="-".join)
def test_folders_of_parts_split_as_they_say(
    parts: tuple[str, ...], inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "birds" / inside, *with_part(*parts))
    splits = given("birds", tmp_path)
    found = {"train": splits.train} | {one.name: one.query for one in (*splits.val, *splits.test)}
    assert [one.name for one in splits.val] == [part for part in parts if part == "val"]
    assert list(found) == list(parts)
    for part, images in found.items():
        names = {images.class_names[0][label] for label in images.labels[:, 0]}
        prefix = f"{tmp_path}/birds/{inside}{part}/"
        assert all(path.startswith(prefix) for path in images.paths)
        assert names == {path.removeprefix(prefix).split("/")[0] for path in images.paths}
        assert len(images) == 8
    assert capsys.readouterr().err.count("some of its classes are training classes, too") == len(parts) - 1
    with pytest.raises(UserError, match=r"--test_size 0\.3 contradicts the folders train"):
        given("birds", tmp_path, "--test_size", "0.3")


def test_folders_of_parts_may_be_written_in_capitals(tmp_path: Path) -> None:
    touch(tmp_path / "birds", *with_part("Train", "VAL", "Test"))
    splits = given("birds", tmp_path)
    assert [one.name for one in (*splits.val, *splits.test)] == ["val", "test"]
    assert all(path.startswith(f"{tmp_path}/birds/Train/") for path in splits.train.paths)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("training", "testing"), "testing is not read as a part of the images: rename it to test"),
        (("train", "Validation"), "Validation is not read as a part of the images: rename it to val"),
        (("training",), "training is not read as a part of the images: rename it to train"),
        (("Train", "test", "train"), "has both Train and train: put their class folders into one"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_folders_that_only_sound_like_parts_are_refused(parts: tuple[str, ...], words: str, tmp_path: Path) -> None:
    touch(tmp_path / "birds", *with_part(*parts))
    with pytest.raises(UserError) as error:
        given("birds", tmp_path)
    assert words in str(error.value)


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    touch(tmp_path / "vehicles", *(f"{name}/{i}.jpg" for name in ("bus", "images", "test", "train") for i in range(2)))
    splits = given("vehicles", tmp_path)
    assert list(splits.train.class_names[0]) == ["bus", "images", "test", "train"]
    assert splits.train.num_classes() == splits.test[0].query.num_classes() == 2


def test_training_images_alone_leave_nothing_to_evaluate_on(tmp_path: Path) -> None:
    touch(tmp_path / "birds", *with_part("train"))
    with pytest.raises(UserError, match="has a folder train, but neither val nor test beside it"):
        given("birds", tmp_path)
    assert len(given("train", tmp_path / "birds").train) == 4  # as a dataset of its own


@pytest.mark.parametrize("inside", ["", "images"])
@pytest.mark.parametrize(("size", "num_train"), [("0.5", 5), ("0.3", 7), ("0.9", 1), ("0.25", 7), ("0.34", 6)])
def test_the_share_of_classes_to_test_on_can_be_chosen(inside: str, size: str, num_train: int, tmp_path: Path) -> None:
    touch(tmp_path / "birds" / inside, *(f"{name}/{i}.jpg" for name in "abcdefghij" for i in range(2)))
    flags = config.parse(["--dataset", "birds", "--source_path", str(tmp_path), "--test_size", size])
    splits = datasets.read_splits("birds", flags.source_path, test_size=flags.test_size)
    assert np.unique(splits.train.labels).tolist() == list(range(num_train))
    assert np.unique(splits.test[0].query.labels).tolist() == list(range(num_train, 10))


def test_all_classes_may_be_trained_and_evaluated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_birds(tmp_path / "birds")
    splits = given("birds", tmp_path, "--test_size", "0")
    assert len(splits.train) == 10
    assert list(splits.test[0].query.paths) == list(splits.train.paths)
    words = "notice: --test_size 0: birds is evaluated on its training classes, which says nothing about unseen ones"
    assert capsys.readouterr().err.splitlines() == [words]


@pytest.mark.parametrize(
    ("dataset", "flags", "words"),
    [
        ("cub200", ["--test_size", "0.3"], "--test_size 0.3 contradicts cub200's own split"),
        ("birds", ["--test_size", "0.1"], "birds, test: 1 class(es) to search: at least two are needed"),
        ("birds", ["--test_size", "1e-300"], "birds, test: 0 class(es) to search: at least two are needed"),
        ("birds", ["--test_size", "0.9"], "has 0 training class(es)"),
        (
            "birds",
            ["--test_size", "0", "--split_scheme", "cross_validation", "--fold", "0"],
            "leaves 0 test class(es) of 5",
        ),
    ],
)
def test_impossible_test_sizes_are_refused(dataset: str, flags: list[str], words: str, tmp_path: Path) -> None:
    WRITE[dataset](tmp_path / dataset)
    with pytest.raises(UserError) as error:
        given(dataset, tmp_path, *flags)
    assert_one_sentence(str(error.value), words)


@pytest.mark.parametrize(
    ("dataset", "source", "expected"),
    [
        ("birds", "Datasets", ("birds", "Datasets")),
        ("/data/birds", "Datasets", ("birds", "/data")),
        ("/data/birds/", "Datasets", ("birds", "/data")),
        ("./birds", "Datasets", ("birds", ".")),
        ("../birds", "Datasets", ("birds", "..")),
        ("a/../birds/x", "Datasets", ("x", "birds")),
        ("~/birds", "Datasets", ("birds", "HOME")),
        ("small/birds", "Datasets", ("birds", "Datasets/small")),  # it exists only there
        ("small/fish", "Datasets", ("fish", "small")),
        (".", "Datasets", ("here", "PARENT")),
    ],
)
def test_a_dataset_may_be_given_by_its_path(
    dataset: str, source: str, expected: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/Datasets/small/birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name, folder = expected
    folder = {"HOME": str(tmp_path / "home"), "PARENT": str(tmp_path)}.get(folder, folder)
    opt = config.resolve(config.parse(["--dataset", dataset, "--source_path", source]))
    assert (opt.dataset, opt.source_path) == (name, folder)
    assert opt.savename.startswith(f"{name}_resnet50_")


def test_a_path_to_a_named_dataset_has_its_protocol(tmp_path: Path) -> None:
    write_cub200(tmp_path / "far" / "cub200")
    opt = config.resolve(config.parse(["--dataset", f"{tmp_path}/far/cub200"]))
    assert content(datasets.give_splits(opt)) == EXPECTED["cub200"]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [("Caltech101", "did you mean caltech101?"), ("CUB200", "did you mean cub200?"), ("fish", "contains birds, calt")],
)
def test_the_name_of_a_dataset_that_is_there_is_proposed(dataset: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "caltech101").mkdir()
    write_birds(tmp_path / "birds")
    with pytest.raises(UserError) as error:
        read(dataset, tmp_path)
    assert_one_sentence(str(error.value), words)


def test_classes_of_cub200_are_split_by_their_numbers(tmp_path: Path) -> None:
    """With class folders missing, too: otherwise class 101 would be trained on."""
    touch(tmp_path / "cub200/images", *(f"{n:03d}.Bird/{i}.jpg" for n in (1, 2, 101, 102, 103, 200) for i in range(2)))
    splits = read("cub200", tmp_path)
    assert {path.split("/")[-2] for path in splits.train.paths} == {"001.Bird", "002.Bird"}
    assert splits.test[0].query.num_classes() == 4
    for name in ("001.Bird", "002.Bird"):
        shutil.rmtree(tmp_path / "cub200/images" / name)
    with pytest.raises(UserError, match="lacks the classes up to 100"):
        read("cub200", tmp_path)


def test_files_may_have_any_name(tmp_path: Path) -> None:
    """Bytes that are not UTF-8, quotes, spaces, line breaks; class names can be printed anywhere."""
    names = [b"caf\xe9", b"a 'b'", b'"', b"\xe9\xb3\xa5", b"x\ny", b"NA"]
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path), b"birds", name)
        os.makedirs(folder)
        for file in (b"\xff.jpg", b"0.jpg"):
            with open(os.path.join(folder, file), "wb"):
                pass
    splits = given("birds", tmp_path)
    assert set(splits.train.class_names[0]) == {"caf\\udce9", "a 'b'", '"', "鳥", "x\ny", "NA"}
    assert all(os.path.isfile(path) for path in (*splits.train.paths, *splits.test[0].query.paths))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800"], ids=["long", "NUL", "surrogate"])
def test_names_that_no_file_can_have_are_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        read("birds", tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_that_cannot_be_read_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_birds(tmp_path / "birds")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("crow"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError) as error:
        read("birds", tmp_path)
    assert_one_sentence(str(error.value), f"{tmp_path}/birds/images/crow can't be used (Permission denied)")


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Splits]:
    source = tmp_path_factory.mktemp("glyphs")
    return source, read("glyphs", source)


def test_glyphs_are_sixteen_renderings_of_characters_that_no_other_looks_like(glyphs: tuple[Path, Splits]) -> None:
    splits = glyphs[1]
    train, test = splits.train, splits.test[0].query
    characters, scripts = (list(names) for names in train.class_names)
    assert len(characters) > 600
    assert characters == sorted(characters, key=lambda name: int(name[2:], 16))
    assert {"U+0041", "U+0416"} <= set(characters)  # Latin A, Cyrillic Zhe
    assert "U+0391" not in characters  # Greek Alpha looks like Latin A
    assert {"LATIN", "GREEK", "CYRILLIC"} <= set(scripts)

    seen: dict[bytes, set[int]] = defaultdict(set)
    for images, first, last in ((train, 0, len(characters) // 2), (test, len(characters) // 2, len(characters))):
        assert np.bincount(images.labels[:, 0])[first:].tolist() == [16] * (last - first)
        for path, (label, script) in zip(images.paths, images.labels.tolist()):
            assert unicodedata.name(chr(int(characters[label][2:], 16))).split()[0] == scripts[script]
            with Image.open(path) as image:
                assert image.size == (64, 64)
                seen[image.tobytes()].add(label)
    assert all(len(labels) == 1 for labels in seen.values())
    assert bytes([255]) * 64 * 64 not in seen


def test_glyphs_are_rendered_once(glyphs: tuple[Path, Splits], capsys: pytest.CaptureFixture[str]) -> None:
    source, splits = glyphs

    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in source.rglob("*")}

    before = state()
    assert content(read("glyphs", source)) == content(splits)
    assert state() == before
    assert [path.name for path in (source / "glyphs").iterdir()] == ["images"]
    assert capsys.readouterr().err == ""


def test_glyphs_that_another_process_renders_meanwhile_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_folder, images = os.replace, tmp_path / "glyphs/images"

    def too_late(source: Any, target: Any) -> None:
        if not images.exists():
            touch(images, "U+0041/theirs.png", "U+0042/theirs.png", "U+0043/0.png", "U+0044/0.png")
        replace_folder(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    monkeypatch.setattr(datasets, "GLYPH_FONTS", ("DejaVuSans",))
    monkeypatch.setattr(datasets, "_render", lambda character, font: Image.new("L", (4, 4), ord(character) % 256))
    assert len(read("glyphs", tmp_path).train) == 2
    assert [path.name for path in (tmp_path / "glyphs").iterdir()] == ["images"]


class ArchiveServer(ThreadingHTTPServer):
    """Serves `files` by name; of those in `cut_off` it announces all and sends half."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ArchiveRequest)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.cut_off: set[str] = set()
        self.requested: list[str] = []
        self.before_answering: Callable[[], object] = lambda: None


class ArchiveRequest(BaseHTTPRequestHandler):
    server: ArchiveServer

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.requested.append(name)
        self.server.before_answering()
        if name not in self.server.files:
            return self.send_error(404)
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if name in self.server.cut_off else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ArchiveServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ArchiveServer() as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def pack(dataset: str, folder: Path) -> dict[str, bytes]:
    """The dataset's archives, made like the official ones."""
    if dataset == "cub200":
        write_cub200(folder, "CUB_200_2011/images")
        touch(folder, "attributes.txt")
    elif dataset == "caltech101":
        write_caltech101(folder / "unpacked")
        inner = shutil.make_archive(str(folder / "101_ObjectCategories"), "gztar", root_dir=folder / "unpacked")
        (folder / "caltech-101").mkdir()
        shutil.move(inner, folder / "caltech-101")
        shutil.rmtree(folder / "unpacked")
    else:
        WRITE[dataset](folder, official=True)
    loose = {path.name: path.read_bytes() for path in folder.glob("*.mat")}
    for name in loose:
        (folder / name).unlink()
    archive, kind = {
        "caltech101": ("caltech-101.zip", "zip"),
        "cub200": ("CUB_200_2011.tgz", "gztar"),
        "cars196": ("car_ims.tgz", "gztar"),
        "online_products": ("Stanford_Online_Products.zip", "zip"),
    }[dataset]
    return {archive: Path(shutil.make_archive(f"{folder}_packed", kind, root_dir=folder)).read_bytes()} | loose


def publish(files: dict[str, bytes], dataset: str, server: ArchiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serves the files, and puts their MD5 and, where the row has any, their address into the dataset's row."""
    server.files = dict(files)
    row = DATASETS[dataset]
    assert [archive.url.rsplit("/", 1)[-1] for archive in row.archives] == list(files)
    archives = tuple(
        replace(
            archive, url=f"{server.url}/{name}" if "://" in archive.url else name, md5=hashlib.md5(data).hexdigest()
        )
        for archive, (name, data) in zip(row.archives, files.items())
    )
    monkeypatch.setitem(DATASETS, dataset, replace(row, archives=archives))


@pytest.mark.parametrize("failure", ["404", "wrong MD5", "cut off"])
@pytest.mark.parametrize("dataset", ["cub200", "online_products", "cars196", "caltech101"])
def test_a_failed_download_leaves_no_data_and_the_next_one_works(
    dataset: str, failure: str, server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pack(dataset, tmp_path / "packed")
    publish(files, dataset, server, monkeypatch)
    source, last = tmp_path / "Datasets", list(files)[-1]
    url = f"{server.url}/mirror/" if dataset == "cars196" else None
    if failure == "404":
        del server.files[last]
    elif failure == "wrong MD5":
        server.files[last] = b"something else"
    else:
        server.cut_off = {last}
    with pytest.raises(UserError) as error:
        datasets.read_splits(dataset, str(source), download=True, download_url=url)
    assert_one_sentence(str(error.value), dataset, "can't be downloaded")
    assert not (source / dataset).exists()

    server.files, server.cut_off, server.requested = dict(files), set(), []
    splits = datasets.read_splits(dataset, str(source), download=True, download_url=url)
    assert content(splits) == EXPECTED[dataset]
    assert set(server.requested) == {last}  # intact files are not downloaded again
    assert [path.name for path in source.iterdir()] == [dataset]

    server.files.clear()
    assert content(datasets.read_splits(dataset, str(source), download=True, download_url=url)) == EXPECTED[dataset]


@pytest.mark.parametrize("dataset", ["cub200", "online_products"])
def test_an_archive_that_is_broken_at_its_origin_is_a_clear_error(
    dataset: str, server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: data[: len(data) // 2] for name, data in pack(dataset, tmp_path / "packed").items()}
    publish(files, dataset, server, monkeypatch)
    with pytest.raises(UserError, match=f"{dataset} can't be downloaded"):
        datasets.read_splits(dataset, str(tmp_path), download=True)
    assert not (tmp_path / dataset).exists()


def test_two_downloads_at_once_wait_for_each_other(
    server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")
    publish(pack("cub200", tmp_path / "packed"), "cub200", server, monkeypatch)
    source, is_asked, is_waiting = tmp_path / "Datasets", fork.Event(), fork.Event()
    monkeypatch.setattr(datasets, "notice", lambda text: is_waiting.set() if "waiting for another" in text else None)

    def answer_when_the_other_waits() -> None:
        is_asked.set()
        assert is_waiting.wait(60)

    server.before_answering = answer_when_the_other_waits
    processes = [
        fork.Process(target=datasets.read_splits, args=("cub200", str(source)), kwargs={"download": True})
        for _ in range(2)
    ]
    processes[0].start()
    assert is_asked.wait(60)
    processes[1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert set(server.requested) == {"CUB_200_2011.tgz"}
    assert content(read("cub200", source)) == EXPECTED["cub200"]
    assert [path.name for path in source.iterdir()] == ["cub200"]


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"cub200 can't be downloaded \(.*timed out"):
            datasets.read_splits("cub200", str(tmp_path), download=True, download_url=url)
    assert socket.getdefaulttimeout() is None
    assert not (tmp_path / "cub200").exists()


def tar_with(name: str, **attributes: Any) -> bytes:
    """A .tgz with one good file and a member of that name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("CUB_200_2011/images/1.a/0.jpg"))
        member = tarfile.TarInfo(name)
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        tar.addfile(member)
    return buffer.getvalue()


def zip_with(name: str, mode: int = stat.S_IFREG | 0o644) -> bytes:
    """A .zip with one good file and a member of that name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr("Stanford_Online_Products/Ebay_train.txt", "")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        packed.writestr(info, "../../outside")
    return buffer.getvalue()


HOSTILE = {
    "tar, above": ("a.tgz", tar_with("../outside")),
    "tar, above, hidden": ("a.tgz", tar_with("CUB_200_2011/../../outside")),
    "tar, absolute": ("a.tgz", tar_with("/tmp/outside")),
    "tar, link out": ("a.tgz", tar_with("link", type=tarfile.SYMTYPE, linkname="../..")),
    "tar, link": ("a.tgz", tar_with("link", type=tarfile.SYMTYPE, linkname="CUB_200_2011")),
    "tar, hard link": ("a.tgz", tar_with("link", type=tarfile.LNKTYPE, linkname="../../outside")),
    "tar, device": ("a.tgz", tar_with("device", type=tarfile.CHRTYPE)),
    "tar, pipe": ("a.tgz", tar_with("pipe", type=tarfile.FIFOTYPE)),
    "zip, above": ("a.zip", zip_with("../outside")),
    "zip, above, for Windows": ("a.zip", zip_with("..\\outside")),
    "zip, absolute": ("a.zip", zip_with("/tmp/outside")),
    "zip, link": ("a.zip", zip_with("link", stat.S_IFLNK | 0o777)),
    "zip, device": ("a.zip", zip_with("device", stat.S_IFCHR | 0o644)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archives_give_plain_files_within_their_folder_or_nothing(
    kind: str, server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, data = HOSTILE[kind]
    server.files = {name: data}
    archives = (Archive(f"{server.url}/{name}", hashlib.md5(data).hexdigest()),)
    monkeypatch.setitem(DATASETS, "cub200", replace(DATASETS["cub200"], archives=archives))
    with pytest.raises(UserError) as error:
        datasets.read_splits("cub200", str(tmp_path / "a/b"), download=True)
    assert_one_sentence(
        str(error.value), "cub200 can't be downloaded", f"{name} contains", "not a plain file or folder"
    )
    assert not (tmp_path / "a/b/cub200").exists()
    assert not list(tmp_path.rglob("*outside*"))
    assert not Path("/tmp/outside").exists()


@pytest.mark.parametrize("url", ["127.0.0.1/archives", "/mnt/archives", "http://127.0.0.1:1/my archives"])
def test_a_download_url_that_is_not_one_is_a_clear_error(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be downloaded"):
        datasets.read_splits("cub200", str(tmp_path), download=True, download_url=url)


@pytest.mark.parametrize(
    ("dataset", "download", "parts"),
    [
        ("cub200", False, ["--download downloads it"]),
        ("online_products", False, ["--download downloads it"]),
        ("cars196", False, ["--download --download_url URL"]),
        ("cars196", True, ["--download --download_url URL"]),
        ("in-shop", False, ["--download can't", "DeepFashion", "Eval/list_eval_partition.txt"]),
        ("in-shop", True, ["--download can't", "DeepFashion", "Eval/list_eval_partition.txt"]),
        ("vehicle_id", True, ["--download can't", "Peking University", "train_test_split/"]),
        ("caltech101", False, ["--download downloads it"]),
        ("inaturalist2018", True, ["--download can't", "Smooth-AP", "Inat_dataset_splits/"]),
        ("torchvision_DTD", False, ["--download downloads it"]),
        ("torchvision_FER2013", True, ["--download can't", "Kaggle"]),
        ("cup200", False, ["did you mean cub200?"]),
        ("birds", True, ["images"]),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_missing_data_is_an_error_that_says_where_and_what_to_do(
    dataset: str, download: bool, parts: list[str], exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if exists:
        (tmp_path / "Datasets" / dataset).mkdir(parents=True)
    with pytest.raises(UserError) as error:
        datasets.read_splits(dataset, "Datasets", download=download)
    assert_one_sentence(str(error.value), tmp_path / "Datasets" / dataset, "`bash Sample_Runs.sh demo`", *parts)


# Datasets of torchvision, made like the official ones with few images.

Made = dict[str, list]  # the `Content` to be read


def save_square(path: Path, color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (color, color, color)).save(path)


def make_eurosat(root: Path, _: pytest.MonkeyPatch) -> Made:
    for number, name in enumerate(("River", "Forest", "Highway", "Pasture")):
        save_square(root / "eurosat/2750" / name / f"{name}_1.jpg", number)
    part = lambda *names: [(f"{name}_1.jpg", f"{label} {name}") for label, name in names]  # noqa: E731
    return {"train": part((0, "Forest"), (1, "Highway")), "test": part((2, "Pasture"), (3, "River"))}


def make_dtd(root: Path, _: pytest.MonkeyPatch) -> Made:
    """Each part has one image of each class."""
    for name in ("zigzagged", "banded", "dotted", "woven"):
        for number, part in enumerate(("train", "val", "test")):
            save_square(root / "dtd/dtd/images" / name / f"{name}_{number}.jpg", number)
            write(root / "dtd/dtd/labels" / f"{part}1.txt", "")
    for number, part in enumerate(("train", "val", "test")):
        rows = "".join(f"{name}/{name}_{number}.jpg\n" for name in ("banded", "dotted", "woven", "zigzagged"))
        write(root / "dtd/dtd/labels" / f"{part}1.txt", rows)
    part_of = {"train": ("banded", "dotted"), "test": ("woven", "zigzagged")}
    return {
        part: [
            (f"{name}_{i}.jpg", f"{label} {name}")
            for label, name in enumerate(names, 2 * (part == "test"))
            for i in range(3)
        ]
        for part, names in part_of.items()
    }


def make_aircraft(root: Path, _: pytest.MonkeyPatch) -> Made:
    """Names with a slash and a space; the file of the names lists them in another order."""
    data, names = root / "fgvc-aircraft-2013b/data", ("Saab 340", "F/A-18", "A320", "DC-3")
    write(data / "variants.txt", "\n".join(names) + "\n")
    for part, offset in (("trainval", 0), ("test", 4)):
        write(
            data / f"images_variant_{part}.txt", "".join(f"{i + offset:07d} {name}\n" for i, name in enumerate(names))
        )
        for i in range(4):
            save_square(data / "images" / f"{i + offset:07d}.jpg", i)
    rows = {"train": ((2, "0 A320"), (3, "1 DC-3")), "test": ((1, "2 F/A-18"), (0, "3 Saab 340"))}
    return {part: [(f"{i + o:07d}.jpg", name) for i, name in few for o in (0, 4)] for part, few in rows.items()}


def make_pets(root: Path, _: pytest.MonkeyPatch) -> Made:
    for part, number in (("trainval", 1), ("test", 2)):
        rows = [(f"{name}_{number}", i + 1) for i, name in enumerate(("Abyssinian", "beagle", "Birman", "boxer"))]
        write(root / "oxford-iiit-pet/annotations" / f"{part}.txt", "".join(f"{n} {i} 1 1\n" for n, i in rows))
        for name, i in rows:
            save_square(root / "oxford-iiit-pet/images" / f"{name}.jpg", i)
    names = {"train": ("Abyssinian", "Beagle"), "test": ("Birman", "Boxer")}
    file = {"Beagle": "beagle", "Boxer": "boxer"}
    return {
        part: [
            (f"{file.get(name, name)}_{i}.jpg", f"{label} {name}")
            for label, name in enumerate(few, 2 * (part == "test"))
            for i in (1, 2)
        ]
        for part, few in names.items()
    }


def make_traffic_signs(root: Path, _: pytest.MonkeyPatch) -> Made:
    """Its classes have numbers alone: 2 comes before 10."""
    for number in (0, 2, 9, 10):
        save_square(root / f"gtsrb/GTSRB/Training/{number:05d}/00000.ppm", number)
        save_square(root / f"gtsrb/GTSRB/Final_Test/Images/{number:05d}.ppm", number)
    for number in set(range(11)) - {0, 2, 9, 10}:
        save_square(root / f"gtsrb/GTSRB/Training/{number:05d}/00000.ppm", number)
    rows = "".join(f"{number:05d}.ppm;{number}\n" for number in (0, 2, 9, 10))
    write(root / "gtsrb/GT-final_test.csv", f"Filename;ClassId\n{rows}")
    tested = {0, 2, 9, 10}
    part = lambda few: [(f, f"{n} {n}") for n in few for f in ([f"{n:05d}.ppm"] if n in tested else []) + ["00000.ppm"]]  # noqa: E731
    expected = {"train": part(range(5)), "test": part(range(5, 11))}
    expected["train"][0:2] = [("00000.ppm", "0 0")] * 2
    return expected


def make_caltech(root: Path, _: pytest.MonkeyPatch) -> Made:
    for name in ("ant", "bass", "chair", "lamp", "BACKGROUND_Google"):
        save_square(root / "caltech101/101_ObjectCategories" / name / "image_0001.jpg", 5)
    part = lambda *names: [("image_0001.jpg", name) for name in names]  # noqa: E731
    return {"train": part("0 ant", "1 bass"), "test": part("2 chair", "3 lamp")}


def make_omniglot(root: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Both parts number their characters from 0; the coarser labels are alphabets."""
    zips = {}
    for part, alphabet in (("images_background", "Greek"), ("images_evaluation", "Angelic")):
        for number in (1, 2):
            save_square(root / "omniglot-py" / part / alphabet / f"character{number:02d}" / "0001_01.png", 9)
        write(root / "omniglot-py" / f"{part}.zip", "")
        zips[part] = hashlib.md5(b"").hexdigest()
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", zips)
    rows_of = lambda *rows: [("0001_01.png", *row) for row in rows]  # noqa: E731
    return {
        "train": rows_of(("0 Angelic/character01", "0 Angelic"), ("1 Angelic/character02", "0 Angelic")),
        "test": rows_of(("2 Greek/character01", "1 Greek"), ("3 Greek/character02", "1 Greek")),
    }


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Batches of three images each, whose red channel is their label; the classes are not in order."""
    names, md5 = ["truck", "cat", "ship", "bird"], {}

    def dump(file: str, content: object) -> None:
        path = root / "cifar-10-batches-py" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        md5[file] = hashlib.md5(path.read_bytes()).hexdigest()

    for file, labels in (("data_batch_1", [0, 1, 2, 3]), ("test_batch", [3, 2, 1, 0])):
        data = np.zeros((4, 3, 32, 32), np.uint8)
        data[:, 0] = np.array(labels, np.uint8)[:, None, None]
        dump(file, {"data": data.reshape(4, -1), "labels": labels})
    dump("batches.meta", {"label_names": names})
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["batches.meta"]})
    return {
        part: [(f"{file}.png", name) for name, files in rows for file in files]
        for part, rows in {
            "train": (("0 bird", ("0_000003", "1_000000")), ("1 cat", ("0_000001", "1_000002"))),
            "test": (("2 ship", ("0_000002", "1_000001")), ("3 truck", ("0_000000", "1_000003"))),
        }.items()
    }


def make_fashion(root: Path, _: pytest.MonkeyPatch) -> Made:
    """Files of MNIST's format; one of the names of its classes has a slash."""
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = np.zeros((3, 28, 28), np.uint8), np.array([9, 0, 1], np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 3, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 3) + labels.tobytes())
    return {
        "train": [("0_000000.png", "0 Ankle boot"), ("1_000000.png", "0 Ankle boot")],
        "test": [
            (f"{part}_{i:06d}.png", f"{i} {name}")
            for i, name in ((1, "T-shirt-top"), (2, "Trouser"))
            for part in (0, 1)
        ],
    }


MAKE: dict[str, Callable[[Path, pytest.MonkeyPatch], Made]] = {
    "EuroSAT": make_eurosat,
    "DTD": make_dtd,
    "FGVCAircraft": make_aircraft,
    "OxfordIIITPet": make_pets,
    "GTSRB": make_traffic_signs,
    "Caltech101": make_caltech,
    "Omniglot": make_omniglot,
    "CIFAR10": make_cifar10,
    "FashionMNIST": make_fashion,
}


@pytest.mark.parametrize("name", MAKE)
def test_datasets_of_torchvision_are_pooled_and_split_by_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / f"torchvision_{name}"
    expected = MAKE[name](root, monkeypatch)
    assert content(read(f"torchvision:{name}", tmp_path)) == expected
    assert content(read(f"torchvision_{name}", tmp_path)) == expected  # as runs store it
    assert not [path for path in root.iterdir() if path.name.startswith(".part")]


def test_arrays_of_torchvision_are_written_once_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(tmp_path / "torchvision_CIFAR10", monkeypatch)
    splits = read("torchvision:CIFAR10", tmp_path)
    for images in (splits.train, splits.test[0].query):
        for path, (label,) in zip(images.paths, images.labels):
            pixels = transforms.load_image(path)
            red = ["truck", "cat", "ship", "bird"].index(images.class_names[0][label])
            assert torch.equal(pixels, torch.tensor([red, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 32, 32))
    monkeypatch.setattr(datasets, "open_torchvision", lambda *_: pytest.fail("read again"))
    assert content(read("torchvision:CIFAR10", tmp_path)) == content(splits)


def test_arrays_that_two_processes_write_at_once_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_cifar10(tmp_path / "torchvision_CIFAR10", monkeypatch)
    fork = multiprocessing.get_context("fork")
    barrier, notices = fork.Barrier(2), fork.Queue()
    is_missing = datasets._is_missing

    def begin_together(root: Path) -> bool:
        barrier.wait(60)
        return is_missing(root)

    monkeypatch.setattr(datasets, "_is_missing", begin_together)
    monkeypatch.setattr(datasets, "notice", notices.put)
    processes = [fork.Process(target=read, args=("torchvision:CIFAR10", tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert "wrote 8 images" in notices.get(timeout=10)
    assert notices.empty()
    monkeypatch.undo()
    assert content(read("torchvision:CIFAR10", tmp_path)) == expected


def test_a_dataset_of_torchvision_is_downloaded_whole_or_not_at_all(
    server: ArchiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_dtd(tmp_path / "packed", monkeypatch)
    archive = Path(shutil.make_archive(str(tmp_path / "dtd-r1.0.1"), "gztar", tmp_path / "packed/dtd")).read_bytes()
    kind, source = torchvision.datasets.DTD, tmp_path / "source"
    monkeypatch.setattr(kind, "_URL", f"{server.url}/dtd-r1.0.1.tar.gz")
    monkeypatch.setattr(kind, "_MD5", hashlib.md5(archive).hexdigest())
    with pytest.raises(UserError) as error:
        datasets.read_splits("torchvision:DTD", str(source), download=True)
    assert_one_sentence(str(error.value), "torchvision_DTD can't be downloaded (HTTP Error 404")
    assert not (source / "torchvision_DTD").exists()
    server.files = {"dtd-r1.0.1.tar.gz": archive}
    assert content(datasets.read_splits("torchvision:DTD", str(source), download=True)) == expected
    assert [path.name for path in source.iterdir()] == ["torchvision_DTD"]
    with pytest.raises(UserError, match="--download_url contradicts --dataset torchvision_DTD"):
        datasets.read_splits("torchvision:DTD", str(tmp_path / "new"), download=True, download_url=server.url)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("torchvision:Flowers", "is unknown (did you mean Flowers102?); torchvision has Caltech101, "),
        ("torchvision:cifar10", "did you mean CIFAR10?"),
        ("torchvision:", "is unknown; torchvision has Caltech101, "),
        ("torchvision:CocoDetection", "can't be split by class: it has boxes, not classes"),
        ("torchvision:ImageFolder", "--dataset PATH"),
        ("torchvision:PCAM", "two classes"),
    ],
)
def test_names_that_torchvision_cannot_serve_are_refused_before_anything_is_read(dataset: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        config.parse(["--dataset", dataset])
    assert_one_sentence(str(error.value), f"--dataset {dataset} ", words)


@pytest.mark.parametrize(
    ("name", "words"),
    [("DTD", "--download downloads it again"), ("FER2013", "get it by hand from Kaggle, fer2013.csv")],
)
def test_files_that_torchvision_cannot_read_are_one_sentence(name: str, words: str, tmp_path: Path) -> None:
    root = tmp_path / f"torchvision_{name}"
    touch(root, "something else")
    with pytest.raises(UserError) as error:
        read(f"torchvision:{name}", tmp_path)
    assert_one_sentence(str(error.value), f"{root} can't be read as torchvision's {name} (", words)


def test_every_dataset_of_torchvision_is_taken_or_left_out_with_a_reason() -> None:
    kinds = {name for name, kind in vars(torchvision.datasets).items() if is_dataset(kind)}
    taken, left_out = set(datasets.TORCHVISION), set(datasets.NOT_FROM_TORCHVISION)
    assert taken | left_out >= kinds
    assert not taken & left_out
    for name, row in datasets.TORCHVISION.items():
        signature = inspect.signature(getattr(torchvision.datasets, name))
        for part in row.parts:
            signature.bind("root", **part)
        parameters = signature.parameters
        takes_anything = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        assert row.by_hand or takes_anything or "download" in parameters
        assert takes_anything or (row.paths == "loader") <= ("loader" in parameters)


def is_dataset(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, torchvision.datasets.VisionDataset)


@pytest.mark.slow
def test_a_run_of_a_torchvision_dataset_has_a_folder_without_a_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dtd(tmp_path / "torchvision_DTD", monkeypatch)
    where = ["--source_path", str(tmp_path), "--save_path", str(tmp_path / "results"), "--n_epochs", "1"]
    flags = ["--dataset", "torchvision:DTD", "--bs", "4", "--samples_per_class", "2", "--eval_metrics", "Recall"]
    main.command([*SMALL, *where, *flags])
    (folder,) = (tmp_path / "results").glob("*/*")
    assert folder.parent.name == "torchvision_DTD"
    assert ":" not in str(folder.relative_to(tmp_path))
    main.command(["--evaluate", str(folder), *where[:2], "--eval_metrics", "Recall"])


def edit(old: str, new: str) -> Callable[[Path], object]:
    """A function that replaces a text in a file."""

    def apply(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    return apply


def add(line: str) -> Callable[[Path], object]:
    """A function that adds a line to a file."""
    return lambda path: path.write_text(f"{path.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")


def change_class(number: float) -> Callable[[Path], object]:
    """A function that gives the third image of Cars196's annotations another class."""

    def apply(path: Path) -> None:
        mat = loadmat(path)
        mat["annotations"][0, 2]["class"] = np.array([[number]])
        savemat(path, {name: mat[name] for name in ("annotations", "class_names")})

    return apply


def annotate_again(path: Path, path_of: str = "car_ims/000001.jpg", number: int = 2) -> None:
    """Adds a row to Cars196's annotations."""
    mat = loadmat(path)
    row = mat["annotations"][:, :1].copy()
    row[0, 0]["relative_im_path"], row[0, 0]["class"] = path_of, number
    savemat(path, {"annotations": np.concatenate([mat["annotations"], row], 1), "class_names": mat["class_names"]})


def forget_names(path: Path) -> None:
    """Removes the names of the classes from Cars196's annotations."""
    savemat(path, {"annotations": loadmat(path)["annotations"], "class_names": np.zeros((1, 0), object)})


def fill(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(50) + data[250:])


def keep_header(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")


def keep_one_class(path: Path) -> None:
    for folder in list(path.iterdir())[1:]:
        shutil.rmtree(folder)


def make_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def make_empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


INAT_TRAIN = "Inat_dataset_splits/Inaturalist_train_set1.txt"
ANNOTATIONS, PARTITION = "cars_annos.mat", "Eval/list_eval_partition.txt"
SOP_TRAIN, SOP_TEST = "Info_Files/Ebay_train.txt", "Info_Files/Ebay_test.txt"
VEHICLE_TRAIN, VEHICLE_TEST = "train_test_split/train_list.txt", "train_test_split/test_list_800.txt"


@pytest.mark.parametrize(
    ("dataset", "path", "spoil", "said"),
    [
        ("birds", "images/a", Path.mkdir, "contains no images"),
        ("birds", "images", keep_one_class, "at least two"),
        ("birds", "images", make_a_file, "images"),
        ("cub200", "images/Wren", lambda path: touch(path, "0.jpg"), "class number"),
        ("cars196", ANNOTATIONS, Path.unlink, "does not exist"),
        ("cars196", ANNOTATIONS, fill(b"<html>404 not found</html>" * 20), "download it again"),
        ("cars196", ANNOTATIONS, fill(b""), "download it again"),
        ("cars196", ANNOTATIONS, cut, "download it again"),
        ("cars196", ANNOTATIONS, damage, "download it again"),
        ("cars196", ANNOTATIONS, lambda path: savemat(path, {"annotations": 1}), "download it again"),
        ("cars196", ANNOTATIONS, forget_names, "names no classes: download it again"),
        ("cars196", "car_ims/000003.jpg", Path.unlink, "does not exist"),
        ("online_products", SOP_TEST, Path.unlink, "does not exist"),
        ("online_products", SOP_TRAIN, keep_header, "no rows"),
        ("online_products", SOP_TEST, keep_header, "no rows"),
        ("online_products", SOP_TRAIN, fill(bytes(range(256))), "is not a table"),
        ("online_products", SOP_TRAIN, edit(" chair_final/3_1.JPG", ""), "has no path in row 6"),
        ("online_products", SOP_TRAIN, edit("_final/3_1.JPG", " final/3_1.JPG"), "is not a table"),
        ("online_products", "images/chair_final/3_1.JPG", Path.unlink, "does not exist"),
        ("in-shop", PARTITION, edit("item_id", "item"), "no column item_id"),
        ("in-shop", PARTITION, edit("8\nimage_name", "image_name"), "no column image_name"),
        ("in-shop", PARTITION, edit("query", "gallery"), "must assign train, query and gallery"),
        ("in-shop", f"{IN_SHOP_ROWS[6][0]}", lambda path: shutil.rmtree(path.parents[1]), "does not exist"),
        ("caltech101", "101_ObjectCategories/ant", make_empty, "no images"),
        ("inaturalist2018", INAT_TRAIN, edit("train_val2018/Aves/4102", "4102"), "row 1 of PATH, names no super"),
        ("inaturalist2018", INAT_TRAIN, edit("Aves/4102", "Aves/4103"), "row 1 of PATH, does not exist"),
        ("vehicle_id", VEHICLE_TRAIN, Path.unlink, "does not exist"),
        ("vehicle_id", VEHICLE_TRAIN, fill(b"1\n12\n"), "image_number, class_id"),
        ("vehicle_id", VEHICLE_TEST, edit("21 7", "21"), "has no class_id in row 2"),
        ("vehicle_id", VEHICLE_TEST, fill(b""), "is not a table"),
        ("vehicle_id", "image/0000012.jpg", Path.unlink, "does not exist"),
        *(
            (
                "cars196",
                ANNOTATIONS,
                change_class(number),
                f"row 3 of PATH has class {number:g}, but classes are 1 to 4",
            )
            for number in (0, -1, 5, 1.5, float("nan"))
        ),
        (
            "cars196",
            ANNOTATIONS,
            annotate_again,
            "the classes Acura TL 2012 and BMW M3 2012 (row 1 of PATH; row 9 of PATH)",
        ),
        ("online_products", SOP_TRAIN, edit(" chair_final/3_1.JPG", " ../3_1.JPG"), "row 6 of PATH, leads out of"),
        (
            "online_products",
            SOP_TRAIN,
            edit(" chair_final/3_1", " chair_final/../../3_1"),
            "row 6 of PATH, leads out of",
        ),
        ("online_products", SOP_TEST, edit(" chair_final/15_1.JPG", " /etc/hosts"), "row 6 of PATH, leads out of"),
        ("in-shop", PARTITION, edit("img/MEN/Denim/id_00000002/05_1", "img/../../05_1"), "row 5 of PATH, leads out of"),
        ("vehicle_id", VEHICLE_TEST, edit("20 7", "../../../0000001 7"), "row 1 of PATH, leads out of"),
        (
            "online_products",
            SOP_TRAIN,
            edit(" chair_final/3_1.JPG", f" {'x' * 5000}.jpg"),
            "row 6 of PATH, does not exist",
        ),
        ("online_products", SOP_TRAIN, edit(" chair_final/3_1", f" {'x' * 5000}/3_1"), "row 6 of PATH, does not exist"),
        ("online_products", SOP_TRAIN, edit("chair_final/3_1.JPG", "a\0b"), "PATH"),
        (
            "online_products",
            SOP_TRAIN,
            lambda path: path.write_bytes(path.read_bytes().replace(b"/3_1", b"/\xe9")),
            "is not a table",
        ),
    ],
)
def test_bad_data_is_one_sentence_with_the_path(
    dataset: str, path: str, spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    error = read_spoiled(dataset, path, spoil, tmp_path)
    assert_one_sentence(error, tmp_path / dataset / path, said.replace("PATH", f"{tmp_path / dataset / path}"))


IN_SHOP_TRAIN, IN_SHOP_QUERY = IN_SHOP_ROWS[0][0], IN_SHOP_ROWS[5][0]


@pytest.mark.parametrize(
    ("dataset", "path", "spoil", "said"),
    [
        (
            "online_products",
            SOP_TRAIN,
            add("99 4 1 bicycle_final/1_0.JPG"),
            "the classes 1 and 4 (row 1 of PATH; row 25 of",
        ),
        (
            "online_products",
            SOP_TRAIN,
            add("99 4 1 ./bicycle_final//1_0.jpg"),
            "the classes 1 and 4 (row 1 of PATH; row 25",
        ),
        ("online_products", SOP_TEST, add("99 13 1 bicycle_final/1_0.JPG"), "the classes 1 and 13"),
        ("online_products", SOP_TEST, add("99 1 1 bicycle_final/1_0.JPG"), "train and test (row 1 of"),
        (
            "in-shop",
            PARTITION,
            add(f"{IN_SHOP_TRAIN} id_00000007 gallery"),
            "train and gallery (row 1 of PATH; row 9 of PATH)",
        ),
        ("in-shop", PARTITION, add(f"{IN_SHOP_QUERY} id_00000033 gallery"), "the classes id_00000002 and id_00000033"),
        ("vehicle_id", VEHICLE_TEST, add("1 9"), "train and 800"),
        ("vehicle_id", VEHICLE_TEST, add("22 7"), "the classes 7 and 100"),
    ],
)
def test_an_image_of_two_classes_or_parts_is_refused_with_both_rows(
    dataset: str, path: str, spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    error = read_spoiled(dataset, path, spoil, tmp_path)
    assert_one_sentence(error, said.replace("PATH", f"{tmp_path / dataset / path}"), "row ", "; row ")


@pytest.mark.parametrize(
    ("dataset", "path", "spoil", "count"),
    [
        ("online_products", SOP_TRAIN, add("99 1 1 bicycle_final/1_0.JPG"), 1),
        ("online_products", SOP_TRAIN, add("9 1 1 ./bicycle_final/1_0.jpg\n9 1 1 bicycle_final//1_0.JPG"), 2),
        ("in-shop", PARTITION, add(f"{IN_SHOP_TRAIN} id_00000007 train\n{IN_SHOP_QUERY} id_00000002 query"), 2),
        ("vehicle_id", VEHICLE_TEST, add("20 7\n0020 7"), 2),
        ("cars196", ANNOTATIONS, lambda path: annotate_again(path, number=3), 1),
        ("cars196", ANNOTATIONS, lambda path: annotate_again(path, "car_ims/./000001.jpg", 3), 1),
    ],
)
def test_repeated_rows_count_once_and_are_noticed(
    dataset: str,
    path: str,
    spoil: Callable[[Path], object],
    count: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    WRITE[dataset](tmp_path / dataset)
    spoil(tmp_path / dataset / path)
    assert content(read(dataset, tmp_path)) == EXPECTED[dataset]
    lines = [
        line for line in capsys.readouterr().err.splitlines() if "published" not in line and "first line" not in line
    ]
    (line,) = lines
    assert f"notice: images that are listed again count once: {count}, e.g." in line
    assert f" of {tmp_path / dataset / path})" in line


def test_queries_in_the_gallery_stay_there_under_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation excludes them by their path."""
    write_in_shop(tmp_path / "in-shop", announced=9)
    (tmp_path / "in-shop/img/link").symlink_to("MEN", target_is_directory=True)
    add(f"{IN_SHOP_QUERY.replace('MEN', 'link')} id_00000002 gallery")(tmp_path / "in-shop" / PARTITION)
    (test,) = given("in-shop", tmp_path).test
    assert test.gallery is not None
    assert set(test.query.paths) & set(test.gallery.paths) == {f"{tmp_path}/in-shop/{IN_SHOP_QUERY}"}
    lines = capsys.readouterr().err
    assert "in-shop, test: 1 of 2 queries are in the gallery, too, and don't find themselves there" in lines
    assert "no other image of their class" not in lines
    edit(f"{IN_SHOP_ROWS[4][0]:<70}id_00000002", f"{IN_SHOP_ROWS[4][0]:<70}id_00000099")(
        tmp_path / "in-shop" / PARTITION
    )
    given("in-shop", tmp_path)
    assert "test: 1 of 2 queries have no other image of their class" in capsys.readouterr().err


def test_a_file_that_links_put_into_two_classes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_birds(tmp_path / "birds")
    images = tmp_path / "birds/images"
    (images / "owl/9.jpg").symlink_to(images / "tit/0.jpg")
    with pytest.raises(UserError) as error:
        read("birds", tmp_path)
    files = f"{images}/tit/0.jpg (the same file as {images}/owl/9.jpg)"
    assert_one_sentence(str(error.value), f"{files} belongs to the classes owl and tit")
    (images / "owl/9.jpg").unlink()
    (images / "owl/9.jpg").symlink_to(images / "owl/0.jpg")
    assert content(read("birds", tmp_path)) == EXPECTED["birds"]
    assert "images that are listed again count once: 1" in capsys.readouterr().err


def test_a_file_that_links_put_into_training_and_test_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "birds", *with_part("train", "test"))
    shutil.rmtree(tmp_path / "birds/test/jay")
    (tmp_path / "birds/test/jay").symlink_to(tmp_path / "birds/train/jay")
    with pytest.raises(UserError, match=r"\(the same file as .*\) belongs to train and test"):
        read("birds", tmp_path)


def test_names_in_lists_are_taken_as_they_are(tmp_path: Path) -> None:
    """NA is not a missing value, and a quote does not begin a string."""
    write_in_shop(tmp_path / "in-shop")
    edit("id_00000080 ", "NA ")(tmp_path / "in-shop" / PARTITION)
    edit("01_1_front.jpg ", '"01_1_front.jpg ')(tmp_path / "in-shop" / PARTITION)
    for name, _, _ in IN_SHOP_ROWS:
        if name.endswith("01_1_front.jpg"):
            path = tmp_path / "in-shop" / name
            path.rename(path.with_name('"01_1_front.jpg'))
    splits = read("in-shop", tmp_path)
    assert "NA" in splits.train.class_names[0]
    assert sum('"' in path for path in splits.train.paths) == 2


@pytest.mark.parametrize("dataset", WRITE)
def test_a_folder_in_no_known_layout_is_a_clear_error(dataset: str, tmp_path: Path) -> None:
    touch(tmp_path / dataset, "pictures/0.jpg")
    with pytest.raises(UserError) as error:
        read(dataset, tmp_path)
    assert_one_sentence(str(error.value), tmp_path / dataset)


@pytest.mark.parametrize(
    ("per_class", "said"),
    [([2, 2, 1, 1], "no query has another image of its class"), ([2, 2, 2], "at least two")],
    ids=["test classes of one image", "one training class"],
)
def test_splits_that_nothing_can_be_learned_or_measured_on_are_refused(
    per_class: list[int], said: str, tmp_path: Path
) -> None:
    touch(tmp_path / "birds/images", *(f"{name}/{i}.jpg" for name, n in zip("abcd", per_class) for i in range(n)))
    with pytest.raises(UserError) as error:
        given("birds", tmp_path)
    assert_one_sentence(str(error.value), "birds", said)


def test_queries_without_another_image_of_their_class_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "birds/images", *(f"{name}/{i}.jpg" for name, n in zip("abcd", (1, 2, 1, 3)) for i in range(n)))
    assert len(given("birds", tmp_path).test[0].query) == 4  # none is dropped: others may find it
    assert_one_sentence(capsys.readouterr().err.strip(), "birds, test: 1 of 4 queries")


@pytest.mark.parametrize("name", ["a/b", "birds/", "/birds", "../birds", "..", ".", ""])
def test_a_datasets_name_is_not_a_path(name: str, tmp_path: Path) -> None:
    write_birds(tmp_path)  # so that source_path/.., /. and / itself would be read as a dataset
    write_birds(tmp_path / "source/birds")
    with pytest.raises(UserError, match="is not a name"):
        read(name, tmp_path if name == "" else tmp_path / "source")


def prepare(source: Path, *flags: str) -> Loaders:
    """The loaders of a run on the dataset `tiny`."""
    opt = config.resolve(config.parse([*SMALL, "--dataset", "tiny", "--source_path", str(source), *flags]))
    return datasets.give_dataloaders(opt, read("tiny", source))


def error_of(loader: ImageLoader) -> str:
    try:
        list(loader)
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize("kernels", ["0", "2"])
@pytest.mark.parametrize(
    ("name", "data"),
    [("a.jpg", b"not found"), ("a.png", b"")],
    ids=["text", "empty"],
)
def test_a_broken_image_arrives_as_one_sentence_from_every_loader(
    name: str, data: bytes, kernels: str, tmp_path: Path
) -> None:
    before = set(multiprocessing.active_children())
    images = make_tree(tmp_path / "tiny/images", classes=4, per_class=2)
    for label in (0, 3):  # a training and a test class
        (images / f"class_{label}" / name).write_bytes(data)
    loaders = prepare(tmp_path, "--kernels", kernels, "--bs", "6", "--samples_per_class", "3")
    broken = {loaders.train: 0, loaders.train_eval: 0, loaders.test[0].query: 3}
    for loader, label in broken.items():
        assert_one_sentence(error_of(loader), images / f"class_{label}" / name)
    del loaders, broken, loader
    assert set(multiprocessing.active_children()) <= before  # the errors keep no workers alive


def checked(*paths: str, exif_orientation: bool = False) -> None:
    images = make_image_set(paths, ["a"] * len(paths))
    datasets.check_images(Splits(images, test=[RetrievalSet("test", images)]), exif_orientation)


def test_images_are_checked_before_training(tmp_path: Path) -> None:
    good = [str(save_image(tmp_path / f"{i}.png", np.random.default_rng(i))) for i in range(70)]
    checked(*good)
    for name, data in (("no.jpg", b"text"), ("cut.png", Path(good[0]).read_bytes()[:-2]), ("empty.gif", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as error:
            checked(*good, str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name} is incomplete or corrupt, or not an image")
    with pytest.raises(UserError) as error:
        checked(*good, *(str(tmp_path / name) for name in ("no.jpg", "cut.png", "empty.gif", "none.png")))
    words = f"4 of 74 images can't be read, of which the first is: {tmp_path / 'cut.png'} is incomplete"
    assert_one_sentence(str(error.value), words)


def save_turned(path: Path) -> str:
    exif = Image.Exif()
    exif[transforms.EXIF_ORIENTATION] = 6  # a quarter turn
    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[:, :12] = 255
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return str(path)


def test_images_that_are_to_be_turned_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save_turned(tmp_path / f"{i}.jpg") for i in range(3)]
    upright = str(save_image(tmp_path / "3.jpg", np.random.default_rng(0)))
    checked(*paths, upright, exif_orientation=True)
    checked(upright)
    assert capsys.readouterr().err == ""
    checked(*paths, upright)
    assert_one_sentence(capsys.readouterr().err.strip(), "notice: 3 of 4 images are to be turned", "--exif_orientation")


def test_images_are_turned_in_all_loaders_if_it_is_asked_for(tmp_path: Path) -> None:
    for label in range(4):
        for number in range(2):
            (tmp_path / f"tiny/{label}").mkdir(parents=True, exist_ok=True)
            save_turned(tmp_path / f"tiny/{label}/{number}.jpg")
    for flags, dim in (([], 1), (["--exif_orientation"], 0)):  # white columns become white rows
        loaders = prepare(tmp_path, "--bs", "4", "--samples_per_class", "2", "--crop_scale", "1", "--no-flip", *flags)
        for loader in (loaders.train, loaders.train_eval, loaders.test[0].query):
            for images, _, _ in loader:
                lines = images.float().mean(dim=(1, 3 - dim))  # (B, 32)
                assert (lines[:, 0] > 200).all()
                assert (lines[:, -1] < 50).all()


class Dying(ImageDataset):
    """Its worker is killed when it loads the third image."""

    def __getitem__(self, idx: int) -> Any:
        if idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.load(idx)


def test_a_worker_that_is_killed_is_one_sentence(tiny_source: Path) -> None:
    images = read("tiny", tiny_source).train
    loader = ImageLoader(Dying(images, transforms.eval_transform(8, 8)), collate_fn=collate, num_workers=1)
    words = (
        r"^a data-loading worker died \((killed by signal: Killed|exited unexpectedly)\), .*: lower --kernels or --bs"
    )
    with pytest.raises(UserError, match=words):
        list(loader)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that",
            "killed by signal: Bus error",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "exited unexpectedly"),
        ("Caught RuntimeError ...\nunable to allocate shared memory(shm) for file", "unable to allocate shared memory"),
        ("Caught RuntimeError in DataLoader worker process 0.\na bug", None),
    ],
)
def test_a_dead_worker_is_told_wherever_the_signal_comes(text: str, cause: str | None) -> None:
    def pytorchs_handler(number: int, frame: Any) -> None:
        raise RuntimeError(text)

    with pytest.raises(UserError if cause else RuntimeError) as error:
        datasets._on_dead_worker(pytorchs_handler, signal.SIGCHLD, None)
    assert str(error.value).startswith(f"a data-loading worker died ({cause})" if cause else text)


def test_batches_go_through_pipes_where_there_is_little_shared_memory(
    tiny_source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in containers, whose /dev/shm often has 64 MB."""
    flags = ["--bs", "8", "--kernels", "1"]
    usual = prepare(tiny_source, *flags)
    assert usual.train.collate_fn is collate
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(datasets, "free_shared_memory", lambda: 4 * 8 * 3 * 32 * 32 - 1)
    piped = prepare(tiny_source, *flags)
    assert "/dev/shm has only 0 MB: workers send batches through pipes" in capsys.readouterr().err
    for one, other in ((usual.train, piped.train), (usual.test[0].query, piped.test[0].query)):
        assert other.collate_fn is datasets.collate_arrays
        for batch, piped_batch in zip(one, other, strict=True):
            for tensor, piped_tensor in zip(batch, piped_batch, strict=True):
                assert torch.equal(tensor, piped_tensor)
                assert (tensor.dtype, tensor.stride()) == (piped_tensor.dtype, piped_tensor.stride())
                assert not piped_tensor.is_shared()
    (tiny_source / "tiny/images/class_0/0.jpg").rename(tiny_source / "0.jpg")
    try:
        assert "class_0/0.jpg can't be read" in error_of(piped.train_eval)
    finally:
        (tiny_source / "0.jpg").rename(tiny_source / "tiny/images/class_0/0.jpg")
    assert prepare(tiny_source, "--bs", "8", "--kernels", "0").train.collate_fn is collate


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--iterations_per_epoch", "1000000000000"], "--iterations_per_epoch 1000000000000 with --bs 8 would take"),
        (["--resize", "20000"], "--resize 20000 would make every image at least 1.2 GB"),
    ],
)
def test_impossible_sizes_are_refused_with_what_they_would_take(
    flags: list[str], words: str, tiny_source: Path
) -> None:
    with pytest.raises(UserError) as error:
        prepare(tiny_source, "--bs", "8", *flags)
    assert_one_sentence(str(error.value), words, " G")


def test_a_billion_partitions_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"leaves 0 validation class\(es\) of 10"):
        class_disjoint_splits(numbered_images([2] * 10), 0, 0.5, 0.5, 10**9)


@pytest.mark.parametrize(
    ("sizes", "bs", "samples_per_class"),
    [
        ([5] * 10, 12, 4),  # 3 classes per batch, which does not divide 10
        ([5] * 7, 20, 4),  # more than half of the classes in every batch
        ([4] * 7, 28, 4),  # all classes in every batch
        ([1, 2, 3, 7, 12, 4, 30, 5], 12, 4),
        ([1, 2, 5], 8, 8),
        ([2, 1, 2], 6, 3),  # fewer images than a batch
        ([3] * 9, 4, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampler", [class_balanced, class_balanced_redrawn])
def test_balanced_batches(sampler: BatchSampler, sizes: list[int], bs: int, samples_per_class: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    times_drawn = np.zeros(len(labels))
    for seed in range(60):
        batches = list(sampler(labels, bs, samples_per_class, np.random.default_rng(seed)))
        assert len(batches) == max(1, len(labels) // bs)
        drawn: list[int] = []
        for batch in batches:
            groups = batch.reshape(bs // samples_per_class, samples_per_class)
            classes = labels[groups]
            assert (classes == classes[:, :1]).all()
            assert len(np.unique(classes[:, 0])) == len(groups)
            drawn += classes[:, 0].tolist()
            for group, label in zip(groups, classes[:, 0]):
                repeats = np.unique(group, return_counts=True)[1]
                assert len(repeats) == min(samples_per_class, sizes[label])
                assert repeats.max() - repeats.min() <= 1
            np.add.at(times_drawn, batch, 1)
        for start in range(0, len(drawn), len(sizes)):  # rounds over all classes, across the batches' borders
            in_round = drawn[start : start + len(sizes)]
            assert len(set(in_round)) == len(in_round)
    for label, size in enumerate(sizes):  # no image of a class is preferred: within five standard deviations
        times = times_drawn[labels == label]
        assert np.abs(times - times.mean()).max() <= 5 * np.sqrt(times.mean()), f"{size} images"


def dataset_of(sizes: Sequence[int], bs: int, samples_per_class: int, **keywords: Any) -> BaseTripletDataset:
    """A dataset whose images are never loaded."""
    transform = transforms.eval_transform(8, 8)
    return BaseTripletDataset(numbered_images(sizes), transform, bs, samples_per_class, **keywords)


@pytest.mark.parametrize("iterations", [None, 3, 40])
@pytest.mark.parametrize(
    ("sizes", "bs", "samples_per_class"),
    [([58] * 7, 12, 4), ([9, 10, 11, 12], 8, 4), ([5, 3, 2, 30], 9, 3), ([3, 1, 2], 12, 4), ([60] * 6, 12, 5)],
    ids=str,
)
def test_a_class_is_used_up_before_any_of_its_images_is_drawn_again(
    sizes: list[int], bs: int, samples_per_class: int, iterations: int | None
) -> None:
    """Across the batches of an epoch, and its passes, if it has more than one."""
    bs -= bs % samples_per_class
    dataset = dataset_of(sizes, bs, samples_per_class, iterations=iterations)
    epochs = []
    for epoch in (1, 2, 1):
        dataset.set_epoch(epoch)
        drawn = [idx for batch in dataset.batches for idx, _, _ in batch]
        assert len(drawn) == bs * (iterations or max(1, sum(sizes) // bs))
        of_class = {label: [idx for idx in drawn if dataset.labels[idx] == label] for label in range(len(sizes))}
        for label, members in of_class.items():
            for start in range(0, len(members), sizes[label]):
                one_round = members[start : start + sizes[label]]
                assert len(set(one_round)) == len(one_round)
        epochs.append(drawn)
    assert epochs[0] == epochs[2] != epochs[1]  # anew each epoch, from its number


def test_an_epoch_shows_all_images_of_classes_of_one_size(capsys: pytest.CaptureFixture[str]) -> None:
    """The published setting of CUB200-2011: drawing anew for each batch would show two thirds."""
    sizes = [58] * 36 + [59] * 64
    dataset = dataset_of(sizes, 112, 4)
    assert dataset.num_images_shown() >= 0.97 * sum(sizes)
    assert dataset_of(sizes, 112, 4, redraw_images=True).num_images_shown() <= 0.7 * sum(sizes)
    assert capsys.readouterr().err == ""
    unequal = dataset_of([4] * 50 + [100] * 10, 40, 4)
    words = f"an epoch shows {unequal.num_images_shown()} of the 1200 training images: classes are drawn equally often"
    assert_one_sentence(capsys.readouterr().err.strip(), words)
    assert unequal.num_images_shown() < 500


def redrawn_as_before(labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator) -> list[list[int]]:
    """What class_balanced was, before images were drawn without replacement across batches."""
    classes_per_batch = bs // samples_per_class
    waiting: list[int] = []
    batches: list[list[int]] = []
    for _ in range(max(1, len(labels) // bs)):
        if len(waiting) < classes_per_batch:
            upcoming = rng.permutation(labels.max() + 1)
            repeated = np.isin(upcoming, waiting)
            waiting += [*upcoming[~repeated], *upcoming[repeated]]
        batch: list[int] = []
        for label in waiting[:classes_per_batch]:
            members = np.flatnonzero(labels == label)
            drawn: list[int] = []
            while len(drawn) < samples_per_class:
                drawn += rng.permutation(members).tolist()
            batch += drawn[:samples_per_class]
        waiting = waiting[classes_per_batch:]
        batches.append(batch)
    return batches


def test_stored_runs_keep_the_batches_they_began_with() -> None:
    opt = config.parse([], ROOT / "tests/stored_run/Training_Results/small/run/config.yaml")
    assert (opt.redraw_images, opt.crop_scale, opt.flip, opt.exif_orientation) == (True, 0.08, True, False)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(7), [1, 2, 3, 7, 12, 4, 30]))
    images = ImageSet([f"{i}.jpg" for i in range(len(labels))], labels[:, None], ["abcdefg"])
    opt = config.with_flags(
        opt, bs=12, samples_per_class=4, seed=3, iterations_per_epoch=8, batch_sampler="class_balanced"
    )
    dataset = datasets.build_train_dataset(opt, images)
    for epoch in (1, 2):
        rng = np.random.default_rng((3, epoch))
        passes = [batch for _ in range(2) for batch in redrawn_as_before(labels, 12, 4, rng)]
        assert [batch.tolist() for batch in dataset.form_batches(epoch)] == passes[:8]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--dataset", "cub200"], (0.08, True, False)),
        (["--dataset", "glyphs"], (0.5, False, False)),
        (["--dataset", "glyphs", "--crop_scale", "0.2", "--flip"], (0.2, True, False)),
        (["--dataset", "birds", "--no-flip", "--redraw_images"], (0.08, False, True)),
    ],
    ids=str,
)
def test_new_runs_have_the_augmentation_of_their_dataset(
    flags: list[str], expected: tuple[float, bool, bool], tmp_path: Path
) -> None:
    opt = config.resolve(config.parse(flags))
    assert (opt.crop_scale, opt.flip, opt.redraw_images) == expected
    config.save_config(tmp_path / "config.yaml", config.configuration(opt))
    stored = config.resolve(config.parse([], tmp_path / "config.yaml"))
    assert (stored.crop_scale, stored.flip, stored.redraw_images) == expected
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.split(":")[0] not in ("crop_scale", "flip", "redraw_images")]
    (tmp_path / "old.yaml").write_text("\n".join([*lines, ""]), encoding="utf-8")
    for more, crop_scale in (([], 0.08), (["--crop_scale", "0.3"], 0.3)):
        stored = config.resolve(config.parse(more, tmp_path / "old.yaml"))
        assert (stored.crop_scale, stored.flip, stored.redraw_images) == (crop_scale, True, True)


# Super class -> sizes of its classes, in the order of labels.
SUPER_SIZES = ([5, 3, 9, 4], [6, 2, 7], [3, 3, 3, 3, 3], [8])


def hierarchy() -> tuple[np.ndarray, np.ndarray]:
    """Labels and super classes of images in mixed order."""
    labels, parents, label = [], [], 0
    for parent, sizes in enumerate(SUPER_SIZES):
        for size in sizes:
            labels += [label] * size
            parents += [parent] * size
            label += 1
    order = np.random.default_rng(0).permutation(len(labels))
    return np.array(labels)[order], np.array(parents)[order]


def count_batches(batches: Sequence[Sequence[int]], labels: np.ndarray, parents: np.ndarray) -> dict[str, Any]:
    """How often each combination of super classes, class and image occurs, and the sizes of batches."""
    counts: dict[str, Any] = {name: defaultdict(int) for name in ("super classes", "classes", "images", "sizes")}
    for batch in batches:
        counts["super classes"][tuple(np.unique(parents[batch]))] += 1
        counts["sizes"][len(batch)] += 1
        for label in np.unique(labels[batch]):
            counts["classes"][int(label)] += 1
        for idx in batch:
            counts["images"][int(idx)] += 1
    return counts


@pytest.mark.parametrize(("bs", "samples_per_class", "supers"), [(8, 2, 2), (12, 3, 2), (6, 1, 3), (4, 2, 1)])
def test_hierarchical_batches_are_distributed_as_the_librarys(bs: int, samples_per_class: int, supers: int) -> None:
    labels, parents = hierarchy()
    rng, repeats = np.random.default_rng(0), 500
    seed_everything(0)  # of the library's draws
    ours = [*datasets.HierarchicalSampler(labels, bs, samples_per_class, rng, parents, supers, repeats)]
    theirs = LibrarysSampler(np.stack([labels, parents], 1), bs, samples_per_class, repeats, supers).batches
    for batch in ours:
        drawn = np.unique(labels[batch], return_counts=True)[1]
        assert (drawn == samples_per_class).all()
    found, wanted = (count_batches(batches, labels, parents) for batches in (ours, theirs))
    assert found["super classes"] == wanted["super classes"]
    assert found["sizes"] == wanted["sizes"]
    for name in ("classes", "images"):
        assert set(found[name]) == set(wanted[name])
        for key, count in wanted[name].items():
            assert abs(found[name][key] - count) < 5 * np.sqrt(2 * count) + 1, (name, key)
    positions = np.array([list(batch) for batch in ours if len(batch) == bs])
    if len(SUPER_SIZES) > 1 and supers > 1:  # a super class stands anywhere in its batch
        first = [int(parents[row[0]] == parents[row].min()) for row in positions]
        assert 0.2 < np.mean(first) < 0.8


def hierarchical_dataset(seed: int = 1, **keywords: Any) -> BaseTripletDataset:
    labels, parents = hierarchy()
    names = [[f"class {i}" for i in range(13)], [f"super class {i}" for i in range(4)]]
    images = ImageSet([str(i) for i in range(len(labels))], np.stack([labels, parents], 1), names)
    transform = transforms.RandomCropAndFlip(8)
    return BaseTripletDataset(images, transform, 8, 2, "HierarchicalSampler", seed, **keywords)


def test_hierarchical_batches_follow_from_seed_and_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = hierarchical_dataset(), hierarchical_dataset(), hierarchical_dataset(2)
    notices = capsys.readouterr().err.splitlines()
    assert len(one.batches) == 6 * 4  # combinations of two super classes
    assert "12 of 24 batches have fewer than 8 images" in notices[0]
    first = list(one.batches)
    same.set_epoch(2)
    assert same.batches != first
    same.set_epoch(1)
    assert same.batches == first
    assert other.batches != first
    assert len(hierarchical_dataset(iterations=30).batches) == 30
    params = {"super_classes_per_batch": 4, "batches_per_super_tuple": 3}
    assert len(hierarchical_dataset(batch_sampler_params=params).batches) == 3


HIERARCHICAL = ("--batch_sampler", "HierarchicalSampler", "--bs", "8", "--samples_per_class", "2")


@pytest.mark.parametrize(
    ("dataset", "flags", "words"),
    [
        ("birds", [], "needs labels coarser than --label_hierarchy_level 0, which birds doesn't have"),
        ("online_products", ["--label_hierarchy_level", "1"], "coarser than --label_hierarchy_level 1, which"),
        ("online_products", ["--bs", "10"], "--bs 10 is not a multiple of 2 super classes"),
        ("online_products", ["--batch_sampler_params", "super_classes_per_batch=3"], "--bs 8 is not a multiple of 3"),
        ("online_products", ["--batch_sampler_params", "super_classes=2"], "did you mean super_classes_per_batch?"),
        ("online_products", ["--batch_sampler_params", "parents=2"], "has no parameter parents"),
        ("online_products", ["--batch_sampler_params", "super_classes_per_batch=0"], "is not at least 1"),
        ("online_products", ["--batch_sampler_params", "super_classes_per_batch=1.5"], "takes an integer, not 1.5"),
        (
            "online_products",
            ["--batch_sampler_params", "batches_per_super_tuple=1000000"],
            "would form 66,000,000 batches",
        ),
        (
            "inaturalist2018",
            ["--batch_sampler_params", "super_classes_per_batch=4"],
            "super_classes_per_batch=4 is more than the 2 super classes of inaturalist2018's training images",
        ),
        ("birds", ["--batch_sampler", "shuffled", "--batch_sampler_params", "a=1"], "shuffled has no parameter a"),
    ],
)
def test_hierarchical_batches_that_cannot_be_formed_are_refused(
    dataset: str, flags: list[str], words: str, tmp_path: Path
) -> None:
    WRITE[dataset](tmp_path / dataset)
    where = [*SMALL, "--dataset", dataset, "--source_path", str(tmp_path), *HIERARCHICAL]

    def load() -> Loaders:
        opt = config.resolve(config.parse([*where, *flags]))
        return datasets.give_dataloaders(opt, datasets.give_splits(opt))

    with pytest.raises(UserError) as error:
        load()
    assert_one_sentence(str(error.value), words)


@pytest.mark.parametrize(("images", "bs"), [(50, 8), (48, 8), (8, 8), (5, 8), (1, 8)])
def test_shuffled_batches_hold_each_image_at_most_once(images: int, bs: int) -> None:
    labels = np.arange(images) % 3
    orders = []
    for seed in range(20):
        batches = list(shuffled(labels, bs, 4, np.random.default_rng(seed)))
        assert [len(batch) for batch in batches] == [min(bs, images)] * max(1, images // bs)
        order = np.concatenate(batches)
        assert len(set(order.tolist())) == len(order)
        orders.append(tuple(order.tolist()))
    assert images == 1 or len(set(orders)) > 10


def test_the_published_proxynca_run_finds_its_batches(tmp_path: Path) -> None:
    touch(tmp_path / "tiny/images", *(f"{label:03d}/{i}.jpg" for label in range(200) for i in range(3)))
    batches = prepare(tmp_path, "--loss", "proxynca", "--bs", "112").train.dataset.form_batches(1)
    assert len(batches) == 300 // 112
    assert all(len(set(batch.tolist())) == 112 for batch in batches)
    with pytest.raises(UserError) as error:
        prepare(tmp_path, "--bs", "404", "--samples_per_class", "4")
    assert_one_sentence(str(error.value), "--bs 404", "--samples_per_class 4", "101", "100")


@pytest.mark.parametrize(
    ("flags", "noticed"),
    [
        (["--bs", "4", "--samples_per_class", "2"], []),
        (["--bs", "8", "--samples_per_class", "4"], ["classes with fewer than 4 images: 1"]),
        (["--bs", "12", "--samples_per_class", "4"], ["classes with fewer than 4 images: 1", "11 training images"]),
        (["--bs", "8", "--samples_per_class", "4", "--batch_sampler", "shuffled"], []),
        (["--bs", "8", "--loss", "proxynca"], []),
    ],
    ids=" ".join,
)
def test_repeated_images_are_noticed(
    flags: list[str], noticed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(
        tmp_path / "tiny/images",
        *(f"{name}/{i}.jpg" for name, n in zip("abcdef", (4, 3, 4, 2, 2, 2)) for i in range(n)),
    )
    prepare(tmp_path, *flags)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(noticed)
    for line, part in zip(lines, noticed):
        assert part in line


Epoch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def one_epoch(loaders: Loaders, epoch: int) -> Epoch:
    """All images `(N, 3, H, W)`, labels and indices of a training epoch."""
    loaders.train.dataset.set_epoch(epoch)
    batches = list(loaders.train)
    assert len(batches) == len(loaders.train)
    return tuple(torch.cat(column) for column in zip(*batches))  # type: ignore[return-value]


def is_same(one: Epoch, other: Epoch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_batches_and_all_other_draws_are_the_same_for_any_number_of_workers(tiny_source: Path) -> None:
    def run(kernels: str) -> tuple[list[Epoch], list[float]]:
        loaders = prepare(tiny_source, "--bs", "8", "--kernels", kernels)
        epochs, drawn = [], []
        for epoch in (1, 2):
            seed_everything(1, epoch)
            epochs.append(one_epoch(loaders, epoch))
            drawn += [torch.rand(1).item(), np.random.rand(), random.random()]
        return epochs, drawn

    epochs, drawn = run("0")
    images, labels, indices = epochs[0]
    assert (images.dtype, images.shape) == (torch.uint8, (24, 3, 32, 32))
    assert (labels.dtype, indices.dtype) == (torch.int64, torch.int64)
    assert labels.tolist() == (indices // 6).tolist()  # six images a class, in order
    for kernels in ("1", "2"):
        others, drawn_there = run(kernels)
        assert all(is_same(one, other) for one, other in zip(epochs, others))
        assert drawn_there == drawn


class WhoLoads:
    """In place of an image, the process that loads it."""

    def __init__(self, *_: object):
        pass

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[[os.getpid()]]])


def test_workers_live_as_long_as_their_loaders(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "RandomCropAndFlip", WhoLoads)
    monkeypatch.setattr(transforms, "build_eval_transform", lambda opt: WhoLoads())
    loaders = prepare(tiny_source, "--bs", "8", "--kernels", "2")
    workers = set()
    for loader in (loaders.train, loaders.train_eval, loaders.test[0].query):
        processes = []
        for epoch in (1, 2, 3):
            loaders.train.dataset.set_epoch(epoch)
            processes.append(set(torch.cat([image for image, _, _ in loader]).flatten().tolist()))
        assert processes[0] == processes[1] == processes[2]
        assert len(processes[0]) == 2
        workers |= processes[0]
    assert len(workers) == 6
    assert os.getpid() not in workers
    del loader, loaders
    assert not workers & {child.pid for child in multiprocessing.active_children()}


def test_an_epoch_does_not_depend_on_when_workers_were_started(tiny_source: Path) -> None:
    """As after resuming: the second epoch is the first one of these workers, and nothing is different."""

    def second_epoch(loaders: Loaders) -> tuple[Epoch, list[float]]:
        seed_everything(1, 2)
        return one_epoch(loaders, 2), [torch.rand(1).item(), np.random.rand(), random.random()]

    flags = ["--bs", "8", "--kernels", "2"]
    uninterrupted, resumed = prepare(tiny_source, *flags), prepare(tiny_source, *flags)
    next(iter(uninterrupted.train))  # an epoch that was left early leaves nothing behind
    one_epoch(uninterrupted, 1)
    one, drawn = second_epoch(uninterrupted)
    other, drawn_there = second_epoch(resumed)
    assert is_same(one, other)
    assert drawn == drawn_there


def test_batches_and_augmentations_change_with_epoch_and_seed(tiny_source: Path) -> None:
    first = one_epoch(prepare(tiny_source, "--bs", "8", "--seed", "3"), 1)
    assert is_same(first, one_epoch(prepare(tiny_source, "--bs", "8", "--seed", "3"), 1))
    for seed, epoch in (("3", 2), ("4", 1)):
        other = one_epoch(prepare(tiny_source, "--bs", "8", "--seed", seed), epoch)
        assert not torch.equal(first[2], other[2])
        augmented = {int(idx): image for image, idx in zip(other[0], other[2])}
        shared = [(image, augmented[int(idx)]) for image, idx in zip(first[0], first[2]) if int(idx) in augmented]
        assert len(shared) >= 8
        assert not any(torch.equal(one, another) for one, another in shared)


def test_evaluation_gives_every_image_in_order_and_changes_no_training(tiny_source: Path) -> None:
    untouched = one_epoch(prepare(tiny_source, "--bs", "8"), 2)
    loaders = prepare(tiny_source, "--bs", "8", "--eval_bs", "5")
    one_epoch(loaders, 1)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    for loader, first_label in ((loaders.train_eval, 0), (loaders.test[0].query, 4)):
        passes = [[torch.cat(column) for column in zip(*loader)] for _ in range(2)]
        images, labels, indices = passes[0]
        assert images.shape == (24, 3, 32, 32)
        assert indices.tolist() == list(range(24))
        assert labels.tolist() == (first_label + indices // 6).tolist() == loader.labels.tolist()
        assert torch.equal(images, passes[1][0])
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert is_same(one_epoch(loaders, 2), untouched)


def test_an_image_that_occurs_twice_in_an_epoch_is_augmented_differently(tmp_path: Path) -> None:
    paths = [str(save_image(tmp_path / f"{i}.png", np.random.default_rng(i))) for i in range(32)]
    images = ImageSet(paths, np.array([0, 1, *[2] * 30])[:, None], [["a", "b", "c"]])
    dataset = BaseTripletDataset(images, transforms.RandomCropAndFlip(32), bs=4, samples_per_class=2)
    loader = ImageLoader(dataset, batch_sampler=dataset.batches, collate_fn=collate)
    crops, _, indices = (torch.cat(column) for column in zip(*loader))
    assert len(crops) == 32
    assert np.bincount(indices)[:2].min() >= 8  # in several batches, and twice in each
    assert len({crop.numpy().tobytes() for crop in crops}) == 32


def numbered_images(counts: Sequence[int]) -> ImageSet:
    """Class i, named by a letter, with counts[i] images."""
    names = [chr(ord("a") + label) for label, count in enumerate(counts) for _ in range(count)]
    return make_image_set([f"{i:03d}.jpg" for i in range(len(names))], names)


CLASSES_OF_SPLITS = [(17, 0.5, 0.5, 4), (13, 0.5, 0.75, 2), (13, 0.29, 0.93, 3), (12, 0.25, 0.0, 4), (40, 0.3, 0.9, 7)]


@pytest.mark.parametrize(("classes", "size", "start", "partitions"), CLASSES_OF_SPLITS)
def test_class_disjoint_splits_are_the_formulas(classes: int, size: float, start: float, partitions: int) -> None:
    images = numbered_images([2 + i % 3 for i in range(classes + 2)])
    images = images.subset(~np.isin(images.labels[:, 0], (1, 4)))  # labels need not be without gaps
    present = [label for label in range(classes + 2) if label not in (1, 4)]
    first, count = int(classes * start), int(classes * size)
    test = [present[i % classes] for i in range(first, first + count)]
    others = [label for label in present if label not in test]
    parts = [part.tolist() for part in np.array_split(others, partitions)]

    seen: list[str] = []
    for fold in range(partitions):
        splits = class_disjoint_splits(images, fold, size, start, partitions)
        (val,), (of_test,) = splits.val, splits.test
        assert (val.name, val.gallery, of_test.name, of_test.gallery) == ("val", None, "test", None)
        sets = {"train": splits.train, "val": val.query, "test": of_test.query}
        found = {name: sorted(set(chosen.labels[:, 0].tolist())) for name, chosen in sets.items()}
        training = [label for i, part in enumerate(parts) if i != fold for label in part]
        assert found == {"train": training, "val": parts[fold], "test": sorted(test)}
        # no class and no image in two sets, and none lost
        paths = [path for chosen in sets.values() for path in chosen.paths]
        assert sorted(paths) == sorted(images.paths)
        for chosen in sets.values():
            assert chosen.class_names is images.class_names
            order = list(zip(chosen.labels[:, 0].tolist(), chosen.paths))
            assert order == sorted(order)
        seen += val.query.paths
    assert sorted(seen) == [path for path, label in zip(images.paths, images.labels[:, 0]) if label not in test]


def test_test_classes_wrap_around_and_are_the_same_in_all_folds() -> None:
    images = numbered_images([2] * 10)
    for fold in range(3):
        (test,) = class_disjoint_splits(images, fold, 0.4, 0.8, 3).test
        assert np.unique(test.query.labels).tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize(
    ("classes", "size", "partitions", "words"),
    [
        (10, 0.15, 4, "leaves 1 test class(es) of 10"),
        (10, 0.05, 4, "leaves 0 test class(es) of 10"),
        (10, 0.5, 4, "leaves 1 validation class(es) of 10"),  # partitions of 2, 1, 1 and 1
        (10, 0.5, 5, "leaves 1 validation class(es) of 10"),
        (10, 0.9, 2, "leaves 0 validation class(es) of 10"),
        (2, 0.5, 2, "leaves 1 test class(es) of 2"),
    ],
)
def test_splits_with_too_few_classes_are_refused_for_every_fold(
    classes: int, size: float, partitions: int, words: str
) -> None:
    for fold in range(partitions):
        with pytest.raises(UserError) as error:
            class_disjoint_splits(numbered_images([2] * classes), fold, size, 0.5, partitions)
        assert_one_sentence(str(error.value), words, "--test_size", "--num_training_partitions", "and two are needed:")


def classes_of(images: ImageSet) -> list[int]:
    return sorted(set(images.labels[:, 0].tolist()))


def test_shuffled_classes_are_cut_as_sorted_ones() -> None:
    images = numbered_images([2 + i % 3 for i in range(17)])
    order = np.random.default_rng(5).permutation(17).tolist()
    test = [order[(8 + i) % 17] for i in range(8)]
    others = [label for label in order if label not in test]
    parts = [others[:3], others[3:5], others[5:7], others[7:]]
    for fold in range(4):
        splits = class_disjoint_splits(images, fold, 0.5, 0.5, 4, shuffle_seed=5)
        assert classes_of(splits.test[0].query) == sorted(test)
        assert classes_of(splits.val[0].query) == sorted(parts[fold])
        assert classes_of(splits.train) == sorted(set(others) - set(parts[fold]))
        whole = [*splits.train.paths, *splits.val[0].query.paths, *splits.test[0].query.paths]
        assert sorted(whole) == sorted(images.paths)


def test_the_seed_shuffles_classes_unless_another_one_is_given(tmp_path: Path) -> None:
    touch(tmp_path / "many" / "images", *(f"{i:02d}/{j}.jpg" for i in range(20) for j in range(2)))

    def test_classes(*flags: str) -> list[int]:
        return classes_of(given("many", tmp_path, *CV, *flags).test[0].query)

    plain = test_classes()
    assert plain == test_classes("--seed", "3") == list(range(10, 20))
    by_seed = [test_classes("--split_shuffle", "--seed", seed) for seed in "123"]
    assert len({*map(tuple, by_seed), tuple(plain)}) == 4
    assert test_classes("--split_shuffle", "3") == test_classes("--split_shuffle", "3", "--seed", "1") == by_seed[2]
    assert test_classes("--split_shuffle", "0", "--seed", "2") == by_seed[1]


CV = ["--split_scheme", "cross_validation", "--fold", "0"]


def test_folds_in_the_order_of_the_reality_check() -> None:
    """On CUB, by the numbers of its classes; and by a loop, where classes can't be divided evenly."""
    cub = make_image_set([f"{i}.jpg" for i in range(400)], [f"{i // 2:03d}" for i in range(400)])
    blocks = []
    for fold in range(4):
        splits = class_disjoint_splits(cub, fold, 0.5, 0.5, 4, fold_order="reality_check")
        assert classes_of(splits.test[0].query) == list(range(100, 200))
        assert sorted([*classes_of(splits.train), *classes_of(splits.val[0].query)]) == list(range(100))
        blocks.append(classes_of(splits.val[0].query))
    assert blocks == [list(range(start, start + 25)) for start in (75, 0, 25, 50)]

    images = numbered_images([2] * 23)  # 11 are for testing, 12 remain, of which int(23 / 5 / 2) validate
    for fold, begin in enumerate([0, 2, 4, 7, 9]):  # int(fold / 5 * 12)
        others = [*range(11), 22]
        training = [others[(begin + i) % 12] for i in range(10)]
        splits = class_disjoint_splits(images, fold, 0.5, 0.5, 5, fold_order="reality_check")
        assert classes_of(splits.train) == sorted(training)
        assert classes_of(splits.val[0].query) == sorted(set(others) - set(training))


def write_large_in_shop(root: Path) -> list[tuple[str, str, str]]:
    """Ten training items and six to test on, of four images each: (name, item, part)."""
    rows = []
    for item in range(16):
        for image in range(4):
            part = "train" if item < 10 else ("query", "gallery")[image % 2]
            rows.append((f"img/MEN/Denim/id_{item:08d}/0{image}.jpg", f"id_{item:08d}", part))
    touch(root, *(name for name, _, _ in rows))
    lines = "".join(f"{name} {item} {part}\n" for name, item, part in rows)
    write(root / "Eval/list_eval_partition.txt", f"64\nimage_name item_id evaluation_status\n{lines}")
    return rows


@pytest.mark.parametrize("flags", [[], ["--split_shuffle"], ["--fold_order", "reality_check"]])
def test_validation_inside_the_training_classes_keeps_query_and_gallery(flags: list[str], tmp_path: Path) -> None:
    rows = write_large_in_shop(tmp_path / "in-shop")
    scheme = ["--split_scheme", "predefined_with_validation", "--num_training_partitions", "5"]
    validated: list[str] = []
    for fold in range(4):
        splits = given("in-shop", tmp_path, *scheme, *flags, "--fold", str(fold))
        (val,), (test,) = splits.val, splits.test
        assert (val.gallery, val.name, test.name) == (None, "val", "test")
        for images, part in ((test.query, "query"), (test.gallery, "gallery")):
            expected = [str(tmp_path / "in-shop" / name) for name, _, kind in rows if kind == part]
            assert images is not None
            assert sorted(images.paths) == sorted(expected)
        items = [{path.split("/")[-2] for path in images.paths} for images in (splits.train, val.query)]
        assert not items[0] & items[1]
        assert items[0] | items[1] == {item for _, item, part in rows if part == "train"}
        assert (len(items[1]), len(splits.train), len(val.query)) == (2, 32, 8)
        assert splits.train.class_names == test.query.class_names
        validated += items[1]
    assert len(validated) == len(set(validated)) == 8


def test_validation_images_of_the_dataset_count_as_training_images() -> None:
    images = numbered_images([2] * 12)
    parts = [images.subset(np.isin(images.labels[:, 0], chosen)) for chosen in (range(4), range(4, 8), range(8, 12))]
    whole = Splits(parts[1], val=[RetrievalSet("val", parts[0])], test=[RetrievalSet("test", parts[2])])
    first, second = (datasets.validation_splits(whole, fold, 2) for fold in (0, 1))
    assert classes_of(first.val[0].query) == classes_of(second.train) == [0, 1, 2, 3]
    assert classes_of(second.val[0].query) == classes_of(first.train) == [4, 5, 6, 7]
    assert first.test is second.test is whole.test
    with pytest.raises(UserError) as error:
        datasets.validation_splits(whole, 0, 5)
    assert_one_sentence(str(error.value), "leaves 1 validation class(es) of 8 training classes")
    with pytest.raises(UserError, match="needs test images of the dataset's own: choose cross_validation"):
        datasets.validation_splits(Splits(parts[0], val=[RetrievalSet("val", parts[1])]), 0, 2)


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize(
    ("sizes", "test_size", "start", "partitions"),
    [([16] * 6, 0.5, 0.5, 4), ([7, 12, 9, 10, 5, 31], 0.3, 0.9, 3), ([5] * 8, 0.5, 0.0, 2), ([11, 13], 0.25, 0.6, 4)],
)
def test_every_class_is_in_every_set_of_a_closed_set(
    sizes: list[int], test_size: float, start: float, partitions: int, seed: int | None
) -> None:
    images = numbered_images(sizes)
    folds = [
        datasets.closed_set_splits(images, fold, test_size, start, partitions, shuffle_seed=seed)
        for fold in range(partitions)
    ]
    validated: list[str] = []
    for splits in folds:
        sets = {"train": splits.train, "val": splits.val[0].query, "test": splits.test[0].query}
        paths = [path for chosen in sets.values() for path in chosen.paths]
        assert sorted(paths) == sorted(images.paths)  # none twice, none lost
        assert sets["test"].paths == folds[0].test[0].query.paths
        for label, size in enumerate(sizes):
            count = {name: int((chosen.labels[:, 0] == label).sum()) for name, chosen in sets.items()}
            assert abs(count["test"] - size * test_size) < 1
            assert abs(count["val"] - (size - count["test"]) / partitions) < 1
            assert min(count.values()) > 0
        assert abs(len(sets["test"]) - len(images) * test_size) < 1
        validated += sets["val"].paths
    assert sorted(validated + list(folds[0].test[0].query.paths)) == sorted(images.paths)
    # the larger partitions of a class don't all fall to the first fold
    counts = [len(splits.val[0].query) for splits in folds]
    assert max(counts) - min(counts) <= max(1, len(sizes) // 2)
    other = datasets.closed_set_splits(images, 0, test_size, start, partitions, shuffle_seed=5)
    assert other.test[0].query.paths != folds[0].test[0].query.paths
    if seed is None:
        for label, size in enumerate(sizes):
            mine = [path for path, (one,) in zip(images.paths, images.labels) if one == label]
            test = [path for path in folds[0].test[0].query.paths if path in mine]
            assert test == sorted(mine[(int(size * start) + i) % size] for i in range(len(test)))


def test_closed_set_of_a_dataset_is_told_without_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "many" / "images", *(f"{i}/{j}.jpg" for i in range(3) for j in range(12)))
    scheme = ["--split_scheme", "closed_set", "--num_training_partitions", "3"]
    splits = given("many", tmp_path, *scheme, "--fold", "2")
    assert [len(images) for images in (splits.train, splits.val[0].query, splits.test[0].query)] == [12, 6, 18]
    assert capsys.readouterr().err == ""


CLOSED, VALIDATED = ["--split_scheme", "closed_set"], ["--split_scheme", "predefined_with_validation"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*CLOSED, "--fold_order", "reality_check"], ["--fold_order reality_check is an order of classes"]),
        ([*CLOSED, "--test_size", "0"], ["class 0 has only 6", "--test_size 0 "]),
        ([*CLOSED, "--num_training_partitions", "5"], ["class 0 has only 6", "--num_training_partitions 5"]),
        ([*VALIDATED, "--test_start_idx", "0.2"], ["--test_start_idx 0.2 contradicts", "keeps the test images"]),
        ([*VALIDATED, "--test_size", "0"], ["--test_size 0 leaves no test classes"]),
        ([*VALIDATED, "--num_training_partitions", "6"], ["leaves 1 validation class(es) of 10 training classes"]),
        ([*CV[:2], "--fold_order", "up"], ["--fold_order up is unknown", "partition, reality_check"]),
        ([*CV[:2], "--split_shuffle", "-1"], ["--split_shuffle", "-1 is not at least 0"]),
    ],
)
def test_flags_that_a_split_scheme_does_not_ask_are_refused(flags: list[str], words: list[str], tmp_path: Path) -> None:
    touch(tmp_path / "many" / "images", *(f"{i}/{j}.jpg" for i in range(20) for j in range(6)))
    with pytest.raises(UserError) as error:
        given("many", tmp_path, *flags, "--fold", "0")
    assert_one_sentence(str(error.value), *words)


@pytest.mark.parametrize("dataset", ["in-shop", "vehicle_id", "online_products", "birds"])
def test_a_pool_has_every_image_once_sorted_by_class(dataset: str, tmp_path: Path) -> None:
    WRITE[dataset](tmp_path / dataset)
    splits = read(dataset, tmp_path)
    images = datasets.pool(splits)
    expected = {entry for part in EXPECTED[dataset].values() for entry in part}
    assert len(images) == len(set(images.paths)) == len(expected)
    order = list(zip(images.labels[:, 0].tolist(), images.paths))
    assert order == sorted(order)
    assert images.labels.shape == (len(images), len(images.class_names))
    label_of = {path: tuple(labels) for path, labels in zip(images.paths, images.labels.tolist())}
    for chosen in (splits.train, *(part for test in splits.test for part in (test.query, test.gallery) if part)):
        assert chosen.class_names == images.class_names
        for path, labels in zip(chosen.paths, chosen.labels.tolist()):
            assert label_of[path] == tuple(labels)


def test_a_pool_holds_validation_images_too() -> None:
    images = numbered_images([2, 3, 2])
    parts = [images.subset(images.labels[:, 0] == label) for label in range(3)]
    splits = Splits(parts[2], val=[RetrievalSet("val", parts[0])], test=[RetrievalSet("test", parts[1], parts[0])])
    pooled = datasets.pool(splits)
    assert list(pooled.paths) == list(images.paths)
    np.testing.assert_array_equal(pooled.labels, images.labels)


def test_cross_validation_of_a_dataset_with_queries_and_gallery(tmp_path: Path) -> None:
    names = [
        (f"img/{kind}/id_{i:08d}/0{j}.jpg", f"id_{i:08d}") for i in range(12) for j in range(4) for kind in ["A/B"]
    ]
    touch(tmp_path / "in-shop", *(name for name, _ in names))
    parts = ["train" if i < 24 else ("query", "gallery")[i % 2] for i in range(48)]
    rows = "".join(f"{name} {item} {part}\n" for (name, item), part in zip(names, parts))
    write(tmp_path / "in-shop/Eval/list_eval_partition.txt", f"48\nimage_name item_id evaluation_status\n{rows}")
    flags = ["--split_scheme", "cross_validation", "--num_training_partitions", "3", "--num_training_sets", "3"]
    splits = given("in-shop", tmp_path, *flags, "--fold", "1")
    (val,), (test,) = splits.val, splits.test
    assert [np.unique(images.labels[:, 0]).tolist() for images in (splits.train, val.query, test.query)] == [
        [0, 1, 4, 5],
        [2, 3],
        [6, 7, 8, 9, 10, 11],
    ]
    assert (val.gallery, test.gallery) == (None, None)
    assert [len(images) for images in (splits.train, val.query, test.query)] == [16, 8, 24]


def test_cross_validation_of_a_dataset_with_several_test_sets(tmp_path: Path) -> None:
    root, rows = tmp_path / "vehicle_id", [f"{2 * c + i} {c}\n" for c in range(1, 13) for i in range(2)]
    for name, lines in (("train_list", rows[:10]), *((f"test_list_{n}", rows[10:]) for n in (800, 1600, 2400))):
        write(root / "train_test_split" / f"{name}.txt", "".join(lines))
    touch(root / "image", *(f"{int(row.split()[0]):07d}.jpg" for row in rows))
    flags = ["--split_scheme", "cross_validation", "--num_training_partitions", "2", "--num_training_sets", "2"]
    folds = [given("vehicle_id", tmp_path, *flags, "--fold", fold) for fold in "01"]
    for fold, splits in enumerate(folds):
        assert [len(s.test) for s in folds] == [1, 1]
        names = splits.train.class_names[0]
        found = [{names[label] for label in images.labels[:, 0]} for images in (splits.train, splits.val[0].query)]
        assert found[fold] == {"4", "5", "6"}
        assert found[1 - fold] == {"1", "2", "3"}
        assert splits.test[0].query.num_classes() == 6
        assert len(splits.test[0].query) == 12  # though each image is in three lists


def test_coarser_labels_take_the_place_of_the_finer(glyphs: tuple[Path, Splits]) -> None:
    source, whole = glyphs
    splits = given("glyphs", source, "--label_hierarchy_level", "1")
    assert splits.train.paths == whole.train.paths
    assert splits.train.labels.shape == (len(splits.train), 1)
    names = splits.train.class_names[0]
    assert {"LATIN", "GREEK", "CYRILLIC"} <= set(names)
    for chosen, fine in ((splits.train, whole.train), (splits.test[0].query, whole.test[0].query)):
        for path, (label,) in list(zip(chosen.paths, chosen.labels.tolist()))[::97]:
            character = chr(int(Path(path).parent.name[2:], 16))
            assert unicodedata.name(character).split()[0] == names[label]
        np.testing.assert_array_equal(chosen.labels[:, 0], fine.labels[:, 1])
    with pytest.raises(UserError) as error:
        given("glyphs", source, "--label_hierarchy_level", "2")
    assert_one_sentence(str(error.value), "--label_hierarchy_level 2 does not exist", "levels 0 to 1")


@pytest.mark.parametrize(
    ("dataset", "names"),
    [("online_products", SUPER_CLASSES), ("in-shop", ("MEN/Denim", "WOMEN/Dresses", "WOMEN/Shorts"))],
)
def test_coarser_labels_of_official_trees(dataset: str, names: Sequence[str], tmp_path: Path) -> None:
    WRITE[dataset](tmp_path / dataset)
    splits = read(dataset, tmp_path).at_level(1)
    assert list(splits.train.class_names[0]) == list(names)
    expected = {part: [(file, coarser) for file, _, coarser in entries] for part, entries in EXPECTED[dataset].items()}
    assert content(splits) == expected
    same = read(dataset, tmp_path)
    assert content(same.at_level(0)) == content(same)


def test_coarser_labels_of_folds_keep_fine_classes_apart(tmp_path: Path) -> None:
    write_online_products(tmp_path / "online_products")
    flags = ["--split_scheme", "cross_validation", "--fold", "0", "--num_training_partitions", "2"]
    flags += ["--num_training_sets", "1"]
    fine = given("online_products", tmp_path, *flags)
    coarse = given("online_products", tmp_path, *flags, "--label_hierarchy_level", "1")
    for one, other in ((fine.train, coarse.train), (fine.val[0].query, coarse.val[0].query)):
        assert one.paths == other.paths
        np.testing.assert_array_equal(one.labels[:, 1:], other.labels)
    assert coarse.test[0].query.paths == fine.test[0].query.paths


@pytest.mark.parametrize("dataset", ["birds", "vehicle_id"])
def test_a_level_that_is_not_there_is_refused(dataset: str, tmp_path: Path) -> None:
    WRITE[dataset](tmp_path / dataset)
    with pytest.raises(UserError) as error:
        given(dataset, tmp_path, "--label_hierarchy_level", "1")
    assert_one_sentence(str(error.value), "--label_hierarchy_level 1 does not exist", "levels 0 to 0")


def test_loaders_know_labels_coarser_labels_and_paths(tmp_path: Path) -> None:
    write_online_products(tmp_path / "online_products")
    images = read("online_products", tmp_path).train
    loader = ImageLoader(ImageDataset(images, transforms.eval_transform(8, 8)))
    assert loader.parents is not None
    np.testing.assert_array_equal(loader.labels, np.repeat(np.arange(12), 2))
    np.testing.assert_array_equal(loader.parents, np.repeat(np.arange(12), 2))
    assert loader.paths == images.paths
    write_birds(tmp_path / "birds")
    loader = ImageLoader(ImageDataset(read("birds", tmp_path).train, transforms.eval_transform(8, 8)))
    assert loader.parents is None


@pytest.mark.parametrize(("sampler", "samples_per_class"), [("class_balanced", "2"), ("shuffled", "1")])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 7])
def test_an_epoch_may_have_any_number_of_batches(
    iterations: int, sampler: str, samples_per_class: str, tiny_source: Path
) -> None:
    flags = ["--bs", "8", "--batch_sampler", sampler, "--samples_per_class", samples_per_class]
    flags += ["--sampling", "random"] if sampler == "class_balanced" else ["--loss", "proxynca"]

    def batches(epoch: int, *more: str) -> list[list[int]]:
        loader = prepare(tiny_source, *flags, *more).train
        loader.dataset.set_epoch(1)
        loader.dataset.set_epoch(epoch)
        assert len(loader) == len(loader.dataset.batches)
        draws = [draw for batch in loader.dataset.batches for draw in batch]
        assert [(at, position) for _, at, position in draws] == [(epoch, i) for i in range(len(draws))]
        return [[idx for idx, _, _ in batch] for batch in loader.dataset.batches]

    wanted = ["--iterations_per_epoch", str(iterations)]
    one = batches(2, *wanted)
    assert len(one) == iterations
    assert all(len(set(batch)) == 8 for batch in one)
    assert one == batches(2, *wanted)
    assert one != batches(3, *wanted)
    assert one != batches(2, *wanted, "--seed", "2")
    a_pass = batches(2)
    assert len(a_pass) == 3
    assert one[:3] == a_pass[:iterations]  # the same batches as without it, as far as they go
    assert len({tuple(batch) for batch in one}) == iterations  # and no pass is like the one before
    if sampler == "shuffled" and iterations >= 6:
        assert sorted(np.concatenate(one[:3])) == sorted(np.concatenate(one[3:6])) == list(range(24))


def test_iterations_per_epoch_are_what_the_loader_gives(tiny_source: Path) -> None:
    loaders = prepare(tiny_source, "--bs", "8", "--samples_per_class", "2", "--iterations_per_epoch", "5")
    first = one_epoch(loaders, 1)
    assert len(first[0]) == 40
    assert is_same(first, one_epoch(loaders, 1))


def read_photos(root: Path) -> Splits:
    """Eight classes: three to train on, two for validation, three of which the first images are the queries."""
    paths = sorted(str(path) for path in root.glob("photos/*/*.jpg"))
    classes = [os.path.basename(os.path.dirname(path)) for path in paths]
    images = make_image_set(paths, classes, ["even" if int(name[-1]) % 2 == 0 else "odd" for name in classes])
    label, is_first = images.labels[:, 0], np.array(["/0.jpg" in Path(path).as_posix() for path in images.paths])
    return Splits(
        images.subset(label < 3),
        val=[RetrievalSet("validation", images.subset((label >= 3) & (label < 5)))],
        test=[RetrievalSet("test", images.subset((label >= 5) & is_first), images.subset((label >= 5) & ~is_first))],
    )


def test_a_dataset_of_ones_own_needs_a_function_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = DatasetSpec(read_photos, k_vals=(1, 3), counts={"train": (3, 9), "gallery": (4, None)})
    monkeypatch.setitem(DATASETS, "tiny", row)
    make_tree(tmp_path / "tiny/photos", classes=8, per_class=3)
    loaders = prepare(tmp_path, "--bs", "4", "--samples_per_class", "2")
    assert capsys.readouterr().err.splitlines() == [
        "notice: tiny, gallery: 3 classes, but the published protocol has 4"
    ]
    assert datasets.default_k_vals("tiny") == (1, 3)
    assert one_epoch(loaders, 1)[0].shape == (8, 3, 32, 32)
    (val,), (test,) = loaders.val, loaders.test
    assert (val.name, val.gallery, val.query.labels.tolist()) == ("validation", None, [3, 3, 3, 4, 4, 4])
    assert test.gallery is not None
    for loader, labels in ((test.query, [5, 6, 7]), (test.gallery, [5, 5, 6, 6, 7, 7])):
        assert torch.cat([batch[1] for batch in loader]).tolist() == labels


@pytest.mark.parametrize("download", [False, True])
def test_a_dataset_of_ones_own_that_is_missing_is_a_clear_error(
    download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetSpec(read_photos))
    with pytest.raises(UserError) as error:
        datasets.read_splits("tiny", str(tmp_path), download=download)
    assert_one_sentence(str(error.value), tmp_path / "tiny")


def in_order(labels: np.ndarray, bs: int, samples_per_class: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Batches of neighbors in the list, the last one smaller."""
    yield from np.split(np.arange(len(labels)), range(bs, len(labels), bs))


def test_a_batch_sampler_of_ones_own_needs_a_function_and_a_row(
    tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BATCH_SAMPLERS, "in_order", in_order)
    loaders = prepare(tiny_source, "--bs", "10", "--samples_per_class", "2", "--batch_sampler", "in_order")
    assert [len(labels) for _, labels, _ in loaders.train] == [10, 10, 4]
    assert one_epoch(loaders, 2)[2].tolist() == list(range(24))


class Curriculum(BaseTripletDataset):
    """Begins with one batch, and gives one more in each epoch."""

    def form_batches(self, epoch: int) -> list[np.ndarray]:
        return super().form_batches(epoch)[:epoch]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_subclass_may_form_an_epochs_batches(workers: int, tiny_source: Path) -> None:
    images = read("tiny", tiny_source).train

    def epochs(kind: type[BaseTripletDataset]) -> list[Sequence[torch.Tensor]]:
        dataset = kind(images, transforms.RandomCropAndFlip(32), bs=8, samples_per_class=4)
        loader = ImageLoader(
            dataset,
            batch_sampler=dataset.batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        indices: list[Sequence[torch.Tensor]] = []
        for epoch in (1, 2, 3):
            dataset.set_epoch(epoch)
            indices.append([idx for _, _, idx in loader])
            assert len(indices[-1]) == len(loader)
        return indices

    for epoch, (few, all_) in enumerate(zip(epochs(Curriculum), epochs(BaseTripletDataset)), start=1):
        assert (len(few), len(all_)) == (epoch, 3)
        assert all(torch.equal(one, other) for one, other in zip(few, all_))


def test_batches_that_the_loader_would_not_see_are_refused(tiny_source: Path) -> None:
    dataset = prepare(tiny_source, "--bs", "8").train.dataset
    with pytest.raises(AttributeError):
        dataset.batches = []


def test_a_retrieval_set_is_mapped_with_and_without_a_gallery() -> None:
    sets = RetrievalSet("shop", "abc", ""), RetrievalSet("test", "ab")
    assert [one.map(len) for one in sets] == [RetrievalSet("shop", 3, 0), RetrievalSet("test", 2)]


def test_what_is_known_of_flags_is_declared_with_them() -> None:
    parser = FlagParser()
    datasets.add_arguments(parser)
    machine = ["source_path", "download", "download_url", "check_images", "kernels"]
    cross_validation = ["test_start_idx", "num_training_partitions", "num_training_sets", "fold", "split_shuffle"]
    cross_validation += ["fold_order"]
    assert parser.names_with(machine=True) == machine
    assert parser.names_with(compared=False) == [*machine, "eval_bs", "num_training_sets", "fold"]
    assert parser.names_with(needs="cross_validation") == cross_validation
    fixed = ["dataset", "split_scheme", "test_size", "test_start_idx", "num_training_partitions", "fold"]
    assert parser.names_with(fixed=True) == [*fixed, "split_shuffle", "fold_order", "label_hierarchy_level"]


RANDOM_TRANSFORMS = (
    *("RandomResizedCrop:32,scale=0.2..1", "AugMix", "RandAugment", "GaussianNoise"),
    *("ColorJitter:0.4,0.4,0.4,0.1", "RandomErasing:0.5", "GaussianBlur:3"),
)


def test_transforms_by_name_depend_on_seed_epoch_and_position_alone(tiny_source: Path) -> None:
    flags = ("--train_transforms", *RANDOM_TRANSFORMS, "--eval_transforms", "Resize:40", "CenterCrop:32")
    without_size = [flag for flag in SMALL if flag not in ("--crop_size", "32", "--kernels", "0")]
    where = [*without_size, "--dataset", "tiny", "--source_path", str(tiny_source), "--bs", "8", *flags]
    images: dict[tuple, list[torch.Tensor]] = {}
    for seed, kernels in (("1", "0"), ("1", "2"), ("2", "0")):
        opt = config.resolve(config.parse([*where, "--kernels", kernels, "--seed", seed]))
        loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt))
        for epoch in (1, 2):
            seed_everything(0)
            loaders.train.dataset.set_epoch(epoch)
            images[seed, kernels, epoch] = [batch for batch, _, _ in loaders.train]
        images[seed, kernels, 0] = [batch for batch, _, _ in loaders.test[0].query]
    for epoch in (0, 1, 2):
        pairs = zip(images["1", "0", epoch], images["1", "2", epoch])
        assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(images["1", "0", 1][0], images["1", "0", 2][0])
    assert not torch.equal(images["1", "0", 1][0], images["2", "0", 1][0])
    assert torch.equal(images["1", "0", 0][0], images["2", "0", 0][0])


def write_species(root: Path) -> None:
    """iNaturalist 2018 with real images: two super categories of two classes, for training and for testing."""
    rng = np.random.default_rng(0)
    for part, first in (("train", 0), ("test", 4)):
        names = [
            f"train_val2018/{'Aves' if i < 2 else 'Plantae'}/{first + i}/{j}.jpg" for i in range(4) for j in range(4)
        ]
        for name in names:
            save_image(root / name, rng, tint=int(name.split("/")[2]))
        write(root / "Inat_dataset_splits" / f"Inaturalist_{part}_set1.txt", "\n".join(names) + "\n")


@pytest.mark.slow
def test_runs_with_hierarchical_batches_and_transforms_resume_exactly_and_evaluate(
    tmp_path: Path, without_pictures: None
) -> None:
    write_species(tmp_path / "inaturalist2018")
    without_size = [flag for flag in SMALL if flag not in ("--crop_size", "32")]
    where = ["--dataset", "inaturalist2018", "--source_path", str(tmp_path), "--save_path", str(tmp_path / "results")]
    flags = [*without_size, *where, *HIERARCHICAL, "--embed_dim", "16", "--train_transforms", *RANDOM_TRANSFORMS]
    flags += ["--eval_transforms", "Resize:40", "CenterCrop:32", "--batch_sampler_params", "batches_per_super_tuple=3"]
    whole = main.command([*flags, "--n_epochs", "2", "--savename", "whole"])
    main.command([*flags, "--n_epochs", "1", "--savename", "resumed"])
    resumed = main.command([*where[-2:], "--savename", "resumed", "--resume_training", "--n_epochs", "2"])
    assert resumed == whole
    folders = [tmp_path / "results/inaturalist2018" / name for name in ("whole", "resumed")]
    first, second = (torch.load(folder / "last.pth.tar", weights_only=True)["state_dict"] for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert csv_rows(folders[0] / "log_train_Base.csv") == csv_rows(folders[1] / "log_train_Base.csv")
    assert int(csv_rows(folders[0] / "log_train_Base.csv")[0]["Iterations"]) == 3
    evaluated = main.command(["--evaluate", str(folders[0])])
    assert whole["Recall @ 1"] in evaluated.values()
    with pytest.raises(UserError, match="train_transforms"):
        main.command([*where[-2:], "--savename", "resumed", "--resume_training", "--train_transforms", "RandomCrop:32"])
