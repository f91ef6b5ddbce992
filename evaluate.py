"""Embeddings and metrics: `embed`, `EmbeddingSpace`, `METRICS`, `evaluate`.

A metric is a function `space -> float` or `(space, k) -> float` and its row in `METRICS`. Definitions: NMI and F1 of a
k-means clustering, retrieval metrics by Euclidean distance, the query excluded by its index, ties against the network.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors
from torch import nn
from tqdm import tqdm

from auxiliaries import UserError, notice, number

try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from datasets import ImageLoader, RetrievalLoaders

QUERY_TILE, GALLERY_TILE = 512, 4096  # products of this shape stay in the cache


@torch.inference_mode()
def embed(net: nn.Module, loader: ImageLoader, device: torch.device, name: str = "") -> torch.Tensor:
    """Embeds a loader's images.

    Args:
        net: images `(B, 3, H, W)` uint8 to embeddings `(B, D)`; it is put into evaluation mode.
        loader: gives (images, labels, indices), in order.
        device: where the network is.
        name: what the progress bar says.

    Returns:
        `(N, D)` float32, on the device.
    """
    net.eval()
    batches = tqdm(loader, desc=f"embedding {name}".strip(), leave=False, disable=None)
    return torch.cat([net(images.to(device, non_blocking=True)).float() for images, _, _ in batches])


class EmbeddingSpace:
    """Queries and the gallery they search, with what metrics share computed once, when first asked for.

    Args:
        query: `(Q, D)` embeddings.
        query_labels: `(Q,)` integers.
        gallery: `(G, D)`; without it the gallery is the queries, and no query finds itself.
        gallery_labels: `(G,)`.
        query_in_gallery: `(Q,)` positions of the queries in the gallery, which no query is to find itself at; without
            it the gallery holds none of them.

    Attributes:
        positives: `(Q,)` how many items there are for a query to find (R).
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
        self.query = torch.as_tensor(query).float()
        self.query_labels = np.asarray(query_labels)
        self.query_in_gallery = np.arange(len(self.query)) if gallery is None else query_in_gallery
        self.gallery = self.query if gallery is None else torch.as_tensor(gallery).float()
        self.gallery_labels = self.query_labels if gallery_labels is None else np.asarray(gallery_labels)
        if not all(points.square().sum(dim=1).isfinite().all() for points in (self.query, self.gallery)):
            raise UserError("the network's embeddings are not finite: lower --lr, or check the weights it started from")
        classes, counts = np.unique(self.gallery_labels, return_counts=True)
        size = dict(zip(classes.tolist(), counts.tolist()))
        self.positives = np.array([size.get(label, 0) for label in self.query_labels.tolist()], np.int64)
        self.positives[self.positives > 0] -= self.query_in_gallery is not None
        self.has_positive = self.positives > 0

    @cached_property
    def negatives_ahead(self) -> np.ndarray:
        """For each query, how many items of other classes are at least as near as its nearest positive, `(Q,)` int64.

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
        size = torch.from_numpy(self.positives)
        for queries, counts in self._count_negatives(nearest_only=False):
            found = torch.arange(1, counts.shape[1] + 1)
            of_query = size[queries][:, None]
            rank = found + counts.cpu()
            precision = (found / rank.double()).masked_fill_(found > of_query, 0)
            within = (rank <= of_query) & (found <= of_query)
            for name, total in (
                ("r_precision", within.sum(dim=1)),
                ("map_at_r", (precision * within).sum(dim=1)),
                ("map", precision.sum(dim=1)),
            ):
                results[name][queries] = (total.double() / of_query[:, 0].clamp(min=1)).numpy()
        return results

    def _count_negatives(self, nearest_only: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """For positives of each query, how many items of other classes are at least as near.

        Works tile by tile, so that memory stays small. A value is only compared with values of products of the same
        shape, since another shape may round differently.

        Yields:
            A tile of queries: their positions `(rows,)`, and counts `(rows, M)`, for the nearest positive only or for
            all of them, nearest first; a query with fewer positives has counts without meaning at the end.
        """
        centre = self._centre()
        queries, query_order, query_labels = self._sorted_tiles(
            self.query - centre, self.query_labels, QUERY_TILE, False
        )
        gallery, gallery_order, gallery_labels = self._sorted_tiles(
            self.gallery - centre, self.gallery_labels, GALLERY_TILE, True
        )
        itself = np.full(len(queries), -1)
        if self.query_in_gallery is not None:
            itself[: len(query_order)] = np.argsort(gallery_order)[self.query_in_gallery[query_order]]
        scores = queries.new_empty(QUERY_TILE, GALLERY_TILE)
        for row in range(0, len(queries), QUERY_TILE):
            labels, order = query_labels[row : row + QUERY_TILE], query_order[row : row + QUERY_TILE]
            rows = queries[row : row + QUERY_TILE]
            # Sorted by label, the items of a query's class stand together, from its start to its end.
            bounds = np.zeros((2, QUERY_TILE), np.int64)
            bounds[:, : len(labels)] = [np.searchsorted(gallery_labels, labels, side) for side in ("left", "right")]
            start, end = torch.from_numpy(bounds).to(rows.device)[:, :, None]
            with_positives = range(bounds[0, 0] // GALLERY_TILE * GALLERY_TILE, bounds.max(), GALLERY_TILE)

            columns = start + torch.arange(max(1, int((bounds[1] - bounds[0]).max())), device=rows.device)
            positives = rows.new_full(columns.shape, -torch.inf)
            for column in with_positives:
                torch.mm(rows, gallery[column : column + GALLERY_TILE].T, out=scores)
                here = (columns >= column) & (columns < column + GALLERY_TILE) & (columns < end)
                found = scores.gather(1, (columns - column).clamp(0, GALLERY_TILE - 1))
                positives = torch.where(here, found, positives)
            own = torch.from_numpy(itself[row : row + QUERY_TILE, None]).to(rows.device)
            positives.masked_fill_(columns == own, -torch.inf)
            nearest = positives.amax(1, keepdim=True) if nearest_only else positives.sort(dim=1, descending=True).values

            counts = torch.zeros_like(nearest, dtype=torch.int64)
            for column in range(0, len(gallery), GALLERY_TILE):
                torch.mm(rows, gallery[column : column + GALLERY_TILE].T, out=scores)
                if column in with_positives:
                    columns = torch.arange(column, column + GALLERY_TILE, device=rows.device)
                    scores.masked_fill_((columns >= start) & (columns < end), -torch.inf)
                counts += _count_at_least(scores, nearest)
            yield order, counts[: len(order)]

    def _centre(self) -> torch.Tensor:
        """What to subtract before products are taken: the mean, `(D,)`, where points crowd around it, else zero.

        Distances stay the same, but of products of points that nearly coincide float32 keeps no digit that differs.
        """
        mean = self.gallery.mean(dim=0, dtype=torch.float64)
        crowded = mean.square().sum() > 0.9 * self.gallery.square().sum(dim=1).mean(dtype=torch.float64)
        return (mean * crowded).float()

    @staticmethod
    def _sorted_tiles(
        points: torch.Tensor, labels: np.ndarray, tile: int, is_gallery: bool
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Points sorted by label, filled up to whole tiles, with a further dimension that makes products distances.

        For gallery items it is -‖g‖²/2 and for queries 1, so that q·g - ‖g‖²/2 is the larger the nearer g is to q.

        Returns:
            `(whole tiles, D + 1)` points; `(N,)` their positions before sorting; `(N,)` sorted labels.
        """
        order = np.argsort(labels, kind="stable")
        sorted_points = points[torch.from_numpy(order).to(points.device)]
        lengths = sorted_points.square().sum(dim=1, keepdim=True)
        extra = -0.5 * lengths if is_gallery else torch.ones_like(lengths)
        padding = -len(order) % tile
        filled = F.pad(torch.cat([sorted_points, extra], dim=1), (0, 0, 0, padding))
        if is_gallery and padding:
            filled[-padding:, -1] = torch.finfo(filled.dtype).min  # farther than anything
        return filled, order, labels[order]

    def neighbours(self, chosen: np.ndarray, k: int) -> np.ndarray:
        """The k nearest gallery items `(len(chosen), min(k, G))` of the chosen queries, without the query itself."""
        gallery_size = len(self.gallery)
        wanted = min(k + (self.query_in_gallery is not None), gallery_size)
        if faiss is None:
            _warn_of_sklearn()
            search = NearestNeighbors(algorithm="brute").fit(_as_numpy(self.gallery))
            found = search.kneighbors(_as_numpy(self.query[torch.as_tensor(chosen)]), wanted, return_distance=False)
        else:
            index = self._faiss_index()
            index.add(_as_numpy(self.gallery))
            _, found = index.search(_as_numpy(self.query[torch.as_tensor(chosen)]), wanted)
        if self.query_in_gallery is None:
            return found
        # Exact duplicates may push the query out of its own list: then the last one goes.
        is_query = found == self.query_in_gallery[np.asarray(chosen)][:, None]
        is_query[~is_query.any(axis=1), -1] = True
        return found[~is_query].reshape(len(found), wanted - 1)

    @cached_property
    def labels(self) -> np.ndarray:
        """`(N,)` labels of all points: the gallery and the queries, each once."""
        if self.query_in_gallery is not None:
            return self.gallery_labels
        return np.concatenate([self.query_labels, self.gallery_labels])

    @cached_property
    def points(self) -> torch.Tensor:
        """`(N, D)` all points: the gallery and the queries, each once."""
        return self.gallery if self.query_in_gallery is not None else torch.cat([self.query, self.gallery])

    @cached_property
    def clusters(self) -> np.ndarray:
        """`(N,)` the k-means cluster of every point: 20 iterations on all points, k = number of their classes.

        It starts from k random points, different ones as far as there are, without which classes that fall on one
        point each would not be told apart.
        """
        points = _as_numpy(self.points)
        k = len(np.unique(self.labels))
        rng = np.random.default_rng(0)
        rows = points.view(np.dtype((np.void, points.strides[0]))).ravel()
        start = rng.permutation(np.unique(rows, return_index=True)[1])[:k]
        start = np.concatenate([start, rng.choice(len(points), k - len(start), replace=False)])
        if faiss is None:
            _warn_of_sklearn()
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
        index = faiss.IndexFlatL2(self.query.shape[1])
        if self.query.is_cuda and faiss.get_num_gpus() > 0:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.query.device.index or 0, index)
        return index


