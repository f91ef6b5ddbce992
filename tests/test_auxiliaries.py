"""auxiliaries.py: flags and exit codes, seeds, devices, files that survive failures, records and plots."""

from __future__ import annotations

import argparse
import csv
import errno
import html
import os
import pickle
import random
import re
import resource
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from auxiliaries import (
    FlagParser,
    FrozenNamespace,
    GradientRecord,
    Retrieval,
    UserError,
    append_row,
    create_run_folder,
    load_checkpoint,
    number,
    pick_device,
    plain,
    replacing,
    run_command,
    save_checkpoint,
    save_curve,
    save_info_plot,
    save_parameters,
    save_recoveries,
    seed_everything,
    seeded,
    upload,
)


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="main.py")
    parser.add_argument("--loss", choices=["triplet", "npair", "proxynca"], default="npair", help="what is minimised")
    parser.add_argument("--arch", choices=[f"network{i}" for i in range(20)], help="which network")
    parser.add_argument("--bs", type=number(int, 1), default=112, help="images a batch")
    parser.add_argument("--gamma", type=number(float, 0, exclusive=True), default=0.3, help="a factor")
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lossy", "npair"], r"unknown flag --lossy \(did you mean --loss\?\)"),
        (["--gama=0.3"], r"unknown flag --gama=0\.3 \(did you mean --gamma\?\)"),
        (["--gam", "0.3"], r"unknown flag --gam \(did you mean --gamma\?\)"),  # no abbreviations
        (["--qqqqqq"], r"unknown flag --qqqqqq: "),
        (["stray"], "unknown argument stray"),
        (["--loss", "tripplet"], r"--loss tripplet .*did you mean triplet\?.*triplet, npair, proxynca"),
        (["--arch", "netwrk7"], r"--arch netwrk7 is unknown \(did you mean network\d+\?\)$"),
        (["--bs", "many"], "--bs.*invalid int value.*many"),
        (["--bs", "1.5"], "--bs.*invalid int value"),
        (["--bs", "0"], "--bs: 0 is not at least 1"),
        (["--bs", "1" + 400 * "0"], "--bs"),
        (["--bs"], "--bs.*expected one argument"),
        (["--gamma", "0"], "--gamma: 0 is not above 0"),
        (["--gamma", "-inf"], "--gamma"),
        (["--gamma", "inf"], "--gamma: inf is not"),
        (["--gamma", "nan"], "--gamma: nan is not"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_flag_is_one_sentence(parser: FlagParser, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parser.parse_args(argv)
    assert "\n" not in str(caught.value)


def test_flags_that_are_right_and_the_manual(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    opt = parser.parse_args(["--loss=triplet", "--bs", "1", "--gamma", "1e-3"])
    assert vars(opt) == {"loss": "triplet", "arch": None, "bs": 1, "gamma": 0.001}
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    manual = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "images a batch (default: 112)" in manual
    assert "None" not in manual


def fail_with(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        (lambda: {"Recall @ 1": 0.5}, 0, ""),
        (fail_with(UserError("--bs 0 is wrong: raise it")), 2, "error: --bs 0 is wrong: raise it"),
        (fail_with(KeyboardInterrupt()), 130, "stopped; what was saved is kept"),
    ],
    ids=["success", "user's error", "Ctrl-C"],
)
def test_exit_codes(command: Callable[[], object], code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(command)
    printed = capsys.readouterr()
    assert stopped.value.code == code
    assert printed.err.strip() == line
    assert not printed.out


def test_anything_else_is_a_bug_and_shows_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(fail_with(ZeroDivisionError()))


def test_frozen_flags_can_be_read_only() -> None:
    opt = FrozenNamespace(bs=4)
    for change in (lambda: setattr(opt, "bs", 5), lambda: setattr(opt, "lr", 1), lambda: delattr(opt, "bs")):
        with pytest.raises(AttributeError):
            change()
    assert vars(opt) == {"bs": 4}
    assert pickle.loads(pickle.dumps(opt)) == opt


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(1, dtype=torch.float64))


def test_seeds_repeat_for_every_generator() -> None:
    seed_everything(1, 5)
    first = draw()
    assert len(set(first)) == 3
    seed_everything(1, 5)
    assert draw() == first


@pytest.mark.parametrize("other", [(1, 6), (2, 5), (5, 1), (0, 5), (1,), (1, 5, 1), (1, 5, 0)], ids=str)
def test_other_numbers_are_another_seed(other: tuple[int, ...]) -> None:
    seed_everything(1, 5)
    first = draw()
    seed_everything(*other)
    assert not set(draw()) & set(first)


def draw_and_fail() -> None:
    draw()
    raise KeyError


def test_seeded_blocks_nest_and_leave_no_trace() -> None:
    def draw_twice(nested: bool) -> list[tuple[float, float, float]]:
        with seeded(3, 1):
            draws = [draw()]
            if nested:
                with pytest.raises(KeyError), seeded(3, 2):
                    draw_and_fail()
            draws.append(draw())
        return draws

    seed_everything(9)
    expected = [draw(), draw()]
    seed_everything(9)
    assert draw() == expected[0]
    alone, nested = draw_twice(False), draw_twice(True)
    assert draw() == expected[1]
    assert alone == nested
    seed_everything(3, 1)
    assert draw() == alone[0]


def test_the_cpu_is_the_device_when_asked_for_or_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(-1) == torch.device("cpu")
    assert not capsys.readouterr().err
    assert pick_device(0) == torch.device("cpu")
    assert capsys.readouterr().err == "notice: no CUDA device was found: running on the CPU\n"


def test_cuda_devices_are_chosen_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert pick_device(-1) == torch.device("cpu")
    assert pick_device(1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"--gpu 2 .* 0 to 1"):
        pick_device(2)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["array", "tensor"])
def test_upload_to_the_cpu_gives_the_same_numbers(kind: Callable[[Any], Any]) -> None:
    values = [[1, 2], [3, -4]]
    uploaded = upload(kind(values), torch.device("cpu"))
    assert isinstance(uploaded, torch.Tensor)
    assert uploaded.dtype == torch.int64
    assert uploaded.tolist() == values


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def write_and_fail(path: Path, error: BaseException) -> None:
    path.write_text("new, but on")
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), OSError(errno.ENOSPC, "no space left")])
def test_a_failed_rewrite_leaves_the_old_file_alone(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with replacing(path) as beside:
        beside.write_text("old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, replacing(path) as beside:
        write_and_fail(beside, error)
    if isinstance(error, OSError):
        assert re.search(r"file.txt can't be written \(no space left\): make room", str(caught.value))
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file.txt"}
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == {"file.txt"}


def test_plain_turns_everything_into_builtin_types() -> None:
    tensor = torch.ones(2)
    value = plain(
        {
            "a": np.float32(0.5),
            "b": [np.int64(3), np.bool_(True), (1, None)],
            Path("c"): {"d": Path("/x/y"), np.str_("e"): tensor},
        }
    )
    assert value == {"a": 0.5, "b": [3, True, [1, None]], "c": {"d": "/x/y", "e": tensor}}
    assert value["c"]["e"] is tensor
    assert [type(entry) for entry in (value["a"], *value["b"])] == [float, int, bool, list]


def test_checkpoints_come_back_with_tensors_and_plain_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.5)
    net(torch.rand(5, 3)).square().sum().backward()
    optimizer.step()
    state = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "metrics": {"Recall @ 1": np.float64(0.25), "count": np.int64(7)},
        "opt": {"save_path": Path("/some/where"), "nested": argparse.Namespace(bs=4), "k_vals": (1, 2)},
    }
    save_checkpoint(tmp_path / "last.pth.tar", state)
    loaded = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert loaded["metrics"] == {"Recall @ 1": 0.25, "count": 7}
    assert loaded["opt"] == {"save_path": "/some/where", "nested": "Namespace(bs=4)", "k_vals": [1, 2]}

    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(load_checkpoint(tmp_path / "last.pth.tar")["state_dict"])
    assert all(torch.equal(own, was) for own, was in zip(other.state_dict().values(), net.state_dict().values()))
    torch.optim.Adam(other.parameters()).load_state_dict(loaded["optimizer"])


