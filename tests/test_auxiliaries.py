"""auxiliaries.py: flags and exit codes, seeds, devices, files that survive failures, locks."""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import auxiliaries
from auxiliaries import (
    FlagParser,
    FrozenNamespace,
    UserError,
    atomic_write,
    check_memory,
    check_params,
    check_schema,
    copy_file,
    cpu_cores,
    default_workers,
    disk_advice,
    load_checkpoint,
    load_json,
    locked,
    nearest_name,
    number,
    parse_value,
    peak_memory,
    pick_device,
    run_command,
    save_checkpoint,
    save_json,
    seed_everything,
    seeded,
    to_builtin,
    upload,
    user_path,
)


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="main.py")
    parser.add_argument("--loss", choices=["triplet", "npair", "proxynca"], default="npair", help="what is minimized")
    parser.add_argument("--arch", choices=[f"network{i}" for i in range(20)], help="which network")
    parser.add_argument("--bs", type=number(int, 1), default=112, help="images per batch")
    parser.add_argument("--gamma", type=number(float, 0, exclusive=True), default=0.3, help="a factor")
    parser.add_argument("--flip", action="switch", help="whether to mirror")
    parser.add_argument("--not_pretrained", action="switch", help="whether to forget")
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
        (["--bs", "many"], "--bs: many is not an integer"),
        (["--bs", "1.5"], "--bs: 1.5 is not an integer"),
        (["--bs", "0"], "--bs: 0 is not at least 1"),
        (["--bs", "1" + 400 * "0"], "--bs"),
        (["--bs"], "--bs.*expected one argument"),
        (["--gamma", "0"], "--gamma: 0 is not above 0"),
        (["--gamma", "-inf"], "--gamma"),
        (["--gamma", "inf"], "--gamma: inf is not"),
        (["--gamma", "nan"], "--gamma: nan is not"),
        (["--gamma=--"], "--gamma takes a value, not --"),
        (["--bs="], "--bs: '' is not an integer"),
        (["--loss="], "--loss '' is unknown; it takes one of triplet, npair, proxynca$"),
        (["--loss", "a\nb"], r"--loss 'a\\nb' is unknown"),
        (["--loss", 5000 * "x"], r"--loss x{60}… is unknown"),
        (["--bs", 5000 * "9"], "--bs: 9{60}… is not "),
        (["--gamma", 5000 * "x"], "--gamma: x{60}… is not a number"),
        (["--" + 5000 * "x"], "unknown flag --x{58}…: main.py --help"),
        ([5000 * "x y"], "unknown argument .{60}…: main.py --help"),
        (["--flip=true"], "--flip takes no value: give --flip or --no-flip"),
        (["--not_pretrained=1"], "--not_pretrained takes no value: give --not_pretrained or --pretrained"),
        (["--loss=--"], "--loss takes a value, not --"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_flag_is_one_sentence(parser: FlagParser, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parser.parse_args(argv)
    assert "\n" not in str(caught.value)


def test_flags_that_are_right_and_the_manual(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    opt = parser.parse_args(["--loss=triplet", "--bs", "1", "--gamma", "1e-3"])
    assert {"loss": "triplet", "arch": None, "bs": 1, "gamma": 0.001}.items() <= vars(opt).items()
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    manual = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "images per batch (default: 112)" in manual
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
    with atomic_write(path) as beside:
        beside.write_text("old")
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, atomic_write(path) as beside:
        write_and_fail(beside, error)
    if isinstance(error, OSError):
        assert re.search(r"file.txt can't be written \(no space left\): free some space", str(caught.value))
    assert path.read_text() == "old"
    assert names_in(tmp_path) == {"file.txt"}
    with atomic_write(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == {"file.txt"}


def test_to_builtin_turns_everything_into_builtin_types() -> None:
    tensor = torch.ones(2)
    value = to_builtin(
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
    with pytest.raises(UserError, match=r"odd\.pth is incomplete or corrupt"):
        load_checkpoint(tmp_path / "odd.pth")


def test_a_checkpoint_holds_no_objects_and_exists(tmp_path: Path) -> None:
    torch.save({"net": Arbitrary()}, tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"object\.pth"):
        load_checkpoint(tmp_path / "object.pth")
    with pytest.raises(UserError, match=r"missing\.pth can't be opened: No such file"):
        load_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(UserError, match="can't be opened: Is a directory"):
        load_checkpoint(tmp_path)


# A process that locks a folder, says so, and waits for its standard input to end; with a child of its own, if it is to
# have one, which waits for the same and holds on to everything that it has inherited.
HOLDER = """
import os, sys
from pathlib import Path
from auxiliaries import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if sys.argv[2] == "forks" else 1
    if child:
        print(child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder_of(folder: Path, forks: bool = False) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that has a folder locked, and the id of its child."""
    command = [sys.executable, "-c", HOLDER, str(folder), "forks" if forks else "alone"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.stdin.close()  # ends it, and its child


def test_a_run_folder_is_locked_for_other_processes(tmp_path: Path) -> None:
    with holder_of(tmp_path):
        with pytest.raises(UserError, match="another process is using") as caught, locked(tmp_path):
            pass
        assert "\n" not in str(caught.value)
        (tmp_path / "beside").mkdir()
        with locked(tmp_path / "beside"):
            pass
    with locked(tmp_path):  # the other has ended
        pass
    with locked(tmp_path):  # and a second time
        pass
    with pytest.raises(UserError, match="can't be written to"), locked(tmp_path / "gone"):
        pass


def test_a_killed_process_leaves_no_lock_even_where_its_child_lives_on(tmp_path: Path) -> None:
    with holder_of(tmp_path, forks=True) as (process, child):
        with pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
        process.kill()
        assert process.wait() == -signal.SIGKILL
        os.kill(child, 0)  # it is there, as a data-loading worker may be
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth.tar"
    save_checkpoint(path, {"epoch": 1, "weights": torch.arange(1000)})
    content = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(where, full)
    with pytest.raises(UserError, match=r"last\.pth\.tar can't be written \(No space left on device\)") as caught:
        save_checkpoint(path, {"epoch": 2})
    assert "\n" not in str(caught.value)
    if where != "torch.save":
        with pytest.raises(UserError, match=r"checkpoint\.pth\.tar can't be written \(No space left on device\)"):
            copy_file(path, tmp_path / "checkpoint.pth.tar")
    assert path.read_bytes() == content
    assert names_in(tmp_path) == {"last.pth.tar"}
    monkeypatch.undo()
    save_checkpoint(path, {"epoch": 2})
    copy_file(path, tmp_path / "checkpoint.pth.tar")
    assert load_checkpoint(tmp_path / "checkpoint.pth.tar") == {"epoch": 2}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_linked_file_keeps_what_it_holds(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, best = tmp_path / "last.pth.tar", tmp_path / "checkpoint.pth.tar"

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        save_checkpoint(last, {"epoch": epoch})
        auxiliaries.link_file(last, best)
        assert os.path.samefile(last, best) == has_links
    save_checkpoint(last, {"epoch": 3})
    assert [load_checkpoint(path)["epoch"] for path in (last, best)] == [3, 2]
    assert names_in(tmp_path) == {"last.pth.tar", "checkpoint.pth.tar"}


def test_json_comes_back_and_damage_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    save_json(path, {"a": np.float32(0.5), "ü": [Path("x"), None, True]})
    assert load_json(path) == {"a": 0.5, "ü": ["x", None, True]}
    save_json(path, {"a": math.nan, "b": [np.float64(np.inf), {"c": -math.inf, "d": 1.5}], "e": np.array([np.nan, 2])})
    strict = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)  # NaN is not JSON
    assert strict == load_json(path) == {"a": None, "b": [None, {"c": None, "d": 1.5}], "e": [None, 2]}
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        load_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        load_json(path)
    with pytest.raises(UserError, match=r"gone\.json can't be read: No such file"):
        load_json(tmp_path / "gone.json")


def test_peak_memory_of_this_process_is_in_gib() -> None:
    before = peak_memory(torch.device("cpu"), reset=True)
    assert 0.05 < before < 1000
    assert peak_memory(torch.device("cpu")) >= before


def test_peak_memory_leaves_out_what_the_process_before_took() -> None:
    """In two processes: a large one, which starts a small one."""
    tell = "import torch, auxiliaries; print(auxiliaries.peak_memory(torch.device('cpu')))"
    large = f"import subprocess, sys; x = b'1' * 2**31; subprocess.run([sys.executable, '-c', {tell!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", large], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("0", None), ("0.999", None), ("1", "1 is not below 1"), ("1.5", "1.5 is not below 1"), ("-0.1", "at least 0")],
)
def test_a_number_below_a_bound(text: str, words: str | None) -> None:
    parse = number(float, 0, below=1)
    if words is None:
        assert parse(text) == float(text)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(words)):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError, match="inf is not below"):
        parse("inf")
    with pytest.raises(argparse.ArgumentTypeError, match="0 is not above 0"):
        number(float, 0, exclusive=True, below=1)("0")


PRINTER = """
import sys
from auxiliaries import run_command
def command():
    for number in range(3):
        print(f"line {number} \\u96ea", flush=True)
    open(sys.argv[1], "w").write("done")
run_command(command)
"""


def test_a_reader_that_goes_away_stops_nothing(tmp_path: Path) -> None:
    """As `| head -1` does: the command goes on and ends well."""
    command = [sys.executable, "-c", PRINTER, str(tmp_path / "mark")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "mark").read_text() == "done"


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTER, str(tmp_path / "mark")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[0] == "line 0 \\u96ea"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tripplet", "triplet"), ("TRIPLET", "triplet"), ("Marginloss", "marginloss"), ("evaluate", ""), ("xx", "")],
)
def test_only_similar_names_are_proposed(name: str, nearest: str) -> None:
    found = nearest_name(name, ["triplet", "marginloss", "learning_rate"])
    assert found == (f" (did you mean {nearest}?)" if nearest else "")


