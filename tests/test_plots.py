"""plots.py: texts, panels and frames of everything that is drawn."""

from __future__ import annotations

import html
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

import plots
from plots import (
    Retrieval,
    draw_retrievals,
    save_bands,
    save_curve,
    save_info_plot,
    save_recoveries,
    save_scatter,
)
from records import Row


def higher_is_better(name: str) -> bool:
    return False


def svg_texts(path: Path) -> list[str]:
    """All texts of a figure: matplotlib writes them as comments beside the glyphs."""
    tree = ET.fromstring(path.read_text(encoding="utf-8"), ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    comments = [element.text or "" for element in tree.iter() if element.tag is ET.Comment]
    return [html.unescape(text).replace("\N{NO-BREAK SPACE}", " ").strip() for text in comments]


FOOTER = "better values of other epochs (in parentheses), not one model's:"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved, save = [], plots._save

    def keeping(figure: Figure, *args: Any) -> None:
        saved.append(figure)
        save(figure, *args)

    monkeypatch.setattr(plots, "_save", keeping)
    return saved


def metric_rows(names: list[str], epochs: int = 3) -> list[dict[str, float]]:
    values = np.random.default_rng(0).random((epochs, len(names)))
    return [{"Epochs": i + 1, "Time": 9.0, **dict(zip(names, row.tolist()))} for i, row in enumerate(values)]


RECALLS = [f"Recall @ {k}" for k in (1, 2, 4, 8, 16)]
SETS = [f"Set {position} {name}" for position in range(3) for name in ("NMI", "F1", "Recall @ 1", "Recall @ 5")]


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        (["Recall @ 1"], ["Recall"]),
        (["NMI", "F1", *RECALLS], ["NMI", "F1", "Recall"]),
        ([f"Measure {i % 10} @ {i}" for i in range(30)], [f"Measure {i}" for i in range(10)]),
        (SETS, ["NMI", "F1", "Recall"]),
    ],
    ids=["1 metric", "7 metrics", "30 metrics", "3 sets"],
)
def test_info_plot(names: list[str], panels: list[str], tmp_path: Path) -> None:
    open_figures, path = plt.get_fignums(), tmp_path / "InfoPlot_Base.svg"
    losses = [{"Epochs": epoch, "Train Loss": 1 / epoch} for epoch in (1, 2, 3)]
    rows = metric_rows(names)
    save_info_plot(path, losses, rows, 2, "tiny_data, resnet18 & <margin>", higher_is_better)
    texts = svg_texts(path)
    assert "tiny_data, resnet18 & <margin>" in texts
    start, middle = texts.index("selected epoch 2:"), texts.index(FOOTER)
    header, footer = "    ".join(texts[start + 1 : middle]), "    ".join(texts[middle + 1 :])
    assert re.split(" {2,}", header) == [f"{name} {rows[1][name]:.4f}" for name in names]
    best = {name: max(rows, key=lambda row: row[name]) for name in names}
    better = [f"{name} {row[name]:.4f} ({row['Epochs']})" for name, row in best.items() if row["Epochs"] != 2]
    assert re.split(" {2,}", footer) == better
    assert len(re.findall(r'id="axes_\d+"', path.read_text(encoding="utf-8"))) == 1 + len(panels)
    assert all(texts.count(panel) >= 1 for panel in ["Train Loss", *panels])
    assert plt.get_fignums() == open_figures
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_footer_that_repeats_the_header_is_left_out(tmp_path: Path) -> None:
    rows = metric_rows(["NMI", "F1"], epochs=1)
    save_info_plot(tmp_path / "plot.svg", [], rows, 1, "", higher_is_better)
    texts = svg_texts(tmp_path / "plot.svg")
    assert FOOTER not in texts
    assert f"NMI {rows[0]['NMI']:.4f}    F1 {rows[0]['F1']:.4f}" in texts


@pytest.mark.parametrize(("epochs", "ticks"), [((1,), [1]), ((0, 1), [0, 1]), ((7, 9), [7, 8, 9])])
def test_epochs_are_whole_numbers_on_the_same_axis_in_all_panels(
    epochs: tuple[int, ...], ticks: list[int], figures: list[Figure], tmp_path: Path
) -> None:
    val_rows: list[Row] = [{"Epochs": epoch, "NMI": 0.5, "Recall @ 1": 0.25} for epoch in epochs]
    train_rows: list[Row] = [{"Epochs": epoch, "Train Loss": 0.5} for epoch in epochs if epoch]
    save_info_plot(tmp_path / "plot.svg", train_rows, val_rows, epochs[-1], "", higher_is_better)
    panels = figures[0].axes
    for axes in panels:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == ticks
        assert (low, high) == panels[0].get_xlim()
        assert low < epochs[0] <= epochs[-1] < high


