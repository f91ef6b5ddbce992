"""The cache of decoded images: the same pixels, one file for many runs, and bad input."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CROSS, ROOT, training_flags
from crash_child import assert_same_run

import config
import datasets
import image_cache
import main
import transforms
from auxiliaries import UserError

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def cached(source: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that gives the flags of a run on `tiny` that keeps its images in tmp_path/cache."""

    def flags(*more: str) -> list[str]:
        where = ("--dataset", "tiny", "--savename", "run", "--n_epochs", "2", "--cache_path", str(tmp_path / "cache"))
        return training_flags(source, tmp_path, *where, *more)

    return flags


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.images"))


def loaders_of(argv: list[str]) -> datasets.Loaders:
    opt = config.resolve(config.parse(argv))
    loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt))
    if opt.cache_images:
        image_cache.use_cached_images(opt, loaders)
    return loaders


@pytest.mark.parametrize(
    "more", [[], ["--exif_orientation"], ["--train_transforms", "Resize:40", "RandomCrop:32", "RandomHorizontalFlip"]]
)
def test_pixels_are_those_of_the_files(cached: Callable[..., list[str]], more: list[str]) -> None:
    plain, stored = loaders_of(cached(*more)), loaders_of(cached("--cache_images", "--kernels", "2", *more))
    for one, other in ((plain.train, stored.train), (plain.test[0].query, stored.test[0].query)):
        for batch, same in zip(one, other, strict=True):
            assert all(torch.equal(part, same_part) for part, same_part in zip(batch, same))


def test_a_run_with_stored_images_is_the_one_without(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main.command(cached("--savename", "plain"))
    main.command(cached("--cache_images"))
    assert_same_run(tmp_path / "tiny" / "run", tmp_path / "tiny" / "plain")
    assert len(files(tmp_path)) == 2  # whole training images, and what the network gets in an evaluation

    def refuse(*_: object) -> None:
        raise AssertionError("an image is decoded again")

    monkeypatch.setattr(transforms, "load_image", refuse)
    main.command(cached("--cache_images", "--savename", "again", "--seed", "2"))
    assert len(files(tmp_path)) == 2


def test_folds_share_the_files(source: Path, tmp_path: Path) -> None:
    more = (*CROSS, "--cache_images", "--cache_path", str(tmp_path / "cache"), "--savename", "run", "--n_epochs", "1")
    main.command(training_flags(source, tmp_path, *more))
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("more", [["--crop_size", "40"], ["--resize", "50"], ["--interpolation", "bicubic"]])
def test_what_changes_pixels_makes_another_file(
    cached: Callable[..., list[str]], tmp_path: Path, more: list[str]
) -> None:
    loaders_of(cached("--cache_images"))
    before = files(tmp_path)
    loaders_of(cached("--cache_images", *more))
    assert len(files(tmp_path)) > len(before)


def test_a_changed_image_makes_another_file(source: Path, cached: Callable[..., list[str]], tmp_path: Path) -> None:
    loaders_of(cached("--cache_images"))
    image = source / "tiny" / "images" / "class_0" / "0.jpg"
    before = image.stat().st_mtime_ns
    os.utime(image, ns=(before, before + 10))
    loaders_of(cached("--cache_images"))
    os.utime(image, ns=(before, before))
    assert len(files(tmp_path)) == 4


def test_another_decoder_makes_another_file(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders_of(cached("--cache_images"))
    before, version = files(tmp_path), image_cache.metadata.version
    newer = lambda name: "99.0" if name == "torchvision" else version(name)  # noqa: E731
    monkeypatch.setattr(image_cache.metadata, "version", newer)
    loaders_of(cached("--cache_images"))
    assert len(files(tmp_path)) == 2 * len(before)


def test_a_damaged_file_is_made_anew(
    cached: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [tuple(batch) for batch in loaders_of(cached("--cache_images")).train]
    for file in files(tmp_path):
        os.truncate(file, 100)
    again = [tuple(batch) for batch in loaders_of(cached("--cache_images")).train]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(first, again, strict=True))
    assert capsys.readouterr().err.count("is damaged, and made anew") == 2
    files(tmp_path)[0].with_suffix(".npy").write_bytes(b"nothing")
    loaders_of(cached("--cache_images"))
    assert capsys.readouterr().err.count("is damaged, and made anew") == 1


def test_processes_do_not_copy_the_file() -> None:
    stored = image_cache.StoredImages(Path("any"), np.array([[2, 2, 3]]), ["a"])
    stored._pixels = np.arange(12, dtype=np.uint8)
    image = stored.read("a")
    assert image.shape == (3, 2, 2)
    assert image.permute(1, 2, 0).is_contiguous()  # as a batch is, so that no pixel is moved
    assert image.permute(1, 2, 0).flatten().tolist() == list(range(12))
    assert pickle.loads(pickle.dumps(stored))._pixels is None


def test_a_full_disk_is_refused_before_anything_is_written(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.00 GiB free, and 24 decoded images take about 0\.00"):
        main.command(cached("--cache_images"))
    assert not files(tmp_path)
    assert not (tmp_path / "tiny").exists()  # the next try has the same --savename
    with pytest.raises(UserError, match=r"has 0\.00 GiB free, and \d+ decoded images"):
        main.command(cached("--cache_images", *CROSS))
    assert not list(tmp_path.glob("cv/*"))


def test_an_unreadable_image_leaves_no_file(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source / "tiny", tmp_path / "source" / "tiny")
    (tmp_path / "source/tiny/images/class_1/3.jpg").write_bytes(b"no image")
    flags = training_flags(tmp_path / "source", tmp_path, "--dataset", "tiny", "--cache_path", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"3\.jpg"):
        loaders_of([*flags, "--cache_images", "--kernels", "1"])
    assert not files(tmp_path)


def test_both_caches_are_refused(cached: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match="with cached features no image is read again"):
        loaders_of(cached("--cache_images", "--cache_features", "--freeze_trunk"))


@pytest.mark.slow
def test_two_processes_make_one_file(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    commands = [[sys.executable, str(ROOT / "main.py"), *cached("--cache_images", "--savename", name)] for name in "ab"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum(error.count("decoded images are stored in") for error in errors) == 2
    assert_same_run(tmp_path / "tiny" / "a", tmp_path / "tiny" / "b")
