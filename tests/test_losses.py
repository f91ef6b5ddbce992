"""Samplers against probabilities that naive loops count out, losses against naive loops and an independent library,
and both on fake CUDA tensors, where whatever would make the host wait raises."""

from __future__ import annotations

import argparse
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import DotProductSimilarity, LpDistance
from pytorch_metric_learning.miners import DistanceWeightedMiner, distance_weighted_miner
from pytorch_metric_learning.reducers import MeanReducer
from scipy.stats import chi2
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import config
import losses
from auxiliaries import FlagParser, UserError, seed_everything
from losses import LOSSES, Criterion, Sampler

Probabilities = dict[tuple[int, ...], float]

# Unsorted and uneven: four images of class 0, three of 1, two of 2, two of 3, one of 7.
LABELS = torch.tensor([2, 0, 1, 0, 7, 1, 0, 2, 3, 1, 0, 3])
NUM_CLASSES, DIM = 8, 5
# On a line: some positives are nearer than the nearest negative, some negatives farther than the farthest positive.
LINE = torch.tensor([6, 0, 3.3, 1, 12, 4, 2.1, 7.5, 20, 8, 9, 20.5])[:, None]
TRIPLETS = [(1, 3, 0), (3, 1, 2), (3, 1, 2), (3, 6, 2), (2, 5, 4), (9, 2, 11), (0, 7, 10), (8, 11, 1), (6, 10, 4)]
NPAIRS = [(1, 3, 2, 0, 8), (5, 2, 3, 0, 8), (7, 0, 3, 2, 8), (11, 8, 3, 2, 0)]
DRAWS = 1200

needs_fake_cuda = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="earlier releases make no fake CUDA tensors without a driver",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On tensors this small threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_batch(size: int = len(LABELS), dim: int = DIM, **options: Any) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(3), **options)


def unit_batch(dim: int, size: int = len(LABELS)) -> torch.Tensor:
    return torch.nn.functional.normalize(random_batch(size, dim), dim=1)


def signed_axes(dim: int) -> torch.Tensor:
    """Unit vectors with distances of exactly 0, √2 and 2."""
    axes = torch.cat([torch.eye(dim), -torch.eye(dim)])
    return axes[torch.arange(len(LABELS)) * 3 % len(axes)]


def build(loss: str, sampler: Sampler | None = None, **keywords: Any) -> Criterion:
    """Builds the loss with those of `sampler`, `num_classes` and `embed_dim` that it asks for."""
    given = {"sampler": sampler, "num_classes": NUM_CLASSES, "embed_dim": DIM}
    asked = inspect.signature(LOSSES[loss]).parameters
    return LOSSES[loss](**{name: given[name] for name in given if name in asked}, **keywords)


def default_sampler(loss: str) -> Sampler:
    """The loss's own sampler, or any for a loss without tuples."""
    return Sampler(losses.requirements(loss).sampling or "random")


