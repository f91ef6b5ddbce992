# PYTHON_ARGCOMPLETE_OK
"""Searches for the best values of flags, by Optuna: every trial is an ordinary run, scored on validation classes.

Tune a learning rate and a margin, with 50 trials of a cross-validation:
    python tune.py --dataset cub200 --split_scheme cross_validation --savename margin \
        --lr~LOG_BAYESIAN~ 1e-6 1e-3 --margin~BAYESIAN~ 0.05 0.5 --bayesian_optimization_n_iter 50
Continue it after it was stopped, or help with it from another machine that shares the disk: the same command.
Train the best flags with ten other seeds:
    the same command with --reproductions 10
Train them once more, or on something else:
    python main.py --config Training_Results/cub200/margin/best.yaml
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before torch is loaded: threads that spin while they wait take cores from others
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what can stand at the cursor
        import completion

        completion.complete("tune")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load ends it at once, without a traceback

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import random
import re
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

import auxiliaries
import config
import datasets
import evaluate
import main
import plots
import protocol
import records
import runs
from auxiliaries import FlagParser, Tuned, UserError, locked, notice, number, shown
from config import with_flags

if TYPE_CHECKING:
    import optuna

TUNERS = ("tpe", "gp", "random", "cmaes", "grid")
PRUNERS = ("median", "hyperband", "none")
SUFFIXES = (
    "A suffix marks what is tuned, and its bounds or choices follow: --lr~LOG_BAYESIAN~ 1e-6 1e-3 on a logarithmic "
    "scale, --margin~BAYESIAN~ 0.05 0.5, --bs~INT_BAYESIAN~ 32 128, --sampling~CHOICE~ distance semihard, "
    '--loss_params "alpha~BAYESIAN~=[1,64]".'
)
JOURNAL = "study.journal"
LOCKS = ".locks"
DEFAULT_TRIALS = 50
REPRODUCTION_SEEDS = 10_000  # added to --seed: no trial has been chosen for its luck with one of them
CONFIGURATIONS_TRIED = 200  # before the first trial
GRACE = 10  # seconds after which a process that was killed while it wrote to the journal no longer keeps others out
ASK_AGAIN = 1.0  # seconds between two looks at what other processes do
FEWEST_FOR_IMPORTANCES = 5  # trials
FEWEST_FOR_MODEL = 10  # trials; one of fewer takes all noise for signal, and finds no luck


def add_arguments(parser: FlagParser) -> None:
    """Declares the flags of tuning."""
    # fmt: off
    add = parser.add_argument_group("tuning", stored=False).add_argument
    add("--bayesian_optimization_n_iter", type=number(int, 0), metavar="N",
        help=f"number of trials, over all processes of the study (default: {DEFAULT_TRIALS}; with --tuner grid all "
        "combinations); a later command may raise it")
    add("--tuner", choices=TUNERS, default="tpe",
        help="how trials are chosen: tpe copes with everything; gp is the best for few trials of few values; cmaes "
        "needs 100 trials or more, and draws choices at random; grid tries all combinations of ~CHOICE~ values")
    add("--pruner", choices=PRUNERS, default="median",
        help="which trials stop early, by their validation scores: median: those worse than the median of others at "
        "the same epoch, after the first five trials and the first fifth of the epochs; hyperband: most, after a few "
        "epochs; under cross-validation only the first fold is watched")
    add("--tune_seeds", action="switch",
        help="give every trial a --seed of its own, so that no value is chosen for its luck with one seed")
    add("--tune_on_test", action="switch",
        help="score trials on the test classes where there are no validation classes, and mark the result so")
    add("--storage", type=_storage, metavar="URL",
        help="where Optuna keeps the study, such as postgresql://user@host/name, for machines that share no disk "
        f"(default: {JOURNAL} in the study's folder)")
    add("--reproductions", type=_reproductions, metavar="N|A,B",
        help="train the best trial's flags with N other seeds; A,B: only reproductions A to B - 1, counted from 0, so "
        "that several machines can share them")
    # fmt: on


def _storage(text: str) -> str:
    """An argparse type: a URL of a storage that outlives this process."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a URL: it has a NUL character")
    if re.match(r"sqlite(\+\w+)?:(/{0,3}$|.*:memory:|.*mode=memory)", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is a database in memory, which ends with this command")
    return text


def _reproductions(text: str) -> range:
    """An argparse type: `N`, or `A,B` with A < B, as a range."""
    match = re.fullmatch(r"(?:([0-9]{1,4}),)?([0-9]{1,4})", text)
    found = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither a number of seeds, such as 10, nor a range as 3,7")
    return found


# What is tuned


@dataclass(frozen=True)
class Parameter:
    """A value that is tuned.

    Attributes:
        name: a flag, such as `lr`, or a flag and a key of it, such as `loss_params.alpha`.
        kind: one of `TUNING_KINDS`.
        low: its lower bound.
        high: its upper bound.
        choices: what there is to choose from, as text; empty for numbers.
    """

    name: str
    kind: str
    low: float = math.nan
    high: float = math.nan
    choices: tuple[str, ...] = ()

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna draws it from."""
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if self.kind == "INT_BAYESIAN":
            return distributions.IntDistribution(int(self.low), int(self.high))
        return distributions.FloatDistribution(self.low, self.high, log=self.kind == "LOG_BAYESIAN")

    def describe(self) -> dict[str, Any]:
        """Its kind, and its bounds or choices, as plain values."""
        return {"kind": self.kind, **({"choices": list(self.choices)} if self.choices else {"bounds": self.bounds()})}

    def bounds(self) -> list[float]:
        """Its bounds, as integers where it is one."""
        return [int(bound) if self.kind == "INT_BAYESIAN" else bound for bound in (self.low, self.high)]

    def examples(self, rng: random.Random) -> list[Any]:
        """Values to try before the first trial."""
        if self.choices:
            return list(self.choices)
        low, high = self.bounds()
        if self.kind == "INT_BAYESIAN":
            return [low, high, (low + high) // 2, *(rng.randint(int(low), int(high)) for _ in range(3))]
        return [low, high, math.sqrt(low * high) if self.kind == "LOG_BAYESIAN" else (low + high) / 2]


@dataclass(frozen=True)
class Search:
    """What a command line asks for.

    Attributes:
        own: the flags of tuning.
        layered: every flag of main.py as the layers give it, without what is tuned.
        given: the flags that the user gave, tuned ones included.
        space: what is tuned.
        is_checked: whether the images have been checked, once for all trials.
    """

    own: argparse.Namespace
    layered: Mapping[str, Any]
    given: Sequence[str]
    space: Sequence[Parameter]
    is_checked: bool = False

    def flags(self, values: Mapping[str, Any], **more: Any) -> argparse.Namespace:
        """The flags of main.py with these values of what is tuned, and others for some.

        Raises:
            UserError: a value is invalid.
        """
        layered = {name: dict(value) if isinstance(value, dict) else value for name, value in self.layered.items()}
        for parameter in self.space:
            flag, _, key = parameter.name.partition(".")
            text = str(values[parameter.name])
            if key:
                layered[flag][key] = text
            else:
                layered[flag] = config.parse_one(flag, text)
        opt = config.complete(layered, self.given)
        opt.check_images = opt.check_images and not self.is_checked
        if opt.split_shuffle == 0:  # trials and reproductions of other seeds share the classes
            opt.split_shuffle = opt.seed
        opt.report = opt.report and "report" in self.given  # a page takes longer than many a trial
        return with_flags(opt, **more)


def build_parser() -> FlagParser:
    """The parser of main.py's flags, which take suffixes here, and of the script's own."""
    parser = config.compose_parser("tune.py", f"{str(__doc__).splitlines()[0]} {SUFFIXES}", tunes=True)
    add_arguments(parser)
    parser.list_first("tuning")
    parser.take_suffixes()
    return parser


def parse(argv: Sequence[str]) -> Search:
    """What a command line asks for.

    Raises:
        UserError: a flag is wrong, or can't be tuned.
    """
    parser = build_parser()
    layered = config.parse_layers(parser, argv)
    own = {name: layered.pop(name) for name in list(layered) if name not in config.build_parser().traits}
    tuned: dict[str, Tuned] = {}
    for name, value in layered.items():
        if isinstance(value, Tuned):
            tuned[name] = value
        elif isinstance(value, dict):
            tuned |= {f"{name}.{key}": entry for key, entry in value.items() if isinstance(entry, Tuned)}
            layered[name] = {key: entry for key, entry in value.items() if not isinstance(entry, Tuned)}
    own = {name: parser.get_default(name) if value is auxiliaries.UNSET else value for name, value in own.items()}
    given = [name for name, value in layered.items() if value is not auxiliaries.UNSET]
    if not tuned:
        raise UserError(
            "nothing is tuned: mark a flag, such as --lr~LOG_BAYESIAN~ 1e-6 1e-3 or --sampling~CHOICE~ distance "
            "semihard"
        )
    space = [make_parameter(name, entry) for name, entry in tuned.items()]
    refuse_flags(layered, given)
    plain = {name: auxiliaries.UNSET if isinstance(value, Tuned) else value for name, value in layered.items()}
    search = Search(argparse.Namespace(**own), plain, given, space)
    refuse_tuner(search)
    return search


def refuse_flags(layered: Mapping[str, Any], given: Sequence[str]) -> None:
    """Refuses what only main.py does, and a study without a name.

    Raises:
        UserError: such a flag is given.
    """
    if "dry_run" in given:
        raise UserError("--dry_run is for main.py: give it one trial's flags, without suffixes")
    for name in ("resume_training", "reproduce_results", "evaluate"):
        if name in given:
            raise UserError(f"--{name} is for main.py: the same tune.py command again continues a study")
    if "fold" in given:
        raise UserError("--fold is for main.py: a trial trains all folds, as many as --num_training_sets says")
    if layered["savename"] is auxiliaries.UNSET or layered["savename"] is None:
        raise UserError("how is the study called? Name it with --savename; the same command again continues it")
    if len(layered["savename"].encode()) > config.MAX_SAVENAME - len("1000_reproduction1000"):
        raise UserError("--savename is too long: the names of trials begin with it")


def make_parameter(name: str, tuned: Tuned) -> Parameter:
    """Checks what is to be tuned.

    Raises:
        UserError: that can't be tuned, or not so.
    """
    flag, _, key = name.partition(".")
    typed = f'--{flag} "{key}~{tuned.kind}~=[…]"' if key else f"--{flag}~{tuned.kind}~"
    traits = config.build_parser().traits[flag]
    if traits.machine or traits.protocol or not traits.stored or not traits.compared:
        raise UserError(f"--{flag} can't be tuned: it doesn't change what is trained, or changes how that is scored")
    if tuned.kind == "CHOICE":
        return _make_choice(name, typed, tuned)
    if len(tuned.values) != 2:
        raise UserError(f"{typed} takes two bounds, such as 0.1 1, not {shown(' '.join(tuned.values) or 'nothing')}")
    low, high = (_read_bound(flag, key, typed, text) for text in tuned.values)
    if tuned.kind == "INT_BAYESIAN" and not (low == int(low) and high == int(high)):
        raise UserError(f"{typed} takes two integers, not {shown(' '.join(tuned.values))}")
    if tuned.kind != "INT_BAYESIAN" and not key and isinstance(low, int):
        raise UserError(f"--{flag} takes integers: say --{flag}~INT_BAYESIAN~")
    if not low < high:
        raise UserError(f"{typed} {low:g} {high:g}: the first bound must be below the second")
    if tuned.kind == "LOG_BAYESIAN" and low <= 0:
        raise UserError(f"{typed} {low:g} {high:g}: a logarithmic scale begins above 0")
    return Parameter(name, tuned.kind, float(low), float(high))


def _read_bound(flag: str, key: str, typed: str, text: str) -> float:
    """A bound as a number; an integer where the flag takes integers."""
    if not key:
        value = config.parse_one(flag, text)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"--{flag} doesn't take one number: only --{flag}~CHOICE~ could tune it")
        return value
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{typed} takes two numbers, not {shown(text)}") from None
    if not abs(value) < auxiliaries.MAX_NUMBER:
        raise UserError(f"{typed} takes two finite numbers, not {shown(text)}")
    return value


def _make_choice(name: str, typed: str, tuned: Tuned) -> Parameter:
    flag, _, key = name.partition(".")
    if len(tuned.values) < 2:
        raise UserError(f"{typed} takes two choices or more, not {shown(' '.join(tuned.values) or 'nothing')}")
    if len(set(tuned.values)) < len(tuned.values):
        raise UserError(f"{typed} has the same choice twice: {shown(' '.join(tuned.values))}")
    for text in tuned.values:
        if not key and isinstance(config.parse_one(flag, text), list):
            raise UserError(f"--{flag} takes several values and can't be tuned")
    return Parameter(name, tuned.kind, choices=tuned.values)


def refuse_tuner(search: Search) -> None:
    """Refuses a tuner that can't search this space.

    Raises:
        UserError: it can't.
    """
    numbers = [parameter for parameter in search.space if not parameter.choices]
    if search.own.tuner == "grid" and numbers:
        name = numbers[0].name
        raise UserError(f"--tuner grid takes ~CHOICE~ only, and {name} has bounds: list its values, or another --tuner")
    if search.own.tuner == "cmaes" and len(numbers) < 2:
        raise UserError("--tuner cmaes needs two numbers to tune or more: give another --tuner")


def check_configurations(search: Search) -> list[argparse.Namespace]:
    """Resolves the flags at bounds and choices: what must fail in every trial, or with a choice, is seen at once.

    Returns:
        Flags that don't contradict each other.

    Raises:
        UserError: there are none, or a choice contradicts everything else.
    """
    rng = random.Random(0)
    examples = [parameter.examples(rng) for parameter in search.space]
    choices = [values if parameter.choices else [None] for parameter, values in zip(search.space, examples)]
    is_whole = math.prod(map(len, choices)) <= CONFIGURATIONS_TRIED
    rows = list(itertools.islice(itertools.product(*choices), CONFIGURATIONS_TRIED))
    rows = [row for row in rows for _ in range(max(1, min(24, CONFIGURATIONS_TRIED // len(rows))))]
    good: list[argparse.Namespace] = []
    worked: set[tuple[int, Any]] = set()
    failures: dict[tuple[int, Any], UserError] = {}
    for position, row in enumerate(rows):
        values = [
            (known[position % len(known)] if position < len(known) else rng.choice(known)) if value is None else value
            for known, value in zip(examples, row)
        ]
        used = list(enumerate(values))
        try:
            opt = search.flags(dict(zip([parameter.name for parameter in search.space], values)))
            config.refuse_unused(opt, dict.fromkeys(search.given))
            config.resolve(opt)
        except UserError as error:
            failures |= {one: failures.get(one, error) for one in used}
        else:
            good.append(opt)
            worked |= set(used)
    if not good:
        raise next(iter(failures.values()))
    for (position, value), failure in failures.items() if is_whole else ():
        parameter = search.space[position]
        if parameter.choices and (position, value) not in worked:
            raise UserError(f"{parameter.name} can't be {shown(value)}: {failure}")
    return good


# The study


@dataclass
class Session:
    """This process at work on a study.

    Attributes:
        search: what the command line asks for.
        opt: resolved flags of some trial, for what all trials share.
        folder: the study's folder.
        study: Optuna's study.
        identity: names the folder, which machines that share a disk share.
        metric: the metric that is tuned.
        num_trials: how many trials there are to be.
        environment: what each run folder says of versions and hardware.
        known_good: flags that the first check passed.
    """

    search: Search
    opt: argparse.Namespace
    folder: Path
    study: optuna.Study
    identity: str
    metric: str
    num_trials: int
    environment: Mapping[str, Any]
    known_good: argparse.Namespace

    @property
    def lower_is_better(self) -> bool:
        """Whether the best trial has the lowest value."""
        return evaluate.lower_is_better(self.metric)

    @property
    def has_folds(self) -> bool:
        """Whether a trial trains several folds."""
        return self.opt.split_scheme != "predefined"

    @property
    def split(self) -> str:
        """The classes that trials are scored on: `val`, or `test`."""
        return "test" if self.search.own.tune_on_test else "val"

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials so far, in order."""
        with storage_errors(self.search.own.storage):
            return self.study.get_trials(deepcopy=False)

    def trial_folder(self, number: int) -> Path:
        """A trial's run folder."""
        return self.folder / f"{self.folder.name}{number}"

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that ended with a score of their own: neither pruned nor failed."""
        return [
            trial for trial in self.trials() if trial.state.name == "COMPLETE" and "failure" not in trial.user_attrs
        ]


def study_folder(opt: argparse.Namespace) -> Path:
    """The folder of the study, which may exist already.

    Raises:
        UserError: it can't be created, or is something else.
    """
    folder = runs.default_folder(opt)
    runs.check_folder(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (names - {LOCKS} and not names & {JOURNAL, "study.yaml"}):
        raise UserError(f"{folder} exists and is not a study: choose another --savename")
    return folder


def open_session(argv: Sequence[str]) -> Session:
    """Checks everything that can be checked before the first trial, and opens the study or makes it.

    Raises:
        UserError: something is wrong; nothing has been made then, unless it is the study that is.
    """
    search = parse(argv)
    good = check_configurations(search)
    opt = config.resolve(good[0])
    folder = study_folder(opt)
    device = auxiliaries.pick_device(opt.gpu, opt.deterministic)
    refuse_test_classes(search, opt)
    known_good = check_training(good)
    own = search.own
    wanted, size = own.bayesian_optimization_n_iter, math.prod(len(parameter.choices) for parameter in search.space)
    num_trials = DEFAULT_TRIALS if wanted is None else wanted
    if own.tuner == "grid":
        num_trials = size if wanted is None else min(wanted, size)
    definition = define(search, opt)
    study, identity = open_study(search, folder, definition, opt)
    return Session(
        search=dataclasses.replace(search, is_checked=True),
        opt=opt,
        folder=folder,
        study=study,
        identity=identity,
        metric=opt.eval_metric_for_best_epoch,
        num_trials=num_trials,
        environment=runs.describe_environment(device),
        known_good=known_good,
    )


def refuse_test_classes(search: Search, opt: argparse.Namespace) -> None:
    """Makes sure that trials are scored on validation classes, unless --tune_on_test says otherwise.

    Raises:
        UserError: they aren't; or the data can't be read.
    """
    has_val = bool(datasets.give_splits(with_flags(opt, **first_fold(opt))).val)
    if not has_val and not search.own.tune_on_test:
        raise UserError(
            "there are no validation classes, and values that are tuned on the test classes look better than they are: "
            "give --split_scheme cross_validation, or --tune_on_test"
        )
    if has_val and search.own.tune_on_test:
        raise UserError("--tune_on_test: there are validation classes, which trials are scored on: drop it")


def first_fold(opt: argparse.Namespace) -> dict[str, Any]:
    """The flag that makes a configuration one training run."""
    return {} if opt.split_scheme == "predefined" else {"fold": 0}


def check_training(good: Sequence[argparse.Namespace]) -> argparse.Namespace:
    """Makes sure that what is trained can be built, at least with some of these flags, and returns those.

    Raises:
        UserError: it can't with any that were tried.
    """
    failures = []
    for opt in (good[0], good[-1], good[len(good) // 2]):
        try:
            main.main(with_flags(opt, **first_fold(opt)), only_check=True)
        except UserError as error:
            failures.append(error)
        else:
            return opt
    raise failures[0]


def define(search: Search, opt: argparse.Namespace) -> dict[str, Any]:
    """What makes a study this one: its search space, and the flags that its trials share."""
    parser = config.build_parser()
    same = parser.names_with(stored=True, machine=False, compared=True)
    values = config.configuration(config.complete(search.layered, search.given))
    tuned = {parameter.name for parameter in search.space}
    flags = {name: values[name] for name in [*same, "seed", "num_training_sets"] if name not in tuned}
    return {
        "space": {parameter.name: parameter.describe() for parameter in search.space},
        "flags": flags,
        "metric": opt.eval_metric_for_best_epoch,
        "tune_seeds": search.own.tune_seeds,
        "tune_on_test": search.own.tune_on_test,
    }


def open_study(
    search: Search, folder: Path, definition: Mapping[str, Any], opt: argparse.Namespace
) -> tuple[optuna.Study, str]:
    """Opens the study or makes it, and records bounds that have changed.

    Returns:
        The study, and a text that names its folder.

    Raises:
        UserError: it can't be opened, or is another study than the command line describes.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    minimize, maximize = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
    direction = minimize if evaluate.lower_is_better(definition["metric"]) else maximize
    name = f"{opt.dataset}/{folder.name}"
    remote = None if search.own.storage is None else open_storage(search.own.storage)
    try:
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"({error.strerror}): {auxiliaries.disk_advice(error)} (--save_path, --savename)"
        raise UserError(f"{folder / LOCKS} can't be created {why}") from None
    with locked(folder / LOCKS, "claim", wait=True):
        identity = read_identity(folder / LOCKS / "identity")
        storage = open_journal(folder, name) if remote is None else remote
        with storage_errors(search.own.storage):
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                direction=direction,
                load_if_exists=True,
                sampler=make_sampler(search, opt.seed),
                pruner=make_pruner(search.own.pruner, opt),
            )
            known = study.user_attrs.get("definition")
            if known is not None:
                changes = find_changes(folder, known, definition)
                if changes:
                    study.set_user_attr("changes", [*study.user_attrs.get("changes", []), *changes])
            if known != definition:
                study.set_user_attr("definition", definition)
            describe_study(folder, study)
            check_trials(study, search)
    return study, identity


