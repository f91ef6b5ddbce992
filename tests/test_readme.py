"""What the README, docs/ and Sample_Runs.sh tell a user to do, done."""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

import auxiliaries
import benchmark_losses
import check
import compare
import config
import datasets
import inference
import losses
import main
import netlib
import tune

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
DATA, EXTENDING, FLAGS, METHODS, PROTOCOLS, RECORDS, TUNING, USE = (
    PAGES[ROOT / "docs" / f"{name}.md"]
    for name in ("data", "extending", "flags", "methods", "protocols", "runs", "tuning", "use")
)
TRANSFORMS = DATA[DATA.index("## Transforms") :]
EDIT = re.compile(
    r"^`(\w+\.py)`, (?:at the end|after the line `(.+?)`):\n\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL
)
LISTED = subprocess.run(
    ["bash", "Sample_Runs.sh", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout
RUNS = {name: flags.split() for name, _, flags in (line.partition(" ") for line in LISTED.splitlines())}
PRESETS = {name: flags for name, flags in RUNS.items() if flags[0] == "--config"}
STUDIES = [name for name, flags in RUNS.items() if flags[0] == "tune.py"]
PUBLISHED = [name for name in RUNS if name not in ("demo", "benchmark-losses", *STUDIES, *PRESETS)]
TRAINING_CLASSES = {"cub200": 100, "cars196": 98, "online_products": 11318, "in-shop": 3997}
TEST_CLASSES = 8


@pytest.mark.slow
def test_readme_extensions_work_together(tiny_source: Path, tmp_path: Path) -> None:
    """A copy of the repository, edited as docs/extending.md says, trains with what its examples add."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    edits = EDIT.findall(EXTENDING)
    assert {file for file, _, _ in edits} == {"losses.py", "methods.py", "datasets.py", "netlib.py", "evaluate.py"}
    for file, line, code in edits:
        text = (tmp_path / file).read_text(encoding="utf-8")
        if line:
            assert text.count(f"{line}\n") == 1, f"{file} has no such line: {line}"
            text = text.replace(f"{line}\n", f"{line}\n{code}")
        else:
            text += f"\n\n{code}"
        (tmp_path / file).write_text(text, encoding="utf-8")
    shutil.copytree(tiny_source / "tiny", tmp_path / "Datasets" / "odd_even")
    command = re.search(r"^python (main\.py --dataset odd_even .*)$", EXTENDING, re.MULTILINE)
    assert command
    small = ["--crop_size", "32", "--gpu", "-1", "--kernels", "0", "--n_epochs", "1", "--bs", "8", "--savename", "run"]
    flags = [*shlex.split(command[1]), *small, "--no-report"]
    others = [
        [*flags[1:], *more] for more in (["--loss", "triplet"], ["--loss", "marginloss", "--batch_sampler", "in_order"])
    ]
    for arguments in (flags, ["-c", f"import main\nfor flags in {others}: main.command(flags)"]):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    header = (tmp_path / "Training_Results/odd_even/run/log_val_Base.csv").read_text().splitlines()[0]
    assert header == "Epochs,Time,NMI,Recall @ 1,Recall @ 2,Recall @ 4,Recall @ 8,Mean rank"


def test_every_flag_and_every_run_is_named() -> None:
    for name in vars(config.parse([])):
        assert f"`--{name}`" in FLAGS, name
    for run in RUNS:
        assert any(run.split("-")[0] in page for page in PAGES.values())


def test_pictures_and_links_exist() -> None:
    for path, page in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page):
            assert (path.parent / target).exists(), f"{path}: {target}"
    assert {path for path in PAGES if path.parent.name == "docs"} == {
        ROOT / target for target in re.findall(r"\]\((docs/\w+\.md)\)", PAGES[ROOT / "README.md"])
    }


def test_published_settings_are_all_there() -> None:
    """PROTOCOLS, section 5: epochs and milestones of the first table and of the GoogLeNet list."""
    published = {
        ("cub200", "resnet50"): {"margin": "50 30", "triplet": "50 30", "npair": "55 35", "proxynca": "40 25"},
        ("cars196", "resnet50"): {"margin": "70 45", "triplet": "70 45", "npair": "85 55", "proxynca": "40 25"},
        ("online_products", "resnet50"): {"margin": "40 30", "triplet": "40 30", "npair": "25 15 20"},
        ("in-shop", "resnet50"): {"margin": "40 25", "triplet": "40 25", "npair": "40 25"},
        ("cub200", "googlenet"): {
            "margin": "60 10 20 30 40 50",
            "triplet": "70 15 40 60",
            "npair": "150 100",
            "proxynca": "25 7 17",
        },
        ("cars196", "googlenet"): {
            "margin": "70 30 50",
            "triplet": "70 30 50",
            "npair": "85 40 65",
            "proxynca": "40 20 30",
        },
        ("online_products", "googlenet"): {"margin": "20 2 6", "triplet": "40 10", "npair": "20 2 6"},
        ("in-shop", "googlenet"): {"margin": "40 25", "triplet": "40 25", "npair": "40 25"},
    }
    names = {f"{data}-{arch}-{loss}" for (data, arch), of_loss in published.items() for loss in of_loss}
    assert set(PUBLISHED) == names
    for (data, arch), of_loss in published.items():
        for loss, numbers in of_loss.items():
            opt = config.resolve(config.parse(RUNS[f"{data}-{arch}-{loss}"]))
            assert f"{opt.n_epochs} {' '.join(map(str, opt.tau))}" == numbers
            assert (opt.dataset, opt.arch, opt.bs, opt.decay, opt.gamma) == (data, arch, 112, 4e-4, 0.3)
            assert (opt.lr, opt.embed_dim, opt.crop_size) == (
                (1e-5, 128, 224) if arch == "resnet50" else (1e-4, 512, 227)
            )
            assert opt.samples_per_class == (1 if loss == "proxynca" else 4)


@pytest.fixture(scope="module")
def full_size_trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder trees with the real number of training classes and eight test classes; all images are one file."""
    source = tmp_path_factory.mktemp("full_size")
    for name, classes in TRAINING_CLASSES.items():
        image = source / f"{name}.jpg"
        Image.new("RGB", (24, 24), "teal").save(image)
        for label in range(classes + TEST_CLASSES):
            folder = source / name / "images" / f"{label:05d}"
            folder.mkdir(parents=True)
            for number in range(4):
                os.link(image, folder / f"{number}.jpg")
    return source


def read_first_classes(root: Path) -> datasets.Splits:
    """Trains on the real number of classes."""
    images = datasets.read_class_folders(root / "images")
    is_train = images.labels[:, 0] < TRAINING_CLASSES[root.name]
    return datasets.Splits(images.subset(is_train), test=[datasets.RetrievalSet("test", images.subset(~is_train))])


def stand_in(weights: netlib.Weights) -> tuple[torch.nn.Module, int]:
    """A network as small as can be."""
    pooled = torch.nn.AdaptiveAvgPool2d(2)
    return torch.nn.Sequential(pooled, torch.nn.Flatten()), 12


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_train_for_a_step(
    name: str, full_size_trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*RUNS[name], "--source_path", str(full_size_trees), "--save_path", str(tmp_path), "--kernels", "0"]
    opt = config.parse([*flags, "--crop_size", "16", "--n_epochs", "1", "--gpu", "-1", "--savename", "run"])
    for arch in ("resnet50", "googlenet"):
        monkeypatch.setitem(netlib.ARCHS, arch, netlib.Arch(stand_in, embed_dim=netlib.ARCHS[arch].embed_dim))
    monkeypatch.setitem(datasets.DATASETS, opt.dataset, datasets.DatasetSpec(read_first_classes))
    form = datasets.BaseTripletDataset.set_epoch

    def one_batch(self: datasets.BaseTripletDataset, epoch: int) -> None:
        form(self, epoch)
        del self.batches[1:]

    monkeypatch.setattr(datasets.BaseTripletDataset, "set_epoch", one_batch)
    metrics = main.main(opt)
    assert metrics["Recall @ 1"] == 0  # all images are the same, and ties count against the network


def test_presets_have_names() -> None:
    used = {preset for flags in PRESETS.values() for preset in config.parse(flags).config}
    with_names_of_their_own = {"baselines", "cars196", "online_products", "in-shop"}
    assert used == {path.stem for path in (ROOT / "configs").glob("*.yaml")} - with_names_of_their_own
    for flags in PRESETS.values():
        config.resolve(config.parse(flags))


def test_the_table_of_losses_has_a_command() -> None:
    script, *flags = RUNS["benchmark-losses"]
    assert script == "benchmark_losses.py"
    own, _ = benchmark_losses.parse(flags)
    assert own.losses == [*losses.LOSSES, *losses.LIBRARY_LOSSES]


@pytest.mark.parametrize("name", STUDIES)
def test_studies_search_what_can_be_tuned(name: str) -> None:
    search = tune.parse(RUNS[name][1:])
    assert len(search.space) >= 3
    assert tune.check_configurations(search)


def test_sample_runs_refuses_an_unknown_name() -> None:
    done = subprocess.run(["bash", "Sample_Runs.sh", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no run named nothing" in done.stderr


def test_demo_needs_neither_data_nor_weights() -> None:
    opt = config.resolve(config.parse(RUNS["demo"]))
    assert (opt.dataset, opt.not_pretrained, opt.check_untrained_accuracy) == ("glyphs", True, True)
    assert datasets.DATASETS["glyphs"].made_here


@pytest.fixture(scope="module")
def some_glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset glyphs, of which there are 48 characters in eight fonts."""
    folder = tmp_path_factory.mktemp("glyphs")
    images = folder / "Datasets" / "glyphs" / "images"
    for code in range(ord("A"), ord("A") + 24):
        for character in (chr(code), chr(code + 0x3CF)):  # Latin and Cyrillic
            (images / f"U+{ord(character):04X}").mkdir(parents=True)
            for name in datasets.GLYPH_FONTS[:8]:
                font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), 44)
                picture = Image.new("L", (64, 64), 255)
                ImageDraw.Draw(picture).text((32, 32), character, fill=0, font=font, anchor="mm")
                picture.save(images / f"U+{ord(character):04X}" / f"{name}.png")
    return folder


@pytest.mark.slow
def test_readme_experiments_run_as_they_stand(
    some_glyphs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands of these pages, one after the other, with a small network where they say what to train."""
    configuration = FLAGS[FLAGS.index("## Configuration") : FLAGS.index("## Published settings")]
    text = "".join((PROTOCOLS, configuration, RECORDS, TUNING))
    commands = [shlex.split(line) for line in re.findall(r"^python (.*)$", text, re.MULTILINE)]
    assert len(commands) == 17
    monkeypatch.chdir(some_glyphs)
    small = ["--arch", "shufflenet_v2_x0_5", "--crop_size", "32", "--gpu", "-1", "--kernels", "0", "--bs", "8"]
    small += ["--iterations_per_epoch", "1", "--n_epochs", "2", "--no-report"]
    for script, *flags in commands:
        if script == "compare.py":
            compare.main([path for flag in flags for path in sorted(glob.glob(flag)) or [flag]])
            continue
        command = {"main.py": main.command, "tune.py": tune.command}[script]
        if "--label_hierarchy_level" in flags:  # half of so few characters is of one script
            flags = [word.replace("predefined_with_validation", "cross_validation") for word in flags]
            flags += ["--split_shuffle", "1"]
        command([*flags, *(small if "--dataset" in flags else [])])
    printed = capsys.readouterr()

    results = some_glyphs / "Training_Results" / "glyphs"
    names = {"folds", "shared", "layered", "the_same", "layered_reproduced", "levels", "study", "tuned"}
    assert {path.name for path in results.iterdir()} >= names
    assert (results / "levels/fold_0/per_class_val.csv").is_file()
    assert (results / "study/history.svg").is_file()
    assert (some_glyphs / "all.db").is_file()
    assert "ConcatenateEmbeddings" in (results / "folds/meta/results.csv").read_text()
    assert (results / "shared/meta/results.csv").is_file()
    assert (results / "layered/tsne_test.png").is_file()
    assert "layered is left out" not in printed.err
    assert "split_scheme cross_validation" in printed.out  # compare's table
    assert (some_glyphs / "comparison.svg").is_file()
    rows = (
        auxiliaries.load_json(results / "layered/summary.json"),
        auxiliaries.load_json(results / "layered_reproduced/summary.json"),
    )
    assert rows[0]["selected"] == rows[1]["selected"]


@pytest.mark.slow
def test_what_the_docs_do_with_a_run_and_with_data_works(some_glyphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands and examples of both pages, with a run named demo."""
    monkeypatch.chdir(some_glyphs)
    small = ["--arch", "shufflenet_v2_x0_5", "--not_pretrained", "--crop_size", "32", "--gpu", "-1", "--kernels", "0"]
    small += ["--bs", "8", "--iterations_per_epoch", "1", "--n_epochs", "1"]
    main.command(["--dataset", "glyphs", "--savename", "demo", *small])
    commands = {"main.py": main.command, "inference.py": inference.main, "check.py": check.command}
    text = (USE + DATA.replace(TRANSFORMS, "")).replace("caltech101", "glyphs").replace("cub200", "glyphs")
    lines = re.findall(r"^python (\S+) (.*)$", text, re.MULTILINE)
    assert {script for script, _ in lines} == set(commands)
    for script, flags in lines:
        commands[script]([*shlex.split(flags), *(small if script == "main.py" and "--dataset" in flags else [])])
    for example in re.findall(r"^```python\n(.*?)^```", USE + PAGES[ROOT / "README.md"], re.MULTILINE | re.DOTALL):
        exec(example, {})
    run = some_glyphs / "Training_Results/glyphs/demo"
    assert {"report.html", "attention_test.png", "embedding_costs_test.svg"} <= {path.name for path in run.iterdir()}
    for made in ("found.html", "zhe.parquet", "net.onnx", "Datasets/glyphs/fold_0.csv"):
        assert (some_glyphs / made).is_file()


SMALLER = {
    "timm:vit_small_patch14_dinov2.lvd142m": "timm:test_vit",
    "timm:convnext_tiny.fb_in22k": "timm:test_convnext",
    "timm:tf_efficientnet_lite0": "timm:test_efficientnet",
    "resnet50": "resnet18",
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("command", re.findall(r"^python main\.py (.*)$", METHODS + TRANSFORMS, re.MULTILINE))
def test_readme_examples_of_training_run(tiny_source: Path, tmp_path: Path, command: str) -> None:
    """With a small relative of the network that they name, random weights, and two iterations."""
    given = [SMALLER.get(word, word) for word in shlex.split(command)]
    arch = given[given.index("--arch") + 1] if "--arch" in given else "shufflenet_v2_x0_5"
    size = [] if "--train_transforms" in given else ["--crop_size", "160" if arch.startswith("timm:") else "32"]
    where = ["--dataset", "tiny", "--source_path", str(tiny_source), "--save_path", str(tmp_path), "--savename", "run"]
    small = ["--not_pretrained", "--gpu", "-1", "--kernels", "0", "--bs", "8", "--samples_per_class", "2", *size]
    small += ["--no-report"]
    epochs = [] if "--n_epochs" in given else ["--n_epochs", "1", "--iterations_per_epoch", "2"]
    cache = ["--cache_path", str(tmp_path / "cache")]
    metrics = main.command(["--arch", arch, *given, *where, *small, *epochs, *cache])
    assert 0 <= metrics["Recall @ 1"] <= 1
    assert (tmp_path / "tiny" / "run" / "checkpoint.pth.tar").is_file()