def each_anchor(labels: list[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each position that has a positive and a negative, with all its positives and all its negatives."""
    for a in range(len(labels)):
        positives = [i for i in range(len(labels)) if i != a and labels[i] == labels[a]]
        negatives = [i for i in range(len(labels)) if labels[i] != labels[a]]
        if positives and negatives:
            yield a, positives, negatives


def random_probabilities(x: list[list[float]], labels: list[int]) -> Probabilities:
    triplets = [(a, p, n) for a, positives, negatives in each_anchor(labels) for p in positives for n in negatives]
    return dict.fromkeys(triplets, 1 / len(triplets))


def semihard_probabilities(
    x: list[list[float]], labels: list[int], margin: float = 0.2, squared: bool = False
) -> Probabilities:
    power = 2 if squared else 1
    result: Probabilities = {}
    for a, positives, negatives in each_anchor(labels):
        for p in positives:
            low = math.dist(x[a], x[p]) ** power
            pool = [n for n in negatives if low < math.dist(x[a], x[n]) ** power < low + margin] or negatives
            result.update({(a, p, n): 1 / len(positives) / len(pool) for n in pool})
    return result


def softhard_probabilities(x: list[list[float]], labels: list[int]) -> Probabilities:
    result: Probabilities = {}
    for a, positives, negatives in each_anchor(labels):
        farthest_positive = max(math.dist(x[a], x[p]) for p in positives)
        nearest_negative = min(math.dist(x[a], x[n]) for n in negatives)
        hard_positives = [p for p in positives if math.dist(x[a], x[p]) > nearest_negative] or positives
        hard_negatives = [n for n in negatives if math.dist(x[a], x[n]) < farthest_positive] or negatives
        for p, n in product(hard_positives, hard_negatives):
            result[a, p, n] = 1 / len(hard_positives) / len(hard_negatives)
    return result


def distance_probabilities(
    x: list[list[float]], labels: list[int], lower_cutoff: float = 0.5, upper_cutoff: float = math.inf
) -> Probabilities:
    dim = len(x[0])
    result: Probabilities = {}
    for a, positives, negatives in each_anchor(labels):
        reached = [n for n in negatives if math.dist(x[a], x[n]) <= upper_cutoff]
        log_weights = dict.fromkeys(reached or negatives, 0.0)
        for n in reached:
            d = max(math.dist(x[a], x[n]), lower_cutoff)
            log_weights[n] = -(dim - 2) * math.log(d) - (dim - 3) / 2 * math.log(max(1 - d**2 / 4, 1e-8))
        largest = max(log_weights.values())
        weights = {n: math.exp(log_weight - largest) for n, log_weight in log_weights.items()}
        for p, n in product(positives, weights):
            result[a, p, n] = weights[n] / sum(weights.values()) / len(positives)
    return result


def npair_probabilities(labels: list[int], anchor_class: int) -> Probabilities:
    """Probabilities of the tuples of one class, whose negatives are in the order of their labels."""
    members = {label: [i for i in range(len(labels)) if labels[i] == label] for label in sorted(set(labels))}
    pairs = list(permutations(members.pop(anchor_class), 2))
    negatives = list(product(*[positions for positions in members.values() if len(positions) > 1]))
    return {(*pair, *rest): 1 / len(pairs) / len(negatives) for pair, rest in product(pairs, negatives)}


def assert_frequencies(tuples: torch.Tensor, probabilities: Probabilities, draws: int) -> None:
    """Tests with Pearson's χ²; tuples expected fewer than five times are one kind, impossible ones fail."""
    counts = Counter(map(tuple, tuples.tolist()))
    assert set(counts) <= set(probabilities), "a tuple that should be impossible"
    expected = {key: draws * probability for key, probability in probabilities.items()}
    rare = [key for key in expected if expected[key] < 5]
    kinds = [[key] for key in expected if expected[key] >= 5] + ([rare] if rare else [])
    cells = [(sum(counts[key] for key in kind), sum(expected[key] for key in kind)) for kind in kinds]
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    freedom = len(cells) - round(sum(probabilities.values()))  # they sum to 1 for each independent draw
    assert chi2.sf(statistic, freedom) > 1e-4, f"χ² = {statistic:.0f} with {freedom} degrees of freedom"


def draw(method: str, batch: torch.Tensor, **params: Any) -> torch.Tensor:
    """`(DRAWS, T, …)` tuples."""
    seed_everything(0)
    sampler = Sampler(method, **params)
    return torch.stack([sampler.give(batch, LABELS[: len(batch)]) for _ in range(DRAWS)])


@pytest.mark.parametrize(
    ("oracle", "batch", "params"),
    [
        pytest.param(random_probabilities, unit_batch(4), {}, id="random"),
        pytest.param(random_probabilities, unit_batch(4, size=7), {}, id="random, few"),
        pytest.param(semihard_probabilities, unit_batch(4), {}, id="semihard"),
        pytest.param(semihard_probabilities, unit_batch(4), {"margin": 0.5, "squared": True}, id="semihard squared"),
        pytest.param(semihard_probabilities, unit_batch(4), {"margin": 0.0}, id="semihard, none between"),
        pytest.param(softhard_probabilities, unit_batch(4), {}, id="softhard"),
        pytest.param(softhard_probabilities, LINE, {}, id="softhard on a line"),
        pytest.param(distance_probabilities, unit_batch(4), {}, id="distance"),
        pytest.param(
            distance_probabilities, unit_batch(4), {"lower_cutoff": 1.2, "upper_cutoff": 1.4}, id="distance, cutoffs"
        ),
        pytest.param(distance_probabilities, unit_batch(4), {"upper_cutoff": 0.01}, id="distance, all beyond"),
        pytest.param(distance_probabilities, unit_batch(128), {}, id="distance, D = 128"),
        pytest.param(distance_probabilities, 10 * random_batch(dim=4), {}, id="distance, not normalized"),
        pytest.param(distance_probabilities, signed_axes(4), {}, id="distance, d = 2, D = 4"),
        pytest.param(distance_probabilities, signed_axes(3), {"upper_cutoff": 1.4}, id="distance, d = 2, D = 3"),
        pytest.param(distance_probabilities, signed_axes(2), {}, id="distance, d = 2, D = 2"),
        pytest.param(distance_probabilities, unit_batch(2), {}, id="distance, D = 2"),
        pytest.param(distance_probabilities, random_batch(dim=1), {}, id="distance, D = 1"),
    ],
)
def test_tuples_come_with_the_probabilities_of_a_naive_loop(
    oracle: Callable[..., Probabilities], batch: torch.Tensor, params: dict[str, Any]
) -> None:
    method = oracle.__name__.removesuffix("_probabilities")
    given = draw(method, batch, **params)
    labels = LABELS[: len(batch)].tolist()
    rows = len(batch) if method == "random" else len(list(each_anchor(labels)))
    assert given.shape == (DRAWS, rows, 3)
    assert given.dtype == torch.int64
    probabilities = oracle(batch.double().tolist(), labels, **params)
    assert_frequencies(given.flatten(0, 1), probabilities, DRAWS * (rows if method == "random" else 1))


def test_npair_tuples_are_a_pair_of_each_class_and_the_other_positives() -> None:
    given = draw("npair", random_batch())
    assert given.shape == (DRAWS, 4, 1 + 1 + 3)
    positives = given[:, :, 1].sort(dim=1).values[:, None]
    assert (given[:, :, 1:].sort(dim=2).values == positives).all()
    by_label = LABELS[given[:, :, 2:]].argsort(dim=2)
    ordered = torch.cat([given[:, :, :2], given[:, :, 2:].gather(2, by_label)], dim=2)
    for label in range(4):
        tuples = ordered[LABELS[given[:, :, 0]] == label]
        assert len(tuples) == DRAWS
        assert_frequencies(tuples, npair_probabilities(LABELS.tolist(), label), DRAWS)


METHODS = sorted(Sampler().methods)
EMBEDDINGS: dict[str, Callable[[int], torch.Tensor]] = {
    "all the same": lambda size: torch.ones(size, 4) / 2,
    "zeros": lambda size: torch.zeros(size, 4),
    "antipodes": lambda size: torch.eye(8)[0] * (-1.0) ** torch.arange(size)[:, None],
    "one dimension": lambda size: random_batch(size, 1),
    "two dimensions": lambda size: unit_batch(2, size),
    "512 dimensions": lambda size: unit_batch(512, size),
    "large": lambda size: random_batch(size, 4) * 1e6,
    "beyond float32": lambda size: random_batch(size, 4) * 1e30,
    "not a number": lambda size: torch.full((size, 4), torch.nan),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("embeddings", EMBEDDINGS)
@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        torch.tensor([1, 0, 1, 0, 1]),  # one other class in reach
        torch.arange(14).repeat(4)[torch.randperm(56, generator=torch.Generator().manual_seed(0))] * 10**12 - 5,
    ],
    ids=["uneven", "two classes", "56 images"],
)
def test_tuples_are_always_valid(method: str, embeddings: str, labels: torch.Tensor) -> None:
    seed_everything(0)
    batch = EMBEDDINGS[embeddings](len(labels))
    for cutoff, positives_per_anchor in product((None, 0.1, 1.4), ("1", "all")):
        sampler = Sampler(method, upper_cutoff=cutoff, positives_per_anchor=positives_per_anchor)
        tuples = sampler.give(batch, labels)
        anchors, positives, negatives = tuples[:, 0], tuples[:, 1], tuples[:, 2:]
        assert (anchors != positives).all()
        assert (labels[anchors] == labels[positives]).all()
        assert (labels[anchors, None] != labels[negatives]).all()
        assert not tuples.requires_grad


@pytest.mark.parametrize(
    ("method", "labels"),
    [*product(METHODS, [[], [4], [4, 4, 4], [0, 1, 2]]), ("npair", [0, 0, 1, 2])],
)
def test_batches_without_tuples_are_refused(method: str, labels: list[int]) -> None:
    with pytest.raises(UserError, match=r"raise --samples_per_class or --bs"):
        Sampler(method).give(random_batch(len(labels)), torch.tensor(labels, dtype=torch.int64))


class FixedSampler(Sampler):
    """A user's own sampling method, which returns the same plain list for every batch."""

    def __init__(self, tuples: Sequence[tuple[int, ...]], **params: Any):
        super().__init__(**params)
        self.methods["fixed"] = self.fixed_sampling
        self.method = "fixed"
        self.fixed = list(tuples)
        self.received: dict[str, Any] = {}

    def fixed_sampling(self, batch: torch.Tensor, labels: torch.Tensor, **params: Any) -> list[tuple[int, ...]]:
        self.received = params
        return self.fixed


def test_own_method_gives_plain_lists_and_later_parameters_take_precedence() -> None:
    sampler = FixedSampler(TRIPLETS, margin=5.0, temperature=2)
    tuples = sampler.give(random_batch(), LABELS, margin=7.0)
    assert tuples.dtype == torch.int64
    assert list(map(tuple, tuples.tolist())) == TRIPLETS
    assert sampler.received == {"margin": 7.0, "temperature": 2}
    build("triplet", sampler, margin=0.3)(random_batch(), LABELS)
    assert sampler.received == {"margin": 0.3, "temperature": 2, "squared": True}
    build("marginloss", sampler, margin=0.4)(random_batch(), LABELS)
    assert sampler.received == {"margin": 0.4, "temperature": 2}
    with pytest.raises(UserError, match="gave no tuples"):
        FixedSampler([]).give(random_batch(), LABELS)


def test_parameters_of_give_replace_those_of_the_constructor_in_effect() -> None:
    line, labels = torch.tensor([[0.0], [0.1], [1.0], [2.0]]), torch.tensor([0, 0, 1, 2])
    sampler = Sampler("distance", upper_cutoff=1.5)
    assert (sampler.give(line, labels)[:, 2] == 2).all()
    far = torch.cat([sampler.give(line, labels, upper_cutoff=5.0) for _ in range(50)])[:, 2]
    assert set(far.tolist()) == {2, 3}


def naive_triplet(criterion: Any, batch: torch.Tensor, labels: list[int], margin: float = 0.2) -> torch.Tensor:
    terms = []
    for a, p, n in TRIPLETS:
        violation = (batch[a] - batch[p]).pow(2).sum() - (batch[a] - batch[n]).pow(2).sum() + margin
        terms.append(violation if violation > 0 else violation * 0)
    return torch.stack(terms).mean()


def naive_margin(
    criterion: Any,
    batch: torch.Tensor,
    labels: list[int],
    margin: float = 0.2,
    beta: float = 1.2,
    beta_constant: bool = False,
    nu: float = 0.0,
) -> torch.Tensor:
    total, count = batch.sum() * 0, 0
    for a, p, n in TRIPLETS:
        boundary = beta if beta_constant else criterion.beta[labels[a]]
        to_positive, to_negative = ((batch[a] - batch[other]).pow(2).sum().sqrt() for other in (p, n))
        for term in (to_positive - boundary + margin, boundary - to_negative + margin):
            if term > 0:
                total, count = total + term, count + 1
        total = total + nu * boundary
    return total / max(1, count)


def naive_npair(criterion: Any, batch: torch.Tensor, labels: list[int], l2npair: float = 0.02) -> torch.Tensor:
    terms = []
    for a, p, *negatives in NPAIRS:
        exps = [torch.exp(batch[a] @ batch[n] - batch[a] @ batch[p]) for n in negatives]
        terms.append(torch.log(1 + torch.stack(exps).sum()) + l2npair * (batch[a].pow(2).sum() + batch[p].pow(2).sum()))
    return torch.stack(terms).mean()


def naive_proxynca(criterion: Any, batch: torch.Tensor, labels: list[int]) -> torch.Tensor:
    proxies = [3 * proxy / proxy.pow(2).sum().sqrt() for proxy in criterion.proxies]
    terms = []
    for x, label in zip(batch, labels):
        squared = [(3 * x / x.pow(2).sum().sqrt() - proxy).pow(2).sum() for proxy in proxies]
        others = [torch.exp(-squared[z]) for z in range(NUM_CLASSES) if z != label]
        terms.append(squared[label] + torch.log(torch.stack(others).sum()))
    return torch.stack(terms).mean()


def naive_crossentropy(criterion: Any, batch: torch.Tensor, labels: list[int]) -> torch.Tensor:
    weight, bias = criterion.classifier.weight, criterion.classifier.bias
    terms = []
    for x, label in zip(batch, labels):
        logits = torch.stack([weight[c] @ x + bias[c] for c in range(NUM_CLASSES)])
        terms.append(-torch.log(torch.exp(logits[label]) / torch.exp(logits).sum()))
    return torch.stack(terms).mean()


def naive_proxynca_plus_plus(
    criterion: Any, batch: torch.Tensor, labels: list[int], temperature: float = 1 / 9
) -> torch.Tensor:
    proxies = [proxy / proxy.pow(2).sum().sqrt() for proxy in criterion.proxies]
    terms = []
    for x, label in zip(batch, labels):
        exps = [torch.exp(-(x / x.pow(2).sum().sqrt() - proxy).pow(2).sum() / temperature) for proxy in proxies]
        terms.append(-torch.log(exps[label] / torch.stack(exps).sum()))
    return torch.stack(terms).mean()


def mean_above_zero(terms: list[torch.Tensor]) -> torch.Tensor:
    above = [term for term in terms if term > 0]
    return torch.stack(above).mean() if above else terms[0] * 0


def naive_contrastive(
    criterion: Any, batch: torch.Tensor, labels: list[int], pos_margin: float = 0.0, neg_margin: float = 0.5
) -> torch.Tensor:
    if criterion.sampler:
        positives, negatives = [(a, p) for a, p, _ in TRIPLETS], [(a, n) for a, _, n in TRIPLETS]
    else:
        pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if i != j]
        positives = [(i, j) for i, j in pairs if labels[i] == labels[j]]
        negatives = [(i, j) for i, j in pairs if labels[i] != labels[j]]
    too_far = [(batch[i] - batch[j]).pow(2).sum().sqrt() - pos_margin for i, j in positives]
    too_near = [neg_margin - (batch[i] - batch[j]).pow(2).sum().sqrt() for i, j in negatives]
    return mean_above_zero(too_far) + mean_above_zero(too_near)