def test_a_checkpoint_that_fails_midway_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth.tar"
    save_checkpoint(path, {"epoch": 1, "weights": torch.arange(1000)})

    def save_half(state: Any, file: Any) -> None:
        content = path.read_bytes()
        if hasattr(file, "write"):
            file.write(content[: len(content) // 2])
        else:
            Path(file).write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(UserError, match=r"last\.pth\.tar can't be written \(No space left on device\)"):
        save_checkpoint(path, {"epoch": 2, "weights": torch.arange(1000)})
    assert load_checkpoint(path)["epoch"] == 1
    assert names_in(tmp_path) == {"last.pth.tar"}


@pytest.fixture
def files_of_at_most_20_kb() -> Iterator[None]:
    """Writing further fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_on_a_full_disk_is_one_sentence(tmp_path: Path, files_of_at_most_20_kb: None) -> None:
    path = tmp_path / "last.pth.tar"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(UserError, match=r"last\.pth\.tar can't be written"):
        save_checkpoint(path, {"epoch": 2, "weights": torch.zeros(10_000)})
    assert load_checkpoint(path) == {"epoch": 1}
    assert names_in(tmp_path) == {"last.pth.tar"}


def test_a_checkpoint_into_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.last\.pth\.tar can't be written"):
        save_checkpoint(tmp_path / "gone" / "last.pth.tar", {"epoch": 1})


def torch_bytes(path: Path, zipped: bool) -> bytes:
    torch.save({"weight": torch.arange(100.0), "opt": {"k_vals": [1, 2]}}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_cut_off_checkpoints_are_refused_wherever_they_end(zipped: bool, tmp_path: Path) -> None:
    """torchvision still publishes weights, GoogLeNet's for one, in the format of before torch 1.6."""
    content = torch_bytes(tmp_path / "whole.pth", zipped)
    path = tmp_path / "cut.pth"
    others = {}  # by length: what came instead of the one sentence
    for length in range(0, len(content) - 1, 5):
        path.write_bytes(content[:length])
        try:
            others[length] = repr(load_checkpoint(path))
        except UserError:
            continue
        except Exception as error:
            others[length] = repr(error)
    assert not others


class Arbitrary:
    """Something that no checkpoint should hold."""


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Arbitrary()),
        pickle.dumps({"lr": 0.1, "path": Path("x")}),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"<!DOCTYPE html><html>404</html>",
        b"PK\x05\x06" + 18 * b"\0",
    ],
    ids=["object", "hypa.pkl", "git-lfs", "html", "empty zip"],
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.pth is no whole checkpoint"):
        load_checkpoint(tmp_path / "odd.pth")


