"""Tuning: what may be tuned, studies with their trials, interruptions, parallel processes, and what comes of them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from conftest import ROOT, SMALL, csv_rows

import auxiliaries
import config
import datasets
import main
import plots
import protocol
import runs
import tune
from auxiliaries import UserError

pytestmark = pytest.mark.usefixtures("without_pictures")

Flags = Callable[..., list[str]]
LR = ("--lr~LOG_BAYESIAN~", "1e-4", "1e-1")


@pytest.fixture(scope="session")
def feature_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def flags(source: Path, tmp_path: Path, feature_cache: Path) -> Flags:
    """A function that gives the flags of a study of one fold on cached features in tmp_path/cv/s, and any more."""

    def flags(*more: str, folds: int = 1) -> list[str]:
        where = ["--source_path", str(source), "--save_path", str(tmp_path), "--cache_path", str(feature_cache)]
        small = ["--bs", "8", "--samples_per_class", "2", "--embed_dim", "16", "--n_epochs", "2", "--no-tensorboard"]
        frozen = ["--freeze_trunk", "--cache_features", "--no-pictures", "--no-check_images"]
        scheme = ["--split_scheme", "cross_validation", "--num_training_sets", str(folds)]
        return [*SMALL, *where, *small, *frozen, "--dataset", "cv", *scheme, "--savename", "s", *more]

    return flags


def n_trials(number: int) -> tuple[str, str]:
    return "--bayesian_optimization_n_iter", str(number)


def open_journal(folder: Path, name: str = "cv/s") -> optuna.Study:
    storage = tune.open_journal(folder, name)
    return optuna.load_study(study_name=name, storage=storage)


def space_of(argv: list[str]) -> dict[str, Any]:
    return {parameter.name: parameter.describe() for parameter in tune.parse(argv).space}


# What is tuned


def test_flags_keys_and_choices_are_tuned(flags: Flags) -> None:
    tuned = ["--margin~BAYESIAN~", "0.05", "0.5", "--bs~INT_BAYESIAN~", "8", "16"]
    params = ["--optimizer", "SGD", "--optim_params", "momentum~BAYESIAN~=[0.5,0.99]", "nesterov=false"]
    params += ["foreach~CHOICE~=[true,false]"]
    found = space_of(flags(*LR, *tuned, *params, "--sampling~CHOICE~", "distance", "semihard"))
    assert found == {
        "lr": {"kind": "LOG_BAYESIAN", "bounds": [1e-4, 1e-1]},
        "margin": {"kind": "BAYESIAN", "bounds": [0.05, 0.5]},
        "bs": {"kind": "INT_BAYESIAN", "bounds": [8, 16]},
        "optim_params.momentum": {"kind": "BAYESIAN", "bounds": [0.5, 0.99]},
        "optim_params.foreach": {"kind": "CHOICE", "choices": ["true", "false"]},
        "sampling": {"kind": "CHOICE", "choices": ["distance", "semihard"]},
    }


def test_values_reach_the_flags_exactly(flags: Flags) -> None:
    tuned = ["--loss", "ContrastiveLoss", "--loss_params", "pos_margin~BAYESIAN~=[0,1]", "neg_margin=0.7"]
    search = tune.parse(flags(*LR, *tuned, "--freeze_batchnorm~CHOICE~", "true", "false"))
    value = 0.1234567890123456789e-3
    opt = search.flags({"lr": value, "loss_params.pos_margin": 1 / 3, "freeze_batchnorm": "true"})
    assert opt.lr == value
    assert opt.freeze_batchnorm is True
    assert opt.loss_params == {"pos_margin": repr(1 / 3), "neg_margin": "0.7"}


def test_layers_of_files_merge_with_what_is_tuned(flags: Flags, tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower.yaml", tmp_path / "upper.yaml"
    lower.write_text(
        "lr~LOG_BAYESIAN~: [1e-6, 1e-3]\nmargin~BAYESIAN~: [0.1, 0.2]\nbeta: 1.0\nnu~BAYESIAN~: [0, 1]\n"
        "loss: ContrastiveLoss\nloss_params: {pos_margin~BAYESIAN~: [0, 1], neg_margin~BAYESIAN~: [0, 1]}\n"
    )
    upper.write_text("margin: 0.3\nbeta~BAYESIAN~: [1, 2]\nnu: null\nloss_params: {pos_margin: 0.5}\ntuner: random\n")
    argv = flags("--config", str(lower), str(upper), "--lr~LOG_BAYESIAN~", "1e-5", "1e-2")
    search = tune.parse(argv)
    assert {parameter.name: parameter.bounds() for parameter in search.space} == {
        "lr": [1e-5, 1e-2],
        "beta": [1, 2],
        "loss_params.neg_margin": [0, 1],
    }
    assert search.own.tuner == "random"
    opt = search.flags({"lr": 1e-3, "beta": 1.5, "loss_params.neg_margin": 0.25})
    assert (opt.margin, opt.nu) == (0.3, 0.0)
    assert opt.loss_params == {"pos_margin": "0.5", "neg_margin": "0.25"}
    overridden = tune.parse([*argv, "--loss_params~OVERRIDE~", "pos_margin=0.1"])
    assert {parameter.name for parameter in overridden.space} == {"lr", "beta"}
    with pytest.raises(UserError, match="nothing is tuned"):
        tune.parse(flags(*LR, "--lr", "1e-3"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing is tuned: mark a flag"),
        (["--lr~LOG_BAYESIAN~", "1e-3"], r"--lr~LOG_BAYESIAN~ takes two bounds, such as 0.1 1, not 1e-3"),
        (["--lr~LOG_BAYESIAN~", "1", "2", "3"], r"takes two bounds, such as 0.1 1, not 1 2 3"),
        (["--lr~BAYESIAN~", "2", "1"], r"--lr~BAYESIAN~ 2 1: the first bound must be below the second"),
        (["--lr~BAYESIAN~", "1", "1"], "the first bound must be below the second"),
        (["--lr~LOG_BAYESIAN~", "0", "1"], r"--lr~LOG_BAYESIAN~ 0 1: a logarithmic scale begins above 0"),
        (["--lr~LOG_BAYESIAN~", "-1", "1"], r"--lr: -1 is not at least 0"),
        (["--lr~BAYESIAN~", "a", "b"], r"--lr: a is not a number"),
        (["--lr~BAYESIAN~", "0", "nan"], r"--lr: nan is not at least 0"),
        (["--lr~BAYESIAN~", "0", "inf"], r"--lr: inf is not below"),
        (["--bs~BAYESIAN~", "8", "16"], r"--bs takes integers: say --bs~INT_BAYESIAN~"),
        (["--bs~INT_BAYESIAN~", "8", "16.5"], r"--bs: 16.5 is not an integer"),
        (["--margin~INT_BAYESIAN~", "0.5", "3"], r"--margin~INT_BAYESIAN~ takes two integers, not 0.5 3"),
        (["--sampling~BAYESIAN~", "1", "2"], r"--sampling 1 is unknown"),
        (["--loss~BAYESIAN~", "triplet", "marginloss"], r"--loss doesn't take one number: only --loss~CHOICE~"),
        (["--sampling~CHOICE~", "distance"], r"--sampling~CHOICE~ takes two choices or more, not distance"),
        (["--sampling~CHOICE~", "distance", "distance"], "has the same choice twice"),
        (["--sampling~CHOICE~", "distance", "semihart"], r"--sampling semihart is unknown \(did you mean semihard\?\)"),
        (["--lr~BAYESAN~", "1", "2"], r"unknown suffix ~BAYESAN~ \(did you mean BAYESIAN\?\); there are ~BAYESIAN~"),
        (["--lrr~BAYESIAN~", "1", "2"], r"unknown flag --lrr \(did you mean --lr\?\): tune.py --help"),
        (["--learning_rate~BAYESIAN~", "1", "2"], r"did you mean --lr\?"),
        (["--tau~CHOICE~", "30", "55"], "--tau takes several values and can't be tuned"),
        (["--tau~BAYESIAN~", "30", "55"], "--tau doesn't take one number"),
        (["--loss_params~BAYESIAN~", "1", "2"], r"--loss_params: the suffix goes to a key of it"),
        (["--loss_params", "x~BAYESIAN~=1"], r"--loss_params \"x~BAYESIAN~=\[…\]\" takes two bounds, .* not 1$"),
        (["--loss_params", "x~BAYESIAN~=[a,b]"], "takes two numbers, not a"),
        (["--loss_params", "x~BAYESIAN~=[0,inf]"], "takes two finite numbers, not inf"),
        (["--loss_params", "x~BAYESIAN~=[0,1"], r"takes a list such as \[0.01,100\], not \[0,1"),
        (["--loss_params", "x~BAY~=[0,1]"], r"unknown suffix ~BAY~"),
        *(
            ([f"--{name}~CHOICE~", *values], f"--{name} can't be tuned")
            for name, values in {
                "savename": ("a", "b"),
                "gpu": ("0", "1"),
                "seed": ("0", "1"),
                "dataset": ("cv", "tiny"),
                "test_size": ("0.5", "0.6"),
                "eval_metric_for_best_epoch": ("NMI", "F1"),
                "save_path": ("a", "b"),
                "split_scheme": ("predefined", "cross_validation"),
            }.items()
        ),
        (["--tuner~CHOICE~", "tpe", "gp"], "--tuner can't be tuned"),
        ([*LR, "--resume_training"], "--resume_training is for main.py: the same tune.py command again"),
        ([*LR, "--evaluate", "x"], "--evaluate is for main.py"),
        ([*LR, "--reproduce_results", "x"], "--reproduce_results is for main.py"),
        ([*LR, "--fold", "0"], "--fold is for main.py: a trial trains all folds"),
        ([*LR, "--savename", 190 * "s"], "--savename is too long: the names of trials begin with it"),
        (["--lr~BAYESIAN~"], "--lr~BAYESIAN~ takes two bounds, such as 0.1 1, not nothing"),
        (["--config~CHOICE~", "a", "b"], "--config can't be tuned"),
        (["--evaluate~CHOICE~", "a", "b"], "--evaluate can't be tuned"),
        ([*LR, "--storage", "sqlite:////nowhere/at/all.db"], "--storage sqlite:.* can't be reached or used"),
        ([*LR, "--storage", ""], "--storage '' can't be reached or used"),
        ([*LR, "--storage", "sqlite:///a\0b"], r"--storage: 'sqlite:///a\\x00b' is not a URL: it has a NUL character"),
        *(
            ([*LR, "--storage", url], "is a database in memory, which ends with this command")
            for url in ("sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true")
        ),
        ([*LR, "--storage", "nosuch+driver://host"], "--storage .* can't be reached or used"),
        ([*LR, "--tuner", "grid"], "--tuner grid takes ~CHOICE~ only, and lr has bounds"),
        ([*LR, "--tuner", "cmaes"], "--tuner cmaes needs two numbers to tune or more"),
        ([*LR, "--tuner", "tpee"], r"--tuner tpee is unknown \(did you mean tpe\?\)"),
        ([*LR, "--pruner", "x"], "--pruner x is unknown; it takes one of median, hyperband, none"),
        ([*LR, "--reproductions", "0"], "0 is neither a number of seeds, such as 10, nor a range as 3,7"),
        ([*LR, "--reproductions", "7,3"], "7,3 is neither a number of seeds"),
        ([*LR, "--reproductions", "a"], "a is neither a number of seeds"),
        ([*LR, "--bayesian_optimization_n_iter", "-1"], "-1 is not at least 0"),
        ([*LR, "--splits_to_eval", "test", "--tune_on_test"], "there are validation classes"),
        ([*LR, "--split_scheme", "predefined"], "--num_training_sets needs --split_scheme cross_validation"),
        ([*LR, "--dataset", "nowhere"], "nowhere"),
        ([*LR, "--bs", "7"], "--bs 7 is not a multiple of --samples_per_class 2"),
        ([*LR, "--loss", "ContrastiveLoss", "--loss_params", "x~BAYESIAN~=[0,1]"], "has no parameter x"),
        ([*LR, "--loss~CHOICE~", "triplet", "TripletMarginLoss", "--loss_params", "margn=1"], "has no parameter margn"),
        (["--samples_per_class~CHOICE~", "2", "3"], "samples_per_class can't be 3: --bs 8 is not a multiple"),
        ([*LR, "--optim_params", "lr=1e-3"], "say the same: drop --lr"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(
    flags: Flags, tmp_path: Path, more: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tune.command(flags(*more))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cv").exists()


def test_test_classes_are_not_tuned_on_by_mistake(flags: Flags, tmp_path: Path) -> None:
    argv = flags(*LR)
    position = argv.index("--split_scheme")
    with pytest.raises(UserError, match="there are no validation classes, and values that are tuned on the test class"):
        tune.command(argv[:position] + argv[position + 4 :])
    assert not (tmp_path / "cv").exists()


def test_a_study_needs_a_name(flags: Flags) -> None:
    argv = flags(*LR)
    position = argv.index("--savename")
    with pytest.raises(UserError, match="how is the study called"):
        tune.command(argv[:position] + argv[position + 2 :])


def test_main_refuses_suffixes(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lr~LOG_BAYESIAN~ has a suffix for tune\.py, which searches"):
        main.command(flags(*LR))
    with pytest.raises(UserError, match=r"--loss_params alpha~BAYESIAN~ has a suffix for tune\.py"):
        main.command(flags("--loss_params", "alpha~BAYESIAN~=[0,1]"))
    file = tmp_path / "tuned.yaml"
    for text in ("lr~LOG_BAYESIAN~: [1e-6, 1e-3]", "loss_params: {alpha~BAYESIAN~: [0, 1]}"):
        file.write_text(f"seed: 2\n{text}\n")
        with pytest.raises(UserError, match=r"tuned\.yaml, line 2: .*has a suffix for tune\.py"):
            main.command(flags("--config", str(file)))
    with pytest.raises(UserError, match="unknown flag --lrr"):
        main.command(flags("--lrr~BAYESIAN~", "1", "2"))
    file.write_text("lr: 1\nlr~BAYESIAN~: [1, 2]\n")
    with pytest.raises(UserError, match="line 2: --lr is given twice"):
        tune.parse(flags("--config", str(file)))


def test_what_is_not_certain_to_fail_is_tried(flags: Flags) -> None:
    search = tune.parse(flags("--bs~INT_BAYESIAN~", "7", "17"))  # only even ones work
    assert {opt.bs % 2 for opt in tune.check_configurations(search)} == {0}


# Studies


def test_a_study_from_its_first_trial_to_its_best_flags(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(*LR, "--margin~BAYESIAN~", "0.05", "0.5", *n_trials(3), "--pruner", "none", folds=2)
    results = tune.command(argv)
    folder = tmp_path / "cv" / "s"
    study = open_journal(folder)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    for trial in study.trials:
        path = folder / f"s{trial.number}"
        folds = [json.loads((path / f"fold_{fold}" / "summary.json").read_text()) for fold in (0, 1)]
        scores = [fold["selected"]["val"]["Recall @ 1"] for fold in folds]
        assert trial.value == pytest.approx(np.mean(scores))
        assert trial.user_attrs["standard error"] == pytest.approx(abs(scores[0] - scores[1]) / 2)
        opt = runs.load_flags(path)
        assert (opt.lr, opt.margin, opt.seed) == (trial.params["lr"], trial.params["margin"], 1)
        epochs = {int(row["Epochs"]): float(row["Recall @ 1"]) for row in csv_rows(path / "fold_0/log_val_Base.csv")}
        assert trial.intermediate_values == pytest.approx(epochs)
    assert results == json.loads((folder / "results.json").read_text()) | {"failures": {}}
    best = folder / f"s{study.best_trial.number}"
    assert results["best"]["folder"] == best.name
    meta = protocol.read_results(best)
    assert results["test"]["Recall @ 1"] == meta["selected, test, Recall @ 1"]
    assert results["test"]["concatenation, Recall @ 1"] == meta["ConcatenateEmbeddings, test, Recall @ 1"]
    assert {path.name for path in folder.glob("*.svg")} == {"history.svg", "slices.svg"}  # too few for importances
    assert "Recall @ 1" in capsys.readouterr().out
    opt = config.resolve(config.parse(["--config", str(folder / "best.yaml")]))
    assert not config.changed_flags(runs.load_flags(best), config.with_flags(opt, fold=None))


def test_the_same_command_again_continues_and_may_change_bounds(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune.command(flags(*LR, *n_trials(1)))
    folder = tmp_path / "cv" / "s"
    before = (folder / "s0" / "output.txt").read_bytes()
    tune.command(flags("--lr~LOG_BAYESIAN~", "1e-3", "1e-2", *n_trials(2)))
    assert (folder / "s0" / "output.txt").read_bytes() == before
    study = open_journal(folder)
    assert len(study.trials) == 2
    assert 1e-3 <= study.trials[1].params["lr"] <= 1e-2
    (change,) = yaml.safe_load((folder / "study.yaml").read_text())["changes"]
    assert change.pop("date")
    assert change == {"parameter": "lr", "from": [1e-4, 1e-1], "to": [1e-3, 1e-2]}
    for more, message in (
        ((*LR, "--margin~BAYESIAN~", "0.1", "0.2"), r"is a study of lr~LOG_BAYESIAN~: bounds may change, but not"),
        (("--lr~BAYESIAN~", "1e-4", "1e-1"), r"is a study of lr~LOG_BAYESIAN~"),
        ((*LR, "--n_epochs", "3"), r"is a study with --n_epochs 2, and its trials must share that"),
        ((*LR, "--seed", "3"), r"is a study with --seed 1"),
        ((*LR, "--num_training_sets", "2"), r"is a study with --num_training_sets 1"),
        ((*LR, "--eval_metric_for_best_epoch", "NMI"), r"is a study with --eval_metric_for_best_epoch Recall @ 1"),
        ((*LR, "--tune_seeds"), r"is a study with --no-tune_seeds, and its trials"),
    ):
        with pytest.raises(UserError, match=message):
            tune.command(flags(*more))
    assert len(open_journal(folder).trials) == 2
    tune.command(flags(*LR, *n_trials(2), "--kernels", "0", "--log_every", "0", "--tuner", "random"))


def test_a_study_does_not_go_into_another_folder(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "cv" / "s").mkdir(parents=True)
    (tmp_path / "cv" / "s" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"cv/s exists and is not a study: choose another --savename"):
        tune.command(flags(*LR))


def test_what_stands_in_a_trials_place_says_nothing_about_its_values(flags: Flags, tmp_path: Path) -> None:
    tune.command(flags(*LR, *n_trials(1)))
    folder = tmp_path / "cv" / "s"
    (folder / "s1").mkdir()
    with pytest.raises(UserError, match=r"s1 is not a run folder: it has no config\.yaml; move it away"):
        tune.command(flags(*LR, *n_trials(2)))
    (folder / "s1").rmdir()
    tune.command(flags(*LR, *n_trials(2)))
    assert [trial.user_attrs.get("failure") for trial in open_journal(folder).trials] == [None, None]


def test_what_is_missing_in_a_study_is_told_or_made_anew(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, folder = flags(*LR, *n_trials(1)), tmp_path / "cv" / "s"
    before = tune.command(argv)
    (folder / "study.yaml").unlink()
    assert tune.command(argv) == before
    assert (folder / "study.yaml").exists()
    (folder / tune.JOURNAL).unlink()
    assert tune.command(argv) == before
    assert "study.journal is gone: the study begins anew" in capsys.readouterr().err
    shutil.rmtree(folder / "s0")
    assert tune.command(argv)["test"] == {}
    assert "s0 is gone: the best trial's metrics on the test classes are not known" in capsys.readouterr().err
    (folder / tune.LOCKS / "identity").write_bytes(b"\xff")
    with pytest.raises(UserError, match="identity can't be read: remove it"):
        tune.command(argv)


def test_a_blank_last_line_is_damage(flags: Flags, tmp_path: Path) -> None:
    tune.command(flags(*LR, *n_trials(1)))
    with open(tmp_path / "cv" / "s" / tune.JOURNAL, "a") as journal:
        journal.write("\n")  # Optuna finds it only once another line follows
    with pytest.raises(UserError, match=r"study\.journal is damaged"):
        tune.command(flags(*LR, *n_trials(2)))


@pytest.mark.parametrize("op_code", [5, 8])  # a value of the trial; its standard error, which is not needed
def test_a_journal_that_lacks_a_line(flags: Flags, tmp_path: Path, op_code: int) -> None:
    argv = flags(*LR, *n_trials(1))
    before = tune.command(argv)
    journal = tmp_path / "cv" / "s" / tune.JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    last = max(position for position, line in enumerate(lines) if f'"op_code":{op_code},' in line)
    journal.write_text("".join(lines[:last] + lines[last + 1 :]))
    if op_code == 8:
        assert tune.command(argv) == before
    else:
        with pytest.raises(UserError, match=r"the study cv/s is damaged: its trial 0 has no lr; restore study"):
            tune.command(argv)


@pytest.mark.parametrize("content", ["nonsense\n", '{"op_code": 0}\n', "[]\n{}\n", b"\xff\xfe\n".decode("latin-1")])
def test_a_damaged_journal_is_refused(flags: Flags, tmp_path: Path, content: str) -> None:
    (tmp_path / "cv" / "s").mkdir(parents=True)
    (tmp_path / "cv" / "s" / tune.JOURNAL).write_text(content)
    with pytest.raises(UserError, match=r"study\.journal is damaged, or not a journal of Optuna's"):
        tune.command(flags(*LR))


def test_the_journal_of_another_study_is_refused(flags: Flags, tmp_path: Path) -> None:
    folder = tmp_path / "cv" / "s"
    folder.mkdir(parents=True)
    optuna.create_study(study_name="other", storage=tune.open_journal(folder, "other"))
    with pytest.raises(UserError, match=r"study\.journal is the journal of another study, other: move it away"):
        tune.command(flags(*LR))


def test_a_line_that_was_cut_off_is_dropped(flags: Flags, tmp_path: Path) -> None:
    tune.command(flags(*LR, *n_trials(1)))
    folder = tmp_path / "cv" / "s"
    with open(folder / tune.JOURNAL, "a") as journal:
        journal.write('{"op_code":4,"wor')
    tune.command(flags(*LR, *n_trials(2)))
    assert [trial.state.name for trial in open_journal(folder).trials] == ["COMPLETE"] * 2


def test_a_folder_of_another_run_is_not_continued(flags: Flags, tmp_path: Path) -> None:
    tune.command(flags(*LR, *n_trials(1)))
    folder = tmp_path / "cv" / "s"
    (folder / tune.JOURNAL).unlink()
    before = (folder / "s0" / "output.txt").read_bytes()
    with pytest.raises(UserError, match=r"s0 holds another run, with another --lr: move it away"):
        tune.command(flags(*LR, *n_trials(1), "--seed", "2"))
    assert (folder / "s0" / "output.txt").read_bytes() == before


def test_other_storages(flags: Flags, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    tune.command(flags(*LR, *n_trials(1), "--storage", url))
    assert len(optuna.load_study(study_name="cv/s", storage=url).trials) == 1
    assert not (tmp_path / "cv" / "s" / tune.JOURNAL).exists()
    for bad in ("sqlite:////nowhere/at/all.db", "nonsense", "nosuchdb://user:secret@host/db"):
        with pytest.raises(UserError, match=r"--storage .* can't be reached or used") as caught:
            tune.command(flags(*LR, "--storage", bad))
        assert "secret" not in str(caught.value)


def test_seeds(flags: Flags, tmp_path: Path) -> None:
    argv = flags(*LR, *n_trials(2), "--tune_seeds", "--split_shuffle", "--tuner", "random")
    tune.command(argv)
    opts = [runs.load_flags(tmp_path / "cv" / "s" / name) for name in ("s0", "s1")]
    assert [opt.seed for opt in opts] == [1, 2]
    assert [opt.split_shuffle for opt in opts] == [1, 1]  # all are scored on the same classes


def test_tuning_on_test_classes_is_marked(
    flags: Flags, tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(*LR, *n_trials(1), "--tune_on_test")
    position = argv.index("--split_scheme")
    results = tune.command(argv[:position] + argv[position + 4 :])
    assert results["scored on"] == "test classes (--tune_on_test)"
    assert "tuned on the test classes" in (tmp_path / "cv" / "s" / "best.yaml").read_text()
    assert "tuned on the test classes: figures on them are optimistic" in capsys.readouterr().out
    assert results["best"]["value"] == results["test"]["Recall @ 1"]


# Interruptions


def interrupt(monkeypatch: pytest.MonkeyPatch, number: int, fold: int, epoch: int, error: BaseException) -> None:
    """Makes a trial's training raise an error after an epoch was saved."""
    save = runs.Run.save

    def broken(self: runs.Run, at: int, best_epoch: int) -> None:
        save(self, at, best_epoch)
        if self.folder.parent.name == f"s{number}" and (self.opt.fold, at) == (fold, epoch):
            raise error

    monkeypatch.setattr(runs.Run, "save", broken)