def each_query(batch: torch.Tensor, labels: list[int]) -> Iterator[tuple[list[torch.Tensor], list[int], list[int]]]:
    """Each query that has a positive: its cosine similarities to all, its positives, and all others but itself."""
    points = [x / x.pow(2).sum().sqrt() for x in batch]
    for q in range(len(labels)):
        others = [i for i in range(len(labels)) if i != q]
        positives = [i for i in others if labels[i] == labels[q]]
        if positives:
            yield [points[q] @ point for point in points], positives, others


def naive_smoothap(criterion: Any, batch: torch.Tensor, labels: list[int], temperature: float = 0.01) -> torch.Tensor:
    precisions = []
    for s, positives, others in each_query(batch, labels):
        terms = []
        for i in positives:
            ahead = {j: torch.sigmoid((s[j] - s[i]) / temperature) for j in others if j != i}
            among_positives = sum(value for j, value in ahead.items() if j in positives)
            terms.append((1 + among_positives) / (1 + torch.stack(list(ahead.values())).sum()))
        precisions.append(torch.stack(terms).mean())
    return 1 - torch.stack(precisions).mean()


def naive_recallatk(
    criterion: Any,
    batch: torch.Tensor,
    labels: list[int],
    k_values: Sequence[int] = (1, 2, 4, 8, 16),
    count_temperature: float = 1.0,
    rank_temperature: float = 0.01,
) -> torch.Tensor:
    recalls = []
    for s, positives, others in each_query(batch, labels):
        ranks = []
        for x in positives:
            ahead = [torch.sigmoid((s[z] - s[x]) / rank_temperature) for z in others if z != x]
            ranks.append(1 + torch.stack(ahead).sum())
        for k in k_values:
            found = torch.stack([torch.sigmoid((k - rank) / count_temperature) for rank in ranks]).sum()
            recalls.append((found if found < k else 0 * found + k) / min(k, len(positives)))
    return 1 - torch.stack(recalls).mean()


def naive_supap(
    criterion: Any, batch: torch.Tensor, labels: list[int], slope: float = 100.0, calibration_weight: float = 1.0
) -> torch.Tensor:
    precisions, too_far, too_near = [], [], []
    for s, positives, others in each_query(batch, labels):
        terms = []
        for i in positives:
            among_positives = 1 + sum(float(s[j] >= s[i]) for j in positives if j != i)
            ahead = among_positives + 0 * s[i]
            for j in set(others) - set(positives):
                x = s[j] - s[i]
                if x <= 0:
                    ahead = ahead + torch.sigmoid(x / 0.01)
                elif x <= 0.05:
                    ahead = ahead + 0.5 + torch.sigmoid(x / 0.01)
                else:
                    ahead = ahead + slope * (x - 0.05) + 1.44
            terms.append(among_positives / ahead)
        precisions.append(torch.stack(terms).mean())
    points = [x / x.pow(2).sum().sqrt() for x in batch]
    for i, j in permutations(range(len(labels)), 2):
        s = points[i] @ points[j]
        too_far += [0.9 - s] if labels[i] == labels[j] else []
        too_near += [s - 0.6] if labels[i] != labels[j] else []
    calibration = mean_above_zero(too_far) + mean_above_zero(too_near)
    return 1 - torch.stack(precisions).mean() + calibration_weight * calibration


NAIVE: dict[str, Callable[..., torch.Tensor]] = {
    "proxynca++": naive_proxynca_plus_plus,
    "contrastive": naive_contrastive,
    "smoothap": naive_smoothap,
    "recallatk": naive_recallatk,
    "supap": naive_supap,
    "triplet": naive_triplet,
    "marginloss": naive_margin,
    "npair": naive_npair,
    "proxynca": naive_proxynca,
    "crossentropy": naive_crossentropy,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("triplet", {}),
    ("triplet", {"margin": 2.0}),
    ("marginloss", {}),
    ("marginloss", {"margin": 0.5, "beta": 1.7, "nu": 0.3}),
    ("marginloss", {"beta_constant": True}),
    ("marginloss", {"beta_constant": True, "beta": 0.8, "nu": 0.3}),
    ("npair", {}),
    ("npair", {"l2npair": 0.3}),
    ("proxynca", {}),
    ("crossentropy", {}),
    ("proxynca++", {}),
    ("proxynca++", {"temperature": 0.7}),
    ("contrastive", {}),
    ("contrastive", {"pos_margin": 0.4, "neg_margin": 1.3}),
    ("smoothap", {}),
    ("smoothap", {"temperature": 0.1}),
    ("recallatk", {}),
    ("recallatk", {"k_values": (1, 3), "count_temperature": 0.5, "rank_temperature": 0.1}),
    ("supap", {}),
    ("supap", {"slope": 10.0, "calibration_weight": 0.3}),
]
WHOLE_BATCH = [
    ("contrastive", {"neg_margin": 1.3}),
    ("smoothap", {"temperature": 0.1}),
    ("recallatk", {}),
    ("supap", {}),
]


def fixed_criterion(loss: str, **keywords: Any) -> Criterion:
    """Builds the loss in float64 with the fixed tuples and, where they are learned, parameters that differ by class."""
    seed_everything(1)
    criterion = build(loss, FixedSampler(NPAIRS if loss == "npair" else TRIPLETS), **keywords).double()
    with torch.no_grad():
        for parameter in trainable(criterion):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return criterion


def trainable(criterion: Criterion) -> list[torch.nn.Parameter]:
    return [parameter for parameter in criterion.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("loss", "keywords"), CASES)
def test_value_and_gradients_are_those_of_a_naive_loop(loss: str, keywords: dict[str, Any]) -> None:
    criterion = fixed_criterion(loss, **keywords)
    batch = (0.6 * random_batch(dtype=torch.float64)).requires_grad_()
    inputs = (batch, *trainable(criterion))
    value, naive = criterion(batch, LABELS), NAIVE[loss](criterion, batch, LABELS.tolist(), **keywords)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(naive, inputs))
    assert torch.autograd.gradcheck(lambda *_: criterion(batch, LABELS), inputs)


def whole_batch(loss: str, **keywords: Any) -> Criterion:
    """A loss without parameters or sampler, which takes all pairs of the batch."""
    return LOSSES[loss](**keywords)


@pytest.mark.parametrize(("loss", "keywords"), WHOLE_BATCH)
def test_losses_of_all_pairs_are_those_of_a_naive_loop_in_any_order(loss: str, keywords: dict[str, Any]) -> None:
    criterion, order = whole_batch(loss, **keywords), torch.randperm(len(LABELS))
    batch = unit_batch(DIM).double().requires_grad_()
    value = criterion(batch, LABELS)
    naive = NAIVE[loss](criterion, batch, LABELS.tolist(), **keywords)
    torch.testing.assert_close(value, naive)
    torch.testing.assert_close(torch.autograd.grad(value, batch), torch.autograd.grad(naive, batch))
    torch.testing.assert_close(criterion(batch[order], LABELS[order]), value)


