"""Embeddings and metrics: `embed`, `EmbeddingSpace`, `METRICS`, `evaluate`.

A metric is a function `space -> float` or `(space, k) -> float` and its row in `METRICS`. NMI and F1 judge a k-means
clustering; retrieval metrics rank by Euclidean distance, exclude the query by its index, and count ties against the
network.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from auxiliaries import FlagParser, UserError, notice, number

if TYPE_CHECKING:
    from datasets import ImageLoader, RetrievalSet

QUERY_TILE, GALLERY_TILE = 512, 4096  # products of this shape stay in the cache


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of metrics, and of what is done with them while training."""
    # fmt: off
    add = parser.add_argument_group("metrics").add_argument
    add("--eval_metrics", nargs="+", default=list(LITERATURE), choices=METRICS, metavar="METRIC", compared=False,
        help=f"metrics that every evaluation computes: {', '.join(METRICS)}; Recall @ 1 is always among them")
    add("--k_vals", type=number(int, 1), nargs="+", metavar="K", compared=False,
        help="the k of Recall @ k; 1 is always among them (default: depends on the dataset)")
    add("--testing_method", choices=TESTING_METHODS, default=TESTING_METHODS[0],
        help="WithSameParentLabel: metrics inside each class of the next coarser label level, and their mean")
    add("--meta_testing_method", choices=("ConcatenateEmbeddings",), compared=False, needs="cross_validation",
        help="cross_validation: also evaluate the concatenated embeddings of the folds' best networks")

    add = parser.add_argument_group("selection").add_argument
    add("--eval_metric_for_best_epoch", default="Recall @ 1", metavar="METRIC", fixed=True,
        help="metric that selects the best epoch, such as Recall @ 4 or MAP@R; on the validation classes, if any")
    add("--save_interval", type=number(int, 1), default=1, help="epochs between evaluations")
    add("--patience", type=number(int, 1),
        help="stop when the selecting metric has not improved for this many epochs (default: never)")
    add("--check_untrained_accuracy", action="switch", compared=False,
        help="also evaluate before training, as epoch 0")
    # fmt: on


@torch.inference_mode()
def embed(net: nn.Module, loader: ImageLoader, device: torch.device, name: str = "") -> torch.Tensor:
    """Embeds a loader's images.

    Args:
        net: images `(B, 3, H, W)` uint8 to embeddings `(B, D)`; it is put into evaluation mode.
        loader: gives (images, labels, indices), in order.
        device: where the network is.
        name: the images' name, for the progress bar.

    Returns:
        `(N, D)` float32, on the device.
    """
    net.eval()
    batches = tqdm(loader, desc=f"embedding {name}".strip(), leave=False, disable=None)
    return torch.cat([net(images.to(device, non_blocking=True)).float() for images, _, _ in batches])


