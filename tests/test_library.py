"""Losses, miners and their parts by pytorch-metric-learning's class names, several losses, and cross-batch memory."""

from __future__ import annotations

import argparse
import inspect
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning as library
import torch
from conftest import ROOT, csv_rows, training_flags
from pytorch_metric_learning import distances, miners, reducers, regularizers
from pytorch_metric_learning import losses as library_losses

import auxiliaries
import config
import losses
import main
from auxiliaries import UserError, seed_everything
from losses import LIBRARY_LOSSES, LIBRARY_MINERS, LOSSES, Sampler

LABELS = torch.arange(4).repeat_interleave(4)
NUM_CLASSES, DIM = 6, 8
REQUIRED = {"RankedListLoss": ["--loss_params", "margin=0.4", "Tn=5"]}


def batch_of(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(len(LABELS), DIM, generator=generator, dtype=dtype) + torch.eye(DIM, dtype=dtype)[LABELS]
    return torch.nn.functional.normalize(points, dim=1)


def resolve(*flags: str) -> argparse.Namespace:
    return config.resolve(config.parse(["--embed_dim", str(DIM), "--bs", "16", *flags]))


def select(*flags: str) -> tuple[Any, list[dict[str, Any]]]:
    opt = resolve(*flags)
    seed_everything(3)
    return losses.loss_select(opt.loss, opt, [], NUM_CLASSES)


def classes_of(module: Any) -> set[str]:
    return {name for name, entry in vars(module).items() if inspect.isclass(entry)}


# The tables against the library


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (library_losses, [*LIBRARY_LOSSES, *losses.REFUSED_LOSSES]),
        (miners, [*LIBRARY_MINERS, *losses.REFUSED_MINERS]),
        (distances, [*losses.LIBRARY_DISTANCES, "BaseDistance", "BatchedDistance"]),
        (regularizers, [*losses.LIBRARY_REGULARIZERS, "BaseRegularizer"]),
        (
            reducers,
            [*losses.LIBRARY_REDUCERS, "BaseReducer", "ClassWeightedReducer", "DoNothingReducer", "MultipleReducers"],
        ),
    ],
    ids=["losses", "miners", "distances", "regularizers", "reducers"],
)
def test_every_class_of_the_library_is_known(module: Any, known: list[str]) -> None:
    assert library.__version__.startswith("2.9")
    assert classes_of(module) == set(known)
    assert len(set(known)) == len(known)


def test_what_the_tables_say_is_what_the_library_has() -> None:
    able = {name for name, row in LIBRARY_LOSSES.items() if row.takes_memory}
    assert able == set(library_losses.CrossBatchMemory.supported_losses())
    of_the_run = {"num_classes", "embedding_size", "descriptors_dim", "l"}
    for name, row in LIBRARY_LOSSES.items():
        assert set(row.fills) == set(auxiliaries._signature(getattr(library_losses, name))) & of_the_run, name
        assert row.kind in ("tuple", "classification", "proxy", "rank")
        assert row.paper


@pytest.mark.parametrize("name", LIBRARY_LOSSES)
def test_every_loss_of_the_library_takes_training_steps(name: str) -> None:
    criterion, groups = select("--loss", name, *REQUIRED.get(name, []))
    net = torch.nn.Linear(DIM, DIM)
    optimizer = torch.optim.Adam([{"params": net.parameters(), "name": "network"}, *groups], lr=1e-2)
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    values = []
    for _ in range(3):
        embeddings = torch.nn.functional.normalize(net(batch_of()), dim=1)
        value = criterion(embeddings, LABELS)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert value.shape == ()
    assert all(map(math.isfinite, values))
    if name not in ("InstanceLoss", "HistogramLoss", "VICRegLoss"):  # wrong, in bins, and of random positives
        assert values[-1] < values[0]
    changed = [bool((old != new).any()) for old, new in zip(before, after)]
    assert all(changed) or name == "LargeMarginSoftmaxLoss", changed
    statistics = losses.statistics(criterion, embeddings.detach(), LABELS)
    assert all(value.shape == () and value.dtype == torch.float32 for value in statistics.values())
    assert any(statistic.startswith(f"{name} ") for statistic in statistics)
    expected = bool(list(criterion.parameters()))
    assert [group["name"] for group in groups] == ([name] if expected else [])
    assert all((group["lr"], group["weight_decay"]) == (pytest.approx(1e-3), 0) for group in groups)


