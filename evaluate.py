"""Embeddings and metrics: `embed`, `EmbeddingSpace`, `METRICS`, `evaluate`.

A metric is a function `space -> float` or `(space, k) -> float` and its row in `METRICS`. NMI and F1 judge a k-means
clustering; retrieval metrics rank by Euclidean distance, exclude the query by its index, and count ties against the
network.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import FlagParser, Progress, UserError, from_first_rank, gather_rows, notice, number, shown

if TYPE_CHECKING:
    from datasets import ImageLoader, RetrievalSet

QUERY_TILE, GALLERY_TILE = 1024, 1024  # products of this shape stay in the cache
FORGET_EVERY = 2  # comparisons of a tile, after which positives too far away to matter are left out
MAX_MARGINS = 4.0  # of the median rounding error, which queries that share products may have
MAX_IN_TURN = 16  # thresholds that are compared with one after the other
MAX_DIFFERENCES = 2**19  # coordinates that are subtracted at once
MAX_POSITIVES = 2**20  # scores of positives that are compared at once
MAX_ROWS = 2**25  # scores that are ranked at once, each query's in one piece
ITERATIONS = 20  # of k-means
MAX_RANKED = 2**21  # distances that a ranking gives at once
MAX_CELLS = 2**16  # that a query's scores are sorted into, to rank only those near a positive's
TIE = 1 + 1e-14  # distances in float64 that differ by less are equal: their last bits depend on the order of sums
CELL_BITS = 4  # of the 23 bits after the point of a squared distance in float32, which verification drops
MAX_OCTAVES = 60  # powers of two of squared distances that verification tells from 0: beyond, float32 ends


KMEANS = ("own", "faiss")


@dataclass(frozen=True)
class Clustering:
    """How points are clustered for NMI, AMI and F1.

    Attributes:
        method: one of `KMEANS`.
        restarts: the number of clusterings, from different points, over which these metrics are averaged.
    """

    method: str = "own"
    restarts: int = 1


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of metrics, and of what is done with them while training."""
    # fmt: off
    add = parser.add_argument_group("metrics", protocol=True).add_argument
    add("--eval_metrics", nargs="+", default=list(LITERATURE), type=metric_name, choices=MetricNames(),
        metavar="METRIC", compared=False,
        help=f"metrics that every evaluation computes: {', '.join(METRICS)}; Recall @ 1 is always among them. Recall "
        f"and Precision are computed for --k_vals, FNMR at the FMR {' and '.join(map(str, FMRS))}; a name with a "
        "number, such as 'Precision @ 10' or 'FNMR @ 1e-4', asks for that one. nDCG and H-AP use all label levels from "
        "--label_hierarchy_level on. ROC AUC, EER, FNMR and the two of verification judge all pairs of images; "
        "Verification accuracy needs validation classes, which choose its threshold")
    add("--k_vals", type=number(int, 1), nargs="+", metavar="K", compared=False,
        help="the k of Recall @ k; 1 is always among them (default: depends on the dataset)")
    add("--testing_method", choices=TESTING_METHODS, default=TESTING_METHODS[0],
        help="WithSameParentLabel: metrics inside each class of the next coarser label level, and their mean")
    add("--kmeans", choices=KMEANS, default="own", compared=False,
        help="what clusters embeddings for NMI, AMI and F1, by 20 iterations from the same points: own, which compares "
        "only with the centers that moved, or faiss, as earlier versions did; they differ by rounding")
    add("--kmeans_restarts", type=number(int, 1), default=1, metavar="N", compared=False,
        help="average NMI, AMI and F1 over N clusterings from different points")
    add("--meta_testing_method", choices=("ConcatenateEmbeddings",), compared=False, needs="cross_validation",
        help="with folds: also evaluate the concatenated embeddings of the folds' best networks")
    add("--normalize_members", action="switch", default=True, compared=False, needs="cross_validation",
        help="ConcatenateEmbeddings: scale each network's embeddings to length 1, so that all count alike")

    add = parser.add_argument_group("selection").add_argument
    add("--eval_metric_for_best_epoch", default="Recall @ 1", type=metric_name, metavar="METRIC", fixed=True,
        protocol=True,
        help="metric that selects the best epoch, such as Recall @ 4 or MAP@R; on the validation classes, if any")
    add("--save_interval", type=number(int, 1), default=1, help="epochs between evaluations")
    add("--splits_to_eval", nargs="+", choices=("train", "val", "test"), fixed=True, compared=False,
        help="images to evaluate while training, beside the validation classes, which alone select the epoch (default: "
        "with --split_scheme predefined also the test classes, which select it where there are no validation classes); "
        "with --evaluate: images to evaluate (default: test)")
    add("--patience", type=number(int, 1),
        help="stop when the selecting metric has not improved for this many epochs (default: never)")
    add("--check_untrained_accuracy", action="switch", compared=False,
        help="also evaluate before training: the network as epoch 0, its backbone's features as epoch -1")
    # fmt: on


def give_clustering(opt: argparse.Namespace) -> Clustering:
    """How the flags say that points are clustered."""
    return Clustering(opt.kmeans, opt.kmeans_restarts)


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
    own = torch.cat([net(images.to(device, non_blocking=True)).float() for images, _, _ in batches])
    return gather_rows(own, len(loader.dataset)) if getattr(loader, "is_shared", False) else own


Ranking = Callable[[torch.Tensor], torch.Tensor]  # see EmbeddingSpace.ranking


