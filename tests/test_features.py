"""The cache of a frozen trunk's features: the same embeddings as without, one file for many runs, and bad input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CROSS, ROOT, csv_rows, training_flags

import config
import datasets
import evaluate
import evaluate_runs
import features
import main
import methods
import netlib
import transforms
from auxiliaries import UserError, seeded

CPU = torch.device("cpu")
FROZEN = ("--freeze_trunk", "--cache_features")

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def cached(source: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that gives the flags of a run on `tiny` that caches its features in tmp_path/cache."""

    def flags(*more: str) -> list[str]:
        where = ("--dataset", "tiny", "--savename", "run", "--n_epochs", "2", "--cache_path", str(tmp_path / "cache"))
        return training_flags(source, tmp_path, *where, *FROZEN, *more)

    return flags


def build(argv: list[str]) -> tuple[methods.MetricLossOnly, datasets.Loaders, datasets.Loaders]:
    """The method, its loaders of images, and those of features."""
    opt = config.resolve(config.parse(argv))
    loaders = datasets.give_dataloaders(opt, datasets.give_splits(opt))
    method = methods.build_training(opt, loaders.train.dataset.num_classes, CPU)
    return method, loaders, features.give_cached_loaders(opt, loaders, [method.net, method.evaluated], CPU)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.npy"))


def test_embeddings_are_those_of_the_images(cached: Callable[..., list[str]]) -> None:
    method, loaders, of_features = build(cached())
    method.net.eval()
    for images, stored in (
        (loaders.train_eval, of_features.train_eval),
        (loaders.test[0].query, of_features.test[0].query),
    ):
        found = evaluate.embed(method.net, stored, CPU)
        method.net.takes_features = False
        wanted = evaluate.embed(method.net, images, CPU)
        method.net.takes_features = True
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert stored.paths == images.paths
        np.testing.assert_array_equal(stored.labels, images.labels)


def test_a_run_ends_as_without_a_cache(source: Path, tmp_path: Path, cached: Callable[..., list[str]]) -> None:
    """With a training transform that draws nothing, the test transform's."""
    plain = [flag for flag in cached("--savename", "plain") if flag != "--cache_features"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "build_train_transform", transforms.build_eval_transform)
        wanted = main.command(plain)
    assert main.command(cached()) == pytest.approx(wanted, abs=1e-6)
    rows, others = (csv_rows(tmp_path / "tiny" / name / "log_iterations.csv") for name in ("run", "plain"))
    for row, other in zip(rows, others, strict=True):
        assert float(row["Loss"]) == pytest.approx(float(other["Loss"]), abs=1e-5)