def check_trials(study: optuna.Study, search: Search) -> None:
    """Makes sure that the trials that have ended have a value of all that is tuned.

    Raises:
        UserError: one hasn't; lines of the journal are missing.
    """
    for trial in study.get_trials(deepcopy=False):
        missing = [parameter.name for parameter in search.space if parameter.name not in trial.params]
        if trial.state.name in ("COMPLETE", "PRUNED") and missing:
            raise UserError(
                f"the study {study.study_name} is damaged: its trial {trial.number} has no {missing[0]}; restore "
                f"{JOURNAL if search.own.storage is None else 'what --storage names'}, or choose another --savename"
            )


def read_identity(file: Path) -> str:
    """What a file says that names a study's folder; it is made where there is none.

    Raises:
        UserError: it can't be read or written.
    """
    if not file.exists():
        with auxiliaries.atomic_write(file) as beside:
            beside.write_text(secrets.token_hex(8), encoding="utf-8")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(f"{file} can't be read: remove it") from None


def find_changes(folder: Path, known: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bounds that have changed since a study began, as plain values.

    Raises:
        UserError: more has changed than bounds.
    """
    before, after = known["space"], now["space"]

    def kinds(space: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (entry["kind"], entry.get("choices")) for name, entry in space.items()}

    if kinds(before) != kinds(after):
        listed = ", ".join(f"{name}~{entry['kind']}~" for name, entry in before.items())
        raise UserError(
            f"{folder} is a study of {listed}: bounds may change, but not what is tuned nor its choices; choose "
            "another --savename"
        )
    changed = [name for name in now["flags"] if now["flags"][name] != known["flags"].get(name, now["flags"][name])]
    changed += [name for name in ("metric", "tune_seeds", "tune_on_test") if known[name] != now[name]]
    if changed:
        name = changed[0]
        was = known.get(name, known["flags"].get(name))
        raise UserError(
            f"{folder} is a study with {runs.as_flags({name: was})}, and its trials must share that: give the same "
            "flags, or choose another --savename"
        )
    return [
        {"date": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "parameter": name, "from": before[name]["bounds"], "to": bounds}
        for name, entry in after.items()
        if (bounds := entry.get("bounds")) != before[name].get("bounds")
    ]


def describe_study(folder: Path, study: optuna.Study) -> None:
    """Writes study.yaml: the search space, the changes of its bounds, and the flags that all trials share."""
    definition = study.user_attrs["definition"]
    values = {**definition, "changes": study.user_attrs.get("changes", [])}
    with auxiliaries.atomic_write(folder / "study.yaml") as beside:
        beside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Optuna's storage at a URL.

    Raises:
        UserError: it can't be reached.
    """
    from optuna import storages
    from optuna.storages import journal

    with storage_errors(url):
        if url.startswith("redis"):
            return storages.JournalStorage(journal.JournalRedisBackend(url))
        return storages.get_storage(url)


def open_journal(folder: Path, name: str) -> optuna.storages.BaseStorage:
    """Optuna's storage in the study's folder, a file that processes on several machines can share.

    Raises:
        UserError: it is damaged, or of another study.
    """
    from optuna import storages
    from optuna.storages import journal

    file = folder / JOURNAL
    lock = journal.JournalFileOpenLock(str(file), grace_period=GRACE)
    if not file.exists() and (folder / "study.yaml").exists():
        notice(f"{file} is gone: the study begins anew, and a trial with the values of its run folder takes that over")
    try:
        mend_journal(file, lock)
        storage = storages.JournalStorage(journal.JournalFileBackend(str(file), lock_obj=lock))
        names = [study.study_name for study in storage.get_all_studies()]
        if not names and file.stat().st_size:
            raise ValueError
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror}): move it away, or restore it") from None
    except Exception:  # Optuna raises anything at all on a damaged journal
        raise UserError(f"{file} is damaged, or not a journal of Optuna's: move it away, or restore it") from None
    if names and name not in names:
        raise UserError(f"{file} is the journal of another study, {names[0]}: move it away")
    return storage