class EmbeddingSpace:
    """Queries and the gallery that they search; what metrics share is computed once, when first asked for.

    Args:
        query: `(Q, D)` embeddings.
        query_labels: `(Q,)` integers, or `(Q, H)` with one column per level of the hierarchy, the finest first.
        gallery: `(G, D)` embeddings; without them the queries are the gallery, and no query finds itself.
        gallery_labels: `(G,)` or `(G, H)` integers.
        query_in_gallery: `(Q,)` the position of each query in the gallery, where the query does not find itself; -1 for
            a query that is not in the gallery. Without it none is.

    Attributes:
        query_labels, gallery_labels: `(Q,)` and `(G,)` labels of the finest level.
        query_hierarchy, gallery_hierarchy: `(Q, H)` and `(G, H)` labels of every level.
        num_positives: `(Q,)` the number of items that each query should find (R).
        has_positive: `(Q,)` bool, whether there are any; queries without don't count in retrieval metrics.
        counted_k: the k for which `precisions` counts, from `count_at`; with ∞, all ranks.
        clustering: how points are clustered.
        threshold: the distance up to which verification takes a pair for one class, chosen on other images; NaN where
            it should be, and is not known. None: it is chosen on these images.
        ranking: gives other distances to rank by than Euclidean ones: of queries `(rows,)` to the whole gallery,
            `(rows, G)` float64, at least 0 and 0 from a query to itself. What judges pairs or clusters ignores it.

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
        self.query_hierarchy = _as_columns(query_labels)  # (Q, H)
        self.gallery = self.query if gallery is None else torch.as_tensor(gallery).float()  # (G, D)
        self.gallery_hierarchy = self.query_hierarchy if gallery_labels is None else _as_columns(gallery_labels)
        self.query_labels, self.gallery_labels = self.query_hierarchy[:, 0], self.gallery_hierarchy[:, 0]
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
        self.counted_k: set[float] = set()
        self.threshold: float | None = None
        self.ranking: Ranking | None = None
        self.clustering = Clustering()

    def with_labels(self, query_labels: np.ndarray, gallery_labels: np.ndarray) -> EmbeddingSpace:
        """The same points with other labels `(Q, H)` and `(G, H)`."""
        space = EmbeddingSpace(self.query, query_labels, self.gallery, gallery_labels, self.query_in_gallery)
        space.ranking, space.clustering = self.ranking, self.clustering
        return space

    @cached_property
    def num_negatives_ahead(self) -> np.ndarray:
        """For each query the number of items of other classes at least as near as its nearest positive, `(Q,)` int64.

        The query finds a positive among its k nearest, ties counted against it, when this is below k. 0 where there is
        none.
        """
        ahead = np.empty(len(self.query), np.int64)
        for queries, counts in self._count_negatives(nearest_only=True):
            ahead[queries] = counts[:, 0].cpu().numpy()
        return ahead * self.has_positive

    @cached_property
    def reciprocal_ranks(self) -> np.ndarray:
        """`(Q,)` one over the rank of each query's nearest positive, ties against it."""
        return 1 / (1 + self.num_negatives_ahead)

    def precision_at(self, k: int) -> np.ndarray:
        """`(Q,)` the share of each query's k nearest items that are of its class, ties against it.

        A gallery of fewer items counts as a whole.
        """
        if k == 1:
            return ((self.num_negatives_ahead < 1) & self.has_positive).astype(np.float64)
        self.count_at([k])
        num_items = len(self.gallery) - (self.query_in_gallery >= 0)  # (Q,)
        return self.precisions[f"found_at_{k}"] / num_items.clip(1, k)

    def count_at(self, k_vals: Iterable[float]) -> None:
        """Makes `precisions` count for these k, too, which takes another pass where it has counted without them."""
        if not self.counted_k.issuperset(new := set(k_vals) - {1}):
            self.counted_k |= new
            vars(self).pop("precisions", None)

    @property
    def average_precisions(self) -> np.ndarray:
        """`(Q,)` the mean precision at the ranks of each query's positives, ties against it."""
        self.count_at([math.inf])
        return self.precisions["map"]

    @property
    def discounted_gains(self) -> np.ndarray:
        """`(Q,)` Σ 1 / log₂(1 + rank) over each query's positives, ties against it."""
        self.count_at([math.inf])
        return self.precisions["dcg"]

    @cached_property
    def precisions(self) -> dict[str, np.ndarray]:
        """For each query `(Q,)` its R-precision and AP@R (`map_at_r`), ties against it.

        R is the number of its positives. The j-th nearest of them has rank j + (negatives at least as near). Further,
        for the k in `counted_k` how many positives are among its k nearest items (`found_at_10`), and with ∞ in it,
        which takes longer, `average_precisions` (`map`) and `discounted_gains` (`dcg`).
        """
        found_at = {int(k): f"found_at_{k}" for k in self.counted_k - {math.inf}}
        of_all = ("map", "dcg") if self.depth is None else ()
        results = {name: np.zeros(len(self.query)) for name in ("r_precision", "map_at_r", *of_all, *found_at.values())}
        ahead = np.zeros(len(self.query), np.int64)
        num_positives = torch.from_numpy(self.num_positives)
        for queries, counts in _in_parts(self._count_negatives(nearest_only=False)):
            found = torch.arange(1, counts.shape[1] + 1)  # (M,) the j of the j-th nearest positive
            r = num_positives[queries][:, None]  # (rows, 1)
            ahead[queries] = counts[:, 0].numpy()
            rank = found + counts  # (rows, M)
            precision = (found / rank.double()).masked_fill_(found > r, 0)  # (rows, M)
            within_r = (rank <= r) & (found <= r)  # (rows, M)
            totals = {"r_precision": within_r.sum(dim=1), "map_at_r": (precision * within_r).sum(dim=1)}
            if of_all:
                totals["map"] = precision.sum(dim=1)
                gains = (1 / rank.double().add_(1).log2_()).masked_fill_(found > r, 0)
                results["dcg"][queries] = gains.sum(dim=1).numpy()
            for name, total in totals.items():
                results[name][queries] = (total.double() / r[:, 0].clamp(min=1)).numpy()
            for k, name in found_at.items():
                results[name][queries] = ((rank <= k) & (found <= r)).sum(dim=1).numpy()
        vars(self).setdefault("num_negatives_ahead", ahead * self.has_positive)  # which need no pass of their own now
        return results

    @property
    def depth(self) -> np.ndarray | None:
        """`(Q,)` the last rank that matters to `precisions`; None where all do."""
        largest = max(self.counted_k, default=0)
        return None if largest == math.inf else self.num_positives.clip(int(largest))

    @cached_property
    def levels(self) -> list[EmbeddingSpace]:
        """The same points at each level of the hierarchy, the finest first.

        Raises:
            UserError: a class belongs to several classes of the next coarser level.
        """
        both = np.concatenate([self.query_hierarchy, self.gallery_hierarchy])  # (Q + G, H)
        spaces = [self]
        for level in range(1, both.shape[1]):
            if len(np.unique(both[:, level - 1 : level + 1], axis=0)) > len(np.unique(both[:, level - 1])):
                raise UserError(
                    f"a class of label level {level - 1} belongs to several classes of level {level}, so H-AP and nDCG "
                    "are not defined: correct the labels, or leave these metrics out"
                )
            spaces.append(self.with_labels(self.query_hierarchy[:, level:], self.gallery_hierarchy[:, level:]))
        return spaces

    @cached_property
    def ndcg(self) -> np.ndarray:
        """`(Q,)` the normalized discounted cumulative gain of each query, ties against it.

        An item's relevance is the number of label levels that it shares with the query. An item gains 2^rel - 1; with
        H levels that is Σ_{l ≤ rel} 2^(l - 1), and so the gain is a sum over levels of that of two relevances.
        """
        weights = [2.0**level for level in reversed(range(len(self.levels)))]  # of the finest level first
        largest = max(int(space.num_positives.max(initial=0)) for space in self.levels)
        ideal = np.append(0, np.cumsum(1 / np.log2(np.arange(2, largest + 2))))  # (R + 1,) by number of positives
        gained = sum(weight * space.discounted_gains for weight, space in zip(weights, self.levels))
        possible = sum(weight * ideal[space.num_positives] for weight, space in zip(weights, self.levels))
        return np.divide(gained, possible, out=np.zeros(len(self.query)), where=np.asarray(possible) > 0)

    @cached_property
    def hierarchical_precisions(self) -> np.ndarray:
        """`(Q,)` the hierarchical average precision of each query, ties against it.

        An item that shares l of H label levels with the query has the relevance l / (number of such items), though not
        more than one that shares further levels. A sum over items before another one of the smaller of their relevances
        is a sum over levels of numbers of items; hence the result is a weighted mean of the levels' average precisions.
        """
        num_positives = np.stack([space.num_positives for space in self.levels])  # (H, Q)
        num_new = np.diff(num_positives, axis=0, prepend=0)  # (H, Q) items that share no finer level
        num_shared = np.arange(len(self.levels), 0, -1)[:, None]  # (H, 1)
        relevance = np.where(num_new > 0, num_shared / num_new.clip(1), np.inf)
        relevance = np.minimum.accumulate(relevance, axis=0)  # (H, Q)
        relevance[np.isinf(relevance)] = 0
        weights = -np.diff(relevance, axis=0, append=0) * num_positives  # (H, Q)
        gained = sum(weight * space.average_precisions for weight, space in zip(weights, self.levels))
        possible = weights.sum(axis=0)
        return np.divide(gained, possible, out=np.zeros(len(self.query)), where=possible > 0)

    @cached_property
    def pairs(self) -> PairCounts:
        """All pairs of a query and an item, each once; an image with itself is none."""
        histogram = _PairHistogram(self)
        for queries in torch.from_numpy(np.argsort(self.query_labels, kind="stable")).split(QUERY_TILE):
            histogram.add(queries.to(self.query.device))
        return histogram.collect()

    def _count_negatives(self, nearest_only: bool) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Counts, for positives of each query, the items of other classes that are at least as near.

        Products in float32 tell most distances apart. Where embeddings crowd around several points they don't: these
        queries are counted by products in float64, and those that are still left by differences.

        Yields:
            Some queries: their positions `(rows,)`, and counts `(rows, M)`, for the nearest positive only or for all
            of them, nearest first; a query with fewer positives has counts without meaning at the end. Behind the
            nearest one, counts of `depth` and more may be too low.
        """
        waiting = torch.from_numpy(np.argsort(self.query_labels, kind="stable")).to(self.query.device)  # by label
        if self.ranking is not None:
            yield from self._count_by_ranking(self.ranking, waiting, nearest_only)
            return
        crowded = [waiting[:0]]
        if nearest_only or self.num_positives.max(initial=0) <= MAX_IN_TURN:
            products = _Products(self, torch.float32)
            if self.is_own and len(waiting):
                waiting = yield from self._count_in_squares(products, waiting, nearest_only, crowded)
            yield from self._count_in_rows(products, waiting, nearest_only, crowded)
            waiting = torch.cat(crowded)
        crowded = [waiting[:0]]  # with many positives, too many are in doubt in float32
        if len(waiting):
            yield from self._count_in_rows(_Products(self, torch.float64), waiting, nearest_only, crowded)
        if len(waiting := torch.cat(crowded)):
            yield from self._count_by_differences(waiting, nearest_only)

    def _count_in_rows(
        self, products: _Products, waiting: torch.Tensor, nearest_only: bool, crowded: list[torch.Tensor]
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """`_count_negatives` of some queries by products of each with the whole gallery; adds those that are left."""
        for queries in waiting.split(QUERY_TILE if nearest_only else self._rows_at_once) if len(waiting) else ():
            tile = _QueryTile(products, queries, nearest_only)
            tile.count()
            yield queries[~tile.is_crowded].cpu().numpy(), tile.counts[~tile.is_crowded]
            crowded.append(queries[tile.is_crowded])

    def _count_in_squares(
        self, products: _Products, waiting: torch.Tensor, nearest_only: bool, crowded: list[torch.Tensor]
    ) -> Generator[tuple[np.ndarray, torch.Tensor], None, torch.Tensor]:
        """The same of all points against themselves: the product of a pair serves both points.

        Returns:
            The queries whose rounding errors are much larger than most others', which take products of their own.
        """
        tiles = [_QueryTile(products, queries, nearest_only) for queries in waiting.split(QUERY_TILE)]
        margin = torch.cat([tile.margin for tile in tiles])  # (Q, 1)
        largest = torch.minimum(MAX_MARGINS * margin.median(), margin.max())
        for tile in tiles:
            tile.share_products(largest)
        for first, tile in enumerate(tiles):
            tile.compare_among(tiles[first:])
        left = [waiting[:0]]
        for tile in tiles:
            tile.settle_doubts()
            done = ~tile.is_crowded & tile.is_shared
            yield tile.queries[done].cpu().numpy(), tile.counts[done]
            crowded.append(tile.queries[tile.is_crowded & tile.is_shared])
            left.append(tile.queries[~tile.is_shared])
        return torch.cat(left)

    @property
    def is_own(self) -> bool:
        """Whether the queries are the gallery, each at its place."""
        return self.gallery is self.query and np.array_equal(self.query_in_gallery, np.arange(len(self.query)))

    @property
    def _rows_at_once(self) -> int:
        """Queries that are compared at once with all their positives: fewer where classes or the gallery are large."""
        largest = int(self.num_positives.max(initial=0))
        if largest <= MAX_IN_TURN:
            return QUERY_TILE
        return max(1, min(QUERY_TILE, MAX_POSITIVES // largest, MAX_ROWS // len(self.gallery)))

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

    def _count_by_ranking(
        self, ranking: Ranking, waiting: torch.Tensor, nearest_only: bool
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """The same as `_count_negatives` of some queries, by the distances that a ranking gives."""
        for rows in waiting.split(max(1, MAX_RANKED // len(self.gallery))) if len(waiting) else ():
            distances = ranking(rows)  # (rows, G)
            start, end, own = (columns[rows][:, None] for columns in self.class_columns)  # (rows, 1) each
            columns = start + torch.arange(int((end - start).max().clamp(min=1)), device=rows.device)  # (rows, M)
            items = self.gallery_order[columns.clamp(max=len(self.gallery) - 1)]  # (rows, M)
            positives = distances.gather(1, items)  # (rows, M)
            positives = positives.masked_fill_((columns >= end) | (columns == own), torch.inf).sort(dim=1).values
            reached = TIE * (positives[:, :1] if nearest_only else positives)  # (rows, M)
            first = torch.searchsorted(reached, distances)  # (rows, G), of the positives that are at least as far away
            as_near = first.new_zeros(len(rows), reached.shape[1] + 1).scatter_add_(1, first, torch.ones_like(first))
            own_class = torch.searchsorted(positives, reached, right=True) + (own >= 0)  # (rows, M)
            yield rows.cpu().numpy(), as_near.cumsum(dim=1)[:, :-1] - own_class

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
            rows = torch.from_numpy(queries).to(gallery.device)
            distances = self.ranking(rows) if self.ranking else _cdist(self.query[rows], gallery)  # (rows, G)
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
        """`(N,)` the k-means cluster of every point, see `cluster`."""
        return self.cluster()

    @cached_property
    def clusterings(self) -> list[np.ndarray]:
        """Clusters `(N,)` of the points from each start."""
        return [self.clusters, *map(self.cluster, range(1, self.clustering.restarts))]

    def cluster(self, restart: int = 0) -> np.ndarray:
        """Clusters all points: 20 iterations of k-means, k = number of their classes, `(N,)`.

        It starts from k random points, others for each restart, which differ as far as possible: otherwise classes
        whose points coincide would not be told apart. Points that float32 can't tell from their cluster's center are
        clustered in float64.
        """
        k = len(np.unique(self.labels))
        rng = np.random.default_rng(restart)
        distinct, _, _ = _distinct_rows(self.points)
        start = rng.permutation(distinct)[:k]
        start = np.concatenate([start, rng.choice(len(self.points), k - len(start), replace=False)])  # (k,)
        if self.clustering.method == "faiss" and import_faiss() is not None:
            clusters, spread = self._cluster_with_faiss(start)
        else:
            clusters, spread = self._cluster_by_own(start, torch.float32)
        if spread <= 1e-5 and len(distinct) > k:
            clusters, _ = self._cluster_by_own(start, torch.float64)
        return clusters

    def _cluster_by_own(self, start: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, float]:
        """Clusters of the points, from those in which the centers start `(k,)`, and their `_KMeans.spread`."""
        kmeans = _KMeans(self, torch.from_numpy(start).to(self.points.device), dtype)
        kmeans.run(ITERATIONS)
        return kmeans.clusters.cpu().numpy(), kmeans.spread()

    def _cluster_with_faiss(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """The same by faiss."""
        faiss = import_faiss()
        points = _to_numpy(self.points if 1e-9 < self.scale < 1e9 else self.points * self.scale)  # (N, D)
        kmeans = faiss.Clustering(points.shape[1], len(start))
        kmeans.niter, kmeans.seed = ITERATIONS, 0
        kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = 1, 10**9  # or it drops points
        faiss.copy_array_to_vector(points[start].ravel(), kmeans.centroids)
        index = self._faiss_index()
        kmeans.train(points, index)
        squared_distances, clusters = index.search(points, 1)  # (N, 1) each
        squared_norms = np.einsum("nd,nd->n", points, points)  # (N,)
        tiny = np.finfo(np.float32).tiny
        return clusters[:, 0], float(np.median(squared_distances) / np.maximum(np.median(squared_norms), tiny))

    def _faiss_index(self) -> Any:
        """An empty index for exact search, on the embeddings' own CUDA device where faiss can use it."""
        faiss = import_faiss()
        index = faiss.IndexFlatL2(self.query.shape[1])
        if self.query.is_cuda and faiss.get_num_gpus() > 0:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), self.query.device.index or 0, index)
        return index