def test_one_thing_is_not_several() -> None:
    said = [auxiliaries.counted(number, "image") for number in (0, 1, 2, 12345)]
    assert said == ["0 images", "1 image", "2 images", "12,345 images"]
    assert [auxiliaries.counted(number, "query", "queries") for number in (1, 2)] == ["1 query", "2 queries"]


def test_single_flipped_bits_in_a_checkpoint_are_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    state = {"epoch": 3, "weight": torch.arange(500.0)}
    save_checkpoint(path, state)
    content = path.read_bytes()
    generator = random.Random(0)
    silent = []
    for _ in range(200):
        position, bit = generator.randrange(len(content)), generator.randrange(8)
        damaged = bytearray(content)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            continue
        if loaded["epoch"] != 3 or not torch.equal(loaded["weight"], torch.arange(500.0)):
            silent.append((position, bit))
    assert silent == []


def test_a_second_lock_waits_or_refuses(tmp_path: Path) -> None:
    with holder_of(tmp_path) as (process, _):
        with locked(tmp_path, ".other.lock"):
            pass
        assert process.stdin is not None
        process.stdin.close()
        with locked(tmp_path, wait=True):  # once the other process has ended
            pass


def test_a_file_of_another_form_is_one_sentence(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["epoch"], "properties": {"epoch": {"type": "integer"}}}
    check_schema(tmp_path / "a.json", {"epoch": 3, "more": [1]}, schema, "remove it")
    for value, words in (
        ({"epoch": "x"}, "epoch is not an integer"),
        ({}, "it lacks epoch"),
        ([1], "it is not a mapping"),
        ({"epoch": [torch.zeros(100)] * 100}, "epoch is not an integer"),
    ):
        with pytest.raises(UserError, match=re.escape(f"a.json is damaged ({words}): remove it")) as caught:
            check_schema(tmp_path / "a.json", value, schema, "remove it")
        assert "\n" not in str(caught.value)


