"""completion.py: what a shell is told, by the same environment variables and ways as argcomplete's own scripts use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import completion

SCRIPTS = ("main", "tune", "compare", "inference", "check", "benchmark")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two runs and a dataset."""
    for name in ("margin", "triplet"):
        (tmp_path / "Training_Results/birds" / name).mkdir(parents=True)
        (tmp_path / "Training_Results/birds" / name / "config.yaml").touch()
    (tmp_path / "Training_Results/birds/unfinished").mkdir()
    (tmp_path / "Datasets/birds").mkdir(parents=True)
    (tmp_path / "Datasets/photos.csv").touch()
    return tmp_path


WATCHING = """
import os, runpy, sys

def tell(code, leave=os._exit):
    print(" ".join({"torch", "numpy"} & {*sys.modules}), file=sys.stderr)
    leave(code)

os._exit = tell
script = sys.argv[1]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def ask(line: str, place: Path, cache: Path, watched: bool = False) -> list[str]:
    """What can stand at the end of a line such as `python main.py --lo`."""
    _, script, *_ = line.split()
    code = [str(ROOT / script)]
    if watched:  # argcomplete ends the process at once: what it has imported is told just before
        code = ["-c", WATCHING, *code]
    answer = place / "answer"
    answer.write_text("")
    environment = {
        **os.environ,
        **{"_ARGCOMPLETE": "2", "_ARGCOMPLETE_IFS": "\013", "_ARGCOMPLETE_SHELL": "bash", "COMP_TYPE": "9"},
        **{"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"},
        **{"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "XDG_CACHE_HOME": str(cache)},
    }
    done = subprocess.run(
        [sys.executable, *code], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ("\n" if watched else "")  # neither torch nor numpy
    return answer.read_text().split("\013")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python main.py --logg", ["--logger"]),
        ("python main.py --logger ten", ["tensorboard"]),
        ("python main.py --logger tensorboard w", ["wandb"]),
        ("python main.py --loss marg", ["marginloss"]),
        ("python main.py --loss triplet --sampling semi", ["semihard"]),
        ("python main.py --dataset bi", ["birds"]),
        ("python main.py --dataset cub", ["cub200"]),
        ("python check.py ph", ["photos.csv"]),
        ("python main.py --resume_training --savename m", ["margin"]),
        ("python main.py --resume_training b", ["best"]),
        ("python main.py --config reality_check_so", ["reality_check_soft_triple"]),
    ],
)
def test_flags_names_runs_and_datasets(line: str, expected: list[str], place: Path, cache: Path) -> None:
    assert ask(line, place, cache) == expected


def test_run_folders_are_completed_one_by_one(place: Path, cache: Path) -> None:
    found = ask("python main.py --evaluate Tr", place, cache)
    assert sorted(found) == ["Training_Results/birds/margin", "Training_Results/birds/triplet"]


def test_a_completion_imports_neither_torch_nor_numpy(place: Path, cache: Path) -> None:
    ask("python main.py --lo", place, cache)  # which fills the cache
    assert "--log_every" in ask("python main.py --lo", place, cache, watched=True)


def test_flags_that_have_changed_are_read_anew(place: Path, cache: Path) -> None:
    ask("python main.py --lo", place, cache)
    (file,) = (cache / "deep-metric-learning").glob("main-*.json")
    cached = json.loads(file.read_text())
    assert sum(flag["dest"] == "loss" for flag in cached["spec"]["flags"]) == 1
    cached["spec"]["flags"].append({**cached["spec"]["flags"][0], "options": ["--loupe"], "dest": "loupe"})
    file.write_text(json.dumps(cached))
    assert "--loupe" in ask("python main.py --lo", place, cache)
    cached["stamp"][0][1] -= 1  # a file is of another time
    file.write_text(json.dumps(cached))
    assert "--loupe" not in ask("python main.py --lo", place, cache)


def test_every_script_says_that_it_can_be_completed() -> None:
    """argcomplete's global completion looks for the mark in the first 1024 bytes."""
    for script in SCRIPTS:
        text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        assert "PYTHON_ARGCOMPLETE_OK" in text[:1024], script
        assert text.index("completion.complete(") < text.index("import numpy" if "import numpy" in text else "torch\n")
        assert f'completion.complete("{script}")' in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python tune.py --bayesian_optimization_n", ["--bayesian_optimization_n_iter"]),
        ("python compare.py Tr", ["Training_Results/birds/margin", "Training_Results/birds/triplet"]),
        ("python compare.py --sv", ["--svg"]),
        ("python inference.py sear", ["search"]),
        ("python inference.py search --gall", ["--gallery"]),
        ("python check.py bi", ["birds"]),
        ("python check.py split bi", ["birds"]),
        ("python check.py birds --nea", ["--near", "--near_distance"]),
        ("python benchmark.py rec", ["records"]),
    ],
)
def test_the_other_scripts(line: str, expected: list[str], place: Path, cache: Path) -> None:
    assert sorted(ask(line, place, cache)) == expected


def test_help_is_shortened() -> None:
    assert completion._shorten("a  b\n50 %% of %(default)s") == "a b 50 percent of (default)s"
    assert len(completion._shorten("word " * 50)) <= completion.MAX_HELP + 2