class _KMeans:
    """k-means by Lloyd's iterations, which compare points only with the centers that moved.

    A point is compared with all centers only where its own one has moved away from it: no center that stayed is nearer
    than its own one was. Apart from rounding the result is that of faiss, whose iterations compare all with all.

    Args:
        space: of which all points `(N, D)` are clustered.
        start: `(k,)` the points where the centers start.
        dtype: the precision.

    Attributes:
        clusters: `(N,)` int64, the nearest center of each point.
        squared: `(N,)` squared distances to it, of the scaled points.
    """

    def __init__(self, space: EmbeddingSpace, start: torch.Tensor, dtype: torch.dtype):
        self.points, self.scale, self.dtype = space.points, space.scale, dtype
        self.mean = (self.points.mean(dim=0, dtype=torch.float64) * self.scale).to(dtype)  # (D,)
        self.centers = self._prepare(start)  # (k, D)
        self.clusters = torch.zeros(len(self.points), dtype=torch.int64, device=self.points.device)
        self.squared = torch.full_like(self.clusters, torch.inf, dtype=dtype)

    def run(self, iterations: int) -> None:
        """Moves the centers so many times, or until they stay, and assigns each point to the nearest one."""
        moved = torch.arange(len(self.centers), device=self.clusters.device)
        for iteration in range(iterations):
            before = self.clusters.clone()
            self._assign(moved)
            changed = self.clusters != before
            if iteration > 0:
                moved = torch.cat([before[changed], self.clusters[changed]]).unique()
            moved = self._move(moved)
            if len(moved) == 0:
                return
        self._assign(moved)

    def spread(self) -> float:
        """The median squared distance of points to their centers, as a share of that to the mean of all points."""
        to_mean = torch.cat([self._prepare(rows).square().sum(dim=1) for rows in self._parts()])  # (N,)
        return float(self.squared.median() / to_mean.median().clamp(min=torch.finfo(self.dtype).tiny))

    def _parts(self, rows: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        """All points, or those `(rows,)`, in parts."""
        rows = torch.arange(len(self.points), device=self.points.device) if rows is None else rows
        return rows.split(max(1, MAX_ROWS // self.points.shape[1])) if len(rows) else ()

    def _prepare(self, rows: torch.Tensor) -> torch.Tensor:
        """Points `(rows,)`, scaled, and moved by their mean, `(rows, D)`: then their products are exact."""
        return self.points[rows].to(self.dtype).mul_(self.scale).sub_(self.mean)

    def _is_among(self, chosen: torch.Tensor) -> torch.Tensor:
        """`(N,)` bool, which points have their center among those `(chosen,)`."""
        is_chosen = torch.zeros(len(self.centers), dtype=torch.bool, device=chosen.device)
        return is_chosen.index_fill_(0, chosen, True)[self.clusters]

    def _assign(self, moved: torch.Tensor) -> None:
        """Assigns each point to its nearest center, where centers `(moved,)` are elsewhere than before."""
        is_open = torch.ones_like(self.clusters, dtype=torch.bool)  # (N,) which points are compared with all centers
        if len(moved) < len(self.centers):
            is_open = self._is_among(moved)
            for rows in self._parts(is_open.nonzero()[:, 0]):
                squared = (self._prepare(rows) - self.centers[self.clusters[rows]]).square_().sum(dim=1)  # (rows,)
                is_open[rows] = squared > self.squared[rows]
                self.squared[rows] = squared
            self._search((~is_open).nonzero()[:, 0], moved)
        self.squared[is_open] = torch.inf
        self._search(is_open.nonzero()[:, 0], torch.arange(len(self.centers), device=moved.device))

    def _search(self, chosen: torch.Tensor, among: torch.Tensor) -> None:
        """Compares points `(chosen,)` with centers `(among,)`."""
        search = _make_search(self.centers[among])
        for rows in self._parts(chosen):
            squared, place = search(self._prepare(rows))
            is_nearer = squared < self.squared[rows]
            self.clusters[rows] = torch.where(is_nearer, among[place], self.clusters[rows])
            self.squared[rows] = torch.where(is_nearer, squared, self.squared[rows])

    def _move(self, chosen: torch.Tensor) -> torch.Tensor:
        """Moves centers `(chosen,)` to the means of their points; returns those that moved."""
        sizes = torch.bincount(self.clusters, minlength=len(self.centers))  # (k,)
        sums = torch.zeros_like(self.centers, dtype=torch.float64)  # (k, D)
        for rows in self._parts(self._is_among(chosen).nonzero()[:, 0]):
            sums.index_add_(0, self.clusters[rows], self._prepare(rows).double())
        moved = chosen[sizes[chosen] > 0]
        self.centers[moved] = (sums[moved] / sizes[moved, None]).to(self.dtype)
        fill = self._split if self.dtype == torch.float32 else self._move_far  # points crowd closer than splits reach
        return torch.cat([moved, *fill(sizes.cpu().numpy())]).unique()

    def _move_far(self, sizes: np.ndarray) -> list[torch.Tensor]:
        """Moves each center without points to one of the points farthest from their centers; returns which moved."""
        empty = torch.from_numpy(np.flatnonzero(sizes == 0)).to(self.centers.device)
        squared, farthest = self.squared.topk(len(empty))
        is_apart = squared > 0
        self.centers[empty[is_apart]] = self._prepare(farthest[is_apart])
        return [empty[is_apart]]

    def _split(self, sizes: np.ndarray) -> list[torch.Tensor]:
        """Gives each center without points half of those of another one; returns which moved.

        As in faiss, the two centers lie on both sides of where the one was.
        """
        signs = 1 - 2 * (torch.arange(self.centers.shape[1], device=self.centers.device) % 2)  # (D,)
        split = []
        for empty, other in _choose_splits(sizes):
            offset = (self.centers[other] + self.mean) * signs / 1024  # (D,)
            self.centers[empty] = self.centers[other] + offset
            self.centers[other] -= offset
            split.append(torch.tensor([empty, other], device=self.centers.device))
        return split


def _choose_splits(sizes: np.ndarray) -> Iterator[tuple[int, int]]:
    """For clusters of sizes `(k,)`, each of them that is empty, and another one, which is split for it.

    As in faiss, and with its random numbers: clusters are asked in turn, larger ones agree more often.
    """
    generator, draws = np.random.MT19937(), np.zeros(0)
    generator._legacy_seeding(1234)
    sizes, num_spare = sizes.copy(), sizes.sum() - len(sizes)
    for empty in np.flatnonzero(sizes == 0):
        asked = 0
        while True:
            if len(draws) == 0:
                draws = generator.random_raw(len(sizes)) / (2**32 - 1)
            turns = np.arange(asked, asked + len(draws)) % len(sizes)
            agreed = np.flatnonzero(draws * num_spare < sizes[turns] - 1)
            if len(agreed):
                break
            asked, draws = asked + len(draws), draws[:0]
        other, draws = int(turns[agreed[0]]), draws[agreed[0] + 1 :]
        sizes[empty] = sizes[other] // 2
        sizes[other] -= sizes[empty]
        yield int(empty), other


def _make_search(centers: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """A function of points `(rows, D)` that finds the squared distance of each to the nearest center, and which it is.

    On the CPU faiss does it in float32, several times as quickly as products and their maxima.
    """
    if centers.device.type == "cpu" and centers.dtype == torch.float32 and import_faiss() is not None:
        index = import_faiss().IndexFlatL2(centers.shape[1])
        index.add(centers.numpy())

        def search(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            squared, place = index.search(points.numpy(), 1)
            return torch.from_numpy(squared[:, 0]), torch.from_numpy(place[:, 0])

        return search

    lengths = centers.square().sum(dim=1)  # (k,)

    def search_by_products(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [torch.addmm(lengths, part, centers.T, alpha=-2).min(dim=1) for part in points.split(QUERY_TILE)]
        squared, place = (torch.cat(pieces) for pieces in zip(*parts))
        return (squared + points.square().sum(dim=1)).clamp_(min=0), place

    return search_by_products


def _in_parts(counted: Iterable[tuple[np.ndarray, torch.Tensor]]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Queries `(rows,)` and their counts `(rows, M)`, on the CPU, in parts that stay in its cache."""
    for queries, counts in counted:
        step = 1 + MAX_CELLS // counts.shape[1]
        for start in range(0, len(queries), step):
            yield queries[start : start + step], counts[start : start + step].cpu()


def _as_columns(labels: np.ndarray) -> np.ndarray:
    """Labels `(N,)` or `(N, H)` as `(N, H)`."""
    labels = np.asarray(labels)
    return labels if labels.ndim > 1 else labels[:, None]


def _cdist(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Euclidean distances by differences in float64: `(…, A, D)` and `(…, B, D)` to `(…, A, B)`."""
    return torch.cdist(some.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _distinct_rows(points: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each distinct point first stands `(U,)`, which of them every point is `(N,)`, and how often `(U,)`."""
    if points.device.type != "cpu":
        return _find_distinct(points)
    rows = _to_numpy(points)
    rows = rows.view(np.dtype((np.void, rows.strides[0]))).ravel()  # (N,)
    _, first, which, repeats = np.unique(rows, return_index=True, return_inverse=True, return_counts=True)
    return first, which, repeats


def _find_distinct(points: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same on the points' device, in the same order, which is that of bytes."""
    _, which, repeats = points.contiguous().view(torch.uint8).unique(dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(repeats, len(points))
    first.scatter_reduce_(0, which, torch.arange(len(points), device=points.device), "amin")
    return first.cpu().numpy(), which.cpu().numpy(), repeats.cpu().numpy()


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
        self.depth = None if space.depth is None else torch.from_numpy(space.depth).to(space.query.device)  # (Q,)
        self.center = (space.gallery.mean(dim=0, dtype=torch.float64) * self.scale).to(dtype)  # (D,)
        self.gallery = self.prepare(space.gallery[space.gallery_order])  # (G, D + 2), sorted by label
        self.gallery[:, -2] = -0.5 * torch.linalg.vector_norm(self.gallery[:, :-2], dim=1).square()
        self.gallery[:, -1] = 1
        size = QUERY_TILE * max(QUERY_TILE, GALLERY_TILE)
        self.memory = self.gallery.new_empty(2, size)  # for the scores of all tiles
        self.whole = self.memory[0]  # for those of `score_all`

    def prepare(self, points: torch.Tensor) -> torch.Tensor:
        """Points `(N, D)`, moved and scaled, with 1 and 0 behind each, for -‖g‖²/2 and an offset: `(N, D + 2)`."""
        dim = points.shape[1]
        prepared = torch.eye(1, dim + 2, dtype=self.dtype, device=points.device).roll(dim).repeat(len(points), 1)
        torch.mul(points.to(self.dtype), self.scale, out=prepared[:, :dim]).sub_(self.center)
        return prepared

    def score(self, queries: torch.Tensor, column: int, end: int | None = None) -> torch.Tensor:
        """Scores `(rows, columns)` of the gallery's tile from a column on, for prepared queries `(rows, D + 2)`."""
        end = column + GALLERY_TILE if end is None else min(end, column + GALLERY_TILE)
        return self.multiply(queries, self.gallery[column:end])

    def score_all(self, queries: torch.Tensor) -> torch.Tensor:
        """Scores `(rows, G)` of the whole gallery."""
        size = len(queries) * len(self.gallery)
        if self.whole.numel() < size:
            self.whole = self.gallery.new_empty(size)
        return torch.mm(queries, self.gallery.T, out=self.last_scores(len(queries)))

    def last_scores(self, num_queries: int) -> torch.Tensor:
        """The scores `(num_queries, G)` that `score_all` gave last."""
        return self.whole[: num_queries * len(self.gallery)].view(num_queries, -1)

    def multiply(self, queries: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Products `(rows, columns)` of prepared queries `(rows, D + 2)` and items `(columns, D + 2)`, in `memory`."""
        scores = self.memory[0, : len(queries) * len(items)].view(len(queries), len(items))
        return torch.mm(queries, items.T, out=scores)

    def spare(self, scores: torch.Tensor) -> torch.Tensor:
        """More memory of the shape and strides of scores."""
        if not scores.is_contiguous():
            return self.spare(scores.T).T
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
        margin: `(rows, 1)` how far rounding may move scores.
        is_shared: `(rows,)` bool, which queries take part in `compare_among`.
    """

    def __init__(self, products: _Products, queries: torch.Tensor, nearest_only: bool):
        self.products, self.queries, self.nearest_only = products, queries, nearest_only
        start, end, own = (columns[queries][:, None] for columns in products.space.class_columns)  # (rows, 1) each
        self.start, self.end, self.own, self.first, self.last = start, end, own, int(start.min()), int(end.max())
        self.inside = int(start.max()), int(end.min())  # columns of which every query's class is
        self.place = int(own[0])  # the first query's column, if it is in the gallery
        points = self._points()  # (rows, D + 2)
        self.by_rank = not nearest_only and products.space.num_positives.max(initial=0) > MAX_IN_TURN
        if not nearest_only:
            self.positives = self._score_positives(points)  # (rows, M)
        # (rows, M), or (rows, 1): the scores of the positives that are compared, nearest first
        self.wanted = self._score_nearest(points) if nearest_only else _sort(self.positives).flip(1)

        # An item about as far away as a positive at distance d has ‖g‖ ≤ ‖q‖ + d, and products of D terms are off by up
        # to about eps √D ‖q‖ ‖g‖. Equal distances must be in doubt, too.
        precision = torch.finfo(products.dtype)
        self.squared = points[:, :-2].square().sum(dim=1, keepdim=True)  # (rows, 1)
        lowest = self.wanted.masked_fill(self.wanted.isinf(), torch.inf).amin(dim=1, keepdim=True)  # (rows, 1)
        squared_distance = (self.squared - 2 * lowest).clamp(min=0)  # (rows, 1)
        self.margin = 4 * precision.eps * math.sqrt(points.shape[1]) * (self.squared + squared_distance)  # (rows, 1)
        self.margin += 2 * (TIE - 1) * squared_distance + 1e6 * precision.tiny
        self._set_thresholds(self.wanted, self.margin)

        self.counts = torch.zeros(self.wanted.shape, dtype=torch.int64, device=queries.device)
        self.is_crowded = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        self.is_shared = torch.ones_like(self.is_crowded)
        self.num_doubts = points.new_zeros(len(queries))  # (rows,) about as many
        self.max_doubts = 64 + len(products.gallery) // 32
        self.has_few_hits = True  # as far as is known
        self.depth = None if nearest_only or products.depth is None else products.depth[queries][:, None]  # (rows, 1)
        self.num_compared = 0
        self.doubts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # rows, positives and columns

    def _points(self) -> torch.Tensor:
        """The queries, prepared, `(rows, D + 2)`."""
        return self.products.prepare(self.products.space.query[self.queries])

    def _set_thresholds(self, wanted: torch.Tensor, margin: torch.Tensor) -> None:
        """Sets below what scaled scores are certainly less than those wanted `(rows, M)`; ∞ where none is wanted."""
        self.thresholds = (wanted * (0.5 / margin) - 0.5).masked_fill_(wanted.isinf(), torch.inf)  # (rows, M)
        self.lowest = self.thresholds.amin(dim=1, keepdim=True)  # (rows, 1)

    def _score_nearest(self, points: torch.Tensor) -> torch.Tensor:
        """The highest score `(rows, 1)` of each query's class without the query itself; -∞ where it has no others."""
        nearest = torch.full((len(points), 1), -torch.inf, dtype=points.dtype, device=points.device)
        for column in range(self.first, self.last, GALLERY_TILE):
            scores = self._mask_others(self.products.score(points, column, self.last), column)
            nearest = torch.maximum(nearest, scores.amax(dim=1, keepdim=True))
        return nearest

    def _mask_others(self, scores: torch.Tensor, column: int, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Scores of some rows from a column on, with -∞ for items of other classes and the query itself."""
        start, end_of_class, own = self.start[rows], self.end[rows], self.own[rows]
        end = column + scores.shape[1]
        if column < self.inside[0] or end > self.inside[1]:
            columns = torch.arange(column, end, device=scores.device)  # (columns,)
            scores.masked_fill_((columns < start) | (columns >= end_of_class), -torch.inf)
        place = (own - column).clamp(0, scores.shape[1] - 1)  # (rows, 1)
        is_own = (own >= column) & (own < end)  # (rows, 1)
        return scores.scatter_(1, place, scores.gather(1, place).masked_fill_(is_own, -torch.inf))

    def _score_positives(self, points: torch.Tensor) -> torch.Tensor:
        """Scores `(rows, M)` of each query's class; -∞ for the query itself, and where its class has fewer items."""
        columns = self.start + torch.arange(int((self.end - self.start).max().clamp(min=1)), device=points.device)
        if self.by_rank:
            positives = self.products.score_all(points).gather(1, columns.clamp(max=len(self.products.gallery) - 1))
            return positives.masked_fill_((columns >= self.end) | (columns == self.own), -torch.inf)
        positives = torch.full(columns.shape, -torch.inf, dtype=points.dtype, device=points.device)  # (rows, M)
        for column in range(self.first, self.last, GALLERY_TILE):
            scores = self.products.score(points, column, self.last)  # (rows, columns)
            in_tile = (columns >= column) & (columns < column + scores.shape[1]) & (columns < self.end)
            found = scores.gather(1, (columns - column).clamp(0, scores.shape[1] - 1))  # (rows, M)
            positives = torch.where(in_tile, found, positives)
        return positives.masked_fill_(columns == self.own, -torch.inf)

    def count(self) -> None:
        """Counts the items of other classes that are at least as near as each positive."""
        if self.by_rank:
            self._count_by_rank()
            self.settle_doubts()
            return
        points = self._points() * (0.5 / self.margin)  # (rows, D + 2)
        for column in range(0, len(self.products.gallery), GALLERY_TILE):
            end = min(column + GALLERY_TILE, len(self.products.gallery))
            if not self._is_inside(column, end):
                scores = self._mask_positives(self.products.score(points, column), column)  # (rows, columns)
                self._compare(scores, column)
                if self.is_crowded.all():
                    return
        self.settle_doubts()

    def _is_inside(self, column: int, end: int) -> bool:
        """Whether items from a column to another are of every query's class."""
        return self.inside[0] <= column and end <= self.inside[1]

    def _mask_positives(self, scores: torch.Tensor, column: int) -> torch.Tensor:
        """Scores `(rows, columns)` from a column on, with -∞ for items of the query's class."""
        if self.first < column + scores.shape[1] and column < self.last:
            columns = torch.arange(column, column + scores.shape[1], device=scores.device)  # (columns,)
            scores.masked_fill_((columns >= self.start) & (columns < self.end), -torch.inf)
        return scores

    def share_products(self, margin: torch.Tensor) -> None:
        """Makes thresholds for products that are scaled alike for all queries: for `compare_among`.

        These products are -‖q - g‖²/2, which is the same for either point. Queries with a larger margin take no part.
        """
        self.is_shared = (self.margin <= margin)[:, 0]
        margin = 1.5 * margin  # ‖q‖²/2 is rounded, too
        self.scale = 0.5 / margin
        wanted = self.wanted - self.squared / 2  # (rows, M)
        self._set_thresholds(wanted.masked_fill_(~self.is_shared[:, None], -torch.inf), margin)

    def compare_among(self, tiles: Sequence[_QueryTile]) -> None:
        """Compares with tiles of the same points, each of which compares with this one: the first is this one."""
        items = self.products.gallery
        points = items[self.place : self.place + len(self.queries)] * self.scale  # (rows, D + 2)
        points[:, -2:] = points[:, -2:].flip(1)
        for tile in tiles:
            column, end = tile.place, tile.place + len(tile.queries)
            if self._is_inside(column, end) or (self.is_crowded.all() and tile.is_crowded.all()):
                continue
            scores = self._mask_positives(self.products.multiply(points, items[column:end]), column)  # (rows, columns)
            self._compare(scores, column)
            if tile is not self:
                tile._compare(scores.T, self.place)

    def _compare(self, scores: torch.Tensor, column: int) -> None:
        """Compares scaled scores `(rows, columns)` from a column on with the thresholds.

        Where classes are apart, few queries have a score above their lowest threshold, and those few such scores.
        """
        asking = (scores.amax(dim=1, keepdim=True) > self.lowest).nonzero()[:, 0]  # (asking,)
        if len(asking) == 0:
            return
        if 4 * len(asking) < len(scores):
            scores = _take_rows(scores, asking)  # (asking, columns)
        else:
            asking = torch.arange(len(scores), device=scores.device)
        limit = scores.numel() * self.thresholds.shape[1] // 256
        if self.has_few_hits:
            places, columns = _find_above(scores, self.lowest[asking], limit)  # (hits,) each
            self.has_few_hits = len(places) <= limit
        if self.has_few_hits:
            self._compare_each(scores[places, columns], asking[places], columns + column)
        else:
            self._compare_all(scores.contiguous(), asking, column)
        self.num_compared += 1
        if self.num_compared % FORGET_EVERY == 0:
            self._forget_far()

    def _forget_far(self) -> None:
        """Compares no more with positives that are known to be of a rank that doesn't matter.

        The nearest one always does, and with it those that may be the nearest but for rounding.
        """
        if self.depth is not None:
            is_far = (self.counts >= self.depth) & (self.thresholds < self.thresholds[:, :1] - 1)  # (rows, M)
            self.thresholds.masked_fill_(is_far, torch.inf)
            self.lowest = self.thresholds.amin(dim=1, keepdim=True)

    def _compare_each(self, scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Compares scores `(hits,)` of rows and columns `(hits,)` with the thresholds."""
        num_thresholds = self.thresholds.shape[1]
        above = scores[:, None] - self.thresholds[rows]  # (hits, M)
        cells = rows[:, None] * num_thresholds + torch.arange(num_thresholds, device=rows.device)  # (hits, M)
        self.counts.view(-1).index_add_(0, cells.flatten(), (above >= 1).long().flatten())
        places, positives = ((above > 0) & (above < 1)).nonzero(as_tuple=True)
        if len(places):
            self._add_doubts(rows[places], torch.ones_like(places))
            kept = ~self.is_crowded[rows[places]]
            places, positives = places[kept], positives[kept]
            self.doubts.append((rows[places], positives, columns[places]))

    def _compare_all(self, scores: torch.Tensor, asking: torch.Tensor, column: int) -> None:
        """Compares scores `(asking, columns)` of some rows, from a column on, with one threshold after the other."""
        thresholds = self.thresholds[asking]  # (asking, M)
        total, doubt = torch.zeros(2, *thresholds.shape, dtype=scores.dtype, device=scores.device)  # (asking, M) each
        is_hit = scores.amax(dim=1, keepdim=True) > thresholds  # (asking, M)
        for positive, num_hits in enumerate(is_hit.sum(dim=0).tolist()):
            if num_hits == 0:
                continue
            threshold = thresholds[:, positive : positive + 1]  # (asking, 1)
            if 4 * num_hits < len(asking):  # a copy of more takes longer than it saves
                some: torch.Tensor | slice = is_hit[:, positive].nonzero()[:, 0]
                above = scores[some].sub_(threshold[some])
            else:
                some, above = slice(None), torch.sub(scores, threshold, out=self.products.spare(scores))
            reached = above.clamp_(0, 1)  # (some, columns): 0, 1, or between where in doubt
            total[some, positive] = sums = reached.sum(dim=1)
            doubt[some, positive] = sums - torch.linalg.vector_norm(reached, dim=1).square()  # Σ r (1 - r)
        rows, positives = (doubt > 0.01).nonzero(as_tuple=True)
        if len(rows):
            self._add_doubts(asking[rows], 4 * doubt[rows, positives])
            kept = ~self.is_crowded[asking[rows]]
            rows, positives = rows[kept], positives[kept]
            reached = scores[rows].sub_(thresholds[rows, positives][:, None])  # (some, columns)
            places, columns = _find((reached - 0.5).abs_() < 0.5)
            total.index_put_((rows[places], positives[places]), -reached[places, columns], accumulate=True)
            self.doubts.append((asking[rows[places]], positives[places], columns + column))
        self.counts[asking] += total.round().long()

    def _count_by_rank(self) -> None:
        """The same with all thresholds and the whole gallery at once, which is quicker where there are many."""
        scores = self.products.last_scores(len(self.queries)).mul_(0.5 / self.margin)  # (rows, G)
        ascending = self.thresholds.masked_fill(self.thresholds.isinf(), -torch.inf).flip(1).contiguous()  # (rows, M)
        if scores.device.type == "cpu":
            bounds = zip(self.start[:, 0].tolist(), self.end[:, 0].tolist())
            for row, (start, end) in zip(scores, bounds):
                row[start:end] = -torch.inf
            certain, possible = _rank_rows(scores.numpy(), ascending.numpy())
        else:
            certain, possible = _rank_sorted(self._mask_positives(scores, 0), ascending)
        self.counts, doubts = certain.flip(1), (possible - certain).flip(1)  # (rows, M)
        self._add_doubts(torch.arange(len(scores), device=scores.device), doubts.sum(dim=1))
        for row in (doubts.any(dim=1) & ~self.is_crowded).nonzero()[:, 0].tolist():
            for positives in doubts[row].nonzero()[:, 0].split(1 + MAX_DIFFERENCES // scores.shape[1]):  # (some,)
                above = scores[row] - self.thresholds[row, positives][:, None]  # (some, G)
                places, columns = ((above > 0) & (above < 1)).nonzero(as_tuple=True)
                self.doubts.append((torch.full_like(places, row), positives[places], columns))

    def _add_doubts(self, rows: torch.Tensor, numbers: torch.Tensor) -> None:
        """Adds numbers `(some,)` of items in doubt to those of rows `(some,)`."""
        self.num_doubts.index_add_(0, rows, numbers.to(self.num_doubts))
        self.is_crowded |= self.num_doubts > self.max_doubts

    def settle_doubts(self) -> None:
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
        space = self.products.space
        if self.nearest_only:
            asking, place = rows.unique(return_inverse=True)
            rows, items = self._find_nearest(asking)
            distances = torch.full((len(asking),), torch.inf, dtype=torch.float64, device=rows.device)
            return distances.scatter_reduce_(0, rows, space.distances(self.queries[asking[rows]], items), "amin")[place]
        width = self.positives.shape[1]
        asked, place = (rows * width + positives).unique(return_inverse=True)
        rows, positives = asked // width, asked % width
        asking, which = rows.unique(return_inverse=True)
        order = self.positives[asking].argsort(dim=1, descending=True)  # (asking, M)
        places = order[which, positives]  # (some,) which of the class they are
        return space.distances(self.queries[rows], space.gallery_order[self.start[rows, 0] + places])[place]

    def _find_nearest(self, asking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of one of the rows `(asking,)` and an item, `(pairs,)` each: all that may be its nearest positive."""
        points = self._points()[asking]  # (asking, D + 2)
        lowest = self.wanted[asking] - 2 * self.margin[asking]  # (asking, 1)
        found = []
        for column in range(self.first, self.last, GALLERY_TILE):
            scores = self._mask_others(self.products.score(points, column, self.last), column, asking)
            rows, columns = (scores >= lowest).nonzero(as_tuple=True)
            found.append((rows, self.products.space.gallery_order[columns + column]))
        rows, items = (torch.cat(parts) for parts in zip(*found))
        return rows, items


def _find_above(scores: torch.Tensor, lowest: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the scores `(rows, columns)` above those of their rows `(rows, 1)`; if too many, any."""
    if scores.device.type != "cpu":
        rows, columns = (scores > lowest).nonzero(as_tuple=True)
        return rows, columns
    mask = np.greater(scores.numpy(), lowest.numpy())
    if np.count_nonzero(mask) > limit:
        return (torch.zeros(limit + 1, dtype=torch.int64),) * 2
    is_transposed = not mask.flags.c_contiguous
    flat = (mask.T if is_transposed else mask).ravel()
    size = flat.size // 8 * 8
    eights = np.flatnonzero(flat[:size].view(np.uint64)) * 8  # quicker than to look at each
    places = np.concatenate([(eights[:, None] + np.arange(8)).ravel(), np.arange(size, flat.size)])
    rows, columns = np.divmod(places[flat[places]], len(mask) if is_transposed else mask.shape[1])
    found = torch.from_numpy(rows), torch.from_numpy(columns)
    return found[::-1] if is_transposed else found


def _take_rows(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of scores or of their transpose, contiguous; all of them, without a copy, where they are contiguous."""
    if len(rows) == len(scores):
        return scores.contiguous()
    return scores.index_select(0, rows) if scores.is_contiguous() else scores.T.index_select(1, rows).T.contiguous()


def _sort(values: torch.Tensor) -> torch.Tensor:
    """Each row `(rows, M)` in ascending order, by NumPy on the CPU, which is several times as quick as torch."""
    return torch.from_numpy(np.sort(values.numpy(), axis=1)) if values.device.type == "cpu" else values.sort(1).values


def _rank_sorted(scores: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's scores `(rows, G)` are at least 1 above thresholds `(rows, M)`, and above: `(rows, M)`."""
    scores, size = _sort(scores), scores.shape[1]
    certain = size - torch.searchsorted(scores, ascending + 1)
    return certain, size - torch.searchsorted(scores, ascending, right=True)


def _rank_rows(scores: np.ndarray, ascending: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, more quickly, by NumPy, on as many threads as torch has."""
    certain, possible = np.zeros((2, *ascending.shape), np.int64)

    def rank(rows: range) -> None:
        for row in rows:
            first = int(np.isneginf(ascending[row]).sum())
            if first < ascending.shape[1]:
                certain[row, first:], possible[row, first:] = _rank_row(scores[row], ascending[row, first:])

    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(rank, [range(start, len(scores), num_threads) for start in range(num_threads)]))
    return torch.from_numpy(certain), torch.from_numpy(possible)


def _rank_row(scores: np.ndarray, ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of scores `(G,)` and finite thresholds `(R,)`.

    Scores are counted by cells of equal width; only those in the cell of a threshold are sorted.
    """
    num_cells = min(MAX_CELLS, 12 * len(ascending))
    low, high = ascending[0], ascending[-1] + 1
    per_unit = float((num_cells - 1) / (high - low))

    def find_cells(values: np.ndarray) -> np.ndarray:
        places = (values - low).astype(np.float32)  # no order changes
        places *= per_unit
        places += 1
        return places.clip(0, num_cells + 1, out=places).astype(np.intp)

    cells, from_cell, to_cell = find_cells(scores), find_cells(ascending), find_cells(ascending + 1)
    size = num_cells + 3
    is_near = (np.bincount(from_cell, minlength=size) - np.bincount(to_cell + 1, minlength=size)).cumsum()[:-1] > 0
    counts = np.bincount(cells, minlength=len(is_near))
    counts *= ~is_near
    far_above = counts[::-1].cumsum()[::-1][to_cell]  # (R,)
    near = np.sort(scores[is_near.take(cells)])
    after = np.searchsorted(near, ascending, side="right")  # (R,)
    possible = far_above + len(near) - after
    certain = possible.copy()
    doubtful = np.flatnonzero(np.append(near, np.inf)[after] < ascending + 1)
    if len(doubtful):
        certain[doubtful] -= np.searchsorted(near, ascending[doubtful] + 1) - after[doubtful]
    return certain, possible


@dataclass(frozen=True)
class PairCounts:
    """Numbers of pairs by distance, for verification: are two images of one class?

    Squared distances are computed in float64 and sorted into cells, `2 ** (23 - CELL_BITS)` in each power of two. Pairs
    whose distances differ by less than 10⁻⁶ of themselves may share one, and then count as equally distant, as those do
    whose distance is 0 as far as float32 tells: about 10⁻⁷ of the points' distance from the mean.

    Attributes:
        starts, ends: `(C,)` the distances between which a cell lies, ascending; cells without pairs are left out.
        positives, negatives: `(C,)` int64, the pairs of one class and of two classes in each cell.
    """

    starts: np.ndarray
    ends: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    @property
    def has_both(self) -> bool:
        """Whether there are pairs of either kind: what takes both is NaN otherwise."""
        return bool(self.positives.any() and self.negatives.any())

    @cached_property
    def match_rates(self) -> np.ndarray:
        """`(C + 1,)` the share of the pairs of one class up to no cell, the first cell, …."""
        return _cumulative_share(self.positives)

    @cached_property
    def false_match_rates(self) -> np.ndarray:
        """`(C + 1,)` the same of the pairs of two classes."""
        return _cumulative_share(self.negatives)

    @cached_property
    def balanced_accuracies(self) -> np.ndarray:
        """`(C + 1,)` 1 - (FMR + FNMR) / 2, where the pairs up to no cell, the first cell, … are taken for one class."""
        return (1 + self.match_rates - self.false_match_rates) / 2

    def best_threshold(self) -> float:
        """The distance up to which pairs are best taken for one class: with the highest balanced accuracy.

        Of several the smallest, in the middle between the pairs around it; NaN where pairs of a kind are missing.
        """
        if not self.has_both:
            return math.nan
        best = 1 + int(self.balanced_accuracies[1:].argmax())
        below, above = self.ends[best - 1], np.append(self.starts, self.ends[-1])[best]
        return float(below + above) / 2

    def accuracy(self, threshold: float) -> float:
        """The balanced accuracy, where pairs up to the threshold are taken for one class."""
        if math.isnan(threshold) or not self.has_both:
            return math.nan
        return float(self.balanced_accuracies[np.searchsorted(self.starts, threshold, side="right")])


def _cumulative_share(counts: np.ndarray) -> np.ndarray:
    return np.append(0, counts.cumsum()) / max(1, counts.sum())


class _PairHistogram:
    """Counts pairs by the cell of their squared distance: the first bits of what it is in float32.

    Args:
        space: the points.

    Attributes:
        counts: `(2, cells)` int64, of pairs of one class and of two, from the cell `start` on.
        num_equal: the pairs of either kind of which the points are equal.
    """

    def __init__(self, space: EmbeddingSpace):
        self.space, self.products = space, _Products(space, torch.float64)
        # a space that is its own gallery has each pair twice
        in_place = np.arange(len(space.query))
        self.is_own = space.gallery is space.query and np.array_equal(space.query_in_gallery, in_place)
        norms = [self.products.prepare(points)[:, :-2].square().sum(dim=1) for points in (space.query, space.gallery)]
        farthest = 4 * float(torch.cat(norms).max())  # at most, squared
        self.lowest = max(farthest * 2.0**-MAX_OCTAVES, 2 * torch.finfo(torch.float32).tiny)
        self.lowest_cell = int(torch.tensor(self.lowest).view(torch.int32)) >> CELL_BITS
        self.counts, self.start = torch.zeros(2, 0, dtype=torch.int64, device=space.query.device), 0
        self.num_equal = [0, 0]

    def add(self, queries: torch.Tensor) -> None:
        """Counts the pairs of some queries `(rows,)`, sorted by label."""
        start, end, own = (columns[queries][:, None] for columns in self.space.class_columns)  # (rows, 1) each
        points = self.products.prepare(self.space.query[queries])  # (rows, D + 2)
        squared = points[:, :-2].square().sum(dim=1)  # (rows,)
        rounding = 8 * torch.finfo(torch.float64).eps * math.sqrt(points.shape[1])  # so that no equal points are apart
        points *= -2
        points[:, -1] = squared * (1 - rounding)
        first, last = int(own.min()) if self.is_own else 0, max(int(end.max()), int(own.max()) + 1)
        for column in range(first, len(self.products.gallery), GALLERY_TILE):
            cells = self.products.score(points, column).float().clamp_(min=self.lowest).view(torch.int32) >> CELL_BITS
            if column < last and column + cells.shape[1] > int(start.min()):
                columns = torch.arange(column, column + cells.shape[1], device=cells.device)  # (columns,)
                is_pair = columns > own if self.is_own else columns != own  # (rows, columns)
                is_positive = (columns >= start) & (columns < end)
                self._count(0, cells[is_pair & is_positive])
                cells = cells[is_pair & ~is_positive]
            self._count(1, cells.flatten())

    def _count(self, kind: int, cells: torch.Tensor) -> None:
        """Counts cells `(P,)` int32 of pairs of one kind."""
        kept = cells[cells > self.lowest_cell] if len(cells) and cells.min() <= self.lowest_cell else cells
        self.num_equal[kind] += len(cells) - len(kept)
        if len(kept) == 0:
            return
        octave = 2 ** (23 - CELL_BITS)
        low, high = (int(bound) // octave for bound in kept.aminmax())
        if not self.counts.numel():
            self.start = low * octave
        more = max(0, self.start - low * octave), max(0, (high + 1) * octave - self.start - self.counts.shape[1])
        if any(more):
            self.counts, self.start = F.pad(self.counts, more), self.start - more[0]
        places, counts = kept.long() - self.start, self.counts[kind]
        if counts.is_cuda:
            counts.scatter_add_(0, places, torch.ones_like(places))
        else:
            np.add.at(counts.numpy(), places.numpy(), 1)  # several times as quick as torch's

    def collect(self) -> PairCounts:
        """What was counted."""
        counts = self.counts.cpu().numpy()
        places = np.flatnonzero(counts.any(axis=0))  # (C,)
        bits = places + self.start << CELL_BITS  # of the squared distances where the cells start
        starts, ends = (
            np.sqrt(part.astype(np.int32).view(np.float32).astype(np.float64)) / self.space.scale
            for part in (bits, bits + 2**CELL_BITS)
        )
        equal = np.array(self.num_equal)[:, None]  # (2, 1)
        if equal.any():
            starts, ends = np.append(0, starts), np.append(0, ends)
        return PairCounts(
            starts, ends, *np.concatenate([equal[:, : len(starts) - len(places)], counts[:, places]], axis=1)
        )


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
        notice("faiss can't be imported: own code takes its place, more slowly")
        return None
    return faiss


def mean_over_clusterings(space: EmbeddingSpace, score: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """The mean score of labels and clusters over clusterings; NaN for a single class, of which they say nothing."""
    if len(np.unique(space.labels)) < 2:
        return math.nan
    return float(np.mean([score(space.labels, clusters) for clusters in space.clusterings]))


def nmi(space: EmbeddingSpace) -> float:
    """Normalized mutual information of clusters and labels, normalized by the arithmetic mean of their entropies.

    NaN where there is only one class.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return mean_over_clusterings(space, normalized_mutual_info_score)


def f1(space: EmbeddingSpace) -> float:
    """F1 over pairs of points: precision of pairs in one cluster, recall of pairs of one class.

    NaN where there is only one class, or no pair.
    """
    from sklearn.metrics.cluster import pair_confusion_matrix

    def score(labels: np.ndarray, clusters: np.ndarray) -> float:
        (_, only_in_cluster), (only_in_class, in_both) = pair_confusion_matrix(labels, clusters)
        total = 2 * in_both + only_in_cluster + only_in_class
        return 2 * in_both / total if total else math.nan

    return mean_over_clusterings(space, score)


def mean_over_queries(space: EmbeddingSpace, values: np.ndarray) -> float:
    """The mean of values `(Q,)` over the queries that have a positive; NaN where none has."""
    return float(values[space.has_positive].mean()) if space.has_positive.any() else math.nan


def recall_at_k(space: EmbeddingSpace, k: int) -> float:
    """Share of the queries with an item of their class among the k nearest."""
    return mean_over_queries(space, space.num_negatives_ahead < k)


def precision_at_k(space: EmbeddingSpace, k: int) -> float:
    """Share of the k nearest items that are of the query's class; a gallery of fewer items counts as a whole."""
    return mean_over_queries(space, space.precision_at(k))


def mean_reciprocal_rank(space: EmbeddingSpace) -> float:
    """Mean over queries of one over the rank of their nearest positive."""
    return mean_over_queries(space, space.reciprocal_ranks)


def r_precision(space: EmbeddingSpace) -> float:
    """Share of the R nearest items that are of the query's class, R being the number of its positives."""
    return mean_over_queries(space, space.precisions["r_precision"])


def map_at_r(space: EmbeddingSpace) -> float:
    """(1 / R) Σ_{i ≤ R} P@i · rel(i). Musgrave et al., A Metric Learning Reality Check, ECCV 2020, section 3.2."""
    return mean_over_queries(space, space.precisions["map_at_r"])


def mean_average_precision(space: EmbeddingSpace) -> float:
    """Mean over queries of the mean precision at the ranks of all their positives."""
    return mean_over_queries(space, space.average_precisions)


def normalized_dcg(space: EmbeddingSpace) -> float:
    """Σ (2^rel - 1) / log₂(1 + rank) over that of the ideal order. Järvelin & Kekäläinen, ACM TOIS 2002.

    rel is the number of label levels that an item shares with the query: with one level, 1 for a positive. Queries
    without a positive of the finest level are left out, as everywhere.
    """
    return mean_over_queries(space, space.ndcg)


def hierarchical_ap(space: EmbeddingSpace) -> float:
    """Mean of Σ_i H-rank(i) / rank(i) / Σ_i rel(i). Ramzi et al., ECCV 2022, equations 2 to 4 with α = 1.

    H-rank(i) = rel(i) + Σ_{j before i} min(rel(i), rel(j)); the relevance rel of an item is the number of label levels
    that it shares with the query, over the number of items that share as many. With one level it is mAP.
    """
    return mean_over_queries(space, space.hierarchical_precisions)


def roc_auc(space: EmbeddingSpace) -> float:
    """Probability that a pair of one class is nearer than a pair of two; an equal distance counts half.

    NaN where there are no pairs of a kind, as for all of verification.
    """
    pairs = space.pairs
    if not pairs.has_both:
        return math.nan
    share = np.diff(pairs.match_rates)  # (C,)
    farther = 1 - (pairs.false_match_rates[1:] + pairs.false_match_rates[:-1]) / 2  # (C,)
    return float(share @ farther)


def equal_error_rate(space: EmbeddingSpace) -> float:
    """The rate at which pairs of two classes are taken for one, where as large a share of the others is not.

    Where no threshold makes them equal: between the two nearest thresholds, on the line.
    """
    fmr, fnmr = space.pairs.false_match_rates, 1 - space.pairs.match_rates  # (C + 1,) each
    if not space.pairs.has_both:
        return math.nan
    after = int((fnmr <= fmr).argmax())  # > 0
    before, excess = after - 1, fnmr - fmr
    share = excess[before] / (excess[before] - excess[after])
    return float(fmr[before] + share * (fmr[after] - fmr[before]))


def fnmr_at_fmr(space: EmbeddingSpace, fmr: float) -> float:
    """Share of the pairs of one class that are missed, where at most a share `fmr` of the other pairs is accepted."""
    pairs = space.pairs
    if not pairs.has_both:
        return math.nan
    accepted = np.flatnonzero(pairs.false_match_rates <= fmr * (1 + 1e-12))[-1]
    return float(1 - pairs.match_rates[accepted])


def verification_threshold(space: EmbeddingSpace) -> float:
    """The distance up to which two images are taken for one class: that with the highest balanced accuracy of pairs.

    It is chosen on the validation classes; on others it is the same.
    """
    return space.pairs.best_threshold() if space.threshold is None else space.threshold


def verification_accuracy(space: EmbeddingSpace) -> float:
    """Balanced accuracy of pairs, 1 - (FMR + FNMR) / 2, at the threshold that was chosen on the validation classes."""
    return space.pairs.accuracy(verification_threshold(space))


def ami(space: EmbeddingSpace) -> float:
    """Mutual information of clusters and labels, adjusted for chance; NaN where there is only one class."""
    from sklearn.metrics import adjusted_mutual_info_score

    return mean_over_clusterings(space, adjusted_mutual_info_score)


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
        compute: a function `space -> float`, `(space, k) -> float` or `(space, fmr) -> float`.
        lower_is_better: whether the best network has the lowest value; None where neither is better.
        along: the name of another metric that is computed wherever this one is.
        by_query: where it is a mean over queries, a function with the same parameters that gives their values `(Q,)`.
    """

    compute: Callable[..., float]
    lower_is_better: bool | None = False
    along: str | None = None
    by_query: Callable[..., np.ndarray] | None = None

    @property
    def parameter(self) -> str | None:
        """The number that it takes, a key of `NUMBERS`, if it takes one."""
        return next((name for name in NUMBERS if name in inspect.signature(self.compute).parameters), None)


FMRS = (0.01, 0.001)  # that FNMR is computed at, unless its name says another
NUMBERS: dict[str, Callable[[str], float]] = {"k": number(int, 1), "fmr": number(float, 0, exclusive=True, below=1)}


OF_ALL_RANKS = ("mAP", "nDCG", "H-AP")
METRICS: dict[str, Metric] = {
    "NMI": Metric(nmi),
    "F1": Metric(f1),
    "Recall": Metric(recall_at_k, by_query=lambda space, k: space.num_negatives_ahead < k),
    "Precision": Metric(precision_at_k, by_query=EmbeddingSpace.precision_at),
    "MRR": Metric(mean_reciprocal_rank, by_query=lambda space: space.reciprocal_ranks),
    "R-precision": Metric(r_precision, by_query=lambda space: space.precisions["r_precision"]),
    "MAP@R": Metric(map_at_r, by_query=lambda space: space.precisions["map_at_r"]),
    "mAP": Metric(mean_average_precision, by_query=lambda space: space.average_precisions),
    "nDCG": Metric(normalized_dcg, by_query=lambda space: space.ndcg),
    "H-AP": Metric(hierarchical_ap, by_query=lambda space: space.hierarchical_precisions),
    "ROC AUC": Metric(roc_auc),
    "EER": Metric(equal_error_rate, lower_is_better=True),
    "FNMR": Metric(fnmr_at_fmr, lower_is_better=True),
    "Verification accuracy": Metric(verification_accuracy, along="Verification threshold"),
    "Verification threshold": Metric(verification_threshold, lower_is_better=None),
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
    name = without_level(re.sub(r"^Set \d+ ", "", name))
    row = METRICS.get(name) or METRICS.get(re.sub(r" @ [\d.e-]+$", "", name))
    return row is not None and bool(row.lower_is_better)


def without_level(name: str) -> str:
    """A metric without the label level that it was computed at: `Level 1 Recall @ 4` -> `Recall @ 4`."""
    return re.sub(r"^Level (\d+|mean) ", "", name)


def metric_name(text: str) -> str:
    """An argparse type: a metric's name as in columns: `FNMR @ 1e-3` becomes `FNMR @ 0.001`, `P@5` `Precision @ 5`."""
    level = text.removesuffix(without_level(text))
    name, separator, value = (part.strip() for part in text.removeprefix(level).partition("@"))
    name = {"P": "Precision", "R": "Recall"}.get(name, name)
    if not separator or name not in METRICS:
        return text
    kind = METRICS[name].parameter
    if kind is None:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a metric: {name} takes no number")
    try:
        return f"{level}{name} @ {NUMBERS[kind](value)}"
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a metric: {error}") from None


def _read_number(kind: str | None, text: str) -> float | None:
    """The number in a metric's name, of a kind that is a key of `NUMBERS`; None where it is not one."""
    try:
        return NUMBERS[kind](text) if kind else None
    except argparse.ArgumentTypeError:
        return None


class MetricNames:
    """What --eval_metrics takes: the keys of `METRICS`, and each that takes a number also with one."""

    def __contains__(self, name: str) -> bool:
        return name in METRICS or name in chosen_metrics((), [name])

    def __iter__(self) -> Iterator[str]:
        return iter(METRICS)


def chosen_metrics(
    k_vals: Sequence[int], names: Sequence[str] = LITERATURE
) -> dict[str, Callable[[EmbeddingSpace], float]]:
    """The named metrics, in the order of `METRICS`, by the names of their columns.

    Args:
        k_vals: the k for which those of k are computed, beside 1: `Recall @ 1`, …
        names: `MetricNames`; `Precision @ 10` is that number alone. Recall @ 1 is always among them.
    """
    wanted = {*names, "Recall @ 1", *(METRICS[name].along for name in names if name in METRICS)}
    chosen: dict[str, Callable[[EmbeddingSpace], float]] = {}
    for name, metric in METRICS.items():
        kind = metric.parameter
        if kind is None:
            chosen |= {name: metric.compute} if name in wanted else {}
            continue
        given = [str(one).removeprefix(f"{name} @ ") for one in wanted if str(one).startswith(f"{name} @ ")]
        numbers = {value for text in given if (value := _read_number(kind, text)) is not None}
        if name in wanted:
            numbers |= {1, *k_vals} if kind == "k" else set(FMRS)
        chosen |= {f"{name} @ {value}": partial(metric.compute, **{kind: value}) for value in sorted(numbers)}
    return chosen


def selecting_metrics(k_vals: Sequence[int], names: Sequence[str]) -> list[str]:
    """Those of `chosen_metrics` that can select an epoch: of which higher or lower values are better."""
    neither = [name for name, metric in METRICS.items() if metric.lower_is_better is None]
    return [name for name in chosen_metrics(k_vals, names) if name not in neither]


def ranking_metrics(names: Sequence[str]) -> list[str]:
    """Those of `names` that judge the order of the items that queries find, not pairs or clusters."""
    return [name for name in names if METRICS[name.partition(" @ ")[0]].by_query]


def evaluate_space(space: EmbeddingSpace, k_vals: Sequence[int], names: Sequence[str] = LITERATURE) -> dict[str, float]:
    """Computes the metrics of one space, those of `chosen_metrics`."""
    chosen = chosen_metrics(k_vals, names)
    space.count_at([int(name.removeprefix("Precision @ ")) for name in chosen if name.startswith("Precision @ ")])
    space.count_at([math.inf] * any(name in OF_ALL_RANKS for name in chosen))
    # the last ones first: they count for all positives what Recall counts for the nearest
    values = {name: compute(space) for name, compute in reversed(chosen.items())}
    return {name: values[name] for name in chosen}


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
    metrics_by_parent = [
        evaluate_space(inside, k_vals, names) for _, inside in spaces_of_parents(space, query_parents, gallery_parents)
    ]
    parents = np.unique(query_parents)
    num_left_out = len(parents) - len(metrics_by_parent)
    what = "coarser classes hold a single class, or no query with another image of its class"
    if not metrics_by_parent:
        raise UserError(f"all {num_left_out} {what}: WithSameParentLabel has nothing to compare")
    if num_left_out:
        _notice_once(f"{num_left_out} of {len(parents)} {what}: they are left out of every metric")
    return {name: nanmean([metrics[name] for metrics in metrics_by_parent]) for name in metrics_by_parent[0]}


def spaces_of_parents(
    space: EmbeddingSpace, query_parents: np.ndarray, gallery_parents: np.ndarray
) -> Iterator[tuple[np.ndarray, EmbeddingSpace]]:
    """The coarser classes that `evaluate_within_parents` evaluates: the positions of each one's queries, its space."""
    for parent in np.unique(query_parents):
        queries, items = np.flatnonzero(query_parents == parent), np.flatnonzero(gallery_parents == parent)
        place = space.query_in_gallery[queries]
        if len(np.unique(space.gallery_labels[items])) < 2:
            continue
        inside = EmbeddingSpace(
            space.query[torch.from_numpy(queries)],
            space.query_hierarchy[queries],
            space.gallery[torch.from_numpy(items)],
            space.gallery_hierarchy[items],
            np.where(place < 0, -1, np.searchsorted(items, place)),
        )
        inside.threshold, inside.ranking = space.threshold, _restrict_ranking(space, queries, items)
        inside.clustering = space.clustering
        if inside.has_positive.any():
            yield queries, inside


def _restrict_ranking(space: EmbeddingSpace, queries: np.ndarray, items: np.ndarray) -> Ranking | None:
    """A space's ranking, if it has one, of some queries and items alone, by their positions."""
    ranking = space.ranking
    if ranking is None:
        return None
    of_query, columns = (torch.from_numpy(places).to(space.query.device) for places in (queries, items))
    step = max(1, MAX_RANKED // len(space.gallery))
    return lambda rows: torch.cat([ranking(some)[:, columns] for some in of_query[rows].split(step)])


def query_results(space: EmbeddingSpace, testing_method: str = TESTING_METHODS[0]) -> dict[str, np.ndarray]:
    """What the figures of a space are made of, query by query.

    Args:
        space: all points.
        testing_method: one of `TESTING_METHODS`.

    Returns:
        Arrays `(Q,)`: `correct_at_1` (bool), `ap_at_r` (float32), `label` (int32), and `weight` (float64), with which
        Recall @ 1 and MAP@R are sums of weight · result; it is 0 where a query has nothing to find.
    """
    size = len(space.query)
    spaces = [(np.arange(size), space)]
    if testing_method == "WithSameParentLabel":
        spaces = list(spaces_of_parents(space, space.query_hierarchy[:, 1], space.gallery_hierarchy[:, 1]))
    correct, ap_at_r, weight = np.zeros(size, bool), np.zeros(size, np.float32), np.zeros(size)
    for queries, one in spaces:
        ap_at_r[queries] = np.where(one.has_positive, one.precisions["map_at_r"], 0)
        correct[queries] = (one.num_negatives_ahead < 1) & one.has_positive
        weight[queries] = one.has_positive / (one.has_positive.sum() * len(spaces))
    label = space.query_labels.astype(np.int32)
    return {"correct_at_1": correct, "ap_at_r": ap_at_r, "label": label, "weight": weight}


def parts_of_spaces(
    spaces: Sequence[EmbeddingSpace], testing_method: str = TESTING_METHODS[0], all_levels: bool = False
) -> Iterator[tuple[str, int, EmbeddingSpace]]:
    """What `evaluate_points` evaluates, in its order by set: the prefix of the metrics' names, the level, its space."""
    for position, space in enumerate(spaces):
        of_set = f"Set {position} " if len(spaces) > 1 else ""
        if not all_levels:
            yield of_set, 0, space
            continue
        for level in range(space.query_hierarchy.shape[1] - (testing_method == "WithSameParentLabel")):
            labels = space.query_hierarchy[:, level:], space.gallery_hierarchy[:, level:]
            yield f"{of_set}Level {level} ", level, space.with_labels(*labels) if level else space


def class_means_of_queries(
    space: EmbeddingSpace, k_vals: Sequence[int], names: Sequence[str], testing_method: str = TESTING_METHODS[0]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The metrics that are means over queries, as means over the queries of each class.

    Args:
        space: all points.
        k_vals: the k of Recall @ k.
        names: keys of `METRICS`; those of clusters or pairs are left out.
        testing_method: one of `TESTING_METHODS`.

    Returns:
        The classes `(C,)` of the queries that count, the numbers of these queries `(C,)`, and by metric the means
        `(C,)`.
    """
    by_compute = {row.compute: row.by_query for row in METRICS.values()}
    chosen: dict[str, Callable[[EmbeddingSpace], np.ndarray]] = {}
    for name, compute in chosen_metrics(k_vals, names).items():
        function, parameters = getattr(compute, "func", compute), getattr(compute, "keywords", {})
        if by_query := by_compute[function]:
            chosen[name] = partial(by_query, **parameters)
    spaces = [(np.arange(len(space.query)), space)]
    if testing_method == "WithSameParentLabel":
        spaces = list(spaces_of_parents(space, space.query_hierarchy[:, 1], space.gallery_hierarchy[:, 1]))
    values = {name: np.zeros(len(space.query)) for name in chosen}
    counts = np.zeros(len(space.query), bool)  # (Q,)
    for queries, one in spaces:
        counts[queries] = one.has_positive
        for name, by_query in chosen.items():
            values[name][queries] = by_query(one)
    classes, place, sizes = np.unique(space.query_labels[counts], return_inverse=True, return_counts=True)
    return classes, sizes, {name: np.bincount(place, value[counts]) / sizes for name, value in values.items()}


def nanmean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


@dataclass(frozen=True)
class Points:
    """Embedded images.

    Attributes:
        embeddings: `(N, D)`.
        hierarchy: `(N, H)` integer labels, one column per level, the finest first.
        paths: N image files.
    """

    embeddings: torch.Tensor
    hierarchy: np.ndarray
    paths: Sequence[str]

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` labels of the finest level."""
        return self.hierarchy[:, 0]

    @property
    def parents(self) -> np.ndarray | None:
        """`(N,)` labels of the next coarser level, if there is one."""
        return self.hierarchy[:, 1] if self.hierarchy.shape[1] > 1 else None

    def at_level(self, level: int) -> Points:
        """The same images without the levels finer than `level`."""
        return replace(self, hierarchy=self.hierarchy[:, level:])


def embed_set(net: nn.Module, images: RetrievalSet[ImageLoader], device: torch.device) -> RetrievalSet[Points]:
    """Embeds a retrieval set; `net` is on `device`."""

    def embed_images(loader: ImageLoader) -> Points:
        name = images.name if loader is images.query else f"{images.name} gallery"
        return Points(embed(net, loader, device, name), loader.hierarchy, loader.paths)

    return images.map(embed_images)


def build_space(points: RetrievalSet[Points]) -> EmbeddingSpace:
    """Puts queries and gallery into one space; a query whose path is in the gallery does not find itself there."""
    query, gallery = points.query, points.gallery
    if gallery is None:
        return EmbeddingSpace(query.embeddings, query.hierarchy)
    position = {path: i for i, path in enumerate(gallery.paths)}
    query_in_gallery = np.array([position.get(path, -1) for path in query.paths], np.int64)  # (Q,)
    return EmbeddingSpace(query.embeddings, query.hierarchy, gallery.embeddings, gallery.hierarchy, query_in_gallery)


def evaluate_points(
    points: Sequence[RetrievalSet[Points]],
    k_vals: Sequence[int],
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
    validation: Mapping[str, float] | None = None,
    all_levels: bool = False,
    change: Callable[[EmbeddingSpace], EmbeddingSpace] | None = None,
    clustering: Clustering | None = None,
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """Computes the metrics of embedded retrieval sets.

    Args:
        points: one set or more.
        k_vals: the k of Recall @ k.
        names: keys of `METRICS`.
        testing_method: one of `TESTING_METHODS`.
        validation: metrics of the same network on the validation classes, whose threshold verification takes (default:
            these are the validation classes, and choose it).
        all_levels: whether to compute them at each level of the labels (WithSameParentLabel: that has a coarser one).
        change: makes the space that is evaluated of each set's, see `retrieval`.
        clustering: how points are clustered (default: once, by own code).

    Returns:
        The metrics in one flat dict, named `Set 0 Recall @ 1`, … where there are several sets, and at all levels
        `Level 0 Recall @ 1`, … and their mean, `Level mean Recall @ 1`; and the sets' spaces, of the finest level.

    Raises:
        UserError: no query of a set has anything to find, or it can find nothing else.
    """
    if all_levels:
        return _evaluate_levels(points, k_vals, names, testing_method, validation, change, clustering)
    metrics: dict[str, float] = {}
    spaces = [change(build_space(one_set)) if change else build_space(one_set) for one_set in points]
    for position, (one_set, space) in enumerate(zip(points, spaces)):
        prefix = f"Set {position} " if len(points) > 1 else ""
        space.threshold = None if validation is None else _find_threshold(validation, prefix)
        space.clustering = clustering or space.clustering
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
        metrics |= {prefix + name: value for name, value in values.items()}
    return metrics, spaces


def _evaluate_levels(
    points: Sequence[RetrievalSet[Points]],
    k_vals: Sequence[int],
    names: Sequence[str],
    testing_method: str,
    validation: Mapping[str, float] | None,
    change: Callable[[EmbeddingSpace], EmbeddingSpace] | None,
    clustering: Clustering | None,
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """`evaluate_points` at each level of the labels."""
    metrics: dict[str, float] = {}
    by_level, spaces = [], []
    for level in range(points[0].query.hierarchy.shape[1] - (testing_method == "WithSameParentLabel")):
        at_level = [one.map(lambda part, level=level: part.at_level(level)) for one in points]  # type: ignore[misc]
        name = f"Level {level} "
        chosen = validation and {key.replace(name, ""): value for key, value in validation.items() if name in key}
        which = k_vals, names, testing_method, chosen
        of_level, found = evaluate_points(at_level, *which, change=change, clustering=clustering)
        metrics |= {_put_level(key, name): value for key, value in of_level.items()}
        by_level.append(of_level)
        spaces.append(found)
    for key in by_level[0]:
        metrics[_put_level(key, "Level mean ")] = nanmean([of_level[key] for of_level in by_level])
    return metrics, spaces[0]


def _put_level(name: str, level: str) -> str:
    """A metric's name with its label level: `Set 0 Recall @ 1` -> `Set 0 Level 1 Recall @ 1`."""
    return re.sub(r"^(Set \d+ )?", rf"\1{level}", name, count=1)


def needs_validation(names: Sequence[str]) -> bool:
    """Whether one of the metrics takes its threshold from the validation classes."""
    return any(name.startswith("Verification") for name in names)


def _find_threshold(validation: Mapping[str, float], prefix: str) -> float:
    """The threshold among the metrics of the validation classes: of the set with that prefix, or the mean over sets."""
    name = "Verification threshold"
    if prefix + name in validation:
        return validation[prefix + name]
    return nanmean([value for key, value in validation.items() if key.endswith(name)])


def evaluate(
    net: nn.Module,
    sets: Sequence[RetrievalSet[ImageLoader]],
    k_vals: Sequence[int],
    device: torch.device,
    names: Sequence[str] = LITERATURE,
    testing_method: str = TESTING_METHODS[0],
    validation: Mapping[str, float] | None = None,
    all_levels: bool = False,
    clustering: Clustering | None = None,
) -> tuple[dict[str, float], list[EmbeddingSpace]]:
    """Embeds retrieval sets and computes their metrics.

    Args:
        net: the network, on `device`.
        sets: one set or more, each with or without a gallery.
        k_vals: the k of Recall @ k.
        device: where the network is.
        names: keys of `METRICS`.
        testing_method: one of `TESTING_METHODS`.
        validation: metrics of the validation classes, as for `evaluate_points`.
        all_levels: whether to compute them at each level of the labels.
        clustering: how points are clustered (default: once, by own code).

    Returns:
        The metrics and the embedding spaces, as from `evaluate_points`.
    """
    points = [embed_set(net, images, device) for images in sets]
    which = k_vals, names, testing_method, validation, all_levels
    metrics, spaces = evaluate_points(points, *which, clustering=clustering)
    return from_first_rank(metrics), spaces  # what follows from them must be the same on all ranks