def test_deeply_nested_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"deep\.json is not valid JSON"):
        load_json(tmp_path / "deep.json")


def test_impossible_sizes_are_refused() -> None:
    check_memory(1e6, "--bs 1")
    with pytest.raises(UserError, match=r"--bs 9 would take 931,323 GiB of memory, and this machine has \d+: lower it"):
        check_memory(1e15, "--bs 9")


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert user_path("~/data") == "/home/someone/data"
    assert user_path("a~/b") == "a~/b"
    with pytest.raises(argparse.ArgumentTypeError, match=r"'a\\x00b' is not a path: it has a NUL character"):
        user_path("a\0b")
    with pytest.raises(argparse.ArgumentTypeError, match=r"^a/x{58}… is not a path: a name in it is longer than 255"):
        user_path(f"a/{'x' * 256}/b")


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (None, "free some space"),
        (errno.ENOENT, "make its folder first"),
        (errno.EACCES, "choose another place or name"),
        (errno.EIO, "see to the disk"),
        (errno.EISDIR, "move away what stands in its place"),
    ],
)
def test_advice_about_the_disk_is_of_the_error(number: int | None, advice: str) -> None:
    assert disk_advice(OSError(number, "x") if number else OSError("x")).startswith(advice)


def test_cores_follow_the_quota_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    read_text = Path.read_text
    for text, cores in (("max 100000\n", 16), ("200000 100000\n", 2), ("50000 100000\n", 1), ("150000 100000", 2)):

        def read(self: Path, *args: Any, text: str = text, **kwargs: Any) -> str:
            return text if self.name == "cpu.max" else read_text(self, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", read)
        assert cpu_cores() == cores
        assert default_workers(torch.device("cpu")) == cores // 4
        assert default_workers(torch.device("cuda")) == min(8, cores)


def test_threads_leave_cores_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for cores in (1, 2, 4, 16):
        monkeypatch.setattr(auxiliaries, "cpu_cores", lambda cores=cores: cores)
        pick_device(-1)
    assert threads == [1, 2, 3, 12]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("2", 2), ("-3", -3), ("1e-4", 1e-4), ("0.5", 0.5), ("inf", float("inf")), ("true", True), ("null", None)),
        *(
            ("mean", "mean"),
            ("[1, 2.5, a]", [1, 2.5, "a"]),
            ("[1e-3]", [1e-3]),
            ("a: b", "a: b"),
            ("[", "["),
            ("", None),
        ),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


