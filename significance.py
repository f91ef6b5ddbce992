"""Whether a difference between trained networks is one: intervals and p-values of paired figures.

Pure: arrays in, `Difference` out. Apart from compare.py, so that its error rates can be tested by simulation, without a
run folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of tests; intervals are of 95 %
MIN_CLASSES = 20  # with fewer, a bootstrap over classes may find what isn't there in more than 7 % of cases
DRAWS = 10_000
MAX_DRAWN = 2**20  # classes that are drawn at once


@dataclass(frozen=True)
class Difference:
    """A mean difference, and what can be told of it; NaN where it can't be.

    Attributes:
        mean: the mean difference.
        low: the lower end of its 95 % confidence interval.
        high: the upper end.
        p: the two-sided p-value of the test that belongs to the interval.
        p_wilcoxon: that of Wilcoxon's signed-rank test.
        count: the number of pairs, or of classes.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_wilcoxon: float = math.nan
    count: int = 1


def paired_t(differences: Sequence[float] | np.ndarray, correlation: float = 0.0) -> Difference:
    """Student's t for the mean of paired differences, which may be correlated with each other.

    With correlation ρ the variance of a mean of J differences is (1/J + ρ / (1 - ρ)) S², S² being their sample
    variance. Nadeau and Bengio, Inference for the Generalization Error, Machine Learning 52, 2003, section 3.

    Args:
        differences: one for each pair.
        correlation: of any two of them, below 1.

    Returns:
        Without an interval for a single pair, or where all differences are the same: then nothing says how they vary.
    """
    from scipy.special import stdtr, stdtrit

    values = np.asarray(differences, np.float64)
    mean, count = float(values.mean()), len(values)
    deviation = float(values.std(ddof=1)) if count > 1 else 0.0
    if deviation <= 1e-12 * float(np.abs(values).max()):
        return Difference(mean, count=count)
    error = deviation * math.sqrt(1 / count + correlation / (1 - correlation))
    half = float(stdtrit(count - 1, 1 - LEVEL / 2)) * error
    p = 2 * float(stdtr(count - 1, -abs(mean) / error))
    return Difference(mean, mean - half, mean + half, p, count=count)


def paired_over_seeds(differences: Sequence[float] | np.ndarray) -> Difference:
    """Paired t and Wilcoxon's signed-rank test of two groups' differences, one for each seed."""
    from scipy.stats import wilcoxon

    found = paired_t(differences)
    if math.isnan(found.p):
        return found
    return Difference(found.mean, found.low, found.high, found.p, float(wilcoxon(differences).pvalue), found.count)


def paired_over_folds(differences: Sequence[float] | np.ndarray, num_partitions: int) -> Difference:
    """The corrected t of Nadeau and Bengio for folds of one seed, which share training classes and all test classes.

    Each fold trains on all partitions of the training classes but its own, so that two folds have the share
    (P - 2) / (P - 1) of their training classes in common. What a fold's difference owes to its training classes is
    correlated by that share, what it owes to chance isn't: differences can't be correlated more than that. Nadeau and
    Bengio's n_test / n_train, here 1 / (P - 1), is meant for folds that are tested on what they leave out, and finds
    too much here: in 21 % of null comparisons, for P = 4, where training classes are all that matters.

    Args:
        differences: one for each fold.
        num_partitions: P, at least 2.
    """
    return paired_t(differences, (num_partitions - 2) / (num_partitions - 1))


def bootstrap_over_classes(
    labels: np.ndarray, weights: np.ndarray, differences: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """The difference of two networks on the same queries, with whole classes drawn anew.

    Queries of a class depend on each other. Interval and p-value are those of the expanded percentile bootstrap, whose
    intervals are wider, as by Student's t. Hesterberg, What Teachers Should Know About the Bootstrap, The American
    Statistician 69, 2015, section 5.3.

    Args:
        labels: `(Q,)` the queries' classes.
        weights: `(Q,)` how much each query counts in the figure.
        differences: `(Q,)` one network's result of each query minus the other's.
        draws: how many times classes are drawn.
        seed: of the draws.

    Returns:
        Without an interval where there are fewer than MIN_CLASSES classes, or all have the same difference.
    """
    from scipy.special import ndtr, ndtri, stdtr, stdtrit

    _, place = np.unique(labels[weights > 0], return_inverse=True)  # (some,) classes that count, from 0
    weights, differences = (np.asarray(values, np.float64)[weights > 0] for values in (weights, differences))
    sums = np.stack([np.bincount(place, weights * differences), np.bincount(place, weights)], axis=1)  # (C, 2)
    mean, count = float(sums[:, 0].sum() / sums[:, 1].sum()), len(sums)
    means = sums[:, 0] / sums[:, 1]  # (C,)
    if count < MIN_CLASSES or np.ptp(means) <= 1e-12 * np.abs(means).max():
        return Difference(mean, count=count)
    rng, found = np.random.default_rng(seed), []
    for rows in np.array_split(np.arange(draws), math.ceil(draws * count / MAX_DRAWN)):
        drawn = rng.integers(count, size=(len(rows), count), dtype=np.int32)  # (rows, C)
        numerator, denominator = (column.take(drawn).sum(axis=1) for column in sums.T.copy())  # (rows,) each
        found.append(numerator / denominator)
    drawn_means = np.concatenate(found)  # (draws,)
    widening = math.sqrt(count / (count - 1))
    tail = float(ndtr(widening * stdtrit(count - 1, LEVEL / 2)))
    low, high = np.quantile(drawn_means, [tail, 1 - tail])
    as_far = min((drawn_means <= 0).sum(), (drawn_means >= 0).sum()) + 1
    p = 2 * float(stdtr(count - 1, ndtri(min(0.5, as_far / (draws + 1))) / widening))
    return Difference(mean, float(low), float(high), p, count=count)


def holm(p_values: Sequence[float], num_comparisons: int | None = None) -> list[float]:
    """p-values that hold for all comparisons together. Holm, Scandinavian Journal of Statistics 6, 1979.

    Args:
        p_values: NaN for a comparison without one, which stays NaN.
        num_comparisons: how many comparisons there are, when these are only some of them (default: all that have a
            p-value). What is said of these holds whatever the p-values of the others are.
    """
    defined = [position for position, p in enumerate(p_values) if not math.isnan(p)]
    count = num_comparisons or len(defined)
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, position in enumerate(sorted(defined, key=lambda position: p_values[position])):
        largest = max(largest, min(1.0, (count - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted
