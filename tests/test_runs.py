"""runs.py: run folders appear whole or not at all, describe themselves, and are found and read again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
import runs
from auxiliaries import UserError
from datasets import RetrievalSet, Splits, make_image_set


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def leave_a_mark(folder: Path) -> None:
    (folder / "mark").write_text("here")


def test_run_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    parent = tmp_path / "results" / "tiny"
    made = [runs.create_folder(parent / "run", leave_a_mark) for _ in range(3)]
    assert [folder.name for folder in made] == ["run", "run_1", "run_2"]
    assert all(names_in(folder) == {"mark"} for folder in made)
    (parent / "other").write_text("a file")
    assert runs.create_folder(parent / "other", leave_a_mark).name == "other_1"
    assert names_in(parent) == {"run", "run_1", "run_2", "other", "other_1"}
    assert list(itertools.islice(runs.numbered("run"), 3)) == ["run", "run_1", "run_2"]


def test_a_run_folder_that_must_have_its_name_is_refused_where_it_exists(tmp_path: Path) -> None:
    assert runs.create_folder(tmp_path / "fold_0", leave_a_mark, may_be_numbered=False).name == "fold_0"
    (tmp_path / "fold_0" / "mark").write_text("mine")
    with pytest.raises(UserError, match=r"fold_0 exists: continue it with --resume_training"):
        runs.create_folder(tmp_path / "fold_0", leave_a_mark, may_be_numbered=False)
    assert names_in(tmp_path) == {"fold_0"}
    assert (tmp_path / "fold_0" / "mark").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), OSError(errno.ENOSPC, "no space left")])
def test_a_run_folder_appears_whole_or_not_at_all(error: BaseException, tmp_path: Path) -> None:
    seen = []

    def fill(folder: Path) -> None:
        leave_a_mark(folder)
        seen.append({name for name in names_in(tmp_path) if not name.startswith(".")})
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        runs.create_folder(tmp_path / "run", fill)
    if expected is UserError:
        assert re.search(r"no space left.*--save_path", str(caught.value))
    assert seen == [set()]  # nobody finds it half filled
    assert not names_in(tmp_path)
    assert runs.create_folder(tmp_path / "run", leave_a_mark).name == "run"


def test_a_run_folder_that_another_process_makes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    def fill_slowly(folder: Path) -> None:
        leave_a_mark(folder)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "theirs").touch()

    made = runs.create_folder(tmp_path / "run", fill_slowly)
    assert made.name == "run_1"
    assert names_in(tmp_path / "run") == {"theirs"}
    assert names_in(made) == {"mark"}


def test_a_run_folder_taken_between_look_and_rename_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def too_late(source: Any, target: Any) -> None:
        if Path(target).name == "run":
            Path(target).mkdir()
            (Path(target) / "theirs").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    assert runs.create_folder(tmp_path / "run", leave_a_mark).name == "run_1"
    assert names_in(tmp_path / "run") == {"theirs"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a/"])
def test_names_that_are_not_folder_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"--savename .* is not a folder name"):
        config.resolve(config.parse([f"--savename={name}"]))


def test_a_place_with_too_long_a_name_is_refused(tmp_path: Path) -> None:
    for parent, name in ((tmp_path / ("x" * 300), "run"), (tmp_path, "x" * 300)):
        with pytest.raises(UserError, match=r"too long.*--save_path"):
            runs.create_folder(parent / name, leave_a_mark)


def test_a_place_where_no_run_folder_can_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file is not a folder that can be written to: choose another --save_path"):
            runs.create_folder(parent / "run", leave_a_mark)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*--save_path"):
        runs.create_folder(tmp_path / "run", leave_a_mark)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match=r"can be written to: choose another --save_path"):
        runs.create_folder(tmp_path / "run", leave_a_mark)


def test_what_a_run_was_made_with_is_plain_and_says_what_it_doesnt_know(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = runs.describe_environment(torch.device("cpu"))
    assert json.loads(json.dumps(environment)) == environment
    assert environment["version"] == runs.RUN_VERSION
    assert environment["command"] == sys.argv
    assert environment["torch"] == torch.__version__
    assert environment["cuda"] is None
    assert f"{torch.get_num_threads()} threads" in environment["device"]
    monkeypatch.setenv("PATH", "/nowhere")  # no git
    without = runs.describe_environment(torch.device("cpu"))
    assert (without["git commit"], without["git tree is dirty"]) == (None, None)
    assert without["numpy"] == np.__version__


def test_flags_are_kept_as_builtin_types_and_as_text(tmp_path: Path) -> None:
    opt = config.resolve(config.parse(["--savename", "ü", "--k_vals", "1", "2"]))
    runs.write_flags(tmp_path, opt)
    values = pickle.loads((tmp_path / "hypa.pkl").read_bytes())
    assert values == config.configuration(opt)
    assert (values["savename"], values["k_vals"], values["normalize"]) == ("ü", [1, 2], True)
    lines = (tmp_path / "Parameter_Info.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(f"{name}: {value}" for name, value in values.items())
    assert config.changed_flags(opt, runs.load_flags(tmp_path)) == {}


def make_splits(root: Path, *, images: int = 3, name: str = "image", classes: Sequence[str] = "abcd") -> Splits:
    """Splits of two training and two test classes, of files that need not exist."""
    paths = [str(root / label / f"{name}_{number}.png") for label in classes for number in range(images)]
    pooled = make_image_set(paths, [Path(path).parent.name for path in paths])
    is_train = pooled.labels[:, 0] < 2
    return Splits(pooled.subset(is_train), test=[RetrievalSet("test", pooled.subset(~is_train))])


def test_flags_are_shown_as_they_are_typed() -> None:
    values = {"seed": 1, "not_pretrained": False, "freeze_trunk": False, "fold": None, "tau": [30, 55], "arch": "x"}
    params = {"loss_params": {"alpha": "1", "beta": "2"}, "optim_params": {}, "flip": True}
    assert runs.as_flags(values) == "--seed 1, --pretrained, --no-freeze_trunk, no --fold, --tau 30 55, --arch x"
    assert runs.as_flags(params) == "--loss_params alpha=1 beta=2, no --optim_params, --flip"


def test_data_are_described_by_counts_and_a_digest_wherever_they_are(tmp_path: Path) -> None:
    def describe(where: str, **kwargs: Any) -> runs.DataDescription:
        opt = config.parse(["--source_path", str(tmp_path / where), "--dataset", "set"])
        return runs.describe_data(opt, make_splits(tmp_path / where / "set", **kwargs))

    first = describe("here")
    assert list(first) == ["train", "test test query"]
    assert {name: (entry["images"], entry["classes"]) for name, entry in first.items()} == dict.fromkeys(first, (6, 2))
    assert describe("there") == first
    assert runs.differing_data(first, first) == []
    assert runs.differing_data(first, describe("here", name="other")) == [
        "train has 6 images of 2 classes, but other ones",
        "test has 6 images of 2 classes, but other ones",
    ]
    assert runs.differing_data(first, describe("here", images=4))[0] == (
        "train has 8 images of 2 classes instead of 6 images of 2 classes"
    )
    assert runs.differing_data(first, {"train": first["train"]}) == [
        "test has no images instead of 6 images of 2 classes"
    ]
    renamed = describe("here", classes="abce")
    assert [words.split()[0] for words in runs.differing_data(first, renamed)] == ["test"]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    old, new = tmp_path / ".part-1-run", tmp_path / ".part-2-run"
    for folder in (old, new):
        folder.mkdir()
        leave_a_mark(folder)
    os.utime(old, (0, 0))
    runs.create_folder(tmp_path / "run", leave_a_mark)
    assert names_in(tmp_path) == {".part-2-run", "run"}  # another machine may be writing the new one


def test_changes_of_the_repository_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = config.resolve(config.parse([]))
    environment = runs.describe_environment(torch.device("cpu"))
    monkeypatch.setattr(runs, "_git", lambda *arguments: "-old\n+new \udcff" if arguments == ("diff", "HEAD") else None)
    for is_dirty in (False, True):
        folder = tmp_path / str(is_dirty)
        folder.mkdir()
        runs.write_description(folder, opt, {**environment, "git tree is dirty": is_dirty})
        assert (folder / "git.diff").exists() == is_dirty
    assert (folder / "git.diff").read_bytes() == b"-old\n+new \xff\n"


def quantized_tensor() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


STATE: dict[str, Any] = {
    "version": runs.RUN_VERSION,
    "epoch": 1,
    "best_epoch": 1,
    "metrics": {"Recall @ 1": 0.5},
    "opt": {"lr": 0.1},
    "history": {"train": [{"Epochs": 1, "Time": 2.0, "Train Loss": 0.5, "Iterations": 3}]},
    "state_dict": {"weight": torch.zeros(2)},
    "criterion": {},
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in STATE),
        *({name: "text"} for name in STATE),
        {"epoch": -1},
        {"epoch": True},
        {"epoch": 1.5},
        {"history": {"train": [1]}},
        {"history": {"train": [{"Epochs": "1"}]}},
        {"history": {"train": [{"Loss": 1}]}},
        {"history": {"train": [{"Epochs": 1, "Time": 2.0, "Train Loss": 0.5}]}},
        {"history": {"val": [{"Epochs": 1.5, "Time": 2.0}]}},
        {"history": {"val": [{"Epochs": -2, "Time": 2.0}]}},
        {"history": {"val": [{"Epochs": 10**30, "Time": 2.0}]}},
        {"history": {"iterations": [{"Epochs": 1}]}},
        {"data": -1},
        {"history": {"other": []}},
        {"state_dict": {"weight": 1}},
        {"state_dict": {"weight": torch.zeros(2).to_sparse()}},
        {"state_dict": {"weight": torch.zeros(2, device="meta")}},
        {"state_dict": {"weight": quantized_tensor()}},
        {"optimizer": {"state": {}}},
        {"optimizer": {"state": [], "param_groups": []}},
        {"optimizer": {"state": {}, "param_groups": [{}]}},
        {"scheduler": {"schedule": []}},
    ],
    ids=str,
)
def test_checkpoints_that_hold_the_wrong_things_are_one_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    torch.save({**STATE, "scheduler": {"schedule": {}, "state": {}}}, path)
    assert runs.read_state(path)["epoch"] == 1
    torch.save({**STATE, **changes}, path)
    with pytest.raises(UserError, match=r"last\.pth\.tar is (damaged|incomplete or corrupt)") as error:
        runs.read_state(path)
    assert "\n" not in str(error.value)
