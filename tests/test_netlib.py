"""Every architecture, frozen BatchNorm, the input's normalization, and weights from everywhere."""

from __future__ import annotations

import argparse
import copy
import re
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as models
from conftest import ROOT
from torch import nn
from torchvision.models import _api, regnet

import config
import netlib
from auxiliaries import FlagParser, UserError
from netlib import ARCHS, Arch, EmbeddingNet, Weights, find_arch, networkselect

CLASSIFIERS = models.list_models(module=models)  # all that torchvision has
NO_LINEAR_LAYER = {"squeezenet1_0", "squeezenet1_1"}  # they end in a convolution

Downloads = list[str]


def flags(arch: str = "resnet18", **changes: Any) -> argparse.Namespace:
    """Resolved flags of a small network for small images."""
    values = {"weights": None, "embed_dim": 16, "normalize": True, "freeze_batchnorm": True, "crop_size": 32}
    return argparse.Namespace(arch=arch, **{"not_pretrained": False, **values, **changes})


def images(size: int = 32, count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def settle_batchnorm(network: nn.Module) -> None:
    """Gives BatchNorm the statistics of some images; else features of random weights hardly depend on the image."""
    network.eval()  # auxiliary classifiers rest
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1
    with torch.inference_mode():
        network((images(96) / 255 - 0.5) / 0.5)
    network.eval()


def published(arch: str) -> dict[str, torch.Tensor]:
    """A state dict as torchvision publishes it: with a classifier of 1000 and GoogLeNet's auxiliary classifiers."""
    torch.manual_seed(0)
    more: dict[str, Any] = {} if arch == "resnet18" else {"init_weights": False}
    network = models.get_model(arch, weights=None, **more)
    settle_batchnorm(network)
    return network.state_dict()


@pytest.fixture(autouse=True)
def downloads(monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """No test downloads: attempts fail as without a network, and their addresses are listed."""
    tried: Downloads = []

    def fail(url: str, *args: Any, **kwargs: Any) -> None:
        tried.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    return tried


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, torch.Tensor]], None]:
    """A function that makes every download give a state dict."""

    def give(state: dict[str, torch.Tensor]) -> None:
        monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *args, **kwargs: state)

    return give


@pytest.fixture
def output_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the embeddings of all EmbeddingNets while a test builds some, quickly, on the meta device."""
    shapes: list[tuple[int, ...]] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, EmbeddingNet):
            shapes.append(tuple(output.shape))

    def block_params(*args: Any, original: Any = regnet.BlockParams.from_init_params, **kwargs: Any) -> Any:
        with torch.device("cpu"):  # it computes widths with tensors
            return original(*args, **kwargs)

    monkeypatch.setattr(regnet.BlockParams, "from_init_params", block_params)
    for name in ("kaiming_normal_", "kaiming_uniform_", "trunc_normal_", "normal_", "uniform_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)  # slow, and without effect there
    hook = nn.modules.module.register_module_forward_hook(record)
    yield shapes
    hook.remove()


@pytest.mark.parametrize("arch", sorted({*ARCHS, *CLASSIFIERS} - NO_LINEAR_LAYER))
def test_every_architecture_embeds_images_of_its_size(
    arch: str, output_shapes: list[tuple[int, ...]], downloads: Downloads
) -> None:
    """Rebuilt without its weights, as for a run's checkpoint, and on the meta device: shapes only."""
    with torch.device("meta"):
        net = networkselect(flags(arch, crop_size=find_arch(arch).crop_size, embed_dim=48), load_pretrained=False)
    assert output_shapes == [(1, 48)]
    assert net.training
    assert not any(isinstance(module, nn.Linear) and module.out_features == 1000 for module in net.modules())
    assert not downloads


@pytest.mark.parametrize("arch", sorted(NO_LINEAR_LAYER))
def test_an_architecture_without_a_linear_layer_is_refused(arch: str) -> None:
    with pytest.raises(UserError, match=f"--arch {arch} does not end in a Linear layer"):
        networkselect(flags(arch, not_pretrained=True))


@pytest.mark.parametrize(
    ("arch", "crop_size", "resize", "embed_dim"),
    [("resnet50", 224, 256, 128), ("googlenet", 227, 256, 512), ("inception_v3", 299, 342, 128)],
)
def test_default_sizes(arch: str, crop_size: int, resize: int, embed_dim: int) -> None:
    row = find_arch(arch)
    assert (row.crop_size, row.resize, row.embed_dim) == (crop_size, resize, embed_dim)
    assert (row.mean, row.std) == (netlib.IMAGENET_MEAN, netlib.IMAGENET_STD)


def test_the_rows_that_are_written_down_are_what_the_weights_want() -> None:
    wanted = models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    row = find_arch("resnet50")
    assert ([row.crop_size], [row.resize]) == (wanted.crop_size, wanted.resize_size)
    assert (list(row.mean), list(row.std)) == (wanted.mean, wanted.std)


def test_rows_of_torchvision_have_the_input_that_its_weights_want() -> None:
    wanted = models.EfficientNet_B7_Weights.DEFAULT.transforms()
    row = find_arch("efficientnet_b7")
    assert ([row.crop_size], [row.resize]) == (wanted.crop_size, wanted.resize_size) == ([600], [600])
    wanted = models.ViT_B_16_Weights.DEFAULT.transforms()
    assert (find_arch("vit_b_16").mean, find_arch("vit_b_16").std) == (tuple(wanted.mean), tuple(wanted.std))


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet5O", "resnet50"), ("ResNet18", "resnet18"), ("google_net", "googlenet"), ("vit_b16", "vit_b_16")],
)
def test_an_unknown_architecture_names_the_nearest(name: str, near: str) -> None:
    for use in (find_arch, lambda name: networkselect(flags(name))):
        with pytest.raises(UserError, match=rf"^--arch {name} is unknown \(did you mean {near}\?\)"):
            use(name)
    with pytest.raises(UserError, match=r"^--arch 7 is unknown: "):
        find_arch("7")
    with pytest.raises(UserError, match="fcn_resnet50 is unknown"):  # torchvision has it, for segmentation
        find_arch("fcn_resnet50")


