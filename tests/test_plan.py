"""plan.py: what --dry_run prints, that it writes nothing, and its estimate of memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CROSS, ROOT, CrossValidated, Run, training_flags
from torch import nn

import auxiliaries
import config
import datasets
import main
import methods
import netlib
import plan
from auxiliaries import UserError

pytestmark = pytest.mark.usefixtures("without_pictures")


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was changed, and its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def facts(text: str) -> dict[str, str]:
    """What a plan says, by the names in its first column."""
    return {line[:12].strip(): line[12:] for line in text.splitlines() if line[:1].strip() and line[11:12] == " "}


def test_a_new_run_is_described_and_nothing_is_written(
    run: Run, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auxiliaries, "peak_memory", lambda *_: 0.5)  # whatever this process has taken before
    more = ("--samples_per_class", "4", "--cache_features", "--freeze_trunk", "--arch", "resnet18")
    assert run("--dry_run", *more) == {}
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    said = facts(out)
    assert said["training"] == "24 images of 4 classes"
    assert said["batch"] == "8 images of 2 classes, class_balanced"
    assert said["epochs"] == "2, with 3 iterations each, 6 in all; evaluated every epoch"
    net = netlib.networkselect(
        config.resolve(config.parse(["--arch", "resnet18", "--embed_dim", "16", *more[:2]])), False
    )
    trained = sum(parameter.numel() for parameter in net.embedding.parameters())
    frozen = sum(parameter.numel() for parameter in net.backbone.parameters())
    assert said["parameters"] == f"{trained + 4:,} are trained, {frozen:,} are frozen"  # a margin for each class
    assert said["memory"].startswith("about 0.5 GiB")
    assert said["memory"].endswith("the program 0.46)")
    assert said["run folder"] == str(tmp_path / "tiny" / "run")
    assert out.endswith("nothing was trained or written: drop --dry_run to start\n")


def test_one_epoch_of_one_iteration() -> None:
    opt = argparse.Namespace(n_epochs=1, save_interval=1, patience=1)
    words = "1, with 1 iteration each, 1 in all; evaluated every epoch, until 1 epoch without improvement (--patience)"
    assert plan.describe_epochs(opt, 0, 1) == words


def test_a_run_that_would_go_on_is_described_and_stays_as_it_is(copied: Path, go_on: Run, capsys: Any) -> None:
    before = everything_in(copied)
    assert go_on("--resume_training", "--n_epochs", "5", "--dry_run") == {}
    said = facts(capsys.readouterr().out)
    assert said["run folder"] == f"{copied}, after epoch 2"
    assert said["epochs"] == "3 to 5, with 3 iterations each, 9 in all; evaluated every epoch"
    assert go_on("--resume_training", "--dry_run") == {}
    assert facts(capsys.readouterr().out)["epochs"] == "2: nothing is left to train"
    with pytest.raises(UserError, match="was trained with --embed_dim 16, which must stay the same"):
        go_on("--resume_training", "--embed_dim", "8", "--dry_run")
    assert everything_in(copied) == before


def test_a_run_that_would_be_reproduced_is_described(copied: Path, source: Path, capsys: Any) -> None:
    before = everything_in(copied.parents[1])
    where = ["--source_path", str(source), "--save_path", str(copied.parents[1])]
    assert main.command(["--reproduce_results", str(copied), "--dry_run", *where]) == {}
    assert facts(capsys.readouterr().out)["run folder"] == str(copied.parent / "run_reproduced")
    assert everything_in(copied.parents[1]) == before


def test_folds_are_described(source: Path, tmp_path: Path, capsys: Any) -> None:
    flags = training_flags(source, tmp_path, *CROSS, "--savename", "folds", "--dry_run")
    assert main.command(flags) == {}
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("fold")] == [f"fold {i} of 3" for i in range(3)]
    assert f"{tmp_path / 'cv' / 'folds' / 'fold_2'}" in out
    assert "validation  " in out
    assert main.command([*flags, "--fold", "1"]) == {}
    assert capsys.readouterr().out.count("nothing was trained or written") == 1
    assert list(tmp_path.iterdir()) == []


def test_folds_that_would_go_on_are_described(crossed: CrossValidated, capsys: Any) -> None:
    before = everything_in(crossed.folder)
    where = ["--savename", "run", "--save_path", str(crossed.folder.parents[1])]
    assert main.command(["--resume_training", "--n_epochs", "3", "--dry_run", *where]) == {}
    out = capsys.readouterr().out
    assert out.count("3 to 3, with ") == 3
    assert everything_in(crossed.folder) == before


def test_a_plan_of_an_evaluation_is_refused(copied: Path) -> None:
    with pytest.raises(UserError, match="--dry_run and --evaluate contradict each other"):
        main.command(["--evaluate", str(copied), "--dry_run"])


def test_batches_of_other_samplers_are_counted(run: Run, capsys: Any) -> None:
    run("--dry_run", "--batch_sampler", "shuffled")
    said = facts(capsys.readouterr().out)["batch"]
    assert said in {f"8 images of {classes} classes, shuffled" for classes in ("4", "3 to 4")}


# Memory


def method_of(*flags: str) -> tuple[Any, Any]:
    opt = config.resolve(config.parse(["--not_pretrained", "--gpu", "-1", "--crop_size", "64", "--bs", "8", *flags]))
    return opt, methods.build_training(opt, 4, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "states"),
    [([], 2), (["--optimizer", "SGD"], 0), (["--ema", "0.9", "--optimizer", "Adagrad"], 1)],
    ids=str,
)
def test_the_parts_that_can_be_counted_are_exact(flags: list[str], states: int) -> None:
    opt, method = method_of("--arch", "resnet18", "--optim_params", *flags)
    parts = plan.estimate_memory(opt, method)
    trained, _ = plan.count_parameters(method)
    held = {
        id(value): value.nbytes for net in method.networks.values() for value in net.state_dict(keep_vars=True).values()
    }
    averaged = sum(value.nbytes for value in method.averaged.state_dict().values()) if method.averaged else 0
    assert parts["weights"] == sum(held.values()) + averaged
    assert parts["gradients"] == 4 * trained
    method.start_epoch(1)
    images, labels = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.arange(8) // 4
    method.step(images, labels, 1)
    state = [value for one in method.optimization.optimizers for each in one.state.values() for value in each.values()]
    kept = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.numel() > 1)
    assert parts["optimizer"] == pytest.approx(kept, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(states * parts["gradients"])


class Squares(nn.Module):
    """Three squares of a large tensor, whose memory is known."""

    precision, compiles, chunk, takes_features = "fp32", False, None, False

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.float() * self.scale
        for _ in range(3):
            values = values.pow(2)
        return values


def test_activations_are_counted_as_they_come_and_go() -> None:
    of_floats = 4 * 10 * 3 * 32 * 32  # bytes of one tensor
    learns, only_runs = (
        plan.activation_bytes(Squares(), 10, 32, learns) - of_floats / 4  # type: ignore[arg-type]
        for learns in (True, False)
    )
    assert only_runs == 2 * of_floats  # one, and the next one
    # images as floats, their product and its first two squares are kept for the backward pass, which begins with the
    # result and has one or two gradients at a time
    assert 5 * of_floats <= learns <= 8.1 * of_floats


def test_activations_grow_with_the_batch_and_are_less_without_gradients() -> None:
    _, method = method_of("--arch", "resnet18")
    small, large = (plan.activation_bytes(method.net, bs, 64, learns=True) for bs in (8, 16))
    assert large == pytest.approx(2 * small, rel=0.15)
    assert plan.activation_bytes(method.net, 8, 64, learns=False) < small / 2
    assert next(method.net.parameters()).device.type == "cpu"  # the network itself is untouched


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="no way to reset the peak of a process")
def test_the_estimate_is_near_what_a_step_takes() -> None:
    """In a process of its own, which has no memory to use again."""
    tell = "import test_plan; print(*test_plan.estimated_and_taken())"
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", tell], env=where, capture_output=True, text=True, check=True)
    estimated, taken = map(float, done.stdout.split())
    assert estimated / 3 < taken < 3 * estimated


def estimated_and_taken() -> tuple[float, float]:
    """Bytes that two steps are estimated to take above the weights, and those that they take."""
    opt, method = method_of("--arch", "resnet18", "--bs", "32", "--crop_size", "128")
    device = auxiliaries.pick_device(-1)
    before = auxiliaries.peak_memory(device)
    parts = plan.estimate_memory(opt, method)
    method.start_epoch(1)
    images, labels = torch.zeros(32, 3, 128, 128, dtype=torch.uint8), torch.arange(32) // 8
    for _ in range(2):
        method.step(images, labels, 1)
    taken = (auxiliaries.peak_memory(device) - before) * 2**30
    return sum(parts.values()) - parts["weights"], taken


def test_nothing_is_downloaded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "download_archives", lambda *_: pytest.fail("it downloads"))
    with pytest.raises(UserError, match=r"no data of cub200 was found in .*; --download"):
        run("--dry_run", "--dataset", "cub200", "--source_path", str(tmp_path / "data"), "--download")
    assert not list(tmp_path.iterdir())