class Base:
    def __init__(self, scale=2, reducer=None, name: str = "x", **kwargs):
        pass


class Derived(Base):
    def __init__(self, num_classes, margin=0.5, count: int = 1, is_on=False, betas=(0.9, 0.99), **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {}),
        ({"margin": "1", "count": "2", "is_on": "true"}, {"margin": 1, "count": 2, "is_on": True}),
        ({"scale": "2.5", "name": "3", "reducer": "z"}, {"scale": 2.5, "name": "3", "reducer": "z"}),
        ({"betas": "[0.5, 0.9]"}, {"betas": [0.5, 0.9]}),
    ],
)
def test_parameters_are_typed(params: dict[str, str], expected: dict[str, Any]) -> None:
    assert check_params("--loss_params", params, Derived, reserved=["num_classes"]) == expected


def test_parameters_of_one_value_or_several_take_both() -> None:
    def blur(sigma=(0.1, 2.0), fill=0, p: float = 0.5):
        pass

    one_or_several = float | Sequence[float] | None
    blur.__annotations__ = {"sigma": one_or_several, "fill": one_or_several, "p": float}
    for params in ({"sigma": "1", "fill": "[1, 2]"}, {"sigma": "[1, 2]", "fill": "1"}):
        assert check_params("--x", params, blur) == {key: parse_value(text) for key, text in params.items()}
    with pytest.raises(UserError, match="p of blur takes a number"):
        check_params("--x", {"p": "[1, 2]"}, blur)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"margn": "1"},
            "--loss_params: Derived has no parameter margn (did you mean margin?); it takes margin, count",
        ),
        ({"num_classes": "1"}, "Derived has no parameter num_classes"),
        ({"kwargs": "1"}, "Derived has no parameter kwargs"),
        ({"margin": "big"}, "margin of Derived takes a number, not big"),
        ({"margin": "true"}, "margin of Derived takes a number, not true"),
        ({"count": "1.5"}, "count of Derived takes an integer, not 1.5"),
        ({"is_on": "1"}, "is_on of Derived takes true or false, not 1"),
        ({"betas": "0.5"}, "betas of Derived takes a list, not 0.5"),
    ],
)
def test_wrong_parameters_are_one_sentence(params: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as error:
        check_params("--loss_params", params, Derived, reserved=["num_classes"])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_terminal_stays_one() -> None:
    """Progress bars ask whether they are drawn on one."""
    code = "import sys\nfrom auxiliaries import run_command\nrun_command(lambda: print(sys.stdout.isatty()))"
    reader, terminal = os.openpty()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=terminal, stderr=terminal, check=False)
    printed = os.read(reader, 1000).decode()
    os.close(terminal)
    os.close(reader)
    assert (done.returncode, printed.strip()) == (0, "True")


