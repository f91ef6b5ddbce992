"""evaluate.py: every metric against a worked example, a naive loop or another library; ties, tiles and odd inputs."""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import (
    adjusted_mutual_info_score,
    ndcg_score,
    normalized_mutual_info_score,
    roc_auc_score,
    roc_curve,
)
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import nn

import config
import datasets
import evaluate
import transforms
from auxiliaries import UserError
from datasets import RetrievalSet
from evaluate import EmbeddingSpace, Metric, Points, evaluate_space, f1, intra_inter_ratio, nmi, recall_at_k

Data = tuple[np.ndarray, np.ndarray]  # (N, D) float32 points and (N,) labels

CLASS_SIZES = {"2": [2] * 30, "5": [5] * 20, "mixed": [2, 3, 5, 8] * 5}


@pytest.fixture(autouse=True)
def _notices_come_again() -> None:
    evaluate.import_faiss.cache_clear()
    evaluate._notice_once.cache_clear()


RETRIEVAL = ["Recall @ 1", "Precision @ 1", "MRR", "R-precision", "MAP@R", "mAP", "nDCG", "H-AP"]


def perfect_space(sizes: Sequence[int]) -> EmbeddingSpace:
    """A space in which every point is the center of its class, in random order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centers = rng.normal(size=(len(sizes), 16))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    return EmbeddingSpace(centers[labels].astype(np.float32), labels)


def clustered_space(labels: Sequence[int] | np.ndarray, clusters: Sequence[int] | np.ndarray) -> EmbeddingSpace:
    """A space with given clusters, for metrics that see nothing else."""
    space = EmbeddingSpace(np.zeros((len(labels), 2), np.float32), np.asarray(labels))
    vars(space)["clusters"] = np.asarray(clusters)
    return space


@pytest.mark.parametrize("sizes", CLASS_SIZES.values(), ids=CLASS_SIZES)
@pytest.mark.parametrize("name", ["NMI", "AMI", "F1", "Recall @ 4", "ROC AUC", "Verification accuracy", *RETRIEVAL])
def test_a_perfect_embedding_scores_one(sizes: list[int], name: str) -> None:
    assert evaluate_space(perfect_space(sizes), [4], list(evaluate.METRICS))[name] == pytest.approx(1)


COLLAPSED = [(dim, size, normalized) for dim in (2, 64, 128, 512) for size in (10, 513) for normalized in (False, True)]
COLLAPSED += [(dim, 4096 + 512 + 37, dim in (64, 512)) for dim in (2, 64, 128, 512)]  # several tiles and a remainder


@pytest.mark.parametrize(("dim", "size", "normalized"), COLLAPSED)
def test_a_collapsed_network_scores_zero(dim: int, size: int, normalized: bool) -> None:
    vector = torch.randn(dim, generator=torch.Generator().manual_seed(dim)) * 3
    if normalized:
        vector = nn.functional.normalize(vector, dim=0)
    labels = np.random.default_rng(size).permutation(np.arange(size) % 5)
    space = EmbeddingSpace(vector.repeat(size, 1), labels)
    others = size - np.bincount(labels)[labels]
    np.testing.assert_array_equal(space.num_negatives_ahead, others)
    assert recall_at_k(space, 1) == recall_at_k(space, int(others.min())) == 0


def exact_ahead(space: EmbeddingSpace, tie: float = evaluate.TIE) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """`num_negatives_ahead` and `precisions` by differences in float64, one query at a time; 0 without a positive."""
    query, gallery = space.query.double().numpy(), space.gallery.double().numpy()
    ahead = np.zeros(len(query), np.int64)
    precisions = {name: np.zeros(len(query)) for name in ("r_precision", "map_at_r", "map", "dcg")}
    for i in np.flatnonzero(space.has_positive):
        distances = np.sqrt(np.square(gallery - query[i]).sum(axis=1))
        is_positive = space.gallery_labels == space.query_labels[i]
        negatives = np.sort(distances[~is_positive])
        if space.query_in_gallery[i] >= 0:
            is_positive[space.query_in_gallery[i]] = False
        counts = np.searchsorted(negatives, tie * np.sort(distances[is_positive]), side="right")
        found = np.arange(1, len(counts) + 1)
        precision, within_r = found / (found + counts), found + counts <= len(counts)
        ahead[i] = counts[0]
        precisions["r_precision"][i] = within_r.mean()
        precisions["map_at_r"][i] = (precision * within_r).mean()
        precisions["map"][i] = precision.mean()
        precisions["dcg"][i] = (1 / np.log2(1 + found + counts)).sum()
    return ahead, precisions


def assert_exact(space: EmbeddingSpace) -> None:
    """Compares counts and precisions with `exact_ahead`; only its ties may be seen in either way."""
    (few, high), (many, low) = (exact_ahead(space, tie) for tie in (1 + 0.8e-14, 1 + 1.2e-14))
    counted = space.has_positive
    assert (space.num_negatives_ahead >= few)[counted].all()
    assert (space.num_negatives_ahead <= many)[counted].all()
    for k_vals in ([], [math.inf]):  # with all ranks, too
        space.count_at(k_vals)
        del space.num_negatives_ahead  # which are counted beside precisions now
        assert set(space.precisions) == {"r_precision", "map_at_r", *(["map", "dcg"] if k_vals else [])}
        for name, values in space.precisions.items():
            assert (low[name] - 1e-12 <= values).all(), name
            assert (values <= high[name] + 1e-12).all(), name
        assert (space.num_negatives_ahead >= few)[counted].all()
        assert (space.num_negatives_ahead <= many)[counted].all()


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def in_clumps(rng: np.random.Generator, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which of up to four clumps a point is in: by its class, or at random."""
    count = int(rng.integers(1, 5))
    return labels % count if rng.random() < 0.5 else rng.integers(0, count, len(points))


