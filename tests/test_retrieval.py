"""Re-ranking, query expansion, database augmentation, whitening and cheaper embeddings, against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Metrics, embed_by_hand
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

import config
import datasets
import evaluate
import evaluate_runs
import main
import plots
import retrieval
import runs
import transforms
from auxiliaries import UserError
from evaluate import EmbeddingSpace

RANKS = ["Recall", "Precision @ 3", "MRR", "R-precision", "MAP@R", "mAP"]


def clusters(num_classes: int, per_class: int, dim: int = 8, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Points of length 1 around a center for each class, so near to each other that ranks are far from perfect."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    points = rng.normal(size=(num_classes, dim))[labels] + 1.2 * rng.normal(size=(len(labels), dim))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(len(labels))
    return torch.from_numpy(points[order]), labels[order]


def own_space(normalized: bool = True) -> EmbeddingSpace:
    """All against all."""
    points, labels = clusters(6, 9)
    return EmbeddingSpace(points if normalized else 3 * points + 0.2, labels)


def gallery_space() -> EmbeddingSpace:
    """Queries, of which every third one is in the gallery, too."""
    points, labels = clusters(6, 12, seed=1)
    query, gallery = np.arange(24), np.r_[np.arange(0, 24, 3), np.arange(24, 72)]
    place = {item: position for position, item in enumerate(gallery.tolist())}
    inside = np.array([place.get(item, -1) for item in query.tolist()])
    return EmbeddingSpace(points[query], labels[query], points[gallery], labels[gallery], inside)


SPACES = [own_space, gallery_space]


def rank_by_loops(space: EmbeddingSpace, distances: np.ndarray) -> Metrics:
    """Metrics of given distances `(Q, G)`, ties counted against the network."""
    results: dict[str, list[float]] = {name: [] for name in ("Recall @ 1", "Recall @ 4", "MAP@R", "mAP", "MRR")}
    for query, label in enumerate(space.query_labels):
        items = [item for item in range(len(space.gallery)) if item != space.query_in_gallery[query]]
        items.sort(key=lambda item: (distances[query, item], space.gallery_labels[item] == label))
        correct = [space.gallery_labels[item] == label for item in items]
        r = sum(correct)
        if not r:
            continue
        ranks = [rank for rank, is_right in enumerate(correct, start=1) if is_right]
        precisions = [(j + 1) / rank for j, rank in enumerate(ranks)]
        results["Recall @ 1"].append(ranks[0] <= 1)
        results["Recall @ 4"].append(ranks[0] <= 4)
        results["MRR"].append(1 / ranks[0])
        results["mAP"].append(sum(precisions) / r)
        results["MAP@R"].append(sum(p for p, rank in zip(precisions, ranks) if rank <= r) / r)
    return {name: float(np.mean(values)) for name, values in results.items()}


def distances_of(space: EmbeddingSpace) -> np.ndarray:
    """Euclidean distances `(Q, G)` by differences."""
    query, gallery = space.query.double().numpy(), space.gallery.double().numpy()
    return np.linalg.norm(query[:, None] - gallery[None], axis=2)


def metrics_of(space: EmbeddingSpace) -> Metrics:
    return evaluate.evaluate_space(space, [1, 4], ["Recall", "MAP@R", "mAP", "MRR"])


# Re-ranking


def rerank_by_loops(points: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """All distances `(N, N)`: the paper's sets, with the details of the authors' code (see `KReciprocal`)."""
    size = len(points)
    plain = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    order = [[i, *sorted((j for j in range(size) if j != i), key=lambda j: plain[i, j])] for i in range(size)]
    plain = plain / plain.max(axis=1, keepdims=True)

    def reciprocal(i: int, k: int) -> set[int]:
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    vectors = np.zeros((size, size))
    for i in range(size):
        members = reciprocal(i, k1)
        for other in sorted(reciprocal(i, k1)):
            theirs = reciprocal(other, round(k1 / 2))
            if len(theirs & reciprocal(i, k1)) > 2 / 3 * len(theirs):
                members |= theirs
        for j in members:
            vectors[i, j] = math.exp(-plain[i, j])
        vectors[i] /= vectors[i].sum()
    vectors = np.stack([np.mean([vectors[j] for j in order[i][:k2]], axis=0) for i in range(size)])
    jaccard = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            jaccard[i, j] = 1 - np.minimum(vectors[i], vectors[j]).sum() / np.maximum(vectors[i], vectors[j]).sum()
    return (1 - weight) * jaccard + weight * plain


@pytest.mark.parametrize("make", SPACES)
@pytest.mark.parametrize(("k1", "k2", "weight"), [(8, 3, 0.3), (5, 1, 0.0), (20, 6, 0.3), (3, 5, 1.0)])
def test_reranked_distances_and_metrics(
    make: Callable[[], EmbeddingSpace], k1: int, k2: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MAX_DISTANCES": 100, "MAX_VALUES": 100, "MAX_ROWS": 7}.items():  # many pieces
        monkeypatch.setattr(retrieval, name, value)
    monkeypatch.setattr(evaluate, "MAX_RANKED", 300)
    space = make()
    outside = np.flatnonzero(space.query_in_gallery < 0)
    points = torch.cat([space.query[outside], space.gallery]).double().numpy()
    place = np.where(space.query_in_gallery < 0, 0, len(outside) + space.query_in_gallery)
    place[outside] = np.arange(len(outside))
    expected = rerank_by_loops(points, k1, k2, weight)[place][:, len(outside) :]

    changed = retrieval.rerank(space, lambda points: retrieval.KReciprocal(points, k1, k2, weight))
    assert changed.ranking is not None
    found = changed.ranking(torch.arange(len(space.query))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    metrics = metrics_of(changed)
    assert metrics == pytest.approx({name: rank_by_loops(space, found)[name] for name in metrics})
    assert (metrics == pytest.approx(metrics_of(space))) == (weight == 1)
    chosen = np.array([3, 17])
    for query, neighbors in zip(chosen, changed.neighbors(chosen, 5)):
        own = space.query_in_gallery[query]
        assert neighbors.tolist() == [item for item in found[query].argsort(kind="stable") if item != own][:5]


def test_each_finds_more_of_each_class() -> None:
    points, labels = clusters(30, 20, dim=16, seed=3)
    space = EmbeddingSpace(points, labels)
    augmented = retrieval.augment_database(space, 9)
    for changed in (
        retrieval.rerank(space, retrieval.KReciprocal),
        retrieval.expand_queries(space, 3),
        augmented,
        retrieval.expand_queries(augmented, 3, alpha=3),
    ):
        assert evaluate.mean_average_precision(changed) > 1.1 * evaluate.mean_average_precision(space)


def test_reranking_of_equal_points() -> None:
    """Every point stands there twice; the second one is found at distance 0, and the query itself never."""
    points, labels = clusters(5, 4)
    space = EmbeddingSpace(torch.cat([points, points]), np.concatenate([labels, labels]))
    changed = retrieval.rerank(space, retrieval.KReciprocal)
    assert evaluate.recall_at_k(changed, 1) == 1
    everything_equal = EmbeddingSpace(torch.ones(6, 3), np.arange(6) % 2)
    changed = retrieval.rerank(everything_equal, retrieval.KReciprocal)
    assert evaluate.recall_at_k(changed, 1) == 0  # ties count against the network


def test_a_ranking_by_plain_distances_gives_the_plain_metrics() -> None:
    """At several label levels, inside parents and for each class, where spaces are made of spaces."""
    names = [*RANKS, "nDCG", "H-AP"]
    for make in SPACES:
        plain = make()
        hierarchy = np.stack([plain.query_labels, plain.query_labels % 2], axis=1)
        of_gallery = np.stack([plain.gallery_labels, plain.gallery_labels % 2], axis=1)
        spaces = [plain.with_labels(hierarchy, of_gallery) for _ in range(2)]
        spaces[1].ranking = lambda rows, space=spaces[1]: torch.from_numpy(distances_of(space))[rows]
        one, other = (evaluate.evaluate_space(space, [1, 2, 4], names) for space in spaces)
        assert one == pytest.approx(other)
        parents = hierarchy[:, 1], of_gallery[:, 1]
        one, other = (evaluate.evaluate_within_parents(space, *parents, [1, 2], RANKS) for space in spaces)
        assert one == pytest.approx(other)
        one_by_query, other_by_query = (evaluate.query_results(space, "WithSameParentLabel") for space in spaces)
        assert all(np.allclose(one_by_query[name], other_by_query[name]) for name in one_by_query)
        (_, _, coarse), (_, _, other_coarse) = (
            list(evaluate.parts_of_spaces([space], all_levels=True))[1] for space in spaces
        )
        assert evaluate.map_at_r(coarse) == pytest.approx(evaluate.map_at_r(other_coarse))


# Means of neighbors


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("make", [*SPACES, lambda: own_space(normalized=False)])
def test_query_expansion(make: Callable[[], EmbeddingSpace], alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_DISTANCES", 200)
    monkeypatch.setattr(retrieval, "MAX_VALUES", 100)
    space, distances, expected = make(), distances_of(make()), []
    is_unit = retrieval.is_normalized(space.gallery)
    for query, point in enumerate(space.query.double().numpy()):
        items = [i for i in np.argsort(distances[query]) if i != space.query_in_gallery[query]][:4]
        total, weights = point.copy(), 1.0
        for near in space.gallery.double().numpy()[items]:
            cosine = max(0.0, float(point @ near) / (np.linalg.norm(point) * np.linalg.norm(near)))
            total, weights = total + cosine**alpha * near, weights + cosine**alpha
        mean = total / weights
        expected.append(mean / np.linalg.norm(mean) if is_unit else mean)
    changed = retrieval.expand_queries(space, 4, alpha)
    np.testing.assert_allclose(changed.query.numpy(), np.array(expected), atol=1e-6)
    assert changed.gallery.equal(space.gallery)
    assert changed.query_in_gallery.tolist() == space.query_in_gallery.tolist()
    assert metrics_of(changed) == pytest.approx(rank_of(changed))


def rank_of(space: EmbeddingSpace) -> Metrics:
    return rank_by_loops(space, distances_of(space))


@pytest.mark.parametrize("make", SPACES)
def test_database_augmentation(make: Callable[[], EmbeddingSpace]) -> None:
    space, expected = make(), []
    points = space.gallery.double().numpy()
    indices = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(return_distance=False)  # without the point itself
    for point, items in zip(points, indices):
        mean = (point + points[items].sum(axis=0)) / 5
        expected.append(mean / np.linalg.norm(mean))
    changed = retrieval.augment_database(space, 4)
    np.testing.assert_allclose(changed.gallery.numpy(), np.array(expected), atol=1e-6)
    assert changed.query.equal(space.query)
    assert metrics_of(changed) == pytest.approx(rank_of(changed))


def test_more_neighbors_than_there_are() -> None:
    points, labels = clusters(2, 2)
    space = EmbeddingSpace(points, labels)
    mean = points.double().mean(dim=0)
    for changed in (retrieval.expand_queries(space, 50).query, retrieval.augment_database(space, 50).gallery):
        assert torch.allclose(changed.double(), (mean / mean.norm()).expand(4, -1), atol=1e-6)
    assert math.isfinite(evaluate.map_at_r(retrieval.rerank(space, retrieval.KReciprocal)))


def test_means_with_mirror_images() -> None:
    class Sums(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(images[:, 0, 0, :3].float(), dim=1)

    images = torch.randint(1, 255, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = retrieval.WithMirror(Sums())(images)
    plain, mean = retrieval.split_mirror(both)
    assert plain.equal(Sums()(images))
    for image, found in zip(images, mean):
        one = torch.nn.functional.normalize(image[0, 0, :3].float(), dim=0)
        other = torch.nn.functional.normalize(image[0, 0, [3, 2, 1]].float(), dim=0)
        assert torch.allclose(found, (one + other) / (one + other).norm(), atol=1e-6)
    _, mean = retrieval.split_mirror(2 * both)
    assert torch.allclose(mean[0], both[0, :3] + both[0, 3:], atol=1e-6)


# Projections and precisions


def test_whitening_equals_scikit_learns() -> None:
    training = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 6)) @ np.diag([5, 3, 1, 1, 0.5, 0.1]))
    points, _ = clusters(3, 5, dim=6)
    found = retrieval.fit_whitening(training.float())(points).double().numpy()
    expected = (
        PCA(whiten=True, svd_solver="full").fit(training.float().double().numpy()).transform(points.double().numpy())
    )
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_whitening_drops_what_does_not_vary(capsys: pytest.CaptureFixture[str]) -> None:
    training = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([training, training.sum(dim=1, keepdim=True), torch.ones(50, 1)], dim=1)
    assert retrieval.fit_whitening(flat)(flat).shape == (50, 3)
    assert "--whiten keeps 3 of 5 dimensions" in capsys.readouterr().err
    for same in (torch.ones(9, 4), torch.ones(1, 4)):
        with pytest.raises(UserError, match="--whiten: the embeddings of the training images are all the same"):
            retrieval.fit_whitening(same)


def test_principal_components() -> None:
    training, _ = clusters(9, 9)
    points, _ = clusters(3, 5, seed=4)
    found = retrieval.fit_components(training, 3)(points).double().numpy()
    expected = PCA(3, svd_solver="full").fit(training.double().numpy()).transform(points.double().numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6)


def test_int8_by_loops() -> None:
    training, points = clusters(4, 9)[0], clusters(2, 5, seed=2)[0]
    training[:, 3] = 0.25  # never varies
    found = retrieval.quantize_int8(points, training)
    assert all(len(found[:, dim].unique()) <= 256 for dim in range(8))
    for i, j in np.ndindex(*points.shape):
        low, high = float(training[:, j].min()), float(training[:, j].max())
        step = (high - low) / 255 or 1.0
        code = min(255, max(0, round((float(points[i, j]) - low) / step)))
        assert float(found[i, j]) == pytest.approx(low + code * step, abs=1e-6)


@pytest.mark.parametrize("make", SPACES)
@pytest.mark.parametrize("dim", [8, 5])
def test_binary_codes_are_compared_by_bits(make: Callable[[], EmbeddingSpace], dim: int) -> None:
    space, (training, _) = make(), clusters(9, 9, seed=5)
    changed = retrieval.compress(space, training, dim, "binary")
    query, gallery = space.query, space.gallery
    if dim < 8:
        project = retrieval.fit_components(training, dim)
        query, gallery, training = project(query), project(gallery), project(training)
    bits = [(part > training.mean(dim=0)).numpy() for part in (query, gallery)]
    hamming = (bits[0][:, None] != bits[1][None]).sum(axis=2)
    assert changed.ranking is not None
    assert np.array_equal(changed.ranking(torch.arange(len(query))).numpy(), hamming)
    assert metrics_of(changed) == pytest.approx(rank_by_loops(space, hamming))


def test_bytes_per_image() -> None:
    sizes = {
        name: [precision.bytes_per_image(dim) for dim in (128, 12)] for name, precision in retrieval.PRECISIONS.items()
    }
    assert sizes == {"float32": [512, 48], "int8": [128, 12], "binary": [16, 2]}


# As flags of --evaluate


pytest_run = pytest.mark.usefixtures("without_pictures")


def evaluated(folder: Path, *flags: str) -> Metrics:
    return main.command(["--evaluate", str(folder), "--eval_metrics", "NMI", "MAP@R", *flags])


@pytest_run
def test_each_way_is_reported_beside_the_plain_one(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = evaluated(copied)
    capsys.readouterr()
    flags = ["--tta", "flip", "--whiten", "--database_augmentation", "2", "--query_expansion", "1", "--rerank"]
    found = evaluated(copied, *flags, "kreciprocal", "--rerank_params", "k1=4", "k2=2")
    lines = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("test")]
    steps = ["with mirror images", "whitened", "augmented database", "expanded queries", "re-ranked"]
    names = [", ".join(steps[:count]) for count in range(1, 6)]
    assert lines == ["test", *(f"test, {name}" for name in names)]
    assert {name: found[name] for name in plain} == pytest.approx(plain)
    assert {name for name in found if "NMI" in name} == {"test NMI", *(f"test NMI ({name})" for name in names[:2])}
    entry = evaluate_runs.read_evaluations(copied)[-1]
    assert entry["metrics"] == found
    assert entry["settings"]["rerank"] == "kreciprocal"
    assert entry["settings"]["rerank_params"] == {"k1": "4", "k2": "2"}
    assert "costs" not in entry

    splits = datasets.give_splits(runs.load_flags(copied))
    training, points = embed_by_hand(copied, splits.train), embed_by_hand(copied, splits.test[0].query)
    labels = splits.test[0].query.labels[:, 0]
    reranked = retrieval.rerank(EmbeddingSpace(points, labels), lambda some: retrieval.KReciprocal(some, 4, 2))
    found = evaluated(copied, "--rerank", "kreciprocal", "--rerank_params", "k1=4", "k2=2")
    assert found["test MAP@R (re-ranked)"] == pytest.approx(evaluate.map_at_r(reranked))
    whitened = EmbeddingSpace(retrieval.fit_whitening(training)(points), labels)
    assert evaluated(copied, "--whiten")["test MAP@R (whitened)"] == pytest.approx(evaluate.map_at_r(whitened))


@pytest_run
def test_mirror_images_of_a_run(copied: Path) -> None:
    opt = runs.load_flags(copied)
    images, net = datasets.give_splits(opt).test[0].query, runs.load_network(copied, opt, torch.device("cpu"))
    transform = transforms.build_eval_transform(opt)
    pixels = torch.stack([transform(transforms.load_image(path, False)) for path in images.paths])
    with torch.inference_mode():
        mean = torch.nn.functional.normalize(
            net(pixels) + net(torch.from_numpy(pixels.numpy()[..., ::-1].copy())), dim=1
        )
    expected = evaluate.map_at_r(EmbeddingSpace(mean, images.labels[:, 0]))
    assert evaluated(copied, "--tta", "flip")["test MAP@R (with mirror images)"] == pytest.approx(expected)


@pytest_run
def test_costs_of_embeddings(copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, save = [], plots.save_costs

    def record(path: Path, *what: Any) -> None:
        drawn.append(path)
        save(path, *what)

    monkeypatch.setattr(plots, "save_costs", record)
    metrics = evaluated(copied, "--eval_dims", "4", "8", "--eval_quantize", "binary", "int8")
    (entry,) = evaluate_runs.read_evaluations(copied)
    rows = entry["costs"]
    assert [(row["dimensions"], row["precision"], row["bytes"]) for row in rows] == [
        *((16, "float32", 64), (16, "int8", 16), (16, "binary", 2)),
        *((8, "float32", 32), (8, "int8", 8), (8, "binary", 1)),
        *((4, "float32", 16), (4, "int8", 4), (4, "binary", 1)),
    ]
    assert rows[0]["Recall @ 1"] == metrics["test Recall @ 1"]
    splits = datasets.give_splits(runs.load_flags(copied))
    training, points = embed_by_hand(copied, splits.train), embed_by_hand(copied, splits.test[0].query)
    pca = PCA(4, svd_solver="full").fit(training.double().numpy())
    space = EmbeddingSpace(pca.transform(points.double().numpy()), splits.test[0].query.labels[:, 0])
    assert rows[6]["MAP@R"] == pytest.approx(evaluate.map_at_r(space))
    table = capsys.readouterr().out.split("test: retrieval by bytes per image\n")[1].splitlines()
    assert table[0].split() == ["dimensions", "precision", "bytes", "Recall", "@", "1", "MAP@R"]
    assert table[1].split() == ["16", "float32", "64", f"{rows[0]['Recall @ 1']:.4f}", f"{rows[0]['MAP@R']:.4f}"]
    assert drawn == [copied / "embedding_costs_test.svg"]
    assert (copied / "embedding_costs_test.svg").read_text().count("<path") > 9


@pytest_run
def test_costs_that_cannot_be_drawn_lose_no_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "embedding_costs_test.svg").mkdir()
    evaluated(copied, "--eval_quantize", "int8")
    assert "notice: the costs of test embeddings are not drawn: " in capsys.readouterr().err
    (entry,) = evaluate_runs.read_evaluations(copied)
    assert [row["precision"] for row in entry["costs"]] == ["float32", "int8"]


REFUSED = [
    (["--evaluate", "--rerank_params", "k1=3"], "--rerank_params does nothing without --rerank"),
    (["--evaluate", "--expansion_alpha", "3"], "--expansion_alpha does nothing without --query_expansion or"),
    (["--evaluate", "--rerank", "kreciprocal", "--rerank_params", "k3=3"], "KReciprocal has no parameter k3"),
    (["--evaluate", "--rerank", "kreciprocal", "--rerank_params", "k1=0"], "k1 takes an integer of at least 1, not 0"),
    (["--evaluate", "--rerank", "kreciprocal", "--rerank_params", "k2=2.5"], "k2 of KReciprocal takes an integer"),
    (
        ["--evaluate", "--rerank", "kreciprocal", "--rerank_params", "lambda_value=1.5"],
        "lambda_value takes a number from 0 to 1, not 1.5",
    ),
    (["--evaluate", "--rerank", "reciprocal"], "kreciprocal"),
    (["--evaluate", "--query_expansion", "0"], "--query_expansion: 0 is not at least 1"),
    (["--evaluate", "--eval_dims", "17"], "--eval_dims 17 is more than 24 training embeddings of dimension 16 have"),
    (["--whiten"], "--whiten says how to --evaluate a finished run: add --evaluate, or drop it"),
    (["--eval_dims", "8"], "--eval_dims says how to --evaluate"),
]


@pytest_run
@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_refused(copied: Path, go_on: Callable[..., Metrics], flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        go_on(*flags)
    assert words in str(error.value)
    assert not (copied / "evaluation.json").exists()


def test_flags_of_retrieval_are_no_part_of_a_run() -> None:
    opt = config.parse([])
    assert not {"rerank", "rerank_params", "whiten", "tta", "eval_dims"} & config.configuration(opt).keys()
