"""The pages of search results, of pairs and of a comparison."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import OVERLAPS, POINT, TOOLTIP, open_page, save_image

import report
from significance import Difference

EVIL = "<script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images in folders, and with names, that HTML has to escape."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    names = ["it's <b>bold</b>", 'so "quoted" & so', "a_rather_long_name_of_a_class_without_any_place_to_break_it"]
    return [save_image(folder / name / f"{i} <i>.png", rng, (40 + 9 * i, 60), i) for i, name in enumerate(names * 3)]


def read(path: Path) -> str:
    """A page, which loads nothing from elsewhere."""
    text = path.read_text(encoding="utf-8")
    without_code = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", without_code)
    assert "<i>.png" not in text
    return text


@pytest.fixture(scope="module")
def search_page(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "search.html"
    found = [(photo, 0.25 * i, EVIL if i % 2 else None) for i, photo in enumerate(photos)]
    report.save_search_page(path, f"Search {EVIL}", [(photos[0], found), (str(photos[1]), found[:2])])
    return path


@pytest.fixture(scope="module")
def pairs_page(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.html"
    report.save_pairs_page(path, "Pairs", EVIL, [(one, photos[0], f"{EVIL} {i} bits") for i, one in enumerate(photos)])
    return path


def test_search_results_stand_in_their_order_with_distances_and_labels(search_page: Path) -> None:
    text = read(search_page)
    assert "The nearest images of 2 queries, each with its distance." in text
    first, second = text.split('<section class="found">')[1:]
    assert [float(found) for found in re.findall(r"</b>([\d.]+)", first)] == [0.25 * i for i in range(9)]
    assert re.findall(r"</b>([\d.]+)", second) == ["0.00", "0.250"]
    assert first.count("<b>&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34;&amp;</b>") == 4
    assert first.count("&lt;i&gt;.png</b>") == 5
    assert first.count("data:image/webp;base64,") == 10
    assert EVIL not in text


def test_what_does_not_fit_is_left_out_and_counted(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_BYTES", 3 * len(report.thumbnail(photos[0], 192)))
    monkeypatch.setattr(report, "MOST_FOUND", 1)
    results = [(photo, [(photo, 0.5, None), (photo, 0.6, None)]) for photo in photos]
    report.save_search_page(tmp_path / "page.html", "Search", results)
    text = read(tmp_path / "page.html")
    shown = text.count('class="found"')
    assert 1 <= shown < len(photos)
    assert f"The 1 of 2 nearest images of the first {shown} of {len(photos)} queries" in text
    report.save_pairs_page(tmp_path / "page.html", "Pairs", "These.", [(photo, photo, "same") for photo in photos])
    text = read(tmp_path / "page.html")
    shown = text.count('class="pair"')
    assert 1 <= shown < len(photos)
    assert f"The first {shown} of {len(photos)} pairs are shown." in text


def test_pairs_show_both_images_their_places_and_a_caption(pairs_page: Path, photos: list[Path]) -> None:
    text = read(pairs_page)
    assert text.count("data:image/webp;base64,") == 2 * len(photos)
    assert [int(number) for number in re.findall(r"(\d+) bits", text)] == list(range(len(photos)))
    assert EVIL not in text
    assert "pairs are shown" not in text
    assert len(re.findall(r"a_rather_long_name_of_a_class_without_any_place_to_break_it/<wbr>", text)) == 3


def test_images_that_are_gone_or_have_any_bytes_in_their_names(tmp_path: Path) -> None:
    strange = tmp_path / "caf\udce9.png"
    report.save_pairs_page(tmp_path / "page.html", "Pairs", "These.", [(strange, tmp_path / "gone.png", "gone")])
    text = read(tmp_path / "page.html")
    assert text.count("data:image/svg+xml") == 2
    assert r"caf\udce9.png" in text


# A comparison


def make_compared(**changes: Any) -> report.ComparedRuns:
    """Three configurations, of which one is worse than the reference and one can't be compared."""
    labels, nan = ["loss good", f"loss {EVIL}", "loss other"], float("nan")
    differences = [Difference(nan), Difference(-0.02, -0.03, -0.01, 0.001), Difference(nan)]
    table = [
        report.ComparedRow(
            label, [("Configuration", label), ("Recall @ 1", "0.6000 ± 0.0100")], set(), one, "0.001", i == 1, i == 0
        )
        for i, (label, one) in enumerate(zip(labels, differences))
    ]
    points = [(epoch, 0.5 + epoch / 100, 0.01) for epoch in range(1, 9)]
    bands = {labels[0]: points, labels[1]: [(epoch, mean - 0.1, nan) for epoch, mean, _ in points], labels[2]: []}
    names = ["Laysan_Albatross", f"class {EVIL}", "third"]
    classes = [report.ClassDifferences(labels[1], names, [4, 9, 2], [0.5, 0.25, 1.0], [0.75, 0.25, 0.5])]
    values: dict[str, Any] = {
        **{
            "metric": "Recall @ 1",
            "split": "test",
            "lead": f"In words {EVIL}.",
            "table": table,
            "about_table": "Means.",
        },
        **{"title": "Differences", "sentences": [f"one is {EVIL}"], "bands": bands, "classes": classes},
        **{"classes_metric": "Recall @ 1", "no_classes": {labels[2]: "its queries are different ones"}},
        **{"optimism": "Some.", "optimism_by_label": {labels[0]: "+0.0100"}, "further": {labels[1]: "lr 1"}},
        "runs": [(labels[0], "1", "", "0.6000", "+0.0100", f"runs/{EVIL}")],
    }
    return report.ComparedRuns(**{**values, **changes})


