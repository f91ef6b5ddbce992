"""evaluate.py: every metric against a worked example, a naive loop or another library; ties, tiles and odd inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch import nn

import datasets
import evaluate
from auxiliaries import UserError
from evaluate import EmbeddingSpace, compute_metrics, f1, intra_inter_ratio, mean_over_sets, nmi, recall_at_k

Data = tuple[np.ndarray, np.ndarray]  # (N, D) float32 points and (N,) labels

CLASS_SIZES = {"2": [2] * 30, "5": [5] * 20, "mixed": [2, 3, 5, 8] * 5}


@pytest.fixture(autouse=True)
def _notices_come_again() -> None:
    evaluate._warn_of_sklearn.cache_clear()


RETRIEVAL = ["Recall @ 1", "Precision @ 1", "R-precision", "MAP@R", "mAP"]


def perfect_space(sizes: Sequence[int]) -> EmbeddingSpace:
    """A space whose points are their class's centre, in random order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = rng.normal(size=(len(sizes), 16))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return EmbeddingSpace(centres[labels].astype(np.float32), labels)


def clustered_space(labels: Sequence[int] | np.ndarray, clusters: Sequence[int] | np.ndarray) -> EmbeddingSpace:
    """A space with given clusters, for metrics that see nothing else."""
    space = EmbeddingSpace(np.zeros((len(labels), 2), np.float32), np.asarray(labels))
    vars(space)["clusters"] = np.asarray(clusters)
    return space


@pytest.mark.parametrize("sizes", CLASS_SIZES.values(), ids=CLASS_SIZES)
@pytest.mark.parametrize("name", ["NMI", "AMI", "F1", "Recall @ 4", *RETRIEVAL])
def test_a_perfect_embedding_scores_one(sizes: list[int], name: str) -> None:
    assert compute_metrics(perfect_space(sizes), [4], list(evaluate.METRICS))[name] == pytest.approx(1)


COLLAPSED = [(dim, size, normalised) for dim in (2, 64, 128, 512) for size in (10, 513) for normalised in (False, True)]
COLLAPSED += [(dim, 4096 + 512 + 37, dim in (64, 512)) for dim in (2, 64, 128, 512)]  # several tiles and a remainder


