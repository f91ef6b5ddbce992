"""The house: who imports whom, what a start costs, and how the code is read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODULES = {path.stem: path for path in ROOT.glob("*.py")}
HEAVY = (
    *(
        "torchvision",
        "matplotlib",
        "pandas",
        "sklearn",
        "scipy",
        "faiss",
        "tensorboard",
        "torch.utils.tensorboard",
        "optuna",
    ),
    *("onnx", "onnxscript", "onnxruntime", "safetensors"),
    *("timm", "peft", "optuna", "wandb", "mlflow"),
    *("jinja2", "bokeh", "imagehash", "pyarrow"),
)


def imported_siblings(path: Path) -> set[str]:
    """The modules of this repository that a file imports; not for annotations alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names & set(MODULES)


def test_no_circle_of_imports() -> None:
    graph = {name: imported_siblings(path) for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert free, {name: needs - done for name, needs in graph.items() if name not in done}
        done |= free


ALLOWED = {
    "auxiliaries": set(),
    "losses": {"auxiliaries"},
    "evaluate": {"auxiliaries"},
    "transforms": {"auxiliaries"},
    "googlenet": {"auxiliaries"},
    "netlib": {"auxiliaries", "googlenet"},
    "loggers": {"auxiliaries"},
    "plan": {"auxiliaries", "records"},
    "completion": {"auxiliaries", "datasets", "losses", "netlib"},
    "records": {"auxiliaries", "loggers"},
    "datasets": {"auxiliaries", "transforms"},
    "retrieval": {"auxiliaries", "evaluate"},
    "export": {"auxiliaries", "config", "datasets", "netlib", "transforms"},
    "methods": {"auxiliaries", "losses", "netlib"},
    "check": {"completion", "auxiliaries", "config", "datasets", "inference", "report", "transforms"},
    "index": {"auxiliaries", "datasets", "evaluate", "transforms"},
}


@pytest.mark.parametrize("name", list(ALLOWED))
def test_the_rooms_know_only_what_they_need(name: str) -> None:
    assert imported_siblings(MODULES[name]) <= ALLOWED[name]


def test_nobody_imports_main_but_those_who_start_runs() -> None:
    importers = {name for name, path in MODULES.items() if "main" in imported_siblings(path)}
    assert importers <= {"benchmark", "benchmark_losses", "tune"}


@pytest.mark.parametrize(
    "command",
    [
        ["main.py", "--help"],
        ["main.py", "--lerning_rate", "1"],
        ["compare.py", "--help"],
        ["tune.py", "--help"],
        ["inference.py", "--help"],
        ["check.py", "--help"],
    ],
)
def test_a_start_imports_nothing_heavy(command: list[str]) -> None:
    """What a start has to cost is `import torch`; a data-loading worker imports the same."""
    code = f"import sys, runpy\nsys.argv = {command}\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += f"except SystemExit:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_main_is_read_in_two_screens() -> None:
    lines = MODULES["main"].read_text(encoding="utf-8").splitlines()
    assert len(lines) < 320
    order = [line.split("(")[0] for line in lines if line.startswith("def ")]
    assert order[:3] == ["def main", "def train_one_epoch", "def evaluate_epoch"]


@pytest.mark.parametrize("name", list(MODULES))
def test_functions_are_short(name: str) -> None:
    """Up to about 40 lines, docstrings and flag declarations aside; main() up to about 80."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name != "add_arguments":
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= (80 if (name, node.name) == ("main", "main") else 45), (
                f"{name}.{node.name}: {length} lines"
            )