def test_a_checkpoint_holds_no_objects_and_exists(tmp_path: Path) -> None:
    torch.save({"net": Arbitrary()}, tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"object\.pth"):
        load_checkpoint(tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"missing\.pth can't be opened: No such file"):
        load_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="can't be opened: Is a directory"):
        load_checkpoint(tmp_path)


def test_run_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    parent = tmp_path / "results" / "tiny"
    made = [create_run_folder(parent, "run") for _ in range(3)]
    assert [folder.name for folder in made] == ["run", "run_1", "run_2"]
    assert all(folder.is_dir() for folder in made)
    (parent / "other").write_text("a file")
    assert create_run_folder(parent, "other").name == "other_1"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_names_that_are_no_folder_name_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--savename"):
        create_run_folder(tmp_path, name)
    assert not names_in(tmp_path)


def test_a_place_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    for parent, name in ((tmp_path / ("x" * 300), "run"), (tmp_path, "x" * 300)):
        with pytest.raises(UserError, match=r"too long.*--save_path"):
            create_run_folder(parent, name)


def test_a_place_where_no_run_folder_can_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file is no folder that can be written to: choose another --save_path"):
            create_run_folder(parent, "run")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*--save_path"):
        create_run_folder(tmp_path, "run")
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match=r"can be written to: choose another --save_path"):
        create_run_folder(tmp_path, "run")


