"""runs.py: run folders appear whole or not at all, describe themselves, and are found and read again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
import runs
from auxiliaries import UserError


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