def mend_journal(file: Path, lock: optuna.storages.journal.JournalFileOpenLock) -> None:
    """Cuts off a last line that was not written to its end, as on a full disk: the next one would continue it.

    Raises:
        ValueError: the last line is not one of a journal, which Optuna would only find out later.
    """
    if not file.exists():
        return
    lock.acquire()
    try:
        with open(file, "rb+") as journal:
            content = journal.read()
            end = content.rfind(b"\n") + 1
            journal.truncate(end)
            if end:
                json.loads(content[content.rfind(b"\n", 0, end - 1) + 1 : end])
    finally:
        lock.release()


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turns an error of the storage into a `UserError`."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        owners = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        is_known = isinstance(error, OSError | ImportError) or owners & {"sqlalchemy", "redis"}
        if not is_known and "StorageInternalError" not in type(error).__name__:
            raise
        cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error.__cause__ or error
        where = "the study's journal"
        if url is not None:
            where = f"--storage {shown(re.sub('//[^@/]*@', '//…@', url))}"
        why = auxiliaries.reason(cause if isinstance(cause, Exception) else error)
        if isinstance(error, ImportError):
            raise UserError(f"{where} needs a Python package that is not installed ({why}): install it") from None
        raise UserError(
            f"{where} can't be reached or used ({why}): see to it, and give the same command again"
        ) from None