def _count_at_least(scores: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """How many scores `(rows, columns)` of a row reach each of its thresholds `(rows, M)`; overwrites the scores."""
    if thresholds.shape[1] == 1:
        return scores.ge_(thresholds).sum(dim=1, keepdim=True).long()  # 0 and 1 in the scores' own memory
    if thresholds.shape[1] <= 16:
        reached = torch.empty_like(scores)
        each = [torch.ge(scores, column[:, None], out=reached).sum(dim=1) for column in thresholds.T]
        return torch.stack(each, dim=1).long()
    # Thresholds descend: a score that stands behind `passed` of the ascending ones reaches those, the last of the row.
    passed = torch.searchsorted(thresholds.flip(1).contiguous(), scores, right=True)
    histogram = torch.zeros(len(scores), thresholds.shape[1] + 1, dtype=torch.int64, device=scores.device)
    histogram.scatter_add_(1, passed, torch.ones_like(passed))
    return histogram.flip(1).cumsum(dim=1)[:, :-1]


def _as_numpy(points: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(points.cpu().numpy())


@cache
def _warn_of_sklearn() -> None:
    notice("faiss can't be imported: scikit-learn clusters and searches, more slowly")


def nmi(space: EmbeddingSpace) -> float:
    """Normalised mutual information of clusters and labels, normalised by the arithmetic mean of their entropies."""
    return float(normalized_mutual_info_score(space.labels, space.clusters))


def f1(space: EmbeddingSpace) -> float:
    """F1 over pairs of points: precision of pairs in one cluster, recall of pairs of one class."""

    def pairs(values: np.ndarray) -> int:
        counts = np.unique(values, return_counts=True)[1]
        return int((counts * (counts - 1) // 2).sum())

    _, labels = np.unique(space.labels, return_inverse=True)
    together = pairs(labels * (int(space.clusters.max()) + 1) + space.clusters)
    in_cluster, in_class = pairs(space.clusters), pairs(labels)
    return 2 * together / (in_cluster + in_class) if in_cluster + in_class else 0.0


def recall_at_k(space: EmbeddingSpace, k: int) -> float:
    """Share of the queries with an item of their class among the k nearest."""
    return float((space.negatives_ahead[space.has_positive] < k).mean())


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
    return float(adjusted_mutual_info_score(space.labels, space.clusters))


def rho_spectrum(space: EmbeddingSpace) -> float:
    """KL(U‖S) of the uniform distribution and the normalised singular values. Roth et al., ICML 2020, section 5."""
    values = torch.linalg.svdvals(space.points.double())
    share = (values / values.sum()).clamp(min=1e-12)
    return float(-(share * len(share)).log().mean())


def uniformity(space: EmbeddingSpace) -> float:
    """log mean exp(-2 ‖x - y‖²) over pairs of normalised points. Wang & Isola, ICML 2020, equation 2."""
    points = F.normalize(space.points, dim=1)
    total = sum(
        (4 * (rows @ points.T - 1)).exp().sum(dtype=torch.float64)  # ‖x - y‖² = 2 - 2 x·y
        for rows in points.split(QUERY_TILE)
    )
    count = len(points)
    return float(((total - count) / (count * (count - 1))).log())


def alignment(space: EmbeddingSpace) -> float:
    """Mean ‖x - y‖² over pairs of normalised points of a class. Wang & Isola, ICML 2020, equation 1 with α = 2."""
    sums, counts = class_sums(space)
    pairs = (counts * (counts - 1)).sum() / 2
    return float((counts**2 - sums.square().sum(dim=1).cpu().numpy()).sum() / pairs)


def intra_inter_ratio(space: EmbeddingSpace) -> float:
    """Mean over classes of the mean cosine distance of their pairs, over the mean cosine distance of class means.

    Classes of one image are left out of the first.
    """
    sums, counts = class_sums(space)

    # n unit vectors with sum s have n (n - 1) ordered pairs, whose cosines sum to ‖s‖² - n
    def mean_distance(squared_norm_of_sum: np.ndarray, n: np.ndarray) -> np.ndarray:
        return 1 - (squared_norm_of_sum - n) / (n * (n - 1))

    several = counts > 1
    intra = mean_distance(sums.square().sum(dim=1).cpu().numpy()[several], counts[several]).mean()
    means = F.normalize(sums, dim=1)
    inter = mean_distance(np.asarray(means.sum(dim=0).square().sum().item()), np.asarray(len(counts)))
    return float(intra / inter)


def class_sums(space: EmbeddingSpace) -> tuple[torch.Tensor, np.ndarray]:
    """For each class the sum of its normalised points, `(C, D)` float64, and their number, `(C,)`."""
    classes, labels, counts = np.unique(space.labels, return_inverse=True, return_counts=True)
    points = F.normalize(space.points.double(), dim=1)
    sums = torch.zeros(len(classes), points.shape[1], dtype=points.dtype, device=points.device)
    return sums.index_add_(0, torch.from_numpy(labels).to(points.device), points), counts


METRICS: dict[str, Callable[..., float]] = {
    "NMI": nmi,
    "F1": f1,
    "Recall": recall_at_k,
    "Precision @ 1": precision_at_1,
    "R-precision": r_precision,
    "MAP@R": map_at_r,
    "mAP": mean_average_precision,
    "AMI": ami,
    "Rho-spectrum": rho_spectrum,
    "Uniformity": uniformity,
    "Alignment": alignment,
    "Intra / Inter": intra_inter_ratio,
}
LITERATURE = ("NMI", "F1", "Recall")  # what papers since Sampling Matters report
TESTING_METHODS = ("GlobalEmbeddingSpace", "WithSameParentLabel")
LOWER_IS_BETTER = {"Rho-spectrum", "Uniformity", "Alignment", "Intra / Inter"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags of metrics."""
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--eval_metrics",
        nargs="+",
        default=list(LITERATURE),
        choices=METRICS,
        metavar="METRIC",
        help=f"computed at every evaluation: {', '.join(METRICS)}; Recall @ 1 is always among them",
    )
    group.add_argument(
        "--k_vals",
        type=number(int, 1),
        nargs="+",
        metavar="K",
        help="the k of Recall @ k; 1 is always among them (default: by data set)",
    )
    group.add_argument(
        "--testing_method",
        choices=TESTING_METHODS,
        default="GlobalEmbeddingSpace",
        help="WithSameParentLabel: metrics inside each class of the next coarser label level, and their mean",
    )
    group.add_argument(
        "--meta_testing_method",
        choices=("ConcatenateEmbeddings",),
        help="cross_validation: also evaluate the concatenated embeddings of the folds' best networks",
    )


def chosen_metrics(
    k_vals: Sequence[int], names: Sequence[str] = LITERATURE
) -> dict[str, Callable[[EmbeddingSpace], float]]:
    """The named `METRICS` in the table's order; those of k as `Recall @ 1`, …, for every k and for 1."""
    chosen: dict[str, Callable[[EmbeddingSpace], float]] = {}
    for name, metric in METRICS.items():
        if "k" not in inspect.signature(metric).parameters:
            chosen |= {name: metric} if name in names else {}
        elif name in names or name == "Recall":
            for k in sorted({1, *(k_vals if name in names else [])}):
                chosen[f"{name} @ {k}"] = partial(metric, k=k)
    return chosen


def compute_metrics(
    space: EmbeddingSpace, k_vals: Sequence[int], names: Sequence[str] = LITERATURE
) -> dict[str, float]:
    """The values of `chosen_metrics`."""
    return {name: metric(space) for name, metric in chosen_metrics(k_vals, names).items()}


def metrics_within_parents(
    space: EmbeddingSpace,
    query_parents: np.ndarray,
    gallery_parents: np.ndarray,
    k_vals: Sequence[int],
    names: Sequence[str] = LITERATURE,
) -> dict[str, float]:
    """The mean over coarser classes of the metrics inside each; classes without anything to find are left out.

    Args:
        space: all points.
        query_parents: `(Q,)` the queries' coarser labels.
        gallery_parents: `(G,)` the gallery's.
        k_vals: the k of Recall @ k.
        names: of the `METRICS` to compute.
    """
    of_parents = []
    for parent in np.unique(query_parents):
        queries, items = np.flatnonzero(query_parents == parent), np.flatnonzero(gallery_parents == parent)
        itself = None if space.query_in_gallery is None else np.searchsorted(items, space.query_in_gallery[queries])
        inside = EmbeddingSpace(
            space.query[torch.from_numpy(queries)],
            space.query_labels[queries],
            space.gallery[torch.from_numpy(items)],
            space.gallery_labels[items],
            itself,
        )
        if inside.has_positive.any():
            of_parents.append(compute_metrics(inside, k_vals, names))
    if not of_parents:
        raise UserError("inside the coarser classes no query has another image of its class to find")
    return {name: float(np.mean([metrics[name] for metrics in of_parents])) for name in of_parents[0]}


@dataclass(frozen=True)
class Points:
    """Embedded images: `(N, D)`, their labels `(N,)`, their labels of the next coarser level, if any, and N paths."""

    embeddings: torch.Tensor
    labels: np.ndarray
    parents: np.ndarray | None
    paths: Sequence[str]


@dataclass(frozen=True)
class EmbeddedSet:
    """Queries, and the gallery that they search; without one it is the queries themselves.

    Attributes:
        query_in_gallery: see `EmbeddingSpace`.
    """

    name: str
    query: Points
    gallery: Points | None = None
    query_in_gallery: np.ndarray | None = None

    @cached_property
    def space(self) -> EmbeddingSpace:
        """Both in one space."""
        query, gallery = self.query, self.gallery
        if gallery is None:
            return EmbeddingSpace(query.embeddings, query.labels)
        return EmbeddingSpace(query.embeddings, query.labels, gallery.embeddings, gallery.labels, self.query_in_gallery)


def embed_set(net: nn.Module, images: RetrievalLoaders, device: torch.device) -> EmbeddedSet:
    """Embeds a retrieval set; `net` is on `device`."""

    def points(loader: ImageLoader, name: str) -> Points:
        return Points(embed(net, loader, device, name), loader.labels, loader.parents, loader.dataset.images.paths)

    gallery = points(images.gallery, f"{images.name} gallery") if images.gallery else None
    return EmbeddedSet(images.name, points(images.query, images.name), gallery)


def measure(
    sets: Sequence[EmbeddedSet],
    k_vals: Sequence[int],
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
) -> dict[str, float]:
    """The metrics of embedded sets in one flat dict, named `Set 0 Recall @ 1`, … where there are several sets.

    Raises:
        UserError: no query has anything to find.
    """
    metrics: dict[str, float] = {}
    for position, embedded in enumerate(sets):
        if not embedded.space.has_positive.any():
            raise UserError(
                f"{embedded.name}: no query's class is among the images that it is compared to: choose another "
                "--eval_reference_set, or other --splits_to_eval"
            )
        if testing_method == "WithSameParentLabel":
            query, gallery = embedded.query, embedded.gallery or embedded.query
            assert query.parents is not None, "the labels have no coarser level"
            assert gallery.parents is not None
            of_set = metrics_within_parents(embedded.space, query.parents, gallery.parents, k_vals, names)
        else:
            of_set = compute_metrics(embedded.space, k_vals, names)
        prefix = f"Set {position} " if len(sets) > 1 else ""
        metrics |= {prefix + name: value for name, value in of_set.items()}
    return metrics


def evaluate(
    net: nn.Module,
    sets: Sequence[RetrievalLoaders],
    k_vals: Sequence[int],
    device: torch.device,
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """Embeds retrieval sets and computes their metrics.

    Args:
        net: the network, on `device`.
        sets: one or more, each with or without a gallery.
        k_vals: the k of Recall @ k.
        device: where to compute.
        names: of the `METRICS` to compute.
        testing_method: one of `TESTING_METHODS`.

    Returns:
        The metrics, as `measure` names them, and the embedding spaces.
    """
    embedded = [embed_set(net, images, device) for images in sets]
    return measure(embedded, k_vals, names, testing_method), [one.space for one in embedded]


def mean_over_sets(metrics: dict[str, float], name: str) -> float:
    """The metric, or its mean over the test sets where there are several; NaN where there is none of that name."""
    if name in metrics:
        return metrics[name]
    values = [value for key, value in metrics.items() if re.sub(r"^Set \d+ ", "", key) == name]
    return float(np.mean(values)) if values else math.nan


def best_epoch(rows: Sequence[dict[str, Any]], name: str) -> int:
    """The first epoch, after training began, with the best value of a metric; 0 where there is none yet."""
    sign = -1 if name in LOWER_IS_BETTER else 1
    scores = {row["Epochs"]: sign * mean_over_sets(row, name) for row in rows if row["Epochs"] > 0}
    return max(scores, key=lambda epoch: -np.inf if np.isnan(scores[epoch]) else scores[epoch], default=0)
