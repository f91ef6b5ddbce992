"""Flags of speed: precision, memory format, compiling, fused optimizers, and what --fast makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Run, training_flags
from crash_child import assert_same_run
from torch._dynamo.testing import CompileCounter

import config
import evaluate
import losses
import main
import methods
import netlib
from auxiliaries import UserError


def resolved(*flags: str) -> Any:
    return config.resolve(config.parse([*SMALL, "--embed_dim", "16", "--loss", "marginloss", *flags]))


def network(*flags: str) -> netlib.EmbeddingNet:
    torch.manual_seed(0)
    return netlib.networkselect(resolved(*flags))


def tinted(num_classes: int, per_class: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Noise of a seed around a color of each class, `(N, 3, 32, 32)` uint8, and labels `(N,)`."""
    labels = np.repeat(np.arange(num_classes), per_class)
    color = 30 + 196 * torch.rand(num_classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = 50 * torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 25
    return (color[labels] + noise).clamp(0, 255).to(torch.uint8), labels


def trained(steps: int, *flags: str, num_classes: int = 4) -> methods.MetricLossOnly:
    """A network after some steps."""
    method = methods.build_training(resolved("--lr", "1e-3", *flags), num_classes, torch.device("cpu"))
    method.start_epoch(1)
    for step in range(steps):
        images, labels = tinted(num_classes, 4, seed=1 + step)
        torch.manual_seed(step)
        np.random.seed(step)
        method.step(images, torch.from_numpy(labels), epoch=1)
    return method


def test_bf16_network_finds_the_same_images() -> None:
    net = trained(60, "--loss", "crossentropy", num_classes=20).net.eval()
    images, labels = tinted(20, 20)
    rough = copy.deepcopy(net)
    rough.precision = "bf16"
    with torch.inference_mode():
        exact, in_bf16 = net(images), rough(images)
    assert in_bf16.dtype == torch.float32
    assert not torch.equal(in_bf16, exact)
    assert torch.cosine_similarity(in_bf16, exact).min() > 0.99
    recall, in_bf16_recall = (evaluate.recall_at_k(evaluate.EmbeddingSpace(e, labels), 1) for e in (exact, in_bf16))
    assert recall > 0.9
    assert in_bf16_recall == pytest.approx(recall, abs=0.005)


def test_embedding_layer_and_loss_stay_in_32_bits() -> None:
    net = network("--precision", "bf16")
    images, _ = tinted(2, 4)
    features = net.features(images)
    assert features.dtype == torch.float32
    assert torch.equal(net(images), net.embed_features(features))
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_channels_last_computes_the_same() -> None:
    plain, last = network(), network("--channels_last")
    weight = next(value for value in last.backbone.parameters() if value.ndim == 4 and value.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert list(plain.state_dict()) == list(last.state_dict())
    images, _ = tinted(2, 4)
    torch.testing.assert_close(last.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


def test_compiled_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, compile_plainly = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_plainly(module, backend=compiler))
    plain, compiled = network().eval(), network("--compile").eval()
    assert list(plain.state_dict()) == list(compiled.state_dict())
    images, _ = tinted(2, 8)
    with torch.inference_mode():
        for count in (16, 16, 12, 12, 5, 5, 16):
            assert torch.equal(compiled(images[:count]), plain(images[:count]))
    assert 1 <= compiler.frame_count <= 3


def test_without_a_compiler_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", lambda _: broken)
    net, plain = network("--compile").eval(), network().eval()
    images, _ = tinted(2, 4)
    for _ in range(2):
        assert torch.equal(net(images), plain(images))
    printed = capsys.readouterr().err
    assert printed.count("--compile does not work here, the run goes on without it (no C++ compiler") == 1


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "RMSprop"])
def test_fused_optimizer_gives_the_same_weights(optimizer: str) -> None:
    plain, fused = (trained(1, "--optimizer", optimizer, *more) for more in ([], ["--fused"]))
    assert fused.optimization.groups()[0].get("fused") is (None if optimizer == "RMSprop" else True)
    for one, other in zip(plain.net.parameters(), fused.net.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def optimization(
    scaler: torch.amp.GradScaler | None = None, **kwargs: Any
) -> tuple[methods.Optimization, torch.Tensor]:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    group = {"name": "network", "part": "trunk", "params": [weight], "lr": 0.1, "weight_decay": 0.0}
    settings: dict[str, tuple[str, dict[str, Any]]] = {"trunk": ("SGD", {})}
    return methods.Optimization([group], settings, scaler=scaler, **kwargs), weight


@pytest.mark.parametrize("clip", [{}, {"clip_grad_norm": 0.5}, {"clip_grad_value": 0.3}, {"accumulate": 2}])
def test_scaled_gradients_make_the_same_step(clip: dict[str, Any]) -> None:
    plain, expected = optimization(**clip)
    scaled, weight = optimization(torch.amp.GradScaler("cpu", init_scale=1024.0), **clip)
    for factor in (1.0, 3.0, -2.0, 0.5):
        plain.step((expected.square() * factor).sum())
        scaled.step((weight.square() * factor).sum())
    assert torch.equal(weight, expected)


def test_overflow_makes_no_step_and_lowers_the_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, weight = optimization(scaler)
    scaled.step((weight * torch.inf).sum())
    assert weight.tolist() == [1.0, 2.0]
    assert scaler.get_scale() == 512.0
    state = scaled.state_dict()
    restored = torch.amp.GradScaler("cpu", init_scale=8.0)
    again, _ = optimization(restored)
    again.load_state_dict({**state, "epoch": 1})
    assert restored.get_scale() == 512.0
    assert "scaler" not in optimization()[0].state_dict()


# Gradients of large batches

LIBRARY = ("TripletMarginLoss", "MultiSimilarityLoss", "ArcFaceLoss", "SupConLoss", "ProxyAnchorLoss")


def small_network(dropout: float = 0.0, norm: bool = False) -> netlib.EmbeddingNet:
    """A network in float64."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8) if norm else torch.nn.Identity(), torch.nn.ReLU()),
        *(torch.nn.Dropout(dropout), torch.nn.Conv2d(8, 8, 3, stride=2)),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()),
    )
    return netlib.EmbeddingNet(backbone, 8, 6).double()


def gradients(net: netlib.EmbeddingNet, criterion: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    torch.manual_seed(0)
    embeddings = net(images)
    torch.manual_seed(1)
    np.random.seed(1)
    criterion(embeddings, labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("loss", [*losses.LOSSES, *LIBRARY])
def test_gradients_of_chunks_are_those_of_the_whole_batch(loss: str) -> None:
    net, (images, labels) = small_network(), tinted(6, 4)
    opt = config.resolve(config.parse([*SMALL, "--embed_dim", "6", "--loss", loss, "--bs", "24"]))
    torch.manual_seed(0)
    criterion = losses.loss_select(opt.loss, opt, [], 6)[0].double()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    images, targets = images[order], torch.from_numpy(labels)[order]
    whole = gradients(net, criterion, images, targets)
    net.chunk = 7
    assert whole.abs().max() > 0
    torch.testing.assert_close(gradients(net, criterion, images, targets), whole, rtol=1e-6, atol=1e-12)


def test_chunks_with_dropout_have_the_same_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (images, labels) = small_network(dropout=0.5), tinted(4, 4)
    criterion, targets = losses.TripletLoss(losses.Sampler("semihard")), torch.from_numpy(labels)
    net.chunk = 5
    chunked = gradients(net, criterion, images, targets)
    features, net.chunk = net._features, None
    monkeypatch.setattr(net, "_features", lambda batch: torch.cat([features(chunk) for chunk in batch.split(5)]))
    torch.testing.assert_close(chunked, gradients(net, criterion, images, targets), rtol=1e-12, atol=0)


def test_chunks_keep_only_their_images_in_memory() -> None:
    net, (images, _) = small_network(), tinted(8, 8)

    def kept() -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images)
        return sum(sizes)

    whole, net.chunk = kept(), 8
    assert kept() < whole / 8


def test_a_chunk_counts_once_in_batchnorm() -> None:
    net, (images, labels) = small_network(norm=True), tinted(4, 4)
    once = copy.deepcopy(net)
    net.chunk = 8
    gradients(net, losses.TripletLoss(losses.Sampler("semihard")), images, torch.from_numpy(labels))
    with torch.no_grad():
        for chunk in images.split(8):
            once(chunk)
    assert torch.equal(net.backbone[1].running_var, once.backbone[1].running_var)  # type: ignore[index]


def test_batchnorm_that_learns_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    trained(1, "--grad_cache", "4")
    assert "--grad_cache 4: BatchNorm normalizes over 4 images instead of 112" in capsys.readouterr().err
    with pytest.raises(UserError, match="--grad_cache 112 doesn't split batches of --bs 112"):
        resolved("--grad_cache", "112")


# What --fast means


def test_fast_fills_only_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(*flags: str) -> dict[str, Any]:
        opt = config.resolve(config.parse(["--arch", "resnet18", "--not_pretrained", *flags]))
        return {name: getattr(opt, name) for name in config.EXACT}

    able: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert speed() == config.EXACT
    assert speed("--fast") == {**config.EXACT, "channels_last": True}
    able["avx512_bf16"] = True
    assert speed("--fast") == {**config.EXACT, "channels_last": True, "precision": "bf16"}
    assert speed("--fast", "--no-channels_last", "--precision", "fp32") == config.EXACT
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    on_gpu = {"precision": "bf16", "channels_last": True, "compile": False, "fused": True, "deterministic": False}
    assert speed("--fast") == on_gpu
    assert speed("--fast", "--deterministic") == {**on_gpu, "deterministic": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert speed("--fast") == {**on_gpu, "precision": "fp16"}


def test_precision_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--precision fp16 takes a CPU"):
        resolved("--precision", "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    with pytest.raises(UserError, match="--precision bf16: this GPU does not compute in bfloat16"):
        resolved("--precision", "bf16", "--gpu", "0")


@pytest.mark.slow
def test_resumed_quick_run_is_the_uninterrupted_one(source: Path, tmp_path: Path, run: Run) -> None:
    quick = ["--precision", "bf16", "--channels_last", "--fused", "--grad_cache", "3"]
    run(*quick)
    whole = training_flags(source, tmp_path, "--dataset", "tiny", "--savename", "whole", "--n_epochs", "3", *quick)
    main.command(whole)
    main.command(["--save_path", str(tmp_path), "--resume_training", "--savename", "run", "--n_epochs", "3"])
    assert_same_run(tmp_path / "tiny" / "run", tmp_path / "tiny" / "whole")