def make_pruner(name: str, opt: argparse.Namespace) -> optuna.pruners.BasePruner:
    """The pruner with that name."""
    from optuna import pruners

    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=opt.save_interval, max_resource=max(opt.n_epochs, 1))
    if name == "none":
        return pruners.NopPruner()
    return pruners.MedianPruner(n_warmup_steps=opt.n_epochs // 5 + 1)  # a step below it isn't pruned


def make_sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that --tuner names; what it draws for a trial depends on the seed, the trial's number and the study.

    So a study that was stopped goes on as if it hadn't been, and parallel processes don't draw the same.
    """
    from optuna import samplers

    kinds: dict[str, Callable[..., samplers.BaseSampler]] = {
        "tpe": samplers.TPESampler,
        "gp": samplers.GPSampler,
        "random": samplers.RandomSampler,
        "cmaes": samplers.CmaEsSampler,
    }

    class Seeded(samplers.BaseSampler):
        def _of(self, trial: Any) -> samplers.BaseSampler:
            entropy = np.random.SeedSequence((seed, trial.number)).generate_state(1)[0]
            if getattr(self, "_number", None) != trial.number:
                self._number, self._sampler = trial.number, kinds[search.own.tuner](seed=int(entropy))
            return self._sampler

        def before_trial(self, study: Any, trial: Any) -> None:
            self._of(trial).before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._of(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._of(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: Any, param_distribution: Any) -> Any:
            return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._of(trial).after_trial(study, trial, state, values)

    class Grid(samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return {parameter.name: parameter.distribution() for parameter in search.space}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            points = [dict(zip(search_space, row)) for row in itertools.product(*(p.choices for p in search.space))]
            random.Random(seed).shuffle(points)
            tried = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
            return next((point for point in points if point not in tried), points[0])

        def sample_independent(self, study: Any, trial: Any, param_name: Any, param_distribution: Any) -> Any:
            raise AssertionError("every value of the grid is drawn with the others")

    return Grid() if search.own.tuner == "grid" else Seeded()


# Trials


class Unusable(UserError):
    """What keeps a trial from being run at all, and says nothing about its values."""


def is_of_the_disk(error: Exception) -> bool:
    """Whether a file couldn't be read or written, which says nothing about a trial's values."""
    cause = error.__context__
    return isinstance(cause, OSError) and not isinstance(cause, ConnectionError)  # of a data-loading worker that died


def run_trials(session: Session) -> None:
    """Runs trials until the study has as many as it is to have, those of other processes included."""
    is_waiting = False
    while True:
        with contextlib.ExitStack() as lock:
            trial = claim(session, lock)
            if trial is not None:
                run_trial(session, trial)
                continue
        if not any(is_open(session, trial) for trial in session.trials()):
            return
        if not is_waiting:
            notice("waiting for trials of other processes; should one of them die, its trial goes on here")
            is_waiting = True
        time.sleep(ASK_AGAIN)


def is_open(session: Session, trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial has begun in this folder and has not ended."""
    is_here = session.search.own.storage is None or trial.user_attrs.get("folder") == session.identity
    return trial.state.name == "RUNNING" and is_here


def claim(session: Session, lock: contextlib.ExitStack) -> optuna.Trial | None:
    """A trial to run, which is this process's as long as it holds the lock: one whose process died, or a new one.

    No process looks for trials while another one is here, so a trial whose lock is free has nobody who runs it.
    """
    import optuna

    locks = session.folder / LOCKS
    with locked(locks, "claim", wait=True), storage_errors(session.search.own.storage):
        trials = session.study.get_trials(deepcopy=False)
        for trial in trials:
            if is_open(session, trial) and is_free(session, trial.number):
                lock.enter_context(locked(locks, f"trial_{trial.number}"))
                taken = optuna.Trial(session.study, trial._trial_id)
                suggest(session, taken)
                print(f"trial {trial.number} goes on where it was interrupted")
                return taken
        if len(trials) >= session.num_trials:
            return None
        asked = session.study.ask()
        asked.set_user_attr("folder", session.identity)
        lock.enter_context(locked(locks, f"trial_{asked.number}"))
        suggest(session, asked)
        return asked


def suggest(session: Session, trial: optuna.Trial) -> None:
    """Draws the values of a trial that it doesn't have yet."""
    for parameter in session.search.space:
        trial._suggest(parameter.name, parameter.distribution())


def is_free(session: Session, number: int) -> bool:
    """Whether no process is at work on a trial: neither on the study's behalf nor main.py itself."""
    folder = session.trial_folder(number)
    found = [path for path in (folder, *folder.glob("fold_*")) if path.is_dir()]
    for path, name in [(session.folder / LOCKS, f"trial_{number}"), *((path, ".lock") for path in found)]:
        try:
            with locked(path, name):
                pass
        except UserError:
            return False
    return True


def run_trial(session: Session, trial: optuna.Trial) -> None:
    """Trains with a trial's values, and tells the study how that ended."""
    import optuna

    start, number, folder = time.perf_counter(), trial.number, session.trial_folder(trial.number)
    values = {parameter.name: trial.params[parameter.name] for parameter in session.search.space}
    print(f"trial {number}: {in_words(values)}", flush=True)
    try:
        opt = trial_flags(session, number, values)
        train(session, opt, folder, Watcher(session, trial))
        scores = read_scores(session, folder)
    except optuna.TrialPruned:
        with storage_errors(session.search.own.storage):
            session.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        how = "pruned"
    except Unusable:
        raise
    except (UserError, torch.OutOfMemoryError) as error:
        if is_of_the_disk(error):
            raise
        check_training([session.known_good])  # what fails in every trial ends the command
        with storage_errors(session.search.own.storage):
            trial.set_user_attr("failure", auxiliaries.reason(error))
            session.study.tell(trial, worst_value(session))
        how = f"failed: {error}"
    else:
        with storage_errors(session.search.own.storage):
            trial.set_user_attr("scores", scores)
            trial.set_user_attr("standard error", standard_error(scores))
            session.study.tell(trial, fmean(scores))
        how = f"{session.metric} {fmean(scores):.4f}, best {best_trial(session).value:.4f}"
    print(f"trial {number}: {how} ({time.perf_counter() - start:.1f} s)", flush=True)


def trial_flags(session: Session, number: int, values: Mapping[str, Any]) -> argparse.Namespace:
    """The flags of a trial.

    Raises:
        UserError: they contradict each other.
    """
    seed = session.opt.seed + (number if session.search.own.tune_seeds else 0)
    name = session.trial_folder(number).name
    opt = session.search.flags(values, seed=seed, savename=name, meta_testing_method=None)
    config.refuse_unused(opt, dict.fromkeys(session.search.given))
    config.resolve(opt)
    return opt


def train(session: Session, opt: argparse.Namespace, folder: Path, watcher: Callable[..., None] | None = None) -> None:
    """Trains in a run folder, where it may have begun; what is printed goes to its output.txt.

    Raises:
        Unusable: the folder holds another run.
        UserError: it fails.
    """
    resolved = config.resolve(opt)
    if folder.exists():
        try:
            before = runs.load_flags(folder)
        except UserError as error:
            raise Unusable(f"{error}; move it away") from None
        ignored = {*config.build_parser().names_with(machine=True), *config.build_parser().names_with(compared=False)}
        changed = config.changed_flags(before, resolved).keys() - (ignored - {"seed"})
        if changed:
            raise Unusable(f"{folder} holds another run, with another --{min(changed)}: move it away")
    else:
        runs.create_folder(folder, lambda into: runs.write_description(into, resolved, session.environment), False)
    with printing_to(folder), contextlib.nullcontext() if watcher is None else runs.watched(watcher):
        protocol.train(opt, main.main, folder)


@contextmanager
def printing_to(folder: Path) -> Iterator[None]:
    """Inside the block, what is printed goes to output.txt of a run folder.

    Raises:
        UserError: it can't be opened.
    """
    path = folder / "output.txt"
    try:
        output = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): {auxiliaries.disk_advice(error)}") from None
    with output:
        stream = auxiliaries.SturdyStream(output)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield


@dataclass(frozen=True)
class Watcher:
    """Reports a trial's validation scores to the study while its first fold trains.

    Attributes:
        session: the session.
        trial: the trial.
    """

    session: Session
    trial: optuna.Trial

    def __call__(self, run: runs.Run, epoch: int) -> None:
        """Reports what was evaluated since the last call, before an interruption included.

        Raises:
            optuna.TrialPruned: the trial isn't worth more time.
        """
        import optuna

        if run.opt.fold not in (None, 0):
            return
        with storage_errors(self.session.search.own.storage):
            reported = self.session.trials()[self.trial.number].intermediate_values
            for row in run.log.rows["val"]:
                value = records.mean_over_sets(row, self.session.metric)
                if row["Epochs"] > 0 and row["Epochs"] not in reported and math.isfinite(value):
                    self.trial.report(value, row["Epochs"])
            is_over = epoch >= run.opt.n_epochs and not self.session.has_folds
            if not is_over and self.trial.should_prune():
                raise optuna.TrialPruned


def read_scores(session: Session, folder: Path) -> list[float]:
    """The metric at each fold's own best epoch, on the classes that trials are scored on."""
    found = []
    for path in runs.fold_folders(folder).values():
        found.append(records.mean_over_sets(runs.read_summary(path)["selected"][session.split], session.metric))
    return found