def wide_norms(rng: np.random.Generator, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return x * 10 ** rng.uniform(-18, 18, (len(x), 1))


def clumps(rng: np.random.Generator, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    centers = unit(rng.normal(size=(4, x.shape[1])))[in_clumps(rng, x, labels)]
    return centers * 10.0 ** rng.integers(-3, 4) + x * 10.0 ** rng.integers(-8, -1)


def few_points(rng: np.random.Generator, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return x[rng.integers(0, rng.integers(1, 4), len(x))]


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "Gaussian": lambda rng, x, labels: x,
    "unit": lambda rng, x, labels: unit(x),
    "without negatives": lambda rng, x, labels: np.maximum(x, 0),
    "integers": lambda rng, x, labels: rng.integers(-2, 3, x.shape),
    "duplicates": lambda rng, x, labels: x[rng.integers(0, max(1, len(x) // 5), len(x))],
    "wide norms": wide_norms,
    "tiny": lambda rng, x, labels: x * 10.0 ** rng.integers(-44, -15),
    "huge": lambda rng, x, labels: unit(x) * 10.0 ** rng.integers(15, 38),
    "clumps": clumps,
    "clumps on the sphere": lambda rng, x, labels: unit(clumps(rng, x, labels)),
    "far": lambda rng, x, labels: (
        x * 10.0 ** rng.integers(-6, 2) + rng.normal(size=x.shape[1]) * 10.0 ** rng.integers(5)
    ),
    "collapsed to a few points": few_points,
    "a line": lambda rng, x, labels: np.linspace(0, 1, len(x))[:, None] * x[:1],
    "mostly zeros": lambda rng, x, labels: x * (rng.random((len(x), 1)) < 0.3),
    "an outlier": lambda rng, x, labels: np.concatenate([1e6 * x[:1], unit(x[1:])]),
}


def random_space(kind: str, rng: np.random.Generator) -> EmbeddingSpace:
    """Random points of a kind: against themselves, a gallery, or one that holds some of them."""
    size, dim = int(rng.integers(5, 250)), int(rng.choice([1, 2, 3, 16, 64, 128]))
    labels = rng.integers(0, rng.integers(1, max(2, size // 2)), size)
    x = rng.choice([0, 0.3, 1, 3]) * rng.normal(size=(size, dim))[labels] + rng.normal(size=(size, dim))
    points = KINDS[kind](rng, x, labels).astype(np.float32)
    mode = rng.integers(3)
    if mode == 0:
        return EmbeddingSpace(points, labels)
    cut = size // 3 + 1
    if mode == 1:
        return EmbeddingSpace(points[:cut], labels[:cut], points[cut:], labels[cut:])
    where = rng.permutation(size)[:cut]
    items = np.setdiff1d(np.arange(size), where[::2])
    place = np.array([items.tolist().index(i) if i in items else -1 for i in where])
    return EmbeddingSpace(points[where], labels[where], points[items], labels[items], place)


@pytest.mark.parametrize("max_in_turn", [0, 2, 16])
@pytest.mark.parametrize("tiles", [(16, 32), (512, 2048)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_exact(kind: str, tiles: tuple[int, int], max_in_turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    monkeypatch.setattr(evaluate, "MAX_IN_TURN", max_in_turn)
    for case in range(4):
        assert_exact(random_space(kind, np.random.default_rng([list(KINDS).index(kind), case, max_in_turn])))


@pytest.mark.parametrize("distance", [1.0, 1000.0])
@pytest.mark.parametrize("spread", [1e-2, 3e-4, 1e-5, 1e-7])
@pytest.mark.parametrize("num_clumps", [1, 2, 30])
def test_points_that_crowd_around_several_points_are_told_apart(
    num_clumps: int, spread: float, distance: float
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 60
    offsets = rng.normal(size=(60, 16))[labels] + 0.3 * rng.normal(size=(3000, 16))
    centers = unit(rng.normal(size=(num_clumps, 16)))[labels % num_clumps]
    space = EmbeddingSpace((distance * (centers + spread * offsets)).astype(np.float32), labels)
    chosen = rng.choice(3000, 100, replace=False)
    part = EmbeddingSpace(space.query[chosen], labels[chosen], space.gallery, labels, chosen)
    ahead, _ = exact_ahead(part)
    assert (ahead == 0).mean() > 0.5
    np.testing.assert_array_equal(part.num_negatives_ahead, ahead)
    np.testing.assert_array_equal(space.num_negatives_ahead[chosen], ahead)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("spread", "distance"), [(3e-4, 1), (1e-4, 1000), (1e-5, 1)])
def test_clusters_inside_clumps_are_found(spread: float, distance: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 20
    offsets = unit(rng.normal(size=(20, 32)))[labels] + 0.03 * rng.normal(size=(2000, 32))
    centers = unit(rng.normal(size=(2, 32)))[labels % 2]
    assert nmi(EmbeddingSpace((distance * (centers + spread * offsets)).astype(np.float32), labels)) > 0.9


@pytest.mark.parametrize("exponent", [-100, -50, 50, 100])
def test_no_metric_depends_on_the_size_of_the_embeddings(exponent: int) -> None:
    points, labels = gaussian(np.random.default_rng(2), 120)
    usual, scaled = (
        evaluate_space(EmbeddingSpace(x, labels), [1, 4], list(evaluate.METRICS))
        for x in (points, points * np.float32(2.0**exponent))
    )
    threshold = scaled.pop("Verification threshold")
    assert threshold == pytest.approx(usual.pop("Verification threshold") * 2.0**exponent)
    assert usual == pytest.approx(scaled, rel=1e-9)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_usual_case_takes_products_in_float32_only(normalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    real = evaluate._Products.__init__

    def record(self: Any, space: EmbeddingSpace, dtype: torch.dtype) -> None:
        made.append(dtype)
        real(self, space, dtype)

    monkeypatch.setattr(evaluate._Products, "__init__", record)
    rng = np.random.default_rng(1)
    labels = np.arange(3000) % 500
    for noise in (0.1, 1.0, 1e6):  # tight classes, usual ones, none at all
        points = rng.normal(size=(500, 64))[labels] + noise * rng.normal(size=(3000, 64))
        space = EmbeddingSpace((unit(points) if normalized else points).astype(np.float32), labels)
        evaluate_space(space, [1], ["Recall", "MAP@R"])
    assert made == [torch.float32] * 3


@pytest.fixture
def num_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all products that are taken."""
    taken: list[int] = []
    multiply, score_all = evaluate._Products.multiply, evaluate._Products.score_all

    def record(real: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        scores = real(*args)
        taken.append(scores.numel())
        return scores

    monkeypatch.setattr(evaluate._Products, "multiply", lambda *args: record(multiply, *args))
    monkeypatch.setattr(evaluate._Products, "score_all", lambda *args: record(score_all, *args))
    return taken


@pytest.mark.parametrize("names", [["Recall"], ["Recall", "MRR", "R-precision", "MAP@R", "mAP"]], ids=len)
def test_all_against_all_takes_each_product_once(names: list[str], num_products: list[int]) -> None:
    """For all metrics together; only tiles on the diagonal, and classes, are taken as a whole."""
    rng = np.random.default_rng(1)
    labels = np.arange(9000) % 750
    points = unit(rng.normal(size=(750, 16))[labels] + 0.5 * rng.normal(size=(9000, 16)))
    space = EmbeddingSpace(points.astype(np.float32), labels)
    evaluate_space(space, [1, 10], names)
    assert 0.5 < sum(num_products) / 9000**2 < 0.75
    np.testing.assert_array_equal(
        space.num_negatives_ahead, EmbeddingSpace(points.astype(np.float32), labels).num_negatives_ahead
    )


@pytest.mark.parametrize("is_own", [True, False])
def test_the_nearest_positive_is_counted_beyond_the_ranks_that_matter(
    is_own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two positives and a negative whose distances float32 can't tell apart, behind more nearer ones than positives."""
    monkeypatch.setattr(evaluate, "QUERY_TILE", 16)
    monkeypatch.setattr(evaluate, "GALLERY_TILE", 16)
    rng = np.random.default_rng(0)
    queries = 10 * rng.normal(size=(60, 8))
    around = unit(rng.normal(size=(540, 8))).reshape(9, 60, 8)
    around[2:8] /= 2
    points = np.concatenate([queries, *(queries + around)]).astype(np.float32)
    own = np.arange(60)
    labels = np.concatenate([own, own, own, *(100 * part + own for part in range(1, 8))])
    space = EmbeddingSpace(points, labels)
    if not is_own:
        space = EmbeddingSpace(points[:60], labels[:60], points, labels, own)
    assert (exact_ahead(space)[0][:60] >= 6).all()
    assert_exact(space)


def test_few_big_classes_take_no_more_products_than_a_loop(num_products: list[int]) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(6000) % 2
    space = EmbeddingSpace((rng.normal(size=(6000, 16)) + labels[:, None]).astype(np.float32), labels)
    assert 0 < recall_at_k(space, 1) < 1
    assert sum(num_products) <= 6000**2
    chosen = rng.choice(6000, 30, replace=False)
    part = EmbeddingSpace(space.query[chosen], labels[chosen], space.gallery, labels, chosen)
    np.testing.assert_array_equal(space.num_negatives_ahead[chosen], exact_ahead(part)[0])


def test_queries_with_other_rounding_errors_take_products_of_their_own(num_products: list[int]) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(1000) % 200
    points = rng.normal(size=(200, 16))[labels] + 0.5 * rng.normal(size=(1000, 16))
    points[rng.choice(1000, 60, replace=False)] *= 30
    space = EmbeddingSpace(points.astype(np.float32), labels)
    assert_exact(space)
    assert 60 * 1000 in num_products


@pytest.mark.parametrize("kind", ["Gaussian", "ties", "crowded", "one positive"])
@pytest.mark.parametrize("cells", [8, 2**16])
def test_scores_are_ranked_as_by_comparing_all(kind: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MAX_CELLS", cells)
    rng = np.random.default_rng(2)
    scores, ascending = rng.normal(size=(4, 700)) * 1e4, np.sort(rng.normal(size=(4, 90)) * 1e4, axis=1)
    if kind == "ties":
        scores, ascending = scores // 1000, ascending // 1000
    if kind == "crowded":
        scores, ascending = scores / 1e3, ascending / 1e3
    if kind == "one positive":
        ascending[1, :-1] = -np.inf
    ascending[2, :40], ascending[3], scores[0, :300] = -np.inf, -np.inf, -np.inf
    wanted = np.isfinite(ascending)
    difference = scores[:, None] - ascending[:, :, None]  # (rows, M, G)
    for rank in (
        evaluate._rank_rows(scores, ascending),
        evaluate._rank_sorted(torch.from_numpy(scores), torch.from_numpy(ascending)),
    ):
        for found, expected in zip(rank, ((difference >= 1).sum(axis=2), (difference > 0).sum(axis=2))):
            np.testing.assert_array_equal(found.numpy()[wanted], expected[wanted])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (16, 8), (1, 3), (40, 33)])
def test_scores_above_the_lowest_are_found(shape: tuple[int, int], is_transposed: bool) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scores = scores.T if is_transposed else scores
    lowest = torch.linspace(-0.5, 1, len(scores))[:, None]
    rows, columns = evaluate._find_above(scores, lowest, scores.numel())
    assert sorted(map(list, zip(rows.tolist(), columns.tolist()))) == (scores > lowest).nonzero().tolist()
    assert len(evaluate._find_above(scores, lowest, len(rows) - 1)[0]) == len(rows)


@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30, 3e38])
def test_an_exploded_network_does_not_score(scale: float) -> None:
    points = np.full((40, 8), scale, np.float32)
    assert recall_at_k(EmbeddingSpace(points, np.arange(40) % 4), 1) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "gallery"])
def test_embeddings_that_are_not_finite_are_refused(where: str, value: float) -> None:
    points = {"query": np.zeros((4, 3), np.float32), "gallery": np.zeros((4, 3), np.float32)}
    points[where][2, 1] = value
    with pytest.raises(UserError, match="not finite"):
        EmbeddingSpace(points["query"], np.zeros(4, int), points["gallery"], np.zeros(4, int))


def gaussian(rng: np.random.Generator, size: int) -> Data:
    return rng.normal(size=(size, 24)).astype(np.float32), rng.integers(0, size // 6, size)


def integers(rng: np.random.Generator, size: int) -> Data:
    """Many exact ties between different points."""
    return rng.integers(-2, 3, (size, 4)).astype(np.float32), rng.integers(0, size // 6, size)


def duplicates(rng: np.random.Generator, size: int) -> Data:
    """Every point several times, inside and across classes, at random positions."""
    points = rng.normal(size=(size // 7, 63)).astype(np.float32)
    return points[rng.integers(0, len(points), size)], rng.integers(0, size // 6, size)


def norms(rng: np.random.Generator, size: int) -> Data:
    points, labels = gaussian(rng, size)
    return points * 10 ** rng.uniform(-2, 2, (size, 1)).astype(np.float32), labels


def huge_class(rng: np.random.Generator, size: int) -> Data:
    points, labels = gaussian(rng, size)
    return points, np.where(rng.random(size) < 0.8, 3, labels)


DATA = [gaussian, integers, duplicates, norms, huge_class]


def naive_ahead(
    query: np.ndarray, label: int, place: int, gallery: np.ndarray, gallery_labels: np.ndarray
) -> tuple[int, int] | None:
    """Counts, in float64, the negatives at least as near as the nearest positive: the bounds of what float32 may give.

    `place` is the query's position in the gallery, or -1. None without a positive.
    """
    distances = np.square(gallery.astype(np.float64) - query.astype(np.float64)).sum(axis=1)
    is_positive = gallery_labels == label
    negatives = distances[~is_positive]
    if place >= 0:
        is_positive[place] = False
    if not is_positive.any():
        return None
    nearest = distances[is_positive].min()
    rounding = 1e-6 * np.square(np.linalg.norm(query) + np.sqrt(nearest))
    unclear = (np.abs(negatives - nearest) < rounding) & (negatives != nearest)  # exact ties are clear: they count
    at_least_as_near = negatives <= nearest
    return int((at_least_as_near & ~unclear).sum()), int((at_least_as_near | unclear).sum())


def check_against_naive_loop(space: EmbeddingSpace, queries: np.ndarray) -> None:
    clear = 0
    gallery = space.gallery.numpy()
    for i in queries:
        place = int(space.query_in_gallery[i])
        bounds = naive_ahead(space.query[i].numpy(), space.query_labels[i], place, gallery, space.gallery_labels)
        assert space.has_positive[i] == (bounds is not None)
        if bounds is not None:
            assert bounds[0] <= space.num_negatives_ahead[i] <= bounds[1], f"query {i}"
        clear += bounds is None or bounds[0] == bounds[1]
    assert clear >= 0.9 * len(queries)  # or the bounds would prove nothing


@pytest.mark.parametrize("tiles", [(16, 32), (32, 16), (512, 4096)], ids=str)
@pytest.mark.parametrize("with_gallery", [False, True], ids=["self", "query and gallery"])
@pytest.mark.parametrize("make", DATA)
def test_recall_equals_a_naive_loop(
    make: Callable[[np.random.Generator, int], Data],
    with_gallery: bool,
    tiles: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    points, labels = make(np.random.default_rng(3), 300)
    labels[[0, 20, 299]] = [-7, 10**9, 10**9 + 1]  # without a positive; far from 0 … C - 1
    cut = 110
    space = (
        EmbeddingSpace(points[:cut], labels[:cut], points[cut:], labels[cut:])
        if with_gallery
        else EmbeddingSpace(points, labels)
    )
    check_against_naive_loop(space, np.arange(len(space.query)))
    counted = space.num_negatives_ahead[space.has_positive]
    for k in (1, 5, 50):
        assert recall_at_k(space, k) == pytest.approx((counted < k).mean())


@pytest.mark.parametrize("make", [gaussian, integers, duplicates])
def test_recall_equals_a_naive_loop_over_several_tiles_of_real_size(
    make: Callable[[np.random.Generator, int], Data],
) -> None:
    rng = np.random.default_rng(4)
    points, labels = make(rng, 4096 + 700)
    check_against_naive_loop(EmbeddingSpace(points, labels), rng.choice(len(points), 200, replace=False))


def test_the_query_is_excluded_by_its_index() -> None:
    """Not by dropping the first neighbor: here that may be the duplicate of another class."""
    points = np.array([[0, 0], [0, 0], [1, 0], [5, 5], [5, 5]], np.float32)
    space = EmbeddingSpace(points, np.array([0, 1, 0, 1, 1]))
    np.testing.assert_array_equal(space.num_negatives_ahead, [1, 2, 1, 0, 0])
    assert recall_at_k(space, 1) == pytest.approx(2 / 5)
    assert recall_at_k(space, 2) == pytest.approx(4 / 5)


def test_queries_without_a_positive_are_left_out() -> None:
    points = np.array([[0.0], [1.0], [1.1], [9.0]], np.float32)
    own = EmbeddingSpace(points, np.array([0, 0, 1, 2]))
    np.testing.assert_array_equal(own.has_positive, [True, True, False, False])
    assert recall_at_k(own, 1) == pytest.approx(1 / 2)

    gallery = EmbeddingSpace(points, np.array([0, 5, 1, 2]), points[1:], np.array([0, 1, 2]))
    np.testing.assert_array_equal(gallery.has_positive, [True, False, True, True])
    assert recall_at_k(gallery, 1) == pytest.approx(1)


def test_recall_at_1_is_always_there_and_k_may_exceed_the_gallery() -> None:
    space = EmbeddingSpace(*gaussian(np.random.default_rng(0), 30))
    metrics = evaluate_space(space, [1000, 4])
    assert list(metrics) == ["NMI", "F1", "Recall @ 1", "Recall @ 4", "Recall @ 1000"]
    assert metrics["Recall @ 1"] < metrics["Recall @ 1000"] == 1


def test_recall_at_1_agrees_with_pytorch_metric_learning() -> None:
    rng = np.random.default_rng(5)
    points, labels = torch.from_numpy(rng.normal(size=(400, 16))).float(), rng.integers(0, 60, 400)
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, device=torch.device("cpu"))
    own = calculator.get_accuracy(points, torch.from_numpy(labels))
    assert recall_at_k(EmbeddingSpace(points, labels), 1) == pytest.approx(own["precision_at_1"])

    query, gallery = slice(0, 150), slice(150, 400)
    theirs = calculator.get_accuracy(
        points[query], torch.from_numpy(labels[query]), points[gallery], torch.from_numpy(labels[gallery])
    )
    space = EmbeddingSpace(points[query], labels[query], points[gallery], labels[gallery])
    assert recall_at_k(space, 1) == pytest.approx(theirs["precision_at_1"])


def test_nmi_and_f1_of_a_worked_example() -> None:
    """Six points, classes of three and three, clusters of two and four."""
    space = clustered_space([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1])
    # Pairs: in a cluster 1 + 6, in a class 3 + 3, in both 1 + 0 + 3: P = 4/7, R = 4/6.
    assert f1(space) == pytest.approx(8 / 13)
    information = 1 / 3 * np.log(2) - 1 / 6 * np.log(2) + 1 / 2 * np.log(3 / 2)
    entropies = np.log(2) + 1 / 3 * np.log(3) + 2 / 3 * np.log(3 / 2)
    assert nmi(space) == pytest.approx(2 * information / entropies)


def test_nmi_and_f1_agree_with_scikit_learn() -> None:
    space = EmbeddingSpace(*gaussian(np.random.default_rng(6), 240))
    (_, only_cluster), (only_class, both) = pair_confusion_matrix(space.labels, space.clusters)
    precision, recall = both / (both + only_cluster), both / (both + only_class)
    assert 0 < f1(space) == pytest.approx(2 * precision * recall / (precision + recall))
    assert nmi(space) == pytest.approx(
        normalized_mutual_info_score(space.labels, space.clusters, average_method="arithmetic")
    )


def test_f1_counts_pairs_beyond_32_bits() -> None:
    labels = np.arange(300_000, dtype=np.int32) % 2
    space = clustered_space(labels, np.zeros(len(labels), np.int32))
    half, everything = 150_000 * 149_999, 300_000 * 299_999 / 2
    assert f1(space) == pytest.approx(2 * half / (half + everything))


@pytest.mark.parametrize("with_gallery", [False, True], ids=["self", "query and gallery"])
def test_kmeans_sees_all_points_and_as_many_clusters_as_classes(
    with_gallery: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[int, int, int, int]] = []

    class Spy(faiss.Clustering):
        def train(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            used = min(len(x), self.max_points_per_centroid * self.k)
            trained.append((self.k, used, self.niter, self.min_points_per_centroid))
            return super().train(x, *args, **kwargs)

    monkeypatch.setattr(faiss, "Clustering", Spy)
    points = np.random.default_rng(0).normal(size=(900, 4)).astype(np.float32)
    labels = np.array([7, 40, 1000])[np.arange(900) % 3]
    if with_gallery:
        space = EmbeddingSpace(points[:300], np.full(300, 7), points[300:], labels[300:])
    else:
        space = EmbeddingSpace(points, labels)
    evaluate_space(space, [1, 2])
    assert trained == []  # own code does
    space.clustering = evaluate.Clustering("faiss")
    del vars(space)["clusters"], vars(space)["clusterings"]
    evaluate_space(space, [1, 2])
    assert trained == [(3, 900, 20, 1)]  # once for all metrics; faiss's own limit would be 3 * 256 points
    assert len(space.clusters) == len(space.labels) == len(space.points) == 900
    assert set(space.clusters) == {0, 1, 2}


def objective(points: torch.Tensor, clusters: np.ndarray) -> float:
    """The sum of squared distances of points to the means of their clusters."""
    return float(evaluate.class_means(points.double(), clusters)[1].sum())


@pytest.mark.parametrize("has_faiss", [True, False])
@pytest.mark.parametrize(("num_classes", "noise"), [(150, 0.3), (150, 1.0), (150, 1e6), (8, 1.0)], ids=str)
def test_kmeans_equals_that_of_faiss(
    num_classes: int, noise: float, has_faiss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(1500) % num_classes
    points = unit(rng.normal(size=(num_classes, 16))[labels] + noise * rng.normal(size=(1500, 16))).astype(np.float32)
    theirs, ours = EmbeddingSpace(points, labels), EmbeddingSpace(points, labels)
    theirs.clustering = evaluate.Clustering("faiss")
    reference = objective(theirs.points, theirs.clusters)
    if not has_faiss:
        monkeypatch.setattr(evaluate, "import_faiss", lambda: None)
    assert objective(ours.points, ours.clusters) == pytest.approx(reference, rel=1e-4)
    assert nmi(ours) == pytest.approx(nmi(theirs), abs=1e-3)


def test_kmeans_compares_with_centers_that_moved_as_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 90
    space = EmbeddingSpace(rng.normal(size=(900, 6)).astype(np.float32) + labels[:, None] % 3, labels)
    num_compared: list[int] = []
    search = evaluate._KMeans._search

    def counted(self: Any, chosen: torch.Tensor, among: torch.Tensor) -> None:
        num_compared.append(len(chosen) * len(among))
        search(self, chosen, among)

    monkeypatch.setattr(evaluate._KMeans, "_search", counted)
    start = torch.from_numpy(rng.permutation(900)[:90])
    kmeans = evaluate._KMeans(space, start, torch.float64)
    kmeans.run(20)
    assert 2 * 900 * 90 <= sum(num_compared) < 12 * 900 * 90
    points = space.query.double()
    centers = points[start]
    for _ in range(20):
        nearest = torch.cdist(points, centers).argmin(dim=1)
        centers = torch.stack([points[nearest == cluster].mean(dim=0) for cluster in range(90)])
    np.testing.assert_array_equal(kmeans.clusters, torch.cdist(points, centers).argmin(dim=1))
    squared = (points - centers[kmeans.clusters]).square().sum(dim=1) * space.scale**2
    np.testing.assert_allclose(kmeans.squared, squared, atol=1e-12)


def test_clusters_that_are_split_for_empty_ones() -> None:
    sizes = np.array([0, 1, 6, 0, 40, 1, 0])
    pairs = list(evaluate._choose_splits(sizes))
    assert [empty for empty, _ in pairs] == [0, 3, 6]
    assert {other for _, other in pairs} <= {0, 2, 3, 4}  # of several points, also after a split
    drawn = [next(evaluate._choose_splits(np.array([0, 1, 1, 4, large])))[1] for large in range(2, 400)]
    assert 0.8 < np.mean(np.array(drawn) == 4) < 1
    points = np.repeat(np.arange(3, dtype=np.float32), 4)[:, None] + np.tile([0, 0.1, 0.2, 0.3], 3)[:, None]
    kmeans = evaluate._KMeans(EmbeddingSpace(points, np.arange(12)), torch.tensor([0, 0, 0, 4, 8]), torch.float32)
    kmeans.run(20)
    assert len(kmeans.clusters.unique()) == 5
    far = evaluate._KMeans(EmbeddingSpace(points[[0, 1, 4, 10, 11]], np.arange(5)), torch.tensor([0, 0]), torch.float64)
    far.run(20)
    assert far.clusters.unique(return_counts=True)[1].tolist() in ([2, 3], [3, 2])


def test_stored_runs_are_clustered_by_faiss_as_before(tmp_path: Path) -> None:
    stored = tmp_path / "config.yaml"
    stored.write_text("dataset: cub200\n")
    for argv, expected in (([], "faiss"), (["--kmeans", "own", "--kmeans_restarts", "3"], "own")):
        clustering = evaluate.give_clustering(config.parse(argv, stored))
        assert clustering == evaluate.Clustering(expected, restarts=3 if argv else 1)
    assert evaluate.give_clustering(config.parse([])) == evaluate.Clustering("own")


def test_distinct_points_are_found_alike_on_any_device() -> None:
    points = np.random.default_rng(0).integers(-2, 3, (200, 3)).astype(np.float32)
    points[::7] = -0.0
    given = torch.from_numpy(points)
    for ours, expected in zip(evaluate._find_distinct(given), evaluate._distinct_rows(given)):
        np.testing.assert_array_equal(ours, expected)


def test_metrics_of_clusters_are_averaged_over_restarts() -> None:
    points, labels = gaussian(np.random.default_rng(6), 240)
    space = EmbeddingSpace(points, labels)
    space.clustering = evaluate.Clustering(restarts=3)
    metrics = evaluate_space(space, [1], ["NMI", "AMI", "F1"])
    runs = []
    for restart in range(3):
        one = EmbeddingSpace(points, labels)
        vars(one)["clusters"] = one.cluster(restart)
        runs.append(evaluate_space(one, [1], ["NMI", "AMI", "F1"]))
    assert len({one["NMI"] for one in runs}) == 3
    assert metrics == pytest.approx({name: np.mean([one[name] for one in runs]) for name in metrics})
    by_flags, _ = evaluate.evaluate_points(
        [RetrievalSet("a", Points(space.query, labels[:, None], [str(i) for i in range(240)]))],
        [1],
        clustering=evaluate.Clustering(restarts=3),
    )
    assert by_flags["NMI"] == metrics["NMI"]


def test_evaluation_repeats_and_leaves_the_generators_alone() -> None:
    points, labels = gaussian(np.random.default_rng(7), 200)

    def measure() -> dict[str, float]:
        space = EmbeddingSpace(points, labels)
        space.neighbors(np.arange(5), 3)
        return {**evaluate_space(space, [1, 4]), "Intra / Inter": intra_inter_ratio(space)}

    def generators() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()
        return random.getstate(), numpy_state[1].tobytes(), numpy_state[2:], torch.get_rng_state().numpy().tobytes()

    before = generators()
    first = measure()
    assert generators() == before
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    assert measure() == first


def naive_neighbors(space: EmbeddingSpace, query: int, k: int) -> np.ndarray:
    distances = np.linalg.norm(space.gallery.double().numpy() - space.query[query].double().numpy(), axis=1)
    if space.query_in_gallery[query] >= 0:
        distances[space.query_in_gallery[query]] = np.inf
    return np.argsort(distances)[: min(k, len(distances) - (space.query_in_gallery >= 0).any())]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("k", [1, 6, 1000])
def test_neighbors(k: int, scale: float) -> None:
    points, labels = gaussian(np.random.default_rng(9), 80)
    points *= np.float32(scale)
    chosen = np.array([3, 0, 29])
    some = np.random.default_rng(1).permutation(80)[:30]
    mixed = np.where(np.arange(30) % 2 == 1, np.arange(30) - 10, -1)  # of the chosen, only 29 is in the gallery
    mixed[mixed < 0] = -1
    for space in (
        EmbeddingSpace(points, labels),
        EmbeddingSpace(points[:30], labels[:30], points[30:], labels[30:]),
        EmbeddingSpace(points[some], labels[some], points, labels, some),
        EmbeddingSpace(points[:30], labels[:30], points[10:], labels[10:], mixed),
    ):
        expected = [naive_neighbors(space, query, k) for query in chosen]
        np.testing.assert_array_equal(space.neighbors(chosen, k), expected)
        assert space.neighbors(np.array([], np.int64), k).shape == (0, len(expected[0]))
    many = EmbeddingSpace(points, labels).neighbors(np.arange(80), k)
    assert many.tolist() == [naive_neighbors(EmbeddingSpace(points, labels), i, k).tolist() for i in range(80)]


def test_a_query_is_no_neighbor_of_itself_even_among_duplicates() -> None:
    points = np.repeat(np.random.default_rng(10).normal(size=(4, 8)), 10, axis=0).astype(np.float32)
    space = EmbeddingSpace(points, np.arange(40) % 5)
    found = space.neighbors(np.arange(40), 3)
    assert found.shape == (40, 3)
    for query, neighbors in enumerate(found):
        assert query not in neighbors
        assert len(set(neighbors)) == 3
        assert {neighbor // 10 for neighbor in neighbors} == {query // 10}


@pytest.mark.parametrize("method", evaluate.KMEANS)
def test_without_faiss_own_code_clusters(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    space = perfect_space([5] * 6)
    space.clustering = evaluate.Clustering(method)
    metrics = evaluate_space(space, [1])
    assert metrics == pytest.approx({"NMI": 1, "F1": 1, "Recall @ 1": 1})
    assert "faiss can't be imported" in capsys.readouterr().err


def test_intra_inter_ratio_equals_a_loop_over_pairs() -> None:
    rng = np.random.default_rng(11)
    sizes = [1, 2, 5, 9, 1, 3]
    labels = rng.permutation(np.repeat([4, 9, 2, 77, 30, 5], sizes))
    points = rng.normal(size=(len(labels), 6)) + labels[:, None] % 4

    def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def mean_over_pairs(vectors: np.ndarray) -> float:
        return float(np.mean([cosine_distance(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i)]))

    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    members = [unit[labels == label] for label in np.unique(labels)]
    intra = np.mean([mean_over_pairs(vectors) for vectors in members if len(vectors) > 1])
    expected = intra / mean_over_pairs(np.array([vectors.mean(axis=0) for vectors in members]))
    assert intra_inter_ratio(EmbeddingSpace(points, labels)) == pytest.approx(expected, rel=1e-5)
    split = EmbeddingSpace(points[:9], labels[:9], points[9:], labels[9:])
    assert intra_inter_ratio(split) == pytest.approx(expected, rel=1e-5)


NAN = math.nan
UNDEFINED: dict[str, tuple[list[list[float]], list[int], dict[str, float]]] = {
    # No classes to tell apart.
    "one class": ([[1, 0], [0, 1], [1, 1]], [7, 7, 7], {"NMI": NAN, "AMI": NAN, "F1": NAN, "Intra / Inter": NAN}),
    # No pair of a class.
    "classes of one": (
        [[1, 0], [0, 1], [1, 1]],
        [1, 2, 3],
        dict.fromkeys(("F1", "Alignment", "Intra / Inter", *RETRIEVAL), NAN),
    ),
    "one point": (
        [[1, 0]],
        [1],
        dict.fromkeys(evaluate.chosen_metrics([1], list(evaluate.METRICS)), NAN),
    ),
    # Intra / Inter has nothing to compare with.
    "equal points": (
        [[0.1, 0.2, 0.7]] * 6,
        [1, 1, 2, 2, 3, 3],
        {"Intra / Inter": NAN, "Alignment": 0, "Uniformity": 0, "Recall @ 1": 0},
    ),
    "equal directions": (
        [[0.1 * k, 0.2 * k, 0.7 * k] for k in range(1, 7)],
        [1, 1, 2, 2, 3, 3],
        {"Intra / Inter": NAN, "Alignment": 0, "Uniformity": 0},
    ),
    "zeros": (
        [[0, 0]] * 4,
        [1, 1, 2, 2],
        dict.fromkeys(("Intra / Inter", "Alignment", "Uniformity", "Rho-spectrum"), NAN) | {"Recall @ 1": 0},
    ),
    "one dimension": ([[1], [2], [3], [4]], [1, 1, 2, 2], {"Rho-spectrum": NAN}),
    # These are defined, and perfect.
    "two points": (
        [[1, 0], [1, 0], [0, 1], [0, 1]],
        [1, 1, 2, 2],
        {"Intra / Inter": 0, "Alignment": 0, "NMI": 1, "F1": 1, "Rho-spectrum": 0, "Recall @ 1": 1},
    ),
    # A zero has no direction: the others are two points again.
    "two points and a zero": (
        [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]],
        [1, 1, 2, 2, 2],
        {"Intra / Inter": 0, "Alignment": 0},
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("points", "labels", "expected"), UNDEFINED.values(), ids=UNDEFINED)
def test_what_is_not_defined_is_nan(points: list[list[float]], labels: list[int], expected: dict[str, float]) -> None:
    for scale in (1.0, 0.3, 1e-12, 1e12):
        space = EmbeddingSpace(np.array(points, np.float32) * np.float32(scale), np.array(labels))
        metrics = evaluate_space(space, [1], list(evaluate.METRICS))
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_metric_of_ones_own_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_norm(space: EmbeddingSpace) -> float:
        return float(space.points.norm(dim=1).mean())

    def share(space: EmbeddingSpace, k: int) -> float:
        return k / len(space.labels)

    monkeypatch.setitem(evaluate.METRICS, "Mean norm", Metric(mean_norm))
    monkeypatch.setitem(evaluate.METRICS, "Share", Metric(share))
    space = EmbeddingSpace(np.full((8, 4), 0.5, np.float32), np.arange(8) % 2)
    metrics = evaluate_space(space, [2, 4], ["NMI", "Mean norm", "Share"])
    assert list(metrics)[-4:] == ["Mean norm", "Share @ 1", "Share @ 2", "Share @ 4"]
    assert list(metrics.values())[-4:] == pytest.approx([1, 1 / 8, 2 / 8, 4 / 8])


def naive_retrieval(space: EmbeddingSpace) -> dict[str, float]:
    """Retrieval metrics by sorting each query's gallery, wrong items first where distances tie, without the query."""
    query, gallery = space.query.double().numpy(), space.gallery.double().numpy()
    results: dict[str, list[float]] = {name: [] for name in (*RETRIEVAL, "Recall @ 5", "Precision @ 5")}
    for i, label in enumerate(space.query_labels):
        own = [place for place in [int(space.query_in_gallery[i])] if place >= 0]
        right = np.delete(space.gallery_labels == label, own)
        if not right.any():
            continue
        distances = np.delete(((gallery - query[i]) ** 2).sum(axis=1), own)
        hits = right[np.lexsort((right, distances))]
        precision = hits * np.cumsum(hits) / np.arange(1, len(hits) + 1)
        r = right.sum()
        results["Recall @ 1"].append(hits[0])
        results["Precision @ 1"].append(hits[0])
        results["Recall @ 5"].append(float(hits[:5].any()))
        results["R-precision"].append(hits[:r].mean())
        results["MAP@R"].append(precision[:r].sum() / r)
        results["mAP"].append(precision.sum() / r)
        results["H-AP"].append(precision.sum() / r)
        results["MRR"].append(1 / (1 + hits.argmax()))
        results["Precision @ 5"].append(hits[:5].mean())
        discounts = 1 / np.log2(np.arange(len(hits)) + 2)
        results["nDCG"].append((hits * discounts).sum() / discounts[:r].sum())
    return {name: float(np.mean(values)) for name, values in results.items()}


@pytest.mark.parametrize("tiles", [(5, 7), (512, 4096)], ids=str)
@pytest.mark.parametrize("classes", [2, 8, 30], ids=["classes of 45", "classes of 11", "classes of 3"])
@pytest.mark.parametrize("make", [gaussian, integers], ids=["gaussian", "ties"])
def test_precisions_agree_with_sorting(
    make: Callable[[np.random.Generator, int], Data],
    classes: int,
    tiles: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    rng = np.random.default_rng(classes)
    points, _ = make(rng, 90)
    labels = rng.integers(0, classes, 90)
    labels[0] = classes  # a query without a positive
    space = EmbeddingSpace(points, labels)
    metrics = evaluate_space(space, [5], ["Recall", "Precision", *RETRIEVAL])
    assert metrics == pytest.approx(naive_retrieval(space), abs=1e-12)


@pytest.mark.parametrize("tiles", [(5, 7), (7, 5), (512, 4096)], ids=str)
@pytest.mark.parametrize("chosen", ["some", "all, shuffled", "one twice", "a class of its own"])
@pytest.mark.parametrize("make", [gaussian, integers, duplicates])
def test_queries_may_be_a_part_of_the_gallery_in_any_order(
    make: Callable[[np.random.Generator, int], Data],
    chosen: str,
    tiles: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    rng = np.random.default_rng(len(chosen))
    points, labels = make(rng, 90)
    labels[[0, 50]] = [1000, -3]  # without a positive, and sorted last and first
    where = rng.permutation(90)
    if chosen != "all, shuffled":
        where = np.concatenate([where[:33], [50, 0]])
    if chosen == "one twice":
        where[3] = where[4]
    if chosen == "a class of its own":
        where = rng.permutation(np.flatnonzero(labels == labels[7]))
    space = EmbeddingSpace(points[where], labels[where], points, labels, where)
    assert space.has_positive.tolist() == [bool((labels == labels[i]).sum() > 1) for i in where]
    assert space.num_positives.tolist() == [(labels == labels[i]).sum() - 1 for i in where]
    metrics = evaluate_space(space, [5], ["Recall", "Precision", *RETRIEVAL])
    if make is not duplicates:  # of which equal distances may round differently in float64
        assert metrics == pytest.approx(naive_retrieval(space), abs=1e-12)
    whole = EmbeddingSpace(points, labels)
    np.testing.assert_array_equal(space.num_negatives_ahead, whole.num_negatives_ahead[where])
    whole.count_at(space.counted_k)
    for name in space.precisions:
        np.testing.assert_allclose(space.precisions[name], whole.precisions[name][where], rtol=1e-12, err_msg=name)


def test_a_part_of_the_gallery_as_queries_clusters_each_point_once() -> None:
    points, labels = gaussian(np.random.default_rng(2), 90)
    where = np.random.default_rng(3).permutation(90)[:20]
    space, whole = EmbeddingSpace(points[where], labels[where], points, labels, where), EmbeddingSpace(points, labels)
    names = ["NMI", "F1", "AMI", "Rho-spectrum", "Uniformity", "Alignment", "Intra / Inter"]
    ours, theirs = evaluate_space(space, [1], names), evaluate_space(whole, [1], names)
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names})


@pytest.mark.parametrize("tiles", [(5, 7), (7, 5), (512, 4096)], ids=str)
@pytest.mark.parametrize("make", [gaussian, integers])
def test_some_queries_may_be_in_the_gallery_and_others_not(
    make: Callable[[np.random.Generator, int], Data], tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    rng = np.random.default_rng(8)
    points, labels = make(rng, 90)
    labels[[0, 50]] = [1000, -3]  # without a positive, and sorted last and first
    where = rng.permutation(90)[:40]
    items = np.setdiff1d(np.arange(90), where[::2])  # every second query is not in the gallery
    place = np.array([items.tolist().index(i) if i in items else -1 for i in where])
    space = EmbeddingSpace(points[where], labels[where], points[items], labels[items], place)
    num_positives = [(labels[items] == labels[i]).sum() - (i in items) for i in where]
    assert space.num_positives.tolist() == num_positives
    assert evaluate_space(space, [5], ["Recall", "Precision", *RETRIEVAL]) == pytest.approx(
        naive_retrieval(space), abs=1e-12
    )
    order = np.concatenate([where[::2], items])  # of all points, each once
    np.testing.assert_array_equal(space.points, points[order])
    np.testing.assert_array_equal(space.labels, labels[order])


def hierarchy(size: int, seed: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, labels of 12 classes and their 3 parents, of which the last has one class of one point."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, size)
    labels[-1] = 99
    parents = np.where(labels == 99, 40, np.where(labels % 3 == 0, -7, 8))
    points = (rng.normal(size=(12, 6))[labels % 12] + 0.9 * rng.normal(size=(size, 6))).astype(np.float32)
    return points, labels, parents


@pytest.mark.parametrize("kind", ["self", "gallery", "queries in the gallery", "some queries in the gallery"])
def test_metrics_within_parents_are_those_of_retrieval_in_each(kind: str) -> None:
    points, labels, parents = hierarchy(160)
    names = ["NMI", "Recall", *RETRIEVAL]
    rng = np.random.default_rng(6)
    where = rng.permutation(160)[:60] if kind != "self" else np.arange(160)
    items = {"gallery": np.setdiff1d(np.arange(160), where), "some queries in the gallery": np.arange(30, 160)}.get(
        kind, np.arange(160)
    )

    def find(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
        return np.array([gallery.tolist().index(i) if i in gallery else -1 for i in queries])

    space = EmbeddingSpace(points[where], labels[where], points[items], labels[items], find(where, items))
    if kind == "self":
        space = EmbeddingSpace(points, labels)
    found = evaluate.evaluate_within_parents(space, parents[where], parents[items], [5], names)

    by_hand = []
    for parent in (-7, 8):  # the third has nothing to find
        own, there = where[parents[where] == parent], items[parents[items] == parent]
        part = EmbeddingSpace(points[own], labels[own], points[there], labels[there], find(own, there))
        by_hand.append({"NMI": evaluate_space(part, [1], ["NMI"])["NMI"], **naive_retrieval(part)})
    expected = {name: (by_hand[0][name] + by_hand[1][name]) / 2 for name in found}
    assert set(found) == {"NMI", "Recall @ 1", "Recall @ 5", *RETRIEVAL}
    assert found == pytest.approx(expected, abs=1e-12)
    assert found["Recall @ 1"] != pytest.approx(evaluate_space(space, [1])["Recall @ 1"])


def test_coarser_classes_that_hold_one_class_are_left_out_of_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    """Inside them everything is right, whatever the network gives."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 4)  # 10 coarser classes hold one class each, one holds twenty
    parents = np.minimum(labels, 10)
    labels[-1], parents[-1] = 99, 12  # and one holds a single image
    space = EmbeddingSpace(rng.normal(size=(120, 8)).astype(np.float32), labels)
    names = ["Recall", "NMI", "MAP@R", "Intra / Inter"]
    found = evaluate.evaluate_within_parents(space, parents, parents, [1], names)
    large = np.flatnonzero(parents == 10)
    assert found == evaluate_space(EmbeddingSpace(space.query[large], labels[large]), [1], names)
    assert found["Recall @ 1"] < 0.3
    evaluate.evaluate_within_parents(space, parents, parents, [1], names)
    (line,) = capsys.readouterr().err.splitlines()  # said once
    assert line == (
        "notice: 11 of 12 coarser classes hold a single class, or no query with another image of its class: they are "
        "left out of every metric"
    )
    part = np.flatnonzero(parents < 10)
    space = EmbeddingSpace(space.query[part], labels[part])
    with pytest.raises(UserError, match="all 10 coarser classes hold a single class"):
        evaluate.evaluate_within_parents(space, parents[part], parents[part], [1], names)


def test_a_metric_that_is_not_defined_in_one_coarser_class_is_averaged_over_the_others() -> None:
    rng = np.random.default_rng(0)
    labels, parents = np.repeat(np.arange(6), 3), np.repeat([0, 1], 9)
    points = rng.normal(size=(18, 4)).astype(np.float32)
    points[parents == 1] = 1  # without spread
    found = evaluate.evaluate_within_parents(EmbeddingSpace(points, labels), parents, parents, [1], ["Intra / Inter"])
    first = EmbeddingSpace(points[:9], labels[:9])
    assert found["Intra / Inter"] == pytest.approx(intra_inter_ratio(first))
    assert found["Recall @ 1"] == pytest.approx(recall_at_k(first, 1) / 2)


def make_points(chosen: np.ndarray) -> Points:
    points, labels, parents = hierarchy(160)
    levels = np.stack([labels, parents], axis=1)[chosen]
    return Points(torch.from_numpy(points[chosen]), levels, [f"{i}.png" for i in chosen])


def test_metrics_of_several_sets_by_either_testing_method() -> None:
    points, labels, parents = hierarchy(160)
    parts = [np.arange(0, 90), np.arange(90, 160)]
    sets = [RetrievalSet("a", make_points(parts[0])), RetrievalSet("b", make_points(parts[1]))]
    expected: dict[str, float] = {}
    for position, part in enumerate(parts):
        within = evaluate.evaluate_within_parents(
            EmbeddingSpace(points[part], labels[part]), parents[part], parents[part], [2], ["mAP"]
        )
        expected |= {f"Set {position} {name}": value for name, value in within.items()}
    metrics, spaces = evaluate.evaluate_points(sets, [2], ["mAP"], "WithSameParentLabel")
    assert metrics == pytest.approx(expected)
    assert list(metrics) == ["Set 0 Recall @ 1", "Set 0 mAP", "Set 1 Recall @ 1", "Set 1 mAP"]
    assert [len(space.query) for space in spaces] == [90, 70]
    one, _ = evaluate.evaluate_points(sets[:1], [2])
    assert one == pytest.approx(evaluate_space(EmbeddingSpace(points[:90], labels[:90]), [2]))


def test_parents_of_a_gallery_are_its_own() -> None:
    points, labels, parents = hierarchy(160)
    queries, items = np.arange(20, 60), np.arange(40, 160)
    metrics, _ = evaluate.evaluate_points(
        [RetrievalSet("a", make_points(queries), make_points(items))], [2], ["mAP"], "WithSameParentLabel"
    )
    place = np.where(queries < 40, -1, queries - 40)
    space = EmbeddingSpace(points[queries], labels[queries], points[items], labels[items], place)
    assert metrics == evaluate.evaluate_within_parents(space, parents[queries], parents[items], [2], ["mAP"])


@pytest.mark.parametrize("testing_method", evaluate.TESTING_METHODS)
@pytest.mark.parametrize("num_sets", [1, 2])
def test_metrics_of_all_levels_are_those_of_each_and_their_mean(testing_method: str, num_sets: int) -> None:
    points, labels, _ = hierarchy(160)
    columns = np.stack([labels, labels % 6, labels % 2], axis=1)
    parts = [np.arange(0, 90), np.arange(90, 160)][:num_sets]
    sets = [
        RetrievalSet("a", Points(torch.from_numpy(points[part]), columns[part], [f"{i}.png" for i in part]))
        for part in parts
    ]
    names = ["Recall", "NMI", "MAP@R"]
    metrics, spaces = evaluate.evaluate_points(sets, [2], names, testing_method, all_levels=True)
    levels = range(3 if testing_method == "GlobalEmbeddingSpace" else 2)
    expected: dict[str, float] = {}
    for position, part in enumerate(parts):
        prefix = f"Set {position} " if num_sets > 1 else ""
        for level in levels:
            own = EmbeddingSpace(points[part], columns[part, level])
            if testing_method == "GlobalEmbeddingSpace":
                values = evaluate_space(own, [2], names)
            else:
                coarser = columns[part, level + 1]
                values = evaluate.evaluate_within_parents(own, coarser, coarser, [2], names)
            expected |= {f"{prefix}Level {level} {name}": value for name, value in values.items()}
        for name in ("NMI", "Recall @ 1", "Recall @ 2", "MAP@R"):
            of_levels = [expected[f"{prefix}Level {level} {name}"] for level in levels]
            expected[f"{prefix}Level mean {name}"] = float(np.mean(of_levels))
    assert metrics == pytest.approx(expected)
    assert [space.query_labels.tolist() for space in spaces] == [columns[part, 0].tolist() for part in parts]
    assert evaluate.lower_is_better("Set 1 Level mean EER")
    assert not evaluate.lower_is_better("Level 1 Recall @ 4")
    assert evaluate.metric_name("Level 1 FNMR @ 1e-3") == "Level 1 FNMR @ 0.001"


def test_each_level_has_the_threshold_of_its_own_validation_classes() -> None:
    points, labels, parents = hierarchy(160)
    sets = [RetrievalSet("a", make_points(np.arange(160)))]
    told = {"Level 0 Verification threshold": 0.5, "Level 1 Verification threshold": 1.5, "Recall @ 1": 9.0}
    names = ["Verification accuracy"]
    metrics, _ = evaluate.evaluate_points(sets, [1], names, validation=told, all_levels=True)
    for level, column in enumerate((labels, parents)):
        distances = torch.cdist(torch.from_numpy(points).double(), torch.from_numpy(points).double())
        upper = torch.triu(torch.ones_like(distances), diagonal=1).bool()
        same, near = torch.from_numpy(column[:, None] == column), distances <= 0.5 + level
        accuracy = (near[upper & same].double().mean() + (~near[upper & ~same]).double().mean()) / 2
        assert metrics[f"Level {level} Verification accuracy"] == pytest.approx(float(accuracy))


@pytest.mark.parametrize("testing_method", evaluate.TESTING_METHODS)
def test_metrics_of_each_class_by_a_loop_over_queries(testing_method: str) -> None:
    points, labels, parents = hierarchy(120)
    queries, items = np.arange(0, 70), np.arange(50, 120)
    place = np.where(queries < 50, -1, queries - 50)
    columns = np.stack([labels, parents], axis=1)
    space = EmbeddingSpace(points[queries], columns[queries], points[items], columns[items], place)
    names = ["NMI", "EER", "Recall", "Precision", "MRR", "R-precision", "MAP@R", "mAP", "nDCG", "H-AP"]
    classes, sizes, means = evaluate.class_means_of_queries(space, [3], names, testing_method)
    assert list(means) == [*("Recall @ 1", "Recall @ 3", "Precision @ 1", "Precision @ 3"), *names[4:]]
    found: dict[int, list[dict[str, float]]] = {}
    for query in queries:
        others = [i for i in items if i != query]
        if testing_method == "WithSameParentLabel":
            others = [i for i in others if parents[i] == parents[query]]
        positives = [i for i in others if labels[i] == labels[query]]
        if not positives or (testing_method != "GlobalEmbeddingSpace" and len(set(labels[others])) < 2):
            continue
        # alone with what it searches
        alone = EmbeddingSpace(points[[query]], columns[[query]], points[others], columns[others])
        found.setdefault(int(labels[query]), []).append(evaluate_space(alone, [3], names[2:]))
    assert classes.tolist() == sorted(found)
    assert sizes.tolist() == [len(found[label]) for label in sorted(found)]
    for name, values in means.items():
        expected = [np.mean([one[name] for one in found[label]]) for label in sorted(found)]
        assert values == pytest.approx(expected), name
    if testing_method == "GlobalEmbeddingSpace":
        whole = evaluate_space(space, [3], names[2:])
        for name, values in means.items():
            assert np.average(values, weights=sizes) == pytest.approx(whole[name])


def test_sets_that_cannot_be_evaluated_are_one_sentence() -> None:
    _, labels, _ = hierarchy(160)
    alone = np.unique(labels, return_index=True)[1]
    sets = [RetrievalSet("a", make_points(np.arange(90))), RetrievalSet("lonely", make_points(alone))]
    with pytest.raises(UserError, match="lonely: no query's class is among the images") as error:
        evaluate.evaluate_points(sets, [1])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="single: all images are of one class"):
        evaluate.evaluate_points([RetrievalSet("single", make_points(np.flatnonzero(labels == 3)))], [1])


def test_a_query_has_the_label_that_it_has_in_the_gallery() -> None:
    points = np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match="one label as a query and another one in the gallery"):
        EmbeddingSpace(points[:1], np.array([5]), points, np.array([5, 6, 5]), np.array([1]))


def test_queries_stand_in_the_gallery_where_their_paths_do() -> None:
    query, gallery = make_points(np.arange(30)), make_points(np.arange(40, 100))
    own = evaluate.build_space(RetrievalSet("own", query))
    np.testing.assert_array_equal(own.query_in_gallery, np.arange(30))
    two = evaluate.build_space(RetrievalSet("two", query, gallery))
    np.testing.assert_array_equal(two.query_in_gallery, np.full(30, -1))
    assert (len(two.query), len(two.gallery), len(two.points), len(two.labels)) == (30, 60, 90, 90)

    shuffled = np.random.default_rng(0).permutation(np.arange(20, 100))
    place = [shuffled.tolist().index(i) if i >= 20 else -1 for i in range(30)]
    some = evaluate.build_space(RetrievalSet("some", query, make_points(shuffled)))
    np.testing.assert_array_equal(some.query_in_gallery, place)
    _, labels, _ = hierarchy(160)
    expected = [(labels[shuffled] == labels[i]).sum() - (i >= 20) for i in range(30)]
    np.testing.assert_array_equal(some.num_positives, expected)
    assert (len(some.points), len(some.labels)) == (100, 100)


def test_a_set_that_is_its_own_gallery_finds_what_it_finds_without_one() -> None:
    points = make_points(np.arange(90))
    names = list(evaluate.METRICS)
    (own, _), (two, _) = (
        evaluate.evaluate_points([RetrievalSet("a", points, gallery)], [1, 4], names) for gallery in (None, points)
    )
    assert own == two


FNMRS = ["FNMR @ 0.001", "FNMR @ 0.01"]


@pytest.mark.parametrize(
    ("k_vals", "names", "expected"),
    [
        ([4, 2], ["NMI", "F1", "Recall"], ["NMI", "F1", "Recall @ 1", "Recall @ 2", "Recall @ 4"]),
        ([4, 2], ["mAP"], ["Recall @ 1", "mAP"]),
        ([10, 1, 10], ["MAP@R", "Recall", "NMI"], ["NMI", "Recall @ 1", "Recall @ 10", "MAP@R"]),
        ([1], ["Alignment", "Precision @ 1"], ["Recall @ 1", "Precision @ 1", "Alignment"]),
        ([], [], ["Recall @ 1"]),
        ([2], ["Precision", "FNMR", "EER"], ["Recall @ 1", "Precision @ 1", "Precision @ 2", "EER", *FNMRS]),
        (
            [2],
            ["FNMR @ 0.5", "Recall @ 9", "Precision @ 3"],
            [*("Recall @ 1", "Recall @ 9", "Precision @ 3"), "FNMR @ 0.5"],
        ),
        ([2], ["Verification accuracy"], ["Recall @ 1", "Verification accuracy", "Verification threshold"]),
    ],
)
def test_chosen_metrics_are_named_in_the_tables_order(k_vals: list[int], names: list[str], expected: list[str]) -> None:
    chosen = evaluate.chosen_metrics(k_vals, names)
    assert list(chosen) == expected
    space = perfect_space([3] * 6)
    assert evaluate_space(space, k_vals, names) == {name: metric(space) for name, metric in chosen.items()}
    if {"Recall @ 1", "Recall @ 10"} <= set(chosen):
        ahead = clustered_space([0, 0], [0, 0])
        vars(ahead)["num_negatives_ahead"] = np.array([5, 0])
        assert [chosen[f"Recall @ {k}"](ahead) for k in (1, 10)] == [0.5, 1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, False) for name in ("NMI", "F1", "AMI", "R-precision", "MAP@R", "mAP", "Precision @ 1", "Recall @ 4")],
        *[(name, True) for name in ("Rho-spectrum", "Uniformity", "Alignment", "Intra / Inter")],
        *[("EER", True), ("FNMR @ 0.01", True), ("Set 2 FNMR @ 1e-05", True), ("ROC AUC", False), ("MRR", False)],
        *[("Verification accuracy", False), ("Verification threshold", False), ("H-AP", False), ("nDCG", False)],
        *[("Set 0 Recall @ 4", False), ("Set 12 Alignment", True), ("Set 0 Intra / Inter", True)],
        *[("Train Loss", False), ("Mean rank", True), ("Set 1 Mean rank", True), ("Rank @ 10", True)],
        *[("Set 3 Rank @ 1", True), ("Rank @ best", False), ("Own Alignment", False)],
    ],
)
def test_the_direction_of_a_column(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.METRICS, "Mean rank", Metric(lambda space: 1.0, lower_is_better=True))
    monkeypatch.setitem(evaluate.METRICS, "Rank", Metric(lambda space, k: 1.0, lower_is_better=True))
    assert evaluate.lower_is_better(name) == expected


@pytest.mark.parametrize("with_gallery", [False, True], ids=["self", "gallery"])
def test_agrees_with_accuracy_calculator(with_gallery: bool) -> None:
    rng = np.random.default_rng(3)
    points, labels = gaussian(rng, 600)
    query, gallery = (slice(0, 150), slice(150, None)) if with_gallery else (slice(None), slice(None))
    given = (points[gallery], labels[gallery]) if with_gallery else ()
    space = EmbeddingSpace(points[query], labels[query], *given)
    names = {
        "precision_at_1": "Precision @ 1",
        "r_precision": "R-precision",
        "mean_average_precision_at_r": "MAP@R",
        "mean_average_precision": "mAP",
        "mean_reciprocal_rank": "MRR",
    }
    calculator = AccuracyCalculator(include=tuple(names), k=len(points[gallery]) - (not with_gallery))
    tensors = [torch.from_numpy(part) for part in (points[query], labels[query], *given)]
    theirs = calculator.get_accuracy(*tensors)
    ours = evaluate_space(space, [1], list(names.values()))
    for their_name, our_name in names.items():
        assert ours[our_name] == pytest.approx(theirs[their_name], abs=1e-6), our_name


def test_a_class_of_thousands() -> None:
    """R = 2,999: points on a line, the class's 3,000 followed by as many others, all products exact in float32."""
    values = np.arange(-3000, 3000, dtype=np.float32)
    labels = np.repeat([0, 1], 3000)
    space = EmbeddingSpace(values[:, None], labels)
    for query in (0, 1500, 2999, 4000):
        distances = np.abs(values - values[query])
        right = (labels == labels[query]) & (np.arange(6000) != query)
        hits = right[np.lexsort((right, distances))][1:]  # the query itself comes first
        precision = hits * np.cumsum(hits) / np.arange(1, 6000)
        assert space.precisions["r_precision"][query] == pytest.approx(hits[:2999].mean())
        assert space.precisions["map_at_r"][query] == pytest.approx(precision[:2999].sum() / 2999)
        assert space.average_precisions[query] == pytest.approx(precision.sum() / 2999)


def test_geometry_metrics_agree_with_naive_loops() -> None:
    rng = np.random.default_rng(4)
    points, labels = gaussian(rng, 60)
    unit = points.astype(np.float64) / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    squared = {pair: float(((unit[pair[0]] - unit[pair[1]]) ** 2).sum()) for pair in pairs}
    names = ["Rho-spectrum", "Uniformity", "Alignment", "AMI", "Intra / Inter"]
    space = EmbeddingSpace(points, labels)
    metrics = evaluate_space(space, [1], names)
    assert metrics["Uniformity"] == pytest.approx(np.log(np.mean([np.exp(-2 * d) for d in squared.values()])), abs=1e-5)
    same = [d for (i, j), d in squared.items() if labels[i] == labels[j]]
    assert metrics["Alignment"] == pytest.approx(np.mean(same), abs=1e-6)
    values = np.linalg.svd(points.astype(np.float64), compute_uv=False)
    share = values / values.sum()
    assert metrics["Rho-spectrum"] == pytest.approx(float(np.mean(np.log(1 / len(share) / share))), abs=1e-9)
    assert metrics["AMI"] == pytest.approx(adjusted_mutual_info_score(labels, space.clusters), abs=1e-12)
    assert list(metrics) == ["Recall @ 1", *(name for name in evaluate.METRICS if name in names)]


class ColorNet(nn.Module):
    """Embeds an image as its mean color; it must be in evaluation mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert images.dtype == torch.uint8
        return images.double().mean(dim=(2, 3))


@pytest.fixture
def images(tiny_source: Path) -> datasets.ImageSet:
    return datasets.read_class_folders(tiny_source / "tiny" / "images")


def make_loader(images: datasets.ImageSet) -> datasets.ImageLoader:
    dataset = datasets.ImageDataset(images, transforms.eval_transform(24, 32))
    return datasets.ImageLoader(dataset, batch_size=7, collate_fn=datasets.collate)


def colors(loader: datasets.ImageLoader) -> np.ndarray:
    """Computes with NumPy what `ColorNet` gives for a loader's images."""
    return np.array([np.asarray(loader.dataset[i][0]).mean(axis=(1, 2)) for i in range(len(loader.dataset))])


def test_evaluate_one_set_several_sets_and_a_gallery(images: datasets.ImageSet) -> None:
    rng = np.random.default_rng(12)
    is_query = rng.random(len(images)) < 0.5
    whole, query, gallery = (make_loader(images.subset(mask)) for mask in (is_query | True, is_query, ~is_query))
    own = EmbeddingSpace(colors(whole), whole.labels)
    two = EmbeddingSpace(colors(query), query.labels, colors(gallery), gallery.labels)
    sets = [RetrievalSet("all", whole), RetrievalSet("shop", query, gallery)]
    net, device = ColorNet(), torch.device("cpu")

    for chosen, space in zip(sets, (own, two)):
        metrics, spaces = evaluate.evaluate(net.train(), [chosen], [1, 3], device)
        assert metrics == pytest.approx(evaluate_space(space, [1, 3]))
        assert len(spaces) == 1
        assert spaces[0].query.dtype == torch.float32
        np.testing.assert_allclose(spaces[0].query, space.query, rtol=1e-6)

    metrics, spaces = evaluate.evaluate(net, sets, [3], device)
    expected = {f"Set 0 {name}": value for name, value in evaluate_space(own, [3]).items()}
    expected |= {f"Set 1 {name}": value for name, value in evaluate_space(two, [3]).items()}
    assert metrics == pytest.approx(expected)
    assert [bool((space.query_in_gallery < 0).all()) for space in spaces] == [False, True]


def test_embedded_sets_keep_labels_parents_and_paths(images: datasets.ImageSet) -> None:
    query, gallery = (make_loader(images.subset(np.arange(len(images)) % 3 == part)) for part in (0, 1))
    points = evaluate.embed_set(ColorNet(), RetrievalSet("shop", query, gallery), torch.device("cpu"))
    assert points.name == "shop"
    assert points.gallery is not None
    for embedded, loader in ((points.query, query), (points.gallery, gallery)):
        np.testing.assert_allclose(embedded.embeddings, colors(loader), rtol=1e-6)
        np.testing.assert_array_equal(embedded.labels, loader.labels)
        assert embedded.parents is loader.parents is None
        assert list(embedded.paths) == list(loader.paths)
    assert evaluate.embed_set(ColorNet(), RetrievalSet("all", query), torch.device("cpu")).gallery is None


def all_pairs(space: EmbeddingSpace) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances of all pairs by differences in float64, and whether a pair is of one class."""
    query, gallery = space.query.double().numpy(), space.gallery.double().numpy()
    rows, columns = np.nonzero(np.arange(len(gallery)) != space.query_in_gallery[:, None])
    squared = np.square(query[rows] - gallery[columns]).sum(axis=1)
    return squared, space.query_labels[rows] == space.gallery_labels[columns]


def in_cells(squared: np.ndarray) -> np.ndarray:
    """Rounds down what pairs are compared by, as `PairCounts` says."""
    return (squared.astype(np.float32).view(np.int32) >> 4 << 4).view(np.float32)


def verification_by_roc(squared: np.ndarray, is_positive: np.ndarray, fmr: float) -> dict[str, float]:
    """ROC AUC, EER and FNMR by scikit-learn's curve through all pairs."""
    false, true, _ = roc_curve(is_positive, -squared, drop_intermediate=False)
    grid = np.linspace(0, 1, 100_001)
    missed = 1 - np.interp(grid, false, true)
    return {
        "ROC AUC": roc_auc_score(is_positive, -squared),
        "EER": grid[np.abs(grid - missed).argmin()],
        f"FNMR @ {fmr}": 1 - true[false <= fmr].max(),
    }


VERIFICATION = ["ROC AUC", "EER", "FNMR @ 0.02"]


@pytest.mark.parametrize("tiles", [(16, 32), (512, 2048)], ids=str)
@pytest.mark.parametrize("kind", ["Gaussian", "unit", "without negatives", "integers", "duplicates", "mostly zeros"])
def test_verification_equals_the_curve_through_all_pairs(
    kind: str, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", tiles[0])
    monkeypatch.setattr(evaluate, "GALLERY_TILE", tiles[1])
    compared = 0
    for case in range(6):
        space = random_space(kind, np.random.default_rng([list(KINDS).index(kind), case]))
        squared, is_positive = all_pairs(space)
        metrics = evaluate_space(space, [1], VERIFICATION)
        del metrics["Recall @ 1"]
        if not is_positive.any() or is_positive.all():
            assert all(map(math.isnan, metrics.values()))
            continue
        compared += 1
        cells = in_cells(squared)  # products may differ in the last of their 53 bits
        assert metrics == pytest.approx(verification_by_roc(cells, is_positive, 0.02), abs=1.1e-5)
        assert metrics["ROC AUC"] == pytest.approx(roc_auc_score(is_positive, -cells), abs=1e-12)
        assert metrics["ROC AUC"] == pytest.approx(roc_auc_score(is_positive, -squared), abs=2e-6)
        fewer = evaluate.fnmr_at_fmr(space, 0.02)
        assert fewer == pytest.approx(verification_by_roc(cells, is_positive, 0.02)["FNMR @ 0.02"], abs=1e-12)
        num_pairs = len(squared) / (1 + (space.gallery is space.query))  # each once
        assert space.pairs.positives.sum() + space.pairs.negatives.sum() == num_pairs
    assert compared >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_verification_stands_any_embeddings(kind: str) -> None:
    """Even where many pairs are as near to each other as float32 tells."""
    for case in range(3):
        space = random_space(kind, np.random.default_rng([list(KINDS).index(kind), case, 1]))
        squared, is_positive = all_pairs(space)
        if is_positive.any() and not is_positive.all():
            assert evaluate.roc_auc(space) == pytest.approx(roc_auc_score(is_positive, -squared), abs=0.02)


def test_equal_points_are_equally_distant_whatever_tile_they_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", 64)
    monkeypatch.setattr(evaluate, "GALLERY_TILE", 37)
    rng = np.random.default_rng(0)
    points = unit(rng.normal(size=(3, 48)))[rng.integers(0, 3, 300)].astype(np.float32)
    space = EmbeddingSpace(points, rng.integers(0, 4, 300))
    assert len(space.pairs.starts) <= 4  # 0, and the distances of three points
    assert space.pairs.starts[0] == 0


def test_verification_of_a_worked_example() -> None:
    """Pairs of one class at the distances 1 and 1.5; others at 0.5, 1.5, 2 and 3."""
    space = EmbeddingSpace(np.array([[0], [1], [1.5], [3]], np.float32), np.array([1, 1, 2, 2]))
    assert evaluate.roc_auc(space) == pytest.approx((3 + 2.5) / 8)
    assert evaluate.equal_error_rate(space) == pytest.approx(1 / 3)  # between FMR 1/4, FNMR 1/2 and FMR 1/2, FNMR 0
    assert [evaluate.fnmr_at_fmr(space, fmr) for fmr in (0.2, 0.25, 0.49, 0.5)] == [1, 0.5, 0.5, 0]
    assert evaluate.verification_threshold(space) == pytest.approx(1.75, abs=1e-5)  # between 1.5 and 2
    assert evaluate.verification_accuracy(space) == 1 - (0.5 + 0) / 2
    for threshold, accuracy in ((0.4, 0.5), (0.6, 0.375), (1.2, 0.625), (2.5, 0.625), (9, 0.5), (math.nan, math.nan)):
        space.threshold = threshold
        assert evaluate.verification_accuracy(space) == pytest.approx(accuracy, nan_ok=True)
        assert evaluate.verification_threshold(space) == pytest.approx(threshold, nan_ok=True)


def test_the_best_threshold_is_the_one_that_a_loop_finds() -> None:
    points, labels = gaussian(np.random.default_rng(5), 80)
    space = EmbeddingSpace(points, labels)
    squared, is_positive = all_pairs(space)
    distances = np.sqrt(squared)

    def accuracy(threshold: float) -> float:
        accepted = distances <= threshold
        return 1 - (accepted[~is_positive].mean() + (~accepted)[is_positive].mean()) / 2

    best = evaluate.verification_threshold(space)
    assert accuracy(best) == pytest.approx(max(accuracy(threshold) for threshold in distances), abs=1e-12)
    assert evaluate.verification_accuracy(space) == pytest.approx(accuracy(best), abs=1e-12)


def test_a_threshold_of_validation_classes_is_applied_to_others() -> None:
    sets = [
        RetrievalSet(name, make_points(part)) for name, part in (("val", np.arange(70)), ("test", np.arange(70, 160)))
    ]
    names = ["Verification accuracy"]
    val, _ = evaluate.evaluate_points(sets[:1], [1], names)
    test, (space,) = evaluate.evaluate_points(sets[1:], [1], names, validation=val)
    own, _ = evaluate.evaluate_points(sets[1:], [1], names)
    assert test["Verification threshold"] == val["Verification threshold"] != own["Verification threshold"]
    squared, is_positive = all_pairs(space)
    accepted = np.sqrt(squared) <= val["Verification threshold"]
    by_hand = 1 - (accepted[~is_positive].mean() + (~accepted)[is_positive].mean()) / 2
    assert test["Verification accuracy"] == pytest.approx(by_hand, abs=1e-12)
    assert test["Verification accuracy"] < own["Verification accuracy"]

    both, _ = evaluate.evaluate_points(sets, [1], names, validation=val | {"Set 1 Verification threshold": 2.5})
    assert (both["Set 0 Verification threshold"], both["Set 1 Verification threshold"]) == (
        pytest.approx((val["Verification threshold"] + 2.5) / 2),
        2.5,
    )
    unknown, _ = evaluate.evaluate_points(sets[1:], [1], names, validation={})
    assert math.isnan(unknown["Verification accuracy"])
    within, _ = evaluate.evaluate_points(sets[1:], [1], names, "WithSameParentLabel", val)
    assert within["Verification threshold"] == pytest.approx(val["Verification threshold"])


LEVELS = 3


def naive_hierarchical(space: EmbeddingSpace) -> dict[str, float]:
    """nDCG and H-AP by their definitions: every item with every item before it, less relevant ones first in ties."""
    query, gallery = space.query.double().numpy(), space.gallery.double().numpy()
    results: dict[str, list[float]] = {"nDCG": [], "H-AP": []}
    for i in np.flatnonzero(space.has_positive):
        kept = np.arange(len(gallery)) != space.query_in_gallery[i]
        shared = (space.gallery_hierarchy[kept] == space.query_hierarchy[i]).sum(axis=1)
        distances = np.square(gallery[kept] - query[i]).sum(axis=1)
        shared = shared[np.lexsort((shared, distances))]
        discounts = 1 / np.log2(np.arange(len(shared)) + 2)
        ideal = ((2.0 ** np.sort(shared)[::-1] - 1) * discounts).sum()
        results["nDCG"].append(((2.0**shared - 1) * discounts).sum() / ideal)
        relevance = dict.fromkeys(range(LEVELS + 1), 0.0)
        largest = math.inf
        for level in range(LEVELS, 0, -1):
            if (shared == level).any():
                largest = relevance[level] = min(largest, level / (shared == level).sum())
        rel = [relevance[level] for level in shared]
        total = 0.0
        for rank, one in enumerate(rel, start=1):
            if one:
                total += (one + sum(min(one, other) for other in rel[: rank - 1])) / rank
        results["H-AP"].append(total / sum(rel))
    return {name: float(np.mean(values)) for name, values in results.items()}


@pytest.mark.parametrize("mode", ["self", "gallery", "some queries in the gallery"])
@pytest.mark.parametrize("make", [gaussian, integers, duplicates])
def test_metrics_of_a_hierarchy_equal_their_definitions(
    make: Callable[[np.random.Generator, int], Data], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "QUERY_TILE", 16)
    monkeypatch.setattr(evaluate, "GALLERY_TILE", 32)
    monkeypatch.setattr(evaluate, "MAX_POSITIVES", 300)  # so that large classes are compared in parts
    rng = np.random.default_rng(7)
    points, labels = make(rng, 120)
    centers = rng.integers(-2, 3, (labels.max() + 1, points.shape[1]))
    points = (points + (centers[labels] if make is not duplicates else 0)).astype(np.float32)
    levels = np.stack([labels, labels % 7, labels % 7 // 3], axis=1)
    space = EmbeddingSpace(points, levels)
    if mode == "gallery":
        space = EmbeddingSpace(points[:40], levels[:40], points[40:], levels[40:])
    elif mode != "self":
        where = rng.permutation(120)[:40]
        items = np.setdiff1d(np.arange(120), where[::2])
        place = np.array([items.tolist().index(i) if i in items else -1 for i in where])
        space = EmbeddingSpace(points[where], levels[where], points[items], levels[items], place)
    metrics = evaluate_space(space, [1], ["nDCG", "H-AP"])
    expected = naive_hierarchical(space)
    assert 0.1 < expected["H-AP"] < 0.95
    tolerance = 5e-3 if make is duplicates else 1e-12  # equal distances may round differently in float64
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=tolerance)


def test_ndcg_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    points, labels = gaussian(rng, 150)
    labels[:2] = labels.max() + 1  # nobody is alone
    levels = np.stack([labels, labels // 4], axis=1)
    space = EmbeddingSpace(points[:30], levels[:30], points[30:], levels[30:])
    distances = np.square(points[:30, None].astype(float) - points[None, 30:]).sum(axis=2)
    shared = (levels[:30, None] == levels[None, 30:]).sum(axis=2)
    counted = space.has_positive
    expected = ndcg_score(2.0 ** shared[counted] - 1, -distances[counted])
    assert evaluate.normalized_dcg(space) == pytest.approx(expected, abs=1e-12)


def test_hierarchical_ap_of_a_worked_example() -> None:
    """The query's gallery by distance: its family, its class, another family, its class, its family."""
    levels = np.array([[1, 5], [2, 5], [1, 5], [3, 6], [1, 5], [2, 5]])
    space = EmbeddingSpace(np.zeros((1, 1), np.float32), levels[:1], np.arange(1, 6)[:, None], levels[1:])
    fine, coarse = 2 / 2, 1 / 2  # of two items each
    gained = coarse / 1 + (fine + coarse) / 2 + (fine + coarse + fine) / 4 + 4 * coarse / 5
    assert evaluate.hierarchical_ap(space) == pytest.approx(gained / (2 * fine + 2 * coarse))
    gains = np.array([1, 3, 0, 3, 1]) / np.log2(np.arange(2, 7))
    ideal = np.array([3, 3, 1, 1, 0]) / np.log2(np.arange(2, 7))
    assert evaluate.normalized_dcg(space) == pytest.approx(gains.sum() / ideal.sum())
    assert evaluate.mean_reciprocal_rank(space) == 1 / 2


def test_with_one_level_hierarchical_ap_is_map() -> None:
    points, labels = gaussian(np.random.default_rng(2), 200)
    metrics = evaluate_space(EmbeddingSpace(points, labels), [1], ["mAP", "H-AP"])
    assert metrics["H-AP"] == pytest.approx(metrics["mAP"], abs=1e-14)


def test_a_hierarchy_whose_classes_are_in_several_is_refused() -> None:
    points = np.zeros((4, 2), np.float32)
    space = EmbeddingSpace(points, np.array([[1, 1], [1, 2], [2, 2], [2, 2]]))
    with pytest.raises(UserError, match="a class of label level 0 belongs to several classes of level 1"):
        evaluate.hierarchical_ap(space)


def test_precision_at_k_beyond_the_gallery_and_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    count = EmbeddingSpace._count_negatives

    def counted(self: EmbeddingSpace, nearest_only: bool) -> Any:
        passes.append(nearest_only)
        return count(self, nearest_only)

    monkeypatch.setattr(EmbeddingSpace, "_count_negatives", counted)
    space = perfect_space([3] * 4)
    metrics = evaluate_space(space, [2, 5], ["Precision", "mAP", "R-precision", "MRR"])
    assert [metrics[f"Precision @ {k}"] for k in (1, 2, 5)] == pytest.approx([1, 1, 2 / 5])
    assert passes == [False]  # which counts for the nearest positive, too
    assert evaluate.precision_at_k(space, 1000) == pytest.approx(2 / 11)
    assert evaluate.precision_at_k(space, 4) == pytest.approx(2 / 4)
    assert passes == [False, False, False]


@pytest.mark.parametrize("text", ["Recall @ 0", "Recall @ x", "Recall @ ", "mAP @ 3", "FNMR @ 1", "FNMR @ 0"])
def test_names_with_a_number_that_is_none_of_theirs(text: str) -> None:
    assert text not in evaluate.MetricNames()
    with pytest.raises(argparse.ArgumentTypeError, match="is not a metric: "):
        evaluate.metric_name(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *[("FNMR @ 1e-3", "FNMR @ 0.001"), ("FNMR @ 0.00001", "FNMR @ 1e-05"), ("Precision @ 010", "Precision @ 10")],
        *[("P@10", "Precision @ 10"), ("R@5", "Recall @ 5"), ("FNMR@1e-3", "FNMR @ 0.001"), ("MAP@R", "MAP@R")],
    ],
)
def test_numbers_in_names_are_written_as_columns_have_them(text: str, name: str) -> None:
    assert evaluate.metric_name(text) == name
    assert name in evaluate.MetricNames()
    assert list(evaluate.chosen_metrics([2], [name])) == ["Recall @ 1", name]
