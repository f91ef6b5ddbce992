"""Exported networks, run by ONNX Runtime, TorchScript and from safetensors, against the networks they were made of."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import auxiliaries
import config
import export
import inference
import netlib
from auxiliaries import UserError

RESNET = ("--arch", "resnet18", "--crop_size", "32")
VIT = ("--arch", "timm:test_vit", "--crop_size", "64", "--embedder", "8", "--embedder_norm", "layernorm")
LORA = (*VIT, "--lora", "2", "--pooling", "avg")


def build(source: Path, *flags: str) -> tuple[netlib.EmbeddingNet, argparse.Namespace]:
    """A network of random weights, whose adapters change its embeddings, and its flags."""
    data = ["--dataset", "tiny", "--source_path", str(source), "--gpu", "-1", "--embed_dim", "12"]
    opt = config.resolve(config.parse([*data, "--not_pretrained", *flags]))
    torch.manual_seed(0)
    net = netlib.networkselect(opt).eval()
    for name, value in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    return net, opt


def images_of(opt: argparse.Namespace, count: int) -> torch.Tensor:
    size = (count, 3, opt.crop_size, opt.crop_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def embed(net: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return net(images).numpy()


def check_onnx(net: netlib.EmbeddingNet, opt: argparse.Namespace, path: Path) -> None:
    """Compares an ONNX file with its network, for several numbers of images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ((taken,), (given,)) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [3, opt.crop_size, opt.crop_size])
    assert (given.name, given.type, given.shape[1:]) == ("embeddings", "tensor(float)", [12])
    for count in (1, 2, 7):
        images = images_of(opt, count)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, embed(net, images), atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert about["input"].startswith("images: uint8 RGB")
    assert json.loads(about["configuration"])["arch"] == opt.arch


def check_torchscript(net: netlib.EmbeddingNet, opt: argparse.Namespace, path: Path) -> None:
    about = {"configuration": "", "preprocessing": ""}
    loaded = torch.jit.load(path, _extra_files=about)
    for count in (1, 2, 7):
        images = images_of(opt, count)
        np.testing.assert_allclose(embed(loaded, images), embed(net, images), atol=1e-5)
    assert json.loads(about["configuration"])["arch"] == opt.arch
    assert f"center crop of {opt.crop_size} px" in str(about["preprocessing"])


def check_safetensors(net: netlib.EmbeddingNet, opt: argparse.Namespace, path: Path) -> None:
    loaded, images = export.load_safetensors(path), images_of(opt, 3)
    np.testing.assert_allclose(embed(loaded, images), embed(net, images), atol=1e-5)
    without_adapters = netlib.networkselect(argparse.Namespace(**{**vars(opt), "lora": None}))
    assert load_file(path).keys() == without_adapters.state_dict().keys()


CHECKS = {"onnx": check_onnx, "torchscript": check_torchscript, "safetensors": check_safetensors}
SLOW = pytest.mark.slow
NETWORKS = [
    *(pytest.param(file_format, RESNET, marks=SLOW if file_format == "onnx" else ()) for file_format in CHECKS),
    *(pytest.param(file_format, LORA) for file_format in CHECKS),
    ("torchscript", ("--arch", "googlenet", "--crop_size", "64")),
    *(
        pytest.param("onnx", flags, marks=SLOW)
        for flags in (
            ("--arch", "googlenet", "--crop_size", "64"),
            (*RESNET, "--pooling", "gem", "--channels_last"),
            (*RESNET, "--training_method", "CascadedEmbeddings", "--loss", "contrastive"),
            (*VIT, "--pooling", "cls"),
            ("--arch", "timm:test_efficientnet", "--crop_size", "64", "--pooling", "avg+max"),
        )
    ),
    pytest.param("torchscript", ("--arch", "vit_b_16", "--crop_size", "224", "--pooling", "max"), marks=SLOW),
    pytest.param("safetensors", ("--arch", "vit_b_16", "--crop_size", "224", "--lora", "2"), marks=SLOW),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("file_format", "flags"), NETWORKS)
def test_another_program_embeds_as_the_network_does(
    source: Path, tmp_path: Path, file_format: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    net, opt = build(source, *flags)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    path = tmp_path / f"net.{file_format}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torchvision.io")
        difference = export.export_network(net, opt, file_format, path)
    assert difference < 1e-5
    assert capsys.readouterr().out == (
        f"{path}: embeddings of 16 of the run's images differ from the run's by at most {difference:.1e}\n"
    )
    # as it was, but for rounding: to use adapters of attention, peft adds them to its weights and subtracts them again
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in net.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    CHECKS[file_format](net, opt, path)