def standard_error(scores: Sequence[float]) -> float | None:
    """The standard error of a mean over folds; None for a single training run."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def worst_value(session: Session) -> float:
    """What a failed trial counts as: Optuna ignores failed ones, and would draw their like again.

    Metrics whose highest value is the best are 0 at worst; of others it is the worst that any trial has had.
    """
    seen = [value for trial in session.trials() for value in (trial.value, *trial.intermediate_values.values())]
    known = [value for value in seen if value is not None and math.isfinite(value)]
    return max(known, default=1.0) if session.lower_is_better else min([0.0, *known])


def best_trial(session: Session) -> optuna.trial.FrozenTrial:
    """The first of the trials with the best value.

    Raises:
        UserError: none has ended with a value of its own.
    """
    finished = session.finished()
    if not finished:
        failures = [trial.user_attrs["failure"] for trial in session.trials() if "failure" in trial.user_attrs]
        why = "; give --bayesian_optimization_n_iter a higher number"
        why = f": {failures[-1]}" if failures else why
        raise UserError(f"no trial of {session.folder} has finished{why}")
    sign = 1 if session.lower_is_better else -1
    return min(finished, key=lambda trial: sign * float(trial.value or 0.0))


def in_words(values: Mapping[str, Any]) -> str:
    """Values of what is tuned."""
    shorter = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shorter.items())


# Reproductions


def run_reproductions(session: Session, best: optuna.trial.FrozenTrial) -> list[Path]:
    """Trains the best trial's flags with other seeds, unless that is done, and returns all finished ones' folders."""
    start = session.trial_folder(best.number)
    for position in session.search.own.reproductions or ():
        folder = start.with_name(f"{start.name}_reproduction{position}")
        flags = {"seed": session.opt.seed + REPRODUCTION_SEEDS + position, "savename": folder.name}
        opt = session.search.flags(best.params, **flags, **reproduction_flags(session))
        try:
            with locked(session.folder / LOCKS, folder.name, wait=True):  # another process may be at it
                if not protocol.read_results(folder):
                    print(f"reproduction {position}: --seed {opt.seed}", flush=True)
                    train(session, opt, folder)
        except UserError as error:
            check_training([session.known_good])
            notice(f"{folder} is left out: {error}")
    found = (
        re.fullmatch(rf"{re.escape(start.name)}_reproduction([0-9]+)", path.name) for path in start.parent.iterdir()
    )
    folders = [start.parent / match[0] for match in sorted(filter(None, found), key=lambda match: int(match[1]))]
    return [folder for folder in folders if protocol.read_results(folder)]


def reproduction_flags(session: Session) -> dict[str, Any]:
    """Flags of a reproduction that a trial doesn't have: the network before training is evaluated, too."""
    flags: dict[str, Any] = {"check_untrained_accuracy": True}
    if session.has_folds:
        flags["meta_testing_method"] = "ConcatenateEmbeddings" if session.opt.num_training_sets > 1 else None
        if "splits_to_eval" not in session.search.given:
            flags["splits_to_eval"] = ["val", "test"]  # the test classes never select the epoch
    return flags


