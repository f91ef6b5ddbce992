"""Evaluating a finished run: other splits, galleries, features and projections, against computations by hand."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CrossValidated, Metrics, Run, embed_by_hand
from PIL import Image
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import auxiliaries
import config
import datasets
import evaluate
import evaluate_runs
import main
import records
import runs
from auxiliaries import UserError
from records import read_query_results as read_results

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_pictures")]


def naive_recall(query: torch.Tensor, labels: np.ndarray, gallery: torch.Tensor, of_gallery: np.ndarray) -> float:
    """Recall @ 1 in a gallery that holds the queries, too."""
    distances = torch.cdist(query.double(), gallery.double())
    distances[distances < 1e-6] = torch.inf  # itself
    return float((of_gallery[distances.argmin(dim=1).numpy()] == labels).mean())


def evaluated(folder: Path, *flags: str) -> Metrics:
    return main.command(["--evaluate", str(folder), *flags])


def metrics_by_hand(split: str, embeddings: torch.Tensor, images: datasets.ImageSet) -> Metrics:
    space = evaluate.EmbeddingSpace(embeddings, images.labels[:, 0])
    return {f"{split} {k}": v for k, v in evaluate.evaluate_space(space, [1, 2, 4, 8]).items()}


def test_evaluation_equals_the_selected_epochs(copied: Path, go_on: Run, crossed: CrossValidated) -> None:
    expected = auxiliaries.load_json(copied / "summary.json")["selected"]["test"]
    expected = {f"test {name}": value for name, value in expected.items()}
    assert go_on("--evaluate") == expected
    assert evaluated(copied, "--eval_reference_set", "compared_to_self") == expected
    images = datasets.give_splits(runs.load_flags(copied)).train
    found = evaluated(copied, "--splits_to_eval", "train", "test")
    assert found == pytest.approx({**metrics_by_hand("train", embed_by_hand(copied, images), images), **expected})
    entries = auxiliaries.load_json(copied / "evaluation.json")
    assert [entry["metrics"] for entry in entries] == [expected, expected, found]
    assert entries[2]["settings"]["splits_to_eval"] == ["train", "test"]

    means = evaluated(crossed.folder, "--splits_to_eval", "val", "test")
    summaries = [auxiliaries.load_json(fold / "summary.json")["selected"] for fold in crossed.folds]
    for split in ("val", "test"):
        for name in crossed.metrics:
            values = [summary[split][name] for summary in summaries]
            assert means[f"{split} {name}"] == pytest.approx(np.mean(values))
    assert all((fold / "evaluation.json").exists() for fold in crossed.folds)


def test_evaluation_in_all_sets_together(copied: Path) -> None:
    flags = ["--splits_to_eval", "train", "test", "--eval_reference_set", "compared_to_sets_combined"]
    found = evaluated(copied, *flags)
    splits = datasets.give_splits(runs.load_flags(copied))
    sets = {"train": splits.train, "test": splits.test[0].query}
    points = {split: embed_by_hand(copied, images) for split, images in sets.items()}
    gallery = torch.cat(list(points.values()))
    labels = np.concatenate([images.labels[:, 0] for images in sets.values()])
    for split, images in sets.items():
        expected = naive_recall(points[split], images.labels[:, 0], gallery, labels)
        assert found[f"{split} Recall @ 1"] == pytest.approx(expected)


def test_evaluation_in_the_training_images(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where test images are of training classes; otherwise there is nothing to find."""
    against = ["--eval_reference_set", "compared_to_training_set"]
    with pytest.raises(UserError, match="no query's class is among the images"):
        evaluated(copied, *against)
    whole = datasets.give_splits(runs.load_flags(copied)).train
    is_test = np.arange(len(whole)) % 3 == 0
    shared = datasets.Splits(whole.subset(~is_test), test=[datasets.RetrievalSet("test", whole.subset(is_test))])

    def keep(splits: datasets.Splits, root: Path) -> datasets.Splits:
        return splits

    monkeypatch.setitem(datasets.DATASETS, "tiny", datasets.DatasetSpec(partial(keep, shared), made_here=True))
    with pytest.raises(UserError, match="train has 16 images of 4 classes instead of 24 images of 4 classes"):
        evaluated(copied, *against)
    found = evaluated(copied, *against, "--splits_to_eval", "test", "train", "--accept_changed_data")
    query, gallery = (embed_by_hand(copied, images) for images in (shared.test[0].query, shared.train))
    labels, of_gallery = shared.test[0].query.labels[:, 0], shared.train.labels[:, 0]
    assert found["test Recall @ 1"] == pytest.approx(naive_recall(query, labels, gallery, of_gallery))
    assert found["train Recall @ 1"] == pytest.approx(naive_recall(gallery, of_gallery, gallery, of_gallery))


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_evaluation_of_other_points(copied: Path, trunk: bool, normalize: bool) -> None:
    images = datasets.give_splits(runs.load_flags(copied)).test[0].query
    points = embed_by_hand(copied, images, trunk, normalize)
    assert points.shape == (24, 1024 if trunk else 16)
    flags = [f"--{'' if normalize else 'no-'}eval_normalize_embeddings", *["--eval_use_trunk_output"] * trunk]
    assert evaluated(copied, *flags) == pytest.approx(metrics_by_hand("test", points, images))