class EmbeddingSpace:
    """Queries and the gallery that they search; what metrics share is computed once, when first asked for.

    Args:
        query: `(Q, D)` embeddings.
        query_labels: `(Q,)` integers.
        gallery: `(G, D)` embeddings; without them the queries are the gallery, and no query finds itself.
        gallery_labels: `(G,)` integers.
        query_in_gallery: `(Q,)` the position of each query in the gallery, where the query does not find itself; -1 for
            a query that is not in the gallery. Without it none is.

    Attributes:
        num_positives: `(Q,)` the number of items that each query should find (R).
        has_positive: `(Q,)` bool, whether there are any; queries without don't count in retrieval metrics.

    Raises:
        UserError: an embedding is not finite.
    """

    def __init__(
        self,
        query: torch.Tensor | np.ndarray,
        query_labels: np.ndarray,
        gallery: torch.Tensor | np.ndarray | None = None,
        gallery_labels: np.ndarray | None = None,
        query_in_gallery: np.ndarray | None = None,
    ):
        self.query = torch.as_tensor(query).float()  # (Q, D)
        self.query_labels = np.asarray(query_labels)  # (Q,)
        self.gallery = self.query if gallery is None else torch.as_tensor(gallery).float()  # (G, D)
        self.gallery_labels = self.query_labels if gallery_labels is None else np.asarray(gallery_labels)  # (G,)
        if query_in_gallery is None:
            query_in_gallery = np.arange(len(self.query)) if gallery is None else np.full(len(self.query), -1)
        self.query_in_gallery = np.asarray(query_in_gallery)  # (Q,)
        if not all(points.square().sum(dim=1).isfinite().all() for points in (self.query, self.gallery)):
            raise UserError("the network's embeddings are not finite: lower --lr, or check the weights it started from")
        classes, counts = np.unique(self.gallery_labels, return_counts=True)
        size = dict(zip(classes.tolist(), counts.tolist()))
        self.num_positives = np.array([size.get(label, 0) for label in self.query_labels.tolist()], np.int64)  # (Q,)
        self.num_positives -= (self.num_positives > 0) & (self.query_in_gallery >= 0)
        self.has_positive = self.num_positives > 0  # (Q,)

    @cached_property
    def num_negatives_ahead(self) -> np.ndarray:
        """For each query the number of items of other classes at least as near as its nearest positive, `(Q,)` int64.

        The query finds a positive among its k nearest, ties counted against it, when this is below k.
        """
        ahead = np.empty(len(self.query), np.int64)
        for queries, counts in self._count_negatives(nearest_only=True):
            ahead[queries] = counts[:, 0].cpu().numpy()
        return ahead

    @cached_property
    def precisions(self) -> dict[str, np.ndarray]:
        """For each query `(Q,)` its R-precision, AP@R (`map_at_r`) and average precision (`map`), ties against it.

        R is the number of its positives. The j-th nearest of them has rank j + (negatives at least as near).
        """
        results = {name: np.zeros(len(self.query)) for name in ("r_precision", "map_at_r", "map")}
        num_positives = torch.from_numpy(self.num_positives)
        for queries, counts in self._count_negatives(nearest_only=False):
            found = torch.arange(1, counts.shape[1] + 1)  # (M,) the j of the j-th nearest positive
            r = num_positives[queries][:, None]  # (rows, 1)
            rank = found + counts.cpu()  # (rows, M)
            precision = (found / rank.double()).masked_fill_(found > r, 0)  # (rows, M)
            within_r = (rank <= r) & (found <= r)  # (rows, M)
            for name, total in (
                ("r_precision", within_r.sum(dim=1)),
                ("map_at_r", (precision * within_r).sum(dim=1)),
                ("map", precision.sum(dim=1)),
            ):
                results[name][queries] = (total.double() / r[:, 0].clamp(min=1)).numpy()
        return results

    def _count_negatives(self, nearest_only: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Counts, for positives of each query, the items of other classes that are at least as near.

        Works tile by tile, so that memory stays small. A value is only compared with values of products of the same
        shape, since another shape may round differently.

        Yields:
            A tile of queries: their positions `(rows,)`, and counts `(rows, M)`, for the nearest positive only or for
            all of them, nearest first; a query with fewer positives has counts without meaning at the end.
        """
        center = self._center()  # (D,)
        queries = _sort_into_tiles(self.query - center, self.query_labels, QUERY_TILE, is_gallery=False)
        gallery = _sort_into_tiles(self.gallery - center, self.gallery_labels, GALLERY_TILE, is_gallery=True)
        place = self.query_in_gallery[queries.order]  # (Q,)
        own_column = np.full(len(queries.points), -1)  # where the sorted gallery holds each of the sorted queries
        own_column[: len(place)] = np.where(place < 0, -1, np.argsort(gallery.order)[place])
        scores = queries.points.new_empty(QUERY_TILE, GALLERY_TILE)  # the one memory for the scores of all tiles
        for row in range(0, len(queries.points), QUERY_TILE):
            rows = slice(row, row + QUERY_TILE)
            tile = _QueryTile(queries.points[rows], queries.labels[rows], gallery, scores)
            positives = tile.score_positives(own_column[rows])  # (QUERY_TILE, M)
            if nearest_only:
                positives = positives.amax(1, keepdim=True)  # (QUERY_TILE, 1)
            else:
                positives = positives.sort(dim=1, descending=True).values
            order = queries.order[rows]
            yield order, tile.count_negatives(positives)[: len(order)]

    def _center(self) -> torch.Tensor:
        """The vector `(D,)` to subtract before products are taken: the mean where points crowd around it, else zero.

        Distances stay the same, but in products of points that nearly coincide float32 keeps no digit that differs.
        """
        mean = self.gallery.mean(dim=0, dtype=torch.float64)
        crowded = mean.square().sum() > 0.9 * self.gallery.square().sum(dim=1).mean(dtype=torch.float64)
        return (mean * crowded).float()

    def neighbors(self, chosen: np.ndarray, k: int) -> np.ndarray:
        """Finds the nearest gallery items of some queries, without the queries themselves.

        Args:
            chosen: `(C,)` positions of queries.
            k: how many; fewer where the gallery doesn't have that many for each query.

        Returns:
            `(C, k)` positions in the gallery, nearest first.
        """
        place = self.query_in_gallery[np.asarray(chosen)][:, None]  # (C, 1)
        excludes_query = bool((self.query_in_gallery >= 0).any())
        wanted = min(k + excludes_query, len(self.gallery))
        gallery, query = _to_numpy(self.gallery), _to_numpy(self.query[torch.as_tensor(chosen)])
        if import_faiss() is None:
            from sklearn.neighbors import NearestNeighbors

            search = NearestNeighbors(algorithm="brute").fit(gallery)
            found = search.kneighbors(query, wanted, return_distance=False)  # (C, wanted)
        else:
            index = self._faiss_index()
            index.add(gallery)
            _, found = index.search(query, wanted)  # (C, wanted)
        if not excludes_query:
            return found
        is_query = found == place  # (C, wanted)
        # A query that is not in its own list, perhaps because exact duplicates pushed it out, loses the last entry.
        is_query[~is_query.any(axis=1), -1] = True
        return found[~is_query].reshape(len(found), wanted - 1)

    @cached_property
    def labels(self) -> np.ndarray:
        """`(N,)` labels of all points: the queries that are not in the gallery, and the gallery."""
        return np.concatenate([self.query_labels[self.query_in_gallery < 0], self.gallery_labels])

    @cached_property
    def points(self) -> torch.Tensor:
        """`(N, D)` all points: the queries that are not in the gallery, and the gallery."""
        outside = np.flatnonzero(self.query_in_gallery < 0)
        if len(outside) == 0:
            return self.gallery
        return torch.cat([self.query[torch.from_numpy(outside).to(self.query.device)], self.gallery])

    @cached_property
    def clusters(self) -> np.ndarray:
        """`(N,)` the k-means cluster of every point: 20 iterations on all points, k = number of their classes.

        It starts from k random points, which differ as far as possible: otherwise classes whose points coincide would
        not be told apart.
        """
        points = _to_numpy(self.points)  # (N, D)
        k = len(np.unique(self.labels))
        rng = np.random.default_rng(0)
        rows = points.view(np.dtype((np.void, points.strides[0]))).ravel()  # (N,)
        start = rng.permutation(np.unique(rows, return_index=True)[1])[:k]
        start = np.concatenate([start, rng.choice(len(points), k - len(start), replace=False)])  # (k,)
        faiss = import_faiss()
        if faiss is None:
            from sklearn.cluster import KMeans

            return KMeans(k, init=points[start], max_iter=20, n_init=1, random_state=0).fit_predict(points)
        kmeans = faiss.Clustering(points.shape[1], k)
        kmeans.niter, kmeans.seed = 20, 0
        kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = 1, 10**9  # or it drops points
        faiss.copy_array_to_vector(points[start].ravel(), kmeans.centroids)
        index = self._faiss_index()
        kmeans.train(points, index)
        return index.search(points, 1)[1][:, 0]

    def _faiss_index(self) -> Any:
        """An empty index for exact search, on the embeddings' own CUDA device where faiss can use it."""
        faiss = import_faiss()
        index = faiss.IndexFlatL2(self.query.shape[1])
        if self.query.is_cuda and faiss.get_num_gpus() > 0:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.query.device.index or 0, index)
        return index