def collect_reproductions(session: Session, folders: Sequence[Path]) -> list[records.Row]:
    """Mean and half of the 95 % confidence interval over seeds, of each network, kind of classes and metric."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for folder in folders:
        per_fold = [runs.read_summary(path) for path in runs.fold_folders(folder).values()]
        for network in ("selected", "untrained", "trunk"):
            for split in ("val", "test"):
                tables = [summary.get(network, {}).get(split, {}) for summary in per_fold]
                for metric in tables[0]:
                    means = [math.nan if table.get(metric) is None else table[metric] for table in tables]
                    values.setdefault((network, split, metric), []).append(fmean(means))
        for name, value in protocol.read_results(folder).items():
            network, split, metric = name.split(", ", 2)
            if network == "ConcatenateEmbeddings":
                values.setdefault((network, split, metric), []).append(value)
    rows = []
    for (network, split, metric), found in values.items():
        mean, _, half = auxiliaries.mean_and_interval(found)
        rows.append({"Network": network, "Split": split, "Metric": metric, "Mean": mean, "CI 95 %": half})
    return rows


# The result


def report(session: Session, best: optuna.trial.FrozenTrial, reproductions: Sequence[Path]) -> dict[str, Any]:
    """Writes and prints what the study has found: best.yaml, results.json and plots.

    Returns:
        What results.json holds.
    """
    folder, trials = session.folder, session.trials()
    test = read_test_metrics(session, best)
    rows = collect_reproductions(session, reproductions)
    states = [describe_state(trial) for trial in trials]
    results: dict[str, Any] = {
        "metric": session.metric,
        "scored on": "test classes (--tune_on_test)" if session.search.own.tune_on_test else "validation classes",
        "trials": {state: states.count(state) for state in dict.fromkeys(states)},
        "best": {
            "trial": best.number,
            "folder": session.trial_folder(best.number).name,
            "value": best.value,
            "standard error": best.user_attrs.get("standard error"),
            "values": best.params,
        },
        "test": test,
        "luck": measure_luck(session, best, rows),
        "importances": find_importances(session),
        "failures": {t.number: t.user_attrs["failure"] for t in trials if "failure" in t.user_attrs},
        "reproductions": {"folders": [path.name for path in reproductions], "rows": rows},
    }
    save_best(session, best)
    auxiliaries.save_json(folder / "results.json", results)
    draw(session, results["importances"])
    print_results(session, results)
    return results


def describe_state(trial: optuna.trial.FrozenTrial) -> str:
    """How a trial ended: complete, failed, pruned or running."""
    return "failed" if "failure" in trial.user_attrs else trial.state.name.lower()


def save_best(session: Session, best: optuna.trial.FrozenTrial) -> None:
    """Writes best.yaml, the flags that the user gave with the best values, for --config."""
    opt = trial_flags(session, best.number, best.params)
    stored = config.configuration(with_flags(opt, meta_testing_method=session.opt.meta_testing_method))
    kept = [name for name in session.search.given if name in stored and name != "savename"]
    kept += [name for name in ("dataset", "source_path", "seed") if name not in kept]
    on_test = (
        ", tuned on the test classes: its figures on them are optimistic" if session.search.own.tune_on_test else ""
    )
    comment = f"trial {best.number} of {session.folder.name}, {session.metric} {best.value:.4f}{on_test}"
    config.save_config(session.folder / "best.yaml", {name: stored[name] for name in kept}, comment)


def read_test_metrics(session: Session, best: optuna.trial.FrozenTrial) -> dict[str, float]:
    """The best trial's metrics on the test classes: means over folds, and those of the folds' concatenation."""
    folder = session.trial_folder(best.number)
    if not folder.is_dir():
        notice(f"{folder} is gone: the best trial's metrics on the test classes are not known")
        return {}
    is_missing = not any("Concatenate" in name for name in protocol.read_results(folder))
    if session.has_folds and session.opt.num_training_sets > 1 and is_missing:
        opt = trial_flags(session, best.number, best.params)
        with printing_to(folder):
            together = with_flags(config.resolve(opt), meta_testing_method="ConcatenateEmbeddings")
            protocol.write_meta_results(together, folder)
    names = {"selected": "", "ConcatenateEmbeddings": "concatenation, "}
    return {
        f"{names[parts[0]]}{parts[2]}": value
        for name, value in protocol.read_results(folder).items()
        if (parts := name.split(", ", 2))[0] in names and parts[1] == "test"
    }


def measure_luck(
    session: Session, best: optuna.trial.FrozenTrial, rows: Sequence[records.Row]
) -> dict[str, float | None]:
    """By how much the best score is better than expected, by a model of all trials' scores and by reproductions.

    The best of many noisy scores is high by luck, too: what it would be on average is what others will find.
    """
    sign = -1 if session.lower_is_better else 1
    expected: dict[str, float | None] = {"model": model_mean(session, best)}
    again = [
        row["Mean"]
        for row in rows
        if (row["Network"], row["Split"]) == ("selected", session.split) and row["Metric"] == session.metric
    ]
    expected["reproductions"] = again[0] if again else None
    observed = float(best.value or 0.0)
    luck = {f"above {name}": None if mean is None else sign * (observed - mean) for name, mean in expected.items()}
    return {**{f"mean of {name}": mean for name, mean in expected.items()}, **luck}


def model_mean(session: Session, best: optuna.trial.FrozenTrial) -> float | None:
    """What a Gaussian process of all finished trials' scores expects at the best one's values; None for few trials."""
    finished = session.finished()
    if len(finished) < FEWEST_FOR_MODEL:
        return None
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    points = np.array([as_point(session.search.space, trial.params) for trial in finished])  # (trials, D)
    points = (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    kernel = ConstantKernel(1.0, (1e-3, 1e3)) * Matern(np.ones(points.shape[1]), (0.05, 100.0), nu=2.5)
    kernel += WhiteKernel(0.1, (1e-3, 10.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length scale at its bound: the value doesn't matter
        model.fit(points, [trial.value for trial in finished])
    position = [trial.number for trial in finished].index(best.number)
    return float(model.predict(points[position : position + 1])[0])


def as_point(space: Sequence[Parameter], values: Mapping[str, Any]) -> list[float]:
    """Values as numbers: logarithms where the scale is one, and one-hot choices."""
    point: list[float] = []
    for parameter in space:
        value = values[parameter.name]
        if parameter.choices:
            point += [float(value == choice) for choice in parameter.choices]
        else:
            point.append(math.log(value) if parameter.kind == "LOG_BAYESIAN" else float(value))
    return point


def find_importances(session: Session) -> dict[str, float]:
    """The share of each value in the variance of the scores, by fANOVA (Hutter et al., ICML 2014).

    Empty for few trials or equal scores.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len(session.finished()) < FEWEST_FOR_IMPORTANCES or len({trial.value for trial in session.finished()}) < 2:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = get_param_importances(session.study, evaluator=FanovaImportanceEvaluator(seed=0))
    except (ValueError, RuntimeError) as error:
        notice(f"importances can't be computed: {auxiliaries.reason(error)}")
        return {}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def draw(session: Session, importances: Mapping[str, float]) -> None:
    """Draws the study's pictures."""
    trials = [trial for trial in session.trials() if trial.value is not None or trial.intermediate_values]
    name = f"{session.metric} of the {'test' if session.search.own.tune_on_test else 'validation'} classes"
    points = [
        plots.TrialPoint(
            number=trial.number,
            value=math.nan if trial.value is None or "failure" in trial.user_attrs else trial.value,
            error=trial.user_attrs.get("standard error") or 0.0,
            state=describe_state(trial),
            values=trial.params,
        )
        for trial in trials
        if trial.state.is_finished()
    ]
    plots.save_history(session.folder / "history.svg", points, name, session.lower_is_better)
    logarithmic = [parameter.name for parameter in session.search.space if parameter.kind == "LOG_BAYESIAN"]
    names = [parameter.name for parameter in session.search.space]
    plots.save_slices(session.folder / "slices.svg", points, names, logarithmic, name, session.lower_is_better)
    if importances:
        plots.save_importances(session.folder / "importances.svg", importances, name)


