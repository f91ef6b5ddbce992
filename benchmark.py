# PYTHON_ARGCOMPLETE_OK
"""Times sampling and losses, evaluation, data loading and records against naive loops and well-known libraries.

Every ratio is measured in one run: the contestants take turns, and medians are compared; where they differ by a few
percent, the least processor time of one thread is; in the evaluation, whose parts take seconds, each runs once.
"""

from __future__ import annotations

import os

if __name__ == "__main__" and "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
    import completion

    completion.complete("benchmark")

import contextlib
import csv
import ctypes
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_sample_images
from torchvision import transforms as v1

import auxiliaries
import config
import datasets
import evaluate
import features
import image_cache
import losses
import main as training_run
import methods
import plots
import records
import transforms
from evaluate import EmbeddingSpace, f1, nmi, recall_at_k

Row = dict[str, Any]

SIZES = (10**4, 3 * 10**4, 10**5, 10**6)
PRECISIONS = ("R-precision", "MAP@R", "mAP", "MRR")
MAX_OWN, NUM_QUERIES = 10**5, 10**4  # items that are compared with each other; queries of more


def run_in_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, in which each runs twice, the first time to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            run()  # what ran before has left its data in the caches and threads asleep
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def medians(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each contestant: the median over rounds."""
    seconds = run_in_turns(contestants, rounds, time.perf_counter)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def quickest(contestants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least processor time of each contestant on one thread, in rounds that together take some seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    of_one = sum(min(values) for values in run_in_turns(contestants, 2, time.process_time).values())
    rounds = int(np.clip(seconds / (2 * of_one), 8, 300))
    times = run_in_turns(contestants, rounds, time.process_time)
    torch.set_num_threads(threads)
    return {name: min(values) for name, values in times.items()}


def naive_distance_sampling(batch: torch.Tensor, labels: np.ndarray) -> list[tuple[int, int, int]]:
    """One triplet per anchor, one anchor at a time, as earlier repositories do it."""
    points = batch.detach().numpy()
    distances = np.sqrt(np.maximum(((points[:, None] - points[None]) ** 2).sum(-1), 0))
    dim, triplets = batch.shape[1], []
    for anchor, label in enumerate(labels):
        d = np.maximum(distances[anchor], 0.5)
        log_weights = (2.0 - dim) * np.log(d) - (dim - 3) / 2 * np.log(np.maximum(1 - 0.25 * d**2, 1e-8))
        log_weights[labels == label] = -np.inf
        weights = np.exp(log_weights - log_weights.max())
        positives = [other for other in np.flatnonzero(labels == label) if other != anchor]
        negative = np.random.choice(len(labels), p=weights / weights.sum())
        triplets.append((anchor, int(np.random.choice(positives)), int(negative)))
    return triplets


def naive_semihard_sampling(batch: torch.Tensor, labels: np.ndarray) -> list[tuple[int, int, int]]:
    """One triplet per anchor, one anchor at a time."""
    points = batch.detach().numpy()
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    triplets = []
    for anchor, label in enumerate(labels):
        positive = np.random.choice([other for other in np.flatnonzero(labels == label) if other != anchor])
        d = distances[anchor]
        semihard = np.flatnonzero((labels != label) & (d > d[positive]) & (d < d[positive] + 0.2))
        negatives = semihard if len(semihard) else np.flatnonzero(labels != label)
        triplets.append((anchor, int(positive), int(np.random.choice(negatives))))
    return triplets


def naive_margin_loss(batch: torch.Tensor, labels: np.ndarray, beta: torch.Tensor) -> torch.Tensor:
    """The margin loss, one triplet at a time."""
    terms = []
    for a, p, n in naive_distance_sampling(batch, labels):
        to_positive, to_negative = (batch[a] - batch[p]).norm(), (batch[a] - batch[n]).norm()
        terms += [F.relu(to_positive - beta[labels[a]] + 0.2), F.relu(beta[labels[a]] - to_negative + 0.2)]
    stacked = torch.stack(terms)
    return stacked.sum() / (stacked > 0).sum().clamp(min=1)


def naive_triplet_loss(batch: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """The triplet loss, one triplet at a time."""
    triplets = naive_semihard_sampling(batch, labels)
    terms = [
        F.relu((batch[a] - batch[p]).pow(2).sum() - (batch[a] - batch[n]).pow(2).sum() + 0.2) for a, p, n in triplets
    ]
    return torch.stack(terms).mean()


def naive_npair_loss(batch: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """The n-pair loss, one class at a time."""
    pairs = [np.random.choice(np.flatnonzero(labels == label), 2, replace=False) for label in np.unique(labels)]
    terms = []
    for number, (a, p) in enumerate(pairs):
        others = [positive for other, (_, positive) in enumerate(pairs) if other != number]
        products = torch.stack([batch[a] @ batch[n] - batch[a] @ batch[p] for n in others])
        terms.append(torch.log1p(products.exp().sum()) + 0.02 * (batch[a].square().sum() + batch[p].square().sum()))
    return torch.stack(terms).mean()


def naive_proxynca(batch: torch.Tensor, labels: np.ndarray, proxies: torch.Tensor) -> torch.Tensor:
    """The ProxyNCA loss, one image at a time."""
    batch, proxies = 3 * F.normalize(batch, dim=1), 3 * F.normalize(proxies, dim=1)
    terms = []
    for embedding, label in zip(batch, labels):
        distances = (embedding - proxies).square().sum(dim=1)
        others = torch.cat([distances[:label], distances[label + 1 :]])
        terms.append(distances[label] + (-others).logsumexp(dim=0))
    return torch.stack(terms).mean()


def naive_contrastive_loss(batch: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """The contrastive loss of all pairs, one image at a time."""
    too_far, too_near = [], []
    for anchor, label in enumerate(labels):
        distances = (batch - batch[anchor]).norm(dim=1)
        is_positive = torch.from_numpy(labels == label)
        too_near.append(F.relu(0.5 - distances[~is_positive]))
        is_positive[anchor] = False
        too_far.append(distances[is_positive])
    means = [terms.sum() / (terms > 0).sum().clamp(min=1) for terms in (torch.cat(too_far), torch.cat(too_near))]
    return torch.stack(means).sum()


def naive_smoothap(batch: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """The Smooth-AP loss, one pair of a query and a positive at a time."""
    similarities = batch @ batch.T
    precisions = []
    for query, label in enumerate(labels):
        positives = [other for other in np.flatnonzero(labels == label) if other != query]
        terms = []
        for positive in positives:
            ahead = torch.sigmoid((similarities[query] - similarities[query, positive]) / 0.01)
            among = sum(ahead[other] for other in positives if other != positive)
            terms.append((1 + among) / (1 + ahead.sum() - ahead[query] - ahead[positive]))
        precisions.append(torch.stack(terms).mean())
    return 1 - torch.stack(precisions).mean()


def naive_proxynca_plus_plus(batch: torch.Tensor, labels: np.ndarray, proxies: torch.Tensor) -> torch.Tensor:
    """The ProxyNCA++ loss, one image at a time."""
    batch, proxies = F.normalize(batch, dim=1), F.normalize(proxies, dim=1)
    terms = []
    for embedding, label in zip(batch, labels):
        scaled = 9 * (embedding - proxies).square().sum(dim=1)
        terms.append(scaled[label] + (-scaled).logsumexp(dim=0))
    return torch.stack(terms).mean()


Contestants = dict[str, Callable[[], object]]
PML = "pytorch-metric-learning"


def learning_step(loss: Callable[[torch.Tensor, Any], torch.Tensor], points: torch.Tensor, labels: Any) -> Callable:
    """A call of forward and backward on a copy of the points."""

    def run() -> None:
        batch = points.clone().requires_grad_()
        loss(batch, labels).backward()

    return run


def library_step(points: torch.Tensor, labels: torch.Tensor, loss: torch.nn.Module, miner: Any = None) -> Callable:
    """The same of a loss of pytorch-metric-learning, with the tuples of a miner."""
    return learning_step(lambda batch, of: loss(batch, of, miner(batch, of) if miner else None), points, labels)


def loss_contests(points: torch.Tensor, labels: torch.Tensor) -> dict[str, Contestants]:
    """For each loss, who takes part."""
    ours, theirs = partial(learning_step, points=points, labels=labels), partial(library_step, points, labels)
    naive = partial(learning_step, points=points, labels=labels.numpy())
    beta = torch.full((100,), 1.2, requires_grad=True)
    library_margin = pml_losses.MarginLoss(learn_beta=True, num_classes=100)
    library_semihard = pml_miners.TripletMarginMiner(0.2, type_of_triplets="semihard")
    contests: dict[str, Contestants] = {
        "margin + distance": {
            "ours": ours(losses.MarginLoss(losses.Sampler("distance"), 100)),
            PML: theirs(library_margin, pml_miners.DistanceWeightedMiner()),
            "naive loop": naive(partial(naive_margin_loss, beta=beta)),
        },
        "triplet + semihard": {
            "ours": ours(losses.TripletLoss(losses.Sampler("semihard"))),
            PML: theirs(pml_losses.TripletMarginLoss(0.2), library_semihard),
            "naive loop": naive(naive_triplet_loss),
        },
        "npair": {
            "ours": ours(losses.NPairLoss(losses.Sampler("npair"))),
            PML: theirs(pml_losses.NPairsLoss()),
            "naive loop": naive(naive_npair_loss),
        },
    }
    contests["contrastive, all pairs"] = {
        "ours": ours(losses.ContrastiveLoss()),
        PML: theirs(pml_losses.ContrastiveLoss(neg_margin=0.5)),
        "naive loop": naive(naive_contrastive_loss),
    }
    contests["smoothap"] = {
        "ours": ours(losses.SmoothAP()),
        f"{PML}, wrong": theirs(pml_losses.SmoothAPLoss()),
        "naive loop": naive(naive_smoothap),
    }
    for classes in (100, 11318):
        proxies = torch.randn(classes, 128, requires_grad=True)
        contests[f"proxynca, {classes} classes"] = {
            "ours": ours(losses.ProxyNCA(classes, 128)),
            PML: theirs(pml_losses.ProxyNCALoss(classes, 128)),
            "naive loop": naive(partial(naive_proxynca, proxies=proxies)),
        }
        contests[f"proxynca++, {classes} classes"] = {
            "ours": ours(losses.ProxyNCAPlusPlus(classes, 128)),
            PML: theirs(pml_losses.ProxyNCALoss(classes, 128, softmax_scale=9)),
            "naive loop": naive(partial(naive_proxynca_plus_plus, proxies=proxies)),
        }
    return contests


def sampling_contests(points: torch.Tensor, labels: torch.Tensor) -> dict[str, Contestants]:
    """For each sampling method, who takes part."""
    contests: dict[str, Contestants] = {
        f"{method} sampling alone": {"ours": partial(losses.Sampler(method).give, points, labels)}
        for method in losses.Sampler().methods
    }
    for method in ("distance", "semihard", "softhard"):
        sampler = losses.Sampler(method, positives_per_anchor="all")
        contests[f"{method} sampling, all positives"] = {
            "ours": partial(sampler.give, points, labels),
            "one positive per anchor": contests[f"{method} sampling alone"]["ours"],
        }
    return contests


def _call_with_cut_histogram(loss: Any, batch: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss.hist_ = loss.hist_.detach()  # else the second step fails
    return loss(batch, labels)


def views_of(labels: torch.Tensor) -> torch.Tensor:
    """For each image another one of its class, by the simplest way there is for classes of four in order."""
    positions = torch.arange(len(labels))
    return positions // 4 * 4 + (positions + torch.randint(1, 4, (len(labels),))) % 4


# How losses of the library are called by hand that don't take embeddings and labels.
CALLED_BY_HAND: dict[str, Callable[..., torch.Tensor]] = {
    "DynamicSoftMarginLoss": _call_with_cut_histogram,
    "ManifoldLoss": lambda loss, batch, labels: loss(batch, indices_tuple=labels),
    "VICRegLoss": lambda loss, batch, labels: loss(batch, ref_emb=batch.index_select(0, views_of(labels))),
}


def library_contests(points: torch.Tensor, labels: torch.Tensor) -> dict[str, Contestants]:
    """For each loss of pytorch-metric-learning: through `--loss`, and called by hand."""
    contests: dict[str, Contestants] = {}
    for name in losses.LIBRARY_LOSSES:
        params = [f"--loss_params={param}" for param in losses.LIBRARY_LOSSES[name].paper_params]
        opt = config.resolve(config.parse(["--loss", name, "--embed_dim", "128", "--not_pretrained", *params]))
        criterion, _ = losses.loss_select(name, opt, [], num_classes=100)
        loss: Any = criterion.loss
        by_hand = partial(CALLED_BY_HAND[name], loss) if name in CALLED_BY_HAND else loss
        contests[name] = {
            "ours": learning_step(criterion, points, labels),
            "by hand": learning_step(by_hand, points, labels),
        }
    return contests


HOW_CALLED = {"ours": "through --loss", "by hand": "by hand"}


def benchmark_library(points: torch.Tensor, labels: torch.Tensor) -> list[Row]:
    """The loss of the library that `--loss` slows down most, and the median one."""
    seconds: dict[str, dict[str, float]] = {}
    for name, contestants in library_contests(points, labels).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds[name] = quickest(contestants, seconds=2)
    by_ratio = sorted(seconds, key=lambda name: seconds[name]["by hand"] / seconds[name]["ours"])
    rows = []
    for which, name in (("slowed down most", by_ratio[0]), ("the median one", by_ratio[len(by_ratio) // 2])):
        what, of_one = f"{name}, {which} of {len(by_ratio)}", seconds[name]
        rows += [_row(what, who, of_one[key] * 1e3, "ms", of_one["ours"] * 1e3) for key, who in HOW_CALLED.items()]
    return rows


def benchmark_losses() -> list[Row]:
    """Forward and backward of embeddings (112, 128), 28 classes of 4, and the samplers alone."""
    auxiliaries.seed_everything(0)
    labels = torch.arange(28).repeat_interleave(4)
    points = F.normalize(torch.randn(112, 128), dim=1)
    rows = []
    for what, contestants in {**loss_contests(points, labels), **sampling_contests(points, labels)}.items():
        seconds = medians(contestants, rounds=8 if "11318" in what or "smoothap" in what else 50)
        rows += [_row(what, name, value * 1e3, "ms", seconds["ours"] * 1e3) for name, value in seconds.items()]
    distance = pml_miners.DistanceWeightedMiner()(points, labels)
    print(
        f"triplets for 112 anchors: ours {len(losses.Sampler('distance').give(points, labels))}, "
        f"with all positives {len(losses.Sampler('distance', positives_per_anchor='all').give(points, labels))}, "
        f"pytorch-metric-learning's distance miner {len(distance[0])}"
    )
    for name in ("SmoothAPLoss", "ProxyNCALoss"):
        print(f"{PML}'s {name}: {losses.LIBRARY_LOSSES[name].note}")
    return rows + benchmark_library(points, labels)


LARGE = (4096, 512)  # embeddings, their dimension


def benchmark_large_losses() -> list[Row]:
    """Forward and backward of embeddings (4096, 512), 1,024 classes of 4, and the samplers alone: time and memory."""
    auxiliaries.seed_everything(0)
    device, threads = auxiliaries.find_device(0), torch.get_num_threads()
    torch.set_num_threads(1)  # whose processor time doesn't depend on what else the machine does
    units = {"time": "s", "peak memory": "GiB"}
    found = {
        what: {"time": _processor_time(run, device), "peak memory": _memory_of(run, device)}
        for what, run in large_steps(*LARGE, device).items()
    }
    torch.set_num_threads(threads)
    product = next(iter(found.values()))
    return [
        {**_row(what, who, value, units[who], product[who]), "of": "the product"}
        for what, values in found.items()
        for who, value in values.items()
    ]


def large_steps(size: int, dim: int, device: torch.device) -> Contestants:
    """A product of all pairs of embeddings, every own sampling method and every own loss, each with its backward."""
    labels = torch.arange(size) // 4
    points = F.normalize(torch.randn(size, dim), dim=1).to(device)
    product = learning_step(lambda batch, _: (batch @ batch.T).square().sum(), points, labels)
    steps: Contestants = {"a product of all pairs": product}
    for method in losses.Sampler().methods:
        steps[f"{method} sampling"] = partial(losses.Sampler(method).give, points, labels)
    for method in ("distance", "semihard", "softhard"):
        sampler = losses.Sampler(method, positives_per_anchor="all")
        steps[f"{method} sampling, all positives"] = partial(sampler.give, points, labels)
    more = {
        "triplet, all positives": ["triplet", "--positives_per_anchor", "all"],
        "triplet + semihard": ["triplet", "--sampling", "semihard"],
        "contrastive + distance": ["contrastive", "--sampling", "distance"],
        "contrastive + npair": ["contrastive", "--sampling", "npair"],
    }
    for name, flags in {**{loss: [loss] for loss in losses.LOSSES}, **more}.items():
        argv = ["--embed_dim", str(dim), "--bs", str(size), "--not_pretrained", "--loss", *flags]
        criterion, _ = losses.loss_select(flags[0], config.resolve(config.parse(argv)), [], num_classes=size // 4)
        steps[name] = learning_step(criterion.to(device), points, labels)
    return steps


def _processor_time(run: Callable[[], object], device: torch.device) -> float:
    """The least seconds of three calls: of the processor, or of the clock where a GPU computes."""
    on_gpu = device.type == "cuda"
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if on_gpu else (lambda: None, time.process_time)
    seconds = []
    for _ in range(3):
        start = clock()
        run()
        wait()
        seconds.append(clock() - start)
    return min(seconds)


def _memory_of(run: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call above what was in use before it, in GiB."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) / 2**30
        auxiliaries.peak_memory(device, reset=True)
        run()
        return auxiliaries.peak_memory(device) - before
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that it keeps would be taken for that of the call
    before, _ = memory(reset=True)
    run()
    return memory()[1] - before


def _row(what: str, who: str, value: float, unit: str, ours: float) -> Row:
    """A row of the table; the ratio is how many times ours the value is."""
    ratio = value / ours if ours else float(value > 0)
    return {"what": what, "who": who, "value": round(value, 3), "unit": unit, "times ours": round(ratio, 2)}


def online_products_embeddings() -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings of the size of Online Products' test set: 60,502 × 128 in 11,316 classes of 5 or 6."""
    return clustered_embeddings(60502, 11316)


def clustered_embeddings(size: int, num_classes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Embeddings `(size, 128)` of length 1 around the centers of their classes, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(size) % num_classes
    centers = rng.standard_normal((num_classes, 128), dtype=np.float32)
    points = rng.standard_normal((size, 128), dtype=np.float32)
    points *= np.float32(1.2)
    points += centers[labels]
    return F.normalize(torch.from_numpy(points), dim=1), labels


def memory(reset: bool = False) -> tuple[float, float]:
    """Memory of this process now, and its peak since the last reset, in GiB. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    return int(kilobytes["VmRSS"]) / 2**20, int(kilobytes["VmHWM"]) / 2**20


def pair_counting_f1(labels: np.ndarray, clusters: np.ndarray) -> float:
    """F1 with a pass over all points for every cluster, as earlier repositories do it."""
    together = sum(
        int((counts * (counts - 1) // 2).sum())
        for cluster in np.unique(clusters)
        for counts in [np.unique(labels[clusters == cluster], return_counts=True)[1]]
    )
    sizes = [np.unique(values, return_counts=True)[1] for values in (clusters, labels)]
    return 2 * together / sum(int((size * (size - 1) // 2).sum()) for size in sizes)


def benchmark_evaluation() -> list[Row]:
    """Metrics of Online Products' size, against the bare products of all pairs, faiss and straightforward counting."""
    points, labels = online_products_embeddings()
    k_vals = (1, 10, 100, 1000)
    gc.collect()
    start_memory, _ = memory(reset=True)
    space = EmbeddingSpace(points, labels)
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        return result

    recalls = timed("recall", lambda: [recall_at_k(space, k) for k in k_vals])
    timed("precisions", lambda: evaluate.evaluate_space(EmbeddingSpace(points, labels), [1], PRECISIONS))
    timed("k-means", lambda: space.clusters)
    our_f1 = timed("f1", lambda: f1(space))
    our_nmi = timed("nmi", lambda: nmi(space))
    peak = memory()[1] - start_memory
    without_kmeans = seconds["recall"] + seconds["f1"] + seconds["nmi"]

    faiss_recalls = timed("faiss", lambda: _recall_by_faiss(points.numpy(), labels, k_vals))
    counted_f1 = timed("pair counting", lambda: pair_counting_f1(labels, space.clusters))
    timed("products", lambda: _multiply_all(points, points))
    space.clustering = evaluate.Clustering("faiss")
    timed("faiss k-means", space.cluster)
    timed("library", lambda: _precisions_by_library(points, labels))
    print(f"Recall @ {k_vals}: ours {recalls}, faiss {faiss_recalls}")
    print(f"F1: ours {our_f1:.6f}, counted {counted_f1:.6f}; NMI: {our_nmi:.6f}")
    return [
        _row("Recall @ 1, 10, 100, 1000", "ours", seconds["recall"], "s", seconds["recall"]),
        _row("Recall @ 1, 10, 100, 1000", "faiss search, k = 1001", seconds["faiss"], "s", seconds["recall"]),
        _row("Recall @ 1, 10, 100, 1000", "bare products", seconds["products"], "s", seconds["recall"]),
        _row(", ".join(PRECISIONS), "ours", seconds["precisions"], "s", seconds["precisions"]),
        _row(", ".join(PRECISIONS), "bare products", seconds["products"], "s", seconds["precisions"]),
        _row(", ".join(PRECISIONS), "two: AccuracyCalculator", seconds["library"], "s", seconds["precisions"]),
        _row("F1", "ours", seconds["f1"], "s", seconds["f1"]),
        _row("F1", "a pass for each cluster", seconds["pair counting"], "s", seconds["f1"]),
        _row("NMI", "ours", seconds["nmi"], "s", seconds["nmi"]),
        _row("everything but k-means", "ours", without_kmeans, "s", without_kmeans),
        _row("k-means and assignment", "ours", seconds["k-means"], "s", seconds["k-means"]),
        _row("k-means and assignment", "faiss", seconds["faiss k-means"], "s", seconds["k-means"]),
        _row("peak memory above the start", "ours", peak, "GiB", peak),
    ]


def _recall_by_faiss(points: np.ndarray, labels: np.ndarray, k_vals: Sequence[int]) -> list[float]:
    """Recall @ k by a search for the nearest neighbors."""
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    found = labels[index.search(points, max(k_vals) + 1)[1][:, 1:]] == labels[:, None]  # no duplicates here
    return [float(found[:, :k].any(axis=1).mean()) for k in k_vals]


def _precisions_by_library(points: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Precision @ 1, R-precision and MAP@R by pytorch-metric-learning."""
    chosen = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(chosen, k="max_bin_count", device=points.device)
    return calculator.get_accuracy(points, torch.from_numpy(labels))


def benchmark_sizes(sizes: Sequence[int], plot: Path) -> list[Row]:
    """Recall and MAP@R of more and more points, beside the bare products: all against all, or 10⁴ queries beyond 10⁵.

    Args:
        sizes: numbers of items `(N, 128)`, in classes of 5 or 6.
        plot: the SVG of time and memory against N.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    rows: list[Row] = []
    for size in sizes:
        items, labels = clustered_embeddings(size, max(1, size * 11316 // 60502))
        num_queries = size if size <= MAX_OWN else NUM_QUERIES
        queries = items if num_queries == size else items[:num_queries]
        start = time.process_time()
        _multiply_all(queries, items)
        seconds = {"bare products": time.process_time() - start}
        gc.collect()
        start_memory, _ = memory(reset=True)
        start = time.process_time()
        in_gallery = (items, labels, np.arange(num_queries)) if num_queries < size else ()
        space = EmbeddingSpace(queries, labels[:num_queries], *in_gallery)
        evaluate.evaluate_space(space, (1, 10, 100, 1000), ("Recall", "MAP@R"))
        seconds["Recall and MAP@R"] = time.process_time() - start
        peak = memory()[1] - start_memory
        ours, what = seconds["Recall and MAP@R"], f"{num_queries:,} queries, {size:,} items"
        rows += [_row(what, who, value, "s of CPU", ours) for who, value in seconds.items()]
        gigaflops = 2 * num_queries * size * items.shape[1] / 1e9
        rows += [_row(what, "memory above the start", peak, "GiB", peak or 1)]
        rows += [_row(what, "flops of the products", gigaflops, "GFLOP", gigaflops)]
        for who, value in {**seconds, "memory above the start": peak}.items():
            points.setdefault(who, []).append((size, value))
    plots.save_sizes(plot, points)
    return rows


def _multiply_all(queries: torch.Tensor, items: torch.Tensor) -> None:
    """Takes all products of queries and items, tile by tile, and keeps none."""
    memory_of_tile = torch.empty(evaluate.QUERY_TILE * evaluate.GALLERY_TILE)
    for some in queries.split(evaluate.QUERY_TILE):
        for others in items.split(evaluate.GALLERY_TILE):
            out = memory_of_tile[: len(some) * len(others)].view(len(some), len(others))
            torch.mm(some, others.T, out=out)


def benchmark_data() -> list[Row]:
    """Images per second in one worker's thread: batches of 64 of 224 px, from JPEGs of 500 × 375 px and stored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a data-loading worker
    normalize = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    theirs = {
        "training images": v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip(), v1.ToTensor(), normalize]),
        "evaluated images": v1.Compose([v1.Resize(256), v1.CenterCrop(224), v1.ToTensor(), normalize]),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for what, (plain, stored) in image_datasets(Path(folder)).items():
            seconds = medians(
                {
                    "ours": partial(load_batch, plain),
                    "ours, --cache_images": partial(load_batch, stored),
                    "Pillow and torchvision v1": partial(load_with_pillow, plain.images.paths, theirs[what]),
                },
                rounds=9,
            )
            rows += [
                _row(what, name, round(64 / value, 1), "images/s", 64 / seconds["ours"])
                for name, value in seconds.items()
            ]
    torch.set_num_threads(threads)
    return rows


def load_batch(dataset: datasets.ImageDataset) -> Any:
    """A batch of all images of a dataset."""
    is_training = isinstance(dataset, datasets.BaseTripletDataset)
    draws: list[Any] = [(idx, 1, idx) if is_training else idx for idx in range(len(dataset))]
    return datasets.collate([dataset[draw] for draw in draws])


def load_with_pillow(paths: Sequence[str], transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """The same without this repository."""
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def image_datasets(folder: Path) -> dict[str, tuple[datasets.ImageDataset, datasets.ImageDataset]]:
    """Training and evaluated images, each from 64 JPEGs and from a file of `image_cache`."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # two, 640 × 427
    paths = []
    for number in range(64):
        width = int(rng.integers(500, 569))
        left, top = int(rng.integers(641 - width)), int(rng.integers(428 - width * 3 // 4))
        cut = photos[number % 2].crop((left, top, left + width, top + width * 3 // 4)).resize((500, 375))
        paths.append(str(folder / f"{number}.jpg"))
        cut.save(paths[-1])
    images = datasets.ImageSet(paths, np.zeros((64, 1), np.int64), [["image"]])
    pairs: dict[str, tuple[datasets.ImageDataset, datasets.ImageDataset]] = {}
    for what, before, after in (
        ("training images", transforms.unchanged, transforms.RandomCropAndFlip(224)),
        ("evaluated images", transforms.eval_transform(224, 256), transforms.unchanged),
    ):
        is_training = what == "training images"
        make = partial(datasets.BaseTripletDataset, bs=64, samples_per_class=1, batch_sampler="shuffled")
        plain, stored = (
            make(images, transform) if is_training else datasets.ImageDataset(images, transform)
            for transform in ((after, after) if is_training else (before, after))
        )
        decoded = [before(transforms.load_image(path)).permute(1, 2, 0) for path in paths]
        file = folder / f"{what}.images"
        file.write_bytes(b"".join(image.contiguous().numpy().tobytes() for image in decoded))
        shapes = np.array([image.shape for image in decoded], np.int64)
        stored.read = image_cache.StoredImages(file, shapes, paths).read
        pairs[what] = plain, stored
    return pairs


def benchmark_records() -> list[Row]:
    """What it costs to record an iteration, beside the demo's training step: ResNet18, 56 images of 48 px."""
    flags = ["--arch", "resnet18", "--not_pretrained", "--crop_size", "48", "--gpu", "-1"]
    method = methods.build_training(config.resolve(config.parse(flags)), 314, torch.device("cpu"))
    images = torch.randint(0, 256, (56, 3, 48, 48), dtype=torch.uint8)
    labels = torch.arange(14).repeat_interleave(4)
    method.start_epoch(epoch=1)
    loss = method.step(images, labels, epoch=1)["loss"]
    every = training_run.READ_LOSSES_EVERY
    with tempfile.TemporaryDirectory() as folder:
        log = records.Records(Path(folder))

        def collect() -> None:
            iterations = records.IterationLog(method, 1, log, log_every=1)
            iterations.iterations_before = len(log.rows["iterations"])
            for iteration in range(1, every + 1):
                iterations.add(iteration, loss)
            iterations.read()

        contestants: Contestants = {
            "training step": partial(method.step, images, labels, 1),
            "collecting and writing its records": collect,
        }
        seconds = medians(contestants, rounds=15)
        log.close()
    seconds["collecting and writing its records"] /= every
    of_step = seconds["training step"]
    return [
        {
            "what": "an iteration",
            "who": name,
            "value": round(value * 1e3, 3),
            "unit": "ms",
            "times ours": round(value / of_step, 4),
        }
        for name, value in seconds.items()
    ]


def benchmark_features() -> list[Row]:
    """An epoch on cached features of 5,900 images, 1,280 of each, in batches of 112, and the evaluation of as many."""
    flags = ["--arch", "timm:tf_efficientnet_lite0", "--not_pretrained", "--freeze_trunk", "--cache_features"]
    opt = config.resolve(config.parse([*flags, "--eval_metrics", "Recall", "MAP@R", "--gpu", "-1"]))
    auxiliaries.seed_everything(0)
    device = torch.device("cpu")
    method = methods.build_training(opt, 50, device)
    method.net.takes_features = True
    labels = np.sort(np.arange(5900) % 50)
    values = np.random.default_rng(0).standard_normal((1, 5900, 1280), dtype=np.float32)
    names = [str(label) for label in range(50)]
    images = datasets.ImageSet([str(position) for position in range(5900)], labels[:, None], [names])
    drawn = datasets.BaseTripletDataset(images, transforms.RandomCropAndFlip(224), opt.bs, 4, "class_balanced")
    train = features.TrainFeatureDataset(drawn, values, np.arange(5900))
    in_order = features.FeatureDataset(drawn, values, np.arange(5900))
    common: dict[str, Any] = {"collate_fn": lambda batch: batch}
    one_set = datasets.RetrievalSet(
        "test", datasets.ImageLoader(in_order, batch_size=opt.eval_bs, generator=torch.Generator(), **common)
    )

    def train_one_epoch() -> None:
        train.set_epoch(1)
        method.start_epoch(epoch=1)
        for batch, batch_labels, _ in datasets.ImageLoader(train, batch_sampler=train.batches, **common):
            method.step(batch, batch_labels, epoch=1)

    seconds = medians(
        {
            "training": train_one_epoch,
            "Recall and MAP@R": lambda: evaluate.evaluate(method.net, [one_set], opt.k_vals, device, opt.eval_metrics),
        },
        rounds=3,
    )
    total = sum(seconds.values())
    what = "an epoch on cached features"
    return [
        _row(what, "both", total, "s", total),
        *(_row(what, who, value, "s", total) for who, value in seconds.items()),
    ]


def benchmark_step(arch: str) -> list[Row]:
    """Training steps and embeddings of 112 images with each of the flags of speed, on the device at hand."""
    settings = {
        "fp32": [],
        "bf16": ["--precision", "bf16"],
        "channels_last": ["--channels_last"],
        "compile": ["--compile"],
        "fused": ["--fused"],
        "fast": ["--fast"],
    }
    if auxiliaries.find_device(0).type == "cuda":
        settings["fp16"] = ["--precision", "fp16"]
    rows: list[Row] = []
    for name, flags in settings.items():
        opt = config.resolve(config.parse(["--arch", arch, "--not_pretrained", *flags]))
        device = auxiliaries.pick_device(opt.gpu, opt.deterministic)
        method = methods.build_training(opt, 100, device)
        pixels = torch.randint(0, 256, (opt.bs, 3, opt.crop_size, opt.crop_size), dtype=torch.uint8)
        for what, value, unit in _time_steps(method, pixels, device):
            first = next((row["value"] for row in rows if row["what"] == what), value)
            rows.append(
                {"what": what, "who": name, "value": round(value, 4), "unit": unit, "times ours": value / first}
            )
    for row in rows:
        row["times ours"] = round(row["times ours"], 2)
    return rows


def _time_steps(
    method: methods.MetricLossOnly, pixels: torch.Tensor, device: torch.device
) -> list[tuple[str, float, str]]:
    """Images per second of training and embedding, the share of a step that is not the network, and peak memory."""
    labels = torch.arange(len(pixels)) // 4
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    method.start_epoch(epoch=1)

    def train() -> None:
        method.step(pixels.to(device), labels, epoch=1)
        wait()

    def learn_from_points() -> None:
        points.grad = None
        method.criterion(F.normalize(points, dim=1), labels).backward()
        wait()

    @torch.inference_mode()
    def embed() -> torch.Tensor:
        embedded = method.net(pixels.to(device))
        wait()
        return embedded

    points = embed().clone().requires_grad_(True)
    auxiliaries.peak_memory(device, reset=True)
    memory(reset=True)
    seconds = medians({"step": train, "loss": learn_from_points}, rounds=3)
    peak = auxiliaries.peak_memory(device) if device.type == "cuda" else memory()[1]
    method.net.eval()
    return [
        ("training", len(pixels) / seconds["step"], "images/s"),
        ("embedding", len(pixels) / medians({"embed": embed}, rounds=3)["embed"], "images/s"),
        ("sampling and loss, of a step", 100 * seconds["loss"] / seconds["step"], "%"),
        ("peak memory", peak, "GiB"),
    ]


LARGE_STEP = ["--arch", "resnet18", "--not_pretrained", "--crop_size", "64"]
CHUNK, WHOLE = 48, 960  # images


def benchmark_large_steps() -> list[Row]:
    """A training step of ResNet18 on images of 64 px, whole and with gradient caching: time and peak memory."""
    device, rows = auxiliaries.find_device(0), []
    for size, chunk in ((CHUNK, []), (WHOLE, ["--grad_cache", str(CHUNK)]), (WHOLE, [])):
        flags = ["--bs", str(size), *chunk]
        auxiliaries.seed_everything(0)
        opt = config.resolve(config.parse([*LARGE_STEP, *flags]))
        method = methods.build_training(opt, 240, device)
        images = torch.randint(0, 256, (opt.bs, 3, opt.crop_size, opt.crop_size), dtype=torch.uint8)
        method.start_epoch(epoch=1)
        step = partial(method.step, images.to(device), torch.arange(opt.bs) // 4, 1)
        step()  # which makes the optimizer's state
        rows += [(" ".join(flags), "peak memory", _memory_of(step, device), "GiB")]
        rows += [(" ".join(flags), "time", _processor_time(step, device), "s")]
    of_whole = {what: value for _, what, value, _ in rows}
    return [{**_row(flags, what, value, unit, of_whole[what]), "of": "the whole"} for flags, what, value, unit in rows]


RANK_FLAGS = [
    *("--dataset", "noise", "--arch", "resnet18", "--not_pretrained", "--crop_size", "128", "--bs", "64"),
    *("--gpu", "-1", "--iterations_per_epoch", "6", "--save_interval", "99", "--eval_metrics", "Recall"),
    *("--k_vals", "1", "--no-pictures", "--no-report", "--logger"),
]


def benchmark_ranks(num_epochs: int = 4) -> list[Row]:
    """Images per second of ResNet18 by one process with one core, and by two with a core each; without the first epoch.

    Raises:
        UserError: this system can't keep a process to some cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise auxiliaries.UserError("the benchmark ranks keeps processes to cores, as only Linux can: choose others")
    script, launcher = str(Path(__file__).with_name("main.py")), ["-m", "torch.distributed.run", "--standalone"]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as images, tempfile.TemporaryDirectory() as results:
        rng = np.random.default_rng(0)
        for number in range(128):
            path = Path(images, "noise", f"{number // 4:02d}", f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(path)
        for count, name in enumerate(("one process with one core", "two with a core each"), start=1):
            start = [*launcher, "--nproc_per_node", "2", script] if count == 2 else [script]
            flags = [*RANK_FLAGS, "--n_epochs", str(num_epochs), "--source_path", images, "--save_path", results]
            cores = sorted(os.sched_getaffinity(0))[:count]
            subprocess.run(
                [sys.executable, *start, *flags, "--savename", name],
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
                stdout=subprocess.DEVNULL,
                check=True,
            )
            with open(Path(results, "noise", name, "log_train_Base.csv"), newline="", encoding="utf-8") as file:
                found[name] = float(np.median([float(row["Images/s"]) for row in csv.DictReader(file)][1:]))
    of_one = next(iter(found.values()))
    return [{**_row("training images", name, value, "images/s", of_one), "of": "one"} for name, value in found.items()]


BENCHMARKS = {
    "losses": benchmark_losses,
    "evaluation": benchmark_evaluation,
    "data": benchmark_data,
    "features": benchmark_features,
    "records": benchmark_records,
}


def build_parser() -> auxiliaries.FlagParser:
    """The parser of all flags."""
    parser = auxiliaries.FlagParser(prog="benchmark.py", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="|".join([*BENCHMARKS, "step", "ranks"]),
        help="which benchmarks (default: all but ranks)",
    )
    parser.add_argument("--json", default="benchmark.json", metavar="FILE", help="where the table is written")
    parser.add_argument("--arch", default="resnet50", help="the network of the benchmark step")
    parser.add_argument(
        "--large",
        action="store_true",
        help="with losses: time and memory of batches of 4,096 embeddings of 512 dimensions instead; with step: of 960 "
        "images with and without --grad_cache",
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        type=auxiliaries.number(int, 10),
        metavar="N",
        help="with evaluation: time and memory against the number of items instead, of 128 dimensions each (default: "
        "10000 30000 100000 1000000; beyond 100000, of 10,000 queries)",
    )
    parser.add_argument("--plot", default="sizes.svg", metavar="FILE", help="where --sizes draws them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen benchmarks, prints a table and writes it as JSON."""
    opt = build_parser().parse_args(argv)
    benchmarks: dict[str, Callable[[], list[Row]]]
    benchmarks = {**BENCHMARKS, "step": partial(benchmark_step, opt.arch), "ranks": benchmark_ranks}
    if opt.sizes is not None:
        if opt.what != ["evaluation"]:
            raise auxiliaries.UserError("--sizes is of the evaluation: give `benchmark.py evaluation --sizes`")
        benchmarks["evaluation"] = partial(benchmark_sizes, opt.sizes or SIZES, Path(opt.plot))
    if opt.large:
        if opt.what not in (["losses"], ["step"]):
            raise auxiliaries.UserError(
                "--large is of losses or of steps: give `benchmark.py losses --large` or `benchmark.py step --large`"
            )
        benchmarks |= {"losses": benchmark_large_losses, "step": benchmark_large_steps}
    for name in opt.what:
        if name not in benchmarks:
            near = auxiliaries.nearest_name(name, benchmarks)
            raise auxiliaries.UserError(f"{name} is not a benchmark{near}: it is one of {', '.join(benchmarks)}")
    results = {name: benchmarks[name]() for name in opt.what or [*BENCHMARKS, "step"]}
    for rows in results.values():
        width = max(len(row["what"]) for row in rows)
        for row in rows:
            figures = f"{row['value']:>10} {row['unit']:<9}{row['times ours']:>8} × {row.get('of', 'ours')}"
            print(f"{row['what']:<{width}}  {row['who']:<26}{figures}")
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    with auxiliaries.atomic_write(Path(opt.json)) as path:
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    auxiliaries.run_command(main)