# Colors


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colors_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert auxiliaries.colored("a", "red", Terminal()) == "\033[31ma\033[0m"
    assert auxiliaries.colored("a", "red", io.StringIO()) == "a"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert auxiliaries.colored("a", "red", Terminal()) == "a"
    monkeypatch.setenv("NO_COLOR", "")  # which no-color.org says is as if it weren't set
    assert auxiliaries.colored("a", "green", Terminal()) == "\033[32ma\033[0m"


def test_messages_keep_their_texts_and_have_colors_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pseudo-terminal, as a user has it, and by a pipe, as a log file has it."""
    pty = pytest.importorskip("pty")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    code = "import auxiliaries\n\ndef two():\n    auxiliaries.notice('one')\n    raise auxiliaries.UserError('two')\n"
    command = [sys.executable, "-c", f"{code}\nauxiliaries.run_command(two)"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (piped.returncode, piped.stderr) == (2, "notice: one\nerror: two\n")
    controller, terminal = pty.openpty()
    done = subprocess.run(command, cwd=ROOT, stderr=terminal, check=False)
    os.close(terminal)
    assert done.returncode == 2
    text = os.read(controller, 10000).decode().replace("\r\n", "\n")
    os.close(controller)
    assert text == "\033[33mnotice:\033[0m one\n\033[31merror:\033[0m two\n"


def test_help_shows_defaults_as_a_user_would_type_them() -> None:
    parser = FlagParser(prog="main.py")
    add = parser.add_argument_group("all").add_argument
    add("--shares", nargs="+", type=float, default=[100.0, 50.0], metavar="N", help="in %%")
    add("--params", action="params", default={}, help="parameters")
    add("--on", action="switch", default=True, help="a switch")
    add("--off", action="switch", help="another one")
    add("--none", nargs="*", default=[], metavar="N", help="a list")
    add("--lr", default=1e-5, help="a rate")
    add("--all", nargs="+", default=["a", "b"], help="names (default: all)")
    found = re.findall(r"(in %|parameters|a switch|another one|a list|a rate|names)(.*)", parser.format_help())
    assert found == [
        *[("in %", " (default: 100.0 50.0)"), ("parameters", ""), ("a switch", " (default: on)")],
        *[("another one", ""), ("a list", ""), ("a rate", " (default: 1e-05)"), ("names", " (default: all)")],
    ]


def test_help_keeps_empty_lines_and_indented_commands() -> None:
    command = f"    python main.py {'--flag ' * 20}".rstrip()
    text = FlagParser(prog="main.py", description=f"One\nsentence.\n\nDo it:\n{command}\nAnd\nmore.\n").format_help()
    assert f"\n\nOne sentence.\n\nDo it:\n{command}\nAnd more.\n\n" in text