@pytest.mark.parametrize(("dim", "size", "normalised"), COLLAPSED)
def test_a_collapsed_network_scores_zero(dim: int, size: int, normalised: bool) -> None:
    vector = torch.randn(dim, generator=torch.Generator().manual_seed(dim)) * 3
    if normalised:
        vector = nn.functional.normalize(vector, dim=0)
    labels = np.random.default_rng(size).permutation(np.arange(size) % 5)
    space = EmbeddingSpace(vector.repeat(size, 1), labels)
    others = size - np.bincount(labels)[labels]
    np.testing.assert_array_equal(space.negatives_ahead, others)
    assert recall_at_k(space, 1) == recall_at_k(space, int(others.min())) == 0


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-5])
def test_points_that_nearly_coincide_are_told_apart(spread: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 30
    offsets = rng.normal(size=(30, 16))[labels] + 0.3 * rng.normal(size=(300, 16))
    points = (rng.normal(size=16) + spread * offsets).astype(np.float32)
    distances = ((points[:, None].astype(np.float64) - points) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    expected = (labels[distances.argmin(axis=1)] == labels).mean()
    assert expected > 0.5
    assert recall_at_k(EmbeddingSpace(points, labels), 1) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("scale", [1e10, 1e20, 1e30])
def test_an_exploded_network_does_not_score(scale: float) -> None:
    points = np.full((40, 8), scale, np.float32)
    with suppress(UserError):  # either refused, or counted as what it is
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
    query: np.ndarray, label: int, own: int | None, gallery: np.ndarray, gallery_labels: np.ndarray
) -> tuple[int, int] | None:
    """How many negatives are at least as near as the nearest positive: the least and the most that float32 may say.

    In float64; `own` is the query's position in the gallery. None without a positive.
    """
    distances = np.square(gallery.astype(np.float64) - query.astype(np.float64)).sum(axis=1)
    is_positive = gallery_labels == label
    negatives = distances[~is_positive]
    if own is not None:
        is_positive[own] = False
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
        own = int(i) if space.is_self else None
        bounds = naive_ahead(space.query[i].numpy(), space.query_labels[i], own, gallery, space.gallery_labels)
        assert space.has_positive[i] == (bounds is not None)
        if bounds is not None:
            assert bounds[0] <= space.negatives_ahead[i] <= bounds[1], f"query {i}"
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
    counted = space.negatives_ahead[space.has_positive]
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
    """Not by dropping the first neighbour: here that may be the duplicate of another class."""
    points = np.array([[0, 0], [0, 0], [1, 0], [5, 5], [5, 5]], np.float32)
    space = EmbeddingSpace(points, np.array([0, 1, 0, 1, 1]))
    np.testing.assert_array_equal(space.negatives_ahead, [1, 2, 1, 0, 0])
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
    metrics = compute_metrics(space, [1000, 4])
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
    compute_metrics(space, [1, 2])
    assert trained == [(3, 900, 20, 1)]  # once for all metrics; faiss's own limit would be 3 * 256 points
    assert len(space.clusters) == len(space.labels) == len(space.points) == 900
    assert set(space.clusters) == {0, 1, 2}


def test_evaluation_repeats_and_leaves_the_generators_alone() -> None:
    points, labels = gaussian(np.random.default_rng(7), 200)

    def measure() -> dict[str, float]:
        space = EmbeddingSpace(points, labels)
        space.neighbours(np.arange(5), 3)
        return {**compute_metrics(space, [1, 4]), "Intra / Inter": intra_inter_ratio(space)}

    def generators() -> tuple[Any, ...]:
        of_numpy: Any = np.random.get_state()
        return random.getstate(), of_numpy[1].tobytes(), of_numpy[2:], torch.get_rng_state().numpy().tobytes()

    before = generators()
    first = measure()
    assert generators() == before
    random.seed(8)
    np.random.seed(8)
    torch.manual_seed(8)
    assert measure() == first


def naive_neighbours(space: EmbeddingSpace, query: int, k: int) -> np.ndarray:
    distances = np.linalg.norm(space.gallery.double().numpy() - space.query[query].double().numpy(), axis=1)
    if space.is_self:
        distances[query] = np.inf
    return np.argsort(distances)[: min(k, len(distances) - space.is_self)]


@pytest.mark.parametrize("backend", ["faiss", "scikit-learn"])
@pytest.mark.parametrize("k", [1, 6, 1000])
def test_neighbours(k: int, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if backend == "scikit-learn":
        monkeypatch.setattr(evaluate, "faiss", None)
    points, labels = gaussian(np.random.default_rng(9), 80)
    chosen = np.array([3, 0, 29])
    for space in (EmbeddingSpace(points, labels), EmbeddingSpace(points[:30], labels[:30], points[30:], labels[30:])):
        expected = [naive_neighbours(space, query, k) for query in chosen]
        np.testing.assert_array_equal(space.neighbours(chosen, k), expected)
    assert ("notice" in capsys.readouterr().err) == (backend == "scikit-learn")


def test_a_query_is_no_neighbour_of_itself_even_among_duplicates() -> None:
    points = np.repeat(np.random.default_rng(10).normal(size=(4, 8)), 10, axis=0).astype(np.float32)
    space = EmbeddingSpace(points, np.arange(40) % 5)
    found = space.neighbours(np.arange(40), 3)
    assert found.shape == (40, 3)
    for query, neighbours in enumerate(found):
        assert query not in neighbours
        assert len(set(neighbours)) == 3
        assert {neighbour // 10 for neighbour in neighbours} == {query // 10}


def test_without_faiss_scikit_learn_clusters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "faiss", None)
    metrics = compute_metrics(perfect_space([5] * 6), [1])
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


def test_a_metric_of_ones_own_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_norm(space: EmbeddingSpace) -> float:
        return float(space.points.norm(dim=1).mean())

    def share(space: EmbeddingSpace, k: int) -> float:
        return k / len(space.labels)

    monkeypatch.setitem(evaluate.METRICS, "Mean norm", mean_norm)
    monkeypatch.setitem(evaluate.METRICS, "Share", share)
    space = EmbeddingSpace(np.full((8, 4), 0.5, np.float32), np.arange(8) % 2)
    metrics = compute_metrics(space, [2, 4], ["NMI", "Mean norm", "Share"])
    assert list(metrics)[-4:] == ["Mean norm", "Share @ 1", "Share @ 2", "Share @ 4"]
    assert list(metrics.values())[-4:] == pytest.approx([1, 1 / 8, 2 / 8, 4 / 8])


def naive_precisions(points: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """R-precision, MAP@R and mAP by sorting each query's gallery, wrong items first where distances tie."""
    results: dict[str, list[float]] = {"R-precision": [], "MAP@R": [], "mAP": []}
    for query, label in enumerate(labels):
        others = np.delete(np.arange(len(labels)), query)
        right = labels[others] == label
        if not right.any():
            continue
        distances = ((points[others].astype(np.float64) - points[query].astype(np.float64)) ** 2).sum(axis=1)
        hits = right[np.lexsort((right, distances))]
        precision = hits * np.cumsum(hits) / np.arange(1, len(hits) + 1)
        r = right.sum()
        results["R-precision"].append(hits[:r].mean())
        results["MAP@R"].append(precision[:r].sum() / r)
        results["mAP"].append(precision.sum() / r)
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
    metrics = compute_metrics(EmbeddingSpace(points, labels), [1], RETRIEVAL)
    for name, expected in naive_precisions(points, labels).items():
        assert metrics[name] == pytest.approx(expected, abs=1e-12), name


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
    }
    calculator = AccuracyCalculator(include=tuple(names), k=len(points[gallery]) - (not with_gallery))
    tensors = [torch.from_numpy(part) for part in (points[query], labels[query], *given)]
    theirs = calculator.get_accuracy(*tensors)
    ours = compute_metrics(space, [1], list(names.values()))
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
        assert space.precisions["map"][query] == pytest.approx(precision.sum() / 2999)


def test_geometry_metrics_agree_with_naive_loops() -> None:
    rng = np.random.default_rng(4)
    points, labels = gaussian(rng, 60)
    unit = points.astype(np.float64) / np.linalg.norm(points.astype(np.float64), axis=1, keepdims=True)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    squared = {pair: float(((unit[pair[0]] - unit[pair[1]]) ** 2).sum()) for pair in pairs}
    names = ["Rho-spectrum", "Uniformity", "Alignment", "AMI", "Intra / Inter"]
    space = EmbeddingSpace(points, labels)
    metrics = compute_metrics(space, [1], names)
    assert metrics["Uniformity"] == pytest.approx(np.log(np.mean([np.exp(-2 * d) for d in squared.values()])), abs=1e-5)
    same = [d for (i, j), d in squared.items() if labels[i] == labels[j]]
    assert metrics["Alignment"] == pytest.approx(np.mean(same), abs=1e-6)
    values = np.linalg.svd(points.astype(np.float64), compute_uv=False)
    share = values / values.sum()
    assert metrics["Rho-spectrum"] == pytest.approx(float(np.mean(np.log(1 / len(share) / share))), abs=1e-9)
    assert metrics["AMI"] == pytest.approx(adjusted_mutual_info_score(labels, space.clusters), abs=1e-12)
    assert list(metrics) == ["Recall @ 1", *(name for name in evaluate.METRICS if name in names)]


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"Recall @ 1": 0.25, "Recall @ 10": 1.0, "NMI": 0.5}, 0.25),
        ({"Set 0 Recall @ 1": 0.25, "Set 1 Recall @ 1": 0.75, "Set 0 Recall @ 10": 1.0}, 0.5),
        ({"Recall @ 1": 0.25, "Class Recall @ 1": 0.75}, 0.25),
        ({"Set 0 Recall @ 1": 0.25, "Set 0 Class Recall @ 1": 1.0, "Set 1 Recall @ 1": 0.75}, 0.5),
    ],
    ids=["one set", "two sets", "a like-named metric", "two sets and a like-named metric"],
)
def test_mean_over_sets(metrics: dict[str, float], expected: float) -> None:
    assert mean_over_sets(metrics, "Recall @ 1") == pytest.approx(expected)


