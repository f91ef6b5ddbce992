"""Pages to look into: of a run, of a comparison, of search results and of pairs; each one is a self-contained file."""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import auxiliaries
import config
import evaluate
import plots
import records
import runs
from auxiliaries import UserError, atomic_write, by_first_rank, counted, notice
from transforms import load_image

if TYPE_CHECKING:
    from bokeh.model import Model
    from bokeh.plotting import figure as Figure
    from PIL import Image

    from datasets import ImageSet, RetrievalSet
    from evaluate import EmbeddingSpace
    from significance import Difference

TEMPLATES = Path(__file__).resolve().parent / "templates"
WEBP_QUALITY = 80  # of 100
MOST_BYTES = 5_000_000  # of pictures in a page of results or pairs
MOST_FOUND = 400  # neighbors of a query in a page
FEW_PICTURES = 300  # up to which they are shown larger
UNREADABLE = (  # stands for an image that is gone or damaged
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 64 64'%3E%3Cpath d='M20 20l24 24m0-24"
    "L20 44' stroke='%23888' stroke-width='2'/%3E%3C/svg%3E"
)


def check_libraries() -> None:
    """Makes sure that pages can be made.

    Raises:
        UserError: a library that they need can't be imported.
    """
    try:
        import bokeh.plotting  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError(f"a page needs {error.name}: pip install jinja2 bokeh") from None


@by_first_rank
def render(template: str, path: Path, plots: Mapping[str, Model] | None = None, **values: Any) -> None:
    """Writes one self-contained page.

    Args:
        template: the name of a file in templates/.
        path: the page.
        plots: Bokeh figures or layouts by name; the template shows one by `{{ plots.<name> }}`. Bokeh's script is in
            the page, and only where there are any.
        values: what else the template shows; text is escaped.

    Raises:
        UserError: the page can't be written, or a library that it needs can't be imported.
    """
    check_libraries()
    import jinja2
    from bokeh.embed import components
    from bokeh.resources import Resources
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    script, library = "", ""
    places: dict[str, str] = {}
    if plots:
        script, places = components(dict(plots))
        library = Resources(mode="inline", components=["bokeh"]).render_js()
    page = environment.get_template(template).render(
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        plots={name: Markup(place) for name, place in places.items()},
        plot_script=Markup(script),
        plot_library=Markup(library),
        **values,
    )
    with atomic_write(path) as beside:
        beside.write_text(page, encoding="utf-8", errors="backslashreplace")  # names may hold any bytes


