"""Embeddings and metrics: `embed`, `EmbeddingSpace`, `METRICS`, `evaluate`.

A metric is a function `space -> float` or `(space, k) -> float` and its row in `METRICS`. NMI and F1 judge a k-means
clustering; retrieval metrics rank by Euclidean distance, exclude the query by its index, and count ties against the
network.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import FlagParser, Progress, UserError, notice, number

if TYPE_CHECKING:
    from datasets import ImageLoader, RetrievalSet

QUERY_TILE, GALLERY_TILE = 512, 2048  # products of this shape stay in the cache
MAX_IN_TURN = 16  # thresholds that are compared with one after the other
MAX_DIFFERENCES = 2**19  # coordinates that are subtracted at once
TIE = 1 + 1e-14  # distances in float64 that differ by less are equal: their last bits depend on the order of sums


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
        help="also evaluate before training: the network as epoch 0, its backbone's features as epoch -1")
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
    batches = Progress(loader, f"embedding {name}".strip())
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
        UserError: an embedding is not finite, or a query has another label in the gallery.
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
        if not all(points.isfinite().all() for points in (self.query, self.gallery)):
            raise UserError("the network's embeddings are not finite: lower --lr, or check the weights it started from")
        is_inside = self.query_in_gallery >= 0  # (Q,)
        if (self.query_labels[is_inside] != self.gallery_labels[self.query_in_gallery[is_inside]]).any():
            raise UserError("an image has one label as a query and another one in the gallery: give it one of them")
        classes, counts = np.unique(self.gallery_labels, return_counts=True)
        size = dict(zip(classes.tolist(), counts.tolist()))
        self.num_positives = np.array([size.get(label, 0) for label in self.query_labels.tolist()], np.int64)  # (Q,)
        self.num_positives -= is_inside
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

        Products in float32 tell most distances apart. Where embeddings crowd around several points they don't: these
        queries are counted by products in float64, and those that are still left by differences.

        Yields:
            Some queries: their positions `(rows,)`, and counts `(rows, M)`, for the nearest positive only or for all
            of them, nearest first; a query with fewer positives has counts without meaning at the end.
        """
        waiting = torch.from_numpy(np.argsort(self.query_labels, kind="stable")).to(self.query.device)  # by label
        is_long = not nearest_only and self.num_positives.max(initial=0) > MAX_IN_TURN  # then float64 costs little more
        for dtype in (torch.float64,) if is_long else (torch.float32, torch.float64):
            if len(waiting) == 0:
                return
            products, crowded = _Products(self, dtype), []
            for queries in waiting.split(QUERY_TILE):
                tile = _QueryTile(products, queries, nearest_only)
                tile.count()
                yield queries[~tile.is_crowded].cpu().numpy(), tile.counts[~tile.is_crowded]
                crowded.append(queries[tile.is_crowded])
            waiting = torch.cat(crowded)
        if len(waiting):
            yield from self._count_by_differences(waiting, nearest_only)

    def _count_by_differences(
        self, queries: torch.Tensor, nearest_only: bool
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The same as `_count_negatives`, slowly, in float64, and with equal points of the gallery compared once."""
        first, place, repeats = (torch.from_numpy(array).to(queries.device) for array in _distinct_rows(self.gallery))
        points = self.gallery[first].double()  # (U, D)
        for rows in queries.split(max(1, 4 * MAX_DIFFERENCES // len(points))):
            distances = _cdist(self.query[rows], points)  # (rows, U)
            start, end, own = (columns[rows][:, None] for columns in self.class_columns)  # (rows, 1) each
            columns = start + torch.arange(int((end - start).max().clamp(min=1)), device=rows.device)  # (rows, M)
            items = self.gallery_order[columns.clamp(max=len(self.gallery) - 1)]  # (rows, M)
            positives = distances.gather(1, place[items])  # (rows, M)
            positives = positives.masked_fill_((columns >= end) | (columns == own), torch.inf).sort(dim=1).values
            reached = TIE * (positives[:, :1] if nearest_only else positives)  # (rows, M)
            distances, order = distances.sort(dim=1)  # (rows, U)
            as_near = torch.searchsorted(distances, reached, right=True)  # (rows, M)
            counts = F.pad(repeats[order].cumsum(dim=1), (1, 0)).gather(1, as_near)  # (rows, M), of the whole gallery
            own_class = torch.searchsorted(positives, reached, right=True) + (own >= 0)  # (rows, M)
            yield rows.cpu().numpy(), counts - own_class

    @cached_property
    def gallery_order(self) -> torch.Tensor:
        """`(G,)` the gallery's positions, sorted by label."""
        return torch.from_numpy(np.argsort(self.gallery_labels, kind="stable")).to(self.gallery.device)

    @cached_property
    def class_columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where in `gallery_order` each query's class starts and ends, and where the query is (-1: nowhere): `(Q,)`."""
        order = self.gallery_order.cpu().numpy()
        labels = self.gallery_labels[order]
        bounds = [np.searchsorted(labels, self.query_labels, side) for side in ("left", "right")]
        own = np.where(self.query_in_gallery < 0, -1, np.argsort(order)[self.query_in_gallery])
        start, end, own_place = torch.from_numpy(np.stack([*bounds, own])).to(self.query.device)
        return start, end, own_place

    def distances(self, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Distances of pairs: queries `(P,)` and items of the gallery `(P,)`, `(P,)` float64."""
        step = max(1, MAX_DIFFERENCES // self.query.shape[1])
        pairs = zip(queries.split(step), items.split(step))
        parts = [_cdist(self.query[some][:, None], self.gallery[others][:, None]) for some, others in pairs]
        return torch.cat([part.flatten() for part in parts]) if parts else self.query.new_empty(0, dtype=torch.float64)

    @cached_property
    def scale(self) -> float:
        """A power of two by which the points are neither very small nor very large."""
        largest = max(max(map(abs, map(float, points.aminmax()))) for points in (self.query, self.gallery))
        return 2.0 ** -min(max(math.frexp(largest)[1], -126), 126)

    def neighbors(self, chosen: np.ndarray, k: int) -> np.ndarray:
        """Finds the nearest gallery items of some queries, without the queries themselves.

        Args:
            chosen: `(C,)` positions of queries.
            k: how many; fewer where the gallery doesn't have that many for each query.

        Returns:
            `(C, k)` positions in the gallery, nearest first.
        """
        wanted = min(k, len(self.gallery) - bool((self.query_in_gallery >= 0).any()))
        gallery, found = self.gallery.double(), []
        for queries in np.array_split(np.asarray(chosen), math.ceil(len(chosen) / 64) or 1):
            distances = _cdist(self.query[torch.from_numpy(queries)], gallery)  # (rows, G)
            place = self.query_in_gallery[queries]
            distances[np.flatnonzero(place >= 0), place[place >= 0]] = torch.inf
            found.append(distances.argsort(dim=1, stable=True)[:, :wanted].cpu().numpy())
        return np.concatenate(found)

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
        not be told apart. Points that float32 can't tell from their cluster's center are clustered in float64.
        """
        points = _to_numpy(self.points if 1e-9 < self.scale < 1e9 else self.points * self.scale)  # (N, D)
        k = len(np.unique(self.labels))
        rng = np.random.default_rng(0)
        distinct, _, _ = _distinct_rows(self.points)
        start = rng.permutation(distinct)[:k]
        start = np.concatenate([start, rng.choice(len(points), k - len(start), replace=False)])  # (k,)
        if import_faiss() is not None:
            clusters, squared_distances = self._cluster_with_faiss(points, points[start])
            squared_norms = np.einsum("nd,nd->n", points, points)  # (N,)
            if np.median(squared_distances) > 1e-5 * np.median(squared_norms) or len(distinct) <= k:
                return clusters
        from sklearn.cluster import KMeans

        kmeans = KMeans(k, init=points[start].astype(np.float64), max_iter=20, n_init=1, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about equal points
            return kmeans.fit_predict(points.astype(np.float64))

    def _cluster_with_faiss(self, points: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clusters of points `(N, D)`, starting from centers `(k, D)`, and squared distances to the final centers."""
        faiss = import_faiss()
        kmeans = faiss.Clustering(points.shape[1], len(start))
        kmeans.niter, kmeans.seed = 20, 0
        kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = 1, 10**9  # or it drops points
        faiss.copy_array_to_vector(start.ravel(), kmeans.centroids)
        index = self._faiss_index()
        kmeans.train(points, index)
        squared_distances, clusters = index.search(points, 1)  # (N, 1) each
        return clusters[:, 0], squared_distances[:, 0]

    def _faiss_index(self) -> Any:
        """An empty index for exact search, on the embeddings' own CUDA device where faiss can use it."""
        faiss = import_faiss()
        index = faiss.IndexFlatL2(self.query.shape[1])
        if self.query.is_cuda and faiss.get_num_gpus() > 0:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.query.device.index or 0, index)
        return index


def _cdist(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean distances by differences in float64: `(…, A, D)` and `(…, B, D)` to `(…, A, B)`."""
    return torch.cdist(some.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _distinct_rows(points: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each distinct point first stands `(U,)`, which of them every point is `(N,)`, and how often `(U,)`."""
    rows = _to_numpy(points)
    rows = rows.view(np.dtype((np.void, rows.strides[0]))).ravel()  # (N,)
    _, first, which, repeats = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    return first, which, repeats


class _Products:
    """The gallery, for comparing distances by products in one precision.

    Points are moved by the gallery's mean and scaled, which changes no comparison. The score of an item g for a query q
    is q·g - ‖g‖²/2: the larger, the nearer.

    Args:
        space: the points.
        dtype: the precision.
    """

    def __init__(self, space: EmbeddingSpace, dtype: torch.dtype):
        self.space, self.dtype, self.scale = space, dtype, space.scale
        self.center = (space.gallery.mean(dim=0, dtype=torch.float64) * self.scale).to(dtype)  # (D,)
        self.gallery = self.prepare(space.gallery[space.gallery_order])  # (G, D + 2), sorted by label
        self.gallery[:, -2] = -0.5 * torch.linalg.vector_norm(self.gallery[:, :-2], dim=1).square()
        self.gallery[:, -1] = 1
        self.memory = self.gallery.new_empty(2, QUERY_TILE * GALLERY_TILE)  # for the scores of all tiles

    def prepare(self, points: torch.Tensor) -> torch.Tensor:
        """Points `(N, D)`, moved and scaled, with 1 and 0 behind each, for -‖g‖²/2 and an offset: `(N, D + 2)`."""
        dim = points.shape[1]
        prepared = torch.eye(1, dim + 2, dtype=self.dtype, device=points.device).roll(dim).repeat(len(points), 1)
        torch.mul(points.to(self.dtype), self.scale, out=prepared[:, :dim]).sub_(self.center)
        return prepared

    def score(self, queries: torch.Tensor, column: int) -> torch.Tensor:
        """Scores `(rows, columns)` of the gallery's tile from a column on, for prepared queries `(rows, D + 2)`."""
        items = self.gallery[column : column + GALLERY_TILE]
        scores = self.memory[0, : len(queries) * len(items)].view(len(queries), len(items))
        return torch.mm(queries, items.T, out=scores)

    def spare(self, scores: torch.Tensor) -> torch.Tensor:
        """More memory of the shape of scores."""
        return self.memory[1, : scores.numel()].view(scores.shape)


class _QueryTile:
    """Some queries, compared with the gallery.

    Scores are scaled so that rounding is far below 1. An item whose score is more than 1 above a threshold is at least
    as near as the positive, one whose score is below it is not. In between it is in doubt, and its distance is computed
    from differences. A query with many items in doubt is crowded, and given up.

    Args:
        products: the gallery.
        queries: `(rows,)` positions of at most QUERY_TILE queries, sorted by label.
        nearest_only: whether items are compared with each query's nearest positive only, or with all its positives.

    Attributes:
        counts: `(rows, M)` int64, for each positive, nearest first, the items of other classes at least as near.
        is_crowded: `(rows,)` bool, which queries' counts are not valid.
    """

    def __init__(self, products: _Products, queries: torch.Tensor, nearest_only: bool):
        self.products, self.queries, self.nearest_only = products, queries, nearest_only
        start, end, own = (columns[queries][:, None] for columns in products.space.class_columns)  # (rows, 1) each
        self.start, self.end, self.first, self.last = start, end, int(start.min()), int(end.max())
        points = products.prepare(products.space.query[queries])  # (rows, D + 2)
        positives = self._score_positives(points, own)  # (rows, M)
        # (rows, M) each, or (rows, 1): the scores of the positives that are compared, and which of the class they are
        wanted, self.places = positives.topk(1 if nearest_only else positives.shape[1], dim=1)

        # An item about as far away as a positive at distance d has ‖g‖ ≤ ‖q‖ + d, and products of D terms are off by up
        # to about eps √D ‖q‖ ‖g‖. Equal distances must be in doubt, too.
        precision = torch.finfo(products.dtype)
        squared = points[:, :-2].square().sum(dim=1, keepdim=True)  # (rows, 1)
        lowest = wanted.masked_fill(wanted.isinf(), torch.inf).amin(dim=1, keepdim=True)  # (rows, 1)
        squared_distance = (squared - 2 * lowest).clamp(min=0)  # (rows, 1)
        margin = 4 * precision.eps * math.sqrt(points.shape[1]) * (squared + squared_distance)  # (rows, 1)
        margin += 2 * (TIE - 1) * squared_distance + 1e6 * precision.tiny
        self.points = points * (0.5 / margin)  # (rows, D + 2)
        self.thresholds = (wanted * (0.5 / margin) - 0.5).masked_fill_(wanted.isinf(), torch.inf)  # (rows, M)
        if nearest_only:
            self.points[:, -1:] = -self.thresholds  # which the product then adds
        self.may_be_nearest = positives.isfinite() & (positives >= wanted[:, :1] - 2 * margin)  # (rows, M)

        self.counts = torch.zeros(wanted.shape, dtype=torch.int64, device=queries.device)
        self.is_crowded = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        self.num_doubts = points.new_zeros(len(queries))  # (rows,) about as many
        self.max_doubts = 64 + len(products.gallery) // 32
        self.doubts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # rows, positives and columns

    def _score_positives(self, points: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Scores `(rows, M)` of each query's class; -∞ for the query itself, and where its class has fewer items."""
        columns = self.start + torch.arange(int((self.end - self.start).max().clamp(min=1)), device=points.device)
        positives = torch.full(columns.shape, -torch.inf, dtype=points.dtype, device=points.device)  # (rows, M)
        for column in range(self.first, self.last, GALLERY_TILE):
            scores = self.products.score(points, column)  # (rows, columns)
            in_tile = (columns >= column) & (columns < column + scores.shape[1]) & (columns < self.end)
            found = scores.gather(1, (columns - column).clamp(0, scores.shape[1] - 1))  # (rows, M)
            positives = torch.where(in_tile, found, positives)
        return positives.masked_fill_(columns == own, -torch.inf)

    def count(self) -> None:
        """Counts the items of other classes that are at least as near as each positive."""
        is_few = self.nearest_only or self.thresholds.shape[1] <= MAX_IN_TURN
        compare = self._compare_in_turn if is_few else self._compare_by_search
        for column in range(0, len(self.products.gallery), GALLERY_TILE):
            scores = self.products.score(self.points, column)  # (rows, columns)
            if self.first < column + scores.shape[1] and column < self.last:
                columns = torch.arange(column, column + scores.shape[1], device=scores.device)  # (columns,)
                scores.masked_fill_((columns >= self.start) & (columns < self.end), -torch.inf)
            compare(scores, column)
            if self.is_crowded.all():
                return
        self._settle_doubts()

    def _compare_in_turn(self, scores: torch.Tensor, column: int) -> None:
        """Compares a tile's scores `(rows, columns)` with one threshold after the other; may overwrite them."""
        for positive, threshold in enumerate(self.thresholds.T):
            if self.nearest_only:
                above = scores  # the product has subtracted the threshold
            else:
                above = torch.sub(scores, threshold[:, None], out=self.products.spare(scores))
            reached = above.clamp_(0, 1)  # (rows, columns): 0, 1, or between where in doubt
            total = reached.sum(dim=1)  # (rows,)
            rows = total.nonzero()[:, 0]  # (some,)
            if 4 * len(rows) < len(total):  # a copy of more takes longer than it saves
                reached = reached.index_select(0, rows)  # (some, columns)
            else:
                rows = torch.arange(len(total), device=rows.device)
            total = total[rows]
            doubt = total - torch.linalg.vector_norm(reached, dim=1).square()  # (some,) Σ r (1 - r)
            chosen = (doubt > 0.01).nonzero()[:, 0]
            if len(chosen):
                self._add_doubts(rows[chosen], 4 * doubt[chosen])
                chosen = chosen[~self.is_crowded[rows[chosen]]]
                places, columns = _find(reached.index_select(0, chosen).sub_(0.5).abs_() < 0.5)
                total.index_add_(0, chosen[places], reached[chosen[places], columns], alpha=-1)
                self.doubts.append((rows[chosen[places]], torch.full_like(places, positive), columns + column))
            self.counts[rows, positive] += total.round().long()

    def _compare_by_search(self, scores: torch.Tensor, column: int) -> None:
        """The same with all thresholds at once, which is quicker where there are many."""
        num_positives = self.thresholds.shape[1]
        ascending = self.thresholds.masked_fill(self.thresholds.isinf(), -torch.inf).flip(1)  # (rows, M)
        ascending = F.pad(ascending, (0, 1), value=torch.inf)  # (rows, M + 1)
        certain = torch.sub(scores, 1, out=self.products.spare(scores))  # (rows, columns)
        passed = torch.searchsorted(ascending[:, :-1].contiguous(), certain, right=True)  # (rows, columns)
        histogram = torch.zeros(ascending.shape, dtype=torch.int64, device=scores.device)
        histogram.scatter_add_(1, passed, torch.ones_like(passed))  # (rows, M + 1)
        self.counts += histogram.flip(1).cumsum(dim=1)[:, :-1]
        rows, columns = (ascending.gather(1, passed) < scores).nonzero(as_tuple=True)
        self._add_doubts(slice(None), torch.bincount(rows, minlength=len(scores)))
        for chosen in (~self.is_crowded[rows]).nonzero()[:, 0].split(max(1, MAX_DIFFERENCES // num_positives)):
            above = scores[rows[chosen], columns[chosen]][:, None] - self.thresholds[rows[chosen]]  # (some, M)
            places, positives = ((above > 0) & (above < 1)).nonzero(as_tuple=True)
            self.doubts.append((rows[chosen][places], positives, columns[chosen][places] + column))

    def _add_doubts(self, rows: torch.Tensor | slice, numbers: torch.Tensor) -> None:
        """Adds up the items in doubt of some queries."""
        self.num_doubts[rows] += numbers
        self.is_crowded |= self.num_doubts > self.max_doubts

    def _settle_doubts(self) -> None:
        """Counts the items in doubt, by their distances."""
        if not self.doubts:
            return
        rows, positives, columns = (torch.cat(parts) for parts in zip(*self.doubts))
        kept = ~self.is_crowded[rows]
        rows, positives, columns = rows[kept], positives[kept], columns[kept]
        space = self.products.space
        distances = space.distances(self.queries[rows], space.gallery_order[columns])
        is_near = distances <= TIE * self._measure_positives(rows, positives)
        self.counts.index_put_((rows, positives), is_near.long(), accumulate=True)
        if not self.nearest_only:  # two positives may have stood in the wrong order
            self.counts = self.counts.masked_fill_(self.thresholds.isinf(), len(space.gallery)).sort(dim=1).values

    def _measure_positives(self, rows: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        """Distances `(some,)` float64 of queries `(some,)` to those of their positives `(some,)`."""
        space, shape = self.products.space, self.may_be_nearest.shape
        if self.nearest_only:
            asking, place = rows.unique(return_inverse=True)
            rows, places = self.may_be_nearest[asking].nonzero(as_tuple=True)
            distances = torch.full((len(asking), shape[1]), torch.inf, dtype=torch.float64, device=rows.device)
            items = space.gallery_order[self.start[asking[rows], 0] + places]
            distances[rows, places] = space.distances(self.queries[asking[rows]], items)
            return distances.amin(dim=1)[place]
        asked, place = (rows * shape[1] + positives).unique(return_inverse=True)
        rows, positives = asked // shape[1], asked % shape[1]
        items = space.gallery_order[self.start[rows, 0] + self.places[rows, positives]]
        return space.distances(self.queries[rows], items)[place]


def _find(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns where a mask is true, by NumPy, which is quicker than torch where few are."""
    places = np.flatnonzero(mask.cpu().numpy())
    rows, columns = torch.from_numpy(np.stack(np.divmod(places, mask.shape[1]))).to(mask.device)
    return rows, columns


_notice_once = cache(notice)  # not at every evaluation


def _to_numpy(points: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(points.cpu().numpy())


@cache
def import_faiss() -> Any:
    """The module faiss, or None, with a notice, where it can't be imported."""
    try:
        import faiss
    except ImportError:
        notice("faiss can't be imported: scikit-learn clusters, more slowly")
        return None
    return faiss


def has_several_classes(space: EmbeddingSpace) -> bool:
    """Whether there is more than one class: a clustering of a single one says nothing."""
    return len(np.unique(space.labels)) > 1


def nmi(space: EmbeddingSpace) -> float:
    """Normalized mutual information of clusters and labels, normalized by the arithmetic mean of their entropies.

    NaN where there is only one class.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(space.labels, space.clusters)) if has_several_classes(space) else math.nan


def f1(space: EmbeddingSpace) -> float:
    """F1 over pairs of points: precision of pairs in one cluster, recall of pairs of one class.

    NaN where there is only one class, or no pair.
    """
    from sklearn.metrics.cluster import pair_confusion_matrix

    if not has_several_classes(space):
        return math.nan
    (_, only_in_cluster), (only_in_class, in_both) = pair_confusion_matrix(space.labels, space.clusters)
    total = 2 * in_both + only_in_cluster + only_in_class
    return float(2 * in_both / total) if total else math.nan


def mean_over_queries(space: EmbeddingSpace, values: np.ndarray) -> float:
    """The mean of values `(Q,)` over the queries that have a positive; NaN where none has."""
    return float(values[space.has_positive].mean()) if space.has_positive.any() else math.nan


def recall_at_k(space: EmbeddingSpace, k: int) -> float:
    """Share of the queries with an item of their class among the k nearest."""
    return mean_over_queries(space, space.num_negatives_ahead < k)


def precision_at_1(space: EmbeddingSpace) -> float:
    """Share of the queries whose nearest item is of their class."""
    return recall_at_k(space, 1)


def r_precision(space: EmbeddingSpace) -> float:
    """Share of the R nearest items that are of the query's class, R being the number of its positives."""
    return mean_over_queries(space, space.precisions["r_precision"])


def map_at_r(space: EmbeddingSpace) -> float:
    """(1 / R) Σ_{i ≤ R} P@i · rel(i). Musgrave et al., A Metric Learning Reality Check, ECCV 2020, section 3.2."""
    return mean_over_queries(space, space.precisions["map_at_r"])


def mean_average_precision(space: EmbeddingSpace) -> float:
    """Mean over queries of the mean precision at the ranks of all their positives."""
    return mean_over_queries(space, space.precisions["map"])


def ami(space: EmbeddingSpace) -> float:
    """Mutual information of clusters and labels, adjusted for chance; NaN where there is only one class."""
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(space.labels, space.clusters)) if has_several_classes(space) else math.nan


def rho_spectrum(space: EmbeddingSpace) -> float:
    """KL(U‖S) of the uniform distribution and the normalized singular values. Roth et al., ICML 2020, section 5.

    NaN where there is only one singular value, or all are zero.
    """
    values = torch.linalg.svdvals(space.points.double())  # (min(N, D),)
    if len(values) < 2 or not values.any():
        return math.nan
    share = (values / values.sum()).clamp(min=1e-12)
    return float(-(share * len(share)).log().mean())


def directions(space: EmbeddingSpace) -> tuple[torch.Tensor, np.ndarray]:
    """All points but zeros, scaled to length 1, `(N, D)` float64, and their labels `(N,)`."""
    points = space.points.double()
    norms = torch.linalg.vector_norm(points, dim=1)  # (N,)
    kept = norms > 0  # (N,)
    return points[kept] / norms[kept, None], space.labels[kept.cpu().numpy()]


def uniformity(space: EmbeddingSpace) -> float:
    """log mean exp(-2 ‖x - y‖²) over pairs of normalized points. Wang & Isola, ICML 2020, equation 2.

    NaN where there is no pair.
    """
    points = directions(space)[0].float()  # (N, D)
    count = len(points)
    if count < 2:
        return math.nan
    total = sum(
        (4 * (rows @ points.T - 1)).exp().sum(dtype=torch.float64)  # ‖x - y‖² = 2 - 2 x·y
        for rows in points.split(QUERY_TILE)
    )
    return float(((total - count) / (count * (count - 1))).log())


def alignment(space: EmbeddingSpace) -> float:
    """Mean ‖x - y‖² over pairs of normalized points of a class. Wang & Isola, ICML 2020, equation 1 with α = 2.

    NaN where there is no pair.
    """
    _, spread, counts = class_means(*directions(space))  # (C,) each
    num_pairs = (counts * (counts - 1)).sum() / 2
    return float((counts * spread).sum() / num_pairs) if num_pairs else math.nan


def intra_inter_ratio(space: EmbeddingSpace) -> float:
    """Mean over classes of the mean cosine distance of their pairs, over the mean cosine distance of class means.

    Classes of one image are left out of the first. NaN below two classes, or where their means are the same.
    """
    means, spread, counts = class_means(*directions(space))  # (C, D), (C,), (C,)
    norms = torch.linalg.vector_norm(means, dim=1, keepdim=True)  # (C, 1)
    means = means / norms.clamp(min=torch.finfo(norms.dtype).tiny)  # (C, D)
    several = counts > 1
    if len(counts) < 2 or not several.any():
        return math.nan
    # n unit vectors x with mean m have a mean cosine distance of Σ ‖x - m‖² / (n - 1)
    intra = (spread[several] / (counts[several] - 1)).mean()
    inter = (means - means.mean(dim=0)).square().sum().item() / (len(counts) - 1)
    is_rounding = inter < 1e-14  # of float32 embeddings
    return math.nan if is_rounding else float(intra / inter)


def class_means(points: torch.Tensor, labels: np.ndarray) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The mean m of each class's points x, `(C, D)`, Σ ‖x - m‖² `(C,)`, and the number of its points `(C,)`."""
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    of_point = torch.from_numpy(place).to(points.device)  # (N,)
    sums = torch.zeros(len(classes), points.shape[1], dtype=points.dtype, device=points.device)
    means = sums.index_add_(0, of_point, points) / torch.from_numpy(counts).to(points)[:, None]  # (C, D)
    squared = (points - means[of_point]).square().sum(dim=1)  # (N,)
    return means, sums.new_zeros(len(classes)).index_add_(0, of_point, squared).cpu().numpy(), counts


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
    """Computes the metrics inside each coarser class, and their mean.

    Coarser classes in which every item is right, since they hold a single class, or in which no query has anything to
    find, are left out, with a notice that counts them.

    Args:
        space: all points.
        query_parents: `(Q,)` coarser labels of the queries.
        gallery_parents: `(G,)` coarser labels of the gallery.
        k_vals: the k of Recall @ k.
        names: keys of `METRICS`.

    Raises:
        UserError: no coarser class is left.
    """
    metrics_by_parent = []
    parents = np.unique(query_parents)
    for parent in parents:
        queries, items = np.flatnonzero(query_parents == parent), np.flatnonzero(gallery_parents == parent)
        place = space.query_in_gallery[queries]
        if len(np.unique(space.gallery_labels[items])) < 2:
            continue
        inside = EmbeddingSpace(
            space.query[torch.from_numpy(queries)],
            space.query_labels[queries],
            space.gallery[torch.from_numpy(items)],
            space.gallery_labels[items],
            np.where(place < 0, -1, np.searchsorted(items, place)),
        )
        if inside.has_positive.any():
            metrics_by_parent.append(evaluate_space(inside, k_vals, names))
    num_left_out = len(parents) - len(metrics_by_parent)
    what = "coarser classes hold a single class, or no query with another image of its class"
    if not metrics_by_parent:
        raise UserError(f"all {num_left_out} {what}: WithSameParentLabel has nothing to compare")
    if num_left_out:
        _notice_once(f"{num_left_out} of {len(parents)} {what}: they are left out of every metric")
    return {name: nanmean([metrics[name] for metrics in metrics_by_parent]) for name in metrics_by_parent[0]}


def nanmean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


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
        UserError: no query of a set has anything to find, or it can find nothing else.
    """
    metrics: dict[str, float] = {}
    spaces = [build_space(one_set) for one_set in points]
    for position, (one_set, space) in enumerate(zip(points, spaces)):
        if not space.has_positive.any():
            raise UserError(
                f"{one_set.name}: no query's class is among the images that it is compared to: choose another "
                "--eval_reference_set, or other --splits_to_eval"
            )
        if len(np.unique(space.gallery_labels)) < 2:
            raise UserError(f"{one_set.name}: all images are of one class, so there is nothing to tell apart")
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