def test_views_are_random_transforms_drawn_by_epoch_and_position(cached: Callable[..., list[str]]) -> None:
    method, loaders, of_features = build(cached("3"))
    dataset, source = of_features.train.dataset, loaders.train.dataset
    pool = sorted(source.images.paths)
    shown: list[list[int]] = []
    for epoch in (1, 2, 1):
        dataset.set_epoch(epoch)
        shown.append(dataset.views.tolist())
        for batch, draws in zip(of_features.train, dataset.batches, strict=True):
            for row, (idx, _, position) in zip(batch[0], draws, strict=True):
                path = source.images.paths[idx]
                with seeded(1, int(dataset.views[position]), pool.index(path)):
                    image = source.transform(transforms.load_image(path))
                method.net.takes_features = False
                torch.testing.assert_close(row, method.net.features(image[None])[0], atol=1e-5, rtol=1e-5)
            np.testing.assert_array_equal(batch[1], source.labels[[idx for idx, _, _ in draws]])
    assert shown[0] == shown[2] != shown[1]
    assert set(shown[0]) == {0, 1, 2}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that trunks have run on, call by call."""
    numbers: list[int] = []
    row = netlib.find_arch("shufflenet_v2_x0_5")

    def counted(*args: Any) -> tuple[torch.nn.Module, int]:
        backbone, num_features = row.build(*args)
        backbone.register_forward_hook(lambda module, images, out: numbers.append(len(images[0])))
        return backbone, num_features

    monkeypatch.setitem(netlib.ARCHS, "shufflenet_v2_x0_5", netlib.Arch(counted, row.crop_size, row.resize))
    return numbers


def test_the_trunk_runs_once_per_image(seen: list[int], cached: Callable[..., list[str]], tmp_path: Path) -> None:
    first = main.command(cached())
    assert sum(seen) == 48 + 1  # and the check that the network takes such images
    seen.clear()
    assert main.command(cached("--savename", "again")) == first
    assert sum(seen) == 1
    assert len(files(tmp_path)) == 1


def test_the_concatenation_of_folds_reads_the_features_too(seen: list[int], source: Path, tmp_path: Path) -> None:
    more = (*CROSS, *FROZEN, "--cache_path", str(tmp_path / "cache"), "--meta_testing_method", "ConcatenateEmbeddings")
    main.command(training_flags(source, tmp_path, *more, "--savename", "run"))
    assert [count for count in seen if count > 1] == [8] * 8
    assert (tmp_path / "cv" / "run" / "meta" / "results.json").exists()


def test_folds_share_the_files_and_go_on_bit_for_bit(source: Path, tmp_path: Path) -> None:
    more = (*CROSS, *FROZEN, "2", "--cache_path", str(tmp_path / "cache"))
    whole = main.command(training_flags(source, tmp_path, *more, "--savename", "whole"))
    assert len(files(tmp_path)) == 2  # views of training images, and all images' test transform
    stop = training_flags(source, tmp_path, *more, "--savename", "parts", "--n_epochs", "1")
    main.command(stop)
    parts = main.command(["--save_path", str(tmp_path), "--savename", "parts", "--resume_training", "--n_epochs", "2"])
    assert parts == whole
    for fold in range(3):
        one, other = (tmp_path / "cv" / name / f"fold_{fold}" / "log_iterations.csv" for name in ("whole", "parts"))
        assert csv_rows(one) == csv_rows(other)
    assert len(files(tmp_path)) == 2


def test_a_resumed_run_reads_the_features_of_its_own_weights(
    source: Path, tmp_path: Path, cached: Callable[..., list[str]]
) -> None:
    """Its network is built without loading pretrained weights, which its checkpoint then brings."""
    backbone = netlib.networkselect(config.resolve(config.parse(cached("--seed", "7")))).backbone
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    flags = [flag for flag in cached("--weights", str(tmp_path / "weights.pth")) if flag != "--not_pretrained"]
    whole = main.command([*flags, "--savename", "whole"])
    main.command([*flags, "--savename", "parts", "--n_epochs", "1"])
    again = ["--save_path", str(tmp_path), "--savename", "parts", "--resume_training", "--n_epochs", "2"]
    assert main.command(again) == whole
    one, other = (csv_rows(tmp_path / "tiny" / run / "log_iterations.csv") for run in ("whole", "parts"))
    assert one == other
    assert len(files(tmp_path)) == 1


def test_draws_of_one_image_in_a_batch_show_different_views() -> None:
    idx = np.array([4, 7, 4, 4, 9, 7])
    shown: set[tuple[int, ...]] = set()
    for seed in range(40):
        views = features.draw_views(idx, 3, np.random.default_rng(seed))
        assert sorted(views[idx == 4].tolist()) == [0, 1, 2]
        assert len(set(views[idx == 7].tolist())) == 2
        shown.add(tuple(views[idx == 4].tolist()))
    assert len(shown) == 6  # every order
    assert sorted(features.draw_views(np.array([1, 1, 1]), 2, np.random.default_rng(0)).tolist()) in (
        [0, 0, 1],
        [0, 1, 1],
    )


def test_another_cascade_makes_another_file(source: Path, tmp_path: Path) -> None:
    flags = ("--dataset", "tiny", "--training_method", "CascadedEmbeddings", "--loss", "contrastive", *FROZEN)
    for layers in (["stage2", "stage3"], ["stage3", "stage2"]):
        more = ("--cascade_shares", "100", "50", "--cache_path", str(tmp_path / "cache"), "--cascade_layers", *layers)
        build(training_flags(source, tmp_path, *flags, *more))
    assert len(files(tmp_path)) == 2


def test_a_trunk_is_digested_once_for_both_files(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = Mock(wraps=features.describe_trunk)
    monkeypatch.setattr(features, "describe_trunk", describe)
    build(cached("2"))
    assert (describe.call_count, len(files(tmp_path))) == (1, 2)


def test_a_full_disk_is_refused_before_anything_is_written(
    cached: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.00 GiB free, and features take 0\.00: give another folder"):
        build(cached())
    assert not files(tmp_path)


def test_a_run_folder_is_evaluated_on_images(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    wanted = main.command(cached())
    found = evaluate_runs.evaluate_run(["--evaluate", str(tmp_path / "tiny" / "run")])
    assert {name.removeprefix("test "): value for name, value in found.items()} == pytest.approx(wanted, abs=1e-6)


FLAGS_OF_METHODS = {
    "CascadedEmbeddings": ["--loss", "contrastive", "--embed_dim", "15"],
    "UnsupervisedByAugmentation": ["--loss", "NTXentLoss"],
    "S2SD": ["--s2sd_dims", "20", "24", "--s2sd_feature_start", "2"],
    "DeepAdversarialMetricLearning": ["--metric_alone_epochs", "1", "--triplets_per_anchor", "2"],
}


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_method_goes_on_bit_for_bit(source: Path, tmp_path: Path, name: str) -> None:
    cache = ["--freeze_trunk", "--cache_features", "2", "--cache_path", str(tmp_path / "cache")]
    flags = ["--dataset", "tiny", "--training_method", name, *FLAGS_OF_METHODS.get(name, []), *cache]
    whole = main.command(training_flags(source, tmp_path, *flags, "--savename", "whole", "--n_epochs", "2"))
    main.command(training_flags(source, tmp_path, *flags, "--savename", "parts", "--n_epochs", "1"))
    again = ["--save_path", str(tmp_path), "--savename", "parts", "--resume_training", "--n_epochs", "2"]
    assert main.command(again) == whole
    one, other = (csv_rows(tmp_path / "tiny" / run / "log_iterations.csv") for run in ("whole", "parts"))
    assert one == other
    states = [torch.load(tmp_path / "tiny" / run / "last.pth.tar", weights_only=True) for run in ("whole", "parts")]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    found = evaluate_runs.evaluate_run(["--evaluate", str(tmp_path / "tiny" / "whole")])
    assert {key.removeprefix("test "): value for key, value in found.items()} == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(
    "more",
    [["--seed", "2"], ["--crop_size", "40"], ["--exif_orientation"], ["--arch", "resnet18"], ["--precision", "bf16"]],
)
def test_what_changes_features_makes_another_file(
    cached: Callable[..., list[str]], tmp_path: Path, more: list[str]
) -> None:
    build(cached())
    build(cached(*more))  # another seed: other random weights
    assert len(files(tmp_path)) == 2


def test_a_changed_image_makes_another_file(source: Path, cached: Callable[..., list[str]], tmp_path: Path) -> None:
    build(cached())
    image = source / "tiny" / "images" / "class_0" / "0.jpg"
    before = image.stat().st_mtime_ns
    os.utime(image, ns=(before, before + 10))
    build(cached())
    os.utime(image, ns=(before, before))
    build(cached())
    assert len(files(tmp_path)) == 2


def test_half_precision_halves_the_file(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    _, _, whole = build(cached())
    _, _, half = build(cached("--cache_dtype", "float16"))
    assert sorted(np.load(path).dtype for path in files(tmp_path)) == [np.float16, np.float32]
    for one, other in zip(whole.train_eval, half.train_eval, strict=True):
        assert other[0].dtype == torch.float32
        torch.testing.assert_close(one[0], other[0], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array"])
def test_a_damaged_file_is_named(cached: Callable[..., list[str]], tmp_path: Path, content: bytes) -> None:
    build(cached())
    files(tmp_path)[0].write_bytes(content)
    with pytest.raises(UserError, match=r"\.npy can't be read as stored features .* remove it"):
        build(cached())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cache_features"], "--cache_features stores what the trunk gives, .* add --freeze_trunk"),
        (["--cache_features", "-1"], "--cache_features: -1 is not at least 0"),
        (
            [*FROZEN, "--training_method", "UnsupervisedByAugmentation"],
            "compares 2 transforms of each image: give --cache_features 2 or more",
        ),
        ([*FROZEN, "--cache_path", "/proc/nowhere"], "--cache_path /proc/nowhere can't be created"),
    ],
)
def test_bad_input(source: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main.command(training_flags(source, tmp_path, "--dataset", "tiny", "--savename", "run", *more))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_two_processes_make_one_file(cached: Callable[..., list[str]], tmp_path: Path) -> None:
    commands = [[sys.executable, "main.py", *cached("--savename", name)] for name in ("one", "two")]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    notices = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], notices
    assert sum("features of 48 images are stored" in text for text in notices) == 1
    one, two = (csv_rows(tmp_path / "tiny" / name / "log_iterations.csv") for name in ("one", "two"))
    assert one == two
    assert len(files(tmp_path)) == 1
