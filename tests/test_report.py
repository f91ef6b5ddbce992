"""Pages: what they show of known embeddings, that they need nothing else, and how a browser shows them."""

from __future__ import annotations

import base64
import io
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import OVERLAPS, POINT, SMALL, TOOLTIP, csv_rows, make_tree, open_page, save_image
from PIL import Image

import auxiliaries
import config
import evaluate
import evaluate_runs
import main
import records
import report
import tune
from auxiliaries import UserError
from datasets import ImageSet, RetrievalSet, Splits
from evaluate import EmbeddingSpace

MOST_BYTES = 6_000_000  # of a page


# What an embedding space shows


def noisy_space(gallery: bool = False, seed: int = 0) -> EmbeddingSpace:
    """Points of five classes that overlap; with a gallery, half of the queries are in it."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, 5, 60))
    centers = rng.normal(size=(5, 6))
    points = torch.from_numpy(centers[labels] + rng.normal(size=(60, 6))).float()
    if not gallery:
        return EmbeddingSpace(points, labels)
    place = np.where(np.arange(40) < 20, np.arange(40) + 20, -1)  # queries 0 to 19 are items 20 to 39
    order = np.arange(60)
    queries = np.concatenate([order[20:40], order[:20]])
    return EmbeddingSpace(points[queries], labels[queries], points, labels, place)


def ranked(space: EmbeddingSpace, query: int) -> list[int]:
    """All items but the query itself, nearest first, by plain differences."""
    distances = [float(((space.query[query] - item).double() ** 2).sum()) for item in space.gallery]
    order = sorted(range(len(distances)), key=distances.__getitem__)
    return [item for item in order if item != space.query_in_gallery[query]]


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("max_scores", [2**24, 150])
def test_nearest_items(gallery: bool, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_SCORES", max_scores)
    space, queries = noisy_space(gallery), np.array([3, 17, 39, 4])
    found = report.nearest_items(space, queries, 7)
    assert found.tolist() == [ranked(space, query)[:7] for query in queries]
    assert report.nearest_items(space, queries, 1000).shape == (4, 59)
    assert report.nearest_items(space, queries[:0], 7).shape == (0, 7)


@pytest.mark.parametrize("gallery", [False, True])
def test_worst_queries(gallery: bool) -> None:
    space = noisy_space(gallery)
    ranks = {}
    for query in range(len(space.query)):
        is_right = [space.gallery_labels[item] == space.query_labels[query] for item in ranked(space, query)]
        ranks[query] = is_right.index(True) + 1
    by_class: dict[int, int] = {}
    for query in sorted(ranks, key=lambda query: -ranks[query]):
        if ranks[query] > 1:
            by_class.setdefault(int(space.query_labels[query]), query)
    assert len(by_class) >= 3
    worst = report.find_worst_queries(space, 3)
    assert [(one.query, one.rank) for one in worst] == [(query, ranks[query]) for query in [*by_class.values()][:3]]
    for one in worst:
        items, label = ranked(space, one.query), space.query_labels[one.query]
        assert one.wrong == next(item for item in items if space.gallery_labels[item] != label) == items[0]
        assert one.right == next(item for item in items if space.gallery_labels[item] == label)


def test_no_query_is_the_worst_where_all_are_right() -> None:
    space = EmbeddingSpace(torch.eye(4).repeat_interleave(3, dim=0), np.arange(4).repeat(3))
    assert report.find_worst_queries(space, 5) == []
    assert report.find_confused_classes(report.search_some(space, 0), 5) == []


@pytest.mark.parametrize("gallery", [False, True])
def test_confused_classes(gallery: bool) -> None:
    space = noisy_space(gallery)
    nearest = [ranked(space, query)[0] for query in range(len(space.query))]
    wrong = [
        (int(label), int(space.gallery_labels[item]), query)
        for query, (label, item) in enumerate(zip(space.query_labels, nearest))
        if label != space.gallery_labels[item]
    ]
    counts = Counter((own, other) for own, other, _ in wrong)
    totals = Counter(tuple(sorted((own, other))) for own, other, _ in wrong)
    sizes = Counter(space.query_labels.tolist())
    confused = report.find_confused_classes(report.search_some(space, 0), 4)
    assert [sum(one.counts) for one in confused] == sorted(totals.values(), reverse=True)[:4]
    for one in confused:
        a, b = one.classes
        assert one.counts == (counts[a, b], counts[b, a])
        assert one.sizes == (sizes[a], sizes[b])
        assert sorted(one.examples) == [query for own, other, query in wrong if {own, other} == {a, b}]
        items = [nearest[query] for query in one.examples]
        distances = space.distances(torch.tensor(one.examples), torch.tensor(items))
        assert (distances.diff() >= 0).all()


@pytest.mark.parametrize("gallery", [False, True])
def test_occurrences_and_their_skewness(gallery: bool) -> None:
    space = noisy_space(gallery)
    searched = report.search_some(space, 0)
    counts = Counter(item for query in range(len(space.query)) for item in ranked(space, query)[: report.NEAR])
    occurrences = report.count_occurrences(searched)
    assert occurrences.tolist() == [counts[item] for item in range(len(space.gallery))]
    assert report.skewness(occurrences) == pytest.approx(scipy.stats.skew(occurrences))
    assert report.skewness(np.full(5, 3)) == 0


def test_large_spaces_are_searched_with_some_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    space = noisy_space()
    monkeypatch.setattr(report, "MIN_SEARCHED", 7)
    monkeypatch.setattr(report, "MAX_PRODUCTS", 10 * 60 * 6)
    searched = report.search_some(space, 3)
    assert len(set(searched.queries.tolist())) == 10
    assert searched.queries.tolist() == report.search_some(space, 3).queries.tolist()
    monkeypatch.setattr(report, "MAX_PRODUCTS", 1)
    assert len(report.search_some(space, 3).queries) == 7
    monkeypatch.setattr(report, "MAX_SEARCHED", 5)
    assert len(report.search_some(space, 3).queries) == 5


@pytest.mark.parametrize("gallery", [False, True])
def test_distances_are_of_pairs_of_a_class_and_of_two_classes(gallery: bool) -> None:
    space = noisy_space(gallery)
    possible: dict[bool, set[float]] = {True: set(), False: set()}
    for query in range(len(space.query)):
        for item in range(len(space.gallery)):
            if item != space.query_in_gallery[query]:
                distance = float((space.query[query].double() - space.gallery[item].double()).norm())
                possible[bool(space.query_labels[query] == space.gallery_labels[item])].add(round(distance, 9))
    same, other = report.sample_distances(space, 20_000, seed=1)
    assert len(same) == 20_000
    assert {round(distance, 9) for distance in same.tolist()} == possible[True]
    assert {round(distance, 9) for distance in other.tolist()} == possible[False]


@pytest.mark.parametrize("distance", [0.0, 1e-25, 1.0])
def test_distances_that_differ_by_rounding_are_drawn(distance: float) -> None:
    same, other = np.full(3, distance), np.full(3, np.nextafter(distance, 2 * distance))
    for bars in report._draw_distances({"same class": same, "other classes": other}).renderers:
        assert bars.data_source.data["top"].sum() == pytest.approx(100)
        assert (bars.data_source.data["right"] > bars.data_source.data["left"]).all()


def test_spectrum() -> None:
    points = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 2, 1, 1, 1, 1, 0])
    shares, rank = report.compute_spectrum(points)
    expected = np.sort(np.linalg.eigvalsh(np.cov(points.double().numpy().T)))[::-1]
    expected = expected.clip(0) / expected.sum()
    assert shares == pytest.approx(expected, abs=1e-9)
    assert rank == pytest.approx(math.exp(scipy.stats.entropy(expected)))
    assert report.compute_spectrum(torch.cat([torch.eye(5), -torch.eye(5)]))[1] == pytest.approx(5)
    assert report.compute_spectrum(torch.ones(4, 3))[1] == 0


def test_map_has_whole_classes() -> None:
    labels = np.arange(30).repeat(50)
    chosen = report.choose_for_map(labels, 300, seed=0)
    assert len(set(chosen.tolist())) == 300
    assert sorted(Counter(labels[chosen].tolist()).values()) == [20, *[40] * 7]
    assert chosen.tolist() == report.choose_for_map(labels, 300, seed=0).tolist()
    assert chosen.tolist() != report.choose_for_map(labels, 300, seed=1).tolist()
    assert sorted(report.choose_for_map(labels[:80], 300, seed=0)) == [*range(80)]


@pytest.mark.parametrize("points", [np.ones((30, 4)), np.zeros((3, 4)), np.ones((12, 1)), np.eye(5)])
def test_few_or_equal_points_are_laid_out(points: np.ndarray) -> None:
    flat = report.flatten(points)
    assert flat.shape == (len(points), 2)
    assert np.isfinite(flat).all()
    assert len(np.unique(flat.round(9), axis=0)) == len(np.unique(points, axis=0))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e38])
def test_points_of_any_scale_are_laid_out(scale: float) -> None:
    points = np.random.default_rng(0).normal(size=(20, 4)).clip(-2, 2)
    flat = report.flatten((points * scale).astype(np.float32))  # t-SNE would end the process
    assert np.isfinite(flat).all()
    assert len(np.unique(flat.round(3), axis=0)) == 20


# Parts


def decoded(uri: str) -> Image.Image:
    kind, data = uri.split(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_thumbnails(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", np.random.default_rng(0), size=(90, 30))
    pixels = np.asarray(Image.open(path))
    for image in (path, str(path), Image.open(path), pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)):
        small = decoded(report.thumbnail(image, 45))
        assert small.size == (45, 15)
        assert np.abs(np.asarray(small).mean(axis=(0, 1)) - pixels.mean(axis=(0, 1))).max() < 4
    assert decoded(report.thumbnail(path, 500)).size == (90, 30)
    (tmp_path / "b.png").write_bytes(path.read_bytes()[:100])
    assert report.thumbnail(tmp_path / "b.png", 45) == report.thumbnail(tmp_path / "none.png", 45) == report.UNREADABLE


def test_texts_are_escaped_and_a_page_needs_a_folder(tmp_path: Path) -> None:
    report.render("base.html", tmp_path / "page.html", title="a <b>&</b>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>a &lt;b&gt;&amp;&lt;/b&gt;</h1>" in page
    assert "<script" not in page  # Bokeh's is there where there are charts
    with pytest.raises(UserError, match=r"page\.html can't be written"):
        report.render("base.html", tmp_path / "none" / "page.html", title="")


# The page of a run


def fake_run(folder: Path, sets: list[RetrievalSet[ImageSet]], *flags: str, epochs: int = 3) -> Any:
    """What the page needs of a run, with rows of some epochs."""
    opt = config.resolve(config.parse([*SMALL, "--dataset", "tiny", "--savename", folder.name, *flags]))
    rows = [{"Epochs": epoch, "Time": 1.0, "Recall @ 1": 0.5 + epoch / 10} for epoch in range(1, epochs + 1)]
    train = [{"Epochs": row["Epochs"], "Time": 1.0, "Train Loss": 1.5, "Iterations": 3} for row in rows]
    rows = rows or [{"Epochs": 0, "Time": 1.0, "Recall @ 1": 0.5}]
    log = SimpleNamespace(rows={"train": train, "val": rows, "test": [], "train_eval": []})
    net = SimpleNamespace(parameters=lambda: [torch.zeros(1000, 300)], embed_dim=16)
    method = SimpleNamespace(net=net)
    seen = sets[0].query.subset(np.arange(0))
    return SimpleNamespace(folder=folder, opt=opt, splits=Splits(seen, [], sets), log=log, method=method)


def save_page(run: Any, *spaces: EmbeddingSpace) -> str:
    summary = records.build_summary(run.log.rows, "Recall @ 1", False, False, True)
    report.save_run_page(run, spaces, summary)
    return (run.folder / "report.html").read_text(encoding="utf-8")


def images_of(space: EmbeddingSpace, folder: Path) -> RetrievalSet[ImageSet]:
    """A set of that many images, of which few exist."""
    names = [[f"bird_{label}" for label in range(int(space.gallery_labels.max()) + 1)]]

    def image_set(kind: str, labels: np.ndarray) -> ImageSet:
        paths = [str(folder / kind / f"{i}.png") for i in range(len(labels))]
        return ImageSet(paths, labels[:, None], names)

    gallery = None if space.is_own else image_set("gallery", space.gallery_labels)
    return RetrievalSet("test", image_set("query", space.query_labels), gallery)


@pytest.mark.parametrize("gallery", [False, True])
def test_the_page_shows_what_is_in_the_space(gallery: bool, tmp_path: Path) -> None:
    """Images that are gone are replaced by a cross."""
    space = noisy_space(gallery)
    images = images_of(space, tmp_path)
    save_image(Path(images.query.paths[0]), np.random.default_rng(0))
    page = save_page(fake_run(tmp_path, [images]), space)
    assert report.UNREADABLE.replace("'", "&#39;") in page
    for worst in report.find_worst_queries(space, report.WORST):
        assert f"rank {worst.rank}, " in page
    for one in report.find_confused_classes(report.search_some(space, 1), 1):
        a, b = (f"bird {label}" for label in one.classes)
        assert f"{one.counts[0]} of {one.sizes[0]} {a}, {one.counts[1]} of {one.sizes[1]} {b}" in page
    occurrences = report.count_occurrences(report.search_some(space, 1))
    assert f"in {occurrences.max()} lists" in page
    results = evaluate.query_results(space)
    lowest = min(results["ap_at_r"][space.query_labels == label].mean() for label in range(5))
    assert f"{lowest:.3f}" in page
    assert "0.3 million parameters" in page
    assert "trained for 3 epochs by marginloss with distance sampling" in page
    assert ("20" if gallery else "60") in page
    where = "40 queries in a gallery of 60 images" if gallery else "among 60 images"
    assert f"{where} of 5 classes that it has not seen" in page


def test_the_page_of_a_network_before_training(tmp_path: Path) -> None:
    space = noisy_space()
    page = save_page(fake_run(tmp_path, [images_of(space, tmp_path)], "--n_epochs", "0", epochs=0), space)
    assert "as it is before training" in page
    assert 'id="curves"' not in page
    assert 'id="map"' in page


def test_a_space_of_one_class_or_of_equal_points_has_a_page(tmp_path: Path) -> None:
    for space in (
        EmbeddingSpace(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), np.zeros(12, int)),
        EmbeddingSpace(torch.ones(12, 4), np.arange(3).repeat(4)),
    ):
        page = save_page(fake_run(tmp_path, [images_of(space, tmp_path)]), space)
        assert 'id="retrievals"' in page


def test_pages_are_small_whatever_the_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, which can't be compressed: as many bytes as pixels."""
    monkeypatch.setattr(report, "thumbnail", lambda _, size, exif: f"data:,{'A' * size**2}")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 100, 3000)
    space = EmbeddingSpace(torch.from_numpy(rng.normal(size=(3000, 32)) + 0.1 * labels[:, None] % 7).float(), labels)
    page = save_page(fake_run(tmp_path, [images_of(space, tmp_path)]), space)
    assert 3_000_000 < len(page.encode()) < MOST_BYTES