def test_parameters_are_kept_as_builtin_types_and_as_text(tmp_path: Path) -> None:
    save_parameters(tmp_path, {"lr": np.float64(0.5), "k_vals": (1, 2), "arch": "ü", "path": Path("x")})
    assert pickle.loads((tmp_path / "hypa.pkl").read_bytes()) == {
        "lr": 0.5,
        "k_vals": [1, 2],
        "arch": "ü",
        "path": "x",
    }
    assert b"numpy" not in (tmp_path / "hypa.pkl").read_bytes()
    text = (tmp_path / "Parameter_Info.txt").read_text(encoding="utf-8")
    assert text == "arch: ü\nk_vals: [1, 2]\nlr: 0.5\npath: x\n"


def test_rows_stand_below_one_header(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    append_row(path, {"Epochs": 1, "NMI": 0.5, "a, b": 1.0})
    append_row(path, {"Epochs": 2, "NMI": 0.25, "a, b": 2.0})
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["Epochs", "NMI", "a, b"], ["1", "0.5", "1.0"], ["2", "0.25", "2.0"]]
    with pytest.raises(UserError, match="can't be written"):
        append_row(tmp_path / "gone" / "log.csv", {"Epochs": 1})


def test_values_stand_under_their_name_in_whatever_order_they_come(tmp_path: Path) -> None:
    append_row(tmp_path / "log.csv", {"Epochs": 1, "NMI": 0.5})
    append_row(tmp_path / "log.csv", {"NMI": 0.25, "Epochs": 2})
    assert (tmp_path / "log.csv").read_text().split() == ["Epochs,NMI", "1,0.5", "2,0.25"]


