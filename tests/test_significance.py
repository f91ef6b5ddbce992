"""Statistics of differences: against SciPy, by hand, and their error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

import significance

TRIALS, ALLOWED = 1000, 70  # comparisons of what doesn't differ, and how many of them may be called different at 5 %


def test_pairs_of_seeds_against_scipy() -> None:
    rng = np.random.default_rng(0)
    some, others = rng.normal(0.6, 0.02, 7), rng.normal(0.58, 0.02, 7)
    found, wanted = significance.paired_over_seeds(some - others), stats.ttest_rel(some, others)
    interval = wanted.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert (found.p, found.p_wilcoxon) == pytest.approx((wanted.pvalue, stats.wilcoxon(some, others).pvalue))
    assert (found.mean, found.count) == (pytest.approx((some - others).mean()), 7)


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1, 0.1], [0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_what_does_not_vary_has_no_interval(values: list[float]) -> None:
    found = significance.paired_over_seeds(values)
    assert found.mean == pytest.approx(values[0])
    assert all(math.isnan(value) for value in (found.low, found.high, found.p, found.p_wilcoxon))


def test_folds_by_hand() -> None:
    """Of four partitions two folds train on three each, and have two of them in common: ρ = 2/3, ρ / (1 - ρ) = 2."""
    values = np.array([0.01, 0.03, 0.02, 0.05])
    found = significance.paired_over_folds(values, num_partitions=4)
    error = values.std(ddof=1) * math.sqrt(1 / 4 + 2)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 3) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(values.mean() / error, 3))
    # two folds of two partitions have no class in common: the ordinary t
    assert significance.paired_over_folds(values[:2], 2).p == pytest.approx(stats.ttest_1samp(values[:2], 0).pvalue)


def test_holm_by_hand() -> None:
    assert significance.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert significance.holm([0.01, 0.04], num_comparisons=6) == pytest.approx([0.06, 0.2])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


def queries(rng: np.random.Generator, num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, weights and differences of queries; a network does well on some classes and badly on others."""
    sizes = rng.integers(5, 40, num_classes)
    labels = np.repeat(np.arange(num_classes), sizes)
    chances = rng.uniform(0.2, 0.95, (2, num_classes))
    some, others = (rng.random(len(labels)) < chances[which][labels] for which in (0, 1))
    return labels, np.full(len(labels), 1 / len(labels)), some.astype(float) - others


def test_a_bootstrap_draws_classes_as_scipy_does() -> None:
    labels, weights, differences = queries(np.random.default_rng(1), 60)
    found = significance.bootstrap_over_classes(labels, weights, differences)
    assert found.mean == pytest.approx(differences.mean())
    assert found.count == 60
    sums = [np.bincount(labels, values) for values in (differences, np.ones(len(labels)))]
    tail = stats.norm.cdf(stats.t.ppf(0.025, 59) * math.sqrt(60 / 59))
    wanted = stats.bootstrap(
        sums,
        lambda some, count, axis: some.sum(axis) / count.sum(axis),
        paired=True,
        n_resamples=10_000,
        method="percentile",
        confidence_level=1 - 2 * tail,
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = wanted.high - wanted.low
    assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=0.03 * width)
    assert (found.p < 0.05) == (not found.low < 0 < found.high)
    assert found == significance.bootstrap_over_classes(labels, weights, differences)  # the same draws
    shifted = significance.bootstrap_over_classes(labels, weights, differences - found.high)
    assert shifted.p == pytest.approx(0.05, abs=0.005)  # an interval that ends at zero is one of 5 %
    # queries without weight, such as those with nothing to find, don't count
    more = significance.bootstrap_over_classes(np.r_[labels, 99], np.r_[weights, 0], np.r_[differences, 5])
    assert more == found