@pytest.mark.parametrize(("loss", "keywords"), WHOLE_BATCH)
def test_losses_of_all_pairs_in_parts_equal_those_at_once(
    loss: str, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for elements in (1 << 22, 3 * len(LABELS)):
        monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", elements)
        batch = unit_batch(DIM).requires_grad_()
        value = whole_batch(loss, **keywords)(batch, LABELS)
        results.append((value, *torch.autograd.grad(value, batch)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "build", [losses.TripletLoss, partial(losses.MarginLoss, num_classes=8), losses.ContrastiveLoss]
)
def test_losses_of_tuples_in_parts_equal_those_at_once(
    build: Callable[[Sampler], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for elements in (1 << 22, 4 * DIM):
        monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", elements)
        seed_everything(0)
        batch = unit_batch(DIM).double().requires_grad_()
        criterion = build(Sampler("random")).double()
        value = criterion(batch, LABELS)
        learned = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
        results.append((value, *torch.autograd.grad(value, [batch, *learned])))
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("loss", "keywords"), WHOLE_BATCH)
@pytest.mark.parametrize("batch", [torch.ones(12, DIM), torch.zeros(12, DIM)], ids=["the same", "zeros"])
def test_gradients_of_all_pairs_of_duplicates_are_finite(
    loss: str, keywords: dict[str, Any], batch: torch.Tensor
) -> None:
    batch = batch.clone().requires_grad_()
    value = whole_batch(loss, **keywords)(batch, LABELS)
    value.backward()
    assert batch.grad is not None
    assert value.isfinite()
    assert batch.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["smoothap", "recallatk", "supap"])
def test_ranking_needs_two_images_of_one_class(loss: str) -> None:
    with pytest.raises(
        UserError, match="a batch of 3 images has no two images of one class: raise --samples_per_class"
    ):
        whole_batch(loss)(random_batch(3), torch.arange(3))
    perfect = torch.eye(DIM)[torch.tensor([0, 0, 0, 1, 1, 2])]
    value = whole_batch(loss)(perfect, torch.tensor([0, 0, 0, 1, 1, 2]))
    assert value.item() == pytest.approx(NAIVE[loss](None, perfect, [0, 0, 0, 1, 1, 2]).item(), abs=1e-6)


def test_recall_at_k_leaves_the_query_out_of_ranks() -> None:
    """The authors' code, which leaves it in, gives 0.3819."""
    labels = torch.arange(6).repeat_interleave(4)
    noise = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    nearly_perfect = torch.eye(6)[labels] + 1e-4 * noise
    value = whole_batch("recallatk", k_values=(1, 2, 4))(nearly_perfect, labels)
    assert value.item() == pytest.approx(0.1874, abs=1e-4)
    with pytest.raises(UserError, match="k_values takes a list of integers above 0"):
        whole_batch("recallatk", k_values=(1, 0))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("loss", ["contrastive", "smoothap", "recallatk", "supap"])
def test_losses_of_all_pairs_make_no_cubic_tensor(loss: str) -> None:
    labels = torch.arange(512) // 8
    batch = torch.nn.functional.normalize(random_batch(512, 512), dim=1).requires_grad_()
    with LargestTensor() as largest:
        whole_batch(loss)(batch, labels).backward()
    assert largest.elements <= losses.ELEMENTS_AT_ONCE


def test_margin_loss_counts_hinge_terms_not_tuples() -> None:
    line = torch.tensor([[0.0], [2.0], [1.0], [5.0]])
    labels = torch.tensor([0, 0, 1, 1])

    def loss(*triplets: tuple[int, ...], nu: float = 0.0) -> float:
        return build("marginloss", FixedSampler(triplets), nu=nu)(line, labels).item()

    assert loss((0, 1, 2)) == pytest.approx((1.0 + 0.4) / 2)  # both terms above zero
    assert loss((0, 1, 2), (0, 1, 3)) == pytest.approx((1.0 + 0.4 + 1.0) / 3)
    assert loss((0, 1, 2), (0, 1, 3), nu=0.5) == pytest.approx((2.4 + 0.5 * 2 * 1.2) / 3)
    line[1] = 0.0
    assert loss((0, 1, 3)) == 0.0  # no term above zero
    assert loss((0, 1, 3), nu=0.5) == pytest.approx(0.5 * 1.2)


def test_constant_beta_is_one_that_is_not_learned_and_nu_pulls_learned_ones_down() -> None:
    constant = build("marginloss", beta_constant=True, beta=0.7)
    assert trainable(constant) == []
    assert [parameter.tolist() for parameter in constant.parameters()] == [pytest.approx([0.7])]
    batch = random_batch()
    gradients = []
    for nu in (0.0, 0.5):
        criterion: Any = build("marginloss", FixedSampler(TRIPLETS), nu=nu)
        assert criterion.beta.shape == (NUM_CLASSES,)
        criterion(batch, LABELS).backward()
        gradients.append(criterion.beta.grad)
    pull = gradients[1] - gradients[0]
    anchors = LABELS[[a for a, _, _ in TRIPLETS]].bincount(minlength=NUM_CLASSES)
    torch.testing.assert_close(pull / pull.sum(), anchors / anchors.sum())
    assert (pull[anchors > 0] > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_exact_duplicates_are_finite(loss: str) -> None:
    criterion = build(loss, FixedSampler(NPAIRS if loss == "npair" else TRIPLETS))
    batch = random_batch(1).repeat(len(LABELS), 1).requires_grad_()
    value = criterion(batch, LABELS)
    value.backward()
    assert batch.grad is not None
    assert value.isfinite()
    assert batch.grad.isfinite().all()
    if loss in ("triplet", "marginloss"):
        assert (batch.grad == 0).all()


def test_npair_does_not_overflow() -> None:
    criterion = build("npair", FixedSampler(NPAIRS), l2npair=0.0)
    batch = (1000 * random_batch()).requires_grad_()
    value = criterion(batch, LABELS)
    value.backward()
    gaps = [max((batch[a] @ (batch[n] - batch[p])).item() for n in negatives) for a, p, *negatives in NPAIRS]
    assert value.item() == pytest.approx(sum(max(0.0, gap) for gap in gaps) / len(gaps), rel=1e-4)
    assert batch.grad is not None
    assert batch.grad.isfinite().all()


def library_margin(criterion: Any, margin: float, nu: float) -> torch.nn.Module:
    """Their margin loss with our β."""
    plain = LpDistance(normalize_embeddings=False)
    theirs = pml_losses.MarginLoss(margin, nu, learn_beta=True, num_classes=NUM_CLASSES, distance=plain)
    theirs.beta = torch.nn.Parameter(criterion.beta.detach().clone())
    return theirs


def library_triplet(criterion: Any, margin: float) -> torch.nn.Module:
    squared = LpDistance(power=2, normalize_embeddings=False)
    return pml_losses.TripletMarginLoss(margin=margin, distance=squared, reducer=MeanReducer())


def library_contrastive(criterion: Any, neg_margin: float) -> torch.nn.Module:
    return pml_losses.ContrastiveLoss(neg_margin=neg_margin, distance=LpDistance(normalize_embeddings=False))


def library_npair(criterion: Any, l2npair: float) -> torch.nn.Module:
    return pml_losses.NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))


@pytest.mark.parametrize(
    ("loss", "library", "keywords"),
    [
        ("triplet", library_triplet, {"margin": 0.7}),
        ("contrastive", library_contrastive, {"neg_margin": 1.3}),
        ("marginloss", library_margin, {"margin": 0.3, "nu": 0.2}),
        ("npair", library_npair, {"l2npair": 0.0}),
    ],
)
def test_losses_agree_with_the_library(
    loss: str, library: Callable[..., torch.nn.Module], keywords: dict[str, Any]
) -> None:
    criterion = fixed_criterion(loss, **keywords)
    batch = (0.6 * random_batch(dtype=torch.float64)).requires_grad_()
    theirs = library(criterion, **keywords)
    anchors, positives, negatives, *_ = torch.tensor(NPAIRS if loss == "npair" else TRIPLETS).T
    value, expected = criterion(batch, LABELS), theirs(batch, LABELS, (anchors, positives, negatives))
    torch.testing.assert_close(value, expected)
    ours = torch.autograd.grad(value, (batch, *trainable(criterion)))
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (batch, *theirs.parameters())))


def test_proxynca_agrees_with_the_library_whose_sum_has_the_positive_too() -> None:
    criterion: Any = fixed_criterion("proxynca")
    theirs = pml_losses.ProxyNCALoss(NUM_CLASSES, DIM, softmax_scale=9)  # length 3: squared distances nine-fold
    theirs.proxies.data = criterion.proxies.detach()
    for x, label in zip(random_batch(dtype=torch.float64)[:, None], LABELS[:, None]):
        torch.testing.assert_close(torch.nn.functional.softplus(criterion(x, label)), theirs(x, label))


def test_proxynca_plus_plus_is_what_the_library_calls_proxynca() -> None:
    criterion: Any = fixed_criterion("proxynca++")
    theirs = pml_losses.ProxyNCALoss(NUM_CLASSES, DIM, softmax_scale=9)
    theirs.proxies.data = criterion.proxies.detach()
    batch = random_batch(dtype=torch.float64)
    torch.testing.assert_close(criterion(batch, LABELS), theirs(batch, LABELS))