def test_evaluation_on_principal_components(copied: Path) -> None:
    images = datasets.give_splits(runs.load_flags(copied)).test[0].query
    points = embed_by_hand(copied, images).numpy()
    projected = torch.from_numpy(PCA(3, svd_solver="full").fit(points).transform(points))
    expected = metrics_by_hand("test", projected, images)
    found = evaluated(copied, "--eval_pca", "3")
    assert found != metrics_by_hand("test", torch.from_numpy(points), images)
    assert found == pytest.approx(expected)
    scaled = projected / projected.norm(dim=1, keepdim=True)
    found = evaluated(copied, "--eval_pca", "3", "--eval_pca_normalize")
    assert found == pytest.approx(metrics_by_hand("test", scaled, images))
    assert found != pytest.approx(expected)
    with pytest.raises(UserError, match="--eval_pca 17 is more than 24 embeddings of dimension 16"):
        evaluated(copied, "--eval_pca", "17")


def test_tsne_is_drawn(copied: Path) -> None:
    evaluated(copied, "--eval_size_of_tsne", "12")
    with Image.open(copied / "tsne_test.png") as picture:
        width, height = picture.size
    events = EventAccumulator(str(copied / "tensorboard" / "evaluation")).Reload()
    (tag,) = events.Tags()["images"]
    (image,) = events.Images(tag)
    assert (tag, image.width, image.height) == ("t-SNE test", width, height)


def test_a_tsne_that_cannot_be_drawn_loses_no_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "tsne_test.png").mkdir()
    metrics = evaluated(copied, "--eval_size_of_tsne", "12")
    assert "notice: the t-SNE plot of test images is not kept: " in capsys.readouterr().err
    assert evaluate_runs.read_evaluations(copied)[-1]["metrics"] == metrics