def test_a_bootstrap_over_few_classes_has_no_interval() -> None:
    found = significance.bootstrap_over_classes(*queries(np.random.default_rng(2), significance.MIN_CLASSES - 1))
    assert math.isnan(found.p)
    labels = np.repeat(np.arange(30), 2)
    same = significance.bootstrap_over_classes(labels, np.ones(60), np.zeros(60))
    assert (same.mean, same.count) == (0, 30)
    assert math.isnan(same.p)


# How often something is found where there is nothing


@pytest.mark.parametrize("num_seeds", [2, 5])
def test_seeds_that_do_not_differ(num_seeds: int) -> None:
    """A seed's folds depend on each other: only their means are pairs."""
    rng = np.random.default_rng(num_seeds)
    of_seed, of_fold = rng.normal(size=(TRIALS, num_seeds, 1)), rng.normal(size=(TRIALS, num_seeds, 4))
    differences = (of_seed + 0.5 * of_fold).mean(axis=2)
    found = [significance.paired_over_seeds(row) for row in differences]
    assert sum(one.p < 0.05 for one in found) <= ALLOWED
    assert sum(one.p_wilcoxon < 0.05 for one in found) <= ALLOWED
    assert [one.p < 0.05 for one in found] == [not one.low < 0 < one.high for one in found]


def fold_differences(rng: np.random.Generator, folds: int, partitions: int, share: float) -> np.ndarray:
    """Differences `(TRIALS, folds)` that owe a share of their variance to the training classes, the rest to chance."""
    classes = rng.normal(size=(TRIALS, partitions, 5)).mean(axis=2)  # how much each partition's classes help
    left_out = (classes.sum(axis=1, keepdims=True) - classes)[:, :folds]
    return math.sqrt(share) * left_out / left_out.std() + math.sqrt(1 - share) * rng.normal(size=left_out.shape)


@pytest.mark.parametrize("share", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize(("folds", "partitions"), [(2, 2), (4, 4), (2, 4), (4, 10), (10, 10)])
def test_folds_that_do_not_differ(folds: int, partitions: int, share: float) -> None:
    differences = fold_differences(np.random.default_rng(folds), folds, partitions, share)
    found = [significance.paired_over_folds(row, partitions).p for row in differences]
    assert sum(p < 0.05 for p in found) <= ALLOWED


def test_folds_need_the_correction() -> None:
    """What the correction guards against: neither the ordinary t nor n_test / n_train holds where classes matter."""
    differences = fold_differences(np.random.default_rng(0), 4, 4, share=1)
    ordinary = [significance.paired_t(row).p for row in differences]
    by_size = [significance.paired_t(row, correlation=1 / 4).p for row in differences]  # ρ / (1 - ρ) = 1/3
    assert sum(p < 0.05 for p in ordinary) > 4 * ALLOWED
    assert sum(p < 0.05 for p in by_size) > 2 * ALLOWED


@pytest.mark.parametrize("num_classes", [significance.MIN_CLASSES, pytest.param(50, marks=pytest.mark.slow)])
def test_networks_that_do_not_differ(num_classes: int) -> None:
    rng = np.random.default_rng(num_classes)
    found = [
        significance.bootstrap_over_classes(*queries(rng, num_classes), draws=1000, seed=trial).p
        for trial in range(TRIALS)
    ]
    assert sum(p < 0.05 for p in found) <= ALLOWED


def test_comparisons_with_the_best_of_several() -> None:
    """The best of five groups that don't differ looks better than the others: all pairs count."""
    rng = np.random.default_rng(0)
    called = {"all pairs": 0, "pairs with the best": 0}
    for _ in range(TRIALS):
        groups = rng.normal(size=(5, 5))  # (groups, seeds)
        best = groups.mean(axis=1).argmax()
        p_values = [significance.paired_t(groups[best] - groups[other]).p for other in range(5) if other != best]
        called["all pairs"] += min(significance.holm(p_values, num_comparisons=10)) < 0.05
        called["pairs with the best"] += min(significance.holm(p_values)) < 0.05
    assert called["all pairs"] <= ALLOWED < called["pairs with the best"]