@pytest.mark.parametrize(
    ("values", "span"),
    [
        ((0.664, 0.665, 0.663), 0.03),  # noise
        ((0.2, 0.6, 0.4), 0.4),
        ((0.5,), 0.02),
        ((0.0, 0.0), 0.9),
        ((-7.0, -7.001), 0.3),
        ((math.nan, 0.5), 0.02),
        ((math.nan,), 0.0),
    ],
)
def test_values_that_hardly_differ_look_as_if_they_did(
    values: tuple[float, ...], span: float, figures: list[Figure], tmp_path: Path
) -> None:
    rows: list[Row] = [{"Epochs": epoch, "NMI": value} for epoch, value in enumerate(values)]
    save_info_plot(tmp_path / "plot.svg", [], rows, 0, "", higher_is_better)
    save_curve(tmp_path / "curve.svg", rows, "NMI")
    save_bands(tmp_path / "bands.svg", {"a": [(epoch, value, 0.01) for epoch, value in enumerate(values)]}, "NMI")
    for figure in figures:
        low, high = figure.axes[0].get_ylim()
        assert high - low >= span
        assert all(low < value < high for value in values if math.isfinite(value))


@pytest.mark.parametrize("names", [RECALLS, SETS, [f"Recall @ {k}" for k in range(1, 25)]], ids=["5", "3 sets", "24"])
def test_a_legend_stands_beside_the_curves_in_their_order(
    names: list[str], figures: list[Figure], tmp_path: Path
) -> None:
    rows = metric_rows(names)
    save_info_plot(tmp_path / "plot.svg", [], rows, 1, "", higher_is_better)
    for axes in figures[0].axes:
        lines = {str(line.get_label()): line for line in axes.get_lines() if not str(line.get_label()).startswith("_")}
        legend = axes.get_legend()
        assert legend is not None
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1
        shown = [text.get_text() for text in legend.get_texts()]
        last = [float(np.asarray(lines[label].get_ydata())[-1]) for label in shown]
        assert last == sorted(last, reverse=True)
        assert len({str(line.get_color()) for line in lines.values()}) == len(lines)
        assert shown
        assert all(re.fullmatch(r"(Set \d)? ?(@ \d+)?", label) for label in shown)


def test_a_title_is_drawn_as_it_is(tmp_path: Path) -> None:
    """A dataset's folder may have a name that matplotlib would read as a formula."""
    save_info_plot(tmp_path / "plot.svg", [], metric_rows(["NMI"]), 1, r"$\cost$_of", higher_is_better)
    assert r"$\cost$_of" in svg_texts(tmp_path / "plot.svg")


def test_a_curve(tmp_path: Path) -> None:
    save_curve(tmp_path / "curve.svg", [{"Epochs": 1, "Ratio": 0.5}, {"Epochs": 2, "Ratio": 0.25}], "Ratio")
    assert {"epoch", "Ratio"} <= set(svg_texts(tmp_path / "curve.svg"))


def test_bands_are_means_with_their_intervals(tmp_path: Path) -> None:
    curves = {"lr $0.1$": [(1, 0.5, 0.1), (2, 0.75, math.nan)], "never in common": []}
    save_bands(tmp_path / "bands.svg", curves, "MAP@R")
    texts = svg_texts(tmp_path / "bands.svg")
    assert {"MAP@R of the classes that select the epoch", "epoch", "lr $0.1$", "never in common"} <= set(texts)
    assert "mean over seeds of means over folds, with its 95 % confidence interval" in texts
    save_bands(tmp_path / "bands.svg", {"never in common": []}, "MAP@R")
    assert "never in common" in svg_texts(tmp_path / "bands.svg")


def test_curves_have_room_above_the_legend_of_many_configurations(figures: list[Figure], tmp_path: Path) -> None:
    save_bands(tmp_path / "bands.svg", {f"lr {i}": [(1, 0.5, 0.1), (2, 0.6, 0.1)] for i in range(60)}, "MAP@R")
    (axes,) = figures[0].axes
    assert axes.get_window_extent().height > 200  # pixels