def print_results(session: Session, results: Mapping[str, Any]) -> None:
    """Prints what the study has found."""
    best, luck, metric = results["best"], results["luck"], session.metric
    counts = ", ".join(f"{count} {state}" for state, count in results["trials"].items())
    error = "" if best["standard error"] is None else f" ± {best['standard error']:.4f} (standard error over folds)"
    print(f"\n{session.folder}: {counts} trials")
    print(f"best: trial {best['trial']}, {metric} {best['value']:.4f}{error} on the {results['scored on']}")
    print(f"      {in_words(best['values'])}")
    for name in ("model", "reproductions"):
        if luck[f"mean of {name}"] is not None:
            of = "a model of all trials expects" if name == "model" else "the mean of its reproductions is"
            mean, above = luck[f"mean of {name}"], luck[f"above {name}"]
            part = f"{above:.4f} of the best is likely to be luck" if above >= 0.00005 else "no sign of luck"
            print(f"      {of} {mean:.4f} there: {part}")
    if results["test"]:
        print("\nmetrics of the best trial on the test classes" + (", means over folds" if session.has_folds else ""))
        rows = [{"Metric": name, "Value": f"{value:.4f}"} for name, value in results["test"].items()]
        print(records.format_table(rows))
    if results["reproductions"]["rows"]:
        print_reproductions(session, results["reproductions"])
    if session.search.own.tune_on_test:
        print("tuned on the test classes: figures on them are optimistic")
    print(f"\nto train it: python main.py --config {session.folder / 'best.yaml'}")


def print_reproductions(session: Session, reproductions: Mapping[str, Any]) -> None:
    """Prints what the best flags reach with other seeds, beside the network before training and its trunk."""
    count = len(reproductions["folders"])
    print(f"\nwith {count} other {'seed' if count == 1 else 'seeds: mean ± half of its 95 % confidence interval'}\n")
    by_metric: dict[tuple[str, str], records.Row] = {}
    for row in reproductions["rows"]:
        half = "" if math.isnan(row["CI 95 %"]) else f" ± {row['CI 95 %']:.4f}"
        cells = by_metric.setdefault((row["Split"], row["Metric"]), {"Metric": f"{row['Split']} {row['Metric']}"})
        cells[{"selected": "trained"}.get(row["Network"], row["Network"])] = f"{row['Mean']:.4f}{half}"
    columns = list(dict.fromkeys(name for cells in by_metric.values() for name in cells))
    print(records.format_table([{name: cells.get(name, "") for name in columns} for cells in by_metric.values()]))


def command(argv: Sequence[str]) -> dict[str, Any]:
    """Does what a command line asks for, and returns what results.json holds.

    Raises:
        UserError: what the user can fix.
    """
    with datasets.read_once():
        session = open_session(argv)
        try:
            run_trials(session)
            best = best_trial(session)
            reproductions = run_reproductions(session, best)
        except KeyboardInterrupt:
            print("\nto continue: the same command again", file=sys.stderr, flush=True)
            raise
        with locked(session.folder / LOCKS, "report", wait=True):
            return report(session, best, reproductions)


if __name__ == "__main__":
    auxiliaries.run_command(lambda: command(sys.argv[1:]))