def test_resnet50_and_googlenet_are_known_without_torchvision() -> None:
    code = (
        "import sys, netlib\n[netlib.find_arch(name) for name in netlib.ARCHS]\nassert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_flags() -> None:
    parser = FlagParser()
    netlib.add_arguments(parser)
    assert parser.names_with(fixed=True) == [
        *("arch", "embed_dim", "embedder", "embedder_norm", "freeze_trunk", "freeze_layers", "lora", "pooling"),
        "cascade_layers",
    ]
    opt = parser.parse_args([])
    assert (opt.arch, opt.embed_dim, opt.not_pretrained, opt.freeze_batchnorm) == ("resnet50", None, None, None)
    assert parser.parse_args(["--not_pretrained"]).not_pretrained
    assert parser.parse_args(["--not_pretrained", "--pretrained"]).not_pretrained is False
    assert parser.parse_args(["--no-freeze_batchnorm"]).freeze_batchnorm is False
    assert "--no-not_pretrained" not in parser.format_help()


def test_images_of_a_size_that_the_network_cannot_take_are_refused() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"vit_b_16 .* --crop_size 32 .* try 224"):
        networkselect(flags("vit_b_16", crop_size=32), load_pretrained=False)


def test_an_architecture_of_ones_own_needs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def build(weights: Weights) -> tuple[nn.Module, int]:
        calls.append(weights)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3

    row = Arch(build, crop_size=8, embed_dim=2, mean=(0, 0, 0), std=(1, 0.5, 1), has_weights=True)
    monkeypatch.setitem(ARCHS, "tiny", row)
    assert find_arch("tiny").embed_dim == 2
    opt = flags("tiny", crop_size=8, embed_dim=2)
    net = networkselect(opt)
    networkselect(vars(opt))
    networkselect(opt, load_pretrained=False)
    networkselect(flags("tiny", crop_size=8, embed_dim=2, not_pretrained=True))
    networkselect(vars(flags("tiny", crop_size=8, embed_dim=2, not_pretrained=True)))
    with pytest.raises(UserError, match="absent"):
        networkselect(flags("tiny", crop_size=8, embed_dim=2, weights="absent"))
    later, random = Weights.LOADED_LATER, Weights.RANDOM
    assert calls == [Weights.DOWNLOADED, later, later, random, random, later]
    pooled = images().float().mean(dim=(2, 3)) / torch.tensor([255, 127.5, 255])
    torch.testing.assert_close(net(images()), F.normalize(net.embedding(pooled), dim=1))


