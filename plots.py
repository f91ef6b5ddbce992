"""Everything that is drawn: curves over epochs (SVG), scatter plots and sample retrievals (PNG)."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from auxiliaries import atomic_write, by_first_rank
from records import Row, mean_over_sets, metrics_of
from transforms import load_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    from datasets import ImageSet, RetrievalSet
    from evaluate import EmbeddingSpace

QUERIES_SHOWN, NEIGHBORS_SHOWN, FOUND_SHOWN = 8, 6, 10
NAMED_CLASSES = 20  # as many as there are colors that can be told apart
SMALLEST_RANGE = 0.05  # of an axis, as a share of its values: less would make a trend of noise

# Text


@lru_cache(maxsize=8)  # each keeps its file open
def _load_font(path: str) -> FT2Font:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


def _default_font() -> str:
    """DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    from matplotlib import get_data_path

    return str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _missing_characters(text: str, font: str) -> set[str]:
    """The characters that a font, given by its file, lacks."""
    glyph_of = _load_font(font).get_char_index
    return {char for char in text if not char.isspace() and not glyph_of(ord(char))}


@cache
def _find_font(text: str) -> str | None:
    """The file of an installed font that has all characters of a text; None where there is none."""
    from matplotlib.font_manager import fontManager

    upright_first = sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", str(font.weight) != "400"))
    for font in upright_first:
        try:
            if "LastResort" not in font.fname and not _missing_characters(text, font.fname):
                _pil_font(font.fname, CAPTION_SIZE)  # refuses fonts of pictures
                return font.fname
        except (OSError, RuntimeError, ValueError):  # a font that is gone or can't be read
            continue
    return None


def _choose_font(text: str) -> tuple[str, str]:
    """A text with the file of a font to write it with; characters that no font has are written as `\\u4e2d`."""
    missing = _missing_characters(text, _default_font())
    other = _find_font(text) if missing else None
    if other is None:
        text = text.translate({ord(char): char.encode("ascii", "backslashreplace").decode() for char in missing})
    return text, other or _default_font()


def display_name(class_name: str) -> str:
    """A class's name as captions show it: `Laysan_Albatross` -> `Laysan Albatross`; a glyph's with the character's."""
    if re.fullmatch(r"U\+[0-9A-F]{4,5}", class_name):
        return f"{class_name} {unicodedata.name(chr(int(class_name[2:], 16)), '').lower()}".strip()
    return " ".join(class_name.replace("_", " ").split())


# Curves over epochs


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, which pyplot doesn't know of and so needn't close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path, file_format: str = "svg") -> None:
    """Writes a figure with fonts that have the characters of its texts."""
    from matplotlib.text import Text

    for text in [artist for artist in figure.findobj() if isinstance(artist, Text)]:
        words, font = _choose_font(text.get_text())
        if font != _default_font():
            properties = text.get_fontproperties().copy()
            properties.set_file(font)
            text.set_fontproperties(properties)
        text.set_text(words)
    with atomic_write(path) as beside:
        figure.savefig(beside, format=file_format, dpi=120)