def test_the_best_value_of_a_metric_may_be_its_lowest_and_is_never_nan(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"Epochs": epoch, "Set 0 Alignment": alignment, "Set 0 Recall @ 1": recall}
        for epoch, alignment, recall in ((1, 0.5, math.nan), (2, 0.25, 0.125), (3, math.nan, 0.5), (4, 0.25, 0.5))
    ]
    save_info_plot(tmp_path / "plot.svg", [], rows, 2, "", lambda name: name == "Set 0 Alignment")
    assert svg_texts(tmp_path / "plot.svg")[-2:] == [FOOTER, "Set 0 Recall @ 1 0.5000 (3)"]
    save_info_plot(tmp_path / "plot.svg", [], rows, 1, "", lambda name: name == "Set 0 Alignment")
    footer = svg_texts(tmp_path / "plot.svg")[-1]
    assert re.split(" {2,}", footer) == ["Set 0 Alignment 0.2500 (2)", "Set 0 Recall @ 1 0.5000 (3)"]


def test_rows_may_have_other_metrics_than_the_last(tmp_path: Path) -> None:
    """A run may have been resumed with more or fewer metrics."""
    rows: list[Row] = [{"Epochs": 1, "NMI": 0.5}, {"Epochs": 2, "NMI": 0.25, "F1": 0.75}]
    save_info_plot(tmp_path / "plot.svg", [], rows, 1, "", higher_is_better)
    texts = svg_texts(tmp_path / "plot.svg")
    assert "NMI 0.5000    F1 nan" in texts
    assert texts[-2:] == [FOOTER, "F1 0.7500 (2)"]