def thumbnail(image: str | Path | Image.Image | np.ndarray | torch.Tensor, size: int, exif: bool = False) -> str:
    """A small version of an image as a `data:` URI.

    Args:
        image: a file, a PIL image, or uint8 pixels as `(H, W, 3)` array or `(3, H, W)` tensor. A cross stands for a
            file that can't be read.
        size: of its longer side, px; it is never made larger.
        exif: whether to turn a file's image as its EXIF data say.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        try:
            image = load_image(str(image), exif)
        except UserError:
            return UNREADABLE
    if isinstance(image, torch.Tensor):
        image = image.permute(1, 2, 0).cpu().numpy()
    small = Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()
    small = small.convert("RGB")
    small.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    small.save(file, "webp", quality=WEBP_QUALITY, method=3)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# Search results and pairs of images

FoundImage = tuple[str | Path, float, str | None]  # path, distance, and label, if it has one


def save_search_page(
    path: Path, title: str, results: Sequence[tuple[str | Path, Sequence[FoundImage]]], exif: bool = False
) -> None:
    """Writes a page of queries with what was found for each, the nearest first.

    It stays below `MOST_BYTES` of pictures, shows at most `MOST_FOUND` images for a query, and says what is left out.

    Args:
        path: the page.
        title: its title.
        results: for each query its path and what was found: paths, distances, and labels, where there are any.
        exif: whether to turn images as their EXIF data say.

    Raises:
        UserError: the page can't be written.
    """
    num_pictures = sum(1 + len(found) for _, found in results)
    size = 192 if num_pictures <= FEW_PICTURES else 128  # px
    queries: list[dict[str, Any]] = []
    num_bytes = 0
    for query, found in results:
        neighbors = [
            {
                **_shown_file(one, size, exif),
                "distance": format_distance(distance),
                **({} if label is None else {"name": label, "file": Path(one).name}),
            }
            for one, distance, label in found[:MOST_FOUND]
        ]
        of_query = _shown_file(query, 2 * size, exif)
        num_bytes += sum(len(one["image"]) for one in (of_query, *neighbors))
        if queries and num_bytes > MOST_BYTES:
            break
        queries.append({**of_query, "neighbors": neighbors})
    which = counted(len(queries), "query", "queries")
    if len(queries) < len(results):
        which = f"the first {len(queries)} of {len(results)} queries"
    longest = max((len(found) for _, found in results), default=0)
    most = f"{MOST_FOUND} of {longest} " if longest > MOST_FOUND else ""
    lead = f"The {most}nearest images of {which}, each with its distance."
    render("search.html", path, title=title, lead=lead, queries=queries)


def save_pairs_page(
    path: Path, title: str, intro: str, pairs: Sequence[tuple[str | Path, str | Path, str]], exif: bool = False
) -> None:
    """Writes a page of pairs of images, side by side.

    It stays below `MOST_BYTES` of pictures, and says how many pairs are left out.

    Args:
        path: the page.
        title: its title.
        intro: what the pairs are, in a sentence.
        pairs: the paths of both images, and a caption.
        exif: whether to turn images as their EXIF data say.

    Raises:
        UserError: the page can't be written.
    """
    size = 256 if len(pairs) <= FEW_PICTURES / 2 else 128  # px
    shown: list[dict[str, Any]] = []
    num_bytes = 0
    for one, other, caption in pairs:
        images = [_shown_file(file, size, exif) for file in (one, other)]
        num_bytes += sum(len(image["image"]) for image in images)
        if shown and num_bytes > MOST_BYTES:
            break
        shown.append({"images": images, "caption": caption})
    left_out = f"The first {len(shown)} of {len(pairs)} pairs are shown." if len(shown) < len(pairs) else ""
    render("pairs.html", path, title=title, intro=intro, left_out=left_out, pairs=shown)


def _shown_file(file: str | Path, size: int, exif: bool) -> dict[str, Any]:
    """What templates show of an image file."""
    place = Path(file)
    folder = "/".join(part.strip("/") for part in place.parent.parts[-2:])
    return {"image": thumbnail(file, size, exif), "path": str(file), "name": place.name, "folder": folder, "file": ""}


# What an embedding space shows

NEAR = 10  # neighbors that are searched for
MIN_SEARCHED, MAX_SEARCHED = 200, 4000  # queries
MAX_PRODUCTS = 2 * 10**11  # multiplications of a search, some seconds on a few cores
MAX_SCORES = 2**24  # that are kept at once
MAP_CLASS = 40  # images of a class in the map, at least, if it has them


@dataclass(frozen=True)
class WorstQuery:
    """A query whose class is found late.

    Attributes:
        query: its position among the queries.
        wrong: the position in the gallery of the nearest item of another class.
        right: the same of its own class.
        rank: the rank of `right`, ties against it.
    """

    query: int
    wrong: int
    right: int
    rank: int


@dataclass(frozen=True)
class ConfusedClasses:
    """Two classes whose images find each other first.

    Attributes:
        classes: their labels.
        counts: the queries of each class whose nearest item is of the other one.
        sizes: the queries of each class.
        examples: positions of such queries, the nearest to what they found first.
    """

    classes: tuple[int, int]
    counts: tuple[int, int]
    sizes: tuple[int, int]
    examples: list[int]


@dataclass(frozen=True)
class Searched:
    """What some of a space's queries find.

    Attributes:
        space: all points.
        queries: `(C,)` the positions of these queries: all, or some drawn at random.
        found: `(C, k)` the positions of their nearest items in the gallery, nearest first.
    """

    space: EmbeddingSpace
    queries: np.ndarray
    found: np.ndarray


def search_some(space: EmbeddingSpace, seed: int) -> Searched:
    """Searches with all queries, or with as many, drawn at random, as take about `MAX_PRODUCTS` multiplications."""
    affordable = MAX_PRODUCTS // (len(space.gallery) * space.query.shape[1])
    count = min(len(space.query), MAX_SEARCHED, max(MIN_SEARCHED, affordable))
    queries = np.sort(np.random.default_rng(seed).permutation(len(space.query))[:count])
    return Searched(space, queries, nearest_items(space, queries, NEAR))


def nearest_items(space: EmbeddingSpace, queries: np.ndarray, k: int) -> np.ndarray:
    """The nearest gallery items of queries `(C,)`, without the queries themselves, by products in float32.

    Returns:
        `(C, k)` positions in the gallery, nearest first; fewer where the gallery hasn't as many.
    """
    wanted = min(k, len(space.gallery) - bool((space.query_in_gallery >= 0).any()))
    found = [scores.topk(wanted, dim=1).indices.cpu().numpy() for scores in _score(space, queries)]
    return np.concatenate([np.empty((0, wanted), np.int64), *found])


def _score(space: EmbeddingSpace, queries: np.ndarray) -> Iterator[torch.Tensor]:
    """For queries `(C,)`, some at a time, scores of all items `(rows, G)`: the higher, the nearer; -inf for itself."""
    center = (space.gallery * space.scale).mean(dim=0)  # (D,): without it, products would lose more
    gallery = space.gallery * space.scale - center  # (G, D)
    half_norms = gallery.square().sum(dim=1) / 2  # (G,)
    for rows in torch.from_numpy(queries).split(max(1, MAX_SCORES // len(gallery))) if len(queries) else ():
        scores = (space.query[rows] * space.scale - center) @ gallery.T - half_norms  # (rows, G)
        place = space.query_in_gallery[rows.numpy()]
        scores[np.flatnonzero(place >= 0), place[place >= 0]] = -torch.inf
        yield scores


def find_worst_queries(space: EmbeddingSpace, count: int) -> list[WorstQuery]:
    """The queries whose nearest item of their class has the highest rank, one of each class, the worst first."""
    ahead = np.where(space.has_positive, space.num_negatives_ahead, 0)  # (Q,)
    order = np.argsort(-ahead, kind="stable")
    order = order[ahead[order] > 0]
    _, first = np.unique(space.query_labels[order], return_index=True)
    chosen = order[np.sort(first)[:count]]  # (count,)
    all_scores = (row for scores in _score(space, chosen) for row in scores)  # (G,) each
    worst = []
    for query, scores in zip(chosen, all_scores):
        is_right = torch.from_numpy(space.gallery_labels == space.query_labels[query]).to(scores.device)  # (G,)
        wrong, right = (int(scores.masked_fill(hidden, -torch.inf).argmax()) for hidden in (is_right, ~is_right))
        worst.append(WorstQuery(int(query), wrong, right, 1 + int(ahead[query])))
    return worst


def find_confused_classes(searched: Searched, count: int) -> list[ConfusedClasses]:
    """The pairs of classes whose queries most often have an item of the other class as their nearest one."""
    space, nearest = searched.space, searched.found[:, 0]  # (C,)
    own, other = space.query_labels[searched.queries], space.gallery_labels[nearest]  # (C,) each
    has_positive = space.has_positive[searched.queries]
    sizes = Counter(own[has_positive].tolist())
    wrong = np.flatnonzero((own != other) & has_positive)
    counts = Counter(zip(own[wrong].tolist(), other[wrong].tolist()))
    totals: Counter[tuple[int, int]] = Counter()
    for (one, found), times in counts.items():
        totals[min(one, found), max(one, found)] += times
    distances = space.distances(*(torch.from_numpy(idx) for idx in (searched.queries[wrong], nearest[wrong])))
    by_distance = wrong[np.argsort(distances.cpu().numpy(), kind="stable")]
    confused = []
    for a, b in sorted(totals, key=lambda pair: (-totals[pair], pair))[:count]:
        of_pair = [i for i in by_distance if {int(own[i]), int(other[i])} == {a, b}]
        examples = [int(searched.queries[i]) for i in of_pair]
        both = (counts[a, b], counts[b, a]), (sizes[a], sizes[b])
        confused.append(ConfusedClasses((a, b), *both, examples))
    return confused


def count_occurrences(searched: Searched) -> np.ndarray:
    """`(G,)` how often each gallery item is among the nearest of a query."""
    return np.bincount(searched.found.ravel(), minlength=len(searched.space.gallery))


def skewness(values: np.ndarray) -> float:
    """The third standardized moment: of occurrences, how much hubs there are. Radovanović et al., JMLR 2010, eq. 1."""
    deviations = values - values.mean()
    spread = math.sqrt((deviations**2).mean())
    return float((deviations**3).mean() / spread**3) if spread else 0.0


def sample_distances(space: EmbeddingSpace, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of random queries to random items of their class, and of others to items of other classes, `(P,)`."""
    rng = np.random.default_rng(seed)
    candidates = np.flatnonzero(space.has_positive)
    queries = rng.choice(candidates, count if len(candidates) else 0)
    start, _, own = (columns.cpu().numpy()[queries] for columns in space.class_columns)
    columns = start + (rng.random(len(queries)) * space.num_positives[queries]).astype(np.int64)
    columns += (own >= 0) & (columns >= own)  # not the query itself
    positives = space.gallery_order.cpu().numpy()[columns]
    others, items = rng.integers(len(space.query), size=count), rng.integers(len(space.gallery), size=count)
    differ = space.query_labels[others] != space.gallery_labels[items]
    pairs = ((queries, positives), (others[differ], items[differ]))
    device = space.query.device
    same, other = (space.distances(*(torch.from_numpy(idx).to(device) for idx in pair)).cpu().numpy() for pair in pairs)
    return same, other