def pooled_colors(weights: Weights) -> tuple[nn.Module, int]:
    """Builds a backbone without pretrained weights, but with something to load."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3)), 3


def resolved(*more: str) -> argparse.Namespace:
    return config.resolve(config.parse(["--gpu", "-1", *more]))


def test_an_architecture_says_whether_it_has_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(ARCHS, "tiny", Arch(pooled_colors, crop_size=8, resize=8))
    assert all(find_arch(name).has_weights for name in ("resnet50", "googlenet", "resnet18"))
    opt = resolved("--arch", "tiny")
    assert (opt.not_pretrained, opt.freeze_batchnorm) == (True, False)
    assert networkselect(opt).freeze_batchnorm is False
    assert not resolved("--arch", "resnet18").not_pretrained
    assert resolved("--arch", "resnet18", "--not_pretrained").not_pretrained

    torch.save(networkselect(opt).backbone.state_dict(), tmp_path / "own.pth")
    opt = resolved("--arch", "tiny", "--weights", str(tmp_path / "own.pth"))
    assert (opt.not_pretrained, opt.freeze_batchnorm) == (False, True)
    networkselect(opt)
    with pytest.raises(
        UserError, match=r"^--arch tiny has no pretrained weights: drop --pretrained, or give --weights"
    ):
        networkselect(resolved("--arch", "tiny", "--pretrained"))
    with pytest.raises(UserError, match=r"needs pretrained statistics to keep: drop it; --arch tiny has none"):
        resolved("--arch", "tiny", "--freeze_batchnorm")
    with pytest.raises(UserError, match=r"needs pretrained statistics to keep: drop it or --not_pretrained"):
        resolved("--arch", "resnet18", "--not_pretrained", "--freeze_batchnorm")


def test_a_run_of_an_earlier_version_that_called_its_architecture_pretrained_still_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHS, "tiny", Arch(pooled_colors, crop_size=8, resize=8))
    opt = resolved("--arch", "tiny", "--pretrained", "--freeze_batchnorm")
    assert networkselect(vars(opt)).freeze_batchnorm
    assert networkselect(opt, load_pretrained=False).freeze_batchnorm


def test_resnet50_is_torchvisions_with_a_linear_embedding(serve: Callable[[dict[str, torch.Tensor]], None]) -> None:
    torch.manual_seed(0)
    reference = models.resnet50(weights=None)
    settle_batchnorm(reference)
    serve(reference.state_dict())
    net = networkselect(flags("resnet50", normalize=False)).eval()
    reference.fc = nn.Identity()
    normalized = models.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)(images())
    with torch.inference_mode():
        torch.testing.assert_close(net(images()), net.embedding(reference(normalized)), rtol=1e-4, atol=1e-4)


def small_net(**settings: Any) -> EmbeddingNet:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return EmbeddingNet(backbone, 6, 5, **settings)


def test_images_are_normalized_on_the_way_in() -> None:
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    net = EmbeddingNet(nn.Flatten(), 3 * 32 * 32, 4, normalize=False, mean=mean, std=std)
    seen: list[torch.Tensor] = []
    net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(images())
    expected = (images() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (images().float(), r"\(4, 3, 32, 32\) float32"),
        (images() / 255, r"\(4, 3, 32, 32\) float32"),
        (images().half(), r"\(4, 3, 32, 32\) float16"),
        (images().int(), r"\(4, 3, 32, 32\) int32"),
        (images()[:, :1], r"\(4, 1, 32, 32\) uint8"),
        (images()[0], r"\(3, 32, 32\) uint8"),
        (images().permute(0, 2, 3, 1), r"\(4, 32, 32, 3\) uint8"),
        (np.zeros((4, 3, 32, 32), np.uint8), "ndarray"),
        ([images()[0]], "list"),
        (None, "NoneType"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_a_batch_of_images_is_refused(given: Any, named: str, training: bool) -> None:
    net = small_net().train(training)
    with pytest.raises(UserError, match=rf"takes images as \(B, 3, H, W\) uint8, .* it got {named}$"):
        net(given)


def test_checking_images_waits_for_no_device() -> None:
    with torch.device("meta"):
        netlib.check_images(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))  # has no pixels to look at
        with pytest.raises(UserError, match="float32"):
            netlib.check_images(torch.zeros(2, 3, 8, 8))


def test_a_runs_network_comes_back_in_evaluation_mode() -> None:
    opt = flags(not_pretrained=True, freeze_batchnorm=False)
    assert networkselect(opt).training
    net = networkselect(vars(opt))
    assert not any(module.training for module in net.modules())


def test_embeddings_have_length_one_only_with_normalize() -> None:
    lengths = small_net(normalize=True)(images()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(4))
    plain = small_net(normalize=False)(images())
    assert (plain.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(small_net(normalize=True)(images()), plain / plain.norm(dim=1, keepdim=True))


def test_frozen_batchnorm_keeps_its_statistics_and_learns_on() -> None:
    net = small_net(freeze_batchnorm=True).eval().train()
    batchnorm = net.backbone[1]  # type: ignore[index]
    before = {name: buffer.clone() for name, buffer in batchnorm.named_buffers()}
    net(images())[:, 0].sum().backward()
    for name, buffer in batchnorm.named_buffers():  # mean, variance, number of batches
        assert torch.equal(buffer, before[name]), name
    assert net.training
    assert net.backbone.training
    assert not batchnorm.training
    for parameter in batchnorm.parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert not any("train" in vars(module) for module in net.modules())
    assert "freeze_batchnorm=True" in repr(net)


def test_batchnorm_that_is_not_frozen_updates_its_statistics() -> None:
    net = small_net(freeze_batchnorm=False).train()
    batchnorm = net.backbone[1]  # type: ignore[index]
    net(images())
    assert batchnorm.training
    assert batchnorm.num_batches_tracked == 1
    assert batchnorm.running_mean.abs().sum() > 0
    assert "freeze_batchnorm=False" in repr(net)


@pytest.mark.parametrize(("fc_lr_mul", "learning_rates"), [(0, [0.1]), (3, [0.1, 0.3])])
def test_parameter_groups(fc_lr_mul: float, learning_rates: list[float]) -> None:
    net = small_net()
    groups = net.parameter_groups(lr=0.1, decay=0.01, fc_lr_mul=fc_lr_mul)
    assert [group["lr"] for group in groups] == pytest.approx(learning_rates)
    assert {group["weight_decay"] for group in groups} == {0.01}
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == set(map(id, net.parameters()))
    assert {id(p) for p in groups[-1]["params"]} >= set(map(id, net.embedding.parameters()))
    torch.optim.Adam(groups)


@pytest.fixture(scope="module")
def googlenet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "googlenet.pth"
    torch.save(published("googlenet"), path)
    return path


def googlenet_flags(**changes: Any) -> argparse.Namespace:
    return flags("googlenet", crop_size=64, embed_dim=8, normalize=False, **changes)


@pytest.mark.parametrize("source", ["download", "--weights", "rebuilt"])
def test_googlenet_converts_its_input_wherever_its_weights_come_from(
    source: str, googlenet_file: Path, serve: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    weights = torch.load(googlenet_file)
    if source == "download":
        serve(dict(weights))
    net = networkselect(
        googlenet_flags(weights=str(googlenet_file) if source == "--weights" else None), source != "rebuilt"
    ).eval()
    if source == "rebuilt":
        net.backbone.load_state_dict({name: weights[name] for name in net.backbone.state_dict()})

    reference = models.googlenet(weights=None, aux_logits=False, transform_input=False, init_weights=False).eval()
    reference.load_state_dict(weights, strict=False)
    reference.fc = nn.Identity()
    with torch.inference_mode():
        features = reference((images(64) / 255 - 0.5) / 0.5)  # what these weights were trained on
        torch.testing.assert_close(net(images(64)), net.embedding(features), rtol=1e-4, atol=1e-4)


def test_googlenet_from_scratch_takes_its_input_as_it_is() -> None:
    with torch.device("meta"):
        rebuilt = networkselect(vars(googlenet_flags(not_pretrained=True)))
    net = networkselect(googlenet_flags(not_pretrained=True)).train()
    assert rebuilt.backbone.transform_input is net.backbone.transform_input is False
    assert not net.backbone.aux_logits
    assert (net.embedding.in_features, net.backbone.aux1, net.backbone.aux2) == (1024, None, None)
    assert net(images(64)).shape == (4, 8)  # a tensor, not a tuple, in training too


@pytest.mark.parametrize("arch", ["resnet18", "googlenet", "inception_v3"])
def test_a_run_is_rebuilt_from_its_parameters_without_a_download(
    arch: str, downloads: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = flags(arch, crop_size=96, weights="/long/gone.pth")
    rebuilt = networkselect(vars(opt))
    assert not downloads
    state = published(arch)
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *args, **kwargs: state)
    trained = networkselect(flags(arch, crop_size=96))
    own = trained.backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert list(rebuilt.state_dict()) == list(trained.state_dict())
    rebuilt.load_state_dict(trained.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt.eval()(images(96)), trained.eval()(images(96)))


@pytest.mark.parametrize(
    ("arch", "weights"),
    [
        ("resnet50", models.ResNet50_Weights.IMAGENET1K_V1),
        ("googlenet", models.GoogLeNet_Weights.IMAGENET1K_V1),
        ("efficientnet_b0", models.EfficientNet_B0_Weights.DEFAULT),
    ],
)
def test_weights_are_downloaded_or_asked_for(arch: str, weights: models.WeightsEnum, downloads: Downloads) -> None:
    with pytest.raises(UserError, match=rf"weights of {arch} .*--weights FILE.*--not_pretrained"):
        networkselect(flags(arch))
    assert downloads == [weights.url]


def test_a_download_that_ends_early_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*args: Any, **kwargs: Any) -> None:  # as torch.hub reports it
        raise RuntimeError('invalid hash value (expected "f37072fd", got "00000000")')

    monkeypatch.setattr(_api, "load_state_dict_from_url", cut_off)
    with pytest.raises(UserError, match="--weights FILE"):
        networkselect(flags())


@pytest.mark.parametrize("broken", ["cut off", "html"])
def test_a_broken_file_among_torchs_downloads_is_one_sentence(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # nothing is downloaded: the file is there
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    torch.save({"conv1.weight": torch.zeros(1000)}, cached)
    cached.write_bytes(cached.read_bytes()[:2000] if broken == "cut off" else b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(UserError, match="--weights FILE"):
        networkselect(flags())


def test_a_bug_in_a_builder_is_not_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(weights: Weights) -> tuple[nn.Module, int]:
        raise RuntimeError("a bug")

    monkeypatch.setitem(ARCHS, "tiny", Arch(build))
    with pytest.raises(RuntimeError, match="a bug"):
        networkselect(flags("tiny", not_pretrained=True))


def test_weights_from_a_published_state_dict_of_another_number_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = models.resnet18(weights=None, num_classes=7).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    own = networkselect(flags(weights=str(tmp_path / "resnet18.pth"))).backbone.state_dict()
    assert own.keys() == state.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_weights_with_the_names_of_the_published_densenets(tmp_path: Path) -> None:
    """Their files say `norm.1` where the network says `norm1`; torchvision renames them when it loads them itself."""
    state = models.densenet121(weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, tmp_path / "densenet121.pth")
    own = networkselect(flags("densenet121", weights=str(tmp_path / "densenet121.pth"))).backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)


def test_weights_from_a_runs_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = networkselect(flags(not_pretrained=True))
    torch.save({"epoch": 3, "state_dict": trained.state_dict()}, tmp_path / "checkpoint.pth.tar")
    net = networkselect(flags(weights=str(tmp_path / "checkpoint.pth.tar"), embed_dim=9))
    own, state = net.backbone.state_dict(), trained.backbone.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert net.embedding.out_features == 9


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same state dict as training programs save it."""
    module = {f"module.{name}": value for name, value in state.items()}
    network = {f"backbone.{name}": value for name, value in state.items()}
    whole = {**network, "embedding.weight": torch.zeros(16, 512), "mean": torch.zeros(3)}
    return {
        "model": {"model": state, "epoch": 3},
        "state_dict": {"state_dict": state, "optimizer": {"state": {}}},
        "model_state_dict": {"model_state_dict": state},
        "module.": module,
        "model of module.": {"model": module},
        "module. of module.": {f"module.{name}": value for name, value in module.items()},
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "model.": {"state_dict": {f"model.{name}": value for name, value in state.items()}},
        "whole network": whole,
        "whole network of module.": {"state_dict": {f"module.{name}": value for name, value in whole.items()}},
        "half": {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        "double": {name: value.double() if value.is_floating_point() else value for name, value in state.items()},
    }


@pytest.mark.parametrize("form", wrapped({}))
def test_weights_as_training_programs_save_them(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = models.resnet18(weights=None).state_dict()
    torch.save(wrapped(state)[form], tmp_path / "w.pth")
    own = networkselect(flags(weights=str(tmp_path / "w.pth"))).backbone.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-6)
    assert all(value.dtype == state[name].dtype for name, value in own.items())


def changed(change: Callable[[torch.Tensor], Any], entry: str = "layer1.0.conv1.weight") -> Callable[[], Any]:
    """A function that gives a state dict with another value for an entry."""

    def make() -> Any:
        state = models.resnet18(weights=None).state_dict()
        return {**state, entry: change(state[entry])}

    return make


def with_a_number(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: value.index_fill(0, torch.tensor(1), number)


def containing_itself() -> Any:
    state: dict[str, Any] = {}
    state["model"] = state
    return state


def other_shape() -> Any:
    state = models.resnet18(weights=None).state_dict()
    return {**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}


def without_first_layer() -> Any:
    state = models.resnet18(weights=None).state_dict()
    return {"state_dict": {f"backbone.{name}": value for name, value in state.items() if name != "conv1.weight"}}


UNFITTING: dict[str, tuple[Callable[[], Any], str]] = {
    "an entry's shape": (other_shape, r"layer1\.0\.conv1\.weight"),
    "a missing entry": (without_first_layer, r"conv1\.weight"),
    "another network": (lambda: models.mobilenet_v3_small(weights=None).state_dict(), r"conv1\.weight"),
    "a deeper network": (lambda: models.resnet34(weights=None).state_dict(), r"layer1\.2"),
    "a tensor": (lambda: torch.zeros(3), "is not a state dict"),
    "a number": (lambda: 3, "is not a state dict"),
    "a list as state_dict": (lambda: {"state_dict": [1]}, "is not a state dict"),
    "a model in itself": (containing_itself, "is not a state dict"),
    "integer keys": (lambda: {0: torch.zeros(3)}, "is not a state dict"),
    "nothing": (dict, r"lacks conv1\.weight and 99 more"),
    "NaN": (changed(with_a_number(torch.nan)), r"has NaN or infinite values in layer1\.0\.conv1\.weight: take"),
    "infinity": (changed(with_a_number(torch.inf), "bn1.running_var"), r"infinite values in bn1\.running_var: take"),
    "too large": (changed(lambda value: value.double() + 1e300), r"infinite values in layer1\.0\.conv1\.weight"),
    "sparse": (changed(torch.Tensor.to_sparse), r"layer1\.0\.conv1\.weight is a nested or sparse tensor"),
    "quantized": (
        changed(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)),
        r"layer1\.0\.conv1\.weight is a quantized tensor",
    ),
    "meta": (changed(lambda value: value.to("meta")), r"layer1\.0\.conv1\.weight is a tensor without values"),
    "integers": (changed(torch.Tensor.long), r"layer1\.0\.conv1\.weight is of type int64"),
    "complex": (changed(lambda value: value.to(torch.complex64)), r"layer1\.0\.conv1\.weight is of type complex64"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("make", "entry"), UNFITTING.values(), ids=UNFITTING)
def test_weights_that_do_not_fit_name_the_file_and_the_entry(
    make: Callable[[], Any], entry: str, tmp_path: Path
) -> None:
    path = tmp_path / "some_weights.pth"
    torch.save(make(), path)
    with pytest.raises(UserError, match=rf"some_weights\.pth.*{entry}"):
        networkselect(flags(weights=str(path)))


@pytest.mark.parametrize("kept", [None, 0, 1000], ids=["missing", "empty", "cut off"])
def test_weights_that_cannot_be_read_name_the_file(kept: int | None, tmp_path: Path) -> None:
    path = tmp_path / "some_weights.pth"
    if kept is not None:
        torch.save({"conv1.weight": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"some_weights\.pth"):
        networkselect(flags(weights=str(path)))


def test_a_frozen_trunk_stays_as_it_is() -> None:
    net = small_net(freeze_trunk=True).train()
    assert not any(module.training for module in net.backbone.modules())
    assert net.embedding.training
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    net(images()).square().sum().backward()
    assert not any(parameter.requires_grad for parameter in net.backbone.parameters())
    assert not net.features(images()).requires_grad
    assert net.embedding.weight.grad is not None
    assert all(torch.equal(before[name], value) for name, value in net.backbone.state_dict().items())
    (group,) = net.parameter_groups(0.1, 0.01, fc_lr_mul=3)
    assert {id(p) for p in group["params"]} == set(map(id, net.embedding.parameters()))
    assert (group["name"], group["lr"]) == ("embedding", pytest.approx(0.3))


def test_a_frozen_trunk_is_a_flag() -> None:
    net = networkselect(resolved("--arch", "resnet18", "--not_pretrained", "--freeze_trunk", "--crop_size", "32"))
    assert net.freeze_trunk
    assert net.training
    assert not net.backbone.training
    assert net.num_features == 512


# Embedders


def test_an_embedder_is_an_mlp_of_the_normalized_features() -> None:
    torch.manual_seed(0)
    net = EmbeddingNet(nn.Flatten(), 12, 4, embedding=netlib.build_embedding(12, 4, [7, 6], "layernorm"))
    features = torch.randn(3, 12)
    scaled = (features - features.mean(1, keepdim=True)) / (features.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    layers = [module for module in net.embedding.modules() if isinstance(module, nn.Linear)]
    hidden = layers[1](layers[0](scaled).relu()).relu()
    torch.testing.assert_close(net.embed_features(features), F.normalize(layers[2](hidden), dim=1))
    assert [layer.out_features for layer in layers] == [7, 6, 4]
    assert net.last_linear is layers[2]
    assert len([*net.embedding.parameters()]) == 6  # the normalization has none


def test_the_embedder_is_given_by_flags() -> None:
    small = ("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--embed_dim", "9")
    net = networkselect(resolved(*small, "--embedder", "20", "10", "--embedder_norm", "layernorm"))
    shapes = [tuple(p.shape) for name, p in net.named_parameters() if name.startswith("embedding") and "weight" in name]
    assert shapes == [(20, 512), (10, 20), (9, 10)]
    assert list(networkselect(resolved(*small)).embedding.state_dict()) == ["weight", "bias"]


def test_without_embedding_layer_the_features_are_the_embedding() -> None:
    opt = resolved("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--embed_dim", "0")
    net = networkselect(opt).eval()
    assert (opt.embed_dim, net.embed_dim, net.num_features) == (0, 512, 512)
    torch.testing.assert_close(net(images()), F.normalize(net.features(images()), dim=1))
    assert list(net.embedding.parameters()) == []
    assert [group["name"] for group in net.parameter_groups(0.1, 0.0)] == ["network"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--embed_dim", "0", "--embedder", "5"], "--embedder puts hidden layers before the embedding layer, which"),
        (
            ["--embed_dim", "0", "--grad_measure"],
            "--grad_measure is of the embedding layer, which --embed_dim 0 leaves",
        ),
        (
            ["--embed_dim", "0", "--fc_lr_mul", "2"],
            "--fc_lr_mul is for the embedding layer, which --embed_dim 0 leaves",
        ),
        (["--embedder", "0"], "0 is not at least 1"),
        (["--embedder_norm", "layer"], r"--embedder_norm layer is unknown \(did you mean layernorm\?\)"),
        (["--freeze_trunk", "--lora", "2"], "--freeze_trunk and --lora contradict each other"),
        (["--freeze_layers", "conv1", "--lora", "2"], "--freeze_layers and --lora contradict each other"),
        (["--freeze_layers", "layer[1"], r"layer\[1 is not a regular expression"),
        (["--pooling", "average"], "--pooling average is unknown"),
        (["--interpolation", "cubic"], r"--interpolation cubic is unknown \(did you mean bicubic\?\)"),
    ],
)
def test_flags_of_the_network_that_contradict_each_other_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(*argv)


# timm's networks


def timm_net(*more: str, name: str = "test_vit") -> EmbeddingNet:
    return networkselect(resolved("--arch", f"timm:{name}", "--not_pretrained", "--embed_dim", "8", *more)).eval()


def test_networks_of_timm_have_the_input_that_their_weights_want() -> None:
    arch = find_arch("timm:vit_small_patch14_dinov2.lvd142m")
    assert (arch.crop_size, arch.resize, arch.interpolation, arch.has_weights) == (518, 518, "bicubic", True)
    arch = find_arch("timm:resnet18.tv_in1k")
    assert (arch.crop_size, arch.resize, arch.interpolation) == (224, 256, "bilinear")
    opt = resolved("--arch", "timm:tf_efficientnet_lite0", "--not_pretrained")
    assert (opt.crop_size, opt.resize, opt.interpolation) == (224, 256, "bicubic")
    assert find_arch("timm:tf_efficientnet_lite0").mean == (0.5, 0.5, 0.5)
    assert resolved("--arch", "timm:test_vit", "--interpolation", "bilinear").interpolation == "bilinear"
    assert resolved("--arch", "resnet18").interpolation == "bilinear"
    assert ":" not in resolved("--arch", "timm:test_vit").savename


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "mobilenetv3_small_050"]
)
def test_networks_of_timm_give_timms_features(name: str) -> None:
    import timm

    net = timm_net(name=name)
    torch.manual_seed(0)
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(net.backbone.state_dict())
    size = find_arch(f"timm:{name}").crop_size
    batch = images(size)
    wanted = timm.data.resolve_model_data_config(reference)
    mean, std = (torch.tensor(wanted[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        torch.testing.assert_close(net.features(batch), reference((batch / 255 - mean) / std))
    assert net.features(batch).shape == (4, net.num_features)


def test_a_transformer_is_built_for_the_size_of_the_images() -> None:
    assert timm_net("--crop_size", "48")(images(48)).shape == (4, 8)
    with pytest.raises(UserError, match=r"timm:test_vit can't take images of --crop_size 30 .*: try 160"):
        timm_net("--crop_size", "30")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "test_vitt",
            r"--arch timm:test_vitt is unknown \(did you mean timm:test_vit\d?\?\): give a name of timm.list_m",
        ),
        ("test_vit.", "timm has no weights of that tag for test_vit: it has r160_in1k"),
        (
            "resnet18.tv_in1",
            r"timm has no weights of that tag for resnet18 \(did you mean tv_in1k\?\): it has a1_in1k, ",
        ),
    ],
)
def test_what_timm_lacks_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved("--arch", f"timm:{name}")


def test_a_download_from_timms_hub_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: Any, **kwargs: Any) -> None:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"pretrained weights of timm:test_vit can't be downloaded \(no connection\)"):
        networkselect(resolved("--arch", "timm:test_vit"))


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_weights_of_timm_load_without_their_classifier(name: str, ending: str, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(1)
    published_net = timm.create_model(name, num_classes=10).eval()
    file = tmp_path / f"weights.{ending}"
    save: Callable[..., None] = save_file if ending == "safetensors" else torch.save
    save(published_net.state_dict(), file)
    net = networkselect(resolved("--arch", f"timm:{name}", "--weights", str(file))).eval()
    published_net.reset_classifier(0)  # type: ignore[operator]
    batch = images(find_arch(f"timm:{name}").crop_size)
    with torch.inference_mode():
        torch.testing.assert_close(net.features(batch), published_net((batch.float() - net.mean) / net.std))


def test_position_embeddings_are_resized_to_the_images(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "weights.pth")
    flags = ("--arch", "timm:test_vit", "--weights", str(tmp_path / "weights.pth"))
    whole, small = (networkselect(resolved(*flags, *more)) for more in ((), ("--crop_size", "80")))
    assert small.get_parameter("backbone.pos_embed").shape != whole.get_parameter("backbone.pos_embed").shape
    assert torch.equal(small.get_parameter("backbone.norm.weight"), whole.get_parameter("backbone.norm.weight"))


@pytest.mark.parametrize("content", [None, b"no such thing"])
def test_safetensors_that_cannot_be_read_name_the_file(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} (can't be opened|is not an intact .safetensors file)"):
        networkselect(resolved("--arch", "resnet18", "--crop_size", "32", "--weights", str(file)))


def test_weights_of_another_network_of_timm_are_refused(tmp_path: Path) -> None:
    torch.save(models.resnet18().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--weights .*weights.pth .*it belongs to another --arch"):
        networkselect(resolved("--arch", "timm:test_vit", "--weights", str(tmp_path / "weights.pth")))


# Pooling


def by_hand(positions: torch.Tensor, kind: str) -> torch.Tensor:
    """Positions `(B, N, C)` pooled to `(B, C)`."""
    mean, largest = positions.mean(1), positions.max(1).values
    gem = (positions.clamp(min=1e-6) ** 3).mean(1) ** (1 / 3)
    return {"avg": mean, "max": largest, "avg+max": mean + largest, "gem": gem}[kind]


@pytest.mark.parametrize("kind", ["avg", "max", "avg+max", "gem"])
@pytest.mark.parametrize(
    ("arch", "layer"),
    [
        ("resnet18", "layer4"),
        ("densenet121", "features.norm5"),
        ("mobilenet_v2", "features.18"),
        ("shufflenet_v2_x0_5", "conv5.2"),
        ("mnasnet0_5", "layers.16"),
        ("regnet_y_400mf", "trunk_output"),
        ("timm:test_resnet", "layer4"),
        ("timm:test_efficientnet", "bn2"),
    ],
)
def test_the_last_map_is_pooled(kind: str, arch: str, layer: str) -> None:
    torch.manual_seed(0)
    opt = resolved("--arch", arch, "--not_pretrained", "--crop_size", "64", "--embed_dim", "0", "--pooling", kind)
    net = networkselect(opt)
    settle_batchnorm(net.backbone)
    outputs = []
    net.backbone.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.inference_mode():
        pooled = net.features(images(64))
    last_map = outputs[0].relu() if arch == "densenet121" else outputs[0]
    torch.testing.assert_close(pooled, by_hand(last_map.flatten(2).mT, kind))


def test_pooling_keeps_the_names_of_a_convolutional_networks_parameters() -> None:
    def names(*more: str) -> set[str]:
        return set(
            networkselect(resolved("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", *more)).state_dict()
        )

    assert names("--pooling", "avg+max") == names()
    assert names("--pooling", "gem") == {*names(), "backbone.avgpool.p"}


@pytest.mark.parametrize("kind", ["avg", "max", "avg+max", "gem", "cls"])
@pytest.mark.parametrize("arch", ["timm:test_vit", "vit_b_16"])
def test_the_patch_tokens_or_the_class_token_are_pooled(arch: str, kind: str) -> None:
    torch.manual_seed(0)
    if arch == "vit_b_16":
        network: Any = models.VisionTransformer(32, 8, 2, 2, 16, 32)
        batch = torch.randn(2, 3, 32, 32)
        before = network.encoder
    else:
        import timm

        network = timm.create_model("test_vit", num_classes=0)
        batch, before = torch.randn(2, 3, 160, 160), network.norm
    tokens: list[torch.Tensor] = []
    before.register_forward_hook(lambda module, args, output: tokens.append(output))
    with torch.inference_mode():
        pooled = netlib.set_pooling(network, kind, arch).eval()(batch)
    patches = tokens[0][:, 1:]
    torch.testing.assert_close(pooled, tokens[0][:, 0] if kind == "cls" else by_hand(patches, kind))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", "--pooling cls: --arch resnet18 has no class token; it offers avg, max, avg"),
        ("alexnet", "--pooling cls: --arch alexnet offers none, since it has no last map or tokens; drop it"),
        ("timm:test_convnext", "--pooling cls: --arch timm:test_convnext has no class token"),
    ],
)
def test_a_network_without_that_pooling_is_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        networkselect(resolved("--arch", arch, "--not_pretrained", "--crop_size", "64", "--pooling", "cls"))


def test_a_copy_of_a_network_with_pooled_tokens_is_independent() -> None:
    net = timm_net("--pooling", "gem")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("backbone.pool.p").fill_(1)
    assert not torch.equal(net(images(160)), other(images(160)))
    assert net.get_parameter("backbone.pool.p") == 3


def test_weights_of_a_run_with_pooled_tokens_start_another_run(tmp_path: Path) -> None:
    net = timm_net("--pooling", "gem")
    torch.save({"state_dict": net.state_dict()}, tmp_path / "run.pth")
    for more in ((), ("--pooling", "max")):
        again = networkselect(resolved("--arch", "timm:test_vit", "--weights", str(tmp_path / "run.pth"), *more))
        names = [name for name, _ in again.named_parameters() if name.endswith("blocks.0.mlp.fc1.weight")]
        assert torch.equal(again.get_parameter(names[0]), net.get_parameter("backbone.network.blocks.0.mlp.fc1.weight"))


# What doesn't learn, and adapters


def test_frozen_layers_keep_their_parameters_and_statistics() -> None:
    small = ("--arch", "resnet18", "--not_pretrained", "--crop_size", "32")
    net = networkselect(resolved(*small, "--freeze_layers", "conv1", "bn1", "layer[12]")).train()
    still = {name for name, parameter in net.backbone.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in still} == {"conv1", "bn1", "layer1", "layer2"}
    assert "layer3.0.bn1.weight" not in still  # patterns begin where names begin
    for name, module in net.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training is not name.startswith(("bn1", "layer1", "layer2")), name
    (group,) = net.parameter_groups(0.1, 0.0)
    assert len(group["params"]) == len([p for p in net.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=r"--freeze_layers layer9 matches no parameter of --arch resnet18, .* conv1"):
        networkselect(resolved(*small, "--freeze_layers", "layer1", "layer9"))


@pytest.mark.parametrize(
    ("arch", "adapted"),
    [
        ("timm:test_vit", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        ("timm:test_convnext", ("mlp.fc1", "mlp.fc2")),
    ],
)
def test_adapters_learn_and_the_rest_of_the_backbone_does_not(arch: str, adapted: tuple[str, ...]) -> None:
    small = ("--arch", arch, "--not_pretrained", "--crop_size", "32", "--embed_dim", "8")
    torch.manual_seed(0)
    plain = networkselect(resolved(*small)).eval()
    torch.manual_seed(0)
    net = networkselect(resolved(*small, "--lora", "2")).eval()
    torch.testing.assert_close(net.features(images()), plain.features(images()))  # they begin as nothing
    net.train()(images())[:, 0].sum().backward()
    learning = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert {name for name in learning if ".lora_" not in name} == {"embedding.weight", "embedding.bias"}
    assert all(net.get_parameter(name).grad is not None for name in learning)
    assert {one for one in adapted if any(f".{one}.lora_A" in name for name in learning)} == set(adapted)
    shapes = {net.get_parameter(name).shape[0] for name in learning if "lora_A" in name}
    assert shapes == {2}


def test_only_layers_that_are_called_get_adapters() -> None:
    net = networkselect(resolved("--arch", "swin_t", "--not_pretrained", "--crop_size", "32", "--lora", "1"))
    net(images()).square().sum().backward()
    net(images())[:, 0].sum().backward()
    names = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert all(net.get_parameter(name).grad is not None for name in names)
    assert not any(".attn.qkv." in name for name in names)  # torchvision hands its weights to a function


def test_a_network_without_attention_or_mlp_refuses_adapters() -> None:
    with pytest.raises(UserError, match=r"--lora: --arch resnet18 has no Linear layers inside modules called attn, "):
        networkselect(resolved("--arch", "resnet18", "--not_pretrained", "--crop_size", "32", "--lora", "2"))
    with pytest.raises(UserError, match=r"timm:test_vit can't take images of --crop_size 30"):
        networkselect(resolved("--arch", "timm:test_vit", "--not_pretrained", "--crop_size", "30", "--lora", "2"))


# Several depths


def cascade(*more: str, arch: str = "resnet18") -> EmbeddingNet:
    flags = ("--arch", arch, "--not_pretrained", "--crop_size", "64", "--embed_dim", "12", "--loss", "contrastive")
    return networkselect(resolved(*flags, "--training_method", "CascadedEmbeddings", *more)).eval()


def test_a_cascade_embeds_each_depth() -> None:
    net = cascade()
    backbone, normalized = net.backbone, (images(64) - net.mean) / net.std
    assert (net.num_features, net.embed_dim) == (128 + 256 + 512, 12)
    outputs = netlib.tap(backbone.network, ["layer2", "layer3", "layer4"], normalized)  # type: ignore[arg-type]
    heads = net.embedding.heads
    parts = [F.normalize(head(output.mean((2, 3))), dim=1) for head, output in zip(heads, outputs)]  # type: ignore[arg-type]
    torch.testing.assert_close(net(images(64)), F.normalize(torch.cat(parts, dim=1), dim=1))
    assert torch.equal(net.embed_features(net.features(images(64))), net(images(64)))
    assert not backbone.network.layer2._forward_hooks  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arch", "size", "layers", "widths"),
    [
        ("shufflenet_v2_x0_5", "64", ["stage2", "stage3", "stage4"], [48, 96, 192]),
        (
            "densenet121",
            "64",
            ["features.denseblock2", "features.denseblock3", "features.denseblock4"],
            [512, 1024, 1024],
        ),
        ("googlenet", "64", ["inception3b", "inception4e", "inception5b"], [480, 832, 1024]),
        ("timm:test_vit", "32", ["blocks.1", "blocks.3", "norm"], [64, 64, 64]),
        ("swin_t", "64", ["features.3", "features.5", "features.7"], [192, 384, 768]),
    ],
)
def test_the_depths_are_the_ends_of_stages(arch: str, size: str, layers: list[str], widths: list[int]) -> None:
    net = cascade("--crop_size", size, "--pooling", "gem", arch=arch)
    assert (net.backbone.layers, net.backbone.widths) == (layers, widths)
    assert net(images(int(size))).shape == (4, 12)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--embed_dim", "16"], "--embed_dim 16 can't be divided among the 3 heads of a cascade: give --embed_dim 15"),
        (["--embed_dim", "1"], "give --embed_dim 3"),
        (
            ["--cascade_layers", "layer2", "leyer3"],
            r"--cascade_layers leyer3: .* no such module \(did you mean layer3\?\)",
        ),
        (["--pooling", "cls"], "--pooling cls takes one token, and a cascade pools maps"),
        (["--arch", "alexnet"], "--arch alexnet has no modules of which it is known that they end its stages"),
    ],
)
def test_cascades_that_cannot_be_built_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cascade(*more)