@pytest.mark.parametrize(
    ("name", "flags", "by_hand"),
    [
        ("MultiSimilarityLoss", ["alpha=3", "base=0.4"], lambda: library_losses.MultiSimilarityLoss(alpha=3, base=0.4)),
        (
            "TripletMarginLoss",
            ["triplets_per_anchor=all", "swap=true"],
            lambda: library_losses.TripletMarginLoss(swap=True),
        ),
        ("ContrastiveLoss", [], library_losses.ContrastiveLoss),
        ("HistogramLoss", ["n_bins=20"], lambda: library_losses.HistogramLoss(n_bins=20)),
        ("ArcFaceLoss", ["margin=20"], lambda: library_losses.ArcFaceLoss(NUM_CLASSES, DIM, margin=20)),
        ("SoftTripleLoss", ["centers_per_class=3"], lambda: library_losses.SoftTripleLoss(NUM_CLASSES, DIM, 3)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_loss_by_name_is_the_one_called_by_hand(name: str, flags: list[str], by_hand: Any) -> None:
    criterion, _ = select("--loss", name, *(["--loss_params", *flags] if flags else []))
    seed_everything(3)
    theirs = by_hand()
    batch = batch_of().requires_grad_()
    value, expected = criterion(batch, LABELS), theirs(batch, LABELS)
    assert value.item() == expected.item()
    gradients = [torch.autograd.grad(one, batch)[0] for one in (value, expected)]
    assert torch.equal(*gradients)


def test_a_tuple_count_is_a_number_though_the_default_is_text() -> None:
    criterion, _ = select("--loss", "TripletMarginLoss", "--loss_params", "triplets_per_anchor=5")
    assert criterion.loss.triplets_per_anchor == 5
    assert criterion(batch_of(), LABELS) > 0


def test_recording_statistics_never_changes_training() -> None:
    for name in ("DynamicSoftMarginLoss", "MultiSimilarityLoss"):
        results = []
        for is_recorded in (False, True):
            criterion, _ = select("--loss", name, "--sampling", "DistanceWeightedMiner")
            for seed in range(4):
                value = criterion(batch_of(seed), LABELS)
                if is_recorded:
                    losses.statistics(criterion, batch_of(seed), LABELS)
            results.append(value)
        assert torch.equal(*results)


@pytest.mark.parametrize("loss", ["ManifoldLoss", "SupConLoss", "VICRegLoss"])
def test_a_loss_of_the_library_keeps_no_embeddings_for_its_statistics(loss: str) -> None:
    criterion, _ = select("--loss", loss)
    batch = batch_of().requires_grad_()
    storage = weakref.ref(batch.untyped_storage())
    criterion(batch, LABELS).backward()
    del batch
    assert storage() is None
    assert len(losses.statistics(criterion, batch_of(), LABELS)) > 1  # of embeddings that the caller keeps


# Samplers and miners


@pytest.mark.parametrize("loss", ["triplet", "marginloss", "contrastive", "MultiSimilarityLoss", "TripletMarginLoss"])
@pytest.mark.parametrize("miner", LIBRARY_MINERS)
def test_every_miner_feeds_our_losses_and_theirs(miner: str, loss: str) -> None:
    criterion, _ = select("--loss", loss, "--sampling", miner)
    batch = batch_of().requires_grad_()
    value = criterion(batch, LABELS)
    value.backward()
    assert value.isfinite()
    assert batch.grad is not None
    assert batch.grad.isfinite().all()
    statistics = losses.statistics(criterion, batch.detach(), LABELS)
    assert statistics["Tuples"] > 0 or miner == "PairMarginMiner"
    assert f"{miner} num_triplets" in statistics


@pytest.mark.parametrize("sampling", ["distance", "semihard", "softhard", "random", "npair"])
def test_our_samplers_feed_their_losses(sampling: str) -> None:
    margin = ["--margin", "0.3"] if sampling == "semihard" else []
    criterion, _ = select("--loss", "MultiSimilarityLoss", "--sampling", sampling, *margin)
    assert criterion.sampler.params["margin"] == (0.3 if margin else 0.2)
    seed_everything(2)
    value = criterion(batch_of(), LABELS)
    seed_everything(2)
    tuples = Sampler(sampling, margin=0.3).give(batch_of(), LABELS)
    anchors, negatives = tuples[:, 0], tuples[:, 2:]
    pairs = (anchors, tuples[:, 1], anchors.repeat_interleave(negatives.shape[1]), negatives.flatten())
    assert value == library_losses.MultiSimilarityLoss()(batch_of(), LABELS, pairs)
    assert losses.statistics(criterion, batch_of(), LABELS)["Tuples"] > 0


def test_a_miner_has_the_users_parameters_and_distance() -> None:
    params = ("--sampling_params", "margin=0.7", "type_of_triplets=semihard")
    flags = ("--distance", "LpDistance", "--distance_params", "power=2")
    criterion, _ = select("--loss", "triplet", "--sampling", "TripletMarginMiner", *params, *flags)
    distance = distances.LpDistance(power=2)
    expected = miners.TripletMarginMiner(margin=0.7, type_of_triplets="semihard", distance=distance)(batch_of(), LABELS)
    assert torch.equal(criterion.sampler.give(batch_of(), LABELS), torch.stack(expected, dim=1))


def test_tuples_of_several_methods_are_put_together() -> None:
    def give(*methods: str, pairs: bool = False) -> list[torch.Tensor]:
        seed_everything(2)
        sampler = Sampler(list(methods))
        return list(sampler.give_indices(batch_of(), LABELS)) if pairs else list(sampler.give(batch_of(), LABELS).T)

    distance, hard = give("distance"), give("BatchHardMiner")
    together = give("distance", "BatchHardMiner")
    assert all(torch.equal(one, torch.cat(parts)) for one, parts in zip(together, zip(distance, hard)))
    anchors, positives, negatives = distance
    found = give("MultiSimilarityMiner", pairs=True)
    together = give("distance", "MultiSimilarityMiner", pairs=True)
    columns = zip((anchors, positives, anchors, negatives), found)
    assert all(torch.equal(one, torch.cat(parts)) for one, parts in zip(together, columns))
    as_triplets = give("MultiSimilarityMiner")
    assert len(as_triplets[0]) == sum(int((found[2] == anchor).sum()) for anchor in found[0])
    criterion, _ = select("--loss", "marginloss", "--sampling", "distance", "MultiSimilarityMiner", "--sampling_params",
                          "MultiSimilarityMiner.epsilon=0.2", "distance.lower_cutoff=0.6")  # fmt: skip
    assert criterion.sampler.miners["MultiSimilarityMiner"].epsilon == 0.2
    assert criterion.sampler.params["lower_cutoff"] == 0.6
    assert criterion(batch_of(), LABELS) > 0


def test_a_miner_that_finds_nothing_gives_a_loss_of_zero() -> None:
    for loss in ("triplet", "marginloss", "contrastive", "TripletMarginLoss"):
        criterion, _ = select("--loss", loss, "--sampling", "TripletMarginMiner", "--sampling_params", "margin=-3")
        batch = batch_of().requires_grad_()
        value = criterion(batch, LABELS)
        value.backward()
        assert value == 0
        assert batch.grad is not None
        assert (batch.grad == 0).all()
        assert losses.statistics(criterion, batch.detach(), LABELS)["Tuples"] == 0


# Distances, reducers, regularizers


@pytest.mark.parametrize(
    ("flags", "by_hand"),
    [
        (
            ["--loss", "TripletMarginLoss", "--distance", "CosineSimilarity", "--reducer", "MeanReducer"],
            lambda: library_losses.TripletMarginLoss(
                distance=distances.CosineSimilarity(), reducer=reducers.MeanReducer()
            ),
        ),
        (
            ["--loss", "ContrastiveLoss", "--reducer", "ThresholdReducer", "--reducer_params", "low=0.3"],
            lambda: library_losses.ContrastiveLoss(reducer=reducers.ThresholdReducer(low=0.3)),
        ),
        (
            ["--loss", "TripletMarginLoss", "--distance", "LpDistance", "--distance_params",
             "normalize_embeddings=false", "p=1", "--regularizer", "LpRegularizer", "--regularizer_params", "power=2",
             "--loss_params", "embedding_reg_weight=0.3"],
            lambda: library_losses.TripletMarginLoss(
                distance=distances.LpDistance(normalize_embeddings=False, p=1),
                embedding_regularizer=regularizers.LpRegularizer(power=2),
                embedding_reg_weight=0.3,
            ),
        ),
        (
            ["--loss", "SoftTripleLoss", "--regularizer", "SparseCentersRegularizer", "--loss_params",
             "centers_per_class=3", "weight_reg_weight=0.2"],
            lambda: library_losses.SoftTripleLoss(
                NUM_CLASSES, DIM, 3, weight_reg_weight=0.2,
                weight_regularizer=regularizers.SparseCentersRegularizer(NUM_CLASSES, 3),
            ),
        ),
    ],
    ids=["distance and reducer", "reducer", "embeddings", "weights"],
)  # fmt: skip
def test_parts_by_name_are_those_given_by_hand(flags: list[str], by_hand: Any) -> None:
    criterion, _ = select(*flags)
    seed_everything(3)
    assert criterion(2 * batch_of(), LABELS).item() == by_hand()(2 * batch_of(), LABELS).item()


@pytest.mark.parametrize("name", losses.LIBRARY_REGULARIZERS)
def test_every_regularizer_can_be_built(name: str) -> None:
    of = {"LpRegularizer": "SphereFaceLoss", "SparseCentersRegularizer": "SubCenterArcFaceLoss"}
    criterion, _ = select("--loss", of.get(name, "CosFaceLoss"), "--regularizer", name)
    assert criterion(batch_of(), LABELS).isfinite()


@pytest.mark.parametrize("name", losses.LIBRARY_REDUCERS)
def test_every_reducer_can_be_built(name: str) -> None:
    params = ["--reducer_params", "low=0"] if name == "ThresholdReducer" else []
    loss = "MarginLoss" if name == "DivisorReducer" else "ContrastiveLoss"
    criterion, _ = select("--loss", loss, "--reducer", name, *params)
    assert criterion(batch_of(), LABELS).isfinite()


# Several losses


def test_several_losses_are_a_weighted_sum_with_parts_and_groups_of_their_own() -> None:
    flags = ("--loss", "triplet", "ProxyAnchorLoss", "SupConLoss", "--loss_weights", "1", "0.5", "2")
    params = ("--loss_params", "triplet.margin=0.3", "ProxyAnchorLoss.alpha=16", "ProxyAnchorLoss.lr=0.25")
    criterion, groups = select(*flags, *params)
    assert criterion.criteria["triplet"].margin == 0.3
    assert criterion.criteria["ProxyAnchorLoss"].loss.alpha == 16
    assert [(group["name"], group["lr"]) for group in groups] == [("ProxyAnchorLoss", 0.25)]
    seed_everything(2)
    value = criterion(batch_of(), LABELS)
    seed_everything(2)
    parts = [part(batch_of(), LABELS) for part in criterion.criteria.values()]
    assert value.item() == pytest.approx((parts[0] + 0.5 * parts[1] + 2 * parts[2]).item())
    assert list(criterion.parts) == ["triplet", "ProxyAnchorLoss", "SupConLoss"]
    assert [part.item() for part in criterion.parts.values()] == [part.item() for part in parts]
    assert not any(part.requires_grad for part in criterion.parts.values())
    statistics = losses.statistics(criterion, batch_of(), LABELS)
    assert {"Embedding Norm", "Loss triplet", "Loss SupConLoss", "triplet Violations", "triplet Tuples"} <= set(
        statistics
    )
    assert statistics["Loss triplet"] == parts[0]


def test_several_losses_agree_on_what_they_need() -> None:
    opt = resolve("--loss", "npair", "ArcFaceLoss")
    assert (opt.normalize, opt.samples_per_class, opt.sampling, opt.batch_sampler) == (True, 4, None, "class_balanced")
    assert resolve("--loss", "crossentropy", "SphereFaceLoss").samples_per_class == 1
    assert resolve("--loss", "triplet", "ArcFaceLoss", "--sampling", "semihard").sampling == "semihard"
    criterion, _ = select("--loss", "npair", "triplet")
    assert [part.sampler.method for part in criterion.criteria.values()] == ["npair", "distance"]
    assert criterion(batch_of(), LABELS) > 0


def test_configurations_of_several_losses_come_back_from_files(tmp_path: Path) -> None:
    flags = ["--loss", "triplet", "CircleLoss", "--loss_params", "CircleLoss.m=0.3", "--loss_weights", "1", "2",
             "--sampling", "distance", "BatchHardMiner", "--savename", "x"]  # fmt: skip
    opt = resolve(*flags)
    config.save_config(tmp_path / "config.yaml", config.configuration(opt))
    again = config.resolve(config.parse([], tmp_path / "config.yaml"))
    assert config.changed_flags(opt, again) == {}
    assert (again.loss, again.sampling) == (["triplet", "CircleLoss"], ["distance", "BatchHardMiner"])
    one = resolve("--loss", "SupConLoss", "--sampling", "none", "--savename", "x")
    config.save_config(tmp_path / "config.yaml", config.configuration(one))
    assert (one.loss, one.sampling) == ("SupConLoss", None)
    assert config.changed_flags(one, config.resolve(config.parse([], tmp_path / "config.yaml"))) == {}


# Cross-batch memory

MEMORY = ("--loss", "ContrastiveLoss", "--memory_size", "40", "--memory_start", "2")


@pytest.mark.parametrize("sampling", [[], ["--sampling", "MultiSimilarityMiner"]], ids=["all pairs", "mined"])
def test_memory_is_the_librarys_from_its_start_on(sampling: list[str]) -> None:
    criterion, _ = select(*MEMORY, *sampling)
    miner = miners.MultiSimilarityMiner() if sampling else None
    plain = library_losses.ContrastiveLoss()
    memory = library_losses.CrossBatchMemory(plain, DIM, 40, miner)
    for seed in range(6):
        batch = batch_of(seed)
        indices = miner(batch, LABELS) if miner else None
        expected = plain(batch, LABELS, indices) if seed < 2 else memory(batch, LABELS)
        assert criterion(batch, LABELS) == expected
        statistics = losses.statistics(criterion, batch, LABELS)
        assert statistics["Memory"] == max(0, min(40, 16 * (seed - 1)))


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_memory_resumes_exactly(stop: int, tmp_path: Path) -> None:
    whole, _ = select(*MEMORY)
    values = [whole(batch_of(seed), LABELS) for seed in range(9)]
    stopped, _ = select(*MEMORY)
    for seed in range(stop):
        stopped(batch_of(seed), LABELS)
    auxiliaries.save_checkpoint(tmp_path / "state.pth.tar", {"criterion": stopped.state_dict()})
    resumed, _ = select(*MEMORY)
    resumed.load_state_dict(auxiliaries.load_checkpoint(tmp_path / "state.pth.tar")["criterion"])
    assert [resumed(batch_of(seed), LABELS) for seed in range(stop, 9)] == values[stop:]


def test_the_histogram_of_dynamic_soft_margins_is_saved() -> None:
    whole, _ = select("--loss", "DynamicSoftMarginLoss")
    values = [whole(batch_of(seed), LABELS) for seed in range(4)]
    stopped, _ = select("--loss", "DynamicSoftMarginLoss")
    for seed in range(2):
        stopped(batch_of(seed), LABELS)
    resumed, _ = select("--loss", "DynamicSoftMarginLoss")
    resumed.load_state_dict(stopped.state_dict())
    assert [resumed(batch_of(seed), LABELS) for seed in (2, 3)] == values[2:]


# What is refused


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--loss MultiSimilarityLos", r"--loss MultiSimilarityLos is unknown \(did you mean MultiSimilarityLoss\?\)"),
        ("--loss CrossBatchMemory", "can't be used: it wraps a loss: name that loss, and give --memory_size"),
        ("--loss MultipleLosses", "it wraps losses: name them all in --loss"),
        ("--loss SelfSupervisedLoss", "it wraps a loss: name that loss"),
        ("--loss GenericPairLoss", "it is a base class, not a loss"),
        ("--sampling EmbeddingsAlreadyPackagedAsTriplets", "it takes batches that are made of triplets"),
        ("--sampling distanse", r"--sampling distanse is unknown \(did you mean distance\?\)"),
        ("--loss ArcFaceLoss --sampling distance", "--loss ArcFaceLoss uses no tuples: drop --sampling distance"),
        ("--loss ArcFaceLoss ProxyAnchorLoss --sampling distance", "use no tuples: drop --sampling distance"),
        ("--loss triplet --sampling none", "--loss triplet learns from triplets: drop --sampling none"),
        ("--loss triplet --sampling distance none", "contradicts itself"),
        ("--loss npair --sampling MultiSimilarityMiner", "takes n-pairs, but --sampling MultiSimilarityMiner gives"),
        ("--loss triplet npair --sampling distance", "--loss npair takes n-pairs, but --sampling distance gives"),
        ("--loss triplet triplet", "names a loss twice"),
        ("--loss triplet npair --loss_weights 1", r"--loss_weights gives 1 weight\(s\) for 2 loss\(es\)"),
        ("--loss triplet npair --loss_params margin=1", "say which one margin is for, such as triplet.margin=1"),
        ("--loss triplet npair --loss_params nca.margin=1", "nca of nca.margin is not among triplet, npair"),
        ("--loss MultiSimilarityLoss --loss_params alhpa=2", r"no parameter alhpa \(did you mean alpha\?\); it takes"),
        ("--loss MultiSimilarityLoss --loss_params alpha=x", "alpha of MultiSimilarityLoss takes a number, not x"),
        ("--loss ArcFaceLoss --loss_params num_classes=3", "no parameter num_classes"),
        ("--loss ArcFaceLoss --loss_params lr=fast", "lr of ArcFaceLoss takes a number of at least 0, not fast"),
        ("--loss SupConLoss --loss_params lr=0.1", "SupConLoss has no parameters that learn: drop lr"),
        ("--loss RankedListLoss", "has no default for all its parameters: give --loss_params margin=… Tn=…"),
        ("--loss triplet --loss_params margn=1", r"TripletLoss has no parameter margn \(did you mean margin\?\)"),
        ("--loss triplet --margin 0.3 --loss_params margin=0.4", "--margin and margin in --loss_params are the same"),
        ("--lower_cutoff 0.3 --sampling_params lower_cutoff=0.4", "lower_cutoff in --sampling_params are the same"),
        ("--loss TripletMarginLoss --margin 0.3", "--margin is not read by --loss TripletMarginLoss"),
        ("--sampling_params positives_per_anchor=3", "positives_per_anchor is 1 or all, not 3"),
        ("--loss SupConLoss --sampling_params epsilon=1", "--sampling_params needs a --sampling"),
        ("--sampling MultiSimilarityMiner --sampling_params eps=1", "MultiSimilarityMiner has no parameter eps"),
        ("--sampling semihard --rho 0.2", "--rho needs --sampling distance"),
        ("--sampling random --positives_per_anchor all", "is for --sampling distance, semihard or softhard"),
        ("--distance CosineSimilarity", "is for losses and miners of pytorch-metric-learning"),
        ("--reducer MeanReducer", "--reducer is for losses of pytorch-metric-learning, not for --loss marginloss"),
        ("--loss SupConLoss --distance_params p=1", "--distance_params needs --distance"),
        ("--loss SupConLoss --distance BatchedDistance", "it wraps a distance"),
        ("--loss SupConLoss --reducer ClassWeightedReducer", "needs a weight for each class"),
        ("--loss ArcFaceLoss --distance LpDistance", "requires the distance metric to be CosineSimilarity"),
        ("--loss SupConLoss --reducer DivisorReducer", "with --reducer DivisorReducer can't work"),
        ("--loss TripletMarginLoss --reducer PerAnchorReducer", "can't work: Triplet reduction not supported"),
        ("--loss SupConLoss --sampling AngularMiner --distance SNRDistance", "requires the distance metric to be Lp"),
        ("--loss SupConLoss --regularizer RegularFaceRegularizer", "a loss's own weights, which SupConLoss lacks"),
        ("--loss ArcFaceLoss --regularizer SparseCentersRegularizer", "is for SoftTripleLoss or SubCenterArcFaceLoss"),
        ("--loss SupConLoss --regularizer LpRegularizer", "no effect on embeddings of length 1"),
        ("--loss marginloss --memory_size 64", "can't be used with --loss marginloss, which compares images inside"),
        ("--loss ArcFaceLoss --memory_size 64", "can't be used with --loss ArcFaceLoss"),
        ("--loss SupConLoss --sampling distance --memory_size 64", "picks inside the batch alone"),
        ("--loss SupConLoss --memory_size 8", "--memory_size 8 is less than --bs 16"),
        ("--loss SupConLoss --samples_per_class 1", "--loss SupConLoss needs two images per class in a batch"),
        ("--loss smoothap --samples_per_class 16", "needs two classes of 16 images in a batch: raise --bs"),
        ("--loss SubCenterArcFaceLoss --loss_params sub_centers=100000000000",
            "--loss_params sub_centers=100000000000 of SubCenterArcFaceLoss would take [0-9,]* GiB of memory"),
        ("--loss SoftTripleLoss --loss_params centers_per_class=100000000000", "would take .* GiB of memory"),
        ("--loss HistogramLoss --loss_params n_bins=100000000000", "would take .* GiB of memory"),
        ("--loss FastAPLoss --loss_params num_bins=100000000000", "would take .* GiB of memory"),
        ("--loss ManifoldLoss --loss_params K=100000000000", "would take .* GiB of memory"),
        ("--loss DynamicSoftMarginLoss --loss_params num_bins=100000000000", "would take .* GiB of memory"),
        ("--loss SupConLoss --sampling UniformHistogramMiner --sampling_params num_bins=100000000000", "would take"),
        ("--loss SupConLoss --sampling UniformHistogramMiner --sampling_params pos_per_bin=100000000000", "would take"),
        ("--loss SoftTripleLoss --regularizer SparseCentersRegularizer --loss_params centers_per_class=many",
            "centers_per_class of SoftTripleLoss takes an integer, not many"),
        ("--loss MultiSimilarityLoss --loss_params mat_based_loss=true", "has no parameter mat_based_loss"),
        ("--loss recallatk --loss_params k_values=[0]", "k_values takes a list of integers above 0"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(flags: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        resolve(*flags.split())
    assert "\n" not in str(error.value)


# The table of docs/methods.md


def test_the_table_has_every_loss_and_is_that_of_the_docs() -> None:
    lines = losses.table().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [*LOSSES, *LIBRARY_LOSSES]
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert losses.table() in page, "renew the table: python losses.py"


def test_help_names_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = [*LOSSES, *LIBRARY_LOSSES, *LIBRARY_MINERS, *losses.LIBRARY_DISTANCES, *losses.LIBRARY_REDUCERS]
    assert all(name in text for name in [*names, *losses.LIBRARY_REGULARIZERS])


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*MEMORY[:2], "--memory_size", "20", "--memory_start", "2", "--sampling", "MultiSimilarityMiner"),
        ("--loss", "DynamicSoftMarginLoss", "--sampling", "DistanceWeightedMiner"),
        ("--loss", "triplet", "SoftTripleLoss", "supap", "--loss_weights", "1", "0.5", "0.1", "--positives_per_anchor",
         "all", "--rho", "0.2", "--loss_params", "SoftTripleLoss.lr=0.01"),
    ],
    ids=["memory", "histogram", "several"],
)  # fmt: skip
def test_runs_resume_bit_for_bit(flags: tuple[str, ...], source: Path, tmp_path: Path, without_pictures: None) -> None:
    def train(name: str, *epochs: str) -> dict[str, Any]:
        start = ("--dataset", "tiny", "--savename", name, "--n_epochs", epochs[0], "--log_every", "1")
        main.command(training_flags(source, tmp_path, *start, *flags))
        for more in epochs[1:]:
            resume = ("--save_path", str(tmp_path), "--savename", name, "--resume_training", "--n_epochs", more)
            main.command(resume)
        return auxiliaries.load_checkpoint(tmp_path / "tiny" / name / "last.pth.tar")

    whole, resumed = train("whole", "3"), train("resumed", "1", "2", "3")
    for name in ("state_dict", "criterion"):
        assert str(whole[name]) == str(resumed[name])
        tensors = {key: value for key, value in whole[name].items() if isinstance(value, torch.Tensor)}
        assert all(torch.equal(value, resumed[name][key]) for key, value in tensors.items())
    rows = [csv_rows(tmp_path / "tiny" / name / "log_iterations.csv") for name in ("whole", "resumed")]
    assert rows[0] == rows[1]
    if "SoftTripleLoss" in flags:
        assert {"Loss triplet", "Loss SoftTripleLoss", "supap Loss ranking", "triplet Tuples"} <= set(rows[0][-1])