def compute_spectrum(points: torch.Tensor) -> tuple[np.ndarray, float]:
    """Shares of the variance of points `(N, D)` along their principal components, and the effective rank.

    The effective rank is exp of the shares' entropy. Roy and Vetterli, EUSIPCO 2007, of the covariance matrix.

    Returns:
        The shares, `(min(N, D),)`, largest first, and the rank; zeros where all points are the same.
    """
    variances = torch.linalg.svdvals(points.double() - points.double().mean(dim=0)).square().cpu().numpy()
    if not variances.sum() > 0:
        return np.zeros(len(variances)), 0.0
    shares = variances / variances.sum()
    positive = shares[shares > 0]
    return shares, float(np.exp(-(positive * np.log(positive)).sum()))


def choose_for_map(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of up to `count` images `(N,)` of random classes, of few classes enough that shapes can be seen."""
    rng = np.random.default_rng(seed)
    classes, inverse = np.unique(labels, return_inverse=True)
    most = max(MAP_CLASS, count // len(classes))  # images of a class
    rank = rng.permutation(len(classes))  # of each class
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(rank[inverse[shuffled]], kind="stable")]  # class by class
    ranks = rank[inverse[by_class]]
    position = np.arange(len(labels)) - np.searchsorted(ranks, ranks)  # inside its class
    return by_class[position < most][:count]


def flatten(points: np.ndarray, max_iter: int = 500) -> np.ndarray:
    """Points `(N, D)` in the plane, `(N, 2)`: by t-SNE, or, where there are few or all are the same, by PCA.

    Args:
        points: of any scale.
        max_iter: iterations of t-SNE.
    """
    points = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    largest = float(np.abs(points).max(initial=0))
    # scikit-learn's t-SNE squares them in float32, and crashes where these are all 0
    points = (points / (largest or 1)).astype(np.float32)
    if len(points) < 10 or not largest:
        left, values, _ = np.linalg.svd(points, full_matrices=False)
        flat = (left * values)[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    from sklearn.manifold import TSNE

    start = "pca" if points.shape[1] > 1 else "random"
    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init=start, max_iter=max_iter, random_state=0).fit_transform(points)


# Charts

TOOLTIP = "font: 12px/1.5 system-ui, sans-serif"
COLORS = ("#3b7dd8", "#e0782f", "#2a9d74", "#c4558f", "#8a6fd6", "#a8922a", "#3aa3bd", "#d0564f")
GRAY = "#7d838e"  # can be read on white and on black


def new_chart(x_label: str, y_label: str, height: int = 260, **more: Any) -> Figure:
    """An empty chart as wide as its place, for light and dark pages, which shows values where the mouse is.

    Args:
        x_label, y_label: what the axes show.
        height: px.
        more: keywords of Bokeh's figure.
    """
    from bokeh.plotting import figure

    more = {"tools": "", "toolbar_location": None, **more}
    chart = figure(height=height, sizing_mode="stretch_width", x_axis_label=x_label, y_axis_label=y_label, **more)
    chart.background_fill_color = chart.border_fill_color = chart.outline_line_color = None
    chart.min_border_left, chart.min_border_right = 56, 8
    font = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
    for axis in chart.axis:
        axis.axis_label_text_color = axis.major_label_text_color = GRAY
        axis.axis_label_text_font = axis.major_label_text_font = font
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "12px"
        axis.major_label_text_font_size = "12px"
        axis.axis_line_color = axis.major_tick_line_color = GRAY
        axis.axis_line_alpha = axis.major_tick_line_alpha = 0.5
        axis.minor_tick_line_color = None
    chart.grid.grid_line_color, chart.grid.grid_line_alpha = GRAY, 0.18
    chart.xgrid.grid_line_color = None
    return chart


def add_curve(chart: Figure, columns: Mapping[str, Any], color: str, tooltip: str) -> None:
    """Draws a curve through points that say what they are; NaN makes a gap.

    Args:
        chart: where.
        columns: `x`, `y`, and what else the tooltip shows.
        color: of the curve.
        tooltip: HTML with `@<column>{<format>}` for values.
    """
    from bokeh.models import ColumnDataSource, HoverTool

    source = ColumnDataSource(dict(columns))
    chart.line("x", "y", source=source, color=color, line_width=2)
    points = chart.scatter("x", "y", source=source, color=color, size=6 if len(columns["x"]) < 40 else 3)
    chart.add_tools(HoverTool(renderers=[points], tooltips=f"<div style='{TOOLTIP}'>{tooltip}</div>"))


# The page of a run

RUN_PAGE = "report.html"  # in the run folder
QUERIES, NEIGHBORS, WORST, CONFUSED, CLASSES, HUBS = 6, 7, 12, 6, 8, 16  # shown, at most
TILE, MAP_TILE = 128, 72  # px of pictures
MAX_PICTURE = 2800  # px of the longer side of the run's own pictures
MAP_POINTS, MAP_BYTES = 1000, 2_200_000  # of the map's pictures
MAX_PAIRS, MAX_POINTS = 20_000, 5_000  # of which distances and the spectrum are
COMMAND_WIDTH = 80  # characters, after which a line ends before the next flag
KINDS = {"val": "validation", "test": "test", "train": "training"}


@dataclass(frozen=True)
class Section:
    """A part of the page; what `content` is depends on the part, see templates/run.html."""

    id: str
    title: str
    text: str
    content: Any


class Pictured:
    """A space with pictures of its images.

    Args:
        space: all points.
        images: the images in the same order.
        exif: whether to turn them as their EXIF data say.
    """

    def __init__(self, space: EmbeddingSpace, images: RetrievalSet[ImageSet], exif: bool):
        self.space, self.exif = space, exif
        self.query, self.gallery = images.query, images.gallery or images.query
        self._known: dict[str, str] = {}

    def class_name(self, label: int) -> str:
        return plots.display_name(self.query.class_names[0][label])

    def tile(self, images: ImageSet, idx: int, text: str = "", mark: str = "") -> dict[str, str]:
        """The arguments of `parts.tile` for an image."""
        path = images.paths[idx]
        if path not in self._known:
            self._known[path] = thumbnail(path, TILE, self.exif)
        name = self.class_name(images.labels[idx, 0])
        return {"image": self._known[path], "name": name, "text": text, "mark": mark, "title": str(path)}

    def found(self, query: int, item: int, text: str = "") -> dict[str, str]:
        """The same for an item that a query found, with its distance, marked as right or wrong."""
        pair = (torch.tensor([idx], device=self.space.query.device) for idx in (query, item))
        is_right = self.space.query_labels[query] == self.space.gallery_labels[item]
        distance = format_distance(float(self.space.distances(*pair)))
        return self.tile(self.gallery, item, f"{text}{distance}", "good" if is_right else "bad")


def format_distance(distance: float) -> str:
    """Three digits."""
    return f"{distance:#.3g}".rstrip(".")


@by_first_rank
def save_run_page(run: runs.Run, spaces: Sequence[EmbeddingSpace], summary: Mapping[str, Any]) -> None:
    """Writes the page of a finished training run, report.html.

    What takes long is done for a sample: pairs, a search with some thousand queries, a map of a thousand images.

    Args:
        run: the run.
        spaces: the selected network's embeddings of the test sets, or, without them, of the validation sets. Pictures
            are of the first one.
        summary: how it ended, from `records.build_summary`.

    Raises:
        UserError: it can't be written, or a library that it needs can't be imported.
    """
    check_libraries()
    opt, sets = run.opt, run.splits.test or run.splits.val
    pictured = Pictured(spaces[0], sets[0], opt.exif_orientation)
    searched = search_some(spaces[0], opt.seed)
    charts: dict[str, Model] = {}
    sections = [
        _results(summary, opt.testing_method),
        *_curves(run, summary["selected"]["epoch"], charts),
        _map(pictured, opt.seed, charts),
        _retrievals(pictured, opt.seed),
        _attention(run),
        _worst(pictured),
        _confused(pictured, searched),
        _classes(pictured, opt.testing_method),
        _hubs(pictured, searched),
        _geometry(spaces[0], opt.seed, charts),
        _making(run),
    ]
    render(
        "run.html",
        run.folder / RUN_PAGE,
        charts,
        title=run.folder.name if opt.fold is None else f"{run.folder.parent.name}, fold {opt.fold}",
        lead=_in_words(run, summary),
        figures=_figures(summary),
        sections={section.id: section for section in sections if section.content},
    )


def save_folds_page(
    opt: argparse.Namespace, folder: Path, rows: Sequence[records.Row], summaries: Mapping[Path, Mapping[str, Any]]
) -> None:
    """Writes the page of a run of several folds, which leads to theirs; where it can't be written, a notice says so.

    Args:
        opt: the resolved flags.
        folder: the run folder.
        rows: the results over folds: `Network`, `Split`, `Metric`, `Mean`, and half an interval as `CI 95 %`.
        summaries: how each fold ended, by its folder.
    """
    if not opt.report:
        return
    metrics = runs.test_metrics(next(iter(summaries.values())))
    columns = records.fit_columns(metrics, opt.eval_metric_for_best_epoch, 60)
    means: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        half = row.get("CI 95 %", math.nan)
        text = f"{row['Mean']:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")
        means.setdefault((row["Network"], KINDS[row["Split"]]), {})[row["Metric"]] = text
    folds = []
    for path, summary in summaries.items():
        values = runs.test_metrics(summary)
        cells = [records.format_cell(records.mean_over_sets(values, name), name).strip() for name in columns]
        page = f"{path.name}/{RUN_PAGE}" if (path / RUN_PAGE).exists() else ""
        folds.append({"name": path.name, "page": page, "epoch": summary["selected"]["epoch"], "cells": cells})
    sampling = f" with {records.join_names(opt.sampling)} sampling" if opt.sampling else ""
    shown: dict[str, Any] = {
        "title": folder.name,
        "lead": f"{opt.arch}, trained with {records.join_names(opt.loss)}{sampling} on {opt.dataset}: {len(folds)} "
        f"folds of {opt.split_scheme}.",
        "columns": [*map(records.short_name, columns)],
        "means": [[*key, *(cells.get(name, "") for name in columns)] for key, cells in means.items()],
        "folds": folds,
    }
    try:
        render("folds.html", folder / RUN_PAGE, **shown)
    except UserError as error:
        notice(f"there is no page of these folds: {error}")
    else:
        print(f"\npage to look into: {folder / RUN_PAGE}")


def _in_words(run: runs.Run, summary: Mapping[str, Any]) -> str:
    """What was trained, and on what."""
    opt, net, splits = run.opt, run.method.net, run.splits
    million = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    weights = "random" if opt.not_pretrained else f"those of {Path(opt.weights).name}" if opt.weights else "pretrained"
    network = f"{opt.arch} ({million:.1f} million parameters, initial weights: {weights})"
    train, test = splits.train, (splits.test or splits.val)[0]
    tested = test.gallery or test.query
    is_unseen = not np.isin(tested.labels[:, 0], train.labels[:, 0]).any()
    classes = f"{tested.num_classes():,} {'classes that it has not seen' if is_unseen else 'classes'}"
    where = f"{len(tested):,} images of {classes}"
    if test.gallery is not None:
        where = f"{counted(len(test.query), 'query', 'queries')} in a gallery of {where}"
    embeds = f"{net.embed_dim}-dimensional embeddings of {opt.dataset}"
    epochs = summary["last"]["epoch"]
    if not epochs:
        return f"{network} as it is before training: {embeds}, evaluated by retrieval among {where}."
    sampling = f" with {records.join_names(opt.sampling)} sampling" if opt.sampling else ""
    trained = f"{epochs} epoch{'s' * (epochs > 1)} by {records.join_names(opt.loss)}{sampling}"
    images = f"{len(train):,} images of {train.num_classes():,} classes"
    return (
        f"{network} was trained for {trained} on {images}, and gives {embeds}. It is evaluated by retrieval among "
        f"{where}."
    )


def _figures(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The selected network's most important metrics, and how far training has brought them."""
    kind = "test" if "test" in summary["selected"] else "val"
    metrics, before = summary["selected"][kind], summary.get("untrained", {}).get(kind, {})
    wanted = dict.fromkeys([summary["metric"], "Recall @ 1", "MAP@R", "R-precision", "mAP", "NMI", "F1"])
    values = {name: records.mean_over_sets(metrics, name) for name in wanted}
    figures = []
    for name, value in [(name, value) for name, value in values.items() if not math.isnan(value)][:4]:
        gain = value - records.mean_over_sets(before, name) if summary["selected"]["epoch"] else math.nan
        note = "" if math.isnan(gain) else f"{gain:+.4f} by training"
        figures.append({"name": name, "value": records.format_cell(value, name).strip(), "note": note})
    return figures


def _results(summary: Mapping[str, Any], testing_method: str) -> Section:
    """Each network's metrics."""
    rows = records.summary_rows(summary)
    columns = records.fit_columns(next(iter(rows.values())), summary["metric"], 110)
    table = [
        [label, epoch, KINDS[kind], *(records.format_cell(records.mean_over_sets(one, name), name) for name in columns)]
        for (label, epoch, kind), one in rows.items()
    ]
    head = ["network", "epoch", "classes", *map(records.short_name, columns)]
    text = f"{summary['selection'][:1].upper()}{summary['selection'][1:]}."
    if testing_method == "WithSameParentLabel":
        text += " Each query searches in its parent class; the pictures below are of searches among all classes."
    return Section("results", "Results", text, {"head": head, "rows": table})


def _curves(run: runs.Run, selected: int, charts: dict[str, Model]) -> Iterator[Section]:
    """Training loss and metrics over epochs, one chart for each kind of metric."""
    train, rows = run.log.rows["train"], [row for row in run.log.rows["val"] if row["Epochs"] >= 0]
    if not train:
        return
    panels: dict[str, list[tuple[str, Sequence[records.Row], str]]] = {
        "training loss": [("training loss", train, "Train Loss")]
    }
    for name in records.metrics_of(rows[-1]):
        family = plots.metric_family(name)
        panels.setdefault(family, []).append((plots.label_in_family(name, family), rows, name))
    epochs, shown = [row["Epochs"] for row in (*train, *rows)], []
    for number, (family, curves) in enumerate(panels.items()):
        chart = charts[f"curve_{number}"] = _new_epoch_chart(min(epochs), max(epochs), selected)
        keys = []
        for (label, source, name), color in zip(curves, itertools.cycle(COLORS)):
            points = [row for row in source if name in row]
            columns = {"x": [row["Epochs"] for row in points], "y": [row[name] for row in points]}
            columns["name"] = [label] * len(points)
            add_curve(chart, columns, color, "@name, epoch @x{0}<br><b>@y{0.0000}</b>")
            keys.append((label, color))
        shown.append({"title": family, "chart": f"curve_{number}", "legend": keys if len(keys) > 1 else []})
    kind = "validation" if run.splits.val else "test"
    text = f"Metrics are of the {kind} classes. The dotted line is the selected epoch, {selected}."
    yield Section("curves", "Curves", text, shown)


def _new_epoch_chart(first: int, last: int, selected: int) -> Figure:
    """An empty chart over epochs, with the selected one as a dotted line."""
    from bokeh.models import BasicTicker, NumeralTickFormatter, Range1d
    from bokeh.models.annotations import Span

    room = max(0.3, 0.03 * (last - first))
    chart = new_chart("epoch", "", 230, x_range=Range1d(first - room, last + room))
    chart.xaxis.ticker = BasicTicker(min_interval=1)
    chart.xaxis.formatter = NumeralTickFormatter(format="0")
    chart.add_layout(Span(location=selected, dimension="height", line_color=GRAY, line_dash="dotted"))
    return chart


def _retrievals(pictured: Pictured, seed: int) -> Section:
    """Random queries with their nearest neighbors."""
    space = pictured.space
    candidates = np.flatnonzero(space.has_positive)
    chosen = np.sort(np.random.default_rng(seed).choice(candidates, min(QUERIES, len(candidates)), replace=False))
    rows = [
        [pictured.tile(pictured.query, query, "query"), *(pictured.found(query, item) for item in items)]
        for query, items in zip(chosen.tolist(), nearest_items(space, chosen, NEIGHBORS).tolist())
    ]
    text = "Random queries, on the left, and their nearest images with their distances; red ones are of another class."
    return Section("retrievals", "Sample retrievals", text, rows)


def _attention(run: runs.Run) -> Section:
    """The picture of where similarities come from, if it was asked for."""
    file, kind = run.folder / "attention.png", "validation" if run.splits.val else "test"
    text = f"Queries of {kind} classes above their nearest neighbors: the redder a place, the more it adds to their "
    text += "similarity, which stands below; a query and its neighbors have one scale."
    picture = thumbnail(file, MAX_PICTURE) if run.opt.attention and file.is_file() else ""
    return Section("attention", "Where similarities come from", text, picture)


def _worst(pictured: Pictured) -> Section:
    """The queries that find their class last."""
    rows = [
        [
            pictured.tile(pictured.query, one.query, "query"),
            pictured.found(one.query, one.wrong, "nearest wrong, "),
            pictured.found(one.query, one.right, f"rank {one.rank:,}, "),
        ]
        for one in find_worst_queries(pictured.space, WORST)
    ]
    text = (
        "The queries whose class comes last, one of each class. Beside each one: the nearest image of another class, "
        "and the nearest one of its own, with its rank. Wrong labels, if any, are often among them."
    )
    return Section("worst", "Worst queries", text, rows)


def _confused(pictured: Pictured, searched: Searched) -> Section:
    """The classes that are taken for each other."""
    nearest = dict(zip(searched.queries.tolist(), searched.found[:, 0].tolist()))
    pairs = []
    for one in find_confused_classes(searched, CONFUSED):
        a, b = map(pictured.class_name, one.classes)
        counts = [f"{count:,} of {size:,} {name}" for count, size, name in zip(one.counts, one.sizes, (a, b))]
        tiles = [
            tile
            for query in one.examples[:2]
            for tile in (pictured.tile(pictured.query, query, "query"), pictured.found(query, nearest[query]))
        ]
        pairs.append({"names": (a, b), "counts": counts, "tiles": tiles})
    text = (
        f"The pairs of classes whose images are most often nearest to each other, among {_share(searched)}; the "
        "numbers say how many queries of a class have an image of the other one as their nearest."
    )
    return Section("confused", "Confused classes", text, pairs)


def _share(searched: Searched) -> str:
    """How many queries were searched with, in words."""
    count, total = len(searched.queries), len(searched.space.query)
    every = f"{'all ' if total > 1 else ''}{counted(total, 'query', 'queries')}"
    return every if count == total else f"{count:,} of {total:,} queries, drawn at random"


def _classes(pictured: Pictured, testing_method: str) -> Section:
    """The classes that are found best and worst."""
    results = evaluate.query_results(pictured.space, testing_method)
    scored = np.flatnonzero(results["weight"] > 0)
    labels, inverse, sizes = np.unique(results["label"][scored], return_inverse=True, return_counts=True)
    recall, map_at_r = (
        np.bincount(inverse, results[name][scored].astype(float)) / sizes for name in ("correct_at_1", "ap_at_r")
    )
    order = np.lexsort((labels, recall, map_at_r))  # the worst first
    example = {label: int(scored[position]) for position, label in reversed([*enumerate(results["label"][scored])])}

    def rows(chosen: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                **pictured.tile(pictured.query, example[labels[i]]),
                "queries": f"{sizes[i]:,}",
                "recall": f"{recall[i]:.3f}",
                "map": f"{map_at_r[i]:.3f}",
                "width": round(100 * float(map_at_r[i]), 1),
            }
            for i in chosen
        ]

    half = min(CLASSES, max(1, len(order) // 2))
    content = [("Worst", rows(order[:half])), ("Best", rows(order[::-1][:half] if len(order) > 1 else order[:0]))]
    text = f"By MAP@R, the mean over the queries of each of {counted(len(labels), 'class', 'classes')}; bars show it."
    return Section("classes", "Worst and best classes", text, [one for one in content if one[1]])


def _hubs(pictured: Pictured, searched: Searched) -> Section:
    """The images that are near to too many."""
    occurrences = count_occurrences(searched)
    expected = searched.found.size / len(occurrences)
    chosen = [int(i) for i in np.argsort(-occurrences, kind="stable")[:HUBS] if occurrences[i] > expected]
    own = pictured.space.query_labels[searched.queries]  # (C,)
    tiles = []
    for item in chosen:
        finders = own[(searched.found == item).any(axis=1)]
        right = int((finders == pictured.space.gallery_labels[item]).sum())
        mark = "bad" if 2 * right < len(finders) else ""
        text = f"in {counted(len(finders), 'list')}, {right:,} of its class"
        tiles.append(pictured.tile(pictured.gallery, item, text, mark))
    text = (
        f"The images that are most often among the {searched.found.shape[1]} nearest of {_share(searched)}; on average "
        f"an image is in {expected:.1f} of these lists. Framed: most queries that find it are of other classes. The "
        f"skewness of these numbers is {skewness(occurrences):.2f}; without hubs it is near 0."
    )
    return Section("hubs", "Hub images", text, tiles)


def _geometry(space: EmbeddingSpace, seed: int, charts: dict[str, Model]) -> Section:
    """The distances of pairs, and the spectrum of the embedding."""
    content = []
    same, other = sample_distances(space, MAX_PAIRS, seed)
    if len(same) and len(other):
        charts["distances"] = _draw_distances({"same class": same, "other classes": other})
        nearer = np.searchsorted(np.sort(other), same, side="right")
        share = 1 - float(nearer.mean()) / len(other)
        note = (
            f"Of {len(same):,} random pairs of a class and {len(other):,} of two classes. A pair of a class is nearer "
            f"than one of two classes with a probability of {share:.3f}."
        )
        keys = list(zip(("same class", "other classes"), COLORS))
        content.append({"title": "Distances", "chart": "distances", "legend": keys, "note": note})
    points = space.points[torch.from_numpy(np.random.default_rng(seed).permutation(len(space.points))[:MAX_POINTS])]
    shares, rank = compute_spectrum(points)
    if rank:
        charts["spectrum"] = _draw_spectrum(shares)
        most = 1 + int(np.searchsorted(shares.cumsum(), 0.9))
        note = (
            f"{most} of {points.shape[1]} dimensions hold 90 % of the variance; the effective rank is {rank:.1f}. "
            "Where the spectrum falls steeply, the embedding uses few of its dimensions."
        )
        content.append({"title": "Spectrum of the embedding", "chart": "spectrum", "legend": [], "note": note})
    return Section("geometry", "Distances and dimensions", "", content)


def _draw_distances(distances: Mapping[str, np.ndarray]) -> Figure:
    from bokeh.models import ColumnDataSource, DataRange1d, HoverTool

    chart = new_chart("distance", "share of pairs, %", y_range=DataRange1d(start=0))
    every = np.concatenate([*distances.values()])
    low, high = every.min(), every.max()
    room = 0.0 if high - low > 1e-9 * high else high / 2 or 0.5  # they differ by rounding at most
    edges = np.linspace(low - room, high + room, 61)
    for (name, values), color in zip(distances.items(), COLORS):
        share = 100 * np.histogram(values, edges)[0] / len(values)
        columns: dict[str, Any] = {"left": edges[:-1], "right": edges[1:], "top": share, "name": [name] * len(share)}
        bars = chart.quad(
            left="left", right="right", top="top", bottom=0, source=ColumnDataSource(columns),
            fill_color=color, fill_alpha=0.45, line_color=None,
        )  # fmt: skip
        tooltip = f"<div style='{TOOLTIP}'>@name<br>@left{{0.000}} to @right{{0.000}}<br><b>@top{{0.00}} %</b></div>"
        chart.add_tools(HoverTool(renderers=[bars], tooltips=tooltip))
    return chart


def _draw_spectrum(shares: np.ndarray) -> Figure:
    kept = shares[shares > max(1e-7, 1e-6 * shares[0])]
    chart = new_chart("principal component", "share of variance, %", y_axis_type="log")
    columns = {"x": 1 + np.arange(len(kept)), "y": 100 * kept, "sum": 100 * kept.cumsum()}
    add_curve(chart, columns, COLORS[0], "component @x<br><b>@y{0.000} %</b><br>up to here @sum{0.0} %")
    return chart


def _map(pictured: Pictured, seed: int, charts: dict[str, Model]) -> Section:
    """Embeddings in the plane, with their images."""
    space = pictured.space
    chosen, images, num_bytes = choose_for_map(space.query_labels, MAP_POINTS, seed), [], 0
    for idx in chosen:
        images.append(thumbnail(pictured.query.paths[idx], MAP_TILE, pictured.exif))
        num_bytes += len(images[-1])
        if num_bytes > MAP_BYTES:
            break
    chosen = chosen[: len(images)]
    labels, nearest = space.query_labels[chosen], nearest_items(space, chosen, 1)
    is_right = space.gallery_labels[nearest[:, 0]] == labels if nearest.size else np.ones(len(chosen), bool)
    flat = flatten(space.query[torch.from_numpy(chosen)].cpu().numpy())  # (N, 2)
    classes, inverse = np.unique(labels, return_inverse=True)
    charts["map"] = _draw_map(
        {
            "x": flat[:, 0],
            "y": flat[:, 1],
            "image": images,
            "name": [pictured.class_name(label) for label in labels],
            "file": [Path(pictured.query.paths[idx]).name for idx in chosen],
            "color": [COLORS[i % len(COLORS)] for i in inverse],
            "marker": np.where(is_right, "circle", "x").tolist(),
        }
    )
    text = (
        f"{counted(len(chosen), 'image')} of {counted(len(classes), 'class', 'classes')}, laid out so that near ones "
        "stay near (t-SNE). One color stands for several classes. A cross: its nearest image is of another class."
    )
    return Section("map", "Map", text, {"chart": "map"})


def _draw_map(columns: Mapping[str, Any]) -> Figure:
    from bokeh.models import ColumnDataSource, HoverTool

    tools = {"tools": "pan,box_zoom,wheel_zoom,reset", "toolbar_location": "above", "active_drag": None}
    chart = new_chart("", "", 560, **tools)
    chart.toolbar.logo, chart.toolbar.autohide = None, True
    chart.axis.visible = chart.grid.visible = False
    chart.min_border_left = 0
    points = chart.scatter(
        "x", "y", source=ColumnDataSource(dict(columns)), marker="marker", size=8,
        fill_color="color", line_color="color", fill_alpha=0.75, line_width=1.5,
    )  # fmt: skip
    tooltip = (
        f"<div style='{TOOLTIP}; max-width: 180px; margin-bottom: 6px'><img src='@image' alt='' "
        "style='display: block; min-width: 72px; max-width: 112px; max-height: 112px; margin-bottom: 6px'>"
        "<b style='font-weight: 600'>@name</b><br>@file</div>"
    )
    chart.add_tools(HoverTool(renderers=[points], tooltips=tooltip, limit=3))
    return chart


def _making(run: runs.Run) -> Section:
    """Flags, environment, and how to make it again."""
    path = run.folder / "environment.json"
    environment = auxiliaries.load_json(path) if path.exists() else {}
    command = environment.pop("command", [])
    facts = {name: value for name, value in environment.items() if value is not None and name != "version"}
    values, main = config.configuration(run.opt), ["python", "main.py"]
    content = {
        "commands": [
            *([("this run", _in_lines(["python", *command]))] if command else []),
            ("the same run again, compared with this one", _in_lines(main, "--reproduce_results", run.folder)),
            ("its flags on another machine", _in_lines(main, "--config", run.folder / "config.yaml")),
            ("its network, evaluated anew", _in_lines(main, "--evaluate", run.folder)),
        ],
        "changes": _changes(run.folder),
        "environment": list(facts.items()),
        "flags": [(name, _plain(value)) for name, value in sorted(values.items())],
    }
    return Section("making", "How it was made", "", content)


def _in_lines(words: Sequence[str], *more: str | Path) -> str:
    """A command as a shell takes it, with flags on further lines where it is long."""
    lines = [""]
    for word in (*words, *map(str, more)):
        if word.startswith("--") and len(lines[-1]) > COMMAND_WIDTH:
            lines.append("   ")
        lines[-1] += f" {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return " \\\n".join(lines)


def _plain(value: Any) -> str:
    """A flag's value as text."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={entry}" for name, entry in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _changes(folder: Path) -> list[tuple[int, str]]:
    """The epochs after which the run went on with other flags, and these; not those that say where it was made."""
    rows = records.read_configurations(folder)
    flags = [config.with_todays_names(row["Configuration"]) for row in rows]
    where = config.build_parser().names_with(machine=True)
    changes = []
    for row, old, new in zip(rows[1:], flags, flags[1:]):
        changed = {name: value for name, value in new.items() if name not in where and value != old.get(name)}
        if changed:
            changes.append((row["Epochs"], runs.as_flags(changed)))
    return changes


# The page of a comparison

MOST_COMPARED = 8  # configurations whose classes are shown
SHOWN_CLASSES = 8  # that gain, and that lose
MOST_LISTED = 500  # runs
MOST_DOTS = 3000  # classes in a chart


@dataclass(frozen=True)
class ComparedRow:
    """A row of the table.

    Attributes:
        label: the configuration.
        cells: columns and their texts, the configuration first.
        best: the columns in which it has the best figure.
        difference: to the reference, with its interval; NaN where it can't be told.
        p: its p-value, as text.
        holds: whether the difference does.
        is_reference: whether it is the reference.
    """

    label: str
    cells: Sequence[tuple[str, str]]
    best: Collection[str]
    difference: Difference
    p: str
    holds: bool
    is_reference: bool


@dataclass(frozen=True)
class ClassDifferences:
    """How a configuration does class by class.

    Attributes:
        label: the configuration.
        names: of C classes.
        sizes: `(C,)` their numbers of queries.
        reference: `(C,)` the reference's figures.
        values: `(C,)` this configuration's.
    """

    label: str
    names: Sequence[str]
    sizes: Sequence[int]
    reference: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class ComparedRuns:
    """What the page of a comparison shows.

    Attributes:
        metric: the metric that is compared.
        split: whose classes' figures it shows: `test` or `validation`.
        lead: what is compared, in a sentence or two.
        table: its rows.
        about_table: what the figures are.
        title: what the sentences are about.
        sentences: which differences hold.
        bands: for each configuration its points: epoch, mean, half the width of the confidence interval (or NaN).
        classes: the classes of configurations other than the reference.
        classes_metric: the metric that these are of.
        no_classes: why there are none, by configuration.
        optimism: a sentence about selection optimism, if it is known.
        optimism_by_label: its mean by configuration, as text.
        further: flags that differ, too, by configuration.
        runs: configuration, seed, fold, figure, selection optimism and folder of each run.
    """

    metric: str
    split: str
    lead: str
    table: Sequence[ComparedRow]
    about_table: str
    title: str
    sentences: Sequence[str]
    bands: Mapping[str, Sequence[tuple[int, float, float]]]
    classes: Sequence[ClassDifferences]
    classes_metric: str
    no_classes: Mapping[str, str]
    optimism: str
    optimism_by_label: Mapping[str, str]
    further: Mapping[str, str]
    runs: Sequence[tuple[str, str, str, str, str, str]]


def save_comparison_page(path: Path, compared: ComparedRuns) -> None:
    """Writes the page of a comparison.

    Raises:
        UserError: it can't be written, or a library that it needs can't be imported.
    """
    check_libraries()
    charts: dict[str, Model] = {}
    colors = dict(zip([row.label for row in compared.table], itertools.cycle(COLORS)))
    if any(compared.bands.values()):
        charts["bands"] = _draw_bands(compared.bands, colors, compared.metric)
    classes = []
    for number, one in enumerate(compared.classes[:MOST_COMPARED]):
        charts[f"classes_{number}"] = _draw_classes(one, colors[one.label])
        classes.append({"label": one.label, "chart": f"classes_{number}", **_most_changed(one)})
    places = _place_intervals([row.difference for row in compared.table])
    render(
        "comparison.html",
        path,
        charts,
        title=f"Comparison by {compared.metric}".replace(" @ ", "\N{NO-BREAK SPACE}@\N{NO-BREAK SPACE}"),
        compared=compared,
        reference=next(row.label for row in compared.table if row.is_reference),
        bars={row.label: place for row, place in zip(compared.table, places)},
        colors=colors,
        classes=classes,
        num_more=max(0, len(compared.classes) - MOST_COMPARED),
        runs=compared.runs[:MOST_LISTED],
    )


def _place_intervals(differences: Sequence[Difference]) -> list[dict[str, float]]:
    """Where each difference, its interval and zero stand on a common axis from 0 to 100; nothing where it is NaN."""
    ends = [end for one in differences for end in (one.mean, one.low, one.high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.04 * (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low + room) / (high - low + 2 * room), 2)

    return [
        {name: place(value) for name, value in (("zero", 0.0), *vars(one).items()) if math.isfinite(value)}
        if math.isfinite(one.mean)
        else {}
        for one in differences
    ]


def _draw_bands(
    bands: Mapping[str, Sequence[tuple[int, float, float]]], colors: Mapping[str, str], metric: str
) -> Figure:
    """Mean curves with their confidence bands."""
    from bokeh.models import BasicTicker, NumeralTickFormatter, Range1d

    means = [mean for points in bands.values() for _, mean, _ in points]
    # The interval of only two runs is so wide that curves would look flat: it may be cut off.
    span = max(max(means) - min(means), plots.SMALLEST_RANGE * max(map(abs, means)) or 1)
    middle = (max(means) + min(means)) / 2
    y_range = Range1d(start=middle - 0.9 * span, end=middle + 0.9 * span)
    chart = new_chart("epoch", metric, 360, y_range=y_range)
    chart.xaxis.ticker = BasicTicker(min_interval=1)
    chart.xaxis.formatter = NumeralTickFormatter(format="0")
    for label, points in bands.items():
        if not points:
            continue
        epochs, mean, half = np.array(points, dtype=float).reshape(-1, 3).T
        if np.isfinite(half).all():
            chart.varea(epochs, mean - half, mean + half, color=colors[label], alpha=0.15)
        around = [f" \N{PLUS-MINUS SIGN} {one:.4f}" if math.isfinite(one) else "" for one in half]
        columns = {"x": epochs, "y": mean, "name": [label] * len(points), "around": around}
        add_curve(chart, columns, colors[label], "@name, epoch @x{0}<br><b>@y{0.0000}</b>@around")
    return chart


def _draw_classes(one: ClassDifferences, color: str) -> Figure:
    """Classes by the reference's figure and this configuration's; those above the diagonal gain."""
    from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d

    shown = np.sort(np.random.default_rng(0).permutation(len(one.names))[:MOST_DOTS])  # all, unless there are more
    reference, values, sizes = (np.array(column)[shown] for column in (one.reference, one.values, one.sizes))
    low, high = min(reference.min(), values.min()), max(reference.max(), values.max())
    room = 0.05 * (high - low) or 0.5
    bounds = low - room, high + room
    ranges = {name: Range1d(start=bounds[0], end=bounds[1]) for name in ("x_range", "y_range")}
    chart = new_chart("reference", "this one", 300, **ranges)
    for axis in chart.axis:
        axis.formatter = NumeralTickFormatter(format="0.00")
    chart.line(bounds, bounds, color=GRAY, line_dash="dotted", line_alpha=0.8)
    size = 4 + 8 * np.sqrt(sizes / max(one.sizes))
    columns: dict[str, Any] = {"x": reference, "y": values, "size": size, "queries": sizes.tolist()}
    columns["name"] = [plots.display_name(one.names[i]) for i in shown]
    columns["difference"] = [f"{gain:+.4f}" for gain in values - reference]
    source = ColumnDataSource(columns)
    points = chart.scatter("x", "y", source=source, size="size", color=color, alpha=0.6, line_color=None)
    tooltip = "@name (@queries queries)<br>@x{0.0000} \N{RIGHTWARDS ARROW} @y{0.0000}<br><b>@difference</b>"
    chart.add_tools(HoverTool(renderers=[points], tooltips=f"<div style='{TOOLTIP}'>{tooltip}</div>"))
    return chart


def _most_changed(one: ClassDifferences) -> dict[str, Any]:
    """The classes that gain and lose the most, and how many do."""
    gains = np.array(one.values) - np.array(one.reference)
    order = np.argsort(-gains, kind="stable").tolist()

    def rows(chosen: Iterable[int]) -> list[tuple[str, str, str, str]]:
        return [
            (plots.display_name(one.names[i]), f"{one.reference[i]:.2f}", f"{one.values[i]:.2f}", f"{gains[i]:+.2f}")
            for i in chosen
        ]

    winners, losers = [i for i in order if gains[i] > 0], [i for i in reversed(order) if gains[i] < 0]
    counts = (
        f"{len(winners)} of {len(gains)} classes gain, {len(losers)} lose, {len(gains) - len(winners) - len(losers)}"
    )
    drawn = f" The chart shows {MOST_DOTS:,} of them, chosen at random." if len(gains) > MOST_DOTS else ""
    return {
        "counts": f"{counts} stay as they are.{drawn}",
        "tables": [("gain most", rows(winners[:SHOWN_CLASSES])), ("lose most", rows(losers[:SHOWN_CLASSES]))],
    }
