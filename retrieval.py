"""What makes retrieval by a finished network better, or its embeddings cheaper to keep.

Functions of tensors, and functions `EmbeddingSpace -> EmbeddingSpace`, which `evaluate_points` takes as `change`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from auxiliaries import FlagParser, UserError, check_params, notice, number
from evaluate import EmbeddingSpace

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_DISTANCES = 2**22  # that are in memory at once
MAX_VALUES = 2**22  # of neighbors' embeddings that are in memory at once
MAX_ROWS = 4096  # points whose neighbors' neighbors are counted at once
SMALLEST_VARIANCE = 1e-9  # of a component that is whitened, as a share of the largest one: below is rounding

SpaceChange = Callable[[EmbeddingSpace], EmbeddingSpace]


def add_arguments(parser: FlagParser, title: str = "better retrieval, with --evaluate") -> None:
    """Declares the flags of what makes retrieval better, in a group of a title."""
    # fmt: off
    add = parser.add_argument_group(title, stored=False, needs="evaluate").add_argument
    add("--tta", choices=("flip",),
        help="flip: embed each image and its mirror image, and take the mean; takes twice as long")
    add("--whiten", action="switch",
        help="rotate and scale embeddings so that those of the training images are as spread in all directions, and "
        "scale them to length 1")
    add("--database_augmentation", type=number(int, 1), metavar="N",
        help="replace each gallery image's embedding by the mean of it and its N nearest neighbors in the gallery; try "
        "half as many as a class has images")
    add("--query_expansion", type=number(int, 1), metavar="N",
        help="search by the mean of a query's embedding and those of its N nearest neighbors; try 1 to 10, fewer than "
        "a class has images")
    add("--expansion_alpha", type=number(float, 0), metavar="ALPHA",
        help="weight of a neighbor in these means: its cosine similarity to the power ALPHA, such as 3 (default: 0, "
        "all weigh the same)")
    add("--rerank", choices=tuple(RERANKERS),
        help="kreciprocal: rank by how many near neighbors a query and an item share; takes about three times as long")
    add("--rerank_params", action="params", default={},
        help="parameters of --rerank. kreciprocal: k1=20 neighbors that may be shared, about as many as a class has "
        "images; k2=6 neighbors that these are averaged over; lambda_value=0.3, the weight of the plain distance")
    # fmt: on


def check(opt: argparse.Namespace) -> None:
    """Makes sure that no flag of these is given beside which another one is missing.

    Raises:
        UserError: one would do nothing, or --rerank_params doesn't fit.
    """
    if opt.rerank_params and opt.rerank is None:
        raise UserError("--rerank_params does nothing without --rerank: add that, or drop it")
    if opt.expansion_alpha is not None and opt.query_expansion is None and opt.database_augmentation is None:
        raise UserError(
            "--expansion_alpha does nothing without --query_expansion or --database_augmentation: add one, or drop it"
        )
    if opt.rerank is not None:
        build_reranking(opt)


def build_reranking(opt: argparse.Namespace) -> Callable[[torch.Tensor], KReciprocal]:
    """What --rerank and its parameters ask for, a function of points.

    Raises:
        UserError: the parameters don't fit.
    """
    reranker = RERANKERS[opt.rerank]
    params = check_params("--rerank_params", opt.rerank_params, reranker, reserved=("points",))
    for name, value in params.items():
        if name == "lambda_value" and not 0 <= value <= 1:
            raise UserError(f"--rerank_params: {name} takes a number from 0 to 1, not {value}")
        if name != "lambda_value" and value < 1:
            raise UserError(f"--rerank_params: {name} takes an integer of at least 1, not {value}")
    return partial(reranker, **params)


def build_changes(opt: argparse.Namespace, training: torch.Tensor | None) -> list[tuple[str, SpaceChange]]:
    """What the flags do with a space, in the order in which they do it, with names that tell what has become of it.

    Args:
        opt: the flags.
        training: `(R, D)` the embeddings of the training images, for --whiten.

    Raises:
        UserError: the embeddings can't be whitened.
    """
    changes: list[tuple[str, SpaceChange]] = []
    alpha = opt.expansion_alpha or 0.0
    if opt.whiten:
        assert training is not None
        changes.append(("whitened", partial(change_points, change=fit_whitening(training))))
    if opt.database_augmentation:
        changes.append(("augmented database", partial(augment_database, count=opt.database_augmentation, alpha=alpha)))
    if opt.query_expansion:
        changes.append(("expanded queries", partial(expand_queries, count=opt.query_expansion, alpha=alpha)))
    if opt.rerank:
        changes.append(("re-ranked", partial(rerank, build=build_reranking(opt))))
    return changes


def chain(changes: Sequence[SpaceChange]) -> SpaceChange:
    """Several changes of a space as one."""
    changes = tuple(changes)
    return lambda space: reduce(lambda changed, change: change(changed), changes, space)


# Neighbors


def nearest(queries: torch.Tensor, items: torch.Tensor, k: int, own: torch.Tensor | None = None) -> torch.Tensor:
    """The nearest items of each query by Euclidean distance.

    Args:
        queries: `(Q, D)`.
        items: `(G, D)`.
        k: how many; fewer where there aren't that many.
        own: `(Q,)` the position of each query among the items, where it does not find itself; -1 for none.

    Returns:
        `(Q, k)` positions, nearest first.
    """
    return _search(queries, items, k, own)[0]


def _search(
    queries: torch.Tensor, items: torch.Tensor, k: int, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest`, and the squared distance from each query to its farthest item, `(Q,)` float64."""
    k = min(k, len(items) - int(own is not None and bool((own >= 0).any())))
    measure = SquaredDistances(items)
    # in place: small results between large temporary tensors would keep the memory of these from being used again
    found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    farthest = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, MAX_DISTANCES // len(items))):
        distances = measure(queries[rows])  # (rows, G)
        farthest[rows] = distances.amax(dim=1)
        if own is not None:
            inside = (own[rows] >= 0).nonzero()[:, 0]
            distances[inside, own[rows][inside]] = torch.inf
        found[rows] = distances.topk(k, dim=1, largest=False).indices
    return found, farthest