@pytest.fixture(scope="module")
def comparison_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "page.html"
    report.save_comparison_page(path, make_compared())
    return path


def test_a_comparison_counts_the_classes_that_gain_and_lose(comparison_page: Path) -> None:
    text = read(comparison_page)
    assert "1 of 3 classes gain, 1 lose, 1 stay as they are." in text
    gain, lose = (re.search(rf"<th>{title}</th>.*?</table>", text, re.DOTALL) for title in ("gain most", "lose most"))
    for found, wanted in (
        (gain, ["Laysan Albatross", "0.50", "0.75", "+0.25"]),
        (lose, ["third", "1.00", "0.50", "-0.50"]),
    ):
        assert found
        assert re.findall(r"<td[^>]*>(.*?)</td>", found[0]) == wanted
    assert "loss other: its queries are different ones." in text
    assert text.count('<svg class="interval"') == 1
    assert EVIL not in text
    assert len(text) < 2e6


def test_of_very_many_classes_some_are_drawn(tmp_path: Path) -> None:
    count, rng = 11_316, np.random.default_rng(0)  # those of Stanford Online Products
    names, sizes = [f"chair_final_{i}" for i in range(count)], [2] * count
    values = rng.random((2, count)).tolist()
    classes = [report.ClassDifferences(f"loss {EVIL}", names, sizes, *values)] * report.MOST_COMPARED
    report.save_comparison_page(tmp_path / "page.html", make_compared(classes=classes))
    assert "The chart shows 3,000 of them, chosen at random." in read(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 4e6
    (dots,) = report._draw_classes(classes[0], "red").renderers[1:]
    drawn = {names.index(name.replace(" ", "_")) for name in dots.data_source.data["name"]}
    assert len(drawn) == report.MOST_DOTS
    assert [values[0][i] for i in sorted(drawn)] == dots.data_source.data["x"].tolist()


def test_intervals_have_a_common_axis_with_zero() -> None:
    nan = float("nan")
    places = report._place_intervals([Difference(nan), Difference(-0.4, -0.6, -0.2), Difference(0.2)])
    assert places[0] == {}
    assert places[2].keys() == {"zero", "mean", "count"}
    by_value = {-0.6: places[1]["low"], -0.4: places[1]["mean"], -0.2: places[1]["high"], 0: places[1]["zero"]}
    by_value[0.2] = places[2]["mean"]
    steps = np.diff([by_value[value] for value in sorted(by_value)])
    assert steps == pytest.approx([steps[0]] * 4, abs=0.02)
    assert all(0 <= place <= 100 for place in by_value.values())


def test_a_single_configuration_has_no_differences(tmp_path: Path) -> None:
    compared = make_compared()
    alone = make_compared(
        table=compared.table[:1], bands={}, classes=[], no_classes={}, sentences=[], optimism="", further={}
    )
    report.save_comparison_page(tmp_path / "page.html", alone)
    text = read(tmp_path / "page.html")
    assert re.findall(r'<section id="(\w+)"', text) == ["results", "runs"]


# In a browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["search", "pairs", "comparison"])
def test_a_browser_shows_it(browser: Any, request: pytest.FixtureRequest, kind: str, width: int, scheme: str) -> None:
    page, problems = open_page(browser, request.getfixturevalue(f"{kind}_page"), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERLAPS, width) == []
    page.evaluate("document.querySelectorAll('img').forEach(one => { one.loading = 'eager' })")
    page.wait_for_function("[...document.images].every(one => one.complete && one.naturalWidth)")
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(brightness) < 64) == (scheme == "dark")
    assert not problems
    page.close()


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("around", "loss good, epoch 10.5100 ± 0.0100"),
        ("difference", "Laysan Albatross (4 queries)0.5000 → 0.7500+0.2500"),
    ],
)
def test_points_of_a_comparison_say_what_they_are(browser: Any, comparison_page: Path, column: str, words: str) -> None:
    page, problems = open_page(browser, comparison_page)
    x, y = page.evaluate(POINT, column)
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.wait_for_function(f"({TOOLTIP})()?.textContent.trim()")
    assert words in page.evaluate(f"({TOOLTIP})().textContent")
    assert not problems
    page.close()
