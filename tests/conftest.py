"""A tiny image tree, flags that train a small network on it, and settings for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import records
from auxiliaries import replacing

ROOT = Path(__file__).resolve().parents[1]

# A run of these takes about a second: small images, a small network, no download.
SMALL = ["--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--gpu", "-1", "--kernels", "0"]


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


def save_image(path: Path, rng: np.random.Generator, size: tuple[int, int] = (40, 36), tint: int = 0) -> Path:
    """Writes noise of the size (width, height) around a colour that depends on `tint`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(tint).integers(60, 196, 3)
    pixels = np.clip(colour + rng.integers(-60, 60, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tree(images: Path, classes: int = 8, per_class: int = 6, seed: int = 0) -> Path:
    """Writes `images/class_<i>/<j>.jpg`, each class in a colour of its own."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        for number in range(per_class):
            save_image(images / f"class_{label}" / f"{number}.jpg", rng, tint=label)
    return images


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --source_path with the data set `tiny`: 8 classes of 6 images, half of them for training."""
    source = tmp_path_factory.mktemp("source")
    make_tree(source / "tiny" / "images")
    return source


def quick_pictures() -> None:
    """Pictures take most of a tiny run's time: files of a few bytes stand for them, written in the same way."""

    def plot(path: Path, *_: Any, **__: Any) -> None:
        with replacing(path) as beside:
            beside.write_text("<svg/>")

    def show(path: Path, *_: Any, **__: Any) -> None:
        with replacing(path) as beside:
            Image.new("RGB", (4, 4)).save(beside, format="png")

    records.save_info_plot = records.save_curve = plot
    records.save_recoveries = show


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """What pictures look like, and that whole runs draw them, is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_info_plot", "save_curve", "save_recoveries"):
            patch.setattr(records, name, getattr(records, name))
        quick_pictures()
        yield


@pytest.fixture
def small_flags(tiny_source: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that gives the flags of a one-epoch run on `tiny` into `tmp_path/results`, and any more."""

    def flags(*more: str) -> list[str]:
        where = ["--dataset", "tiny", "--source_path", str(tiny_source), "--save_path", str(tmp_path / "results")]
        return [*SMALL, *where, "--savename", "run", "--n_epochs", "1", "--bs", "8", *more]

    return flags
