"""A tiny image tree, flags that train a small network on it, and settings for all tests."""

from __future__ import annotations

import csv
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import main
import netlib
import plots
import runs
import transforms
from auxiliaries import atomic_write

MACHINE_COLUMNS = ("Time", "Images/s", "Peak Memory")
ROOT = Path(__file__).resolve().parents[1]

# A run of these takes about a second: small images, a small network, no download.
SMALL = ["--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--gpu", "-1", "--kernels", "0"]
SMALL += ["--no-report"]  # a page takes longer than such a run


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)


def save_image(path: Path, rng: np.random.Generator, size: tuple[int, int] = (40, 36), tint: int = 0) -> Path:
    """Writes noise of the size (width, height) around a color that depends on `tint`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = np.random.default_rng(tint).integers(60, 196, 3)
    pixels = np.clip(color + rng.integers(-60, 60, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_tree(images: Path, classes: int = 8, per_class: int = 6, seed: int = 0) -> Path:
    """Writes `images/class_<i>/<j>.jpg`, each class in a color of its own."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        for number in range(per_class):
            save_image(images / f"class_{label}" / f"{number}.jpg", rng, tint=label)
    return images


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --source_path with the dataset `tiny`: 8 classes of 6 images, half of them for training."""
    source = tmp_path_factory.mktemp("source")
    make_tree(source / "tiny" / "images")
    return source


def quick_pictures() -> None:
    """Pictures take most of a tiny run's time: files of a few bytes stand for them, written in the same way."""

    def plot(path: Path, *_: Any, **__: Any) -> None:
        with atomic_write(path) as beside:
            beside.write_text("<svg/>")

    def show(path: Path, *_: Any, **__: Any) -> None:
        with atomic_write(path) as beside:
            Image.new("RGB", (4, 4)).save(beside, format="png")

    plots.save_info_plot = plots.save_curve = plot
    plots.draw_retrievals = show


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """What pictures look like, and that whole runs draw them, is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_info_plot", "save_curve", "draw_retrievals"):
            patch.setattr(plots, name, getattr(plots, name))
        quick_pictures()
        yield


@pytest.fixture
def small_flags(tiny_source: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that gives the flags of a one-epoch run on `tiny` into `tmp_path/results`, and any more."""

    def flags(*more: str) -> list[str]:
        where = ["--dataset", "tiny", "--source_path", str(tiny_source), "--save_path", str(tmp_path / "results")]
        return [*SMALL, *where, "--savename", "run", "--n_epochs", "1", "--bs", "8", *more]

    return flags


