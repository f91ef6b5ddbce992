"""Several processes that train one run together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, csv_rows, training_flags
from ranks_child import CASES

import auxiliaries
import config
import datasets
import main
import methods
import netlib
import runs
from auxiliaries import Ranks, UserError

CHILD = ROOT / "tests" / "ranks_child.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


Results = Callable[[int], list[dict[str, dict[str, torch.Tensor]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """A function that gives what each of so many processes has learned in each case."""
    folder, known = tmp_path_factory.mktemp("ranks"), {}

    def learn(count: int) -> list[Any]:
        if count not in known:
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_WAIT_POLICY": "PASSIVE"}
            common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            processes = [
                subprocess.Popen(
                    [sys.executable, str(CHILD), str(folder / str(count))],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(count)
            ]
            assert [process.wait() for process in processes] == [0] * count
            known[count] = [torch.load(folder / f"{count}_{rank}") for rank in range(count)]
        return known[count]

    return learn


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", list(CASES))
def test_several_processes_learn_what_one_does(results: Results, case: str, count: int) -> None:
    (alone,) = results(1)
    assert not torch.equal(alone[case]["loss 0"], alone[case]["loss 4"])
    for of_rank in results(count):
        assert of_rank[case].keys() == alone[case].keys()
        for name, value in alone[case].items():
            torch.testing.assert_close(of_rank[case][name], value, rtol=1e-6, atol=1e-12, msg=f"{case}: {name}")


# One process of several, without the others


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function that makes this process one of several, as far as it needs none of the others."""

    def become(number: int, count: int) -> None:
        monkeypatch.setattr(auxiliaries, "_ranks", Ranks(number, count, number, count))

    return become


def test_shares_are_the_whole(as_rank: Any) -> None:
    for things in (1, 5, 12):
        for count in (1, 2, 3, 5):
            taken: list[int] = []
            for number in range(count):
                as_rank(number, count)
                taken += range(things)[auxiliaries.share(things)]
            assert taken == list(range(things))


def small(source: Path, tmp_path: Path, *flags: str) -> Any:
    return config.resolve(config.parse(training_flags(source, tmp_path, "--dataset", "tiny", *flags)))


def test_a_rank_loads_its_share_of_the_same_batches(source: Path, tmp_path: Path, as_rank: Any) -> None:
    opt = small(source, tmp_path)
    splits = datasets.give_splits(opt)
    whole = [*datasets.give_dataloaders(opt, splits).train]
    (in_order,) = datasets.give_dataloaders(opt, splits).test
    parts, tests = [], []
    for number in range(4):
        as_rank(number, 4)
        loaders = datasets.give_dataloaders(opt, splits)
        assert len(loaders.train) == len(whole)
        parts.append([*loaders.train])
        assert loaders.test[0].query.is_shared
        tests += [images for images, _, _ in loaders.test[0].query]
    for (images, labels, idx), *of_ranks in zip(whole, *parts):
        assert torch.equal(torch.cat([own for own, _, _ in of_ranks]), images)
        for _, own_labels, own_idx in of_ranks:
            assert torch.equal(own_labels, labels)
            assert torch.equal(own_idx, idx)
    assert torch.equal(torch.cat(tests), torch.cat([images for images, _, _ in in_order.query]))


def test_batches_that_cannot_be_shared_are_refused(source: Path, tmp_path: Path, as_rank: Any) -> None:
    opt = small(source, tmp_path)
    splits = datasets.give_splits(opt)
    as_rank(0, 3)
    with pytest.raises(UserError, match="--bs 8 can't be shared equally by 3 processes: give a multiple of 6, such as"):
        datasets.give_dataloaders(opt, splits)
    batch = [(0, 1, 0), (1, 1, 1)]
    with pytest.raises(UserError, match="3 processes can't share a batch of 2 images equally"):
        list(datasets.Shares([batch]))
    assert list(datasets.Shares([batch * 3])) == [batch]