def smoothap_with_queries(batch: torch.Tensor, labels: list[int], temperature: float = 0.01) -> float:
    """Smooth AP as the library means it: the query is one of its own positives."""
    points, precisions = torch.nn.functional.normalize(batch, dim=1), []
    for q in range(len(labels)):
        s = (points @ points[q]).tolist()
        for i in (i for i in range(len(labels)) if labels[i] == labels[q]):
            ahead = [1 / (1 + math.exp((s[i] - s[j]) / temperature)) if j != i else 0.0 for j in range(len(labels))]
            among_positives = sum(value for value, label in zip(ahead, labels) if label == labels[q])
            precisions.append((1 + among_positives) / (1 + sum(ahead)))
    return 1 - sum(precisions) / len(precisions)  # classes are of the same size


@pytest.mark.parametrize(("num_classes", "per_class", "is_right"), [(4, 4, True), (8, 4, False), (4, 8, False)])
def test_the_librarys_smoothap_is_wrong_unless_there_are_as_many_classes_as_images_of_each(
    num_classes: int, per_class: int, is_right: bool
) -> None:
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    batch = random_batch(len(labels), 16, dtype=torch.float64)
    theirs = pml_losses.SmoothAPLoss()(batch, labels).item()
    assert (abs(theirs - smoothap_with_queries(batch, labels.tolist())) < 1e-6) == is_right


def test_distance_probabilities_are_the_weights_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def return_weights(*_: Any, weights: torch.Tensor, **__: Any) -> torch.Tensor:
        return weights

    monkeypatch.setattr(distance_weighted_miner.lmu, "get_random_triplet_indices", return_weights)
    batch = unit_batch(4).double()
    weights = DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4).mine(batch, LABELS, batch, LABELS)
    expected = torch.zeros_like(weights)
    ours = distance_probabilities(batch.tolist(), LABELS.tolist(), lower_cutoff=0.5, upper_cutoff=1.4)
    for (a, _, n), probability in ours.items():
        expected[a, n] += probability
    paired = expected.sum(dim=1) > 0  # theirs has weights for anchors without a positive too
    torch.testing.assert_close(weights[paired], expected[paired])
    assert paired.sum() == 11


class NoCopiesToHost(TorchDispatchMode):
    """Raises where a tensor on the device is copied to the host, which fake tensors allow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(result, torch.Tensor) and not result.is_cuda and any(tensor.is_cuda for tensor in tensors):
            raise RuntimeError(f"{func} copies to the host")
        return result


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Makes new tensors fake ones on CUDA; those made before are real and on the host."""
    real_numpy = torch.Tensor.numpy

    def numpy(tensor: torch.Tensor) -> Any:
        with fake_tensor.unset_fake_temporarily():  # in the mode a real tensor's numpy() reads unset memory
            return real_numpy(tensor)

    with pytest.MonkeyPatch.context() as patch, fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.Tensor, "numpy", numpy)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # the same everywhere: fake tensors can't be pinned
        with torch.device("cuda"), NoCopiesToHost():
            yield


def walk_backward(loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    """Computes each leaf's gradient node by node: `backward()` itself needs a CUDA driver."""
    pending: dict[Any, torch.Tensor] = {loss.grad_fn: torch.ones_like(loss)}
    gradients: dict[torch.Tensor, torch.Tensor] = {}
    while pending:
        node = max(pending, key=lambda node: node._sequence_nr())  # the latest: nothing else can still add to it
        results = node(pending.pop(node))
        for (following, position), result in zip(
            node.next_functions, results if isinstance(results, tuple) else [results]
        ):
            if following is None:
                continue
            if hasattr(following, "variable"):
                leaf = following.variable
                gradients[leaf] = gradients.get(leaf, 0) + result.sum_to_size(leaf.shape)
            else:  # what was broadcast is summed by the engine, not by the node
                result = result.sum_to_size(following._input_metadata[position].shape)
                pending[following] = pending.get(following, 0) + result
    return gradients


@needs_fake_cuda
@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda batch: batch.sum().item(), fake_tensor.DataDependentOutputException),
        (lambda batch: bool((batch > 0).any()), fake_tensor.DataDependentOutputException),
        (lambda batch: batch.nonzero(), fake_tensor.DynamicOutputShapeException),
        (lambda batch: batch[batch > 0], fake_tensor.DynamicOutputShapeException),
        (lambda batch: batch.cpu(), RuntimeError),
        (lambda batch: torch.zeros(4, 4, device="cpu").copy_(batch), RuntimeError),
        (lambda batch: batch.numpy(), (RuntimeError, TypeError)),
    ],
)
def test_waiting_for_a_fake_tensor_raises(wait: Callable[[torch.Tensor], Any], error: Any) -> None:
    with fake_cuda():
        batch = torch.randn(4, 4)
        assert batch.is_cuda
        with pytest.raises(error):
            wait(batch)


@needs_fake_cuda
@pytest.mark.parametrize("params", [{}, {"upper_cutoff": 1.4, "squared": True}])
@pytest.mark.parametrize("method", METHODS)
def test_samplers_do_not_wait(method: str, params: dict[str, Any]) -> None:
    labels = LABELS.clone()
    with fake_cuda():
        tuples = Sampler(method, **params).give(torch.randn(len(labels), DIM), labels)
        assert tuples.is_cuda
        assert tuples.shape == ((4, 5) if method == "npair" else (12 if method == "random" else 11, 3))


@needs_fake_cuda
@pytest.mark.parametrize(("loss", "keywords"), CASES)
def test_losses_do_not_wait(loss: str, keywords: dict[str, Any]) -> None:
    def gradients() -> tuple[Criterion, torch.Tensor, torch.Tensor, dict[torch.Tensor, torch.Tensor]]:
        seed_everything(0)
        criterion = build(loss, default_sampler(loss), **keywords)
        batch = torch.randn(len(LABELS), DIM, requires_grad=True)
        value = criterion(batch, labels)
        return criterion, batch, value, walk_backward(value)

    labels = LABELS.clone()
    criterion, batch, value, walked = gradients()
    value.backward()
    for leaf in (batch, *trainable(criterion)):
        torch.testing.assert_close(leaf.grad, walked[leaf])  # the walk does what backward() does

    with fake_cuda():
        criterion, batch, value, walked = gradients()
        assert value.is_cuda
        for leaf in (batch, *trainable(criterion)):
            assert walked[leaf].is_cuda
            assert walked[leaf].shape == leaf.shape


def naive_statistics(criterion: Any, batch: torch.Tensor, labels: list[int]) -> dict[str, float]:
    """Computes the common part of `losses.statistics` tuple by tuple."""
    x = batch.tolist()
    values = {"Embedding Norm": sum(math.hypot(*row) for row in x) / len(x)}
    if getattr(criterion, "sampler", None):
        tuples = criterion.sampler.fixed
        hard_positives, hard_negatives, to_positive, to_negative = [], [], [], []
        for a, p, *negatives in tuples:
            distances = [math.dist(x[a], point) for point in x]
            nearest_negative = min(d for d, label in zip(distances, labels) if label != labels[a])
            farthest_positive = max(d for i, d in enumerate(distances) if labels[i] == labels[a] and i != a)
            hard_positives.append(distances[p] > nearest_negative)
            hard_negatives += [distances[n] < farthest_positive for n in negatives]
            to_positive.append(distances[p])
            to_negative += [distances[n] for n in negatives]
        values |= {"Tuples": len(tuples)}
        shares = {"Hard Positives": hard_positives, "Hard Negatives": hard_negatives}
        lists: dict[str, list[Any]] = {**shares, "d(a, p)": to_positive, "d(a, n)": to_negative}
        values |= {name: sum(entries) / len(entries) for name, entries in lists.items()}
    return values


def naive_violation(loss: str, criterion: Any, x: list[list[float]], labels: list[int], one: Sequence[int]) -> bool:
    a, p, *negatives = one
    to_positive, to_negative = math.dist(x[a], x[p]), min(math.dist(x[a], x[n]) for n in negatives)
    if loss == "triplet":
        return to_positive**2 + criterion.margin > to_negative**2
    if loss == "marginloss":
        beta = criterion.beta.tolist()[0 if criterion.beta_constant else labels[a]]
        return to_positive > beta - criterion.margin or to_negative < beta + criterion.margin
    similarity = [sum(u * v for u, v in zip(x[a], point)) for point in x]
    return any(similarity[n] > similarity[p] for n in negatives)


