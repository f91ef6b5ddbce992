"""Everything that is drawn: curves over epochs (SVG), scatter plots and sample retrievals (PNG)."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from auxiliaries import atomic_write
from records import Row, metrics_of
from transforms import load_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import ImageFont

    from datasets import ImageSet, RetrievalSet
    from evaluate import EmbeddingSpace

QUERIES_SHOWN, NEIGHBORS_SHOWN = 8, 6

# Curves over epochs


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, which pyplot doesn't know of and so needn't close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save_svg(figure: Figure, path: Path) -> None:
    with atomic_write(path) as beside:
        figure.savefig(beside, format="svg")


def _format_epoch_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _marker(num_points: int) -> str:
    """Points are marked as long as they can be told apart."""
    return "o" if num_points < 30 else ""


def _family(name: str) -> str:
    """The metric without its set and its k: `Set 0 Recall @ 4` -> `Recall`."""
    return re.sub(r"^Set \d+ | @ \d+$", "", name)


def _wrap(parts: Iterable[str], width: int) -> str:
    """Joins the parts by wide gaps, in lines of up to `width` characters that break only between parts."""
    joined = "    ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return textwrap.fill(joined, width, break_long_words=False, break_on_hyphens=False)


def save_info_plot(
    path: Path,
    train_rows: Sequence[Row],
    val_rows: Sequence[Row],
    selected_epoch: int,
    title: str,
    lower_is_better: Callable[[str], bool],
) -> None:
    """Draws training loss and metrics over epochs, one panel for each kind of metric.

    Args:
        path: the SVG to write.
        train_rows: rows with `Epochs` and `Train Loss`.
        val_rows: rows with `Epochs` and any number of metrics; `Time` is not drawn.
        selected_epoch: the epoch whose metrics stand in the header: one model's values.
        title: the first lines of the header.
        lower_is_better: whether the best value of a metric is its lowest.
    """
    metrics = list(metrics_of(val_rows[-1]))
    panels: dict[str, tuple[Sequence[Row], list[str]]]  # rows, and the names of the columns to draw
    panels = {"Train Loss": (train_rows, ["Train Loss"])} if train_rows else {}
    for name in metrics:
        panels.setdefault(_family(name), (val_rows, []))[1].append(name)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    width = 5.5 * columns

    header = f"{title}\n{_selected_values(metrics, val_rows, selected_epoch, int(13 * width))}"
    footer = _best_values(metrics, val_rows, lower_is_better, int(15 * width))
    text_height = 0.2 * (header.count("\n") + footer.count("\n") + 2)
    figure = _new_figure(width, 3.5 * rows + text_height)
    for number, (family, (source, names)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(family)
        _draw_panel(axes, source, names, selected_epoch)
    figure.suptitle(header, fontsize="medium", parse_math=False)
    figure.supxlabel(footer, fontsize="small", parse_math=False)
    _save_svg(figure, path)


def _draw_panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], selected_epoch: int) -> None:
    """Draws columns of the rows over epochs, with the selected epoch as a dotted line."""
    for name in names:
        points = {row["Epochs"]: row[name] for row in rows if name in row}
        axes.plot(list(points), list(points.values()), marker=_marker(len(points)), ms=3, label=name)
    axes.axvline(selected_epoch, color="0.6", linestyle=":", zorder=0)
    _format_epoch_axis(axes)
    if len(names) > 1:
        axes.legend(fontsize="small", ncols=math.ceil(len(names) / 8))


def _selected_values(metrics: Sequence[str], rows: Sequence[Row], epoch: int, width: int) -> str:
    """The metrics of one epoch, in lines of up to `width` characters."""
    row = next(row for row in rows if row["Epochs"] == epoch)
    return f"selected epoch {epoch}:\n" + _wrap((f"{name} {row.get(name, math.nan):.4f}" for name in metrics), width)


def _best_values(
    metrics: Sequence[str], rows: Sequence[Row], lower_is_better: Callable[[str], bool], width: int
) -> str:
    """Each metric's best value over epochs, in lines of up to `width` characters."""
    best = {name: _best_row(name, rows, lower_is_better(name)) for name in metrics}
    values = (f"{name} {row[name]:.4f} ({row['Epochs']})" for name, row in best.items())
    return "each metric's best value (its epoch), not one model's:\n" + _wrap(values, width)


def _best_row(name: str, rows: Sequence[Row], lower_is_better: bool) -> Row:
    """The first row with the best value of a metric; NaN never is the best of several."""
    sign = -1 if lower_is_better else 1
    rows_with_value = [row for row in rows if name in row]
    return max(rows_with_value, key=lambda row: -math.inf if math.isnan(row[name]) else sign * row[name])


