"""Flags in layers: what a YAML entry means, which layer wins, and what an error says."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import config
import main
from auxiliaries import FlagParser, UserError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(*argv: str) -> argparse.Namespace:
    return main.parse_args(list(argv))


@pytest.fixture
def mapping_parser() -> FlagParser:
    parser = FlagParser()
    config.add_arguments(parser)
    parser.add_argument("--loss_params", action=config.MappingAction, default={"margin": "0.2"})
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
        return config.parse_layers(mapping_parser, argv).loss_params

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
        ("lr: fast\n", "line 1: argument --lr: invalid float value: 'fast'"),
        ("\nloss: tripplet\n", "line 2: --loss tripplet is unknown (did you mean triplet?)"),
        ("lr: [1, 2]\n", "line 1: --lr takes a plain value"),
        ("loss: {margin: 1}\n", "line 1: --loss takes a plain value"),
        ("grad_measure: maybe\n", "line 1: --grad_measure takes true or false, not maybe"),
        ("lr: 1\nlr: 2\n", "line 2: --lr is given twice"),
        ("config: other.yaml\n", "line 1: unknown flag --config"),
        ("- lr\n", "is no mapping"),
        ("", "is no mapping"),
        ("lr: [1\n", "is no YAML"),
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
    with pytest.raises(UserError, match="is no file"):
        parse("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="is no file"):
        parse("--config", str(tmp_path))


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_presets_parse(preset: str) -> None:
    opt = main.resolve(parse("--config", "baselines", preset))
    assert opt.dataset == ("cub200" if preset == "baselines" else preset)
    assert (opt.loss, opt.sampling, opt.lr, opt.arch) == ("marginloss", "distance", 1e-5, "resnet50")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss", "proxynca", "--savename", "012", "--no-freeze_batchnorm", "--gpu", "-1"],
        ["--arch", "googlenet", "--tau", "--upper_cutoff", "1.4", "--k_vals", "3", "--grad_measure", "--lr", "3.3e-7"],
    ],
)
def test_stored_configuration_gives_the_same_flags(tmp_path: Path, flags: list[str]) -> None:
    opt = main.resolve(parse(*flags))
    config.save_config(tmp_path / "config.yaml", opt, main.give_parser())
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert set(stored) == set(vars(parse())) - {"config"}
    again = main.resolve(parse("--config", str(tmp_path / "config.yaml")))
    assert {**vars(again), "config": None} == {**vars(opt), "config": None}


def test_a_folder_of_a_presets_name_hides_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cars196").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("--config", "cars196").dataset == "cars196"