def test_ranks_draw_apart_and_go_on_alike(as_rank: Any) -> None:
    drawn, after = [], []
    for number, position in [(0, 1), (1, 1), (1, 2), (1, 1)]:
        as_rank(number, 2)
        auxiliaries.seed_everything(1, 1)
        with auxiliaries.drawing_apart(position, torch.device("cpu")):
            drawn.append(torch.rand(3))
        after.append(torch.rand(3))
    assert all(torch.equal(one, after[0]) for one in after)
    assert torch.equal(drawn[1], drawn[3])
    assert len({tuple(one.tolist()) for one in drawn}) == 3


def test_devices_of_a_machine_are_handed_out(monkeypatch: pytest.MonkeyPatch, as_rank: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    as_rank(1, 4)
    assert auxiliaries.find_device(1) == torch.device("cuda", 2)
    assert auxiliaries.find_device(-1).type == "cpu"
    as_rank(3, 4)
    with pytest.raises(UserError, match=r"4 processes .* from --gpu 0 on, .* give torchrun --nproc_per_node 3"):
        auxiliaries.pick_device(0)


def test_only_the_first_rank_writes(tmp_path: Path, as_rank: Any) -> None:
    as_rank(1, 2)
    auxiliaries.save_json(tmp_path / "some.json", {})
    with auxiliaries.locked(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


def test_batchnorm_that_is_not_synchronized_is_noticed(
    source: Path, tmp_path: Path, as_rank: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(0, 2)
    method = methods.build_training(small(source, tmp_path, "--sync_batchnorm"), 4, torch.device("cpu"))
    printed = capsys.readouterr().err
    assert "BatchNorm normalizes over the 4 images of each process instead of 8" in printed
    assert "--sync_batchnorm does on GPUs alone" in printed
    names = list(method.net.state_dict())
    methods._normalize_over_ranks(small(source, tmp_path, "--sync_batchnorm"), method.net, torch.device("cuda"))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in method.net.backbone.modules())
    assert list(method.net.state_dict()) == names  # checkpoints don't know of it
    assert not capsys.readouterr().err


def test_frozen_layers_stay_so_when_synchronized(source: Path, tmp_path: Path, as_rank: Any) -> None:
    as_rank(0, 2)
    opt = small(source, tmp_path, "--sync_batchnorm", "--freeze_layers", "conv1", "stage2")
    net = netlib.networkselect(opt)
    methods._normalize_over_ranks(opt, net, torch.device("cuda"))
    layers = {
        name: module.training
        for name, module in net.train().backbone.named_modules()
        if isinstance(module, torch.nn.SyncBatchNorm)
    }
    assert {is_learning for name, is_learning in layers.items() if name.startswith(("conv1", "stage2"))} == {False}
    assert {is_learning for name, is_learning in layers.items() if name.startswith("stage3")} == {True}


# Whole runs


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, free_port(), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a network whose BatchNorm keeps its statistics, so that processes can be compared."""
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(0)
    net = netlib.networkselect(config.resolve(config.parse(["--arch", "shufflenet_v2_x0_5", "--not_pretrained"])))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():  # statistics of noise
        net.train().backbone(torch.randn(32, 3, 32, 32))
    torch.save(net.backbone.state_dict(), file)
    return ["--pretrained", "--weights", str(file), "--freeze_batchnorm", "--lr", "1e-4", "--loss", "marginloss"]


def columns(rows: list[dict[str, str]], ignored: str = "") -> np.ndarray:
    return np.array([[float(value) for name, value in row.items() if name != ignored] for row in rows])


@pytest.mark.slow
def test_whole_run(source: Path, tmp_path: Path, still: list[str]) -> None:
    # clusters of a few points depend on the last digits of their embeddings
    metrics = ("--eval_metrics", "Recall", "MAP@R", "--grad_measure", "--dist_measure")
    flags = training_flags(source, tmp_path, "--dataset", "tiny", *still, *metrics)
    done = launch("main.py", *flags, "--savename", "two", "--n_epochs", "2", "--kernels", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1
    alone = main.command([*flags, "--savename", "one", "--n_epochs", "2"])
    one, two = tmp_path / "tiny" / "one", tmp_path / "tiny" / "two"
    assert sorted(path.name for path in one.parent.iterdir()) == ["one", "two"]
    files = [{path.name for path in folder.iterdir() if path.name != "git.diff"} for folder in (one, two)]
    assert files[0] == files[1]
    for name in ("log_train_Base.csv", "log_val_Base.csv", "log_iterations.csv", "distance_measures_Train.csv"):
        rows, expected = csv_rows(two / name), csv_rows(one / name)
        assert [row.keys() for row in rows] == [row.keys() for row in expected]
        np.testing.assert_allclose(columns(rows), columns(expected), rtol=2e-3, err_msg=name)
    shared = runs.test_metrics(runs.read_summary(two))
    assert shared == pytest.approx(alone, rel=1e-3)
    state = runs.read_state(two / "last.pth.tar")
    assert state["processes"] == 2

    done = launch("main.py", "--save_path", str(tmp_path), "--savename", "two", "--evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test | ") == 1
    assert len(auxiliaries.load_json(two / "evaluation.json")) == 1

    more = ("--resume_training", "--n_epochs", "3")
    ends = [main.command(["--save_path", str(tmp_path), "--savename", name, *more]) for name in ("one", "two")]
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


@pytest.mark.slow
def test_resumed_run_is_the_uninterrupted_one(source: Path, tmp_path: Path) -> None:
    flags = training_flags(source, tmp_path, "--dataset", "tiny", "--no-tensorboard", "--no-pictures")
    done = launch("main.py", *flags, "--savename", "whole", "--n_epochs", "2")
    assert done.returncode == 0, done.stderr
    assert launch("main.py", *flags, "--savename", "parts", "--n_epochs", "1").returncode == 0
    more = ("--savename", "parts", "--resume_training", "--n_epochs", "2")
    assert launch("main.py", "--save_path", str(tmp_path), *more).returncode == 0
    whole, parts = (runs.read_state(tmp_path / "tiny" / name / "last.pth.tar") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())


@pytest.mark.slow
def test_killed_rank_ends_all_and_one_process_goes_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = training_flags(source, tmp_path, "--dataset", "tiny", "--savename", "run", "--n_epochs", "500")
    command = [*TORCHRUN, free_port(), "main.py", *flags, "--no-pictures", "--no-tensorboard"]
    agent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    assert any(line.strip().startswith("2/500") for line in agent.stdout)  # then the first is saved
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    started = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    (second,) = [int(pid) for pid, environment in started.items() if b"RANK=1" in environment]
    os.kill(second, signal.SIGKILL)
    _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 1, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    epoch = runs.epoch_reached(tmp_path / "tiny" / "run")
    more = ("--savename", "run", "--resume_training", "--n_epochs", str(epoch + 1))
    main.command(["--save_path", str(tmp_path), *more])
    assert "was trained by 2 process(es) and goes on with 1" in capsys.readouterr().err
    assert runs.epoch_reached(tmp_path / "tiny" / "run") == epoch + 1


@pytest.mark.slow
def test_folds_and_what_is_refused(source: Path, tmp_path: Path) -> None:
    cross = ("--dataset", "cv", "--split_scheme", "cross_validation", "--num_training_sets", "2", "--n_epochs", "1")
    more = ("--no-pictures", "--no-tensorboard", "--meta_testing_method", "ConcatenateEmbeddings")
    flags = training_flags(source, tmp_path, *cross, *more)
    done = launch("main.py", *flags, "--savename", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean over 2 folds") == 1
    assert {path.name for path in (tmp_path / "cv" / "run").iterdir()} >= {"fold_0", "fold_1", "meta"}

    refused = {
        ("main.py", *flags, "--savename", "run", "--fold", "1"): "fold_1 exists: continue it with --resume_training",
        ("main.py", *flags, "--savename", "odd", "--bs", "9", "--samples_per_class", "3"): "--bs 9 can't be shared",
        ("tune.py", *flags): "tune.py is not made for torchrun, which main.py is: start it by python",
    }
    for command, message in refused.items():
        done = launch(*command)
        assert done.returncode == 1
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert message in error
        assert "exitcode  : 2" in done.stderr
    assert [path.name for path in (tmp_path / "cv").iterdir()] == ["run"]