@pytest.mark.parametrize("scale", [0.3, 0.6, 2.0])
@pytest.mark.parametrize(("loss", "keywords"), CASES)
def test_statistics_are_those_of_a_naive_loop(loss: str, keywords: dict[str, Any], scale: float) -> None:
    criterion: Any = fixed_criterion(loss, **keywords)
    batch = scale * random_batch(dtype=torch.float64)
    criterion(batch, LABELS)
    expected = naive_statistics(criterion, batch, LABELS.tolist())
    if loss in ("triplet", "marginloss", "npair"):
        tuples = criterion.sampler.fixed
        found = [naive_violation(loss, criterion, batch.tolist(), LABELS.tolist(), one) for one in tuples]
        expected["Violations"] = sum(found) / len(found)
    if loss == "marginloss":
        expected["Mean Beta"] = criterion.beta.tolist()[0] if len(criterion.beta) == 1 else criterion.beta.mean().item()
    if loss == "supap":
        expected |= {f"Loss {name}": part.item() for name, part in criterion.parts.items()}
        weighted = criterion.parts["ranking"] + criterion.calibration_weight * criterion.parts["calibration"]
        torch.testing.assert_close(criterion(batch, LABELS), weighted)
    if loss.startswith("proxynca"):
        expected["Proxy Norm"] = sum(math.hypot(*row) for row in criterion.proxies.tolist()) / NUM_CLASSES
    statistics = losses.statistics(criterion, batch, LABELS)
    assert {name: value.item() for name, value in statistics.items()} == pytest.approx(expected, rel=1e-6)
    assert all(value.shape == () and not value.requires_grad for value in statistics.values())


def test_shares_of_hard_tuples_and_violations_are_neither_none_nor_all() -> None:
    """Otherwise the loops above would prove little."""
    shares: dict[str, set[float]] = {"Hard Positives": set(), "Hard Negatives": set(), "Violations": set()}
    for loss in ("triplet", "marginloss", "npair"):
        criterion = fixed_criterion(loss)
        batch = 0.6 * random_batch(dtype=torch.float64)
        criterion(batch, LABELS)
        for name, values in shares.items():
            values.add(losses.statistics(criterion, batch, LABELS)[name].item())
    assert all(any(0 < value < 1 for value in values) for values in shares.values()), shares


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_of_the_last_tuples(method: str) -> None:
    sampler = Sampler(method)
    batch = unit_batch(4)
    assert sampler.statistics(batch, LABELS) == {}  # no tuples yet
    for _ in range(2):
        tuples = sampler.give(batch, LABELS)
        values = sampler.statistics(batch, LABELS)
        assert values["Tuples"].item() == len(tuples)
        pairs = torch.linalg.norm(batch[tuples[:, 0]] - batch[tuples[:, 1]], dim=1)
        torch.testing.assert_close(values["d(a, p)"], pairs.mean())
    assert sampler.statistics(batch[:-1], LABELS[:-1]) == {}  # another batch than that of the tuples


def test_statistics_in_float32_of_a_large_batch_are_precise() -> None:
    """torch.cdist takes another path from 26 rows on."""
    batch, labels = unit_batch(64, 112), torch.arange(28).repeat_interleave(4)
    criterion = build("triplet", Sampler("semihard"))
    seed_everything(0)
    criterion(batch, labels)
    assert criterion.sampler is not None
    tuples = criterion.sampler.tuples
    assert isinstance(tuples, torch.Tensor)
    fixed = FixedSampler([tuple(one) for one in tuples.tolist()])
    expected = naive_statistics(build("triplet", fixed), batch.double(), labels.tolist())
    values = {name: value.item() for name, value in losses.statistics(criterion, batch, labels).items()}
    del values["Violations"]
    assert values == pytest.approx(expected, abs=0.005)


@needs_fake_cuda
@pytest.mark.parametrize(("loss", "keywords"), CASES)
def test_statistics_do_not_wait(loss: str, keywords: dict[str, Any]) -> None:
    labels = LABELS.clone()
    with fake_cuda():
        criterion = build(loss, default_sampler(loss), **keywords)
        batch = torch.randn(len(LABELS), DIM)
        criterion(batch, labels)
        statistics = losses.statistics(criterion, batch, labels)
        own = {"marginloss": 8, "triplet": 7, "npair": 7, "contrastive": 6, "proxynca": 2, "proxynca++": 2, "supap": 3}
        assert len(statistics) == own.get(loss, 1)
        assert all(value.is_cuda and value.shape == () for value in statistics.values())
        assert torch.stack(list(statistics.values())).is_cuda  # as the records do


def select(loss: str, *flags: str) -> tuple[Any, list[dict[str, Any]]]:
    opt = config.resolve(config.parse(["--loss", loss, "--embed_dim", str(DIM), *flags]))
    return losses.loss_select(loss, opt, [{"params": [], "lr": 1.0}], NUM_CLASSES)


@pytest.mark.parametrize(
    ("loss", "flags", "lr"),
    [
        ("marginloss", [], 5e-4),
        ("marginloss", ["--beta_lr", "0.3"], 0.3),
        ("marginloss", ["--beta_constant"], None),
        ("triplet", [], None),
        ("npair", [], None),
        ("proxynca", [], 1e-5),
        ("proxynca", ["--proxy_lr", "0.3", "--lr", "0.1"], 0.3),
        ("proxynca++", ["--lr", "0.1"], 10.0),
        ("proxynca++", ["--proxy_lr", "0.3", "--lr", "0.1"], 0.3),
        ("proxynca++", ["--loss_params", "proxy_lr=0.2"], 0.2),
        ("smoothap", [], None),
        ("crossentropy", ["--lr", "0.1"], 0.1),
    ],
)
def test_own_parameters_get_a_group_without_weight_decay(loss: str, flags: list[str], lr: float | None) -> None:
    criterion, groups = select(loss, *flags)
    assert groups[0] == {"params": [], "lr": 1.0}
    assert len(groups) == (1 if lr is None else 2)
    for group in groups[1:]:
        assert (group["lr"], group["weight_decay"]) == (lr, 0)
        assert list(map(id, group["params"])) == list(map(id, criterion.parameters()))


# How to read, from a loss, each of its keywords that a flag sets.
ARRIVED: dict[str, Callable[[Any], Any]] = {
    "margin": lambda criterion: criterion.margin,
    "beta": lambda criterion: criterion.beta[0].item(),
    "beta_lr": lambda criterion: criterion.lr,
    "beta_constant": lambda criterion: criterion.beta_constant,
    "nu": lambda criterion: criterion.nu,
    "l2npair": lambda criterion: criterion.l2npair,
    "proxy_lr": lambda criterion: criterion.lr,
    "lr": lambda criterion: criterion.lr,
}
SET_ELSEWHERE = ("sampler", "num_classes", "embed_dim")


KEYWORDS = [
    (loss, name) for loss in LOSSES for name in inspect.signature(LOSSES[loss]).parameters if name not in SET_ELSEWHERE
]


@pytest.mark.parametrize(("loss", "keyword"), [(loss, name) for loss, name in KEYWORDS if name in ARRIVED])
def test_a_keyword_of_a_loss_with_the_name_of_a_flag_is_set_by_it(loss: str, keyword: str) -> None:
    default = inspect.signature(LOSSES[loss]).parameters[keyword].default
    given, arriving = ([], True) if default is False else (["0.625"], 0.625)
    assert ARRIVED[keyword](select(loss)[0]) == pytest.approx(default)
    assert ARRIVED[keyword](select(loss, f"--{keyword}", *given)[0]) == arriving


@pytest.mark.parametrize(("loss", "keyword"), KEYWORDS)
def test_every_keyword_of_a_loss_is_set_by_loss_params(loss: str, keyword: str) -> None:
    default = inspect.signature(LOSSES[loss]).parameters[keyword].default
    given, arriving = {bool: ("true", True), tuple: ("[3, 5]", (3, 5))}.get(type(default), ("0.625", 0.625))
    read = ARRIVED.get(keyword, lambda criterion: getattr(criterion, keyword))
    criterion = select(loss, "--loss_params", f"{keyword}={given}")[0]
    assert read(criterion) == arriving
    assert read(select(loss, "--loss_params", f"{loss}.{keyword}={given}")[0]) == arriving


def test_every_keyword_of_a_sampling_method_has_a_flag() -> None:
    flags = ("--lower_cutoff", "0.7", "--upper_cutoff", "1.3", "--positives_per_anchor", "all", "--rho", "0.3")
    sampler = select("marginloss", "--sampling", "distance", *flags)[0].sampler
    expected = {"margin": 0.2, "lower_cutoff": 0.7, "upper_cutoff": 1.3, "positives_per_anchor": "all", "rho": 0.3}
    assert (sampler.method, sampler.params) == ("distance", expected)
    given_by_losses = {"batch", "labels", "margin", "squared", "_"}
    for method in sampler.methods.values():
        assert set(inspect.signature(method).parameters) <= given_by_losses | set(sampler.params)
    params = ("--sampling_params", "lower_cutoff=0.7", "rho=0.3", "upper_cutoff=1.3", "positives_per_anchor=all")
    assert select("marginloss", *params)[0].sampler.params == expected


@pytest.mark.parametrize(
    ("loss", "sampling", "chosen"),
    [
        ("marginloss", None, "distance"),
        ("triplet", None, "distance"),
        ("npair", None, "npair"),
        ("npair", "npair", "npair"),
        ("proxynca", None, None),
        ("crossentropy", None, None),
        ("marginloss", "semihard", "semihard"),
        ("triplet", "random", "random"),
    ],
)
def test_sampling_is_the_users_or_the_losss_own(loss: str, sampling: str | None, chosen: str | None) -> None:
    assert losses.choose_sampling(loss, sampling) == chosen