def curves(folder: Path) -> dict[str, Any]:
    """The rows of all trainings in a study."""
    found = {}
    for kind in ("train", "val", "test"):
        for path in sorted(folder.glob(f"s?/fold_*/log_{kind}_Base.csv")):
            found[str(path.relative_to(folder))] = csv_rows(path)
    return found


@pytest.mark.parametrize(("fold", "epoch"), [(0, 1), (1, 2)])
def test_an_interrupted_trial_goes_on_bit_for_bit(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fold: int, epoch: int
) -> None:
    argv = flags(*LR, *n_trials(2), "--tuner", "random", folds=2)
    with monkeypatch.context() as patch:
        interrupt(patch, 1, fold, epoch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tune.command(argv)
    folder = tmp_path / "cv" / "s"
    assert [trial.state.name for trial in open_journal(folder).trials] == ["COMPLETE", "RUNNING"]
    tune.command(argv)
    whole = [*argv, "--save_path", str(tmp_path / "whole")]
    tune.command(whole)
    broken, unbroken = open_journal(folder), open_journal(tmp_path / "whole" / "cv" / "s")
    assert curves(folder) == curves(tmp_path / "whole" / "cv" / "s")
    for one, other in zip(broken.trials, unbroken.trials, strict=True):
        assert (one.params, one.value, one.state) == (other.params, other.value, other.state)
        assert one.intermediate_values == other.intermediate_values


def test_a_trial_that_died_before_its_folder_was_there_is_taken_over(flags: Flags, tmp_path: Path) -> None:
    argv = flags(*LR, "--margin~BAYESIAN~", "0.1", "0.2", *n_trials(1), "--tuner", "random")
    session = tune.open_session(argv)
    asked = session.study.ask()  # RUNNING, without values
    assert asked.number == 0
    tune.command(argv)
    (trial,) = open_journal(tmp_path / "cv" / "s").trials
    assert trial.state.name == "COMPLETE"
    assert set(trial.params) == {"lr", "margin"}
    tune.command([*argv[: argv.index("--savename")], "--savename", "t", *argv[argv.index("--savename") + 2 :]])
    (fresh,) = open_journal(tmp_path / "cv" / "t", "cv/t").trials
    assert (fresh.params, fresh.value) == (trial.params, trial.value)


def test_a_trial_that_main_resumes_is_left_alone(flags: Flags, tmp_path: Path) -> None:
    session = tune.open_session(flags(*LR, *n_trials(1)))
    session.study.ask()
    fold = session.trial_folder(0) / "fold_0"
    fold.mkdir(parents=True)
    code = "import sys\nfrom pathlib import Path\nimport auxiliaries\n"
    code += "with auxiliaries.locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(fold)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        assert not tune.is_free(session, 0)
        holder.communicate("\n")
    assert tune.is_free(session, 0)


def test_a_pruned_trial_leaves_a_run_that_can_continue(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PruneSecond(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    monkeypatch.setattr(tune, "make_pruner", lambda *_: PruneSecond())
    argv = flags(*LR, *n_trials(3), "--tuner", "random", folds=2)
    results = tune.command(argv)
    folder = tmp_path / "cv" / "s"
    trials = open_journal(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert list(trials[1].intermediate_values) == [1]
    assert results["trials"] == {"complete": 2, "pruned": 1}
    assert not (folder / "s1" / "fold_1").exists()
    assert runs.epoch_reached(folder / "s1" / "fold_0") == 1
    tune.command(argv)  # it doesn't run again
    assert runs.epoch_reached(folder / "s1" / "fold_0") == 1
    main.command(["--save_path", str(tmp_path / "cv"), "--savename", "s1", "--resume_training"])
    assert protocol.read_results(folder / "s1")


def test_later_folds_and_the_end_of_a_single_run_are_not_pruned(flags: Flags, tmp_path: Path) -> None:
    asked: list[tuple[int, int | None]] = []

    class Never(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            asked.append((trial.number, trial.last_step))
            return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "make_pruner", lambda *_: Never())
        tune.command(flags(*LR, *n_trials(1), folds=2))
        assert asked == [(0, 1), (0, 2)]
        asked.clear()
        argv = flags(*LR, *n_trials(1), "--tune_on_test", "--savename", "t")
        position = argv.index("--split_scheme")
        tune.command(argv[:position] + argv[position + 4 :])
        assert asked == [(0, 1)]


@pytest.mark.parametrize("name", ["median", "hyperband", "none"])
def test_pruners_stop_the_bad_ones(flags: Flags, name: str) -> None:
    search = tune.parse(flags(*LR))
    opt = config.resolve(search.flags({"lr": 1e-3}, n_epochs=27))
    study = optuna.create_study(direction="maximize", pruner=tune.make_pruner(name, opt), study_name="fixed")
    pruned = 0
    for number in range(20):
        trial = study.ask()
        for epoch in range(1, 28):
            trial.report(float(number % 10 != 9) * epoch, epoch)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                pruned += 1
                break
        else:
            study.tell(trial, 1.0)
    assert (pruned > 0) == (name != "none")


def test_a_failed_trial_counts_as_the_worst(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(*LR, *n_trials(3), "--tuner", "random")
    with monkeypatch.context() as patch:
        interrupt(patch, 1, 0, 1, UserError("the loss is not finite"))
        results = tune.command(argv)
    trials = open_journal(tmp_path / "cv" / "s").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert trials[1].value == 0
    assert trials[1].user_attrs["failure"] == "the loss is not finite"
    assert results["failures"] == {1: "the loss is not finite"}
    assert results["trials"] == {"complete": 2, "failed": 1}
    assert "trial 1: failed: the loss is not finite" in capsys.readouterr().out


def test_a_loss_that_diverges_is_a_failure(flags: Flags, tmp_path: Path) -> None:
    argv = flags("--lr~CHOICE~", "1e14", "9e14", *n_trials(1), "--optimizer", "SGD")
    with pytest.raises(UserError, match=r"no trial of .* has finished: the loss is nan"):
        tune.command(argv)
    assert "the loss is nan" in open_journal(tmp_path / "cv" / "s").trials[0].user_attrs["failure"]


def test_where_low_values_are_better_a_failure_gets_the_highest_seen(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = ("--eval_metrics", "Recall", "--eval_metric_for_best_epoch", "Intra / Inter")
    interrupt(monkeypatch, 1, 0, 1, UserError("no"))
    results = tune.command(flags(*LR, *n_trials(3), "--tuner", "random", *metric))
    study = open_journal(tmp_path / "cv" / "s")
    assert study.direction.name == "MINIMIZE"
    seen = [*study.trials[0].intermediate_values.values(), *study.trials[1].intermediate_values.values()]
    assert study.trials[1].value == max(seen)
    assert results["best"]["value"] == min(study.trials[number].value or 0 for number in (0, 2))


def test_what_fails_in_every_trial_ends_the_command(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = main.main, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        if len(calls) > 1:
            raise UserError("the data are gone")
        return real(*args, **kwargs)

    argv = flags(*LR, *n_trials(3))
    with monkeypatch.context() as patch:
        patch.setattr(main, "main", broken)
        with pytest.raises(UserError, match="the data are gone"):
            tune.command(argv)
    assert [trial.state.name for trial in open_journal(tmp_path / "cv" / "s").trials] == ["RUNNING"]
    tune.command([*argv, *n_trials(1)])
    assert [trial.state.name for trial in open_journal(tmp_path / "cv" / "s").trials] == ["COMPLETE"]


def test_a_full_disk_says_nothing_about_a_trials_values(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, folder = flags(*LR, *n_trials(1)), tmp_path / "cv" / "s"
    error = UserError("last.pth.tar can't be written (No space left on device)")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")  # as atomic_write raises it
    with monkeypatch.context() as patch:
        interrupt(patch, 0, fold=0, epoch=1, error=error)
        with pytest.raises(UserError, match="No space left on device"):
            tune.command(argv)
    assert [trial.state.name for trial in open_journal(folder).trials] == ["RUNNING"]
    tune.command(argv)
    (trial,) = open_journal(folder).trials
    assert (trial.state.name, trial.user_attrs.get("failure")) == ("COMPLETE", None)


def test_output_that_cannot_be_kept_is_one_sentence(flags: Flags, tmp_path: Path) -> None:
    argv, folder = flags(*LR, *n_trials(1), folds=2), tmp_path / "cv" / "s" / "s0"
    tune.command(argv)
    shutil.rmtree(folder / "meta")
    (folder / "output.txt").unlink()
    (folder / "output.txt").mkdir()
    with pytest.raises(UserError, match=r"s0/output\.txt can't be written \(Is a directory\): move away what stands"):
        tune.command(argv)


def test_data_are_read_and_checked_once(flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(name: str) -> None:
        real = getattr(datasets, name)

        def counted(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(datasets, name, counted)

    count("read_splits")
    count("check_images")
    tune.command(flags(*LR, *n_trials(2), "--check_images"))
    assert calls == ["read_splits", "check_images"]
    datasets.give_splits(runs.load_flags(tmp_path / "cv" / "s" / "s0" / "fold_0"))
    assert calls == ["read_splits", "check_images", "read_splits"]


# Several processes


def start(argv: list[str], *before: str) -> subprocess.Popen:
    command = [*before, sys.executable, str(ROOT / "tune.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_whole(folder: Path, count: int) -> None:
    trials = open_journal(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * count
    assert len({trial.params["lr"] for trial in trials}) == count
    assert {path.name for path in folder.glob("s?")} == {f"s{number}" for number in range(count)}
    for trial in trials:
        (value,) = tune_scores(folder / f"s{trial.number}")
        assert trial.value == value


def tune_scores(folder: Path) -> list[float]:
    return [
        json.loads((path / "summary.json").read_text())["selected"]["val"]["Recall @ 1"]
        for path in sorted(folder.glob("fold_*"))
    ]


@pytest.mark.slow
def test_two_processes_share_a_study_and_one_is_killed(flags: Flags, tmp_path: Path) -> None:
    argv = flags(*LR, *n_trials(6), "--pruner", "none")
    processes = [start(argv), start(argv)]
    victim = processes[0]
    assert victim.stdout is not None
    for line in victim.stdout:  # it is at work on a trial
        if line.startswith("trial") and "lr" in line:
            break
    victim.send_signal(signal.SIGKILL)
    out = processes[1].communicate()[0]
    victim.wait()
    victim.stdout.close()
    assert processes[1].returncode == 0, out
    check_whole(tmp_path / "cv" / "s", 6)


@pytest.mark.slow
def test_two_network_namespaces_share_a_study(flags: Flags, tmp_path: Path) -> None:
    apart = ["unshare", "-rn"]
    try:
        subprocess.run([*apart, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")
    argv = flags(*LR, *n_trials(4), "--pruner", "none")
    processes = [start(argv, *apart), start(argv, *apart)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("trial" in out for out in outputs)
    check_whole(tmp_path / "cv" / "s", 4)


# Samplers


@pytest.mark.parametrize("tuner", ["tpe", "gp", "random", "cmaes"])
def test_a_tuner_depends_on_seed_and_number_alone(flags: Flags, tuner: str) -> None:
    search = tune.parse(flags(*LR, "--margin~BAYESIAN~", "0", "1", "--tuner", tuner))

    def search_with(seed: int, restarts: bool) -> list[float]:
        study = optuna.create_study(direction="maximize", sampler=tune.make_sampler(search, seed))
        for _ in range(14):
            if restarts:
                study.sampler = tune.make_sampler(search, seed)
            trial = study.ask({p.name: p.distribution() for p in search.space})
            study.tell(trial, -((math.log10(trial.params["lr"]) + 2) ** 2) - (trial.params["margin"] - 0.4) ** 2)
        return [trial.params["margin"] for trial in study.trials]

    once = search_with(1, restarts=False)
    assert search_with(1, restarts=True) == once
    assert search_with(2, restarts=False) != once
    assert len(set(once)) == len(once)


def test_a_grid_is_walked_through_once(flags: Flags, tmp_path: Path) -> None:
    grid = ["--margin~CHOICE~", "0.1", "0.2", "--beta~CHOICE~", "1.0", "1.2"]
    tune.command(flags(*grid, "--tuner", "grid", *n_trials(9), "--n_epochs", "1"))
    tried = [(trial.params["margin"], trial.params["beta"]) for trial in open_journal(tmp_path / "cv" / "s").trials]
    assert sorted(tried) == [("0.1", "1.0"), ("0.1", "1.2"), ("0.2", "1.0"), ("0.2", "1.2")]


# What comes of it


def test_reproductions(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(*LR, folds=2)
    with pytest.raises(UserError, match=r"no trial of .*cv/s has finished; give --bayesian_optimization_n_iter a high"):
        tune.command([*argv, *n_trials(0), "--reproductions", "2"])
    tune.command([*argv, *n_trials(1), "--reproductions", "1,2"])
    folder = tmp_path / "cv" / "s"
    assert sorted(path.name for path in folder.glob("*_reproduction*")) == ["s0_reproduction1"]
    results = tune.command([*argv, *n_trials(1), "--reproductions", "2"])
    names = ["s0_reproduction0", "s0_reproduction1"]
    assert results["reproductions"]["folders"] == names
    assert [runs.load_flags(folder / name).seed for name in names] == [10_001, 10_002]
    found = {(row["Network"], row["Split"], row["Metric"]): row for row in results["reproductions"]["rows"]}
    for network in ("selected", "untrained", "trunk"):
        per_seed = []
        for name in names:
            folds = [json.loads((folder / name / f"fold_{f}" / "summary.json").read_text()) for f in (0, 1)]
            per_seed.append(np.mean([fold[network]["test"]["NMI"] for fold in folds]))
        row = found[network, "test", "NMI"]
        assert row["Mean"] == pytest.approx(np.mean(per_seed))
        assert row["CI 95 %"] == pytest.approx(12.7062 * np.std(per_seed, ddof=1) / math.sqrt(2), rel=1e-4)
    assert ("ConcatenateEmbeddings", "test", "Recall @ 1") in found
    val = found["selected", "val", "Recall @ 1"]["Mean"]
    assert results["luck"]["above reproductions"] == pytest.approx(results["best"]["value"] - val)
    assert "with 2 other seeds: mean ± half of its 95 % confidence interval" in capsys.readouterr().out


class FakeSession:
    """As much of a session as its figures need."""

    def __init__(self, search: tune.Search, study: optuna.Study, lower_is_better: bool = False):
        self.search, self.study, self.lower_is_better, self.split, self.metric = (
            search,
            study,
            lower_is_better,
            "val",
            "M",
        )

    def finished(self) -> list[Any]:
        return [trial for trial in self.study.trials if trial.state.name == "COMPLETE"]


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_luck_is_what_the_best_score_has_of_noise(flags: Flags, lower_is_better: bool) -> None:
    search = tune.parse(flags(*LR, "--margin~BAYESIAN~", "0", "1", "--sampling~CHOICE~", "distance", "semihard"))
    rng, sign = np.random.default_rng(0), -1 if lower_is_better else 1
    study = optuna.create_study(
        direction="minimize" if lower_is_better else "maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )

    def truth(values: dict[str, Any]) -> float:
        return sign * (0.5 - 0.05 * (math.log10(values["lr"]) + 2) ** 2 + 0.1 * (values["sampling"] == "semihard"))

    for _ in range(60):
        trial = study.ask({p.name: p.distribution() for p in search.space})
        study.tell(trial, truth(trial.params) + rng.normal(0, 0.03))
    session: Any = FakeSession(search, study, lower_is_better)
    best, value = study.best_trial, study.best_value
    luck: Any = tune.measure_luck(session, best, [])
    assert luck["above model"] == pytest.approx(sign * (value - truth(best.params)), abs=0.02)
    assert luck["above model"] > 0.02
    assert luck["above reproductions"] is None
    rows = [{"Network": "selected", "Split": "val", "Metric": "M", "Mean": value - sign * 0.1}]
    assert tune.measure_luck(session, best, rows)["above reproductions"] == pytest.approx(0.1)
    importances = tune.find_importances(session)
    assert importances["lr"] > importances["margin"]
    assert importances["sampling"] > importances["margin"]
    few: Any = FakeSession(search, optuna.create_study())
    assert tune.find_importances(few) == {}


def test_pictures_of_any_trials(tmp_path: Path) -> None:
    values: dict[str, float | str] = {"lr": 1e-3, "sampling": "distance", "$x_y": 1.0}
    names, cases = list(values), {"none": [], "one": [("complete", 0.5)], "failed": [("failed", math.nan)]}
    cases["all"] = [("complete", 0.5), ("failed", math.nan), ("pruned", 0.1), *[("complete", 0.6)] * 12]
    cases["far"] = [("complete", 0.5 + 0.01 * number) for number in range(12)] + [("complete", 0.01)]
    for name, states in cases.items():
        points = [plots.TrialPoint(i, value, 0.01, state, values) for i, (state, value) in enumerate(states)]
        plots.save_history(tmp_path / f"{name}.svg", points, "Recall @ 1", lower_is_better=name == "one")
        plots.save_slices(tmp_path / f"{name}_slices.svg", points, names, ["lr"], "Recall @ 1", name == "one")
    plots.save_importances(tmp_path / "importances.svg", {"lr": 0.7, "$x_y": 0.3}, "Recall @ 1")
    texts = [path.read_text() for path in tmp_path.glob("*.svg")]
    assert len(texts) == 11
    assert sum("1 far off, not shown" in text for text in texts) == 4
    assert all(text.endswith("</svg>\n") for text in texts)


def test_a_study_prints_help_without_suffixes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.parse(["--help"])
    out = capsys.readouterr().out
    assert "--bayesian_optimization_n_iter" in out
    assert "--lr~LOG_BAYESIAN~ 1e-6 1e-3 on a logarithmic scale" in " ".join(out.split())
    assert "~BAYESIAN~" not in out[: out.find("Searches for the best values")]


def test_split_suffix() -> None:
    assert auxiliaries.split_suffix("--lr~LOG_BAYESIAN~") == ("--lr", "LOG_BAYESIAN")
    assert auxiliaries.split_suffix("--loss_params~OVERRIDE~") == ("--loss_params~OVERRIDE~", "")
    assert auxiliaries.split_suffix("a~b") == ("a~b", "")


def test_help_begins_with_the_flags_of_the_search() -> None:
    titles = re.findall(r"^(\w.*):$", tune.build_parser().format_help(), re.MULTILINE)
    assert titles[:3] == ["options", "tuning", "run"]