def test_depths_can_be_named_and_be_the_embedding_themselves() -> None:
    net = cascade("--cascade_layers", "layer1", "layer4", "--embed_dim", "0")
    assert net(images(64)).shape == (4, 64 + 512)
    again = networkselect(
        {**vars(resolved()), "arch": "resnet18", "cascade_layers": ["layer1", "layer4"], "embed_dim": 0}
    )
    assert set(again.state_dict()) == set(net.state_dict())


# Where similarities come from


def net_for_maps(*more: str) -> EmbeddingNet:
    """A small network with an embedding, in evaluation mode, whose features depend on the image."""
    torch.manual_seed(0)
    net = networkselect(
        resolved("--arch", "resnet18", "--not_pretrained", "--crop_size", "96", "--embed_dim", "8", *more)
    )
    settle_batchnorm(net.backbone)
    return net.eval()


def last_maps(net: EmbeddingNet, pixels: torch.Tensor) -> torch.Tensor:
    """What resnet18 pools, `(B, H, W, C)`."""
    with torch.no_grad():
        return netlib.tap(net.backbone, ["layer4"], (pixels - net.mean) / net.std)[0].permute(0, 2, 3, 1)


def test_similarities_are_decomposed_over_positions() -> None:
    """The embedding of a mean is the mean of the embeddings of positions, as long as it is linear."""
    net, pixels = net_for_maps(), images(96)
    nn.init.normal_(net.last_linear.bias)
    found = netlib.similarity_maps(net, pixels)
    with torch.no_grad():
        of_positions, whole = net.embedding(last_maps(net, pixels)), net(pixels)  # (B, H, W, D), (B, D)
    lengths = of_positions.mean((1, 2)).norm(dim=1)
    torch.testing.assert_close(found.similarities, whole[1:] @ whole[0])
    for i in range(3):
        for y in range(3):
            for x in range(3):
                scale = 9 * lengths[0] * lengths[i + 1]
                of_other = of_positions[i + 1, y, x] @ of_positions[0].mean((0, 1)) / scale
                of_query = of_positions[0, y, x] @ of_positions[i + 1].mean((0, 1)) / scale
                assert found.of_others[i, y, x].item() == pytest.approx(of_other.item(), abs=1e-5)
                assert found.of_query[i, y, x].item() == pytest.approx(of_query.item(), abs=1e-5)