def test_the_page_of_folds_leads_to_theirs(tmp_path: Path) -> None:
    flags = ["--split_scheme", "cross_validation", "--num_training_sets", "2"]
    opt = config.resolve(config.parse([*SMALL, "--report", "--dataset", "tiny", *flags]))
    summaries = {}
    for fold, value in enumerate((0.25, 0.75)):
        (tmp_path / f"fold_{fold}").mkdir()
        summaries[tmp_path / f"fold_{fold}"] = {"selected": {"epoch": 7, "test": {"Recall @ 1": value}}}
    (tmp_path / "fold_0" / "report.html").write_text("")
    rows = [{"Network": "selected", "Split": "test", "Metric": "Recall @ 1", "Mean": 0.5, "CI 95 %": 0.125}]
    report.save_folds_page(opt, tmp_path, rows, summaries)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0.5000 ± 0.1250" in page
    assert '<a href="fold_0/report.html">fold_0</a>' in page
    assert "fold_1/report.html" not in page
    assert all(text in page for text in ("0.2500", "0.7500", "2 folds of cross_validation"))
    report.save_folds_page(config.with_flags(opt, report=False), tmp_path / "none", rows, summaries)


@pytest.mark.parametrize(("module", "name"), [(report, "save_run_page"), (evaluate_runs, "selected_spaces")])
def test_a_full_disk_or_a_lost_image_is_no_reason_to_fail(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("report.html can't be written (No space left on device): free some space")

    monkeypatch.setattr(module, name, refuse)
    space = noisy_space()
    run = fake_run(tmp_path, [images_of(space, tmp_path)], "--report")
    run.spaces = {(3, "val"): [space]}
    loaders: Any = SimpleNamespace(val=[None], test=[])
    evaluate_runs.save_report(run, loaders, torch.device("cpu"), {})
    assert "there is no page of this run: report.html can't be written (No space left" in capsys.readouterr().err


def test_a_missing_library_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    space = noisy_space()
    run = fake_run(tmp_path, [images_of(space, tmp_path)], "--report")
    run.spaces = {(3, "val"): [space]}
    loaders: Any = SimpleNamespace(val=[None], test=[])
    evaluate_runs.save_report(run, loaders, torch.device("cpu"), {})
    words = "there is no page of this run: a page needs bokeh.plotting: pip install jinja2 bokeh"
    assert words in capsys.readouterr().err


# A whole run, and how a browser shows its page


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a page; a class has a name that would break it unescaped."""
    source = tmp_path_factory.mktemp("source")
    images = make_tree(source / "tiny" / "images", classes=12)
    (images / "class_9").rename(images / "class_<b>&'\"")
    flags = [
        "--report",
        "--no-tensorboard",
        "--no-pictures",
        "--bs",
        "8",
        "--samples_per_class",
        "2",
        "--embed_dim",
        "16",
    ]
    flags += ["--eval_metrics", "Recall", "MAP@R", "NMI", "--check_untrained_accuracy", "--n_epochs", "2"]
    where = ["--dataset", "tiny", "--source_path", str(source), "--save_path", str(source), "--savename", "run"]
    main.command([*SMALL, *where, *flags])
    return source / "tiny" / "run"


def test_a_run_ends_with_a_page(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    selected = auxiliaries.load_json(finished_run / "summary.json")["selected"]
    for value in selected["test"].values():
        assert f"{value:.4f}" in page
    assert f"The dotted line is the selected epoch, {selected['epoch']}." in page
    sections = ("results", "curves", "map", "retrievals", "classes", "hubs", "geometry", "making")
    assert all(f'id="{section}"' in page for section in sections)
    assert f"--reproduce_results {finished_run}" in page
    assert "class &lt;b&gt;&amp;&#39;&#34;" in page
    assert "class <b>" not in page.replace("\\u003cb", "<b").split("<script", 1)[0]


def test_a_page_is_self_contained_and_small(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < MOST_BYTES
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", markup)
    assert not re.findall(r"@import|url\((?!data:)", markup)
    assert not re.findall(r"<script[^>]+src=", page)


def test_a_resumed_run_has_a_page(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It was stopped after its last epoch: the network is evaluated once more."""
    folder = shutil.copytree(finished_run, tmp_path / "tiny" / "run")
    page = (folder / "report.html").read_text(encoding="utf-8")
    (folder / "report.html").unlink()
    (folder / "summary.json").unlink()
    main.command(["--resume_training", "--savename", "run", "--save_path", str(tmp_path)])
    assert f"page to look into: {folder / 'report.html'}" in capsys.readouterr().out
    again = (folder / "report.html").read_text(encoding="utf-8")

    def pictures(page: str) -> list[str]:
        return re.findall(r'<img src="(data:[^"]*)"', page)

    assert pictures(again) == pictures(page)
    assert "After epoch" not in again
    more = ["--n_epochs", "3", "--lr", "0.002", "--kernels", "1"]
    main.command(["--resume_training", "--savename", "run", "--save_path", str(tmp_path), *more])
    changed = re.findall("After epoch 2 it went on with <code>(.*)</code>", (folder / "report.html").read_text())
    assert len(changed) == 1
    assert set(changed[0].split(", ")) >= {"--n_epochs 3", "--lr 0.002"}
    assert "--kernels" not in changed[0]
    (folder / "summary.json").unlink()
    main.command(["--resume_training", "--savename", "run", "--save_path", str(tmp_path), "--no-report"])
    assert not (folder / "report.html").exists()


def test_trials_have_no_page_unless_it_is_asked_for() -> None:
    flags = ["--dataset", "tiny", "--savename", "study", "--lr~LOG_BAYESIAN~", "1e-6", "1e-2"]
    for more, expected in (([], False), (["--report"], True), (["--no-report"], False)):
        assert tune.parse([*flags, *more]).flags({"lr": 1e-4}).report == expected


@pytest.mark.slow
def test_each_fold_has_a_page(source: Path, tmp_path: Path) -> None:
    flags = ["--dataset", "cv", "--split_scheme", "cross_validation", "--num_training_sets", "2", "--n_epochs", "1"]
    flags += ["--source_path", str(source), "--save_path", str(tmp_path), "--savename", "run", "--bs", "8"]
    main.command([*SMALL, *flags, "--samples_per_class", "2", "--no-tensorboard", "--no-pictures", "--report"])
    page = (tmp_path / "cv" / "run" / "report.html").read_text(encoding="utf-8")
    for fold in (0, 1):
        assert f'href="fold_{fold}/report.html"' in page
        assert f"<h1>run, fold {fold}</h1>" in (tmp_path / "cv" / "run" / f"fold_{fold}" / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it(browser: Any, finished_run: Path, width: int, scheme: str) -> None:
    page, problems = open_page(browser, finished_run / "report.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERLAPS, width) == []
    assert page.evaluate("[...document.images].filter(one => !one.naturalWidth).length") == 0
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(part) for part in re.findall(r"\d+", color)[:3]])
    assert (brightness < 64) == (scheme == "dark")
    assert not problems
    page.close()


def test_points_show_their_values_and_their_image(browser: Any, finished_run: Path) -> None:
    page, problems = open_page(browser, finished_run / "report.html")

    def hover(column: str) -> Any:
        x, y = page.evaluate(POINT, column)
        page.mouse.move(x - 2, y)
        page.mouse.move(x, y)
        page.wait_for_function(f"({TOOLTIP})()?.textContent.trim()")
        return page.evaluate_handle(TOOLTIP)

    text = hover("name").evaluate("root => root.textContent")
    loss = float(csv_rows(finished_run / "log_train_Base.csv")[0]["Train Loss"])
    assert f"training loss, epoch 1{loss:.4f}" in text
    page.mouse.move(1, 1)
    tooltip = hover("image")
    page.wait_for_function("root => root.querySelector('img')?.naturalWidth > 20", arg=tooltip)
    assert "class" in tooltip.evaluate("root => root.textContent")
    assert not problems
    page.close()


def test_a_chart_may_hold_any_text(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(report.TEMPLATES, tmp_path / "templates")
    template = '{% extends "base.html" %}{% block content %}{{ plots.one }}{% endblock %}'
    (tmp_path / "templates" / "chart.html").write_text(template)
    monkeypatch.setattr(report, "TEMPLATES", tmp_path / "templates")
    evil = "</script><script>alert(1)</script><!--<script>"
    chart = report.new_chart("x", "y")
    report.add_curve(chart, {"x": [1, 2], "y": [1, 2], "name": [evil] * 2}, "red", "@name")
    report.render("chart.html", tmp_path / "page.html", {"one": chart}, title=evil)
    page, problems = open_page(browser, tmp_path / "page.html")
    assert page.evaluate("document.title") == evil
    assert not problems
    page.close()