def save_curve(path: Path, rows: Sequence[Mapping[str, float]], name: str) -> None:
    """Draws one column of the rows over `Epochs` into an SVG."""
    figure = _new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot([row["Epochs"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
    axes.set_title(name)
    _format_epoch_axis(axes)
    _save_svg(figure, path)


def save_bands(path: Path, curves: Mapping[str, Sequence[tuple[int, float, float]]], name: str) -> None:
    """Draws mean curves with their confidence bands into an SVG.

    Args:
        path: the SVG to write.
        curves: for each label its points: epoch, mean, and half the width of the confidence interval (or NaN).
        name: the metric.
    """
    figure = _new_figure(9, 5.5)
    axes = figure.add_subplot()
    for label, points in curves.items():
        epochs, mean, half = np.array(points, dtype=float).reshape(-1, 3).T
        (line,) = axes.plot(epochs, mean, marker=_marker(len(epochs)), ms=3, label=label)
        axes.fill_between(epochs, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    means = [mean for points in curves.values() for _, mean, _ in points]
    if means:  # the interval of only two runs is so wide that curves would look flat
        room = 0.6 * np.ptp(means) or 0.1
        axes.set_ylim(min(means) - room, max(means) + room)
    axes.set_title("mean and 95 % confidence interval over seeds and folds")
    axes.set_ylabel(f"{name} of the classes that select the epoch")
    _format_epoch_axis(axes)
    legend = axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save_svg(figure, path)


# Embeddings in the plane


def save_scatter(path: Path, points: np.ndarray, labels: np.ndarray, title: str) -> None:
    """Draws points `(N, 2)`, colored by their labels `(N,)`, into a PNG."""
    _, ranks = np.unique(labels, return_inverse=True)
    figure = _new_figure(8, 8)
    axes = figure.add_subplot()
    axes.scatter(points[:, 0], points[:, 1], c=ranks, cmap="gist_rainbow", s=12, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[])
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


# Sample retrievals


@dataclass(frozen=True)
class Retrieval:
    """A query and its nearest neighbors, ready to draw: images are `(H, W, 3)` uint8 arrays."""

    query: np.ndarray
    query_class: str
    neighbors: Sequence[np.ndarray]
    neighbor_classes: Sequence[str]
    correct: Sequence[bool]


def draw_retrievals(path: Path, space: EmbeddingSpace, images: RetrievalSet[ImageSet], seed: int) -> None:
    """Draws a few queries, the same at every call with the same seed, with their nearest neighbors into a PNG.

    Args:
        path: the PNG to write.
        space: the embeddings of the images.
        images: the images in the same order.
        seed: seed of the choice among the queries that have a positive.
    """
    gallery, class_names = images.gallery or images.query, images.query.class_names[0]
    candidates = np.flatnonzero(space.has_positive)
    count = min(QUERIES_SHOWN, len(candidates))
    chosen = np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
    retrievals = []
    for query_idx, neighbor_idx in zip(chosen, space.neighbors(chosen, NEIGHBORS_SHOWN)):
        label, neighbor_labels = space.query_labels[query_idx], space.gallery_labels[neighbor_idx]
        retrievals.append(
            Retrieval(
                query=_load_pixels(images.query.paths[query_idx]),
                query_class=class_names[label],
                neighbors=[_load_pixels(gallery.paths[i]) for i in neighbor_idx],
                neighbor_classes=[class_names[neighbor_label] for neighbor_label in neighbor_labels],
                correct=(neighbor_labels == label).tolist(),
            )
        )
    save_recoveries(path, retrievals)


def _load_pixels(path: str) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8."""
    return load_image(path).permute(1, 2, 0).numpy()


def save_recoveries(path: Path, retrievals: Sequence[Retrieval]) -> None:
    """Draws each query (framed red) beside its nearest neighbors (green: right class; gray: wrong) into a PNG."""
    from PIL import Image, ImageDraw, ImageOps

    side, frame, caption, gap = 128, 5, 18, 6  # px
    cell = side + 2 * frame
    columns = 1 + max(len(retrieval.neighbors) for retrieval in retrievals)
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, len(retrievals) * (cell + caption + gap) + 28), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), "query (red) and its nearest neighbors (green: right class, gray: wrong)", "black", _font(13))
    for row, retrieval in enumerate(retrievals):
        images = [retrieval.query, *retrieval.neighbors]
        names = [retrieval.query_class, *retrieval.neighbor_classes]
        colors = ["#d62728", *("#2ca02c" if is_correct else "#b0b0b0" for is_correct in retrieval.correct)]
        for column, (image, name, color) in enumerate(zip(images, names, colors)):
            x, y = gap + column * (cell + gap), 28 + row * (cell + caption + gap)
            draw.text((x + cell // 2, y), _shorten(name.replace("_", " "), cell), "black", _font(11), anchor="ma")
            thumbnail = ImageOps.pad(Image.fromarray(image), (side, side), color="white")
            canvas.paste(ImageOps.expand(thumbnail, frame, color), (x, y + caption))
    with atomic_write(path) as beside:
        canvas.save(beside, format="png")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _shorten(text: str, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` px of a caption."""
    font = _font(11)
    if font.getlength(text) <= width:
        return text
    return next(cut for end in range(len(text), -1, -1) if font.getlength(cut := text[:end] + "…") <= width)
