"""Every architecture, frozen BatchNorm, the input's normalization, and weights from everywhere."""

from __future__ import annotations

import argparse
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
    assert parser.names_with(fixed=True) == ["arch", "embed_dim", "freeze_trunk"]
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