class SquaredDistances:
    """Squared Euclidean distances to some points, by products in float64.

    Args:
        items: `(G, D)`.
    """

    def __init__(self, items: torch.Tensor):
        self.center = items.mean(dim=0, dtype=torch.float64)  # (D,)
        self.items = items.double() - self.center  # (G, D)
        self.squared_norms = self.items.square().sum(dim=1)  # (G,)

    def __call__(self, queries: torch.Tensor) -> torch.Tensor:
        """From queries `(Q, D)`, `(Q, G)` float64."""
        queries = queries.double() - self.center
        squared = torch.addmm(self.squared_norms, queries, self.items.T, alpha=-2)
        return squared.add_(queries.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def is_normalized(points: torch.Tensor) -> bool:
    """Whether all points `(N, D)` have length 1, as far as float32 tells."""
    return bool(((torch.linalg.vector_norm(points, dim=1) - 1).abs() < 1e-3).all())


# Means of neighbors, and of mirror images


def average_with_nearest(
    points: torch.Tensor, items: torch.Tensor, count: int, alpha: float = 0.0, own: torch.Tensor | None = None
) -> torch.Tensor:
    """The weighted mean of each point and its nearest items, of length 1 where the items are.

    Of queries it is average query expansion (Chum et al., ICCV 2007) or, with α > 0, α-weighted query expansion
    (Radenović et al., TPAMI 2018); of a gallery itself, database-side augmentation (Turcot & Lowe, workshop of ICCV
    2009).

    Args:
        points: `(N, D)`.
        items: `(G, D)`.
        count: how many items.
        alpha: an item's weight is its cosine similarity, at least 0, to this power; the point's own weight is 1.
        own: `(N,)` the position of each point among the items, which does not count among the nearest; -1 for none.

    Returns:
        `(N, D)` float32.
    """
    neighbors, means = nearest(points, items, count, own), torch.empty_like(points, dtype=torch.float32)
    rows = torch.arange(len(points), device=points.device)
    for some in rows.split(max(1, MAX_VALUES // (count * points.shape[1]))):
        near, point = items[neighbors[some]].double(), points[some].double()  # (some, count, D), (some, D)
        weights = F.cosine_similarity(point[:, None], near, dim=2).clamp(min=0) ** alpha  # (some, count)
        sums = point + (weights[:, :, None] * near).sum(dim=1)  # (some, D)
        means[some] = (sums / (1 + weights.sum(dim=1, keepdim=True))).float()
    return F.normalize(means, dim=1) if is_normalized(items) else means


def augment_database(space: EmbeddingSpace, count: int, alpha: float = 0.0) -> EmbeddingSpace:
    """The space with each gallery item averaged with its nearest others; the queries stay as they are."""
    every = torch.arange(len(space.gallery), device=space.gallery.device)
    return _with_points(space, space.query, average_with_nearest(space.gallery, space.gallery, count, alpha, every))


def expand_queries(space: EmbeddingSpace, count: int, alpha: float = 0.0) -> EmbeddingSpace:
    """The space with each query averaged with its nearest items; the gallery stays as it is."""
    own = torch.from_numpy(space.query_in_gallery).to(space.query.device)  # (Q,)
    return _with_points(space, average_with_nearest(space.query, space.gallery, count, alpha, own), space.gallery)


def _with_points(space: EmbeddingSpace, query: torch.Tensor, gallery: torch.Tensor) -> EmbeddingSpace:
    return EmbeddingSpace(query, space.query_hierarchy, gallery, space.gallery_hierarchy, space.query_in_gallery)


def change_points(space: EmbeddingSpace, change: Callable[[torch.Tensor], torch.Tensor]) -> EmbeddingSpace:
    """The space with all points changed, `(N, D)` to `(N, d)`."""
    query = change(space.query).float()
    return _with_points(space, query, query if space.gallery is space.query else change(space.gallery).float())


class WithMirror(nn.Module):
    """Embeds images and their mirror images: `(B, 3, H, W)` to `(B, 2D)`, one beside the other.

    Args:
        net: images `(B, 3, H, W)` to embeddings `(B, D)`.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(images), self.net(images.flip(3))], dim=1)


def split_mirror(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `WithMirror` gave, `(N, 2D)`, as the images' own embeddings `(N, D)`, and the means with their mirrors'.

    The means are of length 1 where the embeddings are.
    """
    plain, mirrored = points.chunk(2, dim=1)
    mean = (plain + mirrored) / 2
    return plain.contiguous(), F.normalize(mean, dim=1) if is_normalized(plain) else mean


# Linear projections


@dataclass(frozen=True)
class Projection:
    """Moves points `(N, D)` by `mean` `(D,)`, and multiplies them with `matrix` `(D, d)`, in float64.

    Attributes:
        normalize: whether the result is scaled to length 1.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    normalize: bool = False

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Points `(N, D)` to `(N, d)` float32."""
        projected = ((points.double() - self.mean) @ self.matrix).float()
        return F.normalize(projected, dim=1) if self.normalize else projected


def principal_components(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of points `(N, D)` the mean `(D,)`, the variances `(D,)`, largest first, and their directions `(D, D)`."""
    mean = points.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=points.device)
    for some in points.split(max(1, MAX_VALUES // len(mean))):
        centered = some.double() - mean
        covariance += centered.T @ centered / max(1, len(points) - 1)
    variances, directions = torch.linalg.eigh(covariance)
    return mean, variances.flip(0), directions.flip(1)


def fit_components(points: torch.Tensor, dim: int) -> Projection:
    """The projection on the first principal components of points `(N, D)`, of which there must be that many."""
    mean, _, directions = principal_components(points)
    return Projection(mean, directions[:, :dim])


def fit_whitening(points: torch.Tensor) -> Projection:
    """The projection after which the variance of points `(N, D)` is the same in all directions.

    Directions in which they don't vary are dropped, with a notice. Jégou & Chum, ECCV 2012.

    Raises:
        UserError: they don't vary at all.
    """
    mean, variances, directions = principal_components(points)
    count = int((variances > SMALLEST_VARIANCE * variances[0]).sum())
    if not variances[0] > 0 or len(points) < 2:
        raise UserError("--whiten: the embeddings of the training images are all the same, so there is nothing to fit")
    if count < len(variances):
        notice(f"--whiten keeps {count} of {len(variances)} dimensions: the training embeddings vary in no others")
    return Projection(mean, directions[:, :count] / variances[:count].sqrt(), normalize=True)


# Re-ranking


class KReciprocal:
    """Distances by shared neighbors. Zhong et al., Re-ranking Person Re-identification with k-Reciprocal Encoding, CVPR
    2017; as in the authors' code, plain distances are squared ones, as a share of the point's largest.

    Each point is described by its k-reciprocal neighbors, those which it is a near neighbor of in turn, with theirs
    (equation 5), weighted by exp(-distance) (equation 7) and averaged over near neighbors (equation 11).

    Args:
        points: `(N, D)`, queries and gallery.
        k1: neighbors that may be reciprocal.
        k2: points that a description is averaged over, itself among them.
        lambda_value: the weight of the plain distance beside the Jaccard distance of descriptions (equation 12).
    """

    def __init__(self, points: torch.Tensor, k1: int = 20, k2: int = 6, lambda_value: float = 0.3):
        every = torch.arange(len(points), device=points.device)
        others, self.farthest = _search(points, points, max(k1, k2 - 1), every)
        neighbors = torch.cat([every[:, None], others], dim=1).cpu().numpy()  # (N, 1 + k), nearest first
        self.points, self.lambda_value = points, lambda_value
        descriptions = self._describe(
            _reciprocal(neighbors[:, : k1 + 1]), _reciprocal(neighbors[:, : round(k1 / 2) + 1])
        )
        near = neighbors[:, :k2]
        self.descriptions = (_adjacency(near, 1 / near.shape[1]) @ descriptions).tocsr()  # (N, N), each row sums to 1
        self.by_neighbor = self.descriptions.tocsc()

    def _describe(self, reciprocal: csr_array, among_fewer: csr_array) -> csr_array:
        """Descriptions of all points, before they are averaged, by two matrices of reciprocal neighbors."""
        from scipy import sparse

        sizes, parts = among_fewer.sum(axis=1), []
        for start in range(0, reciprocal.shape[0], MAX_ROWS):
            rows = reciprocal[start : start + MAX_ROWS]
            # a neighbor's own neighbors belong to it if more than two thirds of them do so already
            common = (rows @ among_fewer).multiply(rows).tocsr()
            common.data = (3 * common.data > 2 * sizes[common.indices]).astype(common.data.dtype)
            common.eliminate_zeros()
            members = (rows + common @ among_fewer).tocoo()
            points, others = start + members.row, members.col
            weights = np.exp(-self._plain_distances(points, others))
            weights /= np.bincount(members.row, weights, minlength=rows.shape[0])[members.row]
            parts.append(sparse.csr_array((weights, (members.row, others)), shape=rows.shape))
        return sparse.vstack(parts, format="csr")

    def _plain_distances(self, points: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Squared distances of pairs `(P,)`, as a share of the first point's largest one."""
        step, parts = max(1, MAX_VALUES // self.points.shape[1]), []
        for start in range(0, len(points), step):
            first, second = (torch.from_numpy(part[start : start + step]).long() for part in (points, others))
            first, second = first.to(self.points.device), second.to(self.points.device)
            squared = (self.points[first].double() - self.points[second].double()).square().sum(dim=1)
            parts.append((squared / self.scale(first)).cpu().numpy())
        return np.concatenate(parts)

    def scale(self, points: torch.Tensor) -> torch.Tensor:
        """The largest squared distance of points `(P,)`, `(P,)` float64; tiny where all points are the same."""
        return self.farthest[points].clamp(min=torch.finfo(torch.float64).tiny)

    def jaccard(self, points: np.ndarray) -> np.ndarray:
        """Jaccard distances `(P, N)` from points `(P,)`, by their positions, to all."""
        table, columns = self.descriptions, self.by_neighbor
        shared = np.empty((len(points), table.shape[0]))
        for row, point in enumerate(points):
            entries = slice(table.indptr[point], table.indptr[point + 1])
            starts, ends = columns.indptr[table.indices[entries]], columns.indptr[table.indices[entries] + 1]
            sizes = ends - starts
            before = sizes.cumsum() - sizes
            places = np.arange(sizes.sum()) + np.repeat(starts - before, sizes)  # of all that share a neighbor
            both = np.minimum(np.repeat(table.data[entries], sizes), columns.data[places])
            shared[row] = np.bincount(columns.indices[places], both, minlength=table.shape[0])
        return 1 - shared / (2 - shared)  # of sums of minima and maxima, since each row sums to 1


RERANKERS = {"kreciprocal": KReciprocal}


def _adjacency(neighbors: np.ndarray, value: float) -> csr_array:
    """A matrix `(N, N)` with a value where a point has a neighbor, from neighbors `(N, k)`."""
    from scipy import sparse

    size, k = neighbors.shape
    indptr = np.arange(0, size * k + 1, k)
    return sparse.csr_array((np.full(size * k, value), neighbors.ravel(), indptr), shape=(size, size))


def _reciprocal(neighbors: np.ndarray) -> csr_array:
    """A matrix `(N, N)` with 1 where two points are neighbors of each other, from neighbors `(N, k)`."""
    adjacency = _adjacency(neighbors, 1)
    return adjacency.multiply(adjacency.T).tocsr()


def rerank(space: EmbeddingSpace, build: Callable[[torch.Tensor], KReciprocal]) -> EmbeddingSpace:
    """The space with a ranking of its own: by shared neighbors among gallery and queries.

    Args:
        space: all points. A query in the gallery is one of them once, as the gallery has it.
        build: gives the re-ranking of points `(N, D)`, see `build_reranking`.
    """
    outside = space.query_in_gallery < 0  # (Q,)
    num_outside, device = int(outside.sum()), space.query.device
    place = np.where(outside, outside.cumsum() - 1, num_outside + space.query_in_gallery)  # (Q,) among space.points
    model, measure = build(space.points), SquaredDistances(space.gallery)

    def ranking(rows: torch.Tensor) -> torch.Tensor:
        points, own = place[rows.cpu().numpy()], torch.from_numpy(space.query_in_gallery).to(device)[rows]
        jaccard = torch.from_numpy(model.jaccard(points)[:, num_outside:]).to(device)  # (rows, G)
        plain = measure(space.query[rows]) / model.scale(torch.from_numpy(points).to(device))[:, None]  # (rows, G)
        distances = torch.lerp(jaccard, plain, model.lambda_value).clamp_(min=0)
        inside = (own >= 0).nonzero()[:, 0]
        distances[inside, own[inside]] = 0
        return distances

    changed = space.with_labels(space.query_hierarchy, space.gallery_hierarchy)
    changed.ranking = ranking
    return changed


# Cheaper embeddings


def quantize_int8(points: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Points `(N, D)`, each coordinate rounded to one of 256 steps between the reference's extremes `(R, D)`."""
    low, high = reference.amin(dim=0), reference.amax(dim=0)  # (D,) each
    step = torch.where(high > low, (high - low) / 255, 1)
    return ((points - low) / step).round_().clamp_(0, 255) * step + low


def quantize_binary(points: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Points `(N, D)`, each coordinate as 1 or -1: whether it is above the mean of the reference's `(R, D)`."""
    return torch.where(points > reference.mean(dim=0), 1.0, -1.0)


@dataclass(frozen=True)
class Precision:
    """How embeddings are kept.

    Attributes:
        bits: per coordinate.
        quantize: points `(N, D)` and a reference `(R, D)` to the points as they are kept, `(N, D)`.
    """

    bits: int
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def bytes_per_image(self, dim: int) -> int:
        """How many bytes an embedding of that many dimensions takes."""
        return -(-self.bits * dim // 8)


PRECISIONS = {"float32": Precision(32), "int8": Precision(8, quantize_int8), "binary": Precision(1, quantize_binary)}


def compress(space: EmbeddingSpace, reference: torch.Tensor, dim: int, precision: str) -> EmbeddingSpace:
    """The space with queries and gallery as they are kept in less memory.

    Args:
        space: all points, of D dimensions.
        reference: `(R, D)` embeddings of the training images, which components, extremes and means are taken of.
        dim: principal components that are kept; D: the embeddings themselves.
        precision: a key of `PRECISIONS`. Binary codes are compared by the number of bits in which they differ.
    """
    if dim < reference.shape[1]:
        projection = fit_components(reference, dim)
        space, reference = change_points(space, projection), projection(reference)
    quantize = PRECISIONS[precision].quantize
    if quantize is None:
        return space
    space = change_points(space, lambda points: quantize(points, reference))
    if precision == "binary":
        codes, queries = space.gallery, space.query
        space.ranking = lambda rows: (queries[rows] @ codes.T).double().neg_().add_(dim).div_(2)  # (rows, G)
    return space


def check_dims(dims: Sequence[int], count: int, dim: int) -> None:
    """Makes sure that --eval_dims fits a number of training embeddings and their dimension, see `compress`.

    Raises:
        UserError: it doesn't.
    """
    if max(dims, default=0) > min(count, dim):
        raise UserError(
            f"--eval_dims {max(dims)} is more than {count} training embeddings of dimension {dim} have: lower it"
        )