REFUSED: Sequence[tuple[list[str], str]] = [
    (["--evaluate", "--splits_to_eval", "val"], "these splits have no val classes"),
    (["--evaluate", "--reproduce_results", "x"], "contradict each other"),
    (
        ["--evaluate", "--arch", "squeezenet1_1"],
        "was trained with --arch shufflenet_v2_x0_5, which must stay the same: drop the flag",
    ),
    (["--evaluate", "nowhere"], "nowhere is not a run folder"),
    (["--evaluate", "--eval_pca_normalize"], "--eval_pca_normalize does nothing without --eval_pca"),
    (["--evaluate", "--no-normalize_members"], "--normalize_members does nothing with --evaluate: give it to --resume"),
    (["--eval_pca_normalize"], "--eval_pca_normalize says how to --evaluate"),
    (["--eval_reference_set", "compared_to_self"], "--eval_reference_set says how to --evaluate"),
    (["--no-eval_normalize_embeddings"], "--eval_normalize_embeddings says how to --evaluate"),
    (["--eval_use_trunk_output"], "--eval_use_trunk_output says how to --evaluate"),
    (["--eval_size_of_tsne", "10"], "--eval_size_of_tsne says how to --evaluate"),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_evaluation_refused(copied: Path, go_on: Run, flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        go_on(*flags)
    assert words in str(error.value)
    assert not (copied / "evaluation.json").exists()


def test_evaluation_before_the_first_checkpoint(copied: Path) -> None:
    for name in ("last.pth.tar", "checkpoint.pth.tar"):
        (copied / name).unlink()
    with pytest.raises(UserError, match="stopped before its first evaluation"):
        evaluated(copied)


def test_evaluation_of_one_fold(crossed: CrossValidated) -> None:
    expected = auxiliaries.load_json(crossed.folds[1] / "summary.json")["selected"]["test"]
    found = evaluated(crossed.folder, "--fold", "1")
    assert found == {f"test {name}": value for name, value in expected.items()}


def test_damaged_evaluations_are_noticed_first(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "evaluation.json").write_text("")
    with pytest.raises(UserError, match=r"is not valid JSON.*move it away"):
        evaluated(copied)
    assert "test |" not in capsys.readouterr().out


def test_an_evaluation_says_of_what_it_was_and_when(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py", "--evaluate", "x"])
    evaluated(copied)
    (entry,) = evaluate_runs.read_evaluations(copied)
    assert entry["epoch"] == auxiliaries.load_checkpoint(copied / "checkpoint.pth.tar")["epoch"]
    assert entry["command"] == ["main.py", "--evaluate", "x"]
    assert datetime.fromisoformat(entry["date"]) <= datetime.now()


def test_evaluations_at_the_same_time_are_all_kept(copied: Path) -> None:
    opt = runs.load_flags(copied)

    def add(number: int) -> None:
        evaluate_runs.add_evaluation(copied, opt, {"NMI": number})

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add, args=(number,)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(entry["metrics"]["NMI"] for entry in evaluate_runs.read_evaluations(copied)) == list(range(6))


def test_a_read_only_folder_is_evaluated_all_the_same(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError(f"{copied} can't be written to (Read-only file system): choose another place or name")

    monkeypatch.setattr(auxiliaries, "locked", refuse)
    expected = auxiliaries.load_json(copied / "summary.json")["selected"]["test"]
    assert evaluated(copied) == {f"test {name}": value for name, value in expected.items()}
    assert "notice: the result is not kept: " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"settings": {}}]', '[{"settings": {}, "metrics": []}]'])
def test_evaluations_of_another_form_are_one_sentence(copied: Path, content: str) -> None:
    (copied / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json is damaged .*move it away"):
        evaluated(copied)


def figures_of(results: dict[str, np.ndarray]) -> tuple[float, float]:
    """Recall @ 1 and MAP@R from results by query."""
    weight = results["weight"]
    return float((weight * results["correct_at_1"]).sum()), float((weight * results["ap_at_r"]).sum())


def test_results_by_query_are_what_the_summary_is_made_of(finished: Path, crossed: CrossValidated) -> None:
    for folder in (finished, *crossed.folds):
        images, results = datasets.give_splits(runs.load_flags(folder)).test[0].query, read_results(folder)
        summary = runs.read_summary(folder)["selected"]
        space = evaluate.EmbeddingSpace(embed_by_hand(folder, images), images.labels[:, 0])
        recall, map_at_r = summary["test"]["Recall @ 1"], evaluate.map_at_r(space)
        assert figures_of(results) == (pytest.approx(recall), pytest.approx(map_at_r))
        assert results["correct_at_1"].mean() == pytest.approx(recall)  # each query has a positive
        assert results["label"].tolist() == images.labels[:, 0].tolist()
        assert results["epoch"] == summary["epoch"]
        assert (folder / "per_query.npz").stat().st_size < 3000
    digests = {str(read_results(folder)["test_set"]) for folder in crossed.folds}
    assert len(digests) == 1  # folds are tested on the same images
    assert digests != {str(read_results(finished)["test_set"])}


def test_results_by_query_of_parts_that_count_alike(tmp_path: Path) -> None:
    """Several sets, one with a gallery, and queries with nothing to find; then figures within coarser classes."""
    rng = np.random.default_rng(0)
    labels, points = np.r_[np.arange(40) % 7, 8], torch.from_numpy(rng.normal(size=(41, 4)))
    hierarchy = np.stack([labels, labels % 3], axis=1)
    spaces = [evaluate.EmbeddingSpace(points, hierarchy)]
    spaces += [evaluate.EmbeddingSpace(points[:15], hierarchy[:15], points[18:], hierarchy[18:])]
    for space in spaces:
        found = figures_of(evaluate.query_results(space))
        assert found == (pytest.approx(evaluate.recall_at_k(space, 1)), pytest.approx(evaluate.map_at_r(space)))
        found = figures_of(evaluate.query_results(space, "WithSameParentLabel"))
        parents = space.query_hierarchy[:, 1], space.gallery_hierarchy[:, 1]
        wanted = evaluate.evaluate_within_parents(space, *parents, [1], ["Recall", "MAP@R"])
        assert found == (pytest.approx(wanted["Recall @ 1"]), pytest.approx(wanted["MAP@R"]))


def test_results_by_query_of_several_sets(
    small_flags: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = datasets.read_splits("tiny", config.parse(small_flags()).source_path)
    images = whole.test[0].query
    query, gallery = images.subset(np.arange(len(images)) % 3 == 0), images.subset(np.arange(len(images)) % 3 > 0)
    sets = [datasets.RetrievalSet("a", images), datasets.RetrievalSet("b", query, gallery)]
    row = datasets.DatasetSpec(lambda _: datasets.Splits(whole.train, test=sets), made_here=True)
    monkeypatch.setitem(datasets.DATASETS, "two", row)
    metrics = main.command(small_flags("--dataset", "two", "--eval_metrics", "MAP@R"))
    wanted = [records.mean_over_sets(metrics, name) for name in ("Recall @ 1", "MAP@R")]
    results = read_results(tmp_path / "results/two/run")
    assert figures_of(results) == pytest.approx(wanted)
    assert len(results["label"]) == len(images) + len(query)


def test_results_by_query_are_written_anew_on_resuming(copied: Path, go_on: Run) -> None:
    before = read_results(copied)
    for name in ("summary.json", "per_query.npz"):  # as if the process had been stopped before its end
        (copied / name).unlink()
    go_on("--resume_training")
    after = read_results(copied)
    assert all(np.array_equal(after[name], before[name]) for name in before)

    (copied / "per_query.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"per_query\.npz is damaged: remove it and summary\.json, and --resume_tr"):
        read_results(copied)
    go_on("--resume_training", "--n_epochs", "3")
    after, summary = read_results(copied), runs.read_summary(copied)["selected"]
    assert (after["epoch"], figures_of(after)[0]) == (summary["epoch"], pytest.approx(summary["test"]["Recall @ 1"]))


@pytest.mark.parametrize("change", [{"label": np.zeros(3)}, {"weight": None}, {"weight": np.full(2, np.nan)}])
def test_results_by_query_of_another_form_are_refused(tmp_path: Path, change: dict[str, np.ndarray | None]) -> None:
    arrays: dict[str, Any] = {
        "correct_at_1": np.ones(2, bool),
        "ap_at_r": np.ones(2),
        "label": np.ones(2, int),
        "weight": np.ones(2),
    }
    np.savez(tmp_path / "per_query.npz", test_set=np.array("ab"), **arrays)
    assert set(read_results(tmp_path)) == {*arrays, "test_set"}
    changed: dict[str, Any] = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    np.savez(tmp_path / "per_query.npz", test_set=np.array("ab"), **changed)
    with pytest.raises(UserError, match="is damaged"):
        read_results(tmp_path)
    (tmp_path / "per_query.npz").unlink()
    with pytest.raises(UserError, match=r"has no per_query\.npz, it is of an earlier version: move its summary\.json"):
        read_results(tmp_path)


def redness(path: Path) -> int:
    """How much redder than its grayest pixel the reddest one is."""
    with Image.open(path) as image:
        assert image.width == 7 * 138 + 10
        return np.ptp(np.asarray(image.convert("RGB")).astype(int) @ [1, 0, -1])


def test_attention_is_drawn_for_the_retrievals_and_changes_nothing(run: Run, finished: Path, tmp_path: Path) -> None:
    run("--attention")
    folder = tmp_path / "tiny" / "run"
    for name, value in runs.best_state(finished)["state_dict"].items():
        assert torch.equal(value, runs.best_state(folder)["state_dict"][name])
    evaluated(folder, "--splits_to_eval", "train", "test", "--eval_use_trunk_output", "--eval_pca", "3")
    for name in ("attention", "attention_train", "attention_test"):
        assert redness(folder / f"{name}.png") > 50
    assert not (finished / "attention.png").exists()


def test_attention_of_cached_features_looks_at_the_images(run: Run, tmp_path: Path) -> None:
    run("--attention", "--cache_features", "0", "--freeze_trunk", "--cache_path", str(tmp_path / "cache"))
    assert redness(tmp_path / "tiny" / "run" / "attention.png") > 50


def test_attention_that_cannot_be_drawn_loses_no_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "attention_test.png").mkdir()
    assert evaluated(copied, "--attention")
    assert "notice: where similarities of test images come from is not drawn: " in capsys.readouterr().err
    assert len(auxiliaries.load_json(copied / "evaluation.json")) == 1
