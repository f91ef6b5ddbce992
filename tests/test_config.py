"""Flags in layers: what a YAML entry means, which layer wins, and what an error says."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

import config
import evaluate
from auxiliaries import FlagParser, UserError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(*argv: str) -> argparse.Namespace:
    return config.parse(argv)


@pytest.fixture
def mapping_parser() -> FlagParser:
    parser = FlagParser()
    config.add_arguments(parser)
    parser.add_argument("--loss_params", action="params", default={"margin": "0.2"})
    parser.add_argument("--lr", type=float, default=1.0)
    return parser


def test_later_layers_and_the_command_line_win(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "lr: 1e-4\nbs: 64\nk_vals: [1, 5]\ngrad_measure: true\n")
    second = write(tmp_path, "b.yaml", "bs: 32\nk_vals: [2]\ngrad_measure: false\n")
    opt = parse("--config", first, second, "--bs", "16")
    assert (opt.lr, opt.bs, opt.k_vals, opt.grad_measure) == (1e-4, 16, [2], False)
    opt = parse("--bs", "16", "--config", second, first)  # where --config stands doesn't matter
    assert (opt.bs, opt.k_vals, opt.grad_measure) == (16, [1, 5], True)
    assert parse("--config", first, "--no-grad_measure").grad_measure is False


@pytest.mark.parametrize("name", ["2024_01_01", "012", "1e3", "yes", "null_1", "0x10", "a: b"])
def test_raw_scalars_reach_argparse(tmp_path: Path, name: str) -> None:
    text = f'savename: "{name}"\n' if ": " in name else f"savename: {name}\n"
    assert parse("--config", write(tmp_path, "a.yaml", text)).savename == name


def test_numbers_null_and_negative_values(tmp_path: Path) -> None:
    first = write(
        tmp_path, "a.yaml", "lr: 1e-4\ngpu: -1\ntau: 7\nupper_cutoff: 1.4\nk_vals: []\n".replace("k_vals: []\n", "")
    )
    opt = parse("--config", first)
    assert (opt.lr, opt.gpu, opt.tau, opt.upper_cutoff) == (1e-4, -1, [7], 1.4)
    assert isinstance(opt.lr, float)
    second = write(tmp_path, "b.yaml", "upper_cutoff: null\nlr: ~\n")
    opt = parse("--config", first, second)
    assert (opt.upper_cutoff, opt.lr) == (None, 1e-5)
    assert parse("--config", write(tmp_path, "c.yaml", "tau: []\n")).tau == []


def test_mappings_merge_key_by_key_and_can_be_replaced(tmp_path: Path, mapping_parser: FlagParser) -> None:
    first = write(tmp_path, "a.yaml", "loss_params: {alpha: 1e-2, beta: 012}\n")
    second = write(tmp_path, "b.yaml", "loss_params:\n  beta: 3\n")
    replacing = write(tmp_path, "c.yaml", "loss_params~OVERRIDE~: {gamma: 4}\n")

    def given(*argv: str) -> dict[str, str]:
        return config.parse_layers(mapping_parser, argv)["loss_params"]

    assert given() == {"margin": "0.2"}
    assert given("--config", first, second) == {"margin": "0.2", "alpha": "1e-2", "beta": "3"}
    assert given("--config", first, "--loss_params", "alpha=5") == {"margin": "0.2", "alpha": "5", "beta": "012"}
    assert given("--config", first, replacing) == {"gamma": "4"}
    assert given("--config", first, "--loss_params~OVERRIDE~", "a=b=c") == {"a": "b=c"}
    assert given("--config", replacing, second) == {"gamma": "4", "beta": "3"}
    assert given() == {"margin": "0.2"}  # the default itself is never changed
    with pytest.raises(UserError, match="not of the form key=value"):
        given("--loss_params", "alpha")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: cub200\nbss: 12\n", "line 2: unknown flag --bss (did you mean --bs?)"),
        ("lr: fast\n", "line 1: --lr: fast is not a number"),
        ("\nloss: tripplet\n", "line 2: --loss tripplet is unknown (did you mean triplet?)"),
        ("lr: [1, 2]\n", "line 1: --lr takes a plain value"),
        ("loss: {margin: 1}\n", "line 1: --loss takes a plain value"),
        ("grad_measure: maybe\n", "line 1: --grad_measure takes true or false, not maybe"),
        ("lr: 1\nlr: 2\n", "line 2: --lr is given twice"),
        ("config: other.yaml\n", "line 1: unknown flag --config"),
        ("- lr\n", "is not a mapping"),
        ("", "is not a mapping"),
        ("lr: [1\n", "is not a YAML file"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as error:
        parse("--config", path)
    assert path in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither a file nor one in configs/ \(did you mean baselines"):
        parse("--config", "baseline")
    with pytest.raises(UserError, match="does not exist or is not a file"):
        parse("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="does not exist or is not a file"):
        parse("--config", str(tmp_path))


@pytest.mark.parametrize("preset", ["baselines", "cars196", "online_products", "in-shop"])
def test_presets_parse(preset: str) -> None:
    opt = config.resolve(parse("--config", "baselines", preset))
    assert opt.dataset == ("cub200" if preset == "baselines" else preset)
    assert (opt.loss, opt.sampling, opt.lr, opt.arch) == ("marginloss", "distance", 1e-5, "resnet50")


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs").glob("reality_check_*.yaml")))
def test_presets_of_the_reality_check(preset: str) -> None:
    opt = config.resolve(parse("--config", "reality_check", preset))
    assert (opt.bs, opt.embed_dim, opt.lr, opt.decay, opt.optimizer) == (32, 128, 1e-6, 1e-4, "RMSprop")
    assert (opt.split_scheme, opt.num_training_sets, opt.eval_metric_for_best_epoch) == ("cross_validation", 4, "MAP@R")
    by_class = preset.removeprefix("reality_check_") in ("arcface", "cosface", "proxynca", "soft_triple")
    assert opt.samples_per_class == (1 if by_class else 4)


def test_presets_of_other_papers() -> None:
    opt = config.resolve(parse("--config", "proxy_anchor"))
    assert (opt.loss, opt.pooling, opt.proxy_lr, opt.lr) == ("ProxyAnchorLoss", "avg+max", 1e-2, 1e-4)
    opt = config.resolve(parse("--config", "proxynca++"))
    assert (opt.loss, opt.pooling, opt.embedder_norm, opt.proxy_lr) == ("proxynca++", "max", "layernorm", 400)
    opt = config.resolve(parse("--config", "dinov2", "zero_shot"))
    assert (opt.n_epochs, opt.embed_dim, opt.arch) == (0, 0, "resnet50")
    assert config.resolve(parse("--config", "dinov2")).crop_size == 224


def test_every_preset_states_its_cost_and_figures() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
        on_top = head.startswith("# On top of ") or path.stem == "baselines"
        assert on_top or ("Costs" in head and "ublished" in head), path.stem


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss", "proxynca", "--savename", "012", "--no-freeze_batchnorm", "--gpu", "-1"],
        ["--arch", "googlenet", "--tau", "--upper_cutoff", "1.4", "--k_vals", "3", "--grad_measure", "--lr", "3.3e-7"],
        [
            "--split_scheme",
            "cross_validation",
            "--fold",
            "2",
            "--test_size",
            "0.3",
            "--patience",
            "4",
            "--log_every",
            "0",
        ],
        ["--eval_metrics", "MAP@R", "NMI", "--eval_metric_for_best_epoch", "MAP@R", "--no-tensorboard"],
    ],
)
def test_stored_configuration_gives_the_same_flags(tmp_path: Path, flags: list[str]) -> None:
    opt = config.resolve(parse(*flags))
    path = tmp_path / "config.yaml"
    config.save_config(path, config.configuration(opt))
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(stored) == set(vars(parse())) - set(CONTROL)
    for again in (parse("--config", str(path)), config.parse([], path)):
        resolved = config.resolve(again)
        assert config.configuration(resolved) == config.configuration(opt)
        assert config.changed_flags(resolved, opt) == {}
        assert {**vars(resolved), "config": None} == {**vars(opt), "config": None}


# What says what to do with a run, not what it is.
CONTROL = {
    "config": ["a.yaml"],
    "resume_training": ["best"],
    "reproduce_results": ["some/run"],
    "evaluate": ["some/run"],
    "accept_changed_data": [],
    "dry_run": [],
    "eval_reference_set": ["compared_to_training_set"],
    "eval_normalize_embeddings": [],
    "eval_use_trunk_output": [],
    "eval_pca": ["3"],
    "eval_pca_normalize": [],
    "eval_every_class": [],
    "eval_size_of_tsne": ["50"],
    "eval_dims": ["8"],
    "eval_quantize": ["int8"],
    "tta": ["flip"],
    "whiten": [],
    "database_augmentation": ["2"],
    "query_expansion": ["2"],
    "expansion_alpha": ["3"],
    "rerank": ["kreciprocal"],
    "rerank_params": ["k1=5"],
}


def test_control_flags_are_never_stored(tmp_path: Path) -> None:
    assert set(config.build_parser().names_with(stored=False)) == set(CONTROL)
    file = write(tmp_path, "a.yaml", "bs: 64\n")
    given = {**CONTROL, "config": [file]}
    opt = config.resolve(parse(*(token for name, values in given.items() for token in (f"--{name}", *values))))
    assert opt.eval_use_trunk_output is True
    assert opt.resume_training == "best"
    values = config.configuration(opt)
    assert not set(CONTROL) & set(values)
    assert values["bs"] == 64
    assert config.changed_flags(config.resolve(parse("--bs", "64")), opt) == {}
    config.save_config(tmp_path / "config.yaml", values)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert not set(CONTROL) & set(stored)
    assert "normalize" not in stored  # it follows from the loss and is no flag


def test_a_stored_layer_lies_below_files_and_these_below_the_command_line(tmp_path: Path) -> None:
    stored = tmp_path / "config.yaml"
    opt = config.resolve(parse("--bs", "64", "--lr", "1e-3", "--decay", "0.5", "--savename", "012", "--patience", "3"))
    config.save_config(stored, config.configuration(opt))
    file = write(tmp_path, "a.yaml", "lr: 1e-4\ndecay: 0.25\npatience: null\n")
    opt = config.parse(["--config", file, "--decay", "0.125"], stored)
    assert (opt.bs, opt.lr, opt.decay, opt.savename, opt.patience) == (64, 1e-4, 0.125, "012", None)
    opt = config.parse(["--decay", "0.125"], stored)
    assert (opt.bs, opt.lr, opt.decay, opt.patience) == (64, 1e-3, 0.125, 3)
    assert config.parse([]).bs == 112


def test_an_odd_stored_layer_is_named(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", "bs: 64\nlrr: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml, line 2: unknown flag --lrr \(did you mean --lr\?\)"):
        config.parse([], tmp_path / "config.yaml")
    with pytest.raises(UserError, match="does not exist or is not a file"):
        config.parse([], tmp_path / "none.yaml")


def given(*argv: str) -> dict[str, Any]:
    return config.given_flags(argv)


def test_given_flags_are_those_of_the_command_line_and_its_files(tmp_path: Path) -> None:
    assert given() == {}
    assert given("--lr", "1e-5", "--no-tensorboard", "--gpu=-1", "--tau") == {
        "lr": 1e-5,  # though it is the default
        "logger": [],
        "gpu": -1,
        "tau": [],
    }
    first = write(tmp_path, "a.yaml", "lr: 1e-4\nbs: 64\ngrad_measure: false\n")
    second = write(tmp_path, "b.yaml", "bs: 32\n")
    expected = {"lr": 1e-4, "bs": 16, "grad_measure": False, "config": [first, second]}
    assert given("--config", first, second, "--bs", "16") == expected
    assert given("--resume_training") == {"resume_training": "latest"}
    assert given("--evaluate") == {"evaluate": ""}
    with pytest.raises(UserError, match="unknown flag --bss"):
        given("--bss", "1")


def test_a_flag_that_a_later_file_resets_is_not_given(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "upper_cutoff: 1.4\nbs: 64\n")
    second = write(tmp_path, "b.yaml", "upper_cutoff: null\n")
    assert parse("--config", first, second).upper_cutoff is None
    assert given("--config", first, second) == {"bs": 64, "config": [first, second]}


def test_differences_are_the_new_values(tmp_path: Path) -> None:
    before, after = (
        parse("--lr", "1e-3", "--k_vals", "1", "2"),
        parse("--lr", "1e-4", "--k_vals", "1", "2", "--nu", "1"),
    )
    assert config.changed_flags(before, after) == {"lr": 1e-4, "nu": 1.0}
    assert config.changed_flags(after, before) == {"lr": 1e-3, "nu": 0.0}
    assert config.changed_flags(before, before) == {}
    older = argparse.Namespace(**{name: value for name, value in vars(before).items() if name != "bs"})
    assert config.changed_flags(older, before) == {"bs": 112}  # a flag that an older run did not have
    assert config.changed_flags(parse(), parse("--patience", "2")) == {"patience": 2}
    assert config.changed_flags(parse("--patience", "2"), parse()) == {"patience": None}
    assert config.changed_flags(parse("--savename", "a"), parse("--savename", "b", "--save_path", "elsewhere")) == {}


def test_a_folder_of_a_presets_name_hides_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cars196").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "cars196").dataset == "cars196"


def test_names_of_other_projects_lead_to_flags() -> None:
    flags = config.build_parser().flags()
    for name, flag in config.KNOWN_ELSEWHERE.items():
        assert flag in flags
        assert f"--{name}" not in flags


def test_version_is_that_of_the_citation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--version")
    version = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert capsys.readouterr().out == f"main.py {version}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('eval_metrics: [NMI, "--lr=5"]\n', "line 1: --eval_metrics takes values, not --lr=5, which looks like a flag"),
        ("k_vals: [1, -n]\n", "line 1: --k_vals takes values, not -n, which looks like a flag"),
        ("[" * 2000, "is not a YAML file"),
        ("tau: &a [*a]\n", "line 1: --tau takes plain values"),
        ('savename: "a\\0b"\n', "--savename 'a\\x00b' is not valid text"),
    ],
)
def test_files_can_neither_smuggle_flags_nor_crash(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, "odd.yaml", text)
    with pytest.raises(UserError) as error:
        config.resolve(parse("--config", path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_scalar_that_looks_like_a_flag_is_a_value(tmp_path: Path) -> None:
    opt = parse("--config", write(tmp_path, "a.yaml", 'savename: "--lr=5"\ntau: 7\n'))
    assert (opt.savename, opt.lr, opt.tau) == ("--lr=5", 1e-5, [7])
    with pytest.raises(UserError, match="--eval_metrics --lr=5 is unknown"):
        parse("--config", write(tmp_path, "b.yaml", 'eval_metrics: "--lr=5"\n'))


def test_a_stored_configuration_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config.save_config(path, config.configuration(config.resolve(parse())))
    text = path.read_text(encoding="utf-8")
    for length in range(0, len(text) - 1, 29):
        path.write_text(text[:length], encoding="utf-8")
        with pytest.raises(UserError, match=r"config\.yaml"):
            config.parse([], path)


@pytest.mark.parametrize(
    ("metric", "metrics", "k_vals"),
    [
        ("Recall @ 1", ["NMI"], [1, 2]),
        ("MAP@R", ["NMI", "MAP@R"], [1, 2]),
        ("Recall @ 16", ["NMI", "Recall @ 16"], [1, 2]),
        ("FNMR @ 1e-4", ["NMI", "FNMR @ 0.0001"], [1, 2]),
        ("Precision @ 1", ["NMI", "Precision @ 1"], [1, 2]),
    ],
)
def test_the_metric_that_selects_is_computed(metric: str, metrics: list[str], k_vals: list[int]) -> None:
    flags = ["--eval_metrics", "NMI", "--k_vals", "1", "2", "--eval_metric_for_best_epoch", metric]
    opt = config.resolve(parse(*flags))
    assert opt.eval_metric_for_best_epoch in evaluate.chosen_metrics(opt.k_vals, opt.eval_metrics)
    if metric != "Recall @ 1":
        assert (opt.eval_metrics, opt.k_vals) == (metrics, k_vals)


def test_presets_are_listed_where_one_is_unknown() -> None:
    with pytest.raises(UserError, match="which has baselines, cars196, dinov2, in-shop, "):
        parse("--config", "cub200")


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    opt = parse("--save_path=~/a", "--reproduce_results=~/b", "--source_path=~/c", "--weights=~/d")
    assert [opt.save_path, opt.reproduce_results, opt.source_path, opt.weights] == [
        f"/home/someone/{name}" for name in "abcd"
    ]


def test_help_begins_with_the_run_and_says_what_is_for_evaluation() -> None:
    titles = re.findall(r"^(\w.*):$", config.build_parser().format_help(), re.MULTILINE)
    assert titles[:5] == ["options", "run", "configuration", "finished and interrupted runs", "data"]
    assert titles[-2:] == ["better retrieval, with --evaluate", "with --evaluate"]