def test_gradient_statistics_equal_numpys_over_several_saves(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 7, 3)).astype(np.float32)  # (iterations, D, features)
    weight = nn.Parameter(torch.zeros(7, 3))
    record, path = GradientRecord(), tmp_path / "grad_measure.pkl"
    for iteration, gradient in enumerate(gradients):
        weight.grad = torch.from_numpy(gradient.copy())
        record.add(weight)
        weight.grad.zero_()  # what comes later leaves the record alone
        if iteration in (1, 4):
            record.save(path)
            done, size = gradients[: iteration + 1], np.abs(gradients[: iteration + 1])
            expected = {
                "mean": done.mean(axis=1),
                "std": done.std(axis=1),
                "abs_mean": size.mean(axis=1),
                "abs_std": size.std(axis=1),
            }
            saved = pickle.loads(path.read_bytes())
            assert saved.keys() == expected.keys()
            for name in expected:
                np.testing.assert_allclose(saved[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def svg_texts(path: Path) -> list[str]:
    """All texts of a figure: matplotlib writes them as comments beside the glyphs."""
    tree = ET.fromstring(path.read_text(encoding="utf-8"), ET.XMLParser(target=ET.TreeBuilder(insert_comments=True)))
    comments = [element.text or "" for element in tree.iter() if element.tag is ET.Comment]
    return [html.unescape(text).replace("\N{NO-BREAK SPACE}", " ").strip() for text in comments]


def metric_rows(names: list[str], epochs: int = 3) -> list[dict[str, float]]:
    values = np.random.default_rng(0).random((epochs, len(names)))
    return [{"Epochs": i + 1, "Time": 9.0, **dict(zip(names, row.tolist()))} for i, row in enumerate(values)]


RECALLS = [f"Recall @ {k}" for k in (1, 2, 4, 8, 16)]
SETS = [f"Set {position} {name}" for position in range(3) for name in ("NMI", "F1", "Recall @ 1", "Recall @ 5")]


@pytest.mark.parametrize(
    ("names", "panels"),
    [
        (["Recall @ 1"], ["Recall"]),
        (["NMI", "F1", *RECALLS], ["NMI", "F1", "Recall"]),
        ([f"Measure {i % 10} @ {i}" for i in range(30)], [f"Measure {i}" for i in range(10)]),
        (SETS, ["NMI", "F1", "Recall"]),
    ],
    ids=["1 metric", "7 metrics", "30 metrics", "3 sets"],
)
def test_info_plot(names: list[str], panels: list[str], tmp_path: Path) -> None:
    open_figures, path = plt.get_fignums(), tmp_path / "InfoPlot_Base.svg"
    losses = [{"Epochs": epoch, "Train Loss": 1 / epoch} for epoch in (1, 2, 3)]
    rows = metric_rows(names)
    save_info_plot(path, losses, rows, selected_epoch=2, title="tiny_data, resnet18 & <margin>")
    texts = svg_texts(path)
    assert "tiny_data, resnet18 & <margin>" in texts
    start, middle = (
        texts.index("selected epoch 2:"),
        texts.index("each metric's highest value (its epoch), not one model's:"),
    )
    header, footer = "    ".join(texts[start + 1 : middle]), "    ".join(texts[middle + 1 :])
    assert re.split(" {2,}", header) == [f"{name} {rows[1][name]:.4f}" for name in names]
    best = {name: max(rows, key=lambda row: row[name]) for name in names}
    assert re.split(" {2,}", footer) == [f"{name} {row[name]:.4f} ({row['Epochs']})" for name, row in best.items()]
    assert len(re.findall(r'id="axes_\d+"', path.read_text(encoding="utf-8"))) == 1 + len(panels)
    assert all(texts.count(panel) >= 1 for panel in ["Train Loss", *panels])
    assert plt.get_fignums() == open_figures
    assert names_in(tmp_path) == {path.name}


def test_a_title_is_drawn_as_it_is(tmp_path: Path) -> None:
    """A data set's folder may have a name that matplotlib would read as a formula."""
    save_info_plot(tmp_path / "plot.svg", [], metric_rows(["NMI"]), 1, title=r"$\cost$_of")
    assert r"$\cost$_of" in svg_texts(tmp_path / "plot.svg")


def test_a_curve(tmp_path: Path) -> None:
    save_curve(tmp_path / "curve.svg", [{"Epochs": 1, "Ratio": 0.5}, {"Epochs": 2, "Ratio": 0.25}], "Ratio")
    assert {"epoch", "Ratio"} <= set(svg_texts(tmp_path / "curve.svg"))


def frames(pixels: np.ndarray, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Top left corners (row, column) of the frames of one colour, row by row."""
    regions, _ = ndimage.label((pixels == colour).all(axis=2))
    boxes = [box for box in ndimage.find_objects(regions) if min(side.stop - side.start for side in box) > 50]
    return sorted((rows.start, columns.start) for rows, columns in boxes)


def test_sample_retrievals_are_framed_by_what_they_are(tmp_path: Path) -> None:
    blue = np.full((40, 40, 3), (0, 0, 255), np.uint8)
    retrievals = [
        Retrieval(
            blue, "Laysan_Albatross", [blue] * 3, ["Laysan_Albatross", "Crow", "Laysan_Albatross"], [True, False, True]
        ),
        Retrieval(blue, "Crow", [blue], ["Laysan_Albatross"], [False]),  # fewer neighbours
    ]
    save_recoveries(tmp_path / "sample_recoveries.png", retrievals)
    with Image.open(tmp_path / "sample_recoveries.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    red, green, grey = (frames(pixels, colour) for colour in ((214, 39, 40), (44, 160, 44), (176, 176, 176)))
    (top, left), (bottom, below_left) = red
    assert left == below_left
    assert top < bottom
    (green_row, second), (other_row, fourth) = green
    assert green_row == other_row == top
    (grey_row, third), (last_row, last) = grey
    assert (grey_row, last_row) == (top, bottom)
    assert left < second == last < third < fourth