@pytest.mark.parametrize(
    ("loss", "sampling", "reason"),
    [
        ("proxynca", "distance", "uses no tuples: drop --sampling"),
        ("crossentropy", "npair", "uses no tuples: drop --sampling"),
        ("npair", "semihard", "takes n-pairs, but --sampling semihard gives triplets: use --sampling npair"),
        ("triplet", "npair", "takes triplets, but --sampling npair gives n-pairs: use --sampling distance"),
        ("marginloss", "npair", "takes triplets, but --sampling npair gives n-pairs: use --sampling distance"),
    ],
)
def test_sampling_that_the_loss_cannot_use_is_refused(loss: str, sampling: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        select(loss, "--sampling", sampling)


@pytest.mark.parametrize(
    ("loss", "method"),
    [(loss, None) for loss in ("proxynca", "proxynca++", "crossentropy", "smoothap", "recallatk", "supap")]
    + [("npair", "npair"), ("contrastive", None), ("contrastive", "distance")]
    + [(loss, method) for loss in ("triplet", "marginloss") for method in METHODS if method != "npair"],
)
def test_gradients_of_a_seed_are_bit_identical(loss: str, method: str | None) -> None:
    labels = torch.arange(28).repeat_interleave(4)  # 112 images, D = 512: parallel additions do differ at this size

    def gradients() -> list[torch.Tensor]:
        seed_everything(5)
        sampler = None if method is None else Sampler(method)
        keywords: dict[str, Any] = {"num_classes": 28, "embed_dim": 512, "sampler": sampler}
        asked = inspect.signature(LOSSES[loss]).parameters
        criterion = LOSSES[loss](**{name: keywords[name] for name in keywords if name in asked})
        batch = torch.nn.functional.normalize(torch.randn(112, 512), dim=1).requires_grad_()
        return list(torch.autograd.grad(criterion(batch, labels), (batch, *criterion.parameters())))

    torch.set_num_threads(2)
    first = gradients()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, gradients()))


# Losses written for the pipeline that this one follows, pasted in unchanged: plain modules that know no `Criterion`.


class PastedTripletLoss(torch.nn.Module):
    def __init__(self, margin: float = 1.0, sampling_method: Any = "random"):
        super().__init__()
        self.margin = margin
        self.sampler = Sampler(method=sampling_method)

    def forward(self, batch: torch.Tensor, labels: Any) -> torch.Tensor:
        if isinstance(labels, torch.Tensor):
            labels = labels.detach().cpu().numpy()
        terms = []
        for triplet in self.sampler.give(batch, labels):
            anchor, positive, negative = batch[triplet[0], :], batch[triplet[1], :], batch[triplet[2], :]
            term = (anchor - positive).pow(2).sum() - (anchor - negative).pow(2).sum() + self.margin
            terms.append(torch.nn.functional.relu(term))
        return torch.mean(torch.stack(terms))


class PastedMarginLoss(torch.nn.Module):
    def __init__(self, n_classes: int, sampler: Any, margin: float = 0.5, nu: float = 0, beta: float = 3.0):
        super().__init__()
        self.margin, self.nu = margin, nu
        self.beta = torch.nn.Parameter(torch.ones(n_classes) * beta)
        self.sampler_instance = sampler

    def forward(self, batch: torch.Tensor, labels: Any) -> torch.Tensor:
        labels = labels.detach().cpu().numpy()
        positive_terms, negative_terms = [], []
        for triplet in self.sampler_instance.give(batch, labels):
            anchor, positive, negative = (batch[position] for position in triplet)
            beta = self.beta[labels[triplet[0]]]
            positive_terms.append((torch.linalg.norm(anchor - positive) - beta + self.margin).relu())
            negative_terms.append((beta - torch.linalg.norm(anchor - negative) + self.margin).relu())
        terms = torch.stack(positive_terms + negative_terms)
        return terms.sum() / max(1, int((terms > 0).sum()))


class PastedClassifier(torch.nn.Module):
    sampling = None
    samples_per_class = 1

    def __init__(self, num_classes: int, embed_dim: int, temperature: float = 0.5):
        super().__init__()
        self.mapping = torch.nn.Linear(embed_dim, num_classes)
        self.temperature = temperature

    def forward(self, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.mapping(batch) / self.temperature, labels)


def margin_row(opt: Any, to_optim: list[dict[str, Any]], num_classes: int) -> Any:
    criterion = PastedMarginLoss(num_classes, Sampler(opt.sampling), opt.margin, opt.nu, opt.beta)
    to_optim += [{"params": criterion.parameters(), "lr": opt.beta_lr, "weight_decay": 1e-3}]
    return criterion, to_optim


def new_list_row(num_classes: int, to_optim: list[dict[str, Any]], opt: Any) -> Any:
    criterion = PastedClassifier(num_classes, opt.embed_dim)
    return criterion, [*to_optim, {"params": [criterion.mapping.weight]}, {"params": [criterion.mapping.bias], "lr": 7}]


def appending_row(to_optim: list[dict[str, Any]]) -> torch.nn.Module:
    criterion = PastedClassifier(NUM_CLASSES, DIM)
    to_optim.append({"name": "map", "params": [criterion.mapping.weight], "lr": 0.5})
    return criterion


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PastedTripletLoss, []),
        (PastedMarginLoss, [("pasted", 0.25, 0.0, 1)]),
        (PastedClassifier, [("pasted", 0.25, 0.0, 2)]),
        (margin_row, [("pasted", 0.0625, 1e-3, 1)]),
        (new_list_row, [("pasted", 0.25, 0.0, 1), ("pasted 2", 7, 0.0, 1)]),
        (appending_row, [("map", 0.5, 0.0, 1)]),
        (lambda opt: PastedTripletLoss(opt.margin, opt.sampling), []),
        (lambda: PastedClassifier(NUM_CLASSES, DIM), [("pasted", 0.25, 0.0, 2)]),
    ],
    ids=["triplet", "margin", "classifier", "margin row", "new list", "appending", "opt only", "no keywords"],
)
def test_a_pasted_loss_learns(row: Any, expected: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "pasted", row)
    batch = unit_batch(DIM).requires_grad_()
    opt = loss_flags("pasted", lr=0.25, beta_lr=0.0625)
    given = [{"name": "network", "params": [batch], "lr": 1.0}]
    criterion, groups = losses.loss_select("pasted", opt, given, NUM_CLASSES)
    assert len(given) == 1
    optimizer = torch.optim.Adam(groups)
    network, *own = optimizer.param_groups
    assert (network["name"], network["lr"]) == ("network", 1.0)
    named = [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in own]
    assert named == expected
    before = [parameter.clone() for group in optimizer.param_groups for parameter in group["params"]]
    criterion(batch, LABELS).backward()
    optimizer.step()
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all((old != new).any() for old, new in zip(before, after))


def loss_flags(loss: str, **values: Any) -> argparse.Namespace:
    """The defaults of the flags of losses, resolved for a loss, with other values for some."""
    parser = FlagParser()
    losses.add_arguments(parser)
    defaults = {**vars(parser.parse_args([])), "embed_dim": DIM, "lr": 1e-5}
    return argparse.Namespace(**{**defaults, "sampling": losses.choose_sampling(loss, None), **values})


@pytest.mark.parametrize(
    ("pasted", "ours", "sampling"), [(PastedTripletLoss, "triplet", "random"), (PastedMarginLoss, "marginloss", None)]
)
def test_a_pasted_loss_equals_ours(pasted: Any, ours: str, sampling: str | None, monkeypatch: Any) -> None:
    monkeypatch.setitem(LOSSES, "pasted", pasted)
    results = []
    for loss in (ours, "pasted"):
        opt = loss_flags(loss, sampling=sampling or losses.choose_sampling(loss, None), margin=0.3)
        criterion, _ = losses.loss_select(loss, opt, [], NUM_CLASSES)
        seed_everything(4)
        batch = unit_batch(DIM).requires_grad_()
        value = criterion(batch, LABELS)
        gradients = torch.autograd.grad(value, (batch, *criterion.parameters()))
        results.append((value, gradients, losses.statistics(criterion, batch.detach(), LABELS)))
    (our_value, our_gradients, our_statistics), (value, gradients, statistics) = results
    torch.testing.assert_close(value, our_value)
    torch.testing.assert_close(gradients, our_gradients)
    assert list(statistics) == ["Embedding Norm", "Tuples", "Hard Positives", "Hard Negatives", "d(a, p)", "d(a, n)"]
    assert statistics == {name: our_statistics[name] for name in statistics}