class _Tiles(NamedTuple):
    """Points sorted by label, filled up to whole tiles."""

    points: torch.Tensor  # (whole tiles, D + 1)
    order: np.ndarray  # (N,) positions before sorting
    labels: np.ndarray  # (N,) sorted


def _sort_into_tiles(points: torch.Tensor, labels: np.ndarray, tile: int, is_gallery: bool) -> _Tiles:
    """Sorts points `(N, D)` by label, fills them up, and adds a dimension that makes products distances.

    For gallery items it is -‖g‖²/2 and for queries 1, so that q·g - ‖g‖²/2 is the larger the nearer g is to q.
    """
    order = np.argsort(labels, kind="stable")  # (N,)
    sorted_points = points[torch.from_numpy(order).to(points.device)]  # (N, D)
    lengths = sorted_points.square().sum(dim=1, keepdim=True)  # (N, 1)
    extra = -0.5 * lengths if is_gallery else torch.ones_like(lengths)  # (N, 1)
    padding = -len(order) % tile
    filled = F.pad(torch.cat([sorted_points, extra], dim=1), (0, 0, 0, padding))  # (N + padding, D + 1)
    if is_gallery and padding:
        filled[-padding:, -1] = torch.finfo(filled.dtype).min  # farther than anything
    return _Tiles(filled, order, labels[order])


class _QueryTile:
    """A tile of queries and the gallery; sorted by label, it holds each query's class from `start` to `end`.

    Args:
        queries: `(QUERY_TILE, D + 1)` sorted by label.
        labels: `(rows,)` their labels; the last tile of queries has fewer than QUERY_TILE.
        gallery: all tiles of the gallery.
        scores: `(QUERY_TILE, GALLERY_TILE)` memory for the scores of one tile of the gallery.
    """

    def __init__(self, queries: torch.Tensor, labels: np.ndarray, gallery: _Tiles, scores: torch.Tensor):
        self.queries, self.gallery, self.scores = queries, gallery.points, scores
        bounds = np.zeros((2, QUERY_TILE), np.int64)
        bounds[:, : len(labels)] = [np.searchsorted(gallery.labels, labels, side) for side in ("left", "right")]
        self.start, self.end = torch.from_numpy(bounds).to(queries.device)[:, :, None]  # (QUERY_TILE, 1) each
        self.largest_class = max(1, int((bounds[1] - bounds[0]).max()))  # M
        self.tiles_with_positives = range(bounds[0, 0] // GALLERY_TILE * GALLERY_TILE, bounds.max(), GALLERY_TILE)

    def _score(self, column: int) -> torch.Tensor:
        """Scores `(QUERY_TILE, GALLERY_TILE)` of the gallery's tile from a column on: the larger, the nearer."""
        return torch.mm(self.queries, self.gallery[column : column + GALLERY_TILE].T, out=self.scores)

    def score_positives(self, own_column: np.ndarray) -> torch.Tensor:
        """Scores each query's positives.

        Args:
            own_column: `(QUERY_TILE,)` where the query itself stands in the gallery; -1 where it doesn't.

        Returns:
            `(QUERY_TILE, M)`; -∞ for the query itself, and where its class has fewer than M items.
        """
        device = self.queries.device
        columns = self.start + torch.arange(self.largest_class, device=device)  # (QUERY_TILE, M)
        positives = self.queries.new_full(columns.shape, -torch.inf)  # (QUERY_TILE, M)
        for column in self.tiles_with_positives:
            in_tile = (columns >= column) & (columns < column + GALLERY_TILE) & (columns < self.end)
            found = self._score(column).gather(1, (columns - column).clamp(0, GALLERY_TILE - 1))  # (QUERY_TILE, M)
            positives = torch.where(in_tile, found, positives)
        return positives.masked_fill_(columns == torch.from_numpy(own_column).to(device)[:, None], -torch.inf)

    def count_negatives(self, thresholds: torch.Tensor) -> torch.Tensor:
        """Counts the items of other classes whose score reaches each threshold `(QUERY_TILE, M)`, descending."""
        counts = torch.zeros_like(thresholds, dtype=torch.int64)  # (QUERY_TILE, M)
        for column in range(0, len(self.gallery), GALLERY_TILE):
            scores = self._score(column)
            if column in self.tiles_with_positives:
                columns = torch.arange(column, column + GALLERY_TILE, device=scores.device)  # (GALLERY_TILE,)
                scores.masked_fill_((columns >= self.start) & (columns < self.end), -torch.inf)
            counts += _count_at_least(scores, thresholds)
        return counts


def _count_at_least(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Counts, for each threshold `(rows, M)`, the scores `(rows, columns)` that reach it; overwrites the scores."""
    if thresholds.shape[1] == 1:
        return scores.ge_(thresholds).sum(dim=1, keepdim=True).long()  # 0 and 1 in the scores' own memory
    if thresholds.shape[1] <= 16:
        reached = torch.empty_like(scores)  # (rows, columns)
        each = [torch.ge(scores, column[:, None], out=reached).sum(dim=1) for column in thresholds.T]
        return torch.stack(each, dim=1).long()  # (rows, M)
    # Thresholds descend: a score that stands behind `passed` of the ascending ones reaches those, the last of the row.
    passed = torch.searchsorted(thresholds.flip(1).contiguous(), scores, right=True)  # (rows, columns)
    histogram = torch.zeros(len(scores), thresholds.shape[1] + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(1, passed, torch.ones_like(passed))  # (rows, M + 1)
    return histogram.flip(1).cumsum(dim=1)[:, :-1]  # (rows, M)


def _to_numpy(points: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(points.cpu().numpy())


@cache
def import_faiss() -> Any:
    """The module faiss, or None, with a notice, where it can't be imported."""
    try:
        import faiss
    except ImportError:
        notice("faiss can't be imported: scikit-learn clusters and searches, more slowly")
        return None
    return faiss


def nmi(space: EmbeddingSpace) -> float:
    """Normalized mutual information of clusters and labels, normalized by the arithmetic mean of their entropies."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(space.labels, space.clusters))


def f1(space: EmbeddingSpace) -> float:
    """F1 over pairs of points: precision of pairs in one cluster, recall of pairs of one class."""
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, only_in_cluster), (only_in_class, in_both) = pair_confusion_matrix(space.labels, space.clusters)
    total = 2 * in_both + only_in_cluster + only_in_class
    return float(2 * in_both / total) if total else 0.0


def recall_at_k(space: EmbeddingSpace, k: int) -> float:
    """Share of the queries with an item of their class among the k nearest."""
    return float((space.num_negatives_ahead[space.has_positive] < k).mean())


def precision_at_1(space: EmbeddingSpace) -> float:
    """Share of the queries whose nearest item is of their class."""
    return recall_at_k(space, 1)


def r_precision(space: EmbeddingSpace) -> float:
    """Share of the R nearest items that are of the query's class, R being the number of its positives."""
    return float(space.precisions["r_precision"][space.has_positive].mean())


def map_at_r(space: EmbeddingSpace) -> float:
    """(1 / R) Σ_{i ≤ R} P@i · rel(i). Musgrave et al., A Metric Learning Reality Check, ECCV 2020, section 3.2."""
    return float(space.precisions["map_at_r"][space.has_positive].mean())


def mean_average_precision(space: EmbeddingSpace) -> float:
    """Mean over queries of the mean precision at the ranks of all their positives."""
    return float(space.precisions["map"][space.has_positive].mean())


def ami(space: EmbeddingSpace) -> float:
    """Mutual information of clusters and labels, adjusted for chance."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(space.labels, space.clusters))


def rho_spectrum(space: EmbeddingSpace) -> float:
    """KL(U‖S) of the uniform distribution and the normalized singular values. Roth et al., ICML 2020, section 5."""
    values = torch.linalg.svdvals(space.points.double())  # (min(N, D),)
    share = (values / values.sum()).clamp(min=1e-12)
    return float(-(share * len(share)).log().mean())


def uniformity(space: EmbeddingSpace) -> float:
    """log mean exp(-2 ‖x - y‖²) over pairs of normalized points. Wang & Isola, ICML 2020, equation 2."""
    points = F.normalize(space.points, dim=1)  # (N, D)
    total = sum(
        (4 * (rows @ points.T - 1)).exp().sum(dtype=torch.float64)  # ‖x - y‖² = 2 - 2 x·y
        for rows in points.split(QUERY_TILE)
    )
    count = len(points)
    return float(((total - count) / (count * (count - 1))).log())


def alignment(space: EmbeddingSpace) -> float:
    """Mean ‖x - y‖² over pairs of normalized points of a class. Wang & Isola, ICML 2020, equation 1 with α = 2."""
    sums, counts = class_sums(space)  # (C, D), (C,)
    num_pairs = (counts * (counts - 1)).sum() / 2
    return float((counts**2 - sums.square().sum(dim=1).cpu().numpy()).sum() / num_pairs)


def intra_inter_ratio(space: EmbeddingSpace) -> float:
    """Mean over classes of the mean cosine distance of their pairs, over the mean cosine distance of class means.

    Classes of one image are left out of the first.
    """
    sums, counts = class_sums(space)  # (C, D), (C,)

    # n unit vectors with sum s have n (n - 1) ordered pairs, whose cosines sum to ‖s‖² - n
    def mean_distance(squared_norm_of_sum: np.ndarray, n: np.ndarray) -> np.ndarray:
        return 1 - (squared_norm_of_sum - n) / (n * (n - 1))

    several = counts > 1
    intra = mean_distance(sums.square().sum(dim=1).cpu().numpy()[several], counts[several]).mean()
    means = F.normalize(sums, dim=1)  # (C, D)
    inter = mean_distance(np.asarray(means.sum(dim=0).square().sum().item()), np.asarray(len(counts)))
    return float(intra / inter)


def class_sums(space: EmbeddingSpace) -> tuple[torch.Tensor, np.ndarray]:
    """Sums each class's normalized points, `(C, D)` float64, and counts them, `(C,)`."""
    classes, labels, counts = np.unique(space.labels, return_inverse=True, return_counts=True)
    points = F.normalize(space.points.double(), dim=1)  # (N, D)
    sums = torch.zeros(len(classes), points.shape[1], dtype=points.dtype, device=points.device)
    return sums.index_add_(0, torch.from_numpy(labels).to(points.device), points), counts


@dataclass(frozen=True)
class Metric:
    """A row of `METRICS`.

    Attributes:
        compute: a function `space -> float` or `(space, k) -> float`.
        lower_is_better: whether the best network has the lowest value.
    """

    compute: Callable[..., float]
    lower_is_better: bool = False


METRICS: dict[str, Metric] = {
    "NMI": Metric(nmi),
    "F1": Metric(f1),
    "Recall": Metric(recall_at_k),
    "Precision @ 1": Metric(precision_at_1),
    "R-precision": Metric(r_precision),
    "MAP@R": Metric(map_at_r),
    "mAP": Metric(mean_average_precision),
    "AMI": Metric(ami),
    "Rho-spectrum": Metric(rho_spectrum, lower_is_better=True),
    "Uniformity": Metric(uniformity, lower_is_better=True),
    "Alignment": Metric(alignment, lower_is_better=True),
    "Intra / Inter": Metric(intra_inter_ratio, lower_is_better=True),
}
LITERATURE = ("NMI", "F1", "Recall")  # what papers since Sampling Matters report
TESTING_METHODS = ("GlobalEmbeddingSpace", "WithSameParentLabel")


def lower_is_better(name: str) -> bool:
    """Whether lower values of a column, such as `Alignment` or `Set 0 Recall @ 4`, are better; False if unknown."""
    name = re.sub(r"^Set \d+ ", "", name)
    row = METRICS.get(name) or METRICS.get(re.sub(r" @ \d+$", "", name))
    return row is not None and row.lower_is_better


def chosen_metrics(
    k_vals: Sequence[int], names: Sequence[str] = LITERATURE
) -> dict[str, Callable[[EmbeddingSpace], float]]:
    """The named `METRICS` in the table's order; those of k as `Recall @ 1`, …, for every k and for 1."""
    chosen: dict[str, Callable[[EmbeddingSpace], float]] = {}
    for name, metric in METRICS.items():
        if "k" not in inspect.signature(metric.compute).parameters:
            chosen |= {name: metric.compute} if name in names else {}
        elif name in names or name == "Recall":
            for k in sorted({1, *(k_vals if name in names else [])}):
                chosen[f"{name} @ {k}"] = partial(metric.compute, k=k)
    return chosen


def evaluate_space(space: EmbeddingSpace, k_vals: Sequence[int], names: Sequence[str] = LITERATURE) -> dict[str, float]:
    """Computes the metrics of one space, those of `chosen_metrics`."""
    return {name: compute(space) for name, compute in chosen_metrics(k_vals, names).items()}


def evaluate_within_parents(
    space: EmbeddingSpace,
    query_parents: np.ndarray,
    gallery_parents: np.ndarray,
    k_vals: Sequence[int],
    names: Sequence[str] = LITERATURE,
) -> dict[str, float]:
    """Computes the metrics inside each coarser class, and their mean; classes without anything to find are left out.

    Args:
        space: all points.
        query_parents: `(Q,)` coarser labels of the queries.
        gallery_parents: `(G,)` coarser labels of the gallery.
        k_vals: the k of Recall @ k.
        names: keys of `METRICS`.

    Raises:
        UserError: no class has anything to find.
    """
    metrics_by_parent = []
    for parent in np.unique(query_parents):
        queries, items = np.flatnonzero(query_parents == parent), np.flatnonzero(gallery_parents == parent)
        place = space.query_in_gallery[queries]
        inside = EmbeddingSpace(
            space.query[torch.from_numpy(queries)],
            space.query_labels[queries],
            space.gallery[torch.from_numpy(items)],
            space.gallery_labels[items],
            np.where(place < 0, -1, np.searchsorted(items, place)),
        )
        if inside.has_positive.any():
            metrics_by_parent.append(evaluate_space(inside, k_vals, names))
    if not metrics_by_parent:
        raise UserError("inside the coarser classes no query has another image of its class to find")
    return {name: float(np.mean([metrics[name] for metrics in metrics_by_parent])) for name in metrics_by_parent[0]}


@dataclass(frozen=True)
class Points:
    """Embedded images.

    Attributes:
        embeddings: `(N, D)`.
        labels: `(N,)` integers.
        parents: `(N,)` labels of the next coarser level, if there is one.
        paths: N image files.
    """

    embeddings: torch.Tensor
    labels: np.ndarray
    parents: np.ndarray | None
    paths: Sequence[str]


def embed_set(net: nn.Module, images: RetrievalSet[ImageLoader], device: torch.device) -> RetrievalSet[Points]:
    """Embeds a retrieval set; `net` is on `device`."""

    def embed_images(loader: ImageLoader) -> Points:
        name = images.name if loader is images.query else f"{images.name} gallery"
        return Points(embed(net, loader, device, name), loader.labels, loader.parents, loader.paths)

    return images.map(embed_images)


def build_space(points: RetrievalSet[Points]) -> EmbeddingSpace:
    """Puts queries and gallery into one space; a query whose path is in the gallery does not find itself there."""
    query, gallery = points.query, points.gallery
    if gallery is None:
        return EmbeddingSpace(query.embeddings, query.labels)
    position = {path: i for i, path in enumerate(gallery.paths)}
    query_in_gallery = np.array([position.get(path, -1) for path in query.paths], np.int64)  # (Q,)
    return EmbeddingSpace(query.embeddings, query.labels, gallery.embeddings, gallery.labels, query_in_gallery)


def evaluate_points(
    points: Sequence[RetrievalSet[Points]],
    k_vals: Sequence[int],
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """Computes the metrics of embedded retrieval sets.

    Args:
        points: one set or more.
        k_vals: the k of Recall @ k.
        names: keys of `METRICS`.
        testing_method: one of `TESTING_METHODS`.

    Returns:
        The metrics in one flat dict, named `Set 0 Recall @ 1`, … where there are several sets; and the sets' spaces.

    Raises:
        UserError: no query of a set has anything to find.
    """
    metrics: dict[str, float] = {}
    spaces = [build_space(one_set) for one_set in points]
    for position, (one_set, space) in enumerate(zip(points, spaces)):
        if not space.has_positive.any():
            raise UserError(
                f"{one_set.name}: no query's class is among the images that it is compared to: choose another "
                "--eval_reference_set, or other --splits_to_eval"
            )
        if testing_method == "WithSameParentLabel":
            query_parents, gallery_parents = one_set.query.parents, (one_set.gallery or one_set.query).parents
            assert query_parents is not None, "the labels have no coarser level"
            assert gallery_parents is not None
            values = evaluate_within_parents(space, query_parents, gallery_parents, k_vals, names)
        else:
            values = evaluate_space(space, k_vals, names)
        prefix = f"Set {position} " if len(points) > 1 else ""
        metrics |= {prefix + name: value for name, value in values.items()}
    return metrics, spaces


def evaluate(
    net: nn.Module,
    sets: Sequence[RetrievalSet[ImageLoader]],
    k_vals: Sequence[int],
    device: torch.device,
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """Embeds retrieval sets and computes their metrics.

    Args:
        net: the network, on `device`.
        sets: one set or more, each with or without a gallery.
        k_vals: the k of Recall @ k.
        device: where the network is.
        names: keys of `METRICS`.
        testing_method: one of `TESTING_METHODS`.

    Returns:
        The metrics and the embedding spaces, as from `evaluate_points`.
    """
    return evaluate_points([embed_set(net, images, device) for images in sets], k_vals, names, testing_method)