def test_a_largest_value_counts_where_it_is() -> None:
    net, pixels = net_for_maps("--pooling", "max", "--embed_dim", "0"), images(96)
    found, maps = netlib.similarity_maps(net, pixels), last_maps(net, pixels).flatten(1, 2)  # (B, P, C)
    pooled = F.normalize(maps.amax(1), dim=1)
    wanted = torch.zeros(9)
    for channel in range(maps.shape[2]):
        wanted[maps[1, :, channel].argmax()] += pooled[0, channel] * pooled[1, channel]
    torch.testing.assert_close(found.of_others[0].flatten(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        ["--embedder", "12", "--embedder_norm", "layernorm"],
        ["--pooling", "gem"],
        ["--pooling", "avg+max", "--freeze_trunk"],
        ["--arch", "densenet121", "--pooling", "max"],
        ["--arch", "shufflenet_v2_x0_5"],
        ["--arch", "swin_t"],
        ["--arch", "timm:test_vit", "--pooling", "avg", "--lora", "2"],
        ["--arch", "timm:test_convnext"],
    ],
    ids=" ".join,
)
def test_maps_add_up_to_the_similarity_of_embeddings(more: list[str]) -> None:
    net, pixels = net_for_maps("--crop_size", "64", *more), images(64)
    with torch.no_grad():
        embeddings = F.normalize(net(pixels), dim=1)
    state, needed = copy.deepcopy(net.state_dict()), [parameter.requires_grad for parameter in net.parameters()]
    net.train()
    modes = [module.training for module in net.modules()]
    found = netlib.similarity_maps(net, pixels)
    assert found.is_of_embedding
    torch.testing.assert_close(found.similarities, embeddings[1:] @ embeddings[0], atol=1e-5, rtol=1e-5)
    for maps in (found.of_query, found.of_others):
        assert maps.shape[1] == maps.shape[2] > 1
        assert maps[0].std() > 0
        torch.testing.assert_close(maps.sum((1, 2)), found.similarities, atol=1e-5, rtol=1e-5)
    assert modes == [module.training for module in net.modules()]
    assert needed == [parameter.requires_grad for parameter in net.parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_class_token_leaves_the_mean_of_patches() -> None:
    net, pixels = net_for_maps("--arch", "timm:test_vit", "--pooling", "cls"), images(96)
    found = netlib.similarity_maps(netlib.Trunk(net), pixels)
    assert not found.is_of_embedding
    with torch.no_grad():
        (tokens,) = netlib.tap(net.backbone, ["network.norm"], (pixels - net.mean) / net.std)
    patches = F.normalize(tokens[:, net.backbone.num_prefix_tokens :].mean(1), dim=1)
    torch.testing.assert_close(found.similarities, patches[1:] @ patches[0])
    torch.testing.assert_close(found.of_others.sum((1, 2)), found.similarities)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arch", "alexnet"], "--attention shows the positions of .*, and --arch alexnet has none: drop it"),
        (
            ["--training_method", "CascadedEmbeddings", "--loss", "contrastive", "--embed_dim", "9"],
            "and a cascade pools several: drop it",
        ),
        (["--no-pictures"], "--attention belongs to the pictures of retrievals, which --no-pictures leaves out"),
    ],
)
def test_networks_without_a_last_map_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        networkselect(resolved("--arch", "resnet18", "--not_pretrained", "--crop_size", "64", "--attention", *more))