def test_merged_adapters_change_the_embeddings(source: Path) -> None:
    """Otherwise the tests above would not notice that they are left out."""
    net, opt = build(source, *LORA)
    images = images_of(opt, 2)
    with_adapters = embed(net, images)
    for name, value in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(value)
    assert np.abs(embed(net, images) - with_adapters).max() > 1e-2


@pytest.mark.parametrize("file_format", list(CHECKS))
def test_a_file_that_differs_is_not_left_behind(
    source: Path, tmp_path: Path, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, opt = build(source, *RESNET)
    row = export.FORMATS[file_format]

    def save(net: netlib.EmbeddingNet, path: Path, description: Mapping[str, str]) -> None:
        path.write_bytes(b"of another network")

    for shift, words in ((2e-4, "0.0002"), (np.nan, "nan")):
        broken = export.Format(save, lambda path, shift=shift: lambda images: net(images) + shift, row.check)  # type: ignore[misc]
        monkeypatch.setitem(export.FORMATS, file_format, broken)
        (tmp_path / "net").write_bytes(b"of an earlier export")
        with pytest.raises(
            UserError, match=f"{file_format}: .* differ from the run's by up to {words}, more than 0.0001"
        ):
            export.export_network(net, opt, file_format, tmp_path / "net")
        assert [file.name for file in tmp_path.iterdir()] == ["net"]
        assert (tmp_path / "net").read_bytes() == b"of an earlier export"


def test_what_a_format_cannot_hold_is_one_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, opt = build(source, *RESNET)
    monkeypatch.setattr(export, "MAX_ONNX", 10**6)
    with pytest.raises(
        UserError, match=r"--format onnx: a file holds at most 2 GiB, and the network's weights take 0.0"
    ):
        export.export_network(net, opt, "onnx", tmp_path / "net.onnx")

    class Unusual(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(pixels.mean(dim=(2, 3)).numpy()).repeat(1, 200)[:, :512]

    net.backbone = Unusual()
    with pytest.raises(UserError, match=r"can't hold --arch resnet18 \(it gives 2 embeddings of 1 images\)"):
        export.export_network(net, opt, "torchscript", tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())


def test_the_command(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    command = ["export", "--run", str(copied), "--format", "safetensors", "--out", str(out)]
    assert inference.main(command) < 1e-6
    net, model = export.load_safetensors(out), inference.load(copied, "cpu")
    assert all(value.equal(model.net.state_dict()[name]) for name, value in net.state_dict().items())
    # its backbone can be trained on
    flags = ["--dataset", "tiny", "--arch", "shufflenet_v2_x0_5", "--weights", str(out), "--embed_dim", "4"]
    again = netlib.networkselect(config.resolve(config.parse([*flags, "--gpu", "-1"])))
    assert again.backbone.state_dict()["conv1.0.weight"].equal(net.backbone.state_dict()["conv1.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "torchscript"])
def test_the_command_prints_one_line(copied: Path, tmp_path: Path, file_format: str) -> None:
    out = tmp_path / "net"
    command = ["inference.py", "export", "--run", str(copied), "--format", file_format, "--out", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{out}: embeddings of 16 of the run's images differ from the run's by at most ")


def test_refused_commands(copied: Path, tmp_path: Path) -> None:
    def export_to(out: Path, *flags: str) -> None:
        inference.main(["export", "--run", str(copied), "--format", "torchscript", "--out", str(out), *flags])

    with pytest.raises(
        UserError, match=r"--out .*nowhere/net\.pt can't be written: give the name of a file in a folder"
    ):
        export_to(tmp_path / "nowhere" / "net.pt")
    with pytest.raises(UserError, match=r"--out .* can't be written"):
        export_to(tmp_path)
    with pytest.raises(UserError, match="an export is checked on images of the run: "):
        export_to(tmp_path / "net.pt", "--source_path", str(tmp_path / "moved"))
    (copied / "last.pth.tar").unlink()
    (copied / "checkpoint.pth.tar").unlink()
    with pytest.raises(UserError, match="has no network yet"):
        export_to(tmp_path / "net.pt")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(UserError, match="can't be opened"):
        export.load_safetensors(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is not an intact \.safetensors file"):
        export.load_safetensors(path)
    auxiliaries.remove_file(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="doesn't say of which network it is"):
        export.load_safetensors(path)