def test_what_a_pasted_loss_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "triplet", PastedTripletLoss)
    monkeypatch.setitem(LOSSES, "margin", margin_row)
    monkeypatch.setitem(LOSSES, "classifier", PastedClassifier)
    for loss in ("triplet", "margin"):
        assert losses.requirements(loss) == (True, 4, "distance", "triplets")
        assert losses.choose_sampling(loss, "softhard") == "softhard"
        with pytest.raises(UserError, match="takes triplets, but --sampling npair gives n-pairs"):
            losses.choose_sampling(loss, "npair")
    assert losses.requirements("classifier") == (True, 1, None, "triplets")
    assert losses.choose_sampling("classifier", None) is None


def test_a_sampling_method_without_a_mark_gives_triplets(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sampler.__init__

    def with_own(self: Any, *args: Any, **params: Any) -> None:
        real(self, *args, **params)
        self.methods["own"] = lambda batch, labels, **_: TRIPLETS
        self.methods["pairs"] = losses.gives("n-pairs")(lambda batch, labels, **_: NPAIRS)

    monkeypatch.setattr(Sampler, "__init__", with_own)
    assert losses.choose_sampling("triplet", "own") == "own"
    assert losses.choose_sampling("npair", "pairs") == "pairs"
    for loss, sampling in (("npair", "own"), ("triplet", "pairs")):
        with pytest.raises(UserError, match=f"--sampling {sampling} gives"):
            losses.choose_sampling(loss, sampling)


@pytest.mark.parametrize("convert", [list, tuple, np.asarray, lambda labels: np.array(labels, np.int32)])
@pytest.mark.parametrize("method", METHODS)
def test_labels_may_be_lists_or_arrays(method: str, convert: Callable[[list[int]], Any]) -> None:
    given = []
    for labels in (LABELS, convert(LABELS.tolist())):
        seed_everything(2)
        given.append(Sampler(method).give(unit_batch(4), labels))
    torch.testing.assert_close(*given)


LABEL_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "an array": np.array,
    "small integers": lambda labels: np.array(labels, np.uint8),
    "unsigned integers": lambda labels: np.array(labels, np.uint64),
    "a tensor of int32": lambda labels: torch.tensor(labels, dtype=torch.int32),
    "a list of tensors": lambda labels: list(torch.tensor(labels)),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_take_labels_in_any_form(loss: str, form: str) -> None:
    criterion, batch = build(loss, default_sampler(loss)), random_batch()
    values = []
    for labels in (LABELS, LABEL_FORMS[form](LABELS.tolist())):
        seed_everything(2)
        values.append((criterion(batch, labels), losses.statistics(criterion, batch, labels)))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_counts_in_float32(loss: str, dtype: torch.dtype) -> None:
    criterion = build(loss, default_sampler(loss))
    half = (20 * random_batch()).to(dtype).requires_grad_()  # float16 would overflow in squares of larger batches
    results = []
    for batch in (half, half.detach().float().requires_grad_()):
        seed_everything(2)
        value = criterion(batch, LABELS)
        value.backward()
        results.append((value, losses.statistics(criterion, batch.detach(), LABELS)))
    torch.testing.assert_close(*results)
    assert results[0][0].dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_tuples_of_half_precision_are_those_of_float32(method: str) -> None:
    half, given = random_batch().half(), []
    for batch in (half, half.float()):
        seed_everything(2)
        given.append(Sampler(method).give(batch, LABELS))
    torch.testing.assert_close(*given)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_leaves_losses_alone(loss: str) -> None:
    criterion, values = build(loss, default_sampler(loss)), []
    for enabled in (False, True):
        seed_everything(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            values.append(criterion(random_batch(), LABELS))
    torch.testing.assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS[:5], r"embeddings \(12, 5\) and labels \(5,\)"),
        (LABELS.repeat(2).tolist(), r"embeddings \(12, 5\) and labels \(24,\)"),
        (LABELS[:, None], r"labels \(12, 1\)"),
        (7, r"labels \(\)"),
        (LABELS.float(), "labels are integers, not float32"),
        ([*LABELS.tolist()[:-1], 0.5], "labels are integers"),
        (["cat"] * 12, "labels are integers"),
        ([[1], [1, 2]] * 6, "labels are integers"),
        (None, "labels are integers"),
    ],
)
def test_labels_that_are_not_one_integer_for_each_embedding_are_refused(labels: Any, words: str) -> None:
    calls = [Sampler(method).give for method in METHODS] + [build(loss, default_sampler(loss)) for loss in LOSSES]
    for call in calls:
        with pytest.raises(UserError, match=words):
            call(random_batch(), labels)
    with pytest.raises(UserError, match=r"takes embeddings \(B, D\) and labels \(B,\), but got embeddings \(5,\)"):
        Sampler("random").give(random_batch()[0], [0, 0, 1, 1, 2])


def test_a_sampler_of_a_sampler_keeps_its_method_and_keywords() -> None:
    sampler = Sampler(Sampler("semihard", margin=0.5, squared=True), margin=0.7)
    assert (sampler.method, sampler.params) == ("semihard", {"margin": 0.7, "squared": True})


def all_positives(
    oracle: Callable[..., Probabilities], x: list[list[float]], labels: list[int], **params: Any
) -> dict[tuple[int, int], Probabilities]:
    """The probabilities of the triplets of each (anchor, positive), for sampling with all positives."""
    result: dict[tuple[int, int], Probabilities] = {}
    for (a, p, n), probability in oracle(x, labels, **params).items():
        result.setdefault((a, p), {})[a, p, n] = probability
    return {pair: {t: v / sum(some.values()) for t, v in some.items()} for pair, some in result.items()}


def softhard_of_all_positives(x: list[list[float]], labels: list[int]) -> Probabilities:
    """Every positive, hard or not, with a uniform hard negative."""
    result: Probabilities = {}
    for a, positives, negatives in each_anchor(labels):
        farthest_positive = max(math.dist(x[a], x[p]) for p in positives)
        hard_negatives = [n for n in negatives if math.dist(x[a], x[n]) < farthest_positive] or negatives
        result.update({(a, p, n): 1 / len(hard_negatives) for p, n in product(positives, hard_negatives)})
    return result


@pytest.mark.parametrize("elements", [1 << 22, 60], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    ("method", "oracle", "params"),
    [
        ("distance", distance_probabilities, {"upper_cutoff": 1.4}),
        ("semihard", semihard_probabilities, {"margin": 0.5}),
        ("softhard", softhard_of_all_positives, {}),
    ],
)
def test_all_positives_per_anchor_each_have_a_negative_of_their_own(
    method: str, oracle: Any, params: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", elements)
    batch = unit_batch(4)
    given = draw(method, batch, positives_per_anchor="all", **params)
    by_pair = all_positives(oracle, batch.double().tolist(), LABELS.tolist(), **params)
    assert given.shape == (DRAWS, len(by_pair), 3)
    for column in range(len(by_pair)):
        pair = tuple(given[0, column, :2].tolist())
        probabilities = by_pair.pop(pair)
        if len(probabilities) > 1:
            assert_frequencies(given[:, column], probabilities, DRAWS)
        else:
            assert set(map(tuple, given[:, column].tolist())) == set(probabilities)


class RandomNumbers(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    drawn = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawn += result.numel()
        return result


@pytest.mark.parametrize("method", ["distance", "semihard", "softhard"])
def test_all_positives_per_anchor_cost_one_random_number_a_tuple(method: str) -> None:
    batch, labels = unit_batch(128, 112), torch.arange(28).repeat_interleave(4)
    with RandomNumbers() as of_one:
        Sampler(method).give(batch, labels)
    with RandomNumbers() as of_all:
        tuples = Sampler(method, positives_per_anchor="all").give(batch, labels)
    assert of_one.drawn >= 112 * 112  # of every anchor and image
    assert of_all.drawn == len(tuples) == 336


def test_rho_makes_negatives_of_positives() -> None:
    triplets = draw("distance", unit_batch(4), rho=0.25)
    switched = triplets[..., 0] == triplets[..., 1]
    assert switched.double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (LABELS[triplets[..., 2]] == LABELS[triplets[..., 0]]).eq(switched).all()
    assert (triplets[..., 2] != triplets[..., 0]).all()
    seed_everything(0)
    kept = Sampler("distance").give(unit_batch(4), LABELS)
    seed_everything(0)
    both = Sampler("distance", rho=0.5).give(unit_batch(4), LABELS)
    is_kept = both[:, 0] != both[:, 1]
    assert torch.equal(both[is_kept], kept[is_kept])
    assert torch.equal(both[~is_kept][:, 2], kept[~is_kept][:, 1])


@needs_fake_cuda
@pytest.mark.parametrize("method", ["distance", "semihard", "softhard"])
def test_all_positives_and_rho_do_not_wait(method: str) -> None:
    labels = LABELS.clone()
    with fake_cuda():
        tuples = Sampler(method, positives_per_anchor="all", rho=0.2).give(torch.randn(len(labels), DIM), labels)
        assert tuples.is_cuda
        assert tuples.shape == (4 * 3 + 3 * 2 + 2 + 2, 3)