def test_a_scatter_is_colored_by_label(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    save_scatter(tmp_path / "tsne.png", points, np.array([5, 900, -3])[np.arange(30) % 3], "$three_ classes")
    with Image.open(tmp_path / "tsne.png") as image:
        assert image.format == "PNG"
        assert image.width == image.height == 960


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_few_classes_are_named_at_their_points(figures: list[Figure], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"class_{label}" for label in range(30)]
    names[3] = "U+00E9"
    for count in (20, 21):
        labels = np.repeat(np.arange(count), 5)
        centers = 100 * rng.random((count, 2))
        points = centers[labels] + rng.normal(size=(len(labels), 2))
        save_scatter(tmp_path / "tsne.png", points, labels, "classes", names)
        if count > 20:
            assert texts_of(figures[-1]) == []
            continue
        for label, text in enumerate(figures[-1].axes[0].texts):
            expected = "U+00E9 latin small\nletter e with acute" if label == 3 else f"class {label}"
            assert text.get_text() == expected
            assert np.abs(np.array(text.xy) - centers[label]).max() < 5  # type: ignore[attr-defined]
    save_scatter(tmp_path / "tsne.png", points, labels % 2, "without names")
    assert texts_of(figures[-1]) == []


# Texts


CHINESE, NOT_UNICODE, BIRD = "中文", "a\udcffb", "\U0001f426"


@pytest.mark.parametrize("font", ["none", "one"])
def test_characters_that_no_font_has_are_escaped_everywhere(
    font: str, figures: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matplotlib would warn, which fails this test, and draw boxes; Pillow would draw boxes without a word."""
    other = plots._default_font().replace("DejaVuSans", "DejaVuSerif")
    # an installed font with all characters but those of NOT_UNICODE; both fonts are real ones
    missing = plots._missing_characters

    def pretended(text: str, file: str) -> set[str]:
        has_all = font == "one" and file == other
        return {char for char in missing(text, file) if not has_all or char == "\udcff"}

    monkeypatch.setattr(plots, "_missing_characters", pretended)
    fonts = [SimpleNamespace(fname=name, style="normal", weight=400) for name in (str(tmp_path / "gone.ttf"), other)]
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", fonts)
    plots._find_font.cache_clear()
    escaped = {CHINESE: "\\u4e2d\\u6587", NOT_UNICODE: "a\\udcffb", BIRD: "\\U0001f426"}
    for text, plain in escaped.items():
        chosen = (text, other) if font == "one" and text != NOT_UNICODE else (plain, plots._default_font())
        assert plots._choose_font(text) == chosen
        lines, file = plots._caption(f"{text}_x", 138)
        assert (" ".join(lines), file) == (f"{chosen[0]} x", chosen[1])
    assert plots._choose_font("Ψ Laysan_é ж") == ("Ψ Laysan_é ж", plots._default_font())
    if font == "none":
        name = f"{CHINESE} {NOT_UNICODE} {BIRD}"
        save_info_plot(tmp_path / "plot.svg", [], metric_rows(["NMI"]), 1, name, higher_is_better)
        assert " ".join(escaped.values()) in svg_texts(tmp_path / "plot.svg")
        save_bands(tmp_path / "bands.svg", {name: [(1, 0.5, 0.1)]}, name)
        assert " ".join(escaped.values()) in svg_texts(tmp_path / "bands.svg")
        save_scatter(tmp_path / "tsne.png", np.zeros((3, 2)), np.zeros(3, int), name, [CHINESE])
        assert texts_of(figures[-1]) == [escaped[CHINESE]]
    plots._find_font.cache_clear()


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("Laysan_Albatross", ["Laysan Albatross"]),
        ("001.Black_footed_Albatross", ["001.Black footed", "Albatross"]),
        ("U+0041", ["U+0041 latin capital", "letter a"]),
        ("U+E000", ["U+E000"]),
        ("Llanfairpwllgwyngyllgogerychwyrndrobwll", None),
        ("a_name_of_so_many_words_that_three_lines_are_not_enough_for_it_at_all", None),
        ("x" * 5000, None),
        ("tab\tand\nline", ["tab and line"]),
        ("", [""]),
    ],
)
def test_captions_fit(name: str, lines: list[str] | None) -> None:
    found, file = plots._caption(name, 138)
    assert found == (lines or found)
    assert len(found) <= 3
    assert all(plots._pil_font(file, plots.CAPTION_SIZE).getlength(line) <= 138 for line in found)
    shown = "".join(found).replace(" ", "")
    whole = name.replace("_", "")
    assert lines or shown == whole or (shown.endswith("…") and whole.startswith(shown[:-1]) and len(shown) > 20)


def frames(pixels: np.ndarray, color: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Top left corners (row, column) of the frames of one color, row by row."""
    regions, _ = ndimage.label((pixels == color).all(axis=2))
    boxes = [box for box in ndimage.find_objects(regions) if min(side.stop - side.start for side in box) > 50]
    return sorted((rows.start, columns.start) for rows, columns in boxes)


def test_sample_retrievals_are_framed_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blue = np.full((40, 40, 3), (0, 0, 255), np.uint8)
    retrievals = [
        Retrieval(
            blue,
            "Laysan_Albatross",
            [blue] * 3,
            ["Laysan_Albatross", "Crow", "Laysan_Albatross"],
            [True, False, True],
            [0.0, 0.51234, 123.456],
        ),
        Retrieval(blue, "Crow", [blue], ["Laysan_Albatross"], [False], [0.5]),  # fewer neighbors
    ]
    written: list[str] = []
    write = plots._write

    def writing(draw: Any, line: str, *args: Any) -> None:
        written.append(line)
        write(draw, line, *args)

    monkeypatch.setattr(plots, "_write", writing)
    save_recoveries(tmp_path / "sample_recoveries.png", retrievals)
    assert written[:4] == ["Laysan Albatross", "query", "Laysan Albatross", "0.00"]
    assert [text for text in written if text[0].isdigit()] == ["0.00", "0.512", "123", "0.500"]
    with Image.open(tmp_path / "sample_recoveries.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    red, green, gray = (frames(pixels, color) for color in ((214, 39, 40), (44, 160, 44), (176, 176, 176)))
    (top, left), (bottom, below_left) = red
    assert left == below_left
    assert top < bottom
    (green_row, second), (other_row, fourth) = green
    assert green_row == other_row == top
    (gray_row, third), (last_row, last) = gray
    assert (gray_row, last_row) == (top, bottom)
    assert left < second == last < third < fourth


@dataclass
class Space:
    """An embedding space whose neighbors are given."""

    query: torch.Tensor
    gallery: torch.Tensor
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    has_positive: np.ndarray
    nearest: np.ndarray

    def neighbors(self, chosen: np.ndarray, k: int) -> np.ndarray:
        return self.nearest[chosen, :k]


@pytest.mark.parametrize("with_gallery", [False, True])
def test_queries_are_drawn_with_their_neighbors(
    with_gallery: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (40, 3)).astype(np.uint8)
    paths = [str(tmp_path / f"{i}.png") for i in range(40)]
    for path, color in zip(paths, colors):
        Image.fromarray(np.full((7, 5, 3), color)).save(path)
    names = [f"class {label}" for label in range(4)]
    query_of, gallery_of = (slice(0, 20), slice(20, 40)) if with_gallery else (slice(0, 40), slice(0, 40))
    query, gallery = (
        SimpleNamespace(paths=paths[part], labels=np.arange(40)[part] % 4, class_names=[names])
        for part in (query_of, gallery_of)
    )
    has_positive = rng.random(len(query.paths)) < 0.7
    nearest = np.argsort(rng.random((len(query.paths), len(gallery.paths))), axis=1)
    embedded = torch.from_numpy(rng.normal(size=(40, 8))).float()
    space: Any = Space(embedded[query_of], embedded[gallery_of], query.labels, gallery.labels, has_positive, nearest)
    images: Any = SimpleNamespace(query=query, gallery=gallery if with_gallery else None)

    drawn: list[list[Retrieval]] = []
    monkeypatch.setattr(plots, "save_recoveries", lambda path, retrievals: drawn.append(list(retrievals)))
    for seed in (1, 1, 2):
        draw_retrievals(tmp_path / "sample_recoveries.png", space, images, seed)
    positions = []
    for retrieval in drawn[0]:
        assert retrieval.query.shape == (7, 5, 3)
        (position,) = np.flatnonzero((colors[query_of] == retrieval.query[0, 0]).all(axis=1))
        positions.append(position)
        found = nearest[position, :6]
        assert retrieval.query_class == f"class {query.labels[position]}"
        assert [tuple(pixels[0, 0]) for pixels in retrieval.neighbors] == [tuple(colors[gallery_of][i]) for i in found]
        assert retrieval.neighbor_classes == [f"class {gallery.labels[i]}" for i in found]
        assert retrieval.correct == [gallery.labels[i] == query.labels[position] for i in found]
        steps = embedded[gallery_of].numpy()[found] - embedded[query_of].numpy()[position]
        assert retrieval.distances == pytest.approx(np.linalg.norm(steps, axis=1))
    assert len(drawn[0]) == 8
    assert positions == sorted(set(positions))
    assert has_positive[positions].all()
    first, again, other = ([retrieval.query.tolist() for retrieval in retrievals] for retrievals in drawn)
    assert first == again != other


def test_fewer_queries_than_places_are_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "0.png")
    Image.new("L", (5, 7)).save(path)
    query = SimpleNamespace(paths=[path] * 3, class_names=[["a", "b"]])
    labels = np.array([0, 0, 1])
    points = torch.zeros(3, 4)
    nearest = np.array([[1, 2], [0, 2], [0, 1]])
    space: Any = Space(points, points, labels, labels, np.array([True, True, False]), nearest)
    images: Any = SimpleNamespace(query=query, gallery=None)
    drawn: list[Retrieval] = []
    monkeypatch.setattr(plots, "save_recoveries", lambda path, retrievals: drawn.extend(retrievals))
    draw_retrievals(tmp_path / "sample_recoveries.png", space, images, seed=0)
    assert [retrieval.correct for retrieval in drawn] == [[True, False], [True, False]]


def test_attention_is_red_where_the_similarity_comes_from(tmp_path: Path) -> None:
    gray = np.full((40, 40, 3), 128, np.uint8)
    left, right = np.array([[[1.0, 0.0]], [[0.5, 0.0]]]), np.array([[[0.0, 1.0]], [[-2.0, 0.25]]])  # (K, h, w)
    one = plots.SharedSimilarity(gray, "Crow", [gray, gray], ["Crow", "Jay"], np.array([0.9, 0.4]), left, right)
    fewer = plots.SharedSimilarity(gray, "Jay", [gray], ["Jay"], np.array([0.1]), 0 * left[:1], 0 * left[:1])
    plots.save_attention(tmp_path / "attention.png", [one, fewer], "a title")
    with Image.open(tmp_path / "attention.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]  # (H, W)
    side, gap, header = 128, 10, 34

    def halves(column: int, lower: bool) -> tuple[float, float]:
        x, y = gap + column * (side + gap), header + lower * (side + 4)
        cell = redness[y : y + side, x : x + side]
        return cell[:, :16].mean(), cell[:, -16:].mean()

    assert halves(0, lower=False) == (0, 0)  # the query itself
    assert halves(0, lower=True) == (0, 0)  # white
    (first, nothing), (weaker, _) = halves(1, lower=False), halves(2, lower=False)
    assert first > 100 > weaker > 40 > nothing
    assert halves(1, lower=True) == (nothing, first)
    assert halves(2, lower=True)[0] == 0  # what takes away from the similarity
    assert redness[-2 * side :].max() == 0  # no similarity at all