class ColourNet(nn.Module):
    """Embeds an image as its mean colour; fails where it is not in evaluation mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert images.dtype == torch.uint8
        return images.double().mean(dim=(2, 3))


@pytest.fixture
def images(tiny_source: Path) -> datasets.ImageSet:
    return datasets.read_class_folders(tiny_source / "tiny" / "images")


def make_loader(images: datasets.ImageSet) -> datasets.ImageLoader:
    dataset = datasets.ImageDataset(images, datasets.eval_transform(24, 32))
    return datasets.ImageLoader(dataset, batch_size=7, collate_fn=datasets.collate)


def colours(loader: datasets.ImageLoader) -> np.ndarray:
    """What `ColourNet` makes of a loader's images, by NumPy."""
    return np.array([np.asarray(loader.dataset[i][0]).mean(axis=(1, 2)) for i in range(len(loader.dataset))])  # type: ignore[index]


def test_evaluate_one_set_several_sets_and_a_gallery(images: datasets.ImageSet) -> None:
    rng = np.random.default_rng(12)
    is_query = rng.random(len(images)) < 0.5
    whole, query, gallery = (make_loader(images.subset(mask)) for mask in (is_query | True, is_query, ~is_query))
    own = EmbeddingSpace(colours(whole), whole.labels)
    two = EmbeddingSpace(colours(query), query.labels, colours(gallery), gallery.labels)
    sets = [datasets.RetrievalLoaders("all", whole), datasets.RetrievalLoaders("shop", query, gallery)]
    net, device = ColourNet(), torch.device("cpu")

    for chosen, space in zip(sets, (own, two)):
        metrics, spaces = evaluate.evaluate(net.train(), [chosen], [1, 3], device)
        assert metrics == pytest.approx(compute_metrics(space, [1, 3]))
        assert len(spaces) == 1
        assert spaces[0].query.dtype == torch.float32
        np.testing.assert_allclose(spaces[0].query, space.query, rtol=1e-6)

    metrics, spaces = evaluate.evaluate(net, sets, [3], device)
    expected = {f"Set 0 {name}": value for name, value in compute_metrics(own, [3]).items()}
    expected |= {f"Set 1 {name}": value for name, value in compute_metrics(two, [3]).items()}
    assert metrics == pytest.approx(expected)
    assert [space.is_self for space in spaces] == [True, False]
    both = [metrics[f"Set {position} Recall @ 1"] for position in (0, 1)]
    assert mean_over_sets(metrics, "Recall @ 1") == pytest.approx(np.mean(both))
