"""The table of all losses: learning rates are chosen on validation classes, and the same command goes on."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import pytest
from conftest import SMALL, training_flags

import benchmark_losses
import losses
import main
from auxiliaries import UserError


@pytest.fixture
def flags(source: Path, tmp_path: Path) -> list[str]:
    """Flags of main.py for cross-validations of two folds on cached features."""
    more = ("--num_training_sets", "2", "--num_training_partitions", "2", "--n_epochs", "1", "--dataset", "cv")
    return training_flags(source, tmp_path, *more, "--freeze_trunk", "--cache_features", "--cache_path", str(tmp_path))


def train(loss: str, flags: list[str], tmp_path: Path, *lrs: float) -> benchmark_losses.Result:
    _, flags = benchmark_losses.parse(["--savename", "all", *flags])
    return benchmark_losses.train_loss(loss, lrs, "all", flags, tmp_path / "log")


def test_the_learning_rate_is_the_best_on_validation_classes(flags: list[str], tmp_path: Path) -> None:
    result = train("triplet", flags, tmp_path, 1e-3, 1e-1)
    scores = {}
    for lr in ("0.001", "0.1"):
        summary = json.loads((tmp_path / "cv" / f"all_triplet_lr{lr}" / "fold_0" / "summary.json").read_text())
        scores[lr] = summary["selected"]["val"]["MAP@R"]
    assert len(set(scores.values())) == 2
    best = max(scores, key=scores.__getitem__)
    assert f"{result.lr:g}" == best
    folders = {
        lr: sorted(path.name for path in (tmp_path / "cv" / f"all_triplet_lr{lr}").glob("fold_*")) for lr in scores
    }
    assert folders.pop(best) == ["fold_0", "fold_1"]
    assert list(folders.values()) == [["fold_0"]]
    with open(tmp_path / "cv" / f"all_triplet_lr{best}" / "meta" / "results.csv", newline="") as file:
        rows = {(row["Network"], row["Split"], row["Metric"]): row for row in csv.DictReader(file)}
    for name, (mean, half) in result.scores.items():
        row = rows["selected", "test", name]
        assert (mean, half) == pytest.approx((float(row["Mean"]), float(row["CI 95 %"])))


def test_the_same_command_goes_on(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    train_run = main.main

    def counting(opt: argparse.Namespace, *args: object, **kwargs: bool) -> dict[str, float]:
        if not kwargs.get("only_check"):
            trained.append(f"{opt.lr:g} {opt.fold}")
            if trained == ["0.001 0", "0.1 0"]:
                raise KeyboardInterrupt
        return train_run(opt, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(main, "main", counting)
    with pytest.raises(KeyboardInterrupt):
        train("triplet", flags, tmp_path, 1e-3, 1e-1)
    result = train("triplet", flags, tmp_path, 1e-3, 1e-1)
    assert trained[2] == "0.1 0"  # the first learning rate is done
    del trained[:]
    assert train("triplet", flags, tmp_path, 1e-3, 1e-1) == result
    assert not trained


def test_results_of_other_flags_are_not_taken_for_these(flags: list[str], tmp_path: Path) -> None:
    train("triplet", flags, tmp_path, 1e-3)
    train("triplet", [*flags, "--n_epochs", "2"], tmp_path, 1e-3)
    summary = json.loads((tmp_path / "cv" / "all_triplet_lr0.001" / "fold_1" / "summary.json").read_text())
    assert summary["last"]["epoch"] == 2
    assert "--samples_per_class" in flags
    assert "must stay the same" in train("triplet", [*flags, "--embed_dim", "8"], tmp_path, 1e-3).failure


def test_a_loss_that_fails_is_named(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise UserError("the loss is not finite")

    monkeypatch.setattr(main, "main", diverge)
    result = train("npair", flags, tmp_path, 1e-3, 1e-2)
    assert result == benchmark_losses.Result("npair", 0, {}, "the loss is not finite")
    text = benchmark_losses.table([result])
    assert text.splitlines()[-1] == "| npair |  | the loss is not finite | the loss is not finite |"


@pytest.mark.slow
def test_the_command(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["triplet", "IntraPairVarianceLoss"]
    benchmark_losses.command(["--savename", "all", "--losses", *names, "--lrs", "1e-3", *flags])
    text = (tmp_path / "cv" / "all.md").read_text()
    assert text in capsys.readouterr().out
    shown = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]}
    assert shown == {"backbone alone", "triplet", "TupletMarginLoss IntraPairVarianceLoss"}


def test_all_losses_can_be_named() -> None:
    own, _ = benchmark_losses.parse(["--savename", "all", *SMALL])
    assert own.losses == [*losses.LOSSES, *losses.LIBRARY_LOSSES]
    assert set(benchmark_losses.NATURAL) - {benchmark_losses.BASE} <= set(own.losses)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--losses", "tripet"], "tripet"),
        (["--lrs", "0"], "--lrs"),
        (["--batch", "3"], "--batch"),
        (["--fold", "3", "--num_training_sets", "2"], "--fold 3 does not exist"),
    ],
)
def test_bad_input(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmark_losses.command(["--savename", "all", *argv])