def csv_rows(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows without the columns that depend on the machine."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in csv.DictReader(file)]


Metrics = dict[str, float]
CROSS = ("--dataset", "cv", "--split_scheme", "cross_validation", "--num_training_sets", "3", "--n_epochs", "2")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --source_path with `tiny` (8 classes of 6 images) and `cv` (16 classes of 4)."""
    source = tmp_path_factory.mktemp("source")
    make_tree(source / "tiny" / "images")
    make_tree(source / "cv" / "images", classes=16, per_class=4, seed=1)
    return source


def training_flags(source: Path, results: Path, *more: str) -> list[str]:
    where = ["--source_path", str(source), "--save_path", str(results)]
    return [*SMALL, *where, "--bs", "8", "--samples_per_class", "2", "--lr", "1e-3", "--embed_dim", "16", *more]


Run = Callable[..., Metrics]


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Run:
    """A function that trains `tiny` into tmp_path/tiny/run for two epochs, with any more flags."""

    def run(*more: str) -> Metrics:
        start = ["--dataset", "tiny", "--savename", "run", "--n_epochs", "2"]
        return main.command(training_flags(source, tmp_path, *start, *more))

    return run


@pytest.fixture
def go_on(tmp_path: Path) -> Run:
    """A function that gives tmp_path, a run's name and any more flags to `main.command`."""

    def go_on(*more: str, savename: str = "run") -> Metrics:
        return main.command(["--save_path", str(tmp_path), "--savename", savename, *more])

    return go_on


@pytest.fixture(scope="session")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `tiny`."""
    results = tmp_path_factory.mktemp("finished")
    main.command(training_flags(source, results, "--dataset", "tiny", "--savename", "run", "--n_epochs", "2"))
    return results / "tiny" / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, where `go_on` finds it."""
    return shutil.copytree(finished, tmp_path / "tiny" / "run")


class CrossValidated:
    """A finished cross-validation of three folds, with what was embedded meanwhile: (fold, epochs so far, images)."""

    def __init__(self, source: Path, results: Path):
        self.folder = results / "cv" / "run"
        self.embedded: list[tuple[str, int, list[str]]] = []
        embed = evaluate.embed

        def recording(net: Any, loader: datasets.ImageLoader, *args: Any) -> torch.Tensor:
            folds = sorted(path.name for path in self.folder.glob("fold_*"))
            log = self.folder / folds[-1] / "log_train_Base.csv"
            self.embedded.append((folds[-1], len(csv_rows(log)), list(loader.dataset.images.paths)))
            return embed(net, loader, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "embed", recording)
            more = ("--savename", "run", "--meta_testing_method", "ConcatenateEmbeddings")
            self.metrics = main.command(training_flags(source, results, *CROSS, *more))
        self.folds = sorted(self.folder.glob("fold_*"))
        self.splits = [datasets.give_splits(runs.load_flags(fold)) for fold in self.folds]


@pytest.fixture(scope="session")
def crossed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> CrossValidated:
    return CrossValidated(source, tmp_path_factory.mktemp("crossed"))


def embed_by_hand(
    folder: Path, images: datasets.ImageSet, trunk: bool = False, normalize: bool | None = None
) -> torch.Tensor:
    """Embeddings by a run's best network, in the batches of its evaluation, on whose size their last bits depend."""
    net = netlib.networkselect(pickle.loads((folder / "hypa.pkl").read_bytes()))
    net.load_state_dict(torch.load(folder / "checkpoint.pth.tar", weights_only=True)["state_dict"])
    net.eval()
    opt = runs.load_flags(folder)
    transform = transforms.eval_transform(opt.crop_size, opt.resize)
    pixels = torch.stack([transform(transforms.load_image(path)) for path in images.paths])
    with torch.inference_mode():
        parts = [net.backbone((batch - net.mean) / net.std) for batch in pixels.split(opt.eval_bs)]
        parts = parts if trunk else [net.embedding(part) for part in parts]
        if net.normalize if normalize is None else normalize:
            parts = [torch.nn.functional.normalize(part, dim=1) for part in parts]
        return torch.cat(parts)


# Pages in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


DRAWN = """
() => !document.querySelector("[data-root-id]")
  || (window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle))
"""


def open_page(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page once its charts are drawn, and what went wrong; anything that it loads is an error."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []

    def note(text: str, is_problem: bool = True) -> None:
        problems.extend([text] * is_problem)

    page.on("console", lambda message: note(message.text, message.type in ("error", "warning")))
    page.on("pageerror", lambda error: note(str(error)))
    page.on("dialog", lambda dialog: note(dialog.message))
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.on("request", lambda request: note(request.url, request.url[:5] not in ("file:", "data:")))
    page.goto(path.as_uri())
    page.wait_for_function(DRAWN)
    return page, problems


POINT = """
(column) => {  // where the first point with a value in that column is on the screen
  for (const view of Bokeh.index.roots) {
    for (const renderer of view.model.renderers ?? []) {
      const data = renderer.data_source?.data;
      if (!data || !(column in data)) continue;
      view.el.scrollIntoView({block: "center"});
      const place = view.el.getBoundingClientRect(), frame = view.frame;
      return [place.x + frame.x_scale.compute(data.x[0]), place.y + frame.y_scale.compute(data.y[0])];
    }
  }
}
"""
TOOLTIP = "() => document.querySelector('.bk-Tooltip')?.shadowRoot"
OVERLAPS = """
(width) => {  // elements that stick out of the page, or that share pixels with their neighbors
  const found = [];
  for (const one of document.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !one.closest(".scroll, pre")) found.push(one.outerHTML.slice(0, 80));
  }
  const grids = ".columns, .three, .four, .eight, .retrieval, .figures, nav, .tiles";
  for (const grid of document.querySelectorAll(`${grids}, .pairs, .pair > div, .found, .changed`)) {
    const boxes = [...grid.children].map(child => child.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
      const shared = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      if (shared > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1) found.push(grid.className);
    }));
  }
  return found;
}
"""