def _format_axes(axes: Axes, epochs: Iterable[float], values: Iterable[float]) -> None:
    """Labels the axis of epochs with whole numbers, and gives both axes room around what lies close together."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    epochs, finite = list(epochs), [value for value in values if math.isfinite(value)]
    if epochs:
        room = max(0.4, 0.03 * (max(epochs) - min(epochs)))
        axes.set_xlim(min(epochs) - room, max(epochs) + room)
    if finite:
        span = max(max(finite) - min(finite), SMALLEST_RANGE * max(map(abs, finite)) or 1)
        middle = (max(finite) + min(finite)) / 2
        axes.set_ylim(middle - 0.55 * span, middle + 0.55 * span)


def _marker(num_points: int) -> str:
    """Points are marked as long as they can be told apart."""
    return "o" if num_points < 30 else ""


def metric_family(name: str) -> str:
    """The metric without its set, its label level and its k: `Set 0 Recall @ 4` -> `Recall`."""
    return re.sub(r"^(Set \d+ )?(Level (\d+|mean) )?| @ [\d.e-]+$", "", name)


def _wrap(parts: Iterable[str], width: int) -> str:
    """Joins the parts by wide gaps, in lines of up to `width` characters that break only between parts."""
    joined = "    ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    lines = textwrap.fill(joined, width, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


@by_first_rank
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
        panels.setdefault(metric_family(name), (val_rows, []))[1].append(name)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    width = 5.5 * columns

    header = f"{title}\n{_selected_values(metrics, val_rows, selected_epoch, int(13 * width))}"
    footer = _better_values(metrics, val_rows, selected_epoch, lower_is_better, int(15 * width))
    text_height = 0.2 * (header.count("\n") + footer.count("\n") + 2)
    figure = _new_figure(width, 3.5 * rows + text_height)
    epochs = [row["Epochs"] for row in (*train_rows, *val_rows)]
    for number, (family, (source, names)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(family)
        _draw_panel(axes, source, {name: label_in_family(name, family) for name in names}, selected_epoch, epochs)
    figure.suptitle(header, fontsize="medium", parse_math=False)
    if footer:
        figure.supxlabel(footer, fontsize="small", parse_math=False)
    _save(figure, path)


def label_in_family(name: str, family: str) -> str:
    """What tells a metric from the others of its family: `Set 0 Recall @ 4` -> `Set 0 @ 4`."""
    return " ".join(name.replace(family, "", 1).split()) or name


def _draw_panel(
    axes: Axes, rows: Sequence[Row], labels: Mapping[str, str], selected_epoch: int, epochs: Iterable[float]
) -> None:
    """Draws columns of the rows, by their labels, over epochs, with the selected epoch as a dotted line."""
    from matplotlib import colormaps

    curves = {name: {row["Epochs"]: row[name] for row in rows if name in row} for name in labels}
    shades = colormaps["viridis"](np.linspace(0, 0.95, len(labels)))
    palette = [f"C{i}" for i in range(10)] if len(labels) <= 10 else list(shades)
    for (name, points), color in zip(curves.items(), palette):
        marker = _marker(len(points))
        axes.plot(list(points), list(points.values()), color=color, marker=marker, ms=3, label=labels[name])
    axes.axvline(selected_epoch, color="0.6", linestyle=":", zorder=0)
    _format_axes(axes, epochs, [value for points in curves.values() for value in points.values()])
    if len(labels) > 1:  # beside the curves, in their order at the end
        handles, names = axes.get_legend_handles_labels()
        ends = [next(reversed(points.values()), math.nan) for points in curves.values()]
        order = sorted(range(len(ends)), key=lambda i: (math.isfinite(ends[i]), ends[i], i), reverse=True)
        axes.legend(
            [handles[i] for i in order],
            [names[i] for i in order],
            loc="upper left",
            bbox_to_anchor=(1, 1),
            frameon=False,
            fontsize="small",
            ncols=math.ceil(len(names) / 16),
        )


def _selected_values(metrics: Sequence[str], rows: Sequence[Row], epoch: int, width: int) -> str:
    """The metrics of one epoch, in lines of up to `width` characters."""
    row = next(row for row in rows if row["Epochs"] == epoch)
    return f"selected epoch {epoch}:\n" + _wrap((f"{name} {row.get(name, math.nan):.4f}" for name in metrics), width)


def _better_values(
    metrics: Sequence[str],
    rows: Sequence[Row],
    selected_epoch: int,
    lower_is_better: Callable[[str], bool],
    width: int,
) -> str:
    """The best values of metrics that another epoch than the selected one has, in lines of up to `width` characters."""
    best = {name: _best_row(name, rows, lower_is_better(name)) for name in metrics}
    selected = next(row for row in rows if row["Epochs"] == selected_epoch)
    parts = [
        f"{name} {row[name]:.4f} ({row['Epochs']})" for name, row in best.items() if row[name] != selected.get(name)
    ]
    return f"better values of other epochs (in parentheses), not one model's:\n{_wrap(parts, width)}" if parts else ""


def _best_row(name: str, rows: Sequence[Row], lower_is_better: bool) -> Row:
    """The first row with the best value of a metric; NaN never is the best of several."""
    sign = -1 if lower_is_better else 1
    rows_with_value = [row for row in rows if name in row]
    return max(rows_with_value, key=lambda row: -math.inf if math.isnan(row[name]) else sign * row[name])


@by_first_rank
def save_curve(path: Path, rows: Sequence[Mapping[str, float]], name: str) -> None:
    """Draws one column of the rows over `Epochs` into an SVG."""
    figure = _new_figure(6, 4)
    axes = figure.add_subplot()
    axes.plot([row["Epochs"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
    axes.set_title(name)
    _format_axes(axes, [row["Epochs"] for row in rows], [row[name] for row in rows])
    _save(figure, path)


def save_sizes(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draws times, in seconds, and memory, in GiB, against numbers of items into an SVG, both axes logarithmic."""
    figure = _new_figure(6, 4)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", ms=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("items")
    axes.set_ylabel("seconds, GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def save_bands(path: Path, curves: Mapping[str, Sequence[tuple[int, float, float]]], name: str) -> None:
    """Draws mean curves with their confidence bands into an SVG.

    Args:
        path: the SVG to write.
        curves: for each label its points: epoch, mean, and half the width of the confidence interval (or NaN).
        name: the metric.
    """
    named = {textwrap.fill(label, 110): points for label, points in curves.items()}
    num_lines = sum(label.count("\n") + 1 for label in named)
    figure = _new_figure(9, 5.5 + 0.2 * max(0, num_lines - 10))  # the legend stands below the curves
    axes = figure.add_subplot()
    for label, points in named.items():
        epochs, mean, half = np.array(points, dtype=float).reshape(-1, 3).T
        (line,) = axes.plot(epochs, mean, marker=_marker(len(epochs)), ms=3, label=label)
        axes.fill_between(epochs, mean - half, mean + half, color=line.get_color(), alpha=0.2, linewidth=0)
    points = [point for curve in curves.values() for point in curve]
    means = [mean for _, mean, _ in points]
    # The interval of only two runs is so wide that curves would look flat: it may be cut off.
    room = 0.5 * np.ptp(means) if means else 0
    bounds = [bound for mean in means for bound in (mean - room, mean + room)]
    axes.set_title("mean over seeds of means over folds, with its 95 % confidence interval")
    axes.set_ylabel(f"{name} of the classes that select the epoch")
    _format_axes(axes, [epoch for epoch, _, _ in points], bounds)
    legend = axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def save_costs(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws Recall @ 1 over bytes per image, a curve for each precision, into an SVG.

    Args:
        path: the SVG to write.
        rows: ways to keep embeddings: `precision`, `dimensions`, `bytes` and metrics.
        title: what stands above.
    """
    figure = _new_figure(6, 4)
    axes = figure.add_subplot()
    for precision in dict.fromkeys(row["precision"] for row in rows):
        points = sorted(
            (row["bytes"], mean_over_sets(row, "Recall @ 1")) for row in rows if row["precision"] == precision
        )
        axes.plot(*zip(*points), marker="o", ms=3, label=precision)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bytes per image")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


# Trials of a study


@dataclass(frozen=True)
class TrialPoint:
    """A trial that ended.

    Attributes:
        number: its number.
        value: its score; NaN where it failed.
        error: standard error of the score; 0 where it isn't known.
        state: complete, pruned or failed.
        values: the values that it tried, by name.
    """

    number: int
    value: float
    error: float
    state: str
    values: Mapping[str, float | str]


def _complete(points: Sequence[TrialPoint]) -> list[TrialPoint]:
    return [point for point in points if point.state == "complete"]


def _limit(axes: Axes, points: Sequence[TrialPoint]) -> str:
    """Gives the axis of scores room around those of complete trials, and says how many of these are too far off."""
    values = sorted(point.value for point in _complete(points) if math.isfinite(point.value))
    if values:
        worst, best = np.quantile(values, [0.1, 0.9]) if len(values) >= 10 else (values[0], values[-1])
        span = max(best - worst, SMALLEST_RANGE * max(map(abs, values)) or 1)
        axes.set_ylim(max(values[0], worst - span) - 0.1 * span, min(values[-1], best + span) + 0.1 * span)
    bottom, top = axes.get_ylim()
    num_outside = sum(not bottom <= value <= top for value in values)
    return f"; {num_outside} far off, not shown" if num_outside else ""


def save_history(path: Path, points: Sequence[TrialPoint], name: str, lower_is_better: bool) -> None:
    """Draws the scores of trials in their order, with the best one so far, into an SVG.

    Args:
        path: the SVG to write.
        points: the trials.
        name: the score.
        lower_is_better: whether the best score is the lowest.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _new_figure(8, 4.5)
    axes = figure.add_subplot()
    complete, pruned = _complete(points), [point for point in points if point.state == "pruned"]
    numbers, values = [point.number for point in complete], [point.value for point in complete]
    best = (np.minimum if lower_is_better else np.maximum).accumulate(np.array(values, dtype=float))
    axes.vlines(numbers, [p.value - p.error for p in complete], [p.value + p.error for p in complete], "C0", alpha=0.25)
    axes.plot(numbers, values, "o", ms=5, label="complete")
    far_off = _limit(axes, points)
    if pruned:
        last = np.clip([point.value for point in pruned], *axes.get_ylim())
        label = "pruned, with its last score or at the edge"
        axes.plot([point.number for point in pruned], last, "v", ms=4, color="0.6", clip_on=False, label=label)
    failed = [point.number for point in points if point.state == "failed"]
    if failed:
        bottom = axes.get_ylim()[1 if lower_is_better else 0]
        axes.plot(failed, [bottom] * len(failed), "x", color="C3", clip_on=False, label="failed")
    if complete:
        ends = [*numbers, points[-1].number]
        axes.step(ends, [*best, best[-1]], where="post", color="C1", label="best so far")
    axes.set(
        xlabel="trial",
        title="scores of the trials"
        + (", ± standard error over folds" if any(point.error for point in points) else "")
        + far_off,
    )
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    _save(figure, path)


def save_slices(
    path: Path,
    points: Sequence[TrialPoint],
    names: Sequence[str],
    logarithmic: Sequence[str],
    score: str,
    lower_is_better: bool,
) -> None:
    """Draws the trials' scores over each of the values that they tried, later ones darker, into an SVG.

    Args:
        path: the SVG to write.
        points: the trials.
        names: the values' names, a panel each.
        logarithmic: those of them whose axis is logarithmic.
        score: the score.
        lower_is_better: whether the best score is the lowest.
    """
    points = _complete(points)
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = _new_figure(4.2 * columns + 0.8, 3.4 * rows + 0.4)
    best = (min if lower_is_better else max)(points, key=lambda point: point.value) if points else None
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, number)
        tried = [point.values[name] for point in points]
        colors = [point.number for point in points]
        is_text = any(isinstance(value, str) for value in tried)
        ticks = sorted({str(value) for value in tried}) if is_text else []
        places = [ticks.index(str(value)) if is_text else float(value) for value in tried]
        axes.scatter(
            places,
            [p.value for p in points],
            c=colors,
            cmap="Blues",
            vmin=-max(colors, default=0) / 2 - 1,
            s=24,
            edgecolors="0.4",
            linewidths=0.4,
        )
        if best is not None:
            place = places[points.index(best)]
            axes.scatter([place], [best.value], s=110, facecolors="none", edgecolors="C1", linewidths=1.8)
        if is_text:
            axes.set_xticks(range(len(ticks)), [tick if len(tick) <= 20 else f"{tick[:19]}…" for tick in ticks])
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif name in logarithmic:
            axes.set_xscale("log")
        axes.set_xlabel(name, parse_math=False)
        axes.grid(alpha=0.3)
        far_off = _limit(axes, points)
        if number % columns == 1 or columns == 1:
            axes.set_ylabel(textwrap.fill(score, 32), parse_math=False)
    title = f"each trial by what it tried, later ones darker; a ring marks the best{far_off}"
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def save_importances(path: Path, importances: Mapping[str, float], score: str) -> None:
    """Draws the share of each value in the variance of the trials' scores as bars, the largest on top, into an SVG.

    Args:
        path: the SVG to write.
        importances: the shares by name.
        score: the score.
    """
    ordered = sorted(importances.items(), key=lambda entry: entry[1])
    figure = _new_figure(7, 1.2 + 0.4 * len(ordered))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(ordered)), [share for _, share in ordered])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    axes.set_xlim(0, 1.1 * max(importances.values()))
    axes.set_title(f"share of the variance of {score}", fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    _save(figure, path)


# Embeddings in the plane


@by_first_rank
def save_scatter(
    path: Path, points: np.ndarray, labels: np.ndarray, title: str, class_names: Sequence[str] = ()
) -> None:
    """Draws points `(N, 2)`, colored by their labels `(N,)`, into a PNG.

    Args:
        path: the PNG to write.
        points: `(N, 2)`.
        labels: `(N,)` integers.
        title: the title.
        class_names: the names that labels index; where there are few classes, each name stands at its points.
    """
    from matplotlib.patheffects import withStroke

    classes, ranks = np.unique(labels, return_inverse=True)
    is_few = len(classes) <= NAMED_CLASSES
    figure = _new_figure(8, 8)
    axes = figure.add_subplot()
    limits = {"cmap": "tab20", "vmin": 0, "vmax": 19} if is_few else {"cmap": "gist_rainbow"}
    axes.scatter(points[:, 0], points[:, 1], c=ranks, s=18 if is_few else 12, linewidths=0, **limits)
    axes.set(title=title, xticks=[], yticks=[])
    axes.margins(0.08)
    for rank, label in enumerate(classes if class_names and is_few else ()):
        x, y = np.quantile(points[ranks == rank], [0.5, 0.9], axis=0).diagonal()  # above most of its points
        name = display_name(class_names[label])
        name = name if len(name) <= 60 else f"{name[:57]}..."
        text = axes.annotate(
            textwrap.fill(name, 24 if name.isascii() else 14),
            (x, y),
            xytext=(0, 5),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            va="bottom",
            parse_math=False,
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    _save(figure, path, "png")


# Sample retrievals


@dataclass(frozen=True)
class Retrieval:
    """A query and its nearest neighbors, ready to draw: images are `(H, W, 3)` uint8 arrays.

    Whether a neighbor is of the query's class is None where that is not known.
    """

    query: np.ndarray
    query_class: str
    neighbors: Sequence[np.ndarray]
    neighbor_classes: Sequence[str]
    correct: Sequence[bool | None]
    distances: Sequence[float]


def choose_retrievals(space: EmbeddingSpace, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """A few queries that have a positive, the same at every call with the same seed, and their nearest neighbors."""
    candidates = np.flatnonzero(space.has_positive)
    count = min(QUERIES_SHOWN, len(candidates))
    chosen = np.sort(np.random.default_rng(seed).choice(candidates, count, replace=False))
    yield from zip(chosen.tolist(), space.neighbors(chosen, NEIGHBORS_SHOWN))


@by_first_rank
def draw_retrievals(
    path: Path, space: EmbeddingSpace, images: RetrievalSet[ImageSet], seed: int, exif_orientation: bool = False
) -> None:
    """Draws a few queries, the same at every call with the same seed, with their nearest neighbors into a PNG.

    Args:
        path: the PNG to write.
        space: the embeddings of the images.
        images: the images in the same order.
        seed: seed of the choice among the queries that have a positive.
        exif_orientation: whether to turn images as their EXIF data say.
    """
    gallery, class_names = images.gallery or images.query, images.query.class_names[0]
    retrievals = []
    for query_idx, neighbor_idx in choose_retrievals(space, seed):
        label, neighbor_labels = space.query_labels[query_idx], space.gallery_labels[neighbor_idx]
        neighbors = space.gallery[torch.from_numpy(neighbor_idx)].double()  # (neighbors, D)
        distances = torch.linalg.norm(neighbors - space.query[query_idx].double(), dim=1)  # (neighbors,)
        retrievals.append(
            Retrieval(
                query=_load_pixels(images.query.paths[query_idx], exif_orientation),
                query_class=class_names[label],
                neighbors=[_load_pixels(gallery.paths[i], exif_orientation) for i in neighbor_idx],
                neighbor_classes=[class_names[neighbor_label] for neighbor_label in neighbor_labels],
                correct=(neighbor_labels == label).tolist(),
                distances=distances.tolist(),
            )
        )
    save_recoveries(path, retrievals)


@by_first_rank
def draw_found(
    path: Path,
    queries: Sequence[str],
    found: Sequence[Sequence[tuple[str, float, str | None]]],
    labels: Sequence[str | None],
    exif_orientation: bool = False,
) -> None:
    """Draws the first few queries with what was found for them into a PNG.

    Args:
        path: the PNG to write.
        queries: their files.
        found: for each query paths, distances and labels, where there are any, the nearest first.
        labels: the queries' labels, where they are known.
        exif_orientation: whether to turn images as their EXIF data say.
    """
    retrievals = []
    for query, neighbors, label in list(zip(queries, found, labels))[:QUERIES_SHOWN]:
        shown = neighbors[:FOUND_SHOWN]
        retrievals.append(
            Retrieval(
                query=_load_pixels(query, exif_orientation),
                query_class=label or Path(query).name,
                neighbors=[_load_pixels(file, exif_orientation) for file, _, _ in shown],
                neighbor_classes=[Path(file).name if name is None else name for file, _, name in shown],
                correct=[None if label is None or name is None else name == label for _, _, name in shown],
                distances=[distance for _, distance, _ in shown],
            )
        )
    save_recoveries(path, retrievals)


def _load_pixels(path: str, exif_orientation: bool) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8."""
    return load_image(path, exif_orientation).permute(1, 2, 0).numpy()


def save_recoveries(path: Path, retrievals: Sequence[Retrieval]) -> None:
    """Draws each query (framed red) beside its nearest neighbors into a PNG, whose frames say of which class they are.

    They are green for the right class, gray for a wrong one, blue where that is not known.
    """
    from PIL import Image, ImageDraw, ImageOps

    side, frame, gap, header = 128, 5, 10, 34  # px
    cell = side + 2 * frame
    captions = [[_caption(name, cell) for name in (one.query_class, *one.neighbor_classes)] for one in retrievals]
    num_lines = max(len(lines) for row in captions for lines, _ in row)
    caption, below = 16 * num_lines + 4, 22  # px above and below a picture
    columns = max(*map(len, captions), 5)  # for the title
    is_known = any(is_correct is not None for one in retrievals for is_correct in one.correct)
    size = columns * (cell + gap) + gap, header + len(retrievals) * (cell + caption + below + gap)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    meaning = " (green: right class, gray: wrong)" if is_known else ""
    title = f"query (red) and its nearest neighbors{meaning} with their distances"
    draw.text((gap, 8), title, "black", _pil_font(_default_font(), 14))
    for row, retrieval in enumerate(retrievals):
        images = [retrieval.query, *retrieval.neighbors]
        colors = ["#d62728", *(FRAMES[is_correct] for is_correct in retrieval.correct)]
        notes = ["query", *(f"{distance:#.3g}".rstrip(".") for distance in retrieval.distances)]
        for column, (image, (lines, font), color, note) in enumerate(zip(images, captions[row], colors, notes)):
            x, y = gap + column * (cell + gap), header + row * (cell + caption + below + gap)
            for position, line in enumerate(reversed(lines)):  # the last one right above the picture
                _write(draw, line, font, x + cell // 2, y + caption - 18 - 16 * position)
            _write(draw, note, _default_font(), x + cell // 2, y + caption + cell + 3)
            thumbnail = ImageOps.pad(Image.fromarray(image), (side, side), color="white")
            canvas.paste(ImageOps.expand(thumbnail, frame, color), (x, y + caption))
    with atomic_write(path) as beside:
        canvas.save(beside, format="png")


@dataclass(frozen=True)
class SharedSimilarity:
    """A query and its nearest neighbors, with where their similarities come from.

    Attributes:
        query: `(H, W, 3)` uint8, as the network sees it.
        query_class: its class.
        neighbors: K such images.
        neighbor_classes: their classes.
        similarities: `(K,)`.
        query_maps: `(K, h, w)` what each position of the query adds to each similarity.
        neighbor_maps: `(K, h, w)` what each position of the neighbor adds.
    """

    query: np.ndarray
    query_class: str
    neighbors: Sequence[np.ndarray]
    neighbor_classes: Sequence[str]
    similarities: np.ndarray
    query_maps: np.ndarray
    neighbor_maps: np.ndarray


def save_attention(path: Path, retrievals: Sequence[SharedSimilarity], title: str) -> None:
    """Draws each query above each of its neighbors, red where their similarity comes from, into a PNG.

    All positions of a query and of its neighbors have one scale: the largest addition is the reddest.
    """
    from PIL import Image, ImageDraw

    side, gap, header = 128, 10, 34  # px
    captions = [[_caption(name, side) for name in (one.query_class, *one.neighbor_classes)] for one in retrievals]
    below = 16 * (max(len(lines) for row in captions for lines, _ in row) + 1) + 24
    block, columns = 2 * side + 4 + below, max(map(len, captions))
    canvas = Image.new("RGB", (columns * (side + gap) + gap, header + len(retrievals) * block), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 8), title, "black", _pil_font(_default_font(), 14))
    for row, one in enumerate(retrievals):
        largest = float(max(one.query_maps.max(), one.neighbor_maps.max(), 1e-12))
        pairs: list[tuple[Image.Image, Image.Image | None]] = [(_fit(one.query, side), None)]
        for query_map, neighbor, neighbor_map in zip(one.query_maps, one.neighbors, one.neighbor_maps):
            query_part, part = query_map / largest, neighbor_map / largest
            pairs.append((_redden(one.query, query_part, side), _redden(neighbor, part, side)))
        notes = ["query", *(f"{similarity:.2f}" for similarity in one.similarities)]
        for column, ((upper, lower), (lines, font)) in enumerate(zip(pairs, captions[row])):
            x, y = gap + column * (side + gap), header + row * block
            canvas.paste(upper, (x, y))
            if lower is not None:
                canvas.paste(lower, (x, y + side + 4))
            text = y + side + 5 + (0 if lower is None else side + 4)
            for position, (line, of_line) in enumerate([*((line, font) for line in lines), (notes[column], None)]):
                _write(draw, line, of_line or _default_font(), x + side // 2, text + 16 * position)
    with atomic_write(path) as beside:
        canvas.save(beside, format="png")


def _fit(image: np.ndarray, side: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)


def _redden(image: np.ndarray, shares: np.ndarray, side: int) -> Image.Image:
    """An image `(H, W, 3)` in gray, with red where the shares `(h, w)`, up to 1, are high."""
    from PIL import Image

    small = Image.fromarray(shares.astype(np.float32))
    smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    strength = 0.85 * smooth.clip(0, 1)[..., None] ** 0.8  # (side, side, 1)
    gray = 0.75 * np.asarray(_fit(image, side).convert("L"), np.float32)[..., None] + 55
    red = np.array([226, 38, 20], np.float32) * (0.45 + 0.55 * gray / 255)
    return Image.fromarray(((1 - strength) * gray + strength * red).astype(np.uint8))


CAPTION_SIZE, CAPTION_LINES = 13, 3
FRAMES = {True: "#2ca02c", False: "#b0b0b0", None: "#1f77b4"}  # by whether the class is right


@cache
def _pil_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


def _write(draw: ImageDraw.ImageDraw, line: str, font: str, x: int, y: int) -> None:
    """Writes a line of a caption, centered at x, below y."""
    draw.text((x, y), line, "black", _pil_font(font, CAPTION_SIZE), anchor="ma")


def _caption(class_name: str, width: int) -> tuple[list[str], str]:
    """A class's name in a few lines of up to `width` px, and the font's file to write them with."""
    text, font = _choose_font(display_name(class_name)[:200])  # far more than fits
    measure = _pil_font(font, CAPTION_SIZE).getlength
    lines = [""]
    for word in text.split():
        for part in _cut(word, width, measure):
            joined = f"{lines[-1]} {part}".strip()
            if measure(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(part)
    if len(lines) > CAPTION_LINES:
        lines[CAPTION_LINES - 1] = _cut(lines[CAPTION_LINES - 1] + "…", width, measure, "…")[0]
    return lines[:CAPTION_LINES], font


def _cut(word: str, width: int, measure: Callable[[str], float], end: str = "") -> list[str]:
    """A word in pieces of up to `width` px, each with `end` behind it where it is cut."""
    pieces = []
    while measure(word) > width:
        length = max(1, next(length for length in range(len(word), -1, -1) if measure(word[:length] + end) <= width))
        pieces.append(word[:length] + end)
        word = word[length:]
    return [*pieces, word]
